"""The baseline: the same network as a user of SpikingJelly would write it, with the same weights."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import spikformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

import spikezoo
from spikezoo.graph import Node, trace
from spikezoo.layers import ConvNormNeuron, Pool
from spikezoo.models._base import SpikingModel
from spikezoo.models.spikformer import Spikformer
from spikezoo.neurons import LIF, NeuronConfig, SpikingNeuron
from spikezoo.surrogate import SURROGATES
from tools.benchmark.models import SETTLED, random_images, settle
from tools.benchmark.settings import NoCounterpartError


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


def lif_node(source: nn.Module, flat: bool = False) -> nn.Module:
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
        return lif_node(node.module, flat=len(node.shape) == 1)
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
        modules = list(model.stem.children())[:-1]  # without the position encoding
        convs = [index for index, module in enumerate(modules) if isinstance(module, ConvNormNeuron)]
        pools = [isinstance(module, Pool) for index in convs for module in (*modules, None)[index + 1 : index + 2]]
        patch = {"0011": 4, "1111": 16}.get("".join(str(int(pool)) for pool in pools))
        blocks: list[Any] = [block for stage in model.stages for block in stage.children()]
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


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def notes_of(model: SpikingModel) -> list[str]:
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


def counterpart(model: SpikingModel) -> tuple[nn.Module, str]:
    """The same network from SpikingJelly's layers, and where it is not exactly the same.

    Raises:
        NoCounterpartError: SpikingJelly cannot say it.
        RuntimeError: It has another number of parameters than its layout explains.
    """
    net: nn.Module
    if not isinstance(model, Spikformer):
        net, absent, notes = SpikingJellyNet(model), 0, notes_of(model)
    else:
        net, notes = SpikingJellySpikformer(model), []
        biases = [m.conv.bias for m in model.modules() if isinstance(m, ConvNormNeuron) and m.conv.bias is not None]
        absent = sum(bias.numel() for bias in biases)
        notes.append(
            f"SpikingJelly's Spikformer leaves out the {absent:,} biases before norms, takes queries, keys and values "
            "from one convolution, and pools before the neuron."
        )
        settle(net, random_images(model, SETTLED))
    if parameter_count(model) != parameter_count(net) + absent:
        raise RuntimeError(f"Not the same network: {parameter_count(model):,} and {parameter_count(net):,} parameters.")
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
        model = spikezoo.fold_bn(model)
    net = SpikingJellyNet(model)
    for module in net.modules():
        if isinstance(module, neuron.MPBNLIFNode):
            module.re_parameterize_v_threshold()
    return net
