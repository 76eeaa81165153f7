"""The client of the Hugging Face Hub: fetch checkpoints into its cache, and say in one error what went wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_token, hf_api, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from spikezoo.checkpoint import CONFIG_NAME, WEIGHTS_NAME, file_hash, load_sparse_file

__all__ = ["TIMEOUT_S", "HubError", "ask", "check_push", "check_repo_id", "explained", "pull"]

_Answer = TypeVar("_Answer")

# Of a live hub this is plenty, and nobody waits long for a dead one.
TIMEOUT_S = 4.5


class HubError(OSError):
    """The Hub does not answer, or does not have what was asked for."""


@contextmanager
def explained(repo_id: str, revision: str | None, doing: str) -> Iterator[None]:
    """Turn the many errors of the hub's client into one that says what happened and what to do."""
    what = f"{doing} {repo_id}" + (f" at {revision}" if revision else "")
    endpoint = constants.ENDPOINT
    try:
        yield
    except HubError:
        raise
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository name: expected 'organisation/name'. ({error})") from error
    except GatedRepoError as error:
        raise HubError(
            f"{what}: the repository is gated. Accept its terms at {endpoint}/{repo_id} and log in with 'hf auth "
            "login' or HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{what}: there is no such repository at {endpoint}, or it is private. Check the spelling; for a private "
            "one log in with 'hf auth login' or HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{what}: the repository has no such revision. Give a branch, a tag or a commit, or leave it out."
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{what}: it is not in the cache and HF_HUB_OFFLINE forbids to fetch it.") from error
    except LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        raise HubError(f"{what}: {endpoint} does not answer, and it is not in the cache. ({cause})") from error
    except EntryNotFoundError as error:
        raise HubError(f"{what}: the repository lacks a file. {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: "Log in with 'hf auth login' or HF_TOKEN.",
            403: "Your token has no right to do this; it needs the role 'write' to push.",
            429: "Too many requests: wait a while, or log in; models in the cache need no request.",
        }.get(status, "The server has a fault: try again later.")
        raise HubError(f"{what}: {endpoint} answered {status}. {advice}") from error
    except ConnectionError as error:
        advice = " Set HF_HUB_DISABLE_XET=1 for hubs that do not speak Xet." if "xet" in str(error).lower() else ""
        raise HubError(f"{what}: the connection to {endpoint} failed ({error}).{advice}") from error
    except PermissionError as error:
        raise HubError(f"{what}: no permission to write {error.filename}. HF_HOME says where the cache is.") from error
    except Exception as error:  # the client's transport raises its own kinds, which differ between its versions
        cause = error.__cause__ or error
        raise HubError(
            f"{what}: {endpoint} does not answer as it should ({type(cause).__name__}: {cause}). Check the network, "
            "HF_ENDPOINT and proxies; models in the cache need no network."
        ) from error


def ask(repo_id: str, revision: str | None = None) -> hf_api.ModelInfo:
    """What the Hub knows of a repository, within seconds or not at all."""
    return _in_time(lambda: HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT_S))


def check_push(repo_id: str) -> None:
    """Ask the Hub whether it will take a push to a repository, before anything is trained for it.

    Raises:
        ValueError: Not ``organisation/name``.
        HubError: No token, one that is not valid or may only read, or an organisation of others; no answer.
    """
    owner = check_repo_id(repo_id).partition("/")[0]
    if get_token() is None:
        raise HubError(f"Pushing {repo_id}: there is no token. Log in with 'hf auth login' or HF_TOKEN.")
    with explained(repo_id, None, "Pushing"):
        user = _in_time(lambda: HfApi().whoami())
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError(f"Pushing {repo_id}: your token may only read; it needs the role 'write' to push.")
        owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
        if owner not in owners:
            raise HubError(
                f"Pushing {repo_id}: your token is {user['name']}'s and may push to {', '.join(owners)}, not to "
                f"{owner}."
            )


def _in_time(question: Callable[[], _Answer]) -> _Answer:
    """One question to the Hub, answered within seconds or not at all.

    The client's downloads repeat a failed request for half a minute, and a mute server holds them for several; its
    timeouts hold for each address of a host. So whether the Hub is there is asked first, and in a thread.
    """
    answer: list[_Answer | Exception] = []

    def put() -> None:
        try:
            answer.append(question())
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=put, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    found = answer[0] if answer else TimeoutError(f"no answer within {TIMEOUT_S:g} s")
    if isinstance(found, Exception):
        raise found
    return found


def check_repo_id(repo_id: str) -> str:
    """The name of a repository, checked before anything is trained, measured or written for it.

    Raises:
        ValueError: Not ``organisation/name``.
    """
    try:
        validate_repo_id(repo_id)
        well_formed = "/" in repo_id
    except HFValidationError:
        well_formed = False
    if not well_formed:
        raise ValueError(
            f"{repo_id!r} is no repository name: expected 'organisation/name' of letters, digits, '-', '_' and '.'."
        )
    return repo_id


def _split_revision(reference: str) -> tuple[str, str | None]:
    repo_id, _, revision = reference.partition("@")
    return check_repo_id(repo_id), revision or None


def pull(reference: str, *, refresh: bool = False, cache_dir: str | Path | None = None) -> Path:
    """Fetch a checkpoint from the Hugging Face Hub into its cache.

    What is in the cache is used without any request, a branch or tag that was given too, also where it has moved on
    since; ``refresh=True`` asks again. HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are the client's and mean what
    they mean there.

    Args:
        reference: ``organisation/name`` or ``organisation/name@revision``: branch, tag or commit.
        refresh: Ask the Hub for the newest commit of the branch.
        cache_dir: Folder of the cache; None is huggingface_hub's.

    Returns:
        The folder with config.json and model.safetensors.

    Raises:
        HubError: Missing, private, gated, or no answer.
        ValueError: No repository name.
    """
    repo_id, revision = _split_revision(reference)
    files = (CONFIG_NAME, WEIGHTS_NAME)
    with explained(repo_id, revision, "Fetching"):
        if not refresh:
            try:
                folder = snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, local_files_only=True)
                if all((Path(folder) / file).is_file() for file in files):
                    return Path(folder)
            except LocalEntryNotFoundError:
                pass
        info = ask(repo_id, revision)
        have = {sibling.rfilename for sibling in info.siblings or []}
        if missing := [file for file in files if file not in have]:
            pickles = [file for file in have if file.endswith((".bin", ".pth", ".pt", ".ckpt"))]
            raise HubError(
                f"Fetching {repo_id}: it has no {' and no '.join(missing)}, so it is no checkpoint of spikezoo."
                + (f" The pickle {pickles[0]} is not read: it can run code." if pickles else "")
            )
        for attempt in (refresh, True):
            # The first file settles the commit that the branch stands at, the second comes from that very commit.
            options: dict[str, Any] = {"etag_timeout": TIMEOUT_S, "force_download": attempt, "cache_dir": cache_dir}
            first = Path(hf_hub_download(repo_id, CONFIG_NAME, revision=revision, **options))
            hf_hub_download(repo_id, WEIGHTS_NAME, revision=first.parent.name, **options)
            try:
                _verify(first.parent)
                return first.parent
            except ValueError as error:  # the client checks sizes only
                damage = error
        for file in files:  # or the cache would give it again and again
            (first.parent / file).resolve().unlink(missing_ok=True)
            (first.parent / file).unlink(missing_ok=True)
        raise HubError(f"Fetching {repo_id}: what came is damaged, twice, and was thrown away. {damage}") from damage


def _verify(folder: Path) -> None:
    """Check a checkpoint that came over the network by the hashes of its config and of the Hub."""
    weights = folder / WEIGHTS_NAME
    load_sparse_file(weights)
    # The cache links to a blob, which for large files is called by its sha256.
    blob = weights.readlink().name if weights.is_symlink() else ""
    if len(blob) == 64 and file_hash(weights) != blob:
        raise ValueError(f"{weights} does not have the sha256 {blob} that the Hub gave for it.")
