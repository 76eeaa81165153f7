"""Tests of the norms of other papers, tdBN and TEBN: against SpikingJelly's and by hand, folded, counted, stored."""

import warnings

import pytest
import torch
from test_models import image_for, make, wave
from torch import nn

import spikezoo
from spikezoo.layers import ConvNormNeuron, StepScale
from spikezoo.transforms.compact import compact

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it deprecates of its own
    from spikingjelly.activation_based import layer

FAMILIES = ["test_spiking_resnet", "test_sew_resnet", "test_ms_resnet"]
SMALL = {"depths": (1, 1, 1), "img_size": 8}


def layers(model):
    return [m for m in model.modules() if isinstance(m, ConvNormNeuron) and isinstance(m.norm, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", FAMILIES)
def test_tdbn_starts_from_the_threshold(name):
    model = spikezoo.create_model(name, norm="tdbn", threshold=0.8, **SMALL)
    plain = spikezoo.create_model(name, norm="bn", threshold=0.8, **SMALL)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for path, module in model.named_modules():
        if isinstance(module, ConvNormNeuron):
            alpha = 1.0
            if name == "test_spiking_resnet" and path.endswith(("conv2", "shortcut")):
                alpha = 2**-0.5  # two of them meet before a neuron
            if name == "test_ms_resnet" and path.endswith("conv2"):
                alpha = 0.0  # the authors' own start of a block
            assert torch.equal(module.norm.weight, torch.full_like(module.norm.weight, alpha * 0.8))
            assert not module.norm.bias.any()
    for module in layers(plain):
        assert {*module.norm.weight.tolist()} <= {0.0, 1.0}


@torch.no_grad()
def test_norms_of_the_papers_are_spikingjellys():
    # Statistics over time and batch together, then alpha * threshold, or a factor of every step.
    x = 3 * wave((3, 2, 4, 5, 5), 2) + wave((3, 1, 4, 1, 1), 5)
    mean, var = x.mean((0, 1, 3, 4), keepdim=True), x.var((0, 1, 3, 4), keepdim=True, unbiased=False)
    by_hand = (x - mean) / (var + 1e-5).sqrt()
    theirs = layer.ThresholdDependentBatchNorm2d(2**-0.5, 0.8, 4).double()
    for ours, other, factor in (
        (spikezoo.create_model("test_spiking_resnet", T=3, norm="tdbn", threshold=0.8), theirs, 0.8 * 2**-0.5),
        (
            spikezoo.create_model("test_spiking_resnet", T=3, norm="tebn"),
            layer.TemporalEffectiveBatchNorm2d(3, 4).double(),
            torch.tensor([0.5, 2.0, -1.0]).view(3, 1, 1, 1, 1),
        ),
    ):
        part = ours.stages[0][0].conv2.double()
        start = part.norm.weight[0].item()
        part.conv, part.norm = nn.Identity(), nn.BatchNorm2d(4).double()  # the layer's own order, on four channels
        nn.init.constant_(part.norm.weight, start)
        if part.steps is not None:
            part.steps.weight.copy_(factor.flatten())
            other.scale.copy_(factor.flatten())
        for mode in (True, False):
            torch.testing.assert_close(part.train(mode)(x), other.train(mode)(x))
        torch.testing.assert_close(part.train()(x), by_hand * factor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_tebn_folds_but_for_its_factors(name):
    model = make(name, norm="tebn", T=3, **SMALL).double().eval()
    x = image_for(model, 3).double()
    logits = model(x)
    torch.testing.assert_close(model(x[1:2]), logits[1:2], rtol=0, atol=1e-9)
    assert (logits[0] - logits[1]).abs().max() > 1e-6
    first = model.stem[0]
    if first.neuron is not None:  # the image passes the convolution once, each step has its own factor
        current = first.norm(first.conv(x))
        v, spikes, c = 0, [], first.neuron.config
        for factor in first.steps.weight:
            v = v + factor * current if c.kind == "if" else c.decay * v + factor * current
            spikes.append((v >= c.threshold if c.firing == ">=" else v > c.threshold).double())
            v = v * (1 - spikes[-1])
        assert torch.equal(first(x[None], 3), torch.stack(spikes)) and torch.stack(spikes).any()
    folded = spikezoo.fold_bn(model)
    assert not layers(folded) and len([m for m in folded.modules() if isinstance(m, StepScale)]) == len(layers(model))
    torch.testing.assert_close(folded(x), logits, rtol=0, atol=1e-9)
    counted, plain = (spikezoo.count(m, x) for m in (model, make(name, T=3, **SMALL).double().eval()))
    assert counted.uncounted == {} and counted.macs == plain.macs and counted.macs_exact == plain.macs_exact


def test_tebn_stored_and_its_steps(tmp_path):
    model = make("test_sew_resnet", norm="tebn", T=2, **SMALL).eval()
    x = image_for(model)
    spikezoo.save_checkpoint(model, tmp_path / "net")
    again = spikezoo.create_model(f"local-dir:{tmp_path}/net", pretrained=True)
    assert torch.equal(again.eval()(x), model(x))
    steps = [m for m in model.modules() if isinstance(m, StepScale)]
    before = sum(p.numel() for p in make("test_sew_resnet", T=2, **SMALL).parameters())
    assert sum(p.numel() for p in model.parameters()) == before + 2 * len(steps)
    with pytest.raises(ValueError, match=r"Input of 5 time steps, and norm='tebn' has learned .* each of T=2: .*T=5"):
        model(x[:, None].expand(-1, 5, -1, -1, -1))
    with pytest.raises(ValueError, match=r"norm='tbn'.*Did you mean 'te?d?bn'"):
        spikezoo.create_model("test_sew_resnet", norm="tbn")


@torch.no_grad()
def test_tebn_deployed_over_many_steps_and_compacted(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _name: None)
    model = make("test_spiking_resnet", norm="tebn", T=10, **SMALL).eval()
    x = image_for(model)
    assert torch.equal(spikezoo.deploy(model, "exact")(x), model(x))
    neuron = model.stages[1][0].conv1.neuron
    neuron.mask = torch.arange(12) != 3
    smaller = compact(model)
    assert smaller.stages[1][0].conv1.conv.out_channels == 11
    torch.testing.assert_close(smaller(x), model(x), rtol=0, atol=1e-5)
