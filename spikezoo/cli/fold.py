"""Fold a checkpoint for inference: membrane norms into thresholds, batch norms into weights.

spikezoo fold output/mpbn_resnet20 --output output/folded

The first fold is exact, the second equal up to rounding. Tickets are to be baked first, which training does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from spikezoo.checkpoint import read_config
from spikezoo.cli.common import noise
from spikezoo.evaluate import open_model
from spikezoo.flags import Parser
from spikezoo.hub.provenance import training_facts
from spikezoo.neurons import MembraneNorm
from spikezoo.saving import save_checkpoint
from spikezoo.transforms import fold_bn, fold_mpbn

__all__ = ["main"]


def _count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("spikezoo fold", __doc__)
    parser.add_argument("checkpoint", help="a folder, a file of weights beside its config.json, or hf-hub:ORG/NAME")
    parser.add_argument("--exact", action="store_true", help="membrane norms only, whose fold changes no spike")
    parser.add_argument("--output", metavar="DIR", required=True, help="write the folded network there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    args = build_parser().parse_args(argv)
    name = read_config(args.checkpoint).get("architecture") if ":" not in args.checkpoint else args.checkpoint
    if not name:
        raise ValueError(f"{args.checkpoint}: there is no config.json that names the architecture of these weights.")
    checkpoint = None if name == args.checkpoint else args.checkpoint
    model, _, _ = open_model(name, {}, checkpoint=checkpoint, pretrained=checkpoint is None, dataset="none")
    folded = model.eval()
    membrane, batch = _count(model, MembraneNorm), _count(model, nn.modules.batchnorm._BatchNorm)
    if membrane:
        folded = fold_mpbn(folded)
    if batch and not args.exact:
        folded = fold_bn(folded)
    if folded is model:
        kind = "membrane norm" if args.exact else "norm"
        raise ValueError(f"Nothing to fold: {args.checkpoint} has no {kind}, or is folded already.")
    left = _count(folded, nn.modules.batchnorm._BatchNorm)
    images = noise(model, 8)
    with torch.no_grad():
        wanted, found = model(images), folded(images)
    facts: dict[str, Any] = {"command": args.command}
    if checkpoint:
        facts |= {"dataset": read_config(checkpoint).get("spikezoo", {}).get("dataset"), **training_facts(checkpoint)}
    save_checkpoint(folded, args.output, {key: value for key, value in facts.items() if value is not None})
    print(
        f"Folded {membrane} membrane norms into thresholds and {batch - left} batch norms into weights; logits of "
        f"noise differ by up to {(found - wanted).abs().max():.3g}, their arg-max is the same on "
        f"{int((found.argmax(1) == wanted.argmax(1)).sum())} of {len(images)} images. Wrote {args.output}."
    )
    return 0
