"""Measure how fast it is, here and now: ours against the usual way, in one process, in turn.

    python -m tools.benchmark data --folder my_images/train
    python -m tools.benchmark train --net gatevgg16
    python -m tools.benchmark prune --net resnet50 --bs 32
    python -m tools.benchmark gain --net gatevgg16 --macs 0.5 --bs 64
    python -m tools.benchmark scale --net gateresnet56

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
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from models import NETWORKS
from models.gate import deployable
from tools import export, measures
from utils.cli.flags import add_device_flags
from utils.cli.parser import Parser, count, count_or_zero, network, ratio, run_script, share
from utils.cost import model_cost
from utils.data.folders import Crops, FolderBatches
from utils.data.listing import list_images
from utils.data.small import ImageBatches
from utils.distributed import Acceleration, Runtime, leave, select_runtime
from utils.errors import InputError
from utils.files import writable, write_json
from utils.finetune import Trainer
from utils.recipes import CIFAR_BASELINE
from utils.run.launch import command_line, versions
from utils.saliency import channel_saliency
from utils.selection import Goal, select
from utils.surgery import prune as prune_network

Args, Compare, Comparisons = argparse.Namespace, Callable[..., dict], Iterator[dict[str, Any]]
RANKS = 2
ROUND_TO = (1, 8, 16)
# The flags of train.py.
SPEEDUPS = ("--no_channels_last", "", "--compile --fused", "--amp bf16", "--amp bf16 --compile")


def data(args: Args, runtime: Runtime, compare: Compare) -> Comparisons:
    """How many images a second come in: ours against PIL images one by one from a DataLoader.

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
    """How many images a second train: our loop against a plain one, eager, in float32.

    The plain loop runs the network without gates and asks for the loss and the hits of every batch.
    """
    plain = measures.training(args, runtime, gates=False)
    runs = {"plain loop": partial(measures.plain_epoch, *plain)}
    for flags in (*SPEEDUPS, f"{SPEEDUPS[-1]} --fused"):
        switches = (f"--{flag}" in flags for flag in ("compile", "fused"))
        by_pixel = "--no_channels_last" not in flags
        acceleration = Acceleration("bf16" if "bf16" in flags else None, by_pixel, *switches)
        if not (acceleration.compile and args.no_compile):
            here = select_runtime(runtime.device.type, runtime.gpus, acceleration=acceleration)
            runs[flags or "ours"] = partial(measures.our_epoch, *measures.training(args, here))
    yield compare(f"{args.net}, batch {args.bs}", args.batches * args.bs, runs)


def prune(args: Args, runtime: Runtime, compare: Compare) -> Comparisons:
    """What it costs to score, select and cut, against one bare forward and backward of that batch.

    Once more with --checkpoint_activations, and by torch-pruning: dependency graph, Taylor
    importance, prune. It and the bare pass run without gates. Memory is the most that was
    allocated on top of network and batch.
    """
    batch, ours = measures.noise_batch(args, runtime), measures.score_select_cut
    runs = {"forward and backward": measures.forward_backward, "ours": ours}
    runs["ours, recomputed"] = partial(ours, checkpoint_activations=True)
    if find_spec("torch_pruning"):  # it is in requirements-dev.txt
        runs["torch-pruning"] = measures.with_torch_pruning
    models = {g: measures.fresh_model(args.net, g).to(runtime.device) for g in (True, False)}

    def prepare(name: str) -> tuple[Any, ...]:
        return copy.deepcopy(models[name.startswith("ours")]), *batch, args.p

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
    saliency, before = channel_saliency(whole, *batch), {"macs": model_cost(whole, size).macs}
    networks, fewer, facts = {"unpruned": whole}, {}, {}
    activations = measures.activations(whole, batch[0][:1])
    for step in ROUND_TO:
        goal, name = Goal("macs", args.macs, round_to=step), f"--round_to {step}"
        plan = select(whole, saliency, goal, size, before)
        networks[name] = prune_network(copy.deepcopy(whole), plan)
        fewer[name] = before["macs"] / model_cost(networks[name], size).macs
        narrower = activations / measures.activations(networks[name], batch[0][:1])
        facts[name] = f"{fewer[name]:.2f} times fewer multiply-adds, {narrower:.2f} activations"

    def compared(title: str, images: int, runs: dict[str, Callable], *inputs: Any) -> dict:
        title = f"{args.net}, {title}, batch {images}"
        found = compare(title, images, runs, prepare=lambda name: inputs, seconds=0.1)
        for row in found["contenders"][1:]:
            part = row["speed"] / fewer[name := row["name"]]
            found["facts"][name] = f"{facts[name]}; {part:.2f} of the first is saved time"
        return found

    for ending in ("pt2", "onnx"):
        runs = {name: exported(network, size, ending) for name, network in networks.items()}
        for images in (batch[0][:1], batch[0])[args.bs == 1 :]:
            yield compared(ending, len(images), runs, images)
    for amp in (None, "bf16"):
        here = replace(runtime, acceleration=Acceleration(amp, channels_last=True))
        copies = {name: copy.deepcopy(network).train() for name, network in networks.items()}
        runs = {n: Trainer(network, CIFAR_BASELINE, here).step for n, network in copies.items()}
        yield compared(f"training in {amp or 'float32'}", args.bs, runs, *batch)


def exported(model: nn.Module, size: int, ending: str) -> Callable[[Tensor], Tensor]:
    """The network as a user of its file has it: read back. ONNX runs on the CPU."""
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        export.write(deployable(model.cpu()), size, file := Path(folder) / f"network.{ending}")
        network = export.read(file)
    model.to(device)
    return torch.inference_mode()(network.to(device).forward if ending == "pt2" else network)


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


QUESTIONS = {  # and their flags
    data: "images bs workers folder",
    train: "net bs image_size batches no_compile",
    prune: "net bs image_size p",
    gain: "net bs image_size macs",
    scale: "net bs image_size batches",
}
FLAGS: dict[str, tuple] = {  # type, default, help
    "net": (network(list(NETWORKS)), "gatevgg16", "the network"),
    "bs": (count, 128, "images in a batch"),
    "image_size": (count, None, "side of the images; by default 224 for ImageNet, else 32"),
    "images": (count, 20000, "small images an epoch"),
    "workers": (count_or_zero, 2, "processes of every DataLoader; 0: none, to profile them"),
    "folder": (str, None, "large images, in FOLDER/<class>/"),
    "batches": (count, 5, "batches a round"),
    "no_compile": (bool, False, "leave the compiled ones out"),
    "p": (ratio, 0.5, "how much is cut of fresh weights"),
    "macs": (share, 0.5, "share of the multiply-adds of fresh weights that stays"),
    "rounds": (count, 7, "how often each contender is timed"),
    "profile": (bool, False, "look at what the time is spent on, too"),
    "json": (str, None, "write every single time into this file, too"),
}


def parse_args(argv: Sequence[str] | None = None) -> Args:
    parser = Parser(description=__doc__, prog="python -m tools.benchmark")
    questions = parser.add_subparsers(required=True, metavar="QUESTION")
    for ask, names in QUESTIONS.items():
        text = inspect.getdoc(ask)
        question = questions.add_parser(ask.__name__, help=text.split("\n")[0], description=text)
        question.set_defaults(ask=ask)
        for name in f"{names} rounds profile json".split():
            kind, default, summary = FLAGS[name]
            how = {"action": "store_true"} if kind is bool else {"type": kind, "default": default}
            question.add_argument(f"--{name}", help=summary, **how)
        add_device_flags(question)
    return parser.parse_args(argv)


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
    for comparison in args.ask(args, runtime, compare):
        comparisons.append(comparison)
        print(f"\n{measures.as_text(comparison)}", flush=True)
    result = {"command": command_line(), "versions": versions(), "device": str(runtime)}
    result |= {"processor": torch.backends.cpu.get_cpu_capability(), "comparisons": comparisons}
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
