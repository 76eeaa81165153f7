"""Tables of nets, written between their marks: all models in docs/models.md, the best trained ones in the README.

``python -m tools.models`` reads the registry and ``docs/results.csv``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import spikezoo
from spikezoo.pictures import pareto_front
from tools.results import read_claims, read_rows

ROOT = Path(__file__).resolve().parent.parent
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


def best_rows() -> list[str]:
    """Lines of the trained nets that none beats in accuracy and energy on their dataset, by accuracy."""
    papers, _ = read_claims(ROOT / "docs" / "claims.yaml")
    by_data: dict[str, list[dict[str, str]]] = {}
    for found in read_rows(ROOT / "docs" / "results.csv"):
        by_data.setdefault(found["dataset"].rpartition(":")[2], []).append(found)
    lines = []
    for dataset, rows in by_data.items():
        points = {(float(row["energy_exact_mj"]), float(row["top1"])): row for row in rows}
        for point in reversed(pareto_front(list(points))):
            net = points[point]
            paper = papers.get(net["model"], {}).get("top1", "")
            card = f"[`{net['model']}`](spikezoo/weights/{net['model']}/README.md)"
            size = f"{int(net['bytes']) / 1e6:.2f}"
            lines.append(f"| {card} | {dataset} | {net['T']} | {point[1]:.2f} | {paper} | {size} | {point[0]:.3g} |\n")
    return lines


BEST = "| net | data | T | top-1, % | the paper's | MB | mJ an image |\n|---|---|---|---|---|---|---|\n"


def write(path: Path, mark: str, table: str) -> None:
    """Put a table between two marks of a file."""
    before, start, rest = path.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->\n")
    if not start or not end:
        raise ValueError(f"{path} has no marks <!-- {mark} --> and <!-- /{mark} -->.")
    path.write_text(f"{before}{start}\n{table}\n{end}{after}", encoding="utf-8")
    print(f"Wrote the table of {mark} in {path.name}.")


if __name__ == "__main__":
    write(ROOT / "docs" / "models.md", "models", HEAD + "".join(map(row, names())))
    write(ROOT / "README.md", "best", BEST + "".join(best_rows()))
