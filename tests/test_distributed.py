"""Two ranks on the CPU (gloo) do what one process does."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import CPU, make_folder, random_model, same_weights
from processes import ROOT, Script, start_ranks
from torch import nn

import gfbs_cifar
import train
from utils.checkpoint import save_checkpoint
from utils.cli import settings
from utils.cli.parser import run_script
from utils.data.batches import split_batches
from utils.distributed import Runtime, select_runtime
from utils.errors import InputError
from utils.pruning import PruningPlan
from utils.run import launch
from utils.run.folder import RunCallback
from utils.surgery import prune

CIFAR = ["--net", "gateresnet20", "--dataset", "folder", "--data_dir", "images", "--bs", "12"]
CIFAR += ["--image_size", "16", "--checkpoint", "cifar.pth"]
CIFAR += ["--ema", "0.6", "--accumulate", "2", "--distill", "0.5", "--label_smoothing", "0.1"]
IMAGENET = ["--net", "resnet18", "--data_dir", "images", "--train_bs", "6", "--image_size", "32"]
IMAGENET += ["--workers", "1", "--checkpoint", "imagenet.pth"]
TWO = ["--processes", "2"]


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


def after_epoch(action):
    """Let every run of this process do something when an epoch has ended."""
    call = RunCallback.after_epoch

    def after(self, epoch, state):
        action(self.state.model, epoch.test)
        call(self, epoch, state)

    RunCallback.after_epoch = after


def tell(model, test):
    end = {"weights": model.state_dict(), "accuracy": test.accuracy}
    torch.save(end, f"rank{os.environ['RANK']}.pt")


def die(*_):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def on_two_ranks(*command, at_epochs=tell):
    """Exit code, stdout and stderr of both."""
    ranks = start_ranks(2, *command, "--device", "cpu", prepare=partial(after_epoch, at_epochs))
    return [rank.wait() for rank in ranks]


@pytest.mark.parametrize("script", ["gfbs_cifar", "gfbs_imagenet"])
def test_two_ranks_agree_with_each_other_and_with_one_process(place, script):
    """On CIFAR with every option of the training."""
    argv = CIFAR if script == "gfbs_cifar" else IMAGENET
    argv = [*argv, "--p", "0.4", "--epochs", "2", "--lr", "0.001"]
    alone = importlib.import_module(script)
    alone.main(alone.parse_args([*argv, "--output", "1", "--device", "cpu"]))
    (code, shown, wrong), (same_code, nothing, _) = on_two_ranks(
        f"{script}.py", *argv, "--output", "2"
    )
    assert code == same_code == 0, wrong
    assert shown.count("epoch 1/2") == 1 and "epoch" not in nothing  # one rank talks
    states = [torch.load(place / f"rank{rank}.pt") for rank in (0, 1)]
    assert states[0]["weights"].keys() == states[1]["weights"].keys()
    for name, tensor in states[0]["weights"].items():
        assert torch.equal(tensor, states[1]["weights"][name]), name
    assert states[0]["accuracy"] == states[1]["accuracy"]

    def made(output):
        run = next(Path(output).glob("*/gfbs_p0.4_*"))
        result = json.loads((run / "result.json").read_text())
        return result, (run / "plan.json").read_text(), run / "last.pth"

    (one, plan, _), (two, same_plan, last) = made("1"), made("2")
    assert plan == same_plan
    assert one["history"][0]["test"]["images"] == two["history"][0]["test"]["images"] == 9
    for when in ("baseline", "after_surgery"):
        assert one["accuracy"][when] == two["accuracy"][when]
    assert [epoch["train"]["images"] for epoch in two["history"]] == [12, 12]  # 2 are left over

    if script == "gfbs_cifar":  # the same without torchrun
        started = Script("gfbs_cifar.py", *argv, "--device", "cpu", "--output", "3", *TWO)
        code, shown, wrong = started.wait()
        assert code == 0 and "2 processes share every batch" in shown and not wrong
        three, same_plan, same_last = made("3")
        assert plan == same_plan and three["accuracy"] == two["accuracy"]
        assert same_weights(last, same_last)


def test_bad_input_ends_every_rank_with_its_line(place):
    (place / "checkpoints").write_text("a file where the folder should go")
    for code, _, wrong in on_two_ranks("gfbs_cifar.py", *CIFAR):  # only rank 0 finds this out
        assert code == 2 and wrong.count("cannot be written") == 1


def test_bad_input_ends_what_we_start_with_one_line_and_its_code(place):
    (place / "checkpoints").write_text("a file where the folder should go")
    code, shown, wrong = Script("gfbs_cifar.py", *CIFAR, "--device", "cpu", *TWO).wait()
    lines = shown.splitlines() + wrong.splitlines()
    lines = [line for line in lines if not line.startswith("[Gloo]")]  # as torch 2.8 prints
    assert code == 2 and len(lines) == 1
    assert "cannot be written" in lines[0] and lines[0] in wrong


def test_a_signal_that_comes_twice_stops_all_ranks_and_the_run_continues(place, capsys):
    argv = [*CIFAR, "--device", "cpu", "--epochs", "10", "--checkpoint_every", "1"]
    running = Script("gfbs_cifar.py", *argv, *TWO)
    while running.is_alive() and not list(place.glob("checkpoints/*/*/last.pth")):
        time.sleep(0.05)
    for _ in range(2):
        running.kill(signal.SIGINT)
        time.sleep(0.2)
    code, _, wrong = running.wait()
    assert code == 130, wrong
    assert wrong.count("stopping after this batch") == 1 and "Traceback" not in wrong
    (command,) = re.findall("; continue with: (.* --resume)\n", wrong)
    _, script, *argv = shlex.split(command)
    assert Path(script).samefile(ROOT / "gfbs_cifar.py") and argv[-3:] == [*TWO, "--resume"]
    gfbs_cifar.main(gfbs_cifar.parse_args(argv))  # one process, or this would take long
    assert "continues after epoch" in capsys.readouterr().out


def test_one_rank_says_why_all_end(tmp_path, monkeypatch):
    assert launch.is_root_cause(2) and launch.is_root_cause(2)  # a process by itself
    monkeypatch.setenv(launch.ROOT_CAUSE, str(tmp_path / "cause"))
    assert launch.is_root_cause(143) and not launch.is_root_cause(1)
    monkeypatch.setenv(launch.ROOT_CAUSE, str(tmp_path / "nowhere" / "cause"))  # no room for it
    assert launch.is_root_cause(1) and launch.is_root_cause(1)


@pytest.mark.parametrize(
    "argv, ranks, line",
    [
        (["--gpu", "0,2"], 2, "one process for each of 2 GPUs"),
        ([], 4, "one process for each of 4 GPUs"),
        (["--bs", "6"], 3, "3 GPUs; 4 are visible, but --bs 6 does not divide by more"),
        (["--bs", "12", "--accumulate", "2"], 3, "one process for each of 3 GPUs"),
        (["--gpu", "3"], 1, ""),
        (["--data_parallel"], 1, ""),
        (["--device", "cpu"], 1, ""),
        (["--device", "cpu", "--processes", "2"], 2, "2 processes share every batch"),
        (["--bs", "6", "--gpu", "0,1,2,3"], "--bs 6 does not divide by the 4 ranks", None),
        (["--gpu", "4"], "--gpu 4: torch sees 4 GPUs here", None),
        (["--processes", "2"], "--processes needs --device cpu, not cuda", None),
    ],
)
def test_every_gpu_gets_a_process(monkeypatch, argv, ranks, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setenv(launch.STARTED, "")
    started, alone = [], []
    monkeypatch.setattr(launch, "start", lambda *command: started.append(command) or 0)
    code = run_script(train.parse_args, alone.append)
    if line is None:
        assert code == 2 and not started and not alone
        with pytest.raises(InputError, match=ranks):
            settings.processes(train.parse_args())
        return
    assert code == 0 and len(started) == (ranks > 1) and len(alone) == (ranks == 1)
    assert all(command == (["train.py", *argv], ranks) for command in started)
    assert line in os.environ[launch.STARTED]
    monkeypatch.setenv("WORLD_SIZE", "2")  # in a rank, nothing is started again
    monkeypatch.setenv(launch.ROOT_CAUSE, "somewhere")
    assert settings.processes(train.parse_args()) == (1, "")


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(InputError, match="--bs 7 does not divide by the 2 ranks"):
        Runtime(CPU.device, world_size=2).share(7, "--bs")


def test_a_rank_that_dies_ends_the_other(place):
    ended = on_two_ranks("gfbs_cifar.py", *CIFAR, "--epochs", "50", at_epochs=die)
    (code, _, wrong), (killed, _, _) = ended
    assert (code, killed) == (1, -signal.SIGKILL)
    assert "another rank has died or left" in wrong and "[rank0]" not in wrong


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
