"""Which inputs, outputs and parameters of a model still matter where only some of its neurons exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikezoo.neurons import Maskable
from spikezoo.observe import evaluating


class Reach:
    """What of a model still matters, if only some of its neurons exist.

    The model runs once on ones, with norms as identities, max-pools as average pools, layers that put out ones and
    neurons that put out their mask. An input of a layer is dead where it stays zero, and an output where no gradient
    arrives from the neurons and layers that it feeds, and nothing cancels, since no number is negative. So residual
    joins, pooling, flattening and attention need no rules.

    Args:
        model: A :class:`~spikezoo.models._base.SpikingModel`.
        alive: Which neurons exist, by layer, see :func:`fade`; those left out do.

    Attributes:
        layers: Name -> which inputs ``[C, ...]`` and outputs ``[C', ...]`` of a layer matter.
        norms: Name -> which channels ``[C]`` of a norm do.
    """

    def __init__(self, model: nn.Module, alive: Mapping[str, Tensor]) -> None:
        self.targets: list[Tensor] = []
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
        normed: list[str] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                hooks.append((module, self._layer(name)))
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                normed.append(name)
                hooks.append((module, self._norm(name)))
            elif isinstance(module, nn.MaxPool2d):
                hooks.append((module, _average))
            elif isinstance(module, Maskable):
                hooks.append((module, self._neuron(alive.get(name))))
        net: Any = model
        like = next(model.parameters())
        # One frame of an event model: time shares all weights.
        images = torch.ones(1, *net.input_shape[-3:], device=like.device, dtype=like.dtype)
        images = images.unsqueeze(1) if net.takes_events else images
        saves = net.grad_checkpointing
        try:
            net.grad_checkpointing = False  # which would run the hooks twice
            with evaluating(model, hooks), torch.enable_grad():
                logits = net(images)  # all of them matter, or features that no neuron puts out
                total: Tensor = sum(self.targets, logits.sum())
                grads = torch.autograd.grad(total, list(self.outputs.values()))
        finally:
            net.grad_checkpointing = saves
        matter = {name: (g != 0).any(0) for name, g in zip(self.outputs, grads, strict=True)}
        self.norms = {name: channels_of(matter[name]) for name in normed if name in matter}
        self.layers = {name: (inputs, matter[name]) for name, inputs in self.inputs.items()}

    def _layer(self, name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
            (x,) = args
            if x.requires_grad:
                self.targets.append(x.sum())
            self.inputs[name] = (x.detach() != 0).any(0)
            self.outputs[name] = torch.ones_like(out).requires_grad_()
            return self.outputs[name]

        return hook

    def _norm(self, name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, args: tuple[Tensor], _out: Tensor) -> Tensor:
            self.outputs[name] = args[0] * 1
            return self.outputs[name]

        return hook

    def _neuron(self, alive: Tensor | None) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            x = args[0]  # one frame where the same input is seen T times
            shown = torch.ones_like(out)
            if alive is not None:
                shown = shown * alive.view(*alive.shape, *[1] * (x.dim() - 2 - alive.dim()))
            if x.requires_grad:
                self.targets.append((x * shown).sum())
            return shown

        return hook

    def matters(self, name: str) -> tuple[Tensor, Tensor]:
        """Which rows (outputs) and columns (inputs) of a layer's weight matter."""
        inputs, outputs = self.layers[name]
        return channels_of(outputs), channels_of(inputs)


def _average(module: nn.MaxPool2d, args: tuple[Tensor], _out: Tensor) -> Tensor:
    return F.avg_pool2d(args[0], module.kernel_size, module.stride, module.padding, module.ceil_mode)


def channels_of(flags: Tensor) -> Tensor:
    """Channels ``[C]`` of which any place of ``[C, ...]`` is set."""
    return flags.flatten(1).any(1) if flags.dim() > 1 else flags


def like_norm(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask of neurons for the values of a membrane norm, ``[C]`` or ``[C, H, W]``."""
    if len(shape) < mask.dim():
        return channels_of(mask)
    return mask.view(*mask.shape, *[1] * (len(shape) - mask.dim())).expand(*shape)
