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

import train
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import Interrupted
from utils.run.folder import RunCallback

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_batch_and_saves(place, monkeypatch, signum):
    run_train("--epochs", "3", "--output", "whole")
    with pytest.MonkeyPatch.context() as patch:
        call, seen = RunCallback.after_batch, []

        def interrupted(self, batch, state):
            seen.append(batch)
            for _ in range(2 if len(seen) == 4 else 0):  # the same one, delivered twice
                os.kill(os.getpid(), signum)
            call(self, batch, state)

        patch.setattr(RunCallback, "after_batch", interrupted)
        with pytest.raises(Interrupted) as stop:
            run_train("--epochs", "3", "--output", "broken")
    assert stop.value.signum == signum and stop.value.resume_with.endswith(" --resume")
    assert len(seen) == 4
    training = load_checkpoint("broken/gateresnet20_folder/last.pth").meta["training"]
    assert (training["epoch"], training["batch"]) == (1, 1)
    run_train("--epochs", "3", "--output", "broken", "--resume")
    name = "gateresnet20_folder/last.pth"
    assert same_weights(f"whole/{name}", f"broken/{name}")


def test_a_signal_in_the_evaluation_saves_the_epoch_before_it(place, monkeypatch):
    run_train("--epochs", "2", "--output", "whole")
    with pytest.MonkeyPatch.context() as patch:
        call = RunCallback.while_evaluating

        def interrupted(self, state):
            os.kill(os.getpid(), signal.SIGTERM)
            call(self, state)

        patch.setattr(RunCallback, "while_evaluating", interrupted)
        with pytest.raises(Interrupted):
            run_train("--epochs", "2", "--output", "broken")
    name = "gateresnet20_folder/last.pth"
    training = load_checkpoint(f"broken/{name}").meta["training"]
    assert (training["epoch"], training["batch"]) == (0, 3)
    run_train("--epochs", "2", "--output", "broken", "--resume")
    assert same_weights(f"whole/{name}", f"broken/{name}")


def test_a_signal_to_the_whole_group_reaches_no_data_worker(place):
    save_checkpoint("c.pth", random_model("resnet18", 2))
    Path("images/test").rename("images/val")
    command = [
        sys.executable,
        ROOT / "gfbs_imagenet.py",
        "--net",
        "resnet18",
        "--checkpoint",
        "c.pth",
    ]
    command += ["--data_dir", "images", "--image_size", "32", "--train_bs", "4", "--workers", "2"]
    running = subprocess.Popen(
        [*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    last = Path("checkpoints/resnet18/gfbs_p0.4_seed1_imagesize32_trainbs4/last.pth")
    while not last.exists() and running.poll() is None:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGTERM)
    _, shown = running.communicate(timeout=100)
    assert running.returncode == 143, shown
    assert "Traceback" not in shown and "continue with: " in shown
    load_checkpoint(last)


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_names_the_signal(tmp_path, signum, code):
    command = [sys.executable, ROOT / "train.py", "--net", "gateresnet20", "--dataset", "synthetic"]
    running = subprocess.Popen(
        [*command, "--device", "cpu", "--checkpoint_every", "1", "--bs", "16"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    last = tmp_path / "checkpoints" / "gateresnet20_synthetic" / "last.pth"
    while not last.exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signum)
    _, shown = running.communicate(timeout=100)
    assert running.returncode == code
    assert "continue with: " in shown and shown.rstrip().endswith("--resume")
    assert "Traceback" not in shown
    load_checkpoint(last)


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
