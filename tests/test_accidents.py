"""Accidents of trainings: two in one folder, signals, damaged files, a full disk, dead layers; YAML that misleads."""

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from conftest import fork, load

from spikezoo import cli
from spikezoo.checkpoint import load_state, read_metadata, read_table, save_state
from spikezoo.config_files import find_config, read_yaml
from spikezoo.evaluate import check_results_file
from spikezoo.export import check_suffix
from spikezoo.hub.provenance import train_seconds, training_facts
from spikezoo.pictures.figure import check_picture
from spikezoo.train import lock, main, output, state
from spikezoo.train.flags import parse_args
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


def test_output_that_nobody_reads_is_no_error(monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, _text):
            raise BrokenPipeError(32, "Broken pipe")

    for argv in (["list", "spiking_vgg*"], ["--version"]):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Closed())
            assert cli.main(argv) == 141
    assert not capsys.readouterr().err


def test_many_failures_are_no_success(monkeypatch):
    monkeypatch.setattr("spikezoo.train.run_plan", lambda *_: 256)
    assert main(["--plan", "x.yaml"]) == 100


def test_no_state_of_a_training(argv, tmp_path):
    save_state(tmp_path / "view.safetensors", {"logits": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"view.safetensors is no state of a training: it lacks architecture, model, "):
        main([*argv[:-2], "--resume", str(tmp_path / "view.safetensors")])
    # A digest that fits is no proof of good intent: an entry that names no tensor.
    tree = {"dict": [["epoch", {"tensor": "nowhere"}]]}
    with mock.patch("spikezoo.checkpoint.state._pack", lambda *_: tree):
        save_state(tmp_path / "forged.safetensors", {})
    with pytest.raises(ValueError, match="its tree of entries cannot be read"):
        load_state(tmp_path / "forged.safetensors")


@pytest.mark.parametrize(
    ("check", "name"), [(check_picture, "x.png"), (check_results_file, "x.csv"), (check_suffix, "x.onnx")]
)
def test_what_cannot_be_written_is_said_before_the_work(tmp_path, check, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / name).mkdir(parents=True)
    with pytest.raises(NotADirectoryError, match=f"{name} cannot be written: .*file is no folder"):
        check(tmp_path / "file" / "deeper" / name)
    with pytest.raises(IsADirectoryError, match="is a folder: give the name of a file"):
        check(tmp_path / "folder" / name)
    check(tmp_path / "new" / "folder" / name)
    assert not (tmp_path / "new").exists()


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


PEERS = """
import os, signal, sys
import sklearn.datasets, torch._dynamo, torch._inductor.config, torch.nn.parallel  # once, for all that are forked
from spikezoo import cli
from spikezoo.train import objective, output

output.plot = lambda *_: []
compute, calls = objective.Objective.__call__, []


def killed(self, *args):
    calls.append(None)
    if len(calls) == 3:  # the first batch of the next epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(self, *args)


def launch(port, victim):  # as torchrun does, without its seconds of importing
    codes = []
    for rank in range(2):
        if os.fork() == 0:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            )
            if rank == victim:
                objective.Objective.__call__ = killed
            sys.exit(cli.main(["train", *sys.argv[2:]]))
    for _ in range(2):
        codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
    return sorted(codes)


for victim, wanted in ((1, [-9, 1]), (0, [-9, 1]), (None, [0, 0])):
    found = launch(sys.argv[1], victim)
    print(f"victim {victim}: {found}", file=sys.stderr, flush=True)
    assert found == wanted
"""


def test_a_killed_process_of_a_run(argv, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    argv = [*argv, "--device", "cpu", "--T", "1", "--subset", "32", "-b", "8", "--epochs", "3"]  # 2 batches an epoch
    done = subprocess.run([sys.executable, "-c", PEERS, port, *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (line for line in done.stderr.splitlines() if line.startswith("Rank "))
    assert first.startswith("Rank 0 stopped at epoch 2, batch 0: rank 1 is gone (")
    assert second.startswith("Rank 1 stopped at epoch 3, batch 0: rank 0 is gone (")
    assert all(said.endswith("the same command with --resume auto.") for said in (first, second))
    assert all(f"last.safetensors at epoch {epoch}, batch 0." in done.stdout for epoch in (2, 3))
    assert [row["epoch"] for row in table(tmp_path / "run" / "summary.csv")] == ["1", "2", "3"]


def test_every_epoch_has_a_state(argv, tmp_path, monkeypatch, capsys):
    argv = [*argv, "--val-interval", "9", "--epochs", "3"]
    assert main([*argv, "--experiment", "whole"]) == 0
    objective = load("train").Objective
    compute, calls = objective.__call__, []

    def die(self, *args):
        calls.append(None)
        if len(calls) == 5:  # the first batch of the next epoch
            raise RuntimeError("killed")
        return compute(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(objective, "__call__", die)
        for epoch in (1, 2):
            calls.clear()
            with pytest.raises(RuntimeError, match="killed"):
                main(argv)
            assert load_state(tmp_path / "run" / f"recovery-{epoch}-0.safetensors", "epoch")["epoch"] == epoch
    capsys.readouterr()
    assert main(argv) == 0
    assert "recovery-2-0.safetensors at epoch 3, batch 0." in capsys.readouterr().out
    whole, parts = (load_state(tmp_path / name / "last.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole["model"][key], parts["model"][key]) for key in whole["model"])
    assert not list((tmp_path / "run").glob("recovery-*"))


def test_dead_layers_are_named_and_stop_a_run_that_asks_for_it(argv, tmp_path, capsys):
    dead = [*argv, "--model-kwargs", "threshold=1000.0"]
    assert main(dead) == 0
    assert "say nothing: stem.0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"Stopped after epoch 1: stem\.0.* is dead"):
        main([*dead, "--stop-when-dead", "--experiment", "other"])
    assert load_state(tmp_path / "other" / "last.safetensors", "epoch")["epoch"] == 1


def test_rows_that_count_from_0_go_on_from_1(tmp_path):
    (tmp_path / "summary.csv").write_text("epoch,train_loss,lr\n0,2.0,0.1\n1,1.0,0.1\n2,0.5,0.1\n")
    (tmp_path / "args.yaml").write_text("seed: 1\n")
    output.trim_tables(tmp_path, 2, {})
    assert [(row["epoch"], row["train_loss"]) for row in table(tmp_path / "summary.csv")] == [
        ("1", "2.0"),
        ("2", "1.0"),
    ]


def flip(path, place, bit=1):
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def test_files_of_a_run_that_are_not_as_it_wrote_them(argv, tmp_path, capsys):
    assert main(argv) == 0
    folder = tmp_path / "run"
    names = ("args.yaml", "summary.csv", "layer_rates.csv", "metadata.json")
    intact = {name: (folder / name).read_bytes() for name in names}
    args, summary, rates, metadata = (folder / name for name in names)

    def restore():
        for name, content in intact.items():
            (folder / name).write_bytes(content)

    # A number of each: refused where a command reads it, with advice.
    flip(args, intact["args.yaml"].index(b"lr: 0.05") + 7)
    with pytest.raises(ValueError, match=r"args\.yaml is not as its run wrote it.*copy it under another name"):
        main(["--config", str(args)])
    (tmp_path / "mine.yaml").write_bytes(args.read_bytes())
    assert parse_args(["--config", str(tmp_path / "mine.yaml")]).lr == 0.04
    restore()
    assert parse_args(["--config", str(args)]).lr == 0.05
    for path in (summary, rates):
        flip(path, len(intact[path.name]) - 5)
        with pytest.raises(ValueError, match=rf"{path.name} is not as its run wrote it"):
            read_table(path)
    with pytest.raises(ValueError, match=r"summary\.csv is not as its run wrote it"):
        training_facts(folder)
    restore()
    assert training_facts(folder)["epochs"] == 2 == len(read_table(rates))
    flip(metadata, intact["metadata.json"].index(b'"seed": 42') + 8)
    for read in (lambda: read_metadata(folder), lambda: read_table(summary), lambda: parse_args(["-c", str(args)])):
        with pytest.raises(ValueError, match=r"metadata\.json is not as its run wrote it"):
            read()
    # A run goes on from its state whatever they are, says so, and loses no file.
    assert main(argv) == 0 and "metadata.json is not as its run wrote it" in capsys.readouterr().out
    assert summary.read_bytes() == intact["summary.csv"] and read_metadata(folder)["seed"] == 42
    flip(summary, len(intact["summary.csv"]) - 5)
    broken = summary.read_bytes()
    assert (
        main(argv) == 0 and "It is summary.csv.damaged now, and the rows go on with epoch 3" in capsys.readouterr().out
    )
    assert (folder / "summary.csv.damaged").read_bytes() == broken and not summary.exists()
    assert rates.read_bytes() == intact["layer_rates.csv"]
    # How long a run took is not told of a table that lacks its first rows.
    assert "train_minutes" not in training_facts(folder) and train_seconds(folder) is None
    # Other line ends are no damage, nor is a further row, as a killed process leaves it; nor is an older run's file.
    restore()
    wanted = read_table(summary)
    summary.write_bytes(intact["summary.csv"].replace(b"\r\n", b"\n"))
    assert read_table(summary) == wanted
    summary.write_bytes(intact["summary.csv"] + intact["summary.csv"].splitlines(True)[-1])
    assert read_table(summary) == wanted
    metadata.unlink()
    flip(summary, len(intact["summary.csv"]) - 5)
    assert len(read_table(summary)) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 0.1\nepochs: 3\nlr: 0.2", "line 3: key 'lr' stands in line 1 already"),
        ("model_kwargs: {decay: 0.5, decay: 0.6}", "key 'decay' stands in line 1 already"),
        ("lr: 1:30", "line 1: YAML reads 1:30 as a number in base 60"),
        ("epochs: 010", "line 1: YAML reads 010 as an octal number"),
        pytest.param("a: " + "[" * 3000, "is not valid YAML", id="deep"),
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch-size: 4\nbatch_size: 8", r"Key 'batch_size' in .* is there twice, with - and with _"),
        ("epochs: .inf", "'epochs': inf, expected int"),
        ("seed: 2024-01-01", "'seed': .*, expected int"),
    ],
)
def test_configs_that_say_two_things_or_none(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        parse_args(["--config", str(path)])


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["decay"], "'decay', expected NAME=VALUE"),
        (["=3"], "'=3', expected NAME=VALUE"),
        (["decay=0.5", "decay=0.6"], "'decay' is there twice"),
    ],
)
def test_pairs_that_are_none(capsys, pairs, words):
    with pytest.raises(SystemExit):
        parse_args(["--model-kwargs", *pairs])
    assert words in capsys.readouterr().err


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
