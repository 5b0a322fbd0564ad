"""Networks and made-up images to measure with."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from models import NETWORKS, GatedModel, build_model
from utils.batches import Batches
from utils.cli import count, network
from utils.data import CIFAR10_NORMALISATION, ImageSet
from utils.distributed import Runtime
from utils.flags import IMAGENET_NETWORKS


def add_workload_flags(parser: argparse.ArgumentParser, batch: int, net: str) -> None:
    """Which network, on how many images of which size."""
    add = parser.add_argument
    add("--net", type=network(list(NETWORKS)), default=net, help="the network")
    add("--bs", type=count, default=batch, metavar="N", help="images in a batch")
    add("--image_size", type=count, metavar="PIXELS",
        help="side of the images (default: 224 for the networks of ImageNet, else 32)")  # fmt: skip


def image_size(args: argparse.Namespace) -> int:
    return args.image_size or (224 if args.net in IMAGENET_NETWORKS else 32)


def fresh_model(net: str) -> GatedModel:
    """The same weights every time."""
    torch.manual_seed(0)
    return build_model(net)


def noise(count: int, size: int) -> ImageSet:
    """Images that cost what others do."""
    stream = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=stream)
    return ImageSet(images, torch.arange(count) % 10)


def noise_batches(args: argparse.Namespace, batches: int, runtime: Runtime) -> Batches:
    """Training batches of noise, augmented."""
    images = noise(batches * args.bs, image_size(args))
    return Batches(images, args.bs, CIFAR10_NORMALISATION, runtime, augment=True)


def noise_batch(args: argparse.Namespace, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """One batch, on the device."""
    return next(iter(noise_batches(args, 1, runtime)))
