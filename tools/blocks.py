"""The blocks of README.md, CONTRIBUTING.md, docs/ ...; those of Python as modules in a folder, for the type checker.

python -m tools.blocks FOLDER && mypy --allow-untyped-defs FOLDER/*.py
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["PAGES", "Block", "blocks", "module", "outside"]

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# A block may stand in a list, and below a paragraph that says what it needs or in which file it belongs.
_BLOCK = re.compile(
    r"(?:^ *(?P<mark>Needs|File): (?P<said>(?:\S.*\n)(?: *\S.*\n)*) *\n)?(?: *<!--.*-->\n)?"
    r"^(?P<indent> *)```(?P<language>.*)\n(?P<text>[\s\S]*?)^(?P=indent)```$",
    re.M,
)
# What a reader of a page has at hand, where the block does not make it.
_GIVEN = {
    "images": "images: torch.Tensor",
    "loader": "loader: typing.Any",
    "model": 'model = spikezoo.create_model("mpbn_resnet20")',
}


class Block(NamedTuple):
    """A block of a page: where it stands, its language, the file that it is, what it needs to be run ('' for none)."""

    page: Path
    line: int
    language: str
    file: str
    needs: str
    text: str


def blocks(page: Path, language: str | None = None) -> Iterator[Block]:
    """The fenced blocks of a page.

    Args:
        page: A file of Markdown.
        language: What stands behind the fence; None takes all.
    """
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        said = " ".join((match["said"] or "").split())
        marks = (said.strip("`."), "") if match["mark"] == "File" else ("", said)
        if language in (None, match["language"]):
            start = text[: match.start("text")].count("\n") + 1
            yield Block(page, start, match["language"], *marks, textwrap.dedent(match["text"]))


def outside(page: Path) -> str:
    """The text of a page without its blocks, line for line."""
    return _BLOCK.sub(lambda match: "\n" * match[0].count("\n"), page.read_text(encoding="utf-8"))


def module(block: Block) -> str:
    """The block as a module that a type checker understands.

    Args:
        block: The block.
    """
    given = [
        line
        for name, line in _GIVEN.items()
        if re.search(rf"\b{name}\b", block.text) and not re.search(rf"^(\w+, )*{name}(, \w+)* =", block.text, re.M)
    ]
    return "\n".join(["import typing", "import torch", "import spikezoo", *given, block.text])


def main() -> None:
    """Write the modules."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for page in PAGES:
        for block in blocks(page, "python"):
            name = f"{page.stem.lower()}_line_{block.line}.py"
            (folder / name).write_text(module(block), encoding="utf-8")


if __name__ == "__main__":
    main()
