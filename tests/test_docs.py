"""What README, CONTRIBUTING and docs/ show: links lead somewhere, commands parse, Python compiles and runs."""

import argparse
import importlib
import re
import shlex
from functools import cache

import pytest
import torch
from conftest import ROOT

import spikezoo
from spikezoo.cli import COMMANDS
from spikezoo.train.flags import parse_args
from spikezoo.train.plan import read_plan
from tools.benchmark.command import make_parser
from tools.blocks import PAGES, module, python_blocks

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
# What a line may begin with besides our commands, and is not run here.
FOREIGN = ("pip", "git", "#!/bin/bash")


def blocks(path, *languages):
    """Line and text of the page's blocks of a language."""
    text = path.read_text(encoding="utf-8")
    return [(text[: m.start()].count("\n") + 2, m[2]) for m in BLOCK.finditer(text) if m[1] in languages]


@cache
def anchors(path):
    """Names of a page's headings, as GitHub makes them."""
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path):
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        place, _, anchor = target.partition("#")
        there = (path.parent / place).resolve() if place else path
        assert there.exists(), f"{path.name}: {target} is not there"
        assert not anchor or anchor in anchors(there), f"{path.name}: {target}: {sorted(anchors(there))}"


def commands():
    """Every command line of the pages: page, line, words."""
    found = []
    for path in PAGES:
        for start, block in blocks(path, "bash", ""):
            number = start
            for joined in re.split(r"(?<!\\)\n", block):
                line = joined.replace("\\\n", " ").strip()
                if line and (not line.startswith("#") or line.startswith("#!")):
                    for part in line.split(" && "):
                        words = shlex.split(part, comments=not part.startswith("#!"))
                        if words:
                            found.append(pytest.param(words, id=f"{path.name}:{number}:{'_'.join(words[:3])}"))
                number += joined.count("\n") + 1
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
    else:
        assert words[0] == "spikezoo", words
        command, rest = words[1], words[2:]
        if command.startswith("--"):
            return
    assert command in COMMANDS, words
    args = trained(rest) if command == "train" else parser_of(command).parse_args(rest)
    for name in [*getattr(args, "names", []), *filter(None, [getattr(args, "model", None)])]:
        assert "*" in name or ":" in name or spikezoo.is_model(name.partition(".")[0]) or name == "all", name


def trained(rest):
    """Flags of a training, of a plan's runs too; a method of one's own is not known here."""
    if "--plan" in rest:
        args = argparse.Namespace(**dict(zip(*[iter(rest)] * 2, strict=True)))
        runs, _ = read_plan(ROOT / getattr(args, "--plan"), "output", [])
        return runs[0].args
    if "--import" in rest:
        rest = [word for word in rest if word not in ("--import", "my_method.py", "--magnitude", "sparsity=0.5")]
    return parse_args(rest)


@pytest.mark.parametrize(
    "block", [block for page in PAGES for block in python_blocks(page)], ids=lambda b: f"{b.page.name}:{b.line}"
)
def test_python(block, tmp_path, monkeypatch, capsys):
    code = compile(block.text, f"{block.page}:{block.line}", "exec")
    if not block.needs:
        monkeypatch.chdir(tmp_path)
        given = {"spikezoo": spikezoo, "images": torch.rand(2, 3, 32, 32)}
        exec(code, given)


def test_blocks_as_modules():
    typed = [module(block) for page in PAGES for block in python_blocks(page)]
    assert len(typed) > 10 and any("loader: typing.Any" in text for text in typed)
