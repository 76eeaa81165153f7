"""Trainings on an accelerator that is lent for minutes and reaches nothing: data in, a plan at once, weights out.

    python -m tools.accelerator collect PART ... --join JOINED --unpack "PROGRAM {parts} {out}" --out DATA
    python -m tools.accelerator run configs/zoo_accelerator.yaml --for 560s --jobs 3 --out DIR --data-dir DATA
    python -m tools.accelerator pack DIR --out PACK
    python -m tools.accelerator unpack PACK ... --out DIR

docs/accelerator.md says how they go together.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

import spikezoo
from spikezoo.checkpoint import atomic, file_hash, load_state, read_config
from spikezoo.config_files import find_config
from spikezoo.evaluate import open_model, write_rows
from spikezoo.flags import leave
from spikezoo.train.flags import seconds
from spikezoo.train.rows import read_rows
from spikezoo.transforms.tickets import tickets

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
SUMS = "SHA256SUMS"  # as sha256sum writes it
SPARE, LEAST = 0.95, 0.1  # share of the time that may be planned; of a row's own, with less of which it is left out
# What a row may take of others, and what measuring its speed does without.
TAKEN = ("initial_checkpoint", "ticket_init", "teacher", "teacher_cache")
OUTPUT = {"measure": "measured", "train": "output"}
LENGTH = re.compile(r"to repeat it: --(progressive|updates) (.+)")

# ------------------------------------------------------------------------------------- files in, files out


def check_sums(folders: Iterable[str | Path]) -> dict[str, Path]:
    """Find the files that SHA256SUMS in one of the folders lists, in its order, and check their hashes.

    Raises:
        FileNotFoundError: A list or a file that is missing.
        ValueError: A damaged file.
    """
    places = [Path(folder) for folder in folders]
    lists = [place / SUMS for place in places if (place / SUMS).is_file()]
    if not lists:
        raise FileNotFoundError(f"No {SUMS}, the list of all files, in {', '.join(map(str, places))}.")
    pairs = [line.split(maxsplit=1) for line in lists[0].read_text(encoding="utf-8").splitlines()]
    wanted = {name: digest for digest, name in pairs}
    found = {name: place / name for name in wanted for place in places if (place / name).is_file()}
    if missing := [name for name in wanted if name not in found]:
        raise FileNotFoundError(
            f"A part is missing: {len(missing)} of {len(wanted)} files are not here, such as {missing[0]}."
        )
    for name, path in found.items():
        if file_hash(path) != wanted[name]:
            raise ValueError(f"{path} is damaged: its hash is not that in {lists[0]}. Bring it again.")
    return found


def collect(args: argparse.Namespace) -> None:
    """Join the parts of the data, and let the caller's program make of them what --data-dir takes."""
    for part in args.parts:
        shutil.copytree(part, args.join, dirs_exist_ok=True)
    if not args.unpack:
        return
    check_sums([args.join])
    Path(args.out).mkdir(parents=True, exist_ok=True)
    done = subprocess.run([word.format(parts=args.join, out=args.out) for word in shlex.split(args.unpack)])
    if done.returncode or not any(Path(args.out).iterdir()):
        raise ValueError(f"--unpack {args.unpack!r} ended with {done.returncode}, and {args.out} is not to be used.")


def newest(folder: Path) -> Path | None:
    """What a run left: its folder where it finished, else its newest training state, None where there is none."""
    if (folder / "config.json").is_file():
        return folder
    states = [path for path in folder.glob("*.safetensors") if re.match("last|recovery-", path.name)]
    return max(states, key=lambda path: tuple(load_state(path, "epoch", "batch").values()), default=None)


def halve(source: Path, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the weights of a run in float16, with what is known of it beside them."""
    config = read_config(source)
    model, dataset, _ = open_model(config["architecture"], {}, checkpoint=source)
    model = spikezoo.bake(model) if tickets(model) else model
    block = config["spikezoo"]
    results = {"dataset": dataset, "split": block.get("split"), **block.get("results", {}), "accelerator": dict(facts)}
    results["stored"] = "weights in float16; the accuracy was measured before they were rounded"
    model.pretrained_cfg |= {**{key: block["inputs"][key] for key in ("mean", "std")}, "inputs": block["inputs"]}
    spikezoo.save_checkpoint(model, folder, results, dtype=torch.float16)
    for name in ("summary.csv", "args.yaml", "metadata.json"):
        if (path := (source if source.is_dir() else source.parent) / name).is_file():
            shutil.copyfile(path, folder / name)


def pack(args: argparse.Namespace) -> None:
    """Store what the rows of a run left, in the plan's order, in a few files of limited size."""
    record = json.loads((Path(args.folder) / "record.json").read_text(encoding="utf-8"))
    limit, lost, out = int(args.size * 2**20), [], Path(args.out)
    stream = io.BytesIO()
    with tempfile.TemporaryDirectory() as place, tarfile.open(fileobj=stream, mode="w") as archive:
        for name, facts in record["rows"].items():
            if source := newest(Path(args.folder) / "output" / record["plan"] / name):
                try:
                    halve(source, Path(place) / name, facts)
                    needed = sum(path.stat().st_size + 1024 for path in (Path(place) / name).iterdir())
                    if stream.tell() + needed + 20480 > limit * (args.files - 1):  # the last file is the list
                        raise ValueError(f"does not fit into {args.files} files of {args.size} MiB")
                    archive.add(Path(place) / name, name)
                except (ValueError, OSError) as error:
                    lost.append(f"{name}: {error}")
    data, sums = stream.getvalue(), []
    out.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(data), limit)):
        (out / f"runs.tar.{number}").write_bytes(data[start : start + limit])
        sums.append(f"{hashlib.sha256(data[start : start + limit]).hexdigest()}  runs.tar.{number}\n")
    (out / SUMS).write_text("".join(sums), encoding="utf-8")
    print(f"{len(data):,} bytes in {len(sums)} files and {out / SUMS}")
    if lost:
        raise ValueError(f"Not packed are {'; '.join(lost)}.")


def unpack(args: argparse.Namespace) -> None:
    """Join what pack wrote, after a check of its hashes, into folders that validate.py --checkpoint takes."""
    data = b"".join(path.read_bytes() for path in check_sums(args.folders).values())
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        runs = sorted({name.partition("/")[0] for name in archive.getnames()})
        if taken := [run for run in runs if (Path(args.out) / run).exists()]:
            raise ValueError(f"{Path(args.out) / taken[0]} exists, and nothing was overwritten. Give another --out.")
        if hasattr(tarfile, "data_filter"):  # Python 3.11.4 and later
            archive.extractall(args.out, filter="data")
        else:
            archive.extractall(args.out)
    for run in runs:
        results = read_config(Path(args.out) / run)["spikezoo"]["results"]
        print(f"{Path(args.out) / run}: {results['accelerator']['state']}, {results.get('top1', 'not measured')}")


# --------------------------------------------------------------------------------------------------- the clock


@dataclass
class Row:
    """One row of a plan.

    Attributes:
        settings: Its flags, and its name.
        work: Seconds that it would train alone, at scale 1.
        needs: Rows whose output it takes.
        left: While it trains: estimated seconds until its first step, and of training alone from there.
        state: waiting, measuring, ready or training; at last finished, stopped, failed or left out.
        facts: What the record says of it.
    """

    settings: dict[str, Any]
    work: float
    needs: set[str] = field(default_factory=set)
    left: list[float] = field(default_factory=list)
    state: str = "waiting"
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs, or ever will."""
        return self.state in ("finished", "stopped", "failed", "left out")


def advance(running: Collection[list[float]], longest: float = math.inf) -> float:
    """Let time pass for rows, each [seconds until its first step, of training alone]: those that train share it.

    It passes until the next one starts or ends to train, or for so many seconds, and is returned.
    """
    training = [left for left in running if left[0] <= 0 < left[1]]
    starting = [left for left in running if left[0] > 0]
    step = min([longest, *(left[0] for left in starting), *(left[1] * len(training) for left in training)])
    for left in starting:
        left[0] = left[0] - step if left[0] > step + 1e-9 else 0
    for left in training:
        left[1] = left[1] - step / len(training) if left[1] > step / len(training) + 1e-9 else 0
    return step


def makespan(rows: Mapping[str, Row], jobs: int, overhead: float, scale: float) -> float:
    """Seconds until all rows have ended, where those that do not train yet get ``scale`` times their work."""
    running = {name: list(row.left) for name, row in rows.items() if row.state == "training"}
    waiting = {name: row for name, row in rows.items() if not row.ended and row.state != "training"}
    passed = 0.0
    while running or waiting:
        running = {name: left for name, left in running.items() if max(left) > 0}
        for name, row in list(waiting.items()):
            if len(running) < jobs and not row.needs & (running.keys() | waiting.keys()):
                running[name] = [overhead, scale * row.work]
                del waiting[name]
        passed += advance(running.values()) if any(max(left) > 0 for left in running.values()) else 0
    return passed


def fit(rows: Mapping[str, Row], jobs: int, overhead: float, time_left: float) -> float:
    """The largest scale at which all rows end in time, above 1 only for the last one that waits.

    Where it is too small, the last rows that wait are left out.
    """
    while waiting := [row for row in rows.values() if not row.ended and row.state != "training"]:
        low, high = 0.0, 100.0 if len(waiting) == 1 else 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if makespan(rows, jobs, overhead, middle) <= time_left else (low, middle)
        if low >= LEAST:
            return low
        waiting[-1].state = "left out"
    return 0.0


def rows_of(plan: Path) -> dict[str, Row]:
    """The rows of a plan by name, as plans of their own for a folder in which train.py writes to output/.

    Raises:
        ValueError: A row without train_time, or what :func:`spikezoo.train.rows.read_rows` refuses.
    """
    rows: dict[str, Row] = {}
    for row in read_rows(plan)[0]:
        settings = {"name": row.name, **row.placed(Path("output", plan.stem))}
        if "train_time" not in settings:
            raise ValueError(f"{row.where}: it has no train_time, which could be scaled.")
        if row.source:
            settings["config"] = str(find_config(row.source).resolve())
        rows[row.name] = Row(settings, seconds(settings["train_time"], f"{row.where}: train_time"), set(row.after))
    return rows


# ------------------------------------------------------------------------------------------------------- run


class Queue:
    """The rows of a plan at work, each as one process of train.py at a time.

    Args:
        args: Parsed flags of ``run``.
        more: Flags of train.py, for all rows.

    Raises:
        ValueError: The time is over before the first step.
    """

    def __init__(self, args: argparse.Namespace, more: Sequence[str]) -> None:
        self.plan, self.folder, self.places, self.more = (
            find_config(args.plan),
            Path(args.out).resolve(),
            args.jobs,
            more,
        )
        self.overhead, self.last = args.overhead, time.monotonic()
        self.end = self.last + seconds(args.within, "--for")
        self.save_at, self.term_at = self.end - args.grace, self.end - args.grace / 4
        self.rows = rows_of(self.plan)
        for name, row in self.rows.items():
            if (self.output(name) / "config.json").is_file():
                row.state = "finished"
        if not all(row.ended for row in self.rows.values()) and not self.scale(self.overhead):
            raise ValueError(
                f"--for {args.within} is over before the first step: to measure and to start a row is taken to need "
                f"{self.overhead:.0f} s each (--overhead), and {args.grace:.0f} s are kept for saving (--grace)."
            )

    def output(self, name: str) -> Path:
        """The folder that a row writes."""
        return self.folder / "output" / self.plan.stem / name

    def scale(self, reserve: float = 0) -> float:
        """What the rows that do not train yet get of their time, of what is left."""
        now, running = time.monotonic(), [row.left for row in self.rows.values() if row.state == "training"]
        while (passed := now - self.last) > 1e-3:
            self.last += advance(running, passed)
        return fit(self.rows, self.places, self.overhead, SPARE * (self.save_at - now) - reserve)

    def set(self, name: str, state: str, **facts: Any) -> None:
        """Change, print and record the state of a row."""
        row = self.rows[name]
        row.state, row.facts = state, {**row.facts, "state": state, **facts}
        told = ", ".join(f"{key} {value}" for key, value in facts.items())
        print(f"{self.end - time.monotonic():6.1f} s left  {name} {state}{told and ': '}{told}", flush=True)
        with atomic(self.folder / "record.json") as temporary:
            states = {name: {"state": row.state, **row.facts} for name, row in self.rows.items()}
            temporary.write_text(json.dumps({"plan": self.plan.stem, "rows": states}, indent=1), encoding="utf-8")

    async def process(self, name: str, stage: str, settings: Mapping[str, Any]) -> list[str]:
        """Run train.py on one row, in stage measure until it says how long the row is; returns what it printed."""
        file, now = self.folder / stage / name / f"{self.plan.stem}.yaml", time.monotonic()
        if stage == "measure" or not newest(self.output(name)):  # else it was begun with a length that it has to keep
            with atomic(file) as temporary:
                temporary.write_text(yaml.safe_dump({"runs": [settings]}, sort_keys=False), encoding="utf-8")
        command = [sys.executable, str(TRAIN), "--plan", str(file), *self.more, "--output", OUTPUT[stage]]
        command += ["--time-budget", f"{max(self.save_at - now, 1):.1f}s"]
        process = await asyncio.create_subprocess_exec(
            *command, cwd=self.folder, stdout=-1, stderr=-2, start_new_session=True, limit=2**24
        )

        def stop(number: signal.Signals) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

        async def end_children() -> None:
            while process.returncode is None:
                await asyncio.sleep(0.1)
            await asyncio.sleep(1)
            stop(signal.SIGKILL)  # compilers and loaders that it left hold its output open

        loop, lines, watcher = asyncio.get_running_loop(), [""], asyncio.create_task(end_children())
        ends = ((self.term_at, signal.SIGTERM), (self.end, signal.SIGKILL))
        timers = [loop.call_later(at - now, stop, number) for at, number in ends]
        try:
            with open(file.with_suffix(".log"), "w", encoding="utf-8") as log:
                assert process.stdout is not None  # stdout=-1 is a pipe
                async for line in process.stdout:
                    log.write(line.decode(errors="replace"))
                    lines += filter(None, [line.decode(errors="replace").strip()])
                    if stage == "measure" and LENGTH.search(lines[-1]):
                        break
        finally:
            for timer in timers:
                timer.cancel()
            watcher.cancel()
            stop(signal.SIGKILL)
            await process.wait()
        return lines

    async def job(self, name: str) -> None:
        """All that there is to do for a row."""
        row, train = self.rows[name], dict(self.rows[name].settings)
        async with self.measuring:
            if row.ended:
                self.set(name, row.state, **({} if row.state == "finished" else {"why": "no time for it"}))
                return
            self.set(name, "measuring")
            alone = {key: value for key, value in train.items() if not row.needs or key not in TAKEN}
            lines = await self.process(name, "measure", alone)
        if not (found := LENGTH.search(lines[-1])):
            self.end_of(name, lines)
            return
        pairs = [pair.rpartition(":") for pair in found[2].split()]
        await asyncio.gather(*(self.jobs[other] for other in row.needs))
        row.state = row.state if row.ended else "ready"
        async with self.turn:
            await self.turn.wait_for(lambda: row.ended or self.may_train(name))
            self.turn.notify_all()
            scale = self.scale()
            lost = [other for other in row.needs if self.rows[other].state != "finished"]
            if row.ended or lost:
                self.set(name, "left out", why=f"needs {lost[0]}" if lost else "no time for it")
                return
            length = {int(size or 0): max(round(int(count) * scale), 1) for size, _, count in pairs}
            del train["train_time"]
            train |= {found[1]: length if found[1] == "progressive" else length[0]}
            row.left = [self.overhead, scale * row.work]
            self.set(name, "training", scale=round(scale, 3), updates=sum(length.values()))
        self.end_of(name, await self.process(name, "train", train))
        async with self.turn:
            self.turn.notify_all()

    def may_train(self, name: str) -> bool:
        """Whether a row that is ready is the first one in the plan for a free place."""
        states = {other: row.state for other, row in self.rows.items()}
        first = next(other for other, state in states.items() if state == "ready")
        return name == first and list(states.values()).count("training") < self.places

    def end_of(self, name: str, lines: Sequence[str]) -> None:
        """Take note of how a process ended, by what it printed last or said of an error."""
        told = [line for line in lines if ": failed." in line or line.startswith("Time is over")] or [lines[-1]]
        if (self.output(name) / "config.json").is_file():
            self.set(name, "finished")
        else:
            stopped = time.monotonic() > self.term_at or told[0].startswith("Time is over")
            self.set(name, "stopped" if stopped else "failed", why=told[0])

    async def work(self) -> None:
        """Work until all rows have ended or the time is over."""
        self.turn, self.measuring = asyncio.Condition(), asyncio.Semaphore(max(self.places, (os.cpu_count() or 1) // 2))
        task: Any = asyncio.current_task()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # which ends the processes, too
        self.jobs = {name: asyncio.create_task(self.job(name)) for name in self.rows}
        await asyncio.gather(*self.jobs.values())


def run(args: argparse.Namespace, more: Sequence[str]) -> int:
    """Run the rows of a plan within a time; returns how many have not finished."""
    data = ["--data-dir", str(Path(args.data_dir).resolve())] if args.data_dir else []
    queue = Queue(args, [*data, *more])
    asyncio.run(queue.work())
    done = [name for name, row in queue.rows.items() if row.state == "finished"]
    results = [{"name": name, **read_config(queue.output(name))["spikezoo"]["results"]} for name in done]
    if results:
        write_rows(queue.output("results.csv"), results)
    return len(queue.rows) - len(done)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the four commands; returns the exit code."""
    parser = argparse.ArgumentParser("python -m tools.accelerator", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True, dest="command")
    add = commands.add_parser("collect").add_argument
    add("parts", nargs="+", metavar="PART", help=f"folders of files, one of them with {SUMS}, the list of all")
    add("--join", required=True, metavar="DIR", help="on a local disk; parts of earlier calls may be there already")
    add("--unpack", metavar="COMMAND", help="makes {out} of {parts}; without it the parts are only joined")
    add("--out", default="data", metavar="DIR")
    add = commands.add_parser("run").add_argument
    add("plan", metavar="PLAN", help="rows with train_time, what each would train alone; other flags go to train.py")
    add("--for", dest="within", required=True, metavar="TIME", help="of the whole, such as 560s")
    add("--jobs", type=int, default=3, metavar="N", help="rows that train at once (default: %(default)s)")
    add("--out", required=True, metavar="DIR", help="where the processes work; relative paths of the plan are in it")
    add("--data-dir", metavar="DIR")
    add(
        "--overhead", type=float, default=40, metavar="S", help="seconds of a row without a step (default: %(default)s)"
    )
    add("--grace", type=float, default=20, metavar="S", help="seconds at the end to save in (default: %(default)s)")
    for name in ("pack", "unpack"):
        add = commands.add_parser(name).add_argument
        if name == "pack":
            add("folder", metavar="DIR")
        else:
            add("folders", metavar="DIR", nargs="+")
        add("--out", required=True, metavar="DIR")
        if name == "pack":
            add("--files", type=int, default=8, metavar="N", help="at most so many, the list among them")
            add("--size", type=float, default=16, metavar="MIB", help="of a file, at most")
    args, more = parser.parse_known_args(argv)
    if args.command == "run":
        return run(args, more)
    if more:
        parser.error(f"unknown {more[0]}")
    {"collect": collect, "pack": pack, "unpack": unpack}[args.command](args)
    return 0


if __name__ == "__main__":
    leave(main)
