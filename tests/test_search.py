"""Search: costs of built nets, exact search against brute force, evolution, metrics by hand, correlation, files."""

import csv
import itertools
import json
import math
import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from conftest import load
from torch import nn

import spikezoo
from spikezoo import search
from spikezoo.cli import main
from spikezoo.neurons import IF, NeuronConfig
from spikezoo.search import (
    SPACES,
    Constraints,
    Evolution,
    Net,
    Setting,
    Space,
    evolution,
)
from tools import correlation

ROOT = Path(__file__).parents[1]
WINDOWS = {"tiny": (4e6, 5e6), "small": (11e6, 15e6), "base": (25e6, 35e6)}  # the paper's
SHRUNKEN = Space("shrunken", (32, 64, 128), (1, 2, 3), (1, 2, 2.5), (1, 2, 8))


def every_net(space, heads=None):
    """Brute force: all nets of a space, layers in every order; with ``heads`` only those."""
    options = heads or space.heads
    for dim, depth in itertools.product(space.dims, space.depths):
        for ratios in itertools.product(space.mlp_ratios, repeat=depth):
            for chosen in itertools.product(options, repeat=depth):
                yield Net(dim, ratios, chosen)


# ---------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize(
    ("net", "setting"),
    [
        (Net(32, (1, 2.5, 4), (1, 4, 8)), Setting(T=2)),
        (Net(64, (3,), (8,)), Setting(T=3, num_classes=100, img_size=16, in_chans=1)),
        (Net(128, (0.1, 2), (1, 2)), Setting(T=1, num_classes=7, img_size=8)),
        (Net(64, (4, 3), (1, 2)), Setting(T=2, num_classes=5, img_size=64)),
    ],
)
def test_costs_are_those_of_the_built_net(net, setting):
    model = setting.create(net)
    found = search.cost(net, setting)
    assert found.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = spikezoo.count(model, search.noise(setting, 1))
    assert found.flops == setting.T * counted.macs_step and not counted.uncounted
    # What the model does not repeat: the first convolution and the head.
    once = 9 * setting.in_chans * (net.dim // 8) * setting.img_size**2 + net.dim * setting.num_classes
    assert found.flops - counted.macs == (setting.T - 1) * once


def test_costs_by_hand():
    # d=192, 8 layers of ratio 5, 64 tokens. Equation 4: 8 * 64 * 192 * (2 * 192 + 64); equation 5: 2 * 64 * 192^2 * 40.
    net = Net(192, (5,) * 8, (4,) * 8)
    assert search.cost(net, Setting(T=4)).flops_eq == 4 * (44_040_192 + 188_743_680)
    # Spikformer-4-256 on CIFAR-10: published count; 3168 d^2 + 3456 d for convolutions, n (4 + 2r) d^2 a block,
    # 2 n^2 d for the attention products where heads are at least as wide as the 64 tokens, 10 d for the head.
    found = search.cost(Net(256, (4,) * 4, (4,) * 4), Setting(T=1))
    assert found.parameters == 4_155_178
    assert found.flops == 3168 * 256**2 + 3456 * 256 + 4 * (64 * 12 * 256**2 + 2 * 64**2 * 256) + 2560
    # Heads of 32 channels: the product over channels first is half of that.
    narrow = search.cost(Net(256, (4,) * 4, (8,) * 4), Setting(T=1))
    assert narrow.parameters == found.parameters and found.flops - narrow.flops == 4 * 64**2 * 256


@pytest.mark.parametrize(
    ("name", "net"),
    [
        ("autost_tiny", Net(320, (4, 5), (8, 8))),
        ("autost_small", Net(448, (5, 5, 5), (8,) * 3)),
        ("autost_base", Net(576, (5, 5, 5, 6, 6), (8,) * 5)),
        ("autost_in_tiny", Net(320, (3,) * 4, (8,) * 4)),
        ("autost_in_small", Net(448, (5,) * 4, (8,) * 4)),
        ("autost_in_base", Net(768, (3, 3, 3, 4), (8,) * 4)),
        ("autost_dvs_tiny", Net(320, (4, 5), (8, 8))),
    ],
)
def test_named_models_are_nets_of_the_search(name, net):
    model = spikezoo.create_model(name, device="meta")
    built = [block[0] for block in model.stages]
    assert tuple(block.attn.heads for block in built) == net.heads
    assert tuple(block.mlp.fc1.conv.out_channels / net.dim for block in built) == net.mlp_ratios
    setting = Setting(1, model.num_classes, model.img_size[0], model.in_chans)
    assert search.cost(net, setting).parameters == sum(p.numel() for p in model.parameters())
    space = SPACES[name.rpartition("_")[2]]
    assert net.dim in space.dims and net.depth in space.depths
    assert {*net.mlp_ratios} <= {*space.mlp_ratios} and {*net.heads} <= {*space.heads}


@pytest.mark.parametrize("tag", ["cifar10", "cifar10_multisp"])
def test_trained_nets_keep_the_heads_that_they_were_trained_with(tag):
    model = spikezoo.create_model(f"autost_tiny.{tag}", pretrained=True)
    assert [block[0].attn.heads for block in model.stages] == [5, 5]


def test_speed_of_scoring():
    rng = random.Random(0)
    nets = [evolution.random_net(SPACES["base"], rng) for _ in range(2000)]
    started = time.process_time()  # other processes do not count
    for net in nets:
        search.score(net, "flops", Setting())
    assert len(nets) / (time.process_time() - started) > 10_000


# --------------------------------------------------------------------------------------------------- exact search


@pytest.mark.parametrize("bounds", [None, (4e6, 5e6), (2_100_000, 2_300_000)])
@pytest.mark.parametrize("metric", ["flops", "flops_eq", "parameters"])
def test_exact_search_equals_brute_force_on_the_tiny_space(metric, bounds, _tiny_space=[]):  # noqa: B006
    # One number of heads, so that all 39,360 choices of ratios, layer by layer, can be looked at.
    space = Space("tiny", SPACES["tiny"].dims, SPACES["tiny"].depths, SPACES["tiny"].mlp_ratios, (4,))
    if not _tiny_space:
        _tiny_space += [(net, search.cost(net, Setting())) for net in every_net(space)]
    nets = _tiny_space
    assert len(nets) == space.size == 4 * sum(3**depth for depth in range(1, 9))
    found = search.exact(space, metric, constraints=Constraints(parameters=bounds), top=12)
    check_against(found, nets, metric, bounds, 12)


def check_against(found, nets, metric, bounds, top):
    inside = [(net, cost) for net, cost in nets if bounds is None or bounds[0] <= cost.parameters <= bounds[1]]
    # The documented order: metric, fewer parameters, smaller dimension, fewer layers, then ratios and heads that are
    # more even, ascending through the layers.
    inside.sort(
        key=lambda item: (
            -getattr(item[1], metric),
            item[1].parameters,
            item[0].dim,
            item[0].depth,
            [-r for r in sorted(item[0].mlp_ratios)],
            item[0].mlp_ratios,
            [-h for h in sorted(item[0].heads)],
            item[0].heads,
        )
    )
    expected = {}
    for net, cost in inside:
        expected.setdefault((net.dim, net.depth, cost.parameters), (net, cost))
    expected = list(expected.values())[:top]
    assert [item.net for item in found.found] == [net for net, _ in expected]
    assert [(item.value, item.parameters, item.flops) for item in found.found] == [
        (getattr(cost, metric), cost.parameters, cost.flops) for _, cost in expected
    ]
    like = Counter((net.dim, net.depth, cost.parameters, cost.flops) for net, cost in nets)
    for item in found.found:
        assert item.nets == like[item.net.dim, item.net.depth, item.parameters, item.flops]
    # The front by definition: at every number of parameters, more than anything with as few.
    best, front = -1, []
    by_count = {}
    for _, cost in nets:
        by_count[cost.parameters] = max(by_count.get(cost.parameters, -1), getattr(cost, metric))
    for parameters, value in sorted(by_count.items()):
        if value > best:
            best = value
            front.append((parameters, value))
    assert [(item.parameters, item.value) for item in found.front] == front
    assert found.looked_at == len(nets) and found.proven


@pytest.mark.parametrize("metric", ["flops", "flops_eq"])
def test_exact_search_equals_brute_force_with_heads_and_fractions(metric):
    # Heads of 128 to 4 channels around 64 tokens, hidden widths that round down.
    setting = Setting(T=2)
    nets = [(net, search.cost(net, setting)) for net in every_net(SHRUNKEN)]
    assert len(nets) == SHRUNKEN.size == 3 * (9 + 81 + 729)
    check_against(search.exact(SHRUNKEN, metric, setting, top=50), nets, metric, None, 50)
    window = (300_000, 500_000)
    check_against(search.exact(SHRUNKEN, metric, setting, Constraints(parameters=window)), nets, metric, window, 10)


def test_window_of_macs():
    limits = Constraints(flops=(0, 60e6))
    found = search.exact(SHRUNKEN, "parameters", Setting(), limits, top=1).found[0]
    within = [search.cost(net, Setting()) for net in every_net(SHRUNKEN)]
    assert found.parameters == max(cost.parameters for cost in within if cost.flops <= 60e6)
    assert found.flops <= 60e6


@pytest.mark.parametrize("name", SPACES)
def test_spaces_are_searched_in_a_second(name):
    started = time.process_time()  # other processes do not count
    result = search.exact(SPACES[name], "flops", constraints=Constraints(parameters=WINDOWS[name]))
    assert time.process_time() - started < 1 and result.looked_at == SPACES[name].size


def test_what_the_metrics_reward():
    # Equations 4 and 5 the narrowest and deepest nets, the whole network's MACs the widest and shallowest.
    shapes = {}
    for name, bounds in WINDOWS.items():
        for metric in ("flops_eq", "flops"):
            net = search.exact(SPACES[name], metric, constraints=Constraints(parameters=bounds), top=1).found[0].net
            shapes[name, metric] = (net.dim, net.depth, sum(net.mlp_ratios))
    assert shapes == {
        ("tiny", "flops_eq"): (192, 8, 40),
        ("tiny", "flops"): (384, 1, 5),
        ("small", "flops_eq"): (320, 10, 45),
        ("small", "flops"): (512, 4, 13),
        ("base", "flops_eq"): (384, 14, 82),
        ("base", "flops"): (768, 4, 14),
    }


# ------------------------------------------------------------------------------------------------------- evolution


@pytest.mark.parametrize("name", SPACES)
def test_evolution_with_the_published_settings_comes_close(name):
    constraints = Constraints(parameters=WINDOWS[name])
    optimum = search.exact(SPACES[name], "flops", constraints=constraints, top=1).found[0].value
    results = [
        search.evolve(SPACES[name], constraints=constraints, settings=Evolution(seed=seed)) for seed in range(10)
    ]
    assert sum(result.found[0].value >= 0.99 * optimum for result in results) >= 9
    assert all(result.found[0].value <= optimum and not result.proven for result in results)
    assert all(result.looked_at == 50 + 20 * 50 and result.seconds < 10 for result in results)
    for item in results[0].found:
        assert WINDOWS[name][0] <= item.parameters <= WINDOWS[name][1]
    again = search.evolve(SPACES[name], constraints=constraints, settings=Evolution(seed=3))
    assert again.found == results[3].found and results[3].found != results[4].found


def test_mutation_and_crossover_as_published():
    rng, settings, space = random.Random(1), Evolution(), SPACES["base"]
    parent = Net(576, (3,) * 10, (4,) * 10)
    children = [evolution.mutated(parent, space, settings, rng) for _ in range(4000)]
    assert all(child.depth in space.depths and len(child.heads) == child.depth for child in children)
    # A new depth with probability 0.4 and one of twelve is the old one; likewise of seven dimensions.
    assert sum(child.depth != 10 for child in children) / 4000 == pytest.approx(0.4 * 11 / 12, abs=0.03)
    assert sum(child.dim != 576 for child in children) / 4000 == pytest.approx(0.4 * 6 / 7, abs=0.03)
    # The first four layers are there in every child: a new ratio with probability 0.2, of four.
    changed = [ratio != 3 for child in children for ratio in child.mlp_ratios[:4]]
    assert sum(changed) / len(changed) == pytest.approx(0.2 * 3 / 4, abs=0.02)
    changed = [heads != 4 for child in children for heads in child.heads[:4]]
    assert sum(changed) / len(changed) == pytest.approx(0.2 / 2, abs=0.02)
    one, other = Net(384, (3, 3, 3, 3), (4, 4, 4, 4)), Net(768, (6, 6, 6, 6), (8, 8, 8, 8))
    longer = Net(512, (4,) * 6, (4,) * 6)
    crossed = [evolution.crossed([one, other, longer], rng) for _ in range(600)]
    assert {net.depth for net in crossed} == {4, 6} and {net.dim for net in crossed} == {384, 512, 768}
    assert all(net == longer for net in crossed if net.depth == 6)
    mixed = {net.mlp_ratios for net in crossed if net.depth == 4}
    assert len(mixed) == 16 and all(set(ratios) <= {3, 6} for ratios in mixed)


def test_no_net_is_scored_twice_and_a_small_space_ends(monkeypatch):
    scored = []
    plain = search.score
    monkeypatch.setattr(evolution, "score", lambda net, *args, **kw: scored.append(net) or plain(net, *args, **kw))
    space = Space("few", (32, 64), (1, 2), (1, 2, 3), (1, 2))
    result = search.evolve(space, top=100)
    assert len(scored) == len(set(scored)) == space.size == result.looked_at
    # It has seen everything, so it has the answer of the exact search; of nets that tie, the same ones.
    assert [item.net for item in result.found] == [item.net for item in search.exact(space, top=100).found]


def test_an_interrupted_evolution_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    def run(log):
        constraints = Constraints(parameters=WINDOWS["small"])
        return search.evolve(SPACES["small"], constraints=constraints, settings=Evolution(seed=5), log=log)

    whole = run(None)
    log = tmp_path / "deeper" / "evolution.jsonl"
    scored, plain = [], search.score

    def failing(net, *args, **kwargs):
        if len(scored) == 333:
            raise KeyboardInterrupt
        scored.append(net)
        return plain(net, *args, **kwargs)

    monkeypatch.setattr(evolution, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        run(log)
    with open(log, "a") as file:
        file.write('{"dim": 384, "mlp_ra')  # the process died while it wrote
    later = []
    monkeypatch.setattr(evolution, "score", lambda net, *args, **kw: later.append(net) or plain(net, *args, **kw))
    resumed = run(log)
    assert resumed.found == whole.found and resumed.others == whole.others and resumed.looked_at == whole.looked_at
    assert len(later) == whole.looked_at - 333 and not set(later) & set(scored)
    assert len(log.read_text().splitlines()) == 1 + whole.looked_at
    # A flipped bit costs the net of its line, and is no score; in the first line it is refused.
    intact = log.read_bytes()
    place = intact.index(b'"score": ', len(intact) // 2) + 11
    log.write_bytes(intact[:place] + bytes([intact[place] ^ 1]) + intact[place + 1 :])
    later.clear()
    assert run(log).found == whole.found and len(later) == 1
    assert sorted(log.read_bytes().splitlines()) == sorted(intact.splitlines())
    log.write_bytes(intact[:9] + b"x" + intact[10:])
    with pytest.raises(ValueError, match="damaged in its first line"):
        run(log)
    log.write_bytes(intact)
    later.clear()
    # Finished: nothing is scored any more, and the log stays as it is.
    before = log.read_bytes()
    assert run(log).found == whole.found and log.read_bytes() == before
    with pytest.raises(ValueError, match="of another search: metric is 'flops_eq' and was 'flops'"):
        search.evolve(
            SPACES["small"], "flops_eq", constraints=Constraints(parameters=WINDOWS["small"]),
            settings=Evolution(seed=5), log=log,
        )  # fmt: skip


def test_lower_is_better(monkeypatch):
    # A metric that reads the network and wants small values: the number of its parameters.
    measured = search.Metric("count", False, lambda model, *_: float(sum(p.numel() for p in model.parameters())))
    monkeypatch.setitem(search.METRICS, "ntk", measured)
    settings = Evolution(population=6, generations=2, mutations=2, crossovers=2)
    result = search.evolve(
        Space("s", (8, 16, 24), (1, 2), (1, 2), (1,)), "ntk", Setting(T=1, img_size=8), settings=settings
    )
    values = [item.value for item in result.found]
    assert values == sorted(values) and values == [item.parameters for item in result.found]
    assert [item.value for item in result.front] == [min(values)]
    assert result.looked_at <= 18


# ------------------------------------------------------------------------------------------------ metrics by hand


class TwoLayers(nn.Module):
    """Two features, linear, norm, neuron, and a second linear layer with or without neuron; mean over T."""

    def __init__(self, first, second, T, fires=False, mean=None, bias=False):
        super().__init__()
        config = NeuronConfig(kind="if", surrogate="rectangle")
        self.T, self.fires = T, fires
        self.one = nn.Linear(2, 2, bias=False)
        self.norm = None
        if mean is not None:
            self.norm = nn.BatchNorm1d(2, eps=0.0)
            self.norm.running_mean.copy_(torch.tensor(mean))
        self.neuron = IF(config)
        self.two = nn.Linear(2, len(second), bias=bias)
        self.out = IF(config)
        with torch.no_grad():
            self.one.weight.copy_(torch.tensor(first))
            self.two.weight.copy_(torch.tensor(second))

    def forward(self, x):
        x = self.one(x.flatten(1))
        x = x if self.norm is None else self.norm(x)
        x = self.two(self.neuron(x.expand(self.T, *x.shape)))
        return (self.out(x) if self.fires else x).mean(0)


def test_synflow_by_hand():
    # Ones through |W| = [[1, 2], [0.5, 0.25]]: currents 3 and 0.75, less |mean| = 0.25 of the second: 3 and 0.5. The
    # first fires, 2 above the threshold, where the surrogate is flat; the second is 0.5 below, where its slope is 1.
    # |theta dR/dtheta|: first weights 0.5 + 0.25, norm's scale 0.5 (its shift is 0), second weights 1 + 0.
    model = TwoLayers([[1.0, -2.0], [-0.5, 0.25]], [[-1.0, 1.0]], 1, mean=[0.0, -0.25])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert search.synflow(model, (2, 1, 1)) == pytest.approx(0.75 + 0.5 + 1.0, abs=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training


def test_snip_by_hand():
    # One unit in, currents 1.25 and 0 in the first layer, slopes 1 and 0; it fires once: logits (2, -1). The loss of
    # class 0 has the gradients (p - 1, 1 - p), p = 1 / (1 + exp(-3)). |w g|: of the second layer (2 + 1)(1 - p); of
    # the first the gradient of the current is 2 (p - 1) - (1 - p) = -3 (1 - p), times the weight 1.25 and input 1.
    model = TwoLayers([[1.25, 0.0], [0.0, 0.0]], [[2.0, 0.0], [-1.0, 0.0]], 1)
    left = 1 - 1 / (1 + math.exp(-3))
    assert search.snip(model, torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == pytest.approx(
        3 * left + 3.75 * left, rel=1e-6
    )
    setting, net = Setting(T=1, img_size=8), Net(16, (1,), (1,))
    images = search.noise(setting, 12)
    scores = [search.score(net, "snip", setting, images=images, labels=torch.full((12,), k)) for k in (1, 2)]
    assert scores[0] != scores[1] and all(score > 0 for score in scores)
    assert search.score(net, "snip", setting, images=images) == search.score(
        net, "snip", setting, images=images, labels=torch.arange(12) % setting.num_classes
    )


def test_ntk_by_hand():
    # W1 = diag(1.25, 0.75), W2 = (2, 3), T = 1. Sample (1, 0): currents 1.25 and 0, slopes 1 and 0, spikes 1 and 0:
    # gradients (2, 0, 0, 0) of W1 and (1, 0) of W2. Sample (1, 1): currents 1.25 and 0.75, slopes 1 and 1, spikes 1
    # and 0: (2, 2, 3, 3) and (1, 0). Kernel [[5, 5], [5, 27]], eigenvalues 16 -+ sqrt(146). The bias does not count.
    model = TwoLayers([[1.25, 0.0], [0.0, 0.75]], [[2.0, 3.0]], 1, bias=True)
    images = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    wanted = (16 + math.sqrt(146)) / (16 - math.sqrt(146))
    assert search.ntk(model, images) == pytest.approx(wanted, rel=1e-6)
    assert all(p.grad is None for p in model.parameters())
    # Two equal samples: a singular kernel; silence everywhere: no kernel at all; not a number.
    assert search.ntk(model, torch.ones(2, 2)) > 1e300
    assert search.ntk(TwoLayers([[0.0, 0.0]] * 2, [[0.0, 0.0]], 1), images) == 1e5
    assert search.ntk(model, torch.tensor([[math.nan, 0.0], [1.0, 1.0]])) == 1e5


# Two steps, threshold 1, identity: a current of 1 fires twice, 0.5 at the second step. Samples (1, 0.5) and (0.5, 0):
# first layer 10, 00 and then 11, 10; the second, which sums the two, fires 1, 0 and then 1, 1.
SPIKES = TwoLayers([[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0]], 2, fires=True)
PAIR = torch.tensor([[1.0, 0.5], [0.5, 0.0]])


def test_linear_regions_by_hand():
    # Agreeing units of the two samples, by layer and step: 1 of 2, 1 of 2, 0 of 1, 1 of 1. K = [[6, 3], [3, 6]].
    assert search.linear_regions(SPIKES, PAIR) == pytest.approx(math.log(27), rel=1e-12)
    assert search.linear_regions(SPIKES, torch.ones(2, 2)) < -1e300  # samples that nothing tells apart


def test_sahd_by_hand():
    # Rates of the samples: 1/2, 0 | 1, 1/2 | 1, 0 | 1, 1. Expected distances 1, 1, 1, 0; distances 1, 1, 1, 0. So the
    # diagonal is (2 + 2 + 1 + 1) / 4, and off it (6 - 3 * 0.5 / 1.001) / 4.
    off = (6 - 1.5 / 1.001) / 4
    wanted = math.log(1.5**2 - off**2)
    assert search.sahd(SPIKES, [PAIR]) == pytest.approx(wanted, rel=1e-6)
    # Averaged over batches; of these, one has samples in the other order, and one is three times (1, 1).
    assert search.sahd(SPIKES, [PAIR, PAIR.flip(0)]) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="no batch"):
        search.sahd(SPIKES, [])


def test_metrics_on_spikes_leave_the_model_alone_and_need_spikes():
    setting, net = Setting(T=2, img_size=8), Net(16, (1, 2), (1, 2))
    model = setting.create(net).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = search.noise(setting, 8)
    values = [
        search.linear_regions(model, images),
        search.sahd(model, [images]),
        search.ntk(model, images[:4]),
        search.synflow(model, (3, 8, 8)),
    ]
    assert all(math.isfinite(value) for value in values)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and not any(module._forward_hooks for module in model.modules())
    for measure in (search.linear_regions, lambda m, x: search.sahd(m, [x])):
        with pytest.raises(ValueError, match="no spikes to measure"):
            measure(setting.create(net, neuron="relu", T=1), images)


def test_score_is_reproducible_and_leaves_the_random_state():
    setting, net = Setting(T=1, img_size=8), Net(16, (1,), (2,))
    state = torch.get_rng_state()
    images = search.noise(setting, 6, seed=1)
    for name in search.METRICS:
        first = search.score(net, name, setting, images=images, seed=3)
        assert first == search.score(net, name, setting, images=images, seed=3)
        if name in search.MEASURED:
            assert first != search.score(net, name, setting, images=images, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert {name for name, metric in search.METRICS.items() if not metric.higher_is_better} == {"ntk"}


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dims": (30,)}, "multiple of 8, for instance 32"),
        ({"dims": (32, 40), "heads": (4, 16)}, "Embedding dimension 40 is not divisible by 16 heads: take 20 heads"),
        ({"depths": ()}, r"depths=\(\), expected a list"),
        ({"depths": (0, 1)}, r"depths=\[0, 1\], expected positive integers"),
        ({"mlp_ratios": ("4",)}, "expected positive numbers"),
        ({"mlp_ratios": (0.02, 4)}, "an MLP ratio of 0.02 leaves an embedding dimension of 32 no hidden channel"),
        ({"heads": "48"}, "expected a list"),
        ({"heads": (True,)}, "expected positive integers"),
    ],
)
def test_spaces_that_make_no_net(change, words):
    fields = {"name": "own", "dims": (32,), "depths": (1,), "mlp_ratios": (4,), "heads": (4,), **change}
    with pytest.raises(ValueError, match=words):
        Space(**fields)


def test_spaces_from_files_and_mappings(tmp_path):
    path = tmp_path / "narrow.yaml"
    path.write_text("dims: [32, 16, 32]\ndepths: [2]\nmlp_ratios: [1.5]\nheads: [4]\n")
    space = Space.of(str(path))
    assert space == Space("narrow", (16, 32), (2,), (1.5,), (4,)) == Space.of({**vars(space)})
    assert Space.of("base") is SPACES["base"]
    for bad, words in (
        ("smal", "Unknown space 'smal'. Did you mean 'small'"),
        ({"dims": [8], "depth": [1]}, "Unknown key 'depth' of a space. Did you mean 'depths'"),
        ({"dims": [8]}, "depths, mlp_ratios, heads is missing"),
    ):
        with pytest.raises(ValueError, match=words):
            Space.of(bad)
    path.write_text("depth: [1, 2]\ndepth: [3]\n")
    with pytest.raises(ValueError, match=r"key 'depth' stands in line 1 already"):
        Space.of(str(path))
    with pytest.raises(FileNotFoundError, match=r"No file at .*nowhere\.yaml"):
        Space.of(str(tmp_path / "nowhere.yaml"))
    path.write_text("- 1")
    with pytest.raises(ValueError, match="holds a list"):
        Space.of(str(path))


@pytest.mark.parametrize("method", [search.exact, search.evolve])
def test_empty_windows_say_what_is_possible(method):
    counts = sorted({search.cost(net, Setting()).parameters for net in every_net(SHRUNKEN, (1,))})
    words = rf"parameters in 1:2 \(the smallest net has {counts[0]:,}, the largest {counts[-1]:,}; nearest"
    with pytest.raises(ValueError, match=words):
        method(SHRUNKEN, constraints=Constraints(parameters=(1, 2)))
    # A gap between two counts.
    low, high = max(itertools.pairwise(counts), key=lambda pair: pair[1] - pair[0])
    with pytest.raises(ValueError, match=f"nearest to the window: {low:,} and {high:,}"):
        method(SHRUNKEN, constraints=Constraints(parameters=(low + 1, high - 1)))
    with pytest.raises(ValueError, match=r"MACs in 0:1 \(the smallest"):
        method(SHRUNKEN, constraints=Constraints(flops=(0, 1)))


def test_other_bad_input():
    too_quick = Constraints(latency_ms=0.0)
    for call, words in (
        (lambda: search.exact(SHRUNKEN, "flop"), "Unknown metric 'flop'. Did you mean 'flops'"),
        (lambda: search.evolve(SHRUNKEN, "nkt"), "Unknown metric 'nkt'. Did you mean 'ntk'"),
        (lambda: search.exact(SHRUNKEN, "sahd"), "reads a network: use the method evolution"),
        (lambda: search.window("4e6"), "expected LO:HI"),
        (lambda: search.window("5:4"), "LO <= HI"),
        (lambda: search.window("a:4"), "expected LO:HI"),
        (lambda: Setting(img_size=30), "30 is not divisible by the patch, 4: take 32"),
        (lambda: Setting(img_size=100), "not divisible by the patch, 16: take 96"),
        (lambda: Setting(T=0), "T=0: expected an integer >= 1"),
        (lambda: search.exact(SHRUNKEN, top=0), "top=0: expected at least 1"),
        (lambda: search.evolve(SHRUNKEN, top=0), "top=0: expected at least 1"),
        (lambda: search.exact(SHRUNKEN, "flops", Setting(1, 10, 8), too_quick, top=1), "None of the 1 best nets takes"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert search.window(":5") == (0, 5) and search.window("4:") == (4, math.inf)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"population": 0}, "population=0: expected an integer >= 1"),
        ({"parents": 0}, "parents=0: expected an integer >= 1"),
        ({"mutations": -3}, "mutations=-3: expected an integer >= 0"),
        ({"generations": 2.0}, "generations=2.0: expected an integer"),
        ({"m_prob": 3}, "m_prob=3: expected a probability"),
    ],
)
def test_bad_settings_of_the_evolution(change, words):
    with pytest.raises(ValueError, match=words):
        Evolution(**change)


def test_latency_is_measured_on_the_shortlist():
    setting = Setting(T=1, img_size=8)
    result = search.exact(SHRUNKEN, "flops", setting, Constraints(latency_ms=1e6), top=2)
    assert len(result.found) == 2 and all(item.latency_ms > 0 for item in result.found) and not result.proven


# ----------------------------------------------------------------------------------------------------------- files


def test_command_line(tmp_path, capsys):
    folder = tmp_path / "found"
    call = ["search", "--space", "tiny", "--params", "4.0e6:4.22e6", "--top", "3", "--output", str(folder)]
    assert main(call) == 0
    said = capsys.readouterr().out
    assert "all 8,062,152 nets covered" in said and "d320 L2 r(4,5)" in said
    rows = list(csv.DictReader((folder / "search.csv").read_text().splitlines()))
    assert [row["rank"] for row in rows[:4]] == ["1", "2", "3", ""]
    assert all(row["pareto"] == "True" for row in rows[3:])
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")
    # The config: train.py takes it, and the model is the net that was found.
    train = load("train")
    args = train.parse_args(["--config", str(folder / "best.yaml")])
    model = spikezoo.create_model(args.model, device="meta", **train.model_arguments(args))
    assert sum(p.numel() for p in model.parameters()) == int(rows[0]["parameters"]) == 4_213_170
    assert (args.dataset, args.T, args.epochs, args.opt, args.lr) == ("cifar10", 4, 300, "adamw", 5e-4)
    assert "Found by: spikezoo search" in (folder / "best.yaml").read_text()
    # The evolution, with its log; the same again.
    assert main([*call, "--method", "evolution", "--seed", "1"]) == 0
    first = (folder / "search.csv").read_bytes()
    assert "1,050 of 8,062,152 nets" in capsys.readouterr().out
    assert main([*call, "--method", "evolution", "--seed", "1"]) == 0
    assert (folder / "search.csv").read_bytes() == first
    assert main([*call, "--method", "evolution", "--seed", "2"]) == 2
    assert "of another search" in capsys.readouterr().err
    assert main(["search", "--space", "tiny", "--params", "1:2"]) == 2
    assert "the smallest net has" in capsys.readouterr().err


def test_command_line_with_a_metric_on_images(tmp_path, capsys):
    path = tmp_path / "one.yaml"
    path.write_text("dims: [8]\ndepths: [1]\nmlp_ratios: [1, 2]\nheads: [1]\n")
    call = ["search", "--space", str(path), "--metric", "linear_regions", "--T", "1"]
    # The dataset says what the nets are made for; it is not CIFAR-10 because nobody gave numbers.
    assert main([*call, "--dataset", "digits", "--output", str(tmp_path / "digits")]) == 0
    assert "2 of 2 nets" in capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "digits" / "best.yaml").read_text())
    assert [config[k] for k in ("dataset", "num_classes", "in_chans", "img_size")] == ["digits", 10, 1, 8]
    assert main([*call[:4], "flops", "--dataset", "cifar100", "--output", str(tmp_path / "exact")]) == 0
    config = yaml.safe_load((tmp_path / "exact" / "best.yaml").read_text())
    assert (config["dataset"], config["num_classes"], config["in_chans"]) == ("cifar100", 100, 3)
    capsys.readouterr()
    assert main([*call, "--img-size", "8"]) == 0  # noise
    assert "linear_regions (higher is better)" in capsys.readouterr().out


def test_configs_of_large_images_and_unknown_data(tmp_path):
    result = search.exact(SHRUNKEN, setting=Setting(img_size=224, num_classes=1000), top=1)
    large = Setting(img_size=224, num_classes=1000)
    search.write(result, tmp_path, space=SHRUNKEN, metric="flops", setting=large)
    config = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert (config["model"], config["dataset"], config["val_split"]) == ("autost_in_tiny", "imagenet", "val")
    other = Setting(img_size=36, num_classes=3)
    search.write(result, tmp_path, space=SHRUNKEN, metric="flops", setting=other)
    text = (tmp_path / "best.yaml").read_text()
    assert "dataset" not in yaml.safe_load(text) and "Name the data" in text


def shipped():
    return sorted(p for d in ("autost", "spikformer") for p in (ROOT / "configs" / d).glob("*.yaml"))


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.name)
def test_shipped_configs(path):
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(path.relative_to(ROOT).as_posix() in line for line in comment), "the command comes first"
    assert any("Cost:" in line for line in comment) and any("Paper:" in line for line in comment)
    if path.name.startswith("correlation"):
        config = correlation.CorrelationConfig.read(path)
        assert Space.of(config.space).size >= config.nets >= 20
        return
    if path.name.startswith(("table", "figure")):
        return  # a plan, see test_plan.py
    train = load("train")
    args = train.parse_args(["--config", str(path)])
    model = spikezoo.create_model(args.model, device="meta", **train.model_arguments(args))
    assert model.T == args.T
    if "cpu" in path.name:
        return
    # The recipes stand in the search as well, for the nets that it finds.
    recipe = search.RECIPE_IMAGENET if args.dataset == "imagenet" else search.RECIPE
    assert {key: getattr(args, key) for key in recipe} == recipe
    assert train.build_parser().get_default("lr") != recipe["lr"]


def test_there_are_shipped_configs():
    names = {path.name for path in shipped()}
    assert {"correlation.yaml", "correlation_small.yaml", "autost_tiny_cifar10_cpu.yaml"} <= names and len(names) > 10


# ----------------------------------------------------------------------------------------------------- correlation

EXPERIMENT = {
    "space": {"dims": [8, 16], "depths": [1, 2], "mlp_ratios": [1, 2], "heads": [1, 2]},
    "nets": 4,
    "T": 1,
    "dataset": "digits",
    "subset": 64,
    "test_subset": 50,
    "epochs": 2,
    "batch_size": 32,
    "lr": 0.01,
    "warmup_epochs": 0.5,
    "amp": False,
    "metrics": ["flops", "parameters", "synflow", "linear_regions"],
    "bootstrap": 50,
}


def experiment(**changes):
    return correlation.CorrelationConfig(**{**EXPERIMENT, **changes})


def numbers(folder):
    """The results of every net but the times."""
    found = []
    for path in sorted(folder.glob("net_*.json")):
        row = json.loads(path.read_text())
        found.append({k: v for k, v in row.items() if k not in ("train_seconds", "metric_seconds", "environment")})
    return found


def test_correlation_experiment_resumes_and_is_shared_out(tmp_path, monkeypatch):
    rows = correlation.correlate(experiment(), tmp_path / "whole")
    whole = numbers(tmp_path / "whole")
    assert [row["metric"] for row in rows] == EXPERIMENT["metrics"] and len(whole) == 4
    assert len({(row["dim"], *row["mlp_ratios"], *row["heads"]) for row in whole}) == 4
    for row in whole:
        assert len(row["train_losses"]) == 2 and row["samples"] == 50 and 0 <= row["top1"] <= 100
        assert (
            row["flops"]
            == search.cost(Net(row["dim"], tuple(row["mlp_ratios"]), tuple(row["heads"])), Setting(1, 10, 8, 1)).flops
        )
    for name in ("nets.csv", "correlation.csv", "correlation.png"):
        assert (tmp_path / "whole" / name).is_file()
    # Two processes that know nothing of each other, the first killed after one net.
    shared, train = tmp_path / "shared", correlation._train
    trained = []

    def failing(config, setting, net, *rest):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(net)
        return train(config, setting, net, *rest)

    monkeypatch.setattr(correlation, "_train", failing)
    with pytest.raises(KeyboardInterrupt):
        correlation.correlate(experiment(), shared, rank=0, world_size=2)
    trained.clear()
    monkeypatch.setattr(correlation, "_train", lambda c, s, net, *rest: trained.append(net) or train(c, s, net, *rest))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert correlation.correlate(experiment(), shared) is None and len(trained) == 2
    monkeypatch.setenv("RANK", "0")
    resumed = correlation.correlate(experiment(), shared)
    assert len(trained) == 3 and numbers(shared) == whole and repr(resumed) == repr(rows)
    with pytest.raises(ValueError, match="holds another experiment: epochs is 3 and was 2"):
        correlation.correlate(experiment(epochs=3), shared)


def test_training_of_the_experiment_learns(tmp_path):
    config = experiment(nets=3, subset=600, epochs=9, test_subset=None, metrics=["flops"])
    setting = Setting(1, 10, 8, 1)
    found = correlation._train(config, setting, Net(32, (2,), (2,)), torch.device("cpu"), None, False)
    assert found["train_losses"][-1] < 0.8 * found["train_losses"][0] and found["top1"] > 40


def test_correlations_by_hand():
    # Ranks 1234 against 1324: five of six pairs agree, tau 4/6; rho 1 - 6 * 2 / 60. The reverse has the sign changed.
    rows = [
        {"top1": accuracy, "flops": value, "ntk": -value, "parameters": 1}
        for accuracy, value in zip((10, 20, 30, 40), (1, 3, 2, 4), strict=True)
    ]
    found = {row["metric"]: row for row in correlation.correlations(rows, ["flops", "ntk", "parameters"], 200, 0)}
    assert found["flops"]["kendall"] == pytest.approx(2 / 3) and found["flops"]["spearman"] == pytest.approx(0.8)
    assert found["ntk"]["kendall"] == pytest.approx(-2 / 3) and not found["ntk"]["higher_is_better"]
    assert math.isnan(found["parameters"]["kendall"])
    assert found["flops"]["kendall_low"] <= found["flops"]["kendall"] <= found["flops"]["kendall_high"] <= 1
    assert "+0.67" in correlation.correlation_table([found["flops"]])
    # Twice as many nets in the same order: a narrower interval.
    many = [{"top1": i, "flops": i + (i % 3)} for i in range(60)]
    few = correlation.correlations(many[:12], ["flops"], 300, 0)[0]
    wide = correlation.correlations(many, ["flops"], 300, 0)[0]
    assert wide["kendall_high"] - wide["kendall_low"] < few["kendall_high"] - few["kendall_low"]


def test_sample_is_seeded_and_keeps_the_window(monkeypatch):
    bounds = Constraints(parameters=(11e6, 12e6))
    nets = correlation.sample(SPACES["small"], 30, Setting(), bounds, 0)
    assert len(set(nets)) == 30 and nets == correlation.sample(SPACES["small"], 30, Setting(), bounds, 0)
    assert nets != correlation.sample(SPACES["small"], 30, Setting(), bounds, 1)
    assert all(bounds.allow(search.cost(net, Setting())) for net in nets)
    few = Space("few", (8,), (1,), (1, 2), (1,))
    with pytest.raises(ValueError, match="has 2 nets inside the window, and 3 are asked for"):
        correlation.sample(few, 3, Setting(), Constraints(), 0)
    # A window of 2^15 nets, the largest, that one random net in 10^11 hits: said, not waited for.
    monkeypatch.setattr(correlation, "RANDOM_DRAWS", 100)
    most = search.exact(SPACES["base"], "parameters", top=1).found[0]
    assert most.nets == 2**15
    with pytest.raises(ValueError, match="hardly hit the window: 0 of the 3 that are asked for were found, of 32,768"):
        correlation.sample(SPACES["base"], 3, Setting(), Constraints(parameters=(most.parameters, math.inf)), 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", "Unknown key 'epoch' .*Did you mean 'epochs'"),
        ("nets: 2", "nets=2: expected an integer of at least 3"),
        ("epochs: 1.5", "epochs=1.5: expected an integer"),
        ("lr: -1", "lr=-1: expected a number of at least 0"),
        ("metrics: [flop]", "Unknown metric 'flop'"),
        ("metrics: flops", "metrics='flops': expected a list of flops, "),
        ("metrics: []", r"metrics=\[\]: expected a list"),
        ("[", "is not valid YAML"),
    ],
)
def test_bad_experiments(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        correlation.CorrelationConfig.read(path)


def test_experiment_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "x.yaml"
    changes = {"nets": 3, "epochs": 1, "lr": "1e-2", "metrics": ["flops", "parameters"]}
    path.write_text(yaml.safe_dump({**EXPERIMENT, **changes}))
    call = ["--config", str(path), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert correlation.main(call) == 0
    assert "Kendall" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"y\.yaml"):
        correlation.main(["--config", str(tmp_path / "y.yaml"), "--output", str(tmp_path)])
