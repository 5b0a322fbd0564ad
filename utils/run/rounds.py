"""The rounds of a pruning run: what each one cuts, and how it trains afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from models import pruning_stages
from utils.recipes import Recipe, Recipes
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

    def in_words(self, cut: Sequence[str]) -> str:
        """What the log says of it, where these groups have lost channels."""
        if self.head:
            return "train the new classifier alone"
        return f"cut {', '.join(cut)}" if cut else "nothing to cut"


@dataclass(frozen=True)
class Pruning:
    """What the command line asks of a pruning run."""

    scoring: Scoring  # how channels are scored
    goal: Goal  # how much goes
    rounds: tuple[Round, ...]
    recalibrate: int  # batches for new running statistics of BatchNorm after a cut; 0: keep them
    method: str  # the rounds in words


def new_head(recipes: Recipes, epochs: int) -> tuple[Round, ...]:
    """What comes before the others: a fresh classifier is trained, at a constant learning rate.

    Scores through random weights would say nothing about the data.
    """
    constant = {"milestones": (), "cosine": None, "ema": None}
    return (Round(replace(recipes.one_shot, epochs=epochs, **constant), head=True),)


def one_shot(recipes: Recipes) -> tuple[Round, ...]:
    """Cut everything at once, then fine-tune."""
    return (Round(recipes.one_shot, scores=True),)


def from_scratch(recipes: Recipes) -> tuple[Round, ...]:
    """The control: train the pruned shape from fresh weights by the baseline's recipe."""
    return (Round(recipes.scratch, scores=True, fresh=True),)


def in_steps(count: int, recipes: Recipes) -> tuple[Round, ...]:
    """Score anew in round i, and reach i / count of the goal; then a round that only trains."""
    rounds = [Round(recipes.stage, scores=True, share=i / count) for i in range(1, count + 1)]
    return (*rounds, *([Round(recipes.one_shot)] if recipes.one_shot.epochs else []))


def smooth(model: nn.Module, recipes: Recipes) -> tuple[Round, ...]:
    """Score once, and cut one part of the plan a round; then a round that only trains.

    A part is a group or a residual block: see ``GatedModel.pruning_stages``.
    """
    parts = enumerate(pruning_stages(model))
    rounds = [Round(recipes.stage, scores=i == 0, groups=groups) for i, groups in parts]
    return (*rounds, Round(recipes.final))
