"""What the tests share: networks with something to prune, batches, and scripts that are run."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import nn

import gfbs_cifar
import train
from models import GatedModel, build_model
from utils.checkpoint import load_model
from utils.data.small import image_batches
from utils.distributed import Runtime

COMMON = [
    "--net", "gateresnet20", "--dataset", "folder", "--data_dir", "images", "--image_size", "16",
    "--device", "cpu",
]  # fmt: skip


def make_folder(root, parts=("train", "test"), classes=("cat", "dog"), images=6, size=(40, 36)):
    """A folder data set of uniform images whose shade says which they are."""
    for part in parts:
        for c, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", size, (10 * i, 50 * c, 7)).save(folder / f"{i}.png")
    return root


def run_train(*argv):
    return train.main(train.parse_args([*COMMON, "--bs", "8", "--epochs", "2", *argv]))


def run_gfbs(*argv):
    return gfbs_cifar.main(gfbs_cifar.parse_args([*COMMON, "--bs", "8", "--epochs", "1", *argv]))


def one_run(folder, name):
    """The folder of the only run whose name begins so; settings that are not usual follow."""
    (run,) = Path(folder).glob(f"{name}*")
    return run


def files(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def same_weights(a, b):
    a, b = load_model(a).state_dict(), load_model(b).state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def randomise_channels(model: nn.Module) -> None:
    """Random biases, scales, shifts and running statistics, so that no two channels are alike."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.5, 0.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)


def random_model(net: str, num_classes: int = 10) -> GatedModel:
    torch.manual_seed(0)
    model = build_model(net, num_classes)
    randomise_channels(model)
    nn.init.normal_(model.get_submodule(model.head).bias)
    return model


def settle(model: GatedModel, images: torch.Tensor) -> GatedModel:
    """Take the running statistics from these images.

    With random ones the signal fades from layer to layer, until in eval mode the logits of a deep
    network are those of its last biases, whatever the image and whatever was cut.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    usual, training = [norm.momentum for norm in norms], model.training
    for norm in norms:
        norm.momentum = 1
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return model.train(training)


CPU = Runtime(torch.device("cpu"))


def batches_of(images, batch_size, **options):
    """The batches of small images, with their usual constants."""
    about, _ = images.about("folder", None, {})
    return image_batches(images, about, batch_size, CPU, seed=1, **options)


def random_batch(count: int = 8, size: int = 32, num_classes: int = 10, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(count, 3, size, size, dtype=dtype), torch.arange(count) % num_classes


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |a|, in which this project states equality."""
    return ((a - b).abs().max() / a.abs().max()).item()
