"""Which channels go: the plan that a goal asks for, by a ratio or by a budget."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from models import GatedModel
from utils.cost import Cost, model_cost
from utils.errors import InputError
from utils.pruning import PruningPlan, Ranking, largest_plan, select_channels
from utils.surgery import prune


@dataclass(frozen=True)
class Goal:
    """How much is to go.

    Attributes:
        kind: ``p`` for a share of the gate entries to cut; ``macs`` or ``params`` for a share of
            these that may stay at most.
        value: that share.
        min_channels, round_to, scope: see ``utils.pruning.Ranking``.
    """

    kind: Literal["p", "macs", "params"]
    value: float
    min_channels: int = 1
    round_to: int = 1
    scope: str = "global"

    def at(self, share: float) -> Goal:
        """The goal once a ``share`` of all that is to go is gone."""
        if share == 1:
            return self
        value = self.value * share if self.kind == "p" else 1 - (1 - self.value) * share
        return replace(self, value=value)

    @property
    def limits(self) -> dict[str, int | str]:
        """As ``Ranking`` takes them."""
        names = ("min_channels", "round_to", "scope")
        return {name: getattr(self, name) for name in names}


def select(
    model: GatedModel,
    saliency: Mapping[str, Tensor],
    goal: Goal,
    image_size: int,
    before: Mapping[str, int],
) -> PruningPlan:
    """The most salient channels of a network that meet a goal.

    Args:
        model: the network that the saliency is of.
        saliency: scores (C,) by group name.
        goal: how much goes.
        image_size: side of the images in pixels, for the multiply-adds.
        before: ``gate_entries``, ``macs`` and ``params`` of which the goal is a share: those of
            the network before the first round.

    Raises InputError where even the smallest plan costs more than the goal allows.
    """
    groups = model.channel_groups()
    if goal.kind == "p":
        entries = before["gate_entries"]
        return select_channels(groups, saliency, goal.value, entries=entries, **goal.limits)
    ranking = Ranking(groups, saliency, **goal.limits)
    return select_within(model, ranking, image_size, goal.kind, before[goal.kind] * goal.value)


def planned_cost(model: GatedModel, plan: PruningPlan, image_size: int) -> Cost:
    """What ``model`` would cost with ``plan`` cut; shapes only, the model stays as it is."""
    return model_cost(prune(copy.deepcopy(model).to("meta"), plan), image_size)


def select_within(
    model: GatedModel,
    ranking: Ranking,
    image_size: int,
    of: Literal["macs", "params"],
    most: float,
) -> PruningPlan:
    """The largest plan of a ranking that costs at most so much.

    Args:
        model: the network that is ranked.
        ranking: its channels.
        image_size: side of the images in pixels, for the multiply-adds.
        of: which cost.
        most: how much, in multiply-adds or parameters.

    Raises InputError, with the least that is possible, where every plan costs more than that.
    """
    shapes = copy.deepcopy(model).to("meta")

    def cost(plan: PruningPlan) -> int:
        return getattr(planned_cost(shapes, plan, image_size), of)

    plan = largest_plan(ranking, lambda plan: cost(plan) <= most)
    if plan is None:
        raise InputError(f"at least {cost(ranking.plan(0))} {of} stay, more than {most:.0f}")
    return plan


def check_goal(model: GatedModel, goal: Goal, image_size: int) -> None:
    """Raise InputError where no plan can cost as little as the goal asks; no scores are needed."""
    if goal.kind == "p":
        return
    equal = {name: torch.zeros(width) for name, width in model.group_widths().items()}
    smallest = Ranking(model.channel_groups(), equal, **goal.limits).plan(0)
    least, whole = (
        getattr(cost, goal.kind)
        for cost in (planned_cost(model, smallest, image_size), model_cost(model, image_size))
    )
    if least > goal.value * whole:
        raise InputError(
            f"--{goal.kind} {goal.value:g} of {whole}: at least {least} stay; ask for more of them,"
            " or see --min_channels and --round_to"
        )
