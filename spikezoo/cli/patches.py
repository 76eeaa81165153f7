"""Draw which patches of real images MultiSp keeps.

spikezoo patches --checkpoint output/multisp --plot patches.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spikezoo import pictures
from spikezoo.cli.common import add_data, add_name, batches, open_net
from spikezoo.flags import Parser, add_flags, whole_flags
from spikezoo.transforms import apply
from spikezoo.transforms.multisp import PatchSelection, kept_patches

__all__ = ["main"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo patches", __doc__)
    add_name(parser)
    parser.add_argument(
        "--patch-ratio", type=float, help="fraction of the patches removed, for a model that keeps all (default: 0.3)"
    )
    add_flags(parser, "dataset")
    add_data(parser)
    add_flags(parser, "images", default=8)
    add_flags(parser, "plot", required=True)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    pictures.check_picture(args.plot)
    whole_flags(args, "images")
    name, model, dataset, weights = open_net(args, {}, args.dataset, args.name, args.checkpoint)
    selects = any(isinstance(module, PatchSelection) for module in model.modules())
    if args.patch_ratio is not None or not selects:
        ratio = 0.3 if args.patch_ratio is None else args.patch_ratio
        model = apply(model, "multisp", pep_sparsity=0, binary_pep=False, patch_ratio=ratio)
    loader = batches(args, dataset, model, args.images)
    images = next(iter(loader))[0]
    pixels = pictures.to_pixels(images, loader.info.mean, loader.info.std)
    made = pictures.caption(model).replace("\n", ", ") + (", random weights" if weights == "random" else "")
    title = f"{made}; {dataset}/{args.split}"
    mask = kept_patches(model.eval(), images).cpu()
    pictures.draw_patches(pixels, mask, args.plot, title)
    kept, total = int(mask[0].sum()), mask[0].numel()
    print(f"{name} keeps {kept} of {total} patches. Wrote {args.plot}")
    if mask.flatten(1)[:, :kept].all() and kept < total:
        print(
            "It keeps the first patches of every image, since all of them are equally strong: an embedding that is not "
            "trained puts out no spikes in evaluation mode."
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
