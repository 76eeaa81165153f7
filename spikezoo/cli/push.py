"""Publish a checkpoint on the Hugging Face Hub with a model card, or all that come with the package.

spikezoo push output/quickstart ORG/NAME --dry-run card
spikezoo push --all --org ORG --dry-run cards
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spikezoo.flags import Parser
from spikezoo.hub import push_all, push_folder

__all__ = ["main"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo push", __doc__)
    parser.add_argument(
        "checkpoint", nargs="?", metavar="DIR_OR_CHECKPOINT", help="a folder that training wrote, or a file in one"
    )
    parser.add_argument("repository", nargs="?", metavar="ORG/NAME", help="made if it is not there")
    parser.add_argument(
        "--all", action="store_true", help="every checkpoint that comes with the package, as ORG/NAME.TAG"
    )
    parser.add_argument("--org", metavar="ORG", help="with --all: organisation, or user")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="made if it is not there (default: the main one)")
    parser.add_argument("--license", default="apache-2.0", help="of the weights (default: %(default)s)")
    parser.add_argument("--dry-run", metavar="DIR", help="write the files to this new folder and push nothing")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    if args.all:
        if args.checkpoint or args.revision or not args.org:
            raise ValueError("push --all takes --org ORG, and no checkpoint, repository or --revision.")
        for where in push_all(args.org, private=args.private, license=args.license, dry_run=args.dry_run):
            print(f"Wrote {where}, pushed nothing." if args.dry_run else where, flush=True)
        return 0
    if not args.repository or args.org:
        raise ValueError("push takes DIR_OR_CHECKPOINT and ORG/NAME, or --all and --org ORG.")
    where = push_folder(
        args.checkpoint,
        args.repository,
        private=args.private,
        revision=args.revision,
        license=args.license,
        dry_run=args.dry_run,
    )
    print(f"Wrote {where}, pushed nothing." if args.dry_run else where)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
