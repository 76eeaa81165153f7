"""Exact search: the optimum of a whole space, proven, and its Pareto front; for metrics of the architecture alone."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, groupby
from typing import Any, NamedTuple

import torch

from spikezoo.search.metrics import METRICS, find_metric, noise
from spikezoo.search.space import (
    Constraints,
    Cost,
    Net,
    Setting,
    Space,
    attention_macs,
    cost_of,
    fixed_part,
    hidden_width,
)


class Found(NamedTuple):
    """A net of a result.

    Attributes:
        net: The architecture.
        value: The metric.
        parameters: Trainable parameters.
        flops: MACs of all time steps.
        nets: How many nets of the space have the same dimension, depth, parameters and MACs; None where it was not
            counted. They differ in the order of the layers, the spread of the ratios, or in heads.
        latency_ms: Measured time of one image; None where it was not asked for.
    """

    net: Net
    value: float
    parameters: int
    flops: int
    nets: int | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        found: The best nets, the best first.
        front: The Pareto front, metric against parameters, by ascending parameters: of the whole space for analytic
            metrics, whatever window was asked for, else of the nets that the evolution scored.
        others: Parameters and metric of everything that was looked at, for the picture.
        seconds: How long the search took.
        looked_at: Nets that were scored by the evolution, or that the exact search covers.
        proven: Whether no net of the space that keeps the constraints is better.
    """

    found: list[Found]
    front: list[Found]
    others: list[tuple[int, float]]
    seconds: float
    looked_at: int
    proven: bool


@functools.lru_cache(64)
def _choices(options: tuple[float, ...], depth: int) -> list[tuple[Any, int]]:
    """Every choice for the layers whatever their order, in lexicographic order, and how many orders it has."""
    found = []
    for choice in combinations_with_replacement(sorted(options), depth):
        orders = math.factorial(depth)
        for option in set(choice):
            orders //= math.factorial(choice.count(option))
        found.append((choice, orders))
    return found


def _sums(options: tuple[Any, ...], depth: int, value: Callable[[Any], int]) -> dict[int, tuple[Any, int]]:
    """Sum over the layers -> (the most even choice that has it, how many ordered choices have it)."""
    found: dict[int, tuple[Any, int]] = {}
    worth = {option: value(option) for option in options}
    for choice, orders in _choices(options, depth):
        total = sum([worth[option] for option in choice])
        # Of two choices with the same sum the later one is the more even.
        found[total] = (choice, orders + (found[total][1] if total in found else 0))
    return found


def classes(space: Space, setting: Setting) -> Iterator[tuple[Net, Cost, int]]:
    """Classes of nets that cost the same: a member, the cost, how many nets.

    Every net of the space belongs to exactly one class: parameters and MACs depend on its dimension, its depth, the
    sum of its hidden widths and the sum of its attention products, and every multiset of ratios, and of heads, is
    enumerated. So whatever holds for all classes is proven for all nets.
    """
    for dim in space.dims:
        for depth in space.depths:
            tokens = fixed_part(dim, depth, setting)[3]
            hidden = _sums(space.mlp_ratios, depth, functools.partial(hidden_width, dim))
            attention = _sums(space.heads, depth, functools.partial(attention_macs, dim, tokens))
            for h, (ratios, ways) in hidden.items():
                for a, (heads, more) in attention.items():
                    yield Net(dim, ratios, heads), cost_of(dim, depth, h, a, setting), ways * more


def _rank(found: Found) -> tuple[Any, ...]:
    # Ties of the metric: fewer parameters, a smaller dimension, fewer layers; ratios and then heads that are more even,
    # ascending through the layers, and larger.
    net = found.net
    even = [tuple(-value for value in sorted(values)) for values in (net.mlp_ratios, net.heads)]
    return found.parameters, net.dim, net.depth, even[0], net.mlp_ratios, even[1], net.heads


def best_of(found: Iterable[Found], count: int, higher_is_better: bool) -> list[Found]:
    """The best nets; of those with the same dimension, depth and parameters only the first."""
    seen: set[tuple[int, int, int]] = set()
    best: list[Found] = []
    ordered = sorted(found, key=lambda item: item.value, reverse=higher_is_better)
    for _, equals in groupby(ordered, key=lambda item: item.value):
        for item in sorted(equals, key=_rank):
            key = (item.net.dim, item.net.depth, item.parameters)
            if key not in seen:
                seen.add(key)
                best.append(item)
            if len(best) == count:
                return best
    return best


def front_of(found: Iterable[Found], higher_is_better: bool) -> list[Found]:
    """The nets that no other beats: a better metric takes more parameters, and as good a one no fewer."""
    sign = -1 if higher_is_better else 1
    front: list[Found] = []
    for item in sorted(found, key=lambda item: (item.parameters, sign * item.value)):
        if not front or sign * item.value < sign * front[-1].value:
            front.append(item)
        elif (item.parameters, item.value) == (front[-1].parameters, front[-1].value):
            front[-1] = min(front[-1], item, key=_rank)
    return front


def cover(space: Space, metric: str, setting: Setting) -> list[Found]:
    """All classes of a space, with the metric where it is analytic, else with parameters in its place."""
    key = metric if find_metric(metric).analytic else "parameters"
    return [
        Found(net, float(getattr(price, key)), price.parameters, price.flops, nets)
        for net, price, nets in classes(space, setting)
    ]


def check_top(top: int) -> None:
    """Raise where no net is asked for."""
    if top < 1:
        raise ValueError(f"top={top}: expected at least 1.")


def keeping(covered: Sequence[Found], space: Space, constraints: Constraints) -> list[Found]:
    """The classes that keep the constraints; raises where there are none."""
    inside = [item for item in covered if constraints.allow(Cost(item.parameters, item.flops, 0))]
    if inside:
        return inside
    told = []
    for name, what in (("parameters", "parameters"), ("flops", "MACs")):
        bounds = getattr(constraints, name)
        if bounds is None:
            continue
        counts = sorted({getattr(item, name) for item in covered})
        below = max((c for c in counts if c < bounds[0]), default=None)
        above = min((c for c in counts if c > bounds[1]), default=None)
        near = " and ".join(f"{c:,}" for c in (below, above) if c is not None)
        told.append(
            f"{what} in {bounds[0]:,.0f}:{bounds[1]:,.0f} (the smallest net has {counts[0]:,}, the largest "
            f"{counts[-1]:,}; nearest to the window: {near or 'inside it'})"
        )
    raise ValueError(f"No net of the space {space.name!r} has {' and '.join(told)}. Widen the window.")


def exact(
    space: Space,
    metric: str = "flops",
    setting: Setting | None = None,
    constraints: Constraints | None = None,
    *,
    top: int = 10,
) -> Result:
    """The best nets of a whole space, proven, and its Pareto front; for analytic metrics.

    Parameters and MACs depend on the layers only through sums, so the space falls into few classes of nets of equal
    cost, which are all looked at; see ``classes``.

    Args:
        space: The nets to choose from.
        metric: flops, flops_eq or parameters.
        setting: What the nets are made for.
        constraints: Windows of parameters and MACs, and the largest latency. Latency is measured on the ``top`` best
            nets only: those that are too slow fall out, and the result is no longer proven.
        top: How many nets to return.

    Raises:
        ValueError: An unknown metric or one that needs a network, or windows that no net keeps to: the message has
            the smallest and largest counts.
    """
    setting, constraints = setting or Setting(), constraints or Constraints()
    check_top(top)
    chosen = find_metric(metric)
    if not chosen.analytic:
        analytic = ", ".join(name for name, other in METRICS.items() if other.analytic)
        raise ValueError(
            f"Exact search needs a metric that follows from the architecture ({analytic}), and {metric!r} reads a "
            "network: use the method evolution."
        )
    started = time.perf_counter()
    covered = cover(space, metric, setting)
    inside = keeping(covered, space, constraints)
    found = best_of(inside, top, chosen.higher_is_better)
    front = front_of(covered, chosen.higher_is_better)
    seconds = time.perf_counter() - started
    found = quick_enough(found, setting, constraints)
    return Result(
        found,
        front,
        [(item.parameters, item.value) for item in covered],
        seconds,
        sum(item.nets or 0 for item in covered),
        constraints.latency_ms is None,
    )


def latency_ms(net: Net, setting: Setting, repeats: int = 10) -> float:
    """Median time of one image on this machine's CPU, in milliseconds; random weights."""
    model = setting.create(net).eval()
    image = noise(setting, 1)
    times = []
    with torch.no_grad():
        for _ in range(repeats + 2):
            started = time.perf_counter()
            model(image)
            times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[2:])  # the first two warm up


def quick_enough(found: list[Found], setting: Setting, constraints: Constraints) -> list[Found]:
    """The nets that keep to the largest latency, timed where there is one; raises where none does."""
    limit = constraints.latency_ms
    if limit is None:
        return found
    timed = [item._replace(latency_ms=latency_ms(item.net, setting)) for item in found]
    kept = [item for item in timed if item.latency_ms is not None and item.latency_ms <= limit]
    if not kept:
        quickest = min(item.latency_ms or 0.0 for item in timed)
        raise ValueError(
            f"None of the {len(timed)} best nets takes at most {limit:g} ms; the quickest takes {quickest:.1f} ms. "
            "Allow more, fewer parameters, or a longer shortlist (--top)."
        )
    return kept
