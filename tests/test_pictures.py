"""Pictures: what is greyed out, which maps are drawn, the two commands, bad input."""

import math
import sys

import pytest
import torch
from test_models import image_for, make
from test_spikformer import create
from torch import nn

import spikezoo
from spikezoo import pictures
from spikezoo.cli import main
from spikezoo.cli.landscape import loss_along
from spikezoo.neurons import LIF, MembraneNorm, NeuronConfig

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """The arrays that were drawn, in order."""
    from matplotlib.axes import Axes

    found, imshow = [], Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, x, **kw: found.append((x, kw)) or imshow(self, x, **kw))
    return found


def test_pixels():
    pixels = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    images = (pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    found = pictures.to_pixels(images, mean.tolist(), std.tolist())
    torch.testing.assert_close(found, pixels.permute(0, 2, 3, 1))
    assert pictures.to_pixels(torch.full((1, 1, 2, 2), 9.0), (0.5,), (1.0,)).tolist() == [[[[1.0] * 3] * 2] * 2]
    with pytest.raises(ValueError, match="1 or 3 channels"):
        pictures.to_pixels(torch.zeros(1, 2, 4, 4), (0, 0), (1, 1))


@pytest.mark.parametrize("images", [1, 9])
def test_removed_patches_are_grey(images, drawn, tmp_path):
    pixels, mask = torch.rand(images, 8, 4, 3), torch.rand(images, 4, 2) < 0.5
    mask[0] = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    path = tmp_path / "new" / "patches.png"
    pictures.draw_patches(pixels, mask, path, "title")
    assert path.read_bytes()[:4] == b"\x89PNG" and [p.name for p in path.parent.iterdir()] == ["patches.png"]
    shown = [torch.as_tensor(array) for array, _ in drawn]
    assert len(shown) == 2 * images
    for index in range(images):
        whole, rest = shown[2 * index : 2 * index + 2]
        assert torch.equal(whole, pixels[index])
        for row in range(8):
            for column in range(4):
                pixel = rest[row, column]
                if mask[index, row // 2, column // 2]:
                    assert torch.equal(pixel, pixels[index, row, column])
                else:
                    assert pixel.unique().numel() == 1 and 0.5 < pixel[0] < 0.85


@torch.no_grad()
def test_activation_maps():
    model = make("test_spikformer", T=3)
    image = image_for(model)[0]
    seen = []
    handle = model.stages[0][0].register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    layer, maps = pictures.activation_maps(model, image, "stages.0")
    handle.remove()
    assert layer == "stages.0.0" and model.training and torch.equal(maps, seen[0][:, 0].mean(0))
    assert maps.shape == (16, 8, 8) and maps.std() > 0
    # The middle of 5 neurons of the stem and 7 a block.
    layer, maps = pictures.activation_maps(model, image)
    names = [name for name, m in model.named_modules() if isinstance(m, spikezoo.neurons.SpikingNeuron)]
    assert layer == names[26 // 2] and maps.shape[1:] == (8, 8)
    # Vectors have no map: the neurons of the linear layers do not count.
    vgg = make("test_spiking_vgg", neuron="sign")
    layer, maps = pictures.activation_maps(vgg, image_for(vgg)[0])
    assert min(maps.shape[1:]) > 1 and {-1.0, 1.0} >= set(maps.unique().tolist())


@pytest.mark.parametrize(
    ("layer", "message"),
    [("stages.0.0.mpl", "stages.0.0.mlp"), ("head.fc", "expected a map"), ("head", r"\(1, 10\): expected a map")],
)
def test_layers_without_a_map(layer, message):
    model = make("test_spikformer")
    with pytest.raises(ValueError, match=message):
        pictures.activation_maps(model, image_for(model)[0], layer)


def test_maps_of_selected_patches_are_no_maps():
    model = make("test_spikformer", multisp={})
    with pytest.raises(ValueError, match=r"expected a map.*'stem\."):
        pictures.activation_maps(model, image_for(model)[0], "stages.0")
    assert pictures.activation_maps(model, image_for(model)[0])[0].startswith("stem.")


def test_commands(tmp_path, capsys, drawn):
    folders = []
    for index, kwargs in enumerate(({"neuron": "relu"}, {"neuron": "sign"}, {"multisp": {"patch_ratio": 0.5}})):
        model = make("test_spikformer", in_chans=1, img_size=8, **kwargs)
        folders.append(str(tmp_path / str(index)))
        spikezoo.save_checkpoint(model, folders[-1], {"dataset": "digits"})
    path = tmp_path / "patches.png"
    assert main(["patches", "--checkpoint", folders[2], "--images", "3", "--plot", str(path)]) == 0
    assert "keeps 2 of 4 patches" in capsys.readouterr().out and len(drawn) == 6 and path.is_file()
    assert main(["patches", "--checkpoint", folders[0], "--images", "3", "--plot", str(path)]) == 0
    assert "keeps 3 of 4 patches" in capsys.readouterr().out
    words = ["patches", "test_autost", "--dataset", "digits", "--patch-ratio", "0.75", "--plot", str(path)]
    assert main(words) == 0  # untrained, so silent: it says so
    assert "keeps 1 of 4 patches" in (said := capsys.readouterr().out) and "not trained" in said
    drawn.clear()
    path = tmp_path / "maps.svg"
    words = ["activations", "--checkpoint", *folders, "--channels", "2", "--image", "7", "--plot", str(path)]
    assert main([*words, "--layer", "stem.4"]) == 0
    text = path.read_text()
    assert len(drawn) == 1 + 3 * 3 and text.startswith("<?xml")
    scales = [(kw["cmap"], kw["vmin"] < 0) for _, kw in drawn[1:]]
    assert scales == [("RdBu_r", True)] * 9 and len({kw["vmax"] for _, kw in drawn[1:]}) == 1  # one for all
    assert [array.shape for array, _ in drawn] == [(8, 8, 3)] + [(4, 4)] * 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["patches", "test_spikformer", "--plot", "p.gif"], "ends in .png"),
        (["patches", "--plot", "p.png"], "Which model"),
        (["patches", "test_spiking_vgg", "--dataset", "digits", "--plot", "p.png"], "spikformer_tiny"),
        (["patches", "test_spikformer", "--dataset", "digits", "--patch-ratio", "1", "--plot", "p.png"], "[0, 1)"),
        (["patches", "test_spikformer", "--dataset", "digits", "--images", "0", "--plot", "p.png"], "--images 0"),
        (["activations", "--checkpoint", "nowhere", "--plot", "p.png"], "No checkpoint at nowhere"),
        (["activations", "--checkpoint", "nowhere", "--image", "-1", "--plot", "p.png"], "image=-1"),
    ],
)
def test_bad_commands(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_image_beyond_the_split(tmp_path, capsys):
    spikezoo.save_checkpoint(create(in_chans=1, img_size=8), tmp_path / "c", {"dataset": "digits"})
    words = ["activations", "--checkpoint", str(tmp_path / "c"), "--image", "360", "--plot", str(tmp_path / "p.png")]
    assert main(words) == 2
    assert "images 0 to 359" in capsys.readouterr().err


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'spikezoo-snn\[plot\]'"):
        pictures.check_picture(tmp_path / "p.png")


@pytest.fixture
def bars(monkeypatch):
    """The horizontal bars that were drawn: lengths of each call."""
    from matplotlib.axes import Axes

    found, barh = [], Axes.barh
    monkeypatch.setattr(
        Axes, "barh", lambda self, y, width, *a, **kw: found.append(list(width)) or barh(self, y, width, *a, **kw)
    )
    return found


def test_bars_of_operations_and_energy(bars, tmp_path):
    layers = [
        torch.nn.Conv2d(1, 8, 3),
        torch.nn.Flatten(),
        *(torch.nn.Linear(*n) for n in ((288, 100), (100, 1), (1, 1))),
    ]
    net = torch.nn.Sequential(*layers)
    pictures.draw_operations(spikezoo.count(net, torch.randn(1, 1, 8, 8)), tmp_path / "bars.png", "long words " * 30)
    macs = [9 * 8 * 36, 28800, 100 + 1]  # the last two are below 0.5 % of the longest and one bar
    nothing = [0, 0, 0]
    assert bars[:3] == [nothing, nothing, macs]
    for found in bars[3:]:
        assert found == pytest.approx([4.6e-12 * number for number in macs])
    with pytest.raises(ValueError, match="nothing to draw"):
        pictures.draw_operations(spikezoo.count(torch.nn.ReLU(), torch.randn(1, 1)), tmp_path / "bars.png")


def test_one_step_has_an_image_and_an_answer_and_no_raster(bars, drawn, tmp_path):
    model = make("test_spiking_vgg", T=1)
    image = image_for(model)[0]
    layer, spikes, rates = pictures.spikes_over_time(model, image)
    answer = pictures.answer_of(model, image)
    expected = 100 * model.eval()(image[None])[0].softmax(0)
    assert list(answer) == [f"class {i}" for i in range(10)]
    assert list(answer.values()) == pytest.approx(expected.tolist())
    pixels = torch.rand(32, 32, 3)
    pictures.draw_raster(layer, spikes, rates, tmp_path / "step.png", pixels=pixels, answer=answer)
    assert [array.shape for array, _ in drawn] == [(32, 32, 3)]
    assert bars == [sorted(answer.values(), reverse=True)[:5], [rate[0] for rate in rates.values()]]
    drawn.clear()
    pictures.draw_raster(layer, spikes.expand(3, -1), {layer: [0.1] * 3}, tmp_path / "steps.png", neurons=7)
    assert [array.shape for array, _ in drawn] == [(7, 3)]


def test_energies_side_by_side(bars, tmp_path):
    rows = [{"model": "a", "T": 1, "energy_exact_mj": "1", "energy_paper_mj": "2", "energy_ann_mj": "30"}] * 2
    pictures.draw_energies(rows, tmp_path / "energies.svg")
    assert bars == [[1, 1], [2, 2], [30, 30]]


def test_curves_of_runs(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(pictures, "draw_measure", lambda *given: drawn.append(given))
    for name, last in (("a", 50.0), ("b", 60.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.csv").write_text(f"epoch,eval_top1,eval_late\n1,40.0,\n2,{last},7\n")
    runs, picture = [str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "curves.png")
    assert main(["curves", *runs, "--plot", picture]) == 0
    assert drawn[0][:3] == ({"a": {1: [40], 2: [50]}, "b": {1: [40], 2: [60]}}, "epoch", "eval_top1")
    assert main(["curves", *runs, "--plot", picture, "--measure", "eval_late"]) == 0
    assert drawn[1][0]["a"] == {2: [7]}
    capsys.readouterr()
    assert main(["curves", *runs, "--plot", picture, "--measure", "eval_top"]) == 2
    assert "Did you mean 'eval_top1'" in capsys.readouterr().err
    assert main(["curves", str(tmp_path), "--plot", picture]) == 2 and "no folder of a run" in capsys.readouterr().err


def test_landscape(tmp_path, capsys, monkeypatch):
    model = spikezoo.create_model("test_spiking_vgg", T=1, in_chans=1, img_size=8)
    spikezoo.save_checkpoint(model, tmp_path / "net", {"dataset": "digits"})
    argv = ["landscape", str(tmp_path / "net"), "--images", "40", "--points", "3", "--plot", str(tmp_path / "x.png")]
    assert main(argv) == 0 and (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    alone = capsys.readouterr().out
    assert "mean over the line" in alone and "directions" not in alone
    # Of two directions the first is the one of a single one, and the picture has both at every place.
    drawn = []
    monkeypatch.setattr(pictures, "draw_measure", lambda curves, *_: drawn.append(curves["net"]))
    assert main(argv) == main([*argv, "--directions", "2"]) == 0 and "over 2 directions" in capsys.readouterr().out
    one, two = drawn
    assert {place: losses[:1] for place, losses in two.items()} == one
    assert two[0][0] == two[0][1] and two[1][0] != two[1][1]
    for bad in ("2", "1"):
        assert main([*argv, "--points", bad]) == 2 and "an odd number from 3" in capsys.readouterr().err


def test_potentials_before_and_after_a_membrane_norm(tmp_path, capsys):
    # A current of 3 at both of two steps, decay 0.5: 3, then 1.5 + 3, since (3 - 1) / 2 is below the threshold of 2.
    net = nn.Sequential(LIF(NeuronConfig(decay=0.5, tau=None, threshold=2.0), MembraneNorm("channel", 1)))
    net[0].norm.running_mean.fill_(1.0)
    net[0].norm.running_var.fill_(4.0 - net[0].norm.eps)
    layer, charged, compared, threshold = pictures.potentials(net, torch.full((2, 1, 1, 1, 1), 3.0))
    assert (layer, threshold) == ("0", 2.0)
    assert [u.tolist() for u in charged] == [[3.0], [4.5]]
    assert [u.tolist() for u in compared] == [[1.0], [1.75]]
    net[0].norm = None
    _, charged, compared, _ = pictures.potentials(net, torch.full((2, 1, 1, 1, 1), 0.1))
    assert all(torch.equal(*both) for both in zip(charged, compared, strict=True))  # and not rounded otherwise
    model = spikezoo.create_model("test_spiking_vgg", in_chans=1, img_size=8)
    spikezoo.save_checkpoint(model, tmp_path / "net", {"dataset": "digits"})
    argv = ["activations", "--checkpoint", str(tmp_path / "net"), "--plot", str(tmp_path / "x.png"), "--potentials"]
    assert main([*argv, "4"]) == 0 and (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out.count(", step ") == model.T
    assert main([*argv, "0"]) == 2 and "--potentials 0: expected an integer >= 1" in capsys.readouterr().err


def test_loss_along_a_direction():
    # One filter of weight 3: the direction has its size, so that a step of one takes it to 0 or to 6.
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[3.0], [0.0]]))
        net[1].bias.zero_()
    batch = [(torch.ones(1, 1), torch.tensor([0]))]
    low, own, high = sorted(loss_along(net, batch, [-1.0, 0.0, 1.0]))
    for loss, logit in ((low, 6.0), (own, 3.0), (high, 0.0)):
        assert loss == pytest.approx(math.log(1 + math.exp(-logit)), rel=1e-4)
    assert net[1].weight.flatten().tolist() == [3, 0]


def test_curves_show_what_there_is(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    made, write = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: made.append(self) or write(self, *a, **kw))
    rows = [{"epoch": str(e), "train_loss": "2", "eval_loss": "", "eval_top1": "99.9", "lr": ""} for e in range(3)]
    pictures.draw_training(rows, tmp_path / "curves.png")
    loss, accuracy = made[0].axes  # no empty panels
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 2, 3]] and loss.get_ylabel() == "loss"
    assert accuracy.get_ylim()[1] <= 100
    assert all(tick == int(tick) for axis in made[0].axes for tick in axis.get_xticks())
    pictures.draw_training([], tmp_path / "none.png")
    pictures.draw_layer_rates({"one": [0.1, 0.2], "two": [0.5, 0.0]}, tmp_path / "rates.png")
    labels = made[2].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["one", "two (dead)"] and labels[1].get_color() == "C3"
    pictures.draw_measure({"a": {None: [1, 3], 2: [4, 6], 1: [5]}}, "T", "top1", tmp_path / "measure.png")
    level, line = made[3].axes[0].lines[:2]
    assert list(level.get_ydata()) == [2, 2] and (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [5, 5])
