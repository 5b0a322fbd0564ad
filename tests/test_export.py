"""Exported networks: the checkpoint's logits, without any code of this project."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from helpers import random_model, relative_difference
from torch import nn

from models.gate import deployable
from tools import export
from utils.checkpoint import save_checkpoint
from utils.cost import model_cost
from utils.errors import InputError, RunError
from utils.pruning import PruningPlan
from utils.surgery import prune

META = {"image_size": 32, "classes": [str(i) for i in range(10)]}
META["normalisation"] = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
FAMILIES = ["gatevgg11", "gateresnet20", "resnet18", "resnet50", "gatemobilenetv2"]
DENSE = ["gatedensenet40", "gatedensenet100_bc"]  # most of their norms follow a concatenation


def half(model):
    """Every other channel of every group, and one more of the first."""
    return PruningPlan({name: [0, *range(1, w, 2)] for name, w in model.group_widths().items()})


def save(path, net):
    model = random_model(net)
    save_checkpoint(path, prune(model, half(model)), **META)
    return model.eval()


def run_export(*argv):
    return export.main(export.parse_args([str(arg) for arg in argv]))


def images(count):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("net", FAMILIES + DENSE)
def test_the_deployed_network_is_the_same_function(net):
    model = random_model(net).eval()
    for plan in (PruningPlan({}), half(model)):
        network = deployable(prune(model, plan))
        assert relative_difference(model(images(3)), network(images(3))) < 1e-5
        kinds = {type(module).__name__ for module in network.modules()}
        assert "Gate" not in kinds and ("BatchNorm2d" not in kinds or net in DENSE)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_masked_channels_stay_masked():
    model = random_model("gateresnet20").eval()
    half(model).apply_mask(model)
    assert relative_difference(model(images(2)), deployable(model)(images(2))) < 1e-5


def test_pt2_loads_with_torch_alone(tmp_path):
    nets = ["gatemobilenetv2", "gatedensenet40"]
    models = [save(tmp_path / f"{net}.pth", net) for net in nets]
    for net in nets:
        said = run_export(tmp_path / f"{net}.pth")
        assert said == json.loads((tmp_path / f"{net}.pt2.json").read_text())
    torch.save(images(6), tmp_path / "images.pt")
    alone = (
        f"import sys, torch; parts = torch.load('images.pt').split(4); nets = {nets};"
        "networks = [torch.export.load(f'{net}.pt2').module() for net in nets];"
        "logits = [torch.cat([network(part) for part in parts]) for network in networks];"
        "assert not {'models', 'utils'} & set(sys.modules);"
        "torch.save(logits, 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", alone], cwd=tmp_path, check=True)
    for model, logits in zip(models, torch.load(tmp_path / "logits.pt"), strict=True):
        assert relative_difference(model(images(6)), logits) < 1e-5


def test_onnx_runs_in_onnxruntime(tmp_path):
    import onnxruntime

    model = save(tmp_path / "net.pth", "gateresnet20")
    run_export(tmp_path / "net.pth", "--format", "onnx", "--output", tmp_path / "deep" / "it.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "deep" / "it.onnx"))
    for count in (1, 6):
        (logits,) = session.run(["logits"], {"images": images(count).numpy()})
        assert relative_difference(model(images(count)), torch.from_numpy(logits)) < 1e-5


def test_the_description_is_that_of_the_checkpoint(tmp_path):
    model = save(tmp_path / "net.pth", "gateresnet20")
    said = run_export(tmp_path / "net.pth", "--image_size", "16")
    cost = model_cost(model, 16)
    assert (said["macs"], said["params"]) == (cost.macs, cost.params)
    assert said["classes"] == META["classes"]
    assert said["input"]["shape"] == ["batch", 3, 16, 16]
    assert said["input"]["normalisation"] == META["normalisation"]
    typed = ["--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,0.6"]
    other = run_export(tmp_path / "net.pth", *typed, "--output", tmp_path / "other.pt2")
    assert other["input"]["normalisation"] == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    digest = hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()
    assert said["source"] == {"file": "net.pth", "sha256": digest}


def test_an_export_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    save(tmp_path / "net.pth", "gateresnet20")

    def wrong(model):
        network = deployable(model)
        next(network.parameters()).data *= 1.01
        return network

    monkeypatch.setattr(export, "deployable", wrong)
    with pytest.raises(RunError, match="logits differ by .* nothing is written"):
        run_export(tmp_path / "net.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


def test_logits_that_say_nothing_are_not_taken_for_equal():
    silent = random_model("gateresnet20")
    for parameter in silent.linear.parameters():
        nn.init.zeros_(parameter)
    assert export.largest_difference(silent, deployable(silent), 32) == float("inf")


def test_bad_input(tmp_path, monkeypatch):
    save(tmp_path / "net.pth", "gateresnet20")
    (tmp_path / "net.pt2").write_text("somebody's")
    with pytest.raises(InputError, match="net.pt2 is there already; --overwrite"):
        run_export(tmp_path / "net.pth")
    assert (tmp_path / "net.pt2").read_text() == "somebody's"
    run_export(tmp_path / "net.pth", "--overwrite")
    with pytest.raises(InputError, match="is the checkpoint itself"):
        run_export(tmp_path / "net.pth", "--output", tmp_path / "net.pth", "--overwrite")
    with pytest.raises(InputError, match="no such checkpoint"):
        run_export(tmp_path / "other.pth")
    save_checkpoint(tmp_path / "silent.pth", random_model("gateresnet20"))
    with pytest.raises(SystemExit):
        run_export(tmp_path / "net.pth", "--mean", "0.1,0.2,0.3")
    with pytest.raises(InputError, match="give --image_size"):
        run_export(tmp_path / "silent.pth")
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(InputError, match="needs no_such_package: pip install -r requirements-exp"):
        run_export(tmp_path / "net.pth", "--format", "onnx")
