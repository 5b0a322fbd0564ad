"""The flags of the scripts. What follows from them is in settings.py."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, _ArgumentGroup

from models import ALIASES, IMAGENET_NETWORKS, NETWORKS
from utils.cli import parser as value
from utils.data.small import DATASETS
from utils.distributed import AMP
from utils.pruning import SCOPES
from utils.recipes import Recipe, Recipes
from utils.saliency import CRITERIA


def add_network_flag(parser: ArgumentParser, imagenet: bool = False) -> None:
    """--net, for small images or for ImageNet."""
    small = [net for net in [*NETWORKS, *ALIASES] if net not in IMAGENET_NETWORKS]
    names, usual = (IMAGENET_NETWORKS, "resnet50") if imagenet else (small, "gatevgg16")
    parser.add_argument("--net", type=value.network(names), default=usual,
                        help=f"the network: {', '.join(names)}; any other classifier of"
                             " torchvision.models that has BatchNorm; or package.module:factory")


def add_loading_flag(parser: ArgumentParser) -> None:
    """--net of tools that read checkpoints."""
    parser.add_argument("--net", metavar="NAME",
        help="what the checkpoint must hold; needed for package.module:factory only")


def add_normalisation_flags(parser: ArgumentParser) -> None:
    """What pixels are normalised with."""
    add = parser.add_argument_group("normalisation").add_argument
    add("--mean", type=value.channel_values(0), metavar="R,G,B",
        help="mean of the pixels in [0, 1] (default: from the checkpoint, else from the data)")
    add("--std", type=value.channel_values(1e-6), metavar="R,G,B", help="their standard deviation")


def _add_recipe_flags(parser: ArgumentParser, recipe: Recipe, least_epochs: int) -> None:
    """What every kind of training has; ``least_epochs`` is 0 or 1."""
    add = parser.add_argument_group("training").add_argument
    milestones = " and ".join(map(str, recipe.milestones))
    add("--epochs", type=value.count if least_epochs else value.count_or_zero,
        default=recipe.epochs, metavar="N", help="passes over the training images")
    add("--lr", type=value.positive, metavar="X",
        help=f"initial learning rate (default: {recipe.lr:g}); times {recipe.gamma:g} after epochs"
             f" {milestones} of {recipe.epochs}, and in proportion with other --epochs")
    add("--weight_decay", type=value.weight, metavar="X",
        help=f"L2 penalty (default: {recipe.weight_decay:g})")
    add("--label_smoothing", type=value.inner_share, metavar="X",
        help="give this share of the target to all classes alike (default: none)")
    add("--ema", type=value.inner_share, metavar="DECAY",
        help="evaluate and save a moving average of the weights, such as 0.999 (default: none)")
    add("--accumulate", type=value.parts, metavar="N",
        help="pass a batch through the network in N equal parts, which takes less memory;"
             " BatchNorm sees the parts (default: 1)")
    add("--limit_train_batches", type=value.count, metavar="N", help="at most N batches an epoch")
    add("--holdout", type=value.count_or_zero, default=0, metavar="N",
        help="choose the best epoch on the last N training images, which training leaves out;"
             " with 0, choose it on the test set")


def add_cifar_flags(parser: ArgumentParser, recipe: Recipe, least_epochs: int) -> None:
    """Small images: which, where, and how to train on them; ``least_epochs`` is 0 or 1."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="cifar10",
        help="cifar10 and cifar100 are downloaded; folder reads DATA_DIR/train/<class>/ and"
             " DATA_DIR/test/<class>/ (or val); synthetic images are computed")
    add("--data_dir", default="./data", metavar="DIR", help="folder of the data")
    add("--image_size", type=value.count, default=32, metavar="PIXELS",
        help="side of the images; folder images are resized and centre-cropped to it")
    add("--limit_test_batches", type=value.count, metavar="N", help="evaluate on N batches of 500")
    add_normalisation_flags(parser)
    _add_recipe_flags(parser, recipe, least_epochs)
    add = parser.add_argument_group("CIFAR training").add_argument
    add("--cosine", action="store_true", help="no steps: warm up for 5 epochs, then half a cosine")
    add("--bs", type=value.count, default=128, metavar="N", help="images in a training batch")


def add_imagenet_flags(parser: ArgumentParser, recipe: Recipe) -> None:
    """Large images in folders, and how to train on them."""
    add = parser.add_argument_group("data").add_argument
    add("--data_dir", required=True, metavar="DIR", help="holds train/<class>/ and val/<class>/")
    add("--image_size", type=value.count, metavar="PIXELS",
        help="side of the crops (default: the checkpoint's, else 224); for evaluation, images are"
             " resized as the checkpoint says, else to 8/7 of it")
    add("--workers", "-j", type=value.count_or_zero, default=4, metavar="N",
        help="processes that read and augment images, per rank")
    add("--limit_val_batches", type=value.count, metavar="N", help="evaluate on N batches only")
    add_normalisation_flags(parser)
    _add_recipe_flags(parser, recipe, least_epochs=0)
    add = parser.add_argument_group("ImageNet training").add_argument
    add("--train_bs", type=value.count, default=512, metavar="N",
        help="images in a training batch, of all GPUs and ranks together")
    add("--sched", choices=("step", "cosine"), default="step",
        help="learning rate by steps, or by warm-up, cosine and cool-down within --epochs")
    add("--warmup_epochs", type=value.count_or_zero, default=5, metavar="N", help="cosine: warm-up")
    add("--warmup_lr", type=value.positive, default=1e-6, metavar="X", help="cosine: first rate")
    add("--cooldown_epochs", type=value.count_or_zero, default=10, metavar="N",
        help="cosine: epochs at the last rate")
    add("--min_lr", type=value.weight, default=1e-5, metavar="X", help="cosine: last rate")
    add("--new_head", action="store_true",
        help="start a fresh classifier, for other classes, and train it before channels are scored")
    add("--head_epochs", type=value.count, metavar="N",
        help="epochs in which the fresh classifier is trained alone (default: 2)")


def add_conversion_flags(parser: ArgumentParser) -> None:
    """Which weights to convert, and where to evaluate them."""
    add = parser.add_argument_group("conversion").add_argument
    add("--weights", default="IMAGENET1K_V1", metavar="NAME",
        help="name of torchvision's weights; a package.module:factory has its own")
    add("--image_size", type=value.count, metavar="PIXELS",
        help="side of the images (default: that of torchvision's weights, else 224)")
    add("--checkpoint", metavar="FILE", help="a local file of such weights; nothing is downloaded")
    add("--save", "-s", action="store_true", default=True, help="write the baseline, as usual")
    add("--no_save", dest="save", action="store_false", help="convert, check and evaluate only")
    add("--output", default="./checkpoints", metavar="DIR", help="where <net>/model_best.pth goes")
    add("--overwrite", action="store_true", help="replace other weights there")
    add = parser.add_argument_group("evaluation").add_argument
    add("--data_dir", metavar="DIR", help="folder with val/<class>/; without it, no evaluation")
    add("--batch_size", "-b", type=value.count, default=512, metavar="N", help="images in a batch")
    add("--workers", "-j", type=value.count_or_zero, default=4, metavar="N",
        help="processes that read images")
    add("--limit_val_batches", type=value.count, metavar="N", help="evaluate on N batches only")


def add_pruning_flags(parser: ArgumentParser, p: float, score_images: int | None,
                      recompute: bool = False) -> None:
    """What to prune, and how to score and select. ``recompute``: do so unless a flag forbids it."""
    add = parser.add_argument_group("pruning").add_argument
    add("--checkpoint", metavar="PATH",
        help="the network to prune: a file, or a folder with <net>/model_best.pth or"
             " model_best.pth (default: --output)")
    goal = parser.add_argument_group("how much to cut, one of").add_mutually_exclusive_group()
    goal.add_argument("--p", "-p", type=value.ratio, default=p, metavar="RATIO",
        help="share of the channels to cut, over all layers together, in [0, 1)")
    goal.add_argument("--macs", type=value.share, metavar="SHARE",
        help="cut until at most this share of the multiply-adds is left, and no more than that")
    goal.add_argument("--params", type=value.share, metavar="SHARE", help="likewise for parameters")
    goal.add_argument("--latency", type=value.share, metavar="SHARE",
        help="cut until inference takes at most this share of the time, as measured here")
    add("--latency_bs", type=value.count, metavar="N",
        help="images at once where time is measured (default: 64)")
    add("--criterion", choices=tuple(CRITERIA), default="gfbs", help="how to score a channel")
    by_layer = " and ".join(name for name, c in CRITERIA.items() if c.scope == "layer")
    add("--scope", choices=SCOPES,
        help="global: rank the channels of all layers together; layer: cut the same share of each"
             f" group (default: layer for {by_layer}, global for the others)")
    add("--w_beta", type=value.factor, default=0.05, metavar="X", help="weight of gfbs's beta term")
    add("--beta", action="store_true", default=True, help="score with the beta term, as usual")
    add("--no_beta", action="store_true", help="the same as --criterion taylor")
    add("--beta_only", action="store_true", help="the same as --criterion beta")
    add("--score_images", type=value.count, default=score_images, metavar="N",
        help="score on the first N images of the last tenth of the training set"
             + ("" if score_images else " (default: --train_bs)"))
    add("--score_seed", type=value.count_or_zero, metavar="N",
        help="instead, draw the scoring images from the whole training set, by this seed")
    again = "compute activations a second time in the backward pass of scoring: less memory"
    if recompute:
        add("--no_checkpoint_activations", dest="checkpoint_activations", action="store_false",
            help=f"do not {again}, the same scores")
    else:
        add("--checkpoint_activations", action="store_true", help=f"{again}, the same scores")
    add("--min_channels", type=value.count, default=1, metavar="N", help="what every layer keeps")
    add("--round_to", type=value.count, default=1, metavar="N",
        help="round widths up to multiples of N, such as 8, which is fast on hardware; never above"
             " the width before the cut")
    add("--recalibrate", type=value.count_or_zero, default=0, metavar="N",
        help="after a cut, estimate BatchNorm's running statistics anew on N training batches"
             " (of rank 0)")


def add_round_flags(parser: ArgumentParser, recipes: Recipes) -> None:
    """How pruned networks are trained: a teacher, and ways other than one cut and fine-tuning."""
    add = parser.add_argument_group("distillation").add_argument
    add("--distill", type=value.share, metavar="ALPHA",
        help="fine-tune on (1 - ALPHA) of the usual loss and ALPHA of the distance to the outputs"
             " of the unpruned network (default: none)")
    add("--temperature", type=value.positive, metavar="T",
        help="soften both outputs in this distance (default: 4)")
    group = parser.add_argument_group("instead of one shot")
    one, add = group.add_mutually_exclusive_group(), group.add_argument
    one.add_argument("--smooth", "-s", action="store_true",
        help="cut layer by layer (residual networks: block by block), fine-tuning in between")
    one.add_argument("--steps", type=value.count, metavar="K",
        help="reach the goal in K rounds of scoring, cutting and fine-tuning, then --epochs more")
    one.add_argument("--from_scratch", action="store_true",
        help="control: train the pruned network from fresh weights, by the baseline's recipe")
    stages = {"--smooth_epochs": (recipes.stage, "after each cut"),
              "--final_epochs": (recipes.final, "at the end")}
    for flag, (recipe, when) in stages.items():
        add(flag, type=value.count_or_zero, metavar="N",
            help=f"epochs of fine-tuning {when} (default: {recipe.epochs} where --epochs is"
                 f" {recipes.one_shot.epochs}, and in proportion)")
    add("--step_epochs", type=value.count_or_zero, metavar="N",
        help="epochs of fine-tuning after each round (default: that of --smooth_epochs)")


def add_device_flags(parser: ArgumentParser) -> _ArgumentGroup:
    """Where to compute. Returns the group of these flags."""
    group = parser.add_argument_group("device")
    add = group.add_argument
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--gpu", type=value.gpu_ids, metavar="IDS",
        help="GPUs that share every batch, such as 0,1 (default: all visible ones)")
    return group


def add_run_flags(parser: ArgumentParser) -> None:
    """What every run has: how to train faster, where, what it writes, and how to go on."""
    add = parser.add_argument_group("speed").add_argument
    add("--amp", choices=tuple(AMP), help="train in mixed precision; fp16 on CUDA only")
    add("--channels_last", action="store_true", default=True,
        help="store activations pixel by pixel, as usual (not on MPS)")
    add("--no_channels_last", dest="channels_last", action="store_false",
        help="store them plane by plane, as runs of earlier versions did by default")
    add("--compile", action="store_true", help="train through torch.compile; needs a C++ compiler")
    add("--fused", action="store_true", help="the optimiser updates all weights in one pass")
    one = add_device_flags(parser).add_mutually_exclusive_group()
    one.add_argument("--processes", type=value.count, metavar="N",
        help="processes that share batches on a CPU")
    one.add_argument("--data_parallel", action="store_true",
        help="one process for all GPUs (nn.DataParallel), as published; without it, each has one")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=value.count_or_zero, default=1, metavar="N",
        help="of the initial weights, the order of the images and their augmentation")
    add("--deterministic", action="store_true",
        help="the same bits in every run on the same device; slower on a GPU, where cuDNN otherwise"
             " tries which algorithm is the fastest")
    add("--sync_bn", action="store_true",
        help="on several GPUs: BatchNorm statistics over the batches of all")
    add("--config", metavar="FILE",
        help="repeat the run that wrote this config.json; flags that are typed beside it win")
    add("--output", default="./checkpoints", metavar="DIR", help="where results go")
    add("--logdir", metavar="DIR", help="where TensorBoard files go (default: OUTPUT/runs)")
    resume = parser.add_argument_group("resume")
    one, add = resume.add_mutually_exclusive_group(), resume.add_argument
    one.add_argument("--overwrite", action="store_true",
        help="replace the run that is in the folder, if any")
    one.add_argument("--resume", "-r", action="store_true",
        help="continue from last.pth in the output folder, to the same bits as without the break;"
             " start at the beginning if there is none")
    add("--skip_finished", action="store_true", help=SUPPRESS)  # no effect any more
    add("--checkpoint_every", type=value.count, metavar="N",
        help="write last.pth after every N batches, too, and not only after every epoch")
