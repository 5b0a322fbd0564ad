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
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models import build_model
from utils import flags
from utils.batches import image_batches
from utils.checkpoint import Checkpoint
from utils.cli import Parser, run_script
from utils.cost import model_cost
from utils.data import load_data
from utils.distributed import seed_everything, select_runtime
from utils.errors import InputError
from utils.finetune import check_batch
from utils.recipes import CIFAR_BASELINE, CIFAR_COSINE
from utils.resume import check_same_run, finished_result, load_last, load_resumable
from utils.run import Run
from utils.training import Training, training_stage


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    flags.add_network_flag(parser)
    flags.add_data_flags(parser)
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
    flags.check_overwrite(parser, args)
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return what result.json says."""
    runtime = select_runtime(args.device, args.gpu, args.sync_bn, flags.acceleration(args))
    runtime.share(args.bs, "--bs")
    network = flags.network_folder(args)
    folder, logdir = Path(args.output) / network, Path(args.logdir) / network
    done = args.skip_finished and finished_result(folder, flags.configuration(args), runtime)
    if done:
        return done
    data = runtime.main_first(lambda: load_data(args.dataset, args.data_dir, args.image_size))
    config = flags.configuration(args, data.classes)
    seed_everything(args.seed, args.deterministic)
    try:
        model = build_model(args.net, len(data.classes))
    except ValueError as error:  # an alias of 100 classes, another number of folders
        raise InputError(f"--net {args.net}: {error}") from None
    cost = model_cost(model, args.image_size)
    check_batch(model, args.image_size, runtime.images_per_norm(args.bs), "--bs")
    last = None
    if args.checkpoint:
        last = load_named(Path(args.checkpoint), folder, args.net, config)
    elif args.resume:
        last = load_last(folder, args.net, config, runtime)
    if last:
        model.load_state_dict(last.model.state_dict())

    train, test, holdout = image_batches(
        data, args.bs, runtime, seed=args.seed, holdout=args.holdout,
        limit_train=args.limit_train_batches, limit_test=args.limit_test_batches,
    )  # fmt: skip
    with Run(folder, logdir, config, runtime, overwrite=args.overwrite, last=last) as run:
        run.log(f"{args.net} on {args.dataset}: {train.images} training images,"
                f" {len(data.classes)} classes; {cost}; {runtime}")  # fmt: skip
        cosine = CIFAR_COSINE if args.cosine else None
        recipe = CIFAR_BASELINE.adapted(args.epochs, args.lr, args.weight_decay, cosine)
        meta = data.metadata(args.dataset)
        training = Training(run, runtime, train, test, args.image_size, meta, holdout)
        if args.checkpoint:
            run.only_now = ("--checkpoint", args.checkpoint)
            run.adopt(Path(args.checkpoint), "model_best.pth")
        every = args.checkpoint_every
        tracker = training.fine_tune(model, [training_stage(recipe)], every=every, last=last)

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


def load_named(path: Path, folder: Path, net: str, config: Mapping[str, Any]) -> Checkpoint:
    """What --checkpoint names: a last.pth, or the folder of one."""
    path = path / "last.pth" if path.is_dir() else path
    own = folder / "last.pth"
    if own.exists() and path.resolve() != own.resolve():
        raise InputError(
            f"--checkpoint {path}: {own} is there already; continue that with --resume"
        )
    return check_same_run(load_resumable(path, net), config)


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
