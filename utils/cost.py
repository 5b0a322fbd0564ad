"""The cost of a network: multiply-adds, parameters, and measured time."""

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from models import Gate, structure
from models.gate import deployable
from models.trace import on_meta
from utils.errors import InputError


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one image (papers on pruning call them FLOPs), and parameters."""

    macs: int
    params: int

    def __str__(self) -> str:
        return f"{self.macs / 1e6:.2f} M multiply-adds and {self.params / 1e6:.3f} M parameters"


def model_cost(model: nn.Module, image_size: int) -> Cost:
    """Cost of one RGB image of ``image_size`` x ``image_size`` pixels, in eval mode.

    MACs are those of convolutions and linear layers. Gates do not count as parameters. A copy on
    the meta device runs: it takes no memory. Raises InputError if the images are too small.
    """
    from torch.utils.flop_counter import FlopCounterMode

    shapes = on_meta(model).eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            shapes(torch.empty(1, 3, image_size, image_size, device="meta"))
    except RuntimeError as error:
        misfit = f"images of {image_size} pixels do not fit {structure(model).net}"
        raise InputError(f"{misfit} ({error})") from error
    gates = sum(module.gate.numel() for module in model.modules() if isinstance(module, Gate))
    params = sum(parameter.numel() for parameter in model.parameters()) - gates
    return Cost(counter.get_total_flops() // 2, params)  # torch counts two FLOPs per MAC


def seconds(run: Callable[[], Any], measured_for: float = 0.5) -> float:
    """The median time of calls that take ``measured_for`` seconds together, after a first one that
    does not count. It waits for CUDA.
    """
    # Its import would warn of a CUDA toolkit without a GPU, in every run.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=measured_for).median


@dataclass(frozen=True)
class Latency:
    """Seconds that a batch of images takes in two networks, which were timed in turn: medians.

    ``spread`` is the largest deviation of the ratio after / before from its median, as a share.
    """

    batch: int  # images at once
    before: float
    after: float
    spread: float

    @property
    def share(self) -> float:
        return self.after / self.before

    def in_ms(self) -> dict[str, float]:
        before, after = round(1000 * self.before, 4), round(1000 * self.after, 4)
        return {"before": before, "after": after, "spread": self.spread}

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % of the time (+-{100 * self.spread:.1f} %)"


def latency(
    networks: Sequence[nn.Module], image_size: int, batch: int, turns: int = 5, of: float = 0.05
) -> Latency:
    """Time an unpruned and a pruned network, as they are deployed, on the device of the pruned one.

    Each of the two ``networks`` has so many ``turns``, of at least ``of`` seconds, with ``batch``
    images of ``image_size`` pixels.
    """
    device = next(networks[1].parameters()).device
    stream = torch.Generator().manual_seed(0)  # the global random state stays
    images = torch.randn(batch, 3, image_size, image_size, generator=stream)
    images = images.to(device, memory_format=torch.channels_last)
    old, new = (partial(deployable(network).to(device), images) for network in networks)
    with torch.inference_mode():
        times = [(seconds(old, of), seconds(new, of)) for _ in range(turns)]
    before, after = map(statistics.median, zip(*times, strict=True))
    ratios = [second / first for first, second in times]
    middle = statistics.median(ratios)
    return Latency(batch, before, after, max(abs(ratio / middle - 1) for ratio in ratios))
