"""Where a run is: everything that last.pth holds, to continue the run to the same bits."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.checkpoint import Checkpoint
from utils.distributed import Runtime
from utils.pruning import PruningPlan
from utils.run.record import Json, Record


@dataclass
class RunState:
    """The state of a run; mutable."""

    model: nn.Module  # the bare network as it is now
    record: Record
    # The channels that stay, planned so far; the indices count the baseline's channels.
    plan: PruningPlan = field(default_factory=lambda: PruningPlan({}))
    round: int = 0  # index of the present round
    # What ``utils.finetune.fit`` takes as ``resume``, if this round is resumed in its training.
    training: Mapping[str, Any] | None = None
    seconds: float = 0.0  # spent by earlier processes, up to their last checkpoint

    @property
    def epochs_before(self) -> int:
        """Epochs of earlier rounds."""
        return sum(epoch["round"] <= self.round for epoch in self.record.history)

    def to_save(self, training: Mapping[str, Any], runtime: Runtime, seconds: float) -> Json:
        """What last.pth holds besides the weights; ``training`` is the present state of ``fit``."""
        record, here = self.record.as_json(), {"round": self.round, "plan": self.plan.keep}
        place = {"seconds": seconds, "place": place_of(runtime), "random": random_state()}
        return {**training, **here, "record": record, **place}

    @classmethod
    def from_checkpoint(cls, last: Checkpoint) -> RunState:
        """The state that a last.pth holds. Every random stream is set to its saved state, too."""
        saved = last.meta["training"]
        set_random_state(saved["random"])
        record, plan = Record.from_json(saved["record"]), PruningPlan(saved["plan"])
        return cls(last.model, record, plan, saved["round"], saved, saved["seconds"])


def place_of(runtime: Runtime) -> dict[str, int]:
    """What the bits of a run depend on, besides its configuration."""
    threads = {"threads": torch.get_num_threads()} if runtime.device.type == "cpu" else {}
    return {"ranks": runtime.world_size, "GPUs": len(runtime.gpus), **threads}


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and CUDA's generators, as tensors and numbers."""
    version, python, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(python), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of ``random_state``. With another number of GPUs, CUDA's state is not set."""
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])
