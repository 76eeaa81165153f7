"""Spiking ResNets: the TET authors' ResNet-19 and the MPBN authors' ResNet-18/19/20/34.

Papers: "Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting" (ResNet-19 of the ticket
papers); "Membrane Potential Batch Normalization for Spiking Neural Networks"; "RMP-SNN" (a ResNet-20 without norms and
biases, converted from an ANN). All blocks are post-activation: the
neuron sits after the residual join, so that every block puts out binary spikes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from spikezoo.layers import (
    ConvNormNeuron,
    Flatten,
    LinearNormNeuron,
    Pool,
    ResidualBlock,
    Stem,
    conv_out,
    set_norms,
)
from spikezoo.models._base import SpikingModel, init_without_norms
from spikezoo.models.spiking_vgg import MPBN, MPBN_NEURON, RMP, RMP_NEURON
from spikezoo.registry import ModelRow, register_rows

__all__ = ["SpikingResNet"]


class SpikingResNet(SpikingModel):
    """A stem, stages of residual blocks, global pooling, optionally a spiking linear layer, and the classifier.

    Args:
        widths: Channels of the stages.
        depths: Blocks of the stages.
        strides: Stride of the first block of each stage.
        stem: conv3 (one 3x3), conv3x3 (three 3x3 and 2x2 average pooling) or conv7 (7x7 of stride 2 and 3x3
            average pooling of stride 2).
        stem_width: Channels of the stem.
        pooled_shortcut: Average pooling in the shortcuts instead of a stride.
        hidden: Width of a spiking linear layer before the classifier, 0 for none.
        norm: bn (or True), tdbn or tebn, see :func:`~spikezoo.layers.set_norms`; False for none. Without norms there
            is no bias either, which is the form that is converted from an ANN.
        flatten: Every position of the last map is a feature of the classifier, instead of global pooling.
        **kwargs: Arguments of :class:`SpikingModel`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        strides: Sequence[int],
        stem: str = "conv3",
        stem_width: int = 64,
        pooled_shortcut: bool = False,
        hidden: int = 0,
        norm: bool | str = True,
        flatten: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        dd, neurons = self.dd, self.neuron_factory
        kind, norm = "bn" if norm is True else norm, bool(norm)
        reduction = {"conv3": 1, "conv3x3": 2, "conv7": 4}[stem]
        total = reduction
        for stride in strides:
            total *= stride
        self.min_img_size = total
        self.fixed_img_size = flatten
        self.check_size(self.img_size)
        kernel, stride = (7, 2) if stem == "conv7" else (3, 1)
        first = ConvNormNeuron(
            self.in_chans, stem_width, self.img_size, kernel=kernel, stride=stride, norm=norm, neuron=neurons, dd=dd
        )
        layers: list[nn.Module] = [first]
        size = first.out_size
        if stem == "conv3x3":
            layers += [ConvNormNeuron(stem_width, stem_width, size, norm=norm, neuron=neurons, dd=dd) for _ in range(2)]
            layers.append(Pool(nn.AvgPool2d(2)))
            size = conv_out(size, 2, 2, 0)
        elif stem == "conv7":
            layers.append(Pool(nn.AvgPool2d(3, 2, 1)))
            size = conv_out(size, 3, 2, 1)
        self.add_stem(Stem(*layers), stem_width, reduction)
        channels = stem_width
        for width, depth, stride in zip(widths, depths, strides, strict=True):
            blocks: list[nn.Module] = []
            for position in range(depth):
                block = ResidualBlock(
                    channels,
                    width,
                    size,
                    stride=stride if position == 0 else 1,
                    pooled_shortcut=pooled_shortcut,
                    norm=norm,
                    neuron=neurons,
                    dd=dd,
                )
                blocks.append(block)
                channels, size = width, block.out_size
            reduction *= stride
            self.add_stage(blocks, width, reduction)
        if flatten:
            self.neck.append(Flatten())
            channels *= size[0] * size[1]
        if hidden:
            self.neck.append(
                LinearNormNeuron(channels, hidden, pool=True, norm=False, bias=norm, neuron=neurons, dd=dd)
            )
            channels = hidden
        self.finish(channels, head_bias=norm)
        if kind:
            self._init_weights()
            set_norms(self, kind, self.neuron_config.threshold, self.T, dd)
        else:
            init_without_norms(self)

    def _init_weights(self) -> None:
        # The MPBN authors' initialisation; the spiking linear layer has no norm and would never fire from theirs.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
            elif isinstance(module, nn.Linear):
                if module is self.head.fc:
                    nn.init.normal_(module.weight, std=1.0 / module.in_features)
                else:
                    nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)


TET_NEURON = {"decay": 0.5, "threshold": 1.0, "firing": ">", "surrogate": "triangle"}
TET = "Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting (arXiv:2202.11946)"

RESNET19 = {"widths": (128, 256, 512), "depths": (3, 3, 2), "strides": (1, 2, 2)}
RESNET20 = {
    "widths": (64, 128, 256, 512),
    "depths": (2, 2, 2, 2),
    "strides": (1, 2, 2, 2),
    "stem": "conv3x3",
    "pooled_shortcut": True,
}
RESNET18 = {"widths": (64, 128, 256, 512), "depths": (2, 2, 2, 2), "strides": (1, 2, 2, 2), "stem": "conv7"}
RESNET34 = {**RESNET18, "depths": (3, 4, 6, 3)}
RMP_ARGUMENTS = {"norm": False, "flatten": True, "neuron_defaults": RMP_NEURON}
TINY = {"widths": (8, 12, 16), "depths": (1, 1, 1), "strides": (1, 2, 2), "stem_width": 8}


def _row(
    layout: dict[str, Any], parameters: int, mpbn: str | None, note: str, imagenet: bool = False, pool: int = 8
) -> ModelRow:
    arguments = {**layout, "mpbn": mpbn, "neuron_defaults": MPBN_NEURON}
    if imagenet:
        return ModelRow(
            arguments,
            parameters=parameters,
            paper=MPBN,
            note=note,
            num_classes=1000,
            img_size=224,
            pool_size=(7, 7),
        )
    return ModelRow(arguments, parameters=parameters, paper=MPBN, note=note, pool_size=(pool, pool))


ROWS = {
    "spiking_resnet19": ModelRow(
        {**RESNET19, "hidden": 256, "neuron_defaults": TET_NEURON},
        parameters=12_630_858,
        paper=TET,
        note="The ResNet-19 of TET and of the ticket papers (12.63 M): 64-channel stem, two linear layers. The MPBN "
        "authors' ResNet-19 (12.57 M) is spiking_resnet19_wide.",
        pool_size=(1, 1),
    ),
    "spiking_resnet19_wide": _row(
        {**RESNET19, "stem_width": 128},
        12_569_226,
        None,
        "mpbn_resnet19 without membrane normalisation (12.57 M): 128-channel stem, one linear layer. The ResNet-19 "
        "of TET and of the ticket papers (12.63 M) is spiking_resnet19.",
    ),
    "mpbn_resnet19": _row(
        {**RESNET19, "stem_width": 128}, 12_578_186, "channel", "ResNet-19: 128-channel stem, one linear layer."
    ),
    "spiking_resnet20": _row(RESNET20, 11_247_946, None, "mpbn_resnet20 without membrane normalisation.", pool=2),
    "mpbn_resnet20": _row(
        RESNET20,
        11_256_010,
        "channel",
        "The 11 M ResNet-20 of the spiking literature (three-convolution stem, 64-512 channels), not the 0.27 M one "
        "of He et al.",
        pool=2,
    ),
    "spiking_resnet18": _row(RESNET18, 11_689_512, None, "mpbn_resnet18 without membrane normalisation.", True),
    "mpbn_resnet18": _row(
        RESNET18, 11_697_320, "channel", "ResNet-18 for ImageNet, average pooling in the stem.", True
    ),
    "spiking_resnet34": _row(RESNET34, 21_797_672, None, "mpbn_resnet34 without membrane normalisation.", True),
    "mpbn_resnet34": _row(
        RESNET34, 21_812_904, "channel", "ResNet-34 for ImageNet, average pooling in the stem.", True
    ),
    "rmp_resnet20": ModelRow(
        {**RESNET20, "pooled_shortcut": False, **RMP_ARGUMENTS},
        parameters=11_253_440,
        paper=RMP,
        note="The 11 M ResNet-20 without norms and biases, its last map flattened: train it with neuron='relu' (and "
        "neuron_drop=0.2, as its authors), then convert it.",
        fixed_input_size=True,
    ),
    "test_spiking_resnet": ModelRow(
        {**TINY, "hidden": 16, "neuron_defaults": TET_NEURON},
        parameters=8_506,
        paper=TET,
        note="Micro-model for tests: TET layout.",
        pool_size=(1, 1),
    ),
    "test_mpbn_resnet": _row(
        {**TINY, "stem": "conv3x3", "pooled_shortcut": True}, 9_610, "channel", "Micro-model for tests.", pool=4
    ),
    "test_rmp_resnet": ModelRow(
        {**TINY, "stem": "conv3x3", **RMP_ARGUMENTS},
        parameters=11_560,
        paper=RMP,
        note="Micro-model for tests: no norms, no biases.",
        fixed_input_size=True,
    ),
}

default_cfgs = register_rows(__name__, SpikingResNet, ROWS)
