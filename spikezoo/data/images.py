"""Folders and tar files of images, and what else timm reads: found, numbered by the names of the classes, decoded."""

from __future__ import annotations

import functools
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions
from timm.data.readers.reader import Reader
from torch import Tensor

from spikezoo.data.info import (
    check_split,
    data_root,
    is_litter,
    natural,
    number_classes,
    renumber,
    shared_names,
    subfolders,
)
from spikezoo.data.shards import Shards, find_shards

FOLDER_NAMES = ("imagenet", "folder")
TIMM_PREFIXES = ("torch/", "hfds/", "wds/")
EVERY_PART = ("train", "val", "validation", "test")
_TORCH_FOLDERS = ("torch/folder", "torch/image_folder")  # torchvision numbers the classes of each split by itself
_LAYOUT = "FOLDER contains train/CLASS/*.JPEG and val/CLASS/*.JPEG (any image format)"
_KINDS = frozenset(
    [".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".jp2", ".pbm", ".pgm", ".ppm", ".tif", ".tiff", ".webp"]
)
# Of what Pillow knows, no format that another program is run for, whatever the name of the file says.
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_TRIES = 10  # images in a row that a training may find damaged

_logger = logging.getLogger("spikezoo")
_warn_once = functools.lru_cache(maxsize=256)(_logger.warning)


def is_read_by_timm(name: str) -> bool:
    """Whether a dataset is images that timm opens, crops and resizes."""
    prefix, _, rest = name.partition("/")
    return name in FOLDER_NAMES or (f"{prefix.lower()}/" in TIMM_PREFIXES and bool(rest))


# --- decoding ---------------------------------------------------------------------------------------------------


def eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of 16 bits to 8, where Pillow cuts it off; other images stay as they are.

    Raises:
        ValueError: An image of 32 bits a pixel, whose white nobody knows.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"it has 32 bits a pixel (mode {image.mode!r}), whose white is not known: store 8 or 16 bits")
    return image


class Images(torch.utils.data.Dataset):
    """Images of one of timm's readers, decoded at their depth.

    A damaged image is a ValueError that names it, as its neighbour in its place would be counted twice. With
    ``replace_damaged``, for training, it is its neighbour, and a warning.
    """

    transform: Callable[[Image.Image], Any]
    replace_damaged = False

    def __init__(self, reader: Any, classes: Sequence[str], labels: Sequence[int] | None = None) -> None:
        self.reader, self.classes, self.labels = reader, tuple(classes), labels  # None: the reader knows them

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for tried in range(_TRIES):
            try:
                image, label = self._decoded((index + tried) % len(self))
                break
            except ValueError as error:
                if not self.replace_damaged or tried + 1 == _TRIES:
                    raise
                _logger.warning("%s; the next one takes its place.", error)
        return self.transform(image), label

    def _decoded(self, index: int) -> tuple[Image.Image, int]:
        try:
            file, label, *_ = self.reader[index]
            with file:
                image = Image.open(file, formats=_FORMATS)
                image.load()
            return eight_bits(image), int(label if self.labels is None else self.labels[index])
        except Exception as error:  # decoders raise whatever they stumble over
            name = self.reader.filename(index, absolute=True)
            raise ValueError(f"the image {name} cannot be read ({type(error).__name__}: {error})") from error


def labels_of(dataset: object) -> Tensor:
    """All labels of a dataset, int64 [N], without reading an image."""
    if isinstance(dataset, Images):
        return torch.tensor(list(dataset.reader.iter_targets()) if dataset.labels is None else dataset.labels)
    if hasattr(dataset, "targets"):
        return torch.as_tensor(dataset.targets)
    assert hasattr(dataset, "samples")
    return torch.tensor([sample[1] for sample in dataset.samples])


def names_of(dataset: object) -> tuple[str, ...]:
    """The names of the classes of a dataset, in the order of their numbers; empty where it has none."""
    return tuple(map(str, getattr(dataset, "classes", ())))


# --- folders and tar files --------------------------------------------------------------------------------------


class _Files(Reader):
    """Files by number, as timm's readers hand them out."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, None]:
        return open(self.files[index], "rb"), None

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.files[index]


def _in_folder(folder: str) -> dict[str, str]:
    """The images below a folder, in natural order, and the name of the folder that each is in.

    Litter is left out. Links are followed, but none that leads back to where the search came from, and no folder is
    searched twice.
    """
    here, seen, found = os.path.realpath(folder), set(), {}
    left: Counter[str] = Counter()
    rest, links = [folder], list[str]()
    while rest or links:  # links last, lest one takes the name of the folder that it leads to
        place = rest.pop() if rest else links.pop(0)
        real = os.path.realpath(place)
        if real in seen or (place != folder and Path(here).is_relative_to(real)):
            continue
        seen.add(real)
        for entry in os.scandir(place):
            suffix = os.path.splitext(entry.name)[1].lower()
            if is_litter(entry.name):
                continue
            if os.path.isdir(entry.path):  # False, too, of a link to itself
                (links if entry.is_symlink() else rest).append(entry.path)
            elif suffix not in _KINDS:
                left[suffix or entry.name] += 1
            elif not os.path.isfile(entry.path) and not entry.is_symlink():  # whoever opens a pipe waits for ever
                left["pipes or devices"] += 1
            elif place == folder:
                left["in no folder of a class"] += 1
            else:
                found[entry.path] = os.path.basename(place)
    homes: dict[str, set[str]] = {}
    for file, label in found.items():
        homes.setdefault(label, set()).add(os.path.relpath(os.path.dirname(file), folder))
    for label, several in homes.items():
        if len(several) > 1:
            _warn_once(f"{folder}: {', '.join(sorted(several)[:3])} and so on are one class, {label!r}")
    every = set().union(*homes.values())
    if inner := sorted(home for home in every if os.path.dirname(home) in every):
        _warn_once(f"{folder}: {inner[0]} has images, and so has the folder around it: they are taken for two classes")
    if left:
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
        _warn_once(f"{folder}: left out are {told}; read are {', '.join(sorted(_KINDS))}")
    return {file: found[file] for file in sorted(found, key=natural)}


def _in_tar(file: str) -> tuple[Any, list[str]]:
    """Timm's reader of the images in a tar file, without litter, and the name of the folder that each is in."""
    before = get_img_extensions()
    try:
        set_img_extensions(sorted(_KINDS))  # timm's, for its reader of tar files
        reader = create_dataset("", root=file, search_split=False).reader
    finally:
        set_img_extensions(before)
    labels = [reader.class_idx_to_name[int(number)] for number in reader.targets]
    kept = [
        i
        for i, sample in enumerate(reader.samples)
        if labels[i] not in ("", ".") and not any(is_litter(part) for part in Path(sample[0].path).parts if part != ".")
    ]
    reader.samples = reader.samples[kept]
    return reader, [labels[i] for i in kept]


def _find(name: str, place: Path) -> tuple[Any, list[str]]:
    """A reader of the images in a folder or tar file, and the name of the class of each."""
    try:
        if place.is_dir():
            found = _in_folder(str(place))
            reader, labels = _Files(list(found)), list(found.values())
        else:
            reader, labels = _in_tar(str(place))
        if not labels:
            raise ValueError(f"known are {', '.join(sorted(_KINDS))}")
    except (RuntimeError, ValueError, tarfile.TarError) as error:
        raise ValueError(f"{name}: no images in {place} ({error}); type --data-dir FOLDER, where {_LAYOUT}") from error
    return reader, labels


def image_place(name: str, parts: Sequence[str], data_dir: str | None) -> Path:
    """Find the folder with classes, or the tar file, that has the first possible of the names.

    Raises:
        FileNotFoundError: There is none.
    """
    root = data_root(data_dir)
    if root.suffix == ".tar" and root.is_file():
        return root
    for folder in (root, root / name):
        for part in parts:
            for place in (folder / part, folder / f"{part}.tar"):
                if place.is_file() or subfolders(place):
                    return place
    raise FileNotFoundError(
        f"{name}: looked in {root} for a folder (with a folder for each class) or .tar file named {' or '.join(parts)} "
        f"and found none; type --dataset {name} --data-dir FOLDER, where {_LAYOUT}"
    )


def _in_order(labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(set(labels), key=natural))


def class_names(name: str, data_dir: str | None) -> tuple[str, ...]:
    """The names of the classes that a dataset of images has, in the order of their numbers."""
    return _in_order(_find(name, image_place(name, EVERY_PART, data_dir))[1])


def _open_folder(name: str, split: str, data_dir: str | None, known: Sequence[str]) -> Images:
    """Open the images of a split, numbered by the names of a model's classes, else by those of train."""
    # Whoever types test wants test/, except where it is ImageNet's without labels.
    parts = ("test", "val", "validation") if split == "test" else ("val", "validation", "test")
    place = image_place(name, ("train",) if check_split(split) == "train" else parts, data_dir)
    reader, labels = _find(name, place)
    own = _in_order(labels)
    beside = map(place.with_name, ("train", "train.tar"))
    trained = next((path for path in beside if path.is_file() or subfolders(path)), place)
    classes = shared_names(own, known, place)
    whose = "the model"
    if not classes:
        classes, whose = own, ""
        if trained != place:
            classes, whose = _in_order(_find(name, trained)[1]), str(trained)
    numbers = number_classes(own, classes, place, whose)
    return Images(reader, classes, [numbers[label] for label in labels])


def _open_shards(name: str, split: str, data_dir: str | None) -> Images:
    """Open WebDataset shards; the names of the classes, if any, are the lines of ``classnames.txt`` beside them."""
    paths = find_shards(name, check_split(split), data_root(data_dir))
    reader = Shards(paths, sorted(_KINDS))
    names: list[str] = []
    for place in {Path(path).parent for path in paths} | {Path(path).parent.parent for path in paths}:
        if (place / "classnames.txt").is_file():
            names = (place / "classnames.txt").read_text(encoding="utf-8").splitlines()
    if names and max(reader.labels) >= len(names):
        raise ValueError(
            f"{name}: there is a class {max(reader.labels)}, and classnames.txt names {len(names)}, from 0."
        )
    return Images(reader, names, reader.labels)


def open_images(name: str, split: str, data_dir: str | None, download: bool = True, known: Sequence[str] = ()) -> Any:
    """Open a split of a dataset that timm reads by number.

    Args:
        name: ``imagenet``, ``folder``, ``torch/NAME``, ``hfds/NAME`` or ``wds/NAME`` (WebDataset shards).
        split: ``train`` or ``test``; passed on as it is for ``hfds/``.
        data_dir: Folder of the data.
        download: Whether data that is not on disk may be downloaded.
        known: Names of the classes of the model that is evaluated, in the order of their numbers.

    Returns:
        A dataset with ``len``, samples by number, and ``transform`` to be set.

    Raises:
        ValueError: An unknown name, no images, or a class that train or the model does not have.
        FileNotFoundError: The data is not there.
    """
    if not name.lower().startswith(TIMM_PREFIXES) or name.lower() in _TORCH_FOLDERS:
        return _open_folder(name, split, data_dir, known)
    if name.lower().startswith("wds/"):
        return _open_shards(name, split, data_dir)
    root: str | None = str(data_root(data_dir))
    if name.lower().startswith("torch/"):
        split = "train" if check_split(split) == "train" else "validation"  # torchvision's two
    elif data_dir is None:
        root = None  # Hugging Face's own cache.
    try:
        dataset = create_dataset(name, root=root, split=split, download=download)
    except (AssertionError, OSError, RuntimeError) as error:
        # timm asserts that it knows the name; whatever else fails is the place or the network.
        kind = ValueError if isinstance(error, AssertionError) else FileNotFoundError
        raise kind(
            f"timm cannot open the dataset {name!r} in {root} ({type(error).__name__}: {str(error).strip()}); name its "
            f"place with --data-dir FOLDER, or type --dataset digits, which needs no download"
        ) from error
    if (reader := getattr(dataset, "reader", None)) is None:
        return dataset
    found = Images(reader, sorted(reader.class_to_idx or {}, key=reader.class_to_idx.get))
    if found.classes and known:
        labels, found.classes = renumber(labels_of(found), names_of(found), known, name)
        found.labels = labels.tolist()
    return found
