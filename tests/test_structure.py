"""Tests of the house itself: who imports whom, where time meets the batch, docstrings, no paths of one machine."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "spikezoo"

# File or folder of spikezoo/ -> what of spikezoo it may import; "x lazily" means inside a function only. Arrows
# point one way, so that each file can be read with those to its right in mind and no others.
ALLOWED = {
    "_version.py": set(),
    "checks.py": set(),
    "surrogate.py": set(),
    "neurons.py": {"checks", "surrogate"},
    "observe.py": {"neurons"},
    "encoding.py": set(),
    "counting": {"checks", "counting", "observe"},
    "checkpoint": {"checks", "checkpoint"},
    "data": {"checks", "data"},
    "precision.py": set(),
    "config_files.py": {"checks"},
    "train": {
        "checkpoint",
        "checks",
        "config_files",
        "convert",
        "counting",
        "data",
        "evaluate",
        "factory",
        "flags",
        "hub",
        "neurons",
        "observe",
        "pictures",
        "precision",
        "registry",
        "saving",
        "train",
        "transforms",
    },
    "layers.py": {"checks", "neurons"},
    "graph.py": {"layers", "neurons"},
    "registry.py": {"checks", "neurons", "checkpoint", "factory lazily"},
    "models": {"checks", "layers", "registry", "encoding", "neurons", "models"},
    "transforms": {
        "checks",
        "surrogate",
        "neurons",
        "observe",
        "layers",
        "graph",
        "counting",
        "checkpoint",
        "transforms",
    },
    "evaluate.py": {"checks", "observe", "checkpoint", "counting", "data", "factory"},
    "pictures": {"checks", "models", "neurons", "observe", "transforms", "checkpoint", "counting", "pictures"},
    "flags.py": {"checks"},
    "__main__.py": {"cli"},
    "cli": {
        "_version",
        "checkpoint",
        "checks",
        "cli",
        "config_files",
        "convert",
        "counting",
        "data",
        "deploy",
        "evaluate",
        "export",
        "factory",
        "flags",
        "gallery",
        "hub",
        "neurons",
        "observe",
        "pictures",
        "precision",
        "registry",
        "saving",
        "search",
        "train",
        "transforms",
    },
    "search": {"checks", "config_files", "factory", "neurons", "checkpoint", "data", "evaluate", "search"},
    "factory.py": {"checks", "neurons", "checkpoint", "registry", "models", "transforms", "hub.client lazily"},
    "saving.py": {"_version", "checkpoint", "models", "transforms", "factory"},
    "hub": {"_version", "checkpoint", "registry", "factory", "saving", "hub"},
    "hub/client.py": {"checkpoint"},
    "convert.py": {"checks", "neurons", "graph", "encoding", "factory", "observe", "saving", "transforms"},
    "export.py": {"neurons", "graph", "encoding", "models", "transforms", "checkpoint", "saving", "_version"},
    "gallery": {
        "checkpoint",
        "counting",
        "data",
        "encoding",
        "evaluate",
        "factory",
        "gallery",
        "neurons",
        "observe",
        "registry",
    },
    "deploy": {"checks", "deploy", "graph", "neurons", "layers", "transforms", "counting", "checkpoint", "precision"},
    "__init__.py": {"*"},
}
SCRIPTS = ("train.py", "validate.py", "benchmark.py")


def tracked():
    """Files of the repository, new ones included, ignored ones not."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in sorted(filter(None, done.stdout.split("\0"))) if (ROOT / name).is_file()]


def imports(path):
    """Yield (top-level package, place in spikezoo or '', inside a function?, line) of every import of a file."""

    def names(node):
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        package = node.module or ""
        if node.level:
            inside = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
            package = ".".join([*inside, *filter(None, [package])])
        # `from spikezoo import models` names a part only in its last word.
        return [f"{package}.{alias.name}" for alias in node.names] if package == "spikezoo" else [package]

    def walk(node, lazily):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                for name in names(child):
                    top, _, rest = name.partition(".")
                    yield top, rest, lazily, child.lineno
            deeper = lazily or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, deeper)

    yield from walk(ast.parse(path.read_text()), False)


def row_of(path):
    whole = str(path.relative_to(PACKAGE))
    part = whole if whole in ALLOWED else path.relative_to(PACKAGE).parts[0]
    assert part in ALLOWED, (
        f"spikezoo/{part} has no row in the import table: say what it may import, in {Path(__file__).name}."
    )
    return ALLOWED[part]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_table(path):
    allowed = row_of(path)
    for top, part, lazily, line in imports(path):
        if top != "spikezoo" or "*" in allowed:
            continue
        folder, file = part.partition(".")[0], ".".join(part.split(".")[:2])
        fine = {folder, file} & allowed or (lazily and {f"{folder} lazily", f"{file} lazily"} & allowed)
        where = "inside a function" if lazily else "at the top"
        assert fine, (
            f"{path.relative_to(ROOT)}:{line} imports spikezoo.{part} {where}; it may import {sorted(allowed)}."
        )


def test_import_table_has_no_cycle():
    # The lazy arrows are left out: there the registry opens what stands above it, when a user asks for weights.
    arrows = {
        name.removesuffix(".py").replace("/", "."): {
            to for to in allowed if "lazily" not in to and to != name.removesuffix(".py")
        }
        for name, allowed in ALLOWED.items()
        if "*" not in allowed
    }
    seen = []
    while arrows:
        free = [name for name, to in arrows.items() if not {part.partition(".")[0] for part in to} - set(seen)]
        assert free, f"These import each other: {sorted(arrows)}"
        seen += free
        for name in free:
            del arrows[name]


def test_budgets_of_files_and_functions():
    over = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 600:
            over.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines, of 600")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 80:
                    over.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines, of 80")
    assert not over, "; ".join(over)


def test_few_types_are_left_open():
    # Any says nothing to who reads, and lets through whatever is given: it stays for arguments that are handed on.
    for text, most in (("type: ignore", 8), (": Any", 60)):
        found = [
            f"{path.relative_to(ROOT)}:{number}"
            for path in sorted(PACKAGE.rglob("*.py"))
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if text in line
        ]
        assert len(found) <= most, f"{text!r} in {len(found)} lines, of {most}: {found}"


def test_no_private_names_across_modules():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {alias.name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spikezoo")
        for alias in node.names
        if alias.name.startswith("_") and alias.name != "__version__"
    ]
    assert not found, f"Give it a public name, or move what needs it: {found}"


def test_parser_of_imports(tmp_path, monkeypatch):
    # The tests above pass on any file whose imports go unseen.
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "spikezoo" / "models" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import spikezoo.neurons as n\nfrom spikezoo.models._base import A\nfrom spikezoo import layers, encoding\n"
        "from .. import registry\nfrom ._base import B\nfrom ..data import C\nimport torch.nn\n"
        "def f():\n    if True:\n        from spikezoo.checkpoint import load\n"
    )
    assert [(top, part, lazily) for top, part, lazily, _ in imports(path)] == [
        ("spikezoo", "neurons", False),
        ("spikezoo", "models._base", False),
        ("spikezoo", "layers", False),
        ("spikezoo", "encoding", False),
        ("spikezoo", "registry", False),
        ("spikezoo", "models._base", False),
        ("spikezoo", "data", False),
        ("torch", "nn", False),
        ("spikezoo", "checkpoint", True),
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_doors(script):
    # A script that does more works only in a checkout, and one that imports another only from its root.
    found = list(imports(ROOT / script))
    assert {top for top, _, _, _ in found} <= {"spikezoo", "tools", "functools", "sys", "__future__"}
    assert len((ROOT / script).read_text().splitlines()) <= 20


@pytest.mark.parametrize("path", sorted((ROOT / "tools").rglob("*.py")), ids=lambda p: p.stem)
def test_tools_stand_above_the_package(path):
    known = {path.stem for path in PACKAGE.iterdir()} | set(dir(__import__("spikezoo"))) | {""}
    for top, part, _, line in imports(path):
        assert top not in ("train", "validate", "benchmark", "tests"), f"{path}:{line}"
        assert top != "spikezoo" or part.partition(".")[0] in known, f"{path}:{line}"


def test_time_meets_the_batch_in_one_file():
    # Law 2: folding T into B and back is what every silent mix-up of samples and steps is made of.
    fold = re.compile(r"flatten\(\s*(start_dim\s*=\s*)?0\s*,\s*(end_dim\s*=\s*)?1\s*\)|unflatten\(\s*(dim\s*=\s*)?0\b")
    assert fold.search((PACKAGE / "layers.py").read_text())
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "layers.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if fold.search(line)
    ]
    # The neuron's loop over time cuts its input into the steps, and is all that may.
    cut = [line for line in found if "neurons.py" in line and "current.flatten(0, 1).split(x.shape[1])" in line]
    assert len(cut) == 1 and found == cut, "Use layers.over_time: " + "; ".join(found)


def test_every_file_says_what_it_is_for():
    bare = []
    for path in tracked():
        if path.suffix == ".py":
            text = path.read_text()
            if not (ast.get_docstring(ast.parse(text)) or "").strip() or not text.startswith(('"""', 'r"""', "#!")):
                bare.append(str(path.relative_to(ROOT)))
    assert not bare, f"No docstring in the first line: {bare}"


def test_no_paths_of_one_machine():
    # Written in pieces, lest this file finds itself.
    pattern = re.compile(
        r"(?<![\w./*])/(?:" + "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me", "Us" + "ers"]) + r")(?=[/\s\"'`)]|$)"
    )
    assert pattern.search("see /wo" + "rk/shared") and not pattern.search("a.b/wo" + "rk/x, /wo" + "rkflows")
    found = []
    for path in tracked():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # weights and pictures
        for number, line in enumerate(lines, 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "; ".join(found)


def _texts(path):
    """Yield the line of every call that reads or writes text in the encoding of the locale."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        first = {"read_text": 0, "write_text": 1}.get(name)
        if first is not None and len(node.args) <= first:
            yield node.lineno
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        plain = isinstance(node.func, ast.Name) and not modes  # to read, by default
        if name == "open" and (plain or any(set(mode) <= set("rwax+t") for mode in modes)):
            yield node.lineno


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_text_is_utf8_whatever_the_locale(path):
    # A config or a list of one's own is the same on a machine in Tokyo, and on Windows.
    assert not list(_texts(path)), f'{path.relative_to(ROOT)}: give encoding="utf-8" in these lines.'


def test_parser_of_encodings(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "p.read_text()\np.read_text('utf-8')\np.write_text(x)\np.write_text(x, encoding='utf-8')\n"
        "open(p, 'a')\nopen(p, 'rb')\np.open('w')\nopen(p, newline='')\nopen(p, newline='', encoding='utf-8')\n",
        encoding="utf-8",
    )
    assert list(_texts(path)) == [1, 3, 5, 7, 8]


def test_the_loop_of_training_names_no_method():
    # A method is a row of TRANSFORMS, or a file of a user's own: training calls its hooks.
    names = re.compile("(?i)dynsnn|ticket|multisp")
    assert names.search((PACKAGE / "transforms" / "__init__.py").read_text(encoding="utf-8"))
    found = [path.name for path in (PACKAGE / "train").glob("*.py") if names.search(path.read_text(encoding="utf-8"))]
    assert not found
