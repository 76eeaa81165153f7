"""The sides of a comparison: ours in all its forms, and what a user would do instead."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor

import spikezoo
from spikezoo.deploy import EightBit, has_compiler
from spikezoo.layers import set_ternary
from spikezoo.models._base import SpikingModel
from tools.benchmark.counterpart import counterpart, fused_counterpart, parameter_count
from tools.benchmark.models import make_model, random_images
from tools.benchmark.settings import NoCounterpartError, Row, Settings, Step

# Steps of each form of SpikingJelly's after the first; the shortest counts.
TRIALS = 3


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


def timed(step: Step, device: str) -> float:
    """Seconds of a step."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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

    return Side(name, form, parameter_count(model), step)


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
    return Side(name, ", ".join(form), parameter_count(model), lambda: fast(images), prepared_s, check=check)


def spikezoo_side(
    model: SpikingModel, images: Tensor, labels: Tensor, settings: Settings, name: str = "spikezoo"
) -> Side:
    """Our side: the model in the form that the settings ask for."""
    if settings.precision:
        return _deployed_side(name, model, images, settings)
    model = copy.deepcopy(model)  # training changes it
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
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
        # As an option of torch.compile it does nothing: the weights have become inputs of the graph by then. Networks
        # of one class share the limit of graphs; beyond it they would run eagerly without a word.
        with inductor.patch(freezing=frozen), dynamo.patch(recompile_limit=256):
            return run(*inputs)

    return call


def _best_form(model: SpikingModel, images: Tensor, labels: Tensor, settings: Settings, half: bool, last: bool) -> Side:
    """SpikingJelly's layers with all that a good user adds, in one number format and one memory format."""
    train, cpu = settings.mode == "train", settings.device == "cpu"
    net, notes = counterpart(model)
    parameters = parameter_count(net)
    form = ["bf16 autocast" if half else "float32", "channels-last" if last else "NCHW"]
    if not train:
        net = fused_counterpart(model)
        form.append("conv-bn fused")
    net = net.to(settings.device).train(train)
    if last:
        net, images = net.to(memory_format=torch.channels_last), _channels_last(images)
    run: Callable[[Tensor], Tensor] = net
    if has_compiler() or not cpu:
        # On CUDA its compiled channels-last nets are faster without a second choice of layouts, says its issue 753.
        options: dict[str, Any] = {} if cpu else {"layout_optimization": False}
        run = _compiled(net, cpu and not train, options)
    form.append(("compiled" if train or not cpu else "compiled with frozen weights") if run is not net else "eager")

    def forward() -> Tensor:
        # Not in the compiled network, which would be compiled anew whenever a potential is another tensor.
        functional.reset_net(net)
        with torch.autocast(settings.device, torch.bfloat16) if half else contextlib.nullcontext():
            return run(images)

    side = _side("spikingjelly-best", ", ".join(form), net, forward, labels, train)
    side.parameters, side.notes = parameters, notes
    return side


def spikingjelly_best_side(model: SpikingModel, images: Tensor, labels: Tensor, settings: Settings) -> Side:
    """The fastest of its forms on this machine: both number formats, in both memory formats."""
    best: Side | None = None
    for half, last in itertools.product((True, False), (True, False)):
        side = _best_form(model, images, labels, settings, half, last)
        side.first_s, *times = (timed(side.step, settings.device) for _ in range(1 + TRIALS))
        side.times = [min(times)]
        if best is None or side.times < best.times:
            best = side
    assert best is not None
    best.form += ", the fastest of 4 forms"
    best.first_s -= best.times.pop()  # that of the next first step
    return best


def ann_side(model: SpikingModel, images: Tensor, labels: Tensor, settings: Settings) -> Side:
    """The ReLU twin, T=1, in the form of our side; in bf16 where that is int8, since it has no spikes."""
    if settings.width is not None:
        raise NoCounterpartError("The ReLU twin has no spiking neurons, whose masks width needs: leave 'ann' out.")
    precision = "bf16" if settings.precision in ("int8", "bits") else settings.precision
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
    if settings.precision in ("int8", "bits"):
        deployed = spikezoo.deploy(model, "int8")
        eight = {name for name, m in deployed.model.named_modules() if isinstance(m, EightBit)}
    half = settings.precision == "bf16" or settings.amp
    last = settings.precision in ("bf16", "int8", "bits") or settings.channels_last
    layers, inputs = [], []
    # Deployed, the first layer and the head stay in float32.
    whole = {next(iter(shapes))} if settings.precision == "bf16" else set()
    for name, shape in shapes.items():
        spikes = (torch.rand(shape, device=settings.device) < 0.2).float()
        own = copy.deepcopy(found[name]).requires_grad_(False)
        layer: nn.Module = own
        if name in eight:
            layer, spikes = _Sums(own), spikes.to(torch.uint8)
        else:
            set_ternary(own, False)
            if half and not name.startswith("head.") and name not in whole:
                layer, spikes = layer.to(torch.bfloat16), spikes.to(torch.bfloat16)
        if last:
            layer = layer.to(memory_format=torch.channels_last)
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
