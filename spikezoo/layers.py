"""Layers, and the one place where time meets the batch: stateless layers see T*B as one batch.

Axes: T time steps, B batch, C channels, H height, W width. Between layers everything is ``[T, B, ...]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.utils.checkpoint import checkpoint

from spikezoo.checks import choice
from spikezoo.neurons import NeuronFactory

__all__ = [
    "ConvNormNeuron",
    "Flatten",
    "LinearNormNeuron",
    "Pool",
    "ResidualBlock",
    "Stem",
    "StepScale",
    "TernaryConv2d",
    "TernaryLinear",
    "checkpointed",
    "conv_out",
    "over_time",
    "set_norms",
    "set_ternary",
    "signs_and_gain",
]


def over_time(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a stateless function of ``[N, ...]`` to ``[T, B, ...]`` with N = T*B."""
    y = fn(x.flatten(0, 1))
    return y.unflatten(0, x.shape[:2])


def broadcast_steps(x: Tensor, T: int | None) -> Tensor:
    """Expand what was computed once, ``[1, B, ...]``, to T time steps without copying it."""
    return x if T is None or x.shape[0] == T else x.expand(T, *x.shape[1:])


def _fire(neuron: nn.Module, x: Tensor, T: int | None) -> Tensor:
    """Run a neuron; it repeats one frame by itself, without an expanded tensor whose gradient is T frames."""
    return neuron(x) if T is None or x.shape[0] == T else neuron(x, T)


def conv_out(size: Sequence[int], kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """Height and width after a convolution or pooling."""
    height, width = ((s + 2 * padding - kernel) // stride + 1 for s in size)
    return height, width


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Normalise by batch statistics as in training, but leave the running ones alone."""
    norms: list[Any] = [m for m in module.modules() if hasattr(m, "momentum")]
    saved = [(m.momentum, getattr(m, "num_batches_tracked", None)) for m in norms]
    for m in norms:
        m.momentum = 0.0
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.num_batches_tracked = None
    try:
        yield
    finally:
        for m, (momentum, tracked) in zip(norms, saved, strict=True):
            m.momentum = momentum
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.num_batches_tracked = tracked


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module with gradient checkpointing.

    The recomputation must not update the running statistics of the norms a second time; torch's checkpoint alone
    would do so.
    """
    if torch.compiler.is_compiling():
        # A compiler chooses by itself what to recompute, and the statistics cannot be frozen within its graph.
        return module(x)
    return checkpoint(module, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(module)))


class _Signs(torch.autograd.Function):
    """Signs of weights that are -gain, 0 or +gain; their gradient is that of the weights."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(gain)
        return weight.sign()

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, None]:
        (gain,) = ctx.saved_tensors
        return grad / gain.clamp_min(torch.finfo(gain.dtype).tiny), None


def signs_and_gain(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split weights that are -gain, 0 or +gain into their signs and the gain."""
    gain = weight.detach().abs().amax(tuple(range(weight.dim())))
    return _Signs.apply(weight, gain), gain


class _Ternary(nn.Module):
    """What ternary layers share: real weights do not load into them in silence."""

    weight: Tensor

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        weight, errors = state_dict.get(f"{prefix}weight"), args[-1]
        assert isinstance(errors, list)
        if weight is not None and not ((weight == 0) | (weight.abs() == weight.abs().amax())).all():
            errors.append(
                f"{prefix}weight holds other values than -gain, 0 and +gain, which this layer of a baked ticket "
                "computes with: load it into the model without 'ticket' and 'bake' in its recipe."
            )


class TernaryConv2d(_Ternary, nn.Conv2d):
    """Convolution whose weights are -gain, 0 or +gain: it sums with -1, 0, +1 and scales the sums.

    Of spikes these sums are whole numbers, so the result is the same in whatever order and number format they are
    added: float32, or eight-bit integers with 32-bit accumulation.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C, H, W]`` to ``[N, C', H', W']``."""
        signs, gain = signs_and_gain(self.weight)
        y = self._conv_forward(x, signs, None) * gain
        return y if self.bias is None else y + self.bias[:, None, None]


class TernaryLinear(_Ternary, nn.Linear):
    """Linear layer whose weights are -gain, 0 or +gain, see :class:`TernaryConv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., F]`` to ``[..., F']``."""
        signs, gain = signs_and_gain(self.weight)
        y = nn.functional.linear(x, signs) * gain
        return y if self.bias is None else y + self.bias


def is_mean(pool: nn.AvgPool2d) -> bool:
    """Whether an average pooling is a mean of entries of the map everywhere, which lets a shift of all pass through."""
    return pool.divisor_override is None and (pool.padding in (0, (0, 0)) or not pool.count_include_pad)


_TERNARY: dict[type, type] = {nn.Conv2d: TernaryConv2d, nn.Linear: TernaryLinear}


def set_ternary(layer: nn.Module, ternary: bool) -> None:
    """Let a convolution or linear layer compute with signs and a gain, or with its weights as they are."""
    classes = _TERNARY if ternary else {value: key for key, value in _TERNARY.items()}
    layer.__class__ = classes.get(type(layer), type(layer))


class StepScale(nn.Module):
    """A learned factor of every time step, behind a norm over T*B: what TEBN adds to it.

    Args:
        T: Time steps.
    """

    def __init__(self, T: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(T, **dd))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        """Scale ``[T, B, ...]``, or one frame ``[1, B, ...]`` for each of T steps."""
        steps = x.shape[0] if T is None else T
        if steps != len(self.weight):
            raise ValueError(
                f"Input of {steps} time steps, and norm='tebn' has learned a factor for each of T={len(self.weight)}: "
                f"create the model with T={steps}."
            )
        return x * self.weight.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


class ConvNormNeuron(nn.Module):
    """Convolution, optional pooling, optional batch norm over T*B, optional neuron.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        size: Height and width of the input.
        kernel: Kernel size.
        stride: Stride of the convolution.
        padding: Of the convolution; None takes half the kernel, rounded down.
        groups: Groups of the convolution.
        bias: Whether the convolution has a bias.
        norm: Whether there is a norm.
        affine: Whether it has a scale and a shift.
        pool: Pooling between convolution and norm (the order of the ticket papers), or None.
        neuron: Factory of the neuron, or None where the neuron sits after a residual join.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        size: Sequence[int],
        *,
        kernel: int = 3,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        affine: bool = True,
        pool: nn.Module | None = None,
        neuron: NeuronFactory | None = None,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_chs, out_chs, kernel, stride, padding, groups=groups, bias=bias, **dd)
        self.out_size = conv_out(size, kernel, stride, padding)
        self.pool = pool
        if pool is not None:
            self.out_size = conv_out(self.out_size, 2, 2, 0)
        # An Identity once folded, too.
        self.norm: nn.Module = nn.BatchNorm2d(out_chs, affine=affine, **dd) if norm else nn.Identity()
        self.steps: StepScale | None = None  # of TEBN, see set_norms
        self.neuron = neuron(out_chs, self.out_size) if neuron is not None else None

    def _stateless(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.pool is not None:
            x = self.pool(x)
        return self.norm(x)

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        """Map ``[T, B, C, H, W]`` to ``[T, B, C', H', W']``; one frame is computed once and broadcast to T."""
        x = over_time(self._stateless, x)
        if self.steps is not None:
            x = self.steps(x, T)
        return broadcast_steps(x, T) if self.neuron is None else _fire(self.neuron, x, T)


NORMS = ("bn", "tdbn", "tebn")


def set_norms(model: nn.Module, kind: str, threshold: float, T: int, dd: dict[str, Any]) -> None:
    """Make the batch norms behind a model's convolutions those of a paper; all take statistics over time and batch.

    - 'bn' starts with a scale of 1.
    - 'tdbn', threshold-dependent ("Going Deeper With Directly-Trained Larger Spiking Neural Networks",
      arXiv:2011.05280), starts with the scale alpha * threshold: alpha is 1, and one over the root of 2 where two
      branches are added before a neuron. The paper multiplies by alpha * threshold in every pass and learns a scale
      that starts at 1, the authors' later code (MS-ResNet) and SpikingJelly start here: the functions are the same, the
      optimiser's steps are not. It is a batch norm, and folds as one.
    - 'tebn', temporal effective ("Temporal Effective Batch Normalization in Spiking Neural Networks", NeurIPS 2022),
      has a learned factor of every time step behind the norm. The norm folds into its convolution; the factors stay,
      since the same weights serve all steps, and a threshold of every step would need a decay of every step, too. The
      authors' code has such a norm in shortcuts without convolution as well; here those stay spikes.

    Args:
        model: A model of :class:`ConvNormNeuron` with affine norms; changed in place.
        kind: bn, tdbn or tebn.
        threshold: Of the neurons.
        T: Time steps.
        dd: Device and dtype of the factors.
    """
    choice("norm", kind, NORMS)
    for layer in model.modules():
        if not isinstance(layer, ConvNormNeuron) or not isinstance(layer.norm, nn.BatchNorm2d):
            continue
        if kind == "tdbn":
            nn.init.constant_(layer.norm.weight, threshold * (0.5**0.5 if layer.neuron is None else 1))
        elif kind == "tebn":
            layer.steps = StepScale(T, dd)


class LinearNormNeuron(nn.Module):
    """Flatten or average the map, then linear, optional batch norm, neuron; keeps a 1x1 map.

    Args:
        in_features: Input features after flattening or averaging.
        out_features: Output features.
        pool: Average the map first instead of flattening it.
        norm: Non-affine batch norm before the neuron (the ticket papers' VGGs) or none (TET's ResNet-19).
        bias: Whether the linear layer has a bias.
        neuron: Factory of the neuron.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        pool: bool,
        norm: bool,
        bias: bool,
        neuron: NeuronFactory,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.average = pool
        self.linear = nn.Linear(in_features, out_features, bias=bias, **dd)
        self.norm: nn.Module | None = nn.BatchNorm1d(out_features, affine=False, **dd) if norm else None
        self.neuron = neuron(out_features)

    def _stateless(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3)) if self.average else x.flatten(1)
        x = self.linear(x)
        return x if self.norm is None else self.norm(x)

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        """Map ``[T, B, C, H, W]`` to ``[T, B, F, 1, 1]``; one frame is computed once and broadcast to T."""
        return _fire(self.neuron, over_time(self._stateless, x), T)[..., None, None]


class Flatten(nn.Module):
    """A map as one vector: every position of every channel is a feature of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, C, H, W]`` to ``[T, B, C*H*W, 1, 1]``."""
        return x.flatten(2)[..., None, None]


class Pool(nn.Module):
    """A pooling layer over ``[T, B, C, H, W]``."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, C, H, W]`` to ``[T, B, C, H', W']``."""
        return over_time(self.pool, x)


class Stem(nn.Sequential):
    """The encoding layers: the first sees a repeated image once, the rest see T steps."""

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        """Map ``[1 or T, B, C, H, W]`` to ``[T, B, C', H', W']``."""
        first, *rest = self
        x = first(x, T)
        for module in rest:
            x = module(x)
        return x


class ResidualBlock(nn.Module):
    """Post-activation residual block: conv-norm-neuron-conv-norm, plus shortcut, neuron after the join.

    The output is binary. The shortcut is the identity, or where the shape changes an optional average pooling, a
    1x1 convolution and a norm, without neuron.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        size: Height and width of the input.
        stride: Stride of the block.
        pooled_shortcut: Average pooling, then a 1x1 convolution of stride 1 (MPBN's ResNet-20), instead of a
            strided 1x1 convolution.
        norm: Whether the convolutions have norms.
        neuron: Factory of the neurons.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        size: Sequence[int],
        *,
        stride: int = 1,
        pooled_shortcut: bool = False,
        norm: bool = True,
        neuron: NeuronFactory,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.conv1 = ConvNormNeuron(in_chs, out_chs, size, stride=stride, norm=norm, neuron=neuron, dd=dd)
        self.conv2 = ConvNormNeuron(out_chs, out_chs, self.conv1.out_size, norm=norm, dd=dd)
        self.out_size = self.conv2.out_size
        self.pool: nn.Module | None = None
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_chs != out_chs:
            if pooled_shortcut and stride != 1:
                self.pool = Pool(nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False))
            conv_stride = 1 if pooled_shortcut else stride
            self.shortcut = ConvNormNeuron(in_chs, out_chs, size, kernel=1, stride=conv_stride, norm=norm, dd=dd)
        self.neuron = neuron(out_chs, self.out_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, C, H, W]`` spikes to ``[T, B, C', H', W']`` spikes."""
        y = self.conv2(self.conv1(x))
        if self.pool is not None:
            x = self.pool(x)
        if self.shortcut is not None:
            x = self.shortcut(x)
        return self.neuron(y + x)
