"""Score the channels of a trained network, cut the least salient ones out, fine-tune what is left.

    python gfbs_cifar.py --net gatevgg16 --p 0.7              cut everything, then fine-tune
    python gfbs_cifar.py --net gatevgg16 --p 0.7 --smooth     cut and fine-tune layer by layer
    python gfbs_cifar.py --net gatevgg16 --p 0.7 --steps 5    score, cut and fine-tune five times
    python gfbs_cifar.py --net gatevgg16 --macs 0.5           keep half of the multiply-adds
    python gfbs_cifar.py --net gatevgg16 --p 0.7 --epochs 0   cut, evaluate and save only

Prunes CHECKPOINT/<net>/model_best.pth, which train.py writes. Writes plan.json, pruned.pth (right
after surgery), model_best.pth, last.pth, log.txt and result.json into
OUTPUT/<net>/<criterion>_p<p>[_smooth]_seed<seed> (macs<share>, _steps<K>, _scratch likewise). Every
setting that is not at its default is appended to that name: _epochs40, _wbeta0.1, ...
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from models import checkpoint_blocks, group_widths, reset_parameters
from utils.checkpoint import Checkpoint
from utils.cli import flags, settings
from utils.cli.parser import Parser, run_script
from utils.data.batches import SCORING, Data, random_stream, scoring_batch
from utils.data.small import data_identity, image_batches, load_data
from utils.distributed import seed_everything
from utils.finetune import check_batch, fit, head_alone
from utils.recipes import CIFAR_RECIPES
from utils.run.baseline import check_classes, check_size, load_baseline
from utils.run.folder import RunCallback, RunFolder
from utils.run.measure import measure_baseline, measure_cut, measure_end, prune_checked, recalibrate
from utils.run.record import Record, final_table
from utils.run.rounds import Pruning, RunState
from utils.saliency import CRITERIA, Scoring, channel_saliency
from utils.selection import check_goal, select


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    flags.add_network_flag(parser)
    flags.add_pruning_flags(parser, p=0.7, score_images=200)
    flags.add_cifar_flags(parser, CIFAR_RECIPES.one_shot, least_epochs=0)
    flags.add_round_flags(parser, CIFAR_RECIPES)
    flags.add_run_flags(parser)
    args = parser.parse_args(argv)
    settings.check_run(parser, args)
    settings.resolve_pruning(parser, args)
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Prune and fine-tune, and return the content of result.json."""
    runtime = settings.runtime(args, args.bs, "--bs")
    baseline = load_baseline(args.checkpoint, settings.network_folder(args), args.net, args.output)
    asked = settings.pruning(args, baseline.model, CIFAR_RECIPES)
    where = settings.run_folder(args, baseline)
    run = RunFolder(where, runtime, lambda: data_identity(args.dataset, args.data_dir))
    if done := run.finished():
        return done
    images = runtime.main_first(lambda: load_data(args.dataset, args.data_dir, args.image_size))
    about, constants = images.about(args.dataset, settings.normalisation(args), baseline.meta)
    advice = "name the data that it was trained on"
    check_classes(baseline, about, f"--dataset {args.dataset}", advice)
    check_size(baseline, args.image_size)
    per_norm = runtime.images_per_norm(args.bs // (args.accumulate or 1))
    check_batch(baseline.model, args.image_size, per_norm, "--bs")
    seed_everything(args.seed, args.deterministic)
    data = image_batches(images, about, args.bs, runtime, args.seed, settings.split(args))
    record = settings.new_record(args, asked)
    return prune_in_rounds(run, record, data, asked, baseline, constants)


def prune_in_rounds(
    run: RunFolder, record: Record, data: Data, asked: Pruning, baseline: Checkpoint, constants: str
) -> dict[str, Any]:
    """Prune a copy of the baseline round by round, and return the content of result.json."""
    check_goal(baseline.model, asked.goal, data.about.image_size)
    with run.opened(data.about.classes):
        run.log(constants)
        state = run.resumed() or RunState(copy.deepcopy(baseline.model), record)
        if state.training is None:
            measure_baseline(run, state, data, baseline.meta.get("config"))
        run.check_space(state.model)
        for number in range(state.round, len(asked.rounds)):  # from the round that is resumed
            state.round = number
            prune_and_fine_tune(run, state, data, asked, baseline.model)
            if asked.rounds[number].head:  # what is pruned from here on is another network
                measure_baseline(run, state, data, baseline.meta.get("config"))
        measure_end(run, state, data)
        run.log(f"\n{final_table(state.record)}\n")
        return run.finish(state.record)


def prune_and_fine_tune(
    run: RunFolder, state: RunState, data: Data, asked: Pruning, unpruned: nn.Module
) -> None:
    """One round of the method: score, select, cut, fine-tune.

    One shot is a single round that does all four. --steps repeats them, each time with a larger
    share of the goal. --smooth scores and selects in its first round only, and cuts a part of that
    plan in every round. Both end with a round that only fine-tunes. --new_head comes first, with a
    round that trains the classifier alone. --latency and --distill compare with ``unpruned``.
    """
    model, record, runtime = state.model, state.record, run.runtime
    this, widths = asked.rounds[state.round], group_widths(model)

    if state.training is None:  # otherwise this round is resumed, and its cut is done
        runtime.undo_sync_bn(model)  # for rank 0, which scores alone: all ranks must cut the same
        if this.scores:
            # 1. Score every channel on one batch: gfbs reads gamma, dL/dgamma and beta of its norm.
            saliency = runtime.on_main(lambda: score(run, state, data, asked.scoring))

            # 2. Select: the plan keeps the most salient channels that meet this round's goal.
            goal, size = asked.goal.at(this.share), data.about.image_size
            costs = {"gate_entries": record.gate_entries, **record.cost}
            whole = {name: cost["before"] for name, cost in costs.items()}  # before any cut
            reach = partial(select, model, saliency, goal, size, whole, unpruned, run.log)
            plan = runtime.on_main(reach)
            state.plan, record.held_at_floor = state.plan.then(plan), list(plan.held_at_floor)

            # 3. Cut: slice the other channels out of every layer that makes or reads them.
            # With --smooth, only measure that cut, on a copy: each round cuts its own part below.
            pruned = prune_checked(copy.deepcopy(model) if this.groups else model, plan, data)
            run.save_plan(state.plan)
            measure_cut(run, state, (unpruned, pruned), data, asked)
        if this.groups:
            if not record.shrunk & set(this.groups):
                return  # the plan keeps this part whole, so there is no damage to repair
            prune_checked(model, state.plan.only(this.groups), data)
            recalibrate(model, data.train, asked.recalibrate)
        if this.fresh:  # --from_scratch: keep the shape, forget the weights
            reset_parameters(model)
        if len(asked.rounds) > 1:
            cut = [name for name, width in group_widths(model).items() if width < widths[name]]
            what = f"cut {', '.join(cut)}" if cut else "nothing to cut"
            what = "train the new classifier alone" if this.head else what
            run.log(f"round {state.round + 1}/{len(asked.rounds)}: {what}")

    # 4. Fine-tune. The callback logs epochs and saves checkpoints; fit knows nothing of pruning.
    callback = RunCallback(run, state, data, asked.rounds)
    callback.restore_files()
    train, test = data.train, data.choosing
    start = {"resume": state.training, "first_epoch": len(record.history) - len(state.epochs)}
    trainable = head_alone(model) if this.head else nullcontext()
    with trainable, run.signals.deferred():  # a signal stops after the batch; the state is saved
        fit(model, train, test, this.recipe, runtime, callback=callback, teacher=unpruned, **start)
    state.training = None


def score(run: RunFolder, state: RunState, data: Data, how: Scoring) -> dict[str, Tensor]:
    """The saliency (C,) of every channel by group, on one batch of training images."""
    images, labels = scoring_batch(data.train, how.images, how.seed)
    if CRITERIA[how.criterion].gradients:  # else it does not look at the images
        run.log(f"scoring on {len(labels)} training images")
        check_batch(state.model, images.shape[-1], len(labels), "--score_images")
        if how.recompute and state.round == 0 and not checkpoint_blocks(state.model):
            nothing = f"{state.record.net} has no blocks whose activations can be recomputed"
            run.log(f"{nothing}; a lower --score_images saves memory, but gives other scores")
    saliency = channel_saliency(
        state.model,
        images,
        labels,
        criterion=how.criterion,
        w_beta=how.w_beta,
        checkpoint_activations=how.recompute,
        generator=random_stream(how.random_seed, SCORING, state.round + 1),
    )
    run.board.draw_saliency(saliency, len(state.record.history))
    return saliency


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
