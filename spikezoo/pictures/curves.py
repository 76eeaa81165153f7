"""Pictures over epochs, time steps, thresholds and neurons: of trainings, of converted and of pruned nets.

Firing rates before and after, and accuracy over the threshold, are figures 3 and 4 of "DynSNN: A Dynamic Approach to
Reduce Redundancy in Spiking Neural Networks".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikezoo.observe import failing_layers
from spikezoo.pictures.figure import check_picture, write

__all__ = ["draw_accuracy", "draw_layer_rates", "draw_measure", "draw_rates", "draw_thresholds", "draw_training"]


def draw_training(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw the curves of a training over its epochs: losses, accuracies, firing rate, learning rate; what there is.

    Args:
        rows: Of ``summary.csv``: epoch (from 0), train_loss, eval_loss, train_top1, eval_top1,
            train_firing_rate, eval_firing_rate, lr.
        path: Picture file; the suffix names the format.
        title: Title of the picture.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure_type = check_picture(path)
    panels = (
        ("loss", {"train_loss": "training", "eval_loss": "test"}),
        ("accuracy (top-1), %", {"train_top1": "training", "eval_top1": "test"}),
        ("spikes per neuron and time step", {"train_firing_rate": "training", "eval_firing_rate": "test"}),
        ("learning rate", {"lr": "learning rate"}),
    )

    def points(key: str) -> list[tuple[int, float]]:
        pairs = [(int(row["epoch"]) + 1, row.get(key)) for row in rows]
        numbers = [(epoch, float(value)) for epoch, value in pairs if value not in (None, "")]
        return [(epoch, value) for epoch, value in numbers if math.isfinite(value)]

    found = [(name, {label: points(key) for key, label in lines.items()}) for name, lines in panels]
    found = [(name, {label: line for label, line in lines.items() if line}) for name, lines in found]
    found = [(name, lines) for name, lines in found if lines] or [("nothing was recorded", {})]
    figure = figure_type(figsize=(4 * len(found), 3.5), layout="constrained")
    for axis, (name, lines) in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        for label, line in lines.items():
            color = "C7" if label == "training" else "C0"
            axis.plot(*zip(*line, strict=True), "o-", color=color, markersize=3, label=label)
        axis.set(xlabel="epoch", ylabel=name)
        axis.locator_params("x", integer=True)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize="small")
        if name.startswith("accuracy"):
            axis.set_ylim(top=min(100, axis.get_ylim()[1]))
        elif name.startswith("spikes"):
            axis.set_ylim(bottom=0)
    figure.suptitle(title, fontsize="medium")
    write(figure, path)


def draw_layer_rates(history: Mapping[str, Sequence[float]], path: str | Path, title: str = "") -> None:
    """Draw the firing rate of every layer over the epochs, the last beside it; of one epoch as bars.

    Layers that are dead or saturated, see :func:`spikezoo.observe.failing_layers`, are named in red.

    Args:
        history: Layer -> rate of each epoch, in the order of the model.
        path: Picture file; the suffix names the format.
        title: Title of the picture.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    names, table = list(history), [list(rates) for rates in history.values()]
    last = {name: rates[-1] for name, rates in history.items()}
    failing = failing_layers(last)
    figure = check_picture(path)(figsize=(7, 1.2 + 0.22 * len(names)), layout="constrained")
    axis = figure.subplots()
    epochs = len(table[0]) if table else 0
    if epochs > 1:
        shown = axis.imshow(
            table,
            aspect="auto",
            cmap="viridis",
            interpolation="nearest",
            vmin=0,
            extent=(0.5, epochs + 0.5, len(names) - 0.5, -0.5),
        )
        figure.colorbar(
            shown, ax=axis, label="spikes per neuron and time step", location="bottom", shrink=0.6, pad=0.02
        )
        axis.set_xlabel("epoch")
        axis.locator_params("x", integer=True)
        right = axis.secondary_yaxis("right")
        right.set_yticks(range(len(names)), [f"{rate:.3f}" for rate in last.values()], fontsize="x-small")
    else:
        bars = axis.barh(range(len(names)), list(last.values()), color="C3")
        axis.bar_label(bars, [f"{rate:.3f}" for rate in last.values()], padding=2, fontsize="x-small")
        axis.set(xlabel="spikes per neuron and time step", ylim=(len(names) - 0.4, -0.6))
        axis.margins(x=0.1)
        axis.grid(alpha=0.3, axis="x")
    said = [f"{name} ({failing[name].split()[0]})" if name in failing else name for name in names]
    for label, name in zip(axis.set_yticks(range(len(names)), said, fontsize="x-small"), names, strict=True):
        label.label1.set_color("C3" if name in failing else "black")
    figure.suptitle(title, fontsize="medium")
    write(figure, path)


def draw_measure(
    groups: Mapping[Any, Mapping[Any, Sequence[float]]], x: str, y: str, path: str | Path, by: str = "", title: str = ""
) -> None:
    """Draw a measure of runs over what was varied: mean and range over seeds, a line per group, a level for None.

    Args:
        groups: Group -> value of what was varied, None for runs without it -> measures of the seeds.
        x: Name of what was varied.
        y: Name of the measure.
        path: Picture file; the suffix names the format.
        by: What groups differ in.
        title: Title of the picture.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure = check_picture(path)(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for number, (label, points) in enumerate(groups.items()):
        if level := points.get(None):
            mean = sum(level) / len(level)
            axis.axhline(mean, color=f"C{number}", linestyle="--", label=f"{label}, {mean:.4g}")
        if found := [(value, measures) for value, measures in points.items() if value is not None]:
            if all(isinstance(value, int | float) for value, _ in found):
                found.sort()
            means = [sum(values) / len(values) for _, values in found]
            low, high = ([abs(f(v) - m) for (_, v), m in zip(found, means, strict=True)] for f in (min, max))
            axis.errorbar([v for v, _ in found], means, [low, high], fmt="o-", color=f"C{number}", label=str(label))
    axis.set(xlabel=x, ylabel=y, title=title)
    axis.legend(frameon=False, title=by or None)
    axis.grid(alpha=0.3)
    write(figure, path)


def draw_accuracy(top1: Sequence[float], ann: float, path: str | Path, title: str = "") -> None:
    """Draw the accuracy of a converted model over its time steps, beside that of the network it came from.

    Args:
        top1: Accuracy in per cent after 1, 2, ... time steps.
        ann: Of the network it came from.
        path: Picture file; the suffix names the format.
        title: Title of the picture.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure = check_picture(path)(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(ann, color="0.4", linestyle="--", label=f"ReLU network, {ann:.2f} %")
    axes.plot(range(1, len(top1) + 1), top1, label=f"spiking, {top1[-1]:.2f} % at T={len(top1)}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="time steps", ylabel="top-1 accuracy in %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    write(figure, path)


def draw_rates(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    threshold: float,
    path: str | Path,
    title: str = "",
    reactivated: Mapping[str, Tensor] | None = None,
) -> None:
    """Draw the firing rates of single neurons before and after some were removed: sorted, and how many have which.

    Args:
        before: Rates of every layer, see :func:`spikezoo.transforms.dynsnn.neuron_rates`.
        after: Rates of the neurons that are left, measured without the others, of every layer.
        threshold: Below it neurons were removed.
        path: Picture file; the suffix names the format.
        title: Title of the picture.
        reactivated: Rates of the net that was trained with reactivation.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure = check_picture(path)(figsize=(9, 3.5), layout="constrained")
    ranked, binned = figure.subplots(1, 2)
    shown = [("before", "C7", before), ("reactivated", "C0", reactivated or {}), ("after", "C3", after)]
    shown = [entry for entry in shown if entry[2]]
    highest = max(threshold, *(float(rate.max()) for *_, rates in shown for rate in rates.values() if len(rate))) or 1.0
    for label, color, rates in shown:
        row = torch.cat([rate.flatten().cpu() for rate in rates.values()]).sort(descending=True).values.numpy()
        ranked.plot(range(1, len(row) + 1), row, color=color, label=f"{label}: {len(row):,}, mean {row.mean():.3f}")
        binned.hist(row, bins=40, range=(0, highest), color=color, histtype="step", linewidth=1.5, label=label)
    for axis, line in ((ranked, ranked.axhline), (binned, binned.axvline)):
        line(threshold, color="black", linestyle=":", linewidth=1, label=f"threshold {threshold:.3g}")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize="small")
    ranked.set(xlabel="neuron, by firing rate", ylabel="spikes per time step")
    binned.set(xlabel="spikes per time step", ylabel="neurons", yscale="log")
    figure.suptitle(title, fontsize="medium")
    write(figure, path)


def draw_thresholds(
    rows: Sequence[Mapping[str, float]], chosen: float | None, path: str | Path, title: str = ""
) -> None:
    """Draw the accuracy over the threshold of fading, and on a second axis what it removes.

    Args:
        rows: Of :func:`spikezoo.transforms.dynsnn.sweep_thresholds`.
        chosen: A threshold to mark.
        path: Picture file; the suffix names the format.
        title: Title of the picture.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure = check_picture(path)(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    thresholds = [row["threshold"] for row in rows]
    axis.plot(thresholds, [row["top1"] for row in rows], "o-", color="C0", markersize=4)
    axis.set(xlabel="threshold, spikes per time step", title=title)
    axis.set_ylabel("top-1, %", color="C0")
    axis.grid(alpha=0.3)
    if chosen is not None:
        axis.axvline(chosen, color="black", linestyle=":", linewidth=1)
    other = axis.twinx()
    other.plot(thresholds, [row["compression"] for row in rows], "s--", color="C3", markersize=4)
    other.set_ylabel("neurons removed, %", color="C3")
    write(figure, path)
