"""Train an unpruned network on small images.

    python train.py --net gatevgg16
    python train.py --net gateresnet56 --dataset cifar100
    python train.py --net gateresnet20 --dataset folder --data_dir my_images --epochs 30

Writes model_best.pth (best on the test set; what gfbs_cifar.py prunes), last.pth (what --resume continues from), log.txt
and result.json into OUTPUT/<net>; <net> gains _cifar100, _folder or _synthetic for other data than CIFAR-10.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models import build_model
from utils import cli
from utils.checkpoint import load_checkpoint
from utils.cost import model_cost
from utils.data import load_data, train_and_test_batches
from utils.distributed import seed_everything, select_runtime
from utils.errors import InputError
from utils.finetune import CIFAR_BASELINE, fit
from utils.run import Run
from utils.tracker import Tracker


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    cli.add_network_flag(parser, "gatevgg16")
    cli.add_data_flags(parser)
    cli.add_recipe_flags(parser, CIFAR_BASELINE)
    cli.add_run_flags(parser)
    group = parser.add_argument_group("resume")
    group.add_argument(
        "--resume", "-r", action="store_true", help="continue from last.pth in the output folder"
    )
    group.add_argument(
        "--checkpoint", metavar="FILE", help="continue from this file instead; implies --resume"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return what result.json says."""
    runtime = select_runtime(args.device, args.gpu)
    data = load_data(args.dataset, args.data_dir, args.image_size)
    seed_everything(args.seed, args.deterministic)
    try:
        model = build_model(args.net, len(data.classes))
    except ValueError as error:
        raise InputError(f"--net {args.net} --dataset {args.dataset}: {error}") from None
    recipe = CIFAR_BASELINE.scaled_to(args.epochs).with_changes(
        args.lr, args.weight_decay, args.cosine
    )
    folder = f"{args.net}{cli.data_suffix(args.dataset)}"
    resumed = None
    if args.resume or args.checkpoint:
        resumed = load_checkpoint(
            args.checkpoint or Path(args.output) / folder / "last.pth", args.net
        )
        if "training" not in resumed.meta:
            raise InputError(
                f"--checkpoint {args.checkpoint} holds no optimiser to continue with; name a last.pth"
            )
        model.load_state_dict(resumed.model.state_dict())

    config = cli.configuration(args)
    with Run(
        Path(args.output) / folder, Path(args.logdir) / folder, config, overwrite=args.overwrite
    ) as run:
        train, test = train_and_test_batches(
            data, args.bs, runtime.device, seed=args.seed,
            limit_train=args.limit_train_batches, limit_test=args.limit_test_batches,
        )  # fmt: skip
        cost = model_cost(model, args.image_size)
        run.log(f"{args.net} on {args.dataset}: {len(data.train)} training and {len(data.test)} test images, "
                f"{len(data.classes)} classes; {cost}; {runtime}")  # fmt: skip
        tracker = Tracker(run, model, recipe.epochs, data.metadata(args.dataset))
        training = None
        if resumed:
            training = resumed.meta["training"]
            tracker.resume(training["history"])
        fit(model, train, test, recipe, runtime, on_epoch=tracker, resume=training)

        accuracy = tracker.accuracies()
        run.log(f"top-1 accuracy on the test set: last epoch {accuracy['last']:.2f} %, "
                f"best on test {accuracy['best']:.2f} % (epoch {accuracy['best_epoch']})")  # fmt: skip
        return run.save_result({
            "net": args.net, "dataset": args.dataset, "seed": args.seed, "accuracy": accuracy,
            "cost": asdict(cost), "history": tracker.history_as_dicts(),
        })  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli.run_script(parse_args, main))
