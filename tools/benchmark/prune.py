"""What it costs to score, select and cut, against one bare forward and backward of the same batch.

Beside it torch-pruning (requirements-dev.txt), which does the same job by tracing: dependency
graph, Taylor importance, prune. It and the bare pass run the network without gates. Speeds below
1 cost more than the bare pass. Memory is the most that was allocated at any moment on top of the
network and the batch.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import GatedModel
from tools.benchmark.timing import Comparison, Contender, Stopwatch, quiet_profile
from tools.benchmark.workload import (
    add_workload_flags,
    fresh_model,
    image_size,
    noise_batch,
    without_gates,
)
from utils.cli import ratio
from utils.distributed import Runtime
from utils.pruning import select_channels
from utils.saliency import channel_saliency
from utils.surgery import prune


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_workload_flags(parser, 200, "gatevgg16")
    parser.add_argument("--p", type=ratio, default=0.5, metavar="RATIO", help="how much is cut")


def compare_all(
    args: argparse.Namespace, runtime: Runtime, watch: Stopwatch
) -> Iterator[Comparison]:
    images, labels = noise_batch(args.bs, image_size(args), runtime)
    model = fresh_model(args.net).to(runtime.device)
    bare = without_gates(model)
    ways = {
        "forward and backward": (bare, lambda model: forward_backward(model, images, labels)),
        "ours": (model, lambda model: score_select_cut(model, images, labels, args.p)),
        "torch-pruning": (bare, lambda model: with_torch_pruning(model, images, labels, args.p)),
    }
    if importlib.util.find_spec("torch_pruning") is None:
        print("torch-pruning is not installed, and left out; see requirements-dev.txt")
        del ways["torch-pruning"]
    contenders = [
        Contender(name, run, partial(copy.deepcopy, source)) for name, (source, run) in ways.items()
    ]
    comparison = watch.compare(f"{args.net}, batch {args.bs}", contenders, args.bs)
    for name, (source, run) in ways.items():
        peak = peak_bytes(run, copy.deepcopy(source), runtime.device)
        comparison.facts[f"peak memory, MB, {name}"] = round(peak / 1e6, 1)
    yield comparison


def forward_backward(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model.train()(images), labels).backward()


def score_select_cut(model: GatedModel, images: Tensor, labels: Tensor, p: float) -> None:
    saliency = channel_saliency(model, images, labels)
    prune(model, select_channels(model.channel_groups(), saliency, p))


def with_torch_pruning(model: nn.Module, images: Tensor, labels: Tensor, p: float) -> None:
    import torch_pruning as tp

    head = model.get_submodule(model.head)
    pruner = tp.pruner.BasePruner(
        model, images[:1], tp.importance.GroupTaylorImportance(), global_pruning=True,
        pruning_ratio=p, ignored_layers=[head],
    )  # fmt: skip
    forward_backward(model, images, labels)
    pruner.step()


def peak_bytes(run: Callable[[nn.Module], None], model: nn.Module, device: torch.device) -> int:
    """The most that was allocated at any moment of a run, on top of what there was before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(model)
        return torch.cuda.max_memory_allocated(device) - before
    with quiet_profile(profile_memory=True) as watched:
        run(model)
    with tempfile.TemporaryDirectory() as folder:
        watched.export_chrome_trace(str(file := Path(folder) / "trace.json"))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    alive: dict[int, int] = {}
    total = peak = 0
    for change in sorted(changes, key=lambda event: event["ts"]):
        address, size = change["args"]["Addr"], change["args"]["Bytes"]
        if size < 0:  # what was there before the run does not count when it goes
            size = -alive.pop(address, 0)
        else:
            alive[address] = size
        total += size
        peak = max(peak, total)
    return peak
