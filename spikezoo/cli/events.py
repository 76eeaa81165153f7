"""Draw the event frames of a recording.

spikezoo events nmnist --data-dir DATA --T 10 --plot events.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spikezoo import pictures
from spikezoo.data.events import open_events
from spikezoo.flags import Parser, add_flags

__all__ = ["main"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo events", __doc__)
    parser.add_argument("dataset", help="nmnist, cifar10dvs, dvs128gesture, events:PATH, ...")
    add_flags(parser, "data-dir", "dataset-download", "split")
    parser.add_argument("--recording", type=int, default=0, help="its number in the split (default: %(default)s)")
    add_flags(parser, "T", default=10, help="frames (default: %(default)s)")
    add_flags(parser, "frames-by", default="number")
    add_flags(parser, "duration-us")
    add_flags(parser, "plot", required=True)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    pictures.check_picture(args.plot)
    how = {"frames_by": args.frames_by, "duration_us": args.duration_us}
    found = open_events(
        args.dataset, args.split, T=args.T, data_dir=args.data_dir, download=args.dataset_download, **how
    )
    if not 0 <= args.recording < len(found):
        raise ValueError(f"recording={args.recording}: {found.split} has recordings 0 to {len(found) - 1}.")
    frames, label = found.sample(args.recording), found.classes[int(found.labels[args.recording])]
    title = f"{args.dataset}/{args.split}, recording {args.recording} of class {label}: {frames.sum():,.0f} events"
    pictures.draw_events(frames, args.plot, title)
    print(f"{title}. Wrote {args.plot}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
