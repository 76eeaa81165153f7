"""Muon for networks with norms: timm's, with weights of a fixed norm and a choice of the number format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.optim import Muon
from timm.optim._optim_factory import OptimInfo, default_registry
from timm.optim.muon import (
    _COEFFICIENTS,
    _is_suitable_for_muon,
    get_lr_scale,
    reshape_for_muon,
    resolve_ns_coefficients,
    zeropower_via_newtonschulz,
)
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from spikezoo.precision import fast_bfloat16

__all__ = ["FixedNormMuon", "normalised_weights"]


def normalised_weights(model: nn.Module) -> list[Tensor]:
    """Weights of convolutions and linear layers whose size does not matter, since a batch norm follows.

    Args:
        model: A model whose modules are listed in the order of the data flow.

    Returns:
        The weights, in that order; none whose weights are made of others by a parametrization.
    """
    leaves = [module for module in model.modules() if not list(module.children())]
    found: list[Tensor] = []
    last: nn.Conv2d | nn.Linear | None = None
    for leaf in leaves:
        if isinstance(leaf, nn.Conv2d | nn.Linear):
            last = leaf
        elif isinstance(leaf, nn.modules.batchnorm._BatchNorm) and last is not None:
            found.append(last.weight)
        if not isinstance(leaf, nn.Conv2d | nn.Linear | nn.MaxPool2d | nn.AvgPool2d):
            last = None
    return found


class FixedNormMuon(Muon):
    """timm's Muon; weights before a norm keep the length sqrt(outputs), as in airbench (Jordan 2024).

    A norm makes the length of a weight meaningless, but it divides the learning rate: with the length fixed, the
    learning rate is the share of a weight that a step replaces. The orthogonalisation runs in float32 where bfloat16 is
    slow. What is no matrix, and the groups with ``use_fallback``, are trained by (N)AdamW at
    ``lr * fallback_lr_scale``, as in timm.

    Args:
        params: Parameters or groups.
        **kwargs: Arguments of ``timm.optim.Muon``.
    """

    def __init__(self, params: ParamsT, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self._fixed: set[int] = set()

    def fix_norms(self, weights: Iterable[Tensor]) -> None:
        """Name the weights whose length is kept."""
        self._fixed = {id(weight) for weight in weights}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices = [
            (p, group)
            for group in self.param_groups
            if not group.get("use_fallback", False)
            for p in group["params"]
            if p.grad is not None and _is_suitable_for_muon(p)
        ]
        gradients = [p.grad for p, _ in matrices]
        for p, group in matrices:
            self._step_matrix(p, group)
            p.grad = None  # so that timm's step sees the others alone
        super().step()
        for (p, _), gradient in zip(matrices, gradients, strict=True):
            p.grad = gradient
        return loss

    def _step_matrix(self, p: Tensor, group: dict[str, Any]) -> None:
        state, gradient, momentum = self.state[p], p.grad, group["momentum"]
        assert gradient is not None
        state["use_muon"] = True
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        flat, shape = reshape_for_muon(gradient.lerp(buffer, momentum) if group["nesterov"] else buffer)
        orthogonal = zeropower_via_newtonschulz(
            flat,
            group["ns_steps"],
            resolve_ns_coefficients(group["ns_coefficients"], _COEFFICIENTS),
            eps=group["eps"],
            safety_factor=group["safety_factor"],
            dtype=torch.bfloat16 if fast_bfloat16(p.device) else torch.float32,
        )
        scale = get_lr_scale(flat.shape, group["adjust_lr_fn"]) if group["adjust_lr_fn"] else 1.0
        p.mul_(math.sqrt(len(p)) / p.norm() if id(p) in self._fixed else 1 - group["lr"] * group["weight_decay"])
        p.add_(orthogonal.reshape(shape).to(p.dtype), alpha=-group["lr"] * scale)


default_registry.register(
    OptimInfo(
        name="fixednormmuon",
        opt_class=FixedNormMuon,
        description="Muon with NAdamW for what is no matrix; weights before a norm keep their length",
        has_momentum=True,
        has_eps=True,
        has_betas=True,
        defaults={
            "nesterov": True,
            "adjust_lr_fn": "original",
            "ns_steps": 3,
            "ns_coefficients": "original",
            "fallback_lr_scale": 0.03,
        },
    )
)
