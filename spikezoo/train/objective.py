"""What training minimises: cross entropy, TET's over time steps, the teacher's logits, the penalty of firing rates."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn


class Objective:
    """The loss: cross entropy, hard or soft targets, smoothed; TET's over time steps; the firing-rate penalty.

    Args:
        args: Parsed arguments.
        soft: Whether the targets are distributions (mixup, cutmix).
    """

    def __init__(self, args: argparse.Namespace, soft: bool) -> None:
        self.args = args
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        if soft:
            self.criterion = SoftTargetCrossEntropy()
        elif args.smoothing:
            self.criterion = LabelSmoothingCrossEntropy(args.smoothing)

    def __call__(self, output: Tensor, target: Tensor, rates: Tensor, taught: Tensor | None = None) -> Tensor:
        """Loss of logits ``[B, K]``, with TET ``[T, B, K]``, firing rates ``[layers, T]`` and a teacher's logits."""
        output = output.float()
        if self.args.tet:
            loss = torch.stack([self.criterion(step, target) for step in output]).mean()
            weight = self.args.tet_lambda
            if weight:
                loss = (1 - weight) * loss + weight * F.mse_loss(output, torch.ones_like(output))
        else:
            loss = self.criterion(output, target)
        if taught is not None:
            # As timm's LogitDistillationTask; with the temperature squared its gradients keep their size.
            share, heat = self.args.distill_weight, self.args.distill_temperature
            logits = (output.mean(0) if self.args.tet else output) / heat
            wanted = F.log_softmax(taught.float() / heat, -1)
            apart = F.kl_div(F.log_softmax(logits, -1), wanted, reduction="batchmean", log_target=True)
            loss = (1 - share) * loss + share * heat**2 * apart
        if self.args.rate_penalty:
            loss = loss + self.args.rate_penalty * (rates.mean(1) - self.args.rate_target).clamp_min(0).mean()
        return loss
