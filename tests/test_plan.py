"""train.py --plan: rows become runs, results and pictures; kills, time budgets, failures and processes."""

import csv
import json
import signal
from pathlib import Path

import pytest
import yaml
from conftest import load, run_code, two_ranks

import spikezoo
from spikezoo import cli
from spikezoo.checkpoint import load_state
from spikezoo.evaluate import write_rows
from spikezoo.train import plan
from spikezoo.train.curves import plot_results
from spikezoo.train.rows import read_rows, share_out

ROOT = Path(__file__).parents[1]
BASE = {
    "model": "test_spiking_vgg", "dataset": "digits", "subset": 64, "batch_size": 16, "epochs": 2, "T": 2, "lr": 5e-2,
    "model_kwargs": {"threshold": 0.3, "surrogate": "triangle"}, "workers": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def train():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spikezoo.train.output.plot", lambda *_: [])  # takes longer than the runs
        yield load("train")


def write(folder, plan, base=BASE):
    """A plan and its config; returns the flags of both."""
    folder.mkdir(exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "queue.yaml").write_text(plan if isinstance(plan, str) else yaml.safe_dump(plan))
    return ["--plan", str(folder / "queue.yaml"), "--output", str(folder / "out")]


def rows(folder):
    with open(folder / "out" / "queue" / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights(folder, name):
    return (folder / "out" / "queue" / name / "model.safetensors").read_bytes()


SWEEP = """
    runs:
      - {name: dense, config: base.yaml}
      - name: ticket
        config: base.yaml
        opt: adam
        weight-decay: 0
        ticket: {kind: mpslt}
        grid: {ticket.sparsity: [0.3, 0.6], model-kwargs.decay: [0.5, 0.9]}
      - {name: twin, config: base.yaml, neuron: relu, T: 1, model_kwargs: {}, seeds: [1, 2], epochs: 1}
    plot: {x: ticket.sparsity, y: top1, by: model-kwargs.decay}
"""


def test_rows_become_runs(train, tmp_path):
    argv = write(tmp_path, SWEEP)
    runs, _ = train.read_plan(tmp_path / "queue.yaml", "out", ["--data-dir", "DATA", "--lr", "0.01"])
    assert [run.name for run in runs] == [
        "dense", "ticket-sparsity0.3-decay0.5", "ticket-sparsity0.3-decay0.9", "ticket-sparsity0.6-decay0.5",
        "ticket-sparsity0.6-decay0.9", "twin-seed1", "twin-seed2",
    ]  # fmt: skip
    third = runs[3].args
    assert third.ticket == {"kind": "mpslt", "sparsity": 0.6} and (third.opt, third.weight_decay) == ("adam", 0)
    # A dotted key keeps what else the config says, and the row's mapping replaces the config's.
    assert third.model_kwargs == {"threshold": 0.3, "surrogate": "triangle", "decay": 0.5}
    assert runs[5].args.model_kwargs == {} and (runs[5].args.seed, runs[5].args.epochs) == (1, 1)
    assert {(run.args.lr, run.args.data_dir) for run in runs} == {(0.01, "DATA")}  # the command line wins
    assert runs[0].args.ticket == {} and str(runs[0].folder) == "out/queue/dense"
    assert train.parse_args(runs[3].args.command.split()[2:]).ticket == third.ticket  # it can be typed again
    assert argv[0] == "--plan"


def test_a_plan_runs_and_is_not_run_twice(train, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    argv = write(tmp_path, SWEEP)
    assert train.main(argv) == 0
    found = rows(tmp_path)
    assert [row["name"] for row in found][:2] == ["dense", "ticket-sparsity0.3-decay0.5"] and len(found) == 7
    for row in found:
        config = json.loads((tmp_path / "out" / "queue" / row["name"] / "config.json").read_text())
        assert float(row["top1"]) == config["spikezoo"]["results"]["top1"]
        assert float(row["seconds"]) >= 0 and row["commit"] and row["machine"]
        assert (row["firing_rate"] == "") == row["name"].startswith("twin")
    assert json.loads(found[1]["overrides"])["ticket.sparsity"] == 0.3
    assert (tmp_path / "out" / "queue" / "queue.png").read_bytes().startswith(b"\x89PNG")
    baked = spikezoo.create_model(f"local-dir:{tmp_path / 'out' / 'queue' / found[3]['name']}", pretrained=True)
    assert (baked.head.fc.weight == 0).float().mean() == 0.6
    # The same as the run alone.
    capsys.readouterr()
    results = tmp_path / "out" / "queue" / "results.csv"
    shown = ["results", str(tmp_path / "queue.yaml"), "--output", str(tmp_path / "out")]
    assert cli.main(shown) == 0 and "7 of 7 runs" in capsys.readouterr().out
    intact = results.read_text()
    write_rows(results, [{**row, "top1": "99.0"} if row is found[3] else row for row in found])
    assert cli.main(shown) == 2 and "results.csv has top1=99.0 of" in capsys.readouterr().err
    results.write_text(intact)
    argv_alone = found[1]["train_command"].split()[2:]
    train.main([*argv_alone, "--output", str(tmp_path / "alone")])
    assert (
        weights(tmp_path, found[1]["name"])
        == (tmp_path / "alone" / found[1]["name"] / "model.safetensors").read_bytes()
    )
    states = sorted((tmp_path / "out").rglob("last.safetensors"))
    states[0].unlink()  # what is finished does not need its state
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*/*") if path.is_file()}
    (tmp_path / "out" / "queue" / "results.csv").unlink()
    capsys.readouterr()
    assert train.main(argv) == 0
    assert capsys.readouterr().out.count("finished before") == 7 and rows(tmp_path) == found
    after = {path: path.stat().st_mtime_ns for path in before}
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= {"results.csv", "queue.png"}


def test_a_finished_run_of_other_flags_is_not_taken_for_this_one(train, tmp_path, capsys):
    argv = write(tmp_path, {"runs": [{"name": "a", "config": "base.yaml", "epochs": 1}]})
    assert train.main(argv) == 0
    before = weights(tmp_path, "a")
    write(tmp_path, {"runs": [{"name": "a", "config": "base.yaml", "epochs": 1, "lr": 0.3}]})
    assert train.main(argv) == 1
    assert "lr is 0.3 and was 0.05" in capsys.readouterr().out and weights(tmp_path, "a") == before
    assert train.main([*argv, "--lr", "0.05"]) == 0


THREE = {"runs": [{"name": name, "config": "base.yaml", "seed": seed} for name, seed in (("a", 1), ("b", 2), ("c", 3))]}


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The three runs from end to end."""
    folder = tmp_path_factory.mktemp("plan") / "whole"
    assert train.main(write(folder, THREE)) == 0
    return folder


def test_killed_at_any_moment(train, whole, tmp_path):
    argv = write(tmp_path / "killed", THREE)
    # In the middle of writing the first epoch of the second run, after its recovery file of batch 2.
    code = f"""
        import os, signal
        from spikezoo.train import main, output, state
        original = state.save_state
        def save(path, content):
            if "/b/" in str(path) and content["epoch"] == 1:
                open(str(path) + ".tmp", "w").write("half")
                os.kill(os.getpid(), signal.SIGKILL)
            original(path, content)
        state.save_state, output.plot = save, lambda *_: []
        main({[*argv, "--recovery-interval", "2"]!r})
    """
    done = run_code(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [row["name"] for row in rows(tmp_path / "killed")] == ["a"]
    assert load_state(tmp_path / "killed/out/queue/b/recovery-0-2.safetensors")["batch"] == 2
    assert train.main(argv) == 0
    assert [row["name"] for row in rows(tmp_path / "killed")] == ["a", "b", "c"]
    for name in "abc":
        assert weights(tmp_path / "killed", name) == weights(whole, name)


@pytest.mark.parametrize("stop", [2, 8])  # within an epoch, and before the last evaluation of 'a'
def test_a_time_budget_stops_cleanly(train, whole, tmp_path, monkeypatch, capsys, stop):
    argv = write(tmp_path / "parts", THREE)
    clock, step = [0.0], train.Objective.__call__

    def count(self, *args):  # a batch takes a minute
        clock[0] += 60
        return step(self, *args)

    monkeypatch.setattr(train.Objective, "__call__", count)
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    assert train.main([*argv, "--time-budget", f"{stop}m"]) == 0
    out = capsys.readouterr().out
    epoch, batch = (stop - 1) // 4 + 1, (stop - 1) % 4 + 1
    assert f"3 left: a (epoch {epoch} of 2, batch {batch} of 4), b (not started in this budget), c (not" in out
    assert clock[0] == 60 * stop and not (tmp_path / "parts/out/queue/results.csv").exists()
    for left in (True, False):  # 22 or 16 minutes are left
        assert train.main([*argv, "--time-budget", "900s"]) == 0
        assert ("Time is over, 1 left: c (epoch" in capsys.readouterr().out) == left
    assert [row["name"] for row in rows(tmp_path / "parts")] == ["a", "b", "c"]
    for name in "abc":
        assert weights(tmp_path / "parts", name) == weights(whole, name)
    assert not list((tmp_path / "parts").rglob("recovery-*"))


def test_a_failed_run_does_not_stop_the_others(train, tmp_path, capsys):
    bad = {"name": "bad", "config": "base.yaml", "lr": 1e30, "sched": "none"}
    wrong = {"name": "wrong", "config": "base.yaml", "ticket": {"kind": "lt"}}
    good = {"name": "good", "config": "base.yaml", "epochs": 1}
    assert train.main(write(tmp_path, {"runs": [bad, wrong, good]})) == 2
    out = capsys.readouterr().out
    assert "bad: failed. SystemExit: Stopped: " in out and "2 of 3 runs failed" in out
    assert "wrong: failed. ValueError: kind='lt' is for neuron='relu'" in out
    assert [row["name"] for row in rows(tmp_path)] == ["good"]


def test_processes_share_a_plan(tmp_path):
    runs = [{"name": n, "config": "base.yaml", "epochs": 1, "seed": i} for i, n in enumerate("abcd")]
    runs[1] |= {"lr": 1e30, "sched": "none"}  # the second process fails first, and the others go on
    runs[2] |= {"epochs": 4}  # for longer than it runs
    argv = write(tmp_path, {"runs": runs})
    script = str(ROOT / "train.py")
    code = f"import runpy, sys; sys.argv[:] = {[script, *argv]!r}; runpy.run_path({script!r}, run_name='__main__')"
    done = run_code(code, *two_ranks())
    assert done.returncode == 1, done.stderr[-3000:]
    assert "[1/2] b: failed." in done.stdout and "[1/2] a: " in done.stdout and "[2/2] d: " in done.stdout
    assert [row["name"] for row in rows(tmp_path)] == ["a", "c", "d"]
    assert json.loads((tmp_path / "out/queue/c/config.json").read_text())["spikezoo"]["results"]["samples"] == 360


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"runs": []}, "expected 'runs', a list of rows"),
        ({"run": [{}]}, r"expected 'runs', .* other keys: \['run'\]"),
        ({"runs": [{"lrr": 0.1}]}, r"row 1 \(run1\): Unknown key 'lrr'\. Did you mean 'lr'"),
        ({"runs": [{"grid": {"ticket.sparsity": 0.4}}]}, "expected lists of values"),
        ({"runs": [{"grid": {"tickets.sparsity": [0.4]}}]}, r"Unknown key 'tickets\.sparsity'\. Did you mean 'ticket'"),
        ({"runs": [{"config": 3}]}, "config=3, name=None: expected texts"),
        ({"runs": [{"name": {"a": 1}}]}, "name={'a': 1}: expected texts"),
        ({"runs": [{"batch-size": 4, "batch_size": 8}]}, "Key 'batch_size' is there twice"),
        ({"runs": [{"lr.x": 1}]}, "Key 'lr.x': 'lr' is no mapping"),
        ({"runs": [{"seeds": 3}]}, "expected lists of values"),
        ({"runs": [{"epochs": "many"}]}, "Config key 'epochs': 'many', expected int"),
        ({"runs": [{"T": None}]}, "Key 'T' has no value"),
        ({"runs": [{"epochs": 0}]}, "--epochs 0: expected a number of at least 1"),
        ({"runs": [{"experiment": "x"}]}, "Unknown key 'experiment'"),
        ({"runs": [{"model": "spiking_vgg"}]}, r"Unknown model 'spiking_vgg'\. Did you mean"),
        ({"runs": [{"name": "a"}, {"name": "b"}, {"name": "a"}]}, r"row 3 \(a\): the name 'a' is taken"),
        ({"runs": [{"name": "a/b"}]}, "or no name of a folder"),
        ({"runs": [{}], "plot": {"x": "T"}}, "plot=.*expected for instance"),
        ({"runs": [{}], "plot": {"x": "T", "y": "acc"}}, r"plot\.y='acc' is not measured"),
        ("runs: [", "is not valid YAML"),
        ("- 3", "holds a list"),
    ],
)
def test_bad_plans_start_nothing(train, tmp_path, plan, words):
    argv = write(tmp_path, plan)
    with pytest.raises(ValueError, match=words):
        train.main(argv)
    assert not (tmp_path / "out").exists()


def test_bad_command_lines(train, tmp_path):
    argv = write(tmp_path, {"runs": [{"name": "a", "config": "base.yaml"}, {"config": "other.yaml"}]})
    with pytest.raises(FileNotFoundError, match=r"row 2 \(other\): No config at .*other\.yaml"):
        train.main(argv)
    with pytest.raises(FileNotFoundError, match="No plan at nowhere"):
        train.main(["--plan", "nowhere"])
    argv = write(tmp_path, THREE)
    for budget in ("9x", "0", "-3m", "9mm", "m", "nan", "inf"):
        with pytest.raises(ValueError, match="expected a time such as 90, 30s, 9m or 2h"):
            train.main([*argv, f"--time-budget={budget}"])
    assert [train.seconds(text) for text in ("90", "30s", "1.5m", "2h")] == [90, 30, 90, 7200]
    with pytest.raises(ValueError, match="--time-budget is for --plan"):
        train.main(["--time-budget", "9m"])
    with pytest.raises(ValueError, match=r"--experiment with --plan"):
        train.main([*argv, "--experiment", "x"])
    assert not (tmp_path / "out").exists()


def test_paper_numbers_and_starts_from_other_runs(train, tmp_path, capsys):
    more = "initial_checkpoint: run:dense, paper: {at: [VGG, tuned], top1: 98.5, neurons_removed: 53}"
    plan = """
    runs:
      - {name: dense, config: base.yaml, epochs: 1, paper: 97.5}
      - {name: tuned, config: base.yaml, epochs: 1, %s}
    """
    argv = write(tmp_path, plan % more)
    assert train.main(argv) == 0
    dense, tuned = rows(tmp_path)
    assert (dense["paper_top1"], dense["paper_neurons_removed"]) == ("97.5", "")
    assert (tuned["paper_top1"], tuned["paper_neurons_removed"]) == ("98.5", "53")
    # The folder is that of --output, wherever it is, and the record names the run.
    assert json.loads(tuned["overrides"])["initial_checkpoint"] == "run:dense"
    record = yaml.safe_load((tmp_path / "out" / "queue" / "tuned" / "args.yaml").read_text())
    assert record["initial_checkpoint"] == str(tmp_path / "out" / "queue" / "dense")
    assert train.main(argv) == 0 and "tuned: finished before" in capsys.readouterr().out
    read = read_rows(tmp_path / "queue.yaml")[0]
    assert [row.cell for row in read] == [None, ("VGG", "tuned")]
    assert read[1].placed(Path("x"))["initial_checkpoint"] == str(Path("x") / "dense")
    for bad, words in (
        ("paper: many", "expected a number, or for instance"),
        ("paper: {at: VGG, top1: 3}", "expected a number, or for instance"),
        ("initial_checkpoint: run:dens", "no run before it. Did you mean 'dense'"),
    ):
        with pytest.raises(ValueError, match=words):
            train.main(write(tmp_path / "bad", plan % bad))


def test_a_run_stands_in_the_picture_where_the_one_does_that_it_starts_from(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("model: test_spiking_vgg\ndataset: digits\n")
    (tmp_path / "plan.yaml").write_text("""
runs:
  - {name: level, config: base.yaml}
  - {name: found, config: base.yaml, grid: {ticket.sparsity: [0.2, 0.4]}}
  - name: tuned
    config: base.yaml
    tune: {}
    grid: {initial_checkpoint: ["run:found-sparsity0.2", "run:found-sparsity0.4"]}
""")
    runs, _ = plan.read_plan(tmp_path / "plan.yaml", str(tmp_path), [])
    assert [run.name for run in runs[3:]] == ["tuned-found-sparsity0.2", "tuned-found-sparsity0.4"]
    drawn = []
    monkeypatch.setattr("spikezoo.pictures.draw_measure", lambda groups, *_: drawn.append(groups))
    measured = {run.name: {"top1": float(number)} for number, run in enumerate(runs)}
    plot_results(tmp_path / "x.png", runs, measured, {"x": "ticket.sparsity", "y": "top1", "by": "name"})
    assert drawn == [{"level": {None: [0.0]}, "found": {0.2: [1.0], 0.4: [2.0]}, "tuned": {0.2: [3.0], 0.4: [4.0]}}]


def test_runs_stay_with_those_that_they_start_from(tmp_path):
    names = {"a": {}, "b": {}, "c": {"teacher": "run:a"}, "d": {}, "e": {"initial_checkpoint": "run:c"}, "f": {}}
    path = tmp_path / "queue.yaml"
    path.write_text(yaml.safe_dump({"runs": [{"name": name, "model": "m", **more} for name, more in names.items()]}))
    planned, _ = read_rows(path)
    assert share_out(planned, 1) == [[*"abcdef"]]
    assert share_out(planned, 2) == [["a", "c", "d", "e"], ["b", "f"]]
    assert share_out(planned, 3) == [["a", "c", "e", "f"], ["b"], ["d"]]
    assert planned[2].placed(Path("out"))["teacher"] == f"local-dir:{Path('out') / 'a'}"


PLANS = sorted(path for path in ROOT.glob("configs/**/*.yaml") if "runs" in (yaml.safe_load(path.read_text()) or {}))
# The correlation experiment of the search has a form of its own, and tests of its own.
CONFIGS = sorted(set(ROOT.glob("configs/**/*.yaml")) - set(PLANS) - set(ROOT.glob("configs/autost/correlation*.yaml")))


@pytest.fixture(scope="module")
def recipes():
    """Recipes of models by what was asked for: rows and plans that differ in training alone have one model."""
    return {}


@pytest.mark.parametrize("path", PLANS, ids=lambda p: str(p.relative_to(ROOT)))
def test_our_plans_make_models(train, recipes, path):
    runs, chart = train.read_plan(path, "output", [])
    assert path.read_text().startswith(f"# python train.py --plan {path.relative_to(ROOT)} --data-dir DATA")
    for run in runs:
        arguments = train.model_arguments(run.args)
        for later in ("multisp", "tune"):  # a second stage needs the checkpoint of the first
            arguments.pop(later, None)
        asked = json.dumps([run.args.model, arguments])
        if asked not in recipes:
            recipes[asked] = spikezoo.create_model(run.args.model, device="meta", **arguments).recipe
        assert [name for name, _ in recipes[asked]] == [
            flag for flag in ("ticket", "dynsnn", "prune") if getattr(run.args, flag) not in (None, {})
        ]
        level = chart is not None and chart["x"] == "model_kwargs.decay" and run.args.T == 1  # which no decay changes
        assert chart is None or chart["x"] == "name" or run.get(chart["x"]) is not None or not run.args.ticket or level


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_our_configs_parse(train, path):
    args = train.parse_args(["--config", str(path)])
    assert spikezoo.is_model(args.model)
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and path.name in first


def test_tables_have_every_cell(train):
    found = {path.stem: len(train.read_plan(path, "output", [])[0]) for path in PLANS if path.parent.name == "tickets"}
    # BinW-SLT: four nets and kinds on CIFAR-10, two nets on CIFAR-100. SLT: two nets, six kinds, two datasets.
    assert found["binw_slt_table1"] + found["binw_slt_table2"] == 16 + 8 and found["slt_table"] == 24
    assert found["conv4_cpu"] == 4
