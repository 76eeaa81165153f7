"""A method and a model in files of a user's own, written against public names only, train, save, load and resume."""

import re
import sys

import pytest
import torch
from conftest import forget_model, load

import spikezoo
from spikezoo import cli, transforms
from spikezoo.checkpoint import load_state, read_config, read_table
from spikezoo.flags import import_files

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


MODEL = '''
"""A net of two layers and a classifier."""

from torch import nn

from spikezoo.layers import ConvNormNeuron, Pool, Stem
from spikezoo.models import SpikingModel
from spikezoo.registry import ModelRow, register_rows


class MyNet(SpikingModel):
    def __init__(self, width=4, **kwargs):
        super().__init__(**kwargs)
        self.min_img_size = 2
        self.check_size(self.img_size)
        stem = ConvNormNeuron(self.in_chans, width, self.img_size, neuron=self.neuron_factory, dd=self.dd)
        self.add_stem(Stem(stem), width, 1)
        size = (stem.out_size[0] // 2, stem.out_size[1] // 2)
        layer = ConvNormNeuron(width, 2 * width, size, neuron=self.neuron_factory, dd=self.dd)
        self.add_stage([Pool(nn.MaxPool2d(2)), layer], 2 * width, 2)
        self.finish(2 * width)


ROWS = {"my_net": ModelRow({"width": 6}, parameters=976, paper="None.", note="A net of one's own.", img_size=8)}
default_cfgs = register_rows(__name__, MyNet, ROWS)
'''


@pytest.fixture
def files(tmp_path):
    """Both files as flags; the registries are left as they were."""
    paths = {"my_method": METHOD, "my_model": MODEL}
    for name, text in paths.items():
        (tmp_path / f"{name}.py").write_text(text)
    yield [word for name in paths for word in ("--import", str(tmp_path / f"{name}.py"))]
    transforms.TRANSFORMS.pop("magnitude", None)
    if "magnitude" in transforms.FLAGS:
        transforms.FLAGS.remove("magnitude")
    forget_model("my_net")
    for name in paths:
        sys.modules.pop(name, None)


def test_own_files_need_public_names_alone():
    for text in (METHOD, MODEL):
        assert set(re.findall(r"(?<!\w)_\w+", text)) <= {"__init__", "__name__"}


def test_a_method_and_a_model_of_ones_own_train_save_load_and_resume(files, tmp_path, monkeypatch, capsys):
    train = load("train")
    monkeypatch.setattr("spikezoo.train.output.plot", lambda *_: [])
    flags = "--model my_net --T 2 --dataset digits --subset 64 -b 16 --epochs 2 --lr 0.05 --experiment run"
    argv = [*files, "--magnitude", "sparsity=0.5", *flags.split(), "--recovery-interval", "2"]
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
    assert [float(row["eval_zeros"]) > 0.49 for row in read_table(folder / "summary.csv")] == [True, True]
    loaded = spikezoo.create_model(f"local-dir:{folder}", pretrained=True)
    assert loaded.recipe == [("magnitude", {"sparsity": 0.5})] and (loaded.head.fc.weight == 0).float().mean() > 0.49
    assert type(loaded).__name__ == "MyNet" and sum(p.numel() for p in loaded.parameters()) == 868
    assert cli.main(["validate", *files, "--checkpoint", str(folder)]) == 0
    with pytest.raises(SystemExit):
        cli.main(["train", *files, "--magnitudes", "sparsity=0.5"])
    assert "Did you mean '--magnitude'" in capsys.readouterr().err
    assert cli.main(["train", *argv, "--magnitude", "sparsty=0.5", "--output", str(tmp_path / "bad")]) == 2
    assert "Did you mean 'sparsity'" in capsys.readouterr().err


def test_files_to_import(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        import_files(["--import", str(tmp_path / "nowhere.py")])
    (tmp_path / "torch.py").write_text("")
    with pytest.raises(ValueError, match="'torch' is a module already"):
        import_files(["--import", str(tmp_path / "torch.py")])
