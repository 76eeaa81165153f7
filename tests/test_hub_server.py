"""The test server itself: the real huggingface_hub client finds in it what it would find in the Hub."""

import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CARD = b"---\nlicense: mit\n---\n# A model\n"
WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def api(hub):
    return HfApi()


def folder(root, **files):
    """Writes files, named with __ for a slash and _ for a dot, and returns the folder."""
    for name, data in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def seen(hub, pattern):
    return [f"{method} {path}" for method, path in hub.requests if re.search(pattern, f"{method} {path}")]


def test_whoami(api):
    assert api.whoami()["name"] == "owner"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_nobody")


def test_create(hub, api):
    url = api.create_repo("org/net")
    assert url == f"{hub.endpoint}/org/net" and url.repo_id == "org/net"
    assert api.create_repo("org/net", exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("org/net")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("org/other", token=hub.stranger)
    api.create_repo("org/hidden", private=True)
    assert hub.repos["org/hidden"].private and not hub.repos["org/net"].private


def test_upload(hub, api, tmp_path):
    # 10,240 bytes of weights in parts of 4,096, the third shorter; one regular file above no threshold, one below.
    hub.part_size, hub.lfs_above = 4096, 1000
    api.create_repo("org/net")
    first = hub.head("org/net")
    local = folder(tmp_path / "net", model_safetensors=WEIGHTS, a__small_bin=b"1" * 1000, a__big_bin=b"2" * 1001)
    folder(local, README_md=CARD, empty_txt=b"")
    commit = api.upload_folder(repo_id="org/net", folder_path=local, commit_message="first")
    assert hub.commits("org/net") == [commit.oid, first]
    for path in ("model.safetensors", "a/small.bin", "a/big.bin", "README.md", "empty.txt"):
        assert hub.file("org/net", path) == (local / path).read_bytes()
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert seen(hub, f"PUT /lfs/{digest}") == [f"PUT /lfs/{digest}/{part}" for part in (1, 2, 3)]
    files = hub.repos["org/net"].branches["main"].files
    assert {path for path, file in files.items() if file.lfs} == {"model.safetensors", "a/big.bin"}
    # The same again: nothing is sent and no commit made.
    hub.requests.clear()
    assert api.upload_folder(repo_id="org/net", folder_path=local).oid == commit.oid
    assert hub.head("org/net") == commit.oid and not seen(hub, "PUT|commit")
    # One changed file: one commit that keeps the others.
    folder(local, README_md=CARD + b"more")
    third = api.upload_folder(repo_id="org/net", folder_path=local, delete_patterns="a/small*", allow_patterns="*.md")
    assert hub.commits("org/net") == [third.oid, commit.oid, first]
    assert hub.file("org/net", "README.md") == CARD + b"more"
    assert hub.file("org/net", "README.md", commit.oid) == CARD
    names = {".gitattributes", "model.safetensors", "a/big.bin", "README.md", "empty.txt"}
    assert set(api.list_repo_files("org/net")) == names
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/net", parent_commit=first)


def test_a_card_without_metadata_is_warned_of(api):
    api.create_repo("org/net")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# A model", path_in_repo="README.md", repo_id="org/net")


def test_interrupted_upload_goes_on(hub, api, tmp_path):
    api.create_repo("org/net")
    hub.fail("/lfs/", status=503, times=1, method="PUT")
    api.upload_folder(repo_id="org/net", folder_path=folder(tmp_path / "net", model_safetensors=WEIGHTS))
    assert hub.file("org/net", "model.safetensors") == WEIGHTS and len(seen(hub, "PUT")) == 2


def test_information(hub, api):
    sha = hub.add_repo("org/net", {"model.safetensors": WEIGHTS, "a/b/c.txt": b"abc", "a/d.txt": b""})
    info = api.model_info("org/net", files_metadata=True)
    assert (info.sha, info.private, info.gated) == (sha, False, False)
    weights = next(s for s in info.siblings if s.rfilename == "model.safetensors")
    assert weights.size == weights.lfs.size == len(WEIGHTS)
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert [entry.path for entry in api.list_repo_tree("org/net")] == ["a", "model.safetensors"]
    assert [entry.path for entry in api.list_repo_tree("org/net", "a")] == ["a/b", "a/d.txt"]
    deep = {entry.path: entry for entry in api.list_repo_tree("org/net", "a", recursive=True)}
    assert list(deep) == ["a/b", "a/b/c.txt", "a/d.txt"]
    # What `git hash-object` says of these contents.
    assert deep["a/b/c.txt"].blob_id == "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f"
    assert deep["a/d.txt"].blob_id == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert [path.path for path in api.get_paths_info("org/net", ["a/d.txt", "a/none"])] == ["a/d.txt"]
    assert [model.id for model in api.list_models(author="org")] == ["org/net"] and not list(api.list_models(author="x"))
    assert api.file_exists("org/net", "a/d.txt") and not api.file_exists("org/net", "d.txt")
    assert api.repo_exists("org/net") and not api.repo_exists("org/none")
    api.delete_repo("org/net")
    assert not api.repo_exists("org/net")


def test_downloads(hub):
    sha = hub.add_repo("org/net", {"model.safetensors": WEIGHTS, "a/config.json": b"{}"})
    path = hf_hub_download("org/net", "model.safetensors")
    assert Path(path).read_bytes() == WEIGHTS and os.path.join("snapshots", sha) in path
    assert os.path.basename(os.path.realpath(path)) == hashlib.sha256(WEIGHTS).hexdigest()
    assert seen(hub, "safetensors") == [
        "HEAD /org/net/resolve/main/model.safetensors",
        f"GET /cdn/{hashlib.sha256(WEIGHTS).hexdigest()}/model.safetensors",
    ]
    root = snapshot_download("org/net")
    assert Path(root, "a", "config.json").read_bytes() == b"{}"
    # All there: by the commit's id no request is made, and none is counted that was not.
    hub.requests.clear()
    assert snapshot_download("org/net", revision=sha) == root
    assert hf_hub_download("org/net", "model.safetensors", revision=sha) == path
    assert try_to_load_from_cache("org/net", "model.safetensors") == path
    assert hub.requests == []
    hf_hub_download("org/net", "model.safetensors")
    assert seen(hub, "") == ["HEAD /org/net/resolve/main/model.safetensors"]


def test_revisions(hub, api):
    old = hub.add_repo("org/net", {"config.json": b"old"})
    api.create_tag("org/net", tag="v1")
    api.create_branch("org/net", branch="dev/a")
    new = api.upload_file(path_or_fileobj=b"new", path_in_repo="config.json", repo_id="org/net").oid
    dev = api.upload_file(path_or_fileobj=b"dev", path_in_repo="config.json", repo_id="org/net", revision="dev/a").oid
    for revision, content in {"main": b"new", "v1": b"old", old: b"old", new: b"new", "dev/a": b"dev"}.items():
        assert Path(hf_hub_download("org/net", "config.json", revision=revision)).read_bytes() == content
        assert hub.file("org/net", "config.json", revision) == content
    refs = api.list_repo_refs("org/net")
    assert {branch.name: branch.target_commit for branch in refs.branches} == {"main": new, "dev/a": dev}
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", old)]
    assert [commit.commit_id for commit in api.list_repo_commits("org/net")] == [new, old]
    assert api.model_info("org/net", revision="dev/a").sha == dev
    for again in (lambda: api.create_tag("org/net", tag="v1"), lambda: api.create_branch("org/net", branch="main")):
        with pytest.raises(HfHubHTTPError, match="409"):
            again()


def test_missing(hub, api):
    sha = hub.add_repo("org/net", {"config.json": b"{}"})
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("org/net", "none.json")
    # The client remembers which commit lacks the file.
    assert (Path(constants.HF_HUB_CACHE) / "models--org--net" / ".no_exist" / sha / "none.json").exists()
    for action in (
        lambda revision: hf_hub_download("org/net", "config.json", revision=revision),
        lambda revision: snapshot_download("org/net", revision=revision),
        lambda revision: api.model_info("org/net", revision=revision),
        lambda revision: api.upload_file(
            path_or_fileobj=b"", path_in_repo="a", repo_id="org/net", revision=revision
        ),
    ):
        for revision in ("nope", "0" * 40):
            with pytest.raises(RevisionNotFoundError):
                action(revision)
    for action in (
        lambda: hf_hub_download("org/none", "config.json"),
        lambda: snapshot_download("org/none"),
        lambda: api.model_info("org/none"),
        lambda: api.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="org/none"),
    ):
        with pytest.raises(RepositoryNotFoundError):
            action()

