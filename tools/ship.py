"""Validate, and put checkpoints into the package: ``python validate.py --checkpoint output/snn --ship cifar10``.

--ship TAG stores a checkpoint in eight bits a weight or less, measures it as it is stored, and writes its model card.
All other flags are those of ``spikezoo validate``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import spikezoo
from spikezoo.checkpoint import Config
from spikezoo.cli import validate
from spikezoo.evaluate import open_model
from spikezoo.hub.provenance import training_facts
from spikezoo.hub.ship import check_shipping, ship
from spikezoo.saving import describe
from spikezoo.transforms.tickets import tickets

__all__ = ["main"]


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
