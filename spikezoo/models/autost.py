"""AutoST: Spikformers with an MLP ratio of their own in every block, as an architecture search finds them.

Paper: "AutoST: Training-free Neural Architecture Search for Spiking Transformers" (arXiv:2307.00293). It prints
parameter counts and never the nets that were found, and its code holds no result either. The nets below are the wide
and shallow ones of the paper's search spaces whose counts are nearest to the printed ones; that the search prefers wide
and shallow nets is what the paper says of it. They have 8 heads: the spaces offer 4 and 8 for every layer, and both
divide every dimension. No parameter depends on heads, and MACs do only where a head has fewer channels than there are
tokens, since the attention product then takes its other order; of the two, 8 costs less and keeps a head's width (40 to
96 channels) nearer to the 64 that the scale of the product, 1/8, is made for.

The neuron is LIF and the residual stream holds spikes, after the paper's text. The authors' code differs: it takes
``neuron='plif', residual='membrane'``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from spikezoo.models.spikformer import (
    EVENT_ARGUMENTS,
    EVENT_INPUT,
    FOUR_POOLS,
    IMAGENET_INPUT,
    SPIKFORMER_NEURON,
    Spikformer,
)
from spikezoo.models.spikformer import checkpoint_filter_fn as checkpoint_filter_fn
from spikezoo.registry import ModelRow, register_rows

AUTOST = "AutoST: Training-free Neural Architecture Search for Spiking Transformers (arXiv:2307.00293)"


def _row(dim: int, mlp_ratios: Sequence[float], parameters: int, printed: str, **arguments: object) -> ModelRow:
    note = (
        f"The paper never published its nets: this is the wide and shallow one nearest to the {printed} that it prints "
        f"({parameters / 1e6:.2f} M)."
    )
    layout = {
        "dim": dim,
        "depth": len(mlp_ratios),
        "heads": 8,
        "mlp_ratios": tuple(mlp_ratios),
        "neuron_defaults": SPIKFORMER_NEURON,
    }
    return ModelRow({**layout, **arguments}, parameters=parameters, paper=AUTOST, note=note, pool_size=(8, 8))


def _imagenet_row(dim: int, mlp_ratios: Sequence[float], parameters: int, printed: str) -> ModelRow:
    return dataclasses.replace(_row(dim, mlp_ratios, parameters, printed, **FOUR_POOLS), **IMAGENET_INPUT)


ROWS = {
    "autost_tiny": _row(320, (4, 5), 4_213_170, "4.20 M"),
    "autost_small": _row(448, (5, 5, 5), 11_470_210, "11.52 M"),
    "autost_base": _row(576, (5, 5, 5, 6, 6), 29_597_842, "29.64 M"),
    "autost_in_tiny": _imagenet_row(320, (3, 3, 3, 3), 5_973_200, "5.99 M"),
    "autost_in_small": _imagenet_row(448, (5, 5, 5, 5), 14_732_640, "14.68 M"),
    "autost_in_base": _imagenet_row(768, (3, 3, 3, 4), 34_407_496, "34.44 M"),
    "autost_dvs_tiny": dataclasses.replace(
        _row(320, (4, 5), 4_210_890, "4.20 M", **EVENT_ARGUMENTS),
        note="autost_tiny for event frames: 2 channels, 128x128, T=16. The paper never published its nets.",
        **EVENT_INPUT,
    ),
    "test_autost": dataclasses.replace(
        _row(16, (1, 2, 1), 10_164, "", heads=(2, 4, 1), residual="membrane"),
        note="Micro-model for tests: membrane residuals.",
    ),
}

default_cfgs = register_rows(__name__, Spikformer, ROWS)
