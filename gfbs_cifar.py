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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils import flags
from utils.batches import image_batches
from utils.cli import Parser, run_script
from utils.data import TEST_FOLDERS, class_digest, data_identity, load_data
from utils.distributed import seed_everything, select_runtime
from utils.experiment import (
    Experiment,
    check_budget,
    check_data,
    load_baseline,
)
from utils.finetune import check_batch
from utils.recipes import CIFAR_COSINE, CIFAR_RECIPES
from utils.report import result_table
from utils.resume import existing_run
from utils.run import Run


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
    flags.check_alias(parser, args)
    flags.check_stages(parser, args)
    flags.check_normalisation(parser, args)
    flags.check_overwrite(parser, args)
    flags.resolve_criterion(parser, args)
    flags.resolve_ratio(args)
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Prune and fine-tune, and return what result.json says."""
    runtime = select_runtime(args.device, args.gpu, args.sync_bn, flags.acceleration(args))
    runtime.share(args.bs, "--bs")
    network = flags.network_folder(args)
    baseline = load_baseline(args.checkpoint or args.output, network, args.net)
    flags.resolve_floor(args, max(baseline.model.group_widths().values()))
    name = f"{network}/{flags.run_name(args)}"
    folder, logdir = Path(args.output) / name, flags.logdir(args) / name
    config = flags.configuration(args, baseline.digest)
    done = runtime.on_main(lambda: existing_run(
        folder, config, lambda: data_identity(args.dataset, args.data_dir, TEST_FOLDERS),
        resume=args.resume, overwrite=args.overwrite,
    ))  # fmt: skip
    if done:
        return done
    data = runtime.main_first(lambda: load_data(args.dataset, args.data_dir, args.image_size))
    data, constants = data.normalised(flags.normalisation(args), baseline.meta)
    check_data(baseline, data.classes, args.image_size, f"--dataset {args.dataset}")
    check_batch(baseline.model, args.image_size, runtime.images_per_norm(args.bs), "--bs")
    check_budget(baseline.model, args, args.image_size)
    recipes = flags.adapt(args, CIFAR_RECIPES, CIFAR_COSINE if args.cosine else None)
    seed_everything(args.seed, args.deterministic)

    config["classes"] = class_digest(data.classes)
    config |= runtime.on_main(lambda: data_identity(args.dataset, args.data_dir, TEST_FOLDERS))
    train, test, holdout = image_batches(
        data, args.bs, runtime, seed=args.seed, holdout=args.holdout,
        limit_train=args.limit_train_batches, limit_test=args.limit_test_batches,
    )  # fmt: skip
    with Run(
        folder, logdir, config, runtime,
        net=args.net, resume=args.resume, overwrite=args.overwrite,
    ) as run:  # fmt: skip
        run.log(constants)
        meta = data.metadata(args.dataset)
        experiment = Experiment(
            run, runtime, train, test, args.image_size, meta,
            holdout=holdout, recalibrate=args.recalibrate,
        )  # fmt: skip
        result = experiment.prune_and_fine_tune(baseline, args, recipes, run.last)
        run.log("\n" + result_table(result) + "\n")
        return run.save_result(result)


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
