#!/usr/bin/env python3
"""Validate spiking networks: accuracy, speed and firing rates of named models or checkpoints on a dataset.

    python validate.py --checkpoint output/quickstart
    python validate.py --model mpbn_resnet19
    python validate.py --model hf-hub:ORG/NAME
    python validate.py --model 'mpbn_*' --dataset cifar10 --data-dir DATA --results-file results.csv
    python validate.py --model all --pretrained --count --data-dir DATA --results-file docs/results.csv
    python validate.py --checkpoint output/snn --ship cifar10 --data-dir DATA

Pretrained weights are taken where a model has them; where it has none and no checkpoint is given, the weights are
random, and the output says so. Weights that come with the package are compared with what was recorded of them: more
than 0.05 points of accuracy apart is a failure, and with --amp or --deploy a loss of more than 0.2 points; of a small
test set, more than one image and two. --ship TAG puts a checkpoint into the
package, in eight bits a weight or less, measured as it is stored.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.utils import ParseKwargs

import spikezoo
from spikezoo.checkpoint import file_hash, read_config
from spikezoo.counting import MAC_PJ, SOP_PJ, count_loader
from spikezoo.data import create_loader
from spikezoo.deploy import PRECISIONS
from spikezoo.evaluate import check_results_file, environment, evaluate, input_options, open_model, write_rows
from spikezoo.hub import check_repo_id, check_shipping, describe, portable_command, ship, training_facts
from spikezoo.observe import WithRates
from spikezoo.registry import is_reference, locate
from spikezoo.transforms.tickets import tickets

# Points of top-1 accuracy between a measurement and the record of the same weights: of float32, whose sums machines
# order differently, and of everything that rounds more.
TOLERANCE, ROUNDED_TOLERANCE = 0.05, 0.2
# Of a record, what a row of results says of the training.
TRAINING = ("seed", "epochs", "train_minutes", "train_precision", "train_command", "train_commit", "train_machine")


def build_parser() -> argparse.ArgumentParser:
    """The flags, named as in timm's validate.py where timm has them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what")
    group.add_argument("--model", "-m", help="a name, a wildcard such as 'mpbn_*', or all")
    group.add_argument("--pretrained", action="store_true", help="insist on pretrained weights")
    group.add_argument("--checkpoint", metavar="FILE_OR_DIR", help="weights, or a folder that train.py wrote")
    group.add_argument("--use-ema", action="store_true", help="averaged weights of a training state")
    group.add_argument("--T", type=int, help="time steps (default: the checkpoint's, else the model's)")
    group.add_argument("--mpbn", help="channel, element or none (default: the checkpoint's, else the model's)")
    group.add_argument("--neuron", help="lif, if, plif, relu or sign (default: the checkpoint's, else the model's)")
    group.add_argument("--num-classes", type=int)
    group.add_argument("--in-chans", type=int)
    group.add_argument("--img-size", type=int)
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="K=V",
        help="further arguments of create_model",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", "--data", help="(default: the checkpoint's, else what fits the model's input)")
    group.add_argument("--data-dir", metavar="DIR", help="folder of the dataset (default: $SPIKEZOO_DATA or ./data)")
    group.add_argument("--dataset-download", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument(
        "--mean",
        type=float,
        nargs="+",
        metavar="X",
        help="of the channels, for the normalisation: one number or one a channel (default: the checkpoint's, else "
        "the dataset's)",
    )
    group.add_argument("--std", type=float, nargs="+", metavar="X", help="likewise")
    group.add_argument("--split", default="test")
    group.add_argument("-b", "--batch-size", type=int, default=128)
    group.add_argument("-j", "--workers", type=int, default=2)
    group.add_argument(
        "--frames-by", help="of event recordings: number, time or duration (default: the checkpoint's, else number)"
    )
    group.add_argument("--duration-us", type=int, metavar="US", help="length of a frame (default: the checkpoint's)")

    group = parser.add_argument_group("run")
    group.add_argument("--amp", action="store_true", help="mixed precision")
    group.add_argument("--amp-dtype", default="bfloat16", choices=("bfloat16", "float16"))
    group.add_argument("--channels-last", action="store_true")
    group.add_argument("--torchcompile", action="store_true")
    group.add_argument("--deploy", choices=PRECISIONS, help="measure spikezoo.deploy(model, PRECISION) instead")
    group.add_argument("--device", help="(default: cuda where there is one)")
    group.add_argument("--seed", type=int, default=42, help="of random weights")
    group.add_argument("--layer-rates", action="store_true", help="print and record the firing rate of every layer")
    group.add_argument("--count", action="store_true", help="MACs, synaptic operations and energy, on real images")
    group.add_argument("--count-images", type=int, default=32, help="how many images to count (default: %(default)s)")
    group.add_argument("--mac-pj", type=float, default=MAC_PJ, help="picojoule a MAC (default: %(default)s)")
    group.add_argument("--sop-pj", type=float, default=SOP_PJ, help="picojoule a synaptic operation")
    group.add_argument("--results-file", metavar="FILE", help=".csv or .json")
    group.add_argument(
        "--push-to-hub", metavar="ORG/NAME", help="publish the checkpoint with the figures measured here"
    )
    group.add_argument("--ship", metavar="TAG", help="put the checkpoint into the package as ARCHITECTURE.TAG")
    group.add_argument("--overwrite", action="store_true", help="with --ship: in the place of one of this name")
    return parser


def validate(name: str, args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Validate one model and return its result row."""
    given = {key: getattr(args, key) for key in ("T", "mpbn", "neuron", "num_classes", "in_chans", "img_size")}
    given = {key: value for key, value in given.items() if value is not None} | args.model_kwargs
    stored = config.get("model_args", {})
    if "T" in given and stored.get("T", given["T"]) != given["T"]:
        print(f"{name}: the checkpoint was made with T={stored['T']} and is evaluated with T={given['T']}.")
    model, dataset, weights = open_model(
        name,
        given,
        checkpoint=args.checkpoint,
        ema=args.use_ema,
        pretrained=args.pretrained,
        dataset=args.dataset,
        data_dir=args.data_dir,
        seed=args.seed,
    )
    if weights == "random":
        if args.push_to_hub:
            raise ValueError(f"--push-to-hub {args.push_to_hub}: the weights are random. Give --checkpoint.")
        print(
            f"{name}: no pretrained weights and no --checkpoint, so its weights are random (seed {args.seed}): "
            "expect the accuracy of guessing."
        )
    if args.ship:
        return put_on_shelf(model, dataset, args)
    shipped = not args.checkpoint and weights != "random"
    if shipped:
        config = read_config(model.pretrained_cfg["file"])
    row = measure(name, model, dataset, weights, args, config)
    if shipped:
        record = config.get("spikezoo", {}).get("results", {})
        row |= {key: record[key] for key in (*TRAINING, "bytes", "sparsity") if key in record}
        same = (args.split, row["T"]) == (record.get("split"), record.get("T"))
        if same and not given and dataset == record.get("dataset"):
            row |= compare(row, record)
    if args.push_to_hub:
        row["published"] = publish(model, weights, args, config, row)
        print(f"Published {row['published']}")
    return row


def compare(row: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Hold a measurement against what was recorded of the same weights on the same data.

    Returns:
        ``recorded_top1``, and ``reproduced``, whether they agree; what is said of it is printed.
    """
    rounded = row["precision"] != "float32" or row["deployed"] in ("bf16", "int8")
    # Of few images a single one is more points than any limit: one that another machine's sums decide the other way,
    # two where rounding is meant to move the logits.
    limit = max(ROUNDED_TOLERANCE if rounded else TOLERANCE, 100 * (2 if rounded else 1) / row["samples"])
    difference = row["top1"] - record["top1"]
    other = [key for key in ("samples", "split_note") if row.get(key) != record.get(key)]
    loss = -difference if rounded else abs(difference)
    reproduced = loss <= limit + 1e-4 and not other
    told = f"recorded {record['top1']:.2f} %, difference {difference:+.2f} points"
    if other:
        told += f", of other data: {other[0]} {row.get(other[0])}, recorded {record.get(other[0])}"
    verdict = "reproduced" if reproduced else "NOT reproduced"
    print(f"    {told}: {verdict} ({'loss' if rounded else 'within'} {limit:.2f} points)", flush=True)
    return {"recorded_top1": record["top1"], "reproduced": reproduced}


def put_on_shelf(model: Any, dataset: str, args: argparse.Namespace) -> dict[str, Any]:
    """Put a trained model into the package, measured as it is stored there, and return its row."""
    name = check_shipping(describe(model)["architecture"], args.ship, args.overwrite)
    if Path(dataset.rpartition(":")[2]).is_absolute():
        raise ValueError(
            f"--ship {args.ship}: {dataset} names a place on this machine. Give it with --dataset from --data-dir on, "
            f"such as {dataset.partition(':')[0]}:{Path(dataset).name}."
        )

    def measured(folder: Path) -> dict[str, Any]:
        stored, _, weights = open_model(f"local-dir:{folder}", {}, dataset=dataset, data_dir=args.data_dir)
        return measure(name, stored, dataset, weights, args, read_config(folder))

    if tickets(model):
        model = spikezoo.bake(model)
    folder = ship(model, args.ship, measured, facts=training_facts(args.checkpoint), overwrite=args.overwrite)
    print(f"Shipped {folder}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes")
    return dict(read_config(folder)["spikezoo"]["results"])


def measure(
    name: str, model: Any, dataset: str, weights: str, args: argparse.Namespace, config: dict[str, Any]
) -> dict[str, Any]:
    """Measure a model that is open already, and return its row."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: no CUDA device is available here. Use --device cpu.")
    loader = create_loader(
        dataset,
        args.split,
        data_dir=args.data_dir,
        download=args.dataset_download,
        batch_size=args.batch_size,
        device=device,
        img_size=model.img_size[0],
        in_chans=model.in_chans,
        channels_last=args.channels_last,
        num_workers=args.workers,
        **input_options(model, dataset, args.mean, args.std, args.frames_by, args.duration_us),
    )
    classes, own = loader.info.num_classes, config.get("spikezoo", {}).get("dataset")
    # A net may have been trained with more classes than its own data has.
    if classes > model.num_classes or (0 < classes < model.num_classes and dataset != own):
        raise ValueError(
            f"{name} has {model.num_classes} classes and {dataset} has {classes}: give the --dataset it was made for."
        )
    model.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    half = torch.bfloat16 if args.amp_dtype == "bfloat16" else torch.float16
    result = evaluate(
        spikezoo.deploy(model.eval(), args.deploy) if args.deploy else model,
        loader,
        rates=not args.deploy,
        device=device,
        autocast=functools.partial(torch.autocast, device.type, half) if args.amp else nullcontext,
        compiled=torch.compile(WithRates(model)) if args.torchcompile else None,
        progress=sys.stderr.isatty(),
    )
    layers = result.pop("layer_firing_rates")
    row = {
        "model": name,
        "top1": round(result["top1"], 4),
        "top1_err": round(100 - result["top1"], 4),
        "top5": round(result["top5"], 4),
        "top5_err": round(100 - result["top5"], 4),
        "loss": round(result["loss"], 6),
        "images_per_second": round(result["images_per_second"], 1),
        "param_count": sum(p.numel() for p in model.parameters()),
        "T": model.T,
        "neuron": model.neuron_config.kind,
        "mpbn": model.mpbn or "none",
        "firing_rate": None if result["firing_rate"] is None else round(result["firing_rate"], 6),
        "dataset": dataset,
        "split": args.split,
        **loader.facts,
        "samples": result["samples"],
        "img_size": model.img_size[0],
        "weights": weights,
        "checkpoint_sha256": None if weights == "random" else file_hash(model.pretrained_cfg["file"]),
        "batch_size": args.batch_size,
        "precision": args.amp_dtype if args.amp else "float32",
        "compiled": args.torchcompile,
        "deployed": args.deploy,
        "device": str(device),
        "seed": args.seed,
        "command": args.command,
        **environment(),
    }
    rate = row["firing_rate"]
    print(
        f"{name} on {dataset}/{args.split} ({row['samples']:,} images): top-1 {row['top1']:.2f} %, top-5 "
        f"{row['top5']:.2f} %, loss {row['loss']:.4f}, {row['images_per_second']:.0f} images/s, "
        f"{row['param_count']:,} parameters, T={model.T}, "
        + (f"firing rate {rate:.4f}" if rate is not None else f"deployed {args.deploy}" if args.deploy else "no spikes")
        + f", weights {weights}",
        flush=True,
    )
    if args.count:
        # Outside autocast and uncompiled: counts belong to the model, not to how it runs.
        prices = {"mac_pj": args.mac_pj, "sop_pj": args.sop_pj}
        inputs = "auto" if model.takes_events else "analog"  # pixels are no spikes, whatever their values
        counted = count_loader(model, loader, args.count_images, inputs=inputs, **prices)
        mean = counted.mean
        row |= mean.row() | {f"{key}_std": None if math.isnan(value) else value for key, value in counted.std.items()}
        print(
            f"    {mean.macs:,.0f} MACs; SOPs {mean.sops_paper:,.0f} (paper), {mean.sops_exact:,.0f} (exact); energy "
            f"{mean.energy_paper_mj:.4g} mJ (paper), {mean.energy_exact_mj:.4g} mJ (exact), "
            f"{mean.percent_of_ann_paper:.1f} % and {mean.percent_of_ann_exact:.1f} % of the ANN twin's "
            f"{mean.energy_ann_mj:.4g} mJ; {counted.images} images; "
            f"not counted: {', '.join(mean.uncounted) or 'nothing'}"
        )
    if args.layer_rates:
        for layer, value in layers.items():
            print(f"    {layer:<40} {value:.4f}")
        row["layer_firing_rates"] = {layer: round(value, 6) for layer, value in layers.items()}
    return row


def publish(model: Any, weights: str, args: argparse.Namespace, config: dict[str, Any], row: dict[str, Any]) -> str:
    """Push the very weights that were measured, with the figures."""
    # What the folder already says about training stays beside what was measured now.
    facts = training_facts(args.checkpoint) if args.checkpoint else {}
    row = {**config.get("spikezoo", {}).get("results", {}), **row, **facts}
    same = describe(model)["model_args"] == config.get("model_args") and not args.use_ema
    if args.checkpoint and same:
        return spikezoo.push_folder(args.checkpoint, args.push_to_hub, results=row)
    return spikezoo.push_to_hub(model, args.push_to_hub, row)


def select(args: argparse.Namespace, config: dict[str, Any]) -> list[str]:
    """Names to validate."""
    name = args.model or config.get("architecture")
    if not name:
        hint = f"{args.checkpoint} has no config.json beside it: " if args.checkpoint else ""
        raise ValueError(f"{hint}give --model NAME, see spikezoo.list_models().")
    if name != "all" and "*" not in name and "?" not in name:
        return [name]
    found = spikezoo.list_models("" if name == "all" else name, pretrained=args.pretrained)
    if not found:
        which, where = (" with pretrained weights", "list_pretrained") if args.pretrained else ("", "list_models")
        raise ValueError(f"No model{which} matches {name!r}. See spikezoo.{where}().")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Validate what was asked for; returns the number of models that failed."""
    logging.getLogger("timm").setLevel(logging.WARNING)
    args = build_parser().parse_args(argv)
    argv = sys.argv[1:] if argv is None else argv
    args.command = portable_command(shlex.join(["python", "validate.py", *argv]))
    if args.model and is_reference(args.model):
        args.checkpoint, args.model = str(locate(args.model)), None
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: expected at least 1.")
    if args.count_images < 1:
        raise ValueError(f"--count-images {args.count_images}: expected at least 1.")
    for flag, price in (("--mac-pj", args.mac_pj), ("--sop-pj", args.sop_pj)):
        if not 0 <= price < math.inf:
            raise ValueError(f"{flag} {price}: expected an energy in picojoule, a number >= 0.")
    if args.results_file:
        check_results_file(args.results_file)
    if args.deploy and (args.amp or args.torchcompile or args.layer_rates):
        raise ValueError(
            f"--deploy {args.deploy} sets the precision, compiles and measures no firing rates: leave --amp, "
            "--torchcompile and --layer-rates out."
        )
    if args.ship:
        if not args.checkpoint:
            raise ValueError(f"--ship {args.ship}: the weights are random, or shipped already. Give --checkpoint.")
        if args.amp or args.deploy or args.torchcompile or args.push_to_hub or args.split != "test":
            raise ValueError(
                f"--ship {args.ship} measures in float32 on the whole test split: leave --amp, --deploy, "
                "--torchcompile, --push-to-hub and --split out."
            )
        if args.mean or args.std or args.frames_by or args.duration_us:
            raise ValueError(
                f"--ship {args.ship}: leave --mean, --std, --frames-by and --duration-us to the checkpoint."
            )
        args.count = True
    elif args.overwrite:
        raise ValueError("--overwrite is for --ship TAG.")
    config = read_config(args.checkpoint) if args.checkpoint else {}
    names = select(args, config)
    if args.push_to_hub:
        check_repo_id(args.push_to_hub)
    if args.push_to_hub and len(names) > 1:
        raise ValueError(f"--push-to-hub publishes one model and --model {args.model!r} names {len(names)}.")
    if args.checkpoint and len(names) > 1:
        raise ValueError(f"--checkpoint fits one model and --model {args.model!r} names {len(names)}.")
    rows: list[dict[str, Any]] = []
    failed = 0
    for name in names:
        try:
            rows.append(validate(name, args, config))
            failed += not rows[-1].get("reproduced", True)
        except Exception as error:  # whatever is wrong with one model, the others get their rows
            if len(names) == 1:
                raise
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            rows.append({"model": name, "error": str(error)})
        if args.results_file:
            write_rows(args.results_file, rows)
    if args.results_file:
        print(f"Wrote {len(rows)} row{'s' * (len(rows) != 1)} to {args.results_file}")
    elif len(rows) == 1:
        print(json.dumps(rows[0], indent=2))
    return failed


if __name__ == "__main__":
    try:
        sys.exit(min(main(), 1))
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
