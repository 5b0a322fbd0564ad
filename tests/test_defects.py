"""What scripts say and do where something around them is odd: errors, paths, numbers, streams."""

from __future__ import annotations

import errno
import io
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import COMMON, make_folder, random_model, run_gfbs

import gfbs_cifar
import gfbs_imagenet
import prepare_torch_imagenet_models as prepare
import train
from tools import export
from utils.checkpoint import save_checkpoint
from utils.cli.parser import run_script
from utils.errors import InputError, Interrupted
from utils.run.callbacks import RunCallback

LONG = "x" * 300


# Ranks


@pytest.fixture
def group():
    """A group of one rank."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def fail(error):
    def main(args):
        raise error

    return run_script(lambda: None, main)


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError("NCCL error in: a.cpp:1, Cuda failure 'out of memory'"),
        RuntimeError("Gloo: unsupported data type Half"),
        RuntimeError("a connection pattern of two layers does not fit"),
    ],
)
def test_an_error_that_is_no_lost_rank_keeps_its_traceback(group, error):
    with pytest.raises(RuntimeError) as raised:
        fail(error)
    assert raised.value is error


@pytest.mark.parametrize(
    "said",
    [
        "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:51151",
        "Read error [127.0.0.1]:1: Connection reset by peer",
        "[gloo] Timed out waiting 1800000ms for recv operation to complete",
        "failed to recv, got 0 bytes. Connection was likely closed. Did the server shut down?",
        "NCCL error\nncclRemoteError: A call failed possibly due to a network error",
    ],
)
def test_a_lost_rank_is_one_line_that_says_what_the_backend_said(group, said, capsys):
    assert fail(RuntimeError(said)) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "another rank has died or left" in shown
    assert said.split("\n")[-1] in shown


# How to continue


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


# Advice


def test_a_missing_baseline_is_made_by_the_script_that_makes_it(place):
    with pytest.raises(
        InputError, match="no such checkpoint; make one with train.py, or .*--check"
    ):
        run_gfbs()
    with pytest.raises(InputError, match="make one with prepare_torch_imagenet_models.py"):
        gfbs_imagenet.main(gfbs_imagenet.parse_args(["--data_dir", "images", "--device", "cpu"]))
    with pytest.raises(InputError, match="no such checkpoint") as error:
        export.main(export.parse_args(["nowhere.pth"]))
    assert "--checkpoint" not in str(error.value)


@pytest.mark.parametrize(
    "script, holds, asked, advice",
    [
        (gfbs_imagenet, "gateresnet20", "resnet50", "gfbs_cifar.py prunes it"),
        (gfbs_cifar, "resnet18", "gateresnet20", "gfbs_imagenet.py prunes it"),
        (gfbs_imagenet, "resnet18", "resnet50", "give --net resnet18 or another --checkpoint"),
    ],
)
def test_another_network_is_pruned_by_its_script(place, script, holds, asked, advice):
    save_checkpoint("c.pth", random_model(holds, 2))
    argv = ["--net", asked, "--checkpoint", "c.pth", "--data_dir", "images", "--device", "cpu"]
    with pytest.raises(InputError, match=f"holds {holds}, not {asked}; {advice}"):
        script.main(script.parse_args(argv))


# Paths


@pytest.fixture(scope="module")
def ground():
    """A folder where every user may write, with one inside that nobody but root may enter."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_folder(folder / "images", images=2, size=(16, 16))
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
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    yield ground
    os.seteuid(me)


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


# Numbers


@pytest.mark.parametrize(
    "flag, value, wanted",
    [
        ("--lr", "1e39", "'1e39' is not a positive number below 3.4e+38"),
        ("--weight_decay", "1e300", "'1e300' is not a number of at least 0 and below 3.4e+38"),
        ("--w_beta", "1e38", "'1e38' is not a number of at least 0 and below 1e6"),
    ],
)
def test_numbers_that_float32_cannot_hold_are_refused(flag, value, wanted, capsys):
    with pytest.raises(SystemExit) as left:
        gfbs_cifar.parse_args([flag, value])
    assert left.value.code == 2 and wanted in capsys.readouterr().err


def test_what_cannot_be_drawn_is_no_failure_to_score(trained, monkeypatch, capsys):
    def fails(*args, **options):
        raise ValueError("The histogram is empty, please file a bug report.")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_histogram", fails)
    assert run_gfbs("--p", "0.5")["accuracy"]["last"] is not None
    assert "warning: no more TensorBoard files" in capsys.readouterr().out


# Streams


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


# Disks


@pytest.mark.parametrize("writes", [1, 8])
def test_tensorboard_without_a_disk_costs_one_line(place, monkeypatch, capfd, writes):
    count = iter(range(writes))

    def full(self, data):
        if next(count, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    threading.excepthook, usual = threading.__excepthook__, threading.excepthook
    try:
        assert run("--epochs", "1") == 0
        assert threading.excepthook is threading.__excepthook__
    finally:
        threading.excepthook = usual
    shown = capfd.readouterr()
    assert shown.out.count("warning: no more TensorBoard files") == 1
    assert "Exception" not in shown.err and "Traceback" not in shown.err
    assert list(Path("checkpoints").glob("*/result.json"))
