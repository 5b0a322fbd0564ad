"""Kill a run of train, prune and --smooth at random moments, resume it each time, and compare.

    python tests/kill.py --kills 20
    python tests/kill.py --kills 5 --ranks 2

The pruned network must end with the bits of an uninterrupted run, and at no moment may there be a
checkpoint that does not load. Every run is a fork of this process, which has imported what the
scripts import and has computed nothing; ranks find each other as they do under torchrun.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # OpenMP's threads would not outlive the fork
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import gfbs_cifar
import train
from utils.checkpoint import load_model
from utils.cli.parser import run_script

COMMON = "--net gateresnet20 --dataset synthetic --image_size 8 --device cpu --bs 64"
TRAIN = f"{COMMON} --epochs 2 --limit_train_batches 12 --limit_test_batches 1"
PRUNE = f"{TRAIN} --p 0.5 --smooth --smooth_epochs 1 --final_epochs 2"
PRUNE += " --ema 0.9 --distill 0.5 --accumulate 2"  # what else last.pth has to hold
PIPELINE = ((train, TRAIN), (gfbs_cifar, PRUNE))
PATIENCE = 100  # seconds until a rank counts as hanging


def start(script: ModuleType, flags: str, output: Path, ranks: int) -> list[BaseProcess]:
    """Start a script, which resumes whatever it finds, on so many ranks."""
    places = ["--output", str(output), "--logdir", str(output / "runs"), "--resume"]
    argv = [f"{script.__name__}.py", *flags.split(), *places, "--checkpoint_every", "3"]
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        fork(run_rank, script, argv, {**group, "RANK": str(k), "LOCAL_RANK": str(k)})
        for k in range(ranks)
    ]


def fork(function: Callable[..., None], *args: Any) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def run_rank(script: ModuleType, argv: list[str], environment: dict[str, str]) -> None:
    if int(environment["WORLD_SIZE"]) > 1:
        os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.argv = argv
    sys.exit(run_script(script.parse_args, script.main))


def finish(processes: list[BaseProcess], what: str) -> None:
    """Wait for the end of all; SystemExit where one hangs or fails."""
    codes = wait(processes, what)
    if any(codes):
        raise SystemExit(f"{what}: exit codes {codes}")


def wait(processes: list[BaseProcess], what: str) -> list[int]:
    """Wait for the end of all, and return their exit codes; SystemExit where one hangs."""
    for process in processes:
        process.join(PATIENCE)
    if hanging := [process for process in processes if process.is_alive()]:
        for process in hanging:
            process.kill()
        raise SystemExit(f"{what}: {len(hanging)} of {len(processes)} processes hang")
    return [process.exitcode for process in processes]


def run_killed(output: Path, ranks: int, kills: int, seed: int) -> int:
    """Run the pipeline, killing rank 0 and resuming; returns how often it killed."""
    stream, killed = random.Random(seed), 0
    for k, (script, flags) in enumerate(PIPELINE):
        left = kills // 4 if k < len(PIPELINE) - 1 else kills - killed
        while True:
            processes = start(script, flags, output, ranks)
            if left:
                patience = stream.uniform(0, 0.5)  # counted from when it has its folder
                while processes[0].is_alive() and not _has_folder(processes[0], output):
                    time.sleep(0.01)
                time.sleep(patience)
                if processes[0].is_alive():
                    os.kill(processes[0].pid, signal.SIGKILL)
                    killed, left = killed + 1, left - 1
                    wait(processes, "the ranks left behind")
                    finish([fork(check_all_load, output)], "a checkpoint does not load")
                    continue
            finish(processes, script.__name__)
            break
    return killed


def _has_folder(process: BaseProcess, output: Path) -> bool:
    for lock in output.rglob("lock"):
        try:
            if json.loads(lock.read_text())["pid"] == process.pid:
                return True
        except (OSError, ValueError):  # just begun
            pass
    return False


def check_all_load(output: Path) -> None:
    for path in output.rglob("*.pth"):
        load_model(path)


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    (last,) = output.glob("*/*_smooth_*/last.pth")
    return load_model(last).state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        whole, broken = Path(folder) / "whole", Path(folder) / "killed"
        for script, flags in PIPELINE:
            finish(start(script, flags, whole, args.ranks), script.__name__)
        killed = run_killed(broken, args.ranks, args.kills, args.seed)
        expected, ended = final_weights(whole), final_weights(broken)
    equal = expected.keys() == ended.keys()
    equal = equal and all(torch.equal(expected[name], ended[name]) for name in expected)
    print(f"killed {killed} times (seed {args.seed}): {'the same bits' if equal else 'OTHER BITS'}")
    if killed < args.kills:
        print(f"the run ended before it could be killed {args.kills} times; try another --seed")
    sys.exit(0 if equal and killed == args.kills else 1)


if __name__ == "__main__":
    main()
