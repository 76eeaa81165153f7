"""The hub: save a model as a folder that rebuilds it, pull such folders from the Hugging Face Hub, and push them."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import secrets
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    ModelInfo,
    constants,
    eval_result_entries_to_yaml,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from timm.models import PretrainedCfg
from torch import nn

from spikezoo import registry
from spikezoo._version import __version__
from spikezoo.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    atomic,
    check_nan,
    copy_checkpoint,
    file_hash,
    find_weights,
    load_sparse_file,
    read_config,
    write_checkpoint,
)
from spikezoo.registry import FACTORY_ARGUMENTS, create_model, locate, model_info
from spikezoo.sparse import round_to_levels
from spikezoo.transforms import replay

__all__ = [
    "HubError",
    "check_repo_id",
    "check_shipping",
    "describe",
    "portable_command",
    "portable_place",
    "pull",
    "push_all",
    "push_folder",
    "push_to_hub",
    "save_checkpoint",
    "ship",
    "training_facts",
    "write_card",
]

# Of a live hub this is plenty, and nobody waits long for a dead one.
TIMEOUT_S = 4.5
# The checkpoints that come with the package, all together: everybody who installs it carries them.
MOST_SHIPPED_BYTES = 60_000_000


class HubError(OSError):
    """The Hub does not answer, or does not have what was asked for."""


# ----------------------------------------------------------------------------------------------------- save


def describe(model: nn.Module) -> dict[str, Any]:
    """What rebuilds a model: its architecture, arguments and transforms, as plain data.

    Args:
        model: A model of :func:`spikezoo.create_model`, transformed or not.

    Returns:
        ``architecture``, ``model_args`` and ``recipe``.

    Raises:
        ValueError: A model that was not made by name, or with arguments that are no plain data.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    architecture = cfg.get("architecture") if isinstance(cfg, Mapping) else None
    wrapped = hasattr(model, "_orig_mod")  # torch.compile's wrapper passes every attribute on
    if not architecture or not hasattr(model, "neuron_config") or wrapped:
        raise ValueError(
            f"This {type(model).__name__} was not made by spikezoo.create_model, so its name is unknown and nothing "
            "could rebuild it. Save the model itself, not a wrapper of it (DistributedDataParallel, torch.compile, "
            "features_only)."
        )
    size: Any = model.img_size
    pool = model.head.global_pool.pool_type  # type: ignore[union-attr]
    made: Any = {key: value for key, value in getattr(model, "_model_args", {}).items() if key not in FACTORY_ARGUMENTS}
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


def _plain(value: Any, path: str = "results") -> Any:
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


def _plain_results(results: Mapping[str, Any] | None) -> dict[str, Any]:
    if results is not None and not isinstance(results, Mapping):
        raise ValueError(f"results={results!r}: expected a mapping such as {{'dataset': 'cifar10', 'top1': 92.2}}.")
    plain: dict[str, Any] = _plain(results or {})
    wrong = [
        k for k, _, form in _FIGURES if form != "{}" and form != "`{}`" and isinstance(plain.get(k), str | list | dict)
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
        sparse: Store each tensor in its smallest code (see :mod:`spikezoo.sparse`), which only spikezoo reads.
            Otherwise dense, which ``timm.create_model('hf-hub:...')`` reads, too.
        dtype: Round weights of two and more dimensions to this type, for instance ``torch.float16``: measure the
            saved checkpoint then, not the model. ``torch.int8`` rounds those of convolutions and linear layers to 255
            levels a channel (:func:`spikezoo.sparse.round_to_levels`), with which ``deploy(model, 'int8')`` computes
            exactly, and others to float16. Binary weights (-gain, 0, gain), whose code has one gain a layer, stay.

    Returns:
        The folder.

    Raises:
        ValueError: A model that cannot be rebuilt from its name, or that holds NaN; results that are no plain data.
        OSError: No room or no permission; nothing half-written stays.

    Example:
        >>> spikezoo.save_checkpoint(model, 'checkpoints/mine', {'dataset': 'cifar10', 'top1': 92.2})
    """
    if Path(folder).suffix == ".safetensors":
        raise ValueError(f"{folder}: expected a folder, in which {WEIGHTS_NAME} and {CONFIG_NAME} are written.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype == torch.int8)):
        raise ValueError(f"dtype={dtype!r}: expected a floating-point type such as torch.float16, or torch.int8.")
    results = _plain_results(results)
    facts = describe(model)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError(f"This {facts['architecture']} is on the device 'meta' and has no weights to save.")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    check_nan(state, f"This {facts['architecture']}")
    _check_rebuilds(model, facts)
    if dtype is not None:
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
        state |= {name: round_to_levels(state[name]) if name in eight else state[name].to(rest) for name in many}
        if lost := [name for name in sorted(many) if not state[name].isfinite().all()]:
            raise ValueError(f"dtype={dtype} cannot hold the values of {lost[0]}. Store it as it is (dtype=None).")
    size: Any = model.img_size
    cfg: Any = model.pretrained_cfg
    # timm knows these fields and no others; where the weights are is not a fact of theirs.
    place = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
    known = set(PretrainedCfg.__dataclass_fields__) - place
    kept = {key: value for key, value in cfg.items() if key in known and value is not None}
    config = {
        "architecture": facts["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": facts["model_args"],
        "pretrained_cfg": {
            **kept,
            "num_classes": model.num_classes,
            "input_size": [model.in_chans, *size],
        },
        "spikezoo": {
            "recipe": facts["recipe"],
            "inputs": cfg.get("inputs", {}),  # mean and std of the normalisation that the weights were trained with
            "dataset": results.get("dataset"),
            "split": results.get("split"),
            "results": {key: value for key, value in results.items() if key not in ("dataset", "split")},
            "parameters": sum(p.numel() for p in model.parameters()),
            "spikezoo_version": __version__,
        },
    }
    write_checkpoint(folder, state, config, sparse_code=sparse, seeds=_sign_seeds(model))
    return Path(folder)


def _binary(tensor: torch.Tensor) -> bool:
    """Whether all values that are not zero have one magnitude, which the code of tickets stores once."""
    size = tensor.abs()
    return bool(((size == 0) | (size == size.max())).all())


def _sign_seeds(model: nn.Module) -> dict[str, int]:
    """Seeds of tickets whose signs :func:`spikezoo.sparse.seeded_signs` drew, by the name of the tensor."""
    return {
        ".".join(filter(None, (path, name))): seed
        for path, module in model.named_modules()
        for name, seed in getattr(module, "sign_seeds", {}).items()
    }


# ----------------------------------------------------------------------------------------------------- pull


@contextmanager
def _explained(repo_id: str, revision: str | None, doing: str) -> Iterator[None]:
    """Turn the many errors of the hub's client into one that says what happened and what to do."""
    what = f"{doing} {repo_id}" + (f" at {revision}" if revision else "")
    endpoint = constants.ENDPOINT
    try:
        yield
    except HubError:
        raise
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository name: expected 'organisation/name'. ({error})") from error
    except GatedRepoError as error:
        raise HubError(
            f"{what}: the repository is gated. Accept its terms at {endpoint}/{repo_id} and log in with 'hf auth "
            "login' or HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{what}: there is no such repository at {endpoint}, or it is private. Check the spelling; for a private "
            "one log in with 'hf auth login' or HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{what}: the repository has no such revision. Give a branch, a tag or a commit, or leave it out."
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{what}: it is not in the cache and HF_HUB_OFFLINE forbids to fetch it.") from error
    except LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        raise HubError(f"{what}: {endpoint} does not answer, and it is not in the cache. ({cause})") from error
    except EntryNotFoundError as error:
        raise HubError(f"{what}: the repository lacks a file. {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: "Log in with 'hf auth login' or HF_TOKEN.",
            403: "Your token has no right to do this; it needs the role 'write' to push.",
            429: "Too many requests: wait a while, or log in; models in the cache need no request.",
        }.get(status, "The server has a fault: try again later.")
        raise HubError(f"{what}: {endpoint} answered {status}. {advice}") from error
    except ConnectionError as error:
        advice = " Set HF_HUB_DISABLE_XET=1 for hubs that do not speak Xet." if "xet" in str(error).lower() else ""
        raise HubError(f"{what}: the connection to {endpoint} failed ({error}).{advice}") from error
    except PermissionError as error:
        raise HubError(f"{what}: no permission to write {error.filename}. HF_HOME says where the cache is.") from error
    except Exception as error:  # the client's transport raises its own kinds, which differ between its versions
        cause = error.__cause__ or error
        raise HubError(
            f"{what}: {endpoint} does not answer as it should ({type(cause).__name__}: {cause}). Check the network, "
            "HF_ENDPOINT and proxies; models in the cache need no network."
        ) from error


def _ask(repo_id: str, revision: str | None = None) -> ModelInfo:
    """One question to the Hub, answered within seconds or not at all.

    The client's downloads repeat a failed request for half a minute, and a mute server holds them for several; its
    timeouts hold for each address of a host. So whether the Hub is there is asked first, and in a thread.
    """
    answer: list[ModelInfo | Exception] = []

    def ask() -> None:
        try:
            answer.append(HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT_S))
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    found = answer[0] if answer else TimeoutError(f"no answer within {TIMEOUT_S:g} s")
    if isinstance(found, Exception):
        raise found
    return found


def check_repo_id(repo_id: str) -> str:
    """The name of a repository, checked before anything is trained, measured or written for it.

    Raises:
        ValueError: Not ``organisation/name``.
    """
    try:
        validate_repo_id(repo_id)
        well_formed = "/" in repo_id
    except HFValidationError:
        well_formed = False
    if not well_formed:
        raise ValueError(
            f"{repo_id!r} is no repository name: expected 'organisation/name' of letters, digits, '-', '_' and '.'."
        )
    return repo_id


def _split_revision(reference: str) -> tuple[str, str | None]:
    repo_id, _, revision = reference.partition("@")
    return check_repo_id(repo_id), revision or None


def pull(reference: str, *, refresh: bool = False, cache_dir: str | Path | None = None) -> Path:
    """Fetch a checkpoint from the Hugging Face Hub into its cache.

    What is in the cache is used without any request, also where the branch has moved on since; ``refresh=True`` or a
    revision asks again. HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are the client's and mean what they mean
    there.

    Args:
        reference: ``organisation/name`` or ``organisation/name@revision``: branch, tag or commit.
        refresh: Ask the Hub for the newest commit of the branch.
        cache_dir: Folder of the cache; None is huggingface_hub's.

    Returns:
        The folder with config.json and model.safetensors.

    Raises:
        HubError: Missing, private, gated, or no answer.
        ValueError: No repository name.
    """
    repo_id, revision = _split_revision(reference)
    files = (CONFIG_NAME, WEIGHTS_NAME)
    with _explained(repo_id, revision, "Fetching"):
        if not refresh:
            try:
                folder = snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, local_files_only=True)
                if all((Path(folder) / file).is_file() for file in files):
                    return Path(folder)
            except LocalEntryNotFoundError:
                pass
        info = _ask(repo_id, revision)
        have = {sibling.rfilename for sibling in info.siblings or []}
        if missing := [file for file in files if file not in have]:
            pickles = [file for file in have if file.endswith((".bin", ".pth", ".pt", ".ckpt"))]
            raise HubError(
                f"Fetching {repo_id}: it has no {' and no '.join(missing)}, so it is no checkpoint of spikezoo."
                + (f" The pickle {pickles[0]} is not read: it can run code." if pickles else "")
            )
        for attempt in (refresh, True):
            # The first file settles the commit that the branch stands at, the second comes from that very commit.
            options: dict[str, Any] = {"etag_timeout": TIMEOUT_S, "force_download": attempt, "cache_dir": cache_dir}
            first = Path(hf_hub_download(repo_id, CONFIG_NAME, revision=revision, **options))
            hf_hub_download(repo_id, WEIGHTS_NAME, revision=first.parent.name, **options)
            try:
                _verify(first.parent)
                return first.parent
            except ValueError as error:  # the client checks sizes only
                damage = error
        for file in files:  # or the cache would give it again and again
            (first.parent / file).resolve().unlink(missing_ok=True)
            (first.parent / file).unlink(missing_ok=True)
        raise HubError(f"Fetching {repo_id}: what came is damaged, twice, and was thrown away. {damage}") from damage


def _verify(folder: Path) -> None:
    """Check a checkpoint that came over the network by the hashes of its config and of the Hub."""
    weights = folder / WEIGHTS_NAME
    load_sparse_file(weights)
    # The cache links to a blob, which for large files is called by its sha256.
    blob = weights.readlink().name if weights.is_symlink() else ""
    if len(blob) == 64 and file_hash(weights) != blob:
        raise ValueError(f"{weights} does not have the sha256 {blob} that the Hub gave for it.")


# ----------------------------------------------------------------------------------------------------- card

# Names of our datasets on the Hub; others are named as they are, without a link.
_HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "imagenet": "ILSVRC/imagenet-1k",
}

_CARD = """---
{{ card_data }}
---

# {{ title }}

{{ note }}

{{ figures }}

## Load it

```python
import spikezoo

model = spikezoo.create_model("{{ load }}", pretrained=True).eval()
```

{{ reading }}

## What it is

{{ facts }}

{{ pictures }}
## Licence and source

{{ licence }} Layout: {{ paper }}. Made with spikezoo {{ version }}.
"""

# Of a results row: key, how the card calls it, how it is written.
_FIGURES = (
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


def _table(rows: list[tuple[str, str]]) -> str:
    """A table of Markdown; what is in a cell ends neither the cell nor its row."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


def _literal(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def write_card(folder: str | Path, repo_id: str, *, license: str = "apache-2.0") -> Path:
    """Write the model card of a checkpoint: README.md with its model index, and ``.eval_results/``.

    Every figure is from the checkpoint's config.json; what was not measured is not in the card.

    Args:
        folder: A folder that :func:`save_checkpoint` wrote; its pictures (*.png) are shown.
        repo_id: Repository that the card is for, or 'architecture.tag' of weights that come with the package.
        license: Licence of the weights.

    Returns:
        The card's path.
    """
    folder, published = Path(folder), "/" in repo_id
    config = read_config(folder)
    if not config.get("spikezoo", {}).get("version"):
        raise ValueError(f"{folder} is no checkpoint of spikezoo.save_checkpoint, which a card could describe.")
    block, name = config["spikezoo"], config["architecture"]
    results, dataset = block.get("results", {}), block.get("dataset")
    info = model_info(name)
    T = config["model_args"].get("T")
    split = f", {block['split']} split" if block.get("split") else ""
    sparsity = config["sparsity_config"]
    weights, load = folder / WEIGHTS_NAME, f"hf-hub:{repo_id}" if published else repo_id
    facts = [
        ("Architecture", f"`{name}`"),
        ("Arguments", f"`{_literal(config['model_args'])}`"),
        ("Transforms applied, in order", f"`{_literal(block['recipe'])}`" if block["recipe"] else "none"),
        ("Time steps T", str(T)),
        ("Parameters", f"{block['parameters']:,}"),
        ("Sparsity (zeros among all stored numbers)", f"{100 * sparsity['global_sparsity']:.2f} %"),
        ("Dataset", f"{dataset}{split}" if dataset else "not said"),
        ("Weights file", f"{weights.stat().st_size:,} bytes, {sparsity['format']}"),
        ("sha256", f"`{block['sha256'][WEIGHTS_NAME]}`"),
    ]
    measured = [(title, form.format(results[key])) for key, title, form in _FIGURES if results.get(key) is not None]
    hub_dataset = _HUB_DATASETS.get(str(dataset))
    metrics = [EvalResult(
        task_type="image-classification", dataset_type=hub_dataset or str(dataset), dataset_name=str(dataset),
        dataset_split=block.get("split"), metric_type="accuracy", metric_name="top-1", metric_value=results["top1"],
    )] if dataset and results.get("top1") is not None else None  # fmt: skip
    data = ModelCardData(
        license=license,
        library_name="spikezoo",
        pipeline_tag="image-classification",
        tags=["spikezoo", "spiking-neural-network", "snn", "pytorch", "image-classification", name],
        datasets=[hub_dataset] if hub_dataset else None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=metrics,
    )
    card = ModelCard.from_template(
        data,
        template_str=_CARD,
        title=f"{name}, {dataset}" if dataset else name,
        note=f"A spiking neural network. {info.note}",
        figures=_table(measured) if measured else "Nothing was measured of these weights yet.",
        load=load,
        reading=(
            f"The weights are dense: after `import spikezoo` `timm.create_model('{load}', pretrained=True)` reads them,"
            " too."
            if sparsity["format"] == "dense" and not block["recipe"]
            else "The weights are dense and belong to a transformed model, which timm cannot make."
            if sparsity["format"] == "dense"
            else "The tensors are stored in spikezoo's sparse code: without the model, "
            "`spikezoo.load_sparse_file('model.safetensors')` gives them as a state dict."
        ),
        facts=_table(facts),
        pictures="".join(f"![{picture.stem}]({picture.name})\n\n" for picture in sorted(folder.glob("*.png"))),
        licence=f"Weights: {license}.",
        paper=info.paper,
        version=block.get("spikezoo_version", __version__),
    )
    with atomic(folder / "README.md") as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    if metrics and hub_dataset and published:
        entry = EvalResultEntry(
            dataset_id=hub_dataset,
            task_id="image_classification",
            value=results["top1"],
            date=str(results["date"]).partition(" ")[0] if results.get("date") else None,
            notes=f"top-1 in per cent, T={T}{split}",
        )
        with atomic(folder / ".eval_results" / f"{dataset}.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))
    return folder / "README.md"


# ----------------------------------------------------------------------------------------------------- ship


def portable_command(command: str) -> str:
    """A command without the folders of the machine that it ran on.

    Folders of data become DATA, folders of output OUTPUT; files of ``configs/`` and relative paths stay.

    Args:
        command: As :func:`shlex.join` writes it; several are joined by ``&&``.
    """
    return " && ".join(map(_portable, command.split(" && ")))


def _portable(command: str) -> str:
    words = shlex.split(command)
    told, before = [], ""
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if equals or not word.startswith("--"):
            value = portable_place(flag, value, "train.py" in words[:2])
            word = f"{flag}={value}" if equals else value
        told.append(word)
        before = word
    return shlex.join(told)


def portable_place(flag: str, value: str, trains: bool) -> str:
    """What a command's argument says of a place, without the folders above it.

    Args:
        flag: The flag that it stands behind, such as ``--teacher``.
        value: The argument; what is no place stays as it is.
        trains: Whether the command is train.py's.
    """
    if flag == "--data-dir":
        return "DATA"
    if flag == "--output" and trains:
        return "OUTPUT"
    scheme, colon, path = value.rpartition(":")
    above = Path(path).parts[:-1]
    foreign = path.startswith(("/", "~", ".."))
    if foreign and "configs" in above:
        return path[path.rindex("configs/") :]
    if foreign or (flag in ("--output", "--checkpoint", "--initial-checkpoint", "--resume") and above):
        return f"{scheme}{colon}{'DATA' if scheme in ('npz', 'events') else 'OUTPUT'}/{Path(path).name}"
    return value


def training_facts(checkpoint: str | Path) -> dict[str, Any]:
    """What is known of how a checkpoint was trained: command, seed, epochs, minutes, precision, commit, machine, date.

    Read from its config.json, and where train.py left them, from metadata.json and summary.csv beside it.

    Args:
        checkpoint: A folder, or a file in it.

    Returns:
        ``train_command``, ``seed``, ``epochs``, ``train_minutes``, ``train_precision``, ``train_commit``,
        ``train_machine`` and ``train_date``, of which those that nobody wrote down are missing.
    """
    path = Path(checkpoint)
    folder = path if path.is_dir() else path.parent
    results = read_config(checkpoint).get("spikezoo", {}).get("results", {})
    if "train_command" not in results and (folder / "metadata.json").is_file():
        meta = json.loads((folder / "metadata.json").read_text())
        results = {**meta, **results, "train_command": meta.get("command"), "command": None}
    # Further programs, such as dynsnn, say in their results what was known of the training, under these names.
    facts = {"train_command": results.get("train_command"), "seed": results.get("seed")}
    own = "train_commit" not in results
    for key in ("precision", "commit", "machine", "date"):
        facts[f"train_{key}"] = results.get(key if own else f"train_{key}")
    made = results.get("command") or ""
    if made.startswith("python -m spikezoo"):
        facts["train_command"] = " && ".join(filter(None, [facts["train_command"], made]))
    facts |= {key: results.get(key) for key in ("epochs", "train_minutes")}
    if (folder / "summary.csv").is_file():
        with open(folder / "summary.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        facts["epochs"] = facts["epochs"] or len(rows)
        facts["train_minutes"] = round(sum(float(row["train_seconds"]) for row in rows) / 60, 1)
    if facts["train_command"]:
        facts["train_command"] = portable_command(facts["train_command"])
    return {key: value for key, value in facts.items() if value is not None}


def check_shipping(architecture: str, tag: str, overwrite: bool = False) -> str:
    """The name ``architecture.tag`` of a checkpoint to ship, checked before anything is measured for it.

    Raises:
        ValueError: No name of a tag, or one that exists.
    """
    if not re.fullmatch("[a-z0-9][a-z0-9_]*", tag):
        raise ValueError(
            f"{tag!r} is no tag: expected small letters, digits and '_' that say what the weights were trained on, "
            "such as 'cifar10' or 'cifar10_binw40'."
        )
    name = f"{architecture}.{tag}"
    if registry.shipped_folder(name).exists() and not overwrite:
        raise ValueError(
            f"{name} is there already. Give another tag, or --overwrite to put these weights in its place."
        )
    return name


def ship(
    model: nn.Module,
    tag: str,
    measure: Callable[[Path], Mapping[str, Any]],
    *,
    facts: Mapping[str, Any],
    overwrite: bool = False,
    license: str = "apache-2.0",
) -> Path:
    """Put a checkpoint into the package: in eight bits a weight or less, measured as it is stored, with its card.

    Args:
        model: A model of :func:`spikezoo.create_model`.
        tag: What its name has after the dot.
        measure: Loads and measures the checkpoint in a folder; returns its results row.
        facts: Of the training, see :func:`training_facts`; they join the row.
        overwrite: Take the place of a checkpoint of this name.
        license: Licence of the weights.

    Returns:
        The folder ``weights/ARCHITECTURE.TAG``; where anything fails it is as it was.

    Raises:
        ValueError: A bad or taken tag, no training command, or too many bytes.
    """
    name = check_shipping(describe(model)["architecture"], tag, overwrite)
    if not facts.get("train_command"):
        raise ValueError(
            f"Nobody knows how {name} was trained: its folder has neither the config.json nor the metadata.json of "
            "train.py. Only what can be trained again is shipped."
        )
    final = registry.shipped_folder(name)
    final.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    folder, old = (final.with_name(f".{name}.{mark}.{part}") for part in ("new", "old"))
    try:
        save_checkpoint(model, folder, dtype=torch.int8)
        others = sum(
            file.stat().st_size
            for place in final.parent.iterdir()
            if place != final and not place.name.startswith(".")
            for file in place.rglob("*")
            if file.is_file()
        )
        size = sum(file.stat().st_size for file in folder.iterdir())
        if others + size > MOST_SHIPPED_BYTES:
            raise ValueError(
                f"{name} takes {size:,} bytes and the others {others:,}: together more than {MOST_SHIPPED_BYTES:,}. "
                "Ship a sparser or smaller net, or take another one out."
            )
        row = {
            **measure(folder),
            **facts,
            "model": name,
            "weights": name,
            "bytes": (folder / WEIGHTS_NAME).stat().st_size,
            "sparsity": read_config(folder)["sparsity_config"]["global_sparsity"],
        }
        copy_checkpoint(folder, folder, _plain_results(row))
        write_card(folder, name, license=license)
        if final.exists():
            os.replace(final, old)
        try:
            os.replace(folder, final)
        except OSError:
            if old.exists():
                os.replace(old, final)
            raise
    finally:
        for leftover in (folder, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return final


# ----------------------------------------------------------------------------------------------------- push


def push_folder(
    checkpoint: str | Path,
    repo_id: str,
    *,
    results: Mapping[str, Any] | None = None,
    private: bool = False,
    revision: str | None = None,
    license: str = "apache-2.0",
    dry_run: str | Path | None = None,
) -> str:
    """Publish a checkpoint on the Hugging Face Hub: weights, config.json, model card, results and pictures.

    Pushing the same content again makes no commit.

    Args:
        checkpoint: A folder that :func:`save_checkpoint` or train.py wrote, a weights file or training state, or
            'local-dir:FOLDER' or 'hf-hub:ORG/NAME'.
        repo_id: ``organisation/name``; made if it is not there.
        results: New measurements of these very weights, in place of the checkpoint's.
        private: Make a new repository private.
        revision: Branch, made if it is not there; None is the main one.
        license: Licence of the weights.
        dry_run: Write everything to this folder and push nothing.

    Returns:
        The address of the repository, or the folder of the dry run.

    Raises:
        HubError: The Hub does not answer or refuses.
        ValueError: Damaged, or a file that does not say what model it belongs to.

    Example:
        >>> spikezoo.push_folder('output/quickstart', 'me/quickstart', dry_run='card')
    """
    check_repo_id(repo_id)
    checkpoint = locate(str(checkpoint))
    source = find_weights(checkpoint)
    config = read_config(checkpoint)
    if "architecture" not in config:
        raise ValueError(
            f"{checkpoint} does not say what model it belongs to: make the model with create_model(NAME, "
            "checkpoint_path=...) and push_to_hub(model, ...)."
        )
    stored = config.get("spikezoo", {})
    with _staging(repo_id, dry_run) as folder:
        if source.name == WEIGHTS_NAME and stored.get("version"):
            copy_checkpoint(source.parent, folder, None if results is None else _plain_results(results))
        else:  # a training state, or weights without hashes
            known = {**stored.get("results", {}), **{key: stored.get(key) for key in ("dataset", "split")}}
            model = create_model(config["architecture"], checkpoint_path=checkpoint)
            save_checkpoint(model, folder, results if results is not None else known)
        for picture in source.parent.glob("*.png"):
            shutil.copyfile(picture, folder / picture.name)
        return _publish(folder, repo_id, private, revision, license, dry_run)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    results: Mapping[str, Any] | None = None,
    *,
    sparse: bool = True,
    private: bool = False,
    revision: str | None = None,
    license: str = "apache-2.0",
    dry_run: str | Path | None = None,
) -> str:
    """Publish a model on the Hugging Face Hub, with a card of what was measured.

    Args:
        model: A model of :func:`spikezoo.create_model`, transformed or not.
        repo_id: ``organisation/name``; made if it is not there.
        results: What was measured of these very weights, as :func:`save_checkpoint` takes it.
        sparse: As for :func:`save_checkpoint`; dense weights without transforms can be read by timm, too.
        private: Make a new repository private.
        revision: Branch, made if it is not there; None is the main one.
        license: Licence of the weights.
        dry_run: Write everything to this folder and push nothing.

    Returns:
        The address of the repository, or the folder of the dry run.

    Raises:
        HubError: The Hub does not answer or refuses.
        ValueError: A model that cannot be rebuilt from its name, or that holds NaN.

    Example:
        >>> spikezoo.push_to_hub(model, 'me/my-net', {'dataset': 'cifar10', 'top1': 92.2})
    """
    with _staging(repo_id, dry_run) as folder:
        save_checkpoint(model, folder, results, sparse=sparse)
        return _publish(folder, repo_id, private, revision, license, dry_run)


@contextmanager
def _staging(repo_id: str, dry_run: str | Path | None) -> Iterator[Path]:
    check_repo_id(repo_id)
    if dry_run is not None:
        if Path(dry_run).is_file() or (Path(dry_run).exists() and any(Path(dry_run).iterdir())):
            raise ValueError(
                f"{dry_run} is not empty, or a file: give a new folder, so that nothing of yours is mixed in."
            )
        Path(dry_run).mkdir(parents=True, exist_ok=True)
        yield Path(dry_run)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def push_all(
    org: str, *, private: bool = False, license: str = "apache-2.0", dry_run: str | Path | None = None
) -> Iterator[str]:
    """Publish every checkpoint that comes with the package, each as ``ORG/ARCHITECTURE.TAG``.

    What was published before and has not changed makes no commit.

    Args:
        org: Organisation, or user.
        private: Make new repositories private.
        license: Licence of the weights.
        dry_run: Write everything to folders in this one and push nothing.

    Yields:
        After each of them the address of its repository, or its folder of the dry run.

    Raises:
        HubError: The Hub does not answer or refuses.
        ValueError: A bad name of an organisation, nothing to publish, or a damaged checkpoint.
    """
    names = sorted(config.parent.name for config in registry.SHIPPED.glob(f"[!.]*/{CONFIG_NAME}"))
    if not names:
        raise ValueError(f"There is nothing to publish: {registry.SHIPPED.name}/ holds no checkpoints.")
    for name in names:
        check_repo_id(f"{org}/{name}")
    for name in names:
        place = None if dry_run is None else Path(dry_run) / name
        yield push_folder(
            registry.shipped_folder(name), f"{org}/{name}", private=private, license=license, dry_run=place
        )


def _publish(
    folder: Path, repo_id: str, private: bool, revision: str | None, license: str, dry_run: str | Path | None
) -> str:
    write_card(folder, repo_id, license=license)
    if dry_run is not None:
        return str(folder)
    api = HfApi(library_name="spikezoo", library_version=__version__)
    with _explained(repo_id, revision, "Pushing"):
        with suppress(RepositoryNotFoundError):  # it will be made
            _ask(repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Upload with spikezoo",
            delete_patterns=".eval_results/*",  # figures of other weights must not outlive them
        )
    return f"{constants.ENDPOINT}/{repo_id}" + (f"/tree/{revision}" if revision else "")
