"""The sparse code of weights: per tensor the smallest of dense, bitmask, ticket, levels and mask, exact and checked.

A coded tensor ``p`` becomes several plain ones, named after it, as in the sparse-bitmask convention of
compressed-tensors, with the mask over ``p.reshape(shape[0], -1)`` so that convolutions pack as tightly as matrices:

    p.shape        int64, the shape
    p.bitmask      uint8, which entries are not zero, in one of the mask codes below
    p.compressed   bitmask code: the values that are not zero, in order
    p.gain         ticket code: the one magnitude of all values that are not zero
    p.signs        ticket code: one bit a kept value, in order, set where it is negative; left out where the signs
                   come from a seed, which then stands in the metadata with a hash of what it has to give

The mask code, of tensors of bool, is p.shape and p.bitmask alone. Masks have codes of their own:

    bits           one bit an entry, little-endian, every row padded to whole bytes
    deflate        those bytes, Huffman coded
    gaps, holes    distances between the entries that are (holes: that are not) kept, in bytes, Huffman coded: close
                   to the entropy of sparse (nearly full) masks

The levels code, of float32 weights that :func:`round_to_levels` made, is two other tensors, of which the first may be
in the bitmask code itself:

    p.levels       int8, whole numbers from -127 to 127
    p.scale        float32, what each row of them is multiplied with

"Zero" means all bits zero: minus zero is kept as a value.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikezoo.checks import is_whole

__all__ = ["METADATA_KEY", "VERSION", "decode", "encode", "levels_of", "round_to_levels", "seeded_signs"]

METADATA_KEY = "spikezoo.sparse"
VERSION = 1
# An integer of the same size gives access to the bits of a value; anything else is stored dense.
_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.int64: torch.int64,
    torch.int32: torch.int32,
    torch.int16: torch.int16,
    torch.int8: torch.int8,
    torch.uint8: torch.int8,
    torch.bool: torch.int8,
}
_ENTRY_BYTES = 100  # what one more tensor costs in the header of the file, about
_MASKS = ("bits", "deflate", "gaps", "holes")
_PARTS = ("shape", "bitmask", "compressed", "gain", "signs")
_LEVELS = ("scale", "levels", *(f"levels.{part}" for part in ("shape", "bitmask", "compressed")))
_CODES = {
    "bitmask": {"shape", "bitmask", "compressed"},
    "ticket": {"shape", "bitmask", "gain"},
    "mask": {"shape", "bitmask"},
}
_MOST_LEVEL = 127


def seeded_signs(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Random signs that a seed determines on every machine and version, True where negative.

    The raw stream of the Philox counter generator, whose output NumPy guarantees not to change.

    Args:
        seed: An integer from 0 to 2**63 - 1.
        shape: Shape of the result.

    Raises:
        ValueError: Another seed.
    """
    if not is_whole(seed, 0, 2**63 - 1):
        raise ValueError(f"Seed {seed!r} of signs: expected an integer from 0 to 2**63 - 1.")
    count = math.prod(shape)
    words = np.random.Philox(key=seed).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=count, bitorder="little")
    return torch.from_numpy(bits.view(bool)).reshape(shape)


def _signs_hash(negative: np.ndarray) -> str:
    return hashlib.sha256(np.packbits(negative, bitorder="little").tobytes()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------- levels


def _scales(rows: Tensor) -> Tensor:
    """Of every row the smallest number of four significant bits that brings its values to at most 127, in float64."""
    fraction, exponent = torch.frexp(rows.abs().amax(1, keepdim=True) / _MOST_LEVEL)
    # Far below float32's smallest normal number there is nothing to keep; a scale of zero would divide by zero.
    scale = torch.ldexp((fraction * 16).ceil() / 16, exponent).clamp_min(2.0**-100)
    # The largest value of a row that was rounded before may have become smaller: then its scale was the next one.
    fraction, exponent = torch.frexp(scale)
    coarser = torch.ldexp(fraction + 1 / 16, exponent)
    return torch.where(~_whole(rows / scale) & _whole(rows / coarser), coarser, scale)


def _whole(rows: Tensor) -> Tensor:
    return (rows == rows.round()).all(1, keepdim=True)


def _rows_of(weight: Tensor) -> Tensor:
    return weight.detach().flatten(1).double()


def round_to_levels(weight: Tensor) -> Tensor:
    """Round weights to 255 levels a row (an output channel): whole numbers from -127 to 127 times the row's scale.

    A scale has four significant bits, so that float32 holds any sum of up to 8,800 such weights exactly, in whatever
    order: on spikes these weights and eight-bit integers give the same potentials. It is at most an eighth coarser
    than the finest scale that reaches the largest weight. Weights that were rounded stay as they are.

    Args:
        weight: ``[rows, ...]``, at least two dimensions, float32 or float64.

    Returns:
        The rounded weights, of the same shape and type. Nan and infinity make nan of their row, and numbers next to the
        largest one infinity.
    """
    if not weight.numel():
        return weight.clone()
    rows = _rows_of(weight)
    scale = _scales(rows)
    # Adding zero turns minus zero, which is no level, into zero.
    return ((rows / scale).round() * scale + 0.0).to(weight.dtype).view(weight.shape)


def levels_of(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """The levels of weights that :func:`round_to_levels` made.

    Args:
        weight: ``[rows, ...]``, float32 or float64.

    Returns:
        The levels, int8 in the shape of ``weight``, and the scales ``[rows]`` in its type, whose product it is
        exactly; None for other weights.
    """
    if weight.dim() < 2 or not weight.numel() or not weight.is_floating_point():
        return None
    for part in (weight[:4], weight):  # few are enough to tell ordinary weights
        rows = _rows_of(part)
        scale = _scales(rows)
        if not _whole(levels := rows / scale).all():
            return None
    return levels.to(torch.int8).view(weight.shape), scale.squeeze(1).to(weight.dtype)


# ---------------------------------------------------------------------------------------------------- masks


def _deflate(data: bytes, strategy: int = zlib.Z_HUFFMAN_ONLY) -> bytes:
    # Random masks have no repetitions to find: Huffman coding alone is fast and close to their entropy.
    coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, strategy)
    return coder.compress(data) + coder.flush()


def _inflate(data: bytes, limit: int, name: str) -> bytes:
    coder = zlib.decompressobj(-15)
    try:
        found = coder.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(f"The mask of {name} is damaged ({error}).") from error
    if not coder.eof or coder.unused_data or len(found) > limit:
        raise ValueError(f"The mask of {name} is damaged: its compressed bytes do not end where they should.")
    return found


def _most_entries(size: int) -> int:
    """How many entries a mask of so many bytes may stand for: a forged shape must not fill the memory.

    About what deflate itself can do: 8 entries a byte, at best compressed by 1032.
    """
    return 2**16 + 2**14 * size


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])


def _pack_mask(mask: np.ndarray, shape: tuple[int, ...]) -> tuple[str, bytes]:
    """Encode a flat mask in the smallest code."""
    density = mask.mean()
    if 0.22 < density < 0.78:  # where gaps win nothing, and would be slow
        packed = np.packbits(mask.reshape(_rows(shape)), axis=1, bitorder="little").tobytes()
        coded = packed if 0.47 < density < 0.53 else _deflate(packed)
        return ("bits", packed) if len(packed) <= len(coded) else ("deflate", coded)
    code, kept = ("gaps", mask) if density < 0.5 else ("holes", ~mask)
    gaps = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    over, rest = np.divmod(gaps, 255)  # 255 says: as many without an end, go on
    symbols = np.full(len(gaps) + over.sum(), 255, np.uint8)
    symbols[np.cumsum(over + 1) - 1] = rest
    coded = _deflate(symbols.tobytes())
    if len(mask) <= _most_entries(len(coded)):
        return code, coded
    # Gaps do not say what follows the last of them: here nearly everything does, and it is runs of equal bytes.
    return "deflate", _deflate(np.packbits(mask.reshape(_rows(shape)), axis=1, bitorder="little").tobytes(), zlib.Z_RLE)


def _unpack_mask(code: str, data: bytes, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Decode a mask into a flat array of bool."""
    count = math.prod(shape)
    if count > _most_entries(len(data)):
        raise ValueError(f"The mask of {name} has {len(data):,} bytes: too few for its shape {shape}.")
    if code in ("bits", "deflate"):
        rows, columns = _rows(shape)
        width = -(-columns // 8)
        if code == "deflate":
            data = _inflate(data, rows * width, name)
        if len(data) != rows * width:
            raise ValueError(f"The mask of {name} has {len(data):,} bytes; its shape {shape} needs {rows * width:,}.")
        packed = np.frombuffer(data, np.uint8).reshape(rows, width)
        if columns % 8 and (packed[:, -1] >> columns % 8).any():
            raise ValueError(f"The mask of {name} is damaged: bits are set in its padding.")
        return np.unpackbits(packed, axis=1, count=columns, bitorder="little").reshape(-1).view(bool)
    symbols = np.frombuffer(_inflate(data, count, name), np.uint8)
    ends = symbols < 255
    positions = np.cumsum(symbols + ends, dtype=np.int64)[ends] - 1
    if len(symbols) and (not ends[-1] or positions[-1] >= count):
        raise ValueError(
            f"The mask of {name} is damaged: it reaches beyond the {count:,} entries of its shape {shape}."
        )
    mask = np.full(count, code == "holes")
    mask[positions] = code == "gaps"
    return mask


# -------------------------------------------------------------------------------------------------- tensors


def _encode_tensor(name: str, tensor: Tensor, seed: int | None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The code of one tensor: its metadata and its parts, or None where dense is as small."""
    integer = _INTEGERS.get(tensor.dtype)
    if integer is None or tensor.dim() == 0 or tensor.numel() == 0:
        return None
    shape = tuple(tensor.shape)
    values = tensor.reshape(-1)
    bits = values.view(integer).numpy()
    mask = bits != 0
    kept = int(np.count_nonzero(mask))
    boolean = tensor.dtype == torch.bool
    ticket = tensor.is_floating_point() and _one_magnitude(bits, mask) and not values[int(mask.argmax())].isnan()
    best = _encode_levels(name, tensor) if tensor.dtype == torch.float32 and kept and not ticket else None
    if not (ticket or boolean) and kept * tensor.element_size() + tensor.numel() // 100 >= _size(best, tensor):
        return best  # even the best mask would not pay
    code, packed = _pack_mask(mask, shape)
    parts = {"shape": torch.tensor(shape), "bitmask": torch.frombuffer(bytearray(packed), dtype=torch.uint8)}
    facts: dict[str, Any] = {"code": "ticket" if ticket else "mask" if boolean else "bitmask", "mask": code}
    if ticket:
        parts["gain"] = values[int(mask.argmax())].abs().reshape(1)
        negative = bits < 0  # the sign bit of a float is that of the integer
        signs = seeded_signs(seed, shape).reshape(-1).numpy() if seed is not None else None
        if signs is not None and np.array_equal(signs & mask, negative):
            facts |= {"seed": seed, "signs": _signs_hash(signs)}
        else:
            parts["signs"] = torch.from_numpy(np.packbits(negative[mask], bitorder="little"))
    elif not boolean:
        parts["compressed"] = torch.from_numpy(bits[mask]).view(tensor.dtype) if kept else values[:0]
    return (facts, parts) if _size((facts, parts), tensor) < _size(best, tensor) else best


def _encode_levels(name: str, tensor: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The levels code of one tensor, or None where it has none or dense is as small."""
    if (found := levels_of(tensor)) is None:
        return None
    levels, scale = found
    if (np.signbit(tensor.numpy()) & (levels.numpy() == 0)).any():
        return None  # minus zero is no level
    inner = _encode_tensor(f"{name}.levels", levels, None)
    parts = {"levels": levels} if inner is None else {f"levels.{key}": part for key, part in inner[1].items()}
    coded = {"code": "levels"} | ({} if inner is None else {"levels": inner[0]}), {"scale": scale, **parts}
    return coded if _size(coded, tensor) < _size(None, tensor) else None


def _size(coded: tuple[dict[str, Any], dict[str, Tensor]] | None, tensor: Tensor) -> int:
    """Bytes of a coded tensor in a file, about; None is dense."""
    return sum(part.nbytes + _ENTRY_BYTES for part in ([tensor] if coded is None else coded[1].values()))


def _one_magnitude(bits: np.ndarray, mask: np.ndarray) -> bool:
    """Whether there are values that are not zero, and all of them differ in their sign only."""
    largest = np.iinfo(bits.dtype).max
    first = bits[mask.argmax()] & largest
    few = slice(0, 4096)  # enough to tell ordinary weights
    return bool(first) and all(np.array_equal(bits[part] & largest == first, mask[part]) for part in (few, slice(None)))


def _decode_tensor(name: str, facts: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    """Check and decode one tensor."""
    if facts.get("code") == "levels":
        return _decode_levels(name, facts, parts)
    code, mask_code = facts.get("code"), facts.get("mask")
    wanted = _CODES.get(str(code), set()).copy()
    if not wanted or mask_code not in _MASKS:
        raise ValueError(
            f"{name} is stored in the code {code!r} with the mask code {mask_code!r}; known are "
            f"{', '.join(_CODES)}, with {', '.join(_MASKS)}, and levels. Update spikezoo, or fetch the file again."
        )
    if code == "ticket" and "seed" not in facts:
        wanted.add("signs")
    if parts.keys() != wanted:
        raise ValueError(f"{name} is stored in the parts {sorted(parts)}; its code {code!r} has {sorted(wanted)}.")
    stored = parts["shape"]
    if stored.dtype != torch.int64 or stored.dim() != 1 or not len(stored) or (stored < 1).any():
        raise ValueError(f"{name}.shape is {stored.tolist()} of {stored.dtype}: no shape.")
    if parts["bitmask"].dtype != torch.uint8 or parts["bitmask"].dim() != 1:
        raise ValueError(f"{name}.bitmask is {tuple(parts['bitmask'].shape)} of {parts['bitmask'].dtype}: no mask.")
    shape = tuple(stored.tolist())
    mask = _unpack_mask(mask_code, parts["bitmask"].numpy().tobytes(), shape, name)
    if code == "mask":
        return torch.from_numpy(mask.copy()).reshape(shape)
    kept = int(np.count_nonzero(mask))
    if code == "bitmask":
        values = parts["compressed"]
        if values.dtype not in _INTEGERS or values.dim() != 1 or len(values) != kept:
            raise ValueError(
                f"{name}.compressed is {tuple(values.shape)} of {values.dtype}: no values for the {kept:,} bits of its "
                "mask."
            )
        result = np.zeros(mask.shape, _numpy_integer(values.dtype))
        result[mask] = values.view(_INTEGERS[values.dtype]).numpy()
        return torch.from_numpy(result).view(values.dtype).reshape(shape)
    gain = parts["gain"]
    if gain.dtype not in _INTEGERS or not gain.is_floating_point() or gain.shape != (1,) or not gain.item() > 0:
        raise ValueError(
            f"{name}.gain is {tuple(gain.shape)} of {gain.dtype}, {gain.flatten()[:3].tolist()}: expected one positive "
            "number."
        )
    if "seed" in facts:
        negative = seeded_signs(facts["seed"], shape).reshape(-1).numpy()
        if _signs_hash(negative) != facts.get("signs"):
            raise ValueError(f"The signs that seed {facts['seed']} gives for {name} are not those that were stored.")
        negative &= mask
    else:
        signs = parts["signs"]
        if signs.dtype != torch.uint8 or signs.shape != (-(-kept // 8),):
            raise ValueError(
                f"{name}.signs is {tuple(signs.shape)} of {signs.dtype}: no signs for the {kept:,} bits of its mask."
            )
        packed = signs.numpy()
        if kept % 8 and packed[-1] >> kept % 8:
            raise ValueError(f"The signs of {name} are damaged: bits are set in the padding.")
        negative = np.zeros(mask.shape, bool)
        negative[mask] = np.unpackbits(packed, count=kept, bitorder="little").view(bool)
    # On the bits: the gain where the mask is set, its sign bit where the sign is.
    integer = _numpy_integer(gain.dtype)
    result = mask * gain.view(_INTEGERS[gain.dtype]).numpy()
    result |= negative * integer(np.iinfo(integer).min)
    return torch.from_numpy(result).view(gain.dtype).reshape(shape)


def _decode_levels(name: str, facts: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    """Check and decode a tensor in the levels code."""
    inner = facts.get("levels")
    scale, rest = parts.get("scale"), {key: part for key, part in parts.items() if key != "scale"}
    if inner is None and rest.keys() == {"levels"}:
        levels = rest["levels"]
    elif isinstance(inner, dict) and inner.get("code") == "bitmask":
        coded = {key.removeprefix("levels."): part for key, part in rest.items()}
        levels = _decode_tensor(f"{name}.levels", inner, coded)
    else:
        raise ValueError(f"{name} is stored in the parts {sorted(parts)}: its code 'levels' has levels and scale.")
    if levels.dtype != torch.int8 or levels.dim() < 2 or not levels.numel() or levels.min() < -_MOST_LEVEL:
        raise ValueError(f"{name}.levels is {tuple(levels.shape)} of {levels.dtype}: no levels from -127 to 127.")
    if scale is None or scale.dtype != torch.float32 or scale.shape != levels.shape[:1]:
        found = "missing" if scale is None else f"{tuple(scale.shape)} of {scale.dtype}"
        raise ValueError(f"{name}.scale is {found}; its {len(levels):,} rows of levels need one float32 each.")
    if not (scale.isfinite() & (scale > 0)).all():
        raise ValueError(f"{name}.scale has the values {scale[:3].tolist()}: expected positive numbers.")
    return levels * scale.view(-1, *[1] * (levels.dim() - 1))


def _numpy_integer(dtype: torch.dtype) -> Any:
    return {8: np.int64, 4: np.int32, 2: np.int16, 1: np.int8}[dtype.itemsize]


# ---------------------------------------------------------------------------------------------- state dicts


def _digest(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A sha256 over everything that a file says: names, types, shapes, bytes and the codes."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _shared(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Names whose tensor is the very same memory as an earlier one's, with that one's name."""
    seen: dict[Any, str] = {}
    for name, tensor in state.items():
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
            first = seen.setdefault(place, name)
            if first != name:
                yield name, first


def encode(
    state: Mapping[str, Tensor], *, sparse: bool = True, seeds: Mapping[str, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Encode a state dict for a safetensors file.

    Args:
        state: Names and tensors, on any device.
        sparse: Choose the smallest code per tensor; otherwise all stay dense, and any reader can read them.
        seeds: For tickets, the seeds whose :func:`seeded_signs` are the signs of a tensor; ignored where they are not.

    Returns:
        The tensors to store, and the metadata that :func:`decode` needs.

    Raises:
        ValueError: A seed that is none.
    """
    aliases = dict(_shared(state)) if sparse else {}
    stored: dict[str, Tensor] = {}
    codes: dict[str, Any] = {}
    for name, tensor in state.items():
        if name in aliases:
            continue
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        coded = _encode_tensor(name, tensor, (seeds or {}).get(name)) if sparse else None
        if coded is not None and not any(f"{name}.{part}" in state for part in (*_PARTS, *_LEVELS)):
            codes[name] = coded[0]
            stored |= {f"{name}.{part}": value for part, value in coded[1].items()}
        else:
            stored[name] = tensor.clone()  # safetensors refuses views that share memory
    facts = {"version": VERSION, "tensors": codes, "shared": aliases}
    return stored, {METADATA_KEY: json.dumps({**facts, "sha256": _digest(facts, stored)})}


def _check_size(codes: Mapping[str, Any], stored: Mapping[str, Tensor], most: int | None) -> None:
    """Raise where the coded tensors ask for more numbers than there can be: masks of zeros stand for very many."""
    places = (f"{name}.{part}" for name in codes for part in ("shape", "levels.shape"))
    shapes = [stored[place].tolist() for place in places if place in stored and stored[place].dim() == 1]
    asked = sum(abs(math.prod(shape)) for shape in shapes)
    if most is None:  # a net of a thousandth of its weights has about 200 a byte
        most = 2**26 + 2**8 * sum(tensor.nbytes for tensor in stored.values())
    if asked > most:
        raise ValueError(f"Its masks ask for {asked:,} numbers, where at most {most:,} are expected.")


def decode(stored: Mapping[str, Tensor], metadata: Mapping[str, str], *, most: int | None = None) -> dict[str, Tensor]:
    """Decode what :func:`encode` made.

    Args:
        stored: Tensors of the file.
        metadata: Its metadata.
        most: How many numbers the coded tensors may have; None allows what their bytes make plausible.

    Raises:
        ValueError: An unknown version, parts that do not fit each other, more numbers than ``most``, or bytes that are
            not those written.
    """
    try:
        facts = json.loads(metadata[METADATA_KEY])
        digest, version, codes, aliases = (facts.pop("sha256"), *(facts[k] for k in ("version", "tensors", "shared")))
        well_formed = all(isinstance(value, dict) for value in (codes, aliases, *codes.values()))
        well_formed &= all(isinstance(first, str) for first in aliases.values())
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"Its metadata {METADATA_KEY!r} are damaged ({type(error).__name__}: {error}).") from error
    if version != VERSION:
        raise ValueError(f"It has format version {version!r}; this spikezoo reads version {VERSION}. Update spikezoo.")
    if not well_formed or digest != _digest(facts, stored):
        raise ValueError("Its content is not what was written: the sha256 of names, types, shapes and bytes differs.")
    _check_size(codes, stored, most)
    state = {}
    rest = dict(stored)
    for name, code in codes.items():
        names = _LEVELS if code.get("code") == "levels" else _PARTS
        found = {part: rest.pop(key) for part in names if (key := f"{name}.{part}") in rest}
        state[name] = _decode_tensor(name, code, found)
    if twice := state.keys() & rest.keys():
        raise ValueError(f"It holds {min(twice)} twice: coded and dense.")
    state |= rest
    for name, first in aliases.items():
        if first not in state or name in state:
            raise ValueError(f"It says that {name} shares the memory of {first}, which it does not hold.")
        state[name] = state[first]
    return state
