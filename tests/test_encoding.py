"""Encodings: spikes by hand and by SpikingJelly's encoders, seeded codes, models that take them, what they cost."""

import copy
import itertools

import pytest
import torch
from spikingjelly.activation_based.encoding import LatencyEncoder, PoissonEncoder
from test_models import fill

import spikezoo
from spikezoo.encoding import direct, poisson, ttfs
from spikezoo.evaluate import input_options

CODES = ("poisson", "ttfs")


def pixels(batch=3, channels=1, size=6, seed=1):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- functions


def test_direct_keeps_one_frame():
    x = pixels()
    frames, T = direct(x, 5)
    assert T == 5 and torch.equal(frames, x[None])
    events = torch.stack([x, 2 * x, 3 * x], 1)
    frames, T = direct(events, 5)
    assert T == 3 and torch.equal(frames[1], 2 * x)


def test_ttfs_by_hand():
    # Five steps: 1 spikes at step 0, 0.75 at 1, 0.6 at round(1.6) = 2, 0 at the last.
    x = torch.tensor([1.0, 0.75, 0.6, 0.0]).view(1, 1, 2, 2)
    frames, T = ttfs(x, 5)
    assert T == 5 and frames.shape == (5, 1, 1, 2, 2)
    assert frames.flatten(1).argmax(0).tolist() == [0, 1, 2, 4] and torch.equal(frames.sum(0), torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize(("dtype", "T"), [(torch.bfloat16, 400), (torch.float16, 3000)])
def test_one_spike_where_half_precision_cannot_count_the_steps(dtype, T):
    frames, _ = ttfs(pixels(size=20).to(dtype), T)
    assert (frames.float().sum(0) == 1).all()


def test_ttfs_equals_spikingjelly():
    x = pixels(size=20)
    encoder = LatencyEncoder(7)
    assert torch.equal(ttfs(x, 7)[0], torch.stack([encoder(x) for _ in range(7)]))


@pytest.mark.parametrize("seed", [None, 3])
def test_poisson_fires_as_often_as_spikingjelly(seed):
    torch.manual_seed(0)
    x = torch.cat([torch.linspace(0, 1, 16).view(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.3)])
    frames, T = poisson(x, 4000, seed)
    assert T == 4000 and set(frames.unique().tolist()) == {0, 1}
    encoder = PoissonEncoder()
    theirs = torch.stack([encoder(x) for _ in range(T)])
    sigma = (x * (1 - x) / T).sqrt()
    assert ((frames.mean(0) - x).abs() <= 4.5 * sigma).all()
    assert ((frames.mean(0) - theirs.mean(0)).abs() <= 4.5 * 2**0.5 * sigma).all()
    # Neither pixels nor steps go together: two that fire at 0.3 do so at the same time with 0.09.
    fair = frames[:, 1].flatten(1)
    for a, b in itertools.combinations(range(5), 2):
        assert abs((fair[:, a] * fair[:, b]).mean() - 0.09) < 4.5 * (0.09 * 0.91 / T) ** 0.5
    assert abs((fair[1:] * fair[:-1]).mean() - 0.09) < 4.5 * (0.09 * 0.91 / T / 16) ** 0.5 * 2


def test_a_seed_and_the_pixels_determine_the_spikes():
    x = pixels(5)
    alone = torch.cat([poisson(x[i : i + 1], 9, 1)[0] for i in range(5)], 1)
    assert torch.equal(poisson(x, 9, 1)[0], alone)
    assert torch.equal(poisson(x[[3, 0]], 9, 1)[0], alone[:, [3, 0]])
    assert torch.equal(poisson(x.to(memory_format=torch.channels_last), 9, 1)[0], alone)
    other = poisson(x, 9, 2)[0]
    assert not any(torch.equal(other[:, i], alone[:, i]) for i in range(5))
    once = torch.cat([x[:1], x[:1] + 0.0])
    assert torch.equal(*poisson(once, 9, 1)[0].unbind(1))
    once[1, 0, 0, 0] = once[1, 0, 0, 0] / 2  # one pixel
    first, second = poisson(once, 9, 1)[0].unbind(1)
    assert (first != second).float().mean() > 0.1
    state = torch.get_rng_state()
    poisson(x, 9, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(poisson(x, 9)[0], poisson(x, 9)[0])
    torch.manual_seed(5)
    first = poisson(x, 9)[0]
    torch.manual_seed(5)
    assert torch.equal(poisson(x, 9)[0], first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("code", [poisson, ttfs])
def test_frames_have_the_type_of_the_images(code, dtype):
    x = (torch.arange(16) / 16).view(1, 1, 4, 4)  # exact in every type
    assert code(x.to(dtype), 6)[0].dtype == dtype
    if code is poisson:
        assert torch.equal(poisson(x.to(dtype), 6, 0)[0].float(), poisson(x, 6, 0)[0])


@pytest.mark.parametrize("code", [poisson, ttfs])
@pytest.mark.parametrize(("value", "said"), [(-0.01, "-0.01 to 0.9"), (1.5, "to 1.5"), (float("nan"), "nan")])
def test_values_outside_of_a_probability(code, value, said):
    x = torch.full((2, 1, 2, 2), 0.9)
    x[1, 0, 1, 1] = value
    with pytest.raises(ValueError, match=rf"Input from .*{said}.*drop the normalisation.*--mean 0 --std 1"):
        code(x, 4)


# ------------------------------------------------------------------------------------------------------- models


@pytest.fixture(params=CODES)
def code(request):
    return request.param


FAMILIES = ("test_spiking_mlp", "test_spiking_vgg", "test_mpbn_resnet", "test_rmp_resnet", "test_spikformer")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_every_code(name, code):
    model = fill(spikezoo.create_model(name, encoding=code, T=3, encoding_seed=4)).eval()
    x = pixels(2, 3, 32)
    frames, T = model.encode(x)
    assert T == 3 and torch.equal(frames, (poisson(x, 3, 4) if code == "poisson" else ttfs(x, 3))[0])
    out = model(x)
    # The code is the only difference: what it puts out, given as event frames to a net without one, is the same.
    plain = spikezoo.create_model(name, T=3).eval()
    plain.load_state_dict(model.state_dict())
    events = frames.transpose(0, 1)
    torch.testing.assert_close(out, plain(events))
    torch.testing.assert_close(model.forward_steps(x), plain.forward_steps(events))
    levels = zip(model.forward_intermediates(x)[1], plain.forward_intermediates(events)[1], strict=True)
    for mine, theirs in levels:
        torch.testing.assert_close(mine, theirs)
        assert mine.any()
    wrapped = spikezoo.create_model(name, features_only=True, encoding=code, T=3, encoding_seed=4)
    state = model.state_dict()
    wrapped.model.load_state_dict({key: state[key] for key in wrapped.model.state_dict()})
    torch.testing.assert_close(wrapped.eval()(x)[0], plain.forward_intermediates(events)[1][0])


def test_evaluation_is_seeded_and_training_is_not():
    torch.manual_seed(0)
    model = spikezoo.create_model("test_spiking_mlp", encoding="poisson", T=6, threshold=0.2).eval()
    x = pixels(4, 3, 32)
    out = model(x)
    assert torch.equal(model(x), out) and out.any()
    torch.testing.assert_close(torch.cat([model(x[i : i + 1]) for i in range(4)]), out)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.set_grad_checkpointing()  # the recomputation sees the spikes of the forward pass
    torch.manual_seed(1)
    model(x).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing(False)
    torch.manual_seed(1)
    model(x).square().sum().backward()
    assert all(map(torch.equal, found, (p.grad for p in model.parameters())))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
def test_compiled_and_exported(code):
    torch.manual_seed(0)
    model = spikezoo.create_model("test_spiking_mlp", hidden=[4], encoding=code, T=2, threshold=0.2).eval()
    x = pixels(2, 3, 32)
    out = model(x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), out)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), out)
    with pytest.raises(ValueError, match="drop the normalisation"):  # not compiled away
        compiled(2 * x)
    compiled.train()
    assert compiled(x).requires_grad


def test_the_rows_encode_and_take_pixels(tmp_path):
    codes = {"spiking_mlp_340": ("ttfs", 8), "spiking_mlp_500": ("ttfs", 8), "spiking_mlp_1000": ("poisson", 20)}
    for name, (encoding, T) in codes.items():
        model = spikezoo.create_model(name, device="meta")
        assert (model.encoding, model.T, model.neuron_config.kind) == (encoding, T, "if")
        assert input_options(model, "mnist") == {"T": T, "mean": (0.0,), "std": (1.0,)}
        twin = spikezoo.create_model(name, neuron="relu", device="meta")  # the ANN has no time to encode in
        assert (twin.encoding, twin.T) == ("direct", 1) and input_options(twin, "mnist") == {"T": 1}
    model = spikezoo.create_model("test_spiking_mlp", encoding="poisson", encoding_seed=7, T=3)
    spikezoo.save_checkpoint(model, tmp_path)
    again = spikezoo.create_model(f"local-dir:{tmp_path}", True)
    assert (again.encoding, again.encoding_seed, again.T) == ("poisson", 7, 3)
    x = pixels(2, 3, 32)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert spikezoo.create_model(f"local-dir:{tmp_path}", True, neuron="lif").encoding == "poisson"


@pytest.mark.parametrize("neuron", ["relu", "sign"])
def test_codes_of_spikes_need_time(neuron, code):
    with pytest.raises(ValueError, match=rf"encoding='{code}' with neuron='{neuron}'.*encoding='direct'"):
        spikezoo.create_model("test_spiking_mlp", encoding=code, neuron=neuron)


def test_bad_arguments(code):
    with pytest.raises(ValueError, match=r"encoding='possion' does not exist\. Did you mean 'poisson'"):
        spikezoo.create_model("test_spiking_mlp", encoding="possion")
    with pytest.raises(ValueError, match="encoding_seed=-1: expected an integer >= 0"):
        spikezoo.create_model("test_spiking_mlp", encoding_seed=-1)
    model = spikezoo.create_model("test_spiking_mlp", encoding=code)
    with pytest.raises(ValueError, match=r"event frames \[B, T, C, H, W\] are their own encoding.*encoding='direct'"):
        model(torch.zeros(1, 4, 3, 32, 32))
    with pytest.raises(ValueError, match="drop the normalisation"):
        model(torch.randn(2, 3, 32, 32))
    for hidden in ([], 340, [0], ["a"]):
        with pytest.raises(ValueError, match=r"hidden=.*expected"):
            spikezoo.create_model("spiking_mlp_340", hidden=hidden)


# ------------------------------------------------------------------------------------------------------- counts


def test_the_first_layer_is_paid_by_the_spike(code):
    """4 pixels, 3 hidden neurons, 2 classes, by hand."""
    model = spikezoo.create_model(
        "test_spiking_mlp", hidden=[3], in_chans=1, img_size=2, num_classes=2, T=4, encoding=code
    )
    with torch.no_grad():
        model.stem[0].linear.weight.copy_(torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [2, 2, 2, 2]]))
    x = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).view(1, 1, 2, 2)
    # poisson: three pixels of 1 spike at each of 4 steps; ttfs: they spike once, at the first, and the dark one last.
    spikes = 12 if code == "poisson" else 4
    for inputs in ("auto", "analog"):
        found = spikezoo.count(model, x, inputs=inputs)
        layer = found.by_module["stem.0.linear"]
        assert layer.input == "spikes" and layer.macs_exact == layer.macs_paper == 0
        assert layer.sops_exact == spikes * 2  # a row of weights is zero
        assert layer.rate == spikes / 16 and layer.sops_paper == pytest.approx(spikes / 16 * 4 * 12)
        assert found.macs_step == 4 * 3 + 3 * 2 and found.macs_exact == 0
    # Analog input pays the dense layer once.
    plain = spikezoo.create_model("test_spiking_mlp", hidden=[3], in_chans=1, img_size=2, num_classes=2, T=4)
    layer = spikezoo.count(plain, x, inputs="analog").by_module["stem.0.linear"]
    assert layer.macs_paper == 12 and layer.sops_paper == 0


@pytest.mark.parametrize("code, T", [(poisson, 0), (poisson, -1), (poisson, 2.5), (ttfs, 0), (ttfs, 1), (ttfs, 4.0)])
def test_bad_steps(code, T):
    with pytest.raises(ValueError, match=f"T={T}"):
        code(torch.rand(1, 1, 2, 2), T)


@pytest.mark.parametrize("code", ["poisson", "ttfs"])
def test_event_models_take_frames_as_they_are(code):
    with pytest.raises(ValueError, match="in_chans=2: event frames are their own encoding"):
        spikezoo.create_model("test_spiking_vgg", in_chans=2, encoding=code)
