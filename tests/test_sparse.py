"""The sparse code: every bit comes back, every code is right by hand, and what does not fit together is refused."""

import hashlib
import json
import math
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spikezoo.checkpoint import sparse
from spikezoo.checkpoint.sparse import METADATA_KEY, decode, encode, levels_of, round_to_levels, seeded_signs

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
DENSE_ONLY = (
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
)
CODED = (*FLOATS, *SIGNED, torch.uint8, torch.bool)


def raw(tensor):
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)


def same(found, wanted):
    """The same names, types, shapes and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(raw(found[name]), raw(tensor)), name


@pytest.fixture
def round_trip(tmp_path):
    """Encode, write, read, decode and compare; gives the decoded state, the stored tensors and the codes."""

    def run(state, **options):
        stored, metadata = encode(state, **options)
        save_file(stored, tmp_path / "a.safetensors", metadata)
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            found = decode({name: file.get_tensor(name) for name in file.keys()}, file.metadata())  # noqa: SIM118
        same(found, state)
        return found, stored, json.loads(metadata[METADATA_KEY])["tensors"]

    return run


def random_bits(dtype, shape, kept, seed=0):
    """Random bits, NaN with payload and denormals among them, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    random = torch.randint(0, 256, (math.prod(shape), size), generator=generator, dtype=torch.uint8)
    random[torch.rand(len(random), generator=generator) >= kept] = 0
    if dtype == torch.bool:
        random = (random > 0).to(torch.uint8)
    return random.view(dtype).reshape(shape)


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("kept", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [*CODED, *DENSE_ONLY], ids=str)
def test_every_type(round_trip, dtype, kept):
    _, _, codes = round_trip({"a": random_bits(dtype, (24, 10, 3, 3), kept)})
    if dtype == torch.bool:
        assert codes["a"]["code"] == "mask"
    elif dtype in DENSE_ONLY or kept == 1:
        assert not codes
    elif kept < 0.1:
        assert codes["a"]["code"] == "bitmask"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_special_values(round_trip, dtype):
    info = torch.finfo(dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[info.bits // 8]
    inf = torch.tensor([torch.inf], dtype=dtype).view(integer).item()
    special = [0.0, -0.0, torch.inf, -torch.inf, info.tiny, info.smallest_normal, info.max, info.min, 1 + info.eps]
    values = torch.tensor(special, dtype=dtype)
    bits = [inf + 1, inf + 5, -1, 1, 3]  # two NaN with a payload, one with all bits set, two denormals
    values = torch.cat([values, torch.tensor(bits, dtype=integer).view(dtype)])
    assert int(values.isnan().sum()) == 3
    tensor = torch.zeros(40, 40, dtype=dtype)
    tensor.view(-1)[7 : 7 * len(values) + 1 : 7] = values
    _, stored, codes = round_trip({"a": tensor, "dense": values})
    assert codes == {"a": {"code": "bitmask", "mask": "gaps"}}
    assert torch.equal(raw(stored["a.compressed"]), raw(values[1:]))  # minus zero is a value, zero is none


@pytest.mark.parametrize("value", [torch.nan, -0.0], ids=str)
def test_one_magnitude_that_is_no_gain(round_trip, value):
    _, _, codes = round_trip({"a": torch.zeros(9, 99).index_fill(1, torch.tensor([3, 50]), value)})
    assert codes["a"]["code"] == "bitmask"


SHAPES = [(), (0,), (0, 3), (3, 0, 2), (1,), (1, 1), (7,), (999,), (2, 5), (1, 400), (400, 1), (6, 5, 4, 3), (1,) * 9]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(round_trip, shape):
    for kept in (0, 0.1, 1):
        round_trip({"a": random_bits(torch.float32, shape, kept), "b": torch.ones(shape)})


def test_columns_of_every_width(round_trip):
    # Rows are padded to whole bytes: 1 to 25 columns leave 0 to 7 bits over.
    state = {f"{n}": random_bits(torch.float64, (40, n), 0.5, n) for n in range(1, 26)}
    _, _, codes = round_trip(state)
    assert {code["mask"] for code in codes.values()} >= {"bits"} and len(codes) > 20
    state = {f"{n}": random_bits(torch.float64, (200, n), 0.3, n) for n in range(1, 26)}
    _, _, codes = round_trip(state)
    assert {code["mask"] for code in codes.values()} >= {"bits", "deflate"}


def test_strided_and_differentiable_tensors(round_trip):
    weights = random_bits(torch.int32, (16, 12, 5, 5), 0.1).float()
    complex_numbers = torch.randn(4, 4, dtype=torch.complex64)
    state = {
        "channels_last": weights.to(memory_format=torch.channels_last),
        "transposed": weights[:, :, 0, 0].t(),
        "sliced": weights[::2, 1::3],
        "expanded": torch.ones(1, 3).expand(50, 3),
        "parameter": torch.nn.Parameter(weights + 0),
        "conjugate": complex_numbers.conj(),
        "negative": complex_numbers.conj().imag,
    }
    found, _, codes = round_trip(state)
    assert {"channels_last", "transposed", "sliced", "expanded", "parameter"} == codes.keys()
    assert not any(tensor.requires_grad for tensor in found.values())


def test_shared_tensors_come_back_shared(round_trip):
    coded, dense = random_bits(torch.float32, (50, 50), 0.1), torch.rand(9)
    state = {"a": coded, "b": dense, "c": coded, "d": dense, "e": dense, "f": dense.clone()}
    found, stored, _ = round_trip(state)
    assert found["a"] is found["c"] and found["b"] is found["d"] is found["e"] and found["f"] is not found["b"]
    assert not {"c", "d", "e"} & stored.keys()
    # Any reader reads dense files, so there every name has a tensor of its own.
    found, stored, _ = round_trip(state, sparse=False)
    assert stored.keys() == state.keys() == found.keys()


def test_views_of_one_memory(round_trip):
    base = torch.rand(12)
    round_trip({"whole": base, "part": base[2:], "again": base.view(3, 4), "strided": base[::2], "none": base[:0]})


def test_names_that_clash_with_parts(round_trip):
    coded, ticket = random_bits(torch.float32, (50, 50), 0.1), torch.where(seeded_signs(5, (64, 64)), -1.0, 1.0)
    for part in ("shape", "bitmask", "compressed", "gain", "signs"):
        for other in (torch.rand(3), coded.flip(0)):
            for tensor in (coded, ticket):
                _, _, codes = round_trip({"a": tensor, f"a.{part}": other}, seeds={"a": 5})
                assert "a" not in codes
                round_trip({f"a.{part}": other, "a": tensor})
    round_trip({"a": coded, "a.shape": coded.clone(), "a.shape.shape": coded.clone(), "": coded.clone()})


def test_an_empty_state(round_trip):
    assert round_trip({})[0] == {}


# ------------------------------------------------------------------------------------------------------ masks


def expected_gaps(kept):
    """The symbols of the gap code from the positions of what is kept, one by one."""
    symbols, last = [], -1
    for position in kept:
        gap = position - last - 1
        while gap >= 255:
            symbols.append(255)
            gap -= 255
        symbols.append(gap)
        last = position
    return bytes(symbols)


def test_bits_by_hand(round_trip):
    # Columns 1 and 4 are bits 2 + 16; columns 0, 3 and 4 are 1 + 8 + 16. Each row has a byte of its own.
    rows = torch.tensor([[0, 1.5, 0, 0, -2], [3, 0, 0, 4, 5]], dtype=torch.float64)
    _, stored, codes = round_trip({"a": rows.repeat(24, 1)})
    assert codes["a"] == {"code": "bitmask", "mask": "bits"}
    assert stored["a.bitmask"].tolist() == [18, 25] * 24
    assert stored["a.shape"].tolist() == [48, 5] and stored["a.compressed"].tolist() == [1.5, -2, 3, 4, 5] * 24
    rows[1, 4] = 0  # now 4 of 10 are kept, and coding the bytes wins
    _, stored, codes = round_trip({"a": rows.repeat(24, 1)})
    assert codes["a"] == {"code": "bitmask", "mask": "deflate"}
    assert list(zlib.decompress(stored["a.bitmask"].numpy().tobytes(), -15)) == [18, 9] * 24


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 300, 509, 510, 511, 2000])
def test_gaps_and_holes_by_hand(round_trip, gap):
    kept = [2, 3 + gap, 4 + gap, 5 + 2 * gap, 2999 + 2 * gap]
    symbols = expected_gaps(kept)
    by_hand = {254: [254], 255: [255, 0], 256: [255, 1], 300: [255, 45], 510: [255, 255, 0]}
    if gap in by_hand:
        assert list(symbols[: 2 + 2 * len(by_hand[gap])]) == [2, *by_hand[gap], 0, *by_hand[gap]]
    values = torch.zeros(3000 + 2 * gap, dtype=torch.float64)
    values[kept] = torch.arange(1.0, 6, dtype=torch.float64)
    _, stored, codes = round_trip({"a": values})
    assert codes["a"] == {"code": "bitmask", "mask": "gaps"}
    assert zlib.decompress(stored["a.bitmask"].numpy().tobytes(), -15) == symbols
    holes = torch.ones(len(values), dtype=torch.float64)
    holes[kept] = 0
    _, stored, codes = round_trip({"a": holes})
    assert codes["a"] == {"code": "ticket", "mask": "holes"}
    assert zlib.decompress(stored["a.bitmask"].numpy().tobytes(), -15) == symbols


def test_which_mask_code_is_chosen(round_trip):
    chosen = {}
    for percent in (0, 1, 10, 21, 23, 30, 45, 50, 55, 70, 77, 79, 90, 99, 100):
        mask = torch.rand(64, 40, 3, 3, generator=torch.Generator().manual_seed(percent)) < percent / 100
        _, _, codes = round_trip({"a": mask * 0.5})
        chosen[percent] = (codes["a"]["code"], codes["a"]["mask"])
    assert [percent for percent, (_, mask) in chosen.items() if mask == "gaps"] == [0, 1, 10, 21]
    assert [percent for percent, (_, mask) in chosen.items() if mask == "deflate"] == [23, 30, 70, 77]
    assert [percent for percent, (_, mask) in chosen.items() if mask == "bits"] == [45, 50, 55]
    assert [percent for percent, (_, mask) in chosen.items() if mask == "holes"] == [79, 90, 99, 100]
    assert [percent for percent, (code, _) in chosen.items() if code == "bitmask"] == [0]


def test_sparsity_in_steps(round_trip):
    sizes = []
    for step in range(21):
        _, stored, _ = round_trip({"a": random_bits(torch.int32, (32, 20, 3, 3), step / 20, step).float()})
        sizes.append(sum(part.nbytes for part in stored.values()))
    assert sizes == sorted(sizes) and sizes[0] < 100 and sizes[-1] == 4 * 32 * 20 * 9


@pytest.mark.parametrize("count", [2**16 + 9, 2**20 + 1, 3 * 2**20])
def test_long_runs_stay_small(round_trip, count):
    one = torch.zeros(count)
    one[3] = -1
    for tensor, limit in ((torch.zeros(count), 0), (one, 0), (torch.full((count,), 2.0), count // 8)):
        _, stored, codes = round_trip({"a": tensor})
        assert codes and sum(part.nbytes for part in stored.values()) <= limit + count / 4000 + 200


# ---------------------------------------------------------------------------------------------------- tickets


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tickets_by_hand(round_trip, dtype):
    weights = torch.zeros(20, 30, dtype=dtype)
    weights[3, 4:14] = torch.tensor([1, -1, -1, 1, 1, 1, 1, -1, 1, -1], dtype=dtype) * 0.1
    _, stored, codes = round_trip({"a": weights})
    assert codes == {"a": {"code": "ticket", "mask": "gaps"}}
    assert stored["a.gain"].tolist() == [weights[3, 4].item()] and stored["a.gain"].dtype == dtype
    assert stored["a.signs"].tolist() == [0b10000110, 0b10]  # little-endian: the second value is bit 1
    assert stored["a.shape"].tolist() == [20, 30]
    weights[19, 29] = 0.2  # one other magnitude, and it is no ticket any more
    assert round_trip({"a": weights})[2] == {"a": {"code": "bitmask", "mask": "gaps"}}


@pytest.mark.parametrize("gain", [1.0, torch.inf, 1e-45, 3e38])
def test_tickets_of_extreme_gains(round_trip, gain):
    assert round_trip({"a": torch.where(seeded_signs(1, (40, 40)), -gain, gain)})[2]["a"]["code"] == "ticket"


def test_tickets_of_one_sign(round_trip):
    mask = torch.rand(40, 40) < 0.3
    for value in (0.5, -0.5):
        _, stored, codes = round_trip({"a": torch.where(mask, value, 0.0)})
        assert codes["a"]["code"] == "ticket" and stored["a.gain"].item() == 0.5
        assert (stored["a.signs"][:-1] == (0 if value > 0 else 255)).all()


def test_integers_are_no_tickets(round_trip):
    assert round_trip({"a": (torch.rand(40, 40) < 0.3).int()})[2]["a"]["code"] == "bitmask"


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.5, 0.9, 1.0])
def test_seeds_in_place_of_signs(round_trip, kept):
    shape = (33, 17, 3, 3)
    weights = torch.where(seeded_signs(2**63 - 1, shape), -0.1, 0.1).masked_fill(torch.rand(shape) > kept, 0)
    _, with_seed, codes = round_trip({"a": weights}, seeds={"a": 2**63 - 1, "other": 3})
    packed = np.packbits(seeded_signs(2**63 - 1, shape).numpy(), bitorder="little").tobytes()
    assert codes["a"]["seed"] == 2**63 - 1 and codes["a"]["signs"] == hashlib.sha256(packed).hexdigest()[:16]
    assert with_seed.keys() == {"a.shape", "a.bitmask", "a.gain"}
    for hints in ({"a": 4}, {"b": 2**63 - 1}, None):  # no seed or a wrong one costs space, nothing else
        _, without, codes = round_trip({"a": weights}, seeds=hints)
        assert "seed" not in codes["a"] and without.keys() == with_seed.keys() | {"a.signs"}
    if kept == 1:
        weights = weights.clone()
        weights[0, 0, 0, 0] *= -1  # one sign that is not the seed's
        assert "seed" not in round_trip({"a": weights}, seeds={"a": 2**63 - 1})[2]["a"]


def philox(seed, counter):
    """Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"): four words of 64 bits."""
    low, words, key = 2**64 - 1, [counter >> 64 * i & (2**64 - 1) for i in range(4)], [seed & (2**64 - 1), seed >> 64]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [b >> 64 ^ words[1] ^ key[0], b & low, a >> 64 ^ words[3] ^ key[1], a & low]
        key = [key[0] + 0x9E3779B97F4A7C15 & low, key[1] + 0xBB67AE8584CAA73B & low]
    return words


def test_seeded_signs_are_philox():
    # The paper's known answer, so that the generator above is the paper's.
    assert [hex(word) for word in philox(0, 0)] == [
        *("0x16554d9eca36314c", "0xdb20fe9d672d0fdc", "0xd7e772cee186176b", "0x7e68b68aec7ba23b"),
    ]
    for seed in (0, 1, 42, 2**63 - 1):
        words = [word for counter in range(1, 4) for word in philox(seed, counter)]
        wanted = [word >> bit & 1 for word in words for bit in range(64)]
        found = seeded_signs(seed, (7, 100))
        assert found.dtype == torch.bool and found.shape == (7, 100)
        assert found.flatten().int().tolist() == wanted[:700]
    packed = np.packbits(seeded_signs(42, (64,)).numpy(), bitorder="little").tobytes()
    assert packed.hex() == "0e88624d7d81f8d1"  # in every version: files hold seeds
    assert seeded_signs(42, (0,)).shape == (0,) and seeded_signs(42, ()).shape == ()


def test_seeded_signs_are_fair():
    # A million fair coins: the standard deviation of their mean is 0.0005, that of a correlation 0.001.
    one, two = (seeded_signs(seed, (2**20,)).double() for seed in (1, 2))
    for signs in (one, two):
        assert abs(signs.mean().item() - 0.5) < 0.0025
        assert abs(((signs[1:] - 0.5) * (signs[:-1] - 0.5)).mean().item() * 4) < 0.005
    assert abs(((one - 0.5) * (two - 0.5)).mean().item() * 4) < 0.005


BAD_SEEDS = [-1, 2**63, 2**200, 1.0, "7", None, [1], True]


@pytest.mark.parametrize("seed", BAD_SEEDS, ids=str)
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match=r"expected an integer from 0 to 2\*\*63 - 1"):
        seeded_signs(seed, (4,))


# ------------------------------------------------------------------------------------------------------ sizes


def entropy(p):
    return -(p * math.log2(p) + (1 - p) * math.log2(1 - p))


def test_size_of_a_sparse_convolution():
    shape = (256, 128, 3, 3)
    weights = torch.randn(shape).masked_fill(torch.rand(shape) < 0.9, 0)
    stored, metadata = encode({"a": weights})
    size = sum(part.nbytes for part in stored.values()) + len(metadata[METADATA_KEY])
    assert size * 8 / weights.numel() <= 4.3


@pytest.mark.parametrize("kept", [0.02, 0.1, 0.2, 0.22, 0.3, 0.4, 0.47, 0.5, 0.6, 0.7, 0.78, 0.8, 0.9, 0.98])
def test_size_of_a_seeded_ticket(kept, tmp_path):
    # Large enough that the 4 kB do not carry it: a plain bit a weight fails for 0.02 to 0.3 and 0.7 to 0.98.
    shape = (256, 256, 3, 3)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < kept
    weights = torch.where(seeded_signs(9, shape), -0.1, 0.1).masked_fill(~mask, 0)
    stored, metadata = encode({"layer.weight": weights}, seeds={"layer.weight": 9})
    save_file(stored, tmp_path / "a.safetensors", metadata)
    bound = weights.numel() * entropy(mask.double().mean().item()) / 8
    assert (tmp_path / "a.safetensors").stat().st_size <= 1.05 * bound + 4000


def test_never_larger_than_dense():
    for dtype in CODED:
        for count in (1, 10, 100, 1000):
            for kept in (0, 0.5, 0.9, 1):
                tensor = random_bits(dtype, (count,), kept)
                stored, _ = encode({"a": tensor})
                assert sum(part.nbytes for part in stored.values()) <= tensor.nbytes


def test_equal_content_gives_equal_bytes():
    state = {f"layer.{i}": random_bits(torch.float32, (30, 30), i / 10, i) for i in range(11)}
    one, two = encode(state), encode({name: tensor.clone() for name, tensor in state.items()})
    same(one[0], two[0])
    assert one[1] == two[1]


# ---------------------------------------------------------------------------------------------- handmade files


def sealed(parts, codes, shared=None, **extra):
    """Metadata whose hash fits, computed here by the rule: whoever makes a file by hand can make its hash."""
    facts = {"version": 1, "tensors": codes, "shared": shared or {}, **extra}
    text = json.dumps(facts, sort_keys=True).encode()
    for name in sorted(parts):
        text += f"\n{name} {parts[name].dtype} {tuple(parts[name].shape)}\n".encode() + bytes(raw(parts[name]).tolist())
    return {METADATA_KEY: json.dumps({**facts, "sha256": hashlib.sha256(text).hexdigest()})}


def uint8(data):
    return torch.tensor(list(data), dtype=torch.uint8)


def deflated(data):
    coder = zlib.compressobj(wbits=-15)
    return uint8(coder.compress(bytes(data)) + coder.flush())


def bitmask(mask="bits", **parts):
    """A coded [2, 5] tensor with four values, some parts replaced, or left out where they are None."""
    packed = {"bits": uint8([18, 9]), "deflate": deflated([18, 9])}
    packed |= {"gaps": deflated([1, 2, 0, 2]), "holes": deflated([0, 1, 0, 2, 0, 1])}
    parts = {
        "shape": torch.tensor([2, 5]), "bitmask": packed.get(mask), "compressed": torch.arange(1.0, 5), **parts
    }  # fmt: skip
    return {f"a.{name}": part for name, part in parts.items() if part is not None}, {"code": "bitmask", "mask": mask}


def ticket(seed=None, digest=None, **parts):
    """A coded [2, 5] ticket with four values: gain 0.5, the second and the last are negative."""
    parts = {
        "shape": torch.tensor([2, 5]), "bitmask": uint8([18, 9]), "gain": torch.tensor([0.5]), "signs": uint8([10]),
        **parts,
    }  # fmt: skip
    facts = {"code": "ticket", "mask": "bits"}
    if seed is not None:
        facts |= {"seed": seed, "signs": digest}
        parts["signs"] = None
    return {f"a.{name}": part for name, part in parts.items() if part is not None}, facts


def test_masks_of_bool_take_a_bit_an_entry(round_trip):
    for kept in (0.0, 0.01, 0.4, 0.5, 0.99, 1.0):
        mask = torch.rand(64, 20, 20, generator=torch.Generator().manual_seed(1)) < kept
        _, stored, codes = round_trip({"a": mask})
        assert codes["a"]["code"] == "mask" and stored.keys() == {"a.shape", "a.bitmask"}
        assert stored["a.bitmask"].nbytes <= 64 * 50  # 400 bits a row
    assert not round_trip({"a": torch.ones(16, dtype=torch.bool)})[2]  # the parts would take more than it


def test_handmade_files_are_read():
    # Without this the tests below could pass on a file that is wrong in another way.
    for mask in ("bits", "deflate", "gaps", "holes"):
        parts, code = bitmask(mask)
        assert decode(parts, sealed(parts, {"a": code}))["a"].tolist() == [[0, 1, 0, 0, 2], [3, 0, 0, 4, 0]]
    parts, _ = bitmask(compressed=None)
    found = decode(parts, sealed(parts, {"a": {"code": "mask", "mask": "bits"}}))["a"]
    assert found.dtype == torch.bool and found.tolist() == [[0, 1, 0, 0, 1], [1, 0, 0, 1, 0]]
    parts, code = ticket()
    assert decode(parts, sealed(parts, {"a": code}))["a"].tolist() == [[0, 0.5, 0, 0, -0.5], [0.5, 0, 0, -0.5, 0]]
    signs = seeded_signs(3, (2, 5))
    digest = hashlib.sha256(np.packbits(signs.numpy(), bitorder="little").tobytes()).hexdigest()[:16]
    parts, code = ticket(3, digest)
    found = decode(parts, sealed(parts, {"a": code}, {"b": "a"}))
    kept = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 1, 0]])
    assert torch.equal(found["a"], torch.where(signs, -0.5, 0.5) * kept) and found["b"] is found["a"]


def test_levels_by_hand(round_trip):
    # 127 / 127 is a scale of four bits; 100 / 127 is between 12/16 and 13/16; 1e-3 / 127 is 8.26 * 2**-20.
    weight = torch.tensor([[127.0, 0.4, -0.6, 0], [100, -50, 0.3, 0.5], [1e-3, 5e-4, 0, -1e-5], [0, 0, 0, 0]])
    scale = torch.tensor([1.0, 13 / 16, 9 * 2**-20, 2**-100])
    levels = torch.tensor([[127, 0, -1, 0], [123, -62, 0, 1], [117, 58, 0, -1], [0, 0, 0, 0]], dtype=torch.int8)
    rounded = round_to_levels(weight)
    same({"a": rounded}, {"a": levels * scale[:, None]})  # without minus zeros
    found = levels_of(rounded)
    assert torch.equal(found[0], levels) and torch.equal(found[1], scale)
    assert levels_of(weight) is None and levels_of(rounded[0]) is None and levels_of(torch.zeros(0, 3)) is None
    assert round_trip({"a": rounded})[2] == {}  # names cost more than bytes here
    wide = rounded.repeat(1, 300)
    _, stored, codes = round_trip({"a": wide})
    assert codes["a"] == {"code": "levels", "levels": {"code": "bitmask", "mask": "bits"}}
    assert stored.keys() == {"a.scale", "a.levels.shape", "a.levels.bitmask", "a.levels.compressed"}
    assert sum(part.nbytes for part in stored.values()) < wide.nbytes / 4


@pytest.mark.parametrize("shape", [(64, 300), (7, 3, 3, 3), (1, 1), (40, 1), (1, 400)], ids=str)
@pytest.mark.parametrize("kept", [0.03, 0.5, 1.0])
def test_levels(round_trip, shape, kept):
    generator = torch.Generator().manual_seed(0)
    for size in (1e-20, 0.04, 1.0, 3e4):
        weight = size * torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < kept)
        rounded = round_to_levels(weight)
        peak = weight.flatten(1).abs().amax(1).view(-1, *[1] * (len(shape) - 1))
        assert ((rounded - weight).abs() <= peak / 127 * 9 / 16 * (1 + 1e-6)).all()
        assert torch.equal(round_to_levels(rounded), rounded)  # what is rounded stays
        levels, scale = levels_of(rounded)
        assert levels.dtype == torch.int8 and torch.equal(levels * scale.view(peak.shape), rounded)
        mantissa = torch.frexp(scale)[0] * 16
        assert torch.equal(mantissa, mantissa.round())
        _, stored, codes = round_trip({"a": rounded, "b": rounded.half(), "c": weight})
        if math.prod(shape) > 1000 and kept == 1:
            assert codes["a"] == {"code": "levels"} and stored["a.levels"].dtype == torch.int8 and "c" in stored
    assert round_trip({"a": rounded, "a.scale": torch.ones(1), "a.levels": torch.ones(1)})[2].get("a") is None


def test_sums_of_levels_are_exact_in_float32():
    generator = torch.Generator().manual_seed(0)
    weight = round_to_levels(torch.randn(16, 8800, generator=generator))
    spikes = (torch.rand(50, 8800, generator=generator) < 0.5).float()
    order = torch.randperm(8800, generator=generator)
    exact = spikes.double() @ weight.double().T
    assert torch.equal(spikes @ weight.T, exact.float()) and torch.equal(exact.float().double(), exact)
    assert torch.equal((spikes[:, order] @ weight[:, order].T), exact.float())


def test_levels_only_where_they_are_smallest(round_trip):
    few = torch.zeros(4096, 16)
    few[::14, 3], few[::14, 5] = 127, 100
    _, stored, codes = round_trip({"a": few})
    assert levels_of(few) is not None and codes["a"]["code"] == "bitmask"
    assert sum(part.nbytes for part in stored.values()) < 4096 * 4


def test_weights_that_have_no_levels():
    assert round_to_levels(torch.zeros(3, 0)).shape == (3, 0)
    assert round_to_levels(torch.tensor([[torch.inf, 1], [1, 2]])).isnan().any(1).tolist() == [True, False]
    for bad in ([[torch.nan, 1.0]], [[torch.inf, 1.0]], [[1.0, 1 / 3]]):
        assert levels_of(torch.tensor(bad)) is None


def levels(code=(), **parts):
    """Levels of two rows, with parts taken away (None), replaced or added."""
    stored = {"levels": torch.tensor([[127, -3, 0], [0, 5, 126]], dtype=torch.int8), "scale": torch.tensor([0.5, 2.0])}
    stored = {key: part for key, part in (stored | parts).items() if part is not None}
    return {f"a.{key}": part for key, part in stored.items()}, {"code": "levels", **dict(code)}


def test_well_formed_levels():
    parts, code = levels()
    assert decode(parts, sealed(parts, {"a": code}))["a"].tolist() == [[63.5, -1.5, 0], [0, 10, 252]]


HUGE = [torch.tensor(shape) for shape in ([2**62, 5], [2**40], [2**63 - 1] * 9, [2**17], [2] * 5000)]
MALFORMED = {
    "levels without scale": (levels(scale=None), r"a\.scale is missing"),
    "levels without levels": (levels(levels=None), r"stored in the parts \['scale'\]"),
    "levels with a shape": (levels(**{"levels.shape": torch.tensor([2, 3])}), "stored in the parts"),
    "levels of int16": (levels(levels=torch.ones(2, 3, dtype=torch.int16)), r"a\.levels is .*int16: no levels"),
    "levels of one dimension": (levels(levels=torch.ones(2, dtype=torch.int8)), r"a\.levels is \(2,\)"),
    "level -128": (levels(levels=torch.tensor([[-128, 1], [2, 3]], dtype=torch.int8)), "from -127 to 127"),
    "no columns of levels": (levels(levels=torch.ones(2, 0, dtype=torch.int8)), "no levels"),
    **{
        f"scale {value}": (levels(scale=torch.tensor([1.0, value])), "expected positive numbers")
        for value in (0.0, -1.0, torch.inf, torch.nan)
    },
    "three scales": (levels(scale=torch.ones(3)), r"a\.scale is \(3,\) .*2 rows"),
    "scales of float16": (levels(scale=torch.ones(2).half()), r"a\.scale is .*float16.*2 rows"),
    "levels in the code of tickets": (levels({"levels": {"code": "ticket", "mask": "bits"}}), "stored in the parts"),
    "levels in no code": (levels({"levels": 3}), "stored in the parts"),
    "levels in the bitmask code": (
        levels({"levels": {"code": "bitmask", "mask": "bits"}}), r"a\.levels is stored in the parts"
    ),
    "no mask": (bitmask(bitmask=None), r"parts \['compressed', 'shape'\].*\['bitmask', 'compressed', 'shape'\]"),
    "no shape": (bitmask(shape=None), "stored in the parts"),
    "no values": (bitmask(compressed=None), "stored in the parts"),
    "no part at all": (({}, {"code": "bitmask", "mask": "bits"}), r"stored in the parts \[\]"),
    "gain with values": (bitmask(gain=torch.ones(1)), "stored in the parts"),
    "signs with values": (bitmask(signs=uint8([1])), "stored in the parts"),
    "ticket without gain": (ticket(gain=None), "stored in the parts"),
    "ticket without signs": (ticket(signs=None), "stored in the parts"),
    "ticket with values": (ticket(compressed=torch.ones(4)), "stored in the parts"),
    "unknown code": ((ticket()[0], {"code": "zip", "mask": "bits"}), "code 'zip'.*Update spikezoo"),
    "no code": ((ticket()[0], {"mask": "bits"}), "code None"),
    "code of a wrong type": ((ticket()[0], {"code": ["ticket"], "mask": "bits"}), r"code \['ticket'\]"),
    "unknown mask code": ((ticket()[0], {"code": "ticket", "mask": "rle"}), "mask code 'rle'.*Update spikezoo"),
    "mask code of a wrong type": ((ticket()[0], {"code": "ticket", "mask": {}}), r"mask code \{\}"),
    "shape of floats": (bitmask(shape=torch.tensor([2.0, 5.0])), r"a\.shape is .*no shape"),
    "shape of int32": (bitmask(shape=torch.tensor([2, 5], dtype=torch.int32)), r"a\.shape is .*no shape"),
    "shape of two dimensions": (bitmask(shape=torch.tensor([[2, 5]])), r"a\.shape is .*no shape"),
    "scalar shape": (bitmask(shape=torch.tensor(10)), r"a\.shape is .*no shape"),
    "no dimensions": (bitmask(shape=torch.tensor([], dtype=torch.int64)), r"a\.shape is .*no shape"),
    "zero in the shape": (bitmask(shape=torch.tensor([2, 0])), r"a\.shape is .*no shape"),
    "negative shape": (bitmask(shape=torch.tensor([-2, -5])), r"a\.shape is .*no shape"),
    "mask of int8": (bitmask(bitmask=uint8([18, 9]).to(torch.int8)), r"a\.bitmask is .*no mask"),
    "mask of two dimensions": (bitmask(bitmask=uint8([18, 9])[None]), r"a\.bitmask is .*no mask"),
    "mask too short": (bitmask(bitmask=uint8([18])), "has 1 bytes.*needs 2"),
    "mask too long": (bitmask(bitmask=uint8([18, 9, 0])), "has 3 bytes.*needs 2"),
    "no bytes in the mask": (bitmask(bitmask=uint8([])), "has 0 bytes.*needs 2"),
    "padding set": (bitmask(bitmask=uint8([18, 9 + 32])), "padding"),
    "padding set, first row": (bitmask(bitmask=uint8([18 + 128, 9])), "padding"),
    "deflated padding set": (bitmask("deflate", bitmask=deflated([18, 41])), "padding"),
    "other shape": (bitmask(shape=torch.tensor([5, 2])), "has 2 bytes.*needs 5"),
    "deflate truncated": (bitmask("deflate", bitmask=deflated([18, 9])[:-1]), "damaged.*do not end"),
    "deflate empty": (bitmask("deflate", bitmask=uint8([])), "damaged.*do not end"),
    "deflate with more bytes": (bitmask("deflate", bitmask=uint8([*deflated([18, 9]), 0])), "damaged.*do not end"),
    "deflate twice": (bitmask("deflate", bitmask=deflated([18, 9]).repeat(2)), "damaged.*do not end"),
    "deflate of nonsense": (bitmask("deflate", bitmask=uint8([255] * 9)), "damaged .*invalid block type"),
    "deflate with zlib's header": (bitmask("deflate", bitmask=uint8(zlib.compress(b"\x12\x09"))), "damaged"),
    "deflate too short": (bitmask("deflate", bitmask=deflated([18])), "has 1 bytes.*needs 2"),
    "deflate too long": (bitmask("deflate", bitmask=deflated([18, 9, 0])), "damaged.*do not end"),
    "deflate bomb": (bitmask("deflate", bitmask=deflated(bytes(10**7))), "damaged.*do not end"),
    "gaps bomb": (bitmask("gaps", bitmask=deflated(bytes([255]) * 10**7)), "damaged.*do not end"),
    "gaps truncated": (bitmask("gaps", bitmask=deflated([1, 2, 0, 2])[:-1]), "damaged.*do not end"),
    "gaps beyond the end": (bitmask("gaps", bitmask=deflated([1, 2, 0, 4])), "beyond the 10 entries"),
    "gaps by one": (bitmask("gaps", bitmask=deflated([9, 0])), "beyond the 10 entries"),
    "gaps without an end": (bitmask("gaps", bitmask=deflated([1, 2, 0, 2, 255])), "beyond the 10 entries"),
    "holes beyond the end": (bitmask("holes", bitmask=deflated([0, 1, 0, 2, 0, 4])), "beyond the 10 entries"),
    "more gaps than entries": (bitmask("gaps", bitmask=deflated([0] * 11)), "damaged.*do not end"),
    "too few values": (bitmask(compressed=torch.ones(3)), r"a\.compressed is \(3,\).*4 bits"),
    "too many values": (bitmask(compressed=torch.ones(5)), r"a\.compressed is \(5,\).*4 bits"),
    "values of two dimensions": (bitmask(compressed=torch.ones(4, 1)), r"a\.compressed is \(4, 1\).*4 bits"),
    "values of a foreign type": (bitmask(compressed=torch.ones(4).to(torch.float8_e4m3fn)), "float8.*4 bits"),
    "complex values": (bitmask(compressed=torch.ones(4, dtype=torch.complex64)), "complex64.*4 bits"),
    "gain NaN": (ticket(gain=torch.tensor([torch.nan])), "nan.*expected one positive number"),
    "gain zero": (ticket(gain=torch.zeros(1)), "expected one positive number"),
    "gain minus zero": (ticket(gain=-torch.zeros(1)), "expected one positive number"),
    "gain negative": (ticket(gain=-torch.ones(1)), r"\[-1\.0\]: expected one positive number"),
    "two gains": (ticket(gain=torch.ones(2)), "expected one positive number"),
    "no gain": (ticket(gain=torch.ones(0)), "expected one positive number"),
    "scalar gain": (ticket(gain=torch.tensor(1.0)), "expected one positive number"),
    "gain of integers": (ticket(gain=torch.ones(1, dtype=torch.int64)), "expected one positive number"),
    "gain of float8": (ticket(gain=torch.ones(1).to(torch.float8_e5m2)), "expected one positive number"),
    "complex gain": (ticket(gain=torch.ones(1, dtype=torch.complex64)), "expected one positive number"),
    "signs too short": (ticket(signs=uint8([])), r"a\.signs is \(0,\).*4 bits"),
    "signs too long": (ticket(signs=uint8([10, 0])), r"a\.signs is \(2,\).*4 bits"),
    "signs of two dimensions": (ticket(signs=uint8([10])[None]), r"a\.signs is \(1, 1\).*4 bits"),
    "signs of bfloat16": (ticket(signs=torch.ones(1, dtype=torch.bfloat16)), r"a\.signs is .*bfloat16"),
    "signs of bool": (ticket(signs=torch.ones(1, dtype=torch.bool)), r"a\.signs is .*bool"),
    "padding of signs set": (ticket(signs=uint8([10 + 16])), "signs of a are damaged.*padding"),
    "hash of the signs differs": (ticket(3, "0" * 16), "signs that seed 3 gives for a"),
    "no hash of the signs": (ticket(3), "signs that seed 3 gives for a"),
    "hash of a wrong type": (ticket(3, ["x"]), "signs that seed 3 gives for a"),
    **{
        f"seed {seed}": ((ticket(3)[0], {**ticket(3)[1], "seed": seed}), "expected an integer from 0")
        for seed in BAD_SEEDS
    },
    **{
        f"{shape.tolist()[:3]} of {mask}": (
            bitmask(mask, shape=shape),
            "masks ask for" if len(shape) > 1 or shape[0] > 2**20 else "needs|too few|do not end",
        )
        for shape in HUGE
        for mask in ("bits", "deflate", "gaps", "holes")
        if len(shape) > 1 or shape[0] > 2**20 or mask in ("bits", "deflate")
    },
    "no mask and a huge shape": (
        bitmask("gaps", shape=torch.tensor([2**40]), bitmask=deflated([]), compressed=torch.ones(0)), "masks ask for"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tensors(case):
    (parts, code), words = MALFORMED[case]
    metadata = sealed(parts, {"a": code})
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=words) as caught:
            decode(parts, metadata)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Not a check of another kind: the hash fits, and reading stopped before it filled the memory.
    assert "sha256" not in str(caught.value) and peak < 2**20


GOOD = sealed(*(lambda parts, code: (parts, {"a": code}))(*bitmask()))[METADATA_KEY]


def facts_with(**changes):
    return json.dumps({**json.loads(GOOD), **changes})


METADATA = {
    "missing": (None, "damaged .KeyError"),
    "no JSON": ("{", "damaged .JSONDecodeError"),
    "empty": ("", "damaged .JSONDecodeError"),
    "list": ("[1, 2]", "damaged .TypeError"),
    "number": ("5", "damaged .AttributeError"),
    "string": ('"sha256"', "damaged .AttributeError"),
    "null": ("null", "damaged .AttributeError"),
    "nothing": ("{}", "damaged .KeyError"),
    "nested beyond measure": ("[" * 10**6, "damaged .RecursionError"),
    "a number beyond measure": ('{"version": ' + "9" * 10**4 + "}", "damaged .ValueError"),
    "future version": (facts_with(version=2), "format version 2; this spikezoo reads version 1. Update spikezoo"),
    "version null": (facts_with(version=None), "format version None"),
    "version list": (facts_with(version=[1]), r"format version \[1\]"),
    "other content": (facts_with(more=1), "not what was written"),
    "other hash": (facts_with(sha256="0" * 64), "not what was written"),
    "hash of a wrong type": (facts_with(sha256=None), "not what was written"),
}


@pytest.mark.parametrize("case", METADATA)
def test_malformed_metadata(case):
    text, words = METADATA[case]
    with pytest.raises(ValueError, match=words):
        decode(bitmask()[0], {} if text is None else {METADATA_KEY: text})


WRONG_TYPES = {
    "tensors list": ([], {}), "tensors null": (None, {}), "tensors number": (3, {}), "tensors string": ("a", {}),
    "code null": ({"a": None}, {}), "code list": ({"a": ["ticket"]}, {}), "code number": ({"a": 1}, {}),
    "shared list": ({}, ["a"]), "shared number": ({}, 7), "alias list": ({}, {"b": ["x"]}),
    "alias dict": ({}, {"b": {}}), "alias null": ({}, {"b": None}), "alias number": ({}, {"b": 0}),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_metadata_of_wrong_types(case):
    codes, shared = WRONG_TYPES[case]
    parts = {"x": torch.ones(1)}
    with pytest.raises(ValueError, match=r"damaged|not what was written"):
        decode(parts, sealed(parts, codes, shared))


def test_aliases_of_nothing():
    parts = {"x": torch.ones(1)}
    assert decode(parts, sealed(parts, {}, {"y": "x", "z": "y"})).keys() == {"x", "y", "z"}
    for shared in ({"y": "gone"}, {"y": "y"}, {"x": "x"}, {"y": "z", "z": "x"}, {"y": "x.shape"}):
        with pytest.raises(ValueError, match="shares the memory of"):
            decode(parts, sealed(parts, {}, shared))


def test_a_tensor_that_is_there_twice():
    parts, code = bitmask()
    parts["a"] = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="holds a twice"):
        decode(parts, sealed(parts, {"a": code}))


def test_every_byte_of_the_tensors_counts():
    parts, code = ticket()
    parts["dense"] = torch.tensor([1.0, -0.0])
    metadata = sealed(parts, {"a": code})
    decode(parts, metadata)
    for name, tensor in parts.items():
        for bit in range(8 * tensor.nbytes):
            bytes_ = raw(tensor).clone()
            bytes_[bit // 8] ^= 1 << bit % 8
            other = {**parts, name: bytes_.view(tensor.dtype).reshape(tensor.shape)}
            with pytest.raises(ValueError, match="sha256"):
                decode(other, metadata)
        for other in (tensor[None], tensor.view(torch.int8)):
            with pytest.raises(ValueError, match="sha256"):
                decode({**parts, name: other}, metadata)
        with pytest.raises(ValueError, match="sha256"):
            decode({key: value for key, value in parts.items() if key != name}, metadata)
    with pytest.raises(ValueError, match="sha256"):
        decode({**parts, "more": torch.ones(1)}, metadata)


def test_random_damage_under_a_fitting_hash():
    # Whoever fakes the hash too gets a tensor of the shape stated, or a ValueError; no other error, and no crash.
    generator = np.random.default_rng(0)
    cases = [bitmask(mask) for mask in ("bits", "deflate", "gaps", "holes")] + [ticket()]
    refused = 0
    for round_ in range(1500):
        parts, code = cases[round_ % len(cases)]
        parts = {name: tensor.clone() for name, tensor in parts.items()}
        name = str(generator.choice(sorted(parts)))
        data = raw(parts[name])
        for _ in range(generator.integers(1, 4)):
            data[int(generator.integers(len(data)))] = int(generator.integers(256))
        parts[name] = data.view(parts[name].dtype)
        try:
            found = decode(parts, sealed(parts, {"a": code}))["a"]
        except ValueError:
            refused += 1
        else:
            assert list(found.shape) == parts["a.shape"].tolist()
    assert 300 < refused < 1400


def test_parts_are_those_that_the_module_names():
    # A part of a new code has to be kept apart from the user's names, too.
    assert set(sparse._PARTS) == {"shape", "bitmask", "compressed", "gain", "signs"}
