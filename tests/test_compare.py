"""Models side by side: the rows are what each gives alone, in one table and one picture."""

import json

import pytest

import spikezoo
from spikezoo.cli import main


@pytest.fixture
def folders(tmp_path):
    """Two checkpoints of different nets for the digits."""
    for name, T in (("one", 1), ("two", 2)):
        model = spikezoo.create_model("test_spiking_vgg", T=T, in_chans=1, img_size=8)
        spikezoo.save_checkpoint(model, tmp_path / name, {"dataset": "digits"})
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def test_rows_are_what_each_gives_alone(folders, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    words = ["--images", "4", "--batch-size", "20", "--val-subset", "20"]
    assert main(["compare", *folders, *words, "--json", "--plot", str(picture)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert [(row["T"], row["dataset"], row["weights"]) for row in rows] == [
        (1, "digits", "trained"),
        (2, "digits", "trained"),
    ]
    for row, folder in zip(rows, folders, strict=True):
        loader = spikezoo.data.create_loader("digits", "test", batch_size=20, img_size=8, in_chans=1, subset=20)
        images, labels = next(iter(loader))
        model = spikezoo.create_model("local-dir:" + folder, pretrained=True).eval()
        assert row["top1"] == pytest.approx(100 * (model(images).argmax(1) == labels).float().mean().item())
        alone = spikezoo.count(model, images[:4], inputs="analog")
        assert row["energy_exact_mj"] == pytest.approx(alone.energy_exact_mj)
        assert row["parameters"] == sum(p.numel() for p in model.parameters())


def test_count_of_several(folders, tmp_path, capsys):
    words = ["--dataset", "none", "--images", "2"]
    assert main(["count", "test_spiking_mlp", folders[1], *words]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert "mJ exact" in header and first.split()[:4] == ["test_spiking_mlp", "(random", "weights)", "noise"]
    assert second.startswith(folders[1]) and "random" not in second
    assert main(["count", "test_spiking_mlp", "test_spiking_vgg", "--checkpoint", folders[0], *words]) == 2
    assert "as one of the names" in capsys.readouterr().err
