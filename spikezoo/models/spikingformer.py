"""Spikingformer: Spikformer with residuals of membrane potentials, so that spikes alone enter every convolution.

Paper: "Spikingformer: Spike-driven Residual Learning for Transformer-based Spiking Neural Network" (arXiv:2304.11954).
Code: zhouchenlin2096/Spikingformer, cifar10/model.py and imagenet/model.py. Every branch of a block begins with a
neuron and ends in a norm; the stem ends in a convolution without neuron in place of the position encoding.

Where paper and code differ, the code is the default: its queries, keys and values have no bias on CIFAR either, so that
the counts are 0.002 to 0.005 M below Spikformer's; its drop path is made and never applied, as its norms norm1 and
norm2 are (``drop_path_rate`` drops here); features go to the classifier as potentials, without a neuron.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from spikezoo.layers import ConvNormNeuron
from spikezoo.models import spikformer
from spikezoo.models._base import truncated_normal
from spikezoo.models.spikformer import FOUR_POOLS, IMAGENET_INPUT, SPIKFORMER_NEURON, Spikformer
from spikezoo.registry import ModelRow, register_rows

__all__ = ["Spikingformer", "checkpoint_filter_fn"]


class Spikingformer(Spikformer):
    """Five convolutions, transformer blocks between membrane potentials, and the classifier.

    Args:
        *args: As :class:`~spikezoo.models.spikformer.Spikformer`.
        **kwargs: Likewise.
    """

    residuals = ("membrane",)
    fourth_fires = True

    def _make_encoding(self, dim: int, size: Sequence[int], membrane: bool) -> nn.Module:
        return ConvNormNeuron(dim, dim, size, dd=self.dd)

    def _init_weights(self) -> None:
        # The authors': convolutions keep torch's.
        if isinstance(self.head.fc, nn.Linear):
            truncated_normal(self.head.fc.weight)
            nn.init.zeros_(self.head.fc.bias)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Rename a state dict of the official code (CIFAR or ImageNet) to this model's names; ours is returned as it is.

    Args:
        state_dict: Names to tensors; may lie under 'state_dict' or 'model', with or without 'module.' before each name.
        model: The model that it is for.
    """
    for key in ("state_dict", "model"):
        state_dict = state_dict.get(key, state_dict)
    stem = [name for name, layer in model.get_submodule("stem").named_children() if isinstance(layer, ConvNormNeuron)]
    tokens: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in state_dict.items():
        name = name.removeprefix("module.").replace(".mlp.mlp", ".mlp.fc")
        # block0_conv.weight of the code for CIFAR, proj_conv.weight and proj1_conv.weight of that for ImageNet.
        match = re.fullmatch(r"patch_embed\.(?:block|proj)([0-4]?)_(conv|bn)\.(\w+)", name)
        if match is None:
            rest[name] = value
        else:
            layer = "norm" if match[2] == "bn" else "conv"
            tokens[f"stem.{stem[int(match[1] or 0)]}.{layer}.{match[3]}"] = value
    return tokens | spikformer.checkpoint_filter_fn(rest, model)


SPIKINGFORMER = (
    "Spikingformer: Spike-driven Residual Learning for Transformer-based Spiking Neural Network (arXiv:2304.11954)"
)
MEMBRANE: dict[str, Any] = {"qkv_bias": False, "residual": "membrane", "neuron_defaults": SPIKFORMER_NEURON}


def _row(dim: int, depth: int, heads: int, parameters: int, note: str = "", **arguments: object) -> ModelRow:
    note = note or f"Spikingformer-{depth}-{dim} for 32x32 images, {heads} heads of 32 channels."
    arguments = {"dim": dim, "depth": depth, "heads": heads, **MEMBRANE, **arguments}
    return ModelRow(arguments, parameters=parameters, paper=SPIKINGFORMER, note=note, pool_size=(8, 8))


def _imagenet_row(dim: int, parameters: int) -> ModelRow:
    row = _row(dim, 8, 8, parameters, f"Spikingformer-8-{dim} for ImageNet, 8 heads.", **FOUR_POOLS)
    return dataclasses.replace(row, **IMAGENET_INPUT)


ROWS = {
    "spikingformer_2_256": _row(256, 2, 8, 2_566_954),
    "spikingformer_4_256": _row(256, 4, 8, 4_152_106),
    "spikingformer_2_384": _row(384, 2, 12, 5_762_746),
    "spikingformer_4_384": _row(384, 4, 12, 9_320_122),
    "spikingformer_8_384": _imagenet_row(384, 16_816_024),
    "spikingformer_8_512": _imagenet_row(512, 29_689_384),
    "spikingformer_8_768": _imagenet_row(768, 66_338_632),
    "test_spikingformer": _row(16, 3, 1, 11_140, "Micro-model for tests.", mlp_ratios=2),
}

default_cfgs = register_rows(__name__, Spikingformer, ROWS)
