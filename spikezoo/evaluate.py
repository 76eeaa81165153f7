"""Evaluation: open a model with its weights and data, measure it, and the facts that every result carries."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import random_seed
from torch import Tensor, nn
from tqdm import tqdm

from spikezoo.checkpoint import Config, atomic, check_target, find_weights, read_table
from spikezoo.checks import finite
from spikezoo.data import DatasetInfo, dataset_info, is_read_by_timm, natural_dataset
from spikezoo.data.events import is_event_dataset
from spikezoo.factory import SpikingModel, create_model, is_reference, locate, model_info
from spikezoo.observe import WithRates, evaluating

__all__ = [
    "accuracy_over_time",
    "check_results_file",
    "dataset_arguments",
    "environment",
    "evaluate",
    "input_options",
    "open_model",
    "read_layer_rates",
    "write_rows",
]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: str | torch.device = "cpu",
    autocast: Callable[[], Any] = nullcontext,
    compiled: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    progress: bool = False,
    rates: bool = True,
) -> dict[str, Any]:
    """Measure a model on a whole split.

    Args:
        model: The model; put into evaluation mode for the duration.
        loader: Batches of images and integer labels; each rank of a distributed run sees its share.
        device: Where the model is.
        autocast: Makes the context of the forward pass.
        compiled: A compiled ``WithRates(model)``, used for full batches: a shorter one would be compiled anew.
        progress: Show a progress bar.
        rates: Measure firing rates; without them the model runs as it is.

    Returns:
        top1, top5 (per cent), loss, samples, images_per_second (loading included, without the first batch where
        there are several, which pays for compilation), firing_rate (mean over layers and time steps, None without
        spiking neurons), layer_firing_rates.
    """
    probed = WithRates(model if rates else nn.Identity())
    sums = torch.zeros(4, dtype=torch.float64)
    rate_sums = torch.zeros(len(probed.names), dtype=torch.float64)
    full = timed = 0
    started = mark = time.perf_counter()
    with evaluating(model):
        for images, labels in tqdm(loader, desc="validate", disable=not progress, leave=False):
            images, labels = finite(images.to(device)), labels.to(device)
            full = full or len(images)
            run = compiled if compiled is not None and len(images) == full else probed
            with autocast():
                logits, fired = run(images) if rates else (model(images), torch.zeros(0, 1))
            logits = logits.float()
            top = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            if sums[3] > 0:
                timed += len(images)
            sums += torch.stack([top[:, 0].sum(), top.sum(), loss, loss.new_tensor(len(images))]).double().cpu()
            rate_sums += len(images) * fired.mean(1).double().cpu()
            if not timed:
                mark = time.perf_counter()
    finished = time.perf_counter()
    speed = timed / (finished - mark) if timed else sums[3].item() / (finished - started)
    if dist.is_available() and dist.is_initialized():
        packed = torch.cat([sums, rate_sums, torch.tensor([speed], dtype=torch.float64)]).to(device)
        dist.all_reduce(packed)  # the speeds of all ranks add up, too
        sums, rate_sums, speed = packed[:4].cpu(), packed[4:-1].cpu(), packed[-1].item()
    samples = int(sums[3])
    if samples == 0:
        raise ValueError("The split to evaluate on is empty.")
    layers = dict(zip(probed.names, (rate_sums / samples).tolist(), strict=True))
    return {
        "top1": 100 * sums[0].item() / samples,
        "top5": 100 * sums[1].item() / samples,
        "loss": sums[2].item() / samples,
        "samples": samples,
        "images_per_second": speed,
        "firing_rate": sum(layers.values()) / len(layers) if layers else None,
        "layer_firing_rates": layers,
    }


@torch.no_grad()
def accuracy_over_time(
    model: SpikingModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: str | torch.device = "cpu",
    autocast: Callable[[], Any] = nullcontext,
    progress: bool = False,
) -> tuple[list[float], float]:
    """Measure a model at every number of time steps up to its own, in one pass: of the running mean of its logits.

    Args:
        model: A spiking model whose head pools by averaging; put into evaluation mode for the duration.
        loader: Batches of images and integer labels. A layer's output takes T times the memory that it takes otherwise,
            so make them small.
        device: Where the model is.
        autocast: Makes the context of the forward pass.
        progress: Show a progress bar.

    Returns:
        Top-1 accuracy in per cent after 1, 2, ... T steps, and the firing rate over all of them, the mean over layers.

    Raises:
        ValueError: A head that pools by the maximum, or no images.
    """
    if model.head.global_pool.pool_type == "max":
        raise ValueError(
            "global_pool='max': the model takes the maxima of features averaged over its steps, so that its logits "
            "of single steps say nothing of fewer steps. Evaluate it at one T at a time: validate.py --T."
        )
    probed = WithRates(model, steps=True)
    hits = torch.zeros((), dtype=torch.int64)
    rate, samples = 0.0, 0
    with evaluating(model):
        for images, labels in tqdm(loader, desc="validate", disable=not progress, leave=False):
            with autocast():
                logits, rates = probed(finite(images.to(device)))
            # Of the sum and of the mean, the largest is the same one.
            right = logits.float().cumsum(0).argmax(2) == labels.to(device)
            hits = hits + right.sum(1).cpu()
            rate += len(images) * rates.mean().item()
            samples += len(images)
    if samples == 0:
        raise ValueError("The split to evaluate on is empty.")
    return (100 * hits / samples).tolist(), rate / samples


def open_model(
    name: str,
    arguments: Mapping[str, Any],
    *,
    checkpoint: str | Path | None = None,
    ema: bool = False,
    pretrained: bool = False,
    dataset: str | None = None,
    data_dir: str | None = None,
    seed: int = 42,
) -> tuple[SpikingModel, str, str]:
    """Make a model with the best weights at hand, and find the dataset that it is for.

    The weights are the checkpoint's, else pretrained ones where the model has some, else random.

    Args:
        name: Architecture, with or without tag, or 'local-dir:FOLDER' or 'hf-hub:ORG/NAME', which is a checkpoint.
        arguments: Arguments of ``create_model``; they win over the checkpoint's.
        checkpoint: A file or folder of weights.
        ema: Take the averaged weights of a training state.
        pretrained: Insist on pretrained weights.
        dataset: Name of the dataset. None takes the checkpoint's, else what fits the model's input; 'none' is none.
        data_dir: Folder of the dataset.
        seed: Seed of random weights.

    Returns:
        The model, the name of its dataset, and where its weights come from: a path, a tag or 'random'.

    Raises:
        ValueError: An unknown name or argument, or weights that do not fit.
        FileNotFoundError: No such checkpoint or dataset.
    """
    if is_reference(name):
        checkpoint = locate(name)
        name = Config.read(checkpoint).architecture or name
    config = Config.read(checkpoint) if checkpoint else Config()
    info = model_info(name)
    given = {**config.model_args, **arguments}
    dataset = dataset or (config.dataset if checkpoint else info.dataset)
    if dataset is None:
        size = given.get("img_size", info.input_size[1])
        chans, classes = given.get("in_chans", info.input_size[0]), given.get("num_classes", info.num_classes)
        dataset = natural_dataset(size if isinstance(size, int) else size[0], chans, classes)
    pretrained = not checkpoint and (pretrained or bool(info.pretrained))
    if not checkpoint and not pretrained and dataset != "none":
        given = {**dataset_arguments(name, dataset_info(dataset, data_dir)), **given}  # random weights fit any data
    random_seed(seed)
    if checkpoint:
        model = create_model(name, checkpoint_path=checkpoint, use_ema=ema, **arguments)
        return model, dataset, str(find_weights(checkpoint))
    model = create_model(name, pretrained, **given)
    return model, dataset, f"{info.name}.{model.pretrained_cfg['tag']}" if pretrained else "random"


def dataset_arguments(name: str, info: DatasetInfo) -> dict[str, int]:
    """The arguments of ``create_model`` that a dataset sets: classes, channels and size.

    Files of images are resized to what a net takes, so a net of fixed size, or a checkpoint, keeps its own.

    Args:
        name: Architecture, with or without tag, or the place of a checkpoint.
        info: The dataset.
    """
    own = {"num_classes": info.num_classes, "in_chans": info.in_chans, "img_size": info.img_size}
    cfg = None if is_reference(name) else timm.get_pretrained_cfg(name)
    if is_read_by_timm(info.name) and (cfg is None or cfg.fixed_input_size):
        del own["img_size"]
    return {key: value for key, value in own.items() if value}


def input_options(
    model: SpikingModel,
    dataset: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    frames_by: str | None = None,
    duration_us: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> dict[str, Any]:
    """How a model takes a dataset's images or recordings, as options of :func:`spikezoo.data.create_loader`.

    What the user gave comes first, then what the weights were trained with, then what the encoding needs, then, of
    images that timm reads, what ``pretrained_cfg`` says; the rest is as the dataset has it.

    Args:
        model: A model of ``create_model``.
        dataset: Name of the dataset.
        mean: Of the channels, for the normalisation.
        std: Likewise.
        frames_by: What event frames are cut by.
        duration_us: Of event frames, in microseconds.
        crop_pct: Part of an image that is seen, where timm reads it.
        interpolation: Of its resizing.
    """
    cfg = model.pretrained_cfg
    stored = model.inputs
    own = {}
    if is_read_by_timm(dataset):
        own = {key: cfg[key] for key in ("mean", "std", "crop_pct", "interpolation") if cfg.get(key) is not None}
        if len(own.get("mean", ())) not in (1, model.in_chans):  # of other channels
            own = {key: value for key, value in own.items() if key not in ("mean", "std")}
    if len(cfg.get("label_names") or ()) == model.num_classes:
        own["label_names"] = tuple(cfg["label_names"])
    if frames_by is not None or not is_event_dataset(dataset):
        stored = {key: value for key, value in stored.items() if key in ("mean", "std")}
    pixels = {} if model.encoding == "direct" else {"mean": (0.0,), "std": (1.0,)}
    given: dict[str, Any] = {"mean": mean, "std": std, "frames_by": frames_by, "duration_us": duration_us}
    given |= {"crop_pct": crop_pct, "interpolation": interpolation}
    return {
        "T": model.T,
        **own,
        **pixels,
        **stored,
        **{key: value for key, value in given.items() if value is not None},
    }


def _commit() -> str:
    """Commit of the checkout that this file belongs to, '-dirty' where tracked files differ; else unknown."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        # An installed copy may lie inside somebody else's repository, whose commit would be a lie.
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        described = [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict[str, Any]:
    """What a result depends on besides its arguments: commit, versions, machine, date."""
    versions: dict[str, str] = {"torch": torch.__version__}  # with its build, which the package metadata leave out
    for package in ("torchvision", "timm", "spikingjelly", "spikezoo-snn"):
        try:
            versions[package] = version(package)
        except ImportError:
            versions[package] = "not installed"
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        processor = lines[0].partition(":")[2].strip() if lines else processor
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "python": platform.python_version(),
        **versions,
        "machine": f"{processor}, {os.cpu_count()} cores, accelerator {accelerator}",
        "threads": torch.get_num_threads(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
    }


def check_results_file(path: str | Path) -> str:
    """The suffix of a results file, checked before anything is measured.

    Raises:
        ValueError: Neither .csv nor .json.
        OSError: It cannot be written there.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".json"):
        raise ValueError(f"Results file {str(path)!r}: expected a name that ends in .csv or .json.")
    check_target(path)
    return suffix


def read_layer_rates(path: str | Path, layers: Iterable[str]) -> dict[str, list[float]]:
    """Read a training's table of epochs by layers: layer -> rates of all epochs, nan of those that did not have it.

    Args:
        path: The file.
        layers: Names of layers, of those that the model has now.

    Raises:
        ValueError: It is not as the run wrote it.
    """
    rows = read_table(Path(path))
    return {name: [float(row.get(name) or "nan") for row in rows] for name in layers}


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write result rows as .json or .csv, under a temporary name first.

    Raises:
        ValueError: Another suffix.
    """
    suffix = check_results_file(path)
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        if suffix == ".json":
            json.dump(list(rows), file, indent=2)
            file.write("\n")
            return
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()})
