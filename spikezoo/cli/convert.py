"""Make a spiking network of a trained ReLU network, and measure its accuracy over time.

spikezoo convert --checkpoint output/ann --T 64 --mode 99.9% --plot curve.png --output output/snn
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch

from spikezoo import pictures
from spikezoo.cli.common import add_data, batches, device_of, open_net
from spikezoo.convert import convert
from spikezoo.evaluate import accuracy_over_time, check_results_file, environment, evaluate, write_rows
from spikezoo.flags import Parser, add_flags, whole_flags
from spikezoo.hub.provenance import training_facts
from spikezoo.precision import slow_bfloat16
from spikezoo.saving import save_checkpoint

__all__ = ["main"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo convert", __doc__)
    add_flags(parser, "checkpoint", required=True, help="trained with --neuron relu, or qcfs")
    add_flags(parser, "T", default=None, help="time steps (default: 64; of a qcfs network its levels)")
    parser.add_argument(
        "--mode",
        help="what a spike a step stands for, of each layer's activations: max, a percentile, or a fraction of the "
        "maximum such as 0.9 (default: 99.9%%; a qcfs network has learned it)",
    )
    parser.add_argument("--encoding", default="direct", help="direct or poisson (default: %(default)s)")
    parser.add_argument("--half-threshold", action="store_true", help="start potentials at half the threshold")
    parser.add_argument(
        "--bias-correction", action="store_true", help="take the mean error of every channel's rate out of its bias"
    )
    parser.add_argument(
        "--calibrate", type=int, metavar="N", help="training images to measure (default: 1024; to correct biases 128)"
    )
    add_flags(parser, "dataset", help="(default: the checkpoint's)")
    add_data(parser)
    add_flags(parser, "images", help="evaluate on N images, classes balanced (default: all)")
    add_flags(parser, "batch-size", default=None, help="images computed at once, in all steps (default: 1024 / T)")
    add_flags(parser, "amp", help="evaluate in bfloat16; membrane potentials stay float32")
    parser.add_argument("--curve", metavar="FILE", help="write the accuracy after every time step: .csv or .json")
    add_flags(parser, "plot")
    parser.add_argument("--output", metavar="DIR", help="write the spiking network there, as a checkpoint")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    whole_flags(args, "calibrate", "images", "batch_size")
    if args.curve:
        check_results_file(args.curve)
    if args.plot:
        pictures.check_picture(args.plot)
    name, ann, dataset, _ = open_net(args, {}, args.dataset, checkpoint=args.checkpoint)
    device = device_of(ann)
    if args.amp and (said := slow_bfloat16(device)):
        print(said, file=sys.stderr)
    learned = ann.neuron_config.kind == "qcfs"
    mode: str | float = args.mode or ("max" if learned else "99.9%")
    with suppress(ValueError):
        mode = float(mode)
    steps = 64 if args.T is None and not learned else args.T
    count = args.calibrate or (128 if args.bias_correction else 1024)
    calibration = batches(args, dataset, ann, 128, split="train", subset=count)
    measured = args.bias_correction or not learned
    images = (images for images, _ in calibration) if measured else None
    model = convert(ann, images, steps, mode, args.encoding, args.half_threshold, args.bias_correction)
    for net in (ann, model):
        net.to(memory_format=torch.channels_last)
    loader = batches(
        args, dataset, ann, args.batch_size or max(1, 1024 // model.T), subset=args.images, channels_last=True
    )
    shown: dict[str, Any] = {
        "device": device,
        "autocast": functools.partial(torch.autocast, device.type, torch.bfloat16) if args.amp else nullcontext,
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
            "mode": "qcfs" if learned else mode,
            "encoding": args.encoding,
            "half_threshold": args.half_threshold or learned,
            "bias_correction": args.bias_correction,
            "calibration_images": calibration.num_samples if measured else 0,
        },
        "command": args.command,
        **environment(),
    }
    kind = "QCFS" if learned else "ReLU"
    print(
        f"{name} on {dataset}/{args.split} ({row['samples']:,} images): {kind} network {before:.2f} %, spiking "
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
        pictures.draw_accuracy(
            top1, before, args.plot, f"{name}, {row['conversion']['mode']}, {args.encoding}; {dataset}/{args.split}"
        )
    if args.output:
        save_checkpoint(model, args.output, {**training_facts(args.checkpoint), **row})
    if written:
        print(f"Wrote {', '.join(written)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
