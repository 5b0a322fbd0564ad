"""The flags of the scripts. What follows from them is in utils/cli/settings.py."""

from __future__ import annotations

import argparse

from models import ALIASES, IMAGENET_NETWORKS, NETWORKS
from utils.cli.parser import (
    channel_values,
    count,
    count_or_zero,
    factor,
    gpu_ids,
    network,
    positive,
    ratio,
    share,
    weight,
)
from utils.data.small import DATASETS
from utils.distributed import AMP
from utils.pruning import SCOPES
from utils.recipes import Recipe, Recipes
from utils.saliency import CRITERIA

# One flag reads best on one line, or on one and its help text.
# fmt: off


def add_network_flag(parser: argparse.ArgumentParser) -> None:
    """--net, for small images."""
    names = [net for net in [*NETWORKS, *ALIASES] if net not in IMAGENET_NETWORKS]
    parser.add_argument("--net", type=network(names), default="gatevgg16",
                        help=f"the network: {', '.join(names)}")


def add_imagenet_network_flag(parser: argparse.ArgumentParser) -> None:
    """--net, for ImageNet."""
    parser.add_argument("--net", type=network(IMAGENET_NETWORKS), default="resnet50",
                        help=f"the network: {', '.join(IMAGENET_NETWORKS)}")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Small images: which, and where."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="cifar10",
        help="cifar10 and cifar100 are downloaded; folder reads DATA_DIR/train/<class>/ and"
             " DATA_DIR/test/<class>/ (or val); synthetic is made on the spot")
    add("--data_dir", default="./data", metavar="DIR", help="where the data are, or are put")
    add("--image_size", type=count, default=32, metavar="PIXELS",
        help="side of the images; folder images are resized and centre-cropped to it")
    add("--limit_train_batches", type=count, metavar="N", help="at most N batches an epoch")
    add("--limit_test_batches", type=count, metavar="N", help="evaluate on N batches of 500 only")


def add_normalisation_flags(parser: argparse.ArgumentParser) -> None:
    """What pixels are normalised with."""
    add = parser.add_argument_group("normalisation").add_argument
    add("--mean", type=channel_values(0), metavar="R,G,B",
        help="mean of the pixels in [0, 1] (default: what the checkpoint says, else the data's)")
    add("--std", type=channel_values(1e-6), metavar="R,G,B", help="likewise, standard deviation")


def add_holdout_flag(parser: argparse.ArgumentParser) -> None:
    """Which images choose the best epoch."""
    parser.add_argument("--holdout", type=count_or_zero, default=0, metavar="N",
                        help="keep the last N training images out of training and choose the best"
                             " epoch by them; without it, the test set does")


def add_recipe_flags(parser: argparse.ArgumentParser, recipe: Recipe, least_epochs: int) -> None:
    """What every kind of training has; ``least_epochs`` is 0 or 1."""
    add = parser.add_argument_group("training").add_argument
    milestones = " and ".join(map(str, recipe.milestones))
    add("--epochs", type=count if least_epochs else count_or_zero, default=recipe.epochs,
        metavar="N", help="passes over the training images" + ("" if least_epochs else "; 0: none"))
    add("--lr", type=positive, metavar="X",
        help=f"initial learning rate (default: {recipe.lr:g}); times {recipe.gamma:g} after epochs"
             f" {milestones} of {recipe.epochs}, and in proportion with other --epochs")
    add("--weight_decay", type=weight, metavar="X",
        help=f"L2 penalty (default: {recipe.weight_decay:g})")


def add_cifar_training_flags(parser: argparse.ArgumentParser) -> None:
    """Training on small images."""
    add = parser.add_argument_group("CIFAR training").add_argument
    add("--cosine", action="store_true",
        help="instead of steps, 5 epochs of warm-up and a half cosine down to zero")
    add("--bs", type=count, default=128, metavar="N", help="images in a training batch")


def add_imagenet_training_flags(parser: argparse.ArgumentParser) -> None:
    """Training on large images."""
    add = parser.add_argument_group("ImageNet training").add_argument
    add("--train_bs", type=count, default=512, metavar="N",
        help="images in a training batch, of all GPUs and ranks together")
    add("--sched", choices=("step", "cosine"), default="step",
        help="learning rate by steps, or by warm-up, cosine and cool-down within --epochs")
    add("--warmup_epochs", type=count_or_zero, default=5, metavar="N", help="cosine: linear rise")
    add("--warmup_lr", type=positive, default=1e-6, metavar="X", help="cosine: where it begins")
    add("--cooldown_epochs", type=count_or_zero, default=10, metavar="N", help="cosine: rest")
    add("--min_lr", type=weight, default=1e-5, metavar="X", help="cosine: where it ends")
    add("--new_head", action="store_true",
        help="a fresh classifier, for folders that are not the classes of the checkpoint")


def add_folder_flags(parser: argparse.ArgumentParser) -> None:
    """Large images in folders."""
    add = parser.add_argument_group("data").add_argument
    add("--data_dir", required=True, metavar="DIR",
        help="folder with train/<class>/ and val/<class>/")
    add("--image_size", type=count, default=224, metavar="PIXELS",
        help="side of the crops; for evaluation the images are resized to 8/7 of it")
    add("--workers", "-j", type=count_or_zero, default=4, metavar="N",
        help="processes that read and augment images, per rank")
    add("--limit_train_batches", type=count, metavar="N", help="at most N batches an epoch")
    add("--limit_val_batches", type=count, metavar="N", help="evaluate on N batches only")


def add_conversion_flags(parser: argparse.ArgumentParser) -> None:
    """Which weights to convert, and where to evaluate them."""
    add = parser.add_argument_group("conversion").add_argument
    add("--weights", default="IMAGENET1K_V1", metavar="NAME", help="which of torchvision's weights")
    add("--checkpoint", metavar="FILE", help="a local file of such weights; nothing is downloaded")
    add("--save", "-s", action="store_true", default=True, help="write the baseline, as usual")
    add("--no_save", dest="save", action="store_false", help="convert, check and evaluate only")
    add("--output", default="./checkpoints", metavar="DIR", help="where <net>/model_best.pth goes")
    add("--overwrite", action="store_true", help="replace other weights there")
    add = parser.add_argument_group("evaluation").add_argument
    add("--data_dir", metavar="DIR", help="folder with val/<class>/; without it, no evaluation")
    add("--batch_size", "-b", type=count, default=512, metavar="N", help="images in a batch")
    add("--workers", "-j", type=count_or_zero, default=4, metavar="N",
        help="processes that read images")
    add("--limit_val_batches", type=count, metavar="N", help="evaluate on N batches only")


def add_baseline_flag(parser: argparse.ArgumentParser) -> None:
    """The network to prune."""
    parser.add_argument("--checkpoint", metavar="PATH",
                        help="the network to prune: a file, or a folder that holds"
                             " <net>/model_best.pth or model_best.pth (default: --output)")


def add_pruning_flags(
    parser: argparse.ArgumentParser, p: float, score_images: int | None
) -> None:
    """How to score and select."""
    add = parser.add_argument_group("pruning").add_argument
    parser.set_defaults(default_p=p)
    how_much = parser.add_argument_group("how much to cut, one of").add_mutually_exclusive_group()
    how_much.add_argument("--p", "-p", type=ratio, metavar="RATIO",
        help=f"share of the channels to cut, over all layers together, in [0, 1) (default: {p})")
    how_much.add_argument("--macs", type=share, metavar="SHARE",
        help="cut no more than it takes to keep at most this share of the multiply-adds")
    how_much.add_argument("--params", type=share, metavar="SHARE", help="likewise, parameters")
    add("--criterion", choices=tuple(CRITERIA), default="gfbs", help="what scores a channel")
    by_layer = " and ".join(name for name, c in CRITERIA.items() if c.scope == "layer")
    add("--scope", choices=SCOPES,
        help="rank the channels of the whole network together, or cut the same share of every group"
             f" (default: layer for {by_layer}, global for the others)")
    add("--w_beta", type=factor, default=0.05, metavar="X", help="weight of the beta term of gfbs")
    add("--beta", action="store_true", default=True, help="score with the beta term, as usual")
    add("--no_beta", action="store_true", help="without it: the same as --criterion taylor")
    add("--beta_only", action="store_true", help="with nothing else: the same as --criterion beta")
    add("--score_images", type=count, default=score_images, metavar="N",
        help="images in the scoring batch: the first N of the last tenth of the training set"
             + ("" if score_images else " (default: --train_bs)"))
    add("--score_seed", type=count_or_zero, metavar="N",
        help="draw the scoring batch from the whole training set by this seed instead")
    add("--checkpoint_activations", action="store_true",
        help="score in less memory: activations are computed again on the way back")
    add("--min_channels", type=count, default=1, metavar="N", help="what every layer keeps")
    add("--round_to", type=count, default=1, metavar="N",
        help="round the widths that are left up to multiples of N, such as 8, which hardware likes;"
             " never above the present width")
    add("--recalibrate", type=count_or_zero, default=0, metavar="N",
        help="after surgery, estimate BatchNorm's running statistics anew over N training batches"
             " (of several ranks, over rank 0's share of them)")
    add("--from_scratch", action="store_true",
        help="the control: train the pruned shape from fresh weights, by the baseline's recipe")


def add_smooth_flags(parser: argparse.ArgumentParser, recipes: Recipes) -> None:
    """Gradual pruning."""
    add = parser.add_argument_group("gradual pruning").add_argument
    add("--smooth", "-s", action="store_true",
        help="cut layer by layer (residual networks: block by block), fine-tuning in between")
    stages = {"--smooth_epochs": (recipes.stage, "after each stage"),
              "--final_epochs": (recipes.final, "at the end")}
    for flag, (recipe, when) in stages.items():
        add(flag, type=count_or_zero, metavar="N",
            help=f"epochs of fine-tuning {when} (default: {recipe.epochs} where --epochs is"
                 f" {recipes.one_shot.epochs}, and in proportion)")
    add("--steps", type=count, metavar="K",
        help="reach the goal in K rounds of scoring, cutting and fine-tuning, then --epochs more")
    add("--step_epochs", type=count_or_zero, metavar="N",
        help="epochs of fine-tuning after each round (default: that of --smooth_epochs)")


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Where to compute."""
    add = parser.add_argument_group("device").add_argument
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--gpu", type=gpu_ids, metavar="IDS",
        help="GPUs that share every batch, such as 0,1 (default: all that are visible)")


def add_acceleration_flags(parser: argparse.ArgumentParser) -> None:
    """How to train faster, with other bits."""
    add = parser.add_argument_group("speed").add_argument
    add("--amp", choices=tuple(AMP), help="train in mixed precision; fp16 on CUDA only")
    add("--channels_last", action="store_true", help="let activations lie in memory pixel by pixel")
    add("--compile", action="store_true", help="train through torch.compile; needs a C++ compiler")
    add("--fused", action="store_true", help="step the optimiser in one pass over the weights")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """What every run has."""
    add_device_flags(parser)
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=count_or_zero, default=1, metavar="N",
        help="of the initial weights, the order of the images and their augmentation")
    add("--deterministic", action="store_true",
        help="the same bits in every run on the same device; slower on a GPU")
    add("--sync_bn", action="store_true",
        help="under torchrun on GPUs: BatchNorm statistics over the batches of all ranks")
    add("--output", default="./checkpoints", metavar="DIR", help="where results go")
    add("--logdir", metavar="DIR", help="where TensorBoard files go (default: OUTPUT/runs)")
    add("--overwrite", action="store_true",
        help="start again where the folder holds a run, of this configuration or of another")


def add_resume_flags(parser: argparse.ArgumentParser) -> None:
    """How to go on."""
    add = parser.add_argument_group("resume").add_argument
    add("--resume", "-r", action="store_true",
        help="continue from last.pth in the output folder, to the same bits as without the break;"
             " start afresh where there is none")
    add("--skip_finished", action="store_true", help=argparse.SUPPRESS)  # always so by now
    add("--checkpoint_every", type=count, metavar="N",
        help="write last.pth after every N batches, too, and not only after every epoch")


# fmt: on
