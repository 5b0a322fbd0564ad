"""Measure how fast it is, here and now: ours against the usual way, in one process, in turn.

    python -m tools.benchmark data --folder my_images/train   how many images a second come in
    python -m tools.benchmark train --net gatevgg16           how many images a second train
    python -m tools.benchmark prune --net resnet50 --bs 32    scoring and cutting, against one pass
    python -m tools.benchmark gain --macs 0.5 --bs 64         saved multiply-adds as saved time
    python -m tools.benchmark scale --net gateresnet56        two ranks against one

Tables give medians, interquartile ranges, and how many times as fast as the first line the others
are: the ratio of the medians, with the lowest and the highest ratio of a single round. Close other
programs first; what a table says is about this machine.
"""

from __future__ import annotations

import argparse
import copy
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from models import NETWORKS
from tools import export, measures
from utils.cli.flags import add_device_flags
from utils.cli.parser import Parser, count, count_or_zero, network, run_script, share
from utils.cost import model_cost
from utils.data.folders import Crops, FolderBatches
from utils.data.listing import list_images
from utils.data.small import ImageBatches
from utils.distributed import Acceleration, Runtime, leave, select_runtime
from utils.errors import InputError
from utils.files import writable, write_json
from utils.finetune import Trainer
from utils.recipes import CIFAR_BASELINE
from utils.run.provenance import command_line, versions
from utils.saliency import channel_saliency
from utils.selection import Goal, select
from utils.surgery import prune as prune_network

Args, Compare, Comparisons = argparse.Namespace, Callable[..., dict], Iterator[dict[str, Any]]
RANKS = 2
ROUND_TO = (1, 8, 16)
SPEEDUPS = {  # by the flags of train.py
    "--no_channels_last": Acceleration(),
    "ours": Acceleration(channels_last=True),
    "--compile --fused": Acceleration(channels_last=True, compile=True, fused=True),
    "--amp bf16": Acceleration("bf16", channels_last=True),
    "--amp bf16 --compile": Acceleration("bf16", channels_last=True, compile=True),
    "--amp bf16 --compile --fused": Acceleration("bf16", True, compile=True, fused=True),
}


def data(args: Args, runtime: Runtime, compare: Compare) -> Comparisons:
    """Ours against PIL images one by one from a DataLoader.

    Small images are in memory. With --folder, large ones, too, by as many worker processes.
    """
    from torchvision import transforms
    from torchvision.datasets import CIFAR10, ImageFolder

    samples = list_images(Path(args.folder))[0] if args.folder else []
    ours = measures.noise_batches(args.images, args.bs, 32, runtime)
    usual = CIFAR10.__new__(CIFAR10)  # torchvision's way to an image, without its files
    usual.data = ours.source.images.permute(0, 2, 3, 1).contiguous().numpy()
    usual.targets, usual.target_transform = ours.source.labels.tolist(), None
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
    flip, normalise = transforms.RandomHorizontalFlip(), transforms.Normalize
    pixels = [transforms.ToTensor(), normalise(pixels.mean, pixels.std)]
    usual.transform = transforms.Compose([crop, flip, *pixels])
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
    """Our loop, with flags of train.py, against a plain one, eager, in float32, without gates."""
    plain = measures.training(args, runtime, gates=False)
    runs = {"plain loop": partial(measures.plain_epoch, *plain)}
    for name, acceleration in SPEEDUPS.items():
        if not (acceleration.compile and args.no_compile):
            here = select_runtime(runtime.device.type, runtime.gpus, acceleration=acceleration)
            runs[name] = partial(measures.our_epoch, *measures.training(args, here))
    yield compare(f"{args.net}, batch {args.bs}", args.batches * args.bs, runs)


def prune(args: Args, runtime: Runtime, compare: Compare) -> Comparisons:
    """Score, select and cut half, against one bare forward and backward of that batch.

    Once more with --checkpoint_activations, and by torch-pruning: dependency graph, Taylor
    importance, prune. It and the bare pass run without gates. Memory is the most that was
    allocated on top of network and batch.
    """
    batch, ours = measures.noise_batch(args, runtime), measures.score_select_cut
    runs = {"forward and backward": measures.forward_backward, "ours": ours}
    runs["ours, recomputed"] = partial(ours, checkpoint_activations=True)
    if find_spec("torch_pruning"):  # it is in requirements-dev.txt
        runs["torch-pruning"] = measures.with_torch_pruning
    gated = measures.fresh_model(args.net).to(runtime.device)
    plain = measures.fresh_model(args.net, gates=False).to(runtime.device)

    def prepare(name: str) -> tuple[Any, ...]:
        return copy.deepcopy(gated if name.startswith("ours") else plain), *batch

    comparison = compare(f"{args.net}, batch {args.bs}", args.bs, runs, prepare=prepare)
    for name, run in runs.items():
        peak = measures.peak_bytes(run, prepare(name), runtime.device)
        comparison["facts"][f"peak memory, MB, {name}"] = round(peak / 1e6, 1)
    yield comparison


def gain(args: Args, runtime: Runtime, compare: Compare) -> Comparisons:
    """How much of the multiply-adds that are cut is saved time, for several --round_to.

    Fresh weights are scored on noise and cut to --macs. Inference of one image and of a batch, by
    exported files (pt2, ONNX); training of the batch in float32 and in bf16, channels_last.
    """
    export.check_onnx()
    batch, size = measures.noise_batch(args, runtime), measures.image_size(args)
    whole = measures.fresh_model(args.net).to(runtime.device)
    saliency, before = channel_saliency(whole, *batch), vars(model_cost(whole, size))
    activations = measures.activations(whole, batch[0][:1])
    networks, fewer, facts = {"unpruned": whole}, {}, {}
    for step in ROUND_TO:
        plan = select(whole, saliency, Goal("macs", args.macs, round_to=step), size, before)
        name = f"--round_to {step}"
        networks[name] = cut = prune_network(copy.deepcopy(whole), plan)
        fewer[name] = before["macs"] / model_cost(cut, size).macs
        narrower = activations / measures.activations(cut, batch[0][:1])
        facts[name] = f"{fewer[name]:.2f} times fewer multiply-adds, {narrower:.2f} activations"

    def compared(title: str, runs: dict[str, Callable], *inputs: Tensor) -> dict:
        images = len(inputs[0])
        title = f"{args.net}, {title}, batch {images}"
        found = compare(title, images, runs, prepare=lambda name: inputs, seconds=0.1)
        for row in found["contenders"][1:]:
            name = row["name"]
            part = row["speed"] / fewer[name]
            found["facts"][name] = f"{facts[name]}; {part:.2f} of the first is saved time"
        return found

    for kind in ("pt2", "onnx"):
        runs = {name: exported(network, size, kind) for name, network in networks.items()}
        for images in sorted({1, args.bs}):
            yield compared(kind, runs, batch[0][:images])
    for amp in (None, "bf16"):
        here = replace(runtime, acceleration=Acceleration(amp, channels_last=True))
        copies = {name: copy.deepcopy(network).train() for name, network in networks.items()}
        runs = {n: Trainer(network, CIFAR_BASELINE, here).step for n, network in copies.items()}
        yield compared(f"training in {amp or 'float32'}", runs, *batch)


def exported(model: nn.Module, size: int, kind: str) -> export.Network:
    """The network as a user of its file has it. ONNX runs on the CPU."""
    network, _ = export.exported(copy.deepcopy(model).cpu(), size, kind)
    if kind == "pt2":
        network = network.to(next(model.parameters()).device).forward
    return torch.inference_mode()(network)


def scale(args: Args, runtime: Runtime, compare: Compare) -> Comparisons:
    """One rank against two that share every batch.

    On the CPU a rank has one thread, and one rank with two threads is measured beside them.
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

    def run(here: Runtime, threads: int, trainer: Trainer, batches: ImageBatches) -> None:
        torch.set_num_threads(threads)
        if rank < here.world_size:
            measures.our_epoch(trainer, batches)
        dist.barrier()  # all begin the next run together

    ways = {"1 rank": (alone, 1), f"{RANKS} ranks": (together, 1)}
    if device == "cpu":
        ways["1 rank, 2 threads"] = (alone, 2)
    runs = {
        name: partial(run, here, threads, *measures.training(args, here))
        for name, (here, threads) in ways.items()
    }
    result = compare(f"{args.net}, batch {args.bs}", args.batches * args.bs, runs)
    if together.is_main:
        torch.save(result, f"{folder}/comparison")
    leave()


QUESTIONS = {"data": data, "train": train, "prune": prune, "gain": gain, "scale": scale}
USED_BY = {  # flags that some questions do not take
    **dict.fromkeys(("images", "folder", "workers"), ("data",)),
    **dict.fromkeys(("net", "image_size"), ("train", "prune", "gain", "scale")),
    "batches": ("train", "scale"),
    "no_compile": ("train",),
    "macs": ("gain",),
}


def parse_args(argv: Sequence[str] | None = None) -> Args:
    parser = Parser(description=__doc__, prog="python -m tools.benchmark")
    parser.add_argument("question", choices=QUESTIONS)
    add = parser.add_argument
    add("--bs", type=count, default=128, help="images in a batch")
    add("--rounds", type=count, default=7, help="how often each contender is timed")
    add("--profile", action="store_true", help="look at what the time is spent on, too")
    add("--json", metavar="FILE", help="write every single time into this file, too")
    add = parser.add_argument_group("data").add_argument
    add("--images", type=count, default=20000, help="small images an epoch")
    add("--folder", help="large images, in FOLDER/<class>/")
    add("--workers", type=count_or_zero, default=2, help="of every DataLoader; 0: to profile them")
    add = parser.add_argument_group("all but data").add_argument
    add("--net", type=network([*NETWORKS]), default="gatevgg16", help="the network")
    add("--image_size", type=count, help="side of the images (default: 32, or 224 for ImageNet)")
    add("--batches", type=count, default=5, help="batches a round (train, scale)")
    add("--no_compile", action="store_true", help="leave the compiled ones out (train)")
    add("--macs", type=share, default=0.5, help="share of the multiply-adds that stays (gain)")
    add_device_flags(parser)
    args = parser.parse_args(argv)
    for flag, questions in USED_BY.items():
        if args.question not in questions and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} goes with {', '.join(questions)}, not with {args.question}")
    return args


def main(args: Args) -> dict[str, Any]:
    """Measure, print, and return what the file of --json says."""
    if args.json:
        with writable(args.json, "--json"):  # before anything is measured
            open(args.json, "a").close()
    runtime = select_runtime(args.device, args.gpu)
    runtime = replace(runtime, gpus=runtime.gpus[:1])  # one against one
    if runtime.gpus:
        torch.cuda.set_device(runtime.device)  # the one that the timer waits for
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler has much to say
    print(f"{runtime}; {args.rounds} rounds", flush=True)
    compare = partial(measures.compare, rounds=args.rounds, profiled=args.profile)
    comparisons = []
    for comparison in QUESTIONS[args.question](args, runtime, compare):
        comparisons.append(comparison)
        print(f"\n{measures.as_text(comparison)}", flush=True)
    result = {"command": command_line(), "versions": versions(), "device": str(runtime)}
    result |= {"processor": torch.backends.cpu.get_cpu_capability(), "comparisons": comparisons}
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
