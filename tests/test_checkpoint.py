"""Checkpoints rebuild their network; everyone else's load too; nothing unsafe does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import random_batch, random_model, random_plan, refusal

from models import NETWORKS
from utils.checkpoint import load_checkpoint, load_model, save_checkpoint
from utils.errors import InputError
from utils.surgery import prune

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("net", ["gatevgg11", "gateresnet20", "gatemobilenetv2", "gatedensenet40"])
def test_a_network_pruned_twice_rebuilds_itself(tmp_path, net):
    model = random_model(net)
    for seed in (1, 2):
        prune(model, random_plan(model, seed, 0.4))
    save_checkpoint(tmp_path / "pruned.pth", model)
    loaded = load_model(tmp_path / "pruned.pth")
    assert loaded.kept == model.kept
    images, _ = random_batch(2, 32 if net == "gatevgg11" else 16)
    for mode in (False, True):
        assert torch.equal(loaded.train(mode)(images), model.train(mode)(images))


def test_a_fresh_process_gives_the_same_logits(tmp_path):
    whole, pruned = random_model("gatevgg11", 7).eval(), random_model("gateresnet20", 7).eval()
    for seed in (1, 2):
        prune(pruned, random_plan(pruned, seed))
    images, _ = random_batch(3)
    save_checkpoint(tmp_path / "whole.pth", whole, accuracy=1.5)
    save_checkpoint(tmp_path / "pruned.pth", pruned)
    torch.save(images, tmp_path / "images.pt")
    program = (
        "import sys, torch; from utils.checkpoint import load_model; folder = sys.argv[1];"
        "models = [load_model(f'{folder}/{name}.pth').eval() for name in ('whole', 'pruned')];"
        "images = torch.load(folder + '/images.pt');"
        "torch.save([model(images) for model in models], folder + '/logits.pt')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True)
    for model, logits in zip((whole, pruned), torch.load(tmp_path / "logits.pt"), strict=True):
        assert torch.equal(logits, model(images))


def test_a_loaded_network_is_whole(tmp_path):
    """Metadata, precision and the plan survive, and the caller's random state is left alone."""
    model = prune(
        random_model("gateresnet20").double(), random_plan(random_model("gateresnet20"), 1)
    )
    meta = {"classes": ["x", "y"], "normalisation": {"mean": [0.5] * 3, "std": (0.1, 1, 2)}}
    save_checkpoint(tmp_path / "a.pth", model, **meta)
    state = torch.get_rng_state()
    loaded = load_checkpoint(tmp_path / "a.pth")
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.meta == meta
    assert loaded.model.kept == model.kept and loaded.model.net == "gateresnet20"
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
        assert loaded.model.state_dict()[name].dtype == tensor.dtype, name


def test_the_file_shrinks_with_the_network(tmp_path):
    model = random_model("gatevgg11")
    save_checkpoint(tmp_path / "full.pth", model)
    save_checkpoint(tmp_path / "pruned.pth", prune(model, random_plan(model, 0, share=0.5)))
    parameters = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert os.path.getsize(tmp_path / "pruned.pth") < 1.02 * parameters + 40_000
    assert os.path.getsize(tmp_path / "pruned.pth") < 0.3 * os.path.getsize(tmp_path / "full.pth")


def wrapped(state, wrapper, prefix, gates):
    state = {f"{prefix}{n}": tensor for n, tensor in state.items() if gates or ".gate" not in n}
    if wrapper is None:
        return state
    return {wrapper: state, "acc": 12.5, "epoch": 3, "optimizer": {"state": {}}, "scheduler": {}}


@pytest.mark.parametrize("wrapper", [None, "net", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("gates", [True, False])
def test_files_of_others_load(tmp_path, wrapper, prefix, gates):
    model = random_model("gateresnet20", num_classes=13)
    if gates:
        model.gate1.gate.data[0, 3] = 0  # a masked channel stays masked
    torch.save(wrapped(model.state_dict(), wrapper, prefix, gates), tmp_path / "other.pth")
    checkpoint = load_checkpoint(tmp_path / "other.pth")
    assert checkpoint.meta == ({"accuracy": 12.5, "epoch": 3} if wrapper else {})
    loaded = checkpoint.model
    assert (loaded.net, loaded.num_classes) == ("gateresnet20", 13)
    images, _ = random_batch(2)
    assert torch.equal(loaded.eval()(images), model.eval()(images))


@pytest.mark.parametrize("net", NETWORKS)
def test_every_network_is_recognised_by_its_keys(tmp_path, net):
    state = random_model(net, num_classes=3).state_dict()
    torch.save(state, tmp_path / "plain.pth")
    loaded = load_model(tmp_path / "plain.pth")
    assert (loaded.net, loaded.num_classes) == (net, 3)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_pruned_file_without_its_plan_is_refused_with_that_reason(tmp_path):
    model = random_model("gateresnet20")
    torch.save({"net": prune(model, random_plan(model, 1)).state_dict()}, tmp_path / "p.pth")
    with pytest.raises(InputError, match=r"p\.pth: .*gateresnet20.*without its plan"):
        load_model(tmp_path / "p.pth")


def test_strange_state_dicts_are_explained(tmp_path):
    state = random_model("gateresnet20").state_dict()
    old = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    torch.save(old, tmp_path / "old.pth")  # from before torch counted batches
    assert load_model(tmp_path / "old.pth").net == "gateresnet20"
    torch.save({**state, "total_ops": torch.ones(1)}, tmp_path / "odd.pth")
    with pytest.raises(InputError, match="gateresnet20 comes nearest but for total_ops"):
        load_model(tmp_path / "odd.pth")
    strange = [{}, {1: torch.ones(1)}, {"format": "gfbs/9"}, torch.ones(3), {"a": torch.ones(2)}]
    for i, content in enumerate(strange):
        torch.save(content, tmp_path / f"{i}.pth")
        assert f"{i}.pth: " in refusal(load_model, tmp_path / f"{i}.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    assert "text.pth: " in refusal(load_model, tmp_path / "text.pth")


def test_half_precision_files_load(tmp_path):
    model = random_model("gateresnet20").half()
    torch.save(model.state_dict(), tmp_path / "half.pth")
    loaded = load_model(tmp_path / "half.pth")
    assert loaded.linear.weight.dtype == torch.float16
    assert torch.equal(loaded.linear.weight, model.linear.weight)


def test_another_network_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pth", random_model("gateresnet20"))
    torch.save(random_model("gateresnet20").state_dict(), tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        with pytest.raises(InputError, match=f"{name}: holds gateresnet20, not gatevgg16"):
            load_checkpoint(tmp_path / name, net="gatevgg16")
    save_checkpoint(tmp_path / "c.pth", random_model("gateresnet56", num_classes=100))
    assert load_checkpoint(tmp_path / "c.pth", net="gateresnet56_c100").model.num_classes == 100
