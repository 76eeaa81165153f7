"""Spikformer: a convolutional stem, blocks of spiking self-attention and MLP, and a linear head.

Paper: "Spikformer: When Spiking Neural Network Meets Transformer" (arXiv:2209.15425). Tokens stay the map that they
come from, ``[T, B, D, h, w]``: a linear layer over tokens is a 1x1 convolution with the same weights and the same norm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from spikezoo.checks import choice, number, switch, whole
from spikezoo.layers import ConvNormNeuron, Pool, Stem, conv_out
from spikezoo.models._base import SpikingModel, drop_path_rates, truncated_normal
from spikezoo.neurons import NeuronFactory
from spikezoo.registry import ModelRow, register_rows

__all__ = ["Spikformer", "attend", "checkpoint_filter_fn"]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention product without softmax, ``Q K^T V``, in the cheaper of its two orders.

    Of n tokens with c channels a head, the tokens' order costs ``n * n * c`` twice, the channels' order ``n * c * c``
    twice. Spikes are 0 or 1, so every sum is a whole number of at most n * c, exact in float32 whatever the order; the
    half precisions hold no whole number above 256 (bfloat16) or 2048 (float16) for sure. The product is therefore
    computed in float32, under autocast too.

    Args:
        q: Queries, channels first: ``[..., c, n]``.
        k: Keys, as the queries.
        v: Values, as the queries.

    Returns:
        ``[..., c, n]``, float32, or float64 for float64 input.
    """
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # the meta device has none
        with torch.autocast(device, enabled=False):
            return _attend(q, k, v)
    return _attend(q, k, v)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    channels, tokens = q.shape[-2:]
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    if channels < tokens:
        return (v @ k.transpose(-2, -1)) @ q
    return v @ (k.transpose(-2, -1) @ q)


class SpikingSelfAttention(nn.Module):
    """Spiking self-attention (SSA): spikes as queries, keys and values, no softmax.

    Args:
        dim: Channels.
        heads: Attention heads.
        size: Height and width of the map.
        qkv_bias: Whether queries, keys and values have a bias.
        scale: Factor of the product.
        membrane: A neuron before the attention and none after it, instead of one after it only.
        neuron: Factory of the neurons.
        attention_neuron: Factory of the neuron behind the product.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        size: Sequence[int],
        *,
        qkv_bias: bool,
        scale: float,
        membrane: bool,
        neuron: NeuronFactory,
        attention_neuron: NeuronFactory,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.neuron_in = neuron(dim, size) if membrane else None
        self.q = ConvNormNeuron(dim, dim, size, kernel=1, bias=qkv_bias, neuron=neuron, dd=dd)
        self.k = ConvNormNeuron(dim, dim, size, kernel=1, bias=qkv_bias, neuron=neuron, dd=dd)
        self.v = ConvNormNeuron(dim, dim, size, kernel=1, bias=qkv_bias, neuron=neuron, dd=dd)
        self.neuron = attention_neuron(dim, size)
        self.proj = ConvNormNeuron(dim, dim, size, kernel=1, bias=True, neuron=None if membrane else neuron, dd=dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, D, h, w]`` to ``[T, B, D, h, w]``."""
        if self.neuron_in is not None:
            x = self.neuron_in(x)
        size = x.shape[3:]
        q, k, v = (
            layer(x).flatten(3).unflatten(2, (self.heads, -1))  # [T, B, heads, c, n]
            for layer in (self.q, self.k, self.v)
        )
        current = (attend(q, k, v) * self.scale).flatten(2, 3).unflatten(3, size)
        return self.proj(self.neuron(current).to(q.dtype))


class SpikingMLP(nn.Module):
    """Two linear layers over every token, each with norm and neuron.

    Args:
        dim: Channels.
        hidden: Channels between the two layers.
        size: Height and width of the map.
        membrane: A neuron before the first layer and none after the second.
        neuron: Factory of the neurons.
    """

    def __init__(
        self, dim: int, hidden: int, size: Sequence[int], *, membrane: bool, neuron: NeuronFactory, dd: dict[str, Any]
    ) -> None:
        super().__init__()
        self.neuron_in = neuron(dim, size) if membrane else None
        self.fc1 = ConvNormNeuron(dim, hidden, size, kernel=1, bias=True, neuron=neuron, dd=dd)
        self.fc2 = ConvNormNeuron(hidden, dim, size, kernel=1, bias=True, neuron=None if membrane else neuron, dd=dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, D, h, w]`` to ``[T, B, D, h, w]``."""
        if self.neuron_in is not None:
            x = self.neuron_in(x)
        return self.fc2(self.fc1(x))


class SpikformerBlock(nn.Module):
    """Attention and MLP, each added to its input.

    Args:
        attn: The attention.
        mlp: The MLP.
        drop_path: Probability of leaving a branch out, a sample at a time and for all time steps together.
    """

    def __init__(self, attn: nn.Module, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp
        self.drop_path = DropPath(drop_path) if drop_path else None

    def _drop(self, x: Tensor) -> Tensor:
        # DropPath decides for every entry of the first axis: that has to be the batch.
        return x if self.drop_path is None else self.drop_path(x.transpose(0, 1)).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, D, h, w]`` to ``[T, B, D, h, w]``: whole numbers where the branches put out spikes."""
        x = x + self._drop(self.attn(x))
        return x + self._drop(self.mlp(x))


class PositionEncoding(nn.Module):
    """Relative position encoding (RPE): a convolution layer added to its input.

    Args:
        conv: The layer; keeps the shape.
        neuron: A neuron before it, where its input is current.
    """

    def __init__(self, conv: ConvNormNeuron, neuron: nn.Module | None = None) -> None:
        super().__init__()
        self.neuron, self.conv = neuron, conv

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, D, h, w]`` to ``[T, B, D, h, w]``; of spikes it makes 0, 1 and 2."""
        return x + self.conv(x if self.neuron is None else self.neuron(x))


def _per_layer(name: str, value: Any, depth: int) -> list[Any]:
    """One value a block, from one for all or a list of them."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * depth
    if len(value) != depth:
        one, other = (value[0], f", or depth={len(value)}") if len(value) else (4, "")
        raise ValueError(
            f"depth={depth} with {name}={list(value)!r}, which has {len(value)} entries: give one a block, or one "
            f"number for all blocks ({name}={one!r}){other}."
        )
    return list(value)


class Spikformer(SpikingModel):
    """Spiking patch splitting (four convolutions), position encoding, transformer blocks and the classifier.

    Args:
        dim: Channels of the tokens.
        depth: Number of blocks.
        heads: Attention heads; one number, or one a block.
        mlp_ratios: Hidden channels of the MLPs over ``dim``; one number, or one a block.
        pools: Which of the four convolutions of the stem are followed by max-pooling of stride 2.
        qkv_bias: Whether queries, keys and values have a bias.
        scale: Factor of the attention product, or 'head_dim' for ``(dim / heads) ** -0.5``.
        attention_threshold: Firing threshold of the neuron behind the attention product.
        drop_path_rate: Stochastic depth: probability of leaving out a branch of the last block, falling linearly to 0
            at the first block's; for all time steps of a sample together.
        residual: spike (every branch ends in a neuron, the stream holds whole numbers) or membrane (every branch
            begins with a neuron, the stream holds membrane potentials; the fourth convolution and the position
            encoding have no neuron).
        **kwargs: Arguments of :class:`SpikingModel`.

    Raises:
        ValueError: ``dim`` is no multiple of 8 or of ``heads``, lists of another length than ``depth``, or an image
            that the total stride does not divide.
    """

    has_patches = True  # the stem is a patch embedding
    residuals: tuple[str, ...] = ("spike", "membrane")
    fourth_fires = False  # whether the fourth convolution has a neuron where the residuals are potentials, too

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int | Sequence[int],
        mlp_ratios: float | Sequence[float] = 4,
        pools: Sequence[bool] = (False, False, True, True),
        qkv_bias: bool = True,
        scale: float | str = 0.125,
        attention_threshold: float = 0.5,
        drop_path_rate: float = 0.0,
        residual: str = "spike",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        dd, neurons = self.dd, self.neuron_factory
        whole("dim", dim)
        whole("depth", depth)
        if dim % 8:
            near = " or ".join(str(8 * eighth) for eighth in (dim // 8, dim // 8 + 1) if eighth)
            raise ValueError(
                f"dim={dim}: the first convolution has dim / 8 channels, so dim must be a multiple of 8, for instance "
                f"{near}."
            )
        all_heads, ratios = _per_layer("heads", heads, depth), _per_layer("mlp_ratios", mlp_ratios, depth)
        for count in all_heads:
            if dim % whole("heads", count):
                divisors = [h for h in range(1, dim + 1) if dim % h == 0]
                close = sorted(sorted(divisors, key=lambda h: abs(h - count))[:3])
                step = math.lcm(8, count)
                raise ValueError(
                    f"dim={dim} is not divisible by heads={count}: take heads={' or '.join(map(str, close))}, or "
                    f"dim={-(-dim // step) * step}."
                )
        if not isinstance(pools, list | tuple) or len(pools) != 4 or {*map(type, pools)} - {bool}:
            raise ValueError(f"pools={pools!r}: expected four of True or False, one for each convolution of the stem.")
        if scale != "head_dim":
            wanted = "a positive number, or 'head_dim' for one over the root of a head's channels"
            number("scale", scale, 0, bounds="()", expected=wanted)
        switch("qkv_bias", qkv_bias)
        choice("residual", residual, self.residuals)
        number("drop_path_rate", drop_path_rate, 0, 1)
        membrane = residual == "membrane"
        self.min_img_size = 2 ** sum(pools)
        self.check_size(self.img_size)

        size, channels = tuple(self.img_size), self.in_chans
        layers: list[nn.Module] = []
        for index, pool in enumerate(pools):
            width, silent = dim >> (3 - index), membrane and index == 3 and not self.fourth_fires
            conv = ConvNormNeuron(channels, width, size, neuron=None if silent else neurons, dd=dd)
            layers.append(conv)
            channels = width
            if pool:
                layers.append(Pool(nn.MaxPool2d(3, 2, 1)))
                size = conv_out(size, 3, 2, 1)
        self.add_stem(Stem(*layers, self._make_encoding(dim, size, membrane)), dim, self.min_img_size)

        threshold = number("attention_threshold", attention_threshold, 0, bounds="()")
        behind_product = NeuronFactory(
            dataclasses.replace(self.neuron_config, threshold=threshold), neurons.mpbn, neurons.drop, **dd
        )
        rates = drop_path_rates(drop_path_rate, depth)
        for count, ratio, rate in zip(all_heads, ratios, rates, strict=True):
            factor = (dim // count) ** -0.5 if scale == "head_dim" else float(scale)
            attn = self._make_attention(
                dim, count, size, qkv_bias=qkv_bias, scale=factor, membrane=membrane, attention_neuron=behind_product
            )
            hidden = int(dim * number("mlp_ratios", ratio, 0, bounds="()"))
            if hidden == 0:
                raise ValueError(f"mlp_ratios={ratio!r}: dim={dim} times that is no hidden channel; 4 is common.")
            mlp = SpikingMLP(dim, hidden, size, membrane=membrane, neuron=neurons, dd=dd)
            self.add_stage([SpikformerBlock(attn, mlp, rate)], dim, self.min_img_size)
        self._make_neck(dim)
        self.finish(dim)
        self._init_weights()

    # Other families put these parts together otherwise.

    def _make_encoding(self, dim: int, size: Sequence[int], membrane: bool) -> nn.Module:
        """The fifth convolution, on the map of the tokens."""
        neuron = None if membrane else self.neuron_factory
        return PositionEncoding(ConvNormNeuron(dim, dim, size, neuron=neuron, dd=self.dd))

    def _make_attention(
        self,
        dim: int,
        heads: int,
        size: Sequence[int],
        *,
        qkv_bias: bool,
        scale: float,
        membrane: bool,
        attention_neuron: NeuronFactory,
    ) -> nn.Module:
        """The attention of a block; the arguments are those of :class:`SpikingSelfAttention`."""
        return SpikingSelfAttention(
            dim,
            heads,
            size,
            qkv_bias=qkv_bias,
            scale=scale,
            membrane=membrane,
            neuron=self.neuron_factory,
            attention_neuron=attention_neuron,
            dd=self.dd,
        )

    def _make_neck(self, dim: int) -> None:
        """What stands between the last block and the head: nothing."""

    @property
    def compile_options(self) -> dict[str, Any]:
        """None: the compiler's own bounds are as good here, or a little better."""
        return {}

    def _init_weights(self) -> None:
        # The authors' initialisation of linear layers; 3x3 convolutions keep torch's.
        for module in self.modules():
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
                truncated_normal(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def check_size(self, size: Sequence[int]) -> None:
        """Raise ValueError where the patches do not fit into height and width."""
        stride = self.min_img_size
        if any(pixels % stride for pixels in size):
            near = tuple(max(round(pixels / stride), 1) * stride for pixels in size)
            raise ValueError(
                f"Image of {size[0]}x{size[1]} pixels is not divisible by the patch, {stride}x{stride}: resize or pad "
                f"it, for instance to {near[0]}x{near[1]}, and create the model with img_size="
                f"{near[0] if near[0] == near[1] else near}."
            )


# --------------------------------------------------------------------------------------------------------------
# Checkpoints of the official code
# --------------------------------------------------------------------------------------------------------------


def _renamed(name: str, stem: Sequence[str]) -> str | None:
    """Our name of an entry of an official state dict; None for one that the official forward pass never uses."""
    part, _, rest = name.partition(".")
    if part == "head":
        return f"head.fc.{rest}"
    if part == "patch_embed":
        layer, _, leaf = rest.partition(".")
        stage, _, kind = layer.partition("_")  # proj_conv2, rpe_bn
        module = "norm" if kind.startswith("bn") else "conv"
        prefix = f"{stem[-1]}.conv" if stage == "rpe" else stem[int(kind[-1]) if kind[-1].isdigit() else 0]
        return f"{prefix}.{module}.{leaf}"
    if part == "block":
        index, branch, *layers, leaf = rest.split(".")
        if branch not in ("attn", "mlp"):
            return None  # norm1, norm2
        layer, _, kind = layers[0].partition("_")  # q_linear, fc1_conv, proj_bn
        return f"stages.{index}.0.{branch}.{layer}.{'norm' if kind == 'bn' else 'conv'}.{leaf}"
    return None  # pos_embed, norm


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Rename a state dict of the official Spikformer code (CIFAR, ImageNet or CIFAR10-DVS) to this model's names.

    Layers that the official forward pass never uses (norm1, norm2, norm, pos_embed) are left out. A state dict in our
    own names is returned as it is.

    Args:
        state_dict: Names to tensors; may lie under 'state_dict' or 'model', with or without 'module.' before each name.
        model: The model that it is for.

    Examples:
        >>> spikezoo.create_model('spikformer_in_8_512', checkpoint_path='checkpoint-305.pth.tar')  # calls it
        >>> timm.models.load_checkpoint(model, 'checkpoint-305.pth.tar', filter_fn=checkpoint_filter_fn)
    """
    for key in ("state_dict", "model"):
        state_dict = state_dict.get(key, state_dict)
    state = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if not any(name.startswith(("patch_embed.", "block.")) for name in state):
        return state
    layers = model.get_submodule("stem").named_children()
    stem = [f"stem.{name}" for name, layer in layers if isinstance(layer, ConvNormNeuron | PositionEncoding)]
    out: dict[str, Any] = {}
    for name, value in state.items():
        new = _renamed(name, stem)
        if new is None:
            continue
        # A linear layer or 1-d convolution over tokens is a 1x1 convolution over their map.
        matrix = new.endswith(".conv.weight") and value.dim() < 4
        out[new] = value.reshape(*value.shape[:2], 1, 1) if matrix else value
    return out


# --------------------------------------------------------------------------------------------------------------
# Named models
# --------------------------------------------------------------------------------------------------------------

SPIKFORMER = "Spikformer: When Spiking Neural Network Meets Transformer (arXiv:2209.15425)"
MULTISP = "Gaining the Sparse Rewards by Exploring Lottery Tickets in Spiking Neural Networks (arXiv:2309.13302)"
SPIKFORMER_NEURON = {"tau": 2.0, "detach_reset": True}

# Four pooling stages, no bias of queries, keys and values.
FOUR_POOLS: dict[str, Any] = {"pools": (True, True, True, True), "qkv_bias": False}
IMAGENET_INPUT: dict[str, Any] = {"num_classes": 1000, "img_size": 224, "pool_size": (14, 14)}
EVENT_INPUT: dict[str, Any] = {"img_size": 128, "in_chans": 2, "pool_size": (8, 8)}
EVENT_ARGUMENTS: dict[str, Any] = {**FOUR_POOLS, "scale": 0.25, "T": 16}


def _row(
    dim: int,
    depth: int,
    heads: int | Sequence[int],
    parameters: int,
    note: str = "",
    paper: str = SPIKFORMER,
    **arguments: object,
) -> ModelRow:
    note = note or f"Spikformer-{depth}-{dim} for 32x32 images, {heads} heads of 32 channels."
    arguments = {"dim": dim, "depth": depth, "heads": heads, "neuron_defaults": SPIKFORMER_NEURON, **arguments}
    return ModelRow(arguments, parameters=parameters, paper=paper, note=note, pool_size=(8, 8))


def _imagenet_row(dim: int, depth: int, parameters: int) -> ModelRow:
    heads = dim // 64
    note = f"Spikformer-{depth}-{dim} for ImageNet, {heads} heads of 64 channels."
    return dataclasses.replace(_row(dim, depth, heads, parameters, note, **FOUR_POOLS), **IMAGENET_INPUT)


DVS_NOTE = "Spikformer-2-256 for event frames of CIFAR10-DVS: 2 channels, 128x128, T=16."
TINY_NOTE = "DeiT-Tiny's width, depth and heads with Spikformer's blocks, for 32x32 images."
SMALL_NOTE = "DeiT-Small's width, depth and heads with Spikformer's blocks, for 32x32 images."

ROWS = {
    # The authors give 12 heads for 4-384; the other sizes keep its 32 channels a head.
    "spikformer_2_256": _row(256, 2, 8, 2_568_490),
    "spikformer_4_256": _row(256, 4, 8, 4_155_178),
    "spikformer_2_384": _row(384, 2, 12, 5_765_050),
    "spikformer_4_384": _row(384, 4, 12, 9_324_730),
    "spikformer_5_384": _row(384, 5, 12, 11_104_570),
    "spikformer_8_384": _row(384, 8, 12, 16_444_090),
    "spikformer_8_512": _row(512, 8, 16, 29_193_802),
    # The authors give 8 heads for 8-512; the other sizes keep its 64 channels a head.
    "spikformer_in_6_256": _imagenet_row(256, 6, 5_991_688),
    "spikformer_in_8_384": _imagenet_row(384, 8, 16_816_024),
    "spikformer_in_6_512": _imagenet_row(512, 6, 23_373_352),
    "spikformer_in_8_512": _imagenet_row(512, 8, 29_689_384),
    "spikformer_in_10_512": _imagenet_row(512, 10, 36_005_416),
    "spikformer_in_8_768": _imagenet_row(768, 8, 66_338_632),
    "spikformer_dvs_2_256": dataclasses.replace(
        _row(256, 2, 16, 2_566_666, DVS_NOTE, **EVENT_ARGUMENTS), **EVENT_INPUT
    ),
    "spikformer_tiny": _row(192, 12, 3, 5_923_810, TINY_NOTE, MULTISP),
    "spikformer_small": _row(384, 12, 6, 23_563_450, SMALL_NOTE, MULTISP),
    "test_spikformer": _row(16, 3, (2, 1, 4), 10_444, "Micro-model for tests.", mlp_ratios=(2, 1, 1.5)),
}

default_cfgs = register_rows(__name__, Spikformer, ROWS)
