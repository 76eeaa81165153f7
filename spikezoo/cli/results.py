"""Print a plan as its paper prints the table: our numbers, and the paper's in brackets.

spikezoo results configs/tickets/binw_slt_table1.yaml
spikezoo results configs/dynsnn/table1.yaml --results docs/runs/table1.csv
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from spikezoo.checkpoint import CONFIG_NAME, Config, read_table
from spikezoo.config_files import find_config
from spikezoo.counting.results import align
from spikezoo.flags import Parser
from spikezoo.train.rows import PlanRow, read_rows

__all__ = ["main", "table"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo results", __doc__)
    parser.add_argument("plan", metavar="FILE", help="the plan, a YAML file of configs/")
    parser.add_argument("--output", default="output", metavar="DIR", help="where training wrote (default: %(default)s)")
    parser.add_argument("--results", metavar="FILE", help="results.csv (default: that of the plan in --output)")
    return parser


def _cell(rows: Sequence[PlanRow], measure: str, found: Mapping[str, Mapping[str, str]]) -> str:
    """Mean and standard deviation over the runs of a cell, and what the paper prints; '' of ours where none was run."""
    values = [float(found[row.name][measure]) for row in rows if found.get(row.name, {}).get(measure)]
    ours = f"{statistics.fmean(values):.2f}" if values else ""
    if len(values) > 1:
        ours += f" ±{statistics.stdev(values):.2f}"
    paper = next((row.paper[measure] for row in rows if measure in row.paper), None)
    return " ".join(filter(None, [ours, "" if paper is None else f"({paper:g})"]))


def table(rows: Sequence[PlanRow], found: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
    """The table of a plan, its header first; rows and columns in the order in which the plan names them.

    Args:
        rows: Of :func:`spikezoo.train.rows.read_rows`.
        found: Rows of results.csv by the name of the run.

    Returns:
        Lines of cells: "ours ±deviation (the paper's)". Rows without ``at`` are lines of their own, under top1.
    """
    cells: dict[tuple[str, str, str], list[PlanRow]] = {}
    for row in rows:
        line, column = row.cell or (row.row, "")
        for measure in row.paper or ("top1",):
            cells.setdefault((line, column, measure), []).append(row)
    lines = list(dict.fromkeys(line for line, *_ in cells))
    columns = list(dict.fromkeys((column, measure) for _, column, measure in cells))
    heads = [column if measure == "top1" and column else f"{column} {measure}".strip() for column, measure in columns]
    return [
        ["", *heads],
        *([line, *(_cell(cells.get((line, *column), []), column[1], found) for column in columns)] for line in lines),
    ]


def check(results: Path, found: Mapping[str, Mapping[str, str]]) -> None:
    """Raise where results.csv says of a run beside it something else than the run's config.json, which has a digest.

    Args:
        results: The file.
        found: Its rows by the name of the run.

    Raises:
        ValueError: It does.
    """
    for name, row in found.items():
        if Path(name).name != name or not (results.parent / name / CONFIG_NAME).is_file():
            continue  # of a table that was copied, or with a run that was begun anew
        measured = Config.read(results.parent / name).results
        for key in row.keys() & measured.keys():
            if isinstance(measured[key], int | float) and row[key] != str(measured[key]):
                raise ValueError(
                    f"{results} has {key}={row[key]} of {name}, and the run itself {measured[key]}: damaged, or "
                    "edited. Give the plan's command again, which writes it anew."
                )


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    path = find_config(args.plan, "plan")
    rows, _ = read_rows(path)
    results = Path(args.results or Path(args.output) / path.stem / "results.csv")
    if args.results and not results.is_file():
        raise FileNotFoundError(f"No results at {results}: training with --plan {path} writes them.")
    found: dict[str, dict[str, str]] = {}
    if results.is_file():
        found = {row["name"]: row for row in read_table(results) if "name" in row}
        check(results, found)
    done = sum(row.name in found for row in rows)
    print(f"{path.stem}: {done} of {len(rows)} runs; mean and deviation over seeds, in brackets the paper's\n")
    print(align(table(rows, found), 1))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
