"""Transforms of a built model: the list of them, apply one by name, replay a recipe.

A transform takes a model and returns a changed deep copy whose ``recipe``, a list of ``(name, arguments)``, has one
more entry. Its structure depends on its arguments only and what depends on values is a buffer or parameter, so that
a fresh model takes the same shape from :func:`replay` and then loads the weights strictly.

    fold_mpbn   membrane normalisation into a threshold and a polarity per channel or element; exact
    fold_bn     batch norm into the convolution or linear layer before it; equal up to rounding
    ticket      lottery ticket: frozen weights, learned scores, a mask of the best (LT, SLT, MPLT, MPSLT)
    multisp     a ticket in the patch embedding, and only the strongest patches for the blocks (MultiSp, PEPSp)
    dynsnn      a mask of the neurons, to remove those that hardly fire (DynSNN)
    bake        tickets into plain weights; exact
    release     layers of a baked ticket become ordinary, for other classes or channels
    tune        baked tickets with their zeros fixed, to train the other weights
    compact     channels whose neurons are masked, out of the weights; equal up to rounding

Example:
    >>> model = replay(spikezoo.create_model('mpbn_resnet20'), [('fold_mpbn', {}), ('fold_bn', {})])
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from spikezoo.checks import UnknownArgumentError, nearest
from spikezoo.transforms.compact import compact
from spikezoo.transforms.dynsnn import dynsnn
from spikezoo.transforms.fold import fold_bn, fold_mpbn
from spikezoo.transforms.multisp import multisp
from spikezoo.transforms.tickets import bake, release, set_epoch, ticket, tune

__all__ = [
    "FLAGS",
    "TRANSFORMS",
    "apply",
    "bake",
    "compact",
    "dynsnn",
    "fold_bn",
    "fold_mpbn",
    "multisp",
    "release",
    "replay",
    "set_epoch",
    "ticket",
    "tune",
]

TRANSFORMS: dict[str, Callable[..., nn.Module]] = {
    "fold_mpbn": fold_mpbn,
    "fold_bn": fold_bn,
    "ticket": ticket,
    "multisp": multisp,
    "dynsnn": dynsnn,
    "bake": bake,
    "tune": tune,
    "release": release,
    "compact": compact,
}
# What create_model takes as arguments, to apply them to what it made.
FLAGS = ("ticket", "multisp", "dynsnn")


def apply(model: nn.Module, name: str, **arguments: Any) -> nn.Module:
    """Apply one transform by name.

    Args:
        model: The model; it stays as it is.
        name: A key of ``TRANSFORMS``.
        **arguments: The transform's arguments.

    Returns:
        The transformed copy.

    Raises:
        ValueError: Unknown name or argument; the message names the nearest valid ones.
    """
    if name not in TRANSFORMS:
        raise ValueError(f"Unknown transform {name!r}. {nearest(name, TRANSFORMS)}")
    _, *known = inspect.signature(TRANSFORMS[name]).parameters
    for argument in arguments:
        if argument not in known:
            hint = nearest(argument, known) if known else "It takes none."
            raise UnknownArgumentError(f"Transform {name!r} has no argument {argument!r}. {hint}")
    return TRANSFORMS[name](model, **arguments)


def replay(model: nn.Module, recipe: Sequence[tuple[str, Mapping[str, Any]]]) -> nn.Module:
    """Apply the transforms of a recipe in order.

    Args:
        model: A model as it was created; it stays as it is.
        recipe: Names and arguments, as in the ``recipe`` of a transformed model (lists, as JSON has them, will do).

    Returns:
        The transformed model; the model itself for an empty recipe.

    Raises:
        ValueError: Unknown name or argument, or an entry that is not a pair.
    """
    for entry in recipe:
        if isinstance(entry, str) or len(entry) != 2:
            raise ValueError(
                f"Recipe entry {entry!r}: expected a pair of name and arguments such as ('fold_mpbn', {{}})."
            )
        name, arguments = entry
        model = apply(model, name, **arguments)
    return model
