"""Tests of spikezoo.export: ONNX in onnxruntime, NIR stepped through time by its own equations, bad input.

The oracle for NIR is the simulator below, which knows of the format only what its documentation says.
"""

import graphlib
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_models import fill, image_for, make, wave

import spikezoo
from spikezoo.cli import main
from spikezoo.export import DT, TOLERANCE, _differ, _judge, _margins, _NirGraph, export
from spikezoo.neurons import IF, LIF, PLIF, MembraneNorm, NeuronConfig, Sign, SpikingNeuron
from spikezoo.transforms import fold_bn, fold_mpbn

nir = pytest.importorskip("nir")

SMALL_VGG = {"widths": ((4,), (6,))}
SMALL_RESNET = {"widths": (8,), "depths": (1,), "strides": (2,)}


# --------------------------------------------------------------------------------------------------------------
# NIR
# --------------------------------------------------------------------------------------------------------------


def tensor(array):
    return torch.from_numpy(np.asarray(array)).double()


def pair(array):
    return tuple(np.broadcast_to(array, 2).tolist())


def step(node, x, v, dt):
    """One time step of a node: its output and its next state, for input ``[B, ...]``."""
    kind = type(node).__name__
    if kind in ("Input", "Output"):
        return x, v
    if kind == "Conv2d":
        geometry = pair(node.stride), pair(node.padding), pair(node.dilation), int(node.groups)
        return F.conv2d(x, tensor(node.weight), tensor(node.bias), *geometry), v
    if kind == "AvgPool2d":
        return F.avg_pool2d(x, pair(node.kernel_size), pair(node.stride), pair(node.padding)), v
    if kind == "Flatten":
        assert (int(node.start_dim), int(node.end_dim)) == (0, -1)
        return x.flatten(1), v
    if kind in ("Linear", "Affine"):
        return F.linear(x, tensor(node.weight), tensor(node.bias) if kind == "Affine" else None), v
    if kind == "Scale":
        return x * tensor(node.scale), v
    v_reset, r = tensor(node.v_reset), tensor(node.r)
    if v is None:
        v = v_reset.expand(x.shape)
    if kind == "LIF":
        u = v + dt / tensor(node.tau) * (tensor(node.v_leak) - v + r * x)
    else:
        assert kind == "IF"
        u = v + dt * r * x
    spikes = u > tensor(node.v_threshold)
    return spikes.double(), torch.where(spikes, v_reset, u)


@torch.no_grad()
def simulate(graph, frames):
    """Outputs of every node, ``[T, B, ...]`` by name, for frames ``[T, B, C, H, W]``."""
    sources = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    order = list(graphlib.TopologicalSorter(sources).static_order())
    states, steps = {}, []
    for frame in frames:
        values = {}
        for name in order:
            x = sum(values[source] for source in sources[name]) if sources[name] else frame
            dt = float(graph.metadata["dt"])
            values[name], states[name] = step(graph.nodes[name], x, states.get(name), dt)
        steps.append(values)
    return {name: torch.stack([values[name] for values in steps]) for name in order}


def node_of(neuron, shape=(3, 2, 2)):
    """The NIR graph of one neuron layer."""
    graph = _NirGraph(nir, shape)
    x = graph.neuron("neuron", neuron, graph.input)
    graph.add("output", nir.Output(output_type={"output": np.array(shape)}), x, shape)
    return nir.NIRGraph(graph.nodes, graph.edges, {"dt": DT})


def test_parameters_of_a_neuron_by_hand():
    decay = node_of(LIF(NeuronConfig(decay=0.75, threshold=0.5, firing=">")), (1, 1, 2)).nodes["neuron"]
    # 1 - dt/tau = 3/4, dt/tau r = 1
    assert decay.tau.shape == (1, 1, 2) and decay.tau[0, 0] == pytest.approx([4 * DT] * 2, rel=1e-12)
    assert (decay.r == 4).all() and (decay.v_leak == 0).all() and (decay.v_reset == 0).all()
    assert (decay.v_threshold == 0.5).all()
    tau = node_of(LIF(NeuronConfig(tau=4.0, v_reset=-0.25, firing=">="))).nodes["neuron"]
    assert (tau.r == 1).all() and (tau.v_leak == -0.25).all() and (tau.v_reset == -0.25).all()
    assert tau.tau.max() == pytest.approx(4 * DT, rel=1e-12)
    assert (tau.v_threshold == 1 - 2**-24).all()  # the float32 below 1: NIR fires above its threshold
    for neuron in (IF(NeuronConfig("if")), LIF(NeuronConfig(decay=1.0))):
        node = node_of(neuron).nodes["neuron"]
        assert isinstance(node, nir.IF) and node.r == pytest.approx(np.full((3, 2, 2), 1 / DT))


@pytest.mark.parametrize("firing", [">", ">="])
def test_a_potential_on_its_threshold(firing):
    neuron = LIF(NeuronConfig(decay=0.5, threshold=1.0, firing=firing))
    # u: 0.75; 0.375 + 0.625 = 1, on the threshold; without a spike 0.5 + 0.25 = 0.75, after one 0.25
    current = torch.tensor([0.75, 0.625, 0.25, 0.75]).view(4, 1, 1, 1, 1)
    wanted = [0, 1, 0, 0] if firing == ">=" else [0, 0, 0, 1]  # 0.125 + 0.75 or 0.375 + 0.75
    assert neuron(current).flatten().tolist() == wanted
    assert simulate(node_of(neuron, (1, 1, 1)), current.double())["neuron"].flatten().tolist() == wanted


NEURONS = [
    (LIF, {"decay": 0.25, "threshold": 0.5, "firing": ">"}),
    (LIF, {"decay": 0.99}),
    (LIF, {"decay": 0.0}),
    (LIF, {"decay": 1.0, "v_reset": -0.5}),
    (LIF, {"decay": 0.5, "v_reset": 0.25}),
    (LIF, {"tau": 2.0}),
    (LIF, {"tau": 1.0, "v_reset": -0.5}),
    (IF, {"kind": "if", "v_reset": -0.25}),
    (PLIF, {"kind": "plif", "tau": 3.0, "v_reset": 0.125}),
]


@pytest.mark.parametrize(("kind", "config"), NEURONS, ids=str)
@pytest.mark.parametrize("mpbn", [None, "channel", "element"])
def test_neurons_step_by_step(kind, config, mpbn):
    norm = MembraneNorm(mpbn, 3, (4, 4)) if mpbn else None
    neuron = kind(NeuronConfig(**config), norm).eval()
    if norm is not None:
        with torch.no_grad():
            # Scales of both signs: fold_mpbn makes of them thresholds and polarities.
            norm.weight.copy_(1.5 + wave(norm.weight.shape)).mul_(
                (-1) ** torch.arange(3).view(-1, *norm.weight[0].ndim * (1,))
            )
            norm.bias.copy_(0.5 * wave(norm.bias.shape, 2))
        neuron = fold_mpbn(neuron)
    x = 3 * wave((8, 4, 3, 4, 4), 3)
    found = simulate(node_of(neuron, (3, 4, 4)), x)
    spikes = neuron.double()(x)
    assert torch.equal(found["neuron"], spikes) and 0.05 < spikes.mean() < 0.95
    assert ("neuron.polarity" in found) == (mpbn is not None)


@torch.no_grad()
def spikes_of(model, x):
    """Spikes of every neuron by name, and the logits of every step."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, SpikingNeuron):
            module.register_forward_hook(lambda _m, _i, out, name=name: found.__setitem__(name, out))
    return found, model.forward_steps(x)


@torch.no_grad()
def half_negative(model):
    """Every second scale of the membrane norms changes its sign."""
    for module in model.modules():
        if isinstance(module, MembraneNorm):
            module.weight[::2] *= -1
    return model


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_mpbn_vgg", {"T": 1}),
        ("test_mpbn_vgg", {"T": 4, "mpbn": "element", "firing": ">="}),
        ("test_mpbn_resnet", {"T": 4}),
        ("test_mpbn_resnet", {"T": 2, "neuron": "plif", "mpbn": "none"}),
        ("test_mpbn_resnet", {"T": 2, "stem": "conv7", "pooled_shortcut": False, "img_size": (40, 24)}),
        ("test_spiking_resnet", {"T": 4}),
        ("test_spiking_resnet", {"T": 4, "neuron": "if", "v_reset": -0.25, "num_classes": 0}),
    ],
    ids=str,
)
def test_nir_round_trip(name, arguments, tmp_path):
    model = half_negative(make(name, **arguments)).eval()
    path = export(model, tmp_path / "new" / "net.nir")
    assert [p.name for p in path.parent.iterdir()] == ["net.nir"]
    graph = nir.read(path)
    x = image_for(model) if "img_size" not in arguments else wave((2, 3, 40, 24), 7)
    found = simulate(graph, x.unsqueeze(0).expand(model.T, *x.shape).double())

    folded = fold_bn(fold_mpbn(model) if model.mpbn else model)
    spikes, steps = spikes_of(folded.double(), x.double())
    for layer, wanted in spikes.items():
        wanted = wanted.reshape(found[layer].shape)
        assert torch.equal(found[layer], wanted), f"{layer}: {(found[layer] != wanted).sum()} spikes differ"
        assert 0 < wanted.mean() < 1, layer
    assert len(spikes) == sum(isinstance(node, nir.IF | nir.LIF) for node in graph.nodes.values())
    torch.testing.assert_close(found["output"], steps, rtol=0, atol=1e-9)
    # And what the user exported, whose folds only round.
    torch.testing.assert_close(found["output"].mean(0), model.double()(x.double()), rtol=0, atol=1e-4)


def test_nir_holds_a_threshold_for_every_channel(tmp_path):
    model = half_negative(make("test_mpbn_resnet")).eval()
    graph = nir.read(export(model, tmp_path / "net.nir", example=torch.zeros(1, 3, 48, 32)))
    neuron = fold_mpbn(model).get_submodule("stages.1.0.neuron")
    node = graph.nodes["stages.1.0.neuron"]
    assert node.v_threshold.shape == (12, 12, 8)  # of the example's size
    signed = (neuron.folded.threshold * neuron.folded.polarity).double().numpy()
    assert np.array_equal(node.v_threshold, np.broadcast_to(signed[:, None, None], (12, 12, 8)))
    assert len(set(signed)) == 12
    # Both branches of a block lead into its neuron, the shortcut by way of its pooling.
    edges = set(map(tuple, graph.edges))
    assert {
        ("stages.1.0.conv2.conv", "stages.1.0.neuron.polarity"),
        ("stages.1.0.shortcut.conv", "stages.1.0.neuron.polarity"),
        ("stages.1.0.neuron.polarity", "stages.1.0.neuron"),
        ("stages.1.0.pool", "stages.1.0.shortcut.conv"),
        ("stages.0.0.neuron", "stages.1.0.pool"),
        ("stages.0.0.neuron", "stages.1.0.conv1.conv"),
    } <= edges
    assert float(graph.metadata["dt"]) == DT and int(graph.metadata["T"]) == 4
    assert "hard" in graph.metadata["reset"]
    facts = json.loads(graph.metadata["spikezoo"])
    assert facts["architecture"] == "test_mpbn_resnet" and facts["mean"] == [0.4914, 0.4822, 0.4465]


def test_nir_of_event_frames(tmp_path):
    model = make("test_spiking_resnet").eval()
    frames = wave((2, 3, 3, 32, 32), 7)  # [B, T, C, H, W]
    graph = nir.read(export(model, tmp_path / "net.nir", example=frames.float()))
    assert int(graph.metadata["T"]) == 3
    found = simulate(graph, frames.transpose(0, 1))["output"].mean(0)
    torch.testing.assert_close(found, model.double()(frames), rtol=0, atol=1e-4)


@pytest.mark.parametrize("per", ["unit", "channel"])
def test_nir_of_removed_neurons(per, tmp_path):
    model = spikezoo.apply(make("test_mpbn_resnet"), "dynsnn", per=per).eval()
    for module in model.modules():
        if getattr(module, "mask", None) is not None:
            module.mask.view(-1)[::3] = False
    x = image_for(model)
    graph = nir.read(export(model, tmp_path / "net.nir"))
    found = simulate(graph, x.double().expand(model.T, *x.shape))["output"].mean(0)
    torch.testing.assert_close(found, model.double()(x.double()), rtol=0, atol=1e-4)


def test_nir_in_spikingjelly(tmp_path):
    pytest.importorskip("nirtorch")
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    model = make("test_spiking_resnet").eval()
    x = image_for(model)
    theirs = import_from_nir(export(model, tmp_path / "net.nir"), dt=DT, dtype=torch.float64)
    with torch.no_grad():
        wanted, state = model.double().forward_steps(x.double()), None
        for logits in wanted:
            found, state = theirs(x.double(), state)
            torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("test_spiking_vgg", {}, r"'stages.0.0.pool': NIR has no max-pooling. .* Export to .onnx"),
        ("test_spikformer", {}, r"'stages.0.0.attn': the matmul of a SpikingSelfAttention multiplies signals"),
        ("test_sdt", {}, r"'stages.0.0.attn': the mul of a MaskAttention multiplies signals"),
        (
            "test_sew_resnet",
            {"connect": "and"},
            r"'stages.0.0': the mul of a SEWBlock multiplies signals by each other",
        ),
        ("test_mpbn_resnet", {"norm": "tebn"}, r"'stem.0.steps': it scales every time step by a factor of its own"),
        ("test_mpbn_vgg", {"reset": "soft"}, r"'stem.0.neuron': .*reset='soft'"),
        ("test_mpbn_vgg", {"v_init": 0.25}, r"'stem.0.neuron': .* start at rest, and these at v_init=0.25"),
        ("test_mpbn_vgg", {"neuron": "relu"}, r"'stem.0.neuron': NIR has no neuron such as ReLU"),
        ("test_mpbn_vgg", {"global_pool": "max"}, r"'head.global_pool': NIR has no max-pooling"),
        ("test_mpbn_resnet", {"img_size": 20}, r"'stages.2.0.pool': AvgPool2d.* on a map of 5x5 leaves out places"),
    ],
)
def test_what_nir_cannot_hold(name, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(make(name, **arguments).eval(), tmp_path / "net.nir")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------
# ONNX
# --------------------------------------------------------------------------------------------------------------


def onnxruntime():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def baked_vgg():
    model = spikezoo.apply(make("test_spiking_vgg", T=4, **SMALL_VGG), "ticket", kind="mpslt", sparsity=0.4)
    return spikezoo.bake(model)


def element_plif_resnet():
    return make("test_mpbn_resnet", mpbn="element", neuron="plif", **SMALL_RESNET)


def folded_vgg():
    return fold_bn(fold_mpbn(make("test_mpbn_vgg", T=1, **SMALL_VGG)))


def selecting_autost():
    model = make("test_autost", T=2, depth=1, mlp_ratios=1, heads=2)
    return spikezoo.bake(fill(spikezoo.apply(model, "multisp", patch_ratio=0.3)))


@pytest.mark.parametrize(
    ("model", "shape", "dynamic"),
    [
        (baked_vgg, (4, 3, 32, 32), True),
        (element_plif_resnet, (1, 3, 3, 32, 32), True),  # event frames
        (folded_vgg, (1, 3, 32, 32), False),
        (selecting_autost, (2, 3, 32, 32), True),
    ],
)
@torch.no_grad()
def test_onnx(model, shape, dynamic, tmp_path):
    runtime = onnxruntime()
    model = model().eval()
    path = export(model, tmp_path / "net.onnx", wave(shape, 7).float(), dynamic_batch=dynamic)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    session = runtime.InferenceSession(path)
    (found_input,), (found_output,) = session.get_inputs(), session.get_outputs()
    assert (found_input.name, found_output.name) == ("input", "logits")
    assert found_input.shape == ["batch" if dynamic else shape[0], *shape[1:]]
    for batch in (1, 3, 4) if dynamic else (shape[0],):
        x = wave((batch, *shape[1:]), 20 + batch).float()
        logits = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
        wanted = model(x)
        assert wanted.std(1).min() > 0.01
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
        # Two logits of a ticket may be equal, and roundings then decide.
        assert (wanted.gather(1, logits.argmax(1, keepdim=True))[:, 0] - wanted.amax(1)).abs().max() < 1e-6
    facts = json.loads(session.get_modelmeta().custom_metadata_map["spikezoo"])
    assert facts["architecture"] == model.pretrained_cfg["architecture"]
    assert [name for name, _ in facts["recipe"]] == [name for name, _ in model.recipe]
    assert b"forward" not in path.read_bytes()  # no lines of anybody's source


@pytest.mark.parametrize("name", ["spiking_mlp_340", "spiking_mlp_1000"])
@torch.no_grad()
def test_onnx_of_coded_images(name, tmp_path):
    runtime = onnxruntime()
    model = fill(spikezoo.create_model(name, hidden=[12], img_size=8, T=5), 6).eval()
    x = torch.rand(6, 1, 8, 8)
    x[0, 0, 0] = torch.arange(8) / 8  # halves of a step, which round to the even one
    path = export(model, tmp_path / "net.onnx", x)
    session = runtime.InferenceSession(path)
    frames, T = model.encode(x)
    given = x if model.encoding == "ttfs" else frames.transpose(0, 1)
    logits = torch.from_numpy(session.run(None, {"input": given.contiguous().numpy()})[0])
    torch.testing.assert_close(logits, model(x), rtol=0, atol=1e-5)
    assert model(x).std(0).max() > 0.01 and T == 5
    facts = json.loads(session.get_modelmeta().custom_metadata_map["spikezoo"])
    assert facts["input"].startswith(
        {"ttfs": "images [B, C, H, W]", "poisson": "spikes [B, T, C, H, W]"}[model.encoding]
    )
    assert (model.encoding == "ttfs") == (name == "spiking_mlp_340")  # the model itself goes on to code


@pytest.mark.parametrize("encoding", ["poisson", "ttfs"])
def test_nir_of_coded_images(encoding, tmp_path):
    model = make("test_mpbn_vgg", encoding=encoding, T=3).eval()
    graph = nir.read(export(model, tmp_path / "net.nir"))
    assert f"spikezoo.encoding.{encoding}" in graph.metadata["input"]
    x = image_for(model).abs() % 1
    found = simulate(graph, model.encode(x)[0].double())["output"].mean(0)
    torch.testing.assert_close(found, model.double()(x.double()), rtol=0, atol=1e-4)


def test_another_network_is_not_written(tmp_path, monkeypatch):
    runtime = onnxruntime()
    model = folded_vgg()
    path = tmp_path / "net.onnx"
    path.write_bytes(b"what was there")

    class Wrong(runtime.InferenceSession):
        def run(self, *args):
            return [logits + 10 * TOLERANCE for logits in super().run(*args)]

    monkeypatch.setattr(runtime, "InferenceSession", Wrong)
    with pytest.raises(ValueError, match=r"other logits in onnxruntime .* on 2 of 2 images, by up to 0.001"):
        export(model, path, image_for(model), dynamic_batch=False)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"] and path.read_bytes() == b"what was there"


def test_which_logits_are_others():
    logits = torch.tensor([[0.5, 0.25], [0.25, 0.25 + 1e-5]])
    for found, wanted in (
        (logits + 0.9e-4, [False, False]),
        (logits + 1.1e-4, [True, True]),
        (logits + torch.tensor([[0.0, 1.1e-4], [0.0, 0.0]]), [True, False]),
        (logits + torch.tensor([[0.0], [torch.nan]]), [False, True]),
        (logits - torch.tensor([0.0, 2e-5]), [False, True]),  # near enough, but the arg-max of the second
    ):
        assert _differ(found, logits).tolist() == wanted
    assert not _differ(torch.tensor([[0.5, 0.5 + 1e-7]]), torch.tensor([[0.5, 0.5]])).any()  # equally large
    assert not _differ(100 * logits + 1e-3, 100 * logits).any()  # of large logits the same share


def test_roundings_are_told_from_defects():
    logits = torch.tensor([[0.5, 0.25]] * 4)
    found = logits.clone()
    found[1] = torch.tensor([0.25, 0.5])
    differ, near, far = _differ(found, logits), torch.full((4,), 1e-6), torch.full((4,), 1e-3)
    with pytest.warns(
        UserWarning, match=r"On 1 of 4 images .* within 1e-06 .* by up to 0.25, and another arg-max on 1"
    ):
        _judge(differ, found, logits, near, "here")
    for wrong, margins, count in ((found, far, 1), (found + torch.tensor([[1.0], [0.0], [1.0], [1.0]]), near, 4)):
        with pytest.raises(ValueError, match=f"other logits here on {count} of 4 images"):
            _judge(_differ(wrong, logits), wrong, logits, margins, "here")


@pytest.mark.parametrize("neuron", ["lif", "sign"])
@torch.no_grad()
def test_margins(neuron):
    arguments = {"neuron": "sign", "mpbn": "none"} if neuron == "sign" else {"T": 1}
    model = make("test_mpbn_vgg", **arguments).eval()
    x = image_for(model, 3)
    seen = []
    # With T = 1 and from rest the potential is the current.
    for module in model.modules():
        if isinstance(module, SpikingNeuron):
            module.register_forward_pre_hook(lambda m, args: seen.append(m.norm(args[0][0]) - m.config.threshold))
        elif isinstance(module, Sign):
            module.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    found = _margins(model, x)
    assert len(seen) == 4
    assert torch.equal(found, torch.stack([u.abs().flatten(1).amin(1) for u in seen]).amin(0))


# --------------------------------------------------------------------------------------------------------------
# Bad input and the command
# --------------------------------------------------------------------------------------------------------------


def test_bad_input(tmp_path):
    model = make("test_mpbn_vgg", T=1).eval()
    ticket = spikezoo.apply(make("test_mpbn_resnet"), "ticket", kind="mpslt").eval()
    compiled = torch.compile(model)
    for suffix in ("onnx", "nir"):
        path = tmp_path / f"net.{suffix}"
        for wrong, message in (
            (make("test_mpbn_vgg"), "training mode, .* export model.eval()"),
            (ticket, "'stem.0.conv' is a ticket, .* export spikezoo.bake"),
            (make("test_mpbn_vgg").double().eval(), "float64 .* export model.float()"),
            (compiled, "was not made by spikezoo.create_model"),
            (torch.nn.Linear(2, 2).eval(), "was not made by spikezoo.create_model"),
        ):
            with pytest.raises(ValueError, match=message):
                export(wrong, path)
        for example, message in (
            (torch.zeros(1, 2, 32, 32), "has 2 channels .* create it with in_chans=2"),
            (torch.zeros(3, 32, 32), "expected images"),
            (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "example is torch.float64: expected a float32 tensor"),
            ([1.0], "example is list"),
        ):
            with pytest.raises(ValueError, match=message):
                export(model, path, example)
    for name in ("net.txt", "net", "onnx"):
        with pytest.raises(ValueError, match=r"expected a name that ends in .onnx or .nir"):
            export(model, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "package"), [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("nir", "nir")])
def test_missing_package(suffix, package, tmp_path, monkeypatch):
    if suffix == "onnx":
        onnxruntime()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs {package}: pip install 'spikezoo-snn\[export\]'"):
        export(make("test_mpbn_vgg", T=1).eval(), tmp_path / f"net.{suffix}")
    assert not list(tmp_path.iterdir())


def test_model_stays_as_it_is(tmp_path):
    model = make("test_mpbn_vgg", T=2).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path / "net.nir")
    assert model.recipe == [] and list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_command(tmp_path, capsys):
    path = tmp_path / "net.nir"
    command = ["export", "test_mpbn_vgg", "--dataset", "none", "--T", "3", "--images", "2"]
    assert main([*command, "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"test_mpbn_vgg, random weights (seed 42). Wrote {path}.\n"
    assert int(nir.read(path).metadata["T"]) == 3
    spikezoo.save_checkpoint(make("test_spiking_vgg"), tmp_path / "checkpoint")
    for arguments, message in (
        ([*command, "--output", "net.txt"], "ends in .onnx or .nir"),
        ([*command, "--output", str(path), "--images", "0"], "--images 0"),
        (["export", "--checkpoint", str(tmp_path / "checkpoint"), "--dataset", "none", "--output", str(path)], "max-p"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_command_writes_onnx(tmp_path, capsys):
    onnxruntime()
    spikezoo.save_checkpoint(folded_vgg(), tmp_path / "checkpoint")
    path = tmp_path / "net.onnx"
    arguments = ["--dataset", "none", "--images", "2", "--fixed-batch", "--output", str(path)]
    assert main(["export", "--checkpoint", str(tmp_path / "checkpoint"), *arguments]) == 0
    assert f"Wrote {path}, checked on 2 images of noise." in capsys.readouterr().out and path.is_file()
