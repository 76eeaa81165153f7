"""Counting: MACs, synaptic operations, energy and firing rates of a batch, or of the first images of a loader."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import stdev
from typing import Any

from torch import Tensor, nn

from spikezoo.checks import number, switch, whole
from spikezoo.counting.mode import observe
from spikezoo.counting.observer import Observer, Tally
from spikezoo.counting.results import Count, CountSummary

__all__ = ["MAC_PJ", "SOP_PJ", "count", "count_loader"]

MAC_PJ = 4.6  # a 32-bit float multiply and add in 45 nm (Horowitz 2014), the papers' constant
SOP_PJ = 0.9  # a 32-bit float add
# What a loader's count gives the spread of.
_SPREAD = ("macs", "sops_exact", "sops_paper", "energy_exact_mj", "energy_paper_mj")


@dataclass(frozen=True)
class _Prices:
    """What an operation costs, and which of those that are free by convention count, see :func:`count`."""

    mac_pj: float
    sop_pj: float
    pj_per_byte: float | None
    norm_ops: int
    neuron_ops: bool

    def __post_init__(self) -> None:
        wanted = "an energy in picojoule, a number >= 0; the papers take mac_pj=4.6 and sop_pj=0.9"
        number("mac_pj", self.mac_pj, 0, expected=wanted)
        number("sop_pj", self.sop_pj, 0, expected=wanted)
        if self.pj_per_byte is not None:
            number("pj_per_byte", self.pj_per_byte, 0, expected=wanted)
        whole("norm_ops", self.norm_ops, 0, expected="operations per element of a norm, an integer: 0 or 4")
        switch("neuron_ops", self.neuron_ops)

    def count(self, tally: Tally, T: int) -> Count:
        """Divide sums by the number of images and price them."""
        images = tally.images
        total = {
            key: sum(getattr(row, key) for row in tally.rows.values()) / images
            for key in ("macs", "macs_step", "macs_exact", "sops_exact", "macs_paper", "sops_paper", "pooling")
        }
        norms = self.norm_ops * tally.norm_elements / images
        neurons = tally.updates / images if self.neuron_ops else 0.0
        memory = tally.memory / images

        def energy(macs: float, sops: float) -> float:
            return (self.mac_pj * (macs + (norms + neurons)) + self.sop_pj * sops) * 1e-9  # 1 pJ = 1e-9 mJ

        return Count(
            macs=total["macs"],
            sops_exact=total["sops_exact"],
            sops_paper=total["sops_paper"],
            energy_exact_mj=energy(total["macs_exact"], total["sops_exact"]),
            energy_paper_mj=energy(total["macs_paper"], total["sops_paper"]),
            firing_rates={name: fired.result() for name, fired in tally.fired.items()},
            by_module={name: row.result(images) for name, row in tally.rows.items()},
            uncounted=dict(tally.uncounted),
            macs_step=total["macs_step"],
            macs_exact=total["macs_exact"],
            macs_paper=total["macs_paper"],
            sops_pooling=total["pooling"],
            energy_ann_mj=self.mac_pj * (total["macs_step"] + self.norm_ops * tally.norm_step / images) * 1e-9,
            norm_ops=norms,
            neuron_ops=neurons,
            memory_bytes=memory,
            energy_memory_mj=None if self.pj_per_byte is None else self.pj_per_byte * memory * 1e-9,
            images=images,
            T=T,
            mac_pj=self.mac_pj,
            sop_pj=self.sop_pj,
            pj_per_byte=self.pj_per_byte,
        )


def _check_inputs(inputs: str) -> None:
    if inputs not in ("auto", "analog"):
        raise ValueError(f"inputs={inputs!r}: expected 'auto' (judge the input by its values) or 'analog'.")


def _original(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: expected a torch module, from spikezoo.create_model().")
    return getattr(model, "_orig_mod", model)


def count(
    model: nn.Module,
    batch: Tensor,
    *,
    mac_pj: float = MAC_PJ,
    sop_pj: float = SOP_PJ,
    pj_per_byte: float | None = None,
    norm_ops: int = 0,
    neuron_ops: bool = False,
    inputs: str = "auto",
) -> Count:
    """Count MACs, synaptic operations, energy and firing rates of a model, per image.

    The model runs once, in evaluation mode and without gradients, whatever modes are on around it; a compiled one as
    it was before. Weights, buffers of norms, training flags and hooks stay as they are; neurons that keep their
    membrane potential from call to call, as SpikingJelly's do, are to be reset before and after.

    Where time is shows where the first neurons fire: ``[T, B, ...]`` in SpikingJelly's multi-step mode, too; in its
    single-step mode T is the number of their calls, if the model's ``forward`` holds the loop.

    Args:
        model: A module that takes one batch.
        batch: Images ``[B, C, H, W]``, event frames ``[B, T, C, H, W]`` or ``[T, B, C, H, W]``, or what else the module
            takes.
        mac_pj: Energy of a MAC in picojoule.
        sop_pj: Energy of a synaptic operation in picojoule.
        pj_per_byte: Energy of moving a byte in picojoule, for the column of memory traffic.
        norm_ops: Operations per element of a norm, counted as MACs in the energies; 4 gives the ticket papers'
            printed energy of ResNet-19.
        neuron_ops: Count one MAC per neuron and step for the update of its membrane potential.
        inputs: 'auto' judges by its values whether the batch is spikes; 'analog' says that it is not.

    Returns:
        The counts; see :class:`Count`.

    Raises:
        ValueError: A batch that the model does not take, a model that returns nothing, energies below zero or nan.

    Examples:
        >>> print(spikezoo.count(model, images).table())
    """
    prices = _Prices(mac_pj, sop_pj, pj_per_byte, norm_ops, neuron_ops)
    _check_inputs(inputs)
    model = _original(model)
    observer = Observer(model)
    return prices.count(observe(model, batch, inputs, observer), observer.T)


def count_loader(
    model: nn.Module,
    loader: Iterable[Any],
    images: int = 64,
    *,
    piece: int = 1,
    mac_pj: float = MAC_PJ,
    sop_pj: float = SOP_PJ,
    pj_per_byte: float | None = None,
    norm_ops: int = 0,
    neuron_ops: bool = False,
    inputs: str = "auto",
) -> CountSummary:
    """Average counts over the first images of a loader.

    Args:
        model: The model.
        loader: Batches, or pairs of a batch and labels.
        images: How many images; fewer where the loader has fewer.
        piece: Images counted at once; 1 gives the spread between images, more is faster.
        mac_pj: See :func:`count`, as the rest.
        sop_pj: See :func:`count`.
        pj_per_byte: See :func:`count`.
        norm_ops: See :func:`count`.
        neuron_ops: See :func:`count`.
        inputs: See :func:`count`.

    Raises:
        ValueError: An empty loader, or what :func:`count` raises for.
    """
    prices = _Prices(mac_pj, sop_pj, pj_per_byte, norm_ops, neuron_ops)
    _check_inputs(inputs)
    whole("images", images)
    whole("piece", piece)
    model = _original(model)
    first = next(iter(model.parameters()), None)
    observer = Observer(model)
    total = Tally()
    spread: list[Count] = []
    for item in loader:
        batch = item[0] if isinstance(item, list | tuple) and item else item
        if not isinstance(batch, Tensor) or batch.dim() == 0:
            raise ValueError(
                f"The loader gave a {type(item).__name__}: expected a tensor of images, or a pair of images and labels."
            )
        batch = batch[: images - total.images]
        for part in batch.split(piece):
            part = part if first is None else part.to(first.device)
            tally = observe(model, part, inputs, observer)
            if tally.images != len(part):
                raise ValueError(
                    f"The model takes {tuple(batch.shape)} as [T, B, ...], time first, and a loader's batches are cut "
                    "along their first axis: give batches [B, ...] that the model turns itself, or count(model, batch)."
                )
            if len(part) == piece or not spread:
                spread.append(prices.count(tally, observer.T))
            total.add(tally)
        if total.images >= images:
            break
    if total.images == 0:
        raise ValueError("The loader gave no images: expected at least one batch.")
    std = {key: stdev(getattr(c, key) for c in spread) if len(spread) > 1 else math.nan for key in _SPREAD}
    return CountSummary(prices.count(total, observer.T), std, total.images, piece)
