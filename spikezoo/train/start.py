"""Starts from other networks: membrane norms that change nothing, thresholds that cut little off."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from spikezoo.neurons import QCFS, MembraneNorm
from spikezoo.observe import evaluating

__all__ = ["fit_thresholds", "fresh_membrane_norms", "preserve_function"]

# Of the largest activation; the threshold is one of these.
_SHARES = [share / 50 for share in range(1, 51)]


def fresh_membrane_norms(model: nn.Module, known: Collection[str]) -> list[MembraneNorm]:
    """The membrane norms of a model whose parameters are not among the ``known`` names of a checkpoint."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, MembraneNorm) and f"{name}.weight" not in known
    ]


@torch.no_grad()
def preserve_function(model: nn.Module, norms: Iterable[MembraneNorm], batches: Iterable[Tensor]) -> None:
    """Set membrane norms so that they let the potentials of some batches through as they are.

    A norm with scale 1 and shift 0 destroys what trained weights know: it forces every layer's firing rate to that of
    a standard normal potential. With the standard deviation and the mean of the potentials as scale and shift, and as
    running statistics, evaluation gives the same potentials as without the norm, up to rounding.

    Args:
        model: The model, with the weights of a network without these norms; it stays in its mode.
        norms: Its membrane norms to set.
        batches: Inputs of the model, each ``[B, C, H, W]`` or ``[B, T, C, H, W]``.
    """
    sums: dict[MembraneNorm, list[Tensor]] = {}

    def watch(norm: MembraneNorm, inputs: tuple[Tensor], _normed: Tensor) -> Tensor:
        (potential,) = inputs
        flat = potential.double()
        axes = (0,) if norm.mode == "element" else (0, *range(2, potential.dim()))
        count = flat.new_tensor(math.prod(flat.shape[axis] for axis in axes))
        new = [count, flat.sum(axes), flat.square().sum(axes)]
        sums[norm] = [a + b for a, b in zip(sums[norm], new, strict=True)] if norm in sums else new
        return potential

    with evaluating(model, [(norm, watch) for norm in norms]):
        for batch in batches:
            model(batch)
    for norm, (count, total, squares) in sums.items():
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.bias.copy_(mean)
        norm.weight.copy_((variance + norm.eps).sqrt())


@torch.no_grad()
def fit_thresholds(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set thresholds of QCFS activations to those that change a ReLU network's activations least, in the mean square.

    The initial value of the paper, 8, is meant for trainings from nothing: of activations around 1, four levels from
    0 to 8 leave nothing but zeros.

    Args:
        model: The model, with the weights of its ReLU twin; it stays in its mode. Activations may share a threshold.
        batches: Inputs of the model, each ``[B, C, H, W]``.
    """
    activations = [module for module in model.modules() if isinstance(module, QCFS)]
    seen: dict[nn.Parameter, list[Tensor]] = {activation.threshold: [] for activation in activations}

    def watch(activation: QCFS, inputs: tuple[Tensor], _quantised: Tensor) -> Tensor:
        (current,) = inputs
        flat = current.float().relu().flatten()
        seen[activation.threshold].append(flat[:: max(1, flat.numel() // 10_000)])
        return current.relu()

    with evaluating(model, [(activation, watch) for activation in activations]):
        for batch in batches:
            model(batch)
    for activation in {activation.threshold: activation for activation in activations}.values():
        values = torch.cat(seen[activation.threshold])
        largest = float(values.max())
        if largest == 0:
            continue  # silent on these images: nothing to fit, it keeps its initial threshold
        errors: list[float] = []
        for share in _SHARES:
            activation.threshold.fill_(share * largest)
            errors.append(float((activation.quantised(values) - values).square().mean()))
        activation.threshold.fill_(_SHARES[errors.index(min(errors))] * largest)
