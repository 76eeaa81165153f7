"""Which recordings an event dataset has: classes and splits, by the folders or by a list of one's own."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np

from spikezoo.checks import nearest
from spikezoo.data.events.official import NAMED, Named, halves, named_place
from spikezoo.data.events.readers import READERS, native_sensor
from spikezoo.data.info import is_litter, natural, refuse, subfolders

_logger = logging.getLogger("spikezoo")
_warn_once = functools.lru_cache(maxsize=256)(_logger.warning)

_PREFIX = "events:"
_SPLITS = ("train", "test")
TEST_FILE = "test.txt"
_SENSOR_FILE = "sensor.txt"
_LAYOUT = "PATH contains train/CLASS/RECORDING and test/CLASS/RECORDING (.npz, .npy, .bin, .dat or .aedat)"


def list_event_datasets() -> list[str]:
    """List the names and the pattern that ``open_events`` understands."""
    return [*NAMED, f"{_PREFIX}PATH"]


def is_event_dataset(name: str) -> bool:
    """Whether ``open_events`` understands the name."""
    return name in NAMED or name.startswith(_PREFIX)


@dataclass(frozen=True)
class Recordings:
    """The recordings of both splits, ordered by class and then by name."""

    place: Path  # the folder that has them, and the cache
    classes: tuple[str, ...]
    items: dict[str, list[tuple[Path, int]]]  # split -> (file, label)
    split: str  # name of the split
    sensor: tuple[int, int]
    stated: dict[Path, str]  # file -> the sha256 that the split's file states

    def __iter__(self) -> Iterator[Path]:
        return (path for items in self.items.values() for path, _ in items)


def by_class(folder: Path, only: Sequence[str] | None = None) -> dict[str, list[Path]]:
    """The recordings of each class folder, classes and files in natural order (2 before 10).

    What is left out is said in the log: files of formats that are not read, and folders in a class.
    """
    classes = {name: path for name, path in subfolders(folder).items() if only is None or name in only}
    if not classes:
        raise ValueError(f"{folder} has no class; wanted is a folder for each class, so that {_LAYOUT}")
    found: dict[str, list[Path]] = {}
    left: Counter[str] = Counter()
    for name in sorted(classes, key=natural):
        there = [path for path in classes[name].iterdir() if not is_litter(path.name)]
        fit = [path for path in there if path.suffix.lower() in READERS and path.is_file()]
        if not fit:
            others = ", ".join(sorted({path.suffix or path.name for path in there})) or "nothing"
            raise ValueError(
                f"{classes[name]} is a class without a recording ({', '.join(READERS)}); it has {others}. Put its "
                f"recordings there or remove the folder"
            )
        found[name] = sorted(fit, key=lambda path: natural(path.name))
        left.update("folder" if path.is_dir() else path.suffix or path.name for path in set(there) - set(fit))
    if left:
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
        _warn_once(f"{folder}: left out are {told}, which are no recordings that are read ({', '.join(READERS)})")
    return found


def _labelled(found: dict[str, list[Path]], classes: Sequence[str]) -> list[tuple[Path, int]]:
    if unknown := [name for name in found if name not in classes]:
        folder = found[unknown[0]][0].parent
        raise ValueError(f"{folder} is no class of this dataset. {nearest(unknown[0], classes)}")
    return [(path, classes.index(name)) for name, paths in found.items() for path in paths]


def named_test(known: Named) -> set[str]:
    """Read the fixed test recordings of a dataset."""
    text = (resources.files("spikezoo") / "splits" / known.split_file).read_text(encoding="utf-8")
    if (digest := hashlib.sha256(text.encode()).hexdigest()) != known.split_sha256:
        raise ValueError(
            f"the split file {known.split_file} of this installation was changed (sha256 {digest}, not "
            f"{known.split_sha256}); install spikezoo-snn anew"
        )
    lines = (line.partition(": ") for line in text.splitlines() if not line.startswith("#"))
    return {f"cifar10_{label}_{number}" for label, _, numbers in lines for number in numbers.split()}


def _named_recordings(name: str, data_dir: str | None, download: bool) -> Recordings:
    known = NAMED[name]
    place = named_place(name, data_dir, download)
    if not known.split_file:
        items = {split: _labelled(by_class(folder), known.classes) for split, folder in halves(place).items()}
        return Recordings(place, known.classes, items, known.split, known.sensor, {})
    everything = _labelled(by_class(place, known.classes), known.classes)
    there = {path.stem for path, _ in everything}
    wanted = {f"cifar10_{label}_{number}" for label in known.classes for number in range(1000)}
    if there != wanted or len(everything) != len(wanted):
        absent, more = sorted(wanted - there, key=natural), len(everything) - len(wanted & there)
        raise ValueError(
            f"{name}: the split is of the 10000 official recordings; of them {len(absent)} are not in {place}"
            f"{f' (the first is {absent[0]})' if absent else ''}, and {more} files there are others or doubles. For "
            f"other recordings type --dataset {_PREFIX}PATH"
        )
    test = named_test(known)
    items = {split: [item for item in everything if (item[0].stem in test) == (split == "test")] for split in _SPLITS}
    return Recordings(place, known.classes, items, known.split, known.sensor, {})


def _events_place(name: str, data_dir: str | None) -> Path:
    path = Path(name.removeprefix(_PREFIX)).expanduser()
    if not path.is_dir() and data_dir is not None:
        path = Path(data_dir).expanduser() / path
    if not path.is_dir() or name == _PREFIX:
        raise FileNotFoundError(
            f"{name}: there is no folder {path.absolute()}; type --dataset {_PREFIX}PATH, where {_LAYOUT}"
        )
    return path


def _events_recordings(name: str, data_dir: str | None) -> Recordings:
    place = _events_place(name, data_dir)
    if parts := halves(place):
        train, test = by_class(parts["train"]), by_class(parts["test"])
        classes = tuple(train)
        items = {"train": _labelled(train, classes), "test": _labelled(test, classes)}
        return Recordings(place, classes, items, "folders", (0, 0), {})
    if lone := [name for name in subfolders(place) if name.lower() in _SPLITS]:
        raise ValueError(f"{place} has the folder {lone[0]} without its counterpart; {_LAYOUT}")
    found = by_class(place)
    classes = tuple(found)
    everything = _labelled(found, classes)
    listed = _listed(place / TEST_FILE, {name_in(place, path): path for path, _ in everything})
    items = {split: [item for item in everything if (item[0] in listed) == (split == "test")] for split in _SPLITS}
    if not all(items.values()):
        raise ValueError(
            f"{place / TEST_FILE} lists {len(items['test'])} of {len(everything)} recordings; both splits need one"
        )
    return Recordings(place, classes, items, TEST_FILE, (0, 0), listed)


def name_in(place: Path, path: Path) -> str:
    """What a recording is called in lists: its path from the dataset's folder on."""
    return path.relative_to(place).as_posix()


def _listed(file: Path, known: dict[str, Path]) -> dict[Path, str]:
    """Read a split of one's own: the test recordings in the format of sha256sum; the others are train."""
    if not file.is_file():
        raise ValueError(
            f"{file.parent} has classes but no split: there are neither the folders train and test nor a file "
            f"{TEST_FILE} that lists the test recordings. To write one (a tenth of each class, drawn by a seed) type "
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


def file_sha256(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_split(path: str | Path, test_share: float = 0.1, seed: int = 0) -> Path:
    """Write the fixed split of a folder of classes: a random part of each class is test.

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
    if halves(place) or (place / TEST_FILE).exists():
        raise ValueError(f"{place} has a split already (train and test, or {TEST_FILE}); remove it for a new one")
    if not 0 < test_share < 1:
        refuse("test_share", test_share, "between 0 and 1", "test_share=0.1")
    generator = np.random.default_rng(seed)
    lines = []
    for name, paths in by_class(place).items():
        if len(paths) < 2:
            raise ValueError(f"{place / name} has one recording, which cannot be both train and test; add others")
        count = min(max(1, round(len(paths) * test_share)), len(paths) - 1)
        for index in sorted(generator.permutation(len(paths))[:count].tolist()):
            lines.append(f"{file_sha256(paths[index])}  {name_in(place, paths[index])}\n")
    (place / TEST_FILE).write_text("".join(lines), encoding="utf-8")
    return place / TEST_FILE


def _sensor(recordings: Recordings, size: int | Sequence[int] | None) -> tuple[int, int]:
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
            refuse(option, size, "the height and width of the sensor in pixels", "size=(128, 128)")
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


def find_recordings(name: str, data_dir: str | None, size: int | Sequence[int] | None, download: bool) -> Recordings:
    """Find the recordings of a dataset of any kind."""
    if not is_event_dataset(name):
        raise ValueError(f"unknown event dataset {name!r}. {nearest(name, list_event_datasets())}")
    if name not in NAMED:
        found = _events_recordings(name, data_dir)
        return replace(found, sensor=_sensor(found, size))
    sensor = NAMED[name].sensor
    if size is not None and (size if isinstance(size, int) else tuple(size)) not in (sensor, sensor[0]):
        refuse("size", size, f"{sensor}, the sensor of {name} (frames are resized by the loader)", f"size={sensor}")
    return _named_recordings(name, data_dir, download)


def check_twins(recordings: Recordings, hashes: dict[Path, str]) -> None:
    """Raise ValueError if a recording is in train and in test."""
    train = {hashes[path]: path for path, _ in recordings.items["train"]}
    twins = [(train[hashes[path]], path) for path, _ in recordings.items["test"] if hashes[path] in train]
    if twins:
        shown = ", ".join(f"{left} = {right}" for left, right in twins[:5])
        raise ValueError(
            f"{len(twins)} recordings of the test split are in the train split too, to the byte: {shown}; remove one "
            f"of each pair"
        )
