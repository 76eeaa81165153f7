"""Loaders: batches of arrays, of event frames and of what timm reads, augmented, in an order that can be resumed.

A batch is a pure function of the seed, the epoch, its position and the rank, so a run that stops in mid-epoch continues
exactly with ``loader.iterate(start_batch)`` and no generator state has to be stored.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import DEFAULT_CROP_PCT, create_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as TF

from spikezoo.data.augmentation import (
    apply_policy,
    crop,
    cutout,
    cutout_pil,
    fit,
    policy,
    roll,
    seeded,
    seeded_generator,
    snn_policy,
)
from spikezoo.data.events.frames import EventFrames
from spikezoo.data.images import eight_bits, labels_of, names_of
from spikezoo.data.info import Batch, DatasetInfo, refuse
from spikezoo.data.options import LoaderOptions

_logger = logging.getLogger("spikezoo")

# A mirrored 2 or 7 is no digit, so these are not flipped unless somebody asks for it.
_NO_FLIP = frozenset({"digits", "mnist"})


# --- what all have in common ------------------------------------------------------------------------------------


def _statistic(option: str, given: Sequence[float] | None, own: Sequence[float], channels: int) -> tuple[float, ...]:
    """Mean or std for the delivered channels: as given, or the dataset's, converted."""
    if given is None:
        given = own if len(own) in (1, channels) else (sum(own) / len(own),)
    values = tuple(float(value) for value in given)
    finite = all(map(math.isfinite, values))
    if len(values) not in (1, channels) or not finite or (option == "std" and min(values) <= 0):
        wanted = f"{channels} numbers or one{', above 0' if option == 'std' else ''}"
        refuse(option, given, wanted, 0.5)
    return values if len(values) == channels else values * channels


def balanced(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose ``count`` indices with the classes as even as they can be, in stored order."""
    order = torch.randperm(len(labels), generator=seeded_generator("subset", seed))
    by_class = torch.argsort(labels[order], stable=True)
    sizes = torch.bincount(labels[order] - labels.min())
    first = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    # The k-th sample of every class comes before the k+1-th of any.
    turn = torch.empty_like(by_class)
    turn[by_class] = torch.arange(len(labels)) - first
    return order[torch.argsort(turn, stable=True)[:count]].sort().values


class _BaseLoader:
    """Conversions, order, shards, mixing and resuming; the subclasses make the batches."""

    info: DatasetInfo
    num_samples: int
    facts: dict[str, Any]

    def __init__(self, count: int, labels: Callable[[], Tensor], info: DatasetInfo, options: LoaderOptions) -> None:
        self.options = options
        self.facts = {}
        self.device = torch.device(options.device)
        channels = options.in_chans or info.in_chans
        if channels != info.in_chans and {channels, info.in_chans} != {1, 3}:
            wanted = f"{info.in_chans} as in {info.name} (only 1 to 3 and 3 to 1 are converted)"
            refuse("in_chans", channels, wanted, info.in_chans)
        size = options.img_size or info.img_size
        mean = _statistic("mean", options.mean, info.mean, channels)
        std = _statistic("std", options.std, info.std, channels)
        self.info = replace(info, in_chans=channels, img_size=size, mean=mean, std=std)
        self._count = count
        self._chosen = torch.arange(count)
        if options.holdout:
            if options.holdout >= count:
                refuse("holdout", options.holdout, f"below {count}, the size of the split of {info.name}", count // 10)
            held = torch.zeros(count, dtype=torch.bool)
            held[balanced(labels(), options.holdout, 0)] = True
            self._chosen = self._chosen[held if options.held_out else ~held]
        if options.subset is not None:
            left = len(self._chosen)
            if options.subset > left:
                refuse("subset", options.subset, f"from 1 to {left}, the size of the split of {info.name}", left)
            self._chosen = self._chosen[balanced(labels()[self._chosen], options.subset, options.seed)]
        self.num_samples = len(self._chosen)
        self._epoch = 0
        self._share = len(self._shard(0))
        self.drop_last = options.drop_last
        if self.drop_last is None:
            self.drop_last = options.train and self._share >= options.batch_size
        if options.train and not len(self):
            wanted = f"small enough for the {self._share} samples of a rank, as no batch is left"
            refuse("batch_size", options.batch_size, wanted, max(1, self._share))
        self._mixup = _make_mixup(info, options)

    def set_epoch(self, epoch: int) -> None:
        """See ``Loader``."""
        if epoch < 0:
            refuse("epoch", epoch, "at least 0", "set_epoch(0)")
        self._epoch = int(epoch)

    def _shard(self, epoch: int) -> Tensor:
        """The indices of this rank in the epoch."""
        options = self.options
        order = self._chosen
        if options.train:
            # One permutation for all ranks; the ends go so that all ranks have equally many.
            order = order[torch.randperm(len(order), generator=seeded_generator("order", options.seed, epoch))]
            order = order[: len(order) - len(order) % options.world_size]
        return order[options.rank :: options.world_size]

    @property
    def samples(self) -> Tensor:
        """The numbers of the samples in use, int64 [num_samples], in stored order."""
        return self._chosen

    def numbers(self, epoch: int, batch: int) -> Tensor:
        """The numbers of the samples in a batch of this rank, int64 [B]."""
        size = self.options.batch_size
        return self._shard(epoch)[batch * size : (batch + 1) * size]

    def __len__(self) -> int:
        share, size = self._share, self.options.batch_size
        return share // size if self.drop_last else math.ceil(share / size)

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def iterate(self, start_batch: int = 0) -> Iterator[Batch]:
        """See ``Loader``."""
        if not 0 <= start_batch <= len(self):
            refuse("start_batch", start_batch, f"from 0 to {len(self)}, the batches of an epoch", "iterate(0)")
        return self._batches(self._epoch, start_batch)

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        raise NotImplementedError

    def _move(self, images: Tensor, index: Tensor, epoch: int, batch: int, padding: int, hflip: float) -> Tensor:
        """Crop, translation, flip, cutout and roll of the samples ``index`` [B], as [B, C, H, W]."""
        options = self.options
        generator = seeded_generator("augment", options.seed, epoch, batch, options.rank)
        count, height, width = len(images), images.shape[2], images.shape[3]
        own: Tensor | slice = slice(None)
        if options.views:  # numbers for all samples, of which those of this batch take theirs
            epoch %= options.views
            generator = seeded_generator("view", options.seed, epoch)
            count, own = self._count, index.cpu()

        def draw(limit: int) -> Tensor:
            return torch.randint(limit, (count,), generator=generator)[own].to(images.device)

        if padding:
            top, left = draw(2 * padding + 1), draw(2 * padding + 1)
            images = crop(images, padding, top, left)
        if far := options.translate:
            images = crop(images, far, draw(2 * far + 1), draw(2 * far + 1), mirror=True)
        if hflip:
            if options.alternating_flip:
                first = torch.rand(self._count, generator=seeded_generator("flip", options.seed)) < hflip
                chosen = first[index.cpu()] ^ bool(epoch % 2)
            else:
                chosen = (torch.rand(count, generator=generator) < hflip)[own]
            images = torch.where(chosen.to(images.device)[:, None, None, None], images.flip(3), images)
        if options.cutout:
            images = cutout(images, options.cutout, draw(height), draw(width))
        if options.roll:
            far = 2 * options.roll + 1
            images = roll(images, draw(far) - options.roll, draw(far) - options.roll)
        return images

    def _finish(self, images: Tensor, labels: Tensor, epoch: int, batch: int) -> Batch:
        if self._mixup is not None:
            # timm mixes each image with its mirror position and refuses odd batches: there the last image stays.
            even = len(images) // 2 * 2
            # It takes the axes 2 and 3 for height and width: the time steps of event frames pass for channels. That is
            # a view, and it mixes in place.
            flat = images.flatten(1, -3)
            with seeded("mix", self.options.seed, epoch, batch, self.options.rank):
                soft = [self._mixup(flat[:even], labels[:even])[1]] if even else []
            if even < len(images):
                soft.append(mixup_target(labels[even:], self._mixup.num_classes, 1.0, self.options.smoothing))
            labels = torch.cat(soft)
        if self.options.channels_last:
            if images.dim() == 5:  # so that the T * B frames, which a model sees as one batch, have this format
                images = images.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3)
            else:
                images = images.contiguous(memory_format=torch.channels_last)
        return images, labels


def _make_mixup(info: DatasetInfo, options: LoaderOptions) -> Mixup | None:
    classes = options.num_classes or info.num_classes
    if classes < info.num_classes:
        refuse("num_classes", classes, f"at least the {info.num_classes} classes of {info.name}", info.num_classes)
    if not options.train or not (options.mixup or options.cutmix):
        return None
    if not classes:
        raise ValueError(f"mixup and cutmix: {info.name} does not tell its classes; type --num-classes N")
    probabilities = {"prob": options.mixup_prob, "switch_prob": options.mixup_switch_prob}
    alphas = {"mixup_alpha": options.mixup, "cutmix_alpha": options.cutmix}
    return Mixup(**alphas, **probabilities, label_smoothing=options.smoothing, num_classes=classes)


# Augmentations that are no function of the sample and a view's number.
_BY_BATCH = ("auto_augment", "reprob", "mixup", "cutmix")


class ArrayLoader(_BaseLoader):
    """Batches of a dataset that is one uint8 tensor on the device.

    A train batch goes through, in this order: conversion of channels, resizing, the policy, crop, translation, flip,
    cutout, roll (all on uint8), normalisation, random erasing, mixing.
    """

    def __init__(self, images: Tensor, labels: Tensor, info: DatasetInfo, options: LoaderOptions) -> None:
        super().__init__(len(labels), lambda: labels, info, options)
        size, channels = self.info.img_size, self.info.in_chans
        grey_file = info.name.startswith("npz:") and info.in_chans == 1
        own = 0.0 if info.name in _NO_FLIP or grey_file else 0.5
        self._hflip: float = own if options.hflip is None else options.hflip
        padding = 0 if options.translate else 2 if size == 28 else size // 8
        self._padding: int = padding if options.crop_padding is None else options.crop_padding
        self._images, self._labels = images.to(self.device), labels.to(self.device)
        self._mean, self._std = (
            torch.tensor(values, device=self.device).mul_(255).view(1, channels, 1, 1)
            for values in (self.info.mean, self.info.std)
        )
        self._policy = self._erase = None
        if options.train and options.auto_augment:
            if channels not in (1, 3):
                refuse("auto_augment", options.auto_augment, f"left out for {channels} channels", "auto_augment=None")
            if options.auto_augment == "snn":
                refuse("auto_augment", "snn", "a policy for images, as snn is for event frames", "cifar10")
            self._policy = policy(options.auto_augment, size, self.info.mean)
        if options.views and (drawn := [name for name in _BY_BATCH if getattr(options, name)]):
            refuse("views", options.views, f"left out beside {drawn[0]}, which is drawn anew for every batch", 8)
        if options.train and options.reprob:
            # Its noise is drawn on the CPU for the reason that the module's first lines give.
            self._erase = RandomErasing(options.reprob, mode=options.remode, device="cpu")

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        count = self.options.batch_size
        shard = self._shard(epoch).to(self.device)
        for batch in range(start_batch, len(self)):
            index = shard[batch * count : (batch + 1) * count]
            images = self.load(index, epoch, batch)
            yield self._finish(images, self._labels[index], epoch, batch)

    def load(self, index: Tensor, epoch: int, batch: int = 0) -> Tensor:
        """Samples by their numbers, as they are in an epoch; with views the number of the batch does not matter.

        Args:
            index: Numbers of the samples, int64 [B].
            epoch: The epoch, or the view.
            batch: Number of the batch.

        Returns:
            Normalised images, float32 [B, C, H, W], not mixed.
        """
        index = index.to(self.device)
        images = self._convert(self._images[index])
        if self.options.train:
            images = self._augment(images, index, epoch, batch)
        images = images.to(torch.float32, memory_format=torch.contiguous_format)
        images.sub_(self._mean).div_(self._std)
        if self._erase is not None:
            with seeded("erase", self.options.seed, epoch, batch, self.options.rank):
                images = self._erase(images)
        return images

    def digest(self) -> str:
        """Hash of all stored images and labels."""
        found = hashlib.sha256(self._images.cpu().numpy().tobytes())
        found.update(self._labels.cpu().numpy().tobytes())
        return found.hexdigest()

    def _convert(self, images: Tensor) -> Tensor:
        """Bring stored images to the delivered channels and size."""
        size, channels = self.info.img_size, self.info.in_chans
        if channels < images.shape[1]:
            # In float and rounded, as torchvision cuts the fractions of uint8 off.
            images = TF.rgb_to_grayscale(images.float()).round_().to(torch.uint8)
        elif channels > images.shape[1]:
            images = images.expand(-1, channels, -1, -1)
        return images if images.shape[-1] == size else TF.resize(images, [size, size], antialias=True)

    def _augment(self, images: Tensor, index: Tensor, epoch: int, batch: int) -> Tensor:
        if self._policy is not None:
            with seeded("policy", self.options.seed, epoch, batch, self.options.rank):
                images = apply_policy(self._policy, images)
        return self._move(images, index, epoch, batch, self._padding, self._hflip)


# --- event frames ---------------------------------------------------------------------------------------------

# Whether somebody waves the left hand or the right is a class of DVS128 Gesture, and a mirrored 2 is no digit.
_FLIPPED_EVENTS = ("cifar10dvs", "cifar10dvs_tebn")


class EventLoader(_BaseLoader):
    """Batches of event frames: numbers of events, off and on, as float32 [B, T, 2, H, W].

    A train batch goes through, in this order: resizing, the policy, crop, flip, cutout, roll, normalisation, mixing.
    All of it acts on height and width, alike on all time steps of a recording.
    """

    def __init__(self, frames: EventFrames, info: DatasetInfo, options: LoaderOptions) -> None:
        if options.train and options.auto_augment not in (None, "snn"):
            refuse("auto_augment", options.auto_augment, "snn, since events have no colours", "--aa snn")
        if options.train and options.reprob:
            refuse("reprob", options.reprob, "left out for event frames (cutout makes empty holes)", 0)
        super().__init__(len(frames), lambda: frames.labels, replace(info, split_note=frames.split), options)
        self.frames = frames
        self.facts = {"split_note": frames.split, "frames_by": options.frames_by or "number"}
        if options.duration_us is not None:
            self.facts["duration_us"] = options.duration_us
        self._labels = frames.labels.to(self.device)
        own = 0.5 if info.name in _FLIPPED_EVENTS else 0.0
        self._hflip: float = own if options.hflip is None else options.hflip
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(1, 1, 2, 1, 1) for values in (self.info.mean, self.info.std)
        )

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        options, count = self.options, self.options.batch_size
        shard = self._shard(epoch)
        for batch in range(start_batch, len(self)):
            index = shard[batch * count : (batch + 1) * count]
            stored = torch.from_numpy(np.asarray(self.frames.frames[index.numpy()]))
            frames = fit(stored.to(self.device).to(torch.float32), self.info.img_size)
            if options.train:
                frames = self._augment(frames, index, epoch, batch)
            frames = ((frames - self._mean) / self._std).contiguous()
            yield self._finish(frames, self._labels[index.to(self.device)], epoch, batch)

    def _augment(self, frames: Tensor, index: Tensor, epoch: int, batch: int) -> Tensor:
        flat = frames.flatten(1, 2)  # the time steps as channels
        if self.options.auto_augment:
            place = (self.options.seed, epoch, batch, self.options.rank)
            flat = snn_policy(flat, seeded_generator("policy", *place))
        padding = self.options.crop_padding or 0
        return self._move(flat, index, epoch, batch, padding, self._hflip).unflatten(1, (-1, 2))


# --- what timm reads --------------------------------------------------------------------------------------------


def _timm_transform(info: DatasetInfo, options: LoaderOptions) -> Callable[[Image.Image], Any]:
    """Timm's transforms, with our policies and cutout between them; no colour jitter."""
    common: dict[str, Any] = {"input_size": (info.in_chans, info.img_size, info.img_size), "mean": info.mean}
    common |= {"std": info.std, "interpolation": options.interpolation}
    # The policies need RGB; grey comes after them.
    rgb = operator.methodcaller("convert", "RGB")
    mode = operator.methodcaller("convert", "L" if info.in_chans == 1 else "RGB")
    if not options.train:
        return transforms.Compose([eight_bits, mode, create_transform(crop_pct=options.crop_pct, **common)])
    common |= {
        "scale": options.scale,
        "ratio": options.ratio,
        "hflip": 0.5 if options.hflip is None else options.hflip,
        "color_jitter": None,
    }
    common |= {"re_prob": options.reprob, "re_mode": options.remode}
    primary, _, final = create_transform(is_training=True, separate=True, **common)
    steps = [eight_bits, rgb if options.auto_augment else mode, primary]
    if options.auto_augment:
        steps += [policy(options.auto_augment, info.img_size, info.mean), mode]
    if options.cutout:
        steps.append(functools.partial(cutout_pil, size=options.cutout))
    return transforms.Compose([*steps, final])


def _cores() -> int:
    """Processor cores that this process may use: torch warns of workers that would have none."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _SeededItems(torch.utils.data.Dataset):
    """Makes a sample a function of (seed, epoch, index), whichever worker loads it; what is damaged is handed on."""

    def __init__(self, dataset: torch.utils.data.Dataset[object], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> object:
        with seeded("item", self.seed, *key):
            try:
                return self.dataset[key[1]]
            except ValueError as error:
                return error


def _collated(items: list[Any]) -> tuple[Any, list[ValueError]]:
    """A batch of those samples that could be read, and the errors of the others."""
    good = [item for item in items if not isinstance(item, ValueError)]
    return torch.utils.data.default_collate(good) if good else None, [i for i in items if isinstance(i, ValueError)]


class TimmLoader(_BaseLoader):
    """Batches of a dataset that timm reads, with the protocol of ``Loader``.

    timm's dataset and transforms are used, but not its ``create_loader``: that shuffles with torch's global generator,
    pads the shards of an evaluation with doubles and has to read what a resumed epoch skips.
    """

    def __init__(self, dataset: Any, info: DatasetInfo, options: LoaderOptions) -> None:
        for name in ("roll", "translate"):
            if options.train and getattr(options, name):
                refuse(name, getattr(options, name), "0 for datasets that timm reads", 0)
        if options.train and (options.views or options.alternating_flip):
            raise ValueError("views and alternating_flip are for data held in memory: leave them out for timm's.")
        names = names_of(dataset)
        info = replace(info, num_classes=len(names) or options.num_classes or 0, label_names=names)
        super().__init__(len(dataset), lambda: labels_of(dataset), info, options)
        dataset.transform = _timm_transform(self.info, options)
        dataset.replace_damaged = options.train
        self.dataset = dataset
        self.facts = {"crop_pct": options.crop_pct or DEFAULT_CROP_PCT, "interpolation": options.interpolation}

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        options, count = self.options, self.options.batch_size
        keys = [(epoch, index) for index in self._shard(epoch).tolist()]
        loader = torch.utils.data.DataLoader(
            _SeededItems(self.dataset, options.seed),
            batch_sampler=[keys[i * count : (i + 1) * count] for i in range(start_batch, len(self))],
            num_workers=min(options.num_workers, _cores()),
            pin_memory=self.device.type == "cuda",
            collate_fn=_collated,
            # Its own generator: torch would draw the workers' seed from the global one.
            generator=seeded_generator("workers", options.seed, epoch, options.rank),
        )
        left_out = 0
        for batch, (samples, faults) in enumerate(loader, start_batch):
            if faults and not options.skip_damaged:
                raise faults[0]
            for fault in faults:
                _logger.warning("%s; it is left out.", fault)
            if faults:
                left_out += len(faults)
                self.facts["left_out"] = left_out
            if samples is not None:
                images, labels = (tensor.to(self.device, non_blocking=True) for tensor in samples)
                yield self._finish(images, labels, epoch, batch)
