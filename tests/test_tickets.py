"""Lottery tickets: mask, gain, gradient by hand; frozen weights, baking, tuning, checkpoints, ways of running."""

import json
import math
import pickle
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import load
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch._dynamo.utils import counters

import spikezoo
from spikezoo.checkpoint import load_state
from spikezoo.layers import TernaryConv2d, TernaryLinear
from spikezoo.observe import firing_rates
from spikezoo.transforms import replay, set_epoch, ticket, tune
from spikezoo.transforms.tickets import tickets

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------------------------------------ by hand, 3 x 4

W = torch.tensor([[1.0, -2, 3, -4], [-1, 2, -3, 4], [2, 2, -2, -2]])
S = torch.tensor([[0.9, -0.1, 0.5, -0.7], [0.2, -0.8, 0.05, 0.6], [-0.3, 0.4, -0.95, 0.15]])
# 40 % of 12 is 4.8, so the four lowest go: 0.05, 0.1, 0.15, 0.2. The kept magnitudes are 1 3 4, 2 4, 2 2 2: 20 / 8.
MASK = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]]).bool()
REAL = torch.tensor([[1.0, 0, 3, -4], [0, 2, 0, 4], [2, 2, -2, 0]])
BINARY = torch.tensor([[2.5, 0, 2.5, -2.5], [0, 2.5, 0, 2.5], [2.5, 2.5, -2.5, 0]])
X = torch.tensor([[1.0, 2, 3, 4], [0, 1, 0, -1]])
UPSTREAM = torch.tensor([[1.0, -1, 2], [2, 0, 1]])
# UPSTREAM^T X = [[1 4 3 2], [-1 -2 -3 -4], [2 5 6 7]], times W, times the sign of S; pruned scores learn as well.
GRADIENT = torch.tensor([[1.0, 8, 9, 8], [1, 4, 9, -16], [-4, 10, 12, -14]])


def scores(layer):
    return layer.parametrizations.weight.original


def put(layer, frozen, score):
    with torch.no_grad():
        layer.parametrizations.weight[0].frozen.copy_(frozen)
        scores(layer).copy_(score)


@pytest.mark.parametrize(("kind", "wanted"), [("lt", REAL), ("slt", REAL), ("mplt", BINARY), ("mpslt", BINARY)])
def test_mask_gain_and_score_gradient_by_hand(kind, wanted):
    net = ticket(nn.Sequential(nn.Linear(4, 3, bias=False)), kind, 0.4)
    put(net[0], W, S)
    torch.testing.assert_close(net[0].weight, wanted, rtol=0, atol=0)
    torch.testing.assert_close(net(X), X @ wanted.T)
    (net(X) * UPSTREAM).sum().backward()
    torch.testing.assert_close(scores(net[0]).grad, GRADIENT, rtol=0, atol=0)
    assert [name for name, _ in net.named_parameters()] == ["0.parametrizations.weight.original"]
    baked = spikezoo.bake(net)
    assert torch.equal(baked[0].weight, wanted) and baked[0].weight.requires_grad == (wanted is REAL)


def test_global_scope_by_hand():
    net = ticket(nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)), "mpslt", 0.5, scope="global")
    put(net[0], W, S)
    put(net[1], torch.tensor([[1.0, 1, -5], [3, -1, 1]]), torch.tensor([[0.01, 0.02, 0.45], [0.85, -0.65, 0.03]]))
    # Nine of 18 stay: 0.95 0.9 0.85 0.8 0.7 0.65 0.6 0.5 0.45. Gains (1 + 3 + 4 + 2 + 4 + 2) / 6 and (5 + 3 + 1) / 3.
    g = 16 / 6
    first = torch.tensor([[g, 0, g, -g], [0, g, 0, g], [0, 0, -g, 0]])
    torch.testing.assert_close(net[0].weight, first)
    assert torch.equal(net[1].weight, torch.tensor([[0.0, 0, -3], [3, -3, 0]]))


def test_equal_scores_keep_the_exact_count():
    net = ticket(nn.Sequential(nn.Linear(4, 3, bias=False)), "lt", 0.5)
    put(net[0], W, torch.full((3, 4), -0.5))
    # The first ones in order of memory.
    assert torch.equal(net[0].weight != 0, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool())
    put(net[0], W, torch.tensor([[0.5, 0.1, 0.5, 0.5], [0.5, -0.5, 0.5, 0.9], [0.5, 0.5, 0.1, 0.1]]))
    assert torch.equal(net[0].weight != 0, torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0]]).bool())
    put(net[0], W, torch.zeros(3, 4))
    assert (net[0].weight != 0).sum() == 6


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("sparsity", [0, 0.07, 0.1, 0.29, 0.3, 0.4, 0.5, 0.57, 0.7, 0.8, 0.9, 0.99])
def test_kept_counts_are_exact(sparsity, scope):
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(100, 17), nn.Conv2d(3, 5, 3), nn.Linear(7, 1))
    if scope == "global":  # all of one fan-in: the scores of a wider layer start smaller and would all go
        model = nn.Sequential(nn.Linear(10, 200), nn.Linear(10, 200), nn.Conv2d(10, 300, 1))
    net = ticket(model, "lt", sparsity, scope=scope)
    counts = [(m.weight.numel(), int((m.weight != 0).sum())) for m in net]
    if scope == "global":
        counts = [tuple(map(sum, zip(*counts, strict=True)))]
    for total, kept in counts:
        assert kept == total - math.floor(Fraction(str(sparsity)) * total) >= 1


def test_annealing_by_hand():
    net = ticket(nn.Sequential(nn.Linear(20, 10)), "lt", 0.8, scope="global", anneal=True)
    # 0.2 + 0.3 (1 - epoch / 10)^3 of 200 weights: 0.5, 0.4187, 0.2648, 0.2081, 0.2003, 0.2, and 0.3266 at 2.5;
    # of what goes, the part of a weight is rounded down: 158.38 to 158.
    for epoch, kept in ((0, 100), (1, 84), (4, 53), (7, 42), (9, 41), (10, 40), (37, 40), (2.5, 66)):
        set_epoch(net, epoch)
        assert (net[0].weight != 0).sum() == kept, epoch
    set_epoch(net, 0)
    assert (spikezoo.bake(net)[0].weight != 0).sum() == 40  # what is delivered has the sparsity asked for
    assert (net[0].weight != 0).sum() == 100
    # Less than half removed: nothing to anneal, as in biprop. The same without anneal.
    for options in ({"sparsity": 0.4, "anneal": True}, {"sparsity": 0.8}):
        other = ticket(nn.Sequential(nn.Linear(20, 10)), "lt", scope="global", **options)
        set_epoch(other, 0)
        assert (other[0].weight != 0).sum() == 200 * (1 - options["sparsity"])


# ------------------------------------------------------------------------------------- against biprop, written anew


class Subnet(torch.autograd.Function):
    """The biprop paper's layer: a full sort of |S|, the lowest (1 - k) N go, alpha sign(W) M, dL/d|S| = dL/dW_eff W."""

    @staticmethod
    def forward(ctx, magnitudes, weights, kept_fraction, binary):
        ctx.save_for_backward(weights)
        order = magnitudes.flatten().sort().indices
        mask = torch.ones(magnitudes.numel())
        mask[order[: round((1 - kept_fraction) * len(order))]] = 0
        mask = mask.reshape(weights.shape)
        return (weights.abs() * mask).sum() / mask.sum() * weights.sign() * mask if binary else weights * mask

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None, None


@pytest.mark.parametrize("init", ["signed_constant", "kaiming_normal"])
@pytest.mark.parametrize(("kind", "binary"), [("slt", False), ("mpslt", True)])
def test_one_layer_equals_biprop(kind, binary, init):
    net = ticket(nn.Sequential(nn.Conv2d(6, 10, 3, bias=False)), kind, 0.4, init=init)
    layer, x = net[0], torch.randn(4, 6, 9, 9)
    score = scores(layer).detach().clone().requires_grad_()
    weight = Subnet.apply(score.abs(), layer.parametrizations.weight[0].frozen, 0.6, binary)
    wanted = F.conv2d(x, weight)
    assert torch.equal(layer.weight != 0, weight != 0)
    torch.testing.assert_close(net(x), wanted)
    upstream = torch.randn_like(wanted)
    wanted.backward(upstream)
    net(x).backward(upstream)
    torch.testing.assert_close(scores(layer).grad, score.grad)
    assert score.grad.abs().min() > 0


# ------------------------------------------------------------------------------------------------ frozen weights


def test_initialisations():
    model = nn.Sequential(nn.Conv2d(8, 50, 3), nn.Linear(72, 500))  # both have a fan-in of 72
    std = math.sqrt(2 / 72)
    frozen = {}
    for init in ("signed_constant", "kaiming_normal"):
        for scale in (False, True):
            net = ticket(model, "lt", 0.75, init=init, scale_fan=scale)
            frozen[init, scale] = [p.frozen for _, p in tickets(net).values()]
            for w in frozen[init, scale]:
                wanted = std * (2 if scale else 1)  # a quarter of the inputs, twice the standard deviation
                assert w.std() == pytest.approx(wanted, rel=0.04) and abs(w.mean()) < 0.05 * wanted
                if init == "signed_constant":
                    torch.testing.assert_close(w.abs(), torch.full_like(w, wanted))
    convolution, linear = frozen["signed_constant", False]
    assert not torch.equal(convolution.sign().flatten()[:2000], linear.sign().flatten()[:2000])  # each has its own
    normal = torch.cat([w.flatten() for w in frozen["kaiming_normal", False]]) / std
    assert normal.pow(4).mean() == pytest.approx(3, rel=0.1)  # the kurtosis of a normal distribution
    assert torch.equal(frozen["kaiming_normal", False][0].sign(), convolution.sign())


def test_seeds():
    def frozen(seed, torch_seed):
        torch.manual_seed(torch_seed)
        options = {"kind": "slt", "init": "kaiming_normal", "seed": seed}
        model = spikezoo.create_model("test_spiking_resnet", ticket=options)
        return [p.frozen for _, p in tickets(model).values()]

    first, same, other = frozen(3, 0), frozen(3, 1), frozen(4, 0)
    assert all(map(torch.equal, first, same))
    assert not any(map(torch.equal, first, other))


RECIPES = {
    "sgd": {"opt": "momentum", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
    "adam": {"opt": "adam", "lr": 0.1, "weight_decay": 0},
}


def images(count=8, size=16):
    return torch.randn(count, 3, size, size)


def train_some(model, recipe="adam", steps=3, x=None):
    """Some optimiser steps on fixed images; returns the losses."""
    optimizer = create_optimizer_v2(model, **RECIPES[recipe])
    x = images() if x is None else x
    target = torch.arange(len(x)) % 10
    losses = []
    model.train()
    for _ in range(steps):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["slt", "mpslt"])
def test_frozen_weights_never_move_and_scores_do(recipe, kind):
    model = spikezoo.create_model("test_spiking_vgg", img_size=16, T=2, ticket={"kind": kind, "sparsity": 0.4})
    before = {n: (p.frozen.clone(), scores(m).detach().clone(), m.weight != 0) for n, (m, p) in tickets(model).items()}
    losses = train_some(model, recipe, 12)
    assert losses[-1] < losses[0]
    for name, (layer, parametrization) in tickets(model).items():
        frozen, score, mask = before[name]
        assert torch.equal(parametrization.frozen, frozen) and not parametrization.frozen.requires_grad
        assert (scores(layer) != score).float().mean() > 0.5, name
        assert not torch.equal(layer.weight != 0, mask), name  # another ticket
        assert (layer.weight != 0).sum() == mask.sum()
        assert torch.equal(layer.weight.sign(), frozen.sign() * (layer.weight != 0))
    assert len(before) == 6 and not any("frozen" in name for name in model.state_dict())


# --------------------------------------------------------------------------------------------------------- bake

NETS = [
    (model, kind, neuron)
    for model in ("test_spiking_vgg", "test_spiking_resnet")
    for kind, neurons in (("lt", ["relu"]), ("slt", ["lif", "if", "plif"]), ("mplt", ["sign"]), ("mpslt", ["plif"]))
    for neuron in neurons
] + [("test_spiking_vgg", "mpslt", "lif"), ("test_spikformer", "mpslt", "lif")]


def create(model="test_spiking_vgg", neuron="lif", **more):
    """A net whose neurons fire."""
    neurons = {"T": 3, "threshold": 0.25} if neuron in ("lif", "if", "plif") else {}
    return spikezoo.create_model(model, neuron=neuron, img_size=16, **{**neurons, **more})


def trained(model="test_spiking_vgg", kind="mpslt", neuron="lif", **options):
    """A net with a ticket, some steps old."""
    net = create(model, neuron, ticket={"kind": kind, "sparsity": 0.4, **options})
    train_some(net)
    return net


@pytest.mark.parametrize(("model", "kind", "neuron"), NETS)
def test_baked_logits_are_bit_equal(model, kind, neuron):
    net, x = trained(model, kind, neuron), images()
    recipe = list(net.recipe)
    for training in (True, False):
        net.train(training)
        state = {name: value.clone() for name, value in net.state_dict().items()}
        baked = spikezoo.bake(net)
        assert baked.training == training and baked.recipe == [*recipe, ("bake", {})] and net.recipe == recipe
        for autocast in (False, True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                wanted, found = net(x), baked(x)
                assert torch.equal(found, wanted) and len(wanted.unique(dim=0)) > 1  # no net fell silent
            for copy in (net, baked):
                copy.load_state_dict(
                    {**copy.state_dict(), **{k: v for k, v in state.items() if k in baked.state_dict()}}
                )
    if neuron not in ("relu", "sign"):
        assert all(rate.sum() > 0 for rate in firing_rates(net, x).values())
    plain = create(model, neuron)
    assert {k: v.shape for k, v in baked.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    plain.load_state_dict(baked.state_dict())
    if kind in ("lt", "slt"):  # binary layers scale their sums, and a sum of products has other roundings
        with torch.no_grad():
            assert torch.equal(plain.eval()(x), baked.eval()(x))


@pytest.mark.parametrize("bias", [False, True])
def test_binary_layers_sum_whole_numbers(bias):
    # What makes a ticket the same in float32 and in integers: of spikes its sums are exact, the gain comes after.
    for layer, x in ((nn.Conv2d(40, 12, 3, bias=bias), (3, 40, 9, 9)), (nn.Linear(400, 12, bias=bias), (3, 400))):
        net = spikezoo.bake(ticket(nn.Sequential(layer), "mpslt", 0.4, init="kaiming_normal"))
        spikes = (torch.rand(x) < 0.3).float()
        signs, gain = net[0].weight.sign().to(torch.int64), net[0].weight.abs().max()
        whole = (F.conv2d if len(x) == 4 else F.linear)(spikes.to(torch.int64), signs)
        wanted = whole.float() * gain
        if bias:
            wanted = wanted + net[0].bias[(..., None, None) if len(x) == 4 else ...]
        assert torch.equal(net(spikes), wanted) and whole.unique().numel() > 10
        assert (wanted != (F.conv2d if len(x) == 4 else F.linear)(spikes, net[0].weight, net[0].bias)).any()


def test_real_weights_do_not_load_into_a_binary_layer():
    net = spikezoo.bake(ticket(nn.Sequential(nn.Linear(4, 3)), "mpslt", 0.4))
    with pytest.raises(RuntimeError, match="other values than -gain, 0 and \\+gain"):
        net.load_state_dict({"0.weight": REAL, "0.bias": torch.zeros(3)})
    net.load_state_dict({"0.weight": BINARY, "0.bias": torch.zeros(3)})


def test_bake_leaves_the_original_a_ticket():
    net = trained()
    x = images()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    classes = [type(module) for module in net.modules()]
    baked, again = spikezoo.bake(net), spikezoo.bake(net)
    assert [type(module) for module in net.modules()] == classes
    assert len(tickets(net)) == 6 and not tickets(baked)
    kinds = {type(m) for m in baked.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert kinds == {TernaryConv2d, TernaryLinear}
    own = {p.data_ptr() for p in net.parameters()}
    assert not own & {p.data_ptr() for p in baked.parameters()}
    kept = baked.stem[0].conv.weight.detach().clone()
    train_some(net, x=x)
    assert any(not torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(baked.stem[0].conv.weight, kept) and torch.equal(again.stem[0].conv.weight, kept)
    pickle.loads(pickle.dumps(baked))(x)  # nothing of the ticket is left
    magnitudes = baked.stages[0][0].conv.weight.detach().abs()
    assert len(magnitudes.unique()) == 2  # zero and the gain


def test_copies_have_tickets_of_their_own():
    net = ticket(nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)), "mpslt", 0.5, scope="global")
    net.train()
    ema = ModelEmaV3(net, decay=0.25)
    start = scores(net[0]).detach().clone()
    with torch.no_grad():
        scores(net[0]).add_(1.0)  # all of the first layer rank before the second
    assert (net[0].weight != 0).sum() == 9 and not net[1].weight.any()
    ema.update(net)
    torch.testing.assert_close(scores(ema.module[0]), start + 0.75)
    with torch.no_grad():
        scores(ema.module[0]).zero_()
    assert ema.module[1].weight.all() and (ema.module[0].weight != 0).sum() == 3
    assert not net[1].weight.any()
    assert spikezoo.bake(ema.module)[1].weight.all()


def test_fold_bn_takes_a_baked_ticket_only():
    net, x = trained().eval(), images()
    with pytest.raises(ValueError, match=r"tickets, which learn scores: spikezoo\.bake it first"):
        spikezoo.fold_bn(net)
    baked = spikezoo.bake(net)
    folded = spikezoo.fold_bn(baked)
    assert [name for name, _ in folded.recipe] == ["ticket", "bake", "fold_bn"]
    # Some potentials lie within a rounding of the threshold, so that not every logit need agree.
    close = torch.isclose(folded(x), baked(x), atol=1e-4).all(1)
    assert close.float().mean() > 0.7


# --------------------------------------------------------------------------------------------------- checkpoints


def test_state_dict_goes_into_a_fresh_ticket():
    net, x = trained(init="kaiming_normal", kind="slt").eval(), images()
    torch.manual_seed(5)
    fresh = create(ticket={"kind": "slt", "sparsity": 0.4, "init": "kaiming_normal"}).eval()
    assert not torch.equal(fresh(x), net(x))
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), net(x))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("stage", ["unbaked", "baked", "tuned", "tuned and baked"])
def test_checkpoints_round_trip(tmp_path, stage, scope):
    net, x = trained(scope=scope), images()
    if stage != "unbaked":
        net = spikezoo.bake(net)
    if "tuned" in stage:
        net = tune(net)
        train_some(net, "sgd")
    if stage == "tuned and baked":
        net = spikezoo.bake(net)
    net.eval()
    torch.manual_seed(5)
    spikezoo.save_checkpoint(net, tmp_path / "saved")
    back = spikezoo.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(back(x), net(x)) and [list(e) for e in back.recipe] == [list(e) for e in net.recipe]
    empty = replay(create(), net.recipe)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    if stage == "baked":  # the signs come from the seed; the masks of this net are hardly more than bits
        from safetensors import safe_open

        with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
            names = file.keys()
        assert not [name for name in names if name.endswith(".signs")]
        assert sum(name.endswith(".gain") for name in names) == 6


def test_a_baked_vgg9_takes_300_kilobytes(tmp_path):
    net = spikezoo.bake(spikezoo.create_model("spiking_vgg9", ticket={"kind": "mpslt", "sparsity": 0.4}))
    path = spikezoo.save_checkpoint(net, tmp_path / "vgg9")
    assert sum(file.stat().st_size for file in path.iterdir()) <= 300_000
    back = spikezoo.create_model(f"local-dir:{path}", pretrained=True)
    assert all(map(torch.equal, back.state_dict().values(), net.state_dict().values()))


# --------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("binary", [False, True])
def test_tuning_keeps_zeros_zero(binary, recipe):
    baked, x = spikezoo.bake(trained()), images()
    net = tune(baked, binary=binary)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), baked.eval()(x))
    start = {name: baked.get_submodule(name).weight.detach().clone() for name in tickets(net)}
    train_some(net, recipe, 4)
    net.eval()
    after = spikezoo.bake(net)
    assert torch.equal(after(x), net(x)) and [name for name, _ in after.recipe] == ["ticket", "bake", "tune", "bake"]
    for name, module in after.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert torch.equal(module.weight != 0, start[name] != 0), name
            assert not torch.equal(module.weight, start[name]), name
            magnitudes = module.weight.detach()[module.weight != 0].abs().unique()
            assert (len(magnitudes) == 1) == binary, name
            assert not hasattr(module, "sign_seeds")  # the signs may have turned
    again = tune(after)
    assert len(tickets(again)) == 6
    for name, layer in baked.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert torch.equal(layer.weight, start[name])


def test_binary_tuning_gradient_by_hand():
    net = spikezoo.bake(ticket(nn.Sequential(nn.Linear(4, 3, bias=False)), "mpslt", 0.4))
    with torch.no_grad():
        net[0].weight.copy_(REAL)
    net = tune(net, binary=True)
    assert torch.equal(net[0].weight, BINARY)
    (net(X) * UPSTREAM).sum().backward()
    wanted = torch.tensor([[1.0, 4, 3, 2], [-1, -2, -3, -4], [2, 5, 6, 7]]) * MASK
    assert torch.equal(net[0].parametrizations.weight.original.grad, wanted)


# ------------------------------------------------------------------------------------------------ ways of running


def gradients(model, net, x):
    model.zero_grad()
    F.cross_entropy(net(x).float(), torch.arange(len(x)) % 10).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_compiled_steps_equal_eager_ones():
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        ticket = {"kind": "mpslt", "sparsity": 0.7, "scope": "global", "anneal": True}
        model = create(T=1, widths=((4,), (8,)), ticket=ticket)
        net = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        x = images()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        counters.clear()
        for epoch in range(4):  # a schedule must not compile every epoch anew, nor go unseen
            set_epoch(model, epoch)
            found = gradients(model, net, x)
            optimizer.step()
        assert counters["stats"]["unique_graphs"] == int(compiled)
        counts = [int((layer.weight != 0).sum()) for layer, _ in tickets(model).values()]
        results.append(({k: v.clone() for k, v in model.state_dict().items()}, found, counts))
    for eager, found in zip(*(r[:2] for r in results), strict=True):
        for name in eager:
            torch.testing.assert_close(found[name], eager[name], atol=1e-5, rtol=1e-4)
    assert results[0][2] == results[1][2]


def test_channels_last_has_the_same_ticket():
    net, x = trained().eval(), images()
    wanted = net(x)
    masks = {name: layer.weight != 0 for name, (layer, _) in tickets(net).items()}
    net.to(memory_format=torch.channels_last)
    for name, (layer, _) in tickets(net).items():
        assert torch.equal(layer.weight != 0, masks[name])
    x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x), wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(spikezoo.bake(net)(x), net(x))


def test_bfloat16_autocast_keeps_scores_and_frozen_weights_in_full_precision():
    net, x = trained(kind="lt", neuron="relu", init="kaiming_normal"), images()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(net, net, x)
    for layer, parametrization in tickets(net).values():
        assert scores(layer).dtype == parametrization.frozen.dtype == torch.float32
    full = gradients(net, net, x)
    for name, grad in found.items():
        assert grad.dtype == torch.float32 and grad.isfinite().all()
        assert F.cosine_similarity(grad.flatten(), full[name].flatten(), 0) > 0.8, name


def test_gradients_of_two_halves_add_up():
    net, x = trained(neuron="plif").eval(), images()
    target = torch.arange(8) % 10
    net.zero_grad()
    F.cross_entropy(net(x), target).backward()
    whole = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        (F.cross_entropy(net(x[half]), target[half]) / 2).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-6, rtol=1e-4)


@pytest.fixture(scope="module")
def train():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spikezoo.train.output.plot", lambda *_: [])
        yield load("train")


FLAGS = (
    "--model test_spiking_vgg --T 2 --dataset digits --subset 64 -b 16 --epochs 2 --lr 0.1 --opt adam "
    "--weight-decay 0 --grad-accum-steps 2 --amp --channels-last --experiment run"
)


@pytest.mark.parametrize("ema", [[], ["--model-ema", "--model-ema-decay", "0.5"]])
def test_train_delivers_the_baked_ticket_that_it_measured(train, tmp_path, ema):
    options = ["--ticket", "kind=binw_slt", "sparsity=0.7", "scope=global", "anneal=True", "seed=3"]
    train.main([*FLAGS.split(), "--model-kwargs", "threshold=0.3", *ema, "--output", str(tmp_path), *options])
    folder = tmp_path / "run"
    net = spikezoo.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert [name for name, _ in net.recipe] == ["ticket", "bake"] and net.recipe[0][1]["kind"] == "mpslt"
    weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    total = sum(w.numel() for w in weights)
    # Two epochs end before the schedule does, and what is measured has the sparsity asked for all the same.
    assert sum(int((w != 0).sum()) for w in weights) == total - int(0.7 * total)
    loader = spikezoo.data.create_loader("digits", "test", batch_size=16, channels_last=True)
    net.to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = sum(F.cross_entropy(net(x).float(), y, reduction="sum").item() for x, y in loader) / 360
    results = json.loads((folder / "config.json").read_text())["spikezoo"]["results"]
    assert results["loss"] == pytest.approx(loss, rel=1e-6) and abs(loss - math.log(10)) > 1e-3
    state = load_state(folder / "last.safetensors")
    assert [name for name, _ in state["spikezoo"]["recipe"]] == ["ticket"]
    back = spikezoo.create_model("test_spiking_vgg", checkpoint_path=folder / "last.safetensors", use_ema=bool(ema))
    for name, (layer, _) in tickets(back).items():  # the gain is summed in another order in another memory format
        torch.testing.assert_close(layer.weight, net.get_submodule(name).weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("more", [[], ["--tune"]], ids=["a tuned folder", "a baked one, by flag"])
def test_train_fine_tunes(train, tmp_path, more):
    model = {"T": 2, "in_chans": 1, "img_size": 8, "threshold": 0.3}
    baked = spikezoo.bake(spikezoo.create_model("test_spiking_vgg", **model, ticket={"sparsity": 0.5}))
    tuned = tune(baked)
    spikezoo.save_checkpoint(baked if more else tuned, tmp_path / "start")
    more = [*more, "--initial-checkpoint", str(tmp_path / "start"), "--output", str(tmp_path), "--lr", "0.01"]
    train.main([*FLAGS.split(), *more])
    net = spikezoo.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert [name for name, _ in net.recipe] == ["ticket", "bake", "tune", "bake"]
    for name, (layer, _) in tickets(tuned).items():
        found = net.get_submodule(name).weight
        assert torch.equal(found != 0, layer.weight != 0) and not torch.equal(found, layer.weight), name


# ------------------------------------------------------------------------------------------------------- counting


def test_synaptic_operations_fall_with_sparsity():
    spikes = (torch.rand(4, 30) < 0.3).float()
    model = nn.Sequential(nn.Linear(30, 20, bias=False))
    found = []
    torch.manual_seed(0)
    score = torch.randn(20, 30)
    for sparsity in (0, 0.2, 0.4, 0.6, 0.9):
        net = ticket(model, "mpslt", sparsity)
        with torch.no_grad():
            scores(net[0]).copy_(score)
        baked = spikezoo.bake(net)
        found.append(spikezoo.count(baked, spikes).sops_exact)
        wanted = (spikes.sum(0) * (baked[0].weight != 0).sum(0)).sum() / 4  # each spike, each weight that it meets
        assert found[-1] == pytest.approx(wanted.item())
        assert spikezoo.count(net, spikes).sops_exact == found[-1]
        assert spikezoo.count(baked, spikes).sops_paper == pytest.approx(spikes.mean().item() * 600)  # no credit
    assert found == sorted(found, reverse=True) and found[-1] < 0.2 * found[0]


def test_annealed_ticket_may_end_where_random_scores_leave_a_layer_empty():
    model = spikezoo.create_model("test_spiking_vgg", ticket={**GLOBAL, "anneal": True})
    set_epoch(model, 0)
    weights = [layer.weight for layer, _ in tickets(model).values()]
    kept, total = sum(int((w != 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert kept == total - total // 2 and all(w.any() for w in weights)
    with pytest.raises(ValueError, match="keeps no weight at all"):
        spikezoo.bake(model)  # where training has not changed that


def test_sparsity_next_to_one_keeps_one_weight():
    model = spikezoo.create_model("test_spiking_vgg", ticket={"sparsity": 1 - 1e-12})
    assert all(int((layer.weight != 0).sum()) == 1 for layer, _ in tickets(model).values())


# ------------------------------------------------------------------------------------------------------ bad input

GLOBAL = {"scope": "global", "sparsity": 0.99}


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ({}, {"sparsity": 1}, r"sparsity=1: expected a number in \[0, 1\)"),
        ({}, {"sparsity": -0.1}, r"sparsity=-0\.1: expected a number in \[0, 1\)"),
        ({}, {"sparsity": "half"}, r"sparsity='half': expected a number in \[0, 1\)"),
        ({}, {"sparsity": True}, r"sparsity=True: expected"),
        ({}, {"sparsity": math.nan}, r"sparsity=nan: expected"),
        ({}, {"kind": "mpsl"}, r"kind='mpsl' does not exist\. Did you mean 'mpslt'"),
        ({}, {"kind": "lt"}, r"kind='lt' is for neuron='relu' and the model has 'lif': use kind='slt' or 'mpslt'"),
        ({}, {"kind": "mplt"}, "kind='mplt' is for neuron='sign'"),
        (
            {"neuron": "relu"},
            {"kind": "mpslt"},
            "neuron='lif' or 'if' or 'plif' and the model has 'relu': use kind='lt'",
        ),
        ({"neuron": "sign"}, {"kind": "slt"}, "and the model has 'sign': use kind='mplt'"),
        ({}, {"exempt": ["head.fx"]}, r"exempt='head\.fx' matches no .* Did you mean 'head\.fc'"),
        ({}, {"exempt": "stem.9*"}, r"exempt='stem\.9\*' matches no convolution"),
        ({}, {"exempt": ["*"]}, "Nothing to prune"),
        ({}, GLOBAL, r"Layer '.*' would keep no weight at all\. Use scope='layer', a smaller sparsity"),
        ({}, {"scope": "model"}, "scope='model' does not exist"),
        ({}, {"init": "constant"}, r"init='constant' does not exist\. Did you mean 'signed_constant'"),
        ({}, {"anneal": True}, "anneal=True with scope='layer'"),
        ({}, {"scope": "global", "anneal": "false"}, "anneal='false': expected True or False"),
        ({}, {"scale_fan": "false"}, "scale_fan='false': expected True or False"),
        ({}, {"exempt": None}, "exempt=None: expected names of layers"),
        ({}, {"kind": ["lt"]}, "does not exist"),
        ({}, {"seed": -1}, r"seed=-1: expected an integer from 0"),
        ({}, {"seed": 1.5}, r"seed=1\.5: expected an integer"),
        ({}, {"sparcity": 0.4}, r"no argument 'sparcity'\. Did you mean 'sparsity'"),
        ({}, 0.4, "ticket=0.4: expected the arguments of the transform"),
    ],
)
def test_bad_tickets(model, options, words):
    with pytest.raises(ValueError, match=words):
        spikezoo.create_model("test_spiking_vgg", **model, ticket=options)


def test_what_cannot_be_done_twice_or_too_early():
    model = spikezoo.create_model("test_spiking_vgg")
    with pytest.raises(ValueError, match="Nothing to bake: the model has no tickets"):
        spikezoo.bake(model)
    with pytest.raises(ValueError, match=r"recipe is \[\]: spikezoo\.bake it first"):
        tune(model)
    net = ticket(model)
    with pytest.raises(ValueError, match=r"Layer 'stem\.0\.conv' is a ticket already"):
        ticket(net)
    with pytest.raises(
        ValueError, match=r"Layer 'stem\.0\.conv' is a baked ticket, and its weights would be drawn anew"
    ):
        ticket(spikezoo.bake(net))
    with pytest.raises(ValueError, match="Fine-tuning starts from a baked ticket"):
        tune(net)
    with pytest.raises(ValueError, match="binary='yes': expected True or False"):
        tune(spikezoo.bake(net), binary="yes")
    with pytest.raises(ValueError, match="Nothing to bake"):
        spikezoo.bake(spikezoo.bake(net))


def test_a_layer_that_lost_all_its_weights_is_not_baked():
    net = ticket(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), "lt", 0.5, scope="global")
    with torch.no_grad():
        scores(net[1]).mul_(1e-6)
    with pytest.raises(ValueError, match="Layer '1' keeps no weight at all"):
        spikezoo.bake(net)


def test_exempted_layers_stay_ordinary():
    net = spikezoo.create_model("test_spiking_vgg", ticket={"exempt": ["stem.*", "head.fc"]})
    assert sorted(tickets(net)) == ["neck.0.linear", "stages.0.0.conv", "stages.1.0.conv", "stages.2.0.conv"]
    baked = spikezoo.bake(net)
    assert baked.head.fc.weight.all() and torch.equal(baked.head.fc.weight, net.head.fc.weight)
    assert sorted(tickets(tune(baked))) == sorted(tickets(net))


def test_cumulative_masks_only_shrink():
    # Four weights, half of them kept. Scores 4 3 2 1 keep the first two; 1 4 3 2 keep the middle two. Once removed, the
    # third stays so: the second alone is left, and the gain is its magnitude.
    def masks(cumulative):
        net = nn.Sequential(nn.Linear(4, 1, bias=False))
        net = ticket(net, "slt", 0.5, cumulative=cumulative).train()
        layer, found = net[0], []
        for scores in ([4.0, 3, 2, 1], [1.0, 4, 3, 2]):
            layer.parametrizations.weight.original.data.copy_(torch.tensor([scores]))
            net(torch.ones(1, 4))
            found.append((layer.weight != 0).int().tolist()[0])
        return net, found

    free, found = masks(False)
    assert found == [[1, 1, 0, 0], [0, 1, 1, 0]]
    shrinking, found = masks(True)
    assert found == [[1, 1, 0, 0], [0, 1, 0, 0]]
    # What was removed is part of the state, and of the recipe; those of other tickets are as ever.
    name = "0.parametrizations.weight.0.alive"
    assert shrinking.state_dict()[name].tolist() == [[False, True, False, False]] and name not in free.state_dict()
    assert shrinking.recipe[0][1]["cumulative"] and "cumulative" not in free.recipe[0][1]
    shrinking.eval()
    shrinking[0].parametrizations.weight.original.data.copy_(torch.tensor([[1.0, 4, 3, 2]]).flip(1))
    shrinking(torch.ones(1, 4))  # outside of training nothing is removed for good
    assert shrinking.state_dict()[name].tolist() == [[False, True, False, False]]
