"""The cache of the frames: one .npy file a split, beside the recordings or where the environment says.

It survives every interruption: rows that are done are appended to a file with a journal (hash of the recording and
checksum of each), the .npy file is put together at the end and renamed into place, and a lock keeps several processes
from doing the same work. A recording that is changed, added or mended costs its own row. Whatever is read has a hash or
a checksum beside it; what does not fit is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from spikezoo.data.events.framing import Framing
from spikezoo.data.events.recordings import Recordings, file_sha256, name_in

_logger = logging.getLogger("spikezoo")

_CACHE = ".spikezoo"
_CACHE_VARIABLE = "SPIKEZOO_CACHE"


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _known_hashes(store: Path) -> dict[str, list[Any]]:
    """File -> size, time and sha256, as they were written; nothing of a list that is not there or not intact."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        stored = json.loads(store.read_text(encoding="utf-8"))
        if stored["sha256"] == _text_sha256(json.dumps(stored["files"])):
            return dict(stored["files"])
    return {}


def hash_recordings(recordings: Recordings, cache: Path | None) -> dict[Path, str]:
    """The sha256 of every recording; read anew only for files whose size or time has changed.

    Args:
        recordings: The recordings of both splits.
        cache: Folder of the cache; None reads all of them.
    """
    store = cache / "hashes.json" if cache else None
    known = _known_hashes(store) if store else {}
    entries = {}
    for path in tqdm(list(recordings), desc="hash the recordings", unit="file", disable=None, leave=False):
        name, stat = name_in(recordings.place, path), path.stat()
        state = [stat.st_size, stat.st_mtime_ns]
        old = known.get(name, [])
        entries[name] = old if old[:2] == state else [*state, file_sha256(path)]
    if store and entries != known:
        with _locked(store.parent), _replacing(store) as scratch:
            content = {"sha256": _text_sha256(json.dumps(entries)), "files": entries}
            scratch.write_text(json.dumps(content), encoding="utf-8")
    return {path: entries[name_in(recordings.place, path)][2] for path in recordings}


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Keep the other processes out of a cache, which is made where it is not there."""
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
    """Yield a name to write to, which becomes the target at once or, after an error, nothing; wants the lock."""
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
            with contextlib.suppress(ValueError, TypeError, OverflowError, OSError):
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
        with self.journal.open("a", encoding="utf-8") as file:  # after the frames, so that a line has its row
            file.write(f"{digest} {offset} {frames.dtype.name} {zlib.crc32(row)}\n")
        self.places[digest] = offset, frames.dtype

    def remove(self) -> None:
        self.body.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)


def cache_folder(place: Path) -> Path:
    """Beside the recordings, or in the folder that the environment names."""
    if not (named := os.environ.get(_CACHE_VARIABLE)):
        # SpikingJelly takes whatever lies in these two for recordings.
        return (place.parent if place.name in ("events_np", "extract") else place) / _CACHE
    unique = hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:12]
    return Path(named).expanduser() / f"{place.resolve().name}-{unique}"


def complain(faults: Sequence[str], count: int, rest: str = "") -> ValueError:
    """The error that names the recordings that cannot be used."""
    shown = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
    return ValueError(f"{len(faults)} of {count} recordings cannot be used: {shown}. Mend or remove them{rest}")


def cached(paths: Sequence[Path], hashes: dict[Path, str], framing: Framing, cache: Path, label: str) -> np.ndarray:
    """Map the .npy file with the frames of the recordings, which is made where it is not there or not intact.

    Its name has a hash of the recordings, and it gets it when it is complete; the list beside it has its own sha256
    and says which recording each row is of, so that a later build takes over what has not changed.

    Args:
        paths: The recordings.
        hashes: The sha256 of each.
        framing: How they become frames.
        cache: Folder of the cache.
        label: Name of the split.

    Raises:
        ValueError: Recordings that cannot be used; the frames of the others are kept.
    """
    wanted = [hashes[path] for path in paths]
    target = cache / framing.key / f"{label}-{_rows_sha256(wanted)}.npy"
    if opened := _opened(target):
        return opened[0]
    with _locked(cache):
        target.parent.mkdir(exist_ok=True)
        if not (opened := _opened(target)):  # otherwise another process has made it meanwhile
            if target.exists():
                _logger.warning("%s is not as it was written; its frames are made anew.", target)
            _build(target, paths, wanted, framing, label)
            opened = _opened(target)
    assert opened is not None
    return opened[0]


def _rows_sha256(rows: Sequence[str]) -> str:
    return _text_sha256("\n".join(rows))[:16]


def _opened(file: Path) -> tuple[np.ndarray, list[str]] | None:
    """The mapped frames of a file and the hash of each one's recording; None where not all is as it was written."""
    try:
        digest, *rows = file.with_suffix(".txt").read_text(encoding="utf-8").split()
        if not file.stem.endswith(_rows_sha256(rows)) or file_sha256(file) != digest:
            return None
        return np.load(file, mmap_mode="r"), rows
    except (OSError, ValueError, EOFError):
        return None


def _build(target: Path, paths: Sequence[Path], wanted: list[str], framing: Framing, label: str) -> None:
    done: dict[str, np.ndarray] = {}  # hash of a recording -> its frames in an older file
    for file in target.parent.glob("*.npy"):
        if opened := _opened(file):
            done |= dict(zip(opened[1], opened[0], strict=True))
    rows = _Rows(target.with_name(label), framing.shape)
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
        raise complain(faults, len(paths), "; the frames of the others are kept")
    kinds = {done[digest].dtype if digest in done else rows.places[digest][1] for digest in wanted}
    with _replacing(target) as scratch:
        out = np.lib.format.open_memmap(scratch, "w+", np.result_type(*kinds), (len(wanted), *framing.shape))
        for i, digest in enumerate(wanted):
            out[i] = done[digest] if digest in done else rows[digest]
        out.flush()
        del out
        with _replacing(target.with_suffix(".txt")) as names:
            names.write_text("\n".join([file_sha256(scratch), *wanted]), encoding="utf-8")
    for file in target.parent.glob(f"{label}-*"):  # of recordings as they were before
        if file.stem != target.stem:
            file.unlink()
    rows.remove()
