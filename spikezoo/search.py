"""Search for AutoST architectures: spaces, training-free metrics, exact search, evolution, and what metrics predict.

Paper: "AutoST: Training-free Neural Architecture Search for Spiking Transformers" (arXiv:2307.00293). A net is an
embedding dimension and, for every layer, an MLP ratio and a number of heads; its depth is the number of layers. All
spaces share Spikformer's patch embedding and blocks.

    space, setting, constraints
      -> exact       analytic metrics only: the optimum of the whole space, proven, and the Pareto front
      -> evolve      any metric: the paper's evolution, seeded, resumable
      -> write       search.csv, best.yaml for train.py, search.png

``correlate`` asks how well the metrics predict accuracy: it trains a sample of nets and ranks them (table 1).

Metrics that read a network work on a copy of it, so that the network stays as it is.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations_with_replacement, groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from tqdm import tqdm

from spikezoo.checkpoint import atomic
from spikezoo.checks import is_number, is_whole, nearest, number, whole
from spikezoo.data import create_loader, dataset_info, natural_dataset
from spikezoo.evaluation import environment, evaluate, write_rows
from spikezoo.neurons import SpikingNeuron
from spikezoo.registry import create_model

__all__ = [
    "MEASURED",
    "METRICS",
    "SPACES",
    "Constraints",
    "CorrelationConfig",
    "Cost",
    "Evolution",
    "Found",
    "Net",
    "Result",
    "Setting",
    "Space",
    "correlate",
    "cost",
    "evolve",
    "exact",
    "images_of",
    "latency_ms",
    "linear_regions",
    "ntk",
    "sahd",
    "score",
    "synflow",
    "table",
    "window",
    "write",
]


# --------------------------------------------------------------------------------------------------------------
# Spaces
# --------------------------------------------------------------------------------------------------------------


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
        for key in _SPACE_KEYS:
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
                    f"Unknown space {source!r}. {nearest(source, SPACES)} A YAML file with {', '.join(_SPACE_KEYS)} "
                    "is a space of your own."
                )
            return cls.of({"name": Path(source).stem, **_read_yaml(source)})
        for key in source:
            if key not in (*_SPACE_KEYS, "name"):
                raise ValueError(f"Unknown key {key!r} of a space. {nearest(key, _SPACE_KEYS)}")
        missing = [key for key in _SPACE_KEYS if key not in source]
        if missing:
            raise ValueError(f"A space needs {', '.join(_SPACE_KEYS)}: {', '.join(missing)} is missing.")
        return cls(**{"name": "own", **source})

    @property
    def size(self) -> int:
        """Number of nets."""
        return len(self.dims) * sum((len(self.mlp_ratios) * len(self.heads)) ** depth for depth in self.depths)


_SPACE_KEYS = ("dims", "depths", "mlp_ratios", "heads")


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

    def create(self, net: Net, **arguments: Any) -> nn.Module:
        """Build a net; random weights."""
        own: dict[str, Any] = {**asdict(self), **net.arguments(), **arguments}
        return create_model(self.model, **own)


# --------------------------------------------------------------------------------------------------------------
# What a net costs: plain arithmetic
# --------------------------------------------------------------------------------------------------------------


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
def _fixed(dim: int, depth: int, setting: Setting) -> tuple[int, int, int, int]:
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


def _hidden(dim: int, mlp_ratio: float) -> int:
    """Hidden width of an MLP."""
    return int(dim * mlp_ratio)


def _attention(dim: int, tokens: int, heads: int) -> int:
    """MACs of the two attention products in the cheaper order: tokens x tokens, or head width x head width."""
    return 2 * tokens * dim * min(tokens, dim // heads)


def _cost(dim: int, depth: int, hidden: int, attention: int, setting: Setting) -> Cost:
    # The layers enter by two sums only, of the hidden widths and of the attention products: that is what makes the
    # exact search small.
    parameters, macs, half, tokens = _fixed(dim, depth, setting)
    mlp = 2 * tokens * dim * hidden
    return Cost(parameters + (2 * dim + 3) * hidden, setting.T * (macs + mlp + attention), setting.T * (half + mlp))


def cost(net: Net, setting: Setting) -> Cost:
    """Parameters and MACs of a net, from its architecture alone."""
    dim, tokens = net.dim, _fixed(net.dim, net.depth, setting)[3]
    hidden = sum([_hidden(dim, ratio) for ratio in net.mlp_ratios])
    attention = sum([_attention(dim, tokens, heads) for heads in net.heads])
    return _cost(dim, net.depth, hidden, attention, setting)


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


# --------------------------------------------------------------------------------------------------------------
# Metrics that read a network, on the spikes of its neurons
# --------------------------------------------------------------------------------------------------------------


def synflow(model: nn.Module, input_size: Sequence[int] = (3, 32, 32)) -> float:
    """SynFlow: sum of ``|theta dR/dtheta|`` over all parameters, R the sum of the logits of an image of ones.

    All parameters and buffers are replaced by their absolute values, in evaluation mode and double precision
    (Tanaka et al. 2020). Gradients pass the neurons by their surrogate.

    Args:
        model: The network; it is not changed.
        input_size: Channels, height and width of its input.
    """
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.abs_()
    first = next(model.parameters())
    total: Tensor = model(torch.ones(1, *input_size, dtype=torch.double, device=first.device)).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return sum((p.detach() * g).abs().sum().item() for p, g in pairs if g is not None)


def _finite(value: float, nan: float = 0.0) -> float:
    # As numpy's nan_to_num, which the sources use: ranks keep their meaning, and files hold numbers.
    if math.isnan(value):
        return nan
    return max(-sys.float_info.max, min(sys.float_info.max, value))


def ntk(model: nn.Module, images: Tensor) -> float:
    """Condition number of the neural tangent kernel (TE-NAS); lower is better.

    The gradients of the summed logits of every sample, of one batch in training mode, with respect to all parameters
    whose name contains "weight".

    Args:
        model: The network; it is not changed.
        images: A small batch ``[N, C, H, W]``.

    Returns:
        Largest over smallest eigenvalue of the kernel; 1e5 where it is not a number, and the largest float where the
        kernel is singular.
    """
    model = copy.deepcopy(model).train()
    weights = [p for name, p in model.named_parameters() if "weight" in name and p.requires_grad]
    logits = model(images)
    kernel = logits.new_zeros(len(images), len(images), dtype=torch.double)
    rows: list[Tensor] = []
    for sample in range(len(images)):
        gradients = torch.autograd.grad(
            logits[sample].sum(), weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.flatten() for g in gradients]).double())
        kernel[sample, : sample + 1] = torch.stack([rows[-1] @ row for row in rows])
    if not bool(kernel.isfinite().all()):
        return 1e5
    values = torch.linalg.eigvalsh(kernel)  # reads the lower triangle, in ascending order
    low, high = float(values[0]), float(values[-1])
    # Rounding makes the zeros of a singular kernel small numbers of either sign.
    if low <= high * len(images) * torch.finfo(torch.double).eps:
        return 1e5 if high == 0 else sys.float_info.max
    return high / low


@contextmanager
def _on_spikes(model: nn.Module, see: Callable[[Tensor], None]) -> Iterator[nn.Module]:
    """A copy of the model in training mode, and ``see`` called with the spikes ``[N, units]`` of every neuron and step.

    In training mode the norms take the statistics of the batch; by their initial ones an untrained net hardly fires.
    """
    model = copy.deepcopy(model).train()
    neurons = [module for module in model.modules() if isinstance(module, SpikingNeuron)]
    if not neurons:
        raise ValueError("A network without spiking neurons has no spikes to measure: create it with neuron='lif'.")

    def hook(_module: nn.Module, _inputs: Any, spikes: Tensor) -> None:
        for step in spikes:
            see((step.flatten(1) > 0).float())

    for neuron in neurons:
        neuron.register_forward_hook(hook)
    with torch.no_grad():
        yield model


def linear_regions(model: nn.Module, images: Tensor) -> float:
    """NASWOT's score on spikes: log |det K|, K the agreement of the samples' spike patterns.

    For every neuron layer and time step with binary patterns x ``[N, units]``, K grows by x x' + (1 - x)(1 - x)'
    (Mellor et al. 2021, on the activity of ReLUs).

    Args:
        model: The network; it is not changed.
        images: A batch ``[N, C, H, W]``; the source takes 128.
    """
    kernel = torch.zeros(len(images), len(images), dtype=torch.double, device=images.device)

    def see(x: Tensor) -> None:
        kernel.add_(x @ x.T + (1 - x) @ (1 - x).T)

    with _on_spikes(model, see) as copied:
        copied(images)
    return _finite(float(torch.linalg.slogdet(kernel)[1]), nan=-sys.float_info.max)


def sahd(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """Sparsity-aware Hamming distance of the spike patterns (SNASNet), in the form of the authors' code.

    For every neuron layer and time step with N units and rates s, K grows by N - 0.5 / (E + 1e-3) * HD, with the
    Hamming distance HD of two samples and its expectation E = N (s_i (1 - s_j) + (1 - s_i) s_j); the score is
    log |det (K / number of layers and steps)|, averaged over the batches. The factor makes the second term about 0.5
    whatever N is; the source has it so.

    Args:
        model: The network; it is not changed.
        batches: Batches ``[N, C, H, W]``; the source takes two of 256.
    """
    scores = []
    for images in batches:
        kernel = torch.zeros(len(images), len(images), dtype=torch.double, device=images.device)
        calls = 0

        def see(x: Tensor, kernel: Tensor = kernel) -> None:
            nonlocal calls
            calls += 1
            units = x.shape[1]
            rate = x.mean(1).double()
            expected = units * (rate[:, None] * (1 - rate) + (1 - rate)[:, None] * rate)
            distance = units - (x @ x.T + (1 - x) @ (1 - x).T)
            kernel.add_(units - 0.5 / (expected + 1e-3) * distance)

        with _on_spikes(model, see) as copied:
            copied(images)
        scores.append(_finite(float(torch.linalg.slogdet(kernel / calls)[1]), nan=-sys.float_info.max))
    if not scores:
        raise ValueError("sahd() got no batch: expected at least one.")
    return statistics.fmean(scores)


# --------------------------------------------------------------------------------------------------------------
# The table of metrics
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A training-free predictor of accuracy.

    Attributes:
        note: What it is.
        higher_is_better: Which end a search wants.
        measure: From a network, images ``[N, C, H, W]`` and their size; None where the architecture is enough.
        images: How many images it takes.
    """

    note: str
    higher_is_better: bool = True
    measure: Callable[[nn.Module, Tensor], float] | None = None
    images: int = 0

    @property
    def analytic(self) -> bool:
        """Whether the architecture alone is enough."""
        return self.measure is None


def _two_batches(model: nn.Module, images: Tensor) -> float:
    return sahd(model, images.chunk(2))


METRICS: dict[str, Metric] = {
    "flops": Metric("T x MACs of the whole network (the authors' code)"),
    "flops_eq": Metric("T x equations 4-5 of the paper, as printed"),
    "parameters": Metric("trainable parameters"),
    "synflow": Metric("SynFlow", measure=lambda model, images: synflow(model, images.shape[1:])),
    "ntk": Metric("condition number of the NTK", False, ntk, 16),
    "linear_regions": Metric("NASWOT on spikes", True, linear_regions, 128),
    "sahd": Metric("sparsity-aware Hamming distance", True, _two_batches, 512),
}


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise ValueError(f"Unknown metric {name!r}. {nearest(name, METRICS)}")
    return METRICS[name]


MEASURED = tuple(name for name, metric in METRICS.items() if not metric.analytic)


def noise(setting: Setting, count: int, seed: int = 0) -> Tensor:
    """Normally distributed images ``[count, C, H, W]``, or frames of two channels, for metrics without a dataset."""
    generator = torch.Generator().manual_seed(seed)
    steps = (setting.T,) if setting.in_chans == 2 else ()
    return torch.randn(count, *steps, setting.in_chans, setting.img_size, setting.img_size, generator=generator)


def images_of(dataset: str, metrics: str | Sequence[str], setting: Setting, seed: int = 0, **options: Any) -> Tensor:
    """Training images, normalised and augmented, as many as the metrics take: ``[N, C, H, W]``.

    Args:
        dataset: Name of the dataset.
        metrics: One name or several.
        setting: Size and channels.
        seed: Of the choice.
        **options: Of :func:`spikezoo.data.create_loader`.
    """
    names = [metrics] if isinstance(metrics, str) else metrics
    count = max([1, *(_metric(name).images for name in names)])
    shape: dict[str, Any] = {"img_size": setting.img_size, "in_chans": setting.in_chans, "T": setting.T}
    loader = create_loader(
        dataset, "train", train=True, batch_size=count, drop_last=False, seed=seed, **shape, **options
    )
    return next(iter(loader))[0]


def score(
    net: Net, metric: str, setting: Setting, *, images: Tensor | None = None, seed: int = 0, **arguments: Any
) -> float:
    """One metric of one net.

    Args:
        net: The architecture.
        metric: A name of :data:`METRICS`.
        setting: What the net is made for.
        images: Images ``[N, C, H, W]`` for the metrics that read a network; None takes noise. Each metric takes as
            many of them as its source did (:attr:`Metric.images`), or all where there are fewer.
        seed: Of the random weights, and the noise.
        **arguments: Further arguments of ``create_model``.

    Raises:
        ValueError: An unknown metric.
    """
    chosen = _metric(metric)
    if chosen.measure is None:
        return float(getattr(cost(net, setting), metric))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = setting.create(net, **arguments)
        if images is None:
            images = noise(setting, max(1, chosen.images), seed)
        model.to(images.device)
        return chosen.measure(model, images[: max(1, chosen.images)])


# --------------------------------------------------------------------------------------------------------------
# Exact search
# --------------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A net of a result.

    Attributes:
        net: The architecture.
        value: The metric.
        parameters: Trainable parameters.
        flops: MACs of all time steps.
        nets: How many nets of the space have the same dimension, depth, parameters and MACs; None where it was not
            counted. They differ in the order of the layers, the spread of the ratios, or in heads.
        latency_ms: Measured time of one image; None where it was not asked for.
    """

    net: Net
    value: float
    parameters: int
    flops: int
    nets: int | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        found: The best nets, the best first.
        front: The Pareto front, metric against parameters, by ascending parameters: of the whole space for analytic
            metrics, whatever window was asked for, else of the nets that the evolution scored.
        others: Parameters and metric of everything that was looked at, for the picture.
        seconds: How long the search took.
        looked_at: Nets that were scored by the evolution, or that the exact search covers.
        proven: Whether no net of the space that keeps the constraints is better.
    """

    found: list[Found]
    front: list[Found]
    others: list[tuple[int, float]]
    seconds: float
    looked_at: int
    proven: bool


@functools.lru_cache(64)
def _choices(options: tuple[float, ...], depth: int) -> list[tuple[Any, int]]:
    """Every choice for the layers whatever their order, in lexicographic order, and how many orders it has."""
    found = []
    for choice in combinations_with_replacement(sorted(options), depth):
        orders = math.factorial(depth)
        for option in set(choice):
            orders //= math.factorial(choice.count(option))
        found.append((choice, orders))
    return found


def _sums(options: tuple[Any, ...], depth: int, value: Callable[[Any], int]) -> dict[int, tuple[Any, int]]:
    """Sum over the layers -> (the most even choice that has it, how many ordered choices have it)."""
    found: dict[int, tuple[Any, int]] = {}
    worth = {option: value(option) for option in options}
    for choice, orders in _choices(options, depth):
        total = sum([worth[option] for option in choice])
        # Of two choices with the same sum the later one is the more even.
        found[total] = (choice, orders + (found[total][1] if total in found else 0))
    return found


def _classes(space: Space, setting: Setting) -> Iterator[tuple[Net, Cost, int]]:
    """Classes of nets that cost the same: a member, the cost, how many nets.

    Every net of the space belongs to exactly one class: parameters and MACs depend on its dimension, its depth, the
    sum of its hidden widths and the sum of its attention products, and every multiset of ratios, and of heads, is
    enumerated. So whatever holds for all classes is proven for all nets.
    """
    for dim in space.dims:
        for depth in space.depths:
            tokens = _fixed(dim, depth, setting)[3]
            hidden = _sums(space.mlp_ratios, depth, functools.partial(_hidden, dim))
            attention = _sums(space.heads, depth, functools.partial(_attention, dim, tokens))
            for h, (ratios, ways) in hidden.items():
                for a, (heads, more) in attention.items():
                    yield Net(dim, ratios, heads), _cost(dim, depth, h, a, setting), ways * more


def _rank(found: Found) -> tuple[Any, ...]:
    # Ties of the metric: fewer parameters, a smaller dimension, fewer layers; ratios and then heads that are more even,
    # ascending through the layers, and larger.
    net = found.net
    even = [tuple(-value for value in sorted(values)) for values in (net.mlp_ratios, net.heads)]
    return found.parameters, net.dim, net.depth, even[0], net.mlp_ratios, even[1], net.heads


def _best(found: Iterable[Found], count: int, higher_is_better: bool) -> list[Found]:
    """The best nets; of those with the same dimension, depth and parameters only the first."""
    seen: set[tuple[int, int, int]] = set()
    best: list[Found] = []
    ordered = sorted(found, key=lambda item: item.value, reverse=higher_is_better)
    for _, equals in groupby(ordered, key=lambda item: item.value):
        for item in sorted(equals, key=_rank):
            key = (item.net.dim, item.net.depth, item.parameters)
            if key not in seen:
                seen.add(key)
                best.append(item)
            if len(best) == count:
                return best
    return best


def _front(found: Iterable[Found], higher_is_better: bool) -> list[Found]:
    """The nets that no other beats: a better metric takes more parameters, and as good a one no fewer."""
    sign = -1 if higher_is_better else 1
    front: list[Found] = []
    for item in sorted(found, key=lambda item: (item.parameters, sign * item.value)):
        if not front or sign * item.value < sign * front[-1].value:
            front.append(item)
        elif (item.parameters, item.value) == (front[-1].parameters, front[-1].value):
            front[-1] = min(front[-1], item, key=_rank)
    return front


def _covered(space: Space, metric: str, setting: Setting) -> list[Found]:
    """All classes of a space, with the metric where it is analytic, else with parameters in its place."""
    key = metric if _metric(metric).analytic else "parameters"
    return [
        Found(net, float(getattr(price, key)), price.parameters, price.flops, nets)
        for net, price, nets in _classes(space, setting)
    ]


def _check_top(top: int) -> None:
    if top < 1:
        raise ValueError(f"top={top}: expected at least 1.")


def _inside(covered: Sequence[Found], space: Space, constraints: Constraints) -> list[Found]:
    """The classes that keep the constraints; raises where there are none."""
    inside = [item for item in covered if constraints.allow(Cost(item.parameters, item.flops, 0))]
    if inside:
        return inside
    told = []
    for name, what in (("parameters", "parameters"), ("flops", "MACs")):
        bounds = getattr(constraints, name)
        if bounds is None:
            continue
        counts = sorted({getattr(item, name) for item in covered})
        below = max((c for c in counts if c < bounds[0]), default=None)
        above = min((c for c in counts if c > bounds[1]), default=None)
        near = " and ".join(f"{c:,}" for c in (below, above) if c is not None)
        told.append(
            f"{what} in {bounds[0]:,.0f}:{bounds[1]:,.0f} (the smallest net has {counts[0]:,}, the largest "
            f"{counts[-1]:,}; nearest to the window: {near or 'inside it'})"
        )
    raise ValueError(f"No net of the space {space.name!r} has {' and '.join(told)}. Widen the window.")


def exact(
    space: Space,
    metric: str = "flops",
    setting: Setting | None = None,
    constraints: Constraints | None = None,
    *,
    top: int = 10,
) -> Result:
    """The best nets of a whole space, proven, and its Pareto front; for analytic metrics.

    Parameters and MACs depend on the layers only through sums, so the space falls into few classes of nets of equal
    cost, which are all looked at; see ``_classes``.

    Args:
        space: The nets to choose from.
        metric: flops, flops_eq or parameters.
        setting: What the nets are made for.
        constraints: Windows of parameters and MACs, and the largest latency. Latency is measured on the ``top`` best
            nets only: those that are too slow fall out, and the result is no longer proven.
        top: How many nets to return.

    Raises:
        ValueError: An unknown metric or one that needs a network, or windows that no net keeps to: the message has
            the smallest and largest counts.
    """
    setting, constraints = setting or Setting(), constraints or Constraints()
    _check_top(top)
    chosen = _metric(metric)
    if not chosen.analytic:
        analytic = ", ".join(name for name, other in METRICS.items() if other.analytic)
        raise ValueError(
            f"Exact search needs a metric that follows from the architecture ({analytic}), and {metric!r} reads a "
            "network: use the method evolution."
        )
    started = time.perf_counter()
    covered = _covered(space, metric, setting)
    inside = _inside(covered, space, constraints)
    found = _best(inside, top, chosen.higher_is_better)
    front = _front(covered, chosen.higher_is_better)
    seconds = time.perf_counter() - started
    found = _quick_enough(found, setting, constraints)
    return Result(
        found,
        front,
        [(item.parameters, item.value) for item in covered],
        seconds,
        sum(item.nets or 0 for item in covered),
        constraints.latency_ms is None,
    )


def latency_ms(net: Net, setting: Setting, repeats: int = 10) -> float:
    """Median time of one image on this machine's CPU, in milliseconds; random weights."""
    model = setting.create(net).eval()
    image = noise(setting, 1)
    times = []
    with torch.no_grad():
        for _ in range(repeats + 2):
            started = time.perf_counter()
            model(image)
            times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[2:])  # the first two warm up


def _quick_enough(found: list[Found], setting: Setting, constraints: Constraints) -> list[Found]:
    limit = constraints.latency_ms
    if limit is None:
        return found
    timed = [item._replace(latency_ms=latency_ms(item.net, setting)) for item in found]
    kept = [item for item in timed if item.latency_ms is not None and item.latency_ms <= limit]
    if not kept:
        quickest = min(item.latency_ms or 0.0 for item in timed)
        raise ValueError(
            f"None of the {len(timed)} best nets takes at most {limit:g} ms; the quickest takes {quickest:.1f} ms. "
            "Allow more, fewer parameters, or a longer shortlist (--top)."
        )
    return kept


# --------------------------------------------------------------------------------------------------------------
# Evolution
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evolution:
    """The paper's settings.

    Attributes:
        population: Nets of a generation; what mutation and crossover leave free is drawn at random.
        generations: How often the population is renewed.
        parents: The best nets so far, which mutation and crossover draw from.
        mutations: Mutated nets a generation.
        crossovers: Crossed nets a generation; between parents of equal depth, every gene from either.
        m_prob: Probability of a new ratio, and of new heads, of every layer.
        s_prob: Probability of a new depth, and of a new embedding dimension.
        seed: Of all draws, and of the weights of metrics that read a network.
    """

    population: int = 50
    generations: int = 20
    parents: int = 10
    mutations: int = 25
    crossovers: int = 25
    m_prob: float = 0.2
    s_prob: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"population": 1, "generations": 0, "parents": 1, "mutations": 0, "crossovers": 0}
        for name, low in least.items():
            whole(name, getattr(self, name), low)
        for name in ("m_prob", "s_prob"):
            number(name, getattr(self, name), 0, 1, "[]", expected="a probability, from 0 to 1")


class _Log:
    """Scores of an evolution, a JSON line each; the first line says which search they are of.

    A search that starts again draws the same nets and finds their scores here, so an interrupted one ends as if it
    had not been.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path = path
        self.scores: dict[Net, float] = {}
        if path is None:
            return
        header = json.loads(json.dumps(header))
        lines = (
            path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        )  # a line that was cut short does not count
        if lines:
            written = json.loads(lines[0])
            changed = [key for key in {**header, **written} if header.get(key) != written.get(key)]
            if changed:
                told = ", ".join(f"{k} is {header.get(k)!r} and was {written.get(k)!r}" for k in sorted(changed))
                raise ValueError(f"{path} is of another search: {told}. Use another --output, or delete it.")
        for line in lines[1:]:
            row = json.loads(line)
            self.scores[Net(row["dim"], tuple(row["mlp_ratios"]), tuple(row["heads"]))] = row["score"]
        with atomic(path) as temporary:
            temporary.write_bytes(b"\n".join(lines or [json.dumps(header).encode()]) + b"\n")

    def add(self, net: Net, value: float) -> None:
        self.scores[net] = value
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps({**net._asdict(), "score": value}) + "\n")


def _random_net(space: Space, rng: random.Random) -> Net:
    depth = rng.choice(space.depths)
    ratios = tuple(rng.choice(space.mlp_ratios) for _ in range(depth))
    heads = tuple(rng.choice(space.heads) for _ in range(depth))
    return Net(rng.choice(space.dims), ratios, heads)


def _mutated(net: Net, space: Space, settings: Evolution, rng: random.Random) -> Net:
    dim, ratios, heads = net.dim, list(net.mlp_ratios), list(net.heads)
    if rng.random() < settings.s_prob:
        depth = rng.choice(space.depths)
        ratios = ratios[:depth] + [rng.choice(space.mlp_ratios) for _ in range(depth - len(ratios))]
        heads = heads[:depth] + [rng.choice(space.heads) for _ in range(depth - len(heads))]
    ratios = [rng.choice(space.mlp_ratios) if rng.random() < settings.m_prob else r for r in ratios]
    heads = [rng.choice(space.heads) if rng.random() < settings.m_prob else h for h in heads]
    if rng.random() < settings.s_prob:
        dim = rng.choice(space.dims)
    return Net(dim, tuple(ratios), tuple(heads))


def _crossed(parents: Sequence[Net], rng: random.Random) -> Net | None:
    for _ in range(50):
        one, other = rng.choice(parents), rng.choice(parents)
        if one.depth == other.depth:
            ratios = tuple(rng.choice(pair) for pair in zip(one.mlp_ratios, other.mlp_ratios, strict=True))
            heads = tuple(rng.choice(pair) for pair in zip(one.heads, other.heads, strict=True))
            return Net(rng.choice((one.dim, other.dim)), ratios, heads)
    return None


_RANDOM_DRAWS = 200_000  # for a generation's random nets; ends the search in a window that random nets hardly hit


def evolve(
    space: Space,
    metric: str = "flops",
    setting: Setting | None = None,
    constraints: Constraints | None = None,
    *,
    settings: Evolution | None = None,
    images: Tensor | None = None,
    top: int = 10,
    log: str | Path | None = None,
    progress: bool = False,
) -> Result:
    """The paper's evolution: select, mutate, cross, fill with random nets; never the same net twice.

    Args:
        space: The nets to choose from.
        metric: A name of :data:`METRICS`.
        setting: What the nets are made for.
        constraints: Windows of parameters and MACs, and the largest latency, which is measured on the ``top`` best
            nets only.
        settings: The paper's, where None.
        images: Images for metrics that read a network; None takes noise.
        top: How many nets to return.
        log: JSON lines of all scores. An interrupted search that is started again with the same arguments goes on
            from it and ends with the same result.
        progress: Show a progress bar.

    Raises:
        ValueError: An unknown metric; windows that no net keeps to; a log of another search.
    """
    setting, constraints, settings = setting or Setting(), constraints or Constraints(), settings or Evolution()
    _check_top(top)
    chosen = _metric(metric)
    started = time.perf_counter()
    covered = _covered(space, metric, setting)
    possible = sum(item.nets or 0 for item in _inside(covered, space, constraints))
    seen = "noise" if images is None else [len(images), float(images.double().sum())]
    header = {
        "space": asdict(space),
        "metric": metric,
        "setting": asdict(setting),
        "parameters": constraints.parameters,
        "flops": constraints.flops,
        "evolution": asdict(settings),
        "images": None if chosen.analytic else seen,
    }
    book = _Log(None if log is None else Path(log), header)
    rng = random.Random(settings.seed)
    visited: dict[Net, Found] = {}

    def enter(draw: Callable[[], Net | None], wanted: int, draws: int) -> list[Found]:
        """Score up to ``wanted`` new nets that keep the constraints."""
        new: list[Found] = []
        while len(new) < wanted and draws > 0 and len(visited) < possible:
            draws -= 1
            net = draw()
            if net is None or net in visited:
                continue
            price = cost(net, setting)
            if not constraints.allow(price):
                continue
            if net not in book.scores:
                book.add(net, score(net, metric, setting, images=images, seed=settings.seed))
            visited[net] = Found(net, book.scores[net], price.parameters, price.flops)
            new.append(visited[net])
        return new

    sign = -1 if chosen.higher_is_better else 1
    fresh = enter(lambda: _random_net(space, rng), settings.population, _RANDOM_DRAWS)
    if not fresh:
        raise ValueError(
            f"{_RANDOM_DRAWS:,} random nets of the space {space.name!r} all missed the window, which {possible:,} of "
            f"{space.size:,} nets hit. Widen it, or use exact search."
        )
    best: list[Found] = []
    with tqdm(total=settings.generations, desc="evolve", disable=not progress, leave=False) as bar:
        for _ in range(settings.generations):
            best = sorted([*best, *fresh], key=lambda item: sign * item.value)[: settings.parents]
            parents = [item.net for item in best]
            fresh = enter(
                lambda nets=parents: _mutated(rng.choice(nets), space, settings, rng),  # type: ignore[misc]
                settings.mutations,
                10 * settings.mutations,
            )
            fresh += enter(
                lambda nets=parents: _crossed(nets, rng),  # type: ignore[misc]
                settings.crossovers,
                10 * settings.crossovers,
            )
            fresh += enter(lambda: _random_net(space, rng), settings.population - len(fresh), _RANDOM_DRAWS)
            bar.set_postfix(best=f"{best[0].value:.6g}", nets=len(visited))
            bar.update()
    found = _best(visited.values(), top, chosen.higher_is_better)
    front = _front(covered if chosen.analytic else visited.values(), chosen.higher_is_better)
    others = [(item.parameters, item.value) for item in (covered if chosen.analytic else visited.values())]
    seconds = time.perf_counter() - started
    return Result(_quick_enough(found, setting, constraints), front, others, seconds, len(visited), False)


# --------------------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------------------

# Spikformer's recipes, in train.py's words.
RECIPE: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 128,
    "opt": "adamw",
    "lr": 5e-4,
    "weight_decay": 0.06,
    "sched": "cosine",
    "sched_on_updates": False,
    "warmup_epochs": 20,
    "warmup_lr": 1e-5,
    "min_lr": 1e-5,
    "cooldown_epochs": 10,
    "hflip": 0.5,
    "crop_padding": 0,
    "aa": "rand-m9-n1-mstd0.4-inc1",
    "reprob": 0.25,
    "mixup": 0.5,
    "smoothing": 0.1,
    "amp": True,
    "channels_last": True,
    "seed": 42,
}
RECIPE_IMAGENET: dict[str, Any] = {
    **{key: value for key, value in RECIPE.items() if key != "crop_padding"},
    "batch_size": 24,
    "weight_decay": 0.05,
    "warmup_lr": 1e-6,
    "aa": "rand-m9-mstd0.5-inc1",
    "mixup": 0.8,
    "cutmix": 1.0,
    "workers": 8,
}


def train_config(net: Net, setting: Setting, dataset: str | None = None) -> dict[str, Any]:
    """The keys of a YAML file that train.py takes: the net, its data where they are plain, Spikformer's recipe."""
    config: dict[str, Any] = {"model": setting.model, "T": setting.T, "model_kwargs": net.arguments()}
    with suppress(ValueError):  # where no dataset has this shape, the file says that one is to be named
        config["dataset"] = dataset or natural_dataset(setting.img_size, setting.in_chans, setting.num_classes)
    if config.get("dataset") == "imagenet":
        config["val_split"] = "val"
    for key in ("num_classes", "in_chans", "img_size"):
        config[key] = getattr(setting, key)
    return {**config, **(RECIPE_IMAGENET if setting.large else RECIPE)}


def _rows(result: Result) -> list[dict[str, Any]]:
    front = {item.net for item in result.front}
    ranked = {item.net: place for place, item in enumerate(result.found, 1)}
    rows = []
    for item in [*result.found, *(item for item in result.front if item.net not in ranked)]:
        rows.append(
            {
                "rank": ranked.get(item.net, ""),
                "pareto": item.net in front,
                "dim": item.net.dim,
                "depth": item.net.depth,
                "mlp_ratios": list(item.net.mlp_ratios),
                "heads": list(item.net.heads),
                "value": item.value,
                "parameters": item.parameters,
                "flops": item.flops,
                "nets": "" if item.nets is None else item.nets,
                "latency_ms": "" if item.latency_ms is None else round(item.latency_ms, 3),
            }
        )
    return rows


def table(result: Result, metric: str) -> str:
    """The found nets as text: parameters and MACs in millions."""
    better = "higher" if _metric(metric).higher_is_better else "lower"
    header = ["", "net", f"{metric} ({better} is better)", "parameters (M)", "MACs, all steps (M)", "on the front"]
    front = {item.net for item in result.front}
    lines = [header]
    for place, item in enumerate(result.found, 1):
        yes = "yes" if item.net in front else ""
        value = f"{item.value / 1e6:.3f} M" if _metric(metric).analytic else f"{item.value:.6g}"
        line = [f"{place}", str(item.net), value, f"{item.parameters / 1e6:.4f}", f"{item.flops / 1e6:.1f}", yes]
        lines.append(line)
    for name, shown in (
        ("latency (ms)", [item.latency_ms for item in result.found]),
        ("nets like it", [item.nets for item in result.found]),
    ):
        if any(value is not None for value in shown):
            for line, text in zip(lines, [name, *shown], strict=True):
                line.append(text if isinstance(text, str) else f"{text:,.1f}".removesuffix(".0"))
    return _aligned(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def write(
    result: Result,
    folder: str | Path,
    *,
    space: Space,
    metric: str,
    setting: Setting,
    constraints: Constraints | None = None,
    dataset: str | None = None,
    command: str = "",
) -> list[Path]:
    """Write search.csv, best.yaml and, where matplotlib is installed, search.png.

    Args:
        result: What was found.
        folder: Where to; made where it is not there.
        space: What was searched, for titles and comments.
        metric: Likewise.
        setting: Likewise.
        constraints: Likewise; the window of parameters is shaded in the picture.
        dataset: What best.yaml trains on; None takes the one of this shape.
        command: How the search was called, for the comment in best.yaml.

    Returns:
        The files.
    """
    folder = Path(folder)
    paths = [folder / "search.csv", folder / "best.yaml"]
    write_rows(paths[0], _rows(result))
    best = result.found[0]
    config = train_config(best.net, setting, dataset)
    said = "the optimum of the space, proven" if result.proven else f"the best of {result.looked_at:,} nets"
    lines = [
        f"# python train.py --config {paths[1].name} --data-dir DATA",
        *([f"# Found by: {command}"] if command else []),
        f"# Space {space.name}, metric {metric}: {said}. {best.parameters:,} parameters, {best.flops / 1e6:,.1f} M "
        f"MACs at T={setting.T}. Not trained.",
        *([] if "dataset" in config else ["# Name the data: --dataset npz:PATH, folder, ..."]),
    ]
    with atomic(paths[1]) as temporary:
        temporary.write_text("\n".join(lines) + "\n" + yaml.safe_dump(config, sort_keys=False, default_flow_style=None))
    picture = folder / "search.png"
    if _plot_search(result, picture, space, metric, constraints or Constraints()):
        paths.append(picture)
    return paths


def _figure(width: float, height: float) -> Any:
    """A matplotlib figure, or None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def _plot_search(result: Result, path: Path, space: Space, metric: str, constraints: Constraints) -> bool:
    figure = _figure(7.5, 4.8)
    if figure is None:
        return False
    axes = figure.subplots()
    scale = 1e6 if _metric(metric).analytic else 1.0
    if constraints.parameters is not None:
        low, high = constraints.parameters
        everything = [parameters for parameters, _ in result.others]
        axes.axvspan(max(low, min(everything)) / 1e6, min(high, max(everything)) / 1e6, color="#f3e3d3", zorder=0)
    axes.scatter(
        [parameters / 1e6 for parameters, _ in result.others],
        [value / scale for _, value in result.others],
        s=4,
        color="#b8c4cc",
        label="all nets" if _metric(metric).analytic else "scored nets",
        rasterized=True,
    )
    axes.plot(
        [item.parameters / 1e6 for item in result.front],
        [item.value / scale for item in result.front],
        color="#1f6f8b",
        linewidth=1,
        drawstyle="steps-post",  # between two nets of the front there is none
        label="Pareto front",
    )
    axes.scatter(
        [item.parameters / 1e6 for item in result.found],
        [item.value / scale for item in result.found],
        s=28,
        color="#d1603d",
        label=f"the {len(result.found)} best",
    )
    best = result.found[0]
    axes.scatter(best.parameters / 1e6, best.value / scale, s=130, color="#d1603d", edgecolor="black", marker="*")
    axes.set(
        title=f"Space {space.name}: {metric} against parameters\nbest: {best.net}",
        xlabel="parameters (millions)",
        ylabel=f"{metric} (millions)" if scale > 1 else metric,
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return True


def _read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No file at {path}.")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected 'key: value' lines.")
    return content


# --------------------------------------------------------------------------------------------------------------
# How well metrics predict accuracy
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CorrelationConfig:
    """The experiment of table 1; the defaults are the paper's scale.

    Attributes:
        space: A name of :data:`SPACES`, a YAML file, or a mapping.
        nets: How many random nets to train.
        parameters: Window ``LO:HI`` that they must keep to, or None.
        T: Time steps.
        dataset: Dataset to train and test on.
        subset: Training images, classes balanced; None takes all.
        test_subset: Test images; None takes all.
        epochs: Epochs of every training, AdamW with a cosine schedule.
        batch_size: Images of a batch.
        lr: Largest learning rate.
        weight_decay: On weights, not on norms and biases.
        warmup_epochs: Epochs of linear warm-up.
        smoothing: Label smoothing.
        amp: bfloat16 autocast in training and testing; the metrics are computed in float32.
        channels_last: Memory format of images and weights.
        compile: Compile every net: worth it for long trainings only.
        metrics: Names of :data:`METRICS`.
        model_arguments: Further arguments of ``create_model`` for all nets.
        bootstrap: Resamples of the confidence intervals.
        seed: Of the choice of nets, the weights, the order of images and the bootstrap.
    """

    space: Any = "small"
    nets: int = 100
    parameters: str | None = None
    T: int = 4
    dataset: str = "cifar10"
    subset: int | None = None
    test_subset: int | None = None
    epochs: int = 100
    batch_size: int = 128
    lr: float = 5e-4
    weight_decay: float = 0.06
    warmup_epochs: float = 5
    smoothing: float = 0.1
    amp: bool = True
    channels_last: bool = True
    compile: bool = False
    metrics: Sequence[str] = tuple(METRICS)
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    bootstrap: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"nets": 3, "epochs": 1, "batch_size": 1, "bootstrap": 1, "subset": 1, "test_subset": 1, "T": 1}
        least |= {"lr": 0, "weight_decay": 0, "warmup_epochs": 0, "smoothing": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is None and name in ("subset", "test_subset"):
                continue
            real = name in ("lr", "weight_decay", "warmup_epochs", "smoothing")
            if real:
                number(name, value, low, expected=f"a number of at least {low}")
            else:
                whole(name, value, low, expected=f"an integer of at least {low}")
        if isinstance(self.metrics, str) or not self.metrics:
            raise ValueError(f"metrics={self.metrics!r}: expected a list of {', '.join(METRICS)}.")
        for name in self.metrics:
            _metric(name)

    @classmethod
    def read(cls, path: str | Path) -> CorrelationConfig:
        """Read a YAML file whose keys are the attributes.

        Raises:
            ValueError: An unknown key or a value that makes no sense.
            FileNotFoundError: No such file.
        """
        content = _read_yaml(path)
        known = [item.name for item in fields(cls)]
        for key in content:
            if key not in known:
                raise ValueError(f"Unknown key {key!r} in {path}. {nearest(key, known)}")
        for key in ("lr", "weight_decay"):
            if isinstance(content.get(key), str):
                content[key] = float(content[key])  # YAML takes 5e-4 for text
        return cls(**content)


def sample(space: Space, count: int, setting: Setting, constraints: Constraints, seed: int) -> list[Net]:
    """Different random nets that keep the constraints, drawn as the evolution draws them."""
    rng = random.Random(seed)
    possible = sum(item.nets or 0 for item in _inside(_covered(space, "parameters", setting), space, constraints))
    if possible < count:
        raise ValueError(
            f"The space {space.name!r} has {possible:,} nets inside the window, and {count} are asked for."
        )
    nets: dict[Net, None] = {}
    for _ in range(max(_RANDOM_DRAWS, 100 * count)):
        net = _random_net(space, rng)
        if constraints.allow(cost(net, setting)):
            nets[net] = None
        if len(nets) == count:
            return list(nets)
    raise ValueError(
        f"Random nets of the space {space.name!r} hardly hit the window: {len(nets)} of the {count} that are asked for "
        f"were found, of {possible:,} that there are. Widen it."
    )


def _train(
    config: CorrelationConfig, setting: Setting, net: Net, device: torch.device, data_dir: str | None, download: bool
) -> dict[str, Any]:
    """Train one net; accuracy and loss on the test images."""
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    model = setting.create(net, **config.model_arguments)
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    load = functools.partial(
        create_loader,
        config.dataset,
        data_dir=data_dir,
        download=download,
        batch_size=config.batch_size,
        device=device,
        seed=config.seed,
        channels_last=config.channels_last,
    )
    loader = load("train", train=True, subset=config.subset)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay)
    steps, warm = config.epochs * len(loader), config.warmup_epochs * len(loader)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    autocast: Callable[[], Any] = (
        functools.partial(torch.autocast, device.type, torch.bfloat16) if config.amp else nullcontext
    )
    run: Callable[[Tensor], Tensor] = torch.compile(model) if config.compile else model
    losses: list[float] = []
    for epoch in range(config.epochs):
        loader.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for images, labels in loader:
            with autocast():
                logits = run(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        losses.append(float(total) / len(loader))
    result = evaluate(model, load("test", subset=config.test_subset), device=device, autocast=autocast)
    kept = {name: result[name] for name in ("top1", "top5", "loss", "firing_rate", "samples")}
    return {**kept, "train_losses": losses, "train_seconds": round(time.perf_counter() - started, 2)}


def _measure(config: CorrelationConfig, setting: Setting, net: Net, images: Tensor) -> dict[str, Any]:
    """All metrics of one net, and how long each took."""
    values: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name in config.metrics:
        started = time.perf_counter()
        values[name] = score(net, name, setting, images=images, seed=config.seed, **config.model_arguments)
        seconds[name] = round(time.perf_counter() - started, 4)
    return {**values, "metric_seconds": seconds}


def _write_json(path: Path, content: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _claim(folder: Path, config: CorrelationConfig, space: Space) -> None:
    """Make the folder this experiment's, or raise where it is another's."""
    path = folder / "experiment.json"
    ours = json.loads(json.dumps({**asdict(config), "space": asdict(space)}))
    if path.is_file():
        theirs = json.loads(path.read_text())
        changed = sorted(key for key in ours if ours[key] != theirs.get(key))
        if changed:
            told = ", ".join(f"{key} is {ours[key]!r} and was {theirs.get(key)!r}" for key in changed)
            raise ValueError(f"{folder} holds another experiment: {told}. Use another --output.")
        return
    _write_json(path, ours)


def correlate(
    config: CorrelationConfig,
    folder: str | Path,
    *,
    data_dir: str | None = None,
    download: bool = True,
    rank: int | None = None,
    world_size: int | None = None,
    device: str | None = None,
    progress: bool = False,
) -> list[dict[str, Any]] | None:
    """Train a random sample of nets and see how well every metric ranks them.

    Every net leaves one JSON file in the folder, so an interrupted experiment goes on with the next net. Processes
    share the nets out among them by their number, and need nothing of each other but the folder: under torchrun, on
    one machine or on several with a common folder, each takes every world_size-th net. Whichever ends last writes
    the summary: nets.csv, correlation.csv and correlation.png.

    Args:
        config: The experiment.
        folder: Where the results go.
        data_dir: Folder of the dataset.
        download: Whether data that are not there may be downloaded.
        rank: Number of this process; None asks torchrun's environment.
        world_size: Number of processes; likewise.
        device: Where to train; None takes a GPU where there is one, by torchrun's local rank.
        progress: Show a progress bar.

    Returns:
        The correlations, a row a metric, or None while other processes still train.

    Raises:
        ValueError: A folder of another experiment, or a config that makes no sense.
        FileNotFoundError: The data are not there.
    """
    folder = Path(folder)
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}, world_size={world_size}: expected a rank from 0 to below world_size.")
    if device is None:
        gpus = torch.cuda.device_count()
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if gpus else "cpu"
    place = torch.device(device)
    space = Space.of(config.space)
    info = dataset_info(config.dataset, data_dir)
    setting = Setting(config.T, info.num_classes, info.img_size, info.in_chans)
    constraints = Constraints(parameters=window(config.parameters) if config.parameters else None)
    nets = sample(space, config.nets, setting, constraints, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, config, space)
    files = [folder / f"net_{index:03d}.json" for index in range(len(nets))]
    mine = [index for index in range(rank, len(nets), world_size) if not files[index].is_file()]
    if mine:
        facts = environment()  # of the code that runs, whatever becomes of the checkout meanwhile
        images = images_of(
            config.dataset, config.metrics, setting, config.seed, data_dir=data_dir, download=download, device=place
        )
    for index in tqdm(mine, desc="nets", disable=not progress, leave=False):
        net = nets[index]
        row = {**net._asdict(), **cost(net, setting)._asdict(), **_measure(config, setting, net, images)}
        row |= _train(config, setting, net, place, data_dir, download)
        _write_json(files[index], {"index": index, **row, "environment": facts})
    if not all(path.is_file() for path in files):
        return None
    return _summarise(config, [json.loads(path.read_text()) for path in files], folder)


def _interval(statistic: Callable[[Any, Any], float], x: Any, y: Any, draws: int, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval over the nets."""
    import numpy as np

    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        chosen = rng.integers(0, len(x), len(x))
        if len(set(x[chosen])) > 1 and len(set(y[chosen])) > 1:  # no rank correlation of a constant
            values.append(statistic(x[chosen], y[chosen]))
    return (float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))) if values else (math.nan, math.nan)


def correlations(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], draws: int, seed: int
) -> list[dict[str, Any]]:
    """Kendall's tau-b and Spearman's rho of every metric with ``top1``, with bootstrap intervals.

    Args:
        rows: A row a net, with ``top1`` and the metrics.
        metrics: Names of metrics.
        draws: Resamples of the bootstrap.
        seed: Of the resamples.

    Returns:
        A row a metric; nan where all nets have the same value.
    """
    import numpy as np
    from scipy import stats

    def kendall(x: Any, y: Any) -> float:
        return float(stats.kendalltau(x, y).statistic)

    def spearman(x: Any, y: Any) -> float:
        return float(stats.spearmanr(x, y).statistic)

    accuracy = np.array([row["top1"] for row in rows], dtype=float)
    found = []
    for name in metrics:
        values = np.array([row[name] for row in rows], dtype=float)
        line: dict[str, Any] = {"metric": name, "nets": len(rows), "higher_is_better": METRICS[name].higher_is_better}
        for title, statistic in (("kendall", kendall), ("spearman", spearman)):
            constant = len(set(values)) == 1 or len(set(accuracy)) == 1
            low, high = (math.nan, math.nan) if constant else _interval(statistic, values, accuracy, draws, seed)
            line |= {title: math.nan if constant else statistic(values, accuracy)}
            line |= {f"{title}_low": low, f"{title}_high": high}
        found.append(line)
    return found


def _summarise(config: CorrelationConfig, nets: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    write_rows(folder / "nets.csv", nets)
    rows = correlations(nets, config.metrics, config.bootstrap, config.seed)
    write_rows(folder / "correlation.csv", rows)
    columns = 4
    figure = _figure(3.1 * columns, 2.9 * math.ceil(len(rows) / columns))
    if figure is not None:
        axes = figure.subplots(math.ceil(len(rows) / columns), columns, squeeze=False).flatten()
        for axis, row in zip(axes, rows, strict=False):
            values = [net[row["metric"]] for net in nets]
            axis.scatter(values, [net["top1"] for net in nets], s=12, color="#1f6f8b")
            if min(values) > 0 and max(values) > 1000 * min(values):
                axis.set_xscale("log")
            axis.set_title(f"{row['metric']}\ntau {row['kendall']:.2f}, rho {row['spearman']:.2f}", fontsize=9)
            axis.grid(alpha=0.3)
        for axis in axes[len(rows) :]:
            axis.set_axis_off()
        for axis in axes[::columns]:
            axis.set_ylabel("test accuracy (%)")
        with atomic(folder / "correlation.png") as temporary:
            figure.savefig(temporary, dpi=130, format="png")
    return rows


def correlation_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The correlations as text."""
    lines = [["metric", "better", "Kendall", "95 %", "Spearman", "95 %", "nets"]]
    for row in rows:
        line = [row["metric"], "higher" if row["higher_is_better"] else "lower"]
        for name in ("kendall", "spearman"):
            line += [f"{row[name]:+.2f}", f"{row[f'{name}_low']:+.2f} to {row[f'{name}_high']:+.2f}"]
        lines.append([*line, str(row["nets"])])
    return _aligned(lines)
