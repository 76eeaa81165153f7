"""The factory: what weights bring along and what may differ, typos, forged files, foreign trainers' files, damage."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file
from test_models import fill

import spikezoo
from spikezoo.checkpoint import (
    Config,
    load_state,
    read_weights,
    save_state,
    stored_numbers,
    write_checkpoint,
)
from spikezoo.checks import UnknownArgumentError
from spikezoo.factory import create_from

NET = "test_spiking_vgg"


@pytest.fixture
def folder(tmp_path):
    return spikezoo.save_checkpoint(spikezoo.create_model(NET, T=3, num_classes=4), tmp_path / "net")


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def load(folder, **arguments):
    return spikezoo.create_model(f"local-dir:{folder}", pretrained=True, **arguments)


# ---------------------------------------------------------------------------------------------- what is asked for


def test_a_tag_may_stand_in_pretrained():
    named = spikezoo.create_model("spiking_mlp_340.mnist_dynsnn", True)
    for model in (
        spikezoo.create_model("spiking_mlp_340", "mnist_dynsnn"),
        spikezoo.create_model("spiking_mlp_340.mnist_dynsnn", pretrained="mnist_dynsnn"),
    ):
        assert model.recipe == named.recipe and model.recipe
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), named.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "tag", "message"),
    [
        ("spiking_mlp_340", "mnist_dynsn", "Unknown tag 'mnist_dynsn'"),
        ("spiking_mlp_340.mnist", "mnist_dynsnn", "pretrained='mnist_dynsnn' with the name 'spiking_mlp_340.mnist'"),
        ("local-dir:x", "mnist", "a tag goes with the name of an architecture"),
    ],
)
def test_a_tag_that_does_not_fit(name, tag, message):
    with pytest.raises(ValueError, match=message):
        spikezoo.create_model(name, pretrained=tag)


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        ({"t": 4}, "'T'"),
        ({"pretrain": True}, "'pretrained'"),
        ({"checkpoint": "x"}, "'checkpoint_path'"),
        ({"Ema": 1}, ""),
    ],
)
def test_typos_name_the_parameters_too(arguments, nearest):
    with pytest.raises(UnknownArgumentError, match=f"Did you mean {nearest}"):
        spikezoo.create_model(NET, **arguments)


def test_mpbn_takes_names():
    with pytest.raises(ValueError, match="mpbn=True: expected one of 'none', 'channel', 'element'"):
        spikezoo.create_model(NET, mpbn=True)
    assert spikezoo.create_model(NET, mpbn=False).mpbn is None


def test_the_nearest_relative_with_weights_comes_first():
    for name, relative in (("autost_base", "autost_tiny.cifar10"), ("spiking_vgg11", "spiking_vgg9.cifar10")):
        with pytest.raises(ValueError, match=rf"no pretrained weights\. The nearest relative that has is '{relative}'"):
            spikezoo.create_model(name, pretrained=True)


# ------------------------------------------------------------------------------------------- what weights bring


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"T": 6}, "T=6 instead of 3"),
        ({"threshold": 2.0}, "threshold=2.0 instead of 1.0"),
        ({"neuron": "if"}, "neuron='if' instead of 'lif'"),
    ],
)
def test_other_time_steps_and_neurons_than_trained_are_said(folder, caplog, changes, told):
    model = load(folder, **changes)
    assert told in caplog.text and "measure it again" in caplog.text
    assert all(getattr(model, key, None) == value for key, value in changes.items() if key == "T")


def test_what_was_trained_is_not_said(folder, caplog):
    load(folder, T=3, threshold=1.0, surrogate="arctan")
    assert not caplog.text


def test_weights_without_a_config_say_so(folder, caplog):
    (folder / "config.json").unlink()
    spikezoo.create_model(NET, num_classes=4, checkpoint_path=folder)
    assert "no config.json says how these weights were trained" in caplog.text and "T=4" in caplog.text


def test_facts_of_the_weights_come_back(tmp_path):
    model = spikezoo.create_model(NET, num_classes=2)
    facts = {"crop_pct": 0.7, "interpolation": "nearest", "label_names": ("cat", "dog")}
    model.pretrained_cfg = {**model.pretrained_cfg, **facts}
    model.inputs = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    spikezoo.save_checkpoint(model, tmp_path)
    loaded = load(tmp_path)
    assert facts.items() <= loaded.pretrained_cfg.items() and loaded.inputs == model.inputs
    assert loaded.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    assert loaded.pretrained_cfg["num_classes"] == 2 and loaded.pretrained_cfg["input_size"] == (3, *loaded.img_size)
    other = load(tmp_path, num_classes=5, in_chans=1)  # of other classes and channels these are not known
    assert not other.inputs and other.pretrained_cfg.get("label_names") is None
    assert other.pretrained_cfg["crop_pct"] == 0.7 and other.pretrained_cfg["input_size"][0] == 1


def test_a_run_of_ones_own_has_no_tag_of_ours(tmp_path):
    spikezoo.save_checkpoint(spikezoo.create_model("spiking_mlp_340"), tmp_path, {"dataset": "digits"})
    assert "tag" not in json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]


def test_create_from_another_network_of_the_layout(tmp_path):
    twin = fill(spikezoo.create_model("test_mpbn_vgg", neuron="relu", num_classes=4), gain=2)
    spikezoo.save_checkpoint(twin, tmp_path)
    model = create_from("test_mpbn_vgg", tmp_path, neuron="plif", mpbn="channel", T=2)
    assert (model.T, model.mpbn, model.num_classes, model.neuron_config.kind) == (2, "channel", 4, "plif")
    own, theirs = copy_of(model), copy_of(twin)
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.items())
    fresh = own.keys() - theirs.keys()
    assert fresh and all(name.rpartition(".")[0].endswith("norm") or name.endswith(".w") for name in fresh)
    with pytest.raises(ValueError, match="is a checkpoint of 'test_mpbn_vgg'"):
        spikezoo.create_model(NET, checkpoint_path=tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        create_from("test_mpbn_resnet", tmp_path)


# ------------------------------------------------------------------------------------------------ hostile files


def forge(folder, state, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= changes
    write_checkpoint(folder, state, config)


@pytest.mark.parametrize(
    "changes", [{"T": 10**12}, {"num_classes": 10**9}, {"hidden": [[10**12]]}, {"in_chans": 2**40}]
)
def test_absurd_arguments_are_refused_as_arguments(folder, changes):
    forge(folder, copy_of(load(folder)), **changes)
    with pytest.raises(ValueError, match=rf"{next(iter(changes))}=.*no net is that large"):
        load(folder)


def test_a_config_that_asks_for_more_than_its_weights(folder):
    forge(folder, copy_of(load(folder)), hidden=[2**16, 2**16])
    with pytest.raises(ValueError, match=r"holds .* numbers, and its arguments .* make a net of .*: they do not"):
        load(folder)


def test_a_decompression_bomb_is_not_decoded(folder):
    state = copy_of(load(folder))
    size = (folder / "model.safetensors").stat().st_size
    name = next(name for name, tensor in state.items() if tensor.dim() > 1)
    write_checkpoint(
        folder, {**state, name: torch.zeros(2**14, 2**13)}, json.loads((folder / "config.json").read_text())
    )
    assert (folder / "model.safetensors").stat().st_size < 2 * size + 2**16 < 2**27 < stored_numbers(folder)
    for door in (lambda: load(folder), lambda: spikezoo.load_sparse_file(folder)):
        with pytest.raises(ValueError, match=r"Its masks ask for 134,[\d,]+ numbers, where at most"):
            door()


# ------------------------------------------------------------------------------------------- foreign trainers


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_names_come_off(tmp_path, prefix, suffix):
    weights = {"0.weight": torch.ones(2, 2), "module.bias": torch.ones(2)}
    path = tmp_path / f"a.{suffix}"
    (torch.save if suffix == "pth" else save_file)({prefix + name: value for name, value in weights.items()}, path)
    assert read_weights(path).keys() == weights.keys()


@pytest.mark.parametrize("key", ["state_dict", "model", "net", "model_state_dict"])
def test_weights_stand_under_many_names(tmp_path, key):
    torch.save({"epoch": 3, key: {"w": torch.ones(2)}}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth")["w"].sum() == 2


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_averaged_weights_of_timm(tmp_path, key):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {"w": torch.ones(2)}, key: {"module.w": torch.zeros(2)}}, path)
    assert read_weights(path)["w"].sum() == 2 and read_weights(path, ema=True)["w"].sum() == 0
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 1}, path)
    with pytest.raises(ValueError, match=r"holds no averaged weights.*It holds state_dict, epoch"):
        read_weights(path, ema=True)


def test_unknown_pickles_name_their_keys(tmp_path):
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"holds no state dict.*It holds epoch, optimizer"):
        read_weights(tmp_path / "a.pth")


def test_home_folders_and_weights_in_parts(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/net").T == spikezoo.create_model(NET, num_classes=4, checkpoint_path="~/net").T == 3
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "model.safetensors.index.json").write_text("{}")
    save_file({"a": torch.ones(1)}, parts / "model-00001-of-00002.safetensors")
    for path in (parts, parts / "model.safetensors.index.json"):
        with pytest.raises((FileNotFoundError, ValueError), match="weights in several parts"):
            read_weights(path)


# ------------------------------------------------------------------------------------------------------ damage


def state_of(epoch, batch=0):
    return {"architecture": NET, "epoch": epoch, "batch": batch, "model": {"w": torch.randn(64)}, "text": "0" * 64}


def test_every_flip_of_a_training_state_is_refused(tmp_path):
    path = tmp_path / "last.safetensors"
    save_state(path, state_of(3))
    whole, dice = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(9), *dice.sample(range(header), 150), *dice.sample(range(header, len(whole)), 50)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= dice.randrange(1, 256)
        path.write_bytes(damaged)
        for door in (load_state, read_weights, lambda path: load_state(path, "epoch"), spikezoo.load_sparse_file):
            with pytest.raises(ValueError):
                door(path)
    path.write_bytes(whole)
    assert load_state(path)["text"] == "0" * 64


def test_states_of_the_version_before_are_read(tmp_path):
    path = tmp_path / "last.safetensors"
    tree = {"dict": [["epoch", {"value": 2}], ["model", {"dict": [["w", {"tensor": "state.model.w"}]]}]]}
    metadata = {"format": "pt", "spikezoo.state": "spikezoo-state/1", "tree": json.dumps(tree)}
    save_file({"state.model.w": torch.ones(2)}, path, metadata)
    assert load_state(path)["epoch"] == 2 and read_weights(path)["w"].sum() == 2
    save_file({}, path, {**metadata, "spikezoo.state": "spikezoo-state/9"})
    with pytest.raises(ValueError, match=r"not a training state of this version .*--initial-checkpoint"):
        load_state(path)


def test_a_config_of_anything_reads(folder):
    config = Config.read(folder)
    assert (config.architecture, config.model_args["T"], config.recipe, config.version) == (NET, 3, [], 1)
    assert Config.of({}) == Config()
