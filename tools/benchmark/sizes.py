"""Files: the same weights dense, as bitmask and as ticket, against the entropy of the mask."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import spikezoo
from spikezoo.checkpoint import sparse, write_checkpoint
from spikezoo.evaluate import environment
from tools.benchmark.settings import SPARSITIES, Row, Settings


def _entropy(p: float) -> float:
    """Bits that a mask needs per weight where a fraction p of it is set at random."""
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q)


def size_rows(settings: Settings) -> list[Row]:
    """Store the convolutions and linear layers of a net in every code and compare with the entropy of their masks."""
    model = spikezoo.create_model(
        settings.model, T=settings.T, img_size=settings.img_size, num_classes=settings.num_classes
    )
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    shapes = {f"{index}.weight": tuple(layer.weight.shape) for index, layer in enumerate(layers)}
    total = sum(math.prod(shape) for shape in shapes.values())
    generator = torch.Generator().manual_seed(0)
    facts = environment()
    rows: list[Row] = []

    def store(code: str, sparsity: float, bound: float, state: dict[str, Tensor], seeds: dict[str, int]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            write_s, read_s = [], []
            for _ in range(settings.repeats):
                start = time.perf_counter()
                stored, metadata = sparse.encode(state, seeds=seeds)
                write_s.append(time.perf_counter() - start)
                start = time.perf_counter()
                back = sparse.decode(stored, metadata)
                read_s.append(time.perf_counter() - start)
            if any(not torch.equal(back[name], tensor) for name, tensor in state.items()):
                raise RuntimeError(f"{settings.model}: the {code} code at sparsity {sparsity} is not exact.")
            write_checkpoint(folder, state, {"spikezoo": {}}, seeds=seeds)
            bits = 8 * path.stat().st_size / total
        rows.append(
            {
                "model": settings.model, "code": code, "sparsity": sparsity, "weights": total,
                "bytes": round(bits * total / 8), "bits_per_weight": round(bits, 4), "bound": round(bound, 4),
                "over_bound": round(bits / bound, 4), "encode_mb_s": round(4e-6 * total / median(write_s)),
                "decode_mb_s": round(4e-6 * total / median(read_s)), "repeats": settings.repeats, **facts,
            }
        )  # fmt: skip

    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    store("dense", 0.0, 32.0, values, {})
    for sparsity in SPARSITIES:
        masks = {name: torch.rand(shape, generator=generator) >= sparsity for name, shape in shapes.items()}
        kept = sum(int(mask.sum()) for mask in masks.values()) / total
        mask_bits = _entropy(kept)
        zero = torch.zeros(())
        store(
            "bitmask",
            sparsity,
            mask_bits + 32 * kept,
            {n: torch.where(masks[n], v, zero) for n, v in values.items()},
            {},
        )
        seeds = {name: index for index, name in enumerate(shapes)}
        for code, given_seeds in (("ticket", {}), ("ticket, signs from a seed", seeds)):
            tickets = {}
            for name, shape in shapes.items():
                signs = torch.where(sparse.seeded_signs(seeds[name], shape), -0.05, 0.05)
                tickets[name] = torch.where(masks[name], signs, zero)
            store(code, sparsity, mask_bits + (0 if given_seeds else kept), tickets, given_seeds)
    return rows


def size_markdown(rows: Sequence[Row]) -> str:
    """The rows of the mode ``size`` as a table for people."""
    first = rows[0]
    lines = [
        f"{first['model']}: {first['weights']:,} weights of convolutions and linear layers, random masks",
        "",
        "| code | removed | bytes | bits a weight | entropy bound | ratio | encode MB/s | decode MB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['code']} | {r['sparsity']:.0%} | {r['bytes']:,} | {r['bits_per_weight']:.3f} | {r['bound']:.3f} | "
        f"{r['over_bound']:.3f} | {r['encode_mb_s']:,} | {r['decode_mb_s']:,} |"
        for r in rows
    ]
    return "\n".join([*lines, "", f"- commit {first['commit']}, {first['date']}, {first['machine']}"])
