"""The rounds of a pruning run: what each cuts, and how it trains after that."""

from __future__ import annotations

from dataclasses import dataclass

from models import GatedModel
from utils.recipes import Recipe, Recipes
from utils.saliency import Scoring
from utils.selection import Goal


@dataclass(frozen=True)
class Round:
    """One cut and the training after it.

    Attributes:
        recipe: how to train.
        scores: whether the network is scored anew and channels are selected.
        share: how much of all that is to go is gone after this round.
        groups: the groups of the plan that this round cuts; None for all that it selects.
        fresh: whether training begins with fresh weights.
    """

    recipe: Recipe
    scores: bool = False
    share: float = 1.0
    groups: tuple[str, ...] | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Pruning:
    """All that the command line asks of a pruning run.

    Attributes:
        scoring: how channels are scored.
        goal: how much goes.
        rounds: in which steps.
        recalibrate: batches that re-estimate BatchNorm's running statistics after a cut; 0: none.
        method: the rounds in words.
    """

    scoring: Scoring
    goal: Goal
    rounds: tuple[Round, ...]
    recalibrate: int
    method: str


def one_shot(recipes: Recipes) -> tuple[Round, ...]:
    """Cut everything at once, then fine-tune."""
    return (Round(recipes.one_shot, scores=True),)


def from_scratch(recipes: Recipes) -> tuple[Round, ...]:
    """The control: the pruned shape with fresh weights, trained by the baseline's recipe."""
    return (Round(recipes.scratch, scores=True, fresh=True),)


def in_steps(count: int, recipes: Recipes) -> tuple[Round, ...]:
    """Score anew in every round, and reach i / count of the goal; then a round that only trains."""
    rounds = [Round(recipes.stage, scores=True, share=i / count) for i in range(1, count + 1)]
    return (*rounds, *([Round(recipes.one_shot)] if recipes.one_shot.epochs else []))


def smooth(model: GatedModel, recipes: Recipes) -> tuple[Round, ...]:
    """Score once, cut the plan part by part; then a round that only trains.

    The parts are those of ``GatedModel.pruning_stages``: one group, or one residual block.
    """
    parts = enumerate(model.pruning_stages())
    rounds = [Round(recipes.stage, scores=i == 0, groups=groups) for i, groups in parts]
    return (*rounds, Round(recipes.final))
