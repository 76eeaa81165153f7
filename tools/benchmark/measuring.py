"""Time and memory of steps, in turns, and in processes of their own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import spikezoo
from spikezoo.deploy import has_compiler
from tools.benchmark.models import make_model
from tools.benchmark.settings import Settings, Step
from tools.benchmark.sides import BASELINES, Side, make_inputs, spikezoo_side, timed


def measure(sides: Sequence[Side], repeats: int, warmup: int, device: str = "cpu") -> None:
    """Run the sides in turns and fill in their times."""
    for side in tqdm(sides, "first steps, which may compile", leave=False, disable=None):
        side.first_s += timed(side.step, device)
    for turn in range(warmup + repeats):
        for side in sides:
            seconds = timed(side.step, device)
            if turn >= warmup:
                side.times.append(seconds)


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS (resident now) or VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}.")


def _release() -> None:
    """Return freed memory to the system, so that what compilation used once is not counted."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_memory(step: Step, device: str = "cpu") -> int:
    """Bytes that a step holds at its peak, beyond what there was before the first one.

    Args:
        step: The step. It runs three times; the first two, which compile and warm up, do not count.
        device: cpu (resident memory of this process) or cuda (memory of torch's allocator).
    """
    _release()
    if device == "cuda":
        start = torch.cuda.memory_allocated()
        step(), step()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    start = _status("VmRSS")
    step(), step()
    _release()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return _status("VmHWM") - start


def _memory_task(settings: Settings, side: str) -> float:
    if has_compiler():
        import torch._inductor.compile_fx  # noqa: F401  # the compiler's own modules are no memory of a step
    model = make_model(settings)
    images, labels = make_inputs(settings, model)
    build = spikezoo_side if side == "spikezoo" else BASELINES[side]
    return peak_memory(build(model, images, labels, settings).step, settings.device) / 2**20


def _first_call_task(settings: Settings) -> float:
    model = make_model(settings)
    images, _ = make_inputs(settings, model)
    start = time.perf_counter()
    spikezoo.deploy(model, settings.precision or "bf16", example=images)
    return time.perf_counter() - start


# What starts this file as a process, from a checkout that need not be installed.
DOOR = Path(__file__).parent.parent.parent / "benchmark.py"


TASKS: dict[str, Callable[..., float]] = {"memory": _memory_task, "first-call": _first_call_task}


def in_process(task: str, settings: Settings, environ: Mapping[str, str] | None = None, **arguments: Any) -> float:
    """Run one of ``TASKS`` in a process of its own and return its number.

    Raises:
        RuntimeError: It failed; the message has the end of its log.
    """
    job = json.dumps({"task": task, "settings": asdict(settings), "arguments": arguments})
    done = subprocess.run(
        [sys.executable, str(DOOR), "--task", job],
        capture_output=True, text=True, check=False, env={**os.environ, **(environ or {})},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{settings.model}, {task} {arguments}: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def run_task(job: str) -> None:
    """Do what :func:`in_process` asks a process for."""
    read = json.loads(job)
    settings = Settings(**{**read["settings"], "against": tuple(read["settings"]["against"])})
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    print(TASKS[read["task"]](settings, **read["arguments"]))
