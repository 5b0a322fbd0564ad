"""Large images read from folders while the network computes: the ImageNet input pipeline.

Worker processes decode and augment in uint8; normalisation happens on the device.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional

from utils.data.batches import (
    About,
    Data,
    Normalisation,
    hold_out,
    random_stream,
    split_batches,
)
from utils.data.listing import ImageSamples, ignore_warnings_of_pillow, read_image
from utils.distributed import Runtime
from utils.errors import InputError

IMAGENET_NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Crops:
    """How images become squares of ``size`` pixels.

    For training, a random area is resized and flipped; for evaluation the shorter side is resized
    to ``resize`` and the centre is cut out.
    """

    size: int = 224
    resize: int = 256

    @classmethod
    def for_baseline(cls, size: int, meta: Mapping[str, Any]) -> Crops:
        """What a checkpoint was evaluated with, or in the usual proportion, 256 for 224."""
        if meta.get("image_size") == size and isinstance(meta.get("resize"), int):
            return cls(size, meta["resize"])
        return cls(size, round(size * 256 / 224))

    def training(self) -> Callable[[Image.Image], Tensor]:
        return partial(_random_crop, size=self.size)

    def evaluation(self) -> Callable[[Image.Image], Tensor]:
        resize = transforms.Resize(self.resize, antialias=True)
        steps = [transforms.PILToTensor(), resize, transforms.CenterCrop(self.size)]
        return transforms.Compose(steps)


def _random_crop(image: Image.Image, size: int) -> Tensor:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip, to the pixel.

    Tensors are resized faster than PIL images, but making one is a copy of all its pixels: only
    what is cut out becomes one.
    """
    top, left, height, width = RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3])
    area = image.crop((left, top, left + width, top + height))
    pixels = functional.resize(functional.pil_to_tensor(area), [size, size], antialias=True)
    return functional.horizontal_flip(pixels) if torch.rand(1) < 0.5 else pixels


class FolderImages(Dataset):
    """Images as uint8 (3, S, S) and labels, by (epoch, index).

    With ``augment`` the transform's randomness is a pure function of (seed, epoch, index), whatever
    the number of workers.
    """

    def __init__(self, samples: ImageSamples, transform: Callable, augment: bool, seed: int):
        self.samples, self.transform, self.augment, self.seed = samples, transform, augment, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        path, label = self.samples[index]
        image = read_image(path)
        if not self.augment:
            return self.transform(image), label
        with torch.random.fork_rng([]):
            stream = random_stream(self.seed, epoch, index)
            torch.default_generator.set_state(stream.get_state())
            return self.transform(image), label


class FolderBatches:
    """Batches (``utils.data.batches.Batches``) of images that are read from their files.

    Args:
        samples: (path, label) of every image.
        batch_size: images in a batch of all ranks together; the last may be smaller.
        crops: size of the images.
        runtime: where batches go, and for which rank.
        workers: processes that read and augment; 0 to do so in this one.
        augment: training order and augmentation, or file order and the centre of the image.
        seed: of the random streams.
        limit: at most this many batches an epoch.
        normalisation: applied on the device.
    """

    def __init__(
        self,
        samples: ImageSamples,
        batch_size: int,
        crops: Crops,
        runtime: Runtime,
        *,
        workers: int = 4,
        augment: bool = False,
        seed: int = 0,
        limit: int | None = None,
        normalisation: Normalisation = IMAGENET_NORMALISATION,
    ):
        transform = crops.training() if augment else crops.evaluation()
        self.dataset = FolderImages(samples, transform, augment, seed)
        self.images, self.batch_size = len(samples), batch_size
        self.runtime, self.workers, self.limit = runtime, workers, limit
        self.normalisation = normalisation
        self.set_epoch(0)
        self.loader = self._loader(_Keys(self), persistent=True)

    def close(self) -> None:
        """End the worker processes."""
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()
            self.loader._iterator = None

    def _loader(self, keys: Any, persistent: bool = False) -> DataLoader:
        ignore_warnings_of_pillow()
        # More workers than cores is for whoever sets --workers to judge.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        return DataLoader(
            self.dataset,
            batch_sampler=keys,
            num_workers=self.workers,
            pin_memory=self.runtime.device.type == "cuda",
            prefetch_factor=4 if self.workers else None,
            persistent_workers=persistent and self.workers > 0,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # so that it leaves the global random state alone
        )

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the order and the augmentation of an epoch, and begin it with a later batch."""
        self.epoch, self.first_batch = epoch, first_batch

    def shares(self) -> list[Tensor]:
        """This rank's indices, batch by batch, in this epoch."""
        order = torch.arange(self.images)
        if self.dataset.augment:
            stream = random_stream(self.dataset.seed, self.epoch)
            order = torch.randperm(self.images, generator=stream)
        shares = split_batches(
            order, self.batch_size, training=self.dataset.augment, limit=self.limit,
            rank=self.runtime.rank, ranks=self.runtime.world_size,
        )  # fmt: skip
        return shares[self.first_batch :]

    def __len__(self) -> int:
        return len(self.shares())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._on_device(self.loader)

    def _on_device(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.runtime.device
        try:
            for images, labels in loader:
                images = images.to(device, non_blocking=True)
                yield self.normalisation.apply(images), labels.to(device, non_blocking=True)
        except InputError as error:  # a worker wraps its traceback around the message
            raise InputError(str(error).rpartition("InputError: ")[2]) from None

    def pick(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) and labels (B,) at ``indices``, with this epoch's augmentation."""
        keys = [[(self.epoch, index) for index in part] for part in _parts(indices)]
        images, labels = zip(*self._on_device(self._loader(keys)), strict=True)
        return torch.cat(images), torch.cat(labels)


def _start_worker(worker: int) -> None:
    """Leave the group: Ctrl-C and schedulers signal all of it, and what becomes of it is the main
    process's to say.

    That ends its workers itself, and they end by themselves where it is gone.
    """
    ignore_warnings_of_pillow()  # a worker that is not a fork has its own filters
    if not hasattr(os, "setpgid"):
        return
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Keys:
    """A batch sampler of (epoch, index): the workers cannot know the epoch otherwise."""

    def __init__(self, batches: FolderBatches):
        self.batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.batches.epoch
        return ([(epoch, index) for index in share.tolist()] for share in self.batches.shares())

    def __len__(self) -> int:
        return len(self.batches)


def _parts(indices: Tensor, size: int = 32) -> list[list[int]]:
    """Small portions, so that every worker has something to do."""
    return [part.tolist() for part in indices.split(size)]


@contextmanager
def folder_batches(
    train: ImageSamples,
    val: ImageSamples,
    about: About,
    batch_size: int,
    runtime: Runtime,
    *,
    seed: int,
    workers: int,
    holdout: int = 0,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> Iterator[Data]:
    """The batches of a run; worker processes end with the block."""
    trained, held = hold_out(train, holdout)
    crops = Crops(about.image_size, about.resize)

    def batches(images: ImageSamples | None, limit: int | None) -> FolderBatches | None:
        if not images:
            return None
        augment = images is trained
        return FolderBatches(
            images, batch_size, crops, runtime, workers=workers, augment=augment, seed=seed,
            limit=limit, normalisation=about.normalisation,
        )  # fmt: skip

    parts = ((trained, limit_train), (val, limit_test), (held, limit_test))
    made = [batches(*part) for part in parts]
    try:
        yield Data(*made, about)
    finally:
        for part in filter(None, made):
            part.close()
