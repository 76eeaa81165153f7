"""Augmentations of batches, and the random numbers that they are made of.

Everything random is a pure function of the seed, the epoch, the position and the rank; the global random states of
torch, numpy and python are the same afterwards as before. All numbers are drawn on the CPU, so that a GPU run sees the
same augmentations as a CPU run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as TF

from spikezoo.data.info import refuse

_POLICIES = [policy.value for policy in transforms.AutoAugmentPolicy]  # torchvision's: imagenet, cifar10, svhn


def derive(*parts: int | str) -> int:
    """Make one seed of several numbers, so that near ones (epoch 1, batch 2) share nothing."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generator(*parts: int | str) -> torch.Generator:
    """A generator of one's own for these numbers."""
    return torch.Generator().manual_seed(derive(*parts))


@contextlib.contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed the global generators for code that knows no others, then puts their state back."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed = derive(*parts)
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # Not torch.manual_seed, which would seed the GPUs as well, whose state is the user's.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def mirrored(size: int, padding: int, device: torch.device) -> Tensor:
    """Which of ``size`` pixels in a row stand in one that is padded on both sides by mirroring it at its ends."""
    place = torch.arange(-padding, size + padding, device=device).abs()
    return torch.where(place < size, place, 2 * (size - 1) - place)


def crop(images: Tensor, padding: int, top: Tensor, left: Tensor, mirror: bool = False) -> Tensor:
    """Cut the window at (top, left) [B] out of the images, padded by zeros or mirrored, at the old size."""
    height, width = images.shape[-2:]
    if mirror:  # torch's reflection knows no bytes
        rows, columns = (mirrored(size, padding, images.device) for size in (height, width))
        padded = images[..., rows, :][..., columns]
    else:
        padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def cutout(images: Tensor, size: int | Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Zero a square of side ``size`` (or sides [B]) with the centre (row, column) [B], clipped at the border."""
    top, left = row - size // 2, column - size // 2
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    rows = (y >= top[:, None]) & (y < (top + size)[:, None])
    columns = (x >= left[:, None]) & (x < (left + size)[:, None])
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def roll(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Roll every image by its shifts (down, right) [B]."""
    count, _, height, width = images.shape
    rows = (torch.arange(height, device=images.device) - down[:, None]) % height
    columns = (torch.arange(width, device=images.device) - right[:, None]) % width
    which = torch.arange(count, device=images.device)[:, None, None]
    # The channels come last where indices stand on both sides of them.
    return images[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def snn_policy(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Do one of six things to every sample [B, C, H, W], H = W: the event policy of the Spikformer authors.

    Nothing, a shear along the rows (by up to 0.3 radian), a shift along rows or columns (by up to 5 whole pixels), a
    rotation (by up to 30 degrees), or one square hole (of 0.1 to 11 % of the area). What comes from outside is empty,
    and a pixel takes the value of the nearest one. Magnitudes are drawn evenly, by the authors from 31 values.
    """
    count, size = len(frames), frames.shape[-1]
    chosen = torch.randint(6, (count,), generator=generator)
    signed, positive = 2 * torch.rand(count, generator=generator) - 1, torch.rand(count, generator=generator)

    def only(kind: int, values: Tensor) -> Tensor:
        return torch.where(chosen == kind, values, 0)

    angle = torch.deg2rad(30 * only(4, signed))
    shift = torch.randint(-5, 6, (count,), generator=generator) * (2 / size)  # the frame goes from -1 to 1
    source = torch.stack(
        [
            torch.stack([angle.cos(), angle.sin() + only(1, 0.3 * signed).tan(), only(2, shift)], 1),
            torch.stack([-angle.sin(), angle.cos(), only(3, shift)], 1),
        ],
        1,
    )
    moved = (chosen > 0) & (chosen < 5)
    if moved.any():
        where = moved.to(frames.device)
        grid = F.affine_grid(source[moved].to(frames), [int(moved.sum()), *frames.shape[1:]], align_corners=False)
        frames = frames.clone()
        frames[where] = F.grid_sample(frames[where], grid, "nearest", align_corners=False)
    side = only(5, ((0.001 + 0.109 * positive).sqrt() * size).round().clamp(min=1)).long()
    places = torch.rand(2, count, generator=generator)
    row, column = ((places * (size - side + 1)).long() + side // 2).to(frames.device)
    return cutout(frames, side.to(frames.device), row, column)


@functools.lru_cache(maxsize=16)
def _shares(old: int, new: int) -> Tensor:
    """Which share of each of ``old`` pixels in a row falls into each of ``new``: [new, old], columns sum up to 1."""
    edges = torch.arange(new + 1, dtype=torch.float64) * (old / new)
    pixels = torch.arange(old, dtype=torch.float64)
    shares = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return shares.clamp_(min=0).float()


def fit(frames: Tensor, size: int) -> Tensor:
    """Bring frames of events to a square: pads the shorter side, then shares each event out by area.

    An event of a pixel that two pixels of the new size share counts in both, by the area; so the sum over a frame stays
    the number of its events.

    Args:
        frames: Numbers of events, float32 [B, T, 2, H, W].
        size: Side length.

    Returns:
        [B, T, 2, size, size].
    """
    height, width = frames.shape[-2:]
    if height != width:
        down, right = max(width - height, 0), max(height - width, 0)
        frames = F.pad(frames, (right // 2, right - right // 2, down // 2, down - down // 2))
    if frames.shape[-1] == size:
        return frames
    shares = _shares(frames.shape[-1], size).to(frames.device)
    return shares @ frames @ shares.T


def cutout_pil(image: Image.Image, size: int) -> Image.Image:
    """``_cutout`` for one image of PIL."""
    row, column = torch.randint(image.height, (1,)), torch.randint(image.width, (1,))
    top, left = int(row) - size // 2, int(column) - size // 2
    image = image.copy()
    image.paste(0, (left, top, left + size, top + size))
    return image


def policy(name: str, img_size: int, mean: Sequence[float]) -> Callable[[Image.Image], Any]:
    """Build a policy for RGB images of PIL; ``mean`` is the colour of what timm's policies uncover."""
    if name in _POLICIES:
        return transforms.AutoAugment(transforms.AutoAugmentPolicy(name))
    if name == "trivial":
        return transforms.TrivialAugmentWide()
    rgb = tuple(mean) if len(mean) == 3 else tuple(mean[:1]) * 3
    options: dict[str, Any] = {"color_jitter": None, "mean": rgb, "interpolation": "random", "separate": True}
    try:
        policy = create_transform(img_size, is_training=True, auto_augment=name, **options)[1]
    except (AssertionError, ValueError, KeyError) as error:
        wanted = f"one of {', '.join(_POLICIES)}, trivial, or a configuration of timm's, which refuses it ({error})"
        refuse("auto_augment", name, wanted, "--aa cifar10 or --aa rand-m9-mstd0.5-inc1")
    for step in policy.transforms:
        for op in getattr(step, "ops", ()):
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
    return policy


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """timm's, with black for 0 bits: its 'inc1' asks for them at the top magnitude, and Pillow 13 raises there."""
    return posterize(image, bits_to_keep) if bits_to_keep else image.point([0] * 256 * len(image.getbands()))


def apply_policy(policy: Callable[[Image.Image], Any], images: Tensor) -> Tensor:
    """Apply a policy to every uint8 image [B, 1 or 3, H, W], through RGB also for grey ones."""
    mode = "L" if images.shape[1] == 1 else "RGB"
    # timm's policies fill with an RGB colour, which a grey image of PIL does not take.
    rgb = images.expand(-1, 3, -1, -1).cpu()
    out = [TF.pil_to_tensor(policy(TF.to_pil_image(image)).convert(mode)) for image in rgb]
    return torch.stack(out).to(images.device)
