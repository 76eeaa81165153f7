"""The data flow that every model shares; read this file first.

    images [B, C, H, W] or event frames [B, T, C, H, W]
      -> encode           one frame, or T frames               [1 or T, B, C, H, W]
      -> stem             conv, norm once a frame; neuron      [T, B, C, H, W]
      -> stages, neck     each module maps [T, B, ...]         [T, B, F, h, w]
      -> mean over T                                           [B, F, h, w]     forward_features
      -> pool, linear     no firing                            [B, num_classes] forward_head

A model of two input channels is for event frames, whose channels are the polarities (off, on), and takes nothing else;
the number of time steps is that of the frames. Any other model is for images, and takes a sequence of them, too.

The head is linear (pooling by 'avg'), so the mean over time may come first: the result equals the mean over time of
the logits of every step (``forward_steps``), at 1/T of the work. With 'max' the mean over time comes first, too.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, trunc_normal_
from torch import Tensor, nn

from spikezoo.checks import choice, number, whole
from spikezoo.encoding import ENCODINGS, direct, poisson, ttfs
from spikezoo.layers import checkpointed, over_time
from spikezoo.neurons import NeuronConfig, NeuronFactory, SpikingNeuron

__all__ = ["SpikingModel", "drop_path_rates", "init_without_norms", "truncated_normal"]


def _check_pool(global_pool: str, num_classes: int) -> None:
    if global_pool not in ("avg", "max", ""):
        raise ValueError(f"global_pool={global_pool!r} does not exist: expected 'avg', 'max' or '' for none.")
    if not global_pool and num_classes:
        raise ValueError(
            f"global_pool='' with num_classes={num_classes}: the classifier needs pooled features. Use num_classes=0 "
            "for unpooled ones, or global_pool='avg'."
        )


def init_without_norms(model: nn.Module) -> None:
    """He's initialisation for nets without norms and biases: it keeps the size of the signal from layer to layer."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)


def truncated_normal(weight: Tensor) -> None:
    """Draw a weight as vision transformers do; not on the meta device, where timm's takes longer than all the rest."""
    if not weight.is_meta:
        trunc_normal_(weight, std=0.02)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Probability of leaving out a branch, a block: it grows linearly from 0 at the first to that of the last."""
    rates: list[float] = torch.linspace(0, last, depth, device="cpu").tolist()
    return rates


class SpikingModel(nn.Module):
    """Base of all models: arguments, neurons, forward passes and timm's contract.

    A subclass adds the stem with ``add_stem``, then its stages (sequences of blocks) with ``add_stage``, optionally
    fills ``neck``, and ends with ``finish``.

    Args:
        num_classes: Classes of the head; 0 leaves it out.
        in_chans: Input channels; 2 makes a model for event frames.
        img_size: Height and width of the input, one number for squares.
        T: Time steps for images; of event models the number of frames to train with. None takes 4, or 1 for neurons
            without time (relu, sign).
        neuron: lif, if, plif, or the twins relu and sign.
        mpbn: Membrane normalisation: channel, element, or 'none' (also None).
        global_pool: Pooling of the head: avg, max or '' for none.
        drop_rate: Dropout before the classifier.
        neuron_drop: Dropout of the neurons' outputs; a spiking neuron is dropped at all time steps or at none.
        encoding: What images become over time: direct (the image itself at every step), poisson (spikes with the
            pixel as their probability) or ttfs (one spike a pixel, bright ones first). The latter two take images in
            [0, 1].
        encoding_seed: Seed of the Poisson code in evaluation mode, where an image always gets the same spikes; in
            training mode torch's global generator draws them.
        neuron_defaults: Constants of the family.
        **neuron_arguments: What the user gave for :class:`~spikezoo.neurons.NeuronConfig`: decay, threshold, ...
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 32,
        T: int | None = None,
        neuron: str | None = None,
        mpbn: str | bool | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        neuron_drop: float = 0.0,
        encoding: str = "direct",
        encoding_seed: int = 0,
        neuron_defaults: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **neuron_arguments: Any,
    ) -> None:
        super().__init__()
        self.pretrained_cfg: dict[str, Any] = {}  # timm's, of a model that is made by name
        self.num_classes = whole("num_classes", num_classes, 0)
        self.in_chans = whole("in_chans", in_chans)
        sizes = tuple(img_size) if isinstance(img_size, Sequence) else (img_size, img_size)
        if isinstance(img_size, str) or len(sizes) != 2:
            raise ValueError(f"img_size={img_size!r}: expected one number or (height, width), for instance 32.")
        self.img_size = tuple(whole("img_size", size) for size in sizes)
        self.neuron_config = NeuronConfig.resolve(neuron_defaults or {}, neuron, neuron_arguments)
        if T is not None:
            whole("T", T, hint=" T is the number of time steps; T=4 is common, T=1 the fastest.")
            if T > 1 and not self.neuron_config.spiking:
                raise ValueError(
                    f"T={T} with neuron={self.neuron_config.kind!r}: a neuron without membrane potential gives the "
                    "same answer at every step. Use T=1, or neuron='lif'."
                )
        self.T = T if T is not None else (4 if self.neuron_config.spiking else 1)
        choice("encoding", encoding, ENCODINGS)
        if encoding != "direct" and not self.neuron_config.spiking:
            raise ValueError(
                f"encoding={encoding!r} with neuron={self.neuron_config.kind!r}: a neuron without membrane potential "
                "cannot gather spikes over time. Use encoding='direct', or neuron='if'."
            )
        if encoding != "direct" and in_chans == 2:
            raise ValueError(
                f"encoding={encoding!r} with in_chans=2: event frames are their own encoding. Use encoding='direct'."
            )
        self.encoding, self.encoding_seed = encoding, whole("encoding_seed", encoding_seed, 0)
        norms = ("none", "channel", "element")
        self.mpbn = None if mpbn in (None, False, "none", "None", "") else choice("mpbn", mpbn, norms)
        number("drop_rate", drop_rate, 0, 1)
        number("neuron_drop", neuron_drop, 0, 1)
        _check_pool(global_pool, num_classes)
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.recipe: list[tuple[str, dict[str, Any]]] = []  # the transforms applied, in order
        self.dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.neuron_factory = NeuronFactory(self.neuron_config, self.mpbn, neuron_drop, **self.dd)
        self._global_pool = global_pool
        self.feature_info: list[dict[str, Any]] = []
        self.min_img_size = 1  # the total stride, set by the subclass
        self.fixed_img_size = False  # whether linear layers tie the net to its img_size
        self.stem: nn.Module = nn.Identity()  # first, so that modules are listed in the order of the data flow
        self.stages = nn.ModuleList()
        self.neck: nn.ModuleList = nn.ModuleList()

    # ------------------------------------------------------------------------------------------- construction

    def add_stem(self, stem: nn.Module, channels: int, reduction: int) -> None:
        """Set the first layers, of so many output channels at 1/reduction of the image's size."""
        self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": "stem"})
        self.stem = stem

    def add_stage(self, stage: Sequence[nn.Module], channels: int, reduction: int) -> None:
        """Append a stage, which is a level of features; the arguments are those of :meth:`add_stem`."""
        self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"stages.{len(self.stages)}"})
        self.stages.append(nn.Sequential(*stage))

    def finish(self, num_features: int, head_bias: bool = True) -> None:
        """Add the head, once the subclass knows its number of features.

        What only building needs goes: ``neuron_factory`` makes a layer's neurons from its channels and size of the map,
        ``dd`` holds device and dtype of its parameters.
        """
        self.num_features = self.head_hidden_size = num_features
        self.head = ClassifierHead(num_features, self.num_classes, self._global_pool, self.drop_rate, **self.dd)
        self._head_bias = head_bias
        self._drop_head_bias()
        del self.neuron_factory, self.dd, self._global_pool

    def _drop_head_bias(self) -> None:
        if not self._head_bias and isinstance(self.head.fc, nn.Linear):
            self.head.fc.register_parameter("bias", None)

    def check_size(self, size: Sequence[int]) -> None:
        """Raise ValueError where height and width are too small for this net."""
        if min(size) < self.min_img_size:
            raise ValueError(
                f"img_size={tuple(size)} is smaller than the total stride {self.min_img_size} of this net: give images "
                f"of at least {self.min_img_size}x{self.min_img_size}, or take a net with fewer stages "
                "(spiking_conv4 takes 8x8)."
            )

    def _take(self, indices: int | Sequence[int] | None) -> list[int]:
        """Resolve feature levels: None is all, an int the last n, a list may count from the end."""
        count = len(self.feature_info)
        if indices is None:
            indices = count
        wanted = range(-indices, 0) if isinstance(indices, int) else indices
        if not wanted or any(not -count <= index < count for index in wanted):
            raise ValueError(
                f"indices={indices!r}: this model has {count} feature levels, 0 (stem) to {count - 1}; give a number "
                f"from 1 to {count} for the last ones, or a list of levels."
            )
        return [index % count for index in wanted]

    # ------------------------------------------------------------------------------------------------ forward

    @property
    def inputs(self) -> dict[str, Any]:
        """Mean and std that the images were normalised with in training, and of events what cut the frames; or {}."""
        return dict(self.pretrained_cfg.get("inputs") or {})

    @inputs.setter
    def inputs(self, inputs: Mapping[str, Any]) -> None:
        known = {key: inputs[key] for key in ("mean", "std")}
        self.pretrained_cfg = {**self.pretrained_cfg, **known, "inputs": dict(inputs)}

    @property
    def compile_options(self) -> dict[str, Any]:
        """Options of ``torch.compile`` with which this model trains fastest on a CPU.

        Within its own bounds the compiler stores the maps between norm and spike in float32, up to four a layer, which
        costs more than to compute them again wherever they are read. Over many time steps what is computed again
        becomes long, and so does compiling it: there the compiler's own bounds stay.
        """
        if self.T > 2:
            return {}
        return {
            "realize_reads_threshold": 40,
            "realize_acc_reads_threshold": 40,
            "realize_opcount_threshold": 300,
        }

    @property
    def takes_events(self) -> bool:
        """Whether the input is event frames ``[B, T, 2, H, W]``, not images ``[B, C, H, W]``."""
        return self.in_chans == 2

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample: ``(C, H, W)``, or ``(T, 2, H, W)`` of an event model."""
        return (*((self.T,) if self.takes_events else ()), self.in_chans, *self.img_size)

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError, with what to do, where the model cannot take this input."""
        if not hasattr(x, "dim"):  # whatever traces a model has its own kind of tensors
            raise ValueError(
                f"Input is a {type(x).__name__}: expected a tensor; of an array torch.from_numpy makes one."
            )
        if x.dim() not in (4, 5):
            raise ValueError(
                f"Input of shape {tuple(x.shape)}: expected images [B, C, H, W] or event frames [B, T, C, H, W]. "
                "A single image needs x.unsqueeze(0)."
            )
        if self.takes_events and x.dim() == 4:
            images = 3 if x.shape[1] == 2 else x.shape[1]
            raise ValueError(
                f"Input of shape {tuple(x.shape)} is a batch of images [B, C, H, W], and this model was created with "
                "in_chans=2, for event frames [B, T, 2, H, W]. A single recording [T, 2, H, W] needs x.unsqueeze(0), "
                f"one frame of each recording x.unsqueeze(1); for images create the model with in_chans={images}."
            )
        if not x.is_floating_point():
            raise ValueError(
                f"Input of type {x.dtype}: expected floating-point images, normalised as in training; uint8 pixels "
                "become them by x.float() / 255, minus the mean, over the standard deviation."
            )
        channels, size = x.shape[-3], tuple(x.shape[-2:])
        if channels != self.in_chans:
            raise ValueError(
                f"Input of shape {tuple(x.shape)} has {channels} channels and the model was created for "
                f"{self.in_chans}: create it with in_chans={channels}"
                f"{' for event frames' if channels == 2 and x.dim() == 5 else ''}."
            )
        if x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"Input of shape {tuple(x.shape)} is empty: expected a batch of at least one sample.")
        if self.fixed_img_size and size != self.img_size:
            raise ValueError(
                f"Input of {size[0]}x{size[1]} pixels, and the linear layers of this model were built for "
                f"{self.img_size[0]}x{self.img_size[1]}: create it with img_size={size[0]}"
                f"{'' if size[0] == size[1] else f' (or ({size[0]}, {size[1]}))'}. Commands call it --img-size."
            )
        if not self.fixed_img_size:
            self.check_size(size)

    def encode(self, x: Tensor) -> tuple[Tensor, int]:
        """What the stem sees: frames ``[1 or T, B, C, H, W]`` and the number of time steps.

        Args:
            x: Images ``[B, C, H, W]`` or event frames ``[B, T, C, H, W]``.

        Raises:
            ValueError: Event frames, or images outside [0, 1], with another encoding than direct.
        """
        if self.encoding == "direct":
            return direct(x, self.T)
        if x.dim() == 5:
            raise ValueError(
                f"Input of shape {tuple(x.shape)} with encoding={self.encoding!r}: event frames [B, T, C, H, W] are "
                "their own encoding. Create the model with encoding='direct'."
            )
        if self.encoding == "ttfs":
            return ttfs(x, self.T)
        return poisson(x, self.T, None if self.training else self.encoding_seed)

    def _run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(stage, nn.Sequential)
        for block in stage:
            x = checkpointed(block, x) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
        return x

    def forward_sequence(self, x: Tensor) -> Tensor:
        """Features of every time step, before the head.

        Args:
            x: Images ``[B, C, H, W]`` or event frames ``[B, T, C, H, W]``.

        Returns:
            ``[T, B, num_features, h, w]``.

        Raises:
            ValueError: Wrong number of dimensions or channels, too small or empty.
        """
        self.check_input(x)
        return self.forward_frames(*self.encode(x))

    def forward_frames(self, frames: Tensor, T: int) -> Tensor:
        """Features ``[T, B, num_features, h, w]`` of what :meth:`encode` gives, or of a part of its time steps."""
        x = self.stem(frames, T)
        for stage in self.stages:
            x = self._run_stage(stage, x)
        for module in self.neck:
            x = module(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Time mean of the features: ``[B, num_features, h, w]``."""
        return self.forward_sequence(x).mean(0)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify ``[B, num_features, h, w]``; with ``pre_logits`` only pool."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]``, averaged over the time steps.

        Inputs are not searched for NaN and infinity, which a neuron turns into silence: the logits would be finite, and
        mean nothing. :func:`spikezoo.checks.finite` does that, where data come from outside.
        """
        return self.forward_head(self.forward_features(x))

    def forward_steps(self, x: Tensor) -> Tensor:
        """Logits of every time step, ``[T, B, num_classes]``; with average pooling their mean is ``forward(x)``."""
        return over_time(self.head, self.forward_sequence(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        time_mean: bool = True,
    ) -> Any:
        """Features of chosen stages, as timm's ``forward_intermediates``.

        Args:
            x: Images ``[B, C, H, W]`` or event frames ``[B, T, C, H, W]``.
            indices: Which levels, 0 being the stem: the last n (int), a list, or all (None).
            norm: Ignored, for compatibility: there is no final norm.
            stop_early: Do not compute beyond the last stage asked for.
            output_fmt: Only NCHW.
            intermediates_only: Leave out the final features.
            time_mean: Average over time, ``[B, C, H, W]``; otherwise ``[T, B, C, H, W]``.

        Returns:
            The list of features, or the final features (as ``forward_features``) and that list.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW' is supported.")
        take = self._take(indices)
        self.check_input(x)
        frames, T = self.encode(x)
        x = self.stem(frames, T)
        levels = [x]
        for stage in self.stages[: max(take)] if stop_early else self.stages:
            x = self._run_stage(stage, x)
            levels.append(x)
        found = [levels[index].mean(0) if time_mean else levels[index] for index in take]
        if intermediates_only:
            return found
        for module in self.neck:
            x = module(x)
        return x.mean(0), found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages (and head) that ``forward_intermediates`` with these indices does not need."""
        take = self._take(indices)
        self.stages = self.stages[: max(take)]
        self.feature_info = self.feature_info[: max(take) + 1]
        if prune_head:
            self.neck = nn.ModuleList()
            self.fixed_img_size = False
            self.reset_classifier(0, "")
        return take

    # ---------------------------------------------------------------------------------------- timm's contract

    def get_classifier(self) -> nn.Module:
        """The classification layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; 0 classes leaves features, pooled unless ``global_pool`` is ''.

        None keeps the pooling. Where there is none and classes are asked for, it is 'avg', as they need one.
        """
        whole("num_classes", num_classes, 0)
        if global_pool is None and num_classes and not self.head.global_pool.pool_type:
            global_pool = "avg"
        _check_pool(self.head.global_pool.pool_type if global_pool is None else global_pool, num_classes)
        self.num_classes = num_classes
        like = next(self.parameters())  # a headless net has no layer that timm could copy these from
        self.head.reset(num_classes, global_pool, device=like.device, dtype=like.dtype)
        self._drop_head_bias()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates."""
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", None),
                (r"^neck", (99999,)),  # timm's mark for "with the group before", which is the last block's
            ],
        }

    def summary(self) -> str:
        """One line: name, time steps, code, neurons, parameters and recipe."""
        config = getattr(self, "pretrained_cfg", None) or {}
        name = config.get("architecture", type(self).__name__)
        made = ", ".join(name for name, _ in getattr(self, "recipe", ()))
        return (
            f"{name}, T={self.T}, encoding={self.encoding}, neuron={self.neuron_config.kind}, "
            f"{sum(weights.numel() for weights in self.parameters()):,} parameters{', made by ' if made else ''}{made}"
        )

    def __repr__(self) -> str:
        # Not as extra_repr, by which a saved model is held against what its arguments make.
        name, bracket, tree = super().__repr__().partition("(\n")
        return f"{name}{bracket}  {self.summary()}\n{tree}"

    def _repr_html_(self) -> str:
        """What a notebook shows: the line of :meth:`summary`, which unfolds to the modules."""
        return (
            f"<details><summary>{html.escape(self.summary())}</summary><pre>{html.escape(repr(self))}</pre></details>"
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters of neurons: membrane norms and learned time constants."""
        neurons = [(path, module) for path, module in self.named_modules() if isinstance(module, SpikingNeuron)]
        return {f"{path}.{name}" for path, neuron in neurons for name, _ in neuron.named_parameters()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
