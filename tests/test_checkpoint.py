"""spikezoo.checkpoint: what is written comes back bit by bit or not at all, and foreign files change nothing."""

import argparse
import copy
import errno
import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import BARE, MICRO, PATCHED, SHORTER, fill, image_for
from timm.models import adapt_input_conv
from torch import nn

import spikezoo
from spikezoo.checkpoint import (
    atomic,
    file_hash,
    files,
    find_weights,
    load_sparse_file,
    load_state,
    load_weights,
    read_config,
    read_weights,
    save_state,
    weights,
    write_checkpoint,
)
from spikezoo.checkpoint.config import config_hash
from spikezoo.checkpoint.files import open_tensors
from spikezoo.checkpoint.sparse import METADATA_KEY, encode, round_to_levels
from spikezoo.neurons import MembraneNorm, SpikingNeuron
from spikezoo.transforms import TRANSFORMS, apply


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

    monkeypatch.setattr(files, "save_file", full)
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


def as_timm_saves(weights):
    return {"epoch": 3, "arch": "net", "args": argparse.Namespace(lr=0.1, mean=(0.5,)), "state_dict": weights}


@pytest.mark.parametrize("wrap", [lambda w: w, as_timm_saves, lambda w: {"model": w}])
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


def test_damaged_states_raise_only_value_errors(tmp_path):
    path = tmp_path / "a.safetensors"
    for tree in ("5", "[]", "{}", "{", '{"dict": 5}', '{"dict": [[1]]}', '{"dict": [["a", {}]]}', "[" * 10**6, None,
                 '{"dict": [["a", {"tensor": "b"}]]}', '{"dict": [["a", {"tensor": 5}]]}'):  # fmt: skip
        metadata = {"spikezoo.state": "spikezoo-state/1"} | ({} if tree is None else {"tree": tree})
        save_file({"a": torch.ones(1)}, path, metadata)
        with pytest.raises(ValueError, match=r"is damaged|Cannot read"):
            load_state(path)
    for recipe in (5, [["fold_bn", 5]]):
        save_state(path, {"architecture": "x", "spikezoo": {"recipe": recipe}})
        with pytest.raises(ValueError, match="recipe is"):
            read_config(path)


# ------------------------------------------------------------------------------------- checkpoints of models


def made(name="test_mpbn_resnet", **arguments):
    """A micro-model with every number set so that all layers fire."""
    return fill(spikezoo.create_model(name, T=3, **arguments), gain=6).eval()


def load(folder, **arguments):
    return spikezoo.create_model(f"local-dir:{folder}", pretrained=True, **arguments)


def answers(model, **size):
    with torch.no_grad():
        return model.eval()(image_for(model, **size))


def settle(model, lift=0.0):
    """Take the statistics of the norms, layer after layer, from random images, with moderate scales and shifts.

    The lift of membrane norms lets more neurons fire.
    """
    images = torch.randn(4, *image_for(model).shape[1:])
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm | MembraneNorm)]
    model.train()
    with torch.no_grad():
        for module in norms:
            if module.weight is not None:
                module.weight.uniform_(1.2, 2.2)
                module.bias.uniform_(-0.2, 0.2)
                if isinstance(module, MembraneNorm):
                    module.bias.add_(lift)
        # In training every pass sees the same batch statistics: a few with a large momentum take them all. Membrane
        # norms see one after the other the T steps, which shall weigh about the same.
        momenta = [module.momentum for module in norms]
        for module in norms:
            module.momentum = 0.3 if isinstance(module, MembraneNorm) else 0.9
        for _ in range(4):
            model(images)
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
    model.eval()


def pruned(model):
    """Nine in ten weights of every convolution set to zero, the smallest ones."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                limit = module.weight.abs().flatten().quantile(0.9)
                module.weight.masked_fill_(module.weight.abs() < limit, 0)
    return model


def mask_a_channel(model):
    """Prune one channel of every layer that compact can take it out of."""
    parts = {"test_sew_resnet": "branch.0.", "test_qkformer": "fc1"}
    parts |= dict.fromkeys(("test_ms_resnet", "test_metaspikeformer"), "conv1.")
    parts["test_spikingresformer"] = "-"  # whose neurons all read sums and products
    part = parts.get(model.pretrained_cfg["architecture"])
    part = part or ("fc1" if hasattr(model, "has_patches") else "")
    for name, module in model.named_modules():
        if isinstance(module, SpikingNeuron) and part in name:
            module.mask = torch.arange(module.shape[0]) != 1


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders that nobody writes to: a dense, a sparse and a folded checkpoint."""
    models = {"dense": made(), "sparse": pruned(made()), "folded": apply(made(), "fold_mpbn")}
    root = tmp_path_factory.mktemp("checkpoints")
    for kind, model in models.items():
        spikezoo.save_checkpoint(model, root / kind, {"dataset": "cifar10", "top1": 12.5})
    formats = {kind: read_config(root / kind)["sparsity_config"]["format"] for kind in models}
    assert formats == {"dense": "dense", "sparse": "spikezoo-sparse", "folded": "dense"}
    return root


@pytest.fixture(params=["dense", "sparse", "folded"])
def folder(request, checkpoints, tmp_path):
    return shutil.copytree(checkpoints / request.param, tmp_path / "copy")


def refused(folder, *words):
    """Loading raises a ValueError with the words, and nothing else."""
    with pytest.raises(ValueError) as caught:
        load(folder)
    for word in words:
        assert word in str(caught.value)


CHAINS = [(), ("fold_bn",), ("fold_mpbn",), ("fold_mpbn", "fold_bn"), ("fold_bn", "fold_mpbn")]
CHAINS += [("ticket",), ("ticket", "bake"), ("ticket", "bake", "fold_bn"), ("ticket", "bake", "tune", "bake")]
CHAINS += [
    ("multisp",),
    ("multisp", "bake", "fold_bn"),
    ("dynsnn",),
    ("dynsnn", "compact"),
    ("prune",),
    ("ticket", "bake", "release"),
]
ROUND_TRIPS = [
    (name, mpbn, chain)
    for name in MICRO
    for mpbn in (None, "channel", "element")
    for chain in CHAINS
    if "fold_mpbn" not in chain or mpbn or "mpbn" in name
    if "multisp" not in chain or (name in PATCHED and mpbn != "element")
    if "fold_bn" not in chain or name not in BARE
    if not {"release", "prune"} & {*chain} or (name == "test_spiking_vgg" and mpbn == "channel")
    # A norm per element differs from one per channel where it is stored, folded or cut.
    if mpbn != "element" or not chain or {"fold_mpbn", "compact"} & {*chain}
    if "ticket" not in chain or name not in BARE or mpbn  # signed constants without any norm fire no spike
]


def test_round_trips_cover_every_transform():
    assert {name for _, _, chain in ROUND_TRIPS for name in chain} == set(TRANSFORMS)


@pytest.mark.parametrize(("name", "mpbn", "chain"), ROUND_TRIPS)
def test_round_trip_of_every_model_and_transform(tmp_path, name, mpbn, chain):
    # What is transformed needs no two blocks of a kind, where one is enough to fire down to the head.
    long = not chain or name in ("test_qkformer", "test_sdt", "test_sew_resnet")
    shorter = {} if long else SHORTER.get(name, {})
    model = pruned(made(name, **shorter, **({"mpbn": mpbn} if mpbn else {})))
    # Of some nets the drawn statistics of membrane norms let no difference between images reach the head.
    lift = 0.6 if mpbn == "channel" and name == "test_sdt" else 0.0
    if mpbn and name in ("test_plif", "test_sdt", "test_metaspikeformer"):
        settle(model, lift)
    for transform in chain:
        if transform == "compact":
            mask_a_channel(model)
        # Signed constants have no mean, and TET's linear layer no norm that would lift it to the threshold.
        given = {"exempt": ["neck.*"]} if transform == "ticket" and name == "test_spiking_resnet" else {}
        given |= {"layers": ["head.fc"]} if transform == "release" else {}
        given |= {"method": "deep_r", "sparsity": 0.2} if transform == "prune" else {}
        model = apply(model, transform, **given)
        if transform in ("ticket", "multisp"):
            settle(model, lift)  # other weights want other statistics, or nothing fires
    before = answers(model)
    assert (before[0] - before[1]).abs().max() > 0.05  # it fires down to the head, or all answers were equal
    loaded = load(spikezoo.save_checkpoint(model, tmp_path))
    same(loaded.recipe, [*model.recipe])
    assert [name for name, _ in loaded.recipe] == list(chain)
    assert loaded.T == 3 and loaded.mpbn == model.mpbn and loaded.neuron_config == model.neuron_config
    same(copy_of(loaded), copy_of(model))
    same(answers(loaded), before)


@pytest.mark.parametrize("changed", [{"in_chans": 1}, {"num_classes": 5}, {"in_chans": 1, "num_classes": 5}])
def test_baked_tickets_take_other_channels_and_classes(tmp_path, changed, caplog):
    # Fitted and fresh weights are not two values: their layer becomes an ordinary one, and the others stay.
    model = apply(made("test_spiking_vgg", ticket={"kind": "mpslt"}), "bake")
    spikezoo.save_checkpoint(model, tmp_path / "a")
    loaded = load(tmp_path / "a", **changed)
    layers = [{"in_chans": "stem.0.conv", "num_classes": "head.fc"}[key] for key in changed]
    assert set(loaded.recipe[-1][1]["layers"]) == set(layers) and loaded.recipe[-1][0] == "release"
    assert "starts afresh" in caplog.text or "was fitted" in caplog.text
    for name, weight in loaded.named_parameters():
        if weight.dim() > 1:
            ordinary = name.removesuffix(".weight") in layers
            assert weight.requires_grad == ordinary and (len(weight.abs().unique()) > 2) == ordinary, name
    spikezoo.save_checkpoint(loaded, tmp_path / "b")
    same(copy_of(load(tmp_path / "b")), copy_of(loaded))


def test_a_second_save_gives_the_same_bytes(tmp_path, folder):
    # Metadata of safetensors files come out of a hash map: without care their order is chance.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == {"config.json", "model.safetensors"}
    for _ in range(8):
        spikezoo.save_checkpoint(load(folder), tmp_path / "again", {"dataset": "cifar10", "top1": 12.5})
        assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before


def test_half_precision_storage(tmp_path):
    model = pruned(made())
    spikezoo.save_checkpoint(model, tmp_path, dtype=torch.float16)
    stored = load_sparse_file(tmp_path)
    for name, tensor in model.state_dict().items():
        half = tensor.is_floating_point() and tensor.dim() > 1
        same(stored[name], tensor.half() if half else tensor)
    loaded = load(tmp_path)
    for name, tensor in loaded.state_dict().items():
        same(tensor, stored[name].to(model.state_dict()[name].dtype))
    assert answers(loaded).isfinite().all()
    with torch.no_grad():
        model.stem[0].conv.weight[0, 0, 0, 0] = 1e5
    with pytest.raises(ValueError, match=r"float16 cannot hold the values of stem\.0\.conv\.weight"):
        spikezoo.save_checkpoint(model, tmp_path, dtype=torch.float16)
    with pytest.raises(ValueError, match="expected a floating-point type"):
        spikezoo.save_checkpoint(model, tmp_path, dtype=torch.int16)
    same(load_sparse_file(tmp_path), stored)


@pytest.mark.parametrize("sparse", [True, False])
def test_eight_bit_storage(tmp_path, sparse):
    model = pruned(made())
    spikezoo.save_checkpoint(model, tmp_path, dtype=torch.int8, sparse=sparse)
    layers = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    loaded = load(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        wanted = round_to_levels(tensor) if name in layers else tensor
        wanted = tensor.half().float() if name not in layers and tensor.dim() > 1 else wanted
        same(loaded[name], wanted)
    # Again: nothing is lost a second time.
    spikezoo.save_checkpoint(load(tmp_path), tmp_path / "again", dtype=torch.int8, sparse=sparse)
    files = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "again")]
    assert files[0] == files[1]
    with torch.no_grad():
        model.stem[0].conv.weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"int8 cannot hold the values of stem\.0\.conv\.weight"):
        spikezoo.save_checkpoint(model, tmp_path, dtype=torch.int8)


@pytest.mark.parametrize("transforms", [(), ("fold_mpbn", "fold_bn")])
def test_other_classes_start_the_classifier_afresh(tmp_path, caplog, transforms):
    model = made()
    for transform in transforms:
        model = apply(model, transform)
    spikezoo.save_checkpoint(model, tmp_path)
    torch.manual_seed(5)
    with caplog.at_level(logging.WARNING, logger="spikezoo"):
        loaded = load(tmp_path, num_classes=7)
    assert "classifier (head.fc.bias, head.fc.weight) starts afresh with 7 classes" in caplog.text
    torch.manual_seed(5)
    fresh = spikezoo.create_model(model.pretrained_cfg["architecture"], T=3, num_classes=7).state_dict()
    for name, tensor in loaded.state_dict().items():
        same(tensor, (fresh if name.startswith("head.") else model.state_dict())[name])
    assert answers(loaded).shape == (2, 7)
    caplog.clear()
    assert load(tmp_path, num_classes=10).num_classes == 10 and not caplog.text
    assert load(tmp_path, num_classes=0).num_classes == 0


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels_fit_the_first_convolution(tmp_path, caplog, channels):
    model = made()
    spikezoo.save_checkpoint(model, tmp_path)
    with caplog.at_level(logging.WARNING, logger="spikezoo"):
        loaded = load(tmp_path, in_chans=channels)
    assert f"stem.0.conv.weight was fitted to {channels} channels" in caplog.text
    wanted = copy_of(model)
    wanted["stem.0.conv.weight"] = adapt_input_conv(channels, wanted["stem.0.conv.weight"].clone())
    same(copy_of(loaded), wanted)
    assert loaded.in_chans == channels


@pytest.mark.parametrize(("trained", "wanted"), [(1, 3), (1, 2), (2, 1), (2, 4)])
def test_nets_of_other_than_three_channels_are_fitted_too(tmp_path, trained, wanted):
    # An image whose channels are all the same has one answer, however many there are.
    model = fill(spikezoo.create_model("test_spiking_vgg", in_chans=trained)).eval()
    spikezoo.save_checkpoint(model, tmp_path)
    loaded = load(tmp_path, in_chans=wanted).eval()
    grey = torch.rand(2, 1, *model.img_size)
    stems = [m.stem[0].conv(grey.expand(-1, m.in_chans, -1, -1)) for m in (model, loaded)]
    torch.testing.assert_close(stems[1], stems[0])


def test_time_steps_are_the_checkpoints_unless_given(tmp_path):
    for T in (1, 6):
        spikezoo.save_checkpoint(fill(spikezoo.create_model("test_spiking_resnet", T=T)), tmp_path)
        assert load(tmp_path).T == T and load(tmp_path, T=2).T == 2
        by_path = spikezoo.create_model("test_spiking_resnet", checkpoint_path=tmp_path)
        assert by_path.T == T


def test_names_that_are_none_of_the_classes(tmp_path, caplog):
    model = spikezoo.create_model("test_spiking_vgg", num_classes=2)
    for names, kept in ((["cat", "dog"], ("cat", "dog")), (["cat"], None), ("cats", None), (["cat", 3], None)):
        model.pretrained_cfg["label_names"] = names
        spikezoo.save_checkpoint(model, tmp_path)
        caplog.clear()
        loaded = spikezoo.create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert loaded.pretrained_cfg.get("label_names") == kept
        assert ("its label_names are no 2 names and are left out" in caplog.text) == (kept is None)


def test_arguments_come_back(tmp_path):
    arguments = {"neuron": "plif", "tau": 3.0, "threshold": 0.7, "reset": "soft", "num_classes": 4, "in_chans": 2}
    model = fill(spikezoo.create_model("test_mpbn_resnet", mpbn="element", img_size=24, **arguments))
    loaded = load(spikezoo.save_checkpoint(model, tmp_path))
    assert loaded.neuron_config == model.neuron_config and loaded.img_size == (24, 24) and loaded.mpbn == "element"
    same(copy_of(loaded), copy_of(model))


def test_features_and_devices(folder):
    model = load(folder)
    x = image_for(model)
    with torch.no_grad():
        wanted = model.eval().forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        found = load(folder, features_only=True, out_indices=(0, 2)).eval()(x)
    same(list(found), list(wanted))
    placed = load(folder, device="cpu", dtype=torch.float64) if not model.recipe else load(folder, device="cpu")
    assert {tensor.device.type for tensor in placed.state_dict().values()} == {"cpu"}
    expected = torch.float32 if model.recipe else torch.float64
    assert next(placed.parameters()).dtype == expected


# -------------------------------------------------------------------------------------- damaged checkpoints


def flip(data, bit):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@pytest.mark.parametrize(("file", "count"), [("model.safetensors", 200), ("config.json", 200)])
def test_a_flipped_bit_never_loads(folder, file, count):
    # 1,050 bits of three checkpoints; half of those in the weights' file in its header.
    path = folder / file
    whole, bits = path.read_bytes(), random.Random(file)
    if file == "model.safetensors" and read_config(folder)["spikezoo"]["recipe"]:
        count //= 4  # folding anew, before the weights are looked at, takes ten times as long as all the rest
    header = 8 * (8 + int.from_bytes(whole[:8], "little")) if file == "model.safetensors" else 8 * len(whole)
    for position in range(count):
        path.write_bytes(flip(whole, bits.randrange(header if position % 2 else 8 * len(whole))))
        refused(folder)
    path.write_bytes(whole)
    load(folder)


def test_every_bit_of_a_config(checkpoints, tmp_path):
    path = shutil.copytree(checkpoints / "sparse", tmp_path / "copy") / "config.json"
    whole = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for bit in range(8 * len(whole)):
            os.pwrite(file.fileno(), bytes([whole[bit // 8] ^ 1 << bit % 8]), bit // 8)
            with pytest.raises(ValueError, match=r"config\.json"):
                read_config(path.parent)
            os.pwrite(file.fileno(), whole[bit // 8 : bit // 8 + 1], bit // 8)
    assert path.read_bytes() == whole


def test_a_flipped_bit_that_changes_no_value(tmp_path):
    # 1e-05 and 1E-05 are one number: such a flip is no damage, and the only kind that is read.
    spikezoo.save_checkpoint(made(), tmp_path, {"lr": 1e-05})
    before, path = read_config(tmp_path), tmp_path / "config.json"
    path.write_text(path.read_text().replace("1e-05", "1E-05"))
    assert read_config(tmp_path) == before
    path.write_text(path.read_text().replace("1E-05", "1E-04"))
    refused(tmp_path, "not as it was written")


def test_flipped_bits_of_weights_alone(checkpoints, tmp_path):
    # Without a config.json the file's own hash stands for all tensors; what it does not cover changes none.
    whole = (checkpoints / "sparse" / "model.safetensors").read_bytes()
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole)
    wanted, read = load_sparse_file(path), 0
    header = 8 * (8 + int.from_bytes(whole[:8], "little"))
    for bit in random.Random(0).sample(range(header), 300) + random.Random(1).sample(range(8 * len(whole)), 100):
        path.write_bytes(flip(whole, bit))
        try:
            found = load_sparse_file(path)
        except ValueError:
            continue
        read += 1
        assert found.keys() == wanted.keys()
        for name in found:
            same(found[name], wanted[name])
    assert read < 20


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_truncated_and_lengthened_checkpoints(folder, file):
    path = folder / file
    whole = path.read_bytes()
    lengths = {1, 7, 8, 9, 100, len(whole) - 8, len(whole) - 2}
    lengths |= set(range(0, len(whole) - 1, len(whole) // 6))  # without its last byte, a line end, JSON is whole
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        refused(folder, file)
    for more in (b"\0", b"x", b"}", whole):
        path.write_bytes(whole + more)
        refused(folder, file)
    for other in (b"<!DOCTYPE html><html></html>", b"\n <html>"):
        path.write_bytes(other)
        refused(folder, file, "web page")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(folder, file, "Git LFS pointer", "git lfs pull")


def test_weights_of_another_checkpoint(folder, tmp_path):
    other = spikezoo.save_checkpoint(made(num_classes=10, mpbn="element"), tmp_path / "other")
    shutil.copy(other / "model.safetensors", folder)
    refused(folder, "model.safetensors is damaged: its sha256 is")


def edited(folder, edit):
    """Change the config and its hash, as whoever forges one can."""
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    if isinstance(config.get("spikezoo"), dict):
        config["spikezoo"]["sha256"]["config.json"] = config_hash(config)
    (folder / "config.json").write_text(json.dumps(config))


def block(**changes):
    return lambda config: config["spikezoo"].update(changes)


def top(**changes):
    return lambda config: config.update(changes)


PAIRS = "Expected pairs such as ['fold_bn', {}]"
EDITS = {
    "future version": (block(version=2), "format version 2; this spikezoo reads 1. Update it"),
    "version of another type": (block(version="1"), "format version '1'"),
    "block null": (top(spikezoo=None), "format version None"),
    "block list": (top(spikezoo=[]), "format version None"),
    "no block": (lambda config: config.pop("spikezoo"), "has lost its 'spikezoo' block"),
    "unknown format": (
        top(sparsity_config={"format": "sparse-bitmask"}),
        "'sparse-bitmask'. Valid: dense",
    ),
    "format of another type": (top(sparsity_config={"format": ["dense"]}), "sparsity_config.format is ['dense']"),
    "format null": (top(sparsity_config=None), "sparsity_config.format is None"),
    "hash of another type": (lambda c: c["spikezoo"]["sha256"].update({"model.safetensors": 5}), "config.json says 5"),
    "no hash": (lambda c: c["spikezoo"]["sha256"].pop("model.safetensors"), "does not hold the sha256"),
    "unknown transform": (block(recipe=[["fold_mpnb", {}]]), "Unknown transform 'fold_mpnb'. Did you mean"),
    "unknown argument": (block(recipe=[["fold_mpbn", {"x": 1}]]), "has no argument 'x'. It takes none"),
    "recipe number": (block(recipe=5), PAIRS),
    "recipe null": (block(recipe=None), PAIRS),
    "recipe string": (block(recipe="fold_bn"), PAIRS),
    "recipe of strings": (block(recipe=["fold_bn"]), PAIRS),
    "recipe of lists": (block(recipe=[["fold_bn", []]]), PAIRS),
    "recipe of triples": (block(recipe=[["fold_bn", {}, 1]]), PAIRS),
    "recipe without a name": (block(recipe=[[["fold_bn"], {}]]), PAIRS),
    "other transform": (block(recipe=[["fold_bn", {}]]), "does not fit SpikingResNet, nothing was loaded"),
    "more transforms": (block(recipe=[["fold_mpbn", {}], ["fold_bn", {}]]), "does not fit SpikingResNet"),
    "transform twice": (block(recipe=[["fold_mpbn", {}]] * 2), "fold_mpbn was applied already"),
    "unknown architecture": (top(architecture="test_mpbn_resnett"), "Did you mean 'test_mpbn_resnet'"),
    "other architecture": (top(architecture="test_spiking_resnet"), ""),
    "no architecture": (lambda config: config.pop("architecture"), "no config.json that names its architecture"),
    "architecture of another type": (top(architecture=5), "no config.json that names its architecture"),
    "arguments list": (top(model_args=[1]), "model_args is [1]. Expected an object"),
    "arguments null": (top(model_args=None), "model_args is None"),
    "unknown argument of the model": (top(model_args={"bogus": 1}), "has no argument 'bogus'"),
    "T of another type": (top(model_args={"T": "4"}), "T='4': expected an integer >= 1"),
    "other channels": (top(model_args={"in_chans": 5}), "1 of another shape"),
    "facts of another type": (top(pretrained_cfg=3), "pretrained_cfg is 3. Expected an object"),
    "inputs of another type": (block(inputs=3), "inputs is 3. Expected an object"),
    "inputs without a mean": (block(inputs={"std": [1.0]}), "the mean of the inputs is None. Expected a list"),
    "a mean of texts": (block(inputs={"mean": ["x"], "std": [1.0]}), "the mean of the inputs is ['x']"),
    "results of another type": (block(results=[1]), "results is [1]. Expected an object"),
    "dataset of another type": (block(dataset=3), "dataset is 3. Expected a name"),
}


@pytest.mark.parametrize("case", EDITS)
def test_edited_configs(folder, case):
    edit, words = EDITS[case]
    edited(folder, lambda config: None)
    load(folder)  # the hash that is made here is right
    edited(folder, edit)
    refused(folder, words)


@pytest.mark.parametrize("text", ["[1]", "5", "null", '"x"', "[" * 10**6, '{"a": ' + "9" * 10**4 + "}", "{}", "\0"])
def test_configs_that_are_something_else(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


def test_recipe_lost_from_a_folded_checkpoint(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "folded", tmp_path / "copy")
    edited(folder, block(recipe=[]))
    refused(folder, "does not fit", "36 missing, 18 unexpected", "the same transforms")
    edited(folder, block(recipe=[["fold_mpbn", {}]]))
    assert load(folder).recipe == [("fold_mpbn", {})]


def test_unknown_version_of_the_sparse_code(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "sparse", tmp_path / "copy")
    path = folder / "model.safetensors"
    with open_tensors(path) as file:
        facts = json.loads(file.metadata()[METADATA_KEY])
    save_file(load_file(path), path, {METADATA_KEY: json.dumps({**facts, "version": 2})})
    refused(folder, "its sha256 is")
    edited(folder, lambda config: config["spikezoo"]["sha256"].update({"model.safetensors": file_hash(path)}))
    refused(folder, "format version 2; this spikezoo reads version 1. Update spikezoo")
    save_file(load_file(path), path)  # its metadata lost, its hash forged
    edited(folder, lambda config: config["spikezoo"]["sha256"].update({"model.safetensors": file_hash(path)}))
    refused(folder, "holds sparse tensors (*.bitmask)")


def test_levels_whose_mark_is_lost(tmp_path):
    path = tmp_path / "model.safetensors"
    weights = round_to_levels(torch.randn(64, 64))
    stored, metadata = encode({"a": weights})
    assert stored.keys() == {"a.levels", "a.scale"}  # without a bitmask
    save_file(stored, path, metadata)
    same(load_sparse_file(path)["a"], weights)
    save_file(stored, path)
    with pytest.raises(ValueError, match=r"holds sparse tensors \(\*\.levels\)"):
        load_sparse_file(path)


def test_numbers_that_are_none(tmp_path, folder):
    model = load(folder)
    with torch.no_grad():
        model.stages[0][0].conv1.conv.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not numbers \(NaN\)\. In: stages\.0\.0\.conv1\.conv\.weight"):
        spikezoo.save_checkpoint(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    config = read_config(folder)
    write_checkpoint(folder, model.state_dict(), config)
    refused(folder, "not numbers (NaN)", "stages.0.0.conv1.conv.weight")


def test_a_folder_with_only_a_pickle(tmp_path):
    model = made()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    shown = str(tmp_path / "weights.pth")
    for attempt in (
        lambda: load(tmp_path),
        lambda: spikezoo.create_model("test_mpbn_resnet", checkpoint_path=tmp_path),
        lambda: load_sparse_file(tmp_path),
    ):
        with pytest.raises(FileNotFoundError, match="a pickle can run code") as caught:
            attempt()
        assert shown in str(caught.value)
    loaded = spikezoo.create_model("test_mpbn_resnet", checkpoint_path=shown)
    same(copy_of(loaded), copy_of(model))


# ----------------------------------------------------------------------------------------- faults in writing


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def half_a_file(error):
    def write(_tensors, file, _metadata):
        file.write_bytes(b"half of it")
        raise error

    return write


FAULTS = {
    "weights, no room": ("save_file", half_a_file(OSError(errno.ENOSPC, "No space left on device"))),
    "weights, forbidden": ("save_file", half_a_file(PermissionError(errno.EACCES, "Permission denied"))),
    "config, no room": ("write_config", half_a_file(OSError(errno.ENOSPC, "No space left on device"))),
    "interrupted": ("write_config", half_a_file(KeyboardInterrupt())),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_in_writing_leave_no_trace(folder, tmp_path, monkeypatch, case):
    before, old = content(folder), answers(load(folder))
    if case.startswith(("config", "interrupted")):
        fault = FAULTS[case][1]
        monkeypatch.setattr(weights, FAULTS[case][0], lambda path, config, weights: fault(None, path, None))
    else:
        monkeypatch.setattr(files, *FAULTS[case])
    for target in (folder, tmp_path / "new"):
        with pytest.raises((OSError, KeyboardInterrupt)):
            spikezoo.save_checkpoint(made("test_spiking_vgg"), target)
    monkeypatch.undo()
    assert content(folder) == before and not content(tmp_path / "new")
    same(answers(load(folder)), old)


@pytest.mark.parametrize("fails", [1, 2])
def test_a_crash_between_the_renames(checkpoints, tmp_path, monkeypatch, fails):
    model, replace, calls = made("test_mpbn_resnet", mpbn="element"), os.replace, []

    def crash(*paths):
        calls.append(paths)
        if len(calls) == fails:
            raise OSError("power failure")
        replace(*paths)

    old = shutil.copytree(checkpoints / "dense", tmp_path / "old")
    results = shutil.copytree(checkpoints / "dense", tmp_path / "results")
    same_weights = load(results)
    monkeypatch.setattr(os, "replace", crash)
    for target, source in ((old, model), (tmp_path / "new", model), (results, same_weights)):
        calls.clear()
        with pytest.raises(OSError, match="power failure"):
            spikezoo.save_checkpoint(source, target, {"top1": 99.0})
    monkeypatch.undo()
    assert not [name for target in (old, results) for name in content(target) if name.endswith(".tmp")]
    # The same weights with other results: what is there is whole, and says what it said.
    assert read_config(results)["spikezoo"]["results"] == {"top1": 12.5}
    same(copy_of(load(results)), copy_of(same_weights))
    if fails == 1:
        assert content(old) == content(checkpoints / "dense") and not content(tmp_path / "new")
        return
    refused(old, "model.safetensors is damaged: its sha256 is")
    refused(tmp_path / "new", "no config.json that names its architecture")
    spikezoo.save_checkpoint(model, old)  # and saving again mends it
    same(copy_of(load(old)), copy_of(model))


def test_saving_changes_neither_model_nor_random_numbers(tmp_path):
    model = made().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    spikezoo.save_checkpoint(model, tmp_path)
    same(dict(model.state_dict()), dict(before))
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_messages_tell_what_a_file_is(tmp_path):
    model = spikezoo.create_model("test_spiking_vgg")
    spikezoo.save_checkpoint(model, tmp_path)

    def load(path, **kwargs):
        return spikezoo.create_model("test_spiking_vgg", checkpoint_path=path, **kwargs)

    torch.save(model.state_dict(), tmp_path / "W.PTH")
    assert load(tmp_path / "W.PTH").T == model.T
    (tmp_path / "W.PTH").rename(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"It is a pickle: give it the name w\.pth"):
        load(tmp_path / "w.safetensors")
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"no pickle but a safetensors file") as caught:
        load(tmp_path / "x.pth")
    assert "weights_only" not in str(caught.value)  # torch's advice to run whatever the file says
    with pytest.raises(ValueError, match="holds no weights: give its folder"):
        load(tmp_path / "config.json")
    with pytest.raises(ValueError, match="give checkpoint_path="):
        spikezoo.create_model("test_spiking_vgg", use_ema=True)
    with pytest.raises(ValueError, match="expected a folder after the colon"):
        spikezoo.create_model("local-dir:", pretrained=True)
    for name in ("./run", "org/name", "HF-HUB:org/name", "https://huggingface.co/org/name"):
        with pytest.raises(ValueError, match=r"local-dir:FOLDER.*hf-hub:ORG/NAME"):
            spikezoo.create_model(name, pretrained=True)
