"""Validate, and put checkpoints into the package: ``python validate.py --checkpoint output/snn --ship cifar10``.

--ship TAG stores a checkpoint in eight bits a weight or less, measures it as it is stored, and writes its model card.
All other flags are those of ``spikezoo validate``.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spikezoo
from spikezoo import registry
from spikezoo.checkpoint import WEIGHTS_NAME, Config, copy_checkpoint
from spikezoo.cli import validate
from spikezoo.evaluate import open_model
from spikezoo.hub.card import write_card
from spikezoo.hub.provenance import training_facts
from spikezoo.saving import describe, plain_results, save_checkpoint
from spikezoo.transforms.tickets import tickets

__all__ = ["MOST_SHIPPED_BYTES", "check_shipping", "main", "ship"]

# The checkpoints that come with the package, all together: a wheel on PyPI has at most 100 MB.
MOST_SHIPPED_BYTES = 95_000_000


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
            "sparsity": Config.read(folder).sparsity,
        }
        copy_checkpoint(folder, folder, plain_results(row))
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


def check_args(args: argparse.Namespace) -> None:
    """Raise where flags do not go with --ship.

    Raises:
        ValueError: It names the flags.
    """
    if not args.ship:
        if args.overwrite:
            raise ValueError("--overwrite is for --ship TAG.")
        return
    if not args.checkpoint:
        raise ValueError(f"--ship {args.ship}: the weights are random, or shipped already. Give --checkpoint.")
    part = args.split != "test" or args.val_subset
    if args.amp or args.deploy or args.torchcompile or args.push_to_hub or part:
        raise ValueError(
            f"--ship {args.ship} measures in float32 on the whole test split: leave --amp, --deploy, "
            "--torchcompile, --push-to-hub, --val-subset and --split out."
        )
    if args.mean or args.std or args.frames_by or args.duration_us:
        raise ValueError(f"--ship {args.ship}: leave --mean, --std, --frames-by and --duration-us to the checkpoint.")
    args.count = True


def put_on_shelf(name: str, args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Put a trained model into the package, measured as it is stored there, and return its row."""
    model, dataset, _ = open_model(
        name,
        validate.arguments_of(args),
        checkpoint=args.checkpoint,
        ema=args.use_ema,
        dataset=args.dataset,
        data_dir=args.data_dir,
        seed=args.seed,
    )
    name = check_shipping(describe(model)["architecture"], args.ship, args.overwrite)
    if Path(dataset.rpartition(":")[2]).is_absolute():
        raise ValueError(
            f"--ship {args.ship}: {dataset} names a place on this machine. Give it with --dataset from --data-dir on, "
            f"such as {dataset.partition(':')[0]}:{Path(dataset).name}."
        )

    def measured(folder: Path) -> dict[str, Any]:
        stored, _, weights = open_model(f"local-dir:{folder}", {}, dataset=dataset, data_dir=args.data_dir)
        return validate.measure(name, stored, dataset, weights, args, Config.read(folder))

    if tickets(model):
        model = spikezoo.bake(model)
    folder = ship(model, args.ship, measured, facts=training_facts(args.checkpoint), overwrite=args.overwrite)
    print(f"Shipped {folder}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes")
    return Config.read(folder).results


def main(argv: Sequence[str] | None = None) -> int:
    """Validate or ship what was asked for; returns 1 where a model failed, else 0."""
    parser = validate.build_parser("python validate.py")
    group = parser.add_argument_group("package")
    group.add_argument("--ship", metavar="TAG", help="put the checkpoint into the package as ARCHITECTURE.TAG")
    group.add_argument("--overwrite", action="store_true", help="with --ship: in the place of one of this name")
    args = parser.parse_args(argv)
    check_args(args)
    return validate.run(args, put_on_shelf if args.ship else validate.validate)
