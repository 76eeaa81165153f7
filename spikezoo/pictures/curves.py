"""Pictures over time steps, thresholds and neurons: accuracy of converted nets, firing rates before and after pruning.

Firing rates before and after, and accuracy over the threshold, are figures 3 and 4 of "DynSNN: A Dynamic Approach to
Reduce Redundancy in Spiking Neural Networks".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from spikezoo.pictures.figure import check_picture, write

__all__ = ["draw_accuracy", "draw_curves", "draw_rates", "draw_thresholds"]


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


def draw_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | Path, xlabel: str, ylabel: str
) -> None:
    """Draw lines over one axis.

    Args:
        curves: Label -> places and values.
        path: Picture file; the suffix names the format.
        xlabel: What the places are.
        ylabel: What the values are.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure = check_picture(path)(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, (places, values) in curves.items():
        axes.plot(places, values, "o-", markersize=3, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
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
        binned.hist(row, bins=40, range=(0, highest), color=color, alpha=0.6, label=label)
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
