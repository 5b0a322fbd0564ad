"""Networks and made-up images to measure with."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from utils.batches import Batches
from utils.flags import IMAGENET_NETWORKS

from models import NETWORKS, Gate, GatedModel, build_model
from utils.cli import count, network
from utils.cost import model_cost
from utils.data import CIFAR10_NORMALISATION, ImageSet
from utils.distributed import Runtime


def add_workload_flags(parser: argparse.ArgumentParser, batch: int, net: str) -> None:
    """Which network, on how many images of which size."""
    add = parser.add_argument
    add("--net", type=network(list(NETWORKS)), default=net, help="the network")
    add("--bs", type=count, default=batch, metavar="N", help="images in a batch")
    add("--image_size", type=count, metavar="PIXELS",
        help="side of the images (default: 224 for the networks of ImageNet, else 32)")  # fmt: skip


def image_size(args: argparse.Namespace) -> int:
    """Side of the images; InputError where they are too small for the network."""
    size = args.image_size or (224 if args.net in IMAGENET_NETWORKS else 32)
    model_cost(build_model(args.net), size)
    return size


def fresh_model(net: str) -> GatedModel:
    """The same weights every time."""
    torch.manual_seed(0)
    return build_model(net)


def without_gates(model: GatedModel) -> GatedModel:
    """A copy of the network as anybody else would have written it."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Gate):
            model.set_submodule(name, nn.Identity())
    return model


def noise(count: int, size: int) -> ImageSet:
    """Images that cost what others do."""
    stream = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=stream)
    return ImageSet(images, torch.arange(count) % 10)


def noise_batches(batches: int, batch: int, size: int, runtime: Runtime) -> Batches:
    """Training batches of noise, augmented."""
    images = noise(batches * batch, size)
    return Batches(images, batch, CIFAR10_NORMALISATION, runtime, augment=True)


def noise_batch(batch: int, size: int, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """One batch, on the device."""
    return next(iter(noise_batches(1, batch, size, runtime)))


def exhaust(batches: Iterable[Any]) -> None:
    """Go through all there is."""
    for _ in batches:
        pass
