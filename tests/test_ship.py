"""The shelf: a trained net is shipped with one command, is loaded by name, reproduces its record, and is published."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import load
from safetensors.torch import load_file

import spikezoo
from spikezoo import cli, registry
from spikezoo.checkpoint import Config, copy_checkpoint, file_hash, read_config
from spikezoo.checkpoint.sparse import round_to_levels
from spikezoo.data import create_loader, dataset_info
from spikezoo.hub.provenance import portable_command, training_facts
from tools import ship as shipping

ROOT = Path(__file__).resolve().parent.parent
NAME = "test_spiking_vgg"


@pytest.fixture(scope="module")
def validate():
    return shipping


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of train.py on digits: dense, and a ticket."""
    output = tmp_path_factory.mktemp("trainings")
    flags = f"--model {NAME} --T 2 --subset 300 --epochs 2 -b 32 --opt adam --lr 0.01".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spikezoo.train.output.plot", lambda *_: [])  # takes longer than the training
        for experiment, more in (("dense", []), ("ticket", ["--ticket", "kind=mpslt", "sparsity=0.4"])):
            argv = [*flags, *more, "--seed", "3", "--output", str(output), "--experiment", experiment]
            load("train").main(argv)
    return output


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "SHIPPED", tmp_path / "weights")
    return tmp_path / "weights"


def on(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.is_dir() else []


def top1(model):
    """Test accuracy on digits, without spikezoo's evaluation."""
    loader = create_loader("digits", "test", in_chans=1, img_size=8)
    with torch.no_grad():
        # Of an image without a spike all logits are equal: ties go as topk breaks them.
        right = [model.eval()(images).topk(5).indices[:, 0] == labels for images, labels in loader]
    return 100 * torch.cat(right).double().mean().item()


def test_one_command_ships(validate, trained, shelf, register_again, capsys):
    assert validate.main(["--checkpoint", str(trained / "dense"), "--ship", "digits", "--count-images", "4"]) == 0
    folder = shelf / f"{NAME}.digits"
    assert on(shelf) == [
        folder.name,
        *(f"{folder.name}/{file}" for file in ("README.md", "config.json", "model.safetensors")),
    ]
    assert f"Shipped {folder}" in capsys.readouterr().out
    # What lies there has eight bits of what was trained, and what was measured is what lies there.
    before = spikezoo.create_model(f"local-dir:{trained / 'dense'}", pretrained=True)
    stored = load_file(folder / "model.safetensors")
    many = {key for key, value in before.state_dict().items() if value.dim() > 1}
    eight = {key.removesuffix(".levels") for key, value in stored.items() if value.dtype is torch.int8}
    assert "head.fc.weight" in eight and eight < many  # the smallest of them, of 108 weights, are shorter as they are
    model = spikezoo.create_model(f"local-dir:{folder}", pretrained=True)
    for key, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], round_to_levels(value) if key in many else value), key
    config = read_config(folder)
    record, facts = config["spikezoo"]["results"], training_facts(trained / "dense")
    assert record["top1"] == pytest.approx(top1(model), abs=1e-4) and record["samples"] == 360
    assert 5 < record["top1"] < 100
    images = next(iter(create_loader("digits", "test", in_chans=1, img_size=8)))[0][:4]
    counted = spikezoo.count(model, images)
    for key in ("macs", "sops_exact", "sops_paper", "energy_exact_mj", "energy_paper_mj"):
        assert record[key] == pytest.approx(getattr(counted, key), rel=1e-6) and record[key] > 0, key
    assert record["bytes"] == (folder / "model.safetensors").stat().st_size
    assert record["checkpoint_sha256"] == file_hash(folder / "model.safetensors")
    assert record["sparsity"] == config["sparsity_config"]["global_sparsity"]
    assert record["precision"] == "float32" and record["weights"] == record["model"] == folder.name
    assert (record["seed"], record["epochs"], record["T"]) == (3, 2, 2) and record["train_minutes"] >= 0
    assert {key: record[key] for key in facts} == facts and {"train_commit", "train_machine"} <= facts.keys()
    assert record["train_command"].endswith("--seed 3 --output OUTPUT --experiment dense")
    assert record["command"].startswith("python validate.py --checkpoint OUTPUT/dense --ship digits")
    # Nothing says where on this machine it was.
    card = (folder / "README.md").read_text()
    for place in (trained, shelf.parent):
        assert str(place) not in card + (folder / "config.json").read_text()
    assert f'create_model("{folder.name}", pretrained=True)' in card and f"{record['top1']:.2f} %" in card
    assert record["train_command"] in card and "hf-hub:" not in card
    # By name, through both doors.
    register_again(NAME)
    (found,) = spikezoo.list_pretrained(f"{NAME}.*")
    assert (found.name, found.top1, found.size) == (folder.name, record["top1"], record["bytes"])
    for name in (NAME, folder.name):
        loaded = spikezoo.create_model(name, pretrained=True)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_ticket_is_shipped_baked_and_exact(validate, trained, shelf):
    state = trained / "ticket" / "last.safetensors"  # with scores
    assert validate.main(["--checkpoint", str(state), "--ship", "ticket", "--count-images", "1"]) == 0
    folder = shelf / f"{NAME}.ticket"
    model, baked = (
        spikezoo.create_model(f"local-dir:{place}", pretrained=True) for place in (folder, trained / "ticket")
    )
    assert model.recipe == baked.recipe and model.recipe[-1][0] == "bake"
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in baked.state_dict().items())
    record = read_config(folder)["spikezoo"]["results"]
    assert 0.3 < record["sparsity"] < 0.5 and record["train_command"].count("kind=mpslt") == 1
    codes = json.loads(_metadata(folder / "model.safetensors")["spikezoo.sparse"])["tensors"]
    assert sum(code["code"] == "ticket" for code in codes.values()) >= 3


def _metadata(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def test_nothing_half_written_stays(validate, trained, shelf, monkeypatch):
    argv = ["--checkpoint", str(trained / "dense"), "--count-images", "1", "--ship"]
    validate.main([*argv, "digits"])
    before = {path: (shelf / path).read_bytes() for path in on(shelf) if (shelf / path).is_file()}
    with pytest.raises(ValueError, match=rf"{NAME}\.digits is there already.*--overwrite"):
        validate.main([*argv, "digits"])

    def breaks(*_, **__):
        raise KeyboardInterrupt

    for target, name in ((load("validate"), "evaluate"), (shipping, "write_card")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, breaks)
            for more in (["digits", "--overwrite"], ["other"]):
                with pytest.raises(KeyboardInterrupt):
                    validate.main([*argv, *more])
        assert {path: (shelf / path).read_bytes() for path in on(shelf) if (shelf / path).is_file()} == before
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="together more than 1,000"):
        patch.setattr(shipping, "MOST_SHIPPED_BYTES", 1000)
        validate.main([*argv, "other"])
    assert len(on(shelf)) == 4
    # Of its own size only: it takes its own place.
    size = sum(len(content) for content in before.values())
    monkeypatch.setattr(shipping, "MOST_SHIPPED_BYTES", int(1.2 * size))
    other = ["--checkpoint", str(trained / "ticket"), "--count-images", "1", "--ship", "digits", "--overwrite"]
    validate.main(other)
    assert len(on(shelf)) == 4 and read_config(shelf / f"{NAME}.digits")["spikezoo"]["recipe"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", NAME, "--ship", "digits"], "the weights are random, or shipped already. Give --checkpoint"),
        (["--checkpoint", "dense", "--ship", "Digits"], "'Digits' is no tag: expected small letters"),
        (["--checkpoint", "dense", "--ship", "a.b"], "'a.b' is no tag"),
        (["--checkpoint", "dense", "--ship", "a/../b"], "is no tag"),
        (["--checkpoint", "dense", "--ship", "a", "--amp"], "measures in float32 on the whole test split"),
        (["--checkpoint", "dense", "--ship", "a", "--split", "train"], "on the whole test split"),
        (["--checkpoint", "dense", "--ship", "a", "--mean", "0"], "--mean, --std"),
        (["--checkpoint", "dense", "--overwrite"], "--overwrite is for --ship TAG"),
        (["--checkpoint", "untold", "--ship", "a"], "Nobody knows how .* was trained"),
        (["--checkpoint", "dense", "--ship", "a", "--dataset", "npz:/x/y.npz"], "a place on this machine.*npz:y.npz"),
    ],
)
def test_what_is_not_shipped(validate, trained, shelf, monkeypatch, flags, words):
    monkeypatch.chdir(trained)
    if not Path("untold").exists():
        model = spikezoo.create_model("local-dir:dense", pretrained=True)
        spikezoo.save_checkpoint(model, "untold", {"dataset": "digits"})
    with pytest.raises(ValueError, match=words):
        validate.main(flags)
    assert on(shelf) == []


# ---------------------------------------------------------------------------------------------------- reproducing


@pytest.fixture
def shipped(validate, trained, shelf, register_again):
    """The two nets on the shelf, found by name."""
    for run in ("dense", "ticket"):
        validate.main(["--checkpoint", str(trained / run), "--ship", run, "--count-images", "1"])
    register_again(NAME)
    return shelf


def change(folder, **results):
    """Write other results into the config, with its hash."""
    copy_checkpoint(folder, folder, {**read_config(folder)["spikezoo"]["results"], **results})


def test_every_record_is_reproduced(validate, shipped, register_again, tmp_path, capsys):
    capsys.readouterr()
    argv = ["--model", "test_*", "--pretrained", "--results-file", str(tmp_path / "r.json")]
    assert validate.main(argv) == 0
    assert capsys.readouterr().out.count("difference +0.00 points: reproduced (within 0.28 points)") == 2
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [row["model"] for row in rows] == [f"{NAME}.dense", f"{NAME}.ticket"]
    for row in rows:
        record = read_config(shipped / row["model"])["spikezoo"]["results"]
        assert row["reproduced"] and row["recorded_top1"] == row["top1"] == record["top1"]
        keys = ("seed", "epochs", "train_command", "train_commit", "train_minutes", "bytes", "sparsity")
        assert {key: row[key] for key in keys} == {key: record[key] for key in keys}
    right, dense = rows[0]["top1"], shipped / f"{NAME}.dense"
    change(dense, top1=right + 0.3)
    assert validate.main(argv) == 1
    assert f"recorded {right + 0.3:.2f} %, difference -0.30 points: NOT reproduced" in capsys.readouterr().out
    # Other data of the same name.
    change(dense, top1=right, samples=10000)
    assert validate.main(argv) == 1
    assert "of other data: samples 360, recorded 10000: NOT reproduced" in capsys.readouterr().out
    # What was asked for in another way has no record.
    change(dense, samples=360)
    for flags in (["--T", "1"], ["--split", "train"]):
        assert validate.main([*argv, *flags]) == 0
        assert "recorded" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("run", "limit"),
    [
        ({}, 0.05),
        ({"deployed": "exact"}, 0.05),
        ({"deployed": "bf16"}, 0.2),
        ({"deployed": "int8"}, 0.2),
        ({"precision": "bfloat16"}, 0.2),
    ],
)
def test_how_far_apart_a_record_may_be(validate, run, limit):
    rounded = limit == 0.2
    row = {"top1": 90.0, "precision": "float32", "deployed": None, "samples": 10_000, **run}
    for difference in (limit, limit + 0.01):
        for recorded in (90 - difference, 90 + difference):
            found = load("validate").compare(row, {"top1": recorded, "samples": 10_000})
            better = rounded and recorded < 90
            assert found == {"recorded_top1": recorded, "reproduced": better or difference == limit}
    # Of 360 images one, or two where rounding is meant to move the logits: rows have four decimals.
    row["samples"] = 360
    for images in (1, 2, 3):
        recorded = round(90 + 100 * images / 360, 4)
        found = load("validate").compare(row, {"top1": recorded, "samples": 360})
        assert found["reproduced"] == (images <= (2 if rounded else 1))


def test_missing_data_is_one_line_and_fails(validate, shipped, register_again, tmp_path, capsys):
    change(shipped / f"{NAME}.dense", dataset="npz:gone.npz")
    register_again(NAME)
    capsys.readouterr()
    assert validate.main(["--model", "test_*", "--pretrained", "--data-dir", str(tmp_path)]) == 1
    out = capsys.readouterr()
    assert out.err.count("\n") == 1 and out.err.startswith(f"{NAME}.dense: FileNotFoundError: npz:gone.npz")
    assert out.out.count(": reproduced") == 1


def test_the_installed_command_says_that_shipping_takes_a_checkout():
    with pytest.raises(ValueError, match=r"in a checkout .* run python validate\.py --checkpoint DIR --ship cifar10"):
        load("validate").main(["--checkpoint", "output/snn", "--ship", "cifar10"])


def test_a_thousand_flipped_bits(shipped):
    # Half of them in the config. 1e-05 and 1E-05 are one number: such a flip is no damage.
    read, bits = 0, random.Random(0)
    for file in ("config.json", "model.safetensors"):
        path = shipped / f"{NAME}.ticket" / file
        whole = path.read_bytes()
        for bit in bits.sample(range(8 * len(whole)), 500):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                spikezoo.create_model(f"{NAME}.ticket", pretrained=True)
            except ValueError:
                continue
            read += 1
            assert file == "config.json" and json.loads(damaged) == json.loads(whole)
        path.write_bytes(whole)
    assert read <= 3
    spikezoo.create_model(f"{NAME}.ticket", pretrained=True)


# ------------------------------------------------------------------------------------------------------ publishing


def test_push_all(hub, shipped, tmp_path, capsys):
    capsys.readouterr()
    assert cli.main(["push", "--all", "--org", "zoo", "--dry-run", str(tmp_path / "cards")]) == 0
    names = [f"{NAME}.dense", f"{NAME}.ticket"]
    assert capsys.readouterr().out.count("pushed nothing") == 2 and hub.requests == []
    assert sorted(path.name for path in (tmp_path / "cards").iterdir()) == names
    for name in names:
        assert (
            f'create_model("hf-hub:zoo/{name}", pretrained=True)'
            in (tmp_path / "cards" / name / "README.md").read_text()
        )
    for _ in range(2):
        assert cli.main(["push", "--all", "--org", "zoo"]) == 0
        assert capsys.readouterr().out.split() == [f"{hub.endpoint}/zoo/{name}" for name in names]
        heads = [hub.head(f"zoo/{name}") for name in names]
    assert heads == [hub.head(f"zoo/{name}") for name in names]
    for name in names:
        assert hub.file(f"zoo/{name}", "model.safetensors") == (shipped / name / "model.safetensors").read_bytes()
        loaded, local = (spikezoo.create_model(n, pretrained=True) for n in (f"hf-hub:zoo/{name}", name))
        assert all(torch.equal(value, local.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_push_all_wants_an_organisation_and_weights(shelf, capsys):
    for flags, words in (
        (["--all"], "takes --org ORG"),
        (["--all", "--org", "zoo", "--revision", "v1"], "no checkpoint, repository or --revision"),
        (["x", "a/b", "--org", "zoo"], "--all and --org ORG"),
        (["x"], "takes DIR_OR_CHECKPOINT and ORG/NAME"),
        (["--all", "--org", "zoo"], "There is nothing to publish"),
    ):
        assert cli.main(["push", *flags]) == 2
        assert words in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "line",
    [
        "train.py --data-dir /a/b --output /c/d --seed 1 -> train.py --data-dir DATA --output OUTPUT --seed 1",
        "train.py --data-dir=b --output=out --seed=1 -> train.py --data-dir=DATA --output=OUTPUT --seed=1",
        "train.py --config configs/x/y.yaml --lr 0.1 -> train.py --config configs/x/y.yaml --lr 0.1",
        "train.py --config /a/zoo/configs/x/y.yaml -> train.py --config configs/x/y.yaml",
        "train.py -c ../mine.yaml -> train.py -c OUTPUT/mine.yaml",
        "train.py --initial-checkpoint output/tiny -> train.py --initial-checkpoint OUTPUT/tiny",
        "train.py --resume auto --checkpoint tiny -> train.py --resume auto --checkpoint tiny",
        "train.py --dataset npz:/a/b.npz -> train.py --dataset npz:DATA/b.npz",
        "train.py --model local-dir:/a/b -> train.py --model local-dir:OUTPUT/b",
        "train.py --model-kwargs decay=0.5 -> train.py --model-kwargs decay=0.5",
        "validate.py --dataset events:NMNIST-subset -> validate.py --dataset events:NMNIST-subset",
        "validate.py --checkpoint /a/b/c --results-file '~/my r' -> "
        "validate.py --checkpoint OUTPUT/c --results-file 'OUTPUT/my r'",
        "-m spikezoo dynsnn --output /a/b --compact -> -m spikezoo dynsnn --output OUTPUT/b --compact",
    ],
)
def test_portable_command(line):
    given, wanted = (f"python {part}" for part in line.split(" -> "))
    assert portable_command(given) == wanted == portable_command(wanted)
    assert portable_command(f"{given} && {given}") == f"{wanted} && {wanted}"


def test_training_facts(tmp_path):
    model = spikezoo.create_model(NAME)
    spikezoo.save_checkpoint(model, tmp_path, {"top1": 5.0})
    assert training_facts(tmp_path) == {}
    # An early training left its command beside the weights only.
    meta = {"command": "python train.py --output /x", "seed": 7, "commit": "abc", "machine": "m", "date": "d"}
    (tmp_path / "metadata.json").write_text(json.dumps(meta))
    (tmp_path / "summary.csv").write_text("epoch,train_seconds\n0,90\n1,45\n")
    wanted = {
        "train_command": "python train.py --output OUTPUT", "seed": 7, "epochs": 2, "train_minutes": 2.2,
        "train_commit": "abc", "train_machine": "m", "train_date": "d",
    }  # fmt: skip
    assert training_facts(tmp_path) == wanted == training_facts(tmp_path / "model.safetensors")
    # A program that goes on from there hands them on, and its own command joins.
    results = {**wanted, "command": "python -m spikezoo dynsnn --checkpoint /x/run --output /x/small", "commit": "def"}
    spikezoo.save_checkpoint(model, tmp_path / "small", results)
    made = "python -m spikezoo dynsnn --checkpoint OUTPUT/run --output OUTPUT/small"
    assert training_facts(tmp_path / "small") == {**wanted, "train_command": f"{wanted['train_command']} && {made}"}


@pytest.mark.parametrize("name", [row.name for row in spikezoo.list_pretrained()])
def test_shipped_nets_say_their_classes_and_the_normalisation_that_they_are_measured_with(name):
    # Exports, the gallery and other libraries have the config alone; validate.py asks the dataset where it is silent.
    config = Config.read(registry.SHIPPED / name)
    data = config.dataset.partition(":")[0]
    info = None if data == "events" else dataset_info(data)
    for key in ("mean", "std"):
        stored = config.pretrained_cfg[key]
        measured = config.inputs.get(key) or (stored if info is None else getattr(info, key))
        assert len(stored) in (1, config.pretrained_cfg["input_size"][-3]), key
        assert {*stored} == {*measured} if len(measured) == 1 else list(stored) == list(measured), (
            key,
            stored,
            measured,
        )
    known = dataset_info("nmnist" if info is None else data).label_names
    assert config.pretrained_cfg["label_names"] == list(known) and len(known) == config.pretrained_cfg["num_classes"]
    assert spikezoo.create_model(name, pretrained=True).pretrained_cfg["label_names"] == known
