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
    flags.add_network_flag(parser)
    flags.add_data_flags(parser)
    flags.add_recipe_flags(parser, CIFAR_BASELINE, least_epochs=1)
    flags.add_cifar_training_flags(parser)
    flags.add_run_flags(parser)
    flags.add_resume_flags(parser)
    args = parser.parse_args(argv)
    flags.check_alias(parser, args)
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return what result.json says."""
    runtime = select_runtime(args.device, args.gpu, args.sync_bn)
    runtime.share(args.bs, "--bs")
    network = flags.network_folder(args)
    folder, logdir = Path(args.output) / network, Path(args.logdir) / network
    last_path = Path(args.checkpoint or folder)
    last = load_last(last_path, args.net) if args.resume or args.checkpoint else None
    with runtime.main_first():
        data = load_data(args.dataset, args.data_dir, args.image_size)
    config = flags.configuration(args, data.classes)
    seed_everything(args.seed, args.deterministic)
    try:
        model = build_model(args.net, len(data.classes))
    except ValueError as error:  # an alias of 100 classes, another number of folders
        raise InputError(f"--net {args.net}: {error}") from None
    cost = model_cost(model, args.image_size)
    if last:
        check_same_run(last, config)
        model.load_state_dict(last.model.state_dict())

    with Run(
        folder, logdir, config, runtime, overwrite=args.overwrite, resume=last is not None
    ) as run:
        train, test = train_and_test_batches(
            data, args.bs, runtime, seed=args.seed,
            limit_train=args.limit_train_batches, limit_test=args.limit_test_batches,
        )  # fmt: skip
        run.log(f"{args.net} on {args.dataset}: {len(data.train)} training images,"
                f" {len(data.classes)} classes; {cost}; {runtime}")  # fmt: skip
        cosine = CIFAR_COSINE if args.cosine else None
        recipe = CIFAR_BASELINE.adapted(args.epochs, args.lr, args.weight_decay, cosine)
        tracker = Tracker(run, model, recipe.epochs, data.metadata(args.dataset))
        training = last.meta["training"] if last else None
        if training:
            tracker.resume(training["history"])
            run.adopt(last_path if last_path.is_dir() else last_path.parent, "model_best.pth")
            run.log(f"continues after epoch {training['epoch']}")
        fit(model, train, test, recipe, runtime, on_epoch=tracker, resume=training)

        accuracy = tracker.accuracies()
        run.log(
            f"top-1 accuracy on the test set: {accuracy['last']:.2f} % after the last epoch;"
            f" best on test {accuracy['best']:.2f} %, epoch {accuracy['best_epoch']}"
        )
        return run.save_result({
            "net": args.net, "dataset": args.dataset, "seed": args.seed, "accuracy": accuracy,
            "cost": asdict(cost), "history": tracker.history,
        })  # fmt: skip


def load_last(path: Path, net: str) -> Checkpoint:
    """What to continue from: a file, or last.pth of a folder, with model_best.pth beside it."""
    if path.is_dir() or not path.suffix:
        path = path / "last.pth"
    last = load_checkpoint(path, net)
    if not {"training", "config"} <= last.meta.keys():
        raise InputError(f"{path}: holds no optimiser to continue with; name a last.pth")
    if not path.with_name("model_best.pth").is_file():
        raise InputError(f"{path}: the best epoch so far, model_best.pth, must be beside it")
    return last


def check_same_run(last: Checkpoint, config: dict[str, Any]) -> None:
    """Raise InputError, with what differs, where the flags are not those of the run so far."""
    changed = differences(last.meta["config"], config)
    if changed:
        raise InputError(f"--resume: that run has another configuration ({changed})")


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
