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
from hub_server import HubServer
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
    # 10,240 bytes of weights go in parts of 4,096; 1,000 bytes are not above the threshold, 1,001 are.
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
    assert api.file_exists("org/net", "a/d.txt") and not api.file_exists("org/net", "d.txt")
    assert api.repo_exists("org/net") and not api.repo_exists("org/none")
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("org/net", "b"))


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
    # All there: by the commit's id no request is made.
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
        lambda revision: api.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="org/net", revision=revision),
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


def test_private(hub, api, monkeypatch):
    hub.add_repo("org/net", {"config.json": b"{}", "model.safetensors": WEIGHTS}, private=True)
    for token in (False, hub.stranger):
        for action in (
            lambda token: hf_hub_download("org/net", "config.json", token=token),
            lambda token: snapshot_download("org/net", token=token),
            lambda token: api.model_info("org/net", token=token),
            lambda token: api.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="org/net", token=token),
        ):
            with pytest.raises(RepositoryNotFoundError) as caught:
                action(token)
            assert not isinstance(caught.value, GatedRepoError)
            assert caught.value.response.status_code == (404 if token else 401)
    assert api.model_info("org/net").private
    # The CDN refuses a request that carries the token.
    assert Path(hf_hub_download("org/net", "model.safetensors")).read_bytes() == WEIGHTS
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("org/net", "config.json")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info("org/net", token="hf_nobody")


def test_gated(hub, api):
    hub.add_repo("org/net", {"config.json": b"{}"}, gated=True)
    for token, status in ((False, 401), (hub.stranger, 403)):
        assert api.model_info("org/net", token=token).gated == "manual"
        for action in (hf_hub_download, api.file_exists):
            with pytest.raises(GatedRepoError) as caught:
                action("org/net", "config.json", token=token)
            assert caught.value.response.status_code == status
        with pytest.raises(GatedRepoError):
            snapshot_download("org/net", token=token)
    assert Path(hf_hub_download("org/net", "config.json")).read_bytes() == b"{}"


def test_only_the_owner_writes(hub, api):
    sha = hub.add_repo("org/net", {"config.json": b"{}"})
    for token, status in ((False, "401"), (hub.stranger, "403")):
        with pytest.raises(HfHubHTTPError, match=status):
            api.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="org/net", token=token)
        with pytest.raises(HfHubHTTPError, match=status):
            api.create_tag("org/net", tag="v1", token=token)
    assert hub.commits("org/net") == [sha]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_fail(hub, api, status):
    hub.add_repo("org/net", {"config.json": b"{}"})
    hub.fail("/api/", status, times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as caught:
            api.model_info("org/net")
        assert caught.value.response.status_code == status
    assert api.model_info("org/net").id == "org/net"
    # HEAD alone fails once, is asked again without a wait, and the file comes.
    hub.fail("config.json", status, times=1, method="HEAD")
    hf_hub_download("org/net", "config.json")
    path = "/org/net/resolve/main/config.json"
    assert seen(hub, "resolve") == [f"HEAD {path}", f"HEAD {path}", f"GET {path}"]


def test_retry_after(hub):
    hub.add_repo("org/net", {"config.json": b"{}"})
    hub.fail("config.json", 429, times=1, method="GET", retry_after=0)
    start = time.monotonic()
    hf_hub_download("org/net", "config.json")
    # The client adds a second to what it is told.
    assert time.monotonic() - start >= 1 and len(seen(hub, "GET")) == 2


def test_cut(hub, api):
    hub.add_repo("org/net", {"model.safetensors": WEIGHTS})
    hub.cut("/cdn/", times=1)
    assert Path(hf_hub_download("org/net", "model.safetensors")).read_bytes() == WEIGHTS
    assert len(seen(hub, "GET /cdn/")) == 2
    hub.cut("/cdn/|/api/")
    url = hub.cdn + f"/cdn/{hashlib.sha256(WEIGHTS).hexdigest()}/model.safetensors"
    half = len(WEIGHTS) // 2
    for start, stop, sent in ((0, "", half), (half - 10, "", 10), (half + 10, "", 0), (10, 19, 10)):
        received = 0
        try:
            with httpx2.stream("GET", url, headers={"Range": f"bytes={start}-{stop}"}) as response:
                for chunk in response.iter_raw():
                    received += len(chunk)
            assert stop
        except httpx2.RemoteProtocolError:
            assert not stop
        assert received == sent
    with pytest.raises(httpx2.RemoteProtocolError):
        api.model_info("org/net")


def test_ranges(hub):
    hub.add_repo("org/net", {"config.json": b"0123456789"})
    url = f"{hub.endpoint}/org/net/resolve/main/config.json"
    expected = {"2-4": (206, b"234"), "7-": (206, b"789"), "-2": (206, b"89"), "8-99": (206, b"89"), "10-": (416, b"")}
    for asked, answer in expected.items():
        response = httpx2.get(url, headers={"Range": f"bytes={asked}"})
        assert (response.status_code, response.content) == answer
    assert httpx2.get(url, headers={"Range": "bytes=2-4"}).headers["Content-Range"] == "bytes 2-4/10"


def test_body(hub, api):
    hub.add_repo("org/net", {"model.safetensors": WEIGHTS})
    hub.body("/cdn/", b"<html></html>", times=1)
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download("org/net", "model.safetensors")
    # The right size is all that the client checks.
    flipped = bytes([WEIGHTS[0] ^ 1]) + WEIGHTS[1:]
    hub.body("/cdn/", flipped)
    assert Path(hf_hub_download("org/net", "model.safetensors")).read_bytes() == flipped
    hub.body("resolve", b"<html></html>", method=None)
    with pytest.raises(LocalEntryNotFoundError, match="X-Repo-Commit"):
        hf_hub_download("org/net", "config.json")


def test_delay_and_stop(hub, api):
    hub.add_repo("org/net", {"config.json": b"{}"})
    path = hf_hub_download("org/net", "config.json")
    hub.delay("/api/", 60)
    start = time.monotonic()
    with pytest.raises(httpx2.ReadTimeout):
        api.model_info("org/net", timeout=0.2)
    hub.stop()
    # A request that waits does not keep the server up.
    assert time.monotonic() - start < 5
    with pytest.raises(httpx2.ConnectError):
        api.model_info("org/net")
    assert hf_hub_download("org/net", "config.json") == path


def test_offline(hub, monkeypatch):
    hub.add_repo("org/net", {"config.json": b"{}"})
    path = hf_hub_download("org/net", "config.json")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hf_hub_download("org/net", "config.json") == path
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("org/net", "model.safetensors")
    assert hub.requests == []


def test_damaged_upload_is_refused(hub, api):
    """What arrives must have the sha256 under which it was announced, and be there when the commit points to it."""
    api.create_repo("org/net")
    digest = hashlib.sha256(b"right").hexdigest()
    assert httpx2.put(f"{hub.cdn}/lfs/{digest}", content=b"wrong").status_code == 400
    item = {"key": "lfsFile", "value": {"path": "a", "algo": "sha256", "oid": digest, "size": 5}}
    url, headers = f"{hub.endpoint}/api/models/org/net/commit/main", {"Authorization": f"Bearer {hub.token}"}
    assert httpx2.post(url, json=item, headers=headers).status_code == 400
    # Sent in pieces of unannounced length.
    assert httpx2.put(f"{hub.cdn}/lfs/{digest}", content=iter([b"ri", b"ght"])).status_code == 200
    assert httpx2.post(url, json=item, headers=headers).status_code == 200
    assert hub.file("org/net", "a") == b"right"


def test_another_process(hub):
    """A process that the test starts talks to the server too, and asks nothing that it was not told to."""
    hub.add_repo("org/net", {"config.json": b"{}"}, private=True)
    code = "import huggingface_hub as h; print(h.hf_hub_download('org/net', 'config.json'), h.whoami()['name'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [hf_hub_download("org/net", "config.json"), "owner"]
    assert [method for method, _ in hub.requests] == ["HEAD", "GET", "GET", "HEAD"]


def test_what_is_not_served_is_an_error(hub):
    with pytest.raises(RuntimeError, match="GET /api/spaces is not served"), HubServer() as server:
        assert httpx2.get(server.endpoint + "/api/spaces").status_code == 501
