"""Pictures of what models cost: operations of one, energies of several, accuracy and energy of the zoo."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikezoo.counting import Count
from spikezoo.pictures.figure import check_picture, plain_ticks, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.figure import Figure

__all__ = ["draw_energies", "draw_operations", "draw_zoo", "pareto_front", "place_labels"]

EXACT, PAPER, MACS, GREY = "#1f6f8b", "#99c1cf", "#d1603d", "0.65"


# Of the longest bar; modules below it, such as pools and the head, are drawn as one.
_SMALL = 0.005


def draw_operations(count: Count, path: str | Path, title: str = "") -> None:
    """Draw where operations and energy are: bars per module, exact and paper. Small ones are drawn together as one.

    Args:
        count: What to draw.
        path: Picture file; the suffix names the format.
        title: Title of the picture.

    Raises:
        ValueError: Nothing was counted; a file name without a known suffix, or matplotlib is missing.
    """
    figure_type = check_picture(path)
    from matplotlib.ticker import EngFormatter

    names, bars = _bars(count)
    figure = figure_type(figsize=(10, 2 + 0.3 * len(names)), layout="constrained")
    operations, energy = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for axis, series in ((operations, bars[:3]), (energy, bars[3:])):
        high = 0.8 / len(series)
        for number, (label, values, color) in enumerate(series):
            places = [index + (number - (len(series) - 1) / 2) * high for index in range(len(names))]
            axis.barh(places, values, height=high, label=label, color=color)
        axis.legend(fontsize="small", frameon=False, loc="lower right")
        axis.grid(alpha=0.3, axis="x")
        axis.spines[["top", "right"]].set_visible(False)
    operations.set_yticks(range(len(names)), names, fontsize="small")
    operations.set_ylim(len(names) - 0.4, -0.6)
    operations.set_xlabel("operations per image")
    operations.xaxis.set_major_formatter(EngFormatter(sep=""))
    energy.set_xlabel("energy per image")
    energy.xaxis.set_major_formatter(EngFormatter("J"))
    for axis in (operations, energy):
        axis.xaxis.get_major_locator().set_params(nbins=5)
    totals = (
        f"T={count.T}: exact {count.energy_exact_mj:.3g} mJ, paper {count.energy_paper_mj:.3g} mJ, ANN twin "
        f"{count.energy_ann_mj:.3g} mJ"
    )
    figure.suptitle("\n".join([*textwrap.wrap(title, 100), totals]), fontsize="medium")
    write(figure, path)


def _bars(count: Count) -> tuple[list[str], list[tuple[str, list[float], str]]]:
    """The modules to draw, and three series of operations and three of joules: label, values, colour."""
    names, rows = list(count.by_module), list(count.by_module.values())
    mac, sop = 1e-12 * count.mac_pj, 1e-12 * count.sop_pj
    series = [
        ("SOPs, exact", [r.sops_exact for r in rows], EXACT),
        ("SOPs, paper", [r.sops_paper for r in rows], PAPER),
        ("MACs on analog input", [r.macs_exact for r in rows], MACS),
        ("exact", [mac * r.macs_exact + sop * r.sops_exact for r in rows], EXACT),
        ("paper", [mac * r.macs_paper + sop * r.sops_paper for r in rows], PAPER),
        ("ANN twin", [mac * r.macs_step for r in rows], GREY),
    ]
    longest = [max((x for _, values, _ in part for x in values), default=0.0) for part in (series[:3], series[3:])]
    if not any(longest):
        raise ValueError("There is nothing to draw: no module has an operation that counts.")

    def small(index: int) -> bool:
        return all(values[index] <= _SMALL * longest[number // 3] for number, (_, values, _) in enumerate(series))

    rest = [index for index in range(len(rows)) if small(index)]
    if len(rest) < 2:
        rest = []
    kept = [index for index in range(len(rows)) if index not in rest]
    shown = [names[index] for index in kept] + ([f"{len(rest)} others"] if rest else [])
    return shown, [
        (label, [values[i] for i in kept] + ([sum(values[i] for i in rest)] if rest else []), color)
        for label, values, color in series
    ]


def draw_energies(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw the energy of an image of several models side by side: exact, paper, and the ANN twin's.

    Args:
        rows: Of each model: model, T, energy_exact_mj, energy_paper_mj, energy_ann_mj.
        path: Picture file; the suffix names the format.
        title: Title of the picture.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure = check_picture(path)(figsize=(7, 1.4 + 0.6 * len(rows)), layout="constrained")
    axis = figure.subplots()
    series = (
        ("exact", "energy_exact_mj", EXACT),
        ("paper", "energy_paper_mj", PAPER),
        ("ANN twin", "energy_ann_mj", GREY),
    )
    for number, (label, key, color) in enumerate(series):
        values = [float(row[key]) for row in rows]
        bars = axis.barh([i + 0.27 * (number - 1) for i in range(len(rows))], values, 0.25, label=label, color=color)
        axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=2, fontsize="x-small")
    axis.set_yticks(range(len(rows)), [f"{row['model']}, T={row['T']}" for row in rows], fontsize="small")
    axis.set(xlabel="energy of an image, mJ", xscale="log", ylim=(len(rows) - 0.4, -0.6))
    axis.margins(x=0.15)
    plain_ticks(axis.xaxis)
    axis.grid(alpha=0.3, axis="x")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("\n".join(textwrap.wrap(title, 80)), fontsize="medium")
    write(figure, path)


def place_labels(
    dots: Sequence[tuple[float, float, float]],
    sizes: Sequence[tuple[float, float]],
    area: tuple[float, float, float, float],
) -> list[tuple[float, float]]:
    """Place a label beside each dot so that no label covers another or a dot, as near to its own as there is room.

    Args:
        dots: Centre and radius of each.
        sizes: Width and height of each label.
        area: Left, bottom, right and top of where labels may be.

    Returns:
        The lower left corner of each label.

    Raises:
        ValueError: There is no room for all.
    """
    left, bottom, right, top = area
    taken = [(x - r, y - r, x + r, y + r) for x, y, r in dots]
    placed: list[tuple[float, float]] = []
    for (x, y, radius), (width, height) in zip(dots, sizes, strict=True):
        # On rings around the dot, and first to its right.
        tries = (
            (radius + 3 + ring * height / 2, math.radians(angle))
            for ring in range(60)
            for angle in (0, 180, 90, 270, 30, 330, 150, 210, 60, 300, 120, 240)
        )
        for distance, angle in tries:
            a = x + distance * math.cos(angle) - (width if math.cos(angle) < -0.1 else 0)
            a -= width / 2 if abs(math.cos(angle)) <= 0.1 else 0
            b = y + distance * math.sin(angle) + (math.sin(angle) - 1) * height / 2
            box = (a, b, a + width, b + height)
            inside = left <= a and bottom <= b and box[2] <= right and box[3] <= top
            if inside and not any(
                box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
            ):
                break
        else:
            raise ValueError(f"There is no room for {len(dots)} labels: make the picture larger.")
        taken.append(box)
        placed.append((a, b))
    return placed


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of pairs (cost, gain) those that none costs less than and gains as much, from the cheapest on."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def draw_zoo(
    rows: Sequence[Mapping[str, Any]], path: str | Path, papers: Mapping[str, float] | None = None, title: str = ""
) -> None:
    """Draw the accuracy of models over the energy of an image, counted exactly: a panel a dataset of several models.

    Dots are as large as the files; a line joins those that none beats in both; analog models are grey, as are the
    papers' numbers (at our energy, since theirs are counted otherwise) and the energies of ANN twins.

    Args:
        rows: Of ``docs/results.csv``: model, dataset, T, neuron, top1, energy_exact_mj, energy_ann_mj and bytes.
        path: Picture file; the suffix names the format.
        papers: Model -> accuracy in per cent that its paper prints.
        title: Title of the picture.

    Raises:
        ValueError: No rows, or such as were not counted; a file name without a known suffix, or matplotlib is missing.
    """
    figure_type = check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if lacking := [row["model"] for row in rows if not row.get("energy_exact_mj") or not row.get("bytes")]:
        raise ValueError(f"{lacking[0]} has no energy or no file size: validate.py --pretrained --count measures them.")
    if not rows:
        raise ValueError("There are no checkpoints to draw: validate.py --model all --pretrained --count comes first.")
    datasets: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        datasets.setdefault(row["dataset"], []).append(row)
    order = sorted(datasets, key=lambda name: -len(datasets[name]))
    order = [name for name in order if len(datasets[name]) > 1] or order[:1]
    bands = -(-len(order) // 2)
    figure = figure_type(figsize=(12 if len(order) > 1 else 7.5, 4.6 * bands + 0.6), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(bands, min(2, len(order)), squeeze=False)
    for axes in list(panels.flat)[len(order) :]:
        axes.remove()
    for axes, dataset in zip(panels.flat, order, strict=False):
        _panel(axes, dataset, datasets[dataset], papers or {})
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize="small"
    )
    if title:
        figure.suptitle("\n".join(textwrap.wrap(title, 100)), fontsize="medium")
    canvas.draw()
    figure.set_layout_engine("none")  # what is placed now must not move
    for axes, dataset in zip(panels.flat, order, strict=False):
        _name_dots(figure, canvas.get_renderer(), axes, datasets[dataset])
    write(figure, path)


def _panel(axes: Axes, dataset: str, rows: Sequence[Mapping[str, Any]], papers: Mapping[str, float]) -> None:
    """Draw the dots of one dataset, and in grey what they are held against."""
    axes.set(xlabel="energy of an image, mJ (every spike counted)", ylabel="top-1 test accuracy, %", xscale="log")
    axes.set_title(dataset, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.margins(0.25, 0.15)
    plain_ticks(axes.xaxis)
    analog = [row for row in rows if row.get("neuron") in ("relu", "sign")]
    spiking = [row for row in rows if row not in analog]
    for own, color, label in ((spiking, EXACT, "spiking, area by size of the file"), (analog, "0.5", "ANN")):
        if own:
            points = [(float(row["energy_exact_mj"]), float(row["top1"])) for row in own]
            across, up = zip(*points, strict=True)
            axes.scatter(across, up, [_dot(row) for row in own], color=color, alpha=0.6, label=label)
    if len(spiking) > 1:
        front = pareto_front([(float(row["energy_exact_mj"]), float(row["top1"])) for row in spiking])
        axes.step(
            *zip(*front, strict=True), where="post", color=EXACT, linewidth=1, alpha=0.5, zorder=0, label="Pareto front"
        )
    for row in spiking:
        if row["model"] in papers:
            x, ours, theirs = float(row["energy_exact_mj"]), float(row["top1"]), papers[row["model"]]
            axes.plot([x, x], [ours, theirs], color=GREY, linewidth=0.8, zorder=0)
            axes.plot(x, theirs, marker="_", markersize=10, color="0.4", linestyle="", label="the paper's accuracy")
    for energy in {float(row["energy_ann_mj"]) for row in spiking if row.get("energy_ann_mj")}:
        axes.axvline(energy, color=GREY, linestyle=":", linewidth=1, zorder=0, label="energy of an ANN twin")
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 100.5) if high > 100 else high)


def _name_dots(figure: Figure, renderer: RendererBase, axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the models' names beside their dots, without the dataset, which the panel says."""
    pixel = figure.dpi / 72  # a point
    dots, sizes, texts = [], [], []
    for row in rows:
        dataset = str(row["dataset"]).removeprefix("events:").lower().replace("-", "_")
        text = row["model"].replace(f".{dataset}_", ".").removesuffix(f".{dataset}")
        text += f", T={row['T']}" if row.get("T") else ""
        x, y = axes.transData.transform((float(row["energy_exact_mj"]), float(row["top1"])))
        dots.append((x, y, pixel * math.sqrt(_dot(row) / math.pi)))
        label = figure.text(0, 0, text, fontsize="x-small")
        box = label.get_window_extent(renderer)
        sizes.append((box.width, box.height))
        texts.append(text)
        label.remove()
    frame = axes.get_window_extent()
    placed = place_labels(dots, sizes, (frame.x0, frame.y0, frame.x1, frame.y1))
    for text, (x, y, radius), (a, b), (width, height) in zip(texts, dots, placed, sizes, strict=True):
        figure.text(a / figure.bbox.width, b / figure.bbox.height, text, fontsize="x-small", va="bottom")
        near = (min(max(x, a), a + width), min(max(y, b), b + height))
        if math.dist((x, y), near) > radius + 10:
            ends = [axes.transData.inverted().transform(end) for end in ((x, y), near)]
            axes.plot(*zip(*ends, strict=True), color="0.6", linewidth=0.6, zorder=0, scalex=False, scaley=False)


def _dot(row: Mapping[str, Any]) -> float:
    """Area of a checkpoint's dot in square points."""
    return 15 + 25 * float(row["bytes"]) / 1e6
