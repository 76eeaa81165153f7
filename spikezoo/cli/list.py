"""List models: parameters, time steps, the data they are for and their trained weights.

spikezoo list '*resnet*'
spikezoo list --pretrained
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spikezoo.factory import model_info
from spikezoo.flags import Parser
from spikezoo.registry import list_models, list_pretrained

__all__ = ["main"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo list", __doc__)
    parser.add_argument("pattern", nargs="?", default="", help="a name, or a part of names with * and ?")
    parser.add_argument("--pretrained", action="store_true", help="trained weights only, with their accuracy")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    if args.pretrained:
        weights = list_pretrained(args.pattern)
        if not weights:
            raise ValueError(
                f"No trained weights match {args.pattern!r}: spikezoo list --pretrained names all of them."
            )
        print(*weights, sep="\n")
        return 0
    found = list_models(args.pattern)
    if not found:
        raise ValueError(f"No model matches {args.pattern!r}: spikezoo list names all of them.")
    width = max(map(len, found))
    for name in found:
        info = model_info(name)
        size = "x".join(map(str, info.input_size))
        line = f"{name:<{width}} {info.parameters:>13,}  {size:<11} {', '.join(info.pretrained)}"
        print(line.rstrip())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
