"""Kill a run of train, prune and --smooth at random moments, resume it each time, and compare.

    python tests/kill.py --kills 20

The pruned network must end with the bits of an uninterrupted run, and at no moment may there be a
checkpoint that does not load.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from utils.checkpoint import load_model  # noqa: E402

COMMON = "--net gateresnet20 --dataset synthetic --image_size 8 --device cpu --bs 64"
TRAIN = f"{COMMON} --epochs 2 --limit_train_batches 12 --limit_test_batches 1"
PRUNE = f"{TRAIN} --p 0.5 --smooth --smooth_epochs 1 --final_epochs 2"


def pipeline(output: Path, launcher: tuple[str, ...] = ()) -> list[list[str]]:
    """The two commands, which resume whatever they find; ``launcher`` may be torchrun's."""
    places = ["--output", str(output), "--logdir", str(output / "runs"), "--resume"]
    start = [sys.executable, *launcher]
    return [
        [*start, str(ROOT / script), *flags.split(), *places, "--checkpoint_every", "3"]
        for script, flags in (("train.py", TRAIN), ("gfbs_cifar.py", PRUNE))
    ]


def run_pipeline(commands: list[list[str]], cwd: Path) -> None:
    for command in commands:
        subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def kill_at_random_moments(commands: list[list[str]], cwd: Path, kills: int, seed: int) -> int:
    """Run the commands one after the other, killing and resuming; returns how often it killed."""
    stream, killed = random.Random(seed), 0
    output = Path(commands[0][commands[0].index("--output") + 1])
    for k, command in enumerate(commands):
        left = kills // 4 if k < len(commands) - 1 else kills - killed
        while True:
            running = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
            if left:
                patience = stream.uniform(0, 0.5)  # counted from when it has its folder
                while running.poll() is None and not _owner(output):
                    time.sleep(0.01)
                time.sleep(patience)
                if owner := _owner(output):
                    os.kill(owner, signal.SIGKILL)
                    killed, left = killed + 1, left - 1
                    running.wait()
                    check_all_load(output)
                    continue
            if running.wait() != 0:
                raise SystemExit(f"{command} ended with code {running.returncode}")
            break
    return killed


def _owner(output: Path) -> int | None:
    """The living process that holds the folder's lock: rank 0, under torchrun."""
    for lock in output.rglob("lock"):
        try:
            pid = json.loads(lock.read_text())["pid"]
            os.kill(pid, 0)
            return pid
        except (OSError, ValueError):  # gone, or just begun
            pass
    return None


def check_all_load(output: Path) -> None:
    for path in output.rglob("*.pth"):
        load_model(path)


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    (last,) = output.glob("*/*_smooth_*/last.pth")
    return load_model(last).state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "killed"
        run_pipeline(pipeline(whole), ROOT)
        killed = kill_at_random_moments(pipeline(broken), ROOT, args.kills, args.seed)
        expected, ended = final_weights(whole), final_weights(broken)
    equal = expected.keys() == ended.keys()
    equal = equal and all(torch.equal(expected[name], ended[name]) for name in expected)
    print(f"killed {killed} times (seed {args.seed}): {'the same bits' if equal else 'OTHER BITS'}")
    if killed < args.kills:
        print(f"the run ended before it could be killed {args.kills} times; try another --seed")
    sys.exit(0 if equal and killed == args.kills else 1)


if __name__ == "__main__":
    main()
