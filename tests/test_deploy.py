"""Tests of spikezoo.deploy: the same spikes in every precision that promises them, whatever the net."""

import copy
import io
import logging
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spikezoo
from spikezoo import deploy as _deploy_function
from spikezoo.checkpoint.sparse import round_to_levels
from spikezoo.deploy import EightBit, ExactNorm, deploy
from spikezoo.deploy.bits import Summand
from spikezoo.layers import ConvNormNeuron, TernaryConv2d
from spikezoo.neurons import MembraneNorm
from spikezoo.observe import firing_rates

package = sys.modules["spikezoo.deploy.package"]  # spikezoo.deploy is a function, too

TICKET = {"kind": "mpslt", "sparsity": 0.4}


SMALL_RESNET = {"widths": (8, 12), "depths": (1, 1), "strides": (1, 2)}  # one block of each kind


def create(name, T=3, ticket=False, seed=0, **arguments):
    """A net with every parameter and statistic at random, whose layers all fire."""
    torch.manual_seed(seed)
    model = spikezoo.create_model(name, T=T, **({"ticket": TICKET} if ticket else {}), **arguments)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MembraneNorm | nn.BatchNorm2d | nn.BatchNorm1d):
                module.running_mean.normal_(-0.3, 0.2)
                module.running_var.uniform_(0.1, 1.0)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0.2, 0.2)
                    if isinstance(module, MembraneNorm):
                        module.weight[::3] *= -1
    return (spikezoo.bake(model) if ticket else model).eval()


@pytest.fixture
def eager(monkeypatch, caplog):
    """Without a compiler, whose minutes these tests need not wait for."""
    monkeypatch.setattr("shutil.which", lambda _name: None)
    caplog.set_level(logging.ERROR, "spikezoo")


NETS = [
    ("test_spiking_vgg", {}),
    ("test_mpbn_vgg", {}),
    ("test_spiking_resnet", {}),
    ("test_mpbn_resnet", {}),
    ("test_mpbn_resnet", {"mpbn": "element", "neuron": "plif"}),
    ("test_mpbn_vgg", {"neuron": "if", "reset": "soft"}),
    ("test_spiking_resnet", {"T": 1}),
]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("ticket", [False, True])
@pytest.mark.parametrize(("name", "arguments"), NETS)
def test_spikes_are_the_models(name, arguments, ticket):
    model, x = create(name, ticket=ticket, **arguments), torch.randn(3, 3, 32, 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        wanted, spikes = model(x), model.forward_sequence(x)
    assert all(rate.sum() > 0 for rate in firing_rates(model, x).values()) and 0 < spikes.mean() < 0.9
    exact, eight = deploy(model, "exact"), deploy(model, "int8", example=x)
    assert torch.equal(exact(x), wanted) and torch.equal(exact.model.forward_sequence(x), spikes)
    layers = [module for module in eight.modules() if isinstance(module, EightBit)]
    # Left in float32: the first layer, which sees the image, and a linear layer on averages.
    convs = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) - 1
    assert len(layers) == convs - (2 if name == "test_spiking_resnet" else 1)
    assert f"{len(layers)} of " in eight.notes[-1]
    assert not ticket or torch.equal(eight(x), wanted)
    assert not model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def rounded(model):
    """The same net with weights of 255 levels a channel, as checkpoints store them."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if type(module) in (nn.Conv2d, nn.Linear):
                module.weight.copy_(round_to_levels(module.weight))
    return model


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("name", "arguments"), NETS)
def test_int8_of_rounded_weights_is_the_model(name, arguments):
    model, x = create(name, **arguments), torch.randn(64, 3, 32, 32)
    grid = rounded(model)
    with torch.no_grad():
        wanted, spikes = grid(x), grid.forward_sequence(x)
        assert not torch.equal(spikes, model.forward_sequence(x))  # the rounding does move spikes
    assert 0 < spikes.mean() < 0.9
    torch.testing.assert_close(deploy(grid, "int8")(x), wanted, rtol=0, atol=0)
    # What int8 does to a net is this rounding and nothing else.
    torch.testing.assert_close(deploy(model, "int8").model.forward_sequence(x).float(), int8_of(model, x))


def int8_of(model, x):
    """Features of a net whose layers on spikes, those that int8 has in eight bits, are rounded."""
    eight = {name for name, m in deploy(model, "int8").model.named_modules() if isinstance(m, EightBit)}
    eight = {name.replace(".module.", ".") for name in eight}
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name in eight:
                module.weight.copy_(round_to_levels(module.weight))
        return model.forward_sequence(x)


# One time step, and every layer decides by itself: no sum is rounded where that matters.
ONE_STEP = [
    ("test_spiking_vgg", {}),
    ("test_mpbn_vgg", {}),
    ("test_spiking_vgg", {"tau": 2.0, "threshold": 0.4}),
    ("test_spiking_vgg", {"neuron": "plif", "v_reset": -0.1, "threshold": 0.6}),
    ("test_spiking_vgg", {"neuron": "sign", "T": None}),
    ("test_spikformer", {"threshold": 0.3, "attention_threshold": 0.2}),
]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("name", "arguments", "ticket"),
    [*((*row, False) for row in ONE_STEP), *((*row, True) for row in ONE_STEP[:4])],
)
def test_bfloat16_of_rounded_weights_is_the_model_at_one_step(name, arguments, ticket):
    model, x = create(name, ticket=ticket, **{"T": 1, **arguments}), torch.randn(64, 3, 32, 32)
    grid = model if ticket else rounded(model)
    with torch.no_grad():
        wanted = grid(x)
    assert wanted.std(0).max() > 0 and all(rate > 0 for rate in firing_rates(grid, x).values())
    torch.testing.assert_close(deploy(grid, "bf16")(x), wanted, rtol=1e-6, atol=1e-6)
    if not ticket:  # a rounding that this test would see
        plain = deploy(model, "bf16")
        assert ", 0 with exact weights" in plain.notes[-1] and not torch.allclose(
            plain(x), model(x), rtol=1e-6, atol=1e-6
        )


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("name", "arguments"), [*NETS, ("test_spikformer", {"residual": "membrane"})])
def test_bfloat16_moves_few_spikes(name, arguments):
    model, x = create(name, **arguments), torch.randn(16, 3, 32, 32)
    grid = rounded(model)
    same = []
    for net in (model, grid):
        fast = deploy(net, "bf16")
        with torch.no_grad():
            wanted = net.forward_sequence(x)
            found = fast.model.forward_sequence(x).float()
        assert 0 < wanted.mean() < 0.9 or "residual" in arguments
        same.append(torch.isclose(wanted, found, rtol=0.02, atol=0.02).float().mean())
    assert same[0] > 0.8 and same[1] > max(same[0] - 0.02, 0.93), same


@pytest.mark.usefixtures("eager")
def test_bfloat16_with_one_odd_threshold_a_channel():
    model, x = rounded(create("test_mpbn_vgg", mpbn="element", T=1)), torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MembraneNorm):
                module.weight.flatten(1)[:, 3] = 1e-6  # fires at huge potentials only
        wanted = model.forward_sequence(x)
        found = deploy(model, "bf16").model.forward_sequence(x)
    assert (found != wanted).float().mean() < 0.02 and 0.05 < wanted.mean() < 0.95


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "norm", nn.GroupNorm(1, block.conv.out_channels)),
        lambda block: setattr(block, "norm", nn.Sequential(block.norm)),
        lambda block: setattr(block.norm, "running_mean", None) or setattr(block.norm, "running_var", None),
        lambda block: setattr(block, "pool", nn.AvgPool2d(3, 2, 1)),
        lambda block: setattr(block, "pool", nn.AvgPool2d(2, divisor_override=1)),
        lambda block: setattr(block, "pool", nn.LPPool2d(1, 2)),
    ],
)
def test_bfloat16_of_other_norms_and_poolings(change):
    model, x = rounded(create("test_spiking_vgg", T=1, global_pool="avg")), torch.randn(16, 3, 32, 32)
    blocks = [m for m in model.modules() if isinstance(m, ConvNormNeuron) and m.pool is not None]
    change(blocks[-1])
    with torch.no_grad():
        wanted = model(x)
    fast = deploy(model, "bf16")
    assert wanted.std(0).max() > 0 and "3 of 5 " in fast.notes[-1], fast.notes
    torch.testing.assert_close(fast(x), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_examples_of_any_float(precision):
    model, x = create("test_spiking_vgg"), torch.randn(2, 3, 32, 32)
    wanted = deploy(model, precision)(x)
    assert torch.equal(deploy(model, precision, example=x.double())(x), wanted)
    with pytest.raises(ValueError, match="expected floating-point images"):
        deploy(model, precision, example=x.to(torch.uint8))


@pytest.mark.usefixtures("eager")
def test_bfloat16_keeps_potentials_and_thresholds_in_float32():
    model, x = create("test_mpbn_vgg"), torch.randn(16, 3, 32, 32)
    fast = deploy(model, "bf16")
    convs = [m.weight.dtype for m in fast.model.modules() if isinstance(m, nn.Conv2d)]
    assert convs == [torch.float32, *[torch.bfloat16] * (len(convs) - 1)] and len(convs) > 2
    assert {v.dtype for k, v in fast.model.state_dict().items() if "conv" not in k} == {torch.float32, torch.int64}
    assert fast(x).dtype == torch.float32
    with torch.no_grad():
        stem = fast.model.stem(x.unsqueeze(0), 3)
        assert stem.dtype == torch.bfloat16 and torch.equal(stem.float(), model.stem(x.unsqueeze(0), 3))
        spikes = fast.model.forward_sequence(x) == model.forward_sequence(x)
    assert 0.9 < spikes.float().mean() < 1  # rounding moves some spikes, which is what bf16 is


@pytest.mark.usefixtures("eager")
def test_other_inputs_run_too():
    model = create("test_spiking_vgg", ticket=True)
    for precision in ("exact", "int8"):
        fast = deploy(model, precision, example=torch.randn(2, 3, 32, 32))
        for x in (torch.randn(1, 3, 32, 32), torch.rand(2, 5, 3, 32, 32).round()):
            with torch.no_grad():
                assert torch.equal(fast(x), model(x))
    with pytest.raises(ValueError, match="4 channels"):
        fast(torch.randn(1, 4, 32, 32))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_first_layer_rounds_as_the_models(batch, channels):
    # oneDNN's convolutions of channels-last maps are other ones: of one image, or of one channel.
    model, x = create("test_spiking_vgg", ticket=True, in_chans=channels), torch.randn(batch, channels, 32, 32)
    stem, seen = deploy(model, "int8").model.stem[0].module, []
    stem.norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        stem(x[None], 3)
        wanted = model.stem[0].conv(x)
        wanted = wanted if model.stem[0].pool is None else model.stem[0].pool(wanted)
    assert torch.equal(seen[0], wanted)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_autocast_around_a_deployed_model_changes_nothing(precision):
    model, x = create("test_spiking_resnet"), torch.randn(2, 3, 32, 32)
    fast = deploy(model, precision)
    wanted = fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), wanted) and wanted.dtype == torch.float32


def saved_by_torch(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved_by_torch])
def test_copies_compute_with_their_own_weights(copied, monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr("torch.compile", lambda function, **_: compiler(function, backend="eager"))
    net = create("test_spiking_resnet", **SMALL_RESNET)
    fast, x = deploy(net, "int8"), torch.randn(2, 3, 32, 32)
    wanted = fast(x)
    twin = copied(fast)
    assert twin.compiled and torch.equal(twin(x), wanted)
    with torch.no_grad():
        for module in twin.model.stages.modules():
            if isinstance(module, EightBit):
                module.scale.zero_()
    assert torch.equal(fast(x), wanted) and not torch.equal(twin(x), wanted)


# --------------------------------------------------------------------------------------------------- single layers


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 10, 3, 2, 1, bias=True), nn.Conv2d(6, 10, 1), nn.Linear(6, 10)])
def test_eight_bit_layer_is_the_layer_of_the_rounded_weights(layer):
    eight = EightBit(layer, 4)
    x = torch.randint(0, 5, (7, 6, 9, 9) if isinstance(layer, nn.Conv2d) else (7, 6)) / 4
    rounded = copy.deepcopy(layer)
    with torch.no_grad():
        rounded.weight.copy_(round_to_levels(layer.weight))
        step = layer.weight.abs().max() / 127 * 9 / 8  # four bits of a scale are at most an eighth above it
        assert (rounded.weight - layer.weight).abs().max() <= step / 2 + 1e-7
        torch.testing.assert_close(eight(x), rounded(x), rtol=1e-5, atol=1e-6)
        assert (eight(x) - layer(x)).abs().max() > 1e-5
        torch.testing.assert_close(copy.deepcopy(eight)(x), eight(x), rtol=0, atol=0)
        torch.testing.assert_close(eight((x * 4).to(torch.uint8)), eight(x), rtol=0, atol=0)


def test_eight_bit_layer_by_hand():
    layer = TernaryConv2d(1, 1, 2, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.3, -0.3], [0, 0.3]]).view(1, 1, 2, 2))
        layer.bias.fill_(0.5)
    x = torch.tensor([[1.0, 0, 1], [1, 1, 0], [0, 1, 1]]).view(1, 1, 3, 3)
    # Windows: 1 - 0 + 1, 0 - 1 + 0, 1 - 1 + 1, 1 - 0 + 1.
    wanted = torch.tensor([[2.0, -1], [1, 2]]).view(1, 1, 2, 2) * torch.tensor(0.3) + 0.5
    assert torch.equal(EightBit(layer, 1)(x), wanted) and torch.equal(layer(x), wanted)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_norm_rounds_as_torch(kind, affine):
    norm = kind(37, affine=affine).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 3)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(200, 37) * 10 if kind is nn.BatchNorm1d else torch.randn(20, 37, 13, 11) * 10
    with torch.no_grad():
        wanted = norm(x)
        assert torch.equal(ExactNorm(norm)(x), wanted)
        naive = F.batch_norm(x.double(), norm.running_mean.double(), norm.running_var.double()).float()
        assert affine or not torch.equal(naive, wanted)  # so that equality is no matter of course


# ------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *NETS[:4],
        ("test_spiking_resnet", {"neuron": "if", "reset": "soft", "v_init": 0.5}),
        ("test_mpbn_resnet", {"neuron": "plif", "v_reset": -0.1}),
        ("test_spiking_vgg", {"encoding": "poisson"}),
        ("test_spikformer", {}),
        ("test_spikformer", {"multisp": {"patch_ratio": 0.3}}),
    ],
)
def test_long_sequences_run_in_parts(name, arguments):
    model = create(name, **{**arguments, "T": 19})
    model = spikezoo.bake(model) if "multisp" in arguments else model
    x = torch.rand(2, 3, 32, 32)
    net, wanted = deploy(model, "exact"), model(x)
    assert wanted.std() > 0 and torch.equal(net(x), wanted)
    seen = []
    net.model.stem.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    assert torch.equal(net(x), wanted)  # nothing is left of the call before
    assert seen == ([19] if "multisp" in arguments else [8, 8, 3])


def test_long_sequences_of_events_compiled(monkeypatch):
    monkeypatch.setattr(sys.modules["spikezoo.deploy"], "PART", 2)  # the compiler unrolls the steps of a part
    model = create("test_mpbn_vgg", in_chans=2, widths=((4,), (4,)))  # g++ is called for every kernel
    x = torch.rand(1, 5, 2, 32, 32)
    assert torch.equal(deploy(model, "exact")(x), model(x)) and model(x).std() > 0


def test_compiled_nets_fire_the_same_spikes(caplog):
    model, x = create("test_spiking_vgg", T=2, ticket=True), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted, other = model(x), model(x[:1])
    fast = deploy(model, "int8", example=x)
    assert fast.compiled and torch.equal(fast(x), wanted) and "compiling anew" not in caplog.text
    assert torch.equal(fast(x[:1]), other)
    assert "(1, 3, 32, 32): compiling anew" in caplog.text


def test_compiled_convolutions_round_as_the_models():
    # Of a net without spikes the logits show every rounding.
    model, x = create("test_spiking_vgg", T=None, neuron="relu"), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(deploy(model, "exact", example=x)(x), model(x))


# ------------------------------------------------------------------------------------------------------- bad input


def test_bad_models():
    model = create("test_spiking_vgg")
    with pytest.raises(ValueError, match=r"'extract' does not exist\. Did you mean 'exact'"):
        deploy(model, "extract")
    with pytest.raises(ValueError, match="training mode"):
        deploy(copy.deepcopy(model).train())
    with pytest.raises(ValueError, match=r"'stem.0.conv' is a ticket with scores.*bake"):
        deploy(spikezoo.create_model("test_spiking_vgg", ticket=TICKET).eval())
    with pytest.raises(ValueError, match=r"bfloat16: deploy model.float\(\)"):
        deploy(copy.deepcopy(model).bfloat16())
    with pytest.raises(ValueError, match="Sequential"):
        deploy(nn.Sequential().eval())


@pytest.mark.parametrize("neuron", ["relu", "sign"])
def test_int8_is_for_spikes(neuron):
    with pytest.raises(ValueError, match="keeps spikes as bytes and this model has none: use precision='bf16'"):
        deploy(create("test_spiking_vgg", T=None, neuron=neuron), "int8")


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
def test_inputs_that_are_not_finite(precision, value):
    fast, x = deploy(create("test_spiking_vgg"), precision), torch.randn(4, 3, 32, 32)
    x[2, 1, 0, 0] = value
    with pytest.raises(ValueError, match="not finite in 1 of 4 samples, the first at 2"):
        fast(x)
    assert fast(x[:2]).isfinite().all()


@pytest.mark.usefixtures("eager")
def test_a_deployed_model_does_not_train():
    fast = deploy(create("test_spiking_vgg"), "exact")
    with pytest.raises(ValueError, match="cannot be trained"):
        fast.train()
    with pytest.raises(ValueError, match="keeps its weights: load them into the model"):
        fast.load_state_dict(fast.state_dict())
    assert not fast.eval().training and all(not p.requires_grad for p in fast.parameters())


def test_no_compiler_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr("shutil.which", lambda _name: None)
    fast = _deploy_function(create("test_spiking_vgg"))
    fast(torch.randn(2, 3, 32, 32)), fast(torch.randn(2, 3, 32, 32))
    assert [r.getMessage() for r in caplog.records if r.name == "spikezoo"] == [
        "No C++ compiler found: the model runs uncompiled. Install g++, or set CXX."
    ]


def test_auto_takes_what_this_processor_is_fastest_in(monkeypatch):
    plain, rounded_net = create("test_spiking_vgg"), rounded(create("test_spiking_vgg"))
    ann = spikezoo.create_model("test_spiking_vgg", neuron="relu").eval()
    has = {"_is_amx_tile_supported": False, "_is_avx512_bf16_supported": True}
    for name in has:
        monkeypatch.setattr(f"torch.cpu.{name}", lambda name=name: has[name])
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    monkeypatch.setattr(sys.modules["spikezoo.deploy"], "instructions", lambda: "avx2")
    assert [deploy(model).precision for model in (plain, rounded_net, ann)] == ["bf16", "bits", "bf16"]
    fast = deploy(rounded_net)
    assert fast.notes[0] == "bits by auto: weights are whole numbers, and this processor has avx2"
    x = torch.rand(2, *fast.model.input_shape)
    assert torch.equal(fast(x), rounded_net(x))
    has["_is_avx512_bf16_supported"] = False
    assert [deploy(model).precision for model in (plain, rounded_net, ann)] == ["exact", "bits", "exact"]
    has["_is_amx_tile_supported"] = True
    assert [deploy(model).precision for model in (plain, rounded_net)] == ["bf16", "int8"]
    has["_is_amx_tile_supported"] = False
    monkeypatch.setattr(sys.modules["spikezoo.deploy"], "instructions", lambda: "plain")
    assert deploy(rounded_net).precision == "exact"
    has["_is_avx512_bf16_supported"] = True
    twice = spikezoo.create_model("test_spiking_resnet").eval()
    twice.stages[0][0].conv2.conv = twice.stages[0][0].conv1.conv
    fast = deploy(twice)
    assert fast.precision == "exact" and "runs twice" in fast.notes[0]


LOADING = """
import sys, torch, spikezoo
for path in sys.argv[1:]:
    x, want = torch.load(path + ".pt")
    net = spikezoo.load_deployed(path)
    assert net(x).tolist() == want.tolist() and tuple(x.shape) == net.input_shape
    assert net(x.flip(0)).tolist() == spikezoo.load_deployed(path)(x.flip(0)).tolist()
    print(net.precision, net.T)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """File of a net on bits, of which one layer is a dense one in eight bits, with an input and its logits."""
    path = tmp_path_factory.mktemp("deployed") / "net.pt2"
    model = rounded(create("test_mpbn_resnet", T=2, **SMALL_RESNET))
    x = torch.rand(2, *model.input_shape)
    fast = deploy(model, "bits", example=x)
    next(module for module in fast.modules() if isinstance(module, Summand) and len(module.methods) > 1).choose("dense")
    torch.save((x, model(x)), f"{path}.pt")
    assert fast.save(path) == path
    return path


def test_a_file_gives_the_logits_in_a_process_without_a_compiler(saved, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(saved)],
        env={"PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["bits", "2"], done.stderr


@pytest.mark.usefixtures("eager")
def test_parts_of_a_file_pass_potentials_on(monkeypatch):
    monkeypatch.setattr(sys.modules["spikezoo.deploy"], "PART", 2)
    for T in (3, 6):
        model = create("test_mpbn_resnet", T=T, neuron="plif")
        fast = deploy(model, "exact")
        x = torch.rand(2, *model.input_shape)
        found = [*package._graphs(fast, x)]
        parts = [(name, start, steps) for name, start, steps, *_ in found if steps]
        wanted = {3: [("first2", 0, 2), ("next1", 2, 1)], 6: [("first2", 0, 2), ("next2", 2, 2), ("next2", 4, 2)]}
        assert parts == wanted[T]
        graphs = {name: module for name, _, _, module, _ in reversed(found)}
        assert torch.equal(package._in_parts(graphs, x, parts, T), fast(x))
        assert torch.equal(fast(x), model(x))


def test_files_that_do_not_fit_are_refused(saved, tmp_path, monkeypatch):
    net = spikezoo.load_deployed(saved)
    x = torch.rand(net.input_shape)
    for wrong in (x[:1], x[None], x.int(), x * torch.nan):
        with pytest.raises(ValueError, match=r"compiled for|not finite"):
            net(wrong)
    with pytest.raises(FileNotFoundError, match="save"):
        spikezoo.load_deployed(tmp_path / "none.pt2")
    content = bytearray((saved).read_bytes())
    broken = tmp_path / "broken.pt2"
    for damaged in (b"", b"text", content[: len(content) // 2]):
        broken.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            spikezoo.load_deployed(broken)
    for place in range(100, len(content), len(content) // 20):
        content[place] ^= 4
        broken.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            spikezoo.load_deployed(broken)
        content[place] ^= 4
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("model/version", "1")
    with pytest.raises(ValueError, match="no file of"):
        spikezoo.load_deployed(broken)
    monkeypatch.setattr(sys.modules["spikezoo.deploy.package"], "processor", lambda: ("z80",))
    with pytest.raises(ValueError, match=r"compiled for processor .* and this is z80"):
        spikezoo.load_deployed(saved)
    monkeypatch.setattr("torch.__version__", "1.0")
    with pytest.raises(ValueError, match=r"compiled for torch .* and this is 1.0"):
        spikezoo.load_deployed(saved)


@pytest.mark.usefixtures("eager")
def test_what_cannot_be_saved_is_refused(tmp_path, monkeypatch):
    fast = deploy(create("test_spiking_vgg"), "exact")
    for path, advice in (("net.onnx", r"ends in \.pt2"), ("net.pt2", r"No C\+\+ compiler")):
        with pytest.raises(ValueError, match=advice):
            fast.save(tmp_path / path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"seen none: call save\(path, example=images\)"):
        fast.save(tmp_path / "net.pt2")
    with pytest.raises(ValueError, match="random"):
        deploy(create("test_spiking_vgg", encoding="poisson"), "exact").save(tmp_path / "net.pt2")
    assert not [*tmp_path.iterdir()]
