"""Small images: a whole data set in memory as one uint8 tensor, augmented batch by batch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.data.batches import (
    About,
    Data,
    Normalisation,
    ShuffledBatches,
    Split,
    choose_normalisation,
)
from utils.data.folders import FolderImages, image_loader, read_batches
from utils.data.listing import ImageSamples, folder_identity, list_folders, readable
from utils.data.synthetic import SHAPES, synthetic_images
from utils.distributed import Runtime
from utils.errors import InputError
from utils.progress import progress

CIFAR10_NORMALISATION = Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100_NORMALISATION = Normalisation((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
DATASETS = ("cifar10", "cifar100", "folder", "synthetic")
TEST_FOLDERS = ("test", "val")  # the first that exists serves
TEST_BATCH = 500
IMAGES_A_WORKER = 200  # of a folder; fewer are read by this process


@dataclass(frozen=True)
class ImageSet:
    """Images (N, 3, S, S) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> ImageSet:
        return ImageSet(self.images[part], self.labels[part])


@dataclass(frozen=True)
class ImageData:
    """A data set: training and test images, class names in label order, its usual constants."""

    train: ImageSet
    test: ImageSet
    classes: list[str]
    normalisation: Normalisation

    def about(
        self, dataset: str, typed: Normalisation | None, meta: Mapping[str, Any]
    ) -> tuple[About, str]:
        """What checkpoints say about the data, and the line of ``choose_normalisation``."""
        chosen, line = choose_normalisation(typed, meta, self.normalisation)
        return About(dataset, self.classes, self.train.images.shape[-1], chosen), line


def load_data(dataset: str, data_dir: str | Path, image_size: int = 32) -> ImageData:
    """Read a whole data set of ``DATASETS`` into memory.

    CIFAR is downloaded into ``data_dir`` on first use. ``folder`` reads ``data_dir/train/<class>/``
    and ``data_dir/test/<class>/`` (or ``val``), and resizes and crops to ``image_size`` pixels.

    Raises InputError if a download fails, or if folders or images cannot be used.
    """
    root = Path(data_dir)
    if dataset == "folder":
        train, test, classes = list_folders(root, TEST_FOLDERS)
        images = read_images(train + test, image_size)
        parts = images[: len(train)], images[len(train) :]
    elif dataset == "synthetic":
        classes, kinds = list(SHAPES), ((5000, 0), (1000, 1))
        parts = [ImageSet(*synthetic_images(count, image_size, seed)) for count, seed in kinds]
    elif image_size != 32:
        raise InputError(f"--image_size {image_size}: images of {dataset} have 32; leave it out")
    else:
        with readable(root):
            *parts, classes = _read_cifar(dataset, root)
    usual = CIFAR100_NORMALISATION if dataset == "cifar100" else CIFAR10_NORMALISATION
    return ImageData(*parts, classes, usual)


def data_identity(dataset: str, data_dir: str | Path) -> dict[str, str]:
    """What tells data sets apart in a configuration; empty for those that never change."""
    return folder_identity(data_dir, TEST_FOLDERS) if dataset == "folder" else {}


def _read_cifar(dataset: str, root: Path) -> tuple[ImageSet, ImageSet, list[str]]:
    from torchvision.datasets import CIFAR10, CIFAR100

    source = CIFAR10 if dataset == "cifar10" else CIFAR100
    if (folder := root / source.base_folder).is_dir():
        os.listdir(folder)  # raises an error, where torchvision would download the data once more
    try:
        parts = [source(str(root), train=train, download=True) for train in (True, False)]
    except PermissionError:
        raise
    except (OSError, RuntimeError) as error:
        said = f"{source.url} could not be downloaded, or {root} holds other files ({error})"
        advice = f"put {source.filename} into {root} and run again, or see --data_dir"
        raise InputError(f"{said}; {advice}") from error
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in parts]
    sets = [ImageSet(x, torch.tensor(part.targets)) for x, part in zip(images, parts, strict=True)]
    return *sets, parts[0].classes


def read_images(samples: ImageSamples, image_size: int) -> ImageSet:
    """All images in memory, resized by the shorter side and centre-cropped to ``image_size``."""
    # Processes, not threads: Pillow holds Python's lock where it converts pixels. A process takes
    # longer to start than it takes to read a few images.
    workers = min(os.cpu_count() or 1, len(samples) // IMAGES_A_WORKER)
    loader = image_loader(FolderImages(samples, partial(_square, size=image_size)), workers)
    parts = torch.arange(len(samples)).split(100)
    pixels = torch.empty(len(samples), image_size, image_size, 3, dtype=torch.uint8)

    def fill() -> Iterator[list[int]]:
        batches = read_batches(loader, 0, parts)
        for part, ((squares, sizes), _) in zip(parts, batches, strict=True):
            pixels[part] = squares
            yield from sizes.tolist()

    sizes = list(progress(fill(), "reading images", len(samples)))
    if small := [size for size in sizes if min(size) < image_size]:
        width, height = min(small)
        many = f"{len(small)} of {len(samples)} images are smaller than --image_size {image_size}"
        print(f"warning: {many} and are enlarged (smallest: {width}x{height})", file=sys.stderr)
    labels = torch.tensor([label for _, label in samples])
    return ImageSet(pixels.permute(0, 3, 1, 2), labels)


def _square(image: Image.Image, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The centre of an image, resized to uint8 (S, S, 3), and the sides (2,) that it had."""
    from torchvision.transforms.v2 import functional as transforms

    sides = np.array(image.size)
    if image.size != (size, size):
        image = transforms.center_crop(transforms.resize(image, [size]), [size])
    return np.array(image), sides


@dataclass(eq=False)
class ImageBatches(ShuffledBatches):
    """Batches of images in memory.

    With ``augment``, they are padded by an eighth of their side, cropped and flipped at random.
    """

    source: ImageSet
    normalisation: Normalisation
    runtime: Runtime

    def __post_init__(self):
        device = self.runtime.device
        self.labels = self.source.labels.to(device)
        self.size = self.source.images.shape[-1]
        self.padding = self.size // 8 if self.augment else 0
        padded = F.pad(self.source.images.to(device).contiguous(), (self.padding,) * 4)
        # Crops are gathered by rows, several times as fast as by pixels: a view of every run of S
        # pixels, and where in this view the rows of the first crop of an image are.
        self.rows = padded.flatten().unfold(0, self.size, 1)
        self.image_stride, plane, self.line, _ = padded.stride()
        first = plane * torch.arange(3)[:, None] + self.line * torch.arange(self.size)
        self.first_rows = first.flatten().to(device)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Draw all of it at once, so that no batch waits for the device."""
        super().set_epoch(epoch, first_batch)
        corners = torch.randint(2 * self.padding + 1, (self.images, 2), generator=self.stream)
        flips = torch.rand(self.images, generator=self.stream) < (0.5 if self.augment else 0)
        drawn = self.order, corners, flips
        self.order, self.corners, self.flips = (part.to(self.runtime.device) for part in drawn)

    def pick(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        indices = indices.to(self.runtime.device)
        down, right = self.corners[indices].T
        corners = indices * self.image_stride + down * self.line + right
        rows = (corners[:, None] + self.first_rows).flatten()
        images = self.rows.index_select(0, rows).view(-1, 3, self.size, self.size)
        images = torch.where(self.flips[indices].view(-1, 1, 1, 1), images.flip(-1), images)
        return self.normalisation.apply(images), self.labels[indices]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.pick, self._shares())


def image_batches(
    images: ImageData, about: About, batch_size: int, runtime: Runtime, seed: int, split: Split
) -> Data:
    """Augmented training batches, and plain batches of ``TEST_BATCH`` for test and holdout."""
    make = partial(ImageBatches, normalisation=about.normalisation, runtime=runtime)
    train = partial(make, batch_size=batch_size, augment=True, seed=seed)
    return split.data(images.train, images.test, about, train, partial(make, batch_size=TEST_BATCH))
