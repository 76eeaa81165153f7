"""PLIF nets: plain convolutions with learned time constants, and ten output neurons a class that vote.

Paper: "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural Networks"
(arXiv:2007.05785). Code: fangwei123456's Parametric-Leaky-Integrate-and-Fire-Spiking-Neuron, codes/models.py, and
SpikingJelly's activation_based.model.parametric_lif_net. Each spiking layer learns one time constant, at first 2.

The last layer spikes, too. A fixed linear layer with weights 1/10 and 0 takes the mean of each class's neurons, so that
the logits are their firing rates; the authors' forward pass returns rates times T, which their training divides by T.
After ``reset_classifier`` the classifier is an ordinary learned layer on the same neurons.

Where sources differ, the authors' code is the default: SpikingJelly's linear layers have biases (``bias=True``) and
drop out before the last layer of the net for CIFAR-10, too (``drops=(0.5, 0.5)``); the authors train with
max-pooling and without gradients through the reset, and compare average pooling (``pooling='avg'``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikezoo.layers import ConvNormNeuron, LinearNormNeuron, Pool, Stem, conv_out
from spikezoo.models._base import SpikingModel
from spikezoo.neurons import nearest
from spikezoo.registry import ModelRow, register_rows

__all__ = ["PLIFNet", "Voting", "checkpoint_filter_fn"]

VOTES = 10  # output neurons a class
POOLINGS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


class Voting(nn.Linear):
    """A fixed linear layer: the logit of a class is the mean of its neurons.

    Args:
        votes: Neurons a class.
        classes: Number of classes.
    """

    def __init__(self, votes: int, classes: int, dd: dict[str, Any]) -> None:
        super().__init__(votes * classes, classes, bias=False, **dd)
        weight = torch.eye(classes, **dd).repeat_interleave(votes, 1) / votes
        del self.weight
        self.register_buffer("weight", weight)


class SequenceDropout(nn.Module):
    """Dropout that silences a neuron at all time steps or at none.

    Args:
        rate: Probability.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, ...]`` to the same shape."""
        return x * F.dropout(torch.ones_like(x[0]), self.rate) if self.training and self.rate else x

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"rate={self.rate}"


class PLIFNet(SpikingModel):
    """Convolutions in stages, each ending in a 2x2 pooling, then two spiking linear layers and the vote.

    Args:
        widths: Channels of the convolutions, stage by stage.
        hidden: Neurons of the first linear layer; None takes a quarter of its inputs.
        drops: Dropout before each of the two linear layers.
        pooling: max or avg.
        bias: Whether the linear layers have biases.
        **kwargs: Arguments of :class:`SpikingModel`.

    Raises:
        ValueError: Another pooling.
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]],
        hidden: int | None = None,
        drops: Sequence[float] = (0.5, 0.5),
        pooling: str = "max",
        bias: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} does not exist. {nearest(pooling, POOLINGS)}")
        dd, neurons = self.dd, self.neuron_factory
        self.min_img_size, self.fixed_img_size = 2 ** len(widths), True
        self.check_size(self.img_size)
        size: Sequence[int] = self.img_size
        channels = self.in_chans
        for index, stage_widths in enumerate(widths):
            blocks: list[nn.Module] = []
            for width in stage_widths:
                blocks.append(ConvNormNeuron(channels, width, size, neuron=neurons, dd=dd))
                channels = width
            blocks.append(Pool(POOLINGS[pooling](2)))
            size = conv_out(size, 2, 2, 0)
            if index == 0:
                self.add_stem(Stem(blocks.pop(0)), channels, 1)
            self.add_stage(blocks, channels, 2 ** (index + 1))
        features = channels * size[0] * size[1]
        layers = [hidden or features // 4, VOTES * self.num_classes]
        for drop, width in zip(drops, layers if self.num_classes else layers[:1], strict=False):
            self.neck.append(SequenceDropout(drop))
            layer = LinearNormNeuron(features, width, pool=False, norm=False, bias=bias, neuron=neurons, dd=dd)
            self.neck.append(layer)
            features = width
        self.finish(features, head_bias=False)
        if self.num_classes:
            self.head.fc = Voting(VOTES, self.num_classes, dd)


# --------------------------------------------------------------------------------------------------------------
# Checkpoints of the official code and of SpikingJelly
# --------------------------------------------------------------------------------------------------------------


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Rename a state dict of the authors' code or of SpikingJelly's to this model's names; ours is returned as it is.

    Both number their layers, in the same order as here.

    Args:
        state_dict: Names to tensors; may lie under 'net', 'state_dict' or 'model'.
        model: The model that it is for.
    """
    for key in ("net", "state_dict", "model"):
        state_dict = state_dict.get(key, state_dict)
    state = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if not all(name.startswith(("static_conv.", "conv.", "fc.", "conv_fc.")) for name in state):
        return state
    theirs = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
    own = {name: module for name, module in model.named_modules() if module._parameters or module._buffers}
    ours = [name for name, module in own.items() if any(t is not None for t in module.state_dict().values())]
    ours.remove("head.fc")
    names = dict(zip(theirs, ours, strict=False))
    out: dict[str, Any] = {"head.fc.weight": model.state_dict()["head.fc.weight"]}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        out[f"{names.get(module, module)}.{leaf}"] = value
    return out


# --------------------------------------------------------------------------------------------------------------
# Named models
# --------------------------------------------------------------------------------------------------------------

PLIF = (
    "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural Networks (arXiv:2007.05785)"
)
PLIF_NEURON = {"kind": "plif", "tau": 2.0, "surrogate": "arctan", "detach_reset": True}


def _row(
    widths: Sequence[Sequence[int]],
    parameters: int,
    T: int,
    note: str,
    size: int,
    in_chans: int = 3,
    num_classes: int = 10,
    **arguments: object,
) -> ModelRow:
    return ModelRow(
        {"widths": widths, "T": T, "neuron_defaults": PLIF_NEURON, **arguments},
        parameters=parameters,
        paper=PLIF,
        note=note,
        num_classes=num_classes,
        img_size=size,
        in_chans=in_chans,
        fixed_input_size=True,
    )


ROWS = {
    "plif_mnist": _row(((128,), (128,)), 13_198_980, 8, "For MNIST and Fashion-MNIST.", 28, in_chans=1, hidden=2048),
    "plif_cifar10": _row(((256,) * 3, (256,) * 3), 36_718_344, 8, "For CIFAR-10.", 32, hidden=2048, drops=(0.5, 0.0)),
    "plif_nmnist": _row(((128,),) * 2, 17_132_292, 10, "For event frames of N-MNIST.", 34, in_chans=2),
    "plif_cifar10dvs": _row(((128,),) * 4, 17_427_718, 20, "For event frames of CIFAR10-DVS.", 128, in_chans=2),
    "plif_dvs": _row(
        ((128,),) * 5, 1_698_311, 20, "For event frames of DVS128 Gesture, 11 classes.", 128, in_chans=2, num_classes=11
    ),
    "test_plif": _row(
        ((6,), (8, 8), (12,)),
        9_116,
        4,
        "Micro-model for tests.",
        32,
        hidden=24,
        drops=(0.0, 0.0),
        neuron_defaults={**PLIF_NEURON, "threshold": 0.5},
    ),
}

default_cfgs = register_rows(__name__, PLIFNet, ROWS)
