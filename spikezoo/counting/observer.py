"""The observer: sums a forward pass module by module, and keeps what is known of its tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from spikezoo.counting.results import FiringRate, ModuleCount
from spikezoo.counting.signals import ANALOG, BLANK, DECLARED, SPIKES, UNKNOWN, Events, Signal, common, constant, judge

__all__ = ["Call", "Fired", "Observer", "Row", "Tally", "tensors"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One operation that ran, with what it took and put out."""

    func: OpOverload
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    out: Any

    @property
    def name(self) -> str:
        """Its name with namespace and without overload, such as 'aten::add'."""
        return self.func._schema.name


@dataclass
class Frames:
    """Sums of the operations of one pass that saw one number of frames, which shows how many time steps at its end."""

    calls: int = 0
    macs: int = 0
    weight_bytes: int = 0
    norm_elements: int = 0


@dataclass
class Row:
    """Sums of one module over all images."""

    ops: dict[str, None] = field(default_factory=dict)  # an ordered set
    kinds: dict[str, None] = field(default_factory=dict)
    macs: int = 0
    macs_step: float = 0.0
    frames: dict[int, Frames] = field(default_factory=dict)  # frames at once -> what operations on so many did
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
    weights: dict[Hashable, tuple[int, int]] = field(default_factory=dict)  # storage -> numel, zeros

    def add(self, other: Row) -> None:
        """Add the sums of more images."""
        for key in ("ops", "kinds", "weights"):
            getattr(self, key).update(getattr(other, key))
        for key in (
            "macs", "macs_step", "macs_exact", "sops_exact", "macs_paper", "sops_paper", "pooling", "fired", "places",
            "events", "spiking",
        ):  # fmt: skip
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.calls = max(self.calls, other.calls)

    def result(self, images: int) -> ModuleCount:
        """Divide by the number of images."""
        return ModuleCount(
            ops=" + ".join(self.ops),
            input=" + ".join(self.kinds),
            macs=self.macs / images,
            macs_step=self.macs_step / images,
            macs_exact=self.macs_exact / images,
            sops_exact=self.sops_exact / images,
            macs_paper=self.macs_paper / images,
            sops_paper=self.sops_paper / images,
            rate=self.fired / self.places if self.places else None,
            calls=self.calls,
            weights=sum(numel for numel, _ in self.weights.values()),
            zero_weights=sum(zeros for _, zeros in self.weights.values()),
            silent=bool(self.spiking) and self.events == 0,
        )


@dataclass
class Fired:
    """Sums of one layer of neurons over all images."""

    steps: Tensor  # spikes of each step
    total: Tensor  # spikes of each neuron
    frames: int  # how often each neuron could fire
    images: int  # how many times B

    def like(self, other: Fired) -> bool:
        """Whether both are of the same neurons and time steps."""
        return self.total.shape == other.total.shape and self.steps.shape == other.steps.shape

    def plus(self, other: Fired) -> Fired:
        """The sums of both, of which each saw all time steps."""
        return Fired(
            self.steps + other.steps, self.total + other.total, self.frames + other.frames, self.images + other.images
        )

    def then(self, step: Fired) -> Fired:
        """The sums with those of the next time steps."""
        return Fired(
            torch.cat([self.steps, step.steps]), self.total + step.total, self.frames + step.frames, self.images
        )

    def result(self) -> FiringRate:
        """Divide by the numbers of neurons and images."""
        neurons = self.total.numel()
        steps = tuple((self.steps / (neurons * self.images)).tolist())
        return FiringRate(
            rates=steps,
            mean=fmean(steps),
            neurons=neurons,
            silent=int((self.total == 0).sum()),
            saturated=int((self.total == self.frames).sum()),
        )


@dataclass
class Tally:
    """Everything summed over images."""

    rows: dict[str, Row] = field(default_factory=dict)
    fired: dict[str, Fired] = field(default_factory=dict)
    uncounted: dict[str, int] = field(default_factory=dict)
    images: int = 0
    norm_elements: int = 0
    norm_step: float = 0.0
    updates: int = 0
    memory: float = 0.0

    def note(self, what: str) -> None:
        """List what has no number."""
        self.uncounted[what] = self.uncounted.get(what, 0) + 1

    def fire(self, name: str, fired: Fired) -> None:
        """Add spikes of a layer; of one that ran twice both count, so that it has the mean rate."""
        have = self.fired.get(name)
        if have is None:
            self.fired[name] = fired
        elif have.like(fired):
            self.fired[name] = have.plus(fired)
        else:  # the rates are of the first
            self.note(f"firing rate of {name} on a second shape")

    def add(self, other: Tally) -> None:
        """Add the sums of more images."""
        for name, row in other.rows.items():
            self.rows.setdefault(name, Row()).add(row)
        for name, fired in other.fired.items():
            self.fire(name, fired)
        for name, calls in other.uncounted.items():
            self.uncounted[name] = max(self.uncounted.get(name, 0), calls)
        for key in ("images", "norm_elements", "norm_step", "updates", "memory"):
            setattr(self, key, getattr(self, key) + getattr(other, key))


class Observer:
    """Sums forward passes of one model, operation by operation.

    Records are kept by storage, which all views of a tensor share: where a storage is freed and its address used
    again, the operation that made the new tensor has replaced the record.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tally = Tally()
        self.batch = self.T = 1
        self.stack: list[str] = [type(model).__name__]  # modules that are running, the model first
        self._signals: dict[int, Signal] = {}
        self._facts: dict[Hashable, Any] = {}
        self._lasting = {address(t) for t in itertools.chain(model.parameters(), model.buffers())}

    def begin(self, batch: Tensor, inputs: str, T: int) -> None:
        """Start new sums: forget all tensors but the model's, and hold ``batch`` for its input."""
        self.tally = Tally(images=batch.shape[0])
        self.batch, self.T = batch.shape[0], T
        self._leading = tuple(batch.shape[:2])
        self._clock = ""
        del self.stack[1:]
        self._signals = {address(batch): UNKNOWN if inputs == "auto" else DECLARED}

    def fire(self, name: str, out: Tensor, single_step: bool) -> None:
        """Sum the spikes of a layer, ``[T, B, ...]`` or ``[B, ...]`` of a single step."""
        self._set_clock(out, single_step)
        if single_step:
            out = out.unsqueeze(0)
        each = out.sum(1, dtype=torch.float32).double()  # [T, ...]; exact, a batch is no 2^24 images
        fired = Fired(each.flatten(1).sum(1), each.sum(0), out.shape[0] * out.shape[1], out.shape[1])
        self.tally.updates += out.numel()
        self.tally.memory += 2 * out.numel() * max(4, out.element_size())  # potentials are float32 at least
        have = self.tally.fired.get(name) if single_step else None
        if have is None:
            self.tally.fire(name, fired)
        else:
            self.tally.fired[name] = have.then(fired)

    # ---------------------------------------------------------------------------------------- what tensors are

    def live(self, x: object) -> bool:
        """Whether a tensor descends from the model's input."""
        return isinstance(x, Tensor) and self._signals.get(address(x), BLANK) is not BLANK

    def signal(self, x: Tensor | float) -> Signal:
        """What is known of a tensor or number; a constant tensor is judged by its values."""
        if not isinstance(x, Tensor):
            return Signal(abs(Fraction(x)), abs(Fraction(x))) if math.isfinite(x) else ANALOG
        found = self._signals.get(address(x))
        if found is not None:
            return found
        if x.dtype is torch.bool:
            return SPIKES
        if x.numel() == 1:
            return self.signal(x.item())
        return self.fact(x, "signal", lambda: constant(x))

    def common(self, values: Sequence[Tensor | float]) -> Signal:
        """The signal of a sum; constants are looked at only where everything else is known to be spikes."""
        live = [self.signal(v) for v in values if isinstance(v, Tensor) and address(v) in self._signals]
        if any(s.unit is None for s in live):
            return common(live)
        return common([*live, *(self.signal(v) for v in values if not isinstance(v, Tensor) or not self.held(v))])

    def held(self, x: Tensor) -> bool:
        """Whether a tensor has a record."""
        return address(x) in self._signals

    def fact(self, w: Tensor, what: Hashable, find: Callable[[], T]) -> T:
        """Something about a weight, found once for parameters and buffers, each time for computed ones."""
        if address(w) not in self._lasting:
            return find()
        key = (w.data_ptr(), w.shape, w.stride(), what)
        if key not in self._facts:
            self._facts[key] = find()
        return self._facts[key]

    def events(self, x: Tensor) -> Events | None:
        """Read a tensor as whole numbers of events; None is analog."""
        signal = self.signal(x)
        if signal is DECLARED:
            return None
        judged = signal.unit is None
        if judged:
            found = judge(x, strict=not signal.judge)
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
            signal = SPIKES
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
        return Events(kind, signal, low < 0, top, judged, signal.unit == signal.spike and top <= 1)

    def rows(self, x: Tensor, events: Events, dims: tuple[int, ...]) -> Tensor:
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

    def _row(self, call: Call, w: Tensor | None, kind: str) -> Row:
        row = self.tally.rows.setdefault(self.stack[-1], Row())
        row.ops[call.name.removeprefix("aten::").removesuffix("_with_indices")] = None
        row.kinds[kind] = None
        row.calls += 1
        if w is not None:
            alive = self.fact(w, "alive", lambda: int(torch.count_nonzero(w)))
            key = w.data_ptr() if address(w) in self._lasting else (tuple(w.shape), row.calls)
            row.weights[key] = (w.numel(), w.numel() - alive)
        return row

    def _set_clock(self, out: Tensor, single_step: bool) -> None:
        """See from the first neurons where time is: models take ``[B, C, ...]``, ``[B, T, ...]`` or ``[T, B, ...]``.

        What neurons put out is ``[T, B, ...]``, and ``[B, ...]`` at each of the calls of a single step.
        """
        if self._clock:
            return
        self._clock = "calls" if single_step else "axis"
        first, second = self._leading
        if single_step:
            self.batch = second if out.shape[0] == second != first else first
        elif out.shape[1] == first:
            self.T, self.batch = out.shape[0], first
        elif out.shape[:2] == (first, second):
            self.T, self.batch = first, second

    def dense(self, macs: int, frames: int, w: Tensor | None = None, norm_elements: int = 0) -> None:
        """Note the dense MACs, or the elements of a norm, of an operation of the module that is running."""
        sums = self.tally.rows.setdefault(self.stack[-1], Row()).frames.setdefault(frames, Frames())
        sums.calls += 1
        sums.macs += macs
        sums.weight_bytes += 0 if w is None else w.numel() * w.element_size()
        sums.norm_elements += norm_elements

    def end(self) -> Tally:
        """Return the sums of the pass, with the share of one time step.

        Layers see T*B frames, or T times B in a loop; the stem of an image, and the head on a time mean, see B.
        """
        tally = self.tally
        if self._clock == "calls":
            self.T = max(len(fired.steps) for fired in tally.fired.values())
        tally.images = self.batch
        for name, row in list(tally.rows.items()):
            for frames, sums in row.frames.items():
                at_once = self.T if self.T > 1 and frames % (self.T * self.batch) == 0 else 1
                looped = at_once == 1 and self._clock == "calls" and sums.calls % self.T == 0
                steps = self.T if looped else at_once
                row.macs += sums.macs
                row.macs_step += sums.macs / steps
                tally.memory += sums.weight_bytes * at_once * self.batch
                tally.norm_elements += sums.norm_elements
                tally.norm_step += sums.norm_elements / steps
            row.frames.clear()
            if not row.calls:  # norms are free by convention, and have no row
                del tally.rows[name]
        return tally

    def analog(self, call: Call, w: Tensor | None, macs: int, positions: int, frames: int) -> None:
        """Count an operation on analog input, whose every weight meets ``positions`` values."""
        needed, additions = macs, False
        if w is not None:
            alive = self.fact(w, "alive", lambda: int(torch.count_nonzero(w)))
            needed = alive * positions
            additions = alive > 1 and self.fact(w, "binary", lambda: _is_binary(w))
        row = self._row(call, w, "analog x binary weights" if additions else "analog")
        self.dense(macs, frames, w)
        row.macs_paper += macs
        if additions:
            row.sops_exact += needed
        else:
            row.macs_exact += needed

    def spiking(
        self,
        call: Call,
        x: Tensor,
        events: Events,
        macs: int,
        arrived: Tensor,
        total: Tensor,
        frames: int,
        w: Tensor | None,
        other: Events | None = None,
    ) -> None:
        """Count an operation on spikes: ``arrived`` events and ``total`` synaptic operations."""
        kind = events.kind if w is not None else f"{events.kind} x {other.kind if other else 'analog'}"
        row = self._row(call, w, kind)
        self.dense(macs, frames, w)
        rate = self._rate(row, x, events, arrived)
        row.sops_exact += _integer(total)
        if events.signal.signs and events.signed:
            row.macs_paper += macs
        else:
            row.sops_paper += rate * macs * events.signal.steps

    def pooling(self, call: Call, events: Events, total: Tensor) -> None:
        """Count a pooling of spikes."""
        row = self._row(call, None, events.kind)
        operations = _integer(total)
        row.spiking = True
        row.events += operations
        row.sops_exact += operations
        row.pooling += operations

    def _rate(self, row: Row, x: Tensor, events: Events, arrived: Tensor) -> float:
        assert events.signal.unit is not None
        spikes = _integer(arrived)
        fired = spikes * float(events.signal.unit / events.signal.spike)
        row.spiking = True
        row.events += spikes
        row.fired += fired
        row.places += x.numel()
        return fired / x.numel()

    def idle(self, call: Call) -> Signal:
        """Note a product that no image takes part in; it is done once, for any number of images."""
        self.tally.note(f"{call.func} on weights only")
        return BLANK

    def create(self, out: Tensor) -> None:
        """Keep new memory apart from constants, until a model has filled it."""
        self._signals[address(out)] = BLANK

    def record(self, out: Tensor, signal: Signal, writes: bool) -> None:
        """Keep what is known of an operation's output; ``writes`` where that is memory which was there before."""
        key = address(out)
        if signal is not BLANK:
            before = self._signals.get(key) if writes else None
            if before is not None and out.numel() * out.element_size() < out.untyped_storage().nbytes():
                signal = common([before, signal])  # a part was written, the rest holds what it held
            elif before is None and writes and out.numel() * out.element_size() < out.untyped_storage().nbytes():
                signal = ANALOG
            self._signals[key] = signal
        elif not (writes and self._signals.get(key, BLANK) is not BLANK):
            self._signals.pop(key, None)  # a constant

    def compare(self, call: Call, macs: int) -> None:
        """Hold fvcore's MACs against torch's own counter."""
        formula = flop_registry.get(call.func._overloadpacket)
        if formula is not None and (flops := formula(*call.args, **call.kwargs, out_val=call.out)) != 2 * macs:
            self.tally.note(f"{call.func}: {macs} MACs by fvcore, {flops // 2} by torch")


def address(x: Tensor) -> int:
    """The address of a tensor's memory."""
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else 0


def _integer(x: Tensor) -> int:
    return round(x.item())


def _is_binary(w: Tensor) -> bool:
    """Whether the weights are -c, 0 and +c."""
    size = w.detach().abs()
    return bool(((size == 0) | (size == size.max())).all())


def tensors(args: Iterable[object]) -> Iterator[Tensor]:
    """The tensors among arguments, lists of them included."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from tensors(arg)
