"""Print what a model costs, layer by layer: MACs, synaptic operations, energy and firing rates.

spikezoo count mpbn_resnet20
spikezoo count test_spiking_vgg --dataset none --images 4 --json
spikezoo count --checkpoint output/quickstart --plot bars.png
spikezoo count spikformer_4_384 autost_small mpbn_resnet20    side by side; spikezoo compare has their accuracy, too
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from spikezoo import pictures
from spikezoo.cli.common import add_data, add_name, batches, noise, open_net
from spikezoo.cli.compare import compare, show
from spikezoo.counting import MAC_PJ, SOP_PJ, count_loader
from spikezoo.flags import Parser, add_flags, whole_flags

__all__ = ["main"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo count", __doc__)
    add_name(parser)
    parser.add_argument("more", nargs="*", metavar="name", help="more models: one line each, side by side")
    add_flags(parser, "T", "neuron", "mpbn")
    add_flags(parser, "dataset", help="(default: the checkpoint's, else what fits the model's input; none is noise)")
    add_data(parser)
    add_flags(parser, "images", default=32, help="average over so many images (default: %(default)s)")
    add_flags(parser, "batch-size")
    parser.add_argument(
        "--piece", type=int, default=1, help="images counted at once; the spread is between such pieces (default: 1)"
    )
    parser.add_argument("--mac-pj", type=float, default=MAC_PJ, help="picojoule a MAC (default: %(default)s)")
    parser.add_argument("--sop-pj", type=float, default=SOP_PJ, help="picojoule a SOP (default: %(default)s)")
    parser.add_argument("--pj-per-byte", type=float, help="also the energy of memory traffic")
    parser.add_argument("--norm-ops", type=int, default=0, help="operations per element of a norm (default: none)")
    parser.add_argument("--neuron-ops", action="store_true", help="also a MAC per neuron and step")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_flags(parser, "plot", help="draw where the operations are")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    whole_flags(args, "images", "batch_size", "piece")
    given = {key: getattr(args, key) for key in ("T", "neuron", "mpbn") if getattr(args, key) is not None}
    prices = {
        "piece": args.piece,
        "mac_pj": args.mac_pj,
        "sop_pj": args.sop_pj,
        "pj_per_byte": args.pj_per_byte,
        "norm_ops": args.norm_ops,
        "neuron_ops": args.neuron_ops,
    }
    if args.more:
        names = [args.name, *args.more]
        if args.checkpoint:
            raise ValueError("Several names and --checkpoint: give the checkpoint's path as one of the names.")
        return show([compare(name, args, given, prices, accuracy=False) for name in names], args)
    name, model, dataset, weights = open_net(args, given, args.dataset, args.name, args.checkpoint)
    loader: Iterable[Any]
    batch = min(args.images, args.batch_size)
    loader = [noise(model, args.images)] if dataset == "none" else batches(args, dataset, model, batch)
    summary = count_loader(
        model,
        loader,
        args.images,
        **prices,
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


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
