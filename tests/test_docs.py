"""What README, CONTRIBUTING and docs/ show: links lead somewhere, commands parse, Python compiles, and all of it runs.

A block runs here, in an empty folder without a network, unless the paragraph above it begins with ``Needs:`` and says
what it takes. ``File: NAME`` above a block of Python makes it a file of that folder. Trainings are cut short.
"""

import argparse
import importlib
import re
import shlex
import sys
from functools import cache

import pytest
import torch
from conftest import ROOT, forget_model

import spikezoo
from spikezoo import cli, transforms
from spikezoo.cli import COMMANDS
from spikezoo.config_files import find_config
from spikezoo.train.flags import parse_args
from spikezoo.train.plan import read_plan
from tools.benchmark.command import make_parser
from tools.blocks import PAGES, blocks, module, outside

LANGUAGES = ("bash", "python", "text", "yaml")
# What a line may begin with besides our commands, and is not run here.
FOREIGN = ("pip", "git", "cd", "find", "mkdir", "mv", "timeout", "#!/bin/bash")
# Plans and configs of one's own: a placeholder, and what a command writes.
THEIRS = ("PLAN", "found/best.yaml")
OURS = r"(?:spikezoo [\w-]+|python (?:-m tools\.\w+|(?:train|validate|benchmark)\.py)) [^`]+"


def name_of(path):
    return str(path.relative_to(ROOT))


@cache
def anchors(path):
    """Names of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", outside(path), re.M)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", outside(path)):
        if re.match(r"\w+:", target):
            continue
        place, _, anchor = target.partition("#")
        there = (path.parent / place).resolve() if place else path
        assert there.exists(), f"{path.name}: {target} is not there"
        assert not anchor or anchor in anchors(there), f"{path.name}: {target}: {sorted(anchors(there))}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_blocks_are_fenced_and_of_a_known_language(path):
    wrong = [f"{path.name}:{block.line}" for block in blocks(path) if block.language not in LANGUAGES]
    assert not wrong, f"Write one of {LANGUAGES} behind ```: {wrong}"
    lines = outside(path).splitlines()
    assert not [line for line in lines if line.lstrip().startswith(("```", "~~~"))]
    above = ["", *lines]
    bare = [line for line, last in zip(lines, above, strict=False) if line.startswith("    ") and not last]
    assert not bare, f"Put it between ```bash and ```: {bare}"


def test_parser_of_blocks(tmp_path):
    # The tests here pass on any block that goes unseen.
    path = tmp_path / "x.md"
    path.write_text(
        "a\n\n```bash\none\n```\n\nNeeds: CIFAR-10,\nan hour.\n\n```bash\ntwo\n```\n\n"
        "1. b\n\n   ```sh\n   three\n   ```\n\nNeeds: it.\n\n<!-- x -->\n```python\n```\n\n"
        "File: `f.py`.\n\n```python\n```\n"
    )
    assert [(block.line, block.language, block.file, block.needs, block.text) for block in blocks(path)] == [
        (4, "bash", "", "", "one\n"),
        (11, "bash", "", "CIFAR-10, an hour.", "two\n"),
        (17, "sh", "", "", "three\n"),
        (24, "python", "", "it.", ""),
        (29, "python", "f.py", "", ""),
    ]
    assert "```" not in outside(path) and len(outside(path).splitlines()) == len(path.read_text().splitlines())


def lines_of(block):
    """The lines of a block of bash; what goes on, behind a backslash or in quotes, is one."""
    held = ""
    for number, line in enumerate(block.text.splitlines(), block.line):
        held += line.removesuffix("\\") + " "
        if not line.endswith("\\") and held.count("'") % 2 == 0:
            if held.strip() and (not held.startswith("#") or held.startswith("#!")):
                yield number, held.strip()
            held = ""


def words_of(line):
    """The words of each command of a line."""
    words = shlex.split(line, comments=not line.startswith("#!"))
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        yield words[:end]
        words = words[end + 1 :]


def commands():
    """Every command of the pages, in blocks and between backticks: page, line, words."""
    found = []
    for path in PAGES:
        text = outside(path)
        inline = [
            (text[: match.start()].count("\n") + 1, " ".join(match[1].split()))
            for match in re.finditer(rf"(?<!`)`({OURS})`(?!`)", text)
            if "..." not in match[1] and "--help" not in match[1]
        ]
        shown = [pair for block in blocks(path, "bash") for pair in lines_of(block)]
        for number, line in inline + shown:
            for words in words_of(line):
                found.append(pytest.param(words, id=f"{name_of(path)}:{number}:{'_'.join(words[:3])}"))
    return found


def parser_of(command):
    """The parser of a command of ours, and what its flags may say."""
    module = importlib.import_module(f"spikezoo.cli.{command}")
    return module.build_parser()


@pytest.mark.parametrize("words", commands())
def test_commands(words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if words[0] in ("srun", "torchrun"):
        start = next(i for i, word in enumerate(words) if word in ("train.py", "-m"))
        words = ["python", *words[start:]]
    if words[0].endswith(("python", "python3")) and words[1] == "-m" and words[2] == "spikezoo":
        words = words[2:]
    if words[0] in FOREIGN or words[0].startswith(("#", ".venv/bin/pip")):
        return
    words = [word for word in words if word != "..."]
    if words[0].endswith(("python", "python3")):
        script, rest = words[1], words[2:]
        if script == "-m":
            assert (
                rest[0] in ("venv", "pytest")
                or (ROOT / rest[0].replace(".", "/")).with_suffix(".py").is_file()
                or (ROOT / rest[0].replace(".", "/") / "__main__.py").is_file()
            ), words
            return
        assert script in ("train.py", "validate.py", "benchmark.py"), words
        if script == "benchmark.py":
            args = make_parser().parse_args(rest)
            assert spikezoo.is_model(args.model) or args.mode == "neuron"
            return
        command = script.removesuffix(".py")
        if "--ship" in rest:  # of a checkout alone
            rest = rest[: rest.index("--ship")]
    else:
        assert words[0] == "spikezoo", words
        command, rest = words[1], words[2:]
        if command.startswith("--"):
            return
    assert command in COMMANDS, words
    args = trained(rest) if command == "train" else parser_of(command).parse_args(rest)
    for name in [*getattr(args, "names", []), *filter(None, [getattr(args, "model", None)])]:
        fine = name in ("all", "NAME") or "*" in name or ":" in name
        assert fine or spikezoo.is_model(name.partition(".")[0]), name


def trained(rest):
    """Flags of a training, of a plan's runs too; a method of one's own is not known here."""
    if "--config" in rest and rest[rest.index("--config") + 1] in THEIRS:
        rest = [word for word in rest if word not in ("--config", *THEIRS)]
    if "--plan" in rest:
        own = argparse.ArgumentParser(allow_abbrev=False)
        for flag in ("--plan", "--time-budget", "--output"):
            own.add_argument(flag)
        args, more = own.parse_known_args(rest)
        if args.plan in THEIRS:
            return args
        runs, _ = read_plan(find_config(args.plan, "plan"), "output", more)
        return runs[0].args
    if "--import" in rest:
        theirs = ("--import", "my_method.py", "--magnitude", "sparsity=0.5", "my_model.py", "--model", "my_net")
        rest = [word for word in rest if word not in theirs]
    return parse_args(rest)


@pytest.mark.parametrize(
    "block", [block for page in PAGES for block in blocks(page, "python")], ids=lambda b: f"{b.page.name}:{b.line}"
)
def test_python(block, tmp_path, monkeypatch, capsys):
    code = compile(block.text, f"{block.page}:{block.line}", "exec")
    if not block.needs and not block.file:
        monkeypatch.chdir(tmp_path)
        given = {"spikezoo": spikezoo, "images": torch.rand(2, 3, 32, 32)}
        exec(code, given)


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty folder without a network; what files of a page registered is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield tmp_path
    transforms.TRANSFORMS.pop("magnitude", None)
    transforms.FLAGS[:] = [name for name in transforms.FLAGS if name != "magnitude"]
    forget_model("my_net")
    for name in ("my_method", "my_model"):
        sys.modules.pop(name, None)


def runs_here(page):
    return [block for block in blocks(page, "bash") if not block.needs]


@pytest.mark.parametrize("page", [page for page in PAGES if runs_here(page)], ids=name_of)
def test_shell(page, empty, capsys):
    for block in blocks(page):
        if block.file:
            (empty / block.file).write_text(block.text, encoding="utf-8")
    for block in runs_here(page):
        for number, line in lines_of(block):
            for words in words_of(line):
                where = f"{page.name}:{number}"
                assert words[0] == "spikezoo", f"{where} is not run here: say above its block what it 'Needs: ...'"
                short = ["--epochs", "1", "--subset", "64"] if words[1] == "train" else []
                assert cli.main([*words[1:], *short]) == 0, f"{where}: {capsys.readouterr().err}"


def test_blocks_as_modules():
    typed = [module(block) for page in PAGES for block in blocks(page, "python")]
    assert len(typed) > 10 and any("loader: typing.Any" in text for text in typed)
