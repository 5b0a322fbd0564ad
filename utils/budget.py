"""Plans by their cost: the largest within a share of the multiply-adds or of the parameters."""

from __future__ import annotations

import copy
from typing import Literal

from models.gate import GatedModel
from utils.cost import Cost, model_cost
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
    least: float | None = None,
) -> PruningPlan:
    """The largest plan of a ranking that costs at most so much.

    Args:
        model: the network that is ranked.
        ranking: its channels.
        image_size: side of the images in pixels, for the multiply-adds.
        of: which cost.
        most: how much, in multiply-adds or parameters.
        least: what later rounds of an iterative pruning will ask for.

    Raises ValueError, with the least that is possible, where every plan costs more than that.
    """
    shapes = copy.deepcopy(model).to("meta")

    def cost(plan: PruningPlan) -> int:
        return getattr(planned_cost(shapes, plan, image_size), of)

    floor, wanted = cost(ranking.plan(0)), most if least is None else least
    if floor > wanted:
        raise ValueError(f"at least {floor} {of} stay, more than {wanted:.0f}")
    return largest_plan(ranking, lambda plan: cost(plan) <= most)
