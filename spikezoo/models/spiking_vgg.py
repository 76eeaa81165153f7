"""Spiking VGGs: Conv-4/6/8 of the ticket papers, the MPBN authors' VGG-16, and nets for conversion without norms.

Papers: "Gaining the Sparse Rewards by Exploring Binary Lottery Tickets in SNN" (CONV-4, VGG-9, VGG-11 are the
Conv4, Conv6, Conv8 layouts of Frankle and Carbin, in the binary-activation order conv-pool-norm-neuron);
"Membrane Potential Batch Normalization for Spiking Neural Networks" (VGG-16, average pooling after the neuron).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from spikezoo.layers import ConvNormNeuron, LinearNormNeuron, Pool, Stem
from spikezoo.models._base import SpikingModel, init_without_norms
from spikezoo.registry import ModelRow, register_rows

__all__ = ["SpikingVGG"]


class SpikingVGG(SpikingModel):
    """Convolutions in stages, each ending in a 2x2 pooling.

    Args:
        widths: Channels of the convolutions, stage by stage.
        hidden: Widths of the spiking linear layers before the classifier; none means global pooling.
        ticket: The ticket papers' layout (no biases, non-affine norms, max-pool before norm and neuron) or the
            MPBN authors' (biases, affine norms, average pooling after the neuron).
        kernel: Size of the convolutions' kernels, odd; they keep the size of their maps.
        norm: Whether there are norms. Without them there is no bias either, which is the form that is converted from
            an ANN.
        **kwargs: Arguments of :class:`SpikingModel`.
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]],
        hidden: Sequence[int] = (),
        ticket: bool = True,
        kernel: int = 3,
        norm: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        dd, neurons = self.dd, self.neuron_factory
        self.min_img_size = 2 ** len(widths)
        self.fixed_img_size = bool(hidden)
        self.check_size(self.img_size)
        size: Sequence[int] = self.img_size
        channels = self.in_chans
        for index, stage_widths in enumerate(widths):
            blocks: list[nn.Module] = []
            for position, width in enumerate(stage_widths):
                last = position + 1 == len(stage_widths)
                block = ConvNormNeuron(
                    channels,
                    width,
                    size,
                    kernel=kernel,
                    bias=norm and not ticket,
                    norm=norm,
                    affine=not ticket,
                    pool=nn.MaxPool2d(2) if ticket and last else None,
                    neuron=neurons,
                    dd=dd,
                )
                blocks.append(block)
                channels, size = width, block.out_size
            if not ticket:
                blocks.append(Pool(nn.AvgPool2d(2)))
                size = (size[0] // 2, size[1] // 2)
            if index == 0:
                stem = blocks.pop(0)
                self.add_stem(Stem(stem), stage_widths[0], 1)
            self.add_stage(blocks, channels, 2 ** (index + 1))
        features = channels * size[0] * size[1]
        for width in hidden:
            self.neck.append(
                LinearNormNeuron(features, width, pool=False, norm=norm, bias=False, neuron=neurons, dd=dd)
            )
            features = width
        # The ticket layouts have no bias anywhere.
        self.finish(features if hidden else channels, head_bias=norm and not ticket)
        if norm:
            self._init_weights(ticket)
        else:
            init_without_norms(self)

    def _init_weights(self, ticket: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in" if ticket else "fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                if ticket:
                    nn.init.kaiming_normal_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


CONV4 = ((64, 64), (128, 128))
CONV6 = (*CONV4, (256, 256))
CONV8 = (*CONV6, (512, 512))
VGG16 = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
# The ticket papers give decay 0.99 and T=4 and use SpikingJelly, whose defaults stand in for what they leave out.
TICKET_NEURON = {"decay": 0.99, "threshold": 1.0, "firing": ">=", "surrogate": "sigmoid"}
# The MPBN authors' code: decay 0.25, effective threshold 0.5, strict comparison, tanh surrogate.
MPBN_NEURON = {"decay": 0.25, "threshold": 0.5, "firing": ">", "surrogate": "tanh"}
TICKETS = "Gaining the Sparse Rewards by Exploring Binary Lottery Tickets in SNN"
MPBN = "Membrane Potential Batch Normalization for Spiking Neural Networks (arXiv:2308.08359)"


RMP = "RMP-SNN: Residual Membrane Potential Neuron for Enabling Deeper High-Accuracy and Low-Latency SNNs (CVPR 2020)"
# Integrate-and-fire with a soft reset keeps what is above the threshold: rates then equal an ANN's activations.
RMP_NEURON = {"kind": "if", "reset": "soft"}
RMP_ARGUMENTS = {"ticket": False, "norm": False, "neuron_defaults": RMP_NEURON}
DYNSNN = "DynSNN: A Dynamic Approach to Reduce Redundancy in Spiking Neural Networks (ICASSP 2022)"


def _ticket(
    widths: Sequence[Sequence[int]], parameters: int, note: str, hidden: Sequence[int] = (256, 256)
) -> ModelRow:
    arguments = {"widths": widths, "hidden": hidden, "neuron_defaults": TICKET_NEURON}
    return ModelRow(arguments, parameters=parameters, paper=TICKETS, note=note, fixed_input_size=True, pool_size=(1, 1))


def _mpbn(parameters: int, mpbn: str | None, note: str, widths: Sequence[Sequence[int]] = VGG16) -> ModelRow:
    arguments = {"widths": widths, "ticket": False, "mpbn": mpbn, "neuron_defaults": MPBN_NEURON}
    pooled = 32 // 2 ** len(widths)
    return ModelRow(arguments, parameters=parameters, paper=MPBN, note=note, pool_size=(pooled, pooled))


ROWS = {
    "spiking_conv4": _ticket(CONV4, 2_425_024, "CONV-4 of the ticket papers: 4 convolutions, 3 linear layers."),
    "spiking_vgg9": _ticket(CONV6, 2_261_184, "VGG-9 of the ticket papers (Conv6): 6 convolutions, 3 linear layers."),
    "spiking_vgg11": _ticket(CONV8, 5_275_840, "VGG-11 of the ticket papers (Conv8): 8 convolutions, 3 linear layers."),
    "spiking_vgg16": _mpbn(14_728_266, None, "The MPBN authors' VGG-16 without membrane normalisation."),
    "mpbn_vgg16": _mpbn(14_736_714, "channel", "VGG-16 with membrane normalisation."),
    "rmp_vgg16": ModelRow(
        {"widths": VGG16, **RMP_ARGUMENTS},
        parameters=14_715_584,
        paper=RMP,
        note="The convolutions of VGG-16 without norms and biases, one linear layer, for 32x32 images: train it with "
        "neuron='relu', then convert it.",
    ),
    "rmp_in_vgg16": ModelRow(
        {"widths": VGG16, "hidden": (4096, 4096), **RMP_ARGUMENTS},
        parameters=138_344_128,
        paper=RMP,
        note="VGG-16 for ImageNet without norms and biases, its three linear layers and average pooling.",
        num_classes=1000,
        img_size=224,
        fixed_input_size=True,
    ),
    "spiking_lenet": ModelRow(
        {"widths": ((6,), (16,)), "hidden": (120, 84), "kernel": 5, **RMP_ARGUMENTS},
        parameters=107_550,
        paper=DYNSNN,
        note="LeNet-5's widths, 5x5 convolutions that keep the size of their maps, average pooling, no norms and "
        "biases. The paper prints no layout.",
        img_size=28,
        in_chans=1,
        fixed_input_size=True,
    ),
    "test_spiking_vgg": _ticket(((4, 6), (8,), (10,)), 4_196, "Micro-model for tests: ticket layout.", hidden=(16,)),
    "test_mpbn_vgg": _mpbn(2_334, "channel", "Micro-model for tests: MPBN layout.", widths=((6,), (8, 8), (12,))),
}

default_cfgs = register_rows(__name__, SpikingVGG, ROWS)
