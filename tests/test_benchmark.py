"""benchmark.py: the SpikingJelly baseline is the same network, and the command line measures and writes it."""

import csv
import dataclasses
import functools
import importlib
import json
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spikezoo

SCRIPT = Path(__file__).parents[1] / "benchmark.py"
FAMILIES = ("spiking_vgg", "spiking_resnet")
# The baseline has LIF neurons only, and nets without norms have others.
NAMES = [n for family in FAMILIES for n in spikezoo.list_models(module=family) if "rmp" not in n and "lenet" not in n]


PARTS = (
    "settings", "counterpart", "models", "sides", "measuring", "report", "sizes", "neuron", "startup", "growth",
    "command",
)  # fmt: skip


@pytest.fixture(scope="module")
def benchmark():
    names = {}
    for part in PARTS:
        names |= vars(importlib.import_module(f"tools.benchmark.{part}"))
    return types.SimpleNamespace(**{key: value for key, value in names.items() if not key.startswith("__")})


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def in_order(model):
    """Parameters of a model of ours from input to output."""
    return [p for part in (model.stem, model.stages, model.neck, model.head) for p in part.parameters()]


def create(name, **kwargs):
    torch.manual_seed(7)
    model = spikezoo.create_model(name, **kwargs)
    for module in model.modules():  # fresh statistics and scales of 1 would hide a norm that was not copied
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d | spikezoo.neurons.MembraneNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.weight is not None:
                torch.nn.init.uniform_(module.weight, 0.8, 1.2)
                torch.nn.init.normal_(module.bias, 0.2, 0.1)
    return model


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_spiking_vgg", {"T": 2}),
        ("test_spiking_vgg", {"T": 2, "decay": 0.25, "surrogate": "arctan", "reset": "soft", "detach_reset": True}),
        ("test_spiking_vgg", {"T": 2, "tau": 2.0, "threshold": 0.5}),
        # The linear layer behind the average does not reach a threshold of 1 in an untrained net.
        ("test_spiking_resnet", {"T": 2, "firing": ">=", "threshold": 0.4}),
        # Only at T=1 is SpikingJelly's MPBNLIFNode the neuron of the paper.
        ("test_mpbn_vgg", {"T": 1, "firing": ">="}),
        ("test_mpbn_resnet", {"T": 1, "firing": ">="}),
    ],
)
def test_baseline_gives_the_same_logits(benchmark, images, name, arguments):
    model = create(name, **arguments).eval()
    net = benchmark.SpikingJellyNet(model).eval()
    with torch.no_grad():
        ours, theirs = model(images), net(images)
    rates = spikezoo.firing_rates(model, images)
    assert all(0 < rate.mean() < 1 for rate in rates.values()), rates  # equal because silent would prove nothing
    assert ours.std() > 1e-3
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    torch.testing.assert_close(net(images), theirs, rtol=0, atol=0)  # it resets


@pytest.mark.parametrize(("name", "threshold"), [("test_spiking_vgg", 1.0), ("test_spiking_resnet", 0.4)])
def test_baseline_gives_the_same_gradients(benchmark, images, name, threshold):
    model = create(name, T=2, firing=">=", threshold=threshold).train()
    net = benchmark.SpikingJellyNet(model).train()
    labels = torch.tensor([1, 2, 3, 4])
    for side in (model, net):
        F.cross_entropy(side(images), labels).backward()
    for ours, theirs in zip(in_order(model), net.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-3, atol=1e-5)
    assert in_order(model)[0].grad.abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_parameters_match_one_to_one(benchmark, name):
    with torch.device("meta"):
        model = spikezoo.create_model(name, device="meta")
        net = benchmark.SpikingJellyNet(model)
    assert [p.shape for p in in_order(model)] == [p.shape for p in net.parameters()]
    assert len(in_order(model)) == len(list(model.parameters()))
    assert all(p.requires_grad for side in (model, net) for p in side.parameters())


def test_the_surrogate_that_spikingjelly_lacks_is_replaced_and_named(benchmark):
    net = benchmark.SpikingJellyNet(spikezoo.create_model("test_mpbn_resnet"))
    kinds = {type(m.surrogate_function).__name__ for m in net.modules() if hasattr(m, "surrogate_function")}
    assert kinds == {"PiecewiseQuadratic"}
    notes = " ".join(benchmark.notes_of(spikezoo.create_model("test_mpbn_resnet", T=2)))
    assert "MPBNLIFNode" in notes
    assert "tanh" in notes


def test_a_surrogate_that_both_sides_have(benchmark):
    settings = benchmark.Settings(model="test_mpbn_resnet", batch_size=2, surrogate="triangle")
    model = benchmark.make_model(settings)
    assert model.neuron_config.surrogate == "triangle"
    assert not any("surrogate" in note for note in benchmark.counterpart(model)[1])
    assert benchmark.make_model(settings, neuron="relu", mpbn="none").neuron_config.kind == "relu"
    with pytest.raises(ValueError, match=r"surrogate='triange' does not exist\. Did you mean 'triangle'"):
        dataclasses.replace(settings, surrogate="triange")
    for mode in set(benchmark.MODES) - {"train"}:
        with pytest.raises(ValueError, match="changes gradients only: use mode='train'"):
            dataclasses.replace(settings, mode=mode)


@pytest.mark.parametrize("arguments", [{"neuron": "if"}, {"neuron": "relu"}, {"decay": 0.0}, {"mpbn": "element"}])
def test_what_has_no_counterpart_raises(benchmark, arguments):
    with pytest.raises(ValueError, match="no counterpart"):
        benchmark.SpikingJellyNet(spikezoo.create_model("test_spiking_vgg", **arguments))


def test_a_net_without_norms_has_no_counterpart(benchmark):
    with pytest.raises(ValueError, match="no counterpart"):
        benchmark.SpikingJellyNet(spikezoo.create_model("test_rmp_resnet"))


COLUMNS = "mode model T img_size num_classes surrogate width ticket macs firing_rate silent_layers batch_size side form"
COLUMNS += " parameters images_per_s step_ms step_ms_min step_ms_max first_step_s speedup speedup_min speedup_max"
COLUMNS += " share_of_conv_limit bit_equal argmax_agree memory_mb memory_ratio device repeats warmup date commit python"
COLUMNS += " torch torchvision timm spikingjelly spikezoo-snn machine threads amx avx512_bf16 notes"


@pytest.mark.parametrize(("mode", "kind"), [("train", "json"), ("infer", "csv"), ("infer", "md")])
def test_command_line(benchmark, tmp_path, capsys, mode, kind):
    path = tmp_path / f"rows.{kind}"
    flags = f"--model test_mpbn_resnet --mode {mode} --T 2 --batch-size 4 --amp --channels-last --repeats 1 --warmup 0"
    rows = benchmark.main([*flags.split(), "--results-file", str(path)])
    assert [row["side"] for row in rows] == ["spikezoo", "spikingjelly"]
    assert rows[0]["speedup"] == 1
    assert rows[1]["speedup"] > 0
    assert rows[0]["parameters"] == rows[1]["parameters"] == 9_610
    assert rows[0]["form"] == "bf16 autocast, channels-last, eager"
    assert 0.05 < rows[0]["firing_rate"] < 0.95 and rows[0]["silent_layers"] == 0
    printed = capsys.readouterr().out
    for expected in ("| spikezoo |", "| spikingjelly |", "9,610", "AMX", "commit", "MPBNLIFNode", torch.__version__):
        assert expected in printed
    assert list(tmp_path.iterdir()) == [path]
    assert all(list(row) == COLUMNS.split() for row in rows)
    if kind == "md":
        assert path.read_text().strip() == printed.strip()
        return
    read = json.loads(path.read_text()) if kind == "json" else list(csv.DictReader(path.read_text().splitlines()))
    blank = "None" if kind == "json" else ""
    assert [{key: str(value) for key, value in row.items()} for row in read] == [
        {key: blank if value is None else str(value) for key, value in row.items()} for row in rows
    ]


def test_sides_take_turns_and_the_warm_up_is_left_out(benchmark):
    order = []
    sides = [benchmark.Side(name, "", 0, lambda name=name: order.append(name)) for name in "AB"]
    benchmark.measure(sides, repeats=3, warmup=2)
    assert "".join(order) == "AB" * 6
    assert [len(side.times) for side in sides] == [3, 3]


def test_the_speed_up_is_the_median_of_the_ratios_of_neighbours(benchmark):
    settings = benchmark.Settings("test_spiking_vgg", repeats=3, batch_size=10)
    ours = benchmark.Side("spikezoo", "", 1, None, times=[1.0, 2.0, 4.0])
    slow = benchmark.Side("spikingjelly", "", 1, None, times=[6.0, 4.0, 20.0])
    limit = benchmark.Side("conv-limit", "", 1, None, times=[0.5, 1.5, 1.0])
    rows = benchmark.make_rows(settings, [ours, slow, limit], {}, {"spikezoo": 3, "spikingjelly": 6, "conv-limit": 1})
    assert [row["speedup"] for row in rows] == [1.0, 5.0, 0.5]
    assert (rows[1]["speedup_min"], rows[1]["speedup_max"]) == (2.0, 6.0)
    assert (rows[0]["step_ms"], rows[0]["images_per_s"]) == (2000.0, 5.0)
    assert [row["share_of_conv_limit"] for row in rows] == [0.5, 0.0833, 1.0]  # of 1/12, 3/8 and 1/20 the median
    assert [row["memory_ratio"] for row in rows] == [1.0, 0.5, 3.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "mpbn_resnet21"}, "mpbn_resnet20"),
        ({"model": ""}, "model is missing"),
        ({"T": 0}, "T=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"threads": 0}, "threads=0"),
        ({"width": 0.0}, "width=0.0"),
        ({"mode": "infer", "ticket": 1.0}, "ticket=1.0"),
        ({"mode": "inver"}, "mode='inver'.*infer"),
        ({"against": ("spikingjely",)}, "spikingjelly"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"mode": "infer", "precision": "bf32"}, "Did you mean 'bf16'"),
        ({"mode": "infer", "precision": "bf16", "amp": True}, "leave them out"),
        ({"precision": "bf16"}, "mode='infer'"),
        ({"ticket": 0.5}, "mode='infer'"),
        ({"against": ("conv-limit",)}, "mode='infer'"),
        ({"mode": "size", "memory": True}, "memory is measured of steps"),
        ({"mode": "neuron", "amp": True}, "amp=True is for whole models"),
    ],
)
def test_bad_settings(benchmark, arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark.Settings(**{"model": "test_mpbn_resnet", **arguments})


@pytest.mark.parametrize("arguments", [{"torchcompile": True}, {"mode": "neuron"}])
def test_compiling_needs_a_compiler(benchmark, monkeypatch, arguments):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        benchmark.Settings("test_mpbn_resnet", **arguments)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model mpbn_resnet21", "Did you mean 'mpbn_resnet"),
        ("--model test_mpbn_resnet --T 0", "T=0"),
        ("--model test_mpbn_resnet --img-size 4", "img_size"),
        ("--model test_mpbn_resnet --results-file rows.txt", ".csv, .json, .md"),
        ("--model test_mpbn_resnet --plot growth.png", "--T 1 2 4"),
        ("--model test_mpbn_resnet --T 1 2 --plot growth.txt", ".png"),
        ("--model test_mpbn_resnet --T 1 2 --batch-size 1 2 --img-size 8 16", "two flags at most"),
        ("--model all --T 1 2", "one model"),
        ("--mode infer", "model is missing"),
        ("--model test_spiking_vgg --mode infer --against plain", "mpbn_* models"),
        ("--model test_rmp_resnet --mode infer --batch-size 2", "no counterpart"),
    ],
)
def test_bad_command_lines(benchmark, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(flags.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the networks


def test_settled_norms_have_the_statistics_of_the_images(benchmark):
    model = spikezoo.create_model("test_spiking_vgg", T=2)
    x = torch.randn(8, 3, 32, 32)
    benchmark.settle(model, x)
    with torch.no_grad():
        y = model.stem[0].conv(x)
    torch.testing.assert_close(model.stem[0].norm.running_mean, y.mean((0, 2, 3)))
    # One frame is computed once: 8 * 32 * 32 values a channel, whose variance is unbiased.
    torch.testing.assert_close(model.stem[0].norm.running_var, y.transpose(0, 1).flatten(1).var(1))
    assert not model.training and model.stem[0].norm.momentum == 0.1


def test_layers_without_norm_are_woken(benchmark):
    model = benchmark.make_model(benchmark.Settings("spiking_resnet19", mode="infer", T=2, ticket=0.9, img_size=8))
    assert min(model.rates.values()) >= 0.01
    torch.manual_seed(0)
    plain = spikezoo.create_model("spiking_resnet19", T=2, img_size=8, ticket={"kind": "mpslt", "sparsity": 0.9})
    ratio = model.neck[0].linear.weight.abs().max() / spikezoo.bake(plain).neck[0].linear.weight.abs().max()
    assert ratio > 1 and ratio.log2() == ratio.log2().round()  # so the weights are as they were, up to a power of two


def test_a_net_that_says_the_same_of_all_images_is_refused(benchmark):
    with pytest.raises(ValueError, match=r"same logits.*stem\.0\.neuron"):
        benchmark.make_model(benchmark.Settings("test_spiking_vgg", mode="infer"), threshold=1e6)


def test_width_takes_channels_out(benchmark):
    whole, half = (
        benchmark.make_model(benchmark.Settings("test_spiking_resnet", mode="infer", T=1, width=width))
        for width in (1.0, 0.5)
    )
    layers = [[m for m in model.modules() if isinstance(m, torch.nn.Conv2d)] for model in (whole, half)]
    assert [conv.out_channels for conv in layers[1]] == [conv.out_channels // 2 for conv in layers[0]]
    macs = [benchmark.describe(benchmark.Settings("test_spiking_resnet"), m)["macs"] for m in (whole, half)]
    assert 3 < macs[0] / macs[1] < 4  # a quarter, but of the layer on the image and the head a half


def test_macs_by_hand(benchmark):
    # The stem, 3 channels, is computed once; what follows T times; the head, after the mean over time, once.
    model = benchmark.make_model(benchmark.Settings("test_spiking_resnet", mode="infer", T=3))
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    once = 32 * 32 * 3 * 8 * 9 + 10 * model.head.fc.in_features
    size = {8: 32, 12: 16, 16: 8}
    often = sum(m.weight.numel() * size[m.out_channels] ** 2 for m in convs[1:]) + 16 * 16
    assert benchmark.describe(benchmark.Settings("test_spiking_resnet"), model)["macs"] == once + 3 * often


def test_all_are_the_nets_for_small_images(benchmark):
    names = benchmark.image_models()
    assert {"spiking_resnet19", "mpbn_resnet20", "spikformer_4_384", "spiking_mlp_340", "spiking_lenet"} <= set(names)
    assert not {"mpbn_resnet18", "spikformer_dvs_2_256", "spikformer_in_6_256", "test_mpbn_vgg"} & set(names)


# -------------------------------------------------------------------------------------------------- the baselines


@pytest.fixture
def eager(monkeypatch):
    """Without a compiler, whose minutes these tests need not wait for."""
    monkeypatch.setattr("shutil.which", lambda _name: None)


def spikformer(**arguments):
    torch.manual_seed(1)
    return spikezoo.create_model("test_spikformer", heads=2, mlp_ratios=2, **arguments)


@pytest.mark.parametrize(("pools", "size"), [((False, False, True, True), 32), ((True, True, True, True), 64)])
def test_spikformer_of_spikingjelly_is_the_same_network(benchmark, pools, size):
    # At T=1 the neuron only compares, so that it may stand before the pooling as ours or behind it as theirs.
    model = spikformer(T=1, pools=pools, img_size=size, threshold=0.25, attention_threshold=0.5)
    net, notes = benchmark.counterpart(model)
    theirs = net.net
    for module in theirs.modules():  # theirs has no argument for it
        if getattr(module, "v_threshold", None) == 1.0:
            module.v_threshold = 0.25
    *convs, encoding = [m for m in model.stem if not hasattr(m, "pool") or m.pool is None]
    pairs = [
        (ours, (block.conv_bn.block[0], block.conv_bn.block[1]))
        for ours, block in zip(convs, theirs.patch_embed.stages, strict=True)
    ]
    pairs.append((encoding.conv, theirs.patch_embed.positional_encoding.conv_bn.block))
    biases = 0
    for stage, block in zip(model.stages, theirs.blocks, strict=True):
        attn, mlp = stage[0].attn, stage[0].mlp
        pairs += [(attn.proj, block.attn.proj_conv_bn), (mlp.fc1, block.mlp.fc1), (mlp.fc2, block.mlp.fc2)]
        conv, norm = block.attn.qkv_conv_bn
        for index, layer in enumerate((attn.q, attn.k, attn.v)):
            part = slice(16 * index, 16 * index + 16)
            pairs.append(
                (layer, ({"weight": conv.weight[part]}, {k: v[part] for k, v in norm.state_dict().items() if v.dim()}))
            )
    for ours, (conv, norm) in pairs:
        conv, norm = (x if isinstance(x, dict) else x.state_dict() for x in (conv, norm))
        ours.conv.weight.data.copy_(conv["weight"].view_as(ours.conv.weight))
        if ours.conv.bias is not None:
            biases += ours.conv.bias.numel()
            ours.conv.bias.data.zero_()
        ours.norm.load_state_dict({"num_batches_tracked": torch.tensor(0), **norm})
    model.head.fc.load_state_dict(theirs.head.state_dict())
    images = torch.randn(4, 3, size, size)
    model.eval(), net.eval()
    with torch.no_grad():
        wanted, found = model(images), net(images)
    assert wanted.std() > 1e-3
    rates = {name: float(rate.mean()) for name, rate in spikezoo.firing_rates(model, images).items()}
    assert min(rates.values()) > 0, rates  # equal because silent would prove nothing
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in net.parameters()) == biases
    assert f"{biases:,} biases" in notes


@pytest.mark.parametrize("arguments", [{"pools": (False, True, True, True)}, {"mpbn": "channel"}, {"scale": 0.25}])
def test_spikformers_that_spikingjelly_does_not_have(benchmark, arguments):
    with pytest.raises(benchmark.NoCounterpartError, match="needs"):
        benchmark.counterpart(spikformer(**arguments))
    with pytest.raises(benchmark.NoCounterpartError, match="one number of heads, one MLP ratio"):
        benchmark.counterpart(spikezoo.create_model("test_spikformer"))


@pytest.mark.parametrize("name", ["test_spiking_vgg", "test_mpbn_resnet", "test_spikformer"])
def test_fused_baseline_is_the_baseline(benchmark, images, name):
    norms = torch.nn.BatchNorm1d | torch.nn.BatchNorm2d
    model = spikformer(T=1) if name == "test_spikformer" else create(name, T=1).eval()
    torch.manual_seed(2)
    net, _ = benchmark.counterpart(model)
    torch.manual_seed(2)
    fused = benchmark.fused_counterpart(model)
    assert any(isinstance(m, norms) for m in net.modules()) and not any(isinstance(m, norms) for m in fused.modules())
    with torch.no_grad():
        wanted, found = net.eval()(images), fused.eval()(images)
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("precision", [None, "bf16", "int8"])
def test_every_baseline_runs(benchmark, precision):
    against = ("spikingjelly", "spikingjelly-best", "ann", "plain", "conv-limit", "eager")
    settings = benchmark.Settings(
        "test_mpbn_resnet", mode="infer", T=2, batch_size=2, precision=precision, against=against, repeats=1, warmup=0
    )
    rows = benchmark.run(settings)
    assert [row["side"] for row in rows] == ["spikezoo", *against]
    found = {row["side"]: row for row in rows}
    assert (
        found["spikingjelly-best"]["parameters"] == 9_610 > found["plain"]["parameters"] == found["ann"]["parameters"]
    )
    assert found["conv-limit"]["share_of_conv_limit"] == 1
    assert "conv-bn fused" in found["spikingjelly-best"]["form"]
    assert {None: "float32, NCHW", "bf16": "bf16, channels-last", "int8": "in int8, float32, channels-last"}[
        precision
    ] in found["conv-limit"]["form"]
    assert ("bf16" if precision else "float32") in found["ann"]["form"]  # a twin without spikes has no int8
    shown = [found[side]["argmax_agree"] is not None for side in found]
    assert shown == [precision is not None] + 6 * [False]


@pytest.mark.usefixtures("eager")
def test_limit_has_the_layers_of_the_network(benchmark, monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark._Layers, "forward", lambda self, *x: seen.extend(zip(self.layers, x, strict=True)))
    model = benchmark.make_model(benchmark.Settings("test_spiking_vgg", mode="infer", T=2))
    settings = benchmark.Settings("test_spiking_vgg", mode="infer", T=2, batch_size=3, precision="bf16")
    images, labels = benchmark.make_inputs(settings, model)
    benchmark.conv_limit_side(model, images, labels, settings).step()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert [layer.weight.shape for layer, _ in seen] == [layer.weight.shape for layer in layers]
    assert [len(x) for _, x in seen] == [3, *(len(layers) - 2) * [6], 3]  # the image once, then T*B, the head once
    types = [x.dtype for _, x in seen]  # deployed, the first layer and the head stay in float32
    assert types == [torch.float32, *(len(layers) - 2) * [torch.bfloat16], torch.float32]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for _, x in seen if x.dim() == 4)


@pytest.mark.usefixtures("eager")
def test_eight_bit_limit_computes_the_sums(benchmark):
    model = benchmark.make_model(benchmark.Settings("test_spiking_vgg", mode="infer", ticket=0.5))
    conv = model.stages[0][0].conv
    x = torch.randint(0, 2, (2, conv.in_channels, 8, 8))
    sums = benchmark._Sums(conv)(x.to(torch.uint8).contiguous(memory_format=torch.channels_last))
    assert torch.equal(sums, F.conv2d(x.float(), conv.weight.sign(), padding=1)) and sums.std() > 0


@pytest.mark.usefixtures("eager")
def test_eight_bit_tickets_are_bit_equal(benchmark, capsys):
    flags = "--model test_spiking_vgg --mode infer --precision int8 --T 2 --batch-size 16 --repeats 1 --warmup 0"
    rows = benchmark.main([*flags.split(), "--ticket", "0.5"])
    assert [row["bit_equal"] for row in rows] == [True, None]
    assert rows[0]["argmax_agree"] == 1 and rows[0]["ticket"] == 0.5
    assert "| bit-equal |" in capsys.readouterr().out
    rows = benchmark.main(flags.split())  # real weights are rounded
    assert rows[0]["bit_equal"] is False and 0 <= rows[0]["argmax_agree"] <= 1


def test_all_goes_on_where_there_is_no_counterpart(benchmark, monkeypatch, capsys):
    monkeypatch.setattr("tools.benchmark.command.image_models", lambda: ["test_spiking_vgg", "test_rmp_resnet"])
    flags = "--model all --mode infer --T 2 --batch-size 2 --repeats 1 --warmup 0 --against spikingjelly plain"
    rows = benchmark.main(flags.split())
    assert [(row["model"], row["side"]) for row in rows] == [
        ("test_spiking_vgg", "spikezoo"),
        ("test_spiking_vgg", "spikingjelly"),
        ("test_rmp_resnet", "spikezoo"),
    ]
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in told] == [
        "test_spiking_vgg against plain",
        "test_rmp_resnet against spikingjelly",
        "test_rmp_resnet against plain",
    ]


# ------------------------------------------------------------------------------------------ memory, growth, the rest


def test_peak_memory_is_that_of_the_third_step(benchmark):
    mebibytes = iter((256, 192, 64))
    kept = []

    def step():
        kept[:] = [torch.ones(next(mebibytes) * 2**18)]  # the former is freed after this one is there
        kept.clear()

    assert 60 < benchmark.peak_memory(step) / 2**20 < 90


def test_memory_of_each_side_in_a_process_of_its_own(benchmark):
    settings = benchmark.Settings("test_spiking_vgg", mode="infer", T=2, batch_size=64, threads=1)
    megabytes = benchmark.in_process("memory", settings, side="eager")
    # The widest map: 8 channels of 32x32, twice 64 images, float32, and more than one of its kind.
    assert 4 < megabytes < 200


def test_a_failed_process_says_why(benchmark, tmp_path, monkeypatch):
    script = tmp_path / "fails.py"
    script.write_text("import sys, json; sys.exit('no room for ' + json.loads(sys.argv[2])['arguments']['side'])")
    monkeypatch.setattr("tools.benchmark.measuring.DOOR", script)
    with pytest.raises(RuntimeError, match=r"test_spiking_vgg, memory.*no room for ann"):
        benchmark.in_process("memory", benchmark.Settings("test_spiking_vgg"), side="ann")


def test_growth(benchmark, tmp_path, capsys):
    path = tmp_path / "growth.png"
    flags = "--model test_spiking_vgg --mode infer --T 1 2 --batch-size 1 4 --repeats 1 --warmup 0 --plot"
    rows = benchmark.main([*flags.split(), str(path)])
    assert [(row["T"], row["batch_size"], row["side"]) for row in rows] == [
        (T, batch, "spikezoo") for T in (1, 2) for batch in (1, 4)
    ]
    assert path.read_bytes()[:4] == b"\x89PNG"
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[0] for line in table] == ["| T", "| 1", "| 1", "| 2", "| 2"] and table[0][1] == "batch_size"
    # Speed times work: images/s of four digits and the G MACs/s that the table gives.
    assert all(
        float(line[6][:-2]) == pytest.approx(row["images_per_s"] * row["macs"] / 1e9, abs=0.051)
        for line, row in zip(table[1:], rows, strict=True)
    )
    flags = "--model test_spiking_vgg --mode infer --ticket 0 0.5 --batch-size 2 --repeats 1 --warmup 0 --plot"
    rows = benchmark.main([*flags.split(), str(path), "--against", "eager"])
    assert [(row["ticket"], row["side"]) for row in rows] == [
        (0, "spikezoo"), (0, "eager"), (0.5, "spikezoo"), (0.5, "eager")
    ]  # fmt: skip


def test_the_points_of_a_curve_take_turns(benchmark, monkeypatch):
    seen = []
    timed = benchmark.timed
    monkeypatch.setattr(
        "tools.benchmark.measuring.timed", lambda step, device: (seen.append(step), timed(step, device))[1]
    )
    flags = "--model test_spiking_vgg --mode infer --T 1 2 --batch-size 1 --repeats 2 --warmup 0"
    benchmark.main(flags.split())
    assert len(seen) == 6 and seen[0] is seen[2] is seen[4] and seen[1] is seen[3] is seen[5] and seen[0] is not seen[1]


def test_the_dashed_line_is_the_work(benchmark, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y, *args, **kwargs: drawn.append((x, y)))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda self, **kwargs: None)
    rows = [
        {"side": "spikezoo", "form": "", "model": "", "mode": "infer", "T": T, "images_per_s": speed, "macs": macs}
        for T, speed, macs in ((1, 100, 10), (2, 40, 18), (4, 20, 34))
    ]
    benchmark.draw_growth(rows, ["T"], tmp_path / "growth.png")
    assert drawn == [([1, 2, 4], [10, 25, 50]), ([1, 2, 4], [10, 18, 34])]


def test_neuron_alone(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda run, **kwargs: run)
    flags = "--mode neuron --T 3 --batch-size 2 --channels 4 --img-size 8 --repeats 1 --warmup 0"
    rows = benchmark.main(flags.split())
    assert [row["side"] for row in rows] == ["spikezoo", "copy", "spikingjelly", "spikingjelly compiled"]
    assert [row["bit_equal"] for row in rows] == [True, None, None, True]
    assert 0.05 < rows[0]["firing_rate"] < 0.95
    assert "[3, 2, 4, 8, 8]" in capsys.readouterr().out


def test_startup(benchmark, monkeypatch, capsys):
    seconds = {"torch, timm": iter((2.0, 4.0)), "torch, timm, spikezoo": iter((2.5, 4.1))}
    monkeypatch.setattr("tools.benchmark.startup.RUNS", 2)
    monkeypatch.setattr("tools.benchmark.startup._import_s", lambda modules: next(seconds[modules]))
    caches = []
    monkeypatch.setattr(
        "tools.benchmark.startup.in_process", lambda task, settings, environ: caches.append(environ) or 9.0
    )
    rows = benchmark.main(["--model", "test_spiking_vgg", "--mode", "startup"])
    found = {row["what"]: row for row in rows}
    assert found["spikezoo adds"]["seconds"] == 0.3 and found["spikezoo adds"]["seconds_max"] == 0.5
    assert caches[0] == caches[1] and len(caches) == 2 and found["load a checkpoint"]["seconds"] > 0
    assert found["first call deployed bf16, compiler's cache full"]["seconds"] == 9
    assert "| load a checkpoint |" in capsys.readouterr().out


def test_sizes_of_files(benchmark, capsys):
    rows = benchmark.main(["--model", "spiking_conv4", "--mode", "size", "--repeats", "1"])
    found = {(row["code"], row["sparsity"]): row for row in rows}
    assert found["dense", 0.0]["bytes"] > 4 * 2_425_024 == 4 * found["dense", 0.0]["weights"]
    # By hand: 0.4 removed of 2,425,024 weights has a mask entropy of 0.97095 bits a weight, 0.9 removed 0.46900.
    for sparsity, entropy in ((0.4, 0.97095), (0.9, 0.46900)):
        assert found["ticket, signs from a seed", sparsity]["bound"] == pytest.approx(entropy, abs=2e-3)
        assert found["ticket", sparsity]["bound"] == pytest.approx(entropy + 1 - sparsity, abs=2e-3)
        assert found["bitmask", sparsity]["bound"] == pytest.approx(entropy + 32 * (1 - sparsity), abs=2e-2)
        size = found["ticket, signs from a seed", sparsity]["bytes"]
        assert size <= 1.05 * entropy * 2_425_024 / 8 + 4096
    assert found["bitmask", 0.9]["bits_per_weight"] <= 4.3
    assert all(row["over_bound"] > 0.999 for row in rows)
    assert "entropy bound" in capsys.readouterr().out


def test_frozen_weights_are_constants_of_the_graph(benchmark):
    net, x = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU()).eval(), torch.randn(1, 2, 4, 4)
    run = benchmark._compiled(net, True)
    with torch.no_grad():
        wanted = run(x).clone()
        net[0].weight.zero_()
        assert torch.equal(run(x), wanted)


@pytest.mark.usefixtures("eager")
def test_the_best_of_spikingjelly_is_the_fastest_of_its_forms(benchmark, monkeypatch):
    settings = benchmark.Settings("test_spiking_vgg", mode="infer", T=2, batch_size=2)
    model = benchmark.make_model(settings)
    images, labels = benchmark.make_inputs(settings, model)
    # The first step of each form compiles and does not count; the shortest of the others does.
    seconds = iter([9, 3, 4, 3, 9, 5, 2.5, 3, 70, 4, 2, 8, 1, 3, 3, 3])
    monkeypatch.setattr("tools.benchmark.sides.timed", lambda step, _device: (step(), next(seconds))[1])
    side = benchmark.spikingjelly_best_side(model, images, labels, settings)
    assert side.form == "float32, channels-last, conv-bn fused, eager, the fastest of 4 forms"
    assert (side.first_s, side.times, next(seconds, None)) == (68, [], None)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_the_best_of_spikingjelly_is_compiled_once(benchmark, monkeypatch, mode):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr("tools.benchmark.settings.has_compiler", lambda: True)
    settings = benchmark.Settings("test_spiking_vgg", mode=mode, T=2, batch_size=2)
    model = benchmark.make_model(settings)
    images, labels = torch.randn(2, *model.input_shape), torch.tensor([0, 1])
    torch.compiler.reset()
    side = benchmark.spikingjelly_best_side(model, images, labels, settings)
    side.step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            side.step()
    torch.compiler.reset()
