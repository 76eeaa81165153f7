"""Tests of spikezoo's doors: the registry, timm's functions on our names, messages, import and torch.hub."""

import importlib.util
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import spikezoo
from spikezoo import evaluate, factory, registry
from spikezoo.checks import UnknownArgumentError
from spikezoo.models.spiking_vgg import SpikingVGG
from spikezoo.registry import _rows, register_rows

ROOT = Path(__file__).resolve().parent.parent
MICRO = "test_mpbn_vgg"


# --------------------------------------------------------------------------------------------------------------
# Finding
# --------------------------------------------------------------------------------------------------------------


def test_list_models():
    names = spikezoo.list_models()
    assert sorted(names) == sorted(_rows) and len(set(names)) == len(names)
    assert {"mpbn_resnet20", "spiking_conv4", "test_mpbn_resnet"} <= set(names)
    assert not [name for name in names if not spikezoo.is_model(name)]
    # Nothing of timm's own, not even where the wildcard fits.
    assert "resnet18" in timm.list_models("*resnet18") and "resnet18" not in spikezoo.list_models("*resnet18")
    # timm's natural order: 9 before 11.
    assert spikezoo.list_models("spiking_vgg*") == ["spiking_vgg9", "spiking_vgg11", "spiking_vgg16"]


def test_list_models_filters():
    assert spikezoo.list_models("mpbn_resnet*") == [f"mpbn_resnet{depth}" for depth in (18, 19, 20, 34)]
    assert spikezoo.list_models(["mpbn_vgg*", "spiking_conv?"]) == ["mpbn_vgg16", "spiking_conv4"]
    assert spikezoo.list_models("nothing_like_it") == []
    vggs = spikezoo.list_models(module="spiking_vgg")
    assert "mpbn_vgg16" in vggs and "mpbn_resnet20" not in vggs
    assert spikezoo.list_models("mpbn_*", module="spiking_vgg") == ["mpbn_vgg16"]
    with pytest.raises(ValueError, match=r"Unknown module 'spiking_vg'. Did you mean 'spiking_vgg'"):
        spikezoo.list_models(module="spiking_vg")


def test_timm_lists_ours_apart_from_its_own():
    ours = timm.list_models(module="spiking_resnet")
    assert {"mpbn_resnet20", "spiking_resnet19", "test_mpbn_resnet"} <= set(ours) <= set(_rows)
    families = {spikezoo.model_info(name).family for name in _rows}
    for family in families:
        assert set(timm.list_models(module=family)) <= set(_rows)
    for module in ("resnet", "vgg"):
        theirs = timm.list_models(module=module)
        assert theirs and not set(theirs) & set(_rows)


def test_is_model():
    assert spikezoo.is_model("mpbn_resnet20") and timm.is_model("mpbn_resnet20")
    for name in ("resnet18", "mpbn_resnet91", "", None, 3):
        assert not spikezoo.is_model(name)


def test_list_pretrained(monkeypatch):
    tags = [f"{name}.{tag}" for name, row in _rows.items() for tag in row.weights]
    assert sorted(found.name for found in spikezoo.list_pretrained()) == sorted(tags)
    assert spikezoo.list_pretrained("nothing_like_it") == []
    row = next(row for row in spikezoo.list_pretrained("spiking_mlp_340*"))
    assert spikezoo.create_model(row, pretrained=True).T == row.T
    assert spikezoo.list_models(pretrained=True) == [found.name for found in spikezoo.list_pretrained()]


@pytest.mark.parametrize("name", sorted(_rows))
def test_model_info(name):
    row, info = _rows[name], spikezoo.model_info(name)
    assert info.name == name and info.parameters == row.parameters > 0
    assert info.note == row.note and info.note.strip() and info.paper.strip()
    assert (ROOT / "spikezoo" / "models" / f"{info.family}.py").is_file()
    assert info.input_size == (row.in_chans, row.img_size, row.img_size)
    assert info.num_classes == row.num_classes and info.T >= 1
    assert info.pretrained == sorted(f"{name}.{tag}" for tag in row.weights)
    if name.startswith("mpbn_"):
        assert info.mpbn == "channel"
    if name.startswith("spiking_"):
        assert info.mpbn is None
    # What help(timm.models....) and timm's cards show.
    entry = timm.model_entrypoint(name)
    assert entry.__name__ == name and row.note in entry.__doc__ and f"{row.parameters:,}" in entry.__doc__
    cfg = timm.get_pretrained_cfg(name)
    # Weights that come with the package may be for other data.
    if not row.weights:
        assert cfg.input_size == info.input_size and cfg.num_classes == info.num_classes
    assert cfg.description == row.note and cfg.paper_name == row.paper


def test_docs_have_a_row_of_every_model():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = text.partition("<!-- models -->")[2].partition("<!-- /models -->")[0]
    rows = [line.split(" | ")[:2] for line in table.splitlines() if line.startswith("| `")]
    wanted = [[f"| `{n}`", f"{_rows[n].parameters:,}"] for n in spikezoo.list_models() if not n.startswith("test_")]
    assert rows == wanted, "python -m tools.models writes the table."


# --------------------------------------------------------------------------------------------------------------
# Creating
# --------------------------------------------------------------------------------------------------------------


def test_create_model_through_both_doors():
    ours = spikezoo.create_model("test_mpbn_resnet", T=3, num_classes=7, in_chans=1, img_size=16)
    theirs = timm.create_model("test_mpbn_resnet", T=3, num_classes=7, in_chans=1, img_size=16)
    assert type(ours) is type(theirs) and ours.training and theirs.training
    assert (ours.T, ours.num_classes, ours.in_chans, ours.img_size) == (3, 7, 1, (16, 16))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert ours.pretrained_cfg["architecture"] == "test_mpbn_resnet"


def test_none_takes_the_default():
    plain = spikezoo.create_model(MICRO)
    given = spikezoo.create_model(
        MICRO, num_classes=None, in_chans=None, img_size=None, T=None, mpbn=None, threshold=None, neuron=None,
        decay=None, drop_rate=None, device=None, checkpoint_path=None,
    )  # fmt: skip
    for name in ("T", "num_classes", "in_chans", "img_size", "mpbn", "neuron_config", "drop_rate"):
        assert getattr(given, name) == getattr(plain, name)
    assert plain.mpbn == "channel" and plain.T == 4
    assert spikezoo.create_model(MICRO, mpbn=False).mpbn is spikezoo.create_model(MICRO, mpbn="none").mpbn is None
    assert spikezoo.create_model("test_spiking_vgg", mpbn="channel").mpbn == "channel"


def test_neuron_arguments_arrive():
    model = spikezoo.create_model(MICRO, decay=0.7, threshold=0.4, reset="soft", surrogate="arctan", detach_reset=True)
    config = model.neuron_config
    assert (config.decay, config.threshold, config.reset, config.surrogate) == (0.7, 0.4, "soft", "arctan")
    assert config.detach_reset and config.firing == ">"  # the family's own constant stays
    neurons = [m for m in model.modules() if hasattr(m, "config")]
    assert neurons and all(m.config == config for m in neurons)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mpbn_resnet91", "Unknown model 'mpbn_resnet91'. Did you mean .*'mpbn_resnet19'"),
        ("mpbn-resnet20", "Did you mean 'mpbn_resnet20'"),
        ("resnet18", "Unknown model 'resnet18'.*spikezoo.list_models()"),
        ("", "Unknown model ''. Valid: "),
        (None, "Model name None: expected a string such as 'mpbn_resnet20'"),
        ("mpbn_resnet20.no_such_tag", "Unknown tag 'no_such_tag' of model 'mpbn_resnet20'. "),
    ],
)
def test_unknown_names(name, message):
    for door in (spikezoo.create_model, spikezoo.model_info):
        with pytest.raises(ValueError, match=message):
            door(name)


def test_unknown_tag_names_the_valid_ones(monkeypatch):
    with_weights = replace(_rows[MICRO], weights={"cifar10": {}, "cifar100": {}})
    monkeypatch.setitem(registry._rows, MICRO, with_weights)
    with pytest.raises(ValueError, match=r"Unknown tag 'cifar1' .* Its tags: cifar10, cifar100"):
        spikezoo.create_model(f"{MICRO}.cifar1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"thresold": 1}, "has no argument 'thresold'. Did you mean 'threshold'"),
        ({"num_clases": 3}, "Did you mean 'num_classes'"),
        ({"t": 3}, "has no argument 't'. "),
        ({"global_pol": "max"}, "Did you mean 'global_pool'"),
    ],
)
@pytest.mark.parametrize("name", ["mpbn_resnet20", "spiking_conv4"])
def test_unknown_arguments(name, arguments, message):
    with pytest.raises(UnknownArgumentError, match=message):
        spikezoo.create_model(name, **arguments)
    # timm's door: the same mistake, before anything is built. It may know fewer names than ours.
    with pytest.raises(TypeError, match=next(iter(arguments))):
        timm.create_model(name, device="meta", **arguments)


def test_layout_is_not_advertised_as_an_argument():
    with pytest.raises(UnknownArgumentError) as caught:
        spikezoo.create_model("mpbn_resnet20", zzz=1)
    valid = str(caught.value).partition("Valid: ")[2].rstrip(".").split(", ")
    assert {"T", "mpbn", "threshold", "num_classes", "features_only"} <= set(valid)
    assert not {"widths", "neuron_defaults", "kwargs", "neuron_arguments", "self"} & set(valid)


def test_pretrained_without_weights_raises(monkeypatch):
    monkeypatch.setitem(registry._rows, MICRO, replace(_rows[MICRO], weights={}))
    there = registry.Pretrained("mpbn_resnet20.some_tag", "package", None, None, None, None)
    monkeypatch.setattr(factory, "list_pretrained", lambda: [there])
    with pytest.raises(ValueError, match=r"'test_mpbn_vgg' has no pretrained weights.*exist: mpbn_resnet20.some_tag"):
        spikezoo.create_model(MICRO, pretrained=True)
    monkeypatch.setattr(factory, "list_pretrained", list)
    with pytest.raises(ValueError, match=r"Tags that exist: none yet. Use pretrained=False, or checkpoint_path="):
        spikezoo.create_model(MICRO, pretrained=True)


# --------------------------------------------------------------------------------------------------------------
# Registering
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["resnet18", "mpbn_resnet20"])
def test_registering_a_taken_name_raises_and_harms_nothing(taken):
    entry, tags = timm.model_entrypoint(taken), timm.list_pretrained(f"{taken}.*")
    before = timm.list_models()
    assert tags or taken != "resnet18"
    # A free name before the taken one must not slip in either.
    rows = {"never_registered": _rows[MICRO], taken: _rows[MICRO]}
    with pytest.raises(ValueError, match=f"'{taken}' is taken already"):
        register_rows(__name__, SpikingVGG, rows)
    assert timm.model_entrypoint(taken) is entry and timm.list_pretrained(f"{taken}.*") == tags
    assert timm.list_models() == before and not spikezoo.is_model("never_registered")


# --------------------------------------------------------------------------------------------------------------
# Import and torch.hub
# --------------------------------------------------------------------------------------------------------------


def test_import_is_silent_and_works_anywhere(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    code = "import spikezoo, timm; print(spikezoo.__version__, timm.is_model('mpbn_resnet20'))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [spikezoo.__version__, "True"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def hubconf():
    spec = importlib.util.spec_from_file_location("spikezoo_hubconf", ROOT / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hubconf_names_every_model(hubconf):
    # torch.hub.list shows every public callable, so anything else there would be listed as a model.
    public = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) or name == "dependencies"}
    models = {name for name in spikezoo.list_models() if not name.startswith("test_")}
    assert public == {*models, "dependencies"}
    for name in models:
        entry = getattr(hubconf, name)
        assert entry.__name__ == name and entry.__doc__.strip().endswith(".")
    assert hubconf.dependencies == ["torch", "timm", "huggingface_hub", "safetensors"]
    assert all(importlib.util.find_spec(package) for package in hubconf.dependencies)


def test_hubconf_entries_create_what_they_say(hubconf):
    for name in spikezoo.list_models():
        if not name.startswith("test_"):
            model = getattr(hubconf, name)(device="meta")
            assert model.pretrained_cfg["architecture"] == name


def test_torch_hub_load(monkeypatch):
    monkeypatch.chdir(ROOT)
    model = torch.hub.load(".", "mpbn_resnet20", source="local", T=1)
    assert model.T == 1 and sum(p.numel() for p in model.parameters()) == 11_256_010
    with pytest.raises(RuntimeError, match="Cannot find callable"):
        torch.hub.load(".", "mpbn_resnet91", source="local")


def test_hubconf_imports_nothing_early():
    # torch.hub runs the file first and names missing packages afterwards: an early import would hide that message.
    code = (
        "import sys, runpy; runpy.run_path('hubconf.py'); print(sorted({'torch', 'timm', 'spikezoo'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_hubconf_names_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RuntimeError, match="Missing dependencies: timm"):
        torch.hub.load(str(ROOT), "mpbn_resnet20", source="local", T=1)


def test_a_tag_brings_its_classes_its_dataset_and_its_weights(tmp_path, monkeypatch):
    module = types.ModuleType("spiking_tagged")
    monkeypatch.setitem(sys.modules, "spiking_tagged", module)
    layout = {"widths": ((4,), (6,)), "hidden": (8,)}
    files = {"z10": 10, "a5": 5}
    for tag, classes in files.items():
        save_file(SpikingVGG(**layout, num_classes=classes, img_size=8).state_dict(), tmp_path / f"{tag}.safetensors")
    weights = {
        tag: {"file": str(tmp_path / f"{tag}.safetensors"), "num_classes": classes, "dataset": f"npz:{tag}.npz"}
        for tag, classes in files.items()
    }
    row = registry.ModelRow(layout, 0, "none", "Only here.", img_size=8, fixed_input_size=True, weights=weights)
    monkeypatch.setattr(registry, "_rows", dict(registry._rows))
    registry.register_rows("spiking_tagged", SpikingVGG, {"spiking_tagged": row})
    try:
        assert spikezoo.model_info("spiking_tagged").dataset == "npz:z10.npz"  # the first tag is the default
        info = spikezoo.model_info("spiking_tagged.a5")
        assert (info.num_classes, info.dataset) == (5, "npz:a5.npz")
        assert info.pretrained == ["spiking_tagged.z10", "spiking_tagged.a5"]
        for name, tag in (("spiking_tagged", "z10"), ("spiking_tagged.a5", "a5")):
            model, dataset, origin = evaluate.open_model(name, {})
            assert (dataset, origin) == (f"npz:{tag}.npz", f"spiking_tagged.{tag}")
            assert model.num_classes == files[tag]
            stored = load_file(tmp_path / f"{tag}.safetensors")
            assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
        with pytest.raises(ValueError, match="Unknown tag"):
            spikezoo.model_info("spiking_tagged.b7")
    finally:
        from timm.models import _registry

        _registry._model_entrypoints.pop("spiking_tagged")
        _registry._clear_model_entries("spiking_tagged")
