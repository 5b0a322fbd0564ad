"""Large images read from folders while the network computes: the ImageNet input pipeline.

Worker processes decode and augment in uint8; normalisation happens on the device. Here and
elsewhere, functions import torchvision and TensorBoard, so that --help does not wait for them.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.data.batches import About, Data, Normalisation, ShuffledBatches, Split, random_stream
from utils.data.listing import ImageSamples, read_image
from utils.distributed import Runtime
from utils.errors import InputError

IMAGENET_NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Crops:
    """How images become uint8 (3, ``size``, ``size``).

    Training resizes a random area and flips it at random. Evaluation resizes the shorter side to
    ``resize`` and cuts out the centre. ``interpolation`` is torchvision's name of the filter.
    """

    size: int = 224
    resize: int = 256
    interpolation: str = "bilinear"

    @classmethod
    def for_baseline(cls, size: int, meta: Mapping[str, Any]) -> Crops:
        """As its checkpoint was evaluated; otherwise in the usual proportion, 256 for 224."""
        known = meta.get("resize") if meta.get("image_size") == size else None
        filter_name = meta.get("interpolation", cls.interpolation)
        return cls(size, known or round(size * 256 / 224), filter_name)

    def _resize(self, pixels: Tensor, size: list[int]) -> Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        how = InterpolationMode(self.interpolation)
        return functional.resize(pixels, size, how, antialias=True)

    def training(self, image: Image.Image) -> Tensor:
        """The same pixels as torchvision's RandomResizedCrop and RandomHorizontalFlip."""
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms.v2 import functional

        # Tensors are resized faster than PIL images, but conversion copies all pixels: crop first.
        top, left, height, width = RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3])
        area = functional.pil_to_tensor(image.crop((left, top, left + width, top + height)))
        pixels = self._resize(area, [self.size, self.size])
        return functional.horizontal_flip(pixels) if torch.rand(1) < 0.5 else pixels

    def evaluation(self, image: Image.Image) -> Tensor:
        from torchvision.transforms.v2 import functional

        pixels = self._resize(functional.pil_to_tensor(image), [self.resize])
        return functional.center_crop(pixels, [self.size])


@dataclass(frozen=True)
class FolderImages(Dataset):
    """What ``transform`` makes of images, and labels, by (epoch, index)."""

    samples: ImageSamples
    transform: Callable[[Image.Image], Any]
    augment: bool = False  # seed the transform by (seed, epoch, index), in any worker
    seed: int = 0

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        epoch, index = key
        path, label = self.samples[index]
        image = read_image(path)
        if not self.augment:
            return self.transform(image), label
        with torch.random.fork_rng([]):
            torch.default_generator.set_state(random_stream(self.seed, epoch, index).get_state())
            return self.transform(image), label

    def __getitems__(self, keys: tuple[int, np.ndarray]) -> list[tuple[Any, int]]:
        """A batch by (epoch, indices): persistent workers do not hear of a new epoch otherwise."""
        epoch, indices = keys
        return [self[epoch, index] for index in indices.tolist()]


def image_loader(images: FolderImages, workers: int, **options: Any) -> DataLoader:
    """A loader for ``read_batches``, with this many processes; with 0, this process reads."""
    import torchvision.transforms.v2  # noqa: F401  (once, before there are worker processes)

    _ignore_warnings()
    return DataLoader(
        images,
        batch_sampler=[],  # ``read_batches`` fills it
        num_workers=workers,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # leaves the global random state alone
        **options,
    )


def read_batches(loader: DataLoader, epoch: int, parts: Iterable[Tensor]) -> Iterator[Any]:
    """A batch for the indices of every part. InputError for an image that cannot be read."""
    loader.batch_sampler[:] = [(epoch, indices.numpy()) for indices in parts]
    try:
        yield from loader
    except InputError as error:  # a worker puts its traceback in front of the message
        raise InputError(str(error).rpartition("InputError: ")[2]) from None


def _start_worker(worker: int) -> None:
    """Leave the process group, because Ctrl-C and schedulers signal all of it.

    Only the main process reacts to signals. It ends its workers, and they end if it is gone.
    """
    _ignore_warnings()  # a worker that is not a fork has its own filters
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _ignore_warnings() -> None:
    """Pillow warns about files that it reads, torch about more workers than there are cores.

    Filters are process-wide: call this before threads run.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", "This DataLoader will create")


@dataclass(eq=False)
class FolderBatches(ShuffledBatches):
    """Batches of images that are read from their files."""

    source: ImageSamples
    crops: Crops
    runtime: Runtime
    _: KW_ONLY
    workers: int = 4  # processes that read and augment; with 0, this process does
    normalisation: Normalisation = IMAGENET_NORMALISATION

    def __post_init__(self):
        transform = self.crops.training if self.augment else self.crops.evaluation
        images = FolderImages(self.source, transform, self.augment, self.seed)
        options = {"prefetch_factor": 4, "persistent_workers": True} if self.workers else {}
        on_gpu = self.runtime.device.type == "cuda"
        self.loader = image_loader(images, self.workers, pin_memory=on_gpu, **options)
        self.set_epoch(0)

    def close(self) -> None:
        """End the worker processes."""
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()
            self.loader._iterator = None

    def _read(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.runtime.device
        for images, labels in read_batches(self.loader, self.epoch, parts):
            images = images.to(device, non_blocking=True)
            yield self.normalisation.apply(images), labels.to(device, non_blocking=True)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._read(self._shares())

    def pick(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        parts = indices.split(32)  # so that every worker has something to do
        images, labels = zip(*self._read(parts), strict=True)
        return torch.cat(images), torch.cat(labels)


@contextmanager
def folder_batches(
    train: ImageSamples, val: ImageSamples, about: About, split: Split, **options: Any
) -> Iterator[Data]:
    """The batches of a run; worker processes end with the block.

    ``options`` are fields of ``FolderBatches``: batch_size, runtime, seed, workers.
    """
    how = about.interpolation or Crops.interpolation
    options |= {"crops": Crops(about.image_size, about.resize, how)}
    make = partial(FolderBatches, normalisation=about.normalisation, **options)
    data = split.data(train, val, about, partial(make, augment=True), make)
    try:
        yield data
    finally:
        for part in filter(None, (data.train, data.test, data.holdout)):
            part.close()
