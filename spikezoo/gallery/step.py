"""One time step of a network as ONNX: a frame and membrane potentials in; logits, spikes, operations, potentials out.

A browser that calls it in a loop sees spikes as they come, and takes as many steps as it likes. The operations are
those of :func:`spikezoo.count`: every event times the non-zero weights that it meets. Behind an average pooling, where
spikes are parts of one, they are fewer: no net that the gallery runs has one before its head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from spikezoo.checkpoint.sparse import levels_of
from spikezoo.factory import SpikingModel
from spikezoo.neurons import SpikingNeuron

if TYPE_CHECKING:
    import onnx

__all__ = ["StepNet", "run_steps", "write_step"]

_LARGE = 1000  # numbers; below that a tensor's code saves nothing


def _fan_out(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """How many non-zero weights an event at each position of an input ``[1, ...]`` meets."""
    alive = (layer.weight != 0).float()
    if isinstance(layer, nn.Linear):
        return alive.sum(0)
    way: dict[str, Any] = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    ones = torch.ones_like(F.conv2d(x, layer.weight, None, **way))
    return conv2d_input(x.shape, alive, ones, **way)[0]


class StepNet(nn.Module):
    """A model of :func:`spikezoo.create_model`, stepped by hand.

    Args:
        model: The model; a copy of it is taken.

    Attributes:
        neurons: Names of the layers of neurons.
        layers: Names of convolutions and linear layers in the order in which they run, once something ran.
    """

    def __init__(self, model: SpikingModel) -> None:
        super().__init__()
        self.net = copy.deepcopy(model).cpu().eval()
        found = {name: module for name, module in self.net.named_modules() if isinstance(module, SpikingNeuron)}
        self.neurons, self._neurons = list(found), list(found.values())
        self.layers: list[str] = []
        cfg = self.net.pretrained_cfg
        direct = self.net.encoding == "direct" and not self.net.takes_events  # others take their input as it is
        mean, std = (torch.tensor(cfg[key] if direct else [value]) for key, value in (("mean", 0.0), ("std", 1.0)))
        self._mean, self._std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
        self._fans: dict[str, Tensor] = {}

    def rest(self, potentials: list[Tensor]) -> list[Tensor]:
        """Potentials before the first step, in the shapes of others."""
        starts = [neuron.config.v_reset + neuron.config.v_init for neuron in self._neurons]
        return [torch.full_like(v, start) for v, start in zip(potentials, starts, strict=True)]

    def forward(self, x: Tensor, *potentials: Tensor) -> tuple[Tensor, ...]:
        """One step of one sample.

        Args:
            x: A frame ``[1, C, H, W]``: pixels in [0, 1], spikes of them, or counts of events.
            *potentials: Of every layer of neurons ``[1, ...]``; none at the first step.

        Returns:
            Logits ``[1, classes]``; synaptic operations ``[layers]``; spikes of every layer of neurons; and potentials.
        """
        spikes: dict[str, Tensor] = {}
        operations: dict[str, Tensor] = {}

        def fired(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            return lambda module, inputs, out: spikes.__setitem__(name, out[0])

        def met(name: str) -> Callable[[nn.Conv2d | nn.Linear, tuple[Tensor]], None]:
            def hook(layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor]) -> None:
                if name not in self._fans:
                    self._fans[name] = _fan_out(layer, inputs[0])
                operations[name] = (inputs[0].abs() * self._fans[name]).sum()

            return hook

        hooks = []
        for index, (name, neuron) in enumerate(zip(self.neurons, self._neurons, strict=True)):
            neuron.carry = ([potentials[index]] if potentials else [], [])
            hooks.append(neuron.register_forward_hook(fired(name)))
        for name, module in self.net.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                hooks.append(module.register_forward_pre_hook(met(name)))
        try:
            frame = (x - self._mean) / self._std
            logits = self.net.forward_head(self.net.forward_frames(frame[None], 1)[0])
            left = [neuron.carry[1][0] for neuron in self._neurons if neuron.carry is not None]
        finally:
            for hook in hooks:
                hook.remove()
            for neuron in self._neurons:
                neuron.carry = None
        self.layers = list(operations)
        return logits, torch.stack(list(operations.values())), *(spikes[name] for name in self.neurons), *left


@torch.no_grad()
def run_steps(step: StepNet, frames: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run a sample: logits averaged over time ``[classes]``, operations summed ``[layers]``, the last potentials.

    Args:
        step: The network.
        frames: ``[T, C, H, W]``.
    """
    logits, operations = torch.zeros(()), torch.zeros(())
    potentials: list[Tensor] = []
    for frame in frames:
        out = step(frame[None], *potentials)
        logits, operations = logits + out[0][0], operations + out[1]
        potentials = list(out[2 + len(step.neurons) :])
    return logits / len(frames), operations, potentials


@torch.no_grad()
def write_step(step: StepNet, path: str | Path, example: Tensor) -> list[list[int]]:
    """Write one step as ONNX, in a quarter of the bytes where the weights are whole numbers times a scale.

    Inputs are named x, v0, v1 ...; outputs logits, operations, s0, s1 ... (spikes) and w0, w1 ... (potentials).

    Args:
        step: The network.
        path: File to write.
        example: A frame ``[1, C, H, W]``.

    Returns:
        Shapes of the layers of neurons, without the batch.

    Raises:
        ValueError: onnx or onnxscript is missing.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"A net in the browser needs {error.name}: pip install 'spikezoo-snn[export]'") from error
    step.eval()
    count = len(step.neurons)
    potentials = step(example)[2 + count :]
    numbers = range(count)
    program = torch.onnx.export(
        step,
        (example, *step.rest(list(potentials))),
        input_names=["x", *(f"v{i}" for i in numbers)],
        output_names=["logits", "operations", *(f"s{i}" for i in numbers), *(f"w{i}" for i in numbers)],
        dynamo=True,
        optimize=False,  # which would take norms into the weights, that are then no levels
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in which source file it comes from
    program.save(str(path), external_data=False)
    net = onnx.load(str(path))
    _compress(net.graph)
    onnx.save(net, str(path))
    return [list(v.shape[1:]) for v in potentials]


def _compress(graph: onnx.GraphProto) -> None:
    """Put weights into bytes with a scale a row where that is exactly what they are."""
    import onnx

    nodes = []
    for tensor in list(graph.initializer):
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2 or len(tensor.raw_data) < 4 * _LARGE:
            continue
        weight = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        gain = weight.abs().amax()
        signs = weight.sign()
        coded = (signs.to(torch.int8), gain.expand(len(weight))) if (signs * gain).equal(weight) else levels_of(weight)
        if coded is None:
            continue
        name = tensor.name
        graph.initializer.remove(tensor)
        for part, values in zip(("levels", "scale"), coded, strict=True):
            graph.initializer.append(onnx.numpy_helper.from_array(values.contiguous().numpy(), f"{name}.{part}"))
        nodes.append(
            onnx.helper.make_node("DequantizeLinear", [f"{name}.levels", f"{name}.scale"], [name], name=name, axis=0)
        )
    for node in reversed(nodes):
        graph.node.insert(0, node)
