"""Training in stages, before each of which something may be cut; and what comes of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim.swa_utils import update_bn

from models import Gate, GatedModel
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.cost import model_cost
from utils.distributed import Runtime
from utils.errors import InputError
from utils.finetune import evaluate, fit
from utils.pruning import PruningPlan
from utils.recipes import Recipe
from utils.result import Snapshot
from utils.resume import is_whole
from utils.run import Run
from utils.surgery import prune
from utils.tracker import Tracker


def _nothing(model: GatedModel) -> PruningPlan:
    return PruningPlan({})


@dataclass(frozen=True)
class Stage:
    """A part of the work: cut something, and train.

    Attributes:
        choose: what to cut, given the network as it is by then.
        recipe: how to train.
        fresh: whether to begin with fresh weights.
    """

    choose: Callable[[GatedModel], PruningPlan]
    recipe: Recipe
    fresh: bool = False


def training_stage(recipe: Recipe) -> Stage:
    """Cut nothing, and train."""
    return Stage(_nothing, recipe)


@dataclass(frozen=True)
class Training:
    """What every stage of a run needs.

    Attributes:
        run: where results go.
        runtime: where it computes.
        train, test: batches, as ``utils.batches.Batches``.
        image_size: side in pixels, for the cost.
        meta: metadata for every checkpoint.
        holdout: batches that choose the best epoch in the place of the test set, if any.
        recalibrate: batches that re-estimate the running statistics after every cut; 0 for none.
    """

    run: Run
    runtime: Runtime
    train: Any
    test: Any
    image_size: int
    meta: Mapping[str, Any]
    holdout: Any = None
    recalibrate: int = 0

    def measure(self, model: GatedModel) -> Snapshot:
        """Evaluate a network and count what it costs."""
        metrics, cost = evaluate(model, self.test, self.runtime), model_cost(model, self.image_size)
        gates = sum(module.gate.numel() for module in model.modules() if isinstance(module, Gate))
        return Snapshot(metrics, cost, model.group_widths(), gates)

    def estimate_statistics(self, model: GatedModel) -> None:
        """BatchNorm's running statistics anew, as plain averages over the first training batches.

        The weights stay; the batches are those of the first epoch, whenever this is.
        """
        self.train.set_epoch(0)
        update_bn(itertools.islice(self.train, self.recalibrate), model)

    def fine_tune(
        self,
        model: GatedModel,
        stages: Sequence[Stage],
        story: dict[str, Any] | None = None,
        *,
        every: int | None = None,
        last: Checkpoint | None = None,
    ) -> Tracker:
        """Go through the stages: cut what each says, and fine-tune by its recipe.

        Every stage has a fresh optimiser. model_best.pth is kept of the last stage only: before it,
        the network is not yet pruned to the end.

        Args:
            model: the network before the first stage; with ``last``, whatever that file holds.
            stages: what to cut and how to train, one after the other.
            story, every: see ``Tracker``.
            last: a checkpoint to continue from.
        """
        self.runtime.on_main(lambda: self.run.check_space(model))
        total = sum(stage.recipe.epochs for stage in stages)
        tracker = Tracker(
            self.run, self.runtime, model, total, self.meta, every=every, story=story,
            chosen_on="test" if self.holdout is None else "holdout",
        )  # fmt: skip
        choosing = self.test if self.holdout is None else self.holdout
        resume = last.meta["training"] if last else None
        for number, stage in enumerate(stages, start=1):
            if resume and number < resume["stage"]:
                continue
            final = number == len(stages)
            if resume:
                tracker.continue_stage(resume, stage.recipe.epochs, final)
                self._restore_files(tracker, resume)
            else:
                cut = ", ".join(self.cut(model, stage))
                if len(stages) > 1:
                    what = f"cut {cut}" if cut else "nothing to cut"
                    self.run.log(f"stage {number}/{len(stages)}: {what}")
                tracker.start_stage(stage.recipe.epochs, final)
            with self.run.signals.deferred():
                fit(
                    model, self.train, choosing, stage.recipe, self.runtime,
                    watch=tracker, resume=resume,
                    first_epoch=sum(s.recipe.epochs for s in stages[: number - 1]),
                )  # fmt: skip
            resume = None
        return tracker

    def _restore_files(self, tracker: Tracker, training: Mapping[str, Any]) -> None:
        """Write again what last.pth can restore of the files that should be there, and say what is
        lost.
        """
        folder, plan = self.run.folder, tracker.story.get("plan")
        if plan is not None and not is_whole(folder / "plan.json"):
            self.run.save_plan(PruningPlan(plan))
        lost = ["pruned.pth"] if plan is not None and not is_whole(folder / "pruned.pth") else []
        if tracker.best and not is_whole(path := folder / "model_best.pth"):
            if tracker.best is tracker.last and not training["batch"]:
                tracker.save_best()
            elif self.holdout is not None:  # a run with a holdout ends with this network
                raise InputError(f"{path} is missing; put it back, or start again with --overwrite")
            else:
                lost.append("model_best.pth")
        if lost:
            self.run.log(f"warning: {' and '.join(lost)} cannot be written again: lost")

    def cut(self, model: GatedModel, stage: Stage) -> list[str]:
        """Cut in place what a stage cuts, and begin with fresh weights where it says so.

        Returns the names of the groups that have lost channels.
        """
        self.runtime.unsynced(model)
        plan = stage.choose(model)
        losing = list(plan.shrinking(model.group_widths()).keep)
        prune(model, plan)
        if stage.fresh:
            model.reset_parameters()
        elif losing and self.recalibrate:
            self.estimate_statistics(model)
        return losing

    def accuracies(self, tracker: Tracker) -> dict[str, Any]:
        """Of the last epoch and of the best one, on the test set, which epochs with a holdout have
        not seen; what they reached on that is told beside.
        """
        kinds = ("accuracy", "top5")
        chosen = {kind: tracker.accuracies(kind) for kind in kinds}
        if self.holdout is None or tracker.last is None:
            return chosen
        path = self.run.folder / "model_best.pth"
        file = self.runtime.main_first(lambda: load_checkpoint(path))  # once rank 0 has written it
        last = evaluate(tracker.model, self.test, self.runtime)
        best = evaluate(file.model, self.test, self.runtime)
        on_test = {
            kind: {
                "last": getattr(last, kind), "best": getattr(best, kind),
                "best_epoch": file.meta["epoch"],
            }
            for kind in kinds
        }  # fmt: skip
        return {**on_test, "holdout": {"images": self.holdout.images, **chosen}}
