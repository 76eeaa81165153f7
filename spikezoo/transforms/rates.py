"""Firing rates of a model's neurons, and what they say: which neurons fade, at which threshold, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spikezoo.checks import choice, number
from spikezoo.neurons import Maskable, SpikingNeuron
from spikezoo.observe import evaluating, observing_copy

PER = ("unit", "channel")


def hidden_neurons(model: nn.Module) -> dict[str, Maskable]:
    """The layers of hidden neurons, spiking or rectifying, by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Maskable)}
    if not found:
        raise ValueError(
            f"DynSNN goes by firing rates, and this {type(model).__name__} has no neurons that have one: create it "
            "with neuron='lif', 'if', 'plif', or 'relu' for conversion."
        )
    return found


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a model's neurons, by layer: True where they exist.

    Raises:
        ValueError: No masks, or no neurons that could have some.
    """
    found = {name: neuron.mask for name, neuron in hidden_neurons(model).items() if neuron.mask is not None}
    if not found:
        raise ValueError(
            "This model's neurons have no masks: apply 'dynsnn' to it, or create it with dynsnn=dict(per='unit')."
        )
    return found


def check_threshold(value: object) -> float:
    """A firing rate that neurons may be held against, or an error that says so."""
    wanted = "a firing rate in [0, 1], spikes per time step; neurons below it fade, so 0 removes nothing"
    return float(number("threshold", value, 0, 1, "[]", expected=wanted))


@torch.no_grad()
def neuron_rates(model: nn.Module, batches: Iterable[Any], per: str | None = None) -> dict[str, Tensor]:
    """Firing rate of every hidden neuron: spikes over time steps, averaged over samples.

    Of a ReLU that is to become a spiking neuron it is the mean activation over the layer's 99.9th percentile, which
    :func:`spikezoo.convert` takes as one spike a time step.

    The model runs in evaluation mode. Of a distributed run each rank measures its share and gets the rates of all.

    Args:
        model: A model with neurons of :mod:`spikezoo.neurons`, not compiled.
        batches: Batches that it takes, or pairs of them and labels.
        per: 'unit' or 'channel' (the mean over its map); None takes what the model's masks are made for, or 'unit'.

    Returns:
        Layer name -> rates from 0 to 1, ``[C]`` or ``[C, H, W]``, float64. A layer that did not run is left out.

    Raises:
        ValueError: No spiking neurons, no batches, or another ``per``.
    """
    if per is not None:
        choice("per", per, PER)
    model = observing_copy(model)  # threads may measure one model at once
    neurons = hidden_neurons(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sums: dict[str, Tensor] = {}
    units = dict.fromkeys(neurons, 0.0)  # what one spike stands for, times samples

    def counting(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, _inputs: object, out: Tensor) -> None:
            # In float32, since half precision holds no whole number above 256 or 2048 for sure.
            spikes = out.sum((0, 1), dtype=torch.promote_types(out.dtype, torch.float32)).double() / out.shape[0]
            sums[name] = sums[name] + spikes if name in sums else spikes
            if isinstance(module, SpikingNeuron):
                units[name] += out.shape[1]
            else:
                flat = out.flatten().float()
                units[name] += out.shape[1] * float(flat.kthvalue(math.ceil(0.999 * flat.numel())).values)

        return hook

    with evaluating(model, [(neuron, counting(name)) for name, neuron in neurons.items()]):
        for item in batches:
            model((item[0] if isinstance(item, list | tuple) else item).to(device))
    if not sums:
        raise ValueError("No batches to measure firing rates on.")
    rates = {}
    for name, total in sums.items():
        number = torch.tensor(units[name], dtype=torch.float64, device=total.device)
        if dist.is_available() and dist.is_initialized():
            for value in (total, number):
                dist.all_reduce(value)
        mask = neurons[name].mask
        whole = per == "channel" or (per is None and mask is not None and mask.dim() == 1)
        mean = total.flatten(1).mean(1) if whole and total.dim() > 1 else total
        # The few activations above the percentile are cut off, and a layer may be silent.
        rates[name] = (mean / number.clamp_min(1e-30)).clamp_max(1)
    return rates


def fade(rates: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Which neurons fade: those whose firing rate is below a threshold in [0, 1].

    Args:
        rates: Of :func:`neuron_rates`.
        threshold: At 0 none fades.

    Returns:
        Layer name -> True where the neuron fades, shaped like the rates.

    Raises:
        ValueError: A threshold outside [0, 1].
    """
    check_threshold(threshold)
    return {name: rate < threshold for name, rate in rates.items()}


def _highest(rates: Mapping[str, Tensor]) -> tuple[float, str]:
    """The highest threshold that leaves a neuron in every layer, and the layer that sets it."""
    return min((float(rate.max()), name) for name, rate in rates.items())


def _sizes(model: nn.Module, rates: Mapping[str, Tensor]) -> Tensor:
    """How many neurons each entry stands for, of all layers in one row."""
    neurons = hidden_neurons(model)
    sizes = {name: math.prod(neurons[name].shape[rate.dim() :]) for name, rate in rates.items()}
    return torch.cat([torch.full((rates[name].numel(),), size, dtype=torch.float64) for name, size in sizes.items()])


def _row(values: Mapping[str, Tensor]) -> Tensor:
    """The entries of all layers in one row, on the CPU."""
    return torch.cat([value.flatten().cpu() for value in values.values()])


def share(model: nn.Module, flags: Mapping[str, Tensor]) -> float:
    """How many of the hidden neurons are flagged, in per cent.

    Args:
        model: The model.
        flags: Of every layer ``[C]`` or ``[C, H, W]``, see :func:`fade`.
    """
    sizes = _sizes(model, flags)
    return 100 * float(sizes[_row(flags)].sum() / sizes.sum())


def threshold_for(model: nn.Module, rates: Mapping[str, Tensor], compression: float) -> float:
    """The lowest threshold that removes a fraction of all hidden neurons, or more where rates are equal.

    Args:
        model: The model.
        rates: Its rates, of :func:`neuron_rates`.
        compression: Fraction of the neurons to remove, in [0, 1).

    Raises:
        ValueError: A compression outside [0, 1), or one that empties a layer, which the message names.
    """
    wanted = float(number("compression", compression, 0, 1))
    if wanted == 0:
        return 0.0
    flat, sizes = _row(rates), _sizes(model, rates)
    order = flat.argsort(stable=True)
    removed = sizes[order].cumsum(0)
    place = int(torch.searchsorted(removed, wanted * removed[-1] - 1e-6))  # 0.29 of 100 is 29
    threshold = math.nextafter(float(flat[order[place]]), math.inf)
    highest, name = _highest(rates)
    if threshold > highest:
        most = float(sizes[flat < highest].sum() / removed[-1])
        raise ValueError(
            f"compression={compression} would remove all {rates[name].numel()} neurons of layer {name!r}, of which the "
            f"busiest has a firing rate of {highest:.4g}; of this model at most {math.floor(1e4 * most) / 1e4} can go."
        )
    return threshold


def kept_masks(masks: Mapping[str, Tensor], fading: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What masks leave without the neurons that fade; shapes that differ could broadcast."""
    for name, mask in masks.items():
        shape = tuple(fading[name].shape) if name in fading else None
        if shape != tuple(mask.shape):
            raise ValueError(
                f"Layer {name!r}: firing rates {shape} and a mask {tuple(mask.shape)}. Measure them with "
                "neuron_rates(model, batches), without per, which takes what the masks are made for."
            )
    return {name: mask & ~fading[name].to(mask.device) for name, mask in masks.items()}


@contextmanager
def without(model: nn.Module, fading: Mapping[str, Tensor]) -> Iterator[None]:
    """Silence neurons for the length of a block.

    Args:
        model: A model with masks.
        fading: Which ones, see :func:`fade`.
    """
    masks = masks_of(model)
    before = {name: mask.clone() for name, mask in masks.items()}
    left = kept_masks(masks, fading)
    try:
        for name, mask in masks.items():
            mask.copy_(left[name])
        yield
    finally:
        for name, mask in masks.items():
            mask.copy_(before[name])


def find_threshold(
    model: nn.Module, rates: Mapping[str, Tensor], accuracy: Callable[[nn.Module], float], tolerance: float = 0.3
) -> float:
    """The highest threshold, as far as bisection finds it, at which the accuracy drops by no more than a tolerance.

    Accuracy need not fall evenly, so that a higher threshold may do as well; the one returned was tried.

    Args:
        model: A model with masks.
        rates: Its rates, of :func:`neuron_rates`.
        accuracy: Measures the model, in per cent.
        tolerance: The drop that is fine, in points.

    Raises:
        ValueError: A tolerance below 0.
    """
    wanted = "points of accuracy, from 0 to 100, for instance 0.3"
    number("tolerance", tolerance, 0, 100, "[]", expected=wanted)
    highest, _ = _highest(rates)
    # All thresholds that differ in what they remove; the first removes nothing.
    found = _row(rates).unique()
    thresholds = [0.0, *found[(found > found[0]) & (found <= highest)].tolist()]
    least = accuracy(model) - tolerance
    good, bad = 0, len(thresholds)
    while bad - good > 1:
        middle = (good + bad) // 2
        with without(model, fade(rates, thresholds[middle])):
            fine = accuracy(model) >= least
        good, bad = (middle, bad) if fine else (good, middle)
    return thresholds[good]


def sweep_thresholds(
    model: nn.Module, rates: Mapping[str, Tensor], accuracy: Callable[[nn.Module], float], points: int = 12
) -> list[dict[str, float]]:
    """Accuracy and compression over thresholds, from none to the highest that leaves a neuron in every layer.

    Args:
        model: A model with masks.
        rates: Its rates, of :func:`neuron_rates`.
        accuracy: Measures the model, in per cent.
        points: How many thresholds, spaced so that each removes about as many neurons as the next.

    Returns:
        Rows of ``threshold``, ``compression`` (per cent of the hidden neurons) and ``top1``.
    """
    highest, _ = _highest(rates)
    flat = _row(rates)
    below = flat[flat <= highest].sort().values
    places = torch.linspace(0, len(below) - 1, points).long()
    rows = []
    for threshold in dict.fromkeys([0.0, *below[places[1:]].tolist(), highest]):
        with without(model, fade(rates, threshold)):
            top1 = accuracy(model)
        removed = share(model, fade(rates, threshold))
        rows.append({"threshold": threshold, "compression": removed, "top1": top1})
    return rows
