"""Counters: MACs, synaptic operations, energy and firing rates of one forward pass, operation by operation.

A dispatch mode sees every tensor operation of a forward pass, whatever module or function started it, and looks it up
in a table: a rule, free by convention, or neither, and then the result says so. Two columns stand side by side.

*exact*: one event through one non-zero weight is one synaptic operation (SOP). Borders, stride, dilation, groups and
pruned weights are exact; an integer value k is k events; signed spikes count by magnitude. Pooling, and averaging, of
spikes is an operation per spike and window; a layer behind an average of n spikes is charged for each of the n, so
that its exact column may exceed the paper's, which sees the averaged rate. Analog input is MACs: the dense number
less the weights that are zero, or the same number of additions, counted as SOPs, where the weights are -c, 0, +c.

*paper*: firing rate of the layer's input x T x dense MACs, analog input (the stem) as MACs once, no credit for zero
weights, pooling free. Of an attention product, the rate is that of the operand that is binary.

Whether a tensor holds spikes is followed from where they are made (a comparison, a sign), not guessed from values:
averaging over n makes multiples of 1/n of them, so the classifier on the mean over T steps and h x w positions counts
each spike that arrived once, and its paper column has the rate of that mean x T x MACs. Only the model's input, and
what an operation without a rule puts out, is judged by its values; ``inputs='analog'`` overrules that for the input.
The sum of a spike and a pooled spike counts in multiples of the smaller, and windows of unequal size are analog.

Biases, element-wise operations and norms are free, as in the papers; ``neuron_ops`` and ``norm_ops`` add them.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from spikezoo.checks import number, switch, whole

__all__ = ["MAC_PJ", "SOP_PJ", "Count", "CountSummary", "FiringRate", "ModuleCount", "count", "count_loader", "plot"]

MAC_PJ = 4.6  # a 32-bit float multiply and add in 45 nm (Horowitz 2014), the papers' constant
SOP_PJ = 0.9  # a 32-bit float add


# --------------------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleCount:
    """What one module cost per image.

    Attributes:
        ops: The operations that it ran, for instance convolution.
        input: What they took: analog, spikes, integer spikes, scaled spikes (c=1/4), ...
        macs: Dense MACs of the forward pass, as fvcore counts them.
        macs_step: Dense MACs of one time step.
        macs_exact: MACs that analog input really needs.
        sops_exact: Synaptic operations, counted.
        macs_paper: Dense MACs on analog input.
        sops_paper: Firing rate of the input x T x dense MACs.
        rate: Mean firing rate of the input; None where it is analog.
        calls: How often the operations ran in the pass.
        weights: Number of weights; 0 for pooling and attention products.
        zero_weights: How many of them are 0.
        silent: No input spiked at all.
    """

    ops: str
    input: str
    macs: float
    macs_step: float
    macs_exact: float
    sops_exact: float
    macs_paper: float
    sops_paper: float
    rate: float | None
    calls: float
    weights: int
    zero_weights: int
    silent: bool


@dataclass(frozen=True)
class FiringRate:
    """How a layer of spiking neurons fired.

    Attributes:
        rates: Spikes per neuron and image, of each time step.
        mean: Mean over the time steps.
        neurons: Neurons of the layer.
        silent: Neurons that fired at no step for no image.
        saturated: Neurons that fired at every step for every image.
    """

    rates: tuple[float, ...]
    mean: float
    neurons: int
    silent: int
    saturated: int


@dataclass(frozen=True)
class Count:
    """Operations and energy of a model, per image.

    Attributes:
        macs: Dense MACs of the forward pass, all time steps; the stem once where it sees one image.
        sops_exact: Synaptic operations, events counted one by one.
        sops_paper: Firing rate x T x dense MACs.
        energy_exact_mj: ``mac_pj * macs_exact + sop_pj * sops_exact``, in millijoule.
        energy_paper_mj: ``mac_pj * macs_paper + sop_pj * sops_paper``.
        firing_rates: Neuron layer -> rates.
        by_module: Module that ran an operation -> its share.
        uncounted: Operations without a rule, or on which fvcore and torch disagree -> calls.
        macs_step: Dense MACs of one time step: what the ANN twin costs.
        macs_exact: MACs on analog input, without zero weights and without binary weights.
        macs_paper: Dense MACs on analog input.
        sops_pooling: The part of ``sops_exact`` that pooling and averaging of spikes are.
        energy_ann_mj: ``mac_pj * macs_step``.
        norm_ops: Operations of norms, where asked for; in all energies as MACs.
        neuron_ops: Updates of membrane potentials, where asked for; in both energies of the SNN as MACs.
        memory_bytes: Weights once a time step, membrane potentials read and written once a time step.
        energy_memory_mj: ``pj_per_byte * memory_bytes`` where asked for; in no other energy.
        images: How many images the averages are of.
        T: Time steps.
        mac_pj: Energy of a MAC in picojoule.
        sop_pj: Energy of a synaptic operation in picojoule.
        pj_per_byte: Energy of moving a byte in picojoule.
    """

    macs: float
    sops_exact: float
    sops_paper: float
    energy_exact_mj: float
    energy_paper_mj: float
    firing_rates: Mapping[str, FiringRate]
    by_module: Mapping[str, ModuleCount]
    uncounted: Mapping[str, int]
    macs_step: float
    macs_exact: float
    macs_paper: float
    sops_pooling: float
    energy_ann_mj: float
    norm_ops: float
    neuron_ops: float
    memory_bytes: float
    energy_memory_mj: float | None
    images: int
    T: int
    mac_pj: float
    sop_pj: float
    pj_per_byte: float | None

    @property
    def percent_of_ann_exact(self) -> float:
        """Energy in per cent of the ANN twin's, exact column."""
        return 100 * self.energy_exact_mj / self.energy_ann_mj if self.energy_ann_mj else math.nan

    @property
    def percent_of_ann_paper(self) -> float:
        """Energy in per cent of the ANN twin's, paper column."""
        return 100 * self.energy_paper_mj / self.energy_ann_mj if self.energy_ann_mj else math.nan

    @property
    def silent(self) -> list[str]:
        """Modules whose whole input was zero."""
        return [name for name, module in self.by_module.items() if module.silent]

    def row(self) -> dict[str, Any]:
        """The columns of a results row: totals, constants and what was not counted."""
        return {
            "macs": self.macs,
            "macs_step": self.macs_step,
            "sops_paper": self.sops_paper,
            "sops_exact": self.sops_exact,
            "energy_ann_mj": self.energy_ann_mj,
            "energy_paper_mj": self.energy_paper_mj,
            "energy_exact_mj": self.energy_exact_mj,
            "percent_of_ann_paper": _plain(self.percent_of_ann_paper),
            "percent_of_ann_exact": _plain(self.percent_of_ann_exact),
            "energy_memory_mj": self.energy_memory_mj,
            "mac_pj": self.mac_pj,
            "sop_pj": self.sop_pj,
            "pj_per_byte": self.pj_per_byte,
            "count_images": self.images,
            "uncounted": dict(self.uncounted),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data for JSON."""
        return {
            **asdict(self),
            "percent_of_ann_exact": _plain(self.percent_of_ann_exact),
            "percent_of_ann_paper": _plain(self.percent_of_ann_paper),
        }

    def table(self) -> str:
        """Text for people: a line per module, the layers of neurons, totals, and what was not counted."""
        header = ("module", "operation", "input", "rate", "weights", "zero", "MACs", "SOPs exact", "SOPs paper")
        lines = [header]
        for name, m in self.by_module.items():
            rate = "" if m.rate is None else f"{m.rate:.4f}"
            zero = f"{m.zero_weights / m.weights:.1%}" if m.weights else ""
            numbers = (f"{m.macs:,.0f}", f"{m.sops_exact:,.1f}", f"{m.sops_paper:,.1f}")
            lines.append((name, m.ops, m.input, rate, f"{m.weights:,}" if m.weights else "", zero, *numbers))
        numbers = (f"{self.macs:,.0f}", f"{self.sops_exact:,.1f}", f"{self.sops_paper:,.1f}")
        lines.append(("total", "", "", "", "", "", *numbers))
        text = [_align(lines, left=3)]
        if self.firing_rates:
            fired = [("neurons", "number", "silent", "saturated", "rate", "rate of each step")]
            for name, r in self.firing_rates.items():
                steps = " ".join(f"{value:.4f}" for value in r.rates)
                fired.append((name, f"{r.neurons:,}", f"{r.silent:,}", f"{r.saturated:,}", f"{r.mean:.4f}", steps))
            text.append(_align(fired, left=1))
        text.append(
            f"Per image, mean of {self.images}, T={self.T}; {self.mac_pj} pJ a MAC, {self.sop_pj} pJ a SOP.\n"
            f"exact: {self.macs_exact:,.0f} MACs + {self.sops_exact:,.1f} SOPs ({self.sops_pooling:,.1f} of them "
            f"pooling) = {self.energy_exact_mj:.6g} mJ, {self.percent_of_ann_exact:.2f} % of the ANN twin's "
            f"{self.energy_ann_mj:.6g} mJ ({self.macs_step:,.0f} MACs)\n"
            f"paper: {self.macs_paper:,.0f} MACs + {self.sops_paper:,.1f} SOPs = {self.energy_paper_mj:.6g} mJ, "
            f"{self.percent_of_ann_paper:.2f} % of the ANN twin's"
        )
        if self.norm_ops or self.neuron_ops:
            text[-1] += f"\nas MACs in these energies: {self.norm_ops:,.0f} of norms, {self.neuron_ops:,.0f} of neurons"
        if self.energy_memory_mj is not None:
            text[-1] += (
                f"\nmemory: {self.memory_bytes:,.0f} bytes at {self.pj_per_byte} pJ = {self.energy_memory_mj:.6g} mJ"
            )
        if self.silent:
            text.append(f"Input all zero: {', '.join(self.silent)}")
        without = ", ".join(f"{name} ({calls}x)" for name, calls in self.uncounted.items())
        text.append(f"NOT COUNTED: {without}" if without else "Not counted: nothing.")
        return "\n\n".join(text)


def _plain(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value


def _align(lines: Sequence[Sequence[str]], left: int) -> str:
    """Pad columns; the first ``left`` ones to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    return "\n".join(padded)


@dataclass(frozen=True)
class CountSummary:
    """Counts averaged over images, with their spread.

    Attributes:
        mean: Averages over all images; neurons are silent where no image made them fire.
        std: Standard deviation, between pieces of ``piece`` images, of MACs, SOPs and energies; nan of one piece.
        images: Number of images.
        piece: Images in a piece; 1 makes ``std`` the spread between images.
    """

    mean: Count
    std: Mapping[str, float]
    images: int
    piece: int


# --------------------------------------------------------------------------------------------------------------
# Which tensors hold spikes
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Signal:
    """What is known of a tensor that descends from the model's input.

    ``unit``: every value is a whole multiple of it; None is analog. ``spike``: the value that one spike has, so that
    mean / spike is a firing rate: averaging changes the unit and not the spike, scaling changes both. ``steps``: how
    many time steps were averaged into one. ``judge``: nothing is known; look at the values.
    """

    unit: Fraction | None
    spike: Fraction = Fraction(1)
    steps: int = 1
    judge: bool = False


_SPIKES = _Signal(Fraction(1))
_ANALOG = _Signal(None)
_UNKNOWN = _Signal(None, judge=True)
_DECLARED = _Signal(None, steps=0)  # analog by the user's word, whatever the values
_BLANK = _Signal(Fraction(0))  # new zeros, which a model fills piece by piece; not yet a signal
_ENOUGH = 1024  # values that show that a tensor is analog
_LEVELS = 9  # multiples of a constant that values alone can show: those of a 3x3 average


@dataclass(frozen=True, slots=True)
class _Events:
    """A tensor recognised as whole numbers of events."""

    kind: str
    signal: _Signal
    signed: bool
    top: float  # the largest number of events in one value
    rounded: bool  # whether values may be off by a rounding error
    binary: bool


def _judge(x: Tensor, strict: bool) -> _Signal | None:
    """Recognise spikes by their values: whole numbers, or few multiples of one constant.

    Args:
        x: Values.
        strict: Accept only -1, 0 and 1, up to rounding: what a straight-through estimator leaves of spikes.
    """
    if x.numel() > _ENOUGH:
        index = tuple(size // 2 for size in x.shape[: max(0, x.dim() - 2)])
        some = x[index].reshape(-1)[:_ENOUGH]
        if len(some) > 4 * _LEVELS and not (some == some.round()).all() and some.unique().numel() > 2 * _LEVELS + 1:
            return None
    size = x.abs()
    largest = size.max()
    if not torch.isfinite(largest):
        return None
    if largest == 0:
        return _SPIKES
    if strict:
        return _SPIKES if bool(((size < 1e-5) | ((size - 1).abs() < 1e-5)).all()) else None
    if bool((x == x.round()).all()):
        return _SPIKES
    smallest = size[size > 0].min().item()
    for part in range(1, 5):  # the constant itself need not occur
        multiples = size.double() * (part / smallest)
        whole = multiples.round()
        if whole.max() > _LEVELS:
            return None
        if bool(((multiples - whole).abs() < 1e-4).all()):
            # Name the constant as people do: 1/3, not the float next to it.
            unit = Fraction(smallest / part).limit_denominator(1000)
            near = unit and abs(float(unit) - smallest / part) < 1e-6 * smallest
            return _Signal(unit if near else Fraction(smallest / part), spike=unit if near else Fraction(smallest))
    return None


def _constant(x: Tensor) -> _Signal:
    """What multiplying spikes by a constant tensor keeps: a mask, one scale, or whole numbers."""
    size = x.abs()
    largest = size.max().item() if x.numel() else 0.0
    if not math.isfinite(largest):
        return _ANALOG
    if largest and bool(((size == 0) | (size == largest)).all()):
        return _Signal(Fraction(largest), Fraction(largest))
    return _SPIKES if bool((x == x.round()).all()) else _ANALOG


def _weakest(signals: Sequence[_Signal]) -> _Signal:
    """What is left of several signals of which at least one has no unit."""
    unsure = [s for s in signals if s.unit is None]
    if all(s is _DECLARED for s in unsure):
        return _DECLARED
    return _UNKNOWN if all(s.judge for s in unsure) else _ANALOG


def _common(signals: Sequence[_Signal]) -> _Signal:
    """The signal of a sum, a choice or a concatenation."""
    if any(s.unit is None for s in signals):
        return _weakest(signals)
    units = [s.unit for s in signals if s.unit]
    if not units:
        return _SPIKES
    unit = min(units)
    if any(other % unit for other in units):
        return _ANALOG
    sizes = {s.spike for s in signals if s.unit}
    return _Signal(unit, sizes.pop() if len(sizes) == 1 else unit, max(s.steps for s in signals))


def _times(a: _Signal, b: _Signal) -> _Signal:
    """The signal of a product."""
    if a.unit is None or b.unit is None:
        return _weakest((a, b))
    return _Signal(a.unit * b.unit, a.spike * b.spike, max(a.steps, b.steps))


# --------------------------------------------------------------------------------------------------------------
# Geometry
# --------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _reach(
    size: int, out: int, kernel: int, stride: int, padding: int, dilation: int, transposed: bool = False
) -> Tensor:
    """Which kernel positions an input position meets along one axis: 0 or 1, ``[kernel, size]``."""
    reach = torch.zeros(kernel, size, dtype=torch.float64)
    for k in range(kernel):
        if transposed:
            for i in range(size):
                reach[k, i] = 0 <= i * stride - padding + k * dilation < out
        else:
            for o in range(out):
                i = o * stride - padding + k * dilation
                if 0 <= i < size:
                    reach[k, i] = 1
    return reach


def _spread(kernel: Tensor, reaches: Sequence[Tensor]) -> Tensor:
    """Fan-out of every input position, ``[C, *size]``, from weights per kernel position, ``[C, *kernel]``."""
    for reach in reaches:  # each turns the first kernel axis into the last position axis
        kernel = torch.tensordot(kernel, reach.to(kernel.device), dims=([1], [0]))
    return kernel


def _fan_out(w: Tensor, size: Sequence[int], out: Sequence[int], args: Sequence[Any]) -> Tensor:
    """How many non-zero weights an event at each input position meets in a convolution, ``[C_in, *size]``."""
    stride, padding, dilation, transposed, _, groups = args
    alive = (w != 0).double()
    if not transposed:  # weights [C_out, C_in/groups, *kernel] as [groups, C_out/groups, C_in/groups, *kernel]
        alive = alive.reshape(groups, -1, *w.shape[1:])
    kernel = alive.sum(1).reshape(-1, *w.shape[2:])  # transposed, they are [C_in, C_out/groups, *kernel]
    ways = (_stretch(value, len(size)) for value in (stride, padding, dilation))
    axes = zip(size, out, w.shape[2:], *ways, strict=True)
    return _spread(kernel, [_reach(*axis, transposed) for axis in axes])


def _stretch(value: Any, dims: int) -> list[int]:
    """Spread torch's one-number-for-all-axes."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


# --------------------------------------------------------------------------------------------------------------
# The table: rules, and what is free by convention
# --------------------------------------------------------------------------------------------------------------

# A rule counts what an operation does and returns the signal of its output; a flow only returns that signal.
_Rule = Callable[["_Mode", Any, Sequence[Any], Mapping[str, Any], Any], _Signal]
_TABLE: dict[str, tuple[str, _Rule]] = {}


def _register(kind: str, names: str) -> Callable[[_Rule], _Rule]:
    """Enter a function in the table for operations, of aten unless said; a name that is there already raises."""

    def enter(rule: _Rule) -> _Rule:
        for name in names.split():
            full = name if "." in name else f"aten.{name}"
            if full in _TABLE:
                raise ValueError(f"Operation {full} has a rule already: two would hide one another.")
            _TABLE[full] = (kind, rule)
        return rule

    return enter


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from _tensors(arg)


@_register(
    "free",
    "exp log log1p expm1 sqrt rsqrt reciprocal pow square sigmoid tanh gelu silu mish elu leaky_relu prelu softplus "
    "hardtanh hardsigmoid hardswish sin cos atan erf addcmul addcdiv lerp native_batch_norm cudnn_batch_norm "
    "miopen_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_no_update "
    "_batch_norm_with_update batch_norm_with_update native_layer_norm native_group_norm var var_mean std std_mean "
    "linalg_vector_norm norm",
)
def _analog(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    return _ANALOG


@_register(
    "free",
    "gt ge lt le eq ne logical_and logical_or logical_not logical_xor isnan isinf isfinite sign sgn round floor ceil "
    "trunc heaviside bernoulli bitwise_and bitwise_or bitwise_xor bitwise_not any all argmax argmin one_hot __and__ "
    "__or__ __xor__ spikezoo.top_mask spikezoo.poisson spikezoo.ttfs",
)
def _whole(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    return _SPIKES


@_register(
    "free",
    "clone _to_copy relu abs neg roll flip repeat repeat_interleave masked_select _unsafe_view pixel_shuffle "
    "pixel_unshuffle upsample_nearest1d upsample_nearest2d upsample_nearest3d amax amin max min maximum minimum cat "
    "stack select_scatter slice_scatter channel_shuffle native_channel_shuffle im2col unfold_copy detach_copy "
    "view_copy reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d tril triu topk cumsum",
)
def _kept(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    return mode.common(list(_tensors(args)))


@_register("free", "index _unsafe_index index_select gather take")
def _picked(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    return mode.signal(args[0])  # the rest are positions


@_register("free", "copy")
def _written(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    return mode.signal(args[1])


@_register("free", "index_put scatter")
def _inserted(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    return mode.common([args[0], args[2 if "index_put" in func._schema.name else 3]])


@_register("free", "where")
def _chosen(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    return mode.common(args[1:3])


@_register("free", "add sub rsub fmod remainder")
def _summed(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    return mode.common(args[:2]) if alpha == 1 else _ANALOG


@_register("free", "clamp clamp_min clamp_max constant_pad_nd masked_fill fill threshold")
def _bounded(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    # Bounds and fillings are values that the output may take.
    numbers = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, int | float)]
    others = [a for a in args[1:] if isinstance(a, Tensor) and a.dtype is not torch.bool]
    return mode.common([args[0], *others, *numbers])


@_register("free", "mul div")
def _scaled(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    if kwargs.get("rounding_mode"):
        return _SPIKES
    if any(mode.live(a) and mode.signal(a) == _ANALOG for a in args[:2]):
        return _ANALOG  # without a look at the values of the other
    first, second = mode.signal(args[0]), mode.signal(args[1])
    if func._schema.name.startswith("aten::div"):
        if not second.unit or (isinstance(args[1], Tensor) and (args[1].numel() > 1 or mode.live(args[1]))):
            return _ANALOG
        second = _Signal(1 / second.unit, 1 / second.unit)
    return _times(first, second)


@_register("free", "native_dropout dropout _fused_dropout")
def _dropped(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    return _UNKNOWN


@_register("free", "sum mean")
def _averaged(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    x = args[0]
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    along: Sequence[int] = [given] if isinstance(given, int) else given or range(x.dim())
    dims = [d % max(x.dim(), 1) for d in along]
    merged = math.prod(x.shape[d] for d in dims)
    signal = mode.signal(x)
    events = mode.events(x) if merged > 1 else None
    if events is not None:
        mode.pooling(func, x, events, mode.rows(x, events, (0,)).sum())
        signal = events.signal
    if func._schema.name == "aten::sum" or signal.unit is None:
        return signal
    # The mean of [T, B, ...] over its first axis is a mean over time.
    steps = x.shape[0] if dims == [0] and x.dim() > 1 and x.shape[1] == mode.batch else 1
    return _Signal(signal.unit / merged, signal.spike, signal.steps * steps)


@_register("free", "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices")
def _max_pool(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    x, kernel = args[:2]
    stride, padding, dilation = (args[i] if len(args) > i else default for i, default in ((2, ()), (3, 0), (4, 1)))
    events = mode.events(x)
    if events is None:
        return mode.signal(x)
    _pool(mode, func, x, out[0], _dims(func), events, kernel, stride, padding, dilation)
    return events.signal


@_register("free", "avg_pool1d avg_pool2d avg_pool3d")
def _avg_pool(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    given = dict(zip(("x", "kernel", "stride", "padding", "ceil", "include", "divisor"), args, strict=False))
    x, dims = given["x"], _dims(func)
    events = mode.events(x)
    if events is None:
        return mode.signal(x)
    kernel = _stretch(given["kernel"], dims)
    stride = _stretch(given.get("stride") or kernel, dims)
    padding = _stretch(given.get("padding", 0), dims)
    include = given.get("include", kwargs.get("count_include_pad", True))
    divisor = given.get("divisor", kwargs.get("divisor_override"))
    _pool(mode, func, x, out, dims, events, kernel, stride, padding, 1)
    if not divisor:
        low, high = (0, 0) if not include else (1, 1)  # how much of the padding a window may cover
        windows = [
            {min(o * s - p + k, size + high * p) - max(o * s - p, -low * p) for o in range(_positions(out, dims)[axis])}
            for axis, (size, k, s, p) in enumerate(
                zip(_positions(x, dims), kernel, stride, padding, strict=True),
            )
        ]
        if any(len(lengths) > 1 for lengths in windows):
            return _ANALOG
        divisor = math.prod(lengths.pop() for lengths in windows)
    signal = events.signal
    return _Signal(signal.unit / divisor if signal.unit else signal.unit, signal.spike, signal.steps)


@_register("free", "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d")
def _adaptive_pool(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    x, dims = args[0], _dims(func)
    y = out[0] if isinstance(out, tuple) else out
    events = mode.events(x)
    if events is None:
        return mode.signal(x)
    lengths = []
    cover = torch.ones((), dtype=torch.float64)
    for size, n in zip(_positions(x, dims), _positions(y, dims), strict=True):
        line = torch.zeros(size, dtype=torch.float64)
        ends = [(o * size // n, -(-(o + 1) * size // n)) for o in range(n)]
        for start, end in ends:
            line[start:end] += 1
        lengths.append({end - start for start, end in ends})
        cover = cover[..., None] * line
    rows = mode.rows(x, events, tuple(range(x.dim() - dims)))
    mode.pooling(func, x, events, (rows * cover.to(rows.device)).sum())
    if "max" in func._schema.name:
        return events.signal
    if any(len(sizes) > 1 for sizes in lengths):
        return _ANALOG
    signal = events.signal
    divisor = math.prod(sizes.pop() for sizes in lengths)
    return _Signal(signal.unit / divisor if signal.unit else signal.unit, signal.spike, signal.steps)


def _dims(func: Any) -> int:
    """Spatial axes of a pooling operation, from its name."""
    return next(n for n in (1, 2, 3) if f"{n}d" in func._schema.name)


def _positions(x: Tensor, dims: int) -> Sequence[int]:
    return x.shape[x.dim() - dims :]


def _pool(
    mode: _Mode,
    func: Any,
    x: Tensor,
    out: Tensor,
    dims: int,
    events: _Events,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
) -> None:
    """Count events times the windows that cover them."""
    kernel = _stretch(kernel, dims)
    ways = (_stretch(value, dims) for value in (stride or kernel, padding, dilation))
    axes = zip(_positions(x, dims), _positions(out, dims), kernel, *ways, strict=True)
    cover = torch.ones((), dtype=torch.float64)
    for axis in axes:
        cover = cover[..., None] * _reach(*axis).sum(0)
    rows = mode.rows(x, events, tuple(range(x.dim() - dims)))
    mode.pooling(func, x, events, (rows * cover.to(rows.device)).sum())


@_register("product", "convolution")
def _convolution(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    x, w = args[0], args[1]
    macs = _handles().conv_flop_count(list(x.shape), list(w.shape), list(out.shape), transposed=args[6])
    mode.compare(func, args, kwargs, out, macs)
    if not mode.live(x):
        return mode.idle(func, w)
    events = mode.events(x)
    if events is None:
        mode.analog(func, w, macs, macs // w.numel(), x.shape[0])
        return _ANALOG
    size, positions = x.shape[2:], out.shape[2:]
    fan_out = mode.fact(
        w, ("fan-out", size, positions, str(args[3:9])), lambda: _fan_out(w, size, positions, args[3:9])
    )
    rows = mode.rows(x, events, (0,))
    mode.spiking(func, x, events, macs, rows.sum(), (rows * fan_out).sum(), x.shape[0], w)
    return _ANALOG


@_register("product", "mm addmm bmm baddbmm mv addmv dot")
def _product(mode: _Mode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Signal:
    a, b = args[1:3] if func._schema.name.startswith(("aten::add", "aten::badd")) else args[:2]
    one_a, one_b = a, b  # as [batch, m, k] and [batch, k, n], views of the same storage
    if a.dim() < 3:
        one_a = a.reshape(1, -1, a.shape[-1])
        one_b = b.reshape(1, b.shape[0], -1)
    macs = _handles().matmul_flop_jit([_Shape(one_a), _Shape(one_b)], [_Shape(out)])
    mode.compare(func, args, kwargs, out, macs)
    live_a, live_b = mode.live(a), mode.live(b)
    if not (live_a or live_b):
        signal = mode.idle(func, a, b)
        return _ANALOG if mode.live(args[0]) else signal  # what it was added to
    batch, m, _ = one_a.shape
    n = one_b.shape[2]
    frames = batch if batch > 1 else (m if live_a else n)
    events_a = mode.events(a) if live_a else None
    events_b = mode.events(b) if live_b else None
    if live_a and live_b:
        if events_a is None and events_b is None:
            mode.analog(func, None, macs, 0, frames)
            return _ANALOG
        # Either the events of the other operand, or its non-zero values, are what an event meets.
        rows_a = mode.rows(one_a, events_a, (1,)) if events_a else (one_a != 0).double().sum(1)
        rows_b = mode.rows(one_b, events_b, (2,)) if events_b else (one_b != 0).double().sum(2)
        total = (rows_a * rows_b).sum()
        if events_b is not None and (events_a is None or (events_b.binary and not events_a.binary)):
            mode.spiking(func, b, events_b, macs, rows_b.sum(), total, frames, None, events_a)
        elif events_a is not None:
            mode.spiking(func, a, events_a, macs, rows_a.sum(), total, frames, None, events_b)
        return _times(events_a.signal, events_b.signal) if events_a and events_b else _ANALOG
    x, w, events = (a, b, events_a) if live_a else (b, a, events_b)
    if events is None:
        mode.analog(func, w, macs, m if live_a else n, frames)
        return _ANALOG
    if live_a:
        fan_out = mode.fact(w, "fan-out of rows", lambda: (one_b != 0).double().sum(2))
        rows = mode.rows(one_a, events, (1,))
    else:
        fan_out = mode.fact(w, "fan-out of columns", lambda: (one_a != 0).double().sum(1))
        rows = mode.rows(one_b, events, (2,))
    mode.spiking(func, x, events, macs, rows.sum(), (rows * fan_out).sum(), frames, w)
    return _ANALOG


@dataclass(frozen=True)
class _Shape:
    """Looks to fvcore's handles like a value of a traced graph."""

    tensor: Tensor

    def isCompleteTensor(self) -> bool:
        return True

    def type(self) -> _Shape:
        return self

    def sizes(self) -> list[int]:
        return list(self.tensor.shape)


@functools.cache
def _handles() -> Any:
    """The formulas of fvcore; imported late, since its focal loss uses the deprecated torch.jit.script."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import jit_handles
    return jit_handles


_CREATED = ("aten.zeros", "aten.zeros_like", "aten.new_zeros", "aten.empty", "aten.empty_like", "aten.new_empty")
# Constants, random numbers and questions about a tensor.
_CONSTANT = (
    "ones ones_like new_ones full full_like new_full arange linspace eye scalar_tensor rand rand_like randn randn_like "
    "randint randint_like randperm normal uniform exponential random lift_fresh _local_scalar_dense equal is_nonzero "
    "empty_strided empty_permuted new_empty_strided zero resize set_ _assert_async"
)
_IGNORED = {*_CREATED, *(f"aten.{name}" for name in _CONSTANT.split())}
_NORMS = ("native_batch_norm", "_batch_norm", "batch_norm_with", "native_layer_norm", "native_group_norm")


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to do with an operation."""

    kind: str  # view, composite, created, ignored, free, product, torch, none
    rule: _Rule | None = None
    writes: bool = False


@functools.cache
def _plan(func: Any) -> _Plan:
    name = str(func._overloadpacket)
    returns = func._schema.returns
    alias = returns[0].alias_info if returns else None
    writes = alias is not None and alias.is_write
    if writes and name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    if name in _TABLE:
        kind, rule = _TABLE[name]
        return _Plan(kind, rule, writes)
    if name in _IGNORED:
        return _Plan("created" if name in _CREATED else "ignored", writes=writes)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return _Plan("composite")  # reaches us whole where a tensor was made in inference mode
    if alias is not None and not writes:
        return _Plan("view")
    if func._overloadpacket in flop_registry:
        return _Plan("torch", writes=writes)
    return _Plan("none", writes=writes)


# --------------------------------------------------------------------------------------------------------------
# The observer
# --------------------------------------------------------------------------------------------------------------


@dataclass
class _Row:
    """Sums of one module over all images."""

    ops: dict[str, None] = field(default_factory=dict)  # an ordered set
    kinds: dict[str, None] = field(default_factory=dict)
    macs: int = 0
    macs_step: float = 0.0
    macs_exact: int = 0
    sops_exact: int = 0
    macs_paper: int = 0
    sops_paper: float = 0.0
    pooling: int = 0
    fired: float = 0.0  # events weighted by the value of a spike
    places: int = 0  # elements of spiking inputs
    calls: int = 0
    spiking: bool = False
    events: int = 0
    weights: dict[Any, tuple[int, int]] = field(default_factory=dict)  # storage -> numel, zeros


@dataclass
class _Fired:
    """Sums of one layer of neurons over all images."""

    steps: Tensor  # spikes of each step
    total: Tensor  # spikes of each neuron
    frames: int  # how often each neuron could fire
    images: int  # how many times B


@dataclass
class _Tally:
    """Everything summed over images."""

    rows: dict[str, _Row] = field(default_factory=dict)
    fired: dict[str, _Fired] = field(default_factory=dict)
    uncounted: dict[str, int] = field(default_factory=dict)
    images: int = 0
    norm_elements: int = 0
    norm_step: float = 0.0
    updates: int = 0
    memory: float = 0.0

    def add(self, other: _Tally) -> None:
        """Add the sums of more images."""
        for name, row in other.rows.items():
            mine = self.rows.setdefault(name, _Row())
            for key in ("ops", "kinds", "weights"):
                getattr(mine, key).update(getattr(row, key))
            for key in (
                "macs", "macs_step", "macs_exact", "sops_exact", "macs_paper", "sops_paper", "pooling", "fired",
                "places", "events", "spiking",
            ):  # fmt: skip
                setattr(mine, key, getattr(mine, key) + getattr(row, key))
            mine.calls = max(mine.calls, row.calls)
        for name, fired in other.fired.items():
            have = self.fired.get(name)
            if have is None:
                self.fired[name] = fired
            elif have.total.shape != fired.total.shape or have.steps.shape != fired.steps.shape:
                what = _second_shape(name)
                self.uncounted[what] = self.uncounted.get(what, 0) + 1
            else:
                self.fired[name] = _Fired(
                    have.steps + fired.steps,
                    have.total + fired.total,
                    have.frames + fired.frames,
                    have.images + fired.images,
                )
        for name, calls in other.uncounted.items():
            self.uncounted[name] = max(self.uncounted.get(name, 0), calls)
        self.images += other.images
        self.norm_elements += other.norm_elements
        self.norm_step += other.norm_step
        self.updates += other.updates
        self.memory += other.memory


class _Mode(TorchDispatchMode):
    """Sees every operation of forward passes of one model.

    Records are kept by storage, which all views of a tensor share: where a storage is freed and its address used
    again, the operation that made the new tensor has replaced the record.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tally = _Tally()
        self.batch = self.T = 1
        self.stack: list[str] = [type(model).__name__]
        self.paused = False
        self._signals: dict[int, _Signal] = {}
        self._facts: dict[Any, Any] = {}
        self._lasting = {_key(t) for t in itertools.chain(model.parameters(), model.buffers())}
        self._sums: list[tuple[_Row, str, Tensor]] = []

    # ---------------------------------------------------------------------------------------- what tensors are

    def live(self, x: Any) -> bool:
        """Whether a tensor descends from the model's input."""
        return isinstance(x, Tensor) and self._signals.get(_key(x), _BLANK) is not _BLANK

    def signal(self, x: Any) -> _Signal:
        """What is known of a tensor or number; a constant tensor is judged by its values."""
        if not isinstance(x, Tensor):
            return _Signal(abs(Fraction(x)), abs(Fraction(x))) if math.isfinite(x) else _ANALOG
        found = self._signals.get(_key(x))
        if found is not None:
            return found
        if x.dtype is torch.bool:
            return _SPIKES
        if x.numel() == 1:
            return self.signal(x.item())
        return self.fact(x, "signal", lambda: _constant(x))

    def common(self, values: Sequence[Any]) -> _Signal:
        """The signal of a sum; constants are looked at only where everything else is known to be spikes."""
        live = [self.signal(v) for v in values if isinstance(v, Tensor) and _key(v) in self._signals]
        if any(s.unit is None for s in live):
            return _common(live)
        return _common([*live, *(self.signal(v) for v in values if not isinstance(v, Tensor) or not self.held(v))])

    def held(self, x: Tensor) -> bool:
        """Whether a tensor has a record."""
        return _key(x) in self._signals

    def fact(self, w: Tensor, what: Any, find: Callable[[], Any]) -> Any:
        """Something about a weight, found once for parameters and buffers, each time for computed ones."""
        if _key(w) not in self._lasting:
            return find()
        key = (w.data_ptr(), w.shape, w.stride(), what)
        if key not in self._facts:
            self._facts[key] = find()
        return self._facts[key]

    def events(self, x: Tensor) -> _Events | None:
        """Read a tensor as whole numbers of events; None is analog."""
        signal = self.signal(x)
        if signal is _DECLARED:
            return None
        judged = signal.unit is None
        if judged:
            found = _judge(x, strict=not signal.judge)
            if found is None:
                return None
            signal = found
        if x.dtype is torch.bool:
            low, high = 0.0, 1.0
        else:
            low, high = (value.item() for value in torch.aminmax(x))
        if not math.isfinite(low) or not math.isfinite(high):
            return None
        if not signal.unit:  # multiples of zero
            signal = _SPIKES
        assert signal.unit is not None
        top = round(max(-low, high) / float(signal.unit))
        if signal.unit != 1:
            unit = signal.unit
            shown = str(unit) if unit.denominator <= 100_000 else f"{float(unit):.4g}"
            kind = f"scaled spikes (c={shown})"
        else:
            kind = "spikes" if top <= 1 else "integer spikes"
        if low < 0:
            kind = f"signed {kind}"
        return _Events(kind, signal, low < 0, top, judged, signal.unit == signal.spike and top <= 1)

    def rows(self, x: Tensor, events: _Events, dims: tuple[int, ...]) -> Tensor:
        """Whole numbers of events summed over ``dims``, in double precision and exact."""
        assert events.signal.unit is not None
        unit = float(events.signal.unit)
        if x.dtype is torch.bool:
            x = x.float()
        if events.signed:
            x = x.abs()
        binary = math.frexp(unit)[0] == 0.5 and Fraction(unit) == events.signal.unit
        if events.rounded or not binary:
            values = (x.double() / unit).round()
            return values.sum(dims) if dims else values
        if not dims:
            return x.double() / unit
        # Sums of whole numbers are exact in float32 up to 2^24, and in float32 half the memory moves.
        summands = math.prod(x.shape[d] for d in dims)
        dtype = torch.float32 if events.top * summands < 2**24 and x.dtype is not torch.float64 else torch.float64
        return x.sum(dims, dtype=dtype).double() / unit

    # --------------------------------------------------------------------------------------------- what they do

    def _row(self, func: Any, w: Tensor | None, kind: str) -> _Row:
        row = self.tally.rows.setdefault(self.stack[-1], _Row())
        row.ops[func._schema.name.removeprefix("aten::").removesuffix("_with_indices")] = None
        row.kinds[kind] = None
        row.calls += 1
        if w is not None:
            alive = self.fact(w, "alive", lambda: int(torch.count_nonzero(w)))
            key = w.data_ptr() if _key(w) in self._lasting else (tuple(w.shape), row.calls)
            row.weights[key] = (w.numel(), w.numel() - alive)
        return row

    def steps(self, frames: int) -> int:
        """Time steps in a batch: layers see T*B frames; the stem of an image, and the head on a time mean, see B."""
        return self.T if self.T > 1 and frames % (self.T * self.batch) == 0 else 1

    def _dense(self, row: _Row, macs: int, frames: int, w: Tensor | None) -> None:
        steps = self.steps(frames)
        row.macs += macs
        row.macs_step += macs / steps
        if w is not None:
            self.tally.memory += w.numel() * w.element_size() * steps * self.batch

    def analog(self, func: Any, w: Tensor | None, macs: int, positions: int, frames: int) -> None:
        """Count an operation on analog input, whose every weight meets ``positions`` values."""
        needed, additions = macs, False
        if w is not None:
            alive = self.fact(w, "alive", lambda: int(torch.count_nonzero(w)))
            needed = alive * positions
            additions = alive > 1 and self.fact(w, "binary", lambda: _is_binary(w))
        row = self._row(func, w, "analog x binary weights" if additions else "analog")
        self._dense(row, macs, frames, w)
        row.macs_paper += macs
        if additions:
            row.sops_exact += needed
        else:
            row.macs_exact += needed

    def spiking(
        self,
        func: Any,
        x: Tensor,
        events: _Events,
        macs: int,
        arrived: Tensor,
        total: Tensor,
        frames: int,
        w: Tensor | None,
        other: _Events | None = None,
    ) -> None:
        """Count an operation on spikes: ``arrived`` events and ``total`` synaptic operations."""
        kind = events.kind if w is not None else f"{events.kind} x {other.kind if other else 'analog'}"
        row = self._row(func, w, kind)
        self._dense(row, macs, frames, w)
        rate = self._rate(row, x, events, arrived)
        row.sops_exact += _integer(total)
        row.sops_paper += rate * macs * events.signal.steps

    def pooling(self, func: Any, x: Tensor, events: _Events, total: Tensor) -> None:
        """Count a pooling of spikes."""
        row = self._row(func, None, events.kind)
        operations = _integer(total)
        row.spiking = True
        row.events += operations
        row.sops_exact += operations
        row.pooling += operations

    def _rate(self, row: _Row, x: Tensor, events: _Events, arrived: Tensor) -> float:
        assert events.signal.unit is not None
        spikes = _integer(arrived)
        fired = spikes * float(events.signal.unit / events.signal.spike)
        row.spiking = True
        row.events += spikes
        row.fired += fired
        row.places += x.numel()
        return fired / x.numel()

    def idle(self, func: Any, *weights: Tensor) -> _Signal:
        """Note a product that no image takes part in; it is done once, for any number of images."""
        self.note(f"{func} on weights only")
        return _BLANK

    def note(self, what: str) -> None:
        """List what has no number."""
        self.tally.uncounted[what] = self.tally.uncounted.get(what, 0) + 1

    # ------------------------------------------------------------------------------------------------- dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        plan = _plan(func)
        if self.paused or plan.kind == "view":
            return func(*args, **kwargs)
        if plan.kind == "composite":
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if plan.kind == "created":
            self._signals[_key(out)] = _BLANK
            return out
        live = any(self.live(t) for t in _tensors((*args, *kwargs.values())))
        signal = _BLANK
        if plan.kind == "product":
            assert plan.rule is not None
            signal = plan.rule(self, func, args, kwargs, out)
        elif plan.kind == "free":
            if live:
                assert plan.rule is not None
                signal = plan.rule(self, func, args, kwargs, out)
                if any(norm in func._schema.name for norm in _NORMS):
                    self.tally.norm_elements += out[0].numel()
                    self.tally.norm_step += out[0].numel() / self.steps(out[0].shape[0])
        elif plan.kind == "torch":
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            self.analog(func, None, flops // 2, 0, args[0].shape[0] if args[0].dim() else 1)
            signal = _ANALOG
        elif plan.kind != "ignored":
            self.note(str(func))
            signal = _UNKNOWN
        for tensor in _tensors((out,)):
            self._record(tensor, signal if live else _BLANK, plan.writes)
        return out

    def _record(self, out: Tensor, signal: _Signal, writes: bool) -> None:
        key = _key(out)
        if signal is not _BLANK:
            before = self._signals.get(key) if writes else None
            if before is not None and out.numel() * out.element_size() < out.untyped_storage().nbytes():
                signal = _common([before, signal])  # a part was written, the rest holds what it held
            elif before is None and writes and out.numel() * out.element_size() < out.untyped_storage().nbytes():
                signal = _ANALOG
            self._signals[key] = signal
        elif not (writes and self._signals.get(key, _BLANK) is not _BLANK):
            self._signals.pop(key, None)  # a constant

    def compare(self, func: Any, args: Any, kwargs: Any, out: Any, macs: int) -> None:
        """Hold fvcore's MACs against torch's own counter."""
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and formula(*args, **kwargs, out_val=out) != 2 * macs:
            self.note(f"{func}: {macs} MACs by fvcore, {formula(*args, **kwargs, out_val=out) // 2} by torch")


def _key(x: Tensor) -> int:
    """The address of a tensor's memory."""
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else 0


def _integer(x: Tensor) -> int:
    return round(x.item())


def _is_binary(w: Tensor) -> bool:
    """Whether the weights are -c, 0 and +c."""
    size = w.detach().abs()
    return bool(((size == 0) | (size == size.max())).all())


# --------------------------------------------------------------------------------------------------------------
# Counting
# --------------------------------------------------------------------------------------------------------------


def _is_neuron(module: nn.Module) -> bool:
    """Spikezoo's neurons and SpikingJelly's; by name, since this file imports neither."""
    return any(cls.__name__ in ("SpikingNeuron", "BaseNode") for cls in type(module).__mro__)


@contextmanager
def _watched(model: nn.Module, mode: _Mode) -> Iterator[None]:
    """Tell the mode which module runs, and what its neurons put out."""

    def enter(name: str, module: nn.Module, args: Any) -> None:
        mode.stack.append(name)

    def leave(neuron: bool, name: str, module: nn.Module, args: Any, out: Any) -> None:
        mode.stack.pop()
        if neuron and isinstance(out, Tensor) and out.dim() > 1:
            mode.paused = True
            _fire(mode, name, out, getattr(module, "step_mode", "m") == "s")
            mode.paused = False

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if not path:
                continue  # the stack's bottom
            name = path.replace("_orig_mod.", "")
            stack.callback(module.register_forward_pre_hook(functools.partial(enter, name)).remove)
            hook = functools.partial(leave, _is_neuron(module), name)
            stack.callback(module.register_forward_hook(hook).remove)
        if _is_neuron(model):
            hook = functools.partial(leave, True, type(model).__name__)
            stack.callback(model.register_forward_pre_hook(functools.partial(enter, type(model).__name__)).remove)
            stack.callback(model.register_forward_hook(hook).remove)
        yield


def _fire(mode: _Mode, name: str, out: Tensor, single_step: bool) -> None:
    """Sum the spikes of a layer, ``[T, B, ...]`` or ``[B, ...]`` of a single step."""
    if single_step:
        out = out.unsqueeze(0)
    each = out.sum(1, dtype=torch.float32).double()  # [T, ...]; exact, a batch is no 2^24 images
    steps, images = each.flatten(1).sum(1), out.shape[1]
    mode.tally.updates += out.numel()
    mode.tally.memory += 2 * out.numel() * max(4, out.element_size())  # potentials are float32 at least
    have = mode.tally.fired.get(name)
    total = each.sum(0)
    if have is None:
        mode.tally.fired[name] = _Fired(steps, total, out.shape[0] * images, images)
    elif single_step:
        mode.tally.fired[name] = _Fired(
            torch.cat([have.steps, steps]), have.total + total, have.frames + images, have.images
        )
    elif have.total.shape == total.shape and have.steps.shape == steps.shape:
        # A layer that ran twice has the mean of both.
        mode.tally.fired[name] = _Fired(
            have.steps + steps, have.total + total, have.frames + out.shape[0] * images, have.images + images
        )
    else:
        mode.note(_second_shape(name))


def _second_shape(name: str) -> str:
    """What is said of neurons whose second pass has other positions or time steps: the rates are of the first."""
    return f"firing rate of {name} on a second shape"


def _check_energy(**values: float | None) -> None:
    for name, value in values.items():
        wanted = "an energy in picojoule, a number >= 0; the papers take mac_pj=4.6 and sop_pj=0.9"
        number(name, value, 0, expected=wanted)


def _check_options(
    mac_pj: float, sop_pj: float, pj_per_byte: float | None, norm_ops: int, neuron_ops: bool, inputs: str
) -> None:
    _check_energy(mac_pj=mac_pj, sop_pj=sop_pj)
    if pj_per_byte is not None:
        _check_energy(pj_per_byte=pj_per_byte)
    whole("norm_ops", norm_ops, 0, expected="operations per element of a norm, an integer: 0 or 4")
    switch("neuron_ops", neuron_ops)
    if inputs not in ("auto", "analog"):
        raise ValueError(f"inputs={inputs!r}: expected 'auto' (judge the input by its values) or 'analog'.")


def _observe(model: nn.Module, batch: Tensor, inputs: str, mode: _Mode) -> _Tally:
    """Run one batch under the mode and return its sums."""
    if not isinstance(batch, Tensor):
        raise ValueError(
            f"batch is a {type(batch).__name__}: expected a tensor of images [B, C, H, W] or event frames "
            "[B, T, C, H, W]; of a loader's pair give the images, count(model, images)."
        )
    if batch.dim() < 2 or batch.numel() == 0:
        raise ValueError(
            f"batch of shape {tuple(batch.shape)}: expected at least one image with its batch axis; a single image "
            "needs x.unsqueeze(0)."
        )
    if not batch.is_floating_point():
        raise ValueError(
            f"batch of {batch.dtype}: expected floating-point images, normalised as the model takes them; give "
            "batch.float(). Whole numbers such as 0..255 would pass for spikes: then inputs='analog' too."
        )
    if batch.is_meta or any(p.is_meta for p in model.parameters()):
        raise ValueError("Model or batch is on the meta device, where there are no values: use device='cpu'.")
    mode.tally = _Tally(images=batch.shape[0])
    T = batch.shape[1] if batch.dim() == 5 else getattr(model, "T", 1)
    mode.batch, mode.T = batch.shape[0], T if isinstance(T, int) and T > 0 else 1
    mode.stack = mode.stack[:1]
    mode._signals.clear()
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # there operations would arrive undivided
        stack.enter_context(torch.no_grad())
        if batch.is_inference():
            batch = batch.clone()
        if "torch._dynamo" in sys.modules:  # compiled parts run as they were written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in training:
            module.training = False
        for module in training:
            stack.callback(setattr, module, "training", True)
        stack.enter_context(_watched(model, mode))
        mode._signals[_key(batch)] = _UNKNOWN if inputs == "auto" else _DECLARED
        stack.enter_context(mode)
        try:
            output = model(batch)
        except (RuntimeError, IndexError, AssertionError) as error:  # timm's layers assert the size
            raise ValueError(
                f"The model does not take a batch of shape {tuple(batch.shape)} and {batch.dtype}: {error}. "
                "Give a batch that model(batch) runs on."
            ) from error
    if output is None:
        raise ValueError(
            f"{type(model).__name__}.forward returned None, so what it computed may not be what it is for: let it "
            "return its output."
        )
    return mode.tally


def _finish(
    tally: _Tally,
    T: int,
    *,
    mac_pj: float,
    sop_pj: float,
    pj_per_byte: float | None,
    norm_ops: int,
    neuron_ops: bool,
) -> Count:
    """Divide sums by the number of images and price them."""
    images = tally.images
    modules: dict[str, ModuleCount] = {}
    for name, row in tally.rows.items():
        modules[name] = ModuleCount(
            ops=" + ".join(row.ops),
            input=" + ".join(row.kinds),
            macs=row.macs / images,
            macs_step=row.macs_step / images,
            macs_exact=row.macs_exact / images,
            sops_exact=row.sops_exact / images,
            macs_paper=row.macs_paper / images,
            sops_paper=row.sops_paper / images,
            rate=row.fired / row.places if row.places else None,
            calls=row.calls,
            weights=sum(numel for numel, _ in row.weights.values()),
            zero_weights=sum(zeros for _, zeros in row.weights.values()),
            silent=bool(row.spiking) and row.events == 0,
        )
    rates: dict[str, FiringRate] = {}
    for name, fired in tally.fired.items():
        neurons = fired.total.numel()
        steps = tuple((fired.steps / (neurons * fired.images)).tolist())
        rates[name] = FiringRate(
            rates=steps,
            mean=fmean(steps),
            neurons=neurons,
            silent=int((fired.total == 0).sum()),
            saturated=int((fired.total == fired.frames).sum()),
        )
    total = {
        key: sum(getattr(row, key) for row in tally.rows.values()) / images
        for key in ("macs", "macs_step", "macs_exact", "sops_exact", "macs_paper", "sops_paper", "pooling")
    }
    norms = norm_ops * tally.norm_elements / images
    neurons_cost = tally.updates / images if neuron_ops else 0.0
    extra = norms + neurons_cost
    memory = tally.memory / images
    # 1 pJ = 1e-9 mJ
    return Count(
        macs=total["macs"],
        sops_exact=total["sops_exact"],
        sops_paper=total["sops_paper"],
        energy_exact_mj=(mac_pj * (total["macs_exact"] + extra) + sop_pj * total["sops_exact"]) * 1e-9,
        energy_paper_mj=(mac_pj * (total["macs_paper"] + extra) + sop_pj * total["sops_paper"]) * 1e-9,
        firing_rates=rates,
        by_module=modules,
        uncounted=dict(tally.uncounted),
        macs_step=total["macs_step"],
        macs_exact=total["macs_exact"],
        macs_paper=total["macs_paper"],
        sops_pooling=total["pooling"],
        energy_ann_mj=mac_pj * (total["macs_step"] + norm_ops * tally.norm_step / images) * 1e-9,
        norm_ops=norms,
        neuron_ops=neurons_cost,
        memory_bytes=memory,
        energy_memory_mj=None if pj_per_byte is None else pj_per_byte * memory * 1e-9,
        images=images,
        T=T,
        mac_pj=mac_pj,
        sop_pj=sop_pj,
        pj_per_byte=pj_per_byte,
    )


def _original(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: expected a torch module, from spikezoo.create_model().")
    return getattr(model, "_orig_mod", model)


def count(
    model: nn.Module,
    batch: Tensor,
    *,
    mac_pj: float = MAC_PJ,
    sop_pj: float = SOP_PJ,
    pj_per_byte: float | None = None,
    norm_ops: int = 0,
    neuron_ops: bool = False,
    inputs: str = "auto",
) -> Count:
    """Count MACs, synaptic operations, energy and firing rates of a model, per image.

    The model runs once, in evaluation mode and without gradients, whatever modes are on around it; a compiled one as
    it was before. Weights, buffers of norms, training flags and hooks stay as they are; neurons that keep their
    membrane potential from call to call, as SpikingJelly's do, are to be reset before and after.

    Args:
        model: Any module that takes one batch.
        batch: Images ``[B, C, H, W]``, event frames ``[B, T, C, H, W]``, or what the module takes.
        mac_pj: Energy of a MAC in picojoule.
        sop_pj: Energy of a synaptic operation in picojoule.
        pj_per_byte: Energy of moving a byte in picojoule, for the column of memory traffic.
        norm_ops: Operations per element of a norm, counted as MACs in the energies; 4 gives the ticket papers'
            printed energy of ResNet-19.
        neuron_ops: Count one MAC per neuron and step for the update of its membrane potential.
        inputs: 'auto' judges by its values whether the batch is spikes; 'analog' says that it is not.

    Returns:
        The counts; see :class:`Count`.

    Raises:
        ValueError: A batch that the model does not take, a model that returns nothing, energies below zero or nan.

    Example:
        >>> print(spikezoo.count(model, images).table())
    """
    _check_options(mac_pj, sop_pj, pj_per_byte, norm_ops, neuron_ops, inputs)
    model = _original(model)
    mode = _Mode(model)
    tally = _observe(model, batch, inputs, mode)
    return _finish(
        tally,
        mode.T,
        mac_pj=mac_pj,
        sop_pj=sop_pj,
        pj_per_byte=pj_per_byte,
        norm_ops=norm_ops,
        neuron_ops=neuron_ops,
    )


SPREAD = ("macs", "sops_exact", "sops_paper", "energy_exact_mj", "energy_paper_mj")


def count_loader(
    model: nn.Module,
    loader: Iterable[Any],
    images: int = 64,
    *,
    piece: int = 1,
    mac_pj: float = MAC_PJ,
    sop_pj: float = SOP_PJ,
    pj_per_byte: float | None = None,
    norm_ops: int = 0,
    neuron_ops: bool = False,
    inputs: str = "auto",
) -> CountSummary:
    """Average counts over the first images of a loader.

    Args:
        model: The model.
        loader: Batches, or pairs of a batch and labels.
        images: How many images; fewer where the loader has fewer.
        piece: Images counted at once; 1 gives the spread between images, more is faster.
        mac_pj: See :func:`count`, as the rest.
        sop_pj: See :func:`count`.
        pj_per_byte: See :func:`count`.
        norm_ops: See :func:`count`.
        neuron_ops: See :func:`count`.
        inputs: See :func:`count`.

    Raises:
        ValueError: An empty loader, or what :func:`count` raises for.
    """
    _check_options(mac_pj, sop_pj, pj_per_byte, norm_ops, neuron_ops, inputs)
    whole("images", images)
    whole("piece", piece)
    model = _original(model)
    first = next(iter(model.parameters()), None)
    mode = _Mode(model)
    total = _Tally()
    spread: list[Count] = []
    finish = functools.partial(
        _finish, mac_pj=mac_pj, sop_pj=sop_pj, pj_per_byte=pj_per_byte, norm_ops=norm_ops, neuron_ops=neuron_ops
    )
    for item in loader:
        batch = item[0] if isinstance(item, list | tuple) and item else item
        if not isinstance(batch, Tensor) or batch.dim() == 0:
            raise ValueError(
                f"The loader gave a {type(item).__name__}: expected a tensor of images, or a pair of images and labels."
            )
        batch = batch[: images - total.images]
        for part in batch.split(piece):
            part = part if first is None else part.to(first.device)
            tally = _observe(model, part, inputs, mode)
            if len(part) == piece or not spread:
                spread.append(finish(tally, mode.T))
            total.add(tally)
        if total.images >= images:
            break
    if total.images == 0:
        raise ValueError("The loader gave no images: expected at least one batch.")
    std = {key: stdev(getattr(c, key) for c in spread) if len(spread) > 1 else math.nan for key in SPREAD}
    return CountSummary(finish(total, mode.T), std, total.images, piece)


def plot(count: Count, path: str | Path, title: str = "") -> None:
    """Draw where the operations are: a bar per module, MACs and synaptic operations, exact and paper.

    Args:
        count: What to draw.
        path: Picture file; the suffix names the format.
        title: Title of the picture.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("A picture needs matplotlib, which is not installed: pip install matplotlib") from error
    names = list(count.by_module)
    rows = list(count.by_module.values())
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    series = (
        ("SOPs, exact", -0.27, [r.sops_exact for r in rows], "#1f6f8b"),
        ("SOPs, paper", 0.0, [r.sops_paper for r in rows], "#99c1cf"),
        ("MACs on analog input", 0.27, [r.macs_exact for r in rows], "#d1603d"),
    )
    for label, shift, values, color in series:
        axes.barh([index + shift for index in range(len(names))], values, height=0.25, label=label, color=color)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("operations per image")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path)
