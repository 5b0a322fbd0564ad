"""What a run measures: the network before and after a cut, and at the end."""

from __future__ import annotations

import copy
import itertools
import math

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from models import GatedModel, structure
from utils.checkpoint import load_checkpoint
from utils.cost import Latency, latency
from utils.data.batches import Batches, Data
from utils.errors import RunError
from utils.finetune import evaluate
from utils.pruning import PruningPlan
from utils.run.folder import RunFolder
from utils.run.record import KINDS, Json, Measurement
from utils.run.rounds import Pruning
from utils.run.state import RunState
from utils.selection import Goal
from utils.surgery import first_difference, prune


def measure_baseline(run: RunFolder, state: RunState, data: Data, made_by: Json | None) -> None:
    """Evaluate the network before any cut.

    ``made_by`` is the configuration of the run that made it, if its file holds one.
    """
    before, record = Measurement.of(state.model, data, run.runtime), state.record
    run.log(f"baseline: {record.net} on {record.dataset}, {before}; {run.runtime}")
    chance = 1 / structure(state.model).num_classes
    deviation = math.sqrt(chance * (1 - chance) / before.metrics.images)
    at_chance = before.metrics.accuracy <= 100 * (chance + 2 * deviation)
    if at_chance and not run.config.get("new_head"):
        run.log(
            "warning: the baseline is at chance on this data; is it the data it was trained on?"
            " see --mean and --std"
        )
    if run.config["holdout"] > (made_by or {}).get("holdout", 0):
        run.log("warning: the baseline was trained on images that are held out here")
    for note in structure(state.model).notes:
        run.log(f"note: {note}")
    record.begin_pruning(before, made_by)


def prune_checked(model: nn.Module, plan: PruningPlan, data: Data) -> nn.Module:
    """Prune ``model`` in place and return it.

    The groups of a network without gates are read off its forward pass. So nobody has to trust
    them: there the pruned network is compared with the masked one on eight training images.
    Raises RunError, with the first layer that differs.
    """
    if isinstance(model, GatedModel):
        return prune(model, plan)
    masked = plan.apply_mask(copy.deepcopy(model))
    images, _ = data.train.pick(torch.arange(min(8, data.train.images)))
    layer = first_difference(masked, prune(model, plan), images)
    if layer is not None:
        known = structure(model)
        raise RunError(
            f"{known.net}: the pruned network differs from the masked one, first in {layer}; its"
            f" forward pass cannot be followed{''.join(f'; {note}' for note in known.notes)}"
        )
    return model


def measure_cut(
    run: RunFolder,
    state: RunState,
    networks: tuple[nn.Module, nn.Module],
    plan: PruningPlan,
    data: Data,
    asked: Pruning,
) -> None:
    """Evaluate and time a network right after surgery, and save it as pruned.pth.

    ``networks`` are the unpruned and the pruned one. With ``asked.recalibrate``, the pruned one is
    recalibrated on so many batches, and evaluated once more.
    """
    _, pruned = networks
    after, recalibrated = Measurement.of(pruned, data, run.runtime), None
    times = run.runtime.on_main(lambda: time_of(networks, data.about.image_size, asked.goal))
    run.log(f"after surgery: {after}; {times[-1].share:.0%} of the time")
    state.record.note_time(times)
    count = asked.recalibrate
    if count:
        recalibrate(pruned, data.train, count)
        recalibrated = evaluate(pruned, data.test, run.runtime)
        run.log(f"recalibrated on {count} batches: {recalibrated}")
    state.record.add_cut(plan, after, recalibrated)
    accuracy = (recalibrated or after.metrics).accuracy
    run.save("pruned.pth", pruned, **data.about.metadata(), accuracy=accuracy)
    run.board.draw_surgery(state.record)


def time_of(networks: tuple[nn.Module, nn.Module], size: int, goal: Goal) -> list[Latency]:
    """The time of one image, and of a batch if that is quick, or if the goal is its time."""
    times = [latency(networks, size, 1, turns=3)]
    if goal.kind == "latency" or goal.batch * times[0].before <= 1:
        times.append(latency(networks, size, goal.batch, turns=3))
    return times


def recalibrate(model: nn.Module, train: Batches, count: int) -> None:
    """Estimate BatchNorm's running statistics anew; the weights stay.

    They become plain averages over the first ``count`` batches of the first epoch. With a count of
    0, nothing changes.
    """
    if count:
        train.set_epoch(0)
        update_bn(itertools.islice(train, count), model)


def measure_end(run: RunFolder, state: RunState, data: Data) -> None:
    """Note the test accuracies of the last and the best epoch of the last round.

    With a holdout, the epochs were compared on the holdout; the test set is read once, here.
    """
    record, number = state.record, state.round + 1
    epochs, best = record.epochs(number), record.best(number)
    record.note_end(epochs[-1].test if epochs else None, best and best.test, best and best.number)
    if epochs and data.holdout is not None:
        names = ("last", "best", "best_epoch")
        found = {kind: {name: getattr(record, kind)[name] for name in names} for kind in KINDS}
        record.holdout = {"images": data.holdout.images, **found}
        path = run.folder / "model_best.pth"
        file = run.runtime.main_first(
            lambda: load_checkpoint(path, run.settings.net)
        )  # rank 0 has written it
        last, best = (evaluate(m, data.test, run.runtime) for m in (state.model, file.model))
        record.note_end(last, best, file.meta["epoch"])
