"""What a search leaves behind: a table as text, search.csv, a config for train.py, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from spikezoo.checkpoint import atomic
from spikezoo.data import natural_dataset
from spikezoo.evaluate import write_rows
from spikezoo.search.exhaustive import Result
from spikezoo.search.metrics import find_metric
from spikezoo.search.space import Constraints, Net, Setting, Space

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Spikformer's recipes, in train.py's words.
RECIPE: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 128,
    "opt": "adamw",
    "lr": 5e-4,
    "weight_decay": 0.06,
    "sched": "cosine",
    "sched_on_updates": False,
    "warmup_epochs": 20,
    "warmup_lr": 1e-5,
    "min_lr": 1e-5,
    "cooldown_epochs": 10,
    "hflip": 0.5,
    "crop_padding": 0,
    "aa": "rand-m9-n1-mstd0.4-inc1",
    "reprob": 0.25,
    "mixup": 0.5,
    "smoothing": 0.1,
    "amp": True,
    "channels_last": True,
    "seed": 42,
}
RECIPE_IMAGENET: dict[str, Any] = {
    **{key: value for key, value in RECIPE.items() if key != "crop_padding"},
    "batch_size": 24,
    "weight_decay": 0.05,
    "warmup_lr": 1e-6,
    "aa": "rand-m9-mstd0.5-inc1",
    "mixup": 0.8,
    "cutmix": 1.0,
    "workers": 8,
}


def train_config(net: Net, setting: Setting, dataset: str | None = None) -> dict[str, Any]:
    """The keys of a YAML file that train.py takes: the net, its data where they are plain, Spikformer's recipe."""
    config: dict[str, Any] = {"model": setting.model, "T": setting.T, "model_kwargs": net.arguments()}
    with suppress(ValueError):  # where no dataset has this shape, the file says that one is to be named
        config["dataset"] = dataset or natural_dataset(setting.img_size, setting.in_chans, setting.num_classes)
    if config.get("dataset") == "imagenet":
        config["val_split"] = "val"
    for key in ("num_classes", "in_chans", "img_size"):
        config[key] = getattr(setting, key)
    return {**config, **(RECIPE_IMAGENET if setting.large else RECIPE)}


def _rows(result: Result) -> list[dict[str, Any]]:
    front = {item.net for item in result.front}
    ranked = {item.net: place for place, item in enumerate(result.found, 1)}
    rows = []
    for item in [*result.found, *(item for item in result.front if item.net not in ranked)]:
        rows.append(
            {
                "rank": ranked.get(item.net, ""),
                "pareto": item.net in front,
                "dim": item.net.dim,
                "depth": item.net.depth,
                "mlp_ratios": list(item.net.mlp_ratios),
                "heads": list(item.net.heads),
                "value": item.value,
                "parameters": item.parameters,
                "flops": item.flops,
                "nets": "" if item.nets is None else item.nets,
                "latency_ms": "" if item.latency_ms is None else round(item.latency_ms, 3),
            }
        )
    return rows


def table(result: Result, metric: str) -> str:
    """The found nets as text: parameters and MACs in millions."""
    better = "higher" if find_metric(metric).higher_is_better else "lower"
    header = ["", "net", f"{metric} ({better} is better)", "parameters (M)", "MACs, all steps (M)", "on the front"]
    front = {item.net for item in result.front}
    lines = [header]
    for place, item in enumerate(result.found, 1):
        yes = "yes" if item.net in front else ""
        value = f"{item.value / 1e6:.3f} M" if find_metric(metric).analytic else f"{item.value:.6g}"
        line = [f"{place}", str(item.net), value, f"{item.parameters / 1e6:.4f}", f"{item.flops / 1e6:.1f}", yes]
        lines.append(line)
    for name, shown in (
        ("latency (ms)", [item.latency_ms for item in result.found]),
        ("nets like it", [item.nets for item in result.found]),
    ):
        if any(value is not None for value in shown):
            for line, text in zip(lines, [name, *shown], strict=True):
                line.append(text if isinstance(text, str) else f"{text:,.1f}".removesuffix(".0"))
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of texts as columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def write(
    result: Result,
    folder: str | Path,
    *,
    space: Space,
    metric: str,
    setting: Setting,
    constraints: Constraints | None = None,
    dataset: str | None = None,
    command: str = "",
) -> list[Path]:
    """Write search.csv, best.yaml and, where matplotlib is installed, search.png.

    Args:
        result: What was found.
        folder: Where to; made where it is not there.
        space: What was searched, for titles and comments.
        metric: Likewise.
        setting: Likewise.
        constraints: Likewise; the window of parameters is shaded in the picture.
        dataset: What best.yaml trains on; None takes the one of this shape.
        command: How the search was called, for the comment in best.yaml.

    Returns:
        The files.
    """
    folder = Path(folder)
    paths = [folder / "search.csv", folder / "best.yaml"]
    write_rows(paths[0], _rows(result))
    best = result.found[0]
    config = train_config(best.net, setting, dataset)
    said = "the optimum of the space, proven" if result.proven else f"the best of {result.looked_at:,} nets"
    lines = [
        f"# python train.py --config {paths[1].name} --data-dir DATA",
        *([f"# Found by: {command}"] if command else []),
        f"# Space {space.name}, metric {metric}: {said}. {best.parameters:,} parameters, {best.flops / 1e6:,.1f} M "
        f"MACs at T={setting.T}. Not trained.",
        *([] if "dataset" in config else ["# Name the data: --dataset npz:PATH, folder, ..."]),
    ]
    with atomic(paths[1]) as temporary:
        text = yaml.safe_dump(config, sort_keys=False, default_flow_style=None)
        temporary.write_text("\n".join(lines) + "\n" + text, encoding="utf-8")
    picture = folder / "search.png"
    if _plot_search(result, picture, space, metric, constraints or Constraints()):
        paths.append(picture)
    return paths


def figure_of(width: float, height: float) -> Figure | None:
    """A matplotlib figure, or None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def _plot_search(result: Result, path: Path, space: Space, metric: str, constraints: Constraints) -> bool:
    figure = figure_of(7.5, 4.8)
    if figure is None:
        return False
    axes = figure.subplots()
    scale = 1e6 if find_metric(metric).analytic else 1.0
    if constraints.parameters is not None:
        low, high = constraints.parameters
        everything = [parameters for parameters, _ in result.others]
        axes.axvspan(max(low, min(everything)) / 1e6, min(high, max(everything)) / 1e6, color="#f3e3d3", zorder=0)
    axes.scatter(
        [parameters / 1e6 for parameters, _ in result.others],
        [value / scale for _, value in result.others],
        s=4,
        color="#b8c4cc",
        label="all nets" if find_metric(metric).analytic else "scored nets",
        rasterized=True,
    )
    axes.plot(
        [item.parameters / 1e6 for item in result.front],
        [item.value / scale for item in result.front],
        color="#1f6f8b",
        linewidth=1,
        drawstyle="steps-post",  # between two nets of the front there is none
        label="Pareto front",
    )
    axes.scatter(
        [item.parameters / 1e6 for item in result.found],
        [item.value / scale for item in result.found],
        s=28,
        color="#d1603d",
        label=f"the {len(result.found)} best",
    )
    best = result.found[0]
    axes.scatter(best.parameters / 1e6, best.value / scale, s=130, color="#d1603d", edgecolor="black", marker="*")
    axes.set(
        title=f"Space {space.name}: {metric} against parameters\nbest: {best.net}",
        xlabel="parameters (millions)",
        ylabel=f"{metric} (millions)" if scale > 1 else metric,
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return True
