"""What a run measures: the network before and after a cut, and at the end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch.optim.swa_utils import update_bn

from models import GatedModel
from utils.checkpoint import load_checkpoint
from utils.data.batches import Batches, Data
from utils.errors import InputError
from utils.finetune import evaluate
from utils.pruning import PruningPlan
from utils.run.baseline import at_chance
from utils.run.callbacks import RunCallback
from utils.run.existing import is_whole
from utils.run.folder import RunFolder
from utils.run.record import KINDS, Measurement
from utils.run.state import RunState


def measure_baseline(
    run: RunFolder, state: RunState, data: Data, made_by: Mapping[str, Any] | None
) -> None:
    """Evaluate the network before anything is cut.

    ``made_by`` is the configuration of the run that made it, if its file says.
    """
    before = Measurement.of(state.model, data, run.runtime)
    record = state.record
    run.log(f"baseline: {record.net} on {record.dataset}, {before}; {run.runtime}")
    if at_chance(before.metrics, state.model.num_classes) and not run.config.get("new_head"):
        run.log(
            "warning: the baseline is at chance on this data; is it the data it was trained on?"
            " see --mean and --std"
        )
    if run.config["holdout"] > (made_by or {}).get("holdout", 0):
        run.log("warning: the baseline was trained on images that are held out here")
    record.begin_pruning(before, made_by)


def measure_cut(
    run: RunFolder,
    state: RunState,
    pruned: GatedModel,
    plan: PruningPlan,
    data: Data,
    recalibrate: int,
) -> None:
    """Evaluate a network right after surgery, and save it as pruned.pth.

    With ``recalibrate``, its running statistics are estimated anew and it is evaluated once more.
    """
    after, recalibrated = Measurement.of(pruned, data, run.runtime), None
    run.log(f"after surgery: {after}")
    if recalibrate:
        estimate_statistics(pruned, data.train, recalibrate)
        recalibrated = evaluate(pruned, data.test, run.runtime)
        run.log(f"recalibrated on {recalibrate} batches: {recalibrated}")
    state.record.add_cut(plan, after, recalibrated)
    accuracy = (recalibrated or after.metrics).accuracy
    run.save("pruned.pth", pruned, **data.about.metadata(), accuracy=accuracy)
    run.board.draw_surgery(state.record)


def estimate_statistics(model: GatedModel, train: Batches, count: int) -> None:
    """BatchNorm's running statistics anew: plain averages over the first ``count`` batches of the
    first epoch. The weights stay; with a count of 0, everything does.
    """
    if count:
        train.set_epoch(0)
        update_bn(itertools.islice(train, count), model)


def restore_files(run: RunFolder, state: RunState, callback: RunCallback) -> None:
    """Write again what last.pth can restore of the files of a run, and say what is lost."""
    record, lost = state.record, []
    if record.rounds:
        if not is_whole(run.folder / "plan.json"):
            run.save_plan(state.plan)
        lost += [] if is_whole(run.folder / "pruned.pth") else ["pruned.pth"]
    epochs, best = record.epochs(state.round + 1), run.folder / "model_best.pth"
    if callback.keep_best and epochs and not is_whole(best):
        if record.best(state.round + 1) == epochs[-1] and not state.training["batch"]:
            callback.save_best()
        elif callback.chosen_on == "holdout":  # the run ends with this network
            raise InputError(f"{best} is missing; put it back, or start again with --overwrite")
        else:
            lost.append(best.name)
    if lost:
        run.log(f"warning: {' and '.join(lost)} cannot be written again: lost")


def measure_end(run: RunFolder, state: RunState, data: Data) -> None:
    """Note the accuracies of the last and the best epoch of the last round on the test set.

    With a holdout, the epochs were compared on that, and the test set is read once, here.
    """
    record, number = state.record, state.round + 1
    accuracies = record.note_epochs(number)
    if data.holdout is not None and record.epochs(number):
        record.holdout = {"images": data.holdout.images, **accuracies}
        path = run.folder / "model_best.pth"
        file = run.runtime.main_first(lambda: load_checkpoint(path))  # once rank 0 has written it
        last, best = (evaluate(m, data.test, run.runtime) for m in (state.model, file.model))
        accuracies = {
            kind: {
                "last": getattr(last, kind), "best": getattr(best, kind),
                "best_epoch": file.meta["epoch"],
            }
            for kind in KINDS
        }  # fmt: skip
    for kind in KINDS:
        getattr(record, kind).update(accuracies[kind])
