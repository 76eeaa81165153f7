"""Tests of spikes in bits: the model's spikes, whatever the geometry, the way of computing and the processor's path."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from spikezoo.checkpoint.sparse import round_to_levels
from spikezoo.deploy import deploy
from spikezoo.deploy.bits import Dense, Spikes, Summand
from spikezoo.deploy.int8 import EightBit, _is_summed_rightly
from spikezoo.deploy.kernel import PATHS, instructions, pack, unpack
from spikezoo.deploy.norms import ExactNorm
from spikezoo.layers import over_time, set_ternary
from spikezoo.neurons import LIF, NeuronConfig
from tests.test_deploy import create, rounded

kernels = sys.modules["spikezoo.deploy.kernel"]  # spikezoo.deploy is a function, too
HERE = list(PATHS)[: list(PATHS).index(instructions()) + 1]
WAYS = ("bytes", "words", "rows", "dense")


@pytest.fixture(params=HERE)
def path(request, monkeypatch):
    """The kernel's path for a kind of processor, of those that this one runs."""
    monkeypatch.setenv("SPIKEZOO_BITS", request.param)
    return request.param


@pytest.fixture
def eager(monkeypatch):
    """Nets of which a part is left to a compiler, whose minutes these tests need not wait for."""
    monkeypatch.setattr("torch.compile", lambda function, **_: function)


def ways(model):
    """Let all layers of a model compute in one way after the other, where they can."""
    layers = [summand for module in model.modules() if isinstance(module, Spikes) for summand in module.summands]
    for way in WAYS:
        for summand in layers:
            if way in summand.methods:
                summand.choose(way)
        yield way


def test_bits_by_hand(path):
    x = torch.zeros(1, 2, 9, 1, 3)  # [T, B, C, H, W]
    x[0, 0, [0, 3, 8], 0, 0] = x[0, 1, 7, 0, 2] = 1
    bits = pack(x)
    assert bits.shape == (1, 2, 1, 3, 2) and bits.flatten().tolist() == [9, 0, 0, 0, 0, 128, 1, *[0] * 5]
    assert torch.equal(unpack(bits, 9).float(), x)


GEOMETRIES = [  # channels, outputs, kernel, stride, padding, dilation, size
    (1, 1, 3, 1, 1, 1, (1, 1)),
    (9, 17, 3, 1, 1, 1, (5, 7)),
    (70, 66, 3, 2, 1, 1, (7, 4)),
    (300, 5, 1, 2, 0, 1, (5, 5)),  # more spikes at a place than 16 bits hold the weights of
    (13, 8, 5, 3, 2, 1, (11, 9)),
    (6, 3, 3, 1, 2, 2, (6, 6)),
    (4, 9, 2, 1, 0, 1, (4, 5)),
    (8, 8, (1, 3), (1, 2), (0, 1), 1, (3, 8)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("ticket", [True, False])
def test_every_way_gives_the_layers_spikes(path, geometry, ticket):
    channels, outputs, *sides, size = geometry
    torch.manual_seed(channels)
    for batch, T, density in ((1, 1, 0.5), (3, 4, 0.9), (17, 2, 0.1)):
        conv = nn.Conv2d(channels, outputs, *sides, bias=not ticket)
        norm = nn.BatchNorm2d(outputs).eval()
        with torch.no_grad():
            norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.02, 0.1)
            conv.weight.copy_(conv.weight.sign() * 0.07 if ticket else round_to_levels(conv.weight))
            conv.weight.mul_(torch.rand(conv.weight.shape).gt(0.3))
        set_ternary(conv, ticket)
        neuron = LIF(NeuronConfig(decay=0.8, threshold=0.3))
        neuron.shape = (outputs, 1, 1)
        x = (torch.rand(T, batch, channels, *size) < density).float()
        with torch.no_grad():
            wanted = neuron(over_time(lambda x, conv=conv, norm=norm: norm(conv(x)), x))
        layer = Spikes(neuron, Summand(Dense(EightBit(conv, 1), None, channels), ExactNorm(norm), ()))
        assert layer.summands[0].methods == [way for way in WAYS if ticket or way != "bytes"]
        for way in ways(layer):
            layer.tuned = True
            assert torch.equal(unpack(layer(pack(x)), outputs).float(), wanted), (way, batch)


POOLS = [((2, 2, 0), (8, 6)), ((3, 2, 1), (7, 9)), ((2, 2, 1), (5, 5)), ((3, 3, 0), (9, 7)), ((3, 1, 1), (4, 4))]


@pytest.mark.parametrize(("pool", "size"), POOLS)
@pytest.mark.parametrize("batch", [1, 3])
def test_maxima_of_sums_before_the_norm(path, pool, size, batch):
    torch.manual_seed(batch)
    conv, norm = nn.Conv2d(9, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10).eval()
    with torch.no_grad():
        conv.weight.copy_(round_to_levels(conv.weight))
        norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.02, 0.1)
    neuron, most = LIF(NeuronConfig(decay=0.8, threshold=0.8)), nn.MaxPool2d(*pool)
    neuron.shape = (10, 1, 1)
    x = (torch.rand(3, batch, 9, *size) < 0.4).float()
    with torch.no_grad():
        wanted = neuron(over_time(lambda x: norm(most(conv(x))), x))
    layer = Spikes(neuron, Summand(Dense(EightBit(conv, 1), most, 9), ExactNorm(norm), ()))
    assert layer.summands[0].methods == ["words", "rows", "dense"] and 0 < wanted.mean() < 1
    for way in ways(layer):
        layer.tuned = True
        assert torch.equal(unpack(layer(pack(x)), 10).float(), wanted), way


NETS = [
    ("test_spiking_vgg", {"img_size": 16}, 5),
    ("test_spiking_vgg", {"img_size": (8, 16), "neuron": "plif", "v_reset": -0.1, "threshold": 0.6}, 5),
    ("test_spiking_vgg", {"img_size": 8, "tau": 1.7, "threshold": 0.4, "v_init": 0.1}, 5),
    ("test_spiking_resnet", {"img_size": 13}, 4),
    ("test_mpbn_resnet", {"img_size": 16, "mpbn": "element", "neuron": "if", "reset": "soft"}, 5),
    ("test_mpbn_resnet", {"img_size": 14}, 4),  # its second pooling has windows of three sizes
    ("test_mpbn_vgg", {"img_size": 16}, 2),
    ("test_spikformer", {"img_size": 16, "threshold": 0.3}, 6),
    ("test_spiking_vgg", {"img_size": 8, "encoding": "poisson"}, 5),
]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("name", "arguments", "parts"), NETS)
@pytest.mark.parametrize("ticket", [True, False])
def test_nets_fire_the_models_spikes(path, name, arguments, parts, ticket):
    if path != HERE[-1] and (ticket or "resnet" not in name):
        pytest.skip("the geometries of these are those of the layers above")
    size = arguments["img_size"]
    model = create(name, ticket=ticket, **arguments)
    model = model if ticket else rounded(model)
    images = torch.rand(3, 3, *(size if isinstance(size, tuple) else (size, size)))
    fast = deploy(model, "bits", example=images)
    assert fast.precision == "bits" and f"{parts} of " in fast.notes[-2] and "layers on bits: " in fast.notes[-1]
    for x in (images, images[:1]):
        with torch.no_grad():
            wanted, eight = model(x), deploy(model, "int8")(x)
        assert wanted.std() > 0 or len(x) == 1
        assert torch.equal(fast(x), eight), fast.notes
        assert not ticket or torch.equal(eight, wanted)
        for way in ways(fast):
            assert torch.equal(fast(x), eight), way


@pytest.mark.usefixtures("eager")
def test_silent_neurons_stay_silent_and_sequences_are_long():
    model = rounded(create("test_spiking_resnet", T=11, img_size=8))
    for module in model.modules():
        if isinstance(module, LIF) and len(module.shape) == 3:
            module.mask = torch.rand(module.shape[:1] if module.shape[1] > 4 else module.shape) > 0.4
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = model(x)
    assert wanted.std() > 0 and torch.equal(deploy(model, "bits")(x), wanted)


def test_nets_all_in_bits_need_no_compiler_but_the_kernels(monkeypatch):
    monkeypatch.setattr("torch.compile", lambda *_, **__: pytest.fail("compiled"))
    fast, x = deploy(create("test_spiking_vgg", ticket=True, img_size=8), "bits"), torch.randn(2, 3, 8, 8)
    assert not fast.compiled and "5 of 5 parts hand on bits" in fast.notes[-1]
    assert torch.equal(fast(x), fast(x))


@pytest.mark.usefixtures("eager")
def test_without_a_compiler_int8_stays(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("shutil.which", lambda _name: None)
    monkeypatch.setattr(kernels, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(kernels, "loaded", kernels.loaded.__wrapped__)
    fast = deploy(create("test_spiking_vgg", img_size=8), "bits")
    assert fast.precision == "int8" and "int8 in place of bits: " in fast.notes[-1]
    assert "need a C++ compiler and none was found: install g++, or set CXX." in caplog.text


def test_a_damaged_kernel_is_compiled_anew(monkeypatch, tmp_path):
    asked = tmp_path / "asked"
    fake = tmp_path / "g++"  # writes what stands behind -o
    fake.write_text(f'#!/bin/sh\necho x >> {asked}\nwhile [ "$1" != -o ]; do shift; done\necho kernel > "$2"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setattr(kernels, "cache_dir", lambda: str(tmp_path))
    file = kernels.library("plain")
    assert kernels.library("plain") == file and asked.read_text() == "x\n" and file.read_text() == "kernel\n"
    file.write_text("kernek\n")
    assert kernels.library("plain") == file and asked.read_text() == "x\nx\n" and file.read_text() == "kernel\n"


def test_who_follows_operations_sees_the_kernel():
    fast, x = deploy(create("test_spiking_vgg", ticket=True, img_size=8), "bits"), torch.rand(2, 3, 8, 8)
    fast(x)

    def run(x):
        return fast.model.forward_sequence(x)

    wanted, other = run(x), run(x.flip(0))
    assert not torch.equal(wanted, other)
    traced = make_fx(run)(x)
    assert torch.equal(traced(x), wanted) and torch.equal(traced(x.flip(0)), other)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert run(mode.from_tensor(x)).shape == wanted.shape


def test_shapes_are_timed_while_others_compute():
    model, images = create("test_spiking_vgg", ticket=True, img_size=8), torch.rand(12, 3, 8, 8)
    alone, fast = deploy(model, "bits"), deploy(model, "bits")
    wanted = [alone(images[: 1 + count]) for count in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda count: fast(images[: 1 + count]), [*range(12)] * 4))
    assert all(map(torch.equal, found, wanted * 4))


def test_geometries_that_onednn_sums_wrongly_stay_in_float():
    conv = nn.Conv2d(1, 8, (1, 2), stride=(1, 2))
    assert not _is_summed_rightly(conv) and _is_summed_rightly(nn.Conv2d(2, 8, (1, 2), stride=(1, 2)))
    assert not _is_summed_rightly(nn.Conv2d(2, 8, 3, padding="same")) and _is_summed_rightly(nn.Linear(1, 1))


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match="keeps spikes as bits and this model has none: use precision='bf16'"):
        deploy(create("test_spiking_vgg", T=None, neuron="relu"), "bits")
    monkeypatch.setenv("SPIKEZOO_BITS", "avx")
    with pytest.raises(ValueError, match="'avx' does not exist"):
        instructions()
