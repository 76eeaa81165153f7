"""The data flow of a model: its layers, norms, poolings, neurons and joins, in the order in which they run.

Whoever rebuilds a network (compact, fold_bn, convert, deploy, NIR export) reads this graph and knows no block.

**A block tells its parts by its forward pass.** :func:`trace` runs the model once, in evaluation mode and on the meta
device (shapes without numbers), and notes which part took what from whom. A block in anybody's file therefore needs no
second description, which could be wrong. It is followed as far as its forward pass keeps to this:

- *Weights are in modules that are called*: convolutions, linear layers, batch norms and poolings of ``torch.nn``, the
  neurons that a factory makes, ``nn.Dropout`` and ``DropPath``, or the layers of ``spikezoo.layers``, which consist of
  these. Each is called once a pass. A subclass with a forward pass of its own is another operation.
- *Signals are joined by* ``+``, of two signals of one shape.
- *Time meets the batch in* ``over_time``; every reshape that leaves the channels an axis of their own is seen through,
  and so are changes of type and layout. Flattening a map into features and the mean over a map are known.
- *Anything else is an operation* (kind ``other``): a product of signals, a concatenation, channels that are split into
  heads, a functional convolution, a constant added. The model is counted, trained and run as ever. Who must know what
  an operation does refuses by its name and its block's: NIR and convert. Who need not leaves it as it is: compact keeps
  the channels that it sees, deploy the number format.
- *No branch on a tensor's values* and no number taken out of one (``.item()``): the run has none.

Kinds of nodes:

    input     the frames that ``encode`` makes
    layer     convolution or linear layer
    norm      batch norm
    pool      pooling; ``pooling`` is torch's module of it
    scale     factor of every time step (TEBN)
    neuron    spiking neuron, or its twin ReLU, Sign or QCFS
    join      sum of two signals
    flatten   a map becomes features, channel by channel
    average   mean over a map
    other     any other operation; ``op`` is its name
    head      pooling of the features; the classifier is a layer behind it
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spikezoo.layers import ConvNormNeuron, LinearNormNeuron, Pool, StepScale, TernaryConv2d, TernaryLinear
from spikezoo.neurons import QCFS, MembraneNorm, ReLU, Sign, SpikingNeuron

__all__ = ["Graph", "Node", "trace"]

# Known by their forward pass: a subclass that has its own computes something else.
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "layer": (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, TernaryConv2d, TernaryLinear),
    "norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "pool": (Pool, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d),
    "scale": (StepScale,),
    "neuron": (SpikingNeuron, ReLU, Sign, QCFS),
    "pass": (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, DropPath),
}
_ADD = {"add", "add_", "__add__", "__iadd__", "__radd__"}
_RESHAPE = {"flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze", "__getitem__", "view_as", "reshape_as"}
_SAME = {"contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16", "type", "type_as", "dropout"}
_SWAP = {"transpose", "swapaxes", "swapdims"}


@dataclass(eq=False)
class Node:
    """A part of a model, or an operation between parts.

    Attributes:
        name: Dotted name of the module; of an operation that of the module whose forward pass computes it, and the
            operation, 'stages.0.0.add'.
        kind: See the file's docstring.
        op: Type of the module, or name of the operation.
        owner: Name of the innermost module that it is computed in; of a part its own.
        module: The part of the model; None for operations.
        inputs: Nodes whose outputs it takes, in its order.
        shape: Of the output, without time and batch: ``(C, H, W)`` or ``(F,)``; where an operation's channels have no
            axis of their own, the whole shape.
        readers: Nodes that take its output.
    """

    name: str
    kind: str
    op: str
    owner: str
    module: Any
    inputs: tuple[Node, ...]
    shape: tuple[int, ...]
    readers: list[Node] = field(default_factory=list, repr=False)

    @property
    def pooling(self) -> nn.Module:
        """Torch's module of a pooling."""
        return self.module.pool if isinstance(self.module, Pool) else self.module

    @property
    def what(self) -> str:
        """The part or operation in words, for messages: 'a GELU', 'the matmul of an Attention'."""
        return f"a {self.op}" if self.module is not None else f"the {self.name.rpartition('.')[2]} of a {self.op}"


class Graph:
    """Nodes of a model in the order in which they ran; see :func:`trace`.

    Attributes:
        nodes: All of them, the input first; each stands behind its inputs.
        input: The frames.
        features: What the head takes.
    """

    def __init__(self, nodes: list[Node], features: Node) -> None:
        self.nodes, self.input, self.features = nodes, nodes[0], features
        for node in nodes:
            for source in dict.fromkeys(node.inputs):
                source.readers.append(node)

    def of(self, *kinds: str) -> list[Node]:
        """Nodes of some kinds."""
        return [node for node in self.nodes if node.kind in kinds]

    def obstacle(self, node: Node) -> Node:
        """Of the operations in one module the one to name where none is allowed: a product before what leads to it."""
        near = [other for other in self.of("other") if other.owner == node.owner]
        return next((other for other in near if len(other.inputs) > 1), node)

    def check_called_once(self, who: str) -> None:
        """Raise where a part runs twice, whose weights cannot be changed for one place alone."""
        seen: set[str] = set()
        for node in self.of("layer", "norm", "neuron"):
            if node.name in seen:
                raise ValueError(
                    f"Layer {node.name!r} runs twice in one pass, and {who} changes a layer for the one place where it "
                    "stands. Give each place a module of its own."
                )
            seen.add(node.name)


def _kind(module: nn.Module, parent: nn.Module | None) -> str | None:
    """Kind of a part; None for a module whose inside is followed."""
    for kind, types in _KINDS.items():
        if any(isinstance(module, known) and type(module).forward is known.forward for known in types):
            return kind
    # What was put into a layer is a part, whatever it is; so is all of torch that holds no modules.
    whole = isinstance(parent, ConvNormNeuron | LinearNormNeuron)
    torchs = type(module).__module__.startswith("torch.nn.") and not [*module.children()]
    return "other" if whole or (torchs and not isinstance(module, nn.Sequential)) else None


def _channel_axis(shape: Sequence[int], axis: int, after: Sequence[int]) -> tuple[int | None, bool]:
    """Where a reshape leaves the channels: their axis or None, and whether places are flattened into it."""
    lead, channels, places = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    for index, size in enumerate(after):
        if math.prod(after[:index]) == lead:
            if size == channels and math.prod(after[index + 1 :]) == places:
                return index, False
            if size == channels * places and math.prod(after[index + 1 :]) == 1:
                return index, True
    return None, False


class _Recorder(TorchFunctionMode):
    """Notes parts and operations while a model runs.

    Args:
        model: The model whose parts the nodes refer to.
        copied: The copy of it that will run.
    """

    def __init__(self, model: nn.Module, copied: nn.Module) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.types = {name: type(module).__name__ for name, module in model.named_modules()}
        self.parts = dict(model.named_modules())
        self.inside = 0  # how deep in a part
        self.path = [""]
        # Which node and which axis of channels a tensor is; the tensor is kept, or another would take its number.
        self.known: dict[int, tuple[Tensor, Node, int | None]] = {}
        for name, module in copied.named_modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            parent = copied.get_submodule(name.rpartition(".")[0]) if name else None
            kind = _kind(module, parent)
            module.register_forward_pre_hook(lambda _m, _x, n=name, k=kind: self.enter(n, k))
            module.register_forward_hook(lambda _m, x, out, n=name, k=kind: self.leave(n, k, x, out))

    def add(
        self,
        out: Tensor | Sequence[Tensor],
        axis: int | None,
        kind: str,
        name: str,
        op: str,
        owner: str,
        inputs: Sequence[Node],
    ) -> None:
        """Add a node that puts out a tensor, or some."""
        first = out if isinstance(out, Tensor) else out[0]
        shape = tuple(first.shape if axis is None else first.shape[axis:])
        self.nodes.append(Node(name, kind, op, owner, self.parts.get(name), tuple(inputs), shape))
        for tensor in (out,) if isinstance(out, Tensor) else out:
            self.known[id(tensor)] = (tensor, self.nodes[-1], axis)

    def signals(self, values: Iterable[object]) -> list[tuple[Tensor, Node, int | None]]:
        """The signals among some arguments."""
        flat: list[object] = []
        for value in values:
            flat += value if isinstance(value, list | tuple) else [value]
        return [self.known[id(value)] for value in flat if isinstance(value, Tensor) and id(value) in self.known]

    def enter(self, name: str, kind: str | None) -> None:
        """A module begins."""
        self.inside += kind is not None
        self.path.append(name)

    def leave(self, name: str, kind: str | None, arguments: Iterable[object], out: Tensor) -> None:
        """A module has ended."""
        self.path.pop()
        self.inside -= kind is not None
        found = self.signals(arguments)
        if kind is None or self.inside or not found:
            return
        tensor, node, axis = found[0]
        if kind == "pass":
            self.known[id(out)] = (out, node, axis)
            return
        # Where these modules have their channels, whatever came before.
        own = {"layer": out.dim() - 1 if isinstance(self.parts[name], nn.Linear) else 1, "norm": 1, "neuron": 2}
        wanted = own.get(kind, axis)
        inputs = [node for _, node, _ in found]
        if axis is not None and wanted != axis:
            self.add(tensor, None, "other", f"{name}.layout", self.types[name], name, inputs)
            inputs = [self.nodes[-1]]
        if kind == "other":
            wanted = axis if out.shape == tensor.shape else None
        self.add(out, wanted, kind, name, self.types[name], name, inputs)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """Run a function of torch and note what it did to signals."""
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, list | tuple) and not isinstance(out, torch.Size) else [out]
        if not self.inside and tensors and all(isinstance(tensor, Tensor) for tensor in tensors):
            found = self.signals([*args, *(kwargs or {}).values()])
            if found:
                self.operation(func.__name__, args, kwargs or {}, found, out)
        return out

    def operation(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        found: list[tuple[Tensor, Node, int | None]],
        out: Tensor | Sequence[Tensor],
    ) -> None:
        """Note one operation: a join, a reshape that is seen through, or another."""
        (tensor, node, axis), *others = found
        owner = self.path[-1]
        kind, after = "other", axis if isinstance(out, Tensor) and out.shape == tensor.shape else None
        if not others and isinstance(out, Tensor):
            # The same numbers; Python's sum begins with 0.
            if name in _SAME or (name in _ADD and any(isinstance(value, int) and value == 0 for value in args)):
                self.known[id(out)] = (out, node, axis)
                return
            if axis is not None:
                kind, after = _one_signal(name, args, kwargs, tensor, axis, out) or (kind, after)
            if kind == "same":
                self.known[id(out)] = (out, node, after)
                return
        elif name in _ADD and len(found) == len(args) == 2 and not kwargs:
            other, _, others_axis = others[0]
            # One frame of an image broadcasts over time.
            if axis is not None and axis == others_axis and tensor.shape[1:] == other.shape[1:]:
                kind, after = "join", axis
        inputs = [node, *(other for _, other, _ in others)]
        self.add(out, after, kind, f"{owner}.{name.strip('_')}" if owner else name, self.types[owner], owner, inputs)


def _one_signal(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, axis: int, out: Tensor
) -> tuple[str, int | None] | None:
    """Kind of a known operation on one signal, 'same' where it only lays it out anew, and the axis of the channels."""
    if name in _SWAP and len(args) == 3:
        first, second = (dim % x.dim() for dim in args[1:])
        return "same", {first: second, second: first}.get(axis, axis)
    if name in ("expand", "expand_as", "broadcast_to") and out.dim() == x.dim() and out.shape[1:] == x.shape[1:]:
        return "same", axis
    if name in _RESHAPE and out.numel() == x.numel():
        after, flat = _channel_axis(x.shape, axis, out.shape)
        return None if after is None else ("flatten" if flat else "same", after)
    if name == "mean":
        over = args[1] if len(args) > 1 else kwargs.get("dim", ())
        dims = sorted(dim % x.dim() for dim in ((over,) if isinstance(over, int) else over or ()))
        if dims and dims == [*range(axis + 1, x.dim())]:
            return "average", axis
    return None


# Forward passes of norms, which put out what they take, in other numbers.
_SHAPELESS = (nn.modules.batchnorm._BatchNorm.forward, MembraneNorm.forward)


def _without_numbers(model: nn.Module) -> Any:
    """A copy on the meta device in evaluation mode and of one type, made without copying the weights."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        meta = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(model, memo).eval().float()


def _one_step(forward: Callable[[Tensor], Tensor], x: Tensor, T: int | None = None) -> Tensor:
    """Shape of a neuron's spikes by its first step, which stands for all: steps are most of the work of following."""
    out = forward(x[:1])
    return out.expand(x.shape[0] if T is None else T, *out.shape[1:])


@torch.no_grad()
def trace(model: nn.Module, shape: Sequence[int] | None = None) -> Graph:
    """Follow the signals through a model.

    Args:
        model: A model of this library, with stem, stages and head; it stays as it is, in any mode, on any device.
        shape: Of one sample; None takes the model's ``input_shape``.

    Returns:
        Its graph, whose nodes refer to the model's own modules.

    Raises:
        ValueError: No such model, or a forward pass that needs the values of its tensors.

    Examples:
        >>> [node.name for node in trace(spikezoo.create_model('spiking_vgg9')).of('layer')]
    """
    head = getattr(model, "head", None)
    if not isinstance(head, ClassifierHead) or not hasattr(model, "forward_frames"):
        raise ValueError(
            f"The data flow of a {type(model).__name__} is unknown: give a model of spikezoo.create_model itself, "
            "without wrapper."
        )
    copied = _without_numbers(model)
    for module in copied.modules():
        if type(module).forward is SpikingNeuron.forward:
            module.forward = functools.partial(_one_step, module.forward)
        elif type(module).forward in _SHAPELESS:
            module.forward = torch.empty_like  # a third of the pass would go into the formulas of norms
    recorder = _Recorder(model, copied)
    x = torch.zeros(3, *(copied.input_shape if shape is None else shape), device="meta")
    try:
        frames, T = copied.encode(x)
        recorder.add(frames, 2, "input", "input", "Input", "", ())
        with torch.autocast("cpu", enabled=False), recorder:
            out = copied.forward_frames(frames, T)
    except Exception as error:
        raise ValueError(
            f"The forward pass of {type(model).__name__} cannot be followed without the values of its tensors, in "
            f"{recorder.path[-1] or 'the model itself'!r}: {error}"
        ) from error
    if id(out) not in recorder.known:
        raise ValueError(f"The features of {type(model).__name__} do not depend on its input by torch's operations.")
    _, features, axis = recorder.known[id(out)]
    if axis != 2:
        recorder.add(out, None, "other", "head.layout", "ClassifierHead", "head", (features,))
        features = recorder.nodes[-1]
    pooled = Node("head", "head", type(head).__name__, "head", head, (features,), tuple(out.shape[2:]))
    recorder.nodes.append(pooled)
    if isinstance(head.fc, nn.Linear):
        classes = Node(
            "head.fc", "layer", type(head.fc).__name__, "head.fc", head.fc, (pooled,), (head.fc.out_features,)
        )
        recorder.nodes.append(classes)
    return Graph(recorder.nodes, features)
