"""The steps of an experiment that every pruning script shares."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.gate import Gate, GatedModel
from utils.batches import scoring_indices
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.cost import Cost, model_cost
from utils.distributed import Runtime
from utils.errors import InputError
from utils.finetune import Metrics, Recipe, evaluate, fit
from utils.pruning import PruningPlan, select_channels
from utils.run import Run
from utils.saliency import channel_saliency
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

        return Recipes(
            self.one_shot.adapted(epochs, *changes),
            in_proportion(self.stage, stage_epochs),
            in_proportion(self.final, final_epochs),
        )


# The published recipes for pruned networks on CIFAR.
CIFAR_RECIPES = Recipes(
    one_shot=Recipe(epochs=160, lr=0.01, weight_decay=5e-4, milestones=(60, 120), gamma=0.2),
    stage=Recipe(epochs=30, lr=0.01, weight_decay=5e-4, milestones=(5, 10), gamma=0.1),
    final=Recipe(epochs=45, lr=0.01, weight_decay=5e-4, milestones=(10, 15), gamma=0.2),
)


# The published recipes for pruned networks on ImageNet.
IMAGENET_RECIPES = Recipes(
    one_shot=Recipe(epochs=120, lr=0.1, weight_decay=1e-4, milestones=(30, 60, 90), gamma=0.1),
    stage=Recipe(epochs=10, lr=0.01, weight_decay=5e-4, milestones=(5, 8), gamma=0.1),
    final=Recipe(epochs=45, lr=0.01, weight_decay=5e-4, milestones=(10, 15), gamma=0.2),
)


def load_baseline(place: str | Path, folder: str, net: str) -> Checkpoint:
    """The network to prune: a file, or ``model_best.pth`` in ``place/folder`` or in ``place``."""
    place = Path(place)
    if place.is_file() or (place.suffix and not place.is_dir()):
        path = place
    else:
        choices = [place / folder / "model_best.pth", place / "model_best.pth"]
        path = next(filter(Path.is_file, choices), choices[0])
    checkpoint = load_checkpoint(path, net)
    checkpoint.model.float()
    return checkpoint


def check_data(checkpoint: Checkpoint, classes: Sequence[str], image_size: int, data: str) -> None:
    """Raise InputError unless a network fits its data: their classes, in order, and their size.

    Names and size are compared where the checkpoint tells them.
    """
    advice = "name the data that it was trained on"
    trained, known = checkpoint.model.num_classes, checkpoint.meta.get("classes", classes)
    if trained != len(classes):
        raise InputError(
            f"{data} has {len(classes)} classes, the checkpoint was trained on {trained}; {advice}"
        )
    for ours, theirs in zip(known, classes, strict=False):
        if ours != theirs:
            raise InputError(
                f"{data} has class {theirs!r} where the checkpoint has {ours!r}; {advice}"
            )
    size = checkpoint.meta.get("image_size", image_size)
    if size != image_size:
        raise InputError(f"--image_size {image_size}: the checkpoint was trained at {size}")
    model_cost(checkpoint.model, image_size)


@dataclass(frozen=True)
class Snapshot:
    """A network as measured: accuracy, cost, and the width of every channel group."""

    metrics: Metrics
    cost: Cost
    widths: dict[str, int]
    gate_entries: int

    def __str__(self) -> str:
        return f"{self.cost}, {self.metrics}"


@dataclass(frozen=True)
class Experiment:
    """What every step of a pruning experiment needs.

    Attributes:
        run: where results go.
        runtime: where it computes.
        train, test: batches, as ``utils.batches.Batches``.
        image_size: side in pixels, for the cost.
        meta: metadata for every checkpoint.
    """

    run: Run
    runtime: Runtime
    train: Any
    test: Any
    image_size: int
    meta: Mapping[str, Any]

    def measure(self, model: GatedModel) -> Snapshot:
        """Evaluate a network and count what it costs."""
        metrics, cost = evaluate(model, self.test, self.runtime), model_cost(model, self.image_size)
        gates = sum(module.gate.numel() for module in model.modules() if isinstance(module, Gate))
        return Snapshot(metrics, cost, model.group_widths(), gates)

    def choose_channels(self, model: GatedModel, args: argparse.Namespace) -> PruningPlan:
        """Score all channels on one batch and select, as the flags say; rank 0 does so for all."""

        def select() -> PruningPlan:
            indices = scoring_indices(self.train.images, args.score_images, args.score_seed)
            self.run.log(f"scoring on {len(indices)} training images")
            saliency = channel_saliency(
                model,
                *self.train.pick(indices),
                criterion=args.criterion,
                w_beta=args.w_beta,
                checkpoint_activations=args.checkpoint_activations,
            )
            self.run.log_saliency(saliency)
            groups = model.channel_groups()
            return select_channels(groups, saliency, args.p, min_channels=args.min_channels)

        def select_or_refuse() -> PruningPlan:
            try:
                return select()
            except InputError:
                raise
            except ValueError as error:
                raise InputError(f"the network cannot be scored: {error}") from error

        plan = self.runtime.on_main(select_or_refuse)
        self.run.save_plan(plan)
        return plan

    def fine_tune(self, model: GatedModel, recipe: Recipe) -> Tracker:
        """Fine-tune a pruned network, log every epoch, and keep the best and the last."""
        tracker = Tracker(self.run, model, recipe.epochs, self.meta)
        self._fit(model, recipe, tracker)
        return tracker

    def fine_tune_in_stages(
        self, model: GatedModel, plan: PruningPlan, recipes: Recipes
    ) -> Tracker:
        """``--smooth``: cut a stage of the plan out of the whole ``model``, fine-tune, and so on.

        Then fine-tune the whole. Every stage has a fresh optimiser. Only the last one's checkpoints
        are kept: before it, the network is not yet pruned.
        """
        stages = sum(1 for _ in prune_in_stages(copy.deepcopy(model), plan))
        total = stages * recipes.stage.epochs + recipes.final.epochs
        tracker = Tracker(self.run, model, total, self.meta)
        for i, names in enumerate(prune_in_stages(model, plan), start=1):
            self.run.log(f"stage {i}/{stages}: cut {', '.join(names)}")
            tracker.start_stage(recipes.stage.epochs, keep=False)
            self._fit(model, recipes.stage, tracker)
        self.run.log("everything is cut: final fine-tuning")
        tracker.start_stage(recipes.final.epochs)
        self._fit(model, recipes.final, tracker)
        return tracker

    def _fit(self, model: GatedModel, recipe: Recipe, tracker: Tracker) -> None:
        fit(
            model, self.train, self.test, recipe, self.runtime,
            on_epoch=tracker, first_epoch=tracker.done,
        )  # fmt: skip


def pruning_result(
    args: argparse.Namespace,
    plan: PruningPlan,
    before: Snapshot,
    after: Snapshot,
    tracker: Tracker,
) -> dict[str, Any]:
    """What result.json says: before and right after surgery, and after fine-tuning."""
    return {
        "net": args.net,
        "dataset": args.dataset,
        "criterion": args.criterion,
        "smooth": args.smooth,
        "seed": args.seed,
        "ratio": {"asked": args.p, "reached": 1 - after.gate_entries / before.gate_entries},
        "accuracy": {
            "baseline": before.metrics.accuracy,
            "after_surgery": after.metrics.accuracy,
            **tracker.accuracies("accuracy"),
        },
        "top5": {
            "baseline": before.metrics.top5,
            "after_surgery": after.metrics.top5,
            **tracker.accuracies("top5"),
        },
        "cost": {
            "macs": {"before": before.cost.macs, "after": after.cost.macs},
            "params": {"before": before.cost.params, "after": after.cost.params},
        },
        "channels": {
            name: {"before": width, "after": after.widths[name]}
            for name, width in before.widths.items()
        },
        "held_at_floor": list(plan.held_at_floor),
        "history": tracker.history,
    }
