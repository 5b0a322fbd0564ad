"""Batches of small images, augmented as a whole on the device; the images that score channels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.data import ImageData, ImageSet, Normalisation, hold_out
from utils.distributed import Runtime

TEST_BATCH = 500
SCORING = 2**32 - 1  # in the place of an epoch, in the key of a random stream


def random_stream(*key: int) -> torch.Generator:
    """A random generator on the CPU that is a pure function of its key, e.g. (seed, epoch)."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    )


def split_batches(
    order: Tensor, batch_size: int, *, training: bool, limit: int | None, rank: int, ranks: int
) -> list[Tensor]:
    """A rank's share of every batch of an epoch: image indices, in the given order.

    The ranks together go through batches of ``batch_size``. In training all of them have equally
    many images of a batch, and a last batch has at least two for each (a single image is no batch
    to BatchNorm); the few images that are over at the end of an epoch are left out.
    """
    batches = list(order.split(batch_size))[:limit]
    if training:
        even = len(batches[-1]) // ranks * ranks
        batches[-1] = batches[-1][:even]
        if even < min(2 * ranks, batch_size) and len(batches) > 1:
            batches.pop()
    shares = [batch[rank::ranks] for batch in batches]
    return [share for share in shares if len(share)]


class Batches:
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
    data: ImageData,
    batch_size: int,
    runtime: Runtime,
    *,
    seed: int,
    holdout: int = 0,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> tuple[Batches, Batches, Batches | None]:
    """Augmented training batches, and in plain batches of ``TEST_BATCH`` the test images and those
    that are held out of training, if any.
    """
    trained, held = hold_out(data.train, holdout)
    of = data.normalisation, runtime
    train = Batches(trained, batch_size, *of, augment=True, seed=seed, limit=limit_train)
    plain = (
        Batches(images, TEST_BATCH, *of, limit=limit_test) if images else None
        for images in (data.test, held)
    )
    return train, *plain


def scoring_indices(n: int, count: int, seed: int | None = None) -> Tensor:
    """Which of n training images score the channels: the first ``count`` of the last tenth, in file
    order.

    Where the last tenth is smaller than that, the last ``count`` images. With a seed, ``count``
    others at random.
    """
    if seed is not None:
        return torch.randperm(n, generator=random_stream(seed, SCORING))[:count]
    start = max(0, min(n - n // 10, n - count))
    return torch.arange(start, min(start + count, n))
