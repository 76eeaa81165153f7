"""Tests of every named model: counts, timm's contract, spiking behaviour, recorded outputs, messages on bad input.

``python tests/test_models.py --record`` writes the outputs of the micro-models to ``tests/recorded_outputs.json``.
"""

import copy
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

import spikezoo
from spikezoo.checks import UnknownArgumentError
from spikezoo.layers import StepScale
from spikezoo.neurons import SpikingNeuron
from spikezoo.observe import firing_rates
from spikezoo.registry import _rows

RECORD = Path(__file__).parent / "recorded_outputs.json"
RECORD_COMMAND = "python tests/test_models.py --record"

ALL = sorted(_rows)
MICRO = [name for name in ALL if name.startswith("test_")]
FIVE = [*MICRO, "mpbn_resnet20"]
PLAIN_VGG, MLP = "test_spiking_vgg", "test_spiking_mlp"
TIED = (
    PLAIN_VGG,
    MLP,
    "test_rmp_resnet",
    "test_plif",
)  # whose linear layers tie them to their image size; they have no biases
BARE = (MLP, "test_rmp_resnet")  # without norms
# Arguments that leave one block of each kind of a micro-model.
_NARROW = {"widths": (8, 12), "depths": (1, 1)}
SHORTER = {
    "test_autost": {"depth": 1, "heads": (2,), "mlp_ratios": (2,)},
    "test_ms_resnet": {**_NARROW, "strides": (1, 2)},
    "test_qkformer": _NARROW,
    "test_sdt": {"depth": 1, "mlp_ratios": (1.5,)},
    "test_sew_resnet": _NARROW,
    "test_spikformer": {"depth": 1, "heads": (2,), "mlp_ratios": (1.5,)},
    "test_spikingformer": {"depth": 1},
    "test_spikingresformer": {**_NARROW, "heads": (1, 2), "patches": (2, 1)},
}
PATCHED = ("test_spikformer", "test_autost", "test_spikingformer", "test_sdt")  # whose patches must divide the image


# The table of the design: trainable parameters at 10 classes (ImageNet nets: 1000) from the papers' layouts.
COUNTS = {
    "spiking_conv4": 2_425_024,
    "spiking_vgg9": 2_261_184,
    "spiking_vgg11": 5_275_840,
    "spiking_vgg16": 14_728_266,
    "mpbn_vgg16": 14_736_714,
    "spiking_resnet19": 12_630_858,
    "spiking_resnet19_wide": 12_569_226,
    "mpbn_resnet19": 12_578_186,
    "spiking_resnet20": 11_247_946,
    "mpbn_resnet20": 11_256_010,
    "spiking_resnet18": 11_689_512,
    "spiking_resnet34": 21_797_672,
    "mpbn_resnet18": 11_697_320,
    "mpbn_resnet34": 21_812_904,
}
NORMLESS = {  # 9 a layer and pair of channels; 5x5 convolutions of 6 and 16, then 784-120-84-10
    "rmp_resnet20": 11_253_440,
    "rmp_vgg16": 14_710_464 + 512 * 10,
    "rmp_in_vgg16": 14_710_464 + 512 * 7 * 7 * 4096 + 4096 * 4096 + 4096 * 1000,
    "spiking_lenet": 25 * 6 + 25 * 6 * 16 + 7 * 7 * 16 * 120 + 120 * 84 + 84 * 10,
}
MLPS = {"spiking_mlp_340": 794 * 340, "spiking_mlp_500": 794 * 500, "spiking_mlp_1000": 794 * 1000}
VARIANTS = [
    ("mpbn_resnet20", {"num_classes": 100}, 11_302_180),
    ("mpbn_resnet19", {"num_classes": 100}, 12_624_356),
    ("mpbn_vgg16", {"num_classes": 100}, 14_782_884),
    ("spiking_resnet19", {"num_classes": 100}, 12_653_988),
    ("mpbn_resnet20", {"in_chans": 2}, 11_255_434),
]


# --------------------------------------------------------------------------------------------------------------
# Formulas: the same numbers on every machine and every version of torch, which no random generator promises
# --------------------------------------------------------------------------------------------------------------


def wave(shape, number=0):
    """Numbers in (-1, 1) without visible order: the sine of a quadratic phase."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.37 * index * index + 1.3 * index + number).reshape(shape)


@torch.no_grad()
def fill(model, gain=None):
    """Set every parameter and buffer by formula so that every layer fires, and neither never nor always."""
    normed = any(hasattr(module, "running_var") for module in model.modules())
    gain = gain or (2.5 if normed else 6.0)
    # A neuron in the tau form takes 1/tau of its current: the norms before it give as much more.
    tau = model.neuron_config.tau or 1.0
    number = 0
    for module in sorted_modules(model):
        is_norm = hasattr(module, "running_var")
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not tensor.is_floating_point():
                continue
            number += 1
            value = wave(tensor.shape, number)
            if name == "running_var":
                value = 0.5 + torch.cos(value * math.pi).square()
            elif name == "running_mean":
                value = 0.1 * value
            elif is_norm and name == "weight":
                value = tau * (1 + 0.5 * value)
            elif is_norm:
                value = tau * 0.3 * value + 0.25 * (tau - 1)
            elif tensor.dim() >= 2 and not is_norm:
                value = gain * value / math.sqrt(tensor[0].numel())
            elif isinstance(module, StepScale):
                value = 1 + 0.5 * value
            else:
                value = 0.3 * value
            tensor.copy_(value)
    return model


def sorted_modules(model):
    """Modules by name: the order in which a constructor assigns them is no part of what is recorded."""
    return [module for _, module in sorted(model.named_modules())]


def make(name, **kwargs):
    return fill(spikezoo.create_model(name, **kwargs))


def image(batch=2, channels=3, size=32, dtype=torch.float32):
    return wave((batch, channels, size, size), 7).to(dtype)


def image_for(model, batch=2, dtype=torch.float32):
    return wave((batch, *model.pretrained_cfg["input_size"]), 7).to(dtype)


def count(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def statistics(model):
    return {name: tensor.clone() for name, tensor in model.named_buffers() if not name.startswith("head.")}


# Neurons of the papers' code: decay, threshold, comparison, surrogate. The last two show in no output of a net.
TICKET, TET, MPBN = (0.99, 1.0, ">=", "sigmoid"), (0.5, 1.0, ">", "triangle"), (0.25, 0.5, ">", "tanh")
NEURONS = {
    **dict.fromkeys(COUNTS, MPBN),
    **dict.fromkeys(("spiking_conv4", "spiking_vgg9", "spiking_vgg11", "test_spiking_vgg"), TICKET),
    **dict.fromkeys(("spiking_resnet19", "test_spiking_resnet"), TET),
    **dict.fromkeys(("test_mpbn_vgg", "test_mpbn_resnet"), MPBN),
}


# --------------------------------------------------------------------------------------------------------------
# Every row, without memory: device='meta' computes shapes only
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_parameter_count_is_the_rows(name):
    model = spikezoo.create_model(name, device="meta")
    assert all(p.is_meta for p in model.parameters()) and all(b.is_meta for b in model.buffers())
    assert count(model) == _rows[name].parameters == spikezoo.model_info(name).parameters


@pytest.mark.parametrize(("name", "parameters"), [*COUNTS.items(), *NORMLESS.items(), *MLPS.items()])
def test_parameter_count_is_the_designs(name, parameters):
    assert _rows[name].parameters == parameters


@pytest.mark.parametrize(("name", "constants"), NEURONS.items())
def test_neuron_constants(name, constants):
    model = spikezoo.create_model(name, device="meta")
    config = model.neuron_config
    assert (config.decay, config.threshold, config.firing, config.surrogate) == constants
    rest = (config.kind, config.tau, config.v_reset, config.reset, config.surrogate_alpha, config.detach_reset)
    assert rest == ("lif", None, 0.0, "hard", None, False)
    assert model.T == 4 and model.mpbn == ("channel" if "mpbn" in name else None)


@pytest.mark.parametrize(("name", "arguments", "parameters"), VARIANTS)
def test_parameter_count_of_variants(name, arguments, parameters):
    assert count(spikezoo.create_model(name, device="meta", **arguments)) == parameters


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_shapes_and_cfg_of_every_row(name, monkeypatch):
    def forward(norm, x):  # without numbers torch computes norms by formulas, which take longer than all the rest
        assert x.shape[1] == norm.num_features
        return torch.empty_like(x)

    monkeypatch.setattr(nn.modules.batchnorm._BatchNorm, "forward", forward)
    model = spikezoo.create_model(name, device="meta")
    model.T = min(model.T, 2)  # time enough to be told from the batch, and steps take most of the time
    cfg, state = model.pretrained_cfg, model.state_dict()
    assert f"{cfg['first_conv']}.weight" in state and f"{cfg['classifier']}.weight" in state
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    assert (model.num_classes, model.in_chans) == (cfg["num_classes"], cfg["input_size"][0])
    assert model.img_size == cfg["input_size"][1:]  # what the scripts feed it
    x = torch.empty(2, *model.input_shape, device="meta")
    # One pass, for even without numbers a deep net takes its time; the micro-models take every path.
    features, levels = model.forward_intermediates(x, time_mean=False)
    assert features.shape == (2, model.num_features, *cfg["pool_size"])
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.forward_head(features).shape == (2, model.num_classes)
    # timm's contract wants three levels or more, each with true facts; these nets have one hidden layer.
    assert len(levels) == len(model.feature_info) >= (1 if name in MLPS else 3)
    for level, info in zip(levels, model.feature_info, strict=True):
        assert level.shape[:3] == (model.T, 2, info["num_chs"])
        assert x.shape[-1] // level.shape[-1] == info["reduction"]
        assert x.shape[-2] // level.shape[-2] == info["reduction"]
        model.get_submodule(info["module"])
    wrapped = spikezoo.create_model(name, features_only=True, device="meta")
    assert wrapped.feature_info.channels() == [level.shape[2] for level in levels]


@pytest.mark.parametrize("name", [*NORMLESS, *MLPS, "test_rmp_resnet"])
def test_nets_without_norms_and_biases(name):
    model = spikezoo.create_model(name, device="meta")
    assert all(n.endswith("weight") and p.dim() > 1 for n, p in model.named_parameters())
    assert list(model.buffers()) == []
    assert model.neuron_config.reset == ("hard" if name in MLPS else "soft")


def test_norms_are_an_argument():
    torch.manual_seed(0)
    for name in ("spiking_lenet", "test_mpbn_vgg", "test_rmp_resnet"):
        with_norms, without = (spikezoo.create_model(name, norm=norm, mpbn="none") for norm in (True, False))
        assert any(isinstance(m, nn.BatchNorm2d) for m in with_norms.modules())
        assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in without.modules())
        assert all(p.dim() > 1 for p in without.parameters())
        for parameter in without.parameters():  # He et al.'s initialisation, where there is enough to measure it
            if parameter.numel() > 500:
                fan_in = parameter[0].numel()
                assert parameter.std().item() == pytest.approx(
                    (2 / fan_in) ** 0.5, rel=5 / (2 * parameter.numel()) ** 0.5
                )


def test_flattened_map_by_hand():
    model = make("test_rmp_resnet", T=2).eval()
    x = image_for(model)
    last = model.forward_intermediates(x)[1][-1]
    assert last.shape == (2, 16, 4, 4)
    logits = torch.einsum("bf,kf->bk", last.reshape(2, 256), model.get_classifier().weight)
    torch.testing.assert_close(model(x), logits)


def test_element_norms_of_the_imagenet_nets_fit_their_images():
    model = spikezoo.create_model("mpbn_resnet18", mpbn="element", device="meta")
    assert model.stem[0].neuron.norm.weight.shape == (64, 112, 112)
    assert timm.create_model("mpbn_resnet18", img_size=64, device="meta").img_size == (64, 64)


@pytest.mark.parametrize("name", ALL)
def test_parameter_groups_cover_everything_in_order(name):
    model = spikezoo.create_model(name, device="meta")
    names = [n for n, _ in model.named_parameters()]
    assert model.no_weight_decay() <= set(names)
    assert model.no_weight_decay() or model.mpbn is None
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert len(groups) > 1
        assert sorted(n for group in groups.values() for n in group) == sorted(names)
        depth = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        position = {"stem": 0, "stages": 1, "neck": 2, "head": 3}
        order = sorted(names, key=lambda n: (position[n.split(".")[0]], n))
        ranks = {}
        for n in order:
            ranks.setdefault(n.split(".")[0], []).append(depth[n])
        # Layer-wise learning rates fall from the head to the stem: the later part never has the smaller rank.
        parts = [ranks[part] for part in position if part in ranks]
        assert all(max(a) <= min(b) for a, b in itertools.pairwise(parts))


# --------------------------------------------------------------------------------------------------------------
# timm's contract
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MICRO)
def test_formula_makes_every_layer_fire(name):
    # What the other tests rest on: a silent or a saturated layer would let a wrong net pass.
    for training in (True, False):
        model = make(name, T=2).train(training)
        rates = firing_rates(model, image_for(model))
        assert rates
        for layer, steps in rates.items():
            assert 0.02 < steps.mean() < 0.98, f"{layer}: {steps.tolist()}"


@pytest.mark.parametrize("name", MICRO)
def test_forward_and_checkpointed_forward(name):
    model = make(name).eval()
    x = image_for(model)
    out = model(x)
    assert out.shape == (2, model.num_classes) and out.isfinite().all()
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    assert torch.equal(model(x), out)
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing


@pytest.mark.parametrize("name", MICRO)
def test_every_parameter_learns(name):
    model = make(name, num_classes=42, T=2)
    x = image_for(model)
    out = model(x)
    assert out.shape == (2, 42)
    out.mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    # In eval mode the norms are plain affine maps, so that the biases before them count too.
    model.zero_grad()
    model.eval()(x).square().sum().backward()
    assert [n for n, p in model.named_parameters() if not p.grad.isfinite().all() or not p.grad.any()] == []


def test_a_twin_of_an_mpbn_row_needs_no_second_argument():
    for kind in ("relu", "sign"):
        twin = spikezoo.create_model("test_mpbn_vgg", neuron=kind)
        assert twin.mpbn is None and twin.T == 1
        assert twin(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="neuron='relu' has no membrane potential, so decay, threshold"):
        spikezoo.create_model("test_mpbn_vgg", neuron="relu", decay=0.5, threshold=1.0)


@pytest.mark.parametrize("mpbn", [None, "element"])
@pytest.mark.parametrize("name", MICRO)
def test_checkpointing_changes_neither_gradients_nor_statistics(name, mpbn):
    plain = make(name, T=2, mpbn=mpbn)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    before = statistics(plain)
    for model in (plain, checkpointed):
        model(image_for(model)).square().sum().backward()
    for (n, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=n: f"{n}: {m}")
    after, other = statistics(plain), statistics(checkpointed)
    for n, tensor in after.items():
        assert torch.equal(tensor, other[n]), n
        assert not torch.equal(tensor, before[n]), f"{n} was not updated"


@pytest.mark.parametrize("name", MICRO)
def test_frozen_parameters_stay_frozen(name):
    model = make(name, T=1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.head.requires_grad_(True)
    model.set_grad_checkpointing()
    out = model(image_for(model))
    if not out.requires_grad:  # a vote, which does not learn
        assert name == "test_plif"
        return
    out.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        n for n, _ in model.named_parameters() if n.startswith("head.")
    ]


@pytest.mark.parametrize("name", MICRO)
def test_forward_is_the_mean_of_the_steps(name):
    model = make(name, T=3).eval()
    x = image_for(model)
    sequence, features, steps = model.forward_sequence(x), model.forward_features(x), model.forward_steps(x)
    assert sequence.shape == (3, 2, model.num_features, *model.pretrained_cfg["pool_size"])
    assert torch.equal(features, sequence.mean(0))
    assert steps.shape == (3, 2, model.num_classes)
    torch.testing.assert_close(model(x), steps.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    assert not torch.equal(steps[0], steps[1])  # time does something


@pytest.mark.parametrize("name", MICRO)
def test_reset_classifier(name):
    model = make(name, T=1).double().eval()
    x = image_for(model, dtype=torch.float64)
    features = model.forward_features(x)
    model.reset_classifier(0)
    assert model.num_classes == 0 and isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(x), features.mean((2, 3)))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    # The new layer takes the net's dtype, although the headless net had no layer to copy it from.
    model.reset_classifier(7, "max")
    assert model.num_classes == 7 and model.get_classifier().weight.dtype == torch.float64
    torch.testing.assert_close(model(x), model.get_classifier()(features.amax((2, 3))))
    model.reset_classifier(7, "avg")
    torch.testing.assert_close(model(x), model.get_classifier()(features.mean((2, 3))))
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    headless = make(name, num_classes=0).eval()
    assert headless(image_for(headless)).shape == (2, headless.num_features)
    assert (model.get_classifier().bias is None) == (name in (*TIED, "test_spikingresformer"))


@pytest.mark.parametrize("name", MICRO)
def test_features_do_not_mix_batch_and_time(name):
    model = make(name, T=2).double().eval()
    wrapped = spikezoo.create_model(name, T=2, features_only=True).double().eval()
    # The wrapper holds the same net less what lies behind the last level.
    state = model.state_dict()
    wrapped.model.load_state_dict({n: state[n] for n in wrapped.model.state_dict()})
    x = image_for(model, 3, torch.float64)
    found = wrapped(x)
    final, levels = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert len(found) == len(levels) == len(model.feature_info)
    for a, b in zip(found, levels, strict=True):
        torch.testing.assert_close(a, b)
    # timm's default wrapper takes the batch for time: then a sample's features depend on its neighbours.
    for together, alone in zip(found, wrapped(x[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone)
    subset = spikezoo.create_model(name, T=2, features_only=True, out_indices=(0, 2)).eval()
    assert subset.feature_info.channels() == [model.feature_info[i]["num_chs"] for i in (0, 2)]
    assert subset.feature_info.reduction() == [model.feature_info[i]["reduction"] for i in (0, 2)]
    assert [f.shape for f in subset(x.float())] == [levels[i].shape for i in (0, 2)]
    last = spikezoo.create_model(name, T=2, features_only=True, out_indices=(-1,)).eval()
    assert [f.shape for f in last(x.float())] == [levels[-1].shape]


@pytest.mark.parametrize("name", MICRO)
def test_forward_intermediates(name):
    model = make(name, T=2).eval()
    x = image_for(model)
    final, levels = model.forward_intermediates(x)
    assert [level.dim() for level in levels] == [4] * len(levels)
    sequences = model.forward_intermediates(x, intermediates_only=True, time_mean=False)
    for level, sequence in zip(levels, sequences, strict=True):
        assert sequence.shape == (2, *level.shape)
        assert torch.equal(sequence.mean(0), level)
    for indices, expected in ((1, levels[-1:]), (2, levels[-2:]), ([0, 2], levels[::2][:2]), ([-1], levels[-1:])):
        found = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    calls = []
    handles = [stage.register_forward_hook(lambda *_: calls.append("stage")) for stage in model.stages[2]]
    early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert all(map(torch.equal, early, levels[:2])) and calls == []
    assert torch.equal(model.forward_intermediates(x, indices=[0])[0], final) and calls
    for handle in handles:
        handle.remove()
    for bad in ([len(levels)], [-len(levels) - 1], len(levels) + 1, 0, [], -1):
        with pytest.raises(ValueError, match=rf"feature levels, 0 \(stem\) to {len(levels) - 1}"):
            model.forward_intermediates(x, indices=bad)
    with pytest.raises(ValueError, match="only 'NCHW'"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", MICRO)
def test_prune_intermediate_layers(name):
    model = make(name, T=2).eval()
    x = image_for(model)
    levels = model.forward_intermediates(x, intermediates_only=True)
    before = count(model)
    assert model.prune_intermediate_layers([0, -2]) == [0, len(levels) - 2]
    assert count(model) < before and isinstance(model.get_classifier(), nn.Identity)
    found = model.forward_intermediates(x, intermediates_only=True)
    assert len(found) == len(levels) - 1 and all(map(torch.equal, found, levels[:-1]))
    assert torch.equal(model(x), levels[-2])
    with pytest.raises(ValueError, match="feature levels"):
        model.forward_intermediates(x, indices=[len(levels) - 1])
    if name == MLP:
        return
    # What remains is convolutions: nothing ties it to the size of its images any more.
    assert model(image_for(model).repeat(1, 1, 2, 1)).shape[-2] == 2 * levels[-2].shape[-2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MICRO)
def test_dtypes(name, dtype):
    model = spikezoo.create_model(name, dtype=dtype, T=2)
    floats = [t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]
    assert {t.dtype for t in floats} == {dtype}
    fill(model)
    x = image_for(model, dtype=dtype)
    out = model(x)
    assert out.dtype == dtype and out.isfinite().all()
    out.float().sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    cast = make(name, T=2).to(dtype)
    assert cast.eval()(x).dtype == dtype and cast.forward_steps(x).dtype == dtype


@pytest.mark.parametrize("name", MICRO)
def test_autocast(name):
    model = make(name, T=2)
    x = image_for(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).isfinite().all()


@pytest.mark.parametrize("name", MICRO)
def test_channels_last_gives_the_same(name):
    model = make(name, T=2).eval()
    x = image_for(model)
    expected = model(x)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=0, atol=1e-5)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MICRO)
def test_adapts_channels_classes_and_size(name):
    model = make(name, in_chans=1, num_classes=5, img_size=(32, 48), T=1).eval()
    assert model(wave((1, 1, 32, 48)).float()).shape == (1, 5)
    if not model.fixed_img_size:
        # Odd feature maps on the way, 22 by 18 to 6 by 5: both branches of a block must round alike.
        assert model(wave((1, 1, 44, 36)).float()).shape == (1, 5)
        if name in PATCHED:
            with pytest.raises(ValueError, match=r"33x35 pixels is not divisible by the patch, 4x4: .* to 32x36"):
                model(wave((1, 1, 33, 35)).float())
        else:
            assert model(wave((1, 1, 33, 35)).float()).shape == (1, 5)
    dropping = make(name, drop_rate=0.5, T=2).train()
    torch.manual_seed(0)
    x = image_for(dropping, 4)
    assert not torch.equal(dropping(x), dropping(x))
    dropping.eval()
    assert torch.equal(dropping(x), dropping(x))


def test_timms_builder_rejects_unknown_arguments():
    # timm's own contract test wants a TypeError; a user of ours may catch the ValueError.
    for error in (TypeError, ValueError, UnknownArgumentError):
        with pytest.raises(error, match="Did you mean 'threshold'"):
            timm.create_model("test_mpbn_vgg", thresold=1.0)


# --------------------------------------------------------------------------------------------------------------
# Spiking: time, state, independence
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("name", FIVE)
def test_time_steps(name, T):
    model = make(name, T=T)
    x = image_for(model)
    out = model(x)
    assert out.shape == (2, 10) and out.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        first = model(x)
        assert torch.equal(model(x), first)  # law 1: nothing is kept between calls
        assert model.forward_steps(x).shape == (T, 2, 10)


@pytest.mark.parametrize("name", FIVE)
@torch.no_grad()
def test_samples_are_independent(name):
    # In float64, for a rounding difference between batch sizes must not move a spike.
    model = make(name, T=2).double().eval()
    x = image_for(model, 4, torch.float64)
    out = model(x)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(model(x[order]), out[order], rtol=0, atol=1e-9)
    torch.testing.assert_close(model(x[1:2]), out[1:2], rtol=0, atol=1e-9)  # another batch size, and a batch of one
    torch.testing.assert_close(model(x), out, rtol=0, atol=0)
    assert (out[0] - out[1]).abs().max() > 1e-3  # and the answer depends on the image


@pytest.mark.parametrize("name", FIVE)
def test_deepcopy_after_a_training_step(name):
    size = 32 if name in MICRO else 16
    model = make(name, T=2, img_size=size)
    x = image(size=size)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model(x).square().sum().backward()
    optimizer.step()
    # timm's EMA copies a model in the middle of training; a kept membrane potential would make this raise.
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FIVE)
def test_stem_sees_an_image_once(name, training):
    size = 32 if name in MICRO else 16
    model = make(name, T=4, img_size=size).train(training)
    first = model.get_submodule(model.pretrained_cfg["first_conv"])
    shapes = []
    handle = first.register_forward_pre_hook(lambda _module, inputs: shapes.append(tuple(inputs[0].shape)))
    with torch.no_grad():
        model(image(size=size))
        model(image(size=size)[:, None].repeat(1, 3, 1, 1, 1))
    handle.remove()
    pixels = (3 * size * size,) if name == MLP else (3, size, size)
    assert shapes == [(2, *pixels), (3 * 2, *pixels)]


@pytest.mark.parametrize("name", MICRO)
def test_event_frames(name):
    model = make(name, T=4).eval()
    x = image()
    frames = x[:, None].repeat(1, 4, 1, 1, 1)
    torch.testing.assert_close(model(frames), model(x), rtol=0, atol=1e-6)
    # Event frames bring their own time steps, and their order counts.
    other = wave((2, 3, 3, 32, 32), 11).float()
    assert model.forward_steps(other).shape == (3, 2, 10)
    assert not torch.allclose(model(other), model(other.flip(1)))
    # Causal: the first steps do not know how many follow.
    torch.testing.assert_close(model.forward_steps(other[:, :2]), model.forward_steps(other)[:2], rtol=0, atol=1e-5)
    # Time and batch are not confused: a sample's frames alone give its answer.
    torch.testing.assert_close(model(other[1:]), model(other)[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("neuron", ["relu", "sign"])
@pytest.mark.parametrize("name", MICRO)
def test_twins_without_time(name, neuron):
    model = make(name, neuron=neuron, mpbn="none")
    assert model.T == 1 and model.mpbn is None
    x = image_for(model)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    outputs = []
    for module in model.modules():
        if type(module).__name__ in ("ReLU", "Sign"):
            module.register_forward_hook(lambda _module, inputs, out: outputs.append((inputs[0], out)))
    features = model.forward_sequence(x)
    assert features.shape[0] == 1 and len(outputs) > 2
    assert all(torch.equal(out, x.relu() if neuron == "relu" else x.sign()) for x, out in outputs)
    with pytest.raises(ValueError, match=rf"T=2 with neuron='{neuron}'.*Use T=1"):
        spikezoo.create_model(name, neuron=neuron, mpbn="none", T=2)


@pytest.mark.parametrize("neuron", ["if", "plif"])
@pytest.mark.parametrize("name", MICRO)
def test_other_neurons(name, neuron):
    model = make(name, neuron=neuron, T=2)
    x = image_for(model)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    learned = [n for n, _ in model.named_parameters() if n.endswith("neuron.w")]
    assert bool(learned) == (neuron == "plif") and set(learned) <= model.no_weight_decay()
    lif = make(name, neuron="lif", T=2).eval()
    assert not torch.equal(model.eval()(x), lif(x))


@pytest.mark.parametrize("name", MICRO)
def test_membrane_norm_switch(name):
    base = count(spikezoo.create_model(name, mpbn="none"))
    assert count(spikezoo.create_model(name, mpbn=False)) == base
    model = make(name, mpbn="channel", T=2)
    neurons = {n: m for n, m in model.named_modules() if isinstance(m, SpikingNeuron)}
    channels = sum(m.norm.weight.numel() for m in neurons.values())
    assert count(model) == base + 2 * channels
    model = make(name, mpbn="element", T=2)
    sizes = {}
    neurons = {n: m for n, m in model.named_modules() if isinstance(m, SpikingNeuron)}
    for n, m in neurons.items():
        m.register_forward_hook(lambda _module, _inputs, out, n=n: sizes.update({n: tuple(out.shape[2:])}))
    x = image_for(model)
    model(x)
    # One scale and shift a neuron of the layer: as many as there are neurons.
    assert {n: tuple(m.norm.weight.shape) for n, m in neurons.items()} == sizes
    if not model.fixed_img_size:
        with pytest.raises(ValueError, match="mpbn='element' was built for feature maps"):
            model(image(size=16))


SMALL_RESNET = {"widths": (8, 12), "depths": (1, 1), "strides": (1, 2)}  # one block of each kind


# A net of two layers for the whole compiler, which calls g++ for every kernel; the graph of larger ones.
@pytest.mark.parametrize(
    ("name", "arguments", "backend"),
    [
        ("test_mpbn_vgg", {"widths": ((4,), (4,))}, "inductor"),
        ("test_mpbn_resnet", SMALL_RESNET, "eager"),
        ("test_autost", {"depth": 1, "mlp_ratios": 1, "heads": 2}, "eager"),
    ],
)
# What inductor and dynamo deprecate of torch's own.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
def test_compile(name, arguments, backend):
    model = make(name, T=2, **arguments)
    twin = copy.deepcopy(model)
    x = image_for(model)
    expected = model(x)
    expected.square().sum().backward()
    out = torch.compile(twin, fullgraph=True, backend=backend)(x)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
def test_export():
    model = make("test_mpbn_resnet", T=2, **SMALL_RESNET).eval()
    x = image_for(model)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-6)
        torch.testing.assert_close(program.module()(x[:1]), model(x[:1]), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------
# Recorded outputs
# --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def recorded(name):
    """Logits, and the firing rates of every layer and step, which show what a few output spikes would hide."""
    model = make(name, T=2, dtype=torch.float64).eval()
    x = image_for(model, dtype=torch.float64)
    rates = {layer: [round(rate, 7) for rate in steps.tolist()] for layer, steps in firing_rates(model, x).items()}
    return {"logits": model(x).tolist(), "rates": dict(sorted(rates.items()))}


@pytest.mark.parametrize("name", MICRO)
def test_recorded_outputs(name):
    # Any change of layout, order of operations or neuron constants shows here, before weights stop loading right.
    again = f"If the change is meant, run `{RECORD_COMMAND}` and say why in the commit."
    record = json.loads(RECORD.read_text())
    assert name in record, f"No recorded output of {name}. {again}"
    found, expected = recorded(name), record[name]
    assert list(found["rates"]) == list(expected["rates"]), f"{name} has other spiking layers than recorded. {again}"
    for layer, steps in found["rates"].items():
        # One spike more or less is at least 1e-5 in the largest of these layers.
        assert steps == pytest.approx(expected["rates"][layer], abs=1e-6), f"{name}: {layer} fires differently. {again}"
    logits, wanted = (torch.tensor(values["logits"], dtype=torch.float64) for values in (found, expected))
    assert logits.shape == wanted.shape, (
        f"{name} gives logits {tuple(logits.shape)}, not {tuple(wanted.shape)}. {again}"
    )
    difference = (logits - wanted).abs().max()
    assert difference < 1e-9, f"{name} gives other logits than recorded, by up to {difference:.3g}. {again}"


def test_recorded_outputs_has_no_leftovers():
    assert sorted(json.loads(RECORD.read_text())) == MICRO


# --------------------------------------------------------------------------------------------------------------
# Bad input: every message says what was expected and what to do
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 32, 32), r"expected images \[B, C, H, W\] or event frames .*x.unsqueeze\(0\)"),
        ((2, 1, 32, 32), r"has 1 channels and the model was created for 3: create it with in_chans=1"),
        ((2, 4, 2, 32, 32), r"has 2 channels .* create it with in_chans=2"),
        ((0, 3, 32, 32), r"is empty: expected a batch of at least one sample"),
        ((2, 0, 3, 32, 32), r"is empty"),
    ],
)
def test_bad_input(name, shape, message):
    model = spikezoo.create_model(name)
    for forward in (model, model.forward_steps, model.forward_intermediates):
        with pytest.raises(ValueError, match=message):
            forward(torch.zeros(shape))


@pytest.mark.parametrize("name", [n for n in MICRO if n not in TIED])
def test_image_too_small(name):
    model = spikezoo.create_model(name).eval()
    small = model.min_img_size - 1
    with pytest.raises(ValueError, match=rf"total stride {small + 1} of this net: give images|patch, {small + 1}x"):
        model(torch.zeros(1, 3, 32, small))
    assert model(torch.zeros(1, 3, small + 1, small + 1)).isfinite().all()


def test_fixed_image_size():
    model = spikezoo.create_model(PLAIN_VGG)
    with pytest.raises(ValueError, match=r"Input of 40x40 pixels.* built for 32x32: create it with img_size=40\."):
        model(torch.zeros(1, 3, 40, 40))
    with pytest.raises(ValueError, match=r"create it with img_size=40 \(or \(40, 48\)\)"):
        model(torch.zeros(1, 3, 40, 48))


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T": 0}, r"T=0: expected an integer >= 1\. T is the number of time steps"),
        ({"T": -1}, r"T=-1: expected an integer >= 1"),
        ({"T": 2.5}, r"T=2\.5: expected an integer >= 1"),
        ({"T": True}, r"T=True: expected an integer"),
        ({"num_classes": -1}, r"num_classes=-1: expected an integer >= 0"),
        ({"in_chans": 0}, r"in_chans=0: expected an integer >= 1"),
        ({"img_size": (32, 32, 32)}, r"expected one number or \(height, width\)"),
        ({"neuron": "relu", "mpbn": "channel"}, r"mpbn='channel' normalises a membrane potential .*mpbn='none'"),
        ({"mpbn": "chanel"}, r"mpbn='chanel' does not exist\. Did you mean 'channel'"),
        ({"neuron": "liff"}, r"neuron='liff' does not exist\. Did you mean 'lif'"),
        ({"surrogate": "sigmoyd"}, r"Did you mean 'sigmoid'"),
        ({"threshold": 0.0}, r"threshold=0\.0: expected a positive number"),
        ({"decay": 0.5, "tau": 2.0}, r"both given"),
        ({"dtype": "float16"}, r"dtype='float16': expected a type of torch such as torch\.float16"),
        ({"device": "gpu"}, r"device='gpu': Expected one of cpu"),
        ({"features_only": True, "out_indices": (0, 9)}, r"indices=\(0, 9\)|feature levels"),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        spikezoo.create_model(name, **arguments)


@pytest.mark.parametrize("name", [n for n in MICRO if n != MLP])
def test_size_below_the_stride(name):
    with pytest.raises(ValueError, match=r"img_size=\(2, 2\) is smaller than the total stride|2x2 pixels is not div"):
        spikezoo.create_model(name, img_size=2)


def test_reset_classifier_rejects_nonsense():
    model = spikezoo.create_model("test_mpbn_vgg")
    with pytest.raises(ValueError, match="num_classes=-1: expected an integer >= 0"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="global_pool='' with num_classes=5"):
        model.reset_classifier(5, "")
    assert model.num_classes == 10 and model(image_for(model)).shape == (2, 10)


@pytest.mark.parametrize("value", ["tdbn", 3, None])
def test_a_switch_is_true_or_false(value):
    if value is not None:  # None leaves an argument out
        with pytest.raises(ValueError, match=f"norm={value!r}: expected True or False"):
            spikezoo.create_model("test_spiking_vgg", norm=value)
    assert spikezoo.create_model("test_spiking_vgg", norm=None)


def test_inputs_that_are_no_tensors():
    model = spikezoo.create_model("test_mpbn_vgg")
    for x in (torch.zeros(1, 3, 32, 32).numpy(), [1.0], None):
        with pytest.raises(ValueError, match=rf"Input is a {type(x).__name__}: expected a tensor"):
            model(x)


def test_pixels_as_integers():
    model = spikezoo.create_model("test_mpbn_vgg")
    with pytest.raises(ValueError, match=r"Input of type torch.uint8: .*x.float\(\) / 255"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(f"Usage: {RECORD_COMMAND}")
    RECORD.write_text(json.dumps({name: recorded(name) for name in MICRO}, indent=1) + "\n")
    print(f"Wrote {RECORD}: {', '.join(MICRO)}")
