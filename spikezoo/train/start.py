"""Starts from other networks: membrane norms that change nothing, scores of a ticket from trained weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spikezoo.checkpoint import read_weights
from spikezoo.neurons import MembraneNorm
from spikezoo.transforms.tickets import Ticket, tickets

__all__ = ["fresh_membrane_norms", "preserve_function", "warm_scores"]


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

    def watch(norm: MembraneNorm, potential: Tensor) -> Tensor:
        flat = potential.double()
        axes = (0,) if norm.mode == "element" else (0, *range(2, potential.dim()))
        count = flat.new_tensor(math.prod(flat.shape[axis] for axis in axes))
        new = [count, flat.sum(axes), flat.square().sum(axes)]
        sums[norm] = [a + b for a, b in zip(sums[norm], new, strict=True)] if norm in sums else new
        return potential

    mode, norms = model.training, list(norms)
    model.eval()
    for norm in norms:
        norm.forward = lambda u, norm=norm: watch(norm, u)  # type: ignore[method-assign, misc]
    try:
        for batch in batches:
            model(batch)
    finally:
        for norm in norms:
            del norm.forward
        model.train(mode)
    for norm, (count, total, squares) in sums.items():
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.bias.copy_(mean)
        norm.weight.copy_((variance + norm.eps).sqrt())


@torch.no_grad()
def warm_scores(model: nn.Module, checkpoint: str) -> int:
    """Let the scores of a ticket start from trained weights of the same layout, in place.

    A frozen weight ranks by how far the trained one lies on its side of zero. All scores are positive, so that their
    magnitude, by which the mask chooses, keeps that order; their spread is that of random scores. Everything that is
    no ticket (norms, classifier biases) takes the trained values.

    Args:
        model: A model with the ticket applied and not baked.
        checkpoint: A file or folder of weights of the same architecture without a ticket.

    Returns:
        The number of layers set.

    Raises:
        ValueError: No ticket, or weights of other layers.
    """
    found = {name: pair for name, pair in tickets(model).items() if isinstance(pair[1], Ticket)}
    if not found:
        raise ValueError("--ticket-init: the model has no ticket. Add --ticket kind=mpslt sparsity=0.4.")
    weights = read_weights(checkpoint)
    layer: Any
    part: Any
    for name, (layer, part) in found.items():
        weight, scores = weights.get(f"{name}.weight"), layer.parametrizations.weight.original
        if weight is None or weight.shape != scores.shape:
            what = "no such layer" if weight is None else f"weights {tuple(weight.shape)}"
            raise ValueError(
                f"--ticket-init {checkpoint}: {name} of the ticket is {tuple(scores.shape)}, and the checkpoint has "
                f"{what}. Take the trained net of the same architecture, without a ticket."
            )
        agreement = weight.to(scores) * part.frozen.sign()
        spread = 1 / math.sqrt(3 * scores[0].numel())  # the deviation of the random scores of biprop
        agreement *= spread / agreement.std().clamp_min(torch.finfo(scores.dtype).tiny)
        scores.copy_(agreement - agreement.amin() + spread / 100)
    own = model.state_dict()
    for name, value in weights.items():
        if name in own and own[name].shape == value.shape:
            own[name].copy_(value)
    return len(found)
