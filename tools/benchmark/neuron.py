"""The neuron alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from spikingjelly.activation_based import functional
from torch import Tensor

import spikezoo
from spikezoo.neurons import LIF, NeuronConfig
from tools.benchmark.counterpart import lif_node
from tools.benchmark.measuring import measure
from tools.benchmark.report import footer, make_rows, table
from tools.benchmark.settings import NoCounterpartError, Row, Settings
from tools.benchmark.sides import Side


def neuron_sides(settings: Settings, config: NeuronConfig, T: int) -> list[Side]:
    """LIF forward over ``[T, B, C, H, W]``: ours compiled, a copy of the same bytes, SpikingJelly's eager and compiled.

    Raises:
        NoCounterpartError: The neuron is no LIF.
    """
    size = settings.img_size or 32
    torch.manual_seed(0)
    x = torch.randn(T, settings.batch_size, settings.channels, size, size, device=settings.device)
    ours = LIF(config).eval()
    if config.kind != "lif":
        raise NoCounterpartError(f"{settings.model} has {config.kind} neurons: mode='neuron' times LIF.")
    theirs = lif_node(ours).eval()
    functional.set_step_mode(theirs, "m")

    def from_rest(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def whole(x: Tensor) -> Tensor:
            functional.reset_net(theirs)
            return run(x)

        return whole

    def side(name: str, form: str, run: Callable[[Tensor], Tensor]) -> Side:
        def step() -> Tensor:
            with torch.no_grad():
                return run(x)

        return Side(name, f"float32, {form}", 0, step)

    sides = [
        side("spikezoo", "compiled", torch.compile(ours, dynamic=False)),
        side("copy", "clone of the same tensor", torch.clone),
        side("spikingjelly", "eager", from_rest(theirs)),
        side("spikingjelly compiled", "compiled", from_rest(torch.compile(theirs, dynamic=False))),
    ]

    def check(step: Callable[[], Any]) -> dict[str, bool]:
        return {"bit_equal": torch.equal(step(), sides[2].step())}

    for other in sides[:1] + sides[3:]:
        other.check = functools.partial(check, other.step)
    return sides


def neuron_rows(settings: Settings) -> list[Row]:
    """Time the neuron of a model, or the default LIF."""
    model: Any = spikezoo.create_model(settings.model, T=settings.T, device="meta") if settings.model else None
    config = model.neuron_config if model else NeuronConfig()
    T = settings.T or (model.T if model else 4)
    sides = neuron_sides(settings, config, T)
    measure(sides, settings.repeats, settings.warmup, settings.device)
    size = settings.img_size or 32
    rate = float(sides[2].step().mean())
    shared = {
        "model": settings.model or "LIF",
        "T": T,
        "img_size": f"{size}x{size}",
        "channels": settings.channels,
        "firing_rate": round(rate, 4),
    }
    return make_rows(settings, sides, shared)


def neuron_markdown(rows: Sequence[Row]) -> str:
    """The rows of the mode ``neuron`` as a table for people."""
    first = rows[0]
    shape = f"[{first['T']}, {first['batch_size']}, {first['channels']}, {first['img_size'].replace('x', ', ')}]"
    names = ("side", "form", "step_ms", "first_step_s", "speedup", "bit_equal")
    title = f"{first['model']}, forward alone, {shape} float32, firing rate {first['firing_rate']:.3f}, "
    title += f"{first['repeats']} repeats after {first['warmup']} warm-up steps"
    return "\n".join([title, "", *table(names, rows), "", f"- device {first['device']}", *footer(first)])
