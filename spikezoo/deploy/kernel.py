"""The kernel of spikes in bits: compiled once for this processor, kept, and called as an operator of torch."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir

from spikezoo.checkpoint import atomic, file_hash
from spikezoo.checks import choice

__all__ = ["KINDS", "Layer", "Term", "compiler", "instructions", "kernel", "pack", "processor", "unpack"]

SOURCE = Path(__file__).with_name("bits.cpp")
PATHS = {
    "plain": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx2", "-mfma", *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vbmi"))),
}
# How a summand is computed, in the numbers of the kernel: tables of bytes, tables of words, events; read as it is.
KINDS = {"bytes": 0, "words": 1, "rows": 2, "bits": 3, "dense": 4}
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32


class Term(ctypes.Structure):
    """A summand of a layer, as the kernel has it."""

    _fields_ = [
        *((name, _INT) for name in ("kind", "channels", "height", "width")),
        *((name, _INT * 2) for name in ("kernel", "stride", "padding", "dilation")),
        ("pool", _INT * 3),
        ("segment", _INT),
        ("levels", ctypes.c_float),
        *((name, _POINTER) for name in ("input", "weight", "scale", "bias", "gain", "shift")),
        ("strides", ctypes.c_int64 * 5),
    ]


class Layer(ctypes.Structure):
    """A layer, as the kernel has it."""

    _fields_ = [
        *((name, _INT) for name in ("T", "B", "O", "H", "W", "terms", "threads", "charge", "soft", "elements")),
        *((name, ctypes.c_float) for name in ("factor", "v_reset", "start", "threshold")),
        *((name, _POINTER) for name in ("at", "sign", "out")),
        ("term", Term * 2),
    ]


@functools.cache
def processor() -> tuple[str, ...]:
    """The machine, and those of its instructions that a number format's speed depends on."""
    names = "avx2 fma avx512f avx512bw avx512vl avx512dq avx512vbmi avx512_vnni avx_vnni avx512_bf16 amx_int8 amx_bf16"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = set(next(line for line in lines if line.startswith("flags")).split())
    except (OSError, StopIteration):
        flags = {"avx2", "fma"} if torch.cpu._is_avx2_supported() else set()
    return (platform.machine(), *(name for name in names.split() if name in flags))


def instructions() -> str:
    """Which of ``PATHS`` this processor runs fastest; SPIKEZOO_BITS asks for another one."""
    has = set(processor())
    best = "avx2" if has >= {"avx2", "fma"} else "plain"
    if has >= {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi"}:
        best = "avx512"
    asked = os.environ.get("SPIKEZOO_BITS") or best
    choice("SPIKEZOO_BITS", asked, list(PATHS)[: list(PATHS).index(best) + 1])
    return asked


def compiler() -> str | None:
    """The C++ compiler that torch.compile, too, would take on a CPU; None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "c++"))), None)


def _flags(path: str) -> tuple[str, ...]:
    return ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", *PATHS[path])


def place(path: str) -> Path:
    """Where the compiled kernel is kept, beside what torch.compile keeps; its name tells source and flags."""
    text = "\n".join((SOURCE.read_text(encoding="utf-8"), *_flags(path), platform.machine()))
    return Path(cache_dir()) / "spikezoo" / f"bits-{hashlib.sha256(text.encode()).hexdigest()[:16]}-{path}.so"


def _compile(compiler: str, path: str, made: Path) -> None:
    for more in (("-fopenmp",), ()):  # not every compiler has it
        command = [compiler, *_flags(path), *more, str(SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.returncode:
            return
    raise ValueError(f"{compiler} failed on {SOURCE.name}: {done.stderr[:500]}")


def library(path: str, content: bytes | None = None) -> Path:
    """File of the compiled kernel: compiled at its first use, then kept.

    Args:
        path: Of ``PATHS``.
        content: The compiled kernel, which saves compiling it.

    Raises:
        ValueError: No compiler, or one that fails; its first lines are in the message.
    """
    file, found = place(path), compiler()
    digest = file.with_suffix(".sha256")  # a damaged one is compiled anew, as it would be run as it is
    if file.is_file() and digest.is_file() and digest.read_bytes() == file_hash(file).encode():
        return file
    if found is None and content is None:
        raise ValueError("Spikes in bits need a C++ compiler and none was found: install g++, or set CXX.")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        if content is not None:
            made.write_bytes(content)
        else:
            _compile(str(found), path, made)
        made.replace(file)
        with atomic(digest) as temporary:
            temporary.write_bytes(file_hash(file).encode())
    return file


@functools.cache
def loaded(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(library(path)))


def kernel() -> ctypes.CDLL:
    """The kernel for this processor."""
    return loaded(instructions())


def widths() -> dict[str, int]:
    """How many channels one look-up takes, of tables of bytes and of words."""
    both = kernel().bits_widths()
    return {"bytes": both // 16, "words": both % 16}


def _int64(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 5)(*values)


@torch.library.custom_op("spikezoo::pack", mutates_args=())
def pack(x: Tensor) -> Tensor:
    """Bits ``[T, ceil(C / 8), H, W, B]`` of spikes ``[T, B, C, H, W]``."""
    x = x.to(torch.uint8)
    T, B, C, H, W = x.shape
    out = x.new_empty(T, -(-C // 8), H, W, B)
    kernel().bits_pack(_POINTER(x.data_ptr()), _int64(x.shape), _int64(x.stride()), _POINTER(out.data_ptr()))
    return out


@pack.register_fake
def _(x: Tensor) -> Tensor:
    T, B, C, H, W = x.shape
    return x.new_empty(T, -(-C // 8), H, W, B, dtype=torch.uint8)


@torch.library.custom_op("spikezoo::unpack", mutates_args=())
def unpack(x: Tensor, channels: int) -> Tensor:
    """Spikes ``[T, B, C, H, W]`` as bytes, channels-last, of bits ``[T, ceil(C / 8), H, W, B]``."""
    T, _, H, W, B = x.shape
    out = x.new_empty(T, B, H, W, channels)
    kernel().bits_unpack(_POINTER(x.data_ptr()), _int64((T, B, channels, H, W)), _POINTER(out.data_ptr()))
    return out.permute(0, 1, 4, 2, 3)


@unpack.register_fake
def _(x: Tensor, channels: int) -> Tensor:
    T, _, H, W, B = x.shape
    return x.new_empty(T, B, H, W, channels).permute(0, 1, 4, 2, 3)
