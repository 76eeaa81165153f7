"""A method and a model in files of a user's own, written against public names only, train, save, load and resume."""

import textwrap

import pytest
import torch
from conftest import load

import spikezoo
from spikezoo import cli
from spikezoo.checkpoint import load_state, read_config
from spikezoo.flags import import_files
from spikezoo.train.output import read_rows

METHOD = '''
"""Magnitude pruning: after every epoch the smallest weights are zero."""

import torch
from torch import nn

import spikezoo


def weights(model):
    return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def magnitude(model, sparsity=0.5):
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: expected a number in [0, 1).")
    model.register_buffer("cuts", torch.zeros((), dtype=torch.int64))


def cut(training, arguments):
    with torch.no_grad():
        for model in filter(None, (training.model, training.ema)):
            for weight in weights(model):
                count = int(arguments["sparsity"] * weight.numel())
                if count:
                    weight[weight.abs() <= weight.abs().flatten().kthvalue(count).values] = 0
            model.cuts += 1
    zeros = sum(int((w == 0).sum()) for w in weights(training.model))
    return {"zeros": zeros / sum(w.numel() for w in weights(training.model))}


spikezoo.register_transform("magnitude", magnitude, flag="remove small weights: sparsity=0.5", after_epoch=cut)
'''


@pytest.fixture
def method(tmp_path, monkeypatch):
    """The file, and the state of the registries as it was."""
    from spikezoo import transforms

    path = tmp_path / "my_method.py"
    path.write_text(textwrap.dedent(METHOD))
    monkeypatch.setattr(transforms, "FLAGS", transforms.FLAGS)
    yield path
    transforms.TRANSFORMS.pop("magnitude", None)
    if "magnitude" in transforms.FLAGS:
        transforms.FLAGS.remove("magnitude")
    import sys

    sys.modules.pop("my_method", None)


def test_a_method_of_ones_own_trains_saves_loads_and_resumes(method, tmp_path, monkeypatch, capsys):
    train = load("train")
    monkeypatch.setattr("spikezoo.train.output.plot", lambda *_: [])
    flags = "--model test_spiking_vgg --T 2 --dataset digits --subset 64 -b 16 --epochs 2 --lr 0.05 --experiment run"
    argv = ["--import", str(method), "--magnitude", "sparsity=0.5", *flags.split(), "--recovery-interval", "2"]
    assert cli.main(["train", *argv, "--output", str(tmp_path / "whole")]) == 0
    # Stopped in the second epoch, and gone on with.
    compute, calls = train.Objective.__call__, []

    def stop(self, *args):
        calls.append(None)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return compute(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train.Objective, "__call__", stop)
        assert cli.main(["train", *argv, "--output", str(tmp_path / "parts")]) == 130
    assert cli.main(["train", *argv, "--output", str(tmp_path / "parts"), "--resume", "auto"]) == 0
    whole, parts = (load_state(tmp_path / name / "run" / "last.safetensors")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole) and whole["cuts"] == 2
    folder = tmp_path / "whole" / "run"
    assert [tuple(entry) for entry in read_config(folder)["spikezoo"]["recipe"]] == [("magnitude", {"sparsity": 0.5})]
    assert [float(row["eval_zeros"]) > 0.49 for row in read_rows(folder / "summary.csv")] == [True, True]
    loaded = spikezoo.create_model(f"local-dir:{folder}", pretrained=True)
    assert loaded.recipe == [("magnitude", {"sparsity": 0.5})] and (loaded.head.fc.weight == 0).float().mean() > 0.49
    assert cli.main(["validate", "--import", str(method), "--checkpoint", str(folder)]) == 0
    with pytest.raises(SystemExit):
        cli.main(["train", "--import", str(method), "--magnitudes", "sparsity=0.5"])
    assert "Did you mean '--magnitude'" in capsys.readouterr().err
    assert cli.main(["train", *argv, "--magnitude", "sparsty=0.5", "--output", str(tmp_path / "bad")]) == 2
    assert "Did you mean 'sparsity'" in capsys.readouterr().err


def test_files_to_import(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        import_files(["--import", str(tmp_path / "nowhere.py")])
    (tmp_path / "torch.py").write_text("")
    with pytest.raises(ValueError, match="'torch' is a module already"):
        import_files(["--import", str(tmp_path / "torch.py")])
