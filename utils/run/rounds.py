"""The rounds of a run, and where in them it is: all that last.pth holds to continue it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from models import pruning_stages
from utils.checkpoint import Checkpoint
from utils.distributed import Runtime
from utils.finetune import Epoch
from utils.pruning import PruningPlan
from utils.recipes import Recipe, Recipes
from utils.run.record import Json, Record
from utils.saliency import Scoring
from utils.selection import Goal


@dataclass(frozen=True)
class Round:
    """One cut, and the training after it. By default a round only trains."""

    recipe: Recipe  # how to train
    scores: bool = False  # score the network and select channels first
    share: float = 1.0  # how much of the whole goal is reached after this round
    groups: tuple[str, ...] | None = None  # cut these of the plan; None: all that this selects
    fresh: bool = False  # train from fresh weights
    head: bool = False  # train the classifier alone


@dataclass(frozen=True)
class Pruning:
    """What the command line asks of a pruning run."""

    scoring: Scoring  # how channels are scored
    goal: Goal  # how much goes
    rounds: tuple[Round, ...]
    recalibrate: int  # batches for new running statistics of BatchNorm after a cut; 0: keep them
    method: str  # the rounds in words


def new_head(recipes: Recipes, epochs: int) -> Round:
    """Train a fresh classifier first, at one rate: scores through random weights say nothing."""
    constant = {"milestones": (), "cosine": None, "ema": None}
    return Round(replace(recipes.one_shot, epochs=epochs, **constant), head=True)


def in_steps(count: int, recipes: Recipes) -> list[Round]:
    """Score anew in round i, and reach i / count of the goal; then a round that only trains."""
    rounds = [Round(recipes.stage, scores=True, share=i / count) for i in range(1, count + 1)]
    if recipes.one_shot.epochs:
        rounds.append(Round(recipes.one_shot))
    return rounds


def smooth(model: nn.Module, recipes: Recipes) -> list[Round]:
    """Score once, and cut one of the ``pruning_stages`` a round; then a round that only trains."""
    parts = enumerate(pruning_stages(model))
    rounds = [Round(recipes.stage, scores=i == 0, groups=groups) for i, groups in parts]
    return [*rounds, Round(recipes.final)]


@dataclass
class RunState:
    """Where a run is; mutable."""

    model: nn.Module  # the bare network as it is now
    record: Record
    # The channels that stay, planned so far; the indices count the baseline's channels.
    plan: PruningPlan = field(default_factory=lambda: PruningPlan({}))
    round: int = 0  # index of the present round
    # What ``utils.finetune.fit`` takes as ``resume``, if this round is resumed in its training.
    training: Mapping[str, Any] | None = None

    @property
    def epochs(self) -> list[Epoch]:
        """The epochs of the present round."""
        return [Epoch.from_dict(e) for e in self.record.history if e["round"] == self.round + 1]

    @property
    def best(self) -> Epoch | None:
        """The epoch of this round with the best test or holdout accuracy; the first of equals."""
        return max(self.epochs, key=lambda epoch: epoch.test.accuracy, default=None)

    def to_save(self, training: Mapping[str, Any], runtime: Runtime, seconds: float) -> Json:
        """What last.pth holds besides the weights; ``training`` is the present state of ``fit``."""
        here = {"round": self.round, "plan": self.plan.keep, "record": self.record.as_json()}
        place = {"seconds": seconds, "place": place_of(runtime), "random": random_state()}
        return {**training, **here, **place}

    @classmethod
    def from_checkpoint(cls, last: Checkpoint) -> RunState:
        """The state that a last.pth holds. Every random stream is set to its saved state, too."""
        saved = last.meta["training"]
        set_random_state(saved["random"])
        record, plan = Record.from_json(saved["record"]), PruningPlan(saved["plan"])
        return cls(last.model, record, plan, saved["round"], saved)


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
