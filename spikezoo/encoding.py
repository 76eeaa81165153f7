"""Encodings: turn a batch of images or event frames into a sequence over time, without parameters."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ENCODINGS", "direct", "poisson", "ttfs"]

ENCODINGS = ("direct", "poisson", "ttfs")


def direct(x: Tensor, T: int) -> tuple[Tensor, int]:
    """Direct encoding: every time step sees the same image; event frames are their own encoding.

    An image is not repeated here. It comes back as one frame, which the stem convolves and normalises once; its
    result is broadcast over the T steps where the first neuron needs it.

    Args:
        x: Images ``[B, C, H, W]`` or event frames ``[B, T, C, H, W]``.
        T: Time steps for images; event frames bring their own.

    Returns:
        Frames ``[1, B, C, H, W]`` or ``[T, B, C, H, W]``, and the number of time steps.
    """
    if x.dim() == 4:
        return x.unsqueeze(0), T
    return x.transpose(0, 1), x.shape[1]


def poisson(x: Tensor, T: int, seed: int | None = None) -> tuple[Tensor, int]:
    """Poisson rate coding: at every time step a pixel spikes with its own value as the probability.

    Args:
        x: Images ``[B, C, H, W]`` with values in [0, 1].
        T: Time steps.
        seed: Each image gets the spikes that this number and its pixels determine: the same at every call, in any
            batch, on any device. None draws from torch's global generator.

    Returns:
        Spikes 0 or 1, ``[T, B, C, H, W]``, and T.

    Raises:
        ValueError: Values outside [0, 1], or not a number; T below 1.

    Examples:
        >>> spikes, T = poisson(torch.full((1, 1, 2, 2), 0.5), T=100, seed=0)
    """
    if not isinstance(T, int) or T < 1:
        raise ValueError(f"T={T!r}: expected an integer >= 1, the number of time steps.")
    return torch.ops.spikezoo.poisson(x.detach(), T, seed), T


def ttfs(x: Tensor, T: int) -> tuple[Tensor, int]:
    """Time to first spike: one spike a pixel, at step ``round((T - 1) * (1 - x))``: bright pixels are early.

    Args:
        x: Images ``[B, C, H, W]`` with values in [0, 1].
        T: Time steps, 2 at least: with one, all pixels would spike alike.

    Returns:
        Spikes 0 or 1, ``[T, B, C, H, W]``, and T.

    Raises:
        ValueError: Values outside [0, 1], or not a number; T below 2.

    Examples:
        >>> spikes, T = ttfs(torch.tensor([[[[1.0, 0.0]]]]), T=8)  # the first pixel spikes first, the second last
    """
    if not isinstance(T, int) or T < 2:
        raise ValueError(
            f"T={T!r} with encoding='ttfs': expected an integer >= 2. The image is in the time of the spikes, and in "
            "one step all pixels spike alike. Use T=8, or encoding='poisson'."
        )
    if torch.compiler.is_exporting():  # to torch's own operations, of which none looks at values
        return _first_spikes(x.detach(), T), T
    return torch.ops.spikezoo.ttfs(x.detach(), T), T


def _check_unit(x: Tensor, name: str) -> None:
    if x.numel() == 0:
        return
    low, high = (value.item() for value in torch.aminmax(x))
    if not (low >= 0 and high <= 1):  # nan is neither
        raise ValueError(
            f"Input from {low:.4g} to {high:.4g}: encoding={name!r} takes values in [0, 1], so drop the normalisation. "
            "Type --mean 0 --std 1, or create_loader(..., mean=(0,), std=(1,)). Random erasing also leaves this range."
        )


# As operations of their own: what looks at values, or loops over samples, would break a compiled graph.
@torch.library.custom_op("spikezoo::poisson", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _poisson(x: Tensor, T: int, seed: int | None) -> Tensor:
    _check_unit(x, "poisson")
    if seed is None:
        return (torch.rand((T, *x.shape), device=x.device) < x).to(x.dtype)
    # The sum of the bits is exact, so that it depends on nothing but the pixels.
    images = x.float().cpu().contiguous()
    bits = images.view(torch.int32).long().flatten(1).sum(1).tolist()
    spikes = torch.empty((T, *images.shape), dtype=torch.bool)
    for index, (image, own) in enumerate(zip(images, bits, strict=True)):
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + own) % 2**63)
        torch.lt(torch.rand((T, *image.shape), generator=generator), image, out=spikes[:, index])
    return spikes.to(x.device).to(x.dtype)


@torch.library.custom_op("spikezoo::ttfs", mutates_args=())
def _ttfs(x: Tensor, T: int) -> Tensor:
    _check_unit(x, "ttfs")
    return _first_spikes(x, T)


def _first_spikes(x: Tensor, T: int) -> Tensor:
    # Half precisions cannot count more than 256 or 2048 steps.
    step = ((T - 1) * (1 - x.to(torch.promote_types(x.dtype, torch.float32)))).round()
    return (step == torch.arange(T, device=x.device).view(-1, *[1] * x.dim())).to(x.dtype)


@_poisson.register_fake
def _(x: Tensor, T: int, seed: int | None) -> Tensor:
    return x.new_empty((T, *x.shape))


@_ttfs.register_fake
def _(x: Tensor, T: int) -> Tensor:
    return x.new_empty((T, *x.shape))
