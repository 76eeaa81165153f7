"""A deployed model in one file: loads in a second, in a process that compiles nothing.

The file is a ``.pt2`` of torch's ahead-of-time compiler, for one shape of input, with two members of our own: what the
model is with a digest of every other member, and, of one on bits, its layers and their kernel.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import secrets
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._inductor import aot_compile
from torch._inductor.package import load_package, package_aoti
from tqdm import tqdm

from spikezoo.checkpoint import atomic
from spikezoo.checks import finite
from spikezoo.deploy.bits import Call, Packed, Spikes, register
from spikezoo.deploy.int8 import EightBit, forget
from spikezoo.deploy.kernel import compiler, instructions, library, place, processor

if TYPE_CHECKING:
    from spikezoo.deploy import Deployed

__all__ = ["LoadedModel", "load_deployed", "save_deployed"]

FACTS, CALLS, KERNEL = "spikezoo/model.json", "spikezoo/bits.pt", "spikezoo/bits.kernel"
SUFFIX = ".pt2"
VERSION = 1  # of our members and of the operations that the machine code calls
# Where bfloat16 is laid out by another pass of the compiler: largest difference of a logit, relative to the largest.
TOLERANCE = 1e-2


class LoadedModel(nn.Module):
    """A model from a file of :meth:`spikezoo.deploy.Deployed.save`.

    Attributes:
        precision: exact, bf16, int8 or bits.
        notes: What deployment did, in one line each.
        input_shape: The shape of input that it was compiled for, with the batch.
        pretrained_cfg: As the model's: mean, std, input_size, label_names where it has them, ...
        T: Time steps.
        num_classes: Length of the logits of an input.
    """

    def __init__(self, path: Path, facts: dict[str, Any], calls: dict[int, Call]) -> None:
        super().__init__()
        self.precision: str = facts["precision"]
        self.notes: list[str] = facts["notes"]
        self.input_shape = tuple(facts["input_shape"])
        self.pretrained_cfg: dict[str, Any] = facts["pretrained_cfg"]
        self.T: int = facts["T"]
        self.num_classes: int = facts["num_classes"]
        self._calls = [register(call, key) for key, call in calls.items()]
        self._parts: list[tuple[str, int, int]] = facts["parts"]
        names = {"model"} if not self._parts else {"head", *(name for name, _, _ in self._parts)}
        self._graphs: dict[str, Callable[..., Any]] = {name: load_package(str(path), name) for name in sorted(names)}
        weakref.finalize(self, forget, *facts["keys"])
        self.eval()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` in float32.

        Args:
            x: Images ``[B, C, H, W]`` or event frames ``[B, T, C, H, W]`` of ``input_shape``, as the model takes them.

        Raises:
            ValueError: Another shape, integers, another device than the CPU, or values that are not finite.
        """
        if tuple(x.shape) != self.input_shape or not x.is_floating_point() or x.device.type != "cpu":
            raise ValueError(
                f"Input of shape {tuple(x.shape)}, {x.dtype}, on {x.device}: this file holds a model compiled for "
                f"floating-point numbers of shape {self.input_shape} on the CPU. For another shape save another file: "
                f"spikezoo.deploy(model, {self.precision!r}, example=x).save('other.pt2')."
            )
        x = finite(x.float()).contiguous(memory_format=_format(self.precision, x))
        if not self._parts:
            return self._graphs["model"](x)
        return _in_parts(self._graphs, x, self._parts, self.T)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"input {self.input_shape}, precision={self.precision}, {'; '.join(self.notes)}"


def _format(precision: str, x: Tensor) -> torch.memory_format:
    """As Deployed lays out its input."""
    return torch.channels_last if precision == "bf16" and x.dim() == 4 else torch.contiguous_format


def _in_parts(graphs: dict[str, Callable[..., Any]], x: Tensor, parts: list[tuple[str, int, int]], T: int) -> Tensor:
    """Logits of a part of the time steps after the other: name of the graph, first step, number of steps."""
    frames = x.unsqueeze(0) if x.dim() == 4 else x.transpose(0, 1)
    total: Any = 0
    potentials: list[Tensor] = []
    for name, start, steps in parts:
        part = frames if len(frames) == 1 else frames[start : start + steps]
        features, *potentials = graphs[name](part.contiguous(), *potentials)
        total = total + features
    return graphs["head"](total / T)


# --------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------


class _Model(nn.Module):
    """Images to logits."""

    def __init__(self, net: Deployed) -> None:
        super().__init__()
        self.model = net.model

    def forward(self, x: Tensor) -> Tensor:
        model: Any = self.model
        return model.forward_head(model.forward_sequence(x).float().mean(0))


class _Steps(nn.Module):
    """A part of the time steps: frames and membrane potentials to the sum of features and potentials."""

    def __init__(self, net: Deployed, steps: int, counts: list[int]) -> None:
        super().__init__()
        self.model, self.steps, self.counts = net.model, steps, counts
        self._net = [net]

    def forward(self, frames: Tensor, *flat: Tensor) -> list[Tensor]:
        rest = iter(flat)
        potentials = [[next(rest) for _ in range(count)] for count in self.counts]
        features, left = self._net[0]._few_steps(frames, self.steps, potentials)
        return [features, *(v for one in left for v in one)]


class _Head(nn.Module):
    """Features to logits."""

    def __init__(self, net: Deployed) -> None:
        super().__init__()
        self.model = net.model

    def forward(self, x: Tensor) -> Tensor:
        model: Any = self.model
        return model.forward_head(x)


def _graphs(net: Deployed, x: Tensor) -> Iterator[tuple[str, int, int, nn.Module, tuple[Tensor, ...]]]:
    """What is compiled: name, first step, number of steps (0: no part of them), module and example."""
    model: Any = net.model
    T: int = model.T if x.dim() == 4 else x.shape[1]
    if net.whole(T):
        yield "model", 0, 0, _Model(net), (x,)
        return
    if model.encoding != "direct":
        raise ValueError(
            f"A model of {T} steps with encoding={model.encoding!r} runs in parts, and a file holds no part of a code: "
            f"deploy it with at most {net.part} steps, or with encoding='direct'."
        )
    frames = x.unsqueeze(0) if x.dim() == 4 else x.transpose(0, 1)
    known: set[str] = set()
    potentials: list[list[Tensor]] = [[] for _ in net.neurons]
    for start in range(0, T, net.part):
        steps = min(net.part, T - start)
        name = f"{'first' if start == 0 else 'next'}{steps}"
        here = (frames if len(frames) == 1 else frames[start : start + steps]).contiguous()
        counts = [len(one) for one in potentials]
        module = _Steps(net, steps, counts)
        flat = [v for one in potentials for v in one]
        yield name, start, steps, (nn.Identity() if name in known else module), (here, *flat)
        features, potentials = net._few_steps(here, steps, potentials)
        known.add(name)
    yield "head", 0, 0, _Head(net), (features,)


def _own_keys(net: Deployed) -> dict[int, Call]:
    """Give layers on bits keys that no other process has; returns them."""
    layers = [module for module in net.model.modules() if isinstance(module, Spikes)]
    for layer in layers:
        layer.tuned, layer.key = True, secrets.randbits(62)
        register(layer.call, layer.key)
    return {layer.key: layer.call for layer in layers}


def _check(net: Deployed, path: Path, x: Tensor | None) -> Tensor:
    """The input to compile for, or an error."""
    if path.suffix != SUFFIX:
        raise ValueError(f"Save a deployed model to {str(path)!r}: expected a name that ends in {SUFFIX}.")
    model: Any = net.model
    if next(model.parameters()).device.type != "cpu":
        raise ValueError("A file holds a model compiled for the CPU: deploy model.cpu() and save that.")
    if getattr(model, "encoding", "direct") == "poisson":
        raise ValueError("encoding='poisson' is random, and a compiled file would repeat one draw: it is not saved.")
    if compiler() is None:
        raise ValueError("No C++ compiler found: a file holds what it compiles. Install g++, or set CXX.")
    if x is not None:
        return x.detach().float()
    if len(net.shapes) != 1:
        raise ValueError(
            f"A file holds a model compiled for one shape of input, and this one has seen {len(net.shapes) or 'none'}: "
            "call save(path, example=images)."
        )
    noise = torch.rand(next(iter(net.shapes)), generator=torch.Generator().manual_seed(0))
    return noise if model.encoding == "ttfs" else 2 * noise - 0.5


@torch.no_grad()
def save_deployed(net: Deployed, path: str | Path, example: Tensor | None = None) -> Path:
    """Write a deployed model; see :meth:`spikezoo.deploy.Deployed.save`."""
    path = Path(path)
    x = _check(net, path, example)
    want = net(x)
    own = copy.deepcopy(net)
    model: Any = own.model
    calls = _own_keys(own)
    bf16 = net.precision == "bf16"
    options = {
        "aot_inductor.package": True,
        "layout_optimization": bf16,
        "freezing": bf16,
        "cpp.dynamic_threads": True,  # as many as the process has that loads it
    }
    files: dict[str, Any] = {}
    parts: list[tuple[str, int, int]] = []
    x = x.contiguous(memory_format=_format(net.precision, x))
    words = f"deploy: compiling {path.name}, up to some minutes"
    with (
        tqdm(desc=words, bar_format="{desc}", disable=None, leave=False),
        torch.autocast("cpu", enabled=False),
        tempfile.TemporaryDirectory() as folder,
    ):
        for name, start, count, module, inputs in _graphs(own, x):
            if count:
                parts.append((name, start, count))
            if name not in files:
                program = torch.export.export(module.eval(), inputs, strict=False)
                files[name] = aot_compile(program.module(), inputs, options=options)
        made = Path(folder) / f"model{SUFFIX}"
        package_aoti(str(made), files)
        facts = {
            "version": VERSION,
            "torch": str(torch.__version__),
            "processor": processor(),
            "kernel": place(instructions()).name if calls else None,
            "precision": net.precision,
            "notes": net.notes,
            "input_shape": list(x.shape),
            "T": model.T if x.dim() == 4 else x.shape[1],
            "num_classes": want.shape[1],
            "pretrained_cfg": json.loads(json.dumps(model.pretrained_cfg, default=str)),
            "parts": parts,
            "keys": [layer.key for layer in model.modules() if isinstance(layer, EightBit)],
        }
        _add_members(made, facts, calls)
        _compare(load_deployed(made)(x), want, net.precision)
        with atomic(path) as temporary:
            temporary.write_bytes(made.read_bytes())
    return path


def _add_members(path: Path, facts: dict[str, Any], calls: dict[int, Call]) -> None:
    """Write our own."""
    buffer = io.BytesIO()
    torch.save(
        {key: {**vars(call), "terms": [vars(term) for term in call.terms]} for key, call in calls.items()}, buffer
    )
    with zipfile.ZipFile(path, "a") as archive:
        top = archive.namelist()[0].partition("/")[0]  # torch's reader wants all members in one folder
        archive.writestr(f"{top}/{CALLS}", buffer.getvalue())
        if calls:
            archive.write(library(instructions()), f"{top}/{KERNEL}")
        digests = {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
        archive.writestr(f"{top}/{FACTS}", json.dumps({**facts, "sha256": digests}))


def _compare(found: Tensor, want: Tensor, precision: str) -> None:
    """Refuse a file that gives other logits than the model that it was made of."""
    largest = (found - want).abs().max().item()
    limit = TOLERANCE * max(1.0, want.abs().max().item()) if precision == "bf16" else 0.0
    if not largest <= limit or not math.isfinite(largest):
        raise ValueError(
            f"The compiled file gives logits that differ by up to {largest:.3g} (precision={precision!r} allows "
            f"{limit:.3g}). Nothing was written. Please report it."
        )


# --------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------


def _members(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Our own members, the facts and the others by name, after every digest was compared.

    Raises:
        ValueError: Not such a file, or a damaged one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        own = next((name for name in content if name.endswith(f"/{FACTS}")), None)
        facts: dict[str, Any] = json.loads(content.pop(own)) if own else {}
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}), or no file of spikezoo.deploy(...).save().") from error
    if own is None:
        raise ValueError(f"{path} is no file of spikezoo.deploy(...).save(): it has no member {FACTS!r}.")
    wrong = [
        name
        for name, digest in facts.get("sha256", {}).items()
        if hashlib.sha256(content.get(name, b"")).hexdigest() != digest
    ]
    if wrong or {*content} != {*facts.get("sha256", {})}:
        raise ValueError(f"{path} is damaged: {(wrong or sorted(content))[0]} is not what was saved. Save it again.")
    return facts, {name.partition("/")[2]: value for name, value in content.items()}


def load_deployed(path: str | Path) -> LoadedModel:
    """Load a model of :meth:`spikezoo.deploy.Deployed.save`, ready to call.

    The file holds machine code: load only files of people whom you would run a program of. The digests in it tell
    accidents, not malice.

    Args:
        path: The ``.pt2`` file.

    Returns:
        The model: maps inputs of its ``input_shape`` to the logits of the model that it was saved of.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file, one of something else, or one that was made by another torch or for a processor
            with other instructions.

    Examples:
        >>> net = spikezoo.load_deployed('net.pt2')
        >>> logits = net(images)
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"No file {path}: spikezoo.deploy(model, example=images).save({str(path)!r}) writes one."
        )
    facts, members = _members(path)
    again = "Save it again here, from the model: spikezoo.deploy(model, ..., example=images).save(...)."
    for key, here in (("version", VERSION), ("torch", str(torch.__version__)), ("processor", list(processor()))):
        if facts[key] != here:
            shown = [" ".join(value) if isinstance(value, list) else value for value in (facts[key], here)]
            raise ValueError(f"{path} was compiled for {key} {shown[0]}, and this is {shown[1]}. {again}")
    if facts["kernel"] and facts["kernel"] != place(instructions()).name:
        raise ValueError(f"{path} has another kernel of spikes in bits ({facts['kernel']}) than this version. {again}")
    calls = {
        int(key): Call(**{**call, "terms": [Packed(**term) for term in call["terms"]]})
        for key, call in torch.load(io.BytesIO(members[CALLS]), weights_only=True).items()
    }
    if calls:
        library(instructions(), members[KERNEL])
    return LoadedModel(path, facts, calls)
