"""The paper's evolution: any metric, seeded, resumable."""

from __future__ import annotations

import json
import logging
import random
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from spikezoo.checkpoint import atomic
from spikezoo.checks import number, whole
from spikezoo.search.exhaustive import Found, Result, best_of, check_top, cover, front_of, keeping, quick_enough
from spikezoo.search.metrics import find_metric, score
from spikezoo.search.space import Constraints, Net, Setting, Space, cost

_logger = logging.getLogger("spikezoo")


@dataclass(frozen=True)
class Evolution:
    """The paper's settings.

    Attributes:
        population: Nets of a generation; what mutation and crossover leave free is drawn at random.
        generations: How often the population is renewed.
        parents: The best nets so far, which mutation and crossover draw from.
        mutations: Mutated nets a generation.
        crossovers: Crossed nets a generation; between parents of equal depth, every gene from either.
        m_prob: Probability of a new ratio, and of new heads, of every layer.
        s_prob: Probability of a new depth, and of a new embedding dimension.
        seed: Of all draws, and of the weights of metrics that read a network.
    """

    population: int = 50
    generations: int = 20
    parents: int = 10
    mutations: int = 25
    crossovers: int = 25
    m_prob: float = 0.2
    s_prob: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"population": 1, "generations": 0, "parents": 1, "mutations": 0, "crossovers": 0}
        for name, low in least.items():
            whole(name, getattr(self, name), low)
        for name in ("m_prob", "s_prob"):
            number(name, getattr(self, name), 0, 1, "[]", expected="a probability, from 0 to 1")


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps({**row, "crc32": zlib.crc32(json.dumps(row).encode())}).encode()


def _row(line: bytes) -> dict[str, Any]:
    """What a line of a log says, {} where it is not as it was written."""
    try:
        row: dict[str, Any] = json.loads(line)
        stored = row.pop("crc32")
        return row if stored == zlib.crc32(json.dumps(row).encode()) else {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


class _Log:
    """Scores of an evolution, a JSON line each; the first line says which search they are of.

    A search that starts again draws the same nets and finds their scores here, so an interrupted one ends as if it
    had not been.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path = path
        self.scores: dict[Net, float] = {}
        if path is None:
            return
        header = json.loads(json.dumps(header))
        lines = (
            path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        )  # a line that was cut short does not count
        if lines:
            written = _row(lines[0])
            if not written:
                raise ValueError(f"{path} is damaged in its first line, or of an older version. Move it away.")
            changed = [key for key in {**header, **written} if header.get(key) != written.get(key)]
            if changed:
                told = ", ".join(f"{k} is {header.get(k)!r} and was {written.get(k)!r}" for k in sorted(changed))
                raise ValueError(f"{path} is of another search: {told}. Use another --output, or delete it.")
        rows = [line for line in lines[1:] if _row(line)]
        if len(rows) < len(lines) - 1:
            lost = len(lines) - 1 - len(rows)
            _logger.warning("%s: %d damaged lines are left out; their nets are scored again.", path, lost)
        for row in map(_row, rows):
            self.scores[Net(row["dim"], tuple(row["mlp_ratios"]), tuple(row["heads"]))] = row["score"]
        with atomic(path) as temporary:
            temporary.write_bytes(b"\n".join([*lines[:1], *rows] or [_line(header)]) + b"\n")

    def add(self, net: Net, value: float) -> None:
        self.scores[net] = value
        if self.path is not None:
            with open(self.path, "ab") as file:
                file.write(_line({**net._asdict(), "score": value}) + b"\n")


def random_net(space: Space, rng: random.Random) -> Net:
    """A net of the space; every gene is drawn evenly."""
    depth = rng.choice(space.depths)
    ratios = tuple(rng.choice(space.mlp_ratios) for _ in range(depth))
    heads = tuple(rng.choice(space.heads) for _ in range(depth))
    return Net(rng.choice(space.dims), ratios, heads)


def mutated(net: Net, space: Space, settings: Evolution, rng: random.Random) -> Net:
    """A net with new ratios and heads by ``m_prob``, a new depth and a new dimension by ``s_prob``."""
    dim, ratios, heads = net.dim, list(net.mlp_ratios), list(net.heads)
    if rng.random() < settings.s_prob:
        depth = rng.choice(space.depths)
        ratios = ratios[:depth] + [rng.choice(space.mlp_ratios) for _ in range(depth - len(ratios))]
        heads = heads[:depth] + [rng.choice(space.heads) for _ in range(depth - len(heads))]
    ratios = [rng.choice(space.mlp_ratios) if rng.random() < settings.m_prob else r for r in ratios]
    heads = [rng.choice(space.heads) if rng.random() < settings.m_prob else h for h in heads]
    if rng.random() < settings.s_prob:
        dim = rng.choice(space.dims)
    return Net(dim, tuple(ratios), tuple(heads))


def crossed(parents: Sequence[Net], rng: random.Random) -> Net | None:
    """A child of two parents of equal depth, or None where 50 draws found no such pair."""
    for _ in range(50):
        one, other = rng.choice(parents), rng.choice(parents)
        if one.depth == other.depth:
            ratios = tuple(rng.choice(pair) for pair in zip(one.mlp_ratios, other.mlp_ratios, strict=True))
            heads = tuple(rng.choice(pair) for pair in zip(one.heads, other.heads, strict=True))
            return Net(rng.choice((one.dim, other.dim)), ratios, heads)
    return None


RANDOM_DRAWS = 200_000  # for a generation's random nets; ends the search in a window that random nets hardly hit


class _Search:
    """The nets that were scored so far, each once, and the draws that find new ones."""

    def __init__(
        self, space: Space, setting: Setting, constraints: Constraints, settings: Evolution, possible: int
    ) -> None:
        self.space, self.setting, self.constraints, self.settings = space, setting, constraints, settings
        self.possible = possible
        self.rng = random.Random(settings.seed)
        self.visited: dict[Net, Found] = {}

    def enter(
        self, draw: Callable[[], Net | None], wanted: int, draws: int, value_of: Callable[[Net], float]
    ) -> list[Found]:
        """Score up to ``wanted`` new nets that keep the constraints."""
        new: list[Found] = []
        while len(new) < wanted and draws > 0 and len(self.visited) < self.possible:
            draws -= 1
            net = draw()
            if net is None or net in self.visited:
                continue
            price = cost(net, self.setting)
            if not self.constraints.allow(price):
                continue
            self.visited[net] = Found(net, value_of(net), price.parameters, price.flops)
            new.append(self.visited[net])
        return new

    def generation(self, parents: Sequence[Net], value_of: Callable[[Net], float]) -> list[Found]:
        """Mutated, crossed and random nets; without parents random ones only."""
        settings, space, rng = self.settings, self.space, self.rng
        new: list[Found] = []
        if parents:
            mutations, crossovers = settings.mutations, settings.crossovers
            new += self.enter(
                lambda: mutated(rng.choice(parents), space, settings, rng), mutations, 10 * mutations, value_of
            )
            new += self.enter(lambda: crossed(parents, rng), crossovers, 10 * crossovers, value_of)
        new += self.enter(lambda: random_net(space, rng), settings.population - len(new), RANDOM_DRAWS, value_of)
        return new


def evolve(
    space: Space,
    metric: str = "flops",
    setting: Setting | None = None,
    constraints: Constraints | None = None,
    *,
    settings: Evolution | None = None,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    top: int = 10,
    log: str | Path | None = None,
    progress: bool = False,
) -> Result:
    """The paper's evolution: select, mutate, cross, fill with random nets; never the same net twice.

    Args:
        space: The nets to choose from.
        metric: A name of :data:`METRICS`.
        setting: What the nets are made for.
        constraints: Windows of parameters and MACs, and the largest latency, which is measured on the ``top`` best
            nets only.
        settings: The paper's, where None.
        images: Images for metrics that read a network; None takes noise.
        labels: Their labels, for SNIP; None takes the classes in turn.
        top: How many nets to return.
        log: JSON lines of all scores. An interrupted search that is started again with the same arguments goes on
            from it and ends with the same result.
        progress: Show a progress bar.

    Raises:
        ValueError: An unknown metric; windows that no net keeps to; a log of another search.
    """
    setting, constraints, settings = setting or Setting(), constraints or Constraints(), settings or Evolution()
    check_top(top)
    chosen = find_metric(metric)
    started = time.perf_counter()
    covered = cover(space, metric, setting)
    possible = sum(item.nets or 0 for item in keeping(covered, space, constraints))
    seen = "noise" if images is None else [len(images), float(images.double().sum())]
    header = {
        "space": asdict(space),
        "metric": metric,
        "setting": asdict(setting),
        "parameters": constraints.parameters,
        "flops": constraints.flops,
        "evolution": asdict(settings),
        "images": None if chosen.analytic else seen,
    }
    book = _Log(None if log is None else Path(log), header)

    def value_of(net: Net) -> float:
        if net not in book.scores:
            book.add(net, score(net, metric, setting, images=images, labels=labels, seed=settings.seed))
        return book.scores[net]

    search = _Search(space, setting, constraints, settings, possible)
    fresh = search.generation([], value_of)
    if not fresh:
        raise ValueError(
            f"{RANDOM_DRAWS:,} random nets of the space {space.name!r} all missed the window, which {possible:,} of "
            f"{space.size:,} nets hit. Widen it, or use exact search."
        )
    sign = -1 if chosen.higher_is_better else 1
    best: list[Found] = []
    with tqdm(total=settings.generations, desc="evolve", disable=not progress, leave=False) as bar:
        for _ in range(settings.generations):
            best = sorted([*best, *fresh], key=lambda item: sign * item.value)[: settings.parents]
            fresh = search.generation([item.net for item in best], value_of)
            bar.set_postfix(best=f"{best[0].value:.6g}", nets=len(search.visited))
            bar.update()
    looked_at = covered if chosen.analytic else list(search.visited.values())
    seconds = time.perf_counter() - started
    return Result(
        quick_enough(best_of(search.visited.values(), top, chosen.higher_is_better), setting, constraints),
        front_of(looked_at, chosen.higher_is_better),
        [(item.parameters, item.value) for item in looked_at],
        seconds,
        len(search.visited),
        False,
    )
