"""MultiSp: the selection against hand arithmetic and sorting, the ticket in the embedding, both stages, configs."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import load
from test_models import image_for, make, wave
from test_spikformer import macs_by_hand
from torch import nn
from torch.nn.utils import parametrize

import spikezoo
from spikezoo.layers import ConvNormNeuron
from spikezoo.neurons import LIF, ReLU, Sign
from spikezoo.observe import firing_rates
from spikezoo.transforms import bake, fold_bn, fold_mpbn, replay, tune
from spikezoo.transforms.multisp import FixedStem, PatchSelection, kept_patches
from spikezoo.transforms.tickets import tickets

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "configs" / "multisp" / "table.yaml"
COMPILER = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch"
)
ONLY = {"pep_sparsity": 0, "binary_pep": False}  # the selection without a ticket


def create(name="test_spikformer", **kwargs):
    return spikezoo.create_model(name, **kwargs)


def embedding(model):
    return {name: m for name, m in model.stem.named_modules() if isinstance(m, nn.Conv2d)}


@torch.no_grad()
def settled(model):
    """Give the norms the statistics of a batch: the products of attention grow without bounds in the ANN twin."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(wave((8, model.in_chans, *model.img_size), 3).to(norms[0].running_var.dtype))
    return model


def pruned(name="test_spikformer", *, multisp, **kwargs):
    """A model that fires, whose frozen weights are those of its seed."""
    return settled(spikezoo.apply(make(name, **kwargs), "multisp", **multisp).train())


def alive(model):
    """Every neuron of the stem and the blocks fires sometimes: equal silence would hide any difference."""
    return all(rates.sum() > 0 for rates in firing_rates(model, image_for(model)).values())


def two_stages(name="test_spikformer", **kwargs):
    """A model as the second stage makes it, from an embedding that was trained and baked."""
    first = pruned(name, multisp={"patch_ratio": 0}, **kwargs)
    return bake(first), spikezoo.apply(bake(first), "multisp", patch_ratio=0.3, fixed=True)


# --------------------------------------------------------------------------------------------------------------
# Selection
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"),
    [
        (64, 0.3, 45), (64, 0.25, 48), (64, 0.5, 32), (196, 0.3, 138), (100, 0.29, 71), (10, 0.7, 3), (10, 0.9, 1),
        (4, 0.1, 4), (1, 0.9, 1), (64, 0.999, 1), (64, 1 - 1e-12, 1),
    ],
)  # fmt: skip
def test_kept_share_is_rounded_up(patches, ratio, kept):
    assert PatchSelection(ratio).count(patches) == kept


def test_selection_by_hand():
    # One image, two steps, two channels, six patches; magnitudes: 3, 1, 3, 0, 3, 2.
    x = torch.tensor([[[1, 0, -1, 0, 1, 0], [0, 0, 1, 0, 1, 1]], [[1, 1, 1, 0, 0, 1], [-1, 0, 0, 0, 1, 0]]])
    x = x.float().view(2, 1, 2, 2, 3).requires_grad_()
    for ratio, kept in ((0.5, [0, 2, 4]), (0.6, [0, 2, 4]), (0.7, [0, 2]), (0.4, [0, 2, 4, 5]), (0.9, [0])):
        selection = PatchSelection(ratio)
        out = selection(x)
        assert torch.equal(out, x.flatten(3)[..., kept].unsqueeze(-1)), ratio
        assert selection.mask(x)[0].nonzero().flatten().tolist() == kept
    (grad,) = torch.autograd.grad(PatchSelection(0.5)(x).sum(), x)
    assert torch.equal(grad, torch.tensor([1.0, 0, 1, 0, 1, 0]).view(2, 3).expand(2, 1, 2, 2, 3))


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("shape", [(1, 1, 3, 2, 2), (4, 3, 8, 8, 8), (2, 5, 4, 3, 7)])
def test_selection_is_that_of_a_stable_sort(shape, levels):
    x = torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(1)).float()
    for ratio in (0.2, 0.5, 0.8):
        selection = PatchSelection(ratio)
        out = selection(x)
        assert out.shape == (*shape[:3], selection.count(shape[3] * shape[4]), 1)
        for b in range(shape[1]):
            score = x[:, b].abs().sum((0, 1)).flatten().tolist()
            order = sorted(range(len(score)), key=lambda i: -score[i])  # stable
            kept = sorted(order[: selection.count(len(score))])
            assert torch.equal(out[:, b], x[:, b].flatten(2)[..., kept].unsqueeze(-1))


def test_spikes_are_counted_exactly_in_half_precision():
    x = torch.ones(4, 1, 128, 2, 2, dtype=torch.bfloat16)
    x[0, 0, 0, :, :] = torch.tensor([[0.0, 0.0], [1.0, 0.0]])  # 511, 511, 512, 511: bfloat16 has only 512
    x[0, 0, 1, 0, 0] = 0  # 510
    assert PatchSelection(0.3).mask(x).tolist() == [[False, True, True, True]]
    assert PatchSelection(0.7).mask(x).tolist() == [[False, True, True, False]]
    assert PatchSelection(0.8).mask(x).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("name", ["test_spikformer", "test_autost"])
@pytest.mark.parametrize("neuron", ["lif", "relu"])
@torch.no_grad()
def test_blocks_compute_on_the_kept_patches(name, neuron):
    plain = settled(make(name, neuron=neuron)).eval()
    x = image_for(plain, 3)
    model = spikezoo.apply(plain, "multisp", patch_ratio=0.3, **ONLY)
    assert model.recipe == [
        ("multisp", {"patch_ratio": 0.3, "fixed": False, "pep_sparsity": 0, "binary_pep": False, "seed": 0})
    ]
    assert not tickets(model) and plain.recipe == [] and not model.training
    assert neuron == "relu" or alive(model)
    shapes = set()
    for module in model.stages.modules():
        if isinstance(module, LIF | ReLU):
            module.register_forward_hook(lambda _module, _inputs, out: shapes.add(tuple(out.shape[3:])))
    found = model(x)
    assert shapes == {(45, 1)}
    # The same by hand: stem, the best 45 of 64, blocks, head.
    tokens = plain.stem(x[None], plain.T)
    score = tokens.abs().sum((0, 2)).flatten(1)
    kept = score.sort(dim=1, descending=True, stable=True).indices[:, :45].sort(1).values
    tokens = torch.stack([tokens[:, b].flatten(2)[..., kept[b]] for b in range(3)], 1).unsqueeze(-1)
    for stage in plain.stages:
        tokens = stage(tokens)
    torch.testing.assert_close(found, plain.head(tokens.mean(0)), rtol=1e-5, atol=1e-6)
    assert (found - plain(x)).abs().max() > 1e-3
    mask = kept_patches(model, x)
    assert mask.shape == (3, 8, 8) and mask.sum((1, 2)).tolist() == [45] * 3
    assert torch.equal(mask.flatten(1).nonzero()[:, 1].view(3, 45), kept)


@pytest.mark.parametrize("kwargs", [{}, {"T": 1}, {"neuron": "relu"}, {"mpbn": "channel", "T": 2}])
@torch.no_grad()
def test_logits_do_not_depend_on_the_batch(kwargs):
    model = pruned(multisp={}, **kwargs).double().eval()
    x = image_for(model, 4, torch.float64)
    together = model(x)
    for b in range(4):
        torch.testing.assert_close(model(x[b : b + 1]), together[b : b + 1], rtol=1e-9, atol=1e-12)
    masks = kept_patches(model, x)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 1  # other images, other patches
    assert torch.equal(kept_patches(model, x[2:]), masks[2:])
    torch.testing.assert_close(model.forward_steps(x).mean(0), together, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_sizes_frames_and_features():
    model = pruned(multisp={}).eval()
    assert model(image_for(model)[..., :16, :16]).shape == (2, 10)  # 16 patches, of which 12
    assert model.forward_sequence(wave((2, 3, 16, 16)).float()).shape == (4, 2, 16, 12, 1)
    frames = wave((2, 3, 3, 32, 32)).float()
    assert model.forward_sequence(frames).shape == (3, 2, 16, 45, 1)
    assert kept_patches(model, frames).sum().item() == 90
    final, levels = model.forward_intermediates(image_for(model))
    assert {tuple(level.shape) for level in levels} == {(2, 16, 45, 1)} and len(levels) == 4
    assert torch.equal(final, model.forward_features(image_for(model)))
    features = create(features_only=True, out_indices=(0, 2), multisp={})
    assert [tuple(f.shape) for f in features(image_for(model))] == [(2, 16, 45, 1)] * 2
    model.reset_classifier(0, "")
    assert model(image_for(model)).shape == (2, 16, 45, 1)


# --------------------------------------------------------------------------------------------------------------
# The ticket
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("neuron", "kinds"), [("lif", {LIF}), ("plif", None), ("relu", {Sign}), ("sign", {Sign})])
def test_ticket_in_the_embedding_only(neuron, kinds):
    model = create(neuron=neuron, multisp={"pep_sparsity": 0.7, "patch_ratio": 0})
    convs = embedding(model)
    assert len(convs) == 5 and set(tickets(model)) == {f"stem.{name}" for name in convs}
    for conv in convs.values():
        weight, total = conv.weight, conv.weight.numel()
        assert int((weight != 0).sum()) == total - int(0.7 * total)
        assert len(weight.abs().unique()) == 2  # zero and the gain
    assert not any(parametrize.is_parametrized(module) for module in model.stages.modules())
    layers = [m for m in model.stem.modules() if isinstance(m, ConvNormNeuron)]
    assert kinds is None or {type(layer.neuron) for layer in layers} == kinds
    blocks = {type(m) for m in model.stages.modules() if isinstance(m, ReLU | Sign)}
    assert blocks == {"relu": {ReLU}, "sign": {Sign}}.get(neuron, set())
    model(image_for(model)).square().sum().backward()
    frozen = {name: conv.parametrizations.weight[0].frozen.clone() for name, conv in convs.items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.Adam(model.parameters(), 0.01).step()
    assert all(torch.equal(frozen[n], conv.parametrizations.weight[0].frozen) for n, conv in convs.items())
    assert [
        n for n, p in model.named_parameters() if p.grad is not None and p.grad.any() and torch.equal(p, before[n])
    ] == []
    assert any("original" in n and p.grad.any() for n, p in model.named_parameters())


def test_real_weights_and_seeds():
    real = create(neuron="relu", multisp={"binary_pep": False})
    conv = embedding(real)["4.conv"]
    assert len(conv.weight.abs().unique()) > 100 and {type(m) for m in real.modules()} & {ReLU, Sign} == {ReLU}
    weights = [
        embedding(create(multisp={"seed": seed}))["4.conv"].parametrizations.weight[0].frozen for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("test_spikformer", {}), ("test_spikformer", {"neuron": "relu"}), ("test_autost", {"T": 3}),
     ("test_spikformer", {"neuron": "plif", "mpbn": "channel", "T": 2})],
)  # fmt: skip
@torch.no_grad()
def test_baking_folding_and_saving(name, kwargs, tmp_path):
    model = pruned(name, multisp={}, **kwargs).eval()
    x = image_for(model)
    expected = model(x)
    assert expected.std() > 0
    baked = bake(model)
    assert torch.equal(baked(x), expected) and tickets(model) and not tickets(baked)
    for label, one in (("scores", model), ("baked", baked)):
        spikezoo.save_checkpoint(one, tmp_path / label)
        again = create(f"local-dir:{tmp_path / label}", pretrained=True).eval()
        assert torch.equal(again(x), expected) and [n for n, _ in again.recipe] == [n for n, _ in one.recipe]
    fresh = replay(create(name, **kwargs), baked.recipe)
    fresh.load_state_dict(baked.state_dict())
    assert torch.equal(fresh.eval()(x), expected)
    with pytest.raises(ValueError, match=r"spikezoo\.bake it first"):
        fold_bn(model)
    folded = fold_bn(baked.double())
    torch.testing.assert_close(folded(x.double()), baked(x.double()), rtol=1e-6, atol=1e-8)
    if kwargs.get("mpbn"):
        assert torch.equal(fold_mpbn(baked)(x.double()), baked(x.double()))


def test_tuning_of_the_embedding_alone():
    baked = bake(pruned(multisp={}))
    model = tune(baked)
    assert set(tickets(model)) == {f"stem.{name}" for name in embedding(model)}
    zeros = {name: conv.weight == 0 for name, conv in embedding(model).items()}
    model(image_for(model)).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    for name, conv in embedding(model).items():
        assert torch.equal(conv.weight == 0, zeros[name]) and len(conv.weight.abs().unique()) > 2


# --------------------------------------------------------------------------------------------------------------
# The second stage
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"neuron": "relu"}, {"neuron": "plif", "mpbn": "channel", "T": 2}])
def test_a_fixed_embedding_stays_fixed(kwargs, tmp_path):
    first, model = two_stages(**kwargs)
    assert [entry for entry, _ in model.recipe] == ["multisp", "bake", "multisp"]
    assert model.recipe[2][1] == {"patch_ratio": 0.3, "fixed": True}
    assert isinstance(model.stem, FixedStem) and not any(p.requires_grad for p in model.stem.parameters())
    assert all(p.requires_grad for p in model.stages.parameters())
    model.train()
    assert model.stages.training and not any(m.training for m in model.stem.modules())
    x = image_for(model)
    mask = kept_patches(model, x)
    assert torch.equal(kept_patches(model, x[:1]), mask[:1])  # in training, too
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 0.01)
    model(x).square().sum().backward()
    optimizer.step()
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed and not any(n.startswith("stem.") for n in changed)
    stem = first.stem.state_dict()
    assert all(torch.equal(value, stem[n]) for n, value in model.stem.state_dict().items()) and len(stem) > 20
    assert torch.equal(kept_patches(model.eval(), x), mask)
    spikezoo.save_checkpoint(model, tmp_path / "second")
    again = create(f"local-dir:{tmp_path / 'second'}", pretrained=True)
    assert torch.equal(again.eval()(x), model(x)) and not any(p.requires_grad for p in again.stem.parameters())


def test_a_fixed_embedding_without_selection():
    model = spikezoo.apply(two_stages()[0], "multisp", patch_ratio=0, fixed=True)
    assert isinstance(model.stem, FixedStem) and len(model.stem) == 7


# --------------------------------------------------------------------------------------------------------------
# Costs, compilers
# --------------------------------------------------------------------------------------------------------------


def pruned_macs(kept, **layout):
    """By hand: the embedding at 64 patches, blocks at those that are kept, the classifier."""
    d, ratios, heads = layout["d"], layout["ratios"], layout["heads"]
    step, first, head = macs_by_hand(**layout, channels=3, size=32, pools=(False, False, True, True), classes=10)
    n, small = 64, kept
    for r, h in zip(ratios, heads, strict=True):
        step -= (4 + 2 * r) * (n - small) * d * d + 2 * d * (n * min(n, d // h) - small * min(small, d // h))
    return step + first + head


@pytest.mark.parametrize(("ratio", "kept"), [(0.3, 45), (0.5, 32), (0.8, 13)])
def test_macs_fall_with_the_kept_share(ratio, kept):
    model = pruned(multisp={"patch_ratio": ratio, **ONLY}).eval()
    count = spikezoo.count(model, image_for(model, 2))
    layout = {"d": 16, "ratios": (2, 1, 1.5), "heads": (2, 1, 4)}
    assert count.macs_step == pruned_macs(kept, **layout) and count.uncounted == {}
    assert count.by_module["stages.1.0.mlp.fc2.conv"].macs == 4 * kept * 16 * 16
    rate = firing_rates(model, image_for(model, 2))["stages.1.0.mlp.fc1.neuron"].mean().item()
    found = count.by_module["stages.1.0.mlp.fc2.conv"]
    assert rate > 0 and found.sops_exact == pytest.approx(rate * found.macs, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "heads", "dim", "before", "after"),
    [("spikformer_tiny", 3, 192, 476.1, 365.7), ("spikformer_small", 6, 384, 1865, 1443)],
)
def test_macs_of_the_paper(name, heads, dim, before, after):
    layout = {"d": dim, "ratios": (4,) * 12, "heads": (heads,) * 12}
    assert pruned_macs(64, **layout) / 1e6 == pytest.approx(before, rel=2e-4)
    assert pruned_macs(45, **layout) / 1e6 == pytest.approx(after, rel=3e-4)
    if name == "spikformer_tiny":
        model = create(name, T=1, multisp={"patch_ratio": 0.3, **ONLY}).eval()
        assert spikezoo.count(model, torch.randn(1, 3, 32, 32)).macs == pruned_macs(45, **layout)


@COMPILER
@pytest.mark.parametrize("fixed", [False, True])
def test_compile(fixed):
    layout = {"depth": 1, "mlp_ratios": 1, "heads": 2, "T": 2}
    model = two_stages(**layout)[1] if fixed else pruned(multisp={}, **layout)
    model.train()
    twin = copy.deepcopy(model)
    x = image_for(model)
    expected = model(x)
    expected.square().sum().backward()
    out = torch.compile(twin, fullgraph=True, backend="eager")(x)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=n: f"{n}: {m}")


@COMPILER
@torch.no_grad()
def test_export():
    model = bake(pruned(depth=1, mlp_ratios=1, heads=2, T=2, multisp={})).eval()
    x = image_for(model, 3)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(program.module()(x[:1]), model(x[:1]), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_ratio": 1}, r"patch_ratio=1: expected a number in \[0, 1\)"),
        ({"patch_ratio": 1.5}, r"patch_ratio=1\.5: expected a number in \[0, 1\)"),
        ({"patch_ratio": -0.1}, r"patch_ratio=-0\.1: expected"),
        ({"patch_ratio": "0.3"}, "patch_ratio='0.3': expected"),
        ({"patch_ratio": float("nan")}, "patch_ratio=nan: expected"),
        ({"pep_sparsity": 1.0}, r"pep_sparsity=1\.0: expected a number in \[0, 1\)"),
        ({"pep_sparsity": -0.4}, r"pep_sparsity=-0\.4: expected"),
        ({"pep_sparsity": True}, "pep_sparsity=True: expected"),
        ({"binary_pep": "false"}, "binary_pep='false': expected True or False"),
        ({"fixed": 1}, "fixed=1: expected True or False"),
        ({"seed": -1}, "seed=-1: expected an integer"),
        ({"patch_ratio": 0, **ONLY}, "leave nothing to do"),
        ({"fixed": True}, "no baked ticket"),
        ({"fixed": True, "pep_sparsity": 0.5}, "leave pep_sparsity, binary_pep and seed out"),
        ({"patch_ration": 0.3}, "patch_ratio"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        create(multisp=arguments)


@pytest.mark.parametrize("name", ["test_spiking_vgg", "test_mpbn_resnet"])
def test_models_without_patches(name):
    with pytest.raises(ValueError, match="spikformer_tiny") as error:
        create(name, multisp={})
    assert "spikformer_small" in str(error.value) and "autost*" in str(error.value)
    for fitting in ("spikformer_tiny", "spikformer_small", *spikezoo.list_models(["spikformer*", "autost*"])):
        assert spikezoo.registry._classes[fitting].has_patches


def test_wrong_order():
    first, second = two_stages()
    with pytest.raises(ValueError, match="selects its patches already"):
        spikezoo.apply(second, "multisp", patch_ratio=0.5, fixed=True)
    with pytest.raises(ValueError, match="fixed=True"):
        spikezoo.apply(first, "multisp", patch_ratio=0.5)
    with pytest.raises(ValueError, match="is a ticket already"):
        spikezoo.apply(create(multisp={"patch_ratio": 0}), "multisp")
    with pytest.raises(ValueError, match="no baked ticket"):
        spikezoo.apply(create(multisp={"patch_ratio": 0}), "multisp", fixed=True)
    with pytest.raises(ValueError, match="mpbn='element'"):
        create(mpbn="element", multisp={})
    assert create(mpbn="element", multisp={"patch_ratio": 0})(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="takes all patches"):
        kept_patches(first, torch.randn(1, 3, 32, 32))
    # A ticket elsewhere, or a selection on top of a ticket of all layers, is no contradiction.
    both = create(ticket={"exempt": ["stem.*"]}, multisp={})
    assert len(tickets(both)) == 5 + 3 * 6 + 1
    assert len(tickets(create(ticket={}, multisp={"patch_ratio": 0.5, **ONLY}))) == len(tickets(both))


# --------------------------------------------------------------------------------------------------------------
# train.py and configs
# --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spikezoo.train.output.plot", lambda *_: [])
        yield load("train")


def test_two_stages_of_training(train, tmp_path):
    flags = "--model test_spikformer --T 1 --dataset digits --subset 64 -b 16 --epochs 1 --lr 0.05 --output"
    base = [*flags.split(), str(tmp_path)]
    train.main([*base, "--experiment", "first", "--multisp", "patch_ratio=0", "pep_sparsity=0.5"])
    start = ["--initial-checkpoint", str(tmp_path / "first")]
    train.main([*base, *start, "--experiment", "second", "--multisp", "patch_ratio=0.3", "fixed=true"])
    first, second = (create(f"local-dir:{tmp_path / name}", pretrained=True) for name in ("first", "second"))
    assert [entry for entry, _ in second.recipe] == ["multisp", "bake", "multisp"]
    assert second.recipe[0][1]["pep_sparsity"] == 0.5
    state = second.state_dict()
    same = {n for n, value in first.state_dict().items() if torch.equal(value, state[n])}
    assert {n for n in state if n.startswith("stem.")} <= same and "stages.0.0.mlp.fc1.conv.weight" not in same
    with pytest.raises(ValueError, match="no baked ticket"):  # the state of the run holds scores
        train.main(
            [*base, "--initial-checkpoint", str(tmp_path / "first" / "last.safetensors"), "--multisp", "fixed=true"]
        )


def test_flags(train, tmp_path):
    assert train.parse_args([]).multisp is None
    assert train.parse_args(["--multisp"]).multisp == {}  # the defaults, not: no MultiSp
    args = train.parse_args(
        ["--multisp", "binary_pep=false", "fixed=true", "patch_ratio=0.5", "--model-kwargs", "a=True"]
    )
    assert args.multisp == {"binary_pep": False, "fixed": True, "patch_ratio": 0.5} and args.model_kwargs == {"a": True}
    config = tmp_path / "c.yaml"
    config.write_text("model: test_spikformer\nmultisp: {patch_ratio: 3e-1, fixed: false}\n")
    args = train.parse_args(["--config", str(config)])
    assert train.model_arguments(args)["multisp"] == {"patch_ratio": 0.3, "fixed": False}


# Of the paper's table: CIFAR-10 and CIFAR-100, TINY and SMALL.
PAPER = {
    "vit": ((91.71, 74.37), (92.36, 75.12)),
    "spiking_vit": ((90.81, 73.84), (92.17, 75.43)),
    "pepsp_lt": ((90.04, 74.31), (91.76, 75.22)),
    "pepsp_slt": ((89.75, 73.68), (91.98, 74.86)),
    "multisp_lt": ((89.87, 73.21), (91.44, 74.09)),
    "multisp_slt": ((90.21, 73.82), (91.98, 74.89)),
}


COLUMNS = {"vit": "ViT", "spiking_vit": "Spiking-ViT", "pepsp_lt": "PEPSp-LT", "pepsp_slt": "PEPSp-SLT"}
COLUMNS |= {"multisp_lt": "MultiSp-LT", "multisp_slt": "MultiSp-SLT"}


@pytest.fixture(scope="module")
def planned(train):
    runs, _ = train.read_plan(TABLE, "elsewhere", [])
    return {run.name: run for run in runs}


def test_every_cell_of_the_table_has_a_row(planned):
    assert len(planned) == 2 * 2 * len(PAPER)
    for run in planned.values():
        assert run.args.opt == "adam" and run.args.weight_decay == 0
        assert run.args.neuron or (run.args.T, run.args.model_kwargs) == (4, {"decay": 0.99})


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("column", PAPER)
def test_rows_of_the_table(column, size, dataset, planned, train):
    # The paper's ViT is a ReLU Spikformer here, and its name says so.
    run = planned[f"{size}-{'relu' if column == 'vit' else column}-{dataset}"]
    assert run.plan.paper["top1"] == PAPER[column][size == "small"][dataset == "cifar100"]
    assert run.plan.cell == (f"{size.upper()} CIFAR-{dataset[5:]}", COLUMNS[column])
    args = run.args
    assert (args.model, args.dataset) == (f"spikformer_{size}", dataset)
    spiking = column.endswith(("spiking_vit", "_slt"))
    assert (args.neuron, args.T) == ((None, 4) if spiking else ("relu", None))
    # The whole net is only described; a narrow one is made.
    arguments = train.model_arguments(args)
    multisp = arguments.pop("multisp", None)
    assert create(args.model, device="meta", **arguments).num_classes == int(dataset[5:])
    small = {**arguments, "dim": 16, "depth": 1, "heads": 1}
    if column.startswith("multisp"):
        start = planned[f"{size}-{column.replace('multisp', 'pepsp')}-{dataset}"]
        assert Path(args.initial_checkpoint) == start.folder == Path("elsewhere") / "table" / start.name
        assert (start.args.neuron, start.args.T) == (args.neuron, args.T)
        stage = bake(create(args.model, **small, multisp=start.args.multisp))
        model = spikezoo.apply(stage, "multisp", **multisp)
        assert isinstance(model.stem, FixedStem) and model.stem[-1].ratio == 0.3
    elif column.startswith("pepsp"):
        model = create(args.model, **small, multisp=multisp)
        assert len(tickets(model)) == 5 and not any(isinstance(m, PatchSelection) for m in model.modules())
        assert model.recipe[0][1]["pep_sparsity"] == 0.4 and model.recipe[0][1]["binary_pep"]
    else:
        assert multisp is None
