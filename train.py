"""Train an unpruned network on small images.

    python train.py --net gatevgg16
    python train.py --net gateresnet56 --dataset cifar100
    python train.py --net gateresnet20 --dataset folder --data_dir my_images --epochs 30

Writes into OUTPUT/<net>: model_best.pth (best on the test set; gfbs_cifar.py prunes it), last.pth
(--resume continues it), log.txt and result.json. For data other than CIFAR-10, the folder is
<net>_cifar100, <net>_folder or <net>_synthetic.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import build_model
from utils.cli import flags, settings
from utils.cli.parser import Parser, run_script
from utils.cost import model_cost
from utils.data.small import data_identity, image_batches, load_data
from utils.distributed import seed_everything
from utils.errors import InputError
from utils.finetune import check_batch, fit
from utils.recipes import CIFAR_BASELINE
from utils.run.folder import RunCallback, RunFolder
from utils.run.measure import measure_end
from utils.run.rounds import Round, RunState


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    flags.add_network_flag(parser)
    flags.add_cifar_flags(parser, CIFAR_BASELINE, least_epochs=1)
    flags.add_run_flags(parser)
    explanation = "continue from this last.pth, or the one in this folder; implies --resume"
    parser.add_argument("--checkpoint", metavar="PATH", help=explanation)
    args = parser.parse_args(argv)
    settings.check_run(parser, args)
    if args.checkpoint and args.overwrite:
        parser.error("--checkpoint continues a run and does not go with --overwrite")
    args.resume = args.resume or bool(args.checkpoint)
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the content of result.json."""
    runtime = settings.runtime(args, args.bs, "--bs")
    where = settings.run_folder(args, checkpoint=named_checkpoint(args))
    run = RunFolder(where, runtime, lambda: data_identity(args.dataset, args.data_dir))
    if done := run.finished():
        return done
    images = runtime.main_first(lambda: load_data(args.dataset, args.data_dir, args.image_size))
    about, constants = images.about(args.dataset, settings.normalisation(args), {})
    seed_everything(args.seed, args.deterministic)
    try:
        model = build_model(args.net, len(about.classes), args.image_size)
    except ValueError as error:  # the data has another number of classes than an alias
        raise InputError(f"--net {args.net}: {error}") from None
    cost = model_cost(model, args.image_size)
    per_norm = runtime.images_per_norm(args.bs // (args.accumulate or 1))
    check_batch(model, args.image_size, per_norm, "--bs")
    data = image_batches(images, about, args.bs, runtime, args.seed, settings.split(args))
    recipe = CIFAR_BASELINE.adapted(args.epochs, **settings.recipe_changes(args))
    with run.opened(about.classes):
        state = run.resumed() or RunState(model, settings.new_record(args))
        state.record.cost = vars(cost)
        size = f"{data.train.images} training images, {len(about.classes)} classes"
        run.log(f"{args.net} on {args.dataset}: {size}; {cost}; {runtime}\n{constants}")
        run.check_space(state.model)
        callback = RunCallback(run, state, data, [Round(recipe)])
        callback.restore_files()
        model, train, test = state.model, data.train, data.choosing
        with run.signals.deferred():  # a signal stops after the batch; the state is saved
            fit(model, train, test, recipe, runtime, callback=callback, resume=state.training)
        measure_end(run, state, data)
        last, best, epoch = map(state.record.accuracy.get, ("last", "best", "best_epoch"))
        chosen = f"{best:.2f} % after epoch {epoch}, the best on {data.chosen_on}"
        run.log(f"top-1 accuracy on the test set: {last:.2f} % after the last epoch; {chosen}")
        return run.finish(state.record)


def named_checkpoint(args: argparse.Namespace) -> Path | None:
    """The last.pth that --checkpoint names, or that lies in the folder it names."""
    if not args.checkpoint:
        return None
    path = Path(args.checkpoint)
    path = path / "last.pth" if os.path.isdir(path) else path
    own = Path(args.output) / settings.network_folder(args) / "last.pth"
    if own.exists() and path.resolve() != own.resolve():
        raise InputError(f"--checkpoint {path}: {own} exists; continue that with --resume")
    return path


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
