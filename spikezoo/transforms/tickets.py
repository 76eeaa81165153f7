"""Lottery tickets: frozen random weights and a learned mask, real (LT, SLT) or binary (MPLT, MPSLT).

Papers: "Gaining the Sparse Rewards by Exploring Binary Lottery Tickets in SNN" (BinW-SLT, here mpslt), "Gaining the
Sparse Rewards by Exploring Lottery Tickets in SNNs" (LT, SLT, MPLT, MPSLT), after edge-popup ("What's Hidden in a
Randomly Weighted Neural Network?") and biprop ("Multi-Prize Lottery Ticket Hypothesis").

The weights of a layer stay at their random initialisation W. Learned scores S rank them: the mask M keeps those with
the largest |S|. The layer computes with M * W, or with M * gain * sign(W), where the gain is the mean |W| of the kept
weights. The scores' gradient passes straight through: dL/dS = dL/dweight * W * sign(S), the gain not multiplied in.

``sparsity`` is the fraction of the weights removed, everywhere. The code of biprop and edge-popup calls the fraction
kept its "prune rate"; "a pruning rate of 40 %" in the papers reads as removed, but cannot be told from their text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn.utils import parametrize

from spikezoo.checkpoint.sparse import seeded_signs
from spikezoo.checks import choice, nearest, number, switch, whole
from spikezoo.layers import set_ternary
from spikezoo.transforms.fold import record_transform
from spikezoo.transforms.record import Model

__all__ = ["KINDS", "bake", "release", "set_epoch", "ticket", "tune", "weighted_layers"]

# Kind -> whether the weights are binary, and the neurons that it is for.
KINDS = {
    "lt": (False, ("relu",)),
    "slt": (False, ("lif", "if", "plif")),
    "mplt": (True, ("sign",)),
    "mpslt": (True, ("lif", "if", "plif")),
}
ALIASES = {"binw_slt": "mpslt"}
INITS = ("signed_constant", "kaiming_normal")
SCOPES = ("layer", "global")
# biprop's schedule of the global threshold: from half of the weights kept to the wanted fraction.
ANNEALED_FROM, ANNEALED_EPOCHS = 0.5, 10


@torch.library.custom_op("spikezoo::top_mask", mutates_args=())
def _top_mask(scores: Sequence[Tensor], index: int, removed: Tensor) -> Tensor:
    """Mask of one of the layers: where its |score| is not in the lowest fraction ``removed`` of all layers given."""
    magnitudes = [score.detach().abs().flatten() for score in scores]
    ranked = torch.cat(magnitudes) if len(magnitudes) > 1 else magnitudes[0]
    place = int(round(removed.item() * ranked.numel(), 6))  # 0.29 of 100 is 29, not 28
    place = min(place, ranked.numel() - 1)  # where less than a millionth of a weight would be kept, one is
    kept = ranked.numel() - place
    if ranked.dtype not in (torch.float32, torch.float64):
        ranked = ranked.float()
    # Equal scores at the threshold are common among millions of floats: the first ones are kept.
    if ranked.device.type == "cpu":
        # NumPy selects ten times as fast as torch, which in turn beats a sort by as much, and counts as well.
        values = ranked.numpy()
        threshold = np.partition(values, place)[place]
        chosen = values > threshold
        chosen[np.flatnonzero(values == threshold)[: kept - np.count_nonzero(chosen)]] = True
        above = torch.from_numpy(chosen)
    else:
        threshold = ranked.kthvalue(place + 1).values
        above = ranked > threshold
        above[(ranked == threshold).nonzero().flatten()[: kept - int(above.sum())]] = True
    start = sum(m.numel() for m in magnitudes[:index])
    return above[start : start + magnitudes[index].numel()].clone().reshape(scores[index].shape)


@_top_mask.register_fake
def _(scores: Sequence[Tensor], index: int, removed: Tensor) -> Tensor:
    return torch.empty_like(scores[index], dtype=torch.bool, memory_format=torch.contiguous_format)


class _StraightThrough(torch.autograd.Function):
    """Weights forward; to what they were made from their gradient times a factor."""

    @staticmethod
    def forward(ctx: FunctionCtx, source: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return weight.clone()

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return grad * factor, None, None


class _Ranking:
    """The layers that compete for one number of kept weights: one layer, or all of a model.

    Args:
        sparsity: Fraction removed.
    """

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity
        self.layers: list[parametrize.ParametrizationList] = []
        # On the CPU, and a tensor: a number that a schedule changes would compile the model anew in every epoch.
        self.removed = torch.tensor(sparsity, dtype=torch.float64, device="cpu")

    def mask(self, index: int, own: Tensor) -> Tensor:
        """The mask of one layer, whose scores are ``own``."""
        scores = [layer.original for layer in self.layers]
        if index == len(scores):  # while it is being registered
            scores.append(own)
        return _top_mask(scores, index, self.removed)


class Ticket(nn.Module):
    """Parametrisation of a weight by scores: what is stored and learned are the scores.

    Args:
        frozen: The random weights.
        binary: Whether only their signs count.
        ranking: Whom the scores compete with.
        seed: Seed of the signs of ``frozen``.
        cumulative: Whether a weight that was once removed in training stays removed.
    """

    frozen: Tensor
    alive: Tensor | None

    def __init__(self, frozen: Tensor, binary: bool, ranking: _Ranking, seed: int, cumulative: bool = False) -> None:
        super().__init__()
        self.binary, self.seed = binary, seed
        self.ranking, self.index = ranking, len(ranking.layers)
        # Not in the state dict: the seed gives it again.
        self.register_buffer("frozen", frozen, persistent=False)
        self.register_buffer("alive", torch.ones_like(frozen, dtype=torch.bool) if cumulative else None)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Scores to start from, drawn as biprop's."""
        scores = torch.empty_like(weight)
        nn.init.kaiming_uniform_(scores, a=math.sqrt(5))
        return scores

    def forward(self, scores: Tensor) -> Tensor:
        """The masked weights, shape of the scores."""
        mask = self.ranking.mask(self.index, scores)
        if self.alive is not None:
            mask = mask & self.alive
            if self.training:
                self.alive.copy_(mask)
        values = self.frozen
        if self.binary:
            gain = (values.abs() * mask).sum() / mask.sum()
            values = gain * values.sign()
        # Not a product: minus zero would be another number.
        weight = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
        return _StraightThrough.apply(scores, self.frozen * scores.detach().sign(), weight)


class Tuned(nn.Module):
    """Parametrisation of a weight by a fixed mask: what is stored and learned is the weight.

    Args:
        weight: Where it is zero it stays zero.
        binary: Whether the forward pass takes the sign of the weights, times their mean magnitude.
    """

    mask: Tensor

    def __init__(self, weight: Tensor, binary: bool) -> None:
        super().__init__()
        self.binary = binary
        self.register_buffer("mask", weight.detach() != 0)

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weights."""
        zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
        if not self.binary:
            return torch.where(self.mask, weight, zero)
        gain = (weight.detach().abs() * self.mask).sum() / self.mask.sum()
        # A weight at zero keeps a sign, or the layer would lose it for good.
        return _StraightThrough.apply(
            weight, self.mask, torch.where(self.mask, torch.where(weight < 0, -gain, gain), zero)
        )


def made_by(layer: nn.Module) -> parametrize.ParametrizationList:
    """What makes a layer's weight; its ``original`` is what is learned."""
    found = layer.get_submodule("parametrizations.weight")
    assert isinstance(found, parametrize.ParametrizationList)
    return found


def weighted_layers(model: nn.Module, exempt: Sequence[str]) -> dict[str, nn.Conv2d | nn.Linear]:
    """Convolutions and linear layers that are not exempted, by name."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for pattern in exempt:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ValueError(
                f"exempt={pattern!r} matches no convolution and no linear layer. {nearest(pattern, found)}"
            )
    return {name: m for name, m in found.items() if not any(fnmatchcase(name, pattern) for pattern in exempt)}


def _frozen(weight: Tensor, init: str, seed: int, kept: float) -> Tensor:
    """Random weights that the seed determines: its signs, and magnitudes of the initialisation."""
    if weight.is_meta:
        return torch.empty_like(weight)  # nothing to draw for shapes alone
    fan_in = weight[0].numel()
    std = math.sqrt(2 / (fan_in * kept))
    if init == "signed_constant":
        magnitude = torch.full(weight.shape, std)
    else:
        magnitude = std * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).abs()
    signs = seeded_signs(seed, tuple(weight.shape))
    return torch.where(signs, -magnitude, magnitude).to(weight)


def parametrise(
    layers: Mapping[str, nn.Conv2d | nn.Linear],
    binary: bool,
    sparsity: float,
    *,
    scope: str = "layer",
    init: str = "signed_constant",
    scale_fan: bool = False,
    anneal: bool = False,
    seed: int = 0,
    cumulative: bool = False,
) -> None:
    """Turn the weights of layers into tickets, in place.

    Args:
        layers: The layers, by name.
        binary: Whether the weights are signs times a gain.
        sparsity: Fraction removed.
        scope: As the arguments below, that of :func:`ticket`.
        init: Frozen weights.
        scale_fan: Whether only kept inputs count for their size.
        anneal: Whether training starts at another sparsity.
        seed: Their seed.
        cumulative: Whether masks only ever shrink.

    Raises:
        ValueError: A layer that is a ticket already, or that would keep no weight.
    """
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer):
            raise ValueError(f"Layer {name!r} is a ticket already: make tickets once, of the model as created.")
        if getattr(layer, "baked", False):
            raise ValueError(
                f"Layer {name!r} is a baked ticket, and its weights would be drawn anew: train it on with 'tune', or "
                "make tickets of the model as created."
            )
    shared = _Ranking(sparsity) if scope == "global" else None
    for index, layer in enumerate(layers.values()):
        ranking = shared or _Ranking(sparsity)
        own = (seed << 16) + index
        frozen = _frozen(layer.weight.detach(), init, own, 1 - sparsity if scale_fan else 1.0)
        set_ternary(layer, binary)
        parametrize.register_parametrization(layer, "weight", Ticket(frozen, binary, ranking, own, cumulative))
        ranking.layers.append(made_by(layer))
    if shared is not None and shared.layers[0].original.device.type != "meta":
        # Scores at random say nothing of the end of a schedule, which bake checks.
        shared.removed.fill_(min(sparsity, 1 - ANNEALED_FROM) if anneal else sparsity)
        _check_none_empty(layers)
        shared.removed.fill_(sparsity)


def ticket(
    model: Model,
    kind: str = "mpslt",
    sparsity: float = 0.4,
    scope: str = "layer",
    init: str = "signed_constant",
    scale_fan: bool = False,
    anneal: bool = False,
    seed: int = 0,
    exempt: Sequence[str] = (),
    cumulative: bool = False,
) -> Model:
    """Turn the weights of all convolutions and linear layers into tickets: scores that choose among frozen weights.

    What is trained afterwards are the scores (and norms and biases, where the model has them); :func:`bake` ends it.

    Args:
        model: A model as it was created. It stays as it is.
        kind: lt (real weights, ReLU), slt (real weights, spiking neurons), mplt (binary weights, sign activations),
            mpslt or binw_slt (binary weights, spiking neurons).
        sparsity: Fraction of the weights removed, in [0, 1).
        scope: 'layer' removes that fraction of every layer, 'global' of all layers together.
        init: Frozen weights: signed_constant (two values a layer) or kaiming_normal.
        scale_fan: Count only the kept inputs of a neuron for the size of the frozen weights.
        anneal: With scope 'global': keep half of the weights at first and the wanted fraction from epoch 10 on, on a
            cubic curve (biprop); :func:`set_epoch` tells the epoch.
        seed: Seed of the frozen weights; every layer draws its own.
        exempt: Names of layers that stay ordinary, wildcards allowed, for instance ``['head.fc']``.
        cumulative: Multiply every new mask into the last one, as Algorithm 1 of BinW-SLT is printed: what was once
            removed in training stays so, and more than ``sparsity`` goes. Otherwise a weight can come back (biprop).

    Returns:
        A copy with one more entry in its ``recipe``, in the mode of the model.

    Raises:
        ValueError: A sparsity outside [0, 1), a kind that does not fit the neuron, a layer name that matches nothing, a
            layer that would keep no weight, a model that has a ticket already.
    """
    name = ALIASES.get(str(kind), str(kind))
    if name not in KINDS:
        raise ValueError(f"kind={kind!r} does not exist. {nearest(kind, (*KINDS, *ALIASES))}")
    number("sparsity", sparsity, 0, 1)
    for argument, value, valid in (("scope", scope, SCOPES), ("init", init, INITS)):
        choice(argument, value, valid)
    for argument, flag in (("scale_fan", scale_fan), ("anneal", anneal), ("cumulative", cumulative)):
        switch(argument, flag)
    whole("seed", seed, 0, 2**31 - 1)
    if anneal and scope != "global":
        raise ValueError(f"anneal=True with scope={scope!r}: the schedule is that of the global threshold.")
    exempt = [exempt] if isinstance(exempt, str) else exempt
    if not isinstance(exempt, list | tuple) or not all(isinstance(pattern, str) for pattern in exempt):
        raise ValueError(f"exempt={exempt!r}: expected names of layers, for instance ['head.fc'].")
    exempt = list(exempt)
    binary, neurons = KINDS[name]
    config = getattr(model, "neuron_config", None)
    if config is not None and config.kind not in neurons:
        fits = [k for k, (_, kinds) in KINDS.items() if config.kind in kinds]
        raise ValueError(
            f"kind={kind!r} is for neuron={' or '.join(map(repr, neurons))} and the model has {config.kind!r}: use "
            f"kind={' or '.join(map(repr, fits))}, or create the model with another neuron."
        )
    copied = copy.deepcopy(model)
    layers = weighted_layers(copied, exempt)
    if not layers:
        raise ValueError(f"Nothing to prune: exempt={exempt} leaves no convolution and no linear layer.")
    how: dict[str, Any] = {"scope": scope, "init": init, "scale_fan": scale_fan, "anneal": anneal, "seed": seed}
    parametrise(layers, binary, sparsity, **how, cumulative=cumulative)
    arguments = {"kind": name, "sparsity": sparsity, **how, "exempt": exempt}
    if cumulative:  # recipes of others stay as they were
        arguments["cumulative"] = True
    return record_transform(copied, "ticket", **arguments).train(model.training)


def _check_none_empty(layers: Mapping[str, nn.Conv2d | nn.Linear]) -> None:
    for name, layer in layers.items():
        if not layer.weight.any():
            raise ValueError(
                f"Layer {name!r} would keep no weight at all. Use scope='layer', a smaller sparsity, or exempt it."
            )


def tickets(model: nn.Module) -> dict[str, tuple[Any, Ticket | Tuned]]:
    """Layers whose weight is parametrised by a ticket, with the parametrisation, by name."""
    found = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            first = made_by(module)[0]
            if isinstance(first, Ticket | Tuned):
                found[name] = (module, first)
    return found


def set_epoch(model: nn.Module, epoch: float) -> None:
    """Tell the tickets of a model the epoch, from 0; only annealed ones listen."""
    annealed = [arguments for name, arguments in getattr(model, "recipe", []) if name == "ticket"]
    if not annealed or not annealed[-1]["anneal"]:
        return
    final = 1 - annealed[-1]["sparsity"]
    rest = max(0.0, 1 - epoch / ANNEALED_EPOCHS) ** 3
    for _, parametrization in tickets(model).values():
        if isinstance(parametrization, Ticket):
            kept = final + (ANNEALED_FROM - final) * rest
            ranking = parametrization.ranking
            ranking.removed.fill_(1 - kept if final < ANNEALED_FROM and rest else ranking.sparsity)


@torch.no_grad()
def bake(model: Model) -> Model:
    """Replace scores, frozen weights and masks by the plain weights that they give; the logits stay, bit for bit.

    Of binary kinds the weights are -gain, 0 and gain, which a checkpoint stores in little more than a bit a weight.

    Args:
        model: A model with tickets. It stays as it is.

    Returns:
        A copy with one more entry in its ``recipe``, in the mode of the model.

    Raises:
        ValueError: No tickets, or a layer that keeps no weight.
    """
    copied = copy.deepcopy(model)
    found = tickets(copied)
    if not found:
        raise ValueError("Nothing to bake: the model has no tickets. spikezoo.apply(model, 'ticket', ...) makes them.")
    set_final(copied)
    for name, (layer, parametrization) in found.items():
        if not layer.weight.any():
            raise ValueError(f"Layer {name!r} keeps no weight at all: train with scope='layer', or less sparsity.")
        weight = layer.weight
        # torch's remove_parametrizations changes the class, which the copy shares with the model it came from.
        layer.__class__ = layer.__class__.__bases__[0]
        del layer.parametrizations
        # Of two magnitudes it stays what the layer computes with: 'tune' is what trains on.
        layer.weight = nn.Parameter(weight, requires_grad=not parametrization.binary)
        layer.baked = True  # for tune
        if isinstance(parametrization, Ticket):
            layer.sign_seeds = {"weight": parametrization.seed}  # for the checkpoint
    return record_transform(copied, "bake").train(model.training)


def set_final(model: nn.Module) -> None:
    """End the schedule of annealed tickets."""
    set_epoch(model, ANNEALED_EPOCHS)


def release(model: Model, layers: Sequence[str]) -> Model:
    """Make ordinary layers of some of a baked ticket, such as the head for other classes; the others stay as they are.

    Args:
        model: A baked model. It stays as it is.
        layers: Names of layers, for instance ``['head.fc']``; what is no part of the ticket stays as it is.

    Returns:
        A copy with one more entry in its ``recipe``, in the mode of the model.

    Raises:
        ValueError: A name that is no layer.
    """
    copied = copy.deepcopy(model)
    modules: dict[str, Any] = dict(copied.named_modules())
    for name in layers:
        if name not in modules:
            raise ValueError(f"layers={layers!r}: {name!r} is no layer. {nearest(name, modules)}")
        set_ternary(modules[name], False)
        if getattr(modules[name], "baked", False):
            modules[name].baked, modules[name].sign_seeds = False, {}
            modules[name].requires_grad_(True)
    return record_transform(copied, "release", layers=list(layers)).train(model.training)


def tune(model: Model, binary: bool = False) -> Model:
    """Prepare the fine-tuning of a baked ticket: zeros stay zeros, the other weights are trained.

    Args:
        model: A baked model. It stays as it is.
        binary: Keep the weights at -gain, 0 and gain, with straight-through gradients; otherwise they become real.

    Returns:
        A copy with one more entry in its ``recipe``, in the mode of the model; :func:`bake` ends it.

    Raises:
        ValueError: A model that is not baked.
    """
    switch("binary", binary)
    copied = copy.deepcopy(model)
    layers = [module for module in copied.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    baked = [layer for layer in layers if getattr(layer, "baked", False)]
    if tickets(model) or not baked:
        applied = [name for name, _ in getattr(model, "recipe", [])]
        raise ValueError(f"Fine-tuning starts from a baked ticket and the recipe is {applied}: spikezoo.bake it first.")
    for layer in baked:
        layer.__dict__.pop("sign_seeds", None)
        set_ternary(layer, binary)
        layer.weight.requires_grad_(True)
        parametrize.register_parametrization(layer, "weight", Tuned(layer.weight, binary))
    return record_transform(copied, "tune", binary=binary).train(model.training)
