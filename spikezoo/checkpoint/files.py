"""Files: atomic writes, hashes, finding the weights in a folder, opening a safetensors file, what a wrong one is."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["CONFIG_NAME", "PICKLES", "WEIGHTS_NAME", "atomic", "check_file", "check_run_file", "check_target"]
__all__ += [
    "file_hash",
    "find_weights",
    "hint",
    "open_tensors",
    "read_metadata",
    "read_table",
    "write_metadata",
    "write_tensors",
]

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
METADATA_NAME = "metadata.json"
# What a training leaves for people and for other commands, with its digest in metadata.json.
RUN_FILES = ("args.yaml", "summary.csv", "layer_rates.csv")
PICKLES = (".pth", ".pt", ".tar", ".bin", ".ckpt")


def _flush(path: Path, flags: int) -> None:
    """Have the system write a file or folder to its disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name when the block ends well, and vanishes otherwise.

    The content is on the disk before the name is, and the name when this returns: after a power cut the file is the
    old one or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # two savers never share it
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors writes files that only their owner may read
        _flush(temporary, os.O_RDWR)
        os.replace(temporary, path)
        with suppress(OSError):  # not every system lets a folder be opened
            _flush(path.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


def check_target(path: str | Path) -> None:
    """Raise where a file cannot be written, before the work is done that it is for.

    Args:
        path: The file; folders that are not there are made later.

    Raises:
        OSError: A folder has the name, a file stands where a folder must be, or the folder may not be written to.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file, or remove it.")
    place = next(parent for parent in path.parents if parent.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {place} is no folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {place} may not be written to. Give another place.")


def file_hash(path: str | Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _table_digest(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """How many rows a table has, and the sha256 of what their cells say.

    Other line ends, and a column that a later row brings, are no damage.
    """
    said = [sorted((str(key), str(value)) for key, value in row.items() if value not in ("", None)) for row in rows]
    return [len(said), hashlib.sha256(json.dumps(said).encode()).hexdigest()]


def _metadata_digest(content: Mapping[str, Any]) -> str:
    digests = {key: value for key, value in content["sha256"].items() if key != METADATA_NAME}
    return hashlib.sha256(json.dumps({**content, "sha256": digests}, sort_keys=True).encode()).hexdigest()


def write_metadata(
    folder: Path, facts: Mapping[str, Any], tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> None:
    """Write metadata.json: facts of a run, and the digests of its files and of itself.

    A table is vouched for up to its last row here. So it is written before this where it grows, after it where it
    shrinks: whatever moment a process is killed at, the two fit.

    Args:
        folder: The run's, with its args.yaml.
        facts: Plain data.
        tables: Name of a .csv file -> its rows.
    """
    digests: dict[str, Any] = {name: _table_digest(rows) for name, rows in (tables or {}).items() if rows}
    digests["args.yaml"] = file_hash(folder / "args.yaml")
    content = json.loads(json.dumps({**facts, "format": 1, "sha256": digests}))
    content["sha256"][METADATA_NAME] = _metadata_digest(content)
    with atomic(folder / METADATA_NAME) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_metadata(folder: Path) -> dict[str, Any]:
    """What a run wrote down of itself, {} where nothing is there.

    Raises:
        ValueError: Damaged, or edited.
    """
    path = folder / METADATA_NAME
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # Runs of older versions have neither a format nor digests.
        old = not content.keys() & {"format", "sha256"}
        sound = old or content["sha256"].get(METADATA_NAME) == _metadata_digest(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(
            f"{path} is not as its run wrote it: damaged, or edited. It says what the files beside it were; put it "
            "back, or move it away to have them read as they are."
        )
    return content


def _digest_of(path: Path) -> Any:
    """What the metadata.json beside a file of a run says that it is; None of another's, or where none is."""
    return read_metadata(path.parent).get("sha256", {}).get(path.name) if path.name in RUN_FILES else None


def _check_digest(path: Path, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise ValueError(
            f"{path} is not as its run wrote it: damaged, or edited. Put it back; to change it, copy it under another "
            f"name or to another folder; to have it read as it is, move {METADATA_NAME} away, which has its digest."
        )


def check_run_file(path: Path) -> Path:
    """Return the path of a file that is as its run wrote it, by the metadata.json beside it, or that is no run's.

    Args:
        path: The file.

    Raises:
        ValueError: Damaged, or edited.
    """
    if path.is_file() and (wanted := _digest_of(path)) is not None:
        _check_digest(path, file_hash(path), wanted)
    return path


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a .csv file, none where there is none.

    Args:
        path: The file; that of a run is compared with what the run wrote, see :func:`check_run_file`. A row more, which
            a process was killed behind, is left out.

    Raises:
        ValueError: Damaged, or edited.
    """
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table of comma-separated values: {error}.") from error
    if (wanted := _digest_of(path)) is not None:
        rows = rows[: wanted[0]]
        _check_digest(path, _table_digest(rows), wanted)
    return rows


def find_weights(path: str | Path) -> Path:
    """Resolve a checkpoint file, or the weights in a folder: ``model.safetensors``, else ``last.safetensors``."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return check_file(path)
    for name in (WEIGHTS_NAME, "model_best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    names = sorted(file.name for file in path.iterdir())
    if parts := [name for name in names if name.endswith(".safetensors.index.json") or "-of-0" in name]:
        raise FileNotFoundError(
            f"No {WEIGHTS_NAME} in {path}, only weights in several parts ({parts[0]}, ...), which are not read: load "
            "the parts with safetensors, join their dictionaries, and save them as one file."
        )
    if pickles := [name for name in names if Path(name).suffix.lower() in PICKLES]:
        raise FileNotFoundError(
            f"No {WEIGHTS_NAME} in {path}, only {', '.join(pickles)}: a pickle can run code, so it is read (as "
            f"weights only) when you name it: {path / pickles[0]}."
        )
    raise FileNotFoundError(f"No {WEIGHTS_NAME} in {path}. Give a .safetensors file or a folder that train.py wrote.")


def hint(path: Path, otherwise: str) -> str:
    """What an unreadable file is instead of a checkpoint, and what to do."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "It is a Git LFS pointer, not the weights: fetch the real file with 'git lfs pull'."
    if head[:1] == b"<":
        return "It is a web page, not weights: the download went wrong."
    if head.startswith((b"PK\x03\x04", b"\x80\x02")) and path.suffix.lower() not in PICKLES:
        return f"It is a pickle: give it the name {path.stem}.pth to have it read, as weights only."
    if head[8:9] == b"{" and path.suffix.lower() in PICKLES:
        return f"It is no pickle but a safetensors file: give it the name {path.stem}.safetensors."
    return f"{otherwise}: fetch or write it again."


def check_file(path: Path) -> Path:
    """Return ``path`` where a checkpoint's file may be there.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The name of a file that holds no weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}. Give a .safetensors file or a folder that holds one.")
    if path.name == CONFIG_NAME:
        raise ValueError(f"{path} describes a checkpoint and holds no weights: give its folder, {path.parent}.")
    if path.name.endswith(".safetensors.index.json"):
        raise ValueError(
            f"{path} lists weights in several parts, which are not read: load the parts with safetensors, join their "
            "dictionaries, and save them as one file."
        )
    return path


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, which reads its header and checks its length, but no tensor yet.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Truncated, or another kind of file.
    """
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        told = hint(path, "It is truncated or not a safetensors file")
        raise ValueError(f"Cannot read {path} ({path.stat().st_size:,} bytes). {told} ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: No room or no permission.
    """
    try:
        save_file(dict(tensors), path, {"format": "pt", **metadata})
    except SafetensorError as error:  # its own kind for what the system said
        raise OSError(f"Cannot write {path}: {error}. Is there room on the disk?") from error
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Order the metadata of a safetensors file, which its writer leaves to chance: equal content, equal bytes."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # always, unless the writer escapes differently; then its order stays
            file.seek(8)
            file.write(text.ljust(length))
