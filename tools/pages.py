"""Hooks of mkdocs.yml: pages of README, CONTRIBUTING, the examples and the public names; links made to fit."""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
# Pages that do not lie in docs/.
_MADE = {
    "README.md": "docs/index.md",
    "CONTRIBUTING.md": "docs/contributing.md",
    "examples/README.md": "docs/examples.md",
}
# Public names that stand below the top level.
_MORE = {
    "Models": ["spikezoo.models.SpikingModel", "spikezoo.registry.ModelRow", "spikezoo.registry.register_rows"],
    "Transforms": [
        "spikezoo.transforms.record",
        "spikezoo.transforms.ticket",
        "spikezoo.transforms.tune",
        "spikezoo.transforms.release",
        "spikezoo.transforms.multisp",
        "spikezoo.transforms.dynsnn",
        "spikezoo.transforms.pruning.prune",
    ],
    "Neurons": ["spikezoo.neurons"],
    "Data": ["spikezoo.data.create_loader", "spikezoo.data.options.LoaderOptions", "spikezoo.data.dataset_info"],
    "Search": ["spikezoo.search.exact", "spikezoo.search.evolve", "spikezoo.search.score", "spikezoo.search.Space"],
    "Pictures": ["spikezoo.pictures"],
}


def _linked(text: str, page: str) -> str:
    """Markdown of a page at a place in the repository, with links that fit the site; others become plain words."""

    def fit(match: re.Match[str]) -> str:
        image, words, target = match.groups()
        if re.match(r"\w+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        place = _MADE.get(place, place)
        if script := re.fullmatch(r"examples/(\w+)\.py", place):
            place, anchor = "docs/examples.md", script[1]
        if place in _MADE.values() or (place.startswith("docs/") and (ROOT / place).is_file()):
            return f"{image}[{words}]({place.removeprefix('docs/')}{'#' * bool(anchor)}{anchor})"
        return words

    return _LINK.sub(fit, text)


def _api() -> str:
    """The page of the public names: one directive each."""
    tree = ast.parse((ROOT / "spikezoo" / "__init__.py").read_text(encoding="utf-8"))
    names = [
        f"{node.module}.{alias.name}" + f".{alias.name}" * (alias.name == "compact")  # its module has the same name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module not in ("spikezoo", "spikezoo._version")
        for alias in node.names
    ]
    first = ("spikezoo.factory", "spikezoo.registry", "spikezoo.saving", "spikezoo.observe", "spikezoo.counting")
    names.sort(key=lambda name: not name.startswith(first))
    parts = {"spikezoo": names, **_MORE}
    return "# API\n\n" + "\n".join(
        f"## {title}\n\n" + "".join(f"::: {name}\n\n" for name in listed) for title, listed in parts.items()
    )


def _scripts(text: str) -> str:
    """The examples that a text links, from top to bottom, each below a heading that links find."""
    scripts = [ROOT / "examples" / f"{name}.py" for name in re.findall(r"\(examples\.md#(\w+)\)", text)]
    return "".join(
        f"\n## {path.name} {{#{path.stem}}}\n\n```python\n{path.read_text(encoding='utf-8')}```\n" for path in scripts
    )


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that do not lie in docs/."""
    from mkdocs.structure.files import File

    for source, place in _MADE.items():
        text = _linked((ROOT / source).read_text(encoding="utf-8"), source)
        text += _scripts(text) if source.startswith("examples/") else ""
        files.append(File.generated(config, place.removeprefix("docs/"), content=text))
    files.append(File.generated(config, "api.md", content=_api()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fit the links of the pages in docs/."""
    place = f"docs/{page.file.src_uri}"
    return markdown if place in (*_MADE.values(), "docs/api.md") else _linked(markdown, place)
