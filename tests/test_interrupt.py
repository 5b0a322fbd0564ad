"""Signals stop a run after the batch, and its last line is the command that continues it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import COMMON, random_model, run_train, same_weights
from processes import ROOT, Script

import train
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import Interrupted
from utils.run.folder import RunCallback

LAST = "gateresnet20_folder/last.pth"


def interrupted_at(moment, count, method, signum, *argv):
    """Start training. At the ``count``-th call of a callback method, a signal comes twice."""
    call, seen = getattr(RunCallback, method), []

    def interrupted(self, *args):
        seen.append(args)
        for _ in range(2 if len(seen) == count else 0):
            os.kill(os.getpid(), signum)
        call(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stop:
        patch.setattr(RunCallback, method, interrupted)
        run_train(*argv)
    assert stop.value.signum == signum and stop.value.resume_with.endswith(" --resume")
    assert len(seen) == count
    training = load_checkpoint(Path("broken", LAST)).meta["training"]
    assert (training["epoch"], training["batch"]) == moment


def test_a_signal_finishes_the_batch_and_saves(trained):
    """A signal in an evaluation saves the state after the last batch."""
    argv = ["--output", "broken", "--resume"]
    interrupted_at((0, 2), 2, "after_batch", signal.SIGINT, *argv)
    interrupted_at((0, 3), 1, "while_evaluating", signal.SIGTERM, *argv)
    interrupted_at((1, 1), 1, "after_batch", signal.SIGTERM, *argv)
    run_train(*argv)
    assert same_weights(trained / "last.pth", Path("broken", LAST))


def test_a_signal_to_the_whole_group_reaches_no_data_worker(place):
    save_checkpoint("c.pth", random_model("resnet18", 2))
    Path("images/test").rename("images/val")
    argv = ["--net", "resnet18", "--checkpoint", "c.pth", "--data_dir", "images", "--device", "cpu"]
    argv += ["--image_size", "32", "--train_bs", "4", "--workers", "2"]
    running = Script("gfbs_imagenet.py", *argv)
    ends_with_its_exit_code(running, signal.SIGTERM, 143)


def test_the_exit_code_names_the_signal(place):
    argv = ["--dataset", "synthetic", "--device", "cpu", "--checkpoint_every", "1", "--bs", "16"]
    running = Script("train.py", "--net", "gateresnet20", *argv)
    ends_with_its_exit_code(running, signal.SIGINT, 130)


def ends_with_its_exit_code(running, signum, expected):
    """A signal to its whole group, when it has saved something."""
    while running.is_alive() and not list(Path("checkpoints").rglob("last.pth")):
        time.sleep(0.05)
    running.kill(signum)
    code, _, shown = running.wait()
    assert code == expected and "Traceback" not in shown, shown
    assert "continue with: " in shown and shown.rstrip().endswith("--resume")
    load_checkpoint(next(Path("checkpoints").rglob("last.pth")))


def test_a_signal_that_comes_again_does_not_change_the_exit_code():
    script = """if True:
        import atexit, os, signal, train
        from utils.cli.parser import run_script
        from utils.errors import Interrupted
        def stopped(args): raise Interrupted(signal.SIGTERM)
        atexit.register(os.kill, os.getpid(), signal.SIGTERM)
        raise SystemExit(run_script(lambda: train.parse_args([]), stopped))"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr


def interrupted(monkeypatch, *command, spec=None):
    """What a script that is interrupted in training says to continue with, as words."""
    call = RunCallback.after_batch

    def after_batch(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        call(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", list(command))
        patch.setattr(sys.modules["__main__"], "__spec__", spec)
        patch.setattr(RunCallback, "after_batch", after_batch)
        with pytest.raises(Interrupted) as stop:
            train.main(train.parse_args())
    return shlex.split(stop.value.resume_with)


@pytest.mark.parametrize("named", ["--checkpoint {}", "--checkpoint={}"])
def test_the_line_to_continue_with_is_taken_by_the_script(place, monkeypatch, named):
    whole = ["train.py", *COMMON, "--bs", "8", "--epochs", "2"]
    interrupted(monkeypatch, *whole, "--output", "old")
    words = [*named.format("old/gateresnet20_folder").split(), "-r", "--output", "new"]
    python, name, *argv = interrupted(monkeypatch, *whole, *words)
    assert name == "train.py" and "--output" in argv and argv.count("--resume") == 1
    assert train.main(train.parse_args(argv))["accuracy"]["last"] is not None


def test_what_is_dropped_is_the_flag_and_not_its_value_elsewhere(place, monkeypatch):
    whole = ["train.py", *COMMON, "--bs", "8", "--epochs", "2", "--output", "old"]
    interrupted(monkeypatch, *whole)
    _, _, *argv = interrupted(monkeypatch, *whole, "--checkpoint", "old/gateresnet20_folder")
    assert argv == [*whole[1:], "--resume"]
    folder = "old"  # names the output and the checkpoint
    shutil.copy("old/gateresnet20_folder/last.pth", folder)
    shutil.rmtree("old/gateresnet20_folder")
    _, _, *argv = interrupted(monkeypatch, *whole, "--checkpoint", folder)
    assert argv == [*whole[1:], "--resume"]


def test_the_line_names_the_module_that_was_started(place, monkeypatch):
    said = interrupted(monkeypatch, "/there/train.py", *COMMON, "--bs", "8", spec=train.__spec__)
    assert said[1:4] == ["-m", "train", "--net"]


@pytest.mark.parametrize("activated", [True, False])
def test_the_line_names_the_python_of_the_environment(place, monkeypatch, activated):
    python = place / "env" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(python.parent) if activated else os.defpath)
    said = interrupted(monkeypatch, "train.py", *COMMON, "--bs", "8")
    assert said[0] == ("python" if activated else "env/python")
