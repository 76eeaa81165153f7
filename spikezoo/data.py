"""Datasets by name: small images in memory, augmented in batches; bigger ones by timm's readers.

Everything random here (order, flips, crops, erasing, policies, mixing) is a pure function of the
seed, the epoch, the position and the rank. A run that stops in mid-epoch therefore continues
exactly with ``loader.iterate(start_batch)`` and no generator state has to be stored; the global
random states of torch, numpy and python are the same after a batch as before it. All random
numbers are drawn on the CPU, so that a GPU run sees the same augmentations as a CPU run.
"""

import contextlib
import difflib
import functools
import gzip
import hashlib
import http.client
import importlib
import io
import logging
import math
import os
import random
import shutil
import socket
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DatasetInfo:
    """What a model has to know of a dataset.

    Attributes:
        name: The name it is asked for by.
        num_classes: Number of classes; 0 where it is not known before the data is opened
            (``torch/``, ``hfds/``, ``hfids/``, ``wds/``, ``tfds/``).
        in_chans: Channels of an image.
        img_size: Side length of an image.
        mean: Mean of each channel, of values in 0..1.
        std: Standard deviation of each channel.
        split_note: How train and test are told apart.
    """

    name: str
    num_classes: int
    in_chans: int
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    split_note: str


@runtime_checkable
class Loader(Protocol):
    """What ``create_loader`` returns.

    ``len(loader)`` is the number of batches per epoch on this rank, ``num_samples`` the number of
    samples of the whole split over all ranks (of the subset where one was asked for), and ``info``
    describes the images as delivered (size, channels, mean and std after every conversion).
    """

    info: DatasetInfo
    num_samples: int

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, and with it the order and the augmentations, of later iterations."""

    def iterate(self, start_batch: int = 0) -> Iterator[Batch]:
        """Yields what a full iteration yields from batch ``start_batch`` on."""


_OFFICIAL = "the official train and test sets"

_INFOS = {
    info.name: info
    for info in (
        DatasetInfo(
            "cifar10",
            10,
            3,
            32,
            (0.4914, 0.4822, 0.4465),
            (0.2023, 0.1994, 0.2010),
            f"{_OFFICIAL}, 50000 and 10000 images",
        ),
        DatasetInfo(
            "cifar100",
            100,
            3,
            32,
            (0.5071, 0.4867, 0.4408),
            (0.2675, 0.2565, 0.2761),
            f"{_OFFICIAL}, 50000 and 10000 images",
        ),
        # Mean and std are those of the 1437 train images, as the tests check.
        DatasetInfo(
            "digits",
            10,
            1,
            8,
            (0.3053,),
            (0.3762,),
            "scikit-learn's load_digits: every fifth image (index % 5 == 0), 360 of 1797, is test, "
            "the other 1437 are train",
        ),
        DatasetInfo(
            "fashion_mnist",
            10,
            1,
            28,
            (0.2860,),
            (0.3530,),
            f"{_OFFICIAL}, 60000 and 10000 images",
        ),
        DatasetInfo(
            "mnist",
            10,
            1,
            28,
            (0.1307,),
            (0.3081,),
            f"{_OFFICIAL}, 60000 and 10000 images",
        ),
    )
}

# A mirrored 2 or 7 is no digit, so these are not flipped unless somebody asks for it.
_NO_FLIP = frozenset({"digits", "mnist"})

_FOLDER_NAMES = ("imagenet", "folder")
_TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "wds/", "tfds/")
_SPLITS = {"train": "train", "test": "test", "validation": "test", "val": "test", "eval": "test"}
_NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
_CIFAR_CLASSES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
_MNIST_CLASSES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
_POLICIES = {"cifar10": "CIFAR10", "imagenet": "IMAGENET", "svhn": "SVHN"}
_TIMM_POLICIES = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
_ERASE_MODES = ("const", "rand", "pixel")
_DOWNLOAD_TIMEOUT = 60.0


def list_datasets() -> list[str]:
    """Lists what ``--dataset`` understands.

    Returns:
        The names held in memory, then the patterns: ``npz:PATH`` for re-packed arrays, ``imagenet``
        and ``folder`` for image folders (or tar files), and timm's prefixes with a placeholder.
    """
    return [
        *_INFOS,
        "npz:PATH",
        *_FOLDER_NAMES,
        *(f"{prefix}NAME" for prefix in _TIMM_PREFIXES),
    ]


def dataset_info(name: str, data_dir: str | None = None) -> DatasetInfo:
    """Describes a dataset, opening files only where the description is in them.

    Args:
        name: Name of the dataset, see ``list_datasets``.
        data_dir: Folder of the data; needed for ``folder``, and tried for a relative ``npz:PATH``.

    Returns:
        The description. For ``npz:PATH`` the classes (largest label + 1 over both splits) and the
        channel statistics of the train images are read from the file; for ``folder`` the classes
        are the folders of the train split.

    Raises:
        ValueError: The name is unknown or the file is not usable.
        FileNotFoundError: The file or folder is not there.
    """
    if name in _INFOS:
        return _INFOS[name]
    if name.startswith("npz:"):
        path = _npz_path(name, data_dir)
        stat = path.stat()
        return replace(_npz_info(path, stat.st_mtime_ns, stat.st_size), name=name)
    _check_timm_name(name)
    info = DatasetInfo(name, 0, 3, 224, _IMAGENET_MEAN, _IMAGENET_STD, "train and val(idation) or test folder")
    if name == "imagenet":
        return replace(info, num_classes=1000)
    if name == "folder" or name.endswith(".tar"):
        dataset = _open_folder(name, "train", data_dir)
        return replace(info, num_classes=len(_classes_of(dataset)))
    return replace(info, split_note="the splits of the source, passed on as they are typed")


def natural_dataset(img_size: int, in_chans: int, num_classes: int) -> str:
    """Names the dataset that a model of this shape is made for.

    Args:
        img_size: Side length of the model's input.
        in_chans: Channels of the model's input.
        num_classes: Classes of the model.

    Returns:
        ``digits``, ``mnist``, ``cifar10``, ``cifar100`` or ``imagenet``.

    Raises:
        ValueError: None of them fits.
    """
    if img_size == 8:
        return "digits"
    if img_size == 28 and in_chans == 1:
        return "mnist"
    if img_size == 32 and num_classes in (10, 100):
        return f"cifar{num_classes}"
    if img_size >= 64:
        return "imagenet"
    raise ValueError(
        f"no dataset is the natural one for img_size={img_size}, in_chans={in_chans}, "
        f"num_classes={num_classes} (8 px: digits; 28 px and 1 channel: mnist; 32 px and 10 or 100 "
        f"classes: cifar10 or cifar100; 64 px and more: imagenet); "
        f"name one, e.g. --dataset digits or --dataset npz:PATH"
    )


def load_arrays(name: str, split: str, data_dir: str | None = None, download: bool = True) -> Batch:
    """Loads a whole split into memory.

    Args:
        name: One of the array datasets (``digits``, ``mnist``, ``fashion_mnist``, ``cifar10``,
            ``cifar100``) or ``npz:PATH``.
        split: ``train`` or ``test`` (``validation``, ``val`` and ``eval`` mean test).
        data_dir: torchvision's root; default: the environment's SPIKEZOO_DATA, else ``./data``.
        download: Whether data that is not on disk may be downloaded.

    Returns:
        Images as uint8 [N, C, H, W] and labels as int64 [N], in stored order.

    Raises:
        ValueError: Name, split or file is not usable.
        FileNotFoundError: The data is not there and could not be downloaded.
    """
    split = _check_split(split)
    if name == "digits":
        return _load_digits(split)
    if name in _MNIST_CLASSES:
        return _load_mnist(name, split, data_dir, download)
    if name in _CIFAR_CLASSES:
        return _load_cifar(name, split, data_dir, download)
    if name.startswith("npz:"):
        return _load_npz(_npz_path(name, data_dir), split)
    _check_timm_name(name)
    raise ValueError(
        f"dataset {name!r} is not held in memory; load_arrays knows {', '.join(_INFOS)} and "
        f"npz:PATH. Use create_loader({name!r}, ...) instead"
    )


# --- what is asked for ---------------------------------------------------------------------------


def _bad(option: str, value: object, wanted: str, example: str) -> NoReturn:
    raise ValueError(f"{option}={value!r} is not possible: it must be {wanted}, e.g. {example}")


def _check_split(split: str) -> str:
    if split not in _SPLITS:
        wanted = "train or test (validation, val and eval mean test)"
        _bad("split", split, wanted, "split='train'")
    return _SPLITS[split]


def _check_timm_name(name: str) -> None:
    """Raises ValueError for a name that nothing here reads, with the nearest names."""
    if name in _FOLDER_NAMES or name.endswith(".tar"):
        return
    if name.lower().startswith(_TIMM_PREFIXES) and name.partition("/")[2]:
        return
    if Path(name).suffix == ".npz":
        hint = f"for a file of arrays type --dataset npz:{name}"
    elif os.path.isdir(name):
        hint = f"for a folder of images type --dataset folder --data-dir {name}"
    else:
        near = difflib.get_close_matches(name.lower(), [*_INFOS, *_FOLDER_NAMES], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? Type --dataset {near[0]}" if near else ""
        hint = hint or "e.g. --dataset digits"
    raise ValueError(f"unknown dataset {name!r}: {hint}. Known are {', '.join(list_datasets())}")


def _data_root(data_dir: str | None) -> Path:
    return Path(data_dir or os.environ.get("SPIKEZOO_DATA") or "./data").expanduser()


# --- small datasets ------------------------------------------------------------------------------


def _load_digits(split: str) -> Batch:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("--dataset digits needs scikit-learn; type: pip install scikit-learn") from error
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    test = np.arange(len(images)) % 5 == 0
    chosen = test if split == "test" else ~test
    return (
        torch.from_numpy(images[chosen]),
        torch.from_numpy(digits.target[chosen].astype(np.int64)),
    )


def _not_found(name: str, looked_for: str, folder: Path, root: Path, why: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{name}: looked for {looked_for} in {folder} and {why}. Two ways on: "
        f"--data-dir FOLDER, where FOLDER contains {folder.relative_to(root)}; or "
        f"--dataset digits, which needs no download"
    )


def _fetch(name: str, looked_for: str, root: Path, folder: Path, get: Callable[[str], object]) -> None:
    """Lets torchvision download into a scratch folder and moves what came into ``folder``.

    torchvision takes an MNIST file that merely exists for a good one, so a download that was cut
    short must never be seen under its final name.
    """
    made = [path for path in (root, *root.parents) if not path.exists()]
    scratch = None
    timeout = socket.getdefaulttimeout()
    quiet = io.StringIO()
    _logger.info("downloading %s to %s", name, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".spikezoo-download-", dir=root))
        # Without a time limit a network that swallows packets would hang the run for ever.
        socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            get(str(scratch))
        folder.mkdir(parents=True, exist_ok=True)
        for file in (scratch / folder.relative_to(root)).iterdir():
            os.replace(file, folder / file.name)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        why = f"the download failed ({type(error).__name__}: {str(error).strip()})"
        raise _not_found(name, looked_for, folder, root, why) from error
    finally:
        socket.setdefaulttimeout(timeout)
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for path in made:
            # Only folders made above and still empty go.
            with contextlib.suppress(OSError):
                path.rmdir()


def _read_idx(path: Path) -> Tensor:
    """Reads one file of MNIST's IDX format, packed or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("it does not begin like an IDX file of bytes")
    ndim = content[3]
    start = 4 + 4 * ndim
    if len(content) < start:
        raise ValueError("it ends within its header")
    shape = struct.unpack(f">{ndim}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(f"it holds {len(content) - start} bytes of data for the shape {shape}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _load_mnist(name: str, split: str, data_dir: str | None, download: bool) -> Batch:
    # The packed files are read as they are: nothing has to be extracted, so that a folder without
    # write permission works too.
    root = _data_root(data_dir)
    folder = root / _MNIST_CLASSES[name] / "raw"
    part = "train" if split == "train" else "t10k"
    stems = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
    looked_for = " and ".join(f"{stem}[.gz]" for stem in stems)

    def present(stem: str) -> list[Path]:
        return [path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()]

    if not all(present(stem) for stem in stems):
        if not download:
            why = "they are not there (downloading is switched off)"
            raise _not_found(name, looked_for, folder, root, why)
        datasets = importlib.import_module("torchvision.datasets")
        cls = getattr(datasets, _MNIST_CLASSES[name])
        _fetch(name, looked_for, root, folder, lambda scratch: cls(scratch, download=True))
    tensors = []
    for stem in stems:
        problems = []
        for path in present(stem):
            try:
                tensors.append(_read_idx(path))
                break
            except (ValueError, OSError, EOFError, zlib.error) as error:
                problems.append(f"{path}: {error}")
        else:
            raise ValueError(
                f"{name}: the data cannot be read ({'; '.join(problems)}). Remove that file and "
                f"run again to download it, or use --data-dir FOLDER with another "
                f"{folder.relative_to(root)}"
            )
    images, labels = tensors
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(
            f"{name}: {folder} holds images of shape {tuple(images.shape)} and labels of shape "
            f"{tuple(labels.shape)}, wanted [N, 28, 28] and [N]; for your own data use "
            f"--dataset npz:PATH"
        )
    return images[:, None], labels.long()


def _load_cifar(name: str, split: str, data_dir: str | None, download: bool) -> Batch:
    datasets = importlib.import_module("torchvision.datasets")
    utils = importlib.import_module("torchvision.datasets.utils")
    cls = getattr(datasets, _CIFAR_CLASSES[name])
    root = _data_root(data_dir)
    folder = root / cls.base_folder
    files = [file for file, _ in cls.train_list + cls.test_list] + [cls.meta["filename"]]
    missing = [file for file in files if not (folder / file).is_file()]
    looked_for = ", ".join(files)
    if missing:
        archive = root / cls.filename
        if utils.check_integrity(str(archive), cls.tgz_md5):
            _fetch(
                name,
                looked_for,
                root,
                folder,
                lambda scratch: utils.extract_archive(str(archive), scratch),
            )
        elif download:
            _fetch(name, looked_for, root, folder, lambda scratch: cls(scratch, download=True))
        else:
            why = f"{', '.join(missing)} is not there (downloading is switched off)"
            raise _not_found(name, looked_for, folder, root, why)
    try:
        # torchvision checks the MD5 sums before it unpickles anything.
        data = cls(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: the files in {folder} are not the official ones (torchvision's MD5 check "
            f"refuses them, and a pickle that is not the official one is not opened). Re-packed "
            f"data goes through --dataset npz:PATH with the arrays {', '.join(_NPZ_KEYS)}; to "
            f"download the official files move the folder away and run again"
        ) from error
    images = torch.from_numpy(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)))
    return images, torch.tensor(data.targets, dtype=torch.int64)


# --- npz -----------------------------------------------------------------------------------------


def _npz_path(name: str, data_dir: str | None) -> Path:
    text = name.removeprefix("npz:")
    path = Path(text).expanduser()
    if not path.is_file() and data_dir is not None and (Path(data_dir) / path).is_file():
        path = Path(data_dir) / path
    if not text or not path.is_file():
        raise FileNotFoundError(
            f"{name}: there is no file {str(path.absolute()) if text else 'named'}; type "
            f"--dataset npz:PATH with the path of a .npz file that holds {', '.join(_NPZ_KEYS)}"
        )
    return path


def _npz_wanted(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"npz:{path}: {problem}. Wanted: train_images and test_images as uint8 [N, H, W, C] or "
        f"[N, H, W] with H = W, train_labels and test_labels as integers [N]; write it with "
        f"numpy.savez(PATH, train_images=..., train_labels=..., test_images=..., test_labels=...)"
    )


def _npz_header(archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], np.dtype]:
    with archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, dtype


_NPZ_BROKEN = (zipfile.BadZipFile, OSError, EOFError, ValueError, zlib.error, KeyError)


def _check_npz(path: Path) -> None:
    """Checks names, types and shapes from the headers alone, without reading the images."""
    try:
        with zipfile.ZipFile(path) as archive:
            came = [member.removesuffix(".npy") for member in archive.namelist()]
            absent = [key for key in _NPZ_KEYS if key not in came]
            if not absent:
                headers = {key: _npz_header(archive, key) for key in _NPZ_KEYS}
    except _NPZ_BROKEN as error:
        problem = f"the file is not a whole .npz file ({type(error).__name__}: {error})"
        raise _npz_wanted(path, problem) from error
    if absent:
        raise _npz_wanted(path, f"it lacks {', '.join(absent)}; it has {', '.join(came)}")
    sides = {}
    for split in ("train", "test"):
        shape, dtype = headers[f"{split}_images"]
        label_shape, label_dtype = headers[f"{split}_labels"]
        if dtype != np.uint8:
            raise _npz_wanted(path, f"{split}_images has the type {dtype}")
        if len(shape) not in (3, 4) or shape[1] != shape[2] or 0 in shape[1:]:
            raise _npz_wanted(path, f"{split}_images has the shape {shape}")
        if label_dtype.kind not in "iu":
            raise _npz_wanted(path, f"{split}_labels has the type {label_dtype}")
        if len(label_shape) != 1 and not (len(label_shape) == 2 and label_shape[1] == 1):
            raise _npz_wanted(path, f"{split}_labels has the shape {label_shape}")
        if shape[0] != label_shape[0]:
            problem = f"there are {shape[0]} {split}_images but {label_shape[0]} {split}_labels"
            raise _npz_wanted(path, problem)
        if shape[0] == 0:
            raise _npz_wanted(path, f"the {split} split is empty")
        sides[split] = (*shape[1:], 1)[:3]
    if sides["train"] != sides["test"]:
        problem = f"train images are {sides['train']} (H, W, C), test images {sides['test']}"
        raise _npz_wanted(path, problem)


def _read_npz(path: Path, keys: Sequence[str]) -> list[np.ndarray]:
    _check_npz(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = [archive[key] for key in keys]
    except _NPZ_BROKEN as error:
        problem = f"the file is damaged ({type(error).__name__}: {error})"
        raise _npz_wanted(path, problem) from error
    for i, key in enumerate(keys):
        if key.endswith("labels"):
            # Some collections (MedMNIST) store labels as a column.
            arrays[i] = arrays[i].reshape(-1)
            if arrays[i].min() < 0:
                problem = f"{key} has negative labels (the smallest is {arrays[i].min()})"
                raise _npz_wanted(path, problem)
        elif arrays[i].ndim == 3:
            arrays[i] = arrays[i][..., None]
    return arrays


def _load_npz(path: Path, split: str) -> Batch:
    images, labels = _read_npz(path, [f"{split}_images", f"{split}_labels"])
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


@functools.lru_cache(maxsize=16)
def _npz_info(path: Path, mtime_ns: int, size: int) -> DatasetInfo:
    del mtime_ns, size  # They are there for the cache: a file written anew is read anew.
    images, *labels = _read_npz(path, ["train_images", "train_labels", "test_labels"])
    channels = images.shape[-1]
    total = np.zeros(channels)
    squares = np.zeros(channels)
    # In pieces, as the whole set in float64 would need eight times its size.
    for start in range(0, len(images), 1024):
        piece = images[start : start + 1024].reshape(-1, channels).astype(np.float64) / 255
        total += piece.sum(0)
        squares += np.square(piece).sum(0)
    count = images.size / channels
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    # A channel of one colour has no spread, and normalising must not divide by it.
    std = np.where(std < 1e-6, 1.0, std)
    return DatasetInfo(
        f"npz:{path}",
        int(max(part.max() for part in labels)) + 1,
        channels,
        images.shape[1],
        tuple(mean.tolist()),
        tuple(std.tolist()),
        "train_* and test_* of the file",
    )


# --- random numbers ------------------------------------------------------------------------------


def _derive(*parts: int | str) -> int:
    """Makes one seed of several numbers, so that near ones (epoch 1, batch 2) share nothing."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(_derive(*parts))


def _get_global_rng() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()


def _set_global_rng(state: tuple[Any, Any, Tensor]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.default_generator.set_state(state[2])


def _seed_global_rng(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed, which would seed the GPUs as well, whose state is the user's.
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators for code that knows no others, then puts their state back."""
    before = _get_global_rng()
    try:
        _seed_global_rng(seed)
        yield
    finally:
        _set_global_rng(before)


class _RandomStream:
    """A stream of its own for the global generators: in force only inside ``with stream``."""

    def __init__(self, seed: int) -> None:
        with _seeded(seed):
            self._own = _get_global_rng()

    def __enter__(self) -> None:
        self._before = _get_global_rng()
        _set_global_rng(self._own)

    def __exit__(self, *_: object) -> None:
        self._own = _get_global_rng()
        _set_global_rng(self._before)


# --- augmentation in batches ---------------------------------------------------------------------


def _flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirrors the images [B, C, H, W] where ``chosen`` [B] holds."""
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def _crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Cuts the window at (top, left) [B] out of the zero-padded images, at the old size."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def _cutout(images: Tensor, size: int, row: Tensor, column: Tensor) -> Tensor:
    """Zeroes a square of side ``size`` with the centre (row, column) [B], clipped at the border."""
    height, width = images.shape[-2:]
    top = (row - size // 2)[:, None]
    left = (column - size // 2)[:, None]
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    rows = (y >= top) & (y < top + size)
    columns = (x >= left) & (x < left + size)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _resize(images: Tensor, size: int) -> Tensor:
    resized = F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _luma(images: Tensor) -> Tensor:
    """Grey images as PIL makes them, in pieces to spare memory."""
    pieces = []
    for piece in images.split(1024):
        red, green, blue = piece.float().unbind(1)
        grey = (red * 0.299 + green * 0.587 + blue * 0.114).round_()
        pieces.append(grey.to(torch.uint8)[:, None])
    return torch.cat(pieces)


def _policy(name: str, img_size: int, mean: Sequence[float]) -> Callable[[Image.Image], Any]:
    """Builds an augmentation policy for RGB images of PIL.

    Args:
        name: ``cifar10``, ``imagenet`` or ``svhn`` (torchvision's AutoAugment), ``trivial``
            (TrivialAugmentWide) or a configuration of timm's (``rand-...``, ``augmix-...``,
            ``original-...``).
        img_size: Side length of the images, which limits how far timm's policies move them.
        mean: Channel means, the colour with which timm's policies fill what they uncover.

    Returns:
        The transform.

    Raises:
        ValueError: The name is unknown.
    """
    transforms = importlib.import_module("torchvision.transforms")
    if name in _POLICIES:
        return transforms.AutoAugment(getattr(transforms.AutoAugmentPolicy, _POLICIES[name]))
    if name == "trivial":
        return transforms.TrivialAugmentWide()
    kind = name.split("-")[0]
    wanted = (
        f"one of {', '.join(_POLICIES)}, trivial, or a configuration of timm's that starts with "
        f"rand-, augmix- or original"
    )
    if kind not in _TIMM_POLICIES:
        _bad("auto_augment", name, wanted, "--auto-augment cifar10 or rand-m9-mstd0.5-inc1")
    augment = importlib.import_module("timm.data.auto_augment")
    fill = tuple(min(255, round(255 * value)) for value in mean)
    hparams: dict[str, Any] = {
        "translate_const": int(img_size * 0.45),
        "img_mean": fill if len(fill) == 3 else fill[:1] * 3,
    }
    try:
        if kind == "rand":
            return augment.rand_augment_transform(name, hparams)
        if kind == "augmix":
            return augment.augment_and_mix_transform(name, {**hparams, "translate_pct": 0.3})
        return augment.auto_augment_transform(name, hparams)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"auto_augment={name!r} is not possible: timm refuses it ({error}); it must be "
            f"{wanted}, e.g. --auto-augment rand-m9-mstd0.5-inc1"
        ) from error


def _apply_policy(policy: Callable[[Image.Image], Any], images: Tensor) -> Tensor:
    """Applies a policy to every uint8 image [B, 1 or 3, H, W], through RGB also for grey ones."""
    grey = images.shape[1] == 1
    out = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
        # timm's policies fill with an RGB colour, which a grey image of PIL does not take.
        image = Image.fromarray(np.repeat(pixels, 3, 2) if grey else np.ascontiguousarray(pixels))
        result = policy(image)
        pixels = np.asarray(result.convert("L") if grey else result)
        out.append(pixels[..., None] if grey else pixels)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).to(images.device)


class _PilCutout:
    """``_cutout`` for one image of PIL, for the datasets that timm reads."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        row = torch.randint(image.height, (1,))
        column = torch.randint(image.width, (1,))
        pixels = np.array(image)
        shape = (1, -1, *pixels.shape[:2])
        tensor = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
        holed = _cutout(tensor.reshape(shape), self.size, row, column)[0].permute(1, 2, 0)
        return Image.fromarray(holed.contiguous().numpy().reshape(pixels.shape))


class _ToMode:
    """Converts images of PIL, as torchvision's datasets hand out whatever they store."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __call__(self, image: Image.Image) -> Image.Image:
        return image if image.mode == self.mode else image.convert(self.mode)


# --- loaders -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    """The arguments of ``create_loader`` that both kinds of loader share."""

    batch_size: int
    train: bool
    device: torch.device
    seed: int
    rank: int
    world_size: int
    img_size: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    in_chans: int | None
    channels_last: bool
    hflip: float | None
    crop_padding: int | None
    cutout: int
    auto_augment: str | None
    reprob: float
    remode: str
    mixup: float
    cutmix: float
    mixup_prob: float
    mixup_switch_prob: float
    smoothing: float
    num_classes: int | None
    num_workers: int
    subset: int | None
    drop_last: bool | None
    scale: tuple[float, float]
    crop_pct: float
    interpolation: str

    def __post_init__(self) -> None:
        def whole(option: str, least: int, example: str, optional: bool = False) -> None:
            value = getattr(self, option)
            if value is None and optional:
                return
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                _bad(option, value, f"a whole number of at least {least}", example)

        def fraction(option: str, optional: bool = False) -> None:
            value = getattr(self, option)
            if value is None and optional:
                return
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                flag = option.replace("_", "-")
                _bad(option, value, "a probability from 0 to 1", f"--{flag} 0.5")

        whole("batch_size", 1, "--batch-size 128")
        whole("world_size", 1, "world_size=1")
        whole("rank", 0, "rank=0")
        if self.rank >= self.world_size:
            wanted = f"smaller than world_size={self.world_size}"
            _bad("rank", self.rank, wanted, "rank=0, world_size=1")
        whole("img_size", 1, "--img-size 32", optional=True)
        whole("in_chans", 1, "--in-chans 3", optional=True)
        whole("crop_padding", 0, "--crop-padding 4", optional=True)
        whole("cutout", 0, "--cutout 16")
        whole("num_workers", 0, "--workers 2")
        whole("num_classes", 1, "--num-classes 10", optional=True)
        whole("subset", 1, "--subset 1000", optional=True)
        for option in ("reprob", "mixup_prob", "mixup_switch_prob", "smoothing"):
            fraction(option)
        fraction("hflip", optional=True)
        for option in ("mixup", "cutmix"):
            value = getattr(self, option)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                _bad(option, value, "the alpha of a Beta distribution, 0 for off", f"--{option} 1")
        if self.remode not in _ERASE_MODES:
            _bad("remode", self.remode, f"one of {', '.join(_ERASE_MODES)}", "--remode pixel")
        if self.interpolation not in _INTERPOLATIONS:
            wanted = f"one of {', '.join(_INTERPOLATIONS)}"
            _bad("interpolation", self.interpolation, wanted, "--interpolation bicubic")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            _bad("scale", self.scale, "two areas with 0 < low <= high", "--scale 0.08 1.0")
        if not 0 < self.crop_pct <= 1:
            _bad("crop_pct", self.crop_pct, "above 0 and at most 1", "--crop-pct 0.875")


def _channel_values(
    option: str, given: tuple[float, ...] | None, own: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    """Mean or std for the delivered channels: as given, or the dataset's, converted."""
    if given is None:
        if len(own) == channels:
            return own
        return own * channels if len(own) == 1 else (sum(own) / len(own),) * channels
    if len(given) not in (1, channels):
        _bad(option, given, f"{channels} numbers or one", f"--{option} {' '.join(['0.5'] * 3)}")
    given = given if len(given) == channels else given * channels
    if option == "std" and min(given) <= 0:
        _bad(option, given, "above 0", "--std 0.25")
    return given


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
    """Order, shards, mixing and resuming; the subclasses make the batches."""

    info: DatasetInfo
    num_samples: int

    def __init__(self, info: DatasetInfo, chosen: Tensor, options: _Options) -> None:
        self.info = info
        self.options = options
        self.num_samples = len(chosen)
        self._chosen = chosen
        self._epoch = 0
        share = self.num_samples // options.world_size
        self.drop_last = options.drop_last
        if self.drop_last is None:
            self.drop_last = options.train and share >= options.batch_size
        if options.train and share < (options.batch_size if self.drop_last else 1):
            _bad(
                "batch_size",
                options.batch_size,
                f"small enough for the {share} samples of a rank ({self.num_samples} samples, "
                f"{options.world_size} ranks), as no batch is left",
                f"--batch-size {max(1, share)}",
            )
        self._mixup = _make_mixup(info, options)

    def set_epoch(self, epoch: int) -> None:
        if epoch < 0:
            _bad("epoch", epoch, "at least 0", "set_epoch(0)")
        self._epoch = int(epoch)

    def _shard(self, epoch: int) -> Tensor:
        """The indices of this rank in the epoch."""
        options = self.options
        order = self._chosen
        if options.train:
            # One permutation for all ranks; the ends go so that all ranks have equally many.
            generator = _generator("order", options.seed, epoch)
            order = order[torch.randperm(len(order), generator=generator)]
            order = order[: len(order) - len(order) % options.world_size]
        return order[options.rank :: options.world_size]

    def __len__(self) -> int:
        options = self.options
        if options.train:
            share = self.num_samples // options.world_size
        else:
            share = len(range(options.rank, self.num_samples, options.world_size))
        if self.drop_last:
            return share // options.batch_size
        return math.ceil(share / options.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def iterate(self, start_batch: int = 0) -> Iterator[Batch]:
        if not 0 <= start_batch <= len(self):
            wanted = f"from 0 to {len(self)}, the batches of an epoch"
            _bad("start_batch", start_batch, wanted, "iterate(0)")
        return self._batches(self._epoch, start_batch)

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        raise NotImplementedError

    def _finish(self, images: Tensor, labels: Tensor, epoch: int, batch: int) -> Batch:
        if self._mixup is not None:
            options = self.options
            with _seeded(_derive("mix", options.seed, epoch, batch, options.rank)):
                labels = self._mixup(images, labels)
        if self.options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels


def _make_mixup(info: DatasetInfo, options: _Options) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Returns a function that mixes images in place and returns the soft targets, or None."""
    classes = options.num_classes or info.num_classes
    if info.num_classes and classes < info.num_classes:
        wanted = f"at least the {info.num_classes} classes of {info.name}"
        _bad("num_classes", classes, wanted, f"--num-classes {info.num_classes}")
    if not options.train or not (options.mixup or options.cutmix):
        return None
    if not classes:
        raise ValueError(f"mixup and cutmix: {info.name} does not tell its classes; type --num-classes N")
    module = importlib.import_module("timm.data.mixup")
    mixup = module.Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        label_smoothing=options.smoothing,
        num_classes=classes,
    )

    def mix(images: Tensor, labels: Tensor) -> Tensor:
        # timm mixes each image with its mirror position and refuses odd batches: there the last
        # image stays as it is.
        even = len(images) - len(images) % 2
        parts = []
        if even:
            parts.append(mixup(images[:even], labels[:even])[1])
        if even < len(images):
            parts.append(module.mixup_target(labels[even:], classes, 1.0, options.smoothing))
        return torch.cat(parts)

    return mix


class ArrayLoader(_BaseLoader):
    """Batches of a dataset that is one uint8 tensor on the device.

    A train batch goes through, in this order: resizing, the policy, crop, flip, cutout (all on
    uint8), normalisation, random erasing, mixing.
    """

    def __init__(self, images: Tensor, labels: Tensor, info: DatasetInfo, options: _Options) -> None:
        stored = info.in_chans
        channels = options.in_chans or stored
        if channels != stored and {channels, stored} != {1, 3}:
            raise ValueError(
                f"in_chans={channels} is not possible for {info.name} with {stored} channels: only "
                f"1 to 3 (repeated) and 3 to 1 (luma) are converted; type --in-chans {stored}"
            )
        if options.train and options.auto_augment and channels not in (1, 3):
            raise ValueError(
                f"auto_augment={options.auto_augment!r} is not possible for {channels} channels: "
                f"the policies need grey or RGB images; leave --auto-augment out"
            )
        hflip, padding = options.hflip, options.crop_padding
        if hflip is None:
            grey_file = info.name.startswith("npz:") and stored == 1
            hflip = 0.0 if info.name in _NO_FLIP or grey_file else 0.5
        self._size = options.img_size or info.img_size
        if padding is None:
            padding = {28: 2}.get(self._size, self._size // 8)
        self._hflip = hflip
        self._padding = padding
        mean = _channel_values("mean", options.mean, info.mean, channels)
        std = _channel_values("std", options.std, info.std, channels)
        if options.subset is not None:
            chosen = _balanced(labels, _check_subset(options.subset, len(labels), info), options.seed)
        else:
            chosen = torch.arange(len(labels))
        info = replace(info, img_size=self._size, in_chans=channels, mean=mean, std=std)
        super().__init__(info, chosen, options)

        if channels < stored:
            images = _luma(images)
        self._images = images.to(options.device)
        if channels > stored:
            # A view: the channels are repeated when a batch is taken.
            self._images = self._images.expand(-1, channels, -1, -1)
        self._labels = labels.to(options.device)
        shape = (1, channels, 1, 1)
        self._mean = torch.tensor(mean, device=options.device).mul_(255).view(shape)
        self._std = torch.tensor(std, device=options.device).mul_(255).view(shape)
        self._policy = self._erase = None
        if options.auto_augment:
            self._policy = _policy(options.auto_augment, self._size, mean)
        if options.reprob:
            erasing = importlib.import_module("timm.data.random_erasing")
            # Its noise is drawn on the CPU for the reason that the module's first lines give.
            self._erase = erasing.RandomErasing(options.reprob, mode=options.remode, device="cpu")

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        size = self.options.batch_size
        shard = self._shard(epoch).to(self.options.device)
        for batch in range(start_batch, len(self)):
            index = shard[batch * size : (batch + 1) * size]
            images = self._images[index]
            if images.shape[-1] != self._size:
                images = _resize(images, self._size)
            if self.options.train:
                images = self._augment(images, epoch, batch)
            images = images.to(torch.float32, memory_format=torch.contiguous_format)
            images.sub_(self._mean).div_(self._std)
            if self.options.train and self._erase is not None:
                options = self.options
                with _seeded(_derive("erase", options.seed, epoch, batch, options.rank)):
                    images = self._erase(images)
            yield self._finish(images, self._labels[index], epoch, batch)

    def _augment(self, images: Tensor, epoch: int, batch: int) -> Tensor:
        options = self.options
        place = (options.seed, epoch, batch, options.rank)
        if self._policy is not None:
            with _seeded(_derive("policy", *place)):
                images = _apply_policy(self._policy, images)
        generator = _generator("augment", *place)
        count, height, width = len(images), images.shape[2], images.shape[3]

        def draw(limit: int) -> Tensor:
            return torch.randint(limit, (count,), generator=generator).to(images.device)

        if self._padding:
            top, left = draw(2 * self._padding + 1), draw(2 * self._padding + 1)
            images = _crop(images, self._padding, top, left)
        if self._hflip:
            chosen = torch.rand(count, generator=generator) < self._hflip
            images = _flip(images, chosen.to(images.device))
        if options.cutout:
            images = _cutout(images, options.cutout, draw(height), draw(width))
        return images


def _check_subset(subset: int, size: int, info: DatasetInfo) -> int:
    if subset > size:
        wanted = f"from 1 to {size}, the size of the split of {info.name}"
        _bad("subset", subset, wanted, f"--subset {size}")
    return subset


# --- timm's readers ------------------------------------------------------------------------------


def _class_folders(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder) if entry.is_dir()]


def _classes_of(dataset: Any) -> dict[str, int]:
    """The classes that timm's reader (which names them in two ways) or torchvision found."""
    reader = getattr(dataset, "reader", None)
    for owner, attribute in (
        (reader, "class_to_idx"),
        (reader, "class_name_to_idx"),
        (dataset, "class_to_idx"),
    ):
        classes = getattr(owner, attribute, None)
        if classes:
            return classes
    return {}


def _split_place(root: Path, split: str) -> Path | None:
    """Finds the folder or the tar file of a split."""
    if _SPLITS[split] == "train":
        names = ["train"]
    else:
        names = ["val", "validation", "test"]
        # Whoever types test wants test/, except where it is ImageNet's without labels.
        if split == "test" and (root / "test").is_dir() and _class_folders(root / "test"):
            names = ["test"]
    for name in names:
        for place in (root / name, root / f"{name}.tar"):
            if place.exists():
                return place
    return None


def _open_images(name: str, place: Path, class_map: dict[str, int] | None = None) -> Any:
    """Opens one folder of images, or one tar file of them, with timm's reader."""
    timm_data = importlib.import_module("timm.data")
    if place.is_file() and not tarfile.is_tarfile(place):
        raise ValueError(
            f"{name}: cannot read {place}, which is not a tar file (or is cut off); type "
            f"--dataset folder --data-dir FOLDER for images in folders"
        )
    try:
        return timm_data.create_dataset("", root=str(place), search_split=False, class_map=class_map or "")
    except (RuntimeError, ValueError, tarfile.TarError) as error:
        raise ValueError(
            f"{name}: there are no images in {place} ({error}); wanted are CLASS/*.png in it "
            f"(any image format), or another --data-dir FOLDER"
        ) from error


def _open_folder(name: str, split: str, data_dir: str | None) -> Any:
    """Finds and opens the images of a split."""
    _check_split(split)
    root = _data_root(name if name.endswith(".tar") else data_dir)
    if root.suffix == ".tar" and root.is_file():
        return _open_images(name, root)
    roots = [root] if name.endswith(".tar") else [root, root / name]
    places = [place for path in roots if (place := _split_place(path, split))]
    if not places:
        wanted = "train" if _SPLITS[split] == "train" else "val, validation or test"
        raise FileNotFoundError(
            f"{name}: looked for a folder (or .tar file) named {wanted} in "
            f"{' and '.join(str(path) for path in roots)} and found none; type "
            f"--dataset {name if name in _FOLDER_NAMES else 'folder'} --data-dir FOLDER, where "
            f"FOLDER contains train/CLASS/*.png and val/CLASS/*.png (any image format)"
        )
    place = places[0]
    dataset = _open_images(name, place)
    # timm numbers the classes it sees: a split that lacks one would shift all later labels.
    train = _split_place(place.parent, "train")
    if train is not None and train.is_dir():
        classes = set(_class_folders(train))
    elif train is not None and train != place:
        classes = set(_classes_of(_open_images(name, train)))
    else:
        return dataset
    if set(_classes_of(dataset)) < classes:
        natural_key = importlib.import_module("timm.utils.misc").natural_key
        numbers = {label: i for i, label in enumerate(sorted(classes, key=natural_key))}
        dataset = _open_images(name, place, numbers)
    return dataset


def _open_timm(name: str, split: str, data_dir: str | None, download: bool, options: _Options) -> Any:
    """Opens any dataset that timm reads."""
    if name in _FOLDER_NAMES or name.endswith(".tar"):
        return _open_folder(name, split, data_dir)
    prefix = name.partition("/")[0].lower()
    if prefix == "torch":
        # torchvision knows train and not train.
        split = "train" if _check_split(split) == "train" else "validation"
    root: str | None = str(_data_root(data_dir))
    if prefix in ("hfds", "hfids") and data_dir is None:
        root = None  # Hugging Face's own cache.
    timm_data = importlib.import_module("timm.data")
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet):
            return timm_data.create_dataset(
                name,
                root=root,
                split=split,
                download=download,
                is_training=options.train,
                batch_size=options.batch_size,
                seed=options.seed,
                input_img_mode="L" if options.in_chans == 1 else "RGB",
            )
    except (OSError, RuntimeError, ImportError) as error:
        # timm's reader of webdatasets reports the missing package as a RuntimeError.
        if not isinstance(error, ImportError) and "install" not in str(error):
            raise FileNotFoundError(
                f"timm could not open the dataset {name!r} in {root} ({type(error).__name__}: "
                f"{str(error).strip()}); name its place with --data-dir FOLDER, or type "
                f"--dataset digits, which needs no download"
            ) from error
        package = {"wds": "webdataset", "tfds": "tensorflow-datasets"}.get(prefix, "datasets")
        raise ImportError(f"dataset {name!r} needs the package {package}; type: pip install {package}") from error
    except AssertionError as error:
        raise ValueError(
            f"timm cannot open the dataset {name!r} ({error}); for images in folders type "
            f"--dataset folder --data-dir FOLDER"
        ) from error


def _timm_transform(info: DatasetInfo, options: _Options) -> Callable[[Image.Image], Any]:
    """Timm's transforms, with our policies and cutout between them; no colour jitter."""
    timm_data = importlib.import_module("timm.data")
    transforms = importlib.import_module("torchvision.transforms")
    common = {
        "input_size": (info.in_chans, info.img_size, info.img_size),
        "interpolation": options.interpolation,
        "mean": info.mean,
        "std": info.std,
    }
    mode = _ToMode("L" if info.in_chans == 1 else "RGB")
    if not options.train:
        if options.interpolation == "random":
            common["interpolation"] = "bilinear"
        final = timm_data.create_transform(is_training=False, crop_pct=options.crop_pct, **common)
        return transforms.Compose([mode, final])
    primary, _, final = timm_data.create_transform(
        is_training=True,
        scale=options.scale,
        hflip=0.5 if options.hflip is None else options.hflip,
        color_jitter=None,
        re_prob=options.reprob,
        re_mode=options.remode,
        separate=True,
        **common,
    )
    # The policies get RGB, as for the arrays; grey comes after them.
    steps = [_ToMode("RGB") if options.auto_augment else mode, primary]
    if options.auto_augment:
        steps += [_policy(options.auto_augment, info.img_size, info.mean), mode]
    if options.cutout:
        steps.append(_PilCutout(options.cutout))
    return transforms.Compose([*steps, final])


class _SeededItems(torch.utils.data.Dataset):
    """Makes a sample a function of (seed, epoch, index), whichever worker loads it."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with _seeded(_derive("item", self.seed, epoch, index)):
            return self.dataset[index]


def _labels_of(dataset: Any) -> Tensor | None:
    reader = getattr(dataset, "reader", None)
    labels = getattr(reader, "targets", None)
    if labels is None and reader is not None and hasattr(reader, "samples"):
        labels = [sample[1] for sample in reader.samples]
    if labels is None:
        labels = getattr(dataset, "targets", None)
    try:
        return None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    except (TypeError, ValueError):
        return None


class _ClosingReader:
    """A reader of timm's that closes its files.

    timm leaves them to the garbage collector, which is a ResourceWarning for every image.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        file, *rest = self.reader[index]
        with file:
            return io.BytesIO(file.read()), *rest

    def __len__(self) -> int:
        return len(self.reader)


class TimmLoader(_BaseLoader):
    """Batches of a dataset that timm reads, with the protocol of ``Loader``.

    Where the samples can be picked by number, timm's dataset and transforms are used, but not its
    ``create_loader``: that shuffles with torch's global generator, pads the shards of an evaluation
    with doubles and has to read what a resumed epoch skips. A stream (``wds/``, ``tfds/``,
    ``hfids/``) is seeded from (seed, epoch, rank), shared out among ranks by timm's reader, and
    read from its beginning when an epoch is resumed.
    """

    def __init__(self, dataset: Any, info: DatasetInfo, options: _Options) -> None:
        self._stream = isinstance(dataset, torch.utils.data.IterableDataset)
        known = len(_classes_of(dataset)) or options.num_classes or info.num_classes
        channels = options.in_chans or info.in_chans
        if channels not in (1, 3):
            _bad("in_chans", channels, f"1 or 3 for {info.name}", "--in-chans 3")
        info = replace(
            info,
            num_classes=known,
            in_chans=channels,
            img_size=options.img_size or info.img_size,
            mean=_channel_values("mean", options.mean, info.mean, channels),
            std=_channel_values("std", options.std, info.std, channels),
        )
        if self._stream and hasattr(dataset, "set_loader_cfg"):
            dataset.set_loader_cfg(num_workers=options.num_workers)
        count = len(dataset)
        chosen = torch.arange(count)
        if options.subset is not None:
            if self._stream:
                raise ValueError(
                    f"subset={options.subset} is not possible for {info.name}, which is read as a "
                    f"stream; leave --subset out"
                )
            subset = _check_subset(options.subset, count, info)
            labels = _labels_of(dataset)
            # Without a list of labels there is one class, and the choice is simply a random one.
            if labels is None:
                labels = torch.zeros(count, dtype=torch.int64)
            chosen = _balanced(labels, subset, options.seed)
        dataset.transform = _timm_transform(info, options)
        if not self._stream and hasattr(dataset, "reader"):
            dataset.reader = _ClosingReader(dataset.reader)
        self.dataset = dataset
        super().__init__(info, chosen, options)

    def _loader(self, epoch: int, dataset: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        options = self.options
        # Its own generator: torch would draw the workers' seed from the global one.
        generator = _generator("workers", options.seed, epoch, options.rank)
        return torch.utils.data.DataLoader(
            dataset,
            num_workers=options.num_workers,
            pin_memory=options.device.type == "cuda",
            generator=generator,
            **kwargs,
        )

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        device = self.options.device
        source = self._streamed if self._stream else self._indexed
        for batch, (images, labels) in source(epoch, start_batch):
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            yield self._finish(images, labels, epoch, batch)

    def _indexed(self, epoch: int, start_batch: int) -> Iterator[tuple[int, Batch]]:
        options = self.options
        keys = [(epoch, index) for index in self._shard(epoch).tolist()]
        size = options.batch_size
        batches = [keys[i * size : (i + 1) * size] for i in range(start_batch, len(self))]
        items = _SeededItems(self.dataset, options.seed)
        yield from enumerate(self._loader(epoch, items, batch_sampler=batches), start_batch)

    def _streamed(self, epoch: int, start_batch: int) -> Iterator[tuple[int, Batch]]:
        options = self.options
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        loader = self._loader(epoch, self.dataset, batch_size=options.batch_size, drop_last=self.drop_last)
        stream = _RandomStream(_derive("stream", options.seed, epoch, options.rank))
        with stream:
            batches = iter(loader)
        batch = 0
        # A stream's length is an estimate; training keeps to it, an evaluation reads everything.
        while not options.train or batch < len(self):
            with stream:
                item = next(batches, None)
            if item is None:
                return
            if batch >= start_batch:
                yield batch, item
            batch += 1

    def __len__(self) -> int:
        if not self._stream:
            return super().__len__()
        # timm's readers of streams count the samples of this rank.
        share = self.num_samples / self.options.batch_size
        return math.floor(share) if self.drop_last else math.ceil(share)


def create_loader(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    download: bool = True,
    batch_size: int = 128,
    train: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    in_chans: int | None = None,
    channels_last: bool = False,
    hflip: float | None = None,
    crop_padding: int | None = None,
    cutout: int = 0,
    auto_augment: str | None = None,
    reprob: float = 0.0,
    remode: str = "pixel",
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mixup_prob: float = 1.0,
    mixup_switch_prob: float = 0.5,
    smoothing: float = 0.0,
    num_classes: int | None = None,
    num_workers: int = 2,
    subset: int | None = None,
    drop_last: bool | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    crop_pct: float | None = 0.875,
    interpolation: str = "bicubic",
) -> Loader:
    """Makes the loader of a dataset's split.

    Args:
        name: Name of the dataset, see ``list_datasets``.
        split: ``train`` or ``test`` (``validation``, ``val`` and ``eval`` mean test). For
            ``hfds/``, ``hfids/``, ``wds/`` and ``tfds/`` it is passed on as it is.
        data_dir: Folder of the data; default: the environment's SPIKEZOO_DATA, else ``./data``.
        download: Whether data that is not on disk may be downloaded.
        batch_size: Samples per batch on this rank.
        train: Whether to shuffle and augment; everything from ``hflip`` to ``smoothing`` is unused
            otherwise.
        device: Where the batches (and the whole of an array dataset) live.
        seed: Seed of everything random.
        rank: Number of this process.
        world_size: Number of processes, which share the samples out among them.
        img_size: Side length of the delivered images; array datasets are resized (bilinear with
            antialiasing). Default: the stored one, 224 for timm's.
        mean: Channel means for the normalisation; default: the dataset's.
        std: Channel standard deviations; default: the dataset's.
        in_chans: Channels of the delivered images: 1 to 3 repeats, 3 to 1 takes the luma.
        channels_last: Whether the batches have torch's channels_last memory format.
        hflip: Probability of mirroring; None: 0 for digits, mnist and grey npz files, else 0.5.
        crop_padding: Zeros (before normalisation) around an array image out of which a window of
            the old size is cut; None: 2 for 28 px, else an eighth of the size (4 for 32 px, 1 for
            8 px). timm's datasets have random resized crops instead.
        cutout: Side of a square hole in every image, with its centre anywhere in the image and
            clipped at the border; 0 for none. It is filled with zeros before the normalisation, as
            the authors of MPBN do it, so it is black, not the mean.
        auto_augment: ``cifar10``, ``imagenet`` or ``svhn`` (torchvision's AutoAugment),
            ``trivial``, or timm's ``rand-...``, ``augmix-...``, ``original-...``; it comes before
            the crop for arrays.
        reprob: Probability of timm's random erasing.
        remode: What it erases with: ``const`` (0 after normalisation), ``rand`` or ``pixel``.
        mixup: Alpha of mixup, 0 for off.
        cutmix: Alpha of cutmix, 0 for off.
        mixup_prob: Probability of mixing a batch at all.
        mixup_switch_prob: Probability of cutmix where both are on.
        smoothing: Label smoothing of the soft targets; without mixing it is the loss's business.
        num_classes: Width of the soft targets; default: the dataset's classes.
        num_workers: Processes that read timm's datasets; 0 reads in this one.
        subset: Number of samples, chosen by the seed with even classes; default: all.
        drop_last: Whether a last batch that is not full is left out; default: when training,
            unless not one batch would be full.
        scale: Range of the area of random resized crops (timm's datasets).
        crop_pct: Part of the image that an evaluation sees (timm's datasets).
        interpolation: Interpolation of timm's datasets.

    Returns:
        The loader: normalised float32 images [B, C, H, W] and int64 targets [B], or soft float32
        targets [B, num_classes] with mixup or cutmix.

    Raises:
        ValueError: An argument is not possible.
        FileNotFoundError: The data is not there.
    """

    def numbers(values: Sequence[float] | None) -> tuple[float, ...] | None:
        return None if values is None else tuple(float(value) for value in values)

    options = _Options(
        batch_size=batch_size,
        train=train,
        device=torch.device(device),
        seed=seed,
        rank=rank,
        world_size=world_size,
        img_size=img_size,
        mean=numbers(mean),
        std=numbers(std),
        in_chans=in_chans,
        channels_last=channels_last,
        hflip=hflip,
        crop_padding=crop_padding,
        cutout=cutout,
        auto_augment=auto_augment or None,
        reprob=reprob,
        remode=remode,
        mixup=mixup,
        cutmix=cutmix,
        mixup_prob=mixup_prob,
        mixup_switch_prob=mixup_switch_prob,
        smoothing=smoothing,
        num_classes=num_classes,
        num_workers=num_workers,
        subset=subset,
        drop_last=drop_last,
        scale=scale,
        crop_pct=0.875 if crop_pct is None else crop_pct,
        interpolation=interpolation,
    )
    if auto_augment:
        # Said before the data is read or downloaded, also where the loader will not augment.
        _policy(auto_augment, 32, _IMAGENET_MEAN)
    if name in _INFOS or name.startswith("npz:"):
        info = dataset_info(name, data_dir)
        images, labels = load_arrays(name, split, data_dir, download)
        return ArrayLoader(images, labels, info, options)
    _check_timm_name(name)
    dataset = _open_timm(name, split, data_dir, download, options)
    # The loader counts the classes of the dataset it has opened, so nothing is scanned twice here.
    known = dataset_info("imagenet")
    return TimmLoader(dataset, replace(known, name=name, num_classes=0), options)
