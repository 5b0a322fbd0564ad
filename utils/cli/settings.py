"""Check the flags against each other, and turn them into the types that the program takes."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from torch import nn

from models import ALIASES, group_widths
from utils.checkpoint import Checkpoint
from utils.data.batches import Normalisation, Split
from utils.distributed import Acceleration, Runtime, select_runtime
from utils.recipes import CIFAR_COSINE, Cosine, Recipes
from utils.run import launch, rounds
from utils.run.existing import RunSettings
from utils.run.record import Record
from utils.run.rounds import Pruning, Round
from utils.saliency import CRITERIA, Scoring
from utils.selection import GOALS, Goal


def runtime(args: Namespace, batch_size: int, flag: str) -> Runtime:
    """Where the run computes. ``flag`` is the one that gives the batch size."""
    acceleration = Acceleration(args.amp, args.channels_last, args.compile, args.fused)
    alone = args.data_parallel or bool(args.gpu)
    here = select_runtime(args.device, args.gpu, args.sync_bn, acceleration, alone)
    here.share(batch_size, flag, args.accumulate or 1)
    return here


def processes(args: Namespace) -> tuple[int, str]:
    """How many processes share the run, and a line for the log; 1 without the flags for it."""
    if getattr(args, "data_parallel", True):
        return 1, ""
    flag = "bs" if "bs" in args else "train_bs"
    batch = getattr(args, flag), f"--{flag}", args.accumulate or 1
    return launch.processes(args.device, args.gpu, args.processes, *batch)


def normalisation(args: Namespace) -> Normalisation | None:
    """The constants of --mean and --std, if given."""
    return Normalisation(args.mean, args.std) if args.mean else None


def split(args: Namespace) -> Split:
    """How much of the data is used."""
    small = "limit_test_batches" in args
    tested = args.limit_test_batches if small else args.limit_val_batches
    return Split(args.holdout, args.limit_train_batches, tested)


def recipe_changes(args: Namespace) -> dict[str, Any]:
    """What replaces values of the published recipe; None leaves them."""
    cosine = CIFAR_COSINE if getattr(args, "cosine", False) else None
    if getattr(args, "sched", None) == "cosine":
        cosine = Cosine(args.warmup_epochs, args.warmup_lr, args.min_lr, args.cooldown_epochs)
    names = "lr", "weight_decay", "label_smoothing", "ema", "accumulate", "distill", "temperature"
    return {"cosine": cosine, **{name: getattr(args, name, None) for name in names}}


def pruning(args: Namespace, model: nn.Module, published: Recipes) -> Pruning:
    """What is scored and cut, and how the network is trained in between.

    Lowers a --min_channels above every width to the greatest width, with a warning.
    """
    widest = max(group_widths(model).values())
    if args.min_channels > widest:
        no_cut = f"no group has more than {widest} channels, so nothing is cut"
        warn(f"--min_channels {args.min_channels}: {no_cut}")
        args.min_channels = widest
    stage_epochs = args.step_epochs if args.steps else args.smooth_epochs
    lengths = args.epochs, stage_epochs, args.final_epochs
    recipes = published.adapted(*lengths, **recipe_changes(args))
    if args.steps:
        way, method = rounds.in_steps(args.steps, recipes), f"{args.steps} steps"
    elif args.smooth:
        way, method = rounds.smooth(model, recipes), "smooth"
    elif args.from_scratch:
        way, method = [Round(recipes.scratch, scores=True, fresh=True)], "from scratch"
    else:
        way, method = [Round(recipes.one_shot, scores=True)], "one shot"
    if getattr(args, "new_head", False):
        way = [rounds.new_head(recipes, args.head_epochs), *way]
    batch = args.score_images, args.score_seed, args.checkpoint_activations
    scoring = Scoring(args.criterion, args.w_beta, *batch, args.seed)
    limits = args.min_channels, args.round_to, args.scope, args.latency_bs or 64
    goal = Goal(*_how_much(args), *limits)
    return Pruning(scoring, goal, tuple(way), args.recalibrate, method)


def _how_much(args: Namespace) -> tuple[str, float]:
    """The one flag that says how much to cut, and its value."""
    values = {kind: getattr(args, kind) for kind in GOALS}
    return next((kind, value) for kind, value in values.items() if value is not None)


def new_record(args: Namespace, asked: Pruning | None = None) -> Record:
    """The record of a run before anything is measured."""
    record = Record(args.net, args.dataset, args.seed)
    if asked:
        record.criterion, record.method = args.criterion, asked.method
        record.ratio = {"asked": args.p, "reached": 0.0}
        record.budget = {kind: getattr(args, kind) for kind in GOALS if kind != "p"}
    return record


def run_folder(
    args: Namespace, baseline: Checkpoint | None = None, checkpoint: Path | None = None
) -> RunSettings:
    """The folder of a run, and what happens to files that are already there.

    ``baseline`` is the network to prune, if any; call ``pruning`` first, which settles
    --min_channels. ``checkpoint`` is the file that ``train.py --checkpoint`` continues.
    """
    name, config = network_folder(args), configuration(args, baseline and baseline.digest)
    if baseline:
        name += f"/{run_name(args)}"
    logdir = Path(args.logdir) if args.logdir else Path(args.output) / "runs"
    folders, asked = (Path(args.output) / name, logdir / name), (args.resume, args.overwrite)
    rest = args.checkpoint_every, checkpoint, args.config and Path(args.config)
    return RunSettings(*folders, args.net, config, *asked, *rest)


def check_run(parser: ArgumentParser, args: Namespace) -> None:
    """Refuse flags of any run that do not go together, before any download."""
    check_normalisation(parser, args)
    name, classes = ALIASES.get(args.net, (args.net, None))
    if classes == 100 and args.dataset in ("cifar10", "synthetic"):
        wrong = f"--net {args.net} has 100 classes and {args.dataset} has 10"
        parser.error(f"{wrong}; use --dataset cifar100 or --net {name}")
    if getattr(args, "sched", None) == "step":
        for flag in ("warmup_epochs", "warmup_lr", "cooldown_epochs", "min_lr"):
            if getattr(args, flag) != args.defaults[flag]:
                parser.error(f"--{flag} goes with --sched cosine")


def check_normalisation(parser: ArgumentParser, args: Namespace) -> None:
    """Refuse one of --mean and --std without the other."""
    if (args.mean is None) != (args.std is None):
        parser.error("--mean and --std go together")


# Flags that have an effect only with another one.
NEEDS = {"step_epochs": "steps", "smooth_epochs": "smooth", "final_epochs": "smooth"}
NEEDS |= {"temperature": "distill", "head_epochs": "new_head"}


def _check_rounds(parser: ArgumentParser, args: Namespace) -> None:
    """Refuse contradictions. --smooth must end with training, since that writes checkpoints."""
    for flag, way in NEEDS.items():
        if getattr(args, flag, None) is not None and not getattr(args, way):
            parser.error(f"--{flag} goes with --{way}")
    if args.from_scratch and not args.epochs:
        parser.error("--from_scratch needs --epochs of at least 1")
    lengths = args.smooth_epochs, args.final_epochs  # where None, --epochs decides
    stages, final = (args.epochs if length is None else length for length in lengths)
    if args.smooth and stages and not final:
        parser.error("--smooth needs --final_epochs of at least 1 where stages are fine-tuned")


def _resolve_head(parser: ArgumentParser, args: Namespace) -> None:
    """Refuse what does not go with --new_head, and set the default of --head_epochs."""
    if args.distill:
        parser.error("--distill and --new_head do not go together: the teacher knows other classes")
    last = args.epochs if args.final_epochs is None else args.final_epochs
    if not (last or args.step_epochs):  # last.pth would be an unpruned network
        parser.error("--new_head needs --epochs of at least 1 after the last cut")
    args.defaults["head_epochs"] = 2  # of older runs, which scored a fresh classifier: None
    args.head_epochs = args.head_epochs or 2


def resolve_pruning(parser: ArgumentParser, args: Namespace) -> None:
    """Refuse contradictions, and set the defaults that depend on other flags.

    Replaces --no_beta and --beta_only by the criterion that they mean. Resets settings that the
    criterion does not use to their defaults, with a warning.
    """
    _check_rounds(parser, args)
    if getattr(args, "new_head", False):
        _resolve_head(parser, args)
    for flag, criterion in (("no_beta", "taylor"), ("beta_only", "beta")):
        if getattr(args, flag):
            if args.criterion not in ("gfbs", criterion):
                parser.error(f"--{flag} means --criterion {criterion}, not {args.criterion}")
            args.criterion = criterion
    del args.beta, args.no_beta, args.beta_only
    if any(getattr(args, kind) is not None for kind in GOALS[1:]):
        args.p = None
    args.defaults["scope"] = CRITERIA[args.criterion].scope
    args.scope = args.scope or args.defaults["scope"]
    if args.defaults["score_images"] is None:
        args.defaults["score_images"] = args.train_bs
        args.score_images = args.score_images or args.train_bs
    unused = [] if args.criterion in ("gfbs", "beta") else ["w_beta"]
    if not CRITERIA[args.criterion].gradients:
        unused += ["score_images", "score_seed"]
    given = [flag for flag in unused if getattr(args, flag) != args.defaults[flag]]
    for flag in given:
        setattr(args, flag, args.defaults[flag])
    if given:
        flags = " and ".join(f"--{flag}" for flag in given)
        warn(f"{flags}: without effect, {args.criterion} does not look at it")


def warn(text: str) -> None:
    """Print one line on stderr, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


# Flags that say where and how a run computes, not what. Runs that differ only in these are the
# same experiment.
NO_CONFIGURATION = {"checkpoint", "checkpoint_activations", "checkpoint_every", "config"}
NO_CONFIGURATION |= {"data_dir", "data_parallel", "defaults", "deterministic", "device", "gpu"}
NO_CONFIGURATION |= {"logdir", "output", "overwrite", "processes", "resume", "skip_finished"}
NO_CONFIGURATION |= {"workers"}


def configuration(args: Namespace, baseline: str | None = None) -> dict[str, Any]:
    """What tells experiments apart: flags, and the digest of the weights to start from."""
    flags = {flag: value for flag, value in vars(args).items() if flag not in NO_CONFIGURATION}
    return {**flags, "baseline": baseline}


# Settings that already have a place in the name of a run or of its parent folder. channels_last has
# none, so that runs from before it was the default are found again.
NAMED = {"net", "dataset", "criterion", *GOALS, "seed", "channels_last"}
NAMED |= {"smooth", "steps", "from_scratch"}


def run_name(args: Namespace) -> str:
    """The folder of a pruning run: ``gfbs_p0.7_smooth_seed1`` and every unusual setting."""
    how = f"_steps{args.steps}" if args.steps else ""
    how += "_smooth" if args.smooth else "_scratch" if args.from_scratch else ""
    unusual = "".join(
        f"_{_named(flag.replace('_', ''), value)}"
        for flag, value in sorted(configuration(args).items())
        if flag not in NAMED and value != args.defaults.get(flag)
    )
    return f"{args.criterion}_{_named(*_how_much(args))}{how}_seed{args.seed}{unusual}"


def _named(name: str, value: Any) -> str:
    if value is True:
        return name
    values = value if isinstance(value, tuple) else (value,)
    return name + ",".join(f"{v:.12g}" if isinstance(v, float) else str(v) for v in values)


def network_folder(args: Namespace) -> str:
    """The folder of a network in OUTPUT: its name, and the data set unless that is the usual."""
    usual = args.dataset in ("cifar10", "imagenet")
    net = args.net.replace(":", "-")
    return net if usual else f"{net}_{args.dataset}"
