"""Logs besides summary.csv: Weights & Biases and TensorBoard, through their own libraries, where they are asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["open_logs"]

# Takes the figures of an epoch and its number.
Log = Callable[[Mapping[str, Any], int], None]


def open_logs(args: argparse.Namespace, folder: Path) -> list[Log]:
    """The logs that flags ask for.

    Args:
        args: Parsed flags.
        folder: The run's.

    Raises:
        ValueError: A library that is not installed.
    """
    found: list[Log] = []
    if args.log_wandb:
        try:
            import wandb
        except ImportError:
            raise ValueError("--log-wandb needs wandb: pip install wandb") from None
        wandb.init(project=args.wandb_project, name=args.experiment, config=vars(args), dir=str(folder), resume="allow")
        found.append(lambda row, epoch: wandb.log(dict(row), step=epoch))
    if args.log_tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--log-tensorboard needs tensorboard: pip install tensorboard") from None
        writer = SummaryWriter(str(folder))

        def write(row: Mapping[str, Any], epoch: int) -> None:
            for key, value in row.items():
                if isinstance(value, int | float):
                    writer.add_scalar(key, value, epoch)
            writer.flush()

        found.append(write)
    return found
