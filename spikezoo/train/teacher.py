"""A teacher for distillation, and the cache of its logits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spikezoo.checkpoint import atomic, load_state, save_state
from spikezoo.data import ArrayLoader, Loader

__all__ = ["TeacherCache", "weights_digest"]

# Options of a loader that make a view what it is.
_VIEW = (
    *("seed", "img_size", "in_chans", "subset", "holdout", "held_out"),
    *("hflip", "alternating_flip", "crop_padding", "translate", "cutout", "roll"),
)


def weights_digest(model: nn.Module) -> str:
    """Hash of the names and values of a model's state."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


class TeacherCache:
    """Logits of a teacher for all views of a training set, computed once and stored in a folder.

    A view is one augmentation of every sample, see ``views`` of :class:`spikezoo.data.LoaderOptions`. The teacher sees
    it at full size, whatever size the student is shown, and costs a training nothing once its views are stored.

    Args:
        folder: Where the logits are: ``views.json`` says of what, ``view-000.safetensors`` and so on hold them.
        loader: The training loader, with views.
        teach: Gives logits ``[B, K]`` of images ``[B, C, H, W]`` as the loader makes them.
        facts: What else the logits depend on: the teacher's hash, its normalisation, the number format.

    Raises:
        ValueError: A loader that cannot repeat a view, or a folder with logits of something else.
    """

    def __init__(
        self, folder: str | Path, loader: Loader, teach: Callable[[Tensor], Tensor], facts: Mapping[str, Any]
    ) -> None:
        if not isinstance(loader, ArrayLoader) or not loader.options.views:
            raise ValueError(
                "--teacher-cache stores the logits of views that come again, of data held in memory: add --views 8, "
                "and take a dataset such as cifar10 or npz:PATH."
            )
        self.folder, self.loader, self.teach = Path(folder), loader, teach
        self.facts = {
            **facts,
            "data": loader.digest(),
            **{name: getattr(loader.options, name) for name in _VIEW},
            "mean": list(loader.info.mean),
            "std": list(loader.info.std),
        }
        self.place = torch.full((int(loader.samples.max()) + 1,), -1)
        self.place[loader.samples] = torch.arange(loader.num_samples)
        self.logits: dict[int, Tensor] = {}
        self.check()

    def check(self) -> None:
        """Raise where the folder holds logits of something else."""
        path = self.folder / "views.json"
        if not path.is_file():
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--teacher-cache: {path} is damaged ({error}). Give another folder.") from error
        theirs = stored if isinstance(stored, dict) else {}
        differing = [key for key in self.facts | theirs if self.facts.get(key) != theirs.get(key)]
        if differing:
            told = "; ".join(f"{key} {theirs.get(key)!r}, here {self.facts.get(key)!r}" for key in differing[:3])
            raise ValueError(
                f"--teacher-cache {self.folder} holds logits of another teacher, data set or augmentation ({told}). "
                "Give another folder, or the same flags; nothing was overwritten."
            )

    def fill(self, views: int, device: torch.device, progress: bool = False) -> None:
        """Compute and store the views from 0 to ``views`` that are not stored yet, and hold all in memory."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic(self.folder / "views.json") as temporary:
            temporary.write_text(json.dumps(self.facts, indent=2) + "\n", encoding="utf-8")
        for view in range(views):
            path = self.folder / f"view-{view:03d}.safetensors"
            logits = self._stored(path, view)
            if logits is None:
                logits = self._compute(view, progress)
                save_state(path, {"logits": logits, "of": self._of(view)})
            self.logits[view] = logits.to(device)
            if self.logits[view].shape[0] != self.loader.num_samples:
                raise ValueError(f"{path} has {len(self.logits[view])} rows, not {self.loader.num_samples}: delete it.")

    def _of(self, view: int) -> str:
        """What a file's logits are of; a view that was copied or renamed is another."""
        return hashlib.sha256(json.dumps([view, self.facts], sort_keys=True).encode()).hexdigest()

    def _stored(self, path: Path, view: int) -> Tensor | None:
        """The logits of a view; None where they are to be computed, as nothing intact is there."""
        if not path.is_file():
            return None
        try:
            content = load_state(path)
        except ValueError:
            print(f"{path} is damaged; its logits are computed anew.", flush=True)
            return None
        if content.get("of", self._of(view)) != self._of(view):  # those of older versions do not say it
            print(f"{path} is not of view {view}; its logits are computed anew.", flush=True)
            return None
        logits: Tensor = content["logits"]
        return logits

    def _compute(self, view: int, progress: bool) -> Tensor:
        numbers, size = self.loader.samples, min(self.loader.options.batch_size, self.loader.num_samples)
        found: list[Tensor] = []
        last = len(numbers) - size  # the last batch reaches back, since a shorter one would be compiled anew
        for start in tqdm(range(0, len(numbers), size), desc=f"teacher, view {view}", disable=not progress):
            images = self.loader.load(numbers[min(start, last) :][:size], view)
            if self.loader.options.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            found.append(self.teach(images)[max(start - last, 0) :].half().cpu())
        return torch.cat(found)

    def __call__(self, epoch: int, batch: int) -> Tensor:
        """Logits ``[B, K]`` of a batch of an epoch."""
        view = epoch % (self.loader.options.views or 1)
        return self.logits[view][self.place[self.loader.numbers(epoch, batch)].to(self.logits[view].device)]
