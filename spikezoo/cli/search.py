"""Find AutoST architectures: exactly, or by the paper's evolution.

spikezoo search --space tiny --params 4.0e6:4.22e6 --output found
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spikezoo import search
from spikezoo.data import dataset_info
from spikezoo.flags import Parser, add_flags

__all__ = ["main"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo search", __doc__)
    parser.add_argument("--space", default="tiny", help="tiny, small, base, or a YAML file (default: %(default)s)")
    parser.add_argument("--params", metavar="LO:HI", help="window of trainable parameters, for instance 4.0e6:4.22e6")
    parser.add_argument("--macs", metavar="LO:HI", help="window of the MACs of all time steps")
    parser.add_argument("--latency", type=float, metavar="MS", help="largest time of an image, measured on the best")
    parser.add_argument("--metric", default="flops", help=f"{', '.join(search.METRICS)} (default: %(default)s)")
    parser.add_argument(
        "--method", choices=("exact", "evolution"), help="(default: exact for metrics of the architecture alone)"
    )
    add_flags(parser, "T", default=4, help="time steps (default: %(default)s)")
    add_flags(
        parser,
        "dataset",
        default="none",
        help="sets the three below; metrics that read a network see it (default: noise)",
    )
    add_flags(parser, "num-classes", "img-size", "in-chans", help="(default: the dataset's, without one CIFAR-10's)")
    add_flags(parser, "data-dir")
    parser.add_argument("--top", type=int, default=10, help="how many nets to show (default: %(default)s)")
    add_flags(parser, "seed", default=0)
    parser.add_argument("--output", metavar="DIR", help="write search.csv, best.yaml and search.png there")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    space = search.Space.of(args.space)
    dataset = None if args.dataset == "none" else args.dataset
    info = dataset_info(dataset or "cifar10", args.data_dir)
    shape = {key: getattr(args, key) for key in ("num_classes", "img_size", "in_chans")}
    shape = {key: getattr(info, key) if value is None else value for key, value in shape.items()}
    setting = search.Setting(args.T, **shape)
    constraints = search.Constraints(
        parameters=search.window(args.params) if args.params else None,
        flops=search.window(args.macs) if args.macs else None,
        latency_ms=args.latency,
    )
    method = args.method or ("evolution" if args.metric in search.MEASURED else "exact")
    if method == "exact":
        result = search.exact(space, args.metric, setting, constraints, top=args.top)
        print(f"Space {space.name}: all {space.size:,} nets covered in {result.seconds:.2f} s, exact")
    else:
        images = labels = None
        if dataset and args.metric in search.MEASURED:
            images, labels = search.batch_of(dataset, args.metric, setting, args.seed, data_dir=args.data_dir)
        log = f"{args.output}/evolution.jsonl" if args.output else None
        result = search.evolve(
            space,
            args.metric,
            setting,
            constraints,
            settings=search.Evolution(seed=args.seed),
            images=images,
            labels=labels,
            top=args.top,
            log=log,
            progress=True,
        )
        print(f"Space {space.name}: {result.looked_at:,} of {space.size:,} nets in {result.seconds:.2f} s, evolution")
    print(f"\n{search.table(result, args.metric)}")
    if args.latency:
        print("\nLatency was measured on these only: a quicker net of the space may have been passed over.")
    if args.output:
        paths = search.write(
            result,
            args.output,
            space=space,
            metric=args.metric,
            setting=setting,
            constraints=constraints,
            dataset=dataset,
            command=args.command,
        )
        print(f"\nWritten: {', '.join(map(str, paths))}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
