"""Splits of event datasets as frames: what was asked for is checked, found, counted and handed out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spikezoo.checks import is_whole
from spikezoo.data.events.cache import cache_folder, cached, complain, hash_recordings
from spikezoo.data.events.framing import FRAMES_BY, Framing
from spikezoo.data.events.official import NAMED
from spikezoo.data.events.recordings import TEST_FILE, check_twins, find_recordings
from spikezoo.data.info import DatasetInfo, check_split, refuse


@dataclass(frozen=True)
class EventFrames:
    """The frames of one split, as ``open_events`` returns them."""

    frames: np.ndarray  # counts [N, T, 2, H, W], uint8 (or as many bits as the counts need), mapped from a file
    labels: Tensor  # int64 [N]
    classes: list[str]
    split: str  # name of the split, number of recordings and hash of them and their labels, for rows of results
    sensor: tuple[int, int]  # height, width
    files: list[str]  # of the recordings

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int) -> Tensor:
        """The frames of one recording as float32 [T, 2, H, W]."""
        return torch.from_numpy(self.frames[index].astype(np.float32))


def event_info(name: str, data_dir: str | None = None) -> DatasetInfo:
    """Describe an event dataset as ``spikezoo.data.dataset_info`` does; counts are delivered as they are.

    Raises:
        ValueError: The name is unknown, or the folder not usable.
        FileNotFoundError: The folder is not there.
    """
    if name in NAMED:
        known = NAMED[name]
        classes, sensor, note = known.classes, known.sensor, known.split_note
    else:
        found = find_recordings(name, data_dir, None, False)
        classes, sensor, note = found.classes, found.sensor, f"{found.split} of {found.place}"
    return DatasetInfo(name, len(classes), 2, max(sensor), (0.0, 0.0), (1.0, 1.0), note, tuple(classes))


def open_events(
    name: str,
    split: str,
    *,
    T: int,
    data_dir: str | None = None,
    size: int | Sequence[int] | None = None,
    frames_by: str = "number",
    duration_us: int | None = None,
    download: bool = True,
    cache: bool = True,
) -> EventFrames:
    """Open a split of an event dataset as frames.

    Args:
        name: ``nmnist``, ``cifar10dvs``, ``cifar10dvs_tebn``, ``dvs128gesture`` or ``events:PATH``.
        split: ``train`` or ``test`` (``validation``, ``val`` and ``eval`` mean test).
        T: Frames of each recording.
        data_dir: Folder of the data; default: the environment's SPIKEZOO_DATA, else ./data. A relative
            ``events:PATH`` is tried there too.
        size: Height and width of the sensor (one number for a square), where ``events:PATH`` does not tell it.
        frames_by: ``number`` gives the frames equal numbers of events, ``time`` equal durations (both leave the
            remainder to the last frame), and ``duration`` makes frames of ``duration_us`` each. The first two keep
            every event. With ``duration`` a recording that ends before T frames is filled up with empty ones, and
            what comes after T frames is left out.
        duration_us: Microseconds of a frame, for ``duration``.
        download: Whether recordings that are not on disk may be downloaded (CIFAR10-DVS alone can be).
        cache: Whether the frames are kept on disk, beside the recordings or in the folder SPIKEZOO_CACHE of the
            environment; otherwise they are made in memory.

    Returns:
        The frames, labels, classes, files, and the name and hash of the split.

    Raises:
        ValueError: An argument is not possible, a recording is not usable (all of these are named; the frames of the
            others are kept), or a recording is in both splits.
        FileNotFoundError: The data is not there.
    """
    split = check_split(split)
    if not is_whole(T):
        refuse("T", T, "a whole number of frames of at least 1", 10)
    if frames_by not in FRAMES_BY:
        refuse("frames_by", frames_by, f"one of {', '.join(FRAMES_BY)}", "frames_by='number'")
    whole = duration_us is None or is_whole(duration_us)
    if (frames_by == "duration") != (duration_us is not None) or not whole:
        wanted = "a whole number of microseconds with frames_by='duration', and not given without"
        refuse("duration_us", duration_us, wanted, "frames_by='duration', duration_us=30000")
    found = find_recordings(name, data_dir, size, download)
    folder = cache_folder(found.place) if cache else None
    hashes = hash_recordings(found, folder)
    for path, stated in found.stated.items():
        if hashes[path] != stated:
            raise ValueError(
                f"{path} is not the recording that {found.place / TEST_FILE} states: its sha256 is {hashes[path]}"
            )
    check_twins(found, hashes)
    framing = Framing(T, frames_by, duration_us or 0, found.sensor)
    paths, labels = [path for path, _ in found.items[split]], [label for _, label in found.items[split]]
    if folder:
        label = f"{name if name in NAMED else 'events'}-{split}"
        frames = cached(paths, hashes, framing, folder, label)
    else:
        frames = _in_memory(paths, framing)
    rows = sorted(f"{hashes[path]} {found.classes[label]}\n" for path, label in found.items[split])
    digest = hashlib.sha256("".join(rows).encode()).hexdigest()[:12]
    note = f"{found.split}/{split}, {len(paths)} recordings, sha256 {digest}"
    return EventFrames(frames, torch.tensor(labels), list(found.classes), note, found.sensor, list(map(str, paths)))


def _in_memory(paths: Sequence[Path], framing: Framing) -> np.ndarray:
    rows, faults = [], []
    for path in paths:
        try:
            rows.append(framing.integrate(path))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise complain(faults, len(paths))
    return np.stack(rows)
