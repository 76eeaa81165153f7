"""Leaving a run in good order: Ctrl-C, the SIGTERM of a cluster, a process of the run that is gone."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from spikezoo.train.run import Run

__all__ = ["OutOfTime", "Stopped", "find_peers", "listening", "lost_peers", "wanted"]


class OutOfTime(Exception):
    """The time budget of a plan is over; what is needed to go on is saved."""


class Stopped(Exception):
    """A signal asked the run to stop; what is needed to go on is saved.

    Args:
        number: The signal.
        said: What was saved where.
    """

    def __init__(self, number: int, said: str) -> None:
        super().__init__(f"Stopped by {signal.Signals(number).name} {said}")
        self.code = 128 + number


@contextmanager
def listening(run: Run) -> Iterator[None]:
    """Note the first Ctrl-C or SIGTERM in ``run.asked``, at which the run stops after its step; a second one stops it.

    Args:
        run: The run.
    """

    def note(number: int, _frame: FrameType | None) -> None:
        if run.asked:
            raise KeyboardInterrupt
        run.asked = number
        run.say(f"{signal.Signals(number).name}: stopping after this step. Once more stops at once.")

    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wanted(run: Run) -> int:
    """The signal that asked any process of the run to stop, 0 for none.

    Args:
        run: The run.
    """
    if run.args.distributed:  # all have to stop at the same step
        asked = torch.tensor(run.asked, device=run.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return int(asked)
    return run.asked


def find_peers(run: Run) -> list[tuple[str, int]]:
    """Host and pid of every process of a run.

    Args:
        run: The run.
    """
    own = (socket.gethostname(), os.getpid())
    peers = [own] * run.args.world_size
    if run.args.distributed:
        dist.all_gather_object(peers, own)
    return peers


def _gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        if stat.is_file():
            return stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] in "ZX"
        os.kill(pid, 0)
    except OSError:
        return True
    return False


def lost_peers(run: Run, error: BaseException) -> str:
    """What to say where a process of the run cannot be reached any more.

    Args:
        run: The run.
        error: What the communication raised.
    """
    host = socket.gethostname()
    deadline = time.monotonic() + (5 if any(peer[0] == host for peer in run.peers) else 0)
    gone: list[int] = []
    while not gone:  # the system closes the connections of a process before it says that the process is gone
        gone = [rank for rank, (where, pid) in enumerate(run.peers) if where == host and _gone(pid)]
        if time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    who = f"rank {', '.join(map(str, gone))} is gone" if gone else "another rank is gone"
    first = str(error).strip().partition("\n")[0]
    return (
        f"Rank {run.args.rank} stopped at epoch {run.epoch + 1}, batch {run.batch}: {who} ({first[:120]}). "
        "To go on from what was saved last: the same command with --resume auto."
    )
