"""A residual net that adds spikes, written outside the package: everything works on it, or says truly why not."""

import logging

import newcomer
import pytest
import torch
import torch.nn.functional as F
from conftest import forget_model
from test_compact import same_answers
from test_convert import settled
from test_export import simulate
from test_models import fill, image_for
from torch import nn

import spikezoo
from spikezoo.checkpoint.sparse import round_to_levels
from spikezoo.deploy import EightBit
from spikezoo.neurons import SpikingNeuron

NAME = "newcomer_net"
LINE = ["stem.0.neuron", "stages.0.0.fire2", "stages.0.1.fire2"]  # added to each other up to the next shortcut


@pytest.fixture(scope="module", autouse=True)
def _registered():
    newcomer.register()
    yield
    forget_model(NAME)


@pytest.fixture(autouse=True)
def _eager(monkeypatch, caplog):
    monkeypatch.setattr("shutil.which", lambda _name: None)
    caplog.set_level(logging.ERROR, "spikezoo")


def made(gain=3, **arguments):
    """The net with every parameter set, all of whose layers fire and whose stream holds 0, 1, 2 and 3."""
    return fill(spikezoo.create_model(NAME, **{"T": 3, **arguments}), gain).eval()


def inputs_of(model, x, kinds=(nn.Conv2d, nn.Linear)):
    """What every layer takes, by name."""
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0]}))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_the_stream_holds_whole_numbers():
    model = made()
    seen = inputs_of(model, image_for(model, 4))["stages.0.1.first.0"]
    assert (
        set(seen.unique().tolist()) >= {0.0, 0.25, 1.0, 1.25, 2.0} and seen.max() <= 2
    )  # averages of four, and spikes
    assert sum(p.numel() for p in model.parameters()) == newcomer.ROWS[NAME].parameters


@torch.no_grad()
def test_counted_by_hand():
    model = made(maximum=True)  # spikes alone on the stream
    x = image_for(model, 2)
    count = spikezoo.count(model, x)
    assert not count.uncounted
    for name in ("stages.0.0.first.0", "stages.0.1.first.0", "stages.1.0.down.0"):
        module, seen = model.get_submodule(name), inputs_of(model, x)[name]
        sops = F.conv2d(seen, (module.weight != 0).to(seen), None, module.stride, module.padding).sum() / 2
        assert count.by_module[name].sops_exact == pytest.approx(sops.item()) and sops > 0
    assert count.by_module["stages.0.1.first.0"].input == "integer spikes"


@torch.no_grad()
def test_folded():
    model = made(mpbn="channel").double()
    x = image_for(model, 3).double()
    folded = spikezoo.fold_bn(spikezoo.fold_mpbn(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-9)
    again = spikezoo.transforms.replay(spikezoo.create_model(NAME, mpbn="channel", T=3), folded.recipe).double().eval()
    again.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(again(x), folded(x))


def test_compacted():
    model = made().double()
    kept = {}
    for index, name in enumerate(("stages.0.0.fire1", "stages.0.1.fire1", "stages.1.0.fire1", "stages.1.1.fire1")):
        neuron = model.get_submodule(name)
        neuron.mask = (torch.arange(neuron.shape[0]) + index) % 3 != 0
        kept[name] = neuron.mask.nonzero().flatten()
    smaller = spikezoo.compact(model)
    same_answers(model, smaller, kept)
    assert smaller.recipe[0][1] == {"widths": {name: len(index) for name, index in kept.items()}, "masks": {}}
    model.get_submodule(LINE[1]).mask = torch.arange(6) != 3
    with pytest.raises(ValueError, match=rf"'{LINE[1]}', channel 3: .* feeds attention heads or a sum"):
        spikezoo.compact(model)


@torch.no_grad()
def test_converted():
    ann = settled(NAME)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    steps = spikezoo.convert(ann, x, T=256, half_threshold=True).forward_steps(x)
    error = {T: (steps[:T].mean(0) - ann(x)).abs().mean().item() for T in (16, 64, 256)}
    assert error[64] < error[16] / 2.5 and error[256] < error[64] / 2.5 and error[256] < 0.05 * ann(x).std()
    # Neurons whose spikes are added have one unit, so the layer between two of them keeps its weights.
    found = {}
    for name in LINE:
        ann.get_submodule(name).register_forward_hook(lambda _m, _x, out, name=name: found.update({name: out.max()}))
    ann(x)
    unit = max(found.values())
    folded, snn = spikezoo.fold_bn(ann), spikezoo.convert(ann, x, T=2)
    torch.testing.assert_close(snn.stem[0].conv.weight, folded.stem[0].conv.weight / unit)
    torch.testing.assert_close(snn.stages[0][1].second[0].bias, folded.stages[0][1].second[0].bias / unit)
    with pytest.raises(ValueError, match=r"'stem\.1': a max-pool"):
        spikezoo.convert(settled(NAME, maximum=True), x, T=2)


@pytest.mark.parametrize("maximum", [False, True])
@torch.no_grad()
def test_deployed(maximum):
    model = made(maximum=maximum)
    x = image_for(model, 16)
    exact = spikezoo.deploy(model, "exact")
    assert torch.equal(exact.model.forward_sequence(x), model.forward_sequence(x)) and torch.equal(exact(x), model(x))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(round_to_levels(module.weight))
    wanted = model.forward_sequence(x)
    assert wanted.max() == 3 and wanted.std(1).max() > 0
    eight = spikezoo.deploy(model, "int8", x[:2])
    assert torch.equal(eight.model.forward_sequence(x).float(), wanted)
    # All but the first: whole numbers and quarters of them are bytes.
    assert eight.notes == ["9 of 10 convolutions and linear layers before the head in 8 bits"]
    assert sum(isinstance(module, EightBit) for module in eight.modules()) == 9
    spikes = [module for module in eight.modules() if isinstance(module, SpikingNeuron)]
    assert all(neuron.spike_dtype is torch.uint8 for neuron in spikes)
    small = spikezoo.deploy(model, "bf16")
    assert small.notes == ["9 of 10 convolutions and linear layers before the head in bfloat16, 9 with exact weights"]
    same = torch.isclose(small.model.forward_sequence(x).float(), wanted).float().mean()
    assert same > 0.95


def test_baked_tickets_in_eight_bits():
    model = spikezoo.bake(spikezoo.apply(made(T=2), "ticket", kind="mpslt", sparsity=0.4)).eval()
    x = image_for(model, 8)
    with torch.no_grad():
        assert torch.equal(spikezoo.deploy(model, "int8")(x), model(x)) and model(x).std(0).max() > 0


@torch.no_grad()
def test_as_nir(tmp_path):
    nir = pytest.importorskip("nir")
    model = made()
    graph = nir.read(spikezoo.export(model, tmp_path / "net.nir"))
    x = image_for(model)
    found = simulate(graph, x.unsqueeze(0).expand(3, *x.shape).double())
    torch.testing.assert_close(found["output"].mean(0), model.double()(x.double()), rtol=0, atol=1e-4)
    # The first layer of the second block takes the spikes of both neurons before it.
    sources = {source for source, target in graph.edges if target == "stages.0.1.first.0"}
    assert sources == {"stem.1", "stages.0.0.fire2"}
    with pytest.raises(ValueError, match=r"'stem\.1': NIR has no max-pooling"):
        spikezoo.export(made(maximum=True), tmp_path / "other.nir")


@torch.no_grad()
def test_as_onnx_and_stored(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = made(T=1)
    x = image_for(model, 3)
    session = runtime.InferenceSession(spikezoo.export(model, tmp_path / "net.onnx", x))
    logits = torch.from_numpy(session.run(None, {"input": x[:2].numpy()})[0])
    torch.testing.assert_close(logits, model(x[:2]), rtol=0, atol=1e-4)
    spikezoo.save_checkpoint(model, tmp_path / "folder")
    assert torch.equal(spikezoo.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()(x), model(x))
