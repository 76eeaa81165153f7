"""Rows of a plan: what its YAML says, every combination a run, with the paper's numbers and where it prints them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikezoo.checks import is_number, nearest
from spikezoo.config_files import read_yaml

__all__ = ["REFERENCE", "PlanRow", "read_rows", "share_out"]

REFERENCE = "run:"  # in front of the name of another run of the plan, in place of the folder that it writes


@dataclass(frozen=True)
class PlanRow:
    """One run of a plan, as the YAML says it.

    Attributes:
        name: Of the run, and its folder.
        row: Name of the row that it comes from.
        where: What messages call the row.
        source: Config of the row.
        settings: Flags by name, over those of the config.
        paper: The paper's numbers, by column of results.csv.
        cell: Row and column of the paper's table that they stand in.
    """

    name: str
    row: str
    where: str
    source: Path | None
    settings: dict[str, Any]
    paper: dict[str, float] = field(default_factory=dict)
    cell: tuple[str, str] | None = None

    @property
    def after(self) -> list[str]:
        """Names of the runs that this one starts from."""
        values = [value for value in self.settings.values() if isinstance(value, str)]
        return [value.removeprefix(REFERENCE) for value in values if value.startswith(REFERENCE)]

    def placed(self, folder: Path) -> dict[str, Any]:
        """The settings with the folders of other runs in place of their names."""

        def place(key: str, value: object) -> object:
            if not isinstance(value, str) or not value.startswith(REFERENCE):
                return value
            path = str(folder / value.removeprefix(REFERENCE))
            return f"local-dir:{path}" if key == "teacher" else path

        return {key: place(key, value) for key, value in self.settings.items()}


def _paper(value: Any, where: str) -> tuple[dict[str, float], tuple[str, str] | None]:
    """What ``paper:`` says: a number is top1; a mapping has measures, and ``at`` the row and column of a table."""
    numbers = dict(value) if isinstance(value, Mapping) else {} if value is None else {"top1": value}
    cell = numbers.pop("at", None)
    placed = isinstance(cell, list) and len(cell) == 2 and all(isinstance(part, str) for part in cell)
    if not all(isinstance(key, str) and is_number(number) for key, number in numbers.items()) or not (
        cell is None or placed
    ):
        raise ValueError(
            f"{where}: paper={value!r}, expected a number, or for instance {{at: [VGG-9, SNN], top1: 85.3}}."
        )
    return numbers, (cell[0], cell[1]) if placed else None


def _label(key: object, value: object) -> str:
    """What a name says of a value of the grid: the flag and the value, of another run its name alone."""
    if isinstance(value, str) and value.startswith(REFERENCE):
        return value.removeprefix(REFERENCE)
    return f"{str(key).rpartition('.')[2]}{value}"


def read_rows(path: Path) -> tuple[list[PlanRow], dict[str, str] | None]:
    """Read a plan: its runs in order, and what to plot.

    Raises:
        FileNotFoundError: No such plan.
        ValueError: Unknown keys, values of another type, two runs of one name, a start from a run that comes later.
    """
    plan = read_yaml(path)
    rows, chart = plan.pop("runs", None), plan.pop("plot", None)
    if plan or not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected 'runs', a list of rows, and perhaps 'plot'; other keys: {sorted(plan)}.")
    if chart is not None and not (isinstance(chart, dict) and {"x", "y"} <= chart.keys() <= {"x", "y", "by"}):
        raise ValueError(f"{path}: plot={chart!r}, expected for instance {{x: lr, y: top1, by: neuron}}.")
    runs: dict[str, PlanRow] = {}
    for number, row in enumerate(rows, 1):
        own = dict(row)
        grid, config, paper = own.pop("grid", {}), own.pop("config", None), own.pop("paper", None)
        given = own.pop("name", None)
        if not isinstance(config, str | None) or not isinstance(given, str | int | None):
            raise ValueError(f"{path}, row {number}: config={config!r}, name={given!r}: expected texts.")
        source = path.parent / config if config else None
        name = str(given or (source.stem if source else own.get("model", f"run{number}")))
        where = f"{path}, row {number} ({name})"
        printed, cell = _paper(paper, where)
        axes = (
            {**grid, **({"seed": own.pop("seeds")} if "seeds" in own else {})} if isinstance(grid, dict) else {"": ""}
        )
        if not all(isinstance(values, list) and values for values in axes.values()):
            raise ValueError(f"{where}: grid={grid!r} and seeds: expected lists of values, {{T: [1, 2, 4]}}, [1, 2].")
        for values in itertools.product(*axes.values()):
            settings = {**own, **dict(zip(axes, values, strict=True))}
            full = "-".join([name, *(_label(key, value) for key, value in zip(axes, values, strict=True))])
            if full in runs or not full or full != Path(full).name or full.startswith("."):
                raise ValueError(f"{where}: the name {full!r} is taken, or no name of a folder. Give 'name:'.")
            run = PlanRow(full, name, where, source, settings, printed, cell)
            for other in run.after:
                if other not in runs:
                    raise ValueError(f"{where}: it starts from {other!r}, no run before it. {nearest(other, runs)}")
            runs[full] = run
    return list(runs.values()), chart


def share_out(rows: Sequence[PlanRow], processes: int) -> list[list[str]]:
    """Names of the runs that every process takes, in turns; a run goes where the one goes that it starts from."""
    shares: list[list[str]] = [[] for _ in range(processes)]
    place: dict[str, int] = {}
    turns = itertools.cycle(range(processes))
    for row in rows:
        place[row.name] = place[row.after[0]] if row.after else next(turns)
        shares[place[row.name]].append(row.name)
    return shares
