"""What a run needs to go on exactly as if it had not stopped: its files, and the states of random generators."""

from __future__ import annotations

import functools
import itertools
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from timm.utils import CheckpointSaver, get_outdir

from spikezoo.checkpoint import atomic, load_state, save_state
from spikezoo.evaluate import environment
from spikezoo.train.flags import known_flags, recipe_flags
from spikezoo.train.lock import lock, release
from spikezoo.train.output import trim_tables

if TYPE_CHECKING:
    from spikezoo.train.run import Run

__all__ = ["Saver", "newest_state", "prepare", "rng_state", "set_rng_state", "snapshot"]


class Saver(CheckpointSaver):
    """timm's saver, writing safetensors; every file takes its name only when it is whole.

    Args:
        snapshot: Returns the training state.
        folder: Where its files are.
        decreasing: Whether a smaller metric is better.
        max_history: How many of the best it keeps.
    """

    def __init__(
        self, snapshot: Callable[[], dict[str, Any]], folder: Path, decreasing: bool = False, max_history: int = 10
    ) -> None:
        places = {"checkpoint_dir": str(folder), "recovery_dir": str(folder)}
        super().__init__(None, None, **places, decreasing=decreasing, max_history=max_history)
        self.extension = ".safetensors"
        self.snapshot = snapshot

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        content = {**self.snapshot(), "metric": metric, "saver": self.state_dict(epoch, metric)}
        try:
            save_state(save_path, content)
        except Exception as error:  # safetensors has an error of its own
            if isinstance(error, OSError) or "os error" in str(error).lower():
                good = newest_state(Path(self.checkpoint_dir))
                raise OSError(
                    f"{save_path} could not be written ({error}). Nothing half-written is left; the newest state is "
                    f"{good or 'none yet'}. Make room, and go on with the same command and --resume auto."
                ) from error
            raise

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)  # timm unlinks dst first, which leaves a moment without any checkpoint

    def _duplicate(self, src: str, dst: str) -> None:
        with atomic(dst) as temporary:
            try:
                os.link(src, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(src, temporary)

    def drop_remains(self) -> None:
        """Remove what a killed process was in the middle of writing."""
        for pattern in (".*.tmp", f"*tmp{self.extension}"):
            for path in Path(self.checkpoint_dir).glob(pattern):
                path.unlink()

    def drop_recovery(self) -> None:
        """Remove the mid-epoch files of an epoch that ended well."""
        for path in Path(self.recovery_dir).glob(f"{self.recovery_prefix}-*{self.extension}"):
            path.unlink()
        self.curr_recovery_file = self.prev_recovery_file = ""


def rng_state(device: torch.device) -> dict[str, Any]:
    """States of all random generators."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    whole = torch.from_numpy(np.asarray(keys).astype(np.int64))
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, whole, int(position), int(has_gauss), float(cached)],
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore what :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate(state["python"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def newest_state(folder: Path) -> Path | None:
    """The intact state of a run that is furthest: last.safetensors or a later mid-epoch recovery.

    A damaged one is named and passed over where another is intact.

    Args:
        folder: The run's.

    Raises:
        ValueError: All of them are damaged.
    """
    found: list[tuple[int, int, Path]] = []
    damaged: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == "last.safetensors" or path.name.startswith("recovery-"):
            try:
                state = load_state(path, "epoch", "batch")
                found.append((state["epoch"], state["batch"], path))
            except (ValueError, KeyError) as error:
                damaged.append(f"{path}: {error}")
    for epoch, batch, path in sorted(found, reverse=True):
        try:
            load_state(path)  # as a whole, with its hashes
        except ValueError as error:
            damaged.append(f"{path}: {error}")
            continue
        for said in damaged:
            print(f"Damaged, and passed over: {said} Going on from {path}, epoch {epoch + 1}, batch {batch}.")
        return path
    if damaged:
        raise ValueError(f"No state in {folder} is intact: {'; '.join(damaged)} Move them away to start anew.")
    return None


def fingerprint(run: Run) -> dict[str, Any]:
    """What must not change between the parts of one run for it to be the same run."""
    return {name: getattr(run.args, name) for name in sorted(recipe_flags())} | {"world_size": run.args.world_size}


def snapshot(run: Run) -> dict[str, Any]:
    """Everything that the run needs to go on exactly as if it had not stopped."""
    return {
        "architecture": run.args.model,
        "model_args": run.arguments,
        "spikezoo": {
            "dataset": run.args.dataset,
            "split": run.val_split,
            "inputs": run.inputs,
            **run.val_loader.facts,
            "recipe": run.recipe,
        },
        "label_names": list(run.val_loader.info.label_names),
        "epoch": run.epoch,
        "batch": run.batch,
        "updates": run.updates,
        "sizes": [list(pair) for pair in run.length.sizes],
        "amp": run.amp,
        "sums": run.sums,
        "model": run.model.state_dict(),
        "ema": run.ema.state_dict() if run.ema else None,
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.length.scheduler.state_dict() if run.length.scheduler else None,
        "scaler": run.scaler.state_dict() if run.scaler else None,
        "rng": run.rng,
        "recipe": fingerprint(run),
    }


def prepare(run: Run) -> tuple[Path, Saver | None]:
    """Find the folder of a run and the state that it goes on from, restore that, and write what the run is.

    Args:
        run: The run, built as if it began.

    Returns:
        The folder, and on the process that writes the saver.

    Raises:
        ValueError: The state is another run's; nothing was written.
    """
    folder = Path(run.args.output) / run.args.experiment
    try:
        return _prepare(run, folder)
    except BaseException:
        release(folder)
        raise


def _prepare(run: Run, folder: Path) -> tuple[Path, Saver | None]:
    args = run.args
    state: dict[str, Any] | None = None
    source: Path | None = None
    if args.resume == "auto":
        if run.main and folder.is_dir():
            lock(folder)
        source = newest_state(folder)
    elif args.resume:
        source = Path(args.resume)
    if source is not None:
        state = load_state(source)
        check(run, state, source)
        if args.resume != "auto" and source.parent.resolve() != folder.resolve():
            folder = Path(get_outdir(args.output, args.experiment, inc=True)) if run.main else folder
    elif run.main and args.resume != "auto":
        folder = Path(get_outdir(args.output, args.experiment, inc=True))
    if args.distributed:
        shared = [str(folder)]
        dist.broadcast_object_list(shared, src=0)
        folder = Path(shared[0])
    saver = None
    if run.main:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        saver = Saver(functools.partial(snapshot, run), folder, args.eval_metric == "loss", args.checkpoint_hist)
        saver.drop_remains()
    if state is not None:
        restore(run, state, source, saver)
    if run.main:
        with atomic(folder / "args.yaml") as temporary:
            known = known_flags().keys() - {"resume", "no_resume_opt"}
            kept = {key: value for key, value in vars(args).items() if key in known and value is not None}
            temporary.write_text(yaml.safe_dump(kept, sort_keys=True), encoding="utf-8")
        run.facts = {"command": args.command, "seed": args.seed, **environment()}
        run.tables = trim_tables(folder, run.epoch, run.facts)
    return folder, saver


def check(run: Run, state: dict[str, Any], source: Path | None) -> None:
    """Raise where this run cannot go on from a state, before anything is written."""
    if missing := {"architecture", "model_args", "spikezoo", "model", "optimizer", "rng", "recipe"} - state.keys():
        raise ValueError(
            f"{source} is no state of a training: it lacks {', '.join(sorted(missing))}. Give last.safetensors or a "
            "recovery-*.safetensors of a run."
        )
    theirs = (state["architecture"], state["model_args"], state["spikezoo"].get("recipe", []))
    ours = (run.args.model, run.arguments, run.recipe)
    if theirs != ours:
        raise ValueError(
            f"{source} was written by model {theirs[0]!r} with {theirs[1]} and the transforms {theirs[2]}, and "
            f"this run asks for {ours[0]!r} with {ours[1]} and {ours[2]}. Use the same config, or "
            "--initial-checkpoint."
        )
    then, now = state.get("label_names") or [], list(run.val_loader.info.label_names)
    if then and now and then != now:
        pairs = itertools.zip_longest(then, now, fillvalue="missing")
        number, (old, new) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(
            f"{source} was trained on data whose class {number} is {old!r}, and here it is {new!r}: its answers would "
            "be read as other classes. Give the same data, or --initial-checkpoint."
        )
    if run.args.no_resume_opt:
        return
    recipe = state["recipe"]
    changed = {k: (v, recipe[k]) for k, v in fingerprint(run).items() if k in recipe and recipe[k] != v}
    if changed:
        told = ", ".join(f"{name} is {now!r} and was {then!r}" for name, (now, then) in changed.items())
        raise ValueError(f"Cannot continue {source} exactly: {told}. Use the same flags, or --no-resume-opt.")


def restore(run: Run, state: dict[str, Any], source: Path | None, saver: Saver | None) -> None:
    """Put a state into a run."""
    run.model.load_state_dict(state["model"])
    if run.args.no_resume_opt:
        if run.averaged:
            run.averaged.set(run.model)
        return
    if state.get("sizes"):
        run.length.set([(size, count) for size, count in state["sizes"]])
    if run.amp != state.get("amp", run.amp):
        run.amp = state["amp"]
        run.say(f"--amp auto was {'on' if run.amp else 'off'} where this run began, and stays so.")
    if run.ema:
        run.ema.load_state_dict(state["ema"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.length.scheduler and state["scheduler"] is not None:
        run.length.scheduler.load_state_dict(state["scheduler"])
    if run.scaler and state["scaler"] is not None:
        run.scaler.load_state_dict(state["scaler"])
    run.epoch, run.batch, run.updates = state["epoch"], state["batch"], state["updates"]
    run.sums = {**run.sums, **state["sums"]}
    set_rng_state(state["rng"][run.args.rank], run.device)
    if saver:
        saver.load_state_dict(state["saver"])
    run.say(f"Resuming {source} at epoch {run.epoch + 1}, batch {run.batch}.")
