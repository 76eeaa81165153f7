"""Tests of QKFormer and SpikingResformer: official names and logits, counts and attention by hand, what NIR says."""

import copy

import pytest
import torch
from test_models import image_for, make, wave
from test_neighbours import OfficialFormer, fire, neuron, randomise, same
from torch import nn

import spikezoo


def conv_bn(parent, name, a, b, kernel, stride=1, bias=False, flat=False):
    """A convolution and its norm, NAME_conv and NAME_bn of a module, as the official code names them."""
    one = nn.Conv1d(a, b, 1, bias=bias) if flat else nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=bias)
    parent.add_module(f"{name}_conv", one)
    parent.add_module(f"{name}_bn", nn.BatchNorm1d(b) if flat else nn.BatchNorm2d(b))


class OfficialQKFormer(nn.Module):
    """QKFormer of SpikingJelly's neurons with the names of the code for ImageNet or CIFAR; no neuron sees the batch."""

    def __init__(self, kind, widths=(8, 12, 16), depths=(1, 2, 1), heads=2, classes=5):
        super().__init__()
        self.early, self.heads = kind == "imagenet", heads
        self.fc = "fc" if self.early else "mlp"
        before = widths[0] // 2
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
            embed, blocks = nn.Module(), nn.ModuleList()
            names = ["proj3", "proj4"] if stage > 1 else ["proj1", "proj2"][: 1 + self.early]
            if stage == 1:
                conv_bn(embed, "proj", 3, before, 3)
            conv_bn(embed, "proj_res", before, width, 1, 2 if self.early or stage > 1 else 1)
            for name in names:
                conv_bn(embed, name, before, width, 3)
                before = width
            for _ in range(depth):
                block, attn, mlp = nn.Module(), nn.Module(), nn.Module()
                for name in ("q", "k", "proj") if stage < 3 else ("q", "k", "v", "proj"):
                    conv_bn(attn, name, width, width, 1, bias=name == "proj", flat=True)
                conv_bn(mlp, f"{self.fc}1", width, 2 * width, 1, bias=True)
                conv_bn(mlp, f"{self.fc}2", 2 * width, width, 1, bias=True)
                block.add_module("tssa" if stage < 3 else "attn" if self.early else "ssa", attn)
                block.mlp = mlp
                blocks.append(block)
            self.add_module(f"patch_embed{stage}", embed)
            self.add_module(f"stage{stage}", blocks)
        self.head = nn.Linear(before, classes)

    def attend(self, part, x):
        names = [name for name in "qkv" if hasattr(part, f"{name}_bn")]
        q, k, *v = (fire(OfficialFormer.layer(part, name, x)) for name in names)
        q, k = (z.flatten(3).unflatten(2, (self.heads, -1)) for z in (q, k))
        if v:
            y = (q.mT @ k) @ v[0].flatten(3).unflatten(2, (self.heads, -1)).mT * 0.125
            y = fire(y.mT.reshape(x.shape), v_threshold=0.5)
        else:
            y = (fire(q.sum(3, keepdim=True), v_threshold=0.5) * k).reshape(x.shape)
        return fire(OfficialFormer.layer(part, "proj", y))

    def forward(self, x):
        def layer(part, name, x, pool=False):
            y = OfficialFormer.layer(part, name, x)
            return fire(nn.functional.max_pool2d(y.flatten(0, 1), 3, 2, 1).unflatten(0, y.shape[:2]) if pool else y)

        for stage in (1, 2, 3):
            embed = self.get_submodule(f"patch_embed{stage}")
            x = layer(embed, "proj", x, self.early) if stage == 1 else x
            short = layer(embed, "proj_res", x)
            names = [name for name in ("proj1", "proj2", "proj3", "proj4") if hasattr(embed, f"{name}_bn")]
            for place, name in enumerate(names):
                x = layer(embed, name, x, place == 0 if self.early else name == "proj4")
            x = x + short
            for block in self.get_submodule(f"stage{stage}"):
                attn, mlp = block.children()
                x = x + self.attend(attn, x)
                x = x + layer(mlp, f"{self.fc}2", layer(mlp, f"{self.fc}1", x))
        return self.head(x.flatten(3).mean(3).mean(0))


@pytest.mark.parametrize(("kind", "depths", "shift"), [("cifar", (1, 1, 1), -0.5), ("imagenet", (1, 2, 1), 0)])
def test_official_qkformer(kind, depths, shift, tmp_path):
    official = randomise(OfficialQKFormer(kind, depths=depths))
    with torch.no_grad():  # neurons of tau 2 take half of their current; sums of a head's queries are large
        for part in official.modules():
            if hasattr(part, "running_var"):
                part.weight *= 2
                part.bias += shift
    state = {f"module.{name}": value for name, value in official.state_dict().items()}
    size = {"cifar": 16, "imagenet": 32}[kind]
    arguments = {"num_classes": 5, "depths": depths, "mlp_ratio": 2, "layout": kind, "img_size": size}
    same("test_qkformer", official, official, tmp_path / "w.pth", state, **arguments)


def test_qkformer_counts_by_hand():
    # The authors print 16.47, 29.08 and 64.96 M, and in their log for CIFAR-10 6,706,234.
    def conv(a, b, kernel):
        return kernel * kernel * a * b + 2 * b

    def net(dim, depths, convs, classes):
        widths = (dim // 4, dim // 2, dim)
        total, before = conv(3, dim // 8, 3) + (dim + 1) * classes, dim // 8
        for width, depth, count, layers in zip(widths, depths, (convs, 2, 2), (3, 3, 4), strict=True):
            total += conv(before, width, 1) + conv(before, width, 3) + (count - 1) * conv(width, width, 3)
            mlp = 2 * 4 * width * width + 3 * 5 * width  # weights; bias, scale and shift of five widths
            total += depth * (layers * conv(width, width, 1) + width + mlp)
            before = width
        return total

    assert net(384, (1, 1, 2), 1, 10) == spikezoo.model_info("qkformer_4_384").parameters == 6_706_234
    for dim, millions in ((384, 16.47), (512, 29.08), (768, 64.96)):
        parameters = spikezoo.model_info(f"qkformer_10_{dim}").parameters
        assert net(dim, (1, 2, 7), 2, 1000) == parameters and round(parameters / 1e6, 2) == millions


@torch.no_grad()
def test_token_attention_by_hand():
    model = make("test_qkformer", T=2).double().eval()
    x = image_for(model, 1, torch.float64)
    attention, stream = model.stages[0][0].attn, model.stem(x[None], 2)
    assert {*stream.unique().tolist()} == {0, 1, 2}  # of the embedding's two ways
    q, k = attention.q(stream), attention.k(stream)
    potential, tokens = torch.zeros(1, 2, 32, 32), []
    for t in range(2):  # tau 2, threshold 0.5: one firing query of a head of four lets its token pass
        potential = potential + (q[t].reshape(1, 2, 4, 32, 32).sum(2) - potential) / 2
        tokens.append((potential >= 0.5).double())
        potential = potential * (1 - tokens[-1])
    mask = torch.stack(tokens).repeat_interleave(4, 2)
    assert 0 < mask.mean() < 1 and torch.equal(attention(stream), attention.proj(k * mask))
    # Nothing is multiplied there: as many additions as queries fire. What passes is all that the projection sees.
    c = spikezoo.count(model, x)
    row = c.by_module["stages.0.0.attn"]
    assert c.uncounted == {} and (row.macs, row.macs_exact, row.sops_exact) == (0, 0, q.sum().item())
    assert c.by_module["stages.0.0.attn.proj.conv"].sops_exact == (k * mask).sum().item() * 8
    # The image passes the first convolution once; behind it only whole numbers flow.
    assert c.macs_exact == 3 * 9 * 4 * 32 * 32
    inputs = {row.input for name, row in c.by_module.items() if row.weights and name not in ("stem.0.conv", "head.fc")}
    assert inputs == {"spikes", "integer spikes"}


@torch.no_grad()
def test_patch_embedding_by_hand():
    model = make("test_qkformer", T=2, layout="imagenet").double().eval()
    embedding, x = model.stages[1][0], (wave((2, 1, 8, 6, 6), 3) > 0).double() * 2
    first, second = embedding.layers
    current = first.conv.norm(first.conv.conv(x.flatten(0, 1))).unflatten(0, (2, 1))
    tops = torch.stack([nn.functional.max_pool2d(frame, 3, 2, 1) for frame in current])
    spikes = fire(tops)
    assert torch.equal(first(x), spikes) and torch.equal(embedding(x), second(spikes) + embedding.shortcut(x))
    rows = spikezoo.count(model, image_for(model, 1, torch.float64)).by_module
    shortcut = rows["stages.1.0.shortcut.conv"]
    assert shortcut.macs == 2 * 8 * 12 * 4 * 4 and shortcut.input == "integer spikes"  # maps of 8, every second place


def test_what_the_hierarchies_refuse():
    with pytest.raises(ValueError, match=r"layout='imagenet2'.*imagenet"):
        spikezoo.create_model("test_qkformer", layout="imagenet2")
    with pytest.raises(ValueError, match=r"widths=\[8, 12, 16\] with heads=3: 8 is no even multiple; take 12"):
        spikezoo.create_model("test_qkformer", heads=3)
    with pytest.raises(ValueError, match=r"widths=\[8, 12, 16\] and depths=\[1, 1\]"):
        spikezoo.create_model("test_qkformer", depths=(1, 1))
    with pytest.raises(ValueError, match=r"group_size=7 does not divide 16 channels"):
        spikezoo.create_model("test_spikingresformer", group_size=7)
    with pytest.raises(ValueError, match=r"heads=\[1, 2\].*one number each a stage"):
        spikezoo.create_model("test_spikingresformer", heads=(1, 2))


def test_nir_names_the_products_of_the_hierarchies(tmp_path):
    pytest.importorskip("nir")
    with pytest.raises(ValueError, match=r"'stages.0.0.attn': the mul of a TokenAttention multiplies signals"):
        spikezoo.export(make("test_qkformer").eval(), tmp_path / "net.nir")
    with pytest.raises(ValueError, match=r"'stages.0.0.attn': the \w+ of a DualSpikeAttention"):
        spikezoo.export(make("test_spikingresformer").eval(), tmp_path / "net.nir")


# --------------------------------------------------------------------------------------------------------------
# SpikingResformer
# --------------------------------------------------------------------------------------------------------------


class OfficialAttention(nn.Module):
    """DSSA with the official names; the convolution's channels come head by head, first and second half."""

    def __init__(self, dim, heads, patch):
        super().__init__()
        self.heads = heads
        self.W, self.norm = nn.Conv2d(dim, 2 * dim, patch, patch, bias=False), Norm(2 * dim)
        self.Wproj, self.norm_proj = nn.Conv2d(dim, dim, 1, bias=False), Norm(dim)
        self.register_buffer("firing_rate_x", torch.zeros(1, 1, heads, 1, 1))
        self.register_buffer("firing_rate_attn", torch.zeros(1, 1, heads, 1, 1))

    def forward(self, x):
        spikes = resformer_fire(x)
        y = self.norm(steps(self.W, spikes)).flatten(3).unflatten(2, (self.heads, 2, -1))
        places = spikes.flatten(3).unflatten(2, (self.heads, -1))
        asked = torch.einsum("tbhcm,tbhcn->tbhmn", y[:, :, :, 0], places)
        attn = resformer_fire(asked / (self.firing_rate_x * places.shape[3]).sqrt())
        out = torch.einsum("tbhcm,tbhmn->tbhcn", y[:, :, :, 1], attn) / (self.firing_rate_attn * attn.shape[3]).sqrt()
        return self.norm_proj(steps(self.Wproj, resformer_fire(out.reshape(x.shape)))) + x


class OfficialFFN(nn.Module):
    """GWFFN with the official names; the neurons, which hold nothing, are placeholders."""

    def __init__(self, dim, ratio, group):
        super().__init__()
        inner = dim * ratio
        self.up = nn.Sequential(nn.Identity(), nn.Conv2d(dim, inner, 1, bias=False), Norm(inner))
        grouped = nn.Conv2d(inner, inner, 3, padding=1, groups=inner // group, bias=False)
        self.conv = nn.ModuleList([nn.Sequential(nn.Identity(), grouped, Norm(inner))])
        self.down = nn.Sequential(nn.Identity(), nn.Conv2d(inner, dim, 1, bias=False), Norm(dim))

    def forward(self, x):
        def run(part, z):
            return part[2](steps(part[1], resformer_fire(z)))

        y = run(self.up, x)
        return run(self.down, run(self.conv[0], y) + y) + x


class Norm(nn.Module):
    """A batch norm under the name bn, of all time steps."""

    def __init__(self, channels):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return steps(self.bn, x)


class OfficialDown(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(a, b, 3, 2, 1, bias=False), Norm(b)

    def forward(self, x):
        return self.norm(steps(self.conv, resformer_fire(x)))


def steps(layer, x):
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def resformer_fire(x):
    return neuron.LIFNode(step_mode="m", tau=2.0)(x)


class OfficialResformer(nn.Module):
    def __init__(self, stem, widths=(8, 12, 16), depths=(1, 2, 1), heads=(1, 2, 4)):
        super().__init__()
        conv = nn.Conv2d(3, 8, 7, 2, 3, bias=False) if stem == "conv7" else nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.prologue = nn.Sequential(conv, Norm(8), *([nn.MaxPool2d(3, 2, 1)] if stem == "conv7" else []))
        self.layers = nn.Sequential()
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            down = [OfficialDown(widths[stage - 1], width)] if stage else []
            pairs = [(OfficialAttention(width, heads[stage], 4 >> stage), OfficialFFN(width, 2, 8))] * depth
            pairs = [copy.deepcopy(part) for pair in pairs for part in pair]
            self.layers.append(nn.Sequential(*down, *pairs))
        self.classifier = nn.Linear(16, 5, bias=False)

    def forward(self, x):
        conv, norm, *pool = self.prologue
        x = norm(steps(conv, x))
        for layer in pool:
            x = steps(layer, x)
        return self.classifier(self.layers(x).mean((3, 4)).mean(0))


@pytest.mark.parametrize("stem", ["conv3", "conv7"])
def test_official_spikingresformer(stem, tmp_path):
    official = randomise(OfficialResformer(stem))
    for part in official.modules():
        if hasattr(part, "running_var"):
            part.weight.data.mul_(2)
            part.bias.data.add_(1)
        if isinstance(part, OfficialAttention):
            part.firing_rate_x.copy_(0.3 + 0.2 * wave(part.firing_rate_x.shape, 3))
            part.firing_rate_attn.copy_(0.4 + 0.2 * wave(part.firing_rate_x.shape, 4))
    size = {"conv3": 16, "conv7": 32}[stem]
    arguments = {"num_classes": 5, "depths": (1, 2, 1), "stem": stem, "img_size": size}
    same("test_spikingresformer", official, official, tmp_path / "w.pth", **arguments)


def test_spikingresformer_counts_by_hand():
    def net(widths, classes, kernel):
        total, before = kernel * kernel * 3 * widths[0] + 2 * widths[0] + widths[-1] * classes, None
        for width, depth, patch in zip(widths, (1, 2, 3), (4, 2, 1), strict=True):
            total += (9 * before * width + 2 * width) if before else 0
            attention = patch * patch * 2 * width * width + 4 * width + width * width + 2 * width
            total += depth * (attention + 8 * width * width + 9 * 64 * 4 * width + 2 * (4 + 4 + 1) * width)
            before = width
        return total

    assert spikezoo.model_info("spikingresformer_cifar").parameters == net((64, 192, 384), 10, 3)
    for name, widths in {
        "ti": (64, 192, 384), "s": (64, 256, 512), "m": (64, 384, 768), "l": (128, 512, 1024),
    }.items():  # fmt: skip
        assert spikezoo.model_info(f"spikingresformer_{name}").parameters == net(widths, 1000, 7)


@torch.no_grad()
def test_dual_spike_attention_by_hand():
    model = make("test_spikingresformer", T=2).double().eval()
    image = image_for(model, 1, torch.float64)
    attention = model.stages[1][1].attn
    attention.rate_in.running_mean.copy_(torch.tensor([0.25, 0.0]))
    x = wave((2, 1, 12, 4, 4), 5) * 3
    spikes = attention.neuron_in(x)
    first, second = attention.patches(spikes).reshape(2, 1, 2, 12, 4).split(6, 3)  # two heads, four patches
    # Of 6 channels that fire at 0.25 on average; the other head has no rate, and counts as always firing.
    scale = torch.tensor([1 / (0.25 * 6) ** 0.5, 1 / 6**0.5], dtype=torch.float64)[:, None, None]
    places = spikes.reshape(2, 1, 2, 6, 16)
    attn = attention.neuron_attn(first.mT @ places * scale)
    assert {*attn.unique().tolist()} == {0, 1}
    rates = attention.rate_attn.running_mean
    out = second @ attn / (torch.where(rates > 0, rates, 1) * 4).sqrt()[:, None, None]
    wanted = attention.proj(attention.neuron(out.reshape(2, 1, 12, 4, 4)))
    torch.testing.assert_close(attention(x), wanted, rtol=0, atol=1e-12)
    # Spikes enter every convolution but the first; a group of 8 channels of 24 makes every ninth weight of a 3x3.
    c = spikezoo.count(model, image)
    layers = {name: row for name, row in c.by_module.items() if row.weights and not name.startswith("head")}
    assert [name for name, row in layers.items() if row.input != "spikes"] == ["stem.0.conv"]
    grouped = layers["stages.1.1.mlp.conv.conv"]
    assert grouped.weights == 24 * 8 * 9 and grouped.macs == 2 * 24 * 8 * 9 * 16 * 16 and c.uncounted == {}
    products = c.by_module["stages.1.1.attn"]
    assert (products.ops, products.input) == ("bmm", "spikes x analog")
    assert products.macs == 2 * 2 * 2 * 6 * 64 * 256  # two products at two steps: 2 heads, 6 channels, 8x8 patches


def test_head_rates_learn():
    model = make("test_spikingresformer", T=2).train()
    rate = model.stages[0][0].attn.rate_in
    spikes = (wave((2, 3, 1, 4, 5), 2) > 0).float()
    for value, wanted in ((0.0, spikes.mean()), (0.5, 0.5 * 0.999 + 0.001 * spikes.mean())):
        rate.running_mean.fill_(value)
        torch.testing.assert_close(rate(spikes).flatten(), torch.as_tensor(wanted).reshape(1))
        torch.testing.assert_close(rate.running_mean, torch.as_tensor(wanted).reshape(1))
    before = rate.running_mean.clone()
    assert rate.eval()(spikes).item() == before.item() and torch.equal(rate.running_mean, before)
