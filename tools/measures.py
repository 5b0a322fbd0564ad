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
    Each goes through ``images`` with the arguments that ``prepare`` makes for its name, off the
    clock. Short runs are repeated until a round has measured ``seconds`` of them; 0 means one run.
    ``profiled``: each runs once more, to show which operators take the time.
    """
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
        ratio, lowest, highest = speed([result.median for result in times[names[0]]], per_round)
        rows.append({
            "name": name, "seconds": per_round, "median": median(per_round),
            "iqr": Measurement.merge(results)[0].iqr, "images_per_second": images / median(per_round),
            "speed": ratio, "speed_lowest": lowest, "speed_highest": highest,
        })  # fmt: skip
    for name in names if profiled else ():
        arguments, kind = prepare(name), "device" if torch.cuda.is_available() else "cpu"
        with quiet_profile() as watched:
            runs[name](*arguments)
        table = watched.key_averages().table
        profiles[name] = table(f"self_{kind}_time_total", 10, max_name_column_width=40)
    return {"title": title, "images": images, "contenders": rows, "profiles": profiles}


def speed(reference: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast as the reference: the ratio of the medians, and the lowest and the
    highest ratio of a round.
    """
    ratios = [a / b for a, b in zip(reference, times, strict=True)]
    return median(reference) / median(times), min(ratios), max(ratios)


def as_text(comparison: Mapping[str, Any]) -> str:
    """The table of what ``compare`` returned, and "facts" that were added to it."""
    rows, title = comparison["contenders"], comparison["title"]
    width = max(len(name) for name in [title, *(row["name"] for row in rows)])
    form = ("{name:{width}}  {median:8.4f}  {iqr:8.4f}  {images_per_second:9.0f}  {speed:6.2f}"
            "  ({speed_lowest:.2f}, {speed_highest:.2f})")  # fmt: skip
    lines = [f"{title:{width}}   seconds       iqr   images/s   speed  (lowest, highest round)"]
    lines += [form.format(width=width, **row) for row in rows]
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
