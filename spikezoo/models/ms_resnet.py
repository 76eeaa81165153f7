"""MS-ResNet: shortcuts between membrane potentials; spikes enter every convolution of a branch.

Paper: "Advancing Spiking Neural Networks towards Deep Residual Learning" (arXiv:2112.08954). Code: Ariande1/MS-ResNet,
models/MS_ResNet.py. A block is neuron-conv-norm-neuron-conv-norm, added to its input: what flows from block to block is
current, and the block before the classifier ends in one more neuron. The norms see all time steps at once and start
with the threshold as their scale (tdBN), the last one of each block with zero.

Where paper and code differ, the code is the default:

- The 1x1 convolutions of shortcuts that change shape take the current itself: multiplications, although the paper's
  text has spikes only. The counters show them as MACs.
- The stem's max-pooling is defined and never called: the first stage has stride 2 instead.
- The authors' README corrects the paper's weight decay for 18 and 34 layers, 1e-4, to 1e-5.
- The paper's 104 layers ran 5 time steps; the code has 6 for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from spikezoo.layers import ConvNormNeuron, Pool, Stem, set_norms
from spikezoo.models._base import SpikingModel
from spikezoo.neurons import NeuronFactory, nearest
from spikezoo.registry import ModelRow, register_rows

__all__ = ["CurrentStem", "Fire", "MSBlock", "MSResNet", "checkpoint_filter_fn"]


class CurrentStem(Stem):
    """A stem without neurons: an image passes all of it once, and its current is repeated."""

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        """Map ``[1 or T, B, C, H, W]`` to ``[T, B, C', H', W']``."""
        *layers, last = self
        for layer in layers:
            x = layer(x)
        return last(x, T)


class Fire(nn.Module):
    """A neuron of its own, behind a stream of currents.

    Args:
        neuron: The neuron.
    """

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, ...]`` to spikes of the same shape."""
        return self.neuron(x)


class MSBlock(nn.Module):
    """Neuron, convolution, norm, twice, added to the current that came in.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        size: Height and width of the input.
        stride: Stride of the block.
        pooled_shortcut: Average pooling, then a 1x1 convolution of stride 1, instead of a strided one.
        neuron: Factory of the neurons.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        size: Sequence[int],
        *,
        stride: int = 1,
        pooled_shortcut: bool = False,
        neuron: NeuronFactory,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.neuron = neuron(in_chs, size)
        self.conv1 = ConvNormNeuron(in_chs, out_chs, size, stride=stride, neuron=neuron, dd=dd)
        self.conv2 = ConvNormNeuron(out_chs, out_chs, self.conv1.out_size, dd=dd)
        self.out_size = self.conv2.out_size
        shortcut: list[nn.Module] = []
        if stride != 1 or in_chs != out_chs:
            if pooled_shortcut and stride != 1:
                # At the border of odd maps a mean of what is there: the branch rounds up, too.
                shortcut.append(Pool(nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)))
            step = 1 if pooled_shortcut else stride
            shortcut.append(ConvNormNeuron(in_chs, out_chs, size, kernel=1, stride=step, dd=dd))
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map currents ``[T, B, C, H, W]`` to currents ``[T, B, C', H', W']``."""
        return self.conv2(self.conv1(self.neuron(x))) + self.shortcut(x)


class MSResNet(SpikingModel):
    """A stem without neurons, stages of MS blocks, a neuron, global pooling and the classifier.

    Args:
        widths: Channels of the stages.
        depths: Blocks of the stages.
        strides: Stride of the first block of each stage.
        stem: conv7 (7x7 of stride 2), conv3x3 (three 3x3 with biases, the first of stride 2) or, for small images,
            conv3 (3x3 of stride 1).
        stem_width: Channels of the stem.
        pooled_shortcut: Average pooling in the shortcuts instead of a stride.
        norm: tdbn, bn or tebn, see :func:`~spikezoo.layers.set_norms`; its alpha is 1 throughout.
        **kwargs: Arguments of :class:`SpikingModel`.

    Raises:
        ValueError: Another ``stem`` or ``norm``.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        strides: Sequence[int] = (2, 2, 2, 2),
        stem: str = "conv7",
        stem_width: int = 64,
        pooled_shortcut: bool = False,
        norm: str = "tdbn",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # Kernel, stride and whether there is a norm, layer by layer; the layers without have a bias.
        stems = {
            "conv7": [(7, 2, True)],
            "conv3x3": [(3, 2, False), (3, 1, False), (3, 1, True)],
            "conv3": [(3, 1, True)],
        }
        if stem not in stems:
            raise ValueError(f"stem={stem!r} does not exist. {nearest(stem, stems)}")
        dd, neurons = self.dd, self.neuron_factory
        reduction = 1 if stem == "conv3" else 2
        self.min_img_size = reduction
        for stride in strides:
            self.min_img_size *= stride
        self.check_size(self.img_size)
        size: Sequence[int] = self.img_size
        channels = self.in_chans
        layers: list[nn.Module] = []
        for kernel, stride, normed in stems[stem]:
            bias = stem == "conv3x3"
            layer = ConvNormNeuron(
                channels, stem_width, size, kernel=kernel, stride=stride, bias=bias, norm=normed, dd=dd
            )
            layers.append(layer)
            channels, size = stem_width, layer.out_size
        self.add_stem(CurrentStem(*layers), stem_width, reduction)
        for width, depth, stride in zip(widths, depths, strides, strict=True):
            blocks: list[nn.Module] = []
            for position in range(depth):
                step = stride if position == 0 else 1
                block = MSBlock(
                    channels, width, size, stride=step, pooled_shortcut=pooled_shortcut, neuron=neurons, dd=dd
                )
                blocks.append(block)
                channels, size = width, block.out_size
            reduction *= stride
            self.add_stage(blocks, width, reduction)
        self.neck.append(Fire(neurons(channels, size)))
        self.finish(channels)
        set_norms(self, norm, self.neuron_config.threshold, self.T, dd)
        self._init_weights(norm == "tdbn")

    def _init_weights(self, threshold_dependent: bool) -> None:
        # The authors': convolutions and classifier keep torch's.
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and threshold_dependent:
                nn.init.constant_(module.weight, self.neuron_config.threshold)
        for module in self.modules():
            if isinstance(module, MSBlock):
                assert isinstance(module.conv2.norm, nn.BatchNorm2d)
                nn.init.zeros_(module.conv2.norm.weight)


# --------------------------------------------------------------------------------------------------------------
# Checkpoints of the official code
# --------------------------------------------------------------------------------------------------------------


def _renamed(name: str, stem_layers: int) -> str:
    """Our name of an entry of an official state dict."""
    if name.startswith("fc."):
        return f"head.{name}"
    stem = re.fullmatch(r"conv1\.(\d)\.(?:bn\.)?(\w+)", name)
    if stem:
        number = int(stem[1])  # convolutions, then the one norm
        return f"stem.{min(number, stem_layers - 1)}.{'norm' if number == stem_layers else 'conv'}.{stem[2]}"
    block = re.fullmatch(r"conv(\d)_x\.(\d+)\.(residual_function|shortcut)\.(\d)\.(bn\.)?(\w+)", name)
    if block is None:
        return name  # and loading names it as unexpected
    stage, index, part, place, norm, leaf = block.groups()
    where = f"conv{1 + int(place) // 3}" if part == "residual_function" else "shortcut"
    if part == "shortcut":
        # Where an average pooling comes first, it has the number 0 in both nets.
        where = f"shortcut.{int(place) - (1 if norm else 0)}"
    return f"stages.{int(stage) - 2}.{index}.{where}.{'norm' if norm else 'conv'}.{leaf}"


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Rename a state dict of the official MS-ResNet code to this model's names; ours is returned as it is.

    Args:
        state_dict: Names to tensors; may lie under 'state_dict' or 'model', with or without 'module.' before each name.
        model: The model that it is for.
    """
    for key in ("state_dict", "model"):
        state_dict = state_dict.get(key, state_dict)
    state = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if not any(name.startswith("conv2_x.") for name in state):
        return state
    layers = len(list(model.get_submodule("stem").children()))
    return {_renamed(name, layers): value for name, value in state.items()}


# --------------------------------------------------------------------------------------------------------------
# Named models
# --------------------------------------------------------------------------------------------------------------

MS = "Advancing Spiking Neural Networks towards Deep Residual Learning (arXiv:2112.08954)"
MS_NEURON = {
    "decay": 0.25,
    "threshold": 0.5,
    "firing": ">",
    "surrogate": "rectangle",
    "detach_reset": True,
}


def _row(depth: int, depths: Sequence[int], parameters: int, **arguments: object) -> ModelRow:
    arguments = {"widths": (64, 128, 256, 512), "depths": depths, "T": 6, "neuron_defaults": MS_NEURON, **arguments}
    note = f"MS-ResNet-{depth} for ImageNet: shortcuts between membrane potentials, T=6."
    return ModelRow(
        arguments, parameters=parameters, paper=MS, note=note, num_classes=1000, img_size=224, pool_size=(7, 7)
    )


TINY = {"widths": (8, 12, 16), "depths": (2, 1, 1), "strides": (1, 2, 2), "stem": "conv3", "stem_width": 8}

ROWS = {
    "ms_resnet18": _row(18, (2, 2, 2, 2), 11_693_736),
    "ms_resnet34": _row(34, (3, 4, 6, 3), 21_801_896),
    "ms_resnet104": _row(104, (3, 8, 32, 8), 77_350_504, stem="conv3x3", pooled_shortcut=True, drop_rate=0.2),
    "test_ms_resnet": ModelRow(
        {**TINY, "neuron_defaults": MS_NEURON},
        parameters=9_418,
        paper=MS,
        note="Micro-model for tests.",
        pool_size=(8, 8),
    ),
}

default_cfgs = register_rows(__name__, MSResNet, ROWS)
