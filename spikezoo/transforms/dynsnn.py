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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spikezoo.checks import choice, number, whole
from spikezoo.counting import count
from spikezoo.layers import TernaryConv2d, TernaryLinear
from spikezoo.neurons import Maskable, SpikingNeuron
from spikezoo.observe import observing_copy
from spikezoo.transforms.fold import _record
from spikezoo.transforms.multisp import PatchSelection

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

PER = ("unit", "channel")
REDRAWN = ("in", "out", "both")


# --------------------------------------------------------------------------------------------------------------
# The transform
# --------------------------------------------------------------------------------------------------------------


def _hidden(model: nn.Module) -> dict[str, Maskable]:
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
    found = {name: neuron.mask for name, neuron in _hidden(model).items() if neuron.mask is not None}
    if not found:
        raise ValueError(
            "This model's neurons have no masks: apply 'dynsnn' to it, or create it with dynsnn=dict(per='unit')."
        )
    return found


def _epoch(name: str, value: Any) -> int:
    return whole(name, value, expected="epochs, integers from 1; they act when that epoch has ended")


def check_threshold(value: Any) -> float:
    """A firing rate that neurons may be held against, or an error that says so."""
    wanted = "a firing rate in [0, 1], spikes per time step; neurons below it fade, so 0 removes nothing"
    return float(number("threshold", value, 0, 1, "[]", expected=wanted))


def compacted(model: Any) -> bool:
    """Whether a model was compacted after its neurons got masks, which leaves only those still needed."""
    last = [name for name, _ in getattr(model, "recipe", []) if name in ("dynsnn", "compact")][-1:]
    return last == ["compact"]


def dynsnn(
    model: nn.Module,
    per: str = "unit",
    threshold: float | None = None,
    compression: float | None = None,
    reactivate_at: Sequence[int] = (),
    prune_at: int | None = None,
    weights: str = "in",
    samples: int = 10_000,
) -> nn.Module:
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

    Example:
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
    for name, neuron in _hidden(copied).items():
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
    return _record(copied, "dynsnn", **arguments).train(model.training)


# --------------------------------------------------------------------------------------------------------------
# Firing rates and what they say
# --------------------------------------------------------------------------------------------------------------


@contextmanager
def _evaluating(model: nn.Module, hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Evaluation mode and forward hooks for the length of a block; nothing of them survives it."""
    modes = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


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
    model = observing_copy(model)  # which leaves no trace, and threads may do at once
    neurons = _hidden(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sums: dict[str, Tensor] = {}
    units = dict.fromkeys(neurons, 0.0)  # what one spike stands for, times samples

    def counting(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, _inputs: Any, out: Tensor) -> None:
            # In float32, since half precision holds no whole number above 256 or 2048 for sure.
            spikes = out.sum((0, 1), dtype=torch.promote_types(out.dtype, torch.float32)).double() / out.shape[0]
            sums[name] = sums[name] + spikes if name in sums else spikes
            if isinstance(module, SpikingNeuron):
                units[name] += out.shape[1]
            else:
                flat = out.flatten().float()
                units[name] += out.shape[1] * float(flat.kthvalue(math.ceil(0.999 * flat.numel())).values)

        return hook

    with _evaluating(model, [(neuron, counting(name)) for name, neuron in neurons.items()]):
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
    neurons = _hidden(model)
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


def _kept(masks: Mapping[str, Tensor], fading: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
    left = _kept(masks, fading)
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


# --------------------------------------------------------------------------------------------------------------
# Which weights belong to which neurons
# --------------------------------------------------------------------------------------------------------------


class _Reach:
    """What of a model still matters, if only some of its neurons exist.

    The model runs once on ones, with norms as identities, max-pools as average pools, layers that put out ones and
    neurons that put out their mask. An input of a layer is dead where it stays zero, and an output where no gradient
    arrives from the neurons and layers that it feeds, and nothing cancels, since no number is negative. So residual
    joins, pooling, flattening and attention need no rules.

    Args:
        model: A :class:`~spikezoo.models._base.SpikingModel`.
        alive: Which neurons exist, by layer, see :func:`fade`; those left out do.

    Attributes:
        layers: Name -> which inputs ``[C, ...]`` and outputs ``[C', ...]`` of a layer matter.
        norms: Name -> which channels ``[C]`` of a norm do.
    """

    def __init__(self, model: nn.Module, alive: Mapping[str, Tensor]) -> None:
        self.targets: list[Tensor] = []
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
        normed: list[str] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                hooks.append((module, self._layer(name)))
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                normed.append(name)
                hooks.append((module, self._norm(name)))
            elif isinstance(module, nn.MaxPool2d):
                hooks.append((module, _average))
            elif isinstance(module, Maskable):
                hooks.append((module, self._neuron(alive.get(name))))
        net: Any = model
        like = next(model.parameters())
        # One frame of an event model: time shares all weights.
        images = torch.ones(1, *net.input_shape[-3:], device=like.device, dtype=like.dtype)
        images = images.unsqueeze(1) if net.takes_events else images
        saves = net.grad_checkpointing
        try:
            net.grad_checkpointing = False  # which would run the hooks twice
            with _evaluating(model, hooks), torch.enable_grad():
                logits = net(images)  # all of them matter, or features that no neuron puts out
                total: Any = sum([*self.targets, logits.sum()])
                grads = torch.autograd.grad(total, list(self.outputs.values()))
        finally:
            net.grad_checkpointing = saves
        matter = {name: (g != 0).any(0) for name, g in zip(self.outputs, grads, strict=True)}
        self.norms = {name: _channels(matter[name]) for name in normed if name in matter}
        self.layers = {name: (inputs, matter[name]) for name, inputs in self.inputs.items()}

    def _layer(self, name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
            (x,) = args
            if x.requires_grad:
                self.targets.append(x.sum())
            self.inputs[name] = (x.detach() != 0).any(0)
            self.outputs[name] = torch.ones_like(out).requires_grad_()
            return self.outputs[name]

        return hook

    def _norm(self, name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, args: tuple[Tensor], _out: Tensor) -> Tensor:
            self.outputs[name] = args[0] * 1
            return self.outputs[name]

        return hook

    def _neuron(self, alive: Tensor | None) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            x = args[0]  # one frame where the same input is seen T times
            shown = torch.ones_like(out)
            if alive is not None:
                shown = shown * alive.view(*alive.shape, *[1] * (x.dim() - 2 - alive.dim()))
            if x.requires_grad:
                self.targets.append((x * shown).sum())
            return shown

        return hook

    def matters(self, name: str) -> tuple[Tensor, Tensor]:
        """Which rows (outputs) and columns (inputs) of a layer's weight matter."""
        inputs, outputs = self.layers[name]
        return _channels(outputs), _channels(inputs)


def _average(module: nn.MaxPool2d, args: tuple[Tensor], _out: Tensor) -> Tensor:
    return F.avg_pool2d(args[0], module.kernel_size, module.stride, module.padding, module.ceil_mode)


def _channels(flags: Tensor) -> Tensor:
    """Channels ``[C]`` of which any place of ``[C, ...]`` is set."""
    return flags.flatten(1).any(1) if flags.dim() > 1 else flags


def _like_norm(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask of neurons for the values of a membrane norm, ``[C]`` or ``[C, H, W]``."""
    if len(shape) < mask.dim():
        return _channels(mask)
    return mask.view(*mask.shape, *[1] * (len(shape) - mask.dim())).expand(*shape)


def _named(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The layers of these names whose weight is an ordinary parameter."""
    for name in names:
        module = model.get_submodule(name)
        if not parametrize.is_parametrized(module):
            yield name, module


def _settle(
    model: nn.Module, changed: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None, ema: nn.Module | None
) -> None:
    """Forget what the optimiser knows of changed entries, and change the averaged weights alike."""
    parameters, tensors = dict(model.named_parameters()), model.state_dict()
    averaged = ema.state_dict() if ema is not None else {}
    # timm's Lookahead wraps an optimizer, in whose state it keeps its own, too.
    states: Any = {} if optimizer is None else getattr(optimizer, "_base_optimizer", optimizer).state
    for name, where in changed.items():
        state = states.get(parameters[name], {}) if name in parameters else {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == where.shape:
                # Lookahead's slow weights and MADGRAD's start are weights, not a memory of gradients.
                weights = "slow" in str(key) or key == "x0"
                value[where] = tensors[name][where].to(value.dtype) if weights else 0
        if ema is not None:
            averaged[name][where] = tensors[name][where].to(averaged[name])


# --------------------------------------------------------------------------------------------------------------
# What is done with fading neurons
# --------------------------------------------------------------------------------------------------------------


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
    left = _kept(masks, fading)
    for name, mask in left.items():
        if not mask.any():
            raise ValueError(
                f"threshold={threshold:.4g} would remove all {mask.numel()} neurons of layer {name!r}, of which the "
                f"busiest has a firing rate of {float(rates[name].max()):.4g}: stay at or below that."
            )
    reach = _Reach(model, left)
    for name, mask in masks.items():
        mask.copy_(left[name])
        if ema is not None:
            masks_of(ema)[name].copy_(mask)
    changed: dict[str, Tensor] = {}
    for name, layer in _named(model, reach.layers):
        rows, columns = reach.matters(name)
        dead = ~(rows[:, None] & columns)
        changed[f"{name}.weight"] = dead.view(*dead.shape, *[1] * (layer.weight.dim() - 2)).expand_as(layer.weight)
        layer.weight[changed[f"{name}.weight"]] = 0
        if layer.bias is not None:
            changed[f"{name}.bias"] = ~rows
            layer.bias[~rows] = 0
    _settle(model, changed, optimizer, ema)


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
    reach = _Reach(model, {name: ~flags for name, flags in fading.items()})
    tensors = model.state_dict()
    changed: dict[str, Tensor] = {}
    for name, layer in _named(model, reach.layers):
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
        for name, neuron in _hidden(model).items():
            if neuron.norm is not None:
                fresh[f"{name}.norm"] = ~_like_norm(~fading[name], neuron.norm.weight.shape)
    for norm, where in fresh.items():
        for value, start in _FRESH.items():
            if (name := f"{norm}.{value}") in tensors:
                tensors[name][where] = start
                changed[name] = where
    _settle(model, changed, optimizer, ema)


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
    whole, reach = _Reach(model, {}), _Reach(model, masks)
    neurons = left = 0
    synapses = [0.0, 0.0]
    parameters = sum(p.numel() for p in model.parameters())
    dead = 0
    for neuron in _hidden(model).values():
        mask = neuron.mask
        neurons += math.prod(neuron.shape)
        left += math.prod(neuron.shape) if mask is None else int(mask.sum()) * math.prod(neuron.shape[mask.dim() :])
        if neuron.norm is not None and mask is not None:
            dead += 2 * int((~_like_norm(mask, neuron.norm.weight.shape)).sum())
    for name, (inputs, outputs) in reach.layers.items():
        layer: Any = model.get_submodule(name)
        for index, (into, outof) in enumerate((whole.layers[name], (inputs, outputs))):
            synapses[index] += _synapses(layer, into, outof)
        rows, columns = reach.matters(name)
        live = int(rows.sum()) * int(columns.sum()) * math.prod(layer.weight.shape[2:])
        dead += layer.weight.numel() - live + (0 if layer.bias is None else int((~rows).sum()))
    for name, channels in reach.norms.items():
        norm: Any = model.get_submodule(name)
        dead += 2 * int((~channels).sum()) if norm.affine else 0
    found: dict[str, float] = {}
    counts = {"neurons": (neurons, left), "synapses": synapses, "parameters": (parameters, parameters - dead)}
    for what, (before, after) in counts.items():
        found |= {what: int(before), f"{what}_left": int(after), f"{what}_removed": 100 * (1 - after / before)}
    if images is not None and any(isinstance(module, SpikingNeuron) for module in model.modules()):
        found["sops_exact"] = count(model, images, inputs="analog").sops_exact
    return found


def _synapses(layer: Any, inputs: Tensor, outputs: Tensor) -> float:
    """Connections of a layer between inputs ``[C, ...]`` and outputs ``[C', ...]`` that matter."""
    if isinstance(layer, nn.Linear):
        return float(inputs.sum() * outputs.sum())
    ones = torch.ones_like(layer.weight, dtype=torch.float32)
    taps = F.conv2d(inputs[None].float(), ones, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return float((taps[0] * outputs).sum(dtype=torch.float64))
