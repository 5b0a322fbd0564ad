"""How many images a second train on one rank and on two, which share every batch.

On the CPU a rank computes in one thread, and one rank in two threads is measured beside it; on GPUs
each rank has one of its own.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tools.benchmark.timing import Comparison, Contender, Stopwatch
from tools.benchmark.train import OurLoop
from tools.benchmark.workload import add_workload_flags, image_size, noise_batches
from utils.cli import count
from utils.distributed import Runtime, leave, select_runtime
from utils.errors import InputError

RANKS = 2


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_workload_flags(parser, 128, "gateresnet20")
    parser.add_argument("--batches", type=count, default=5, metavar="N", help="batches a round")


def compare_all(
    args: argparse.Namespace, runtime: Runtime, watch: Stopwatch
) -> Iterator[Comparison]:
    if args.bs % RANKS:
        raise InputError(f"--bs {args.bs} does not divide by the {RANKS} ranks")
    if runtime.device.type not in ("cpu", "cuda"):
        raise InputError(f"ranks compute on the CPU or CUDA, not {runtime.device}; --device cpu")
    if runtime.device.type == "cuda" and torch.cuda.device_count() < RANKS:
        raise InputError(f"{RANKS} ranks need {RANKS} GPUs; --device cpu does without")
    size = image_size(args)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "comparison"
        mp.spawn(_rank, (args, size, watch, _free_port(), file), RANKS)
        yield torch.load(file, weights_only=False)


def _rank(
    rank: int, args: argparse.Namespace, size: int, watch: Stopwatch, port: int, file: Path
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {k: str(v) for k, v in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    together = select_runtime(args.device, args.gpu)
    alone = replace(together, rank=0, world_size=1)
    cpu = together.device.type == "cpu"

    def loop(runtime: Runtime) -> OurLoop:
        return OurLoop(args.net, noise_batches(args.batches, args.bs, size, runtime), runtime)

    def by_first(train: OurLoop, threads: int, _: None) -> None:
        if together.is_main:
            torch.set_num_threads(threads)
            train(None)
            torch.set_num_threads(1)
        dist.barrier()

    one = loop(alone)
    contenders = [Contender("1 rank", partial(by_first, one, 1))]
    if cpu:
        contenders.append(Contender("1 rank, 2 threads", partial(by_first, one, 2)))
    contenders.append(Contender(f"{RANKS} ranks", loop(together), dist.barrier))
    title, images = f"{args.net}, batch {args.bs}", args.batches * args.bs
    watch = replace(watch, device=together.device)
    comparison = watch.compare(title, contenders, images)
    if together.is_main:
        torch.save(comparison, file)
    leave()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
