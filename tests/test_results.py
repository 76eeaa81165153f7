"""The document of results: claims judged by hand, tables, runs without places of one machine, and the picture."""

import csv
import math
import random
from pathlib import Path

import pytest

from spikezoo import pictures
from tools import results
from tools.results import add_runs, checkpoint_table, judge, read_claims, read_rows

RUNS = """name,top1,seconds,seed,epochs,T,commit,date,machine,train_command,error
a-seed1,80,60,1,8,2,c1,2026-01-01 10:00 UTC,m,python train.py --model a --data-dir DATA,
a-seed2,82,120,2,8,2,c1,2026-01-02 10:00 UTC,m,python train.py --model a --seed 2,
b-seed1,79,60,1,8,2,c2,2026-01-03 10:00 UTC,m,python train.py --model b,
c-seed1,,,,,,,,,,it failed
"""
CLAIMS = """
checkpoints:
  net.tag: {{paper: P, where: table 1, top1: 91.5}}
claims:
  - id: a-over-b
    sentence: A beats B.
    paper: P
    where: table 2
    sides:
      A: {{runs: plan.csv, rows: a-*, paper: 90.4}}
      B: {{runs: plan.csv, rows: b-*}}
    expect: {expect}
"""
CHECKPOINT = {
    "model": "net.tag", "dataset": "digits", "T": "2", "top1": "90.2778", "bytes": "1500000", "sparsity": "0.25",
    "energy_exact_mj": "0.0125", "energy_paper_mj": "0.02", "energy_ann_mj": "0.1", "macs": "1000000",
    "sops_exact": "5", "sops_paper": "6", "samples": "360", "firing_rate": "0.1234", "neuron": "lif", "mpbn": "none",
    "seed": "3", "epochs": "9", "train_minutes": "1.5", "train_precision": "bfloat16", "train_commit": "c0",
    "train_machine": "m", "commit": "c1", "date": "2026-01-01", "machine": "n", "checkpoint_sha256": "ab" * 32,
    "train_command": "python train.py --data-dir DATA",
}  # fmt: skip


@pytest.fixture
def docs(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "plan.csv").write_text(RUNS)
    return tmp_path


def claim(docs, expect, text=CLAIMS):
    (docs / "claims.yaml").write_text(text.format(expect=expect))
    return read_claims(docs / "claims.yaml")[1][0]


# A: 80 and 82, mean 81, spread sqrt(2); B: 79.
@pytest.mark.parametrize(
    ("expect", "verdict"),
    [
        ("A > B", "holds, one seed"),
        ("A >= B + 2", "holds, within the spread, one seed"),
        ("A > B + 2", "does not hold, within the spread, one seed"),
        ("A >= B+1", "holds, within the spread, one seed"),
        ("B > A", "does not hold, one seed"),
        ("B >= A - 5", "holds, one seed"),
        ("A > B > 78", "holds, one seed"),
        ("A > B > 79.5", "does not hold, one seed"),
        ("A > B and B >= 80", "does not hold, one seed"),
        ("90 > A and 80 > B", "holds, one seed"),
        ("A > 0.5 * B", "holds, one seed"),
        ("2.5 * B >= 2 * A + 36", "does not hold, within the spread, one seed"),  # 197.5 and 198
        ("A > B + 2\n    spread: 1", "open, one seed"),
        ("A > B\n    spread: 1", "holds, one seed"),  # by 2, more than the spread of 1.7
    ],
)
def test_claims_by_hand(docs, expect, verdict):
    found = claim(docs, expect)
    assert found.sides["A"].mean == 81 and found.sides["A"].spread == pytest.approx(math.sqrt(2))
    assert judge(found) == verdict


def test_a_claim_of_shipped_checkpoints(docs):
    write(docs / "results.csv", [CHECKPOINT])
    sides = "A: {{runs: results.csv, rows: net.tag, measure: energy_exact_mj}}"
    text = CLAIMS.replace("A: {{runs: plan.csv, rows: a-*, paper: 90.4}}", sides)
    found = claim(docs, "B > 6000 * A", text)  # 79 > 75
    assert judge(found) == "holds, one seed" and found.sides["A"].source == "results.csv"
    assert results.main(["--docs", str(docs)]) == 0
    text = (docs / "results.md").read_text()
    assert "| A | energy_exact_mj |  | 0.0125 | 3 | 9 | 2 |  |" in text and "Runs: results.csv, runs/plan.csv;" in text


def test_what_was_not_run_is_said(docs):
    assert judge(claim(docs, "A > B", CLAIMS.replace("b-*", "d-*"))) == "not run"
    assert judge(claim(docs, "A > B", CLAIMS.replace("plan.csv, rows: b", "other.csv, rows: b"))) == "not run"
    assert judge(claim(docs, "A > B", CLAIMS.replace("b-*", "c-*"))) == "not run"  # it failed
    assert results.main(["--docs", str(docs)]) == 0
    text = (docs / "results.md").read_text()
    assert "Not run yet: a-over-b." in text and "A beats B" not in text and "No checkpoint was validated" in text


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("A > B", "A = B", "is no relation such as"),
        ("A > B", "A", "is no relation such as"),
        ("A > B", "A > B * 2", "is no relation such as"),
        ("A > B", "A > bb", "names the side 'bb'"),
        ("expect: A > B", "expect: A > B\n    spread: wide", "expected what seeds differ by"),
        ("sentence", "sentense", "unknown key 'sentense'. Did you mean 'sentence'"),
        ("    where: table 2\n", "", "where missing"),
        ("paper: 90.4", "paper: many", "expected the paper's number"),
        ("rows: a-*", "rowz: a-*", "unknown key 'rowz'. Did you mean 'rows'"),
        ("paper: 90.4", "measure: top5", "row 'a-seed1' of .* has no 'top5'"),
        ("top1: 91.5", "top1: high", "expected the paper's number"),
        ("checkpoints:", "checkpoint:", "unknown key 'checkpoint'"),
        ("claims:", "claims: [", "is not valid YAML"),
    ],
)
def test_bad_claims(docs, old, new, words):
    text = CLAIMS.format(expect="A > B")
    assert old in text
    (docs / "claims.yaml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=words):
        read_claims(docs / "claims.yaml")
    with pytest.raises(FileNotFoundError, match="No claims"):
        read_claims(docs / "other.yaml")


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_the_document(docs, capsys):
    claim(docs, "A > B")
    write(docs / "results.csv", [CHECKPOINT])
    assert results.main(["--docs", str(docs), "--plot", str(docs / "zoo.svg")]) == 0
    out = capsys.readouterr()
    row = "| `net.tag` | digits | 2 | 90.28 | 91.5 | 1.50 | 0.0125 / 0.02 |"
    assert row in out.out and out.out.count("\n") == 3 and "a-over-b: holds, one seed" in out.err
    text = (docs / "results.md").read_text()
    for part in (
        row, "25.0 %", "1,000,000", "0.1234", "seed 3, 9 epochs, 1.5 minutes, bfloat16, commit c0, m", "ab" * 32,
        "Paper: P, table 1: 91.5 %", "```bash\npython train.py --data-dir DATA\n```",
        "| A | top1 | 90.4 | 81.00 ± 1.41 | 1, 2 | 8 | 2 | 1.5 |", "| B | top1 |  | 79.00 | 1 | 8 | 2 | 1.0 |",
        "runs/plan.csv; commit c1, c2; 2026-01-01 to 2026-01-03; m.", "python train.py --model b\n",
        "[a-over-b](#a-over-b-holds-one-seed)", "### a-over-b: holds, one seed",
    ):  # fmt: skip
        assert part in text, part
    assert "net.tag" in (docs / "zoo.svg").read_text()


def test_runs_are_added_without_places(docs, tmp_path):
    plan = tmp_path / "output" / "table"
    plan.mkdir(parents=True)
    row = {"name": "a", "top1": "1", "train_command": "python train.py --data-dir /x/y --output /z", "error": ""}
    row["overrides"] = '{"teacher": "local-dir:/x/y/ann", "initial_checkpoint": "/x/b", "model": "a", "T": 1}'
    write(plan / "results.csv", [row])
    assert add_runs(plan, docs / "runs") == docs / "runs" / "table.csv"
    (found,) = read_rows(docs / "runs" / "table.csv")
    overrides = '{"teacher": "local-dir:OUTPUT/ann", "initial_checkpoint": "OUTPUT/b", "model": "a", "T": 1}'
    assert found == {**row, "train_command": "python train.py --data-dir DATA --output OUTPUT", "overrides": overrides}
    row["overrides"] = '{"model_kwargs": {"output": "mean", "weights": ["/x/y/w.pt", null, 1]}, "hflip": null}'
    write(plan / "results.csv", [row])
    (found,) = read_rows(add_runs(plan, docs / "runs"))
    assert found["overrides"] == row["overrides"].replace("/x/y", "OUTPUT")
    write(plan / "results.csv", [{**row, "overrides": "lr=1"}])
    with pytest.raises(ValueError, match="the overrides of 'a' are no JSON"):
        add_runs(plan, docs / "runs")
    with pytest.raises(FileNotFoundError, match="No results at"):
        add_runs(tmp_path / "nothing", docs / "runs")


def test_a_row_without_counts_leaves_its_cells_empty():
    row = {**CHECKPOINT, "bytes": "", "energy_exact_mj": ""}
    assert "| `net.tag` | digits | 2 | 90.28 |  |  | / 0.02 |" in checkpoint_table([row], {})


# ------------------------------------------------------------------------------------------------------- picture


def boxes_of(dots, sizes, placed):
    labels = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(placed, sizes, strict=True)]
    return labels, [(x - r, y - r, x + r, y + r) for x, y, r in dots]


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_labels_do_not_overlap():
    generator = random.Random(0)
    dots = [(generator.uniform(300, 500), generator.uniform(300, 400), generator.uniform(2, 12)) for _ in range(24)]
    sizes = [(generator.uniform(60, 140), 12) for _ in dots]
    placed = pictures.place_labels(dots, sizes, (0, 0, 900, 700))
    labels, circles = boxes_of(dots, sizes, placed)
    for index, label in enumerate(labels):
        assert min(label) >= 0 and label[2] <= 900 and label[3] <= 700
        assert not any(overlap(label, other) for other in [*labels[:index], *circles])


def test_a_lone_label_stands_beside_its_dot():
    ((x, y),) = pictures.place_labels([(100, 50, 5)], [(40, 10)], (0, 0, 200, 100))
    assert 105 < x < 110 and y + 5 == pytest.approx(50)
    ((x, y),) = pictures.place_labels([(180, 50, 5)], [(40, 10)], (0, 0, 200, 100))  # no room to the right
    assert x + 40 < 175 and y + 5 == pytest.approx(50)
    with pytest.raises(ValueError, match="no room"):
        pictures.place_labels([(100, 50, 5)], [(400, 10)], (0, 0, 200, 100))


def test_front_of_those_that_none_beats():
    points = [(3, 5), (1, 2), (2, 2), (1, 1), (4, 4), (5, 7)]
    assert pictures.pareto_front(points) == [(1, 2), (3, 5), (5, 7)]


def test_the_picture_of_the_zoo(tmp_path, monkeypatch):
    rows = [
        {**CHECKPOINT, "model": f"spiking_something.cifar10_{i}", "dataset": ("mnist", "cifar10")[i % 2],
         "top1": str(80 + i % 3), "energy_exact_mj": str(0.01 * 1.1**i)}
        for i in range(16)
    ]  # fmt: skip
    from matplotlib.axes import Axes

    rows += [{**rows[1], "model": "twin", "neuron": "relu", "energy_exact_mj": "2.0"}]
    rows += [{**rows[0], "dataset": "digits"}]  # alone: nothing to compare, and no panel
    scattered = []
    draw = Axes.scatter
    monkeypatch.setattr(Axes, "scatter", lambda *given, **more: scattered.append(given[1:3]) or draw(*given, **more))
    pictures.draw_zoo(rows, tmp_path / "zoo.png", {"spiking_something.cifar10_1": 95.0})
    # A panel a dataset; what is analog apart from what spikes.
    assert [sorted(x) for x, _ in scattered] == [
        sorted(float(row["energy_exact_mj"]) for row in rows[:16] if row["dataset"] == "cifar10"),
        [2.0],
        sorted(float(row["energy_exact_mj"]) for row in rows[:16] if row["dataset"] == "mnist"),
    ]
    assert (tmp_path / "zoo.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no checkpoints to draw"):
        pictures.draw_zoo([], tmp_path / "zoo.png")
    with pytest.raises(ValueError, match=r"net\.tag has no energy"):
        pictures.draw_zoo([{**CHECKPOINT, "energy_exact_mj": ""}], tmp_path / "zoo.png")


def test_the_claims_of_the_repository(tmp_path):
    # Its numbers are those of its runs.
    docs = Path(__file__).resolve().parent.parent / "docs"
    papers, claims = read_claims(docs / "claims.yaml")
    rows = read_rows(docs / "results.csv") if (docs / "results.csv").is_file() else []
    written = results.document(rows, papers, claims, tmp_path / "results.md").read_text()
    assert written == (docs / "results.md").read_text(), "python -m tools.results writes it anew"
