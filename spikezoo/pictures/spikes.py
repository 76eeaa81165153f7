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

__all__ = ["answer_of", "draw_potentials", "draw_raster", "potentials", "spikes_over_time"]


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
    neurons, chosen = _neurons(model, layer)
    found = outputs(model, image[None], neurons)
    spikes = {name: out[:, 0].flatten(1).float().cpu() for name, out in found.items()}
    return chosen, spikes[chosen], {name: out.mean(1).tolist() for name, out in spikes.items()}


def _neurons(model: nn.Module, layer: str | None) -> tuple[list[str], str]:
    """Names of all layers of neurons of a model, and of those that are asked for."""
    named = dict(model.named_modules())
    neurons = [name for name, module in named.items() if isinstance(module, SpikingNeuron)]
    if not neurons:
        raise ValueError(f"This {type(model).__name__} has no spiking neurons: its neurons have no time.")
    if layer is not None and layer not in named:
        raise ValueError(f"layer={layer!r} is no layer of this {type(model).__name__}. {nearest(layer, named)}")
    inside = [name for name in neurons if layer is None or name == layer or name.startswith(f"{layer}.")]
    if not inside:
        raise ValueError(f"layer={layer!r} has no spiking neurons. {nearest(str(layer), neurons)}")
    return neurons, neurons[len(neurons) // 2] if layer is None else inside[-1]


@torch.no_grad()
def potentials(
    model: nn.Module, images: Tensor, layer: str | None = None
) -> tuple[str, list[Tensor], list[Tensor], float]:
    """Membrane potentials of one layer at every time step: as they are charged, and as they meet the threshold.

    The two differ where a membrane norm stands between them.

    Args:
        model: The model; observed in evaluation mode.
        images: A batch as the model takes it.
        layer: As for :func:`spikes_over_time`.

    Returns:
        The name of the neurons' layer, of every time step the potentials before and after the norm, and the threshold.

    Raises:
        ValueError: An unknown layer, or one without spiking neurons.
    """
    twin = observing_copy(model).eval()
    _, chosen = _neurons(twin, layer)
    neuron = twin.get_submodule(chosen)
    assert isinstance(neuron, SpikingNeuron)
    charged: list[Tensor] = []
    compared: list[Tensor] = []
    distance, threshold = neuron.distance, neuron.config.threshold
    normed = neuron.norm is not None or neuron.folded is not None

    def watch(u: Tensor) -> Tensor:
        away = distance(u)
        charged.append(u.flatten().float().cpu())
        compared.append((away + threshold).flatten().float().cpu() if normed else charged[-1])
        return away

    vars(neuron)["distance"] = watch  # of this copy alone
    twin(images)
    return chosen, charged, compared, threshold


def draw_potentials(
    columns: Sequence[tuple[str, Sequence[Tensor], Sequence[Tensor], float]], path: str | Path, title: str = ""
) -> None:
    """Draw how the membrane potentials of nets are distributed at every time step, before and after a norm.

    Args:
        columns: Of each net its caption and what :func:`potentials` returns behind the name.
        path: Picture file; the suffix names the format.
        title: Title of the picture.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure = check_picture(path)(figsize=(4 * len(columns), 4), layout="constrained")
    every = torch.cat([part for _, charged, compared, _ in columns for part in (*charged, *compared)]).sort().values
    edges = (float(every[len(every) // 500]), float(every[-1 - len(every) // 500]))  # without the few far outside
    for axis, (caption, charged, compared, threshold) in zip(
        figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0], columns, strict=True
    ):
        normed = any(not torch.equal(a, b) for a, b in zip(charged, compared, strict=True))
        for step, (before, after) in enumerate(zip(charged, compared, strict=True)):
            shown = [("", "-", before), (", normed", "--", after)][: 1 + normed]
            for said, style, values in shown:
                axis.hist(
                    values.numpy(), 100, range=edges, density=True, histtype="step",
                    color=f"C{step}", linestyle=style, label=f"step {step + 1}{said}",
                )  # fmt: skip
        axis.axvline(threshold, color="black", linestyle=":", linewidth=1, label=f"threshold {threshold:g}")
        axis.set(xlabel="membrane potential", title=caption)
        axis.title.set_fontsize("small")
        axis.legend(frameon=False, fontsize="x-small")
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    write(figure, path)


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
