"""How long a run is: its updates, by sizes of the training images, and the schedule of the learning rate."""

from __future__ import annotations

import argparse
import itertools
import math
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from spikezoo.factory import SpikingModel

__all__ = ["Length", "check_sizes"]

# A size of the training images (None: as they are) and its number of updates.
Part = tuple[int | None, int]


def check_sizes(name: str, model: SpikingModel, given: dict[int, float]) -> None:
    """Raise where a model cannot see images of the sizes of ``--progressive``.

    Args:
        name: What the error calls the model.
        model: The model.
        given: Sizes, with their shares of the run.

    Raises:
        ValueError: As said.
    """
    full, sizes = min(model.img_size), sorted(given)
    if model.takes_events:
        raise ValueError(f"--progressive: {name} takes event frames, and only images are shrunk. Leave it out.")
    if sizes == [full]:
        return
    if model.fixed_img_size or model.mpbn == "element":
        raise ValueError(
            f"--progressive: {name} was built for images of {full}x{full} alone. Take a model with global pooling "
            "and, of the membrane norms, mpbn='channel'."
        )
    least = model.min_img_size
    for size in sizes:
        if not least <= size <= full:
            raise ValueError(f"--progressive size {size}: expected {least} to {full} for {name}.")
        model.check_size((size, size))  # the patches of a transformer have to fit


class Length:
    """Updates, epochs and schedule of a run.

    Args:
        args: Parsed flags.
        optimizer: What the schedule sets the learning rate of.
        updates_per_epoch: Updates in an epoch.

    Attributes:
        sizes: Sizes of the training images and their numbers of updates; [] until ``--train-time`` is measured.
        total: Updates.
        epochs: Epochs, the last one perhaps in part.
        scheduler: timm's, or None for a constant learning rate.
    """

    def __init__(self, args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> None:
        self.args, self.optimizer, self.updates_per_epoch = args, optimizer, updates_per_epoch
        self.sizes: list[Part] = []
        self.total, self.epochs, self.scheduler = 0, args.epochs, None
        if not args.train_time:
            self.set(self._shares(args.updates))

    def _shares(self, updates: int | None) -> list[Part]:
        """The parts of a run of so many updates (None: of all epochs)."""
        given: dict[Any, Any] = self.args.progressive or {None: 1.0}
        if updates is not None and all(isinstance(value, int) for value in given.values()) and sum(given.values()) > 1:
            return list(given.items())
        total = updates or self.args.epochs * self.updates_per_epoch
        ends = [round(total * part) for part in itertools.accumulate(given.values())]
        ends[-1] = total
        return [(size, end - start) for size, start, end in zip(given, [0, *ends], ends, strict=False)]

    def set(self, sizes: list[Part]) -> None:
        """Take the numbers of updates, and make the schedule for them.

        Args:
            sizes: As the attribute.
        """
        args, self.sizes = self.args, sizes
        self.total = sum(count for _, count in sizes)
        settings = scheduler_kwargs(args)
        if args.updates or args.train_time:
            settings["num_epochs"] = self.total
            settings["warmup_epochs"] = round(
                self.total * args.warmup_share if args.warmup_share else args.warmup_epochs * self.updates_per_epoch
            )
            settings["cooldown_epochs"] = args.cooldown_epochs * self.updates_per_epoch
            self.scheduler, _ = create_scheduler_v2(self.optimizer, **settings, updates_per_epoch=1)
            self.epochs = math.ceil(self.total / self.updates_per_epoch)
            return
        if args.warmup_share:
            settings["warmup_epochs"] = args.warmup_share * args.epochs
        self.scheduler, epochs = create_scheduler_v2(
            self.optimizer, **settings, updates_per_epoch=self.updates_per_epoch
        )
        self.epochs = math.ceil(epochs)  # a warmup before the schedule may last half an epoch
        if self.epochs != args.epochs:  # the last size lasts through what the schedule adds
            self.total = self.epochs * self.updates_per_epoch
            *first, (size, _) = sizes
            self.sizes = [*first, (size, self.total - sum(count for _, count in first))]

    def size_at(self, update: int) -> int | None:
        """Size of the training images at an update, None where they stay as they are."""
        for size, count in self.sizes:
            if update < count:
                return size
            update -= count
        return self.sizes[-1][0]
