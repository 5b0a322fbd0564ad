"""What it costs to score, select and cut, against one bare forward and backward of the same batch.

Beside it torch-pruning (requirements-dev.txt), which does the same job by tracing: dependency
graph, Taylor importance, prune. Speeds below 1 cost more than the bare pass. Memory is the most
that was allocated at any moment on top of the network and the batch.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from models import Gate, GatedModel
from tools.benchmark.timing import Comparison, Contender, Stopwatch, quiet_profile
from tools.benchmark.workload import add_workload_flags, fresh_model, noise_batch
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
    images, labels = noise_batch(args, runtime)
    model = fresh_model(args.net).to(runtime.device)
    ways = {
        "forward and backward": lambda model: forward_backward(model, images, labels),
        "ours": lambda model: score_select_cut(model, images, labels, args.p),
    }
    sources = dict.fromkeys(ways, model)
    if importlib.util.find_spec("torch_pruning"):
        name = "torch-pruning"
        ways[name] = lambda model: with_torch_pruning(model, images, labels, args.p)
        sources[name] = without_gates(model)

    def copies_of(source: nn.Module) -> Callable[[], nn.Module]:
        return lambda: copy.deepcopy(source)

    contenders = [Contender(name, run, copies_of(sources[name])) for name, run in ways.items()]
    title = f"{args.net}, batch {args.bs}"
    comparison = watch.compare(title, contenders, args.bs)
    for name, run in ways.items():
        peak = peak_bytes(run, copy.deepcopy(sources[name]))
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


def without_gates(model: GatedModel) -> nn.Module:
    """What other libraries can trace."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Gate):
            model.set_submodule(name, nn.Identity())
    return model


def peak_bytes(run: Callable[[nn.Module], None], model: nn.Module) -> int:
    """The most that was allocated at any moment of a run, by torch's own allocator."""
    with quiet_profile(profile_memory=True) as watched:
        run(model)
    with tempfile.TemporaryDirectory() as folder:
        watched.export_chrome_trace(str(file := Path(folder) / "trace.json"))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [
        event["args"]["Bytes"]
        for event in sorted(events, key=lambda event: event.get("ts", 0))
        if event["name"] == "[memory]"
    ]
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak
