"""What training sees of a data set: batches, the images that score channels, and metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from utils.errors import InputError

SCORING = 2**32 - 1  # in the place of an epoch, in the key of a random stream
Sized = TypeVar("Sized", bound=Sequence)


class Batches(Protocol):
    """(normalised images, labels) on the device, epoch after epoch.

    Shapes: (B, 3, S, S) float32 and (B,) int64. Order and augmentation are pure functions of the
    seed, the epoch and the image, so that a run can be continued anywhere.

    Attributes:
        images: how many there are.
    """

    images: int

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose order and augmentation of an epoch, and begin it with a later batch."""

    def pick(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images and labels at these places, with this epoch's augmentation."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


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
        return _floats(images).sub_(mean).div_(std)


def _floats(images: Tensor) -> Tensor:
    """A copy as float32.

    On the CPU in numpy's memory, which asks the system for huge pages: page faults would take more
    than half of the time that it takes to normalise a batch of large images.
    """
    if images.device.type != "cpu":
        return images.float()
    return torch.from_numpy(np.empty(images.shape, np.float32)).copy_(images)


@cache  # to send them with every batch would wait for the device
def _of_bytes(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A value per channel, for pixels in [0, 255]."""
    return torch.tensor(values, device=device).view(3, 1, 1) * 255


def choose_normalisation(
    typed: Normalisation | None, meta: Mapping[str, Any], usual: Normalisation
) -> tuple[Normalisation, str]:
    """The constants to use, and a line for the log that says which they are and whence.

    Typed constants win; next is what the checkpoint with this metadata says; else the usual ones.
    """
    said = meta.get("normalisation")
    chosen, whence = usual, "the usual ones of this data"
    if typed:
        chosen, whence = typed, "--mean and --std"
    elif said:
        chosen = Normalisation(tuple(said["mean"]), tuple(said["std"]))
        whence = "as the checkpoint says"
    return chosen, f"pixels are normalised with {chosen} ({whence})"


@dataclass(frozen=True)
class About:
    """What a checkpoint says of the data that its network was made for.

    Attributes:
        dataset: ``cifar10``, ``folder``, ``imagenet``, ...
        classes: names in label order; empty where nobody knows them.
        image_size: side in pixels.
        normalisation: of the pixels.
        resize: shorter side to which images are resized for evaluation, before the crop.
        source: where the unpruned weights come from.
    """

    dataset: str
    classes: Sequence[str]
    image_size: int
    normalisation: Normalisation
    resize: int | None = None
    source: str | None = None

    def metadata(self) -> dict[str, Any]:
        """As a checkpoint holds it; what is not known is left out."""
        said = {**vars(self), "classes": list(self.classes)}
        said["normalisation"] = self.normalisation.as_dict()
        return {name: value for name, value in said.items() if value or name == "image_size"}


@dataclass(frozen=True)
class Data:
    """The batches of a run.

    Attributes:
        train, test: training images with augmentation, test images without.
        holdout: images kept out of training, which choose the best epoch; None without any.
        about: the data in words.
    """

    train: Batches
    test: Batches
    holdout: Batches | None
    about: About

    @property
    def choosing(self) -> Batches:
        """The images on which epochs are compared."""
        return self.test if self.holdout is None else self.holdout

    @property
    def chosen_on(self) -> str:
        return "test" if self.holdout is None else "holdout"


def random_stream(*key: int) -> torch.Generator:
    """A random generator on the CPU that is a pure function of its key, e.g. (seed, epoch)."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    )


def split_batches(
    order: Tensor, batch_size: int, *, training: bool, limit: int | None, rank: int, ranks: int
) -> list[Tensor]:
    """A rank's share of every batch of an epoch: image indices, in the given order.

    ``batch_size`` counts the images of all ranks together. In training all ranks have equally many
    images of a batch, and at least two (BatchNorm needs two); the few images that remain at the end
    of an epoch are left out.
    """
    batches = list(order.split(batch_size))[:limit]
    if training:
        even = len(batches[-1]) // ranks * ranks
        batches[-1] = batches[-1][:even]
        if even < min(2 * ranks, batch_size) and len(batches) > 1:
            batches.pop()
    shares = [batch[rank::ranks] for batch in batches]
    return [share for share in shares if len(share)]


def hold_out(images: Sized, count: int) -> tuple[Sized, Sized | None]:
    """Training images without the last ``count``, and these; None for no images.

    Raises InputError where nothing would be left to train on.
    """
    rest = len(images) - count
    if rest < 2:
        raise InputError(f"--holdout {count}: there are only {len(images)} training images")
    return (images[:rest], images[rest:]) if count else (images, None)


def scoring_indices(n: int, count: int, seed: int | None = None) -> Tensor:
    """Which of n training images score the channels.

    Without a seed, the first ``count`` of the last tenth, in file order; where the last tenth is
    smaller, the last ``count`` images. With a seed, ``count`` images at random.
    """
    if seed is not None:
        return torch.randperm(n, generator=random_stream(seed, SCORING))[:count]
    start = max(0, min(n - n // 10, n - count))
    return torch.arange(start, min(start + count, n))


def scoring_batch(train: Batches, count: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) and labels (B,) of ``scoring_indices``, with the training augmentation.

    The augmentation is that of the first epoch, whatever has been trained before.
    """
    train.set_epoch(0)
    return train.pick(scoring_indices(train.images, count, seed))
