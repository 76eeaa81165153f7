"""How a checkpoint was trained, as far as somebody wrote it down, without the folders of the machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from spikezoo.checkpoint import Config, read_metadata, read_table

__all__ = ["portable_command", "portable_place", "train_seconds", "training_facts"]


def portable_command(command: str) -> str:
    """A command without the folders of the machine that it ran on.

    Folders of data become DATA, folders of output OUTPUT; files of ``configs/`` and relative paths stay.

    Args:
        command: As :func:`shlex.join` writes it; several are joined by ``&&``.
    """
    return " && ".join(map(_portable, command.split(" && ")))


def _portable(command: str) -> str:
    words = shlex.split(command)
    told, before = [], ""
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if equals or not word.startswith("--"):
            value = portable_place(flag, value, "train.py" in words[:2] or "train" in words[1:4])
            word = f"{flag}={value}" if equals else value
        told.append(word)
        before = word
    return shlex.join(told)


def portable_place(flag: str, value: str, trains: bool) -> str:
    """What a command's argument says of a place, without the folders above it.

    Args:
        flag: The flag that it stands behind, such as ``--teacher``.
        value: The argument; what is no place stays as it is.
        trains: Whether the command is train.py's.
    """
    if flag == "--data-dir":
        return "DATA"
    if flag == "--output" and trains:
        return "OUTPUT"
    scheme, colon, path = value.rpartition(":")
    above = Path(path).parts[:-1]
    foreign = path.startswith(("/", "~", ".."))
    if foreign and "configs" in above:
        return path[path.rindex("configs/") :]
    if foreign or (flag in ("--output", "--checkpoint", "--initial-checkpoint", "--resume") and above):
        return f"{scheme}{colon}{'DATA' if scheme in ('npz', 'events') else 'OUTPUT'}/{Path(path).name}"
    return value


def train_seconds(folder: Path) -> float | None:
    """How long the epochs of a run took, None where its table lacks the first ones.

    Args:
        folder: The run's.

    Raises:
        ValueError: The table is not as the run wrote it.
    """
    rows = read_table(folder / "summary.csv")
    if not rows or rows[0]["epoch"] not in ("0", "1"):
        return None
    return round(sum(float(row["train_seconds"]) for row in rows), 1)


def training_facts(checkpoint: str | Path) -> dict[str, Any]:
    """What is known of how a checkpoint was trained: command, seed, epochs, minutes, precision, commit, machine, date.

    Read from its config.json, and where train.py left them, from metadata.json and summary.csv beside it.

    Args:
        checkpoint: A folder, or a file in it.

    Returns:
        ``train_command``, ``seed``, ``epochs``, ``train_minutes``, ``train_precision``, ``train_commit``,
        ``train_machine`` and ``train_date``, of which those that nobody wrote down are missing.
    """
    path = Path(checkpoint)
    folder = path if path.is_dir() else path.parent
    results = Config.read(checkpoint).results
    if "train_command" not in results and (meta := read_metadata(folder)):
        results = {**meta, **results, "train_command": meta.get("command"), "command": None}
    # Further programs, such as dynsnn, say in their results what was known of the training, under these names.
    facts = {"train_command": results.get("train_command"), "seed": results.get("seed")}
    own = "train_commit" not in results
    for key in ("precision", "commit", "machine", "date"):
        facts[f"train_{key}"] = results.get(key if own else f"train_{key}")
    made = results.get("command") or ""
    if made.startswith(("python -m spikezoo ", "spikezoo ")) and "spikezoo validate" not in made:
        facts["train_command"] = " && ".join(filter(None, [facts["train_command"], made]))
    facts |= {key: results.get(key) for key in ("epochs", "train_minutes")}
    if (taken := train_seconds(folder)) is not None:
        facts["epochs"] = facts["epochs"] or len(read_table(folder / "summary.csv"))
        facts["train_minutes"] = round(taken / 60, 1)
    if facts["train_command"]:
        facts["train_command"] = portable_command(facts["train_command"])
    return {key: value for key, value in facts.items() if value is not None}
