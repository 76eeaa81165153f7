"""Observing a model without a trace: evaluation mode for a while, a copy that shares its weights, and firing rates."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spikezoo.neurons import SpikingNeuron

__all__ = ["WithRates", "evaluating", "failing_layers", "firing_rates", "is_neuron", "observing_copy", "outputs"]


def is_neuron(module: nn.Module) -> bool:
    """Whether a module is a spiking neuron, of this library or of SpikingJelly (by name: it is not imported here)."""
    return isinstance(module, SpikingNeuron) or any(cls.__name__ == "BaseNode" for cls in type(module).__mro__)


@contextmanager
def evaluating(model: nn.Module, hooks: Iterable[tuple[nn.Module, Callable[..., Any]]] = ()) -> Iterator[None]:
    """Put a model in evaluation mode, with forward hooks, for the length of a block; nothing of them survives it.

    Each module gets its own mode back: after ``model.train(training)`` parts that were frozen in evaluation mode would
    train.
    """
    training = [module for module in model.modules() if module.training]
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def observing_copy(model: nn.Module) -> nn.Module:
    """A model of the same weights, shared and not copied, with statistics, modes, potentials and hooks of its own.

    What runs on it moves nothing in ``model``, whatever other threads do with that meanwhile. Neurons that keep their
    potential from call to call, as SpikingJelly's do, are at rest.
    """
    model = getattr(model, "_orig_mod", model)
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        for held in (vars(module), module._buffers, getattr(module, "_memories", {})):
            for value in held.values():
                if isinstance(value, Tensor):  # deepcopy refuses those that hang in a graph
                    memo.setdefault(id(value), value.detach().clone())
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        if hasattr(module, "_memories") and callable(module.reset):
            module.reset()
    return twin


DEAD, SATURATED = 1e-4, 0.99


def failing_layers(rates: Mapping[str, float], dead: float = DEAD, saturated: float = SATURATED) -> dict[str, str]:
    """Layers whose neurons say nothing, since none of them fires or all of them always do.

    Args:
        rates: Layer -> spikes per neuron and time step, such as the ``layer_firing_rates`` of
            :func:`spikezoo.evaluate.evaluate`.
        dead: At this rate and below a layer is dead.
        saturated: At this rate and above it is saturated.

    Returns:
        Layer -> what is wrong, 'dead (rate 0)' or 'saturated (rate 0.9994)'; empty where all is well.
    """
    found = {}
    for name, rate in rates.items():
        if not dead < rate < saturated and rate == rate:  # a layer that did not run has the rate nan
            found[name] = f"{'dead' if rate <= dead else 'saturated'} (rate {rate:.4g})"
    return found


@torch.no_grad()
def outputs(model: nn.Module, batch: Tensor, layers: Iterable[str]) -> dict[str, Any]:
    """What layers put out for a batch, in evaluation mode; of one that runs often the last; the model is not moved.

    Args:
        model: The model.
        batch: What it takes.
        layers: Names of its modules. One that does not run is left out.
    """
    twin = observing_copy(model).eval()
    found: dict[str, Any] = {}
    for name in layers:
        twin.get_submodule(name).register_forward_hook(functools.partial(_keep, found, name))
    twin(batch)
    return found


def _keep(found: dict[str, Any], name: str, module: nn.Module, args: object, out: object) -> None:
    found[name] = out


class WithRates(nn.Module):
    """A model that also returns how often its neurons fire; differentiable, and compiled as one graph.

    While it runs, nothing else may run the same model. SpikingJelly's neurons take part in both step modes; potentials
    that they keep stay as the call leaves them.

    Args:
        model: A model with spiking neurons of this library or of SpikingJelly.
        steps: Call ``model.forward_steps`` (logits of every time step) instead of ``model``.
    """

    def __init__(self, model: nn.Module, steps: bool = False) -> None:
        super().__init__()
        self.model, self.steps = model, steps
        neurons = {
            name.replace("_orig_mod.", ""): module for name, module in model.named_modules() if is_neuron(module)
        }
        self.names = list(neurons)
        self._neurons = list(neurons.values())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The model's output, and the firing rate of each layer (``names``) and time step ``[layers, T]``.

        A layer that the model did not run has the rate nan.
        """
        probes: list[list[Tensor]] = [[] for _ in self._neurons]
        handles = []
        for neuron, probe in zip(self._neurons, probes, strict=True):
            if isinstance(neuron, SpikingNeuron):
                neuron.probe = probe
            else:
                handles.append(neuron.register_forward_hook(functools.partial(_probe, probe)))
        try:
            output = self.model.forward_steps(x) if self.steps else self.model(x)  # type: ignore[operator]
        finally:
            for handle in handles:
                handle.remove()
            for neuron in self._neurons:
                if isinstance(neuron, SpikingNeuron):
                    neuron.probe = None
        # A layer that ran twice has the mean of both; one that did not run has no rate.
        rates = [
            (torch.stack(probe).mean(0) if probe[0].dim() else torch.stack(probe)) if probe else None
            for probe in probes
        ]
        ran = [rate for rate in rates if rate is not None]
        if not ran:
            return output, output.new_zeros(len(rates), 1).float()
        return output, torch.stack([torch.full_like(ran[0], torch.nan) if rate is None else rate for rate in rates])


def _probe(probe: list[Tensor], module: nn.Module, args: object, out: Tensor) -> None:
    """Keep the rates ``[T]`` of SpikingJelly's multi-step mode, or the rate of a single step."""
    dims = tuple(range(0 if getattr(module, "step_mode", "m") == "s" else 1, out.dim()))
    probe.append(out.float().mean(dims))


def firing_rates(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Firing rate of every spiking layer: spikes per neuron and image, for each time step.

    The model is observed, not moved: running statistics, potentials and the random numbers that training draws stay as
    they are, and threads may observe one model at once.

    Args:
        model: A model with spiking neurons of this library or of SpikingJelly; observed in the mode (training or
            evaluation) that it is in, and from rest.
        x: A batch that the model takes.

    Returns:
        Layer name -> rates ``[T]``, mean over neurons and batch.
    """
    probed = WithRates(observing_copy(model))
    draws = any(module.training for module in probed.model.modules())
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices, enabled=draws), torch.no_grad():
        _, rates = probed(x)
    return dict(zip(probed.names, rates, strict=True))
