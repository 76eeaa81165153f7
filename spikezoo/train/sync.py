"""Batch statistics over all processes: every batch norm and membrane norm in one forward pass, on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

__all__ = ["SyncedNorms"]


class SyncedNorms(TorchFunctionMode):
    """Within it, ``F.batch_norm`` of a training takes mean and variance of the batches of all processes together.

    torch's SyncBatchNorm does that for its own layers and on accelerators only. Norms of the membrane potential call
    the same function, so they are met here, too, and neither layers nor names in state dicts change.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """Call a function of torch, or in place of a batch norm that trains the one below."""
        if func is F.batch_norm:
            return _over_all(*args, **(kwargs or {}), plain=func)
        return func(*args, **(kwargs or {}))


class _Sum(torch.autograd.Function):
    """The sum over all processes of a tensor, and of its gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, part: Tensor) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        whole = gradient.contiguous().clone()
        dist.all_reduce(whole)
        return whole


def _over_all(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    plain: Callable[..., Tensor],
) -> Tensor:
    """``F.batch_norm`` with the statistics of all processes; its arguments."""
    if not training:
        return plain(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x = input if input.dtype == torch.float64 else input.float()
    over = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    count = torch.tensor(float(x.numel() // x.shape[1]), dtype=x.dtype, device=x.device)
    dist.all_reduce(count)
    mean = _Sum.apply(x.sum(over)) / count
    centred = x - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(over)) / count
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
    normed = centred * torch.rsqrt(variance + eps).view(shape)
    if weight is not None:
        normed = normed * weight.view(shape)
    if bias is not None:
        normed = normed + bias.view(shape)
    return normed.to(input.dtype)
