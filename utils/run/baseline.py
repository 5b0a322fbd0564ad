"""The network to prune: find its file, and check that it fits the data."""

from __future__ import annotations

import os
import re
from pathlib import Path

from models import ALIASES, IMAGENET_NETWORKS, NETWORKS, structure
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.cost import model_cost
from utils.data.batches import About
from utils.errors import InputError


def load_baseline(place: str | Path | None, folder: str, net: str, output: str = "") -> Checkpoint:
    """Load a network in float32 to the CPU.

    ``place`` is its file, or else a folder, by default ``output``: the file is ``model_best.pth``
    in ``place/folder`` or, if there is none, in ``place``.
    """
    path = Path(place or output)
    if not os.path.isfile(path) and (not path.suffix or os.path.isdir(path)):
        choices = [path / folder / "model_best.pth", path / "model_best.pth"]
        path = next(filter(os.path.isfile, choices), choices[0])
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        imagenet = net in IMAGENET_NETWORKS or (net not in NETWORKS and net not in ALIASES)
        maker = "prepare_torch_imagenet_models.py" if imagenet else "train.py"
        advice = f"make one with {maker}, or name another with --checkpoint"
        advice += "" if place else "; without it, the baseline is looked for below --output"
        raise InputError(f"{path}: no such checkpoint; {advice}") from None
    except OSError:
        pass  # load_checkpoint says why it cannot be read
    checkpoint = load_checkpoint(path, net)
    checkpoint.model.float()
    return checkpoint


def check_classes(baseline: Checkpoint, about: About, data: str, advice: str) -> None:
    """Raise InputError unless the network's classes are those of the data, in the same order.

    torchvision's weights name no classes: theirs are in the order of ImageNet's WordNet ids.
    """
    classes, trained = about.classes, structure(baseline.model).num_classes
    if trained != len(classes):
        counts = f"{len(classes)} classes, the checkpoint was trained on {trained}"
        raise InputError(f"{data} has {counts}; {advice}")
    known = baseline.meta.get("classes")
    if known is None and about.dataset == "imagenet" and trained == 1000:
        odd = next((name for name in classes if not re.fullmatch(r"n\d{8}", name)), None)
        if odd:
            raise InputError(f"{data}: {odd!r} is no WordNet id such as n01440764; {advice}")
    for ours, theirs in zip(known or (), classes, strict=False):
        if ours != theirs:
            differs = f"class {theirs!r} where the checkpoint has {ours!r}"
            raise InputError(f"{data} has {differs}; {advice}")


def check_size(baseline: Checkpoint, image_size: int) -> None:
    """Raise InputError for images of another size than the network was trained on."""
    size = baseline.meta.get("image_size", image_size)
    if size != image_size:
        raise InputError(f"--image_size {image_size}: the checkpoint was trained at {size}")
    model_cost(baseline.model, image_size)  # raises an error for images that are too small
