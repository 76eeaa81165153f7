"""The event datasets with names: their classes and splits, and their official files, which are fetched and unpacked."""

from __future__ import annotations

import logging
import os
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from torchvision.datasets.utils import check_integrity, download_url

from spikezoo.data.events.readers import count_invalid
from spikezoo.data.info import data_root, subfolders

_logger = logging.getLogger("spikezoo")


@dataclass(frozen=True)
class Named:
    """What is known of a dataset with a name."""

    loader: str  # SpikingJelly's class, which knows the official files
    sensor: tuple[int, int]  # height, width
    classes: tuple[str, ...]  # names of the folders
    split: str  # name of the split
    split_note: str  # how train and test are told apart
    split_file: str = ""  # of the test recordings, where the folders do not tell
    split_sha256: str = ""


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NAMED = {
    "nmnist": Named("NMNIST", (34, 34), tuple(map(str, range(10))), "folders", "the folders Train and Test"),
    "cifar10dvs": Named(
        "CIFAR10DVS", (128, 128), CIFAR10, "random-90-10-seed0",
        "a fixed random 90 % and 10 % of every class, 9000 and 1000 recordings",
        "cifar10dvs.txt", "4c490a62d1ad3a1c4d09cb39422c4cbc23f07ca97ea869808990feed23db7e3c",
    ),
    "cifar10dvs_tebn": Named(
        "CIFAR10DVS", (128, 128), CIFAR10, "tebn-0-99",
        "recordings 0 to 99 of every class are test, 100 to 999 train; accuracies on it are higher than on cifar10dvs",
        "cifar10dvs_tebn.txt", "716ad324a3baf74a84266bd9abd0dfba94f1c70abf47a2c0ca0c4366d4341217",
    ),
    "dvs128gesture": Named(
        "DVS128Gesture", (128, 128), tuple(map(str, range(11))), "trials", "the official lists of trials, by person",
    ),
}  # fmt: skip
_SCRATCH = ".spikezoo-unpack-"


def halves(folder: Path) -> dict[str, Path]:
    """The folders train and test, in capitals or not; empty if one is not there."""
    found = {name.lower(): path for name, path in subfolders(folder).items() if name.lower() in ("train", "test")}
    return found if len(found) == 2 else {}


def _spikingjelly(known: Named) -> Any:
    from spikingjelly import datasets

    return getattr(datasets, known.loader)


def _ready(base: Path, known: Named) -> Path | None:
    """The folder with the recordings of a dataset, where one of the accepted layouts is there."""
    if base.is_dir() and (marker := base / "events_np.building").exists():
        raise ValueError(
            f"{marker} says that SpikingJelly was interrupted when it made {base / 'events_np'}: remove both, and "
            f"{base / 'extract'}, and run again"
        )
    for folder in (base / "events_np", base, base / "extract"):
        if known.split_file and subfolders(folder).keys() >= set(known.classes):
            return folder
        if not known.split_file and halves(folder):
            return folder
    return None


def named_place(name: str, data_dir: str | None, download: bool) -> Path:
    """Find the recordings of a dataset, after unpacking or fetching the official archives where need be."""
    known, root = NAMED[name], data_root(data_dir)
    bases = [root / name.removesuffix("_tebn"), root / known.loader, root]
    for base in bases:
        if place := _ready(base, known):
            return place
    loader = _spikingjelly(known)
    official = [row for row in loader.resource_url_md5() if row[0].endswith((".zip", ".tar.gz"))]
    for base in bases:
        if any((base / "download" / file).is_file() for file, _, _ in official) or _trials(base):
            break
    else:
        base = bases[0]
        if not (download and loader.downloadable()):
            rows = ", ".join(f"{file} (MD5 {md5}) of {url}" for file, url, md5 in official)
            raise FileNotFoundError(
                f"{name}: looked for its recordings in {', '.join(map(str, bases))}. Three ways on: put the official "
                f"files {rows} into {base / 'download'}; or --data-dir FOLDER, where FOLDER has "
                f"the unpacked recordings or SpikingJelly's events_np; or --dataset digits, which needs no download"
            )
    base.mkdir(parents=True, exist_ok=True)
    with FileLock(base / ".spikezoo.lock"):
        if not _ready(base, known):
            try:
                _unpack(base, loader, official, download)
            except (OSError, RuntimeError, ValueError, IndexError, struct.error) as error:
                kind = FileNotFoundError if isinstance(error, OSError | RuntimeError) else ValueError
                raise kind(
                    f"{name}: the official files in {base} cannot be had or unpacked ({type(error).__name__}: "
                    f"{str(error).strip()}); type --data-dir FOLDER, where FOLDER has the unpacked recordings, or "
                    f"remove what is damaged and run again"
                ) from error
    place = _ready(base, known)
    if place is None:
        raise ValueError(
            f"{name}: the files in {base} hold no recordings in the official layout; remove {base / 'extract'}"
        )
    return place


def _trials(base: Path) -> Path | None:
    """The folder that has the folder DvsGesture, unpacked."""
    return next((folder for folder in (base, base / "extract") if (folder / "DvsGesture").is_dir()), None)


def _unpack(base: Path, loader: Any, official: list[tuple[str, str, str]], download: bool) -> None:
    """Make ``base``/extract of the archives, and of the trials of DVS128 Gesture ``base``/events_np.

    SpikingJelly's functions do the work in a scratch folder, whose result is renamed: on its own it leaves half a
    folder when it is interrupted, and goes on with it or asks for its removal.
    """
    for left in base.glob(f"{_SCRATCH}*"):  # of a run that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=base) as scratch:
        extract, raw = Path(scratch, "extract"), Path(scratch, "events_np")
        if not _trials(base):
            archives = base / "download"
            for file, url, md5 in official:
                if check_integrity(archives / file, md5):
                    continue
                if not (download and loader.downloadable()):
                    raise RuntimeError(f"{archives / file} is not there or has not the MD5 sum {md5}; it is at {url}")
                download_url(url, archives, file, md5)
            extract.mkdir()
            loader.extract_downloaded_files(archives, extract)
            os.replace(extract, base / "extract")
        if trials := _trials(base):
            for path in sorted((trials / "DvsGesture").glob("*.aedat")):
                try:
                    invalid = count_invalid(path)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
                if invalid:
                    _logger.warning("%s: SpikingJelly takes %d events that are marked as invalid.", path, invalid)
            raw.mkdir()
            loader.create_raw_from_extracted(trials, raw)
            os.replace(raw, base / "events_np")
