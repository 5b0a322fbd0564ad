"""Fixtures: folders of images, a trained network, and a clean state of torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

# One thread is fastest for networks of this size, in the suite and in the processes it starts.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from helpers import make_folder, run_train

from utils.cost import Latency


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with images in ``images``; scripts write below it."""
    make_folder(tmp_path / "images", images=9, size=(16, 16))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """What ``train.py`` leaves, for all tests to copy."""
    folder = tmp_path_factory.mktemp("trained")
    make_folder(folder / "images", images=9, size=(16, 16))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_train()
    return folder


@pytest.fixture
def trained(place, trained_once):
    """The folder of a trained network, in ``place``."""
    shutil.copytree(trained_once / "checkpoints", place / "checkpoints")
    return place / "checkpoints" / "gateresnet20_folder"


@pytest.fixture
def reachable():
    """A folder that every user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(autouse=True)
def no_clock(monkeypatch):
    """No run of the suite is timed."""
    made_up = partial(Latency, before=0.002, after=0.001, spread=0.0)
    monkeypatch.setattr("utils.run.measure.latency", lambda *args, **_: made_up(args[2]))


@pytest.fixture(autouse=True)
def keep_global_state():
    """A script may change which algorithms torch takes; the next test must not notice."""
    yield
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(False)
