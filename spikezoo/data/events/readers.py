"""Readers of event recordings: the formats that people have, decoded by the camera that recorded them.

Words of a file that are no events of pixels (samples of images and of the inertial unit, external inputs, overflows of
the clock, events marked as invalid) are left out by the flags that the formats have for them. Rows count from the top
and columns from the left.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spikezoo.checks import nearest

__all__ = ["READERS", "count_invalid", "native_sensor", "read_events"]

Events = dict[str, np.ndarray]
Size = tuple[int, int]  # height, width

# Letters and digits that the name of a chip begins with -> its sensor; all but DVS128 are DAVIS, which share a layout.
_CHIPS: dict[str, Size] = {
    "dvs128": (128, 128),
    "davis128": (128, 128),
    "davis208": (192, 208),
    "davis240": (180, 240),
    "sbret": (180, 240),  # DAVIS240's first name
    "davis346": (260, 346),
    "davi346": (260, 346),  # as aedat4to2 spells it
    "davis640": (480, 640),
    "davisrgb640": (480, 640),
}
_OVERFLOW_ROW = 240  # below the last row of ATIS, of 240
_ALIASES = {"t": ("t", "ts", "timestamp"), "x": ("x",), "y": ("y",), "p": ("p", "pol", "polarity", "on")}


def _lines(path: Path) -> tuple[list[str], int]:
    """The header of an AEDAT file, and the byte where its data begin.

    An event may begin with the byte of '#', but then has bytes that no line of text has; a blank line is one of the
    header's where another follows.
    """
    lines, end = [], 0
    with path.open("rb") as file:
        while line := file.readline():
            if line.startswith(b"#") and line.endswith(b"\n") and not re.search(rb"[\0-\x08\x0b-\x1f]", line.rstrip()):
                lines.append(line.decode(errors="replace").lstrip("#! ").rstrip())
                end = file.tell()
                if re.fullmatch("end[- ](of ascii )?header", lines[-1].lower()):
                    break
            elif line.strip():
                break
    return lines, end


def _chip(path: Path, lines: list[str]) -> tuple[str, Size] | None:
    """The camera that a header names: its name, and the size of its sensor; None where it names none."""
    named = [match[1] for line in lines if (match := re.match(r"(?:AEChip|Source \d+): *(\S.*)", line, re.IGNORECASE))]
    if not named:
        return None
    plain = re.sub("[^a-z0-9]", "", named[0].rpartition(".")[2].lower())
    for start, size in _CHIPS.items():
        if plain.startswith(start):
            return start, size
    raise ValueError(f"it was recorded with the camera {named[0]!r}; read are DVS128 and DAVIS128, 208, 240, 346, 640")


def _read_npz(path: Path, sensor: Size) -> Events:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is truncated, or no .npz file")
    with np.load(path, allow_pickle=False) as archive:
        if absent := [key for key in "txyp" if key not in archive.files]:
            raise ValueError(f"it lacks the array {', '.join(absent)}; it has {', '.join(archive.files)}")
        return {key: archive[key] for key in "txyp"}


def _read_npy(path: Path, sensor: Size) -> Events:
    array = np.load(path, allow_pickle=False)
    names = array.dtype.names or ()
    found = {key: next((name for name in known if name in names), None) for key, known in _ALIASES.items()}
    if absent := [key for key, name in found.items() if name is None]:
        have = f"the fields {', '.join(names)}" if names else f"plain numbers of shape {list(array.shape)}"
        raise ValueError(f"it lacks the field {', '.join(absent)}; it has {have}")
    return {key: array[name] for key, name in found.items()}


def _read_bin(path: Path, sensor: Size) -> Events:
    if rest := path.stat().st_size % 5:
        raise ValueError(f"it is truncated: an event has 5 bytes, and {rest} are left after the last")
    x, y, high, middle, low = np.fromfile(path, np.uint8).reshape(-1, 5).T.astype(np.int64)
    marks = y == _OVERFLOW_ROW
    t = ((high & 127) << 16 | middle << 8 | low) + (marks.cumsum() << 13)
    return {key: array[~marks] for key, array in {"t": t, "x": x, "y": y, "p": high >> 7}.items()}


def _percent(path: Path) -> tuple[dict[str, str], int]:
    """The header of a .dat file by keyword, and the byte where it ends."""
    words, end = {}, 0
    with path.open("rb") as file:
        while (line := file.readline()).startswith(b"%"):
            key, _, value = line.decode(errors="replace")[1:].strip().partition(" ")
            words[key.lower()] = value.strip()
            end = file.tell()
    return words, end


def _read_dat(path: Path, sensor: Size) -> Events:
    words, start = _percent(path)
    if words.get("version", "2") != "2":
        raise ValueError(f"it is of version {words['version']} of .dat; read is version 2")
    if words:  # files without a header lack these two bytes, too
        kind = path.read_bytes()[start : start + 2]
        if kind not in (b"\x00\x08", b"\x0c\x08"):
            raise ValueError(f"it holds words of the type and size {list(kind)}; read are events of pixels, [12, 8]")
        start += 2
    if rest := (path.stat().st_size - start) % 8:
        raise ValueError(f"it is truncated: an event has 8 bytes, and {rest} are left after the last")
    t, word = np.fromfile(path, "<u4", offset=start).reshape(-1, 2).T.astype(np.int64)
    return {"t": t, "x": word & 0x3FFF, "y": word >> 14 & 0x3FFF, "p": word >> 28}


def _read_aedat2(path: Path, sensor: Size) -> Events:
    lines, start = _lines(path)
    chip = _chip(path, lines)
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(start)
        following = file.read(2)
    for blank in (b"\r\n", b"\n"):  # a last line of the header, where the events go on behind it
        start += len(blank) if following.startswith(blank) and (size - start) % 8 == len(blank) else 0
    if rest := (size - start) % 8:
        raise ValueError(f"it is truncated: an event has 8 bytes, and {rest} are left after the last")
    address, t = np.fromfile(path, ">u4", offset=start).reshape(-1, 2).T.astype(np.int64)
    if chip is None and (address & 0x7FFF0000).any():
        if sensor == _CHIPS["dvs128"] or sensor not in _CHIPS.values():
            known = ", ".join(f"{height} {width}" for height, width in sorted(set(_CHIPS.values())))
            raise ValueError(
                f"its header names no camera, and its addresses have more bits than those of DVS128: write the height "
                f"and width of the sensor into sensor.txt ({known})"
            )
        chip = "davis", sensor
    if chip is None or chip[0] == "dvs128":
        pixel = address & 0x80008000 == 0
        # As SpikingJelly and Tonic have it for CIFAR10-DVS; jAER takes the lower bits for x.
        x, y, p = 127 - (address >> 8 & 127), 127 - (address >> 1 & 127), 1 - (address & 1)
    else:
        pixel = address & 0x80000400 == 0  # neither a sample (of an image, of the inertial unit) nor an external input
        height, width = chip[1]
        x, y, p = width - 1 - (address >> 12 & 1023), height - 1 - (address >> 22 & 511), address >> 11 & 1
    return {key: array[pixel] for key, array in {"t": t, "x": x, "y": y, "p": p}.items()}


def _packets(path: Path) -> Iterator[tuple[tuple[int, ...], bytes]]:
    """The packets of an AEDAT 3 file: the eight numbers of the header, and the data."""
    lines, start = _lines(path)
    if form := [line for line in lines if line.startswith("Format: ") and line != "Format: RAW"]:
        raise ValueError(f"its {form[0].lower()!r} is not read, only RAW is")
    content = path.read_bytes()
    while start < len(content):
        if len(content) - start >= 28:
            header = struct.unpack_from("<HHIIIIII", content, start)
            end = start + 28 + header[2] * header[5]
        if len(content) - start < 28 or end > len(content):
            raise ValueError(f"it is truncated: the packet that begins at byte {start} is cut off")
        yield header, content[start + 28 : end]
        start = end


def _polarity_events(path: Path) -> np.ndarray:
    """The words and times [events, 2] of an AEDAT 3 file, with those that are marked as invalid."""
    found = [np.zeros((0, 2), np.int64)]
    for (kind, _, size, _, overflows, _, count, _), content in _packets(path):
        if kind == 1:
            if size != 8:
                raise ValueError(f"its events have {size} bytes, but 8 are wanted")
            events = np.frombuffer(content, "<u4", 2 * count).reshape(-1, 2).astype(np.int64)
            events[:, 1] += overflows << 31
            found.append(events)
    return np.concatenate(found)


def count_invalid(path: Path) -> int:
    """How many events of an AEDAT 3 file are marked as invalid; ValueError if its last packet is cut off.

    SpikingJelly's reader tells neither.
    """
    return int((_polarity_events(path)[:, 0] & 1 == 0).sum())


def _read_aedat3(path: Path, sensor: Size) -> Events:
    events = _polarity_events(path)
    word, t = events[events[:, 0] & 1 == 1].T
    return {"t": t, "x": word >> 17 & 0x7FFF, "y": word >> 2 & 0x7FFF, "p": word >> 1 & 1}


def _aedat4(path: Path) -> Any:
    try:
        import aedat
    except ImportError:
        raise ValueError("AEDAT 4 is read by the package aedat; type pip install 'spikezoo-snn[events]'") from None
    try:
        return aedat.Decoder(path)
    except RuntimeError as error:
        raise ValueError(f"it is truncated or damaged ({error})") from error


def _stream(known: Mapping[int, dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """The one stream of events among those of an AEDAT 4 file."""
    streams = [(number, facts) for number, facts in known.items() if facts["type"] == "events"]
    if len(streams) != 1:
        raise ValueError(f"it has {len(streams)} streams of events, but one is wanted")
    return streams[0]


def _read_aedat4(path: Path, sensor: Size) -> Events:
    decoder = _aedat4(path)
    number, _ = _stream(decoder.id_to_stream())
    try:
        parts = [packet["events"] for packet in decoder if packet["stream_id"] == number]
    except RuntimeError as error:
        raise ValueError(f"it is truncated or damaged ({error})") from error
    dtype = [("t", "u8"), ("x", "u2"), ("y", "u2"), ("on", "?")]
    events = np.concatenate(parts) if parts else np.zeros(0, dtype)
    return {"t": events["t"], "x": events["x"], "y": events["y"], "p": events["on"]}


def _version(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline(64).strip()


_AEDAT = {b"#!AER-DAT2": _read_aedat2, b"#!AER-DAT3": _read_aedat3, b"#!AER-DAT4": _read_aedat4}


def _read_aedat(path: Path, sensor: Size) -> Events:
    version = _version(path)
    if (reader := _AEDAT.get(version[:10])) is None:
        raise ValueError(f"its first line is {version[:20]!r}; read are #!AER-DAT2.0, #!AER-DAT3.1 and #!AER-DAT4.0")
    return reader(path, sensor)


READERS: dict[str, Callable[[Path, Size], Events]] = {
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".bin": _read_bin,
    ".dat": _read_dat,
    ".aedat": _read_aedat,
    ".aedat2": _read_aedat,
    ".aedat4": _read_aedat,
}


def native_sensor(path: Path) -> Size | None:
    """Height and width of the sensor that a file was recorded with, where it or its format says so.

    Raises:
        ValueError: It names a camera that is not known; the message names the file.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".bin":
            return 34, 34  # N-MNIST's
        if suffix == ".dat":
            words, _ = _percent(path)
            height, width = words.get("height", ""), words.get("width", "")
            return (int(height), int(width)) if height.isdecimal() and width.isdecimal() else None
        if suffix.startswith(".aedat"):
            if _version(path).startswith(b"#!AER-DAT4"):
                _, facts = _stream(_aedat4(path).id_to_stream())
                return facts["height"], facts["width"]
            chip = _chip(path, _lines(path)[0])
            return chip[1] if chip else _CHIPS["dvs128"]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return None


def _checked(events: Events, sensor: Size) -> Events:
    """Bring events to int64 and raise ValueError for what no sensor records."""
    lengths = {key: array.shape for key, array in events.items()}
    if len(set(lengths.values())) > 1 or len(lengths["t"]) != 1:
        raise ValueError(f"t, x, y and p must be of one length, but have the shapes {lengths}")
    if kinds := {key: str(array.dtype) for key, array in events.items() if array.dtype.kind not in "biu"}:
        raise ValueError(f"t (microseconds), x, y and p must be whole numbers, but some are {kinds}")
    if not len(events["t"]):
        raise ValueError("the recording is empty: it has no event")
    events = {key: array.astype(np.int64) for key, array in events.items()}
    height, width = sensor
    for key, side in (("x", width), ("y", height)):
        outside = (events[key] < 0) | (events[key] >= side)
        if outside.any():
            first = int(outside.argmax())
            raise ValueError(
                f"{int(outside.sum())} events are outside the sensor of {height} x {width}, the first is event "
                f"{first} with {key}={events[key][first]}; another size is named by sensor.txt in the dataset's folder"
            )
    if (unknown := (events["p"] < 0) | (events["p"] > 1)).any():
        raise ValueError(
            f"the polarity of event {int(unknown.argmax())} is {events['p'][unknown.argmax()]}; known are 0 (off) and "
            f"1 (on), so store p > 0 instead"
        )
    if (back := events["t"][1:] < events["t"][:-1]).any():
        first = int(back.argmax())
        raise ValueError(
            f"time runs backwards {int(back.sum())} times, first from {events['t'][first]} to "
            f"{events['t'][first + 1]} us at event {first + 1}; if the order alone is wrong, sort the events by t"
        )
    return events


def read_events(path: str | Path, sensor: Size) -> Events:
    """Read one recording and check every event of it.

    Args:
        path: A file .npz (arrays t, x, y, p, as SpikingJelly's ``events_np``), .npy (with these as fields, as Tonic
            has them), .bin (ATIS, as N-MNIST and N-Caltech101), .dat (Prophesee's, version 2), .aedat, .aedat2 or
            .aedat4 (AEDAT 2.0 of DVS128, as CIFAR10-DVS, and of DAVIS cameras; 3.1, as DVS128 Gesture; 4.0 with the
            extra ``events``).
        sensor: Height and width of the sensor in pixels.

    Returns:
        int64 arrays [events]: ``t`` in microseconds and never falling, ``x``, ``y``, and ``p`` (0 off, 1 on).

    Raises:
        ValueError: The recording is truncated, empty, of another format or camera, has events outside the sensor, a
            time that runs backwards or an unknown polarity; the message names the file.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"{path}: the format {path.suffix!r} is not read. {nearest(suffix, READERS)}")
    try:
        return _checked(READERS[suffix](path, sensor), sensor)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: it is truncated or damaged ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
