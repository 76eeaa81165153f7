"""One process at a time in the folder of an experiment."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["InUseError", "lock", "release"]

# Those that this process holds.
_held: dict[Path, FileLock] = {}


class InUseError(ValueError):
    """Another process trains in this folder."""


def _files(folder: Path) -> tuple[Path, Path]:
    # Beside the folder, which holds what a run made and nothing else.
    return folder.with_name(f".{folder.name}.lock"), folder.with_name(f".{folder.name}.running.json")


def lock(folder: Path) -> None:
    """Take a folder for this process, until :func:`release` or its end, however that comes.

    Args:
        folder: A folder that exists.

    Raises:
        InUseError: Another process has it; the message names its pid and host.
    """
    folder = folder.resolve()
    if folder in _held:
        return
    path, facts = _files(folder)
    own = FileLock(path, timeout=0)
    try:
        own.acquire()
    except Timeout:
        try:
            other = json.loads(facts.read_text(encoding="utf-8"))
            who = f"process {other['pid']} on {other['host']} trains there since {other['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "another process trains there"
        raise InUseError(
            f"{folder} is in use: {who}. Wait for it or stop it; another run needs another --experiment."
        ) from None
    except NotImplementedError:  # a file system without locks
        return
    _held[folder] = own
    since = f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}"
    facts.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}), encoding="utf-8")


def release(folder: Path) -> None:
    """Give a folder back.

    Args:
        folder: One that :func:`lock` took, or any other.
    """
    folder = folder.resolve()
    own = _held.pop(folder, None)
    if own is not None:
        path, facts = _files(folder)
        facts.unlink(missing_ok=True)
        own.release()
        path.unlink(missing_ok=True)
