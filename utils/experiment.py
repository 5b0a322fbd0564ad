"""The steps of an experiment that every pruning script shares."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.gate import GatedModel
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.cost import Cost
from utils.distributed import Runtime
from utils.errors import InputError
from utils.finetune import Metrics, Recipe, fit
from utils.pruning import PruningPlan, pruned_share
from utils.run import Run
from utils.surgery import prune_in_stages
from utils.tracker import Tracker


@dataclass(frozen=True)
class Recipes:
    """How to fine-tune: one shot, or (``--smooth``) after each stage of the cut and at the end."""

    one_shot: Recipe
    stage: Recipe
    final: Recipe

    def adapted(
        self, epochs: int, stage_epochs: int | None, final_epochs: int | None, *changes: Any
    ) -> Recipes:
        """Other lengths, and the further arguments of ``Recipe.adapted`` in all three.

        A stage whose length is None keeps its share of the one shot's ``epochs``, rounded up.
        """

        def in_proportion(recipe: Recipe, own: int | None) -> Recipe:
            length = -(-recipe.epochs * epochs // self.one_shot.epochs) if own is None else own
            return recipe.adapted(length, *changes)

        recipes = Recipes(
            self.one_shot.adapted(epochs, *changes),
            in_proportion(self.stage, stage_epochs),
            in_proportion(self.final, final_epochs),
        )
        if recipes.stage.epochs and not recipes.final.epochs:
            raise InputError("--smooth_epochs needs --final_epochs of at least 1 behind it")
        return recipes


# The published recipes for pruned networks on CIFAR.
CIFAR_RECIPES = Recipes(
    one_shot=Recipe(epochs=160, lr=0.01, weight_decay=5e-4, milestones=(60, 120), gamma=0.2),
    stage=Recipe(epochs=30, lr=0.01, weight_decay=5e-4, milestones=(5, 10), gamma=0.1),
    final=Recipe(epochs=45, lr=0.01, weight_decay=5e-4, milestones=(10, 15), gamma=0.2),
)


def load_baseline(place: str | Path, folder: str, net: str) -> Checkpoint:
    """The network to prune: a file, or ``model_best.pth`` in ``place/folder`` or in ``place``."""
    place = Path(place)
    if place.is_file() or place.suffix:
        return load_checkpoint(place, net)
    choices = [place / folder / "model_best.pth", place / "model_best.pth"]
    return load_checkpoint(next(filter(Path.is_file, choices), choices[0]), net)


def check_classes(baseline: Checkpoint, classes: Sequence[str], data: str) -> None:
    """Raise InputError unless the network has the classes of the data, in its order."""
    advice = "name the data that it was trained on"
    trained = baseline.model.num_classes
    if trained != len(classes):
        raise InputError(
            f"{data} has {len(classes)} classes, the checkpoint was trained on {trained}; {advice}"
        )
    for ours, theirs in zip(baseline.meta.get("classes", classes), classes, strict=True):
        if ours != theirs:
            raise InputError(
                f"{data} has class {theirs!r} where the checkpoint has {ours!r}; {advice}"
            )


def fine_tune(
    model: GatedModel,
    recipe: Recipe,
    train: Any,
    test: Any,
    runtime: Runtime,
    run: Run,
    meta: Mapping[str, Any],
) -> Tracker:
    """Fine-tune a pruned network, log every epoch, and keep the best and the last."""
    tracker = Tracker(run, model, recipe.epochs, meta)
    fit(model, train, test, recipe, runtime, on_epoch=tracker)
    return tracker


def fine_tune_in_stages(
    model: GatedModel,
    plan: PruningPlan,
    recipes: Recipes,
    train: Any,
    test: Any,
    runtime: Runtime,
    run: Run,
    meta: Mapping[str, Any],
) -> Tracker:
    """``--smooth``: cut one stage of the plan out of the unpruned ``model``, fine-tune, and so on;
    then fine-tune the whole.

    Every stage has a fresh optimiser. Only the last one's checkpoints are kept: before it, the
    network is not yet pruned.
    """
    stages = sum(1 for _ in prune_in_stages(copy.deepcopy(model), plan))
    tracker = Tracker(run, model, stages * recipes.stage.epochs + recipes.final.epochs, meta)
    for i, names in enumerate(prune_in_stages(model, plan), start=1):
        run.log(f"stage {i}/{stages}: cut {', '.join(names)}")
        tracker.start_stage(recipes.stage.epochs, keep=False)
        fit(model, train, test, recipes.stage, runtime, on_epoch=tracker, first_epoch=tracker.done)
    run.log("everything is cut: final fine-tuning")
    tracker.start_stage(recipes.final.epochs)
    fit(model, train, test, recipes.final, runtime, on_epoch=tracker, first_epoch=tracker.done)
    return tracker


def pruning_result(
    args: argparse.Namespace,
    model: GatedModel,
    plan: PruningPlan,
    before: Metrics,
    after_surgery: Metrics,
    cost: Cost,
    pruned_cost: Cost,
) -> dict[str, Any]:
    """What is known right after surgery, as result.json says it; ``model`` is the one before."""
    widths = model.group_widths()
    kept = {name: len(plan.keep.get(name, range(width))) for name, width in widths.items()}
    return {
        "net": args.net,
        "dataset": args.dataset,
        "criterion": args.criterion,
        "smooth": args.smooth,
        "seed": args.seed,
        "ratio": {"asked": args.p, "reached": pruned_share(model.channel_groups(), widths, plan)},
        "accuracy": {"baseline": before.accuracy, "after_surgery": after_surgery.accuracy},
        "cost": {
            "macs": {"before": cost.macs, "after": pruned_cost.macs},
            "params": {"before": cost.params, "after": pruned_cost.params},
        },
        "channels": {
            name: {"before": width, "after": kept[name]} for name, width in widths.items()
        },
        "held_at_floor": [
            name for name, width in widths.items() if kept[name] == args.min_channels < width
        ],
    }
