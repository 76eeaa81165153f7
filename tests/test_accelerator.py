"""tools/accelerator.py: data in parts, the clock of a plan, weights in files of limited size; train.py is played."""

import hashlib
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

import spikezoo
from spikezoo.checkpoint import load_sparse_file, read_config, save_state
from spikezoo.hub.provenance import training_facts
from spikezoo.saving import describe
from tools import accelerator
from tools.accelerator import SUMS, Row, fit, main, makespan, rows_of

ROOT = Path(__file__).parents[1]


def write_sums(folder, files):
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()]
    (folder / SUMS).write_text("".join(lines))


# ------------------------------------------------------------------------------------------------------- data

FILES = {"sheet_0.png": b"zero", "more/sheet_1.png": b"one", "labels": b"01"}


@pytest.fixture
def parts(tmp_path):
    for number, (name, content) in enumerate(FILES.items()):
        path = tmp_path / f"part{number}" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    write_sums(tmp_path / "part1", FILES)
    join = (
        f"import sys; open(sys.argv[2] + '/all', 'wb').write(open(sys.argv[1] + '/{'more/sheet_1.png'}', 'rb').read())"
    )
    return [
        "--join",
        str(tmp_path / "joined"),
        "--out",
        str(tmp_path / "data"),
        "--unpack",
        f'"{sys.executable}" -c "{join}" {{parts}} {{out}}',
    ]


def test_parts_of_two_calls_are_joined_and_unpacked(parts, tmp_path):
    folders = [str(tmp_path / f"part{number}") for number in range(3)]
    assert main(["collect", *folders[:2], *parts[:2]]) == 0
    with pytest.raises(FileNotFoundError, match=r"A part is missing: 1 of 3 files are not here, such as labels\."):
        main(["collect", folders[0], *parts])
    assert not (tmp_path / "data").exists()
    assert main(["collect", folders[2], *parts]) == 0
    assert (tmp_path / "data" / "all").read_bytes() == b"one"


def test_a_damaged_part_and_a_failing_program_are_said(parts, tmp_path):
    folders = [str(tmp_path / f"part{number}") for number in range(3)]
    (tmp_path / "part2" / "labels").write_bytes(b"11")
    with pytest.raises(ValueError, match=r"labels is damaged: its hash is not that in .*SHA256SUMS\. Bring it again\."):
        main(["collect", *folders, *parts])
    (tmp_path / "part2" / "labels").write_bytes(b"01")
    with pytest.raises(ValueError, match=r"ended with 3, and .*data is not to be used"):
        main(["collect", *folders, *parts[:-1], f'"{sys.executable}" -c "raise SystemExit(3)"'])
    with pytest.raises(FileNotFoundError, match=r"No SHA256SUMS, the list of all files, in "):
        main(["collect", folders[0], "--join", str(tmp_path / "other"), "--unpack", "x"])


# ------------------------------------------------------------------------------------------------------ clock


def rows(*given):
    """Rows of (name, work, *needs)."""
    return {name: Row({"name": name}, work, set(needs)) for name, work, *needs in given}


def test_time_of_a_plan():
    two = rows(("a", 10), ("b", 20))
    assert makespan(two, 1, 5, 1) == pytest.approx(5 + 10 + 5 + 20)
    # Both start at 0, share the machine from 5 on: a ends at 25, when b has 10 left.
    assert makespan(two, 2, 5, 1) == pytest.approx(35)
    assert makespan(two, 2, 5, 0.5) == pytest.approx(20)
    # While b waits for a, c has the machine to itself for b's start: 5, 25 (a, c: 10 done), c ends at 30, b at 50.
    chain = rows(("a", 10), ("b", 20, "a"), ("c", 15))
    assert makespan(chain, 2, 5, 1) == pytest.approx(50)
    assert makespan(chain, 1, 5, 1) == pytest.approx(60)
    # One that trains has 4 s to its first step and 6 of training; a begins then, and shares from 5 to 15.
    two["b"].state, two["b"].left = "training", [4.0, 6.0]
    assert makespan(two, 2, 5, 1) == pytest.approx(20)
    two["a"].state = "failed"
    assert makespan(two, 2, 5, 1) == pytest.approx(10)


def test_scale_fills_the_time_and_leaves_the_last_rows_out():
    plan = rows(("a", 10), ("b", 20, "a"), ("c", 30))
    assert fit(plan, 1, 5, 75) == fit(plan, 1, 5, 90) == pytest.approx(1, abs=1e-6)  # more is for the last alone
    assert fit(plan, 1, 5, 45) == pytest.approx(0.5, abs=1e-6)
    assert fit(plan, 1, 5, 15.5 + 0.1) == pytest.approx(5.6 / 30, abs=1e-6)  # for c nothing is left
    assert [row.state for row in plan.values()] == ["waiting", "waiting", "left out"]
    plan["a"].state = "finished"
    assert fit(plan, 1, 5, 45) == pytest.approx(2, abs=1e-6)
    assert fit(plan, 1, 5, 4) == 0 and all(row.ended for row in plan.values())


PLAN = {"model": "test_spiking_vgg", "train_time": "10s"}


def write_plan(folder, *settings):
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"runs": [{**PLAN, **row} for row in settings]}))
    return path


def test_rows_know_what_they_need(tmp_path):
    (tmp_path / "x.yaml").write_text("lr: 0.1")
    other = {"name": "b", "teacher": "run:a", "initial_checkpoint": "elsewhere/a", "config": "x.yaml"}
    found = rows_of(write_plan(tmp_path, {"name": "a", "train_time": "2m"}, other))
    assert (found["a"].work, found["a"].needs, found["b"].needs) == (120, set(), {"a"})
    assert found["b"].settings == {
        **PLAN, **other, "teacher": "local-dir:output/plan/a", "config": str(tmp_path / "x.yaml")
    }  # fmt: skip
    for row, message in (
        ({"name": "b", "ticket_init": "run:c"}, "it starts from 'c', no run before it"),
        ({"name": "b", "train_time": "soon"}, r"row 2 \(b\): train_time 'soon': expected a time such as"),
    ):
        with pytest.raises(ValueError, match=message):
            rows_of(write_plan(tmp_path, {"name": "a"}, row))
    (tmp_path / "plan.yaml").write_text("runs: [{name: a, epochs: 3}]")
    with pytest.raises(ValueError, match=r"row 1 \(a\): it has no train_time, which could be scaled\."):
        rows_of(tmp_path / "plan.yaml")


def test_the_plan_of_the_zoo():
    found = rows_of(ROOT / "configs" / "zoo_accelerator.yaml")
    assert found["mpbn_resnet20_t2"].needs == {"mpbn_resnet20", "ann_resnet20_cifar10"}
    assert not found["ann_resnet20_cifar10"].needs
    assert sum(row.work for row in found.values()) == 410


# -------------------------------------------------------------------------------------------------------- run

# What train.py --plan does, as far as the clock sees it.
PLAYED = """
import argparse, json, pathlib, signal, subprocess, sys, time, yaml
started = time.monotonic()
parser = argparse.ArgumentParser()
for flag in ("--plan", "--output", "--time-budget", "--data-dir"):
    parser.add_argument(flag)
args = parser.parse_args()
plan = pathlib.Path(args.plan)
(row,) = yaml.safe_load(plan.read_text())["runs"]
folder = pathlib.Path(args.output, plan.stem, row["name"])
if args.output == "measured":
    assert "teacher" not in row and "train_time" in row
    told = row.get("told", "--progressive 8:20 16:10")
    print("--train-time 10s is 30 updates here; to repeat it: " + told, flush=True)
    time.sleep(60)
assert "train_time" not in row
if row["does"] == "fails":
    print("[1/1] it: failed. ValueError: no.\\nResults")
    sys.exit(1)
if row["does"] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if row["does"] in ("late", "deaf"):
    while row["does"] == "deaf" or time.monotonic() - started < float(args.time_budget[:-1]):
        time.sleep(0.02)
    print("Time is over, 1 left: it.")
    sys.exit(0)
if "leaves" in row:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
if "teacher" in row:
    assert pathlib.Path(row["teacher"].partition(":")[2], "config.json").is_file()
folder.mkdir(parents=True)
(folder / "config.json").write_text(json.dumps({"spikezoo": {"results": {"top1": 9.0, "row": row}}}))
"""


@pytest.fixture
def played(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(PLAYED)
    monkeypatch.setattr(accelerator, "TRAIN", tmp_path / "train.py")

    def run(seconds, *settings, grace=1):
        plan = write_plan(tmp_path, *settings)
        flags = ["--for", f"{seconds}s", "--jobs", "2", "--overhead", "0.1", "--grace", str(grace)]
        code = main(["run", str(plan), *flags, "--out", str(tmp_path / "out"), "--data-dir", "data"])
        return code, json.loads((tmp_path / "out" / "record.json").read_text())["rows"]

    return run


def test_rows_run_after_what_they_need(played, tmp_path):
    code, record = played(
        20,
        {"name": "a", "does": "ends", "progressive": {8: 0.5, 16: 0.5}, "leaves": "a child"},
        {"name": "b", "does": "ends", "teacher": "run:a", "told": "--updates 30"},
        {"name": "c", "does": "fails"},
        {"name": "d", "does": "ends", "initial_checkpoint": "run:c"},
    )
    assert code == 2 and [row["state"] for row in record.values()] == ["finished", "finished", "failed", "left out"]
    assert record["c"]["why"] == "[1/1] it: failed. ValueError: no." and record["d"]["why"] == "needs c"
    a, b = (read_config(tmp_path / "out" / "output" / "plan" / name)["spikezoo"]["results"]["row"] for name in "ab")
    # Ten seconds a row, and about nine to be planned at the first start of four: less than a scale of 1.
    for name, row, whole in (("a", a, {8: 20, 16: 10}), ("b", b, {"updates": 30})):
        scale, found = record[name]["scale"], {int(k): v for k, v in row.get("progressive", {}).items()}
        found = found or {"updates": row["updates"]}
        assert found == pytest.approx({key: count * scale for key, count in whole.items()}, abs=0.6)
    assert record["a"]["scale"] < 19 / 40 + 0.01 and record["a"]["scale"] < record["b"]["scale"]
    assert "9.0" in (tmp_path / "out" / "output" / "plan" / "results.csv").read_text()
    # The same command again: what is finished stays, what failed is tried again.
    code, again = played(20, {"name": "a", "does": "ends"}, {"name": "c", "does": "ends"})
    assert code == 0 and "scale" not in again["a"] and again["c"]["state"] == "finished"


def test_every_process_ends_in_time(played, capsys):
    code, record = played(
        5,
        {"name": "a", "does": "late", "train_time": "1s"},
        {"name": "b", "does": "deaf", "train_time": "1s"},
        {"name": "c", "does": "ends", "teacher": "run:a", "train_time": "1s"},
        grace=2,
    )
    assert code == 3 and [row["state"] for row in record.values()] == ["stopped", "stopped", "left out"]
    assert record["a"]["why"] == "Time is over, 1 left: it."
    times = [float(found) for found in re.findall(r"(-?[\d.]+) s left  [ab] stopped", capsys.readouterr().out)]
    assert all(time > -0.5 for time in times) and min(times) < 0.25 < 0.5 < max(times)


def test_a_budget_that_is_over_before_the_first_step(played):
    with pytest.raises(ValueError, match=r"--for 1s is over before the first step: .*--overhead.*--grace"):
        played(1, {"name": "a", "does": "ends"})


# ---------------------------------------------------------------------------------------------------- way home


@pytest.fixture
def lease(tmp_path):
    """What a run leaves: a finished row, one that was stopped, one that left nothing."""
    folder = tmp_path / "lease" / "output" / "plan"
    torch.manual_seed(1)
    done, stopped = (spikezoo.create_model(name, T=2) for name in ("test_mpbn_resnet", "test_autost"))
    inputs = {"mean": [0.25], "std": [0.5]}
    done.pretrained_cfg |= {"inputs": inputs, **inputs}
    results = {"dataset": "cifar10", "split": "test", "top1": 91.0, "train_command": "python train.py --T 2"}
    spikezoo.save_checkpoint(done, folder / "done", results)
    (folder / "done" / "summary.csv").write_text("epoch,train_seconds\n0,60\n")
    (folder / "stopped").mkdir()
    facts = describe(stopped)
    block = {"dataset": "cifar10", "split": "test", "inputs": inputs, "recipe": facts.pop("recipe")}
    for batch, model in ((5, done), (7, stopped)):
        state = {**facts, "spikezoo": block, "epoch": 1, "batch": batch, "model": model.state_dict()}
        save_state(folder / "stopped" / f"recovery-1-{batch}.safetensors", state)
    states = {
        "done": {"state": "finished"},
        "stopped": {"state": "stopped", "why": "Time is over"},
        "none": {"state": "failed"},
    }
    (tmp_path / "lease" / "record.json").write_text(json.dumps({"plan": "plan", "rows": states}))
    return {"done": done, "stopped": stopped}


def pack(tmp_path, *flags):
    return main(["pack", str(tmp_path / "lease"), "--out", str(tmp_path / "pack"), *flags])


def test_weights_come_home_in_halves(lease, tmp_path):
    assert pack(tmp_path, "--size", "0.02") == 0
    pieces = sorted((tmp_path / "pack").glob("runs.tar.*"))
    assert 2 < len(pieces) < 8 and all(path.stat().st_size <= 0.02 * 2**20 for path in pieces)
    (tmp_path / "later").mkdir()
    pieces[-1].rename(tmp_path / "later" / pieces[-1].name)
    places = [str(tmp_path / "later"), str(tmp_path / "pack")]
    assert main(["unpack", *places, "--out", str(tmp_path / "home")]) == 0
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["done", "stopped"]
    for name, model in lease.items():
        found = load_sparse_file(tmp_path / "home" / name)
        for key, value in model.state_dict().items():
            exact = value.half() if value.is_floating_point() and value.dim() > 1 else value
            assert torch.equal(found[key], exact), key
        results = read_config(tmp_path / "home" / name)["spikezoo"]["results"]
        assert results["stored"].startswith("weights in float16") and results["accelerator"]["state"]
        again = spikezoo.create_model(f"local-dir:{tmp_path / 'home' / name}", pretrained=True)
        assert again.pretrained_cfg["inputs"] == {"mean": [0.25], "std": [0.5]}
    assert (tmp_path / "home" / "done" / "summary.csv").is_file()
    assert training_facts(tmp_path / "home" / "done")["train_command"] == "python train.py --T 2"
    with pytest.raises(ValueError, match=r"done exists, and nothing was overwritten\. Give another --out\."):
        main(["unpack", *places, "--out", str(tmp_path / "home")])


def test_damaged_and_missing_files_are_said(lease, tmp_path):
    pack(tmp_path, "--size", "0.02")
    piece = tmp_path / "pack" / "runs.tar.1"
    content = bytearray(piece.read_bytes())
    content[100] ^= 1
    piece.write_bytes(content)
    with pytest.raises(ValueError, match=r"runs\.tar\.1 is damaged: its hash is not that in"):
        main(["unpack", str(tmp_path / "pack"), "--out", str(tmp_path / "home")])
    piece.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"A part is missing: 1 of \d files are not here, such as runs\.tar\.1\."
    ):
        main(["unpack", str(tmp_path / "pack"), "--out", str(tmp_path / "home")])
    assert not (tmp_path / "home").exists()


def test_what_does_not_fit_is_left_out(lease, tmp_path):
    whole = sum(path.stat().st_size for path in (tmp_path / "lease" / "output" / "plan" / "done").iterdir())
    size = math.ceil((whole + 20480) / 2**20 * 100) / 100
    with pytest.raises(ValueError, match=rf"Not packed are stopped: does not fit into 2 files of {size} MiB\."):
        pack(tmp_path, "--size", str(size), "--files", "2")
    assert [path.name for path in sorted((tmp_path / "pack").iterdir())] == [SUMS, "runs.tar.0"]
    assert main(["unpack", str(tmp_path / "pack"), "--out", str(tmp_path / "home")]) == 0
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["done"]
