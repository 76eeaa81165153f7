"""What time grows with: a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spikezoo.checkpoint import atomic
from spikezoo.pictures import check_picture, plain_ticks
from tools.benchmark.report import footer
from tools.benchmark.settings import SWEPT, Row


def growth_markdown(rows: Sequence[Row], varied: Sequence[str]) -> str:
    """The rows of several settings as one table for people.

    Args:
        rows: Of :func:`step_rows`.
        varied: One or two of ``SWEPT``.
    """
    first = rows[0]
    same = [f"{key} {first[key]}" for key in SWEPT if key not in varied and first[key] is not None]
    heads = [*varied, "side", "form", "M MACs an image", "ms an image", "G MACs/s", "memory MiB"]
    heads = heads if first["memory_mb"] is not None else heads[:-1]
    lines = [f"{first['model']}, {first['mode']}, {', '.join(same)}", "", "| " + " | ".join(heads) + " |"]
    lines.append("|---" * len(heads) + "|")
    for row in rows:
        speed = row["images_per_s"]
        cells = [*(str(row[name]) for name in varied), row["side"], row["form"], f"{row['macs'] / 1e6:,.1f}"]
        cells += [f"{1e3 / speed:.3f}", f"{speed * row['macs'] / 1e9:.1f}"]
        cells += [] if row["memory_mb"] is None else [f"{row['memory_mb']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"- device {first['device']}", *footer(first)])


def draw_growth(rows: Sequence[Row], varied: Sequence[str], path: str | Path) -> None:
    """Draw the time of an image over what varies, one curve for each value of the second, and dashed what its MACs say.

    Args:
        rows: Of :func:`step_rows`; those of our side are drawn.
        varied: One or two of ``SWEPT``.
        path: Picture file; the suffix names the format.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure = check_picture(path)(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    ours = [row for row in rows if row["side"] == "spikezoo"]
    *rest, main = reversed(varied)
    for index, key in enumerate(dict.fromkeys(tuple(row[name] for name in rest) for row in ours)):
        curve = [row for row in ours if tuple(row[name] for name in rest) == key]
        x = [int(row[main].split("x")[0]) if main == "img_size" else row[main] for row in curve]
        label = ", ".join(f"{name}={value}" for name, value in zip(rest, key, strict=True)) or "measured"
        first = 1 / curve[0]["images_per_s"]
        work = [1e3 * first * row["macs"] / curve[0]["macs"] for row in curve]
        axes.plot(x, [1e3 / row["images_per_s"] for row in curve], "o-", color=f"C{index}", label=label)
        axes.plot(x, work, "--", color=f"C{index}", alpha=0.6, label=None if index else "as its MACs grow")
    # A sparsity of 0 has no logarithm.
    axes.set(xscale="linear" if main == "ticket" else "log", yscale="log", xlabel=main, ylabel="ms an image")
    form = ours[0]["form"].partition(", compiled")[0]
    axes.set_title(f"{ours[0]['model']}, {ours[0]['mode']}, {form}", fontsize="medium")
    axes.set_xticks(x, [str(value) for value in x])
    axes.set_xticks([], minor=True)
    plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format=Path(path).suffix[1:].lower())
