"""Datasets held in memory as arrays: scikit-learn's digits, torchvision's small sets, and .npz files."""

from __future__ import annotations

import functools
import logging
import operator
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from spikezoo.data.info import Batch, DatasetInfo, data_root

_logger = logging.getLogger("spikezoo")

_CIFAR_NOTE = "the official train and test sets, 50000 and 10000 images"
_MNIST_NOTE = "the official train and test sets, 60000 and 10000 images"
_DIGITS_NOTE = "every fifth image of scikit-learn's load_digits, 360 of 1797, is test, the other 1437 are train"
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()  # noqa: SIM905
)
_CLOTHES = tuple(datasets.FashionMNIST.classes)
_FIGURES = tuple("0123456789")

ARRAY_INFOS = {
    info.name: info
    for info in (
        DatasetInfo("cifar10", 10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), _CIFAR_NOTE, _CIFAR10),
        DatasetInfo("cifar100", 100, 3, 32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), _CIFAR_NOTE, _CIFAR100),
        DatasetInfo("digits", 10, 1, 8, (0.3053,), (0.3762,), _DIGITS_NOTE, _FIGURES),
        DatasetInfo("fashion_mnist", 10, 1, 28, (0.2860,), (0.3530,), _MNIST_NOTE, _CLOTHES),
        DatasetInfo("mnist", 10, 1, 28, (0.1307,), (0.3081,), _MNIST_NOTE, _FIGURES),
    )
}
_TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
_PREFIX = "npz:"
# The names that the arrays of a .npz file may have, images before labels.
_NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
_SHORT_KEYS = ("x_train", "y_train", "x_test", "y_test")


def is_array_dataset(name: str) -> bool:
    """Whether a dataset is held in memory."""
    return name in ARRAY_INFOS or name.startswith(_PREFIX)


def array_info(name: str, data_dir: str | None = None) -> DatasetInfo:
    """Describe a dataset that is held in memory.

    Raises:
        ValueError: The .npz file is not usable.
        FileNotFoundError: It is not there.
    """
    if name in ARRAY_INFOS:
        return ARRAY_INFOS[name]
    path = _npz_path(name, data_dir)
    stat = path.stat()
    return replace(_npz_info(path, stat.st_mtime_ns, stat.st_size), name=name)


def load_split(name: str, split: str, data_dir: str | None, download: bool) -> Batch:
    """Load ``train`` or ``test``: images as uint8 [N, C, H, W] and labels as int64 [N], in stored order.

    Raises:
        ValueError: The files are not usable.
        FileNotFoundError: The data is not there and could not be downloaded.
    """
    if name == "digits":
        return _load_digits(split)
    if name in _TORCHVISION:
        return _load_torchvision(name, split, data_root(data_dir), download)
    return _load_npz(_npz_path(name, data_dir), split)


@functools.cache  # a packed table of text, read in a quarter of a second
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None], digits.target.astype(np.int64)


def _load_digits(split: str) -> Batch:
    images, labels = _digits()
    test = np.arange(len(images)) % 5 == 0
    chosen = test if split == "test" else ~test  # a copy, which its owner may change
    return torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen])


def _load_torchvision(name: str, split: str, root: Path, download: bool) -> Batch:
    cls = getattr(datasets, _TORCHVISION[name])
    if hasattr(cls, "base_folder"):
        folder = root / cls.base_folder
        files = [file for file, _ in cls.train_list + cls.test_list] + [cls.meta["filename"]]
        archives = [(root / cls.filename, cls.tgz_md5)]
    else:
        folder = root / cls.__name__ / "raw"
        files = [Path(file).stem for file, _ in cls.resources]
        archives = [(folder / file, md5) for file, md5 in cls.resources]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        try:
            _fetch(cls, root, folder, archives, download)
        except Exception as error:  # of the network, of the disk, of an archive that is cut off
            raise FileNotFoundError(
                f"{name}: looked for {', '.join(missing)} in {folder} and the download failed "
                f"({type(error).__name__}: {str(error).strip()}). Two ways on: --data-dir FOLDER, where FOLDER "
                f"contains {folder.relative_to(root)}; or --dataset digits, which needs no download"
            ) from error
    try:
        # torchvision checks the MD5 sums of CIFAR's files before it unpickles anything.
        data = cls(str(root), train=split == "train")
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: torchvision refuses the files in {folder} ({error}): they are damaged or not the official "
            f"ones. To download those move the folder away and run again; re-packed data goes through "
            f"--dataset npz:PATH with the arrays {', '.join(_NPZ_KEYS)}"
        ) from error
    images = torch.as_tensor(data.data)
    images = images.permute(0, 3, 1, 2).contiguous() if images.ndim == 4 else images[:, None]
    return images, torch.as_tensor(data.targets, dtype=torch.int64)


def _fetch(
    cls: Callable[..., object], root: Path, folder: Path, archives: list[tuple[Path, str]], download: bool
) -> None:
    """Let torchvision download and unpack in a scratch folder and moves what came into ``folder``.

    torchvision takes an MNIST file that merely exists for a good one: one that was cut short must not get its name.
    """
    present = [path for path, md5 in archives if check_integrity(path, md5)]
    if len(present) < len(archives) and not download:
        raise RuntimeError("downloading is switched off")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".spikezoo-download-", dir=root) as scratch:
        for path in present:
            copy = scratch / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        cls(scratch, download=True)
        folder.mkdir(parents=True, exist_ok=True)
        for file in (scratch / folder.relative_to(root)).iterdir():
            if folder / file.name not in present:
                os.replace(file, folder / file.name)


def _npz_path(name: str, data_dir: str | None) -> Path:
    path = Path(name.removeprefix(_PREFIX)).expanduser()
    if not path.is_file() and data_dir is not None:
        path = Path(data_dir).expanduser() / path
    if not path.is_file():
        raise FileNotFoundError(
            f"{name}: there is no file {path.absolute()}; type --dataset npz:PATH with the path of a .npz file that "
            f"holds {', '.join(_NPZ_KEYS)}"
        )
    return path


def _checked(split: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Raise ValueError for what is no images and labels; labels [N, 1] become [N]."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[1] != images.shape[2]:
        raise ValueError(f"{split}_images has the type {images.dtype} and the shape {images.shape}")
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(f"{split}_labels has the type {labels.dtype} and the shape {labels.shape}")
    if len(images) != len(labels) or not images.size:
        raise ValueError(f"there are {len(images)} {split}_images and {len(labels)} {split}_labels")
    if labels.min() < 0:
        raise ValueError(f"{split}_labels has negative labels (the smallest is {labels.min()})")
    if labels.max() >= 2**31:  # beyond int64 they would wrap
        raise ValueError(f"{split}_labels has the label {labels.max()}, which is no number of a class")
    return images, labels


def _load_npz(path: Path, split: str) -> Batch:
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = next((keys for keys in (_NPZ_KEYS, _SHORT_KEYS) if set(keys) <= set(archive.files)), None)
            if keys is None:
                absent = [key for key in _NPZ_KEYS if key not in archive.files]
                raise ValueError(f"it lacks {', '.join(absent)}; it has {', '.join(archive.files)}")
            images, labels = (archive[key] for key in (keys[:2] if split == "train" else keys[2:]))
        images, labels = _checked(split, images, labels)
    except Exception as error:  # archives and headers raise whatever they stumble over, too little memory as well
        raise ValueError(
            f"npz:{path}: {error}. Wanted: train_images and test_images as uint8 [N, H, W, C] or "
            f"[N, H, W] with H = W, train_labels and test_labels as integers [N] (or {', '.join(_SHORT_KEYS)}); write "
            f"it with numpy.savez(PATH, train_images=..., train_labels=..., test_images=..., test_labels=...)"
        ) from error
    images = images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def _npz_names(path: Path, labels: torch.Tensor) -> tuple[int, tuple[str, ...]]:
    """How many classes there are, and their names where the file has them.

    Raises:
        ValueError: Labels that leave most classes out, as a lone mark for "none" does, or that have no name.
    """
    with np.load(path, allow_pickle=False) as archive:
        try:
            names = tuple(map(str, archive["label_names"])) if "label_names" in archive.files else ()
            classes = operator.index(archive["num_classes"].item()) if "num_classes" in archive.files else len(names)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"npz:{path}: label_names are wanted as texts, num_classes as one number ({error})"
            ) from error
    if len(set(names)) < len(names) or (names and len(names) != classes) or classes < 0:
        raise ValueError(f"npz:{path}: {classes} classes and the label_names {names}: expected one name for each class")
    highest, used = int(labels.max()), len(labels.unique())
    if classes and highest >= classes:
        raise ValueError(f"npz:{path}: there are {classes} classes, but the label {highest}")
    if not classes and highest + 1 > 2 * used + 100:
        raise ValueError(
            f"npz:{path}: the labels go up to {highest}, but only {used} different ones occur. Number the classes from "
            f"0 without gaps and take out what has none; if there are {highest + 1} classes, store num_classes="
            f"{highest + 1} as one more array"
        )
    return classes or highest + 1, names


@functools.lru_cache(maxsize=16)
def _npz_info(path: Path, mtime_ns: int, size: int) -> DatasetInfo:
    del mtime_ns, size  # They are there for the cache: a file written anew is read anew.
    images, labels = _load_npz(path, "train")
    others, other_labels = _load_npz(path, "test")
    if images.shape[1:] != others.shape[1:]:
        sides = f"train images are {list(images.shape[1:])}, test images {list(others.shape[1:])} ([C, H, W])"
        raise ValueError(f"npz:{path}: {sides}; both must have the same")
    # By a histogram, as the whole set in float64 would need eight times its size.
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    shares, levels = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ levels
    std = (shares @ levels.square() - mean.square()).clamp(min=0).sqrt()
    std[std < 1e-6] = 1  # A channel of one colour has no spread, and normalising must not divide by it.
    classes, names = _npz_names(path, torch.cat([labels, other_labels]))
    train, test = set(labels.unique().tolist()), set(other_labels.unique().tolist())
    if not names and 0 not in train | test:
        _logger.warning("npz:%s: no label is 0: where classes are counted from 1, take 1 away.", path)
    if test - train:
        told = ", ".join(map(str, sorted(test - train)[:5]))
        _logger.warning("npz:%s: test has the labels %s, which train does not have.", path, told)
    values = tuple(mean.tolist()), tuple(std.tolist())
    note = "train_* and test_* of the file"
    return DatasetInfo(f"npz:{path}", classes, len(mean), images.shape[-1], *values, note, names)
