"""The command ``spikezoo``, and ``python -m spikezoo``, which is the same: one file of this folder a command.

A file's docstring is what its ``--help`` says, its first line what the list of commands says of it. Its ``main`` takes
the words behind the command and returns the exit code; what it raises of a user's mistakes becomes one line.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from spikezoo._version import __version__
from spikezoo.checks import nearest
from spikezoo.flags import import_files

__all__ = ["COMMANDS", "main"]

# In the order of the help.
COMMANDS = (
    "train",
    "validate",
    "results",
    "list",
    "count",
    "compare",
    "convert",
    "fold",
    "dynsnn",
    "search",
    "export",
    "push",
    "patches",
    "activations",
    "events",
    "raster",
    "curves",
    "landscape",
    "gallery",
)


def _overview() -> str:
    lines = ["usage: spikezoo COMMAND ..., and spikezoo COMMAND --help", ""]
    for name in COMMANDS:
        said = (importlib.import_module(f"spikezoo.cli.{name}").__doc__ or "").splitlines()[0]
        lines.append(f"    {name:<14}{said[0].lower()}{said[1:].rstrip('.')}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words behind ``spikezoo``; None takes those of the process.

    Returns:
        The exit code: 2 where the arguments make no sense, 141 where nobody reads on, as behind ``| head``.
    """
    try:
        code = _run(argv)
        sys.stdout.flush()  # what nobody reads is noticed here, not when the process ends
        return code
    except BrokenPipeError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written at the end
        return 128 + 13


def _run(argv: Sequence[str] | None) -> int:
    argv = [*(sys.argv[1:] if argv is None else argv)]  # list is a command here, once it was imported
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"spikezoo {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"spikezoo: unknown command {argv[0]!r}. {nearest(argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    try:
        import_files(argv[1:])
        code: int = importlib.import_module(f"spikezoo.cli.{argv[0]}").main(argv[1:])
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return code
