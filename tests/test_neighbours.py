"""Tests of the families that SNN people compare with: official names and logits, counts by hand, deployment, ONNX."""

import collections
import itertools
import math
import re
import warnings

import pytest
import timm
import torch
from test_models import SHORTER, image_for, make, wave
from torch import nn

import spikezoo
from spikezoo.observe import firing_rates

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it deprecates of its own
    from spikingjelly.activation_based import functional, layer, neuron, surrogate
    from spikingjelly.activation_based.model import parametric_lif_net
    from spikingjelly.activation_based.model import sew_resnet as jelly_sew


# --------------------------------------------------------------------------------------------------------------
# Every family
# --------------------------------------------------------------------------------------------------------------

# Micro-models and their variants: one of each kind of block.
NETS = [
    ("test_sew_resnet", {}),
    ("test_sew_resnet", {"bottleneck": True, "connect": "iand", "stem": "conv7"}),
    ("test_ms_resnet", {}),
    ("test_ms_resnet", {"stem": "conv3x3", "pooled_shortcut": True, "depths": (1, 1, 1)}),
    ("test_spikingformer", {}),
    ("test_sdt", {}),
    ("test_qkformer", {}),
    ("test_qkformer", {"layout": "imagenet", "img_size": 64}),
    ("test_spikingresformer", {}),
    ("test_spikingresformer", {"stem": "conv7", "img_size": 64}),
    ("test_plif", {}),
    ("test_plif", {"pooling": "avg", "bias": True, "neuron": "lif", "threshold": 0.5}),
    ("test_sew_resnet", {"connect": "and", "depths": (1, 1, 1), "threshold": 0.1}),
    ("test_ms_resnet", {"norm": "tebn", "depths": (1, 1, 1)}),
    ("test_metaspikeformer", {}),
]


def frames(model, T=3, batch=2, dtype=torch.float32):
    return wave((batch, T, model.in_chans, *model.img_size), 11).to(dtype)


@pytest.mark.parametrize(("name", "arguments"), NETS)
@torch.no_grad()
def test_samples_do_not_know_each_other(name, arguments):
    model = make(name, T=2, **arguments).double().eval()
    x = wave((4, *model.input_shape), 7)
    logits = model(x)
    torch.testing.assert_close(model(x[[2, 0, 3, 1]]), logits[[2, 0, 3, 1]], rtol=0, atol=1e-9)
    torch.testing.assert_close(model(x[1:2]), logits[1:2], rtol=0, atol=1e-9)
    assert (logits[0] - logits[1]).abs().max() > 1e-6


@pytest.mark.parametrize(("name", "arguments"), NETS)
@torch.no_grad()
def test_deployed_and_folded(name, arguments, monkeypatch, caplog):
    monkeypatch.setattr("shutil.which", lambda _name: None)  # without a compiler, whose minutes it need not wait for
    model = make(name, T=2, **arguments).eval()
    x = image_for(model, 3)
    exact = spikezoo.deploy(model, "exact")
    assert torch.equal(exact(x), model(x)) and torch.equal(exact.model.forward_sequence(x), model.forward_sequence(x))
    for precision in ("bf16", "int8"):
        assert spikezoo.deploy(model, precision, example=x)(x).isfinite().all()
    model = model.double()
    folded = spikezoo.fold_bn(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x.double()), model(x.double()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", sorted({name for name, _ in NETS}))
@torch.no_grad()
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    # The exporter takes a second for a few layers, and as long again for their neurons' second step.
    long = name in ("test_metaspikeformer", "test_qkformer", "test_spikingresformer")
    model = make(name, T=1 if long else 2, **SHORTER.get(name, {})).eval()
    x = image_for(model, 3)
    session = runtime.InferenceSession(spikezoo.export(model, tmp_path / "net.onnx", x))
    logits = torch.from_numpy(session.run(None, {"input": x[:2].numpy()})[0])
    torch.testing.assert_close(logits, model(x[:2]), rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------
# Official state dicts: independent nets of SpikingJelly's layers with the official names, the same random weights
# --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def randomise(net):
    """Fill a net of any layout so that its layers fire; scales of both signs."""
    for index, (_, module) in enumerate(sorted(net.named_modules())):
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            value = wave(tensor.shape, index) if tensor.is_floating_point() else tensor
            if name == "running_var":
                value = 0.7 + 0.5 * value
            elif hasattr(module, "running_var") and name == "weight":
                value = 2 + 2.2 * value
            elif hasattr(module, "running_var") and name == "bias":
                value = 1 + value
            elif tensor.dim() > 1:
                value = 1.5 * value / math.sqrt(tensor[0].numel())
            tensor.copy_(value)
    return net.double().eval()


def same(name, official, logits, path, state=None, **arguments):
    """Whether a model with an official net's weights, loaded by path, gives its logits; returns the model."""
    torch.save({"model": official.state_dict() if state is None else state, "epoch": 3}, path)
    model = spikezoo.create_model(name, checkpoint_path=path, dtype=torch.float64, **arguments).eval()
    spread = 0.0
    with torch.no_grad():
        for T in (1, 4):
            x = wave((2, T, *model.input_shape[-3:]), 5)
            wanted = logits(x.transpose(0, 1))
            rates = firing_rates(model, x).values()
            assert max(rate.mean() for rate in rates) < 0.99 and sum(rate.mean() > 0.01 for rate in rates) > 0.8 * len(
                rates
            )
            torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
            spread += wanted.std(0).max().item()
    assert spread > 0.01
    own = model.state_dict()
    filtered = checkpoint_filter(name)(own, model)
    assert filtered.keys() == own.keys() and all(filtered[key] is value for key, value in own.items())
    return model


def checkpoint_filter(name):
    module = spikezoo.model_info(name).family
    return getattr(spikezoo.models, module).checkpoint_filter_fn


# Not the last pair: SpikingJelly's Bottleneck has the operands of 'IAND' the other way round than the authors'.
@pytest.mark.parametrize(
    ("block", "connect"), [(b, c) for b in ("BasicBlock", "Bottleneck") for c in ("add", "and", "iand")][:-1]
)
def test_official_sew_resnet(block, connect, tmp_path):
    threshold = 0.2 if connect == "and" else 1.0  # a product of few spikes is none
    kwargs = {"surrogate_function": surrogate.ATan(), "detach_reset": True, "v_threshold": threshold}
    official = jelly_sew.SEWResNet(
        getattr(jelly_sew, block),
        [2, 1, 1, 1],
        num_classes=5,
        cnf=connect.upper(),
        spiking_neuron=neuron.IFNode,
        **kwargs,
    )
    functional.set_step_mode(randomise(official), "m")
    state = official.state_dict()
    if (
        connect == "and" or block == "Bottleneck"
    ):  # as the authors' code names them, which has containers; saved from several processes
        contained = {}
        for key, value in state.items():
            key = re.sub(r"(layer.*)\.(conv|bn)(\d)\.", lambda m: f"{m[1]}.conv{m[3]}.module.{int(m[2] == 'bn')}.", key)
            contained["module." + key.replace("downsample.", "downsample.0.module.")] = value
        state = contained

    def logits(x):
        functional.reset_net(official)
        return official(x).mean(0)

    arguments = {"depths": (2, 1, 1, 1), "num_classes": 5, "img_size": 32, "connect": connect, "threshold": threshold}
    same("sew_resnet18", official, logits, tmp_path / "w.pth", state, bottleneck=block == "Bottleneck", **arguments)


class Sum(nn.Module):
    """Two ways through a block, added."""

    def __init__(self, **branches):
        super().__init__()
        for name, layers in branches.items():
            self.add_module(name, nn.Sequential(*layers))

    def forward(self, x):
        first, second = self.children()
        return first(x) + second(x)


class Steps(nn.Module):
    """A net of SpikingJelly's layers for sequences; its parts run in order, then mean over map and time, classifier."""

    def __init__(self, *, classes, features, last="fc", **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part if isinstance(part, nn.Module) else nn.Sequential(*part))
        self.parts, self.last = list(parts), last
        self.add_module(last, nn.Linear(features, classes))
        functional.set_step_mode(self, "m")

    def forward(self, x):
        functional.reset_net(self)
        for name in self.parts:
            x = self.get_submodule(name)(x)
        return self.get_submodule(self.last)(x.flatten(3).mean(3).mean(0))


def official_ms(stem, pooled):
    def norm(channels):
        return nn.Sequential(collections.OrderedDict(bn=layer.BatchNorm2d(channels)))

    def fire():
        return neuron.LIFNode(tau=4 / 3, decay_input=False, v_threshold=0.5)

    def block(a, b, stride):
        branch = [fire(), layer.Conv2d(a, b, 3, stride, 1, bias=False), norm(b), fire()]
        branch += [layer.Conv2d(b, b, 3, 1, 1, bias=False), norm(b)]
        pool = [layer.AvgPool2d(2)] if pooled else []
        conv = layer.Conv2d(a, b, 1, 1 if pooled else stride, bias=False)
        return Sum(residual_function=branch, shortcut=[] if (a, stride) == (b, 1) else [*pool, conv, norm(b)])

    convs = [layer.Conv2d(3, 8, 7, 2, 3, bias=False)]
    if stem == "conv3x3":
        convs = [layer.Conv2d(a, 8, 3, s, 1) for a, s in ((3, 2), (8, 1), (8, 1))]
    stages = {"conv2_x": [block(8, 8, 2), block(8, 8, 1)], "conv3_x": [block(8, 12, 2)], "end": [fire()]}
    return Steps(conv1=[*convs, norm(8)], **stages, features=12, classes=5)


@pytest.mark.parametrize(("stem", "pooled"), [("conv7", False), ("conv3x3", True)])
def test_official_ms_resnet(stem, pooled, tmp_path):
    official = randomise(official_ms(stem, pooled))
    layout = {"widths": (8, 12), "depths": (2, 1), "strides": (2, 2), "stem": stem, "pooled_shortcut": pooled}
    same("test_ms_resnet", official, official, tmp_path / "w.pth", num_classes=5, **layout)


@pytest.mark.parametrize("theirs", ["authors", "spikingjelly"])
def test_official_plif_net(theirs, tmp_path):
    official = parametric_lif_net.CIFAR10Net(channels=6, spiking_neuron=neuron.ParametricLIFNode, detach_reset=True)
    functional.set_step_mode(randomise(official), "m")
    with torch.no_grad():  # these neurons take half of their current, and no norms help the linear layers
        for part in official.modules():
            if isinstance(part, nn.Linear | nn.BatchNorm2d):
                part.weight *= 8 if isinstance(part, nn.Linear) else 2
                part.bias += 1
    state = official.state_dict()
    if theirs == "authors":  # they cut the sequence in three, and count the layers of each from 0
        cuts = [("static_conv", 0), ("conv", 2), ("fc", 20)]
        numbers = {name: int(name.split(".")[1]) for name in state}
        parts = {name: next(cut for cut in reversed(cuts) if cut[1] <= number) for name, number in numbers.items()}
        state = {f"{parts[n][0]}.{numbers[n] - parts[n][1]}.{n.split('.')[2]}": value for n, value in state.items()}

    def logits(x):
        functional.reset_net(official)
        return official(x).mean(0)

    same("plif_cifar10", official, logits, tmp_path / "w.pth", state, widths=((6,) * 3,) * 2, bias=True)


class OfficialFormer(nn.Module):
    """Spikingformer ('cifar' or 'imagenet' names) or SDT of SpikingJelly's neurons, 1x1 convolutions as the code's."""

    def __init__(self, kind, dim=16, depth=2, heads=2, ratio=2, classes=5, pools=(False, False, True, True)):
        super().__init__()
        self.kind, self.heads, self.pools = kind, heads, pools
        widths = [3, dim // 8, dim // 4, dim // 2, dim, dim]
        first = {"cifar": [f"block{i}_%s" for i in range(5)], "imagenet": [f"proj{i or ''}_%s" for i in range(5)]}
        self.names = first.get(kind, [*(f"proj_%s{i or ''}" for i in range(4)), "rpe_%s"])
        self.patch_embed = nn.Module()
        for name, (a, b) in zip(self.names, itertools.pairwise(widths), strict=True):
            self.patch_embed.add_module(name % "conv", nn.Conv2d(a, b, 3, padding=1, bias=False))
            self.patch_embed.add_module(name % "bn", nn.BatchNorm2d(b))
        flat, one = kind != "sdt", nn.Conv2d if kind == "sdt" else nn.Conv1d
        norm = nn.BatchNorm1d if flat else nn.BatchNorm2d
        self.fc = "fc" if kind == "sdt" else "mlp"
        self.block = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.attn, block.mlp = nn.Module(), nn.Module()
            for part in ("q", "k", "v", "proj"):
                block.attn.add_module(f"{part}_conv", one(dim, dim, 1, bias=part == "proj"))
                block.attn.add_module(f"{part}_bn", norm(dim))
            for number, (a, b) in enumerate(((dim, ratio * dim), (ratio * dim, dim)), 1):
                block.mlp.add_module(f"{self.fc}{number}_conv", nn.Conv2d(a, b, 1))
                block.mlp.add_module(f"{self.fc}{number}_bn", nn.BatchNorm2d(b))
            if kind == "sdt":
                block.attn.talking_heads = nn.Conv1d(heads, heads, 1, bias=False)
            else:
                block.norm1 = nn.LayerNorm(dim)
            self.block.append(block)
        self.head = nn.Linear(dim, classes)

    @staticmethod
    def layer(part, name, x, names=("conv", "bn")):
        conv, norm = (part.get_submodule(name % word if "%" in name else f"{name}_{word}") for word in names)
        y = x.flatten(0, 1)
        y = norm(conv(y.flatten(2))).unflatten(2, x.shape[3:]) if isinstance(conv, nn.Conv1d) else norm(conv(y))
        return y.unflatten(0, x.shape[:2])

    def attend(self, part, x):
        q, k, v = (fire(self.layer(part, name, x)) for name in "qkv")
        if self.kind == "sdt":
            return self.layer(part, "proj", q * fire((k * v).sum((3, 4), keepdim=True), v_threshold=0.5))
        q, k, v = (z.flatten(3).unflatten(2, (self.heads, -1)).transpose(3, 4) for z in (q, k, v))
        y = (q @ k.transpose(3, 4)) @ v * 0.125
        return self.layer(part, "proj", fire(y.transpose(3, 4).reshape(x.shape), v_threshold=0.5))

    def forward(self, x):
        def pool(x):
            return nn.functional.max_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, x.shape[:2])

        for index, (name, pooled) in enumerate(zip(self.names, (*self.pools, False), strict=True)):
            y = self.layer(self.patch_embed, name, x)
            if self.kind == "sdt" and index == 3:
                y = y if not pooled else pool(y)
                x = stream = y  # potentials, which the fifth convolution's are added to
                x = fire(x)
                continue
            y = fire(y) if index < 4 else y
            x = pool(y) if pooled else y
        x = x + stream if self.kind == "sdt" else x
        for block in self.block:
            x = x + self.attend(block.attn, fire(x))
            x = x + self.layer(block.mlp, f"{self.fc}2", fire(self.layer(block.mlp, f"{self.fc}1", fire(x))))
        x = x.flatten(3).mean(3)
        return self.head((fire(x) if self.kind == "sdt" else x).mean(0))


def fire(x, **constants):
    return neuron.LIFNode(step_mode="m", detach_reset=True, **constants)(x)


@pytest.mark.parametrize("kind", ["cifar", "imagenet", "sdt"])
def test_official_transformers(kind, tmp_path):
    official = randomise(OfficialFormer(kind))
    with torch.no_grad():  # these neurons take half of their current
        for part in official.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.weight *= 3
                part.bias += 1
    state = {f"module.{name}": value for name, value in official.state_dict().items()}
    # Of few tokens, for the last neuron sees their average, in which large maps are alike.
    arguments = {"num_classes": 5, "depth": 2, "heads": 2, "mlp_ratios": 2, "img_size": 8, "qkv_bias": False}
    same(
        "test_sdt" if kind == "sdt" else "test_spikingformer",
        official,
        official,
        tmp_path / "w.pth",
        state,
        **arguments,
    )


class OfficialRep(nn.Module):
    """RepConv with the official names: the middle norm pads with its own answer to zero."""

    def __init__(self, dim):
        super().__init__()
        pad = nn.Module()
        pad.bn = nn.BatchNorm2d(dim)
        depthwise = nn.Conv2d(dim, dim, 3, groups=dim, bias=False)
        last = nn.Sequential(depthwise, nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim))
        self.body = nn.ModuleList([nn.Conv2d(dim, dim, 1, bias=False), pad, last])

    def forward(self, x):
        norm = self.body[1].bn
        x = norm(self.body[0](x))
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        padded = (norm.bias - norm.running_mean * scale).view(1, -1, 1, 1)
        padded = padded.repeat(len(x), 1, x.shape[2] + 2, x.shape[3] + 2)
        padded[..., 1:-1, 1:-1] = x
        return self.body[2](padded)


class OfficialMeta(nn.Module):
    """Meta-SpikeFormer of few channels with the official names and a second classifier for a teacher."""

    def __init__(self, widths=(4, 6, 8, 8, 16), heads=2, ratio=2, classes=5):
        super().__init__()
        self.heads = heads
        names = ("1_1", "1_2", "2", "3", "4")
        for index, (a, b) in enumerate(itertools.pairwise((3, *widths))):
            down = nn.Module()
            kernel, stride = (7, 2) if index == 0 else (3, 2 if index < 4 else 1)
            down.encode_conv = nn.Conv2d(a, b, kernel, stride, kernel // 2)
            down.encode_bn = nn.BatchNorm2d(b)
            self.add_module(f"downsample{names[index]}", down)
        for name, dim in (("1_1", widths[0]), ("1_2", widths[1]), ("2_1", widths[2]), ("2_2", widths[2])):
            block = nn.Module()
            block.Conv = nn.Module()
            block.Conv.pwconv1, block.Conv.bn1 = nn.Conv2d(dim, 2 * dim, 1, bias=False), nn.BatchNorm2d(2 * dim)
            block.Conv.dwconv = nn.Conv2d(2 * dim, 2 * dim, 7, padding=3, groups=2 * dim, bias=False)
            block.Conv.pwconv2, block.Conv.bn2 = nn.Conv2d(2 * dim, dim, 1, bias=False), nn.BatchNorm2d(dim)
            block.conv1, block.bn1 = nn.Conv2d(dim, ratio * dim, 3, padding=1, bias=False), nn.BatchNorm2d(ratio * dim)
            block.conv2, block.bn2 = nn.Conv2d(ratio * dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)
            self.add_module(f"ConvBlock{name}", nn.ModuleList([block]))
        for name, dim in (("block3", widths[3]), ("block4", widths[4])):
            block = nn.Module()
            block.attn, block.mlp = nn.Module(), nn.Module()
            for part in ("q", "k", "v", "proj"):
                block.attn.add_module(f"{part}_conv", nn.Sequential(OfficialRep(dim), nn.BatchNorm2d(dim)))
            block.mlp.fc1_conv, block.mlp.fc1_bn = nn.Conv1d(dim, ratio * dim, 1), nn.BatchNorm1d(ratio * dim)
            block.mlp.fc2_conv, block.mlp.fc2_bn = nn.Conv1d(ratio * dim, dim, 1), nn.BatchNorm1d(dim)
            self.add_module(name, nn.ModuleList([block]))
        self.head, self.head_kd = nn.Linear(widths[-1], classes), nn.Linear(widths[-1], classes)

    @staticmethod
    def each(x, *layers):
        return nn.Sequential(*layers)(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def down(self, name, x):
        part = self.get_submodule(f"downsample{name}")
        return self.each(x, part.encode_conv, part.encode_bn)

    def conv_block(self, name, x):
        part = self.get_submodule(f"ConvBlock{name}.0")
        y = fire(self.each(fire(x), part.Conv.pwconv1, part.Conv.bn1))
        x = x + self.each(y, part.Conv.dwconv, part.Conv.pwconv2, part.Conv.bn2)
        return x + self.each(fire(self.each(fire(x), part.conv1, part.bn1)), part.conv2, part.bn2)

    def block(self, part, x):
        spikes = fire(x)
        q, k, v = (fire(self.each(spikes, part.attn.get_submodule(f"{name}_conv"))) for name in "qkv")
        q, k, v = (z.flatten(3).unflatten(2, (self.heads, -1)).transpose(3, 4) for z in (q, k, v))
        y = q @ (k.transpose(3, 4) @ v) * 0.125
        x = x + self.each(fire(y.transpose(3, 4).reshape(x.shape), v_threshold=0.05), part.attn.proj_conv)
        y = fire(self.each(fire(x.flatten(3)), part.mlp.fc1_conv, part.mlp.fc1_bn))
        return x + self.each(y, part.mlp.fc2_conv, part.mlp.fc2_bn).unflatten(3, x.shape[3:])

    def forward(self, x):
        x = self.conv_block("1_1", self.down("1_1", x))
        x = self.conv_block("1_2", self.down("1_2", fire(x)))
        x = self.conv_block("2_2", self.conv_block("2_1", self.down("2", fire(x))))
        x = self.block(self.block3[0], self.down("3", fire(x)))
        x = self.block(self.block4[0], self.down("4", fire(x)))
        x = fire(x.flatten(3).mean(3)).mean(0)
        return (self.head(x) + self.head_kd(x)) / 2


def test_official_metaspikeformer(tmp_path):
    official = randomise(OfficialMeta())
    with torch.no_grad():  # these neurons take half of their current
        for part in official.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.weight *= 3
                part.bias += 2
    arguments = {"num_classes": 5, "depths": (1, 1, 2, 1, 1), "img_size": 32}
    same("test_metaspikeformer", official, official, tmp_path / "w.pth", **arguments)


# --------------------------------------------------------------------------------------------------------------
# SEW-ResNet
# --------------------------------------------------------------------------------------------------------------


def test_sew_resnets_have_the_plain_resnets_counts():
    for depth in (18, 34, 50, 101, 152):
        plain = sum(p.numel() for p in timm.create_model(f"resnet{depth}", device="meta").parameters())
        assert spikezoo.model_info(f"sew_resnet{depth}").parameters == plain


@pytest.mark.parametrize("connect", ["add", "and", "iand"])
@torch.no_grad()
def test_sew_block_by_hand(connect):
    model = make("test_sew_resnet", T=2, connect=connect).double().eval()
    block, x = model.stages[1][0], (wave((2, 1, 8, 6, 6), 3) > 0).double() * 2
    y, short = block.branch(x), block.shortcut(x)
    assert {*y.unique().tolist(), *short.unique().tolist()} == {0, 1}
    out = {"add": y + short, "and": y.logical_and(short), "iand": y.logical_not().logical_and(short)}[connect]
    assert torch.equal(block(x), out.double())


@torch.no_grad()
def test_sew_stream_counts_in_whole_spikes():
    model = make("test_sew_resnet", T=2).eval()
    x = image_for(model)
    levels = model.forward_intermediates(x, intermediates_only=True, time_mean=False)
    assert levels[1].max() == 3 and torch.equal(levels[1], levels[1].round())  # the stem's spike and two blocks'
    c = spikezoo.count(model, x)
    assert c.uncounted == {} and c.macs_exact == 3 * 9 * 8 * 32 * 32  # the stem alone
    rows = c.by_module
    assert (
        rows["stages.0.1.branch.0.conv"].input == "integer spikes"
        and rows["stages.0.0.branch.0.conv"].input == "spikes"
    )
    # A 1x1 convolution of stride 2: every second row and column of the stream, an event of two counted twice.
    assert rows["stages.1.0.shortcut.conv"].sops_exact == levels[1][..., ::2, ::2].sum().item() * 12 / 2
    assert rows["stages.1.0.shortcut.conv"].sops_paper == pytest.approx(levels[1].mean().item() * 2 * 8 * 12 * 16 * 16)


def test_sew_starts_as_the_identity():
    for connect, bias in (("add", 0), ("and", 1), ("iand", 0)):
        model = spikezoo.create_model("test_sew_resnet", connect=connect, zero_init_residual=True)
        norm = model.stages[0][0].branch[-1].norm
        assert not norm.weight.any() and bool((norm.bias == bias).all())
    model = spikezoo.create_model("test_sew_resnet", connect="and", zero_init_residual=True).eval()
    x = (torch.rand(2, 1, 8, 4, 4) > 0.5).float()
    assert torch.equal(model.stages[0][0](x), x)


def test_sew_arguments_teach():
    with pytest.raises(ValueError, match=r"connect='or' does not exist\. Did you mean 'and'|Valid: add, and, iand"):
        spikezoo.create_model("test_sew_resnet", connect="or")
    with pytest.raises(ValueError, match=r"stem='conv5' does not exist\. Did you mean 'conv[37]'"):
        spikezoo.create_model("test_sew_resnet", stem="conv5")


# --------------------------------------------------------------------------------------------------------------
# MS-ResNet
# --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ms_block_by_hand():
    model = make("test_ms_resnet", T=2).eval()
    x = image_for(model)
    c, rows = spikezoo.count(model, x), spikezoo.count(model, x).by_module
    levels = model.forward_intermediates(x, intermediates_only=True, time_mean=False)
    assert c.uncounted == {} and not torch.equal(levels[1], levels[1].round())  # currents
    # The branch takes spikes; a shortcut with a convolution takes the current at both steps, as multiplications. The
    # image passes the stem once.
    assert rows["stages.1.0.conv1.conv"].input == "spikes" and rows["stages.1.0.shortcut.0.conv"].input == "analog"
    shortcuts = 2 * (8 * 12 * 16 * 16 + 12 * 16 * 8 * 8)
    assert c.macs_exact == 3 * 9 * 8 * 32 * 32 + shortcuts
    # By hand: the neuron's potential 0.25 v + x over its threshold, of what the stem puts out at every step.
    v, spikes = 0, []
    for current in levels[0]:
        v = 0.25 * v + current
        spikes.append((v > 0.5).float())
        v = v * (1 - spikes[-1])
    block = model.stages[0][0]
    assert torch.equal(block.neuron(levels[0]), torch.stack(spikes))
    assert torch.equal(block(levels[0]), block.conv2(block.conv1(torch.stack(spikes))) + levels[0])
    events = torch.stack(spikes).sum().item()
    inner = nn.functional.conv2d(torch.stack(spikes).flatten(0, 1), torch.ones(8, 8, 3, 3), padding=1).sum().item()
    assert events and rows["stages.0.0.conv1.conv"].sops_exact == inner / 2


def test_ms_stem_runs_once():
    model = make("test_ms_resnet", T=4, stem="conv3x3").eval()
    calls = []
    for conv in model.stem:
        conv.register_forward_pre_hook(lambda _m, inputs: calls.append(len(inputs[0])))
    model(image_for(model))
    assert calls == [1, 1, 1]


# --------------------------------------------------------------------------------------------------------------
# PLIF nets
# --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ten_neurons_a_class_vote():
    model = make("test_plif", T=3, num_classes=4, drops=(0.5, 0.5)).double().eval()
    model.head.fc.weight.copy_(spikezoo.create_model("test_plif", num_classes=4).head.fc.weight)
    x = image_for(model, dtype=torch.float64)
    spikes = model.forward_sequence(x)[..., 0, 0]  # [T, B, 40]
    assert spikes.shape == (3, 2, 40) and {*spikes.unique().tolist()} == {0, 1}
    torch.testing.assert_close(model(x), spikes.unflatten(2, (4, 10)).mean((0, 3)))
    assert "head.fc.weight" not in dict(model.named_parameters()) and len(model.no_weight_decay()) == 6
    model.reset_classifier(3)  # new classes have no neurons of their own: the layer learns
    assert "head.fc.weight" in dict(model.named_parameters()) and model(x).shape == (2, 3)
    # Dropout is the same at all steps.
    drop = model.neck[0].train()
    kept = drop(torch.ones(5, 2, 400, 1, 1))
    assert {*kept.unique().tolist()} == {0, 2} and bool((kept == kept[0]).all())


@torch.no_grad()
def test_plif_layer_by_hand():
    model = make("test_plif", T=3).double().eval()
    v, spikes = 0, []
    part = model.stages[1][0]
    for x in part.norm(part.conv(wave((6, 6, 16, 16), 1))).unflatten(0, (3, 2)):
        v = v + (x - v) * torch.sigmoid(part.neuron.w)
        spikes.append((v >= 0.5).double())
        v = v * (1 - spikes[-1])
    assert torch.equal(part(wave((3, 2, 6, 16, 16), 1)), torch.stack(spikes)) and torch.stack(spikes).any()
    x = image_for(model, 1, torch.float64)
    rows = spikezoo.count(model, x).by_module
    events = model.neck[1](model.neck[0](model.forward_intermediates(x, intermediates_only=True, time_mean=False)[-1]))
    assert rows["neck.3.linear"].sops_exact == events.sum().item() * 100
    assert rows["neck.3.linear"].input == "spikes" and spikezoo.count(model, x).uncounted == {}


# --------------------------------------------------------------------------------------------------------------
# Spikingformer and Spike-driven Transformer
# --------------------------------------------------------------------------------------------------------------


def test_transformers_counts_by_hand():
    # As Spikformer's without biases of q, k and v; the official counts of SDT hold 64 unused weights a block more.
    for name, (dim, depth, classes) in {
        "spikingformer_4_384": (384, 4, 10), "spikingformer_8_768": (768, 8, 1000),
        "sdt_2_256": (256, 2, 10), "sdt_8_384": (384, 8, 1000), "sdt_8_768": (768, 8, 1000),
    }.items():  # fmt: skip
        widths = [3, dim // 8, dim // 4, dim // 2, dim, dim]
        stem = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(widths))
        block = 12 * dim * dim + (4 * 2 + 1) * dim + 4 * 3 * dim + 3 * dim
        assert spikezoo.model_info(name).parameters == stem + depth * block + (dim + 1) * classes


@torch.no_grad()
def test_spikes_alone_enter_the_convolutions():
    for name in ("test_spikingformer", "test_sdt"):
        model = make(name, T=2).eval()
        c = spikezoo.count(model, image_for(model))
        layers = {n: row for n, row in c.by_module.items() if row.weights and not n.startswith("head")}
        analog = [n for n, row in layers.items() if row.input == "analog"]
        assert analog == ["stem.0.conv"] and c.uncounted == {}
        products = [n for n, row in c.by_module.items() if "matmul" in row.ops or "bmm" in row.ops]
        assert bool(products) == (name == "test_spikingformer")
    # Of masks and sums nothing is multiplied: the additions are the spikes that are left of keys and values.
    x = image_for(model)
    seen = []
    attention = model.stages[0][0].attn
    for part in (attention.k, attention.v):
        part.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(x)
    row = c.by_module["stages.0.0.attn"]
    assert (row.macs, row.macs_exact) == (0, 0) and row.sops_exact == (seen[0] * seen[1]).sum().item() / 2


@torch.no_grad()
def test_mask_attention_by_hand():
    model = make("test_sdt", T=2).double().eval()
    attention = model.stages[0][0].attn
    x = model.stem(image_for(model, 1, torch.float64)[None], 2)
    spikes = attention.neuron_in(x)
    q, k, v = attention.q(spikes), attention.k(spikes), attention.v(spikes)
    potential, masks = torch.zeros(1, 16), []
    for t in range(2):  # tau 2, threshold 0.5: a channel passes where keys and values meet often enough
        potential = potential + (k[t].logical_and(v[t]).sum((2, 3)) - potential) / 2
        masks.append((potential >= 0.5).double())
        potential = potential * (1 - masks[-1])
    masks = torch.stack(masks)
    assert 0 < masks.mean() < 1
    assert torch.equal(attention(x), attention.proj(q * masks[..., None, None]))
    heads = [spikezoo.create_model("test_sdt", heads=h, device="meta") for h in (1, 4)]
    assert heads[0].state_dict().keys() == heads[1].state_dict().keys()
    with pytest.raises(ValueError, match=r"residual='spike'.*membrane"):
        spikezoo.create_model("test_sdt", residual="spike")


# --------------------------------------------------------------------------------------------------------------
# Meta-SpikeFormer
# --------------------------------------------------------------------------------------------------------------


def test_metaspikeformer_counts_by_hand():
    # As the official code counts them: its functions 8_384 and 8_512; 8_256 has the channels of its other repositories.
    for name, (a, b, c, d, e) in {
        "metaspikeformer_8_256": (32, 64, 128, 256, 360),
        "metaspikeformer_8_384": (48, 96, 192, 384, 480),
        "metaspikeformer_8_512": (64, 128, 256, 512, 640),
    }.items():
        down = 49 * 3 * a + sum(9 * i * o for i, o in itertools.pairwise((a, b, c, d, e))) + 3 * (a + b + c + d + e)
        convs = sum(2 * 2 * n * n + 49 * 2 * n + 3 * 2 * n + 2 * 36 * n * n + 5 * 2 * n for n in (a, b, c, c))
        rep = [2 * n * n + 9 * n + 3 * 2 * n for n in (d, e)]
        mlp = [2 * 4 * n * n + 5 * n + 5 * 2 * n for n in (d, e)]
        total = down + convs + sum(many * (4 * r + m) for many, r, m in zip((6, 2), rep, mlp, strict=True))
        assert spikezoo.model_info(name).parameters == total + 1000 * (e + 1)
        model = spikezoo.create_model(name, device="meta")
        assert (model.T, model.neuron_config.tau, model.neuron_config.detach_reset) == (1, 2.0, True)


@torch.no_grad()
def test_rep_conv_is_one_convolution_of_spikes():
    model = make("test_metaspikeformer", T=2).eval()
    x = image_for(model)
    rep, spikes = model.stages[4][2].attn.q.conv.double(), (wave((2, 16, 4, 4), 3) > 0).double()
    torch.testing.assert_close(rep.merged()(spikes), rep(spikes), rtol=0, atol=1e-12)
    # In training the statistics are those of the map, without its border, which is what the norm makes of zero.
    current = rep.conv1(spikes)[..., 1:-1, 1:-1]
    mean, var = current.mean((0, 2, 3)), current.var((0, 2, 3))
    norm = rep.norm1
    running = 0.9 * norm.running_mean + 0.1 * mean, 0.9 * norm.running_var + 0.1 * var
    inner = (current - mean.view(-1, 1, 1)) / (var * 31 / 32 + norm.eps).sqrt().view(-1, 1, 1)
    inner = inner * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    border = norm.bias - running[0] * norm.weight / (running[1] + norm.eps).sqrt()
    padded = border.view(1, -1, 1, 1).expand(2, -1, 6, 6).clone()
    padded[..., 1:-1, 1:-1] = inner
    wanted = nn.functional.batch_norm(
        rep.conv3(rep.conv2(padded)), None, None, rep.norm2.weight, rep.norm2.bias, True, 0, rep.norm2.eps
    )
    torch.testing.assert_close(rep.train()(spikes), wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(norm.running_var, running[1])
    # Folded, spikes alone enter the attention's convolutions; a depthwise convolution's sums enter the next one.
    folded = spikezoo.fold_bn(make("test_metaspikeformer", T=2))
    for net, analog in ((model.float().eval(), 4 + 2 * 4 * 2), (folded, 4)):
        c = spikezoo.count(net, x)
        layers = {n: row for n, row in c.by_module.items() if row.weights and not n.startswith("head")}
        found = [n for n, row in layers.items() if row.input == "analog"]
        assert len(found) == analog and c.uncounted == {}
        assert [n for n in found if ".attn." not in n and "pointwise2" not in n] == ["stem.0.conv"]


@torch.no_grad()
def test_metaspikeformer_blocks_by_hand():
    model = make("test_metaspikeformer", T=2).double().eval()
    x = image_for(model, 1, torch.float64)
    rows = spikezoo.count(model, x).by_module
    stem, *levels = model.forward_intermediates(x, intermediates_only=True, time_mean=False)

    def spikes(currents):  # tau 2, threshold 1
        v, out = 0, []
        for current in currents:
            v = v + (current - v) / 2
            out.append((v >= 1).double())
            v = v * (1 - out[-1])
        return torch.stack(out)

    block, first = model.stages[0][0], spikes(stem)
    y = block.pointwise1.conv(first.flatten(0, 1))
    y = spikes(block.pointwise1.norm(y).unflatten(0, (2, 1))).flatten(0, 1)
    y = stem + block.pointwise2.norm(block.pointwise2.conv(block.depthwise(y))).unflatten(0, (2, 1))
    second = spikes(y)
    torch.testing.assert_close(levels[0], y + block.conv2(block.conv1(second)), rtol=0, atol=1e-12)
    assert first.any() and rows["stages.0.0.pointwise1.conv"].sops_exact == first.sum().item() * 8
    reach = nn.functional.conv2d(second.flatten(0, 1), torch.ones(8, 4, 3, 3).double(), padding=1)
    assert rows["stages.0.0.conv1.conv"].sops_exact == reach.sum().item()
    down = spikes(levels[0])
    strided = nn.functional.conv2d(down.flatten(0, 1), torch.ones(6, 4, 3, 3).double(), stride=2, padding=1)
    assert rows["stages.1.1.conv"].sops_exact == strided.sum().item()

    attn = model.stages[4][2].attn
    x = model.stages[4][1](model.stages[4][0](levels[3]))
    inside = spikes(x)
    q, k, v = (layer(inside)[:, 0].flatten(2).unflatten(1, (2, 8)) for layer in (attn.q, attn.k, attn.v))
    product = torch.stack([q[t, h].T @ (k[t, h] @ v[t, h].T) for t in range(2) for h in range(2)]).unflatten(0, (2, 2))
    current, potential, out = product.transpose(2, 3).reshape(2, 1, *x.shape[2:]) * 0.125, 0, []
    for step in current:
        potential = potential + (step - potential) / 2
        out.append((potential >= 0.05).double())
        potential = potential * (1 - out[-1])
    assert 0 < torch.stack(out).mean() < 1
    torch.testing.assert_close(attn(x), attn.proj(torch.stack(out)), rtol=0, atol=1e-12)
    assert rows["stages.4.2.attn.q.conv.conv1"].sops_exact == inside.sum().item() * 16


def test_metaspikeformer_arguments_teach():
    with pytest.raises(ValueError, match=r"strides=\(2, 2\): expected five whole numbers"):
        spikezoo.create_model("test_metaspikeformer", strides=(2, 2))
    with pytest.raises(
        ValueError, match=r"heads=3: heads must divide the last two, and 8 is no multiple of it: take 9"
    ):
        spikezoo.create_model("test_metaspikeformer", heads=3)
