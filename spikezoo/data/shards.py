"""WebDataset shards: tar files of images with their labels beside them, read by number instead of as a stream.

A stream can only be gone on with from its start. So the shards are indexed once, by their headers, and every sample is
then read from its place: the order, the shares of the ranks and a run that goes on in mid-epoch are those of all data.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from timm.data.readers.reader import Reader

from spikezoo.data.info import natural

__all__ = ["Shards", "find_shards"]

_PARTS = {"train": ("train",), "test": ("test", "val")}
_LABELS = (".cls", ".json")
# The word of a split in a name: the latest-train-0.tar of a dataset called latest is no test set.
_SPLIT = re.compile(r"(?<![a-z])(train|test|val)(?:val|ing|id|idation)?(?![a-z])")


class _Sample(NamedTuple):
    """Where an image lies: the number of its shard, its first byte there, its size; its name and its label."""

    shard: int
    offset: int
    size: int
    name: str
    label: int


def find_shards(name: str, split: str, root: Path) -> list[str]:
    """The tar files of a split, in natural order.

    Args:
        name: ``wds/NAME``.
        split: ``train`` or ``test``, which takes what is called test, else what is called val.
        root: The folder of the data; shards lie in it or in its folder NAME, under names that tell the split, or in a
            folder of its name.

    Raises:
        FileNotFoundError: There are none.
        ValueError: There are those of several datasets.
    """
    own = root / name.partition("/")[2]
    for part in _PARTS[split]:
        for place in (own, root):
            found = [path for path in place.glob("*.tar") if _told(path.name)[1] == part]
            datasets = {_told(path.name)[0] for path in found}
            found += [path for folder in place.glob(f"{part}*/") if _told(folder.name) == ("", part)
                      for path in folder.glob("*.tar")]  # fmt: skip
            if len(datasets) > 1:
                raise ValueError(
                    f"{name}: {place} has shards of several datasets ({', '.join(sorted(datasets)[:3])}): put those "
                    f"that are meant into a folder of their own, {own}."
                )
            if found:
                return sorted(map(str, found), key=natural)
    raise FileNotFoundError(
        f"{name}: looked in {own} and {root} for shards such as {split}-000000.tar or {split}/000000.tar and found "
        "none; type --data-dir FOLDER. Addresses are not read: fetch them first."
    )


def _told(name: str) -> tuple[str, str]:
    """What stands in front of the last word of a split in a name, and the split: train, test, val, or ''."""
    words = [*_SPLIT.finditer(name.lower())]
    return (name[: words[-1].start()], words[-1][1]) if words else (name, "")


def _label(kind: str, content: bytes, where: str) -> int:
    try:
        value = int(content) if kind == ".cls" else json.loads(content)["label"]
        if isinstance(value, bool) or int(value) != value or value < 0:
            raise ValueError
        return int(value)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise ValueError(
            f"the label {where} is {content[:40]!r}: expected the number of a class, from 0"
            f"{'' if kind == '.cls' else ', under label'}"
        ) from None


def _index(number: int, path: str, kinds: Sequence[str]) -> Iterator[_Sample]:
    """The samples of a shard: what shares a name up to the first dot of its file is one."""
    with tarfile.open(path, "r:") as archive:
        image: tuple[int, int, str] | None = None
        label: int | None = None
        last = ""

        def done() -> Iterator[_Sample]:
            if image is not None and label is None:
                raise ValueError(f"{image[2]} has no label beside it ({' or '.join(_LABELS)})")
            if image is not None and label is not None:
                yield _Sample(number, *image, label)

        for member in archive:
            if not member.isfile():
                continue
            folder, file = os.path.split(member.name)
            stem, dot, rest = file.partition(".")
            key, kind = os.path.join(folder, stem), f"{dot}{rest}".lower()
            if key != last:
                yield from done()
                image, label, last = None, None, key
            if kind in kinds:
                image = member.offset_data, member.size, member.name
            elif kind in _LABELS and (label is None or kind == ".cls"):
                content = archive.extractfile(member)
                assert content is not None
                label = _label(kind, content.read(), member.name)
        yield from done()


class Shards(Reader):
    """Images of tar files by number, as timm's readers hand them out.

    Args:
        paths: The shards.
        kinds: Suffixes of images.

    Raises:
        ValueError: A shard that is damaged, packed or holds no images; an image without label.
    """

    def __init__(self, paths: Sequence[str], kinds: Sequence[str]) -> None:
        self.paths, self.samples = list(paths), list[_Sample]()
        for number, path in enumerate(self.paths):
            before = len(self.samples)
            try:
                self.samples += _index(number, path, kinds)
                if len(self.samples) == before:
                    raise ValueError(f"it holds no images; known are {', '.join(kinds)}")
            except (tarfile.TarError, OSError, ValueError) as error:
                raise ValueError(
                    f"the shard {path} cannot be read ({error}); it must be a tar file, not packed"
                ) from error

    @property
    def labels(self) -> list[int]:
        """The class of every sample."""
        return [sample.label for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        sample = self.samples[index]
        with open(self.paths[sample.shard], "rb") as file:
            file.seek(sample.offset)
            return io.BytesIO(file.read(sample.size)), sample.label

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        sample = self.samples[index]
        return f"{self.paths[sample.shard]}:{sample.name}"
