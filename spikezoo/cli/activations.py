"""Draw the activation maps of checkpoints side by side, or how their membrane potentials are distributed.

spikezoo activations --checkpoint output/ann output/bnn output/ticket --plot maps.png
spikezoo activations --checkpoint output/mpbn output/plain --potentials 32 --plot potentials.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import Tensor

from spikezoo import pictures
from spikezoo.cli.common import add_data, batches, one_image, open_net
from spikezoo.flags import Parser, add_flags, whole_flags

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
    parser.add_argument(
        "--potentials",
        type=int,
        metavar="N",
        help="in place of maps: the membrane potentials for N images, before and after a membrane norm",
    )
    add_flags(parser, "plot", required=True)
    return parser


def draw_potentials(args: argparse.Namespace) -> None:
    """Draw the distributions of membrane potentials, and print their means and deviations."""
    columns, dataset = [], args.dataset
    for checkpoint in args.checkpoint:
        _, model, dataset, _ = open_net(args, {}, dataset, checkpoint=checkpoint)
        images, _ = next(iter(batches(args, dataset, model, args.potentials, subset=args.potentials)))
        layer, charged, compared, threshold = pictures.potentials(model, images, args.layer)
        columns.append((f"{pictures.caption(model)}\n{layer}", charged, compared, threshold))
        for step, pair in enumerate(zip(charged, compared, strict=True), 1):
            told = " -> ".join(dict.fromkeys(f"{float(u.mean()):.3f} +-{float(u.std()):.3f}" for u in pair))
            print(f"{checkpoint}, {layer}, step {step}: {told}")
    title = f"Membrane potentials, {args.potentials} images of {dataset}/{args.split}"
    pictures.draw_potentials(columns, args.plot, title)


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    pictures.check_picture(args.plot)
    if args.image < 0 or args.channels < 0:
        raise ValueError(f"image={args.image}, channels={args.channels}: expected integers >= 0.")
    if args.potentials is not None:
        whole_flags(args, "potentials")
        draw_potentials(args)
        print(f"Wrote {args.plot}")
        return 0
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
