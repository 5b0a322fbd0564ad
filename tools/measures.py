"""Seconds and bytes: contenders timed in turn, and the memory that training takes."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.benchmark import Measurement, Timer

from models import GatedModel


def compare(
    title: str, images: int, runs: Mapping[str, Callable[..., Any]], *, rounds: int,
    profiled: bool = False, prepare: Callable[[str], tuple] = lambda name: (), seconds: float = 0,
) -> dict[str, Any]:  # fmt: skip
    """Time the runs in turn, each once off the clock and once on it in every round.

    Every round begins with another one, so that what else the machine does disturbs all alike.

    Args:
        title, images: what is compared, and how many images a run goes through.
        runs: by name; ratios refer to the first.
        rounds: how many.
        profiled: run each once more, to see which operators take the time.
        prepare: makes the arguments of a run before it, off the clock.
        seconds: repeat a short run until a round has measured so many; 0 for one run a round.
    """
    names, times, profiles = list(runs), {name: [] for name in runs}, {}
    timers = {
        name: Timer("run(*arguments)", "arguments = prepare(name)",
                    globals={"run": run, "prepare": prepare, "name": name},
                    num_threads=torch.get_num_threads())
        for name, run in runs.items()
    }  # fmt: skip
    for first in range(rounds):
        first %= len(names)
        for name in [*names[first:], *names[:first]]:
            gc.collect()  # what others left behind
            times[name].append(timers[name].blocked_autorange(min_run_time=seconds))
    for name, run in runs.items() if profiled else ():
        arguments, kind = prepare(name), "device" if torch.cuda.is_available() else "cpu"
        with quiet_profile() as watched:
            run(*arguments)
        table = watched.key_averages().table
        profiles[name] = table(f"self_{kind}_time_total", 10, max_name_column_width=40)
    rows = [_row(name, images, times[name], times[names[0]]) for name in names]
    return {"title": title, "images": images, "contenders": rows, "profiles": profiles}


def _row(
    name: str, images: int, rounds: list[Measurement], reference: list[Measurement]
) -> dict[str, Any]:
    (total,), seconds = Measurement.merge(rounds), [measured.median for measured in rounds]
    ratio, lowest, highest = speed([measured.median for measured in reference], seconds)
    return {
        "name": name, "seconds": seconds, "median": median(seconds), "iqr": total.iqr,
        "images_per_second": images / median(seconds),
        "speed": ratio, "speed_lowest": lowest, "speed_highest": highest,
    }  # fmt: skip


def speed(reference: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast as the reference: the ratio of the medians, and the lowest and the
    highest ratio of a round.
    """
    ratios = [a / b for a, b in zip(reference, times, strict=True)]
    return median(reference) / median(times), min(ratios), max(ratios)


def as_text(comparison: Mapping[str, Any]) -> str:
    """What ``compare`` returned as a table, with "facts" that were added to it below."""
    width = max(
        len(row["name"]) for row in [*comparison["contenders"], {"name": comparison["title"]}]
    )
    row = ("{name:{width}}  {median:8.4f}  {iqr:8.4f}  {images_per_second:9.0f}  {speed:6.2f}"
           "  ({speed_lowest:.2f}, {speed_highest:.2f})")  # fmt: skip
    head = "   seconds       iqr   images/s   speed  (lowest, highest round)"
    lines = [f"{comparison['title']:{width}}{head}"]
    lines += [row.format(width=width, **values) for values in comparison["contenders"]]
    lines += [f"{name}: {value}" for name, value in comparison.get("facts", {}).items()]
    return "\n".join(
        lines + [f"\n{name}:\n{text}" for name, text in comparison["profiles"].items()]
    )


def quiet_profile(**options: Any) -> profile:
    """torch's profiler, without its messages on the terminal."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return profile(**options)


def peak_bytes(run: Callable[..., Any], arguments: tuple, device: torch.device) -> int:
    """The most that was allocated at any moment of a run, on top of what there was before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(*arguments)
        return torch.cuda.max_memory_allocated(device) - before
    with quiet_profile(profile_memory=True) as watched:
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
    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.device("meta"),
    ):
        logits = model(torch.empty(images, 3, image_size, image_size))
        F.cross_entropy(logits, torch.zeros(images, dtype=torch.long))
    inputs, outside = total.pop("inputs", 0) // images, total.pop("outside") // images
    blocks = [size // images for size in total.values()]
    return outside + sum(blocks), outside + inputs + max(blocks, default=0)
