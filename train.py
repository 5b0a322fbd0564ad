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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models import build_model
from utils import flags
from utils.batches import train_and_test_batches
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.cli import Parser, run_script
from utils.cost import model_cost
from utils.data import load_data
from utils.distributed import seed_everything, select_runtime
from utils.errors import InputError
from utils.finetune import CIFAR_BASELINE, CIFAR_COSINE, fit
from utils.run import Run, differences
from utils.tracker import Tracker


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    flags.add_network_flag(parser, "gatevgg16")
    flags.add_data_flags(parser)
    flags.add_recipe_flags(parser, CIFAR_BASELINE, least_epochs=1)
    flags.add_run_flags(parser)
    flags.add_resume_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return what result.json says."""
    runtime = select_runtime(args.device, args.gpu, args.sync_bn)
    runtime.share(args.bs, "--bs")
    network = flags.network_folder(args)
    resumed = (
        load_last(args, Path(args.output) / network) if args.resume or args.checkpoint else None
    )
    with runtime.main_first():
        data = load_data(args.dataset, args.data_dir, args.image_size)
    seed_everything(args.seed, args.deterministic)
    try:
        model = build_model(args.net, len(data.classes))
    except ValueError as error:
        raise InputError(f"--net {args.net} --dataset {args.dataset}: {error}") from None

    folder, logdir = Path(args.output) / network, Path(args.logdir) / network
    config = flags.configuration(args)
    with Run(folder, logdir, config, runtime, overwrite=args.overwrite) as run:
        train, test = train_and_test_batches(
            data, args.bs, runtime, seed=args.seed,
            limit_train=args.limit_train_batches, limit_test=args.limit_test_batches,
        )  # fmt: skip
        cost = model_cost(model, args.image_size)
        run.log(f"{args.net} on {args.dataset}: {len(data.train)} training images,"
                f" {len(data.classes)} classes; {cost}; {runtime}")  # fmt: skip
        recipe = CIFAR_BASELINE.adapted(
            args.epochs, args.lr, args.weight_decay, CIFAR_COSINE if args.cosine else None
        )
        tracker = Tracker(run, model, recipe.epochs, data.metadata(args.dataset))
        training = None
        if resumed:
            training = resumed.meta["training"]
            model.load_state_dict(resumed.model.state_dict())
            tracker.resume(training["history"])
            run.log(f"continues after epoch {training['epoch']}")
        fit(model, train, test, recipe, runtime, on_epoch=tracker, resume=training)

        accuracy = tracker.accuracies()
        run.log(
            f"top-1 accuracy on the test set: {accuracy['last']:.2f} % after the last epoch;"
            f" best on test {accuracy['best']:.2f} %, epoch {accuracy['best_epoch']}"
        )
        return run.save_result({
            "net": args.net, "dataset": args.dataset, "seed": args.seed, "accuracy": accuracy,
            "cost": asdict(cost), "history": tracker.history_as_dicts(),
        })  # fmt: skip


def load_last(args: argparse.Namespace, folder: Path) -> Checkpoint:
    """What --resume continues from: the file that was named, or last.pth of the folder."""
    path = Path(args.checkpoint or folder / "last.pth")
    last = load_checkpoint(path, args.net)
    if "training" not in last.meta:
        raise InputError(f"{path}: holds no optimiser to continue with; name a last.pth")
    changed = differences(last.meta["config"], flags.configuration(args))
    if changed:
        raise InputError(f"{path}: is of another configuration ({changed}); give it the same flags")
    return last


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
