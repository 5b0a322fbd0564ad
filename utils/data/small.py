"""Small images: a whole data set in memory as one uint8 tensor, augmented batch by batch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.hub import download_url_to_file
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from utils.data.batches import (
    About,
    Data,
    Normalisation,
    choose_normalisation,
    hold_out,
    random_stream,
    split_batches,
)
from utils.data.listing import (
    TEST_FOLDERS,
    ImageSamples,
    folder_identity,
    ignore_warnings_of_pillow,
    list_folders,
    read_image,
    readable,
)
from utils.data.synthetic import SYNTHETIC_CLASSES, synthetic_images
from utils.distributed import Runtime
from utils.errors import InputError

CIFAR10_NORMALISATION = Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
NORMALISATIONS = {
    "cifar10": CIFAR10_NORMALISATION,
    "cifar100": Normalisation((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "folder": CIFAR10_NORMALISATION,
    "synthetic": CIFAR10_NORMALISATION,
}
DATASETS = tuple(NORMALISATIONS)
TEST_BATCH = 500


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
        """The data in words, and the line of ``choose_normalisation``."""
        chosen, line = choose_normalisation(typed, meta, self.normalisation)
        return About(dataset, self.classes, self.train.images.shape[-1], chosen), line


def load_data(dataset: str, data_dir: str | Path, image_size: int = 32) -> ImageData:
    """Read a whole data set into memory.

    Args:
        dataset: ``cifar10`` and ``cifar100`` are downloaded into ``data_dir`` on first use;
            ``folder`` reads ``data_dir/train/<class>/`` and ``data_dir/test/<class>/`` (or
            ``val``); ``synthetic`` is made on the spot.
        data_dir: where the data are, or go.
        image_size: side in pixels; folder images are resized and centre-cropped to it.

    Raises InputError for a download that fails, and for folders or images that cannot serve.
    """
    if dataset == "folder":
        train, test, classes = _read_folders(Path(data_dir), image_size)
    elif dataset == "synthetic":
        classes = list(SYNTHETIC_CLASSES)
        train, test = (
            ImageSet(*synthetic_images(n, image_size, seed)) for n, seed in ((5000, 0), (1000, 1))
        )
    elif image_size != 32:
        raise InputError(
            f"--image_size {image_size}: {dataset} has images of 32 pixels; leave the flag out"
        )
    else:
        with readable(Path(data_dir)):
            train, test, classes = _read_cifar(
                {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset], Path(data_dir)
            )
    return ImageData(train, test, classes, NORMALISATIONS[dataset])


def data_identity(dataset: str, data_dir: str | Path) -> dict[str, str]:
    """What tells two data sets apart in a configuration: nothing for those that never change."""
    return folder_identity(data_dir, TEST_FOLDERS) if dataset == "folder" else {}


def _read_cifar(source: type[CIFAR10], root: Path) -> tuple[ImageSet, ImageSet, list[str]]:
    archive = root / source.filename
    advice = f"put {source.filename} into {root} and run again, or see --data_dir"
    if (root / source.base_folder).is_dir():
        os.listdir(root / source.base_folder)  # torchvision would try to download it once more
    else:
        try:
            if not archive.is_file():
                root.mkdir(parents=True, exist_ok=True)
                # torchvision's own download leaves half a file where it is interrupted.
                download_url_to_file(source.url, str(archive), progress=sys.stderr.isatty())
        except OSError as error:
            raise InputError(f"{source.url} could not be downloaded ({error}); {advice}") from error
        if not check_integrity(str(archive), source.tgz_md5):
            raise InputError(f"{archive} is damaged; delete it, {advice}")
    try:
        parts = [source(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise InputError(f"{root / source.base_folder}: {error} Delete it and {advice}") from error
    train, test = (
        ImageSet(torch.from_numpy(p.data).permute(0, 3, 1, 2), torch.tensor(p.targets))
        for p in parts
    )
    return train, test, parts[0].classes


def _read_folders(root: Path, image_size: int) -> tuple[ImageSet, ImageSet, list[str]]:
    train, test, classes = list_folders(root, TEST_FOLDERS)
    images = _read_images(train + test, image_size)
    return images[: len(train)], images[len(train) :], classes


def _read_images(samples: ImageSamples, image_size: int) -> ImageSet:
    ignore_warnings_of_pillow()
    pixels = np.empty((len(samples), image_size, image_size, 3), np.uint8)

    def read(index: int) -> tuple[int, int]:
        image = read_image(samples[index][0])
        size = image.size
        if size != (image_size, image_size):
            image = transforms.center_crop(transforms.resize(image, [image_size]), [image_size])
        pixels[index] = image
        return size

    # Its end does not wait for the images that are still to be read, as that of an executor does.
    with ThreadPool(os.cpu_count()) as pool:
        sizes = list(
            tqdm(
                pool.imap(read, range(len(samples))),
                "reading images",
                len(samples),
                leave=False,
                disable=not sys.stderr.isatty(),
            )
        )
    small = [size for size in sizes if min(size) < image_size]
    if small:
        width, height = min(small)
        print(
            f"warning: {len(small)} of {len(samples)} images are smaller than --image_size"
            f" {image_size} and are enlarged; the smallest is {width}x{height}",
            file=sys.stderr,
        )
    return ImageSet(
        torch.from_numpy(pixels).permute(0, 3, 1, 2),
        torch.tensor([label for _, label in samples]),
    )


class ImageBatches:
    """An iterable over (normalised images, labels) on a device, epoch after epoch.

    ``images`` is how many there are.

    With ``augment``, images are shuffled, padded by an eighth of their side (4 pixels at 32),
    cropped at random and flipped. Order and augmentation are pure functions of (seed, epoch) and of
    (seed, epoch, image), so that a run can be continued anywhere.

    Args:
        images: the images to go through.
        batch_size: images in a batch of all ranks together; the last may be smaller.
        normalisation: applied on the device.
        runtime: where batches are made, and for which rank.
        augment: training order and augmentation, or file order and the plain image.
        seed: of the random streams.
        limit: at most this many batches an epoch.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        normalisation: Normalisation,
        runtime: Runtime,
        *,
        augment: bool = False,
        seed: int = 0,
        limit: int | None = None,
    ):
        self.images = len(images)
        self.labels = images.labels.to(runtime.device)
        self.size = images.images.shape[-1]
        self.padding = self.size // 8 if augment else 0
        padded = F.pad(images.images.to(runtime.device).contiguous(), (self.padding,) * 4)
        # Crops are gathered row by row, which is several times as fast as pixel by pixel: a view of
        # every run of S pixels, and where in it the rows of an image's first crop are.
        self.rows = padded.flatten().unfold(0, self.size, 1)
        self.image_stride, plane, self.line, _ = padded.stride()
        first = plane * torch.arange(3)[:, None] + self.line * torch.arange(self.size)
        self.first_rows = first.flatten().to(runtime.device)
        self.batch_size, self.normalisation, self.runtime = batch_size, normalisation, runtime
        self.augment, self.seed, self.limit = augment, seed, limit
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Draw order and augmentation of an epoch, and begin it with a later batch."""
        self.first_batch = first_batch
        n, places = self.images, 2 * self.padding + 1
        order = torch.arange(n)
        corners, flips = torch.zeros(n, 2, dtype=torch.long), torch.zeros(n, dtype=torch.bool)
        if self.augment:
            stream = random_stream(self.seed, epoch)
            order = torch.randperm(n, generator=stream)
            corners = torch.randint(places, (n, 2), generator=stream)
            flips = torch.rand(n, generator=stream) < 0.5
        # All at once, so that no batch waits for the device.
        device = self.runtime.device
        self.order, self.places, self.flips = order.to(device), corners.to(device), flips.to(device)

    def pick(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) and labels (B,) at ``indices``, with this epoch's augmentation."""
        indices = indices.to(self.runtime.device)
        down, right = self.places[indices].T
        corners = indices * self.image_stride + down * self.line + right
        rows = (corners[:, None] + self.first_rows).flatten()
        images = self.rows.index_select(0, rows).view(-1, 3, self.size, self.size)
        images = torch.where(self.flips[indices].view(-1, 1, 1, 1), images.flip(-1), images)
        return self.normalisation.apply(images), self.labels[indices]

    def _shares(self) -> list[Tensor]:
        shares = split_batches(
            self.order, self.batch_size, training=self.augment, limit=self.limit,
            rank=self.runtime.rank, ranks=self.runtime.world_size,
        )  # fmt: skip
        return shares[self.first_batch :]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.pick, self._shares())

    def __len__(self) -> int:
        return len(self._shares())


def image_batches(
    images: ImageData,
    about: About,
    batch_size: int,
    runtime: Runtime,
    *,
    seed: int,
    holdout: int = 0,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> Data:
    """Augmented training batches, and plain batches of ``TEST_BATCH`` for test and holdout."""
    trained, held = hold_out(images.train, holdout)
    of = about.normalisation, runtime
    train = ImageBatches(trained, batch_size, *of, augment=True, seed=seed, limit=limit_train)
    test, holdout_batches = (
        ImageBatches(part, TEST_BATCH, *of, limit=limit_test) if part else None
        for part in (images.test, held)
    )
    return Data(train, test, holdout_batches, about)
