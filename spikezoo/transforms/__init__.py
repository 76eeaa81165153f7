"""Transforms of a built model: the list of them, apply one by name, replay a recipe.

A transform takes a model and returns a changed deep copy whose ``recipe``, a list of ``(name, arguments)``, has one
more entry. Its structure depends on its arguments only and what depends on values is a buffer or parameter, so that
a fresh model takes the same shape from :func:`replay` and then loads the weights strictly.

    fold_mpbn   membrane normalisation into a threshold and a polarity per channel or element; exact
    fold_bn     batch norm into the convolution or linear layer before it; equal up to rounding
    ticket      lottery ticket: frozen weights, learned scores, a mask of the best (LT, SLT, MPLT, MPSLT)
    multisp     a ticket in the patch embedding, and only the strongest patches for the blocks (MultiSp, PEPSp)
    dynsnn      a mask of the neurons, to remove those that hardly fire (DynSNN)
    prune       weights that training removes: by magnitude, Deep R, gradient rewiring
    bake        tickets into plain weights; exact
    release     layers of a baked ticket become ordinary, for other classes or channels
    tune        baked tickets with their zeros fixed, to train the other weights
    compact     channels whose neurons are masked, out of the weights; equal up to rounding

Examples:
    >>> model = replay(spikezoo.create_model('mpbn_resnet20'), [('fold_mpbn', {}), ('fold_bn', {})])
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import nn

from spikezoo.checks import UnknownArgumentError, nearest
from spikezoo.transforms import dynsnn_training, pruning, ticket_start
from spikezoo.transforms.compact import compact
from spikezoo.transforms.dynsnn import dynsnn
from spikezoo.transforms.fold import fold_bn, fold_mpbn, set_recipe
from spikezoo.transforms.multisp import multisp
from spikezoo.transforms.record import Model, Training, Transform
from spikezoo.transforms.tickets import bake, release, set_epoch, ticket, tickets, tune

__all__ = [
    "FLAGS",
    "TRANSFORMS",
    "Model",
    "Training",
    "Transform",
    "apply",
    "bake",
    "compact",
    "dynsnn",
    "fold_bn",
    "fold_mpbn",
    "multisp",
    "register_transform",
    "release",
    "replay",
    "set_epoch",
    "ticket",
    "tune",
]


def _delivered(model: nn.Module) -> nn.Module:
    """The model with its tickets baked: the logits stay, bit for bit, and the file shrinks thirty times."""
    return bake(model) if tickets(model) else model


TRANSFORMS: dict[str, Transform] = {
    "fold_mpbn": Transform(fold_mpbn),
    "fold_bn": Transform(fold_bn),
    "ticket": Transform(
        ticket,
        flag="train a lottery ticket: kind=mpslt (lt, slt, mplt) sparsity=0.4 (the fraction removed) scope=layer ...",
        default={},
        flags=ticket_start.FLAGS,
        check_flags=ticket_start.check_flags,
        initialise=ticket_start.initialise,
        at_epoch=set_epoch,
        deliver=_delivered,
    ),
    "multisp": Transform(
        multisp,
        flag="MultiSp on Spikformer and AutoST models: pep_sparsity=0.4 (removed from the patch embedding's weights) "
        "patch_ratio=0.3 (of the patches removed) binary_pep=true fixed=false ...",
        at_epoch=set_epoch,
        deliver=_delivered,
    ),
    "dynsnn": Transform(
        dynsnn,
        flag="DynSNN: threshold=0.02 (the firing rate below which neurons fade) or compression=0.5 (of the neurons, "
        "removed) reactivate_at=[2,4] prune_at=6 (after these epochs) per=unit (or channel) ...",
        start=dynsnn_training.start,
        after_epoch=dynsnn_training.after_epoch,
        report=dynsnn_training.report,
    ),
    "prune": Transform(
        pruning.prune,
        flag="weights that training removes: method=magnitude (deep_r, gradient_rewiring) sparsity=0.9 ...",
        start=pruning.start,
        after_epoch=pruning.after_epoch,
        deliver=pruning.deliver,
        report=pruning.report,
    ),
    "bake": Transform(bake),
    "tune": Transform(
        tune,
        flag="train the weights that a baked ticket keeps, with --initial-checkpoint: binary=true (they stay at -gain, "
        "0 and gain)",
        deliver=_delivered,
    ),
    "release": Transform(release),
    "compact": Transform(compact),
}
# What create_model takes as arguments, to apply them to what it made.
FLAGS = [name for name, transform in TRANSFORMS.items() if transform.flag]


def register_transform(name: str, change: Callable[..., nn.Module | None], **options: Any) -> None:
    """Make a function a transform: recorded in checkpoints, replayed when they load, and part of training.

    Args:
        name: What recipes, :func:`apply` and the flag ``--NAME`` call it.
        change: Changes the model that it is given, a copy, and returns it, or another. Its structure may depend on
            the arguments only, which are plain data; what depends on values is a buffer or parameter.
        **options: What :class:`Transform` has besides ``apply``: ``flag`` and the hooks of training.

    Raises:
        ValueError: A name that is taken, or is none.

    Examples:
        >>> def magnitude(model, sparsity=0.5): ...
        >>> spikezoo.register_transform('magnitude', magnitude, flag='sparsity=0.5', after_epoch=cut)
    """
    if name in TRANSFORMS or not name.isidentifier():
        raise ValueError(f"Transform {name!r} {'exists' if name in TRANSFORMS else 'is no name'}: take another name.")

    @functools.wraps(change)
    def recorded(model: nn.Module, **arguments: object) -> nn.Module:
        given = inspect.signature(change).bind(model, **arguments)
        given.apply_defaults()
        copied = copy.deepcopy(model)
        entry = (name, dict(list(given.arguments.items())[1:]))
        changed = change(copied, **arguments) or copied
        set_recipe(changed, [*getattr(model, "recipe", []), entry])
        return changed.train(model.training)

    TRANSFORMS[name] = Transform(recorded, **options)
    if TRANSFORMS[name].flag:
        FLAGS.append(name)


def apply(model: Model, name: str, **arguments: object) -> Model:
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
    _, *known = inspect.signature(TRANSFORMS[name].apply).parameters
    for argument in arguments:
        if argument not in known:
            hint = nearest(argument, known) if known else "It takes none."
            raise UnknownArgumentError(f"Transform {name!r} has no argument {argument!r}. {hint}")
    return cast(Model, TRANSFORMS[name].apply(model, **arguments))


def replay(model: Model, recipe: Sequence[tuple[str, Mapping[str, Any]]]) -> Model:
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
