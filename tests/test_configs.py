"""Every config and every row of every plan trains for one epoch of eight images; ``pytest -m configs`` runs them."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from test_events import fill

import spikezoo
from spikezoo.data import create_loader
from spikezoo.neurons import ANALOG
from spikezoo.train import build, plan
from spikezoo.train.flags import parse_args
from spikezoo.train.run import Run

pytestmark = pytest.mark.configs

FILES = sorted(set(ROOT.glob("configs/**/*.yaml")) - set(ROOT.glob("configs/autost/correlation*.yaml")))
SHAPES = {"cifar10": (32, 3, 10), "cifar100": (32, 3, 100), "mnist": (28, 1, 10)}
SMALLER = {"cifar10": 16, "cifar100": 16, "imagenet": 64}
EVENTS = {"cifar10dvs": (128, 10), "dvs128gesture": (128, 11), "nmnist": (34, 10)}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Name of a dataset -> the name and the folder of data of its shape."""
    root, made = tmp_path_factory.mktemp("data"), {}
    draw = np.random.default_rng(0)
    for name, (size, channels, classes) in SHAPES.items():
        arrays = {}
        for split in ("train", "test"):
            arrays[f"x_{split}"] = draw.integers(0, 256, (classes, size, size, channels), dtype=np.uint8)
            arrays[f"y_{split}"] = np.arange(classes)
        np.savez(root / f"{name}.npz", **arrays)
        made[name] = (f"npz:{root / name}.npz", root)
    for name, (size, classes) in EVENTS.items():
        fill(root / name, "npz", [str(i) for i in range(classes)], train=1, test=1, sensor=(size, size))
        (root / name / "sensor.txt").write_text(f"{size} {size}")
        made[name] = (f"events:{root / name}", root)
    image = root / "image.png"
    Image.fromarray(draw.integers(0, 256, (260, 260, 3), dtype=np.uint8)).save(image)
    for split in ("train", "validation"):
        for label in range(1000):
            folder = root / "imagenet" / split / f"n{label:08}"
            folder.mkdir(parents=True)
            (folder / "0.png").hardlink_to(image)
    made["imagenet"] = ("imagenet", root / "imagenet")
    return {**made, "digits": ("digits", root)}


def shortened(args: argparse.Namespace, data) -> argparse.Namespace:
    """The flags of a run for one epoch of eight images; what comes after an epoch comes after the first.

    Of more than two time steps two are taken, and smaller images: more costs as much again for the same lines.
    """
    net = spikezoo.create_model(args.model, device="meta")
    if args.neuron not in ANALOG and (args.T or net.T) > 2:
        args.T = 2
    if args.dataset in SMALLER:
        args.img_size = max(net.min_img_size, SMALLER[args.dataset])
    for name in ("teacher", "initial_checkpoint", "ticket_init"):  # of another plan: not here
        if str(getattr(args, name)).removeprefix("local-dir:").startswith("output"):
            setattr(args, name, None)
    args.dataset, args.data_dir = data[args.dataset][0], str(data[args.dataset][1])
    args.subset, args.batch_size, args.validation_batch_size = 8, 8, 2
    args.epochs, args.updates, args.train_time, args.warmup_epochs, args.cooldown_epochs = 1, None, None, 0, 0
    args.torchcompile, args.amp, args.workers, args.teacher_cache, args.views = False, False, 0, None, None
    args.holdout, args.device, args.val_interval = 0, "cpu", 1
    if args.progressive:
        args.progressive = {min(args.progressive): 1.0}
    for method in (args.dynsnn, args.prune):
        for key in {"reactivate_at", "prune_at", "until"} & set(method or {}):
            method[key] = [] if key == "reactivate_at" else 1
    return args


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_it_trains(path, data, tmp_path, monkeypatch):
    monkeypatch.setattr("spikezoo.train.output.plot", lambda *_: [])
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    # No flag makes the test split small, and ImageNet's has an image a class.
    monkeypatch.setattr(build, "create_loader", lambda *given, **more: create_loader(*given, **{"subset": 2, **more}))
    if "runs" in yaml.safe_load(path.read_text()):
        runs = plan.read_plan(path, str(tmp_path), [])[0]
        firsts = {run.row: run.name for run in reversed(runs)}.values()  # one run a row, and those that others need
        needed = {*firsts, *(name for run in runs if run.name in firsts for name in run.plan.after)}
        wanted = [run.args for run in runs if run.name in needed]
    else:
        wanted = [parse_args(["--config", str(path), "--output", str(tmp_path), "--experiment", "run"])]
    starts, seen = " ".join(f"{args.initial_checkpoint} {args.teacher}" for args in wanted), []
    for args in wanted:
        # Rows that differ in what was shortened are one and the same run, unless another starts from them.
        recipe = {**vars(shortened(args, data)), **dict.fromkeys(("command", "experiment", "seed"))}
        if recipe in seen and args.experiment not in starts:
            continue
        seen.append(recipe)
        run = Run(args)
        try:
            run.finish(run.train())
        finally:
            run.close()
        assert (Path(args.output) / args.experiment / "model.safetensors").is_file()
