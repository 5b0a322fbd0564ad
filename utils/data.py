"""Small-image data sets, each held as one uint8 tensor; utils/batches.py makes batches of them."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.hub import download_url_to_file
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from utils.errors import InputError
from utils.synthetic import SYNTHETIC_CLASSES, synthetic_images


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

    On the CPU in memory of numpy's, which asks the system for huge pages: more than half of the
    time that normalising a batch of large images takes would go to page faults.
    """
    if images.device.type != "cpu":
        return images.float()
    return torch.from_numpy(np.empty(images.shape, np.float32)).copy_(images)


@cache  # sending them along with every batch would wait for the device
def _of_bytes(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A value per channel, for pixels in [0, 255]."""
    return torch.tensor(values, device=device).view(3, 1, 1) * 255


CIFAR10_NORMALISATION = Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
NORMALISATIONS = {
    "cifar10": CIFAR10_NORMALISATION,
    "cifar100": Normalisation((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "folder": CIFAR10_NORMALISATION,
    "synthetic": CIFAR10_NORMALISATION,
}
DATASETS = tuple(NORMALISATIONS)
TEST_FOLDERS = ("test", "val")  # either will do


def choose_normalisation(
    typed: Normalisation | None, meta: Mapping[str, Any], usual: Normalisation
) -> tuple[Normalisation, str]:
    """The constants to normalise with, and a line that says which and whence: what was typed, else
    what a checkpoint with this metadata says, else the usual ones of the data.
    """
    said = meta.get("normalisation")
    chosen, whence = usual, "the usual ones of this data"
    if typed:
        chosen, whence = typed, "--mean and --std"
    elif said:
        chosen = Normalisation(tuple(said["mean"]), tuple(said["std"]))
        whence = "as the checkpoint says"
    return chosen, f"pixels are normalised with {chosen} ({whence})"


ImageSamples = list[tuple[str, int]]  # (path, label)


@dataclass(frozen=True)
class ImageSet:
    """Images (N, 3, S, S) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> ImageSet:
        return ImageSet(self.images[part], self.labels[part])


Images = TypeVar("Images", ImageSet, ImageSamples)


@dataclass(frozen=True)
class ImageData:
    """A data set: training and test images, class names in label order, and its normalisation."""

    train: ImageSet
    test: ImageSet
    classes: list[str]
    normalisation: Normalisation

    def metadata(self, dataset: str) -> dict[str, Any]:
        """What a checkpoint says of the data that its network was made for."""
        return {
            "dataset": dataset,
            "classes": self.classes,
            "image_size": self.train.images.shape[-1],
            "normalisation": self.normalisation.as_dict(),
        }

    def normalised(
        self, typed: Normalisation | None, meta: Mapping[str, Any]
    ) -> tuple[ImageData, str]:
        """The same with the constants of ``choose_normalisation``, and its line."""
        chosen, line = choose_normalisation(typed, meta, self.normalisation)
        return replace(self, normalisation=chosen), line


def hold_out(images: Images, count: int) -> tuple[Images, Images | None]:
    """Training images without the last ``count``, and these; None for no images.

    Raises InputError where nothing would be left to train on.
    """
    rest = len(images) - count
    if rest < 2:
        raise InputError(f"--holdout {count}: there are only {len(images)} training images")
    return (images[:rest], images[rest:]) if count else (images, None)


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
        with _readable(Path(data_dir)):
            train, test, classes = _read_cifar(
                {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset], Path(data_dir)
            )
    return ImageData(train, test, classes, NORMALISATIONS[dataset])


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


@contextmanager
def _readable(place: Path) -> Iterator[None]:
    """Turn an OSError, such as a missing permission, into a line that names the folder."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or place}: cannot be read ({error.strerror or error});"
            " check the name and the permissions, or see --data_dir"
        ) from None


def list_folders(
    root: Path, test_names: Sequence[str]
) -> tuple[ImageSamples, ImageSamples, list[str]]:
    """Training and test images of ``root/train`` and ``root/<test name>``, and their classes.

    The training images stand in a fixed shuffled order, whatever the seed of the run: class by
    class, "the last tenth of the training set" would hold a tenth of the classes.

    Raises InputError where a folder is missing or empty, or the two have different classes.
    """
    with _readable(root):
        test_root = next((root / name for name in test_names if (root / name).is_dir()), None)
        has_train = (root / "train").is_dir()
    if not has_train or test_root is None:
        wanted = " or ".join(f"{root / name}/<class>/" for name in test_names)
        missing = wanted if has_train else f"{root}/train/<class>/"
        raise InputError(f"--data_dir {root}: there is no folder {missing} with images")
    train, classes = list_images(root / "train")
    test, test_classes = list_images(test_root)
    if classes != test_classes:
        odd = ", ".join(sorted(set(classes) ^ set(test_classes))[:5])
        raise InputError(f"{root}/train and {test_root} differ in classes; only one has {odd}")
    order = np.random.default_rng(0).permutation(len(train))
    return [train[i] for i in order], test, classes


def class_digest(classes: Sequence[str]) -> str:
    """The number of classes and a hash of their names, in order."""
    names = hashlib.sha256("\n".join(classes).encode()).hexdigest()[:8]
    return f"{len(classes)} ({names})"


def fingerprint(root: Path, *parts: ImageSamples) -> str:
    """The number of images and a hash over their names below ``root`` and, of up to 100,000, their
    sizes: moving the folder changes nothing, another folder of the same classes does.
    """
    paths = sorted(path for part in parts for path, _ in part)
    sized = len(paths) <= 100_000
    digest = hashlib.sha256()
    for path in paths:
        size = os.path.getsize(path) if sized else ""
        digest.update(f"{Path(path).relative_to(root).as_posix()} {size}\n".encode())
    return f"{len(paths)} images ({digest.hexdigest()[:8]})"


def data_identity(dataset: str, data_dir: str, test_names: Sequence[str]) -> dict[str, str]:
    """What tells folders of images apart in a configuration; nothing for data that are always the
    same.
    """
    if dataset not in ("folder", "imagenet"):
        return {}
    train, test, _ = list_folders(Path(data_dir), test_names)
    return {"data": fingerprint(Path(data_dir), train, test)}


def list_images(root: Path) -> tuple[ImageSamples, list[str]]:
    """(path, label) of all images below ``root/<class>/``, sorted, and the class names.

    Raises InputError for fewer than two classes, a class without images, a name that cannot be
    printed, a folder that cannot be read, and a link to a folder that it lies in itself.
    """
    with _readable(root):
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        for name in classes:  # bytes that are not UTF-8, and what would steer a terminal
            if not name.isprintable():
                raise InputError(f"{root}: the class {name!r} cannot be printed; rename the folder")
        if len(classes) < 2:
            found = f"only {classes[0]!r}" if classes else "none"
            raise InputError(
                f"{root} must hold one folder of images per class, of at least two classes; there"
                f" is {found}; add one, or see --data_dir"
            )
        samples = []
        for label, name in enumerate(classes):
            paths = [path for path in _files(root / name) if path.lower().endswith(IMG_EXTENSIONS)]
            if not paths:
                raise InputError(
                    f"{root / name}: there is no image; add some ({', '.join(IMG_EXTENSIONS)}),"
                    " or remove the folder"
                )
            samples += [(path, label) for path in paths]
    return samples, classes


def _files(top: Path) -> list[str]:
    """All files below a folder, through links too, folder by folder in the order of names."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for folder, _, names in os.walk(top, onerror=fail, followlinks=True):
        above = map(os.path.realpath, Path(folder).absolute().parents)
        if os.path.islink(folder) and os.path.realpath(folder) in above:
            raise InputError(f"{folder} is a link to a folder that it lies in; remove the link")
        found.append((folder, sorted(names)))
    return [os.path.join(folder, name) for folder, names in sorted(found) for name in names]


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


def ignore_warnings_of_pillow() -> None:
    """It warns of odd files that it reads all the same.

    To be called once, before any thread reads: filters are the whole process's.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(path: str) -> Image.Image:
    """Decode one image file as 8-bit RGB; InputError with its path where that fails."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, not scale them
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} have no fixed range")
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        advice = "repair it or take it out of the folder"
        raise InputError(f"{path}: cannot be read as an image ({error}); {advice}") from None
