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
from utils.finetune import Metrics, evaluate, fit
from utils.pruning import PruningPlan, select_channels
from utils.recipes import Recipe, Recipes
from utils.run import Run
from utils.saliency import channel_saliency
from utils.surgery import prune, split_plan
from utils.tracker import Tracker


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

    def prune_and_fine_tune(
        self,
        baseline: GatedModel,
        args: argparse.Namespace,
        recipes: Recipes,
        last: Checkpoint | None,
    ) -> dict[str, Any]:
        """The story of a pruning script: score, select, cut, measure, fine-tune.

        Args:
            baseline: the network to prune; it is the pruned one afterwards.
            args: what the command line says.
            recipes: how to fine-tune.
            last: a checkpoint of this run to continue from; what comes before it is not done again.

        Returns what result.json says.
        """
        model = baseline.to(self.runtime.device)
        if last:
            story = last.meta["training"]["story"]
            plan, result = PruningPlan(story["plan"]), story["result"]
        else:
            before = self.measure(model)
            self.run.log(f"baseline: {args.net} on {args.dataset}, {before}; {self.runtime}")
            plan = self.choose_channels(model, args)
            pruned = prune(copy.deepcopy(model), plan)
            after = self.measure(pruned)
            self.run.log(f"after surgery: {after}")
            self.run.save("pruned.pth", pruned, **self.meta, accuracy=after.metrics.accuracy)
            result = pruning_result(args, plan, before, after)

        tracker = self.fine_tune(
            last.model if last else model,
            plan_stages(model, plan, recipes, args.smooth),
            {"plan": plan.keep, "result": result},
            every=args.checkpoint_every,
            last=last,
        )
        return with_fine_tuning(result, tracker)

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
            self.run.draw_saliency(saliency)
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

    def fine_tune(
        self,
        model: GatedModel,
        stages: Sequence[Stage],
        story: Mapping[str, Any],
        *,
        every: int | None = None,
        last: Checkpoint | None = None,
    ) -> Tracker:
        """Go through the stages: cut what each says, and fine-tune by its recipe.

        Every stage has a fresh optimiser. model_best.pth is kept of the last stage only: before it,
        the network is not yet pruned to the end.

        Args:
            model: the network before the first stage; with ``last``, whatever that file holds.
            stages: see ``plan_stages``.
            story, every: see ``Tracker``.
            last: a checkpoint to continue from.
        """
        self.runtime.on_main(lambda: self.run.check_space(model))
        total = sum(stage.recipe.epochs for stage in stages)
        tracker = Tracker(self.run, self.runtime, model, total, self.meta, every=every, story=story)
        resume = last.meta["training"] if last else None
        for number, stage in enumerate(stages, start=1):
            if resume and number < resume["stage"]:
                continue
            final = number == len(stages)
            if resume:
                tracker.continue_stage(resume, stage.recipe.epochs, final)
            else:
                prune(model, stage.plan)
                tracker.start_stage(stage.recipe.epochs, final)
                if len(stages) > 1:
                    what = f"cut {', '.join(stage.plan.keep)}" if stage.plan.keep else "all is cut"
                    self.run.log(f"stage {number}/{len(stages)}: {what}")
            with self.run.signals.deferred():
                fit(
                    model, self.train, self.test, stage.recipe, self.runtime, watch=tracker,
                    resume=resume, first_epoch=sum(s.recipe.epochs for s in stages[: number - 1]),
                )  # fmt: skip
            resume = None
        return tracker


@dataclass(frozen=True)
class Stage:
    """A part of a plan, and how to fine-tune once it is cut."""

    plan: PruningPlan
    recipe: Recipe


def plan_stages(
    model: GatedModel, plan: PruningPlan, recipes: Recipes, smooth: bool
) -> list[Stage]:
    """One stage that cuts everything; or (``--smooth``) one per part, and a last that cuts nothing.

    ``model`` is the network that the plan was made for.
    """
    if not smooth:
        return [Stage(plan, recipes.one_shot)]
    parts = [Stage(part, recipes.stage) for part in split_plan(model, plan)]
    return [*parts, Stage(PruningPlan({}), recipes.final)]


def pruning_result(
    args: argparse.Namespace, plan: PruningPlan, before: Snapshot, after: Snapshot
) -> dict[str, Any]:
    """What result.json says before fine-tuning; ``with_fine_tuning`` adds the rest."""
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
        },
        "top5": {"baseline": before.metrics.top5, "after_surgery": after.metrics.top5},
        "cost": {
            "macs": {"before": before.cost.macs, "after": after.cost.macs},
            "params": {"before": before.cost.params, "after": after.cost.params},
        },
        "channels": {
            name: {"before": width, "after": after.widths[name]}
            for name, width in before.widths.items()
        },
        "held_at_floor": list(plan.held_at_floor),
    }


def with_fine_tuning(result: Mapping[str, Any], tracker: Tracker) -> dict[str, Any]:
    """The result once fine-tuning is done."""
    accuracies = {
        kind: {**result[kind], **tracker.accuracies(kind)} for kind in ("accuracy", "top5")
    }
    return {**result, **accuracies, "history": tracker.history}
