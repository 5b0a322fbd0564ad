"""Images in class folders: their names, their classes and their pixels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import InputError

ImageSamples = list[tuple[str, int]]  # (path, label)


@contextmanager
def readable(place: Path) -> Iterator[None]:
    """Turn an OSError, such as a missing permission, into an InputError that names the place."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or place}: cannot be read ({error.strerror or error})"
        raise InputError(f"{what}; check name and permissions, or see --data_dir") from None


def list_folders(
    root: Path, test_names: Sequence[str]
) -> tuple[ImageSamples, ImageSamples, list[str]]:
    """Training and test images of ``root/train`` and ``root/<test name>``, and their classes.

    Training images are shuffled in the same way for every seed of the run. Otherwise the last tenth
    of the training set, which scores, would hold only a tenth of the classes.

    Raises InputError if a folder is missing or empty, or if the two have different classes.
    """
    with readable(root):
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


def folder_identity(data_dir: str | Path, test_names: Sequence[str]) -> dict[str, str]:
    """What tells folders of images apart in a configuration, wherever they lie.

    The number of images, and a hash of their names and, of up to 100,000 images, their sizes.
    """
    train, test, _ = list_folders(Path(data_dir), test_names)
    paths = sorted(path for path, _ in train + test)
    digest = hashlib.sha256()
    for path in paths:
        size = os.path.getsize(path) if len(paths) <= 100_000 else ""
        digest.update(os.fsencode(f"{Path(path).relative_to(data_dir).as_posix()} {size}\n"))
    return {"data": f"{len(paths)} images ({digest.hexdigest()[:8]})"}


def list_images(root: Path) -> tuple[ImageSamples, list[str]]:
    """(path, label) of all images below ``root/<class>/``, sorted, and the class names.

    Raises InputError for fewer than two classes, a class without images, a name that cannot be
    printed, a folder that cannot be read, and a link to a folder above it.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    with readable(root):
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if len(classes) < 2:
            found = f"only {classes[0]!r}" if classes else "none"
            rule = "must hold one folder of images per class, of at least two classes"
            raise InputError(f"{root} {rule}; there is {found}; add one, or see --data_dir")
        samples = []
        for label, name in enumerate(classes):
            if not name.isprintable():  # not UTF-8, or control characters, which a terminal obeys
                raise InputError(f"{root}: the class {name!r} cannot be printed; rename the folder")
            paths = [path for path in _files(root / name) if path.lower().endswith(IMG_EXTENSIONS)]
            if not paths:
                advice = f"add some ({', '.join(IMG_EXTENSIONS)}), or remove the folder"
                raise InputError(f"{root / name}: there is no image; {advice}")
            samples += [(path, label) for path in paths]
    return samples, classes


def _files(top: Path) -> list[str]:
    """All files below a folder, also through links, sorted by folder and then by name."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for folder, _, names in os.walk(top, onerror=fail, followlinks=True):
        above = map(os.path.realpath, Path(folder).absolute().parents)
        if os.path.islink(folder) and os.path.realpath(folder) in above:
            raise InputError(f"{folder} is a link to a folder that it lies in; remove the link")
        found.append((folder, sorted(names)))
    return [os.path.join(folder, name) for folder, names in sorted(found) for name in names]


def read_image(path: str) -> Image.Image:
    """Decode one image file as 8-bit RGB; InputError with its path if that fails."""
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
