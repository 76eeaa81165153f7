"""Deployment: a trained model in the form that evaluates fastest and gives the same answer.

Three precisions. ``exact`` fires the same spikes as the model, in float32. ``bf16`` computes convolutions and linear
layers on spikes in bfloat16, the first layer, norms and membrane potentials in float32. ``int8`` keeps spikes as bytes
and multiplies them with eight-bit weights, summed in 32 bits.

Weights that are whole numbers times a scale, as those of a baked binary ticket (-1, 0 and +1) and those that
:func:`spikezoo.sparse.round_to_levels` made, are these whole numbers in ``bf16`` and ``int8``, and scale and norm
come after the sum: in ``int8`` the potentials are the model's, of a ticket in every bit. In ``bf16`` only the sum is
rounded, and since the distance to the threshold is what is summed, that is finest where the spike is decided.

Everything up to the features is compiled as one graph, in which the neuron is one pass over all time steps with the
norm before it and the residual join. The head runs as it is.
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor

from spikezoo.checks import choice
from spikezoo.layers import (
    ConvNormNeuron,
    LinearNormNeuron,
    Pool,
    ResidualBlock,
    TernaryConv2d,
    TernaryLinear,
    is_mean,
    set_ternary,
    signs_and_gain,
)
from spikezoo.neurons import SpikingNeuron
from spikezoo.sparse import levels_of, round_to_levels
from spikezoo.transforms import fold_mpbn
from spikezoo.transforms.multisp import PatchSelection
from spikezoo.transforms.tickets import tickets

__all__ = ["PRECISIONS", "Deployed", "deploy"]

PRECISIONS = ("exact", "bf16", "int8")
# The compiler unrolls the loop over time: longer sequences run in parts of so many steps, or it would take minutes,
# memory would grow, and feature maps of all steps would leave the processor's caches.
PART = 8
_LOG = logging.getLogger("spikezoo")


def has_compiler() -> bool:
    """Whether there is the C++ compiler that torch.compile needs on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name)


# --------------------------------------------------------------------------------------------------------------
# Norms
# --------------------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """A scale and a shift of every channel, from operations that a compiler fuses.

    Args:
        scale: ``[C]``; its type is what is computed in.
        shift: As ``scale``.
        dtype: Type of the result.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C, ...]`` to the same shape."""
        dims = (1, -1, *[1] * (x.dim() - 2))
        return (x.to(self.scale.dtype) * self.scale.view(dims) + self.shift.view(dims)).to(self.dtype)


class ExactNorm(Affine):
    """Batch norm with its running statistics, rounded as torch's own on a CPU.

    There it is one multiply-add with a single rounding. Float64 holds the product of two float32 exactly, so only the
    sum is rounded twice.
    """

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None and var is not None
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        weight, bias = norm.weight, norm.bias
        # The norm itself says what it multiplies with and adds.
        scale = F.batch_norm(one[None], zero, var, weight, None if bias is None else zero, eps=norm.eps)[0]
        shift = F.batch_norm(zero[None], mean, var, weight, bias, eps=norm.eps)[0]
        super().__init__(scale.double(), shift.double())


def _exact_norms(model: nn.Module) -> str | None:
    """Replace the norms of a model, unless this processor rounds them otherwise; then say so."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d) and child.running_mean is not None:
                exact = ExactNorm(child)
                channels = child.num_features
                probe = torch.linspace(-9, 9, 16 * channels, device=child.running_mean.device).view(-1, channels)
                probe = probe if isinstance(child, nn.BatchNorm1d) else probe[..., None, None]
                if not torch.equal(child(probe), exact(probe)):
                    return "batch norms kept, and may differ from the model's by a rounding on this processor"
                setattr(module, name, exact)
    return None


# --------------------------------------------------------------------------------------------------------------
# Eight-bit convolutions and linear layers
# --------------------------------------------------------------------------------------------------------------

# oneDNN's packed weights are opaque to a compiler, so its graph holds a key to them.
_PACKED: weakref.WeakValueDictionary[int, EightBit] = weakref.WeakValueDictionary()
_KEYS = itertools.count()


@torch.library.custom_op("spikezoo::eight_bit", mutates_args=())
def _eight_bit(x: Tensor, weight: Tensor, key: int) -> Tensor:
    """Sums of bytes times eight-bit weights, as float32."""
    return _PACKED[key].sums(x)


@_eight_bit.register_fake
def _(x: Tensor, weight: Tensor, key: int) -> Tensor:
    layer = _PACKED[key]
    height, width = ((s + 2 * p - k) // d + 1 for s, p, k, d in zip(x.shape[2:], *layer.geometry, strict=True))
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
        found = _whole(layer) or levels_of(round_to_levels(weight))
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
        self.geometry: tuple[Any, ...] = (self.padding, self.weight.shape[2:], self.stride)
        self._packed: Any = None
        self._register()

    def _register(self) -> None:
        self.key = next(_KEYS)
        _PACKED[self.key] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()  # a copy has a key of its own

    def sums(self, x: Tensor) -> Tensor:
        """Map bytes ``[N, C, H, W]`` to ``[N, C', H', W']`` float32."""
        op, channels = torch.ops.onednn, self.weight.shape[0]
        ones = torch.ones(channels)
        geometry: Any = (list(self.stride), list(self.padding), list(self.dilation), self.groups)
        if self._packed is None:
            self._packed = op.qconv_prepack(self.weight, ones, 1.0, 0, *geometry, list(x.shape))
        zeros = torch.zeros(channels, dtype=torch.int64)
        return op.qconv2d_pointwise(
            x, 1.0, 0, self._packed, ones, zeros, None, *geometry, 1.0, 0, torch.float32, "none", [], ""
        )

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        if x.dtype != torch.uint8:
            x = (x * self.levels if self.levels > 1 else x).to(torch.uint8)
        y = _eight_bit(x[..., None, None] if self.linear else x, self.weight, self.key)
        y = y.flatten(1) if self.linear else y
        y = y / self.levels if self.levels > 1 else y  # a power of two: exact
        y = y * self.scale
        return y if self.bias is None else y + self.bias.view((-1,) if self.linear else (-1, 1, 1))


@torch.no_grad()
def _levels(model: nn.Module, example: Tensor) -> dict[nn.Module, int]:
    """Which convolutions and linear layers see whole numbers, and what their input must be multiplied with for that.

    Followed along the modules, not read from values: a silent layer would prove anything.
    """
    known: dict[int, tuple[Tensor, int]] = {}  # the tensors are kept, or another would take their place
    found: dict[nn.Module, int] = {}

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        _, level = known.get(id(inputs[0]), (None, 0))
        if level and not getattr(module, "average", False):
            found[getattr(module, _inner(module))] = level

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, Pool):
            _, level = known.get(id(inputs[0]), (None, 0))
            level *= _area(module.pool, inputs[0].shape[-2:])
        else:  # outputs of ReLU are not whole, those of Sign not positive
            level = int(isinstance(getattr(module, "neuron", module), SpikingNeuron))
        if level:
            known[id(output)] = (output, level)

    handles = []
    for module in model.modules():
        if isinstance(module, ConvNormNeuron | LinearNormNeuron):
            handles.append(module.register_forward_pre_hook(before))
        if isinstance(module, ConvNormNeuron | LinearNormNeuron | SpikingNeuron | Pool):
            handles.append(module.register_forward_hook(after))
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


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


# --------------------------------------------------------------------------------------------------------------
# The deployed model
# --------------------------------------------------------------------------------------------------------------


class Deployed(nn.Module):
    """A model for evaluation in one precision; made by :func:`deploy`.

    Attributes:
        model: The changed copy of the model.
        precision: exact, bf16 or int8.
        notes: What was done and what could not be, in one line each.
    """

    def __init__(self, model: nn.Module, precision: str, compiled: bool, notes: list[str]) -> None:
        super().__init__()
        self.model, self.precision, self.notes = model, precision, notes
        self._shapes: set[tuple[int, ...]] = set()
        self._neurons = [module for module in model.modules() if isinstance(module, SpikingNeuron)]
        # Patches are chosen by the spikes of all time steps.
        self._whole = any(isinstance(module, PatchSelection) for module in model.modules())
        self.compiled = compiled
        self._compile()
        self.eval()

    def _compile(self) -> None:
        # A compiler's own choice of memory formats changes the roundings of convolutions: only bf16 leaves it to it.
        options: dict[str, Any] = {"layout_optimization": self.precision == "bf16"}
        self._features: Callable[[Tensor], Tensor] = self._sequence
        self._part: Callable[..., tuple[Tensor, list[list[Tensor]]]] = self._few_steps
        if self.compiled:
            self._features = torch.compile(self._sequence, dynamic=False, options=options)
            self._part = torch.compile(self._few_steps, dynamic=False, options=options)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_features", "_part", "_shapes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._shapes = set()
        self._compile()  # a copy compiles its own layers

    def _sequence(self, x: Tensor) -> Tensor:
        x = self.model.forward_sequence(x)  # type: ignore[operator]
        # A mean of whole numbers is exact in any order; it is what the head takes.
        return x.float().mean(0)

    def _few_steps(self, frames: Tensor, T: int, potentials: list[list[Tensor]]) -> tuple[Tensor, list[list[Tensor]]]:
        """Sum of the features over a part of the time steps, and the membrane potentials after it."""
        left: list[list[Tensor]] = [[] for _ in self._neurons]
        for neuron, before, after in zip(self._neurons, potentials, left, strict=True):
            neuron.carry = (list(before), after)
        try:
            x = self.model.forward_frames(frames, T)  # type: ignore[operator]
        finally:
            for neuron in self._neurons:
                neuron.carry = None
        return x.float().sum(0), left

    def _in_parts(self, x: Tensor) -> Tensor:
        frames, T = self.model.encode(x)  # type: ignore[operator]
        total: Any = 0
        potentials: list[list[Tensor]] = [[] for _ in self._neurons]
        for start in range(0, T, PART):
            steps = min(PART, T - start)
            part = frames if len(frames) == 1 else frames[start : start + steps]
            features, potentials = self._part(part, steps, potentials)
            total = total + features
        return total / T

    def train(self, mode: bool = True) -> Deployed:
        """Stay in evaluation mode.

        Raises:
            ValueError: Asked to train.
        """
        if mode:
            raise ValueError("A deployed model cannot be trained: train the model that it was made from.")
        return super().train(False)

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Nothing: weights are constants of what was compiled.

        Raises:
            ValueError: Always.
        """
        raise ValueError("A deployed model keeps its weights: load them into the model and call spikezoo.deploy again.")

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` in float32, of images ``[B, C, H, W]`` or event frames ``[B, T, C, H, W]``."""
        self.model._check_input(x)  # type: ignore[operator]
        if self.compiled and tuple(x.shape) not in self._shapes:
            if self._shapes:
                _LOG.warning("Input of shape %s: compiling anew, once for every shape.", tuple(x.shape))
            self._shapes.add(tuple(x.shape))
        x = x.float()
        if x.dim() == 4:
            bf16 = self.precision == "bf16"  # torch.save cannot store a memory format in an attribute
            x = x.contiguous(memory_format=torch.channels_last if bf16 else torch.contiguous_format)
        # Frozen weights are laid out once for the processor, which changes roundings: not for 'exact' and 'int8'.
        # Only a patch of the whole configuration freezes; as an option of torch.compile it does nothing.
        # An autocast around the call would compute in another precision than this one.
        with inductor.patch(freezing=self.precision == "bf16"), torch.autocast(x.device.type, enabled=False):
            T: Any = self.model.T if x.dim() == 4 else x.shape[1]
            features = self._features(x) if T <= PART or self._whole else self._in_parts(x)
            return self.model.forward_head(features)  # type: ignore[operator]

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"precision={self.precision}, {'; '.join(self.notes)}"


def _check(model: nn.Module, precision: str) -> None:
    choice("precision", precision, PRECISIONS)
    if not hasattr(model, "forward_sequence"):
        raise ValueError(
            f"deploy takes a model of this library with its head, and got {type(model).__name__}: make one with "
            "spikezoo.create_model."
        )
    if model.training:
        raise ValueError("The model is in training mode: deploy evaluates. Call model.eval() first.")
    pending = tickets(model)
    if pending:
        raise ValueError(
            f"Layer {next(iter(pending))!r} is a ticket with scores: deploy spikezoo.bake(model), which has weights."
        )
    weird = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if weird:
        raise ValueError(f"The model has parameters of {', '.join(map(str, weird))}: deploy model.float().")


def _inner(block: nn.Module) -> str:
    """What a block calls its convolution or linear layer."""
    return "conv" if isinstance(block, ConvNormNeuron) else "linear"


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


def _to_bf16(model: nn.Module, first: nn.Module) -> str:
    """Convolutions and linear layers on spikes in bfloat16; the first one, norms, thresholds and the head stay."""
    neurons = [m for m in model.modules() if isinstance(m, SpikingNeuron)]
    for neuron in neurons:
        neuron.spike_dtype = torch.bfloat16
    joins: dict[nn.Module, nn.Module] = {m.conv2: m.neuron for m in model.modules() if isinstance(m, ResidualBlock)}
    whole = done = total = 0
    for block in list(model.modules()):
        if not isinstance(block, ConvNormNeuron | LinearNormNeuron):
            continue
        total += 1
        inner = _inner(block)
        layer = getattr(block, inner)
        if block is first or not _is_affine(block):
            setattr(block, inner, _In(layer, torch.float32))
            continue
        found = _whole(layer)
        weight, gain = (layer.weight, torch.ones(())) if found is None else found
        scale, shift = _affine(block.norm, layer)
        scale = scale * gain
        # What the layer adds brings its sum to zero at the threshold, near which bfloat16 is finest; the norm takes it
        # away again, with what its rounding lost.
        centre = (shift - _threshold(joins.get(block) or block.neuron, len(shift), shift)) / scale
        added = centre.nan_to_num(0, 0, 0).bfloat16()
        set_ternary(layer, False)
        layer.weight, layer.bias = nn.Parameter(weight.float(), False), nn.Parameter(added, False)
        setattr(block, inner, _In(layer, torch.bfloat16))
        block.norm = Affine(scale, shift - scale * added.float(), torch.float32 if neurons else torch.bfloat16)
        done, whole = done + 1, whole + (found is not None)
    return f"{done} of {total} convolutions and linear layers before the head in bfloat16, {whole} with exact weights"


def _is_affine(block: ConvNormNeuron | LinearNormNeuron) -> bool:
    """Whether what follows a layer's sums is a scale and a shift a channel, which its pooling lets through."""
    pool, norm = getattr(block, "pool", None), block.norm
    if not (is_mean(pool) if isinstance(pool, nn.AvgPool2d) else isinstance(pool, nn.MaxPool2d | None)):
        return False
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return norm.running_mean is not None
    return isinstance(norm, nn.Identity | None)


def _whole(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor] | None:
    """Weights as whole numbers and what they are multiplied with, one for all or one a channel; None for others."""
    if isinstance(layer, TernaryConv2d | TernaryLinear):
        return signs_and_gain(layer.weight.detach())
    return levels_of(layer.weight)


def _affine(norm: nn.Module | None, layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
    """What a norm and the bias of the layer before it multiply the layer's sums with and add to them."""
    zero = layer.weight.new_zeros(len(layer.weight))
    bias = zero if layer.bias is None else layer.bias
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return zero + 1, bias.clone()
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    return scale, (0 if norm.bias is None else norm.bias) + scale * (bias - norm.running_mean)


def _first(model: nn.Module, example: Tensor) -> nn.Module:
    """The layer that sees the image."""
    seen: list[nn.Module] = []
    layers = [m for m in model.modules() if isinstance(m, ConvNormNeuron | LinearNormNeuron)]
    handles = [layer.register_forward_pre_hook(lambda module, _: seen.append(module)) for layer in layers]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]


class _InRows(nn.Module):
    """A float32 convolution that rounds as the model's, which has no channels-last format; the layers around it do."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution."""
        return self.conv(x.contiguous()).contiguous(memory_format=torch.channels_last)


class _Float(nn.Module):
    """A module that cannot read bytes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """As the module."""
        return self.module(x.float(), *arguments)


def _to_int8(model: nn.Module, example: Tensor) -> str:
    """Replace the layers on spikes and let neurons give bytes; say how many layers there are."""
    levels = _levels(model, example)
    total = 0
    unread: list[tuple[nn.Module, str, nn.Module]] = []  # who reads spikes and cannot read bytes
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ConvNormNeuron | LinearNormNeuron):
                total += 1
                inner = _inner(child)
                layer = getattr(child, inner)
                if layer in levels:
                    setattr(child, inner, EightBit(layer, levels[layer]))
                else:
                    unread.append((parent, name, child))
                    if isinstance(layer, nn.Conv2d):
                        child.conv = _InRows(layer)
            elif isinstance(child, Pool):  # not even the largest of bytes, where torch takes maps of 255 places at most
                unread.append((parent, name, child))
    blocks = [m for m in model.modules() if isinstance(m, ConvNormNeuron | LinearNormNeuron | ResidualBlock)]
    neurons = {m for m in model.modules() if isinstance(m, SpikingNeuron)}
    if neurons == {block.neuron for block in blocks if block.neuron is not None}:
        # Nobody else reads spikes, as attention would.
        for neuron in neurons:
            neuron.spike_dtype = torch.uint8
        for parent, name, child in unread:
            setattr(parent, name, _Float(child))
    return f"{len(levels)} of {total} convolutions and linear layers before the head in 8 bits"


@torch.no_grad()
def deploy(model: nn.Module, precision: str = "exact", example: Tensor | None = None) -> Deployed:
    """Turn a trained model into the fastest one that gives the same answer.

    Args:
        model: A model of this library in evaluation mode, float32; tickets baked. It stays as it is.
        precision: ``exact``: the same spikes as the model, in float32. ``bf16``: weights and spikes in bfloat16, the
            first layer, norms and membrane potentials in float32. ``int8``: layers on spikes in eight bits with 32-bit
            sums; bit for bit the model where those layers are baked binary tickets, otherwise weights rounded per
            channel, which changes nothing in those that :func:`spikezoo.sparse.round_to_levels` made, such as the
            weights that come with the package.
        example: Input of the shape that will be used, ``[B, C, H, W]`` or ``[B, T, C, H, W]``, which is compiled at
            once; None compiles at the first call. Another shape is compiled anew, once.

    Returns:
        A module that maps inputs to logits. Its ``notes`` say what was done.

    Raises:
        ValueError: Training mode, unknown precision, tickets that are not baked, another dtype than float32, int8
            of a model without spikes or on a GPU.

    Example:
        >>> fast = spikezoo.deploy(model.eval(), 'bf16', example=images)
        >>> logits = fast(images)
    """
    _check(model, precision)
    notes: list[str] = []
    copied: Any = copy.deepcopy(model).requires_grad_(False)
    device = next(copied.parameters()).device
    if precision == "int8" and not any(isinstance(m, SpikingNeuron) for m in copied.modules()):
        raise ValueError("precision='int8' keeps spikes as bytes and this model has none: use precision='bf16'.")
    if precision == "int8" and device.type != "cpu":
        raise ValueError(f"precision='int8' runs on the CPU and the model is on {device}: use precision='bf16' there.")
    if any(isinstance(m, SpikingNeuron) and m.norm is not None for m in copied.modules()):
        copied = fold_mpbn(copied)
        notes.append("membrane norms folded into thresholds")
    if example is not None:
        copied._check_input(example)
    like = torch.zeros(1, *copied.input_shape, device=device) if example is None else example[:1].to(device).float()
    if precision == "bf16":
        notes.append(_to_bf16(copied, _first(copied, like)))
        if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
            _LOG.warning("This processor has no bfloat16 instructions: precision='bf16' may be slower than 'exact'.")
    else:
        notes += filter(None, [_exact_norms(copied)])
    if precision == "int8":
        notes.append(_to_int8(copied, like))
        if not torch.cpu._is_vnni_supported():
            _LOG.warning("This processor has no eight-bit dot products: precision='int8' may be slower than 'exact'.")
    if precision == "bf16":
        copied = copied.to(memory_format=torch.channels_last)
    compiled = device.type != "cpu" or has_compiler()
    if not compiled:
        _LOG.warning("No C++ compiler found: the model runs uncompiled. Install g++, or set CXX.")
    deployed = Deployed(copied, precision, compiled, notes)
    if example is not None:
        deployed(example)
    return deployed
