"""Pictures of what models cost: operations of one, accuracy and energy of the zoo."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from spikezoo.counting import Count
from spikezoo.pictures.figure import check_picture, write

__all__ = ["draw_operations", "draw_zoo", "place_labels"]


def draw_operations(count: Count, path: str | Path, title: str = "") -> None:
    """Draw where the operations are: a bar per module, MACs and synaptic operations, exact and paper.

    Args:
        count: What to draw.
        path: Picture file; the suffix names the format.
        title: Title of the picture.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure_type = check_picture(path)
    names = list(count.by_module)
    rows = list(count.by_module.values())
    figure = figure_type(figsize=(9, 1.6 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    series = (
        ("SOPs, exact", -0.27, [r.sops_exact for r in rows], "#1f6f8b"),
        ("SOPs, paper", 0.0, [r.sops_paper for r in rows], "#99c1cf"),
        ("MACs on analog input", 0.27, [r.macs_exact for r in rows], "#d1603d"),
    )
    for label, shift, values, color in series:
        axes.barh([index + shift for index in range(len(names))], values, height=0.25, label=label, color=color)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("operations per image")
    axes.set_title(title)
    axes.legend()
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


def draw_zoo(rows: Sequence[Mapping[str, str]], path: str | Path) -> None:
    """Draw the accuracy of checkpoints over the energy of an image, counted exactly; dots as large as the files.

    Args:
        rows: Of ``docs/results.csv``: model, dataset, top1, energy_exact_mj and bytes.
        path: Picture file; the suffix names the format.

    Raises:
        ValueError: No rows, or such as were not counted; a file name without a known suffix, or matplotlib is missing.
    """
    figure_type = check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if lacking := [row["model"] for row in rows if not row.get("energy_exact_mj") or not row.get("bytes")]:
        raise ValueError(f"{lacking[0]} has no energy or no file size: validate.py --pretrained --count measures them.")
    if not rows:
        raise ValueError("There are no checkpoints to draw: validate.py --model all --pretrained --count comes first.")
    figure = figure_type(figsize=(9, 6.5), dpi=150, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    axes.set(xlabel="energy of an image, mJ (every spike counted)", ylabel="top-1 test accuracy, %", xscale="log")
    axes.grid(alpha=0.3)
    axes.margins(0.2, 0.1)
    for number, dataset in enumerate(sorted({row["dataset"] for row in rows})):
        own = [row for row in rows if row["dataset"] == dataset]
        axes.scatter(
            [float(row["energy_exact_mj"]) for row in own],
            [float(row["top1"]) for row in own],
            [_dot(row) for row in own],
            color=f"C{number}",
            alpha=0.6,
            label=dataset,
        )
    legend = axes.legend(title="dots: area by size of the file", loc="lower left", fontsize="small", markerscale=0.5)
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    canvas.draw()
    figure.set_layout_engine("none")  # what is placed now must not move
    pixel = figure.dpi / 72  # a point
    dots, sizes = [], []
    for row in rows:
        x, y = axes.transData.transform((float(row["energy_exact_mj"]), float(row["top1"])))
        dots.append((x, y, pixel * math.sqrt(_dot(row) / math.pi)))
        label = figure.text(0, 0, row["model"], fontsize="x-small")
        box = label.get_window_extent(canvas.get_renderer())
        sizes.append((box.width, box.height))
        label.remove()
    frame, box = axes.get_window_extent(), legend.get_window_extent()
    # The legend is one more thing that nothing may cover: a dot of its own, whose label has no size.
    covered = [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2, max(box.width, box.height) / 2)]
    placed = place_labels([*dots, *covered], [*sizes, (0, 0)], (frame.x0, frame.y0, frame.x1, frame.y1))
    for row, (x, y, radius), (a, b), (width, height) in zip(rows, dots, placed, sizes, strict=False):
        figure.text(a / figure.bbox.width, b / figure.bbox.height, row["model"], fontsize="x-small", va="bottom")
        near = (min(max(x, a), a + width), min(max(y, b), b + height))
        if math.dist((x, y), near) > radius + 10:
            ends = [axes.transData.inverted().transform(end) for end in ((x, y), near)]
            axes.plot(*zip(*ends, strict=True), color="0.6", linewidth=0.6, zorder=0, scalex=False, scaley=False)
    write(figure, path)


def _dot(row: Mapping[str, str]) -> float:
    """Area of a checkpoint's dot in square points."""
    return 15 + 40 * float(row["bytes"]) / 1e6
