"""Conversion: a trained ReLU network becomes a spiking one with the same weights up to a factor a layer.

A ReLU's activation becomes the firing rate of an integrate-and-fire neuron with soft reset. Every layer has a unit: the
activation that one spike a time step stands for, measured on data by SpikingJelly's calibration. The units go into the
weights, ``w * unit_in / unit_out`` and ``b / unit_out``, so that all spikes are 0 or 1 and all thresholds are 1: the
result is an ordinary model of the same architecture, which is counted, stored, pruned and deployed as any other.

Papers: "Conversion of Continuous-Valued Deep Networks to Efficient Event-Driven Networks for Image Classification"
(Rueckauer et al. 2017; units from maxima and percentiles); "RMP-SNN: Residual Membrane Potential Neuron for Enabling
Deeper High-Accuracy and Low-Latency Spiking Neural Network" (arXiv:2003.01811; soft reset); "Optimal ANN-SNN Conversion
for High-accuracy and Ultra-low-latency Spiking Neural Networks" (Bu et al., ICLR 2022; ``neuron='qcfs'``, whose learned
thresholds are the units, so that nothing is measured).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spikezoo.checks import nearest, switch
from spikezoo.encoding import poisson
from spikezoo.factory import SpikingModel, create_model
from spikezoo.graph import Node, trace
from spikezoo.neurons import QCFS, Maskable, ReLU, Sign, SpikingNeuron
from spikezoo.observe import observing_copy
from spikezoo.saving import describe
from spikezoo.transforms import Model, fold_bn, replay

__all__ = ["convert", "share_thresholds"]

RATE_CODES = ("direct", "poisson")
# Images a pass of the calibration where it is given one tensor.
BATCH = 64
# How often biases are corrected: a correction of one layer moves the errors of those behind it, but little.
SWEEPS = 2
# Transforms that leave plain weights behind, and that a spiking network could not take in this form.
_SPENT = ("ticket", "bake", "tune")
# Nodes that are linear without a check, or pass a sum on.
_LINEAR = ("input", "layer", "join", "flatten", "average", "head")
_TWIN = "convert takes the ReLU twin, create_model(name, neuron='relu'), with its trained weights."


class _Flow:
    """Which signals have one unit, and the weight layers between them.

    What is linear and has no weights passes a unit on, and so does a neuron: its input is counted in thresholds.
    Signals that are added have one unit, along a line of identity shortcuts all of them.

    Attributes:
        layers: Name of every convolution or linear layer, and the groups of signals that it takes and puts out.
        neurons: Name of every neuron, and its group.
    """

    INPUT = 0

    def __init__(self, ann: nn.Module) -> None:
        self.layers: list[tuple[str, int, int]] = []
        self.neurons: dict[str, int] = {}
        self.graph = trace(ann)
        self.graph.check_called_once("convert")
        self._of: dict[Node, int] = {}
        for node in self.graph.nodes:
            self._check(node)
            groups = [] if node.kind == "layer" else [self._of[source] for source in node.inputs]
            self._of[node] = min(groups, default=len(self._of))
            self._of = {other: self._of[node] if group in groups else group for other, group in self._of.items()}
        for node in self.graph.of("layer"):
            self.layers.append((node.name, self._of[node.inputs[0]], self._of[node]))
        self.neurons = {node.name: self._of[node] for node in self.graph.of("neuron")}
        if self.INPUT in self.neurons.values():
            raise ValueError(
                "The image is added to the output of a neuron: pixels are no rates, whose unit could be chosen. "
                "convert takes networks whose first layer stands before every sum."
            )

    def line(self, name: str) -> list[str]:
        """Neurons that share a unit with one, itself included."""
        return [other for other, group in self.neurons.items() if group == self.neurons[name]]

    def _check(self, node: Node) -> None:
        """Raise where a part has no spiking form."""
        name = node.name.removesuffix(".pool")
        if isinstance(node.module, Maskable | nn.modules.batchnorm._BatchNorm) or node.kind in _LINEAR:
            return
        if node.kind == "pool":
            if isinstance(node.pooling, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
                return  # linear, and it keeps the unit
            if isinstance(node.pooling, nn.MaxPool2d | nn.AdaptiveMaxPool2d):
                raise ValueError(
                    f"Layer {name!r}: a max-pool takes the largest value of every step, whose mean over time is more "
                    "than the largest mean, and more time does not mend that. Train a network with average pooling, "
                    "such as spiking_vgg16."
                )
        if node.module is not None and node.kind == "other":
            raise ValueError(
                f"Layer {name!r}: {node.what} has no spiking form. convert takes ReLUs and batch norms as "
                "create_model(name, neuron='relu') makes them."
            )
        node = self.graph.obstacle(node)
        raise ValueError(
            f"Layer {node.owner!r}: {node.what} has no spiking form that keeps its output as a rate. convert takes "
            "networks of convolutions, linear layers, average pooling and sums: the VGG and ResNet families and the "
            "MLPs."
        )


def _check(ann: nn.Module, encoding: str) -> None:
    """Raise where a network is no trained ReLU twin as ``create_model`` makes it."""
    if encoding not in RATE_CODES:
        hint = "one spike a pixel is no rate. " if encoding == "ttfs" else ""
        raise ValueError(f"encoding={encoding!r}: {hint}{nearest(encoding, RATE_CODES)}")
    for name, module in ann.named_modules():
        if isinstance(module, SpikingNeuron):
            raise ValueError(f"Layer {name!r} is a {type(module).__name__} neuron, which spikes already: {_TWIN}")
        if isinstance(module, Sign):
            raise ValueError(f"Layer {name!r}: the sign of -1, 0 or +1 is not a firing rate. {_TWIN}")
        if parametrize.is_parametrized(module):
            raise ValueError(f"Layer {name!r}: its weights are a ticket, which learns scores: spikezoo.bake it first.")
    for name, tensor in ann.named_parameters():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is of {tensor.dtype}: convert ann.float(), and round the result.")


def _batches(data: Tensor | Iterable[Any]) -> Iterator[Tensor]:
    """Batches of images of a tensor, or of a loader that gives images alone or with labels."""
    for batch in data.split(BATCH) if isinstance(data, Tensor) else data:
        if not isinstance(batch, Tensor) and not (isinstance(batch, tuple | list) and batch):
            raise ValueError(
                f"Calibration batch of type {type(batch).__name__}: expected images [B, C, H, W], alone or first in a "
                "tuple with labels. For dictionaries type (batch['image'] for batch in loader)."
            )
        images = batch if isinstance(batch, Tensor) else batch[0]
        if not isinstance(images, Tensor):
            raise ValueError(f"Calibration images of type {type(images).__name__}: expected a tensor [B, C, H, W].")
        if images.dim() != 4:
            raise ValueError(
                f"Calibration batch of shape {tuple(images.shape)}: expected images [B, C, H, W]. A ReLU network has "
                "no time that event frames could run through."
            )
        yield images


def _activations(ann: nn.Module, data: Tensor | Iterable[Any], mode: str | float, encoding: str) -> dict[str, float]:
    """The unit of every ReLU, as SpikingJelly's calibration finds it: its name -> a positive number."""
    from spikingjelly.activation_based.ann2snn.modules import VoltageHook
    from spikingjelly.activation_based.ann2snn.recipes.rate_coding import validate_rate_coding_mode

    try:
        validate_rate_coding_mode(mode)
    except NotImplementedError:
        raise ValueError(
            f"mode={mode!r}: expected 'max', a percentile such as '99.9%', or a fraction of the maximum such as 0.9."
        ) from None
    device = next(ann.parameters()).device
    observers = {name: VoltageHook(mode=mode) for name, module in ann.named_modules() if isinstance(module, ReLU)}
    handles = [
        ann.get_submodule(name).register_forward_hook(
            lambda _module, _input, output, observer=observer: observer(output)
        )
        for name, observer in observers.items()
    ]
    empty = True
    try:
        for images in _batches(data):
            if encoding == "poisson":
                poisson(images, 1, seed=0)  # raises outside [0, 1]
            ann(images.to(device))
            empty = False
    finally:
        for handle in handles:
            handle.remove()
    if empty:
        raise ValueError("data holds no batch: give some images to measure activations on, a few hundred will do.")
    units = {name: float(observer.scale) for name, observer in observers.items()}
    for name, unit in units.items():
        if not 0 < unit < float("inf"):
            raise ValueError(
                f"Layer {name!r}: its activations of mode={mode!r} are {unit} on these images, which no firing rate "
                "can stand for. A layer that is zero nearly everywhere needs mode='max' and more images; one that is "
                "not finite has weights or images that are not."
            )
    return units


def _folded(ann: Model) -> Model:
    """A copy in evaluation mode without norms."""
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in ann.modules())
    plain = fold_bn(ann) if normed else copy.deepcopy(ann).eval()
    for name, module in plain.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"Layer {name!r}: a {type(module).__name__} that stands behind no layer of its own cannot be folded, "
                "and has no spiking form. Put it behind the convolution or linear layer that it normalises."
            )
    return plain


def share_thresholds(ann: nn.Module) -> list[list[str]]:
    """Let the QCFS activations that shortcuts join learn one threshold, in place; ``convert`` is then exact at joins.

    A spiking neuron adds the spikes of others as they are, so all of a line of identity shortcuts stand for one value.
    Trainings do this at their start. The parameter stays under each of its names in state dicts.

    Args:
        ann: A model with ``neuron='qcfs'``.

    Returns:
        Names of the activations that share one threshold, a list for each threshold.

    Raises:
        ValueError: A layer without spiking form (named).
    """
    flow = _Flow(ann)
    groups: dict[int, list[str]] = {}
    for name, group in flow.neurons.items():
        if isinstance(ann.get_submodule(name), QCFS):
            groups.setdefault(group, []).append(name)
    for first, *others in groups.values():
        for name in others:
            ann.get_submodule(name).threshold = ann.get_submodule(first).threshold
    return list(groups.values())


def _thresholds(ann: nn.Module, flow: _Flow) -> dict[str, float]:
    """The unit of every QCFS activation, its learned threshold: its name -> a positive number."""
    units = {name: float(module.threshold) for name, module in ann.named_modules() if isinstance(module, QCFS)}
    for name, unit in units.items():
        if not 0 < unit < float("inf"):
            raise ValueError(f"Layer {name!r}: its threshold has become {unit}, which no spike can stand for.")
    joined = [name for name in units if any(units[name] < units[other] for other in flow.line(name))]
    if joined:
        more = f" and {len(joined) - 1} more" if len(joined) > 1 else ""
        warnings.warn(
            f"Layer {joined[0]!r}{more}: a neuron whose spikes are added to those of another needs its threshold, and "
            "has learned a smaller one, so the spiking network is not exactly this one. share_thresholds, before it is "
            "trained, gives them one.",
            stacklevel=3,
        )
    return units


def _check_options(
    ann: SpikingModel, levels: set[int], data: object, T: int | None, mode: str | float, bias_correction: bool
) -> None:
    """Raise where a network lacks a classifier, or arguments of :func:`convert` do not go with each other."""
    if not isinstance(ann.head.fc, nn.Linear):
        raise ValueError("num_classes=0: without a classifier rates would come out in unknown units. Give it one.")
    if not levels and (data is None or T is None):
        raise ValueError("A ReLU network needs data to measure its activations on, and T: convert(ann, images, T=64).")
    if bias_correction and data is None:
        raise ValueError("bias_correction=True needs images to measure rates on: convert(ann, images, ...).")
    if levels and mode != "max":
        raise ValueError(f"mode={mode!r} would do nothing: a QCFS network has learned what a spike stands for.")


def _take_over(model: SpikingModel, plain: SpikingModel, spent: set[str]) -> None:
    """Give a spiking model the weights of its rescaled twin, but for what is spent, and what is known of its inputs."""
    like = next(plain.parameters())
    state = {name: value for name, value in plain.state_dict().items() if name not in spent}
    model.to(like.device, like.dtype).load_state_dict(state)
    known = plain.pretrained_cfg
    inputs: dict[str, Any] = {key: known[key] for key in ("mean", "std", "inputs") if key in known}
    model.pretrained_cfg = {**model.pretrained_cfg, **inputs}


@torch.no_grad()
def convert(
    ann: SpikingModel,
    data: Tensor | Iterable[Any] | None = None,
    T: int | None = None,
    mode: str | float = "max",
    encoding: str = "direct",
    half_threshold: bool = False,
    bias_correction: bool = False,
) -> SpikingModel:
    """Convert a trained ReLU or QCFS network into a spiking one that codes activations as firing rates.

    Of a ReLU network the units are what SpikingJelly's converter measures: of every batch the maximum of a layer's
    activations, a percentile or a fraction of it, and over batches a moving average that gives a new batch a tenth.
    Neurons that an identity shortcut joins share the largest of their units. Batch norms are folded first.

    Of a QCFS network they are the learned thresholds: no data is needed, and membrane potentials start at half the
    threshold. In T time steps, best as many as the activations have levels, each layer's rate of a constant input is
    its activation; what is lost is due to spikes that come unevenly. Most of that is the same for all images, and
    ``bias_correction`` takes it out, layer by layer: the mean difference between the rate that a channel should have
    and the one that it has in T steps goes into its bias ("A Free Lunch From ANN", Li et al., ICML 2021).

    Args:
        ann: A model of ``create_model(name, neuron='relu')`` or ``neuron='qcfs'``; it stays as it is.
        data: Images ``[B, C, H, W]`` as in training, or a loader of batches, of which labels are ignored. For a ReLU
            network, and for the correction of biases.
        T: Time steps. None takes the levels of a QCFS network.
        mode: What one spike a step stands for: 'max' of the layer's activations, a percentile such as '99.9%' (larger
            ones are cut off, all others need less time), or a fraction of the maximum such as 0.9. Only for ReLU
            networks.
        encoding: 'direct' (the image as a current at every step) or 'poisson' (pixels in [0, 1] as random spikes).
        half_threshold: Start membrane potentials at half the threshold, so that rates round instead of being rounded
            down; those of a QCFS network always do.
        bias_correction: Correct biases for this T on ``data``, a hundred images of which will do: each batch runs
            twice as often as there are layers.

    Returns:
        The spiking model in evaluation mode, of the same architecture with ``neuron='if'`` and ``reset='soft'``.

    Raises:
        ValueError: No ReLU or QCFS twin, a layer without spiking form (named), a layer that is silent on ``data``, no
            data, no biases to correct, or an unknown mode or encoding.

    Warns:
        UserWarning: Shortcuts join neurons of a QCFS network with different thresholds.

    Examples:
        >>> snn = spikezoo.convert(ann, loader, T=64, mode='99.9%')
        >>> twin = spikezoo.create_model('spiking_vgg16', neuron='qcfs', checkpoint_path='last.pth')
        >>> snn = spikezoo.convert(twin, images, T=4, bias_correction=True)
    """
    switch("half_threshold", half_threshold)
    switch("bias_correction", bias_correction)
    _check(ann, encoding)
    facts = describe(ann)
    flow = _Flow(ann)
    levels = {module.levels for module in ann.modules() if isinstance(module, QCFS)}
    _check_options(ann, levels, data, T, mode, bias_correction)
    plain = _folded(ann)
    images = [*_batches(data)] if bias_correction and data is not None else []
    data = images or data  # a loader's batches would not be the same a second time
    neuron = {"neuron": "if", "reset": "soft", "threshold": 1.0, "v_reset": 0.0, "firing": ">=", "mpbn": "none"}
    neuron |= {"v_init": 0.5 if half_threshold or levels else 0.0, "encoding": encoding}
    neuron["T"] = max(levels) if T is None else T
    arguments = {name: value for name, value in facts["model_args"].items() if name != "qcfs_levels"}
    model = create_model(facts["architecture"], **{**arguments, **neuron})
    model = replay(model, [entry for entry in plain.recipe if entry[0] not in _SPENT])
    measured = _thresholds(plain, flow) if levels or data is None else _activations(plain, data, mode, encoding)
    units: dict[int, float] = {}
    for name, group in flow.neurons.items():
        units[group] = max(units.get(group, 0.0), measured[name])
    wanted: dict[str, Tensor] = {}
    if bias_correction:
        wanted = _mean_rates(plain, {name: units[group] for name, group in flow.neurons.items()}, images)
    _rescale(plain, flow, units)
    _take_over(model, plain, {f"{name}.threshold" for name in measured})
    for _ in range(SWEEPS if bias_correction else 0):
        _correct_biases(model.eval(), flow, wanted, images)
    return model.eval()


class _EnoughError(Exception):
    """All that was wanted has been seen: the rest of the forward pass would be for nothing."""


def _mean_rates(model: nn.Module, units: Mapping[str, float], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean firing rate of every channel of some neurons, of a ReLU's or QCFS's what its unit makes of it."""
    sums: dict[str, Tensor] = {}
    seen: set[str] = set()
    twin = observing_copy(model).eval()

    def watch(name: str, out: Tensor) -> None:
        axes = [axis for axis in range(out.dim()) if axis != 2]
        rate = (out / units[name]).clamp(max=1).double().mean(axes) * out.shape[1]
        sums[name] = sums.get(name, torch.zeros_like(rate)) + rate
        seen.add(name)
        if len(seen) == len(units):
            raise _EnoughError

    for name in units:
        twin.get_submodule(name).register_forward_hook(lambda _module, _x, out, name=name: watch(name, out))
    device = next(model.parameters()).device
    count = 0
    for images in batches:
        seen.clear()
        with suppress(_EnoughError):
            twin(images.to(device))
        count += len(images)
    if not count:
        raise ValueError("data holds no batch: give some images to measure rates on, a hundred will do.")
    return {name: total / count for name, total in sums.items()}


def _layer_before(node: Node) -> Node | None:
    """The layer whose bias shifts what a neuron is charged with, None where there is none."""
    for source in node.inputs:
        found = source if source.kind == "layer" else None
        if found is None and source.kind not in ("neuron", "input"):
            found = _layer_before(source)
        if found is not None:
            return found
    return None


def _correct_biases(model: nn.Module, flow: _Flow, wanted: Mapping[str, Tensor], images: Sequence[Tensor]) -> None:
    """Add the mean error of every channel's rate to the bias before it, in place, in the order of the data flow."""
    for node in flow.graph.of("neuron"):
        source = _layer_before(node)
        if source is None:
            continue
        layer = model.get_submodule(source.name)
        assert isinstance(layer, nn.modules.conv._ConvNd | nn.Linear)
        if layer.bias is None:
            raise ValueError(f"Layer {source.name!r} has no bias to correct: leave bias_correction out.")
        rate = _mean_rates(model, {node.name: 1.0}, images)[node.name]
        layer.bias += (wanted[node.name] - rate).to(layer.bias)


def _rescale(plain: nn.Module, flow: _Flow, units: Mapping[int, float]) -> None:
    """Put units into the weights, in place."""
    for name, source, target in flow.layers:
        layer = plain.get_submodule(name)
        assert isinstance(layer, nn.modules.conv._ConvNd | nn.Linear)
        # The image, the logits and what no neuron counts keep their unit.
        before, after = units.get(source, 1.0), units.get(target, 1.0)
        layer.weight *= before / after
        if layer.bias is not None:
            layer.bias /= after
