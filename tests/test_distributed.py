"""Two ranks on the CPU (gloo) do what one process does."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CPU, make_folder, random_model
from torch import nn

from utils.checkpoint import save_checkpoint
from utils.data.batches import split_batches
from utils.distributed import Runtime, select_runtime
from utils.errors import InputError
from utils.pruning import PruningPlan
from utils.surgery import prune

TESTS = Path(__file__).parent
CIFAR = ["--net", "gateresnet20", "--dataset", "folder", "--bs", "6", "--image_size", "16"]
IMAGENET = ["--net", "resnet18", "--train_bs", "6", "--image_size", "32", "--workers", "1"]
CIFAR_LIMIT, IMAGENET_LIMIT = "--limit_test_batches", "--limit_val_batches"


def launch(ranks, script, folder, *argv, **environment):
    """Run a script of ours on so many ranks; returns the finished process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    torchrun += ["--standalone", "--"]
    command = [*torchrun, TESTS / "rank.py", script, folder, *argv, "--device", "cpu"]
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,  # a hang, not a measurement
    )


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two classes; 14 training images and 9 for evaluation, which two does not divide."""
    make_folder(tmp_path / "images", parts=("train",), images=7, size=(40, 40))
    make_folder(tmp_path / "images", parts=("val",), images=5, size=(40, 40))
    (tmp_path / "images" / "val" / "cat" / "0.png").unlink()
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "cifar.pth", random_model("gateresnet20", 2))
    save_checkpoint(tmp_path / "imagenet.pth", random_model("resnet18", 2))
    return tmp_path


@pytest.mark.parametrize("script", ["gfbs_cifar", "gfbs_imagenet"])
def test_two_ranks_agree_with_each_other_and_with_one_process(place, script):
    argv = CIFAR if script == "gfbs_cifar" else IMAGENET
    checkpoint = "cifar.pth" if script == "gfbs_cifar" else "imagenet.pth"
    argv = [*argv, "--data_dir", "images", "--checkpoint", checkpoint, "--p", "0.4"]
    argv += ["--epochs", "2", "--lr", "0.001"]
    results = {}
    alone = importlib.import_module(script)
    alone.main(alone.parse_args([*argv, "--output", "1", "--device", "cpu"]))
    done = launch(2, script, place, *argv, "--output", "2")
    assert done.returncode == 0, done.stderr
    for ranks in (1, 2):
        (run,) = (place / str(ranks)).glob("*/gfbs_p0.4_seed1*")
        results[ranks] = (
            json.loads((run / "result.json").read_text()),
            (run / "plan.json").read_text(),
        )
    states = [torch.load(place / f"rank{rank}.pt") for rank in (0, 1)]
    assert states[0]["weights"].keys() == states[1]["weights"].keys()
    for name, tensor in states[0]["weights"].items():
        assert torch.equal(tensor, states[1]["weights"][name]), name
    assert states[0]["accuracy"] == states[1]["accuracy"]

    (one, plan), (two, same_plan) = results[1], results[2]
    assert plan == same_plan
    assert one["history"][0]["test"]["images"] == two["history"][0]["test"]["images"] == 9
    for when in ("baseline", "after_surgery"):
        assert one["accuracy"][when] == two["accuracy"][when]
    assert [epoch["train"]["images"] for epoch in two["history"]] == [12, 12]  # 14 = 6 + 6 + 2
    assert done.stdout.count("epoch 1/2") == 1  # one rank talks


def test_ranks_agree_with_every_option_of_the_training(place):
    argv = [*CIFAR, "--bs", "8", "--data_dir", "images", "--checkpoint", "cifar.pth", "--p", "0.4"]
    argv += ["--epochs", "2", "--ema", "0.6", "--accumulate", "2", "--distill", "0.5"]
    done = launch(2, "gfbs_cifar", place, *argv, "--label_smoothing", "0.1")
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(place / f"rank{rank}.pt") for rank in (0, 1))
    for name, tensor in one["weights"].items():
        assert torch.equal(tensor, two["weights"][name]), name
    assert one["accuracy"] == two["accuracy"]


def test_bad_input_ends_every_rank_with_its_line(place):
    argv = [*CIFAR, "--data_dir", "images", "--checkpoint", "cifar.pth"]
    (place / "checkpoints").write_text("a file where the folder should go")
    blocked = launch(2, "gfbs_cifar", place, *argv)  # only rank 0 finds this out
    assert blocked.returncode != 0
    assert blocked.stderr.count("cannot be written") == 2


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(InputError, match="--bs 7 does not divide by the 2 ranks"):
        Runtime(CPU.device, world_size=2).share(7, "--bs")


def test_a_rank_that_dies_ends_the_job(place):
    argv = [*CIFAR, "--data_dir", "images", "--checkpoint", "cifar.pth", "--epochs", "50"]
    done = launch(2, "gfbs_cifar", place, *argv, GFBS_TEST_DIES="1")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "exitcode: -9" in done.stderr
    assert "another rank has died or left" in done.stderr and "[rank0]" not in done.stderr


def test_shares_make_up_the_batches_of_one_process():
    order = torch.randperm(103)
    common = {"training": True, "limit": None}
    whole = split_batches(order, 20, **common, rank=0, ranks=1)
    shares = [split_batches(order, 20, **common, rank=rank, ranks=4) for rank in range(4)]
    assert [len(batch) for batch in whole] == [20, 20, 20, 20, 20, 3]
    for parts, batch in zip(zip(*shares, strict=True), whole, strict=False):
        assert {len(part) for part in parts} == {5}
        assert sorted(torch.cat(parts).tolist()) == sorted(batch.tolist())
    evaluated = [
        split_batches(order, 20, training=False, limit=None, rank=r, ranks=4) for r in range(4)
    ]
    together = torch.cat([part for parts in evaluated for part in parts])
    assert sorted(together.tolist()) == list(range(103))


def test_a_rank_takes_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    started = []
    monkeypatch.setattr(torch.distributed, "init_process_group", started.append)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    runtime = select_runtime("auto", (2, 3), sync_bn=True)
    assert runtime == Runtime(torch.device("cuda", 3), (3,), 5, 8, sync_bn=True)
    assert started == ["cpu:gloo,cuda:nccl"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match=r"more ranks than there are GPUs \(2\)"):
        select_runtime("auto", (2, 3))
    with pytest.raises(InputError, match="--sync_bn needs GPUs"):
        select_runtime("cpu", sync_bn=True)


def test_norms_that_ranks_share_are_scored_by_one_alone():
    """What --sync_bn did to the norms is undone, to the bit, before a rank runs the model alone."""
    model = random_model("gateresnet20")
    before = copy.deepcopy(model.state_dict())
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    Runtime(torch.device("cpu")).undo_sync_bn(model)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    Runtime(torch.device("cpu"), sync_bn=True).undo_sync_bn(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {type(norm) for norm in norms} == {nn.BatchNorm2d} and len(norms) == 19
    assert all(norm.weight.requires_grad and norm.training for norm in norms)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    prune(model, PruningPlan({"gate1": [0, 2]}))
    model(torch.randn(2, 3, 16, 16)).sum().backward()
