"""Datasets by name: small images in memory and event frames, augmented in batches; bigger ones by timm's readers.

Everything random here (order, flips, crops, erasing, policies, mixing) is a pure function of the seed, the epoch, the
position and the rank. A run that stops in mid-epoch therefore continues exactly with ``loader.iterate(start_batch)``
and no generator state has to be stored; the global random states of torch, numpy and python are the same after a batch
as before it. All random numbers are drawn on the CPU, so that a GPU run sees the same augmentations as a CPU run.
"""

import contextlib
import difflib
import functools
import hashlib
import logging
import math
import operator
import os
import random
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import posterize
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import datasets, transforms
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import functional as TF

from spikezoo.checks import is_number
from spikezoo.data.events import event_info, is_event_dataset, list_event_datasets, open_events
from spikezoo.data.images import (
    EVERY_PART,
    FOLDER_NAMES,
    TIMM_PREFIXES,
    class_names,
    eight_bits,
    image_place,
    is_read_by_timm,
    labels_of,
    names_of,
    open_images,
)
from spikezoo.data.info import Batch, DatasetInfo, Loader, check_split, data_root, number_classes, refuse, shared_names

_logger = logging.getLogger("spikezoo")

_CIFAR_NOTE = "the official train and test sets, 50000 and 10000 images"
_MNIST_NOTE = "the official train and test sets, 60000 and 10000 images"
_DIGITS_NOTE = "every fifth image of scikit-learn's load_digits, 360 of 1797, is test, the other 1437 are train"

_INFOS = {
    info.name: info
    for info in (
        DatasetInfo("cifar10", 10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), _CIFAR_NOTE),
        DatasetInfo("cifar100", 100, 3, 32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), _CIFAR_NOTE),
        DatasetInfo("digits", 10, 1, 8, (0.3053,), (0.3762,), _DIGITS_NOTE),
        DatasetInfo("fashion_mnist", 10, 1, 28, (0.2860,), (0.3530,), _MNIST_NOTE),
        DatasetInfo("mnist", 10, 1, 28, (0.1307,), (0.3081,), _MNIST_NOTE),
    )
}
_TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashion_mnist": "FashionMNIST"}

# A mirrored 2 or 7 is no digit, so these are not flipped unless somebody asks for it.
_NO_FLIP = frozenset({"digits", "mnist"})

_NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
_POLICIES = [policy.value for policy in transforms.AutoAugmentPolicy]  # torchvision's: imagenet, cifar10, svhn


def list_datasets() -> list[str]:
    """Lists what ``--dataset`` understands: names held in memory, image folders and patterns, event recordings."""
    images = [*_INFOS, "npz:PATH", *FOLDER_NAMES, *(f"{prefix}NAME" for prefix in TIMM_PREFIXES)]
    return images + list_event_datasets()


def dataset_info(name: str, data_dir: str | None = None) -> DatasetInfo:
    """Describes a dataset, opening files only where the description is in them.

    Args:
        name: Name of the dataset, see ``list_datasets``.
        data_dir: Folder of the data; needed for ``folder``, and tried for a relative ``npz:PATH``.

    Raises:
        ValueError: The name is unknown or the file is not usable.
        FileNotFoundError: The file or folder is not there.
    """
    if name in _INFOS:
        return _INFOS[name]
    if is_event_dataset(name):
        return event_info(name, data_dir)
    if name.startswith("npz:"):
        path = _npz_path(name, data_dir)
        stat = path.stat()
        return replace(_npz_info(path, stat.st_mtime_ns, stat.st_size), name=name)
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
    """Names the dataset that a model of this shape is made for; ValueError where none fits."""
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
    """Loads a whole split of a dataset that fits into memory; arguments as in ``create_loader``.

    Returns:
        Images as uint8 [N, C, H, W] and labels as int64 [N], in stored order.

    Raises:
        ValueError: Name, split or file is not usable.
        FileNotFoundError: The data is not there and could not be downloaded.
    """
    split = check_split(split)
    if name == "digits":
        return _load_digits(split)
    if name in _TORCHVISION:
        return _load_torchvision(name, split, data_root(data_dir), download)
    if name.startswith("npz:"):
        return _load_npz(_npz_path(name, data_dir), split)
    if not is_event_dataset(name):
        _check_timm_name(name)
    raise ValueError(f"dataset {name!r} is not held in memory; use create_loader({name!r}, ...) instead")


# --- what is asked for ----------------------------------------------------------------------------------------


def _check_timm_name(name: str) -> None:
    """Raises ValueError for a name that nothing here reads, with the nearest names."""
    if is_read_by_timm(name):
        return
    if Path(name).suffix == ".npz":
        hint = f"for a file of arrays type --dataset npz:{name}"
    elif os.path.exists(name):
        hint = f"for a folder or tar file of images type --dataset folder --data-dir {name}"
    elif name.lower().startswith(("hfids/", "wds/", "tfds/")):
        hint = "streams are not read, as they cannot be resumed in mid-epoch; type --dataset hfds/NAME or folder"
    elif near := difflib.get_close_matches(name.lower(), list_datasets(), n=3, cutoff=0.5):
        hint = f"did you mean {' or '.join(near)}? Type --dataset {near[0]}"
    else:
        hint = "e.g. --dataset digits"
    raise ValueError(f"unknown dataset {name!r}: {hint}. Known are {', '.join(list_datasets())}")


# Option -> the least whole number (or the choices), and an example.
_WHOLE = {"batch_size": (1, 128), "img_size": (1, 32), "in_chans": (1, 3), "num_classes": (1, 10), "subset": (1, 1000)}
_WHOLE |= {"crop_padding": (0, 4), "cutout": (0, 16), "num_workers": (0, 2), "roll": (0, 5), "T": (1, 10)}
_WHOLE |= {"translate": (0, 2), "views": (1, 8), "holdout": (0, 5000)}
_FRACTIONS = {"hflip": 0.5, "reprob": 0.25, "mixup_prob": 0.5, "mixup_switch_prob": 0.5, "smoothing": 0.1}
_CHOICES = {
    "remode": ("const", "rand", "pixel"),
    "interpolation": ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos"),
}


@dataclass(frozen=True)
class LoaderOptions:
    """The keyword arguments of ``create_loader``."""

    data_dir: str | None = None  # folder of the data; default: the environment's SPIKEZOO_DATA, else ./data
    download: bool = True  # whether data that is not on disk may be downloaded
    batch_size: int = 128  # samples per batch on this rank
    train: bool = False  # whether to shuffle and augment; all from hflip to smoothing is unused otherwise
    device: str | torch.device = "cpu"  # where the batches (and the whole of an array dataset) live
    seed: int = 0  # of everything random
    rank: int = 0  # number of this process
    world_size: int = 1  # number of processes, which share the samples out among them
    # Side length of the delivered images; arrays are resized (bilinear with antialiasing), events shared out by area.
    # Default: the stored one, 224 for timm's.
    img_size: int | None = None
    mean: Sequence[float] | None = None  # of the channels, for the normalisation; default: the dataset's
    std: Sequence[float] | None = None  # likewise
    in_chans: int | None = None  # channels of the delivered images: 1 to 3 repeats, 3 to 1 takes the luma
    channels_last: bool = False  # whether the batches have torch's channels_last memory format
    # Probability of mirroring; default: 0 for digits, mnist, grey npz files and, but for CIFAR10-DVS, events, else 0.5.
    hflip: float | None = None
    # Zeros (before normalisation) around an array image out of which a window of the old size is cut; default: 2 for
    # 28 px, 0 for event frames, else an eighth of the size (4 for 32 px), and 0 with translate. timm's datasets have
    # random resized crops instead.
    crop_padding: int | None = None
    translate: int = 0  # largest shift of an image, whose border is mirrored into what that uncovers
    # Whether an image that is mirrored in one epoch is not in the next (Jordan, arXiv:2404.00498); hflip then says how
    # many are mirrored in the first.
    alternating_flip: bool = False
    # How many ways an image is augmented, epoch by epoch in turn; a way is a function of the seed, its number and the
    # sample. Default: new ones in every epoch.
    views: int | None = None
    # Largest shift in each direction, by which images and event frames are rolled: what leaves on one side comes in on
    # the other.
    roll: int = 0
    # Side of a square hole in every image, its centre anywhere in the image, clipped at the border; 0 for none. It is
    # filled before the normalisation, as the authors of MPBN do it, so it is black, not the mean.
    cutout: int = 0
    # cifar10, imagenet or svhn (torchvision's AutoAugment), trivial, or timm's rand-m9-mstd0.5 and the like; for event
    # frames snn; comes before the crop for arrays and events.
    auto_augment: str | None = None
    reprob: float = 0.0  # probability of timm's random erasing
    remode: str = "pixel"  # what it erases with: const (0 after normalisation), rand or pixel
    mixup: float = 0.0  # alpha of mixup, 0 for off
    cutmix: float = 0.0  # alpha of cutmix, 0 for off
    mixup_prob: float = 1.0  # probability of mixing a batch at all
    mixup_switch_prob: float = 0.5  # probability of cutmix where both are on
    smoothing: float = 0.0  # of the soft targets; without mixing label smoothing is the loss's business
    num_classes: int | None = None  # width of the soft targets; default: the dataset's classes
    num_workers: int = 2  # processes that read timm's datasets; 0 reads in this one
    subset: int | None = None  # number of samples, chosen by the seed with even classes; default: all
    holdout: int = 0  # number of samples, the same for all seeds and with even classes, that are left out
    held_out: bool = False  # delivers those instead
    drop_last: bool | None = None  # whether a last, smaller batch is left out; default: in training, if others are left
    scale: tuple[float, float] = (0.08, 1.0)  # range of the area of random resized crops (timm's datasets)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # and of their width by their height
    crop_pct: float | None = None  # part of the image that an evaluation sees (timm's datasets); default: 0.875
    interpolation: str = "bicubic"  # of timm's datasets
    # Names of the classes of the model that is evaluated: they number those of an image folder; default: train's do.
    label_names: Sequence[str] = ()
    skip_damaged: bool = False  # whether an evaluation leaves images out that cannot be read, and counts them
    T: int = 4  # frames of a recording; images have none
    # How a recording becomes frames: number (of events; the default), time or duration, see events.open_events.
    frames_by: str | None = None
    duration_us: int | None = None  # length of a frame in microseconds, for duration

    def __post_init__(self) -> None:
        for option, value in vars(self).items():
            if value is None and getattr(LoaderOptions, option) is None:
                continue
            number = isinstance(value, int | float)
            least, whole = _WHOLE.get(option, (None, None))
            if least is not None and (type(value) is not int or value < least):
                refuse(option, value, f"a whole number of at least {least}", whole)
            if option in _FRACTIONS and not (number and 0 <= value <= 1):
                refuse(option, value, "a probability from 0 to 1", _FRACTIONS[option])
            if option in ("mixup", "cutmix") and not (number and 0 <= value < math.inf):
                refuse(option, value, "the alpha of a Beta distribution, 0 for off", 1)
            if option in _CHOICES and value not in _CHOICES[option]:
                refuse(option, value, f"one of {', '.join(_CHOICES[option])}", f"{option}={_CHOICES[option][0]!r}")
        if self.crop_pct is not None and not is_number(self.crop_pct, 0, 1, "(]"):
            refuse("crop_pct", self.crop_pct, "a part of the side of an image, above 0 and up to 1", 0.875)
        for option, highest, example in (("scale", 1.0, "0.08 1"), ("ratio", math.inf, "0.75 1.33")):
            pair = getattr(self, option)
            fits = len(pair) == 2 and all(is_number(side, 0, highest, "(]") for side in pair) and pair[0] <= pair[1]
            if not fits:
                refuse(
                    option,
                    pair,
                    f"two numbers above 0, the second not below the first{' nor above 1' * (highest == 1)}",
                    f"--{option} {example}",
                )
        if not 0 <= self.rank < self.world_size:
            refuse("rank", self.rank, f"from 0 to below world_size={self.world_size}", "rank=0, world_size=1")
        if self.translate and self.crop_padding:
            refuse(
                "translate", self.translate, f"left out beside crop_padding={self.crop_padding}, which moves, too", 2
            )
        if self.auto_augment and self.auto_augment != "snn":
            _policy(self.auto_augment, 32, IMAGENET_DEFAULT_MEAN)  # said before the data is read or downloaded


# --- data held in memory --------------------------------------------------------------------------------------


def _load_digits(split: str) -> Batch:
    from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    test = np.arange(len(images)) % 5 == 0
    chosen = test if split == "test" else ~test
    return torch.from_numpy(images[chosen]), torch.from_numpy(digits.target[chosen].astype(np.int64))


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


def _fetch(cls: Any, root: Path, folder: Path, archives: list[tuple[Path, str]], download: bool) -> None:
    """Lets torchvision download and unpack in a scratch folder and moves what came into ``folder``.

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
    path = Path(name.removeprefix("npz:")).expanduser()
    if not path.is_file() and data_dir is not None:
        path = Path(data_dir) / path
    if not path.is_file():
        raise FileNotFoundError(
            f"{name}: there is no file {path.absolute()}; type --dataset npz:PATH with the path of a .npz file that "
            f"holds {', '.join(_NPZ_KEYS)}"
        )
    return path


def _load_npz(path: Path, split: str) -> Batch:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if absent := [key for key in _NPZ_KEYS if key not in archive.files]:
                raise ValueError(f"it lacks {', '.join(absent)}; it has {', '.join(archive.files)}")
            images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[1] != images.shape[2]:
            raise ValueError(f"{split}_images has the type {images.dtype} and the shape {images.shape}")
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise ValueError(f"{split}_labels has the type {labels.dtype} and the shape {labels.shape}")
        if len(images) != len(labels) or not images.size:
            raise ValueError(f"there are {len(images)} {split}_images and {len(labels)} {split}_labels")
        if labels.min() < 0:
            raise ValueError(f"{split}_labels has negative labels (the smallest is {labels.min()})")
    except (EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"npz:{path}: {error}. Wanted: train_images and test_images as uint8 [N, H, W, C] or "
            f"[N, H, W] with H = W, train_labels and test_labels as integers [N]; write it with "
            f"numpy.savez(PATH, train_images=..., train_labels=..., test_images=..., test_labels=...)"
        ) from error
    images = images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


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
    classes = int(max(labels.max(), other_labels.max())) + 1
    values = tuple(mean.tolist()), tuple(std.tolist())
    return DatasetInfo(f"npz:{path}", classes, len(mean), images.shape[-1], *values, "train_* and test_* of the file")


# --- random numbers and augmentation --------------------------------------------------------------------------


def _derive(*parts: int | str) -> int:
    """Makes one seed of several numbers, so that near ones (epoch 1, batch 2) share nothing."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(_derive(*parts))


@contextlib.contextmanager
def _seeded(*parts: int | str) -> Iterator[None]:
    """Seeds the global generators for code that knows no others, then puts their state back."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed = _derive(*parts)
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # Not torch.manual_seed, which would seed the GPUs as well, whose state is the user's.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def _mirrored(size: int, padding: int, device: torch.device) -> Tensor:
    """Which of ``size`` pixels in a row stand in one that is padded on both sides by mirroring it at its ends."""
    place = torch.arange(-padding, size + padding, device=device).abs()
    return torch.where(place < size, place, 2 * (size - 1) - place)


def _crop(images: Tensor, padding: int, top: Tensor, left: Tensor, mirror: bool = False) -> Tensor:
    """Cuts the window at (top, left) [B] out of the images, padded by zeros or mirrored, at the old size."""
    height, width = images.shape[-2:]
    if mirror:  # torch's reflection knows no bytes
        rows, columns = (_mirrored(size, padding, images.device) for size in (height, width))
        padded = images[..., rows, :][..., columns]
    else:
        padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def _cutout(images: Tensor, size: int | Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Zeroes a square of side ``size`` (or sides [B]) with the centre (row, column) [B], clipped at the border."""
    top, left = row - size // 2, column - size // 2
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    rows = (y >= top[:, None]) & (y < (top + size)[:, None])
    columns = (x >= left[:, None]) & (x < (left + size)[:, None])
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _roll(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Rolls every image by its shifts (down, right) [B]."""
    count, _, height, width = images.shape
    rows = (torch.arange(height, device=images.device) - down[:, None]) % height
    columns = (torch.arange(width, device=images.device) - right[:, None]) % width
    which = torch.arange(count, device=images.device)[:, None, None]
    # The channels come last where indices stand on both sides of them.
    return images[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _snn_policy(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Does one of six things to every sample [B, C, H, W], H = W: the event policy of the Spikformer authors.

    Nothing, a shear along the rows (by up to 0.3 radian), a shift along rows or columns (by up to 5 whole pixels), a
    rotation (by up to 30 degrees), or one square hole (of 0.1 to 11 % of the area). What comes from outside is empty,
    and a pixel takes the value of the nearest one. Magnitudes are drawn evenly, by the authors from 31 values.
    """
    count, size = len(frames), frames.shape[-1]
    chosen = torch.randint(6, (count,), generator=generator)
    signed, positive = 2 * torch.rand(count, generator=generator) - 1, torch.rand(count, generator=generator)

    def only(kind: int, values: Tensor) -> Tensor:
        return torch.where(chosen == kind, values, 0)

    angle = torch.deg2rad(30 * only(4, signed))
    shift = torch.randint(-5, 6, (count,), generator=generator) * (2 / size)  # the frame goes from -1 to 1
    source = torch.stack(
        [
            torch.stack([angle.cos(), angle.sin() + only(1, 0.3 * signed).tan(), only(2, shift)], 1),
            torch.stack([-angle.sin(), angle.cos(), only(3, shift)], 1),
        ],
        1,
    )
    moved = (chosen > 0) & (chosen < 5)
    if moved.any():
        where = moved.to(frames.device)
        grid = F.affine_grid(source[moved].to(frames), [int(moved.sum()), *frames.shape[1:]], align_corners=False)
        frames = frames.clone()
        frames[where] = F.grid_sample(frames[where], grid, "nearest", align_corners=False)
    side = only(5, ((0.001 + 0.109 * positive).sqrt() * size).round().clamp(min=1)).long()
    places = torch.rand(2, count, generator=generator)
    row, column = ((places * (size - side + 1)).long() + side // 2).to(frames.device)
    return _cutout(frames, side.to(frames.device), row, column)


@functools.lru_cache(maxsize=16)
def _shares(old: int, new: int) -> Tensor:
    """Which share of each of ``old`` pixels in a row falls into each of ``new``: [new, old], columns sum up to 1."""
    edges = torch.arange(new + 1, dtype=torch.float64) * (old / new)
    pixels = torch.arange(old, dtype=torch.float64)
    shares = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return shares.clamp_(min=0).float()


def _fit(frames: Tensor, size: int) -> Tensor:
    """Brings frames of events to a square: pads the shorter side, then shares each event out by area.

    An event of a pixel that two pixels of the new size share counts in both, by the area; so the sum over a frame stays
    the number of its events.

    Args:
        frames: Numbers of events, float32 [B, T, 2, H, W].
        size: Side length.

    Returns:
        [B, T, 2, size, size].
    """
    height, width = frames.shape[-2:]
    if height != width:
        down, right = max(width - height, 0), max(height - width, 0)
        frames = F.pad(frames, (right // 2, right - right // 2, down // 2, down - down // 2))
    if frames.shape[-1] == size:
        return frames
    shares = _shares(frames.shape[-1], size).to(frames.device)
    return shares @ frames @ shares.T


def _cutout_pil(image: Image.Image, size: int) -> Image.Image:
    """``_cutout`` for one image of PIL."""
    row, column = torch.randint(image.height, (1,)), torch.randint(image.width, (1,))
    top, left = int(row) - size // 2, int(column) - size // 2
    image = image.copy()
    image.paste(0, (left, top, left + size, top + size))
    return image


def _policy(name: str, img_size: int, mean: Sequence[float]) -> Callable[[Image.Image], Any]:
    """Builds a policy for RGB images of PIL; ``mean`` is the colour of what timm's policies uncover."""
    if name in _POLICIES:
        return transforms.AutoAugment(transforms.AutoAugmentPolicy(name))
    if name == "trivial":
        return transforms.TrivialAugmentWide()
    rgb = tuple(mean) if len(mean) == 3 else tuple(mean[:1]) * 3
    options: dict[str, Any] = {"color_jitter": None, "mean": rgb, "interpolation": "random", "separate": True}
    try:
        policy = create_transform(img_size, is_training=True, auto_augment=name, **options)[1]
    except (AssertionError, ValueError, KeyError) as error:
        wanted = f"one of {', '.join(_POLICIES)}, trivial, or a configuration of timm's, which refuses it ({error})"
        refuse("auto_augment", name, wanted, "--aa cifar10 or --aa rand-m9-mstd0.5-inc1")
    for step in policy.transforms:
        for op in getattr(step, "ops", ()):
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
    return policy


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's, with black for 0 bits: its 'inc1' asks for them at the top magnitude, and Pillow 13 raises there."""
    return posterize(image, bits_to_keep) if bits_to_keep else image.point([0] * 256 * len(image.getbands()))


def _apply_policy(policy: Callable[[Image.Image], Any], images: Tensor) -> Tensor:
    """Applies a policy to every uint8 image [B, 1 or 3, H, W], through RGB also for grey ones."""
    mode = "L" if images.shape[1] == 1 else "RGB"
    # timm's policies fill with an RGB colour, which a grey image of PIL does not take.
    rgb = images.expand(-1, 3, -1, -1).cpu()
    out = [TF.pil_to_tensor(policy(TF.to_pil_image(image)).convert(mode)) for image in rgb]
    return torch.stack(out).to(images.device)


# --- loaders --------------------------------------------------------------------------------------------------


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


def _balanced(labels: Tensor, count: int, seed: int) -> Tensor:
    """Chooses ``count`` indices with the classes as even as they can be, in stored order."""
    order = torch.randperm(len(labels), generator=_generator("subset", seed))
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
            held[_balanced(labels(), options.holdout, 0)] = True
            self._chosen = self._chosen[held if options.held_out else ~held]
        if options.subset is not None:
            left = len(self._chosen)
            if options.subset > left:
                refuse("subset", options.subset, f"from 1 to {left}, the size of the split of {info.name}", left)
            self._chosen = self._chosen[_balanced(labels()[self._chosen], options.subset, options.seed)]
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
            order = order[torch.randperm(len(order), generator=_generator("order", options.seed, epoch))]
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
        generator = _generator("augment", options.seed, epoch, batch, options.rank)
        count, height, width = len(images), images.shape[2], images.shape[3]
        own: Tensor | slice = slice(None)
        if options.views:  # numbers for all samples, of which those of this batch take theirs
            epoch %= options.views
            generator = _generator("view", options.seed, epoch)
            count, own = self._count, index.cpu()

        def draw(limit: int) -> Tensor:
            return torch.randint(limit, (count,), generator=generator)[own].to(images.device)

        if padding:
            top, left = draw(2 * padding + 1), draw(2 * padding + 1)
            images = _crop(images, padding, top, left)
        if far := options.translate:
            images = _crop(images, far, draw(2 * far + 1), draw(2 * far + 1), mirror=True)
        if hflip:
            if options.alternating_flip:
                first = torch.rand(self._count, generator=_generator("flip", options.seed)) < hflip
                chosen = first[index.cpu()] ^ bool(epoch % 2)
            else:
                chosen = (torch.rand(count, generator=generator) < hflip)[own]
            images = torch.where(chosen.to(images.device)[:, None, None, None], images.flip(3), images)
        if options.cutout:
            images = _cutout(images, options.cutout, draw(height), draw(width))
        if options.roll:
            far = 2 * options.roll + 1
            images = _roll(images, draw(far) - options.roll, draw(far) - options.roll)
        return images

    def _finish(self, images: Tensor, labels: Tensor, epoch: int, batch: int) -> Batch:
        if self._mixup is not None:
            # timm mixes each image with its mirror position and refuses odd batches: there the last image stays.
            even = len(images) // 2 * 2
            # It takes the axes 2 and 3 for height and width: the time steps of event frames pass for channels. That is
            # a view, and it mixes in place.
            flat = images.flatten(1, -3)
            with _seeded("mix", self.options.seed, epoch, batch, self.options.rank):
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
            self._policy = _policy(options.auto_augment, size, self.info.mean)
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
            with _seeded("erase", self.options.seed, epoch, batch, self.options.rank):
                images = self._erase(images)
        return images

    def digest(self) -> str:
        """Hash of all stored images and labels."""
        found = hashlib.sha256(self._images.cpu().numpy().tobytes())
        found.update(self._labels.cpu().numpy().tobytes())
        return found.hexdigest()

    def _convert(self, images: Tensor) -> Tensor:
        """Brings stored images to the delivered channels and size."""
        size, channels = self.info.img_size, self.info.in_chans
        if channels < images.shape[1]:
            # In float and rounded, as torchvision cuts the fractions of uint8 off.
            images = TF.rgb_to_grayscale(images.float()).round_().to(torch.uint8)
        elif channels > images.shape[1]:
            images = images.expand(-1, channels, -1, -1)
        return images if images.shape[-1] == size else TF.resize(images, [size, size], antialias=True)

    def _augment(self, images: Tensor, index: Tensor, epoch: int, batch: int) -> Tensor:
        if self._policy is not None:
            with _seeded("policy", self.options.seed, epoch, batch, self.options.rank):
                images = _apply_policy(self._policy, images)
        return self._move(images, index, epoch, batch, self._padding, self._hflip)


# --- event frames ---------------------------------------------------------------------------------------------

# Whether somebody waves the left hand or the right is a class of DVS128 Gesture, and a mirrored 2 is no digit.
_FLIPPED_EVENTS = ("cifar10dvs", "cifar10dvs_tebn")


class EventLoader(_BaseLoader):
    """Batches of event frames: numbers of events, off and on, as float32 [B, T, 2, H, W].

    A train batch goes through, in this order: resizing, the policy, crop, flip, cutout, roll, normalisation, mixing.
    All of it acts on height and width, alike on all time steps of a recording.
    """

    def __init__(self, frames: Any, info: DatasetInfo, options: LoaderOptions) -> None:
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
            frames = _fit(stored.to(self.device).to(torch.float32), self.info.img_size)
            if options.train:
                frames = self._augment(frames, index, epoch, batch)
            frames = ((frames - self._mean) / self._std).contiguous()
            yield self._finish(frames, self._labels[index.to(self.device)], epoch, batch)

    def _augment(self, frames: Tensor, index: Tensor, epoch: int, batch: int) -> Tensor:
        flat = frames.flatten(1, 2)  # the time steps as channels
        if self.options.auto_augment:
            place = (self.options.seed, epoch, batch, self.options.rank)
            flat = _snn_policy(flat, _generator("policy", *place))
        padding = self.options.crop_padding or 0
        return self._move(flat, index, epoch, batch, padding, self._hflip).unflatten(1, (-1, 2))


# --- timm's readers -------------------------------------------------------------------------------------------


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
        steps += [_policy(options.auto_augment, info.img_size, info.mean), mode]
    if options.cutout:
        steps.append(functools.partial(_cutout_pil, size=options.cutout))
    return transforms.Compose([*steps, final])


class _SeededItems(torch.utils.data.Dataset):
    """Makes a sample a function of (seed, epoch, index), whichever worker loads it; what is damaged is handed on."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        with _seeded("item", self.seed, *key):
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
            num_workers=options.num_workers,
            pin_memory=self.device.type == "cuda",
            collate_fn=_collated,
            # Its own generator: torch would draw the workers' seed from the global one.
            generator=_generator("workers", options.seed, epoch, options.rank),
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


def create_loader(name: str, split: str, **options: Any) -> Loader:
    """Makes the loader of a dataset's split.

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
    known = [field.name for field in fields(LoaderOptions)]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0)[0]
            raise ValueError(f"create_loader has no option {option!r}: did you mean {near}? It has {', '.join(known)}")
    chosen = LoaderOptions(**options)
    if is_event_dataset(name):
        how: dict[str, Any] = {"frames_by": chosen.frames_by or "number", "duration_us": chosen.duration_us}
        recordings = open_events(name, split, data_dir=chosen.data_dir, T=chosen.T, download=chosen.download, **how)
        info = dataset_info(name, chosen.data_dir)
        if not chosen.train and (names := shared_names(recordings.classes, chosen.label_names, name)):
            numbers = number_classes(recordings.classes, names, name, "the model")
            labels = torch.tensor([numbers[recordings.classes[label]] for label in recordings.labels.tolist()])
            recordings = replace(recordings, labels=labels, classes=list(names))
            info = replace(info, num_classes=len(names), label_names=names)
        return EventLoader(recordings, info, chosen)
    if chosen.frames_by or chosen.duration_us:
        refuse("frames_by", chosen.frames_by, f"left out for {name}, which holds images", "--dataset nmnist")
    if name in _INFOS or name.startswith("npz:"):
        info = dataset_info(name, chosen.data_dir)
        images, labels = load_arrays(name, split, chosen.data_dir, chosen.download)
        return ArrayLoader(images, labels, info, chosen)
    _check_timm_name(name)
    # The loader counts the classes of the dataset it has opened, so nothing is scanned twice here.
    info = replace(dataset_info("imagenet"), name=name)
    names = () if chosen.train else tuple(chosen.label_names)
    return TimmLoader(open_images(name, split, chosen.data_dir, chosen.download, names), info, chosen)
