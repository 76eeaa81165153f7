"""Checks of what a user gave, one helper a kind: the nearest name, a choice, a whole number, a number, a switch.

Each raising check says what came, what was wanted and, of names, the nearest one: ``T=0: expected an integer >= 1.``
True and False are no numbers here although Python counts them as 1 and 0.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import TypeGuard

import torch
from torch import Tensor

__all__ = ["UnknownArgumentError", "choice", "finite", "is_number", "is_whole", "nearest", "number", "switch", "whole"]


class UnknownArgumentError(TypeError, ValueError):
    """An argument name that does not exist: a ValueError for users, the TypeError that Python and timm expect."""


def nearest(name: object, names: Iterable[str]) -> str:
    """Return the sentence that names the closest valid names to a mistyped one.

    Args:
        name: What was given.
        names: What would have been valid.
    """
    valid = sorted(names)
    # Capitals are no difference, or 't' would be nearer to 'tau' than to 'T'.
    folded = {item.lower(): item for item in valid}
    close = [folded[item] for item in difflib.get_close_matches(str(name).lower(), folded, n=3, cutoff=0.5)]
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Valid: {', '.join(valid)}."


def choice(name: str, value: object, valid: Iterable[str]) -> str:
    """Return ``value`` where it is one of the valid names.

    Args:
        name: What the user calls it.
        value: What was given.
        valid: What may be given.

    Raises:
        ValueError: Another value; the message names the nearest valid ones.
    """
    valid = list(valid)
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, valid))}.")
    if value not in valid:
        raise ValueError(f"{name}={value!r} does not exist. {nearest(value, valid)}")
    return value


def is_whole(value: object, low: int = 1, high: int | None = None) -> TypeGuard[int]:
    """Whether a value is an integer from ``low`` to ``high``, both included."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= (value if high is None else high)


def _shown(bound: int) -> str:
    width = bound.bit_length()
    return f"2**{width} - 1" if width >= 31 and bound == 2**width - 1 else str(bound)


def whole(
    name: str, value: object, low: int = 1, high: int | None = None, *, expected: str = "", hint: str = ""
) -> int:
    """Return ``value`` where it is an integer from ``low`` to ``high``, both included.

    Args:
        name: What the user calls it.
        value: What was given.
        low: Smallest valid value.
        high: Largest valid value.
        expected: What the message says was wanted, in place of the bounds.
        hint: What the message says after that.

    Raises:
        ValueError: Another value.
    """
    if not is_whole(value, low, high):
        bounds = f"an integer >= {low}" if high is None else f"an integer from {low} to {_shown(high)}"
        raise ValueError(f"{name}={value!r}: expected {expected or bounds}.{hint}")
    return value


def is_number(value: object, low: float = -math.inf, high: float = math.inf, bounds: str = "[)") -> TypeGuard[float]:
    """Whether a value is a finite number in an interval: ``'[)'``, ``'[]'`` or ``'()'``."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not -math.inf < value < math.inf:
        return False
    return (low < value if bounds[0] == "(" else low <= value) and (value <= high if bounds[1] == "]" else value < high)


def number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    bounds: str = "[)",
    *,
    expected: str = "",
    hint: str = "",
) -> float:
    """Return ``value`` where it is a finite number in an interval.

    Args:
        name: What the user calls it.
        value: What was given.
        low: Lower end.
        high: Upper end.
        bounds: Which ends belong to the interval: ``'[)'`` (the lower one), ``'[]'`` (both) or ``'()'`` (none).
        expected: What the message says was wanted, in place of the interval.
        hint: What the message says after that.

    Raises:
        ValueError: Another value.
    """
    if not is_number(value, low, high, bounds):
        within = f"a number in {bounds[0]}{low:g}, {high:g}{bounds[1]}"
        if high == math.inf:
            within = "a finite number" if low == -math.inf else f"a number >= {low:g}"
            within = "a positive number" if (low, bounds) == (0, "()") else within
        raise ValueError(f"{name}={value!r}: expected {expected or within}.{hint}")
    return value


def finite(x: Tensor, what: str = "Input") -> Tensor:
    """Return ``x`` where all its values are finite numbers: a neuron turns others into silence, unnoticed.

    Args:
        x: A batch ``[B, ...]``.
        what: What the message calls it.

    Raises:
        ValueError: NaN or infinity; the message says in how many samples, and the first.
    """
    if not all(bound.isfinite() for bound in torch.aminmax(x)):
        bad = ~x.isfinite().flatten(1).all(1)
        raise ValueError(
            f"{what} with values that are not finite in {int(bad.sum())} of {len(x)} samples, the first at "
            f"{int(bad.nonzero()[0])}: a neuron makes silence of nan, and its logits would look sound. Look for a "
            "division by zero or a damaged file: x.isfinite()."
        )
    return x


def switch(name: str, value: object) -> bool:
    """Return ``value`` where it is True or False; the text 'false' would count as true.

    Args:
        name: What the user calls it.
        value: What was given.

    Raises:
        ValueError: Another value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected True or False.")
    return value
