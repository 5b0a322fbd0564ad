"""Score the channels of a trained network, cut the least salient ones out, and fine-tune what is left.

    python gfbs_cifar.py --net gatevgg16 --p 0.7                 one-shot: cut everything, then fine-tune
    python gfbs_cifar.py --net gatevgg16 --p 0.7 --smooth        cut layer by layer, fine-tune in between
    python gfbs_cifar.py --net gatevgg16 --p 0.7 --epochs 0      cut, evaluate and save, no fine-tuning

Prunes CHECKPOINT/<net>/model_best.pth, as train.py leaves it, and writes plan.json, pruned.pth (right after surgery),
model_best.pth, last.pth, log.txt and result.json into OUTPUT/<net>/<criterion>_p<p>[_smooth]_seed<seed>.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils import cli
from utils.cost import model_cost
from utils.data import load_data, scoring_indices, train_and_test_batches
from utils.distributed import seed_everything, select_runtime
from utils.experiment import (
    CIFAR_RECIPES,
    check_classes,
    fine_tune,
    fine_tune_in_stages,
    load_baseline,
    pruning_result,
)
from utils.finetune import evaluate
from utils.pruning import select_channels
from utils.report import result_table
from utils.run import Run
from utils.saliency import channel_saliency
from utils.surgery import prune


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    cli.add_network_flag(parser, "gatevgg16")
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="the network to prune: a file, or a folder with"
        " <net>/model_best.pth or model_best.pth (default: the --output folder)",
    )
    cli.add_pruning_flags(parser, p=0.7, score_images=200)
    cli.add_data_flags(parser)
    cli.add_recipe_flags(parser, CIFAR_RECIPES.one_shot, least_epochs=0)
    cli.add_smooth_flags(parser, CIFAR_RECIPES)
    cli.add_run_flags(parser)
    return cli.resolve_criterion(parser, parser.parse_args(argv))


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Prune and fine-tune, and return what result.json says."""
    runtime = select_runtime(args.device, args.gpu)
    folder = f"{args.net}{cli.data_suffix(args.dataset)}"
    baseline = load_baseline(args.checkpoint or args.output, folder, args.net)
    data = load_data(args.dataset, args.data_dir, args.image_size).normalised_as(baseline.meta)
    check_classes(baseline, data.classes, f"--dataset {args.dataset}")
    seed_everything(args.seed, args.deterministic)

    name = f"{args.criterion}_p{args.p:g}{'_smooth' * args.smooth}_seed{args.seed}"
    config = {**cli.configuration(args), "baseline": baseline.digest}
    with Run(
        Path(args.output) / folder / name,
        Path(args.logdir) / folder / name,
        config,
        overwrite=args.overwrite,
    ) as run:
        train, test = train_and_test_batches(
            data, args.bs, runtime.device, seed=args.seed,
            limit_train=args.limit_train_batches, limit_test=args.limit_test_batches,
        )  # fmt: skip
        model = baseline.model.to(runtime.device)
        cost = model_cost(model, args.image_size)
        before = evaluate(model, test, runtime)
        run.log(f"baseline: {args.net} on {args.dataset}, {cost}, {before}; {runtime}")

        scoring_batch = train.pick(
            scoring_indices(len(data.train), args.score_images, args.score_seed)
        )
        saliency = channel_saliency(
            model, *scoring_batch, criterion=args.criterion, w_beta=args.w_beta
        )
        plan = select_channels(
            model.channel_groups(), saliency, args.p, min_channels=args.min_channels
        )
        run.save_plan(plan, saliency)

        pruned = prune(copy.deepcopy(model), plan)
        pruned_cost, after_surgery = (
            model_cost(pruned, args.image_size),
            evaluate(pruned, test, runtime),
        )
        meta = data.metadata(args.dataset)
        run.save("pruned.pth", pruned, **meta, accuracy=after_surgery.accuracy)
        run.log(f"after surgery: {pruned_cost}, {after_surgery}")
        result = pruning_result(args, model, plan, before, after_surgery, cost, pruned_cost)

        recipes = CIFAR_RECIPES.for_flags(args)
        if args.smooth:
            tracker = fine_tune_in_stages(model, plan, recipes, train, test, runtime, run, meta)
        else:
            tracker = fine_tune(pruned, recipes.one_shot, train, test, runtime, run, meta)
        result["accuracy"] |= tracker.accuracies()
        result["history"] = tracker.history_as_dicts()
        run.log("\n" + result_table(result) + "\n")
        return run.save_result(result)


if __name__ == "__main__":
    sys.exit(cli.run_script(parse_args, main))
