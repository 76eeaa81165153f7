"""Pictures of the spikes of one input over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from spikezoo.checks import nearest
from spikezoo.neurons import SpikingNeuron
from spikezoo.observe import outputs
from spikezoo.pictures.figure import check_picture, write

__all__ = ["draw_raster", "spikes_over_time"]


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
    write(figure, path)
