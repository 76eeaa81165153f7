"""DynSNN in a run of training: after which epochs neurons are reactivated or removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spikezoo.transforms.dynsnn import check_reactivation, dynsnn_report, masks_of, prune, reactivate, share
from spikezoo.transforms.rates import fade, neuron_rates, threshold_for
from spikezoo.transforms.record import Training

__all__ = ["after_epoch", "report", "start"]


def start(training: Training, facts: Mapping[str, Any]) -> None:
    """Raise where the run ends before what is planned, or where its model cannot be reactivated.

    Args:
        training: The run.
        facts: The transform's arguments.

    Raises:
        ValueError: As said.
    """
    last = max([*facts["reactivate_at"], facts["prune_at"] or 0])
    if last > training.epochs:
        raise ValueError(f"--dynsnn acts after epoch {last}, and the run has --epochs {training.epochs}.")
    if facts["reactivate_at"]:
        check_reactivation(training.model)


def after_epoch(training: Training, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Reactivate or remove what fades, if that is due after this epoch; returns what summary.csv says of it.

    Args:
        training: The run.
        facts: The transform's arguments.
    """
    model, ema, epoch = training.model, training.ema, training.epoch
    told: dict[str, Any] = {"dynsnn_fading": None, "dynsnn_top1_before": None}
    due = "reactivates" if epoch in facts["reactivate_at"] else "prunes" * (epoch == facts["prune_at"])
    if due:
        with training.autocast():
            rates = neuron_rates(model, training.images(facts["samples"]))
        threshold = facts["threshold"]
        if threshold is None or (due == "prunes" and facts["compression"] is not None):
            threshold = threshold_for(model, rates, facts["compression"])
        fading = fade(rates, threshold)
        before = training.evaluate()
        told["dynsnn_top1_before"] = before.get("ema", before)["top1"]
        told["dynsnn_fading"] = share(model, fading)
        if due == "prunes":
            prune(model, rates, threshold, training.optimizer, ema)
        else:
            # One generator an epoch: the same weights on all ranks, and in a run that was resumed.
            generator = torch.Generator().manual_seed((training.seed << 16) + epoch)
            reactivate(model, fading, training.optimizer, ema, generator, facts["weights"])
    told["dynsnn_removed"] = share(model, {name: ~mask for name, mask in masks_of(model).items()})
    if due:
        training.say(
            f"epoch {epoch}/{training.epochs}: DynSNN {due} {told['dynsnn_fading']:.2f} % of the neurons, with "
            f"firing rates below {threshold:.4g}; top-1 before that {told['dynsnn_top1_before']:.2f} %"
        )
    return told


def report(model: nn.Module) -> dict[str, Any]:
    """What is left of a delivered model: neurons, synapses, parameters."""
    return dict(dynsnn_report(model))
