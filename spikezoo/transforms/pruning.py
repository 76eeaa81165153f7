"""Pruning of weights while they are trained: by magnitude, Deep R and gradient rewiring, DynSNN's baselines.

Papers: "To Prune, or Not to Prune" (Zhu and Gupta 2017; the smallest weights go, more after every epoch), "Deep
Rewiring: Training Very Sparse Deep Networks" (Bellec et al. 2018, algorithm 1), "Pruning of Deep Spiking Neural
Networks through Gradient Rewiring" (Chen et al. 2021). Updates are those of the last one's authors' code, which has
Deep R, too, but for the steps of penalty and noise, which there grow by Adam's correction of its first steps.

The last two give every weight a sign that stays and a strength that is learned: the weight is sign * max(strength, 0),
so that one whose strength falls to zero is dormant. Penalty and noise act on the strengths at the learning rate, beside
the optimizer's step, as in that code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spikezoo.checks import choice, number, whole
from spikezoo.transforms.fold import record_transform, refuse_tickets, set_recipe
from spikezoo.transforms.record import Model, Training
from spikezoo.transforms.tickets import made_by, weighted_layers

__all__ = ["METHODS", "after_epoch", "deliver", "prune", "report", "start"]

METHODS = ("magnitude", "deep_r", "gradient_rewiring")
AWAKENED = 1e-8  # the strength that a dormant weight starts again from, the authors' eps


class Kept(nn.Module):
    """Parametrisation of a weight by a mask: True where it is kept."""

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight, shape of the weight."""
        return torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


class Strength(nn.Module):
    """Parametrisation of a weight by a sign that stays and a strength that is learned.

    Args:
        weight: The weight to start from.
        through: Whether the gradient of a dormant weight passes to its strength (gradient rewiring), or none (Deep R).
    """

    sign: Tensor
    updates: Tensor

    def __init__(self, weight: Tensor, through: bool) -> None:
        super().__init__()
        self.through = through
        self.register_buffer("sign", torch.where(weight.detach() < 0, -1.0, 1.0).to(weight))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # which noise comes next

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The strengths to start from."""
        return weight.abs()

    def forward(self, strength: Tensor) -> Tensor:
        """The weight, shape of the strengths."""
        awake = strength.relu()
        return self.sign * (strength + (awake - strength).detach() if self.through else awake)


def prune(
    model: Model,
    method: str = "magnitude",
    sparsity: float = 0.9,
    penalty: float = 1e-3,
    temperature: float = 0.0,
    until: int | None = None,
    exempt: Sequence[str] = (),
) -> Model:
    """Prepare the weights of all convolutions and linear layers to be pruned while they are trained.

    Args:
        model: A model as it was created or trained. It stays as it is.
        method: 'magnitude': after every epoch the smallest weights of all layers together go, a share that grows as
            ``1 - (1 - epoch / until) ** 3`` to the wanted one. 'deep_r': every layer keeps that share of its weights
            from the start; whenever weights fall dormant, as many others, drawn at random, start from zero.
            'gradient_rewiring': gradients of dormant weights go on moving their strengths, and a prior draws all of
            them to a place below zero, so that about the wanted share is dormant; what it is in the end is the result.
        sparsity: Fraction of the weights removed, in [0, 1); of gradient rewiring at least 0.5, as its prior needs.
        penalty: alpha of both papers, the pull on every strength as a multiple of the learning rate.
        temperature: Of Deep R: its noise is normal, times this and the root of the learning rate (the paper's
            ``sqrt(2 T)``); the authors of gradient rewiring take none.
        until: Of magnitude: the epoch after which the wanted share is gone; None for half of the run.
        exempt: Names of layers that stay whole, wildcards allowed.

    Returns:
        A copy with one more entry in its ``recipe``, in the mode of the model.

    Raises:
        ValueError: An argument that makes no sense, weights that are a ticket's.

    Examples:
        >>> model = spikezoo.create_model('spiking_mlp_340', prune=dict(method='deep_r', sparsity=0.95))
    """
    choice("method", method, METHODS)
    number("sparsity", sparsity, 0, 1)
    number("penalty", penalty, 0)
    number("temperature", temperature, 0)
    if until is not None:
        whole("until", until)
    if method == "gradient_rewiring" and sparsity < 0.5:
        raise ValueError(f"sparsity={sparsity} with method='gradient_rewiring': its prior needs 0.5 or more.")
    if method == "gradient_rewiring" and not penalty:
        raise ValueError("penalty=0.0 with method='gradient_rewiring': the prior is what prunes, give it 1e-3.")
    refuse_tickets(model)
    copied = copy.deepcopy(model)
    exempt = [exempt] if isinstance(exempt, str) else list(exempt)
    layers = weighted_layers(copied, exempt)
    if not layers:
        raise ValueError(f"Nothing to prune: exempt={exempt} leaves no convolution and no linear layer.")
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        if method == "magnitude":
            parametrize.register_parametrization(layer, "weight", Kept(layer.weight))
            continue
        parametrize.register_parametrization(layer, "weight", Strength(layer.weight, method == "gradient_rewiring"))
        if method == "deep_r":
            strength = _strength(layer)
            with torch.no_grad():
                order = torch.randperm(strength.numel(), generator=generator)
                strength.view(-1)[order[_most_awake(strength, sparsity) :].to(strength.device)] = 0
    arguments = {"method": method, "sparsity": sparsity, "penalty": penalty, "temperature": temperature}
    return record_transform(copied, "prune", **arguments, until=until, exempt=exempt).train(model.training)


def _most_awake(strength: Tensor, sparsity: float) -> int:
    return strength.numel() - int(round(sparsity * strength.numel(), 6))  # 0.29 of 100 is 29, not 28


def _parts(model: nn.Module) -> dict[str, tuple[Any, Kept | Strength]]:
    """Layers that are being pruned, with their parametrisation, by name."""
    found = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            first = made_by(module)[0]
            if isinstance(first, Kept | Strength):
                found[name] = (module, first)
    return found


def _strength(layer: nn.Module) -> Tensor:
    return made_by(layer).original


def start(training: Training, facts: Mapping[str, Any]) -> None:
    """Let penalty, noise and rewiring follow every step of the optimizer.

    Args:
        training: The run.
        facts: The transform's arguments.

    Raises:
        ValueError: A run that ends before ``until``, or that averages its strengths.
    """
    if facts["method"] == "magnitude":
        if (facts["until"] or 0) > training.epochs:
            raise ValueError(f"--prune ends after epoch {facts['until']}, and the run has --epochs {training.epochs}.")
        return
    if training.ema is not None:
        raise ValueError(f"--prune method={facts['method']} with --model-ema: means of strengths are hardly ever zero.")
    layers = [(layer, part) for layer, part in _parts(training.model).values() if isinstance(part, Strength)]
    # Of gradient rewiring the place below zero that the prior draws to: a Laplace distribution's, of which the share
    # `sparsity` is below zero.
    center = math.log(2 * (1 - facts["sparsity"])) / facts["penalty"] if layers[0][1].through else 0.0
    sides: list[Tensor] = []

    @torch.no_grad()
    def before(*_: object) -> None:
        sides[:] = [torch.sign(_strength(layer) - center) for layer, _ in layers]

    @torch.no_grad()
    def after(optimizer: torch.optim.Optimizer, *_: object) -> None:
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for index, ((layer, part), side) in enumerate(zip(layers, sides, strict=True)):
            strength = _strength(layer)
            rate = rates[id(strength)]
            if part.through:
                strength.sub_(side, alpha=rate * facts["penalty"])
            else:
                # The same noise on every process, and in a run that was resumed.
                seed = (training.seed << 48) ^ (index << 36) ^ int(part.updates)
                generator = torch.Generator().manual_seed(seed % 2**63)
                _rewire(strength, side, rate, facts, generator)
            part.updates += 1

    training.optimizer.register_step_pre_hook(before)
    training.optimizer.register_step_post_hook(after)


def _rewire(strength: Tensor, awake: Tensor, rate: float, facts: Mapping[str, Any], generator: torch.Generator) -> None:
    """Deep R after a step: penalty and noise on what was awake, and as many drawn anew as are dormant too many."""
    strength.sub_(rate * facts["penalty"])
    if facts["temperature"]:
        noise = torch.randn(strength.shape, generator=generator).to(strength)
        strength.add_(noise, alpha=facts["temperature"] * math.sqrt(rate))
    # What was dormant has no gradient, but an optimizer with momentum moves it all the same.
    strength.mul_(awake).clamp_(min=0)
    flat = strength.view(-1)
    dormant = (flat == 0).nonzero().flatten()
    missing = _most_awake(strength, facts["sparsity"]) - (flat.numel() - len(dormant))
    if missing > 0:
        flat[dormant[torch.randperm(len(dormant), generator=generator)[:missing].to(dormant.device)]] = AWAKENED


@torch.no_grad()
def after_epoch(training: Training, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of magnitude, remove the smallest weights; returns the share of the weights that is zero, in per cent.

    Args:
        training: The run.
        facts: The transform's arguments.
    """
    if facts["method"] == "magnitude":
        until = facts["until"] or max(1, training.epochs // 2)
        share = facts["sparsity"] * (1 - max(0.0, 1 - training.epoch / until) ** 3)
        layers = [layer for layer, _ in _parts(training.model).values()]
        sizes = torch.cat([layer.weight.abs().flatten() for layer in layers])
        masks = torch.ones_like(sizes, dtype=torch.bool)
        # A stable order: of equal ones, those that are zero already above all, the first go.
        masks[sizes.argsort(stable=True)[: int(round(share * len(sizes), 6))]] = False
        for model in filter(None, (training.model, training.ema)):
            parts = [part for _, part in _parts(model).values() if isinstance(part, Kept)]
            for part, mask in zip(parts, masks.split([part.mask.numel() for part in parts]), strict=True):
                part.mask.copy_(mask.view(part.mask.shape))
    return {"weights_removed": _removed([layer.weight for layer, _ in _parts(training.model).values()])}


def _removed(weights: Sequence[Tensor]) -> float:
    return 100 * sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@torch.no_grad()
def deliver(model: nn.Module) -> nn.Module:
    """The model with plain weights, zeros where they were removed; the logits stay, bit for bit.

    Args:
        model: A model whose weights are being pruned. It stays as it is.
    """
    copied = copy.deepcopy(model)
    for layer, _ in _parts(copied).values():
        weight = layer.weight
        layer.__class__ = layer.__class__.__bases__[0]  # torch's removal would change the class that both share
        del layer.parametrizations
        layer.weight = nn.Parameter(weight)
    set_recipe(copied, [(name, facts) for name, facts in getattr(model, "recipe", []) if name != "prune"])
    return copied


def report(model: nn.Module) -> dict[str, Any]:
    """Of a delivered model: the share of the weights of convolutions and linear layers that is zero, in per cent."""
    return {"weights_removed": _removed([layer.weight for layer in weighted_layers(model, ()).values()])}
