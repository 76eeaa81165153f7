"""Pictures of a run, and of the runs of a plan."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spikezoo.checkpoint import atomic


def plot(folder: Path, layer_rates: Mapping[str, float]) -> list[Path]:
    """Draw the run's curves and the firing rate of every layer; [] without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("No pictures: pip install 'spikezoo-snn[plot]' brings matplotlib.")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    summary = folder / "summary.csv"  # not there where a finished run was resumed into another folder
    rows = list(csv.DictReader(summary.read_text(encoding="utf-8").splitlines())) if summary.is_file() else []
    epochs = [int(row["epoch"]) for row in rows]

    def column(name: str) -> list[float]:
        return [float(row[name]) if row[name] else math.nan for row in rows]

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    axes[0].plot(epochs, column("train_loss"), "o-", label="train", markersize=3)
    axes[0].plot(epochs, column("eval_loss"), "o-", label="test", markersize=3)
    axes[0].set(title="Loss", xlabel="epoch")
    axes[0].legend(frameon=False)
    axes[1].plot(epochs, column("eval_top1"), "o-", color="C2", markersize=3)
    axes[1].set(title="Test accuracy (top-1, %)", xlabel="epoch")
    axes[2].plot(epochs, column("eval_firing_rate"), "o-", color="C3", markersize=3)
    axes[2].set(title="Mean firing rate", xlabel="epoch", ylabel="spikes per neuron and time step")
    axes[2].set_ylim(bottom=0)
    for axis in axes:
        axis.grid(alpha=0.3)
    paths = [folder / "curves.png"]
    with atomic(paths[0]) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    if layer_rates:
        figure, axis = plt.subplots(figsize=(7, 0.6 + 0.25 * len(layer_rates)), layout="constrained")
        names = list(layer_rates)
        axis.barh(range(len(names)), [layer_rates[name] for name in names], color="C3")
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.invert_yaxis()
        axis.set(title="Firing rate of every layer on the test set", xlabel="spikes per neuron and time step")
        axis.grid(alpha=0.3, axis="x")
        paths.append(folder / "firing_rates.png")
        with atomic(paths[1]) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
        plt.close(figure)
    return paths


def plot_results(
    path: Path, runs: Sequence[Any], rows: Mapping[str, Mapping[str, Any]], chart: Mapping[str, str]
) -> None:
    """Draw a measure over a swept flag, mean and range over seeds, a line per ``by``; level for runs without it."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups: dict[Any, dict[Any, list[float]]] = {}
    for run in runs:
        if run.name in rows and rows[run.name].get(chart["y"]) is not None:
            label = run.get(chart["by"]) if "by" in chart else chart["y"]
            groups.setdefault(label, {}).setdefault(run.get(chart["x"]), []).append(rows[run.name][chart["y"]])
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for number, (label, points) in enumerate(groups.items()):
        level = points.pop(None, None)
        if level:
            mean = sum(level) / len(level)
            axis.axhline(mean, color=f"C{number}", linestyle="--", label=f"{label}, {mean:.4g}")
        if points:
            found = sorted(points.items()) if all(isinstance(x, int | float) for x in points) else list(points.items())
            means = [sum(values) / len(values) for _, values in found]
            low, high = ([abs(f(v) - m) for (_, v), m in zip(found, means, strict=True)] for f in (min, max))
            axis.errorbar([x for x, _ in found], means, [low, high], fmt="o-", color=f"C{number}", label=str(label))
    axis.set(xlabel=chart["x"], ylabel=chart["y"], title=path.stem)
    axis.legend(frameon=False, title=chart.get("by"))
    axis.grid(alpha=0.3)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
