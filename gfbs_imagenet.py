"""Score, prune and fine-tune a ResNet on ImageNet, or on any two folders of images.

    python gfbs_imagenet.py --net resnet50 --data_dir <path-to-imagenet> --p 0.4 --gpu 0,1,2,3
    torchrun --nproc_per_node=8 -- gfbs_imagenet.py --data_dir <path-to-imagenet> --p 0.4

Prunes CHECKPOINT/<net>/model_best.pth, as prepare_torch_imagenet_models.py leaves it; DATA_DIR has
train/<class>/ and val/<class>/. Writes plan.json, pruned.pth (right after surgery), model_best.pth,
last.pth, log.txt and result.json into OUTPUT/<net>/<criterion>_p<p>[_smooth]_seed<seed>, whose name
goes on with every setting that is not at its default.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from utils import flags
from utils.cli import Parser, run_script
from utils.cost import model_cost
from utils.data import (
    choose_normalisation,
    class_digest,
    data_identity,
    fingerprint,
    hold_out,
    list_folders,
)
from utils.distributed import seed_everything, select_runtime
from utils.experiment import (
    Experiment,
    check_budget,
    load_baseline,
)
from utils.finetune import check_batch
from utils.image_folders import (
    IMAGENET_NORMALISATION,
    Crops,
    FolderBatches,
    check_head,
    folder_metadata,
)
from utils.recipes import IMAGENET_RECIPES
from utils.report import result_table
from utils.resume import existing_run
from utils.run import Run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.set_defaults(dataset="imagenet")
    flags.add_imagenet_network_flag(parser)
    flags.add_baseline_flag(parser)
    flags.add_pruning_flags(parser, p=0.4, score_images=None)
    flags.add_folder_flags(parser)
    flags.add_normalisation_flags(parser)
    flags.add_holdout_flag(parser)
    flags.add_recipe_flags(parser, IMAGENET_RECIPES.one_shot, least_epochs=0)
    flags.add_imagenet_training_flags(parser)
    flags.add_smooth_flags(parser, IMAGENET_RECIPES)
    flags.add_acceleration_flags(parser)
    flags.add_run_flags(parser)
    flags.add_resume_flags(parser)
    args = parser.parse_args(argv)
    flags.check_stages(parser, args)
    flags.check_schedule(parser, args)
    flags.check_normalisation(parser, args)
    flags.check_overwrite(parser, args)
    flags.resolve_criterion(parser, args)
    flags.resolve_ratio(args)
    args.defaults["score_images"] = args.train_bs
    args.score_images = args.score_images or args.train_bs
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Prune and fine-tune, and return what result.json says."""
    runtime = select_runtime(args.device, args.gpu, args.sync_bn, flags.acceleration(args))
    runtime.share(args.train_bs, "--train_bs")
    baseline = load_baseline(args.checkpoint or args.output, args.net, args.net)
    flags.resolve_floor(args, max(baseline.model.group_widths().values()))
    name = f"{args.net}/{flags.run_name(args)}"
    folder, logdir = Path(args.output) / name, flags.logdir(args) / name
    config = flags.configuration(args, baseline.digest)  # of the weights before any new head
    done = runtime.on_main(lambda: existing_run(
        folder, config, lambda: data_identity("imagenet", args.data_dir, ("val",)),
        resume=args.resume, overwrite=args.overwrite,
    ))  # fmt: skip
    if done:
        return done
    train_images, val_images, classes = list_folders(Path(args.data_dir), ("val",))
    seed_everything(args.seed, args.deterministic)
    if args.new_head:
        baseline.model.replace_head(len(classes))
    else:
        check_head(baseline, classes, f"--data_dir {args.data_dir}")
    model_cost(baseline.model, args.image_size)
    check_batch(
        baseline.model, args.image_size, runtime.images_per_norm(args.train_bs), "--train_bs"
    )
    check_budget(baseline.model, args, args.image_size)
    recipes = flags.adapt(args, IMAGENET_RECIPES, flags.imagenet_cosine(args))

    config |= runtime.on_main(lambda: {
        "classes": class_digest(classes),
        "data": fingerprint(Path(args.data_dir), train_images, val_images),
    })  # fmt: skip
    trained, held = hold_out(train_images, args.holdout)
    normalisation, constants = choose_normalisation(
        flags.normalisation(args), baseline.meta, IMAGENET_NORMALISATION
    )
    with Run(
        folder, logdir, config, runtime,
        net=args.net, resume=args.resume, overwrite=args.overwrite,
    ) as run:  # fmt: skip
        run.log(constants)
        crops = Crops.for_baseline(args.image_size, baseline.meta)
        with ExitStack() as stack:
            train, val, holdout = (
                stack.enter_context(closing(FolderBatches(
                    images, args.train_bs, crops, runtime, workers=args.workers, limit=limit,
                    augment=images is trained, seed=args.seed, normalisation=normalisation,
                ))) if images else None
                for images, limit in (
                    (trained, args.limit_train_batches),
                    (val_images, args.limit_val_batches),
                    (held, args.limit_val_batches),
                )
            )  # fmt: skip
            source = baseline.meta.get("source")
            meta = folder_metadata(crops, normalisation, source, classes)
            experiment = Experiment(
                run, runtime, train, val, args.image_size, meta,
                holdout=holdout, recalibrate=args.recalibrate,
            )  # fmt: skip
            result = experiment.prune_and_fine_tune(baseline, args, recipes, run.last)
        run.log("\n" + result_table(result) + "\n")
        return run.save_result(result)


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
