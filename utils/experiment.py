"""The steps of an experiment that every pruning script shares."""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim.swa_utils import update_bn

from models.gate import Gate, GatedModel
from utils.batches import SCORING, random_stream, scoring_indices
from utils.budget import select_within
from utils.checkpoint import Checkpoint, load_checkpoint, load_model
from utils.cost import model_cost
from utils.distributed import Runtime
from utils.errors import InputError
from utils.finetune import evaluate, fit
from utils.pruning import PruningPlan, Ranking, compose_kept, select_channels
from utils.recipes import Recipe, Recipes
from utils.result import Snapshot, add_surgery, first_result
from utils.run import Run
from utils.saliency import CRITERIA, channel_saliency
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
class Experiment:
    """What every step of a pruning experiment needs.

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

    def prune_and_fine_tune(
        self,
        baseline: Checkpoint,
        args: argparse.Namespace,
        recipes: Recipes,
        last: Checkpoint | None,
    ) -> dict[str, Any]:
        """The story of a pruning script: score, select, cut, measure, fine-tune.

        Args:
            baseline: holds the network to prune; it is the pruned one afterwards.
            args: what the command line says.
            recipes: how to fine-tune.
            last: a checkpoint of this run to continue from; what comes before it is not done again.

        Returns what result.json says.
        """
        model = baseline.model.to(self.runtime.device)
        if last:
            story = last.meta["training"]["story"]
        else:
            before = self.measure(model)
            self.run.log(f"baseline: {args.net} on {args.dataset}, {before}; {self.runtime}")
            story = {"plan": {}, "result": first_result(args, baseline, before)}
        if args.steps:
            stages = [
                Stage(partial(self.choose_and_report, args, story, step), recipes.stage)
                for step in range(1, args.steps + 1)
            ]
            stages += [training_stage(recipes.one_shot)] if args.epochs else []
        else:
            plan = PruningPlan(story["plan"])
            if not last:
                plan = self.choose_and_report(args, story, 1, model)
            stages = plan_stages(model, plan, recipes, args)
        tracker = self.fine_tune(
            last.model if last else model, stages, story, every=args.checkpoint_every, last=last
        )
        accuracies = self.accuracies(tracker)
        result = story["result"]
        for kind in ("accuracy", "top5"):
            accuracies[kind] = {**result[kind], **accuracies[kind]}
        return {**result, **accuracies, "history": tracker.history}

    def choose_and_report(
        self, args: argparse.Namespace, story: dict[str, Any], step: int, model: GatedModel
    ) -> PruningPlan:
        """What goes in a round of pruning, from 1 on; how the network does without it is measured.

        ``story`` is brought up to date: the whole plan so far, and the result.
        """
        result = story["result"]
        plan = self.choose_channels(model, args, result, step)
        story["plan"] = compose_kept(story["plan"], plan)
        self.run.save_plan(PruningPlan(story["plan"]))
        pruned = prune(copy.deepcopy(model), plan)
        after, recalibrated = self.measure(pruned), None
        self.run.log(f"after surgery: {after}")
        if self.recalibrate:
            self.estimate_statistics(pruned)
            recalibrated = evaluate(pruned, self.test, self.runtime)
            self.run.log(f"recalibrated on {self.recalibrate} batches: {recalibrated}")
        add_surgery(result, plan, after, recalibrated)
        accuracy = (recalibrated or after.metrics).accuracy
        self.run.save("pruned.pth", pruned, **self.meta, accuracy=accuracy)
        self.run.draw_surgery(result, step)
        return plan

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
        mode = model.training
        update_bn(itertools.islice(self.train, self.recalibrate), model)
        model.train(mode)

    def choose_channels(
        self, model: GatedModel, args: argparse.Namespace, result: Mapping[str, Any], step: int
    ) -> PruningPlan:
        """Score all channels on one batch and select, as the flags say; rank 0 does so for all.

        Args:
            model: the network as it is now.
            args: what the command line says.
            result: what is known so far: the size of the network before the first round.
            step: the round, from 1 on; after round i of K, i/K of all that is to go is gone.
        """
        share = step / (args.steps or 1)

        def select() -> PruningPlan:
            indices = scoring_indices(self.train.images, args.score_images, args.score_seed)
            if CRITERIA[args.criterion].gradients:
                self.run.log(f"scoring on {len(indices)} training images")
            saliency = channel_saliency(
                model,
                *self.train.pick(indices),
                criterion=args.criterion,
                w_beta=args.w_beta,
                checkpoint_activations=args.checkpoint_activations,
                generator=random_stream(args.seed, SCORING, step),
            )
            self.run.draw_saliency(saliency, step)
            groups = model.channel_groups()
            limits = {"min_channels": args.min_channels, "round_to": args.round_to}
            if args.p is not None:
                entries = result["gate_entries"]["before"]
                return select_channels(groups, saliency, args.p * share, entries=entries, **limits)
            of = "params" if args.macs is None else "macs"
            whole, asked = result["cost"][of]["before"], getattr(args, of)
            try:
                return select_within(
                    model, Ranking(groups, saliency, **limits), self.image_size, of,
                    most=whole * (1 - (1 - asked) * share), least=whole * asked,
                )  # fmt: skip
            except ValueError as error:
                raise InputError(
                    f"--{of} {asked:g} of {whole}: {error}; ask for more of them, or see"
                    " --min_channels and --round_to"
                ) from None

        def select_or_refuse() -> PruningPlan:
            try:
                return select()
            except InputError:
                raise
            except ValueError as error:
                raise InputError(f"the network cannot be scored: {error}") from error

        return self.runtime.on_main(select_or_refuse)

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
            chosen_on="holdout" if self.holdout else "test",
        )  # fmt: skip
        resume = last.meta["training"] if last else None
        for number, stage in enumerate(stages, start=1):
            if resume and number < resume["stage"]:
                continue
            final = number == len(stages)
            if resume:
                tracker.continue_stage(resume, stage.recipe.epochs, final)
            else:
                cut = ", ".join(self.cut(model, stage))
                if len(stages) > 1:
                    what = f"cut {cut}" if cut else "all is cut"
                    self.run.log(f"stage {number}/{len(stages)}: {what}")
                tracker.start_stage(stage.recipe.epochs, final)
            with self.run.signals.deferred():
                fit(
                    model, self.train, self.holdout or self.test, stage.recipe, self.runtime,
                    watch=tracker, resume=resume,
                    first_epoch=sum(s.recipe.epochs for s in stages[: number - 1]),
                )  # fmt: skip
            resume = None
        return tracker

    def cut(self, model: GatedModel, stage: Stage) -> list[str]:
        """Cut in place what a stage cuts, and begin with fresh weights where it says so.

        Returns the names of the groups that have lost channels.
        """
        plan = stage.choose(model)
        losing = list(plan.losses(model.group_widths()).keep)
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
        if not self.holdout or tracker.last is None:
            return chosen
        path = self.run.folder / "model_best.pth"
        best = self.runtime.main_first(lambda: load_model(path))  # once rank 0 has written it
        last = evaluate(tracker.model, self.test, self.runtime)
        best = evaluate(best, self.test, self.runtime)
        on_test = {
            kind: {
                "last": getattr(last, kind), "best": getattr(best, kind),
                "best_epoch": tracker.best.number,
            }
            for kind in kinds
        }  # fmt: skip
        return {**on_test, "holdout": {"images": self.holdout.images, **chosen}}


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


def plan_stages(
    model: GatedModel, plan: PruningPlan, recipes: Recipes, args: argparse.Namespace
) -> list[Stage]:
    """One stage that cuts everything; or (``--smooth``) one per part, and a last that cuts nothing.

    ``model`` is the network that the plan was made for.
    """
    if args.from_scratch:
        return [Stage(lambda _: plan, recipes.scratch, fresh=True)]
    if not args.smooth:
        return [Stage(lambda _: plan, recipes.one_shot)]
    parts = [Stage(lambda _, part=part: part, recipes.stage) for part in split_plan(model, plan)]
    return [*parts, training_stage(recipes.final)]
