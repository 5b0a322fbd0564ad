"""The cost of a network: multiply-adds and parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models import Gate, structure
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
    the meta device runs, so no memory is taken and ``model`` stays as it is.

    Raises InputError if the images are too small for the network.
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
    """The median time of a call, after one that does not count; it waits for CUDA.

    Calls are repeated until they took ``measured_for`` seconds.
    """
    from torch.utils.benchmark import Timer

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=measured_for).median
