"""Pictures of what a model sees and does: patches, activation maps, event frames, spikes, rates and accuracy over time.

Papers: the activation maps of an ANN, a binary-activation network and a binary ticket, side by side, are figure 1 of
"Gaining the Sparse Rewards by Exploring Binary Lottery Tickets in Spiking Neural Network"; firing rates before and
after, and accuracy over the threshold, are figures 3 and 4 of "DynSNN: A Dynamic Approach to Reduce Redundancy in
Spiking Neural Networks".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikezoo.checkpoint import atomic
from spikezoo.checks import nearest
from spikezoo.neurons import ReLU, Sign, SpikingNeuron

__all__ = [
    "activation_maps",
    "check_picture",
    "draw_accuracy",
    "draw_activations",
    "draw_events",
    "draw_patches",
    "draw_raster",
    "draw_rates",
    "draw_thresholds",
    "draw_zoo",
    "event_pixels",
    "place_labels",
    "spikes_over_time",
    "to_pixels",
]

FORMATS = (".png", ".pdf", ".svg")
# Of these transforms a caption gives the arguments that make the difference.
CAPTIONS = {
    "ticket": ("kind", "sparsity"),
    "multisp": ("pep_sparsity", "patch_ratio"),
    "dynsnn": ("per", "threshold", "compression"),
}


def check_picture(path: str | Path) -> Any:
    """Matplotlib's ``Figure``, if a picture can be drawn and written to ``path``.

    Raises:
        ValueError: A name without a known suffix, or matplotlib is missing.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"Picture {str(path)!r}: expected a name that ends in {', '.join(FORMATS)}.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("A picture needs matplotlib: pip install 'spikezoo-snn[plot]'") from error
    return Figure


def _write(figure: Any, path: str | Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format=Path(path).suffix[1:].lower())


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation of images; of event frames sum over time and give the polarities colours.

    Args:
        images: ``[B, C, H, W]`` with 1 or 3 channels, or ``[B, T, 2, H, W]``.
        mean: What was subtracted, a channel.
        std: What it was divided by.

    Returns:
        ``[B, H, W, 3]`` in [0, 1].

    Raises:
        ValueError: Another number of channels.
    """
    shift, scale = (torch.tensor(value).view(-1, 1, 1) for value in (mean, std))
    if images.dim() == 5 and images.shape[2] == 2:
        return event_pixels((images.cpu() * scale + shift).sum(1))
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"Input of shape {tuple(images.shape)}: expected images of 1 or 3 channels, which have colours."
        )
    return (images.cpu() * scale + shift).clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def _bare(axis: Any) -> None:
    """No ticks and no frame."""
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


# --------------------------------------------------------------------------------------------------------------
# Event frames
# --------------------------------------------------------------------------------------------------------------

# What an event takes from white: off leaves blue, on leaves red, and both together black.
OFF_ON = ((0.87, 0.53, 0.29), (0.16, 0.85, 0.84))


def event_pixels(frames: Tensor) -> Tensor:
    """Colour event frames: blue where the light went off, red where it went on, white where nothing happened.

    Args:
        frames: Numbers of events ``[..., 2, H, W]``, off and on. All share one scale, which ends at the 99th percentile
            of the pixels that saw events, lest one restless pixel hide the others.

    Returns:
        ``[..., H, W, 3]`` in [0, 1].
    """
    seen = frames[frames > 0].float()
    # At least the smallest, for frames of few pixels; torch's quantile refuses many numbers.
    limit = seen.sort().values[int(0.99 * (len(seen) - 1))] if len(seen) else torch.tensor(1.0)
    strength = (frames.float() / limit).clamp(0, 1)
    return (1 - strength.movedim(-3, -1) @ torch.tensor(OFF_ON)).clamp(0, 1)


def draw_events(frames: Tensor, path: str | Path, title: str = "") -> None:
    """Draw the event frames of one recording, in order, with the number of events of each.

    Args:
        frames: Numbers of events ``[T, 2, H, W]``, off and on.
        path: Picture file; the suffix names the format.
        title: Title of the picture.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure_type = check_picture(path)
    across = min(len(frames), 8)
    bands = -(-len(frames) // across)
    figure = figure_type(figsize=(max(1.5 * across, 4) + 0.4, 1.75 * bands + 0.7), layout="constrained")
    axes = figure.subplots(bands, across, squeeze=False)
    for axis in axes.flat:
        _bare(axis)
    for step, (axis, pixels, frame) in enumerate(zip(axes.flat, event_pixels(frames), frames, strict=False)):
        axis.imshow(pixels.numpy(), interpolation="nearest")
        off, on = (f"{events:,.0f}" for events in frame.sum((1, 2)))
        axis.set_xlabel(f"{step}: {off} off, {on} on", fontsize="x-small")
    figure.suptitle(f"{title}\nblue off, red on", fontsize="medium")
    _write(figure, path)


# --------------------------------------------------------------------------------------------------------------
# Spikes over time
# --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def spikes_over_time(
    model: nn.Module, image: Tensor, layer: str | None = None
) -> tuple[str, Tensor, dict[str, list[float]]]:
    """Every spike of one layer for one input, and the firing rates of all layers.

    Args:
        model: The model; it is run in evaluation mode.
        image: ``[C, H, W]``, or event frames ``[T, 2, H, W]``, as the model takes it.
        layer: Name of a module, of whose neurons the last are taken. None takes those in the middle of the model.

    Returns:
        The name of the neurons' layer, its spikes ``[T, neurons]``, and of every layer its rate at each time step.

    Raises:
        ValueError: An unknown layer, or one without spiking neurons.
    """
    named = dict(model.named_modules())
    neurons = [name for name, module in named.items() if isinstance(module, SpikingNeuron)]
    if not neurons:
        raise ValueError(f"This {type(model).__name__} has no spiking neurons: its neurons have no time.")
    if layer is not None and layer not in named:
        raise ValueError(f"layer={layer!r} is no layer of this {type(model).__name__}. {nearest(layer, named)}")
    inside = [name for name in neurons if layer is None or name == layer or name.startswith(f"{layer}.")]
    if not inside:
        raise ValueError(f"layer={layer!r} has no spiking neurons. {nearest(str(layer), neurons)}")
    chosen = neurons[len(neurons) // 2] if layer is None else inside[-1]
    found: dict[str, Tensor] = {}
    handles = [
        named[name].register_forward_hook(lambda _module, _inputs, out, name=name: found.update({name: out}))
        for name in neurons
    ]
    training = model.training
    try:
        model.eval()(image[None])
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    spikes = {name: out[:, 0].flatten(1).float().cpu() for name, out in found.items()}
    return chosen, spikes[chosen], {name: out.mean(1).tolist() for name, out in spikes.items()}


def draw_raster(
    layer: str,
    spikes: Tensor,
    rates: Mapping[str, Sequence[float]],
    path: str | Path,
    neurons: int = 200,
    title: str = "",
) -> None:
    """Draw the raster of a layer's spikes, and below it the firing rate of every layer, over the time steps.

    Args:
        layer: Name of the layer; its rate is drawn in black.
        spikes: ``[T, neurons]``.
        rates: Layer -> rate at each time step, in the order of the model.
        path: Picture file; the suffix names the format.
        neurons: How many neurons to draw, evenly chosen among all.
        title: Title of the picture.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure_type = check_picture(path)
    from matplotlib import colormaps

    steps, total = spikes.shape
    shown = torch.linspace(0, total - 1, min(neurons, total)).round().long()
    figure = figure_type(figsize=(7, 7), layout="constrained")
    raster, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    raster.imshow(spikes[:, shown].T.numpy(), cmap="binary", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    raster.set(ylabel=f"{len(shown):,} of {total:,} neurons", yticks=[])
    silent = (spikes.sum(0) == 0).float().mean()
    raster.set_title(f"{layer}: {100 * silent:.0f} % of the neurons never fire", fontsize="small")
    for number, (name, values) in enumerate(rates.items()):
        own = name == layer
        colour = "black" if own else colormaps["viridis"](number / max(len(rates) - 1, 1))
        rate.plot(range(len(values)), values, "o-", color=colour, markersize=3, linewidth=2 if own else 1, label=name)
    rate.set(xlabel="time step", ylabel="firing rate", xlim=(-0.5, steps - 0.5))
    rate.set_ylim(bottom=0)
    rate.xaxis.get_major_locator().set_params(integer=True)
    rate.grid(alpha=0.3)
    if len(rates) <= 24:
        figure.legend(*rate.get_legend_handles_labels(), loc="outside right center", fontsize="xx-small")
    figure.suptitle(title, fontsize="medium")
    _write(figure, path)


# --------------------------------------------------------------------------------------------------------------
# Patches
# --------------------------------------------------------------------------------------------------------------


def draw_patches(pixels: Tensor, mask: Tensor, path: str | Path, title: str = "") -> None:
    """Draw images above the same images with the patches greyed out that a model does not keep.

    A patch is drawn as the square of pixels that its place in the map stands for; its features see more, since the
    convolutions overlap.

    Args:
        pixels: Images ``[B, H, W, 3]`` in [0, 1].
        mask: Which patches are kept, ``[B, h, w]``, see :func:`spikezoo.transforms.multisp.kept_patches`.
        path: Picture file; the suffix names the format.
        title: Title of the picture.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure_type = check_picture(path)
    across = min(len(pixels), 8)
    bands = -(-len(pixels) // across)
    figure = figure_type(figsize=(1.25 * across + 0.6, 2.6 * bands + 0.5), layout="constrained")
    axes = figure.subplots(2 * bands, across, squeeze=False)
    for axis in axes.flat:
        _bare(axis)
    shown = nn.functional.interpolate(mask[:, None].float(), pixels.shape[1:3])[:, 0, :, :, None].bool()
    grey = 0.55 + 0.25 * pixels.mean(-1, keepdim=True)
    for index, (image, rest) in enumerate(zip(pixels, torch.where(shown, pixels, grey), strict=True)):
        band, column = divmod(index, across)
        axes[2 * band, column].imshow(image.numpy())
        axes[2 * band + 1, column].imshow(rest.numpy())
    for band in range(bands):
        axes[2 * band, 0].set_ylabel("image")
        axes[2 * band + 1, 0].set_ylabel(f"{int(mask[0].sum())} of {mask[0].numel()} patches")
    figure.suptitle(title, fontsize="medium")
    _write(figure, path)


# --------------------------------------------------------------------------------------------------------------
# Activation maps
# --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def activation_maps(model: nn.Module, image: Tensor, layer: str | None = None) -> tuple[str, Tensor]:
    """Output of one layer for one image, averaged over the time steps.

    Args:
        model: The model; it is run in evaluation mode.
        image: ``[C, H, W]`` as the model takes it.
        layer: Name of a module; of a sequence its last one is taken. None takes the neuron in the middle of those whose
            output is a map.

    Returns:
        The name of the layer, and its output ``[C', h, w]``.

    Raises:
        ValueError: An unknown layer, or one whose output is no map.
    """
    named = {name: module for name, module in model.named_modules() if name}
    neurons = [name for name, module in named.items() if isinstance(module, SpikingNeuron | ReLU | Sign)]
    if layer is not None and layer not in named:
        raise ValueError(f"layer={layer!r} is no layer of this {type(model).__name__}. {nearest(layer, named)}")
    while layer is not None and isinstance(named[layer], nn.Sequential):  # a stage runs its blocks, not itself
        layer = f"{layer}.{len(named[layer]) - 1}"
    found: dict[str, Tensor] = {}
    handles = [
        named[name].register_forward_hook(lambda _module, _inputs, out, name=name: found.update({name: out}))
        for name in {*neurons, *([] if layer is None else [layer])}
    ]
    training = model.training
    try:
        model.eval()(image[None])
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    maps = [name for name in neurons if name in found and found[name].dim() == 5 and min(found[name].shape[3:]) > 1]
    if layer is None:
        if not maps:
            raise ValueError(f"No neuron of this {type(model).__name__} puts out a map.")
        layer = maps[len(maps) // 2]
    out = found.get(layer)
    if not isinstance(out, Tensor) or out.dim() != 5 or min(out.shape[3:]) == 1:
        shape = tuple(out.shape) if isinstance(out, Tensor) else None
        raise ValueError(
            f"layer={layer!r} puts out {'no tensor' if shape is None else shape}: expected a map [T, B, C, h, w] of "
            f"more than one row and column, such as that of {' or '.join(map(repr, maps[:3])) or 'no layer here'}."
        )
    return layer, out.mean(0)[0].float().cpu()


def caption(model: Any) -> str:
    """Architecture, neuron and transforms of a model, a line each."""
    lines = [model.pretrained_cfg["architecture"], f"{model.neuron_config.kind}, T={model.T}"]
    for name, arguments in model.recipe:
        said = [f"{key}={arguments[key]}" for key in CAPTIONS.get(name, ()) if key in arguments]
        lines.append(" ".join([name, *said]))
    return "\n".join(lines if model.recipe else [*lines, "dense weights"])


def _bar(figure: Any, axes: Any, panels: Sequence[tuple[str, Tensor]], signed: bool) -> None:
    """Draw maps ``[h, w]`` on one scale, with its bar below them."""
    limit = max(float(panel.abs().max()) for _, panel in panels) or 1.0
    scale = {"cmap": "RdBu_r" if signed else "magma", "vmin": -limit if signed else 0, "vmax": limit}
    for axis, (label, panel) in zip(axes, panels, strict=False):  # a layer may have fewer channels
        drawn = axis.imshow(panel.numpy(), **scale)
        axis.set_xlabel(label, fontsize="x-small")
    figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.8, pad=0.01).ax.tick_params(labelsize=7)


def draw_activations(
    columns: Sequence[tuple[str, Tensor]],
    pixels: Tensor,
    path: str | Path,
    channels: int = 4,
    title: str = "",
) -> None:
    """Draw the activation maps of several models for one image side by side.

    The first row is the mean over all channels; below are single channels, of every model those that vary most over
    the map (channels of models that were trained apart do not correspond). The mean has its own scale, as has every
    model.

    Args:
        columns: Of every model its caption and its maps ``[C, h, w]``.
        pixels: The image, ``[H, W, 3]`` in [0, 1].
        path: Picture file; the suffix names the format.
        channels: How many single channels.
        title: Title of the picture.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure_type = check_picture(path)
    figure = figure_type(figsize=(2.3 * (len(columns) + 1), 1.85 * (channels + 1) + 1.5), layout="constrained")
    axes = figure.subplots(channels + 1, len(columns) + 1, squeeze=False)
    for axis in axes.flat:
        _bare(axis)
    axes[0, 0].imshow(pixels.numpy())
    axes[0, 0].set_title("image", fontsize="small")
    for column, (text, maps) in enumerate(columns, 1):
        varying = maps.flatten(1).std(1).topk(min(channels, len(maps))).indices.sort().values.tolist()
        signed = bool((maps < 0).any())
        _bar(figure, axes[:1, column], [(f"mean of {len(maps)} channels", maps.mean(0))], signed)
        if varying:
            _bar(figure, axes[1:, column], [(f"channel {index}", maps[index]) for index in varying], signed)
        axes[0, column].set_title(text, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    _write(figure, path)


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
    _write(figure, path)


# --------------------------------------------------------------------------------------------------------------
# Firing rates
# --------------------------------------------------------------------------------------------------------------


def draw_rates(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], threshold: float, path: str | Path, title: str = ""
) -> None:
    """Draw the firing rates of single neurons before and after some were removed: sorted, and how many have which.

    Args:
        before: Rates of every layer, see :func:`spikezoo.transforms.dynsnn.neuron_rates`.
        after: Rates of the neurons that are left, of every layer.
        threshold: Below it neurons were removed.
        path: Picture file; the suffix names the format.
        title: Title of the picture.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure = check_picture(path)(figsize=(9, 3.5), layout="constrained")
    ranked, binned = figure.subplots(1, 2)
    highest = max(threshold, *(float(rate.max()) for rate in before.values())) or 1.0
    for label, color, rates in (("before", "C7", before), ("after", "C3", after)):
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
    _write(figure, path)


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
    _write(figure, path)


# --------------------------------------------------------------------------------------------------------------
# The zoo
# --------------------------------------------------------------------------------------------------------------


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
    _write(figure, path)


def _dot(row: Mapping[str, str]) -> float:
    """Area of a checkpoint's dot in square points."""
    return 15 + 40 * float(row["bytes"]) / 1e6
