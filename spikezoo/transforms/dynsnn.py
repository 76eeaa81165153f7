"""DynSNN: neurons that hardly fire are reactivated while the network trains, or removed with all their synapses.

Paper: "DynSNN: A Dynamic Approach to Reduce Redundancy in Spiking Neural Networks" (ICASSP 2022). The firing rate of a
neuron is its spikes over the time steps, averaged over samples; it fades where that is below a threshold. The paper
says neither the threshold nor when and how often neurons are reactivated, nor whether a neuron of a convolution is a
place of a map or a channel; here these are arguments.

What is removed stays in the tensors: the neuron's mask is False, so it is silent, and the weights into and out of it
are zero where no other neuron shares them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spikezoo.checks import choice, number, whole
from spikezoo.counting import count
from spikezoo.layers import TernaryConv2d, TernaryLinear
from spikezoo.neurons import SpikingNeuron
from spikezoo.transforms.fold import record_transform
from spikezoo.transforms.multisp import PatchSelection
from spikezoo.transforms.rates import (
    PER,
    check_threshold,
    fade,
    find_threshold,
    hidden_neurons,
    kept_masks,
    masks_of,
    neuron_rates,
    share,
    sweep_thresholds,
    threshold_for,
    without,
)
from spikezoo.transforms.reach import Reach, like_norm
from spikezoo.transforms.record import Model

__all__ = [
    "check_reactivation",
    "compacted",
    "dynsnn",
    "dynsnn_report",
    "fade",
    "find_threshold",
    "masks_of",
    "neuron_rates",
    "prune",
    "reactivate",
    "share",
    "sweep_thresholds",
    "threshold_for",
    "without",
]

REDRAWN = ("in", "out", "both")


def _epoch(name: str, value: object) -> int:
    return whole(name, value, expected="epochs, integers from 1; they act when that epoch has ended")


def compacted(model: nn.Module) -> bool:
    """Whether a model was compacted after its neurons got masks, which leaves only those still needed."""
    last = [name for name, _ in getattr(model, "recipe", []) if name in ("dynsnn", "compact")][-1:]
    return last == ["compact"]


def dynsnn(
    model: Model,
    per: str = "unit",
    threshold: float | None = None,
    compression: float | None = None,
    reactivate_at: Sequence[int] = (),
    prune_at: int | None = None,
    weights: str = "in",
    samples: int = 10_000,
) -> Model:
    """Give every hidden neuron a mask, True where it exists; the rest says when ``train.py`` acts on them.

    Args:
        model: A model with spiking neurons or ReLUs. It stays as it is. Masks that :func:`compact` left are kept.
        per: 'unit' (every neuron of a map by itself: the mask is ``[C, H, W]``, and ties the model to its img_size) or
            'channel' (``[C]``). Neurons of linear layers are single ones either way.
        threshold: Neurons with a lower firing rate fade, in [0, 1].
        compression: Instead, the fraction of all hidden neurons that is removed, in [0, 1); with both, the threshold
            is that of reactivation.
        reactivate_at: After these epochs, counted from 1, fading neurons get new weights.
        prune_at: After this epoch those that fade are removed; training goes on without them.
        weights: Which weights of a fading neuron are drawn anew, see :func:`reactivate`.
        samples: How many training images firing rates are measured on.

    Returns:
        A copy with one more entry in its ``recipe``, in the mode of the model.

    Raises:
        ValueError: No spiking neurons, masks already, an argument that makes no sense.

    Examples:
        >>> model = spikezoo.create_model('spiking_conv4', dynsnn=dict(per='channel', threshold=0.02, prune_at=9))
    """
    for name, value, valid in (("per", per, PER), ("weights", weights, REDRAWN)):
        choice(name, value, valid)
    if threshold is not None:
        check_threshold(threshold)
    if compression is not None:
        number("compression", compression, 0, 1)
    if isinstance(reactivate_at, str) or not isinstance(reactivate_at, Sequence):
        raise ValueError(f"reactivate_at={reactivate_at!r}: expected a list of epochs such as [3, 6].")
    epochs = [_epoch("reactivate_at", epoch) for epoch in reactivate_at]
    if prune_at is not None and max(epochs, default=0) >= _epoch("prune_at", prune_at):
        raise ValueError(
            f"reactivate_at={epochs} with prune_at={prune_at}: what was removed is not reactivated, and new weights "
            f"are trained for an epoch at least. Give a prune_at of {max(epochs) + 1} or later."
        )
    if (epochs or prune_at is not None) and threshold is None and compression is None:
        raise ValueError("reactivate_at and prune_at need to know which neurons fade: give threshold or compression.")
    whole("samples", samples)
    if per == "unit" and any(isinstance(module, PatchSelection) for module in model.modules()):
        raise ValueError(
            "per='unit' on a model that selects patches: a place of its maps is another patch in every image. Use "
            "per='channel'."
        )
    copied = copy.deepcopy(model)
    for name, neuron in hidden_neurons(copied).items():
        if neuron.mask is not None:
            if compacted(model):
                continue
            raise ValueError(
                f"The neurons of {name!r} have a mask already: apply 'dynsnn' once. To remove more of a pruned model, "
                "spikezoo.compact it first."
            )
        if not neuron.shape:
            raise ValueError(f"Nobody said how many neurons {name!r} has: make it with a NeuronFactory.")
        like = next(copied.parameters()).device
        neuron.mask = torch.ones(neuron.shape[:1] if per == "channel" else neuron.shape, dtype=torch.bool, device=like)
    arguments = {
        "per": per, "threshold": threshold, "compression": compression, "reactivate_at": epochs, "prune_at": prune_at,
        "weights": weights, "samples": samples,
    }  # fmt: skip
    return record_transform(copied, "dynsnn", **arguments).train(model.training)


def _plain_layers(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The layers of these names whose weight is an ordinary parameter."""
    for name in names:
        module = model.get_submodule(name)
        if not parametrize.is_parametrized(module):
            yield name, module


def _carry_over(
    model: nn.Module, changed: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None, ema: nn.Module | None
) -> None:
    """Forget what the optimiser knows of changed entries, and change the averaged weights alike."""
    parameters, tensors = dict(model.named_parameters()), model.state_dict()
    averaged = ema.state_dict() if ema is not None else {}
    # timm's Lookahead wraps an optimizer, in whose state it keeps its own, too.
    states: Mapping[Tensor, Mapping[str, object]] = {}
    if optimizer is not None:
        states = getattr(optimizer, "_base_optimizer", optimizer).state
    for name, where in changed.items():
        state = states.get(parameters[name], {}) if name in parameters else {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == where.shape:
                # Lookahead's slow weights and MADGRAD's start are weights, not a memory of gradients.
                weights = "slow" in str(key) or key == "x0"
                value[where] = tensors[name][where].to(value.dtype) if weights else 0
        if ema is not None:
            averaged[name][where] = tensors[name][where].to(averaged[name])


@torch.no_grad()
def prune(
    model: nn.Module,
    rates: Mapping[str, Tensor],
    threshold: float,
    optimizer: torch.optim.Optimizer | None = None,
    ema: nn.Module | None = None,
) -> None:
    """Remove the neurons that fade, in place: they are silent, and weights that only they have become zero.

    The zeros change no logit. They stay where the model is trained on, since neither gradients nor decay move them.

    Args:
        model: A model with masks.
        rates: Firing rates, of :func:`neuron_rates`.
        threshold: Neurons below it go, in [0, 1].
        optimizer: Its state of those weights becomes zero.
        ema: An averaged copy of the model, changed alike.

    Raises:
        ValueError: A threshold outside [0, 1], one that empties a layer, which the message names, or rates of
            another shape than the masks; nothing is changed then.
    """
    fading, masks = fade(rates, threshold), masks_of(model)
    left = kept_masks(masks, fading)
    for name, mask in left.items():
        if not mask.any():
            raise ValueError(
                f"threshold={threshold:.4g} would remove all {mask.numel()} neurons of layer {name!r}, of which the "
                f"busiest has a firing rate of {float(rates[name].max()):.4g}: stay at or below that."
            )
    reach = Reach(model, left)
    for name, mask in masks.items():
        mask.copy_(left[name])
        if ema is not None:
            masks_of(ema)[name].copy_(mask)
    changed: dict[str, Tensor] = {}
    for name, layer in _plain_layers(model, reach.layers):
        rows, columns = reach.matters(name)
        dead = ~(rows[:, None] & columns)
        changed[f"{name}.weight"] = dead.view(*dead.shape, *[1] * (layer.weight.dim() - 2)).expand_as(layer.weight)
        layer.weight[changed[f"{name}.weight"]] = 0
        if layer.bias is not None:
            changed[f"{name}.bias"] = ~rows
            layer.bias[~rows] = 0
    _carry_over(model, changed, optimizer, ema)


def check_reactivation(model: nn.Module) -> None:
    """Raise where weights of a model cannot be drawn anew, see :func:`reactivate`."""
    if not all(mask.all() for mask in masks_of(model).values()):
        raise ValueError("Neurons of this model were removed: reactivation comes before. Leave reactivate_at out.")
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module) or isinstance(module, TernaryConv2d | TernaryLinear):
            raise ValueError(
                f"Layer {name!r}: its weights are a ticket, which stay at the values that they were drawn with. Leave "
                "reactivate_at out; pruning works."
            )


@torch.no_grad()
def reactivate(
    model: nn.Module,
    fading: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    ema: nn.Module | None = None,
    generator: torch.Generator | None = None,
    weights: str = "in",
) -> None:
    """Draw the weights of fading neurons anew, in place, and forget their momentum.

    They are drawn from a normal distribution of mean 0 and the standard deviation of the layer's other weights (where
    these are all equal, that of He's initialisation). Norms on the way start afresh (scale 1, shift 0, statistics of a
    standard normal). A channel of a convolution is drawn anew where all of its neurons fade, since they share its
    weights.

    Args:
        model: A model with masks, of which nothing was removed.
        fading: Which neurons, see :func:`fade`.
        optimizer: Its state of those weights becomes zero.
        ema: An averaged copy of the model, which takes the new weights, too.
        generator: Of the random numbers, on the CPU; None takes torch's.
        weights: 'in' (into the neuron), 'out' or 'both'.

    Raises:
        ValueError: Another ``weights``, a model of which neurons were removed, or one whose weights are tickets,
            also baked ones of two values.
    """
    choice("weights", weights, REDRAWN)
    check_reactivation(model)
    reach = Reach(model, {name: ~flags for name, flags in fading.items()})
    tensors = model.state_dict()
    changed: dict[str, Tensor] = {}
    for name, layer in _plain_layers(model, reach.layers):
        rows, columns = reach.matters(name)
        into, outof = ~rows[:, None].expand(-1, len(columns)), ~columns.expand(len(rows), -1)
        where = {"in": into, "out": outof, "both": into | outof}[weights]
        where = where.view(*where.shape, *[1] * (layer.weight.dim() - 2)).expand_as(layer.weight)
        kept = layer.weight[rows][:, columns]
        kept = layer.weight if kept.numel() < 2 else kept
        drawn = torch.randn(layer.weight.shape, generator=generator).to(layer.weight)
        # Not with their mean: it is below 0 where firing was penalised, and what is drawn so would stay silent.
        spread = float(kept.std(correction=min(1, kept.numel() - 1))) or (2 / layer.weight[0].numel()) ** 0.5
        layer.weight[where] = (spread * drawn)[where]
        changed[f"{name}.weight"] = where
        if layer.bias is not None and weights != "out":
            layer.bias[~rows] = 0
            changed[f"{name}.bias"] = ~rows
    fresh = {}
    if weights != "out":
        fresh = {name: ~channels for name, channels in reach.norms.items()}
        for name, neuron in hidden_neurons(model).items():
            if neuron.norm is not None:
                fresh[f"{name}.norm"] = ~like_norm(~fading[name], neuron.norm.weight.shape)
    for norm, where in fresh.items():
        for value, start in _FRESH.items():
            if (name := f"{norm}.{value}") in tensors:
                tensors[name][where] = start
                changed[name] = where
    _carry_over(model, changed, optimizer, ema)


# Values of a norm as it is made.
_FRESH = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


@torch.no_grad()
def dynsnn_report(model: nn.Module, images: Tensor | None = None) -> dict[str, float]:
    """What is left of a model: neurons, synapses, parameters, and with images synaptic operations.

    A synapse is a connection from an input or hidden neuron to a hidden neuron or class, so that a weight of a
    convolution is one for every place of the map. A parameter is left where a neuron that exists needs it.

    Args:
        model: A model with masks.
        images: A batch to count the exact synaptic operations on, per image.

    Returns:
        ``neurons``, ``synapses`` and ``parameters``, each with ``_left`` and ``_removed`` (per cent); and of a
        spiking model ``sops_exact``.
    """
    masks = masks_of(model)
    whole, reach = Reach(model, {}), Reach(model, masks)
    neurons = left = 0
    synapses = [0.0, 0.0]
    parameters = sum(p.numel() for p in model.parameters())
    dead = 0
    for neuron in hidden_neurons(model).values():
        mask = neuron.mask
        neurons += math.prod(neuron.shape)
        left += math.prod(neuron.shape) if mask is None else int(mask.sum()) * math.prod(neuron.shape[mask.dim() :])
        if neuron.norm is not None and mask is not None:
            dead += 2 * int((~like_norm(mask, neuron.norm.weight.shape)).sum())
    for name, (inputs, outputs) in reach.layers.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        for index, (into, outof) in enumerate((whole.layers[name], (inputs, outputs))):
            synapses[index] += _synapses(layer, into, outof)
        rows, columns = reach.matters(name)
        live = int(rows.sum()) * int(columns.sum()) * math.prod(layer.weight.shape[2:])
        dead += layer.weight.numel() - live + (0 if layer.bias is None else int((~rows).sum()))
    for name, channels in reach.norms.items():
        dead += 2 * int((~channels).sum()) if model.get_submodule(name).affine else 0
    found: dict[str, float] = {}
    counts = {"neurons": (neurons, left), "synapses": synapses, "parameters": (parameters, parameters - dead)}
    for what, (before, after) in counts.items():
        found |= {what: int(before), f"{what}_left": int(after), f"{what}_removed": 100 * (1 - after / before)}
    if images is not None and any(isinstance(module, SpikingNeuron) for module in model.modules()):
        found["sops_exact"] = count(model, images, inputs="analog").sops_exact
    return found


def _synapses(layer: nn.Conv2d | nn.Linear, inputs: Tensor, outputs: Tensor) -> float:
    """Connections of a layer between inputs ``[C, ...]`` and outputs ``[C', ...]`` that matter."""
    if isinstance(layer, nn.Linear):
        return float(inputs.sum() * outputs.sum())
    ones = torch.ones_like(layer.weight, dtype=torch.float32)
    taps = F.conv2d(inputs[None].float(), ones, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return float((taps[0] * outputs).sum(dtype=torch.float64))
