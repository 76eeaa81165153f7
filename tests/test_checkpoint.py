"""spikezoo.checkpoint: what is written comes back bit by bit or not at all, and foreign files change nothing."""

import hashlib
import os
import pickle
import stat

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spikezoo import checkpoint
from spikezoo.checkpoint import (
    atomic,
    file_hash,
    find_weights,
    load_state,
    load_weights,
    read_config,
    read_weights,
    save_state,
)


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    """Equal in value and in type, all the way down; nan equals nan."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            same(left, right)
    else:
        assert a == b or (a != a and b != b)


# ------------------------------------------------------------------------------------------- training states


STATE = {
    "numbers": [1, -(2**70), 0.1, 1e-323, float("inf"), float("nan"), True, None, "", "é\n\0"],
    "keys": {0: "int", "0": "str", None: 1, 2.5: 2},
    "tuple": ((), (1, (2,)), [(), []], {}),
    "scalar": torch.tensor(3.25),
    "counter": torch.tensor(7),
    "empty": torch.empty(0, 3),
    "half": torch.tensor([1.0, -0.0, float("nan")], dtype=torch.bfloat16),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "double": torch.tensor([[0.1, 2]], dtype=torch.float64),
    "strided": torch.arange(6.0).view(2, 3).t(),
    "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)}, 1: {}}, "betas": (0.9, 0.999)},
}


def test_state_round_trip(tmp_path):
    save_state(tmp_path / "a.safetensors", STATE)
    same(load_state(tmp_path / "a.safetensors"), STATE)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_state_of_nothing(tmp_path):
    save_state(tmp_path / "a.safetensors", {})
    assert load_state(tmp_path / "a.safetensors") == {}


def test_state_keeps_tensors_with_similar_paths_and_shared_memory_apart(tmp_path):
    one = torch.ones(3)
    state = {1: one, "1": 2 * one, "a.b": 3 * one, "a": {"b": 4 * one}, "shared": one, "view": one[1:]}
    save_state(tmp_path / "a.safetensors", state)
    same(load_state(tmp_path / "a.safetensors"), state)


def test_state_restores_an_optimizer_and_random_states(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.rand(5, 3)).square().sum().backward()
        optimizer.step()

    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    step(model, optimizer)
    save_state(
        tmp_path / "a.safetensors",
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()},
    )
    step(model, optimizer)

    state = load_state(tmp_path / "a.safetensors")
    other = net()
    other.load_state_dict(state["model"])
    again = torch.optim.AdamW(other.parameters(), amsgrad=True)
    again.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    step(other, again)
    same(copy_of(other), copy_of(model))
    same(again.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("bad", [{"a": [object()]}, {"a": {1, 2}}, {"a": {(1, 2): 3}}, {"a": b"bytes"}])
def test_state_refuses_what_it_could_not_give_back(tmp_path, bad):
    with pytest.raises(TypeError, match=r"Cannot store state\.a"):
        save_state(tmp_path / "a.safetensors", bad)
    assert not os.listdir(tmp_path)


def test_weights_are_no_state(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"not a training state .*found none.*--initial-checkpoint"):
        load_state(tmp_path / "a.safetensors")


# ----------------------------------------------------------------------------------------------------- atomic


def test_atomic_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for text in ("first", "second"):
        with atomic(path) as temporary:
            assert temporary.parent == path.parent and temporary != path
            temporary.write_text(text)
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_atomic_leaves_the_old_file_when_the_block_fails(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_state(path, {"epoch": 1})

    def full(_tensors, file, _metadata):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_state(path, {"epoch": 2})
    assert load_state(path) == {"epoch": 1} and os.listdir(tmp_path) == ["a.safetensors"]


def test_a_failing_rename_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        save_state(tmp_path / "a.safetensors", {"epoch": 1})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        save_state(tmp_path / "a.safetensors", {"epoch": torch.ones(1)})
    finally:
        assert os.umask(before) == mask  # atomic reads the mask by setting it
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == mode


def test_file_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert file_hash(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


# -------------------------------------------------------------------------------------------------- bad files


def unreadable(path, *words):
    """Reading raises a ValueError with the path and the words, and leaves a model as it was."""
    model = net()
    before = copy_of(model)
    with pytest.raises(ValueError) as caught:
        load_weights(model, path)
    for word in (str(path), *words):
        assert word in str(caught.value)
    same(copy_of(model), before)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(copy_of(net()), path)
    whole = path.read_bytes()
    for keep in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        unreadable(path, f"{keep:,} bytes", "truncated", "fetch or write it again")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_web_page_and_lfs_pointer(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("\n<!DOCTYPE html><html><body>404</body></html>")
    unreadable(path, "web page", "download went wrong")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n")
    unreadable(path, "Git LFS pointer", "git lfs pull")


def test_damaged_pickles_raise_only_value_errors(tmp_path):
    # torch's reader raises struct.error, IndexError, AssertionError, ... depending on the place of the damage.
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for keep in range(0, len(whole), 5):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="Cannot read"):
            read_weights(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_cannot_run_code(tmp_path):
    evil = Evil()
    evil.path = str(tmp_path / "owned")
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"weight": evil}, protocol=2))
    unreadable(tmp_path / "a.pth", "pickle of more than weights")
    assert os.listdir(tmp_path) == ["a.pth"]


def test_no_such_file_or_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at .*a\.safetensors\. Give a \.safetensors file"):
        load_weights(net(), tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"No model\.safetensors in .*Give a \.safetensors file or a folder"):
        load_weights(net(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at"):
        load_state(tmp_path / "last.safetensors")
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at"):
        read_config(tmp_path / "a.safetensors")


# -------------------------------------------------------------------------------------------- foreign weights


def test_foreign_weights_are_counted_and_named_and_nothing_is_loaded(tmp_path):
    model = net()
    before = copy_of(model)
    weights = copy_of(model)
    del weights["0.bias"], weights["1.weight"]
    weights["extra"] = torch.ones(1)
    weights["0.weight"] = torch.ones(4, 5)
    weights["1.bias"] += 1  # fits, and must not be loaded either
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as caught:
        load_weights(model, tmp_path / "a.safetensors")
    told = str(caught.value)
    assert "2 missing, 1 unexpected, 1 of another shape, 7 wanted" in told
    assert "nothing was loaded" in told
    for words in ("Missing: 0.bias, 1.weight.", "Unexpected: extra.", "0.weight (4, 5) instead of (4, 3)"):
        assert words in told
    same(copy_of(model), before)


def test_long_lists_of_names_are_cut_and_counted(tmp_path):
    save_file({f"layer.{i}": torch.ones(1) for i in range(9)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"layer\.4, \.\.\. \(9 in all\)"):
        load_weights(net(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model": w}])
def test_pickles_of_weights_load(tmp_path, wrap):
    source, model = net(), net()
    weights = {f"module.{name}": tensor for name, tensor in copy_of(source).items()}  # as DataParallel names them
    torch.save(wrap(weights), tmp_path / "a.pth")
    load_weights(model, tmp_path / "a.pth")
    same(copy_of(model), copy_of(source))


def test_pickles_of_something_else(tmp_path):
    for content in ([1, 2], {"epoch": 3}, torch.ones(2)):
        torch.save(content, tmp_path / "a.pth")
        unreadable(tmp_path / "a.pth", "holds no state dict", "expected names and tensors")


# ----------------------------------------------------------------------------------------- folders and configs


def test_a_folder_gives_the_final_weights_first(tmp_path):
    for name in ("last", "model_best", "model"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
        assert find_weights(tmp_path) == tmp_path / f"{name}.safetensors"
    assert find_weights(tmp_path / "last.safetensors") == tmp_path / "last.safetensors"


def test_weights_of_a_training_state(tmp_path):
    model, average = net(), net()
    path = tmp_path / "last.safetensors"
    save_state(path, {"architecture": "x", "model": model.state_dict(), "ema": average.state_dict()})
    same(read_weights(path), copy_of(model))
    same(read_weights(tmp_path, ema=True), copy_of(average))
    save_state(path, {"architecture": "x", "model": model.state_dict(), "ema": None})
    with pytest.raises(ValueError, match="holds no averaged weights: the run did not use --model-ema"):
        read_weights(path, ema=True)
    save_state(path, {"architecture": "x"})
    with pytest.raises(ValueError, match="holds no weights"):
        read_weights(path)
    save_file(copy_of(model), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"one set of weights, .*last\.safetensors, or leave --use-ema out"):
        read_weights(tmp_path / "a.safetensors", ema=True)


def test_config_of_a_folder_a_file_and_a_state(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert read_config(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"architecture": "x"}')
    assert read_config(tmp_path) == read_config(tmp_path / "model.safetensors") == {"architecture": "x"}
    save_state(tmp_path / "last.safetensors", {"architecture": "y", "model_args": {"T": 2}, "epoch": 3})
    # A state tells of itself, whatever lies beside it.
    assert read_config(tmp_path / "last.safetensors") == {"architecture": "y", "model_args": {"T": 2}}
    for text, words in (("{", "not valid JSON"), ("[1]", "holds a list: expected an object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_config(tmp_path)
