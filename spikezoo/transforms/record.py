"""What a transform is to the rest of the package: how it is applied, its flag of training, its part in a run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Model", "Training", "Transform"]

Model = TypeVar("Model", bound=nn.Module)  # what a transform takes, and returns a changed copy of


class Training(Protocol):
    """A run of training, as the hooks of a transform see it.

    Attributes:
        optimizer: Its ``param_groups`` and ``state`` hold what belongs to the parameters of ``model``.
        epoch: Epochs that are done.
        seed: The run's seed.
    """

    optimizer: torch.optim.Optimizer
    epoch: int
    seed: int

    @property
    def model(self) -> nn.Module:
        """The model that is trained, transformed."""

    @property
    def ema(self) -> nn.Module | None:
        """The model of averaged weights, or None."""

    @property
    def epochs(self) -> int:
        """Epochs that the run has."""

    def images(self, most: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of at most so many training images, classes balanced, without augmentation, and their labels."""

    def evaluate(self) -> dict[str, Any]:
        """Measure the model: top1, top5, loss, ...; under 'ema' the same of the averaged weights."""

    def say(self, text: str) -> None:
        """Print a line, of several processes only once."""

    def autocast(self) -> AbstractContextManager[object]:
        """The number format of the run's forward passes."""


@dataclass(frozen=True)
class Transform:
    """A transform and its part in training. All hooks may be left out.

    Attributes:
        apply: Takes a model and plain data, returns a changed copy with one more entry in its ``recipe``.
        flag: What ``--NAME K=V`` of training says of itself in its help; '' where the transform is not for training.
            The same name is an argument of :func:`spikezoo.create_model` then.
        default: What the flag holds where it is not given, which means: no transform.
        flags: Further flags of training, with what ``argparse`` is told of them. They say what ``initialise`` starts
            from: a run that goes on does not look at them.
        check_flags: Called with the parsed flags; raises where they do not go together.
        initialise: Called with the fresh model and the parsed flags, before anything else.
        start: Called once when a run is built, with the :class:`Training` and the transform's arguments; raises where
            they do not fit the run.
        at_epoch: Called with the model before every epoch with its number, and with infinity before the model is
            evaluated or delivered.
        after_epoch: Called after every epoch with the :class:`Training` and the arguments; returns columns of
            summary.csv, the same of every epoch, or {}.
        deliver: Makes of the trained model the one that is saved.
        report: Returns of the delivered model what its results say.
    """

    apply: Callable[..., nn.Module]
    flag: str = ""
    default: Mapping[str, Any] | None = None
    flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    check_flags: Callable[[argparse.Namespace], None] | None = None
    initialise: Callable[[nn.Module, argparse.Namespace], None] | None = None
    start: Callable[[Training, Mapping[str, Any]], None] | None = None
    at_epoch: Callable[[nn.Module, float], None] | None = None
    after_epoch: Callable[[Training, Mapping[str, Any]], Mapping[str, Any]] | None = None
    deliver: Callable[[nn.Module], nn.Module] | None = None
    report: Callable[[nn.Module], Mapping[str, Any]] | None = None
