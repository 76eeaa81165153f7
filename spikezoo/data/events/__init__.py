"""Event recordings by name: fixed splits, frames by number, time or duration, and the cache of the frames.

A recording is a list of events (t in microseconds, x, y, polarity p). It becomes T frames of event counts
[T, 2, H, W], channel 0 off (p = 0) and channel 1 on (p = 1), as SpikingJelly integrates them. The frames of a split
lie in one .npy file beside the recordings, which is mapped into memory. SpikingJelly's modules are imported only
where they are used: they take seconds.

The cache survives every interruption: rows that are done are appended to a file with a journal (hash of the recording
and checksum of each), the .npy file is put together at the end and renamed into place, and a lock keeps several
processes from doing the same work. A recording that is changed, added or mended costs its own row.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from timm.utils.misc import natural_key
from torch import Tensor
from torchvision.datasets.utils import check_integrity, download_url
from tqdm import tqdm

from spikezoo.checks import nearest
from spikezoo.data import DatasetInfo, _bad, _check_split, _data_root
from spikezoo.data.events.readers import READERS, check_packets, native_sensor, read_events

__all__ = [
    "EventFrames",
    "event_info",
    "is_event_dataset",
    "list_event_datasets",
    "open_events",
    "read_events",
    "write_split",
]


@dataclass(frozen=True)
class _Named:
    """What is known of a dataset with a name."""

    loader: str  # SpikingJelly's class, which knows the official files
    sensor: tuple[int, int]  # height, width
    classes: tuple[str, ...]  # names of the folders
    split: str  # name of the split
    split_note: str  # how train and test are told apart
    split_file: str = ""  # of the test recordings, where the folders do not tell
    split_sha256: str = ""


_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_NAMED = {
    "nmnist": _Named("NMNIST", (34, 34), tuple(map(str, range(10))), "folders", "the folders Train and Test"),
    "cifar10dvs": _Named(
        "CIFAR10DVS", (128, 128), _CIFAR10, "random-90-10-seed0",
        "a fixed random 90 % and 10 % of every class, 9000 and 1000 recordings",
        "cifar10dvs.txt", "4c490a62d1ad3a1c4d09cb39422c4cbc23f07ca97ea869808990feed23db7e3c",
    ),
    "cifar10dvs_tebn": _Named(
        "CIFAR10DVS", (128, 128), _CIFAR10, "tebn-0-99",
        "recordings 0 to 99 of every class are test, 100 to 999 train; accuracies on it are higher than on cifar10dvs",
        "cifar10dvs_tebn.txt", "716ad324a3baf74a84266bd9abd0dfba94f1c70abf47a2c0ca0c4366d4341217",
    ),
    "dvs128gesture": _Named(
        "DVS128Gesture", (128, 128), tuple(map(str, range(11))), "trials", "the official lists of trials, by person",
    ),
}  # fmt: skip
_PREFIX = "events:"
_FRAMES_BY = ("number", "time", "duration")
_SPLITS = ("train", "test")
_CACHE = ".spikezoo"
_CACHE_VARIABLE = "SPIKEZOO_CACHE"
_SCRATCH = ".spikezoo-unpack-"
_TEST_FILE = "test.txt"
_SENSOR_FILE = "sensor.txt"
_LAYOUT = "PATH contains train/CLASS/RECORDING and test/CLASS/RECORDING (.npz, .npy, .bin, .dat or .aedat)"


def list_event_datasets() -> list[str]:
    """Lists the names and the pattern that ``open_events`` understands."""
    return [*_NAMED, f"{_PREFIX}PATH"]


def is_event_dataset(name: str) -> bool:
    """Whether ``open_events`` understands the name."""
    return name in _NAMED or name.startswith(_PREFIX)


# --- frames ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Framing:
    """How events become frames."""

    T: int
    frames_by: str
    duration_us: int  # 0 unless frames_by is duration
    sensor: tuple[int, int]

    @property
    def key(self) -> str:
        """Name of the cache of such frames."""
        each = f"{self.duration_us}us" if self.duration_us else self.frames_by
        return f"T{self.T}-{each}-{self.sensor[0]}x{self.sensor[1]}"

    def edges(self, t: np.ndarray) -> np.ndarray:
        """Indices between which the events of each frame lie; fewer than T + 1 for a recording that ends before."""
        if self.frames_by == "number":
            edges = len(t) // self.T * np.arange(self.T + 1)
        elif self.frames_by == "time":
            edges = np.searchsorted(t, t[0] + (t[-1] - t[0]) // self.T * np.arange(self.T + 1))
        else:
            needed = max(1, -int((t[0] - t[-1]) // self.duration_us))  # rounded up
            edges = np.searchsorted(t, t[0] + self.duration_us * np.arange(min(self.T, needed) + 1))
            if needed > self.T:
                return edges  # what comes later is left out
        edges[-1] = len(t)  # the last frame takes what the division leaves
        return edges

    def integrate(self, path: Path) -> np.ndarray:
        """Counts the events of a recording into [T, 2, H, W] of the smallest unsigned type that holds them."""
        from spikingjelly.datasets.utils import integrate_events_segment_to_frame

        events = read_events(path, self.sensor)
        frames = np.zeros((self.T, 2, *self.sensor), np.uint32)
        edges = self.edges(events["t"])
        for frame, left, right in zip(frames, edges[:-1], edges[1:], strict=False):
            frame[:] = integrate_events_segment_to_frame(
                events["x"], events["y"], events["p"], *self.sensor, left, right
            )
        return frames.astype(np.min_scalar_type(frames.max()))


# --- which recordings -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recordings:
    """The recordings of both splits, ordered by class and then by name."""

    place: Path  # the folder that has them, and the cache
    classes: tuple[str, ...]
    items: dict[str, list[tuple[Path, int]]]  # split -> (file, label)
    split: str  # name of the split
    sensor: tuple[int, int]
    stated: dict[Path, str]  # file -> the sha256 that the split's file states

    def __iter__(self) -> Iterator[Path]:
        return (path for items in self.items.values() for path, _ in items)


def _folders(folder: Path) -> dict[str, Path]:
    """The folders in a folder by name, without hidden ones."""
    if not folder.is_dir():
        return {}
    return {path.name: path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}


def _halves(folder: Path) -> dict[str, Path]:
    """The folders train and test, in capitals or not; empty if one is not there."""
    found = {name.lower(): path for name, path in _folders(folder).items() if name.lower() in ("train", "test")}
    return found if len(found) == 2 else {}


def _by_class(folder: Path, only: Sequence[str] | None = None) -> dict[str, list[Path]]:
    """The recordings of each class folder, classes and files in natural order (2 before 10)."""
    classes = {name: path for name, path in _folders(folder).items() if only is None or name in only}
    if not classes:
        raise ValueError(f"{folder} has no class; wanted is a folder for each class, so that {_LAYOUT}")
    found = {}
    for name in sorted(classes, key=natural_key):
        there = list(classes[name].iterdir())
        found[name] = sorted(
            (path for path in there if path.suffix.lower() in READERS and path.is_file()),
            key=lambda path: natural_key(path.name),
        )
        if not found[name]:
            others = ", ".join(sorted({path.suffix or path.name for path in there})) or "nothing"
            raise ValueError(
                f"{classes[name]} is a class without a recording ({', '.join(READERS)}); it has {others}. Put its "
                f"recordings there or remove the folder"
            )
    return found


def _labelled(found: dict[str, list[Path]], classes: Sequence[str]) -> list[tuple[Path, int]]:
    if unknown := [name for name in found if name not in classes]:
        folder = found[unknown[0]][0].parent
        raise ValueError(f"{folder} is no class of this dataset. {nearest(unknown[0], classes)}")
    return [(path, classes.index(name)) for name, paths in found.items() for path in paths]


def _named_test(known: _Named) -> set[str]:
    """Reads the fixed test recordings of a dataset."""
    text = (resources.files("spikezoo") / "splits" / known.split_file).read_text(encoding="utf-8")
    if (digest := hashlib.sha256(text.encode()).hexdigest()) != known.split_sha256:
        raise ValueError(
            f"the split file {known.split_file} of this installation was changed (sha256 {digest}, not "
            f"{known.split_sha256}); install spikezoo-snn anew"
        )
    lines = (line.partition(": ") for line in text.splitlines() if not line.startswith("#"))
    return {f"cifar10_{label}_{number}" for label, _, numbers in lines for number in numbers.split()}


def _named_recordings(name: str, data_dir: str | None, download: bool) -> _Recordings:
    known = _NAMED[name]
    place = _named_place(name, data_dir, download)
    if not known.split_file:
        halves = {split: _labelled(_by_class(folder), known.classes) for split, folder in _halves(place).items()}
        return _Recordings(place, known.classes, halves, known.split, known.sensor, {})
    everything = _labelled(_by_class(place, known.classes), known.classes)
    there = {path.stem for path, _ in everything}
    wanted = {f"cifar10_{label}_{number}" for label in known.classes for number in range(1000)}
    if there != wanted or len(everything) != len(wanted):
        absent, more = sorted(wanted - there, key=natural_key), len(everything) - len(wanted & there)
        raise ValueError(
            f"{name}: the split is of the 10000 official recordings; of them {len(absent)} are not in {place}"
            f"{f' (the first is {absent[0]})' if absent else ''}, and {more} files there are others or doubles. For "
            f"other recordings type --dataset {_PREFIX}PATH"
        )
    test = _named_test(known)
    items = {split: [item for item in everything if (item[0].stem in test) == (split == "test")] for split in _SPLITS}
    return _Recordings(place, known.classes, items, known.split, known.sensor, {})


def _events_place(name: str, data_dir: str | None) -> Path:
    path = Path(name.removeprefix(_PREFIX)).expanduser()
    if not path.is_dir() and data_dir is not None:
        path = Path(data_dir).expanduser() / path
    if not path.is_dir() or name == _PREFIX:
        raise FileNotFoundError(
            f"{name}: there is no folder {path.absolute()}; type --dataset {_PREFIX}PATH, where {_LAYOUT}"
        )
    return path


def _events_recordings(name: str, data_dir: str | None) -> _Recordings:
    place = _events_place(name, data_dir)
    if halves := _halves(place):
        train, test = _by_class(halves["train"]), _by_class(halves["test"])
        classes = tuple(train)
        items = {"train": _labelled(train, classes), "test": _labelled(test, classes)}
        return _Recordings(place, classes, items, "folders", (0, 0), {})
    if lone := [name for name in _folders(place) if name.lower() in _SPLITS]:
        raise ValueError(f"{place} has the folder {lone[0]} without its counterpart; {_LAYOUT}")
    found = _by_class(place)
    classes = tuple(found)
    everything = _labelled(found, classes)
    listed = _listed(place / _TEST_FILE, {_name_in(place, path): path for path, _ in everything})
    items = {split: [item for item in everything if (item[0] in listed) == (split == "test")] for split in _SPLITS}
    if not all(items.values()):
        raise ValueError(
            f"{place / _TEST_FILE} lists {len(items['test'])} of {len(everything)} recordings; both splits need one"
        )
    return _Recordings(place, classes, items, _TEST_FILE, (0, 0), listed)


def _name_in(place: Path, path: Path) -> str:
    return path.relative_to(place).as_posix()


def _listed(file: Path, known: dict[str, Path]) -> dict[Path, str]:
    """Reads a split of one's own: the test recordings in the format of sha256sum; the others are train."""
    if not file.is_file():
        raise ValueError(
            f"{file.parent} has classes but no split: there are neither the folders train and test nor a file "
            f"{_TEST_FILE} that lists the test recordings. To write one (a tenth of each class, drawn by a seed) type "
            f'python -c "from spikezoo.data.events import write_split; write_split({str(file.parent)!r})"'
        )
    listed = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or name not in known:
            fault = "is not there" if name and len(digest) == 64 else "is wanted as SHA256, two spaces, CLASS/RECORDING"
            raise ValueError(
                f"{file}, line {number}: the recording of {line!r} {fault}; mend it or write the file anew"
            )
        listed[known[name]] = digest
    return listed


def write_split(path: str | Path, test_share: float = 0.1, seed: int = 0) -> Path:
    """Writes the fixed split of a folder of classes: a random part of each class is test.

    Args:
        path: Folder with a folder of recordings for each class.
        test_share: Part of each class that is test, rounded, at least one recording.
        seed: Of the choice.

    Returns:
        The file ``test.txt`` in that folder, with the sha256 and name of each test recording (``sha256sum -c`` reads
        it too).

    Raises:
        ValueError: There is a split already, or a class has fewer than two recordings.
    """
    place = Path(path)
    if _halves(place) or (place / _TEST_FILE).exists():
        raise ValueError(f"{place} has a split already (train and test, or {_TEST_FILE}); remove it for a new one")
    if not 0 < test_share < 1:
        _bad("test_share", test_share, "between 0 and 1", "test_share=0.1")
    generator = np.random.default_rng(seed)
    lines = []
    for name, paths in _by_class(place).items():
        if len(paths) < 2:
            raise ValueError(f"{place / name} has one recording, which cannot be both train and test; add others")
        count = min(max(1, round(len(paths) * test_share)), len(paths) - 1)
        for index in sorted(generator.permutation(len(paths))[:count].tolist()):
            lines.append(f"{_sha256(paths[index])}  {_name_in(place, paths[index])}\n")
    (place / _TEST_FILE).write_text("".join(lines), encoding="utf-8")
    return place / _TEST_FILE


def _sensor(recordings: _Recordings, size: int | Sequence[int] | None) -> tuple[int, int]:
    """The height and width of the sensor: as asked for, as the folder says, or as the format has it."""
    file = recordings.place / _SENSOR_FILE
    if size is None and file.is_file():
        size = [int(word) if word.isdecimal() else 0 for word in file.read_text("utf-8", "replace").split()]
        option = str(file)
    else:
        option = "size"
    if size is not None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
            _bad(option, size, "the height and width of the sensor in pixels", "size=(128, 128)")
        return sides
    suffixes = {path.suffix.lower() for path in recordings}
    # Of each folder and format one file; what does not fit into the sensor is refused when it is read.
    own = {native_sensor(path) for path in {(path.parent, path.suffix): path for path in recordings}.values()}
    sensor = own.pop()
    if own or sensor is None:
        raise ValueError(
            f"{recordings.place}: {' and '.join(sorted(suffixes))} files do not tell the size of the sensor. Write its "
            f"height and width into {file} (e.g. 128 128), or give size=(128, 128)"
        )
    return sensor


# --- the official files of the named datasets -------------------------------------------------------------------


def _spikingjelly(known: _Named) -> Any:
    from spikingjelly import datasets

    return getattr(datasets, known.loader)


def _ready(base: Path, known: _Named) -> Path | None:
    """The folder with the recordings of a dataset, where one of the accepted layouts is there."""
    if base.is_dir() and (marker := base / "events_np.building").exists():
        raise ValueError(
            f"{marker} says that SpikingJelly was interrupted when it made {base / 'events_np'}: remove both, and "
            f"{base / 'extract'}, and run again"
        )
    for folder in (base / "events_np", base, base / "extract"):
        if known.split_file and _folders(folder).keys() >= set(known.classes):
            return folder
        if not known.split_file and _halves(folder):
            return folder
    return None


def _named_place(name: str, data_dir: str | None, download: bool) -> Path:
    """Finds the recordings of a dataset, after unpacking or fetching the official archives where need be."""
    known, root = _NAMED[name], _data_root(data_dir)
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
    """Makes ``base``/extract of the archives, and of the trials of DVS128 Gesture ``base``/events_np.

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
                    check_packets(path)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
            raw.mkdir()
            loader.create_raw_from_extracted(trials, raw)
            os.replace(raw, base / "events_np")


# --- the cache ------------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(recordings: _Recordings, cache: Path | None) -> dict[Path, str]:
    """The sha256 of every recording; read anew only for files whose size or time has changed."""
    store = cache / "hashes.json" if cache else None
    known: dict[str, list[Any]] = {}
    if store:
        with contextlib.suppress(OSError, ValueError):  # none yet, or damaged: all are read anew
            known = dict(json.loads(store.read_text(encoding="utf-8")))
    entries = {}
    for path in tqdm(list(recordings), desc="hash the recordings", unit="file", disable=None, leave=False):
        name, stat = _name_in(recordings.place, path), path.stat()
        state = [stat.st_size, stat.st_mtime_ns]
        old = known.get(name, [])
        entries[name] = old if old[:2] == state else [*state, _sha256(path)]
    if store and entries != known:
        with _locked(store.parent), _replacing(store) as scratch:
            scratch.write_text(json.dumps(entries), encoding="utf-8")
    return {path: entries[_name_in(recordings.place, path)][2] for path in recordings}


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Keeps the other processes out of a cache, which is made where it is not there."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / "lock").acquire()
    except OSError as error:
        raise ValueError(
            f"the cache of the frames cannot be written ({error}); name another folder for it with the environment "
            f"variable {_CACHE_VARIABLE}"
        ) from error
    with lock:
        yield


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yields a name to write to, which becomes the target at once or, after an error, nothing; wants the lock."""
    scratch = target.with_name(f"{target.name}.tmp")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


class _Rows:
    """Frames of single recordings that outlive an interrupted build: a file that grows, and its journal."""

    def __init__(self, stem: Path, shape: tuple[int, ...]) -> None:
        self.body, self.journal = stem.with_name(stem.name + ".part"), stem.with_name(stem.name + ".part.txt")
        self.shape = shape
        self.places: dict[str, tuple[int, np.dtype]] = {}  # sha256 of the recording -> offset, type
        # A line that is torn, or whose row has another checksum, does not count.
        text = self.journal.read_bytes() if self.journal.is_file() and self.body.is_file() else b""
        text = text[: text.rfind(b"\n") + 1]
        self.journal.write_bytes(text)
        self.body.touch()
        for line in text.decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                digest, offset, kind, crc = line.split()
                place = int(offset), np.dtype(kind)
                if zlib.crc32(self._read(*place).tobytes()) == int(crc):
                    self.places[digest] = place

    def _read(self, offset: int, kind: np.dtype) -> np.ndarray:
        return np.fromfile(self.body, kind, int(np.prod(self.shape)), offset=offset).reshape(self.shape)

    def __getitem__(self, digest: str) -> np.ndarray:
        return self._read(*self.places[digest])

    def add(self, digest: str, frames: np.ndarray) -> None:
        row = frames.tobytes()
        with self.body.open("ab") as file:
            offset = file.tell()
            file.write(row)
        with self.journal.open("a") as file:  # after the frames, so that a line has its row
            file.write(f"{digest} {offset} {frames.dtype.name} {zlib.crc32(row)}\n")
        self.places[digest] = offset, frames.dtype

    def remove(self) -> None:
        self.body.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)


def _cache_folder(place: Path) -> Path:
    """Beside the recordings, or in the folder that the environment names."""
    if not (named := os.environ.get(_CACHE_VARIABLE)):
        # SpikingJelly takes whatever lies in these two for recordings.
        return (place.parent if place.name in ("events_np", "extract") else place) / _CACHE
    unique = hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:12]
    return Path(named).expanduser() / f"{place.resolve().name}-{unique}"


def _complain(faults: Sequence[str], count: int, rest: str = "") -> ValueError:
    shown = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
    return ValueError(f"{len(faults)} of {count} recordings cannot be used: {shown}. Mend or remove them{rest}")


def _cached(paths: Sequence[Path], hashes: dict[Path, str], framing: _Framing, cache: Path, label: str) -> np.ndarray:
    """Maps the .npy file with the frames of the recordings, which is made where it is not there.

    Its name has a hash of the recordings, and it gets it when it is complete; the list beside it says which
    recording each row is of, so that a later build takes over what has not changed.
    """
    wanted = [hashes[path] for path in paths]
    digest = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:16]
    folder = cache / framing.key
    target = folder / f"{label}-{digest}.npy"
    if (frames := _mapped(target)) is not None:
        return frames
    with _locked(cache):
        folder.mkdir(exist_ok=True)
        if (frames := _mapped(target)) is None:  # otherwise another process has made it meanwhile
            _build(target, paths, wanted, framing, label)
            frames = _mapped(target)
    assert frames is not None
    return frames


def _mapped(file: Path) -> np.ndarray | None:
    """Maps an array; None for one that is not there or was cut short (in copying, say)."""
    try:
        return np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None


def _build(target: Path, paths: Sequence[Path], wanted: list[str], framing: _Framing, label: str) -> None:
    shape = (framing.T, 2, *framing.sensor)
    rows = _Rows(target.with_name(label), shape)
    done: dict[str, np.ndarray] = {}  # hash of a recording -> its frames in an older file
    for file in target.parent.glob("*.npy"):
        names = file.with_suffix(".txt")
        frames, listed = _mapped(file), names.read_text().split() if names.is_file() else []
        if frames is not None and len(frames) == len(listed):
            done |= dict(zip(listed, frames, strict=True))
    faults = []
    for path, digest in tqdm(
        list(zip(paths, wanted, strict=True)), desc=f"frames of {label}", unit="file", disable=None, leave=False
    ):
        if digest not in done and digest not in rows.places:
            try:
                rows.add(digest, framing.integrate(path))
            except ValueError as error:
                faults.append(str(error))
    if faults:
        raise _complain(faults, len(paths), "; the frames of the others are kept")
    kinds = {done[digest].dtype if digest in done else rows.places[digest][1] for digest in wanted}
    target.with_suffix(".txt").write_text("\n".join(wanted))
    with _replacing(target) as scratch:
        out = np.lib.format.open_memmap(scratch, "w+", np.result_type(*kinds), (len(wanted), *shape))
        for i, digest in enumerate(wanted):
            out[i] = done[digest] if digest in done else rows[digest]
        out.flush()
        del out
    for file in target.parent.glob(f"{label}-*"):  # of recordings as they were before
        if file.stem != target.stem:
            file.unlink()
    rows.remove()


# --- what is handed out -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EventFrames:
    """The frames of one split, as ``open_events`` returns them."""

    frames: np.ndarray  # counts [N, T, 2, H, W], uint8 (or as many bits as the counts need), mapped from a file
    labels: Tensor  # int64 [N]
    classes: list[str]
    split: str  # name of the split, number of recordings and hash of them and their labels, for rows of results
    sensor: tuple[int, int]  # height, width
    files: list[str]  # of the recordings

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int) -> Tensor:
        """The frames of one recording as float32 [T, 2, H, W]."""
        return torch.from_numpy(self.frames[index].astype(np.float32))


def _recordings(name: str, data_dir: str | None, size: int | Sequence[int] | None, download: bool) -> _Recordings:
    """Finds the recordings of a dataset of any kind."""
    if not is_event_dataset(name):
        raise ValueError(f"unknown event dataset {name!r}. {nearest(name, list_event_datasets())}")
    if name not in _NAMED:
        found = _events_recordings(name, data_dir)
        return replace(found, sensor=_sensor(found, size))
    sensor = _NAMED[name].sensor
    if size is not None and (size if isinstance(size, int) else tuple(size)) not in (sensor, sensor[0]):
        _bad("size", size, f"{sensor}, the sensor of {name} (frames are resized by the loader)", f"size={sensor}")
    return _named_recordings(name, data_dir, download)


def event_info(name: str, data_dir: str | None = None) -> DatasetInfo:
    """Describes an event dataset as ``spikezoo.data.dataset_info`` does; counts are delivered as they are.

    Raises:
        ValueError: The name is unknown, or the folder not usable.
        FileNotFoundError: The folder is not there.
    """
    if name in _NAMED:
        known = _NAMED[name]
        classes, sensor, note = known.classes, known.sensor, known.split_note
    else:
        found = _recordings(name, data_dir, None, False)
        classes, sensor, note = found.classes, found.sensor, f"{found.split} of {found.place}"
    return DatasetInfo(name, len(classes), 2, max(sensor), (0.0, 0.0), (1.0, 1.0), note)


def open_events(
    name: str,
    split: str,
    *,
    T: int,
    data_dir: str | None = None,
    size: int | Sequence[int] | None = None,
    frames_by: str = "number",
    duration_us: int | None = None,
    download: bool = True,
    cache: bool = True,
) -> EventFrames:
    """Opens a split of an event dataset as frames.

    Args:
        name: ``nmnist``, ``cifar10dvs``, ``cifar10dvs_tebn``, ``dvs128gesture`` or ``events:PATH``.
        split: ``train`` or ``test`` (``validation``, ``val`` and ``eval`` mean test).
        T: Frames of each recording.
        data_dir: Folder of the data; default: the environment's SPIKEZOO_DATA, else ./data. A relative
            ``events:PATH`` is tried there too.
        size: Height and width of the sensor (one number for a square), where ``events:PATH`` does not tell it.
        frames_by: ``number`` gives the frames equal numbers of events, ``time`` equal durations (both leave the
            remainder to the last frame), and ``duration`` makes frames of ``duration_us`` each. The first two keep
            every event. With ``duration`` a recording that ends before T frames is filled up with empty ones, and
            what comes after T frames is left out.
        duration_us: Microseconds of a frame, for ``duration``.
        download: Whether recordings that are not on disk may be downloaded (CIFAR10-DVS alone can be).
        cache: Whether the frames are kept on disk, beside the recordings or in the folder SPIKEZOO_CACHE of the
            environment; otherwise they are made in memory.

    Returns:
        The frames, labels, classes, files, and the name and hash of the split.

    Raises:
        ValueError: An argument is not possible, a recording is not usable (all of these are named; the frames of the
            others are kept), or a recording is in both splits.
        FileNotFoundError: The data is not there.
    """
    split = _check_split(split)
    if type(T) is not int or T < 1:
        _bad("T", T, "a whole number of frames of at least 1", 10)
    if frames_by not in _FRAMES_BY:
        _bad("frames_by", frames_by, f"one of {', '.join(_FRAMES_BY)}", "frames_by='number'")
    whole = duration_us is None or (type(duration_us) is int and duration_us >= 1)
    if (frames_by == "duration") != (duration_us is not None) or not whole:
        wanted = "a whole number of microseconds with frames_by='duration', and not given without"
        _bad("duration_us", duration_us, wanted, "frames_by='duration', duration_us=30000")
    found = _recordings(name, data_dir, size, download)
    folder = _cache_folder(found.place) if cache else None
    hashes = _hashes(found, folder)
    for path, stated in found.stated.items():
        if hashes[path] != stated:
            raise ValueError(
                f"{path} is not the recording that {found.place / _TEST_FILE} states: its sha256 is {hashes[path]}"
            )
    _check_twins(found, hashes)
    framing = _Framing(T, frames_by, duration_us or 0, found.sensor)
    paths, labels = [path for path, _ in found.items[split]], [label for _, label in found.items[split]]
    if folder:
        label = f"{name if name in _NAMED else 'events'}-{split}"
        frames = _cached(paths, hashes, framing, folder, label)
    else:
        frames = _in_memory(paths, framing)
    rows = sorted(f"{hashes[path]} {found.classes[label]}\n" for path, label in found.items[split])
    digest = hashlib.sha256("".join(rows).encode()).hexdigest()[:12]
    note = f"{found.split}/{split}, {len(paths)} recordings, sha256 {digest}"
    return EventFrames(frames, torch.tensor(labels), list(found.classes), note, found.sensor, list(map(str, paths)))


def _in_memory(paths: Sequence[Path], framing: _Framing) -> np.ndarray:
    rows, faults = [], []
    for path in paths:
        try:
            rows.append(framing.integrate(path))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise _complain(faults, len(paths))
    return np.stack(rows)


def _check_twins(recordings: _Recordings, hashes: dict[Path, str]) -> None:
    """Raises ValueError if a recording is in train and in test."""
    train = {hashes[path]: path for path, _ in recordings.items["train"]}
    twins = [(train[hashes[path]], path) for path, _ in recordings.items["test"] if hashes[path] in train]
    if twins:
        shown = ", ".join(f"{left} = {right}" for left, right in twins[:5])
        raise ValueError(
            f"{len(twins)} recordings of the test split are in the train split too, to the byte: {shown}; remove one "
            f"of each pair"
        )
