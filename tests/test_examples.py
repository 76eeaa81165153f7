"""The scripts of examples/ run from top to bottom, and say what they promise."""

import runpy

import pytest
from conftest import ROOT

import spikezoo

# What each prints, besides what may differ from run to run.
SAID = {
    "ann_to_snn": "spiking at T=4:",
    "dynsnn_compact": "loads as it was: True",
    "events": "Wrote output/examples/bars.png",
    "finetune_your_folder": "'digit_0', 'digit_1', 'digit_2', 'digit_3'",
    "first_steps": "of the energy of the ReLU twin",
    "mpbn_folded": "the same logits, bit for bit: True",
    "publish_to_the_hub": "loaded from the Hub, the same logits: True",
    "ticket_to_bits": "the same logits in parts: True",
    "your_own_model": "saved and loaded: True",
}


def test_all_are_here():
    assert sorted(SAID) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", SAID)
def test_example(name, tmp_path, monkeypatch, capsys, request):
    if name == "publish_to_the_hub":
        request.getfixturevalue("hub")
        monkeypatch.setenv("REPO", "me/spiking-digits")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EPOCHS", "1")
    monkeypatch.setattr("spikezoo.train.output.plot", lambda *_: [])
    known = set(spikezoo.list_models())
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="your_own_model")
    assert SAID[name] in capsys.readouterr().out
    if name == "your_own_model":
        from conftest import forget_model

        assert set(spikezoo.list_models()) - known == {"my_net"}
        forget_model("my_net")
