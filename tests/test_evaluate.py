"""tools.evaluate: the accuracy that the runs note, for every kind of file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import files, make_folder, one_run, random_model, run_gfbs, spy

from tools import evaluate, export
from utils.checkpoint import load_model, save_checkpoint
from utils.cost import model_cost
from utils.errors import InputError


@pytest.fixture(autouse=True)
def timed(monkeypatch):
    """Times are made up: a call takes 2 ms."""
    monkeypatch.setattr(evaluate, "seconds", lambda run: 0.002 if run() is not None else None)


def run(*argv):
    return evaluate.main(evaluate.parse_args([*map(str, argv), "--device", "cpu"]))


def test_every_kind_of_file_has_the_accuracy_of_the_run(trained, capsys):
    result = run_gfbs("--p", "0.5")
    last = one_run(trained, "gfbs_p0.5") / "last.pth"
    for kind in ("pt2", "onnx"):
        export.main(export.parse_args([str(last), "--format", kind]))
    names = [trained / "model_best.pth", last, last.with_suffix(".pt2"), last.with_suffix(".onnx")]
    capsys.readouterr()
    rows = run(*names, "--data", "images", "--per_class", "--json", "found.json")
    before, *after = (row["numbers"] for row in rows)
    assert after[0]["loss"] == pytest.approx(result["history"][-1]["test"]["loss"], rel=1e-4)
    assert before["top-1, %"] == result["accuracy"]["baseline"]
    for row, numbers in zip(rows[1:], after, strict=True):
        assert numbers["top-1, %"] == pytest.approx(result["accuracy"]["last"])
        assert numbers["loss"] == pytest.approx(after[0]["loss"], rel=1e-4)
        assert numbers["MACs, M"] * 1e6 == pytest.approx(result["cost"]["macs"]["after"])
        assert numbers["ms, batch 1"] == numbers["ms, batch 64"] == 2
        accuracies = row["top-1 by class, %"].values()  # classes have equally many images
        assert sum(accuracies) / len(accuracies) == pytest.approx(numbers["top-1, %"])
    widths = {name: [n["after"], n["before"]] for name, n in result["channels"].items()}
    assert rows[1]["channels"] == widths and rows[2]["channels"] == {}
    assert json.loads(Path("found.json").read_text()) == rows
    shown = capsys.readouterr().out
    assert "(3) " in shown and "gate1" in shown and f"{after[0]['loss']:.3f}" in shown


def test_without_data_there_are_costs(trained, capsys):
    (row,) = run(trained / "last.pth")
    model = load_model(trained / "last.pth")
    assert row["numbers"]["params, M"] == model_cost(model, 16).params / 1e6
    assert "top-1, %" not in row["numbers"] and "top-1" not in capsys.readouterr().out


def test_large_images_are_cropped_as_the_checkpoint_says(tmp_path, monkeypatch):
    make_folder(tmp_path / "val", parts=("",), images=2)
    meta = {"image_size": 64, "resize": 70, "classes": ["cat", "dog"]}
    save_checkpoint(tmp_path / "net.pth", random_model("resnet18", 2), **meta)
    seen = spy(monkeypatch, evaluate.folders, "FolderBatches", lambda *_, **how: how)
    (row,) = run(tmp_path / "net.pth", "--data", tmp_path / "val", "--workers", "0")
    assert row["numbers"]["images"] == 4 and seen[0]["crops"] == evaluate.folders.Crops(64, 70)


def test_bad_input(trained):
    model, last = random_model("gateresnet20", 3), trained / "last.pth"
    save_checkpoint("three.pth", model)
    export.main(export.parse_args([str(last)]))
    last.with_suffix(".pt2.json").rename("elsewhere.json")
    before = files(trained)
    for argv, message in (
        (["three.pth", "--data", "images"], "has 2 classes, the checkpoint was trained on 3"),
        ([last, "--data", "nowhere"], "nowhere: cannot be read"),
        ([last.with_suffix(".pt2")], "last.pt2.json does not describe .*last.pt2"),
        ([last, "--json", "images"], "cannot be written.*--json"),
        (["no.pth"], "no such checkpoint"),
    ):
        with pytest.raises(InputError, match=message):
            run(*argv)
    assert files(trained) == before
    with pytest.raises(SystemExit):
        run(last, "--per_class")
