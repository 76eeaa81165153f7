"""Spaces of AutoST nets, the nets in them, and what a net costs: plain arithmetic."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from spikezoo.checks import is_number, is_whole, nearest, whole
from spikezoo.config_files import read_yaml
from spikezoo.factory import create_model


@dataclass(frozen=True)
class Space:
    """The nets to choose from: one embedding dimension and depth a net, an MLP ratio and heads for every layer.

    Attributes:
        name: What tables and files call it.
        dims: Embedding dimensions.
        depths: Numbers of layers.
        mlp_ratios: Hidden width of an MLP over the embedding dimension.
        heads: Attention heads. They change no parameter, and MACs only where the model multiplies K and V first,
            which it does where a head is narrower than the number of tokens.
    """

    name: str
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    heads: tuple[int, ...]

    def __post_init__(self) -> None:
        for key in _KEYS:
            values = getattr(self, key)
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise ValueError(f"Space {self.name!r}: {key}={values!r}, expected a list, for instance {key}: [4, 8].")
            integers = key != "mlp_ratios"
            for value in values:
                if not (is_whole(value) if integers else is_number(value, 0, bounds="()")):
                    wanted = "positive integers" if integers else "positive numbers"
                    raise ValueError(f"Space {self.name!r}: {key}={list(values)!r}, expected {wanted}.")
            object.__setattr__(self, key, tuple(sorted(set(values))))
        if self.dims[0] * self.mlp_ratios[0] < 1:
            raise ValueError(
                f"Space {self.name!r}: an MLP ratio of {self.mlp_ratios[0]:g} leaves an embedding dimension of "
                f"{self.dims[0]} no hidden channel; 3, 4 and 5 are common."
            )
        for dim in self.dims:
            for heads in self.heads:
                _check_divisible(dim, heads)

    @classmethod
    def of(cls, source: str | Mapping[str, Any]) -> Space:
        """A space of the paper by name, or one of your own.

        Args:
            source: tiny, small or base; the path of a YAML file; or the mapping that such a file holds, with dims,
                depths, mlp_ratios and heads.

        Raises:
            ValueError: An unknown name or key, a missing one, or values that make no net.
            FileNotFoundError: No such file.
        """
        if isinstance(source, str):
            if source in SPACES:
                return SPACES[source]
            if Path(source).suffix not in (".yaml", ".yml"):
                raise ValueError(
                    f"Unknown space {source!r}. {nearest(source, SPACES)} A YAML file with {', '.join(_KEYS)} "
                    "is a space of your own."
                )
            return cls.of({"name": Path(source).stem, **read_space(source)})
        for key in source:
            if key not in (*_KEYS, "name"):
                raise ValueError(f"Unknown key {key!r} of a space. {nearest(key, _KEYS)}")
        missing = [key for key in _KEYS if key not in source]
        if missing:
            raise ValueError(f"A space needs {', '.join(_KEYS)}: {', '.join(missing)} is missing.")
        return cls(**{"name": "own", **source})

    @property
    def size(self) -> int:
        """Number of nets."""
        return len(self.dims) * sum((len(self.mlp_ratios) * len(self.heads)) ** depth for depth in self.depths)


_KEYS = ("dims", "depths", "mlp_ratios", "heads")


def _check_divisible(dim: int, heads: int) -> None:
    if dim % 8:
        raise ValueError(
            f"Embedding dimension {dim}: the patch embedding starts with an eighth of it, so it must be a multiple of "
            f"8, for instance {max(8, round(dim / 8) * 8)}."
        )
    if dim % heads:
        divisors = [h for h in range(1, dim + 1) if dim % h == 0]
        close = min(divisors, key=lambda h: abs(h - heads))
        raise ValueError(f"Embedding dimension {dim} is not divisible by {heads} heads: take {close} heads, say.")


# Table 2 of the paper; MLP ratios and heads per layer as in the authors' code, whose tiny space goes to depth 10.
SPACES = {
    space.name: space
    for space in (
        Space("tiny", (192, 256, 320, 384), tuple(range(1, 9)), (3, 4, 5), (4, 8)),
        Space("small", (256, 320, 384, 448, 512), tuple(range(2, 13)), (3, 4, 5), (4, 8)),
        Space("base", (384, 448, 512, 576, 640, 704, 768), tuple(range(4, 16)), (3, 4, 5, 6), (4, 8)),
    )
}


class Net(NamedTuple):
    """One architecture.

    Attributes:
        dim: Embedding dimension.
        mlp_ratios: Of every layer.
        heads: Of every layer.
    """

    dim: int
    mlp_ratios: tuple[float, ...]
    heads: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.mlp_ratios)

    def arguments(self) -> dict[str, Any]:
        """What ``create_model`` takes."""
        return {"dim": self.dim, "depth": self.depth, "mlp_ratios": list(self.mlp_ratios), "heads": list(self.heads)}

    def __str__(self) -> str:
        def short(values: Sequence[float]) -> str:
            same = len(set(values)) == 1
            return f"{values[0]:g}" if same else "(" + ",".join(f"{value:g}" for value in values) + ")"

        return f"d{self.dim} L{self.depth} r{short(self.mlp_ratios)} h{short(self.heads)}"


@dataclass(frozen=True)
class Setting:
    """What a net is made for.

    Attributes:
        T: Time steps; every net runs for that many.
        num_classes: Classes.
        img_size: Height and width. From 64 pixels on, the patch embedding halves the image four times, and q, k and
            v have no bias (Spikformer's ImageNet layout), below that twice (CIFAR).
        in_chans: Input channels.
    """

    T: int = 4
    num_classes: int = 10
    img_size: int = 32
    in_chans: int = 3

    def __post_init__(self) -> None:
        for item in fields(self):
            whole(item.name, getattr(self, item.name))
        stride = 16 if self.large else 4
        if self.img_size % stride:
            near = max(stride, round(self.img_size / stride) * stride)
            raise ValueError(f"img_size={self.img_size} is not divisible by the patch, {stride}: take {near}.")

    @property
    def large(self) -> bool:
        """Whether Spikformer's ImageNet layout is used."""
        return self.img_size >= 64

    @property
    def model(self) -> str:
        """Name of the model whose layout the nets vary."""
        return "autost_in_tiny" if self.large else "autost_tiny"

    def create(self, net: Net, **arguments: object) -> nn.Module:
        """Build a net; random weights."""
        own: dict[str, Any] = {**asdict(self), **net.arguments(), **arguments}
        return create_model(self.model, **own)


class Cost(NamedTuple):
    """What follows from the architecture alone.

    Attributes:
        parameters: Trainable parameters.
        flops: T times the MACs of one step of the whole network: patch embedding, blocks and head. The model does
            less, since it computes the first convolution and the head once, not T times.
        flops_eq: T times the paper's equations 4 and 5, as printed: half the MACs of the attention, all of the MLPs,
            nothing of the patch embedding and the head.
    """

    parameters: int
    flops: int
    flops_eq: int


@functools.lru_cache(4096)
def fixed_part(dim: int, depth: int, setting: Setting) -> tuple[int, int, int, int]:
    """Parameters, MACs a step and MACs of equation 4 without MLPs and attention products; tokens."""
    size, chans = setting.img_size, setting.in_chans
    parameters = macs = 0
    for position, divisor in enumerate((8, 4, 2, 1)):
        width = dim // divisor
        parameters += 9 * chans * width + 2 * width
        macs += 9 * chans * width * size * size
        chans = width
        if setting.large or position >= 2:
            size //= 2
    tokens = size * size
    parameters += 9 * dim * dim + 2 * dim  # the convolution that encodes positions
    macs += 9 * dim * dim * tokens
    biases = 2 * dim if setting.large else 5 * dim  # of projection and second MLP layer, and of q, k and v
    parameters += depth * (4 * dim * dim + 2 * 5 * dim + biases)
    macs += depth * 4 * dim * dim * tokens
    parameters += (dim + 1) * setting.num_classes
    macs += dim * setting.num_classes
    return parameters, macs, depth * tokens * dim * (2 * dim + tokens), tokens


def hidden_width(dim: int, mlp_ratio: float) -> int:
    """Hidden width of an MLP."""
    return int(dim * mlp_ratio)


def attention_macs(dim: int, tokens: int, heads: int) -> int:
    """MACs of the two attention products in the cheaper order: tokens x tokens, or head width x head width."""
    return 2 * tokens * dim * min(tokens, dim // heads)


def cost_of(dim: int, depth: int, hidden: int, attention: int, setting: Setting) -> Cost:
    """Cost by the two sums through which the layers enter, of hidden widths and of attention products.

    That there are no others is what makes the exact search small.
    """
    parameters, macs, half, tokens = fixed_part(dim, depth, setting)
    mlp = 2 * tokens * dim * hidden
    return Cost(parameters + (2 * dim + 3) * hidden, setting.T * (macs + mlp + attention), setting.T * (half + mlp))


def cost(net: Net, setting: Setting) -> Cost:
    """Parameters and MACs of a net, from its architecture alone."""
    dim, tokens = net.dim, fixed_part(net.dim, net.depth, setting)[3]
    hidden = sum([hidden_width(dim, ratio) for ratio in net.mlp_ratios])
    attention = sum([attention_macs(dim, tokens, heads) for heads in net.heads])
    return cost_of(dim, net.depth, hidden, attention, setting)


@dataclass(frozen=True)
class Constraints:
    """What a net must keep to; both ends count as inside.

    The number of time steps is part of :class:`Setting`, and so of the MACs.

    Attributes:
        parameters: Smallest and largest number of trainable parameters, or None.
        flops: Smallest and largest :attr:`Cost.flops`, all time steps.
        latency_ms: Largest time of one image, measured on this machine, so on the shortlist only.
    """

    parameters: tuple[float, float] | None = None
    flops: tuple[float, float] | None = None
    latency_ms: float | None = None

    def allow(self, found: Cost) -> bool:
        """Whether parameters and MACs are inside their windows."""
        for name in ("parameters", "flops"):
            bounds = getattr(self, name)
            if bounds is not None and not bounds[0] <= getattr(found, name) <= bounds[1]:
                return False
        return True


def window(text: str) -> tuple[float, float]:
    """Read ``LO:HI``, for instance ``4.0e6:4.22e6``; an empty side is open.

    Raises:
        ValueError: Not two numbers, or in the wrong order.
    """
    low, colon, high = str(text).partition(":")
    try:
        bounds = (float(low or 0), float(high or math.inf))
    except ValueError:
        bounds = (math.nan, math.nan)
    if not colon or not bounds[0] <= bounds[1]:
        raise ValueError(f"Window {text!r}: expected LO:HI with LO <= HI, for instance 4.0e6:4.22e6.")
    return bounds


def read_space(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; raises where there is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No file at {path}.")
    return read_yaml(path)
