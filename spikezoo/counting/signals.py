"""Signals: which tensors hold spikes, followed from where they are made, or judged by their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

__all__ = [
    "ANALOG",
    "BLANK",
    "DECLARED",
    "SIGNS",
    "SPIKES",
    "UNKNOWN",
    "Events",
    "Signal",
    "common",
    "constant",
    "judge",
    "times",
]


@dataclass(frozen=True, slots=True)
class Signal:
    """What is known of a tensor that descends from the model's input.

    ``unit``: every value is a whole multiple of it; None is analog. ``spike``: the value that one spike has, so that
    mean / spike is a firing rate: averaging changes the unit and not the spike, scaling changes both. ``steps``: how
    many time steps were averaged into one. ``judge``: nothing is known; look at the values. ``signs``: comes from sign
    activations, of which every one is -1 or 1, so that the papers charge MACs for them.
    """

    unit: Fraction | None
    spike: Fraction = Fraction(1)
    steps: int = 1
    judge: bool = False
    signs: bool = False


SPIKES = Signal(Fraction(1))
SIGNS = Signal(Fraction(1), signs=True)
ANALOG = Signal(None)
UNKNOWN = Signal(None, judge=True)
DECLARED = Signal(None, steps=0)  # analog by the user's word, whatever the values
BLANK = Signal(Fraction(0))  # new zeros, which a model fills piece by piece; not yet a signal
_ENOUGH = 1024  # values that show that a tensor is analog
_LEVELS = 9  # multiples of a constant that values alone can show: those of a 3x3 average


@dataclass(frozen=True, slots=True)
class Events:
    """A tensor recognised as whole numbers of events."""

    kind: str
    signal: Signal
    signed: bool
    top: float  # the largest number of events in one value
    rounded: bool  # whether values may be off by a rounding error
    binary: bool


def judge(x: Tensor, strict: bool) -> Signal | None:
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
        return SPIKES
    if strict:
        return SPIKES if bool(((size < 1e-5) | ((size - 1).abs() < 1e-5)).all()) else None
    if bool((x == x.round()).all()):
        return SPIKES
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
            return Signal(unit if near else Fraction(smallest / part), spike=unit if near else Fraction(smallest))
    return None


def constant(x: Tensor) -> Signal:
    """What multiplying spikes by a constant tensor keeps: a mask, one scale, or whole numbers."""
    size = x.abs()
    largest = size.max().item() if x.numel() else 0.0
    if not math.isfinite(largest):
        return ANALOG
    if largest and bool(((size == 0) | (size == largest)).all()):
        return Signal(Fraction(largest), Fraction(largest))
    return SPIKES if bool((x == x.round()).all()) else ANALOG


def _weakest(signals: Sequence[Signal]) -> Signal:
    """What is left of several signals of which at least one has no unit."""
    unsure = [s for s in signals if s.unit is None]
    if all(s is DECLARED for s in unsure):
        return DECLARED
    return UNKNOWN if all(s.judge for s in unsure) else ANALOG


def _signs(signals: Sequence[Signal]) -> bool:
    return all(s.signs for s in signals)  # masked signs are ternary spikes


def common(signals: Sequence[Signal]) -> Signal:
    """The signal of a sum, a choice or a concatenation."""
    if any(s.unit is None for s in signals):
        return _weakest(signals)
    units = [s.unit for s in signals if s.unit]
    if not units:
        return SPIKES
    unit = min(units)
    if any(other % unit for other in units):
        return ANALOG
    sizes = {s.spike for s in signals if s.unit}
    return Signal(unit, sizes.pop() if len(sizes) == 1 else unit, max(s.steps for s in signals), signs=_signs(signals))


def times(a: Signal, b: Signal) -> Signal:
    """The signal of a product."""
    if a.unit is None or b.unit is None:
        return _weakest((a, b))
    return Signal(a.unit * b.unit, a.spike * b.spike, max(a.steps, b.steps), signs=_signs((a, b)))
