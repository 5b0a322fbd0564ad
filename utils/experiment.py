"""The steps of a pruning experiment: score, select, cut, measure, fine-tune."""

from __future__ import annotations

import argparse
import copy
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from models import GatedModel
from utils.batches import SCORING, random_stream, scoring_indices
from utils.budget import least_cost, select_within
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.cost import model_cost
from utils.errors import InputError
from utils.finetune import check_batch
from utils.flags import IMAGENET_NETWORKS
from utils.pruning import PruningPlan, Ranking, select_channels
from utils.recipes import Recipes
from utils.result import add_surgery, first_result
from utils.saliency import CRITERIA, channel_saliency
from utils.surgery import prune, split_plan
from utils.tally import Metrics
from utils.training import Stage, Training, training_stage


def load_baseline(place: str | Path, folder: str, net: str) -> Checkpoint:
    """The network to prune: a file, or ``model_best.pth`` in ``place/folder`` or in ``place``."""
    place = Path(place)
    if os.path.isfile(place) or (place.suffix and not os.path.isdir(place)):
        path = place
    else:
        choices = [place / folder / "model_best.pth", place / "model_best.pth"]
        path = next(filter(os.path.isfile, choices), choices[0])
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        maker = "prepare_torch_imagenet_models.py" if net in IMAGENET_NETWORKS else "train.py"
        raise InputError(
            f"{path}: no such checkpoint; make one with {maker}, or name another with --checkpoint"
        ) from None
    except OSError:
        pass  # load_checkpoint says why it cannot be read
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


def check_budget(model: GatedModel, args: argparse.Namespace, image_size: int) -> None:
    """Raise InputError where no plan can cost as little as the flags say; no scores are needed."""
    for of in ("macs", "params"):
        asked = getattr(args, of)
        if asked is None:
            continue
        whole = getattr(model_cost(model, image_size), of)
        least = getattr(least_cost(model, image_size, args.min_channels, args.round_to), of)
        if least > asked * whole:
            raise InputError(
                f"--{of} {asked:g} of {whole}: at least {least} stay; ask for more of them, or see"
                " --min_channels and --round_to"
            )


def at_chance(metrics: Metrics, classes: int) -> bool:
    """Whether guessing would be as good, within two standard deviations."""
    chance = 1 / classes
    noise = math.sqrt(chance * (1 - chance) / metrics.images)
    return metrics.accuracy <= 100 * (chance + 2 * noise)


class Experiment(Training):
    """A network that is pruned and then trained."""

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
            if not getattr(args, "new_head", False) and at_chance(
                before.metrics, model.num_classes
            ):
                self.run.log(
                    "warning: the baseline is at chance on this data; is it the data it was"
                    " trained on? see --mean/--std"
                )
            story = {"plan": {}, "result": first_result(args, baseline, before)}
            if args.holdout > (baseline.meta.get("config") or {}).get("holdout", 0):
                self.run.log("warning: the baseline was trained on images that are held out here")
        if args.steps:
            length = recipes.stage.epochs
            stages = [
                Stage(
                    partial(self.choose_and_report, args, story, step, (step - 1) * length),
                    recipes.stage,
                )
                for step in range(1, args.steps + 1)
            ]
            stages += [training_stage(recipes.one_shot)] if args.epochs else []
        else:
            plan = PruningPlan(story["plan"])
            if not last:
                plan = self.choose_and_report(args, story, 1, 0, model)
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
        self,
        args: argparse.Namespace,
        story: dict[str, Any],
        step: int,
        done: int,
        model: GatedModel,
    ) -> PruningPlan:
        """What goes in a round of pruning, from 1 on; how the network does without it is measured.

        ``story`` is brought up to date: the whole plan so far, and the result. ``done`` epochs have
        been trained before.
        """
        result = story["result"]
        plan = self.choose_channels(model, args, result, step, done)
        story["plan"] = PruningPlan(story["plan"]).then(plan).keep
        self.run.save_plan(PruningPlan(story["plan"]))
        pruned = prune(copy.deepcopy(model), plan)
        after, recalibrated = self.measure(pruned), None
        self.run.log(f"after surgery: {after}")
        if self.recalibrate:
            self.estimate_statistics(pruned)
            recalibrated = self.measure(pruned).metrics
            self.run.log(f"recalibrated on {self.recalibrate} batches: {recalibrated}")
        add_surgery(result, plan, after, recalibrated)
        accuracy = (recalibrated or after.metrics).accuracy
        self.run.save("pruned.pth", pruned, **self.meta, accuracy=accuracy)
        self.run.board.draw_surgery(result, done)
        return plan

    def choose_channels(
        self,
        model: GatedModel,
        args: argparse.Namespace,
        result: Mapping[str, Any],
        step: int,
        done: int,
    ) -> PruningPlan:
        """Score all channels on one batch and select, as the flags say; rank 0 does so for all.

        Args:
            model: the network as it is now.
            args: what the command line says.
            result: what is known so far: the size of the network before the first round.
            step: the round, from 1 on; after round i of K, i/K of all that is to go is gone.
            done: epochs that have been trained before.
        """

        def choose() -> PruningPlan:
            try:
                saliency = self._score(model, args, step)
                plan = self._select(model, saliency, args, result, step / (args.steps or 1))
            except InputError:
                raise
            except ValueError as error:
                raise InputError(f"the network cannot be scored: {error}") from error
            self.run.board.draw_saliency(saliency, done)
            return plan

        return self.runtime.on_main(choose)

    def _score(self, model: GatedModel, args: argparse.Namespace, step: int) -> dict[str, Tensor]:
        self.train.set_epoch(0)  # the same augmentation, whatever came before
        indices = scoring_indices(self.train.images, args.score_images, args.score_seed)
        if CRITERIA[args.criterion].gradients:
            self.run.log(f"scoring on {len(indices)} training images")
            check_batch(model, self.image_size, len(indices), "--score_images")
        return channel_saliency(
            model,
            *self.train.pick(indices),
            criterion=args.criterion,
            w_beta=args.w_beta,
            checkpoint_activations=args.checkpoint_activations,
            generator=random_stream(args.seed, SCORING, step),
        )

    def _select(
        self,
        model: GatedModel,
        saliency: Mapping[str, Tensor],
        args: argparse.Namespace,
        result: Mapping[str, Any],
        share: float,
    ) -> PruningPlan:
        """What goes once a ``share`` of all that is to go does."""
        groups = model.channel_groups()
        limits = {
            "min_channels": args.min_channels, "round_to": args.round_to, "scope": args.scope,
        }  # fmt: skip
        if args.p is not None:
            entries = result["gate_entries"]["before"]
            return select_channels(groups, saliency, args.p * share, entries=entries, **limits)
        of = "params" if args.macs is None else "macs"
        whole, asked = result["cost"][of]["before"], getattr(args, of)
        most = whole * asked if share == 1 else whole * (1 - (1 - asked) * share)
        ranking = Ranking(groups, saliency, **limits)
        return select_within(model, ranking, self.image_size, of, most)


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
