"""Write pages of trained nets; the small ones run in the browser.

spikezoo gallery --output site/gallery --serve
spikezoo gallery spiking_conv4.digits --output pages --runtime none
"""

from __future__ import annotations

import argparse
import functools
import http.server
from collections.abc import Sequence
from pathlib import Path

from spikezoo import gallery
from spikezoo.config_files import read_yaml
from spikezoo.flags import Parser, add_flags
from spikezoo.gallery.pages import runtime

__all__ = ["main"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo gallery", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="nets with weights (default: all of the package)")
    parser.add_argument("--output", required=True, metavar="DIR", help="where to")
    parser.add_argument(
        "--runtime",
        metavar="DIR",
        help="npm's package onnxruntime-web, unpacked (default: npm fetches it); none: pages that run nothing",
    )
    add_flags(parser, "data-dir")
    parser.add_argument(
        "--papers",
        default="docs/claims.yaml",
        metavar="FILE",
        help="the papers' accuracies, under checkpoints (default: %(default)s, where it is)",
    )
    parser.add_argument(
        "--serve", nargs="?", type=int, const=8000, metavar="PORT", help="serve the pages (default: 8000)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    papers: dict[str, float] = {}
    if Path(args.papers).is_file():
        try:
            papers = {name: row["top1"] for name, row in read_yaml(Path(args.papers)).get("checkpoints", {}).items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"--papers {args.papers}: expected checkpoints: {{NAME: {{top1: 92.3}}}}.") from error
    parts = None if args.runtime == "none" else runtime(args.runtime)
    page = gallery.build(args.output, args.names or None, papers=papers, parts=parts, data_dir=args.data_dir, say=print)
    print(f"Gallery         {page}")
    if args.serve is not None:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=args.output)
        with http.server.ThreadingHTTPServer(("127.0.0.1", args.serve), handler) as server:
            print(f"Serving         http://127.0.0.1:{args.serve}/ (Ctrl-C ends it)", flush=True)
            server.serve_forever()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
