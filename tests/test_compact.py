"""Tests of spikezoo.transforms.compact: what was pruned is gone, and every neuron that is left fires as before."""

import copy

import pytest
import torch
from test_fold import _spikes
from test_models import fill, image_for, wave
from torch import nn

import spikezoo
from spikezoo.layers import LinearNormNeuron
from spikezoo.neurons import MembraneNorm, NeuronConfig, NeuronFactory, SpikingNeuron
from spikezoo.transforms import apply, dynsnn, replay
from spikezoo.transforms.compact import _silent
from spikezoo.transforms.dynsnn import dynsnn_report, masks_of, neuron_rates, prune, threshold_for

# Neurons of the micro-models whose channels can go, as their layouts have them; streams in brackets.
FREE = {
    "test_spiking_vgg": ["stem.0", "stages.0.0", "stages.1.0", "stages.2.0", "neck.0"],
    "test_mpbn_vgg": ["stem.0", "stages.1.0", "stages.1.1", "stages.2.0"],
    "test_spiking_resnet": [
        ("stem.0", "stages.0.0"), "stages.0.0.conv1", "stages.1.0", "stages.1.0.conv1", "stages.2.0",
        "stages.2.0.conv1", "neck.0",
    ],
    "test_mpbn_resnet": [
        "stem.0", "stem.1", ("stem.2", "stages.0.0"), "stages.0.0.conv1", "stages.1.0", "stages.1.0.conv1",
        "stages.2.0", "stages.2.0.conv1",
    ],
    "test_rmp_resnet": [
        "stem.0", "stem.1", ("stem.2", "stages.0.0"), "stages.0.0.conv1", "stages.1.0", "stages.1.0.conv1",
        "stages.2.0", "stages.2.0.conv1",
    ],
    "test_spiking_mlp": ["stem.0", "stages.0.0", "stages.1.0", "stages.2.0"],
    "test_spikformer": ["stem.0", "stem.1", "stem.2", *(f"stages.{i}.0.mlp.fc1" for i in range(3))],
    "test_autost": ["stem.0", "stem.1", "stem.2", *(f"stages.{i}.0.mlp.fc1" for i in range(3))],
}  # fmt: skip
NAMES = sorted(FREE)
MAPS = [name for name in NAMES if name != "test_spiking_mlp"]  # whose layers have more than a neuron a channel


def neurons_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SpikingNeuron)}


def streams(name):
    """Names of the neurons that lose channels together."""
    return [[f"{layer}.neuron" for layer in ([x] if isinstance(x, str) else x)] for x in FREE[name]]


def made(name, gain=6, dtype=torch.float64, **arguments):
    """A model of which every parameter is set by formula, with neurons that fire."""
    return fill(spikezoo.create_model(name, **{"T": 3, **arguments}), gain).to(dtype).eval()


def mask_channels(model, name, offset=0):
    """Prune every third of the channels that can go; the channels left, by neuron."""
    neurons, kept = neurons_of(model), {}
    for number, members in enumerate(streams(name)):
        alive = (torch.arange(neurons[members[0]].shape[0]) + number + offset) % 3 != 0
        for member in members:
            neurons[member].mask = alive.clone()
            kept[member] = alive.nonzero().flatten()
    return kept


def mask_units(model):
    """Prune, besides, single neurons of all layers (of vectors: none)."""
    for number, neuron in enumerate(neurons_of(model).values()):
        if len(neuron.shape) > 1:
            mask = wave(neuron.shape, number) < 0.8
            mask[:, 0, 0] = True  # no channel is gone by chance
            old = torch.ones(neuron.shape[0], dtype=torch.bool) if neuron.mask is None else neuron.mask
            neuron.mask = mask & old[:, None, None]


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def images(model, batch=2):
    return image_for(model, batch, next(model.parameters()).dtype)


def same_answers(masked, smaller, kept, atol=1e-10):
    """Spikes of every neuron that is left, equal one by one, and logits; the nets fire."""
    x = images(masked)
    wanted, logits = _spikes(masked, x)
    got, small = _spikes(smaller, x)
    assert list(wanted) == list(got)
    for name, spikes in wanted.items():
        left = spikes.index_select(2, kept[name]) if name in kept else spikes
        assert torch.equal(left, got[name]), name
        assert 0.01 < left.mean() < 0.99, (name, left.mean())
        assert left.dim() < 5 or not torch.equal(left[:, 0], left[:, 1]), name  # two images
    torch.testing.assert_close(small, logits, rtol=0, atol=atol)
    assert logits.abs().max() > 0.1


# ----------------------------------------------------------------------------------------------- equal answers


@pytest.mark.parametrize("mpbn", ["none", "channel", "element"])
@pytest.mark.parametrize("name", NAMES)
def test_every_neuron_left_fires_as_before(name, mpbn):
    model = made(name, mpbn=mpbn)
    kept = mask_channels(model, name)
    smaller = spikezoo.compact(model)
    same_answers(model, smaller, kept)
    assert not any(neuron.mask is not None for neuron in neurons_of(smaller).values())
    widths = {members[0]: len(kept[members[0]]) for members in streams(name)}
    assert smaller.recipe == [("compact", {"widths": widths, "masks": {}})]
    for member, index in kept.items():
        assert smaller.get_submodule(member).shape == (len(index), *model.get_submodule(member).shape[1:])


@pytest.mark.parametrize("mpbn", ["none", "channel", "element"])
@pytest.mark.parametrize("name", MAPS)
def test_single_neurons_stay_masked_where_their_channel_lives(name, mpbn):
    model = made(name, mpbn=mpbn)
    kept = mask_channels(model, name)
    mask_units(model)
    smaller = spikezoo.compact(model)
    same_answers(model, smaller, kept)
    masks = {member: neuron.mask for member, neuron in neurons_of(smaller).items() if neuron.mask is not None}
    assert smaller.recipe[0][1]["masks"] == dict.fromkeys(masks, "unit") and len(masks) > 2
    for member, mask in masks.items():
        whole = model.get_submodule(member).mask
        assert torch.equal(mask, whole[kept[member]] if member in kept else whole)


@pytest.mark.parametrize("folds", [["fold_bn"], ["fold_mpbn"], ["fold_mpbn", "fold_bn"]])
@pytest.mark.parametrize(
    ("name", "mpbn"), [("test_mpbn_resnet", "channel"), ("test_mpbn_vgg", "element"), ("test_autost", "channel")]
)
def test_before_and_after_folds(name, mpbn, folds):
    model = made(name, mpbn=mpbn)
    kept = mask_channels(model, name)
    mask_units(model)
    folded, smaller = model, spikezoo.compact(model)
    for fold in folds:
        folded, smaller = apply(folded, fold), apply(smaller, fold)
    same_answers(model, smaller, kept)
    compacted = spikezoo.compact(folded)
    same_answers(folded, compacted, kept)
    assert shapes(compacted) == shapes(smaller)
    assert [step for step, _ in compacted.recipe] == [*folds, "compact"]
    fresh = replay(spikezoo.create_model(name, mpbn=mpbn, T=3), compacted.recipe).double()
    fresh.load_state_dict(compacted.state_dict(), strict=True)
    assert torch.equal(fresh(images(fresh)), compacted(images(fresh)))


@pytest.mark.parametrize("neuron", [{"neuron": "if", "reset": "soft", "v_init": 0.5}, {"neuron": "plif", "tau": 2.0}])
@pytest.mark.parametrize("name", ["test_spiking_vgg", "test_mpbn_resnet", "test_spiking_mlp"])
def test_other_neurons(name, neuron):
    model = made(name, **neuron)
    kept = mask_channels(model, name)
    same_answers(model, spikezoo.compact(model), kept)


@pytest.mark.parametrize("name", NAMES)
def test_in_single_precision(name):
    model = made(name, dtype=torch.float32)
    mask_channels(model, name)
    mask_units(model)
    x = images(model)
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(spikezoo.compact(model)(x), wanted, rtol=0, atol=1e-5)
    assert wanted.abs().max() > 0.1


def test_flattened_and_averaged_columns_by_hand():
    model = made("test_spiking_vgg")  # 10 channels of 4x4 into 16 features, into 10 classes
    model.stages[2][0].neuron.mask = torch.arange(10) != 7
    model.neck[0].neuron.mask = torch.arange(16) > 0
    smaller = spikezoo.compact(model)
    weight = model.neck[0].linear.weight
    # Channel 7 had the columns 112 to 127.
    assert torch.equal(smaller.neck[0].linear.weight, torch.cat([weight[1:, :112], weight[1:, 128:]], 1))
    assert torch.equal(smaller.head.fc.weight, model.head.fc.weight[:, 1:])
    assert torch.equal(smaller.neck[0].norm.running_var, model.neck[0].norm.running_var[1:])
    assert torch.equal(smaller.stages[2][0].conv.weight, model.stages[2][0].conv.weight[[*range(7), 8, 9]])
    averaged = made("test_spiking_resnet")  # 16 channels, averaged, into 16 features
    averaged.stages[2][0].neuron.mask = torch.arange(16) != 7
    assert spikezoo.compact(averaged).neck[0].linear.weight.shape == (16, 15)


def test_a_stream_loses_what_all_its_joins_have_lost():
    model = made("test_spiking_resnet")
    stem, join = model.stem[0].neuron, model.stages[0][0].neuron
    stem.mask, join.mask = torch.arange(8) < 5, torch.arange(8) % 4 != 3  # without 5, 6, 7 and without 3, 7
    smaller = spikezoo.compact(model)
    assert smaller.recipe == [
        (
            "compact",
            {"widths": {"stem.0.neuron": 7}, "masks": {"stem.0.neuron": "channel", "stages.0.0.neuron": "channel"}},
        )
    ]
    assert smaller.stem[0].neuron.mask.tolist() == [True] * 5 + [False] * 2
    assert smaller.stages[0][0].neuron.mask.tolist() == [True] * 3 + [False] + [True] * 3
    same_answers(model, smaller, dict.fromkeys(("stem.0.neuron", "stages.0.0.neuron"), torch.arange(7)))
    # One join alone changes no width: the other carries the channel on.
    stem.mask = None
    smaller = spikezoo.compact(model)
    assert smaller.recipe[0][1] == {"widths": {}, "masks": {"stages.0.0.neuron": "channel"}}
    same_answers(model, smaller, {})


def test_a_stream_of_many_blocks():
    layout = {"widths": (6, 8), "depths": (3, 2), "strides": (1, 2), "stem_width": 6}
    model = made("test_spiking_resnet", **layout)
    members = ["stem.0.neuron", *(f"stages.0.{block}.neuron" for block in range(3))]
    for member in members:
        model.get_submodule(member).mask = torch.arange(6) != 2
    for member in ("stages.1.0.neuron", "stages.1.1.neuron"):
        model.get_submodule(member).mask = torch.arange(8) > 0
    smaller = spikezoo.compact(model)
    assert smaller.recipe[0][1] == {"widths": {"stem.0.neuron": 5, "stages.1.0.neuron": 7}, "masks": {}}
    kept = dict.fromkeys(members, torch.tensor([0, 1, 3, 4, 5]))
    kept |= dict.fromkeys(("stages.1.0.neuron", "stages.1.1.neuron"), torch.arange(1, 8))
    same_answers(model, smaller, kept)


def test_a_layer_whose_bias_made_its_dead_channels_fire():
    neurons = NeuronFactory(NeuronConfig(threshold=0.5))
    layer = LinearNormNeuron(3, 2, pool=False, norm=False, bias=True, neuron=neurons, dd={})
    with torch.no_grad():
        layer.linear.weight.zero_()
        layer.linear.bias.fill_(1.0)
        layer.neuron.mask = torch.tensor([True, False])
        assert layer(torch.zeros(1, 1, 3, 1, 1)).flatten().tolist() == [1, 0]


# ------------------------------------------------------------------------------------------- an ordinary model


@pytest.mark.parametrize(("name", "units"), [*((name, False) for name in NAMES), *((name, True) for name in MAPS)])
def test_stored_and_loaded(tmp_path, name, units):
    model = made(name, dtype=torch.float32)
    mask_channels(model, name)
    if units:
        mask_units(model)
    smaller = spikezoo.compact(model)
    spikezoo.save_checkpoint(smaller, tmp_path)
    loaded = spikezoo.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.recipe == smaller.recipe and loaded.feature_info == smaller.feature_info
    state = loaded.state_dict()
    assert shapes(loaded) == shapes(smaller)
    assert all(torch.equal(state[key], value) for key, value in smaller.state_dict().items())
    x = images(model)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), smaller(x))
    # A fresh model takes the structure alone, on any device.
    assert shapes(replay(spikezoo.create_model(name, T=3, device="meta"), smaller.recipe)) == shapes(smaller)
    with pytest.raises(RuntimeError, match="size mismatch"):
        spikezoo.create_model(name, T=3).load_state_dict(state, strict=False)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_statistics_are_those_of_the_masked_model(name):
    masked = made(name, mpbn="channel").train()
    mask_channels(masked, name)
    smaller = spikezoo.compact(masked)
    assert smaller.training
    x, results = images(masked), []
    for model in (masked, smaller):
        loss = nn.functional.cross_entropy(model(x), torch.arange(2))
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
        results.append((loss.detach(), nn.functional.cross_entropy(model(x), torch.arange(2)).detach()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-9)
    assert (results[0][1] - results[0][0]).abs() > 1e-3
    # Weights and statistics after it: of those left, the same; compaction commutes with the step.
    after, again = smaller.state_dict(), spikezoo.compact(masked).state_dict()
    assert list(after) == list(again)
    for key in after:
        torch.testing.assert_close(after[key], again[key], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_feature_levels_and_head(name):
    model = made(name, dtype=torch.float32)
    kept = mask_channels(model, name)
    smaller = spikezoo.compact(model)
    x = images(model)
    final, levels = smaller.forward_intermediates(x)
    assert [level.shape[1] for level in levels] == [info["num_chs"] for info in smaller.feature_info]
    assert final.shape[1] == smaller.num_features == smaller.head_hidden_size
    wanted = model.forward_intermediates(x, intermediates_only=True)
    if name in ("test_mpbn_resnet", "test_rmp_resnet"):
        torch.testing.assert_close(levels[0], wanted[0][:, kept["stem.2.neuron"]])
    smaller.reset_classifier(7)
    assert smaller(x).shape == (2, 7)
    smaller.reset_classifier(0, "")
    assert smaller(x).shape == final.shape
    smaller.reset_classifier(3, "avg")
    assert smaller(x).shape == (2, 3) and smaller.get_classifier().in_features == smaller.num_features
    headless = made(name, num_classes=0)
    mask_channels(headless, name)
    smaller = spikezoo.compact(headless)
    assert smaller(images(headless)).shape == (2, smaller.num_features)
    smaller.reset_classifier(5)
    assert smaller(images(headless)).shape == (2, 5)


def test_loading_with_other_classes_channels_and_as_features(tmp_path, caplog):
    model = made("test_mpbn_resnet", dtype=torch.float32)
    mask_channels(model, "test_mpbn_resnet")
    spikezoo.save_checkpoint(spikezoo.compact(model), tmp_path)
    other = spikezoo.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=4, in_chans=1)
    assert other(torch.rand(2, 1, 32, 32)).shape == (2, 4) and "starts afresh" in caplog.text
    features = spikezoo.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True)
    levels = features(torch.rand(2, 3, 32, 32))
    assert [level.shape[1] for level in levels] == features.feature_info.channels() == [5, 5, 8, 10]


@pytest.mark.parametrize("name", ["test_spiking_mlp", "test_spiking_vgg", "test_mpbn_resnet", "test_spikformer"])
def test_exact_operations_stay(name):
    # Pruned neurons without their synapses: a spike that meets a weight of zero is no operation.
    model = made(name)
    kept = mask_channels(model, name)
    mask_units(model)
    smaller = spikezoo.compact(model)
    with torch.no_grad():
        for member, index in kept.items():
            layer = model.get_submodule(member.removesuffix(".neuron"))
            layers = [getattr(layer, part, None) for part in ("conv", "linear")]
            for part in ("conv2", "shortcut"):
                layers.append(getattr(getattr(layer, part, None), "conv", None))
            for weights in filter(None, layers):
                gone = torch.ones(len(weights.weight), dtype=torch.bool).index_fill(0, index, False)
                weights.weight[gone] = 0
    before, after = spikezoo.count(model, images(model)), spikezoo.count(smaller, images(model))
    assert before.sops_exact == after.sops_exact > 0
    assert before.macs_exact == after.macs_exact
    assert after.macs < 0.8 * before.macs


@pytest.mark.parametrize("per", ["unit", "channel"])
@pytest.mark.parametrize("name", ["test_spiking_mlp", "test_mpbn_vgg", "test_spiking_vgg"])
def test_what_dynsnn_removes_is_gone(name, per):
    model = made(name, dynsnn={"per": per})
    rates = neuron_rates(model, [images(model, 8)])
    prune(model, rates, threshold_for(model, rates, 0.3))
    smaller = spikezoo.compact(model)
    left = {member: ~_silent(neuron.mask) for member, neuron in neurons_of(model).items()}
    same_answers(model, smaller, {member: alive.nonzero().flatten() for member, alive in left.items()})
    assert smaller.recipe[1][1]["widths"] == {
        member: int(alive.sum()) for member, alive in left.items() if not alive.all()
    }
    report = dynsnn_report(model, images(model))
    assert report["parameters"] > report["parameters_left"]
    if per == "channel":
        assert sum(p.numel() for p in smaller.parameters()) == report["parameters_left"]
    assert spikezoo.count(smaller, images(model), inputs="analog").sops_exact == report["sops_exact"] > 0


@pytest.mark.parametrize("per", ["unit", "channel"])
def test_removed_and_compacted_once_more(tmp_path, per):
    model = made("test_mpbn_resnet", dtype=torch.float32)
    mask_channels(model, "test_mpbn_resnet")
    once = dynsnn(spikezoo.compact(model), per=per)
    x = images(model)
    assert torch.equal(once(x), spikezoo.compact(model)(x))
    rates = neuron_rates(once, [x])
    assert rates.keys() == masks_of(once).keys()
    prune(once, rates, min(float(rate.max()) for rate in rates.values()))
    twice = spikezoo.compact(once)
    torch.testing.assert_close(twice(x), once(x), rtol=0, atol=1e-5)
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in once.parameters())
    spikezoo.save_checkpoint(twice, tmp_path)
    assert torch.equal(spikezoo.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), twice(x))
    with pytest.raises(ValueError, match="have a mask already"):
        dynsnn(once)


def test_compacted_again_and_with_tickets_baked(tmp_path):
    name = "test_mpbn_vgg"
    model = spikezoo.bake(apply(made(name, dtype=torch.float32), "ticket", kind="mpslt", sparsity=0.4)).eval()
    kept = mask_channels(model, name)
    once = spikezoo.compact(model)
    layer = model.stages[1][1]
    assert layer.conv.sign_seeds and not hasattr(once.stages[1][1].conv, "sign_seeds")
    spikezoo.save_checkpoint(once, tmp_path)
    loaded = spikezoo.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert all(torch.equal(value, once.state_dict()[key]) for key, value in loaded.state_dict().items())
    once.double(), model.double()
    same_answers(model, once, kept)
    once.stages[1][0].neuron.mask = torch.arange(6) > 0
    twice = spikezoo.compact(once)
    same_answers(once, twice, {"stages.1.0.neuron": torch.arange(1, 6)})
    assert [step for step, _ in twice.recipe] == ["ticket", "bake", "compact", "compact"]
    fresh = replay(spikezoo.create_model(name, T=3), twice.recipe).double()
    fresh.load_state_dict(twice.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(images(fresh)), twice(images(fresh)))
    tuned = apply(twice.float(), "tune")
    assert tuned(images(fresh).float()).shape == (2, 10)


def test_selected_patches_stay_the_same():
    model = spikezoo.bake(made("test_spikformer", dtype=torch.float32, multisp={"patch_ratio": 0.3})).double().eval()
    kept = mask_channels(model, "test_spikformer")
    smaller = spikezoo.compact(model)
    same_answers(model, smaller, kept)


def test_the_original_is_untouched():
    model = made("test_mpbn_resnet").train()
    mask_channels(model, "test_mpbn_resnet")
    before, info = copy.deepcopy(model.state_dict()), copy.deepcopy(model.feature_info)
    smaller = spikezoo.compact(model)
    for tensor in (*smaller.parameters(), *smaller.buffers()):
        tensor.data.zero_()
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert model.recipe == [] and model.training and model.feature_info == info
    assert isinstance(smaller.stem[0].neuron.norm, MembraneNorm) and smaller.stem[0].neuron.norm.channels == 5


def test_nothing_to_remove_is_a_copy():
    model = made("test_spiking_vgg")
    for neuron in neurons_of(model).values():
        neuron.mask = torch.ones(neuron.shape, dtype=torch.bool)
    plain = made("test_spiking_vgg")
    for source in (model, plain):
        same = spikezoo.compact(source)
        assert same.recipe == [("compact", {"widths": {}, "masks": {}})] and same is not source
        state = plain.state_dict()
        assert list(same.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in same.state_dict().items())
    twin = spikezoo.create_model("test_spiking_vgg", neuron="relu")
    assert spikezoo.compact(twin).recipe == [("compact", {"widths": {}, "masks": {}})]


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("test_spiking_vgg", ["stages.1.0.neuron"]),
        ("test_mpbn_resnet", ["stem.2.neuron", "stages.0.0.neuron"]),
        ("test_spikformer", ["stages.2.0.mlp.fc1.neuron"]),
    ],
)
def test_a_layer_without_any_channel_raises(name, members):
    model = made(name)
    for member in members:
        neuron = model.get_submodule(member)
        neuron.mask = torch.zeros(neuron.shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"Layer '{members[0]}': all of its \d+ channels are pruned"):
        spikezoo.compact(model)


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("test_spikformer", "stem.4.neuron"),
        ("test_spikformer", "stem.6.conv.neuron"),
        ("test_spikformer", "stages.1.0.attn.k.neuron"),
        ("test_spikformer", "stages.1.0.attn.neuron"),
        ("test_spikformer", "stages.0.0.mlp.fc2.neuron"),
        ("test_autost", "stages.2.0.mlp.neuron_in"),
    ],
)
def test_attention_and_its_stream_cannot_shrink(name, member):
    model = made(name)
    neuron = model.get_submodule(member)
    neuron.mask = torch.arange(16) != 3
    with pytest.raises(ValueError, match=rf"Layer '{member}', channel 3: it is pruned and cannot be taken out"):
        spikezoo.compact(model)
    neuron.mask = torch.ones(neuron.shape, dtype=torch.bool)
    neuron.mask[3, 1:] = False  # a part of a channel stays as it is
    assert spikezoo.compact(model).recipe[0][1] == {"widths": {}, "masks": {member: "unit"}}


def test_tickets_wrappers_and_wrong_sizes_raise():
    model = made("test_mpbn_vgg")
    with pytest.raises(ValueError, match=r"tickets, which learn scores: spikezoo\.bake it first"):
        spikezoo.compact(apply(model, "ticket"))
    with pytest.raises(ValueError, match="got Linear: give that model itself"):
        spikezoo.compact(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got FeatureGetterNet"):
        spikezoo.compact(spikezoo.create_model("test_mpbn_vgg", features_only=True))
    with pytest.raises(ValueError, match=r"'stem\.0\.neuro' names no neurons.*Did you mean 'stem\.0\.neuron'"):
        apply(model, "compact", widths={"stem.0.neuro": 2})
    for width in (0, 7, True, 2.0):
        with pytest.raises(ValueError, match=rf"widths\['stem\.0\.neuron'\]={width}: expected an integer from 1 to 6"):
            apply(model, "compact", widths={"stem.0.neuron": width})
    with pytest.raises(ValueError, match="Did you mean 'unit'"):
        apply(model, "compact", widths={}, masks={"stem.0.neuron": "units"})
    with pytest.raises(ValueError, match="names no neurons that it could"):
        apply(model, "compact", widths={}, masks={"stem.0": "unit"})
    with pytest.raises(ValueError, match="masks were given without widths"):
        apply(model, "compact", masks={})
    with pytest.raises(ValueError, match="names no neurons that it could"):
        apply(made("test_spikformer"), "compact", widths={"stem.4.neuron": 5})


def test_given_widths_take_pruned_channels_first():
    model = made("test_spiking_vgg")
    kept = mask_channels(model, "test_spiking_vgg")
    recipe = spikezoo.compact(model).recipe
    same_answers(model, apply(model, "compact", **recipe[0][1]), kept)
