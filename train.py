"""Train an unpruned network on small images.

    python train.py --net gatevgg16
    python train.py --net gateresnet56 --dataset cifar100
    python train.py --net gateresnet20 --dataset folder --data_dir my_images --epochs 30

Writes model_best.pth (best on the test set; what gfbs_cifar.py prunes), last.pth (what --resume
continues from), log.txt and result.json into OUTPUT/<net>; <net> gains _cifar100, _folder or
_synthetic for data other than CIFAR-10.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models import build_model
from utils import flags
from utils.batches import image_batches
from utils.cli import Parser, run_script
from utils.cost import model_cost
from utils.data import TEST_FOLDERS, class_digest, data_identity, load_data
from utils.distributed import seed_everything, select_runtime
from utils.errors import InputError
from utils.finetune import check_batch
from utils.recipes import CIFAR_BASELINE, CIFAR_COSINE
from utils.resume import existing_run
from utils.run import Run
from utils.training import Training, training_stage


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    flags.add_network_flag(parser)
    flags.add_data_flags(parser)
    flags.add_normalisation_flags(parser)
    flags.add_holdout_flag(parser)
    flags.add_recipe_flags(parser, CIFAR_BASELINE, least_epochs=1)
    flags.add_cifar_training_flags(parser)
    flags.add_acceleration_flags(parser)
    flags.add_run_flags(parser)
    flags.add_resume_flags(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="continue from this last.pth, or the one in this folder; implies --resume",
    )
    args = parser.parse_args(argv)
    flags.check_alias(parser, args)
    flags.check_normalisation(parser, args)
    flags.check_overwrite(parser, args)
    if args.checkpoint and args.overwrite:
        parser.error("--checkpoint continues a run and does not go with --overwrite")
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return what result.json says."""
    runtime = select_runtime(args.device, args.gpu, args.sync_bn, flags.acceleration(args))
    runtime.share(args.bs, "--bs")
    network = flags.network_folder(args)
    folder, logdir = Path(args.output) / network, flags.logdir(args) / network
    checkpoint = find_named(Path(args.checkpoint), folder) if args.checkpoint else None
    config = flags.configuration(args)
    done = runtime.on_main(lambda: existing_run(
        folder, config, lambda: data_identity(args.dataset, args.data_dir, TEST_FOLDERS),
        resume=args.resume or checkpoint is not None, overwrite=args.overwrite,
    ))  # fmt: skip
    if done:
        return done
    data = runtime.main_first(lambda: load_data(args.dataset, args.data_dir, args.image_size))
    data, constants = data.normalised(flags.normalisation(args), {})
    config["classes"] = class_digest(data.classes)
    config |= runtime.on_main(lambda: data_identity(args.dataset, args.data_dir, TEST_FOLDERS))
    seed_everything(args.seed, args.deterministic)
    try:
        model = build_model(args.net, len(data.classes))
    except ValueError as error:  # an alias of 100 classes, another number of folders
        raise InputError(f"--net {args.net}: {error}") from None
    cost = model_cost(model, args.image_size)
    check_batch(model, args.image_size, runtime.images_per_norm(args.bs), "--bs")
    train, test, holdout = image_batches(
        data, args.bs, runtime, seed=args.seed, holdout=args.holdout,
        limit_train=args.limit_train_batches, limit_test=args.limit_test_batches,
    )  # fmt: skip
    with Run(
        folder, logdir, config, runtime,
        net=args.net, resume=args.resume, overwrite=args.overwrite, checkpoint=checkpoint,
    ) as run:  # fmt: skip
        if run.last:
            model.load_state_dict(run.last.model.state_dict())
        run.log(f"{args.net} on {args.dataset}: {train.images} training images,"
                f" {len(data.classes)} classes; {cost}; {runtime}")  # fmt: skip
        run.log(constants)
        cosine = CIFAR_COSINE if args.cosine else None
        recipe = CIFAR_BASELINE.adapted(args.epochs, args.lr, args.weight_decay, cosine)
        meta = data.metadata(args.dataset)
        training = Training(run, runtime, train, test, args.image_size, meta, holdout)
        if args.checkpoint:
            run.only_now = "--checkpoint"
            run.adopt(Path(args.checkpoint), "model_best.pth")
        every = args.checkpoint_every
        tracker = training.fine_tune(model, [training_stage(recipe)], every=every, last=run.last)

        accuracies = training.accuracies(tracker)
        accuracy = accuracies["accuracy"]
        run.log(
            f"top-1 accuracy on the test set: {accuracy['last']:.2f} % after the last epoch;"
            f" {accuracy['best']:.2f} % after epoch {accuracy['best_epoch']},"
            f" the best on {tracker.chosen_on}"
        )
        return run.save_result({
            "net": args.net, "dataset": args.dataset, "seed": args.seed, **accuracies,
            "cost": asdict(cost), "history": tracker.history,
        })  # fmt: skip


def find_named(path: Path, folder: Path) -> Path:
    """What --checkpoint names: a last.pth, or the folder of one."""
    path = path / "last.pth" if os.path.isdir(path) else path
    own = folder / "last.pth"
    if own.exists() and path.resolve() != own.resolve():
        raise InputError(
            f"--checkpoint {path}: {own} is there already; continue that with --resume"
        )
    return path


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
