"""Measure how fast it is, here and now: ours against the usual way, in one process, in turn.

    python -m tools.benchmark data --folder my_images/train
    python -m tools.benchmark train --net gatevgg16
    python -m tools.benchmark prune --net resnet50 --bs 32
    python -m tools.benchmark infer --net gatevgg16 --p 0.5 --round_to 8
    python -m tools.benchmark scale --net gateresnet56

Every table gives the median of the rounds, and how many times as fast as its first line the others
are: the ratio of the medians, with the lowest and the highest ratio of a single round. Close other
programs first; what a table says is about this machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tools.benchmark import data, infer, prune, scale, train
from tools.benchmark.timing import Stopwatch
from utils import flags
from utils.cli import Parser, count, run_script
from utils.distributed import select_runtime
from utils.errors import InputError
from utils.files import write_json
from utils.run import command_line, versions

QUESTIONS = {"data": data, "train": train, "prune": prune, "infer": infer, "scale": scale}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m tools.benchmark")
    questions = parser.add_subparsers(dest="question", required=True, metavar="QUESTION")
    for name, module in QUESTIONS.items():
        summary = module.__doc__.partition("\n")[0]
        question = questions.add_parser(name, help=summary, description=module.__doc__)
        module.add_flags(question)
        flags.add_device_flags(question)
        add = question.add_argument_group("measurement").add_argument
        add("--rounds", type=count, default=7, metavar="N", help="how often each contender runs")
        add("--profile", action="store_true", help="look at what the time is spent on, too")
        add("--json", metavar="FILE", help="write every single time there, too")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return what FILE says."""
    if args.json:
        _check_writable(Path(args.json))
    runtime = select_runtime(args.device, args.gpu)
    runtime = replace(runtime, gpus=runtime.gpus[:1])  # one against one
    print(f"{runtime}; {args.rounds} rounds", flush=True)
    watch, comparisons = Stopwatch(runtime.device, args.rounds, args.profile), []
    for comparison in QUESTIONS[args.question].compare_all(args, runtime, watch):
        comparisons.append(comparison.as_dict())
        print(f"\n{comparison}", flush=True)
    result = {
        "command": command_line(), "versions": versions(), "device": str(runtime),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "comparisons": comparisons,
    }  # fmt: skip
    if args.json:
        write_json(args.json, result)
    return result


def _check_writable(path: Path) -> None:
    """Before minutes of measurements, not after them."""
    if path.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        raise InputError(f"--json {path}: cannot be written; name a file in a folder that is there")


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
