"""What training sees of a data set: batches, the images that score channels, and metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import KW_ONLY, dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from utils.errors import InputError

SCORING = 2**32 - 1  # stands for the epoch in the key of a random stream


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation, for pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def as_dict(self) -> dict[str, list[float]]:
        return {"mean": list(self.mean), "std": list(self.std)}

    def __str__(self) -> str:
        mean, std = (",".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return f"mean {mean} and std {std}"

    def apply(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> normalised float32."""
        mean, std = (_of_bytes(values, images.device) for values in (self.mean, self.std))
        if images.device.type != "cpu":
            return images.float().sub_(mean).div_(std)
        # numpy asks the system for huge pages. In torch's memory, page faults take more than half
        # of the time for a batch of large images.
        floats = torch.from_numpy(np.empty(images.shape, np.float32))
        return floats.copy_(images).sub_(mean).div_(std)


@cache  # sending them with every batch would wait for the device
def _of_bytes(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A value per channel, for pixels in [0, 255]."""
    return torch.tensor(values, device=device).view(3, 1, 1) * 255


class Batches(Protocol):
    """What training needs: (images, labels) on a device, epoch after epoch.

    Images are (B, 3, S, S) float32, normalised; labels are (B,) int64. Order and augmentation must
    depend only on the seed, the epoch and the image, so that a run can continue at any batch.
    """

    images: int  # how many there are

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the order and the augmentation of an epoch, and begin with a later batch."""

    def pick(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) and labels (B,) at these places, with this epoch's augmentation."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class LoaderBatches(Batches):
    """The batches of a DataLoader over (image, label); a run cannot be resumed on them."""

    loader: DataLoader
    device: torch.device

    @property
    def images(self) -> int:
        return len(self.loader.dataset)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """The loader draws its own order."""

    def pick(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = default_collate([self.loader.dataset[i] for i in indices.tolist()])
        return images.to(self.device), labels.to(self.device)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x.to(self.device), y.to(self.device)) for x, y in self.loader)


@dataclass(eq=False)
class ShuffledBatches(Batches):
    """Batches that divide a sequence of images among the ranks, in a new order every epoch.

    Subclasses add the fields ``normalisation`` and ``runtime``, ``pick`` and ``__iter__``.
    """

    source: Sized  # the images, each with its label
    batch_size: int  # images in a batch of all ranks together; the last batch may be smaller
    _: KW_ONLY
    augment: bool = False  # training order and augmentation; otherwise file order, plain images
    seed: int = 0  # of the random streams
    limit: int | None = None  # at most this many batches an epoch

    @property
    def images(self) -> int:
        return len(self.source)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.epoch, self.first_batch, n = epoch, first_batch, self.images
        self.stream = random_stream(self.seed, epoch)  # subclasses draw their augmentation from it
        self.order = torch.randperm(n, generator=self.stream) if self.augment else torch.arange(n)

    def __len__(self) -> int:
        return len(self._shares())

    def _shares(self) -> list[Tensor]:
        """This rank's indices in this epoch, batch by batch."""
        place = {"rank": self.runtime.rank, "ranks": self.runtime.world_size}
        how = {"training": self.augment, "limit": self.limit, **place}
        return split_batches(self.order, self.batch_size, **how)[self.first_batch :]


def choose_normalisation(
    typed: Normalisation | None, meta: Mapping[str, Any], usual: Normalisation
) -> tuple[Normalisation, str]:
    """The typed constants, else those of a checkpoint's metadata, else the usual ones.

    Also a line for the log that names them and their source.
    """
    chosen, source = usual, "the usual ones of this data"
    if typed:
        chosen, source = typed, "--mean and --std"
    elif said := meta.get("normalisation"):
        chosen = Normalisation(tuple(said["mean"]), tuple(said["std"]))
        source = "as the checkpoint says"
    return chosen, f"pixels are normalised with {chosen} ({source})"


@dataclass(frozen=True)
class About:
    """What a checkpoint says about the data of its network."""

    dataset: str  # ``cifar10``, ``folder``, ``imagenet``, ...
    classes: Sequence[str]  # names in label order; empty if unknown
    image_size: int  # side in pixels
    normalisation: Normalisation
    resize: int | None = None  # evaluation resizes the shorter side to this before it crops
    interpolation: str | None = None  # the filter of that; see ``Crops``
    source: str | None = None  # where the unpruned weights come from

    def metadata(self) -> dict[str, Any]:
        """The entries of a checkpoint; what is unknown is left out."""
        said = {**vars(self), "classes": list(self.classes)}
        said["normalisation"] = self.normalisation.as_dict()
        return {name: value for name, value in said.items() if value}


@dataclass(frozen=True)
class Data:
    """The batches of a run, and what its checkpoints say about them."""

    train: Batches
    test: Batches
    holdout: Batches | None  # images that are not trained on but choose the best epoch
    about: About

    @property
    def choosing(self) -> Batches:
        """The images on which epochs are compared."""
        return self.test if self.holdout is None else self.holdout

    @property
    def chosen_on(self) -> str:
        return "test" if self.holdout is None else "holdout"


Make = Callable[..., Batches]


@dataclass(frozen=True)
class Split:
    """How much of a data set is used, and for what."""

    holdout: int = 0  # of the training images the last ones, to choose the best epoch on
    limit_train: int | None = None  # batches an epoch
    limit_test: int | None = None  # batches an evaluation

    def data(
        self, train: Sequence, test: Sequence, about: About, training: Make, testing: Make
    ) -> Data:
        """The batches that ``training`` and ``testing`` make of the images.

        Raises InputError where fewer than two images are left to train on.
        """
        rest = len(train) - self.holdout
        if rest < 2:
            few = f"there are only {len(train)} training images"
            raise InputError(f"--holdout {self.holdout}: {few}")
        held = testing(train[rest:], limit=self.limit_test) if self.holdout else None
        trained = training(train[:rest], limit=self.limit_train)
        return Data(trained, testing(test, limit=self.limit_test), held, about)


def random_stream(*key: int) -> torch.Generator:
    """A random generator on the CPU that depends only on its key, e.g. (seed, epoch)."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


def split_batches(
    order: Tensor, batch_size: int, *, training: bool, limit: int | None, rank: int, ranks: int
) -> list[Tensor]:
    """A rank's share of every batch of an epoch: image indices, in the given order.

    ``batch_size`` counts the images of all ranks. In training, each rank gets equally many images
    of a batch, at least two because of BatchNorm; those left over at the end are dropped.
    """
    batches = list(order.split(batch_size))[:limit]
    if training:
        even = len(batches[-1]) // ranks * ranks
        batches[-1] = batches[-1][:even]
        if even < min(2 * ranks, batch_size) and len(batches) > 1:
            batches.pop()
    shares = [batch[rank::ranks] for batch in batches]
    return [share for share in shares if len(share)]


def scoring_indices(n: int, count: int, seed: int | None = None) -> Tensor:
    """Which of n training images score the channels.

    With a seed, ``count`` images at random. Without one, the first ``count`` of the last tenth, in
    file order; where the last tenth is smaller, the last ``count`` images.
    """
    if seed is not None:
        return torch.randperm(n, generator=random_stream(seed, SCORING))[:count]
    start = max(0, min(n - n // 10, n - count))
    return torch.arange(start, min(start + count, n))


def scoring_batch(train: Batches, count: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) and labels (B,) of ``scoring_indices``, augmented as in epoch 0."""
    train.set_epoch(0)
    return train.pick(scoring_indices(train.images, count, seed))
