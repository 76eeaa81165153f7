"""Checkpoints: safetensors files written atomically, read with checks, loaded strictly or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = [
    "atomic",
    "file_hash",
    "find_weights",
    "load_state",
    "load_weights",
    "read_config",
    "read_weights",
    "save_state",
]

WEIGHTS_NAME = "model.safetensors"
STATE_VERSION = "spikezoo-state/1"


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name when the block ends well, and vanishes otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors writes files that only their owner may read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: str | Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------- training state


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
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


def save_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a nested structure of tensors and plain data as one safetensors file, under a temporary name first.

    Args:
        path: File to write.
        state: Dicts, lists and tuples of tensors, numbers and strings.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "state", tensors)
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", "spikezoo.state": STATE_VERSION, "tree": json.dumps(tree)})


def load_state(path: str | Path, *keys: str) -> dict[str, Any]:
    """Read what :func:`save_state` wrote.

    Args:
        path: File to read.
        *keys: Only these entries, so that a question about a state does not read its tensors; none means all.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Truncated, or not a training state.
    """
    with _open(Path(path)) as file:
        metadata = file.metadata() or {}
        if metadata.get("spikezoo.state") != STATE_VERSION:
            raise ValueError(
                f"{path} is not a training state of this version ({STATE_VERSION}; found "
                f"{metadata.get('spikezoo.state', 'none')}). Start from its weights with --initial-checkpoint instead."
            )
        entries = json.loads(metadata["tree"])["dict"]
        return {key: _unpack(item, file.get_tensor) for key, item in entries if not keys or key in keys}


def _is_state(path: Path) -> bool:
    """Whether a file is a training state, of any version."""
    if path.suffix != ".safetensors":
        return False
    with _open(path) as file:
        return "spikezoo.state" in (file.metadata() or {})


# -------------------------------------------------------------------------------------------------- weights


def _hint(path: Path, otherwise: str) -> str:
    with open(path, "rb") as file:
        head = file.read(64).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "It is a Git LFS pointer, not the weights: fetch the real file with 'git lfs pull'."
    if head[:1] == b"<":
        return "It is a web page, not weights: the download went wrong."
    return f"{otherwise}: fetch or write it again."


def _check_file(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}. Give a .safetensors file or a folder that holds one.")
    return path


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a safetensors file, which reads its header and checks its length, but no tensor yet."""
    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        hint = _hint(path, "It is truncated or not a safetensors file")
        raise ValueError(f"Cannot read {path} ({path.stat().st_size:,} bytes). {hint} ({error})") from error


def _read(path: Path) -> dict[str, Tensor]:
    _check_file(path)
    if path.suffix in (".pth", ".pt", ".tar", ".bin", ".ckpt"):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged pickles raise anything
            hint = _hint(path, "It is truncated, or a pickle of more than weights, which could run code")
            raise ValueError(f"Cannot read {path} ({path.stat().st_size:,} bytes). {hint} ({error})") from error
        for key in ("state_dict", "model"):
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
        if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
            raise ValueError(f"{path} holds no state dict: expected names and tensors.")
        return {str(k).removeprefix("module."): v for k, v in content.items()}
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def find_weights(path: str | Path) -> Path:
    """Resolve a checkpoint file, or the weights in a folder: ``model.safetensors``, else ``last.safetensors``."""
    path = Path(path)
    if not path.is_dir():
        return _check_file(path)
    for name in (WEIGHTS_NAME, "model_best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"No {WEIGHTS_NAME} in {path}. Give a .safetensors file or a folder that train.py wrote.")


def read_config(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself: architecture, model_args and results.

    Args:
        path: A folder with config.json, a weights file beside one, or a training state, which holds it itself.

    Returns:
        The config, {} where there is none.
    """
    path = find_weights(path)
    if _is_state(path):
        return load_state(path, "architecture", "model_args", "spikezoo")
    beside = path.parent / "config.json"
    if not beside.is_file():
        return {}
    try:
        config = json.loads(beside.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{beside} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{beside} holds a {type(config).__name__}: expected an object with architecture and model_args."
        )
    return config


def read_weights(path: str | Path, ema: bool = False) -> dict[str, Tensor]:
    """Read a state dict from weights or from a training state.

    Args:
        path: A file or a folder.
        ema: Take the averaged weights of a training state.
    """
    path = find_weights(path)
    if not _is_state(path):
        if ema:
            raise ValueError(
                f"{path} holds one set of weights, not a training state: give last.safetensors, or leave --use-ema out."
            )
        return _read(path)
    key = "ema" if ema else "model"
    weights = load_state(path, key).get(key)
    if weights is None:
        raise ValueError(
            f"{path} holds no {'averaged weights: the run did not use --model-ema' if ema else 'weights'}."
        )
    return dict(weights)


def _names(title: str, names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
    return f"{title}: {shown}. " if names else ""


def load_weights(model: nn.Module, path: str | Path, ema: bool = False) -> None:
    """Load weights strictly; where anything differs nothing is loaded.

    Args:
        model: The model.
        path: A file or a folder.
        ema: Take the averaged weights of a training state.

    Raises:
        FileNotFoundError: No such checkpoint.
        ValueError: Truncated or foreign; names and counts of what differs.
    """
    weights, own = read_weights(path, ema), model.state_dict()
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"Checkpoint {path} does not fit {type(model).__name__}, nothing was loaded: {len(missing)} missing, "
            f"{len(unexpected)} unexpected, {len(shapes)} of another shape, {len(own)} wanted. "
            + _names("Missing", missing)
            + _names("Unexpected", unexpected)
            + _names("Shapes", shapes)
            + "Create the model that the checkpoint was written for (same name, num_classes, in_chans, mpbn, neuron)."
        )
    model.load_state_dict(weights)
