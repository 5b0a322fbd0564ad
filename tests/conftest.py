"""What the tests share: networks with something to prune, and batches."""

from __future__ import annotations

import os
import shutil

# One thread is fastest for networks of this size, in the suite and in the processes it starts.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from runs import make_folder, run_train
from torch import nn

from models import GatedModel, build_model
from utils.distributed import Runtime


def randomise_channels(model: nn.Module) -> None:
    """Random biases, scales, shifts and running statistics, so that no two channels are alike."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.5, 0.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)


def random_model(net: str, num_classes: int = 10) -> GatedModel:
    torch.manual_seed(0)
    model = build_model(net, num_classes)
    randomise_channels(model)
    nn.init.normal_(model.get_submodule(model.head).bias)
    return model


def settle(model: GatedModel, images: torch.Tensor) -> GatedModel:
    """Take the running statistics from these images.

    With random ones the signal fades from layer to layer, until in eval mode the logits of a deep
    network are those of its last biases, whatever the image and whatever was cut.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    usual, training = [norm.momentum for norm in norms], model.training
    for norm in norms:
        norm.momentum = 1
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return model.train(training)


CPU = Runtime(torch.device("cpu"))


def random_batch(count: int = 8, size: int = 32, num_classes: int = 10, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(count, 3, size, size, dtype=dtype), torch.arange(count) % num_classes


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |a|, in which this project states equality."""
    return ((a - b).abs().max() / a.abs().max()).item()


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


@pytest.fixture(autouse=True)
def keep_global_state():
    """A script may ask torch for deterministic algorithms; the next test must not notice."""
    yield
    torch.use_deterministic_algorithms(False)
