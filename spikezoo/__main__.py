"""Command line of the library: ``python -m spikezoo``.

    count          what a model costs, layer by layer
    patches        a picture of the patches that MultiSp keeps
    activations    a picture of the activation maps of several checkpoints
    convert        make a spiking network of a trained ReLU network, and its accuracy over time
    export         write a model as ONNX or NIR
    events         a picture of a recording's event frames
    raster         a picture of a layer's spikes, and the firing rates of all layers, over time
    push           publish a checkpoint on the Hugging Face Hub, or all that come with the package
    results        the tables and the picture of what was measured, beside the papers' numbers
    dynsnn         remove neurons that hardly fire, without training; or print the table of a plan of such runs
    search         find AutoST architectures
    correlation    train a sample of them and see how well the metrics rank them

Example:
    python -m spikezoo count mpbn_resnet20
    python -m spikezoo count test_spiking_vgg --dataset none --images 4 --json
    python -m spikezoo count --checkpoint output/quickstart --plot bars.png
    python -m spikezoo patches --checkpoint output/multisp --plot patches.png
    python -m spikezoo activations --checkpoint output/ann output/bnn output/ticket --plot maps.png
    python -m spikezoo convert --checkpoint output/ann --T 64 --mode 99.9% --plot curve.png --output output/snn
    python -m spikezoo export --checkpoint output/quickstart --output quickstart.onnx
    python -m spikezoo dynsnn --checkpoint output/quickstart --tolerance 0.3 --output smaller --plot-threshold sweep.png
    python -m spikezoo dynsnn --table output/table1
    python -m spikezoo events nmnist --data-dir DATA --T 10 --plot events.png
    python -m spikezoo raster --checkpoint output/nmnist_subset --data-dir DATA --plot raster.png
    python -m spikezoo push output/quickstart ORG/NAME --dry-run card
    python -m spikezoo push --all --org ORG --dry-run cards
    python -m spikezoo results --add output/conv4_cpu
    python -m spikezoo results --plot docs/zoo.png
    python -m spikezoo search --space tiny --params 4.0e6:4.22e6 --output found
    python -m spikezoo correlation --config configs/autost/correlation_small.yaml --data-dir DATA --output ranks
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikezoo import pictures, results, search
from spikezoo.checkpoint import read_config
from spikezoo.convert import convert
from spikezoo.counting import MAC_PJ, SOP_PJ, count_loader
from spikezoo.data import create_loader, dataset_info
from spikezoo.data.events import open_events
from spikezoo.deploy import PRECISIONS, deploy
from spikezoo.evaluate import (
    accuracy_over_time,
    check_results_file,
    environment,
    evaluate,
    input_options,
    open_model,
    write_rows,
)
from spikezoo.export import check_suffix, export
from spikezoo.hub import push_all, push_folder, save_checkpoint, training_facts
from spikezoo.transforms import apply
from spikezoo.transforms.dynsnn import (
    compacted,
    dynsnn_report,
    fade,
    find_threshold,
    neuron_rates,
    prune,
    sweep_thresholds,
    threshold_for,
)
from spikezoo.transforms.multisp import PatchSelection, kept_patches


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the dataset")
    parser.add_argument("--dataset-download", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=42, help="of random weights and noise")


def _loader(
    args: argparse.Namespace, dataset: str, model: Any, images: int, split: str | None = None, **options: Any
) -> Any:
    """Batches of a dataset's images or recordings as a model takes them."""
    return create_loader(
        dataset,
        split or args.split,
        data_dir=args.data_dir,
        download=args.dataset_download,
        batch_size=images,
        img_size=model.img_size[0],
        in_chans=model.in_chans,
        num_workers=0,
        **input_options(model, dataset),
        **options,
    )


def _noise(model: Any, images: int) -> Tensor:
    """Random input of a model; of a model that encodes pixels, in [0, 1]."""
    return (torch.randn if model.encoding == "direct" else torch.rand)(images, *model.input_shape)


def _to_device(model: Any, device: str) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError where torch has no CUDA in it
        raise ValueError(f"--device {device}: {error} Use --device cpu.") from error


def _image(loader: Any, number: int, where: str) -> Tensor:
    """One image of a loader whose batches have one."""
    if not 0 <= number < len(loader):
        raise ValueError(f"image={number}: {where} has images 0 to {len(loader) - 1}.")
    return next(loader.iterate(number))[0][0]


def _open(
    args: argparse.Namespace, name: str | None, checkpoint: str | None, given: dict[str, Any], dataset: str | None
) -> tuple[str, Any, str, str]:
    """Name, model, dataset and where the weights come from, of a name or a checkpoint."""
    name = name or (read_config(checkpoint).get("architecture") if checkpoint else None)
    if not name:
        raise ValueError(
            "Which model? Give its name, such as spikformer_tiny, or a --checkpoint with a config.json that names it."
        )
    return name, *open_model(
        name, given, checkpoint=checkpoint, dataset=dataset, data_dir=args.data_dir, seed=args.seed
    )


def _add_count(commands: Any) -> None:
    parser = commands.add_parser("count", help="MACs, synaptic operations, energy and firing rates of a model")
    parser.add_argument("name", nargs="?", help="model, see spikezoo.list_models() (default: the checkpoint's)")
    parser.add_argument("--checkpoint", metavar="FILE_OR_DIR", help="weights, or a folder that train.py wrote")
    parser.add_argument("--T", type=int, help="time steps")
    parser.add_argument("--neuron", help="lif, if, plif, relu (the ANN twin) or sign")
    parser.add_argument("--mpbn", help="channel, element or none")
    parser.add_argument(
        "--dataset", help="(default: the checkpoint's, else what fits the model's input; none is random noise)"
    )
    _add_data(parser)
    parser.add_argument("--images", type=int, default=32, help="average over so many images (default: %(default)s)")
    parser.add_argument(
        "-b", "--batch-size", type=int, default=1, help="images counted at once; the spread is between such batches"
    )
    parser.add_argument("--mac-pj", type=float, default=MAC_PJ, help="picojoule a MAC (default: %(default)s)")
    parser.add_argument("--sop-pj", type=float, default=SOP_PJ, help="picojoule a SOP (default: %(default)s)")
    parser.add_argument("--pj-per-byte", type=float, help="also the energy of memory traffic")
    parser.add_argument("--norm-ops", type=int, default=0, help="operations per element of a norm (default: none)")
    parser.add_argument("--neuron-ops", action="store_true", help="also a MAC per neuron and step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw where the operations are")
    parser.set_defaults(run=_count)


def _count(args: argparse.Namespace) -> int:
    if args.images < 1 or args.batch_size < 1:
        raise ValueError(f"images={args.images}, batch-size={args.batch_size}: expected integers >= 1.")
    given = {key: getattr(args, key) for key in ("T", "neuron", "mpbn") if getattr(args, key) is not None}
    name, model, dataset, weights = _open(args, args.name, args.checkpoint, given, args.dataset)
    _to_device(model, args.device)
    loader: Iterable[Any]
    loader = [_noise(model, args.images)] if dataset == "none" else _loader(args, dataset, model, min(args.images, 64))
    summary = count_loader(
        model,
        loader,
        args.images,
        piece=args.batch_size,
        mac_pj=args.mac_pj,
        sop_pj=args.sop_pj,
        pj_per_byte=args.pj_per_byte,
        norm_ops=args.norm_ops,
        neuron_ops=args.neuron_ops,
        inputs="auto" if model.takes_events else "analog",  # pixels are no spikes, even where they are whole numbers
    )
    source = "random noise" if dataset == "none" else f"{dataset}/{args.split}"
    if args.plot:
        pictures.draw_operations(summary.mean, args.plot, f"{name}: operations per image ({source}, weights {weights})")
    if args.json:
        std = {key: None if math.isnan(value) else value for key, value in summary.std.items()}  # JSON has no nan
        facts = {"model": name, "data": source, "weights": weights, "piece": summary.piece, "std": std}
        print(json.dumps({**facts, "count": summary.mean.to_dict()}, indent=2))
        return 0
    said = f"random weights (seed {args.seed})" if weights == "random" else f"weights {weights}"
    print(f"{name}, {said}, {summary.images} images of {source}\n")
    print(summary.mean.table())
    between = "images" if summary.piece == 1 else f"batches of {summary.piece} images"
    spread = ", ".join(f"{key} {value:.4g}" for key, value in summary.std.items())
    print(f"\nStandard deviation between {between}: {spread}")
    return 0


def _add_patches(commands: Any) -> None:
    parser = commands.add_parser("patches", help="draw which patches of real images MultiSp keeps")
    parser.add_argument("name", nargs="?", help="a Spikformer or AutoST model (default: the checkpoint's)")
    parser.add_argument("--checkpoint", metavar="FILE_OR_DIR", help="weights, or a folder that train.py wrote")
    parser.add_argument(
        "--patch-ratio", type=float, help="fraction of the patches removed, for a model that keeps all (default: 0.3)"
    )
    parser.add_argument("--dataset", help="(default: the checkpoint's, else what fits the model's input)")
    _add_data(parser)
    parser.add_argument("--images", type=int, default=8, help="the first so many (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE", required=True, help="picture to write: .png, .pdf or .svg")
    parser.set_defaults(run=_patches)


def _patches(args: argparse.Namespace) -> int:
    pictures.check_picture(args.plot)
    if args.images < 1:
        raise ValueError(f"images={args.images}: expected an integer >= 1.")
    name, model, dataset, weights = _open(args, args.name, args.checkpoint, {}, args.dataset)
    selects = any(isinstance(module, PatchSelection) for module in model.modules())
    if args.patch_ratio is not None or not selects:
        ratio = 0.3 if args.patch_ratio is None else args.patch_ratio
        model = apply(model, "multisp", pep_sparsity=0, binary_pep=False, patch_ratio=ratio)
    loader = _loader(args, dataset, model, args.images)
    images = next(iter(loader))[0]
    pixels = pictures.to_pixels(images, loader.info.mean, loader.info.std)
    made = pictures.caption(model).replace("\n", ", ") + (", random weights" if weights == "random" else "")
    title = f"{made}; {dataset}/{args.split}"
    mask = kept_patches(model.eval(), images)
    pictures.draw_patches(pixels, mask, args.plot, title)
    kept, total = int(mask[0].sum()), mask[0].numel()
    print(f"{name} keeps {kept} of {total} patches. Wrote {args.plot}")
    if mask.flatten(1)[:, :kept].all() and kept < total:
        print(
            "It keeps the first patches of every image, since all of them are equally strong: an embedding that is not "
            "trained puts out no spikes in evaluation mode."
        )
    return 0


def _add_activations(commands: Any) -> None:
    parser = commands.add_parser("activations", help="draw the activation maps of checkpoints side by side")
    parser.add_argument(
        "--checkpoint", metavar="FILE_OR_DIR", nargs="+", required=True, help="folders that train.py wrote"
    )
    parser.add_argument("--layer", help="such as stages.0.0 (default: of each the neuron in the middle)")
    parser.add_argument("--dataset", help="(default: the first checkpoint's)")
    _add_data(parser)
    parser.add_argument("--image", type=int, default=0, help="number of the image in the split (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=4, help="single channels to draw (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE", required=True, help="picture to write: .png, .pdf or .svg")
    parser.set_defaults(run=_activations)


def _activations(args: argparse.Namespace) -> int:
    pictures.check_picture(args.plot)
    if args.image < 0 or args.channels < 0:
        raise ValueError(f"image={args.image}, channels={args.channels}: expected integers >= 0.")
    columns = []
    pixels: Any = None
    dataset = args.dataset
    for checkpoint in args.checkpoint:
        _, model, dataset, _ = _open(args, None, checkpoint, {}, dataset)
        loader = _loader(args, dataset, model, 1)
        image = _image(loader, args.image, f"{dataset}/{args.split}")
        layer, maps = pictures.activation_maps(model, image, args.layer)
        columns.append((f"{pictures.caption(model)}\n{layer}", maps))
        pixels = pictures.to_pixels(image[None], loader.info.mean, loader.info.std)[0]
    title = f"Activations (mean over time), image {args.image} of {dataset}/{args.split}"
    pictures.draw_activations(columns, pixels, args.plot, args.channels, title)
    print(f"Wrote {args.plot}")
    return 0


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser("convert", help="make a spiking network of a trained ReLU network")
    parser.add_argument("--checkpoint", metavar="DIR", required=True, help="trained with --neuron relu")
    parser.add_argument("--T", type=int, default=64, help="time steps (default: %(default)s)")
    parser.add_argument(
        "--mode",
        default="99.9%",
        help="what a spike a step stands for, of each layer's activations: max, a percentile, or a fraction of the "
        "maximum such as 0.9 (default: 99.9%%)",
    )
    parser.add_argument("--encoding", default="direct", help="direct or poisson (default: %(default)s)")
    parser.add_argument("--half-threshold", action="store_true", help="start potentials at half the threshold")
    parser.add_argument(
        "--calibrate", type=int, default=1024, metavar="N", help="training images to measure (default: %(default)s)"
    )
    parser.add_argument("--dataset", help="(default: the checkpoint's)")
    _add_data(parser)
    parser.add_argument("--images", type=int, metavar="N", help="evaluate on N images, classes balanced (default: all)")
    parser.add_argument("-b", "--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--amp", action="store_true", help="evaluate in bfloat16; membrane potentials stay float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--curve", metavar="FILE", help="write the accuracy after every time step: .csv or .json")
    parser.add_argument("--plot", metavar="FILE", help="draw it: .png, .pdf or .svg")
    parser.add_argument("--output", metavar="DIR", help="write the spiking network there, as a checkpoint")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    for flag in ("calibrate", "images", "batch_size"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: expected an integer >= 1.")
    if args.curve:
        check_results_file(args.curve)
    if args.plot:
        pictures.check_picture(args.plot)
    name, ann, dataset, _ = _open(args, None, args.checkpoint, {}, args.dataset)
    _to_device(ann, args.device)
    try:
        mode: str | float = float(args.mode)
    except ValueError:
        mode = args.mode
    calibration = _loader(args, dataset, ann, 128, split="train", subset=args.calibrate)
    model: Any = convert(ann, (images for images, _ in calibration), args.T, mode, args.encoding, args.half_threshold)
    for net in (ann, model):
        net.to(memory_format=torch.channels_last)
    loader = _loader(args, dataset, ann, args.batch_size, subset=args.images, channels_last=True)
    kind = torch.device(args.device).type
    shown: dict[str, Any] = {
        "device": args.device,
        "autocast": functools.partial(torch.autocast, kind, torch.bfloat16) if args.amp else nullcontext,
        "progress": sys.stderr.isatty(),
    }
    before = evaluate(ann, loader, **shown)["top1"]
    top1, rate = accuracy_over_time(model, loader, **shown)
    row = {
        "model": name,
        "top1": round(top1[-1], 4),
        "T": model.T,
        "firing_rate": round(rate, 6),
        "dataset": dataset,
        "split": args.split,
        "samples": loader.num_samples,
        "precision": "bfloat16" if args.amp else "float32",
        "ann_top1": round(before, 4),
        "conversion": {
            "mode": mode,
            "encoding": args.encoding,
            "half_threshold": args.half_threshold,
            "calibration_images": calibration.num_samples,
        },
        "command": args.command,
        **environment(),
    }
    print(
        f"{name} on {dataset}/{args.split} ({row['samples']:,} images): ReLU network {before:.2f} %, spiking "
        f"{top1[-1]:.2f} % at T={model.T} ({top1[-1] - before:+.2f} points), firing rate {rate:.4f}"
    )
    marks = [2**power for power in range(model.T.bit_length())]
    print("  T      " + " ".join(f"{t:>6}" for t in marks))
    print("  top-1  " + " ".join(f"{top1[t - 1]:6.2f}" for t in marks))
    written = [str(path) for path in (args.curve, args.plot, args.output) if path]
    if args.curve:
        write_rows(
            args.curve,
            [{"T": t, "top1": round(value, 4), "ann_top1": round(before, 4)} for t, value in enumerate(top1, 1)],
        )
    if args.plot:
        pictures.draw_accuracy(top1, before, args.plot, f"{name}, {args.mode}, {args.encoding}; {dataset}/{args.split}")
    if args.output:
        save_checkpoint(model, args.output, {**training_facts(args.checkpoint), **row})
    if written:
        print(f"Wrote {', '.join(written)}")
    return 0


def _add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="write a model as ONNX (any) or NIR (convolutional ones)")
    parser.add_argument("name", nargs="?", help="model, see spikezoo.list_models() (default: the checkpoint's)")
    parser.add_argument("--checkpoint", metavar="FILE_OR_DIR", help="weights, or a folder that train.py wrote")
    parser.add_argument("--T", type=int, help="time steps")
    parser.add_argument(
        "--dataset",
        help="whose images ONNX is checked on (default: the checkpoint's, else what fits the model's input; none is "
        "random noise)",
    )
    _add_data(parser)
    parser.add_argument("--images", type=int, default=8, help="the first so many (default: %(default)s)")
    parser.add_argument("--fixed-batch", action="store_true", help="ONNX for batches of --images only")
    parser.add_argument("--output", metavar="FILE", required=True, help="file to write: .onnx or .nir")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    suffix = check_suffix(args.output)
    if args.images < 1:
        raise ValueError(f"images={args.images}: expected an integer >= 1.")
    given = {"T": args.T} if args.T is not None else {}
    name, model, dataset, weights = _open(args, args.name, args.checkpoint, given, args.dataset)
    if dataset == "none":
        images = _noise(model, args.images)
    else:
        images = next(iter(_loader(args, dataset, model, args.images)))[0]
    path = export(model.eval(), args.output, images, not args.fixed_batch)
    said = f"random weights (seed {args.seed})" if weights == "random" else f"weights {weights}"
    source = "noise" if dataset == "none" else f"{dataset}/{args.split}"
    checked = f", checked on {len(images)} images of {source}" if suffix == ".onnx" else ""
    print(f"{name}, {said}. Wrote {path}{checked}.")
    return 0


# Accuracy of the base, reactivated and pruned nets and the neurons removed, per cent, by the name of the plan's rows.
DYNSNN_PAPER = {
    "snn_t": (97.9, 98.3, 98.0, 53.71),
    "stidi_bp": (97.4, 98.1, 97.7, 62.33),
    "bp_stdp": (96.6, 97.2, 96.9, 64.81),
    "rmp_resnet20": (91.36, None, 91.13, 37.13),
    "rmp_vgg16": (69.96, None, 69.65, 31.71),
    "fc3_57": (99.25, None, 99.23, 57.4),
    "fc3_70": (99.25, None, 98.98, 69.7),
    "lenet": (99.50, None, 99.15, 61.5),
}


def _add_dynsnn(commands: Any) -> None:
    parser = commands.add_parser("dynsnn", help="remove neurons that hardly fire, without training (DynSNN)")
    parser.add_argument("--checkpoint", metavar="FILE_OR_DIR", help="weights, or a folder that train.py wrote")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--threshold", type=float, help="firing rate, spikes per time step, below which neurons go")
    how.add_argument("--compression", type=float, help="fraction of the hidden neurons that goes")
    how.add_argument("--tolerance", type=float, help="points of accuracy that may be lost, on training images")
    parser.add_argument("--per", help="unit (single neurons) or channel (default: the checkpoint's, else unit)")
    parser.add_argument(
        "--samples", type=int, default=10_000, help="training images to decide on (default: %(default)s)"
    )
    parser.add_argument("--dataset", help="(default: the checkpoint's)")
    _add_data(parser)
    parser.add_argument("-b", "--batch-size", type=int, default=256)
    parser.add_argument("--output", metavar="DIR", help="write the pruned net there, masks and zeros in its place")
    parser.add_argument("--compact", action="store_true", help="write it with what was removed gone from its weights")
    parser.add_argument("--deploy", choices=PRECISIONS, help="measure accuracy with spikezoo.deploy(model, PRECISION)")
    parser.add_argument("--plot-rates", metavar="FILE", help="draw the firing rates before and after")
    parser.add_argument("--plot-threshold", metavar="FILE", help="draw accuracy and compression over the threshold")
    parser.add_argument("--table", metavar="DIR", help="only print the table of a finished plan of configs/dynsnn")
    parser.set_defaults(run=_dynsnn)


def _dynsnn(args: argparse.Namespace) -> int:
    if args.table:
        print(_dynsnn_table(args.table))
        return 0
    if args.threshold is args.compression is args.tolerance is None:
        raise ValueError("How much may go? Give --threshold, --compression or --tolerance 0.3.")
    if args.compact and not args.output:
        raise ValueError("--compact is for what is written: give --output DIR, too.")
    for path in filter(None, (args.plot_rates, args.plot_threshold)):
        pictures.check_picture(path)
    if args.samples < 1 or args.batch_size < 1:
        raise ValueError(f"samples={args.samples}, batch-size={args.batch_size}: expected integers >= 1.")
    name, model, dataset, weights = _open(args, None, args.checkpoint, {}, args.dataset)
    masks = dict(model.recipe).get("dynsnn")
    if compacted(model) or masks is None:
        args.per = args.per or "unit"
        model = apply(model, "dynsnn", per=args.per, threshold=args.threshold, compression=args.compression)
    elif args.per not in (None, masks.get("per", "unit")):
        raise ValueError(f"--per {args.per}: {name} has masks per {masks.get('per', 'unit')} already. Leave --per out.")

    def measure(net: nn.Module, loader: Any) -> dict[str, Any]:
        return evaluate(deploy(net.eval(), args.deploy) if args.deploy else net, loader, rates=not args.deploy)

    train, test = (_loader(args, dataset, model, args.batch_size, split) for split in ("train", None))
    if args.samples < train.num_samples:
        train = _loader(args, dataset, model, args.batch_size, "train", subset=args.samples)
    rates = neuron_rates(model, train)
    threshold = args.threshold
    if args.compression is not None:
        threshold = threshold_for(model, rates, args.compression)
    elif args.tolerance is not None:
        threshold = find_threshold(model, rates, lambda net: measure(net, train)["top1"], args.tolerance)
    sample = next(iter(test))[0][:32]
    before, whole = measure(model, test), dynsnn_report(model, sample)
    swept = sweep_thresholds(model, rates, lambda net: measure(net, test)["top1"]) if args.plot_threshold else []
    prune(model, rates, threshold)
    after, left = measure(model, test), dynsnn_report(model, sample)
    title = f"{name}: {dataset}"
    if args.plot_rates:
        kept = {layer: rates[layer][~flags] for layer, flags in fade(rates, threshold).items()}
        pictures.draw_rates(rates, kept, threshold, args.plot_rates, f"{title}/train")
    if args.plot_threshold:
        pictures.draw_thresholds(swept, threshold, args.plot_threshold, f"{title}/{args.split}")
    print(f"{name}, weights {weights}: neurons with firing rates below {threshold:.4g} removed\n")
    print(f"{f'top-1, {dataset}/{args.split}':<28}{before['top1']:14.2f} {after['top1']:14.2f} %")
    for what in ("neurons", "synapses", "parameters"):
        print(f"{what:<28}{whole[f'{what}_left']:14,} {left[f'{what}_left']:14,} -{left[f'{what}_removed']:.2f} %")
    if "sops_exact" in whole:
        print(f"{'synaptic operations an image':<28}{whole['sops_exact']:14,.0f} {left['sops_exact']:14,.0f}")
    if args.output:
        shown = ("top1", "top5", "loss", "samples", "firing_rate")
        measured: dict[str, Any] = {key: after[key] for key in shown if key in after}
        facts = {"dataset": dataset, "split": args.split, "T": model.T, "threshold": threshold, "deployed": args.deploy}
        written = apply(model, "compact") if args.compact else model
        made = {**training_facts(args.checkpoint), "command": args.command}
        save_checkpoint(written, args.output, {**facts, **made, **measured, **left, **environment()})
        print(f"Wrote {args.output}: {sum(p.numel() for p in written.parameters()):,} parameters")
    return 0


def _dynsnn_table(folder: str) -> str:
    """Mean and standard deviation over seeds of a plan's rows CASE-baseline, CASE-reactivated and CASE-pruned."""
    path = Path(folder) / "results.csv"
    if not path.is_file():
        raise FileNotFoundError(f"No {path}: run train.py --plan configs/dynsnn/... first.")
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            case, _, stage = row["name"].partition("-")
            found.setdefault(case, {}).setdefault(stage.partition("-")[0], []).append(row)

    def mean(rows: Sequence[Mapping[str, str]], key: str) -> float:
        return statistics.fmean(float(row[key]) for row in rows) if rows else math.nan

    def shown(rows: Sequence[Mapping[str, str]], key: str, paper: float | None) -> str:
        if not rows:
            return f"{'-':>14}"
        spread = statistics.stdev(float(row[key]) for row in rows) if len(rows) > 1 else 0.0
        return f"{mean(rows, key):7.2f} ±{spread:4.2f}" + ("      " if paper is None else f" {paper:>5}")

    lines = ["mean ± standard deviation over seeds, per cent; beside them the paper's"]
    heads = [f"{head:<20}" for head in ("baseline", "reactivated", "pruned", "drop", "neurons removed")]
    lines.append(f"{'net':<14}{''.join(heads)}")
    for case, stages in found.items():
        paper = DYNSNN_PAPER.get(case, (None,) * 4)
        base, again, pruned = (stages.get(stage, []) for stage in ("baseline", "reactivated", "pruned"))
        if not base:  # fc3_57 and fc3_70 share the baseline of fc3
            base = found.get(case.rpartition("_")[0], {}).get("baseline", [])
        cells = [shown(rows, "top1", number) for rows, number in zip((base, again, pruned), paper, strict=False)]
        drop = f"{mean(base, 'top1') - mean(pruned, 'top1'):7.2f}" + " " * 6
        if paper[0] is not None and paper[2] is not None:
            drop += f" {paper[0] - paper[2]:>5.2f}"
        cells += [drop, shown(pruned, "neurons_removed", paper[3])]
        lines.append(f"{case:<14}{''.join(f'{cell:<20}' for cell in cells)}".rstrip())
    return "\n".join(lines)


def _add_events(commands: Any) -> None:
    parser = commands.add_parser("events", help="draw the event frames of a recording")
    parser.add_argument("dataset", help="nmnist, cifar10dvs, dvs128gesture, events:PATH, ...")
    _add_data(parser)
    parser.add_argument("--recording", type=int, default=0, help="its number in the split (default: %(default)s)")
    parser.add_argument("--T", type=int, default=10, help="frames (default: %(default)s)")
    parser.add_argument("--frames-by", default="number", help="number (of events), time or duration")
    parser.add_argument("--duration-us", type=int, metavar="US", help="length of a frame, for --frames-by duration")
    parser.add_argument("--plot", metavar="FILE", required=True, help="picture to write: .png, .pdf or .svg")
    parser.set_defaults(run=_events)


def _events(args: argparse.Namespace) -> int:
    pictures.check_picture(args.plot)
    how = {"frames_by": args.frames_by, "duration_us": args.duration_us}
    found = open_events(
        args.dataset, args.split, T=args.T, data_dir=args.data_dir, download=args.dataset_download, **how
    )
    if not 0 <= args.recording < len(found):
        raise ValueError(f"recording={args.recording}: {found.split} has recordings 0 to {len(found) - 1}.")
    frames, label = found.sample(args.recording), found.classes[int(found.labels[args.recording])]
    title = f"{args.dataset}/{args.split}, recording {args.recording} of class {label}: {frames.sum():,.0f} events"
    pictures.draw_events(frames, args.plot, title)
    print(f"{title}. Wrote {args.plot}")
    return 0


def _add_raster(commands: Any) -> None:
    parser = commands.add_parser("raster", help="draw a layer's spikes over time, and the firing rates of all layers")
    parser.add_argument("name", nargs="?", help="model, see spikezoo.list_models() (default: the checkpoint's)")
    parser.add_argument("--checkpoint", metavar="FILE_OR_DIR", help="weights, or a folder that train.py wrote")
    parser.add_argument("--T", type=int, help="time steps")
    parser.add_argument("--layer", help="such as stages.0.0 (default: the neurons in the middle)")
    parser.add_argument("--neurons", type=int, default=200, help="how many, evenly chosen (default: %(default)s)")
    parser.add_argument("--dataset", help="(default: the checkpoint's, else what fits the model's input)")
    _add_data(parser)
    parser.add_argument("--image", type=int, default=0, help="number in the split (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE", required=True, help="picture to write: .png, .pdf or .svg")
    parser.set_defaults(run=_raster)


def _raster(args: argparse.Namespace) -> int:
    pictures.check_picture(args.plot)
    if args.neurons < 1:
        raise ValueError(f"neurons={args.neurons}: expected an integer >= 1.")
    given = {} if args.T is None else {"T": args.T}
    name, model, dataset, weights = _open(args, args.name, args.checkpoint, given, args.dataset)
    loader = _loader(args, dataset, model, 1)
    image = _image(loader, args.image, f"{dataset}/{args.split}")
    layer, spikes, rates = pictures.spikes_over_time(model, image, args.layer)
    said = ", random weights" if weights == "random" else ""
    title = f"{name}{said}; image {args.image} of {dataset}/{args.split}"
    pictures.draw_raster(layer, spikes, rates, args.plot, args.neurons, title)
    print(
        f"{layer}: {spikes.sum():,.0f} spikes of {spikes.shape[1]:,} neurons in {spikes.shape[0]} time steps, firing "
        f"rate {spikes.mean():.4f}. Wrote {args.plot}"
    )
    return 0


def _add_push(commands: Any) -> None:
    parser = commands.add_parser("push", help="publish a checkpoint on the Hugging Face Hub, with a model card")
    parser.add_argument(
        "checkpoint", nargs="?", metavar="DIR_OR_CHECKPOINT", help="a folder that train.py wrote, or a file in one"
    )
    parser.add_argument("repository", nargs="?", metavar="ORG/NAME", help="made if it is not there")
    parser.add_argument(
        "--all", action="store_true", help="every checkpoint that comes with the package, as ORG/NAME.TAG"
    )
    parser.add_argument("--org", metavar="ORG", help="with --all: organisation, or user")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="made if it is not there (default: the main one)")
    parser.add_argument("--license", default="apache-2.0", help="of the weights (default: %(default)s)")
    parser.add_argument("--dry-run", metavar="DIR", help="write the files to this new folder and push nothing")
    parser.set_defaults(run=_push)


def _push(args: argparse.Namespace) -> int:
    if args.all:
        if args.checkpoint or args.revision or not args.org:
            raise ValueError("push --all takes --org ORG, and no checkpoint, repository or --revision.")
        for where in push_all(args.org, private=args.private, license=args.license, dry_run=args.dry_run):
            print(f"Wrote {where}, pushed nothing." if args.dry_run else where, flush=True)
        return 0
    if not args.repository or args.org:
        raise ValueError("push takes DIR_OR_CHECKPOINT and ORG/NAME, or --all and --org ORG.")
    where = push_folder(
        args.checkpoint,
        args.repository,
        private=args.private,
        revision=args.revision,
        license=args.license,
        dry_run=args.dry_run,
    )
    print(f"Wrote {where}, pushed nothing." if args.dry_run else where)
    return 0


def _add_results(commands: Any) -> None:
    parser = commands.add_parser("results", help="write docs/results.md: checkpoints and claims beside the papers'")
    parser.add_argument("--docs", default="docs", metavar="DIR", help="holds results.csv, claims.yaml and runs/")
    parser.add_argument("--add", nargs="+", metavar="DIR", help="first copy the results of these plans to DOCS/runs")
    parser.add_argument("--plot", metavar="FILE", help="draw accuracy over energy: .png, .pdf or .svg")
    parser.set_defaults(run=_results)


def _results(args: argparse.Namespace) -> int:
    if args.plot:
        pictures.check_picture(args.plot)
    docs = Path(args.docs)
    for plan in args.add or []:
        print(f"Wrote {results.add_runs(plan, docs / 'runs')}", file=sys.stderr)
    papers, claims = results.read_claims(docs / "claims.yaml")
    # Before the first checkpoint is shipped there is none to validate.
    rows = results.read_rows(docs / "results.csv") if (docs / "results.csv").is_file() else []
    written = [str(results.document(rows, papers, claims, docs / "results.md"))]
    if args.plot:
        pictures.draw_zoo(rows, args.plot)
        written.append(args.plot)
    print(results.checkpoint_table(rows, papers))
    for claim in claims:
        print(f"{claim.id}: {results.judge(claim)}", file=sys.stderr)
    print(f"Wrote {', '.join(written)}", file=sys.stderr)
    return 0


def _add_search(commands: Any) -> None:
    parser = commands.add_parser("search", help="find AutoST architectures: exactly, or by the paper's evolution")
    parser.add_argument("--space", default="tiny", help="tiny, small, base, or a YAML file (default: %(default)s)")
    parser.add_argument("--params", metavar="LO:HI", help="window of trainable parameters, for instance 4.0e6:4.22e6")
    parser.add_argument("--macs", metavar="LO:HI", help="window of the MACs of all time steps")
    parser.add_argument("--latency", type=float, metavar="MS", help="largest time of an image, measured on the best")
    parser.add_argument("--metric", default="flops", help=f"{', '.join(search.METRICS)} (default: %(default)s)")
    parser.add_argument(
        "--method", choices=("exact", "evolution"), help="(default: exact for metrics of the architecture alone)"
    )
    parser.add_argument("--T", type=int, default=4, help="time steps (default: %(default)s)")
    parser.add_argument(
        "--dataset", default="none", help="sets the three below; metrics that read a network see it (default: noise)"
    )
    for flag in ("--num-classes", "--img-size", "--in-chans"):
        parser.add_argument(flag, type=int, help="(default: the dataset's, without one CIFAR-10's)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the dataset")
    parser.add_argument("--top", type=int, default=10, help="how many nets to show (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="DIR", help="write search.csv, best.yaml and search.png there")
    parser.set_defaults(run=_search)

    parser = commands.add_parser("correlation", help="train a sample of nets and see how well the metrics rank them")
    parser.add_argument("--config", required=True, metavar="FILE", help="see configs/autost/correlation_small.yaml")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the dataset")
    parser.add_argument("--dataset-download", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", required=True, metavar="DIR", help="one file a net; run again to go on")
    parser.add_argument("--device", help="(default: a GPU where there is one)")
    parser.set_defaults(run=_correlation)


def _search(args: argparse.Namespace) -> int:
    space = search.Space.of(args.space)
    dataset = None if args.dataset == "none" else args.dataset
    info = dataset_info(dataset or "cifar10", args.data_dir)
    shape = {key: getattr(args, key) for key in ("num_classes", "img_size", "in_chans")}
    shape = {key: getattr(info, key) if value is None else value for key, value in shape.items()}
    setting = search.Setting(args.T, **shape)
    constraints = search.Constraints(
        parameters=search.window(args.params) if args.params else None,
        flops=search.window(args.macs) if args.macs else None,
        latency_ms=args.latency,
    )
    method = args.method or ("evolution" if args.metric in search.MEASURED else "exact")
    if method == "exact":
        result = search.exact(space, args.metric, setting, constraints, top=args.top)
        print(f"Space {space.name}: all {space.size:,} nets covered in {result.seconds:.2f} s, exact")
    else:
        images = None
        if dataset and args.metric in search.MEASURED:
            images = search.images_of(dataset, args.metric, setting, args.seed, data_dir=args.data_dir)
        log = f"{args.output}/evolution.jsonl" if args.output else None
        result = search.evolve(
            space,
            args.metric,
            setting,
            constraints,
            settings=search.Evolution(seed=args.seed),
            images=images,
            top=args.top,
            log=log,
            progress=True,
        )
        print(f"Space {space.name}: {result.looked_at:,} of {space.size:,} nets in {result.seconds:.2f} s, evolution")
    print(f"\n{search.table(result, args.metric)}")
    if args.latency:
        print("\nLatency was measured on these only: a quicker net of the space may have been passed over.")
    if args.output:
        paths = search.write(
            result,
            args.output,
            space=space,
            metric=args.metric,
            setting=setting,
            constraints=constraints,
            dataset=dataset,
            command=args.command,
        )
        print(f"\nWritten: {', '.join(map(str, paths))}")
    return 0


def _correlation(args: argparse.Namespace) -> int:
    rows = search.correlate(
        search.CorrelationConfig.read(args.config),
        args.output,
        data_dir=args.data_dir,
        download=args.dataset_download,
        device=args.device,
        progress=True,
    )
    print(search.correlation_table(rows) if rows else f"Other processes still train; see {args.output}.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, or 2 where the arguments make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m spikezoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_count(commands)
    _add_patches(commands)
    _add_activations(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_dynsnn(commands)
    _add_events(commands)
    _add_raster(commands)
    _add_push(commands)
    _add_results(commands)
    _add_search(commands)
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "-m", "spikezoo", *(sys.argv[1:] if argv is None else argv)])
    try:
        result: int = args.run(args)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return result


if __name__ == "__main__":
    sys.exit(main())
