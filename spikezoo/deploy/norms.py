"""Norms of deployed models: a scale and a shift that a compiler fuses, and batch norm rounded as torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Affine", "ExactNorm", "exact_norms"]


class Affine(nn.Module):
    """A scale and a shift of every channel, from operations that a compiler fuses.

    Args:
        scale: ``[C]``; its type is what is computed in.
        shift: As ``scale``.
        dtype: Type of the result.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C, ...]`` to the same shape."""
        dims = (1, -1, *[1] * (x.dim() - 2))
        return (x.to(self.scale.dtype) * self.scale.view(dims) + self.shift.view(dims)).to(self.dtype)


class ExactNorm(Affine):
    """Batch norm with its running statistics, rounded as torch's own on a CPU.

    There it is one multiply-add with a single rounding. Float64 holds the product of two float32 exactly, so only the
    sum is rounded twice.
    """

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None and var is not None
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        weight, bias = norm.weight, norm.bias
        # The norm itself says what it multiplies with and adds.
        scale = F.batch_norm(one[None], zero, var, weight, None if bias is None else zero, eps=norm.eps)[0]
        shift = F.batch_norm(zero[None], mean, var, weight, bias, eps=norm.eps)[0]
        super().__init__(scale.double(), shift.double())


def exact_norms(model: nn.Module) -> str | None:
    """Replace the norms of a model, unless this processor rounds them otherwise; then say so."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d) and child.running_mean is not None:
                exact = ExactNorm(child)
                channels = child.num_features
                probe = torch.linspace(-9, 9, 16 * channels, device=child.running_mean.device).view(-1, channels)
                probe = probe if isinstance(child, nn.BatchNorm1d) else probe[..., None, None]
                if not torch.equal(child(probe), exact(probe)):
                    return "batch norms kept, and may differ from the model's by a rounding on this processor"
                setattr(module, name, exact)
    return None
