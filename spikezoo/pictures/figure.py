"""What all pictures share: which files can be drawn, how they are written, pixels of images and of event frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikezoo.checkpoint import atomic, check_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["bare", "check_picture", "event_pixels", "plain_ticks", "to_pixels", "write"]

FORMATS = (".png", ".pdf", ".svg")


def check_picture(path: str | Path) -> type[Figure]:
    """Matplotlib's ``Figure``, if a picture can be drawn and written to ``path``.

    Raises:
        ValueError: A name without a known suffix, or matplotlib is missing.
        OSError: It cannot be written there.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"Picture {str(path)!r}: expected a name that ends in {', '.join(FORMATS)}.")
    check_target(path)
    try:
        import matplotlib  # noqa: F401  (the part alone may stand imported without it)
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("A picture needs matplotlib: pip install 'spikezoo-snn[plot]'") from error
    return Figure


def write(figure: Figure, path: str | Path) -> None:
    """Write a picture under a temporary name first."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format=Path(path).suffix[1:].lower())


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis (``axes.xaxis``) as people write numbers: 0.2, 0.5, 1, 2, 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation of images; of event frames sum over time and give the polarities colours.

    Args:
        images: ``[B, C, H, W]`` with 1 or 3 channels, or ``[B, T, 2, H, W]``.
        mean: What was subtracted, a channel.
        std: What it was divided by.

    Returns:
        ``[B, H, W, 3]`` in [0, 1].

    Raises:
        ValueError: Another number of channels.
    """
    shift, scale = (torch.tensor(value).view(-1, 1, 1) for value in (mean, std))
    if images.dim() == 5 and images.shape[2] == 2:
        return event_pixels((images.cpu() * scale + shift).sum(1))
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"Input of shape {tuple(images.shape)}: expected images of 1 or 3 channels, which have colours."
        )
    return (images.cpu() * scale + shift).clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def bare(axis: Axes) -> None:
    """Take the ticks and the frame from an axis."""
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


# What an event takes from white: off leaves blue, on leaves red, and both together black.
OFF_ON = ((0.87, 0.53, 0.29), (0.16, 0.85, 0.84))


def event_pixels(frames: Tensor) -> Tensor:
    """Colour event frames: blue where the light went off, red where it went on, white where nothing happened.

    Args:
        frames: Numbers of events ``[..., 2, H, W]``, off and on. All share one scale, which ends at the 99th percentile
            of the pixels that saw events, lest one restless pixel hide the others.

    Returns:
        ``[..., H, W, 3]`` in [0, 1].
    """
    seen = frames[frames > 0].float()
    # At least the smallest, for frames of few pixels; torch's quantile refuses many numbers.
    limit = seen.sort().values[int(0.99 * (len(seen) - 1))] if len(seen) else torch.tensor(1.0)
    strength = (frames.float() / limit).clamp(0, 1)
    return (1 - strength.movedim(-3, -1) @ torch.tensor(OFF_ON)).clamp(0, 1)
