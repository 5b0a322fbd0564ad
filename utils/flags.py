"""The flags that several scripts share, and what follows from them."""

from __future__ import annotations

import argparse
from typing import Any

from models import ALIASES, NETWORKS
from utils.cli import count, count_or_zero, gpu_ids, network, positive, ratio, weight
from utils.data import DATASETS
from utils.experiment import Recipes
from utils.finetune import CIFAR_COSINE, Recipe
from utils.saliency import CRITERIA

# One flag reads best on one line, or on one and its help text.
# fmt: off


def add_network_flag(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--net", type=network, default=default,
                        help=f"the network: {', '.join([*NETWORKS, *ALIASES])}")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="cifar10",
        help="cifar10 and cifar100 are downloaded; folder reads DATA_DIR/train/<class>/ and"
             " DATA_DIR/test/<class>/ (or val); synthetic is made on the spot")
    add("--data_dir", default="./data", metavar="DIR", help="where the data are, or are put")
    add("--image_size", type=count, default=32, metavar="PIXELS",
        help="side of the images; folder images are resized and centre-cropped to it")
    add("--limit_train_batches", type=count, metavar="N", help="at most N batches an epoch")
    add("--limit_test_batches", type=count, metavar="N", help="evaluate on N batches of 500 only")


def add_recipe_flags(parser: argparse.ArgumentParser, recipe: Recipe, least_epochs: int) -> None:
    add = parser.add_argument_group("training").add_argument
    milestones = " and ".join(map(str, recipe.milestones))
    add("--epochs", type=count if least_epochs else count_or_zero, default=recipe.epochs,
        metavar="N", help="passes over the training images" + ("" if least_epochs else "; 0: none"))
    add("--lr", type=positive, metavar="X",
        help=f"initial learning rate (default: {recipe.lr:g}); times {recipe.gamma:g} after epochs"
             f" {milestones} of {recipe.epochs}, and in proportion with other --epochs")
    add("--cosine", action="store_true",
        help="instead of these steps, 5 epochs of warm-up and a half cosine down to zero")
    add("--weight_decay", type=weight, metavar="X",
        help=f"L2 penalty (default: {recipe.weight_decay:g})")
    add("--bs", type=count, default=128, metavar="N", help="images in a training batch")


def add_baseline_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="PATH",
                        help="the network to prune: a file, or a folder that holds"
                             " <net>/model_best.pth or model_best.pth (default: --output)")


def add_pruning_flags(parser: argparse.ArgumentParser, p: float, score_images: int) -> None:
    add = parser.add_argument_group("pruning").add_argument
    add("--p", type=ratio, default=p, metavar="RATIO",
        help="share of the channels to cut, over all layers together, in [0, 1)")
    add("--criterion", choices=tuple(CRITERIA), default="gfbs", help="what scores a channel")
    add("--w_beta", type=weight, default=0.05, metavar="X", help="weight of the beta term of gfbs")
    add("--beta", action="store_true", default=True, help="score with the beta term, as usual")
    add("--no_beta", action="store_true", help="without it: the same as --criterion taylor")
    add("--beta_only", action="store_true", help="with nothing else: the same as --criterion beta")
    add("--score_images", type=count, default=score_images, metavar="N",
        help="images in the scoring batch: the first N of the last tenth of the training set")
    add("--score_seed", type=count_or_zero, metavar="N",
        help="draw the scoring batch from the whole training set by this seed instead")
    add("--min_channels", type=count, default=1, metavar="N", help="what every layer keeps")


def add_smooth_flags(parser: argparse.ArgumentParser, recipes: Recipes) -> None:
    add = parser.add_argument_group("gradual pruning").add_argument
    add("--smooth", "-s", action="store_true",
        help="cut layer by layer (residual networks: block by block), fine-tuning in between")
    stages = {"--smooth_epochs": (recipes.stage, "after each stage"),
              "--final_epochs": (recipes.final, "at the end")}
    for flag, (recipe, when) in stages.items():
        add(flag, type=count_or_zero, metavar="N",
            help=f"epochs of fine-tuning {when} (default: {recipe.epochs} where --epochs is"
                 f" {recipes.one_shot.epochs}, and in proportion)")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=count_or_zero, default=1, metavar="N",
        help="of the initial weights, the order of the images and their augmentation")
    add("--deterministic", action="store_true",
        help="the same bits in every run on the same device; slower on a GPU")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--gpu", type=gpu_ids, metavar="IDS",
        help="GPUs that share every batch, such as 0,1 (default: all that are visible)")
    add("--sync_bn", action="store_true",
        help="under torchrun on GPUs: BatchNorm statistics over the batches of all ranks")
    add("--output", default="./checkpoints", metavar="DIR", help="where results go")
    add("--logdir", default="./runs", metavar="DIR", help="where TensorBoard files go")
    add("--overwrite", action="store_true",
        help="replace what another configuration left in the same folder")


def add_resume_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("resume").add_argument
    add("--resume", "-r", action="store_true",
        help="continue from last.pth in the output folder, to the same bits as without the break")
    add("--checkpoint", metavar="FILE", help="continue from this file; implies --resume")


# fmt: on


def resolve_criterion(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Turn --no_beta and --beta_only into the criterion that they stand for."""
    for flag, criterion in (("no_beta", "taylor"), ("beta_only", "beta")):
        if getattr(args, flag):
            if args.criterion not in ("gfbs", criterion):
                parser.error(f"--{flag} means --criterion {criterion}, not {args.criterion}")
            args.criterion = criterion
    del args.beta, args.no_beta, args.beta_only


# Flags that say where and how a run computes, not what: runs that differ in nothing else are one
# and the same experiment.
NO_CONFIGURATION = {
    "checkpoint", "data_dir", "deterministic", "device", "gpu", "logdir", "output", "overwrite",
    "resume",
}  # fmt: skip


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that make an experiment what it is."""
    return {flag: value for flag, value in vars(args).items() if flag not in NO_CONFIGURATION}


def recipes(args: argparse.Namespace, published: Recipes) -> Recipes:
    """The published recipes with what the command line asks for."""
    cosine = CIFAR_COSINE if args.cosine else None
    return published.adapted(
        args.epochs, args.smooth_epochs, args.final_epochs, args.lr, args.weight_decay, cosine
    )


def run_name(args: argparse.Namespace) -> str:
    """Name of a pruning run, below the folder of its network."""
    return f"{args.criterion}_p{args.p:g}{'_smooth' * args.smooth}_seed{args.seed}"


def network_folder(args: argparse.Namespace) -> str:
    """Where a network's results go below OUTPUT: its name, and the data set unless CIFAR-10."""
    return args.net if args.dataset == "cifar10" else f"{args.net}_{args.dataset}"
