"""The table of a finished plan of configs/dynsnn beside the paper's numbers.

python -m tools.dynsnn_table output/table1
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from spikezoo.flags import Parser, leave

__all__ = ["main", "table"]

# Accuracy of the base, reactivated and pruned nets and the neurons removed, per cent, by the name of the plan's rows.
PAPER = {
    "snn_t": (97.9, 98.3, 98.0, 53.71),
    "stidi_bp": (97.4, 98.1, 97.7, 62.33),
    "bp_stdp": (96.6, 97.2, 96.9, 64.81),
    "rmp_resnet20": (91.36, None, 91.13, 37.13),
    "rmp_vgg16": (69.96, None, 69.65, 31.71),
    "fc3_57": (99.25, None, 99.23, 57.4),
    "fc3_70": (99.25, None, 98.98, 69.7),
    "lenet": (99.50, None, 99.15, 61.5),
}


def table(folder: str) -> str:
    """Mean and standard deviation over seeds of a plan's rows CASE-baseline, CASE-reactivated and CASE-pruned."""
    path = Path(folder) / "results.csv"
    if not path.is_file():
        raise FileNotFoundError(f"No {path}: run train.py --plan configs/dynsnn/... first.")
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            case, _, stage = row["name"].partition("-")
            found.setdefault(case, {}).setdefault(stage.partition("-")[0], []).append(row)

    def mean(rows: Sequence[Mapping[str, str]], key: str) -> float:
        return statistics.fmean(float(row[key]) for row in rows) if rows else math.nan

    def shown(rows: Sequence[Mapping[str, str]], key: str, paper: float | None) -> str:
        if not rows:
            return f"{'-':>14}"
        spread = statistics.stdev(float(row[key]) for row in rows) if len(rows) > 1 else 0.0
        return f"{mean(rows, key):7.2f} ±{spread:4.2f}" + ("      " if paper is None else f" {paper:>5}")

    lines = ["mean ± standard deviation over seeds, per cent; beside them the paper's"]
    heads = [f"{head:<20}" for head in ("baseline", "reactivated", "pruned", "drop", "neurons removed")]
    lines.append(f"{'net':<14}{''.join(heads)}")
    for case, stages in found.items():
        paper = PAPER.get(case, (None,) * 4)
        base, again, pruned = (stages.get(stage, []) for stage in ("baseline", "reactivated", "pruned"))
        if not base:  # fc3_57 and fc3_70 share the baseline of fc3
            base = found.get(case.rpartition("_")[0], {}).get("baseline", [])
        cells = [shown(rows, "top1", number) for rows, number in zip((base, again, pruned), paper, strict=False)]
        drop = f"{mean(base, 'top1') - mean(pruned, 'top1'):7.2f}" + " " * 6
        if paper[0] is not None and paper[2] is not None:
            drop += f" {paper[0] - paper[2]:>5.2f}"
        cells += [drop, shown(pruned, "neurons_removed", paper[3])]
        lines.append(f"{case:<14}{''.join(f'{cell:<20}' for cell in cells)}".rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of a plan's folder."""
    parser = Parser("python -m tools.dynsnn_table", __doc__)
    parser.add_argument("folder", metavar="DIR", help="that training with --plan configs/dynsnn/... wrote")
    print(table(parser.parse_args(argv).folder))
    return 0


if __name__ == "__main__":
    leave(main)
