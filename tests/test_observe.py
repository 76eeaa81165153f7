"""Observers: firing rates by hand, of SpikingJelly's neurons too; nothing moves in the model; threads do not mix."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import spikezoo
from spikezoo import pictures
from spikezoo.evaluate import accuracy_over_time, evaluate, read_layer_rates
from spikezoo.neurons import LIF, NeuronConfig, SpikingNeuron
from spikezoo.observe import WithRates, failing_layers, firing_rates
from spikezoo.transforms.dynsnn import neuron_rates


def test_firing_rates_by_hand():
    net = nn.Sequential(LIF(NeuronConfig(decay=1.0)), nn.Identity(), LIF(NeuronConfig(decay=1.0, threshold=0.5)))
    x = torch.tensor([[[1.0, 0.5], [0.0, 0.0]], [[1.0, 0.5], [0.0, 0.25]]])
    # First layer: step 1 fires 1 of 4, step 2 fires 2 of 4; the second layer repeats its spikes.
    assert {name: rate.tolist() for name, rate in firing_rates(net, x).items()} == {"0": [0.25, 0.5], "2": [0.25, 0.5]}
    assert firing_rates(net, x * 0)["2"].tolist() == [0, 0]
    output, rates = WithRates(net)(x.requires_grad_())
    assert torch.equal(output, net(x)) and rates.tolist() == [[0.25, 0.5], [0.25, 0.5]]
    rates[1].sum().backward()  # for penalties on activity
    assert x.grad.abs().sum() > 0


def test_firing_rates_leave_no_probes_behind():
    model = spikezoo.create_model("test_spiking_vgg", T=3)
    x = torch.randn(2, 3, 32, 32)
    rates = firing_rates(model, x)
    neurons = {name: module for name, module in model.named_modules() if isinstance(module, SpikingNeuron)}
    assert list(rates) == list(neurons) and len(rates) == 5
    assert all(rate.shape == (3,) for rate in rates.values())
    assert all(neuron.probe is None for neuron in neurons.values())
    model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        firing_rates(model, x)
    assert all(neuron.probe is None for neuron in neurons.values())


@pytest.mark.parametrize("mode", ["m", "s"])
def test_firing_rates_of_spikingjelly(mode):
    from spikingjelly.activation_based import neuron

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = neuron.IFNode(step_mode=mode), neuron.IFNode(v_threshold=2.0, step_mode=mode)
            self.unused = neuron.IFNode(step_mode=mode)

        def forward(self, x):  # [T, B, C]
            return torch.stack([self.second(self.first(frame)) for frame in x]) if mode == "s" else self.run(x)

        def run(self, x):
            return self.second(self.first(x))

    net = Net()
    x = torch.tensor([[[1.0, 0.5], [0.0, 0.0]], [[1.0, 0.5], [0.0, 0.25]], [[0.0, 0.5], [0.0, 0.0]]])
    net(x)  # what stays in its potentials is no part of the rates, and the rates leave it as it is
    before = [m.v.clone() for m in (net.first, net.second)]
    # Of four neurons the first fires at steps 1 and 2, the second at step 2; two spikes make the next layer fire.
    for _ in range(2):
        rates = firing_rates(net, x)
        assert rates["first"].tolist() == [0.25, 0.5, 0] and rates["second"].tolist() == [0, 0.25, 0]
        assert rates["unused"].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(before, (net.first.v, net.second.v), strict=True))
    assert not any(module._forward_hooks for module in net.modules())


def trace(model):
    """All that a call could move."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(m.training, len(m._forward_hooks), getattr(m, "probe", None)) for m in model.modules()]
    return state, modules, torch.get_rng_state()


OBSERVERS = {
    "firing_rates": lambda model, x: list(firing_rates(model, x).values()),
    "neuron_rates": lambda model, x: list(neuron_rates(model, [x]).values()),
    "count": lambda model, x: [torch.tensor(spikezoo.count(model, x).sops_exact)],
    "spikes": lambda model, x: [pictures.spikes_over_time(model, x[0])[1]],
    "maps": lambda model, x: [pictures.activation_maps(model, x[0])[1]],
}


@pytest.fixture
def frozen():
    """A model in training whose running statistics, dropout and random codes would move, and whose stem is frozen."""
    model = spikezoo.create_model("test_mpbn_resnet", T=2, drop_rate=0.5, encoding="poisson")
    model.stem.eval()
    return model


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_move_nothing(name, frozen):
    x = torch.rand(2, 3, 32, 32)
    state, modules, draws = trace(frozen)
    OBSERVERS[name](frozen, x)
    after = trace(frozen)
    assert all(torch.equal(value, after[0][key]) for key, value in state.items())
    assert modules == after[1] and torch.equal(draws, after[2])


@pytest.mark.parametrize("measure", [evaluate, accuracy_over_time])
def test_evaluation_leaves_what_was_frozen_frozen(measure, frozen):
    modules = trace(frozen)[1]
    measure(frozen, [(torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))])
    assert trace(frozen)[1] == modules


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_in_threads_do_not_mix(name):
    model = spikezoo.create_model("test_spiking_vgg", T=4)
    model(torch.randn(8, 3, 32, 32))
    inputs = [(0.5 + number) * torch.randn(1 + number % 2, 3, 32, 32) for number in range(4)]
    expected = [OBSERVERS[name](model, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = pool.map(lambda x: OBSERVERS[name](model, x), inputs)
            for one, two in zip(found, expected, strict=True):
                assert len(one) == len(two) and all(map(torch.equal, one, two))
    assert all(module.training for module in model.modules())


def test_layers_that_say_nothing():
    rates = {"silent": 0.0, "nearly": 1e-5, "low": 2e-4, "high": 0.98, "always": 1.0, "not run": float("nan")}
    found = {"silent": "dead (rate 0)", "nearly": "dead (rate 1e-05)", "always": "saturated (rate 1)"}
    assert failing_layers(rates) == found
    assert list(failing_layers(rates, dead=0.01, saturated=0.9)) == ["silent", "nearly", "low", "high", "always"]


def test_table_of_rates_over_epochs(tmp_path):
    path = tmp_path / "layer_rates.csv"
    path.write_text("epoch,a,b\n0,0.5,\n1,0.75,1.0\n")
    rates = read_layer_rates(path, ["b", "a"])
    assert rates["a"] == [0.5, 0.75] and rates["b"][1] == 1 and rates["b"][0] != rates["b"][0]
