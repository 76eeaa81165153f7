"""Spike-driven Transformer (SDT): attention by masks and additions, no products of matrices of spikes.

Paper: "Spike-driven Transformer" (arXiv:2307.01694). Code: BICLab/Spike-Driven-Transformer, model/spikeformer.py,
module/ms_conv.py and module/sps.py. Keys mask values, their sums over the tokens make a neuron of each channel fire or
not, and those channels of the queries pass. The residuals are membrane potentials, and a last neuron stands between the
average of the tokens and the classifier.

Where paper and code differ, the code is the default: heads cut channels apart that meet nobody, so that their number
changes nothing; a convolution between heads (talking_heads) and a neuron (attn_lif) are made and never called, which
official parameter counts hold and ours do not; drop path is made and never applied (``drop_path_rate`` drops here). Not
here: the erosion that the code adds for event cameras (dvs_mode), and the second residual that it has within an MLP
whose hidden channels are as many as the outer ones (``mlp_ratios=1``, which no named net has), around its first layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikezoo.layers import ConvNormNeuron
from spikezoo.models import spikformer
from spikezoo.models._base import truncated_normal
from spikezoo.models.spikformer import FOUR_POOLS, IMAGENET_INPUT, SPIKFORMER_NEURON, PositionEncoding, Spikformer
from spikezoo.neurons import NeuronFactory
from spikezoo.registry import ModelRow, register_rows

__all__ = ["SpikeDrivenTransformer", "checkpoint_filter_fn"]


class MaskAttention(nn.Module):
    """Spike-driven self-attention (SDSA): the channels in which keys and values meet let the queries pass.

    Args:
        dim: Channels.
        size: Height and width of the map.
        qkv_bias: Whether queries, keys and values have a bias.
        neuron: Factory of the neurons.
        attention_neuron: Factory of the neuron of the sums.
    """

    def __init__(
        self,
        dim: int,
        size: Sequence[int],
        *,
        qkv_bias: bool,
        neuron: NeuronFactory,
        attention_neuron: NeuronFactory,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.neuron_in = neuron(dim, size)
        self.q = ConvNormNeuron(dim, dim, size, kernel=1, bias=qkv_bias, neuron=neuron, dd=dd)
        self.k = ConvNormNeuron(dim, dim, size, kernel=1, bias=qkv_bias, neuron=neuron, dd=dd)
        self.v = ConvNormNeuron(dim, dim, size, kernel=1, bias=qkv_bias, neuron=neuron, dd=dd)
        self.neuron = attention_neuron(dim, (1, 1))
        self.proj = ConvNormNeuron(dim, dim, size, kernel=1, bias=True, dd=dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map currents ``[T, B, D, h, w]`` to currents of the same shape."""
        x = self.neuron_in(x)
        q, k, v = self.q(x), self.k(x), self.v(x)
        # In float32 at least: the half precisions do not count to the tokens of a large map.
        met = (k * v).sum((3, 4), keepdim=True, dtype=torch.promote_types(k.dtype, torch.float32))
        return self.proj(q * self.neuron(met).to(q.dtype))


class AverageNeuron(nn.Module):
    """The mean over the map, and a neuron of each channel.

    Args:
        neuron: The neuron.
    """

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, D, h, w]`` to spikes ``[T, B, D, 1, 1]``."""
        return self.neuron(x.mean((3, 4), keepdim=True))


class SpikeDrivenTransformer(Spikformer):
    """Four convolutions, position encoding, blocks of masks and MLPs, a neuron of the average, and the classifier.

    Args:
        *args: As :class:`~spikezoo.models.spikformer.Spikformer`; ``heads`` and ``scale`` change nothing.
        **kwargs: Likewise.
    """

    residuals = ("membrane",)

    def _make_encoding(self, dim: int, size: Sequence[int], membrane: bool) -> nn.Module:
        return PositionEncoding(ConvNormNeuron(dim, dim, size, dd=self.dd), self.neuron_factory(dim, size))

    def _make_attention(
        self,
        dim: int,
        heads: int,
        size: Sequence[int],
        *,
        qkv_bias: bool,
        scale: float,
        membrane: bool,
        attention_neuron: NeuronFactory,
    ) -> nn.Module:
        neuron = self.neuron_factory
        return MaskAttention(dim, size, qkv_bias=qkv_bias, neuron=neuron, attention_neuron=attention_neuron, dd=self.dd)

    def _make_neck(self, dim: int) -> None:
        self.neck.append(AverageNeuron(self.neuron_factory(dim, (1, 1))))

    def _init_weights(self) -> None:
        # The authors': the classifier keeps torch's.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                truncated_normal(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Rename a state dict of the official code to this model's names; ours is returned as it is.

    Args:
        state_dict: Names to tensors; may lie under 'state_dict' or 'model', with or without 'module.' before each name.
        model: The model that it is for.
    """
    for key in ("state_dict", "model"):
        state_dict = state_dict.get(key, state_dict)
    used = {name: value for name, value in state_dict.items() if ".talking_heads." not in name}
    return spikformer.checkpoint_filter_fn(used, model)


SDT = "Spike-driven Transformer (arXiv:2307.01694)"
MASKS: dict[str, Any] = {"heads": 8, "qkv_bias": False, "residual": "membrane", "neuron_defaults": SPIKFORMER_NEURON}


def _row(dim: int, depth: int, parameters: int, note: str = "", **arguments: object) -> ModelRow:
    note = note or f"Spike-driven Transformer-{depth}-{dim} for 32x32 images."
    arguments = {"dim": dim, "depth": depth, **MASKS, **arguments}
    return ModelRow(arguments, parameters=parameters, paper=SDT, note=note)


def _imagenet_row(dim: int, depth: int, parameters: int) -> ModelRow:
    row = _row(dim, depth, parameters, f"Spike-driven Transformer-{depth}-{dim} for ImageNet.", **FOUR_POOLS)
    return dataclasses.replace(row, **{**IMAGENET_INPUT, "pool_size": (1, 1)})


ROWS = {
    "sdt_2_256": _row(256, 2, 2_566_954),
    "sdt_2_512": _row(512, 2, 10_233_418),
    "sdt_8_384": _imagenet_row(384, 8, 16_816_024),
    "sdt_6_512": _imagenet_row(512, 6, 23_373_352),
    "sdt_8_512": _imagenet_row(512, 8, 29_689_384),
    "sdt_10_512": _imagenet_row(512, 10, 36_005_416),
    "sdt_8_768": _imagenet_row(768, 8, 66_338_632),
    "test_sdt": _row(16, 3, 11_564, "Micro-model for tests.", mlp_ratios=(2, 3, 1.5), qkv_bias=True),
}

default_cfgs = register_rows(__name__, SpikeDrivenTransformer, ROWS)
