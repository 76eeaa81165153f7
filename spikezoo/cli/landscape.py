"""Draw the loss of trained nets along random directions of their weights: how flat the place is that they found.

spikezoo landscape output/mpbn output/plain --data-dir DATA --images 1000 --plot landscape.png

A direction has the size of every filter that it changes (Li et al. 2018, "Visualizing the Loss Landscape of Neural
Nets"), so that nets whose weights differ in size can be compared; norms and biases stay.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from spikezoo import pictures
from spikezoo.checks import number
from spikezoo.cli.common import add_data, batches, open_net
from spikezoo.data import Batch
from spikezoo.evaluate import evaluate
from spikezoo.flags import Parser, add_flags, whole_flags

__all__ = ["loss_along", "main"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo landscape", __doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="FILE_OR_DIR", help="weights, or folders that training wrote")
    parser.add_argument("--radius", type=float, default=1.0, help="how far, in sizes of the filters (default: 1)")
    parser.add_argument("--points", type=int, default=21, help="how many, an odd number (default: %(default)s)")
    parser.add_argument(
        "--directions", type=int, default=1, help="mean and range over so many, of --seed and the next (default: 1)"
    )
    parser.add_argument("--images", type=int, default=1000, help="how many, classes balanced (default: %(default)s)")
    add_flags(parser, "dataset", help="(default: the checkpoints')")
    add_data(parser)
    add_flags(parser, "batch-size")
    add_flags(parser, "plot", required=True)
    return parser


@torch.no_grad()
def loss_along(model: nn.Module, loader: Iterable[Batch], places: Iterable[float], seed: int = 0) -> list[float]:
    """Loss of a model at places along a random direction; its weights are the same afterwards.

    Args:
        model: The model.
        loader: Batches of images and labels.
        places: In sizes of the filters; 0 is the model itself.
        seed: Of the direction.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = [weight for weight in model.parameters() if weight.dim() > 1]
    before = [weight.clone() for weight in weights]
    steps = []
    for weight in weights:
        drawn = torch.randn(weight.shape, generator=generator).to(weight).flatten(1)
        size = weight.flatten(1).norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
        steps.append((size * drawn).view_as(weight))
    losses = []
    try:
        for place in places:
            for weight, start, step in zip(weights, before, steps, strict=True):
                weight.copy_(start + place * step)
            losses.append(float(evaluate(model, loader, device=weights[0].device, rates=False)["loss"]))
    finally:
        for weight, start in zip(weights, before, strict=True):
            weight.copy_(start)
    return losses


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    pictures.check_picture(args.plot)
    whole_flags(args, "images", "directions", "batch_size")
    number("radius", args.radius, 0, bounds="()")
    if args.points < 3 or args.points % 2 == 0:
        raise ValueError(f"points={args.points}: expected an odd number from 3, with the net itself in the middle.")
    places = torch.linspace(-args.radius, args.radius, args.points).tolist()
    curves: dict[str, dict[float, list[float]]] = {}
    for path in args.checkpoints:
        _, model, dataset, _ = open_net(args, {}, args.dataset, checkpoint=path)
        loader = batches(args, dataset, model, args.batch_size, subset=args.images)
        lines = [loss_along(model, loader, places, args.seed + number) for number in range(args.directions)]
        label = path if Path(path).name in curves else Path(path).name
        curves[label] = {place: list(losses) for place, losses in zip(places, zip(*lines, strict=True), strict=True)}
        means = [statistics.fmean(line) for line in lines]
        spread = f" +-{statistics.stdev(means):.4f} over {len(means)} directions" if len(means) > 1 else ""
        centre = lines[0][args.points // 2]
        print(f"{path}: loss {centre:.4f}, mean over the line {statistics.fmean(means):.4f}{spread}")
    pictures.draw_measure(curves, "step, in sizes of the filters", f"loss, {dataset}/{args.split}", args.plot)
    print(f"Wrote {args.plot}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
