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


def load_baseline(place: str | Path, folder: str, net: str, typed: bool = True) -> Checkpoint:
    """Load a network in float32 to the CPU.

    ``place`` is its file, or else a folder: the file is ``model_best.pth`` in ``place/folder`` or,
    if there is none, in ``place``. Without --checkpoint this is --output; then ``typed`` is False.
    """
    path = Path(place)
    if not os.path.isfile(path) and (not path.suffix or os.path.isdir(path)):
        choices = [path / folder / "model_best.pth", path / "model_best.pth"]
        path = next(filter(os.path.isfile, choices), choices[0])
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        imagenet = net in IMAGENET_NETWORKS or (net not in NETWORKS and net not in ALIASES)
        maker = "prepare_torch_imagenet_models.py" if imagenet else "train.py"
        advice = f"make one with {maker}, or name another with --checkpoint"
        advice += "" if typed else "; without it, the baseline is looked for below --output"
        raise InputError(f"{path}: no such checkpoint; {advice}") from None
    except OSError:
        pass  # load_checkpoint says why it cannot be read
    checkpoint = load_checkpoint(path, net)
    checkpoint.model.float()
    return checkpoint


def check_classes(baseline: Checkpoint, about: About, data: str, advice: str) -> None:
    """Raise InputError unless the network's classes are those of the data, in the same order.

    torchvision's weights name no classes, but have ImageNet's order, which is that of the WordNet
    ids. So folders for them must be named by these ids.
    """
    classes, trained = about.classes, structure(baseline.model).num_classes
    if trained != len(classes):
        raise InputError(
            f"{data} has {len(classes)} classes, the checkpoint was trained on {trained}; {advice}"
        )
    known = baseline.meta.get("classes")
    if known is None and about.dataset == "imagenet" and trained == 1000:
        odd = next((name for name in classes if not re.fullmatch(r"n\d{8}", name)), None)
        if odd:
            raise InputError(f"{data}: {odd!r} is no WordNet id such as n01440764; {advice}")
    for ours, theirs in zip(known or (), classes, strict=False):
        if ours != theirs:
            raise InputError(
                f"{data} has class {theirs!r} where the checkpoint has {ours!r}; {advice}"
            )


def check_size(baseline: Checkpoint, image_size: int) -> None:
    """Raise InputError for images of another size than the network was trained on."""
    size = baseline.meta.get("image_size", image_size)
    if size != image_size:
        raise InputError(f"--image_size {image_size}: the checkpoint was trained at {size}")
    model_cost(baseline.model, image_size)  # raises an error for images that are too small
