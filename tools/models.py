"""The README's table of models, from the registry: ``python -m tools.models`` writes it between its two marks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import spikezoo

README = Path(__file__).resolve().parent.parent / "README.md"
MARKS = ("<!-- models -->\n", "<!-- /models -->\n")
HEAD = "| name | parameters | MACs a step | T | paper | weights |\n|---|---|---|---|---|---|\n"


def macs_step(name: str) -> int:
    """Dense MACs of one time step of an image, on the meta device."""
    model = spikezoo.create_model(name, device="meta").eval()
    x = torch.empty(1, *model.input_shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.forward_frames(*((x.transpose(0, 1)[:1], 1) if x.dim() == 5 else (x[None], 1)))
    head = model.head.fc.weight.numel() if model.num_classes else 0
    return counter.get_total_flops() // 2 + head


def row(name: str) -> str:
    """One line of the table."""
    info = spikezoo.model_info(name)
    paper, _, rest = info.paper.rpartition(" (arXiv:")
    linked = f"[{paper}](https://arxiv.org/abs/{rest.rstrip(')')})" if paper else info.paper
    weights = ", ".join(f"`{full.partition('.')[2]}`" for full in info.pretrained)
    macs = f"{macs_step(name) / 1e6:,.1f} M"
    return f"| `{name}` | {info.parameters:,} | {macs} | {info.T} | {linked} | {weights} |\n"


def names() -> list[str]:
    """Models of the table."""
    return [name for name in spikezoo.list_models() if not name.startswith("test_")]


if __name__ == "__main__":
    before, mark, rest = README.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    table = HEAD + "".join(map(row, names()))
    README.write_text(before + mark + "\n" + table + "\n" + MARKS[1] + after, encoding="utf-8")
    print(f"Wrote {len(names())} rows to {README.name}.")
