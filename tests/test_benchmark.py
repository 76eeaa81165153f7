"""benchmark.py: the SpikingJelly baseline is the same network, and the command line measures and writes it."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import spikezoo

SCRIPT = Path(__file__).parents[1] / "benchmark.py"
FAMILIES = ("spiking_vgg", "spiking_resnet")
# The baseline has LIF neurons only, and nets without norms have others.
NAMES = [n for family in FAMILIES for n in spikezoo.list_models(module=family) if "rmp" not in n and "lenet" not in n]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmark"]


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
    notes = " ".join(benchmark._notes(spikezoo.create_model("test_mpbn_resnet", T=2)))
    assert "MPBNLIFNode" in notes
    assert "tanh" in notes


@pytest.mark.parametrize("arguments", [{"neuron": "if"}, {"neuron": "relu"}, {"decay": 0.0}, {"mpbn": "element"}])
def test_what_has_no_counterpart_raises(benchmark, arguments):
    with pytest.raises(ValueError, match="no counterpart"):
        benchmark.SpikingJellyNet(spikezoo.create_model("test_spiking_vgg", **arguments))


def test_a_net_without_norms_has_no_counterpart(benchmark):
    with pytest.raises(ValueError, match="no counterpart"):
        benchmark.SpikingJellyNet(spikezoo.create_model("test_rmp_resnet"))


@pytest.mark.parametrize(("mode", "kind"), [("train", "json"), ("infer", "csv")])
def test_command_line(benchmark, tmp_path, capsys, mode, kind):
    path = tmp_path / f"rows.{kind}"
    flags = f"--model test_mpbn_resnet --mode {mode} --T 2 --batch-size 4 --amp --channels-last --repeats 1 --warmup 0"
    rows = benchmark.main([*flags.split(), "--results-file", str(path)])
    assert [row["side"] for row in rows] == ["spikezoo", "spikingjelly"]
    assert rows[0]["speedup"] > 0
    assert rows[1]["speedup"] == 1
    assert rows[0]["parameters"] == rows[1]["parameters"] == 9_610
    assert rows[0]["form"] == "bf16 autocast, channels-last, eager"
    printed = capsys.readouterr().out
    for expected in ("| spikezoo |", "| spikingjelly |", "9,610", "AMX", "commit", "MPBNLIFNode", torch.__version__):
        assert expected in printed
    assert list(tmp_path.iterdir()) == [path]
    read = json.loads(path.read_text()) if kind == "json" else list(csv.DictReader(path.read_text().splitlines()))
    assert [{key: str(value) for key, value in row.items()} for row in read] == [
        {key: str(value) for key, value in row.items()} for row in rows
    ]
    columns = "model mode side form T batch_size img_size num_classes parameters images_per_s step_ms step_ms_min"
    columns += " step_ms_max first_step_s speedup speedup_min speedup_max against device repeats warmup date commit"
    columns += " python torch torchvision timm spikingjelly spikezoo-snn machine threads amx avx512_bf16 notes"
    assert all(list(row) == columns.split() for row in rows)


def test_sides_take_turns_and_the_warm_up_is_left_out(benchmark):
    order = []
    sides = [benchmark.Side(name, "", 0, lambda name=name: order.append(name)) for name in "AB"]
    benchmark.measure(sides, repeats=3, warmup=2)
    assert "".join(order) == "AB" * 6
    assert [len(side.times) for side in sides] == [3, 3]


def test_the_speed_up_is_the_median_of_the_ratios_of_neighbours(benchmark):
    settings = benchmark.Settings("test_spiking_vgg", repeats=3, batch_size=10)
    ours = benchmark.Side("spikezoo", "", 1, None, times=[1.0, 2.0, 4.0])
    baseline = benchmark.Side("spikingjelly", "", 1, None, times=[6.0, 4.0, 20.0])
    row = benchmark.make_rows(settings, [ours, baseline])[0]
    assert (row["speedup"], row["speedup_min"], row["speedup_max"]) == (5.0, 2.0, 6.0)
    assert (row["step_ms"], row["images_per_s"]) == (2000.0, 5.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "mpbn_resnet21"}, "mpbn_resnet20"),
        ({"T": 0}, "T=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"threads": 0}, "threads=0"),
        ({"mode": "both"}, "mode='both'"),
        ({"against": "nothing"}, "spikingjelly"),
        ({"device": "gpu"}, "device='gpu'"),
    ],
)
def test_bad_settings(benchmark, arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark.Settings(**{"model": "test_mpbn_resnet", **arguments})


def test_compiling_needs_a_compiler(benchmark, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        benchmark.Settings("test_mpbn_resnet", torchcompile=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model mpbn_resnet21", "Did you mean 'mpbn_resnet"),
        ("--model test_mpbn_resnet --T 0", "T=0"),
        ("--model test_mpbn_resnet --img-size 4", "img_size"),
        ("--model test_mpbn_resnet --results-file rows.txt", ".csv or .json"),
    ],
)
def test_bad_command_lines(benchmark, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(flags.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


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
