"""Rows and tables of what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from spikezoo.evaluate import environment
from spikezoo.models._base import SpikingModel
from tools.benchmark.models import random_images
from tools.benchmark.settings import Row, Settings
from tools.benchmark.sides import Side


def _ratios(slow: Side, fast: Side) -> list[float]:
    return [a / b for a, b in zip(slow.times, fast.times, strict=True)]


def describe(settings: Settings, model: SpikingModel) -> Row:
    """What all rows of a network share."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_images(model, 1))
    rates = cast(dict[str, float], model.rates)
    return {
        "model": settings.model,
        "T": model.T,
        "img_size": "x".join(map(str, model.img_size)),
        "num_classes": model.num_classes,
        "surrogate": model.neuron_config.surrogate,
        "width": settings.width,
        "ticket": settings.ticket,
        "macs": counter.get_total_flops() // 2,
        "firing_rate": round(sum(rates.values()) / max(len(rates), 1), 4),
        "silent_layers": sum(rate == 0 for rate in rates.values()),
    }


def make_rows(settings: Settings, sides: Sequence[Side], shared: Row, memory: Mapping[str, float] = {}) -> list[Row]:
    """One row a side, ours first; ``speedup`` is how many times as fast ours is as the row's side.

    Args:
        settings: What was measured.
        sides: Our side and the baselines, with their times.
        shared: Columns that all rows have in common, of :func:`describe`.
        memory: Peak memory of the sides in MiB.
    """
    facts, ours = environment(), sides[0]
    limit = next((side for side in sides if side.name == "conv-limit"), None)
    rows = []
    for side in sides:
        ratios, step_s = _ratios(side, ours), median(side.times)
        rows.append(
            {
                "mode": settings.mode,
                **shared,
                "batch_size": settings.batch_size,
                "side": side.name,
                "form": side.form,
                "parameters": side.parameters,
                "images_per_s": round(settings.batch_size / step_s, 2),
                "step_ms": round(1e3 * step_s, 3),
                "step_ms_min": round(1e3 * min(side.times), 3),
                "step_ms_max": round(1e3 * max(side.times), 3),
                "first_step_s": round(side.first_s, 3),
                "speedup": round(median(ratios), 4),
                "speedup_min": round(min(ratios), 4),
                "speedup_max": round(max(ratios), 4),
                "share_of_conv_limit": round(median(_ratios(limit, side)), 4) if limit else None,
                "bit_equal": None,
                "argmax_agree": None,
                **side.check(),
                "memory_mb": round(memory[side.name], 1) if memory else None,
                "memory_ratio": round(memory[ours.name] / memory[side.name], 4) if memory else None,
                "device": settings.device,
                "repeats": settings.repeats,
                "warmup": settings.warmup,
                **facts,
                "notes": side.notes,
            }
        )
    return rows


def footer(row: Row) -> list[str]:
    """Lines below a table: machine, versions, commit."""
    yes = {True: "yes", False: "no"}
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "timm", "spikingjelly", "spikezoo-snn"))
    return [
        f"- {versions}, commit {row['commit']}, {row['date']}",
        f"- {row['machine']}, {row['threads']} threads, AMX {yes[row['amx']]}, AVX512-bf16 {yes[row['avx512_bf16']]}",
    ]


# Title of a column, and its cell; one that no row has a value for is left out.
_COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "side": ("side", lambda r: r["side"]),
    "form": ("form", lambda r: r["form"]),
    "parameters": ("parameters", lambda r: f"{r['parameters']:,}"),
    "images_per_s": ("images/s", lambda r: f"{r['images_per_s']:.1f}"),
    "step_ms": (
        "step ms: median (min-max)",
        lambda r: f"{r['step_ms']:.1f} ({r['step_ms_min']:.1f}-{r['step_ms_max']:.1f})",
    ),
    "first_step_s": ("first step s", lambda r: f"{r['first_step_s']:.2f}"),
    "speedup": (
        "ours is faster (min-max)",
        lambda r: f"{r['speedup']:.2f} ({r['speedup_min']:.2f}-{r['speedup_max']:.2f})",
    ),
    "share_of_conv_limit": ("share of conv limit", lambda r: f"{r['share_of_conv_limit']:.2f}"),
    "bit_equal": ("bit-equal", lambda r: "yes" if r["bit_equal"] else "no"),
    "argmax_agree": ("same arg-max", lambda r: f"{r['argmax_agree']:.1%}"),
    "memory_mb": ("memory MiB", lambda r: f"{r['memory_mb']:.0f}"),
    "memory_ratio": ("ours over it", lambda r: f"{r['memory_ratio']:.2f}"),
}


def markdown(rows: Sequence[Row]) -> str:
    """The rows of steps as tables for people, one for every network, with the facts that they share below it."""
    lines: list[str] = []
    keys = ("model", "mode", "T", "batch_size", "img_size", "surrogate", "width", "ticket")
    for _, group in itertools.groupby(rows, lambda row: [row[key] for key in keys]):
        same = list(group)
        first = same[0]
        told = ("width", "ticket", *(["surrogate"] if first["mode"] == "train" else []))
        extras = [f"{key} {first[key]}" for key in told if first[key] is not None]
        lines += [
            ", ".join(
                [
                    f"{first['model']}, {first['mode']}, T={first['T']}, batch {first['batch_size']}",
                    f"{first['img_size']} pixels, {first['num_classes']} classes",
                    *extras,
                    f"{first['macs'] / 1e6:,.1f} M MACs an image, firing rate {first['firing_rate']:.3f}",
                    f"{first['repeats']} repeats after {first['warmup']} warm-up steps",
                ]
            ),
            "",
        ]
        lines += table([name for name in _COLUMNS if any(row[name] is not None for row in same)], same)
        lines += ["", *(f"- {note}" for note in dict.fromkeys(row["notes"] for row in same) if note)]
    return "\n".join([*lines, f"- device {rows[0]['device']}", *footer(rows[0])])


def table(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The head and the rows of a table with some of ``_COLUMNS``."""
    lines = ["| " + " | ".join(_COLUMNS[name][0] for name in names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = ("" if row[name] is None else _COLUMNS[name][1](row) for name in names)
        lines.append("| " + " | ".join(cells) + " |")
    return lines
