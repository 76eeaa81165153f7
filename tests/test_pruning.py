"""Pruning of weights while they are trained: by magnitude, Deep R, gradient rewiring, by hand and in a run."""

import types

import pytest
import torch
from torch import nn

import spikezoo
from spikezoo import cli
from spikezoo.checkpoint import Config, load_state, read_table
from spikezoo.train.objective import Objective
from spikezoo.transforms import pruning


def layer_of(weights, **arguments):
    """A linear layer of one output that is being pruned, its optimizer (SGD at 0.5), and the hooks in place."""
    net = nn.Sequential(nn.Linear(len(weights), 1, bias=False)).double()
    net[0].weight.data = torch.tensor([weights], dtype=torch.double)
    net = spikezoo.apply(net, "prune", **arguments)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    run = types.SimpleNamespace(model=net, optimizer=optimizer, ema=None, epoch=0, epochs=4, seed=7)
    pruning.start(run, net.recipe[-1][1])
    return net, optimizer, run


def step(net, optimizer, inputs):
    """One step on the loss ``weight @ inputs``, whose gradient is the inputs."""
    optimizer.zero_grad()
    net(torch.tensor([inputs], dtype=torch.double)).sum().backward()
    optimizer.step()
    return net[0].weight.detach().flatten().tolist()


def test_gradient_rewiring_by_hand():
    # Half of the weights: the prior's place is log(2 * 0.5) / 0.1 = 0; every step pulls strengths by 0.5 * 0.1.
    net, optimizer, _ = layer_of([0.2, -1.0, 0.3], method="gradient_rewiring", sparsity=0.5, penalty=0.1)
    # Strengths 0.2, 1, 0.3 fall by 0.5 * (1, 0, 0) and 0.05: -0.35 is dormant, 0.95 keeps its minus, 0.25.
    assert step(net, optimizer, [1.0, 0.0, 0.0]) == pytest.approx([0.0, -0.95, 0.25])
    # The gradient reaches the dormant one: -0.35 + 0.5 + 0.05, from below zero the prior pulls up.
    assert step(net, optimizer, [-1.0, 0.0, 0.0]) == pytest.approx([0.2, -0.9, 0.2])


def test_deep_r_by_hand():
    net, optimizer, _ = layer_of([0.2, -1.0, 0.3, 0.5], method="deep_r", sparsity=0.25, penalty=0.1)
    weights = net[0].weight.detach().flatten().tolist()
    assert weights.count(0) == 1  # from the start
    dormant = weights.index(0)
    # The one with a gradient dies; one of the two dormant ones starts anew, and a gradient moves none of them.
    first = 0 if dormant else 2
    sign = 1 if weights[first] > 0 else -1
    after = step(net, optimizer, [4.0 * sign if i == first else 0.0 for i in range(4)])
    awake = [i for i, w in enumerate(after) if w]
    assert len(awake) == 3 and min(abs(after[i]) for i in awake) == pytest.approx(pruning.AWAKENED)
    for i, (old, new) in enumerate(zip(weights, after, strict=True)):
        if i not in (first, dormant):
            assert new == pytest.approx(old - 0.05 * (1 if old > 0 else -1))


def test_magnitude_by_hand():
    net, _, run = layer_of([0.2, -1.0, 0.3, 0.5, -0.1, 0.6, 0.7, 0.8], method="magnitude", sparsity=0.5, until=2)
    run.epoch = 1  # 0.5 * (1 - 0.5 ** 3) of 8 weights: three whole ones
    assert pruning.after_epoch(run, net.recipe[-1][1]) == {"weights_removed": 37.5}
    assert net[0].weight.detach().flatten().tolist() == [0, -1.0, 0, 0.5, 0, 0.6, 0.7, 0.8]
    plain = pruning.deliver(net)
    assert torch.equal(plain[0].weight, net[0].weight) and type(plain[0]) is nn.Linear and plain.recipe == []


@pytest.mark.parametrize("method", pruning.METHODS)
def test_a_run_prunes_resumes_and_delivers_plain_weights(method, tmp_path, monkeypatch):
    monkeypatch.setattr("spikezoo.train.output.plot", lambda *_: [])
    flags = "--model test_spiking_vgg --T 1 --dataset digits --subset 64 -b 32 --lr 0.05 --epochs 2 --seed 3"
    flags = [*flags.split(), "--prune", f"method={method}", "sparsity=0.6", "penalty=0.5", "temperature=0.01"]
    run = ["train", *flags, "--recovery-interval", "1", "--output"]
    assert cli.main([*run, str(tmp_path / "whole"), "--experiment", "run"]) == 0
    compute, calls = Objective.__call__, []

    def stop(self, *args):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", stop)
        assert cli.main([*run, str(tmp_path / "parts"), "--experiment", "run"]) == 130
    assert cli.main([*run, str(tmp_path / "parts"), "--experiment", "run", "--resume", "auto"]) == 0
    whole, parts = (load_state(tmp_path / name / "run" / "last.safetensors")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    folder = tmp_path / "whole" / "run"
    model = spikezoo.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.recipe == [] and pruning.report(model)["weights_removed"] == pytest.approx(
        float(read_table(folder / "summary.csv")[-1]["eval_weights_removed"])
    )
    expected = {"magnitude": (59.9, 60.1), "deep_r": (59, 60.1), "gradient_rewiring": (1, 99)}[method]
    assert expected[0] < Config.read(folder).results["weights_removed"] < expected[1]


def test_bad_arguments():
    model = spikezoo.create_model("test_spiking_vgg")
    for bad, said in (
        ({"method": "magnitud"}, "magnitude"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"method": "gradient_rewiring", "sparsity": 0.3}, "0.5 or more"),
        ({"method": "gradient_rewiring", "penalty": 0.0}, "1e-3"),
        ({"exempt": ["nowhere"]}, "nowhere"),
        ({"until": 0}, "until"),
    ):
        with pytest.raises(ValueError, match=said):
            spikezoo.apply(model, "prune", **bad)
    with pytest.raises(ValueError, match="bake"):
        spikezoo.apply(spikezoo.create_model("test_spiking_vgg", ticket={"kind": "mpslt"}), "prune")
    net, _, run = layer_of([1.0, 2.0], method="magnitude", until=4)
    run.epochs = 3
    with pytest.raises(ValueError, match="after epoch 4"):
        pruning.start(run, net.recipe[-1][1])
    run.ema = net
    with pytest.raises(ValueError, match="model-ema"):
        pruning.start(run, {**net.recipe[-1][1], "method": "deep_r"})
