"""Pages of the gallery: one of all nets, one for each, and what a browser needs to run the small ones.

Everything is in files beside the pages, and all of it is read by script tags, so that the pages open from a file path
as well as from a server.
"""

from __future__ import annotations

import base64
import copy
import gzip
import html
import json
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import torch

from spikezoo.checkpoint import Config
from spikezoo.counting import count as count_operations
from spikezoo.data import create_loader
from spikezoo.encoding import ttfs
from spikezoo.evaluate import input_options
from spikezoo.factory import SpikingModel, create_model
from spikezoo.gallery.samples import Sample, samples_of
from spikezoo.gallery.step import StepNet, run_steps, write_step
from spikezoo.observe import firing_rates
from spikezoo.registry import SHIPPED, list_pretrained

__all__ = ["build", "runtime"]

FILES = Path(__file__).parent / "files"
RUNTIME = "1.30.0"  # of onnxruntime-web
IMAGES = 200  # of the test split, for accuracy over time steps
_PARTS = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<link rel="stylesheet" href="gallery.css">
</head>
<body>
<header><a href="index.html">spikezoo gallery</a></header>
<main>
$body
</main>
$scripts
</body>
</html>
""")


class Net(NamedTuple):
    """A net of the gallery: its name, the model, its record, inputs that fit it."""

    name: str
    model: SpikingModel
    record: Mapping[str, Any]
    size: int
    samples: list[Sample]

    @property
    def runs(self) -> bool:
        """Whether its time steps can be taken one by one in a browser."""
        return bool(self.samples) and (self.model.takes_events or self.model.encoding in ("direct", "ttfs"))


def runtime(folder: str | Path | None = None) -> dict[str, bytes]:
    """The files of onnxruntime-web that a page needs.

    Args:
        folder: Where its npm package lies, unpacked; None asks npm for it.

    Returns:
        Name -> content.

    Raises:
        FileNotFoundError: The folder has not these files, or npm did not bring them.
    """
    if folder is not None:
        places = [Path(folder), Path(folder) / "dist", Path(folder) / "package" / "dist"]
        place = next((p for p in places if (p / _PARTS[0]).is_file()), None)
        if place is None:
            raise FileNotFoundError(f"{folder} holds no {_PARTS[0]}: give the folder of npm's package onnxruntime-web.")
        return {name: (place / name).read_bytes() for name in _PARTS}
    with tempfile.TemporaryDirectory() as temporary:
        command = ["npm", "pack", "--silent", f"onnxruntime-web@{RUNTIME}"]
        try:
            subprocess.run(command, cwd=temporary, check=True, capture_output=True, timeout=300)
            with tarfile.open(next(Path(temporary).glob("*.tgz"))) as archive:
                files = [archive.extractfile(f"package/dist/{name}") for name in _PARTS]
                return {name: file.read() for name, file in zip(_PARTS, filter(None, files), strict=True)}
        except (OSError, subprocess.SubprocessError, StopIteration, KeyError) as error:
            raise FileNotFoundError(
                f"npm did not bring onnxruntime-web ({type(error).__name__}): {' '.join(command)} must work. Or give "
                "its package with --runtime FOLDER, or make pages that run nothing with --runtime none."
            ) from error


def _packed(content: bytes) -> str:
    """Bytes as text, a quarter to half as long as they would be: every browser has gzip."""
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def _inputs(net: Net) -> torch.Tensor:
    """The samples as a batch that the model takes."""
    frames = torch.stack([values for _, values in net.samples])
    if net.model.takes_events or net.model.encoding != "direct":
        return frames
    cfg = net.model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (frames - mean) / std


def _bars(title: str, rows: Sequence[tuple[str, float, str]], name: str = "") -> str:
    """Horizontal bars with their numbers, as a table that a screen reader reads."""
    most = max((value for _, value, _ in rows), default=0) or 1
    lines = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td><span class="bar" style="--share:{value / most:.4f}"></span>'
        f"<span>{html.escape(said)}</span></td></tr>"
        for name, value, said in rows
    )
    mark = f' id="{name}"' if name else ""
    return f'<section{mark}><h2>{title}</h2><table class="bars">{lines}</table></section>'


@torch.no_grad()
def _charts(net: Net) -> str:
    """Energy and firing rates by layer, measured on the samples of the page."""
    if not net.samples:
        return ""
    x, model = _inputs(net), net.model
    count = count_operations(model, x, inputs="auto" if model.takes_events else "analog")
    energies = {
        name: 1e-6 * (part.macs_exact * count.mac_pj + part.sops_exact * count.sop_pj)
        for name, part in count.by_module.items()
    }
    rates = firing_rates(model, x)
    energy = [(name, value, f"{value:.3g} \N{MICRO SIGN}J") for name, value in energies.items()]
    steps = [
        (name, float(each.mean()), "  ".join(f"{float(rate):.3f}" for rate in each[:16]))
        for name, each in rates.items()
    ]
    told = f"mean of the {len(net.samples)} samples of this page"
    return _bars(f"Energy by layer <small>{told}</small>", energy) + _bars(
        f"Firing rates by layer <small>at each time step; {told}</small>", steps
    )


@torch.no_grad()
def _logits(model: SpikingModel, x: torch.Tensor, steps: range) -> Iterator[torch.Tensor]:
    """What a model says with each number of time steps; the model is changed."""
    if model.encoding == "ttfs":  # other numbers of steps are other spikes
        for T in steps:
            model.T = T
            yield model(x)
        return
    model.T = steps[-1]  # few steps are the first of many
    sums = model.forward_steps(x).cumsum(0)
    yield from (sums[T - 1] / T for T in steps)


def over_time(net: Net, data_dir: str | None = None, images: int = 200) -> list[dict[str, float]]:
    """Accuracy and energy of a net with each number of time steps that its page offers.

    Args:
        net: The net.
        data_dir: Folder of its data.
        images: How many of the test split, with even classes, the same at every call.

    Returns:
        Rows of T, top1 (per cent) and microjoule (mean of eight images); none where the data are not at hand.
    """
    model, dataset = copy.deepcopy(net.model), net.record["dataset"]
    steps = range(1 if model.encoding == "direct" else 2, (model.T if model.takes_events else max(8, 2 * model.T)) + 1)
    options = input_options(model, dataset) | {"subset": min(images, net.record["samples"]), "batch_size": 50}
    try:
        loader = create_loader(dataset, "test", data_dir=data_dir, download=False, **options)
    except FileNotFoundError:
        return []
    batches = list(loader)
    right = torch.zeros(len(steps))
    for x, labels in batches:
        right += torch.stack([(own.argmax(1) == labels).sum() for own in _logits(model, x, steps)])
    rows = []
    for T, share in zip(steps, 100 * right / sum(len(labels) for _, labels in batches), strict=True):
        model.T = T
        x = batches[0][0][:8, :T] if model.takes_events else batches[0][0][:8]
        count = count_operations(model, x, inputs="auto" if model.takes_events else "analog")
        rows.append({"T": T, "top1": float(share), "microjoule": 1000 * count.energy_exact_mj})
    return rows


def _over_time(net: Net, rows: Sequence[Mapping[str, float]], images: int) -> str:
    """Accuracy over time steps, or why it is not there."""
    if not rows:
        word = "Measured where the test images are at hand: <code>spikezoo gallery --data-dir DATA</code>."
        return f"<section><h2>Accuracy over time steps</h2><p>{word}</p></section>"
    bars = [
        (f"T={row['T']}", row["top1"], f"{row['top1']:.1f} %, {row['microjoule']:.3g} \N{MICRO SIGN}J") for row in rows
    ]
    told = f"of {images} test images, and the energy of one; the net was trained with T={net.model.T}"
    return _bars(f"Accuracy over time steps <small>{told}</small>", bars, "over")


def _facts(net: Net, paper: float | None) -> str:
    record = net.record
    rows = {
        "accuracy": f"{record['top1']:.2f} % of {record['samples']:,} test images of {record['dataset']}",
        "the paper's": "" if paper is None else f"{paper:g} %",
        "time steps": str(record["T"]),
        "parameters": f"{record['param_count']:,}",
        "file": f"{net.size / 1e6:.2f} MB",
        "energy of an image": f"{record['energy_exact_mj']:.3g} mJ, every spike counted; ReLU twin "
        f"{record['energy_ann_mj']:.3g} mJ",
        "training": f"{record['train_minutes']:.1f} minutes, {record['train_machine']}"
        if "train_minutes" in record
        else "",
        "measured": f"{record['date']}, commit {record['commit']}",
    }
    lines = "".join(f"<dt>{key}</dt><dd>{html.escape(value)}</dd>" for key, value in rows.items() if value)
    code = html.escape(f'spikezoo.create_model("{net.name}", pretrained=True)')
    return f"<dl>{lines}</dl><pre><code>{code}</code></pre>"


@torch.no_grad()
def _program(net: Net, quantities: Mapping[str, Any]) -> dict[str, Any]:
    """What the script of a page knows: the network of one step, samples, and what PyTorch says of them."""
    model, step = net.model, StepNet(net.model)
    frames = net.samples[0][1] if model.takes_events else net.samples[0][1][None]
    if model.encoding == "ttfs":
        frames = ttfs(frames, model.T)[0][:, 0]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "net.onnx"
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            shapes = write_step(step, path, frames[:1])
        finally:
            logging.disable(before)
        program = _packed(path.read_bytes())
    x = _inputs(net)
    logits = model(x)
    rest = step.rest([torch.zeros(1) for _ in shapes])
    run_steps(step, frames)  # names the layers in their order
    names = model.pretrained_cfg.get("label_names") or map(str, range(logits.shape[1]))
    return {
        "name": net.name,
        "T": model.T,
        "events": model.takes_events,
        "encoding": model.encoding,
        "input": list(net.samples[0][1].shape),
        "classes": list(names),
        "neurons": step.neurons,
        "shapes": shapes,
        "rest": [float(v) for v in rest],
        "layers": step.layers,
        "samples": [
            {"name": name, "logits": [round(float(v), 6) for v in own]}
            for (name, _), own in zip(net.samples, logits, strict=True)
        ],
        "values": _packed(torch.stack([values for _, values in net.samples]).float().numpy().tobytes()),
        "program": program,
        **quantities,
    }


def _stage(net: Net) -> str:
    """The place where a net runs."""
    draws = net.model.in_chans == 1
    how = "Draw a digit, choose one, or drop an image." if draws else "Choose a picture, or drop one of yours."
    kind, files = "Image", "image/*"
    if net.model.takes_events:
        how = (
            "Choose a recording: digits that move, made here as an event camera would see them. Or drop one of yours: "
            ".npz or .npy with t, x, y, p, .bin of N-MNIST, AEDAT 2.0 of a DVS128; larger ones are scaled to "
            f"{net.model.img_size[0]} x {net.model.img_size[1]} pixels."
        )
        kind, files = "Recording", ".npz,.npy,.bin,.aedat,.aedat2"
    return f"""<section id="stage" aria-label="The net at work" aria-busy="true">
<h2>Run it here</h2>
<p>{how} <span id="state" role="status">Loading ...</span></p>
<div class="stage">
<div><canvas id="input" tabindex="0" aria-label="Input of the net"></canvas>
<div id="samples" role="group" aria-label="Samples"></div>
<div class="row"><button id="clear" type="button">Clear</button>
<label class="button">{kind} <input id="file" type="file" accept="{files}"></label></div></div>
<div><label for="steps">Time steps <output id="shown"></output></label>
<input id="steps" type="range" min="1" step="1">
<table class="bars" id="answer"></table>
<p id="cost"></p></div>
</div>
<div id="spikes" aria-label="Spikes by layer"></div>
</section>"""


def _card(net: Net, paper: float | None, live: bool) -> str:
    record = net.record
    return (
        f'<a class="card" href="{net.name}.html"><h2>{net.name.replace("_", "_<wbr>")}</h2>'
        f"<p>{html.escape(record['dataset'])}, "
        f"T={record['T']}</p><p><strong>{record['top1']:.2f} %</strong>"
        f"{'' if paper is None else f' <small>paper {paper:g} %</small>'}</p><p>{net.size / 1e6:.2f} MB, "
        f"{record['energy_exact_mj']:.3g} mJ</p>{'<p class=live>runs in the browser</p>' if live else ''}</a>"
    )


def _script(name: str, values: object) -> str:
    return f"window.{name} = {json.dumps(values)};\n"


def _still(net: Net, live: bool, parts: Mapping[str, bytes] | None) -> str:
    """Why a net does not run in its page; nothing where it does."""
    if live:
        return ""
    why = "Its file is too large to run here."
    if parts is None:
        why = "No net runs in these pages: they were built without onnxruntime-web (<code>--runtime none</code>)."
    elif net.model.encoding == "poisson":
        why = "It does not run here: its input is spikes drawn at random."
    elif not net.samples:
        why = "It does not run here: no input that comes with the package fits it."
    return f'<p class="note">{why}</p>'


def _write(
    folder: Path,
    net: Net,
    paper: float | None,
    parts: Mapping[str, bytes] | None,
    rows: list[dict[str, float]] | None,
    live: bool,
) -> str:
    """Write the page of a net; returns its card."""
    scripts, model, record = "", net.model, net.record
    images = min(IMAGES, record["samples"])
    if live:
        count = count_operations(model, _inputs(net)[:1], inputs="auto" if model.takes_events else "analog")
        analog = sum(part.macs_exact for part in count.by_module.values())
        added = sum(part.sops_exact for part in count.by_module.values() if part.input.startswith("analog"))
        prices = {"analog_macs": analog, "analog_sops": added, "mac_pj": count.mac_pj, "sop_pj": count.sop_pj}
        content = _program(net, prices | {"ann_mj": record["energy_ann_mj"], "over": rows, "images": images})
        (folder / f"{net.name}.js").write_text(_script("NET", content), encoding="utf-8")
        files = ("runtime.js", f"{net.name}.js", "recordings.js", "gallery.js")
        scripts = "".join(f'<script src="{file}"></script>\n' for file in files)
    over = "" if rows is None else _over_time(net, rows, images)
    body = f"<h1>{net.name.replace('_', '_<wbr>')}</h1>" + (_stage(net) if live else _still(net, live, parts))
    page = _PAGE.substitute(
        title=f"{net.name} - spikezoo", body=body + _facts(net, paper) + over + _charts(net), scripts=scripts
    )
    (folder / f"{net.name}.html").write_text(page, encoding="utf-8")
    return _card(net, paper, live)


def build(
    output: str | Path,
    names: Sequence[str] | None = None,
    *,
    papers: Mapping[str, float] | None = None,
    parts: Mapping[str, bytes] | None = None,
    most_bytes: int = 3_000_000,
    data_dir: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the gallery; where anything fails, the folder is as it was.

    Args:
        output: Folder, made if it is not there; other files in it stay.
        names: Nets with weights; None takes all that come with the package.
        papers: Name -> the paper's accuracy.
        parts: What :func:`runtime` returns; None makes pages that run nothing.
        most_bytes: Nets with larger files do not run in the page.
        data_dir: Folder of the data, for accuracy over time steps; default: SPIKEZOO_DATA, else ./data.
        say: Called with a line about each net.

    Returns:
        The first page.

    Raises:
        ValueError: A net that is not there, an extra that is missing.
    """
    output, papers, cards = Path(output), papers or {}, []
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        folder = Path(temporary)
        for path in FILES.iterdir():
            shutil.copyfile(path, folder / path.name)
        if parts is not None:
            coded = [_packed(parts[name]) for name in _PARTS]
            (folder / "runtime.js").write_text(_script("RUNTIME", coded), encoding="utf-8")
        for name in names if names is not None else [row.name for row in list_pretrained()]:
            model, stored = create_model(name, pretrained=True).eval(), SHIPPED / name
            size = (stored / "model.safetensors").stat().st_size
            net = Net(name, model, Config.read(stored).results, size, samples_of(model))
            small = net.runs and size <= most_bytes
            rows = over_time(net, data_dir, IMAGES) if small else None
            net, live = net if net.runs else net._replace(samples=[]), small and parts is not None
            cards.append(_write(folder, net, papers.get(name), parts, rows, live))
            measured = f", accuracy at T={rows[0]['T']} to {rows[-1]['T']}" if rows else ""
            say(f"{name}: {'runs in the page' if live else 'card'}{measured}")
        word = "" if parts is not None else _still(net, False, None)
        body = f'<h1>Spiking networks that come with spikezoo</h1>{word}<div class="cards">{"".join(cards)}</div>'
        page = _PAGE.substitute(title="spikezoo gallery", body=body, scripts="")
        (folder / "index.html").write_text(page, encoding="utf-8")
        output.mkdir(exist_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "index.html"):  # it leads to the others
            os.replace(path, output / path.name)
    return output / "index.html"
