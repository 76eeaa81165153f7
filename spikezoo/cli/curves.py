"""Draw what several runs measured after each epoch in one picture.

spikezoo curves output/ablation/mpbn-T4-seed1 output/ablation/plain-T4-seed1 --plot curves.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spikezoo import pictures
from spikezoo.checkpoint import read_table
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


def read_curve(folder: Path, measure: str) -> dict[float, list[float]]:
    """A column of summary.csv by epoch, where it has one.

    Raises:
        FileNotFoundError: No summary.csv there.
        ValueError: No such column, or not as the run wrote it.
    """
    path = folder / "summary.csv"
    if not path.is_file():
        raise FileNotFoundError(f"No {path}: {folder} is no folder of a run.")
    rows = read_table(path)
    if rows and measure not in rows[0]:
        raise ValueError(f"{path} has no column {measure!r}. {nearest(measure, rows[0])}")
    return {float(row["epoch"]): [float(row[measure])] for row in rows if row[measure]}


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    pictures.check_picture(args.plot)
    folders = [Path(folder) for folder in args.runs]
    curves = {str(folder): read_curve(folder, args.measure) for folder in folders}
    named = {folder.name: curves[str(folder)] for folder in folders}
    pictures.draw_measure(named if len(named) == len(curves) else curves, "epoch", args.measure, args.plot)
    for name, curve in curves.items():
        last = "".join(f", the last {value:g}" for value in list(curve.values())[-1]) if curve else ""
        print(f"{name}: {len(curve)} epochs{last}")
    print(f"Wrote {args.plot}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
