"""Tests of the counters: hand arithmetic, brute force over loops, the papers' figures, SpikingJelly and fvcore."""

import contextlib
import itertools
import json
import math
import random
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import spikezoo
from spikezoo.counting import count, count_loader, rules


def spikes(*shape, rate=0.3):
    return (torch.rand(shape) < rate).float()


def total(c):
    """Operations of the whole batch, as the integers that they must be."""
    value = c.sops_exact * c.images
    assert abs(value - round(value)) < 1e-6
    return round(value)


def run(function):
    """A module that is one function."""
    module = nn.Module()
    module.forward = function
    return module


# ------------------------------------------------------------------------------------------------ hand arithmetic


def test_one_spike_in_the_corner_the_edge_and_the_middle():
    conv = nn.Conv2d(1, 5, 3, padding=1, bias=False)
    for position, meets in (((0, 0), 4), ((0, 2), 6), ((2, 2), 9)):
        x = torch.zeros(1, 1, 5, 5)
        x[(0, 0, *position)] = 1
        c = count(conv, x)
        assert c.sops_exact == 5 * meets
        assert c.macs == 5 * 9 * 25
        assert c.sops_paper == pytest.approx(5 * 9)  # rate 1/25 of 25 positions
        assert c.by_module["Conv2d"].input == "spikes"
        assert not c.uncounted


def test_analog_input_is_dense_up_to_its_border_and_spikes_are_not():
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    x = torch.randn(1, 1, 4, 4)
    x[0, 0, 1] = 0  # black pixels are multiplied as others are
    c = count(conv, x)
    assert (c.macs, c.macs_exact, c.sops_exact) == (9 * 16, 9 * 16, 0)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = 0
    assert count(conv, x).macs_exact == 8 * 16
    # Along an axis of 4 positions a kernel of 3 meets 3 * 4 - 2 of them; the zero weight meets 3 * 3 positions.
    assert count(conv, torch.ones(1, 1, 4, 4)).sops_exact == 10 * 10 - 3 * 3


def test_two_by_two_maps_where_the_folk_formula_is_off():
    c = count(nn.Conv2d(8, 8, 3, padding=1), torch.ones(2, 8, 2, 2))
    assert c.sops_exact == 8 * 8 * 4 * 4  # each of 4 positions meets 2x2 of the kernel
    assert c.sops_paper == 8 * 8 * 9 * 4
    assert c.sops_exact / c.sops_paper == pytest.approx(4 / 9)


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (nn.Conv2d(2, 4, 3, stride=2), 2 * 4 * (4 * 9)),  # 5x5 -> 2x2 windows of 9
        (nn.Conv2d(2, 4, 3, dilation=2), 2 * 4 * (1 * 9)),  # one window
        (nn.Conv2d(2, 4, 3, groups=2), 2 * 2 * (9 * 9)),
        (nn.Conv2d(2, 4, 1, stride=2), 2 * 4 * 9),
        (nn.ConvTranspose2d(2, 4, 2, stride=2), 2 * 4 * 4 * 25),  # every input meets the whole kernel
        (nn.ConvTranspose2d(2, 4, 3, padding=1), 2 * 4 * (9 * 9 + 4 * 3 * 6 + 4 * 4)),
        (nn.Conv2d(2, 4, (1, 5)), 2 * 4 * (5 * 5)),
    ],
)
def test_stride_dilation_groups_transposed(conv, expected):
    assert count(conv, torch.ones(3, 2, 5, 5)).sops_exact == expected


def test_linear_and_zero_weights():
    linear = nn.Linear(4, 3)
    x = torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 0]])
    c = count(linear, x)
    assert (c.sops_exact, c.macs, c.images) == (9 / 2, 12, 2)
    assert c.sops_paper == pytest.approx(3 / 8 * 12)
    with torch.no_grad():
        linear.weight[0, 2] = linear.weight[1, 1] = 0  # the first is met twice, the second never
    c = count(linear, x)
    assert c.sops_exact == 7 / 2
    assert c.sops_paper == pytest.approx(3 / 8 * 12)  # no credit on paper
    assert c.by_module["Linear"].zero_weights == 2 and c.by_module["Linear"].weights == 12


def test_kinds_of_spikes():
    linear = nn.Linear(4, 3)
    base = torch.tensor([[1.0, 0, 1, 0]])
    for x, kind, events in (
        (base, "spikes", 2),
        (base * torch.tensor([3.0, 1, 2, 1]), "integer spikes", 5),
        (base * 0.25, "scaled spikes (c=1/4)", 2),
        (torch.tensor([[0.5, 0.75, 0.25, 0]]), "scaled spikes (c=1/4)", 6),
        (torch.tensor([[0.5, 0.75, 0, 0]]), "scaled spikes (c=1/4)", 5),  # the constant does not occur
        (torch.tensor([[1 / 3, 2 / 3, 0, 0]]), "scaled spikes (c=1/3)", 3),
        (base * torch.tensor([-1.0, 1, 1, 1]), "signed spikes", 2),
        (base * 0, "spikes", 0),
    ):
        c = count(linear, x)
        assert (c.by_module["Linear"].input, c.sops_exact) == (kind, 3 * events)
        assert c.macs_exact == 0
    assert count(linear, base * 0).silent == ["Linear"]
    c = count(linear, torch.tensor([[0.1, 0.7, 0.33, 0.2]]))
    assert (c.by_module["Linear"].input, c.sops_exact, c.macs_exact, c.macs_paper) == ("analog", 0, 12, 12)
    c = count(linear, base, inputs="analog")
    assert (c.by_module["Linear"].input, c.macs_exact) == ("analog", 12)
    net = nn.Sequential(run(lambda x: x.clone().unsqueeze(0)), linear)
    assert count(net, base, inputs="analog").by_module["1"].input == "analog"


def test_analog_input_earns_credit_for_pruned_and_binary_weights():
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    x = torch.randn(2, 3, 8, 8)
    dense = 3 * 4 * 9 * 64
    with torch.no_grad():
        conv.weight[0] = 0
    c = count(conv, x)
    assert (c.macs, c.macs_paper, c.macs_exact, c.sops_exact) == (dense, dense, dense * 3 / 4, 0)
    assert c.energy_exact_mj == pytest.approx(4.6e-9 * dense * 3 / 4)
    with torch.no_grad():
        conv.weight.copy_(0.02 * conv.weight.sign())
    c = count(conv, x)
    assert (c.macs_paper, c.macs_exact, c.sops_exact) == (dense, 0, dense * 3 / 4)
    assert c.by_module["Conv2d"].input == "analog x binary weights"


def test_pooling_of_spikes():
    x = torch.ones(1, 2, 4, 4)
    assert count(nn.AvgPool2d(2), x).sops_exact == 32
    assert count(nn.MaxPool2d(2), x).sops_exact == 32
    assert count(nn.MaxPool2d(3, 2, 1), x).sops_exact == 2 * 25  # windows 2+3 long along each axis
    assert count(nn.AvgPool2d(3, 1), x).sops_exact == 2 * 4 * 9
    assert count(nn.AdaptiveAvgPool2d(1), x).sops_exact == 32
    assert count(nn.AdaptiveAvgPool2d(3), x).sops_exact == 2 * 6 * 6
    c = count(nn.MaxPool2d(2), torch.randn(1, 2, 4, 4))
    assert (c.sops_exact, c.macs_exact, c.uncounted) == (0, 0, {})


def test_average_pooled_spikes_count_as_the_spikes_that_were_pooled():
    net = nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(1, 2, 1))
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, :3] = 1  # windows hold 2 and 1: 0.5 and 0.25
    c = count(net, x)
    assert c.by_module["2"].input == "scaled spikes (c=1/4)"
    assert c.by_module["1"].sops_exact == 3 and c.by_module["2"].sops_exact == 3 * 2
    assert c.sops_pooling == 3
    assert c.sops_paper == pytest.approx(3 / 16 * 8)  # the rate before the pooling
    # The constant comes from the pooling, so that it does not depend on which values occur, or on the batch.
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, :2] = 1
    assert count(net, x).by_module["2"].input == "scaled spikes (c=1/4)"
    assert count(net, x).by_module["2"].sops_exact == 2 * 2


def test_windows_of_unequal_size_are_not_a_constant():
    net = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), nn.Conv2d(1, 2, 1))
    assert count(net, spikes(1, 1, 5, 5)).by_module["1"].input == "analog"
    assert count(net, spikes(1, 1, 4, 4)).by_module["1"].input == "scaled spikes (c=1/4)"


def test_shared_modules_repeated_calls_and_batch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.same = self.conv

        def forward(self, x):
            return self.conv(x) + self.same(x)

    x = torch.ones(1, 2, 3, 3)
    once = 2 * 2 * (9 + 4 * 6 + 4 * 4)
    c = count(Net(), x)
    assert c.sops_exact == 2 * once and c.macs == 2 * 2 * 2 * 81
    assert list(c.by_module) == ["conv"] and c.by_module["conv"].calls == 2 and c.by_module["conv"].weights == 36
    assert count(Net(), x.repeat(7, 1, 1, 1)).sops_exact == 2 * once


def test_time_steps():
    net = spikezoo.create_model("test_spiking_vgg", T=3)
    x = torch.randn(2, 3, 32, 32)
    c = count(net, x)
    twin = count(spikezoo.create_model("test_spiking_vgg", neuron="relu"), x)
    stem, head = c.by_module["stem.0.conv"], c.by_module["head.fc"]
    assert stem.macs == stem.macs_exact == 3 * 4 * 9 * 1024  # once, T or not
    assert c.macs_exact == c.macs_paper == stem.macs
    assert head.macs == 160
    assert c.macs == stem.macs + head.macs + 3 * (twin.macs - stem.macs - head.macs)
    assert c.macs_step == twin.macs == twin.macs_exact
    assert c.T == 3 and c.firing_rates["stem.0.neuron"].neurons == 4 * 32 * 32
    # Law: paper is the rate of the neuron before x T x MACs of a step, of the head too.
    rate = c.firing_rates["stem.0.neuron"].mean
    first = c.by_module["stages.0.0.conv"]
    assert first.rate == pytest.approx(rate)
    assert first.sops_paper == pytest.approx(rate * 3 * 4 * 6 * 9 * 1024)
    rate = c.firing_rates["neck.0.neuron"].mean
    assert head.sops_paper == pytest.approx(rate * 3 * 160)
    assert head.sops_exact == pytest.approx(rate * 3 * 16 * 10)  # each spike that arrived, once a class
    assert c.percent_of_ann_exact == pytest.approx(100 * c.energy_exact_mj / twin.energy_exact_mj)
    assert not c.uncounted and not twin.uncounted


def test_event_frames_are_spikes():
    net = spikezoo.create_model("test_spiking_vgg", in_chans=2)
    c = count(net, torch.poisson(torch.full((2, 6, 2, 32, 32), 0.2)))
    assert c.T == 6 and c.by_module["stem.0.conv"].input == "integer spikes"
    assert c.macs_exact == 0 and len(c.firing_rates["stem.0.neuron"].rates) == 6


# ---------------------------------------------------------------------------------------------------- brute force


def loops(x, w, stride, padding, dilation, groups, transposed):
    """Synaptic operations of a 2-d convolution, one event and one weight at a time."""
    x, w = x.tolist(), w.tolist()
    height, width = len(x[0][0]), len(x[0][0][0])
    kernel = len(w[0][0]), len(w[0][0][0])
    if transposed:
        out = [
            (s - 1) * stride - 2 * padding + dilation * (k - 1) + 1
            for s, k in zip((height, width), kernel, strict=True)
        ]
    else:
        out = [
            (s + 2 * padding - dilation * (k - 1) - 1) // stride + 1
            for s, k in zip((height, width), kernel, strict=True)
        ]
    channels = len(x[0])
    per_in = channels // groups
    operations = 0
    for image in x:
        for c in range(channels):
            for i, j in itertools.product(range(height), range(width)):
                events = abs(image[c][i][j])
                if not events:
                    continue
                for ky, kx in itertools.product(range(kernel[0]), range(kernel[1])):
                    places = []
                    for position, k, size in ((i, ky, out[0]), (j, kx, out[1])):
                        if transposed:
                            o = position * stride - padding + k * dilation
                        else:
                            o, rest = divmod(position + padding - k * dilation, stride)
                            o = -1 if rest else o
                        places.append(0 <= o < size)
                    if not all(places):
                        continue
                    if transposed:
                        met = sum(weights[ky][kx] != 0 for weights in w[c])
                    else:
                        group = len(w) // groups
                        first = c // per_in * group
                        met = sum(w[o][c % per_in][ky][kx] != 0 for o in range(first, first + group))
                    operations += events * met
    return round(operations)


@pytest.mark.parametrize("seed", range(160))
def test_convolutions_equal_loops(seed):
    rng = random.Random(seed)
    while True:
        groups, transposed = rng.choice((1, 1, 2)), rng.random() < 0.3
        stride, padding, dilation, kernel = rng.randint(1, 3), rng.randint(0, 2), rng.randint(1, 2), rng.randint(1, 3)
        size = rng.randint(2, 6), rng.randint(2, 6)
        smallest = min(size) + 2 * padding - dilation * (kernel - 1)
        grown = (min(size) - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
        if (grown if transposed else smallest) >= 1:
            break
    chans, outs = groups * rng.randint(1, 2), groups * rng.randint(1, 3)
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(
        chans, outs, kernel, stride, padding, groups=groups, dilation=dilation, bias=rng.random() < 0.5
    )
    with torch.no_grad():
        layer.weight.mul_(spikes(*layer.weight.shape, rate=rng.choice((0.2, 0.6, 1))))
    top = rng.choice((1, 1, 3))
    x = torch.randint(0, top + 1, (rng.randint(1, 3), chans, *size)).float()
    if rng.random() < 0.3:
        x *= torch.randint(0, 2, x.shape) * 2 - 1
    c = count(layer, x)
    assert total(c) == loops(x, layer.weight, stride, padding, dilation, groups, transposed)
    assert c.macs_exact == 0 and not c.uncounted


@pytest.mark.parametrize("seed", range(60))
def test_products_equal_loops(seed):
    rng = random.Random(seed)
    n, m, k, j = (rng.randint(1, 4) for _ in range(4))
    a, b = torch.randint(0, 3, (n, m, k)).float(), torch.randint(0, 2, (n, k, j)).float()
    case = seed % 3
    if case == 0:  # spikes x spikes, by value
        c = count(run(lambda x: x @ (x[:, :1, :1] * 0 + b)), a)
        expected = (a.long() @ b.long()).sum().item()
    elif case == 1:  # linear over tokens
        w = torch.randn(j, k) * spikes(j, k, rate=0.6)
        layer = nn.Linear(k, j, bias=rng.random() < 0.5)
        with torch.no_grad():
            layer.weight.copy_(w)
        c = count(layer, a)
        expected = sum(
            round(a[i, r, s].item()) for i, r, s, o in itertools.product(*map(range, (n, m, k, j))) if w[o, s] != 0
        )
    else:  # weights on the left
        w = torch.randn(j, m) * spikes(j, m, rate=0.6)
        c = count(run(lambda x: w @ x), a)
        expected = sum(
            round(a[i, r, s].item()) for i, r, s, o in itertools.product(*map(range, (n, m, k, j))) if w[o, r] != 0
        )
    assert total(c) == expected
    assert c.macs == m * k * j and not c.uncounted


@pytest.mark.parametrize("seed", range(20))
def test_poolings_equal_loops(seed):
    rng = random.Random(seed)
    kernel, stride = rng.randint(1, 3), rng.randint(1, 3)
    padding, ceil = rng.randint(0, kernel // 2), rng.random() < 0.5
    x = torch.randint(0, 3, (2, 2, rng.randint(3, 7), rng.randint(3, 7))).float()
    layer = rng.choice((nn.AvgPool2d, nn.MaxPool2d))(kernel, stride, padding, ceil_mode=ceil)
    out = layer(x).shape[-2:]
    expected = 0
    for i, j in itertools.product(*map(range, out)):
        top, left = i * stride - padding, j * stride - padding
        expected += x[:, :, max(top, 0) : max(top + kernel, 0), max(left, 0) : max(left + kernel, 0)].sum()
    assert total(count(layer, x)) == expected


def test_exact_beyond_what_float32_holds():
    net = nn.Sequential(run(lambda x: (x > 0).float() + 1000), nn.Linear(1, 1))
    assert total(count(net, torch.ones(40_001, 1))) == 40_001 * 1001  # odd, and above 2^24


# ------------------------------------------------------------------------------------------- attention products


class Attention(nn.Module):
    """Spikformer's product: binary q, k, v; q k^T v, scaled, over tokens."""

    def __init__(self, width, scale=0.125):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.scale = scale

    def forward(self, x):  # [N, tokens, width]
        q, k, v = (F.relu(layer(x).sign()) for layer in (self.q, self.k, self.v))
        self.kept = q, k, v
        return (q @ k.transpose(-2, -1)) * self.scale @ v


@pytest.mark.parametrize("scale", [0.125, 0.3])
def test_attention_products(scale):
    net, x = Attention(6, scale), spikes(3, 5, 6)
    c = count(net, x)
    q, k, v = (t.long() for t in net.kept)
    expected = (q @ k.transpose(1, 2)).sum() + (q @ k.transpose(1, 2) @ v).sum()
    own = c.by_module["Attention"]
    assert round(own.sops_exact * 3) == expected
    assert own.macs == 2 * 5 * 5 * 6 and own.macs_exact == 0
    assert own.input.startswith("spikes x spikes + spikes x scaled spikes (c=")
    # Each product on paper: the rate of its binary operand x MACs.
    rates = q.float().mean() + v.float().mean()
    assert own.sops_paper == pytest.approx(float(rates) * 150, rel=1e-6)
    assert c.macs == 150 * 2 + 3 * 5 * 36 and not c.uncounted


def test_four_dimensional_heads_and_einsum():
    x = spikes(2, 3, 4, 5)
    square = (x.transpose(-2, -1) @ x).sum().item()
    assert total(count(run(lambda x: x.transpose(-2, -1) @ x), x)) == square
    assert total(count(run(lambda x: torch.einsum("bhnc,bhnd->bhcd", x, x)), x)) == square


def test_softmax_attention_is_macs_or_listed():
    net = run(lambda x: F.scaled_dot_product_attention(x, x, x))
    c = count(net, torch.randn(2, 4, 5, 8))
    assert c.macs_exact == 2 * 4 * 5 * 5 * 8 or c.uncounted
    c = count(run(lambda x: x.softmax(-1)), torch.randn(2, 4))
    assert list(c.uncounted) == ["aten._softmax.default"]


# ---------------------------------------------------------------------------------------- the papers' figures


@pytest.mark.parametrize(
    ("name", "macs", "energy"),
    [
        ("spiking_vgg11", 209_979_904, 0.966),
        ("spiking_vgg9", 153_881_088, 0.708),
        ("spiking_resnet19", 2_216_495_616, 10.196),
    ],
)
def test_ann_figures_of_the_ticket_papers(name, macs, energy):
    net = spikezoo.create_model(name, neuron="relu")
    x = torch.randn(1, 3, 32, 32)
    c = count(net, x)
    assert c.macs == c.macs_exact == c.macs_step == macs
    assert round(c.energy_exact_mj, 3) == round(c.energy_paper_mj, 3) == energy
    if name == "spiking_resnet19":
        c = count(net, x, norm_ops=4)
        assert round(c.energy_exact_mj, 3) == round(c.energy_ann_mj, 3) == 10.225


@pytest.mark.parametrize(
    ("name", "size", "macs", "stem"),
    [
        ("mpbn_resnet20", 32, 215_684_096, 1_769_472),
        ("mpbn_resnet19", 32, 2_285_245_440, 3_538_944),
        ("mpbn_vgg16", 32, 313_201_664, 1_769_472),
        ("mpbn_resnet18", 224, 1_814_073_344, 118_013_952),
        ("mpbn_resnet34", 224, 3_663_761_408, 118_013_952),
    ],
)
def test_macs_of_the_mpbn_nets(name, size, macs, stem):
    c = count(spikezoo.create_model(name, T=1, neuron="relu", mpbn="none"), torch.randn(1, 3, size, size))
    assert (c.macs, c.by_module["stem.0.conv"].macs, c.uncounted) == (macs, stem, {})


@pytest.mark.parametrize(
    ("name", "size", "macs"), [("mpbn_resnet20", 48, 483_955_712), ("mpbn_resnet19", 48, 5_139_141_632)]
)
def test_macs_of_the_event_nets(name, size, macs):
    net = spikezoo.create_model(name, in_chans=2, img_size=size)
    c = count(net, torch.poisson(torch.full((1, 2, 2, size, size), 0.1)))
    steps = {layer: m.macs_step for layer, m in c.by_module.items()}
    assert sum(steps.values()) == c.macs_step == macs


@pytest.mark.parametrize("name", ["test_mpbn_resnet", "test_spiking_resnet", "test_spiking_vgg", "test_mpbn_vgg"])
def test_dense_macs_equal_fvcore_and_torch(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        net = spikezoo.create_model(name).eval()
        x = torch.randn(2, 3, 32, 32)
        analysis = FlopCountAnalysis(net, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        by_module = {
            layer: sum(number for op, number in ops.items() if op in ("conv", "linear"))  # it counts norms too
            for layer, ops in analysis.by_module_and_operator().items()
        }
    c = count(net, x)
    assert by_module[""] == 2 * c.macs
    for layer, module in c.by_module.items():
        if layer in by_module and module.macs:
            assert by_module[layer] == 2 * module.macs, layer
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        net(x)
    assert flops.get_total_flops() == 2 * 2 * c.macs


# ------------------------------------------------------------------------------------------------- SpikingJelly


def spikingjelly(net, x):
    from spikingjelly.activation_based.op_counter import DispatchCounterMode, SynOpCounter

    counter = SynOpCounter()
    with torch.no_grad(), DispatchCounterMode([counter]):
        net(x)
    return counter.get_total()


@pytest.mark.parametrize("pruned", [0.0, 0.9])
def test_equal_to_spikingjelly_and_lower_by_the_pruned_share(pruned):
    for layer, x in (
        (nn.Conv2d(8, 8, 3, padding=1), spikes(2, 8, 6, 6)),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), spikes(2, 4, 9, 9)),
        (nn.Linear(20, 7), spikes(5, 20)),
    ):
        with torch.no_grad():
            keep = spikes(*layer.weight.shape, rate=1 - pruned) if pruned else torch.ones_like(layer.weight)
            layer.weight.mul_(keep)
            # Operations through pruned weights, by the same events and weights of one where they were pruned.
            ones = (1 - keep).to(layer.weight)
            if isinstance(layer, nn.Conv2d):
                gone = F.conv2d(x, ones, None, layer.stride, layer.padding, 1, layer.groups).sum().item()
            else:
                gone = F.linear(x, ones).sum().item()
        assert (gone > 0) == (pruned > 0)
        assert spikingjelly(layer, x) - total(count(layer, x)) == gone


def test_whole_net_equal_to_spikingjelly_where_every_input_is_binary():
    net = spikezoo.create_model("test_spiking_vgg", T=2).eval()
    x = torch.randn(2, 3, 32, 32)
    c = count(net, x)
    # Its counter has neither pooling nor averaged spikes.
    ours = sum(m.sops_exact for m in c.by_module.values() if m.input == "spikes" and m.macs)
    assert ours * 2 == spikingjelly(net, x) > 0


def test_neurons_of_spikingjelly():
    from spikingjelly.activation_based import functional, layer, neuron

    net = nn.Sequential(
        layer.Conv2d(3, 4, 3, padding=1, step_mode="m"),
        neuron.LIFNode(step_mode="m"),
        layer.Conv2d(4, 2, 3, step_mode="m"),
    )
    c = count(net, 3 * torch.randn(3, 2, 3, 8, 8))
    functional.reset_net(net)
    assert c.by_module["2"].input == "spikes" and c.by_module["2"].sops_exact > 0
    assert len(c.firing_rates["1"].rates) == 3
    with pytest.raises(ValueError, match="time first"):  # a loader's batches are cut along the batch
        count_loader(net, [torch.randn(3, 2, 3, 8, 8)], piece=3)


def jelly(mode, order, once):
    """Conv, norm, LIF, conv of SpikingJelly: time ahead of the batch, behind it, or made of an image; in a loop or not.

    ``once``: the first convolution sees an image once.
    """
    from spikingjelly.activation_based import layer, neuron

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = layer.Conv2d(3, 8, 3, padding=1, bias=False, step_mode="s" if once else mode)
            self.norm = layer.BatchNorm2d(8, step_mode=mode)
            self.neuron = neuron.LIFNode(step_mode=mode)
            self.conv = layer.Conv2d(8, 4, 3, padding=1, bias=False, step_mode=mode)

        def forward(self, x):
            if order == "BT":
                x = x.transpose(0, 1)
            if order == "image":
                x = (self.stem(x) if once else x)[None].repeat(4, 1, 1, 1, 1)

            def layers(x):
                return self.conv(self.neuron(self.norm(x if once else self.stem(x))))

            return (torch.stack([layers(step) for step in x]) if mode == "s" else layers(x)).mean(0)

    return Net()


@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize("order", ["TB", "BT", "image", "image once"])
@pytest.mark.parametrize("B", [2, 3, 4])
def test_time_of_spikingjelly_is_not_the_batch(mode, order, B):
    order, _, once = order.partition(" ")
    shape = {"TB": (4, B, 3, 8, 8), "BT": (B, 4, 3, 8, 8), "image": (B, 3, 8, 8)}[order]
    c = count(jelly(mode, order, once), torch.randn(shape), norm_ops=1)
    stem, conv = 3 * 8 * 9 * 64, 8 * 4 * 9 * 64
    assert (c.images, c.T, c.macs_step) == (B, 4, stem + conv)
    assert c.macs == stem * (1 if once else 4) + conv * 4
    assert c.norm_ops == 4 * 8 * 64 and c.energy_ann_mj == pytest.approx(4.6e-9 * (stem + conv + 8 * 64))
    assert len(c.firing_rates["neuron"].rates) == 4 and c.firing_rates["neuron"].neurons == 8 * 64
    assert c.memory_bytes == 4 * (8 * 27 * (1 if once else 4) + 4 * 72 * 4) + 4 * 2 * 4 * 8 * 64


def test_results_are_short_to_print_and_tables_in_notebooks():
    net = spikezoo.create_model("test_spiking_vgg", T=3)
    summary = count_loader(net, [torch.randn(2, 3, 32, 32)])
    c = summary.mean
    assert "T=3" in repr(c) and f"{c.energy_exact_mj:.4g} mJ" in repr(c) and "NOT COUNTED" not in repr(c)
    for result in (c, summary, *c.by_module.values(), *c.firing_rates.values()):
        assert len(repr(result)) < 350 and "\n" not in repr(result)
    page = summary._repr_html_()
    assert page.count("<table>") == page.count("</table>") == 2 and all(f">{name}</td>" in page for name in c.by_module)
    weights = nn.Linear(3, 2).weight
    odd = count(run(lambda x: torch.cdist(x, weights)), torch.randn(2, 3))
    assert "1 OPERATIONS NOT COUNTED" in repr(odd)
    said = repr(net).splitlines()[1]
    assert "T=3" in said and "encoding=direct" in said and "neuron=lif" in said and "test_spiking_vgg" in said
    assert said.strip() in net._repr_html_()


# ------------------------------------------------------------------------------------ what must not change counts


def fields(c):
    return {k: v for k, v in c.to_dict().items() if k not in ("images", "by_module")}


def test_independent_of_modes_batch_size_and_compilation():
    net = spikezoo.create_model("test_mpbn_resnet", widths=(8, 12), depths=(1, 1), strides=(1, 2))
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, 3, 32, 32))  # running statistics of their own
    x = torch.randn(4, 3, 32, 32)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    before = fields(count(net, x))
    assert net.training and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert before["sops_exact"] > 0
    with torch.inference_mode():
        assert fields(count(net, x)) == before
        assert fields(count(net, x.clone())) == before  # made in inference mode
    with torch.no_grad():
        assert fields(count(net, x)) == before
    net.eval()
    assert fields(count(net, x)) == before
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        compiled(x)
    assert fields(count(compiled, x)) == before
    wrapped = nn.Sequential(torch.compile(net, backend="eager"))
    assert count(wrapped, x).sops_exact == before["sops_exact"]
    assert fields(count(net, x.to(memory_format=torch.channels_last))) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    parts = [count(net, image[None]) for image in x]
    for key in ("macs", "sops_exact", "sops_paper", "energy_exact_mj", "energy_paper_mj"):
        assert sum(getattr(p, key) for p in parts) / 4 == pytest.approx(before[key], rel=1e-12)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        net = spikezoo.create_model("test_spiking_vgg")
        x = torch.randn(2, 3, 32, 32)
        c = count(net, x)
    assert c.sops_exact > 0 and not c.uncounted and c.macs > 0


def test_half_precision_counts_whole_operations():
    layer, x = nn.Conv2d(3, 4, 3).bfloat16(), spikes(2, 3, 8, 8)
    expected = F.conv2d(x, torch.ones(4, 3, 3, 3)).sum().item()
    assert total(count(layer, x.bfloat16())) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_same_on_a_gpu():
    layer, x = nn.Conv2d(3, 4, 3), spikes(2, 3, 8, 8)
    expected = count(layer, x)
    assert count(layer.cuda(), x.cuda()) == expected


@pytest.mark.parametrize("neuron", ["lif", "if", "plif", "sign", "relu"])
@pytest.mark.parametrize("name", ["test_mpbn_resnet", "test_spiking_vgg"])
def test_every_neuron_is_followed(name, neuron):
    net = spikezoo.create_model(name, neuron=neuron, mpbn="none")
    c = count(net, torch.randn(2, 3, 32, 32))
    kinds = {m.input for layer, m in c.by_module.items() if "conv" in layer and layer != "stem.0.conv"}
    assert not c.uncounted
    assert ("analog" in kinds) == (neuron == "relu"), kinds
    assert c.by_module["stem.0.conv"].input == "analog"
    if neuron == "sign":
        assert all("signed" in kind for kind in kinds)
        # No sign activation is ever silent: the papers charge a network of them as the ANN.
        assert c.energy_paper_mj == pytest.approx(c.energy_ann_mj) and c.sops_paper == 0


def test_binary_activations_cost_what_the_paper_prints():
    # BinW-SLT, table 2: BNN-BinAct of VGG-11 at 0.966 mJ an image, which is 4.6 pJ times 209,979,904 MACs.
    net = spikezoo.create_model("spiking_vgg11", neuron="sign", ticket={"kind": "mplt"})
    assert count(net, torch.randn(1, 3, 32, 32)).energy_paper_mj == pytest.approx(4.6e-9 * 209_979_904)
    # Ternary spikes, -1, 0 and 1, are not of them: what is silent costs nothing.
    ternary = nn.Sequential(run(lambda x: x.sign() * (x.abs() > 1)), nn.Linear(8, 3))
    assert 0 < count(ternary, torch.randn(64, 8)).sops_paper < 24


@pytest.mark.parametrize("transform", [spikezoo.fold_bn, spikezoo.fold_mpbn])
def test_folded_models(transform):
    net = spikezoo.create_model("test_mpbn_resnet").eval()
    x = torch.randn(2, 3, 32, 32)
    folded = count(transform(net), x)
    assert folded.macs == count(net, x).macs and not folded.uncounted
    if transform is spikezoo.fold_mpbn:
        assert folded.sops_exact == count(net, x).sops_exact


def test_straight_through_estimators_and_filled_buffers_are_spikes():
    soft = run(lambda x: (x > 0).float() - x.sigmoid() + x.sigmoid())
    assert count(nn.Sequential(soft, nn.Linear(8, 3)), torch.randn(4, 8)).by_module["1"].input == "spikes"

    def fill(x):
        out = torch.zeros(2, *x.shape)
        for t in range(2):
            out[t] = (x > t).float()
        return out

    c = count(nn.Sequential(run(fill), nn.Linear(8, 3)), torch.randn(4, 8))
    assert c.by_module["1"].input == "spikes"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s + s, "integer spikes"),
        (lambda s: s.add_(1), "integer spikes"),
        (lambda s: s * 0.5, "scaled spikes (c=1/2)"),
        (lambda s: s.mul_(3), "scaled spikes (c=3)"),
        (lambda s: s - 1, "signed spikes"),
        (lambda s: s.clone().masked_fill_(s > 0, 2.0), "integer spikes"),
        (lambda s: torch.where(s > 0, 1.0, 0.0), "spikes"),
        (lambda s: torch.cat([s[:, :4], s[:, 4:] * 0.25], 1), "scaled spikes (c=1/4)"),
        (lambda s: s.add_(0.3), "analog"),
        (lambda s: s * torch.linspace(0.1, 0.8, 8), "analog"),
        (lambda s: s * torch.tensor([0.0, 1] * 4), "spikes"),
        (lambda s: s.index_put_((torch.tensor([0]),), torch.tensor(2.0)), "integer spikes"),
        (lambda s: torch.stack(s.chunk(2, 1)).flatten(0, 0).permute(1, 0, 2).reshape(-1, 8), "spikes"),
    ],
)
def test_spikes_are_followed_through_free_operations(change, expected):
    x = torch.randn(6, 8)
    x[0, 0], x[0, 1] = 1, -1  # at least one spike and one silence
    c = count(nn.Sequential(run(lambda x: change((x > 0).float())), nn.Linear(8, 2)), x)
    assert c.by_module["1"].input == expected
    assert not c.uncounted


def test_computed_weights():
    class Ticket(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8))
            self.score = nn.Parameter(torch.randn(3, 8))

        def forward(self, x):
            return F.linear(x, self.weight.sign() * (self.score > 0))

    net, x = Ticket(), spikes(4, 8)
    c = count(net, x)
    assert total(c) == (x @ (net.score > 0).float().t()).sum().item()
    assert c.by_module["Ticket"].zero_weights == (net.score <= 0).sum()
    assert count(net, torch.randn(4, 8)).by_module["Ticket"].input == "analog x binary weights"


# ------------------------------------------------------------------------------------------------- rates, energy


def test_firing_rates_silent_and_saturated():
    net = spikezoo.create_model("test_spiking_vgg", T=4).eval()
    x = torch.randn(5, 3, 32, 32)
    c = count(net, x)
    seen = {}
    module = net.stem[0].neuron
    handle = module.register_forward_hook(lambda m, a, out: seen.update(out=out))
    with torch.no_grad():
        net(x)
    handle.remove()
    out = seen["out"]
    rate = c.firing_rates["stem.0.neuron"]
    assert rate.rates == pytest.approx(out.mean((1, 2, 3, 4)).tolist())
    assert rate.silent == (out.sum((0, 1)) == 0).sum() and rate.saturated == (out.sum((0, 1)) == 20).sum()
    expected = spikezoo.firing_rates(net, x)
    assert {k: v.rates for k, v in c.firing_rates.items()} == {
        k: pytest.approx(v.tolist()) for k, v in expected.items()
    }


def test_energy_and_options():
    net, x = spikezoo.create_model("test_spiking_vgg"), torch.randn(2, 3, 32, 32)
    c = count(net, x)
    assert c.energy_exact_mj == pytest.approx((4.6 * c.macs_exact + 0.9 * c.sops_exact) * 1e-9)
    assert c.energy_paper_mj == pytest.approx((4.6 * c.macs_paper + 0.9 * c.sops_paper) * 1e-9)
    assert c.energy_memory_mj is None
    other = count(net, x, mac_pj=1, sop_pj=0, pj_per_byte=2.0, neuron_ops=True, norm_ops=4)
    neurons = sum(r.neurons for r in c.firing_rates.values()) * 4
    assert other.neuron_ops == neurons
    assert other.energy_exact_mj == pytest.approx((c.macs_exact + neurons + other.norm_ops) * 1e-9)
    # Weights once a step (the stem and the head once), potentials of 4 bytes read and written.
    weights = {name: m.weights for name, m in c.by_module.items()}
    once = weights["stem.0.conv"] + weights["head.fc"]
    assert other.memory_bytes == 4 * (once + 4 * (sum(weights.values()) - once)) + 8 * neurons
    assert other.energy_memory_mj == pytest.approx(2e-9 * other.memory_bytes)


def test_uncounted_lists_what_has_no_rule():
    net = nn.Sequential(run(lambda x: torch.fft.rfft(x).real), nn.Conv2d(2, 3, 3))
    c = count(net, torch.randn(1, 2, 8, 8))
    assert c.uncounted == {"aten._fft_r2c.default": 1}
    assert "NOT COUNTED: aten._fft_r2c.default" in c.table()
    assert c.row()["uncounted"] == {"aten._fft_r2c.default": 1}
    net = run(lambda x: x @ (torch.ones(8, 2) @ torch.ones(2, 8)))
    assert list(count(net, torch.randn(1, 8)).uncounted) == ["aten.mm.default on weights only"]


def test_padding_by_repetition_and_masks_keep_spikes():
    for mode in ("reflect", "replicate", "circular"):
        conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode)
        x = torch.zeros(1, 1, 4, 4)
        x[0, 0, 1, 1] = 1
        net = nn.Sequential(run(lambda x: x > 0.5), run(lambda x: x.float() * 0.3), conv)
        c = count(net, x)
        padded = F.pad(x, (1, 1, 1, 1), mode=mode)
        assert total(c) == F.conv2d(padded, torch.ones(2, 1, 3, 3)).sum() and not c.uncounted
        assert c.by_module["2"].input.startswith("scaled spikes")
    mask = run(lambda x: (x > 0).float().tril())
    c = count(nn.Sequential(mask, nn.Linear(4, 3)), torch.ones(2, 4, 4))
    assert c.sops_exact == 10 * 3 and not c.uncounted


def test_what_is_added_to_a_product_of_weights_is_not_lost():
    net = nn.Sequential(run(lambda x: torch.addmm(x, torch.eye(2), torch.rand(2, 4))), nn.Linear(4, 3))
    c = count(net, torch.randn(2, 4))
    assert c.macs == 12 and list(c.uncounted) == ["aten.addmm.default on weights only"]


def test_a_loader_of_other_things():
    net = spikezoo.create_model("test_spiking_vgg", in_chans=2)
    frames = [torch.poisson(torch.full((1, steps, 2, 32, 32), 0.1)) for steps in (3, 5)]
    summary = count_loader(net, frames, images=2)
    assert summary.images == 2 and "firing rate of stem.0.neuron on a second shape" in summary.mean.uncounted
    for item in ({"image": frames[0]}, 3, [], torch.tensor(1.0)):
        with pytest.raises(ValueError, match="expected a tensor of images"):
            count_loader(net, [item])


def test_a_rule_cannot_hide_another():
    with pytest.raises(ValueError, match=r"aten\.mm has a rule already"):
        rules.register("product", "mm")(lambda *args: None)


def test_results_are_plain_data():
    c = count(spikezoo.create_model("test_spiking_vgg"), torch.randn(2, 3, 32, 32))
    again = json.loads(json.dumps(c.to_dict()))
    assert again["sops_exact"] == c.sops_exact
    assert again["by_module"]["head.fc"]["macs"] == 160
    assert "stem.0.conv" in c.table() and "Not counted: nothing." in c.table()
    json.dumps(c.row())


def test_averages_over_a_loader():
    net = spikezoo.create_model("test_spiking_vgg").eval()
    x = torch.randn(7, 3, 32, 32)
    labels = torch.zeros(7)
    loader = [(x[:4], labels[:4]), (x[4:], labels[4:])]
    summary = count_loader(net, loader, images=6)
    parts = [count(net, x[i : i + 1]) for i in range(6)]
    values = torch.tensor([p.sops_exact for p in parts], dtype=torch.float64)
    assert summary.images == summary.mean.images == 6
    assert summary.mean.sops_exact == pytest.approx(values.mean().item())
    assert summary.std["sops_exact"] == pytest.approx(values.std().item())
    assert summary.std["macs"] == 0
    whole = count(net, x[:6])
    assert summary.mean.firing_rates.keys() == whole.firing_rates.keys()
    for layer, rate in whole.firing_rates.items():  # silent over all images, not in one piece
        mine = summary.mean.firing_rates[layer]
        assert (mine.silent, mine.saturated) == (rate.silent, rate.saturated)
        assert mine.rates == pytest.approx(rate.rates)
    assert summary.mean.by_module["head.fc"] == whole.by_module["head.fc"]
    assert math.isnan(count_loader(net, loader, images=4, piece=4).std["macs"])
    with pytest.raises(ValueError, match="no images"):
        count_loader(net, [])
    with pytest.raises(ValueError, match="images=0"):
        count_loader(net, loader, images=0)


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("model", "batch", "options", "message"),
    [
        ("net", torch.randn(3, 32, 32), {}, "unsqueeze"),
        ("net", torch.randn(2, 5, 32, 32), {}, "in_chans=5"),
        ("net", torch.randn(0, 3, 32, 32), {}, "at least one image"),
        ("net", torch.zeros(2, 3, 32, 32, dtype=torch.uint8), {}, r"batch\.float"),
        ("net", [torch.zeros(2)], {}, "is a list"),
        ("conv", torch.randn(2, 7, 8, 8), {}, r"batch of shape \(2, 7, 8, 8\)"),
        ("timm", torch.randn(2, 3, 9, 9), {}, r"batch of shape \(2, 3, 9, 9\)"),
        ("none", torch.randn(2, 7), {}, "returned None"),
        ("text", torch.randn(2, 7), {}, "expected a torch module"),
        ("net", torch.randn(1, 3, 32, 32), {"mac_pj": -1}, "mac_pj=-1"),
        ("net", torch.randn(1, 3, 32, 32), {"sop_pj": math.nan}, "sop_pj=nan"),
        ("net", torch.randn(1, 3, 32, 32), {"sop_pj": "0.9"}, "sop_pj='0.9'"),
        ("net", torch.randn(1, 3, 32, 32), {"pj_per_byte": -1.0}, "pj_per_byte"),
        ("net", torch.randn(1, 3, 32, 32), {"norm_ops": -4}, "norm_ops"),
        ("net", torch.randn(1, 3, 32, 32), {"inputs": "spike"}, "inputs='spike'"),
    ],
)
def test_bad_input(model, batch, options, message):
    made = {
        "net": lambda: spikezoo.create_model("test_spiking_vgg"),
        "conv": lambda: nn.Conv2d(3, 4, 3),
        "timm": lambda: PatchEmbed(img_size=8, patch_size=4, embed_dim=2),
        "none": lambda: run(lambda x: None),
        "text": lambda: "spiking_vgg9",
    }[model]()
    with pytest.raises(ValueError, match=message):
        count(made, batch, **options)
    if isinstance(made, nn.Module):
        assert not any(module._forward_hooks for module in made.modules())


# ------------------------------------------------------------------------------------------------------- cost


def test_overhead():
    net, x = spikezoo.create_model("test_mpbn_resnet").eval(), torch.randn(32, 3, 32, 32)
    ratios = []
    for _ in range(6):
        with torch.no_grad():
            start = time.process_time()
            net(x)
        middle = time.process_time()
        count(net, x)
        ratios.append((time.process_time() - middle) / (middle - start))
    assert min(ratios) <= 4, ratios


# ------------------------------------------------------------------------------------------------ command line


def test_command_line(tmp_path, capsys):
    from spikezoo.cli import main

    assert main(["count", "test_spiking_vgg", "--dataset", "none", "--images", "2", "--T", "2"]) == 0
    text = capsys.readouterr().out
    assert "stem.0.conv" in text and "random weights" in text and "random noise" in text and "T=2" in text
    assert main(["count", "test_spiking_vgg", "--dataset", "none", "--images", "2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert main(["count", "test_spiking_vgg", "--dataset", "none", "--images", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["std"]["macs"] is None  # nan is not JSON
    assert row["model"] == "test_spiking_vgg" and row["count"]["images"] == 2 and row["std"]["macs"] == 0
    with contextlib.suppress(ImportError):
        import matplotlib  # noqa: F401

        picture = tmp_path / "bars.png"
        assert main(["count", "test_spiking_vgg", "--dataset", "none", "--images", "1", "--plot", str(picture)]) == 0
        assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_spiking_vgx"], "test_spiking_vgg"),
        (["test_spiking_vgg", "--dataset", "none", "--mac-pj", "-1"], "mac_pj"),
        (["test_spiking_vgg", "--dataset", "none", "--images", "0"], "--images 0"),
        (["test_spiking_vgg", "--dataset", "none", "--device", "abacus"], "Use --device cpu"),
    ],
)
def test_command_line_errors(arguments, message, capsys):
    from spikezoo.cli import main

    assert main(["count", *arguments]) == 2
    assert message in capsys.readouterr().err


class _Spikformer(nn.Module):
    """The CIFAR layout of Spikformer, convolutions, linear layers and products only."""

    def __init__(self, d, depth, ratio=4, heads=8):
        super().__init__()
        widths = (3, d // 8, d // 4, d // 2, d, d)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(widths))
        sizes = [(d, d)] * 4 + [(d, ratio * d), (ratio * d, d)]
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(*size) for size in sizes) for _ in range(depth))
        self.heads = heads

    def forward(self, x):
        for index, conv in enumerate(self.convs):
            x = (conv(x) > 0).float()
            if index in (2, 3):
                x = nn.functional.max_pool2d(x, 3, 2, 1)
        x = x.flatten(2).transpose(1, 2)  # [B, N, D]
        for query, key, value, proj, up, down in self.blocks:
            q, k, v = (
                (linear(x) > 0).float().unflatten(2, (self.heads, -1)).transpose(1, 2) for linear in (query, key, value)
            )
            y = (q @ k.transpose(2, 3) @ v).transpose(1, 2).flatten(2)
            x = x + (proj((y > 2).float()) > 0).float()
            x = x + (down((up(x) > 0).float()) > 0).float()
        return x.mean(1)


@pytest.mark.parametrize(("d", "depth"), [(256, 2), (256, 4), (384, 4)])
def test_macs_of_spikformers(d, depth):
    n, ratio = 64, 4
    c = count(_Spikformer(d, depth), torch.randn(1, 3, 32, 32))
    convs = 3168 * d**2 + 3456 * d
    assert c.macs == convs + depth * (n * (4 + 2 * ratio) * d**2 + 2 * n**2 * d)
    assert c.uncounted == {}
    assert c.sops_exact > 0 and c.macs_paper == 3456 * d  # only the first convolution sees analog values
