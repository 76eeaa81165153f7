"""The command line."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from timm.models import get_pretrained_cfg

import spikezoo
from spikezoo.checkpoint import atomic
from spikezoo.deploy import PRECISIONS
from spikezoo.evaluate import write_rows
from spikezoo.flags import choose_device
from spikezoo.pictures import check_picture
from spikezoo.surrogate import SURROGATES
from tools.benchmark.growth import draw_growth, growth_markdown
from tools.benchmark.measuring import in_process, measure, run_task
from tools.benchmark.models import make_model
from tools.benchmark.neuron import neuron_markdown, neuron_rows
from tools.benchmark.report import describe, make_rows, markdown
from tools.benchmark.settings import FORMATS, MODES, SWEPT, Row, Settings
from tools.benchmark.sides import BASELINES, make_sides
from tools.benchmark.sizes import size_markdown, size_rows
from tools.benchmark.startup import startup_markdown, startup_rows


def step_rows(*plan: Settings, tell: Callable[[str], None] | None = None) -> list[Row]:
    """Time the steps of our side and of the baselines, of all settings in turns; a row a side."""
    prepared = []
    for settings in plan:
        model = make_model(settings)
        prepared.append((settings, describe(settings, model), make_sides(settings, model, tell)))
    measure([side for *_, sides in prepared for side in sides], plan[0].repeats, plan[0].warmup, plan[0].device)
    rows = []
    for settings, shared, sides in prepared:
        memory = {side.name: in_process("memory", settings, side=side.name) for side in sides if settings.memory}
        rows += make_rows(settings, sides, shared, memory)
    return rows


# Modes other than steps: what measures, and what shows it.
_RUN = {"neuron": neuron_rows, "size": size_rows, "startup": startup_rows}


_SHOW = {"neuron": neuron_markdown, "size": size_markdown, "startup": startup_markdown}


def run(*plan: Settings, tell: Callable[[str], None] | None = None) -> list[Row]:
    """Measure once and return one row a side (spikezoo, then the baselines), a code or an event.

    Args:
        *plan: What to measure; several, of the modes train and infer, in turns. Repeats, warm-up, device and threads
            are those of the first.
        tell: Is told of baselines that have no counterpart of the model; None raises.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(plan[0].threads or before)
    try:
        other = _RUN.get(plan[0].mode)
        return [row for settings in plan for row in other(settings)] if other else step_rows(*plan, tell=tell)
    finally:
        torch.set_num_threads(before)


def image_models() -> list[str]:
    """Models for images of 32x32 or 28x28 pixels, without the micro-models of the tests."""
    cfgs = {name: get_pretrained_cfg(name) for name in spikezoo.list_models() if name[:5] != "test_"}
    return [name for name, cfg in cfgs.items() if cfg and cfg.input_size in ((3, 32, 32), (1, 28, 28))]


def make_parser() -> argparse.ArgumentParser:
    """The command line; a flag is a field of :class:`Settings` or an output file."""
    parser = argparse.ArgumentParser(
        description="Measure how fast a model trains or infers against what a user would do instead."
    )
    add = parser.add_argument
    add("--model", default="", help="name of the model, see spikezoo.list_models(); 'all': those for small images")
    add("--mode", choices=MODES, default="train", help="what to measure (default: train)")
    add(
        "--against", nargs="+", choices=tuple(BASELINES), metavar="NAME",
        help=f"baselines: {', '.join(BASELINES)} (default: spikingjelly; none where a flag has several numbers)",
    )  # fmt: skip
    number: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    fraction: dict[str, Any] = {"type": float, "nargs": "+", "metavar": "F"}
    add("--T", **number, help="time steps (default: the model's)")
    add("-b", "--batch-size", **number, help="images a step (default: 128; of the mode neuron 32)")
    add("--img-size", **number, help="height and width (default: the model's)")
    add("--width", **fraction, help="fraction of the channels of every layer that is kept")
    add("--ticket", **fraction, help="sparsity of a baked binary ticket, on our side and SpikingJelly's")
    add("--num-classes", type=int, metavar="N", help="classes (default: the model's)")
    add("--surrogate", choices=tuple(SURROGATES), help="with --mode train: surrogate gradient (default: the model's)")
    add("--precision", choices=PRECISIONS, help="deploy our side in this precision")
    add("--amp", action="store_true", help="bfloat16 autocast, on spikezoo's side")
    add("--channels-last", action="store_true", help="channels-last memory format, on spikezoo's side")
    add("--torchcompile", action="store_true", help="torch.compile, on spikezoo's side")
    add("--memory", action="store_true", help="also the peak memory of a step, each side in a process of its own")
    add("--channels", type=int, default=128, metavar="N", help="channels of the mode neuron (default: 128)")
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    add("--repeats", type=int, default=7, metavar="N", help="timed steps a side (default: 7)")
    add("--warmup", type=int, default=2, metavar="N", help="untimed steps a side after the first (default: 2)")
    add("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    add("--results-file", metavar="FILE", help=f"write the rows to a {', '.join(FORMATS)} file, replacing it")
    add("--plot", metavar="FILE", help="draw the time of an image over the flag that has several numbers")
    return parser


def _plan(arguments: dict[str, Any]) -> tuple[list[Settings], list[str]]:
    """The settings of all runs, and the names of what varies."""
    lists = {name: arguments.pop(name) or [None] for name in SWEPT}
    if lists["batch_size"] == [None]:
        lists["batch_size"] = [32 if arguments["mode"] == "neuron" else 128]
    varied = [name for name, values in lists.items() if len(values) > 1]
    if len(varied) > 2:
        raise ValueError(f"{', '.join(varied)} all have several numbers: give them to two flags at most.")
    models = image_models() if arguments["model"] == "all" else [arguments["model"]]
    if varied and (len(models) > 1 or arguments["mode"] not in ("train", "infer")):
        raise ValueError(f"{varied[0]} with several numbers is for one model and mode='infer' or 'train'.")
    arguments["device"] = choose_device(arguments["device"]).type
    against = arguments.pop("against")
    arguments["against"] = tuple(dict.fromkeys(against)) if against else () if varied else ("spikingjelly",)
    combinations = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    return [Settings(**{**arguments, **given, "model": m}) for m in models for given in combinations], varied


def main(argv: Iterable[str] | None = None) -> list[Row]:
    """Run the command line and return the rows."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--task"]:  # in_process, not people
        run_task(argv[1])
        return []
    parser = make_parser()
    arguments = vars(parser.parse_args(argv))
    results, plot, several = arguments.pop("results_file"), arguments.pop("plot"), arguments["model"] == "all"
    rows: list[Row] = []
    tables: list[str] = []

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    try:
        if results and Path(results).suffix.lower() not in FORMATS:
            raise ValueError(f"Results file {results!r}: expected a name that ends in {', '.join(FORMATS)}.")
        plan, varied = _plan(arguments)
        if plot:
            check_picture(plot)
            if not varied:
                raise ValueError("--plot draws what varies: give one or two flags several numbers, as in --T 1 2 4.")
        if varied:
            rows = run(*plan)
            tables.append(growth_markdown(rows, varied))
            print(tables[-1])
        else:
            for settings in plan:
                try:
                    found = run(settings, tell=tell if several else None)
                except ValueError as error:
                    if not several:
                        raise
                    tell(f"{settings.model}: {error}")
                    continue
                rows += found
                tables.append(_SHOW.get(settings.mode, markdown)(found))
                print(tables[-1], end="\n\n", flush=True)
    except ValueError as error:
        parser.error(str(error))
    if results and results.lower().endswith(".md"):
        with atomic(results) as temporary:
            temporary.write_text("\n\n".join(tables) + "\n")
    elif results:
        write_rows(results, rows)
    if plot:
        draw_growth(rows, varied, plot)
    return rows
