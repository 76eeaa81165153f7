"""Pictures of what a model sees: event frames, patches, and activation maps of several models side by side.

The activation maps of an ANN, a binary-activation network and a binary ticket are figure 1 of "Gaining the Sparse
Rewards by Exploring Binary Lottery Tickets in Spiking Neural Network".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from spikezoo.checks import nearest
from spikezoo.models import SpikingModel
from spikezoo.neurons import ReLU, Sign, SpikingNeuron
from spikezoo.observe import outputs
from spikezoo.pictures.figure import bare, check_picture, event_pixels, write

__all__ = ["activation_maps", "caption", "draw_activations", "draw_events", "draw_patches"]

# Of these transforms a caption gives the arguments that make the difference.
CAPTIONS = {
    "ticket": ("kind", "sparsity"),
    "multisp": ("pep_sparsity", "patch_ratio"),
    "dynsnn": ("per", "threshold", "compression"),
}


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
        bare(axis)
    for step, (axis, pixels, frame) in enumerate(zip(axes.flat, event_pixels(frames), frames, strict=False)):
        axis.imshow(pixels.numpy(), interpolation="nearest")
        off, on = (f"{events:,.0f}" for events in frame.sum((1, 2)))
        axis.set_xlabel(f"{step}: {off} off, {on} on", fontsize="x-small")
    figure.suptitle(f"{title}\nblue off, red on", fontsize="medium")
    write(figure, path)


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
        bare(axis)
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
    write(figure, path)


def activation_maps(model: nn.Module, image: Tensor, layer: str | None = None) -> tuple[str, Tensor]:
    """Output of one layer for one image, averaged over the time steps.

    Args:
        model: The model; observed in evaluation mode.
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
    found = outputs(model, image[None], {*neurons, *([] if layer is None else [layer])})
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


def caption(model: SpikingModel) -> str:
    """Architecture, neuron and transforms of a model, a line each."""
    lines = [model.pretrained_cfg["architecture"], f"{model.neuron_config.kind}, T={model.T}"]
    for name, arguments in model.recipe:
        said = [f"{key}={arguments[key]}" for key in CAPTIONS.get(name, ()) if key in arguments]
        lines.append(" ".join([name, *said]))
    return "\n".join(lines if model.recipe else [*lines, "dense weights"])


def draw_activations(
    columns: Sequence[tuple[str, Tensor]],
    pixels: Tensor,
    path: str | Path,
    channels: int = 4,
    title: str = "",
) -> None:
    """Draw the activation maps of several models for one image side by side.

    The first row is the mean over all channels; below are single channels, of every model those that vary most over
    the map (channels of models that were trained apart do not correspond). All maps share one scale, so that colours
    compare; it ends at the 99.9th percentile.

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
        bare(axis)
    axes[0, 0].imshow(pixels.numpy())
    axes[0, 0].set_title("image", fontsize="small")
    signed = any(bool((maps < 0).any()) for _, maps in columns)
    # The brightest of many values would leave the others in the dark.
    limit = max(float(maps.abs().flatten().quantile(0.999)) for _, maps in columns)
    limit = limit or max(float(maps.abs().max()) for _, maps in columns) or 1.0
    scale = {"cmap": "RdBu_r" if signed else "magma", "vmin": -limit if signed else 0, "vmax": limit}
    for column, (text, maps) in enumerate(columns, 1):
        varying = maps.flatten(1).std(1).topk(min(channels, len(maps))).indices.sort().values.tolist()
        panels = [(f"mean of {len(maps)} channels", maps.mean(0)), *((f"channel {i}", maps[i]) for i in varying)]
        for axis, (label, panel) in zip(axes[:, column], panels, strict=False):  # a layer may have fewer channels
            drawn = axis.imshow(panel.numpy(), **scale)
            axis.set_xlabel(label, fontsize="x-small")
        axes[0, column].set_title(text, fontsize="small")
    beyond = "max" if any(float(maps.max()) > limit for _, maps in columns) else "neither"
    figure.colorbar(
        drawn, ax=axes[:, 0], location="left", shrink=0.5, extend=beyond, label="activation, mean over time"
    )
    figure.suptitle(title, fontsize="medium")
    write(figure, path)
