"""Measure how fast a model trains or infers against the same network built from another library's layers.

Example:
    python benchmark.py --model mpbn_resnet20 --mode train --T 1 --amp --channels-last --torchcompile
    python benchmark.py --model spiking_vgg9 --mode size

Both sides run in one process and in turns, A B A B, so that a busy machine slows both; the speed-up is the median of
the ratios of neighbours. The first step of each side, with its compilation, and the warm-up are timed apart. Only
spikezoo's side takes --amp, --channels-last and --torchcompile.

The mode ``size`` measures files instead: the same weights at random masks, stored dense, as bitmask and as ticket,
against the entropy of the mask.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

import spikezoo
from spikezoo import sparse
from spikezoo.checkpoint import write_checkpoint
from spikezoo.deploy import has_compiler
from spikezoo.evaluation import check_results_file, environment, write_rows
from spikezoo.layers import ConvNormNeuron, LinearNormNeuron, Pool, ResidualBlock
from spikezoo.models._base import SpikingModel
from spikezoo.neurons import LIF, SURROGATES, NeuronConfig

Row = dict[str, Any]
MODES = ("train", "infer", "size")
# Fractions removed, as the ticket papers count them.
SPARSITIES = (0.4, 0.8, 0.9, 0.95)
Step = Callable[[], None]


@dataclass(frozen=True)
class Settings:
    """What to measure; None takes the model's own value.

    Attributes:
        model: Name of the model.
        mode: train (forward, cross entropy, backward, SGD), infer (forward in evaluation mode) or size (of files).
        against: The baseline, a key of ``BASELINES``.
        T: Time steps.
        batch_size: Images a step.
        img_size: Height and width of the images.
        num_classes: Classes of the head.
        amp: Autocast to bfloat16.
        channels_last: Channels-last weights and images.
        torchcompile: Compile the model.
        device: cpu or cuda.
        repeats: Timed steps a side.
        warmup: Untimed steps a side after the first one.
        threads: Threads of torch; None leaves them alone.
    """

    model: str
    mode: str = "train"
    against: str = "spikingjelly"
    T: int | None = None
    batch_size: int = 128
    img_size: int | None = None
    num_classes: int | None = None
    amp: bool = False
    channels_last: bool = False
    torchcompile: bool = False
    device: str = "cpu"
    repeats: int = 7
    warmup: int = 2
    threads: int | None = None

    def __post_init__(self) -> None:
        spikezoo.model_info(self.model)  # an unknown name raises and suggests the nearest one
        for name, value, choices in (("mode", self.mode, MODES), ("against", self.against, BASELINES)):
            if value not in choices:
                raise ValueError(f"{name}={value!r} does not exist: choose from {', '.join(choices)}.")
        for name in ("T", "batch_size", "img_size", "num_classes", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected an integer >= 1.")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: expected an integer >= 0.")
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(
                f"device={self.device!r} is not available: use device='cpu', or 'cuda' where torch sees it."
            )
        if self.torchcompile and not has_compiler():
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
    if type(source) is not LIF or source.folded is not None:
        raise ValueError(f"{type(source).__name__} has no counterpart in the SpikingJelly baseline, only LIF has.")
    config = source.config
    if config.tau is None and not 0 < config.decay < 1:
        raise ValueError(f"decay={config.decay} has no counterpart in SpikingJelly: expected a number in (0, 1).")
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
        raise ValueError(f"mpbn={source.norm.mode!r} has no counterpart in SpikingJelly: only 'channel' has.")
    twin = neuron.MPBNLIFNode(**arguments, **{"out_features" if flat else "out_channels": source.norm.channels})
    twin.vbn.load_state_dict(source.norm.state_dict(), strict=False)  # ours does not count batches
    return twin


@singledispatch
def in_spikingjelly(source: nn.Module) -> nn.Module:
    """Build the SpikingJelly counterpart of one of our modules, with the same weights.

    Raises:
        ValueError: A module that has none.
    """
    raise ValueError(f"{type(source).__name__} has no counterpart in the SpikingJelly baseline.")


@in_spikingjelly.register
def _(source: nn.MaxPool2d) -> nn.Module:
    return layer.MaxPool2d(source.kernel_size, source.stride, source.padding)


@in_spikingjelly.register
def _(source: nn.AvgPool2d) -> nn.Module:
    return layer.AvgPool2d(
        source.kernel_size, source.stride, source.padding, source.ceil_mode, source.count_include_pad
    )


@in_spikingjelly.register
def _(source: Pool) -> nn.Module:
    return in_spikingjelly(source.pool)


@in_spikingjelly.register
def _(source: ConvNormNeuron) -> nn.Module:
    conv, norm = source.conv, source.norm
    twin = layer.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None
    )
    layers = [_same_weights(twin, conv)]
    if source.pool is not None:
        layers.append(in_spikingjelly(source.pool))
    if isinstance(norm, nn.BatchNorm2d):
        layers.append(_same_weights(layer.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine), norm))
    if source.neuron is not None:
        layers.append(_neuron(source.neuron))
    return nn.Sequential(*layers)


@in_spikingjelly.register
def _(source: LinearNormNeuron) -> nn.Module:
    linear, norm = source.linear, source.norm
    layers: list[nn.Module] = [layer.AdaptiveAvgPool2d(1)] if source.average else []
    twin = layer.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    layers += [layer.Flatten(), _same_weights(twin, linear)]
    if norm is not None:
        layers.append(_same_weights(layer.BatchNorm1d(norm.num_features, norm.eps, norm.momentum, norm.affine), norm))
    return nn.Sequential(*layers, _neuron(source.neuron, flat=True), _OneByOne())


class _OneByOne(nn.Module):
    """Give vectors ``[T, B, F]`` the 1x1 map that the next layer flattens again; a view."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., None, None]


class _Residual(nn.Module):
    """Body plus shortcut, then the neuron."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, node: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.node = body, shortcut, node

    def forward(self, x: Tensor) -> Tensor:
        return self.node(self.body(x) + self.shortcut(x))


@in_spikingjelly.register
def _(source: ResidualBlock) -> nn.Module:
    body = nn.Sequential(in_spikingjelly(source.conv1), in_spikingjelly(source.conv2))
    shortcut = nn.Sequential(*(in_spikingjelly(m) for m in (source.pool, source.shortcut) if m is not None))
    return _Residual(body, shortcut, _neuron(source.neuron))


class SpikingJellyNet(nn.Module):
    """A model of ours in SpikingJelly's layers, multi-step: the image is repeated T times, logits are averaged.

    Args:
        model: The model to rebuild; its weights are copied.

    Raises:
        ValueError: A layer or neuron without a counterpart.
    """

    def __init__(self, model: SpikingModel) -> None:
        super().__init__()
        if model.head.global_pool.pool_type != "avg":
            raise ValueError("The SpikingJelly baseline needs global_pool='avg'.")
        self.T = model.T
        modules = [*model.stem, *(block for stage in model.stages for block in stage), *model.neck]
        self.features = nn.Sequential(*(in_spikingjelly(module) for module in modules))
        linear = model.head.fc
        fc = layer.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        self.head = nn.Sequential(layer.AdaptiveAvgPool2d(1), layer.Flatten(), _same_weights(fc, linear))
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to logits ``[B, num_classes]``."""
        functional.reset_net(self)
        x = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        return self.head(self.features(x)).mean(0)


# --------------------------------------------------------------------------------------------------------------
# Sides: something whose step can be timed
# --------------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One of the two things that are compared.

    Attributes:
        name: Whose side it is.
        form: Number format, memory format, eager or compiled.
        parameters: Trainable parameters.
        step: Runs one step.
        first_s: Seconds of the first step, with compilation.
        times: Seconds of the timed steps.
    """

    name: str
    form: str
    parameters: int
    step: Step
    first_s: float = 0.0
    times: list[float] = field(default_factory=list)


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

    return Side(name, form, sum(p.numel() for p in model.parameters() if p.requires_grad), step)


def spikezoo_side(model: SpikingModel, images: Tensor, labels: Tensor, settings: Settings) -> Side:
    """Our side: the model in the form that the settings ask for."""
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)
    run = torch.compile(model) if settings.torchcompile else model

    def forward() -> Tensor:
        with torch.autocast(settings.device, torch.bfloat16) if settings.amp else contextlib.nullcontext():
            return run(images)

    form = [
        "bf16 autocast" if settings.amp else "float32",
        "channels-last" if settings.channels_last else "NCHW",
        "compiled" if settings.torchcompile else "eager",
    ]
    return _side("spikezoo", ", ".join(form), model, forward, labels, settings.mode == "train")


def spikingjelly_side(model: SpikingModel, images: Tensor, labels: Tensor, settings: Settings) -> Side:
    """The baseline: SpikingJelly's layers, eager float32."""
    net = SpikingJellyNet(model).to(settings.device)
    return _side("spikingjelly", "float32, NCHW, eager", net, lambda: net(images), labels, settings.mode == "train")


BASELINES: dict[str, Callable[[SpikingModel, Tensor, Tensor, Settings], Side]] = {"spikingjelly": spikingjelly_side}


def make_sides(settings: Settings) -> tuple[Side, Side]:
    """Build our side and the baseline, from the same weights, for the same random images.

    Raises:
        RuntimeError: The two sides have different numbers of trainable parameters.
    """
    given = {"T": settings.T, "img_size": settings.img_size, "num_classes": settings.num_classes}
    torch.manual_seed(0)
    model = spikezoo.create_model(settings.model, device=settings.device, **given)
    assert isinstance(model, SpikingModel)
    images = torch.randn(settings.batch_size, model.in_chans, *model.img_size, device=settings.device)
    labels = torch.randint(model.num_classes, (settings.batch_size,), device=settings.device)
    baseline = BASELINES[settings.against](model, images, labels, settings)  # first: it copies the weights
    ours = spikezoo_side(model, images, labels, settings)
    if ours.parameters != baseline.parameters:
        raise RuntimeError(f"Not the same network: {ours.parameters:,} and {baseline.parameters:,} parameters.")
    return ours, baseline


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
    for side in sides:
        side.first_s = _timed(side.step, device)
    for turn in range(warmup + repeats):
        for side in sides:
            seconds = _timed(side.step, device)
            if turn >= warmup:
                side.times.append(seconds)


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


def make_rows(settings: Settings, sides: Sequence[Side]) -> list[Row]:
    """One row a side; the last side is the baseline, and speedup is its time over the row's."""
    model = spikezoo.create_model(
        settings.model, T=settings.T, img_size=settings.img_size, num_classes=settings.num_classes, device="meta"
    )
    assert isinstance(model, SpikingModel)
    facts, notes = environment(), " ".join(_notes(model))
    rows = []
    for side in sides:
        ratios = [slow / fast for slow, fast in zip(sides[-1].times, side.times, strict=True)]
        rows.append(
            {
                "model": settings.model,
                "mode": settings.mode,
                "side": side.name,
                "form": side.form,
                "T": model.T,
                "batch_size": settings.batch_size,
                "img_size": "x".join(map(str, model.img_size)),
                "num_classes": model.num_classes,
                "parameters": side.parameters,
                "images_per_s": round(settings.batch_size / median(side.times), 2),
                "step_ms": round(1e3 * median(side.times), 3),
                "step_ms_min": round(1e3 * min(side.times), 3),
                "step_ms_max": round(1e3 * max(side.times), 3),
                "first_step_s": round(side.first_s, 3),
                "speedup": round(median(ratios), 4),
                "speedup_min": round(min(ratios), 4),
                "speedup_max": round(max(ratios), 4),
                "against": settings.against,
                "device": settings.device,
                "repeats": settings.repeats,
                "warmup": settings.warmup,
                **facts,
                "notes": notes,
            }
        )
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table for people, with the facts that they share below it."""
    first = rows[0]
    lines = [
        f"{first['model']}, {first['mode']}, T={first['T']}, batch {first['batch_size']}, {first['img_size']} pixels, "
        f"{first['num_classes']} classes, {first['repeats']} repeats after {first['warmup']} warm-up steps",
        "",
        "| side | form | parameters | images/s | step ms: median (min-max) | first step s | speed-up (min-max) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        step = f"{row['step_ms']:.1f} ({row['step_ms_min']:.1f}-{row['step_ms_max']:.1f})"
        speedup = f"{row['speedup']:.2f} ({row['speedup_min']:.2f}-{row['speedup_max']:.2f})"
        cells = [row["side"], row["form"], f"{row['parameters']:,}", f"{row['images_per_s']:.1f}", step]
        lines.append("| " + " | ".join([*cells, f"{row['first_step_s']:.2f}", speedup]) + " |")
    yes = {True: "yes", False: "no"}
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "timm", "spikingjelly", "spikezoo-snn"))
    lines += [
        "",
        f"- {versions}, commit {first['commit']}, {first['date']}",
        f"- device {first['device']}; {first['machine']}, {first['threads']} threads, AMX {yes[first['amx']]}, "
        f"AVX512-bf16 {yes[first['avx512_bf16']]}",
    ]
    if first["notes"]:
        lines.append(f"- {first['notes']}")
    return "\n".join(lines)


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


def run(settings: Settings) -> list[Row]:
    """Measure once and return one row a side (spikezoo, then the baseline), or one row a code."""
    if settings.mode == "size":
        return size_rows(settings)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads or before)
    try:
        sides = make_sides(settings)
        measure(sides, settings.repeats, settings.warmup, settings.device)
        return make_rows(settings, sides)
    finally:
        torch.set_num_threads(before)


def make_parser() -> argparse.ArgumentParser:
    """The command line; a flag is a field of :class:`Settings` or an output file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="name of the model, see spikezoo.list_models()")
    add("--mode", choices=MODES, default="train", help="training step, forward pass or file sizes (default: train)")
    add("--against", choices=tuple(BASELINES), default="spikingjelly", help="the baseline (default: spikingjelly)")
    add("--T", type=int, metavar="N", help="time steps (default: the model's)")
    add("--batch-size", type=int, default=128, metavar="N", help="images a step (default: 128)")
    add("--img-size", type=int, metavar="N", help="height and width (default: the model's)")
    add("--num-classes", type=int, metavar="N", help="classes (default: the model's)")
    add("--amp", action="store_true", help="bfloat16 autocast, on spikezoo's side")
    add("--channels-last", action="store_true", help="channels-last memory format, on spikezoo's side")
    add("--torchcompile", action="store_true", help="torch.compile, on spikezoo's side")
    add("--device", default="cpu", metavar="NAME", help="cpu or cuda (default: cpu)")
    add("--repeats", type=int, default=7, metavar="N", help="timed steps a side (default: 7)")
    add("--warmup", type=int, default=2, metavar="N", help="untimed steps a side after the first (default: 2)")
    add("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    add("--results-file", metavar="FILE", help="write the rows to a .csv or .json file, replacing it")
    return parser


def main(argv: Iterable[str] | None = None) -> list[Row]:
    """Run the command line and return the rows."""
    parser = make_parser()
    arguments = vars(parser.parse_args(None if argv is None else list(argv)))
    results = arguments.pop("results_file")
    try:
        settings = Settings(**arguments)
        if results:
            check_results_file(results)
        rows = run(settings)
    except ValueError as error:
        parser.error(str(error))
    print(size_markdown(rows) if settings.mode == "size" else markdown(rows))
    if results:
        write_rows(results, rows)
    return rows


if __name__ == "__main__":
    main()
