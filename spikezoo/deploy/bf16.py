"""bfloat16: convolutions and linear layers on spikes, summed as finely as possible where the spike is decided."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikezoo.deploy.int8 import whole_numbers
from spikezoo.deploy.norms import Affine
from spikezoo.graph import Graph, Node
from spikezoo.layers import ConvNormNeuron, LinearNormNeuron, is_mean, set_ternary
from spikezoo.neurons import SpikingNeuron

__all__ = ["to_bf16"]


class _In(nn.Module):
    """A convolution or linear layer that computes in one type, whatever it is given."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        return self.layer(x.to(self.dtype))


def _threshold(neuron: nn.Module | None, channels: int, like: Tensor) -> Tensor:
    """The input of each channel at which a neuron at rest begins to fire, about; 0 where there is none."""
    if not isinstance(neuron, SpikingNeuron):
        return torch.zeros_like(like)
    folded, config = neuron.folded, neuron.config
    # Of thresholds that differ from place to place the one in the middle: a mean would follow the odd ones out.
    at = folded.threshold.view(channels, -1).median(1).values if folded else torch.full_like(like, config.threshold)
    one = torch.ones_like(like)
    rest = one * (config.v_reset + config.v_init)
    # The charge is linear in its input.
    zero = neuron.charge(rest, 0 * one)
    slope = neuron.charge(rest, one) - zero
    return ((at - zero) / slope).nan_to_num(0, 0, 0)  # a folded threshold may be infinite: never, or always


def _affine(norm: nn.Module | None, layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
    """What a norm and the bias of the layer before it multiply the layer's sums with and add to them."""
    zero = layer.weight.new_zeros(len(layer.weight))
    bias = zero if layer.bias is None else layer.bias
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return zero + 1, bias.clone()
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    return scale, (0 if norm.bias is None else norm.bias) + scale * (bias - norm.running_mean)


def _only_reader(node: Node) -> Node | None:
    return node.readers[0] if len(node.readers) == 1 else None


def _norm_of(model: nn.Module, node: Node) -> tuple[str, nn.Module | None] | None:
    """Where the scale and the shift behind a layer's sums stand, and the norm that they are of.

    Returns:
        None where something else follows, or a pooling that they do not pass through.
    """
    after = _only_reader(node)
    if after is not None and after.kind == "pool":
        pool = after.pooling
        if not (is_mean(pool) if isinstance(pool, nn.AvgPool2d) else isinstance(pool, nn.MaxPool2d)):
            return None
        after = _only_reader(after)
    holder = node.name.rpartition(".")[0]
    whole = isinstance(model.get_submodule(holder), ConvNormNeuron | LinearNormNeuron)
    if after is not None and after.kind == "norm":
        return None if after.module.running_mean is None else (after.name, after.module)
    if whole:
        return None if after is not None and after.name == f"{holder}.norm" else (f"{holder}.norm", None)
    return node.name, None


def _neuron_behind(node: Node) -> nn.Module | None:
    """The neuron that a layer drives, by itself or as the first that is added to its current."""
    reader = _only_reader(node)
    while reader is not None and reader.kind in ("pool", "norm", "join") and reader.inputs[0] is node:
        node, reader = reader, _only_reader(reader)
    return reader.module if reader is not None and reader.kind == "neuron" else None


def to_bf16(model: nn.Module, graph: Graph) -> str:
    """Convolutions and linear layers on spikes in bfloat16; the first one, norms, thresholds and the head stay."""
    neurons = [m for m in model.modules() if isinstance(m, SpikingNeuron)]
    for neuron in neurons:
        neuron.spike_dtype = torch.bfloat16
    layers = [node for node in graph.of("layer") if node.name != "head.fc"]
    images = {graph.input}  # and what no layer or neuron has seen
    for node in graph.nodes:
        if node.kind not in ("layer", "neuron") and images & set(node.inputs):
            images.add(node)
    whole = done = 0
    for node in layers:
        layer, place = node.module, _norm_of(model, node)
        if node.inputs[0] in images or place is None:
            model.set_submodule(node.name, _In(layer, torch.float32))
            continue
        where, norm = place
        found = whole_numbers(layer)
        weight, gain = (layer.weight, torch.ones(())) if found is None else found
        scale, shift = _affine(norm, layer)
        scale = scale * gain
        # What the layer adds brings its sum to zero at the threshold, near which bfloat16 is finest; the norm takes it
        # away again, with what its rounding lost.
        centre = (shift - _threshold(_neuron_behind(node), len(shift), shift)) / scale
        added = centre.nan_to_num(0, 0, 0).bfloat16()
        set_ternary(layer, False)
        layer.weight, layer.bias = nn.Parameter(weight.float(), False), nn.Parameter(added, False)
        affine = Affine(scale, shift - scale * added.float(), torch.float32 if neurons else torch.bfloat16)
        small: nn.Module = _In(layer, torch.bfloat16)
        model.set_submodule(node.name, nn.Sequential(small, affine) if where == node.name else small)
        if where != node.name:
            holder, _, attribute = where.rpartition(".")
            setattr(model.get_submodule(holder), attribute, affine)  # where there may have been no norm
        done, whole = done + 1, whole + (found is not None)
    share = f"{done} of {len(layers)} convolutions and linear layers before the head in bfloat16"
    return f"{share}, {whole} with exact weights"
