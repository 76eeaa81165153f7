"""DynSNN: rates by hand, what fades, what belongs to a neuron, reactivation, pruning, training, the command."""

import csv
import json
import signal

import pytest
import torch
from conftest import ROOT, run_code, two_ranks
from safetensors.torch import load_file
from test_models import fill
from test_train import DISTRIBUTED, assert_same_end, assert_same_weights, interrupted, load, summary
from timm.optim import create_optimizer_v2
from torch import nn

import spikezoo
from spikezoo import pictures
from spikezoo.checkpoint import Config, load_state
from spikezoo.cli import main
from spikezoo.data import create_loader
from spikezoo.evaluate import input_options
from spikezoo.neurons import IF, LIF, NeuronConfig, SpikingNeuron
from spikezoo.transforms import bake, dynsnn, dynsnn_training, replay
from spikezoo.transforms.dynsnn import (
    dynsnn_report,
    fade,
    find_threshold,
    masks_of,
    neuron_rates,
    prune,
    reactivate,
    share,
    sweep_thresholds,
    threshold_for,
    without,
)
from spikezoo.transforms.reach import Reach

MICRO = ["test_spiking_mlp", "test_spiking_vgg", "test_mpbn_vgg", "test_spiking_resnet", "test_mpbn_resnet"]
MICRO += ["test_spikformer", "test_autost"]


def images_for(model, count=4):
    return torch.randn(count, model.in_chans, *model.img_size, generator=torch.Generator().manual_seed(5))


def settled(name="test_spiking_vgg", per="channel", **arguments):
    """A model whose neurons fire, down to the classifier, with masks of DynSNN."""
    return fill(spikezoo.create_model(name, T=3, dynsnn={"per": per}, **arguments)).eval()


def random_rates(model, seed=1):
    """Rates drawn at random from 0 to 1, the first of each layer 1, so that some neuron of it stays."""
    generator = torch.Generator().manual_seed(seed)
    rates = {name: torch.rand(mask.shape, generator=generator) for name, mask in masks_of(model).items()}
    for rate in rates.values():
        rate.view(-1)[0] = 1.0
    return rates


class Repeat(nn.Module):
    """The same image at T steps, weights, neurons, and the mean over time."""

    def __init__(self, weight, neuron, T=4):
        super().__init__()
        self.linear = nn.Linear(*reversed(weight.shape), bias=False)
        self.linear.weight.data = weight
        self.neuron, self.T = neuron, T

    def forward(self, x):
        return self.neuron(self.linear(x).expand(self.T, *x.shape[:1], -1)).mean(0)


# ---------------------------------------------------------------------------------------------- rates by hand


def test_rates_of_three_neurons_by_hand():
    # Integrate and fire, threshold 1, hard reset, T=4. Input currents of the first sample: 0.3 (0.3 0.6 0.9 1.2: one
    # spike), 0.5 (two), 1 (four); of the second 0.6 (two), 1 (four), 2 (four); of the third 0, 0, 0.
    net = Repeat(torch.tensor([[0.3], [0.5], [1.0]]), IF(NeuronConfig(kind="if")))
    x = torch.tensor([[1.0], [2.0], [0.0]])
    wanted = torch.tensor([(1 / 4 + 2 / 4) / 3, (2 / 4 + 1) / 3, (1 + 1) / 3], dtype=torch.float64)
    for batches in ([x], [x[:2], x[2:]], [(x, torch.arange(3))]):
        (rate,) = neuron_rates(net, batches).values()
        torch.testing.assert_close(rate, wanted, rtol=0, atol=1e-15)
    assert neuron_rates(net, [x]).keys() == {"neuron"}


def test_silent_and_always_firing_nets():
    silent, busy = (Repeat(torch.full((5, 1), weight), LIF(NeuronConfig())) for weight in (0.0, 9.0))
    x = torch.ones(2, 1)
    assert neuron_rates(silent, [x])["neuron"].tolist() == [0] * 5
    assert neuron_rates(busy, [x])["neuron"].tolist() == [1] * 5
    assert not fade(neuron_rates(silent, [x]), 0)["neuron"].any()  # 0 removes nothing, even what never fires
    assert fade(neuron_rates(silent, [x]), 1e-9)["neuron"].all()
    assert not fade(neuron_rates(busy, [x]), 1)["neuron"].any()


def test_rates_of_maps_and_of_a_wider_batch(monkeypatch):
    model = settled(per="unit")
    x = images_for(model, 7)
    seen = {}
    forward = SpikingNeuron.forward
    monkeypatch.setattr(
        SpikingNeuron, "forward", lambda self, *x: seen.setdefault(self, []).append(forward(self, *x)) or seen[self][-1]
    )
    with torch.no_grad():
        model(x)
    monkeypatch.undo()
    rates, channels = neuron_rates(model, x.split(3)), neuron_rates(model, [x], per="channel")
    for name, neuron in model.named_modules():
        if isinstance(neuron, SpikingNeuron):
            (spikes,) = seen[neuron]
            torch.testing.assert_close(rates[name], spikes.double().mean((0, 1)), rtol=0, atol=1e-12)
            assert rates[name].shape == neuron.shape == neuron.mask.shape
            by_channel = rates[name].flatten(1).mean(1) if rates[name].dim() > 1 else rates[name]
            torch.testing.assert_close(channels[name], by_channel, rtol=0, atol=1e-12)
    assert neuron_rates(settled(per="channel"), [x])["stem.0.neuron"].dim() == 1  # what the masks are made for


def test_nothing_of_the_measurement_survives():
    model = settled().train()
    model.stem.eval()  # a part that stays as it is
    before = {name: value.clone() for name, value in model.state_dict().items()}
    neuron_rates(model, [images_for(model)])
    dynsnn_report(model)
    with pytest.raises(RuntimeError):
        neuron_rates(Broken(model), [images_for(model)])
    assert model.training and not model.stem.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Broken(nn.Module):
    """Fails after its model has run."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        self.model(x)
        raise RuntimeError


# ------------------------------------------------------------------------------------------ what fades


def by_hand():
    """Rates of two layers, of 4 neurons and of 3 channels of 2x2 neurons, and a model of such layers."""
    neurons = LIF(NeuronConfig()), LIF(NeuronConfig())
    neurons[0].shape, neurons[1].shape = (4,), (3, 2, 2)
    for neuron in neurons:
        neuron.mask = torch.ones(neuron.shape[:1], dtype=torch.bool)
    model = nn.ModuleDict({"a": neurons[0], "b": neurons[1]})
    rates = {"a": [0.1, 0.2, 0.3, 0.9], "b": [0.15, 0.0, 0.8]}
    return model, {name: torch.tensor(values, dtype=torch.float64) for name, values in rates.items()}


def test_threshold_for_a_compression_by_hand():
    model, rates = by_hand()
    # In order: 0 (four neurons), 0.1 (one), 0.15 (four), 0.2, 0.3 (one each), 0.8 (four), 0.9 (one); 16 in all.
    for compression, removed in (
        (0, 0),
        (0.01, 4),
        (4 / 16, 4),
        (0.26, 5),
        (5 / 16, 5),
        (0.4, 9),
        (0.6, 10),
        (0.65, 11),
    ):
        threshold = threshold_for(model, rates, compression)
        assert share(model, fade(rates, threshold)) == 100 * removed / 16, compression
    with pytest.raises(ValueError, match=r"remove all 3 neurons of layer 'b'.* 0\.8; .* at most 0\.6875 can go"):
        threshold_for(model, rates, 0.7)
    with pytest.raises(ValueError, match="compression=1"):
        threshold_for(model, rates, 1)


def test_fading_neurons_are_silent_for_a_while():
    model, rates = by_hand()
    with without(model, fade(rates, 0.15)):
        assert masks_of(model)["a"].tolist() == [False, True, True, True]
        assert masks_of(model)["b"].tolist() == [True, False, True]
        x = torch.full((2, 1, 3, 2, 2), 5.0)
        assert model["b"](x).mean((0, 1, 3, 4)).tolist() == [1, 0, 1]
    assert all(mask.all() for mask in masks_of(model).values())


def test_the_threshold_of_a_tolerance_is_the_highest():
    model, rates = by_hand()
    asked = []

    def accuracy(net):
        asked.append(share(net, {name: ~mask for name, mask in masks_of(net).items()}))
        return 90 - asked[-1] / 10  # a point for every ten per cent of the neurons

    # The thresholds 0, 0.1, 0.15, 0.2, 0.3, 0.8 remove 0, 4, 5, 9, 10, 11 of 16: 0 25 31.25 56.25 62.5 68.75 per cent.
    for tolerance, threshold in ((0, 0), (2.4, 0), (2.5, 0.1), (5.6, 0.15), (5.7, 0.2), (6.5, 0.3), (100, 0.8)):
        assert find_threshold(model, rates, accuracy, tolerance) == threshold, tolerance
    rows = sweep_thresholds(model, rates, accuracy, 99)
    assert [(row["threshold"], row["compression"]) for row in rows] == [
        (0, 0), (0.1, 25), (0.15, 31.25), (0.2, 56.25), (0.3, 62.5), (0.8, 68.75)
    ]  # fmt: skip
    assert all(row["top1"] == pytest.approx(90 - row["compression"] / 10) for row in rows)
    assert len(sweep_thresholds(model, rates, accuracy, 3)) == 3


# --------------------------------------------------------------------------------- what belongs to a neuron


def test_what_matters_by_hand():
    # Four convolutions of 4, 6, 8, 10 channels with a max-pool behind the 2nd, 3rd and 4th, one linear layer of 16.
    model = settled()
    alive = {name: torch.ones_like(mask) for name, mask in masks_of(model).items()}
    names = list(alive)
    alive[names[0]][[0, 2]] = False
    alive[names[3]][[1]] = False
    alive[names[4]][3:9] = False
    reach = Reach(model, alive)
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert layers == list(reach.layers) and len(layers) == 6
    rows, columns = zip(*[reach.matters(name) for name in layers], strict=True)
    assert [(~flags).nonzero().flatten().tolist() for flags in rows] == [[0, 2], [], [], [1], [*range(3, 9)], []]
    places = model.img_size[0] // 8  # the linear layer reads the map of a channel in one go
    assert [(~flags).nonzero().flatten().tolist() for flags in columns] == [
        [], [0, 2], [], [], [*range(places**2, 2 * places**2)], [*range(3, 9)]
    ]  # fmt: skip
    assert [(~flags).nonzero().flatten().tolist() for flags in reach.norms.values()] == [
        [0, 2],
        [],
        [],
        [1],
        [*range(3, 9)],
    ]


def dead_parts(name, removed):
    """Layers with the rows and the columns that only removed neurons have; ``removed`` is layer -> channels."""
    model = settled(name)
    alive = {neuron: torch.ones_like(mask) for neuron, mask in masks_of(model).items()}
    for neuron, channels in removed.items():
        alive[neuron][channels] = False
    reach = Reach(model, alive)
    parts = {layer: [(~flags).nonzero().flatten().tolist() for flags in reach.matters(layer)] for layer in reach.layers}
    return {layer: tuple(part) for layer, part in parts.items() if part != [[], []]}


def test_what_belongs_to_the_neurons_of_residual_blocks():
    # The shortcut of the first block is the identity, the others have a convolution; the last map is averaged.
    name = "test_spiking_resnet"
    assert dead_parts(name, {"stem.0.neuron": [1]}) == {"stem.0.conv": ([1], []), "stages.0.0.conv1.conv": ([], [1])}
    assert dead_parts(name, {"stages.0.0.neuron": [0, 5]}) == {
        "stages.0.0.conv2.conv": ([0, 5], []),
        "stages.1.0.conv1.conv": ([], [0, 5]),
        "stages.1.0.shortcut.conv": ([], [0, 5]),
    }
    assert dead_parts(name, {"stages.2.0.neuron": [3], "stages.2.0.conv1.neuron": [2]}) == {
        "stages.2.0.conv1.conv": ([2], []),
        "stages.2.0.conv2.conv": ([3], [2]),
        "stages.2.0.shortcut.conv": ([3], []),
        "neck.0.linear": ([], [3]),
    }


def test_a_stream_keeps_what_one_of_its_joins_adds():
    model = settled("test_spikformer")
    names = list(masks_of(model))
    first, encoding = names[3:5]  # of the fourth convolution, and of the one that is added to it
    readers = {name for name in Reach(model, {}).layers if name.startswith("stages.0.0.attn.") and name[16] in "qkv"}
    assert len(readers) == 3
    assert not readers & dead_parts("test_spikformer", {first: [2]}).keys()
    found = dead_parts("test_spikformer", {first: [2], encoding: [2]})
    assert all(found[reader] == ([], [2]) for reader in readers)


def test_synapses_neurons_and_parameters_by_hand():
    model = settled("test_mpbn_vgg", img_size=8)
    rows = dynsnn_report(model)
    # Convolutions 3 -> 6 at 8x8, 6 -> 8 and 8 -> 8 at 4x4, 8 -> 12 at 2x2, each followed by pooling but the second; a
    # 3x3 kernel has 3n - 2 taps a side within a map of n, so 22^2 = 484, 10^2, 10^2, 4^2; the classifier 12 x 10.
    shapes = [neuron.shape for neuron in model.modules() if isinstance(neuron, SpikingNeuron)]
    assert shapes == [(6, 8, 8), (8, 4, 4), (8, 4, 4), (12, 2, 2)]
    assert rows["neurons"] == 6 * 64 + 8 * 16 + 8 * 16 + 12 * 4
    chans = [(model.in_chans, 6, 484), (6, 8, 100), (8, 8, 100), (8, 12, 16)]
    assert rows["synapses"] == sum(a * b * taps for a, b, taps in chans) + 120 == rows["synapses_left"]
    assert rows["parameters"] == sum(p.numel() for p in model.parameters()) == rows["parameters_left"]
    names = list(masks_of(model))
    rates = {name: torch.ones(mask.shape) for name, mask in masks_of(model).items()}
    rates[names[1]][[2, 5]] = 0.1
    prune(model, rates, 0.2)
    rows = dynsnn_report(model)
    assert rows["neurons_left"] == rows["neurons"] - 2 * 16
    chans[1:3] = [(6, 6, 100), (6, 8, 100)]
    assert rows["synapses_left"] == sum(a * b * taps for a, b, taps in chans) + 120
    # Of each channel: its row, its column in the next layer, bias, scale and shift of both norms.
    assert rows["parameters_left"] == rows["parameters"] - 2 * (6 * 9 + 8 * 9 + 1 + 2 + 2)


@pytest.mark.parametrize("per", ["unit", "channel"])
@pytest.mark.parametrize("name", MICRO)
def test_pruned_weights_change_no_logit(name, per):
    model = settled(name, per)
    x = images_for(model)
    whole = model(x)
    for seed in range(30):
        rates = random_rates(model, seed)
        with torch.no_grad(), without(model, fade(rates, 0.3)):
            masked = model(x)
        if not torch.equal(masked[0], masked[1]):
            break
    before = dynsnn_report(model, x)
    prune(model, rates, 0.3)
    assert torch.equal(model(x), masked) and not torch.equal(masked, whole)
    assert not torch.equal(masked[0], masked[1])  # some of it fires down to the classifier
    after = dynsnn_report(model, x)
    assert after["neurons_left"] < before["neurons_left"] and after["synapses_left"] < before["synapses_left"]
    assert after["sops_exact"] < before["sops_exact"]
    assert after["neurons_removed"] == pytest.approx(share(model, {n: ~m for n, m in masks_of(model).items()}))
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert zeros >= 0.4 * (after["parameters"] - after["parameters_left"])
    again = neuron_rates(model, [x])
    assert all(not rate[~masks_of(model)[layer]].any() for layer, rate in again.items())


@pytest.mark.parametrize("name", ["test_spiking_vgg", "test_mpbn_vgg"])
def test_what_was_removed_stays_removed_in_training(name):
    model = settled(name)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)

    def step():
        optimizer.zero_grad()
        model.train()(images_for(model)).square().sum().backward()
        optimizer.step()

    step()
    prune(model, random_rates(model), 0.5, optimizer)
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.dim() > 1}
    assert all(flags.any() for flags in list(zeros.values())[1:-1])
    before = {n: p.clone() for n, p in model.named_parameters()}
    step()
    step()
    for n, p in model.named_parameters():
        if n in zeros:
            assert torch.equal(p == 0, zeros[n]) and not torch.equal(p, before[n])


@pytest.mark.parametrize("per", ["unit", "channel"])
@pytest.mark.parametrize("name", ["test_spiking_resnet", "test_spikformer"])
def test_event_models(name, per):
    model = settled(name, per, in_chans=2)
    frames = torch.randn(3, 3, 2, *model.img_size, generator=torch.Generator().manual_seed(5))
    reactivate(model, {layer: torch.zeros_like(mask) for layer, mask in masks_of(model).items()})
    rates = neuron_rates(model, [frames])
    with torch.no_grad(), without(model, fade(random_rates(model), 0.3)):
        masked = model(frames)
    before = dynsnn_report(model, frames)
    assert {layer: rate.shape for layer, rate in rates.items()} == {n: m.shape for n, m in masks_of(model).items()}
    prune(model, random_rates(model), 0.3)
    assert torch.equal(model(frames), masked)
    assert dynsnn_report(model, frames)["synapses_left"] < before["synapses_left"] == before["synapses"]


@pytest.mark.parametrize("name", ["test_spikformer", "test_autost"])
def test_all_features_matter_without_a_classifier(name):
    # The last sum of a Spikformer passes no neuron, and nothing else reads it.
    model = settled(name, num_classes=0)
    x, rates = images_for(model), random_rates(model)
    with torch.no_grad(), without(model, fade(rates, 0.3)):
        masked = model(x)
    prune(model, rates, 0.3)
    assert torch.equal(model(x), masked) and masked.any()


def test_rates_and_masks_of_another_shape():
    model = settled(per="channel")
    rates = neuron_rates(model, [images_for(model)], per="unit")
    with pytest.raises(ValueError, match=r"Layer 'stem.0.neuron': firing rates .* and a mask \(4,\).*without per"):
        prune(model, rates, 0.1)
    with pytest.raises(ValueError, match="without per"), without(model, fade(rates, 0.1)):
        pass
    rates = neuron_rates(model, [images_for(model)])
    *_, last = rates
    del rates[last]
    with pytest.raises(ValueError, match=rf"Layer {last!r}: firing rates None and a mask"):
        prune(model, rates, 0.1)
    assert all(mask.all() for mask in masks_of(model).values())


def test_a_layer_is_not_emptied():
    model = settled()
    rates = neuron_rates(model, [images_for(model)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    highest, name = min((float(rate.max()), name) for name, rate in rates.items())
    with pytest.raises(ValueError, match=f"remove all .* neurons of layer {name!r}, .*busiest has a firing rate of"):
        prune(model, rates, min(1.0, highest + 1e-6))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    prune(model, rates, highest)
    assert all(mask.any() for mask in masks_of(model).values())
    for threshold in (-0.1, 1.1, float("nan"), True, "0.1", None):
        with pytest.raises(ValueError, match=r"threshold=.*expected a firing rate in \[0, 1\]"):
            prune(model, rates, threshold)


def test_threshold_zero_prunes_nothing():
    model = settled()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune(model, {name: torch.zeros(mask.shape) for name, mask in masks_of(model).items()}, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------- reactivation


@pytest.mark.parametrize("weights", ["in", "out", "both"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_reactivation_draws_anew_what_belongs_to_the_neuron(weights, optimizer):
    model = settled("test_mpbn_vgg")
    ema = spikezoo.create_model("test_mpbn_vgg", T=3, dynsnn={"per": "channel"})
    kinds = {"sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, 0.01)}
    optimizer = kinds[optimizer](list(model.parameters()))
    model(images_for(model)).square().sum().backward()
    optimizer.step()
    names = list(masks_of(model))
    fading = {name: torch.zeros_like(mask) for name, mask in masks_of(model).items()}
    fading[names[1]][[2, 5]] = True  # of the second convolution
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    before, averaged = ({n: v.clone() for n, v in m.state_dict().items()} for m in (model, ema))
    reactivate(model, fading, optimizer, ema, torch.Generator().manual_seed(7), weights)

    touched = {n: torch.zeros_like(v, dtype=torch.bool) for n, v in before.items()}
    if weights in ("in", "both"):
        touched[f"{layers[1]}.weight"][[2, 5]] = True
        touched[f"{layers[1]}.bias"][[2, 5]] = True
        block = layers[1].rpartition(".")[0]
        for norm in (f"{block}.norm", f"{block}.neuron.norm"):
            for value, start in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
                touched[f"{norm}.{value}"][[2, 5]] = True
                assert model.state_dict()[f"{norm}.{value}"][[2, 5]].tolist() == [start] * 2
    if weights in ("out", "both"):
        touched[f"{layers[2]}.weight"][:, [2, 5]] = True
    for name, value in model.state_dict().items():
        assert torch.equal(value[~touched[name]], before[name][~touched[name]]), name
        if "weight" in name and touched[name].any():
            assert (value[touched[name]] != before[name][touched[name]]).all(), name
        assert torch.equal(ema.state_dict()[name], torch.where(touched[name], value, averaged[name])), name
    for name, parameter in model.named_parameters():
        state = [v for v in optimizer.state[parameter].values() if v.shape == parameter.shape]
        assert state and all(not value[touched[name]].any() for value in state), name
        assert all(value[~touched[name]].any() for value in state) or touched[name].all() or ".norm" in name
    new = model.state_dict()[f"{layers[1 if weights == 'in' else 2]}.weight"]
    assert new.std() < 2 * before[f"{layers[1 if weights == 'in' else 2]}.weight"].std()
    fresh = settled("test_mpbn_vgg")
    fresh.load_state_dict(before)
    reactivate(fresh, fading, None, None, torch.Generator().manual_seed(7), weights)
    assert_same_weights(fresh.state_dict(), model.state_dict())


@pytest.mark.parametrize(("optimizer", "key"), [("madgrad", "x0"), ("lookahead_momentum", "lookahead_slow_buff")])
def test_weights_that_an_optimizer_keeps_are_the_new_ones(optimizer, key):
    model = settled("test_mpbn_vgg")
    optimizer = create_optimizer_v2(model, optimizer, lr=1e-3)

    def steps():
        for _ in range(6):  # lookahead comes back to its slow weights at every sixth
            optimizer.zero_grad()
            model(images_for(model)).square().sum().backward()
            optimizer.step()

    steps()
    fading = {name: torch.zeros_like(mask) for name, mask in masks_of(model).items()}
    fading["stages.1.0.neuron"][2] = True
    before = model.stages[1][0].conv.weight.detach().clone()
    reactivate(model, fading, optimizer)
    weight = model.stages[1][0].conv.weight
    state = getattr(optimizer, "_base_optimizer", optimizer).state[weight]
    assert torch.equal(state[key][2], weight[2]) and not torch.equal(weight[2], before[2])
    prune(model, {name: (~flags).float() for name, flags in fading.items()}, 0.5, optimizer)
    steps()
    assert not weight[2].any() and weight[1].any()


def test_a_channel_is_drawn_anew_where_all_its_neurons_fade():
    model = settled(per="unit")
    fading = {name: torch.zeros_like(mask) for name, mask in masks_of(model).items()}
    first = next(iter(fading))
    fading[first][0] = True
    fading[first][1, 1:] = True  # but not its first row
    before = model.stem[0].conv.weight.clone()
    reactivate(model, fading)
    changed = (model.stem[0].conv.weight != before).flatten(1)
    assert changed[0].all() and not changed[1:].any()


def test_silent_neurons_fire_again():
    # Weights whose mean is negative, as a firing-rate penalty makes them: those drawn anew must not share it.
    model = spikezoo.create_model("spiking_mlp_340", T=4, dynsnn={})
    x = torch.rand(20, 1, 28, 28)
    with torch.no_grad():
        weight = model.stem[0].linear.weight
        weight.copy_(-0.05 + 0.17 * torch.randn_like(weight))
        weight[:170] -= 1
    (name,), (before,) = zip(*neuron_rates(model, [x]).items(), strict=True)
    assert not before[:170].any()
    reactivate(model, {name: before == 0}, generator=torch.Generator().manual_seed(1))
    after = neuron_rates(model, [x])[name]
    assert (after[:170] > 0).double().mean() > 0.9


@pytest.mark.parametrize("hidden", [1, 3])
def test_layers_whose_weights_are_all_equal_are_drawn_anew(hidden):
    model = spikezoo.create_model("spiking_mlp_340", hidden=[hidden], img_size=1, encoding="direct", dynsnn={})
    nn.init.zeros_(model.stem[0].linear.weight)
    reactivate(model, {"stem.0.neuron": torch.ones(hidden, dtype=torch.bool)})
    weight = model.stem[0].linear.weight
    assert weight.isfinite().all() and weight.all()


def test_what_cannot_be_reactivated():
    model = settled()
    fading = fade(neuron_rates(model, [images_for(model)]), 0.1)
    with pytest.raises(ValueError, match=r"weights='input' .*'in'"):
        reactivate(model, fading, weights="input")
    prune(model, random_rates(model), 0.5)
    with pytest.raises(ValueError, match="were removed"):
        reactivate(model, fading)
    ticket = spikezoo.create_model("test_spiking_vgg", ticket={}, dynsnn={})
    with pytest.raises(ValueError, match="its weights are a ticket"):
        reactivate(ticket, {name: ~mask for name, mask in masks_of(ticket).items()})
    # Baked, the layers compute with signs and one gain, and would take other weights for these.
    baked = dynsnn(bake(spikezoo.create_model("test_spiking_vgg", ticket={})))
    before = baked.stem[0].conv.weight.clone()
    with pytest.raises(ValueError, match=r"Layer 'stem\.0\.conv': its weights are a ticket"):
        reactivate(baked, {name: mask.clone() for name, mask in masks_of(baked).items()})
    assert torch.equal(baked.stem[0].conv.weight, before)


# ------------------------------------------------------------------------------------------ the transform


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"per": "neuron"}, "per='neuron' does not exist"),
        ({"threshold": 1.5}, r"threshold=1.5: expected a firing rate in \[0, 1\]"),
        ({"compression": 1.0}, "compression=1.0"),
        ({"reactivate_at": 3, "threshold": 0.1}, r"reactivate_at=3: expected a list"),
        ({"reactivate_at": [0], "threshold": 0.1}, "reactivate_at=0: expected epochs"),
        ({"reactivate_at": [1, 5], "prune_at": 4, "threshold": 0.1}, "is not reactivated"),
        ({"reactivate_at": [1, 4], "prune_at": 4, "threshold": 0.1}, "Give a prune_at of 5 or later"),
        ({"prune_at": 4}, "give threshold or compression"),
        ({"prune_at": 4.5, "threshold": 0.1}, "prune_at=4.5"),
        ({"samples": 0}, "samples=0"),
        ({"weights": "input"}, "weights='input' does not exist"),
        ({"treshold": 0.1}, "no argument 'treshold'.*'threshold'"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        spikezoo.create_model("test_spiking_vgg", dynsnn=arguments)


def test_models_that_cannot_have_masks():
    with pytest.raises(ValueError, match="no neurons that have one: create it with neuron='lif'"):
        spikezoo.create_model("test_spiking_vgg", neuron="sign", dynsnn={})
    with pytest.raises(ValueError, match="have a mask already"):
        dynsnn(settled())
    with pytest.raises(ValueError, match="Nobody said how many neurons '1' has"):
        dynsnn(nn.Sequential(nn.Linear(2, 3), LIF(NeuronConfig())))
    with pytest.raises(ValueError, match="per='unit' on a model that selects patches"):
        spikezoo.create_model("test_spikformer", multisp={}, dynsnn={})
    with pytest.raises(ValueError, match="neurons have no masks"):
        masks_of(spikezoo.create_model("test_spiking_vgg"))
    with pytest.raises(ValueError, match="No batches"):
        neuron_rates(settled(), [])


def test_masks_of_single_neurons_tie_the_model_to_its_size():
    channel, unit = (settled("test_mpbn_vgg", per) for per in ("channel", "unit"))
    x = torch.randn(1, channel.in_chans, 40, 40)
    assert channel(x).shape == (1, 10)
    with pytest.raises(ValueError, match=r"made for feature maps .* and the layer got .*per='channel'"):
        unit(x)


@pytest.mark.parametrize("per", ["unit", "channel"])
def test_a_checkpoint_remembers_what_was_removed(tmp_path, per):
    model = settled("test_spiking_resnet", per)
    spikezoo.save_checkpoint(model, tmp_path / "whole")
    prune(model, random_rates(model), 0.5)
    folder = spikezoo.save_checkpoint(model, tmp_path / "pruned")
    loaded = spikezoo.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert loaded.recipe == model.recipe and loaded.recipe[0][1]["per"] == per
    assert all(torch.equal(mask, masks_of(model)[name]) for name, mask in masks_of(loaded).items())
    x = images_for(model)
    assert torch.equal(loaded(x), model(x))
    bits = sum(mask.numel() for mask in masks_of(model).values()) / 8
    stored = load_file(folder / "model.safetensors")
    masks = {name: tensor for name, tensor in stored.items() if ".mask" in name}
    assert sum(tensor.nbytes for tensor in masks.values()) <= 1.1 * bits + 8 * 4 * len(masks)
    if per == "channel":
        assert (folder / "model.safetensors").stat().st_size < (tmp_path / "whole/model.safetensors").stat().st_size


def test_masks_outlive_folds_and_replay():
    model = settled("test_mpbn_vgg")
    prune(model, random_rates(model), 0.5)
    x = images_for(model)
    folded = replay(model, [("fold_mpbn", {}), ("fold_bn", {})])
    torch.testing.assert_close(folded(x), model(x))
    assert dynsnn_report(folded)["neurons_removed"] == dynsnn_report(model)["neurons_removed"]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


# ------------------------------------------------------------------------------------------------- training

DYNSNN = (
    "--dynsnn per=channel compression=0.04 threshold=0.1 reactivate_at=[1] prune_at=2 samples=50 --epochs 3 "
    "--model-ema --model-ema-decay 0.7 --grad-accum-steps 2 --recovery-interval 2"
)


def flags(output, *more):
    base = "--model test_mpbn_vgg --T 2 --dataset digits --subset 64 -b 16 --lr 0.05 --experiment run"
    return [*base.split(), *DYNSNN.split(), "--output", str(output), *map(str, more)]


def test_training_reactivates_and_prunes(fast, tmp_path, monkeypatch, capsys):
    seen = []
    for name in ("reactivate", "prune"):
        original = getattr(dynsnn_training, name)

        def spy(model, *args, name=name, original=original):
            seen.append((name, model.training, model.num_classes))
            return original(model, *args)

        monkeypatch.setattr(dynsnn_training, name, spy)
    fast.main(flags(tmp_path))
    assert [name for name, *_ in seen] == ["reactivate", "prune"]
    told = capsys.readouterr().out
    assert "epoch 1/3: DynSNN reactivates" in told and "epoch 2/3: DynSNN prunes" in told
    rows = summary(tmp_path / "run")
    assert [bool(row["eval_dynsnn_fading"]) for row in rows] == [True, True, False]
    assert [bool(row["eval_dynsnn_top1_before"]) for row in rows] == [True, True, False]
    removed = [float(row["eval_dynsnn_removed"]) for row in rows]
    assert removed[0] == 0 and removed[1] == removed[2] >= 4
    results = json.loads((tmp_path / "run" / "config.json").read_text())["spikezoo"]["results"]
    assert results["neurons_removed"] == pytest.approx(removed[2]) and results["synapses_left"] < results["synapses"]
    model = spikezoo.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert dynsnn_report(model)["neurons_removed"] == pytest.approx(removed[2])
    averaged = load_state(tmp_path / "run" / "last.safetensors")["ema"]
    assert_same_weights(model.state_dict(), averaged)
    dead = {n: ~m for n, m in masks_of(model).items()}
    assert not model.stem[0].conv.weight[dead["stem.0.neuron"]].any()


@pytest.mark.parametrize("call", [6, 11])  # after the epoch with the reactivation, and after that with the pruning
def test_resume_is_bit_identical(fast, tmp_path, monkeypatch, call):
    fast.main(flags(tmp_path / "whole"))
    argv = flags(tmp_path / "parts", "--resume", "auto")
    interrupted(fast, argv, call, monkeypatch)
    torch.manual_seed(99)
    fast.main(argv)
    assert_same_end(tmp_path / "whole" / "run", tmp_path / "parts" / "run")


def test_resume_after_sigkill_while_neurons_are_removed(fast, tmp_path):
    argv = flags(tmp_path / "parts", "--resume", "auto")
    code = f"""
        import os, signal
        from spikezoo.train import main
        from spikezoo.transforms import dynsnn_training as training
        original = training.prune
        def prune(*args):
            original(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        training.prune = prune
        main({argv!r})
    """
    done = run_code(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(summary(tmp_path / "parts" / "run")) == 1
    fast.main(argv)
    fast.main(flags(tmp_path / "whole"))
    assert_same_end(tmp_path / "whole" / "run", tmp_path / "parts" / "run")


def test_two_processes(tmp_path):
    argv = [*flags("x")[:-2], "--device", "cpu", "-b", "8"]
    done = run_code(DISTRIBUTED.format(argv=argv), *two_ranks(), folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_state(tmp_path / f"whole-{rank}.safetensors") for rank in range(2)]
    masks = {name: value for name, value in ranks[0]["model"].items() if name.endswith(".mask")}
    assert masks and not all(mask.all() for mask in masks.values())
    for part in ("model", "ema"):  # the statistics of the norms are averaged in the former alone
        kept = [{n: v for n, v in rank[part].items() if "running" not in n} for rank in ranks]
        assert_same_weights(*kept)
    assert_same_end(tmp_path / "whole" / "run", tmp_path / "parts" / "run")


def test_runs_that_make_no_sense(fast, tmp_path):
    with pytest.raises(ValueError, match="acts after epoch 2, and the run has --epochs 1"):
        fast.main(flags(tmp_path, "--epochs", 1))
    with pytest.raises(ValueError, match="no neurons that have one"):
        fast.main(flags(tmp_path, "--neuron", "sign", "--T", 1))
    with pytest.raises(ValueError, match=r"would remove all .* neurons of layer"):
        fast.main(flags(tmp_path, "--dynsnn", "threshold=1", "prune_at=1"))
    vgg = ["--model", "test_spiking_vgg", "--ticket", "sparsity=0.4", "--dynsnn", "threshold=0.1", "reactivate_at=[1]"]
    with pytest.raises(ValueError, match="its weights are a ticket"):  # before it trains
        fast.main(flags(tmp_path / "ticket", *vgg))
    assert not (tmp_path / "ticket" / "run" / "summary.csv").exists()
    fast.main(flags(tmp_path / "masks", "--dynsnn", "per=channel", "--epochs", 1))  # masks alone
    assert "eval_dynsnn_removed" in summary(tmp_path / "masks" / "run")[0]


# -------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train):
    folder = tmp_path_factory.mktemp("trained")
    run = "--model test_spiking_vgg --T 2 --dataset digits --subset 320 -b 16 --epochs 4 --lr 0.1 --experiment run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spikezoo.train.output.plot", lambda *_: [])
        train.main([*run.split(), "--output", str(folder)])
    return folder / "run"


@pytest.mark.parametrize("how", [("--compression", "0.25"), ("--tolerance", "5"), ("--threshold", "0.05")])
def test_command(trained, tmp_path, capsys, monkeypatch, how):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("shutil.which", lambda _name: None)  # deployed without a compiler, which others test
    files = tmp_path / "rates.png", tmp_path / "sweep.png"
    more = ["--samples", "200", "--plot-rates", str(files[0]), "--plot-threshold", str(files[1])]
    assert main(["dynsnn", "--checkpoint", str(trained), *how, *more, "--output", str(tmp_path / "new")]) == 0
    told = capsys.readouterr().out
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in files)
    results = json.loads((tmp_path / "new" / "config.json").read_text())["spikezoo"]["results"]
    model = spikezoo.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True)
    report = dynsnn_report(model)
    assert report["neurons_left"] == results["neurons_left"] and f"{report['neurons_left']:,}" in told
    load("validate").main(["--checkpoint", str(tmp_path / "new")])
    assert f"top-1 {results['top1']:.2f} %" in capsys.readouterr().out
    if how[0] == "--compression":
        assert results["neurons_removed"] >= 25
    assert f"{results['top1']:.2f} %" in told
    # What was pruned is pruned on.
    again = ["dynsnn", "--checkpoint", str(tmp_path / "new"), "--compression", "0.5", "--samples", "50"]
    assert main([*again, "--per", "channel"]) == 2 and "has masks per unit already" in capsys.readouterr().err
    deployed = ["--deploy", "exact"] if how[0] == "--threshold" else []
    assert main([*again, *deployed, "--output", str(tmp_path / "small"), "--compact"]) == 0
    small = spikezoo.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True)
    assert small.recipe[-1][0] == "compact" and sum(p.numel() for p in small.parameters()) < sum(
        p.numel() for p in model.parameters()
    )


def test_pictures_of_rates_are_measured(trained, tmp_path, monkeypatch):
    # What is left fires otherwise once the rest is gone: the old rates of the neurons kept would be another picture.
    drawn = {}
    monkeypatch.setattr(
        pictures, "draw_rates", lambda before, after, *_: drawn.update(before=before, after=after, third=_[-1])
    )
    argv = ["dynsnn", "--checkpoint", str(trained), "--samples", "200", "--compression", "0.5"]
    argv += ["--plot-rates", str(tmp_path / "rates.png"), "--reactivated", str(trained)]
    assert main([*argv, "--output", str(tmp_path / "new"), "--val-subset", "50"]) == 0
    model = spikezoo.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True)
    assert Config.read(tmp_path / "new").results["samples"] == 50
    images = create_loader("digits", "train", batch_size=256, subset=200, **input_options(model, "digits"))
    changed = 0
    for name, rate in neuron_rates(model, images).items():
        mask = masks_of(model)[name]
        assert torch.equal(drawn["after"][name], rate[mask]) and torch.equal(
            drawn["third"][name], drawn["before"][name]
        )
        changed += int((drawn["before"][name][mask] != rate[mask]).sum())
    assert changed > 10


def test_command_says_what_is_wrong(trained, tmp_path, capsys):
    for argv, words in (
        (["--compression", "0.2", "--compact"], "give --output DIR, too"),
        ([], "How much may go?"),
        (["--threshold", "2"], "threshold=2.0"),
        (["--compression", "0.99"], "would remove all"),
        (["--tolerance", "-1"], "tolerance=-1"),
        (["--threshold", "0.1", "--plot-rates", "rates.txt"], "ends in .png"),
        (["--threshold", "0.1", "--reactivated", "net"], "give --plot-rates FILE, too"),
        (["--threshold", "0.1", "--val-subset", "0"], "--val-subset 0: expected an integer >= 1"),
    ):
        assert main(["dynsnn", "--checkpoint", str(trained), "--samples", "50", *argv]) == 2
        assert words in capsys.readouterr().err


def test_table_of_a_plan(tmp_path, capsys):
    plan = ROOT / "configs" / "dynsnn" / "table1.yaml"
    assert main(["results", str(plan), "--results", str(tmp_path / "results.csv")]) == 2
    assert "training with --plan" in capsys.readouterr().err
    rows = [("snn_t-baseline-seed1", 97.0, ""), ("snn_t-baseline-seed2", 99.0, ""), ("snn_t-pruned-seed1", 97.5, 54.0)]
    rows += [("snn_t-pruned-seed2", 98.5, 55.0), ("bp_stdp-baseline-seed1", 50.0, ""), ("other-seed1", 1.0, "")]
    (tmp_path / "table1").mkdir()
    with open(tmp_path / "table1" / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("name", "top1", "neurons_removed"), *rows])
    for more in (["--output", str(tmp_path)], ["--results", str(tmp_path / "table1" / "results.csv")]):
        assert main(["results", str(plan), *more]) == 0
        told, _, header, *lines = capsys.readouterr().out.splitlines()
        assert told.startswith("table1: 5 of 27 runs")
        assert header.split() == ["baseline", "pruned", "pruned", "neurons_removed", "reactivated"]
        # Means 98 and 98; standard deviations sqrt(2) and sqrt(0.5); the paper's 97.9, 98.0, 53.71 and 98.3.
        first = "SNN-T 98.00 ±1.41 (97.9) 98.00 ±0.71 (98) 54.50 ±0.71 (53.71) (98.3)"
        assert [" ".join(line.split()) for line in lines] == [
            first,
            "STiDi-BP (97.4) (97.7) (62.33) (98.1)",
            "BP-STDP 50.00 (96.6) (96.9) (64.81) (97.2)",
        ]
    # A plan that nobody ran is its paper's table, and rows without a place in one are lines.
    assert main(["results", str(plan), "--output", str(tmp_path / "none")]) == 0
    assert "0 of 27 runs" in capsys.readouterr().out
    assert main(["results", str(plan.parent.parent / "tickets" / "sparsity.yaml")]) == 0
    assert "snn" in capsys.readouterr().out


def test_relu_twins_have_rates_masks_and_compact_forms():
    # A ReLU's rate is its mean activation over the 99.9th percentile of its layer, and at most 1.
    ann = spikezoo.create_model("spiking_mlp_340", neuron="relu", hidden=[3]).eval()
    fc, relu = ann.stem[0].linear, ann.stem[0].neuron
    with torch.no_grad():
        fc.weight.zero_()
        fc.weight[:, 0] = torch.tensor([1.0, 0.25, -1.0])
    images = torch.zeros(4, *ann.input_shape)
    images[:, 0, 0, 0] = torch.tensor([4.0, 2.0, 0.0, 2.0])
    masked = spikezoo.apply(ann, "dynsnn")
    # Two batches: the largest of their six activations are 4 and 2, means 2 and 0.5.
    rates = neuron_rates(masked, [images[:2], images[2:]])
    (rate,) = rates.values()
    torch.testing.assert_close(rate, torch.tensor([2 / 3, 0.5 / 3, 0.0], dtype=torch.float64))
    prune(masked, rates, 0.2)
    assert masked.stem[0].neuron.mask.tolist() == [True, False, False]
    report = dynsnn_report(masked, images)
    assert report["neurons_left"] == 1 and "sops_exact" not in report
    small = spikezoo.apply(masked, "compact")
    assert small.stem[0].linear.weight.shape[0] == 1
    torch.testing.assert_close(small(images), masked(images))
    # Conversion keeps the masks.
    snn = spikezoo.convert(masked, images, T=8)
    assert [tuple(mask.tolist()) for mask in masks_of(snn).values()] == [(True, False, False)]
    torch.testing.assert_close(snn(images), masked(images))
    assert relu.mask is None
