"""Folds: absorb membrane normalisation into firing thresholds, and batch norm into convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from spikezoo.graph import trace
from spikezoo.layers import ConvNormNeuron, LinearNormNeuron, is_mean, set_ternary
from spikezoo.neurons import FoldedThreshold, SpikingNeuron
from spikezoo.surrogate import spike
from spikezoo.transforms.record import Model

__all__ = ["fold_bn", "fold_mpbn"]

# A float of these types, read as an integer of the same size, counts the floats between it and zero.
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def record_transform(model: Model, name: str, **arguments: object) -> Model:
    """Append a transform to the recipe of the copy that it made, and put what it added in evaluation mode too."""
    set_recipe(model, [*getattr(model, "recipe", []), (name, arguments)])
    return model.eval()


def set_recipe(model: nn.Module, recipe: list[tuple[str, dict[str, object]]]) -> None:
    """Say of a model which transforms made it."""
    model.recipe = recipe  # type: ignore[assignment]


def _dotted(name: str, module: nn.Module) -> str:
    """A module's dotted name, or its type where it is the model itself."""
    return name or type(module).__name__


def _check_dtype(dtype: torch.dtype, transform: str) -> None:
    if dtype not in _INTEGERS:
        raise ValueError(
            f"{transform} got a model of {dtype}: a fold is only exact in float32 or float64. Fold model.float() and "
            "convert the result."
        )


def refuse_tickets(model: nn.Module) -> None:
    """Raise where the weights of a model are made from scores."""
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise ValueError("The weights of this model are tickets, which learn scores: spikezoo.bake it first.")


def refuse_where(bad: Tensor, layer: str, reason: str) -> None:
    """Raise if any entry of a per-channel ``[C]`` or per-element ``[C, ...]`` mask is set, naming the first."""
    if not bad.any():
        return
    index = bad.nonzero()[0].tolist()
    where = f"channel {index[0]}" if len(index) == 1 else f"element {tuple(index)}"
    more = int(bad.sum()) - 1
    raise ValueError(f"Layer {layer!r}, {where}{f' (and {more} more)' if more else ''}: {reason}")


# --------------------------------------------------------------------------------------------------------------
# Membrane normalisation into thresholds
# --------------------------------------------------------------------------------------------------------------


def _nth_float(n: Tensor, dtype: torch.dtype) -> Tensor:
    """The n-th float counted from zero, n of either sign; the last one is infinity."""
    magnitude = n.abs().to(_INTEGERS[dtype]).view(dtype)
    return torch.where(n < 0, -magnitude, magnitude)


def _boundary(fires: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Bisect where a decision that is non-decreasing in its argument turns from False to True.

    Args:
        fires: The decision, elementwise over a tensor shaped like ``like``.
        like: Gives shape, dtype and device.

    Returns:
        For every entry the two neighbouring floats between which the decision turns: the largest that does not fire
        (-inf where all finite ones fire) and the smallest that fires (inf where none does).
    """
    infinity = int(torch.tensor(torch.inf, dtype=like.dtype).view(_INTEGERS[like.dtype]))
    high = torch.full_like(like, infinity, dtype=torch.int64)
    low = -high
    for _ in range(8 * like.element_size()):
        # (low + high) // 2 would overflow for float64.
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        fired = fires(_nth_float(middle, like.dtype))
        low, high = torch.where(fired, low, middle), torch.where(fired, middle, high)
    return _nth_float(low, like.dtype), _nth_float(high, like.dtype)


def _fold_neuron(name: str, neuron: SpikingNeuron) -> FoldedThreshold:
    """Threshold and polarity that decide as the neuron's norm and threshold do, for every finite potential."""
    norm = neuron.norm
    assert norm is not None
    _check_dtype(norm.weight.dtype, "fold_mpbn")
    scale, shift = norm.scale_shift()
    refuse_where(
        ~(scale.isfinite() & shift.isfinite()),
        name,
        "the membrane norm's scale or shift is not finite; look for nan or inf in weight, bias, running_mean, "
        "running_var of its norm.",
    )
    refuse_where(
        scale == 0,
        name,
        "the membrane norm's scale is zero, so the neuron's output no longer depends on its potential and no threshold "
        "expresses it. Set the weight to a small non-zero value before folding, or keep the model unfolded.",
    )
    strict = neuron.config.firing == ">"
    polarity = scale.sign()

    # The neuron's own operations decide, roundings included; times its polarity they are non-decreasing.
    def fires(u: Tensor) -> Tensor:
        return spike(neuron.distance((polarity * u).unsqueeze(0)), strict=strict).squeeze(0).bool()

    silent, firing = _boundary(fires, scale)
    folded = FoldedThreshold(norm.mode, scale.shape, device=scale.device, dtype=scale.dtype)
    folded.threshold.copy_(polarity * (silent if strict else firing))
    folded.polarity.copy_(polarity)
    return folded


@torch.no_grad()
def fold_mpbn(model: Model) -> Model:
    """Fold membrane normalisation (MPBN) into a firing threshold and a polarity per channel or element.

    The result fires exactly where the model in evaluation mode fires, for every finite membrane potential of the
    model's dtype: the thresholds are not computed by a formula, which would be off by a rounding, but found by
    bisection of the neuron's own operations over all floats. That holds in eager mode on the device of the model; a
    compiler that contracts multiply and add, or another device's square root, changes the unfolded model. Where the
    scale of the norm is negative the comparison flips, which is what the polarity says. The reset is untouched; a
    soft one still subtracts ``config.threshold``.

    Args:
        model: A model in float32 or float64 whose neurons have a membrane norm. It stays as it is.

    Returns:
        A folded deep copy in evaluation mode (the running statistics are folded, whatever mode the model is in),
        with ``('fold_mpbn', {})`` appended to its ``recipe``. Meant for inference: the norm's parameters are gone.

    Raises:
        ValueError: No membrane norm, folded already, another dtype, statistics that are not finite, or a scale of
            exactly zero, which no threshold can express.

    Examples:
        >>> folded = fold_mpbn(spikezoo.create_model('mpbn_resnet20'))
    """
    neurons = [
        (_dotted(name, module), module) for name, module in model.named_modules() if isinstance(module, SpikingNeuron)
    ]
    done = [name for name, neuron in neurons if neuron.folded is not None]
    if done:
        raise ValueError(
            f"Nothing to fold: fold_mpbn was applied already (layer {done[0]!r}). Fold the model it came from."
        )
    if all(neuron.norm is None for _, neuron in neurons):
        raise ValueError(
            f"Nothing to fold: {type(model).__name__} has no membrane normalisation. The models named mpbn_* have it "
            "(spikezoo.list_models('mpbn_*')), and others when created with mpbn='channel' or mpbn='element'."
        )
    folded = copy.deepcopy(model).eval()
    for name, module in folded.named_modules():
        if isinstance(module, SpikingNeuron) and module.norm is not None:
            module.folded, module.norm = _fold_neuron(_dotted(name, module), module), None
    return record_transform(folded, "fold_mpbn")


# --------------------------------------------------------------------------------------------------------------
# Batch norm into convolutions and linear layers
# --------------------------------------------------------------------------------------------------------------


def _check_pool(name: str, pool: nn.Module | None, scale: Tensor) -> None:
    """Raise where a pooling between convolution and norm does not commute with the norm."""
    if isinstance(pool, nn.MaxPool2d):
        refuse_where(
            scale < 0,
            name,
            "a max-pool stands between convolution and norm and the norm's scale is negative, which would turn the "
            "maximum into a minimum. Keep this model unfolded.",
        )
    elif isinstance(pool, nn.AvgPool2d):
        if not is_mean(pool):
            raise ValueError(
                f"Layer {name!r}: {pool} counts padding or has its own divisor, so the norm's shift does not pass "
                "through it. Use count_include_pad=False, or keep this model unfolded."
            )
    elif pool is not None:
        raise ValueError(
            f"Layer {name!r}: a {type(pool).__name__} stands between convolution and norm; only MaxPool2d and "
            "AvgPool2d can be folded through. Keep this model unfolded."
        )


def _normed(model: nn.Module) -> list[tuple[str, Any, nn.Module | None, str]]:
    """Layers with a norm behind them: name for messages, layer, pooling between the two, dotted name of the norm."""
    found: dict[str, tuple[str, Any, nn.Module | None, str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, ConvNormNeuron | LinearNormNeuron) and not isinstance(module.norm, nn.Identity | None):
            layer = module.conv if isinstance(module, ConvNormNeuron) else module.linear
            norm = f"{name}.norm".lstrip(".")
            found[norm] = (_dotted(name, module), layer, getattr(module, "pool", None), norm)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    if norms - found.keys() and hasattr(model, "forward_frames"):
        for node in trace(model).of("norm"):  # blocks of torch's own layers
            before, pool = node.inputs[0], None
            if before.kind == "pool" and before.readers == [node]:
                before, pool = before.inputs[0], before.pooling
            if node.name not in found and before.kind == "layer" and len(before.readers) == 1:
                found[node.name] = (before.name, before.module, pool, node.name)
    return list(found.values())


def _fold_layer(name: str, target: nn.Conv2d | nn.Linear, pool: nn.Module | None, norm: nn.Module) -> None:
    """Fuse a norm into the convolution or linear layer before it, in place."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        raise ValueError(
            f"Layer {name!r}: its norm is a {type(norm).__name__}, and fold_bn folds batch norms alone, which in "
            "evaluation are a constant scale and shift a channel."
        )
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError(
            f"Layer {name!r}: its norm keeps no running statistics; build it with track_running_stats=True."
        )
    _check_dtype(mean.dtype, "fold_bn")
    # torch's linear fusion, unlike its convolutional one, does not take the None of a norm without parameters.
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias
    if pool is not None:
        _check_pool(name, pool, weight)
    fuse: Callable[..., tuple[nn.Parameter, nn.Parameter]]
    fuse = fuse_linear_bn_weights if isinstance(target, nn.Linear) else fuse_conv_bn_weights
    fused_weight, fused_bias = fuse(target.weight, target.bias, mean, var, norm.eps, weight, bias)
    refuse_where(
        ~(fused_weight.flatten(1).isfinite().all(1) & fused_bias.isfinite()),
        name,
        "the folded weight or bias is not finite; look for nan or inf in the layer and in its norm's statistics.",
    )
    set_ternary(target, False)  # one magnitude a channel
    target.weight, target.bias = fused_weight, fused_bias.requires_grad_(fused_weight.requires_grad)


@torch.no_grad()
def fold_bn(model: Model) -> Model:
    """Fold the batch norm after every convolution and linear layer into that layer's weights and bias.

    Equal up to rounding, not bit for bit: a membrane potential within a rounding of its threshold may decide
    differently. An average pooling between convolution and norm commutes with the norm; a max-pool does so only where
    the norm's scale is not negative. A module with a method ``merged`` (a RepConv) becomes the convolution that it
    returns. Factors of time steps (``norm='tebn'``) stay, see :func:`~spikezoo.layers.set_norms`.

    Args:
        model: A model in float32 or float64 built from :class:`ConvNormNeuron` and :class:`LinearNormNeuron`, or of
            ``create_model`` with torch's layers in blocks of any kind. It stays as it is.

    Returns:
        A folded deep copy in evaluation mode (the running statistics are folded, whatever mode the model is in),
        with ``('fold_bn', {})`` appended to its ``recipe``.

    Raises:
        ValueError: No batch norm to fold (also: folded already), another dtype, weights that are not finite, or a
            pooling that does not commute with the norm.

    Examples:
        >>> folded = fold_bn(spikezoo.create_model('spiking_vgg9'))
    """
    refuse_tickets(model)
    folded = copy.deepcopy(model).eval()
    for name, module in [*folded.named_modules()]:
        if hasattr(module, "merged"):
            _check_dtype(next(module.parameters()).dtype, "fold_bn")
            folded.set_submodule(name, module.merged())
    layers = _normed(folded)
    if not layers:
        raise ValueError(
            "Nothing to fold: fold_bn was applied already. Fold the model it came from."
            if any(name == "fold_bn" for name, _ in getattr(model, "recipe", []))
            else f"Nothing to fold: {type(model).__name__} has no batch norm after a convolution or linear layer of "
            "spikezoo.layers; those of the multilayer perceptrons and the rmp_* models have none."
        )
    for name, layer, pool, norm in layers:
        _fold_layer(name, layer, pool, folded.get_submodule(norm))
        folded.set_submodule(norm, nn.Identity())
    return record_transform(folded, "fold_bn")
