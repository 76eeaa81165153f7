"""Spikes of one bit: layers that read and write bits, each computed in the way that is fastest on this processor.

A baked ticket's sums are looked up in tables, others are looked up in wider ones or added up spike by spike, or
computed by the eight-bit layer that was there; a short timing on the example decides, layer by layer. All ways give the
same sums.
"""

from __future__ import annotations

import collections
import ctypes
import itertools
import math
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from spikezoo.deploy.int8 import EightBit, InFloat, InRows, whole_signals
from spikezoo.deploy.kernel import KINDS, Layer, Term, instructions, kernel, pack, unpack, widths
from spikezoo.deploy.norms import ExactNorm
from spikezoo.graph import Graph
from spikezoo.layers import ConvNormNeuron, LinearNormNeuron, Pool, ResidualBlock, conv_out, over_time
from spikezoo.neurons import IF, LIF, PLIF, SpikingNeuron

__all__ = ["Call", "Dense", "Packed", "Spikes", "Summand", "methods", "register", "to_bits"]

_CHARGES: dict[type, int] = {IF: 2, PLIF: 3}
_ROUNDS = 3  # of the timing


class _DoesNotFitError(ValueError):
    """A part that has no form in bits, and stays as it is."""


class Dense(nn.Module):
    """The float sums ``[T, B, C', H', W']`` of a layer, by torch: of an image, or of bits that become bytes again."""

    def __init__(
        self, layer: nn.Module, pool: nn.Module | None, channels: int = 0, before: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layer, self.pool, self.before, self.channels = layer, pool, before, channels
        self.linear = isinstance(layer, EightBit) and layer.linear

    def _stateless(self, x: Tensor) -> Tensor:
        x = self.layer(x.flatten(1) if self.linear else x)
        return x if self.pool is None else self.pool(x)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer with its pooling."""
        if self.channels:
            x = unpack(x, self.channels)
        x = over_time(self._stateless, x if self.before is None else self.before(x))
        return x[..., None, None] if self.linear else x


@dataclass
class Packed:
    """What the kernel knows of one summand.

    Attributes:
        method: How it is computed, of ``KINDS``.
        weight: Packed for that way; None of what comes computed, or in bits.
        segment: How many look-ups a byte, or a word, adds up.
        channels: Of its input.
        geometry: Kernel, stride, padding, dilation.
        pool: Kernel, stride and padding of the max-pooling behind it; 0 is none.
        levels: What the sums are divided by.
        scale: Of the weights, a channel.
        bias: Of the layer.
        gain: Of the norm behind it; with ``shift``.
    """

    method: str
    weight: Tensor | None = None
    segment: int = 0
    channels: int = 0
    geometry: tuple[tuple[int, ...], ...] = ()
    pool: tuple[int, ...] = (0, 0, 0)
    levels: int = 1
    scale: Tensor | None = None
    bias: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None

    def out_size(self, height: int, width: int) -> tuple[int, ...]:
        """Height and width of what it adds, of an input's."""
        sizes = []
        for size, kernel_size, stride, padding, dilation in zip((height, width), *self.geometry, strict=True):
            size = (size + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1
            area, step, border = self.pool
            sizes.append((size + 2 * border - area) // step + 1 if area else size)
        return tuple(sizes)

    def write(self, term: Term, x: Tensor) -> None:
        """Tell the kernel, with the input."""
        term.kind, term.input = KINDS[self.method], x.data_ptr()
        tensors = ("gain", "shift", *(() if self.method == "dense" else ("weight", "scale", "bias")))
        for name in tensors:
            values: Tensor | None = getattr(self, name)
            setattr(term, name, None if values is None else values.data_ptr())
        if self.method == "dense":
            term.strides[:] = [0 if x.shape[0] == 1 else x.stride(0), *x.stride()[1:]]
        elif self.method != "bits":
            term.channels, term.height, term.width = self.channels, *x.shape[2:4]
            for name, sides in zip(("kernel", "stride", "padding", "dilation"), self.geometry, strict=True):
                getattr(term, name)[:] = sides
            term.segment, term.levels = self.segment, self.levels
            term.pool[:] = self.pool


@dataclass
class Call:
    """A layer of neurons as the kernel computes it: all that a file needs to hold of it.

    Attributes:
        facts: Numbers of the neurons.
        at: At what potential they fire.
        sign: Of a channel's potential.
        terms: What is added up to their input.
    """

    facts: dict[str, Any]
    at: Tensor
    sign: Tensor
    terms: list[Packed]

    def _map(self, inputs: list[Tensor]) -> tuple[int, int, int]:
        """Batch, height and width of the output, of the kernel's inputs."""
        if self.terms[0].method == "dense":
            return inputs[0].shape[1], inputs[0].shape[3], inputs[0].shape[4]
        height, width = self.terms[0].out_size(*inputs[0].shape[2:4])
        return inputs[0].shape[4], height, width

    def out_shape(self, inputs: list[Tensor], T: int) -> tuple[int, ...]:
        """Shape of the bits, of the kernel's inputs."""
        batch, height, width = self._map(inputs)
        return T, -(-self.facts["O"] // 8), height, width, batch

    def run(self, inputs: list[Tensor], T: int) -> Tensor:
        """Bits of the layer."""
        out = inputs[0].new_empty(self.out_shape(inputs, T), dtype=torch.uint8)
        batch, height, width = self._map(inputs)
        layer = Layer(T=T, B=batch, H=height, W=width, terms=len(inputs), threads=torch.get_num_threads(), **self.facts)
        layer.at, layer.sign, layer.out = self.at.data_ptr(), self.sign.data_ptr(), out.data_ptr()
        for place, term, x in zip(layer.term, self.terms, inputs, strict=False):
            term.write(place, x)
        kernel().bits_layer(ctypes.byref(layer))
        return out


# A graph holds numbers and tensors only, so an operation in it holds the key of its layer.
_CALLS: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()
_KEYS = itertools.count()


def register(call: Call, key: int) -> Call:
    """Let graphs find a layer under a key, for as long as the caller holds what this returns."""
    return _CALLS.setdefault(key, call)


@torch.library.custom_op("spikezoo::spikes", mutates_args=())
def _spikes(inputs: list[Tensor], T: int, key: int) -> Tensor:
    """Bits of a layer of neurons."""
    return _CALLS[key].run(inputs, T)


@_spikes.register_fake
def _(inputs: list[Tensor], T: int, key: int) -> Tensor:
    return inputs[0].new_empty(_CALLS[key].out_shape(inputs, T), dtype=torch.uint8)


class Summand(nn.Module):
    """A layer whose sums are a part of a neuron's input: its weights, its geometry, and the norm behind it.

    Attributes:
        packed: The way in which it is computed now.
        methods: How it can be computed: bytes (tables), words (wider tables), rows (spike by spike), dense.
    """

    def __init__(self, dense: Dense, norm: nn.Module | None, shape: tuple[int, ...], doubled: bool = False) -> None:
        super().__init__()
        self.dense, self.methods, self.weight = dense, ["dense"], None
        self.place: tuple[list[Packed], int] | None = None  # in the call of its layer
        self.packed = Packed("dense")
        if isinstance(norm, ExactNorm):  # of float32 values
            self.packed = Packed("dense", gain=norm.scale.float(), shift=norm.shift.float())
        elif not (norm is None or isinstance(norm, nn.Identity)):
            raise _DoesNotFitError(f"a {type(norm).__name__}")
        layer = dense.layer
        if not isinstance(layer, EightBit) or (dense.before is not None and not doubled):
            return
        weight, area = layer.weight, (0, 0, 0)
        geometry: Any = (layer.stride, layer.padding, layer.dilation)
        if layer.groups != 1 or min(float(layer.scale.min()), 0) < 0 or any(isinstance(p, str) for p in geometry):
            return
        if any(p > d * (k - 1) for p, k, d in zip(geometry[1], weight.shape[2:], geometry[2], strict=True)):
            return
        if isinstance(dense.pool, nn.MaxPool2d):
            pool = dense.pool
            sides: Any = (pool.kernel_size, pool.stride, pool.padding)
            if pool.ceil_mode or pool.dilation not in (1, (1, 1)) or any(isinstance(side, tuple) for side in sides):
                return
            area = sides
        elif dense.pool is not None:
            return
        if layer.linear:  # a feature is a place of a plane of eight channels
            C, H, W = shape
            weight = F.pad(weight.view(len(weight), C, H * W), (0, 0, 0, -C % 8))
            weight = weight.unflatten(1, (-1, 8)).transpose(2, 3).reshape(len(weight), -1, 1, 1)
        if doubled:  # the mean of 2x2 places, then a kernel of one: a kernel of 2x2 and a stride of 2
            weight, geometry = weight.expand(-1, -1, 2, 2), ((2, 2), (0, 0), (1, 1))
        self.weight = weight.contiguous()
        self.packed = replace(
            self.packed,
            channels=weight.shape[1],
            geometry=(tuple(weight.shape[2:]), *geometry),
            pool=area,
            levels=layer.levels,
            scale=layer.scale.float().expand(len(weight), *layer.scale.shape[1:]).reshape(-1).contiguous(),
            bias=None if layer.bias is None else layer.bias.detach().float().contiguous(),
        )
        self.methods = [*(("bytes",) if weight.abs().max() <= 1 else ()), "words", "dense"]
        if weight.shape[1] <= 65535:
            self.methods.insert(-1, "rows")
        self.choose(self.methods[0])

    def choose(self, method: str) -> None:
        """Compute it in one of its ways from now on."""
        weight, segment = None, 0
        if method == "rows":
            weight = self._padded(64, 1)
            weight = weight.reshape(-1, 64, *weight.shape[1:]).permute(0, 2, 3, 1).to(torch.int16).contiguous()
        elif method != "dense":
            weight, segment = self._steps(method), self._segment(method)
            if method == "bytes":  # the number of the table, with a digit of three for every weight
                digits = 3 ** torch.arange(weight.shape[3])
                weight = ((weight.int() + 1) * digits).sum(3).to(torch.int16)
            weight = weight.contiguous()
        # A new one, since a call in another thread goes on with what it began with.
        self.packed = replace(self.packed, method=method, weight=weight, segment=segment)
        if self.place is not None:
            terms, index = self.place
            terms[index] = self.packed

    @property
    def method(self) -> str:
        """How it is computed."""
        return self.packed.method

    def _padded(self, outputs: int, channels: int) -> Tensor:
        """Weights ``[O, taps, C]``, as many as whole groups have."""
        assert self.weight is not None
        weight = self.weight.flatten(2).transpose(1, 2)
        return F.pad(weight, (0, -weight.shape[2] % channels, 0, 0, 0, -weight.shape[0] % outputs))

    def _steps(self, method: str) -> Tensor:
        """Weights of every look-up: ``[O / 8, steps, 8, width]``."""
        width = widths()[method]
        weight = self._padded(8, width)
        return weight.reshape(len(weight) // 8, 8, -1, width).transpose(1, 2)

    def _segment(self, method: str) -> int:
        """How many look-ups fit into a byte, or a word, whatever fires; no more than leave room in the first cache."""
        if method == "words":
            return 48  # of at most five weights of 127 each
        steps = self._steps(method)
        sums = torch.stack([(steps == sign).sum(3) for sign in (1, -1)], 3)  # the largest, or its negative
        for length in (32, 24, 16):
            whole = F.pad(sums, (0, 0, 0, 0, 0, -sums.shape[1] % length)).unflatten(1, (-1, length)).sum(2)
            if whole.amax() <= 127:
                return length
        return 16  # of at most six weights

    def forward(self, x: Tensor, method: str) -> Tensor:
        """What the kernel reads: the bits themselves, or float sums."""
        if method == "dense":
            return self.dense(x)
        T, groups, H, W, B = x.shape
        return x.view(T, groups * H * W, 1, 1, B) if self.dense.linear else x


class Spikes(nn.Module):
    """A layer of neurons that writes bits ``[T, ceil(C / 8), H, W, B]``.

    Args:
        neuron: The neurons.
        summands: What is added up to their input; None is the input's own spikes.

    Raises:
        ValueError: Neurons of another kind.
    """

    at: Tensor
    sign: Tensor

    def __init__(self, neuron: nn.Module | None, *summands: Summand | None) -> None:
        super().__init__()
        if type(neuron) not in (LIF, IF, PLIF) or not isinstance(neuron, SpikingNeuron) or neuron.norm is not None:
            raise _DoesNotFitError(f"neurons of type {type(neuron).__name__}")
        self.summands = nn.ModuleList(filter(None, summands))
        self.own = len(self.summands) < len(summands)
        self.channels, config = neuron.shape[0], neuron.config
        kind = _CHARGES.get(type(neuron), 0 if config.tau is None else 1)
        factor = neuron.w.sigmoid().item() if isinstance(neuron, PLIF) else config.tau or config.decay
        at, sign = self._thresholds(neuron)
        self.facts: dict[str, Any] = {
            "O": self.channels, "charge": kind, "soft": config.reset == "soft", "elements": at.dim() == 3,
            "factor": factor, "v_reset": config.v_reset, "start": config.v_reset + config.v_init,
            "threshold": config.threshold,
        }  # fmt: skip
        self.register_buffer("at", at)
        self.register_buffer("sign", sign)
        self._register()

    def _thresholds(self, neuron: SpikingNeuron) -> tuple[Tensor, Tensor]:
        """At what potential neurons fire, of channels or of elements, and with which sign of a channel's potential."""
        folded, config = neuron.folded, neuron.config
        at = folded.threshold if folded else torch.full((self.channels,), config.threshold)
        polarity = folded.polarity if folded else torch.ones(self.channels)
        sign = polarity.view(self.channels, -1)[:, 0].contiguous()
        if not torch.equal(polarity, (sign if at.dim() == 1 else sign.view(-1, 1, 1)).expand_as(polarity)):
            raise _DoesNotFitError("polarities that differ within a channel")
        at = at.float() * (sign if at.dim() == 1 else sign.view(-1, 1, 1))
        if config.firing == ">":  # at or above the next number
            at = torch.nextafter(at, torch.full_like(at, torch.inf))
        if neuron.mask is not None:
            mask = neuron.mask if neuron.mask.dim() in (1, 3) else neuron.mask.flatten()
            at = at if at.dim() == mask.dim() else at.view(-1, 1, 1).expand_as(mask) if mask.dim() == 3 else at
            at = at.where(mask if mask.dim() == at.dim() else mask.view(-1, 1, 1), torch.inf)
        return at.contiguous(), sign.float()

    def _register(self) -> None:
        """Make the kernel's call of what the summands are now."""
        terms: list[Packed] = []
        for summand in self.summands:
            assert isinstance(summand, Summand)
            summand.place = terms, len(terms)
            terms.append(summand.packed)
        if self.own:
            terms.append(Packed("bits"))
        self.call, self.tuned = Call(self.facts, self.at, self.sign, terms), False
        self.key = next(_KEYS)
        register(self.call, self.key)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "call": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()  # a copy is called by a key of its own

    def forward(self, *x: Tensor, T: int | None = None) -> Tensor:
        """Bits of the layer; inputs are those of the summands, of the neuron's own spikes the last."""
        if not self.tuned and not torch.compiler.is_compiling():
            self.tuned = True
            self._tune(x, T)
        terms = list(self.call.terms)
        inputs = [summand(one, term.method) for summand, one, term in zip(self.summands, x, terms, strict=False)]
        inputs, T = [*inputs, *([x[-1]] if self.own else [])], T or x[0].shape[0]
        if _recorded(x[0]):
            return _spikes(inputs, T, self.key)
        return Call(self.facts, self.at, self.sign, terms).run(inputs, T)

    def _tune(self, x: tuple[Tensor, ...], T: int | None) -> None:
        """Find the fastest way of every summand, of those that give the example's answer."""
        for module in self.summands:
            summand: Any = module
            times = {}
            for method in summand.methods if len(summand.methods) > 1 else ():
                summand.choose(method)
                taken = []
                for _ in range(_ROUNDS):
                    start = time.perf_counter()
                    self(*x, T=T)
                    taken.append(time.perf_counter() - start)
                times[method] = min(taken)
            if times:
                summand.choose(min(times, key=lambda method: times[method]))


def _recorded(x: Tensor) -> bool:
    """Whether something follows operations, which a kernel that is called by itself is none of.

    An operation costs as much as a small layer.
    """
    follows = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
    return follows or type(x) is not Tensor


def methods(layers: Iterable[Spikes]) -> str:
    """How many sums are computed in which way, in words."""
    words = {"bytes": "by tables of bytes", "words": "by tables of words", "rows": "spike by spike", "dense": "dense"}
    found = collections.Counter(words[str(summand.method)] for layer in layers for summand in layer.summands)
    return ", ".join(f"{count} {way}" for way, count in found.most_common())


class _Block(nn.Module):
    """A residual block on bits."""

    def __init__(self, first: Spikes, second: Spikes) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        """Bits of bits."""
        return self.second(self.first(x), x)


class _Most(nn.Module):
    """A max-pooling of bits: whether any of a window fires."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        sides: Any = (pool.kernel_size, pool.stride, pool.padding)
        if pool.ceil_mode or pool.dilation not in (1, (1, 1)) or any(isinstance(side, tuple) for side in sides):
            raise _DoesNotFitError("a pooling of another shape")
        self.sides = sides

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        """Bits of bits."""
        kernel_size, stride, padding = self.sides
        height, width = conv_out(x.shape[2:4], kernel_size, stride, padding)
        x = F.pad(x, (0, 0, *[padding] * 4))
        for axis, size in ((2, height), (3, width)):
            end = (size - 1) * stride + 1
            shifts = [x[(slice(None),) * axis + (slice(k, k + end, stride),)] for k in range(kernel_size)]
            x = shifts[0]
            for other in shifts[1:]:
                x = x | other
        return x.contiguous()


class _Between(nn.Module):
    """A part in bits; makes bits of bytes before it and bytes of bits behind it, where neighbours need that."""

    def __init__(self, body: nn.Module, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.channels, self.dtype = body, channels, dtype
        self.enter = self.leave = False

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        """As the part."""
        x = self.body(pack(x) if self.enter else x, T=T)
        return unpack(x, self.channels).to(self.dtype) if self.leave else x


# --------------------------------------------------------------------------------------------------------------
# What of a model has a form in bits
# --------------------------------------------------------------------------------------------------------------


def _slots(model: Any) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, container and position of the modules that run one after the other."""
    parts = [*(("stem", model.stem),) * isinstance(model.stem, nn.Sequential)]
    parts += [(f"stages.{index}", stage) for index, stage in enumerate(model.stages)]
    for name, container in (*parts, ("neck", model.neck)):
        for index in range(len(container)):
            yield f"{name}.{index}", container, index


class _Lowering:
    """Makes bits of the parts of a model whose layers are in eight bits already."""

    def __init__(self, graph: Graph) -> None:
        self.layers = {node.name: node for node in graph.of("layer", "pool")}
        self.whole = whole_signals(graph)

    def summand(self, part: Any, name: str, before: nn.Module | None = None) -> Summand:
        """The sums of a layer on spikes."""
        linear = isinstance(part, LinearNormNeuron)
        layer = getattr(part, "linear" if linear else "conv", None)  # in a wrapper for floats there is none
        if not isinstance(layer, EightBit) or (linear and part.average):
            raise _DoesNotFitError("a layer on other values than spikes")
        node = self.layers[f"{name}.{'linear' if linear else 'conv'}"]
        source, shape = node.inputs[0], node.inputs[0].shape
        if linear and source.kind == "flatten":
            source, shape = source.inputs[0], source.inputs[0].shape
        if before is not None:
            source = source.inputs[0]
        if self.whole.get(source) != (1, 1):
            raise _DoesNotFitError("a layer on other values than spikes")
        if source.kind == "flatten" or (linear and len(shape) == 1):
            shape = (math.prod(shape), 1, 1)
        dense = Dense(layer, None if linear else part.pool, source.shape[0], before)
        even = (
            before is not None and not any(size % 2 for size in source.shape[1:]) and layer.weight.shape[2:] == (1, 1)
        )
        return Summand(dense, part.norm, shape, doubled=even)

    def block(self, block: ResidualBlock, name: str) -> nn.Module:
        """A residual block."""
        first = Spikes(block.conv1.neuron, self.summand(block.conv1, f"{name}.conv1"))
        second = self.summand(block.conv2, f"{name}.conv2")
        shortcut: Any = block.shortcut
        if shortcut is None:
            return _Block(first, Spikes(block.neuron, second, None))
        beside = self.summand(shortcut, f"{name}.shortcut", block.pool)
        return _Block(first, Spikes(block.neuron, second, beside))

    def part(self, module: Any, name: str) -> _Between:
        """What computes a part in bits.

        Raises:
            ValueError: It has none.
        """
        body: Any
        neuron: Any = getattr(module, "neuron", None)
        if isinstance(module, InFloat) and isinstance(module.module, ConvNormNeuron) and name == "stem.0":
            part = module.module
            conv = part.conv.conv if isinstance(part.conv, InRows) else part.conv
            neuron, body = part.neuron, Spikes(part.neuron, Summand(Dense(conv, part.pool), part.norm, ()))
        elif isinstance(module, ResidualBlock):
            body = self.block(module, name)
        elif isinstance(module, ConvNormNeuron | LinearNormNeuron):
            body = Spikes(module.neuron, self.summand(module, name))
        elif isinstance(module, Pool | InFloat) and isinstance(pool := getattr(module, "module", module), Pool):
            node = self.layers.get(name) or self.layers[f"{name}.pool"]
            if not isinstance(pool.pool, nn.MaxPool2d) or self.whole.get(node.inputs[0]) != (1, 1):
                raise _DoesNotFitError("a pooling that makes other values than spikes")
            return _Between(_Most(pool.pool), node.inputs[0].shape[0], torch.float32)
        else:
            raise _DoesNotFitError(f"a {type(module.module if isinstance(module, InFloat) else module).__name__}")
        return _Between(body, neuron.shape[0], neuron.spike_dtype or torch.float32)


def to_bits(model: nn.Module, graph: Graph) -> tuple[str, bool]:
    """Let the parts of a model in eight bits hand on bits, where they can.

    Returns:
        What was done, and whether nothing is left for a compiler but the head.
    """
    lowering, before, done, left = _Lowering(graph), None, 0, collections.Counter[str]()
    for name, container, index in _slots(model):
        holder: Any = container
        try:
            part = lowering.part(holder[index], name)
        except _DoesNotFitError as error:
            left[str(error)] += 1
            before = None
            continue
        if before is None:
            part.enter = name != "stem.0"
        else:
            before.leave = False
        part.leave, before, done = True, part, done + 1
        holder[index] = part
    kept = ", ".join(f"{reason} ({count})" for reason, count in left.items())
    text = f"{done} of {done + left.total()} parts hand on bits ({instructions()})"
    return text + (f"; as before: {kept}" if kept else ""), not left
