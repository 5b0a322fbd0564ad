"""What happens as a run trains: log lines, TensorBoard, last.pth, model_best.pth, and signals."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from utils.data.batches import Data
from utils.errors import InputError, Interrupted
from utils.finetune import Callback, Epoch
from utils.run.existing import is_whole
from utils.run.folder import RunFolder
from utils.run.rounds import Round
from utils.run.state import RunState


class RunCallback(Callback):
    """Records one round of training, saves its state, and obeys signals.

    Only the last of ``rounds`` writes model_best.pth: only its network has every cut.
    """

    def __init__(self, run: RunFolder, state: RunState, data: Data, rounds: Sequence[Round]):
        self.run, self.state, self.runtime = run, state, run.runtime
        self.meta, self.chosen_on = data.about.metadata(), data.chosen_on
        self.epochs = rounds[state.round].recipe.epochs
        self.keep_best = state.round == len(rounds) - 1
        shrunk = state.record.shrunk
        train = (r for r in rounds if r.groups is None or shrunk & set(r.groups))
        self.total_epochs = sum(r.recipe.epochs for r in train)  # to estimate the time left
        self.began, self.done_before = time.perf_counter(), len(state.record.history)

    def after_batch(self, batch: int, training: Callable[[], dict[str, Any]]) -> None:
        every = self.run.settings.checkpoint_every
        signum = self.runtime.most(self.run.signals.received)  # so all ranks stop here
        if signum or (every and batch % every == 0):
            self._save_last(training())
        if signum:
            raise Interrupted(signum, f"stopped after batch {batch}")

    def while_evaluating(self, training: Callable[[], dict[str, Any]]) -> None:
        if self.run.signals.received:
            self._save_last(training())
            raise Interrupted(self.run.signals.received, "stopped in the evaluation")

    def after_epoch(self, epoch: Epoch, training: Callable[[], dict[str, Any]]) -> None:
        record, number = self.state.record, self.state.round + 1
        record.add_epoch(epoch, number, self.chosen_on)
        done = len(record.history)
        pace = (time.perf_counter() - self.began) / (done - self.done_before)
        left = timedelta(seconds=round(pace * (self.total_epochs - done)))
        self.run.log(
            f"epoch {epoch.number}/{self.epochs}  lr {epoch.lr:.4g}"
            f"  train {epoch.train.loss:.3f} {epoch.train.accuracy:.2f} %"
            f"  {self.chosen_on} {epoch.test.loss:.3f} {epoch.test.accuracy:.2f} %"
            f"  {epoch.images_per_second:.0f} images/s  {left} left"
        )
        if self.keep_best and record.best(number).number == epoch.number:
            self.save_best()
        self._save_last(training())
        self.run.board.draw_epoch(epoch, done, self.chosen_on)
        if signum := self.runtime.most(self.run.signals.received):
            raise Interrupted(signum, f"stopped after epoch {epoch.number}")

    def save_best(self) -> None:
        """Write model_best.pth; the epoch that has just ended must be the best."""
        best = self.state.record.best(self.state.round + 1)
        about = {"accuracy": best.test.accuracy, "tested_on": self.chosen_on}
        about |= {"epoch": best.number, "chosen": f"best on {self.chosen_on}"}
        self.run.save("model_best.pth", self.state.model, **self.meta, **about)

    def _save_last(self, training: dict[str, Any]) -> None:
        epochs = self.state.record.epochs(self.state.round + 1)
        about = {"accuracy": epochs[-1].test.accuracy if epochs else None}
        about |= {"tested_on": self.chosen_on, "epoch": training["epoch"]}
        self.run.save_last(self.state, training, **self.meta, **about)


def restore_files(run: RunFolder, state: RunState, callback: RunCallback) -> None:
    """Write missing files of a resumed run again where last.pth suffices, and name the others.

    Raises InputError without the model_best.pth of a run with a holdout: its result needs it.
    """
    record, lost = state.record, []
    if record.rounds:
        if not is_whole(run.folder / "plan.json"):
            run.save_plan(state.plan)
        if not is_whole(run.folder / "pruned.pth"):
            lost.append("pruned.pth")
    epochs, best = record.epochs(state.round + 1), run.folder / "model_best.pth"
    if callback.keep_best and epochs and not is_whole(best):
        if record.best(state.round + 1) == epochs[-1] and not state.training["batch"]:
            callback.save_best()
        elif callback.chosen_on == "holdout":
            raise InputError(f"{best} is missing; put it back, or start again with --overwrite")
        else:
            lost.append(best.name)
    if lost:
        run.log(f"warning: {' and '.join(lost)} cannot be written again: lost")
