"""What the benchmark is made of: timing in turn, memory, networks and made-up images."""

from __future__ import annotations

import copy
import gc
from argparse import Namespace as Args
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import profile

from models import IMAGENET_NETWORKS, Gate, GatedModel, build_model
from utils.checkpoint import load_checkpoint
from utils.cost import model_cost
from utils.data.small import CIFAR10_NORMALISATION, ImageBatches, ImageSet
from utils.distributed import Runtime
from utils.errors import InputError
from utils.finetune import Trainer
from utils.metrics import RunningMetrics
from utils.pruning import select_channels
from utils.recipes import CIFAR_BASELINE
from utils.saliency import channel_saliency
from utils.surgery import prune as cut

exhaust = deque(maxlen=0).extend  # goes through all there is


def compare(
    title: str, images: int, runs: Mapping[str, Callable[..., Any]], *, rounds: int,
    profiled: bool = False, prepare: Callable[[str], tuple] = lambda name: (), seconds: float = 0,
) -> dict[str, Any]:  # fmt: skip
    """Time the runs in turn, each once off the clock and once on it in every round.

    Every round begins with another one, so that what else the machine does disturbs all alike.
    Each goes through ``images`` with the arguments that ``prepare`` makes for its name, off the
    clock. Short runs are repeated until a round has measured ``seconds`` of them; 0 means one run.
    ``profiled``: each runs once more, to show which operators take the time.
    """
    from torch.utils.benchmark import Measurement, Timer

    names, rows, profiles = list(runs), [], {}
    times: dict[str, list[Measurement]] = {name: [] for name in names}
    for turn in range(rounds):
        turn %= len(names)
        for name in names[turn:] + names[:turn]:
            timer = Timer(
                "run(*arguments)", "arguments = prepare(name)",
                globals={"run": runs[name], "prepare": prepare, "name": name},
                num_threads=torch.get_num_threads(),
            )  # fmt: skip
            times[name].append(timer.blocked_autorange(min_run_time=seconds))
    for name, results in times.items():
        per_round = [result.median for result in results]
        middle, iqr = median(per_round), Measurement.merge(results)[0].iqr
        ratio, lowest, highest = speed([result.median for result in times[names[0]]], per_round)
        rows.append({
            "name": name, "seconds": per_round, "median": middle, "iqr": iqr,
            "images_per_second": images / middle,
            "speed": ratio, "speed_lowest": lowest, "speed_highest": highest,
        })  # fmt: skip
    for name in names if profiled else ():
        arguments, kind = prepare(name), "device" if torch.cuda.is_available() else "cpu"
        with profile() as watched:
            runs[name](*arguments)
        table = watched.key_averages().table
        profiles[name] = table(f"self_{kind}_time_total", 10, max_name_column_width=40)
    return {"title": title, "images": images, "contenders": rows, "facts": {}, "profiles": profiles}


def speed(reference: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast as the reference: the ratio of the medians, and the lowest and the
    highest ratio of a round.
    """
    ratios = [a / b for a, b in zip(reference, times, strict=True)]
    return median(reference) / median(times), min(ratios), max(ratios)


def as_text(comparison: Mapping[str, Any]) -> str:
    """The table of what ``compare`` returned, with the "facts" that were added."""
    rows, title = comparison["contenders"], comparison["title"]
    width = max(len(name) for name in [title, *(row["name"] for row in rows)])
    form = ("{name:{width}}  {median:8.4f}  {iqr:8.4f}  {images_per_second:9.0f}  {speed:6.2f}"
            "  ({speed_lowest:.2f}, {speed_highest:.2f})")  # fmt: skip
    lines = [f"{title:{width}}   seconds       iqr   images/s   speed  (lowest, highest round)"]
    lines += [form.format(width=width, **row) for row in rows]
    lines += [f"{name}: {value}" for name, value in comparison["facts"].items()]
    lines += [f"\n{name}:\n{table}" for name, table in comparison["profiles"].items()]
    return "\n".join(lines)


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


def saved_bytes(model: GatedModel, image_size: int) -> tuple[int, int]:
    """Bytes that one image keeps for the backward pass, plainly and with activation checkpointing.

    With checkpointing that is what is saved outside of the blocks, every block's input,
    and the inside of the one block that is being computed again.
    """
    images = 2**20  # only shapes; beside so many, weights and other constants do not count
    total, places, alive = Counter(), ["outside"], {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in alive:
            alive[storage._cdata] = storage  # so that no later storage takes its address
            total[places[-1]] += storage.nbytes()
        return tensor

    def enter(block: nn.Module, inputs: tuple[Tensor]) -> None:
        places.append(block)
        total["inputs"] += inputs[0].nbytes

    def leave(*_: Any) -> None:
        places.pop()

    model = model.to("meta").train()
    for block in model.checkpoint_blocks():
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    batch = torch.empty(images, 3, image_size, image_size, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        F.cross_entropy(model(batch), torch.zeros(images, dtype=torch.long, device="meta"))
    inputs, outside = total.pop("inputs", 0) // images, total.pop("outside") // images
    blocks = [size // images for size in total.values()]
    return outside + sum(blocks), outside + inputs + max(blocks, default=0)


def image_size(args: Args) -> int:
    """Side of the images; InputError where they are too small for the network."""
    size = args.image_size or (224 if args.net in IMAGENET_NETWORKS else 32)
    model_cost(build_model(args.net), size)
    return size


def fresh_model(net: str, gates: bool = True) -> GatedModel:
    """The same weights every time; without gates, as anybody else would have written it."""
    torch.manual_seed(0)
    model = build_model(net)
    for name, module in list(model.named_modules()):
        if isinstance(module, Gate) and not gates:
            model.set_submodule(name, nn.Identity())
    return model


def noise_batches(
    number: int, batch: int, size: int, runtime: Runtime
) -> tuple[ImageBatches, ImageSet]:
    """Training batches of images that cost what others do, and the images."""
    stream = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (number, 3, size, size), dtype=torch.uint8, generator=stream)
    images = ImageSet(pixels, torch.arange(number) % 10)
    return ImageBatches(images, batch, CIFAR10_NORMALISATION, runtime, augment=True), images


def noise_batch(args: Args, runtime: Runtime) -> tuple[Tensor, Tensor]:
    return next(iter(noise_batches(args.bs, args.bs, image_size(args), runtime)[0]))


def training(args: Args, runtime: Runtime, gates: bool = True) -> tuple[Trainer, ImageBatches]:
    """What an epoch takes; all networks have the same weights."""
    batches, _ = noise_batches(args.batches * args.bs, args.bs, image_size(args), runtime)
    return Trainer(fresh_model(args.net, gates), CIFAR_BASELINE, runtime), batches


def plain_epoch(trainer: Trainer, batches: ImageBatches) -> tuple[float, float]:
    """What one writes without a second thought; returns the loss and the accuracy in %."""
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


def forward_backward(model: nn.Module, images: Tensor, labels: Tensor, _: float = 0) -> None:
    F.cross_entropy(model.train()(images), labels).backward()


def score_select_cut(model: GatedModel, images: Tensor, labels: Tensor, p: float) -> nn.Module:
    saliency = channel_saliency(model, images, labels)
    return cut(model, select_channels(model.channel_groups(), saliency, p))


def with_torch_pruning(model: nn.Module, images: Tensor, labels: Tensor, p: float) -> nn.Module:
    from torch_pruning import importance, pruner

    head, taylor = model.get_submodule(model.head), importance.GroupTaylorImportance()
    options = {"global_pruning": True, "pruning_ratio": p, "ignored_layers": [head]}
    pruning = pruner.BasePruner(model, images[:1], taylor, **options)
    forward_backward(model, images, labels)
    pruning.step()
    return model


def before_and_after(args: Args, runtime: Runtime) -> Iterator[tuple[str, GatedModel]]:
    """The network unpruned and pruned; puts into ``args`` what its checkpoint says."""
    if bool(args.checkpoint) != bool(args.pruned):
        raise InputError("--checkpoint and --pruned go together: the same network before and after")
    if args.checkpoint:
        whole, pruned = load_checkpoint(args.checkpoint), load_checkpoint(args.pruned).model
        model, args.net = whole.model, whole.model.net
        args.image_size = args.image_size or whole.meta.get("image_size")
        if pruned.net != args.net:
            raise InputError(f"{args.pruned} is a {pruned.net}, {args.checkpoint} a {args.net}")
    else:
        model = fresh_model(args.net).to(runtime.device)
        saliency = channel_saliency(model, *noise_batch(args, runtime))
        plan = select_channels(model.channel_groups(), saliency, args.p, round_to=args.round_to)
        pruned = cut(copy.deepcopy(model), plan)
    yield from {"unpruned": model, "pruned": pruned}.items()
