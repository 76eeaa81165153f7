"""Training: one run after its flags, and plans of runs.

Read ``run.py`` first: it is the loop. ``flags.py`` says what can be asked for, ``build.py`` makes model, batches and
teacher, ``length.py`` the schedule, ``objective.py`` the loss, ``state.py`` what a run needs to go on, ``output.py``
what it writes and says. No method of pruning has a name here: the hooks of :class:`spikezoo.transforms.Transform` are
called.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import torch.distributed as dist

from spikezoo.flags import import_files
from spikezoo.train.flags import parse_args
from spikezoo.train.plan import run_plan
from spikezoo.train.run import Run
from spikezoo.train.stopping import Stopped

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, prog: str = "spikezoo train") -> int:
    """Train what was asked for.

    Args:
        argv: Flags; None takes those of the process.
        prog: The command that they stand behind.

    Returns:
        The exit code; of a plan how many of its runs failed, 100 for more.
    """
    logging.getLogger("timm").setLevel(logging.WARNING)
    argv = sys.argv[1:] if argv is None else list(argv)
    import_files(argv)
    try:
        if any(flag.partition("=")[0] == "--plan" for flag in argv):
            return min(run_plan(argv, prog), 100)  # of 256 failed runs the system would see 0
        return _one(parse_args(argv, prog))
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        return stopped.code


def _one(args: argparse.Namespace) -> int:
    if args.time_budget:
        raise ValueError("--time-budget is for --plan FILE; a single run saves with --recovery-interval N.")
    run = None
    try:
        run = Run(args)
        run.finish(run.train())
    finally:
        if run is not None:
            run.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
