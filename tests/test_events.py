"""Tests of spikezoo.data.events: tiny recordings in every format, SpikingJelly as the oracle, no network."""

import base64
import dataclasses
import hashlib
import os
import shutil
import struct
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from spikezoo import data
from spikezoo.data.events import event_info, framing, official, open_events, read_events, recordings, write_split
from spikezoo.data.events.readers import count_invalid, native_sensor

KEYS = ("t", "x", "y", "p")


def make(count=60, sensor=(34, 34), seed=0, last=5000):
    """Random events with rising times, the last at t=last."""
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, last, count))
    t[-1] = last
    height, width = sensor
    return {
        "t": t, "x": rng.integers(0, width, count), "y": rng.integers(0, height, count), "p": rng.integers(0, 2, count)
    }  # fmt: skip


def write_npz(path, recording):
    np.savez(path, **recording)


def write_bin(path, recording):
    """N-MNIST's 40 bits: x, y, polarity in the top bit of three bytes of time."""
    rows = (
        bytes([x, y]) + ((p << 23) | t).to_bytes(3, "big")
        for t, x, y, p in zip(*(recording[key].tolist() for key in KEYS), strict=True)
    )
    path.write_bytes(b"".join(rows))


def write_aedat2(path, recording):
    """CIFAR10-DVS' 64 bits: an address of a mirrored 128 x 128 sensor, with inverted polarity, and the time."""
    rows = (
        struct.pack(">II", (127 - x) << 8 | (127 - y) << 1 | (1 - p), t)
        for t, x, y, p in zip(*(recording[key].tolist() for key in KEYS), strict=True)
    )
    path.write_bytes(b"#!AER-DAT2.0\r\n# a comment\r\n" + b"".join(rows))


def write_aedat3(path, recording, packet=25):
    """DVS128 Gesture's packets: a header of 28 bytes and 64 bits an event, with the time's upper bit in the header."""
    rows = list(zip(*(recording[key].tolist() for key in KEYS), strict=True))
    out = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n"
    for start in range(0, len(rows), packet):
        some = rows[start : start + packet]
        out += struct.pack("<HHIIIIII", 1, 0, 8, 4, 0, len(some), len(some), len(some))
        out += b"".join(struct.pack("<II", x << 17 | y << 2 | p << 1 | 1, t) for t, x, y, p in some)
    path.write_bytes(out)


def write_davis(path, recording, chip=b"eu.seebetter.ini.chips.davis.Davis346blue", size=(260, 346)):
    """jAER's and v2e's 64 bits of a DAVIS: counted from the lower right corner."""
    height, width = size
    rows = (
        struct.pack(">II", (height - 1 - y) << 22 | (width - 1 - x) << 12 | p << 11, t)
        for t, x, y, p in zip(*(recording[key].tolist() for key in KEYS), strict=True)
    )
    path.write_bytes(b"#!AER-DAT2.0\r\n" + (b"# AEChip: " + chip + b"\r\n" if chip else b"") + b"".join(rows))


def write_dat(
    path, recording, header=b"% Data file containing CD events\n% Version 2\n% Width 34\n% Height 34\n\x0c\x08"
):
    """Prophesee's 64 bits: the time, and 14 bits of x, 14 of y and 4 of polarity."""
    rows = (
        struct.pack("<II", t, p << 28 | y << 14 | x)
        for t, x, y, p in zip(*(recording[key].tolist() for key in KEYS), strict=True)
    )
    path.write_bytes(header + b"".join(rows))


def write_npy(path, recording):
    """Tonic's structured array."""
    array = np.zeros(len(recording["t"]), [("x", "i2"), ("y", "i2"), ("t", "i8"), ("p", "?")])
    for key in KEYS:
        array[key] = recording[key]
    np.save(path, array)


WRITERS = {
    "npz": write_npz,
    "npy": write_npy,
    "bin": write_bin,
    "dat": write_dat,
    "aedat2": write_aedat2,
    "aedat3": write_aedat3,
}


def suffix(kind):
    return "." + kind.rstrip("23")


def fill(place, kind="bin", classes=("2", "10"), train=3, test=2, **options):
    """Class folders with recordings that all differ; returns file -> events."""
    made = {}
    for split, count in (("train", train), ("test", test)):
        for label in classes:
            folder = place / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                file = folder / f"{i}{suffix(kind)}"
                made[str(file)] = make(50 + len(made), seed=len(made), **options)
                WRITERS[kind](file, made[str(file)])
    return made


@pytest.fixture
def counting(monkeypatch):
    """The files that are integrated."""
    done = []
    integrate = framing.Framing.integrate

    def count(self, path):
        done.append(Path(path).name)
        return integrate(self, path)

    monkeypatch.setattr(framing.Framing, "integrate", count)
    return done


# --- readers and bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_reads_what_was_recorded(tmp_path, kind):
    file = tmp_path / f"a{suffix(kind)}"
    recording = make(sensor=(128, 128))
    WRITERS[kind](file, recording)
    read = read_events(file, (128, 128))
    assert all(np.array_equal(read[key], recording[key]) and read[key].dtype == np.int64 for key in KEYS)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("cut", [3, 13])
def test_truncated_recording(tmp_path, kind, cut):
    file = tmp_path / f"cut{suffix(kind)}"
    WRITERS[kind](file, make())
    file.write_bytes(file.read_bytes()[:-cut])
    said = "it is truncated" if kind != "npy" else "Failed to read all data|cannot reshape"  # numpy's words
    with pytest.raises(ValueError, match=rf"cut{suffix(kind)}: .*({said})"):
        read_events(file, (128, 128))


def test_npz_with_a_flipped_bit(tmp_path):
    file = tmp_path / "flip.npz"
    write_npz(file, make())
    body = bytearray(file.read_bytes())
    body[300] ^= 1
    file.write_bytes(bytes(body))
    with pytest.raises(ValueError, match=r"flip.npz: it is truncated or damaged"):
        read_events(file, (128, 128))


def spoil(key, index, value):
    recording = make()
    recording[key][index] = value
    return recording


BAD = {
    "empty": ({key: array[:0] for key, array in make().items()}, "the recording is empty"),
    "outside_x": (spoil("x", 7, 34), r"1 events are outside the sensor of 34 x 34, the first is event 7 with x=34"),
    "outside_y": (spoil("y", 0, -1), r"event 0 with y=-1"),
    "polarity": (spoil("p", 4, -1), r"the polarity of event 4 is -1; known are 0 \(off\) and 1"),
    "backwards": (spoil("t", 59, 0), r"time runs backwards 1 times, first from \d+ to 0 us at event 59"),
    "lengths": (make() | {"p": make()["p"][:-1]}, r"must be of one length"),
    "fractions": (make() | {"t": make()["t"] / 1e6}, r"whole numbers, but some are \{'t': 'float64'\}"),
    "missing": ({key: array for key, array in make().items() if key != "p"}, r"it lacks the array p; it has t, x, y"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_recording_is_named(tmp_path, what):
    recording, message = BAD[what]
    write_npz(tmp_path / "bad.npz", recording)
    with pytest.raises(ValueError, match=rf"bad.npz: .*{message}"):
        read_events(tmp_path / "bad.npz", (34, 34))


def test_other_formats_are_refused(tmp_path):
    for name, content, message in (
        ("a.npz", b"no archive", r"a.npz: it is truncated, or no .npz file"),
        ("a.aedat", b"#!AER-DAT1.0\r\n", r"a.aedat: its first line is b'#!AER-DAT1.0'; read are #!AER-DAT2.0"),
        (
            "b.aedat",
            b"#!AER-DAT2.0\r\n# AEChip: a.b.Cochlea64\r\n",
            r"recorded with the camera 'a.b.Cochlea64'; read are",
        ),
        (
            "c.aedat",
            b"#!AER-DAT2.0\r\n" + struct.pack(">II", 9 << 22, 0),
            r"addresses have more bits than those of DVS1",
        ),
        ("d.aedat", b"#!AER-DAT3.1\r\n#Format: SerializedTS\r\n", r"its 'format: serializedts' is not read"),
        ("a.dat", b"% Version 1\n\x0c\x08", r"a.dat: it is of version 1 of .dat; read is version 2"),
        ("b.dat", b"% Version 2\n\x0e\x08", r"it holds words of the type and size \[14, 8\]"),
        ("a.npy", b"no array", r"a.npy: "),
        ("a.bni", b"", r"a.bni: the format '.bni' is not read. Did you mean '.bin'"),
        ("a.bin", b"", r"a.bin: the recording is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_events(tmp_path / name, (34, 34))


def same(read, recording):
    return all(np.array_equal(read[key], recording[key]) for key in KEYS)


@pytest.mark.parametrize(
    ("chip", "size"),
    [
        (b"eu.seebetter.ini.chips.davis.Davis346blue", (260, 346)),
        (b"DAVIS240C", (180, 240)),
        (b"eu.seebetter.ini.chips.sbret10.SBret10", (180, 240)),
        (b"", (260, 346)),  # as older v2e: the folder says the size
    ],
)
def test_davis_recordings(tmp_path, chip, size):
    recording = make(200, size)
    write_davis(tmp_path / "a.aedat2", recording, chip, size)
    assert same(read_events(tmp_path / "a.aedat2", size), recording)
    assert native_sensor(tmp_path / "a.aedat2") == (size if chip else (128, 128))
    corner = {"t": np.array([5]), "x": np.array([0]), "y": np.array([0]), "p": np.array([1])}
    write_davis(tmp_path / "b.aedat", corner, chip, size)
    wanted = (size[0] - 1) << 22 | (size[1] - 1) << 12 | 1 << 11
    assert struct.unpack(">II", (tmp_path / "b.aedat").read_bytes()[-8:]) == (wanted, 5)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("dvs128", [struct.pack(">II", flag | 0x1234, 0) for flag in (1 << 15, 1 << 31)]),  # external inputs
        ("davis", [struct.pack(">II", flag | 0x123000, 0) for flag in (1 << 31, 1 << 31 | 3 << 10, 1 << 10)]),
        ("aedat3", [struct.pack("<II", 3 << 17 | 4 << 2, 0)]),  # marked as invalid
    ],
)
def test_words_that_are_no_events(tmp_path, kind, words):
    recording, words = make(40, (30, 30), last=4000), b"".join(words)
    file = tmp_path / "a.aedat"
    {"dvs128": write_aedat2, "davis": write_davis, "aedat3": write_aedat3}[kind](file, recording)
    content = file.read_bytes()
    start = len(content) - 40 * 8
    if kind == "aedat3":
        write_aedat3(file, recording, packet=40)
        content = file.read_bytes()
        fake = struct.pack("<HHIIIIII", 2, 0, 8, 4, 0, 1, 1, 1) + bytes(8)  # a packet of another type
        head = struct.pack("<HHIIIIII", 1, 0, 8, 4, 0, 41, 41, 40)
        start = len(content) - 40 * 8
        file.write_bytes(content[: start - 28] + fake + head + words + content[start:])
    else:
        file.write_bytes(content[:start] + words + content[start:] + words)
    assert same(read_events(file, (260, 346)), recording)


@pytest.mark.parametrize("blank", [b"\r\n", b"\n", b"#\r\n"])
@pytest.mark.parametrize("place", ["middle", "end"])
@pytest.mark.parametrize("kind", ["aedat2", "aedat3"])
def test_blank_lines_of_a_header(tmp_path, kind, blank, place):
    recording = make(sensor=(128, 128))
    WRITERS[kind](tmp_path / "a.aedat", recording)
    content = (tmp_path / "a.aedat").read_bytes()
    cut = (
        content.index(b"\n") + 1
        if place == "middle"
        else content.rindex(b"# a comment" if kind == "aedat2" else b"#!E")
    )
    cut = content.index(b"\n", cut) + 1 if (kind, place) == ("aedat2", "end") else cut
    (tmp_path / "a.aedat").write_bytes(content[:cut] + blank + content[cut:])
    assert same(read_events(tmp_path / "a.aedat", (128, 128)), recording)


def test_events_that_begin_like_a_comment(tmp_path):
    recording = make(5, (260, 346)) | {"y": np.full(5, 259 - (0x23 << 1)), "t": np.array([10, 11, 12, 13, 2570])}
    write_davis(tmp_path / "a.aedat", recording)
    assert same(read_events(tmp_path / "a.aedat", (260, 346)), recording)


def test_overflow_marks_of_ncaltech101(tmp_path):
    # The clock has 13 bits there, and each mark (y=240) stands for 8192 us.
    def word(x, y, p, t):
        return bytes([x, y]) + (p << 23 | t).to_bytes(3, "big")

    words = [word(1, 2, 1, 8000), word(0, 240, 0, 0), word(239, 179, 0, 5), word(0, 240, 0, 0), word(0, 240, 1, 9)]
    (tmp_path / "a.bin").write_bytes(b"".join([*words, word(3, 4, 1, 7)]))
    read = read_events(tmp_path / "a.bin", (180, 240))
    assert same(read, {"t": [8000, 8197, 3 * 8192 + 7], "x": [1, 239, 3], "y": [2, 179, 4], "p": [1, 0, 1]})


# Four events of a DAVIS346, written by dv-processing 2.0.4.
AEDAT4 = (
    "c-oCq%}VP)6h1Y<N>C}%g$uzr%3Wy_ywz12T5ZLGRk$tndhsqoGwPt736n{ouEf`H=acvdK89QM1w4tZ)Ecn^XE-PGo$t&1e5)&!+MkVTrBy80"
    "bH<tmum}M4qx~8r!+<>KFbgx70c0>{G48bY)z>Ki$M2avDnllCiEI{Z;u<CnhYO#Y-0RX35s|9%GeOM2Qx_#-4Qguu9f#Xrfc7XffqP0x^OE*U"
    "q$9e4q+zU2Ow|vNAXJj^bK)NSD>_z;{I*$0cFwqW)ewGkMGsMaoTDMQ*v0SCJC;mQIU(Uuq=HDL5z-#zD*S;aZmH6+BUzwQHntmuN_0)%Q(m%S"
    "ibSq30c+hyd3MIA94D={Tg_C0k*i^8*JxX8>^4)hLv~I74kZ~^#Qj~|PLoUNJNeYNxouC<CnDMTa`@FsyWadp*s<b`jy%bcdYC(w-*b)R?f=Kn"
    "Nn^2GemIP+V4UKd!-&rjU>Yr><BT93ww^TfPBXU8OAhW&GFqHMMqh^eEcl799<w>PS<g(ta16-Xm_Gj+lJB)DJD<o0uFNMb^RSNo)UjHEHJH!C"
    "?fZYa+8iwCSy+W96nV^kXuunMQ28G"
)


def test_aedat4(tmp_path, monkeypatch):
    pytest.importorskip("aedat")
    content = zlib.decompress(base64.b85decode(AEDAT4))
    wanted = {"t": [1000, 1010, 1025, 2000], "x": [0, 345, 7, 300], "y": [0, 259, 100, 2], "p": [1, 0, 1, 0]}
    for name in ("a.aedat4", "a.aedat"):
        (tmp_path / name).write_bytes(content)
        assert native_sensor(tmp_path / name) == (260, 346)
        assert same(read_events(tmp_path / name, (260, 346)), wanted)
    (tmp_path / "a.aedat4").write_bytes(content[:-300])
    with pytest.raises(ValueError, match=r"a.aedat4: it is truncated or damaged"):
        read_events(tmp_path / "a.aedat4", (260, 346))
    monkeypatch.setitem(sys.modules, "aedat", None)
    with pytest.raises(ValueError, match=r"pip install 'spikezoo-snn\[events\]'"):
        read_events(tmp_path / "a.aedat", (260, 346))


def test_names_of_fields(tmp_path):
    recording = make()
    array = np.zeros(60, [("timestamp", "i8"), ("x", "u2"), ("y", "u2"), ("polarity", "u1")])
    for key, name in zip(KEYS, array.dtype.names, strict=True):
        array[name] = recording[key]
    np.save(tmp_path / "a.npy", array)
    assert same(read_events(tmp_path / "a.npy", (34, 34)), recording)
    np.save(tmp_path / "a.npy", array[["x", "y"]])
    with pytest.raises(ValueError, match=r"a.npy: it lacks the field t, p; it has the fields x, y"):
        read_events(tmp_path / "a.npy", (34, 34))
    np.save(tmp_path / "a.npy", np.zeros((60, 4)))
    with pytest.raises(ValueError, match=r"it has plain numbers of shape \[60, 4\]"):
        read_events(tmp_path / "a.npy", (34, 34))


# --- frames ------------------------------------------------------------------------------------------------------


def integrate(recording, T, frames_by, duration_us=0, sensor=(34, 34)):
    """Frames without a file."""
    file = Path(f"{id(recording)}.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing, "read_events", lambda path, sensor: recording)
        return framing.Framing(T, frames_by, duration_us, sensor).integrate(file)


@pytest.mark.parametrize("frames_by", ["number", "time", "duration"])
def test_frames_are_spikingjellys(frames_by):
    from spikingjelly.datasets import utils

    for seed, (count, T) in enumerate([(60, 1), (60, 7), (200, 10), (1003, 10), (1000, 16), (3, 5)]):
        if frames_by == "time" and count == 3:
            continue  # a slice without events, where SpikingJelly raises IndexError
        recording = make(count, seed=seed)
        if frames_by == "duration":
            for duration in (500, 700, 1001, 5000, 9999):  # of 5000 us: with and without a remainder
                theirs = utils.integrate_events_by_fixed_duration(recording, duration, 34, 34)
                padded = np.zeros((T, 2, 34, 34))
                padded[: len(theirs)] = theirs[:T]
                ours = integrate(recording, T, frames_by, duration)
                assert np.array_equal(ours, padded)
                assert ours.sum() == count or len(theirs) > T
        else:
            theirs = utils.integrate_events_by_fixed_frames_number(recording, frames_by, T, 34, 34)
            ours = integrate(recording, T, frames_by)
            assert np.array_equal(ours, theirs) and ours.sum() == count and ours.dtype == np.uint8


def test_frames_by_hand():
    recording = {
        "t": np.array([0, 10, 20, 300, 399]), "x": np.array([0, 1, 1, 2, 2]), "y": np.array([0, 0, 0, 1, 1]),
        "p": np.array([0, 1, 1, 0, 1]),
    }  # fmt: skip
    # Event -> frame, in each way of cutting [0, 399] us.
    for frames_by, duration, T, frame_of in (
        ("number", 0, 2, [0, 0, 1, 1, 1]),  # 5 // 2 = 2 events, the rest in the last
        ("time", 0, 4, [0, 0, 0, 3, 3]),  # 99 us each, the two in the middle are empty
        ("duration", 100, 4, [0, 0, 0, 3, 3]),
        ("duration", 100, 6, [0, 0, 0, 3, 3]),  # two empty frames at the end
        ("duration", 15, 2, [0, 0, 1, None, None]),  # what comes after 30 us is left out
        ("duration", 399, 2, [0, 0, 0, 0, 0]),  # the last event is at the end of the frame, not in the next
    ):
        wanted = np.zeros((T, 2, 3, 4))
        for i, frame in enumerate(frame_of):
            if frame is not None:
                wanted[frame, recording["p"][i], recording["y"][i], recording["x"][i]] += 1
        assert np.array_equal(integrate(recording, T, frames_by, duration, (3, 4)), wanted), (frames_by, duration, T)


@pytest.mark.parametrize("frames_by, duration", [("number", 0), ("time", 0), ("duration", 10)])
def test_events_at_one_moment(frames_by, duration):
    recording = make(9) | {"t": np.full(9, 77)}
    assert integrate(recording, 3, frames_by, duration).sum() == 9


def test_counts_beyond_a_byte():
    once = {"t": np.arange(300), "x": np.full(300, 3), "y": np.full(300, 5), "p": np.ones(300, int)}
    frames = integrate(once, 1, "number")
    assert frames.dtype == np.uint16 and frames[0, 1, 5, 3] == 300 and frames.sum() == 300


# --- datasets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_open_a_folder(tmp_path, kind):
    made = fill(tmp_path, kind)
    size = (34, 34) if kind in ("npz", "npy") else None
    sensor = (128, 128) if kind.startswith("aedat") else (34, 34)
    train = open_events(f"events:{tmp_path}", "train", T=4, size=size)
    test = open_events(f"events:{tmp_path.name}", "val", data_dir=str(tmp_path.parent), T=4, size=size)
    assert train.classes == ["2", "10"] and train.labels.tolist() == [0, 0, 0, 1, 1, 1]  # not "10", "2"
    assert test.labels.tolist() == [0, 0, 1, 1] and train.labels.dtype == torch.int64
    assert len(train) == 6 and train.sensor == sensor and train.frames.shape == (6, 4, 2, *sensor)
    assert train.frames.dtype == np.uint8 and isinstance(train.frames, np.memmap)
    for opened in (train, test):
        for i, file in enumerate(opened.files):
            wanted = integrate(made[file], 4, "number", 0, sensor)
            frames = opened.sample(i)
            assert frames.dtype == torch.float32 and np.array_equal(frames, wanted)
            assert frames.sum() == len(made[file]["t"])
    assert train.split.startswith("folders/train, 6 recordings, sha256 ") and train.split != test.split
    uncached = open_events(f"events:{tmp_path}", "train", T=4, size=size, cache=False)
    assert np.array_equal(uncached.frames, train.frames) and uncached.split == train.split


def test_same_frames_as_spikingjellys_dataset(tmp_path):
    from spikingjelly.datasets import NMNIST

    made = fill(tmp_path / "raw", "bin", tuple("0123456789"), 1, 1)
    for file, recording in made.items():  # the same recordings as SpikingJelly converts them
        copy = tmp_path / "sj" / "events_np" / Path(file).relative_to(tmp_path / "raw").with_suffix(".npz")
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_npz(copy, recording)
    for frames_by in ("number", "time"):
        options = {"data_type": "frame", "frames_number": 3, "split_by": frames_by}
        theirs = NMNIST(str(tmp_path / "sj"), train=False, **options)
        ours = [
            open_events("nmnist", "test", data_dir=str(tmp_path / folder), T=3, frames_by=frames_by)
            for folder in ("raw", "sj")
        ]
        for opened in ours:
            assert np.array_equal(opened.frames, np.stack([frames for frames, _ in theirs]))
            assert opened.labels.tolist() == [label for _, label in theirs]
            assert opened.classes == list("0123456789") and opened.sensor == (34, 34)


def test_cache_is_made_once(tmp_path, counting):
    fill(tmp_path)
    name = f"events:{tmp_path}"
    first = open_events(name, "train", T=4)
    assert len(counting) == 6
    again = open_events(name, "train", T=4)
    assert len(counting) == 6 and np.array_equal(first.frames, again.frames)
    open_events(name, "train", T=5)
    open_events(name, "train", T=4, frames_by="time")
    open_events(name, "train", T=4, frames_by="duration", duration_us=100)
    assert len(counting) == 24  # nothing of T=4 by number is taken for these
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.part*"))


def test_several_workers_build_once(tmp_path, counting):
    fill(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_events(f"events:{tmp_path}", "train", T=4), range(4)))
    assert len(counting) == 6
    assert all(np.array_equal(one.frames, opened[0].frames) for one in opened)


def test_interrupted_build_goes_on(tmp_path, counting, monkeypatch):
    fill(tmp_path)
    name = f"events:{tmp_path}"
    wanted = np.array(open_events(name, "train", T=4, cache=False).frames)
    counting.clear()
    whole = framing.Framing.integrate

    def killed(self, path):
        if len(counting) == 4:
            raise KeyboardInterrupt
        return whole(self, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(framing.Framing, "integrate", killed)
        open_events(name, "train", T=4)
    (journal,) = tmp_path.rglob("*.part.txt")
    body = journal.with_suffix("")
    # What a power cut does: a line without its end, a line without its row, a row that was not written out.
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    journal.write_text("".join(lines) + f"{'f' * 64} 99999999 uint8 1\n" + lines[0][:30])
    content = bytearray(body.read_bytes())
    content[len(content) // 4 + 5] ^= 1  # in the second row
    body.write_bytes(bytes(content))
    target_of_a_killed_run = body.parent / "events-train-0123.npy.tmp"
    target_of_a_killed_run.write_bytes(b"half")
    counting.clear()
    assert np.array_equal(open_events(name, "train", T=4).frames, wanted)
    assert sorted(counting) == ["1.bin", "1.bin", "2.bin"]  # the second of "2", the second and third of "10"
    assert sorted(path.suffix for path in body.parent.iterdir()) == [".npy", ".txt"]


def flips(file, count, seed=0):
    """The file with one bit flipped, again and again; its size and time stay."""
    content, stat = file.read_bytes(), file.stat()
    for place in np.random.default_rng(seed).integers(0, 8 * len(content), count).tolist():
        body = bytearray(content)
        body[place // 8] ^= 1 << place % 8
        file.write_bytes(bytes(body))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        yield place


@pytest.mark.filterwarnings("error")
def test_no_flipped_bit_of_the_cache_is_taken(tmp_path, monkeypatch):
    fill(tmp_path, train=2, test=1)
    name = f"events:{tmp_path}"
    first = open_events(name, "train", T=2)
    wanted, note = np.array(first.frames), first.split
    del first
    (frames,), (names,) = tmp_path.rglob("events-train-*.npy"), tmp_path.rglob("events-train-*.txt")
    for file in (frames, names, tmp_path / ".spikezoo" / "hashes.json"):
        for _ in flips(file, 12):
            opened = open_events(name, "train", T=2)
            assert np.array_equal(opened.frames, wanted) and opened.split == note
    # Frames of another recording under the names of the wanted ones, complete and well-formed.
    open_events(name, "test", T=2)
    (other,) = tmp_path.rglob("events-test-*.npy")
    shutil.copy(other, frames)
    assert np.array_equal(open_events(name, "train", T=2).frames, wanted)
    # Rows of an interrupted build.
    whole = framing.Framing.integrate
    file = tmp_path / "train" / "10" / "1.bin"
    shutil.rmtree(tmp_path / ".spikezoo")

    def killed(self, path):
        if path == file:
            raise KeyboardInterrupt
        return whole(self, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(framing.Framing, "integrate", killed)
        open_events(name, "train", T=2)
    body, journal = (next(tmp_path.rglob(f"events-train{suffix}")) for suffix in (".part", ".part.txt"))
    kept = {path: path.read_bytes() for path in (body, journal)}
    for part in (body, journal):
        for _ in flips(part, 8):
            assert np.array_equal(open_events(name, "train", T=2).frames, wanted)
            for path in body.parent.glob("events-train-*"):
                path.unlink()
            for path, content in kept.items():
                path.write_bytes(content)


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"7",
        b'"x"',
        b"[[[]]]",
        b'{"a": 5}',
        b'{"sha256": [], "files": 3}',
        b"[" * 3000,
    ],
)
def test_any_junk_for_the_list_of_hashes(tmp_path, junk):
    fill(tmp_path, train=1, test=1)
    wanted = open_events(f"events:{tmp_path}", "train", T=2).split
    store = tmp_path / ".spikezoo" / "hashes.json"
    good = store.read_bytes()
    store.write_bytes(junk)
    assert open_events(f"events:{tmp_path}", "train", T=2).split == wanted
    assert store.read_bytes() == good


def test_file_cut_short_is_made_anew(tmp_path):
    fill(tmp_path)
    wanted = np.array(open_events(f"events:{tmp_path}", "train", T=4).frames)
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / ".spikezoo" / "hashes.json").write_text("[1, 2")
    assert np.array_equal(open_events(f"events:{tmp_path}", "train", T=4).frames, wanted)


def test_bad_recordings_cost_only_themselves(tmp_path, counting):
    made = fill(tmp_path)
    name = f"events:{tmp_path}"
    first, second = list(made)[1], list(made)[4]
    good = {file: Path(file).read_bytes() for file in (first, second)}
    Path(first).write_bytes(good[first][:-2])
    Path(second).write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 6 recordings cannot be used: ") as error:
        open_events(name, "train", T=4)
    assert f"{first}: it is truncated" in str(error.value) and f"{second}: the recording is empty" in str(error.value)
    Path(first).write_bytes(good[first])
    Path(second).write_bytes(good[second])
    counting.clear()
    opened = open_events(name, "train", T=4)
    assert sorted(counting) == sorted([Path(first).name, Path(second).name])
    assert all(opened.sample(i).sum() == len(made[file]["t"]) for i, file in enumerate(opened.files))

    # A recording of a complete cache is changed for a bad one, then for another; one is new.
    old = np.array(opened.frames)
    (cache,) = tmp_path.rglob("events-train-*.npy")
    WRITERS["bin"](Path(first), spoil("x", 3, 200))
    with pytest.raises(ValueError, match=r"1 of 6 .*x=200"):
        open_events(name, "train", T=4)
    assert cache.is_file()
    WRITERS["bin"](Path(first), make(77, seed=99))
    WRITERS["bin"](Path(first).with_name("20.bin"), make(78, seed=100))
    counting.clear()
    opened = open_events(name, "train", T=4)
    assert sorted(counting) == ["1.bin", "20.bin"] and not cache.is_file()
    assert opened.sample(1).sum() == 77 and opened.sample(3).sum() == 78
    assert np.array_equal(opened.frames[[0, 2, 4, 5, 6]], old[[0, 2, 3, 4, 5]])


def test_twins_of_train_and_test(tmp_path):
    fill(tmp_path)
    shutil.copy(tmp_path / "train" / "2" / "1.bin", tmp_path / "test" / "10" / "7.bin")
    for cache in (True, False):
        with pytest.raises(
            ValueError, match=r"1 recordings of the test split are in the train split too.*1.bin = .*7.bin"
        ):
            open_events(f"events:{tmp_path}", "train", T=4, cache=cache)


def test_split_of_ones_own(tmp_path):
    fill(tmp_path / "a", train=10, test=1)
    place = tmp_path / "a" / "train"
    with pytest.raises(ValueError, match=r"has classes but no split.*write_split"):
        open_events(f"events:{place}", "train", T=2)
    with pytest.raises(ValueError, match=r"test_share=1.5 is not possible"):
        write_split(place, 1.5)
    file = write_split(place, 0.2, seed=3)
    lines = file.read_text().splitlines()
    assert len(lines) == 4 and [line.split("  ")[1].partition("/")[0] for line in lines] == ["2", "2", "10", "10"]
    digest, _, listed = lines[0].partition("  ")
    assert digest == hashlib.sha256((place / listed).read_bytes()).hexdigest()
    train, test = (open_events(f"events:{place}", split, T=2) for split in ("train", "test"))
    assert [str(Path(path).relative_to(place)) for path in test.files] == [line.split("  ")[1] for line in lines]
    assert len(train) == 16 and not set(train.files) & set(test.files) and test.split.startswith("test.txt/test, 4 ")
    with pytest.raises(ValueError, match="has a split already"):
        write_split(place)
    file.unlink()
    assert write_split(place, 0.2, seed=3).read_text().splitlines() == lines
    WRITERS["bin"](place / listed, make(seed=55))
    with pytest.raises(ValueError, match=r"is not the recording that .*test.txt states"):
        open_events(f"events:{place}", "train", T=2)
    for text, message in (
        (f"{'0' * 64}  2/77.bin\n", "is not there"),
        ("2/1.bin\n", "is wanted as SHA256"),
        ("", "lists 0"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            open_events(f"events:{place}", "train", T=2)


def test_folders_that_do_not_fit(tmp_path):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            open_events(f"events:{tmp_path}", "train", T=2, **options)

    refused(r"has no class; wanted is a folder for each class")
    (tmp_path / "train" / "a").mkdir(parents=True)
    refused(r"has the folder train without its counterpart")
    (tmp_path / "test").mkdir()
    (tmp_path / "train" / "a" / "x.raw").touch()
    refused(r"a is a class without a recording \(.npz, .npy, .bin, .dat, .aedat, .aedat2, .aedat4\); it has .raw")
    write_npz(tmp_path / "train" / "a" / "1.npz", make())
    refused(r"test has no class")
    (tmp_path / "test" / "aa").mkdir()
    write_npz(tmp_path / "test" / "aa" / "1.npz", make(seed=1))
    refused(r"aa is no class of this dataset. Did you mean 'a'\?|aa is no class of this dataset. Valid: a.")
    (tmp_path / "test" / "aa").rename(tmp_path / "test" / "a")
    refused(r".npz files do not tell the size of the sensor. Write its height and width into .*sensor.txt")
    refused(r"size=\(1, 2, 3\) is not possible", size=(1, 2, 3))
    refused(r"outside the sensor of 20 x 20", size=20)
    (tmp_path / "sensor.txt").write_bytes(b"\xff34 34\n")
    refused(r"sensor.txt=\[0, 34\] is not possible")
    (tmp_path / "sensor.txt").write_text("34 forty\n")
    refused(r"sensor.txt=\[34, 0\] is not possible: it must be the height and width")
    (tmp_path / "sensor.txt").write_text("34 40\n")
    assert open_events(f"events:{tmp_path}", "train", T=2).frames.shape == (1, 2, 2, 34, 40)
    assert event_info(f"events:{tmp_path}").img_size == 40
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; type --dataset events:PATH"):
        open_events("events:nowhere", "train", T=2)
    with pytest.raises(FileNotFoundError, match="events:: there is no folder"):
        open_events("events:", "train", T=2)


def test_what_is_left_out_is_named(tmp_path, caplog):
    fill(tmp_path, train=2, test=1)
    for name in ("3.raw", "4.raw", "5.h5", ".hidden.bin", "._0.bin", "README"):
        (tmp_path / "train" / "2" / name).write_bytes(b"x")
    (tmp_path / "train" / "10" / "subject1").mkdir()
    with caplog.at_level("WARNING", "spikezoo"):
        opened = open_events(f"events:{tmp_path}", "train", T=2)
    assert len(opened) == 4
    (record,) = caplog.records
    assert "left out are 1 .h5, 2 .raw, 1 README, 1 folder, which" in record.getMessage()


def test_litter_and_links_are_no_classes(tmp_path):
    fill(tmp_path, train=2, test=1)
    for part in ("train", "test"):
        for name in (".ipynb_checkpoints", "__MACOSX"):
            (tmp_path / part / name).mkdir()
            write_bin(tmp_path / part / name / "0.bin", make(seed=99))
    (tmp_path / "train" / "0back").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "train" / "1twin").symlink_to(tmp_path / "train" / "2", target_is_directory=True)
    opened = open_events(f"events:{tmp_path}", "train", T=2)
    assert opened.classes == ["2", "10"] and opened.labels.tolist() == [0, 0, 1, 1]
    assert data.dataset_info(f"events:{tmp_path}").label_names == ("2", "10")


def test_suffixes_in_capitals(tmp_path):
    for number, split in enumerate(("train", "test")):
        folder = tmp_path / split / "a"
        folder.mkdir(parents=True)
        for count in range(2):
            write_bin(folder / f"{count}.BIN", make(seed=2 * number + count))
        (folder / "folder.bin").mkdir()  # no recording
    assert open_events(f"events:{tmp_path}", "train", T=2).frames.shape == (2, 2, 2, 34, 34)


def test_bad_arguments(tmp_path):
    fill(tmp_path)
    for options, message in (
        ({"T": 0}, r"T=0 is not possible: it must be a whole number"),
        (
            {"T": 2, "frames_by": "count"},
            r"frames_by='count' is not possible: it must be one of number, time, duration",
        ),
        ({"T": 2, "frames_by": "duration"}, r"duration_us=None is not possible"),
        ({"T": 2, "duration_us": 100}, r"duration_us=100 is not possible"),
        ({"T": 2, "frames_by": "duration", "duration_us": 0}, r"duration_us=0 is not possible"),
        ({"T": 2, "frames_by": "duration", "duration_us": 2.5}, r"duration_us=2.5 .* a whole number of microseconds"),
        ({"T": 2, "frames_by": "duration", "duration_us": "9"}, r"duration_us='9' is not possible"),
    ):
        with pytest.raises(ValueError, match=message):
            open_events(f"events:{tmp_path}", "train", **options)
    with pytest.raises(ValueError, match=r"split='tset' is not possible"):
        open_events(f"events:{tmp_path}", "tset", T=2)
    with pytest.raises(ValueError, match=r"unknown event dataset 'nmist'. Did you mean 'nmnist'\?"):
        open_events("nmist", "train", T=2)
    with pytest.raises(ValueError, match=r"size=48 is not possible: it must be \(34, 34\), the sensor of nmnist"):
        open_events("nmnist", "train", T=2, size=48)


def test_place_of_the_cache(tmp_path, monkeypatch):
    fill(tmp_path / "set")
    (tmp_path / "set" / ".spikezoo").write_text("no folder can be made here")
    with pytest.raises(ValueError, match=r"cannot be written .*; name another folder .*SPIKEZOO_CACHE"):
        open_events(f"events:{tmp_path / 'set'}", "train", T=2)
    monkeypatch.setenv("SPIKEZOO_CACHE", str(tmp_path / "cache"))
    opened = open_events(f"events:{tmp_path / 'set'}", "train", T=2)
    assert Path(opened.frames.filename).is_relative_to(tmp_path / "cache")


# --- the named datasets ------------------------------------------------------------------------------------------


def test_fixed_splits_of_cifar10dvs(tmp_path, monkeypatch):
    random, tebn = (recordings.named_test(official.NAMED[name]) for name in ("cifar10dvs", "cifar10dvs_tebn"))
    for label in official.CIFAR10:
        numbers = [{int(stem.rpartition("_")[2]) for stem in test if f"_{label}_" in stem} for test in (random, tebn)]
        assert len(numbers[0]) == 100 and max(numbers[0]) < 1000 and numbers[1] == set(range(100))
    assert len(random) == len(tebn) == 1000

    for folder, name in (("cat", "a.aedat"), ("download", "cat.zip")):  # whatever else lies there is no class
        (tmp_path / "some" / folder).mkdir(parents=True)
        (tmp_path / "some" / folder / name).touch()
    assert list(recordings.by_class(tmp_path / "some", official.CIFAR10)) == ["cat"]
    # 10,000 files would take longer than all other tests.
    there = {
        label: [Path(label, f"cifar10_{label}_{number}.npz") for number in range(1000)] for label in official.CIFAR10
    }
    monkeypatch.setattr(recordings, "by_class", lambda place, only: there)
    for label in official.CIFAR10:
        (tmp_path / "cifar10dvs" / "events_np" / label).mkdir(parents=True)
    for name, test in (("cifar10dvs", random), ("cifar10dvs_tebn", tebn)):
        found = recordings.find_recordings(name, str(tmp_path), None, False)
        assert {path.stem for path, _ in found.items["test"]} == test
        assert len(found.items["train"]) == 9000 and not {path.stem for path, _ in found.items["train"]} & test
        assert all(found.classes[label] == path.parent.name for path, label in found.items["train"])
        assert found.sensor == (128, 128)
    assert data.dataset_info("cifar10dvs").split_note != data.dataset_info("cifar10dvs_tebn").split_note

    there["cat"][12] = Path("cat", "mine.npz")
    with pytest.raises(ValueError, match=r"of them 1 are not in .* \(the first is cifar10_cat_12\), and 1 files"):
        recordings.find_recordings("cifar10dvs", str(tmp_path), None, False)
    other = dataclasses.replace(official.NAMED["cifar10dvs"], split_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"cifar10dvs.txt of this installation was changed"):
        recordings.named_test(other)


def make_official(monkeypatch, loader, *files):
    """Makes files the official ones of a dataset of SpikingJelly."""
    from spikingjelly import datasets

    rows = [
        (file.name, f"https://example.org/{file.name}", hashlib.md5(file.read_bytes()).hexdigest()) for file in files
    ]
    monkeypatch.setattr(getattr(datasets, loader), "resource_url_md5", classmethod(lambda cls: rows))


def test_official_archives_of_nmnist(tmp_path, monkeypatch):
    made = fill(tmp_path / "raw", classes=tuple("0123456789"), train=1, test=1)
    download = tmp_path / "data" / "nmnist" / "download"
    download.mkdir(parents=True)
    for part in ("Train", "Test"):
        with zipfile.ZipFile(download / f"{part}.zip", "w") as archive:
            for file in made:
                path = Path(file).relative_to(tmp_path / "raw")
                if path.parts[0] == part.lower():
                    archive.write(file, Path(part, *path.parts[1:]))
    make_official(monkeypatch, "NMNIST", download / "Train.zip", download / "Test.zip")
    good = (download / "Test.zip").read_bytes()
    (download / "Test.zip").write_bytes(good[:-9])
    with pytest.raises(FileNotFoundError, match=r"Test.zip is not there or has not the MD5 sum"):
        open_events("nmnist", "train", data_dir=str(tmp_path / "data"), T=2)
    (download / "Test.zip").write_bytes(good)
    leftover = tmp_path / "data" / "nmnist" / ".spikezoo-unpack-killed"
    leftover.mkdir()
    opened = open_events("nmnist", "train", data_dir=str(tmp_path / "data"), T=2)
    assert len(opened) == 10 and not leftover.exists()
    assert opened.sample(4).sum() == len(made[str(tmp_path / "raw" / "train" / "4" / "0.bin")]["t"])


def test_trials_of_dvs128gesture(tmp_path, monkeypatch):
    from spikingjelly.datasets import DVS128Gesture

    trials = tmp_path / "dvs128gesture" / "extract" / "DvsGesture"
    trials.mkdir(parents=True)
    for i, user in enumerate(("user01_led", "user24_led")):
        write_aedat3(trials / f"{user}.aedat", make(400, (128, 128), seed=i, last=11_000))
        rows = "".join(f"{label},{(label - 1) * 1000},{label * 1000}\n" for label in range(1, 12))
        (trials / f"{user}_labels.csv").write_text("class,startTime_usec,endTime_usec\n" + rows)
    (trials / "trials_to_train.txt").write_text("user01_led.aedat\n")
    (trials / "trials_to_test.txt").write_text("user24_led.aedat\n")

    whole = DVS128Gesture.create_raw_from_extracted

    def killed(extract_root, raw_root):
        whole(extract_root, raw_root)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DVS128Gesture, "create_raw_from_extracted", killed)
        open_events("dvs128gesture", "train", data_dir=str(tmp_path), T=2)
    assert [path.name for path in (tmp_path / "dvs128gesture").iterdir() if path.is_dir()] == ["extract"]
    train, test = (open_events("dvs128gesture", split, data_dir=str(tmp_path), T=2) for split in ("train", "test"))
    assert train.labels.tolist() == list(range(11)) and train.classes == [str(i) for i in range(11)]
    for i, opened in enumerate((train, test)):
        t = make(400, (128, 128), seed=i, last=11_000)["t"]
        assert opened.frames.sum((1, 2, 3, 4)).tolist() == [int((t // 1000 == label).sum()) for label in range(11)]


def test_invalid_events_of_a_trial_are_counted(tmp_path):
    write_aedat3(tmp_path / "a.aedat", make())
    content = bytearray((tmp_path / "a.aedat").read_bytes())
    assert count_invalid(tmp_path / "a.aedat") == 0
    content[-8] ^= 1  # the mark of the last event
    (tmp_path / "a.aedat").write_bytes(content)
    assert count_invalid(tmp_path / "a.aedat") == 1
    assert len(read_events(tmp_path / "a.aedat", (34, 34))["t"]) == 59


def test_damaged_trial_is_named(tmp_path):
    trials = tmp_path / "DVS128Gesture" / "DvsGesture"
    trials.mkdir(parents=True)
    write_aedat3(trials / "user01_led.aedat", make())
    (trials / "user01_led.aedat").write_bytes((trials / "user01_led.aedat").read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"user01_led.aedat: it is truncated: the packet that begins at byte \d+"):
        open_events("dvs128gesture", "train", data_dir=str(tmp_path), T=2)


def test_download_of_cifar10dvs(tmp_path, monkeypatch):
    asked = []

    def refuse(url, root, filename, md5):
        asked.append((url, filename, md5))
        raise OSError("no network in tests")

    monkeypatch.setattr(official, "download_url", refuse)
    with pytest.raises(FileNotFoundError, match=r"airplane.zip \(MD5 0afd5c4bf9ae06af762a77b180354fdd\)"):
        open_events("cifar10dvs", "train", data_dir=str(tmp_path), T=2, download=False)
    with pytest.raises(FileNotFoundError, match=r"cannot be had or unpacked \(OSError: no network in tests\)"):
        open_events("cifar10dvs", "train", data_dir=str(tmp_path), T=2)
    assert asked == [
        ("https://ndownloader.figshare.com/files/7712788", "airplane.zip", "0afd5c4bf9ae06af762a77b180354fdd")
    ]


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"Train.zip \(MD5 20959b8e626244a1b502305a9e6e2031\) .* --data-dir FOLDER"
    ):
        open_events("nmnist", "train", data_dir=str(tmp_path), T=2)
    (tmp_path / "events_np").mkdir()
    (tmp_path / "events_np.building").touch()
    with pytest.raises(ValueError, match=r"events_np.building says that SpikingJelly was interrupted"):
        open_events("nmnist", "train", data_dir=str(tmp_path), T=2)


def test_names_known_to_data():
    names = data.list_datasets()
    assert [name for name in names if data.is_event_dataset(name)] == [
        "nmnist", "cifar10dvs", "cifar10dvs_tebn", "dvs128gesture", "events:PATH"
    ]  # fmt: skip
    info = data.dataset_info("dvs128gesture")
    assert (info.num_classes, info.in_chans, info.img_size) == (11, 2, 128)
    with pytest.raises(ValueError, match=r"unknown dataset 'nmist': did you mean .*nmnist"):
        data.dataset_info("nmist")
    with pytest.raises(ValueError, match=r"dataset 'nmnist' is not held in memory; use create_loader\('nmnist', "):
        data.load_arrays("nmnist", "train")
