"""Networks of torchvision, and of users, by name: built, saved, pruned by the scripts, exported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import networks
import pytest
import torch
import torchvision
from helpers import (
    make_folder,
    one_run,
    random_batch,
    random_plan,
    relative_difference,
    run_gfbs,
    run_train,
)

import gfbs_imagenet
import prepare_torch_imagenet_models
import tools.networks
from models import build_model, channel_groups, group_widths, replace_head, structure
from tools import export
from utils.checkpoint import load_checkpoint, load_model, save_checkpoint
from utils.errors import InputError
from utils.surgery import prune

MINE = "networks:mine"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images", ("train", "test", "val"), images=8)


def test_our_names_come_first_then_torchvision_then_factories():
    assert build_model("resnet18").channel_groups()[0].gates
    theirs = build_model("mnasnet0_5", 3)
    assert type(theirs).__module__.startswith("torchvision") and structure(theirs).num_classes == 3
    assert structure(theirs).head == "classifier.1"
    mine = build_model(MINE, 4, 16)
    assert type(mine) is networks.Branches and structure(mine).net == MINE


@pytest.mark.parametrize(
    "net, said",
    [
        ("mobilenet_v4", "did you mean mobilenet_v"),
        ("vgg11", "no BatchNorm"),
        ("nowhere:mine", "No module named 'nowhere'; is it on PYTHONPATH"),
        ("networks:nothing", "no attribute 'nothing'"),
    ],
)
def test_what_cannot_be_built_is_one_line(net, said):
    with pytest.raises(ValueError, match=said):
        build_model(net)


@pytest.mark.parametrize("net", ["mnasnet0_5", MINE])
def test_a_checkpoint_rebuilds_the_pruned_network_without_a_trace(tmp_path, net, monkeypatch):
    model = build_model(net, 4, 64).eval()
    for seed in (1, 2):  # pruned, saved, loaded and pruned again
        prune(model, random_plan(model, seed, 0.7))
        save_checkpoint(tmp_path / "a.pth", model)
        with monkeypatch.context() as patch:
            patch.setattr("models.trace.read_groups", None)
            loaded = load_model(tmp_path / "a.pth", net=net).eval()
        images, _ = random_batch(2, 64)
        assert torch.equal(model(images), loaded(images))
        assert vars(structure(loaded)).keys() == vars(structure(model)).keys()
        assert structure(loaded).kept == structure(model).kept
        for ours, theirs in zip(channel_groups(model), channel_groups(loaded), strict=True):
            assert ours.as_plain().keys() == theirs.as_plain().keys()
            assert torch.equal(ours.as_plain()["places"], theirs.as_plain()["places"])
        model = loaded
    weights = torchvision.models.get_model("mnasnet0_5", num_classes=3).state_dict()
    torch.save(weights, tmp_path / "theirs.pth")
    assert structure(load_model(tmp_path / "theirs.pth", net="mnasnet0_5")).num_classes == 3


def test_no_file_decides_which_code_is_imported(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pth", build_model(MINE, 4, 16))
    monkeypatch.delitem(sys.modules, "networks")
    with pytest.raises(InputError, match="holds networks:mine, code that no file may choose; name"):
        load_model(tmp_path / "a.pth")
    assert "networks" not in sys.modules


def test_groups_that_do_not_fit_are_damage(tmp_path):
    model = build_model(MINE, 4, 16)
    group = structure(model).groups[0]
    group.outputs["nothing"] = torch.zeros(group.width, 1, dtype=torch.long)
    structure(model).kept = {group.name: [0]}
    save_checkpoint(tmp_path / "a.pth", model)
    with pytest.raises(InputError, match="damaged, or of another version of networks:mine"):
        load_model(tmp_path / "a.pth", net=MINE)


def test_the_scripts_prune_a_network_of_the_user_every_way(place, capsys):
    run_train("--net", MINE, "--output", "out", "--epochs", "1")
    for way in ("--macs 0.6", "--smooth", "--steps 2", "--from_scratch", ""):
        argv = way.split() if "macs" in way else [*way.split(), "--p", "0.4"]
        result = run_gfbs("--net", MINE, "--output", "out", *argv)
        assert result["cost"]["macs"]["after"] < result["cost"]["macs"]["before"]
        last = load_checkpoint(max(Path("out").rglob("last.pth"), key=os.path.getmtime), MINE)
        widths = {name: width["after"] for name, width in result["channels"].items()}
        assert group_widths(last.model) == widths
    assert "code that no file may choose" not in capsys.readouterr().out
    file = one_run("out/networks-mine_folder", "gfbs_p0.4_seed1") / "last.pth"
    for form in ("pt2", "onnx"):
        export.main(export.parse_args([str(file), "--net", MINE, "--format", form]))
    images, _ = random_batch(3, 16)
    exported = torch.export.load(file.with_suffix(".pt2")).module()
    with torch.no_grad():
        assert relative_difference(last.model.eval()(images), exported(images)) < 1e-5


def test_imagenet_scripts_take_a_factory_and_what_its_file_says(place, monkeypatch):
    argv = ["--net", MINE, "--output", "out", "--image_size", "16", "--mean", "0.5,0.5,0.5"]
    argv += ["--std", "0.2,0.2,0.2"]
    prepare_torch_imagenet_models.main(prepare_torch_imagenet_models.parse_args(argv))
    made = load_checkpoint("out/networks-mine/model_best.pth", MINE)
    assert made.meta["image_size"] == 16 and made.meta["source"] == MINE
    argv = ["--net", MINE, "--output", "out", "--data_dir", "images", "--p", "0.4", "--new_head"]
    argv += ["--train_bs", "4", "--epochs", "1", "--workers", "0", "--head_epochs", "1"]
    result = gfbs_imagenet.main(gfbs_imagenet.parse_args(argv))
    assert result["config"]["image_size"] == 16 and result["config"]["new_head"]
    assert len(result["history"]) >= 1


def test_the_preset_of_weights_goes_into_the_checkpoint(tmp_path):
    weights = torchvision.models.get_model_weights("mnasnet0_5")["IMAGENET1K_V1"]
    crops, normalisation = prepare_torch_imagenet_models.preset(weights, None)
    assert (crops.size, crops.resize, crops.interpolation) == (224, 256, "bilinear")
    assert normalisation.mean == (0.485, 0.456, 0.406)
    weights = torchvision.models.get_model_weights("efficientnet_b0")["IMAGENET1K_V1"]
    crops, _ = prepare_torch_imagenet_models.preset(weights, None)
    assert crops.interpolation == "bicubic"
    images = torch.randint(255, (3, 300, 280), dtype=torch.uint8)
    assert not torch.equal(crops._resize(images, [100]), type(crops)()._resize(images, [100]))


def test_the_tool_that_tries_networks_tells_exact_ones_from_others(monkeypatch, tmp_path):
    free, macs, params, difference, exported = tools.networks.cut_in_half("mnasnet0_5")
    assert difference.startswith("exact, ") and 0 < int(free[:-2]) <= 100 and not exported
    assert int(macs[:-2]) < 90 and int(params[:-2]) < 90
    monkeypatch.setattr("tools.networks.prune", lambda model, plan: model.apply(_break))
    assert tools.networks.cut_in_half("mnasnet0_5")[3].startswith("differs, ")


def _break(module):
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.ones_(module.bias)


def test_a_new_head_replaces_the_layer_that_makes_the_output():
    model = build_model("mnasnet0_5", 3)
    replace_head(model, 7)
    assert model.classifier[1].out_features == structure(model).num_classes == 7
