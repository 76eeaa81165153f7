"""The state of a training: nested tensors and plain data in one safetensors file, with a digest of all its bits."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from torch import Tensor

from spikezoo.checkpoint.files import atomic, open_tensors, write_tensors

__all__ = ["is_state", "load_state", "save_state"]

# Files of the version before hold no digest of themselves and are read without it.
STATE_VERSION, PLAIN_VERSION = "spikezoo-state/2", "spikezoo-state/1"
_KEY = "spikezoo.state"
_NO_DIGEST = "0" * 64


def _pack(value: object, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace the tensors of a nested structure by references, so that the rest is JSON."""
    if isinstance(value, Tensor):
        while path in tensors:  # the keys 1 and "1", or "a.b" and a's "b", have the same path
            path += "'"
        # Shared or non-contiguous tensors are not storable; a state has few of them and copies are fine.
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, Mapping):
        # JSON keys are strings; optimiser states have integer keys, so items are kept as pairs.
        if bad := [key for key in value if not isinstance(key, str | int | float | None)]:
            raise TypeError(f"Cannot store {path}: its key {bad[0]!r} is no string or number.")
        return {"dict": [[key, _pack(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"Cannot store {path}, a {type(value).__name__}: only tensors, numbers, strings, lists and dicts.")


def _unpack(node: dict[str, Any], tensor: Callable[[str], Tensor]) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "dict":
        return {key: _unpack(item, tensor) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_unpack(item, tensor) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content


def _header(file: BinaryIO) -> bytes:
    """The first bytes of a safetensors file: the header's length, and the header."""
    length = int.from_bytes(file.read(8), "little")
    file.seek(0)
    return file.read(8 + length)


def _digest(path: Path, stored: str) -> str:
    """The sha256 of a file, header and all, with zeros in the place of the one that it holds."""
    with open(path, "rb") as file:
        found = hashlib.sha256(_header(file).replace(stored.encode(), _NO_DIGEST.encode(), 1))
        while piece := file.read(2**20):
            found.update(piece)
    return found.hexdigest()


def save_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a nested structure of tensors and plain data as one safetensors file, under a temporary name first.

    Args:
        path: File to write.
        state: Dicts, lists and tuples of tensors, numbers and strings.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "state", tensors)
    place = secrets.token_hex(len(_NO_DIGEST) // 2)  # of the digest, and nowhere else in the file
    metadata = {_KEY: STATE_VERSION, "tree": json.dumps(tree), "sha256": place}
    with atomic(path) as temporary:
        write_tensors(temporary, tensors, metadata)
        digest = _digest(temporary, place)
        with open(temporary, "r+b") as file:
            file.seek(_header(file).index(place.encode()))
            file.write(digest.encode())


def load_state(path: str | Path, *keys: str) -> dict[str, Any]:
    """Read what :func:`save_state` wrote.

    Args:
        path: File to read.
        *keys: Only these entries; none means all.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Damaged in any bit, truncated, or not a training state.
    """
    path = Path(path)
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
        version = metadata.get(_KEY)
        if version not in (STATE_VERSION, PLAIN_VERSION):
            raise ValueError(
                f"{path} is not a training state of this version ({STATE_VERSION}; found "
                f"{metadata.get(_KEY, 'none')}). Start from its weights with --initial-checkpoint instead."
            )
        stored = metadata.get("sha256")
        if (version == STATE_VERSION or stored) and not (stored and _digest(path, stored) == stored):
            raise ValueError(
                f"{path} is damaged: its content is not what was written, the sha256 differs. Go on from another state "
                "of the run, or start from other weights with --initial-checkpoint."
            )
        try:
            entries = json.loads(metadata["tree"])["dict"]
            return {key: _unpack(item, file.get_tensor) for key, item in entries if not keys or key in keys}
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: its tree of entries cannot be read ({error!r}).") from error


def is_state(path: Path) -> bool:
    """Whether a file is a training state, of any version or damaged in its mark."""
    if path.suffix != ".safetensors":
        return False
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
        return _KEY in metadata or "tree" in metadata
