"""What happens after every epoch: a line in the log, TensorBoard, last.pth, model_best.pth."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from models.gate import GatedModel
from utils.finetune import Epoch
from utils.run import Run


class Tracker:
    """The ``on_epoch`` of ``utils.finetune.fit``.

    Args:
        run: the folder that everything goes to.
        model: the bare network that is trained.
        total_epochs: of all stages of the run together, to estimate the time left.
        meta: metadata for every checkpoint.

    Attributes:
        best: the epoch of the last stage with the highest accuracy on the test set; the first of
            equals.
        last: the latest epoch.
        done: epochs of all stages so far.
        history: all of them, as dicts, with the number of their stage.
    """

    def __init__(self, run: Run, model: GatedModel, total_epochs: int, meta: Mapping[str, Any]):
        self.run, self.model, self.total, self.meta = run, model, total_epochs, dict(meta)
        self.best: Epoch | None = None
        self.last: Epoch | None = None
        self.done = 0
        self.history: list[dict[str, Any]] = []
        self.stage = 0
        self.start_stage(total_epochs)

    def start_stage(self, epochs: int, keep: bool = True) -> None:
        """The next epochs belong to a stage of so many; ``keep`` its checkpoints, or only log."""
        self.stage_epochs, self.keep, self.stage = epochs, keep, self.stage + 1
        self.best = self.last = None
        self.began, self.done_before = time.perf_counter(), self.done

    def __call__(self, epoch: Epoch, training: dict[str, Any]) -> None:
        self.done += 1
        self.history.append({**epoch.as_dict(), "stage": self.stage})
        self.last = epoch
        pace = (time.perf_counter() - self.began) / (self.done - self.done_before)
        self.run.log_epoch(epoch, self.stage_epochs, self.done, pace * (self.total - self.done))
        if not self.keep:
            return
        improved = self.best is None or epoch.test.accuracy > self.best.test.accuracy
        if improved:
            self.best = epoch
        meta = {**self.meta, "accuracy": epoch.test.accuracy, "epoch": epoch.number}
        if improved:
            self.run.save("model_best.pth", self.model, **meta, chosen="best on test")
        self.run.save(
            "last.pth",
            self.model,
            **meta,
            training={**training, "history": self.history},
        )

    def resume(self, history: list[dict[str, Any]]) -> None:
        """Continue after these epochs, as ``last.pth`` lists them."""
        self.history = list(history)
        epochs = [Epoch.from_dict(fields) for fields in history]
        self.best = max(epochs, key=lambda epoch: epoch.test.accuracy)  # the first of equals
        self.last = epochs[-1]
        self.done = self.done_before = len(epochs)

    def accuracies(self, kind: str = "accuracy") -> dict[str, Any]:
        """``accuracy`` or ``top5`` on the test set, of the last epoch and of the best; or None."""
        return {
            "last": self.last and getattr(self.last.test, kind),
            "best": self.best and getattr(self.best.test, kind),
            "best_epoch": self.best and self.best.number,
        }
