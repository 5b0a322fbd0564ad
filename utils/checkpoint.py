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
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from models import ALIASES, NETWORKS, GatedModel, build_model, check_network
from utils.data.metadata import FORMAT, check_entries, check_format
from utils.errors import InputError
from utils.files import write_atomically
from utils.pruning import PruningPlan
from utils.surgery import prune

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    """SHA-256 over tensors and plain values, with their types, shapes and order.

    Raises ValueError for any other value.
    """
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
        elif isinstance(value, (str, int, float, type(None))):
            digest.update(f"{type(value).__name__} {value!r};".encode())
        else:
            raise ValueError(f"a {type(value).__name__} is no plain value")

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

    Raises InputError, naming the file, where it is missing, not safe to load, damaged, of another
    network, or holds a weight or a running statistic that is not finite.
    """
    with _naming(path):
        content = _read(Path(path))
        if isinstance(content, Mapping) and "format" in content:
            return _load_ours(content, net)
        return _load_foreign(content, net)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a file, out of its wrapper and without ``module.``.

    Raises InputError where there is none, and as ``load_checkpoint`` does.
    """
    with _naming(path):
        return _unwrap(_read(Path(path)))


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read(path: Path) -> Any:
    """The content of a file; it takes no more memory than the file has bytes."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError
        with path.open("rb") as file:
            content = _unpickle(file, status.st_size)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError("no such checkpoint") from error
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot be read ({reason})") from error
    _check_sizes(content, status.st_size)
    return content


def _unpickle(file: IO[bytes], size: int) -> Any:
    try:
        if file.read(4) == b"PK\3\4":  # as torch tells its zip files from its old format
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise InputError("damaged: it is compressed, and torch.save compresses nothing")
            if sum(entry.file_size for entry in entries) > size:
                raise InputError("damaged: its parts are larger than the whole file")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (InputError, OSError):
        raise
    except pickle.UnpicklingError as error:
        reason = "it is damaged, or holds other things than tensors and plain values"
        raise InputError(f"cannot be loaded safely: {reason}") from error
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise InputError(f"damaged, or no checkpoint ({type(error).__name__})") from error


def _check_sizes(content: Any, size: int) -> None:
    """Refuse tensors and containers that take more than the ``size`` bytes of their file.

    A few bytes can stand for a tensor that repeats them without end, or for lists that hold each
    other. Tensors that share their storage, such as tied weights, count once.
    """
    entries, found, storages = [("content", content)], 0, {}
    while entries:
        name, value = entries.pop()
        found += 1
        if isinstance(value, Mapping):
            entries += [(key if isinstance(key, str) else name, v) for key, v in value.items()]
            entries += [(name, key) for key in value]
        elif isinstance(value, (list, tuple)):
            entries += [(name, v) for v in value]
        elif isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_nested or value.device.type != "cpu":
                raise InputError(f"damaged: {name!r} is sparse, nested or without values")
            storage = value.untyped_storage()
            if value.numel() * value.element_size() > storage.nbytes():
                raise InputError(f"damaged: {name!r} is larger than what the file holds of it")
            storages[storage.data_ptr()] = storage.nbytes()
        if found > size:
            raise InputError(f"damaged: {name!r} holds more values than the file has bytes")
    if sum(storages.values()) > size:
        raise InputError("damaged: its tensors are larger than the whole file")


def _load_ours(content: Mapping[str, Any], net: str | None) -> Checkpoint:
    check_format(content)
    body = {key: value for key, value in content.items() if key != "sha256"}
    try:
        fits = checksum(body) == content.get("sha256")
    except (RuntimeError, ValueError) as error:  # nested without end, or of an odd type
        raise InputError(f"damaged, or not made by this project ({error})") from error
    if not fits:
        raise InputError("damaged: the checksum does not fit the content")
    check_entries(content)
    network, state = content["network"], _finite(content["state_dict"])
    name, num_classes = network["net"], network["num_classes"]
    _check_expected(name, net)
    try:
        check_network(name, list(NETWORKS))
    except ValueError as error:
        raise InputError(str(error)) from error
    found = _count_classes(_skeleton(name, 1), state)
    if num_classes != found:  # before anything is built
        raise InputError(f"damaged: it says {num_classes} classes, its weights have {found}")
    skeleton = _skeleton(name, num_classes)
    widths = skeleton.group_widths()
    try:
        plan = PruningPlan(dict(network["kept"])).losses(widths)
    except ValueError as error:
        raise InputError(f"damaged: {error}") from error
    _check_fits(prune(skeleton, plan), state)
    model = prune(_build(name, num_classes), plan)
    _load_state(model, state)
    about_itself = ("format", "network", "state_dict")
    return Checkpoint(model, {k: v for k, v in body.items() if k not in about_itself})


def _load_foreign(content: Any, net: str | None) -> Checkpoint:
    state = _unwrap(content)
    found, num_classes = infer_network(state)
    _check_expected(found, net)
    model = _build(found, num_classes)
    state = {**_optional(model.state_dict()), **state}
    _check_fits(model, state)
    _load_state(model, state)
    said = {"accuracy": content.get("acc"), "epoch": content.get("epoch")}
    meta = {name: value for name, value in said.items() if isinstance(value, (int, float))}
    return Checkpoint(model, meta)


def _unwrap(content: Any) -> dict[str, Tensor]:
    state = content
    for wrapper in ("net", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            state = content[wrapper]
            break
    return {name.removeprefix("module."): tensor for name, tensor in _finite(state).items()}


def _finite(state: Any) -> Mapping[str, Tensor]:
    """Raise InputError unless ``state`` is a state dict whose weights are finite."""
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    ):
        raise InputError("no state dict, neither bare nor in 'net', 'state_dict' or 'model'")
    for name, tensor in state.items():
        if tensor.dtype in FLOATS and not tensor.isfinite().all():
            raise InputError(f"{name} is not finite; take a checkpoint from before it diverged")
    return state


def _optional(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What files of others may lack: gates, and a counter that older versions of torch had not."""
    return {k: v for k, v in state.items() if k.endswith((".gate", ".num_batches_tracked"))}


def infer_network(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """Registry name and number of classes of the unpruned network that a state dict fits.

    Raises InputError where none does, with the nearest network and what is odd about the file.
    """
    given = state.keys() - _optional(state).keys()
    pruned, nearest = "", (len(state) + 1, "")
    for net in NETWORKS:
        model = _skeleton(net, 1)
        expected = model.state_dict()
        odd = sorted(given ^ (expected.keys() - _optional(expected).keys()))
        if odd:
            hint = f"; {net} comes nearest but for {', '.join(odd[:3])}"
            nearest = min(nearest, (len(odd), hint))
            continue
        num_classes = _count_classes(model, state)
        expected = _skeleton(net, max(num_classes, 1)).state_dict()
        if all(state[name].shape == expected[name].shape for name in given):
            return net, num_classes
        pruned = net
    if pruned:
        raise InputError(
            f"has the layers of {pruned} in other widths: a pruned network, which cannot be"
            " rebuilt without its plan; prune the unpruned checkpoint again"
        )
    raise InputError(f"its layers are those of no known network{nearest[1]}")


def _skeleton(net: str, num_classes: int) -> GatedModel:
    """A network without memory for its weights: names and shapes alone."""
    with torch.device("meta"):
        return build_model(net, num_classes)


def _count_classes(model: GatedModel, state: Mapping[str, Tensor]) -> int:
    """Outputs of the classifier in ``state``, by ``model``'s name for it; 0 if there is none."""
    head = state.get(f"{model.head}.weight")
    return 0 if head is None or head.numel() == 0 else (*head.shape, 1)[0]


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


def _check_fits(model: GatedModel, state: Mapping[str, Tensor]) -> None:
    """Raise InputError, naming the tensor, unless the weights are those of such a network."""
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ state.keys()):
        raise InputError(f"damaged: {name} is missing, or there is no such layer in {model.net}")
    for name, tensor in state.items():
        fitting = expected[name]
        if tensor.shape != fitting.shape:
            shapes = f"{list(tensor.shape)}, not {list(fitting.shape)}"
            raise InputError(f"damaged: {name} is of shape {shapes}")
        if tensor.dtype not in (FLOATS if fitting.is_floating_point() else (fitting.dtype,)):
            raise InputError(f"damaged: {name} is of {tensor.dtype}, not like {fitting.dtype}")
