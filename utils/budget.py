"""Plans by their cost: the largest within a share of the multiply-adds or of the parameters."""

from __future__ import annotations

import copy
from typing import Literal

import torch

from models import GatedModel
from utils.cost import Cost, model_cost
from utils.errors import InputError
from utils.pruning import PruningPlan, Ranking, largest_plan
from utils.surgery import prune


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


def least_cost(model: GatedModel, image_size: int, min_channels: int, round_to: int) -> Cost:
    """What every plan costs at least; which channels stay makes no difference to it."""
    equal = {name: torch.zeros(width) for name, width in model.group_widths().items()}
    ranking = Ranking(model.channel_groups(), equal, min_channels=min_channels, round_to=round_to)
    return planned_cost(model, ranking.plan(0), image_size)
