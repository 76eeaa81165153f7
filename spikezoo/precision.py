"""Which number formats this machine computes fast in."""

from __future__ import annotations

import torch

__all__ = ["fast_bfloat16", "slow_bfloat16"]


def fast_bfloat16(device: str | torch.device = "cpu") -> bool:
    """Whether bfloat16 is faster than float32 on a device: by its instructions.

    Convolutions in bfloat16 are two to ten times as fast with AVX512-bf16 or AMX, and seven times slower without.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def slow_bfloat16(device: str | torch.device) -> str:
    """What to say where bfloat16 was asked for on a device that is slow in it, '' where it is not.

    Args:
        device: Where to compute.
    """
    if fast_bfloat16(device):
        return ""
    kind = torch.device(device).type
    return f"Warning: bfloat16 is several times slower than float32 on this {kind}. Leave --amp out."
