"""Export of a trained model to a file that runs without this package: ONNX for every model, NIR for convolutional ones.

ONNX holds the whole network: images in, logits averaged over T out, the T steps unrolled.

NIR (Neuromorphic Intermediate Representation) holds one network of neurons with a differential equation, and whoever
runs it steps through time. Norms are folded and every neuron has its own threshold. The equation of ``nir.LIF``,
``tau dv/dt = v_leak - v + r I``, becomes by Euler's forward method with a step ``dt``

    u = v + dt / tau * (v_leak - v + r I)      z = u > v_threshold      v = v_reset where z, else u

which is our neuron with these parameters, and with v_leak = v_reset, the potential at rest, where it starts:

    neuron                                    nir.LIF
    u = v + (x - v) / tau_m    (tau form)     tau = tau_m dt           r = 1
    u = decay v + x            (decay form)   tau = dt / (1 - decay)   r = tau / dt
    u = v + (x - v) sigmoid(w) (plif)         tau = dt / sigmoid(w)    r = 1
    u = v + x                  (if, decay 1)  nir.IF with r = 1 / dt

NIR compares with '>'. A neuron that fires at '>=' gets the largest number of its type below its threshold. One that
fires below its threshold (polarity -1 of a folded MPBN) is one that fires above it after everything changed its sign:
a ``nir.Scale`` of -1 before it, and the negative of its threshold and potentials.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from spikezoo._version import __version__
from spikezoo.checkpoint import atomic, check_target
from spikezoo.graph import Node, trace
from spikezoo.models import SpikingModel
from spikezoo.neurons import IF, LIF, PLIF, Sign, SpikingNeuron
from spikezoo.saving import describe
from spikezoo.transforms import fold_bn, fold_mpbn
from spikezoo.transforms.tickets import tickets

__all__ = ["DT", "check_suffix", "export"]

SUFFIXES = (".onnx", ".nir")
# Seconds a time step: what SpikingJelly and snnTorch assume where a file does not say it.
DT = 1e-4
# Largest difference of a logit, relative to the largest of them where that is above 1. Logits that are nearer to each
# other than ROUNDING are equally large for the arg-max: those of tickets are often exactly equal.
TOLERANCE, ROUNDING = 1e-4, 1e-6
# Nearer to its threshold than this, a membrane potential of float32 may fire or not by the order of a sum: in trained
# nets the errors of convolutions are up to 4e-6.
NEAR = 1e-5


# What a coded network takes, as its file says.
_CODED = {
    (".onnx", "ttfs"): "images [B, C, H, W] with values in [0, 1]; the network codes them",
    (".onnx", "poisson"): "spikes [B, T, C, H, W], as spikezoo.encoding.poisson makes them of images in [0, 1]",
    (".nir", "ttfs"): "one time step of the spikes that spikezoo.encoding.ttfs makes of an image in [0, 1]",
    (".nir", "poisson"): "one time step of the spikes that spikezoo.encoding.poisson makes of an image in [0, 1]",
}


def check_suffix(path: str | Path) -> str:
    """The suffix of a file to export to, in lower case.

    Raises:
        ValueError: Neither .onnx nor .nir.
        OSError: It cannot be written there.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"Export to {str(path)!r}: expected a name that ends in {' or '.join(SUFFIXES)}.")
    check_target(path)
    return suffix


def _optional(*names: str) -> list[ModuleType]:
    """Import packages of the extra [export]."""
    try:
        return [__import__(name) for name in names]
    except ImportError as error:
        raise ValueError(f"Export needs {error.name}: pip install 'spikezoo-snn[export]'") from error


def _check_model(model: nn.Module) -> dict[str, Any]:
    """What rebuilds the model, or an error where it cannot be exported at all."""
    facts = describe(model)
    if model.training:
        raise ValueError("This model is in training mode, where its norms use the batch: export model.eval().")
    if unbaked := next(iter(tickets(model)), None):
        raise ValueError(f"Layer {unbaked!r} is a ticket, which learns scores: export spikezoo.bake(model).")
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ValueError(f"{name} is {value.dtype} and exported files hold float32: export model.float().")
    return facts


def export(model: SpikingModel, path: str | Path, example: Tensor | None = None, dynamic_batch: bool = True) -> Path:
    """Write a model as ONNX or NIR; the suffix says which.

    ONNX is checked in onnxruntime before the file takes its name: on the example its logits are the model's to 1e-4,
    with the same arg-max. Where on an image a membrane potential is so near to its threshold that the roundings of
    float32 decide, and on half of the images at least all is well, that is a warning. Its input is named 'input', its
    output 'logits'.

    NIR holds VGGs, ResNets and other nets of convolutions, linear layers and sums with spiking neurons, average pooling
    and hard reset. Membrane and batch norms are
    folded on the way. Nodes are named as the modules that they come from. The input is one time step, ``[C, H, W]``
    (of an image the same at every step); the output is the logits of one step, to be averaged over the steps. The
    metadata of the graph say so, with T, the time step dt in seconds and the convention of the reset.

    Images that are coded by the time of their spikes ('ttfs') are coded in the ONNX network. Poisson codes are random,
    so there the network takes the spikes, ``[B, T, C, H, W]`` of :func:`spikezoo.encoding.poisson`; and NIR always
    takes one time step of the spikes. The file says so under 'input'.

    Both carry as JSON, under 'spikezoo', what ``spikezoo.create_model`` makes the model of, the mean and standard
    deviation that images are normalised with, and how recordings became frames.

    Args:
        model: A model of :func:`spikezoo.create_model` in evaluation mode, tickets baked. It stays as it is.
        path: File to write: .onnx or .nir.
        example: Images ``[B, C, H, W]`` or event frames ``[B, T, C, H, W]``, float32; the exported network takes the
            same size, and of event frames the same T. ONNX is checked on them, so real images are the better check.
            None takes four images of noise, or recordings.
        dynamic_batch: Whether the ONNX network takes any batch size, or that of the example only. NIR has no batch.

    Returns:
        The path.

    Raises:
        ValueError: Another suffix, a model in training mode, tickets that are not baked, an example that the model
            does not take, a package of the extra [export] that is missing, what NIR cannot hold (max-pooling,
            attention, soft reset, neurons without time; the message names the layer), or an ONNX network that gives
            other logits.

    Warns:
        UserWarning: Of some images the ONNX network gives other logits by a rounding.

    Examples:
        >>> spikezoo.export(spikezoo.create_model('mpbn_resnet20').eval(), 'mpbn_resnet20.onnx')
    """
    suffix, path = check_suffix(path), Path(path)
    facts = _check_model(model)
    net = copy.deepcopy(model).cpu()
    if example is None:
        noise = torch.randn if net.encoding == "direct" else torch.rand
        example = noise(4, *net.input_shape, generator=torch.Generator().manual_seed(0))
    if not isinstance(example, Tensor) or example.dtype != torch.float32:
        given = example.dtype if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"example is {given}: expected a float32 tensor, normalised as in training.")
    example = example.detach().cpu()
    encoding = net.encoding
    if suffix == ".onnx" and encoding == "poisson":  # random: no operation of ONNX gives the same numbers
        net.check_input(example)
        example, _ = net.encode(example) if example.dim() == 4 else (example.transpose(0, 1), 0)
        example, net.encoding = example.transpose(0, 1), "direct"
    cfg = net.pretrained_cfg
    inputs = {"mean": list(cfg["mean"]), "std": list(cfg["std"]), **net.inputs}
    facts |= {**inputs, "spikezoo_version": __version__}
    if encoding != "direct":
        facts["input"] = _CODED[suffix, encoding]
    words = f"export: writing {path.name} and checking it, some seconds to a minute"
    with torch.no_grad(), tqdm(desc=words, bar_format="{desc}", disable=None, leave=False):
        logits = net(example)  # says what is wrong with the example
        with atomic(path) as temporary:
            if suffix == ".onnx":
                _write_onnx(net, temporary, example, logits, dynamic_batch, facts)
            else:
                _write_nir(net, temporary, example, facts)
    return path


# --------------------------------------------------------------------------------------------------------------
# ONNX
# --------------------------------------------------------------------------------------------------------------


def _write_onnx(
    model: nn.Module, path: Path, example: Tensor, logits: Tensor, dynamic_batch: bool, facts: dict[str, Any]
) -> None:
    """Trace, translate, write and check."""
    _, _, runtime = _optional("onnx", "onnxscript", "onnxruntime")
    # A batch of one would be traced as a constant.
    traced = example if len(example) > 1 or not dynamic_batch else torch.cat([example, example])
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    program = torch.onnx.export(
        model,
        (traced,),
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=shapes,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    # The exporter notes at every node where in which source file it comes from: most of a small file, and private.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.model.metadata_props["spikezoo"] = json.dumps(facts)
    program.save(str(path), external_data=False)

    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # Other batch sizes than the traced one.
    pieces = [1, len(example) - 1] if dynamic_batch and len(example) > 1 else [len(example)]
    runs = [session.run(None, {"input": piece.numpy()})[0] for piece in example.split(pieces)]
    found = torch.cat([torch.from_numpy(run) for run in runs])
    differ = _differ(found, logits)
    if differ.any():
        _judge(differ, found, logits, _margins(model, example), f"in onnxruntime {runtime.__version__}")


def _differ(found: Tensor, logits: Tensor) -> Tensor:
    """Of which images ``[B]`` an exported network gives other logits ``[B, ...]`` than the model."""
    scale = max(1.0, logits.abs().max().item())
    flat = logits.flatten(1)
    missed = flat.amax(1) - flat.gather(1, found.flatten(1).argmax(1, keepdim=True))[:, 0]
    return ~((found - logits).abs().flatten(1).amax(1) <= TOLERANCE * scale) | (missed > ROUNDING * scale)


def _margins(model: nn.Module, example: Tensor) -> Tensor:
    """Of each image ``[B]`` the smallest distance of a membrane potential to its threshold; changes the model."""
    least = torch.full((len(example),), torch.inf)

    def note(distance: Tensor) -> Tensor:
        least.copy_(torch.minimum(least, distance.abs().flatten(1).amin(1)))
        return distance

    def look(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        note(inputs[0].transpose(0, 1))  # of [T, B, ...]

    neurons: list[Any] = [module for module in model.modules() if isinstance(module, SpikingNeuron)]
    for neuron in neurons:
        neuron.distance = lambda u, own=neuron.distance: note(own(u))
    for module in model.modules():
        if isinstance(module, Sign):
            module.register_forward_pre_hook(look)
    model(example)
    return least


def _judge(differ: Tensor, found: Tensor, logits: Tensor, margins: Tensor, where: str) -> None:
    """Raise where other logits are a defect of the exported network, warn where they are roundings."""
    count, total = int(differ.sum()), len(differ)
    largest = (found - logits)[differ].abs().max()
    if 2 * count > total or not (margins[differ] <= NEAR).all():
        raise ValueError(
            f"The exported network gives other logits {where} on {count} of {total} images, by up to {largest:.3g}, "
            "and roundings do not explain that. Nothing was written. Please report it."
        )
    other = int((found.flatten(1).argmax(1) != logits.flatten(1).argmax(1))[differ].sum())
    warnings.warn(
        f"On {count} of {total} images a membrane potential is within {margins[differ].max():.1g} of its threshold, "
        f"where float32 decides by its roundings: the exported network gives other logits {where}, by up to "
        f"{largest:.3g}, and another arg-max on {other}. On all others it gives the same.",
        stacklevel=4,
    )


# --------------------------------------------------------------------------------------------------------------
# NIR
# --------------------------------------------------------------------------------------------------------------


Ints = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class _Signal:
    """What the sum of some nodes' outputs is: their names, and its shape without time and batch."""

    nodes: tuple[str, ...]
    shape: tuple[int, ...]


def _refuse(layer: str, reason: str) -> ValueError:
    return ValueError(f"Layer {layer!r}: {reason} Export to .onnx, which holds every model.")


class _NirGraph:
    """Nodes and edges of a network, added layer by layer.

    Args:
        nir: The package.
        shape: Of the input without time and batch.
    """

    def __init__(self, nir: ModuleType, shape: Iterable[int]) -> None:
        self.nir = nir
        self.nodes: dict[str, object] = {}
        self.edges: list[tuple[str, str]] = []
        shape = tuple(shape)
        self.input = self.add("input", nir.Input(input_type={"input": np.array(shape)}), _Signal((), shape), shape)

    def add(self, name: str, node: object, x: _Signal, shape: Iterable[int]) -> _Signal:
        """Add a node that takes ``x`` and puts out ``shape``."""
        self.nodes[name] = node
        self.edges += [(source, name) for source in x.nodes]
        return _Signal((name,), tuple(shape))

    def follow(self, node: Node, inputs: Sequence[_Signal]) -> _Signal:
        """Add what one node of a model's graph is."""
        x = inputs[0]
        if node.kind == "layer":
            return self.linear(node.name, node.module, x) if isinstance(node.module, nn.Linear) else self.conv(node, x)
        if node.kind == "pool":
            return self.pool(node.name, node.pooling, x)
        if node.kind == "neuron":
            return self.neuron(node.name, node.module, x)
        if node.kind in ("flatten", "average"):
            return self.flatten(node.owner, x, average=node.kind == "average")
        if node.kind == "join":  # what leads into one node is added there
            nodes = tuple(name for signal in inputs for name in signal.nodes)
            if len(set(nodes)) < len(nodes):
                raise _refuse(node.owner, "it adds a signal to itself, and NIR has one edge between two nodes.")
            return _Signal(nodes, x.shape)
        if node.kind == "scale":
            raise _refuse(node.name, "it scales every time step by a factor of its own, and NIR's do the same at each.")
        raise _refuse(node.owner, f"{node.what} has no counterpart in NIR.")

    def conv(self, node: Node, x: _Signal) -> _Signal:
        """A convolution, its norm folded."""
        conv = node.module
        if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise _refuse(node.name, f"{conv} has no counterpart in NIR, whose convolutions are 2-d and pad zeros.")
        bias = np.zeros(conv.out_channels, np.float32) if conv.bias is None else conv.bias.numpy()
        size = tuple(x.shape[1:])
        convolution = self.nir.Conv2d(
            size, conv.weight.numpy(), conv.stride, conv.padding, conv.dilation, conv.groups, bias
        )
        steps = zip(size, conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
        out = ((s + 2 * pad - apart * (kernel - 1) - 1) // stride + 1 for s, kernel, stride, pad, apart in steps)
        return self.add(node.name, convolution, x, (conv.out_channels, *out))

    def pool(self, name: str, pool: nn.Module, x: _Signal) -> _Signal:
        """Average pooling, where NIR's means the same."""
        if not isinstance(pool, nn.AvgPool2d):
            raise _refuse(
                name, "NIR has no max-pooling. Of VGGs and ResNets those with average pooling fit, such as mpbn_vgg16."
            )
        kernel, stride, padding = (np.broadcast_to(n, 2) for n in (pool.kernel_size, pool.stride, pool.padding))
        left = [(s + 2 * p - k) % step for s, p, k, step in zip(x.shape[1:], padding, kernel, stride, strict=True)]
        if pool.divisor_override or (padding.any() and not pool.count_include_pad) or (pool.ceil_mode and any(left)):
            raise _refuse(
                name,
                f"{pool} on a map of {x.shape[1]}x{x.shape[2]} leaves out places that its windows cover, and NIR's "
                "average counts them. An image size that the total stride divides avoids that.",
            )
        return self.average(name, x, kernel, stride, padding)

    def average(self, name: str, x: _Signal, kernel: Ints, stride: Ints, padding: Ints) -> _Signal:
        """A node of average pooling."""
        node = self.nir.AvgPool2d(*(np.array(n) for n in (kernel, stride, padding)))
        size = ((s + 2 * p - k) // n + 1 for s, p, k, n in zip(x.shape[1:], padding, kernel, stride, strict=True))
        return self.add(name, node, x, (x.shape[0], *map(int, size)))

    def flatten(self, name: str, x: _Signal, average: bool) -> _Signal:
        """A vector of a map, which may be averaged first."""
        if len(x.shape) == 1:
            return x
        if average:
            x = self.average(f"{name}.pool", x, x.shape[1:], x.shape[1:], (0, 0))
        node = self.nir.Flatten({"input": np.array(x.shape)}, 0, -1)
        return self.add(f"{name}.flatten", node, x, (int(np.prod(x.shape)),))

    def linear(self, name: str, linear: nn.Linear, x: _Signal) -> _Signal:
        """A linear layer, with or without bias."""
        if len(x.shape) > 1:
            raise _refuse(name, "it takes the channels of every place by themselves, and NIR's take vectors.")
        weight = linear.weight.numpy()
        node = self.nir.Linear(weight) if linear.bias is None else self.nir.Affine(weight, linear.bias.numpy())
        return self.add(name, node, x, (len(weight),))

    def neuron(self, name: str, neuron: nn.Module, x: _Signal) -> _Signal:
        """A neuron with its own threshold for every place of the map; see the file's docstring."""
        if not isinstance(neuron, SpikingNeuron) or type(neuron) not in (LIF, IF, PLIF):
            raise _refuse(name, f"NIR has no neuron such as {type(neuron).__name__}.")
        config, folded = neuron.config, neuron.folded
        if config.reset == "soft":
            raise _refuse(name, "neurons of NIR are reset to v_reset, and none subtracts its threshold (reset='soft').")
        if config.v_init:
            raise _refuse(name, f"neurons of NIR start at rest, and these at v_init={config.v_init} above it.")
        threshold, polarity = torch.tensor(config.threshold), torch.tensor(1.0)
        if folded is not None:
            places = (1,) * (len(x.shape) - folded.threshold.dim())
            threshold, polarity = (v.reshape(*v.shape, *places) for v in (folded.threshold, folded.polarity))
        threshold = threshold * polarity
        if config.firing == ">=":
            threshold = torch.nextafter(threshold, torch.tensor(-torch.inf))
        if neuron.mask is not None:  # a removed neuron never fires
            mask = neuron.mask.reshape(*neuron.mask.shape, *(1,) * (len(x.shape) - neuron.mask.dim()))
            threshold = torch.where(mask, threshold, torch.finfo(threshold.dtype).max)
        if (polarity < 0).any():
            x = self.add(f"{name}.polarity", self.nir.Scale(self._full(x, polarity)), x, x.shape)
        rest = config.v_reset * polarity
        tau: float | None
        if isinstance(neuron, PLIF):
            tau, r = DT / neuron.w.sigmoid().item(), 1.0
        elif isinstance(neuron, IF) or (config.tau is None and config.decay == 1):
            tau, r = None, 1 / DT
        elif config.tau is not None:
            tau, r = config.tau * DT, 1.0
        else:
            tau, r = DT / (1 - config.decay), 1 / (1 - config.decay)
        values: dict[str, float | Tensor] = {"r": r, "v_threshold": threshold, "v_reset": rest}
        kind = self.nir.IF if tau is None else self.nir.LIF
        if tau is not None:
            values |= {"tau": tau, "v_leak": rest}
        node = kind(**{key: self._full(x, value) for key, value in values.items()})
        return self.add(name, node, x, x.shape)

    def _full(self, x: _Signal, value: float | Tensor) -> np.ndarray:
        # In float64: rounded time constants would be other ones.
        return np.array(np.broadcast_to(np.asarray(value, np.float64), x.shape))


def _write_nir(model: SpikingModel, path: Path, example: Tensor, facts: dict[str, Any]) -> None:
    """Fold, add the layers in order and write."""
    (nir,) = _optional("nir")
    for node in trace(model).of("other"):
        if len(node.inputs) > 1 and node.module is None and any(word in node.name for word in ("mat", "mul", "bmm")):
            raise _refuse(node.owner, f"{node.what} multiplies signals by each other, and NIR has no node for that.")
    if any(isinstance(module, SpikingNeuron) and module.norm is not None for module in model.modules()):
        model = fold_mpbn(model)
    if any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules()):
        model = fold_bn(model)
    flow = trace(model)
    flow.check_called_once("NIR")
    graph = _NirGraph(nir, example.shape[-3:])
    signals = {flow.input: graph.input}
    for node in flow.nodes[1:]:
        if node.kind != "head" and node.name != "head.fc":
            signals[node] = graph.follow(node, [signals[source] for source in node.inputs])
    x = signals[flow.features]
    pooling = model.head.global_pool.pool_type
    if pooling == "max" and len(x.shape) > 1:
        raise _refuse("head.global_pool", "NIR has no max-pooling: create the model with global_pool='avg'.")
    if pooling:
        x = graph.flatten("head", x, average=True)
    if model.num_classes:
        x = graph.linear("head.fc", model.head.fc, x)
    graph.add("output", nir.Output(output_type={"output": np.array(x.shape)}), x, x.shape)
    metadata = {
        "T": example.shape[1] if example.dim() == 5 else model.T,
        "dt": DT,
        "update": "v + dt / tau * (v_leak - v + r * I), for IF v + dt * r * I; at first v is v_reset",
        "reset": "hard: v is v_reset after v > v_threshold",
        "input": facts.get("input", "one time step, the same at every step for an image"),
        "output": "logits of one time step, to be averaged over T",
        "spikezoo": json.dumps(facts),
    }
    nir.write(str(path), nir.NIRGraph(graph.nodes, graph.edges, metadata))
