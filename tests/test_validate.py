"""validate.py: its numbers equal those computed by hand, its sources of weights, its results files, its errors."""

import csv
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load
from safetensors.torch import save_file

import spikezoo
from spikezoo import data, evaluate, registry
from spikezoo.checkpoint import save_state
from spikezoo.evaluate import environment
from spikezoo.flags import leave
from spikezoo.observe import WithRates

SCRIPT = Path(__file__).parents[1] / "validate.py"
NAME = "test_mpbn_vgg"
SAMPLES = 7
CLASSES = 6


@pytest.fixture(scope="module")
def validate():
    return load("validate")


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    labels = np.arange(CLASSES).repeat(2)
    return {
        "train_images": rng.integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8),
        "train_labels": labels,
        "test_images": rng.integers(0, 256, (SAMPLES, 8, 8, 3), dtype=np.uint8),
        "test_labels": np.arange(SAMPLES) % CLASSES,
    }


@pytest.fixture
def npz(tmp_path, arrays):
    np.savez(tmp_path / "small.npz", **arrays)
    return f"npz:{tmp_path / 'small.npz'}"


def make(seed=5, name=NAME, **arguments):
    """A model whose norms are not neutral, so that its logits and rates differ from image to image."""
    torch.manual_seed(seed)
    model = spikezoo.create_model(name, **{"T": 2, "num_classes": CLASSES, "img_size": 8, **arguments}).train()
    for _ in range(3):
        model(torch.randn(8, model.in_chans, 8, 8))
    torch.nn.init.normal_(model.head.fc.weight)
    torch.nn.init.normal_(model.head.fc.bias)  # where nothing fires, zeros would make a tie of all classes
    return model.eval()


@pytest.fixture
def folder(tmp_path, npz):
    """What train.py leaves behind."""
    path = tmp_path / "run"
    path.mkdir()
    save_file(make().state_dict(), path / "model.safetensors")
    model_args = {"T": 2, "num_classes": CLASSES, "img_size": 8}
    config = {"architecture": NAME, "model_args": model_args, "spikezoo": {"dataset": npz, "split": "test"}}
    (path / "config.json").write_text(json.dumps(config))
    state = {**config, "model": make(6).state_dict(), "ema": make(7).state_dict(), "epoch": 1, "batch": 0}
    save_state(path / "last.safetensors", state)
    return path


def by_hand(model, arrays):
    """The whole of an evaluation, one image at a time and without spikezoo's loaders, metrics or hooks."""
    pixels = arrays["train_images"].astype(np.float64) / 255
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    images = (arrays["test_images"].astype(np.float64) / 255 - mean) / std
    top1 = top5 = loss = 0
    for image, label in zip(images, arrays["test_labels"], strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(image).float().permute(2, 0, 1)[None])[0].double().tolist()
        better = sum(other > logits[label] for other in logits)
        top1 += better < 1
        top5 += better < 5
        loss += math.log(sum(math.exp(other) for other in logits)) - logits[label]
    count = len(images)
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("batch", [1, 3, 128])  # 3 leaves a shorter last batch
def test_row_equals_the_hand_computed(validate, tmp_path, folder, arrays, batch, capsys):
    wanted = by_hand(make(), arrays)
    assert 0 < wanted["top1"] < wanted["top5"] < 100  # otherwise the test could not fail
    file = tmp_path / "r.json"
    assert validate.main(["--checkpoint", str(folder), "-b", str(batch), "--results-file", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    for key, value in wanted.items():
        assert row[key] == pytest.approx(value, abs=1e-4), key
    assert row["top1_err"] == pytest.approx(100 - row["top1"]) and row["top5_err"] == pytest.approx(100 - row["top5"])
    assert row["samples"] == SAMPLES and row["T"] == 2 and row["model"] == NAME and row["mpbn"] == "channel"
    assert row["param_count"] == sum(p.numel() for p in make().parameters())
    assert row["images_per_second"] > 0
    told = capsys.readouterr().out
    for part in (f"top-1 {row['top1']:.2f} %", f"loss {row['loss']:.4f}", "T=2", "parameters", "images/s", "firing"):
        assert part in told


def test_firing_rates(validate, tmp_path, folder, arrays, capsys):
    # Spikes counted at the neurons themselves, on all images at once.
    model, counted = make(), {}
    for name, module in model.named_modules():
        if isinstance(module, spikezoo.neurons.SpikingNeuron):
            module.register_forward_hook(lambda _m, _i, out, name=name: counted.update({name: out.mean().item()}))
    pixels = arrays["train_images"] / 255
    images = (arrays["test_images"] / 255 - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
    model(torch.from_numpy(images).float().permute(0, 3, 1, 2))
    assert len(counted) == len(WithRates(model).names) > 2

    file = tmp_path / "r.json"
    validate.main(["--checkpoint", str(folder), "-b", "2", "--layer-rates", "--results-file", str(file)])
    (row,) = json.loads(file.read_text())
    assert row["layer_firing_rates"] == pytest.approx(counted, abs=2e-6)
    assert row["firing_rate"] == pytest.approx(sum(counted.values()) / len(counted), abs=2e-6)
    told = capsys.readouterr().out
    assert all(name in told for name in counted)
    validate.main(["--checkpoint", str(folder), "--results-file", str(file)])
    assert "layer_firing_rates" not in json.loads(file.read_text())[0]  # only on request


def test_a_twin_has_no_firing_rate(validate, npz, capsys):
    validate.main(["--model", "test_spiking_vgg", "--neuron", "relu", "--dataset", "digits", "--json"])
    said = capsys.readouterr()
    assert "no spikes" in said.err and json.loads(said.out)["firing_rate"] is None


def test_amp_and_channels_last_stay_close(validate, tmp_path, folder):
    found = {}
    for flags in ((), ("--amp",), ("--channels-last",)):
        file = tmp_path / "r.json"
        validate.main(["--checkpoint", str(folder), *flags, "--results-file", str(file)])
        (found[flags],) = json.loads(file.read_text())
    assert found[("--amp",)]["precision"] == "bfloat16" and found[()]["precision"] == "float32"
    assert found[("--channels-last",)]["loss"] == pytest.approx(found[()]["loss"], abs=1e-4)
    assert found[("--amp",)]["loss"] == pytest.approx(found[()]["loss"], rel=0.3)  # spikes flip in half precision


def test_deployed(validate, tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda _name: None)  # without the minutes of a compiler
    file, found = tmp_path / "r.json", {}
    for flags in ((), ("--deploy", "exact"), ("--deploy", "bf16")):
        validate.main(["--checkpoint", str(folder), *flags, "--results-file", str(file)])
        (found[flags[-1:]],) = json.loads(file.read_text())
    plain, exact, half = found.values()
    assert [row["deployed"] for row in found.values()] == [None, "exact", "bf16"] and exact["firing_rate"] is None
    assert exact["top1"] == plain["top1"] and exact["loss"] == plain["loss"] != half["loss"]
    assert half["loss"] == pytest.approx(plain["loss"], rel=0.3) and "deployed bf16" in capsys.readouterr().out
    with pytest.raises(ValueError, match="leave --amp"):
        validate.main(["--checkpoint", str(folder), "--deploy", "exact", "--amp"])


def test_torchcompile(validate, tmp_path, folder, arrays, monkeypatch):
    compiled = []
    compile_ = torch.compile

    def eager(model):
        compiled.append(model)
        return compile_(model, backend="eager")  # inductor's compiler takes longer than all other tests

    monkeypatch.setattr(torch, "compile", eager)
    file = tmp_path / "r.json"
    validate.main(["--checkpoint", str(folder), "--torchcompile", "-b", "3", "--results-file", str(file)])
    (row,) = json.loads(file.read_text())
    assert len(compiled) == 1 and row["compiled"] is True
    assert row["loss"] == pytest.approx(by_hand(make(), arrays)["loss"], abs=1e-4)


# --------------------------------------------------------------------------------------- where weights come from


@pytest.mark.parametrize(
    ("place", "flags", "seed"),
    [
        (".", [], 5),
        ("model.safetensors", [], 5),
        ("last.safetensors", [], 6),
        ("last.safetensors", ["--use-ema"], 7),
    ],
)
def test_checkpoint_of_a_folder_a_file_and_a_state(validate, tmp_path, folder, arrays, place, flags, seed):
    file = tmp_path / "r.json"
    validate.main(["--checkpoint", str(folder / place), *flags, "--results-file", str(file)])
    (row,) = json.loads(file.read_text())
    assert row["loss"] == pytest.approx(by_hand(make(seed), arrays)["loss"], abs=1e-4)
    used = folder / ("last.safetensors" if "last" in place else "model.safetensors")
    assert Path(row["weights"]) == used
    assert row["checkpoint_sha256"] == hashlib.sha256(used.read_bytes()).hexdigest()


def test_another_T_is_said(validate, folder, arrays, capsys):
    validate.main(["--checkpoint", str(folder), "--T", "3", "--json"])
    said = capsys.readouterr()
    row = json.loads(said.out)
    assert "the checkpoint was made with T=2 and is evaluated with T=3" in said.err and row["T"] == 3
    model = make()
    model.T = 3
    assert f"{row['loss']:.3f}" == f"{by_hand(model, arrays)['loss']:.3f}"
    validate.main(["--checkpoint", str(folder), "--T", "2"])
    assert "was made with" not in capsys.readouterr().out


def test_random_weights_are_said_and_fit_the_data(validate, npz, capsys):
    validate.main(["--model", NAME, "--dataset", npz, "--seed", "3", "--json"])
    said = capsys.readouterr()
    first = json.loads(said.out)
    assert "its weights are random (seed 3)" in said.err and first["weights"] == "random"
    assert first["checkpoint_sha256"] is None and first["samples"] == SAMPLES
    validate.main(["--model", NAME, "--data", npz, "--seed", "3", "--json"])  # --data is the same flag
    assert json.loads(capsys.readouterr().out)["loss"] == first["loss"]


def test_the_table_and_a_part_of_the_split(validate, folder, capsys):
    assert validate.main(["--checkpoint", str(folder), "--val-subset", "6"]) == 0
    head, row = capsys.readouterr().out.splitlines()[-2:]
    assert head.split()[:5] == ["model", "data", "images", "T", "top-1"] and row.split()[0] == NAME
    assert row.split()[2:4] == ["6", "2"]


def test_advice_fits_the_net(validate, tmp_path):
    # Its pretrained weights take CIFAR-10's images and no digits.
    with pytest.raises(FileNotFoundError) as caught:
        validate.main(["--model", "mpbn_resnet20", "--data-dir", str(tmp_path), "--no-dataset-download"])
    assert "was trained on cifar10" in str(caught.value) and "--dataset digits" not in str(caught.value)


def test_unknown_flags_name_the_nearest_in_one_line(validate, capsys):
    with pytest.raises(SystemExit) as caught:
        validate.main(["--modell", NAME])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("spikezoo validate: unknown flag --modell. Did you mean '--model'") and "--help" in line


def test_a_name_alone_takes_the_natural_dataset(validate, monkeypatch, capsys):
    asked = []

    def load_arrays(name, split, data_dir=None, download=True):
        asked.append((name, split, data_dir, download))
        return torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 9])

    monkeypatch.setattr(data.catalogue, "load_arrays", load_arrays)
    monkeypatch.setitem(registry._rows, "mpbn_resnet19", replace(registry._rows["mpbn_resnet19"], weights={}))
    assert validate.main(["--model", "mpbn_resnet19"]) == 0
    assert asked == [("cifar10", "test", None, True)]
    out = capsys.readouterr().out
    assert "mpbn_resnet19: no pretrained weights" in out and "on cifar10/test (2 images)" in out


def test_pretrained_where_there_are_no_weights(validate, npz):
    with pytest.raises(ValueError, match="pretrained"):
        validate.main(["--model", NAME, "--pretrained", "--dataset", npz])


def test_counts_join_the_row(validate, tmp_path, folder, capsys):
    file = tmp_path / "r.json"
    validate.main(["--checkpoint", str(folder), "--count", "--count-images", "5", "--results-file", str(file)])
    row = json.loads(file.read_text())[0]
    model = make()
    images, _ = data.load_arrays(row["dataset"], "test")
    info = data.dataset_info(row["dataset"])
    mean, std = (torch.tensor(values)[:, None, None] for values in (info.mean, info.std))
    by_hand = spikezoo.count(model, (images[:5] / 255 - mean) / std)
    for key in ("macs", "sops_paper", "sops_exact", "energy_paper_mj", "energy_exact_mj"):
        assert row[key] == pytest.approx(getattr(by_hand, key), rel=1e-6) and row[key] > 0, key
    assert row["count_images"] == 5 and row["uncounted"] == {} and row["mac_pj"] == 4.6
    assert "not counted: nothing" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- results files


def test_wildcard_with_csv(validate, tmp_path, npz, capsys):
    file = tmp_path / "new" / "r.csv"
    assert validate.main(["--model", "test_*_vgg", "--dataset", npz, "--T", "1", "--results-file", str(file)]) == 0
    found = rows(file)
    assert [row["model"] for row in found] == spikezoo.list_models("test_*_vgg") and len(found) == 2
    columns = """model top1 top1_err top5 top5_err loss images_per_second param_count T neuron mpbn firing_rate dataset
        split samples img_size weights checkpoint_sha256 batch_size precision compiled deployed device seed command"""
    assert list(found[0]) == [*columns.split(), *environment()]
    assert found[0]["commit"] and found[0]["torch"] == torch.__version__ and found[0]["T"] == "1"
    assert f"Wrote 2 rows to {file}" in capsys.readouterr().out
    assert [path.name for path in file.parent.iterdir()] == ["r.csv"]


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_errors_of_one_model_do_not_stop_the_others(validate, tmp_path, npz, monkeypatch, capsys, suffix):
    create = evaluate.create_model

    def broken(name, *args, **kwargs):
        if name == "test_mpbn_vgg":
            raise RuntimeError("out of memory")
        return create(name, *args, **kwargs)

    monkeypatch.setattr(evaluate, "create_model", broken)
    file = tmp_path / f"r.{suffix}"
    assert validate.main(["--model", "test_*_vgg", "--dataset", npz, "--T", "1", "--results-file", str(file)]) == 1
    found = json.loads(file.read_text()) if suffix == "json" else rows(file)
    assert [row["model"] for row in found] == ["test_mpbn_vgg", "test_spiking_vgg"]
    assert found[0]["error"] == "out of memory" and found[1]["top1"] not in ("", None)
    assert "test_mpbn_vgg: RuntimeError: out of memory" in capsys.readouterr().err


def test_the_process_ends_with_1_and_without_traceback_where_something_failed(tmp_path):
    for outcome, wanted in ((0, 0), (1, 1), (300, 100), (ValueError("what"), "ValueError: what")):

        def main(outcome=outcome):
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        with pytest.raises(SystemExit) as caught:
            leave(main)
        assert caught.value.code == wanted


# --------------------------------------------------------------------------------------------------- bad input


def test_unknown_model_names_the_nearest(validate):
    with pytest.raises(ValueError, match=r"mpbn_resnet91.*mpbn_resnet19"):
        validate.main(["--model", "mpbn_resnet91"])
    with pytest.raises(ValueError, match=r"No model matches 'nothing_\*'"):
        validate.main(["--model", "nothing_*"])


def test_missing_data_gives_the_two_commands(validate, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        validate.main(["--model", "spiking_resnet19", "--data-dir", str(tmp_path), "--no-dataset-download"])
    for part in ("cifar10", str(tmp_path), "--data-dir", "--dataset digits"):
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_classes_that_differ(validate, folder):
    with pytest.raises(ValueError, match=rf"{NAME} has {CLASSES} classes and digits has 10"):
        validate.main(["--checkpoint", str(folder), "--dataset", "digits"])


def test_more_classes_than_the_data_has(validate, tmp_path, npz):
    model = make(num_classes=12)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    arguments = {"T": 2, "num_classes": 12, "img_size": 8}
    config = {"architecture": NAME, "model_args": arguments, "spikezoo": {"dataset": npz}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert validate.main(["--checkpoint", str(tmp_path)]) == 0
    with pytest.raises(ValueError, match="12 classes and digits has 10"):
        validate.main(["--checkpoint", str(tmp_path), "--dataset", "digits"])


def test_no_pretrained_weights_at_all(validate):
    with pytest.raises(ValueError, match=r"No model with pretrained weights matches .*list_pretrained"):
        validate.main(["--model", "test_*", "--pretrained"])


def test_foreign_checkpoint(validate, tmp_path, folder):
    with pytest.raises(
        ValueError, match="a checkpoint of 'test_mpbn_vgg' and was asked to load into 'test_mpbn_resnet'"
    ):
        validate.main(["--checkpoint", str(folder), "--model", "test_mpbn_resnet"])
    lone = tmp_path / "lone.safetensors"
    save_file(make().state_dict(), lone)
    with pytest.raises(ValueError, match=r"nothing was loaded: \d+ missing, \d+ unexpected"):
        validate.main(["--checkpoint", str(lone), "--model", "test_mpbn_resnet"])
    with pytest.raises(ValueError, match=r"has no config\.json beside it: give --model NAME"):
        validate.main(["--checkpoint", str(lone)])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give --model NAME"),
        (["--model", NAME, "--batch-size", "0"], "--batch-size 0: expected an integer >= 1"),
        (["--model", NAME, "--results-file", "r.txt"], r"ends in \.csv or \.json"),
        (["--model", "test_*", "--checkpoint", "."], "fits one model"),
        (["--model", NAME, "--dataset", "digitz"], "digits"),
        (["--model", NAME, "--dataset", "digits", "--count", "--count-images", "0"], "--images 0"),
        (["--model", NAME, "--dataset", "digits", "--count", "--mac-pj", "-1"], "--mac-pj -1.0: expected an energy"),
        (["--model", NAME, "--dataset", "digits", "--T", "0"], "T=0"),
        (["--model", NAME, "--dataset", "digits", "--device", "cuda"], "no CUDA device"),
        (["--model", NAME, "--dataset", "digits", "--num-classes", "3"], "has 3 classes"),
    ],
)
def test_bad_flags(validate, folder, monkeypatch, flags, words):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=words):
        validate.main(flags)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("flags", [["--checkpoint", "nowhere"], ["--model", NAME, "--dataset", "npz:nowhere.npz"]])
def test_missing_files(validate, flags):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        validate.main(flags)


def test_as_a_process(folder):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--checkpoint", str(folder), "--T", "0"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("ValueError: T=0")


def test_slow_bfloat16_is_never_silent(validate, folder, monkeypatch, capsys):
    for quick in (True, False):
        monkeypatch.setattr("spikezoo.precision.fast_bfloat16", lambda device, quick=quick: quick)
        validate.main(["--checkpoint", str(folder), "--amp"])
        assert ("bfloat16 is several times slower than float32" in capsys.readouterr().err) is not quick
