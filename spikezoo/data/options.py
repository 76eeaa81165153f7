"""The options of a loader, checked before any data is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.data import IMAGENET_DEFAULT_MEAN

from spikezoo.checks import is_number
from spikezoo.data.augmentation import policy
from spikezoo.data.info import refuse

# Option -> the least whole number (or the choices), and an example.
_WHOLE = {"batch_size": (1, 128), "img_size": (1, 32), "in_chans": (1, 3), "num_classes": (1, 10), "subset": (1, 1000)}
_WHOLE |= {"crop_padding": (0, 4), "cutout": (0, 16), "num_workers": (0, 2), "roll": (0, 5), "T": (1, 10)}
_WHOLE |= {"translate": (0, 2), "views": (1, 8), "holdout": (0, 5000)}
_FRACTIONS = {"hflip": 0.5, "reprob": 0.25, "mixup_prob": 0.5, "mixup_switch_prob": 0.5, "smoothing": 0.1}
_CHOICES = {
    "remode": ("const", "rand", "pixel"),
    "interpolation": ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos"),
}


@dataclass(frozen=True)
class LoaderOptions:
    """The keyword arguments of ``create_loader``."""

    data_dir: str | None = None  # folder of the data; default: the environment's SPIKEZOO_DATA, else ./data
    download: bool = True  # whether data that is not on disk may be downloaded
    batch_size: int = 128  # samples per batch on this rank
    train: bool = False  # whether to shuffle and augment; all from hflip to smoothing is unused otherwise
    device: str | torch.device = "cpu"  # where the batches (and the whole of an array dataset) live
    seed: int = 0  # of everything random
    rank: int = 0  # number of this process
    world_size: int = 1  # number of processes, which share the samples out among them
    # Side length of the delivered images; arrays are resized (bilinear with antialiasing), events shared out by area.
    # Default: the stored one, 224 for timm's.
    img_size: int | None = None
    mean: Sequence[float] | None = None  # of the channels, for the normalisation; default: the dataset's
    std: Sequence[float] | None = None  # likewise
    in_chans: int | None = None  # channels of the delivered images: 1 to 3 repeats, 3 to 1 takes the luma
    channels_last: bool = False  # whether the batches have torch's channels_last memory format
    # Probability of mirroring; default: 0 for digits, mnist, grey npz files and, but for CIFAR10-DVS, events, else 0.5.
    hflip: float | None = None
    # Zeros (before normalisation) around an array image out of which a window of the old size is cut; default: 2 for
    # 28 px, 0 for event frames, else an eighth of the size (4 for 32 px), and 0 with translate. timm's datasets have
    # random resized crops instead.
    crop_padding: int | None = None
    translate: int = 0  # largest shift of an image, whose border is mirrored into what that uncovers
    # Whether an image that is mirrored in one epoch is not in the next (Jordan, arXiv:2404.00498); hflip then says how
    # many are mirrored in the first.
    alternating_flip: bool = False
    # How many ways an image is augmented, epoch by epoch in turn; a way is a function of the seed, its number and the
    # sample. Default: new ones in every epoch.
    views: int | None = None
    # Largest shift in each direction, by which images and event frames are rolled: what leaves on one side comes in on
    # the other.
    roll: int = 0
    # Side of a square hole in every image, its centre anywhere in the image, clipped at the border; 0 for none. It is
    # filled before the normalisation, as the authors of MPBN do it, so it is black, not the mean.
    cutout: int = 0
    # cifar10, imagenet or svhn (torchvision's AutoAugment), trivial, or timm's rand-m9-mstd0.5 and the like; for event
    # frames snn; comes before the crop for arrays and events.
    auto_augment: str | None = None
    reprob: float = 0.0  # probability of timm's random erasing
    remode: str = "pixel"  # what it erases with: const (0 after normalisation), rand or pixel
    mixup: float = 0.0  # alpha of mixup, 0 for off
    cutmix: float = 0.0  # alpha of cutmix, 0 for off
    mixup_prob: float = 1.0  # probability of mixing a batch at all
    mixup_switch_prob: float = 0.5  # probability of cutmix where both are on
    smoothing: float = 0.0  # of the soft targets; without mixing label smoothing is the loss's business
    num_classes: int | None = None  # width of the soft targets; default: the dataset's classes
    num_workers: int = 2  # processes that read timm's datasets; 0 reads in this one
    subset: int | None = None  # number of samples, chosen by the seed with even classes; default: all
    holdout: int = 0  # number of samples, the same for all seeds and with even classes, that are left out
    held_out: bool = False  # delivers those instead
    drop_last: bool | None = None  # whether a last, smaller batch is left out; default: in training, if others are left
    scale: tuple[float, float] = (0.08, 1.0)  # range of the area of random resized crops (timm's datasets)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # and of their width by their height
    crop_pct: float | None = None  # part of the image that an evaluation sees (timm's datasets); default: 0.875
    interpolation: str = "bicubic"  # of timm's datasets
    # Names of the classes of the model that is evaluated: they number those of an image folder; default: train's do.
    label_names: Sequence[str] = ()
    skip_damaged: bool = False  # whether an evaluation leaves images out that cannot be read, and counts them
    T: int = 4  # frames of a recording; images have none
    # How a recording becomes frames: number (of events; the default), time or duration, see events.open_events.
    frames_by: str | None = None
    duration_us: int | None = None  # length of a frame in microseconds, for duration

    def __post_init__(self) -> None:
        for option, value in vars(self).items():
            if value is None and getattr(LoaderOptions, option) is None:
                continue
            number = isinstance(value, int | float)
            least, whole = _WHOLE.get(option, (None, None))
            if least is not None and (type(value) is not int or value < least):
                refuse(option, value, f"a whole number of at least {least}", whole)
            if option in _FRACTIONS and not (number and 0 <= value <= 1):
                refuse(option, value, "a probability from 0 to 1", _FRACTIONS[option])
            if option in ("mixup", "cutmix") and not (number and 0 <= value < math.inf):
                refuse(option, value, "the alpha of a Beta distribution, 0 for off", 1)
            if option in _CHOICES and value not in _CHOICES[option]:
                refuse(option, value, f"one of {', '.join(_CHOICES[option])}", f"{option}={_CHOICES[option][0]!r}")
        if self.crop_pct is not None and not is_number(self.crop_pct, 0, 1, "(]"):
            refuse("crop_pct", self.crop_pct, "a part of the side of an image, above 0 and up to 1", 0.875)
        for option, highest, example in (("scale", 1.0, "0.08 1"), ("ratio", math.inf, "0.75 1.33")):
            pair = getattr(self, option)
            fits = (
                isinstance(pair, Sequence)
                and len(pair) == 2
                and all(is_number(side, 0, highest, "(]") for side in pair)
                and pair[0] <= pair[1]
            )
            if not fits:
                refuse(
                    option,
                    pair,
                    f"two numbers above 0, the second not below the first{' nor above 1' * (highest == 1)}",
                    f"--{option} {example}",
                )
        names = self.label_names
        if isinstance(names, str) or not (isinstance(names, Sequence) and all(isinstance(name, str) for name in names)):
            refuse("label_names", names, "names of classes", "label_names=('cat', 'dog')")
        if type(self.seed) is not int:
            refuse("seed", self.seed, "a whole number", 42)
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError):
            refuse("device", self.device, "a device of torch", "device='cpu'")
        if not 0 <= self.rank < self.world_size:
            refuse("rank", self.rank, f"from 0 to below world_size={self.world_size}", "rank=0, world_size=1")
        if self.translate and self.crop_padding:
            refuse(
                "translate", self.translate, f"left out beside crop_padding={self.crop_padding}, which moves, too", 2
            )
        if self.auto_augment and self.auto_augment != "snn":
            policy(self.auto_augment, 32, IMAGENET_DEFAULT_MEAN)  # said before the data is read or downloaded
