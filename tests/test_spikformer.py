"""Tests of the Spikformer family and the AutoST models: layouts, attention, official state dicts, drop path, counts."""

import argparse
import itertools
import math
import warnings

import pytest
import timm
import torch
from test_models import count as parameters
from test_models import image_for, make
from torch import nn
from torch.func import functional_call, grad, vmap

import spikezoo
from spikezoo.models import autost, spikformer
from spikezoo.models.spikformer import attend, checkpoint_filter_fn
from spikezoo.neurons import SpikingNeuron
from spikezoo.observe import firing_rates
from spikezoo.transforms import fold_mpbn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it deprecates of its own
    from spikingjelly.activation_based import functional, neuron

ROWS = {**spikformer.ROWS, **autost.ROWS}


def create(name="test_spikformer", **kwargs):
    return spikezoo.create_model(name, **kwargs)


# --------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------

# The table of the design: dim, depth, sum of the MLP ratios, classes, channels, biases of q, k and v, parameters.
DESIGN = {
    "spikformer_2_256": (256, 2, 8, 10, 3, True, 2_568_490),
    "spikformer_4_256": (256, 4, 16, 10, 3, True, 4_155_178),
    "spikformer_2_384": (384, 2, 8, 10, 3, True, 5_765_050),
    "spikformer_4_384": (384, 4, 16, 10, 3, True, 9_324_730),
    "spikformer_5_384": (384, 5, 20, 10, 3, True, 11_104_570),
    "spikformer_8_384": (384, 8, 32, 10, 3, True, 16_444_090),
    "spikformer_8_512": (512, 8, 32, 10, 3, True, 29_193_802),
    "spikformer_in_6_256": (256, 6, 24, 1000, 3, False, 5_991_688),
    "spikformer_in_8_384": (384, 8, 32, 1000, 3, False, 16_816_024),
    "spikformer_in_6_512": (512, 6, 24, 1000, 3, False, 23_373_352),
    "spikformer_in_8_512": (512, 8, 32, 1000, 3, False, 29_689_384),
    "spikformer_in_10_512": (512, 10, 40, 1000, 3, False, 36_005_416),
    "spikformer_in_8_768": (768, 8, 32, 1000, 3, False, 66_338_632),
    "spikformer_dvs_2_256": (256, 2, 8, 10, 2, False, 2_566_666),
    "spikformer_tiny": (192, 12, 48, 10, 3, True, 5_923_810),
    "spikformer_small": (384, 12, 48, 10, 3, True, 23_563_450),
    "autost_tiny": (320, 2, 9, 10, 3, True, 4_213_170),
    "autost_small": (448, 3, 15, 10, 3, True, 11_470_210),
    "autost_base": (576, 5, 27, 10, 3, True, 29_597_842),
    "autost_in_tiny": (320, 4, 12, 1000, 3, False, 5_973_200),
    "autost_in_small": (448, 4, 20, 1000, 3, False, 14_732_640),
    "autost_in_base": (768, 4, 13, 1000, 3, False, 34_407_496),
    "autost_dvs_tiny": (320, 2, 9, 10, 2, False, 4_210_890),
    "test_spikformer": (16, 3, 4.5, 10, 3, True, 10_444),
    "test_autost": (16, 3, 4, 10, 3, True, 10_164),
}


def test_table_names_every_row():
    assert sorted(DESIGN) == sorted(ROWS)


@pytest.mark.parametrize(("name", "facts"), DESIGN.items())
def test_counts_by_hand(name, facts):
    d, depth, ratios, classes, channels, bias, total = facts
    # 3x3 convolutions of d/8, d/4, d/2, d channels and the position encoding's d, each with scale and shift.
    widths = [channels, d // 8, d // 4, d // 2, d, d]
    stem = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(widths))
    # q, k, v, proj and the two layers of the MLP, each with scale and shift; proj and the MLP always have a bias.
    attention = 4 * d * d + 4 * 2 * d + (4 if bias else 1) * d
    mlps = ratios * (d * d * 2 + 3 * d) + depth * 3 * d  # hidden: bias, scale, shift; out: the same
    assert stem + depth * attention + mlps + d * classes + classes == total == ROWS[name].parameters
    assert parameters(create(name, device="meta")) == total


@pytest.mark.parametrize("name", ROWS)
def test_constants(name):
    model = create(name, device="meta")
    neurons = {n: m.config for n, m in model.named_modules() if isinstance(m, SpikingNeuron)}
    for n, c in neurons.items():
        assert (c.kind, c.tau, c.reset, c.v_reset, c.firing, c.surrogate) == ("lif", 2.0, "hard", 0.0, ">=", "sigmoid")
        assert c.surrogate_alpha in (None, 4.0) and c.detach_reset
        assert c.threshold == (0.5 if n.endswith("attn.neuron") else 1.0)
    dvs = "dvs" in name
    steps = 16 if dvs else 4
    assert (model.T, model.mpbn) == (steps, None)
    assert {block[0].attn.scale for block in model.stages} == {0.25 if dvs else 0.125}
    # Every block has seven neurons in either form, the stem five, or three where the residuals are membrane potentials.
    depth = DESIGN[name][1]
    assert len(neurons) == 7 * depth + (3 if name == "test_autost" else 5)


def test_rows_of_event_frames():
    model = create("spikformer_dvs_2_256", device="meta")
    assert model.stages[0][0].attn.heads == 16
    assert model.pretrained_cfg["mean"] == (0.0, 0.0) and model.pretrained_cfg["std"] == (1.0, 1.0)
    assert model(torch.empty(1, 5, 2, 128, 128, device="meta")).shape == (1, 10)
    # A twin has no time: the row's 16 steps go, those asked for are refused.
    assert create("spikformer_dvs_2_256", neuron="relu", device="meta").T == 1
    with pytest.raises(ValueError, match="T=16 with neuron='relu'"):
        create("spikformer_dvs_2_256", neuron="relu", T=16, device="meta")


def test_rows_lie_in_their_files():
    assert set(spikezoo.list_models(module="autost")) == set(autost.ROWS)
    assert set(spikezoo.list_models(module="spikformer")) == set(spikformer.ROWS)
    assert spikezoo.model_info("autost_tiny").family == "autost"
    for name, row in autost.ROWS.items():
        assert name == "test_autost" or "never published its nets" in row.note


def test_arguments_of_a_layout():
    model = create(depth=2, heads=4, mlp_ratios=(1, 2.5), device="meta")
    assert [block[0].attn.heads for block in model.stages] == [4, 4]
    assert [block[0].mlp.fc1.conv.out_channels for block in model.stages] == [16, 40]
    assert create(features_only=True, depth=2, heads=1, mlp_ratios=1).feature_info.channels() == [16, 16, 16]
    assert create(scale="head_dim", heads=(2, 1, 4)).stages[2][0].attn.scale == 0.5  # 4 channels a head
    assert create(pools=(True, True, False, False)).min_img_size == 4
    assert create(attention_threshold=0.75).stages[1][0].attn.neuron.config.threshold == 0.75
    # The threshold of the model is the other neurons'.
    model = create(threshold=2.0)
    assert model.stages[0][0].attn.neuron.config.threshold == 0.5
    assert model.stages[0][0].attn.proj.neuron.config.threshold == 2.0


# --------------------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------------------


def spikes(*shape, rate=0.5, seed=0):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < rate).float()


@pytest.mark.parametrize(("channels", "tokens"), [(8, 64), (64, 64), (64, 9), (32, 300)])
def test_attention_is_the_same_in_both_orders(channels, tokens):
    q, k, v = spikes(3, 2, 3, 4, channels, tokens, rate=0.8)
    first = v @ (k.transpose(-2, -1) @ q)
    second = (v @ k.transpose(-2, -1)) @ q
    loops = torch.einsum("...ci,...cj,...dj->...di", q.double(), k.double(), v.double())
    assert loops.max() > 256  # beyond what bfloat16 holds
    for product in (first, second, attend(q, k, v)):
        assert torch.equal(product.double(), loops)
    # In half precision the spikes are exact and the sums are kept so.
    for dtype in (torch.bfloat16, torch.float16):
        half = [x.to(dtype) for x in (q, k, v)]
        assert torch.equal(attend(*half).double(), loops)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(attend(q, k, v).double(), loops)
            assert torch.equal(attend(*half).double(), loops)
    assert not torch.equal((v.bfloat16() @ (k.transpose(-2, -1) @ q).bfloat16()).double(), loops)
    assert attend(q.double(), k.double(), v.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("heads", "size", "macs"),
    [
        (1, 12, 2 * 9 * 9 * 16),  # 9 tokens, 16 channels a head: over the tokens
        (4, 12, 2 * 9 * 4 * 16),  # 9 tokens, 4 channels a head: over the channels
        (4, 8, 2 * 4 * 4 * 16),  # 4 of both
        (2, 8, 2 * 4 * 4 * 16),
    ],
)
def test_attention_takes_the_cheaper_order(heads, size, macs):
    model = make("test_spikformer", heads=heads, T=1).eval()
    c = spikezoo.count(model, torch.randn(1, 3, size, size))
    assert [c.by_module[f"stages.{index}.0.attn"].macs for index in range(3)] == [macs] * 3


def test_tokens_need_no_rectangle_that_the_image_gave():
    # Tokens are dropped by transforms: any h and w will do, and a token's place means nothing to attention and MLP.
    block = make("test_spikformer", T=2).eval().stages[1]
    x = spikes(2, 3, 16, 8, 8) * 2
    out = block(x)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    mixed = block(x.flatten(3)[..., order].unsqueeze(3))
    assert torch.equal(mixed.squeeze(3), out.flatten(3)[..., order])
    assert block(x[..., :1, :5]).shape == (2, 3, 16, 1, 5)


# --------------------------------------------------------------------------------------------------------------
# Official layout and names, written down once more with SpikingJelly's neurons
# --------------------------------------------------------------------------------------------------------------


class Official(nn.Module):
    """Names and order of operations of the public code, for CIFAR ('cifar'), ImageNet ('imagenet') or DVS ('dvs')."""

    def __init__(self, kind, dim=16, depth=2, heads=2, ratio=3, classes=7, channels=3, membrane=False):
        super().__init__()
        self.kind, self.heads, self.dim, self.membrane = kind, heads, dim, membrane
        self.scale = 0.25 if kind == "dvs" else 0.125
        widths = [channels, dim // 8, dim // 4, dim // 2, dim]
        self.patch_embed = nn.Module()
        for index, (a, b) in enumerate(itertools.pairwise(widths)):
            tail = str(index or "")
            self.patch_embed.add_module(f"proj_conv{tail}", nn.Conv2d(a, b, 3, padding=1, bias=False))
            self.patch_embed.add_module(f"proj_bn{tail}", nn.BatchNorm2d(b))
        self.patch_embed.rpe_conv = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.patch_embed.rpe_bn = nn.BatchNorm2d(dim)
        if kind == "dvs":
            self.pos_embed = nn.Parameter(torch.randn(1, 4, dim))
            self.norm = nn.LayerNorm(dim)

        def linear(a, b, mlp, bias):
            if kind == "cifar":
                return nn.Linear(a, b)
            return nn.Conv2d(a, b, 1, bias=bias) if kind == "imagenet" and mlp else nn.Conv1d(a, b, 1, bias=bias)

        self.word = "linear" if kind == "cifar" else "conv"
        self.block = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.norm1, block.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            block.attn, block.mlp = nn.Module(), nn.Module()
            for part in "qkv":
                block.attn.add_module(f"{part}_{self.word}", linear(dim, dim, False, False))
                block.attn.add_module(f"{part}_bn", nn.BatchNorm1d(dim))
            block.attn.add_module(f"proj_{self.word}", linear(dim, dim, False, True))
            block.attn.proj_bn = nn.BatchNorm1d(dim)
            for part, (a, b) in {"fc1": (dim, ratio * dim), "fc2": (ratio * dim, dim)}.items():
                norm = nn.BatchNorm2d if kind == "imagenet" else nn.BatchNorm1d
                block.mlp.add_module(f"{part}_{self.word}", linear(a, b, True, True))
                block.mlp.add_module(f"{part}_bn", norm(b))
            self.block.append(block)
        self.head = nn.Linear(dim, classes)

    @staticmethod
    def fire(x, threshold=1.0):
        node = neuron.LIFNode(tau=2.0, v_threshold=threshold, step_mode="m")
        with torch.no_grad():
            return node(x)

    def layer(self, part, name, x, n):
        """Linear layer and norm of ``[T, B, C, n]``."""
        T, B = x.shape[:2]
        x = x.flatten(0, 1)
        module, norm = part.get_submodule(f"{name}_{self.word}"), part.get_submodule(f"{name}_bn")
        if isinstance(module, nn.Linear):
            x = module(x.transpose(1, 2)).transpose(1, 2)
        elif isinstance(module, nn.Conv2d):
            x = module(x.unflatten(2, (n, -1))).flatten(2)
        else:
            x = module(x)
        x = norm(x.unflatten(2, (n, -1))).flatten(2) if isinstance(norm, nn.BatchNorm2d) else norm(x)
        return x.unflatten(0, (T, B))

    def forward(self, x):
        """Logits of event frames ``[T, B, C, H, W]``."""
        T, B = x.shape[:2]
        fire, patch = self.fire, self.patch_embed

        def both(fn, x):
            return fn(x.flatten(0, 1)).unflatten(0, (T, B))

        for index in range(4):
            conv, norm = (patch.get_submodule(f"proj_{kind}{index or ''}") for kind in ("conv", "bn"))
            x = both(norm, both(conv, x))
            if not (self.membrane and index == 3):
                x = fire(x)
            if self.kind != "cifar" or index >= 2:
                x = both(nn.MaxPool2d(3, 2, 1), x)
        encoding = both(patch.rpe_bn, both(patch.rpe_conv, x))
        x = x + (encoding if self.membrane else fire(encoding))
        side = x.shape[3]
        x = x.flatten(3)  # [T, B, D, N]
        for block in self.block:
            y = fire(x) if self.membrane else x
            q, k, v = (
                fire(self.layer(block.attn, name, y, side)).transpose(2, 3).unflatten(3, (self.heads, -1))
                for name in "qkv"
            )
            q, k, v = (z.transpose(2, 3) for z in (q, k, v))  # [T, B, heads, N, c]
            y = (q @ k.transpose(3, 4) * self.scale) @ v
            y = fire(y.transpose(2, 3).flatten(3).transpose(2, 3), 0.5)
            y = self.layer(block.attn, "proj", y, side)
            x = x + (y if self.membrane else fire(y))
            y = fire(x) if self.membrane else x
            y = self.layer(block.mlp, "fc2", fire(self.layer(block.mlp, "fc1", y, side)), side)
            x = x + (y if self.membrane else fire(y))
        self.last = x
        return self.head(x.mean(3).mean(0))


def randomise(model, seed=0):
    g = torch.Generator().manual_seed(seed)

    def uniform(t, low, high):
        with torch.no_grad():
            t.copy_(torch.rand(t.shape, generator=g, dtype=torch.float64) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            uniform(module.running_mean, -0.3, 0.3)
            uniform(module.running_var, 0.5, 1.5)
            uniform(module.weight, 1.5, 3.0)
            uniform(module.bias, 0.0, 1.2)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            bound = 3 / math.sqrt(module.weight[0].numel())
            uniform(module.weight, -bound, bound)
            if module.bias is not None:
                uniform(module.bias, -0.3, 0.3)
    return model


LAYOUT = {"dim": 16, "depth": 2, "heads": 2, "mlp_ratios": 3, "num_classes": 7}
KINDS = {
    "cifar": {"img_size": 32},
    "imagenet": {"img_size": 64, "pools": (True,) * 4, "qkv_bias": False},
    "dvs": {"img_size": 64, "pools": (True,) * 4, "qkv_bias": False, "scale": 0.25, "in_chans": 2, "T": 4},
}


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(("kind", "membrane"), [*((kind, False) for kind in KINDS), ("cifar", True)])
@torch.no_grad()
def test_official_state_dicts_give_the_same_logits(kind, membrane, wrap, tmp_path):
    channels = 2 if kind == "dvs" else 3
    official = randomise(Official(kind, channels=channels, membrane=membrane), seed=3).double().eval()
    arguments = {**LAYOUT, **KINDS[kind], "residual": "membrane" if membrane else "spike"}
    model = create(**arguments).double().eval()
    state = official.state_dict()
    if wrap:
        # As the training script saves it, through timm's own loader.
        path = tmp_path / "checkpoint.pth.tar"
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
        timm.models.load_checkpoint(model, str(path), filter_fn=checkpoint_filter_fn, strict=True)
    else:
        model.load_state_dict(checkpoint_filter_fn(state, model), strict=True)
    g = torch.Generator().manual_seed(0)
    frames = torch.randn(3, 4, channels, *model.img_size, generator=g, dtype=torch.float64)
    rates = firing_rates(model, frames)
    assert all(0.02 < rate.mean() < 0.95 for rate in rates.values()), {n: float(r.mean()) for n, r in rates.items()}
    sequence = model.forward_sequence(frames)
    logits = official(frames.transpose(0, 1))
    assert torch.allclose(sequence.flatten(3), official.last, rtol=0, atol=1e-9)
    torch.testing.assert_close(model(frames), logits, rtol=0, atol=1e-9)
    assert logits.std() > 0.01
    if kind != "dvs":  # an image is its own repetition
        image = frames[:, 0]
        expected = official(image.expand(4, *image.shape))
        torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "kind"), [("spikformer_4_384", "cifar"), ("spikformer_in_6_256", "imagenet")])
def test_official_checkpoint_of_a_named_model_loads_by_path(name, kind, tmp_path):
    row = ROWS[name]
    layout = {key: row.arguments[key] for key in ("dim", "depth", "heads")}
    official = Official(kind, ratio=4, classes=row.num_classes, **layout)
    path = tmp_path / "model_best.pth.tar"
    torch.save({"epoch": 3, "args": argparse.Namespace(T=4), "state_dict": official.state_dict()}, path)
    model = create(name, checkpoint_path=path)
    for ours, theirs in ((model.head.fc, official.head), (model.stem[0].conv, official.patch_embed.proj_conv)):
        assert torch.equal(ours.weight, theirs.weight)
    last = getattr(official.block[-1].mlp, f"fc2_{official.word}").weight
    assert torch.equal(model.stages[-1][0].mlp.fc2.conv.weight, last.reshape(*last.shape[:2], 1, 1))
    with pytest.raises(ValueError, match="does not fit Spikformer, nothing was loaded"):
        create("autost_tiny", checkpoint_path=path)


def test_attention_of_two_tokens_by_hand():
    # Channels first: token 0 asks (1, 1), token 1 (0, 1); keys (1, 0) and (1, 1); values (1, 1) and (0, 1).
    q, k, v = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[1.0, 1], [0, 1]]), torch.tensor([[1.0, 0], [1, 1]])
    # Products of the first token with the keys: 1 and 2, so 1 (1, 1) + 2 (0, 1); of the second: 0 and 1.
    assert attend(q, k, v).T.tolist() == [[1, 3], [0, 1]]


def test_filter_leaves_our_names_alone():
    model = create()
    state = model.state_dict()
    assert checkpoint_filter_fn(state, model).keys() == state.keys()
    assert all(
        torch.equal(a, b) for a, b in zip(checkpoint_filter_fn(state, model).values(), state.values(), strict=True)
    )
    # What another net puts there is not swallowed: it is missing or unexpected when it is loaded.
    official = Official("cifar").state_dict()
    del official["block.1.attn.q_bn.weight"]
    official["block.0.attn.r_linear.weight"] = torch.zeros(16, 16)
    model = create(**LAYOUT)
    with pytest.raises(
        RuntimeError, match=r"Missing.*stages\.1\.0\.attn\.q\.norm\.weight(.|\n)*Unexpected.*attn\.r\.conv"
    ):
        model.load_state_dict(checkpoint_filter_fn(official, model))


def test_timms_pretrained_path_filters(tmp_path):
    # What `timm.create_model(name, pretrained=True)` does with weights of a tag.
    official = randomise(Official("cifar"), seed=4)
    path = tmp_path / "official.pth"
    torch.save(official.state_dict(), path)
    model = timm.create_model(
        "test_spikformer", pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 7}, **LAYOUT
    )
    assert torch.equal(model.head.fc.weight, official.head.weight)
    assert torch.equal(model.stages[1][0].mlp.fc1.conv.weight[..., 0, 0], official.block[1].mlp.fc1_linear.weight)


def test_parametric_neurons_start_as_the_official_ones():
    model = create("test_autost", neuron="plif")
    learned = [m for m in model.modules() if type(m).__name__ == "PLIF"]
    assert len(learned) == 7 * 3 + 3  # as many as AutoST's code has: 7 L + 3
    node = neuron.ParametricLIFNode(init_tau=2.0, step_mode="m", detach_reset=True)
    x = torch.randn(4, 50)
    assert torch.equal(learned[0](x), node(x)) and learned[0].w == node.w == 0
    functional.reset_net(node)
    assert parameters(model) == DESIGN["test_autost"][-1] + len(learned)


def test_membrane_residuals_are_potentials():
    model = make("test_spikformer", T=2).eval()
    x = image_for(model)
    for level, sequence in enumerate(model.forward_intermediates(x, intermediates_only=True, time_mean=False)):
        # Spikes and their sums: whole numbers, at most 2 after the stem and 2 more a block.
        assert torch.equal(sequence, sequence.round()) and 1 < sequence.max() <= 2 + 2 * level
    model = make("test_autost", T=2).eval()
    for sequence in model.forward_intermediates(x, intermediates_only=True, time_mean=False):
        assert not torch.equal(sequence, sequence.round()) and sequence.min() < 0


# --------------------------------------------------------------------------------------------------------------
# Drop path
# --------------------------------------------------------------------------------------------------------------


def test_drop_path_drops_samples_for_all_time_steps():
    model = make("test_spikformer", T=3, drop_path_rate=0.5).train()
    assert [getattr(block[0].drop_path, "drop_prob", 0.0) for block in model.stages] == [0.0, 0.25, 0.5]
    block = model.stages[2][0]
    x = spikes(3, 64, 16, 4, 4) * 2
    branches = []
    block.attn.register_forward_hook(lambda _m, _i, out: branches.append(out))
    block.mlp.register_forward_hook(lambda _m, inputs, out: branches.extend((inputs[0], out)))
    torch.manual_seed(0)
    with torch.no_grad():
        out = block(x)
    attention, between, mlp = branches
    kept = 0
    for before, branch, after in ((x, attention, between), (between, mlp, out)):
        for sample in range(64):
            assert branch[:, sample].any()
            dropped = torch.equal(after[:, sample], before[:, sample])
            assert dropped or torch.equal(after[:, sample], before[:, sample] + 2 * branch[:, sample])
            kept += not dropped
    assert 40 < kept < 88  # of 128, one half
    # In evaluation nothing is dropped.
    dropping, plain = (make("test_spikformer", T=3, drop_path_rate=rate).eval() for rate in (0.5, 0.0))
    assert torch.equal(dropping(image_for(plain)), plain(image_for(plain)))


def test_drop_path_with_checkpointing():
    # The recomputation must drop what the forward pass dropped.
    plain, checkpointed = (make("test_spikformer", T=2, drop_path_rate=0.6) for _ in range(2))
    checkpointed.set_grad_checkpointing()
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        model(image_for(model, 6)).square().sum().backward()
    for (n, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=n: f"{n}: {m}")


# --------------------------------------------------------------------------------------------------------------
# Counters, transforms, torch.func, export
# --------------------------------------------------------------------------------------------------------------


def macs_by_hand(d, ratios, channels, size, pools, heads, classes):
    """Dense MACs of one image and one time step: without the first convolution, its own, the classifier's."""
    pixels, widths = size * size, [channels, d // 8, d // 4, d // 2, d, d]
    convs = []
    for a, b, pool in zip(widths[:-1], widths[1:], (*pools, False), strict=True):
        convs.append(9 * a * b * pixels)
        pixels //= 4 if pool else 1
    n = pixels
    blocks = sum((4 + 2 * r) * n * d * d + 2 * n * min(n, d // h) * d for r, h in zip(ratios, heads, strict=True))
    return sum(convs[1:]) + blocks, convs[0], d * classes


@pytest.mark.parametrize(("B", "T"), [(B, T) for B in (1, 2, 3) for T in (1, 4)])
def test_macs_of_a_micro_model(B, T):
    model = make("test_spikformer", T=T).eval()
    step, first, head = macs_by_hand(16, (2, 1, 1.5), 3, 32, (False, False, True, True), (2, 1, 4), 10)
    c = spikezoo.count(model, image_for(model, B))
    # The image is convolved once, the time mean classified once.
    assert (c.images, c.T, c.macs, c.macs_step) == (B, T, T * step + first + head, step + first + head)
    assert c.uncounted == {} and c.macs_paper == first and c.macs_exact == first
    frames = spikezoo.count(model, (image_for(model, B) > 0).float()[:, None].repeat(1, T, 1, 1, 1))
    assert (frames.macs, frames.macs_step) == (T * (step + first) + head, step + first + head)
    # Law: paper's column of a layer is the rate of its input times T times its dense MACs.
    rates = firing_rates(model, image_for(model, B))
    fc2 = c.by_module["stages.1.0.mlp.fc2.conv"]
    rate = rates["stages.1.0.mlp.fc1.neuron"].mean().item()
    assert fc2.macs == T * 64 * 16 * 16 and fc2.sops_paper == pytest.approx(rate * fc2.macs, rel=1e-5)
    assert fc2.sops_exact == pytest.approx(rate * fc2.macs, rel=1e-5)  # 1x1: every spike meets 16 weights


@pytest.mark.parametrize(("name", "heads"), [("spikformer_2_256", 4), ("spikformer_2_256", 8), ("autost_tiny", 5)])
def test_macs_of_the_papers(name, heads):
    d, depth, ratios, *_ = DESIGN[name]
    model = create(name, T=1, heads=heads).eval()
    c = spikezoo.count(model, torch.randn(1, 3, 32, 32))
    n = 64
    # Heads of 64 channels and more cost n * n * D twice, as the authors compute it; narrower ones cost less.
    product = 2 * n * min(n, d // heads) * d
    assert (c.macs - d * 10) == 3168 * d**2 + 3456 * d + n * (4 * depth + 2 * ratios) * d**2 + depth * product


def test_fold_of_membrane_norms():
    model = make("test_spikformer", mpbn="element", T=3).eval()
    x = image_for(model)
    folded = fold_mpbn(model)
    assert torch.equal(folded(x), model(x))
    kinds = {type(m).__name__ for m in folded.modules()}
    assert "FoldedThreshold" in kinds and "MembraneNorm" not in kinds


@pytest.mark.parametrize(
    ("name", "kind"), [("test_autost", "lif"), ("test_spikformer", "plif"), ("test_mpbn_resnet", "sign")]
)
def test_gradients_a_sample_by_vmap(name, kind):
    model = make(name, neuron=kind).double().eval()
    x = image_for(model, 3, torch.float64)
    buffers = dict(model.named_buffers())
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss(weights, sample):
        return functional_call(model, (weights, buffers), (sample[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(weights, x)
    for index in range(3):
        model.zero_grad()
        model(x[index : index + 1]).square().sum().backward()
        for n, p in model.named_parameters():
            assert p.grad.any()
            torch.testing.assert_close(found[n][index], p.grad, rtol=1e-9, atol=1e-10 * float(p.grad.abs().max()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
def test_export():
    model = make("test_spikformer", depth=1, mlp_ratios=1, heads=2, T=2).eval()
    x = image_for(model)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        torch.testing.assert_close(program.module()(x[:1]), model(x[:1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("residual", ["spike", "membrane"])
@torch.no_grad()
def test_autocast_changes_roundings_only(residual):
    # bfloat16 moves spikes whose potential lies near the threshold; most stay where they are.
    model = make("test_spikformer", T=4, residual=residual).eval()
    x = image_for(model)
    expected = model.forward_sequence(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.forward_sequence(x)
    assert found.dtype != torch.float64 and (found.float() - expected).abs().mean() < 0.35 * expected.abs().mean()


# --------------------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 20}, r"dim=20: .* multiple of 8, for instance 16 or 24"),
        ({"dim": 0}, r"dim=0: expected an integer >= 1"),
        ({"dim": 4}, r"dim=4: .* for instance 8\.$"),
        ({"dim": 32.0}, r"dim=32\.0: expected an integer"),
        ({"heads": 3}, r"dim=16 is not divisible by heads=3: take heads=1 or 2 or 4, or dim=24"),
        ({"heads": (2, 2, 5)}, r"not divisible by heads=5"),
        ({"heads": 0}, r"heads=0: expected an integer >= 1"),
        ({"heads": (2, 2)}, r"depth=3 with heads=\[2, 2\], which has 2 entries: .* depth=2"),
        ({"heads": ()}, r"which has 0 entries: give one a block, or one number for all blocks \(heads=4\)\.$"),
        ({"img_size": 2}, r"2x2 pixels is not divisible by the patch, 4x4: .* to 4x4, .* img_size=4"),
        ({"depth": 2, "heads": 2}, r"depth=2 with mlp_ratios=\[2, 1, 1\.5\], which .*\(mlp_ratios=2\), or depth=3"),
        ({"depth": 0}, r"depth=0: expected an integer >= 1"),
        ({"depth": "two"}, r"depth='two': expected an integer"),
        ({"mlp_ratios": 0}, r"mlp_ratios=0: expected a positive number"),
        ({"mlp_ratios": "4"}, r"mlp_ratios='4': expected a positive number"),
        ({"mlp_ratios": 0.01}, r"mlp_ratios=0\.01: .* no hidden channel"),
        ({"pools": (True, True)}, r"pools=\(True, True\): expected four of True or False"),
        ({"pools": "yes!"}, r"pools='yes!': expected four"),
        ({"pools": 2}, r"pools=2: expected four"),
        ({"scale": "head"}, r"scale='head': expected a positive number, or 'head_dim'"),
        ({"scale": 0}, r"scale=0: expected a positive number"),
        ({"attention_threshold": -1}, r"attention_threshold=-1: expected a positive number"),
        ({"drop_path_rate": 1}, r"drop_path_rate=1: expected a number in \[0, 1\)"),
        ({"qkv_bias": "no"}, r"qkv_bias='no': expected True or False"),
        ({"residual": "membran"}, r"residual='membran' does not exist\. Did you mean 'membrane'"),
        ({"img_size": 34}, r"34x34 pixels is not divisible by the patch, 4x4: .* to 32x32, .* img_size=32"),
        ({"img_size": (33, 70)}, r"33x70 pixels .* to 32x72, .* img_size=\(32, 72\)"),
        ({"dims": 32}, r"no argument 'dims'"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        create(**arguments)


def test_bad_images():
    model = create()
    for forward in (model, model.forward_steps, model.forward_intermediates):
        with pytest.raises(ValueError, match=r"30x40 pixels is not divisible by the patch, 4x4: .* to 32x40"):
            forward(torch.zeros(1, 3, 30, 40))
    assert model.eval()(torch.zeros(1, 3, 36, 40)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"200x224 .* patch, 16x16: .* 208x224|192x224"):
        create("spikformer_in_6_256", img_size=(200, 224), device="meta")
