"""Meta-SpikeFormer (Spike-driven Transformer V2): stages of spiking convolution blocks, then of attention blocks.

Paper: "Spike-driven Transformer V2: Meta Spiking Neural Network Architecture Inspiring the Design of Next-generation
Neuromorphic Chips" (arXiv:2404.03663, ICLR 2024). Code: BICLab/Spike-Driven-Transformer-V2, classification/models.py.
Currents flow from block to block, and a neuron stands before every convolution or chain of them; queries, keys, values
and the projection are RepConvs, which ``fold_bn`` makes one 3x3 convolution on spikes.

Where sources differ, the code is the default:

- It trains with one time step (``T=1``, the default), then, in the README's commands for the net of 55 M parameters, of
  which the abstract has 80.0 %, with four from those weights and a teacher.
- A net with a teacher has a second classifier (head_kd) and answers with the mean of both: of linear layers that is one
  with the mean of their weights, which loading makes.
- Drop path is made and never applied (``drop_path_rate`` drops here), and so are the arguments qkv_bias and sr_ratio.
- Behind a depthwise convolution (and within a RepConv before its fold) there are sums of weights, not spikes: the
  counters show what follows as MACs.
- It has no function for the net of 15 M parameters: its layout is that of the authors' repositories for detection and
  segmentation; nor has the paper the code's metaspikformer_8_768, of 124 M.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikezoo.checks import number, whole
from spikezoo.layers import ConvNormNeuron, conv_out, over_time
from spikezoo.models._base import SpikingModel, drop_path_rates, truncated_normal
from spikezoo.models.ms_resnet import CurrentStem, Fire
from spikezoo.models.sdt import AverageNeuron
from spikezoo.models.spikformer import IMAGENET_INPUT, SPIKFORMER_NEURON, SpikformerBlock, SpikingMLP, attend
from spikezoo.neurons import NeuronFactory
from spikezoo.registry import ModelRow, register_rows

__all__ = ["MetaSpikeFormer", "RepConv", "checkpoint_filter_fn"]


class RepConv(nn.Module):
    """A 1x1, a depthwise 3x3 and a 1x1 convolution with norms, which are one 3x3 convolution in evaluation mode.

    What the first norm puts out is padded with what it makes of zero by its running statistics, in training too.

    Args:
        dim: Channels.
    """

    def __init__(self, dim: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 1, padding=1, bias=False, **dd)  # pads before the norm: the same
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 3, groups=dim, bias=False, **dd)
        self.conv3 = nn.Conv2d(dim, dim, 1, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, D, h, w]`` to the same shape."""
        x = self.conv1(x)
        if self.training:
            x = self.norm1(x[..., 1:-1, 1:-1])  # statistics of the map alone
            _, of_zero = _scale_shift(self.norm1)
            inside = F.pad(torch.ones_like(x[:1, :1]), [1] * 4)
            x = F.pad(x, [1] * 4) + (1 - inside) * of_zero.detach().to(x.dtype).view(-1, 1, 1)
        else:
            x = self.norm1(x)
        return self.norm2(self.conv3(self.conv2(x)))

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """The one convolution that this is in evaluation mode, up to rounding; computed in float64."""
        first, last = (_scale_shift(norm) for norm in (self.norm1, self.norm2))
        one, depthwise, two = (conv.weight.double() for conv in (self.conv1, self.conv2, self.conv3))
        (scale1, shift1), (scale2, shift2) = ([v.double() for v in pair] for pair in (first, last))
        two = scale2.view(-1, 1) * two[..., 0, 0]
        like = self.conv1.weight
        conv = nn.Conv2d(len(like), len(like), 3, padding=1, device=like.device, dtype=like.dtype)
        conv.weight.copy_(torch.einsum("oc,cyx,ci->oiyx", two, depthwise[:, 0], scale1.view(-1, 1) * one[..., 0, 0]))
        assert conv.bias is not None
        conv.bias.copy_(two @ (shift1 * depthwise.sum((1, 2, 3))) + shift2)
        return conv.requires_grad_(like.requires_grad)


def _scale_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a norm multiplies with and adds in evaluation mode."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


class RepNormNeuron(nn.Module):
    """A RepConv, a norm, and a neuron or none.

    Args:
        dim: Channels.
        size: Height and width of the map.
        neuron: Factory of the neuron.
    """

    def __init__(self, dim: int, size: Sequence[int], neuron: NeuronFactory | None, dd: dict[str, Any]) -> None:
        super().__init__()
        self.conv, self.norm = RepConv(dim, dd), nn.BatchNorm2d(dim, **dd)
        self.neuron = None if neuron is None else neuron(dim, size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, D, h, w]`` to the same shape."""
        x = over_time(lambda frames: self.norm(self.conv(frames)), x)
        return x if self.neuron is None else self.neuron(x)


class RepAttention(nn.Module):
    """Spike-driven self-attention of the second kind: products of spikes without softmax, RepConvs around them.

    Args:
        dim: Channels.
        heads: Attention heads.
        size: Height and width of the map.
        neuron: Factory of the neurons.
        attention_neuron: Factory of the neuron behind the product.
    """

    scale = 0.125

    def __init__(
        self,
        dim: int,
        heads: int,
        size: Sequence[int],
        *,
        neuron: NeuronFactory,
        attention_neuron: NeuronFactory,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.heads = heads
        self.neuron_in = neuron(dim, size)
        self.q, self.k, self.v = (RepNormNeuron(dim, size, neuron, dd) for _ in range(3))
        self.neuron = attention_neuron(dim, size)
        self.proj = RepNormNeuron(dim, size, None, dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map currents ``[T, B, D, h, w]`` to currents of the same shape."""
        x = self.neuron_in(x)
        size = x.shape[3:]
        q, k, v = (layer(x).flatten(3).unflatten(2, (self.heads, -1)) for layer in (self.q, self.k, self.v))
        current = (attend(q, k, v) * self.scale).flatten(2, 3).unflatten(3, size)
        return self.proj(self.neuron(current).to(q.dtype))


class ConvBlock(nn.Module):
    """A separable convolution (1x1, depthwise 7x7, 1x1) and two 3x3 convolutions, each part added to its input.

    Args:
        dim: Channels.
        hidden: Channels between the two 3x3 convolutions.
        size: Height and width of the map.
        neuron: Factory of the neurons.
    """

    def __init__(self, dim: int, hidden: int, size: Sequence[int], *, neuron: NeuronFactory, dd: dict[str, Any]):
        super().__init__()
        self.neuron1 = neuron(dim, size)
        self.pointwise1 = ConvNormNeuron(dim, 2 * dim, size, kernel=1, neuron=neuron, dd=dd)
        self.depthwise = nn.Conv2d(2 * dim, 2 * dim, 7, padding=3, groups=2 * dim, bias=False, **dd)
        self.pointwise2 = ConvNormNeuron(2 * dim, dim, size, kernel=1, dd=dd)
        self.neuron2 = neuron(dim, size)
        self.conv1 = ConvNormNeuron(dim, hidden, size, neuron=neuron, dd=dd)
        self.conv2 = ConvNormNeuron(hidden, dim, size, dd=dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map currents ``[T, B, C, H, W]`` to currents of the same shape."""
        x = x + self.pointwise2(over_time(self.depthwise, self.pointwise1(self.neuron1(x))))
        return x + self.conv2(self.conv1(self.neuron2(x)))


class MetaSpikeFormer(SpikingModel):
    """A convolution without neuron, three stages of convolution blocks, two of attention, a neuron of the average.

    Args:
        widths: Channels of the five stages.
        depths: Their blocks.
        strides: Strides of the convolution before each stage; of the first one 7x7, of the others 3x3 behind a neuron.
        heads: Attention heads.
        mlp_ratio: Hidden channels of the MLPs and between 3x3 convolutions, over those of the stage.
        attention_threshold: Firing threshold of the neuron behind the attention product.
        drop_path_rate: Stochastic depth: probability of leaving out a branch of the last block, falling linearly to 0
            at the first attention block's; for all time steps of a sample together.
        **kwargs: Arguments of :class:`SpikingModel`.

    Raises:
        ValueError: Lists of another length than five, or channels of attention that ``heads`` does not divide.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int] = (1, 1, 2, 6, 2),
        strides: Sequence[int] = (2, 2, 2, 2, 1),
        heads: int = 8,
        mlp_ratio: int = 4,
        attention_threshold: float = 0.5,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, values in (("widths", widths), ("depths", depths), ("strides", strides)):
            if not isinstance(values, list | tuple) or len(values) != 5:
                raise ValueError(f"{name}={values!r}: expected five whole numbers, one for each stage.")
            for value in values:
                whole(name, value)
        if wrong := [width for width in widths[3:] if width % whole("heads", heads)]:
            raise ValueError(
                f"widths={widths!r} with heads={heads}: heads must divide the last two, and {wrong[0]} is no multiple "
                f"of it: take {-(-wrong[0] // heads) * heads}."
            )
        hidden = whole("mlp_ratio", mlp_ratio)
        number("drop_path_rate", drop_path_rate, 0, 1)
        dd, neurons = self.dd, self.neuron_factory
        threshold = number("attention_threshold", attention_threshold, 0, bounds="()")
        product_config = dataclasses.replace(self.neuron_config, threshold=threshold)
        behind_product = NeuronFactory(product_config, neurons.mpbn, neurons.drop, **dd)
        rates = iter(drop_path_rates(drop_path_rate, depths[3] + depths[4]))
        self.min_img_size = 1
        for stride in strides:
            self.min_img_size *= stride
        self.check_size(self.img_size)
        size: Sequence[int] = self.img_size
        channels, reduction = self.in_chans, 1
        for stage, (width, depth, stride) in enumerate(zip(widths, depths, strides, strict=True)):
            kernel = 3 if stage else 7
            conv = ConvNormNeuron(channels, width, size, kernel=kernel, stride=stride, bias=True, dd=dd)
            blocks: list[nn.Module] = [Fire(neurons(channels, size)), conv] if stage else []
            reduction *= stride
            if not stage:
                self.add_stem(CurrentStem(conv), width, reduction)
            channels, size = width, conv_out(size, kernel, stride, kernel // 2)
            for _ in range(depth):
                if stage < 3:
                    blocks.append(ConvBlock(width, hidden * width, size, neuron=neurons, dd=dd))
                    continue
                attn = RepAttention(width, heads, size, neuron=neurons, attention_neuron=behind_product, dd=dd)
                mlp = SpikingMLP(width, hidden * width, size, membrane=True, neuron=neurons, dd=dd)
                blocks.append(SpikformerBlock(attn, mlp, next(rates)))
            self.add_stage(blocks, width, reduction)
        self.neck.append(AverageNeuron(neurons(channels, (1, 1))))
        self.finish(channels)
        # The authors': convolutions keep torch's.
        if isinstance(self.head.fc, nn.Linear):
            truncated_normal(self.head.fc.weight)
            nn.init.zeros_(self.head.fc.bias)


# --------------------------------------------------------------------------------------------------------------
# Checkpoints of the official code
# --------------------------------------------------------------------------------------------------------------

# What stands before a block or layer, by its official name: where it is here, and at which place the blocks begin.
_PLACES = {
    "ConvBlock1_1": ("stages.0", 0),
    "ConvBlock1_2": ("stages.1", 2),
    "ConvBlock2_1": ("stages.2", 2),
    "ConvBlock2_2": ("stages.2", 3),
    "block3": ("stages.3", 2),
    "block4": ("stages.4", 2),
}
_DOWN = {"1_1": "stem.0", "1_2": "stages.1.1", "2": "stages.2.1", "3": "stages.3.1", "4": "stages.4.1"}
_LAYERS = {
    "Conv.pwconv1": "pointwise1.conv",
    "Conv.bn1": "pointwise1.norm",
    "Conv.dwconv": "depthwise",
    "Conv.pwconv2": "pointwise2.conv",
    "Conv.bn2": "pointwise2.norm",
    "conv1": "conv1.conv",
    "bn1": "conv1.norm",
    "conv2": "conv2.conv",
    "bn2": "conv2.norm",
}
_REP = {"0": "conv1", "1.bn": "norm1", "2.0": "conv2", "2.1": "conv3", "2.2": "norm2"}


def _renamed(name: str) -> str:
    """Our name of an entry of an official state dict."""
    path, _, leaf = name.rpartition(".")
    if path == "head":
        return f"head.fc.{leaf}"
    if match := re.fullmatch(r"downsample(\w+)\.encode_(conv|bn)", path):
        return f"{_DOWN[match[1]]}.{'norm' if match[2] == 'bn' else 'conv'}.{leaf}"
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", path)
    if match is None or match[1] not in _PLACES:
        return name  # and loading names it as unexpected
    stage, first = _PLACES[match[1]]
    layer = _LAYERS.get(match[3], match[3])
    if rep := re.fullmatch(r"attn\.(q|k|v|proj)_conv\.(?:0\.body\.(.+)|1)", layer):
        layer = f"attn.{rep[1]}." + (f"conv.{_REP[rep[2]]}" if rep[2] else "norm")
    elif mlp := re.fullmatch(r"mlp\.fc(\d)_(conv|bn)", layer):
        layer = f"mlp.fc{mlp[1]}.{'norm' if mlp[2] == 'bn' else 'conv'}"
    return f"{stage}.{first + int(match[2])}.{layer}.{leaf}"


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Rename a state dict of the official code to this model's names; ours is returned as it is.

    Args:
        state_dict: Names to tensors; may lie under 'state_dict' or 'model', with or without 'module.' before each name.
        model: The model that it is for.

    Example:
        >>> spikezoo.create_model('metaspikeformer_8_512', checkpoint_path='55M_kd.pth', T=4)  # calls it
    """
    for key in ("state_dict", "model"):
        state_dict = state_dict.get(key, state_dict)
    state = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if not any(name.startswith("downsample1_1.") for name in state):
        return state
    for leaf in ("weight", "bias"):
        taught = state.pop(f"head_kd.{leaf}", None)
        if taught is not None:
            state[f"head.{leaf}"] = (state[f"head.{leaf}"].double() + taught) / 2
    # A 1-d convolution over tokens is a 1x1 convolution over their map.
    return {_renamed(name): value.unsqueeze(-1) if value.dim() == 3 else value for name, value in state.items()}


# --------------------------------------------------------------------------------------------------------------
# Named models
# --------------------------------------------------------------------------------------------------------------

META = "Spike-driven Transformer V2 (arXiv:2404.03663)"


def _row(widths: Sequence[int], parameters: int) -> ModelRow:
    note = f"Meta-SpikeFormer (Spike-driven Transformer V2) for ImageNet, the net of {parameters // 10**6} M, T=1."
    arguments = {"widths": widths, "T": 1, "neuron_defaults": SPIKFORMER_NEURON}
    return ModelRow(arguments, parameters=parameters, paper=META, note=note, **{**IMAGENET_INPUT, "pool_size": (1, 1)})


# Of few tokens, whose product seldom comes to half a threshold.
TINY = {"widths": (4, 6, 8, 8, 16), "depths": (1,) * 5, "heads": 2, "mlp_ratio": 2, "attention_threshold": 0.05}

ROWS = {
    "metaspikeformer_8_256": _row((32, 64, 128, 256, 360), 15_112_208),
    "metaspikeformer_8_384": _row((48, 96, 192, 384, 480), 31_333_864),
    "metaspikeformer_8_512": _row((64, 128, 256, 512, 640), 55_350_248),
    "test_metaspikeformer": ModelRow(
        {**TINY, "neuron_defaults": SPIKFORMER_NEURON}, parameters=15_376, paper=META, note="Micro-model for tests."
    ),
}

default_cfgs = register_rows(__name__, MetaSpikeFormer, ROWS)
