"""Conversion: SpikingJelly's converter step by step, units in the weights, error over time, storage, bad input."""

import copy
import csv

import pytest
import torch
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.ann2snn import Converter, RateCodingRecipe
from torch import nn

import spikezoo
from spikezoo.checkpoint import read_config
from spikezoo.cli import main
from spikezoo.data import create_loader
from spikezoo.evaluate import accuracy_over_time, evaluate, input_options
from spikezoo.layers import LinearNormNeuron
from spikezoo.neurons import IF, QCFS, NeuronConfig, ReLU, SpikingNeuron
from spikezoo.transforms import replay

# Families without max-pool: norms and none, residual blocks of both shortcuts, flattened maps, linear layers.
PLAIN = ("test_mpbn_vgg", {"hidden": (16,)})
NETS = [PLAIN, ("test_mpbn_vgg", {}), ("test_mpbn_resnet", {}), ("test_spiking_resnet", {}), ("test_rmp_resnet", {})]
NETS += [("test_spiking_mlp", {}), ("spiking_lenet", {})]


# Neurons that an identity shortcut joins.
SHARED = {
    "test_mpbn_resnet": ("stem.2.neuron", "stages.0.0.neuron"),
    "test_spiking_resnet": ("stem.0.neuron", "stages.0.0.neuron"),
    "test_rmp_resnet": ("stem.2.neuron", "stages.0.0.neuron"),
}


def settled(name, **arguments):
    """A ReLU twin whose norms know some images, with scales and shifts of their own, in double precision."""
    ann = spikezoo.create_model(name, neuron="relu", **arguments).double()
    for module in ann.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
    with torch.no_grad():
        ann(images(ann, 64))
        for parameter in ann.head.parameters():
            nn.init.normal_(parameter)
    return ann.eval()


def images(model, count, seed=0):
    noise = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    return torch.rand(count, model.in_chans, *model.img_size, generator=noise, dtype=like.dtype)


def sequential(ann):
    """The same VGG of torch's own modules, as SpikingJelly's converter takes it."""
    layers = []
    for block in [*ann.stem, *(block for stage in ann.stages for block in stage), *ann.neck]:
        if isinstance(block, LinearNormNeuron):
            layers += [nn.Flatten(), block.linear, block.norm, nn.ReLU()]
        elif hasattr(block, "conv"):
            layers += [block.conv, block.norm, nn.ReLU()]
        else:
            layers.append(block.pool)
    if not ann.neck:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, ann.head.fc)


@pytest.mark.parametrize("mode", ["max", "97.5%", 0.6])
@pytest.mark.parametrize("net", [PLAIN, ("test_mpbn_vgg", {})], ids=["hidden", "pooled"])
def test_spikingjellys_converter(net, mode):
    ann = settled(net[0], img_size=16, **net[1])
    batches = [(images(ann, size, seed), None) for seed, size in enumerate((12, 9, 5))]
    x = images(ann, 6, seed=9)
    oracle = Converter(RateCodingRecipe(batches, mode=mode)).convert(sequential(copy.deepcopy(ann)))
    functional.reset_net(oracle)
    snn = spikezoo.convert(ann, batches, T=32, mode=mode)
    with torch.no_grad():
        wanted = torch.stack([oracle(x) for _ in range(32)])
        found = snn.forward_steps(x)
    assert wanted.std(0).mean() > 0.1  # spikes come and go
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(snn(x), wanted.mean(0), rtol=0, atol=1e-5)


def every_activation(model, x):
    """Output of every neuron or ReLU, by name."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, ReLU | QCFS | SpikingNeuron):
            handles.append(module.register_forward_hook(lambda _m, _x, out, name=name: found.update({name: out})))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("name", "arguments"), NETS)
def test_units_change_nothing_but_units(name, arguments, half):
    ann = settled(name, **arguments)
    x = images(ann, 16)
    snn = spikezoo.convert(ann, [x], T=2, half_threshold=half)
    assert (snn.neuron_config.kind, snn.neuron_config.reset, snn.neuron_config.threshold) == ("if", "soft", 1.0)
    # ReLUs in place of the spiking neurons: the same logits, and activations that are rates.
    twin = replay(spikezoo.create_model(name, neuron="relu", **arguments), snn.recipe).double().eval()
    twin.load_state_dict(snn.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(twin(x), ann(x))
    before, after = every_activation(ann, x), every_activation(twin, x)
    units = {key: (before[key].max() / after[key].max()).item() for key in before}
    shared = SHARED.get(name, ())
    for key, unit in units.items():
        torch.testing.assert_close(after[key] * unit, before[key])
        assert after[key].max() <= 1 + 1e-12 and (key in shared or after[key].max() > 1 - 1e-12)
    if shared:
        assert units[shared[0]] == pytest.approx(units[shared[1]])
        assert max(after[key].max() for key in shared) == pytest.approx(1)


@pytest.mark.parametrize(("name", "arguments"), NETS[1:3])
@torch.no_grad()
def test_rates_approach_activations(name, arguments):
    ann = settled(name, img_size=16, **arguments)
    x = images(ann, 4)
    errors = {}
    for half in (False, True):
        steps = spikezoo.convert(ann, x, T=512, half_threshold=half).forward_steps(x)
        for T in (32, 128, 512):
            errors[T, half] = (steps[:T].mean(0) - ann(x)).abs().mean().item()
        # Four times the steps leave a quarter of the error.
        assert errors[128, half] < errors[32, half] / 2.5 and errors[512, half] < errors[128, half] / 2.5
    assert all(errors[T, True] < 0.9 * errors[T, False] for T in (32, 128))
    assert errors[512, True] < 0.7 * errors[512, False]


def test_a_line_of_shortcuts_has_one_unit():
    ann = settled("test_mpbn_resnet", depths=(3, 1, 1))
    x = images(ann, 16)
    line = ["stem.2.neuron", *(f"stages.0.{index}.neuron" for index in range(3))]
    active = every_activation(ann, x)
    largest = max(active[name].max().item() for name in line)
    snn, folded = spikezoo.convert(ann, x, T=2), spikezoo.fold_bn(ann)
    # Between neurons of one unit the weights stay, into it and out of it they are scaled.
    inner, last = active["stages.0.2.conv1.neuron"].max(), active["stages.2.0.neuron"].max()
    for name, factor in (
        ("stages.0.2.conv1.conv", largest / inner),
        ("stages.0.2.conv2.conv", inner / largest),
        ("stages.1.0.shortcut.conv", largest / active["stages.1.0.neuron"].max()),
        ("head.fc", last),
    ):
        old, new = folded.get_submodule(name), snn.get_submodule(name)
        torch.testing.assert_close(new.weight, old.weight * factor)
    torch.testing.assert_close(snn.stages[0][2].conv2.conv.bias, folded.stages[0][2].conv2.conv.bias / largest)
    torch.testing.assert_close(snn.head.fc.bias, ann.head.fc.bias)


def test_the_network_stays_as_it_is():
    ann = settled("test_mpbn_resnet").train()
    before = copy.deepcopy(ann.state_dict())
    x = images(ann, 70)
    snn = spikezoo.convert(ann, x, T=3)
    assert all(torch.equal(value, before[key]) for key, value in ann.state_dict().items())
    assert ann.training and not snn.training and snn.T == 3
    assert not any(module._forward_hooks for net in (ann, snn) for module in net.modules())
    # One tensor is measured in pieces, and labels are passed over.
    again = spikezoo.convert(ann, [(x[:64], None), [x[64:]]], T=3)
    assert all(torch.equal(value, snn.state_dict()[key]) for key, value in again.state_dict().items())
    assert torch.equal(snn(x), snn(x))


def test_norms_that_were_folded_before_and_tickets_that_were_baked():
    ann = settled("test_mpbn_resnet")
    x = images(ann, 8)
    folded = spikezoo.convert(spikezoo.fold_bn(ann), x, T=8)
    assert [name for name, _ in folded.recipe] == ["fold_bn"]
    torch.testing.assert_close(folded(x), spikezoo.convert(ann, x, T=8)(x))
    ticket = spikezoo.apply(ann, "ticket", kind="lt", sparsity=0.3)
    with pytest.raises(ValueError, match=r"'stem\.0\.conv'.*bake it first"):
        spikezoo.convert(ticket, x, T=8)
    baked = spikezoo.bake(ticket)
    snn = spikezoo.convert(baked, x, T=8)
    assert [name for name, _ in snn.recipe] == ["fold_bn"]
    assert torch.equal(snn.stem[1].conv.weight == 0, baked.stem[1].conv.weight == 0)


# --------------------------------------------------------------------------------------------------------------
# Quantised twins
# --------------------------------------------------------------------------------------------------------------


def test_a_quantised_activation_by_hand():
    # Steps of half at a threshold of 2: a value and its halfway points, beyond the clip, gradients of both.
    x = torch.tensor([-0.3, 0.1, 0.24, 0.25, 0.9, 1.26, 1.74, 1.76, 2.5], requires_grad=True)
    neuron = QCFS(2.0, 4)
    out = neuron(x)
    assert out.tolist() == [0, 0, 0, 0.5, 1, 1.5, 1.5, 2, 2]
    out.sum().backward()
    # The floor is passed as the identity: 1 within (0, threshold), 0 outside.
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0]
    # Of the threshold: out / threshold - x / threshold within, 1 above, 0 below.
    inside = sum(o - i for o, i in zip(out.tolist()[1:8], x.tolist()[1:8], strict=True)) / 2
    assert neuron.threshold.grad.item() == pytest.approx(inside + 1)
    neuron.mask = torch.tensor([True, False])
    assert neuron(torch.full((1, 1, 2), 1.1)).tolist() == [[[1, 0]]]


@pytest.mark.parametrize("levels", [1, 4, 7])
def test_a_neuron_in_as_many_steps(levels):
    # Soft reset from half the threshold: floor(levels x + 1/2) spikes of a constant current, none below, all above.
    current = torch.linspace(-1, 2, 301, dtype=torch.float64) + 1e-4
    spiking = IF(NeuronConfig("if", reset="soft", v_init=0.5))
    rate = spiking(current.expand(levels, 1, -1)).mean(0)[0]
    with torch.no_grad():
        torch.testing.assert_close(rate, QCFS(1.0, levels).double()(current), rtol=0, atol=1e-12)


def quantised(name, **arguments):
    """A QCFS twin with norms of its own and a threshold of its own a layer."""
    ann = spikezoo.create_model(name, neuron="qcfs", **arguments).double()
    for index, module in enumerate(m for m in ann.modules() if isinstance(m, QCFS)):
        with torch.no_grad():
            module.threshold.fill_(1.2 + 0.3 * (index % 3))
    for module in ann.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        ann(images(ann, 32))
        nn.init.normal_(ann.head.fc.weight)
    return ann.eval()


@torch.no_grad()
def test_one_hidden_layer_converts_in_every_bit():
    ann = quantised("test_spiking_mlp", hidden=[16], img_size=8, qcfs_levels=5)
    x = images(ann, 40)
    snn = spikezoo.convert(ann)
    assert snn.T == 5 and (snn.neuron_config.v_init, snn.neuron_config.reset) == (0.5, "soft")
    torch.testing.assert_close(snn(x), ann(x), rtol=0, atol=1e-12)
    assert ann(x).std(0).min() > 0.1
    # In other numbers of steps the activations are finer or coarser.
    assert spikezoo.convert(ann, T=3).T == 3 and (spikezoo.convert(ann, T=3)(x) - ann(x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["test_mpbn_vgg", "spiking_lenet"])
@torch.no_grad()
def test_quantised_twins(name, tmp_path):
    ann = quantised(name, img_size=16, qcfs_levels=4)
    x = images(ann, 8)
    snn = spikezoo.convert(ann)
    # First layers see a constant current: their rates are the activations in units of the threshold.
    first, rates = every_activation(ann, x)["stem.0.neuron"], every_activation(snn, x)["stem.0.neuron"]
    torch.testing.assert_close(rates.mean(0), first[0] / ann.stem[0].neuron.threshold, rtol=0, atol=1e-12)
    assert len(rates.mean(0).unique()) == 5
    error = {T: (spikezoo.convert(ann, T=T)(x) - ann(x)).abs().mean() / ann(x).std() for T in (4, 64)}
    assert error[4] < 0.6 and error[64] < 0.6
    spikezoo.save_checkpoint(ann.float(), tmp_path / "ann")
    loaded = spikezoo.create_model(f"local-dir:{tmp_path / 'ann'}", pretrained=True).eval()
    assert torch.equal(loaded(x.float()), ann(x.float())) and loaded.neuron_config.qcfs_levels == 4
    spikezoo.save_checkpoint(spikezoo.convert(loaded), tmp_path / "snn")
    assert spikezoo.create_model(f"local-dir:{tmp_path / 'snn'}", pretrained=True).neuron_config.kind == "if"


@torch.no_grad()
def test_bias_correction():
    # Behind the first layer spikes come unevenly. Means of rates are then nearly those of the activations.
    ann = quantised("test_mpbn_resnet", img_size=16, qcfs_levels=4)
    for module in ann.modules():
        if isinstance(module, QCFS):
            module.threshold.fill_(1.5)  # one for all, so that nothing is lost at joins
    x = images(ann, 48)
    plain, corrected = spikezoo.convert(ann), spikezoo.convert(ann, x, bias_correction=True)
    wanted = {name: out[0].clamp(max=1.5) / 1.5 for name, out in every_activation(ann, x).items()}

    def errors(snn):
        rates = {name: out.mean(0) for name, out in every_activation(snn, x).items()}
        return {name: (rates[name] - wanted[name]).mean((0, 2, 3)).abs().mean().item() for name in wanted}

    before, after = errors(plain), errors(corrected)
    first, *others = wanted
    assert before[first] < 1e-12 and torch.equal(plain.stem[0].conv.weight, corrected.stem[0].conv.weight)
    torch.testing.assert_close(plain.stem[0].conv.bias, corrected.stem[0].conv.bias, rtol=0, atol=1e-12)
    assert all(after[name] < 0.5 * before[name] for name in others if before[name] > 0.005), (before, after)
    off, left = ((snn(x) - ann(x)).mean(0).abs().mean() for snn in (plain, corrected))
    assert left < 0.5 * off
    # A loader is read once, and a ReLU network's units are as without.
    relu = settled(PLAIN[0], img_size=16, **PLAIN[1])
    x = images(relu, 30)
    same = [spikezoo.convert(relu, data, T=4, bias_correction=True) for data in (x, iter([(x, None)]))]
    assert torch.equal(same[0](x), same[1](x)) and not torch.equal(same[0](x), spikezoo.convert(relu, x, T=4)(x))
    torch.testing.assert_close(same[0].head.fc.weight, spikezoo.convert(relu, x, T=4).head.fc.weight)
    with pytest.raises(ValueError, match="needs images to measure rates on"):
        spikezoo.convert(ann, bias_correction=True)
    with pytest.raises(ValueError, match="data holds no batch"):
        spikezoo.convert(ann, [], bias_correction=True)
    rmp = quantised("test_rmp_resnet")
    for module in rmp.modules():
        if isinstance(module, QCFS):
            module.threshold.fill_(1.5)
    with pytest.raises(ValueError, match=r"Layer 'stem.0.conv' has no bias to correct: leave bias_correction out"):
        spikezoo.convert(rmp, images(rmp, 4), bias_correction=True)


def test_quantised_shortcuts():
    ann = quantised("test_rmp_resnet")
    with pytest.warns(UserWarning, match=r"Layer '.*': a neuron whose spikes are added .* has learned a smaller one"):
        spikezoo.convert(ann)
    for module in ann.modules():
        if isinstance(module, QCFS):
            module.threshold.data.fill_(1.5)
    assert spikezoo.convert(ann).T == 4  # one threshold for all: no warning


def test_quantised_arguments():
    with pytest.raises(ValueError, match="tau would do nothing"):
        spikezoo.create_model("test_mpbn_vgg", neuron="qcfs", tau=2.0)
    with pytest.raises(ValueError, match="qcfs_levels with neuron='lif' would do nothing"):
        spikezoo.create_model("test_mpbn_vgg", qcfs_levels=8)
    with pytest.raises(ValueError, match="qcfs_levels=0"):
        spikezoo.create_model("test_mpbn_vgg", neuron="qcfs", qcfs_levels=0)
    ann = spikezoo.create_model("test_mpbn_vgg", neuron="qcfs", threshold=3.0)
    assert ann.stem[0].neuron.threshold.item() == 3 and ann.T == 1
    with pytest.raises(ValueError, match=r"mode=0\.9 would do nothing"):
        spikezoo.convert(ann, mode=0.9)
    with torch.no_grad():
        ann.stem[0].neuron.threshold.fill_(-1)
    with pytest.raises(ValueError, match=r"'stem\.0\.neuron': its threshold has become -1"):
        spikezoo.convert(ann)
    with pytest.raises(ValueError, match="needs data"):
        spikezoo.convert(settled("test_mpbn_vgg"), T=3)


def test_accuracy_at_every_number_of_steps():
    ann = settled("test_mpbn_vgg", in_chans=1, img_size=8).float()
    loader = create_loader("digits", "test", batch_size=100, subset=230, num_workers=0)
    snn = spikezoo.convert(ann, loader, T=6)
    top1, rate = accuracy_over_time(snn, loader)
    alone = [evaluate(spikezoo.convert(ann, loader, T), loader) for T in range(1, 7)]
    assert top1 == pytest.approx([found["top1"] for found in alone]) and len(set(top1)) > 1
    assert rate == pytest.approx(alone[-1]["firing_rate"]) and rate > 0
    with pytest.raises(ValueError, match="empty"):
        accuracy_over_time(snn, [])
    with pytest.raises(ValueError, match="global_pool='max'"):
        accuracy_over_time(spikezoo.create_model("test_mpbn_vgg", global_pool="max"), loader)


# --------------------------------------------------------------------------------------------------------------
# Storage and the command
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arguments"), NETS)
def test_round_trip(tmp_path, name, arguments):
    ann = settled(name, **arguments).float()
    ann.pretrained_cfg |= {"mean": (0.0,), "std": (1.0,), "inputs": {"mean": [0.0] * 3, "std": [1.0] * 3}}
    x = images(ann, 4)
    snn = spikezoo.convert(ann, x, T=5, mode="99%")
    spikezoo.save_checkpoint(snn, tmp_path)
    loaded = spikezoo.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(x), snn(x)) and loaded.T == 5
    assert input_options(loaded, "digits") == {**input_options(ann, "digits"), "T": 5}
    assert spikezoo.create_model(f"local-dir:{tmp_path}", pretrained=True, T=9).T == 9


def test_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    ann = settled("test_mpbn_resnet", in_chans=1, img_size=8).float()
    ann.pretrained_cfg |= {"inputs": {"mean": [0.0], "std": [1.0]}}
    spikezoo.save_checkpoint(ann, tmp_path / "ann", {"dataset": "digits"})
    words = ["convert", "--checkpoint", str(tmp_path / "ann"), "--T", "12", "--mode", "0.9", "--calibrate", "100"]
    words += ["--images", "50", "--curve", str(tmp_path / "curve.csv"), "--plot", str(tmp_path / "curve.png")]
    assert main([*words, "--output", str(tmp_path / "snn")]) == 0
    said = capsys.readouterr().out
    snn = spikezoo.create_model(f"local-dir:{tmp_path / 'snn'}", pretrained=True)
    loader = create_loader("digits", "test", batch_size=50, subset=50, num_workers=0, mean=[0.0], std=[1.0])
    assert snn.neuron_config.v_init == 0 and snn.encoding == "direct"
    top1 = evaluate(snn, loader)["top1"]
    before = evaluate(ann, loader)["top1"]
    rows = list(csv.DictReader((tmp_path / "curve.csv").read_text().splitlines()))
    assert [int(row["T"]) for row in rows] == list(range(1, 13))
    assert float(rows[-1]["top1"]) == pytest.approx(top1) and float(rows[0]["ann_top1"]) == pytest.approx(before)
    assert f"ReLU network {before:.2f} %, spiking {top1:.2f} % at T=12" in said and "   8" in said
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    results = read_config(tmp_path / "snn")["spikezoo"]["results"]
    assert results["top1"] == pytest.approx(top1) and results["samples"] == 50
    assert results["conversion"]["calibration_images"] == 100 and results["conversion"]["mode"] == 0.9
    # On request in bfloat16, which rounds weights.
    words = [*words[:7], "--images", "20", "--calibrate", "20", "--amp", "--encoding", "poisson", "--half-threshold"]
    assert main([*words, "--output", str(tmp_path / "other")]) == 0
    config = read_config(tmp_path / "other")
    assert config["model_args"]["v_init"] == 0.5 and config["model_args"]["encoding"] == "poisson"
    assert config["spikezoo"]["results"]["precision"] == "bfloat16"


def test_command_of_a_quantised_twin(tmp_path, capsys):
    ann = quantised("test_mpbn_vgg", in_chans=1, img_size=8, qcfs_levels=3).float()
    ann.pretrained_cfg |= {"inputs": {"mean": [0.0], "std": [1.0]}}
    spikezoo.save_checkpoint(ann, tmp_path / "ann", {"dataset": "digits"})
    words = ["convert", "--checkpoint", str(tmp_path / "ann"), "--images", "20"]
    assert main([*words, "--output", str(tmp_path / "snn")]) == 0
    assert "QCFS network" in capsys.readouterr().out
    config = read_config(tmp_path / "snn")
    assert config["model_args"]["T"] == 3 and "qcfs_levels" not in config["model_args"]
    assert config["spikezoo"]["results"]["conversion"]["mode"] == "qcfs"
    assert main([*words, "--mode", "0.9"]) == 2 and "mode=0.9 would do nothing" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folder of a ReLU twin."""
    ann = settled("test_mpbn_vgg", in_chans=1, img_size=8).float()
    return str(spikezoo.save_checkpoint(ann, tmp_path_factory.mktemp("ann"), {"dataset": "digits"}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "most"], "mode='most': expected 'max'"),
        (["--mode", "1.5"], "mode=1.5"),
        (["--T", "0"], "T=0"),
        (["--encoding", "rate"], "encoding='rate'"),
        (["--calibrate", "0"], "--calibrate 0"),
        (["--images", "-1"], "--images -1"),
        (["--curve", "c.txt"], "c.txt"),
        (["--plot", "c.gif"], "ends in .png"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_bad_commands(words, message, stored, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "--checkpoint", stored, "--output", "out", *words]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("test_mpbn_vgg", {"neuron": "lif"}, r"'stem\.0\.neuron' is a LIF neuron, which spikes already.*neuron='relu'"),
        ("test_mpbn_vgg", {"neuron": "sign"}, r"'stem\.0\.neuron': the sign"),
        ("test_spiking_vgg", {}, r"'stages\.0\.0': a max-pool.*spiking_vgg16"),
        ("test_spikformer", {}, r"Layer 'stem\.\d': a max-pool|no spiking form"),
        ("test_autost", {}, r"Layer '.*'"),
        ("test_mpbn_vgg", {"num_classes": 0}, "num_classes=0"),
        ("test_mpbn_vgg", {"dtype": torch.bfloat16}, r"stem\.0\.conv\.weight is of torch\.bfloat16"),
    ],
)
def test_networks_that_cannot_be_converted(name, arguments, message):
    ann = spikezoo.create_model(name, **{"neuron": "relu", **arguments})
    with pytest.raises(ValueError, match=message):
        spikezoo.convert(ann, images(ann, 2), T=2)


@pytest.mark.parametrize(
    "layer, other",
    [
        ("stages.0.0.conv1.neuron", nn.GELU()),
        ("stages.0.0.neuron", nn.GELU()),
        ("stem.0.neuron", nn.LeakyReLU()),
        ("stem.0.norm", nn.GroupNorm(2, 8)),
        ("stages.0.0.conv2.norm", nn.Sequential(nn.BatchNorm2d(8), nn.Sigmoid())),
    ],
)
def test_layers_put_in_by_hand(layer, other):
    ann = spikezoo.create_model("test_spiking_resnet", neuron="relu")
    ann.set_submodule(layer, other)
    with pytest.raises(ValueError, match=f"Layer '{layer}': a {type(other).__name__} has no spiking form"):
        spikezoo.convert(ann, torch.rand(2, 3, 32, 32), 4)


def test_attention_is_named():
    ann = spikezoo.create_model("test_spikformer", neuron="relu", pools=(False,) * 4)
    with pytest.raises(
        ValueError, match=r"'stages\.0\.0\.attn': the matmul of a SpikingSelfAttention has no spiking form"
    ):
        spikezoo.convert(ann, images(ann, 2), T=2)
    with pytest.raises(ValueError, match=r"not made by spikezoo\.create_model"):
        spikezoo.convert(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.rand(1, 2), T=2)


def test_calibration_data():
    ann = settled("test_mpbn_vgg")
    x = images(ann, 2)
    for data in ([], x[:0], iter(())):
        with pytest.raises(ValueError, match=r"no batch|empty"):
            spikezoo.convert(ann, data, T=2)
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 32, 32\): expected images \[B, C, H, W\]"):
        spikezoo.convert(ann, x[:, None].expand(2, 4, 3, 32, 32), T=2)
    for batch, said in (({"image": x}, r"dict.*batch\['image'\]"), ((), "tuple"), (("image", 1), "str")):
        with pytest.raises(ValueError, match=said):
            spikezoo.convert(ann, [batch], T=2)
    with pytest.raises(ValueError, match=r"'stem\.0\.neuron': its activations .* are nan"):
        spikezoo.convert(ann, x * torch.nan, T=2)
    with torch.no_grad():
        ann.stages[1][0].norm.bias.fill_(-1e3)
    with pytest.raises(ValueError, match=r"'stages\.1\.0\.neuron': its activations .* are 0\.0"):
        spikezoo.convert(ann, x, T=2)
    assert not any(module._forward_hooks for module in ann.modules())


@pytest.mark.parametrize("mode", ["", "most", "101%", "x%", 0, 1.5, -0.1, float("nan"), True, None, [0.9]])
def test_modes(mode):
    ann = settled("test_mpbn_vgg")
    with pytest.raises(ValueError, match=r"expected 'max', a percentile such as '99.9%'"):
        spikezoo.convert(ann, images(ann, 2), T=2, mode=mode)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [("ttfs", "one spike a pixel is no rate"), ("posson", "'poisson'"), (None, "direct")],
)
def test_encodings(encoding, message):
    ann = settled("test_mpbn_vgg")
    with pytest.raises(ValueError, match=message):
        spikezoo.convert(ann, images(ann, 2), T=2, encoding=encoding)


def test_half_threshold_is_a_truth_value():
    ann = settled("test_mpbn_vgg")
    with pytest.raises(ValueError, match="half_threshold='false': expected True or False"):
        spikezoo.convert(ann, images(ann, 2), T=2, half_threshold="false")


@torch.no_grad()
def test_poisson_coding():
    ann = settled("test_mpbn_vgg").float()
    x = images(ann, 4)
    with pytest.raises(ValueError, match=r"from -0\..* drop the normalisation"):
        spikezoo.convert(ann, x - 0.5, T=2, encoding="poisson")
    snn = spikezoo.convert(ann, x, T=256, encoding="poisson", half_threshold=True)
    assert snn.encoding == "poisson" and torch.equal(snn(x), snn(x))
    still = spikezoo.convert(ann, x, T=256)
    assert all(torch.equal(value, still.state_dict()[key]) for key, value in snn.state_dict().items())
    # Random pixels make random rates, around those that a current gives.
    error = {net.encoding: (net(x) - ann(x)).abs().mean() / ann(x).std() for net in (snn, still)}
    assert error["direct"] < error["poisson"] < 0.3
    # A row's own encoding gives way.
    ann = spikezoo.create_model("spiking_mlp_340", neuron="relu", encoding="direct")
    assert spikezoo.convert(ann, images(ann, 4), T=2, encoding="direct").encoding == "direct"
