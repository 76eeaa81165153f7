"""Draw what several runs measured after each epoch in one picture.

spikezoo curves output/ablation/mpbn-T4-seed1 output/ablation/plain-T4-seed1 --plot curves.png
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from spikezoo import pictures
from spikezoo.checks import nearest
from spikezoo.flags import Parser, add_flags

__all__ = ["main"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo curves", __doc__)
    parser.add_argument("runs", nargs="+", metavar="DIR", help="folders that training wrote, with summary.csv")
    parser.add_argument(
        "--measure",
        default="eval_top1",
        help="a column of summary.csv (default: %(default)s)",
    )
    add_flags(parser, "plot", required=True)
    return parser


def read_curve(folder: Path, measure: str) -> tuple[list[float], list[float]]:
    """Epochs, and a column of summary.csv in those that have it.

    Raises:
        FileNotFoundError: No summary.csv there.
        ValueError: No such column.
    """
    path = folder / "summary.csv"
    if not path.is_file():
        raise FileNotFoundError(f"No {path}: {folder} is no folder of a run.")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and measure not in rows[0]:
        raise ValueError(f"{path} has no column {measure!r}. {nearest(measure, rows[0])}")
    rows = [row for row in rows if row[measure]]
    return [float(row["epoch"]) for row in rows], [float(row[measure]) for row in rows]


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    pictures.check_picture(args.plot)
    folders = [Path(folder) for folder in args.runs]
    curves = {str(folder): read_curve(folder, args.measure) for folder in folders}
    named = {folder.name: curves[str(folder)] for folder in folders}
    pictures.draw_curves(named if len(named) == len(curves) else curves, args.plot, "epoch", args.measure)
    for name, (epochs, values) in curves.items():
        print(f"{name}: {len(epochs)} epochs" + (f", the last {values[-1]:g}" if values else ""))
    print(f"Wrote {args.plot}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
