"""Rules: what each operation does, in operations and to spikes; and what is free by convention."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spikezoo.counting.observer import Call, Observer, tensors
from spikezoo.counting.signals import ANALOG, SIGNS, SPIKES, UNKNOWN, Events, Signal, times

__all__ = ["NORMS", "TABLE", "Rule", "register"]

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


def _stretch(value: int | Sequence[int], dims: int) -> list[int]:
    """Spread torch's one-number-for-all-axes."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


# --------------------------------------------------------------------------------------------------------------
# The table: rules, and what is free by convention
# --------------------------------------------------------------------------------------------------------------

# A rule counts what an operation does and returns the signal of its output; a flow only returns that signal.
Rule = Callable[[Observer, Call], Signal]
TABLE: dict[str, tuple[str, Rule]] = {}


def register(kind: str, names: str) -> Callable[[Rule], Rule]:
    """Enter a function in the table for operations, of aten unless said; a name that is there already raises."""

    def enter(rule: Rule) -> Rule:
        for name in names.split():
            full = name if "." in name else f"aten.{name}"
            if full in TABLE:
                raise ValueError(f"Operation {full} has a rule already: two would hide one another.")
            TABLE[full] = (kind, rule)
        return rule

    return enter


@register(
    "free",
    "exp log log1p expm1 sqrt rsqrt reciprocal pow square sigmoid tanh gelu silu mish elu leaky_relu prelu softplus "
    "hardtanh hardsigmoid hardswish sin cos atan erf addcmul addcdiv lerp native_batch_norm cudnn_batch_norm "
    "miopen_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_no_update "
    "_batch_norm_with_update batch_norm_with_update native_layer_norm native_group_norm var var_mean std std_mean "
    "linalg_vector_norm norm",
)
def _analog(observer: Observer, call: Call) -> Signal:
    return ANALOG


@register(
    "free",
    "gt ge lt le eq ne logical_and logical_or logical_not logical_xor isnan isinf isfinite round floor ceil "
    "trunc heaviside bernoulli bitwise_and bitwise_or bitwise_xor bitwise_not any all argmax argmin one_hot __and__ "
    "__or__ __xor__ spikezoo.top_mask spikezoo.poisson spikezoo.ttfs",
)
def _whole(observer: Observer, call: Call) -> Signal:
    return SPIKES


@register("free", "sign sgn")
def _sign(observer: Observer, call: Call) -> Signal:
    return SIGNS if call.args[0].dtype.is_floating_point else SPIKES


@register(
    "free",
    "clone _to_copy relu abs neg roll flip repeat repeat_interleave masked_select _unsafe_view pixel_shuffle "
    "pixel_unshuffle upsample_nearest1d upsample_nearest2d upsample_nearest3d amax amin max min maximum minimum cat "
    "stack select_scatter slice_scatter channel_shuffle native_channel_shuffle im2col unfold_copy detach_copy "
    "view_copy reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d tril triu topk cumsum",
)
def _kept(observer: Observer, call: Call) -> Signal:
    return observer.common(list(tensors(call.args)))


@register("free", "index _unsafe_index index_select gather take")
def _picked(observer: Observer, call: Call) -> Signal:
    return observer.signal(call.args[0])  # the rest are positions


@register("free", "copy")
def _written(observer: Observer, call: Call) -> Signal:
    return observer.signal(call.args[1])


@register("free", "index_put scatter")
def _inserted(observer: Observer, call: Call) -> Signal:
    return observer.common([call.args[0], call.args[2 if "index_put" in call.name else 3]])


@register("free", "where")
def _chosen(observer: Observer, call: Call) -> Signal:
    return observer.common(call.args[1:3])


@register("free", "add sub rsub fmod remainder")
def _summed(observer: Observer, call: Call) -> Signal:
    alpha = call.kwargs.get("alpha", call.args[2] if len(call.args) > 2 else 1)
    return observer.common(call.args[:2]) if alpha == 1 else ANALOG


@register("free", "clamp clamp_min clamp_max constant_pad_nd masked_fill fill threshold")
def _bounded(observer: Observer, call: Call) -> Signal:
    # Bounds and fillings are values that the output may take.
    numbers = [a for a in (*call.args[1:], *call.kwargs.values()) if isinstance(a, int | float)]
    others = [a for a in call.args[1:] if isinstance(a, Tensor) and a.dtype is not torch.bool]
    return observer.common([call.args[0], *others, *numbers])


@register("free", "mul div")
def _scaled(observer: Observer, call: Call) -> Signal:
    if call.kwargs.get("rounding_mode"):
        return SPIKES
    if any(observer.live(a) and observer.signal(a) == ANALOG for a in call.args[:2]):
        return ANALOG  # without a look at the values of the other
    first, second = observer.signal(call.args[0]), observer.signal(call.args[1])
    if call.name.startswith("aten::div"):
        by = call.args[1]
        if not second.unit or (isinstance(by, Tensor) and (by.numel() > 1 or observer.live(by))):
            return ANALOG
        second = Signal(1 / second.unit, 1 / second.unit)
    return times(first, second)


@register("free", "native_dropout dropout _fused_dropout")
def _dropped(observer: Observer, call: Call) -> Signal:
    return UNKNOWN


@register("free", "sum mean")
def _averaged(observer: Observer, call: Call) -> Signal:
    x = call.args[0]
    given = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    along: Sequence[int] = [given] if isinstance(given, int) else given or range(x.dim())
    dims = [d % max(x.dim(), 1) for d in along]
    merged = math.prod(x.shape[d] for d in dims)
    signal = observer.signal(x)
    events = observer.events(x) if merged > 1 else None
    if events is not None:
        observer.pooling(call, events, observer.rows(x, events, (0,)).sum())
        signal = events.signal
    if call.name == "aten::sum" or signal.unit is None:
        return signal
    # The mean of [T, B, ...] over its first axis is a mean over time.
    steps = x.shape[0] if dims == [0] and x.dim() > 1 and x.shape[1] == observer.batch else 1
    return Signal(signal.unit / merged, signal.spike, signal.steps * steps, signs=signal.signs)


@register("free", "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices")
def _max_pool(observer: Observer, call: Call) -> Signal:
    x, kernel = call.args[:2]
    stride, padding, dilation = (
        call.args[i] if len(call.args) > i else default for i, default in ((2, ()), (3, 0), (4, 1))
    )
    events = observer.events(x)
    if events is None:
        return observer.signal(x)
    _pool(observer, call, x, call.out[0], _dims(call), events, kernel, stride, padding, dilation)
    return events.signal


@register("free", "avg_pool1d avg_pool2d avg_pool3d")
def _avg_pool(observer: Observer, call: Call) -> Signal:
    given = dict(zip(("x", "kernel", "stride", "padding", "ceil", "include", "divisor"), call.args, strict=False))
    x, dims = given["x"], _dims(call)
    events = observer.events(x)
    if events is None:
        return observer.signal(x)
    kernel = _stretch(given["kernel"], dims)
    stride = _stretch(given.get("stride") or kernel, dims)
    padding = _stretch(given.get("padding", 0), dims)
    include = given.get("include", call.kwargs.get("count_include_pad", True))
    divisor = given.get("divisor", call.kwargs.get("divisor_override"))
    _pool(observer, call, x, call.out, dims, events, kernel, stride, padding, 1)
    if not divisor:
        places = _positions(call.out, dims)
        low, high = (0, 0) if not include else (1, 1)  # how much of the padding a window may cover
        windows = [
            {min(o * s - p + k, size + high * p) - max(o * s - p, -low * p) for o in range(places[axis])}
            for axis, (size, k, s, p) in enumerate(
                zip(_positions(x, dims), kernel, stride, padding, strict=True),
            )
        ]
        if any(len(lengths) > 1 for lengths in windows):
            return ANALOG
        divisor = math.prod(lengths.pop() for lengths in windows)
    signal = events.signal
    return Signal(signal.unit / divisor if signal.unit else signal.unit, signal.spike, signal.steps, signs=signal.signs)


@register("free", "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d")
def _adaptive_pool(observer: Observer, call: Call) -> Signal:
    x, dims = call.args[0], _dims(call)
    y = call.out[0] if isinstance(call.out, tuple) else call.out
    events = observer.events(x)
    if events is None:
        return observer.signal(x)
    lengths = []
    cover = torch.ones((), dtype=torch.float64)
    for size, n in zip(_positions(x, dims), _positions(y, dims), strict=True):
        line = torch.zeros(size, dtype=torch.float64)
        ends = [(o * size // n, -(-(o + 1) * size // n)) for o in range(n)]
        for start, end in ends:
            line[start:end] += 1
        lengths.append({end - start for start, end in ends})
        cover = cover[..., None] * line
    rows = observer.rows(x, events, tuple(range(x.dim() - dims)))
    observer.pooling(call, events, (rows * cover.to(rows.device)).sum())
    if "max" in call.name:
        return events.signal
    if any(len(sizes) > 1 for sizes in lengths):
        return ANALOG
    signal = events.signal
    divisor = math.prod(sizes.pop() for sizes in lengths)
    return Signal(signal.unit / divisor if signal.unit else signal.unit, signal.spike, signal.steps, signs=signal.signs)


def _dims(call: Call) -> int:
    """Spatial axes of a pooling operation, from its name."""
    return next(n for n in (1, 2, 3) if f"{n}d" in call.name)


def _positions(x: Tensor, dims: int) -> Sequence[int]:
    return x.shape[x.dim() - dims :]


def _pool(
    observer: Observer,
    call: Call,
    x: Tensor,
    out: Tensor,
    dims: int,
    events: Events,
    kernel: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> None:
    """Count events times the windows that cover them."""
    kernel = _stretch(kernel, dims)
    ways = (_stretch(value, dims) for value in (stride or kernel, padding, dilation))
    axes = zip(_positions(x, dims), _positions(out, dims), kernel, *ways, strict=True)
    cover = torch.ones((), dtype=torch.float64)
    for axis in axes:
        cover = cover[..., None] * _reach(*axis).sum(0)
    rows = observer.rows(x, events, tuple(range(x.dim() - dims)))
    observer.pooling(call, events, (rows * cover.to(rows.device)).sum())


@register("product", "convolution")
def _convolution(observer: Observer, call: Call) -> Signal:
    x, w = call.args[0], call.args[1]
    macs = _handles().conv_flop_count(list(x.shape), list(w.shape), list(call.out.shape), transposed=call.args[6])
    observer.compare(call, macs)
    if not observer.live(x):
        return observer.idle(call)
    events = observer.events(x)
    if events is None:
        observer.analog(call, w, macs, macs // w.numel(), x.shape[0])
        return ANALOG
    size, positions = x.shape[2:], call.out.shape[2:]
    fan_out = observer.fact(
        w, ("fan-out", size, positions, str(call.args[3:9])), lambda: _fan_out(w, size, positions, call.args[3:9])
    )
    rows = observer.rows(x, events, (0,))
    observer.spiking(call, x, events, macs, rows.sum(), (rows * fan_out).sum(), x.shape[0], w)
    return ANALOG


@register("product", "mm addmm bmm baddbmm mv addmv dot")
def _product(observer: Observer, call: Call) -> Signal:
    a, b = call.args[1:3] if call.name.startswith(("aten::add", "aten::badd")) else call.args[:2]
    one_a, one_b = a, b  # as [batch, m, k] and [batch, k, n], views of the same storage
    if a.dim() < 3:
        one_a = a.reshape(1, -1, a.shape[-1])
        one_b = b.reshape(1, b.shape[0], -1)
    macs = _handles().matmul_flop_jit([_Shape(one_a), _Shape(one_b)], [_Shape(call.out)])
    observer.compare(call, macs)
    live_a, live_b = observer.live(a), observer.live(b)
    if not (live_a or live_b):
        signal = observer.idle(call)
        return ANALOG if observer.live(call.args[0]) else signal  # what it was added to
    batch, m, _ = one_a.shape
    n = one_b.shape[2]
    frames = batch if batch > 1 else (m if live_a else n)
    events_a = observer.events(a) if live_a else None
    events_b = observer.events(b) if live_b else None
    if live_a and live_b:
        if events_a is None and events_b is None:
            observer.analog(call, None, macs, 0, frames)
            return ANALOG
        # Either the events of the other operand, or its non-zero values, are what an event meets.
        rows_a = observer.rows(one_a, events_a, (1,)) if events_a else (one_a != 0).double().sum(1)
        rows_b = observer.rows(one_b, events_b, (2,)) if events_b else (one_b != 0).double().sum(2)
        total = (rows_a * rows_b).sum()
        if events_b is not None and (events_a is None or (events_b.binary and not events_a.binary)):
            observer.spiking(call, b, events_b, macs, rows_b.sum(), total, frames, None, events_a)
        elif events_a is not None:
            observer.spiking(call, a, events_a, macs, rows_a.sum(), total, frames, None, events_b)
        return times(events_a.signal, events_b.signal) if events_a and events_b else ANALOG
    x, w, events = (a, b, events_a) if live_a else (b, a, events_b)
    if events is None:
        observer.analog(call, w, macs, m if live_a else n, frames)
        return ANALOG
    if live_a:
        fan_out = observer.fact(w, "fan-out of rows", lambda: (one_b != 0).double().sum(2))
        rows = observer.rows(one_a, events, (1,))
    else:
        fan_out = observer.fact(w, "fan-out of columns", lambda: (one_a != 0).double().sum(1))
        rows = observer.rows(one_b, events, (2,))
    observer.spiking(call, x, events, macs, rows.sum(), (rows * fan_out).sum(), frames, w)
    return ANALOG


# Names of norms begin so.
NORMS = ("native_batch_norm", "_batch_norm", "batch_norm_with", "native_layer_norm", "native_group_norm")


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
def _handles() -> ModuleType:
    """The formulas of fvcore; imported late, since its focal loss uses the deprecated torch.jit.script."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import jit_handles
    return jit_handles
