"""What the command lines of the scripts share: flags, their checks, and one-line errors with exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from models import ALIASES, NETWORKS, check_network
from utils.data import DATASETS
from utils.errors import InputError
from utils.experiment import Recipes
from utils.finetune import Recipe
from utils.saliency import CRITERIA


class Parser(argparse.ArgumentParser):
    """An argument parser that answers bad input with one line, and takes flags written with ``-`` or with ``_``."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        return super().parse_known_args(
            [_underscored(arg) for arg in (sys.argv[1:] if args is None else args)], namespace
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Default values behind every flag that has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.default not in (None, False, True, argparse.SUPPRESS)
        return f"{text} (default: %(default)s)" if shown and "(default" not in text else text


def _underscored(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def run_script(
    parse_args: Callable[..., argparse.Namespace], main: Callable[[argparse.Namespace], Any]
) -> int:
    """Run a script; an ``InputError`` becomes one line on stderr. Returns the exit code."""
    args = parse_args()
    try:
        main(args)
    except InputError as error:
        print(
            f"{sys.argv[0].rsplit('/', 1)[-1]}: error: {' '.join(str(error).split())}",
            file=sys.stderr,
        )
        return 2
    return 0


def _number(kind: type, low: float, high: float, wanted: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


count = _number(int, 1, float("inf"), "a whole number of at least 1")
count_or_zero = _number(int, 0, float("inf"), "a whole number of at least 0")
ratio = _number(float, 0, 1, "a ratio in [0, 1)")
positive = _number(float, sys.float_info.min, float("inf"), "a positive number")
weight = _number(float, 0, float("inf"), "a number of at least 0")


def network(text: str) -> str:
    try:
        return check_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def gpu_ids(text: str) -> tuple[int, ...]:
    ids = text.split(",")
    if not all(part.strip().isdecimal() for part in ids) or len(set(map(int, ids))) < len(ids):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of GPU ids such as 0,1")
    return tuple(map(int, ids))


def add_network_flag(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--net", type=network, default=default, help=f"network: {', '.join([*NETWORKS, *ALIASES])}"
    )


def add_recipe_flags(
    parser: argparse.ArgumentParser, recipe: Recipe, least_epochs: int = 1
) -> None:
    group = parser.add_argument_group("training")
    milestones = " and ".join(str(m) for m in recipe.milestones)
    group.add_argument(
        "--epochs",
        type=count_or_zero if least_epochs == 0 else count,
        default=recipe.epochs,
        metavar="N",
        help="passes over the training images" + (", 0 for none" if least_epochs == 0 else ""),
    )
    group.add_argument(
        "--lr",
        type=positive,
        metavar="X",
        help=f"initial learning rate (default: {recipe.lr:g}), times"
        f" {recipe.gamma:g} after epochs {milestones} of {recipe.epochs}, in proportion with another --epochs",
    )
    group.add_argument(
        "--cosine",
        action="store_true",
        help="5 epochs of warm-up, then a half cosine down to zero, instead",
    )
    group.add_argument(
        "--weight_decay",
        type=weight,
        metavar="X",
        help=f"L2 penalty (default: {recipe.weight_decay:g})",
    )
    group.add_argument(
        "--bs", type=count, default=128, metavar="N", help="images in a training batch"
    )


def add_pruning_flags(parser: argparse.ArgumentParser, p: float, score_images: int) -> None:
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--p",
        type=ratio,
        default=p,
        metavar="RATIO",
        help="share of the channels to cut, over all layers",
    )
    group.add_argument(
        "--criterion", choices=tuple(CRITERIA), default="gfbs", help="what scores a channel"
    )
    group.add_argument(
        "--w_beta", type=weight, default=0.05, metavar="X", help="weight of the beta term of gfbs"
    )
    group.add_argument(
        "--beta",
        action="store_true",
        default=True,
        help="score with the beta term (this is the default)",
    )
    group.add_argument(
        "--no_beta", action="store_true", help="score without it; the same as --criterion taylor"
    )
    group.add_argument(
        "--beta_only",
        action="store_true",
        help="score with nothing else; the same as --criterion beta",
    )
    group.add_argument(
        "--score_images",
        type=count,
        default=score_images,
        metavar="N",
        help="training images in the scoring batch: the first N of the last tenth",
    )
    group.add_argument(
        "--score_seed",
        type=count_or_zero,
        metavar="N",
        help="draw the scoring batch at random instead",
    )
    group.add_argument(
        "--min_channels",
        type=count,
        default=1,
        metavar="N",
        help="channels that every layer keeps at least",
    )


def add_smooth_flags(parser: argparse.ArgumentParser, recipes: Recipes) -> None:
    group = parser.add_argument_group("gradual pruning")
    group.add_argument(
        "--smooth",
        "-s",
        action="store_true",
        help="cut layer by layer (residual networks: block by block) and fine-tune in between",
    )
    for flag, recipe, what in (
        ("--smooth_epochs", recipes.stage, "after each stage"),
        ("--final_epochs", recipes.final, "at the end"),
    ):
        group.add_argument(
            flag,
            type=count_or_zero,
            metavar="N",
            help=f"length of the fine-tuning {what} (default: {recipe.epochs},"
            f" in proportion with an --epochs other than {recipes.one_shot.epochs})",
        )


def resolve_criterion(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> argparse.Namespace:
    """Turn --no_beta and --beta_only into the criterion that they stand for."""
    for flag, criterion in (("no_beta", "taylor"), ("beta_only", "beta")):
        if getattr(args, flag):
            if args.criterion not in ("gfbs", criterion):
                parser.error(
                    f"--{flag} is the criterion {criterion}, so it cannot go with {args.criterion}"
                )
            args.criterion = criterion
    del args.beta, args.no_beta, args.beta_only
    return args


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        choices=DATASETS,
        default="cifar10",
        help="cifar10 and cifar100 are downloaded; folder reads"
        " DATA_DIR/train/<class>/ and DATA_DIR/test/<class>/ (or val); synthetic is made on the spot",
    )
    group.add_argument(
        "--data_dir",
        default="./data",
        metavar="DIR",
        help="where the data set is, or is downloaded to",
    )
    group.add_argument(
        "--image_size",
        type=count,
        default=32,
        metavar="PIXELS",
        help="side of the images; folder images are resized and centre-cropped to it",
    )
    group.add_argument(
        "--limit_train_batches",
        type=count,
        metavar="N",
        help="at most N batches an epoch, for a quick try",
    )
    group.add_argument(
        "--limit_test_batches", type=count, metavar="N", help="evaluate on the first N batches only"
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--seed",
        type=count_or_zero,
        default=1,
        metavar="N",
        help="of weights, order and augmentation",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits in every run on the same device; slower on a GPU",
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute"
    )
    group.add_argument(
        "--gpu",
        type=gpu_ids,
        metavar="IDS",
        help="GPUs that share every batch (DataParallel), such as 0,1; all that are visible unless given",
    )
    group.add_argument(
        "--output", default="./checkpoints", metavar="DIR", help="where checkpoints and results go"
    )
    group.add_argument(
        "--logdir", default="./runs", metavar="DIR", help="where TensorBoard files go"
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the results of another configuration in the same folder",
    )


# Flags that say where and how a run computes, not what: two runs that differ in nothing else are the same experiment.
NO_CONFIGURATION = {
    "checkpoint", "data_dir", "deterministic", "device", "gpu", "logdir", "output", "overwrite", "resume",
}  # fmt: skip


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that make an experiment what it is."""
    return {
        name: value for name, value in sorted(vars(args).items()) if name not in NO_CONFIGURATION
    }


def data_suffix(dataset: str) -> str:
    """What the folder of a network gains for a data set other than CIFAR-10."""
    return "" if dataset == "cifar10" else f"_{dataset}"
