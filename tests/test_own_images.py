"""The road of docs/own-images.md, and the round that trains a fresh classifier before scoring."""

from __future__ import annotations

import copy
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import (
    CPU,
    batches_of,
    copied_weights,
    die_after,
    make_folder,
    one_run,
    random_model,
    same_weights,
    spy,
)

import gfbs_cifar
import gfbs_imagenet
from utils.checkpoint import load_model, save_checkpoint
from utils.cli import settings
from utils.data.small import load_data
from utils.finetune import fit, head_alone
from utils.recipes import Recipe

PAGE = Path(__file__).parents[1] / "docs" / "own-images.md"
SMALL = ["--device", "cpu", "--workers", "0"]
TINY = [*SMALL, "--image_size", "32", "--epochs", "1", "--train_bs", "8"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    make_folder(tmp_path / "my_images", parts=("train", "val"), images=6, size=(40, 40))
    save_checkpoint(tmp_path / "baseline.pth", random_model("resnet18", 5))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv):
    argv = ["--net", "resnet18", "--data_dir", "my_images", *TINY, "--new_head", *argv]
    return gfbs_imagenet.main(
        gfbs_imagenet.parse_args([*argv, "--checkpoint", "baseline.pth", "--macs", "0.6"])
    )


def test_the_road_leads_to_a_small_exported_network(place, monkeypatch):
    """The commands of the page, with random weights and what makes them short."""
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), "random.pth")
    monkeypatch.setattr(
        torchvision.models.ResNet18_Weights, "get_state_dict", lambda *_, **__: 1 / 0
    )
    prepare, prune, export = re.findall(
        r"^    python (?:-m )?(\S+?)(?:\.py)? (.*)$", PAGE.read_text(), re.MULTILINE
    )
    module = importlib.import_module(prepare[0])
    module.main(module.parse_args([*shlex.split(prepare[1]), "--checkpoint", "random.pth", *SMALL]))
    module = importlib.import_module(prune[0])
    written = module.parse_args(shlex.split(prune[1]))
    folder = Path("checkpoints", "resnet18", settings.run_name(written))
    assert export[1] == f"{folder}/last.pth"
    result = module.main(module.parse_args([*shlex.split(prune[1]), *TINY]))
    module = importlib.import_module(export[0])
    found = one_run("checkpoints/resnet18", "gfbs_macs0.5_seed1")
    module.main(module.parse_args([str(found / "last.pth")]))

    network = torch.export.load(found / "last.pt2").module()
    about = json.loads((found / "last.pt2.json").read_text())
    assert about["classes"] == ["cat", "dog"] and about["macs"] == result["cost"]["macs"]["after"]
    assert 2 * about["macs"] <= result["cost"]["macs"]["before"]
    assert network(torch.randn(3, *about["input"]["shape"][1:])).shape == (3, 2)
    assert (found / "last.pt2").stat().st_size < (place / "random.pth").stat().st_size / 2


def test_the_head_is_trained_before_channels_are_scored(place, monkeypatch):
    scored = spy(monkeypatch, gfbs_cifar, "channel_saliency", copied_weights)
    result = run("--head_epochs", "3", "--steps", "2", "--step_epochs", "1")
    before = load_model("baseline.pth").state_dict()
    for name, tensor in scored[0].items():
        assert name.startswith("fc.") or torch.equal(tensor.cpu(), before[name]), name
    assert scored[0]["fc.weight"].shape == (2, 512) and len(scored) == 2
    assert scored[0]["fc.bias"].abs().max() > 0
    rounds = [(epoch["round"], epoch["lr"]) for epoch in result["history"]]
    assert [number for number, _ in rounds] == [1] * 3 + [2, 3, 4]
    assert {lr for number, lr in rounds if number == 1} == {0.1}
    folder = one_run("checkpoints/resnet18", "gfbs_macs0.6_steps2_seed1")
    log = (folder / "log.txt").read_text()
    assert "round 1/4: train the new classifier alone" in log and log.count("baseline: ") == 2
    assert log.index("classifier alone") < log.index("scoring on")
    assert "_headepochs3_" in folder.name
    trained = result["history"][2]["test"]["accuracy"]
    assert result["accuracy"]["baseline"] == trained


def test_a_run_with_a_new_head_continues_to_the_same_bits(place):
    """Killed within the round of the head, at its end, and after the cut."""
    every = ["--checkpoint_every", "1"]
    whole = run(*every, "--output", "whole")
    for batches in (1, 3, 1):  # of two batches an epoch: two epochs of the head, and one more
        die_after(batches, run, *every, "--output", "broken", "--resume")
    resumed = run(*every, "--output", "broken", "--resume")
    folders = [one_run(f"{name}/resnet18", "gfbs_macs0.6_seed1") for name in ("whole", "broken")]
    for name in ("pruned.pth", "last.pth", "model_best.pth"):
        assert same_weights(*(folder / name for folder in folders)), name
    assert resumed["accuracy"] == whole["accuracy"]


def test_what_is_frozen_does_not_change_and_can_be_trained_again():
    model = random_model("gateresnet20")
    before = copy.deepcopy(model.state_dict())
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    data = batches_of(load_data("synthetic", "unused", 8), 50, limit_train=3, limit_test=1)
    recipe = Recipe(epochs=2, lr=0.001, weight_decay=1e-2, milestones=(), gamma=1)
    with head_alone(model):
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            "linear.weight",
            "linear.bias",
        ]
        history = fit(model, data.train, data.test, recipe, CPU)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("linear."), name
    assert history[1].train.loss < history[0].train.loss
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    fit(model, data.train, data.test, recipe, CPU)
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


def test_the_usual_length_is_not_in_the_name_but_in_the_configuration():
    args = gfbs_imagenet.parse_args(["--data_dir", ".", "--new_head"])
    assert settings.run_name(args) == "gfbs_p0.4_seed1_newhead"
    assert settings.configuration(args)["head_epochs"] == 2
    args = gfbs_imagenet.parse_args(["--data_dir", "."])
    assert settings.configuration(args)["head_epochs"] is None
