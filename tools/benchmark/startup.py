"""What a start costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import spikezoo
from spikezoo.evaluate import environment
from tools.benchmark.measuring import in_process
from tools.benchmark.models import make_model
from tools.benchmark.report import footer
from tools.benchmark.settings import Row, Settings

RUNS = 5  # of imports and of loading


def _import_s(modules: str) -> float:
    code = f"import time; start = time.perf_counter(); import {modules}; print(time.perf_counter() - start)"
    place, quiet = Path(__file__).parent, {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=place, env=quiet
    )
    return float(done.stdout.split()[-1])


def startup_rows(settings: Settings) -> list[Row]:
    """Time imports, the first call of the deployed model and the loading of a checkpoint.

    Imports and first calls are timed in fresh processes, the calls without and with what the compiler keeps on disk.
    """
    without, whole = [], []
    for _ in range(RUNS):
        without.append(_import_s("torch, timm"))
        whole.append(_import_s("torch, timm, spikezoo"))
    found = {
        "import torch, timm": without,
        "import torch, timm, spikezoo": whole,
        "spikezoo adds": [b - a for a, b in zip(without, whole, strict=True)],
    }
    precision = settings.precision or "bf16"
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty", "full"):
            what = f"first call deployed {precision}, compiler's cache {state}"
            found[what] = [in_process("first-call", settings, {"TORCHINDUCTOR_CACHE_DIR": cache})]
    model = make_model(settings)
    with tempfile.TemporaryDirectory() as folder:
        spikezoo.save_checkpoint(model, folder)
        found["load a checkpoint"] = []
        for _ in range(RUNS):
            start = time.perf_counter()
            spikezoo.create_model(f"local-dir:{folder}", pretrained=True)
            found["load a checkpoint"].append(time.perf_counter() - start)
    facts = environment()
    return [
        {
            "mode": "startup", "model": settings.model, "T": model.T, "batch_size": settings.batch_size,
            "ticket": settings.ticket, "what": what, "seconds": round(median(times), 3),
            "seconds_min": round(min(times), 3), "seconds_max": round(max(times), 3), "runs": len(times), **facts,
        }
        for what, times in found.items()
    ]  # fmt: skip


def startup_markdown(rows: Sequence[Row]) -> str:
    """The rows of the mode ``startup`` as a table for people."""
    first = rows[0]
    lines = [f"{first['model']}, start-up, T={first['T']}, batch {first['batch_size']}", ""]
    lines += ["| what | seconds: median (min-max) | runs |", "|---|---|---|"]
    for row in rows:
        seconds = f"{row['seconds']:.3f} ({row['seconds_min']:.3f}-{row['seconds_max']:.3f})"
        lines.append(f"| {row['what']} | {seconds} | {row['runs']} |")
    return "\n".join([*lines, "", *footer(first)])
