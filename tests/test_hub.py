"""Saving, publishing and fetching: the real huggingface_hub client against a Hub on the loopback."""

import importlib.util
import json
import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import load
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

import spikezoo
from spikezoo import cli, registry
from spikezoo.checkpoint import file_hash, read_config
from spikezoo.hub import HubError, check_push, client, pull, write_card
from spikezoo.saving import describe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = {
    "dataset": "cifar10", "split": "test", "top1": 61.25, "samples": 10000, "macs": 1234567.0, "sops_exact": 7654.0,
    "energy_exact_mj": 0.0125, "mac_pj": 4.6, "sop_pj": 0.9, "command": "python validate.py --checkpoint x", "seed": 42,
    "commit": "0123456789ab", "date": "2026-01-02 03:04 UTC",
}  # fmt: skip


def make(name="test_mpbn_resnet", **kwargs):
    """A net that fires, with nothing left at its initial value."""
    torch.manual_seed(1)
    model = spikezoo.create_model(name, **{"T": 3, **kwargs})
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                if key.endswith("running_var"):
                    tensor.uniform_(0.5, 1.5)
                elif tensor.dim() == 1:
                    tensor.add_(0.2 * torch.randn_like(tensor))
    return model.eval()


def pruned(model, kept=0.1):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand_like(parameter) < kept).add_(0.0)
    return model


def images(model, batch=2):
    torch.manual_seed(2)
    return torch.randn(batch, model.in_chans, *model.img_size)


def same(one, other):
    """Logits bit for bit, of nets that fire."""
    x = images(one)
    rates = spikezoo.firing_rates(one, x)
    assert any(0 < rate.mean() < 1 for rate in rates.values())
    with torch.no_grad():
        return torch.equal(one.eval()(x), other.eval()(x))


# ------------------------------------------------------------------------------------------------- description


def test_describe_is_what_rebuilds():
    model = make(num_classes=7, neuron="plif", threshold=0.7)
    model.reset_classifier(5)
    facts = describe(spikezoo.fold_bn(model))
    assert facts["architecture"] == "test_mpbn_resnet" and facts["recipe"] == [["fold_bn", {}]]
    assert facts["model_args"] == {
        "num_classes": 5, "in_chans": 3, "img_size": 32, "T": 3, "neuron": "plif", "threshold": 0.7,
    }  # fmt: skip
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("wrap", [torch.nn.Sequential, torch.nn.DataParallel])
def test_describe_refuses_wrappers(wrap):
    with pytest.raises(ValueError, match=r"not made by spikezoo.create_model.*not a wrapper"):
        describe(wrap(make()))


def test_a_model_changed_by_hand_is_refused(tmp_path):
    model = make()
    model.head.fc = torch.nn.Linear(model.num_features, 3)
    with pytest.raises(ValueError, match="cannot be rebuilt from its arguments"):
        spikezoo.save_checkpoint(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_settings_changed_by_hand_are_refused(tmp_path):
    model = make()
    model.stem[0].norm.momentum = 0.5  # of training only
    spikezoo.save_checkpoint(model, tmp_path / "a")
    model.stem[0].norm.eps = 0.3
    with pytest.raises(ValueError, match=r"1 modules differ, the first 'stem.0.norm'.*eps=0.3.*instead of.*eps=1e-05"):
        spikezoo.save_checkpoint(model, tmp_path / "b")


def test_a_head_that_was_reset_travels(tmp_path):
    for classes, pool in ((5, "max"), (0, ""), (0, None)):
        model = make()
        model.reset_classifier(classes, pool)
        spikezoo.save_checkpoint(model, tmp_path)
        assert same(model, spikezoo.create_model(f"local-dir:{tmp_path}", pretrained=True))
    model = make(global_pool="max", cache_dir="somewhere", pretrained_strict=False)
    model.reset_classifier(4, "avg")
    spikezoo.save_checkpoint(model, tmp_path)
    assert same(model, spikezoo.create_model(f"local-dir:{tmp_path}", pretrained=True))


def test_compiled_wrappers_and_meta_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a wrapper"):
        spikezoo.save_checkpoint(torch.compile(make()), tmp_path / "a")
    with pytest.raises(ValueError, match="device 'meta'"):
        spikezoo.save_checkpoint(spikezoo.create_model("test_mpbn_resnet", device="meta"), tmp_path / "a")
    with pytest.raises(ValueError, match="expected a folder"):
        spikezoo.save_checkpoint(make(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"torch\.float16"):
        spikezoo.save_checkpoint(make(), tmp_path / "a", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_results_become_plain_data(tmp_path):
    results = {
        "top1": np.float32(61.5), "loss": torch.tensor(0.25), "top5": float("nan"), "log": tmp_path,
        "rates": (1, np.int64(2)),
    }  # fmt: skip
    spikezoo.save_checkpoint(make(), tmp_path / "a", results)
    stored = json.loads((tmp_path / "a" / "config.json").read_text(), parse_constant=pytest.fail)
    found = stored["spikezoo"]["results"]
    assert found == {"top1": 61.5, "loss": 0.25, "top5": None, "log": str(tmp_path), "rates": [1, 2]}
    for bad, message in (
        ({"x": {"y": [b"1"]}}, r"results\['x'\]\['y'\]\[0\] is a bytes"),
        ([1], "expected a mapping"),
        ({"top1": "92"}, r"results\['top1'\] is '92': expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            spikezoo.save_checkpoint(make(), tmp_path / "b", bad)
        with pytest.raises(ValueError, match=message):
            spikezoo.push_folder(tmp_path / "a", "org/net", results=bad, dry_run=tmp_path / "dry")
    assert not (tmp_path / "b").exists()


def test_two_threads_save_into_one_folder(tmp_path):
    models = [make(T=2), make(T=3)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: spikezoo.save_checkpoint(models[i % 2], tmp_path / f"{i // 2 % 2}"), range(8)))
    assert all(sorted(p.name for p in tmp_path.glob(f"{i}/*")) == ["config.json", "model.safetensors"] for i in (0, 1))


def test_saving_does_not_touch_the_random_state(tmp_path):
    model = make()
    state = torch.get_rng_state()
    spikezoo.save_checkpoint(model, tmp_path)
    assert torch.equal(state, torch.get_rng_state())


# --------------------------------------------------------------------------------------------------- push, pull


def test_push_pull_and_push_again(hub, tmp_path):
    model = pruned(make())
    url = spikezoo.push_to_hub(model, "org/net", RESULTS)
    assert url == f"{hub.endpoint}/org/net" and len(hub.commits("org/net")) == 2  # creation and upload
    loaded = spikezoo.create_model("hf-hub:org/net", pretrained=True)
    assert same(model, loaded) and loaded.T == 3 and loaded.recipe == []
    assert spikezoo.push_to_hub(model, "org/net", RESULTS) == url
    assert len(hub.commits("org/net")) == 2  # the same content: no commit
    assert spikezoo.push_to_hub(pruned(model), "org/net", RESULTS | {"top1": 60.0}) and len(hub.commits("org/net")) == 3
    config = json.loads(hub.file("org/net", "config.json"))
    assert config["spikezoo"]["results"]["top1"] == 60.0 and config["sparsity_config"]["format"] == "spikezoo-sparse"
    assert set(hub.repos["org/net"].branches["main"].files) == {
        ".gitattributes", ".eval_results/cifar10.yaml", "README.md", "config.json", "model.safetensors",
    }  # fmt: skip


def test_transforms_and_arguments_travel(hub):
    model = spikezoo.fold_bn(spikezoo.fold_mpbn(make(T=6)))
    spikezoo.push_to_hub(model, "org/folded")
    loaded = spikezoo.create_model("hf-hub:org/folded", pretrained=True)
    assert loaded.recipe == [("fold_mpbn", {}), ("fold_bn", {})] and loaded.T == 6 and same(model, loaded)
    assert spikezoo.create_model("hf-hub:org/folded", pretrained=True, T=2).T == 2
    untrained = spikezoo.create_model("hf-hub:org/folded")
    assert untrained.T == 6 and len(untrained.recipe) == 2 and not same(model, untrained)


def test_the_cache_is_used_without_any_request(hub):
    spikezoo.push_to_hub(make(), "org/net")
    first = pull("org/net")
    hub.requests.clear()
    assert pull("org/net") == first and pull(f"org/net@{first.name}") == first and hub.requests == []
    spikezoo.push_to_hub(make(num_classes=4), "org/net")
    assert pull("org/net") == first  # what is there is used, until somebody asks
    newest = pull("org/net", refresh=True)
    assert newest.name == hub.head("org/net") != first.name
    assert spikezoo.create_model("hf-hub:org/net", pretrained=True).num_classes == 4
    assert spikezoo.create_model(f"hf-hub:org/net@{first.name}", pretrained=True).num_classes == 10


def test_revisions(hub):
    one, two = make(num_classes=3), make(num_classes=4)
    spikezoo.push_to_hub(one, "org/net")
    url = spikezoo.push_to_hub(two, "org/net", revision="second")
    assert url.endswith("/tree/second")
    assert spikezoo.create_model("hf-hub:org/net@second", pretrained=True).num_classes == 4
    assert spikezoo.create_model("hf-hub:org/net@main", pretrained=True).num_classes == 3
    assert spikezoo.create_model("hf-hub:org/net", pretrained=True).num_classes == 3
    with pytest.raises(HubError, match="no such revision"):
        pull("org/net@third")


def test_timm_reads_dense_uploads_and_refuses_sparse_ones(hub):
    model = make()
    spikezoo.push_to_hub(model, "org/dense", sparse=False)
    loaded = timm.create_model("hf-hub:org/dense", pretrained=True)
    assert same(model, loaded) and loaded.T == 3
    spikezoo.push_to_hub(pruned(make()), "org/sparse")
    with pytest.raises(ValueError, match=r"sparse code.*use spikezoo.create_model"):
        timm.create_model("hf-hub:org/sparse", pretrained=True)


def test_figures_of_other_weights_do_not_stay(hub):
    spikezoo.push_to_hub(make(), "org/net", RESULTS)
    spikezoo.push_to_hub(make(), "org/net", RESULTS | {"dataset": "cifar100"})
    files = hub.repos["org/net"].branches["main"].files
    assert [name for name in files if name.startswith(".eval")] == [".eval_results/cifar100.yaml"]


def test_references_are_pushed_and_the_cache_may_be_elsewhere(hub, tmp_path):
    model = make()
    spikezoo.push_to_hub(model, "org/net", RESULTS)
    spikezoo.push_folder("hf-hub:org/net", "org/copy")
    assert hub.file("org/copy", "config.json") == hub.file("org/net", "config.json")
    assert same(model, spikezoo.create_model("hf-hub:org/copy", pretrained=True, cache_dir=tmp_path / "here"))
    assert list((tmp_path / "here").glob("models--org--copy/snapshots/*/model.safetensors"))


def test_private_and_gated(hub, monkeypatch):
    spikezoo.push_to_hub(make(), "org/secret", private=True)
    assert hub.repos["org/secret"].private
    assert pull("org/secret")
    hub.add_repo("org/gated", {"config.json": b"{}", "model.safetensors": b""}, gated=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"no such repository.*or it is private.*HF_TOKEN"):
        pull("org/secret", refresh=True)
    with pytest.raises(HubError, match=r"is gated\. Accept its terms"):
        pull("org/gated")
    with pytest.raises(HubError, match=r"401.*Log in"):
        spikezoo.push_to_hub(make(), "org/other")
    monkeypatch.setenv("HF_TOKEN", hub.stranger)
    with pytest.raises(HubError, match=r"403.*'write'"):
        spikezoo.push_to_hub(make(), "org/other")


def test_a_push_is_asked_for_at_the_start(hub, monkeypatch):
    check_push("org/net")
    assert not hub.repos  # asked, not done
    with pytest.raises(ValueError, match="is no repository name"):
        check_push("net")
    with pytest.raises(HubError, match="your token is owner's and may push to owner, org, me, not to others"):
        check_push("others/net")
    monkeypatch.setattr(hub, "role", "read")
    with pytest.raises(HubError, match="may only read"):
        check_push("org/net")
    for token, message in ((hub.stranger, "may push to stranger, not to org"), ("hf_wrong", r"401.*Log in with")):
        monkeypatch.setattr(hub, "role", "write")
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match=message):
            check_push("org/net")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="there is no token"):
        check_push("org/net")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json and no model.safetensors, so it is no checkpoint"),
        (
            {"config.json": b"{}", "pytorch_model.bin": b"x"},
            "no model.safetensors.*pickle pytorch_model.bin is not",
        ),
    ],
)
def test_foreign_repositories(hub, files, message):
    hub.add_repo("org/other", files)
    with pytest.raises(HubError, match=message):
        pull("org/other")


@pytest.mark.parametrize("name", ["net", "org/", "a/b/c", "org/net name", "org/n*t", "https://x.co/org/net", ""])
def test_names_that_are_none(hub, name):
    with pytest.raises(ValueError, match="organisation/name"):
        pull(name)
    with pytest.raises(ValueError, match="organisation/name"):
        spikezoo.push_to_hub(make(), name)
    for scheme in ("train", "validate"):  # before hours of work, not after them
        with pytest.raises(ValueError, match="organisation/name"):
            load(scheme).main(["--model", "test_spiking_vgg", "--push-to-hub", name or "org"])


# ------------------------------------------------------------------------------------------------------- faults


def test_a_dead_hub_is_told_within_seconds(hub):
    spikezoo.push_to_hub(make(), "org/net")
    cached = pull("org/net")
    hub.stop()
    started = time.monotonic()
    with pytest.raises(HubError, match=r"Fetching org/other: http.* does not answer as it should.*HF_ENDPOINT"):
        spikezoo.create_model("hf-hub:org/other", pretrained=True)
    with pytest.raises(HubError, match="Pushing org/net"):
        spikezoo.push_to_hub(make(), "org/net")
    assert time.monotonic() - started < 5
    assert pull("org/net") == cached  # and what is there still works
    assert spikezoo.create_model("hf-hub:org/net", pretrained=True).T == 3


def test_a_hub_that_hangs(hub, monkeypatch):
    hub.add_repo("org/net", {"config.json": b"{}", "model.safetensors": b""})
    hub.delay("/api/", 60)
    monkeypatch.setattr(client, "TIMEOUT_S", 0.3)
    started = time.monotonic()
    with pytest.raises(HubError, match="no answer within"):
        pull("org/net")
    assert time.monotonic() - started < 5 and client.TIMEOUT_S == 0.3


@pytest.mark.parametrize(("status", "advice"), [(500, "try again later"), (503, "try again later"), (429, "Too many")])
def test_a_hub_with_faults(hub, status, advice):
    spikezoo.push_to_hub(make(), "org/net")
    hub.fail("/api/models", status)
    with pytest.raises(HubError, match=f"answered {status}.*{advice}"):
        pull("org/net")
    with pytest.raises(HubError, match=f"Pushing org/net: .*{status}"):
        spikezoo.push_to_hub(pruned(make()), "org/net")


@pytest.mark.parametrize("status", [429, 503])
def test_a_fetch_that_the_hub_refuses(hub, status):
    spikezoo.push_to_hub(make(), "org/net")
    hub.fail("/resolve/", status)
    with pytest.raises(HubError, match=f"Fetching org/net: .*{status}"):
        pull("org/net", refresh=True)


def test_a_connection_that_breaks_once(hub):
    model = make()
    spikezoo.push_to_hub(model, "org/net")
    hub.cut("/cdn/", times=1)
    assert same(model, spikezoo.create_model("hf-hub:org/net", pretrained=True))


def test_a_flipped_bit_in_transit(hub):
    model = make()
    spikezoo.push_to_hub(model, "org/net")
    weights = bytearray(hub.file("org/net", "model.safetensors"))
    weights[-5] ^= 4
    hub.body("/cdn/", bytes(weights), times=1)
    assert same(model, spikezoo.create_model("hf-hub:org/net", pretrained=True))  # noticed, and fetched again
    hub.body("/cdn/", bytes(weights))
    with pytest.raises(HubError, match=r"damaged, twice, and was thrown away.*sha256"):
        pull("org/net", refresh=True)
    hub.faults.clear()
    assert same(model, spikezoo.create_model("hf-hub:org/net", pretrained=True))  # nothing damaged stayed


def test_a_flipped_bit_in_the_cache(hub):
    model = make()
    spikezoo.push_to_hub(model, "org/net")
    path = (pull("org/net") / "model.safetensors").resolve()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged: its sha256"):
        spikezoo.create_model("hf-hub:org/net", pretrained=True)
    pull("org/net", refresh=True)
    assert same(model, spikezoo.create_model("hf-hub:org/net", pretrained=True))


def test_a_damaged_config_on_the_hub(hub):
    spikezoo.push_to_hub(make(), "org/net")
    config = hub.file("org/net", "config.json")
    hub.body("/resolve/.*config.json", config.replace(b'"T": 3', b'"T": 2'))
    with pytest.raises(HubError, match=r"thrown away.*not as it was written"):
        pull("org/net")


def test_offline(hub, monkeypatch):
    spikezoo.push_to_hub(make(), "org/net")
    cached = pull("org/net")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull("org/net") == cached and hub.requests == []
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        pull("org/other")


def test_two_processes_at_once(hub):
    model = make()
    spikezoo.push_to_hub(model, "org/net")
    hub.delay("/cdn/", 0.3)
    code = "import spikezoo.hub as h; print('ready', flush=True); input(); print(h.pull('org/net'))"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], **pipes, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("\n")
        other.stdin.flush()
        own = pull("org/net")
        found = other.communicate()[0].strip()
    assert other.returncode == 0 and found == str(own) == str(pull("org/net"))
    assert same(model, spikezoo.create_model("hf-hub:org/net", pretrained=True))


# --------------------------------------------------------------------------------------------------------- card


def test_the_card_says_what_was_measured(hub, tmp_path):
    model = spikezoo.fold_bn(pruned(make("test_spiking_vgg")))
    (tmp_path / "run").mkdir()
    spikezoo.save_checkpoint(model, tmp_path / "run", RESULTS)
    (tmp_path / "run" / "curves.png").write_bytes(b"\x89PNG")
    folder = Path(spikezoo.push_folder(tmp_path / "run", "org/net", dry_run=tmp_path / "dry"))
    assert hub.requests == [] and folder == tmp_path / "dry"
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        ".eval_results/cifar10.yaml", "README.md", "config.json", "curves.png", "model.safetensors",
    ]  # fmt: skip
    assert file_hash(folder / "model.safetensors") == file_hash(tmp_path / "run" / "model.safetensors")
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "spikezoo" and card.data.license == "apache-2.0"
    (result,) = card.data.eval_results
    assert (result.metric_value, result.dataset_name, result.dataset_type) == (61.25, "cifar10", "uoft-cs/cifar10")
    for fact in (
        "61.25 %", "10,000", "1,234,567", "0.0125 mJ", "4.6 pJ", "0.9 pJ", "0123456789ab", "| Time steps T | 3 |",
        '[["fold_bn", {}]]', 'create_model("hf-hub:org/net", pretrained=True)', "load_sparse_file", "curves.png",
        f"{sum(p.numel() for p in model.parameters()):,}", file_hash(folder / "model.safetensors"), "apache-2.0",
    ):  # fmt: skip
        assert fact.lower() in card.text.lower(), fact
    (entry,) = yaml.safe_load((folder / ".eval_results" / "cifar10.yaml").read_text())
    assert entry["value"] == 61.25 and entry["date"] == "2026-01-02" and "T=3" in entry["notes"]


def test_a_card_without_results_claims_nothing(tmp_path):
    spikezoo.save_checkpoint(make(), tmp_path)
    text = write_card(tmp_path, "org/net").read_text()
    assert "Nothing was measured" in text and "model-index" not in text and not (tmp_path / ".eval_results").exists()


def test_a_card_of_odd_values_stays_a_card(tmp_path):
    results = {"dataset": "mine", "top1": 1.0, "command": "a | b\n| c"}
    spikezoo.push_to_hub(spikezoo.fold_bn(make()), "o/n", results, sparse=False, dry_run=tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| Command | `a \\| b \\| c` |" in text and "| Dataset | mine |" in text
    assert "sparse code" not in text and "a transformed model, which timm cannot make" in text
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"architecture": "test_mpbn_resnet"}')
    with pytest.raises(ValueError, match="is no checkpoint of spikezoo"):
        write_card(tmp_path / "foreign", "o/n")


def test_dry_run_wants_a_new_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty, or a file: give a new folder"):
        spikezoo.push_to_hub(make(), "org/net", dry_run=tmp_path)
    with pytest.raises(ValueError, match="give a new folder"):
        spikezoo.push_to_hub(make(), "org/net", dry_run=tmp_path / "mine.txt")


# ------------------------------------------------------------------------------------------------------ scripts


def test_command_line(hub, tmp_path, capsys):
    spikezoo.save_checkpoint(make(), tmp_path / "run", RESULTS)
    assert cli.main(["push", str(tmp_path / "run"), "org/net", "--dry-run", str(tmp_path / "dry")]) == 0
    assert "pushed nothing" in capsys.readouterr().out and hub.requests == []
    assert cli.main(["push", str(tmp_path / "run"), "org/net", "--private", "--revision", "v1"]) == 0
    assert capsys.readouterr().out.strip() == f"{hub.endpoint}/org/net/tree/v1" and hub.repos["org/net"].private
    assert cli.main(["push", str(tmp_path / "nothing"), "org/net"]) == 2
    hub.stop()
    assert cli.main(["push", str(tmp_path / "run"), "org/net"]) == 2
    assert "HubError: Pushing org/net" in capsys.readouterr().err


def test_train_and_validate_publish_what_they_measured(hub, tmp_path, capsys):
    train, validate = load("train"), load("validate")
    flags = ["--model", "test_spiking_vgg", "--subset", "32", "--epochs", "1", "-b", "16", "--T", "2"]
    train.main([*flags, "--output", str(tmp_path), "--experiment", "run", "--push-to-hub", "org/trained"])
    assert f"Published       {hub.endpoint}/org/trained" in capsys.readouterr().out
    config = json.loads(hub.file("org/trained", "config.json"))
    assert config["spikezoo"]["dataset"] == "digits" and config["model_args"]["T"] == 2
    text = hub.file("org/trained", "README.md").decode()
    assert "spikezoo train --model test_spiking_vgg" in text and "curves.png" in text
    assert hub.file("org/trained", "model.safetensors") == (tmp_path / "run" / "model.safetensors").read_bytes()

    argv = [
        "--model",
        "hf-hub:org/trained",
        "--count",
        "--count-images",
        "2",
        "--json",
        "--push-to-hub",
        "org/validated",
    ]
    assert validate.main(argv) == 0
    out = capsys.readouterr().out
    row = json.loads(out[out.index("{") :])
    assert row["model"] == "test_spiking_vgg" and row["dataset"] == "digits" and row["T"] == 2
    assert row["published"] == f"{hub.endpoint}/org/validated"
    assert row["checkpoint_sha256"] == config["spikezoo"]["sha256"]["model.safetensors"]
    results = json.loads(hub.file("org/validated", "config.json"))["spikezoo"]["results"]
    assert results["top1"] == row["top1"] and results["macs"] == row["macs"] and results["train_command"]
    text = hub.file("org/validated", "README.md").decode()
    assert f"{row['top1']:.2f} %" in text and "spikezoo validate" in text and "spikezoo train" in text

    # Other arguments are another model, which is stored as what was measured.
    argv = ["--checkpoint", str(tmp_path / "run"), "--T", "3", "--push-to-hub", "org/three"]
    assert validate.main(argv) == 0
    assert json.loads(hub.file("org/three", "config.json"))["model_args"]["T"] == 3
    with pytest.raises(ValueError, match="the weights are random"):
        validate.main(
            ["--model", "test_spiking_vgg", "--img-size", "8", "--in-chans", "1", "--push-to-hub", "org/random"]
        )
    assert "org/random" not in hub.repos


def test_fine_tuning_from_the_hub(hub, tmp_path, capsys, caplog):
    train = load("train")
    model = make("test_spiking_vgg", num_classes=4, in_chans=1, img_size=8, decay=0.3)
    spikezoo.push_to_hub(model, "org/start")
    flags = ["--subset", "16", "--epochs", "1", "-b", "16", "--output", str(tmp_path / "out"), "--lr", "1e-9"]
    with caplog.at_level(logging.WARNING, "spikezoo"):
        train.main([*flags, "--model", "hf-hub:org/start", "--pretrained"])
    assert "starts afresh with 10 classes" in caplog.text
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == "hf-hub_org_start"
    config = read_config(folder)
    assert config["architecture"] == "test_spiking_vgg"
    assert config["model_args"]["decay"] == 0.3 and config["model_args"]["num_classes"] == 10
    tuned = spikezoo.create_model(f"local-dir:{folder}", pretrained=True)
    torch.testing.assert_close(tuned.stages[0][0].conv.weight, model.stages[0][0].conv.weight)


# ---------------------------------------------------------------------------------------------- shipped weights


@pytest.fixture
def shipped(tmp_path, monkeypatch, register_again):
    """test_mpbn_vgg registered again, with two checkpoints that come with the package."""
    monkeypatch.setattr(registry, "SHIPPED", tmp_path / "weights")
    made = {}
    for tag, arguments in (("c4_t2", {"T": 2, "num_classes": 4}), ("c6", {"T": 5, "num_classes": 6})):
        made[tag] = spikezoo.fold_bn(pruned(make("test_mpbn_vgg", **arguments)))
        results = {"dataset": "npz:none.npz", "top1": 50.0 + len(made)}
        spikezoo.save_checkpoint(made[tag], tmp_path / "weights" / f"test_mpbn_vgg.{tag}", results)
    (tmp_path / "weights" / "test_mpbn_vgg.broken").mkdir()
    (tmp_path / "weights" / "test_mpbn_vgg.broken" / "config.json").write_text("{")
    register_again("test_mpbn_vgg")
    return made


def test_shipped_weights(shipped, hub):
    found = spikezoo.list_pretrained("test_mpbn_vgg*")
    assert [(row.name, row.source, row.top1, row.T, row.dataset) for row in found] == [
        ("test_mpbn_vgg.c4_t2", "package", 51.0, 2, "npz:none.npz"),
        ("test_mpbn_vgg.c6", "package", 52.0, 5, "npz:none.npz"),
    ]
    assert all(row.size and f"{row.size / 1e6:.2f} MB" in str(row) for row in found)
    for make_model in (spikezoo.create_model, timm.create_model):
        for name, tag in (("test_mpbn_vgg", "c4_t2"), ("test_mpbn_vgg.c4_t2", "c4_t2"), ("test_mpbn_vgg.c6", "c6")):
            model = make_model(name, pretrained=True)
            assert model.T == shipped[tag].T and model.recipe == [("fold_bn", {})] and same(shipped[tag], model)
    assert hub.requests == []
    info = spikezoo.model_info("test_mpbn_vgg.c6")
    assert (info.T, info.num_classes, info.dataset) == (5, 6, "npz:none.npz")
    # The name alone stays the paper's layout, whatever weights there are.
    plain = spikezoo.model_info("test_mpbn_vgg")
    assert (plain.T, plain.num_classes, plain.parameters) == (4, 10, registry._rows["test_mpbn_vgg"].parameters)
    for make_model in (spikezoo.create_model, timm.create_model):
        assert make_model("test_mpbn_vgg").num_classes == 10
    features = spikezoo.create_model("test_mpbn_vgg.c6", pretrained=True, features_only=True)
    x = images(shipped["c6"])
    with torch.no_grad():
        taken = features.eval()(x)
        assert torch.equal(taken[-1], shipped["c6"].forward_features(x))
    assert [f.shape[1] for f in taken] == [f["num_chs"] for f in shipped["c6"].feature_info]


def test_missing_tags_name_those_that_exist(shipped):
    with pytest.raises(ValueError, match=r"Unknown tag 'c5'.*Its tags: c4_t2, c6"):
        spikezoo.create_model("test_mpbn_vgg.c5", pretrained=True)
    with pytest.raises(ValueError, match=r"has no pretrained weights.*test_mpbn_vgg.c4_t2"):
        spikezoo.create_model("test_spiking_vgg", pretrained=True)


def test_weights_on_the_hub_by_tag(hub, monkeypatch):
    model = make("test_spiking_vgg", T=6)
    spikezoo.push_to_hub(model, "org/net", {"dataset": "digits"})
    pinned = f"org/net@{hub.head('org/net')}"
    from dataclasses import replace

    row = replace(registry._rows["test_spiking_vgg"], weights={"digits": {"hf_hub_id": pinned, "dataset": "digits"}})
    monkeypatch.setitem(registry._rows, "test_spiking_vgg", row)
    loaded = spikezoo.create_model("test_spiking_vgg", pretrained=True)
    assert loaded.T == 6 and same(model, loaded)
    hub.requests.clear()
    assert same(model, spikezoo.create_model("test_spiking_vgg", pretrained=True)) and hub.requests == []


def test_torch_hub(hub):
    model = make("test_spiking_vgg", T=2)
    spikezoo.push_to_hub(model, "org/net")
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    assert hubconf.mpbn_resnet20(T=1).T == 1
    with pytest.raises(ValueError, match="no pretrained weights"):
        hubconf.rmp_in_vgg16(pretrained=True)


def test_dense_folders_are_timms(tmp_path):
    # As transformers' wrapper of timm does: the number of classes beside the arguments, then all weights.
    model = spikezoo.create_model("test_spiking_vgg", T=2, num_classes=7).eval()
    model.pretrained_cfg["label_names"] = tuple("abcdefg")
    spikezoo.push_to_hub(model, "ORG/NAME", {"dataset": "digits"}, sparse=False, dry_run=tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["label_names"] == list("abcdefg")  # where transformers' pipeline looks for them
    again = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"]).eval()
    again.load_state_dict(load_file(tmp_path / "folder" / "model.safetensors"))
    images = torch.rand(2, *model.input_shape)
    assert torch.equal(again(images), model(images))
    ours = spikezoo.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert torch.equal(ours(images), model(images)) and ours.num_classes == 7
