"""What a dataset is to a model and to the rest of the package: its description, its loader's protocol, its folder."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor

from spikezoo.checks import nearest

_logger = logging.getLogger("spikezoo")

Batch = tuple[Tensor, Tensor]

_SPLITS = {"train": "train", "test": "test", "validation": "test", "val": "test", "eval": "test"}
_LITTER = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})


@dataclass(frozen=True)
class DatasetInfo:
    """What a model has to know of a dataset."""

    name: str  # the name it is asked for by
    num_classes: int  # 0 where the data has to be opened to know it (torch/, hfds/)
    in_chans: int
    img_size: int  # side length of an image
    mean: tuple[float, ...]  # of each channel, of values in 0..1
    std: tuple[float, ...]
    split_note: str  # how train and test are told apart
    label_names: tuple[str, ...] = ()  # of the classes, in the order of their numbers; empty where they have none


@runtime_checkable
class Loader(Protocol):
    """What ``create_loader`` returns.

    ``len(loader)`` is the number of batches per epoch on this rank, ``num_samples`` the number of samples of the whole
    split over all ranks (of the subset where one was asked for), and ``info`` describes the images as delivered (size,
    channels, mean and std after every conversion).
    """

    info: DatasetInfo
    num_samples: int
    facts: dict[str, Any]  # what a result has to say of the data besides its name

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order and the augmentations, of later iterations."""

    def iterate(self, start_batch: int = 0) -> Iterator[Batch]:
        """Yield what a full iteration yields from batch ``start_batch`` on."""


def refuse(option: str, value: object, wanted: str, example: object) -> NoReturn:
    """Raise ValueError for an option; an example that is no text is shown as the scripts' flag."""
    if not isinstance(example, str):
        flag = {"num_workers": "workers", "auto_augment": "aa"}.get(option, option).replace("_", "-")
        example = f"--{flag} {example}"
    raise ValueError(f"{option}={value!r} is not possible: it must be {wanted}, e.g. {example}")


def check_split(split: str) -> str:
    """Return ``train`` or ``test`` for any name of a split; ValueError for another."""
    if split not in _SPLITS:
        refuse("split", split, "train or test (validation, val and eval mean test)", "split='train'")
    return _SPLITS[split]


def data_root(data_dir: str | None) -> Path:
    """The folder of the data: as given, else the environment's SPIKEZOO_DATA, else ./data."""
    return Path(data_dir or os.environ.get("SPIKEZOO_DATA") or "./data").expanduser()


def natural(name: object) -> tuple[list[int | str], str]:
    """The key that sorts names with their numbers as numbers, 9 before 10, and no two names as equals.

    Cat and cat, or 1 and 01, would otherwise come in an order that is another one in every process.
    """
    parts = re.split(r"(\d+)", str(name).lower())
    return [int(part) if part.isdecimal() else part for part in parts], str(name)


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden, or one that systems and programs leave among data."""
    return name.startswith(".") or name in _LITTER


def subfolders(folder: Path) -> dict[str, Path]:
    """The folders in a folder by name, without litter; each real one once, whatever links lead to it or back."""
    if not folder.is_dir():
        return {}
    found = [path for path in folder.iterdir() if path.is_dir() and not is_litter(path.name)]
    here, seen, kept = folder.resolve(), set(), {}
    for path in sorted(found, key=lambda path: (path.is_symlink(), path.name)):  # a link never hides what it leads to
        real = path.resolve()
        if real not in seen and not here.is_relative_to(real):
            kept[path.name] = path
        seen.add(real)
    return kept


def number_classes(found: Iterable[str], known: Sequence[str], place: object, whose: str) -> dict[str, int]:
    """The number of each class of a dataset, by the names that somebody knows.

    Args:
        found: Names of the classes that there are.
        known: Names in the order of their numbers.
        place: Where they were found, for the message.
        whose: Who knows the names, likewise.

    Raises:
        ValueError: A class that is not known, or known by two numbers.
    """
    if unknown := [name for name in found if name not in known]:
        raise ValueError(
            f"{place} has the class {unknown[0]!r}, which {whose} does not have. {nearest(unknown[0], known)} Rename "
            f"its folder, or take it out"
        )
    if twice := [name for name in found if list(known).count(name) > 1]:
        raise ValueError(f"{place} has the class {twice[0]!r}, and {whose} has two of that name: which number is its?")
    return {name: number for number, name in enumerate(known)}


def shared_names(own: Sequence[str], known: Sequence[str], place: object) -> tuple[str, ...]:
    """The names that a model has for its classes; none, and a warning, where a dataset has only others."""
    if set(own) & set(known):
        return tuple(known)
    if known:
        _logger.warning(
            "%s: the model has other names for its classes (%s) than the data (%s); both are taken in order.",
            place, _listed(known), _listed(own),
        )  # fmt: skip
    return ()


def renumber(labels: Tensor, own: Sequence[str], known: Sequence[str], place: object) -> tuple[Tensor, tuple[str, ...]]:
    """Give labels the numbers that a model has for the names of their classes, where it knows these names.

    Args:
        labels: int64 [N], numbers of ``own``.
        own: Names of the dataset's classes.
        known: Names of the model's.
        place: The dataset, for messages.

    Returns:
        The labels, and the names in the order of their numbers.

    Raises:
        ValueError: The model knows some of the names, but not all.
    """
    names = shared_names(own, known, place)
    if not names or names == tuple(own):
        return labels, tuple(own)
    numbers = number_classes(own, names, place, "the model")
    return torch.tensor([numbers[name] for name in own])[labels], names


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
