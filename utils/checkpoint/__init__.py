"""Checkpoints that rebuild their own network; and files of other programs.

A checkpoint of ours is a dict of plain values and tensors, which ``torch.load`` reads with
``weights_only=True``:

    format      "gfbs/1"
    network     net, num_classes, kept: with these, ``construct`` and ``prune`` rebuild the shapes;
                of a traced network also head, groups, notes, so that it is not traced again
    state_dict  the weights, with the names of the unpruned network and no prefix of a wrapper
    sha256      checksum of all other entries, because torch does not notice a flipped bit
    ...         metadata: dataset, classes, normalisation, image_size, accuracy, epoch, ...
    training    only in last.pth: optimiser, schedule and more, to resume the run
"""

import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import ALIASES, IMAGENET_NETWORKS, NETWORKS, GatedModel, check_network, structure
from utils.checkpoint.rebuild import finite, infer_network, load_traced, rebuild, rebuild_traced
from utils.errors import InputError
from utils.files import read_tensors, write_atomically

FORMAT = "gfbs/1"


@dataclass(frozen=True)
class Checkpoint:
    """A network, and the metadata of its file."""

    model: GatedModel
    meta: dict[str, Any]

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that identify the weights."""
        return checksum(self.model.state_dict())[:12]


def save_checkpoint(
    path: str | Path, model: GatedModel, *, previous: str | Path | None = None, **meta: Any
) -> None:
    """Write an unwrapped ``model``, and ``meta``: plain values and tensors.

    With ``previous``, the old file is kept under that name.
    """
    known = structure(model)
    network = {"net": known.net, "num_classes": known.num_classes, "kept": known.kept}
    if not isinstance(model, GatedModel):
        groups = [group.as_plain() for group in known.groups]
        network |= {"head": known.head, "notes": known.notes, "groups": groups}
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    content = {"format": FORMAT, "network": network, "state_dict": state, **meta}
    content["sha256"] = checksum(content)
    file = io.BytesIO()  # write the file ourselves: torch turns a full disk into a RuntimeError
    torch.save(content, file)
    write_atomically(path, lambda target: target.write(file.getbuffer()), previous=previous)


def checksum(content: Any) -> str:
    """SHA-256 of tensors and plain values, with their types, shapes and order; else ValueError."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, Mapping):
            digest.update(f"mapping {len(value)}".encode())
            for key, part in value.items():
                feed(key)
                feed(part)
        elif isinstance(value, (list, tuple)):
            digest.update(f"sequence {len(value)}".encode())
            for entry in value:
                feed(entry)
        elif isinstance(value, (str, int, float, type(None))):
            digest.update(f"{type(value).__name__} {value!r};".encode())
        else:
            raise ValueError(f"a {type(value).__name__} is no plain value")

    feed(content)
    return digest.hexdigest()


def load_model(path: str | Path, net: str | None = None) -> nn.Module:
    """The network of a checkpoint, on the CPU; see ``load_checkpoint``."""
    return load_checkpoint(path, net).model


def load_checkpoint(path: str | Path, net: str | None = None) -> Checkpoint:
    """Read a checkpoint of ours, one of the published code, or a plain state dict, to the CPU.

    ``net`` is the network or alias that the file must hold; None for any. A network
    ``package.module:factory`` must be named here: no file decides which code is imported.

    In files of other programs the state dict may be bare, or wrapped in ``net``, ``state_dict`` or
    ``model``. Its names may begin with ``module.``, and gates may be missing. The network and the
    number of classes are inferred from names and shapes.

    Raises InputError, with the path, if the file is missing, unsafe to load, damaged, or of another
    network, or if a weight or a running statistic is not finite.
    """
    with _naming(path):
        content = read_tensors(Path(path))
        ours = isinstance(content, Mapping) and "format" in content
        return (_load_ours if ours else _load_foreign)(content, net)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict of any file that ``load_checkpoint`` reads, without ``module.`` in names."""
    with _naming(path):
        return _unwrap(read_tensors(Path(path)))


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Put the path in front of the message of every InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _load_ours(content: Mapping[str, Any], net: str | None) -> Checkpoint:
    _check(content, ["format"])
    if content["format"] != FORMAT:
        raise InputError(f"of format {content['format']!r}; this version reads {FORMAT!r}")
    body = {key: value for key, value in content.items() if key != "sha256"}
    try:
        if checksum(body) != content.get("sha256"):
            raise ValueError("the checksum does not fit the content")
    except (RuntimeError, ValueError) as error:  # also: endless lists, values that are not plain
        raise InputError(f"damaged, or not made by this project ({error})") from error
    _check(content, ["network", "state_dict", *(name for name in content if name in ENTRIES)])
    network, state = content["network"], finite(content["state_dict"])
    _check(network, ["net", "num_classes", "kept"])
    name = network["net"]
    _check_expected(name, net)
    used = ("format", "network", "state_dict", "sha256")
    meta = {key: value for key, value in content.items() if key not in used}
    if "groups" in network:
        return Checkpoint(rebuild_traced(network, state), meta)
    try:
        check_network(name, list(NETWORKS))
    except ValueError as error:
        raise InputError(str(error)) from error
    return Checkpoint(rebuild(name, network["num_classes"], network["kept"], state), meta)


def _load_foreign(content: Any, net: str | None) -> Checkpoint:
    state = _unwrap(content)
    if net is None or net in NETWORKS or net in ALIASES:
        name, num_classes = infer_network(state)
        _check_expected(name, net)
        model = rebuild(name, num_classes, {}, state, foreign=True)
    else:
        model = load_traced(net, state)
    said = {"accuracy": content.get("acc"), "epoch": content.get("epoch")}
    meta = {key: value for key, value in said.items() if isinstance(value, (int, float))}
    return Checkpoint(model, meta)


def _unwrap(content: Any) -> dict[str, Tensor]:
    parts = content if isinstance(content, Mapping) else {}
    wrapped = (parts.get(name) for name in ("net", "state_dict", "model"))
    state = next((part for part in wrapped if isinstance(part, Mapping)), content)
    return {name.removeprefix("module."): tensor for name, tensor in finite(state).items()}


def _check_expected(found: str, net: str | None) -> None:
    if net is None and ":" in found:
        how = f"name it, with --net {found} or load_model(path, net={found!r})"
        raise InputError(f"holds {found}, code that no file may choose; {how}")
    if net is not None and found != ALIASES.get(net, (net,))[0]:
        advice = f"give --net {found} or another --checkpoint"
        if net in NETWORKS and (found in IMAGENET_NETWORKS) != (net in IMAGENET_NETWORKS):
            advice = f"gfbs_{'imagenet' if found in IMAGENET_NETWORKS else 'cifar'}.py prunes it"
        raise InputError(f"holds {found}, not {net}; {advice}")


# What an entry of ours must be. Those of the metadata may be missing.


def _check(entries: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise InputError with the name of the first of these entries that is not of its kind."""
    for name in names:
        kind, fits = ENTRIES[name]
        if not fits(entries.get(name)):
            raise InputError(f"damaged: {name!r} is not {kind}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_text, value))


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < sys.float_info.max


def _is_normalisation(value: Any) -> bool:
    match value:
        case {"mean": [_, _, _] as mean, "std": [_, _, _] as std}:
            return all(map(_is_finite, [*mean, *std])) and min(std) > 0
    return False


def _is_config(value: Any) -> bool:
    try:
        json.dumps(value)  # a result.json will hold it
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(value, Mapping) and _is_whole(value.get("holdout", 0), 0)


TEXT = "text", _is_text
MAPPING = "a mapping", lambda value: isinstance(value, Mapping)
COUNT = "a whole number of at least 1", lambda value: _is_whole(value, 1)
FILTERS = ("nearest", "nearest-exact", "bilinear", "bicubic")
ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("format", "net", "dataset", "tested_on", "chosen"), TEXT),
    **dict.fromkeys(("network", "state_dict", "kept", "training"), MAPPING),
    **dict.fromkeys(("num_classes", "image_size", "resize"), COUNT),
    "interpolation": ("the name of a filter", lambda value: value in FILTERS),
    "epoch": ("a whole number of at least 0", lambda value: _is_whole(value, 0)),
    "source": ("text or None", lambda value: value is None or _is_text(value)),
    "accuracy": ("a finite number or None", lambda value: value is None or _is_finite(value)),
    "classes": ("a list of names", _are_names),
    "normalisation": ("mean and std of 3 finite numbers, std above 0", _is_normalisation),
    "config": ("a mapping of plain values", _is_config),
}
