"""YAML files as people write them: found by name, read as UTF-8, without the readings of YAML that surprise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from spikezoo.checks import nearest

__all__ = ["find_config", "read_yaml"]

# In a wheel the configs lie in the package, in a checkout beside it.
_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")


class _Loader(yaml.SafeLoader):
    """Of a key that stands twice the last would win, 1:30 would be 90 and 010 would be 8: all three are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            line = key.start_mark.line + 1
            if name is not None and name in seen:
                raise ValueError(f"line {line}: key {name!r} stands in line {seen[name]} already. Leave one out.")
            seen[name] = line
        return super().construct_mapping(node, deep)

    def number(self, node: yaml.ScalarNode) -> Any:
        """A number, unless YAML's own reading of it is none that is meant."""
        text = self.construct_scalar(node)
        if ":" in text or re.fullmatch("[-+]?0[0-9_]+", text):
            kind = "a number in base 60" if ":" in text else "an octal number"
            other = ", or a space behind the colon of a mapping {16: 0.5}" if ":" in text else ", or quote it"
            raise ValueError(
                f"line {node.start_mark.line + 1}: YAML reads {text} as {kind}. Write a plain number{other}."
            )
        make = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
        return make(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.number)


def find_config(name: str | Path, kind: str = "config") -> Path:
    """The file of a config or plan: a path, or the name of one that comes with the package.

    Args:
        name: A path, ``quickstart`` or ``tickets/sparsity``; ``configs/`` before and ``.yaml`` behind may stand there.
        kind: What an error calls it.

    Raises:
        FileNotFoundError: No such file; the message names the nearest.
    """
    path = Path(name)
    if path.is_file():
        return path
    wanted = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    known = {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for folder in _FOLDERS
        for file in sorted(folder.rglob("*.yaml"))
    }
    found = [file for key, file in known.items() if wanted in (key, key.rpartition("/")[2])]
    if len(found) != 1:
        several = [key for key, file in known.items() if file in found]
        hint = f"It could be {' or '.join(several)}." if several else nearest(wanted, known)
        raise FileNotFoundError(
            f"No {kind} at {path}. The configs and plans that come with spikezoo are in configs/. {hint}"
        )
    return found[0]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No YAML or UTF-8, no mapping, a key that stands twice, a number that YAML reads as another.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error
    content = {} if content is None else content  # an empty file
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected 'key: value' lines.")
    return content
