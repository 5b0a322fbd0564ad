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
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import (
    ALIASES,
    IMAGENET_NETWORKS,
    NETWORKS,
    ChannelGroup,
    GatedModel,
    build_model,
    check_network,
    construct,
    structure,
)
from models.groups import Structure
from utils.data.metadata import FORMAT, check_entries, check_format
from utils.errors import InputError
from utils.files import read_tensors, write_atomically
from utils.pruning import PruningPlan
from utils.surgery import prune

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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

    The file is replaced as a whole. With ``previous``, the old file is kept under that name.
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
    """SHA-256 of tensors and plain values, with their types, shapes and order.

    Raises ValueError for any other value.
    """
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, Mapping):
            digest.update(f"mapping {len(value)}".encode())
            for part in itertools.chain.from_iterable(value.items()):
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

    In files of other programs the state dict may be bare, or wrapped in ``net``, ``state_dict`` or
    ``model``. Its names may begin with ``module.``, and gates may be missing. The network and the
    number of classes are inferred from names and shapes. ``net`` is the network or alias that the
    file must hold; None for any. A network ``package.module:factory`` must be named here: no file
    decides which code is imported.

    Raises InputError, with the path, if the file is missing, unsafe to load, damaged, or of another
    network, or if a weight or a running statistic is not finite.
    """
    with _naming(path):
        content = read_tensors(Path(path))
        ours = isinstance(content, Mapping) and "format" in content
        return (_load_ours if ours else _load_foreign)(content, net)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict of any file that ``load_checkpoint`` reads, without wrapper and ``module.``.

    Raises InputError if there is none, and as ``load_checkpoint`` does.
    """
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
    check_format(content)
    body = {key: value for key, value in content.items() if key != "sha256"}
    try:
        if checksum(body) != content.get("sha256"):
            raise ValueError("the checksum does not fit the content")
    except (RuntimeError, ValueError) as error:  # also: endless lists, values that are not plain
        raise InputError(f"damaged, or not made by this project ({error})") from error
    check_entries(content)
    network, state = content["network"], _finite(content["state_dict"])
    name, num_classes = network["net"], network["num_classes"]
    _check_expected(name, net)
    used = ("format", "network", "state_dict", "sha256")
    meta = {key: value for key, value in content.items() if key not in used}
    if "groups" in network:
        return Checkpoint(_rebuild_traced(network, state), meta)
    try:
        check_network(name, list(NETWORKS))
    except ValueError as error:
        raise InputError(str(error)) from error
    found = _count_classes(_skeleton(name, 1), state)
    if num_classes != found:  # checked first: this number decides how much memory is taken
        raise InputError(f"damaged: it says {num_classes} classes, its weights have {found}")
    widths = _skeleton(name, num_classes).group_widths()
    try:
        plan = PruningPlan(dict(network["kept"])).shrinking(widths)
    except ValueError as error:
        raise InputError(f"damaged: {error}") from error
    return Checkpoint(_rebuild(name, num_classes, plan, state), meta)


def _rebuild_traced(network: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """A network without gates: cut as its file says, not as a new trace would."""
    name, num_classes = network["net"], network["num_classes"]
    try:
        with torch.random.fork_rng([]):
            model = construct(name, num_classes)
        groups = tuple(map(ChannelGroup.from_plain, network["groups"]))
        model.structure = Structure(
            num_classes, network["head"], name, groups, tuple(network["notes"])
        )
        prune(model, PruningPlan(dict(network["kept"])))
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise InputError(f"damaged, or of another version of {name} ({error})") from error
    return _fill(model, state)


def _load_foreign(content: Any, net: str | None) -> Checkpoint:
    state = _unwrap(content)
    if net is None or net in NETWORKS or net in ALIASES:
        name, num_classes = infer_network(state)
        _check_expected(name, net)
        missing = _optional(_skeleton(name, num_classes).state_dict())
        model = _rebuild(name, num_classes, PruningPlan({}), {**missing, **state})
    else:
        model = load_traced(net, state)
    said = {"accuracy": content.get("acc"), "epoch": content.get("epoch")}
    meta = {key: value for key, value in said.items() if isinstance(value, (int, float))}
    return Checkpoint(model, meta)


def load_traced(net: str, state: Mapping[str, Tensor], image_size: int = 224) -> nn.Module:
    """A network of torchvision, or of a factory, with the weights ``state``.

    Raises InputError if it cannot be pruned, or for weights of another network.
    """
    try:
        with torch.random.fork_rng([]):
            head = structure(build_model(net, image_size=image_size)).head
            num_classes = len(state[f"{head}.weight"]) if f"{head}.weight" in state else None
            model = build_model(net, num_classes, image_size)
    except ValueError as error:
        raise InputError(str(error)) from error
    return _fill(model, {**_optional(model.state_dict()), **state})


def _rebuild(
    net: str, num_classes: int, plan: PruningPlan, state: Mapping[str, Tensor]
) -> GatedModel:
    """A network cut by ``plan`` with the weights ``state``, in their widest floating-point type.

    Refuses weights that do not fit before the network takes memory.
    """
    _check_fits(prune(_skeleton(net, num_classes), plan), state)
    with torch.random.fork_rng([]):
        model = construct(net, num_classes)
    return _fill(prune(model, plan), state)


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load the weights ``state``, in their widest type; one on the meta device is left out.

    Raises InputError if they do not fit.
    """
    _check_fits(model, state)
    types = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    model.to(reduce(torch.promote_types, types))
    given = OrderedDict((name, tensor) for name, tensor in state.items() if not tensor.is_meta)
    given._metadata = model.state_dict()._metadata  # some layers ask for the version of their names
    model.load_state_dict(given, strict=False)
    return model


def _check_fits(model: GatedModel, state: Mapping[str, Tensor]) -> None:
    """Raise InputError, with the tensor's name, unless ``state`` holds the weights of ``model``."""
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ state.keys()):
        net = structure(model).net
        raise InputError(f"damaged: {name} is missing, or there is no such layer in {net}")
    for name, tensor in state.items():
        fitting = expected[name]
        if tensor.shape != fitting.shape:
            shape = f"{list(tensor.shape)}, not {list(fitting.shape)}"
            raise InputError(f"damaged: {name} is of shape {shape}")
        if tensor.dtype not in (FLOATS if fitting.is_floating_point() else (fitting.dtype,)):
            raise InputError(f"damaged: {name} is of {tensor.dtype}, not like {fitting.dtype}")


def _unwrap(content: Any) -> dict[str, Tensor]:
    parts = content if isinstance(content, Mapping) else {}
    wrapped = (parts.get(name) for name in ("net", "state_dict", "model"))
    state = next((part for part in wrapped if isinstance(part, Mapping)), content)
    return {name.removeprefix("module."): tensor for name, tensor in _finite(state).items()}


def _finite(state: Any) -> Mapping[str, Tensor]:
    """Return ``state``. Raise InputError unless it is a state dict of finite weights."""
    entries = list(state.items()) if isinstance(state, Mapping) else []
    if not entries or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in entries):
        raise InputError("no state dict, neither bare nor in 'net', 'state_dict' or 'model'")
    for name, tensor in entries:
        if tensor.dtype in FLOATS and not tensor.isfinite().all():
            raise InputError(f"{name} is not finite; take a checkpoint from before it diverged")
    return state


def _optional(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gates, and the counters of norms: files of other programs may lack them."""
    return {k: v for k, v in state.items() if k.endswith((".gate", ".num_batches_tracked"))}


def infer_network(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """The name and the number of classes of the unpruned network that a state dict fits.

    Raises InputError, with the most similar network and up to three odd names, if it fits none.
    """
    given = state.keys() - _optional(state).keys()
    pruned, misfits = "", [(len(state) + 1, "")]
    for net in NETWORKS:
        model = _skeleton(net, 1)
        expected = model.state_dict()
        if odd := sorted(given ^ (expected.keys() - _optional(expected).keys())):
            misfits.append((len(odd), f"; {net} comes nearest but for {', '.join(odd[:3])}"))
            continue
        num_classes = _count_classes(model, state)
        expected = _skeleton(net, max(num_classes, 1)).state_dict()
        if all(state[name].shape == expected[name].shape for name in given):
            return net, num_classes
        pruned = net
    if pruned:
        advice = "cannot be rebuilt without its plan; prune the unpruned checkpoint again"
        raise InputError(f"has the layers of {pruned} in other widths: a pruned network {advice}")
    raise InputError(f"its layers are those of no known network{min(misfits)[1]}")


def _skeleton(net: str, num_classes: int) -> GatedModel:
    """A network of names and shapes, without memory for weights."""
    with torch.device("meta"):
        return build_model(net, num_classes)


def _count_classes(model: GatedModel, state: Mapping[str, Tensor]) -> int:
    """The number of outputs of the classifier in ``state``; 0 if there is none."""
    head = state.get(f"{model.head}.weight")
    return 0 if head is None or head.numel() == 0 else (*head.shape, 1)[0]


def _check_expected(found: str, net: str | None) -> None:
    if net is None and ":" in found:
        how = f"name it, with --net {found} or load_model(path, net={found!r})"
        raise InputError(f"holds {found}, code that no file may choose; {how}")
    if net is not None and found != ALIASES.get(net, (net,))[0]:
        advice = f"give --net {found} or another --checkpoint"
        if net in NETWORKS and (found in IMAGENET_NETWORKS) != (net in IMAGENET_NETWORKS):
            advice = f"gfbs_{'imagenet' if found in IMAGENET_NETWORKS else 'cifar'}.py prunes it"
        raise InputError(f"holds {found}, not {net}; {advice}")
