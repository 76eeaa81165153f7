"""SEW-ResNet: residual blocks that join spikes with spikes, without a neuron behind the join.

Paper: "Deep Residual Learning in Spiking Neural Networks" (arXiv:2102.04159). Code: fangwei123456's
Spike-Element-Wise-ResNet, imagenet/sew_resnet.py, and SpikingJelly's activation_based.model.sew_resnet. With
``connect='add'`` the residual stream holds whole numbers: one block adds 0 or 1 to what it is given.

Where sources differ, the authors' code is the default:

- SpikingJelly's Bottleneck has the operands of 'iand' the other way round, y * (1 - x): its weights of such a net load
  and give other logits.
- The paper proves that a zero scale in the last norm (and a shift of 1 for 'and') makes a block the identity; the code
  starts with a scale of 1 unless told otherwise, ``zero_init_residual=True``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from spikezoo.layers import ConvNormNeuron, Pool, Stem, conv_out, set_norms
from spikezoo.models._base import SpikingModel
from spikezoo.neurons import NeuronFactory, nearest
from spikezoo.registry import ModelRow, register_rows

__all__ = ["SEWBlock", "SEWResNet", "checkpoint_filter_fn"]

CONNECTS = ("add", "and", "iand")


class SEWBlock(nn.Module):
    """Convolutions each with norm and neuron, joined with the shortcut element by element, no neuron behind.

    Args:
        in_chs: Input channels.
        width: Channels of the 3x3 convolutions.
        size: Height and width of the input.
        stride: Stride of the block.
        bottleneck: 1x1, 3x3 and 1x1 convolutions, the last of ``4 * width`` channels, instead of two 3x3.
        connect: How the branch's spikes y meet the shortcut's x: 'add' (x + y), 'and' (x * y) or 'iand' (x * (1 - y)).
        neuron: Factory of the neurons.
    """

    def __init__(
        self,
        in_chs: int,
        width: int,
        size: Sequence[int],
        *,
        stride: int = 1,
        bottleneck: bool = False,
        connect: str = "add",
        neuron: NeuronFactory,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.connect = connect
        out_chs = 4 * width if bottleneck else width
        # Output channels, kernel and stride.
        three, two = [(width, 1, 1), (width, 3, stride), (out_chs, 1, 1)], [(width, 3, stride), (width, 3, 1)]
        convs: list[nn.Module] = []
        channels, self.out_size = in_chs, (size[0], size[1])
        for chs, kernel, step in three if bottleneck else two:
            conv = ConvNormNeuron(channels, chs, self.out_size, kernel=kernel, stride=step, neuron=neuron, dd=dd)
            convs.append(conv)
            channels, self.out_size = chs, conv.out_size
        self.branch = nn.Sequential(*convs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_chs != out_chs:
            self.shortcut = ConvNormNeuron(in_chs, out_chs, size, kernel=1, stride=stride, neuron=neuron, dd=dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, C, H, W]`` spikes, or their sums, to ``[T, B, C', H', W']``."""
        y = self.branch(x)
        if self.shortcut is not None:
            x = self.shortcut(x)
        if self.connect == "add":
            return x + y
        return x * y if self.connect == "and" else x * (1 - y)


class SEWResNet(SpikingModel):
    """A stem, four stages of SEW blocks, global pooling and the classifier.

    Args:
        widths: Channels of the stages' 3x3 convolutions.
        depths: Blocks of the stages.
        bottleneck: Blocks of three convolutions, with four times the channels at their end.
        connect: add, and or iand, see :class:`SEWBlock`.
        zero_init_residual: Start with a zero scale (and with 'and' a shift of 1) in the last norm of each block.
        stem: conv7 (7x7 of stride 2 and 3x3 max-pooling of stride 2) or, for small images, conv3 (3x3 of stride 1).
        stem_width: Channels of the stem.
        norm: bn, tdbn or tebn, see :func:`~spikezoo.layers.set_norms`.
        **kwargs: Arguments of :class:`SpikingModel`.

    Raises:
        ValueError: Another ``connect``, ``stem`` or ``norm``.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        bottleneck: bool = False,
        connect: str = "add",
        zero_init_residual: bool = False,
        stem: str = "conv7",
        stem_width: int = 64,
        norm: str = "bn",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value, valid in (("connect", connect, CONNECTS), ("stem", stem, ("conv7", "conv3"))):
            if value not in valid:
                raise ValueError(f"{name}={value!r} does not exist. {nearest(value, valid)}")
        dd, neurons = self.dd, self.neuron_factory
        large = stem == "conv7"
        reduction = 4 if large else 1
        self.min_img_size = reduction * 2 ** (len(widths) - 1)
        self.check_size(self.img_size)
        kernel, stride = (7, 2) if large else (3, 1)
        first = ConvNormNeuron(
            self.in_chans, stem_width, self.img_size, kernel=kernel, stride=stride, neuron=neurons, dd=dd
        )
        layers: list[nn.Module] = [first]
        size = first.out_size
        if large:
            layers.append(Pool(nn.MaxPool2d(3, 2, 1)))
            size = conv_out(size, 3, 2, 1)
        self.add_stem(Stem(*layers), stem_width, reduction)
        channels = stem_width
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = []
            for position in range(depth):
                stride = 2 if index and position == 0 else 1
                block = SEWBlock(
                    channels, width, size, stride=stride, bottleneck=bottleneck, connect=connect, neuron=neurons, dd=dd
                )
                blocks.append(block)
                channels, size = 4 * width if bottleneck else width, block.out_size
            reduction *= 2 if index else 1
            self.add_stage(blocks, channels, reduction)
        self.finish(channels)
        set_norms(self, norm, self.neuron_config.threshold, self.T, dd)
        self._init_weights(zero_init_residual)

    def _init_weights(self, zero_init_residual: bool) -> None:
        # torchvision's, as the authors; the classifier keeps torch's own.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, SEWBlock) and zero_init_residual:
                last = module.branch[-1]
                assert isinstance(last, ConvNormNeuron) and isinstance(last.norm, nn.BatchNorm2d)
                nn.init.zeros_(last.norm.weight)
                nn.init.constant_(last.norm.bias, float(module.connect == "and"))


# --------------------------------------------------------------------------------------------------------------
# Checkpoints of the official code and of SpikingJelly
# --------------------------------------------------------------------------------------------------------------

# SpikingJelly's conv1.weight, bn1.bias, downsample.1.running_mean; the authors' conv1.module.1.bias, a container of
# both, and downsample.0.module.1.bias.
_LAYER = re.compile(r"(conv|bn|downsample)(\d*)\.(?:(\d)\.)?(?:module\.)?(?:(\d)\.)?(\w+)")


def _renamed(name: str) -> str:
    """Our name of an entry of an official state dict."""
    found = re.fullmatch(r"(?:layer(\d+\.\d+)\.)?(.*)", name)
    assert found is not None
    block, rest = found.groups()
    if rest.startswith("fc."):
        return f"head.{rest}"
    match = _LAYER.fullmatch(rest)
    if match is None:
        return name  # and loading names it as unexpected
    kind, number, outer, inner, leaf = match.groups()
    part = inner or outer or ("1" if kind == "bn" else "0")
    layer = "norm" if part == "1" else "conv"
    if block is None:
        return f"stem.0.{layer}.{leaf}"
    stage, index = block.split(".")
    where = "shortcut" if kind == "downsample" else f"branch.{int(number) - 1}"
    return f"stages.{int(stage) - 1}.{index}.{where}.{layer}.{leaf}"


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Rename a state dict of the authors' code or of SpikingJelly's sew_resnet to this model's names.

    A state dict in our own names is returned as it is.

    Args:
        state_dict: Names to tensors; may lie under 'state_dict' or 'model', with or without 'module.' before each name.
        model: The model that it is for.

    Examples:
        >>> spikezoo.create_model('sew_resnet34', checkpoint_path='sew34_checkpoint_319.pth')  # calls it
    """
    for key in ("state_dict", "model"):
        state_dict = state_dict.get(key, state_dict)
    state = {name.removeprefix("module."): value for name, value in state_dict.items()}
    return {_renamed(name): value for name, value in state.items()} if "conv1.weight" in state else state


# --------------------------------------------------------------------------------------------------------------
# Named models
# --------------------------------------------------------------------------------------------------------------

SEW = "Deep Residual Learning in Spiking Neural Networks (arXiv:2102.04159)"
SEW_NEURON = {"kind": "if", "surrogate": "arctan", "detach_reset": True}


def _row(depth: int, depths: Sequence[int], parameters: int, bottleneck: bool = False) -> ModelRow:
    arguments = {
        "widths": (64, 128, 256, 512),
        "depths": depths,
        "bottleneck": bottleneck,
        "neuron_defaults": SEW_NEURON,
    }
    note = f"SEW-ResNet-{depth} for ImageNet, its stream a sum of spikes; connect='and' and 'iand' keep it binary."
    return ModelRow(
        arguments, parameters=parameters, paper=SEW, note=note, num_classes=1000, img_size=224, pool_size=(7, 7)
    )


TINY = {"widths": (8, 12, 16), "depths": (2, 1, 1), "stem": "conv3", "stem_width": 8, "neuron_defaults": SEW_NEURON}

ROWS = {
    "sew_resnet18": _row(18, (2, 2, 2, 2), 11_689_512),
    "sew_resnet34": _row(34, (3, 4, 6, 3), 21_797_672),
    "sew_resnet50": _row(50, (3, 4, 6, 3), 25_557_032, True),
    "sew_resnet101": _row(101, (3, 4, 23, 3), 44_549_160, True),
    "sew_resnet152": _row(152, (3, 8, 36, 3), 60_192_808, True),
    "test_sew_resnet": ModelRow(TINY, parameters=9_418, paper=SEW, note="Micro-model for tests.", pool_size=(8, 8)),
}

default_cfgs = register_rows(__name__, SEWResNet, ROWS)
