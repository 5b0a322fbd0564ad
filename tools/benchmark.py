"""Measure how fast it is, here and now: ours against the usual way, in one process, in turn.

    python -m tools.benchmark data --folder my_images/train
    python -m tools.benchmark train --net gatevgg16
    python -m tools.benchmark prune --net resnet50 --bs 32
    python -m tools.benchmark infer --net gatevgg16 --p 0.5 --round_to 8
    python -m tools.benchmark scale --net gateresnet56
    python -m tools.benchmark memory --net resnet50

Tables give medians, interquartile ranges, and how many times as fast as the first line the others
are: the ratio of the medians, with the lowest and the highest ratio of a single round. Close other
programs first; what a table says is about this machine.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models import NETWORKS, build_model
from tools import measures
from tools.export import deployable, to_pt2
from utils.cli.flags import add_device_flags
from utils.cli.parser import Parser, count, count_or_zero, network, ratio, run_script
from utils.cost import model_cost
from utils.data.folders import Crops, FolderBatches
from utils.data.listing import list_images
from utils.data.small import ImageBatches
from utils.distributed import Acceleration, Runtime, leave, select_runtime
from utils.errors import InputError
from utils.files import write_json
from utils.finetune import Trainer
from utils.run.provenance import command_line, versions

Args, Compare, Comparisons = argparse.Namespace, Callable[..., dict], Iterator[dict[str, Any]]
RANKS = 2
SPEEDUPS = (  # the flags of train.py
    "--no_channels_last", "", "--compile --fused", "--amp bf16", "--amp bf16 --compile",
    "--amp bf16 --compile --fused",
)  # fmt: skip


def data(args: Args, runtime: Runtime, compare: Compare) -> Comparisons:
    """How many images a second come in: ours against PIL images one by one from a DataLoader.

    Small images are in memory. With --folder, large ones, too, by as many worker processes.
    """
    from torchvision import transforms
    from torchvision.datasets import CIFAR10, ImageFolder

    samples = list_images(Path(args.folder))[0] if args.folder else []
    ours, images = measures.noise_batches(args.images, args.bs, 32, runtime)
    usual = CIFAR10.__new__(CIFAR10)  # torchvision's way to an image, without its files
    usual.data = images.images.permute(0, 2, 3, 1).contiguous().numpy()
    usual.targets, usual.target_transform = images.labels.tolist(), None
    ways = ways_in(usual, transforms.RandomCrop(32, padding=4), ours, args.workers)
    yield compare("small images", ours.images, ways)
    if samples:
        ours = FolderBatches(samples, args.bs, Crops(), runtime, workers=args.workers, augment=True)
        usual, crop = ImageFolder(args.folder), transforms.RandomResizedCrop(224)
        with closing(ours):
            yield compare("large images", ours.images, ways_in(usual, crop, ours, args.workers))


def ways_in(usual: Dataset, crop: Any, ours: Any, workers: int) -> dict[str, Callable]:
    """An epoch of the same images through either."""
    from torchvision import transforms

    device, pixels = ours.runtime.device, ours.normalisation
    usual.transform = transforms.Compose([
        crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(pixels.mean, pixels.std),
    ])  # fmt: skip
    # Workers stay, as ours do, so that starting them is not on the clock.
    options = {"persistent_workers": workers > 0, "pin_memory": device.type == "cuda"}
    loader = DataLoader(usual, ours.batch_size, shuffle=True, num_workers=workers, **options)

    def send(batch: Iterable[Tensor]) -> list[Tensor]:
        return [part.to(device, non_blocking=True) for part in batch]

    return {
        "PIL one by one": lambda: measures.exhaust(map(send, loader)),
        "ours": lambda: measures.exhaust(ours.set_epoch(0) or ours),
    }


def train(args: Args, runtime: Runtime, compare: Compare) -> Comparisons:
    """How many images a second train: our loop against a plain one, eager, in float32.

    The plain loop runs the network without gates and asks for the loss and the hits of every batch.
    """
    plain = measures.training(args, runtime, gates=False)
    runs = {"plain loop": partial(measures.plain_epoch, *plain)}
    for flags in SPEEDUPS:
        switches = (f"--{flag}" in flags for flag in ("compile", "fused"))
        by_pixel = "--no_channels_last" not in flags
        acceleration = Acceleration("bf16" if "bf16" in flags else None, by_pixel, *switches)
        if not (acceleration.compile and args.no_compile):
            here = select_runtime(runtime.device.type, runtime.gpus, acceleration=acceleration)
            runs[flags or "ours"] = partial(measures.our_epoch, *measures.training(args, here))
    yield compare(f"{args.net}, batch {args.bs}", args.batches * args.bs, runs)


def prune(args: Args, runtime: Runtime, compare: Compare) -> Comparisons:
    """What it costs to score, select and cut, against one bare forward and backward of that batch.

    Beside it torch-pruning: dependency graph, Taylor importance, prune. It and the bare pass run
    without gates. Memory is the most that was allocated on top of network and batch.
    """
    batch = measures.noise_batch(args, runtime)
    runs = {"forward and backward": measures.forward_backward, "ours": measures.score_select_cut}
    if find_spec("torch_pruning"):  # it is in requirements-dev.txt
        runs["torch-pruning"] = measures.with_torch_pruning
    models = {g: measures.fresh_model(args.net, g).to(runtime.device) for g in (True, False)}

    def prepare(name: str) -> tuple[Any, ...]:
        return copy.deepcopy(models[name == "ours"]), *batch, args.p

    comparison = compare(f"{args.net}, batch {args.bs}", args.bs, runs, prepare=prepare)
    for name, run in runs.items():
        peak = measures.peak_bytes(run, prepare(name), runtime.device)
        comparison["facts"][f"peak memory, MB, {name}"] = round(peak / 1e6, 1)
    yield comparison


def infer(args: Args, runtime: Runtime, compare: Compare) -> Comparisons:
    """How long a batch takes to classify: unpruned and pruned, as they are and exported to pt2.

    The share of the multiply-adds' ratio that becomes real time is (t0 / t) / (m0 / m), of the
    exported pruned network against the exported unpruned one. Fresh weights are scored on noise;
    --checkpoint and --pruned take a network that was really pruned.
    """
    networks, size = dict(measures.before_and_after(args, runtime)), measures.image_size(args)
    before, after = (model_cost(model.eval(), size).macs / 1e6 for model in networks.values())
    for name, model in list(networks.items()):  # as a user of the .pt2 file has it: read back
        networks[f"{name}, exported"] = to_pt2(deployable(model.cpu()), size)[1]
    runs = {
        name: torch.inference_mode()(network.to(runtime.device).forward)
        for name, network in networks.items()
    }
    images, _ = measures.noise_batch(args, runtime)
    for part in (images[:1], images)[args.bs == 1 :]:
        title, take = f"{args.net}, batch {len(part)}", partial(lambda part, _: (part,), part)
        comparison = compare(title, len(part), runs, prepare=take, seconds=0.1)
        times = {row["name"]: row["seconds"] for row in comparison["contenders"]}
        faster = measures.speed(times["unpruned, exported"], times["pruned, exported"])
        folded = measures.speed(times["pruned"], times["pruned, exported"])
        text = "{:.2f} ({:.2f}, {:.2f})"
        comparison["facts"] |= {
            "multiply-adds, M": f"{before:.1f} -> {after:.1f}",
            "fewer multiply-adds, times": round(before / after, 3),
            "faster, exported against exported, times": text.format(*faster),
            "share of it that becomes time": round(faster[0] * after / before, 3),
            "exported against not exported, pruned, times": text.format(*folded),
        }
        yield comparison


def scale(args: Args, runtime: Runtime, compare: Compare) -> Comparisons:
    """How many images a second train on one rank and on two, which share every batch.

    On the CPU a rank has one thread, and one rank with two is measured beside it.
    """
    replace(runtime, world_size=RANKS).share(args.bs, "--bs")
    if runtime.device.type != "cpu" and torch.cuda.device_count() < RANKS:
        raise InputError(f"{RANKS} ranks need {RANKS} GPUs; --device cpu does without")
    measures.image_size(args)  # so that images that do not fit are found out here
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (args, runtime.device.type, compare, folder), RANKS)
        yield torch.load(f"{folder}/comparison")


def _rank(rank: int, args: Args, device: str, compare: Compare, folder: str) -> None:
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    backend, store = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", f"file://{folder}/ranks"
    dist.init_process_group(backend, store, rank=rank, world_size=RANKS)
    together = select_runtime(device, args.gpu)
    alone = replace(together, rank=0, world_size=1)

    def run(ranks: int, threads: int, trainer: Trainer, batches: ImageBatches) -> None:
        torch.set_num_threads(threads)
        if rank < ranks:
            measures.our_epoch(trainer, batches)
        dist.barrier()  # all begin the next run together

    ways = {"1 rank": (1, 1, alone), f"{RANKS} ranks": (RANKS, 1, together)}
    if device == "cpu":
        ways["1 rank, 2 threads"] = (1, 2, alone)
    runs = {n: partial(run, *way[:2], *measures.training(args, way[2])) for n, way in ways.items()}
    result = compare(f"{args.net}, batch {args.bs}", args.batches * args.bs, runs)
    if together.is_main:
        torch.save(result, f"{folder}/comparison")
    leave()


def memory(args: Args) -> tuple[int, int]:
    """How much memory an image in training and and in scoring: bytes kept for the backward pass.

    Counted from the tensors that autograd saves in float32, on shapes without data. Optimiser,
    gradients and weights come on top: 12 bytes a parameter together.
    """
    plain, checkpointed = measures.saved_bytes(build_model(args.net), args.image_size)
    print(f"{args.net} at {args.image_size} pixels, MB an image: {plain / 1e6:.1f}"
          f", with activations recomputed {checkpointed / 1e6:.1f}")  # fmt: skip
    return plain, checkpointed


# fmt: off
QUESTIONS: dict[Callable, dict[str, Any]] = {  # the flags of each, and their defaults
    data: {"images": 20000, "bs": 128, "workers": 2, "folder": None},
    train: {"net": "gatevgg16", "bs": 128, "image_size": None, "batches": 5, "no_compile": False},
    prune: {"net": "gatevgg16", "bs": 200, "image_size": None, "p": 0.5},
    infer: {"net": "gatevgg16", "bs": 64, "image_size": None, "p": 0.5, "round_to": 8,
            "checkpoint": None, "pruned": None},
    scale: {"net": "gateresnet20", "bs": 128, "image_size": None, "batches": 5},
    memory: {"net": "resnet50", "image_size": 224},
}
TIMED = {"rounds": 7, "profile": False, "json": None}
FLAGS = {
    "net": (network(list(NETWORKS)), "the network"),
    "bs": (count, "images in a batch"),
    "image_size": (count, "side of the images in pixels; by default 224 for ImageNet, else 32"),
    "images": (count, "small images an epoch"),
    "workers": (count_or_zero, "processes of every DataLoader; 0: none, to profile what they do"),
    "folder": (str, "large images, in FOLDER/<class>/"),
    "batches": (count, "batches a round"),
    "no_compile": (bool, "leave the compiled ones out"),
    "p": (ratio, "how much is cut of fresh weights"),
    "round_to": (count, "widths in multiples of it"),
    "checkpoint": (str, "file of the unpruned network; takes the place of --net"),
    "pruned": (str, "file of the same network pruned; goes with --checkpoint"),
    "rounds": (count, "how often each contender is timed"),
    "profile": (bool, "look at what the time is spent on, too"),
    "json": (str, "write every single time into this file, too"),
}
# fmt: on


def parse_args(argv: Sequence[str] | None = None) -> Args:
    parser = Parser(description=__doc__, prog="python -m tools.benchmark")
    questions = parser.add_subparsers(dest="question", required=True, metavar="QUESTION")
    for ask, defaults in QUESTIONS.items():
        text = inspect.getdoc(ask)
        question = questions.add_parser(ask.__name__, help=text.split("\n")[0], description=text)
        for flag, default in (defaults if ask is memory else defaults | TIMED).items():
            kind, summary = FLAGS[flag]
            how = {"action": "store_true"} if kind is bool else {"type": kind, "default": default}
            question.add_argument(f"--{flag}", help=summary, **how)
        if ask is not memory:
            add_device_flags(question)
    return parser.parse_args(argv)


def main(args: Args) -> dict[str, Any] | tuple[int, int]:
    """Measure, print, and return what the file of --json says."""
    ask = next(ask for ask in QUESTIONS if ask.__name__ == args.question)
    if ask is memory:
        return memory(args)
    if args.json and (
        os.path.isdir(args.json) or not os.access(Path(args.json).resolve().parent, os.W_OK)
    ):
        raise InputError(
            f"--json {args.json}: cannot be written; name a file in an existing folder"
        )
    runtime = select_runtime(args.device, args.gpu)
    runtime = replace(runtime, gpus=runtime.gpus[:1])  # one against one
    if runtime.gpus:
        torch.cuda.set_device(runtime.device)  # the one that the timer waits for
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler has much to say
    print(f"{runtime}; {args.rounds} rounds", flush=True)
    result = {"command": command_line(), "versions": versions(), "device": str(runtime),
              "processor": torch.backends.cpu.get_cpu_capability(), "comparisons": []}  # fmt: skip
    compare = partial(measures.compare, rounds=args.rounds, profiled=args.profile)
    for comparison in ask(args, runtime, compare):
        result["comparisons"].append(comparison)
        print(f"\n{measures.as_text(comparison)}", flush=True)
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
