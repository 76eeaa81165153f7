"""Encodings: turn a batch of images or event frames into a sequence over time, without parameters."""

from __future__ import annotations

from torch import Tensor

__all__ = ["direct"]


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
