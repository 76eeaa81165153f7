"""Draw the activation maps of checkpoints side by side.

spikezoo activations --checkpoint output/ann output/bnn output/ticket --plot maps.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import Tensor

from spikezoo import pictures
from spikezoo.cli.common import add_data, batches, one_image, open_net
from spikezoo.flags import Parser, add_flags

__all__ = ["main"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo activations", __doc__)
    add_flags(parser, "checkpoint", nargs="+", required=True)
    parser.add_argument("--layer", help="such as stages.0.0 (default: of each the neuron in the middle)")
    add_flags(parser, "dataset", help="(default: the first checkpoint's)")
    add_data(parser)
    parser.add_argument("--image", type=int, default=0, help="number of the image in the split (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=4, help="single channels to draw (default: %(default)s)")
    add_flags(parser, "plot", required=True)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    pictures.check_picture(args.plot)
    if args.image < 0 or args.channels < 0:
        raise ValueError(f"image={args.image}, channels={args.channels}: expected integers >= 0.")
    columns = []
    pixels: Tensor
    dataset = args.dataset
    for checkpoint in args.checkpoint:
        _, model, dataset, _ = open_net(args, {}, dataset, checkpoint=checkpoint)
        loader = batches(args, dataset, model, 1)
        image = one_image(loader, args.image, f"{dataset}/{args.split}")
        layer, maps = pictures.activation_maps(model, image, args.layer)
        columns.append((f"{pictures.caption(model)}\n{layer}", maps))
        pixels = pictures.to_pixels(image[None], loader.info.mean, loader.info.std)[0]
    title = f"Activations (mean over time), image {args.image} of {dataset}/{args.split}"
    pictures.draw_activations(columns, pixels, args.plot, args.channels, title)
    print(f"Wrote {args.plot}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
