"""Results of counting: what a module cost, how neurons fired, a model's operations and energy, and their table."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Count", "CountSummary", "FiringRate", "ModuleCount", "align", "html_table"]


@dataclass(frozen=True, repr=False)
class ModuleCount:
    """What one module cost per image.

    Attributes:
        ops: The operations that it ran, for instance convolution.
        input: What they took: analog, spikes, integer spikes, scaled spikes (c=1/4), ...
        macs: Dense MACs of the forward pass, as fvcore counts them.
        macs_step: Dense MACs of one time step.
        macs_exact: MACs that analog input really needs.
        sops_exact: Synaptic operations, counted.
        macs_paper: Dense MACs on analog input.
        sops_paper: Firing rate of the input x T x dense MACs.
        rate: Mean firing rate of the input; None where it is analog.
        calls: How often the operations ran in the pass.
        weights: Number of weights; 0 for pooling and attention products.
        zero_weights: How many of them are 0.
        silent: No input spiked at all.
    """

    ops: str
    input: str
    macs: float
    macs_step: float
    macs_exact: float
    sops_exact: float
    macs_paper: float
    sops_paper: float
    rate: float | None
    calls: float
    weights: int
    zero_weights: int
    silent: bool

    def __repr__(self) -> str:
        rate = "" if self.rate is None else f" at rate {self.rate:.4f}"
        return (
            f"ModuleCount({self.ops} on {self.input}{rate}: {self.macs:,.0f} MACs, {self.sops_exact:,.1f} SOPs exact, "
            f"{self.sops_paper:,.1f} paper)"
        )


@dataclass(frozen=True, repr=False)
class FiringRate:
    """How a layer of spiking neurons fired.

    Attributes:
        rates: Spikes per neuron and image, of each time step.
        mean: Mean over the time steps.
        neurons: Neurons of the layer.
        silent: Neurons that fired at no step for no image.
        saturated: Neurons that fired at every step for every image.
    """

    rates: tuple[float, ...]
    mean: float
    neurons: int
    silent: int
    saturated: int

    def __repr__(self) -> str:
        return (
            f"FiringRate({self.mean:.4f}, T={len(self.rates)}, {self.neurons:,} neurons, {self.silent:,} silent, "
            f"{self.saturated:,} saturated)"
        )


@dataclass(frozen=True, repr=False)
class Count:
    """Operations and energy of a model, per image.

    Attributes:
        macs: Dense MACs of the forward pass, all time steps; the stem once where it sees one image.
        sops_exact: Synaptic operations, events counted one by one.
        sops_paper: Firing rate x T x dense MACs.
        energy_exact_mj: ``mac_pj * macs_exact + sop_pj * sops_exact``, in millijoule.
        energy_paper_mj: ``mac_pj * macs_paper + sop_pj * sops_paper``.
        firing_rates: Neuron layer -> rates.
        by_module: Module that ran an operation -> its share.
        uncounted: Operations without a rule, or on which fvcore and torch disagree -> calls.
        macs_step: Dense MACs of one time step: what the ANN twin costs.
        macs_exact: MACs on analog input, without zero weights and without binary weights.
        macs_paper: Dense MACs on analog input.
        sops_pooling: The part of ``sops_exact`` that pooling and averaging of spikes are.
        energy_ann_mj: ``mac_pj * macs_step``.
        norm_ops: Operations of norms, where asked for; in all energies as MACs.
        neuron_ops: Updates of membrane potentials, where asked for; in both energies of the SNN as MACs.
        memory_bytes: Weights once a time step, membrane potentials read and written once a time step.
        energy_memory_mj: ``pj_per_byte * memory_bytes`` where asked for; in no other energy.
        images: How many images the averages are of.
        T: Time steps.
        mac_pj: Energy of a MAC in picojoule.
        sop_pj: Energy of a synaptic operation in picojoule.
        pj_per_byte: Energy of moving a byte in picojoule.
    """

    macs: float
    sops_exact: float
    sops_paper: float
    energy_exact_mj: float
    energy_paper_mj: float
    firing_rates: Mapping[str, FiringRate]
    by_module: Mapping[str, ModuleCount]
    uncounted: Mapping[str, int]
    macs_step: float
    macs_exact: float
    macs_paper: float
    sops_pooling: float
    energy_ann_mj: float
    norm_ops: float
    neuron_ops: float
    memory_bytes: float
    energy_memory_mj: float | None
    images: int
    T: int
    mac_pj: float
    sop_pj: float
    pj_per_byte: float | None

    @property
    def percent_of_ann_exact(self) -> float:
        """Energy in per cent of the ANN twin's, exact column."""
        return 100 * self.energy_exact_mj / self.energy_ann_mj if self.energy_ann_mj else math.nan

    @property
    def percent_of_ann_paper(self) -> float:
        """Energy in per cent of the ANN twin's, paper column."""
        return 100 * self.energy_paper_mj / self.energy_ann_mj if self.energy_ann_mj else math.nan

    @property
    def silent(self) -> list[str]:
        """Modules whose whole input was zero."""
        return [name for name, module in self.by_module.items() if module.silent]

    def row(self) -> dict[str, Any]:
        """The columns of a results row: totals, constants and what was not counted."""
        return {
            "macs": self.macs,
            "macs_step": self.macs_step,
            "sops_paper": self.sops_paper,
            "sops_exact": self.sops_exact,
            "energy_ann_mj": self.energy_ann_mj,
            "energy_paper_mj": self.energy_paper_mj,
            "energy_exact_mj": self.energy_exact_mj,
            "percent_of_ann_paper": _plain(self.percent_of_ann_paper),
            "percent_of_ann_exact": _plain(self.percent_of_ann_exact),
            "energy_memory_mj": self.energy_memory_mj,
            "mac_pj": self.mac_pj,
            "sop_pj": self.sop_pj,
            "pj_per_byte": self.pj_per_byte,
            "count_images": self.images,
            "uncounted": dict(self.uncounted),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data for JSON."""
        return {
            **asdict(self),
            "percent_of_ann_exact": _plain(self.percent_of_ann_exact),
            "percent_of_ann_paper": _plain(self.percent_of_ann_paper),
        }

    def __repr__(self) -> str:
        return (
            f"Count({self.macs_step:,.0f} MACs a step, T={self.T}: exact {self.sops_exact:,.0f} SOPs, "
            f"{self.energy_exact_mj:.4g} mJ, {self.percent_of_ann_exact:.1f} % of the ANN twin's; paper "
            f"{self.sops_paper:,.0f} SOPs, {self.energy_paper_mj:.4g} mJ; {len(self.by_module)} modules, mean of "
            f"{self.images} images{f', {len(self.uncounted)} OPERATIONS NOT COUNTED' if self.uncounted else ''})"
        )

    def _tables(self) -> list[tuple[list[tuple[str, ...]], int]]:
        """The modules and the layers of neurons as tables, headers first, and how many columns are text."""
        lines: list[tuple[str, ...]] = [
            ("module", "operation", "input", "rate", "weights", "zero", "MACs", "SOPs exact", "SOPs paper")
        ]
        for name, m in self.by_module.items():
            rate = "" if m.rate is None else f"{m.rate:.4f}"
            zero = f"{m.zero_weights / m.weights:.1%}" if m.weights else ""
            numbers = (f"{m.macs:,.0f}", f"{m.sops_exact:,.1f}", f"{m.sops_paper:,.1f}")
            lines.append((name, m.ops, m.input, rate, f"{m.weights:,}" if m.weights else "", zero, *numbers))
        numbers = (f"{self.macs:,.0f}", f"{self.sops_exact:,.1f}", f"{self.sops_paper:,.1f}")
        lines.append(("total", "", "", "", "", "", *numbers))
        if not self.firing_rates:
            return [(lines, 3)]
        fired: list[tuple[str, ...]] = [("neurons", "number", "silent", "saturated", "rate", "rate of each step")]
        for name, r in self.firing_rates.items():
            steps = " ".join(f"{value:.4f}" for value in r.rates)
            fired.append((name, f"{r.neurons:,}", f"{r.silent:,}", f"{r.saturated:,}", f"{r.mean:.4f}", steps))
        return [(lines, 3), (fired, 1)]

    def _notes(self) -> list[str]:
        """What stands below the tables: totals, prices, and what was not counted."""
        totals = (
            f"Per image, mean of {self.images}, T={self.T}; {self.mac_pj} pJ a MAC, {self.sop_pj} pJ a SOP.\n"
            f"exact: {self.macs_exact:,.0f} MACs + {self.sops_exact:,.1f} SOPs ({self.sops_pooling:,.1f} of them "
            f"pooling) = {self.energy_exact_mj:.6g} mJ, {self.percent_of_ann_exact:.2f} % of the ANN twin's "
            f"{self.energy_ann_mj:.6g} mJ ({self.macs_step:,.0f} MACs)\n"
            f"paper: {self.macs_paper:,.0f} MACs + {self.sops_paper:,.1f} SOPs = {self.energy_paper_mj:.6g} mJ, "
            f"{self.percent_of_ann_paper:.2f} % of the ANN twin's"
        )
        if self.norm_ops or self.neuron_ops:
            totals += f"\nas MACs in these energies: {self.norm_ops:,.0f} of norms, {self.neuron_ops:,.0f} of neurons"
        if self.energy_memory_mj is not None:
            totals += (
                f"\nmemory: {self.memory_bytes:,.0f} bytes at {self.pj_per_byte} pJ = {self.energy_memory_mj:.6g} mJ"
            )
        silent = [f"Input all zero: {', '.join(self.silent)}"] if self.silent else []
        without = ", ".join(f"{name} ({calls}x)" for name, calls in self.uncounted.items())
        return [totals, *silent, f"NOT COUNTED: {without}" if without else "Not counted: nothing."]

    def table(self) -> str:
        """Text for people: a line per module, the layers of neurons, totals, and what was not counted."""
        return "\n\n".join([*(align(lines, left) for lines, left in self._tables()), *self._notes()])

    def _repr_html_(self) -> str:
        """What a notebook shows: the tables of :meth:`table`."""
        notes = "".join(f"<p>{html.escape(note).replace(chr(10), '<br>')}</p>" for note in self._notes())
        return "".join(html_table(lines, left) for lines, left in self._tables()) + notes


def _plain(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value


def align(lines: Sequence[Sequence[str]], left: int) -> str:
    """Pad the columns of a table for people; the first ``left`` ones are flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    return "\n".join(padded)


def html_table(lines: Sequence[Sequence[str]], left: int) -> str:
    """A table for notebooks, the header first; the first ``left`` columns are flush left."""

    def row(cells: Sequence[str], tag: str) -> str:
        sides = ("left" if index < left else "right" for index in range(len(cells)))
        made = (
            f'<{tag} style="text-align:{side}">{html.escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    return f"<table>{row(lines[0], 'th')}{''.join(row(line, 'td') for line in lines[1:])}</table>"


@dataclass(frozen=True, repr=False)
class CountSummary:
    """Counts averaged over images, with their spread.

    Attributes:
        mean: Averages over all images; neurons are silent where no image made them fire.
        std: Standard deviation, between pieces of ``piece`` images, of MACs, SOPs and energies; nan of one piece.
        images: Number of images.
        piece: Images in a piece; 1 makes ``std`` the spread between images.
    """

    mean: Count
    std: Mapping[str, float]
    images: int
    piece: int

    def __repr__(self) -> str:
        spread = self.std["energy_exact_mj"]
        return f"CountSummary({self.mean!r}, exact energy +- {spread:.3g} mJ between pieces of {self.piece})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the means, and their spread."""
        spread = ", ".join(f"{key} {value:.4g}" for key, value in self.std.items())
        return f"{self.mean._repr_html_()}<p>Standard deviation between pieces of {self.piece}: {spread}</p>"
