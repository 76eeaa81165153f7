"""Tickets whose scores start from trained weights."""

from __future__ import annotations

import argparse
import math

import torch
from torch import nn

from spikezoo.checkpoint import read_weights
from spikezoo.transforms.tickets import Ticket, made_by, tickets

__all__ = ["FLAGS", "check_flags", "initialise", "warm_scores"]

FLAGS = {
    "--ticket-init": {
        "metavar": "FILE_OR_DIR",
        "help": "with --ticket: start the scores from these trained weights of the same net without a ticket",
    }
}


def check_flags(args: argparse.Namespace) -> None:
    """Raise where there is no ticket to start.

    Args:
        args: Parsed flags of training.

    Raises:
        ValueError: As said.
    """
    if args.ticket_init and not args.ticket:
        raise ValueError(f"--ticket-init {args.ticket_init} without --ticket. Add --ticket kind=mpslt sparsity=0.4.")


def initialise(model: nn.Module, args: argparse.Namespace) -> None:
    """Start the scores as ``--ticket-init`` says.

    Args:
        model: A fresh model.
        args: Parsed flags of training.
    """
    if args.ticket_init:
        warm_scores(model, args.ticket_init)


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
    found = {name: (layer, part) for name, (layer, part) in tickets(model).items() if isinstance(part, Ticket)}
    if not found:
        raise ValueError("--ticket-init: the model has no ticket. Add --ticket kind=mpslt sparsity=0.4.")
    weights = read_weights(checkpoint)
    for name, (layer, part) in found.items():
        weight, scores = weights.get(f"{name}.weight"), made_by(layer).original
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
