"""Hold several models side by side: accuracy, energy, size and time steps, in one table and one picture.

spikezoo compare spiking_vgg9 spiking_vgg9.cifar10_binw40 mpbn_resnet20 --data-dir DATA --plot compare.png
spikezoo compare output/one output/two --data-dir DATA
spikezoo compare spikformer_4_384 autost_small --dataset none
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from spikezoo import pictures
from spikezoo.checkpoint import WEIGHTS_NAME
from spikezoo.cli.common import add_data, batches, noise, open_net
from spikezoo.counting import align, count_loader
from spikezoo.data import Batch
from spikezoo.evaluate import evaluate
from spikezoo.flags import Parser, add_flags, whole_flags
from spikezoo.registry import shipped_folder

__all__ = ["compare", "main", "show"]


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo compare", __doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="models, or files and folders of weights")
    add_flags(parser, "T")
    add_flags(parser, "dataset", help="(default: each model's own; none is noise, without accuracy)")
    add_data(parser)
    add_flags(parser, "images", default=32, help="count on so many images (default: %(default)s)")
    parser.add_argument("--val-subset", type=int, metavar="N", help="accuracy on N images only, classes balanced")
    add_flags(parser, "batch-size")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_flags(parser, "plot", help="draw accuracy over energy, or energies where there is no accuracy")
    return parser


def compare(
    name: str, args: argparse.Namespace, given: Mapping[str, Any], counting: Mapping[str, Any], accuracy: bool = True
) -> dict[str, Any]:
    """Measure one model: a row of the table.

    Args:
        name: A model, or a file or folder of weights.
        args: Parsed flags of data.
        given: Arguments of ``create_model``.
        counting: Options of :func:`spikezoo.count_loader`.
        accuracy: Measure it, where there is data.
    """
    checkpoint = name if Path(name).exists() else None
    _, model, dataset, weights = open_net(args, dict(given), args.dataset, None if checkpoint else name, checkpoint)
    data: Iterable[Tensor | Batch] = [noise(model, args.images)]
    top1 = None
    if dataset != "none":
        subset = {"subset": args.val_subset} if getattr(args, "val_subset", None) else {}
        data = loader = batches(args, dataset, model, args.batch_size, **subset)
        if accuracy:
            device = next(model.parameters()).device
            top1 = evaluate(model, loader, device=device, rates=False, progress=True)["top1"]
    inputs = "auto" if model.takes_events else "analog"  # pixels are no spikes
    counted = count_loader(model, data, args.images, inputs=inputs, **counting).mean
    file = Path(weights) if checkpoint else shipped_folder(weights) / WEIGHTS_NAME
    tensors = (*model.parameters(), *model.buffers())
    size = file.stat().st_size if file.is_file() else sum(tensor.nbytes for tensor in tensors)
    return {
        "model": name if checkpoint or weights == "random" else weights,
        "dataset": dataset,
        "weights": "random" if weights == "random" else "trained",
        "T": model.T,
        "neuron": model.neuron_config.kind,
        "top1": top1,
        **{key: value for key, value in counted.row().items() if key.startswith(("energy", "percent", "uncounted"))},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": size,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text for people."""
    lines = [("model", "data", "T", "top-1, %", "mJ exact", "mJ paper", "% of the ANN", "file, MB", "parameters")]
    for row in rows:
        lines.append(
            (
                row["model"] + (" (random weights)" if row["weights"] == "random" else ""),
                "noise" if row["dataset"] == "none" else row["dataset"],
                str(row["T"]),
                "" if row["top1"] is None else f"{row['top1']:.2f}",
                f"{row['energy_exact_mj']:.4g}",
                f"{row['energy_paper_mj']:.4g}",
                f"{row['percent_of_ann_exact'] or float('nan'):.1f}",
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['parameters']:,}",
            )
        )
    return align(lines, left=2)


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed flags."""
    whole_flags(args, "images", "batch_size", "val_subset")
    if args.plot:
        pictures.check_picture(args.plot)
    given = {} if args.T is None else {"T": args.T}
    return show([compare(name, args, given, {"piece": 8}) for name in args.names], args)


def show(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> int:
    """Print the table or JSON, and draw the picture, of rows of :func:`compare`."""
    print(json.dumps(rows, indent=2) if args.json else table(rows))
    for row in rows:
        if row["uncounted"] and not args.json:
            print(f"{row['model']}: NOT COUNTED: {', '.join(row['uncounted'])}")
    if args.plot:
        title = f"{len(rows)} models, energy counted on {args.images} images"
        if all(row["top1"] is not None for row in rows):
            pictures.draw_zoo(rows, args.plot, title=title)
        else:
            pictures.draw_energies(rows, args.plot, title)
        if not args.json:
            print(f"Wrote {args.plot}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    return run(build_parser().parse_args(argv))
