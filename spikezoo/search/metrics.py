"""Training-free metrics of a net: what follows from its architecture, and what an untrained network shows.

Metrics that read a network work on a copy of it, so that the network stays as it is.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikezoo.checks import nearest
from spikezoo.data import create_loader
from spikezoo.neurons import SpikingNeuron
from spikezoo.search.space import Net, Setting, cost


def synflow(model: nn.Module, input_size: Sequence[int] = (3, 32, 32)) -> float:
    """SynFlow: sum of ``|theta dR/dtheta|`` over all parameters, R the sum of the logits of an image of ones.

    All parameters and buffers are replaced by their absolute values, in evaluation mode and double precision
    (Tanaka et al. 2020). Gradients pass the neurons by their surrogate.

    Args:
        model: The network; it is not changed.
        input_size: Channels, height and width of its input.
    """
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.abs_()
    first = next(model.parameters())
    total: Tensor = model(torch.ones(1, *input_size, dtype=torch.double, device=first.device)).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return sum((p.detach() * g).abs().sum().item() for p, g in pairs if g is not None)


def snip(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """SNIP: sum of ``|theta dL/dtheta|`` over the weights of convolutions and linear layers, L a batch's cross-entropy.

    A weight's connection sensitivity (Lee et al. 2019), not normalised and summed to a score of the net (Abdelfattah et
    al. 2021), in training mode. Gradients pass the neurons by their surrogate.

    Args:
        model: The network; it is not changed.
        images: A batch ``[N, C, H, W]``.
        labels: Its classes ``[N]``.
    """
    model = copy.deepcopy(model).train()
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    loss = nn.functional.cross_entropy(model(images), labels)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return sum(float((w.detach() * g).abs().sum()) for w, g in zip(weights, gradients, strict=True))


def _finite(value: float, nan: float = 0.0) -> float:
    # As numpy's nan_to_num, which the sources use: ranks keep their meaning, and files hold numbers.
    if math.isnan(value):
        return nan
    return max(-sys.float_info.max, min(sys.float_info.max, value))


def ntk(model: nn.Module, images: Tensor) -> float:
    """Condition number of the neural tangent kernel (TE-NAS); lower is better.

    The gradients of the summed logits of every sample, of one batch in training mode, with respect to all parameters
    whose name contains "weight".

    Args:
        model: The network; it is not changed.
        images: A small batch ``[N, C, H, W]``.

    Returns:
        Largest over smallest eigenvalue of the kernel; 1e5 where it is not a number, and the largest float where the
        kernel is singular.
    """
    model = copy.deepcopy(model).train()
    weights = [p for name, p in model.named_parameters() if "weight" in name and p.requires_grad]
    logits = model(images)
    kernel = logits.new_zeros(len(images), len(images), dtype=torch.double)
    rows: list[Tensor] = []
    for sample in range(len(images)):
        gradients = torch.autograd.grad(
            logits[sample].sum(), weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.flatten() for g in gradients]).double())
        kernel[sample, : sample + 1] = torch.stack([rows[-1] @ row for row in rows])
    if not bool(kernel.isfinite().all()):
        return 1e5
    values = torch.linalg.eigvalsh(kernel)  # reads the lower triangle, in ascending order
    low, high = float(values[0]), float(values[-1])
    # Rounding makes the zeros of a singular kernel small numbers of either sign.
    if low <= high * len(images) * torch.finfo(torch.double).eps:
        return 1e5 if high == 0 else sys.float_info.max
    return high / low


@contextmanager
def _on_spikes(model: nn.Module, see: Callable[[Tensor], None]) -> Iterator[nn.Module]:
    """A copy of the model in training mode, and ``see`` called with the spikes ``[N, units]`` of every neuron and step.

    In training mode the norms take the statistics of the batch; by their initial ones an untrained net hardly fires.
    """
    model = copy.deepcopy(model).train()
    neurons = [module for module in model.modules() if isinstance(module, SpikingNeuron)]
    if not neurons:
        raise ValueError("A network without spiking neurons has no spikes to measure: create it with neuron='lif'.")

    def hook(_module: nn.Module, _inputs: object, spikes: Tensor) -> None:
        for step in spikes:
            see((step.flatten(1) > 0).float())

    for neuron in neurons:
        neuron.register_forward_hook(hook)
    with torch.no_grad():
        yield model


def linear_regions(model: nn.Module, images: Tensor) -> float:
    """NASWOT's score on spikes: log |det K|, K the agreement of the samples' spike patterns.

    For every neuron layer and time step with binary patterns x ``[N, units]``, K grows by x x' + (1 - x)(1 - x)'
    (Mellor et al. 2021, on the activity of ReLUs).

    Args:
        model: The network; it is not changed.
        images: A batch ``[N, C, H, W]``; the source takes 128.
    """
    kernel = torch.zeros(len(images), len(images), dtype=torch.double, device=images.device)

    def see(x: Tensor) -> None:
        kernel.add_(x @ x.T + (1 - x) @ (1 - x).T)

    with _on_spikes(model, see) as copied:
        copied(images)
    return _finite(float(torch.linalg.slogdet(kernel)[1]), nan=-sys.float_info.max)


def sahd(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """Sparsity-aware Hamming distance of the spike patterns (SNASNet), in the form of the authors' code.

    For every neuron layer and time step with N units and rates s, K grows by N - 0.5 / (E + 1e-3) * HD, with the
    Hamming distance HD of two samples and its expectation E = N (s_i (1 - s_j) + (1 - s_i) s_j); the score is
    log |det (K / number of layers and steps)|, averaged over the batches. The factor makes the second term about 0.5
    whatever N is; the source has it so.

    Args:
        model: The network; it is not changed.
        batches: Batches ``[N, C, H, W]``; the source takes two of 256.
    """
    scores = []
    for images in batches:
        kernel = torch.zeros(len(images), len(images), dtype=torch.double, device=images.device)
        calls = 0

        def see(x: Tensor, kernel: Tensor = kernel) -> None:
            nonlocal calls
            calls += 1
            units = x.shape[1]
            rate = x.mean(1).double()
            expected = units * (rate[:, None] * (1 - rate) + (1 - rate)[:, None] * rate)
            distance = units - (x @ x.T + (1 - x) @ (1 - x).T)
            kernel.add_(units - 0.5 / (expected + 1e-3) * distance)

        with _on_spikes(model, see) as copied:
            copied(images)
        scores.append(_finite(float(torch.linalg.slogdet(kernel / calls)[1]), nan=-sys.float_info.max))
    if not scores:
        raise ValueError("sahd() got no batch: expected at least one.")
    return statistics.fmean(scores)


@dataclass(frozen=True)
class Metric:
    """A training-free predictor of accuracy.

    Attributes:
        note: What it is.
        higher_is_better: Which end a search wants.
        measure: From a network, images ``[N, C, H, W]`` and their labels; None where the architecture is enough.
        images: How many images it takes.
    """

    note: str
    higher_is_better: bool = True
    measure: Callable[[nn.Module, Tensor, Tensor], float] | None = None
    images: int = 0

    @property
    def analytic(self) -> bool:
        """Whether the architecture alone is enough."""
        return self.measure is None


METRICS: dict[str, Metric] = {
    "flops": Metric("T x MACs of the whole network (the authors' code)"),
    "flops_eq": Metric("T x equations 4-5 of the paper, as printed"),
    "parameters": Metric("trainable parameters"),
    "synflow": Metric("SynFlow", measure=lambda model, images, _: synflow(model, images.shape[1:])),
    "snip": Metric("SNIP", True, snip, 64),
    "ntk": Metric("condition number of the NTK", False, lambda model, images, _: ntk(model, images), 16),
    "linear_regions": Metric("NASWOT on spikes", True, lambda model, images, _: linear_regions(model, images), 128),
    "sahd": Metric("sparsity-aware Hamming distance", True, lambda model, images, _: sahd(model, images.chunk(2)), 512),
}


def find_metric(name: str) -> Metric:
    """The metric of that name; raises with the nearest one where there is none."""
    if name not in METRICS:
        raise ValueError(f"Unknown metric {name!r}. {nearest(name, METRICS)}")
    return METRICS[name]


MEASURED = tuple(name for name, metric in METRICS.items() if not metric.analytic)


def noise(setting: Setting, count: int, seed: int = 0) -> Tensor:
    """Normally distributed images ``[count, C, H, W]``, or frames of two channels, for metrics without a dataset."""
    generator = torch.Generator().manual_seed(seed)
    steps = (setting.T,) if setting.in_chans == 2 else ()
    return torch.randn(count, *steps, setting.in_chans, setting.img_size, setting.img_size, generator=generator)


def batch_of(
    dataset: str, metrics: str | Sequence[str], setting: Setting, seed: int = 0, **options: Any
) -> tuple[Tensor, Tensor]:
    """Training images, normalised and augmented, as many as the metrics take ``[N, C, H, W]``, and labels ``[N]``.

    Args:
        dataset: Name of the dataset.
        metrics: One name or several.
        setting: Size and channels.
        seed: Of the choice.
        **options: Of :func:`spikezoo.data.create_loader`.
    """
    names = [metrics] if isinstance(metrics, str) else metrics
    count = max([1, *(find_metric(name).images for name in names)])
    shape: dict[str, Any] = {"img_size": setting.img_size, "in_chans": setting.in_chans, "T": setting.T}
    loader = create_loader(
        dataset, "train", train=True, batch_size=count, drop_last=False, seed=seed, **shape, **options
    )
    images, labels = next(iter(loader))
    return images, labels


def score(
    net: Net,
    metric: str,
    setting: Setting,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    **arguments: object,
) -> float:
    """One metric of one net.

    Args:
        net: The architecture.
        metric: A name of :data:`METRICS`.
        setting: What the net is made for.
        images: Images ``[N, C, H, W]`` for the metrics that read a network; None takes noise. Each metric takes as
            many of them as its source did (:attr:`Metric.images`), or all where there are fewer.
        labels: Their labels ``[N]``, for SNIP; None takes the classes in turn.
        seed: Of the random weights, and the noise.
        **arguments: Further arguments of ``create_model``.

    Raises:
        ValueError: An unknown metric.
    """
    chosen = find_metric(metric)
    if chosen.measure is None:
        return float(getattr(cost(net, setting), metric))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = setting.create(net, **arguments)
        if images is None:
            images = noise(setting, max(1, chosen.images), seed)
        if labels is None:
            labels = torch.arange(len(images), device=images.device) % setting.num_classes
        model.to(images.device)
        count = max(1, chosen.images)
        return chosen.measure(model, images[:count], labels[:count])
