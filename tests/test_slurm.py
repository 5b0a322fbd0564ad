"""The scripts for SLURM, with its variables set by hand and stand-ins for its commands."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import make_folder, random_model

import gfbs_cifar
import gfbs_imagenet
from utils.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "experiments" / "slurm").glob("*.sbatch"))
TINY = ["--net", "resnet18", "--image_size", "32", "--train_bs", "6", "--workers", "0"]
TINY += ["--device", "cpu", "--checkpoint", "resnet18.pth"]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A job's environment: SLURM's variables, the repository, and commands that tell of calls."""
    make_folder(tmp_path / "images", parts=("train", "val"), images=6, size=(40, 40))
    save_checkpoint(tmp_path / "resnet18.pth", random_model("resnet18", 2))
    for file in ROOT.iterdir():
        if file.suffix == ".py" or file.name in ("models", "utils", "experiments"):
            (tmp_path / file.name).symlink_to(file)
    command(tmp_path, "python", f'exec {sys.executable} "$@"')
    command(tmp_path, "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    command(tmp_path, "srun", 'exec "$@"')
    command(tmp_path, "scontrol", f'[ $1 != show ] || echo localhost; echo "$@" >>{tmp_path}/calls')
    variables = {"JOB_ID": 17, "JOB_NODELIST": "localhost", "NNODES": 1, "GPUS_ON_NODE": 2}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("DATA", "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(place, name, line):
    (place / "bin").mkdir(exist_ok=True)
    (place / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
    (place / "bin" / name).chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_command_is_accepted_and_resumes(cluster, monkeypatch, script):
    subprocess.run(["bash", "-n", script], check=True)
    for name in ("python", "torchrun"):
        command(cluster, name, f'printf "%s\\n" {name} "$@"')
    seen = set()
    for task in range(12 if script.name == "array.sbatch" else 1):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        done = subprocess.run(["bash", script, "--epochs", "3"], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr
        words = done.stdout.splitlines()
        words = words[words.index("--") :] if words[0] == "torchrun" else words
        name, *argv = words[1:]
        args = {"gfbs_cifar.py": gfbs_cifar, "gfbs_imagenet.py": gfbs_imagenet}[name].parse_args(
            argv
        )
        assert args.resume and args.epochs == 3
        seen.add((args.p, args.seed))
    assert len(seen) == task + 1


def test_a_job_saves_before_its_time_limit_and_goes_back_into_the_queue(cluster):
    script = ["bash", "experiments/slurm/one_node.sbatch", *TINY, "--processes", "2"]
    script += ["--epochs", "12", "--checkpoint_every", "1"]
    job = subprocess.Popen(script, stderr=subprocess.PIPE, text=True)
    while job.poll() is None and not list(cluster.glob("checkpoints/*/*/last.pth")):
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    _, shown = job.communicate(timeout=200)
    assert job.returncode == 143 and "continue with" in shown, shown
    assert (cluster / "calls").read_text() == "requeue 17\n"
    again = subprocess.run(script, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0 and "continues after epoch" in again.stdout, again.stderr
    (result,) = cluster.glob("checkpoints/*/*/result.json")
    assert len(json.loads(result.read_text())["history"]) == 12
    assert (cluster / "calls").read_text() == "requeue 17\n"


def test_torchrun_starts_the_ranks_of_a_node(cluster):
    script = ["bash", "experiments/slurm/four_nodes.sbatch", *TINY, "--epochs", "1"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "2 ranks, each on CPU" in done.stdout, done.stderr
    assert shlex.split((cluster / "calls").read_text()) == ["show", "hostnames", "localhost"]
