"""Batches of small images, augmented as a whole on the device; the images that score channels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.data import ImageData, ImageSet, Normalisation

TEST_BATCH = 500


def random_stream(*key: int) -> torch.Generator:
    """A random generator on the CPU that is a pure function of its key, e.g. (seed, epoch)."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    )


class Batches:
    """An iterable over (normalised images, labels) on a device, epoch after epoch.

    With ``augment``, images are shuffled, padded by an eighth of their side (4 pixels at 32),
    cropped at random and flipped. Order and augmentation are pure functions of (seed, epoch) and of
    (seed, epoch, image), so that a run can be continued anywhere. A last batch of a single image is
    left out of training: BatchNorm cannot normalise it.

    Args:
        images: the images to go through.
        batch_size: images in a batch; the last may be smaller.
        normalisation: applied on the device.
        device: where batches are made.
        augment: training order and augmentation, or file order and the plain image.
        seed: of the random streams.
        limit: at most this many batches an epoch.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        normalisation: Normalisation,
        device: torch.device | str = "cpu",
        *,
        augment: bool = False,
        seed: int = 0,
        limit: int | None = None,
    ):
        self.labels = images.labels.to(device)
        self.size = images.images.shape[-1]
        self.padding = self.size // 8 if augment else 0
        padded = F.pad(images.images.to(device), (self.padding,) * 4)
        # A view, (N, 3, 2p+1, 2p+1, S, S): every crop of every image, so that one index picks a
        # batch of crops.
        self.crops = padded.unfold(2, self.size, 1).unfold(3, self.size, 1)
        self.batch_size, self.normalisation, self.augment, self.seed, self.limit = (
            batch_size,
            normalisation,
            augment,
            seed,
            limit,
        )
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw order and augmentation of an epoch."""
        n, places = len(self.labels), 2 * self.padding + 1
        self.order = torch.arange(n)
        self.places = torch.zeros(n, 2, dtype=torch.long)
        self.flips = torch.zeros(n, dtype=torch.bool)
        if self.augment:
            stream = random_stream(self.seed, epoch)
            self.order = torch.randperm(n, generator=stream)
            self.places = torch.randint(places, (n, 2), generator=stream)
            self.flips = torch.rand(n, generator=stream) < 0.5

    def pick(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) and labels (B,) at ``indices``, with this epoch's augmentation."""
        device = self.labels.device
        places, flips = self.places[indices].to(device), self.flips[indices].to(device)
        indices = indices.to(device)
        images = self.crops[indices, :, places[:, 0], places[:, 1]]
        images = torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images)
        return self.normalisation.apply(images), self.labels[indices]

    def _batches(self) -> list[Tensor]:
        batches = list(self.order.split(self.batch_size))
        if self.augment and len(batches) > 1 and len(batches[-1]) == 1:
            batches.pop()
        return batches[: self.limit]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.pick, self._batches())

    def __len__(self) -> int:
        return len(self._batches())


def train_and_test_batches(
    data: ImageData,
    batch_size: int,
    device: torch.device | str,
    *,
    seed: int,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> tuple[Batches, Batches]:
    """Augmented training batches, and test batches of the plain images in larger portions."""
    train = Batches(
        data.train,
        batch_size,
        data.normalisation,
        device,
        augment=True,
        seed=seed,
        limit=limit_train,
    )
    return train, Batches(data.test, TEST_BATCH, data.normalisation, device, limit=limit_test)


def scoring_indices(n: int, count: int, seed: int | None = None) -> Tensor:
    """Which of n training images score the channels: the first ``count`` of the last tenth, in file
    order.

    Where the last tenth is smaller than that, the last ``count`` images. With a seed, ``count``
    others at random.
    """
    if seed is not None:
        return torch.randperm(n, generator=random_stream(seed))[:count]
    start = max(0, min(n - n // 10, n - count))
    return torch.arange(start, min(start + count, n))
