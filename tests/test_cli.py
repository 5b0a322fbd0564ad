"""Odd paths and streams: one line that says what is wrong, and the exit code."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import COMMON, make_folder, random_model, without

import gfbs_cifar
import prepare_torch_imagenet_models as prepare
import train
from tools import export
from utils.checkpoint import save_checkpoint
from utils.cli.parser import run_script
from utils.data.small import load_data

LONG = "x" * 300


@pytest.fixture(scope="module")
def ground():
    """A folder where every user may write, with one inside that nobody but root may enter."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_folder(folder / "images", images=2, size=(16, 16))
        load_data("folder", folder / "images")  # imports what nobody cannot import later
        save_checkpoint(folder / "c.pth", random_model("gateresnet20", 2), image_size=16)
        state = torchvision.models.resnet18(num_classes=2).state_dict()
        torch.save(state, folder / "r.pth")
        folder.chmod(0o777)
        (folder / "shut").mkdir(mode=0)
        yield folder


@pytest.fixture
def nobody(ground, monkeypatch):
    """The working folder of a user who is not root."""
    monkeypatch.chdir(ground)
    with without(0):
        yield ground


CONVERT = ["--net", "resnet18", "--checkpoint", "r.pth", "--device", "cpu"]


PLACES = [
    (train, COMMON, "--output"),
    (train, [*COMMON, "--resume"], "--output"),
    (train, COMMON, "--checkpoint"),
    (gfbs_cifar, [*COMMON, "--checkpoint", "c.pth"], "--output"),
    (gfbs_cifar, COMMON, "--checkpoint"),
    (export, ["c.pth"], "--output"),
    (prepare, CONVERT, "--output"),
    (prepare, ["--net", "resnet18", "--device", "cpu"], "--checkpoint"),
]


@pytest.mark.parametrize("path", ["shut/inside/file", LONG])
@pytest.mark.parametrize("script, argv, flag", PLACES)
def test_a_path_that_cannot_be_used_is_one_line(nobody, script, argv, flag, path, capsys):
    before = {p for p in nobody.rglob("*") if "shut/" not in str(p)}
    code = run_script(lambda: script.parse_args([*argv, flag, path]), script.main)
    shown = capsys.readouterr().err
    assert code == 2 and shown.count("\n") == 1, shown
    assert path in shown and ("name too long" if path == LONG else "Permission denied") in shown
    assert {p for p in nobody.rglob("*") if "shut/" not in str(p)} == before


def run(*argv):
    return run_script(lambda: train.parse_args([*COMMON, *argv]), train.main)


def test_names_that_stdout_cannot_show_are_escaped(place, monkeypatch):
    stdout = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(stdout, encoding="ascii"))
        assert run("--epochs", "1", "--output", "größe") == 0
        assert rb"results in gr\xf6\xdfe" in stdout.getvalue()
    assert Path("größe").is_dir()


@pytest.mark.parametrize("argv, code", [("--epochs 1", 0), ("--data_dir nowhere", 2)])
def test_a_closed_stderr_changes_no_exit_code(place, argv, code, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)  # what Python makes of 2>&-
        assert run(*argv.split()) == code
        sys.stderr.close()
    shown = capsys.readouterr().out
    assert "error" not in shown and ("results in" in shown) == (code == 0)
