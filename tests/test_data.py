"""Tests of spikezoo.data: no network, no data on disk, truths by hand."""

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

import spikezoo
from spikezoo.cli.validate import main as validate
from spikezoo.data import (
    DatasetInfo,
    Loader,
    augmentation,
    create_loader,
    dataset_info,
    list_datasets,
    load_arrays,
    loaders,
    natural_dataset,
)
from spikezoo.data import images as image_files
from spikezoo.data.info import natural
from spikezoo.evaluate import dataset_arguments, input_options, open_model

# timm leaves the files of images and the tar file that it has opened to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file <_io.BufferedReader:ResourceWarning")


def _arrays(train=40, test=13, size=16, channels=3, classes=4):
    rng = np.random.default_rng(0)
    shape = (size, size) if channels is None else (size, size, channels)
    return {
        "train_images": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "train_labels": np.arange(train) % classes,
        "test_images": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "test_labels": np.arange(test) % classes,
    }


@pytest.fixture
def npz(tmp_path):
    np.savez(tmp_path / "small.npz", **_arrays())
    return f"npz:{tmp_path / 'small.npz'}"


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(1)
    for split, count in (("train", 6), ("val", 3)):
        for label in ("apple", "bird"):
            place = tmp_path / "images" / split / label
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return str(tmp_path / "images")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def _same(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True))


def _states():
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _assert_states(before):
    after = _states()
    assert before[0] == after[0]
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert torch.equal(before[2], after[2])


HEAVY = {
    "plain": {},
    "all": {
        "cutout": 5,
        "reprob": 0.5,
        "mixup": 0.8,
        "cutmix": 1.0,
        "smoothing": 0.1,
        "auto_augment": "cifar10",
    },
    "rand": {"auto_augment": "rand-m9-mstd0.5", "reprob": 0.9, "remode": "const"},
    "trivial": {"auto_augment": "trivial", "cutmix": 1.0},
}


# --- names and descriptions ----------------------------------------------------------------------


def test_list_datasets():
    assert {"digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "npz:PATH"} <= set(list_datasets())
    assert {"imagenet", "folder", "hfds/NAME", "torch/NAME"} <= set(list_datasets())


@pytest.mark.parametrize(
    ("name", "classes", "channels", "size"),
    [
        ("cifar10", 10, 3, 32),
        ("cifar100", 100, 3, 32),
        ("mnist", 10, 1, 28),
        ("fashion_mnist", 10, 1, 28),
        ("digits", 10, 1, 8),
        ("imagenet", 1000, 3, 224),
    ],
)
def test_info_constants(name, classes, channels, size):
    info = dataset_info(name)
    assert (info.num_classes, info.in_chans, info.img_size) == (classes, channels, size)
    assert len(info.mean) == len(info.std) == channels
    assert len(info.label_names) == (0 if name == "imagenet" else classes)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((8, 1, 10), "digits"),
        ((28, 1, 10), "mnist"),
        ((32, 3, 10), "cifar10"),
        ((32, 3, 100), "cifar100"),
        ((224, 3, 1000), "imagenet"),
        ((64, 3, 200), "imagenet"),
    ],
)
def test_natural_dataset(shape, name):
    assert natural_dataset(*shape) == name


@pytest.mark.parametrize("shape", [(32, 3, 7), (28, 3, 10), (16, 3, 10), (48, 2, 10)])
def test_natural_dataset_unknown(shape):
    with pytest.raises(ValueError, match="--dataset digits"):
        natural_dataset(*shape)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cifr10", "did you mean cifar10"),
        ("MNIST", "--dataset mnist"),
        ("digit", "--dataset digits"),
        ("zzz", "e.g. --dataset digits"),
        ("hfds/", "unknown dataset"),
        ("hfids/some", "streams cannot be resumed"),
        ("some/file.npz", "--dataset npz:some/file.npz"),
    ],
)
def test_unknown_name(name, said):
    for call in (
        lambda: dataset_info(name),
        lambda: load_arrays(name, "train"),
        lambda: create_loader(name, "train"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert said in str(error.value)


def test_folder_given_as_name(tmp_path):
    with pytest.raises(ValueError, match="--dataset folder --data-dir"):
        dataset_info(str(tmp_path))


def test_load_arrays_of_a_timm_name():
    with pytest.raises(ValueError, match="create_loader"):
        load_arrays("imagenet", "train")


# --- digits --------------------------------------------------------------------------------------


def test_digits_split():
    from sklearn.datasets import load_digits

    raw = load_digits()
    train, train_labels = load_arrays("digits", "train")
    test, test_labels = load_arrays("digits", "test")
    assert train.shape == (1437, 1, 8, 8) and test.shape == (360, 1, 8, 8)
    assert train.dtype == torch.uint8 and train_labels.dtype == torch.int64
    assert train_labels.unique().tolist() == test_labels.unique().tolist() == list(range(10))
    # Every image of the source is in exactly one split, at the place that the rule gives it.
    is_test = np.arange(1797) % 5 == 0
    for images, labels, chosen in ((test, test_labels, is_test), (train, train_labels, ~is_test)):
        assert np.array_equal(images[:, 0], np.round(raw.images[chosen] * 255 / 16))
        assert np.array_equal(labels, raw.target[chosen])
    pixels = train.double() / 255
    info = dataset_info("digits")
    assert info.mean == (round(pixels.mean().item(), 4),)
    assert info.std == (round(pixels.std(correction=0).item(), 4),)
    assert "360" in info.split_note and "1437" in info.split_note


def test_digits_eval_order_and_values():
    images, labels = load_arrays("digits", "val")
    loader = create_loader("digits", "test", batch_size=100)
    assert isinstance(loader, Loader)
    assert len(loader) == 4 and loader.num_samples == 360
    batches = list(loader)
    assert [len(x) for x, _ in batches] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([y for _, y in batches]), labels)
    wanted = (images.float() / 255 - 0.3053) / 0.3762
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), wanted)


def test_digits_are_not_flipped_by_default():
    loader = create_loader("digits", "train", train=True, crop_padding=0)
    plain = create_loader("digits", "train", train=True, crop_padding=0, hflip=0.0)
    flipped = create_loader("digits", "train", train=True, crop_padding=0, hflip=0.5)
    assert _same(loader, plain) and not _same(loader, flipped)
    assert create_loader("digits", "train", train=True)._padding == 1


def test_natural_augmentation(npz, tmp_path):
    loader = create_loader(npz, "train", train=True)
    assert (loader._hflip, loader._padding) == (0.5, 2)
    loader = create_loader(npz, "train", train=True, img_size=32)
    assert loader._padding == 4
    loader = create_loader(npz, "train", train=True, img_size=28)
    assert loader._padding == 2
    np.savez(tmp_path / "grey.npz", **_arrays(channels=None))
    assert create_loader(f"npz:{tmp_path / 'grey.npz'}", "train", train=True)._hflip == 0


# --- pieces of the augmentation, against slow loops ----------------------------------------------


@pytest.mark.parametrize("padding", [1, 4])
def test_crop_against_loop(padding):
    images = torch.randint(1, 256, (9, 3, 8, 10), dtype=torch.uint8)
    top = torch.randint(2 * padding + 1, (9,))
    left = torch.randint(2 * padding + 1, (9,))
    got = augmentation.crop(images, padding, top, left)
    assert got.dtype == torch.uint8
    for i in range(9):
        padded = torch.zeros(3, 8 + 2 * padding, 10 + 2 * padding, dtype=torch.uint8)
        padded[:, padding:-padding, padding:-padding] = images[i]
        assert torch.equal(got[i], padded[:, top[i] : top[i] + 8, left[i] : left[i] + 10])


@pytest.mark.parametrize(
    ("size", "row", "column", "rows", "columns"),
    [
        (4, 5, 5, range(3, 7), range(3, 7)),  # in the middle: the whole 4 x 4
        (4, 0, 0, range(2), range(2)),  # at the corner: a quarter
        (4, 9, 5, range(7, 10), range(3, 7)),  # at the border: cut off
        (3, 5, 5, range(4, 7), range(4, 7)),
        (1, 0, 9, range(1), range(9, 10)),
    ],
)
def test_cutout_hole(size, row, column, rows, columns):
    images = torch.full((1, 2, 10, 10), 7, dtype=torch.uint8)
    got = augmentation.cutout(images, size, torch.tensor([row]), torch.tensor([column]))
    wanted = images.clone()
    wanted[:, :, rows.start : rows.stop, columns.start : columns.stop] = 0
    assert torch.equal(got, wanted)
    assert (got == 0).sum() == 2 * len(rows) * len(columns)


@pytest.mark.parametrize("magnitude", range(11))
def test_policies_work_at_every_magnitude(magnitude):
    # The Spikformer recipes reach magnitude 10 by chance, where timm posterizes to 0 bits and Pillow raises.
    policy = augmentation.policy(f"rand-m{magnitude}-inc1-p1.0", 8, (0.5, 0.5, 0.5))
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    ops = policy.transforms[0].ops
    assert len(ops) == 15
    for op in ops:
        out = op(image)
        assert (out.size, out.mode) == ((8, 8), "RGB")
        if op.name == "PosterizeIncreasing":
            mask = 256 - 2 ** (8 - (4 - int(magnitude * 0.4)))  # keeps 4 down to 0 bits
            assert np.array_equal(np.array(out), np.array(image) & mask)


def _by_sample(loader, epoch):
    """The delivered images by the number of their sample."""
    loader.set_epoch(epoch)
    numbers = [loader.numbers(epoch, batch) for batch in range(len(loader))]
    return dict(zip(torch.cat(numbers).tolist(), torch.cat([images for images, _ in loader]), strict=True))


PLAIN = {"train": True, "mean": (0.0,), "std": (1.0,), "batch_size": 10}


def test_translation_mirrors_the_border(npz):
    stored, _ = load_arrays(npz, "train")
    seen = set()
    for number, image in _by_sample(create_loader(npz, "train", translate=2, hflip=0.0, **PLAIN), 0).items():
        # numpy's reflection, and every window of it
        padded = np.pad(stored[number].numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
        windows = {(y, x): padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)}
        found = [place for place, window in windows.items() if np.array_equal(window, (image * 255).round().numpy())]
        assert found
        seen.add(found[0])
    assert len(seen) > 10
    with pytest.raises(ValueError, match="left out beside crop_padding=4"):
        create_loader(npz, "train", translate=2, crop_padding=4, **PLAIN)


def test_alternating_flip_takes_turns(npz):
    loader = create_loader(npz, "train", alternating_flip=True, crop_padding=0, **PLAIN)
    stored, _ = load_arrays(npz, "train")
    epochs = [_by_sample(loader, epoch) for epoch in range(3)]
    mirrored = [{n: torch.equal((i * 255).round(), stored[n].flip(2).float()) for n, i in e.items()} for e in epochs]
    assert all(mirrored[0][n] != mirrored[1][n] and mirrored[0][n] == mirrored[2][n] for n in range(len(stored)))
    assert 0.2 < sum(mirrored[0].values()) / len(stored) < 0.8


def test_views_come_again_whatever_the_order_and_the_batch(npz):
    given = {"views": 2, "translate": 2, "alternating_flip": True, "cutout": 3, "roll": 1}
    small, large = (create_loader(npz, "train", **given, **PLAIN | {"batch_size": size}) for size in (10, 20))
    first, second, third = (_by_sample(small, epoch) for epoch in range(3))
    other = _by_sample(large, 4)
    alone = small.load(torch.tensor([7]), 0)[0]
    assert all(torch.equal(first[n], third[n]) and torch.equal(first[n], other[n]) for n in first)
    assert torch.equal(alone, first[7])
    assert not all(torch.equal(first[n], second[n]) for n in first)
    for option in ({"mixup": 0.2}, {"reprob": 0.5}, {"auto_augment": "trivial"}):
        with pytest.raises(ValueError, match=f"left out beside {next(iter(option))}"):
            create_loader(npz, "train", views=2, **option, **PLAIN)


def test_holdout_and_its_rest_are_the_split(npz):
    parts = [create_loader(npz, "train", holdout=8, held_out=held, seed=seed) for held in (0, 1) for seed in (1, 2)]
    assert parts[0].samples.equal(parts[1].samples) and parts[2].samples.equal(parts[3].samples)
    assert sorted(torch.cat([parts[0].samples, parts[2].samples]).tolist()) == list(range(40))
    labels = torch.cat([labels for _, labels in parts[2]])
    assert labels.bincount().tolist() == [2, 2, 2, 2]
    few = create_loader(npz, "train", holdout=8, subset=12, seed=3)
    assert few.num_samples == 12 and set(few.samples.tolist()) <= set(parts[0].samples.tolist())
    with pytest.raises(ValueError, match="holdout=40 is not possible: it must be below 40"):
        create_loader(npz, "train", holdout=40)


def test_loader_augments_like_a_loop(npz):
    """Repeats a whole augmented batch image by image from the same random numbers."""
    images, labels = load_arrays(npz, "train")
    loader = create_loader(npz, "train", train=True, batch_size=8, seed=5, cutout=4, crop_padding=3)
    loader.set_epoch(2)
    order = torch.randperm(40, generator=augmentation.seeded_generator("order", 5, 2))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (loader.info.mean, loader.info.std))
    for batch, (got, targets) in enumerate(loader):
        chosen = order[batch * 8 : batch * 8 + 8]
        assert torch.equal(targets, labels[chosen])
        generator = augmentation.seeded_generator("augment", 5, 2, batch, 0)
        top = torch.randint(7, (8,), generator=generator)
        left = torch.randint(7, (8,), generator=generator)
        flip = torch.rand(8, generator=generator) < 0.5
        row = torch.randint(16, (8,), generator=generator)
        column = torch.randint(16, (8,), generator=generator)
        for i, index in enumerate(chosen.tolist()):
            padded = torch.zeros(3, 22, 22, dtype=torch.uint8)
            padded[:, 3:19, 3:19] = images[index]
            image = padded[:, top[i] : top[i] + 16, left[i] : left[i] + 16].clone()
            image = image.flip(2) if flip[i] else image
            y, x = row[i] - 2, column[i] - 2
            image[:, max(y, 0) : max(y + 4, 0), max(x, 0) : max(x + 4, 0)] = 0
            torch.testing.assert_close(got[i], (image.float() / 255 - mean) / std)


def test_resize_and_channels(npz):
    images, _ = load_arrays(npz, "test")
    info = dataset_info(npz)
    loader = create_loader(npz, "test", img_size=8, in_chans=1, batch_size=13)
    ((got, _),) = loader
    assert got.shape == (13, 1, 8, 8) and loader.info.img_size == 8 and loader.info.in_chans == 1
    grey = np.stack([np.asarray(Image.fromarray(i.permute(1, 2, 0).numpy()).convert("L")) for i in images])
    grey = torch.from_numpy(grey)[:, None].float()
    wanted = torch.nn.functional.interpolate(grey, (8, 8), mode="bilinear", antialias=True)
    mean, std = np.mean(info.mean), np.mean(info.std)
    assert loader.info.mean == (pytest.approx(mean),)
    # PIL's luma is another by one of 255 steps at most.
    back = (got * std + mean) * 255
    assert (back - wanted).abs().max() < 1.6


def test_grey_to_rgb_and_given_statistics():
    ((got, _),) = create_loader("digits", "test", in_chans=3, batch_size=360, mean=(0.5,), std=(2, 2, 2))
    images, _ = load_arrays("digits", "test")
    torch.testing.assert_close(got, ((images.float() / 255 - 0.5) / 2).expand(-1, 3, -1, -1))


def test_channels_last(npz):
    for images, _ in create_loader(npz, "train", train=True, batch_size=8, channels_last=True):
        assert images.is_contiguous(memory_format=torch.channels_last)
    for images, _ in create_loader(npz, "train", train=True, batch_size=8):
        assert images.is_contiguous()


def test_erasing(npz):
    kwargs = {"train": True, "hflip": 0, "crop_padding": 0, "batch_size": 40}
    ((plain, _),) = create_loader(npz, "train", **kwargs)
    ((erased, _),) = create_loader(npz, "train", reprob=1.0, remode="const", **kwargs)
    changed = plain != erased
    assert (erased[changed] == 0).all()
    assert changed.any(dim=(1, 2, 3)).all()


# --- mixing --------------------------------------------------------------------------------------


def test_soft_targets(npz):
    loader = create_loader(npz, "train", train=True, batch_size=8, mixup=1.0, smoothing=0.1, hflip=0, crop_padding=0)
    plain = create_loader(npz, "train", train=True, batch_size=8, hflip=0, crop_padding=0)
    for (mixed, soft), (images, labels) in zip(loader, plain, strict=True):
        assert soft.shape == (8, 4) and soft.dtype == torch.float32
        torch.testing.assert_close(soft.sum(1), torch.ones(8))
        hot = torch.nn.functional.one_hot(labels, 4) * 0.9 + 0.1 / 4
        # One lambda per batch, and it explains images and targets alike.
        flipped = images.flip(0)
        lam = ((mixed - flipped) * (images - flipped)).sum() / (images - flipped).square().sum()
        torch.testing.assert_close(mixed, lam * images + (1 - lam) * flipped)
        torch.testing.assert_close(soft, lam * hot + (1 - lam) * hot.flip(0))


def test_odd_batches_and_wider_targets(npz):
    loader = create_loader(npz, "train", train=True, batch_size=7, cutmix=1.0, num_classes=6, drop_last=False)
    sizes = [len(y) for _, y in loader]
    assert sizes == [7] * 5 + [5]
    for images, soft in loader:
        assert len(images) == len(soft) and soft.shape[1] == 6
        assert soft[-1].max() == 1  # the unpaired one stays as it is
    ((_, soft),) = create_loader(npz, "train", train=True, subset=1, mixup=1.0)
    assert soft.shape == (1, 4)


def test_no_mixing_without_training(npz):
    for _, labels in create_loader(npz, "test", mixup=1.0, cutmix=1.0, reprob=0.5, auto_augment="trivial"):
        assert labels.dtype == torch.int64
    assert _same(create_loader(npz, "test", mixup=1.0, cutout=4), create_loader(npz, "test"))


# --- a pure function of seed, epoch, batch and rank ----------------------------------------------


@pytest.mark.parametrize("kind", HEAVY)
def test_reproducible_and_resumable(npz, kind):
    def make(seed=3):
        return create_loader(npz, "train", train=True, batch_size=8, seed=seed, **HEAVY[kind])

    loader = make()
    before = _states()
    whole = list(loader)
    _assert_states(before)
    assert len(whole) == len(loader) == 5
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert _same(whole, make())
    for start in range(6):
        assert _same(whole[start:], loader.iterate(start))
    loader.set_epoch(1)
    assert not _same(whole, loader)
    assert not _same(whole, make(seed=4))
    assert not _same([whole[0]], [whole[1]])


def test_states_between_batches(npz):
    loader = create_loader(npz, "train", train=True, batch_size=8, **HEAVY["all"])
    before = _states()
    for _ in loader:
        _assert_states(before)
    iterator = iter(loader)
    next(iterator)
    del iterator
    _assert_states(before)


def test_epoch_is_taken_when_iteration_begins(npz):
    loader = create_loader(npz, "train", train=True, batch_size=8)
    whole = list(loader)
    iterator = iter(loader)
    loader.set_epoch(7)
    assert _same(whole, iterator)


def test_epoch_covers_every_sample_once(npz):
    images, _ = load_arrays(npz, "train")
    loader = create_loader(npz, "train", train=True, batch_size=8, hflip=0, crop_padding=0)
    got = torch.cat([x for x, _ in loader])
    plain = torch.cat([x for x, _ in create_loader(npz, "train")])
    assert not torch.equal(got, plain)
    assert len(got) == len(images)
    assert torch.equal(got.flatten(1).sort(0).values, plain.flatten(1).sort(0).values)


# --- shards, subsets, last batches ---------------------------------------------------------------


def _shard_ids(npz, split, world, **kwargs):
    """Which stored images each rank sees, found again by their pixels."""
    stored = torch.cat([x for x, _ in create_loader(npz, split)])
    ids = []
    for rank in range(world):
        loader = create_loader(npz, split, rank=rank, world_size=world, **kwargs)
        got = list(loader)
        assert len(got) == len(loader)
        seen = [(stored == x).flatten(1).all(1).nonzero().item() for batch, _ in got for x in batch]
        ids.append(seen)
    return ids


def test_eval_shards(npz):
    first, second = _shard_ids(npz, "test", 2, batch_size=4)
    assert first == [0, 2, 4, 6, 8, 10, 12] and second == [1, 3, 5, 7, 9, 11]


def test_eval_with_more_ranks_than_samples(npz):
    ids = _shard_ids(npz, "test", 15, batch_size=4)
    assert sorted(i for part in ids for i in part) == list(range(13)) and ids[14] == []


def test_train_shards(npz):
    kwargs = {"train": True, "hflip": 0, "crop_padding": 0, "batch_size": 4}
    first, second, third = _shard_ids(npz, "train", 3, **kwargs)
    assert len(first) == len(second) == len(third) == 12
    assert len({*first, *second, *third}) == 36


def test_last_batch(npz):
    sizes = {}
    for drop in (None, True, False):
        loader = create_loader(npz, "train", train=True, batch_size=16, drop_last=drop)
        sizes[drop] = [len(y) for _, y in loader]
        assert len(loader) == len(sizes[drop])
    assert sizes == {None: [16, 16], True: [16, 16], False: [16, 16, 8]}
    assert [len(y) for _, y in create_loader(npz, "train", train=True, batch_size=64)] == [40]
    with pytest.raises(ValueError, match="--batch-size 40"):
        create_loader(npz, "train", train=True, batch_size=64, drop_last=True)
    with pytest.raises(ValueError, match="no batch is left"):
        create_loader(npz, "train", train=True, subset=1, world_size=2)


def test_subset(npz):
    loader = create_loader(npz, "train", subset=10, batch_size=40)
    ((images, labels),) = loader
    assert loader.num_samples == len(images) == 10
    assert sorted(labels.bincount().tolist()) == [2, 2, 3, 3]
    assert _same(loader, create_loader(npz, "train", subset=10, batch_size=40))
    assert not _same(loader, create_loader(npz, "train", subset=10, batch_size=40, seed=1))
    assert create_loader(npz, "train", subset=40).num_samples == 40


def test_subset_of_uneven_classes():
    labels = torch.tensor([5] * 20 + [2] * 3 + [9])
    chosen = loaders.balanced(labels, 8, 0)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    counts = {c: (labels[chosen] == c).sum().item() for c in (2, 5, 9)}
    assert counts == {2: 3, 5: 4, 9: 1}


# --- bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.5}, "--batch-size 128"),
        ({"batch_size": True}, "whole number"),
        ({"hflip": 1.5}, "hflip=1.5"),
        ({"reprob": -0.1}, "probability from 0 to 1"),
        ({"mixup_prob": 2}, "--mixup-prob 0.5"),
        ({"mixup_switch_prob": float("nan")}, "mixup_switch_prob=nan"),
        ({"smoothing": 1.1}, "smoothing=1.1"),
        ({"mixup": -1}, "mixup=-1"),
        ({"cutmix": float("inf")}, "cutmix=inf"),
        ({"crop_padding": -1}, "--crop-padding 4"),
        ({"cutout": -2}, "cutout=-2"),
        ({"auto_augment": "cifra"}, "--aa cifar10"),
        ({"auto_augment": "rand-z3"}, "configuration of timm's"),
        ({"remode": "black"}, "const, rand, pixel"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"world_size": 0}, "world_size=0"),
        ({"rank": -1}, "rank=-1"),
        ({"img_size": 0}, "--img-size 32"),
        ({"in_chans": 4}, "--in-chans 3"),
        ({"num_classes": 2}, "--num-classes 4"),
        ({"num_workers": -1}, "--workers 2"),
        ({"subset": 0}, "subset=0"),
        ({"subset": 41}, "--subset 40"),
        ({"cut_out": 4}, "did you mean cutout"),
        ({"learning_rate": 1}, "no option 'learning_rate'"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"mean": (0.1, 0.2)}, "mean="),
        ({"std": (0.0,)}, "std="),
        ({"mean": (float("nan"),)}, "--mean 0.5"),
        ({"scale": 3}, "--scale 0.08 1"),
        ({"label_names": "cats"}, "names of classes"),
        ({"label_names": 3}, "names of classes"),
        ({"seed": "x"}, "--seed 42"),
        ({"device": "gpu"}, "device='cpu'"),
    ],
)
def test_bad_arguments(npz, kwargs, said):
    with pytest.raises(ValueError) as error:
        create_loader(npz, "train", **kwargs)
    assert said in str(error.value)


@pytest.mark.parametrize("name", [None, 3, ["digits"]])
def test_names_that_are_no_text(name):
    for call in (lambda: dataset_info(name), lambda: create_loader(name, "train")):
        with pytest.raises(ValueError, match="expected a name such as 'digits'"):
            call()


def test_bad_split_epoch_and_start(npz):
    for split in ("training", "", "Train"):
        with pytest.raises(ValueError, match="train or test"):
            create_loader(npz, split)
    loader = create_loader(npz, "eval")
    with pytest.raises(ValueError, match="epoch=-1"):
        loader.set_epoch(-1)
    for start in (-1, 2):
        with pytest.raises(ValueError, match="start_batch"):
            loader.iterate(start)


# --- npz -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_npz(tmp_path, channels):
    arrays = _arrays(channels=channels)
    arrays["test_labels"] = arrays["test_labels"].astype(np.uint8)
    arrays["test_labels"][3] = 6
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    info = dataset_info("npz:a.npz", str(tmp_path))
    assert (info.name, info.num_classes, info.img_size) == ("npz:a.npz", 7, 16)
    assert info.in_chans == (channels or 1)
    pixels = arrays["train_images"].reshape(-1, channels or 1) / 255
    np.testing.assert_allclose(info.mean, pixels.mean(0))
    np.testing.assert_allclose(info.std, pixels.std(0))
    images, labels = load_arrays("npz:a.npz", "test", str(tmp_path))
    assert images.shape == (13, channels or 1, 16, 16) and labels.dtype == torch.int64
    wanted = arrays["test_images"].reshape(13, 16, 16, -1).transpose(0, 3, 1, 2)
    assert np.array_equal(images.numpy(), wanted)
    assert labels.tolist() == arrays["test_labels"].tolist()


def test_npz_written_anew_is_read_anew(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **_arrays(classes=4))
    assert dataset_info(f"npz:{path}").num_classes == 4
    np.savez(path, **_arrays(train=41, classes=5))
    assert dataset_info(f"npz:{path}").num_classes == 5


def test_npz_of_one_colour(tmp_path):
    arrays = _arrays()
    arrays["train_images"][:] = 9
    np.savez(tmp_path / "a.npz", **arrays)
    ((images, _),) = create_loader(f"npz:{tmp_path / 'a.npz'}", "test")
    assert images.isfinite().all()


def _drop(arrays):
    del arrays["test_labels"]
    arrays["labels"] = np.zeros(3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop, "lacks test_labels; it has train_images, train_labels, test_images, labels"),
        (lambda a: a.update(train_images=a["train_images"] / 255), "type float64"),
        (lambda a: a.update(train_images=a["train_images"][..., 0, 0]), "shape (40, 16)"),
        (lambda a: a.update(train_images=a["train_images"][:, :8]), "shape (40, 8, 16, 3)"),
        (lambda a: a.update(test_images=a["test_images"][..., :1]), "test images [1, 16, 16]"),
        (lambda a: a.update(train_labels=a["train_labels"][:-1]), "40 train_images and 39"),
        (lambda a: a.update(train_labels=a["train_labels"] * 1.0), "train_labels has the type"),
        (lambda a: a.update(test_labels=np.zeros((13, 2), int)), "the shape (13, 2)"),
        (lambda a: a.update(test_labels=a["test_labels"] - 1), "negative labels"),
        (lambda a: a.update(test_labels=a["test_labels"].astype(object)), "allow_pickle=False"),
        (
            lambda a: a.update(test_labels=a["test_labels"][:0], test_images=a["test_images"][:0]),
            "0 test_images",
        ),
        (lambda a: a.update(test_labels=a["test_labels"].astype(np.uint64) + 2**63), "is no number of a class"),
        (lambda a: a.update(label_names=np.array(["a", "b", "c", "a"])), "expected one name for each class"),
        (lambda a: a.update(label_names=np.array(["a", "b"]), num_classes=4), "expected one name for each class"),
        (lambda a: a.update(num_classes=4.5), "num_classes as one number"),
        (lambda a: a.update(num_classes=-4), "-4 classes"),
    ],
)
def test_bad_npz(tmp_path, change, said):
    arrays = _arrays()
    change(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    name = f"npz:{tmp_path / 'bad.npz'}"
    for call in (lambda: dataset_info(name), lambda: create_loader(name, "test")):
        with pytest.raises(ValueError) as error:
            call()
        assert said in str(error.value) and str(error.value).startswith(name)


def test_labels_that_are_hardly_meant(tmp_path, caplog):
    arrays = _arrays()
    arrays |= {name: arrays[name] + 1 for name in ("train_labels", "test_labels")}
    arrays["test_labels"][0] = 7
    np.savez(tmp_path / "a.npz", **arrays)
    assert dataset_info(f"npz:{tmp_path / 'a.npz'}").num_classes == 8
    assert "no label is 0: where classes are counted from 1, take 1 away" in caplog.text
    assert "test has the labels 7, which train does not have" in caplog.text
    caplog.clear()
    np.savez(tmp_path / "b.npz", **_arrays())
    assert dataset_info(f"npz:{tmp_path / 'b.npz'}").num_classes == 4 and not caplog.text


def test_damaged_npz(tmp_path):
    path = tmp_path / "cut.npz"
    np.savez(path, **_arrays())
    content = path.read_bytes()
    middle = content.find(b"train_images.npy") + 3000
    changed = content[:middle] + b"XXXXXXXX" + content[middle + 8 :]
    for broken in (content[: len(content) // 2], b"", b"no zip at all", changed):
        path.write_bytes(broken)
        for call in (lambda: dataset_info(f"npz:{path}"), lambda: load_arrays(f"npz:{path}", "train")):
            with pytest.raises(ValueError, match=r"numpy\.savez"):
                call()


@pytest.mark.parametrize("keys", [("x_train", "y_train", "x_test", "y_test"), tuple(_arrays())])
@pytest.mark.parametrize("column", [False, True])
def test_other_layouts_of_npz(tmp_path, keys, column):
    arrays = _arrays()
    wanted = arrays["test_labels"].tolist()
    if column:  # as MedMNIST has them
        arrays |= {name: arrays[name][:, None] for name in ("train_labels", "test_labels")}
    np.savez(tmp_path / "a.npz", **dict(zip(keys, arrays.values(), strict=True)))
    name = f"npz:{tmp_path / 'a.npz'}"
    images, labels = load_arrays(name, "test")
    assert labels.tolist() == wanted and np.array_equal(images.permute(0, 2, 3, 1), arrays["test_images"])
    assert (dataset_info(name).num_classes, dataset_info(name).img_size) == (4, 16)


@pytest.mark.parametrize(("label", "asked"), [(107, False), (108, True), (255, True), (1_000_000, True)])
def test_a_lone_high_label_is_asked_about(tmp_path, label, asked):
    # Of 4 classes and one label above them, 5 different ones occur: up to 2 * 5 + 100 classes are taken.
    arrays = _arrays()
    arrays["train_labels"][5] = label + 2
    name = f"npz:{tmp_path / 'a.npz'}"
    np.savez(tmp_path / "a.npz", **arrays)
    if asked:
        with pytest.raises(ValueError, match=rf"labels go up to {label + 2}, but only 5 .* num_classes={label + 3}"):
            dataset_info(name)
        np.savez(tmp_path / "a.npz", **arrays, num_classes=label + 3)
    assert dataset_info(name).num_classes == label + 3


def test_names_in_an_npz(tmp_path):
    name = f"npz:{tmp_path / 'a.npz'}"
    np.savez(tmp_path / "a.npz", **_arrays(), label_names=["ant", "bee", "cat", "dog", "eel"])
    info = dataset_info(name)
    assert (info.num_classes, info.label_names) == (5, ("ant", "bee", "cat", "dog", "eel"))
    plain = torch.cat([labels for _, labels in create_loader(name, "test")])
    model = ("eel", "dog", "cat", "bee", "ant")
    loader = create_loader(name, "test", label_names=model)
    assert torch.equal(torch.cat([labels for _, labels in loader]), 4 - plain) and loader.info.label_names == model
    loader = create_loader(name, "train", train=True, label_names=model, batch_size=40)
    assert loader.info.label_names == info.label_names  # a training takes the data's
    np.savez(tmp_path / "a.npz", **_arrays(), label_names=["ant", "bee"])
    with pytest.raises(ValueError, match="there are 2 classes, but the label 3"):
        dataset_info(name)
    np.savez(tmp_path / "a.npz", **_arrays(), label_names=np.array(["ant", None], dtype=object))
    with pytest.raises(ValueError, match=r"a.npz: label_names are wanted as texts"):
        dataset_info(name)


@pytest.mark.parametrize("name", ["npz:", "npz:no/such/file.npz"])
def test_missing_npz(name):
    with pytest.raises(FileNotFoundError, match="--dataset npz:PATH"):
        create_loader(name, "train")


# --- torchvision's files -------------------------------------------------------------------------


def _idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def _write_mnist(root, kind="MNIST", packed=False):
    """Seven images in the layout of MNIST; also returns torchvision's list of files with their MD5 sums."""
    raw = root / kind / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(2).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    resources = []
    for part in ("train", "t10k"):
        for what, array in (("images-idx3", images), ("labels-idx1", np.arange(7, dtype=np.uint8))):
            content = gzip.compress(_idx(array))
            path = raw / f"{part}-{what}-ubyte.gz"
            if packed:
                path.write_bytes(content)
            else:
                path.with_suffix("").write_bytes(_idx(array))
            resources.append((path.name, hashlib.md5(content).hexdigest()))
    return images, resources


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files(tmp_path, no_network, monkeypatch, name, kind, packed):
    images, resources = _write_mnist(tmp_path, kind, packed)
    monkeypatch.setattr(getattr(datasets, kind), "resources", resources)
    monkeypatch.setenv("SPIKEZOO_DATA", str(tmp_path))
    for split in ("train", "test"):
        got, got_labels = load_arrays(name, split, download=not packed)
        assert np.array_equal(got[:, 0].numpy(), images)
        assert got_labels.tolist() == list(range(7)) and got_labels.dtype == torch.int64
    assert os.listdir(tmp_path) == [kind]


def test_mnist_damaged(tmp_path, no_network):
    _write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for broken in (whole[:-100], b"hello", b"", b"\0\0\x08\x03\0"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"MNIST.raw.*move the folder away"):
            load_arrays("mnist", "train", str(tmp_path))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("download", [True, False])
def test_nothing_there(tmp_path, no_network, name, download):
    root = tmp_path / "not" / "there"
    with pytest.raises(FileNotFoundError) as error:
        create_loader(name, "train", data_dir=str(root), download=download)
    message = str(error.value)
    assert str(root) in message and "looked for" in message
    assert "--data-dir FOLDER" in message and "--dataset digits" in message
    assert ("no network in tests" if download else "switched off") in message
    assert not root.exists() or os.listdir(root) == []


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_half_a_download_stays_not_behind(tmp_path, monkeypatch, name):
    def half(url, filename, *args):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise ConnectionResetError("cut off")

    monkeypatch.setattr(datasets.utils, "_get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr(datasets.utils, "_urlretrieve", half)
    with pytest.raises(FileNotFoundError, match="cut off"):
        load_arrays(name, "train", str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_download_lands_in_place(tmp_path, monkeypatch):
    def download(self):
        if not self._check_exists():
            assert self.root != str(tmp_path)
            _write_mnist(Path(self.root))

    monkeypatch.setattr(datasets.MNIST, "download", download)
    assert len(load_arrays("mnist", "train", str(tmp_path))[0]) == 7
    assert os.listdir(tmp_path) == ["MNIST"]
    monkeypatch.delattr(datasets.MNIST, "download")
    assert len(load_arrays("mnist", "test", str(tmp_path))[0]) == 7


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_that_is_not_official(tmp_path, no_network, name):
    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    place = tmp_path / cls.base_folder
    place.mkdir()
    for file in [file for file, _ in cls.train_list + cls.test_list] + [cls.meta["filename"]]:
        (place / file).write_bytes(b"no pickle")
    with pytest.raises(ValueError) as error:
        load_arrays(name, "train", str(tmp_path))
    assert "not the official" in str(error.value) and "npz:PATH" in str(error.value)


def test_cifar_from_official_layout(tmp_path, monkeypatch):
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
    contents = {
        "data_batch_1": {"data": pixels, "labels": [3, 1, 2, 0]},
        "test_batch": {"data": pixels[:2], "labels": [1, 0]},
        "batches.meta": {"label_names": list("abcd")},
    }
    sums = {}
    for name, content in contents.items():
        (place / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((place / name).read_bytes()).hexdigest()
    cls = datasets.CIFAR10
    monkeypatch.setattr(cls, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(cls, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": sums["batches.meta"]})
    images, labels = load_arrays("cifar10", "train", str(tmp_path), download=False)
    assert np.array_equal(images.numpy(), pixels.reshape(4, 3, 32, 32))
    assert labels.tolist() == [3, 1, 2, 0]
    assert len(load_arrays("cifar10", "test", str(tmp_path))[0]) == 2


# --- timm's readers ------------------------------------------------------------------------------

TIMM = {
    "plain": {},
    "all": {"cutout": 5, "reprob": 0.5, "remode": "pixel", "mixup": 0.8, "cutmix": 1.0},
    "rand": {"auto_augment": "rand-m9-mstd0.5", "cutout": 3},
    "cifar10": {"auto_augment": "cifar10", "in_chans": 1, "interpolation": "nearest"},
}


def _folder(folder, split="train", **kwargs):
    kwargs = {"img_size": 16, "batch_size": 3, "num_workers": 0, **kwargs}
    return create_loader("folder", split, data_dir=folder, **kwargs)


def test_folder_eval(folder):
    loader = _folder(folder, "val")
    assert isinstance(loader, Loader)
    assert (loader.num_samples, len(loader)) == (6, 2)
    assert loader.info.num_classes == 2 and loader.info.img_size == 16
    batches = list(loader)
    assert torch.cat([y for _, y in batches]).tolist() == [0, 0, 0, 1, 1, 1]
    assert batches[0][0].shape == (3, 3, 16, 16) and batches[0][0].dtype == torch.float32
    info = dataset_info("folder", folder)
    assert info.num_classes == 2 and info.img_size == 224
    # By hand: timm resizes the short side to floor(16 / 0.875) and cuts out the middle.
    image = Image.open(f"{folder}/val/apple/0.png").resize((21, 18), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image))[1:17, 2:18].permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (info.mean, info.std))
    torch.testing.assert_close(batches[0][0][0], (pixels - mean) / std)


@pytest.mark.parametrize("kind", TIMM)
def test_folder_reproducible_and_resumable(folder, kind):
    loader = _folder(folder, train=True, **TIMM[kind])
    before = _states()
    whole = []
    for batch in loader:
        _assert_states(before)
        whole.append(batch)
    assert len(whole) == len(loader) == 4
    assert whole[0][0].shape[1] == TIMM[kind].get("in_chans", 3)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert _same(whole, _folder(folder, train=True, **TIMM[kind]))
    for start in range(5):
        assert _same(whole[start:], loader.iterate(start))
    loader.set_epoch(1)
    assert not _same(whole, loader)


# Forking next to threads is what DataLoader does, and newer Pythons warn of it.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_change_nothing(folder, monkeypatch):
    kwargs = {"train": True, **TIMM["all"]}
    whole = list(_folder(folder, **kwargs))
    before = _states()
    assert _same(whole[2:], _folder(folder, num_workers=1, **kwargs).iterate(2))
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: {0})  # of more workers than cores torch would warn
    assert _same(whole[3:], _folder(folder, num_workers=2, **kwargs).iterate(3))
    _assert_states(before)


def test_folder_shards_and_subset(folder):
    parts = [_folder(folder, "val", rank=rank, world_size=4) for rank in range(4)]
    assert [sum(len(y) for _, y in part) for part in parts] == [2, 2, 1, 1]
    loader = _folder(folder, subset=6)
    assert sorted(torch.cat([y for _, y in loader]).tolist()) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="--subset 12"):
        _folder(folder, subset=13)
    loader = _folder(folder, "val", channels_last=True)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in loader)


def test_folder_that_lacks_a_class(folder):
    """A split without the first class must not shift the labels of the others."""
    for file in os.listdir(f"{folder}/val/apple"):
        os.remove(f"{folder}/val/apple/{file}")
    loader = _folder(folder, "val")
    assert torch.cat([y for _, y in loader]).tolist() == [1, 1, 1]
    assert loader.info.num_classes == 2


def test_split_folders(folder, tmp_path):
    os.rename(f"{folder}/val", f"{folder}/test")
    assert _folder(folder, "validation").num_samples == 6
    assert create_loader("imagenet", "test", data_dir=folder, num_workers=0).num_samples == 6
    os.makedirs(f"{folder}/val/bird")
    Image.new("RGB", (9, 9)).save(f"{folder}/val/bird/x.png")
    assert _folder(folder, "val").num_samples == 1
    assert _folder(folder, "test").num_samples == 6


def test_tar(folder, tmp_path):
    path = f"{folder}/data.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(f"{folder}/val", arcname=".")
    assert dataset_info("folder", path).num_classes == 2
    loader = _folder(path, "test")
    assert loader.num_samples == 6 and loader.info.num_classes == 2
    assert torch.cat([y for _, y in loader]).tolist() == [0, 0, 0, 1, 1, 1]
    assert _folder(path, subset=2).num_samples == 2
    with pytest.raises(ValueError, match="--dataset folder --data-dir"):
        create_loader(path, "test")
    os.rename(path, tmp_path / "train.tar")
    assert _folder(str(tmp_path)).num_samples == 6
    with tarfile.open(path, "w"):
        pass
    with pytest.raises(ValueError, match="no images"):
        _folder(path)
    with open(path, "wb") as file:
        file.write(b"no tar")
    with pytest.raises(ValueError, match="no images"):
        _folder(path)


def _shard(path, samples):
    """A tar file of (name, content), in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_webdataset_shards(tmp_path):
    # Two shards of three; labels as text, or as JSON, and whatever else lies there is passed by.
    for shard in range(2):
        samples = []
        for i in range(3):
            number = 3 * shard + i
            label = (".cls", str(number % 3).encode()) if i else (".json", json.dumps({"label": number % 3}).encode())
            samples += [(f"a/{number:03}{label[0]}", label[1]), (f"a/{number:03}.png", _png(40 * number))]
        _shard(tmp_path / "my" / f"my-train-{shard:06}.tar", [*samples, ("note.txt", b"x")])
    _shard(tmp_path / "my" / "val" / "0.tar", [("x.jpg", _png(0)), ("x.cls", b"2"), ("x.json", b"{}")])
    options = {"data_dir": str(tmp_path), "img_size": 8, "batch_size": 2, "mean": [0], "std": [1], "num_classes": 3}
    seen = [(x.mean((1, 2, 3)) * 255, y) for x, y in create_loader("wds/my", "train", **options)]
    values = torch.cat([x for x, _ in seen]).round().tolist()
    assert values == [0, 40, 80, 120, 160, 200] and torch.cat([y for _, y in seen]).tolist() == [0, 1, 2, 0, 1, 2]
    assert [y.tolist() for _, y in create_loader("wds/my", "test", **options)] == [[2]]
    options["batch_size"] = 1
    # Two ranks share the epoch, and it is gone on with in its middle.
    whole = [value for rank in (0, 1) for value in _epoch("wds/my", rank, 0, options)]
    assert sorted(whole) == [0, 40, 80, 120, 160, 200]
    assert (
        _epoch("wds/my", 1, 1, {**options, "batch_size": 1}) == _epoch("wds/my", 1, 0, {**options, "batch_size": 1})[1:]
    )
    (tmp_path / "my" / "classnames.txt").write_text("cat\ndog\nowl\n")
    assert create_loader("wds/my", "test", **options).info.label_names == ("cat", "dog", "owl")


def _epoch(name, rank, start, options):
    loader = create_loader(name, "train", train=True, rank=rank, world_size=2, hflip=0, scale=(1, 1), **options)
    loader.set_epoch(1)
    return [value for x, _ in loader.iterate(start) for value in (x.mean((1, 2, 3)) * 255).round().tolist()]


def test_bad_shards(tmp_path):
    options = {"data_dir": str(tmp_path), "img_size": 8, "num_classes": 3}
    with pytest.raises(FileNotFoundError, match=r"train-000000\.tar"):
        create_loader("wds/my", "train", **options)
    path = tmp_path / "train.tar"
    for samples, said in (
        ([("a.png", _png(0))], "a.png has no label beside it"),
        ([("a.png", _png(0)), ("a.cls", b"one")], "label a.cls is b'one'"),
        ([("a.png", _png(0)), ("a.json", b'{"label": true}')], "under label"),
        ([("a.png", _png(0)), ("a.json", b'{"label": 1e999}')], "under label"),
        ([("a.txt", b"x")], "no images"),
    ):
        _shard(path, samples)
        with pytest.raises(ValueError, match=said):
            create_loader("wds/my", "train", **options)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match="not packed"):
        create_loader("wds/my", "train", **options)
    _shard(path, [("a.png", _png(0)[:45]), ("a.cls", b"4")])
    with pytest.raises(ValueError, match=r"train.tar:a.png cannot be read"):
        next(iter(create_loader("wds/my", "train", **options)))
    (tmp_path / "classnames.txt").write_text("cat\n")
    with pytest.raises(ValueError, match=r"there is a class 4, and classnames\.txt names 1"):
        create_loader("wds/my", "train", **options)


def test_shards_are_of_the_split_that_their_names_end_with(tmp_path):
    place = tmp_path / "my"
    for name, label in (("latest-train-0", 0), ("latest-val-0", 1), ("train2017-test-0", 2)):
        _shard(place / f"{name}.tar", [("a.png", _png(0)), ("a.cls", str(label).encode())])
    options = {"data_dir": str(tmp_path), "img_size": 8, "num_classes": 3, "num_workers": 0}

    def labels(split):
        return [label for _, y in create_loader("wds/my", split, **options) for label in y.tolist()]

    assert labels("train") == [0] and labels("test") == [2]
    (place / "train2017-test-0.tar").unlink()
    assert labels("test") == [1]
    (place / "value").mkdir()
    shutil.copy(place / "latest-train-0.tar", place / "value" / "0.tar")
    assert labels("test") == [1]
    shutil.copy(place / "latest-train-0.tar", place / "other-train-0.tar")
    with pytest.raises(ValueError, match="shards of several datasets"):
        labels("train")


def test_missing_folders(folder, tmp_path):
    (tmp_path / "flat" / "train").mkdir(parents=True)  # no folder for a class
    for name in ("imagenet", "folder"):
        for place in (str(tmp_path / "nowhere"), str(tmp_path / "flat")):
            for call in (
                lambda name=name, place=place: dataset_info(name, place),
                lambda name=name, place=place: create_loader(name, "train", data_dir=place),
            ):
                with pytest.raises(FileNotFoundError) as error:
                    call()
                assert f"--dataset {name} --data-dir FOLDER" in str(error.value)
                assert "train/CLASS/*.JPEG and val/CLASS/*.JPEG" in str(error.value)
    assert dataset_info("imagenet", folder).num_classes == 1000
    with pytest.raises(ValueError, match="train or test"):
        _folder(folder, "trian")
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images"):
        _folder(str(tmp_path / "empty"))


def test_torchvision_by_timm(tmp_path, no_network):
    with pytest.raises(ValueError, match="timm cannot open"):
        create_loader("torch/nosuch", "train", data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--data-dir FOLDER"):
        create_loader("torch/mnist", "train", data_dir=str(tmp_path), download=False)
    _write_mnist(tmp_path)
    loader = create_loader("torch/mnist", "train", data_dir=str(tmp_path), num_workers=0, img_size=16)
    ((images, labels),) = loader
    assert images.shape == (7, 3, 16, 16) and labels.tolist() == list(range(7))
    assert loader.info.num_classes == 10


def test_bad_channels_for_timm(folder):
    with pytest.raises(ValueError, match="--in-chans 3"):
        _folder(folder, in_chans=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", HEAVY)
def test_gpu_sees_what_the_cpu_sees(npz, kind):
    kwargs = {"train": True, "batch_size": 8, **HEAVY[kind]}
    state = torch.cuda.get_rng_state()
    on_gpu = list(create_loader(npz, "train", device="cuda", **kwargs))
    assert torch.equal(state, torch.cuda.get_rng_state())
    for (a, b), (c, d) in zip(on_gpu, create_loader(npz, "train", **kwargs), strict=True):
        assert a.is_cuda and b.is_cuda
        torch.testing.assert_close(a.cpu(), c)
        torch.testing.assert_close(b.cpu(), d)


# --- numbers of the classes, depth and damage of image folders -----------------------------------


def _classes(place, split, names, count=1, size=8):
    """Image folders whose images have the colour of their class's place in ``names``."""
    for number, label in enumerate(names):
        folder = place / split / label
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (size, size), (10 * number, 0, 0)).save(folder / f"{i}.png")


def _labels(place, split="val", **kwargs):
    loader = _folder(str(place), split, **kwargs)
    return torch.cat([labels for _, labels in loader]).tolist(), loader


def _empty(place):
    (place / "train" / "aardvark").mkdir()


def _litter(place):
    for part in ("train", "val"):
        for name in (".ipynb_checkpoints", "__MACOSX"):
            _classes(place, part, [name])
        Image.new("RGB", (8, 8)).save(place / part / "cat" / "._0.png")


def _links_back(place):
    for part in ("train", "val"):
        (place / part / "0root").symlink_to(place, target_is_directory=True)
        (place / part / "1part").symlink_to(place / part, target_is_directory=True)
        (place / part / "2cat").symlink_to(place / part / "cat", target_is_directory=True)
        (place / part / "cat" / "loop").symlink_to(place / part / "cat", target_is_directory=True)


def _loose(place):
    for part in ("train", "val"):
        (place / part / "cat" / "notes.txt").touch()
        Image.new("RGB", (8, 8)).save(place / part / "montage.png")


@pytest.mark.parametrize("disturb", [_empty, _litter, _links_back, _loose])
@pytest.mark.parametrize("packed", [False, True])
def test_classes_are_numbered_by_the_names_of_train(tmp_path, disturb, packed):
    _classes(tmp_path, "train", ["bee", "cat", "dog10", "dog9"])
    _classes(tmp_path, "val", ["cat", "dog10"], count=2)
    disturb(tmp_path)
    if packed:
        if disturb is _links_back:
            pytest.skip("a tar file is no tree that links could lead back into")
        for part in ("train", "val"):
            with tarfile.open(tmp_path / f"{part}.tar", "w") as archive:
                archive.add(tmp_path / part, arcname=".")
            shutil.rmtree(tmp_path / part)
    labels, loader = _labels(tmp_path)
    assert labels == [1, 1, 3, 3]  # natural order: bee, cat, dog9, dog10
    assert loader.info.label_names == ("bee", "cat", "dog9", "dog10") and loader.info.num_classes == 4
    assert _labels(tmp_path, "train")[0] == [0, 1, 2, 3]
    info = dataset_info("folder", str(tmp_path))
    assert info.label_names == loader.info.label_names and info.num_classes == 4


def test_unknown_class_is_refused_by_name(tmp_path):
    _classes(tmp_path, "train", ["bee", "cat"])
    _classes(tmp_path, "val", ["bee", "cats"])
    with pytest.raises(
        ValueError, match=r"val has the class 'cats', which .*train does not have. Did you mean 'cat'\?"
    ):
        _labels(tmp_path)


def test_names_of_the_model_number_the_classes(tmp_path, caplog):
    _classes(tmp_path, "val", ["bee", "dog"])  # no train: by themselves they would be 0 and 1
    labels, loader = _labels(tmp_path, label_names=("ant", "bee", "cat", "dog"))
    assert labels == [1, 3] and loader.info.label_names == ("ant", "bee", "cat", "dog")
    assert _labels(tmp_path)[0] == [0, 1] and not caplog.records
    assert _labels(tmp_path, label_names=("n01", "n02"))[0] == [0, 1]
    assert "has other names for its classes ('n01', 'n02') than the data ('bee', 'dog')" in caplog.text
    with pytest.raises(ValueError, match="has the class 'dog', which the model does not have"):
        _labels(tmp_path, label_names=("bee", "cat"))
    with pytest.raises(ValueError, match="has the class 'bee', and the model has two of that name"):
        _labels(tmp_path, label_names=("bee", "dog", "bee"))


def test_what_is_left_out_of_a_folder_is_named(tmp_path, caplog):
    _classes(tmp_path, "train", ["bee"])
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
    _loose(tmp_path)
    assert _labels(tmp_path, "train")[0] == [0]
    assert "train: left out are 1 .txt, 1 in no folder of a class; read are .bmp, " in caplog.text


def test_folders_of_one_name_are_said_to_be_one_class(tmp_path, caplog):
    for part in ("cat/day", "dog/day", "dog/night"):
        _classes(tmp_path, f"train/{part.partition('/')[0]}", [part.partition("/")[2]])
    labels, loader = _labels(tmp_path, "train")
    assert labels == [0, 0, 1] and loader.info.label_names == ("day", "night")
    assert "cat/day, dog/day and so on are one class, 'day'" in caplog.text and "night" not in caplog.text


@pytest.mark.parametrize("name", ["torch/image_folder", "torch/folder"])
def test_torchvisions_folders_are_read_like_others(tmp_path, name):
    _classes(tmp_path, "train", ["bee", "cat"])
    _classes(tmp_path, "val", ["cat"])
    loader = create_loader(name, "val", data_dir=str(tmp_path), img_size=8, num_workers=0)
    assert [labels.tolist() for _, labels in loader] == [[1]]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_grey_of_sixteen_bits(tmp_path, suffix):
    values = np.array([[0, 257], [128 * 257, 65535]], dtype=np.uint16).repeat(8, 0).repeat(8, 1)
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    if suffix == "pgm":
        (folder / "0.pgm").write_bytes(b"P5 16 16 65535\n" + values.astype(">u2").tobytes())
    else:
        kind = {"irreversible": False} if suffix == "jp2" else {}
        Image.fromarray(values).save(folder / f"0.{suffix}", **kind)
    for channels in (1, 3):
        ((got, _),) = _folder(str(tmp_path), "val", crop_pct=1.0, in_chans=channels, mean=(0,), std=(1,))
        wanted = torch.tensor([[0.0, 1.0], [128.0, 255.0]]) / 255
        torch.testing.assert_close(
            got, wanted.repeat_interleave(8, 0).repeat_interleave(8, 1).expand(1, channels, 16, 16)
        )


def test_depth_without_a_white(tmp_path):
    (tmp_path / "val" / "a").mkdir(parents=True)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "val" / "a" / "0.tif")
    with pytest.raises(ValueError, match=r"0.tif cannot be read \(ValueError: it has 32 bits a pixel \(mode 'F'\)"):
        list(_folder(str(tmp_path), "val"))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [lambda content: content[:60], lambda content: b"no image", lambda content: b""])
def test_damaged_image_of_an_evaluation(folder, damage, workers, caplog):
    path = f"{folder}/val/bird/1.png"
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(damage(content))
    with pytest.raises(ValueError, match=r"^the image .*val/bird/1.png cannot be read \("):
        list(_folder(folder, "val", num_workers=workers))
    loader = _folder(folder, "val", num_workers=workers, skip_damaged=True)
    for _ in range(2):
        assert torch.cat([labels for _, labels in loader]).tolist() == [0, 0, 0, 1, 1]
        assert loader.facts["left_out"] == 1
    assert "val/bird/1.png" in caplog.text and "it is left out" in caplog.text
    # A training goes on with the next one, and says so.
    os.rename(path, f"{folder}/train/bird/1.png")
    assert sum(len(labels) for _, labels in _folder(folder, train=True, drop_last=False, num_workers=workers)) == 12
    if not workers:
        assert "the next one takes its place" in caplog.text


def test_a_class_within_a_class_is_said(tmp_path, caplog):
    _classes(tmp_path, "train", ["bee", "bee/more", "cat"])
    assert _labels(tmp_path, "train")[1].info.label_names == ("bee", "cat", "more")  # as timm has it
    assert "bee/more has images, and so has the folder around it: they are taken for two classes" in caplog.text


def test_names_that_differ_in_capitals_or_zeros_alone_have_an_order(tmp_path):
    names = ["cat", "b1", "Cat", "b01", "9", "10", "²"]  # of the last Python says that it is a digit
    wanted = ("9", "10", "b01", "b1", "Cat", "cat", "²")
    for order in (names, names[::-1]):
        assert image_files._in_order(order) == wanted == tuple(sorted(order, key=natural))
    _classes(tmp_path, "train", names)
    assert dataset_info("folder", str(tmp_path)).label_names == wanted


def test_no_program_is_run_for_an_image(folder, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was asked"))
    with open(f"{folder}/val/bird/1.png", "w") as file:
        file.write("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"val/bird/1.png cannot be read \(UnidentifiedImageError"):
        list(_folder(folder, "val"))


def test_every_kind_of_image_is_read(tmp_path):
    (tmp_path / "val" / "a").mkdir(parents=True)
    kinds = sorted(image_files._KINDS)
    for number, kind in enumerate(kinds):
        mode = {".pbm": "1", ".pgm": "L"}.get(kind, "RGB")
        Image.new(mode, (8, 8)).save(tmp_path / "val" / "a" / f"{number}{kind}")
    assert len(torch.cat([labels for _, labels in _folder(str(tmp_path), "val")])) == len(kinds)


def test_pipes_and_links_to_nothing(folder, caplog):
    os.symlink("itself", f"{folder}/val/itself")
    before = len(_folder(folder, "val").samples)
    os.mkfifo(f"{folder}/val/bird/8.png")  # opening it would wait for ever
    assert len(torch.cat([labels for _, labels in _folder(folder, "val")])) == before
    assert "1 pipes or devices; read are" in caplog.text
    os.symlink("nowhere.png", f"{folder}/val/bird/9.png")
    with pytest.raises(ValueError, match=r"^the image .*val/bird/9.png cannot be read \(FileNotFoundError"):
        list(_folder(folder, "val"))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"crop_pct": 0}, "crop_pct=0 is not possible"),
        ({"crop_pct": 1.5}, "--crop-pct 0.875"),
        ({"scale": (0.5,)}, "--scale 0.08 1"),
        ({"scale": (0.5, 2)}, "nor above 1"),
        ({"ratio": (2, 1)}, "--ratio 0.75 1.33"),
    ],
)
def test_bad_crops(folder, kwargs, said):
    with pytest.raises(ValueError) as error:
        _folder(folder, **kwargs)
    assert said in str(error.value)


def test_crops_of_a_training(folder):
    """With the whole area and the images' own ratio, a random resized crop is a plain resizing."""
    kwargs = {"train": True, "hflip": 0, "scale": (1, 1), "ratio": (1.2, 1.2), "mean": (0,), "std": (1,)}
    order = torch.randperm(12, generator=augmentation.seeded_generator("order", 42, 0))
    got = torch.cat([images for images, _ in _folder(folder, batch_size=12, seed=42, **kwargs)])
    files = sorted(f"{label}/{i}" for label in ("apple", "bird") for i in range(6))
    for image, index in zip(got, order.tolist(), strict=True):
        plain = Image.open(f"{folder}/train/{files[index]}.png").resize((16, 16), Image.Resampling.BICUBIC)
        torch.testing.assert_close(image, torch.from_numpy(np.array(plain)).permute(2, 0, 1).float() / 255)


# --- a checkpoint's view of image files ----------------------------------------------------------


def test_checkpoint_says_how_image_files_are_seen(tmp_path, train):
    """Trained on a folder with a view and names of its own, evaluated on another whose classes are fewer."""
    colours = {"ant": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255)}
    for split in ("train", "val"):
        for label, colour in colours.items():
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            Image.new("RGB", (28, 28), colour).save(folder / "0.png")
    words = ["--model", "test_spiking_vgg", "--dataset", "folder", "--data-dir", str(tmp_path / "images"), "-b", "3"]
    words += ["--epochs", "1", "--device", "cpu", "--workers", "0", "--output", str(tmp_path), "--experiment", "run"]
    words += ["--crop-pct", "0.7", "--interpolation", "bilinear", "--scale", "0.5", "1", "--ratio", "1", "1"]
    train.main(words)
    model, dataset, _ = open_model("local-dir:" + str(tmp_path / "run"), {})
    own = spikezoo.create_model("test_spiking_vgg")
    assert model.img_size == own.img_size and model.num_classes == 3  # not the 224 of larger nets, which do not fit
    cfg = model.pretrained_cfg
    assert (cfg["crop_pct"], cfg["interpolation"], list(cfg["label_names"])) == (0.7, "bilinear", ["ant", "bee", "cat"])
    options = input_options(model, dataset)
    assert (options["crop_pct"], options["interpolation"]) == (0.7, "bilinear")
    assert input_options(model, dataset, crop_pct=1.0)["crop_pct"] == 1.0
    assert "crop_pct" not in input_options(model, "cifar10")
    shutil.rmtree(tmp_path / "images" / "train")
    shutil.rmtree(tmp_path / "images" / "val" / "ant")
    loader = _folder(str(tmp_path / "images"), "val", **{**options, "img_size": 32})
    assert torch.cat([labels for _, labels in loader]).tolist() == [1, 2]
    assert loader.facts == {"crop_pct": 0.7, "interpolation": "bilinear"}


def test_size_of_a_net_with_linear_layers(tmp_path):
    info = DatasetInfo("folder", 4, 3, 224, (0.0,), (1.0,), "")
    assert dataset_arguments("test_spiking_vgg", info) == {"num_classes": 4, "in_chans": 3}
    assert dataset_arguments("local-dir:anywhere", info) == {"num_classes": 4, "in_chans": 3}
    assert dataset_arguments("test_spiking_resnet", info)["img_size"] == 224
    assert dataset_arguments("test_spiking_vgg", dataset_info("digits"))["img_size"] == 8
    model = spikezoo.create_model("test_spiking_vgg")
    with pytest.raises(ValueError, match="--img-size"):
        model(torch.zeros(1, 3, 28, 28))
    spikezoo.save_checkpoint(model, tmp_path)
    with pytest.raises(ValueError, match="--img-size"):
        spikezoo.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=64)


def test_validate_leaves_damaged_images_out_on_request(folder, capsys):
    with open(f"{folder}/val/bird/1.png", "wb") as file:
        file.write(b"no image")
    words = ["--model", "test_spiking_vgg", "--dataset", "folder", "--data-dir", folder, "--workers", "0", "--json"]
    with pytest.raises(ValueError, match=r"val/bird/1.png cannot be read"):
        validate(words)
    capsys.readouterr()
    assert validate([*words, "--skip-damaged", "--crop-pct", "0.9"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["samples"], row["left_out"], row["crop_pct"]) == (5, 1, 0.9)


def test_a_folder_of_arrays_is_seen_as_the_arrays(tmp_path):
    """The same pixels as an .npz file and as PNG files give the same images to a net of their size."""
    arrays = _arrays(size=32)
    np.savez(tmp_path / "a.npz", **arrays)
    for i, (pixels, label) in enumerate(zip(arrays["test_images"], arrays["test_labels"], strict=True)):
        folder = tmp_path / "val" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    model = spikezoo.create_model("test_spiking_vgg", num_classes=4)
    options = input_options(model, "folder")
    ((plain, labels),) = create_loader(
        f"npz:{tmp_path / 'a.npz'}", "test", mean=options["mean"], std=options["std"], batch_size=13
    )
    got = list(_folder(str(tmp_path), "val", **{**options, "img_size": 32, "batch_size": 13}))
    order = labels.argsort(stable=True)
    assert torch.equal(got[0][1], labels[order])
    torch.testing.assert_close(got[0][0], plain[order])
