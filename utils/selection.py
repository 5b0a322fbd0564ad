"""Which channels go: the plan that a goal asks for, by a ratio or by a budget."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from models import channel_groups, group_widths
from models.trace import on_meta
from utils.cost import Cost, Latency, latency, model_cost
from utils.errors import InputError
from utils.pruning import PruningPlan, Ranking, select_channels
from utils.surgery import prune

GOALS = ("p", "macs", "params", "latency")


@dataclass(frozen=True)
class Goal:
    """How much is to go.

    With the kind ``p``, ``value`` is the share of the gate entries to cut; with ``macs``,
    ``params`` or ``latency``, it is the largest share of these that may stay.
    """

    kind: Literal["p", "macs", "params", "latency"]
    value: float
    min_channels: int = 1  # this, round_to and scope: see ``utils.pruning.Ranking``
    round_to: int = 1
    scope: str = "global"
    batch: int = 64  # images at once, where time is measured

    def at(self, share: float) -> Goal:
        """The goal of a round that reaches this ``share`` of the way to the whole goal."""
        if share == 1:
            return self
        value = self.value * share if self.kind == "p" else 1 - (1 - self.value) * share
        return replace(self, value=value)

    @property
    def limits(self) -> dict[str, int | str]:
        """Keyword arguments of ``Ranking``."""
        return {name: getattr(self, name) for name in ("min_channels", "round_to", "scope")}


def select(
    model: nn.Module,
    saliency: Mapping[str, Tensor],
    goal: Goal,
    image_size: int,
    before: Mapping[str, int],
    unpruned: nn.Module | None = None,
    log: Callable[[str], None] = print,
) -> PruningPlan:
    """The most salient channels of a network that meet a goal.

    Args:
        model: the network that was scored.
        saliency: scores (C,) by group name.
        image_size: side of the images in pixels, for the multiply-adds.
        before: ``gate_entries``, ``macs``, ``params`` before any cut; the goal is a share of them.
        unpruned: the network before any cut, for a goal of time.
        log: is told of the time that was measured.

    Raises InputError if even the smallest plan costs more than the goal allows.
    """
    groups = channel_groups(model)
    if goal.kind == "p":
        entries = before["gate_entries"]
        return select_channels(groups, saliency, goal.value, entries=entries, **goal.limits)
    ranking = Ranking(groups, saliency, **goal.limits)
    if goal.kind == "latency":
        plan, found = select_by_time(model, ranking, image_size, goal, unpruned)
        log(f"--latency {goal.value:g}: {found}, {goal.batch} images at once")
        return plan
    return select_within(model, ranking, image_size, goal.kind, before[goal.kind] * goal.value)


def planned_cost(model: nn.Module, plan: PruningPlan, image_size: int) -> Cost:
    """The cost of ``model`` after ``plan``; nothing is cut."""
    return model_cost(prune(on_meta(model), plan), image_size)


def select_within(
    model: nn.Module, ranking: Ranking, image_size: int, of: str, most: float
) -> PruningPlan:
    """The largest plan of a ranking of ``model`` that costs at most ``most`` "macs" or "params".

    ``Ranking.cut_after`` does not apply, so that the cost comes close to ``most``. Raises
    InputError, with the lowest possible cost, if every plan costs more.
    """
    shapes = on_meta(model)

    def cost(kept: int) -> int:
        return getattr(planned_cost(shapes, ranking.plan(kept), image_size), of)

    # The smallest number of entries that costs too much: the cost never falls as entries are added.
    beyond = bisect.bisect_right(range(ranking.entries + 1), most, key=cost)
    if beyond == 0:
        raise InputError(f"at least {cost(0)} {of} stay, more than {most:.0f}")
    return ranking.plan(beyond - 1)


def select_by_time(
    model: nn.Module, ranking: Ranking, image_size: int, goal: Goal, unpruned: nn.Module
) -> tuple[PruningPlan, Latency]:
    """A large plan of a ranking whose measured time is at most the goal's share, and that time.

    Times are noisy and do not always fall with the width: so the plan that bisection finds is timed
    once more, for longer, and lowered until it keeps to the goal. Raises InputError, with the least
    time that was measured, if no plan does.
    """

    def timed(kept: int, turns: int) -> tuple[PruningPlan, Latency]:
        plan = ranking.plan(kept)
        pruned = prune(copy.deepcopy(model), plan)
        return plan, latency((unpruned, pruned), image_size, goal.batch, turns)

    kept = bisect.bisect_right(
        range(ranking.entries), goal.value, key=lambda kept: timed(kept, 3)[1].share
    )
    while True:
        kept = max(0, kept - 1)
        plan, found = timed(kept, 7)
        if found.share <= goal.value:
            return plan, found
        if kept == 0:
            raise InputError(f"--latency {goal.value:g}: at least {found}")
        kept -= ranking.entries // 100  # a hundredth of the network less


def check_goal(model: nn.Module, goal: Goal, image_size: int) -> None:
    """Raise InputError if even the smallest plan costs more than the goal allows."""
    if goal.kind in ("p", "latency"):  # a plan that is too slow is refused when it is measured
        return
    equal = {name: torch.zeros(width) for name, width in group_widths(model).items()}
    smallest = Ranking(channel_groups(model), equal, **goal.limits).plan(0)
    least = getattr(planned_cost(model, smallest, image_size), goal.kind)
    whole = getattr(model_cost(model, image_size), goal.kind)
    if least > goal.value * whole:
        asked = f"--{goal.kind} {goal.value:g} of {whole}"
        advice = "ask for more of them, or see --min_channels and --round_to"
        raise InputError(f"{asked}: at least {least} stay; {advice}")
