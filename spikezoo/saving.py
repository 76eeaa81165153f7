"""Save a model as a folder that rebuilds it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from spikezoo._version import __version__
from spikezoo.checkpoint import CONFIG_NAME, WEIGHTS_NAME, check_nan, known_facts, write_checkpoint
from spikezoo.checkpoint.sparse import round_to_levels
from spikezoo.factory import FACTORY_ARGUMENTS, create_model
from spikezoo.models._base import SpikingModel
from spikezoo.transforms import replay

__all__ = ["FIGURES", "describe", "plain_results", "save_checkpoint"]

# Of a results row: key, how the card calls it, how it is written.
FIGURES = (
    ("top1", "Test accuracy, top-1", "{:.2f} %"),
    ("top5", "Test accuracy, top-5", "{:.2f} %"),
    ("samples", "Test images", "{:,}"),
    ("split_note", "Split, its recordings and their hash", "{}"),
    ("frames_by", "Frames of a recording by", "{}"),
    ("duration_us", "Length of a frame", "{:,} us"),
    ("firing_rate", "Spikes per neuron and time step", "{:.4f}"),
    ("macs_step", "Dense MACs of one time step", "{:,.0f}"),
    ("macs", "Dense MACs of one image", "{:,.0f}"),
    ("sops_exact", "Synaptic operations of one image, counted", "{:,.0f}"),
    ("sops_paper", "Synaptic operations, firing rate x T x MACs", "{:,.0f}"),
    ("energy_exact_mj", "Energy of one image, counted", "{:.4g} mJ"),
    ("energy_paper_mj", "Energy of one image, the papers' convention", "{:.4g} mJ"),
    ("energy_ann_mj", "Energy of the ANN of the same layout", "{:.4g} mJ"),
    ("mac_pj", "Constant: energy of a MAC", "{} pJ"),
    ("sop_pj", "Constant: energy of a synaptic operation", "{} pJ"),
    ("count_images", "Images that were counted", "{:,}"),
    ("precision", "Precision of the measurement", "{}"),
    ("command", "Command", "`{}`"),
    ("train_command", "Training command", "`{}`"),
    ("epochs", "Epochs of training", "{:,}"),
    ("train_minutes", "Minutes of training", "{:,.1f}"),
    ("train_precision", "Precision of the training", "{}"),
    ("train_commit", "Commit of the training", "{}"),
    ("train_machine", "Machine of the training", "{}"),
    ("train_date", "Date of the training", "{}"),
    ("seed", "Seed", "{}"),
    ("commit", "Commit", "{}"),
    ("machine", "Machine", "{}"),
    ("date", "Date", "{}"),
)


def describe(model: nn.Module) -> dict[str, Any]:
    """What rebuilds a model: its architecture, arguments and transforms, as plain data.

    Args:
        model: A model of :func:`spikezoo.create_model`, transformed or not.

    Returns:
        ``architecture``, ``model_args`` and ``recipe``.

    Raises:
        ValueError: A model that was not made by name, or with arguments that are no plain data.
    """
    # The wrappers of torch.compile and timm pass every attribute on.
    if not isinstance(model, SpikingModel) or not model.pretrained_cfg.get("architecture"):
        raise ValueError(
            f"This {type(model).__name__} was not made by spikezoo.create_model, so its name is unknown and nothing "
            "could rebuild it. Save the model itself, not a wrapper of it (DistributedDataParallel, torch.compile, "
            "features_only)."
        )
    architecture, size, pool = model.pretrained_cfg["architecture"], model.img_size, model.head.global_pool.pool_type
    made = {key: value for key, value in getattr(model, "_model_args", {}).items() if key not in FACTORY_ARGUMENTS}
    arguments = {
        **made,
        **({"global_pool": pool} if pool != made.get("global_pool", "avg") else {}),  # reset_classifier sets it, too
        "num_classes": model.num_classes,
        "in_chans": model.in_chans,
        "img_size": size[0] if size[0] == size[1] else list(size),
        "T": model.T,
    }
    try:
        plain: dict[str, Any] = json.loads(json.dumps({"model_args": arguments, "recipe": model.recipe}))
    except TypeError as error:
        raise ValueError(f"The arguments of this {architecture} are no plain data ({error}): {arguments}.") from error
    return {"architecture": architecture, **plain}


def _check_rebuilds(model: nn.Module, facts: Mapping[str, Any]) -> None:
    """Raise where name, arguments and recipe do not give a model that takes this one's weights."""
    with torch.random.fork_rng(devices=[]):  # nobody's next random number depends on having saved
        fresh = replay(create_model(facts["architecture"], **facts["model_args"]), facts["recipe"])
    for what, facts_of in (("tensors", _shapes), ("modules", _settings)):
        ours, theirs = facts_of(model), facts_of(fresh)
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if different:
            first = different[0]
            raise ValueError(
                f"This {facts['architecture']} cannot be rebuilt from its arguments {facts['model_args']} and recipe "
                f"{facts['recipe']}: {len(different)} {what} differ, the first {first!r}: {ours.get(first)} instead of "
                f"{theirs.get(first)}. Modules were changed by hand; change models with create_model's arguments and "
                "spikezoo.transforms."
            )


def _shapes(model: nn.Module) -> dict[str, Any]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _settings(model: nn.Module) -> dict[str, Any]:
    """What modules say of themselves, without what matters in training only."""
    return {
        name: re.sub(r"momentum=[^,]*", "", module.extra_repr())
        for name, module in model.named_modules()
        if "Drop" not in type(module).__name__
    }


def _plain(value: object, path: str = "results") -> Any:
    """A result as JSON has it: scalars of NumPy and PyTorch become numbers, and NaN and infinity None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{path}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, torch.Tensor | np.generic) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise ValueError(f"{path} is a {type(value).__name__}: expected numbers, strings, lists and dicts of them.")


def plain_results(results: Mapping[str, Any] | None) -> dict[str, Any]:
    """Results as JSON has them: scalars of NumPy and PyTorch become numbers, NaN and infinity None.

    Raises:
        ValueError: No mapping, or values that are no plain data.
    """
    if results is not None and not isinstance(results, Mapping):
        raise ValueError(f"results={results!r}: expected a mapping such as {{'dataset': 'cifar10', 'top1': 92.2}}.")
    plain: dict[str, Any] = _plain(results or {})
    wrong = [
        k for k, _, form in FIGURES if form != "{}" and form != "`{}`" and isinstance(plain.get(k), str | list | dict)
    ]
    if wrong:
        raise ValueError(f"results[{wrong[0]!r}] is {plain[wrong[0]]!r}: expected a number.")
    return plain


def save_checkpoint(
    model: nn.Module,
    folder: str | Path,
    results: Mapping[str, Any] | None = None,
    *,
    sparse: bool = True,
    dtype: torch.dtype | None = None,
) -> Path:
    """Save a model as a folder that rebuilds it: ``model.safetensors`` and ``config.json``.

    ``create_model('local-dir:FOLDER', pretrained=True)`` reads it: the architecture with its arguments (T included),
    the transforms applied, then the weights, strictly and checked by their hash.

    Args:
        model: A model of :func:`spikezoo.create_model`, transformed or not.
        folder: Where to; made if it is not there.
        results: What was measured of these very weights: top1, dataset, split, T, MACs, energy, command, ... as
            ``validate.py`` writes its rows; NaN is stored as None. ``dataset`` is what the checkpoint is for.
        sparse: Store each tensor in its smallest code (see :mod:`spikezoo.checkpoint.sparse`), read by spikezoo only.
            Otherwise dense, which ``timm.create_model('hf-hub:...')`` reads, too.
        dtype: Round weights of two and more dimensions to this type, for instance ``torch.float16``: measure the
            saved checkpoint then, not the model. ``torch.int8`` rounds those of convolutions and linear layers to 255
            levels a channel (:func:`round_to_levels`), with which ``deploy(model, 'int8')`` computes
            exactly, and others to float16. Binary weights (-gain, 0, gain), whose code has one gain a layer, stay.

    Returns:
        The folder.

    Raises:
        ValueError: A model that cannot be rebuilt from its name, or that holds NaN; results that are no plain data.
        OSError: No room or no permission; nothing half-written stays.

    Examples:
        >>> spikezoo.save_checkpoint(model, 'checkpoints/mine', {'dataset': 'cifar10', 'top1': 92.2})
    """
    if Path(folder).suffix == ".safetensors":
        raise ValueError(f"{folder}: expected a folder, in which {WEIGHTS_NAME} and {CONFIG_NAME} are written.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype == torch.int8)):
        raise ValueError(f"dtype={dtype!r}: expected a floating-point type such as torch.float16, or torch.int8.")
    results = plain_results(results)
    facts, model = describe(model), cast(SpikingModel, model)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError(f"This {facts['architecture']} is on the device 'meta' and has no weights to save.")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    check_nan(state, f"This {facts['architecture']}")
    _check_rebuilds(model, facts)
    if dtype is not None:
        state = _rounded(model, state, dtype, sparse)
    # Readers of timm's folders, transformers among them, give the classes themselves, and names where there are some.
    arguments = {key: value for key, value in facts["model_args"].items() if sparse or key != "num_classes"}
    names = None if sparse else model.pretrained_cfg.get("label_names")
    config = {
        "architecture": facts["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        **({"label_names": list(names)} if names else {}),
        "model_args": arguments,
        "pretrained_cfg": {
            **known_facts(model.pretrained_cfg),
            "num_classes": model.num_classes,
            "input_size": [model.in_chans, *model.img_size],
        },
        "spikezoo": {
            "recipe": facts["recipe"],
            "inputs": model.inputs,  # mean and std of the normalisation that the weights were trained with
            "dataset": results.get("dataset"),
            "split": results.get("split"),
            "results": {key: value for key, value in results.items() if key not in ("dataset", "split")},
            "parameters": sum(p.numel() for p in model.parameters()),
            "spikezoo_version": __version__,
        },
    }
    write_checkpoint(folder, state, config, sparse_code=sparse, seeds=_sign_seeds(model))
    return Path(folder)


def _rounded(
    model: nn.Module, state: Mapping[str, torch.Tensor], dtype: torch.dtype, sparse: bool
) -> dict[str, torch.Tensor]:
    """A state dict with its weights of two and more dimensions in another type."""
    many = {
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and tensor.dim() > 1 and not (sparse and _binary(tensor))
    }
    eight: set[str] = set()
    rest = dtype
    if dtype == torch.int8:
        rest, modules = torch.float16, model.named_modules(remove_duplicate=False)
        eight = {f"{path}.weight" for path, module in modules if isinstance(module, nn.Conv2d | nn.Linear)}
    found = {name: round_to_levels(state[name]) if name in eight else state[name].to(rest) for name in many}
    if lost := [name for name in sorted(many) if not found[name].isfinite().all()]:
        raise ValueError(f"dtype={dtype} cannot hold the values of {lost[0]}. Store it as it is (dtype=None).")
    return {**state, **found}


def _binary(tensor: torch.Tensor) -> bool:
    """Whether all values that are not zero have one magnitude, which the code of tickets stores once."""
    size = tensor.abs()
    return bool(((size == 0) | (size == size.max())).all())


def _sign_seeds(model: nn.Module) -> dict[str, int]:
    """Seeds of tickets whose signs :func:`seeded_signs` drew, by the name of the tensor."""
    return {
        ".".join(filter(None, (path, name))): seed
        for path, module in model.named_modules()
        for name, seed in getattr(module, "sign_seeds", {}).items()
    }
