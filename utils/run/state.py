"""Where a run is: everything that last.pth holds to continue it to the same bits."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from models import GatedModel
from utils.checkpoint import Checkpoint
from utils.distributed import Runtime
from utils.pruning import PruningPlan
from utils.run.record import Record


@dataclass
class RunState:
    """The state of a run; mutable.

    Attributes:
        model: the bare network as it is now.
        record: what is known so far.
        plan: the channels kept of the network that the run began with, as planned so far.
        round: index of the present round.
        training: where ``utils.finetune.fit`` is in this round, as its ``resume`` takes it: epoch,
            batch, sums of the begun epoch, optimiser, schedule, gradient scaler. None before the
            round's cut.
        seconds: how long earlier processes have worked on the run, up to their last checkpoint.
    """

    model: GatedModel
    record: Record
    plan: PruningPlan = field(default_factory=lambda: PruningPlan({}))
    round: int = 0
    training: Mapping[str, Any] | None = None
    seconds: float = 0.0

    @property
    def epochs_before(self) -> int:
        """Epochs of earlier rounds."""
        return sum(epoch["round"] <= self.round for epoch in self.record.history)

    def to_save(
        self, training: Mapping[str, Any], runtime: Runtime, seconds: float
    ) -> dict[str, Any]:
        """What last.pth holds besides the weights; ``training`` is the state of ``fit`` by now."""
        return {
            **training, "round": self.round, "plan": self.plan.keep,
            "record": self.record.as_json(), "seconds": seconds, "place": place_of(runtime),
            "random": random_state(),
        }  # fmt: skip

    @classmethod
    def from_checkpoint(cls, last: Checkpoint) -> RunState:
        """The state that a last.pth holds; the random streams continue from there, too."""
        saved = last.meta["training"]
        set_random_state(saved["random"])
        return cls(
            last.model, Record.from_json(saved["record"]), PruningPlan(saved["plan"]),
            saved["round"], saved, saved["seconds"],
        )  # fmt: skip


def place_of(runtime: Runtime) -> dict[str, int]:
    """What the bits of a run depend on, besides its configuration."""
    threads = {"threads": torch.get_num_threads()} if runtime.device.type == "cpu" else {}
    return {"ranks": runtime.world_size, "GPUs": len(runtime.gpus), **threads}


def random_state() -> dict[str, Any]:
    """The state of every random stream: of Python, NumPy, torch, and CUDA where there is one."""
    version, python, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(python), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of ``random_state``; CUDA's stays where the number of GPUs is another."""
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])
