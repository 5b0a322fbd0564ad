"""How many images a second come in: ours against PIL images one by one from a DataLoader.

Small images (CIFAR): crop and flip, batch-wise from memory. With --folder, large images (ImageNet),
too: decode, random crop of 224 pixels, flip, at the same number of worker processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from utils.batches import Batches
from utils.image_folders import IMAGENET_NORMALISATION, Crops, FolderBatches

from tools.benchmark.timing import Comparison, Contender, Stopwatch
from tools.benchmark.workload import exhaust, noise
from utils.cli import count, count_or_zero
from utils.data import CIFAR10_NORMALISATION, ImageSamples, ImageSet, Normalisation, list_images
from utils.distributed import Runtime


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=count, default=20000, metavar="N", help="small images an epoch")
    add("--bs", type=count, default=128, metavar="N", help="images in a batch")
    add(
        "--workers",
        type=count_or_zero,
        default=2,
        metavar="N",
        help="processes of every DataLoader; 0 for none, to profile what they do",
    )
    add("--folder", metavar="DIR", help="large images, in DIR/<class>/")


def compare_all(
    args: argparse.Namespace, runtime: Runtime, watch: Stopwatch
) -> Iterator[Comparison]:
    samples = list_images(Path(args.folder))[0] if args.folder else []
    yield _small(args, runtime, watch)
    if samples:
        yield _large(args, samples, runtime, watch)


class PilImages(Dataset):
    """What torchvision's CIFAR10 does with its arrays and a transform."""

    def __init__(self, images: ImageSet, transform: Any):
        self.arrays = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels, self.transform = images.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def _small(args: argparse.Namespace, runtime: Runtime, watch: Stopwatch) -> Comparison:
    images = noise(args.images, 32)
    crop = transforms.RandomCrop(32, padding=4)
    usual = PilImages(images, _usual(crop, CIFAR10_NORMALISATION))
    ours = Batches(images, args.bs, CIFAR10_NORMALISATION, runtime, augment=True)
    return _compare("small images", usual, ours, args, watch)


def _large(
    args: argparse.Namespace, samples: ImageSamples, runtime: Runtime, watch: Stopwatch
) -> Comparison:
    crop = transforms.RandomResizedCrop(224)
    usual = ImageFolder(args.folder, _usual(crop, IMAGENET_NORMALISATION))
    ours = FolderBatches(samples, args.bs, Crops(), runtime, workers=args.workers, augment=True)
    try:
        return _compare("large images", usual, ours, args, watch)
    finally:
        ours.close()


def _usual(crop: Any, normalisation: Normalisation) -> transforms.Compose:
    return transforms.Compose([
        crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(normalisation.mean, normalisation.std),
    ])  # fmt: skip


def _compare(
    title: str, usual: Dataset, ours: Any, args: argparse.Namespace, watch: Stopwatch
) -> Comparison:
    device = watch.device
    # Workers stay, as ours do, so that starting them is not on the clock.
    loader = DataLoader(
        usual, args.bs, shuffle=True, num_workers=args.workers, persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )  # fmt: skip

    def on_device() -> Iterator[Any]:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def our_epoch() -> Iterable[Any]:
        ours.set_epoch(0)
        return ours

    contenders = [
        Contender("PIL one by one", lambda _: exhaust(on_device())),
        Contender("ours", lambda _: exhaust(our_epoch())),
    ]
    return watch.compare(title, contenders, ours.images)
