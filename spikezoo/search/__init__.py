"""Search for AutoST architectures: spaces, training-free metrics, exact search, evolution.

Paper: "AutoST: Training-free Neural Architecture Search for Spiking Transformers" (arXiv:2307.00293). A net is an
embedding dimension and, for every layer, an MLP ratio and a number of heads; its depth is the number of layers. All
spaces share Spikformer's patch embedding and blocks.

    space, setting, constraints
      -> exact       analytic metrics only: the optimum of the whole space, proven, and the Pareto front
      -> evolve      any metric: the paper's evolution, seeded, resumable
      -> write       search.csv, best.yaml for train.py, search.png
"""

from spikezoo.search.evolution import Evolution, evolve
from spikezoo.search.exhaustive import Found, Result, exact, latency_ms
from spikezoo.search.metrics import (
    MEASURED,
    METRICS,
    Metric,
    batch_of,
    linear_regions,
    noise,
    ntk,
    sahd,
    score,
    snip,
    synflow,
)
from spikezoo.search.report import RECIPE, RECIPE_IMAGENET, table, train_config, write
from spikezoo.search.space import SPACES, Constraints, Cost, Net, Setting, Space, cost, window

__all__ = [
    "MEASURED",
    "METRICS",
    "RECIPE",
    "RECIPE_IMAGENET",
    "SPACES",
    "Constraints",
    "Cost",
    "Evolution",
    "Found",
    "Metric",
    "Net",
    "Result",
    "Setting",
    "Space",
    "batch_of",
    "cost",
    "evolve",
    "exact",
    "latency_ms",
    "linear_regions",
    "noise",
    "ntk",
    "sahd",
    "score",
    "snip",
    "synflow",
    "table",
    "train_config",
    "window",
    "write",
]
