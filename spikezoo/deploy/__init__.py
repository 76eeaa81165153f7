"""Deployment: a trained model in the form that evaluates fastest and gives the same answer.

Four precisions, and ``auto``, which chooses one of them for this model and this processor. ``exact`` fires the same
spikes as the model, in float32. ``bf16`` computes convolutions and linear layers on spikes in bfloat16, the first
layer, norms and membrane potentials in float32. ``int8`` keeps spikes as bytes and multiplies them with eight-bit
weights, summed in 32 bits. ``bits`` is ``int8`` with spikes of one bit between the layers that can read them, each
computed in the way that is fastest here, with the same sums and the same spikes.

Weights that are whole numbers times a scale, as those of a baked binary ticket (-1, 0 and +1) and those that
:func:`spikezoo.sparse.round_to_levels` made, are these whole numbers in ``bf16`` and ``int8``, and scale and norm
come after the sum: in ``int8`` the potentials are the model's, of a ticket in every bit. In ``bf16`` only the sum is
rounded, and since the distance to the threshold is what is summed, that is finest where the spike is decided.

Everything up to the features is compiled as one graph, in which the neuron is one pass over all time steps with the
norm before it and the residual join. The head runs as it is. ``Deployed.save`` writes the compiled model to a file.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from tqdm import tqdm

from spikezoo.checks import choice, finite
from spikezoo.deploy.bf16 import to_bf16
from spikezoo.deploy.bits import Spikes, methods, to_bits
from spikezoo.deploy.int8 import EightBit, to_int8, whole_numbers, whole_signals
from spikezoo.deploy.kernel import compiler, instructions, kernel
from spikezoo.deploy.norms import ExactNorm, exact_norms
from spikezoo.deploy.package import LoadedModel, load_deployed, save_deployed
from spikezoo.graph import Graph, trace
from spikezoo.layers import StepScale
from spikezoo.neurons import SpikingNeuron
from spikezoo.precision import fast_bfloat16
from spikezoo.transforms import fold_mpbn
from spikezoo.transforms.multisp import PatchSelection
from spikezoo.transforms.tickets import tickets

__all__ = [
    "PRECISIONS",
    "Deployed",
    "EightBit",
    "ExactNorm",
    "LoadedModel",
    "deploy",
    "has_compiler",
    "load_deployed",
]

PRECISIONS = ("exact", "bf16", "int8", "bits")
# The compiler unrolls the loop over time: longer sequences run in parts of so many steps, or it would take minutes,
# memory would grow, and feature maps of all steps would leave the processor's caches.
PART = 8
_LOG = logging.getLogger("spikezoo")


def has_compiler() -> bool:
    """Whether there is the C++ compiler that torch.compile needs on a CPU."""
    return compiler() is not None


class Deployed(nn.Module):
    """A model for evaluation in one precision; made by :func:`deploy`.

    Attributes:
        model: The changed copy of the model.
        precision: exact, bf16, int8 or bits.
        notes: What was done and what could not be, in one line each.
        shapes: Of the inputs that it has seen, each of which was compiled for.
        neurons: Of the model, in its order.
        part: How many time steps one graph has at most.
    """

    def __init__(self, model: nn.Module, precision: str, compiled: bool, notes: list[str]) -> None:
        super().__init__()
        self.model, self.precision, self.notes = model, precision, notes
        self.shapes: set[tuple[int, ...]] = set()
        self.neurons = [module for module in model.modules() if isinstance(module, SpikingNeuron)]
        self.part = PART
        # Patches are chosen by the spikes of all time steps, each step has a factor of its own, and bits are one form.
        self._whole = any(isinstance(module, PatchSelection | StepScale | Spikes) for module in model.modules())
        self.compiled = compiled
        self._compile()
        self.eval()

    def _compile(self) -> None:
        # A compiler's own choice of memory formats changes the roundings of convolutions: only bf16 leaves it to it.
        options: dict[str, Any] = {"layout_optimization": self.precision == "bf16"}
        self._features: Callable[[Tensor], Tensor] = self._sequence
        self._part: Callable[..., tuple[Tensor, list[list[Tensor]]]] = self._few_steps
        if self.compiled:
            self._features = torch.compile(self._sequence, dynamic=False, options=options)
            self._part = torch.compile(self._few_steps, dynamic=False, options=options)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_features", "_part", "shapes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.shapes = set()
        self._compile()  # a copy compiles its own layers

    def _sequence(self, x: Tensor) -> Tensor:
        x = self.model.forward_sequence(x)  # type: ignore[operator]
        # A mean of whole numbers is exact in any order; it is what the head takes.
        return x.float().mean(0)

    def _few_steps(self, frames: Tensor, T: int, potentials: list[list[Tensor]]) -> tuple[Tensor, list[list[Tensor]]]:
        """Sum of the features over a part of the time steps, and the membrane potentials after it."""
        left: list[list[Tensor]] = [[] for _ in self.neurons]
        for neuron, before, after in zip(self.neurons, potentials, left, strict=True):
            neuron.carry = (list(before), after)
        try:
            x = self.model.forward_frames(frames, T)  # type: ignore[operator]
        finally:
            for neuron in self.neurons:
                neuron.carry = None
        return x.float().sum(0), left

    def _in_parts(self, x: Tensor) -> Tensor:
        frames, T = self.model.encode(x)  # type: ignore[operator]
        total: Any = 0
        potentials: list[list[Tensor]] = [[] for _ in self.neurons]
        for start in range(0, T, self.part):
            steps = min(self.part, T - start)
            part = frames if len(frames) == 1 else frames[start : start + steps]
            features, potentials = self._part(part, steps, potentials)
            total = total + features
        return total / T

    def _time(self, x: Tensor) -> None:
        """Let layers on bits find their fastest way with inputs of a new shape."""
        layers = [module for module in self.model.modules() if isinstance(module, Spikes)]
        for layer in layers:
            layer.tuned = False
        if layers:
            self._sequence(x)
            kept = [note for note in self.notes if not note.startswith("layers on bits: ")]
            self.notes[:] = [*kept, f"layers on bits: {methods(layers)}"]

    def whole(self, T: int) -> bool:
        """Whether so many time steps are one graph, not parts that pass their membrane potentials on."""
        return self.part >= T or self._whole

    def save(self, path: str | Path, example: Tensor | None = None) -> Path:
        """Write the compiled model to a file that :func:`load_deployed` loads in a second, without a compiler.

        The file holds machine code and weights for one shape of input, this torch and this kind of processor; of a
        model on bits also its tables. Before it takes its name it is loaded and compared: the same logits, in every
        bit but of ``bf16``.

        Args:
            path: File to write, ``.pt2``.
            example: Input of the shape to compile for; None takes the one shape that the model has seen.

        Returns:
            The path.

        Raises:
            ValueError: Another suffix, no shape or several, no compiler, a model on a GPU or of a random encoding, or
                a file that gave other logits; nothing is written then.

        Examples:
            >>> spikezoo.deploy(model.eval(), 'int8', example=images).save('net.pt2')
        """
        return save_deployed(self, path, example)

    def train(self, mode: bool = True) -> Deployed:
        """Stay in evaluation mode.

        Raises:
            ValueError: Asked to train.
        """
        if mode:
            raise ValueError("A deployed model cannot be trained: train the model that it was made from.")
        return super().train(False)

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Nothing: weights are constants of what was compiled.

        Raises:
            ValueError: Always.
        """
        raise ValueError("A deployed model keeps its weights: load them into the model and call spikezoo.deploy again.")

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` in float32, of images ``[B, C, H, W]`` or event frames ``[B, T, C, H, W]``.

        Raises:
            ValueError: A shape that the model does not take, or an input that is not finite: a neuron turns nan into
                silence, and logits of nothing would look like logits.
        """
        self.model.check_input(x)  # type: ignore[operator]
        x = finite(x.float())
        new = tuple(x.shape) not in self.shapes
        fresh = self.compiled and new
        if new:
            if self.shapes and self.compiled:
                _LOG.warning("Input of shape %s: compiling anew, once for every shape.", tuple(x.shape))
            self.shapes.add(tuple(x.shape))
        if x.dim() == 4:
            bf16 = self.precision == "bf16"  # torch.save cannot store a memory format in an attribute
            x = x.contiguous(memory_format=torch.channels_last if bf16 else torch.contiguous_format)
        words = f"deploy: compiling for inputs of {tuple(x.shape)}, up to some minutes"
        # Frozen weights are laid out once for the processor, which changes roundings: not for 'exact' and 'int8'.
        # Only a patch of the whole configuration freezes; as an option of torch.compile it does nothing.
        # An autocast around the call would compute in another precision than this one.
        with (
            tqdm(desc=words, bar_format="{desc}", disable=None if fresh else True, leave=False),
            inductor.patch(freezing=self.precision == "bf16") if self.compiled else nullcontext(),
            torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext(),
        ):
            if new:
                self._time(x)
            T: Any = self.model.T if x.dim() == 4 else x.shape[1]
            features = self._features(x) if self.whole(T) else self._in_parts(x)
            return self.model.forward_head(features)  # type: ignore[operator]

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"precision={self.precision}, {'; '.join(self.notes)}"


def _check(model: nn.Module, precision: str) -> None:
    choice("precision", precision, ("auto", *PRECISIONS))
    if not hasattr(model, "forward_sequence"):
        raise ValueError(
            f"deploy takes a model of this library with its head, and got {type(model).__name__}: make one with "
            "spikezoo.create_model."
        )
    if model.training:
        raise ValueError("The model is in training mode: deploy evaluates. Call model.eval() first.")
    pending = tickets(model)
    if pending:
        raise ValueError(
            f"Layer {next(iter(pending))!r} is a ticket with scores: deploy spikezoo.bake(model), which has weights."
        )
    weird = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if weird:
        raise ValueError(f"The model has parameters of {', '.join(map(str, weird))}: deploy model.float().")


def _check_spikes(model: nn.Module, precision: str, device: torch.device) -> None:
    what = "bytes" if precision == "int8" else "bits"
    if not any(isinstance(module, SpikingNeuron) for module in model.modules()):
        raise ValueError(
            f"precision={precision!r} keeps spikes as {what} and this model has none: use precision='bf16'."
        )
    if device.type != "cpu":
        raise ValueError(
            f"precision={precision!r} runs on the CPU and the model is on {device}: use precision='bf16' there."
        )


def _in_bits(model: nn.Module, graph: Graph) -> tuple[str, str, bool]:
    """Let layers in eight bits hand on bits; without the kernel they stay, and the precision is int8."""
    try:
        kernel()
    except ValueError as error:
        _LOG.warning("%s The model is deployed in int8.", error)
        return "int8", f"int8 in place of bits: {error}", False
    note, whole = to_bits(model, graph)
    return "bits", note, whole


def _rounded(model: nn.Module, graph: Graph) -> bool:
    """Whether all layers on spikes have weights that are whole numbers times a scale, so that eight bits hold them."""
    whole = whole_signals(graph)
    layers = [node.module for node in graph.of("layer") if node.name != "head.fc" and node.inputs[0] in whole]
    return bool(layers) and all(
        isinstance(layer, nn.Conv2d | nn.Linear) and whole_numbers(layer) is not None for layer in layers
    )


def _fastest(model: nn.Module, shape: torch.Size | None, device: torch.device) -> tuple[str, str]:
    """The precision for a model on this processor that is fastest without rounding weights, and why."""
    try:
        graph = trace(model, shape)
        graph.check_called_once("deploy")
    except ValueError as error:  # a model of the user's own may be one that only 'exact' takes
        return "exact", str(error)
    spiking = any(isinstance(module, SpikingNeuron) for module in model.modules())
    if device.type == "cpu" and spiking and has_compiler() and _rounded(model, graph):
        if torch.cpu._is_amx_tile_supported():
            return "int8", "weights are whole numbers, and this processor multiplies tiles of bytes"
        if instructions() != "plain":
            return "bits", f"weights are whole numbers, and this processor has {instructions()}"
    if fast_bfloat16(device):
        return "bf16", "this processor has bfloat16 instructions"
    return "exact", "this processor has no bfloat16 instructions"


@torch.no_grad()
def deploy(model: nn.Module, precision: str = "auto", example: Tensor | None = None) -> Deployed:
    """Turn a trained model into the fastest one that gives the same answer.

    Args:
        model: A model of this library in evaluation mode, float32; tickets baked. It stays as it is.
        precision: ``auto``: ``bits`` (with AMX ``int8``) for weights that are whole numbers times a scale, as tickets
            and the weights that come with the package, else ``bf16`` where the processor has its instructions, else
            ``exact``; the choice is in ``precision`` and the first of ``notes``, and never rounds weights to eight
            bits. ``exact``: the same spikes as the model, in float32. ``bf16``: weights and spikes in bfloat16, the
            first layer, norms and membrane potentials in float32. ``int8``: layers on spikes in eight bits with 32-bit
            sums; bit for bit the model where those layers are baked binary tickets, otherwise weights rounded per
            channel, which changes nothing in those that :func:`spikezoo.sparse.round_to_levels` made, such as the
            weights that come with the package. ``bits``: the same sums and spikes, one bit each between layers that
            can read them, every layer in the way that a short timing at the first call of a shape finds fastest; a
            net all of whose parts are such needs no compilation but that of the kernel, once.
        example: Input of the shape that will be used, ``[B, C, H, W]`` or ``[B, T, C, H, W]``, which is compiled at
            once; None compiles at the first call. Another shape is compiled anew, once.

    Returns:
        A module that maps inputs to logits. Its ``notes`` say what was done.

    Raises:
        ValueError: Training mode, unknown precision, tickets that are not baked, another dtype than float32, int8 or
            bits of a model without spikes or on a GPU.

    Examples:
        >>> fast = spikezoo.deploy(model.eval(), 'bf16', example=images)
        >>> logits = fast(images)
    """
    _check(model, precision)
    notes: list[str] = []
    copied: Any = copy.deepcopy(model).requires_grad_(False)
    device = next(copied.parameters()).device
    if precision == "auto":
        precision, why = _fastest(copied, None if example is None else example.shape[1:], device)
        notes.append(f"{precision} by auto: {why}")
    if precision in ("int8", "bits"):
        _check_spikes(copied, precision, device)
    if any(isinstance(m, SpikingNeuron) and m.norm is not None for m in copied.modules()):
        copied = fold_mpbn(copied)
        notes.append("membrane norms folded into thresholds")
    if example is not None:
        copied.check_input(example)
    shape = None if example is None else example.shape[1:]
    graph = None if precision == "exact" else trace(copied, shape)
    if graph is not None:
        graph.check_called_once("deploy")
    if precision != "bf16":
        notes += filter(None, [exact_norms(copied)])
    if precision == "bf16" and graph is not None:
        notes.append(to_bf16(copied, graph))
        if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
            _LOG.warning("This processor has no bfloat16 instructions: precision='bf16' may be slower than 'exact'.")
    whole = False  # whether nothing is left to be compiled
    if precision in ("int8", "bits") and graph is not None:
        notes.append(to_int8(copied, graph))
        if precision == "bits":
            precision, note, whole = _in_bits(copied, graph)
            notes.append(note)
        if precision == "int8" and not torch.cpu._is_vnni_supported():
            _LOG.warning("This processor has no eight-bit dot products: precision='int8' may be slower than 'exact'.")
    if precision == "bf16":
        copied = copied.to(memory_format=torch.channels_last)
    compiled = not whole and (device.type != "cpu" or has_compiler())
    if not compiled and not whole:
        _LOG.warning("No C++ compiler found: the model runs uncompiled. Install g++, or set CXX.")
    deployed = Deployed(copied, precision, compiled, notes)
    if example is not None:
        deployed(example)
    return deployed
