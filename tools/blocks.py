"""Write the Python blocks of README.md, CONTRIBUTING.md and docs/ as modules into a folder, for the type checker.

python -m tools.blocks FOLDER && mypy --allow-untyped-defs FOLDER/*.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["PAGES", "Block", "python_blocks"]

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- needs: ([^>]*) -->\n)?^```python\n(.*?)^```", re.M | re.S)
# What a reader of a page has at hand, where the block does not make it.
_GIVEN = {
    "images": "images: torch.Tensor",
    "loader": "loader: typing.Any",
    "model": 'model = spikezoo.create_model("mpbn_resnet20")',
}


class Block(NamedTuple):
    """A block of Python: where it stands, what it needs to be run ('' where nothing), its text."""

    page: Path
    line: int
    needs: str
    text: str


def python_blocks(page: Path) -> Iterator[Block]:
    """The Python blocks of a page.

    Args:
        page: A file of Markdown.
    """
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        yield Block(page, text[: match.start(2)].count("\n") + 1, match[1] or "", match[2])


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
        for block in python_blocks(page):
            name = f"{page.stem.lower()}_line_{block.line}.py"
            (folder / name).write_text(module(block), encoding="utf-8")


if __name__ == "__main__":
    main()
