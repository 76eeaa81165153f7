"""What to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import spikezoo
from spikezoo.checks import nearest
from spikezoo.deploy import PRECISIONS, has_compiler
from spikezoo.surrogate import SURROGATES

Row = dict[str, Any]


MODES = ("train", "infer", "neuron", "size", "startup")


# The baselines, each a function of sides.py.
AGAINST = ("spikingjelly", "spikingjelly-best", "ann", "plain", "conv-limit", "eager")
# What may be given as several numbers, to see what time grows with.
SWEPT = ("T", "batch_size", "img_size", "width", "ticket")


# Fractions removed, as the ticket papers count them.
SPARSITIES = (0.4, 0.8, 0.9, 0.95)


FORMATS = (".csv", ".json", ".md")


Step = Callable[[], Any]


class NoCounterpartError(ValueError):
    """A baseline that cannot be built for a model."""


@dataclass(frozen=True)
class Settings:
    """What to measure; None takes the model's own value.

    Attributes:
        model: Name of the model; '' only for the mode neuron.
        mode: train (forward, cross entropy, backward, SGD), infer (forward in evaluation mode), neuron, size (of files)
            or startup.
        against: The baselines, of ``AGAINST``; none measures our side alone.
        T: Time steps.
        batch_size: Images a step.
        img_size: Height and width of the images.
        num_classes: Classes of the head.
        surrogate: Surrogate gradient; SpikingJelly has none like some models' own, and then trains with a cheaper one.
        width: Fraction of the channels of every layer that is kept.
        ticket: Sparsity of a baked binary ticket, which our side and SpikingJelly's compute with.
        precision: Our side is ``spikezoo.deploy`` with this precision; None runs the model in the form that the next
            three say.
        amp: Autocast to bfloat16.
        channels_last: Channels-last weights and images.
        torchcompile: Compile the model.
        memory: Measure the peak memory of a step too, of each side in a process of its own.
        channels: Channels of the mode neuron.
        device: cpu or cuda.
        repeats: Timed steps a side.
        warmup: Untimed steps a side after the first one.
        threads: Threads of torch; None leaves them alone.
    """

    model: str = ""
    mode: str = "train"
    against: tuple[str, ...] = ("spikingjelly",)
    T: int | None = None
    batch_size: int = 128
    img_size: int | None = None
    num_classes: int | None = None
    surrogate: str | None = None
    width: float | None = None
    ticket: float | None = None
    precision: str | None = None
    amp: bool = False
    channels_last: bool = False
    torchcompile: bool = False
    memory: bool = False
    channels: int = 128
    device: str = "cpu"
    repeats: int = 7
    warmup: int = 2
    threads: int | None = None

    def __post_init__(self) -> None:
        if not self.model and self.mode != "neuron":
            raise ValueError("model is missing: give the name of a model, or 'all'. spikezoo.list_models() has them.")
        if self.model:
            spikezoo.model_info(self.model)  # an unknown name raises and suggests the nearest one
        for name, values, choices in (
            ("mode", (self.mode,), MODES),
            ("against", self.against, AGAINST),
            ("precision", () if self.precision is None else (self.precision,), PRECISIONS),
            ("surrogate", () if self.surrogate is None else (self.surrogate,), SURROGATES),
        ):
            for value in values:
                if value not in choices:
                    raise ValueError(f"{name}={value!r} does not exist. {nearest(value, choices)}")
        for name in ("T", "batch_size", "img_size", "num_classes", "channels", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected an integer >= 1.")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: expected an integer >= 0.")
        if self.width is not None and not 0 < self.width <= 1:
            raise ValueError(f"width={self.width}: expected the fraction of the channels to keep, in (0, 1].")
        if self.ticket is not None and not 0 <= self.ticket < 1:
            raise ValueError(f"ticket={self.ticket}: expected the fraction of the weights removed, in [0, 1).")
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(
                f"device={self.device!r} is not available: use device='cpu', or 'cuda' where torch sees it."
            )
        self._check_mode()

    def _check_mode(self) -> None:
        if self.mode == "neuron":
            for name in ("precision", "ticket", "width", "amp", "channels_last", "torchcompile"):
                if getattr(self, name) not in (None, False):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is for whole models: leave it out of mode='neuron'."
                    )
        if self.surrogate and self.mode != "train":
            raise ValueError(f"surrogate={self.surrogate!r} changes gradients only: use mode='train'.")
        if self.mode == "train":
            for name in ("precision", "ticket"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)!r} is for evaluation: use mode='infer'.")
            if "conv-limit" in self.against:
                raise ValueError("against='conv-limit' is a forward pass without gradients: use mode='infer'.")
        if self.precision and (self.amp or self.channels_last or self.torchcompile):
            raise ValueError(
                f"precision={self.precision!r} deploys the model, which chooses amp, channels_last and torchcompile "
                "itself: leave them out, or leave precision out."
            )
        if self.memory and self.mode not in ("train", "infer"):
            raise ValueError(f"memory is measured of steps: use mode='infer' or 'train', not {self.mode!r}.")
        if self.memory and self.device == "cpu" and not Path("/proc/self/clear_refs").exists():
            raise ValueError("memory on a CPU reads /proc, which only Linux has: leave it out here.")
        if (self.torchcompile or self.mode == "neuron") and not has_compiler():
            raise ValueError("torchcompile needs a C++ compiler and none was found: install g++, or set CXX.")
