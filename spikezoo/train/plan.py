"""A queue of runs: every row of a plan, one after another, until all have ended or the time is over."""

from __future__ import annotations

import argparse
import gc
import math
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.utils import (
    ParseKwargs,
    is_distributed_env,
    world_info_from_env,
)

from spikezoo.checkpoint import Config, check_run_file, load_state
from spikezoo.checks import nearest
from spikezoo.config_files import find_config, read_yaml
from spikezoo.evaluate import write_rows
from spikezoo.hub.provenance import train_seconds
from spikezoo.registry import is_model, list_models
from spikezoo.train.curves import plot_results
from spikezoo.train.flags import NOT_IN_CONFIGS, build_parser, convert, known_flags, parse_args, recipe_flags, seconds
from spikezoo.train.lock import InUseError
from spikezoo.train.rows import PlanRow, read_rows, share_out
from spikezoo.train.run import Run
from spikezoo.train.stopping import OutOfTime, Stopped

# Flags that a plan sets itself for each of its runs.
SET_BY_PLAN = {*NOT_IN_CONFIGS, "output", "experiment", "resume", "no_resume_opt"}


MEASURES = ("top1", "top5", "loss", "firing_rate", "seconds")


class Planned(NamedTuple):
    """One run of a plan: its name, the row it comes from, what the plan says of it, and its parsed flags."""

    name: str
    row: str
    settings: dict[str, Any]
    args: argparse.Namespace
    plan: PlanRow

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return Path(self.args.output) / self.args.experiment

    def get(self, key: str) -> Any:
        """A flag of the run, 'name' (of its row) or what a dotted key reaches; None where there is none."""
        value: object = {**vars(self.args), "name": self.row}
        for part in key.replace("-", "_").split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def result(self) -> dict[str, Any] | None:
        """The row of results.csv, None where the run has not ended.

        Raises:
            ValueError: It ended with other flags than the plan's, or its files are damaged.
        """
        if not (self.folder / "config.json").is_file():
            return None
        results = Config.read(self.folder).results
        last = self.folder / "last.safetensors"
        if last.is_file() and load_state(last, "epoch")["epoch"] != results.get("epochs"):
            return None  # it was started anew since
        then, now = read_yaml(check_run_file(self.folder / "args.yaml")), vars(self.args)
        keys, defaults = recipe_flags(), {name: action.default for name, action in known_flags().items()}
        if set(self.args.model) & set(":."):  # a checkpoint, and the record names its architecture
            keys.remove("model")
        was = {k: then.get(k, defaults[k]) for k in sorted(keys)}  # of a flag that is newer than the run, the default
        if changed := [f"{k} is {now[k]!r} and was {then.get(k)!r}" for k in was if now[k] != was[k]]:
            raise ValueError(f"{self.folder} holds a finished run of other flags: {'; '.join(changed)}. Move it away.")
        seconds = train_seconds(self.folder)
        paper = {f"paper_{measure}": number for measure, number in self.plan.paper.items()}
        return {"name": self.name, "overrides": self.settings, "seconds": seconds, **results, **paper}


def to_flags(settings: Mapping[str, Any], config: Path | None) -> list[str]:
    """The command line of a row's settings; a mapping with dotted keys starts from the config's."""
    base = {str(k).replace("-", "_"): v for k, v in (read_yaml(config) if config else {}).items()}
    actions = {action.dest: action for action in build_parser()._actions if action.dest not in SET_BY_PLAN}
    wanted: dict[str, Any] = {}
    for key, value in settings.items():
        flag, dot, inner = str(key).partition(".")
        dest = flag.replace("-", "_")
        if dest not in actions:
            raise ValueError(f"Unknown key {key!r}. {nearest(dest, actions)}")
        if not dot and dest in wanted:
            raise ValueError(f"Key {key!r} is there twice, with - and with _, or behind a key of it. Leave one out.")
        if not dot:
            wanted[dest] = value
        elif isinstance(actions[dest], ParseKwargs):
            wanted[dest] = {**(wanted.get(dest, base.get(dest)) or {}), inner: value}
        else:
            raise ValueError(f"Key {key!r}: {flag!r} is no mapping.")
    flags = []
    for dest, value in wanted.items():
        if value is None:
            raise ValueError(f"Key {dest!r} has no value.")
        value, name = convert(actions[dest], dest, value), dest.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, Mapping):
            flags += [f"--{name}", *(f"{k}={v if isinstance(v, str) else repr(v)}" for k, v in value.items())]
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def read_plan(
    path: Path, output: str, more: Sequence[str], prog: str = "spikezoo train"
) -> tuple[list[Planned], dict[str, str] | None]:
    """Read and check a whole plan: its runs in order, and what to plot.

    Raises:
        FileNotFoundError: No such plan or config.
        ValueError: Unknown keys, values of another type, two runs of one name.
    """
    rows, chart = read_rows(path)
    if chart is not None and chart["y"] not in MEASURES:
        raise ValueError(f"{path}: plot.y={chart['y']!r} is not measured. {nearest(chart['y'], MEASURES)}")
    folder, runs = Path(output) / path.stem, []
    for row in rows:
        try:
            source = find_config(row.source) if row.source else None
            config = ["--config", str(source)] if source else []
            argv = [*config, *to_flags(row.placed(folder), source), *more]
            argv += ["--output", str(folder), "--experiment", row.name, "--resume", "auto"]
            args = parse_args(argv, prog)
            if not is_model(args.model) and ":" not in args.model:
                raise ValueError(f"Unknown model {args.model!r}. {nearest(args.model, list_models())}")
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{row.where}: {error}") from error
        runs.append(Planned(row.name, row.row, row.settings, args, row))
    return runs, chart


def write_results(folder: Path, runs: Sequence[Planned], chart: Mapping[str, str] | None) -> None:
    """Write results.csv, and the picture, of all runs that have ended, whoever ran them."""

    def ended() -> dict[str, dict[str, Any]]:
        found = {}
        for run in runs:
            try:
                if row := run.result():
                    found[run.name] = row
            except (ValueError, OSError):
                pass  # reported when its turn comes
        return found

    rows = ended()
    while rows:
        write_rows(folder / "results.csv", list(rows.values()))
        if chart:
            plot_results(folder / f"{folder.name}.png", runs, rows, chart)
        before, rows = rows, ended()
        if rows.keys() == before.keys():  # else another process ended a run meanwhile
            return


def run_plan(argv: Sequence[str], prog: str = "spikezoo train") -> int:
    """Work through a plan; returns how many runs failed."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--time-budget")
    parser.add_argument("--output", default="output")
    own, more = parser.parse_known_args(argv)
    if taken := [f for f in more if f.partition("=")[0] in ("-c", "--config", "--experiment", "--resume")]:
        raise ValueError(f"{' '.join(taken)} with --plan: the plan says that for each of its runs.")
    deadline = time.monotonic() + seconds(own.time_budget) if own.time_budget else math.inf
    local_rank, rank, world = world_info_from_env() if is_distributed_env() else (0, 0, 1)
    launched = {name: os.environ.pop(name, None) for name in ("WORLD_SIZE", "SLURM_NTASKS")}  # each run is on its own
    path = find_config(own.plan, "plan")
    runs, chart = read_plan(path, own.output, more, prog)
    folder = Path(own.output) / path.stem
    failed, left = 0, []
    share = share_out([run.plan for run in runs], world)[rank]
    mine = [run for run in runs if run.name in share]
    for number, planned in enumerate(mine, 1):
        told = f"[{number}/{len(mine)}] {planned.name}"
        try:
            if planned.result():
                print(f"{told}: finished before.", flush=True)
                continue
            if time.monotonic() >= deadline:
                raise OutOfTime("not started in this budget")
            print(f"{told}: {planned.args.command}", flush=True)
            if world > 1 and planned.args.device is None and torch.cuda.is_available():
                planned.args.device = f"cuda:{local_rank % torch.cuda.device_count()}"
            run = Run(planned.args, deadline)
            try:
                run.finish(run.train())
            finally:
                run.close()
            del run
        except (OutOfTime, InUseError) as stopped:
            left.append(f"{planned.name} ({stopped})")
        except Stopped:
            write_results(folder, runs, chart)
            raise
        except (Exception, SystemExit) as error:
            failed += 1
            if not isinstance(error, ValueError | OSError | SystemExit):
                traceback.print_exc()
            print(f"{told}: failed. {type(error).__name__}: {error}", flush=True)
        write_results(folder, runs, chart)
        gc.collect()
        torch.compiler.reset()  # or the next nets would count as recompilations of this one
    write_results(folder, runs, chart)
    if left:
        print(f"Time is over, {len(left)} left: {', '.join(left)}. Give the same command again to go on.", flush=True)
    if failed:
        print(f"{failed} of {len(mine)} runs failed.", flush=True)
    print(f"Results         {folder / 'results.csv'}", flush=True)
    if world > 1:  # torchrun would end the others with the first process that fails
        os.environ.update({name: value for name, value in launched.items() if value is not None})
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(days=30))
        total = torch.tensor(failed)
        dist.all_reduce(total)
        dist.destroy_process_group()
        return int(total)
    return failed
