"""Checkpoints: safetensors files written atomically, read with checks, loaded strictly or not at all.

A checkpoint is a folder of ``model.safetensors`` (see :mod:`spikezoo.sparse` for the code of its tensors) and
``config.json``, which says how to make the model, what was measured, and the sha256 of the weights and of itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from spikezoo import sparse
from spikezoo.checks import nearest

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "atomic",
    "check_nan",
    "copy_checkpoint",
    "file_hash",
    "find_weights",
    "load_sparse_file",
    "load_state",
    "load_weights",
    "read_config",
    "read_weights",
    "save_state",
    "write_checkpoint",
]

_logger = logging.getLogger("spikezoo")

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
CONFIG_VERSION = 1
# What config.json may name as the code of the tensors: a name from a file never decides what code runs.
FORMATS = ("dense", "spikezoo-sparse")
STATE_VERSION = "spikezoo-state/1"


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name when the block ends well, and vanishes otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # two savers never share it
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
        try:
            entries = json.loads(metadata["tree"])["dict"]
            return {key: _unpack(item, file.get_tensor) for key, item in entries if not keys or key in keys}
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: its tree of entries cannot be read ({error!r}).") from error


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
    if head.startswith((b"PK\x03\x04", b"\x80\x02")) and path.suffix.lower() not in _PICKLES:
        return f"It is a pickle: give it the name {path.stem}.pth to have it read, as weights only."
    if head[8:9] == b"{" and path.suffix.lower() in _PICKLES:
        return f"It is no pickle but a safetensors file: give it the name {path.stem}.safetensors."
    return f"{otherwise}: fetch or write it again."


def _check_file(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}. Give a .safetensors file or a folder that holds one.")
    if path.name == CONFIG_NAME:
        raise ValueError(f"{path} describes a checkpoint and holds no weights: give its folder, {path.parent}.")
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


def _read_pickle(path: Path) -> dict[str, Tensor]:
    _check_file(path)
    try:
        # timm's saver puts the command line's arguments beside the weights: plain values in a Namespace, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise anything
        hint = _hint(path, "It is truncated, or a pickle of more than weights, which could run code")
        first = str(error).partition("\n")[0].partition(". ")[0]  # the rest advises to run whatever the file says
        raise ValueError(f"Cannot read {path} ({path.stat().st_size:,} bytes). {hint} ({first})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no state dict: expected names and tensors.")
    return {str(k).removeprefix("module."): v for k, v in content.items()}


def _check_hash(path: Path, ours: bool) -> None:
    """Compare a weights file with the hash in the config.json beside it, which files of ours must have."""
    if not (path.parent / CONFIG_NAME).is_file():
        return
    hashes = _hashes(read_config(path.parent))
    if path.name not in hashes:
        if ours and path.name == WEIGHTS_NAME:
            raise ValueError(
                f"{path.parent / CONFIG_NAME} does not hold the sha256 of {path.name}, which spikezoo wrote there: it "
                "is damaged or of another checkpoint. Fetch both again, or move the weights to a folder of their own."
            )
        return
    if (found := file_hash(path)) != hashes[path.name]:
        raise ValueError(
            f"{path} is damaged: its sha256 is {found[:16]}... and {CONFIG_NAME} says {hashes[path.name][:16]}... "
            + _hint(path, "Nothing was loaded")
        )


def load_sparse_file(path: str | Path) -> dict[str, Tensor]:
    """Read a weights file, sparse or dense, into a state dict.

    Args:
        path: A safetensors file, or a folder that holds one. Where config.json lies beside it, its hash is checked.

    Returns:
        Names and dense tensors, bit for bit as they were stored.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Damaged in any bit, truncated, of an unknown version, or no safetensors file.

    Example:
        >>> state = spikezoo.load_sparse_file('output/quickstart/model.safetensors')
    """
    path = find_weights(path)
    with _open(path) as file:
        metadata = file.metadata() or {}
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # A damaged header may have lost our mark: tensors named as the sparse code names them are not read as they are.
    ours = sparse.METADATA_KEY in metadata
    _check_hash(path, ours)
    if not ours:
        marks = (".bitmask", ".compressed", ".levels")
        if found := next((mark for mark in marks if any(name.endswith(mark) for name in stored)), None):
            raise ValueError(
                f"{path} holds sparse tensors (*{found}) and its metadata do not name spikezoo's code: it is damaged, "
                "or another library wrote it."
            )
        return stored
    try:
        return sparse.decode(stored, metadata)
    except ValueError as error:
        raise ValueError(f"Cannot read {path}. {error} Fetch or write it again.") from error


def find_weights(path: str | Path) -> Path:
    """Resolve a checkpoint file, or the weights in a folder: ``model.safetensors``, else ``last.safetensors``."""
    path = Path(path)
    if not path.is_dir():
        return _check_file(path)
    for name in (WEIGHTS_NAME, "model_best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix.lower() in _PICKLES):
        raise FileNotFoundError(
            f"No {WEIGHTS_NAME} in {path}, only {', '.join(pickles)}: a pickle can run code, so it is read (as "
            f"weights only) when you name it: {path / pickles[0]}."
        )
    raise FileNotFoundError(f"No {WEIGHTS_NAME} in {path}. Give a .safetensors file or a folder that train.py wrote.")


_PICKLES = (".pth", ".pt", ".tar", ".bin", ".ckpt")


def read_weights(path: str | Path, ema: bool = False) -> dict[str, Tensor]:
    """Read a state dict from weights, sparse or dense, or from a training state.

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
        return _read_pickle(path) if path.suffix.lower() in _PICKLES else load_sparse_file(path)
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


def check_nan(state: Mapping[str, Tensor], what: str) -> None:
    """Raise where a weight is not a number: a neuron turns it into silence, so nobody would notice."""
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.isnan().any()]
    if bad:
        raise ValueError(f"{what} holds values that are not numbers (NaN). {_names('In', sorted(bad))}")


def _adapt(weights: dict[str, Tensor], own: Mapping[str, Tensor], model: nn.Module, changed: Collection[str]) -> None:
    """Fit the head and the first convolution of weights to a model with other classes or channels, in place."""
    cfg: Any = model.pretrained_cfg
    head, stem = f"{cfg['classifier']}.", f"{cfg['first_conv']}.weight"
    said = []
    if "num_classes" in changed:
        names = {name for name in own.keys() | weights.keys() if name.startswith(head)}
        if any(name not in own or name not in weights or own[name].shape != weights[name].shape for name in names):
            # All of it or nothing: a bias that happens to fit belongs to classes that are gone.
            for name in names:
                weights.pop(name, None)
            weights |= {name: own[name] for name in names & own.keys()}
            said.append(f"the classifier ({', '.join(sorted(names))}) starts afresh with {model.num_classes} classes")
    both = stem in own and stem in weights and own[stem].dim() == 4  # of a linear layer nothing can be repeated
    if "in_chans" in changed and both and own[stem].shape != weights[stem].shape:
        weights[stem] = adapt_input_conv(own[stem].shape[1], weights[stem])
        said.append(f"{stem} was fitted to {own[stem].shape[1]} channels by summing or repeating its own")
    if said:
        _logger.warning("Loading weights into %s: %s.", type(model).__name__, "; ".join(said))


def load_weights(
    model: nn.Module,
    path: str | Path,
    ema: bool = False,
    *,
    weights: dict[str, Tensor] | None = None,
    changed: Collection[str] = (),
    filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
) -> None:
    """Load weights strictly; where anything differs nothing is loaded.

    Args:
        model: The model.
        path: A file or a folder.
        ema: Take the averaged weights of a training state.
        weights: What :func:`read_weights` read there already.
        changed: Of 'num_classes' and 'in_chans', what may differ from the checkpoint: the classifier is then left
            as initialised, the first convolution fitted as timm does, and a warning says so.
        filter_fn: Translates the names of foreign weights.

    Raises:
        FileNotFoundError: No such checkpoint.
        ValueError: Damaged, foreign, or NaN; names and counts of what differs.
    """
    weights, own = read_weights(path, ema) if weights is None else weights, model.state_dict()
    check_nan(weights, f"Checkpoint {path}")
    if filter_fn is not None and weights.keys() != own.keys():
        weights = filter_fn(weights, model)
    if changed:
        _adapt(weights, own, model, changed)
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
            + "Create the model that the checkpoint was written for (same name, num_classes, in_chans, mpbn, neuron, "
            "and the same transforms)."
        )
    model.load_state_dict(weights)


# --------------------------------------------------------------------------------------------------- config


def _hashes(config: Mapping[str, Any]) -> dict[str, str]:
    block = config.get("spikezoo")
    found = block.get("sha256") if isinstance(block, Mapping) else None
    return {name: str(value) for name, value in found.items()} if isinstance(found, Mapping) else {}


def _check_types(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Raise where a config says how to make the model in another form than an object of arguments and a recipe."""
    if not isinstance(arguments := config.get("model_args", {}), dict):
        raise ValueError(f"{path}: model_args is {arguments!r}. Expected an object such as {{'T': 4}}.")
    block = config.get("spikezoo", {})
    recipe = block.get("recipe", []) if isinstance(block, dict) else block
    if not isinstance(recipe, list) or not all(
        isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], dict)
        for entry in recipe
    ):
        raise ValueError(f"{path}: recipe is {recipe!r}. Expected pairs such as ['fold_bn', {{}}].")
    return config


def _config_hash(config: Mapping[str, Any]) -> str:
    """The sha256 of a config's content, without the entry that holds it."""
    block = {**config["spikezoo"], "sha256": {k: v for k, v in _hashes(config).items() if k != CONFIG_NAME}}
    return hashlib.sha256(json.dumps({**config, "spikezoo": block}, sort_keys=True).encode()).hexdigest()


def read_config(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself: architecture, model_args, recipe and results.

    Args:
        path: A folder with config.json, a weights file beside one, or a training state, which holds it itself.

    Returns:
        The config, {} where there is none.

    Raises:
        ValueError: Damaged, edited without its hash, or of an unknown version or format.
    """
    path = Path(path)
    if not (path / CONFIG_NAME).is_file():
        path = find_weights(path)
        if _is_state(path):
            return _check_types(load_state(path, "architecture", "model_args", "spikezoo"), path)
    beside = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if not beside.is_file():
        return {}
    try:
        config = json.loads(beside.read_text())
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers or nesting beyond measure
        raise ValueError(f"{beside} is not valid JSON: {error}. {_hint(beside, 'It is damaged')}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{beside} holds a {type(config).__name__}: expected an object with architecture and model_args."
        )
    stored = config.get("sparsity_config", {})
    form = stored.get("format", "dense") if isinstance(stored, dict) else stored
    if form not in FORMATS:
        raise ValueError(
            f"{beside}: sparsity_config.format is {form!r}. {nearest(form, FORMATS)} Nothing was loaded; update "
            "spikezoo if the format is newer than this version."
        )
    if "spikezoo" not in config:
        if "sparsity_config" in config:  # only ever written together; without the block nothing vouches for the rest
            raise ValueError(f"{beside} has lost its 'spikezoo' block. {_hint(beside, 'It is damaged')}")
        return _check_types(config, beside)
    block = config["spikezoo"]
    version = block.get("version", 0) if isinstance(block, dict) else None
    if version not in (0, CONFIG_VERSION):  # 0: written before the config had versions, and hashes
        raise ValueError(f"{beside} has format version {version!r}; this spikezoo reads {CONFIG_VERSION}. Update it.")
    if (version or "sha256" in block) and _hashes(config).get(CONFIG_NAME) != _config_hash(config):
        raise ValueError(
            f"{beside} is not as it was written: it was damaged, or edited by hand. Fetch it again; to change how a "
            "model is made, load it, give other arguments, and spikezoo.save_checkpoint it."
        )
    return _check_types(config, beside)


def write_checkpoint(
    folder: str | Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    sparse_code: bool = True,
    seeds: Mapping[str, int] | None = None,
) -> Path:
    """Write weights and config.json with their hashes: both whole, or neither.

    Args:
        folder: Where to.
        state: Names and tensors.
        config: architecture, model_args and a ``spikezoo`` block; hashes and format are added.
        sparse_code: Store every tensor in its smallest code; otherwise dense, which any reader reads.
        seeds: Seeds of the signs of tickets.

    Returns:
        The weights file.
    """
    folder = Path(folder)
    stored, metadata = sparse.encode(state, sparse=sparse_code, seeds=seeds)
    coded = json.loads(metadata[sparse.METADATA_KEY])["tensors"]
    total = sum(tensor.numel() for tensor in state.values())
    zeros = sum(int((tensor == 0).sum()) for tensor in state.values())
    form = {
        "format": "spikezoo-sparse" if coded else "dense",
        "global_sparsity": round(zeros / max(total, 1), 6),
    }
    with atomic(folder / CONFIG_NAME) as config_file, atomic(folder / WEIGHTS_NAME) as weights_file:
        save_file(stored, weights_file, {"format": "pt", **metadata})
        _sort_metadata(weights_file)
        _write_config(config_file, {**config, "sparsity_config": form}, weights_file)
    return folder / WEIGHTS_NAME


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


def _write_config(path: Path, config: Mapping[str, Any], weights: Path) -> None:
    """Write a config with its version, the hash of the weights, and its own."""
    block = {**config["spikezoo"], "version": CONFIG_VERSION, "sha256": {WEIGHTS_NAME: file_hash(weights)}}
    whole = json.loads(json.dumps({**config, "spikezoo": block}))  # tuples become lists, as the reader will see them
    whole["spikezoo"]["sha256"][CONFIG_NAME] = _config_hash(whole)
    path.write_text(json.dumps(whole, indent=2) + "\n")


def copy_checkpoint(source: str | Path, folder: str | Path, results: Mapping[str, Any] | None = None) -> None:
    """Copy weights as they are, and config.json with other results where they are given.

    Args:
        source: Folder of a checkpoint that :func:`write_checkpoint` wrote.
        folder: Where to.
        results: New measurements of these very weights.

    Raises:
        ValueError: A damaged source.
    """
    source, folder = Path(source), Path(folder)
    config = read_config(source)
    load_sparse_file(source / WEIGHTS_NAME)  # every check there is
    if results is not None:
        config["spikezoo"] |= {key: results.get(key) for key in ("dataset", "split")} | {"results": dict(results)}
    with atomic(folder / CONFIG_NAME) as config_file, atomic(folder / WEIGHTS_NAME) as weights_file:
        shutil.copyfile(source / WEIGHTS_NAME, weights_file)
        _write_config(config_file, config, weights_file)
