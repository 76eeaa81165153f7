"""Surrogate gradients: steps forward, slopes backward.

``x`` is the distance to the threshold, ``alpha`` the steepness (SpikingJelly's convention).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["SURROGATES", "floor", "sign", "spike"]


def _rectangle(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x.abs() <= 0.5 / alpha, alpha, 0.0).to(x.dtype)


def _tanh(x: Tensor, alpha: float) -> Tensor:
    slope = alpha * (1 - torch.tanh(alpha * x).square()) / (2 * math.tanh(alpha / 2))
    return torch.where(x.abs() <= 0.5, slope, 0.0).to(x.dtype)


def _triangle(x: Tensor, alpha: float) -> Tensor:
    return (alpha - alpha * alpha * x.abs()).clamp_min(0)


def _sigmoid(x: Tensor, alpha: float) -> Tensor:
    s = torch.sigmoid(alpha * x)
    return (1 - s) * s * alpha


def _arctan(x: Tensor, alpha: float) -> Tensor:
    z = x * (math.pi / 2 * alpha)
    return (alpha / 2) / (1 + z * z)


SURROGATES: dict[str, tuple[Callable[[Tensor, float], Tensor], float]] = {
    "rectangle": (_rectangle, 1.0),  # MPBN eq. 12: slope alpha within 0.5/alpha of the threshold
    "tanh": (_tanh, 3.0),  # the MPBN authors' code: normalised tanh on the unit interval around the threshold
    "triangle": (_triangle, 1.0),  # TET; SpikingJelly's PiecewiseQuadratic
    "sigmoid": (_sigmoid, 4.0),  # SpikingJelly's default
    "arctan": (_arctan, 2.0),  # SpikingJelly's ATan
}


class _Context(Protocol):
    """What torch hands a function of its own: what it saves forward it has backward."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _SpikeContext(_Context, Protocol):
    surrogate: str
    alpha: float


class _Spike(torch.autograd.Function):
    """Heaviside step forward, surrogate gradient backward."""

    # With setup_context, torch.func takes it: gradients a sample by vmap, Jacobians.
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, surrogate: str, alpha: float, strict: bool) -> Tensor:
        return (x > 0 if strict else x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: _SpikeContext, inputs: tuple[Tensor, str, float, bool], output: Tensor) -> None:
        x, ctx.surrogate, ctx.alpha, _ = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: _SpikeContext, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        return grad * SURROGATES[ctx.surrogate][0](x, ctx.alpha), None, None, None


class _Sign(torch.autograd.Function):
    """Sign forward (0 at 0), 2 (1 - |x|) on [-1, 1] backward, as the binary-activation networks of biprop."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (2 - 2 * x.abs()).clamp_min(0)


def spike(x: Tensor, surrogate: str = "sigmoid", alpha: float | None = None, strict: bool = False) -> Tensor:
    """Fire where the distance to the threshold is positive.

    Args:
        x: Membrane potential minus threshold, any shape.
        surrogate: Name of the surrogate gradient: rectangle, tanh, triangle, sigmoid or arctan.
        alpha: Steepness of the surrogate; None takes its default.
        strict: Fire at ``x > 0`` instead of ``x >= 0``.

    Returns:
        Spikes 0 or 1, shape and dtype of ``x``.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return (x > 0 if strict else x >= 0).to(x.dtype)
    return _Spike.apply(x, surrogate, SURROGATES[surrogate][1] if alpha is None else alpha, strict)


class _Floor(torch.autograd.Function):
    """Floor forward, the identity backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.floor()

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> Tensor:
        return grad


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1, shape of ``x``; the gradient is 2 (1 - abs(x)) within [-1, 1]."""
    return _Sign.apply(x)


def floor(x: Tensor) -> Tensor:
    """Round down, shape of ``x``; the gradient is passed on as it is."""
    return _Floor.apply(x)
