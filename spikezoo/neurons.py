"""Neurons: LIF, IF and PLIF with optional membrane normalisation, ReLU and sign twins.

Axes: T time steps, B batch, C channels, H height, W width. A neuron takes its input current for all time
steps at once, ``[T, B, ...]``, starts from rest and keeps nothing between calls: the membrane potential is a
local variable of ``forward``. One plain PyTorch loop over T serves eager mode, ``torch.compile``, autocast and
``torch.export``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikezoo.checks import UnknownArgumentError, choice, nearest, number, switch, whole
from spikezoo.surrogate import SURROGATES, floor, sign, spike

__all__ = [
    "IF",
    "LIF",
    "PLIF",
    "QCFS",
    "FoldedThreshold",
    "MembraneNorm",
    "NeuronConfig",
    "NeuronFactory",
    "ReLU",
    "Sign",
    "SpikingNeuron",
]


# --------------------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------------------

SPIKING = ("lif", "if", "plif")
ANALOG = ("relu", "sign", "qcfs")


@dataclass(frozen=True)
class NeuronConfig:
    """Everything that defines a neuron except its normalisation; plain data, so that every model can be stored.

    Attributes:
        kind: lif, if, plif, or the twins relu (ANN), sign (binary activations) and qcfs (:class:`QCFS`, an ANN's
            activation as coarse as a firing rate), which have no time.
        decay: Decay form, ``u = decay * v + x``. Ignored where ``tau`` is given, and by ``if``.
        tau: Tau form, ``u = v + (x - (v - v_reset)) / tau``, as SpikingJelly's ``decay_input=True``. For
            ``plif`` the initial value of the learned time constant.
        threshold: Firing threshold; of ``qcfs`` the initial value of the learned one.
        v_reset: Potential after a hard reset, and of a neuron at rest.
        v_init: How far above rest the potential is before the first step; half the threshold lets the firing rates
            of converted nets come nearer to their ANN's in few steps.
        reset: hard (to ``v_reset``) or soft (minus ``threshold``).
        firing: '>=' (SpikingJelly) or '>' (the MPBN and TET authors).
        surrogate: rectangle, tanh, triangle, sigmoid or arctan.
        surrogate_alpha: Steepness; None takes the surrogate's default.
        detach_reset: No gradient through the reset.
        qcfs_levels: Values above zero of a ``qcfs`` activation, and the time steps in which its spiking form has them.
    """

    kind: str = "lif"
    decay: float = 0.5
    tau: float | None = None
    threshold: float = 1.0
    v_reset: float = 0.0
    v_init: float = 0.0
    reset: str = "hard"
    firing: str = ">="
    surrogate: str = "sigmoid"
    surrogate_alpha: float | None = None
    detach_reset: bool = False
    qcfs_levels: int = 4

    def __post_init__(self) -> None:
        choice("neuron", self.kind, (*SPIKING, *ANALOG))
        choice("reset", self.reset, ("hard", "soft"))
        choice("firing", self.firing, (">=", ">"))
        choice("surrogate", self.surrogate, SURROGATES)
        for name in ("decay", "tau", "threshold", "v_reset", "v_init", "surrogate_alpha"):
            if (value := getattr(self, name)) is not None or name not in ("tau", "surrogate_alpha"):
                number(name, value)
        switch("detach_reset", self.detach_reset)
        whole("qcfs_levels", self.qcfs_levels)
        if self.reset == "soft" and self.v_reset != 0:
            raise ValueError(
                f"v_reset={self.v_reset} with reset='soft': a soft reset subtracts the threshold and has no "
                "potential to reset to. Leave v_reset out, or use reset='hard'."
            )
        wanted = "a number in [0, 1]; 1 keeps the whole membrane potential"
        number("decay", self.decay, 0, 1, "[]", expected=wanted)
        if self.tau is not None and self.tau < 1:
            raise ValueError(f"tau={self.tau}: expected a time constant >= 1 (tau=2 halves the potential each step).")
        if self.kind == "plif" and self.tau is not None and self.tau <= 1:
            raise ValueError(f"tau={self.tau}: a learned time constant starts above 1, for instance tau=2.0.")
        number("threshold", self.threshold, 0, bounds="()")
        if self.surrogate_alpha is not None:
            number("surrogate_alpha", self.surrogate_alpha, 0, bounds="()")

    @classmethod
    def resolve(cls, defaults: dict[str, Any], kind: str | None, given: dict[str, Any]) -> NeuronConfig:
        """Merge a family's constants with what a user gave.

        Args:
            defaults: Constants of the model's row.
            kind: The user's ``neuron=``; None takes the row's.
            given: The user's other neuron arguments; None values mean "not given".

        Raises:
            UnknownArgumentError: An argument that no neuron has.
            ValueError: A value that makes no sense for this kind.
        """
        names = {field.name for field in fields(cls)} - {"kind"}
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            if name not in names:
                raise UnknownArgumentError(f"Unknown argument {name!r}. {nearest(name, names | MODEL_ARGUMENTS)}")
        if "decay" in given and "tau" in given:
            raise ValueError(
                f"decay={given['decay']} and tau={given['tau']} were both given: they are two forms of one thing. "
                "Give decay (u = decay*v + x) or tau (u = v + (x - v)/tau)."
            )
        kind = kind or defaults.get("kind", "lif")
        idle = given.keys() - ({"threshold", "qcfs_levels"} if kind == "qcfs" else set())
        if kind in ANALOG and idle:
            raise ValueError(
                f"neuron={kind!r} has no membrane potential, so {', '.join(sorted(idle))} would do nothing: leave it "
                "out, or use neuron='lif'."
            )
        if "qcfs_levels" in given and kind != "qcfs":
            raise ValueError(f"qcfs_levels with neuron={kind!r} would do nothing: leave it out, or use neuron='qcfs'.")
        if kind == "if" and ("decay" in given or "tau" in given):
            raise ValueError("neuron='if' has no decay: leave decay and tau out, or use neuron='lif'.")
        if kind == "plif" and "decay" in given:
            raise ValueError("neuron='plif' learns its decay: give its initial time constant as tau=2.0.")
        merged = {**defaults, **given, "kind": kind}
        if "decay" in given:
            merged["tau"] = None
        if kind == "plif" and merged.get("tau") is None:
            merged["tau"] = 2.0
        if kind == "qcfs":  # a row's threshold is for spikes, the authors' code starts here
            merged["threshold"] = given.get("threshold", 8.0)
        return cls(**merged)

    @property
    def spiking(self) -> bool:
        """Whether the neuron has a membrane potential and time."""
        return self.kind in SPIKING


# The constructor arguments that every model has besides the neuron's own; used for "did you mean".
MODEL_ARGUMENTS = {"num_classes", "in_chans", "img_size", "T", "mpbn", "neuron", "global_pool", "drop_rate"}
MODEL_ARGUMENTS |= {"neuron_drop", "encoding", "encoding_seed"}


# --------------------------------------------------------------------------------------------------------------
# What stands between membrane potential and firing
# --------------------------------------------------------------------------------------------------------------


def _check_elements(mode: str, values: Tensor, u: Tensor) -> None:
    # Values of a 1x1 map would broadcast silently over a larger one.
    if mode == "element" and u.shape[1:] != values.shape:
        raise ValueError(
            f"mpbn='element' was built for feature maps {tuple(values.shape)} and got {tuple(u.shape[1:])}: "
            "create the model with img_size= of your images, or use mpbn='channel'."
        )


class MembraneNorm(nn.Module):
    """Batch normalisation of the membrane potential before firing: MPBN (eqs 7-8), in the authors' definition.

    The raw potential is carried on to the next time step; only the firing decision sees the normalised one. One
    set of parameters and running statistics is shared by all time steps; in training every step is normalised by
    its own batch statistics, as in the authors' code.

    Args:
        mode: channel (one scale and shift a channel) or element (one for every neuron of the layer).
        channels: Number of channels.
        size: Height and width of the feature map, () for vectors. Needed by ``element``.
    """

    def __init__(
        self,
        mode: str,
        channels: int,
        size: Sequence[int] = (),
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mode, self.channels, self.size = mode, channels, tuple(size)
        self.momentum, self.eps = momentum, eps
        shape = (channels, *self.size) if mode == "element" else (channels,)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(shape, **dd))
        self.bias = nn.Parameter(torch.zeros(shape, **dd))
        self.register_buffer("running_mean", torch.zeros(shape, **dd))
        self.register_buffer("running_var", torch.ones(shape, **dd))
        self.running_mean: Tensor
        self.running_var: Tensor

    def expand(self, value: Tensor, u: Tensor) -> Tensor:
        """Shape a per-channel or per-element value so that it broadcasts over a potential ``[B, C, ...]``."""
        if self.mode == "element":
            return value
        return value.view(-1, *[1] * (u.dim() - 2))

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """The affine map of evaluation: scale and shift, shaped like ``weight``."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale

    def forward(self, u: Tensor) -> Tensor:
        """Normalise a membrane potential ``[B, C, ...]``."""
        _check_elements(self.mode, self.weight, u)
        if not self.training:
            # Multiply and add as two roundings, so that the fold can reproduce every comparison exactly.
            scale, shift = self.scale_shift()
            return u * self.expand(scale.to(u.dtype), u) + self.expand(shift.to(u.dtype), u)
        flat = u.flatten(1) if self.mode == "element" else u
        flat = flat.to(self.weight.dtype)
        normed = F.batch_norm(
            flat,
            self.running_mean.flatten(),
            self.running_var.flatten(),
            self.weight.flatten(),
            self.bias.flatten(),
            True,
            self.momentum,
            self.eps,
        )
        return normed.view(u.shape).to(u.dtype) if self.mode == "element" else normed.to(u.dtype)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.mode}, {tuple(self.weight.shape)}"


class FoldedThreshold(nn.Module):
    """A firing threshold and a polarity per channel or element: what a folded MPBN neuron keeps.

    The neuron fires where ``polarity * (u - threshold)`` is positive (or not negative, with '>='). The polarity is
    -1 where the scale of the folded norm was negative, since the comparison flips there.

    Args:
        mode: channel or element.
        shape: ``(C,)`` or ``(C, H, W)``.
    """

    def __init__(
        self,
        mode: str,
        shape: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.register_buffer("threshold", torch.zeros(tuple(shape), device=device, dtype=dtype))
        self.register_buffer("polarity", torch.ones(tuple(shape), device=device, dtype=dtype))
        self.threshold: Tensor
        self.polarity: Tensor

    def forward(self, u: Tensor) -> Tensor:
        """Signed distance to the threshold, shape of ``u`` ``[B, C, ...]``."""
        _check_elements(self.mode, self.threshold, u)
        shape = self.threshold.shape if self.mode == "element" else (-1, *[1] * (u.dim() - 2))
        return (u - self.threshold.to(u.dtype).view(shape)) * self.polarity.to(u.dtype).view(shape)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.mode}, {tuple(self.threshold.shape)}"


# --------------------------------------------------------------------------------------------------------------
# Neurons
# --------------------------------------------------------------------------------------------------------------


class Maskable(nn.Module):
    """A layer of hidden neurons, of which some may be gone.

    Attributes:
        mask: Which neurons exist, bool ``[C]`` or ``[C, H, W]`` (of linear layers ``[F]``); those that do not are
            silent. None, where nothing was removed, means all. See :mod:`spikezoo.transforms.dynsnn`.
        shape: ``(C,)`` or ``(C, H, W)``, how many neurons the layer has; () where nobody said.
        norm: Normalises the membrane potential of a spiking neuron (MPBN), or None.
    """

    mask: Tensor | None
    norm: MembraneNorm | None

    def __init__(self) -> None:
        super().__init__()
        self.norm = None
        self.register_buffer("mask", None)
        self.shape: tuple[int, ...] = ()

    def existing(self, out: Tensor) -> Tensor:
        """What the neurons that exist put out, of an output ``[T, B, ...]`` of all."""
        mask = self.mask
        if mask is None:
            return out
        if mask.dim() == 1:
            return out * mask.view(-1, *[1] * (out.dim() - 3))
        if mask.shape != out.shape[2:]:  # a 1x1 map would broadcast silently
            raise ValueError(
                f"The mask of single neurons was made for feature maps {tuple(mask.shape)} and the layer got "
                f"{tuple(out.shape[2:])}: use images of the model's img_size, or dynsnn with per='channel'."
            )
        return out * mask


class SpikingNeuron(Maskable):
    """Charge, normalise, fire, reset over T steps; subclasses say how the membrane potential charges.

    Args:
        config: Constants of the neuron.
        norm: Normalises the potential for the firing decision only (MPBN), or None.

    Shape: ``[T, B, ...]`` input current to ``[T, B, ...]`` spikes 0 or 1 of the input's dtype. The membrane
    potential of half-precision input is kept in float32.
    """

    def __init__(self, config: NeuronConfig, norm: MembraneNorm | None = None) -> None:
        super().__init__()
        self.config = config
        self.norm = norm
        self.folded: FoldedThreshold | None = None  # takes the place of `norm` in a folded model
        self.probe: list[Tensor] | None = None  # set by observe.WithRates for the length of one call
        self.drop = 0.0  # dropout of the spikes, set by the factory
        self.spike_dtype: torch.dtype | None = None  # None is the input's; deploy lets spikes be bytes
        # Where a sequence comes in parts: the potentials left by the part before, and a list for those of this one.
        self.carry: tuple[list[Tensor], list[Tensor]] | None = None

    def charge(self, v: Tensor | None, x: Tensor) -> Tensor:
        """Membrane potential before firing; ``v`` is None at rest."""
        raise NotImplementedError

    def distance(self, u: Tensor) -> Tensor:
        """Signed distance of a membrane potential ``[B, ...]`` to the firing threshold."""
        if self.folded is not None:
            return self.folded(u)
        return (u if self.norm is None else self.norm(u)) - self.config.threshold

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        """Spikes ``[T, B, ...]`` of an input current ``[T, B, ...]``, or of ``[1, B, ...]`` at each of T steps."""
        config = self.config
        T = x.shape[0] if T is None else T
        current = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        # Cut along the batch: the gradients are joined there again, each in the memory layout of its frame. Selecting
        # x[t] would make them one contiguous tensor, which costs two transpositions.
        if x.shape[0] == 1:
            frames: Sequence[Tensor] = (current.squeeze(0),) * T
        elif torch.compiler.is_exporting():  # with a batch size of its own, which split does not take
            frames = current.unbind(0)
        else:
            frames = current.flatten(0, 1).split(x.shape[1])
        spikes: list[Tensor] = []
        # None is rest, whose first step costs nothing.
        v = current.new_full((), config.v_reset + config.v_init) if config.v_init else None
        if self.carry and self.carry[0]:
            v = self.carry[0].pop(0)
        for t, frame in enumerate(frames):
            u = self.charge(v, frame)
            s = spike(self.distance(u), config.surrogate, config.surrogate_alpha, config.firing == ">")
            spikes.append(s.to(self.spike_dtype or x.dtype))
            if t + 1 < T or self.carry:
                r = s.detach() if config.detach_reset else s
                if config.reset == "soft":
                    v = u - r * config.threshold
                else:
                    v = u * (1 - r) if config.v_reset == 0 else r * config.v_reset + (1 - r) * u
        if self.carry and v is not None:
            self.carry[1].append(v)
        # Each frame keeps its memory layout: channels-last convolutions follow.
        out = spikes[0].unsqueeze(0) if T == 1 else torch.cat(spikes).view(T, *x.shape[1:])
        out = self.existing(out)
        if self.probe is not None:
            self.probe.append(out.float().mean(tuple(range(1, out.dim()))))
        if self.drop and self.training:
            out = out * F.dropout(torch.ones_like(out[0]), self.drop)  # the same neurons at all steps
        return out

    def extra_repr(self) -> str:
        """What print(model) shows."""
        c = self.config
        leak = "" if c.kind == "if" else f"tau={c.tau}, " if c.tau is not None else f"decay={c.decay}, "
        leak += f"v_init={c.v_init}, " if c.v_init else ""
        mask = "" if self.mask is None else f", mask={tuple(self.mask.shape)}"
        return f"{leak}threshold={c.threshold}, reset={c.reset}, firing={c.firing!r}, surrogate={c.surrogate}{mask}"


class LIF(SpikingNeuron):
    """Leaky integrate-and-fire in the decay form or, where ``config.tau`` is set, the tau form."""

    def charge(self, v: Tensor | None, x: Tensor) -> Tensor:
        """Membrane potential before firing."""
        c = self.config
        if c.tau is None:
            if v is None:
                return x if c.v_reset == 0 else x + c.v_reset
            return c.decay * v + x if c.v_reset == 0 else c.v_reset + c.decay * (v - c.v_reset) + x
        if v is None:
            return x / c.tau if c.v_reset == 0 else c.v_reset + x / c.tau
        return v + (x - (v - c.v_reset)) / c.tau


class IF(SpikingNeuron):
    """Integrate-and-fire: nothing leaks."""

    def charge(self, v: Tensor | None, x: Tensor) -> Tensor:
        """Membrane potential before firing."""
        return x + self.config.v_reset if v is None else v + x


class PLIF(SpikingNeuron):
    """LIF with one learned time constant a layer, ``1/tau = sigmoid(w)`` (Fang et al. 2021)."""

    def __init__(
        self,
        config: NeuronConfig,
        norm: MembraneNorm | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, norm)
        self.w = nn.Parameter(torch.full((), -math.log((config.tau or 2.0) - 1.0), device=device, dtype=dtype))

    def charge(self, v: Tensor | None, x: Tensor) -> Tensor:
        """Membrane potential before firing."""
        rate = self.w.sigmoid().to(x.dtype)
        v_reset = self.config.v_reset
        if v is None:
            return x * rate if v_reset == 0 else v_reset + x * rate
        return v + (x - (v - v_reset)) * rate


class ReLU(Maskable, nn.ReLU):
    """The ANN twin of a spiking neuron; no time."""

    drop = 0.0

    def forward(self, input: Tensor) -> Tensor:
        """Rectify ``input``, any shape; with a mask ``[1, B, ...]``."""
        return F.dropout(self.existing(F.relu(input)), self.drop, self.training)


class Sign(nn.Module):
    """The binary-activation twin, -1, 0 or +1; no time."""

    drop = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Return the sign of ``x``, any shape."""
        return F.dropout(sign(x), self.drop, self.training)


class QCFS(Maskable):
    """The quantised twin: an activation that takes the values of a firing rate and no others; no time.

    ``threshold * clip(floor(levels * x / threshold + 1/2) / levels, 0, 1)``, with a learned threshold a layer. That is
    what an integrate-and-fire neuron with soft reset, started at half its threshold, puts out on average over
    ``levels`` steps of a constant input, so that :func:`spikezoo.convert` needs no calibration.

    Source: "Optimal ANN-SNN Conversion for High-accuracy and Ultra-low-latency Spiking Neural Networks" (Bu et al.,
    ICLR 2022), whose threshold starts at 8.

    Args:
        threshold: Initial value of the learned threshold.
        levels: Values above zero.
    """

    drop = 0.0

    def __init__(
        self, threshold: float, levels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.levels = levels
        self.threshold = nn.Parameter(torch.full((), float(threshold), device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Quantise ``x``, any shape; with a mask ``[1, B, ...]``."""
        return F.dropout(self.existing(self.quantised(x)), self.drop, self.training)

    def quantised(self, x: Tensor) -> Tensor:
        """The value of the activation next to ``x``, any shape."""
        threshold = self.threshold.to(x.dtype)
        return floor((x / threshold).clamp(0, 1) * self.levels + 0.5) / self.levels * threshold

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"levels={self.levels}"


class NeuronFactory:
    """Makes the neuron of each layer of a model from one configuration.

    Args:
        config: Constants of the neuron.
        mpbn: None, channel or element.
        drop: Probability with which training silences a neuron for a sample, at all time steps.
    """

    def __init__(
        self,
        config: NeuronConfig,
        mpbn: str | None = None,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mpbn is not None:
            choice("mpbn", mpbn, ("none", "channel", "element"))
        if mpbn and not config.spiking:
            raise ValueError(
                f"mpbn={mpbn!r} normalises a membrane potential and neuron={config.kind!r} has none: "
                "use neuron='lif', or mpbn='none'."
            )
        self.config, self.mpbn, self.drop = config, mpbn, drop
        self.dd: dict[str, Any] = {"device": device, "dtype": dtype}

    def __call__(self, channels: int, size: Sequence[int] = ()) -> nn.Module:
        """Make a neuron for ``channels`` feature maps of ``size`` (height, width), or () for vectors."""
        kind = self.config.kind
        norm = MembraneNorm(self.mpbn, channels, size, **self.dd) if self.mpbn else None
        neuron: ReLU | Sign | QCFS | SpikingNeuron
        if kind == "qcfs":
            neuron = QCFS(self.config.threshold, self.config.qcfs_levels, **self.dd)
        elif kind in ANALOG:
            neuron = ReLU() if kind == "relu" else Sign()
        elif kind == "plif":
            neuron = PLIF(self.config, norm, **self.dd)
        else:
            neuron = (IF if kind == "if" else LIF)(self.config, norm)
        if isinstance(neuron, Maskable):
            neuron.shape = (channels, *size)
        neuron.drop = self.drop
        return neuron
