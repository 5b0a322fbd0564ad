"""Score, prune and fine-tune a ResNet on ImageNet, or on any two folders of images.

    python gfbs_imagenet.py --net resnet50 --data_dir <path-to-imagenet> --p 0.4
    python gfbs_imagenet.py --net resnet50 --data_dir <path-to-imagenet> --p 0.4 --gpu 0,1,2,3

Prunes CHECKPOINT/<net>/model_best.pth of prepare_torch_imagenet_models.py, with one process per
GPU. DATA_DIR holds train/<class>/ and val/<class>/. Writes the files of gfbs_cifar.py into
OUTPUT/<net>/<criterion>_p<p>[_smooth]_seed<seed>, with every setting that is not at its default.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gfbs_cifar import prune_in_rounds
from models import replace_head
from utils.cli import flags, settings
from utils.cli.parser import Parser, run_script
from utils.cost import model_cost
from utils.data.batches import About, choose_normalisation
from utils.data.folders import IMAGENET_NORMALISATION, Crops, folder_batches
from utils.data.listing import folder_identity, list_folders
from utils.distributed import seed_everything
from utils.errors import InputError
from utils.finetune import check_batch
from utils.recipes import IMAGENET_RECIPES
from utils.run.baseline import check_classes, load_baseline
from utils.run.folder import RunFolder


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.set_defaults(dataset="imagenet")
    flags.add_network_flag(parser, imagenet=True)
    flags.add_pruning_flags(parser, p=0.4, score_images=None, recompute=True)
    flags.add_imagenet_flags(parser, IMAGENET_RECIPES.one_shot)
    flags.add_round_flags(parser, IMAGENET_RECIPES)
    flags.add_run_flags(parser)
    args = parser.parse_args(argv)
    settings.check_run(parser, args)
    settings.resolve_pruning(parser, args)
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Prune and fine-tune, and return what is in result.json. The method is in gfbs_cifar.py."""
    runtime = settings.runtime(args, args.train_bs, "--train_bs")
    baseline = load_baseline(args.checkpoint, settings.network_folder(args), args.net, args.output)
    model, meta = baseline.model, baseline.meta
    args.image_size = args.image_size or meta.get("image_size", Crops.size)
    args.defaults["image_size"] = Crops.size
    asked = settings.pruning(args, model, IMAGENET_RECIPES)
    where = settings.run_folder(args, baseline)
    run = RunFolder(where, runtime, lambda: folder_identity(args.data_dir, ("val",)))
    if done := run.finished():
        return done
    train, val, classes = list_folders(Path(args.data_dir), ("val",))
    seed_everything(args.seed, args.deterministic)
    typed, usual = settings.normalisation(args), IMAGENET_NORMALISATION
    normalisation, constants = choose_normalisation(typed, meta, usual)
    crops = Crops.for_baseline(args.image_size, meta)
    how = crops.resize, crops.interpolation, meta.get("source")
    about = About(args.dataset, classes, args.image_size, normalisation, *how)
    if args.new_head:
        try:
            replace_head(model, len(classes))
        except ValueError as error:
            raise InputError(f"--new_head: {error}") from error
    else:
        advice = "--new_head starts a fresh classifier for other classes"
        check_classes(baseline, about, f"--data_dir {args.data_dir}", advice)
    model_cost(model, args.image_size)  # raises an error for images that are too small
    per_norm = runtime.images_per_norm(args.train_bs // (args.accumulate or 1))
    check_batch(model, args.image_size, per_norm, "--train_bs")
    how = {"batch_size": args.train_bs, "seed": args.seed, "workers": args.workers}
    with folder_batches(train, val, about, settings.split(args), runtime=runtime, **how) as data:
        record = settings.new_record(args, asked)
        return prune_in_rounds(run, record, data, asked, baseline, constants)


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
