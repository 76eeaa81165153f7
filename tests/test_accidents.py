"""Accidents of trainings: two in one folder, signals, damaged files, a full disk, dead layers; YAML that misleads."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import fork, load

from spikezoo import cli
from spikezoo.checkpoint import load_state, save_state
from spikezoo.config_files import find_config, read_yaml
from spikezoo.train import lock, main, output, state
from spikezoo.train.stopping import find_peers, lost_peers

FLAGS = "--model test_spiking_vgg --T 2 --dataset digits --subset 64 -b 16 --epochs 2 --lr 0.05 --experiment run"


@pytest.fixture
def argv(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "plot", lambda *_: [])
    return [*FLAGS.split(), "--output", str(tmp_path), "--resume", "auto"]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(argv, tmp_path, monkeypatch, capsys, number):
    objective = load("train").Objective
    compute, calls = objective.__call__, []

    def ask(self, *args):
        calls.append(None)
        if len(calls) == 6:
            os.kill(os.getpid(), number)
        return compute(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(objective, "__call__", ask)
        assert cli.main(["train", *argv]) == 128 + number
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Stopped by {signal.Signals(number).name} at epoch 2 of 2, batch 2 of 4")
    assert "--resume auto" in line and signal.getsignal(number) is not ask
    folder = tmp_path / "run"
    assert load_state(folder / "recovery-1-2.safetensors", "batch")["batch"] == 2 and not list(tmp_path.glob(".*"))
    assert main(argv) == 0
    rows = table(folder / "summary.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    # Of a cosine over all 8 updates, the learning rate of each epoch is its own; accuracy of 64 images.
    assert 0.05 > float(rows[0]["lr"]) > 0.025 > float(rows[1]["lr"]) > 0
    assert all((float(row["train_top1"]) * 64 / 100).is_integer() for row in rows)
    rates = table(folder / "layer_rates.csv")
    assert [row["epoch"] for row in rates] == ["1", "2"] and len(rates[0]) > 2


def test_one_process_a_folder(argv, tmp_path, tmp_path_factory):
    folder = tmp_path / "run"
    folder.mkdir()
    out, err = (tmp_path_factory.mktemp("other") / name for name in ("out", "err"))
    code = f"""
        import time
        from pathlib import Path
        from spikezoo.train.lock import lock
        lock(Path({str(folder)!r}))
        print("held", flush=True)
        time.sleep(600)
    """
    other = fork(code, tmp_path, (out, err))
    while not (out.exists() and out.read_text() == "held\n"):
        time.sleep(0.01)
        assert other.is_alive(), err.read_text()
    with pytest.raises(lock.InUseError, match=f"process {other.pid} on {socket.gethostname()} trains there since"):
        main(argv)
    other.kill()
    other.join()
    lock.lock(folder)  # of a process that is gone nothing is left
    lock.lock(folder)
    lock.release(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_state_is_passed_over(tmp_path, capsys):
    for name, epoch, batch in (("last", 1, 0), ("recovery-1-2", 1, 2), ("recovery-1-4", 1, 4)):
        save_state(tmp_path / f"{name}.safetensors", {"epoch": epoch, "batch": batch, "rng": [1, 2]})
    newest = tmp_path / "recovery-1-4.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    assert state.newest_state(tmp_path) == tmp_path / "recovery-1-2.safetensors"
    assert f"Damaged, and passed over: {newest}" in capsys.readouterr().out
    for path in tmp_path.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"No state in .* is intact"):
        state.newest_state(tmp_path)


def test_a_full_disk_is_one_line(argv, tmp_path, monkeypatch):
    def full(path, _content):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state, "save_state", full)
    with pytest.raises(OSError, match=r"could not be written .*No space left.*newest state is none yet.*--resume auto"):
        main(argv)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_peer_that_is_gone_is_named():
    class Run:
        class args:
            rank, world_size, distributed = 0, 1, False

        epoch, batch = 2, 5

    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    run = Run()
    run.peers = [*find_peers(run), (socket.gethostname(), int(gone.stdout))]
    said = lost_peers(run, RuntimeError("Connection closed by peer [127.0.0.1]:1\nmore"))
    assert said.startswith("Rank 0 stopped at epoch 3, batch 5: rank 1 is gone (Connection closed by peer")


def test_dead_layers_are_named_and_stop_a_run_that_asks_for_it(argv, tmp_path, capsys):
    dead = [*argv, "--model-kwargs", "threshold=1000.0"]
    assert main(dead) == 0
    assert "say nothing: stem.0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"Stopped after epoch 1: stem\.0.* is dead"):
        main([*dead, "--stop-when-dead", "--experiment", "other"])
    assert load_state(tmp_path / "other" / "last.safetensors", "epoch")["epoch"] == 1


def test_rows_that_count_from_0_go_on_from_1(tmp_path):
    (tmp_path / "summary.csv").write_text("epoch,train_loss,lr\n0,2.0,0.1\n1,1.0,0.1\n2,0.5,0.1\n")
    output.trim_rows(tmp_path, 2)
    assert [(row["epoch"], row["train_loss"]) for row in table(tmp_path / "summary.csv")] == [
        ("1", "2.0"),
        ("2", "1.0"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 0.1\nepochs: 3\nlr: 0.2", "line 3: key 'lr' stands in line 1 already"),
        ("model_kwargs: {decay: 0.5, decay: 0.6}", "key 'decay' stands in line 1 already"),
        ("lr: 1:30", "line 1: YAML reads 1:30 as a number in base 60"),
        ("epochs: 010", "line 1: YAML reads 010 as an octal number"),
    ],
)
def test_yaml_that_reads_otherwise_than_it_looks(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        read_yaml(path)


def test_configs_are_utf8_and_found_by_name(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_bytes("model: x  # größer\n".encode())
    assert read_yaml(path) == {"model": "x"}
    path.write_bytes(b"model: \xff")
    with pytest.raises(ValueError, match="is not valid YAML"):
        read_yaml(path)
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart").name == "quickstart.yaml" == find_config("configs/quickstart.yaml").name
    with pytest.raises(FileNotFoundError, match=r"No config at quickstrat.*Did you mean 'quickstart'"):
        find_config("quickstrat")


@pytest.mark.parametrize("flag", ["--img-size", "--in-chans", "--num-classes", "--T"])
def test_nothing_is_no_size(flag):
    with pytest.raises(ValueError, match=f"{flag} 0: expected a number of at least 1"):
        main([*FLAGS.split(), flag, "0"])


def test_logs_say_what_is_missing(argv, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        main([*argv, "--log-wandb"])


def test_metadata_is_whole(argv, tmp_path):
    assert main([*argv, "--epochs", "1"]) == 0
    assert json.loads((tmp_path / "run" / "metadata.json").read_text())["seed"] == 42
