"""Measure how fast a model trains or infers against what a user would do instead, and what a start costs.

Example:
    python benchmark.py --model mpbn_resnet20 --mode train --T 1 --amp --channels-last --torchcompile
    python benchmark.py --model spiking_resnet19 --mode infer --precision bf16 --batch-size 8 \\
        --against spikingjelly spikingjelly-best ann conv-limit --memory
    python benchmark.py --model spiking_vgg9 --mode infer --precision int8 --ticket 0.9
    python benchmark.py --model spiking_vgg9 --mode infer --precision bf16 --T 1 2 4 8 16 --plot growth.png
    python benchmark.py --mode neuron
    python benchmark.py --model spiking_vgg9 --mode size

All sides run in one process and in turns, A B C A B C, so that a busy machine slows all of them, and so do all numbers
of a flag with several; how many times as fast ours is than another is the median of the ratios of neighbours. The first
step of each side, with its compilation, and the warm-up are timed apart. --amp, --channels-last and --torchcompile, or
--precision, which deploys the model, are for spikezoo's side; the baselines have their own forms, and the column
``form`` says which.

``infer`` and ``train`` time steps. ``neuron`` times the LIF neuron alone, ``startup`` imports, the first call of a
deployed model and the loading of a checkpoint. ``size`` measures files: the same weights at random masks, stored
dense, as bitmask and as ticket, against the entropy of the mask.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import spikformer
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import spikezoo
from spikezoo.checkpoint import atomic, sparse, write_checkpoint
from spikezoo.checks import nearest
from spikezoo.deploy import PRECISIONS, EightBit, has_compiler
from spikezoo.evaluate import environment, write_rows
from spikezoo.flags import choose_device
from spikezoo.graph import Node, trace
from spikezoo.layers import ConvNormNeuron, Pool, set_ternary
from spikezoo.models._base import SpikingModel
from spikezoo.models.spikformer import Spikformer
from spikezoo.neurons import LIF, SURROGATES, MembraneNorm, NeuronConfig, SpikingNeuron
from spikezoo.observe import firing_rates
from spikezoo.pictures import check_picture, plain_ticks
from spikezoo.transforms.dynsnn import masks_of

Row = dict[str, Any]
MODES = ("train", "infer", "neuron", "size", "startup")
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
        against: The baselines, keys of ``BASELINES``; none measures our side alone.
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
            ("against", self.against, BASELINES),
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


# --------------------------------------------------------------------------------------------------------------
# The baseline: the same network as a user of SpikingJelly would write it, with the same weights
# --------------------------------------------------------------------------------------------------------------


def _same_weights(twin: nn.Module, source: nn.Module) -> nn.Module:
    twin.load_state_dict(source.state_dict())
    return twin


def _surrogate(config: NeuronConfig) -> nn.Module:
    alpha = SURROGATES[config.surrogate][1] if config.surrogate_alpha is None else config.surrogate_alpha
    known = {"sigmoid": surrogate.Sigmoid, "arctan": surrogate.ATan, "triangle": surrogate.PiecewiseQuadratic}
    if config.surrogate in known:
        return known[config.surrogate](alpha=float(alpha))
    # SpikingJelly has no tanh surrogate, and its rectangle is not a registered operator and takes the slow path. The
    # triangle is registered, and cheaper than a tanh: a choice in the baseline's favour.
    return surrogate.PiecewiseQuadratic(alpha=1.0)


def _neuron(source: nn.Module, flat: bool = False) -> nn.Module:
    """LIFNode, or with membrane normalisation MPBNLIFNode, which carries the normalised potential to the next step."""
    if type(source) is not LIF or source.folded is not None or source.mask is not None:
        raise NoCounterpartError(
            f"{type(source).__name__} has no counterpart in the SpikingJelly baseline, only LIF without mask has."
        )
    config = source.config
    if config.tau is None and not 0 < config.decay < 1:
        raise NoCounterpartError(
            f"decay={config.decay} has no counterpart in SpikingJelly: expected a number in (0, 1)."
        )
    arguments = {
        "tau": 1 / (1 - config.decay) if config.tau is None else float(config.tau),
        "decay_input": config.tau is not None,
        "v_threshold": float(config.threshold),
        "v_reset": float(config.v_reset) if config.reset == "hard" else None,
        "surrogate_function": _surrogate(config),
        "detach_reset": config.detach_reset,
    }
    if source.norm is None:
        return neuron.LIFNode(**arguments)
    if source.norm.mode != "channel":
        raise NoCounterpartError(f"mpbn={source.norm.mode!r} has no counterpart in SpikingJelly: only 'channel' has.")
    twin = neuron.MPBNLIFNode(**arguments, **{"out_features" if flat else "out_channels": source.norm.channels})
    twin.vbn.load_state_dict(source.norm.state_dict(), strict=False)  # ours does not count batches
    return twin


def _weights(source: nn.Module) -> nn.Module:
    """A convolution, linear layer or norm with the same weights."""
    twin: nn.Module
    if isinstance(source, nn.Conv2d):
        geometry: Any = (source.kernel_size, source.stride, source.padding, source.dilation, source.groups)
        twin = layer.Conv2d(source.in_channels, source.out_channels, *geometry, bias=source.bias is not None)
    elif isinstance(source, nn.Linear):
        twin = layer.Linear(source.in_features, source.out_features, source.bias is not None)
    elif isinstance(source, nn.BatchNorm1d | nn.BatchNorm2d):
        kind = layer.BatchNorm1d if isinstance(source, nn.BatchNorm1d) else layer.BatchNorm2d
        twin = kind(source.num_features, source.eps, source.momentum, source.affine)
    else:
        raise NoCounterpartError(f"{type(source).__name__} has no counterpart in the SpikingJelly baseline.")
    return _same_weights(twin, source)


class _Sum(nn.Module):
    """A residual join."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def in_spikingjelly(node: Node) -> nn.Module:
    """SpikingJelly's counterpart of a node of one of our models, with the same weights.

    Raises:
        NoCounterpartError: A part or operation that has none.
    """
    if node.kind in ("layer", "norm"):
        return _weights(node.module)
    if node.kind == "neuron":
        return _neuron(node.module, flat=len(node.shape) == 1)
    if node.kind == "pool":
        pool: Any = node.pooling
        if isinstance(pool, nn.MaxPool2d):
            return layer.MaxPool2d(pool.kernel_size, pool.stride, pool.padding)
        if isinstance(pool, nn.AvgPool2d):
            geometry = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad)
            return layer.AvgPool2d(*geometry)
    if node.kind == "average":
        return nn.Sequential(layer.AdaptiveAvgPool2d(1), layer.Flatten())
    if node.kind in ("flatten", "join"):
        return layer.Flatten() if node.kind == "flatten" else _Sum()
    raise NoCounterpartError(f"{node.what.capitalize()} has no counterpart in the SpikingJelly baseline.")


class SpikingJellyNet(nn.Module):
    """A model of ours in SpikingJelly's layers, multi-step: the image is repeated T times, logits are averaged.

    Args:
        model: The model to rebuild; its weights are copied.

    Raises:
        NoCounterpartError: A layer, neuron or operation that SpikingJelly does not have.
    """

    def __init__(self, model: SpikingModel) -> None:
        super().__init__()
        if model.head.global_pool.pool_type != "avg" or model.encoding != "direct" or model.takes_events:
            raise NoCounterpartError("The SpikingJelly baseline needs images, encoding='direct' and global_pool='avg'.")
        self.T = model.T
        graph = trace(model)
        nodes = [node for node in graph.nodes if node.name not in ("input", "head", "head.fc")]
        place = {graph.input: 0, **{node: index for index, node in enumerate(nodes, 1)}}
        self.parts = nn.ModuleList(in_spikingjelly(node) for node in nodes)
        self.takes = [[place[source] for source in node.inputs] for node in nodes]
        # A map is let go with its last reader, as in a sequence of layers.
        last = {source: index for index, sources in enumerate(self.takes) for source in sources}
        self.spent = [[source for source, reader in last.items() if reader == index] for index in range(len(nodes))]
        pooling = [layer.AdaptiveAvgPool2d(1), layer.Flatten()] if len(graph.features.shape) > 1 else []
        self.head = nn.Sequential(*pooling, _weights(model.head.fc))
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to logits ``[B, num_classes]``."""
        if not torch.compiler.is_compiling():
            functional.reset_net(self)
        x = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        maps = {0: x}
        for index, (part, sources, spent) in enumerate(zip(self.parts, self.takes, self.spent, strict=True), 1):
            taken = [maps[source] for source in sources]
            for source in spent:
                del maps[source]
            x = part(*taken)
            maps[index] = x
        return self.head(x).mean(0)


class SpikingJellySpikformer(nn.Module):
    """SpikingJelly's own Spikformer in the dimensions of one of ours; it draws its own weights.

    Args:
        model: The model to rebuild.

    Raises:
        NoCounterpartError: Pools, heads or ratios that SpikingJelly's does not have.
    """

    def __init__(self, model: Spikformer) -> None:
        super().__init__()
        modules = list(model.stem)[:-1]  # without the position encoding
        convs = [index for index, module in enumerate(modules) if isinstance(module, ConvNormNeuron)]
        pools = tuple(isinstance(module, Pool) for index in convs for module in (*modules, None)[index + 1 : index + 2])
        patch = {(False, False, True, True): 4, (True, True, True, True): 16}.get(pools)
        blocks = [block for stage in model.stages for block in stage]
        heads = {block.attn.heads for block in blocks}
        hidden = {block.mlp.fc1.conv.out_channels for block in blocks}
        plain = {"scale": {block.attn.scale for block in blocks} == {0.125}, "one number of heads": len(heads) == 1}
        plain |= {"one MLP ratio": len(hidden) == 1, "two or four pools": patch is not None}
        plain |= {"a spike residual": blocks[0].attn.neuron_in is None, "direct encoding": model.encoding == "direct"}
        plain |= {"LIF neurons": model.neuron_config.kind == "lif" and model.mpbn is None}
        missing = [name for name, fits in plain.items() if not fits]
        if missing or model.takes_events:
            raise NoCounterpartError(f"SpikingJelly's Spikformer needs images and {', '.join(missing) or 'no events'}.")
        if any(neuron.mask is not None for neuron in model.modules() if isinstance(neuron, SpikingNeuron)):
            raise NoCounterpartError("Masked neurons have no counterpart in SpikingJelly's Spikformer.")
        dim = model.num_features
        self.net = spikformer.Spikformer(
            T=model.T,
            in_channels=model.in_chans,
            img_size_h=model.img_size[0],
            img_size_w=model.img_size[1],
            patch_size=patch,
            num_classes=model.num_classes,
            embed_dims=dim,
            num_heads=heads.pop(),
            mlp_ratio=hidden.pop() / dim,
            depths=len(blocks),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to logits ``[B, num_classes]``."""
        if not torch.compiler.is_compiling():
            functional.reset_net(self)
        return self.net(x).mean(0)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def counterpart(model: SpikingModel) -> tuple[nn.Module, str]:
    """The same network from SpikingJelly's layers, and where it is not exactly the same.

    Raises:
        NoCounterpartError: SpikingJelly cannot say it.
        RuntimeError: It has another number of parameters than its layout explains.
    """
    if not isinstance(model, Spikformer):
        net, absent, notes = SpikingJellyNet(model), 0, _notes(model)
    else:
        net, notes = SpikingJellySpikformer(model), []
        biases = [m.conv.bias for m in model.modules() if isinstance(m, ConvNormNeuron) and m.conv.bias is not None]
        absent = sum(bias.numel() for bias in biases)
        notes.append(
            f"SpikingJelly's Spikformer leaves out the {absent:,} biases before norms, takes queries, keys and values "
            "from one convolution, and pools before the neuron."
        )
        settle(net, random_images(model, SETTLED))
    if _count(model) != _count(net) + absent:
        raise RuntimeError(f"Not the same network: {_count(model):,} and {_count(net):,} parameters.")
    return net, " ".join(notes)


def fused_counterpart(model: SpikingModel) -> nn.Module:
    """The counterpart for evaluation, with norms fused into what precedes them."""
    if isinstance(model, Spikformer):
        net, _ = counterpart(model)
        for module in list(net.modules()):
            for conv, norm in itertools.pairwise(list(module.named_children())):
                if isinstance(conv[1], nn.Conv1d | nn.Conv2d) and isinstance(norm[1], _BatchNorm):
                    setattr(module, conv[0], fuse_conv_bn_eval(conv[1].eval(), norm[1].eval()))
                    setattr(module, norm[0], nn.Identity())
        return net
    with contextlib.suppress(ValueError):  # nothing to fold
        model = spikezoo.fold_bn(model)  # type: ignore[assignment]
    net = SpikingJellyNet(model)
    for module in net.modules():
        if isinstance(module, neuron.MPBNLIFNode):
            module.re_parameterize_v_threshold()
    return net


# --------------------------------------------------------------------------------------------------------------
# The network and its images
# --------------------------------------------------------------------------------------------------------------

SETTLED = 8  # images whose statistics a random net gets


def random_images(model: SpikingModel, number: int) -> Tensor:
    """Random input of a model ``[number, ...]``: normal, or of codes that take pixels in [0, 1], uniform."""
    draw = torch.randn if model.encoding == "direct" else torch.rand
    return draw(number, *model.input_shape, device=next(model.parameters()).device)


@torch.no_grad()
def settle(model: nn.Module, images: Tensor) -> None:
    """Give the norms of a random net the statistics of some images, so that its neurons fire in evaluation."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm | MembraneNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@torch.no_grad()
def wake(model: SpikingModel, images: Tensor) -> dict[str, float]:
    """Make layers without norm fire by doubling their weights, which changes no time; return all firing rates.

    Raises:
        ValueError: Every image gets the same logits all the same, so that no comparison of logits would mean anything.
    """
    rates: dict[str, float] = {}
    for _ in range(64):
        rates = {name: float(rate.mean()) for name, rate in firing_rates(model, images).items()}
        owners = (model.get_submodule(name.rpartition(".")[0]) for name, rate in rates.items() if rate < 0.01)
        bare = (m for m in owners if not any(isinstance(n, _BatchNorm | MembraneNorm) for n in m.modules()))
        first = next(bare, None)
        if first is None:
            break
        for module in first.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight *= 2
    logits = model(images)
    if rates and torch.equal(logits, logits[:1].expand_as(logits)):
        silent = [name for name, rate in rates.items() if rate == 0]
        raise ValueError(
            f"This random net gives every image the same logits, silent layers {', '.join(silent) or 'none'}: nothing "
            "to compare. Use a larger T or img_size, or less sparsity."
        )
    return rates


@torch.no_grad()
def narrowed(model: SpikingModel, width: float) -> SpikingModel:
    """Keep a fraction of the channels of every layer, the first ones of random weights."""
    masked = spikezoo.apply(model, "dynsnn", per="channel")
    for mask in masks_of(masked).values():
        mask[max(1, round(width * len(mask))) :] = False
    return spikezoo.compact(masked)  # type: ignore[return-value]


def make_model(settings: Settings, **changes: Any) -> SpikingModel:
    """The network of a benchmark: random weights, settled norms, in evaluation mode; ``rates`` are its firing rates.

    Args:
        settings: What to measure.
        **changes: Further arguments of ``create_model``.
    """
    given = {"T": settings.T, "img_size": settings.img_size, "num_classes": settings.num_classes, **changes}
    if given.get("neuron") != "relu":
        given["surrogate"] = settings.surrogate
    torch.manual_seed(0)
    model: Any = spikezoo.create_model(settings.model, device=settings.device, **given)
    if settings.width is not None:
        model = narrowed(model, settings.width)
    if settings.ticket is not None:
        model = spikezoo.bake(spikezoo.apply(model, "ticket", kind="mpslt", sparsity=settings.ticket))
    images = random_images(model, SETTLED)
    settle(model, images)
    model.rates = wake(model, images)
    return model


# --------------------------------------------------------------------------------------------------------------
# Sides: something whose step can be timed
# --------------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One of the things that are compared.

    Attributes:
        name: Whose side it is.
        form: Number format, memory format, eager or compiled.
        parameters: Parameters.
        step: Runs one step.
        first_s: Seconds of the first step, with what prepares and compiles it.
        times: Seconds of the timed steps.
        check: Compares the side with something; what it returns goes into its row.
        notes: Where the side is not exactly the same.
    """

    name: str
    form: str
    parameters: int
    step: Step
    first_s: float = 0.0
    times: list[float] = field(default_factory=list)
    check: Callable[[], Row] = dict
    notes: str = ""


def _side(name: str, form: str, model: nn.Module, forward: Callable[[], Tensor], labels: Tensor, train: bool) -> Side:
    """Make the step of a side: a training step, or a forward pass without gradients."""
    model.train(train)
    if train:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def step() -> None:
            F.cross_entropy(forward().float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    else:

        def step() -> None:
            with torch.no_grad():
                forward()

    return Side(name, form, _count(model), step)


def _deployed_side(name: str, model: SpikingModel, images: Tensor, settings: Settings) -> Side:
    assert settings.precision is not None
    start = time.perf_counter()
    fast = spikezoo.deploy(model, settings.precision)
    prepared_s = time.perf_counter() - start

    @torch.no_grad()
    def check() -> Row:
        wanted, found = model(images), fast(images)
        agree = (wanted.argmax(1) == found.argmax(1)).double().mean()
        return {"bit_equal": torch.equal(wanted, found), "argmax_agree": round(float(agree), 4)}

    form = [f"deployed {settings.precision}", "compiled" if fast.compiled else "eager", *fast.notes]
    return Side(name, ", ".join(form), _count(model), lambda: fast(images), prepared_s, check=check)


def spikezoo_side(
    model: SpikingModel, images: Tensor, labels: Tensor, settings: Settings, name: str = "spikezoo"
) -> Side:
    """Our side: the model in the form that the settings ask for."""
    if settings.precision:
        return _deployed_side(name, model, images, settings)
    model = copy.deepcopy(model)  # training changes it
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = _channels_last(images)
    options = model.compile_options if settings.mode == "train" and settings.device == "cpu" else {}
    run = torch.compile(model, options=options) if settings.torchcompile else model

    def forward() -> Tensor:
        with torch.autocast(settings.device, torch.bfloat16) if settings.amp else contextlib.nullcontext():
            return run(images)

    form = [
        "bf16 autocast" if settings.amp else "float32",
        "channels-last" if settings.channels_last else "NCHW",
        "compiled" if settings.torchcompile else "eager",
    ]
    return _side(name, ", ".join(form), model, forward, labels, settings.mode == "train")


def _channels_last(images: Tensor) -> Tensor:
    return images.to(memory_format=torch.channels_last) if images.dim() == 4 else images


def eager_side(model: SpikingModel, images: Tensor, labels: Tensor, settings: Settings) -> Side:
    """Our own model, eager float32."""
    plain = replace(settings, precision=None, amp=False, channels_last=False, torchcompile=False)
    return spikezoo_side(model, images, labels, plain, "eager")


def spikingjelly_side(model: SpikingModel, images: Tensor, labels: Tensor, settings: Settings) -> Side:
    """SpikingJelly's layers, eager float32."""
    net, notes = counterpart(model)
    net = net.to(settings.device)
    side = _side("spikingjelly", "float32, NCHW, eager", net, lambda: net(images), labels, settings.mode == "train")
    side.notes = notes
    return side


def _compiled(net: nn.Module, frozen: bool, options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Compile a network, on request with frozen weights; called without gradients then."""
    run = torch.compile(net, options=options)

    def call(*inputs: Tensor) -> Any:
        # As an option of torch.compile it does nothing: the weights have become inputs of the graph by then.
        with inductor.patch(freezing=frozen):
            return run(*inputs)

    return call


def spikingjelly_best_side(model: SpikingModel, images: Tensor, labels: Tensor, settings: Settings) -> Side:
    """SpikingJelly's layers with all that a good user adds."""
    train, cpu = settings.mode == "train", settings.device == "cpu"
    net, notes = counterpart(model)
    parameters = _count(net)
    form = ["bf16 autocast", "channels-last"]
    if not train:
        net = fused_counterpart(model)
        form.append("conv-bn fused")
    net = net.to(settings.device, memory_format=torch.channels_last).train(train)  # type: ignore[call-overload]
    run: Callable[[Tensor], Tensor] = net
    if has_compiler() or not cpu:
        # On CUDA its compiled channels-last nets are faster without a second choice of layouts, says its issue 753.
        options: dict[str, Any] = {} if cpu else {"layout_optimization": False}
        run = _compiled(net, cpu and not train, options)
    form.append(("compiled" if train or not cpu else "compiled with frozen weights") if run is not net else "eager")
    images = _channels_last(images)

    def forward() -> Tensor:
        # Not in the compiled network, which would be compiled anew whenever a potential is another tensor.
        functional.reset_net(net)
        with torch.autocast(settings.device, torch.bfloat16):
            return run(images)

    side = _side("spikingjelly-best", ", ".join(form), net, forward, labels, train)
    side.parameters, side.notes = parameters, notes
    return side


def ann_side(model: SpikingModel, images: Tensor, labels: Tensor, settings: Settings) -> Side:
    """The ReLU twin, T=1, in the form of our side; in bf16 where that is int8, since it has no spikes."""
    if settings.width is not None:
        raise NoCounterpartError("The ReLU twin has no spiking neurons, whose masks width needs: leave 'ann' out.")
    precision = "bf16" if settings.precision == "int8" else settings.precision
    form = replace(settings, T=None, ticket=None, precision=precision)
    twin = make_model(form, neuron="relu", mpbn="none", encoding="direct")
    side = spikezoo_side(twin, images, labels, form, "ann")
    side.form = f"ReLU, T=1, {side.form}"
    side.check = dict  # it is another network
    return side


def plain_side(model: SpikingModel, images: Tensor, labels: Tensor, settings: Settings) -> Side:
    """The same network without membrane norms, in the form of our side."""
    if not model.mpbn:
        raise NoCounterpartError(f"{settings.model} has no membrane norms: against='plain' is for mpbn_* models.")
    side = spikezoo_side(make_model(settings, mpbn="none"), images, labels, settings, "plain")
    side.check = dict
    return side


class _Layers(nn.Module):
    """Layers beside each other, each with an input of its own."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """One number of each output: all outputs at once would need memory that no network needs."""
        outputs = (layer(x) for layer, x in zip(self.layers, inputs, strict=True))
        return [y[(0,) * y.dim()].clone() for y in outputs]


class _Sums(nn.Module):
    """The sums of an eight-bit layer, without scale and bias."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.eight = EightBit(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.eight.sums(x[..., None, None] if self.eight.linear else x)


def conv_limit_side(model: SpikingModel, images: Tensor, labels: Tensor, settings: Settings) -> Side:
    """The convolutions and linear layers alone, in the number and memory format of our side."""
    shapes: dict[str, torch.Size] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda _module, inputs, _output: shapes.update({name: inputs[0].shape})

    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    handles = [module.register_forward_hook(record(name)) for name, module in found.items()]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    eight: set[str] = set()
    if settings.precision == "int8":
        deployed = spikezoo.deploy(model, "int8")
        eight = {name for name, m in deployed.model.named_modules() if isinstance(m, EightBit)}
    half = settings.precision == "bf16" or settings.amp
    last = settings.precision in ("bf16", "int8") or settings.channels_last
    layers, inputs = [], []
    # Deployed, the first layer and the head stay in float32.
    whole = {next(iter(shapes))} if settings.precision == "bf16" else set()
    for name, shape in shapes.items():
        spikes = (torch.rand(shape, device=settings.device) < 0.2).float()
        layer = copy.deepcopy(found[name]).requires_grad_(False)
        if name in eight:
            layer, spikes = _Sums(layer), spikes.to(torch.uint8)
        else:
            set_ternary(layer, False)
            if half and not name.startswith("head.") and name not in whole:
                layer, spikes = layer.to(torch.bfloat16), spikes.to(torch.bfloat16)
        if last:
            layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            spikes = _channels_last(spikes)
        layers.append(layer)
        inputs.append(spikes)
    net = _Layers(layers).eval()
    # The eight-bit operator is called as it is: around it there is nothing to compile.
    compiled = (settings.precision in ("exact", "bf16") and has_compiler()) or settings.torchcompile
    run = _compiled(net, half and settings.device == "cpu") if compiled else net
    form = f"{len(layers)} layers alone, {f'{len(eight)} in int8, ' if eight else ''}{'bf16' if half else 'float32'}, "
    form += f"{'channels-last' if last else 'NCHW'}, {'compiled' if compiled else 'eager'}"

    def step() -> None:
        with torch.no_grad():
            run(*inputs)

    return Side("conv-limit", form, sum(found[name].weight.numel() for name in shapes), step)


BASELINES: dict[str, Callable[[SpikingModel, Tensor, Tensor, Settings], Side]] = {
    "spikingjelly": spikingjelly_side,
    "spikingjelly-best": spikingjelly_best_side,
    "ann": ann_side,
    "plain": plain_side,
    "conv-limit": conv_limit_side,
    "eager": eager_side,
}


def make_inputs(settings: Settings, model: SpikingModel) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    labels = torch.randint(model.num_classes, (settings.batch_size,), device=settings.device)
    return random_images(model, settings.batch_size), labels


def make_sides(settings: Settings, model: SpikingModel, tell: Callable[[str], None] | None = None) -> list[Side]:
    """Build our side and the baselines, for the same random images.

    Args:
        settings: What to measure.
        model: The network, of :func:`make_model`.
        tell: Is told of a baseline that this model has no counterpart in; None raises.

    Raises:
        NoCounterpartError: A baseline that cannot be built.
    """
    images, labels = make_inputs(settings, model)
    sides = [spikezoo_side(model, images, labels, settings)]
    for name in settings.against:
        try:
            sides.append(BASELINES[name](model, images, labels, settings))
        except NoCounterpartError as error:
            if tell is None:
                raise
            tell(f"{settings.model} against {name}: {error}")
    return sides


def _timed(step: Step, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(sides: Sequence[Side], repeats: int, warmup: int, device: str = "cpu") -> None:
    """Run the sides in turns and fill in their times."""
    for side in tqdm(sides, "first steps, which may compile", leave=False, disable=None):
        side.first_s += _timed(side.step, device)
    for turn in range(warmup + repeats):
        for side in sides:
            seconds = _timed(side.step, device)
            if turn >= warmup:
                side.times.append(seconds)


# --------------------------------------------------------------------------------------------------------------
# Processes of their own: memory, and what only a fresh process shows
# --------------------------------------------------------------------------------------------------------------


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS (resident now) or VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}.")


def _release() -> None:
    """Return freed memory to the system, so that what compilation used once is not counted."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_memory(step: Step, device: str = "cpu") -> int:
    """Bytes that a step holds at its peak, beyond what there was before the first one.

    Args:
        step: The step. It runs three times; the first two, which compile and warm up, do not count.
        device: cpu (resident memory of this process) or cuda (memory of torch's allocator).
    """
    _release()
    if device == "cuda":
        start = torch.cuda.memory_allocated()
        step(), step()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    start = _status("VmRSS")
    step(), step()
    _release()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return _status("VmHWM") - start


def _memory_task(settings: Settings, side: str) -> float:
    if has_compiler():
        import torch._inductor.compile_fx  # noqa: F401  # the compiler's own modules are no memory of a step
    model = make_model(settings)
    images, labels = make_inputs(settings, model)
    build = spikezoo_side if side == "spikezoo" else BASELINES[side]
    return peak_memory(build(model, images, labels, settings).step, settings.device) / 2**20


def _first_call_task(settings: Settings) -> float:
    model = make_model(settings)
    images, _ = make_inputs(settings, model)
    start = time.perf_counter()
    spikezoo.deploy(model, settings.precision or "bf16", example=images)
    return time.perf_counter() - start


# What starts this file as a process, from a checkout that need not be installed.
DOOR = Path(__file__).parent.parent / "benchmark.py"
TASKS: dict[str, Callable[..., float]] = {"memory": _memory_task, "first-call": _first_call_task}


def in_process(task: str, settings: Settings, environ: Mapping[str, str] | None = None, **arguments: Any) -> float:
    """Run one of ``TASKS`` in a process of its own and return its number.

    Raises:
        RuntimeError: It failed; the message has the end of its log.
    """
    job = json.dumps({"task": task, "settings": asdict(settings), "arguments": arguments})
    done = subprocess.run(
        [sys.executable, str(DOOR), "--task", job],
        capture_output=True, text=True, check=False, env={**os.environ, **(environ or {})},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{settings.model}, {task} {arguments}: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def _run_task(job: str) -> None:
    read = json.loads(job)
    settings = Settings(**{**read["settings"], "against": tuple(read["settings"]["against"])})
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    print(TASKS[read["task"]](settings, **read["arguments"]))


# --------------------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------------------


def _notes(model: SpikingModel) -> list[str]:
    """Where the SpikingJelly baseline is not exactly the same network."""
    notes, config = [], model.neuron_config
    if model.mpbn:
        notes.append(
            "SpikingJelly's MPBNLIFNode carries the normalised potential to the next step, ours the raw one (the "
            "paper's): the same work, the same network at T=1, a different neuron at T>1."
        )
    if config.surrogate in ("tanh", "rectangle"):
        notes.append(f"The baseline trains with PiecewiseQuadratic(1.0) in place of our {config.surrogate} surrogate.")
    if config.firing == ">":
        notes.append("The baseline fires at u >= threshold, ours at u > threshold.")
    return notes


def _ratios(slow: Side, fast: Side) -> list[float]:
    return [a / b for a, b in zip(slow.times, fast.times, strict=True)]


def describe(settings: Settings, model: SpikingModel) -> Row:
    """What all rows of a network share."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_images(model, 1))
    return {
        "model": settings.model,
        "T": model.T,
        "img_size": "x".join(map(str, model.img_size)),
        "num_classes": model.num_classes,
        "surrogate": model.neuron_config.surrogate,
        "width": settings.width,
        "ticket": settings.ticket,
        "macs": counter.get_total_flops() // 2,
        "firing_rate": round(sum(model.rates.values()) / max(len(model.rates), 1), 4),
        "silent_layers": sum(rate == 0 for rate in model.rates.values()),
    }


def make_rows(settings: Settings, sides: Sequence[Side], shared: Row, memory: Mapping[str, float] = {}) -> list[Row]:
    """One row a side, ours first; ``speedup`` is how many times as fast ours is as the row's side.

    Args:
        settings: What was measured.
        sides: Our side and the baselines, with their times.
        shared: Columns that all rows have in common, of :func:`describe`.
        memory: Peak memory of the sides in MiB.
    """
    facts, ours = environment(), sides[0]
    limit = next((side for side in sides if side.name == "conv-limit"), None)
    rows = []
    for side in sides:
        ratios, step_s = _ratios(side, ours), median(side.times)
        rows.append(
            {
                "mode": settings.mode,
                **shared,
                "batch_size": settings.batch_size,
                "side": side.name,
                "form": side.form,
                "parameters": side.parameters,
                "images_per_s": round(settings.batch_size / step_s, 2),
                "step_ms": round(1e3 * step_s, 3),
                "step_ms_min": round(1e3 * min(side.times), 3),
                "step_ms_max": round(1e3 * max(side.times), 3),
                "first_step_s": round(side.first_s, 3),
                "speedup": round(median(ratios), 4),
                "speedup_min": round(min(ratios), 4),
                "speedup_max": round(max(ratios), 4),
                "share_of_conv_limit": round(median(_ratios(limit, side)), 4) if limit else None,
                "bit_equal": None,
                "argmax_agree": None,
                **side.check(),
                "memory_mb": round(memory[side.name], 1) if memory else None,
                "memory_ratio": round(memory[ours.name] / memory[side.name], 4) if memory else None,
                "device": settings.device,
                "repeats": settings.repeats,
                "warmup": settings.warmup,
                **facts,
                "notes": side.notes,
            }
        )
    return rows


def _footer(row: Row) -> list[str]:
    yes = {True: "yes", False: "no"}
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "timm", "spikingjelly", "spikezoo-snn"))
    return [
        f"- {versions}, commit {row['commit']}, {row['date']}",
        f"- {row['machine']}, {row['threads']} threads, AMX {yes[row['amx']]}, AVX512-bf16 {yes[row['avx512_bf16']]}",
    ]


# Title of a column, and its cell; one that no row has a value for is left out.
_COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "side": ("side", lambda r: r["side"]),
    "form": ("form", lambda r: r["form"]),
    "parameters": ("parameters", lambda r: f"{r['parameters']:,}"),
    "images_per_s": ("images/s", lambda r: f"{r['images_per_s']:.1f}"),
    "step_ms": (
        "step ms: median (min-max)",
        lambda r: f"{r['step_ms']:.1f} ({r['step_ms_min']:.1f}-{r['step_ms_max']:.1f})",
    ),
    "first_step_s": ("first step s", lambda r: f"{r['first_step_s']:.2f}"),
    "speedup": (
        "ours is faster (min-max)",
        lambda r: f"{r['speedup']:.2f} ({r['speedup_min']:.2f}-{r['speedup_max']:.2f})",
    ),
    "share_of_conv_limit": ("share of conv limit", lambda r: f"{r['share_of_conv_limit']:.2f}"),
    "bit_equal": ("bit-equal", lambda r: "yes" if r["bit_equal"] else "no"),
    "argmax_agree": ("same arg-max", lambda r: f"{r['argmax_agree']:.1%}"),
    "memory_mb": ("memory MiB", lambda r: f"{r['memory_mb']:.0f}"),
    "memory_ratio": ("ours over it", lambda r: f"{r['memory_ratio']:.2f}"),
}


def markdown(rows: Sequence[Row]) -> str:
    """The rows of steps as tables for people, one for every network, with the facts that they share below it."""
    lines: list[str] = []
    keys = ("model", "mode", "T", "batch_size", "img_size", "surrogate", "width", "ticket")
    for _, group in itertools.groupby(rows, lambda row: [row[key] for key in keys]):
        same = list(group)
        first = same[0]
        told = ("width", "ticket", *(["surrogate"] if first["mode"] == "train" else []))
        extras = [f"{key} {first[key]}" for key in told if first[key] is not None]
        lines += [
            ", ".join(
                [
                    f"{first['model']}, {first['mode']}, T={first['T']}, batch {first['batch_size']}",
                    f"{first['img_size']} pixels, {first['num_classes']} classes",
                    *extras,
                    f"{first['macs'] / 1e6:,.1f} M MACs an image, firing rate {first['firing_rate']:.3f}",
                    f"{first['repeats']} repeats after {first['warmup']} warm-up steps",
                ]
            ),
            "",
        ]
        lines += _table([name for name in _COLUMNS if any(row[name] is not None for row in same)], same)
        lines += ["", *(f"- {note}" for note in dict.fromkeys(row["notes"] for row in same) if note)]
    return "\n".join([*lines, f"- device {rows[0]['device']}", *_footer(rows[0])])


def _table(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The head and the rows of a table with some of ``_COLUMNS``."""
    lines = ["| " + " | ".join(_COLUMNS[name][0] for name in names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = ("" if row[name] is None else _COLUMNS[name][1](row) for name in names)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


# --------------------------------------------------------------------------------------------------------------
# Sizes of files
# --------------------------------------------------------------------------------------------------------------


def _entropy(p: float) -> float:
    """Bits that a mask needs per weight where a fraction p of it is set at random."""
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q)


def size_rows(settings: Settings) -> list[Row]:
    """Store the convolutions and linear layers of a net in every code and compare with the entropy of their masks."""
    given = {"T": settings.T, "img_size": settings.img_size, "num_classes": settings.num_classes}
    model = spikezoo.create_model(settings.model, **given)  # type: ignore[arg-type]
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    shapes = {f"{index}.weight": tuple(layer.weight.shape) for index, layer in enumerate(layers)}
    total = sum(math.prod(shape) for shape in shapes.values())
    generator = torch.Generator().manual_seed(0)
    facts = environment()
    rows: list[Row] = []

    def store(code: str, sparsity: float, bound: float, state: dict[str, Tensor], seeds: dict[str, int]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            write_s, read_s = [], []
            for _ in range(settings.repeats):
                start = time.perf_counter()
                stored, metadata = sparse.encode(state, seeds=seeds)
                write_s.append(time.perf_counter() - start)
                start = time.perf_counter()
                back = sparse.decode(stored, metadata)
                read_s.append(time.perf_counter() - start)
            if any(not torch.equal(back[name], tensor) for name, tensor in state.items()):
                raise RuntimeError(f"{settings.model}: the {code} code at sparsity {sparsity} is not exact.")
            write_checkpoint(folder, state, {"spikezoo": {}}, seeds=seeds)
            bits = 8 * path.stat().st_size / total
        rows.append(
            {
                "model": settings.model, "code": code, "sparsity": sparsity, "weights": total,
                "bytes": round(bits * total / 8), "bits_per_weight": round(bits, 4), "bound": round(bound, 4),
                "over_bound": round(bits / bound, 4), "encode_mb_s": round(4e-6 * total / median(write_s)),
                "decode_mb_s": round(4e-6 * total / median(read_s)), "repeats": settings.repeats, **facts,
            }
        )  # fmt: skip

    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    store("dense", 0.0, 32.0, values, {})
    for sparsity in SPARSITIES:
        masks = {name: torch.rand(shape, generator=generator) >= sparsity for name, shape in shapes.items()}
        kept = sum(int(mask.sum()) for mask in masks.values()) / total
        mask_bits = _entropy(kept)
        zero = torch.zeros(())
        store(
            "bitmask",
            sparsity,
            mask_bits + 32 * kept,
            {n: torch.where(masks[n], v, zero) for n, v in values.items()},
            {},
        )
        seeds = {name: index for index, name in enumerate(shapes)}
        for code, given_seeds in (("ticket", {}), ("ticket, signs from a seed", seeds)):
            tickets = {}
            for name, shape in shapes.items():
                signs = torch.where(sparse.seeded_signs(seeds[name], shape), -0.05, 0.05)
                tickets[name] = torch.where(masks[name], signs, zero)
            store(code, sparsity, mask_bits + (0 if given_seeds else kept), tickets, given_seeds)
    return rows


def size_markdown(rows: Sequence[Row]) -> str:
    """The rows of the mode ``size`` as a table for people."""
    first = rows[0]
    lines = [
        f"{first['model']}: {first['weights']:,} weights of convolutions and linear layers, random masks",
        "",
        "| code | removed | bytes | bits a weight | entropy bound | ratio | encode MB/s | decode MB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['code']} | {r['sparsity']:.0%} | {r['bytes']:,} | {r['bits_per_weight']:.3f} | {r['bound']:.3f} | "
        f"{r['over_bound']:.3f} | {r['encode_mb_s']:,} | {r['decode_mb_s']:,} |"
        for r in rows
    ]
    return "\n".join([*lines, "", f"- commit {first['commit']}, {first['date']}, {first['machine']}"])


# --------------------------------------------------------------------------------------------------------------
# The neuron alone
# --------------------------------------------------------------------------------------------------------------


def neuron_sides(settings: Settings, config: NeuronConfig, T: int) -> list[Side]:
    """LIF forward over ``[T, B, C, H, W]``: ours compiled, a copy of the same bytes, SpikingJelly's eager and compiled.

    Raises:
        NoCounterpartError: The neuron is no LIF.
    """
    size = settings.img_size or 32
    torch.manual_seed(0)
    x = torch.randn(T, settings.batch_size, settings.channels, size, size, device=settings.device)
    ours = LIF(config).eval()
    if config.kind != "lif":
        raise NoCounterpartError(f"{settings.model} has {config.kind} neurons: mode='neuron' times LIF.")
    theirs = _neuron(ours).eval()
    functional.set_step_mode(theirs, "m")

    def from_rest(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def whole(x: Tensor) -> Tensor:
            functional.reset_net(theirs)
            return run(x)

        return whole

    def side(name: str, form: str, run: Callable[[Tensor], Tensor]) -> Side:
        def step() -> Tensor:
            with torch.no_grad():
                return run(x)

        return Side(name, f"float32, {form}", 0, step)

    sides = [
        side("spikezoo", "compiled", torch.compile(ours, dynamic=False)),
        side("copy", "clone of the same tensor", torch.clone),
        side("spikingjelly", "eager", from_rest(theirs)),
        side("spikingjelly compiled", "compiled", from_rest(torch.compile(theirs, dynamic=False))),
    ]
    for other in sides[:1] + sides[3:]:
        other.check = lambda step=other.step: {"bit_equal": torch.equal(step(), sides[2].step())}
    return sides


def neuron_rows(settings: Settings) -> list[Row]:
    """Time the neuron of a model, or the default LIF."""
    model: Any = spikezoo.create_model(settings.model, T=settings.T, device="meta") if settings.model else None
    config = model.neuron_config if model else NeuronConfig()
    T = settings.T or (model.T if model else 4)
    sides = neuron_sides(settings, config, T)
    measure(sides, settings.repeats, settings.warmup, settings.device)
    size = settings.img_size or 32
    rate = float(sides[2].step().mean())
    shared = {
        "model": settings.model or "LIF",
        "T": T,
        "img_size": f"{size}x{size}",
        "channels": settings.channels,
        "firing_rate": round(rate, 4),
    }
    return make_rows(settings, sides, shared)


def neuron_markdown(rows: Sequence[Row]) -> str:
    """The rows of the mode ``neuron`` as a table for people."""
    first = rows[0]
    shape = f"[{first['T']}, {first['batch_size']}, {first['channels']}, {first['img_size'].replace('x', ', ')}]"
    names = ("side", "form", "step_ms", "first_step_s", "speedup", "bit_equal")
    title = f"{first['model']}, forward alone, {shape} float32, firing rate {first['firing_rate']:.3f}, "
    title += f"{first['repeats']} repeats after {first['warmup']} warm-up steps"
    return "\n".join([title, "", *_table(names, rows), "", f"- device {first['device']}", *_footer(first)])


# --------------------------------------------------------------------------------------------------------------
# Start-up
# --------------------------------------------------------------------------------------------------------------

RUNS = 5  # of imports and of loading


def _import_s(modules: str) -> float:
    code = f"import time; start = time.perf_counter(); import {modules}; print(time.perf_counter() - start)"
    place = {"cwd": Path(__file__).parent, "env": {**os.environ, "PYTHONWARNINGS": "ignore"}}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **place)
    return float(done.stdout.split()[-1])


def startup_rows(settings: Settings) -> list[Row]:
    """Time imports, the first call of the deployed model and the loading of a checkpoint.

    Imports and first calls are timed in fresh processes, the calls without and with what the compiler keeps on disk.
    """
    without, whole = [], []
    for _ in range(RUNS):
        without.append(_import_s("torch, timm"))
        whole.append(_import_s("torch, timm, spikezoo"))
    found = {
        "import torch, timm": without,
        "import torch, timm, spikezoo": whole,
        "spikezoo adds": [b - a for a, b in zip(without, whole, strict=True)],
    }
    precision = settings.precision or "bf16"
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty", "full"):
            what = f"first call deployed {precision}, compiler's cache {state}"
            found[what] = [in_process("first-call", settings, {"TORCHINDUCTOR_CACHE_DIR": cache})]
    model = make_model(settings)
    with tempfile.TemporaryDirectory() as folder:
        spikezoo.save_checkpoint(model, folder)
        found["load a checkpoint"] = []
        for _ in range(RUNS):
            start = time.perf_counter()
            spikezoo.create_model(f"local-dir:{folder}", pretrained=True)
            found["load a checkpoint"].append(time.perf_counter() - start)
    facts = environment()
    return [
        {
            "mode": "startup", "model": settings.model, "T": model.T, "batch_size": settings.batch_size,
            "ticket": settings.ticket, "what": what, "seconds": round(median(times), 3),
            "seconds_min": round(min(times), 3), "seconds_max": round(max(times), 3), "runs": len(times), **facts,
        }
        for what, times in found.items()
    ]  # fmt: skip


def startup_markdown(rows: Sequence[Row]) -> str:
    """The rows of the mode ``startup`` as a table for people."""
    first = rows[0]
    lines = [f"{first['model']}, start-up, T={first['T']}, batch {first['batch_size']}", ""]
    lines += ["| what | seconds: median (min-max) | runs |", "|---|---|---|"]
    for row in rows:
        seconds = f"{row['seconds']:.3f} ({row['seconds_min']:.3f}-{row['seconds_max']:.3f})"
        lines.append(f"| {row['what']} | {seconds} | {row['runs']} |")
    return "\n".join([*lines, "", *_footer(first)])


# --------------------------------------------------------------------------------------------------------------
# Growth
# --------------------------------------------------------------------------------------------------------------


def growth_markdown(rows: Sequence[Row], varied: Sequence[str]) -> str:
    """The rows of several settings as one table for people.

    Args:
        rows: Of :func:`step_rows`.
        varied: One or two of ``SWEPT``.
    """
    first = rows[0]
    same = [f"{key} {first[key]}" for key in SWEPT if key not in varied and first[key] is not None]
    heads = [*varied, "side", "form", "M MACs an image", "ms an image", "G MACs/s", "memory MiB"]
    heads = heads if first["memory_mb"] is not None else heads[:-1]
    lines = [f"{first['model']}, {first['mode']}, {', '.join(same)}", "", "| " + " | ".join(heads) + " |"]
    lines.append("|---" * len(heads) + "|")
    for row in rows:
        speed = row["images_per_s"]
        cells = [*(str(row[name]) for name in varied), row["side"], row["form"], f"{row['macs'] / 1e6:,.1f}"]
        cells += [f"{1e3 / speed:.3f}", f"{speed * row['macs'] / 1e9:.1f}"]
        cells += [] if row["memory_mb"] is None else [f"{row['memory_mb']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"- device {first['device']}", *_footer(first)])


def draw_growth(rows: Sequence[Row], varied: Sequence[str], path: str | Path) -> None:
    """Draw the time of an image over what varies, one curve for each value of the second, and dashed what its MACs say.

    Args:
        rows: Of :func:`step_rows`; those of our side are drawn.
        varied: One or two of ``SWEPT``.
        path: Picture file; the suffix names the format.

    Raises:
        ValueError: A file name without a known suffix, or matplotlib is missing.
    """
    figure = check_picture(path)(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    ours = [row for row in rows if row["side"] == "spikezoo"]
    *rest, main = reversed(varied)
    for index, key in enumerate(dict.fromkeys(tuple(row[name] for name in rest) for row in ours)):
        curve = [row for row in ours if tuple(row[name] for name in rest) == key]
        x = [int(row[main].split("x")[0]) if main == "img_size" else row[main] for row in curve]
        label = ", ".join(f"{name}={value}" for name, value in zip(rest, key, strict=True)) or "measured"
        first = 1 / curve[0]["images_per_s"]
        work = [1e3 * first * row["macs"] / curve[0]["macs"] for row in curve]
        axes.plot(x, [1e3 / row["images_per_s"] for row in curve], "o-", color=f"C{index}", label=label)
        axes.plot(x, work, "--", color=f"C{index}", alpha=0.6, label=None if index else "as its MACs grow")
    # A sparsity of 0 has no logarithm.
    axes.set(xscale="linear" if main == "ticket" else "log", yscale="log", xlabel=main, ylabel="ms an image")
    form = ours[0]["form"].partition(", compiled")[0]
    axes.set_title(f"{ours[0]['model']}, {ours[0]['mode']}, {form}", fontsize="medium")
    axes.set_xticks(x, [str(value) for value in x])
    axes.set_xticks([], minor=True)
    plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format=Path(path).suffix[1:].lower())


# --------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------


def step_rows(*plan: Settings, tell: Callable[[str], None] | None = None) -> list[Row]:
    """Time the steps of our side and of the baselines, of all settings in turns; a row a side."""
    prepared = []
    for settings in plan:
        model = make_model(settings)
        prepared.append((settings, describe(settings, model), make_sides(settings, model, tell)))
    measure([side for *_, sides in prepared for side in sides], plan[0].repeats, plan[0].warmup, plan[0].device)
    rows = []
    for settings, shared, sides in prepared:
        memory = {side.name: in_process("memory", settings, side=side.name) for side in sides if settings.memory}
        rows += make_rows(settings, sides, shared, memory)
    return rows


# Modes other than steps: what measures, and what shows it.
_RUN = {"neuron": neuron_rows, "size": size_rows, "startup": startup_rows}
_SHOW = {"neuron": neuron_markdown, "size": size_markdown, "startup": startup_markdown}


def run(*plan: Settings, tell: Callable[[str], None] | None = None) -> list[Row]:
    """Measure once and return one row a side (spikezoo, then the baselines), a code or an event.

    Args:
        *plan: What to measure; several, of the modes train and infer, in turns. Repeats, warm-up, device and threads
            are those of the first.
        tell: Is told of baselines that have no counterpart of the model; None raises.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(plan[0].threads or before)
    try:
        other = _RUN.get(plan[0].mode)
        return [row for settings in plan for row in other(settings)] if other else step_rows(*plan, tell=tell)
    finally:
        torch.set_num_threads(before)


def image_models() -> list[str]:
    """Models for images of 32x32 or 28x28 pixels, without the micro-models of the tests."""
    sizes = {name: get_pretrained_cfg(name).input_size for name in spikezoo.list_models() if name[:5] != "test_"}
    return [name for name, size in sizes.items() if size in ((3, 32, 32), (1, 28, 28))]


def make_parser() -> argparse.ArgumentParser:
    """The command line; a flag is a field of :class:`Settings` or an output file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", default="", help="name of the model, see spikezoo.list_models(); 'all': those for small images")
    add("--mode", choices=MODES, default="train", help="what to measure (default: train)")
    add(
        "--against", nargs="+", choices=tuple(BASELINES), metavar="NAME",
        help=f"baselines: {', '.join(BASELINES)} (default: spikingjelly; none where a flag has several numbers)",
    )  # fmt: skip
    number: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    fraction: dict[str, Any] = {"type": float, "nargs": "+", "metavar": "F"}
    add("--T", **number, help="time steps (default: the model's)")
    add("-b", "--batch-size", **number, help="images a step (default: 128; of the mode neuron 32)")
    add("--img-size", **number, help="height and width (default: the model's)")
    add("--width", **fraction, help="fraction of the channels of every layer that is kept")
    add("--ticket", **fraction, help="sparsity of a baked binary ticket, on our side and SpikingJelly's")
    add("--num-classes", type=int, metavar="N", help="classes (default: the model's)")
    add("--surrogate", choices=tuple(SURROGATES), help="with --mode train: surrogate gradient (default: the model's)")
    add("--precision", choices=PRECISIONS, help="deploy our side in this precision")
    add("--amp", action="store_true", help="bfloat16 autocast, on spikezoo's side")
    add("--channels-last", action="store_true", help="channels-last memory format, on spikezoo's side")
    add("--torchcompile", action="store_true", help="torch.compile, on spikezoo's side")
    add("--memory", action="store_true", help="also the peak memory of a step, each side in a process of its own")
    add("--channels", type=int, default=128, metavar="N", help="channels of the mode neuron (default: 128)")
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    add("--repeats", type=int, default=7, metavar="N", help="timed steps a side (default: 7)")
    add("--warmup", type=int, default=2, metavar="N", help="untimed steps a side after the first (default: 2)")
    add("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    add("--results-file", metavar="FILE", help=f"write the rows to a {', '.join(FORMATS)} file, replacing it")
    add("--plot", metavar="FILE", help="draw the time of an image over the flag that has several numbers")
    return parser


def _plan(arguments: dict[str, Any]) -> tuple[list[Settings], list[str]]:
    """The settings of all runs, and the names of what varies."""
    lists = {name: arguments.pop(name) or [None] for name in SWEPT}
    if lists["batch_size"] == [None]:
        lists["batch_size"] = [32 if arguments["mode"] == "neuron" else 128]
    varied = [name for name, values in lists.items() if len(values) > 1]
    if len(varied) > 2:
        raise ValueError(f"{', '.join(varied)} all have several numbers: give them to two flags at most.")
    models = image_models() if arguments["model"] == "all" else [arguments["model"]]
    if varied and (len(models) > 1 or arguments["mode"] not in ("train", "infer")):
        raise ValueError(f"{varied[0]} with several numbers is for one model and mode='infer' or 'train'.")
    arguments["device"] = choose_device(arguments["device"]).type
    against = arguments.pop("against")
    arguments["against"] = tuple(dict.fromkeys(against)) if against else () if varied else ("spikingjelly",)
    combinations = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    return [Settings(**{**arguments, **given, "model": m}) for m in models for given in combinations], varied


def main(argv: Iterable[str] | None = None) -> list[Row]:
    """Run the command line and return the rows."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--task"]:  # in_process, not people
        _run_task(argv[1])
        return []
    parser = make_parser()
    arguments = vars(parser.parse_args(argv))
    results, plot, several = arguments.pop("results_file"), arguments.pop("plot"), arguments["model"] == "all"
    rows: list[Row] = []
    tables: list[str] = []

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    try:
        if results and Path(results).suffix.lower() not in FORMATS:
            raise ValueError(f"Results file {results!r}: expected a name that ends in {', '.join(FORMATS)}.")
        plan, varied = _plan(arguments)
        if plot:
            check_picture(plot)
            if not varied:
                raise ValueError("--plot draws what varies: give one or two flags several numbers, as in --T 1 2 4.")
        if varied:
            rows = run(*plan)
            tables.append(growth_markdown(rows, varied))
            print(tables[-1])
        else:
            for settings in plan:
                try:
                    found = run(settings, tell=tell if several else None)
                except ValueError as error:
                    if not several:
                        raise
                    tell(f"{settings.model}: {error}")
                    continue
                rows += found
                tables.append(_SHOW.get(settings.mode, markdown)(found))
                print(tables[-1], end="\n\n", flush=True)
    except ValueError as error:
        parser.error(str(error))
    if results and results.lower().endswith(".md"):
        with atomic(results) as temporary:
            temporary.write_text("\n\n".join(tables) + "\n")
    elif results:
        write_rows(results, rows)
    if plot:
        draw_growth(rows, varied, plot)
    return rows


if __name__ == "__main__":
    main()
