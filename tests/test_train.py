"""train.py: interrupted runs end bit-identically, updates equal a plain loop, configs, stops, files, two processes."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import load, run_code
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import spikezoo
from spikezoo.checkpoint import Config, load_state
from spikezoo.data import create_loader
from spikezoo.evaluate import input_options, open_model
from spikezoo.factory import create_from
from spikezoo.neurons import QCFS
from spikezoo.train.muon import FixedNormMuon, normalised_weights
from spikezoo.train.start import fit_thresholds

ROOT = Path(__file__).parents[1]


def flags(output, *more):
    """A run of 4 batches an epoch; later flags win."""
    base = "--model test_mpbn_vgg --T 2 --dataset digits --subset 64 -b 16 --epochs 2 --lr 0.05 --experiment run"
    return [*base.split(), "--output", str(output), *map(str, more)]


def tensors(path):
    return load_file(path)


def tree(path):
    """What a training state holds besides tensors."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["tree"])


def assert_same_weights(a, b):
    a, b = (load_file(x) if isinstance(x, Path) else x for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_end(a, b):
    """Two output folders hold the same weights and the same training state, bit by bit."""
    assert_same_weights(a / "model.safetensors", b / "model.safetensors")
    assert_same_weights(a / "last.safetensors", b / "last.safetensors")
    assert tree(a / "last.safetensors") == tree(b / "last.safetensors")
    first, second = summary(a), summary(b)
    timing = {"train_seconds", "train_images_per_second", "eval_images_per_second"}
    assert [{k: v for k, v in row.items() if k not in timing} for row in first] == [
        {k: v for k, v in row.items() if k not in timing} for row in second
    ]


def summary(folder):
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def remains(folder):
    return [path.name for path in folder.rglob("*") if "tmp" in path.name or path.name.startswith((".", "recovery"))]


class Stop(BaseException):
    """Ends a run from inside, as nothing in train.py catches it."""


def interrupted(train, argv, call, monkeypatch):
    """Run until the loss has been asked for ``call`` times."""
    original, calls = train.Objective.__call__, []

    def stop(self, *args):
        calls.append(None)
        if len(calls) == call:
            raise Stop
        return original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train.Objective, "__call__", stop)
        train.main(argv)


# ----------------------------------------------------------------------------------------------------- resume

EVERYTHING = (  # 7 batches an epoch
    "--grad-accum-steps 2 --recovery-interval 2 --model-ema --model-ema-decay 0.9 --drop 0.2 --reprob 0.5 --mixup 0.4 "
    "--cutmix 0.5 --smoothing 0.1 --clip-grad 1.0 --warmup-epochs 1 --subset 112 --rate-penalty 0.1"
)
RECIPES = {
    "momentum": "--opt momentum --lr 0.05",
    "adamw by epoch": "--opt adamw --lr 1e-3 --opt-betas 0.8 0.99 --no-sched-on-updates --sched step --decay-epochs 1",
    "tet": "--opt sgd --tet --tet-lambda 0.1 --layer-decay 0.8 --opt-kwargs dampening=0.0 --model-kwargs decay=0.5",
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("call", [4, 13, 8])  # one batch after a recovery, in both epochs; just after an epoch's end
def test_resume_is_bit_identical(fast, tmp_path, monkeypatch, capsys, recipe, call):
    more = [*EVERYTHING.split(), *RECIPES[recipe].split()]
    fast.main(flags(tmp_path / "whole", *more))
    argv = flags(tmp_path / "parts", *more, "--resume", "auto")  # 'auto' also starts a run
    interrupted(fast, argv, call, monkeypatch)
    folder = tmp_path / "parts" / "run"
    recovery = {4: ["recovery-0-2"], 13: ["recovery-1-2", "recovery-1-4"], 8: []}[call]
    assert sorted(path.stem for path in folder.glob("recovery-*")) == recovery
    torch.manual_seed(99)  # the state must not come from this process
    capsys.readouterr()
    fast.main(argv)
    at = {4: "epoch 1, batch 2", 13: "epoch 2, batch 4", 8: "epoch 2, batch 0"}[call]
    assert f"{at}." in capsys.readouterr().out
    assert_same_end(tmp_path / "whole" / "run", folder)
    assert not remains(folder)


def test_resume_after_sigkill(fast, tmp_path):
    more = [*EVERYTHING.split(), "--opt", "momentum"]
    argv = flags(tmp_path / "parts", *more, "--resume", "auto")
    # The process kills itself one batch after its second recovery file of the second epoch, while it writes a state.
    code = f"""
        import os, signal
        from spikezoo.train import main, state
        original = state.save_state
        def save(path, content):
            if content["epoch"] == 1 and content["batch"] == 6:
                open(os.path.join(os.path.dirname(path), f".last.safetensors.{{os.getpid()}}.tmp"), "w").write("half")
                os.kill(os.getpid(), signal.SIGKILL)
            original(path, content)
        state.save_state = save
        main({argv!r})
    """
    done = run_code(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "parts" / "run"
    assert remains(folder)
    fast.main(argv)
    fast.main(flags(tmp_path / "whole", *more))
    assert_same_end(tmp_path / "whole" / "run", folder)
    assert not remains(folder)


def test_resume_of_a_finished_run_changes_nothing(fast, tmp_path, capsys):
    argv = flags(tmp_path, "--model-ema", "--model-ema-decay", "0.5")
    fast.main(argv)
    folder = tmp_path / "run"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    accuracy = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Test accuracy"))
    fast.main([*argv, "--resume", "auto"])
    assert accuracy in capsys.readouterr().out  # that of the averaged weights, which the run delivers
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == after.keys()
    for name in before.keys() - {"metadata.json", "config.json"}:  # which hold the time
        assert before[name] == after[name], name
    fast.main([*argv, "--resume", str(folder / "last.safetensors"), "--experiment", "elsewhere"])
    assert accuracy in capsys.readouterr().out and (tmp_path / "elsewhere" / "model.safetensors").is_file()


def test_resume_takes_the_state_that_is_furthest_and_refuses_a_broken_one(fast, tmp_path, monkeypatch):
    argv = flags(tmp_path, "--recovery-interval", "1", "--resume", "auto")
    interrupted(fast, argv, 8, monkeypatch)
    folder = tmp_path / "run"
    assert sorted(path.stem for path in folder.glob("recovery-*")) == ["recovery-1-2", "recovery-1-3"]
    assert fast.newest_state(folder) == folder / "recovery-1-3.safetensors"
    (folder / "recovery-1-3.safetensors").unlink()
    (folder / "recovery-1-2.safetensors").unlink()
    assert fast.newest_state(folder) == folder / "last.safetensors"
    last = folder / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"Cannot read .*last\.safetensors .*truncated"):
        fast.main(argv)


def test_resume_where_the_summary_is_ahead_of_the_checkpoint(fast, tmp_path, monkeypatch):
    # Killed between the first row and the first checkpoint: the row goes, the header stays.
    argv = flags(tmp_path, "--recovery-interval", "2", "--resume", "auto")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(fast.Saver, "save_checkpoint", lambda *_: (_ for _ in ()).throw(Stop()))
        fast.main(argv)
    assert len(summary(tmp_path / "run")) == 1
    fast.main(argv)
    assert [row["epoch"] for row in summary(tmp_path / "run")] == ["1", "2"]


def test_resume_with_other_flags_raises_and_writes_nothing(fast, tmp_path):
    fast.main(flags(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    last = tmp_path / "run" / "last.safetensors"
    for more, words in (
        (["--lr", "0.1"], "lr is 0.1 and was 0.05"),
        (["--weight-decay", "0"], r"weight_decay is 0.0 and was 0.0005"),
        (["--mixup", "0.2"], r"mixup is 0.2 and was 0.0"),
        (["--epochs", "3"], "epochs is 3 and was 2"),
        (["--model-ema"], "model_ema is True and was False"),
        (["--T", "3"], r"test_mpbn_vgg.*'T': 2.*asks for.*'T': 3"),
        (["--model", "test_spiking_vgg"], "was written by model 'test_mpbn_vgg'"),
    ):
        for resume in (["auto"], [str(last), "--experiment", "other"]):
            with pytest.raises(ValueError, match=words):
                fast.main(flags(tmp_path, *more, "--resume", *resume))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        fast.main(flags(tmp_path, "--resume", tmp_path / "nowhere.safetensors"))
    # Where the data is, how much is said and how often is saved are no part of the recipe.
    fast.main(flags(tmp_path, "--resume", "auto", "--log-interval", "1", "--workers", "0", "--recovery-interval", "1"))


def test_no_resume_opt_takes_only_the_weights(fast, tmp_path, monkeypatch):
    fast.main(flags(tmp_path))
    last = tmp_path / "run" / "last.safetensors"
    runs = []
    monkeypatch.setattr(fast.Run, "train", lambda self: runs.append(self) or self.evaluate())
    fast.main(flags(tmp_path, "--lr", "0.1", "--model-ema", "--resume", last, "--no-resume-opt"))
    (run,) = runs
    weights = load_state(last)["model"]
    assert_same_weights(run.model.state_dict(), weights)
    assert_same_weights(run.ema.state_dict(), weights)  # not the random ones of the start
    assert (run.epoch, run.updates, run.optimizer.state_dict()["state"]) == (0, 0, {})


# ------------------------------------------------------------------------------- updates equal those of a plain loop


def without_norms(monkeypatch):
    """Models whose samples do not see each other, so that gradients of parts add up to those of the whole."""
    create = spikezoo.create_model

    def create_model(*args, **kwargs):
        model = create(*args, **kwargs)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
                    setattr(module, name, torch.nn.Identity())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)  # so that neurons fire without norms
        return model

    monkeypatch.setattr("spikezoo.saving._check_rebuilds", lambda *_: None)  # which would refuse to save such a net
    monkeypatch.setattr("spikezoo.train.build.create_model", create_model)
    return create_model


PLAIN = [
    "--model",
    "test_spiking_vgg",
    "--crop-padding",
    0,
    "--opt",
    "momentum",
    "--weight-decay",
    0,
    "--sched",
    "none",
]


@pytest.mark.parametrize(
    ("accumulate", "clip", "groups"),
    [(2, None, [32] * 5), (4, None, [64, 64, 32]), (3, 0.05, [48, 48, 48, 16])],
)
def test_accumulation_clipping_and_ema_equal_a_plain_loop(fast, tmp_path, monkeypatch, accumulate, clip, groups):
    create_model = without_norms(monkeypatch)
    ema = ["--model-ema", "--model-ema-decay", "0.75"]
    clipped = ["--clip-grad", clip] if clip else []
    more = [*PLAIN, *ema, *clipped, "--subset", 160, "--epochs", 1, "--grad-accum-steps", accumulate]
    fast.main(flags(tmp_path, *more))

    fast.random_seed(42, 0)
    model = create_model("test_spiking_vgg", num_classes=10, in_chans=1, img_size=8, T=2)
    start = {name: value.clone() for name, value in model.named_parameters()}
    loader = create_loader("digits", "train", train=True, batch_size=16, seed=42, subset=160, crop_padding=0)
    images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    velocity = {name: torch.zeros_like(value) for name, value in start.items()}
    average, norms = None, []
    for x, y in zip(images.split(groups), labels.split(groups), strict=True):
        logits = model(x)
        loss = -logits.log_softmax(1)[torch.arange(len(y)), y].mean()
        gradients = dict(zip(start, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        norms.append(math.sqrt(sum(g.double().square().sum().item() for g in gradients.values())))
        factor = min(1, clip / norms[-1]) if clip else 1
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                velocity[name] = 0.9 * velocity[name] + factor * gradients[name]
                parameter -= 0.05 * velocity[name]
        now = {name: value.detach().clone() for name, value in model.named_parameters()}
        average = now if average is None else {n: 0.75 * average[n] + 0.25 * now[n] for n in now}
    assert not clip or max(norms) > clip  # otherwise nothing was clipped

    found = load_state(tmp_path / "run" / "last.safetensors")
    assert found["updates"] == len(groups)
    for name, wanted in model.named_parameters():
        assert not torch.allclose(start[name], wanted, atol=1e-4)
        torch.testing.assert_close(found["model"][name], wanted.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["ema"][name], average[name], atol=1e-5, rtol=1e-4)
    # The run delivers the averaged weights.
    assert_same_weights(tmp_path / "run" / "model.safetensors", found["ema"])


def test_two_halves_equal_one_batch(fast, tmp_path, monkeypatch):
    without_norms(monkeypatch)
    for name, batch, accumulate in (("whole", 32, 1), ("halves", 16, 2)):
        more = [*PLAIN, "--epochs", 1, "-b", batch, "--grad-accum-steps", accumulate]
        fast.main(flags(tmp_path, *more, "--experiment", name))
    whole, halves = (tensors(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    for name in whole:
        torch.testing.assert_close(halves[name], whole[name], atol=1e-6, rtol=1e-4)


def test_cosine_on_updates_by_hand(fast, tmp_path):
    fast.main(flags(tmp_path, "--epochs", "4", "--lr", "0.08", "--min-lr", "0.01", "--warmup-epochs", "1"))
    # The warmup is the schedule's first quarter, linear from 1e-5; a row has the mean of its epoch's four updates.

    def rate(t):
        return 1e-5 + t * (0.08 - 1e-5) / 4 if t < 4 else 0.01 + 0.07 * (1 + math.cos(math.pi * t / 16)) / 2

    wanted = [sum(map(rate, range(start, start + 4))) / 4 for start in (0, 4, 8, 12)]
    assert [float(row["lr"]) for row in summary(tmp_path / "run")] == pytest.approx(wanted)


@pytest.mark.parametrize("sched", ["cosine", "step", "multistep", "poly", "tanh", "wsd", "rsqrt", "constant", "none"])
def test_every_schedule_runs_and_resumes(fast, tmp_path, monkeypatch, sched):
    more = ["--sched", sched, "--subset", 32, "--decay-epochs", 1, "--warmup-epochs", 0.5, "--warmup-prefix"]
    argv = flags(tmp_path, *more, "--resume", "auto")
    interrupted(fast, argv, 3, monkeypatch)
    fast.main(argv)
    rows = summary(tmp_path / "run")
    assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1)) and len(rows) in (2, 3)


# ------------------------------------------------------------------------------------------------------- loss


def objective(train, soft=False, **given):
    args = train.parse_args([])
    for name, value in given.items():
        setattr(args, name, value)
    return train.Objective(args, soft)


LOGITS = torch.tensor([[[1.0, 2, 0], [0, -1, 3]], [[0, 0, 1], [2, 2, -2]]])  # [T, B, K]
TARGET = torch.tensor([1, 0])
NO_RATES = torch.zeros(1, 2)


def entropy(logits, weights):
    total = math.log(sum(math.exp(v) for v in logits))
    return sum(w * (total - v) for w, v in zip(weights, logits, strict=True))


ONE_HOT = [[0, 1, 0], [1, 0, 0]]


def test_cross_entropy_smoothing_and_soft_targets_by_hand(train):
    logits = LOGITS[0]
    wanted = (entropy([1, 2, 0], [0, 1, 0]) + entropy([0, -1, 3], [1, 0, 0])) / 2
    assert objective(train)(logits, TARGET, NO_RATES).item() == pytest.approx(wanted)
    smooth = [[0.1, 0.8, 0.1], [0.8, 0.1, 0.1]]  # 0.3 spread over 3 classes
    wanted = (entropy([1, 2, 0], smooth[0]) + entropy([0, -1, 3], smooth[1])) / 2
    assert objective(train, smoothing=0.3)(logits, TARGET, NO_RATES).item() == pytest.approx(wanted)
    assert objective(train, soft=True)(logits, torch.tensor(smooth), NO_RATES).item() == pytest.approx(wanted)


@pytest.mark.parametrize("soft", [False, True])
def test_tet_by_hand(train, soft):
    target = torch.tensor(ONE_HOT, dtype=torch.float) if soft else TARGET
    steps = [sum(entropy(LOGITS[t, b].tolist(), ONE_HOT[b]) for b in range(2)) / 2 for t in range(2)]
    wanted = sum(steps) / 2
    found = objective(train, soft, tet=True)(LOGITS, target, NO_RATES)
    assert found.item() == pytest.approx(wanted)
    assert wanted != pytest.approx(F.cross_entropy(LOGITS.mean(0), TARGET).item())  # not the loss of the mean
    pull = sum((v - 1) ** 2 for v in LOGITS.flatten().tolist()) / 12
    found = objective(train, soft, tet=True, tet_lambda=0.25)(LOGITS, target, NO_RATES)
    assert found.item() == pytest.approx(0.75 * wanted + 0.25 * pull)


def test_rate_penalty_by_hand(train):
    rates = torch.tensor([[0.2, 0.4], [0.1, 0.0], [0.5, 0.7]], requires_grad=True)
    plain = objective(train)(LOGITS[0], TARGET, rates).item()
    found = objective(train, rate_penalty=2.0, rate_target=0.15)(LOGITS[0], TARGET, rates)
    # Layer means 0.3, 0.05, 0.6; above the target by 0.15, nothing, 0.45.
    assert found.item() - plain == pytest.approx(2 * (0.15 + 0.45) / 3)
    found.backward()
    torch.testing.assert_close(rates.grad, torch.tensor([[1 / 3, 1 / 3], [0, 0], [1 / 3, 1 / 3]]))


def test_half_precision_logits_have_a_full_precision_loss(train):
    wanted = objective(train)(LOGITS[0].bfloat16().float(), TARGET, NO_RATES)
    found = objective(train)(LOGITS[0].bfloat16(), TARGET, NO_RATES)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def test_the_rate_penalty_lowers_the_firing_rate(fast, tmp_path):
    found = {}
    for name, penalty in (("without", 0), ("with", 5)):
        fast.main(flags(tmp_path, "--experiment", name, "--epochs", 4, "--rate-penalty", penalty))
        config = json.loads((tmp_path / name / "config.json").read_text())
        found[name] = config["spikezoo"]["results"]["firing_rate"]
    assert found["with"] < 0.7 * found["without"]
    with pytest.raises(ValueError, match="neuron='relu', which does not fire"):
        fast.main(flags(tmp_path, "--neuron", "relu", "--mpbn", "none", "--T", 1, "--rate-penalty", 1))


# ----------------------------------------------------------------------------------------------------- config


def config(tmp_path, text):
    path = tmp_path / "my recipe.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_config_values_have_the_types_of_the_flags(train, tmp_path):
    text = """
        lr: 3e-4
        weight-decay: 5e-2
        min_lr: 0
        epochs: 3.0
        batch_size: "8"
        amp: true
        sched_on_updates: false
        opt_betas: [0.8, 99e-2]
        decay_milestones: [3, 5]
        model_kwargs: {decay: 5e-1, surrogate: triangle}
        opt_kwargs: {betas: [8e-1, 0.99]}
        clip_grad: 1
        neuron: if
        data_dir:
    """
    args = train.parse_args(config(tmp_path, textwrap.dedent(text)))
    found = {
        name: getattr(args, name) for name in ("lr", "weight_decay", "min_lr", "epochs", "batch_size", "clip_grad")
    }
    wanted = {"lr": 3e-4, "weight_decay": 0.05, "min_lr": 0.0, "epochs": 3, "batch_size": 8, "clip_grad": 1.0}
    assert found == wanted and [type(v) for v in found.values()] == [type(v) for v in wanted.values()]
    assert args.amp is True and args.sched_on_updates is False
    assert args.opt_betas == [0.8, 0.99] and args.decay_milestones == [3, 5]
    assert args.model_kwargs == {"decay": 0.5, "surrogate": "triangle"}
    assert args.opt_kwargs == {"betas": [0.8, 0.99]}
    assert args.neuron == "if" and args.data_dir is None
    assert args.experiment == "my recipe"


def test_the_command_line_wins_over_the_config(train, tmp_path):
    text = "lr: 3e-4\namp: true\nepochs: 7\nsched_on_updates: false\nmodel_kwargs: {decay: 0.5}\nexperiment: x"
    more = ["--lr", "0.2", "--sched-on-updates", "--model-kwargs", "tau=2.0", "name=a=b", "--experiment", "y"]
    args = train.parse_args([*config(tmp_path, text), *more])
    assert (args.lr, args.epochs, args.amp, args.sched_on_updates) == (0.2, 7, True, True)
    assert args.model_kwargs == {"tau": 2.0, "name": "a=b"} and args.experiment == "y"
    # Switches can be turned off, too.
    switches = "amp channels_last torchcompile grad_checkpointing tet model_ema pretrained"
    for name in switches.split():
        flag = f"--no-{name.replace('_', '-')}"
        assert getattr(train.parse_args(config(tmp_path, f"{name}: true")), name) is True
        assert getattr(train.parse_args([*config(tmp_path, f"{name}: true"), flag]), name) is False
    # Also where the flag repeats the default.
    assert train.parse_args([*config(tmp_path, "lr: 3e-4"), "--lr", "0.1"]).lr == 0.1


def test_an_empty_config_is_the_defaults(train, tmp_path):
    args, default = train.parse_args(config(tmp_path, "# nothing")), train.parse_args([])
    different = {name for name, value in vars(default).items() if getattr(args, name) != value}
    assert different == {"config", "experiment", "command"} and default.experiment == default.model


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", r"Unknown key 'epoch' in .*my recipe\.yaml.*epochs"),
        ("learning_rate: 3", r"Unknown key 'learning_rate'"),
        ("batchsize: 3", r"batch_size"),
        ("1: 2", "Unknown key 1"),
        ("config: x.yaml", "Unknown key 'config'"),
        ("epochs: 1.5", "'epochs': 1.5, expected int"),
        ("epochs: ten", "'epochs': 'ten', expected int"),
        ("epochs: true", "'epochs': True, expected int"),
        ("epochs: [1]", r"'epochs': \[1\], expected one value"),
        ("epochs:", "'epochs': it has no value"),
        ("lr: fast", "'lr': 'fast', expected float"),
        ("lr: {a: 1}", "expected one value"),
        ("lr: no", "'lr': False, expected float"),
        ("opt: false", "'opt': False, expected str"),
        ("amp: 1", "'amp': 1, expected true or false"),
        ("sched_on_updates: 'yes'", "'sched_on_updates': 'yes', expected true or false"),
        ("opt_betas: 0.9", "'opt_betas': 0.9, expected a list"),
        ("opt_betas: [a, b]", "expected float"),
        ("model_kwargs: [1]", r"expected a mapping, for instance \{decay: 0.5\}"),
        ("amp_dtype: bfloat", "'amp_dtype': 'bfloat' does not exist.*bfloat16"),
        ("- a\n- b", "holds a list: expected 'key: value' lines"),
        ("lr: [", "is not valid YAML"),
        ("lr: -1", "--lr -1.0: expected a number above 0"),
    ],
)
def test_bad_config(train, tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        train.parse_args(config(tmp_path, text))


def test_missing_config(train, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No config at .*nowhere\.yaml"):
        train.parse_args(["--config", str(tmp_path / "nowhere.yaml")])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *((f"--{name}", "-1") for name in ("weight-decay", "clip-grad", "warmup-epochs", "mixup", "subset", "workers")),
        *((f"--{name}", "0") for name in ("epochs", "batch-size", "validation-batch-size", "grad-accum-steps", "lr")),
        *((f"--{name}", "nan") for name in ("lr", "weight-decay", "clip-grad", "smoothing", "rate-penalty")),
        *((f"--{name}", "1") for name in ("smoothing", "drop", "tet-lambda", "momentum")),
        ("--lr", "inf"),
        ("--rate-penalty", "-0.1"),
    ],
)
def test_impossible_numbers(train, flag, value):
    with pytest.raises(ValueError, match=rf"^{flag} {value}.*expected a number"):
        train.parse_args([flag, value])


def test_compiled_recomputation_is_refused(train):
    for other in ("--torchcompile", "--grad-checkpointing"):
        with pytest.raises(ValueError, match=f"--sync-bn {other}"):
            train.parse_args(["--sync-bn", other])
    with pytest.raises(ValueError, match="--grad-checkpointing --torchcompile"):
        train.parse_args(["--grad-checkpointing", "--torchcompile"])


def test_unknown_schedule_names_the_nearest(train):
    with pytest.raises(ValueError, match=r"'cosin' does not exist.*cosine"):
        train.parse_args(["--sched", "cosin"])


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        (["--model", "test_mpbn_vgh"], ValueError, "test_mpbn_vgg"),
        (["--dataset", "digitz"], ValueError, "digits"),
        (["--dataset", "npz:nowhere.npz"], FileNotFoundError, "nowhere.npz"),
        (["--dataset", "cifar10", "--no-dataset-download"], FileNotFoundError, "--data-dir.*--dataset digits"),
        (["--opt", "sgdd"], ValueError, "'sgdd' does not exist.*'sgd'"),
        (["--dataset", "folder", "--data-dir", __file__], ValueError, "one file.*train.tar and val.tar"),
        (["--model-kwargs", "decai=0.5"], ValueError, "decai.*decay"),
        (["--opt-kwargs", "dampning=0.5"], ValueError, "--opt-kwargs.*unexpected keyword argument 'dampning'"),
        (["--seed", "-1"], ValueError, r"--seed -1: expected a whole number from 0 to 2\*\*32 - 1"),
        (["--experiment", "../x"], ValueError, r"--experiment ../x: expected the name of a folder"),
        (["--experiment", "/x"], ValueError, r"--experiment /x: expected the name of a folder"),
        (["--device", "cuda"], ValueError, "no CUDA device.*--device cpu"),
        (["--initial-checkpoint", "nowhere"], FileNotFoundError, "nowhere"),
        (["--pretrained"], ValueError, "pretrained"),
    ],
)
def test_bad_runs_leave_nothing(fast, tmp_path, monkeypatch, more, error, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPIKEZOO_DATA", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=words):
        fast.main(flags("out", *more))
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- not finite


def stopped(train, argv):
    with pytest.raises(SystemExit) as caught:
        train.main(argv)
    return str(caught.value)


def test_a_learning_rate_that_explodes(fast, tmp_path):
    told = stopped(fast, flags(tmp_path, "--lr", "1e30", "--sched", "none"))
    assert "at epoch 1, batch" in told and "(update " in told
    assert "none was written yet" in told and "--lr" in told
    layer = told.split("First layer whose output is not finite: ")[1].split(". Last")[0]
    model = spikezoo.create_model("test_mpbn_vgg")
    assert layer in dict(model.named_modules())
    assert not list((tmp_path / "run").glob("*.safetensors"))


def with_inf(tmp_path, name):
    model = spikezoo.create_model("test_mpbn_vgg", in_chans=1, img_size=8)
    model.state_dict()[name].view(-1)[0] = math.inf
    save_file(model.state_dict(), tmp_path / "inf.safetensors")
    return ["--initial-checkpoint", tmp_path / "inf.safetensors"]


def test_weights_that_are_not_finite(fast, tmp_path):
    told = stopped(fast, flags(tmp_path, *with_inf(tmp_path, "head.fc.weight")))
    assert "the loss is nan at epoch 1, batch 1 (update 0)" in told or "the loss is inf at" in told
    assert "not finite: head.fc. Last good checkpoint: none" in told


@pytest.mark.parametrize(("more", "batch"), [(["--recovery-interval", "2"], 2), ([], 4)])
def test_nan_that_a_neuron_turns_into_silence(fast, tmp_path, more, batch):
    # A neuron does not fire at nan, so the loss stays finite; the dead network must still not be saved.
    told = stopped(fast, flags(tmp_path, *with_inf(tmp_path, "stem.0.conv.weight"), *more))
    assert f"stem.0.conv.weight is not finite at epoch 1, batch {batch} (update {batch})" in told
    assert "First layer whose output is not finite: stem.0.conv." in told
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_stop_keeps_the_last_good_files(fast, tmp_path, monkeypatch):
    finish, kept = fast.Run._finish_epoch, {}
    folder = tmp_path / "run"

    def poison(self, *args):
        finish(self, *args)
        kept.update((path.name, path.read_bytes()) for path in folder.iterdir())
        with torch.no_grad():
            self.model.head.fc.weight[0, 0] = math.nan

    monkeypatch.setattr(fast.Run, "_finish_epoch", poison)
    told = stopped(fast, flags(tmp_path, "--epochs", "3"))
    assert "the loss is nan at epoch 2, batch 1 (update 4)" in told and "not finite: head.fc." in told
    assert f"Last good checkpoint: {folder / 'last.safetensors'}" in told
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    assert torch.isfinite(load_state(folder / "last.safetensors")["model"]["head.fc.weight"]).all()


def test_images_that_are_not_finite(train):
    model = spikezoo.create_model("test_mpbn_vgg", img_size=8)
    images = torch.full((1, 3, 8, 8), math.nan)
    assert train.not_finite(model, images, train.nullcontext) == "the input images"
    assert "the loss itself" in train.not_finite(model, torch.zeros(1, 3, 8, 8), train.nullcontext)
    assert not any(module._forward_hooks for module in model.modules())


# ----------------------------------------------------------------------------------------------- output folder


def test_output_folder(train, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    argv = flags(tmp_path, "--model-ema", "--opt-betas", "0.9", "0.99", "--opt", "adamw", "--model-kwargs", "decay=0.5")
    train.main([*argv, "--checkpoint-hist", "1", "--log-interval", "2"])
    folder = tmp_path / "run"
    best = int(load_state(folder / "model_best.safetensors")["epoch"]) - 1
    files = [
        "args.yaml",
        "metadata.json",
        "summary.csv",
        "layer_rates.csv",
        "curves.png",
        "firing_rates.png",
        "config.json",
    ]
    states = ["last.safetensors", "model_best.safetensors", "model.safetensors", f"checkpoint-{best}.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(files + states)
    for name in ("curves.png", "firing_rates.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    rows = summary(folder)
    columns = """epoch train_loss train_top1 train_firing_rate train_images_per_second train_seconds eval_top1 eval_top5
        eval_loss eval_firing_rate eval_images_per_second eval_ema_top1 eval_ema_top5 eval_ema_loss eval_ema_firing_rate
        lr"""
    assert list(rows[0]) == columns.split() and [row["epoch"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    top1 = [float(row["eval_ema_top1"]) for row in rows]
    assert top1[best] == max(top1)

    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["seed"] == 42 and metadata["command"].startswith("spikezoo train --model test_mpbn_vgg")
    assert {"commit", "python", "torch", "timm", "spikezoo-snn", "machine", "date"} <= metadata.keys()
    results = json.loads((folder / "config.json").read_text())
    assert results["architecture"] == "test_mpbn_vgg" and results["spikezoo"]["results"]["samples"] == 360
    assert results["model_args"] == {"T": 2, "num_classes": 10, "in_chans": 1, "img_size": 8, "decay": 0.5}

    out = capsys.readouterr().out
    for words in ("parameters", "images/s", "firing rate", "batch 2/4", "Validate it", str(folder)):
        assert words in out

    # What was measured in training is what validate.py finds in the folder.
    validate = load("validate")
    validate.main(["--checkpoint", str(folder), "--json"])
    row = json.loads(capsys.readouterr().out)
    assert row["loss"] == pytest.approx(results["spikezoo"]["results"]["loss"], abs=1e-5)
    assert row["top1"] == pytest.approx(results["spikezoo"]["results"]["top1"], abs=1e-3)


@pytest.mark.parametrize("stored", ["run", "run/last.safetensors"])
def test_the_statistics_of_the_inputs_travel_with_the_weights(fast, tmp_path, stored):
    fast.main(flags(tmp_path, "--mean", "0", "--std", "1", "--epochs", "1"))
    reached = json.loads((tmp_path / "run/config.json").read_text())["spikezoo"]["results"]
    validate = load("validate")
    rows = tmp_path / "rows.json"

    def rate(checkpoint, *more):
        assert not validate.main(["--checkpoint", str(checkpoint), "--results-file", str(rows), *more])
        return json.loads(rows.read_text())[0]["firing_rate"]

    assert rate(tmp_path / stored) == pytest.approx(reached["firing_rate"], abs=1e-5)
    assert abs(rate(tmp_path / stored, "--mean", "0.5") - reached["firing_rate"]) > 1e-2
    model, dataset, _ = open_model("test_mpbn_vgg", {}, checkpoint=tmp_path / stored)
    # A run of train.py stores the names of the classes as well.
    names = {"label_names": tuple(map(str, range(10)))} if stored == "run" else {}
    assert input_options(model, dataset) == {"T": model.T, "mean": [0.0], "std": [1.0], **names}
    assert input_options(model, dataset, [0.5]) == {"T": model.T, "mean": [0.5], "std": [1.0], **names}
    images = next(iter(create_loader(dataset, "test", **input_options(model, dataset))))[0]
    assert images.min() == 0 and images.max() == 1
    spikezoo.save_checkpoint(model, tmp_path / "again", {"dataset": "digits"})
    assert rate(tmp_path / "again") == pytest.approx(reached["firing_rate"], abs=1e-5)
    fast.main(flags(tmp_path, "--epochs", "1", "--experiment", "tuned", "--initial-checkpoint", tmp_path / stored))
    assert yaml.safe_load((tmp_path / "tuned/args.yaml").read_text()).get("mean") is None
    tuned = json.loads((tmp_path / "tuned/config.json").read_text())
    assert tuned["spikezoo"]["inputs"] == {"mean": [0.0], "std": [1.0]} and tuned["pretrained_cfg"]["std"] == [1.0]


def test_statistics_of_other_channels_are_not_taken(tmp_path):
    model = spikezoo.create_model("test_mpbn_vgg")
    model.pretrained_cfg |= {"inputs": {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}}
    spikezoo.save_checkpoint(model, tmp_path / "colour")
    stored = f"local-dir:{tmp_path / 'colour'}"
    assert input_options(spikezoo.create_model(stored, True), "cifar10")["mean"] == [0.1, 0.2, 0.3]
    assert "mean" not in input_options(spikezoo.create_model(stored, True, in_chans=1), "mnist")


def test_args_yaml_repeats_the_run_in_a_new_folder(fast, tmp_path):
    more = ["--opt", "adamw", "--opt-betas", "0.8", "0.99", "--lr", "3e-3", "--model-kwargs", "decay=0.5"]
    fast.main(flags(tmp_path, *more, "--no-sched-on-updates", "--mixup", "0.2", "--drop", "0.1"))
    fast.main(["--config", str(tmp_path / "run" / "args.yaml")])
    fast.main(["--config", str(tmp_path / "run" / "args.yaml"), "--seed", "1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-1", "run-2"]
    assert_same_end(tmp_path / "run", tmp_path / "run-1")
    first, second = (yaml.safe_load((tmp_path / name / "args.yaml").read_text()) for name in ("run", "run-1"))
    assert first == second
    first, third = (tensors(tmp_path / name / "model.safetensors") for name in ("run", "run-2"))
    assert not torch.equal(first["head.fc.weight"], third["head.fc.weight"])  # the seed matters


def test_resume_with_other_class_names(fast, tmp_path):
    arrays = {"label_names": np.array(["cat", "dog"])}
    for split in ("train", "test"):
        arrays[f"{split}_images"] = np.zeros((4, 8, 8, 3), np.uint8)
        arrays[f"{split}_labels"] = np.arange(4) % 2
    argv = ["--model", "test_mpbn_vgg", "--dataset", f"npz:{tmp_path / 'a.npz'}", "-b", "2", "--epochs", "1"]
    argv += ["--T", "1", "--device", "cpu", "--experiment", "run", "--output", str(tmp_path / "out")]
    np.savez(tmp_path / "a.npz", **arrays)
    fast.main(argv)
    folder = tmp_path / "out" / "run"
    assert load_state(folder / "last.safetensors")["label_names"] == ["cat", "dog"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    np.savez(tmp_path / "a.npz", **{**arrays, "label_names": np.array(["cat", "cow"])})
    with pytest.raises(ValueError, match=r"last\.safetensors was trained .* class 1 is 'dog', and here .*cow"):
        fast.main([*argv, "--resume", "auto"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_best_checkpoints_are_kept(fast, tmp_path):
    fast.main(flags(tmp_path, "--epochs", "4", "--checkpoint-hist", "2", "--eval-metric", "loss", "--subset", "32"))
    folder = tmp_path / "run"
    losses = [float(row["eval_loss"]) for row in summary(folder)]
    order = sorted(range(4), key=losses.__getitem__)
    kept = {int(path.stem.split("-")[1]) for path in folder.glob("checkpoint-*")}
    assert kept == set(order[:2])
    assert load_state(folder / "model_best.safetensors")["epoch"] == order[0] + 1
    assert not remains(folder)


def test_without_hard_links(fast, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    fast.main(flags(tmp_path, "--epochs", "1"))
    folder = tmp_path / "run"
    assert (folder / "model_best.safetensors").read_bytes() == (folder / "last.safetensors").read_bytes()
    assert not remains(folder)


def test_without_matplotlib(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train.main(flags(tmp_path, "--epochs", "1"))
    assert "pip install 'spikezoo-snn[plot]'" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("*.png"))


def test_a_twin_without_spikes(train, tmp_path):
    pytest.importorskip("matplotlib")
    train.main(flags(tmp_path, "--model", "test_spiking_vgg", "--neuron", "relu", "--T", "1"))
    assert summary(tmp_path / "run")[0]["train_firing_rate"] == ""
    assert (tmp_path / "run" / "curves.png").is_file() and not (tmp_path / "run" / "firing_rates.png").exists()


# ---------------------------------------------------------------------------------------------- ways of running


def test_grad_checkpointing_changes_nothing(fast, tmp_path):
    for name, more in (("plain", []), ("checkpointed", ["--grad-checkpointing"])):
        fast.main(flags(tmp_path, "--experiment", name, *more))
    plain, found = (tensors(tmp_path / name / "model.safetensors") for name in ("plain", "checkpointed"))
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], atol=1e-5, rtol=1e-4)


def test_channels_last_stays_close(fast, tmp_path):
    for name, more in (("plain", []), ("last", ["--channels-last"])):
        fast.main(flags(tmp_path, "--experiment", name, "--subset", 16, "--epochs", 1, *more))
    plain, found = (tensors(tmp_path / name / "model.safetensors") for name in ("plain", "last"))
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("more", [[], ["--amp-dtype", "float16", "--grad-accum-steps", "2", "--clip-grad", "1"]])
def test_amp_learns_and_resumes(fast, tmp_path, monkeypatch, more):
    argv = flags(tmp_path, "--amp", "--channels-last", *more, "--recovery-interval", 2, "--resume", "auto")
    interrupted(fast, argv, 7, monkeypatch)
    fast.main(argv)
    fast.main(flags(tmp_path / "whole", "--amp", "--channels-last", *more, "--recovery-interval", 2))
    assert_same_end(tmp_path / "whole" / "run", tmp_path / "run")
    state = load_state(tmp_path / "run" / "last.safetensors")
    assert all(v.dtype != torch.bfloat16 for v in state["model"].values())  # weights stay in full precision
    assert (state["scaler"] is not None) == bool(more)


@pytest.mark.parametrize("more", [[], ["--tet"]])
def test_torchcompile(fast, tmp_path, monkeypatch, more):
    compile_, compiled = torch.compile, []

    def eager(net, dynamic, options):
        assert dynamic is None
        assert options and options.keys() <= set(torch._inductor.list_options())
        compiled.append(net)
        return compile_(net, backend="aot_eager")  # inductor's compiler takes longer than all other tests

    monkeypatch.setattr(torch, "compile", eager)
    few = ["--T", 1, "--subset", 32, "--epochs", 1]
    fast.main(flags(tmp_path, *few, *more, "--experiment", "plain"))
    fast.main(flags(tmp_path, *few, *more, "--experiment", "compiled", "--torchcompile"))
    assert len(compiled) == 1
    plain, found = (tensors(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], atol=1e-5, rtol=1e-4)


def test_compiler_options_of_few_steps_only():
    options = {T: spikezoo.create_model("test_mpbn_resnet", T=T).compile_options for T in (1, 2, 3)}
    assert options[1] == options[2] and options[1] and not options[3]
    assert spikezoo.create_model("test_spiking_vgg", neuron="relu").compile_options == options[1]
    assert not spikezoo.create_model("test_spikformer", T=1).compile_options


def test_one_seed_gives_the_same_weights_twice(fast, tmp_path):
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        fast.main(
            flags(
                tmp_path,
                "--epochs",
                2,
                "--hflip",
                0.5,
                "--crop-padding",
                1,
                "--drop",
                0.1,
                "--seed",
                seed,
                "--experiment",
                run,
            )
        )
    weights = {run: tensors(tmp_path / run / "model.safetensors") for run in "abc"}
    assert_same_weights(weights["a"], weights["b"])
    assert any(not torch.equal(weights["c"][name], value) for name, value in weights["a"].items())


def test_initial_checkpoint(fast, tmp_path, monkeypatch):
    fast.main(flags(tmp_path, "--epochs", 1))
    runs = []
    monkeypatch.setattr(fast.Run, "train", lambda self: runs.append(self) or self.evaluate())
    fast.main(flags(tmp_path, "--initial-checkpoint", tmp_path / "run", "--seed", 3))
    assert_same_weights(runs[0].model.state_dict(), tensors(tmp_path / "run" / "model.safetensors"))


def test_initial_checkpoint_of_the_relu_twin(tmp_path):
    twin = spikezoo.create_model("spiking_resnet20", neuron="relu", num_classes=5)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.uniform_(0.5, 1.5)
    spikezoo.save_checkpoint(twin, tmp_path / "relu")
    new = create_from("mpbn_resnet20", tmp_path / "relu", num_classes=5, T=2)
    assert new.T == 2 and any(isinstance(module, spikezoo.neurons.LIF) for module in new.modules())
    untouched = spikezoo.create_model("mpbn_resnet20", num_classes=5, T=2).state_dict()
    state, theirs = new.state_dict(), twin.state_dict()
    assert all(torch.equal(state[name], value) for name, value in theirs.items())
    norms = state.keys() - theirs.keys()
    assert norms and all(".neuron.norm." in name for name in norms)
    assert all(torch.equal(state[name], untouched[name]) for name in norms)
    with pytest.raises(ValueError, match=r"does not fit .*: \d+ missing, \d+ unexpected"):
        create_from("spiking_conv4", tmp_path / "relu")


@pytest.mark.parametrize("name", ["spiking_resnet20", "mpbn_resnet20"])
def test_initial_checkpoint_of_a_pruned_twin_for_other_neurons(tmp_path, name):
    # The twin of the same name, too: its neurons have neither norms nor time constants.
    twin = spikezoo.create_model(name, neuron="relu", num_classes=5, dynsnn={"per": "channel"})
    inputs = {"mean": [0.25, 0.5, 0.75], "std": [2.0, 2.0, 2.0]}
    twin.pretrained_cfg = {**twin.pretrained_cfg, **inputs, "inputs": inputs}
    masks = {key: value for key, value in twin.state_dict().items() if key.endswith(".mask")}
    for mask in masks.values():
        mask[::3] = False
    spikezoo.save_checkpoint(twin, tmp_path / "relu")
    arguments = {"num_classes": 4, "neuron": "plif", "mpbn": "channel", "T": 2}
    new = create_from("mpbn_resnet20", tmp_path / "relu", **arguments)
    state = new.state_dict()
    assert masks and all(torch.equal(state[key], value) for key, value in masks.items())
    assert torch.equal(state["stem.0.conv.weight"], twin.state_dict()["stem.0.conv.weight"])
    assert new.neuron_config.kind == "plif" and new.mpbn == "channel" and new.head.fc.out_features == 4
    assert new.pretrained_cfg["inputs"] == inputs and new.pretrained_cfg["mean"] == inputs["mean"]
    assert [entry[0] for entry in new.recipe] == ["dynsnn"]


def test_transforms_come_after_the_weights_of_another_network(tmp_path):
    twin = spikezoo.create_model("spiking_resnet20", neuron="relu")
    spikezoo.save_checkpoint(twin, tmp_path / "relu")
    new = create_from("mpbn_resnet20", tmp_path / "relu", dynsnn={"threshold": 0.1})
    assert [entry[0] for entry in new.recipe] == ["dynsnn"] and new.stem[0].neuron.mask.all()
    assert torch.equal(new.head.fc.weight, twin.head.fc.weight)


DISTRIBUTED = """
    import os
    import torch
    import torch.distributed as dist

    import spikezoo
    from spikezoo import train
    from spikezoo.train import objective, output, run
    from spikezoo.train.state import save_state
    from spikezoo.train.sync import SyncedNorms

    torch.set_num_threads(1)
    output.plot = lambda *_: []
    runs, argv = [], {argv!r}

    class Run(run.Run):
        def __init__(self, args):
            super().__init__(args)
            runs.append(self)

    class Stop(BaseException):
        pass

    # One process group for all runs of this process.
    train.Run, destroy, dist.destroy_process_group = Run, dist.destroy_process_group, lambda: None
    train.main([*argv, "--output", "whole"])
    torch.distributed.init_process_group = lambda **_: None

    whole, calls = objective.Objective.__call__, []

    def stop(self, *args):
        calls.append(None)
        if len(calls) == 8:  # in the second epoch, after the recovery file of its batch 2
            raise Stop
        return whole(self, *args)

    objective.Objective.__call__ = stop
    try:
        train.main([*argv, "--output", "parts"])
        raise SystemExit("not stopped")
    except Stop:
        objective.Objective.__call__ = whole
    torch.manual_seed(99)
    train.main([*argv, "--output", "parts", "--resume", "auto"])
    rank = int(os.environ["RANK"])
    for name, ran in (("whole", runs[0]), ("parts", runs[-1])):
        state = {{"model": ran.model.state_dict(), "ema": ran.ema.state_dict()}}
        save_state(f"{{name}}-{{rank}}.safetensors", state)

    # Halves of a batch with --sync-bn, in float64.
    torch.manual_seed(5)
    images, labels = torch.rand(8, 3, 8, 8, dtype=torch.double), torch.arange(8) % 6
    model = spikezoo.create_model("test_mpbn_vgg", T=2, num_classes=6).double()
    net = torch.nn.parallel.DistributedDataParallel(model)
    with SyncedNorms():
        logits = net(images[rank::2])
    torch.nn.functional.cross_entropy(logits, labels[rank::2]).backward()
    gradients = {{name: p.grad for name, p in model.named_parameters()}}
    save_state(f"synced-{{rank}}.safetensors", {{"model": model.state_dict(), "gradients": gradients}})
    destroy()
"""


def test_two_processes(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 65), ("test", 7)):  # both odd: shares differ
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 6
    np.savez(tmp_path / "small.npz", **arrays)
    # 4 batches a rank and epoch; with dropout, so that the random state of each rank counts.
    argv = (
        "--model test_mpbn_vgg --T 2 --dataset npz:small.npz -b 8 --epochs 2 --lr 0.05 --experiment run --device cpu "
        "--drop 0.3 --model-ema --model-ema-decay 0.7 --grad-accum-steps 2 --recovery-interval 2"
    )
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(DISTRIBUTED).format(argv=argv.split()))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        launch, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]

    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["run"]  # one folder for both
    assert done.stdout.count("Test accuracy") == 2  # only one of them talks, once a run that ended
    for name in ("whole", "parts"):
        ranks = [load_state(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2)]
        assert_same_weights(ranks[0]["model"], ranks[1]["model"])
        assert_same_weights(ranks[0]["ema"], ranks[1]["ema"])
        assert_same_weights(tmp_path / name / "run" / "model.safetensors", ranks[0]["ema"])
    assert_same_end(tmp_path / "whole" / "run", tmp_path / "parts" / "run")

    # --sync-bn: two processes with halves of a batch learn what one learns of all of it, by norms of both kinds.
    torch.manual_seed(5)
    images, labels = torch.rand(8, 3, 8, 8, dtype=torch.double), torch.arange(8) % 6
    model = spikezoo.create_model("test_mpbn_vgg", T=2, num_classes=6).double()
    F.cross_entropy(model(images), labels).backward()
    for rank in range(2):
        synced = load_state(tmp_path / f"synced-{rank}.safetensors")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(synced["gradients"][name], parameter.grad, rtol=1e-6, atol=1e-9)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(synced["model"][name], value, rtol=1e-6, atol=1e-9)

    results = json.loads((tmp_path / "whole" / "run" / "config.json").read_text())["spikezoo"]["results"]
    assert results["samples"] == 7  # 4 and 3, none twice
    load("validate").main(
        ["--checkpoint", str(tmp_path / "whole" / "run"), "--dataset", f"npz:{tmp_path / 'small.npz'}", "--json"]
    )
    row = json.loads(capsys.readouterr().out)
    for key in ("top1", "top5", "loss", "firing_rate"):
        assert row[key] == pytest.approx(results[key], abs=1e-4), key


# ------------------------------------------------------------------------------ distillation, progressive resolution


def test_the_teachers_share_of_the_loss_by_hand(train):
    args = train.parse_args(
        flags("o", "--teacher", "local-dir:x", "--distill-weight", 0.25, "--distill-temperature", 2)
    )
    loss = train.Objective(args, False)(
        torch.tensor([[2.0, 0]]), torch.tensor([0]), torch.zeros(1, 1), torch.zeros(1, 2)
    )
    p = 1 / (1 + math.exp(-1))  # of the student at temperature 2; the teacher has 0.5
    apart = 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))
    assert loss.item() == pytest.approx(0.75 * math.log(1 + math.exp(-2)) + 0.25 * 4 * apart, abs=1e-6)


def test_a_teacher_sees_its_own_normalisation(fast, tmp_path):
    fast.main(flags(tmp_path, "--mean", 0, "--std", 1, "--experiment", "teacher", "--epochs", 1))
    teacher = f"local-dir:{tmp_path / 'teacher'}"
    run = fast.Run(fast.parse_args(flags(tmp_path, "--mean", 0.4, "--std", 0.2, "--teacher", teacher, "--epochs", 1)))
    images, _ = next(iter(run.val_loader))
    plain = spikezoo.create_model(teacher, pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(run.teacher(images), plain(images * 0.2 + 0.4), rtol=1e-4, atol=1e-4)
        assert (run.teacher(images) - plain(images)).abs().max() > 1e-3
    assert run.train()["top1"] >= 0
    with pytest.raises(ValueError, match="has 10 classes and inputs"):
        fast.main(flags(tmp_path, "--teacher", teacher, "--in-chans", 3, "--experiment", "other"))


def test_progressive_resolution(fast, tmp_path, monkeypatch):
    sizes = []
    forward = spikezoo.observe.WithRates.forward
    monkeypatch.setattr(
        spikezoo.observe.WithRates,
        "forward",
        lambda self, x: (sizes.append(x.shape[-1]) if self.model.training else None) or forward(self, x),
    )
    small = ("--model", "test_mpbn_resnet", "--img-size", 16)  # two epochs of four batches
    for given, seen in (
        (("8:0.5", "16:0.5"), [8] * 4 + [16] * 4),
        (("8:0.25", "12:0.3", "16:0.45"), [8] * 2 + [12] * 2 + [16] * 4),  # of 8 updates: ends at 2, 4.4 and 8
        (("8:3", "16:2"), [8] * 3 + [16] * 2),  # updates, the last within an epoch
    ):
        sizes.clear()
        fast.main(flags(tmp_path, *small, "--progressive", *given, "--experiment", "-".join(given).replace(":", "_")))
        assert sizes == seen
    results = json.loads((tmp_path / "8_3-16_2" / "config.json").read_text())["spikezoo"]["results"]
    assert (results["updates"], results["progressive"], results["epochs"]) == (5, {"8": 3, "16": 2}, 2)
    for given, told in (
        (("8:0.5",), "add up to 1"),
        (("8:0.5", "16:0.6"), "add up to 1"),
        (("8:0.5", "x:0.5"), "add up to 1"),
        (("8:0", "16:1"), "add up to 1"),
        (("8",), "expected|argument"),
        (("8:0.5", "17:0.5"), "expected 8 to 16"),
        (("4:0.5", "16:0.5"), "expected 8 to 16"),
        (("8:3", "16:2", "--updates", 6), "is 5 updates, and --updates 6 says otherwise"),
    ):
        with pytest.raises((ValueError, SystemExit), match=told if given != ("8",) else None):
            fast.main(flags(tmp_path, *small, "--progressive", *given, "--experiment", "bad"))
    more = (*small, "--progressive", "8:0.5", "16:0.5", "--experiment", "bad")
    with pytest.raises(ValueError, match="was built for images of"):
        fast.main(flags(tmp_path, *more, "--mpbn", "element"))
    patches = ("--model", "test_spikformer", "--img-size", 16, "--progressive", "10:0.5", "16:0.5")
    with pytest.raises(ValueError, match=r"10x10 pixels is not divisible by the patch"):
        fast.main(flags(tmp_path, *patches, "--experiment", "bad"))
    fast.main(flags(tmp_path, "--model", "test_spiking_vgg", "--img-size", 16, "--epochs", 1, "--experiment", "vgg"))
    with pytest.raises(ValueError, match=r"--teacher local-dir.* was built for images of 16x16 alone"):
        fast.main(flags(tmp_path, *more, "--teacher", f"local-dir:{tmp_path / 'vgg'}"))
    assert not (tmp_path / "bad").exists()


def test_sizes_in_a_config(train, tmp_path):
    assert train.parse_args(config(tmp_path, "progressive: {16: 0.5, 32: 0.5}")).progressive == {16: 0.5, 32: 0.5}
    with pytest.raises(ValueError, match=r"reads 16:0\.5 as a number in base 60.* of a mapping \{16: 0\.5"):
        train.parse_args(config(tmp_path, "progressive: [16:0.5, 32:0.5]"))  # YAML reads base 60


# --------------------------------------------------------------------------------------- lengths in updates and time


@pytest.mark.parametrize("call", [3, 5])
def test_a_length_in_updates_resumes_bit_identically(fast, tmp_path, monkeypatch, call):
    recipe = ("--updates", 6, "--opt", "fixednormmuon", "--sched", "poly", "--decay-rate", 1, "--warmup-share", 0.34)
    recipe += ("--val-interval", 5, "--recovery-interval", 1, "--alternating-flip", "--translate", 1, "--hflip", 0.5)
    fast.main(flags(tmp_path, *recipe, "--experiment", "whole"))
    argv = flags(tmp_path, *recipe, "--experiment", "parts", "--resume", "auto")
    interrupted(fast, argv, call, monkeypatch)
    fast.main(argv)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    state = load_state(tmp_path / "whole" / "last.safetensors")
    assert state["updates"] == 6 and state["sizes"] == [[None, 6]]


def test_the_schedule_of_a_length_in_updates_by_hand(fast, tmp_path):
    recipe = ("--updates", 8, "--sched", "poly", "--decay-rate", 1, "--warmup-share", 0.25, "--warmup-lr", 0)
    run = fast.Run(fast.parse_args(flags(tmp_path, *recipe, "--lr", 0.8)))
    rates = []
    for update in range(1, 8):
        run.length.scheduler.step_update(update)
        rates.append(round(run.optimizer.param_groups[0]["lr"], 6))
    # two updates of warm-up, then linearly to zero at the eighth
    assert rates == [0.4, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]


def test_a_length_in_time(fast, tmp_path, monkeypatch, capsys):
    clock = iter(np.arange(0, 1e6, 0.25))  # every look at the clock is a quarter of a second after the last
    recipe = ("--model", "test_mpbn_resnet", "--img-size", 16, "--progressive", "8:0.5", "16:0.5", "--train-time", "2s")
    recipe += ("--opt", "fixednormmuon", "--val-interval", 9)
    monkeypatch.setattr(fast.time, "perf_counter", lambda: float(next(clock)))
    fast.main(flags(tmp_path, *recipe, "--experiment", "timed"))
    said = capsys.readouterr().out
    assert "--train-time 2s is 8 updates here; to repeat it: --progressive 8:4 16:4" in said
    fast.main(flags(tmp_path, *recipe[:4], "--progressive", "8:4", "16:4", *recipe[-4:], "--experiment", "again"))
    assert_same_weights(*(tmp_path / name / "model.safetensors" for name in ("timed", "again")))


def test_the_time_of_a_run_with_stored_logits_is_that_of_the_student_alone(fast, tmp_path, monkeypatch):
    fast.main(flags(tmp_path, "--experiment", "teacher", "--epochs", 1))
    run = fast.Run(fast.parse_args(cached(tmp_path, "--train-time", "1s")))
    monkeypatch.setattr(run, "teacher", None)  # nobody is asked
    run._measure_length(spikezoo.WithRates(run.model))
    assert run.length.total >= 1


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--updates", 3, "--train-time", "3m"), "give one of them"),
        (("--train-time", "3 minutes"), "--train-time '3 minutes': expected a time such as"),
        (("--train-time", "0s"), "--train-time '0s': expected a time"),
        (("--updates", 3, "--sched", "step"), "--sched step counts in epochs"),
        (("--updates", 3, "--no-sched-on-updates"), "they schedule every update"),
        (("--warmup-share", 0.1, "--warmup-epochs", 2), "give one"),
        (("--warmup-share", 1), r"in \[0, 1\)"),
        (("--progressive", "8:3", "16:2", "--train-time", "3m"), "is 5 updates, and --train-time 3m says otherwise"),
        (("--teacher-cache", "x"), "without --teacher"),
        (("--ticket-init", "x"), "without --ticket"),
        (("--val-interval", 0), "at least 1"),
    ],
)
def test_bad_lengths_and_starts(train, more, told):
    with pytest.raises(ValueError, match=told):
        train.parse_args(flags("o", *more))


def test_amp_auto_is_what_the_processor_is_fast_in(fast, tmp_path, monkeypatch, capsys):
    for value, wanted in (("auto", "auto"), (None, True)):
        assert fast.parse_args(flags("o", "--amp", *([value] if value else []))).amp == wanted
    assert fast.parse_args(flags("o", "--no-amp")).amp is False
    assert fast.parse_args(config(tmp_path, "amp: auto")).amp == "auto"
    with pytest.raises(ValueError, match="expected true or false, auto"):
        fast.parse_args(config(tmp_path, "amp: fast"))
    for quick in (True, False):
        monkeypatch.setattr("spikezoo.train.run.fast_bfloat16", lambda device, quick=quick: quick)
        assert fast.Run(fast.parse_args(flags(tmp_path, "--amp", "auto"))).amp is quick
        assert fast.Run(fast.parse_args(flags(tmp_path, "--amp"))).amp is True
        assert ("bfloat16 is several times slower" in capsys.readouterr().out) is not quick
    # A run goes on in the format that it began in, wherever it is.
    fast.main(flags(tmp_path, "--amp", "auto", "--experiment", "moved", "--epochs", 1))
    monkeypatch.setattr("spikezoo.train.run.fast_bfloat16", lambda device: True)
    argv = flags(tmp_path, "--amp", "auto", "--experiment", "moved", "--epochs", 1, "--resume", "auto")
    assert fast.Run(fast.parse_args(argv)).amp is False
    assert "--amp auto was off where this run began" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- hold-out, stored logits, starts


def test_holdout_is_evaluated_and_never_trained_on(fast, tmp_path):
    run = fast.Run(fast.parse_args(flags(tmp_path, "--holdout", 100, "--seed", 1)))
    other = fast.Run(fast.parse_args(flags(tmp_path, "--holdout", 100, "--seed", 2)))
    held, rest = run.val_loader.samples.tolist(), run.train_loader.samples.tolist()
    assert len(held) == 100 and not set(held) & set(rest)
    assert run.val_loader.samples.equal(other.val_loader.samples)  # a choice over seeds sees the same images
    labels = torch.cat([target for _, target in run.val_loader])
    assert labels.bincount().tolist() == [10] * 10
    run.finish(run.train())
    results = json.loads((run.folder / "config.json").read_text())["spikezoo"]["results"]
    assert (results["holdout"], results["samples"]) == (100, 100)


def cached(folder, *more):
    given = ("--views", 2, "--translate", 1, "--hflip", 0.5, "--alternating-flip", "--epochs", 3)
    return flags(folder, *given, "--teacher", f"local-dir:{folder / 'teacher'}", "--teacher-cache", folder / "l", *more)


def test_stored_logits_are_the_teachers_of_every_view(fast, tmp_path, monkeypatch):
    fast.main(flags(tmp_path, "--experiment", "teacher", "--epochs", 1))
    run = fast.Run(fast.parse_args(cached(tmp_path, "--experiment", "one")))
    asked = []
    teach = run.cache.teach
    run.cache.teach = lambda images: asked.append(len(images)) or teach(images)
    run.train()
    assert sum(asked) >= 2 * run.train_loader.num_samples  # of three epochs the third repeats the first view
    plain = spikezoo.create_model(f"local-dir:{tmp_path / 'teacher'}", pretrained=True).eval()
    for epoch in range(3):
        run.train_loader.set_epoch(epoch)
        for batch, (images, _) in enumerate(run.train_loader):
            with torch.no_grad():
                torch.testing.assert_close(run.cache(epoch, batch).float(), plain(images), rtol=2e-3, atol=2e-3)
    again = fast.Run(fast.parse_args(cached(tmp_path, "--experiment", "two")))
    again.cache.teach = None  # nothing is asked twice
    again.train()
    assert_same_weights(run.model.state_dict(), again.model.state_dict())


def test_views_that_are_damaged_or_swapped_are_computed_anew(fast, tmp_path, capsys):
    fast.main(flags(tmp_path, "--experiment", "teacher", "--epochs", 1))
    fast.main(cached(tmp_path, "--experiment", "one"))
    first, second = (tmp_path / "l" / f"view-00{view}.safetensors" for view in range(2))
    intact = first.read_bytes(), second.read_bytes()
    first.write_bytes(intact[1])
    second.write_bytes(intact[1][:-1] + bytes([intact[1][-1] ^ 1]))
    capsys.readouterr()
    fast.main(cached(tmp_path, "--experiment", "two"))
    out = capsys.readouterr().out
    assert f"{first} is not of view 0; its logits are computed anew" in out and f"{second} is damaged; its" in out
    assert (first.read_bytes(), second.read_bytes()) == intact
    assert_same_weights(*(tmp_path / name / "model.safetensors" for name in ("one", "two")))


def test_logits_of_something_else_are_refused(fast, tmp_path):
    fast.main(flags(tmp_path, "--experiment", "teacher", "--epochs", 1))
    fast.main(cached(tmp_path, "--experiment", "one"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "l").iterdir()}
    for more, told in (
        (("--translate", 2), "translate 1, here 2"),
        (("--seed", 7), "seed"),
        (("--mean", 0.1, "--std", 1), "mean"),
        (("--holdout", 10), "holdout 0, here 10"),
    ):
        with pytest.raises(ValueError, match=rf"another teacher, data set or augmentation .*{told}"):
            fast.main(cached(tmp_path, "--experiment", "bad", *more))
    fast.main(flags(tmp_path, "--experiment", "stranger", "--epochs", 1, "--seed", 3))
    with pytest.raises(ValueError, match=r"another teacher, data set or augmentation \(teacher "):
        fast.main(cached(tmp_path, "--experiment", "bad", "--teacher", f"local-dir:{tmp_path / 'stranger'}"))
    with pytest.raises(ValueError, match="add --views 8"):
        args = fast.parse_args(cached(tmp_path, "--experiment", "bad"))
        args.views = None
        fast.Run(args)
    with pytest.raises(ValueError, match=r"mixed images do not come again|left out beside mixup"):
        fast.main(cached(tmp_path, "--experiment", "bad", "--mixup", 0.2))
    assert {path.name: path.read_bytes() for path in (tmp_path / "l").iterdir()} == before
    assert not (tmp_path / "bad").exists()


def test_membrane_norms_begin_as_the_identity(fast, tmp_path):
    small = ("--img-size", 16, "--T", 2)
    fast.main(flags(tmp_path, "--model", "test_mpbn_resnet", "--mpbn", "none", *small, "--experiment", "plain"))
    plain = spikezoo.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    given = ("--model", "test_mpbn_resnet", "--mpbn", "channel", *small, "--initial-checkpoint", tmp_path / "plain")
    run = fast.Run(fast.parse_args(flags(tmp_path, *given)))
    images = next(iter(run.val_loader))[0]
    with torch.no_grad():
        torch.testing.assert_close(run.model.eval()(images), plain(images), rtol=1e-4, atol=1e-4)
    norm = run.model.stem[0].neuron.norm
    assert (norm.weight - 1).abs().max() > 0.1  # and it took numbers other than 1 and 0 for that


def test_thresholds_of_the_quantised_twin_cut_little_off():
    net = torch.nn.Sequential(QCFS(8.0, 4), torch.nn.Linear(5, 1), QCFS(8.0, 1)).double()
    levels = torch.tensor([[-3.0, 0.5, 1.0, 1.5, 2.0], [0.0, 0.5, 0.0, 2.0, -1.0]], dtype=torch.float64)
    torch.nn.init.zeros_(net[1].weight)
    torch.nn.init.constant_(net[1].bias, -1)
    fit_thresholds(net, [levels])
    assert net[0].threshold.item() == pytest.approx(2.0)  # all values are levels of it, and are left as they are
    torch.testing.assert_close(net[0](levels), levels.relu())
    assert net[2].threshold.item() == 8.0  # silent: nothing to fit
    # One value of 100 in 10,000 is cut off, since a threshold that holds it leaves the others no levels.
    many = torch.cat([levels[:1].expand(2000, -1).flatten(), torch.tensor([100.0], dtype=torch.float64)])[:, None]
    fit_thresholds(torch.nn.Sequential(net[0]), [many])
    assert 2 <= net[0].threshold.item() <= 8


def test_a_quantised_twin_starts_from_a_relu_net_and_ends_in_spikes(fast, tmp_path):
    given = ("--model", "test_mpbn_resnet", "--img-size", 16, "--T", 1, "--epochs", 1)
    fast.main(flags(tmp_path, *given, "--neuron", "relu", "--experiment", "relu"))
    twin = (*given, "--neuron", "qcfs", "--initial-checkpoint", tmp_path / "relu", "--experiment", "twin")
    run = fast.Run(fast.parse_args(flags(tmp_path / "unrun", *twin)))
    relu = spikezoo.create_model(f"local-dir:{tmp_path / 'relu'}", pretrained=True).eval()
    joined = [run.model.get_submodule(name).threshold for name in ("stem.2.neuron", "stages.0.0.neuron")]
    assert joined[0] is joined[1] and joined[0] != 8
    images = next(iter(run.val_loader))[0]
    with torch.no_grad():
        wanted, coarse = relu(images), run.model.eval()(images)
        for module in run.model.modules():
            if isinstance(module, QCFS):
                module.threshold.fill_(8.0)
        assert (coarse - wanted).abs().mean() < 0.7 * (run.model(images) - wanted).abs().mean()
    start = joined[0].item()
    fast.main(flags(tmp_path, *twin))
    trained = spikezoo.create_model(f"local-dir:{tmp_path / 'twin'}", pretrained=True)
    learned = [trained.get_submodule(name).threshold.item() for name in ("stem.2.neuron", "stages.0.0.neuron")]
    assert learned[0] == learned[1] != start
    assert spikezoo.convert(trained).T == 4  # without the warning of unlike thresholds
    # And further on: spiking neurons have no learned thresholds.
    new = create_from("test_mpbn_resnet", tmp_path / "twin", neuron="lif", T=2)
    assert torch.equal(new.stem[0].conv.weight, trained.stem[0].conv.weight)


def test_a_quantised_net_that_cannot_spike_is_trained_all_the_same(fast, tmp_path):
    given = ("--model", "test_spiking_vgg", "--img-size", 16, "--T", 1, "--epochs", 1)  # with max-pooling
    fast.main(flags(tmp_path, *given, "--neuron", "relu", "--experiment", "relu"))
    twin = (*given, "--neuron", "qcfs", "--initial-checkpoint", tmp_path / "relu")
    run = fast.Run(fast.parse_args(flags(tmp_path, *twin)))
    learned = [module.threshold for module in run.model.modules() if isinstance(module, QCFS)]
    assert len({id(threshold) for threshold in learned}) == len(learned) > 1
    assert all(threshold != 8 for threshold in learned)


def test_scores_start_from_a_trained_net(fast, tmp_path):
    given = ("--model", "test_spiking_vgg", "--img-size", 16)
    fast.main(flags(tmp_path, *given, "--experiment", "dense", "--epochs", 1))
    ticket = (*given, "--ticket", "kind=mpslt", "sparsity=0.4", "--ticket-init")
    run = fast.Run(fast.parse_args(flags(tmp_path, *ticket, tmp_path / "dense")))
    dense = spikezoo.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True)
    layer, part = run.model.stem[0].conv, run.model.stem[0].conv.parametrizations.weight[0]
    agreement = (dense.stem[0].conv.weight.detach() * part.frozen.sign()).flatten()
    kept = layer.weight.detach().flatten() != 0
    assert agreement[kept].min() >= agreement[~kept].max()  # the best are kept, whatever their scale
    torch.testing.assert_close(run.model.head.fc.bias, dense.head.fc.bias)
    fast.main(flags(tmp_path, "--experiment", "resnet", "--model", "test_spiking_resnet", "--epochs", 1))
    with pytest.raises(ValueError, match=r"--ticket-init .*resnet: .* no such layer|of the ticket is"):
        fast.main(flags(tmp_path, *ticket, tmp_path / "resnet", "--experiment", "bad"))
    assert not (tmp_path / "bad").exists()


def test_muon_by_hand():
    weight = torch.nn.Parameter(torch.tensor([[3.0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    vector = torch.nn.Parameter(torch.ones(2))
    optimizer = FixedNormMuon(
        [weight, vector], lr=0.5, momentum=0.6, nesterov=False, ns_steps=12, adjust_lr_fn="original",
        ns_coefficients=[(1.5, -0.5, 0.0)], fallback_lr_scale=0.1,
    )  # fmt: skip
    optimizer.fix_norms([weight])
    weight.grad, vector.grad = torch.diag(torch.tensor([1.0, 2, 1, 2])), torch.tensor([1.0, -1])
    optimizer.step()
    # The weight shrinks from 5 to the root of its four outputs; all singular values of the gradient become 1.
    wanted = torch.diag(torch.tensor([1.2, 1.6, 0, 0])) - 0.5 * torch.eye(4)
    torch.testing.assert_close(weight.detach(), wanted, rtol=0, atol=0.01)
    assert (vector.detach() - torch.tensor([0.95, 1.05])).abs().max() < 0.01  # one step of Adam, 0.05 each
    assert weight.grad is not None


def test_the_classifier_is_no_matrix_for_muon(fast, tmp_path):
    for opt, wanted in (("fixednormmuon", True), ("muon", True), ("sgd", False)):
        run = fast.Run(fast.parse_args(flags(tmp_path, "--opt", opt)))
        groups = run.optimizer.param_groups
        apart = [id(p) for group in groups if group.get("use_fallback") for p in group["params"]]
        assert (id(run.model.head.fc.weight) in apart) is wanted
        assert wanted or len(groups) == 2  # as in the states that runs have saved


def test_weights_before_a_norm():
    model = spikezoo.create_model("test_spiking_resnet")
    names = {id(p): name for name, p in model.named_parameters()}
    found = [names[id(p)] for p in normalised_weights(model)]
    convs = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert found == [f"{name}.weight" for name in convs]  # and neither of the two linear layers, which have none


def test_shrunk_images_stay_in_the_range_of_a_code(fast, tmp_path, monkeypatch):
    white = torch.ones(1, 1, 16, 16)
    assert torch.nn.functional.interpolate(white, size=14, mode="bilinear", antialias=True).max() > 1
    shrink = torch.nn.functional.interpolate
    monkeypatch.setattr(
        "torch.nn.functional.interpolate", lambda x, **arguments: shrink(torch.ones_like(x), **arguments)
    )
    coded = ("--model", "test_mpbn_resnet", "--model-kwargs", "encoding=ttfs", "--mean", 0, "--std", 1)
    fast.main(flags(tmp_path, *coded, "--img-size", 16, "--progressive", "14:1.0", "--epochs", 1))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("weight", 1.5, r"in \[0, 1\]"), ("weight", "nan", r"in \[0, 1\]"), ("temperature", 0, "above 0")],
)
def test_bad_distillation(train, name, value, told):
    with pytest.raises(ValueError, match=f"--distill-{name} .*{told}"):
        train.parse_args(flags("o", "--teacher", "local-dir:x", f"--distill-{name}", value))


def test_operations_and_energy_are_counted_at_the_end(fast, tmp_path):
    fast.main(flags(tmp_path, "--epochs", 1, "--count", 5, "--norm-ops", 4))
    results = Config.read(tmp_path / "run").results
    model = spikezoo.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    loader = create_loader("digits", "test", batch_size=5, **input_options(model, "digits"))
    counts = spikezoo.count(model, next(iter(loader))[0], inputs="analog", norm_ops=4)
    for name in ("energy_exact_mj", "energy_paper_mj"):
        assert results[name] == pytest.approx(getattr(counts, name))
    # The paper's energy is 0.9 pJ an operation of a spike and 4.6 pJ one of a number.
    numbers = (counts.energy_paper_mj * 1e9 - 0.9 * counts.sops_paper) / 4.6
    assert results["ops_g"] == pytest.approx((numbers + counts.sops_paper) / 1e9) and numbers > 0
    with pytest.raises(ValueError, match="--count -1"):
        fast.main(flags(tmp_path, "--count", -1))
