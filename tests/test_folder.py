"""The folder of a run: full disks, places that cannot be written, and one process at a time."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from socket import gethostname

import pytest
from helpers import files, run_train, same_weights, snapshot
from processes import SERVER

from utils import files as files_module
from utils.checkpoint import load_checkpoint
from utils.errors import InputError, RunError
from utils.files import write_atomically
from utils.run.existing import locked


def full_disk(file):
    file.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_ends_the_run_with_one_line(place, monkeypatch):
    run_train("--epochs", "2", "--output", "whole")
    original = files_module.write_atomically
    with pytest.MonkeyPatch.context() as patch:
        count = [0]

        def fills_up(path, write, **options):
            count[0] += Path(path).name == "last.pth"
            original(path, full_disk if count[0] == 2 else write, **options)

        patch.setattr("utils.checkpoint.write_atomically", fills_up)
        with pytest.raises(
            RunError, match="No space left on device.*continue with --resume"
        ) as error:
            run_train("--epochs", "2", "--output", "full")
    assert "\n" not in str(error.value)
    folder = Path("full/gateresnet20_folder")
    assert load_checkpoint(folder / "last.pth").meta["training"]["epoch"] == 1
    assert not list(folder.glob(".*"))
    run_train("--epochs", "2", "--output", "full", "--resume")
    assert same_weights(folder / "last.pth", "whole/gateresnet20_folder/last.pth")


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path):
    path, previous = tmp_path / "last.pth", tmp_path / "last_previous.pth"
    path.write_text("old")
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, full_disk, previous=previous)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["last.pth"]
    write_atomically(path, lambda file: file.write(b"new"), previous=previous)
    assert (path.read_text(), previous.read_text()) == ("new", "old")
    write_atomically(path, lambda file: file.write(b"newer"), previous=previous)
    assert (path.read_text(), previous.read_text()) == ("newer", "new")


@pytest.mark.parametrize("flag", ["--output", "--logdir"])
def test_a_place_that_cannot_be_written_is_found_before_training(place, flag):
    Path("file").write_text("in the way")
    with pytest.raises(InputError, match=f"file.*cannot be written .*see {flag}"):
        run_train(flag, "file")
    run_train("--output", "good")
    before = files(Path("good/gateresnet20_folder"))
    with pytest.raises(InputError, match="cannot be written"):
        run_train("--output", "good", "--logdir", "file", "--lr", "0.3", "--overwrite")
    assert files(Path("good/gateresnet20_folder")) == before


def own(folder, ready):
    os.setsid()
    with locked(folder):
        if os.fork():
            subprocess.Popen(["sleep", "100"])
            ready.set()
        time.sleep(100)


@pytest.fixture
def owner(trained):
    """A process that has the folder, with a fork and a child that outlive it."""
    ready = SERVER.Event()
    process = SERVER.Process(target=own, args=(trained, ready))
    process.start()
    try:
        assert ready.wait(100)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()


def test_a_folder_in_use_is_refused_until_its_owner_is_killed(trained, owner, monkeypatch):
    monkeypatch.setattr("utils.run.existing.PATIENCE", 0)
    (trained / "result.json").unlink()  # an unfinished run
    before = snapshot(trained)
    for _ in range(2):  # the refused one leaves the owner's name
        with pytest.raises(InputError, match=f"in use by process {owner.pid} on {gethostname()};"):
            run_train("--resume")
    assert snapshot(trained) == before
    owner.kill()
    owner.join()
    monkeypatch.setattr("utils.run.existing.PATIENCE", 5)  # its fork may just have begun
    run_train("--resume")
    assert json.loads((trained / "lock").read_text())["pid"] == os.getpid()


def test_a_folder_is_waited_for(trained, owner):
    (trained / "result.json").unlink()
    threading.Timer(0.3, owner.kill).start()
    run_train("--resume")


@pytest.mark.parametrize("left", ["", "no json", '{"pid": 1, "host": "elsewhere"}'])
def test_a_file_alone_blocks_nobody(trained, left, monkeypatch):
    monkeypatch.setattr("utils.run.existing.PATIENCE", 0)
    (trained / "lock").write_text(left)
    run_train("--resume")


def test_a_file_system_without_locks_is_named(place, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(InputError, match="file system without locks .No locks available.*--output"):
        run_train()
