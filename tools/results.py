"""Results as a document: the shipped checkpoints beside the papers' numbers, and the papers' claims re-measured.

    python -m tools.results --add output/conv4_cpu
    python -m tools.results --plot docs/zoo.png

Every number of ours is read from CSV files that programs wrote: ``docs/results.csv``, one row a checkpoint, from
``validate.py --model all --pretrained --count``, and ``docs/runs/*.csv``, one row a run, from ``train.py --plan``. Only
the papers' numbers are typed by hand, in ``docs/claims.yaml``:

    checkpoints:
      spiking_conv4.cifar10: {paper: BinW-SLT, where: table 1, top1: 83.41}
    claims:
      - id: binw_conv4
        sentence: A binary ticket lies well above the network of binary activations.
        paper: BinW-SLT
        where: table 1
        sides:                      # of each side, which rows of which runs, and the paper's number
          ticket: {runs: conv4_cpu.csv, rows: binw_slt*, paper: 83.65}
          bnn: {runs: conv4_cpu.csv, rows: bnn*, paper: 79.21}
        measure: top1               # the column; a side may have its own
        expect: ticket >= bnn + 3   # sides and numbers, > or >=, 2 * bnn; a > b > c is a chain; 'and' joins relations
        spread: 1                   # perhaps: what seeds differ by where a side has one; a smaller margin is open

``runs: results.csv`` are the shipped checkpoints. Rows without a name, such as those of ``validate.py --results-file``,
are called by their model.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from spikezoo import pictures
from spikezoo.checkpoint import atomic
from spikezoo.checks import is_number, nearest
from spikezoo.config_files import read_yaml
from spikezoo.evaluate import write_rows
from spikezoo.flags import Parser, add_flags, leave
from spikezoo.hub.provenance import portable_command, portable_place

__all__ = ["Claim", "Side", "add_runs", "checkpoint_table", "document", "judge", "main", "read_claims", "read_rows"]

_CLAIM_KEYS = {"id", "sentence", "paper", "where", "sides", "measure", "expect", "spread"}
_SIDE_KEYS = {"runs", "rows", "measure", "paper"}
_CHECKPOINT_KEYS = {"paper", "where", "top1"}
_OPERAND = re.compile(
    r"\s*(?:(?P<number>-?\d+(?:\.\d+)?)"
    r"|(?:(?P<factor>\d+(?:\.\d+)?)\s*\*\s*)?(?P<side>[^\W\d]\w*)\s*(?P<shift>[+-]\s*\d+(?:\.\d+)?)?)\s*"
)


@dataclass(frozen=True)
class Side:
    """One side of a claim: runs whose mean is compared.

    Attributes:
        name: As the claim's relation calls it.
        rows: Rows of a plan's results; none where nothing was run yet.
        measure: Column that is compared.
        paper: The paper's number, None where it has none.
        source: File of the rows.
    """

    name: str
    rows: Sequence[Mapping[str, str]]
    measure: str
    paper: float | None
    source: str

    @property
    def values(self) -> list[float]:
        """The measure of every run."""
        return [float(row[self.measure]) for row in self.rows]

    @property
    def mean(self) -> float:
        """Mean over the runs."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the runs, 0 of a single one."""
        return statistics.stdev(self.values) if len(self.rows) > 1 else 0.0


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, and the runs that it is held against.

    Attributes:
        id: What it is called.
        sentence: The claim in words.
        paper: Title of the paper.
        where: Which of its tables, and what is otherwise here.
        sides: Name -> the runs of it.
        expect: The relation of the sides.
        spread: What seeds are taken to differ by where a side has a single run.
    """

    id: str
    sentence: str
    paper: str
    where: str
    sides: Mapping[str, Side]
    expect: str
    spread: float = 0.0


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a results file (CSV), without those that failed.

    Raises:
        FileNotFoundError: No such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No results at {path}. validate.py --results-file and train.py --plan write them.")
    with open(path, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if not row.get("error")]


def add_runs(source: str | Path, folder: str | Path) -> Path:
    """Copy the results of a plan to where they can be kept, without the folders of this machine.

    Args:
        source: A folder that ``train.py --plan`` wrote, or a CSV file.
        folder: Where to; the file gets the name of the plan.

    Returns:
        The new file.

    Raises:
        FileNotFoundError: No results there.
        ValueError: What a row of the plan sets cannot be read.
    """
    source = Path(source)
    path = source / "results.csv" if source.is_dir() else source
    name = path.parent.resolve().name if path.name == "results.csv" else path.stem
    rows = read_rows(path)
    for row in rows:
        for key in row.keys() & {"command", "train_command"}:
            row[key] = portable_command(row[key])
        if row.get("overrides"):
            try:
                overrides = json.loads(row["overrides"])
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: the overrides of {row.get('name')!r} are no JSON: {error}.") from None
            row["overrides"] = json.dumps(_portable_value("", overrides))
    write_rows(Path(folder) / f"{name}.csv", rows)
    return Path(folder) / f"{name}.csv"


def _portable_value(key: str, value: Any) -> Any:
    """What a plan sets, and what that holds, without the folders of this machine."""
    if isinstance(value, dict):
        return {inner: _portable_value(key or inner, item) for inner, item in value.items()}
    if isinstance(value, list):
        return [_portable_value(key, item) for item in value]
    return portable_place(f"--{key.replace('_', '-')}", value, True) if isinstance(value, str) else value


def _check_keys(given: Any, known: set[str], required: set[str], where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: {given!r}, expected a mapping with {', '.join(sorted(required))}.")
    for key in given:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}. {nearest(str(key), known)}")
    if missing := sorted(required - given.keys()):
        raise ValueError(f"{where}: {', '.join(missing)} missing.")
    return given


def _paper_number(value: Any, where: str) -> float | None:
    if value is not None and not is_number(value):
        raise ValueError(f"{where}: {value!r}, expected the paper's number.")
    return None if value is None else float(value)


_Operand = tuple[str | None, float, float]  # side, factor, what is added


def _relations(text: str, known: set[str], where: str) -> list[tuple[_Operand, str, _Operand]]:
    """Split 'a >= b + 3' into comparisons of operands, each a factor, a side and what is added, or a number alone."""
    comparisons = []
    for relation in text.split(" and "):
        parts = re.split("(>=|>)", relation)
        operands: list[_Operand] = []
        for part in parts[::2]:
            found = _OPERAND.fullmatch(part)
            if not found or len(parts) < 3:
                raise ValueError(
                    f"{where}: expect: {text!r} is no relation such as 'ticket >= bnn + 3' or 'a > b > c'."
                )
            side = found["side"]
            if side is not None and side not in known:
                raise ValueError(f"{where}: expect names the side {side!r}. {nearest(side, known)}")
            added = float((found["number"] or found["shift"] or "0").replace(" ", ""))
            operands.append((side, float(found["factor"] or 1), added))
        comparisons += list(zip(operands, parts[1::2], operands[1:], strict=False))
    return comparisons


def read_claims(path: str | Path) -> tuple[dict[str, dict[str, Any]], list[Claim]]:
    """Read the papers' numbers and claims, with the rows of the runs that they are held against.

    Args:
        path: The YAML file; runs are looked for in the folder ``runs`` beside it.

    Returns:
        Of checkpoints, by name, the paper's numbers; and the claims.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No YAML, unknown keys, a relation that is none, rows without the column to compare.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No claims at {path}.")
    content = _check_keys(read_yaml(path), {"checkpoints", "claims"}, set(), str(path))
    papers = content.get("checkpoints") or {}
    for name, numbers in papers.items():
        where = f"{path}, checkpoint {name}"
        _check_keys(numbers, _CHECKPOINT_KEYS, _CHECKPOINT_KEYS, where)
        _paper_number(numbers["top1"], where)
    claims: dict[str, Claim] = {}
    for number, entry in enumerate(content.get("claims") or [], 1):
        where = f"{path}, claim {entry.get('id', number) if isinstance(entry, dict) else number}"
        _check_keys(entry, _CLAIM_KEYS, _CLAIM_KEYS - {"measure", "spread"}, where)
        if entry["id"] in claims:
            raise ValueError(f"{where}: there are two of this id.")
        if not isinstance(entry["sides"], dict) or not entry["sides"]:
            raise ValueError(f"{where}: sides: expected a mapping of names to runs, rows and the paper's number.")
        sides = {}
        for name, side in entry["sides"].items():
            _check_keys(side, _SIDE_KEYS, {"runs", "rows"}, f"{where}, side {name}")
            measure = str(side.get("measure", entry.get("measure", "top1")))
            source = path.parent / ("" if side["runs"] == "results.csv" else "runs") / str(side["runs"])
            rows = read_rows(source) if source.is_file() else []
            rows = [row for row in rows if fnmatchcase(row.get("name") or row["model"], str(side["rows"]))]
            for row in rows:
                if not row.get(measure):
                    called = row.get("name") or row["model"]
                    raise ValueError(f"{where}, side {name}: row {called!r} of {source} has no {measure!r}.")
            paper = _paper_number(side.get("paper"), f"{where}, side {name}, paper")
            sides[str(name)] = Side(str(name), rows, measure, paper, source.relative_to(path.parent).as_posix())
        _relations(str(entry["expect"]), set(sides), where)
        texts = {key: str(entry[key]) for key in ("id", "sentence", "paper", "where", "expect")}
        spread = entry.get("spread", 0)
        if not is_number(spread, 0):
            raise ValueError(f"{where}: spread={spread!r}, expected what seeds differ by, such as 1.")
        claims[entry["id"]] = Claim(**texts, sides=sides, spread=float(spread))
    return papers, list(claims.values())


def judge(claim: Claim) -> str:
    """Whether a claim holds for our runs, and how far that can be trusted.

    A margin smaller than the spreads of both sides together is said, and so is a side of a single run.

    Returns:
        'holds' or 'does not hold', with what has to be said of it; 'open' where seeds may differ by more than the
        margin and a side has one; 'not run' where a side has no runs.
    """
    if not all(side.rows for side in claim.sides.values()):
        return "not run"
    holds, close = True, False
    for left, sign, right in _relations(claim.expect, set(claim.sides), claim.id):
        compared = [(claim.sides[name] if name else None, factor, shift) for name, factor, shift in (left, right)]
        values = [factor * (side.mean if side else 0.0) + shift for side, factor, shift in compared]
        # Sums of printed numbers: 3.0000000000000004 is 3.
        margin = round(values[0] - values[1], 9)
        holds &= margin >= 0 if sign == ">=" else margin > 0
        spreads = [factor * (side.spread or claim.spread) for side, factor, _ in compared if side]
        close |= abs(margin) < math.hypot(*spreads)
    fewest = min(len(side.rows) for side in claim.sides.values())
    if close and fewest == 1 and claim.spread:
        return "open, one seed"
    said = ["within the spread"] * close
    said += ["one seed"] * (fewest == 1)
    return ", ".join(["holds" if holds else "does not hold", *said])


# --------------------------------------------------------------------------------------------------------------
# The document
# --------------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def _figure(row: Mapping[str, str], key: str, form: str, scale: float = 1.0) -> str:
    return form.format(scale * float(row[key])) if row.get(key) else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def checkpoint_table(rows: Sequence[Mapping[str, str]], papers: Mapping[str, Mapping[str, Any]]) -> str:
    """The short table of the checkpoints, in Markdown.

    Args:
        rows: Of ``docs/results.csv``.
        papers: The papers' numbers, by checkpoint.
    """
    header = ("checkpoint", "data", "T", "top-1, %", "the paper's", "file, MB", "energy exact / paper, mJ")
    return _table(
        header,
        [
            (
                f"`{row['model']}`",
                row["dataset"],
                row["T"],
                _figure(row, "top1", "{:.2f}"),
                _number(papers.get(row["model"], {}).get("top1")),
                _figure(row, "bytes", "{:.2f}", 1e-6),
                f"{_figure(row, 'energy_exact_mj', '{:.4g}')} / {_figure(row, 'energy_paper_mj', '{:.4g}')}",
            )
            for row in rows
        ],
    )


def _checkpoints(rows: Sequence[Mapping[str, str]], papers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["No checkpoint was validated yet."]
    header = "checkpoint, images, zeros, MACs, SOPs exact, SOPs paper, mJ exact, mJ paper, mJ of the ANN, firing rate"
    details = _table(
        header.split(", "),
        [
            (
                f"`{row['model']}`",
                _figure(row, "samples", "{:,.0f}"),
                _figure(row, "sparsity", "{:.1f} %", 100),
                _figure(row, "macs", "{:,.0f}"),
                _figure(row, "sops_exact", "{:,.0f}"),
                _figure(row, "sops_paper", "{:,.0f}"),
                _figure(row, "energy_exact_mj", "{:.4g}"),
                _figure(row, "energy_paper_mj", "{:.4g}"),
                _figure(row, "energy_ann_mj", "{:.4g}"),
                _figure(row, "firing_rate", "{:.4f}"),
            )
            for row in rows
        ],
    )
    made = []
    for row in rows:
        numbers = papers.get(row["model"])
        compared = f" Paper: {numbers['paper']}, {numbers['where']}: {numbers['top1']:g} %." if numbers else ""
        made.append(
            f"**`{row['model']}`**: {row['neuron']}, T={row['T']}, MPBN {row['mpbn']}. Trained: {_trained(row)}. "
            f"Validated at {row['commit']}, {row['date']}, {row['machine']}. "
            f"sha256 `{row['checkpoint_sha256']}`.{compared}\n\n"
            + _block([row["train_command"]], row["dataset"], _figure(row, "train_minutes", "{:.1f} minutes"))
        )
    return [checkpoint_table(rows, papers), details, "### How each was made", *made]


def _block(commands: Sequence[str], dataset: str, time: str) -> str:
    """Commands, and above them what they need: data, other runs, time."""
    text = "\n".join(commands)
    data = {name.removeprefix("events:") for name in (dataset, *re.findall(r"--dataset (\S+)", text)) if name}
    names = {"cifar10": "CIFAR-10", "mnist": "MNIST"}
    needs = [
        *(f"{names.get(name, name)} in DATA" for name in sorted(data - {"digits"})),
        *(f"`{run}`" for run in sorted(set(re.findall(r"(?:local-dir:|-checkpoint )((?i:output)/[\w./]+)", text)))),
        time,
    ]
    return f"Needs: {', '.join(filter(None, needs))}.\n\n```bash\n{text}\n```"


def _trained(row: Mapping[str, str]) -> str:
    parts = [
        _figure(row, "seed", "seed {:.0f}"),
        _figure(row, "epochs", "{:.0f} epochs"),
        _figure(row, "train_minutes", "{:.1f} minutes"),
        row.get("train_precision"),
        row.get("train_commit") and f"commit {row['train_commit']}",
        row.get("train_machine"),
    ]
    return ", ".join(filter(None, parts))


def _span(values: Sequence[str]) -> str:
    return ", ".join(sorted(set(filter(None, values))))


def _claim(claim: Claim, verdict: str) -> list[str]:
    rows = []
    for side in claim.sides.values():
        seconds = [float(row["seconds"]) for row in side.rows if row.get("seconds")]
        spread = f" ± {side.spread:.2f}" if len(side.rows) > 1 else ""
        rows.append(
            (
                side.name,
                side.measure,
                _number(side.paper),
                (f"{side.mean:.2f}" if abs(side.mean) >= 1 else f"{side.mean:.4g}") + spread,
                ", ".join(row.get("seed") or "?" for row in side.rows),
                _span([row.get("epochs", "") for row in side.rows]),
                _span([row.get("T", "") for row in side.rows]),
                f"{statistics.fmean(seconds) / 60:.1f}" if seconds else "",
            )
        )
    every = [row for side in claim.sides.values() for row in side.rows]
    facts = {key: _span([row.get(key, "") for row in every]) for key in ("commit", "machine")}
    dates = sorted({row["date"].partition(" ")[0] for row in every if row.get("date")})
    firsts = dict.fromkeys(side.rows[0].get("train_command", "") for side in claim.sides.values())
    header = ("side", "measure", "the paper's", "ours", "seeds", "epochs", "T", "minutes a run")
    return [
        f"### {claim.id}: {verdict}",
        f"{claim.sentence} ({claim.paper}, {claim.where}.) Expected: `{claim.expect}`.",
        _table(header, rows),
        f"Runs: {_span([side.source for side in claim.sides.values()])}; commit {facts['commit']}; "
        f"{' to '.join(dict.fromkeys([dates[0], dates[-1]])) if dates else 'no date'}; {facts['machine']}. The first "
        "run of each side:",
        _block([command for command in firsts if command], "", "the minutes of the table"),
    ]


def document(
    rows: Sequence[Mapping[str, str]],
    papers: Mapping[str, Mapping[str, Any]],
    claims: Sequence[Claim],
    path: str | Path,
) -> Path:
    """Write the tables of checkpoints and claims as Markdown.

    Args:
        rows: Of ``docs/results.csv``.
        papers: The papers' numbers, by checkpoint.
        claims: As :func:`read_claims` gives them.
        path: File to write.
    """
    verdicts = {claim.id: judge(claim) for claim in claims}
    run = [claim for claim in claims if verdicts[claim.id] != "not run"]
    parts = [
        "# Results",
        "Written by `python -m tools.results` from `docs/results.csv`, `docs/runs/` and `docs/claims.yaml`; not by "
        "hand. Accuracies are of the last epoch on the whole test split. Energy: exact counts every spike through "
        "every weight that is not zero, paper is the papers' convention (firing rate x T x dense MACs). In commands "
        "DATA is the folder of your datasets, OUTPUT that of your trainings; minutes are of the machine that is named. "
        "`ann_resnet20_cifar10` is the ReLU network of `configs/dynsnn/ann_resnet20_cifar10.yaml`, in `output/zoo` "
        "that of `configs/zoo.yaml`.",
        "## Checkpoints",
        "Any row again: `python validate.py --model NAME --pretrained --count --data-dir DATA`, which measures the "
        "shipped file in float32.",
        *_checkpoints(rows, papers),
        "## Claims",
    ]
    if run:
        summary = [(f"[{c.id}](#{_anchor(f'{c.id}: {verdicts[c.id]}')})", c.sentence, verdicts[c.id]) for c in run]
        parts += [
            "Both sides of a claim were trained with one budget, ours, which is mostly far below the papers'. ± is the "
            "standard deviation over seeds; 'within the spread' says that the margin is smaller than it.",
            _table(("claim", "in words", "at our budget"), summary),
        ]
        for claim in run:
            parts += _claim(claim, verdicts[claim.id])
    if missing := [claim.id for claim in claims if verdicts[claim.id] == "not run"]:
        parts.append(f"Not run yet: {', '.join(missing)}.")
    with atomic(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return Path(path)


def _anchor(title: str) -> str:
    """What a heading is called in links, as GitHub does it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def main(argv: Sequence[str] | None = None) -> int:
    """Write DOCS/results.md, and the picture; prints the short table."""
    parser = Parser("python -m tools.results", __doc__)
    parser.add_argument("--docs", default="docs", metavar="DIR", help="holds results.csv, claims.yaml and runs/")
    parser.add_argument("--add", nargs="+", metavar="DIR", help="first copy the results of these plans to DOCS/runs")
    add_flags(parser, "plot", help="draw accuracy over energy: .png, .pdf or .svg")
    args = parser.parse_args(argv)
    if args.plot:
        pictures.check_picture(args.plot)
    docs = Path(args.docs)
    for plan in args.add or []:
        print(f"Wrote {add_runs(plan, docs / 'runs')}", file=sys.stderr)
    papers, claims = read_claims(docs / "claims.yaml")
    # Before the first checkpoint is shipped there is none to validate.
    rows = read_rows(docs / "results.csv") if (docs / "results.csv").is_file() else []
    written = [str(document(rows, papers, claims, docs / "results.md"))]
    if args.plot:
        pictures.draw_zoo(rows, args.plot, {name: numbers["top1"] for name, numbers in papers.items()})
        written.append(args.plot)
    print(checkpoint_table(rows, papers))
    for claim in claims:
        print(f"{claim.id}: {judge(claim)}", file=sys.stderr)
    print(f"Wrote {', '.join(written)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    leave(main)
