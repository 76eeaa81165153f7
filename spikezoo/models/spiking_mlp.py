"""Spiking multilayer perceptrons: the 784-h-10 nets of DynSNN's table I.

Source: DynSNN, which takes three layouts for MNIST from the literature: 340 and 500 hidden neurons with temporal
coding, 1000 with rate coding. Integrate-and-fire neurons, linear layers without biases, no norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spikezoo.checks import whole
from spikezoo.layers import LinearNormNeuron, Stem
from spikezoo.models._base import SpikingModel, init_without_norms
from spikezoo.models.spiking_vgg import DYNSNN
from spikezoo.registry import ModelRow, register_rows

__all__ = ["SpikingMLP"]


class SpikingMLP(SpikingModel):
    """Flattened pixels, spiking linear layers, and the classifier.

    Args:
        hidden: Widths of the spiking layers, one or more.
        **kwargs: Arguments of :class:`SpikingModel`.
    """

    def __init__(self, hidden: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(hidden, list | tuple) or not hidden:
            raise ValueError(f"hidden={hidden!r}: expected the widths of the hidden layers, for instance [340].")
        height, width = self.img_size
        self.fixed_img_size = True
        features = self.in_chans * height * width
        for index, size in enumerate(hidden):
            layer = LinearNormNeuron(
                features,
                whole("hidden", size),
                pool=False,
                norm=False,
                bias=False,
                neuron=self.neuron_factory,
                dd=self.dd,
            )
            features = size
            if index == 0:
                self.add_stem(Stem(layer), size, max(height, width))
            else:
                self.add_stage([layer], size, max(height, width))
        self.finish(features, head_bias=False)
        init_without_norms(self)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that ``forward_intermediates`` with these indices does not need."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.fixed_img_size = True  # the first layer is linear
        return take


def _row(hidden: int, encoding: str, T: int) -> ModelRow:
    code = {"ttfs": "Temporal", "poisson": "Rate"}[encoding]
    return ModelRow(
        {"hidden": (hidden,), "encoding": encoding, "T": T, "neuron_defaults": {"kind": "if"}},
        parameters=794 * hidden,
        paper=DYNSNN,
        note=f"784-{hidden}-10 of DynSNN's table I: {code.lower()} coding ({encoding}), IF neurons, no biases. The "
        f"paper names no number of time steps; T={T} is ours.",
        img_size=28,
        in_chans=1,
        fixed_input_size=True,
        first_conv="stem.0.linear",
    )


ROWS = {
    "spiking_mlp_340": _row(340, "ttfs", 8),
    "spiking_mlp_500": _row(500, "ttfs", 8),
    "spiking_mlp_1000": _row(1000, "poisson", 20),
    "test_spiking_mlp": ModelRow(
        {"hidden": (16, 14, 12, 10), "neuron_defaults": {"kind": "if"}},
        parameters=49_764,
        paper=DYNSNN,
        note="Micro-model for tests.",
        fixed_input_size=True,
        first_conv="stem.0.linear",
    ),
}

default_cfgs = register_rows(__name__, SpikingMLP, ROWS)
