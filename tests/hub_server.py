"""A small Hugging Face Hub on the loopback: repositories with LFS, private and gated ones, and faults on demand.

It speaks what the huggingface_hub client asks of models: who am I, create, upload (regular files in the commit, large
ones by LFS in one or several parts), commit, information, trees, branches, tags and downloads with ranges. Xet is not
spoken: clients run with HF_HUB_DISABLE_XET=1. All content stays in memory. The `hub` fixture of conftest.py starts one
and points the client at it.
"""

import base64
import hashlib
import json
import re
import threading
import traceback
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, unquote

DATE = "2024-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    """One file of a commit; git keeps its bytes itself, or a pointer to LFS."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self):
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def blob(self):
        """The git object id, which for LFS is the pointer's."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def about(self, oid, sha256):
        """Sizes and ids, under the names that trees (oid, oid) or model information (blobId, sha256) give them."""
        size = len(self.data)
        lfs = {"lfs": {sha256: self.sha256, "size": size, "pointerSize": len(self.pointer)}}
        return {oid: self.blob, "size": size} | (lfs if self.lfs else {})


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, File]
    parent: "Commit | None"

    def history(self):
        return [self, *(self.parent.history() if self.parent else [])]


@dataclass
class Repo:
    """Branches and tags name commits; every commit can be had by its id as well."""

    private: bool = False
    gated: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch, title, files):
        content = [len(self.commits), title, sorted((path, file.blob) for path, file in files.items())]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.branches[branch] = self.commits[oid] = Commit(oid, title, files, self.branches.get(branch))
        return oid

    def at(self, revision):
        commit = self.branches.get(revision) or self.tags.get(revision) or self.commits.get(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


class Refused(Exception):
    """An answer other than 200; `code` is the Hub's X-Error-Code, which decides the client's exception."""

    def __init__(self, status, message, code="", commit="", **body):
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        headers = {name: value for name, value in headers.items() if value}
        self.reply = status, headers, json.dumps({"error": message} | body).encode()


class HubServer:
    """The server; use it as a context manager.

    Attributes:
        endpoint: its address, for HF_ENDPOINT.
        token: the owner's, which may do everything; `stranger` is a valid token of somebody who may write nothing.
        lfs_above: files larger than this many bytes, and all *.safetensors, go by LFS.
        part_size: LFS objects larger than this many bytes are uploaded in parts of this size.
        requests: (method, path) of every request so far.
        errors: what the server itself could not do; leaving the context raises if there is any.
    """

    def __init__(self):
        self.token, self.stranger = "hf_owner", "hf_stranger"
        self.role = "write"
        self.lfs_above, self.part_size = 1_000_000, 5_000_000
        self.repos, self.lfs, self.parts = {}, {}, {}
        self.faults, self.requests, self.errors = [], [], []
        self.lock, self.stopped = threading.RLock(), threading.Event()
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.hub, port = self, self._http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        # Another origin: the client follows a redirect within the Hub and would lose the headers sent with it.
        self.cdn = f"http://localhost:{port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stop()
        if self.errors:
            raise RuntimeError("the hub server could not answer:\n" + "\n".join(self.errors))

    def stop(self):
        """Go down for good: from now on connections are refused."""
        if not self.stopped.is_set():
            self.stopped.set()
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()

    # What tests put in and look at.

    def add_repo(self, name, files, private=False, gated=False):
        """A repository with one commit of `files` {path: bytes}; returns the commit's id."""
        self.repos[name] = Repo(private, gated)
        stored = {path: File(data, self._by_lfs(path, len(data))) for path, data in files.items()}
        return self.repos[name].commit("main", "initial commit", stored)

    def head(self, name, branch="main"):
        return self.repos[name].branches[branch].oid

    def commits(self, name, branch="main"):
        """Ids of the branch's commits, the newest first."""
        return [commit.oid for commit in self.repos[name].branches[branch].history()]

    def file(self, name, path, revision="main"):
        return self.repos[name].at(revision).files[path].data

    # Faults. `pattern` is a regular expression searched in the path with its query. A download is HEAD /ID/resolve/REV/
    # PATH, then for small files GET of the same, for large ones GET /cdn/SHA256/PATH. Of each kind the first that
    # matches counts.

    def fail(self, pattern, status=500, times=None, method=None, retry_after=None):
        """Answer with an error, in plain text as a proxy in front of the Hub does."""
        self._fault(pattern, "fail", (status, retry_after), method, times)

    def cut(self, pattern, times=None):
        """Close the connection after the first half of the body; a resumed download gets nothing beyond it either."""
        self._fault(pattern, "cut", True, "GET", times)

    def body(self, pattern, data, times=None, method="GET"):
        """Serve these bytes with status 200 in place of the answer; with method=None in place of HEAD's as well."""
        self._fault(pattern, "body", data, method, times)

    def delay(self, pattern, seconds, times=None, method=None):
        """Wait before answering."""
        self._fault(pattern, "delay", seconds, method, times)

    def _fault(self, pattern, kind, value, method, times):
        with self.lock:
            self.faults.append(SimpleNamespace(pattern=pattern, kind=kind, value=value, method=method, times=times))

    # Answering: (status, headers, body).

    def answer(self, request):
        faults = {}
        with self.lock:
            self.requests.append((request.command, request.route))
            for fault in self.faults:
                matches = re.search(fault.pattern, unquote(request.path)) and fault.method in (None, request.command)
                if matches and fault.times != 0 and fault.kind not in faults:
                    faults[fault.kind] = fault.value
                    fault.times = fault.times and fault.times - 1
        self.stopped.wait(faults.get("delay", 0))
        request.cut = "cut" in faults
        if "fail" in faults:
            status, wait = faults["fail"]
            headers = {"Content-Type": "text/plain"} | ({"Retry-After": wait} if wait is not None else {})
            return status, headers, HTTPStatus(status).phrase.encode()
        if "body" in faults:
            return _ranged(request, faults["body"], {})
        try:
            if request.user == "":
                raise Refused(401, "Invalid credentials in Authorization header")
            for methods, pattern, handler in ROUTES:
                if request.command in methods.split() and (match := re.fullmatch(pattern, request.route)):
                    with self.lock:
                        found = handler(self, request, *(group and unquote(group) for group in match.groups()))
                    return found if isinstance(found, tuple) else _ranged(request, json.dumps(found).encode(), {})
            raise LookupError(f"{request.command} {request.route} is not served here")
        except Refused as refused:
            return refused.reply
        except Exception:
            self.errors.append(traceback.format_exc())
            return 501, {}, b""  # which the client does not try again

    def _by_lfs(self, path, size):
        return path.endswith(".safetensors") or size > self.lfs_above

    def _repo(self, name, request, write=False):
        repo = self.repos.get(name)
        if repo is None or (repo.private and request.user != "owner"):
            raise Refused(404 if request.user else 401, "Repository not found", "RepoNotFound")
        return self._allowed(request) and repo if write else repo

    def _allowed(self, request):
        if request.user != "owner":
            raise Refused(403 if request.user else 401, "You don't have the rights to write here")
        return True

    def _whoami(self, request):
        if request.user is None:
            raise Refused(401, "Invalid username or password.")
        if not request.user:  # a token that is nobody's
            raise Refused(401, "Invalid credentials in Authorization header")
        access = {"accessToken": {"displayName": "tests", "role": self.role}}
        orgs = [{"name": name} for name in ("org", "me") if request.user == "owner"]
        return {"type": "user", "name": request.user, "orgs": orgs, "auth": access}

    def _create(self, request):
        asked = request.json()
        if self._allowed(request) and asked.get("type", "model") != "model":
            raise Refused(400, "only models are served here")
        name = f"{asked.get('organization') or request.user}/{asked['name']}"
        url = f"{self.endpoint}/{name}"
        if name in self.repos:
            raise Refused(409, "You already created this model repo", url=url)
        self.add_repo(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, asked.get("visibility") == "private")
        return {"url": url}

    def _validate(self, request):
        has_metadata = re.match(r"---\r?\n.*?\n---", request.json()["content"], re.DOTALL)
        warnings = [] if has_metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": warnings}

    def _preupload(self, request, name, revision):
        there = self._repo(name, request, write=True).at(revision).files
        files = []
        for asked in request.json()["files"]:
            old = there.get(asked["path"])
            mode = "lfs" if self._by_lfs(asked["path"], asked["size"]) else "regular"
            oid = old and (old.sha256 if old.lfs else old.blob)
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def _batch(self, request, name):
        self._repo(name, request, write=True)
        objects = request.json()["objects"]
        for asked in objects:
            oid, size = asked["oid"], asked["size"]
            upload = {"href": f"{self.cdn}/lfs/{oid}"}
            if size > self.part_size:
                parts = range(1, -(-size // self.part_size) + 1)
                urls = {str(part): f"{self.cdn}/lfs/{oid}/{part}" for part in parts}
                header = {"chunk_size": str(self.part_size)} | urls
                upload = {"href": f"{self.endpoint}/complete/{oid}", "header": header}
            if oid not in self.lfs:
                asked["actions"] = {"upload": upload, "verify": {"href": f"{self.endpoint}/verify/{oid}"}}
        return {"transfer": "basic", "objects": objects}

    def _store(self, request, oid, data=None):
        data = request.body if data is None else data
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, f"what was sent does not have the sha256 {oid}")
        self.lfs[oid] = data
        return {}

    def _store_part(self, request, oid, part):
        self.parts[oid, int(part)] = request.body
        return 200, {"ETag": hashlib.md5(request.body).hexdigest()}, b""

    def _complete(self, request, oid):
        parts = request.json()["parts"]
        stored = [self.parts.pop((oid, part["partNumber"])) for part in parts]
        if [part["etag"] for part in parts] != [hashlib.md5(data).hexdigest() for data in stored]:
            raise Refused(400, "the ETags are not those of the parts")
        return self._store(request, oid, b"".join(stored))

    def _verify(self, request, oid):
        if oid not in self.lfs or len(self.lfs[oid]) != request.json()["size"]:
            raise Refused(404, f"no LFS object {oid} of this size")
        return {}

    def _push(self, request, name, branch):
        repo = self._repo(name, request, write=True)
        if branch not in repo.branches or "create_pr" in request.query:
            raise Refused(404, f"no branch {branch} to commit to, and no pull requests here", "RevisionNotFound")
        head, files, title = repo.branches[branch], dict(repo.branches[branch].files), ""
        for item in map(json.loads, request.body.splitlines()):
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", head.oid) != head.oid:
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile" and value["oid"] in self.lfs:
                files[value["path"]] = File(self.lfs[value["oid"]], lfs=True)
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
            else:
                raise Refused(400, f"cannot commit {key} {value}")
        oid = repo.commit(branch, title, files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{name}/commit/{oid}"}

    def _info(self, request, name, revision):
        repo = self._repo(name, request)
        commit = repo.at(revision or "main")
        siblings = []
        for path, file in sorted(commit.files.items()):
            siblings.append({"rfilename": path} | (file.about("blobId", "sha256") if "blobs" in request.query else {}))
        about = {"private": repo.private, "gated": "manual" if repo.gated else False, "tags": [], "lastModified": DATE}
        return about | {"id": name, "author": name.split("/")[0], "sha": commit.oid, "siblings": siblings}

    def _tree(self, request, name, revision, folder):
        commit = self._repo(name, request).at(revision)
        root = f"{folder}/" if folder else ""
        deep = request.query.get("recursive", ["false"])[0].lower() == "true"
        entries = {}
        for path, file in sorted(commit.files.items()):
            if path.startswith(root):
                slashes = [match.start() for match in re.finditer("/", path) if match.start() >= len(root)]
                for above in (path[:slash] for slash in slashes):
                    entries[above] = {"type": "directory", "path": above, "oid": "0" * 40}
                entries[path] = {"type": "file", "path": path} | file.about("oid", "oid")
        if root and not entries:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound", commit.oid)
        return [entry for path, entry in entries.items() if deep or "/" not in path[len(root) :]]

    def _resolve(self, request, name, revision, path):
        repo = self._repo(name, request)
        if repo.gated and request.user != "owner":
            raise Refused(403 if request.user else 401, f"Access to model {name} is restricted.", "GatedRepo")
        commit = repo.at(revision)
        file = commit.files.get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", commit.oid)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.blob}"'}
        if not file.lfs:
            return _ranged(request, file.data, headers)
        self.lfs[file.sha256] = file.data
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": len(file.data)}
        return 302, headers | {"Location": f"{self.cdn}/cdn/{file.sha256}/{quote(path)}"}, b""

    def _cdn(self, request, oid, _):
        if "authorization" in request.headers:
            raise Refused(400, "a token was sent to the CDN")
        return _ranged(request, self.lfs[oid], {"ETag": f'"{oid}"'})

    def _refs(self, request, name):
        repo = self._repo(name, request)
        branches, tags = (
            [{"name": ref, "ref": ref, "targetCommit": commit.oid} for ref, commit in refs.items()]
            for refs in (repo.branches, repo.tags)
        )
        return {"branches": branches, "tags": tags, "converts": []}

    def _log(self, request, name, revision):
        about = {"message": "", "date": DATE, "authors": [{"user": "owner"}]}
        history = self._repo(name, request).at(revision).history()
        return [{"id": commit.oid, "title": commit.title} | about for commit in history]

    def _tag(self, request, name, revision, branch=None):
        """Tags the revision, or starts the branch from where the request says."""
        repo, asked = self._repo(name, request, write=True), request.json()
        refs, ref = (repo.branches, branch) if branch else (repo.tags, asked["tag"])
        if ref in refs:
            raise Refused(409, f"Reference {ref} already exists")
        refs[ref] = repo.at(revision or asked.get("startingPoint", "main"))
        return {}


_MODEL = "/api/models/([^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", HubServer._whoami),
    ("POST", "/api/repos/create", HubServer._create),
    ("POST", "/api/validate-yaml", HubServer._validate),
    ("GET", f"{_MODEL}(?:/revision/([^/]+))?", HubServer._info),
    ("GET", f"{_MODEL}/tree/([^/]+)(?:/(.+))?", HubServer._tree),
    ("GET", f"{_MODEL}/refs", HubServer._refs),
    ("GET", f"{_MODEL}/commits/([^/]+)", HubServer._log),
    ("POST", f"{_MODEL}/preupload/([^/]+)", HubServer._preupload),
    ("POST", f"{_MODEL}/commit/([^/]+)", HubServer._push),
    ("POST", f"{_MODEL}/(?:tag/([^/]+)|branch/([^/]+))", HubServer._tag),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", HubServer._batch),
    ("PUT", "/lfs/([0-9a-f]{64})", HubServer._store),
    ("PUT", "/lfs/([0-9a-f]{64})/([0-9]+)", HubServer._store_part),
    ("POST", "/complete/([0-9a-f]{64})", HubServer._complete),
    ("POST", "/verify/([0-9a-f]{64})", HubServer._verify),
    ("GET", "/cdn/([0-9a-f]{64})/(.+)", HubServer._cdn),
    ("HEAD GET", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", HubServer._resolve),
]


def _ranged(request, data, headers):
    """The data, or what the Range header asks of it; `request.cut` keeps back the second half of the whole."""
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    first, last = asked.groups() if asked else ("0", "")
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if asked and start >= stop:
        return 416, headers | {"Content-Range": f"bytes */{len(data)}"}, b""
    headers = {"Content-Length": stop - start} | headers
    if asked:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return 206 if asked else 200, headers, data[start : min(stop, len(data) // 2) if request.cut else stop]


class _Server(ThreadingTCPServer):
    request_queue_size = 64

    def handle_error(self, *_):
        """A client that goes away is its own affair; anything else is this server's fault."""
        error = traceback.format_exc()
        if "ConnectionResetError" not in error and "BrokenPipeError" not in error:
            self.hub.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 10

    def handle_request(self):
        hub = self.server.hub
        self.route, _, query = self.path.partition("?")
        self.query, self.body = parse_qs(query), self._read()
        users = {None: None, f"Bearer {hub.token}": "owner", f"Bearer {hub.stranger}": "stranger"}
        self.user = users.get(self.headers["Authorization"], "")
        status, headers, body = hub.answer(self)
        self.send_response(status)
        # One request a connection: with the server gone, none is left open.
        for name, value in ({"Content-Length": len(body), "Connection": "close"} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def json(self):
        return json.loads(self.body)

    def _read(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *_):
        """Nothing on stderr."""
