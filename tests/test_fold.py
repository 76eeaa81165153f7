"""Tests of spikezoo.transforms.fold: a fold decides as the unfolded model does, spike by spike, or it raises."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import spikezoo
from spikezoo.checkpoint import read_config
from spikezoo.cli import main
from spikezoo.layers import ConvNormNeuron, LinearNormNeuron
from spikezoo.neurons import IF, LIF, PLIF, FoldedThreshold, MembraneNorm, NeuronConfig, NeuronFactory, SpikingNeuron
from spikezoo.transforms import TRANSFORMS, apply, fold_bn, fold_mpbn, replay

KINDS = {"lif": LIF, "if": IF, "plif": PLIF}


def _uniform(like, low, high, generator):
    return torch.rand(like.shape, generator=generator, dtype=like.dtype) * (high - low) + low


def _randomise(model, seed=0):
    """Every parameter and every statistic drawn at random; scales of both signs, none near zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MembraneNorm | nn.BatchNorm2d | nn.BatchNorm1d):
                module.running_mean.copy_(_uniform(module.running_mean, -0.3, 0.5, g))
                module.running_var.copy_(_uniform(module.running_var, 0.2, 2.0, g))
                if module.weight is not None:
                    sign = torch.randint(0, 2, module.weight.shape, generator=g) * 2 - 1
                    module.weight.copy_(_uniform(module.weight, 0.5, 2.0, g) * sign)
                    module.bias.copy_(_uniform(module.bias, -0.2, 0.8, g))
            elif isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=g) * 2 / fan_in**0.5)
                if module.bias is not None:
                    module.bias.copy_(_uniform(module.bias, -0.3, 0.3, g))
            elif isinstance(module, PLIF):
                module.w.copy_(_uniform(module.w, -1.0, 1.0, g))
    return model


def _neuron(mode="channel", channels=32, size=(16, 16), kind="lif", seed=0, **config):
    config = {"decay": 0.25, "threshold": 0.5, **({"tau": 2.0} if kind == "plif" else {}), **config}
    norm = MembraneNorm(mode, channels, size)
    return _randomise(KINDS[kind](NeuronConfig(kind=kind, **config), norm), seed).eval()


def _spikes(model, x):
    """Spikes of every neuron layer by name, and the output."""
    found = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: found.__setitem__(name, out))
        for name, module in model.named_modules()
        if isinstance(module, SpikingNeuron)
    ]
    try:
        with torch.no_grad():
            y = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found, y


def _formula(model):
    """The fold by the paper's eq. 10 in float32: threshold = (V_th - bias) / scale + mean, without a polarity."""
    folded = fold_mpbn(model)
    for name, neuron in model.named_modules():
        if isinstance(neuron, SpikingNeuron):
            scale, shift = neuron.norm.scale_shift()
            target = folded.get_submodule(name).folded
            target.threshold.copy_(((neuron.config.threshold - shift) / scale).detach())
            target.polarity.fill_(1)
    return folded


# ------------------------------------------------------------------------------------------------- fold_mpbn


def test_fold_flips_no_spike_among_two_million():
    decisions = naive_flips = 0
    grid = itertools.product((1, 4), ("channel", "element"), (">", ">="), ("hard", "soft"))
    for seed, (T, mode, firing, reset) in enumerate(grid):
        neuron = _neuron(mode, seed=seed, firing=firing, reset=reset)
        x = torch.randn(T, 8, 32, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2
        with torch.no_grad():
            wanted, got, naive = neuron(x), fold_mpbn(neuron)(x), _formula(neuron)(x)
        assert torch.equal(wanted, got), f"{T=} {mode=} {firing=} {reset=}: {(wanted != got).sum()} spikes flipped"
        assert 0.2 < wanted.mean() < 0.8
        naive_flips += (wanted != naive).sum()
        decisions += wanted.numel()
    assert decisions >= 2_000_000
    assert naive_flips > decisions / 10  # what this comparison would have seen without the polarity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("firing", [">", ">="])
@pytest.mark.parametrize("mode", ["channel", "element"])
def test_fold_is_exact_within_units_in_the_last_place_of_the_threshold(mode, firing, dtype):
    neuron = _neuron(mode, 64, (4, 4) if mode == "element" else (), seed=3, firing=firing).to(dtype)
    folded = fold_mpbn(neuron)
    centre = folded.folded.threshold
    ulps = torch.arange(-40, 41).view(-1, *[1] * centre.dim())
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    u = (centre.view(integers) + ulps.to(integers)).view(dtype).unsqueeze(0)  # [T=1, B=81, C, ...]
    wanted, got, naive = neuron(u), folded(u), _formula(neuron)(u)
    assert torch.equal(wanted, got)
    assert not torch.equal(wanted[0, 0], wanted[0, -1])
    positive = neuron.norm.weight > 0
    # Even with the right polarity, the threshold of the formula is off by some units in the last place.
    assert (wanted != naive)[:, :, positive].any()


@pytest.mark.parametrize("kind", ["if", "plif"])
@pytest.mark.parametrize("config", [{}, {"reset": "soft", "v_reset": 0.0}, {"v_reset": -0.25}])
def test_fold_of_other_neurons(kind, config):
    neuron = _neuron(kind=kind, size=(8, 8), **config)
    x = torch.randn(4, 4, 32, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted = neuron(x)
    assert torch.equal(fold_mpbn(neuron)(x), wanted)
    assert 0.2 < wanted.mean() < 0.8


def test_soft_reset_of_a_folded_neuron_subtracts_the_scalar_threshold():
    neuron = LIF(NeuronConfig(decay=1.0, threshold=0.5, reset="soft"), MembraneNorm("channel", 1)).eval()
    neuron.norm.eps = 0.0
    with torch.no_grad():
        neuron.norm.weight.fill_(-1.0)  # fires where -u >= 0.5
    folded = fold_mpbn(neuron)
    assert (folded.folded.threshold.item(), folded.folded.polarity.item()) == (-0.5, -1.0)
    # u: -1 fires, -1-0.5+1.25 = -0.25 does not, -0.25-0.25 = -0.5 fires, -0.5-0.5+0.6 = -0.4 does not
    x = torch.tensor([-1.0, 1.25, -0.25, 0.6]).view(4, 1, 1)
    assert folded(x).flatten().tolist() == neuron(x).flatten().tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("mpbn", ["channel", "element"])
@pytest.mark.parametrize("name", ["test_mpbn_vgg", "test_mpbn_resnet"])
def test_fold_of_whole_models(name, mpbn, T):
    model = _randomise(spikezoo.create_model(name, mpbn=mpbn, T=T), seed=5).eval()
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    wanted, logits = _spikes(model, x)
    got, folded_logits = _spikes(fold_mpbn(model), x)
    naive, _ = _spikes(_formula(model), x)
    assert set(wanted) == set(got) and len(wanted) >= 4
    for layer, spikes in wanted.items():
        assert torch.equal(spikes, got[layer]), layer
        assert 0.05 < spikes.mean() < 0.95, layer
        assert not torch.equal(spikes, naive[layer]), layer
    assert torch.equal(logits, folded_logits)


def test_channels_last_input_gives_the_same_spikes():
    neuron = _neuron("element", size=(6, 6))
    x = torch.randn(2 * 3, 32, 6, 6, generator=torch.Generator().manual_seed(4))
    folded = fold_mpbn(neuron)
    last = x.contiguous(memory_format=torch.channels_last).unflatten(0, (2, 3))
    assert not last[0].is_contiguous()
    assert torch.equal(folded(last), folded(x.unflatten(0, (2, 3))))
    model = _randomise(spikezoo.create_model("test_mpbn_vgg", T=2)).to(memory_format=torch.channels_last).eval()
    image = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    wanted, _ = _spikes(model, image)
    got, _ = _spikes(fold_mpbn(model), image)
    assert all(torch.equal(wanted[layer], got[layer]) for layer in wanted)


@pytest.mark.parametrize("firing", [">", ">="])
def test_channels_that_never_or_always_fire(firing):
    neuron = LIF(NeuronConfig(firing=firing), MembraneNorm("channel", 4)).eval()
    with torch.no_grad():  # u * scale vanishes or stays below the gap to the threshold for every finite u
        neuron.norm.weight.copy_(torch.tensor([1e-40, 1e-40, -1e-40, -1e-40]))
        neuron.norm.bias.copy_(torch.tensor([-1.0, 3.0, -1.0, 3.0]))
    folded = fold_mpbn(neuron)
    largest = torch.finfo(torch.float32).max
    u = torch.tensor([-largest, -1e30, -1.0, 0.0, 1.0, 1e30, largest]).view(1, -1, 1).expand(1, -1, 4)
    assert torch.equal(folded(u), neuron(u))
    assert folded(u)[0].mean(0).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("mode", ["channel", "element"])
def test_infinite_thresholds_never_and_always_fire(mode):
    folded = FoldedThreshold(mode, (4,))
    folded.threshold.copy_(torch.tensor([math.inf, -math.inf, math.inf, -math.inf]))
    folded.polarity.copy_(torch.tensor([1.0, 1.0, -1.0, -1.0]))
    u = torch.tensor([-3e38, 0.0, 3e38]).view(3, 1).expand(3, 4)
    assert (folded(u) > 0).tolist() == (folded(u) >= 0).tolist() == [[False, True, True, False]] * 3


@pytest.mark.parametrize(
    ("mode", "index", "where"), [("channel", 3, "channel 3"), ("element", (3, 1, 0), "element (3, 1, 0)")]
)
def test_zero_and_underflowing_scales_raise_and_name_layer_and_channel(mode, index, where):
    for weight, var in ((0.0, 1.0), (1e-45, 1e4)):
        model = _randomise(spikezoo.create_model("test_mpbn_resnet", mpbn=mode))
        norm = model.stages[1][0].conv1.neuron.norm
        with torch.no_grad():
            norm.weight[index], norm.running_var[index] = weight, var
        with pytest.raises(ValueError, match="scale is zero") as error:
            fold_mpbn(model)
        assert "'stages.1.0.conv1.neuron'" in str(error.value) and where in str(error.value)


@pytest.mark.parametrize("field", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_statistics_that_are_not_finite_raise(field, value):
    neuron = _neuron(size=())
    with torch.no_grad():
        getattr(neuron.norm, field)[7] = value
    # An infinite variance gives the scale zero.
    with pytest.raises(ValueError, match=r"'LIF', channel 7: the membrane norm's scale"):
        fold_mpbn(neuron)


def test_folding_twice_without_norm_or_in_half_precision_raises():
    model = spikezoo.create_model("test_mpbn_vgg")
    with pytest.raises(ValueError, match=r"applied already \(layer '.*\.neuron'\)"):
        fold_mpbn(fold_mpbn(model))
    with pytest.raises(ValueError, match=r"Nothing to fold: SpikingVGG .* mpbn_\*.*mpbn='channel'"):
        fold_mpbn(spikezoo.create_model("test_spiking_vgg"))
    with pytest.raises(ValueError, match=r"torch\.bfloat16.*float32 or float64"):
        fold_mpbn(model.bfloat16())
    with pytest.raises(ValueError, match=r"torch\.bfloat16.*float32 or float64"):
        fold_bn(model)


@pytest.mark.parametrize("fold", [fold_mpbn, fold_bn])
def test_the_original_is_untouched_and_the_result_in_evaluation_mode(fold):
    model = _randomise(spikezoo.create_model("test_mpbn_resnet")).train()
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in folded.modules())
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert model.recipe == [] and folded.recipe == [(fold.__name__, {})]
    x = torch.randn(2, 3, 32, 32)
    for module in folded.parameters():
        module.data.zero_()  # shares nothing
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert fold(model)(x).shape == (2, 10)


def test_element_threshold_of_another_map_raises_instead_of_broadcasting():
    folded = FoldedThreshold("element", (4, 1, 1))
    with pytest.raises(ValueError, match=r"feature maps \(4, 1, 1\) and got \(4, 3, 3\)"):
        folded(torch.zeros(2, 4, 3, 3))


# --------------------------------------------------------------------------------------------------- fold_bn


@pytest.mark.parametrize(
    "name", ["test_spiking_vgg", "test_spiking_resnet", "test_mpbn_vgg", "test_mpbn_resnet", "test_autost"]
)
def test_fold_bn_in_float64_gives_the_same_spikes(name):
    model = _randomise(spikezoo.create_model(name, T=4), seed=7).double().eval()
    folded = fold_bn(model)
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in folded.modules())
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted, logits = _spikes(model, x)
    got, folded_logits = _spikes(folded, x)
    for layer, spikes in wanted.items():
        assert torch.equal(spikes, got[layer]), layer
        assert 0.02 < spikes.mean() < 0.98, (layer, spikes.mean())
    torch.testing.assert_close(folded_logits, logits, rtol=0, atol=1e-10)
    assert logits.std() > 0.01


@pytest.mark.parametrize("name", ["test_spiking_vgg", "test_mpbn_resnet"])
def test_fold_bn_in_float32(name):
    model = _randomise(spikezoo.create_model(name, T=4), seed=8).eval()
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    wanted, logits = _spikes(model, x)
    got, folded_logits = _spikes(fold_bn(model), x)
    flipped = sum(int((wanted[layer] != got[layer]).sum()) for layer in wanted)
    assert flipped < 0.001 * sum(spikes.numel() for spikes in wanted.values())
    assert (logits - folded_logits).abs().max() < 0.05 * logits.abs().max()


def test_fold_bn_by_hand():
    layer = ConvNormNeuron(1, 1, (1, 1), kernel=1, bias=True, dd={"dtype": torch.float64}).eval()
    layer.norm.eps = 0.0
    with torch.no_grad():
        for tensor, value in (
            (layer.conv.weight, 3.0),
            (layer.conv.bias, 1.0),
            (layer.norm.running_mean, 2.0),
            (layer.norm.running_var, 4.0),
            (layer.norm.weight, -5.0),
            (layer.norm.bias, 7.0),
        ):
            tensor.fill_(value)
    folded = fold_bn(layer)
    # (3 x + 1 - 2) / 2 * -5 + 7 = -7.5 x + 9.5
    assert (folded.conv.weight.item(), folded.conv.bias.item()) == (-7.5, 9.5)
    assert folded(torch.full((1, 1, 1, 1, 1), 2.0, dtype=torch.float64)).item() == -5.5


def _pooled(pool):
    neurons = NeuronFactory(NeuronConfig())
    return _randomise(ConvNormNeuron(3, 6, (8, 8), bias=True, pool=pool, neuron=neurons, dd={}), 1).double().eval()


def test_fold_bn_through_pools():
    x = torch.randn(2, 3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    average = _pooled(nn.AvgPool2d(2))
    assert (average.norm.weight < 0).any()
    average.neuron = None
    torch.testing.assert_close(fold_bn(average)(x), average(x), rtol=0, atol=1e-12)
    largest = _pooled(nn.MaxPool2d(2))
    net = nn.Sequential(largest)
    first = int((largest.norm.weight < 0).nonzero()[0])
    with pytest.raises(ValueError, match=rf"Layer '0', channel {first}.*max-pool"):
        fold_bn(net)
    with torch.no_grad():
        largest.norm.weight.abs_()
        largest.norm.weight[2] = 0.0  # a constant commutes with a maximum
    largest.neuron = None
    torch.testing.assert_close(fold_bn(net)(x), net(x), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="counts padding"):
        fold_bn(_pooled(nn.AvgPool2d(3, 2, 1)))
    with pytest.raises(ValueError, match="LPPool2d"):
        fold_bn(_pooled(nn.LPPool2d(2, 2)))


def test_fold_bn_raises_where_it_cannot():
    model = spikezoo.create_model("test_spiking_vgg")
    with pytest.raises(ValueError, match="fold_bn was applied already"):
        fold_bn(fold_bn(model))
    with pytest.raises(ValueError, match=r"Nothing to fold: SpikingResNet has no batch norm.*rmp_\* models"):
        fold_bn(spikezoo.create_model("test_rmp_resnet"))
    with pytest.raises(ValueError, match="Nothing to fold: Linear has no batch norm"):
        fold_bn(nn.Linear(2, 2))
    with torch.no_grad():
        model.neck[0].norm.running_var[5] = math.nan
    with pytest.raises(ValueError, match=r"Layer 'neck\.0', channel 5: .*not finite"):
        fold_bn(model)
    with pytest.raises(ValueError, match="track_running_stats"):
        layer = ConvNormNeuron(1, 1, (1, 1), dd={})
        layer.norm = nn.BatchNorm2d(1, track_running_stats=False)
        fold_bn(layer)
    layer.norm = nn.GroupNorm(1, 1)
    with pytest.raises(ValueError, match="its norm is a GroupNorm, and fold_bn folds batch norms alone"):
        fold_bn(layer)


def test_linear_layer_without_norm_keeps_its_weights():
    neurons = NeuronFactory(NeuronConfig())
    net = nn.Sequential(
        LinearNormNeuron(4, 5, pool=True, norm=False, bias=True, neuron=neurons, dd={}),
        LinearNormNeuron(5, 6, pool=False, norm=True, bias=False, neuron=neurons, dd={}),
    )
    folded = fold_bn(net)
    assert torch.equal(folded[0].linear.weight, net[0].linear.weight) and folded[0].norm is None
    assert isinstance(folded[1].norm, nn.Identity)
    assert folded[1].linear.bias.requires_grad  # a folded layer can still be trained


# ---------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("order", [("fold_mpbn", "fold_bn"), ("fold_bn", "fold_mpbn")])
@pytest.mark.parametrize(("name", "mpbn"), [("test_mpbn_resnet", "channel"), ("test_spiking_vgg", "element")])
def test_replay_on_a_fresh_model_takes_the_state_dict(name, mpbn, order):
    trained = spikezoo.create_model(name, mpbn=mpbn, T=2)
    _randomise(trained)
    for transform in order:
        trained = apply(trained, transform)
    assert trained.recipe == [(transform, {}) for transform in order]
    fresh = replay(spikezoo.create_model(name, mpbn=mpbn, T=2), [list(entry) for entry in trained.recipe])
    assert fresh.recipe == trained.recipe
    state = trained.state_dict()
    fresh.load_state_dict(state, strict=True)
    assert not any(key.endswith(("norm.weight", "running_mean")) for key in state)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh(x), trained(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        spikezoo.create_model(name, mpbn=mpbn, T=2).load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        replay(spikezoo.create_model(name, mpbn=mpbn, T=2), trained.recipe[:1]).load_state_dict(state, strict=True)


def test_recipes_that_make_no_sense_raise():
    model = spikezoo.create_model("test_mpbn_vgg")
    assert list(TRANSFORMS)[:2] == ["fold_mpbn", "fold_bn"]
    assert replay(model, []) is model
    with pytest.raises(ValueError, match=r"Unknown transform 'fold_mpnb'\. Did you mean 'fold_mpbn'"):
        apply(model, "fold_mpnb")
    with pytest.raises(ValueError, match="Unknown transform 'foldbn'"):
        replay(model, [("foldbn", {})])
    with pytest.raises(ValueError, match=r"'fold_bn' has no argument 'eps'\. It takes none"):
        replay(model, [("fold_bn", {"eps": 1e-3})])
    with pytest.raises(ValueError, match=r"Recipe entry 'fold_bn': expected a pair"):
        replay(model, ["fold_bn"])


# ---------------------------------------------------------------------------------------------------- the command


def test_command(tmp_path, capsys):
    model = _randomise(spikezoo.create_model("test_mpbn_resnet", T=2)).eval()
    spikezoo.save_checkpoint(model, tmp_path / "trained", {"dataset": "digits", "seed": 3})
    x = torch.randn(4, 3, 32, 32)
    for flags, recipe in (([], ["fold_mpbn", "fold_bn"]), (["--exact"], ["fold_mpbn"])):
        output = tmp_path / "-".join(recipe)
        assert main(["fold", str(tmp_path / "trained"), *flags, "--output", str(output)]) == 0
        assert (
            f"Folded 9 membrane norms into thresholds and {0 if flags else 11} batch norms" in capsys.readouterr().out
        )
        folded = spikezoo.create_model(f"local-dir:{output}", pretrained=True).eval()
        assert [name for name, _ in folded.recipe] == recipe
        with torch.no_grad():
            torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0 if flags else 1e-3)
        stored = read_config(output)["spikezoo"]
        assert stored["dataset"] == "digits" and stored["results"]["seed"] == 3
        # What is folded is not folded again, and nothing is written.
        assert main(["fold", str(output), *flags, "--output", str(tmp_path / "again")]) == 2
        assert "Nothing to fold" in capsys.readouterr().err and not (tmp_path / "again").exists()
    assert main(["fold", str(tmp_path / "nowhere"), "--output", str(tmp_path / "again")]) == 2
    assert "nowhere" in capsys.readouterr().err
