"""The scripts in experiments/: what they run, skip and survive."""

from __future__ import annotations

import copy
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch_pruning
from helpers import (
    COMMON,
    make_folder,
    random_batch,
    random_model,
    relative_difference,
    settle,
)

import gfbs_cifar
import gfbs_imagenet
from experiments import torch_pruning_taylor
from experiments.torch_pruning_taylor import dependency_graph, torch_pruning_saliency
from models.gate import folded_gates
from utils.checkpoint import save_checkpoint
from utils.cli import settings
from utils.cost import model_cost
from utils.selection import Goal, select
from utils.surgery import prune

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "experiments").glob("*.sh")
    if path.stem not in ("common", "tables")
)

# In the place of python: writes down its arguments, sleeps while "slow" is there, fails for "l1"
# while "failing" is, and leaves the result that vgg.sh reads.
STUB = f"""#!/bin/sh
[ "$1" != -c ] || exec {sys.executable} "$@"
IFS='\t' place=${{0%/*}}
printf '%s\\n' "$OMP_NUM_THREADS\t$*" >>"$place/log"
while [ -e "$place/slow" ]; do sleep 0.02; done
case "$*\t" in *"\tl1\t"*) [ ! -e "$place/failing" ] || {{ echo no such luck >&2; exit 1; }} ;; esac
case "$*\t" in gfbs_cifar.py*"\t--p\t0.7\t"*) ;; *) exit 0 ;; esac
until [ "$1" = --output ]; do shift; done
mkdir -p "$2/gatevgg16/gfbs_p0.7"
echo '{{"cost": {{"macs": {{"before": 300, "after": 100}}}}}}' >"$2/gatevgg16/gfbs_p0.7/result.json"
"""


@pytest.fixture
def stub(tmp_path):
    (tmp_path / "stub").write_text(STUB)
    (tmp_path / "stub").chmod(0o755)
    return tmp_path


def environment(place, **settings):
    usual = {"OUT": str(place / "the tables"), "PYTHON": str(place / "stub"), "GPUS": "0"}
    return {**os.environ, **usual, **settings}


def run_script(name, place, *argv, **settings):
    command, env = (
        ["sh", ROOT / "experiments" / f"{name}.sh", *argv],
        environment(place, **settings),
    )
    return subprocess.run(command, env=env, cwd=place, capture_output=True, text=True)


def logged(place):
    """Threads and arguments of every command that was started."""
    path = place / "log"
    return [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_are_accepted_and_have_folders_of_their_own(name, stub):
    (stub / "resnet56.th").touch()  # and no resnet20.th, which is trained
    done = run_script(name, stub, "--epochs", "2", JOBS="4", BASELINES=str(stub), DATA="my images")
    assert done.returncode == 0, done.stderr
    folders = set()
    for threads, *words in logged(stub):
        script, argv = (words[1], words[2:]) if words[0] == "-m" else (words[0][:-3], words[1:])
        args = importlib.import_module(script).parse_args(argv)
        if script == "prepare_torch_imagenet_models":
            continue
        assert threads == ("2" if name == "imagenet" else "1")
        assert args.epochs == 2 and args.resume
        run = settings.run_name(args) if hasattr(args, "criterion") else ""
        folder = args.output, settings.network_folder(args), run
        assert folder not in folders, argv
        folders.add(folder)
        if script != "gfbs_imagenet" and args.dataset != "cifar100":
            assert (args.dataset, args.data_dir) == ("folder", "my images")
            assert ("--mean" in argv) == ("--std" in argv) == (args.net == "gateresnet56")
    assert len(folders) > 3


def test_vgg_compares_at_the_macs_that_gfbs_reached(stub):
    assert run_script("vgg", stub).returncode == 0
    shares = [argv[argv.index("--macs") + 1] for argv in logged(stub) if "--macs" in argv]
    assert shares == ["0.3333"] * 2


def test_baselines_come_first_and_every_gpu_has_its_runs(stub):
    assert run_script("criteria", stub, JOBS="4", GPUS="2").returncode == 0
    scripts = [argv[1] for argv in logged(stub)]
    assert scripts == ["train.py"] * 2 + ["gfbs_cifar.py"] * 96
    assert {argv[-1] for argv in logged(stub) if argv[-2] == "--gpu"} == {"0", "1"}


def test_a_failing_run_stops_no_other_and_the_exit_code_tells(stub):
    (stub / "failing").touch()
    done = run_script("tables", stub, SEEDS="1", JOBS="4")
    assert done.returncode == 1
    failed = done.stderr.rpartition("FAILED in all:")[2]
    commands = [argv for argv in logged(stub) if "l1" in argv]
    assert len(commands) > 9 and failed.count("exit code 1: ") == len(commands)
    assert failed.count("--criterion l1") == len(commands) and "no such luck" in done.stderr
    assert any("vgg" in " ".join(argv) for argv in logged(stub))
    (stub / "failing").unlink()
    assert run_script("tables", stub, SEEDS="1", JOBS="4").returncode == 0


@pytest.mark.parametrize("name", ["tables", "finetune"])
@pytest.mark.parametrize("with_what", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_started_again(name, with_what, stub):
    """SIGTERM reaches all runs. After SIGKILL, those that are left are waited for."""
    (stub / "slow").touch()
    env, script = environment(stub, JOBS="2", SEEDS="1"), ROOT / "experiments" / f"{name}.sh"
    process = subprocess.Popen(["sh", script], env=env, stdout=subprocess.DEVNULL)
    wait_until(lambda: logged(stub))
    process.send_signal(with_what)
    assert process.wait() == (143 if with_what == signal.SIGTERM else -signal.SIGKILL)
    (stub / "log").unlink(missing_ok=True)
    patience = "5" if with_what == signal.SIGTERM else "0"
    lock = ["flock", "--timeout", patience, stub / "the tables" / "lock", "true"]
    assert subprocess.run(lock).returncode == (0 if with_what == signal.SIGTERM else 1)
    (stub / "slow").unlink()
    done = run_script("finetune", stub, JOBS="2", SEEDS="1")
    assert done.returncode == 0, done.stderr
    assert sum("--from_scratch" in argv for argv in logged(stub)) >= 1


def test_real_runs_are_skipped_when_finished_and_do_not_depend_on_the_jobs(tmp_path):
    state = random_model("gateresnet20").state_dict()
    torch.save({"state_dict": state}, tmp_path / "resnet20.th")
    tiny = ["--dataset", "synthetic", "--image_size", "16", "--epochs", "1", "--bs", "16"]
    tiny += ["--limit_train_batches", "1", "--limit_test_batches", "1", "--device", "cpu"]
    how = {"THREADS": "1", "PYTHON": sys.executable}
    how |= {"BASELINES": str(tmp_path), "OUT": str(tmp_path / "out")}
    done = run_script("full", tmp_path, *tiny, JOBS="2", SEEDS="1 2", **how)
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "out").glob("full/*/*seed1*/result.json")
    (command,) = (line for line in done.stdout.splitlines() if "--seed 1 " in line)
    _, _, script, *argv = command.split()
    assert script == "gfbs_cifar.py"
    alone = gfbs_cifar.main(gfbs_cifar.parse_args([*argv, "--output", str(tmp_path / "alone")]))
    result, written = json.loads(made.read_text()), made.stat().st_mtime_ns
    for part in ("criterion", "method", "accuracy", "cost", "channels"):
        assert result[part] == alone[part]
    assert run_script("full", tmp_path, *tiny, SEEDS="1", **how).returncode == 0
    assert made.stat().st_mtime_ns == written


@pytest.mark.parametrize("net", ["gateresnet20", "gatevgg11"])
def test_torch_pruning_cuts_the_same_network_by_its_own_importance(net):
    """Our surgery of the plan is Torch-Pruning's own, bit by bit; the MACs are those asked for."""
    model, (images, labels) = random_model(net), random_batch()
    settle(model, images)
    before = copy.deepcopy(model.state_dict())
    saliency = torch_pruning_saliency(model, images, labels)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    whole = model_cost(model, 32).macs
    plan = select(model, saliency, Goal("macs", 0.5), 32, {"macs": whole})

    theirs = copy.deepcopy(model).eval()
    graph = dependency_graph(theirs, images)
    for group in theirs.channel_groups():
        conv = theirs.get_submodule(group.convs[0])
        gone = sorted({*range(conv.out_channels)} - {*plan.keep[group.name]})
        if gone:
            out = torch_pruning.prune_conv_out_channels
            graph.get_pruning_group(conv, out, gone).prune()
    ours = prune(model, plan).eval()
    assert 0.98 * whole / 2 <= model_cost(ours, 32).macs <= whole / 2
    others = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert name.endswith(".gate") or torch.equal(tensor, others[name]), name
    with torch.no_grad(), folded_gates(theirs):
        assert relative_difference(ours(images), theirs(images)) == 0


def test_the_script_prunes_by_torch_prunings_importance(trained, monkeypatch):
    monkeypatch.setattr(gfbs_cifar, "channel_saliency", gfbs_cifar.channel_saliency)  # put back
    argv = [*COMMON, "--epochs", "0", "--bs", "8", "--macs", "0.6"]
    made = torch_pruning_taylor.main(torch_pruning_taylor.parse_args(argv))
    macs = made["cost"]["macs"]
    assert made["criterion"] == "torch-pruning taylor" and macs["after"] <= 0.6 * macs["before"]


# On SLURM, with its variables set by hand and stand-ins for its commands

SBATCH = sorted((ROOT / "experiments" / "slurm").glob("*.sbatch"))
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


@pytest.mark.parametrize("script", SBATCH, ids=lambda path: path.name)
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
    script = ["bash", "experiments/slurm/one_node.sbatch", *TINY]
    script += ["--epochs", "6", "--checkpoint_every", "1"]
    two = ["--processes", "2"]
    job = subprocess.Popen([*script, *two], stderr=subprocess.PIPE, text=True)
    while job.poll() is None and not list(cluster.glob("checkpoints/*/*/last.pth")):
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    _, shown = job.communicate(timeout=200)
    assert job.returncode == 143 and "continue with" in shown, shown
    assert (cluster / "calls").read_text() == "requeue 17\n"
    again = subprocess.run(script, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0 and "continues after epoch" in again.stdout, again.stderr
    (result,) = cluster.glob("checkpoints/*/*/result.json")
    assert len(json.loads(result.read_text())["history"]) == 6
    assert (cluster / "calls").read_text() == "requeue 17\n"


def test_torchrun_starts_the_ranks_of_a_node(cluster):
    script = ["bash", "experiments/slurm/four_nodes.sbatch", *TINY, "--epochs", "1"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "2 ranks, each on CPU" in done.stdout, done.stderr
    assert shlex.split((cluster / "calls").read_text()) == ["show", "hostnames", "localhost"]
