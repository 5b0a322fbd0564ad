"""Checkpoints that rebuild their own network, and the loading of everyone else's.

A checkpoint of ours is a dict of plain values and tensors, read with ``weights_only=True``:

    format      "gfbs/1"
    network     net, num_classes, kept: what ``build_model`` and ``prune`` need to rebuild the shape
    state_dict  the weights, under the names of the unpruned network, without any wrapper's prefix
    sha256      a checksum over everything else: torch's format does not notice a flipped bit
    ...         metadata: dataset, classes, normalisation, image_size, accuracy, epoch, ...
    training    only in last.pth: optimiser and schedule, to resume from
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import ALIASES, NETWORKS, GatedModel, build_model, check_network
from utils.errors import InputError
from utils.files import write_atomically
from utils.pruning import PruningPlan
from utils.surgery import prune

FORMAT = "gfbs/1"


@dataclass(frozen=True)
class Checkpoint:
    """A network and whatever else its file says."""

    model: GatedModel
    meta: dict[str, Any]

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that tell one set of weights from another."""
        return checksum(self.model.state_dict())[:12]


def save_checkpoint(
    path: str | Path, model: GatedModel, *, previous: str | Path | None = None, **meta: Any
) -> None:
    """Write a checkpoint of the bare ``model``; ``meta`` holds plain values and tensors.

    With ``previous``, the file that was there goes on under that name.
    """
    network = {"net": model.net, "num_classes": model.num_classes, "kept": model.kept}
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    content = {"format": FORMAT, "network": network, "state_dict": state, **meta}
    content["sha256"] = checksum(content)
    file = io.BytesIO()  # so that trouble with the disk is an OSError, and not torch's to word
    torch.save(content, file)
    write_atomically(path, lambda target: target.write(file.getbuffer()), previous=previous)


def checksum(content: Any) -> str:
    """SHA-256 over tensors and plain values, with their types, shapes and order."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, Mapping):
            digest.update(f"mapping {len(value)}".encode())
            for key, entry in value.items():
                feed(key)
                feed(entry)
        elif isinstance(value, (list, tuple)):
            digest.update(f"sequence {len(value)}".encode())
            for entry in value:
                feed(entry)
        else:
            digest.update(f"{type(value).__name__} {value!r};".encode())

    feed(content)
    return digest.hexdigest()


def load_model(path: str | Path) -> GatedModel:
    """The network of a checkpoint, on the CPU; see ``load_checkpoint``."""
    return load_checkpoint(path).model


def load_checkpoint(path: str | Path, net: str | None = None) -> Checkpoint:
    """Read a checkpoint of ours, or of the published code, or a plain state dict; the network is on
    the CPU.

    Files of others may be wrapped in ``net``, ``state_dict`` or ``model``, carry the prefix
    ``module.`` and lack gates. Network and number of classes are inferred from their keys and
    shapes.

    Args:
        path: the file.
        net: the network that is expected, if any; an alias counts as its network.

    Raises InputError, naming the file, where it is missing, not safe to load, damaged, or of
    another network.
    """
    path = Path(path)
    content = _read(path)
    try:
        if isinstance(content, Mapping) and "format" in content:
            return _load_ours(content, net)
        return _load_foreign(content, net)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        kind = type(error).__name__
        raise InputError(
            f"{path}: damaged, or not made by this project ({kind}: {error})"
        ) from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a file, out of its wrapper and without ``module.``; InputError if none."""
    content = _read(Path(path))
    try:
        return _unwrap(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it is damaged, or holds other things than tensors and plain values"
        raise InputError(f"{path}: cannot be loaded safely: {reason}") from error
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise InputError(f"{path}: damaged, or no checkpoint ({type(error).__name__})") from error


def _load_ours(content: Mapping[str, Any], net: str | None) -> Checkpoint:
    if content["format"] != FORMAT:
        raise InputError(f"of format {content['format']!r}; this version reads {FORMAT!r}")
    body = {key: value for key, value in content.items() if key != "sha256"}
    if checksum(body) != content["sha256"]:
        raise InputError("damaged: the checksum does not fit the content")
    network = content["network"]
    _check_expected(network["net"], net)
    head = f"{NETWORKS[check_network(network['net'], list(NETWORKS))].func.head}.bias"
    if network["num_classes"] != len(content["state_dict"][head]):  # before anything is built
        raise InputError(f"damaged: {network['num_classes']} classes do not fit {head}")
    model = _build(network["net"], network["num_classes"])
    prune(model, PruningPlan(network["kept"]))
    _load_state(model, content["state_dict"])
    about_itself = ("format", "network", "state_dict")
    return Checkpoint(model, {k: v for k, v in body.items() if k not in about_itself})


def _load_foreign(content: Any, net: str | None) -> Checkpoint:
    state = _unwrap(content)
    found, num_classes = infer_network(state)
    _check_expected(found, net)
    model = _build(found, num_classes)
    _load_state(model, {**_optional(model.state_dict()), **state})
    said = {"accuracy": content.get("acc"), "epoch": content.get("epoch")}
    meta = {name: value for name, value in said.items() if isinstance(value, (int, float))}
    return Checkpoint(model, meta)


def _unwrap(content: Any) -> dict[str, Tensor]:
    state = content
    for wrapper in ("net", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            state = content[wrapper]
            break
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    ):
        raise InputError("no state dict, neither bare nor in 'net', 'state_dict' or 'model'")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _optional(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What files of others may lack: gates, and a counter that older versions of torch had not."""
    return {k: v for k, v in state.items() if k.endswith((".gate", ".num_batches_tracked"))}


def infer_network(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """Registry name and number of classes of the unpruned network that a state dict fits.

    Raises InputError where none does, with the nearest network and what is odd about the file.
    """
    given = state.keys() - _optional(state).keys()
    nearest: tuple[int, str] = (len(state) + 1, "")
    for net, factory in NETWORKS.items():
        head = state.get(f"{factory.func.head}.weight")
        if head is None or head.dim() != 2:
            continue
        with torch.device("meta"):
            expected = build_model(net, len(head)).state_dict()
        odd = sorted(given ^ (expected.keys() - _optional(expected).keys()))
        if not odd and all(state[name].shape == expected[name].shape for name in given):
            return net, len(head)
        if not odd:
            raise InputError(
                f"has the layers of {net} in other widths: a pruned network, which cannot be"
                " rebuilt without its plan; prune the unpruned checkpoint again"
            )
        nearest = min(nearest, (len(odd), f"; {net} comes nearest but for {', '.join(odd[:3])}"))
    raise InputError(f"its layers are those of no known network{nearest[1]}")


def _check_expected(found: str, net: str | None) -> None:
    if net is not None and found != ALIASES.get(net, (net,))[0]:
        advice = f"give --net {found} or another --checkpoint"
        imagenet = found.startswith("resnet")
        if imagenet != net.startswith("resnet"):
            advice = f"gfbs_{'imagenet' if imagenet else 'cifar'}.py prunes it"
        raise InputError(f"holds {found}, not {net}; {advice}")


def _build(net: str, num_classes: int) -> GatedModel:
    """Build without touching the caller's random state."""
    with torch.random.fork_rng([]):
        return build_model(net, num_classes)


def _load_state(model: GatedModel, state: Mapping[str, Tensor]) -> None:
    """Load strictly, in the widest floating-point type of the file."""
    types = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    model.to(reduce(torch.promote_types, types, torch.float16 if types else torch.float32))
    model.load_state_dict(state, strict=True)
