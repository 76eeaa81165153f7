"""Remove neurons that hardly fire, without training (DynSNN).

spikezoo dynsnn --checkpoint output/quickstart --tolerance 0.3 --output smaller --plot-threshold sweep.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torch import nn

from spikezoo import pictures
from spikezoo.cli.common import add_data, batches, open_net
from spikezoo.data import Loader
from spikezoo.deploy import PRECISIONS, deploy
from spikezoo.evaluate import environment, evaluate
from spikezoo.flags import Parser, add_flags, whole_flags
from spikezoo.hub.provenance import training_facts
from spikezoo.saving import save_checkpoint
from spikezoo.transforms import apply
from spikezoo.transforms.dynsnn import (
    compacted,
    dynsnn_report,
    find_threshold,
    masks_of,
    neuron_rates,
    prune,
    sweep_thresholds,
    threshold_for,
)

__all__ = ["main"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo dynsnn", __doc__)
    add_flags(parser, "checkpoint", required=True)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--threshold", type=float, help="firing rate, spikes per time step, below which neurons go")
    how.add_argument("--compression", type=float, help="fraction of the hidden neurons that goes")
    how.add_argument("--tolerance", type=float, help="points of accuracy that may be lost, on training images")
    parser.add_argument("--per", help="unit (single neurons) or channel (default: the checkpoint's, else unit)")
    parser.add_argument(
        "--samples", type=int, default=10_000, help="training images to decide on (default: %(default)s)"
    )
    parser.add_argument("--val-subset", type=int, metavar="N", help="accuracy on N images only, classes balanced")
    add_flags(parser, "dataset", help="(default: the checkpoint's)")
    add_data(parser)
    add_flags(parser, "batch-size")
    parser.add_argument("--output", metavar="DIR", help="write the pruned net there, masks and zeros in its place")
    parser.add_argument("--compact", action="store_true", help="write it with what was removed gone from its weights")
    parser.add_argument(
        "--deploy", choices=("auto", *PRECISIONS), help="measure accuracy with spikezoo.deploy(model, PRECISION)"
    )
    parser.add_argument("--plot-rates", metavar="FILE", help="draw the firing rates before and after, both measured")
    parser.add_argument(
        "--reactivated", metavar="FILE_OR_DIR", help="draw those of this checkpoint, too: the net after reactivation"
    )
    parser.add_argument(
        "--plot-threshold", metavar="FILE", help="draw what removal without training costs, over the threshold"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    if args.threshold is args.compression is args.tolerance is None:
        raise ValueError("How much may go? Give --threshold, --compression or --tolerance 0.3.")
    if args.compact and not args.output:
        raise ValueError("--compact is for what is written: give --output DIR, too.")
    if args.reactivated and not args.plot_rates:
        raise ValueError("--reactivated is for the picture: give --plot-rates FILE, too.")
    for path in filter(None, (args.plot_rates, args.plot_threshold)):
        pictures.check_picture(path)
    whole_flags(args, "samples", "batch_size", "val_subset")
    name, model, dataset, weights = open_net(args, {}, args.dataset, checkpoint=args.checkpoint)
    masks = dict(model.recipe).get("dynsnn")
    if compacted(model) or masks is None:
        args.per = args.per or "unit"
        model = apply(model, "dynsnn", per=args.per, threshold=args.threshold, compression=args.compression)
    elif args.per not in (None, masks.get("per", "unit")):
        raise ValueError(f"--per {args.per}: {name} has masks per {masks.get('per', 'unit')} already. Leave --per out.")

    def measure(net: nn.Module, loader: Loader) -> dict[str, Any]:
        return evaluate(deploy(net.eval(), args.deploy) if args.deploy else net, loader, rates=not args.deploy)

    train = batches(args, dataset, model, args.batch_size, "train")
    test = batches(args, dataset, model, args.batch_size, subset=args.val_subset)
    if args.samples < train.num_samples:
        train = batches(args, dataset, model, args.batch_size, "train", subset=args.samples)
    rates, threshold = neuron_rates(model, train), args.threshold
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
        # The neurons that are left fire otherwise than before, since nobody inhibits or excites them for those gone.
        masks = masks_of(model)
        again = {layer: rate[masks[layer]] for layer, rate in neuron_rates(model, train).items()}
        other = open_net(args, {}, args.dataset, checkpoint=args.reactivated)[1] if args.reactivated else None
        third = None if other is None else neuron_rates(other, train)
        pictures.draw_rates(rates, again, threshold, args.plot_rates, f"{title}/train", third)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
