"""The model card of a checkpoint: README.md with its model index, and ``.eval_results/``."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from spikezoo._version import __version__
from spikezoo.checkpoint import WEIGHTS_NAME, Config, atomic
from spikezoo.factory import model_info
from spikezoo.saving import FIGURES

__all__ = ["write_card"]

# Names of our datasets on the Hub; others are named as they are, without a link.
_HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "imagenet": "ILSVRC/imagenet-1k",
}

_CARD = """---
{{ card_data }}
---

# {{ title }}

{{ note }}

{{ figures }}

## Load it

```python
import spikezoo

model = spikezoo.create_model("{{ load }}", pretrained=True).eval()
```

{{ reading }}

## What it is

{{ facts }}

{{ pictures }}
## Licence and source

{{ licence }} Layout: {{ paper }}. Made with spikezoo {{ version }}.
"""


def _table(rows: list[tuple[str, str]]) -> str:
    """A table of Markdown; what is in a cell ends neither the cell nor its row."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


def _literal(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _split(config: Config) -> str:
    return f", {config.split} split" if config.split else ""


def _facts(config: Config, weights: Path) -> list[tuple[str, str]]:
    """What a checkpoint is, row by row."""
    return [
        ("Architecture", f"`{config.architecture}`"),
        ("Arguments", f"`{_literal(config.model_args)}`"),
        ("Transforms applied, in order", f"`{_literal(config.recipe)}`" if config.recipe else "none"),
        ("Time steps T", str(config.model_args.get("T"))),
        ("Parameters", f"{config.parameters:,}"),
        ("Sparsity (zeros among all stored numbers)", f"{100 * (config.sparsity or 0):.2f} %"),
        ("Dataset", f"{config.dataset}{_split(config)}" if config.dataset else "not said"),
        ("Weights file", f"{weights.stat().st_size:,} bytes, {config.form}"),
        ("sha256", f"`{config.sha256[weights.name]}`"),
    ]


def _reading(config: Config, load: str) -> str:
    """Who can read the weights."""
    if config.form != "dense":
        return (
            "The tensors are stored in spikezoo's sparse code: without the model, "
            "`spikezoo.load_sparse_file('model.safetensors')` gives them as a state dict."
        )
    if config.recipe:
        return "The weights are dense and belong to a transformed model, which timm cannot make."
    return (
        f"The weights are dense: after `import spikezoo` `timm.create_model('{load}', pretrained=True)` reads them, "
        "too."
    )


def write_card(folder: str | Path, repo_id: str, *, license: str = "apache-2.0") -> Path:
    """Write the model card of a checkpoint: README.md with its model index, and ``.eval_results/``.

    Every figure is from the checkpoint's config.json; what was not measured is not in the card.

    Args:
        folder: A folder that :func:`save_checkpoint` wrote; its pictures (*.png) are shown.
        repo_id: Repository that the card is for, or 'architecture.tag' of weights that come with the package.
        license: Licence of the weights.

    Returns:
        The card's path.
    """
    folder, published = Path(folder), "/" in repo_id
    config = Config.read(folder)
    if not config.version:
        raise ValueError(f"{folder} is no checkpoint of spikezoo.save_checkpoint, which a card could describe.")
    name, results, dataset = config.architecture, config.results, config.dataset
    info = model_info(name)
    load = f"hf-hub:{repo_id}" if published else repo_id
    measured = [(title, form.format(results[key])) for key, title, form in FIGURES if results.get(key) is not None]
    hub_dataset = _HUB_DATASETS.get(str(dataset))
    metrics = [EvalResult(
        task_type="image-classification", dataset_type=hub_dataset or str(dataset), dataset_name=str(dataset),
        dataset_split=config.split, metric_type="accuracy", metric_name="top-1", metric_value=results["top1"],
    )] if dataset and results.get("top1") is not None else None  # fmt: skip
    data = ModelCardData(
        license=license,
        library_name="spikezoo",
        pipeline_tag="image-classification",
        tags=["spikezoo", "spiking-neural-network", "snn", "pytorch", "image-classification", name],
        datasets=[hub_dataset] if hub_dataset else None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=metrics,
    )
    card = ModelCard.from_template(
        data,
        template_str=_CARD,
        title=f"{name}, {dataset}" if dataset else name,
        note=f"A spiking neural network. {info.note}",
        figures=_table(measured) if measured else "Nothing was measured of these weights yet.",
        load=load,
        reading=_reading(config, load),
        facts=_table(_facts(config, folder / WEIGHTS_NAME)),
        pictures="".join(f"![{picture.stem}]({picture.name})\n\n" for picture in sorted(folder.glob("*.png"))),
        licence=f"Weights: {license}.",
        paper=info.paper,
        version=config.spikezoo_version or __version__,
    )
    with atomic(folder / "README.md") as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    if metrics and hub_dataset and published:
        entry = EvalResultEntry(
            dataset_id=hub_dataset,
            task_id="image_classification",
            value=results["top1"],
            date=str(results["date"]).partition(" ")[0] if results.get("date") else None,
            notes=f"top-1 in per cent, T={config.model_args.get('T')}{_split(config)}",
        )
        with atomic(folder / ".eval_results" / f"{dataset}.yaml") as temporary:
            text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
            temporary.write_text(text, encoding="utf-8")
    return folder / "README.md"
