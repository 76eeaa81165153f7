"""SpikingResformer: stages of dual spike self-attention and grouped feed-forward nets between membrane potentials.

Paper: "SpikingResformer: Bridging ResNet and Vision Transformer in Spiking Neural Networks" (arXiv:2403.14302). Code:
xyshi2000/SpikingResformer, models/spikingresformer.py. Every convolution but the first takes spikes; what flows from
block to block is current, which goes to the classifier (without bias) as it is.

Dual spike self-attention (DSSA) multiplies currents by spikes, twice: a convolution over patches makes two currents of
each, the first asks the spikes of all places, the second is summed over what the answers let fire. Both products are
divided by the root of how many terms are not zero on average, which takes the firing rate of each head: a running mean
that training learns, as a batch norm learns its statistics. A head whose running rate is 0 (all of them in a net that
was never trained) counts as firing always; the authors' code divides by zero there.

Here the second factor takes the number of patches of the map that comes; the code that of the size it was built for.
Not here: the net for DVS128 Gesture.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikezoo.checks import choice, number, whole
from spikezoo.layers import ConvNormNeuron, Pool, Stem, broadcast_steps, conv_out
from spikezoo.models._base import SpikingModel, drop_path_rates, truncated_normal
from spikezoo.models.ms_resnet import Fire
from spikezoo.models.spikformer import SpikformerBlock
from spikezoo.neurons import NeuronFactory
from spikezoo.registry import ModelRow, register_rows

__all__ = ["DualSpikeAttention", "GroupedMLP", "HeadRate", "SpikingResformer", "checkpoint_filter_fn"]


class PooledStem(Stem):
    """Layers without neurons: an image passes all of them once, and its current is repeated."""

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        """Map ``[1 or T, B, C, H, W]`` to ``[T, B, C', H', W']``."""
        for layer in self:
            x = layer(x)
        return broadcast_steps(x, T)


class HeadRate(nn.Module):
    """Running mean of the firing rate of each head, learned in training from time, batch, channels and places.

    Args:
        heads: Attention heads.

    Attributes:
        momentum: Share of the newest rate; the first that is not 0 everywhere is taken whole.
        running_mean: ``[heads]``.
    """

    running_mean: Tensor

    def __init__(self, heads: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.momentum = 0.001
        self.register_buffer("running_mean", torch.zeros(heads, **dd))

    def forward(self, spikes: Tensor) -> Tensor:
        """Rates ``[heads, 1, 1]`` for spikes ``[T, B, heads, ...]``; 1 for a head that has none yet."""
        rate = self.running_mean
        if self.training:
            with torch.no_grad():
                now = spikes.to(rate.dtype).mean((0, 1, 3, 4))
                rate = torch.where((rate == 0).all(), now, rate)
                rate = rate * (1 - self.momentum) + now * self.momentum
                self.running_mean.copy_(rate)
        return torch.where(rate > 0, rate, torch.ones_like(rate))[:, None, None]


class DualSpikeAttention(nn.Module):
    """Dual spike self-attention (DSSA): currents of patches times spikes of places, and currents times its spikes.

    Args:
        dim: Channels.
        heads: Attention heads.
        size: Height and width of the map.
        patch: Height and width of a patch.
        neuron: Factory of the neurons.
    """

    def __init__(
        self, dim: int, heads: int, size: Sequence[int], *, patch: int, neuron: NeuronFactory, dd: dict[str, Any]
    ) -> None:
        super().__init__()
        self.heads = heads
        self.neuron_in = neuron(dim, size)
        self.patches = ConvNormNeuron(dim, 2 * dim, size, kernel=patch, stride=patch, padding=0, dd=dd)
        self.rate_in, self.rate_attn = HeadRate(heads, dd), HeadRate(heads, dd)
        height, width = self.patches.out_size
        self.neuron_attn = neuron(heads, (height * width, size[0] * size[1]))
        self.neuron = neuron(dim, size)
        self.proj = ConvNormNeuron(dim, dim, size, kernel=1, dd=dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map currents ``[T, B, D, h, w]`` to currents of the same shape."""
        x = self.neuron_in(x)
        size = x.shape[3:]
        first, second = self.patches(x).flatten(3).unflatten(2, (self.heads, -1)).chunk(2, 3)
        places = x.flatten(3).unflatten(2, (self.heads, -1))  # [T, B, heads, c, n]
        factor = (self.rate_in(places) * places.shape[3]).sqrt().reciprocal()
        product = first.transpose(3, 4) @ places.to(first.dtype)  # [T, B, heads, patches, n]
        attn = self.neuron_attn(product * factor.to(x.dtype))
        factor = (self.rate_attn(attn) * attn.shape[3]).sqrt().reciprocal()
        current = second @ attn.to(second.dtype) * factor.to(x.dtype)
        return self.proj(self.neuron(current.flatten(2, 3).unflatten(3, size)))


class GroupedMLP(nn.Module):
    """Group-wise spiking feed-forward net (GWSFFN): 1x1, a 3x3 in groups around which the current flows, and 1x1.

    Args:
        dim: Channels.
        hidden: Channels between the 1x1 convolutions.
        groups: Groups of the 3x3 convolution.
        size: Height and width of the map.
        neuron: Factory of the neurons.
    """

    def __init__(
        self, dim: int, hidden: int, groups: int, size: Sequence[int], *, neuron: NeuronFactory, dd: dict[str, Any]
    ) -> None:
        super().__init__()
        self.neuron_in = neuron(dim, size)
        self.up = ConvNormNeuron(dim, hidden, size, kernel=1, dd=dd)
        self.neuron = neuron(hidden, size)
        self.conv = ConvNormNeuron(hidden, hidden, size, groups=groups, dd=dd)
        self.neuron_out = neuron(hidden, size)
        self.down = ConvNormNeuron(hidden, dim, size, kernel=1, dd=dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map currents ``[T, B, D, h, w]`` to currents of the same shape."""
        x = self.up(self.neuron_in(x))
        return self.down(self.neuron_out(self.conv(self.neuron(x)) + x))


class SpikingResformer(SpikingModel):
    """A stem without neurons, stages of attention and feed-forward nets, and the classifier.

    Args:
        widths: Channels of the stages.
        depths: Blocks of the stages.
        heads: Attention heads of the stages.
        patches: Height and width of the attention's patches, stage by stage.
        stem: conv7 (7x7 of stride 2, max-pooling) or, for small images, conv3 (3x3 of stride 1).
        ratio: Hidden channels of the feed-forward nets over their width.
        group_size: Channels of a group of their 3x3 convolutions.
        drop_path_rate: Stochastic depth, falling linearly from the last block's; the authors have none.
        **kwargs: Arguments of :class:`SpikingModel`.

    Raises:
        ValueError: Another ``stem``, lists of different lengths, channels that heads or groups do not divide.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        patches: Sequence[int] = (4, 2, 1),
        stem: str = "conv7",
        ratio: int = 4,
        group_size: int = 64,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        dd, neurons = self.dd, self.neuron_factory
        large = choice("stem", stem, ("conv7", "conv3")) == "conv7"
        whole("ratio", ratio)
        whole("group_size", group_size)
        number("drop_path_rate", drop_path_rate, 0, 1)
        lists = {"widths": widths, "depths": depths, "heads": heads, "patches": patches}
        if len({len(values) for values in lists.values()}) != 1:
            given = ", ".join(f"{name}={list(values)}" for name, values in lists.items())
            raise ValueError(f"{given}: give one number each a stage.")
        for width, count in zip(widths, heads, strict=True):
            for name, part, of in (("heads", count, width), ("group_size", group_size, width * ratio)):
                if of % part:
                    raise ValueError(f"{name}={part} does not divide {of} channels (widths={list(widths)}).")
        reduction = 4 if large else 1
        self.min_img_size = max(reduction * patch << stage for stage, patch in enumerate(patches))
        self.check_size(self.img_size)

        kernel, stride = (7, 2) if large else (3, 1)
        first = ConvNormNeuron(self.in_chans, widths[0], self.img_size, kernel=kernel, stride=stride, dd=dd)
        size = conv_out(first.out_size, 3, 2, 1) if large else first.out_size
        pool = [Pool(nn.MaxPool2d(3, 2, 1))] if large else []
        self.add_stem(PooledStem(first, *pool), widths[0], reduction)
        rates = drop_path_rates(drop_path_rate, sum(depths))
        for stage, (width, depth, count, patch) in enumerate(zip(widths, depths, heads, patches, strict=True)):
            blocks: list[nn.Module] = []
            if stage:
                down = ConvNormNeuron(widths[stage - 1], width, size, stride=2, dd=dd)
                blocks.append(nn.Sequential(Fire(neurons(widths[stage - 1], size)), down))
                size, reduction = down.out_size, 2 * reduction
            for _ in range(depth):
                attn = DualSpikeAttention(width, count, size, patch=patch, neuron=neurons, dd=dd)
                groups = width * ratio // group_size
                mlp = GroupedMLP(width, width * ratio, groups, size, neuron=neurons, dd=dd)
                blocks.append(SpikformerBlock(attn, mlp, rates.pop(0)))
            self.add_stage(blocks, width, reduction)
        self.finish(widths[-1], head_bias=False)
        for module in self.modules():  # the authors'
            if isinstance(module, nn.Conv2d | nn.Linear):
                truncated_normal(module.weight)


# --------------------------------------------------------------------------------------------------------------
# Checkpoints of the official code
# --------------------------------------------------------------------------------------------------------------

_PARTS = {
    "W": "attn.patches.conv",
    "norm": "attn.patches.norm",
    "Wproj": "attn.proj.conv",
    "norm_proj": "attn.proj.norm",
    "up.1": "mlp.up.conv",
    "up.2": "mlp.up.norm",
    "conv.0.1": "mlp.conv.conv",
    "conv.0.2": "mlp.conv.norm",
    "down.1": "mlp.down.conv",
    "down.2": "mlp.down.norm",
}


def _renamed(name: str) -> str:
    """Our name of an entry of an official state dict; the name itself where it is none, which loading then tells."""
    name = name.replace(".bn.", ".").replace("classifier.", "head.fc.")
    stem = re.fullmatch(r"prologue\.([01])\.(\w+)", name)
    if stem:
        return f"stem.0.{('conv', 'norm')[int(stem[1])]}.{stem[2]}"
    layer = re.fullmatch(r"layers\.(\d+)\.(\d+)\.(.+)", name)
    if layer is None:
        return name
    stage, place, rest = int(layer[1]), int(layer[2]), layer[3]
    if stage and not place:
        return f"stages.{stage}.0.1.{rest}"  # conv, norm
    block = f"stages.{stage}.{(place - bool(stage)) // 2 + bool(stage)}"  # attention and feed-forward net in turn
    if rest.startswith("firing_rate_"):
        return f"{block}.attn.rate_{'in' if rest.endswith('x') else 'attn'}.running_mean"
    part, _, leaf = rest.rpartition(".")
    return f"{block}.{_PARTS[part]}.{leaf}" if part in _PARTS else name


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Rename a state dict of the official code to this model's names; ours is returned as it is.

    Args:
        state_dict: Names to tensors; may lie under 'state_dict' or 'model', with or without 'module.' before each name.
        model: The model that it is for.
    """
    for key in ("state_dict", "model"):
        state_dict = state_dict.get(key, state_dict)
    state = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if not any(name.startswith("prologue.") for name in state):
        return state
    return {_renamed(name): value.flatten() if ".firing_rate_" in name else value for name, value in state.items()}


# --------------------------------------------------------------------------------------------------------------
# Named models
# --------------------------------------------------------------------------------------------------------------

RESFORMER = "SpikingResformer: Bridging ResNet and Vision Transformer in Spiking Neural Networks (arXiv:2403.14302)"
RESFORMER_NEURON = {"tau": 2.0, "surrogate": "arctan", "detach_reset": True}


def _row(letters: str, widths: tuple[int, int, int], parameters: int, **arguments: object) -> ModelRow:
    heads = tuple(width // 64 for width in widths)
    layout = {"widths": widths, "depths": (1, 2, 3), "heads": heads, "neuron_defaults": RESFORMER_NEURON}
    note = f"SpikingResformer-{letters}: three stages, heads and groups of 64 channels."
    row = ModelRow({**layout, **arguments}, parameters=parameters, paper=RESFORMER, note=note, pool_size=(8, 8))
    if "stem" in arguments:
        return row
    return dataclasses.replace(row, num_classes=1000, img_size=224, pool_size=(14, 14))


MICRO: dict[str, Any] = {"depths": (1, 1, 1), "heads": (1, 2, 4), "group_size": 8, "ratio": 2}

ROWS = {
    "spikingresformer_ti": _row("Ti for ImageNet", (64, 192, 384), 11_180_992),
    "spikingresformer_s": _row("S for ImageNet", (64, 256, 512), 17_813_824),
    "spikingresformer_m": _row("M for ImageNet", (64, 384, 768), 35_601_472),
    "spikingresformer_l": _row("L for ImageNet", (128, 512, 1024), 60_375_680),
    "spikingresformer_cifar": _row("Ti* for 32x32 images", (64, 192, 384), 10_793_152, stem="conv3"),
    "test_spikingresformer": dataclasses.replace(
        _row("", (8, 12, 16), 14_832, stem="conv3", **MICRO), note="Micro-model for tests."
    ),
}

default_cfgs = register_rows(__name__, SpikingResformer, ROWS)
