"""Inputs that may be shown to anybody: scikit-learn's digits, drawings in colour, recordings of a digit that moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from spikezoo.data import load_arrays
from spikezoo.factory import SpikingModel

__all__ = ["Sample", "record", "samples_of"]

# Name, pixels in [0, 1] [C, H, W] or counts of events [T, 2, H, W].
Sample = tuple[str, Tensor]

# Drawings on a ground of 32 x 32: background above and below the horizon, and shapes with their colours.
_SKY, _SEA, _ROAD, _GRASS = (150, 195, 235), (35, 85, 140), (120, 120, 122), (95, 130, 60)
_PICTURES: dict[str, tuple[Any, Any, int, Sequence[tuple[str, Any, Any]]]] = {
    "airplane": (_SKY, _SKY, 32, (
        ("polygon", [(3, 15), (26, 13), (30, 16), (26, 18), (3, 17)], (235, 238, 242)),
        ("polygon", [(12, 16), (19, 15), (12, 25), (9, 25)], (190, 196, 205)),
        ("polygon", [(13, 14), (18, 14), (13, 7), (11, 7)], (205, 210, 218)),
        ("polygon", [(3, 15), (7, 15), (4, 9), (2, 9)], (200, 60, 50)),
    )),
    "automobile": (_SKY, _ROAD, 18, (
        ("polygon", [(7, 17), (11, 11), (21, 11), (25, 17)], (150, 25, 25)),
        ("polygon", [(10, 16), (12, 12), (20, 12), (22, 16)], (60, 75, 90)),
        ("rectangle", [2, 16, 29, 22], (190, 30, 30)),
        ("ellipse", [5, 19, 12, 26], (20, 20, 22)), ("ellipse", [20, 19, 27, 26], (20, 20, 22)),
        ("ellipse", [7, 21, 10, 24], (170, 170, 175)), ("ellipse", [22, 21, 25, 24], (170, 170, 175)),
    )),
    "bird": (_SKY, _GRASS, 26, (
        ("ellipse", [8, 12, 23, 23], (120, 80, 50)), ("ellipse", [19, 7, 27, 15], (105, 68, 42)),
        ("polygon", [(26, 10), (31, 12), (26, 13)], (225, 160, 40)), ("ellipse", [23, 9, 25, 11], (15, 15, 15)),
        ("polygon", [(9, 16), (1, 20), (10, 21)], (95, 60, 38)), ("line", [15, 23, 15, 28], (60, 45, 30)),
    )),
    "ship": (_SKY, _SEA, 21, (
        ("polygon", [(2, 18), (30, 18), (26, 25), (6, 25)], (60, 62, 70)),
        ("rectangle", [9, 13, 22, 18], (240, 240, 240)), ("rectangle", [13, 9, 19, 13], (225, 225, 228)),
        ("rectangle", [15, 5, 17, 9], (200, 60, 50)),
    )),
    "truck": (_SKY, _ROAD, 22, (
        ("rectangle", [2, 7, 19, 22], (230, 230, 232)), ("rectangle", [20, 12, 29, 22], (40, 90, 170)),
        ("rectangle", [23, 13, 28, 17], (55, 65, 80)), ("rectangle", [2, 20, 29, 23], (50, 50, 55)),
        ("ellipse", [4, 20, 10, 26], (20, 20, 22)), ("ellipse", [21, 20, 27, 26], (20, 20, 22)),
    )),
}  # fmt: skip


def _picture(name: str, size: Sequence[int]) -> Tensor:
    """A drawing ``[3, H, W]``, made large and made small again."""
    scale = 8
    above, below, horizon, shapes = _PICTURES[name]
    image = Image.new("RGB", (32 * scale, 32 * scale), above)
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, horizon * scale, 32 * scale, 32 * scale], below)
    for kind, points, colour in shapes:
        flat = [scale * value for point in points for value in (point if isinstance(point, tuple) else (point,))]
        getattr(draw, kind)(flat, colour, **({"width": scale} if kind == "line" else {}))
    image = image.resize((size[1], size[0]), Image.Resampling.BOX)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(*size, 3).permute(2, 0, 1).float() / 255


def _digits() -> list[Sample]:
    """The first of each digit in scikit-learn's test split, ``[1, 8, 8]``."""
    images, labels = load_arrays("digits", "test")
    pixels = images.float() / (255 if images.dtype is torch.uint8 else 1)
    return [(str(digit), pixels[int((labels == digit).nonzero()[0])]) for digit in range(10)]


def _in_frame(image: Tensor, size: Sequence[int], share: float) -> Tensor:
    """A digit ``[1, 8, 8]`` in the middle of a larger frame, of which it fills a share; its edges are made sharper."""
    inner = [round(side * share) for side in size]
    large = (1.5 * F.interpolate(image[None], inner, mode="bicubic")[0] - 0.25).clamp(0, 1)
    top, left = ((side - part) // 2 for side, part in zip(size, inner, strict=True))
    return F.pad(large, (left, size[1] - inner[1] - left, top, size[0] - inner[0] - top))


def record(image: Tensor, T: int, threshold: float = 0.1, reach: float = 4.0, moments: int = 120) -> Tensor:
    """What an event camera sees of an image that moves along a triangle, as N-MNIST was recorded.

    Args:
        image: ``[1, H, W]`` with values in [0, 1].
        T: Frames, of equally many events.
        threshold: Change of brightness that makes an event.
        reach: Length of a side of the triangle in pixels.
        moments: In how many small steps it moves.

    Returns:
        Counts of events ``[T, 2, H, W]``, dark to bright in channel 1.
    """
    height, width = image.shape[-2:]
    corners = torch.tensor([[0.0, 0.0], [0.5, 1.0], [1.0, 0.0], [0.0, 0.0]]) * reach - reach / 2
    times = torch.linspace(0, 3, moments + 1)
    side = times.long().clamp(max=2)
    path = torch.lerp(corners[side], corners[side + 1], (times - side)[:, None])
    theta = torch.eye(2, 3).repeat(len(path), 1, 1)
    theta[:, 0, 2], theta[:, 1, 2] = -2 * path[:, 0] / width, -2 * path[:, 1] / height
    grid = F.affine_grid(theta, [len(path), 1, height, width], align_corners=False)
    seen = F.grid_sample(image.expand(len(path), 1, height, width), grid, align_corners=False)[:, 0]
    events, memory = torch.zeros(moments, 2, height, width), seen[0].clone()
    for moment in range(moments):
        change = seen[moment + 1] - memory
        events[moment, 0], events[moment, 1] = (change < -threshold).float(), (change > threshold).float()
        memory += threshold * (events[moment, 1] - events[moment, 0])
    total = events.sum((1, 2, 3)).cumsum(0)
    frame = ((total - 1).clamp(min=0) * T / total[-1].clamp(min=1)).long().clamp(max=T - 1)
    return torch.zeros(T, 2, height, width).index_add_(0, frame, events)


def samples_of(model: SpikingModel) -> list[Sample]:
    """Inputs for a model, before any normalisation; none where nothing here fits it.

    Args:
        model: A model of :func:`spikezoo.create_model`.
    """
    size = model.img_size
    if model.in_chans == 3:
        return [(name, _picture(name, size)) for name in _PICTURES]
    if model.in_chans > 3:
        return []
    digits = _digits()
    if min(size) > 8:
        share = 20 / (34 if model.takes_events else 28)  # as N-MNIST and MNIST have them
        digits = [(name, _in_frame(image, size, share)) for name, image in digits]
    return [(name, record(image, model.T)) for name, image in digits] if model.takes_events else digits
