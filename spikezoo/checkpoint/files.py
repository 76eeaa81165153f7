"""Files: atomic writes, hashes, finding the weights in a folder, opening a safetensors file, what a wrong one is."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["CONFIG_NAME", "PICKLES", "WEIGHTS_NAME", "atomic", "check_file", "file_hash", "find_weights", "hint"]
__all__ += ["open_tensors", "write_tensors"]

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
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


def file_hash(path: str | Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
