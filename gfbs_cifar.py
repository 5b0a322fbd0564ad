"""Score the channels of a trained network, cut the least salient ones out, fine-tune what is left.

    python gfbs_cifar.py --net gatevgg16 --p 0.7              cut everything, then fine-tune
    python gfbs_cifar.py --net gatevgg16 --p 0.7 --smooth     cut and fine-tune layer by layer
    python gfbs_cifar.py --net gatevgg16 --p 0.7 --steps 5    score, cut and fine-tune five times
    python gfbs_cifar.py --net gatevgg16 --macs 0.5           keep half of the multiply-adds
    python gfbs_cifar.py --net gatevgg16 --p 0.7 --epochs 0   cut, evaluate and save only

Prunes CHECKPOINT/<net>/model_best.pth, as train.py leaves it, and writes plan.json, pruned.pth
(right after surgery), model_best.pth, last.pth, log.txt and result.json into
OUTPUT/<net>/<criterion>_p<p>[_smooth]_seed<seed> (macs<share>, _steps<K>, _scratch likewise), whose
name goes on with every setting that is not at its default: _epochs40, _wbeta0.1, ...
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from typing import Any

from utils.cli import flags, settings
from utils.cli.parser import Parser, run_script
from utils.data.batches import SCORING, Data, random_stream, scoring_batch
from utils.data.small import data_identity, image_batches, load_data
from utils.distributed import seed_everything
from utils.finetune import check_batch, fit
from utils.pruning import PruningPlan
from utils.recipes import CIFAR_RECIPES
from utils.run.baseline import check_classes, check_size, load_baseline
from utils.run.callbacks import RunCallback
from utils.run.folder import RunFolder
from utils.run.measure import (
    estimate_statistics,
    measure_baseline,
    measure_cut,
    measure_end,
    restore_files,
)
from utils.run.rounds import Pruning, Round
from utils.run.state import RunState
from utils.run.table import final_table
from utils.saliency import channel_saliency
from utils.selection import check_goal, select
from utils.surgery import prune


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    flags.add_network_flag(parser)
    flags.add_baseline_flag(parser)
    flags.add_pruning_flags(parser, p=0.7, score_images=200)
    flags.add_data_flags(parser)
    flags.add_normalisation_flags(parser)
    flags.add_holdout_flag(parser)
    flags.add_recipe_flags(parser, CIFAR_RECIPES.one_shot, least_epochs=0)
    flags.add_cifar_training_flags(parser)
    flags.add_smooth_flags(parser, CIFAR_RECIPES)
    flags.add_acceleration_flags(parser)
    flags.add_run_flags(parser)
    flags.add_resume_flags(parser)
    args = parser.parse_args(argv)
    settings.check_alias(parser, args)
    settings.check_run(parser, args)
    settings.resolve_pruning(parser, args)
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Prune and fine-tune, and return what result.json says."""
    runtime = settings.runtime(args, args.bs, "--bs")
    baseline = load_baseline(
        args.checkpoint or args.output, settings.network_folder(args), args.net
    )
    asked = settings.pruning(args, baseline.model, CIFAR_RECIPES)
    run = RunFolder(
        settings.pruning_run(args, baseline), runtime,
        lambda: data_identity(args.dataset, args.data_dir),
    )  # fmt: skip
    if done := run.finished():
        return done
    images = runtime.main_first(lambda: load_data(args.dataset, args.data_dir, args.image_size))
    about, constants = images.about(args.dataset, settings.normalisation(args), baseline.meta)
    advice = "name the data that it was trained on"
    check_classes(baseline, about, f"--dataset {args.dataset}", advice)
    check_size(baseline, args.image_size)
    check_batch(baseline.model, args.image_size, runtime.images_per_norm(args.bs), "--bs")
    check_goal(baseline.model, asked.goal, args.image_size)
    seed_everything(args.seed, args.deterministic)
    data = image_batches(
        images, about, args.bs, runtime, seed=args.seed, holdout=args.holdout,
        limit_train=args.limit_train_batches, limit_test=args.limit_test_batches,
    )  # fmt: skip

    with run.opened(about.classes):
        run.log(constants)
        state = run.resumed() or RunState(baseline.model, settings.new_record(args, asked))
        return prune_in_rounds(run, state, data, asked, baseline.meta.get("config"))


def prune_in_rounds(
    run: RunFolder, state: RunState, data: Data, asked: Pruning, made_by: Any
) -> dict[str, Any]:
    """Measure the baseline, go through the rounds, and return what result.json says.

    ``made_by`` is the configuration of the run that made the baseline, if its file says.
    """
    if state.training is None:
        measure_baseline(run, state, data, made_by)
    run.check_space(state.model)
    for number, this in enumerate(asked.rounds):
        if number >= state.round:  # earlier ones are done
            state.round = number
            prune_and_fine_tune(run, state, data, asked, this)
    measure_end(run, state, data)
    run.log(f"\n{final_table(state.record)}\n")
    return run.finish(state.record)


def prune_and_fine_tune(
    run: RunFolder, state: RunState, data: Data, asked: Pruning, this: Round
) -> None:
    """One round of the method: score, select, cut, fine-tune.

    A round that an earlier process has begun to train is continued: its cut is done.
    """
    model, scoring, runtime = state.model, asked.scoring, run.runtime
    widths = model.group_widths()

    def score_and_select() -> PruningPlan:
        images, labels = scoring_batch(data.train, scoring.images, scoring.seed)
        if scoring.looks_at_images:
            run.log(f"scoring on {len(labels)} training images")
            check_batch(model, images.shape[-1], len(labels), "--score_images")
        saliency = channel_saliency(
            model, images, labels, criterion=scoring.criterion, w_beta=scoring.w_beta,
            checkpoint_activations=scoring.recompute,
            generator=random_stream(scoring.random_seed, SCORING, state.round + 1),
        )  # fmt: skip
        run.board.draw_saliency(saliency, len(state.record.history))
        goal, before = asked.goal.at(this.share), state.record.size_before
        return select(model, saliency, goal, data.about.image_size, before)

    if state.training is None:
        runtime.undo_sync_bn(model)
        if this.scores:
            plan = runtime.on_main(score_and_select)  # rank 0 decides for all
            state.plan = state.plan.then(plan)
            run.save_plan(state.plan)
            # --smooth cuts part by part: the whole plan is measured on a copy.
            pruned = prune(copy.deepcopy(model) if this.groups else model, plan)
            measure_cut(run, state, pruned, plan, data, asked.recalibrate)
        if this.groups:
            if not state.record.shrunk & set(this.groups):
                return
            prune(model, state.plan.only(this.groups))
            estimate_statistics(model, data.train, asked.recalibrate)
        if this.fresh:
            model.reset_parameters()
        if len(asked.rounds) > 1:
            cut = [name for name, width in model.group_widths().items() if width < widths[name]]
            what = f"cut {', '.join(cut)}" if cut else "nothing to cut"
            run.log(f"round {state.round + 1}/{len(asked.rounds)}: {what}")

    callback = RunCallback(run, state, data, asked.rounds)
    if state.training is not None:
        restore_files(run, state, callback)
    with run.signals.deferred():
        fit(
            model, data.train, data.choosing, this.recipe, runtime,
            callback=callback, resume=state.training, first_epoch=state.epochs_before,
        )  # fmt: skip
    state.training = None


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
