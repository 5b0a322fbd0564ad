"""What the benchmark is made of: timing in turn, memory, networks and made-up images."""

from __future__ import annotations

import gc
from argparse import Namespace as Args
from collections import deque
from collections.abc import Callable, Mapping
from itertools import accumulate
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, get_num_threads, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook
from torch.profiler import profile

from models import IMAGENET_NETWORKS, Gate, build_model, channel_groups, structure
from utils.cost import model_cost
from utils.data.small import CIFAR10_NORMALISATION, ImageBatches, ImageSet
from utils.distributed import Runtime
from utils.finetune import Trainer
from utils.metrics import RunningMetrics
from utils.pruning import select_channels
from utils.recipes import CIFAR_BASELINE
from utils.saliency import channel_saliency
from utils.surgery import prune

exhaust = deque(maxlen=0).extend  # takes an iterator to its end


def compare(
    title: str,
    images: int,
    runs: Mapping[str, Callable[..., Any]],
    *,
    rounds: int,
    profiled: bool = False,
    prepare: Callable[[str], tuple] = lambda name: (),
    seconds: float = 0,
) -> dict[str, Any]:
    """Time the runs in turn, each once off the clock and once on it in every round.

    Every round begins with another one, so that what else the machine does disturbs all alike. A
    run goes through ``images``, with the arguments that ``prepare`` makes for its name, off the
    clock. A round repeats a short run until it took ``seconds``. ``profiled``: each runs once more,
    to show which operators take the time.

    A "speed" is the ratio of the median times of the first run and another; "rounds" has the lowest
    and the highest ratio of a round.
    """
    from torch.utils.benchmark import Measurement, Timer

    times: dict[str, list[Measurement]] = {name: [] for name in runs}
    order = deque(runs)
    for _ in range(rounds):
        for name in order:
            known = {"run": runs[name], "prepare": prepare, "name": name}
            setup = {"setup": "arguments = prepare(name)", "num_threads": get_num_threads()}
            timer = Timer("run(*arguments)", globals=known, **setup)
            times[name].append(timer.blocked_autorange(min_run_time=seconds))
        order.rotate(-1)
    medians = {name: [round.median for round in found] for name, found in times.items()}
    first, rows, profiles = next(iter(medians.values())), [], {}
    for name, each in medians.items():
        ratios = [a / b for a, b in zip(first, each, strict=True)]
        row = {"name": name, "seconds": each, "median": median(each)}
        row |= {"iqr": Measurement.merge(times[name])[0].iqr}
        row |= {"images_per_second": images / median(each)}
        row |= {"speed": median(first) / median(each), "rounds": [min(ratios), max(ratios)]}
        rows.append(row)
    sort = f"self_{'device' if torch.cuda.is_available() else 'cpu'}_time_total"
    for name in runs if profiled else ():
        arguments = prepare(name)
        with profile() as watched:
            runs[name](*arguments)
        profiles[name] = watched.key_averages().table(sort, 10, max_name_column_width=40)
    return {"title": title, "images": images, "contenders": rows, "facts": {}, "profiles": profiles}


def as_text(comparison: Mapping[str, Any]) -> str:
    """The table of what ``compare`` returned, with the "facts" that were added."""
    rows, title = comparison["contenders"], comparison["title"]
    width = max(len(name) for name in [title, *(row["name"] for row in rows)])
    lines = [f"{title:{width}}   seconds       iqr   images/s   speed  (lowest, highest round)"]
    for row in rows:
        numbers = f"{row['median']:8.4f}  {row['iqr']:8.4f}  {row['images_per_second']:9.0f}"
        low, high = row["rounds"]
        spread = f"{row['speed']:6.2f}  ({low:.2f}, {high:.2f})"
        lines.append(f"{row['name']:{width}}  {numbers}  {spread}")
    lines += [f"{name}: {value}" for name, value in comparison["facts"].items()]
    lines += [f"\n{name}:\n{table}" for name, table in comparison["profiles"].items()]
    return "\n".join(lines)


def activations(model: nn.Module, images: Tensor) -> int:
    """How many numbers come out of all BatchNorms for these images."""
    sizes = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if isinstance(module, _BatchNorm):
            sizes.append(output.numel())

    with torch.no_grad(), register_module_forward_hook(note):
        model.eval()(images)
    return sum(sizes)


def peak_bytes(run: Callable[..., Any], arguments: tuple, device: torch.device) -> int:
    """The most that was allocated at any moment of a run, on top of what there was before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(*arguments)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True) as watched:
        run(*arguments)
    # The profiler does not know memory from before the run, and reports nothing when that goes.
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes), default=0)


def image_size(args: Args) -> int:
    """Side of the images; InputError where they are too small for the network."""
    size = args.image_size or (224 if args.net in IMAGENET_NETWORKS else 32)
    model_cost(build_model(args.net), size)
    return size


def fresh_model(net: str, gates: bool = True) -> nn.Module:
    """The same weights every time; without gates, as anybody else would have written it."""
    torch.manual_seed(0)
    model = build_model(net)
    for name, module in list(model.named_modules()):
        if isinstance(module, Gate) and not gates:
            model.set_submodule(name, nn.Identity())
    return model


def noise_batches(number: int, batch: int, size: int, runtime: Runtime) -> ImageBatches:
    """Training batches of noise, which takes as long to train on as photos."""
    stream = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (number, 3, size, size), dtype=torch.uint8, generator=stream)
    images = ImageSet(pixels, torch.arange(number) % 10)
    return ImageBatches(images, batch, CIFAR10_NORMALISATION, runtime, augment=True)


def noise_batch(args: Args, runtime: Runtime) -> tuple[Tensor, Tensor]:
    return next(iter(noise_batches(args.bs, args.bs, image_size(args), runtime)))


def training(args: Args, runtime: Runtime, gates: bool = True) -> tuple[Trainer, ImageBatches]:
    """What an epoch takes; all networks have the same weights."""
    batches = noise_batches(args.batches * args.bs, args.bs, image_size(args), runtime)
    return Trainer(fresh_model(args.net, gates), CIFAR_BASELINE, runtime), batches


def plain_epoch(trainer: Trainer, batches: ImageBatches) -> tuple[float, float]:
    """The loop that most people write; returns the loss and the accuracy in %."""
    model, optimizer = trainer.model.train(), trainer.optimizer
    loss_sum, hits = 0.0, 0
    for images, labels in batches:
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(labels)
        hits += (logits.argmax(1) == labels).sum().item()
    return loss_sum / batches.images, 100 * hits / batches.images


def our_epoch(trainer: Trainer, batches: ImageBatches) -> tuple[float, float]:
    """That of ``utils.finetune``, without its progress bar."""
    sums = RunningMetrics(trainer.runtime)
    exhaust(trainer.train(batches, sums, "the benchmark"))
    metrics = sums.metrics()
    return metrics.loss, metrics.accuracy


def forward_backward(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model.train()(images), labels).backward()


def score_select_cut(
    model: nn.Module, images: Tensor, labels: Tensor, p: float = 0.5, **scoring: bool
) -> nn.Module:
    saliency = channel_saliency(model, images, labels, **scoring)
    return prune(model, select_channels(channel_groups(model), saliency, p))


def with_torch_pruning(model: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    from torch_pruning import importance, pruner

    head, taylor = model.get_submodule(structure(model).head), importance.GroupTaylorImportance()
    options = {"global_pruning": True, "pruning_ratio": 0.5, "ignored_layers": [head]}
    pruning = pruner.BasePruner(model, images[:1], taylor, **options)
    forward_backward(model, images, labels)
    pruning.step()
    return model
