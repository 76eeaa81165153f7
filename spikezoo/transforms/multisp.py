"""MultiSp: a lottery ticket in the patch embedding, then only the strongest patches for the blocks.

Paper: "Gaining the Sparse Rewards by Exploring Lottery Tickets in Spiking Neural Networks" (arXiv:2309.13302). Its text
leaves open by which norm patches are ranked, and whether blocks are pruned, too. Here a patch counts as much as the sum
of the magnitudes that the embedding puts out for it, over channels and time steps (for spikes: their number), and
blocks are ordinary layers.

The paper's two stages are two calls: the ticket alone (PEPSp) with ``patch_ratio=0``, which is trained and baked; then
``fixed=True`` on the result, which keeps the embedding and adds the selection. A single call trains both at once.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from spikezoo.checks import number, switch, whole
from spikezoo.layers import ConvNormNeuron, Stem, set_ternary
from spikezoo.neurons import NeuronConfig, NeuronFactory, ReLU
from spikezoo.transforms.fold import record_transform
from spikezoo.transforms.record import Model
from spikezoo.transforms.tickets import parametrise

__all__ = ["PatchSelection", "kept_patches", "multisp"]


class PatchSelection(nn.Module):
    """Keep the patches of the largest magnitude, the same ones for all time steps; the others are gone, not masked.

    Args:
        ratio: Fraction of the patches removed, in [0, 1).
    """

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def count(self, patches: int) -> int:
        """How many of so many patches are kept: the share kept, rounded up."""
        # The margin is for products such as 0.29 * 100, which is a rounding short of 29.
        return max(1, patches - int(patches * self.ratio + 1e-9))

    def mask(self, x: Tensor) -> Tensor:
        """Where ``[T, B, D, h, w]`` is kept: ``[B, h * w]``."""
        # Spikes are counted in float32: the half precisions hold no whole number above 256 or 2048 for sure.
        score = x.detach().abs().sum((0, 2), dtype=torch.promote_types(x.dtype, torch.float32)).flatten(1)
        kept = self.count(score.shape[1])
        least = score.topk(kept, 1).values[:, -1:]
        above, equal = score > least, score == least
        # Equal scores are common among spike counts: of those the first patches are kept. (topk takes any of them.)
        return above | (equal & (equal.cumsum(1) <= kept - above.sum(1, keepdim=True)))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, D, h, w]`` to ``[T, B, D, k, 1]``, the kept patches in their order."""
        mask = self.mask(x)
        patches = mask.shape[1]
        place = torch.where(mask, torch.arange(patches, device=x.device), patches)
        index = place.topk(self.count(patches), 1, largest=False).values  # ascending
        return x.flatten(3).gather(3, index[None, :, None].expand(*x.shape[:3], -1)).unsqueeze(4)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"ratio={self.ratio}"


class FixedStem(Stem):
    """A stem that stays in evaluation mode: its norms keep the statistics that they have."""

    def train(self, mode: bool = True) -> FixedStem:
        """Stay as it is."""
        return super().train(False)


def _check(model: nn.Module, convs: dict[str, nn.Conv2d], prunes: bool, fixed: bool, selects: bool) -> None:
    """Raise where the model cannot take what was asked for."""
    baked = bool(convs) and all(getattr(conv, "baked", False) for conv in convs.values())
    if selects and any(isinstance(module, PatchSelection) for module in model.modules()):
        raise ValueError("This model selects its patches already: apply 'multisp' to the model that it came from.")
    if selects and getattr(model, "mpbn", None) == "element":
        raise ValueError(
            "patch_ratio with mpbn='element': that norm has values for every place of the map, and with selected "
            "patches a place is another one in every image. Use mpbn='channel', or patch_ratio=0."
        )
    if prunes and baked:
        raise ValueError(
            "The patch embedding is a baked ticket, and its trained weights would be lost: keep it with fixed=True, or "
            "train it on with pep_sparsity=0, binary_pep=False."
        )
    if fixed and not baked:
        raise ValueError(
            "fixed=True keeps the patch embedding of the first stage, and the one of this model is no baked ticket. "
            "Train with patch_ratio=0 first (train.py bakes what it delivers, spikezoo.bake does), and start from that "
            "checkpoint; or leave fixed out to train both at once."
        )


def multisp(
    model: Model,
    pep_sparsity: float = 0.4,
    patch_ratio: float = 0.3,
    binary_pep: bool = True,
    fixed: bool = False,
    seed: int = 0,
) -> Model:
    """Prune the patch embedding's weights by a ticket, and the patches that the blocks compute on.

    The ticket is one of the stem's convolutions, with frozen weights of two values a layer (binary) or normally
    distributed ones (real); ``spikezoo.bake`` ends it. Blocks see ``ceil(n (1 - patch_ratio))`` of n patches: every
    later layer computes on so many, their feature maps are ``[B, D, k, 1]``, and the head averages them.

    With ``fixed`` the whole embedding is frozen, and its norms stay in evaluation mode. It was trained on all patches,
    as it goes on to see them, so its statistics are right as they are; and a norm of batch statistics would select the
    patches of an image by what else is in the batch, and others than in evaluation.

    Args:
        model: A Spikformer or AutoST model. It stays as it is.
        pep_sparsity: Fraction of the weights removed from every convolution of the patch embedding, in [0, 1).
        patch_ratio: Fraction of the patches removed, in [0, 1); 0 selects none (the paper's PEPSp).
        binary_pep: Whether the embedding is binary: weights of signs times a gain; activations are the spikes, or of
            the ANN twin signs in place of ReLUs. Without it and with ``pep_sparsity=0`` there is no ticket.
        fixed: Keep the embedding that the model has, a baked ticket, and only select patches.
        seed: Seed of the frozen weights.

    Returns:
        A copy with one more entry in its ``recipe``, in the mode of the model.

    Raises:
        ValueError: A fraction outside [0, 1), a model without patches, membrane normalisation by element together with
            a selection, an embedding that is a ticket already (or with ``fixed``, is none), or nothing to do.

    Examples:
        >>> model = spikezoo.create_model('spikformer_tiny', multisp=dict(pep_sparsity=0.4, patch_ratio=0.3))
    """
    number("pep_sparsity", pep_sparsity, 0, 1)
    number("patch_ratio", patch_ratio, 0, 1)
    for name, value in (("binary_pep", binary_pep), ("fixed", fixed)):
        switch(name, value)
    whole("seed", seed, 0, 2**31 - 1)
    if fixed and (pep_sparsity, binary_pep, seed) != (0.4, True, 0):
        raise ValueError("fixed=True takes the embedding as it is: leave pep_sparsity, binary_pep and seed out.")
    prunes = not fixed and (pep_sparsity > 0 or binary_pep)
    if not (prunes or fixed or patch_ratio):
        raise ValueError(
            "pep_sparsity=0, binary_pep=False and patch_ratio=0 leave nothing to do: leave multisp out, or give a "
            "patch_ratio in (0, 1)."
        )
    if not getattr(model, "has_patches", False):
        raise ValueError(
            f"MultiSp prunes a patch embedding, and {type(model).__name__} has none. Models that have one: "
            "spikformer_tiny, spikformer_small, and all of spikezoo.list_models(['spikformer*', 'autost*'])."
        )
    copied = copy.deepcopy(model)
    stem = copied.get_submodule("stem")
    assert isinstance(stem, Stem)
    convs = {f"stem.{name}": m for name, m in stem.named_modules() if isinstance(m, nn.Conv2d)}
    _check(copied, convs, prunes, fixed, patch_ratio > 0)
    if prunes:
        parametrise(
            convs, binary_pep, pep_sparsity, init="signed_constant" if binary_pep else "kaiming_normal", seed=seed
        )
        if binary_pep:
            _binarise(stem)
    for conv in {} if prunes or fixed else convs.values():  # a baked ticket is trained on with real weights
        set_ternary(conv, False)
        conv.weight.requires_grad_(True)
    if fixed:
        copied.stem = stem = FixedStem(*stem).requires_grad_(False)
    if patch_ratio:
        stem.append(PatchSelection(patch_ratio))
    arguments: dict[str, Any] = {"patch_ratio": patch_ratio, "fixed": fixed}
    if not fixed:
        arguments |= {"pep_sparsity": pep_sparsity, "binary_pep": binary_pep, "seed": seed}
    return record_transform(copied, "multisp", **arguments).train(model.training)


def _binarise(stem: nn.Module) -> None:
    """Signs in place of the stem's ReLUs; spikes are binary as they are."""
    sign = NeuronFactory(NeuronConfig(kind="sign"))
    for layer in stem.modules():
        if isinstance(layer, ConvNormNeuron) and isinstance(layer.neuron, ReLU):
            layer.neuron = sign(layer.conv.out_channels)


@torch.no_grad()
def kept_patches(model: nn.Module, x: Tensor) -> Tensor:
    """Which patches of images a model selects.

    Args:
        model: A model with a selection of patches, in evaluation mode.
        x: Images ``[B, C, H, W]`` or event frames ``[B, T, C, H, W]``.

    Returns:
        ``[B, h, w]``, True where the patch is kept.

    Raises:
        ValueError: A model that takes all patches.
    """
    selection = next((module for module in model.modules() if isinstance(module, PatchSelection)), None)
    if selection is None:
        raise ValueError("This model takes all patches: apply 'multisp' with a patch_ratio in (0, 1).")
    seen: list[Tensor] = []
    handle = selection.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)  # type: ignore[operator]
    finally:
        handle.remove()
    return selection.mask(seen[0]).unflatten(1, seen[0].shape[3:])
