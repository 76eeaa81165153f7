"""Event frames end to end: loader, augmentation, mixing, checks by shape, training, validation, pictures, configs."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train import assert_same_end, interrupted, load
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

import spikezoo
from spikezoo import data, pictures, search
from spikezoo.checkpoint import read_config
from spikezoo.cli import main
from spikezoo.data import augmentation, create_loader, natural_dataset
from spikezoo.hub import write_card

ROOT = Path(__file__).resolve().parent.parent
SENSOR = 8
CLASSES = ("left", "right")


def write(path, x, y, p, t=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, t=np.arange(len(x)) * 1000 if t is None else t, x=x, y=y, p=p)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 and 8 recordings of a dot that moves to the left or to the right, on a sensor of 8x8 pixels."""
    root = tmp_path_factory.mktemp("moving")
    (root / "sensor.txt").write_text(f"{SENSOR} {SENSOR}\n")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(CLASSES):
            for number in range(count):
                steps = np.arange(48)
                x = (steps // 6 if label else 7 - steps // 6) % SENSOR
                y = np.full(48, 2 + number % 4) + rng.integers(0, 2, 48)
                write(root / split / name / f"{number}.npz", x, y, rng.integers(0, 2, 48))
    return root


@pytest.fixture
def loader(folder):
    def make(split="train", **options):
        return create_loader(f"events:{folder}", split, **{"T": 4, "batch_size": 8, **options})

    return make


@pytest.fixture(scope="module")
def train():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spikezoo.train.output.plot", lambda *_: [])  # takes longer than the training
        yield load("train")


@pytest.fixture(scope="module")
def validate():
    return load("validate")


def gather(batches):
    frames, labels = zip(*batches, strict=True)
    return torch.cat(frames), torch.cat(labels)


# ------------------------------------------------------------------------------------------------------ loader


def test_batches_are_counts(loader, folder):
    found = loader()
    frames, labels = gather(found)
    assert frames.shape == (24, 4, 2, SENSOR, SENSOR) and frames.dtype == torch.float32
    assert labels.tolist() == [0] * 12 + [1] * 12 and (found.info.num_classes, found.info.in_chans) == (2, 2)
    assert torch.equal(frames.sum((1, 2, 3, 4)), torch.full((24,), 48.0))
    with np.load(folder / "train" / "right" / "0.npz") as events:  # the first 12 of 48 events
        expected = torch.zeros(2, SENSOR, SENSOR)
        for x, y, p in zip(*(events[key][:12] for key in "xyp"), strict=True):
            expected[p, y, x] += 1
    assert torch.equal(frames[12, 0], expected)
    assert "sha256" in found.facts["split_note"] and found.facts["frames_by"] == "number"
    assert found.info.split_note == found.facts["split_note"]


def test_floats_stay_floats(tmp_path):
    (tmp_path / "sensor.txt").write_text("4 6\n")
    for split, number in (("train", 700), ("test", 3)):
        write(tmp_path / split / "a" / "0.npz", np.full(number, 5), np.full(number, 1), np.ones(number, int))
    ((frames, _),) = create_loader(f"events:{tmp_path}", "train", T=1, batch_size=1)
    # 4x6 pixels become a square with an empty row above and below.
    assert frames.shape == (1, 1, 2, 6, 6) and frames[0, 0, 1, 2, 5] == 700 == frames.sum()
    ((frames, _),) = create_loader(f"events:{tmp_path}", "train", T=1, batch_size=1, img_size=3)
    assert frames[0, 0, 1, 1, 2] == 700 == frames.sum()
    ((frames, _),) = create_loader(f"events:{tmp_path}", "train", T=1, batch_size=1, mean=(1,), std=(2,))
    assert frames[0, 0, :, 2, 5].tolist() == [-0.5, 349.5]


def test_events_are_shared_by_area():
    frames = torch.zeros(1, 1, 2, 3, 3)
    frames[0, 0, 0, 1, 1], frames[0, 0, 1, 0, 2] = 8, 3
    out = augmentation.fit(frames, 2)
    # The middle pixel lies half in either row and column, the corner in one.
    assert out[0, 0].tolist() == [[[2, 2], [2, 2]], [[0, 3], [0, 0]]]
    g = torch.Generator().manual_seed(0)
    frames = torch.poisson(torch.full((3, 2, 2, 128, 128), 0.3), generator=g)
    out = augmentation.fit(frames, 48)
    torch.testing.assert_close(out.sum((3, 4)), frames.sum((3, 4)), rtol=1e-5, atol=0)
    torch.testing.assert_close(augmentation.fit(frames, 64), 4 * F.avg_pool3d(frames, (1, 2, 2)))
    assert (
        augmentation.fit(frames, 128) is frames and augmentation.fit(frames[:1, :1], 256).sum() == frames[:1, :1].sum()
    )


AUGMENTED = {
    "flip": {"hflip": 0.5},
    "crop": {"crop_padding": 2},
    "roll": {"roll": 3},
    "hole": {"cutout": 3},
    "snn": {"auto_augment": "snn"},
}


@pytest.mark.parametrize("kind", AUGMENTED)
def test_all_steps_of_a_sample_move_alike(loader, kind, monkeypatch):
    found = loader(train=True, **AUGMENTED[kind])
    still = np.random.default_rng(0).integers(0, 9, (24, 1, 2, SENSOR, SENSOR)).astype(np.uint8).repeat(4, 1)
    monkeypatch.setattr(found, "frames", type("Frames", (), {"frames": still}))
    changed = 0
    order = found._shard(0).split(8)
    for index, (frames, _) in zip(order, found, strict=True):
        assert torch.equal(frames, frames[:, :1].expand_as(frames))
        for before, after in zip(torch.from_numpy(still)[index, 0].float(), frames[:, 0], strict=True):
            changed += not torch.equal(before, after)
            if kind == "roll":
                shifts = [(i, j) for i in range(-3, 4) for j in range(-3, 4)]
                assert any(torch.equal(before.roll(shift, (1, 2)), after) for shift in shifts)
            if kind == "flip":
                assert torch.equal(after, before) or torch.equal(after, before.flip(2))
    assert changed > 5 and (kind in ("roll", "crop", "hole") or changed < 24)


def test_flips_are_for_classes_without_a_side(loader, monkeypatch):
    assert loader(train=True)._hflip == 0 and loader(train=True, hflip=0.3)._hflip == 0.3
    frames = loader().frames
    for name, probability in (("cifar10dvs", 0.5), ("nmnist", 0), ("dvs128gesture", 0)):
        info = data.dataset_info(name)
        assert data.EventLoader(frames, info, data.LoaderOptions(train=True, batch_size=8))._hflip == probability


def test_the_event_policy_against_torchvision():
    frames = torch.randint(0, 9, (240, 3, 20, 20), generator=torch.Generator().manual_seed(1)).float()
    out = augmentation.snn_policy(frames, torch.Generator().manual_seed(2))
    g = torch.Generator().manual_seed(2)
    chosen = torch.randint(6, (240,), generator=g)
    signed = 2 * torch.rand(240, generator=g) - 1
    torch.rand(240, generator=g)
    shift = torch.randint(-5, 6, (240,), generator=g)
    assert set(chosen.tolist()) == set(range(6)) and {-5, 5} <= set(shift.tolist())
    holes = []
    drawn = zip(chosen.tolist(), signed.tolist(), shift.tolist(), frames, out, strict=True)
    for kind, m, pixels, before, after in drawn:
        if kind == 0:
            expected = before
        elif kind == 1:
            shear = [math.degrees(0.3 * m), 0.0]
            expected = TF.affine(before, 0.0, [0, 0], 1.0, shear, InterpolationMode.NEAREST)
        elif kind == 4:
            expected = TF.rotate(before, -30 * m, InterpolationMode.NEAREST)
        elif kind in (2, 3):
            expected = TF.affine(before, 0.0, [-pixels, 0] if kind == 2 else [0, -pixels], 1.0, [0.0, 0.0])
        else:
            empty = (after != before).any(0)
            rows, columns = empty.any(1).nonzero(), empty.any(0).nonzero()
            box = after[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (box == 0).all() and box.shape[1] == box.shape[2]  # whole: 9 values at 3 channels leave no zeros
            assert torch.equal(after.where(~empty, before), before)
            holes.append(box.shape[1])
            continue
        different = (after != expected).any(0).sum()
        assert different <= (0 if kind in (0, 2, 3) else 2), f"{kind}: {different} pixels"  # ties of the nearest
    assert 1 <= min(holes) <= 2 and 5 <= max(holes) <= round(0.11**0.5 * 20)


# ------------------------------------------------------------------------------------------------------ mixing


def constant(found, monkeypatch):
    """Frames in which every value is the number of the sample, from 1 on."""
    values = np.arange(1, 25, dtype=np.uint8).reshape(24, 1, 1, 1, 1)
    fake = type("Frames", (), {"frames": np.broadcast_to(values, (24, 4, 2, SENSOR, SENSOR))})
    monkeypatch.setattr(found, "frames", fake)


@pytest.mark.parametrize("batch_size", [8, 7])
def test_cutmix_mixes_the_area_of_its_label(loader, monkeypatch, batch_size):
    found = loader(train=True, cutmix=1.0, batch_size=batch_size, num_classes=24, drop_last=False)
    constant(found, monkeypatch)
    found._labels = torch.arange(24)
    areas = set()
    for epoch in range(4):
        found.set_epoch(epoch)
        for frames, soft in found:
            assert torch.equal(soft.sum(1), torch.ones(len(soft)))
            for sample, weights in zip(frames, soft, strict=True):
                assert torch.equal(sample, sample[:1, :1].expand_as(sample))  # height and width only, alike at all T
                for number, weight in enumerate(weights.tolist(), 1):
                    share = (sample[0, 0] == number).float().mean().item()
                    assert share == pytest.approx(weight, abs=1e-6)
                    areas.add(round(weight, 3))
                square = (sample[0, 0] != sample[0, 0, 0, 0]).nonzero()
                if len(square):
                    sides = square.max(0).values - square.min(0).values + 1
                    assert sides.prod() == len(square) or sample[0, 0].unique().numel() == 2
    assert len(areas) > 6


def test_mixup_mixes_as_its_label(loader, monkeypatch):
    found = loader(train=True, mixup=0.8, num_classes=24, smoothing=0.12)
    constant(found, monkeypatch)
    found._labels = torch.arange(24)
    for frames, soft in found:
        hard = (soft - 0.12 / 24) / 0.88
        expected = hard @ torch.arange(1.0, 25)
        torch.testing.assert_close(frames, expected.view(-1, 1, 1, 1, 1).expand_as(frames))
        assert ((hard > 1e-6).sum(1) == 2).all()


# ------------------------------------------------------------------------------------- order, resuming, shards

HEAVY = {"auto_augment": "snn", "crop_padding": 2, "hflip": 0.5, "roll": 2, "cutout": 2, "mixup": 0.5, "cutmix": 1.0}


def test_a_run_that_stops_in_mid_epoch_continues_exactly(loader):
    found = loader(train=True, **HEAVY)
    found.set_epoch(3)
    torch.manual_seed(0)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    whole = list(found)
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == np.random.get_state()[1].tolist()
    fresh = loader(train=True, **HEAVY)
    fresh.set_epoch(3)
    rest = list(fresh.iterate(1))
    assert len(whole) == 3 and len(rest) == 2
    for (a, b), (c, d) in zip(whole[1:], rest, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    fresh.set_epoch(4)
    assert not torch.equal(next(iter(fresh))[0], whole[0][0])


def test_shards_share_the_recordings_out(loader):
    parts = [loader(train=True, rank=rank, world_size=3, batch_size=4)._shard(1).tolist() for rank in range(3)]
    assert sorted(number for part in parts for number in part) == list(range(24)) and {*map(len, parts)} == {8}
    tests = [loader("test", rank=rank, world_size=3)._shard(0).tolist() for rank in range(3)]
    assert sorted(number for part in tests for number in part) == list(range(8))
    assert loader(train=True, subset=10).num_samples == 10 and len(loader(train=True, subset=10)) == 1


def test_channels_last_makes_frames_that_need_no_copy(loader):
    plain, last = (next(iter(loader(channels_last=flag)))[0] for flag in (False, True))
    assert torch.equal(plain, last)
    frames = last.transpose(0, 1).flatten(0, 1)
    assert frames.data_ptr() == last.data_ptr() and frames.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_chans": 3}, "must be 2 as in events:.*--in-chans 2"),
        ({"train": True, "auto_augment": "cifar10"}, "events have no colours, e.g. --aa snn"),
        ({"train": True, "reprob": 0.5}, "left out for event frames"),
        ({"T": 0}, "at least 1, e.g. --T 10"),
        ({"roll": -1}, "--roll 5"),
        ({"frames_by": "hours"}, "number"),
        ({"frames_by": "duration"}, "duration_us"),
        ({"num_classes": 1}, "at least the 2 classes"),
    ],
)
def test_bad_options(loader, options, message):
    with pytest.raises(ValueError, match=message):
        loader(**options)


def test_options_of_events_on_images():
    with pytest.raises(ValueError, match="left out for digits, which holds images"):
        create_loader("digits", "test", frames_by="number")
    with pytest.raises(ValueError, match="a policy for images"):
        create_loader("digits", "train", train=True, auto_augment="snn")
    rolled = create_loader("digits", "train", train=True, batch_size=9, roll=2, crop_padding=0, mean=(0,), std=(1,))
    plain = create_loader("digits", "train", batch_size=1437, mean=(0,), std=(1,))
    images, _ = next(iter(rolled))
    originals = next(iter(plain))[0][rolled._shard(0)[:9]]
    for image, original in zip(images, originals, strict=True):
        shifts = [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
        assert any(torch.equal(original.roll(shift, (1, 2)), image) for shift in shifts)


def test_the_natural_dataset_of_event_models():
    assert natural_dataset(34, 2, 10) == "nmnist" and natural_dataset(128, 2, 11) == "dvs128gesture"
    assert natural_dataset(128, 2, 10) == "cifar10dvs"
    with pytest.raises(ValueError, match=r"events:PATH for event frames \(in_chans=2\)"):
        natural_dataset(48, 2, 10)
    for size in (8, 32):  # of digits and CIFAR-10, which are images
        with pytest.raises(ValueError, match=r"events:PATH for event frames \(in_chans=2\)"):
            natural_dataset(size, 2, 10)


def test_the_search_measures_on_frames():
    setting = search.Setting(T=3, num_classes=10, img_size=8, in_chans=2)
    frames = search.noise(setting, 5)
    assert frames.shape == (5, 3, 2, 8, 8)
    net = search.Net(dim=16, mlp_ratios=(1,), heads=(1,))
    assert search.score(net, "synflow", setting, images=frames) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_sees_what_the_cpu_sees(loader):
    options = {"train": True, "img_size": 6, **HEAVY, "auto_augment": None}  # whose nearest pixels may differ by a tie
    for (a, b), (c, d) in zip(loader(device="cuda", **options), loader(**options), strict=True):
        assert a.is_cuda and b.is_cuda
        torch.testing.assert_close(a.cpu(), c)
        torch.testing.assert_close(b.cpu(), d)


# ------------------------------------------------------------------------------------------------------ models


def events_model(name="test_mpbn_vgg", **kwargs):
    torch.manual_seed(5)
    return spikezoo.create_model(name, **{"in_chans": 2, "img_size": SENSOR, "num_classes": 2, "T": 4, **kwargs})


def test_models_take_what_they_were_made_for():
    model = events_model().eval()
    assert model.takes_events and model.input_shape == (4, 2, SENSOR, SENSOR)
    frames = torch.poisson(torch.full((2, 6, 2, SENSOR, SENSOR), 0.5))
    assert model(frames).shape == (2, 2) and model.forward_steps(frames).shape == (6, 2, 2)  # T from the data
    for shape, remedy in (((6, 2, 8, 8), "in_chans=3"), ((6, 3, 8, 8), "in_chans=3"), ((6, 1, 8, 8), "in_chans=1")):
        for forward in (model, model.forward_steps, model.forward_intermediates):
            with pytest.raises(ValueError, match=rf"batch of images .*event frames .*unsqueeze.* with {remedy}"):
                forward(torch.zeros(shape))
    assert torch.equal(model(frames[0].unsqueeze(0)), model(frames[:1]))
    with pytest.raises(ValueError, match="has 3 channels"):
        model(torch.zeros(2, 6, 3, 8, 8))
    images = events_model(in_chans=3)
    assert not images.takes_events and images.input_shape == (3, SENSOR, SENSOR)
    with pytest.raises(ValueError, match=r"has 2 channels .* with in_chans=2 for event frames"):
        images(frames)
    with pytest.raises(ValueError, match=r"with in_chans=2\."):
        images(frames[:, 0])


@pytest.mark.parametrize("flag", [{"multisp": {"patch_ratio": 0.5}}, {"ticket": {"kind": "mpslt", "sparsity": 0.4}}])
def test_transforms_take_event_frames(flag):
    model = events_model("test_spikformer", **flag).eval()
    frames = torch.poisson(torch.full((3, 5, *model.input_shape[1:]), 0.5))
    out = model(frames)
    assert out.shape == (3, 2) and torch.equal(spikezoo.bake(model)(frames), out)


@pytest.mark.parametrize("suffix", ["onnx", "nir"])
def test_export_without_an_example(suffix, tmp_path):
    pytest.importorskip("nir" if suffix == "nir" else "onnxruntime")
    model = events_model().eval()
    model.pretrained_cfg["inputs"] = {"mean": [0.0, 0.0], "std": [1.0, 1.0], "frames_by": "time"}
    path = spikezoo.export(model, tmp_path / f"a.{suffix}")
    if suffix == "nir":
        metadata = pytest.importorskip("nir").read(path).metadata
        text = metadata["spikezoo"]
        assert int(metadata["T"]) == 4
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
        assert session.get_inputs()[0].shape[1:] == [4, 2, SENSOR, SENSOR]
        text = session.get_modelmeta().custom_metadata_map["spikezoo"]
    assert json.loads(text)["frames_by"] == "time"


def test_export_on_noise(tmp_path, capsys):
    pytest.importorskip("nir")
    spikezoo.save_checkpoint(events_model(), tmp_path / "run")
    words = ["export", "--checkpoint", str(tmp_path / "run"), "--dataset", "none", "--images", "2", "--output"]
    assert main([*words, str(tmp_path / "a.nir")]) == 0
    assert "Wrote" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
def test_deploy_without_an_example(precision, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _name: None)  # no compiler, whose minutes this need not wait for
    model = events_model("test_spiking_vgg").eval()
    frames = torch.poisson(torch.full((3, 5, 2, SENSOR, SENSOR), 0.5), torch.Generator().manual_seed(0))
    fast = spikezoo.deploy(model, precision)
    assert fast(frames).shape == (3, 2)
    if precision == "exact":
        torch.testing.assert_close(fast(frames), model(frames))


def test_dynsnn_removes_neurons_of_event_models(folder, tmp_path, capsys):
    spikezoo.save_checkpoint(events_model("test_spiking_vgg"), tmp_path / "run", {"dataset": f"events:{folder}"})
    words = ["dynsnn", "--checkpoint", str(tmp_path / "run"), "--per", "channel", "--compression", "0.3"]
    assert main([*words, "--output", str(tmp_path / "less")]) == 0
    assert "neurons with firing rates below" in capsys.readouterr().out
    model = spikezoo.create_model(f"local-dir:{tmp_path / 'less'}", pretrained=True).eval()
    frames = next(iter(create_loader(f"events:{folder}", "test", T=4, batch_size=8)))[0]
    small = spikezoo.compact(model)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(small(frames), model(frames))


def test_the_card_says_which_split(tmp_path):
    results = {"dataset": "cifar10dvs", "split": "test", "top1": 50.0, "frames_by": "duration", "duration_us": 30000}
    note = "random-90-10-seed0/test, 1000 recordings, sha256 0123456789ab"
    spikezoo.save_checkpoint(events_model(), tmp_path, {**results, "split_note": note})
    text = write_card(tmp_path, "org/net").read_text()
    assert f"| {note} |" in text and "| Length of a frame | 30,000 us |" in text


def test_named_event_models():
    for name in ("spikformer_dvs_2_256", "autost_dvs_tiny"):
        assert spikezoo.create_model(name, device="meta").input_shape == (16, 2, 128, 128)


# ---------------------------------------------------------------------------------------------------- training


def flags(folder, output, *more):
    base = f"--model test_mpbn_vgg --T 4 --dataset events:{folder} -b 8 --epochs 2 --lr 0.05 --experiment run"
    return [*base.split(), "--output", str(output), *map(str, more)]


def test_a_run_learns_resumes_and_is_validated(train, validate, folder, tmp_path, monkeypatch, capsys):
    more = "--aa snn --roll 1 --crop-padding 1 --cutmix 1.0 --mixup 0.5 --smoothing 0.1 --tet --recovery-interval 2"
    more = [*more.split(), "--frames-by", "time"]
    train.main(flags(folder, tmp_path / "whole", *more))
    argv = flags(folder, tmp_path / "parts", *more, "--resume", "auto")
    interrupted(train, argv, 6, monkeypatch)
    train.main(argv)
    assert_same_end(tmp_path / "whole" / "run", tmp_path / "parts" / "run")
    run = tmp_path / "whole" / "run"
    block = read_config(run)["spikezoo"]
    results = block["results"]
    assert results["frames_by"] == "time" and "8 recordings, sha256" in results["split_note"]
    arguments = read_config(run)["model_args"]
    assert (arguments["in_chans"], arguments["img_size"], arguments["num_classes"]) == (2, SENSOR, 2)
    # Frames as in training, without a flag; by number of events they are others.
    for checkpoint in (run, run / "last.safetensors"):
        assert validate.main(["--checkpoint", str(checkpoint), "--results-file", str(tmp_path / "r.json")]) == 0
        (row,) = json.loads((tmp_path / "r.json").read_text())
        assert {key: row[key] for key in ("top1", "frames_by", "split_note")} == {
            key: results[key] for key in ("top1", "frames_by", "split_note")
        }
        assert row["loss"] == pytest.approx(results["loss"], abs=1e-5) and row["split"] == "test"
    words = ["--checkpoint", str(run), "--frames-by", "duration", "--duration-us", "4000", "--count", "--T", "5"]
    assert validate.main([*words, "--results-file", str(tmp_path / "r.csv")]) == 0
    with open(tmp_path / "r.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["frames_by"], row["duration_us"], row["T"]) == ("duration", "4000", "5")
    # Events are spikes: there is no MAC, whose price would show.
    energy = float(row["sops_exact"]) * float(row["sop_pj"]) * 1e-9
    assert energy > 0 and float(row["energy_exact_mj"]) == pytest.approx(energy)
    assert "made with T=4 and is evaluated with T=5" in capsys.readouterr().out


def test_a_run_learns(train, folder, tmp_path):
    more = "--epochs 15 --opt adamw --lr 0.01 --model-kwargs decay=0.8"
    train.main(flags(folder, tmp_path, *more.split()))
    results = read_config(tmp_path / "run")["spikezoo"]["results"]
    assert results["top1"] == 100 and results["samples"] == 8  # only the order of the frames tells the classes


def test_the_twin_sees_all_events_in_one_frame(train, folder, tmp_path):
    argv = [word for word in flags(folder, tmp_path, "--neuron", "relu", "--epochs", 1) if word not in ("--T", "4")]
    train.main(argv)
    assert read_config(tmp_path / "run")["model_args"]["T"] == 1


def test_events_need_an_event_model(train, folder, tmp_path):
    with pytest.raises(ValueError, match="in_chans=3 is not possible: it must be 2 as in events:"):
        train.main(flags(folder, tmp_path, "--in-chans", 3))
    with pytest.raises(ValueError, match="in_chans=2 is not possible: it must be 1 as in digits"):
        train.main(["--dataset", "digits", "--model", "test_mpbn_vgg", "--in-chans", "2", "--output", str(tmp_path)])


# ---------------------------------------------------------------------------------------------------- pictures


def test_event_colours():
    frames = torch.zeros(1, 2, 2, 2)
    frames[0, 0, 0, 0] = frames[0, 1, 0, 1] = frames[0, :, 1, 0] = 4
    pixels = pictures.event_pixels(frames)
    (off, on), (both, none) = pixels[0]
    assert pixels.shape == (1, 2, 2, 3) and off.argmax() == 2 and on.argmax() == 0
    assert none.tolist() == [1, 1, 1] and both.tolist() == [0, 0, 0]
    assert (pictures.event_pixels(torch.zeros(3, 2, 4, 4)) == 1).all()
    frames = torch.ones(2, 2, 10, 10)
    frames[0, 0, 0, 0] = 1e6  # one restless pixel
    assert (pictures.event_pixels(frames)[1] == 0).all()
    summed = pictures.to_pixels((frames[None] - 1) / 2, (1, 1), (2, 2))
    assert torch.equal(summed, pictures.event_pixels(frames.sum(0)[None]))


@torch.no_grad()
def test_spikes_over_time():
    model = events_model("test_spiking_vgg")
    frames = torch.poisson(torch.full((6, 2, SENSOR, SENSOR), 0.5))
    seen = []
    handle = model.stages[0][0].neuron.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    layer, spikes, rates = pictures.spikes_over_time(model, frames, "stages.0")
    handle.remove()
    assert layer == "stages.0.0.neuron" and model.training and torch.equal(spikes, seen[0][:, 0].flatten(1))
    assert spikes.shape[0] == 6 and spikes.sum() > 0
    expected = spikezoo.firing_rates(model.eval(), frames[None])
    assert list(rates) == list(expected)
    for name, values in rates.items():
        assert values == pytest.approx(expected[name].tolist())
    names = list(rates)
    assert pictures.spikes_over_time(model, frames)[0] == names[len(names) // 2]
    with pytest.raises(ValueError, match=r"no spiking neurons\. Valid: neck.0.neuron"):
        pictures.spikes_over_time(model, frames, "head.fc")
    with pytest.raises(ValueError, match="is no layer of this SpikingVGG"):
        pictures.spikes_over_time(model, frames, "stage.0")
    with pytest.raises(ValueError, match="no spiking neurons: its neurons have no time"):
        pictures.spikes_over_time(events_model(neuron="relu", T=1), frames)


def test_commands(folder, tmp_path, capsys, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, imshow = [], axes.imshow
    monkeypatch.setattr(axes, "imshow", lambda self, x, **kw: drawn.append(torch.as_tensor(x)) or imshow(self, x, **kw))
    words = ["events", f"events:{folder}", "--T", "9", "--recording", "7", "--plot", str(tmp_path / "e.png")]
    assert main(words) == 0
    assert "recording 7 of class right: 48 events" in capsys.readouterr().out
    assert (tmp_path / "e.png").read_bytes()[:4] == b"\x89PNG"
    assert [picture.shape for picture in drawn] == [(SENSOR, SENSOR, 3)] * 9
    # 5 events a frame, of which some fall on the same pixel, and 8 in the last.
    assert all(1 <= (picture < 1).any(2).sum() <= 8 for picture in drawn)
    events = {"dataset": f"events:{folder}"}
    spikezoo.save_checkpoint(events_model("test_spiking_vgg", num_classes=2), tmp_path / "vgg", events)
    words = ["raster", "--checkpoint", str(tmp_path / "vgg"), "--image", "1", "--neurons", "9", "--plot"]
    assert main([*words, str(tmp_path / "r.svg")]) == 0
    said = capsys.readouterr().out
    assert "in 4 time steps" in said
    assert (tmp_path / "r.svg").read_text().startswith("<?xml")
    total = int(said.split(" spikes of ")[1].split()[0].replace(",", ""))
    model = spikezoo.create_model(f"local-dir:{tmp_path / 'vgg'}", pretrained=True)
    frames = next(create_loader(f"events:{folder}", "test", T=4, batch_size=1).iterate(1))[0][0]
    _, spikes, _ = pictures.spikes_over_time(model, frames)
    shown = torch.linspace(0, total - 1, 9).round().long()
    assert spikes.shape == (4, total) and torch.equal(drawn[-1], spikes[:, shown].T)
    spikezoo.save_checkpoint(events_model("test_spikformer", T=3), tmp_path / "former", events)
    assert main(["activations", "--checkpoint", str(tmp_path / "former"), "--plot", str(tmp_path / "a.png")]) == 0
    assert main(["patches", "--checkpoint", str(tmp_path / "former"), "--plot", str(tmp_path / "p.png")]) == 0
    assert main(["count", "--checkpoint", str(tmp_path / "former"), "--images", "2", "--json"]) == 0
    assert main(["count", "--checkpoint", str(tmp_path / "vgg"), "--dataset", "none", "--images", "1"]) == 0
    assert "1 images of random noise" in capsys.readouterr().out
    for bad, message in (
        (["events", "digits", "--plot", "x.png"], "unknown event dataset 'digits'"),
        (["events", f"events:{folder}", "--recording", "8", "--plot", "x.png"], "recordings 0 to 7"),
        ([*words, "x.png", "--image", "8"], "has images 0 to 7"),
        ([*words, "x.gif"], "ends in .png"),
        ([*words, "x.png", "--neurons", "0"], "--neurons 0"),
    ):
        assert main(bad) == 2
        assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- configs

EVENTS = ROOT / "configs" / "events"
# Of the papers: MACs of a frame, the accuracy, its dataset.
CONFIGS = {
    "mpbn_resnet19_cifar10dvs": ("5,139.1 M", "74.40 %"),
    "mpbn_resnet20_cifar10dvs": ("484.0 M", "78.70 %"),
    "autost_tiny_cifar10dvs": ("598.3 M", "81.6 %"),
    "spikformer_2_256_cifar10dvs": ("375.4 M", "80.9 %"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_single_runs(train, name):
    macs, paper = CONFIGS[name]
    text = (EVENTS / f"{name}.yaml").read_text()
    assert text.startswith(f"# python train.py --config configs/events/{name}.yaml --data-dir DATA")
    assert f"at {macs} MACs a frame" in text and f"# Paper: {paper} at T=" in text and "Not run here" in text
    args = train.parse_args(["--config", str(EVENTS / f"{name}.yaml")])
    model = spikezoo.create_model(args.model, device="meta", **train.model_arguments(args))
    size = 48 if "mpbn" in name else 128
    assert model.input_shape == (args.T, 2, size, size) and args.dataset == "cifar10dvs"


def test_configs_of_a_few_minutes(train):
    args = train.parse_args(["--config", str(EVENTS / "nmnist_subset.yaml")])
    model = spikezoo.create_model(args.model, device="meta", **train.model_arguments(args))
    assert model.input_shape == (8, 2, 34, 34) and args.hflip is None


@pytest.mark.parametrize(("name", "cells"), [("slt_table", 24), ("multisp_table", 24)])
def test_tables(train, name, cells):
    runs, _ = train.read_plan(EVENTS / f"{name}.yaml", "output", [])
    assert len(runs) == cells == len({run.plan.cell for run in runs if 70 < run.plan.paper["top1"] < 98})
    folders = {str(run.folder) for run in runs}
    for run in runs:
        assert (run.args.neuron is None) == (run.args.T is not None)
        # One number of time steps and one decay, as the papers have it.
        assert run.args.neuron or (run.args.T, run.args.model_kwargs["decay"]) == (4, 0.99)
        assert run.args.opt == "adam" and run.args.weight_decay == 0
        assert run.args.dataset == run.name.rpartition("-")[2] and run.args.hflip is None
        assert ("resnet19" in run.name) == (run.args.model == "spiking_resnet19")
        assert ("small" in run.name) == (run.args.model == "spikformer_small")
        if run.args.initial_checkpoint:
            assert run.args.initial_checkpoint in folders and run.args.multisp["fixed"]
        assert bool(run.args.ticket) == (name == "slt_table" and run.name.split("-")[1] not in ("ann", "snn"))
