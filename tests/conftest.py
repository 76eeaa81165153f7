"""What all tests share: one torch thread, a fixed seed, and a Hugging Face Hub on the loopback."""

import gc
import importlib.util
import multiprocessing
import os
import socket
import sys
import tempfile
import textwrap
import types
import warnings
from multiprocessing.connection import wait
from pathlib import Path

# Micro-models are many times slower with a second thread on busy cores; subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ("build", "flags", "initial", "length", "objective", "output", "plan", "run", "state")


def load(name):
    """What stands behind a command: validate as its module, train with the names of all of its modules."""
    if name == "validate":
        return importlib.import_module("spikezoo.cli.validate")
    if name == "train":
        parts = [importlib.import_module(f"spikezoo.train.{part}") for part in TRAIN]
        names = {key: value for part in parts for key, value in vars(part).items() if not key.startswith("__")}
        return types.SimpleNamespace(**names, main=importlib.import_module("spikezoo.train").main)
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Importing torch and timm takes longer than what most processes of tests do: one process imports them, and its copies
# go on from there. spikezoo itself is imported by each, from this one's sys.path.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["torch", "timm"])
_CHILD = """
import os, sys
os.environ.clear()
os.environ.update({environ!r})
os.chdir({folder!r})
sys.argv = ["-c"]
for descriptor, name in enumerate({files!r}, 1):
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
exec({code!r}, {{"__name__": "__main__"}})
"""


def fork(code, folder, files, environ=None):
    """Start a process that runs code as ``python -c`` does, with output and errors into two files."""
    environ = {**os.environ, **(environ or {})}
    text = _CHILD.format(environ=environ, folder=str(folder), files=list(map(str, files)), code=textwrap.dedent(code))
    process = _forks.Process(target=exec, args=(text, {}))
    process.start()
    return process


def run_code(code, *ranks, folder="."):
    """Run code in a process as :func:`subprocess.run` would, or in one for each dict of variables.

    The first process that fails ends the others, as torchrun does it.

    Returns:
        Its exit code, or the first that is not 0; output and errors of all.
    """
    with tempfile.TemporaryDirectory() as place:
        files = [[Path(place, f"{number}{kind}") for kind in ("out", "err")] for number in range(len(ranks) or 1)]
        folder = Path(folder).resolve()
        left = [fork(code, folder, *pair) for pair in zip(files, ranks or [None], strict=True)]
        codes = []
        while left:
            wait([process.sentinel for process in left])
            for process in [process for process in left if process.exitcode is not None]:
                left.remove(process)
                codes.append(process.exitcode)
                for other in left if codes[-1] else []:
                    other.kill()
        out, err = ("".join(path.read_text() for path in paths) for paths in zip(*files, strict=True))
    return types.SimpleNamespace(returncode=next(filter(None, codes), 0), stdout=out, stderr=err)


def two_ranks():
    """What torchrun tells each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def pytest_collection_finish():
    """Look for garbage seldom, and not among the imports: models are made all the time, and each is a circle."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module")
def train():
    """The script, loaded once a file."""
    return load("train")


@pytest.fixture
def fast(train, monkeypatch):
    """The script without its pictures, which take longer than the training of a micro-model."""
    monkeypatch.setattr("spikezoo.train.output.plot", lambda *_: [])
    return train


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def forget_model(name):
    """Take an architecture out of timm's registry and spikezoo's."""
    from timm.models import _registry

    from spikezoo import registry

    _registry._clear_model_entries(name)
    for known in (_registry._model_entrypoints, registry._rows, registry._classes):
        known.pop(name, None)


@pytest.fixture
def register_again(monkeypatch):
    """A function that registers an architecture anew, with what lies in registry.SHIPPED by then."""
    import timm

    from spikezoo import registry

    rows, classes = dict(registry._rows), dict(registry._classes)
    before = {}

    def register(name):
        row, cls = registry._rows[name], registry._classes[name]
        module = sys.modules[timm.model_entrypoint(name).__module__]
        before.setdefault(name, (module, module.default_cfgs, module.__all__[:], getattr(module, name)))
        forget_model(name)
        registry.register_rows(module.__name__, cls, {name: row})

    yield register
    for name, (module, cfgs, names, entry) in before.items():
        forget_model(name)
        registry._rows[name], registry._classes[name] = rows[name], classes[name]
        module.default_cfgs, module.__all__[:] = cfgs, names
        setattr(module, name, entry)
        timm.models.register_model(entry)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fresh hub_server.HubServer, to which huggingface_hub talks as its owner, with an empty cache.

    The client reads its environment when it is imported, so its constants are set for this process and the variables
    for those that a test starts. Take `HF_TOKEN` away with monkeypatch.delenv for an anonymous client.
    """
    from hub_server import HubServer
    from huggingface_hub import close_session, constants, hf_api

    # So huggingface_hub uploads to LFS.
    warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
    home = tmp_path / "hf_home"
    with HubServer() as server:
        settings = {
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_ENDPOINT": server.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            # Without it each process asks the endpoint for a list of coding agents.
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
            flag = value == "1" if value in ("0", "1") else value
            monkeypatch.setattr(constants, name.replace("HF_ENDPOINT", "ENDPOINT"), flag)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # huggingface_hub.model_info and its like are methods of one HfApi made at import.
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", server.token)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1,localhost")
        # The next client is made with these proxies.
        close_session()
        yield server
        close_session()
