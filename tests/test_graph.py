"""Tests of spikezoo.graph: what a block does is read off its forward pass, whoever wrote it."""

import copy

import pytest
import torch
from timm.layers import DropPath
from torch import nn

import spikezoo
from spikezoo.graph import trace
from spikezoo.layers import ConvNormNeuron, LinearNormNeuron, ResidualBlock, over_time
from spikezoo.neurons import NeuronConfig, NeuronFactory, SpikingNeuron

NEURON = NeuronFactory(NeuronConfig())


def flow(model):
    """Kind, name and inputs of every node."""
    return [(node.kind, node.name, *(source.name for source in node.inputs)) for node in trace(model).nodes]


def with_block(block):
    """A net whose only stage is a block for 8 channels of 8x8, and the nodes of that stage."""
    model = spikezoo.create_model("test_spiking_resnet", img_size=8, depths=(1, 1, 1), hidden=0)
    model.stages = nn.ModuleList([nn.Sequential(block)])
    graph = trace(model)
    return graph, [node for node in graph.nodes if node.owner.startswith("stages")]


def test_a_resnet_by_hand():
    model = spikezoo.create_model("test_mpbn_resnet")
    nodes = flow(model)
    assert nodes[:4] == [
        ("input", "input"),
        ("layer", "stem.0.conv", "input"),
        ("norm", "stem.0.norm", "stem.0.conv"),
        ("neuron", "stem.0.neuron", "stem.0.norm"),
    ]
    # A block with a pooled shortcut, in the order in which its parts run.
    block, before = "stages.1.0", "stages.0.0.neuron"
    assert [node for node in nodes if node[1].startswith(block)] == [
        ("layer", f"{block}.conv1.conv", before),
        ("norm", f"{block}.conv1.norm", f"{block}.conv1.conv"),
        ("neuron", f"{block}.conv1.neuron", f"{block}.conv1.norm"),
        ("layer", f"{block}.conv2.conv", f"{block}.conv1.neuron"),
        ("norm", f"{block}.conv2.norm", f"{block}.conv2.conv"),
        ("pool", f"{block}.pool", before),
        ("layer", f"{block}.shortcut.conv", f"{block}.pool"),
        ("norm", f"{block}.shortcut.norm", f"{block}.shortcut.conv"),
        ("join", f"{block}.add", f"{block}.conv2.norm", f"{block}.shortcut.norm"),
        ("neuron", f"{block}.neuron", f"{block}.add"),
    ]
    assert nodes[-2:] == [("head", "head", "stages.2.0.neuron"), ("layer", "head.fc", "head")]
    graph = trace(model)
    shapes = {node.name: node.shape for node in graph.nodes}
    assert shapes["input"] == (3, 32, 32) and shapes["stem.3"] == (8, 16, 16) and shapes["head.fc"] == (10,)
    # Nodes refer to the model's own modules, and know who reads them.
    parts = dict(model.named_modules())
    assert all(node.module is parts[node.name] for node in graph.of("layer", "norm", "pool", "neuron"))
    readers = {node.name: [reader.name for reader in node.readers] for node in graph.nodes}
    assert readers["stages.0.0.neuron"] == [f"{block}.conv1.conv", f"{block}.pool"]


@pytest.mark.parametrize("name", spikezoo.list_models("test_*"))
def test_all_layers_and_neurons_of_every_family_are_seen(name):
    model = spikezoo.create_model(name, T=2).train()
    before = copy.deepcopy(model.state_dict())
    graph = trace(model)
    kinds = {"layer": nn.Conv2d | nn.Linear, "norm": nn.modules.batchnorm._BatchNorm, "neuron": SpikingNeuron}
    for kind, types in kinds.items():
        wanted = {path for path, module in model.named_modules() if isinstance(module, types)}
        assert {node.name for node in graph.of(kind)} == wanted
    assert all(graph.nodes.index(source) < place for place, node in enumerate(graph.nodes) for source in node.inputs)
    # Traced in the mode and on the numbers that it has, and left alone.
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "arguments",
    [
        {"device": "meta"},
        {"dtype": torch.bfloat16},
        {"in_chans": 2},
        {"T": 5, "encoding": "ttfs"},
        {"T": 2, "encoding": "poisson"},
        {"num_classes": 0},
        {"neuron": "sign", "mpbn": "none"},
        {"img_size": (40, 24)},
    ],
    ids=str,
)
def test_any_form_of_a_model(arguments):
    nodes = flow(spikezoo.create_model("test_mpbn_vgg", **arguments))
    plain = flow(spikezoo.create_model("test_mpbn_vgg"))
    assert nodes == (plain[:-1] if arguments.get("num_classes") == 0 else plain)


class Written(nn.Module):
    """A block of torch's own modules, as anybody might write it: everything that is seen through, and a join."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.neuron = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), NEURON(8, (8, 8))
        self.drop, self.path, self.shortcut = nn.Dropout(0.5), DropPath(0.5), nn.Sequential()

    def forward(self, x):
        y = self.neuron(over_time(lambda z: self.norm(self.conv(z)), x))
        y = self.path(self.drop(y).transpose(0, 1)).transpose(0, 1)
        y = y.flatten(3).contiguous().unflatten(3, (8, 8))[..., None].squeeze(-1).to(x.dtype)
        return sum([self.shortcut(x), y])


def test_what_is_seen_through():
    graph, nodes = with_block(Written())
    block = "stages.0.0"
    assert [(node.kind, node.name) for node in nodes] == [
        ("layer", f"{block}.conv"),
        ("norm", f"{block}.norm"),
        ("neuron", f"{block}.neuron"),
        ("join", f"{block}.add"),
    ]
    assert [source.name for source in nodes[-1].inputs] == ["stem.0.neuron", f"{block}.neuron"]
    assert graph.features is nodes[-1]


class Does(nn.Module):
    """A block that computes one thing."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


class Louder(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("block", "op", "what"),
    [
        (Does(lambda s, x: x * x), "mul", "the mul of a Does"),
        (Does(lambda s, x: x + 0.5), "add", "the add of a Does"),
        (Does(lambda s, x: x + torch.ones(8, 1, 1, device=x.device)), "add", "the add of a Does"),
        (Does(lambda s, x: torch.add(x, x, alpha=2)), "add", "the add of a Does"),
        (Does(lambda s, x: x + x.mean((3, 4), keepdim=True)), "add", "the add of a Does"),
        (Does(lambda s, x: torch.cat([x, x], 2)[:, :, :8]), "cat", "the cat of a Does"),
        (Does(lambda s, x: x.roll(1, 2)), "roll", "the roll of a Does"),
        (Does(lambda s, x: x.unflatten(2, (2, 4)).sum(2)), "unflatten", "the unflatten of a Does"),
        (Does(lambda s, x: over_time(s.n, x), n=nn.GroupNorm(2, 8)), "GroupNorm", "a GroupNorm"),
        (Does(lambda s, x: over_time(s.n, x), n=nn.GELU()), "GELU", "a GELU"),
        (Does(lambda s, x: over_time(s.n, x), n=Louder(8, 8, 1)), "conv2d", "the conv2d of a Louder"),
        (Does(lambda s, x: x.mean(2, keepdim=True).expand_as(x)), "mean", "the mean of a Does"),
        # Channels as places: the neuron's mask is for channels on the third axis.
        (Does(lambda s, x: s.n(x.transpose(2, 3)), n=NEURON(8, (8, 8))), "layout", "the layout of a LIF"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_operations_are_named(block, op, what):
    _, nodes = with_block(block)
    first = next(node for node in nodes if node.kind == "other")
    assert first.name.rpartition(".")[2] == op or first.op == op
    assert first.what == what


def test_what_a_layer_holds_is_its_part():
    layer = ConvNormNeuron(8, 8, (8, 8), neuron=NEURON, dd={})
    layer.norm = nn.Sequential(nn.BatchNorm2d(8), nn.Sigmoid())
    _, nodes = with_block(layer)
    assert [(node.kind, node.op) for node in nodes] == [("layer", "Conv2d"), ("other", "Sequential"), ("neuron", "LIF")]


def test_maps_become_features():
    _, nodes = with_block(LinearNormNeuron(8 * 64, 5, pool=False, norm=True, bias=False, neuron=NEURON, dd={}))
    assert [(node.kind, node.name, node.shape) for node in nodes[:2]] == [
        ("flatten", "stages.0.0.flatten", (512,)),
        ("layer", "stages.0.0.linear", (5,)),
    ]
    _, nodes = with_block(Does(lambda s, x: over_time(s.fc, x.mean((3, 4)))[..., None, None], fc=nn.Linear(8, 8)))
    assert [(node.kind, node.name, node.shape) for node in nodes] == [
        ("average", "stages.0.0.mean", (8,)),
        ("layer", "stages.0.0.fc", (8,)),
    ]
    # Tokens with their channels last, as in most transformers: the same linear layer.
    _, nodes = with_block(Does(lambda s, x: s.fc(x.flatten(3).transpose(2, 3)).transpose(2, 3), fc=nn.Linear(8, 8)))
    assert [(node.kind, node.name) for node in nodes[:1]] == [("layer", "stages.0.0.fc")] and len(nodes) == 1


def test_what_cannot_be_followed():
    with pytest.raises(ValueError, match="data flow of a Linear is unknown"):
        trace(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="data flow of a FeatureGetterNet"):
        trace(spikezoo.create_model("test_mpbn_vgg", features_only=True))
    with pytest.raises(ValueError, match=r"cannot be followed without the values .* in 'stages\.0\.0'"):
        with_block(Does(lambda s, x: x if x.sum() > 0 else -x))
    with pytest.raises(ValueError, match=r"features of SpikingResNet do not depend"):
        with_block(Does(lambda s, x: torch.ones(x.shape)))


def test_a_part_that_runs_twice():
    block = ResidualBlock(8, 8, (8, 8), neuron=NEURON, dd={})
    block.conv2.conv = block.conv1.conv
    graph, _ = with_block(block)
    with pytest.raises(ValueError, match=r"'stages\.0\.0\.conv1\.conv' runs twice .* compact"):
        graph.check_called_once("compact")
