"""Tests of spikezoo.neurons: membrane potentials by hand, gradients by formula, SpikingJelly as the oracle."""

import copy
import itertools
import math

import pytest
import torch
from spikingjelly.activation_based import functional
from spikingjelly.activation_based import neuron as sj_neuron
from spikingjelly.activation_based import surrogate as sj_surrogate
from torch import nn

import spikezoo
from spikezoo.neurons import (
    IF,
    LIF,
    PLIF,
    MembraneNorm,
    NeuronConfig,
    NeuronFactory,
    ReLU,
    Sign,
    UnknownArgumentError,
    nearest,
    spike,
)
from spikezoo.observe import WithRates

# ------------------------------------------------------------------------------------------ potentials by hand


def _potentials(neuron, x):
    """The membrane potential before firing of every step, ``[T]``, and the spikes, of one neuron."""
    seen, charge = [], neuron.charge

    def recorded(v, current):
        seen.append(charge(v, current))
        return seen[-1]

    neuron.charge = recorded
    spikes = neuron(torch.tensor(x).view(-1, 1, 1))
    return torch.cat(seen).flatten().tolist(), spikes.flatten().tolist()


# All numbers are exact in binary, so the comparisons are equalities.
BY_HAND = {
    # u = 0.25 v + x, fires where u > 0.5 (the MPBN authors' constants), then v = 0
    "decay": (
        {"decay": 0.25, "threshold": 0.5, "firing": ">"},
        [0.5, 0.375, 0.5, 0.25, 0.4375, -0.125, 0.75, 0.5, 1.0],
        [0.5, 0.5, 0.625, 0.25, 0.5, 0.0, 0.75, 0.5, 1.125],
        [0, 0, 1, 0, 0, 0, 1, 0, 1],
    ),
    # u = v + (x - v) / 2, fires where u >= 1, then v = 0
    "tau": (
        {"tau": 2.0},
        [1.0, 1.0, 1.25, 2.0, -1.0, 0.5, 3.0, 0.5, 1.75],
        [0.5, 0.75, 1.0, 1.0, -0.5, 0.0, 1.5, 0.25, 1.0],
        [0, 0, 1, 1, 0, 0, 1, 0, 1],
    ),
    # u = 0.5 v + x, fires where u >= 1, then v = u - 1
    "soft": (
        {"decay": 0.5, "reset": "soft"},
        [1.5, 0.5, 0.625, 3.0, 0.0, 0.0, -1.0, 1.0, 1.0],
        [1.5, 0.75, 1.0, 3.0, 1.0, 0.0, -1.0, 0.5, 1.25],
        [1, 0, 1, 1, 1, 0, 0, 0, 1],
    ),
    # from -0.5: u = -0.5 + 0.5 (v + 0.5) + x, fires where u > 0.5, then v = -0.5
    "v_reset": (
        {"decay": 0.5, "threshold": 0.5, "firing": ">", "v_reset": -0.5},
        [0.5, 0.25, 0.75, 0.5, 0.75, 0.0, 2.0, 1.0, 0.625],
        [0.0, 0.0, 0.5, 0.5, 0.75, -0.5, 1.5, 0.5, 0.625],
        [0, 0, 0, 0, 1, 0, 1, 0, 1],
    ),
    # u = v + x, fires where u >= 1, then v = 0
    "if": (
        {"kind": "if"},
        [0.5, 0.25, 0.25, 0.875, -0.25, 0.375, 2.0, 0.0, 1.0],
        [0.5, 0.75, 1.0, 0.875, 0.625, 1.0, 2.0, 0.0, 1.0],
        [0, 0, 1, 0, 0, 1, 1, 0, 1],
    ),
    # tau = 2: as above, 1/tau = sigmoid(0)
    "plif": (
        {"kind": "plif", "tau": 2.0},
        [1.0, 1.0, 1.25, 2.0, -1.0, 0.5, 3.0, 0.5, 1.75],
        [0.5, 0.75, 1.0, 1.0, -0.5, 0.0, 1.5, 0.25, 1.0],
        [0, 0, 1, 1, 0, 0, 1, 0, 1],
    ),
    # half the threshold to start from: the first spike comes two steps earlier, and then one every four
    "v_init": (
        {"kind": "if", "reset": "soft", "v_init": 0.5},
        [0.25] * 9,
        [0.75, 1.0, 0.25, 0.5, 0.75, 1.0, 0.25, 0.5, 0.75],
        [0, 1, 0, 0, 0, 1, 0, 0, 0],
    ),
    # as v_reset, from -0.5 + 0.25; a spike leaves -0.5
    "v_init and v_reset": (
        {"decay": 0.5, "threshold": 0.5, "firing": ">", "v_reset": -0.5, "v_init": 0.25},
        [0.5, 0.25, 0.75, 0.5, 0.75, 0.0, 2.0, 1.0, 0.625],
        [0.125, 0.0625, 0.53125, 0.0, 0.5, 0.0, 1.75, 0.5, 0.625],
        [0, 0, 1, 0, 0, 0, 1, 0, 1],
    ),
    "v_init and tau": (
        {"tau": 2.0, "v_init": 0.5},
        [1.0, 0.25, 1.5, 2.0, -1.0, 0.5, 3.0, 0.5, 1.75],
        [0.75, 0.5, 1.0, 1.0, -0.5, 0.0, 1.5, 0.25, 1.0],
        [0, 0, 1, 1, 0, 0, 1, 0, 1],
    ),
    "v_init and one step": ({"decay": 0.5, "v_init": 1.0}, [0.5], [1.0], [1]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_membrane_potentials_by_hand(case):
    arguments, x, potentials, spikes = BY_HAND[case]
    neuron = NeuronFactory(NeuronConfig(**arguments))(1)
    assert _potentials(neuron, x) == (potentials, spikes)


def test_dropout_of_neurons():
    torch.manual_seed(0)
    x = torch.full((5, 100, 40), 2.0)
    rectified, fired = (NeuronFactory(NeuronConfig(kind=kind), drop=0.25)(40) for kind in ("relu", "if"))
    for neuron, value in ((rectified, 2.0), (fired, 1.0)):
        out = neuron(x)
        kept = out > 0
        torch.testing.assert_close(out[kept], torch.full_like(out[kept], value / 0.75))
        # 4000 neurons that are kept or not; of the rectified ones 20,000, for they know no time.
        assert abs(kept.float().mean() - 0.75) < 5 * (0.75 * 0.25 / 4000) ** 0.5
        assert torch.equal(neuron.eval()(x), torch.full_like(x, value))
    out = fired.train()(x)
    assert torch.equal(out, out[:1].expand_as(out))  # a neuron is there at all steps or at none
    model = spikezoo.create_model("test_spiking_mlp", neuron_drop=0.5, T=2, threshold=0.1)
    image = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(image), model(image))
    plain = spikezoo.create_model("test_spiking_mlp", T=2, threshold=0.1).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(image), plain(image)) and plain(image).any()


def test_charge_by_hand():
    v, x = torch.tensor([0.5]), torch.tensor([1.0])
    for arguments, from_rest, from_half in (
        ({"decay": 0.25}, 1.0, 1.125),
        ({"decay": 0.25, "v_reset": 0.25}, 1.25, 1.3125),
        ({"tau": 4.0}, 0.25, 0.625),
        ({"tau": 4.0, "v_reset": 0.25}, 0.5, 0.6875),
        ({"kind": "if", "v_reset": 0.25}, 1.25, 1.5),
        ({"kind": "plif", "tau": 2.0, "v_reset": 0.25}, 0.75, 0.875),
    ):
        neuron = NeuronFactory(NeuronConfig(**arguments))(1)
        assert (neuron.charge(None, x).item(), neuron.charge(v, x).item()) == (from_rest, from_half), arguments


def test_firing_exactly_at_the_threshold():
    x = torch.tensor([0.5, 1.0, 1.0 + 2**-23]).view(1, 1, 3)
    assert LIF(NeuronConfig(firing=">="))(x).tolist() == [[[0, 1, 1]]]
    assert LIF(NeuronConfig(firing=">"))(x).tolist() == [[[0, 0, 1]]]
    for requires_grad in (False, True):
        zero = torch.zeros(1, requires_grad=requires_grad)
        assert spike(zero).item() == 1 and spike(zero, strict=True).item() == 0


# ----------------------------------------------------------------------------------------------- SpikingJelly

SURROGATES = {
    "sigmoid": lambda: sj_surrogate.Sigmoid(4.0),
    "arctan": lambda: sj_surrogate.ATan(2.0),
    "triangle": lambda: sj_surrogate.PiecewiseQuadratic(1.0),
}


def _against(ours, theirs, T, x_scale=1.5, dtype=torch.float32, rtol=1e-6):
    """Same spikes bit by bit; same gradients of the input and of every parameter, relative to their largest entry."""
    g = torch.Generator().manual_seed(T)
    x = (torch.randn(T, 16, 32, generator=g, dtype=dtype) * x_scale + 0.3).requires_grad_()
    weight = torch.randn(T, 16, 32, generator=g, dtype=dtype)
    leaves = [x, *ours.parameters()]
    s = ours(x)
    gradients = torch.autograd.grad((s * weight).sum(), leaves)
    wanted = theirs(x)
    wanted_gradients = torch.autograd.grad((wanted * weight).sum(), [x, *theirs.parameters()])
    functional.reset_net(theirs)
    assert 0.05 < wanted.mean() < 0.95
    assert torch.equal(s, wanted)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * want.abs().max().item())
    return gradients


LIF_CASES = [
    ({"tau": 2.0}, {"tau": 2.0, "decay_input": True}),
    ({"tau": 4.0}, {"tau": 4.0, "decay_input": True}),
    ({"decay": 0.5}, {"tau": 2.0, "decay_input": False}),
]


@pytest.mark.parametrize("T", [1, 2, 8])
@pytest.mark.parametrize("name", SURROGATES)
def test_lif_if_and_plif_against_spikingjelly(name, T):
    for reset, detach in itertools.product(("hard", "soft"), (False, True)):
        shared = {
            "v_reset": 0.0 if reset == "hard" else None,
            "surrogate_function": SURROGATES[name](),
            "detach_reset": detach,
            "step_mode": "m",
        }
        config = {"surrogate": name, "reset": reset, "detach_reset": detach}
        for ours, theirs in LIF_CASES:
            scale = ours.get("tau", 1.0)
            _against(LIF(NeuronConfig(**ours, **config)), sj_neuron.LIFNode(**theirs, **shared), T, x_scale=scale)
        _against(IF(NeuronConfig(kind="if", **config)), sj_neuron.IFNode(**shared), T)
        ours = PLIF(NeuronConfig(kind="plif", tau=3.0, **config))
        theirs = sj_neuron.ParametricLIFNode(init_tau=3.0, decay_input=True, **shared)
        assert ours.w.item() == theirs.w.item()
        # The gradient of w sums 512 T products in another order than SpikingJelly does.
        _against(ours, theirs, T, x_scale=3.0, rtol=5e-6)


@pytest.mark.parametrize("T", [1, 8])
def test_reset_potential_against_spikingjelly(T):
    # In float64, where a rounding done in another order flips no spike.
    theirs = {"v_reset": -0.3, "v_threshold": 0.7, "step_mode": "m"}
    config = {"v_reset": -0.3, "threshold": 0.7}
    for ours, node in LIF_CASES:
        _against(
            LIF(NeuronConfig(**ours, **config)),
            sj_neuron.LIFNode(**node, **theirs),
            T,
            ours.get("tau", 1.0),
            torch.float64,
            1e-12,
        )
    _against(IF(NeuronConfig(kind="if", **config)), sj_neuron.IFNode(**theirs), T, 1.0, torch.float64, 1e-12)


def test_detach_reset_changes_the_gradient():
    x = torch.full((2, 1, 1), 0.9, requires_grad=True)
    gradients = []
    for detach in (False, True):
        neuron = LIF(NeuronConfig(decay=1.0, surrogate="triangle", detach_reset=detach))
        gradients.append(torch.autograd.grad(neuron(x)[1].sum(), x)[0].flatten().tolist())
    # u = 0.9, no spike; then u = 1.8, slope 1 - 0.8 = 0.2. The reset's path is -u g'(0.9 - 1) = -0.9 * 0.9.
    assert gradients[1] == pytest.approx([0.2, 0.2])
    assert gradients[0] == pytest.approx([0.2 * (1 - 0.81), 0.2])


# ------------------------------------------------------------------------------------------------- surrogates

# Slope at a distance to the threshold, by hand.
SLOPES = [
    # MPBN's code: 3 (1 - tanh(3 x)^2) / (2 tanh 1.5) within 0.5 of the threshold
    ("tanh", None, {0.0: 1.657187, 0.25: 0.988655, -0.25: 0.988655, 0.5: 0.299465, -0.5: 0.299465, 0.501: 0, -1.0: 0}),
    ("triangle", None, {0.0: 1, 0.25: 0.75, -0.25: 0.75, 1.0: 0, -1.0: 0, 2.0: 0}),
    ("triangle", 2.0, {0.0: 2, 0.25: 1, -0.25: 1, 0.5: 0, 1.0: 0}),
    ("rectangle", None, {0.0: 1, 0.5: 1, -0.5: 1, 0.501: 0, -0.501: 0}),
    ("rectangle", 2.0, {0.0: 2, 0.25: 2, -0.25: 2, 0.251: 0, -0.5: 0}),
    # 4 sigmoid(4 x) (1 - sigmoid(4 x)); sigmoid(1) = 0.731059
    ("sigmoid", None, {0.0: 1, 0.25: 0.786448, -0.25: 0.786448}),
    ("sigmoid", 1.0, {0.0: 0.25, 1.0: 0.196612}),
    # 1 / (1 + (pi x)^2)
    ("arctan", None, {0.0: 1, 1 / math.pi: 0.5, -1 / math.pi: 0.5, 0.5: 0.288400}),
    ("arctan", 1.0, {0.0: 0.5, 2 / math.pi: 0.25}),
]


@pytest.mark.parametrize(("name", "alpha", "points"), SLOPES)
def test_surrogate_slopes_by_hand(name, alpha, points):
    x = torch.tensor(list(points), requires_grad=True)
    for strict in (False, True):
        s = spike(x, name, alpha, strict)
        assert s.tolist() == [float(p > 0 or (p == 0 and not strict)) for p in points]
        (gradient,) = torch.autograd.grad((3 * s).sum(), x)
        assert gradient.tolist() == pytest.approx([3 * slope for slope in points.values()], rel=2e-5)


def test_surrogate_alpha_reaches_the_neuron():
    x = torch.tensor([[[0.75]]], requires_grad=True)
    (gradient,) = torch.autograd.grad(LIF(NeuronConfig(surrogate="triangle", surrogate_alpha=2.0))(x).sum(), x)
    assert gradient.item() == 1.0


# ------------------------------------------------------------------------------------------------------- MPBN


def _hand_norm(mode):
    """Two channels: the normalised potential itself in the first, 0.25 - 2 times it in the second."""
    norm = MembraneNorm(mode, 2)
    with torch.no_grad():
        norm.weight[1], norm.bias[1] = -2.0, 0.25
    return LIF(NeuronConfig(decay=0.5, threshold=0.5, firing=">"), norm)


@pytest.mark.parametrize("mode", ["channel", "element"])
def test_mpbn_by_hand(mode):
    neuron = _hand_norm(mode)
    #                     sample 1      sample 2
    x = torch.tensor([[[1.0, 0.0], [3.0, 4.0]], [[1.0, 2.0], [1.0, -2.0]]])
    # Step 1, channel 1: u = 1, 3; mean 2, variance 1 (2 unbiased); normalised -1, 1: the second fires; v = 1, 0.
    # Step 2, channel 1: u = 1.5, 1; mean 1.25, variance 1/16 (1/8 unbiased); normalised 1, -1: the FIRST fires.
    # Had the normalised potential been carried on, v = -1, 0 and u = 0.5, 1: the second would fire.
    # Step 1, channel 2: u = 0, 4; mean 2, variance 4 (8); z = 2.25, -1.75: the first fires; v = 0, 4.
    # Step 2, channel 2: u = 2, 0; mean 1, variance 1 (2); z = -1.75, 2.25: the second fires.
    assert neuron(x).tolist() == [[[0, 1], [1, 0]], [[1, 0], [0, 1]]]
    # Two updates with momentum 0.1: mean 0.2 then 0.9 * 0.2 + 0.125; variance 0.9 + 0.2 then 0.9 * 1.1 + 0.0125.
    torch.testing.assert_close(neuron.norm.running_mean, torch.tensor([0.305, 0.28]))
    torch.testing.assert_close(neuron.norm.running_var, torch.tensor([1.0025, 1.73]))
    neuron.eval()
    # Channel 1 fires above 0.305 + 0.5 sqrt(1.0025) = 0.805625; channel 2 below 0.28 - 0.125 sqrt(1.73) = 0.115588.
    x = torch.tensor([[[0.805, 0.116], [0.806, 0.115]]])
    assert neuron(x).tolist() == [[[0, 0], [1, 1]]]
    assert neuron.norm.running_mean.tolist() == pytest.approx([0.305, 0.28])
    # The same set decides the second step: sample 1 has u = 1.2075, 0.174; sample 2 was reset and repeats itself.
    assert neuron(x.expand(2, 2, 2)).tolist()[1] == [[1, 0], [1, 1]]


def test_mpbn_statistics_of_each_step_and_of_a_map():
    norm = MembraneNorm("channel", 3)
    neuron = LIF(NeuronConfig(decay=0.25, threshold=0.5, firing=">"), norm)
    x = torch.randn(3, 4, 3, 5, 5)
    spikes = []
    wanted = neuron(x)
    mean, v = torch.zeros(3), torch.zeros_like(x[0])
    for current in x:  # the authors' loop, with torch's own batch norm
        u = 0.25 * v + current
        z = nn.functional.batch_norm(u, None, None, training=True)
        spikes.append((z > 0.5).float())
        v = u * (1 - spikes[-1])
        mean = 0.9 * mean + 0.1 * u.mean((0, 2, 3))
    assert torch.equal(torch.stack(spikes), wanted)
    torch.testing.assert_close(norm.running_mean, mean)
    element = MembraneNorm("element", 3, (5, 5))
    z = element(x[0])
    torch.testing.assert_close(z.mean(0), torch.zeros(3, 5, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(element.running_mean, 0.1 * x[0].mean(0))
    torch.testing.assert_close(element.running_var, 0.9 + 0.1 * x[0].var(0))
    with pytest.raises(ValueError, match=r"built for feature maps \(3, 5, 5\) and got \(3, 4, 4\).*img_size="):
        element(torch.zeros(2, 3, 4, 4))


def test_mpbn_evaluation_is_batch_norm():
    norm = MembraneNorm("channel", 6)
    reference = nn.BatchNorm2d(6)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = torch.rand(6) + 0.5
            getattr(norm, name).copy_(value)
            getattr(reference, name).copy_(value)
    x = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(norm.eval()(x), reference.eval()(x))


# ------------------------------------------------------------------------------------------------------ state


@pytest.mark.parametrize("kind", ["lif", "if", "plif"])
def test_state_is_local(kind):
    neuron = NeuronFactory(NeuronConfig(kind=kind, tau=2.0 if kind == "plif" else None), "channel")(3, (4, 4)).eval()
    x = torch.randn(4, 2, 3, 4, 4, requires_grad=True)
    first = neuron(x)
    assert 0 < first.mean() < 1
    assert torch.equal(neuron(x), first)
    first.sum().backward()
    assert torch.equal(copy.deepcopy(neuron)(x), first)
    assert neuron(x[:, :1]).shape == (4, 1, 3, 4, 4)
    assert neuron(torch.randn(2, 5, 3, 4, 4)).shape == (2, 5, 3, 4, 4)
    assert torch.equal(neuron(x), first)


def test_models_keep_no_state():
    model = spikezoo.create_model("test_mpbn_resnet").eval()
    x = torch.randn(2, 3, 32, 32)
    first = model(x)
    first.sum().backward()
    assert torch.equal(model(x), first) and torch.equal(copy.deepcopy(model)(x), first)
    torch.testing.assert_close(model(x[:1]), first[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_keeps_a_float32_potential(dtype):
    # 1 + 2^-12 is not a number in either type; accumulated there, the neuron would stay at 1 for ever.
    x = torch.tensor([1.0, 2.0**-12]).view(2, 1, 1).to(dtype)
    assert (x[0] + x[1] == 1).all()
    s = IF(NeuronConfig(kind="if", threshold=1.0 + 2**-13))(x)
    assert s.flatten().tolist() == [0, 1] and s.dtype == dtype


def test_spikes_keep_the_layout_of_the_input():
    x = torch.randn(6, 4, 5, 5).to(memory_format=torch.channels_last).unflatten(0, (3, 2))
    s = LIF(NeuronConfig(), MembraneNorm("channel", 4))(x)
    assert s.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(s, LIF(NeuronConfig(), MembraneNorm("channel", 4))(x.contiguous()))


# ------------------------------------------------------------------------------- compile, autocast and export


def test_compiled_neuron_equals_eager():
    config = NeuronConfig(decay=0.25, threshold=0.5, v_init=0.25, surrogate="tanh")
    neuron = LIF(config, MembraneNorm("channel", 3))
    compiled = torch.compile(copy.deepcopy(neuron), fullgraph=True)
    x = torch.randn(2, 4, 3, 2, 2)
    results = []
    for module in (neuron, compiled):
        current = x.clone().requires_grad_()
        s = module(current)
        s.square().sum().backward()
        results.append((s.detach(), current.grad, *[p.grad for p in module.parameters()]))
    for eager, inductor in zip(*results, strict=True):
        assert eager.abs().max() > 0
        torch.testing.assert_close(inductor, eager, rtol=1e-4, atol=1e-5)


def test_autocast():
    model = spikezoo.create_model("test_mpbn_vgg", T=2)
    x = torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y, rates = WithRates(model)(x)
    y.float().square().sum().backward()
    assert y.isfinite().all() and (rates > 0).all() and (rates < 1).all()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("mpbn", [None, "channel", "element"])
def test_export_of_a_neuron(mpbn):
    neuron = NeuronFactory(NeuronConfig(), mpbn)(3, (4, 4)).eval()
    x = torch.randn(2, 2, 3, 4, 4) * 2
    program = torch.export.export(neuron, (x,), strict=False).module()
    other = torch.randn(2, 2, 3, 4, 4) * 2
    assert torch.equal(program(other), neuron(other))


def test_export_of_a_model():
    model = spikezoo.create_model("test_mpbn_resnet", T=2).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False).module()
        other = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(program(other), model(other), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ twins


def test_relu_and_sign_twins():
    x = torch.tensor([-2.0, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0], requires_grad=True)
    factory = NeuronFactory(NeuronConfig(kind="relu"))
    relu, sign = factory(4), NeuronFactory(NeuronConfig(kind="sign"))(4)
    assert isinstance(relu, ReLU) and isinstance(sign, Sign)
    assert relu(x).tolist() == [0, 0, 0, 0, 0.5, 1, 3]
    s = sign(x)
    assert s.tolist() == [-1, -1, -1, 0, 1, 1, 1]
    (gradient,) = torch.autograd.grad((2 * s).sum(), x)
    assert gradient.tolist() == [0, 0, 3, 4, 2, 0, 0]  # 2 * 2 (1 - |x|)
    assert not NeuronConfig(kind="relu").spiking and NeuronConfig(kind="plif").spiking


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "lfi"}, r"neuron='lfi' does not exist\. Did you mean .*'lif'"),
        ({"surrogate": "sigmoyd"}, r"surrogate='sigmoyd' does not exist\. Did you mean 'sigmoid'"),
        ({"surrogate": "xyz"}, r"surrogate='xyz' does not exist\. Valid: arctan, rectangle, sigmoid, tanh, triangle"),
        ({"reset": "soflt"}, r"reset='soflt' does not exist\. Did you mean 'soft'"),
        ({"firing": "=>"}, r"firing='=>' does not exist\. Did you mean .*'>='"),
        ({"decay": 1.5}, r"decay=1\.5: expected a number in \[0, 1\]"),
        ({"decay": -0.1}, r"decay=-0\.1: expected a number in \[0, 1\]"),
        ({"decay": "fast"}, r"decay='fast': expected a finite number"),
        ({"decay": None}, r"decay=None: expected a finite number"),
        ({"decay": True}, r"decay=True: expected a finite number"),
        ({"tau": 0.5}, r"tau=0\.5: expected a time constant >= 1"),
        ({"tau": math.inf}, r"tau=inf: expected a finite number"),
        ({"kind": "plif", "tau": 1.0}, r"tau=1\.0: a learned time constant starts above 1"),
        ({"threshold": 0.0}, r"threshold=0\.0: expected a positive number"),
        ({"threshold": math.nan}, r"threshold=nan: expected a finite number"),
        ({"v_init": math.inf}, r"v_init=inf: expected a finite number"),
        ({"v_reset": None}, r"v_reset=None: expected a finite number"),
        ({"surrogate_alpha": -1.0}, r"surrogate_alpha=-1\.0: expected a positive number"),
        ({"detach_reset": "false"}, r"detach_reset='false': expected True or False"),
        ({"reset": "soft", "v_reset": 0.3}, r"v_reset=0\.3 with reset='soft'.*Leave v_reset out"),
    ],
)
def test_bad_values_of_a_configuration(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeuronConfig(**arguments)


@pytest.mark.parametrize(
    ("kind", "given", "error", "message"),
    [
        (None, {"decay": 0.5, "tau": 2.0}, ValueError, r"decay=0\.5 and tau=2\.0 were both given"),
        (None, {"treshold": 1.0}, UnknownArgumentError, r"Unknown argument 'treshold'\. Did you mean 'threshold'"),
        ("if", {"decay": 0.5}, ValueError, r"neuron='if' has no decay"),
        ("if", {"tau": 2.0}, ValueError, r"neuron='if' has no decay"),
        ("plif", {"decay": 0.5}, ValueError, r"neuron='plif' learns its decay: .*tau=2\.0"),
    ],
)
def test_bad_combinations_of_neuron_arguments(kind, given, error, message):
    with pytest.raises(error, match=message):
        NeuronConfig.resolve({"decay": 0.25}, kind, given)


def test_merging_a_familys_constants_with_what_was_given():
    family = {"decay": 0.25, "threshold": 0.5, "firing": ">"}
    assert NeuronConfig.resolve(family, None, {"decay": None}) == NeuronConfig(decay=0.25, threshold=0.5, firing=">")
    assert NeuronConfig.resolve({"tau": 3.0}, None, {"decay": 0.5}).tau is None  # the form that was given wins
    assert NeuronConfig.resolve(family, None, {"tau": 3.0}).tau == 3.0
    assert NeuronConfig.resolve(family, "plif", {}).tau == 2.0
    assert NeuronConfig.resolve(family, "if", {}).kind == "if"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mpbn": "channel", "neuron": "relu"}, r"mpbn='channel' normalises .*neuron='relu' has none.*mpbn='none'"),
        ({"mpbn": "chanel"}, r"mpbn='chanel' does not exist\. Did you mean 'channel'"),
        ({"T": 0}, r"T=0: expected an integer >= 1"),
        ({"T": 2.0}, r"T=2\.0: expected an integer >= 1"),
        ({"T": True}, r"T=True: expected an integer >= 1"),
        ({"T": 4, "neuron": "relu", "mpbn": "none"}, r"T=4 with neuron='relu'.*Use T=1"),
        ({"surrogate": "sigmoyd"}, r"surrogate='sigmoyd' does not exist\. Did you mean 'sigmoid'"),
        ({"decay": 0.5, "tau": 2.0}, r"both given"),
        ({"img_size": 32.0}, r"img_size=32\.0: expected an integer >= 1"),
        ({"img_size": "32"}, r"img_size='32': expected one number or \(height, width\)"),
        ({"drop_rate": 1.5}, r"drop_rate=1\.5: expected a number in \[0, 1\)"),
        ({"global_pool": "mean"}, r"global_pool='mean' does not exist: expected 'avg', 'max' or ''"),
        ({"global_pool": ""}, r"global_pool='' with num_classes=10: .* Use num_classes=0"),
    ],
)
def test_bad_arguments_of_a_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        spikezoo.create_model("test_mpbn_vgg", **arguments)


def test_nearest_names():
    assert nearest("lfi", ["lif", "relu"]) == "Did you mean 'lif'?"
    assert nearest("something", ["b", "a"]) == "Valid: a, b."
    assert nearest(None, ["a"]) == "Valid: a."
