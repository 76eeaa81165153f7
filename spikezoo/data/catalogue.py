"""Datasets by name: what there is, what it is like, and its loader."""

from __future__ import annotations

import difflib
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from spikezoo.data.arrays import ARRAY_INFOS, array_info, is_array_dataset, load_split
from spikezoo.data.events import event_info, is_event_dataset, list_event_datasets, open_events
from spikezoo.data.images import (
    EVERY_PART,
    FOLDER_NAMES,
    TIMM_PREFIXES,
    class_names,
    image_place,
    is_read_by_timm,
    open_images,
)
from spikezoo.data.info import Batch, DatasetInfo, Loader, check_split, refuse, renumber
from spikezoo.data.loaders import ArrayLoader, EventLoader, TimmLoader
from spikezoo.data.options import LoaderOptions


def list_datasets() -> list[str]:
    """List what ``--dataset`` understands: names held in memory, image folders and patterns, event recordings."""
    images = [*ARRAY_INFOS, "npz:PATH", *FOLDER_NAMES, *(f"{prefix}NAME" for prefix in TIMM_PREFIXES)]
    return images + list_event_datasets()


def dataset_info(name: str, data_dir: str | None = None) -> DatasetInfo:
    """Describe a dataset, opening files only where the description is in them.

    Args:
        name: Name of the dataset, see ``list_datasets``.
        data_dir: Folder of the data; needed for ``folder``, and tried for a relative ``npz:PATH``.

    Raises:
        ValueError: The name is unknown or the file is not usable.
        FileNotFoundError: The file or folder is not there.
    """
    _check_text(name)
    if is_array_dataset(name):
        return array_info(name, data_dir)
    if is_event_dataset(name):
        return event_info(name, data_dir)
    _check_timm_name(name)
    info = DatasetInfo(name, 0, 3, 224, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "the splits of the source")
    if name == "folder":
        names = class_names(name, data_dir)
        return replace(info, num_classes=len(names), label_names=names)
    if name == "imagenet":
        if data_dir is not None:
            image_place(name, EVERY_PART, data_dir)  # so that a wrong folder is said before a model is built
        return replace(info, num_classes=1000)
    return info


def natural_dataset(img_size: int, in_chans: int, num_classes: int) -> str:
    """Name the dataset that a model of this shape is made for; ValueError where none fits."""
    if in_chans == 2:
        for name in ("nmnist", "cifar10dvs", "dvs128gesture"):
            info = dataset_info(name)
            if (img_size, num_classes) == (info.img_size, info.num_classes):
                return name
    elif img_size == 8:
        return "digits"
    elif img_size == 28 and in_chans == 1:
        return "mnist"
    elif img_size == 32 and num_classes in (10, 100):
        return f"cifar{num_classes}"
    elif img_size >= 64 and in_chans == 3:
        return "imagenet"
    raise ValueError(
        f"no dataset is the natural one for img_size={img_size}, in_chans={in_chans}, num_classes={num_classes}; name "
        f"one, e.g. --dataset digits (8 px), mnist (28), cifar10, cifar100 (32), imagenet (64 and more) or npz:PATH; "
        f"nmnist, cifar10dvs, dvs128gesture or events:PATH for event frames (in_chans=2)"
    )


def load_arrays(name: str, split: str, data_dir: str | None = None, download: bool = True) -> Batch:
    """Load a whole split of a dataset that fits into memory; arguments as in ``create_loader``.

    Returns:
        Images as uint8 [N, C, H, W] and labels as int64 [N], in stored order.

    Raises:
        ValueError: Name, split or file is not usable.
        FileNotFoundError: The data is not there and could not be downloaded.
    """
    split = check_split(split)
    if is_array_dataset(name):
        return load_split(name, split, data_dir, download)
    if not is_event_dataset(name):
        _check_timm_name(name)
    raise ValueError(f"dataset {name!r} is not held in memory; use create_loader({name!r}, ...) instead")


def _check_text(name: object) -> None:
    if not isinstance(name, str):
        raise ValueError(f"dataset {name!r}: expected a name such as 'digits'. Known are {', '.join(list_datasets())}")


def _check_timm_name(name: str) -> None:
    """Raise ValueError for a name that nothing here reads, with the nearest names."""
    if is_read_by_timm(name):
        return
    if Path(name).suffix == ".npz":
        hint = f"for a file of arrays type --dataset npz:{name}"
    elif os.path.exists(name):
        hint = f"for a folder or tar file of images type --dataset folder --data-dir {name}"
    elif name.lower().startswith(("hfids/", "tfds/")):
        hint = "streams cannot be resumed in mid-epoch; type --dataset hfds/NAME, wds/NAME (shards on disk) or folder"
    elif near := difflib.get_close_matches(name.lower(), list_datasets(), n=3, cutoff=0.5):
        hint = f"did you mean {' or '.join(near)}? Type --dataset {near[0]}"
    else:
        hint = "e.g. --dataset digits"
    raise ValueError(f"unknown dataset {name!r}: {hint}. Known are {', '.join(list_datasets())}")


def create_loader(name: str, split: str, **options: Any) -> Loader:
    """Make the loader of a dataset's split.

    Args:
        name: Name of the dataset, see ``list_datasets``.
        split: ``train`` or ``test`` (``validation``, ``val`` and ``eval`` mean test); passed on as it is for ``hfds/``.
        **options: The attributes of ``LoaderOptions``.

    Returns:
        The loader: normalised float32 images [B, C, H, W] or event frames [B, T, 2, H, W] and int64 targets [B], or
        soft float32 targets [B, num_classes] with mixup or cutmix.

    Raises:
        ValueError: An argument is not possible.
        FileNotFoundError: The data is not there.
    """
    _check_text(name)
    known = [field.name for field in fields(LoaderOptions)]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0)[0]
            raise ValueError(f"create_loader has no option {option!r}: did you mean {near}? It has {', '.join(known)}")
    chosen = LoaderOptions(**options)
    model_names = () if chosen.train else tuple(chosen.label_names)
    if is_event_dataset(name):
        how: dict[str, Any] = {"frames_by": chosen.frames_by or "number", "duration_us": chosen.duration_us}
        recordings = open_events(name, split, data_dir=chosen.data_dir, T=chosen.T, download=chosen.download, **how)
        labels, names = renumber(recordings.labels, recordings.classes, model_names, name)
        recordings = replace(recordings, labels=labels, classes=list(names))
        info = replace(dataset_info(name, chosen.data_dir), num_classes=len(names), label_names=names)
        return EventLoader(recordings, info, chosen)
    if chosen.frames_by or chosen.duration_us:
        refuse("frames_by", chosen.frames_by, f"left out for {name}, which holds images", "--dataset nmnist")
    if is_array_dataset(name):
        info = array_info(name, chosen.data_dir)
        images, labels = load_arrays(name, split, chosen.data_dir, chosen.download)
        if info.label_names:
            labels, names = renumber(labels, info.label_names, model_names, name)
            info = replace(info, num_classes=len(names), label_names=names)
        return ArrayLoader(images, labels, info, chosen)
    _check_timm_name(name)
    # The loader counts the classes of the dataset it has opened, so nothing is scanned twice here.
    info = replace(dataset_info("imagenet"), name=name)
    return TimmLoader(open_images(name, split, chosen.data_dir, chosen.download, model_names), info, chosen)
