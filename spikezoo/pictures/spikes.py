"""Pictures of the spikes of one input over time."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikezoo.checks import nearest
from spikezoo.neurons import SpikingNeuron
from spikezoo.observe import observing_copy, outputs
from spikezoo.pictures.figure import bare, check_picture, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["answer_of", "draw_raster", "spikes_over_time"]


def spikes_over_time(
    model: nn.Module, image: Tensor, layer: str | None = None
) -> tuple[str, Tensor, dict[str, list[float]]]:
    """Every spike of one layer for one input, and the firing rates of all layers.

    Args:
        model: The model; observed in evaluation mode.
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
    found = outputs(model, image[None], neurons)
    spikes = {name: out[:, 0].flatten(1).float().cpu() for name, out in found.items()}
    return chosen, spikes[chosen], {name: out.mean(1).tolist() for name, out in spikes.items()}


def answer_of(model: nn.Module, image: Tensor) -> dict[str, float]:
    """How probable a model finds each class, in per cent; by name where its weights know the names.

    Args:
        model: The model; observed in evaluation mode.
        image: ``[C, H, W]``, or event frames ``[T, 2, H, W]``, as the model takes it.
    """
    with torch.no_grad():
        shares = 100 * observing_copy(model).eval()(image[None])[0].float().softmax(0)
    names = getattr(model, "pretrained_cfg", {}).get("label_names") or []
    return {names[i] if i < len(names) else f"class {i}": value for i, value in enumerate(shares.tolist())}


def draw_raster(
    layer: str,
    spikes: Tensor,
    rates: Mapping[str, Sequence[float]],
    path: str | Path,
    neurons: int = 200,
    title: str = "",
    pixels: Tensor | None = None,
    answer: Mapping[str, float] | None = None,
) -> None:
    """Draw the raster of a layer's spikes, and below it the firing rate of every layer, over the time steps.

    Of a single step there is no course over time to see: then the image, the layers' rates and the answer are drawn.

    Args:
        layer: Name of the layer; its rate is drawn in black.
        spikes: ``[T, neurons]``.
        rates: Layer -> rate at each time step, in the order of the model.
        path: Picture file; the suffix names the format.
        neurons: How many neurons to draw, evenly chosen among all.
        title: Title of the picture.
        pixels: The image, ``[H, W, 3]`` in [0, 1].
        answer: Classes and how probable the model finds them, in per cent; the five largest are drawn.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure_type = check_picture(path)
    if len(spikes) == 1:
        _draw_step(figure_type, layer, spikes[0], rates, path, title, pixels, answer)
        return
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
    write(figure, path)


def _draw_step(
    figure_type: type[Figure],
    layer: str,
    spikes: Tensor,
    rates: Mapping[str, Sequence[float]],
    path: str | Path,
    title: str,
    pixels: Tensor | None,
    answer: Mapping[str, float] | None,
) -> None:
    """Draw the image, the rate of every layer, and the answer of a model of one time step."""
    figure = figure_type(figsize=(9, max(3.6, 1 + 0.22 * len(rates))), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 5))
    if pixels is not None:
        shown = figure.add_subplot(grid[0, 0])
        bare(shown)
        shown.imshow(pixels.numpy(), interpolation="nearest")
    if answer is not None:
        best = sorted(answer.items(), key=lambda pair: -pair[1])[:5]
        axis = figure.add_subplot(grid[1, 0])
        bars = axis.barh(range(len(best)), [value for _, value in best], color="C0")
        axis.bar_label(bars, [f"{value:.0f} %" for _, value in best], padding=2, fontsize="x-small")
        axis.set_yticks(range(len(best)), [name for name, _ in best], fontsize="small")
        axis.set(xlim=(0, 118), xticks=[], ylim=(len(best) - 0.4, -0.6), title="answer")
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.title.set_fontsize("small")
    axis = figure.add_subplot(grid[:, 1 if pixels is not None or answer is not None else slice(None)])
    colors = ["black" if name == layer else "C3" for name in rates]
    axis.barh(range(len(rates)), [values[0] for values in rates.values()], color=colors)
    axis.set_yticks(range(len(rates)), list(rates), fontsize="x-small")
    axis.set(ylim=(len(rates) - 0.4, -0.6), xlabel="firing rate: how many of a layer's neurons fired")
    axis.grid(alpha=0.3, axis="x")
    axis.set_title(f"{layer}: {int(spikes.sum()):,} of {len(spikes):,} neurons fired", fontsize="small")
    figure.suptitle("\n".join(textwrap.wrap(title, 90)), fontsize="medium")
    write(figure, path)
