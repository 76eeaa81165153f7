"""Publish checkpoints on the Hugging Face Hub: weights, config.json, model card, results and pictures."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from torch import nn

from spikezoo import registry
from spikezoo._version import __version__
from spikezoo.checkpoint import CONFIG_NAME, WEIGHTS_NAME, Config, copy_checkpoint, find_weights
from spikezoo.factory import create_model, locate
from spikezoo.hub.card import write_card
from spikezoo.hub.client import ask, check_repo_id, explained
from spikezoo.saving import plain_results, save_checkpoint

__all__ = ["push_all", "push_folder", "push_to_hub"]


def push_folder(
    checkpoint: str | Path,
    repo_id: str,
    *,
    results: Mapping[str, Any] | None = None,
    private: bool = False,
    revision: str | None = None,
    license: str = "apache-2.0",
    dry_run: str | Path | None = None,
) -> str:
    """Publish a checkpoint on the Hugging Face Hub: weights, config.json, model card, results and pictures.

    Pushing the same content again makes no commit.

    Args:
        checkpoint: A folder that :func:`save_checkpoint` or train.py wrote, a weights file or training state, or
            'local-dir:FOLDER' or 'hf-hub:ORG/NAME'.
        repo_id: ``organisation/name``; made if it is not there.
        results: New measurements of these very weights, in place of the checkpoint's.
        private: Make a new repository private.
        revision: Branch, made if it is not there; None is the main one.
        license: Licence of the weights.
        dry_run: Write everything to this folder and push nothing.

    Returns:
        The address of the repository, or the folder of the dry run.

    Raises:
        HubError: The Hub does not answer or refuses.
        ValueError: Damaged, or a file that does not say what model it belongs to.

    Examples:
        >>> spikezoo.push_folder('output/quickstart', 'me/quickstart', dry_run='card')
    """
    check_repo_id(repo_id)
    checkpoint = locate(str(checkpoint))
    source = find_weights(checkpoint)
    config = Config.read(checkpoint)
    if not config.architecture:
        raise ValueError(
            f"{checkpoint} does not say what model it belongs to: make the model with create_model(NAME, "
            "checkpoint_path=...) and push_to_hub(model, ...)."
        )
    with _staging(repo_id, dry_run) as folder:
        if source.name == WEIGHTS_NAME and config.version:
            copy_checkpoint(source.parent, folder, None if results is None else plain_results(results))
        else:  # a training state, or weights without hashes
            known = {**config.results, "dataset": config.dataset, "split": config.split}
            model = create_model(config.architecture, checkpoint_path=checkpoint)
            save_checkpoint(model, folder, results if results is not None else known)
        for picture in source.parent.glob("*.png"):
            shutil.copyfile(picture, folder / picture.name)
        return _publish(folder, repo_id, private, revision, license, dry_run)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    results: Mapping[str, Any] | None = None,
    *,
    sparse: bool = True,
    private: bool = False,
    revision: str | None = None,
    license: str = "apache-2.0",
    dry_run: str | Path | None = None,
) -> str:
    """Publish a model on the Hugging Face Hub, with a card of what was measured.

    Args:
        model: A model of :func:`spikezoo.create_model`, transformed or not.
        repo_id: ``organisation/name``; made if it is not there.
        results: What was measured of these very weights, as :func:`save_checkpoint` takes it.
        sparse: As for :func:`save_checkpoint`; dense weights without transforms can be read by timm, too.
        private: Make a new repository private.
        revision: Branch, made if it is not there; None is the main one.
        license: Licence of the weights.
        dry_run: Write everything to this folder and push nothing.

    Returns:
        The address of the repository, or the folder of the dry run.

    Raises:
        HubError: The Hub does not answer or refuses.
        ValueError: A model that cannot be rebuilt from its name, or that holds NaN.

    Examples:
        >>> spikezoo.push_to_hub(model, 'me/my-net', {'dataset': 'cifar10', 'top1': 92.2})
    """
    with _staging(repo_id, dry_run) as folder:
        save_checkpoint(model, folder, results, sparse=sparse)
        return _publish(folder, repo_id, private, revision, license, dry_run)


@contextmanager
def _staging(repo_id: str, dry_run: str | Path | None) -> Iterator[Path]:
    check_repo_id(repo_id)
    if dry_run is not None:
        if Path(dry_run).is_file() or (Path(dry_run).exists() and any(Path(dry_run).iterdir())):
            raise ValueError(
                f"{dry_run} is not empty, or a file: give a new folder, so that nothing of yours is mixed in."
            )
        Path(dry_run).mkdir(parents=True, exist_ok=True)
        yield Path(dry_run)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def push_all(
    org: str, *, private: bool = False, license: str = "apache-2.0", dry_run: str | Path | None = None
) -> Iterator[str]:
    """Publish every checkpoint that comes with the package, each as ``ORG/ARCHITECTURE.TAG``.

    What was published before and has not changed makes no commit.

    Args:
        org: Organisation, or user.
        private: Make new repositories private.
        license: Licence of the weights.
        dry_run: Write everything to folders in this one and push nothing.

    Yields:
        After each of them the address of its repository, or its folder of the dry run.

    Raises:
        HubError: The Hub does not answer or refuses.
        ValueError: A bad name of an organisation, nothing to publish, or a damaged checkpoint.
    """
    names = sorted(config.parent.name for config in registry.SHIPPED.glob(f"[!.]*/{CONFIG_NAME}"))
    if not names:
        raise ValueError(f"There is nothing to publish: {registry.SHIPPED.name}/ holds no checkpoints.")
    for name in names:
        check_repo_id(f"{org}/{name}")
    for name in names:
        place = None if dry_run is None else Path(dry_run) / name
        yield push_folder(
            registry.shipped_folder(name), f"{org}/{name}", private=private, license=license, dry_run=place
        )


def _publish(
    folder: Path, repo_id: str, private: bool, revision: str | None, license: str, dry_run: str | Path | None
) -> str:
    write_card(folder, repo_id, license=license)
    if dry_run is not None:
        return str(folder)
    api = HfApi(library_name="spikezoo", library_version=__version__)
    with explained(repo_id, revision, "Pushing"):
        with suppress(RepositoryNotFoundError):  # it will be made
            ask(repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Upload with spikezoo",
            delete_patterns=".eval_results/*",  # figures of other weights must not outlive them
        )
    return f"{constants.ENDPOINT}/{repo_id}" + (f"/tree/{revision}" if revision else "")
