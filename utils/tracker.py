"""What happens as a run goes on: lines in the log, TensorBoard, last.pth and model_best.pth."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from models import GatedModel
from utils.distributed import Runtime
from utils.errors import Interrupted
from utils.finetune import Epoch, Watch
from utils.run import Run


class Tracker(Watch):
    """Watches ``utils.finetune.fit``, saves what it takes to continue, and obeys signals.

    Args:
        run: the folder that everything goes to.
        runtime: where the run computes.
        model: the bare network that is trained.
        total_epochs: of all stages of the run together, to estimate the time left.
        meta: metadata for every checkpoint.
        every: save last.pth after so many batches, too, and not only after every epoch.
        story: what the run knows besides, kept in last.pth as it is by then, for whoever continues.
        chosen_on: the images on which epochs are compared: "test" set, or "holdout".

    Attributes:
        best: the epoch of the last stage with the highest accuracy on those images; the first of
            equals.
        last: the latest epoch of this stage.
        done: epochs of all stages so far.
        stage: number of the stage, from 1.
        history: all epochs, as dicts, with the number of their stage.
    """

    def __init__(
        self,
        run: Run,
        runtime: Runtime,
        model: GatedModel,
        total_epochs: int,
        meta: Mapping[str, Any],
        *,
        every: int | None = None,
        story: Mapping[str, Any] | None = None,
        chosen_on: str = "test",
    ):
        self.run, self.runtime, self.model, self.total = run, runtime, model, total_epochs
        self.meta, self.every, self.chosen_on = dict(meta), every, chosen_on
        self.story = {} if story is None else story
        self.best: Epoch | None = None
        self.last: Epoch | None = None
        self.stage = self.done = 0
        self.history: list[dict[str, Any]] = []

    def start_stage(self, epochs: int, final: bool = True) -> None:
        """The next epochs belong to a stage of so many; the best of a final one is kept."""
        self.stage += 1
        self.best = self.last = None
        self._begin(epochs, final)

    def _begin(self, epochs: int, final: bool) -> None:
        self.stage_epochs, self.final = epochs, final
        self.began, self.done_before = time.perf_counter(), self.done

    def continue_stage(self, training: Mapping[str, Any], epochs: int, final: bool = True) -> None:
        """Go on where ``last.pth`` left off; ``training`` is what it says of that."""
        self.history, self.stage = list(training["history"]), training["stage"]
        self.done = len(self.history)
        mine = [Epoch.from_dict(fields) for fields in self.history if fields["stage"] == self.stage]
        self.last = mine[-1] if mine else None
        if final and mine:
            self.best = max(mine, key=lambda epoch: epoch.test.accuracy)  # the first of equals
        self._begin(epochs, final)
        set_random_state(training["random"])
        batches = f" and {training['batch']} batches" if training["batch"] else ""
        self.run.log(f"continues after epoch {training['epoch']}{batches} of stage {self.stage}")
        for what, now in self._place().items():
            before = training.get(what, now)
            if before != now:
                self.run.log(
                    f"warning: {before} {what} began this run and {now} continue it;"
                    " it will not end with the same bits"
                )

    def _place(self) -> dict[str, int]:
        """What the bits of a run depend on, besides its configuration."""
        threads = {"threads": torch.get_num_threads()} if self.runtime.device.type == "cpu" else {}
        return {"ranks": self.runtime.world_size, "GPUs": len(self.runtime.gpus), **threads}

    def after_batch(self, batch: int, state: Callable[[], dict[str, Any]]) -> None:
        signum = self.runtime.most(self.run.signals.received)  # all ranks stop at the same batch
        if signum or (self.every and batch % self.every == 0):
            self._save_last(state())
        if signum:
            raise Interrupted(signum, f"stopped after batch {batch}")

    def while_evaluating(self, state: Callable[[], dict[str, Any]]) -> None:
        if self.run.signals.received:
            self._save_last(state())
            raise Interrupted(self.run.signals.received, "stopped in the evaluation")

    def after_epoch(self, epoch: Epoch, state: Callable[[], dict[str, Any]]) -> None:
        self.done += 1
        what = {"stage": self.stage, "tested_on": self.chosen_on}
        self.history.append({**epoch.as_dict(), **what})
        self.last = epoch
        pace = (time.perf_counter() - self.began) / (self.done - self.done_before)
        left = pace * (self.total - self.done)
        self.run.log_epoch(epoch, self.stage_epochs, left, self.chosen_on)
        if self.final and (self.best is None or epoch.test.accuracy > self.best.test.accuracy):
            self.best = epoch
            self.save_best()
        self._save_last(state())
        self.run.board.draw_epoch(epoch, self.done, self.chosen_on)
        signum = self.runtime.most(self.run.signals.received)
        if signum:
            raise Interrupted(signum, f"stopped after epoch {epoch.number}")

    def save_best(self) -> None:
        """Write model_best.pth, of the epoch that has just ended."""
        about = {"accuracy": self.best.test.accuracy, "tested_on": self.chosen_on}
        about |= {"epoch": self.best.number, "chosen": f"best on {self.chosen_on}"}
        self.run.save("model_best.pth", self.model, **self.meta, **about)

    def _save_last(self, state: dict[str, Any]) -> None:
        training = {
            **state,
            "stage": self.stage,
            "history": self.history,
            "seconds": self.run.seconds(),
            **self._place(),
            "random": random_state(),
            "story": self.story,
        }
        about = {"accuracy": self.last and self.last.test.accuracy, "tested_on": self.chosen_on}
        about["epoch"] = state["epoch"]
        self.run.save_last(self.model, **self.meta, **about, training=training)

    def accuracies(self, kind: str = "accuracy") -> dict[str, Any]:
        """``accuracy`` or ``top5`` of the last epoch and of the best on ``chosen_on``; or None."""
        return {
            "last": self.last and getattr(self.last.test, kind),
            "best": self.best and getattr(self.best.test, kind),
            "best_epoch": self.best and self.best.number,
        }


def random_state() -> dict[str, Any]:
    """The state of every random stream: Python's, NumPy's, torch's, and CUDA's where there is."""
    version, python, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(python), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of ``random_state``; CUDA's is left where the number of GPUs is another."""
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])
