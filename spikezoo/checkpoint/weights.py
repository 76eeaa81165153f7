"""Weights: read from sparse, dense, pickled and training files, loaded strictly or not at all, and written."""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from spikezoo.checkpoint import sparse
from spikezoo.checkpoint.config import Config, read_config, write_config
from spikezoo.checkpoint.files import (
    CONFIG_NAME,
    PICKLES,
    WEIGHTS_NAME,
    atomic,
    check_file,
    file_hash,
    find_weights,
    hint,
    open_tensors,
    write_tensors,
)
from spikezoo.checkpoint.state import is_state, load_state

__all__ = ["check_nan", "copy_checkpoint", "load_sparse_file", "load_weights", "read_weights", "stored_numbers"]
__all__ += ["write_checkpoint"]

_logger = logging.getLogger("spikezoo")

# Where trainers put the weights among other things, and the averaged ones.
_WEIGHTS = ("state_dict", "model", "model_state_dict", "net", "network", "weights", "params")
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema")
# What torch's wrappers (DistributedDataParallel, torch.compile, AveragedModel) put before every name.
_WRAPPERS = ("module.", "_orig_mod.")


def _unwrap(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names without what wrappers put before all of them, in whatever order."""
    found = {str(name): tensor for name, tensor in weights.items()}
    while prefix := next((p for p in _WRAPPERS if found and all(name.startswith(p) for name in found)), ""):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _is_weights(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _read_pickle(path: Path, ema: bool) -> dict[str, Tensor]:
    check_file(path)
    try:
        # timm's saver puts the command line's arguments beside the weights: plain values in a Namespace, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise anything
        told = hint(path, "It is truncated, or a pickle of more than weights, which could run code")
        first = str(error).partition("\n")[0].partition(". ")[0]  # the rest advises to run whatever the file says
        raise ValueError(f"Cannot read {path} ({path.stat().st_size:,} bytes). {told} ({first})") from error
    keys = list(map(str, content)) if isinstance(content, Mapping) else []
    if not ema and _is_weights(content):
        return dict(content)
    wanted = _AVERAGED if ema else _WEIGHTS
    for key in wanted:
        if key in keys and _is_weights(content[key]):
            weights: dict[str, Tensor] = content[key]
            return weights
    have = f"It holds {', '.join(keys[:10])}{', ...' if len(keys) > 10 else ''}." if keys else ""
    what = "averaged weights" if ema else "state dict"
    raise ValueError(
        f"{path} holds no {what}: expected names and tensors{' ' if ema else ', or them '}under one of "
        f"{', '.join(wanted)}. {have}".rstrip()
    )


def _check_hash(path: Path, ours: bool) -> None:
    """Compare a weights file with the hash in the config.json beside it, which files of ours must have."""
    if not (path.parent / CONFIG_NAME).is_file():
        return
    hashes = Config.read(path.parent).sha256
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
            + hint(path, "Nothing was loaded")
        )


def load_sparse_file(path: str | Path, *, most: int | None = None) -> dict[str, Tensor]:
    """Read a weights file, sparse or dense, into a state dict.

    Args:
        path: A safetensors file, or a folder that holds one. Where config.json lies beside it, its hash is checked.
        most: How many numbers it may hold once decoded; None allows what its size makes plausible.

    Returns:
        Names and dense tensors, bit for bit as they were stored.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Damaged in any bit, truncated, of an unknown version, no safetensors file, or more numbers than
            ``most``.

    Examples:
        >>> state = spikezoo.load_sparse_file('output/quickstart/model.safetensors')
    """
    path = find_weights(path)
    if is_state(path):
        raise ValueError(f"{path} is the state of a training, not weights alone: spikezoo.checkpoint.read_weights.")
    with open_tensors(path) as file:
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
        return sparse.decode(stored, metadata, most=most)
    except ValueError as error:
        raise ValueError(f"Cannot read {path}. {error} Fetch or write it again.") from error


def stored_numbers(path: str | Path) -> int | None:
    """How many numbers a checkpoint says that it holds, without decoding them; None of a pickle."""
    path = find_weights(path)
    if path.suffix.lower() in PICKLES:
        return None
    with open_tensors(path) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        coded = [file.get_tensor(name) for name in shapes if name.endswith(".shape")]
    return sum(map(math.prod, shapes.values())) + sum(math.prod(shape.tolist()) for shape in coded)


def read_weights(path: str | Path, ema: bool = False, *, most: int | None = None) -> dict[str, Tensor]:
    """Read a state dict from weights, sparse or dense, or from a training state.

    Args:
        path: A file or a folder.
        ema: Take the averaged weights of a training state, or of a pickle that holds both.
        most: See :func:`load_sparse_file`.
    """
    path = find_weights(path)
    if path.suffix.lower() in PICKLES:
        return _unwrap(_read_pickle(path, ema))
    if not is_state(path):
        if ema:
            raise ValueError(
                f"{path} holds one set of weights, not a training state: give last.safetensors, or leave --use-ema out."
            )
        return _unwrap(load_sparse_file(path, most=most))
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
    cfg = getattr(model, "pretrained_cfg", {})
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
        weights[stem] = adapt_input_conv(own[stem].shape[1], weights[stem], weights[stem].shape[1])
        said.append(f"{stem} was fitted to {own[stem].shape[1]} channels by summing or repeating its own")
    if said:
        _logger.warning("Loading weights into %s: %s.", type(model).__name__, "; ".join(said))


def load_weights(
    model: nn.Module,
    path: str | Path,
    ema: bool = False,
    *,
    fresh: Mapping[str, Tensor] | None = None,
    changed: Collection[str] = (),
    filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
) -> None:
    """Load weights strictly; where anything differs nothing is loaded.

    Args:
        model: The model.
        path: A file or a folder.
        ema: Take the averaged weights of a training state.
        fresh: What the model keeps of its own where the checkpoint lacks it.
        changed: Of 'num_classes' and 'in_chans', what may differ from the checkpoint: the classifier is then left
            as initialised, the first convolution fitted as timm does, and a warning says so.
        filter_fn: Translates the names of foreign weights.

    Raises:
        FileNotFoundError: No such checkpoint.
        ValueError: Damaged, foreign, or NaN; names and counts of what differs.
    """
    own = model.state_dict()
    # With other classes or channels the checkpoint's head and stem may be larger than the model's.
    most = 2 * sum(tensor.numel() for tensor in own.values()) + 2**24
    weights = {**(fresh or {}), **read_weights(path, ema, most=most)}
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
            + "Create the model that the checkpoint was written for (same name, num_classes, in_chans, img_size, which "
            "is --img-size, mpbn, neuron, and the same transforms)."
        )
    check_nan(weights, f"Checkpoint {path}")
    model.load_state_dict(weights)


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
        write_tensors(weights_file, stored, metadata)
        write_config(config_file, {**config, "sparsity_config": form}, weights_file)
    return folder / WEIGHTS_NAME


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
        write_config(config_file, config, weights_file)
