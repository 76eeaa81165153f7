"""Eight bits: spikes as bytes times eight-bit weights, summed in 32 bits."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikezoo.checkpoint.sparse import levels_of, round_to_levels
from spikezoo.graph import Graph, Node
from spikezoo.layers import ConvNormNeuron, LinearNormNeuron, TernaryConv2d, TernaryLinear, signs_and_gain
from spikezoo.neurons import SpikingNeuron

__all__ = ["EightBit", "InFloat", "InRows", "forget", "to_int8", "whole_numbers", "whole_signals"]


def whole_numbers(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor] | None:
    """Weights as whole numbers and what they are multiplied with, one for all or one a channel; None for others."""
    if isinstance(layer, TernaryConv2d | TernaryLinear):
        return signs_and_gain(layer.weight.detach())
    return levels_of(layer.weight)


# oneDNN's packed weights are opaque to a compiler, so its graph holds a key to them; a graph that is loaded into
# another process packs them again, at its first call. The key is a hash of the weights: a compiler keeps graphs on disk
# and finds them by what they hold.
_PACKED: dict[int, Tensor] = {}


def forget(*keys: int) -> None:
    """Let go of what was packed for a layer; who still needs it packs it again."""
    for key in keys:
        _PACKED.pop(key, None)


@torch.library.custom_op("spikezoo::eight_bit", mutates_args=())
def _eight_bit(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int, key: int
) -> Tensor:
    """Sums ``[N, C', H', W']`` in float32 of bytes ``[N, C, H, W]`` times eight-bit weights."""
    op, ones, geometry = torch.ops.onednn, torch.ones(len(weight)), (stride, padding, dilation, groups)
    packed = _PACKED.get(key)
    if packed is None:
        packed = _PACKED[key] = op.qconv_prepack(weight, ones, 1.0, 0, *geometry, list(x.shape))
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    return op.qconv2d_pointwise(x, 1.0, 0, packed, ones, zeros, None, *geometry, 1.0, 0, torch.float32, "none", [], "")


@_eight_bit.register_fake
def _(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int, key: int
) -> Tensor:
    sizes = zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    height, width = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in sizes)
    shape = (x.shape[0], weight.shape[0], height, width)
    return x.new_empty(shape, dtype=torch.float32).to(memory_format=torch.channels_last)


class EightBit(nn.Module):
    """A convolution or linear layer on spikes: bytes times eight-bit weights, 32-bit sums, then the scale and the bias.

    Args:
        layer: The layer. Of a ternary one the weights are its signs, exactly; of another one they are rounded to 255
            levels a channel, if they are not yet.
        levels: What the input is multiplied with to become whole: 1 for spikes, 4 for averages of four.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear, levels: int) -> None:
        super().__init__()
        self.levels, self.ternary = levels, isinstance(layer, TernaryConv2d | TernaryLinear)
        weight = layer.weight.detach()
        found = whole_numbers(layer) or levels_of(round_to_levels(weight))
        if found is None:
            raise ValueError(f"A weight of {layer} is not finite, or too large for eight-bit levels.")
        whole, scale = found
        self.linear = isinstance(layer, nn.Linear)
        conv = None if isinstance(layer, nn.Linear) else layer
        self.stride, self.padding = (conv.stride, conv.padding) if conv is not None else ((1, 1), (0, 0))
        self.dilation, self.groups = (conv.dilation, conv.groups) if conv is not None else ((1, 1), 1)
        self.register_buffer("weight", whole.to(torch.int8).view(*weight.shape, *[1] * (4 - weight.dim())))
        self.register_buffer("scale", scale if self.linear or self.ternary else scale.view(-1, 1, 1))
        self.bias = layer.bias
        self.geometry: Any = (list(self.stride), list(self.padding), list(self.dilation), self.groups)
        facts = repr((self.weight.shape, self.geometry)).encode()
        self.key = int.from_bytes(hashlib.sha256(self.weight.numpy().tobytes() + facts).digest()[:7])
        weakref.finalize(self, forget, self.key)

    def sums(self, x: Tensor) -> Tensor:
        """Map bytes ``[N, C, H, W]`` to ``[N, C', H', W']`` float32."""
        return _eight_bit(x, self.weight, *self.geometry, self.key)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        if x.dtype != torch.uint8:
            x = (x * self.levels if self.levels > 1 else x).to(torch.uint8)
        y = self.sums(x[..., None, None] if self.linear else x)
        y = y.flatten(1) if self.linear else y
        y = y / self.levels if self.levels > 1 else y  # a power of two: exact
        y = y * self.scale
        return y if self.bias is None else y + self.bias.view((-1,) if self.linear else (-1, 1, 1))


# --------------------------------------------------------------------------------------------------------------
# Which signals are whole numbers, and who may read them as bytes
# --------------------------------------------------------------------------------------------------------------


def _area(pool: nn.Module, size: Sequence[int]) -> int:
    """By how many spikes a pooling of maps of a size divides, where that is a power of two; 0 for other fractions."""
    if isinstance(pool, nn.MaxPool2d):
        return 1
    if not isinstance(pool, nn.AvgPool2d) or pool.padding not in (0, (0, 0)) or pool.divisor_override:
        return 0
    kernel, stride = (v if isinstance(v, tuple) else (v, v) for v in (pool.kernel_size, pool.stride))
    if pool.ceil_mode and any((s - k) % d for s, k, d in zip(size, kernel, stride, strict=True)):
        return 0  # windows at the border are smaller
    area = kernel[0] * kernel[1]
    return area if area & (area - 1) == 0 and area <= 64 else 0


def whole_signals(graph: Graph) -> dict[Node, tuple[int, int]]:
    """Nodes that put out whole numbers, or fractions of them.

    Returns:
        What a node's output must be multiplied with to become whole, a power of two, and the largest value before
        that. Followed along the graph, not read from values: a silent layer would prove anything.
    """
    found: dict[Node, tuple[int, int]] = {}
    for node in graph.nodes:
        if isinstance(node.module, SpikingNeuron):
            found[node] = (1, 1)
        elif any(source not in found for source in node.inputs) or not node.inputs:
            continue  # outputs of ReLU are not whole, those of Sign not positive
        elif node.kind == "pool" and (area := _area(node.pooling, node.inputs[0].shape[-2:])):
            level, largest = found[node.inputs[0]]
            found[node] = (level * area, largest)
        elif node.kind == "flatten":
            found[node] = found[node.inputs[0]]
        elif node.kind == "join":
            sources = [found[source] for source in node.inputs]
            found[node] = (max(level for level, _ in sources), sum(largest for _, largest in sources))
    return found


def _holder(model: nn.Module, node: Node) -> str | None:
    """Name of what computes a node and nothing else: its layer of spikezoo.layers, or the part itself."""
    owner = node.owner if node.module is None else node.name.rpartition(".")[0]
    if isinstance(model.get_submodule(owner), ConvNormNeuron | LinearNormNeuron):
        return owner
    return None if node.module is None else node.name


def _as_bytes(model: nn.Module, graph: Graph) -> list[SpikingNeuron]:
    """Neurons whose spikes, and sums of them, are only read by who can read bytes or gets them as floats."""
    reads: dict[Node, bool] = {}
    sums = whole_signals(graph)
    for node in reversed(graph.nodes):

        def can(reader: Node) -> bool:
            if reader.kind in ("layer", "pool", "head"):
                return True
            if reader.kind == "average":  # a part of a layer that gets floats
                return _holder(model, reader) is not None
            if reader.kind == "flatten":
                return reads[reader]
            # A current that is added makes floats of them.
            return reader.kind == "join" and (reader not in sums or (sums[reader][1] <= 255 and reads[reader]))

        reads[node] = all(can(reader) for reader in node.readers)
    return [node.module for node in graph.of("neuron") if isinstance(node.module, SpikingNeuron) and reads[node]]


class InRows(nn.Module):
    """A float32 convolution that rounds as the model's, which has no channels-last format; the layers around it do."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution."""
        return self.conv(x.contiguous()).contiguous(memory_format=torch.channels_last)


class InFloat(nn.Module):
    """A module that cannot read bytes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """As the module."""
        return self.module(x.float(), *arguments)


def _is_summed_rightly(layer: Any) -> bool:
    """Whether oneDNN sums this layer's bytes, and does it rightly.

    Of one channel, by strides of which only that of the columns skips places, it reads beside the map where the output
    is one place wide (torch 2.14.1).
    """
    if not isinstance(layer, nn.Conv2d):
        return True
    return not isinstance(layer.padding, str) and (layer.in_channels > 1 or layer.stride[0] == layer.stride[1])


def to_int8(model: nn.Module, graph: Graph) -> str:
    """Replace the layers on spikes and let neurons give bytes; say how many layers there are."""
    whole = whole_signals(graph)
    layers = [node for node in graph.of("layer") if node.name != "head.fc"]
    eight: set[str] = set()
    unread: dict[str, None] = {}  # who reads spikes and cannot read bytes
    neurons = _as_bytes(model, graph)
    for node in layers:
        level, largest = whole.get(node.inputs[0], (0, 0))
        fits = level and level * largest <= 255 and _is_summed_rightly(node.module)
        if fits and isinstance(node.module, nn.Conv2d | nn.Linear):
            model.set_submodule(node.name, EightBit(node.module, level))
            eight.add(node.name)
        elif isinstance(node.module, nn.Conv2d):
            model.set_submodule(node.name, InRows(node.module))
    for node in (*layers, *graph.of("pool")):
        # Not even the largest of bytes, where torch takes maps of 255 places at most.
        holder = _holder(model, node)
        if holder and node.name not in eight and (node.kind == "layer" or holder == node.name):
            unread[holder] = None
    for neuron in neurons:
        neuron.spike_dtype = torch.uint8
    for name in unread if neurons else ():
        model.set_submodule(name, InFloat(model.get_submodule(name)))
    return f"{len(eight)} of {len(layers)} convolutions and linear layers before the head in 8 bits"
