"""Compaction: channels that masks removed leave the weights, and a smaller ordinary model gives the same answer.

A neuron whose mask is False puts out nothing at any time step. Where that holds for a whole channel, the weights that
write it have no effect and those that read it meet zeros only: both go, with the channel's share of norms, thresholds
and masks. Nothing has to be folded into what stays, whatever biases the channel had.

    layers in a row       a channel goes where its neuron's mask is False at every place
    flatten into linear   with it go height x width columns of the linear layer, after averaging one
    residual stream       a channel goes where it is masked at every neuron that writes to the stream: at each join
                          and, up to the last shortcut with a convolution, in the layer that the stream comes from;
                          the first convolution of a block has channels of its own
    sums of spikes        (Spikformer, AutoST, SEW) what is added without a neuron behind it keeps its channels, and so
                          do attention heads and all that :mod:`spikezoo.graph` calls another operation: the layers
                          within a branch lose theirs, such as the hidden channels of the MLPs
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead
from torch import Tensor, nn

from spikezoo.checks import choice, nearest, whole
from spikezoo.graph import Node, trace
from spikezoo.neurons import Maskable
from spikezoo.transforms.fold import record_transform, refuse_tickets, refuse_where
from spikezoo.transforms.record import Model

__all__ = ["compact"]

# Attributes in which modules say how many channels they put out and take (a head: also how many it pools).
_OUT = ("out_channels", "out_features", "num_features", "channels")
_IN = ("in_channels", "in_features", "num_features")


class _Channels:
    """Channels that stay or go together: those of one layer, or of a residual stream.

    Args:
        width: How many.
        fixed: Whether all of them stay, whatever the masks say.
    """

    def __init__(self, width: int, fixed: bool = False) -> None:
        self.width, self.fixed = width, fixed
        self.neurons: dict[str, Maskable] = {}  # whatever is read has passed one of them
        self.writers: list[nn.Module] = []  # the first axis of all their tensors
        self.readers: list[nn.Module] = []  # the second axis of their weights, some columns a channel
        self.levels: list[dict[str, Any]] = []  # of feature_info

    def absorb(self, other: _Channels) -> None:
        """Join the channels that are added to these."""
        self.neurons |= other.neurons
        self.writers += other.writers
        self.readers += other.readers
        self.levels += other.levels
        self.fixed |= other.fixed

    def dead(self) -> Tensor:
        """Which channels cannot fire, ``[width]``."""
        masks = [neuron.mask for neuron in self.neurons.values() if neuron.mask is not None]
        if self.fixed or not masks or len(masks) < len(self.neurons):
            return torch.zeros(self.width, dtype=torch.bool)
        return torch.stack([_silent(mask) for mask in masks]).all(0)

    def keep(self, index: Tensor) -> None:
        """Reduce everything to the channels of an index, in place."""
        for writer in self.writers:
            for module in writer.modules():
                for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                    if tensor.dim():
                        _select(module, name, tensor, 0, index)
                _scale(module, _OUT, self.width, len(index))
        for neuron in self.neurons.values():
            neuron.shape = (len(index), *neuron.shape[1:])
        for reader in self.readers:
            if isinstance(reader, nn.modules.conv._ConvNd | nn.Linear):
                columns = reader.weight.shape[1] // self.width
                wide = (index.unsqueeze(1) * columns + torch.arange(columns, device=index.device)).flatten()
                _select(reader, "weight", reader.weight, 1, wide)
            _scale(reader, _IN, self.width, len(index))
        for level in self.levels:
            level["num_chs"] = len(index)
        self.width = len(index)


def _silent(mask: Tensor) -> Tensor:
    """Channels of a mask ``[C]`` or ``[C, H, W]`` that hold no neuron, ``[C]``."""
    return ~mask.flatten(1).any(1) if mask.dim() > 1 else ~mask


def _select(module: nn.Module, name: str, tensor: Tensor, axis: int, index: Tensor) -> None:
    chosen = tensor.detach().index_select(axis, index.to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        chosen = nn.Parameter(chosen, requires_grad=tensor.requires_grad)
    setattr(module, name, chosen)
    # The seed of a ticket's signs draws them for the whole layer; a checkpoint stores what is left bit by bit.
    module.__dict__.pop("sign_seeds", None)


def _scale(module: nn.Module, attributes: Sequence[str], old: int, new: int) -> None:
    for attribute in attributes:
        if hasattr(module, attribute):
            setattr(module, attribute, getattr(module, attribute) // old * new)


class _Walk:
    """Follows the channels through a model's graph.

    Args:
        model: A model of spikezoo, whose modules are referred to, not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found: list[_Channels] = []
        self.of: dict[Node, _Channels] = {}  # whose channels a node puts out
        # Nodes whose output is zero wherever a neuron of their channels is masked. A sum is not: what it adds may be.
        self.silenced: set[Node] = set()
        graph = trace(model)
        graph.check_called_once("compact")
        for node in graph.nodes:
            self.follow(node)
        self.features = self.of[graph.features]
        level = self.of[graph.input]
        for info in getattr(model, "feature_info", ()):
            inside = [node for node in graph.nodes if node.owner.startswith(info["module"] + ".")]
            level = self.of[inside[-1]] if inside else level
            level.levels.append(info)

    def follow(self, node: Node) -> None:
        """Note whose channels a node puts out."""
        sources = list(dict.fromkeys(self.of[source] for source in node.inputs))
        if node.kind == "layer" and getattr(node.module, "groups", 1) == 1:
            self.read(node, node.module)
            out = self.new(node)
            out.writers.append(node.module)
            return
        if node.kind == "head":
            self.read(node, node.module)
        joins = node.kind == "join" and len({source.width for source in sources}) == 1
        if not (joins or node.kind in ("norm", "scale", "pool", "neuron", "flatten", "average", "head")):
            for source in sources:  # who knows what it does to its channels
                source.fixed = True
            self.new(node).fixed = True
            return
        channels, *others = sources
        for other in others:
            channels = self.join(channels, other)
        self.of[node] = channels
        if node.kind in ("norm", "neuron"):
            channels.writers.append(node.module)
        if isinstance(node.module, Maskable):
            channels.neurons[node.name] = node.module
            self.silenced.add(node)
        elif node.kind not in ("norm", "neuron", "join") and node.inputs[0] in self.silenced:
            self.silenced.add(node)

    def new(self, node: Node) -> _Channels:
        """Channels of a node's own."""
        self.of[node] = _Channels(len(node.module.weight) if node.kind == "layer" else node.shape[0])
        self.found.append(self.of[node])
        return self.of[node]

    def read(self, node: Node, reader: nn.Module) -> None:
        """Let a module read the channels that a node takes."""
        channels = self.of[node.inputs[0]]
        channels.readers.append(reader)
        channels.fixed |= node.inputs[0] not in self.silenced

    def join(self, one: _Channels, other: _Channels) -> _Channels:
        """Make one of two groups of channels that are added."""
        first, second = sorted((one, other), key=self.found.index)
        first.absorb(second)
        self.found.remove(second)
        self.of = {node: first if channels is second else channels for node, channels in self.of.items()}
        return first

    def groups(self) -> dict[str, _Channels]:
        """Channels that may go, by the name of their first neuron."""
        return {next(iter(x.neurons)): x for x in self.found if x.neurons and not x.fixed}


def _neurons(model: nn.Module) -> dict[str, Maskable]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Maskable)}


def _read_masks(model: nn.Module, groups: Mapping[str, _Channels]) -> tuple[dict[str, int], dict[str, str]]:
    """What the masks leave: channels of the groups that lose some, and which masks are still needed.

    Raises:
        ValueError: Channels that cannot be taken out, or none that would be left.
    """
    widths: dict[str, int] = {}
    masks: dict[str, str] = {}
    free: set[str] = set()
    for name, group in groups.items():
        free |= group.neurons.keys()
        left = group.width - int(group.dead().sum())
        if left == 0:
            raise ValueError(
                f"Layer {name!r}: all of its {group.width} channels are pruned, and a layer without any is no layer. "
                "Prune less of it: keep one neuron at least."
            )
        if left < group.width:
            widths[name] = left
    for name, neuron in _neurons(model).items():
        if neuron.mask is None:
            continue
        if name not in free:
            refuse_where(
                _silent(neuron.mask),
                name,
                f"it is pruned and cannot be taken out: in {type(model).__name__} this layer feeds attention heads or "
                "a sum, which keep their size, as a depthwise convolution does. Leave the layer out of the pruning, or "
                "use the masked model as it is.",
            )
        if not neuron.mask.all():
            masks[name] = "channel" if neuron.mask.dim() == 1 else "unit"
    for name in widths:  # what is gone as a whole needs no mask
        kept = ~groups[name].dead()
        for member, neuron in groups[name].neurons.items():
            if neuron.mask is None or neuron.mask[kept].all():
                masks.pop(member, None)
    return widths, masks


def _check_sizes(
    model: nn.Module, groups: Mapping[str, _Channels], widths: Mapping[str, int], masks: Mapping[str, str]
) -> None:
    """Raise where widths and masks that were given do not fit the model."""
    for argument, given, valid in (("widths", widths, groups), ("masks", masks, _neurons(model))):
        for name in given:
            if name not in valid:
                raise ValueError(f"{argument}: {name!r} names no neurons that it could. {nearest(name, valid)}")
    for name, width in widths.items():
        whole(f"widths[{name!r}]", width, 1, groups[name].width)
    for name, per in masks.items():
        choice(f"masks[{name!r}]", per, ("unit", "channel"))


@torch.no_grad()
def compact(model: Model, widths: Mapping[str, int] | None = None, masks: Mapping[str, str] | None = None) -> Model:
    """Take out the channels that masks removed: weights, norms and the next layer's share of them.

    The logits are those of the masked model up to rounding: sums over fewer terms may round otherwise, as in
    :func:`fold_bn`. The result is an ordinary model, trained, folded, stored and compacted again like any other.
    Channels of which some places are masked keep their mask, cropped; masks that hide nothing any more are dropped. A
    channel of a residual stream that is masked at some joins and not at others stays, with its masks. Where nothing
    is pruned the result is a plain copy, so that a pipeline need not ask first. With num_classes=0 the features are
    those of the channels that are left.

    Args:
        model: A model of spikezoo, its neurons with masks. It stays as it is.
        widths: What a recipe holds, to build the same structure before its weights are loaded: channels left, by the
            name of their neuron; of a residual stream, its first. Pruned channels go first, then the last ones. None
            reads the masks.
        masks: Likewise, which masks are still needed: 'unit' ``[C, H, W]`` or 'channel' ``[C]``, by the name of the
            neuron.

    Returns:
        A smaller copy with ``('compact', {'widths': ..., 'masks': ...})`` appended to its ``recipe``, in the mode of
        the model.

    Raises:
        ValueError: A layer that would have no channel left, pruned channels that feed attention or its residual
            stream (the message names the layer), tickets that are not baked, or widths that do not fit.

    Examples:
        >>> smaller = spikezoo.compact(pruned)
    """
    if not isinstance(getattr(model, "head", None), ClassifierHead) or not hasattr(model, "feature_info"):
        raise ValueError(
            f"compact follows the channels of a model of spikezoo.create_model, and got {type(model).__name__}: give "
            "that model itself, without wrapper."
        )
    if masks is not None and widths is None:
        raise ValueError("masks were given without widths: both are what a recipe holds. Leave both out.")
    refuse_tickets(model)
    copied = copy.deepcopy(model)
    walk = _Walk(copied)
    groups = walk.groups()
    if widths is None:
        widths, masks = _read_masks(copied, groups)
    masks = masks or {}
    _check_sizes(copied, groups, widths, masks)
    features = walk.features.width
    for name, width in widths.items():
        # A stable sort of False before True: living channels, then pruned ones, each in their order.
        order = groups[name].dead().int().argsort(stable=True)
        groups[name].keep(order[:width].sort().values)
    _scale(copied, ("num_features", "head_hidden_size"), features, walk.features.width)
    device = next(copied.parameters()).device
    for name, neuron in _neurons(copied).items():
        if name not in masks:
            neuron.mask = None
            continue
        shape = neuron.shape[:1] if masks[name] == "channel" else neuron.shape
        if neuron.mask is None or neuron.mask.dim() != len(shape):
            neuron.mask = torch.ones(shape, dtype=torch.bool, device=device)
    return record_transform(copied, "compact", widths=dict(widths), masks=dict(masks)).train(model.training)
