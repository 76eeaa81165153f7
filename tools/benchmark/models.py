"""The models to measure, settled so that they fire as trained ones do, and narrowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import spikezoo
from spikezoo.models._base import SpikingModel
from spikezoo.neurons import MembraneNorm
from spikezoo.observe import firing_rates
from spikezoo.transforms.dynsnn import masks_of
from tools.benchmark.settings import Settings

SETTLED = 8  # images whose statistics a random net gets


def random_images(model: SpikingModel, number: int) -> Tensor:
    """Random input of a model ``[number, ...]``: normal, or of codes that take pixels in [0, 1], uniform."""
    draw = torch.randn if model.encoding == "direct" else torch.rand
    return draw(number, *model.input_shape, device=next(model.parameters()).device)


@torch.no_grad()
def settle(model: nn.Module, images: Tensor) -> None:
    """Give the norms of a random net the statistics of some images, so that its neurons fire in evaluation."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm | MembraneNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@torch.no_grad()
def wake(model: SpikingModel, images: Tensor) -> dict[str, float]:
    """Make layers without norm fire by doubling their weights, which changes no time; return all firing rates.

    Raises:
        ValueError: Every image gets the same logits all the same, so that no comparison of logits would mean anything.
    """
    rates: dict[str, float] = {}
    for _ in range(64):
        rates = {name: float(rate.mean()) for name, rate in firing_rates(model, images).items()}
        owners = (model.get_submodule(name.rpartition(".")[0]) for name, rate in rates.items() if rate < 0.01)
        bare = (m for m in owners if not any(isinstance(n, _BatchNorm | MembraneNorm) for n in m.modules()))
        first = next(bare, None)
        if first is None:
            break
        for module in first.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight *= 2
    logits = model(images)
    if rates and torch.equal(logits, logits[:1].expand_as(logits)):
        silent = [name for name, rate in rates.items() if rate == 0]
        raise ValueError(
            f"This random net gives every image the same logits, silent layers {', '.join(silent) or 'none'}: nothing "
            "to compare. Use a larger T or img_size, or less sparsity."
        )
    return rates


@torch.no_grad()
def narrowed(model: SpikingModel, width: float) -> SpikingModel:
    """Keep a fraction of the channels of every layer, the first ones of random weights."""
    masked = spikezoo.apply(model, "dynsnn", per="channel")
    for mask in masks_of(masked).values():
        mask[max(1, round(width * len(mask))) :] = False
    return spikezoo.compact(masked)


def make_model(settings: Settings, **changes: Any) -> SpikingModel:
    """The network of a benchmark: random weights, settled norms, in evaluation mode; ``rates`` are its firing rates.

    Args:
        settings: What to measure.
        **changes: Further arguments of ``create_model``.
    """
    given = {"T": settings.T, "img_size": settings.img_size, "num_classes": settings.num_classes, **changes}
    if given.get("neuron") != "relu":
        given["surrogate"] = settings.surrogate
    torch.manual_seed(0)
    model: Any = spikezoo.create_model(settings.model, device=settings.device, **given)
    if settings.width is not None:
        model = narrowed(model, settings.width)
    if settings.ticket is not None:
        model = spikezoo.bake(spikezoo.apply(model, "ticket", kind="mpslt", sparsity=settings.ticket))
    images = random_images(model, SETTLED)
    settle(model, images)
    model.rates = wake(model, images)
    return model
