"""Draw a layer's spikes over time, and the firing rates of all layers.

spikezoo raster --checkpoint output/nmnist_subset --data-dir DATA --plot raster.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spikezoo import pictures
from spikezoo.cli.common import add_data, add_name, batches, one_image, open_net
from spikezoo.flags import Parser, add_flags, whole_flags

__all__ = ["main"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo raster", __doc__)
    add_name(parser)
    add_flags(parser, "T")
    parser.add_argument("--layer", help="such as stages.0.0 (default: the neurons in the middle)")
    parser.add_argument("--neurons", type=int, default=200, help="how many, evenly chosen (default: %(default)s)")
    add_flags(parser, "dataset")
    add_data(parser)
    parser.add_argument("--image", type=int, default=0, help="number in the split (default: %(default)s)")
    add_flags(parser, "plot", required=True)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    pictures.check_picture(args.plot)
    whole_flags(args, "neurons")
    given = {} if args.T is None else {"T": args.T}
    name, model, dataset, weights = open_net(args, given, args.dataset, args.name, args.checkpoint)
    loader = batches(args, dataset, model, 1)
    image = one_image(loader, args.image, f"{dataset}/{args.split}")
    layer, spikes, rates = pictures.spikes_over_time(model, image, args.layer)
    answer = pictures.answer_of(model, image)
    pixels = pictures.to_pixels(image[None].float().cpu(), loader.info.mean, loader.info.std)[0]
    said = ", random weights" if weights == "random" else ""
    title = f"{name}{said}; image {args.image} of {dataset}/{args.split}"
    pictures.draw_raster(layer, spikes, rates, args.plot, args.neurons, title, pixels, answer)
    print(
        f"{layer}: {spikes.sum():,.0f} spikes of {spikes.shape[1]:,} neurons in {spikes.shape[0]} time steps, firing "
        f"rate {spikes.mean():.4f}. Wrote {args.plot}"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
