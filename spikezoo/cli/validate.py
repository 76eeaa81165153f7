"""Measure accuracy, speed and firing rates of named models or checkpoints on a dataset.

    spikezoo validate --checkpoint output/quickstart
    spikezoo validate --model mpbn_resnet19
    spikezoo validate --model hf-hub:ORG/NAME
    spikezoo validate --model 'mpbn_*' --dataset cifar10 --data-dir DATA --results-file results.csv
    spikezoo validate --model all --pretrained --count --data-dir DATA --results-file docs/results.csv

Pretrained weights are taken where a model has them; where it has none and no checkpoint is given, the weights are
random, and the output says so. Weights that come with the package are compared with what was recorded of them: more
than 0.05 points of accuracy apart is a failure, and with --amp or --deploy a loss of more than 0.2 points; of a small
test set, more than one image and two.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

import torch

from spikezoo.checkpoint import Config, file_hash
from spikezoo.counting import MAC_PJ, SOP_PJ, count_loader
from spikezoo.data import Loader, create_loader
from spikezoo.deploy import PRECISIONS, deploy
from spikezoo.evaluate import check_results_file, environment, evaluate, input_options, open_model, write_rows
from spikezoo.factory import SpikingModel, is_reference, locate
from spikezoo.flags import Parser, add_flags, choose_device, whole_flags
from spikezoo.hub import check_push, push_folder, push_to_hub
from spikezoo.hub.provenance import portable_command, training_facts
from spikezoo.observe import WithRates
from spikezoo.precision import slow_bfloat16
from spikezoo.registry import list_models
from spikezoo.saving import describe

# Points of top-1 accuracy between a measurement and the record of the same weights: of float32, whose sums machines
# order differently, and of everything that rounds more.
TOLERANCE, ROUNDED_TOLERANCE = 0.05, 0.2
# Of a record, what a row of results says of the training.
TRAINING = ("seed", "epochs", "train_minutes", "train_precision", "train_command", "train_commit", "train_machine")


def build_parser(prog: str = "spikezoo validate") -> Parser:
    """The flags, named as in timm's validate.py where timm has them."""
    parser = Parser(prog, __doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--model", "-m", help="a name, a wildcard such as 'mpbn_*', or all")
    group.add_argument("--pretrained", action="store_true", help="insist on pretrained weights")
    add_flags(group, "checkpoint")
    group.add_argument("--use-ema", action="store_true", help="averaged weights of a training state")
    add_flags(group, "T", "mpbn", "neuron", "num-classes", "in-chans", "img-size", "model-kwargs")

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", "--data", help="(default: the checkpoint's, else what fits the model's input)")
    add_flags(group, "data-dir", "dataset-download", "mean", "std", "crop-pct", "interpolation", "split")
    group.add_argument("--skip-damaged", action="store_true", help="leave out, and count, images that cannot be read")
    group.add_argument("--val-subset", type=int, metavar="N", help="measure on N of the images only, classes balanced")
    add_flags(group, "batch-size", "workers")
    add_flags(group, "frames-by", "duration-us")

    group = parser.add_argument_group("run")
    add_flags(group, "amp", "amp-dtype", "channels-last", "torchcompile")
    group.add_argument(
        "--deploy",
        choices=("auto", *PRECISIONS),
        help="measure spikezoo.deploy(model, PRECISION) instead; auto: what is fastest here",
    )
    add_flags(group, "device", "seed")
    group.add_argument("--layer-rates", action="store_true", help="print and record the firing rate of every layer")
    group.add_argument("--count", action="store_true", help="MACs, synaptic operations and energy, on real images")
    group.add_argument(
        "--images", "--count-images", type=int, default=32, help="how many images to count (default: %(default)s)"
    )
    group.add_argument("--mac-pj", type=float, default=MAC_PJ, help="picojoule a MAC (default: %(default)s)")
    group.add_argument("--sop-pj", type=float, default=SOP_PJ, help="picojoule a synaptic operation")
    group.add_argument(
        "--results-file", metavar="FILE", help="write the rows with all that they depend on: .csv or .json"
    )
    group.add_argument("--json", action="store_true", help="print them as JSON in place of the table")
    group.add_argument(
        "--push-to-hub", metavar="ORG/NAME", help="publish the checkpoint with the figures measured here"
    )
    return parser


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of create_model that flags give."""
    given = {key: getattr(args, key) for key in ("T", "mpbn", "neuron", "num_classes", "in_chans", "img_size")}
    return {key: value for key, value in given.items() if value is not None} | args.model_kwargs


def validate(name: str, args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Validate one model and return its result row."""
    given = arguments_of(args)
    stored = config.model_args
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
    shipped = not args.checkpoint and weights != "random"
    if shipped:
        config = Config.read(model.pretrained_cfg["file"])
    row = measure(name, model, dataset, weights, args, config)
    if shipped:
        record = config.results
        row |= {key: record[key] for key in (*TRAINING, "bytes", "sparsity") if key in record}
        same = (args.split, row["T"]) == (record.get("split"), record.get("T"))
        if same and not given and dataset == record.get("dataset"):
            row |= compare(row, record)
    if args.push_to_hub:
        row["published"] = publish(model, args, config, row)
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


def loader_for(name: str, model: SpikingModel, dataset: str, args: argparse.Namespace, own: str | None) -> Loader:
    """The batches to measure a model on.

    Raises:
        ValueError: The dataset has other classes than the model.
        FileNotFoundError: It is not there; the message says where it would come from.
    """
    try:
        loader = create_loader(
            dataset,
            args.split,
            data_dir=args.data_dir,
            download=args.dataset_download,
            batch_size=args.batch_size,
            device=choose_device(args.device),
            subset=args.val_subset,
            img_size=model.img_size[0],
            in_chans=model.in_chans,
            channels_last=args.channels_last,
            num_workers=args.workers,
            skip_damaged=args.skip_damaged,
            **input_options(
                model,
                dataset,
                args.mean,
                args.std,
                args.frames_by,
                args.duration_us,
                args.crop_pct,
                args.interpolation,
            ),
        )
    except FileNotFoundError as error:
        if own is None:  # random weights fit whatever is there
            raise
        advice = f"{name} was trained on {own}: of --dataset, only that gives its accuracy."
        raise FileNotFoundError(f"{str(error).partition('; or --dataset')[0]}. {advice}") from error
    classes = loader.info.num_classes
    # A net may have been trained with more classes than its own data has.
    if classes > model.num_classes or (0 < classes < model.num_classes and dataset != own):
        raise ValueError(
            f"{name} has {model.num_classes} classes and {dataset} has {classes}: give the --dataset it was made for."
        )
    return loader


def measure(
    name: str, model: SpikingModel, dataset: str, weights: str, args: argparse.Namespace, config: Config
) -> dict[str, Any]:
    """Measure a model that is open already, and return its row."""
    device = choose_device(args.device)
    loader = loader_for(name, model, dataset, args, config.dataset)
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    half = torch.bfloat16 if args.amp_dtype == "bfloat16" else torch.float16
    if args.amp and half is torch.bfloat16 and (said := slow_bfloat16(device)):
        print(said, file=sys.stderr)
    fast = deploy(model.eval(), args.deploy) if args.deploy else None
    result = evaluate(
        fast or model,
        loader,
        rates=fast is None,
        device=device,
        autocast=functools.partial(torch.autocast, device.type, half) if args.amp else nullcontext,
        compiled=torch.compile(WithRates(model)) if args.torchcompile else None,
        progress=sys.stderr.isatty(),
    )
    layers = result.pop("layer_firing_rates")
    row = row_of(name, model, dataset, weights, args, loader, result)
    row["deployed"] = fast and fast.precision
    rate = row["firing_rate"]
    print(
        f"{name} on {dataset}/{args.split} ({row['samples']:,} images): top-1 {row['top1']:.2f} %, top-5 "
        f"{row['top5']:.2f} %, loss {row['loss']:.4f}, {row['images_per_second']:.0f} images/s, "
        f"{row['param_count']:,} parameters, T={model.T}, "
        + (f"firing rate {rate:.4f}" if rate is not None else f"deployed {fast.precision}" if fast else "no spikes")
        + f", weights {weights}",
        flush=True,
    )
    if args.count:
        row |= count_row(model, loader, args)
    if args.layer_rates:
        for layer, value in layers.items():
            print(f"    {layer:<40} {value:.4f}")
        row["layer_firing_rates"] = {layer: round(value, 6) for layer, value in layers.items()}
    return row


def row_of(
    name: str,
    model: SpikingModel,
    dataset: str,
    weights: str,
    args: argparse.Namespace,
    loader: Loader,
    result: dict[str, Any],
) -> dict[str, Any]:
    """The results row of what was measured, with everything that it depends on."""
    rate = result["firing_rate"]
    return {
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
        "firing_rate": None if rate is None else round(rate, 6),
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
        "deployed": None,
        "device": str(choose_device(args.device)),
        "seed": args.seed,
        "command": args.command,
        **environment(),
    }


def count_row(model: SpikingModel, loader: Loader, args: argparse.Namespace) -> dict[str, Any]:
    """Count a model, say what came of it, and return what joins its row."""
    # Outside autocast and uncompiled: counts belong to the model, not to how it runs.
    prices = {"mac_pj": args.mac_pj, "sop_pj": args.sop_pj}
    inputs = "auto" if model.takes_events else "analog"  # pixels are no spikes, whatever their values
    counted = count_loader(model, loader, args.images, inputs=inputs, **prices)
    mean = counted.mean
    print(
        f"    {mean.macs:,.0f} MACs; SOPs {mean.sops_paper:,.0f} (paper), {mean.sops_exact:,.0f} (exact); energy "
        f"{mean.energy_paper_mj:.4g} mJ (paper), {mean.energy_exact_mj:.4g} mJ (exact), "
        f"{mean.percent_of_ann_paper:.1f} % and {mean.percent_of_ann_exact:.1f} % of the ANN twin's "
        f"{mean.energy_ann_mj:.4g} mJ; {counted.images} images; "
        f"not counted: {', '.join(mean.uncounted) or 'nothing'}"
    )
    return mean.row() | {f"{key}_std": None if math.isnan(value) else value for key, value in counted.std.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Two lines and more: what was measured, side by side."""
    columns = {"model": "model", "dataset": "data", "samples": "images", "T": "T", "top1": "top-1", "top5": "top-5"}
    columns |= {"loss": "loss", "firing_rate": "firing rate", "images_per_second": "images/s"}
    if any(row.get("energy_exact_mj") is not None for row in rows):
        columns |= {"energy_exact_mj": "mJ exact", "energy_paper_mj": "mJ paper"}

    def cell(value: object) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [list(columns.values()), *([cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def publish(model: SpikingModel, args: argparse.Namespace, config: Config, row: dict[str, Any]) -> str:
    """Push the very weights that were measured, with the figures."""
    # What the folder already says about training stays beside what was measured now.
    facts = training_facts(args.checkpoint) if args.checkpoint else {}
    row = {**config.results, **row, **facts}
    same = describe(model)["model_args"] == config.model_args and not args.use_ema
    if args.checkpoint and same:
        return push_folder(args.checkpoint, args.push_to_hub, results=row)
    return push_to_hub(model, args.push_to_hub, row)


def select(args: argparse.Namespace, config: Config) -> list[str]:
    """Names to validate."""
    name = args.model or config.architecture
    if not name:
        hint = f"{args.checkpoint} has no config.json beside it: " if args.checkpoint else ""
        raise ValueError(f"{hint}give --model NAME, see spikezoo.list_models().")
    if name != "all" and "*" not in name and "?" not in name:
        return [name]
    found = list_models("" if name == "all" else name, pretrained=args.pretrained)
    if not found:
        which, where = (" with pretrained weights", "list_pretrained") if args.pretrained else ("", "list_models")
        raise ValueError(f"No model{which} matches {name!r}. See spikezoo.{where}().")
    return found


def check_args(args: argparse.Namespace) -> None:
    """Raise where flags make no sense together, before anything is opened.

    Raises:
        ValueError: It names the flags.
    """
    whole_flags(args, "batch_size", "images", "val_subset")
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
    if args.push_to_hub:
        check_push(args.push_to_hub)
        if args.val_subset:
            raise ValueError(
                f"--push-to-hub {args.push_to_hub} publishes what the whole split gives, not --val-subset."
            )


def run(args: argparse.Namespace, each: Callable[..., dict[str, Any]] = validate) -> int:
    """Validate what was asked for with parsed flags.

    Args:
        args: Of :func:`build_parser`.
        each: What is done with each name: :func:`validate`, or what its callers put around it.

    Returns:
        1 where a model failed, else 0.
    """
    logging.getLogger("timm").setLevel(logging.WARNING)
    args.command = portable_command(args.command)
    if args.model and is_reference(args.model):
        args.checkpoint, args.model = str(locate(args.model)), None
    check_args(args)
    config = Config.read(args.checkpoint) if args.checkpoint else Config()
    names = select(args, config)
    for flag, given in (("--push-to-hub", args.push_to_hub), ("--checkpoint", args.checkpoint)):
        if given and len(names) > 1:
            does = "publishes one model" if flag == "--push-to-hub" else "fits one model"
            raise ValueError(f"{flag} {does} and --model {args.model!r} names {len(names)}.")
    rows: list[dict[str, Any]] = []
    failed = 0
    for name in names:
        try:
            with redirect_stdout(sys.stderr) if args.json else nullcontext():
                rows.append(each(name, args, config))
            failed += not rows[-1].get("reproduced", True)
        except Exception as error:  # whatever is wrong with one model, the others get their rows
            if len(names) == 1:
                raise
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            rows.append({"model": name, "error": str(error)})
        if args.results_file:
            write_rows(args.results_file, rows)
    if args.json:
        print(json.dumps(rows[0] if len(rows) == 1 else rows, indent=2))
        return int(failed > 0)
    print(f"\n{table(rows)}")
    if args.results_file:
        print(f"Wrote {len(rows)} row{'s' * (len(rows) != 1)} to {args.results_file}")
    return int(failed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and validate; returns 1 where a model failed, else 0."""
    parser = build_parser()
    parser.add_argument("--ship", metavar="TAG", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.ship is not None:
        raise ValueError(
            f"--ship {args.ship} writes into the package's own sources: in a checkout of its repository, run "
            f"python validate.py --checkpoint DIR --ship {args.ship}."
        )
    return run(args)
