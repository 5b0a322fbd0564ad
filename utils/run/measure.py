"""What a run measures: the network before and after a cut, and at the end."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from models import GatedModel, structure
from utils.checkpoint import load_checkpoint
from utils.cost import Latency, latency, model_cost
from utils.data.batches import Batches, Data
from utils.errors import RunError
from utils.finetune import evaluate
from utils.pruning import PruningPlan
from utils.run.folder import RunFolder
from utils.run.record import Json
from utils.run.rounds import Pruning, RunState
from utils.surgery import first_difference, prune


def measure_baseline(run: RunFolder, state: RunState, data: Data, made_by: Json | None) -> None:
    """Evaluate the network before any cut; ``made_by`` is its run's configuration, if known."""
    model, record, known = state.model, state.record, structure(state.model)
    cost = model_cost(model, data.about.image_size)
    found = evaluate(model, data.test, run.runtime)
    run.log(f"baseline: {record.net} on {record.dataset}, {cost}, {found}; {run.runtime}")
    chance = 1 / known.num_classes
    deviation = math.sqrt(chance * (1 - chance) / found.images)
    if found.accuracy <= 100 * (chance + 2 * deviation) and not run.config.get("new_head"):
        doubt = "is it the data it was trained on? see --mean and --std"
        run.log(f"warning: the baseline is at chance on this data; {doubt}")
    if run.config["holdout"] > (made_by or {}).get("holdout", 0):
        run.log("warning: the baseline was trained on images that are held out here")
    for note in known.notes:
        run.log(f"note: {note}")
    record.baseline = {"config": made_by}
    record.gate_entries, record.channels, record.held_at_floor, record.rounds = {}, {}, [], []
    record.note_accuracy("baseline", found)
    for when in ("before", "after"):
        record.note_size(when, model, cost)


def prune_checked(model: nn.Module, plan: PruningPlan, data: Data) -> nn.Module:
    """Prune ``model`` in place and return it.

    Groups that were read off a forward pass are not trusted: the pruned network is compared with
    the masked one on eight training images. Raises RunError, with the first layer that differs.
    """
    if isinstance(model, GatedModel):
        return prune(model, plan)
    masked = plan.apply_mask(copy.deepcopy(model))
    images, _ = data.train.pick(torch.arange(min(8, data.train.images)))
    layer = first_difference(masked, prune(model, plan), images)
    if layer is not None:
        known = structure(model)
        what = f"the pruned network differs from the masked one, first in {layer}"
        why = "; ".join(["its forward pass cannot be followed", *known.notes])
        raise RunError(f"{known.net}: {what}; {why}")
    return model


def measure_cut(
    run: RunFolder, state: RunState, networks: Sequence[nn.Module], data: Data, asked: Pruning
) -> None:
    """Evaluate and time ``networks``, unpruned and pruned, and save the pruned one as pruned.pth.

    With ``asked.recalibrate``, it is recalibrated on so many batches, and evaluated once more.
    """
    (_, pruned), record, goal = networks, state.record, asked.goal
    size = data.about.image_size

    def time_of(batch: int) -> Latency:
        return run.runtime.on_main(lambda: latency(networks, size, batch, turns=3))

    cost = model_cost(pruned, size)
    found = evaluate(pruned, data.test, run.runtime)
    times = [time_of(1)]
    if goal.kind == "latency" or goal.batch * times[0].before <= 1:  # seconds
        times.append(time_of(goal.batch))
    run.log(f"after surgery: {cost}, {found}; {times[-1].share:.0%} of the time")
    record.latency = {str(time.batch): time.in_ms() for time in times}
    record.note_accuracy("after_surgery", found)
    record.note_size("after", pruned, cost)
    record.ratio["reached"] = 1 - record.gate_entries["after"] / record.gate_entries["before"]
    cut = {"ratio": record.ratio["reached"], **vars(cost), "after_surgery": found.accuracy}
    if asked.recalibrate:
        recalibrate(pruned, data.train, asked.recalibrate)
        found = evaluate(pruned, data.test, run.runtime)
        run.log(f"recalibrated on {asked.recalibrate} batches: {found}")
        record.note_accuracy("recalibrated", found)
    cut["recalibrated"] = found.accuracy if asked.recalibrate else None
    record.rounds.append(cut)
    run.save("pruned.pth", pruned, **data.about.metadata(), accuracy=found.accuracy)
    run.board.draw_surgery(record)


def recalibrate(model: nn.Module, train: Batches, count: int) -> None:
    """Replace BatchNorm's running statistics by averages over the first ``count`` batches."""
    if count:
        train.set_epoch(0)
        update_bn(itertools.islice(train, count), model)


def measure_end(run: RunFolder, state: RunState, data: Data) -> None:
    """Note the test accuracies of the last and the best epoch of the last round.

    With a holdout, the epochs were compared on the holdout; the test set is read once, here.
    """
    record, epochs, best = state.record, state.epochs, state.best
    record.note_end(epochs[-1].test if epochs else None, best and best.test, best and best.number)
    if epochs and data.holdout is not None:
        names = ("last", "best", "best_epoch")
        accuracy = {name: record.accuracy[name] for name in names}
        top5 = {name: record.top5[name] for name in names}
        record.holdout = {"images": data.holdout.images, "accuracy": accuracy, "top5": top5}
        path = run.folder / "model_best.pth"  # rank 0 has written it
        file = run.runtime.main_first(lambda: load_checkpoint(path, run.settings.net))
        last, best = (evaluate(m, data.test, run.runtime) for m in (state.model, file.model))
        record.note_end(last, best, file.meta["epoch"])
