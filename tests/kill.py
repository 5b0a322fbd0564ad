"""Kill a run of train, prune and --smooth at random moments, resume it each time, and compare.

    python tests/kill.py --kills 20
    python tests/kill.py --kills 5 --ranks 2

The pruned network must end with the bits of an uninterrupted run, and at no moment may there be a
checkpoint that does not load.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from processes import ROOT, Script, start_ranks

sys.path.insert(0, str(ROOT))

from utils.checkpoint import load_model

COMMON = "--net gateresnet20 --dataset synthetic --image_size 8 --device cpu --bs 64"
COMMON += " --limit_test_batches 1 --resume"
TRAIN = f"{COMMON} --epochs 2"
PRUNE = f"{TRAIN} --p 0.5 --smooth --smooth_epochs 1 --final_epochs 2"
PRUNE += " --ema 0.9 --distill 0.5 --accumulate 2"  # what else last.pth has to hold
PIPELINE = (("train.py", TRAIN), ("gfbs_cifar.py", PRUNE))


def start(script: str, flags: str, output: Path, ranks: int) -> list[Script]:
    """Start a script, which resumes whatever it finds, on so many ranks."""
    argv = [*flags.split(), "--output", output, "--logdir", output / "runs"]
    return start_ranks(ranks, script, *argv)


def finish(processes: list[Script]) -> None:
    """Wait for the end of all; SystemExit where one fails."""
    if failed := [ended for ended in [process.wait() for process in processes] if ended[0]]:
        raise SystemExit(f"exit codes and output of what failed: {failed}")


def run_killed(output: Path, batches: int, ranks: int, kills: int, seed: int) -> int:
    """Run the pipeline, killing rank 0 and resuming; returns how often it killed."""
    stream, killed = random.Random(seed), 0
    length = f"--limit_train_batches {batches} --checkpoint_every {max(1, batches // 4)}"
    for k, (script, flags) in enumerate(PIPELINE):
        left = kills // 4 if k < len(PIPELINE) - 1 else kills - killed
        while True:
            began, patience = time.time(), stream.uniform(0, 0.5)
            processes = start(script, f"{flags} {length}", output, ranks)
            if left:
                # Counted from when it has its folder or, every second time, from when it has saved.
                while processes[0].is_alive() and not (
                    _has_saved(output, began) if left % 2 else _has_folder(processes[0], output)
                ):
                    time.sleep(0.01)
                time.sleep(patience)
                if processes[0].is_alive():
                    os.kill(processes[0].pid, signal.SIGKILL)
                    killed, left = killed + 1, left - 1
                    for process in processes:
                        process.wait()
                    for path in output.rglob("*.pth"):
                        load_model(path)
                    continue
            finish(processes)
            break
    return killed


def _has_folder(process: Script, output: Path) -> bool:
    for lock in output.rglob("lock"):
        try:
            if json.loads(lock.read_text())["pid"] == process.pid:
                return True
        except (OSError, ValueError):  # just begun
            pass
    return False


def _has_saved(output: Path, since: float) -> bool:
    try:
        return any(path.stat().st_mtime >= since for path in output.rglob("last.pth"))
    except OSError:  # one is being replaced
        return False


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    (last,) = output.glob("*/*_smooth_*/last.pth")
    return load_model(last).state_dict()


def ends_with_the_same_bits(folder: Path, kills: int, **options: int) -> bool:
    """Run the pipeline with kills and without; SystemExit where it ends before the last kill."""
    whole, broken = folder / "whole", folder / "killed"
    run_killed(whole, kills=0, **options)
    if (killed := run_killed(broken, kills=kills, **options)) < kills:
        raise SystemExit(f"the run ended after {killed} kills; try another --seed")
    expected, ended = final_weights(whole), final_weights(broken)
    equal = expected.keys() == ended.keys()
    return equal and all(torch.equal(expected[name], ended[name]) for name in expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--batches", type=int, default=12, help="in an epoch")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the suite; of the server, so of all processes
    with tempfile.TemporaryDirectory() as folder:
        equal = ends_with_the_same_bits(Path(folder), **vars(args))
    said = "the same bits" if equal else "OTHER BITS"
    print(f"killed {args.kills} times (seed {args.seed}): {said}")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
