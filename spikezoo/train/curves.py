"""Pictures of a run, and of the runs of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from spikezoo import pictures
from spikezoo.checkpoint import read_table
from spikezoo.evaluate import read_layer_rates
from spikezoo.train.rows import REFERENCE

__all__ = ["LAYER_RATES", "plot", "plot_results"]

LAYER_RATES = "layer_rates.csv"


def plot(folder: Path, layer_rates: Mapping[str, float]) -> list[Path]:
    """Draw the run's curves and the firing rate of every layer over its epochs; [] without matplotlib."""
    paths = [folder / "curves.png", folder / "firing_rates.png"]
    try:
        pictures.check_picture(paths[0])
    except ValueError:
        print("No pictures: pip install 'spikezoo-snn[plot]' brings matplotlib.")
        return []
    summary = folder / "summary.csv"  # not there where a finished run was resumed into another folder
    rows = read_table(summary)
    pictures.draw_training([{**row, "epoch": str(int(row["epoch"]) - 1)} for row in rows], paths[0])
    if not layer_rates:
        return paths[:1]
    epochs = folder / LAYER_RATES
    history = read_layer_rates(epochs, layer_rates) if epochs.is_file() else {}
    title = "Firing rate of every layer on the test set"
    pictures.draw_layer_rates(history or {name: [rate] for name, rate in layer_rates.items()}, paths[1], title)
    return paths


def plot_results(
    path: Path, runs: Sequence[Any], rows: Mapping[str, Mapping[str, Any]], chart: Mapping[str, str]
) -> None:
    """Draw a measure over a swept flag, mean and range over seeds, a line per ``by``; level for runs without it.

    A run that starts from another of the plan stands where that one does, unless it sets the flag itself.
    """
    groups: dict[Any, dict[Any, list[float]]] = {}
    places: dict[str, Any] = {}
    for run in runs:
        start = str(run.settings.get("initial_checkpoint")).removeprefix(REFERENCE)
        place = run.get(chart["x"])
        places[run.name] = places.get(start) if place is None else place
        if run.name in rows and rows[run.name].get(chart["y"]) is not None:
            label = run.get(chart["by"]) if "by" in chart else chart["y"]
            groups.setdefault(label, {}).setdefault(places[run.name], []).append(rows[run.name][chart["y"]])
    with suppress(ValueError):  # without matplotlib there is no picture
        pictures.draw_measure(groups, chart["x"], chart["y"], path, chart.get("by", ""), path.stem)
