"""The gallery: one step of a net by hand and as ONNX, the pages, and the pages in a browser where there is one."""

import os
import shutil

import numpy as np
import pytest
import torch

import spikezoo
from spikezoo import cli, gallery
from spikezoo.data import create_loader
from spikezoo.data.events.framing import Framing
from spikezoo.evaluate import input_options
from spikezoo.gallery import pages
from spikezoo.gallery.samples import record, samples_of
from spikezoo.gallery.step import StepNet, run_steps, write_step

DIGITS, EVENTS = "spiking_conv4.digits", "spiking_conv4.nmnist_subset"


def test_steps_one_by_one_are_the_net():
    model = spikezoo.create_model("test_mpbn_resnet", T=3, in_chans=2).eval()
    frames = torch.rand(3, 2, *model.img_size).round()
    step = StepNet(model)
    logits, operations, _ = run_steps(step, frames)
    torch.testing.assert_close(logits, model(frames[None])[0].detach())
    counts, ours = (
        spikezoo.count(model, frames[None]).by_module,
        dict(zip(step.layers, operations.tolist(), strict=True)),
    )
    pooled = ("stages.0.0.conv1.conv", "shortcut.conv", "head.fc")  # what stands behind an average pooling
    same = [name for name in ours if not name.endswith(pooled)]
    assert len(same) == 8 and all(ours[name] == counts[name].sops_exact for name in same)


def test_one_step_as_onnx(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    model = spikezoo.create_model(DIGITS, pretrained=True).eval()
    step, (_, image) = StepNet(model), samples_of(model)[3]
    shapes = write_step(step, tmp_path / "net.onnx", image[None])
    assert (tmp_path / "net.onnx").stat().st_size < 0.4 * 4 * sum(p.numel() for p in model.parameters())
    session, state = ort.InferenceSession(tmp_path / "net.onnx"), [torch.zeros(1, *shape) for shape in shapes]
    state, total = step.rest(state), torch.zeros(10)
    for _ in range(model.T):
        out = session.run(None, {"x": image[None].numpy(), **{f"v{i}": v.numpy() for i, v in enumerate(state)}})
        total, state = total + torch.from_numpy(out[0][0]), [torch.from_numpy(v) for v in out[2 + len(shapes) :]]
    wanted = model(pages._inputs(pages.Net(DIGITS, model, {}, 0, [("3", image)])))[0].detach()
    torch.testing.assert_close(total / model.T, wanted, rtol=1e-4, atol=1e-4)
    assert int(wanted.argmax()) == 3


def test_recordings_have_as_many_events_in_every_frame():
    image = torch.zeros(1, 20, 20)
    image[:, 5:15, 8:12] = 1
    frames = record(image, 4)
    assert frames.shape == (4, 2, 20, 20) and frames.sum() > 100
    per_frame = frames.sum((1, 2, 3))
    assert per_frame.max() - per_frame.min() <= 0.2 * per_frame.mean() and (frames.sum((0, 2, 3)) > 0).all()


def test_pages(tmp_path, capsys, monkeypatch):
    names = [DIGITS, "spiking_mlp_340.mnist"]
    assert cli.main(["gallery", *names, "--runtime", "none", "--output", str(tmp_path / "plain")]) == 0
    index = (tmp_path / "plain" / "index.html").read_text()
    assert all(f'href="{name}.html"' in index for name in names) and "runs in the browser" not in index
    page = (tmp_path / "plain" / f"{DIGITS}.html").read_text()
    assert "98.33 % of 360 test images" in page and "<script" not in page and "stem.0.conv" in page
    assert "--runtime none" in index and "--runtime none" in page and ">T=8<" in page
    assert "--data-dir DATA" in (tmp_path / "plain" / "spiking_mlp_340.mnist.html").read_text()
    monkeypatch.setattr(pages, "list_pretrained", lambda: spikezoo.list_pretrained("spiking_mlp_340"))
    gallery.build(tmp_path / "all")
    assert {path.stem for path in (tmp_path / "all").glob("*.html")} == {
        "index", "spiking_mlp_340.mnist", "spiking_mlp_340.mnist_dynsnn"
    }  # fmt: skip
    with pytest.raises(FileNotFoundError, match="onnxruntime-web"):
        pages.runtime(tmp_path)
    assert cli.main(["gallery", "spiking_conv4.nothing", "--runtime", "none", "--output", str(tmp_path / "x")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_accuracy_over_time_steps():
    model = spikezoo.create_model(DIGITS, pretrained=True).eval()
    net = pages.Net(DIGITS, model, {"dataset": "digits", "samples": 360}, 0, samples_of(model))
    rows = pages.over_time(net, images=40)
    assert [row["T"] for row in rows] == list(range(1, 9)) and model.T == 2
    loader = create_loader("digits", "test", subset=40, batch_size=40, **input_options(model, "digits"))
    ((images, labels),) = loader
    for T in (1, 4):
        with torch.no_grad():
            model.T = T
            assert rows[T - 1]["top1"] == pytest.approx(100 * float((model(images).argmax(1) == labels).float().mean()))
            wanted = spikezoo.count(model, images[:8]).energy_exact_mj
        assert rows[T - 1]["microjoule"] == pytest.approx(1000 * wanted)
    record = {"dataset": "mnist", "samples": 10}
    assert pages.over_time(net._replace(record=record), data_dir="nowhere") == []


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    gallery.build(tmp_path / "pages", [DIGITS])
    (tmp_path / "pages" / "mine.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "pages").iterdir()}
    monkeypatch.setattr(pages, "FILES", tmp_path / "nothing")
    for place in ("pages", "new"):
        with pytest.raises(FileNotFoundError):
            gallery.build(tmp_path / place, [DIGITS])
    with pytest.raises(ValueError, match="nothing"):
        monkeypatch.undo()
        gallery.build(tmp_path / "new", [DIGITS, "spiking_conv4.nothing"])
    assert [path.name for path in tmp_path.iterdir()] == ["pages"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "pages").iterdir()} == before


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The pages of three nets that run, with the runtime that SPIKEZOO_ONNXRUNTIME_WEB names."""
    pytest.importorskip("onnxscript", reason="pip install 'spikezoo-snn[export]'")
    folder = os.environ.get("SPIKEZOO_ONNXRUNTIME_WEB")
    if not folder:
        pytest.skip("SPIKEZOO_ONNXRUNTIME_WEB names no folder: npm pack onnxruntime-web, and unpack it")
    path = tmp_path_factory.mktemp("gallery")
    gallery.build(path, [DIGITS, "spiking_mlp_340.mnist", EVENTS], parts=pages.runtime(folder))
    assert (path / "runtime.js").stat().st_size < 6_000_000
    return path


@pytest.fixture(scope="module")
def browser():
    """A Chromium without a window."""
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    where = shutil.which("chromium") or shutil.which("google-chrome")
    if where is None:
        pytest.skip("no chromium on the path")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=where, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(built, browser):
    """Opens the page of a net from its file and waits until it has run; every error of the console is one here."""
    opened, said = [], []

    def open_page(name, **options):
        tab = browser.new_page(**options)
        opened.append(tab)
        tab.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(f"file://{built}/{name}.html")
        tab.wait_for_selector('#stage[aria-busy="false"]', timeout=60_000)
        return tab

    yield open_page
    for tab in opened:
        tab.close()
    assert not said


def test_the_page_computes_what_pytorch_does(page):
    tab = page(DIGITS)
    for index in (0, 7):
        ours = tab.evaluate(f"gallery.logitsOf({index})")
        assert ours == pytest.approx(tab.evaluate(f"NET.samples[{index}].logits"), abs=1e-4)
    tab.click("#samples button:nth-child(5)")
    tab.wait_for_function("document.getElementById('state').textContent === 'It says: 4.'")
    assert tab.locator("#spikes figure").count() == 6 and tab.locator("#spikes canvas").count() == 12
    cost = tab.inner_text("#cost")
    tab.evaluate("steps.value = 8, steps.dispatchEvent(new Event('input'))")
    tab.wait_for_function("document.getElementById('cost').textContent.startsWith('After 8')")
    assert "Of 200 test images" in tab.inner_text("#cost") and tab.inner_text("#over .best").startswith("T=8")
    assert tab.inner_text("#cost") != cost


@pytest.mark.parametrize(("scale", "left", "top"), [(1, 0.5, 0.2), (0.5, 0.2, 0.1)])
def test_a_drawn_digit_is_recognised(page, scale, left, top):
    tab = page("spiking_mlp_340.mnist")
    box = tab.locator("#input").bounding_box()
    tab.mouse.move(box["x"] + left * box["width"], box["y"] + top * box["height"])
    tab.mouse.down()
    for part in range(21):
        tab.mouse.move(box["x"] + left * box["width"], box["y"] + (top + scale * 0.03 * part) * box["height"])
    tab.mouse.up()
    tab.wait_for_function("document.getElementById('state').textContent === 'It says: 1.'", timeout=10_000)


def test_narrow_dark_and_by_keyboard(page):
    tab = page("spiking_mlp_340.mnist", viewport={"width": 340, "height": 700}, color_scheme="dark")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    tab.focus("#samples button:nth-child(3)")
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.getElementById('samples').children[2].getAttribute('aria-pressed') === 'true'")
    tab.focus("#input")
    for key in ["ArrowUp"] * 7 + ["ArrowDown"] * 14:
        tab.keyboard.press(key)
    assert tab.evaluate("document.activeElement.id") == "input" and tab.inner_text("#state").startswith("It says")


def _recording(kind, path):
    """Writes 801 events of a sensor of 34 x 34, or 128 x 128 of AEDAT."""
    draw = np.random.default_rng(0)
    side = 128 if kind == "aedat" else 34
    t, x, y, p = np.sort(draw.integers(0, 60_000, 801)), *draw.integers(0, side, (2, 801)), draw.integers(0, 2, 801)
    if kind == "bin":
        t = np.sort(t % 8192)
        path.write_bytes(np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], 1).astype(np.uint8).tobytes())
    elif kind == "npz":
        np.savez_compressed(path, t=t, x=x.astype(np.int16), y=y, p=p.astype(bool))
    elif kind == "npy":
        rows = np.zeros(801, [("ts", ">u4"), ("x", "<i2"), ("y", "u1"), ("p", "?")])
        rows["ts"], rows["x"], rows["y"], rows["p"] = t, x, y, p
        np.save(path, rows)
    else:
        words = np.stack([(127 - x) << 8 | (127 - y) << 1 | 1 - p, t], 1).astype(">u4")
        path.write_bytes(b"#!AER-DAT2.0\r\n# a DVS128\r\n" + words.tobytes())


@pytest.mark.parametrize("kind", ["bin", "npz", "npy", "aedat"])
def test_recordings_of_ones_own(page, tmp_path, kind):
    path = tmp_path / f"mine.{kind}"
    _recording(kind, path)
    side = 128 if kind == "aedat" else 34
    wanted = torch.from_numpy(Framing(8, "number", 0, (side, side)).integrate(path).astype(np.float32))
    if side == 128:
        row = torch.arange(128) * 34 // 128
        wanted = torch.zeros(8, 2, 34, 128).index_add_(2, row, wanted)
        wanted = torch.zeros(8, 2, 34, 34).index_add_(3, row, wanted)
    tab = page(EVENTS)
    tab.set_input_files("#file", path)
    tab.wait_for_function("document.getElementById('state').textContent.includes('801 events')")
    assert ("scaled from 128 x 128" in tab.inner_text("#state")) == (side == 128)
    assert tab.evaluate("gallery.values()") == wanted.flatten().tolist()
    if kind == "npz":
        (tmp_path / "bad.npz").write_bytes(path.read_bytes()[:-40])
        tab.set_input_files("#file", tmp_path / "bad.npz")
        tab.wait_for_function("document.getElementById('state').textContent.includes('truncated')")
