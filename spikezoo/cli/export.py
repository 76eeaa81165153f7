"""Write a model as ONNX (any) or NIR (convolutional ones).

spikezoo export --checkpoint output/quickstart --output quickstart.onnx
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spikezoo.cli.common import add_data, add_name, batches, noise, open_net
from spikezoo.export import check_suffix, export
from spikezoo.flags import Parser, add_flags, whole_flags

__all__ = ["main"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo export", __doc__)
    add_name(parser)
    add_flags(parser, "T")
    add_flags(
        parser,
        "dataset",
        help="whose images ONNX is checked on (default: the checkpoint's, else what fits the model's input; none is "
        "random noise)",
    )
    add_data(parser)
    add_flags(parser, "images", default=8)
    parser.add_argument("--fixed-batch", action="store_true", help="ONNX for batches of --images only")
    parser.add_argument("--output", metavar="FILE", required=True, help="file to write: .onnx or .nir")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    suffix = check_suffix(args.output)
    whole_flags(args, "images")
    given = {"T": args.T} if args.T is not None else {}
    name, model, dataset, weights = open_net(args, given, args.dataset, args.name, args.checkpoint)
    if dataset == "none":
        images = noise(model, args.images)
    else:
        images = next(iter(batches(args, dataset, model, args.images)))[0]
    path = export(model.eval(), args.output, images, not args.fixed_batch)
    said = f"random weights (seed {args.seed})" if weights == "random" else f"weights {weights}"
    source = "noise" if dataset == "none" else f"{dataset}/{args.split}"
    checked = f", checked on {len(images)} images of {source}" if suffix == ".onnx" else ""
    print(f"{name}, {said}. Wrote {path}{checked}.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
