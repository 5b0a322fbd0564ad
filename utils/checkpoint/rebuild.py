"""Networks from their weights: by name, or by what the weights look like."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from models import NETWORKS, ChannelGroup, GatedModel, build_model, construct, structure
from models.groups import Structure
from utils.errors import InputError
from utils.pruning import PruningPlan
from utils.surgery import prune

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rebuild(
    net: str,
    num_classes: int,
    kept: Mapping[str, list[int]],
    state: Mapping[str, Tensor],
    foreign: bool = False,
) -> nn.Module:
    """A network of ours, cut as ``kept`` says, with the weights ``state``.

    A ``foreign`` state may lack what is ``optional``. Raises InputError before the network takes
    memory if the weights do not fit.
    """
    found = count_classes(skeleton(net, 1), state)
    if num_classes != found:  # checked first: this number decides how much memory is taken
        raise InputError(f"damaged: it says {num_classes} classes, its weights have {found}")
    shapes = skeleton(net, num_classes)
    if foreign:
        state = {**optional(shapes.state_dict()), **state}
    try:
        plan = PruningPlan(dict(kept)).shrinking(shapes.group_widths())
    except ValueError as error:
        raise InputError(f"damaged: {error}") from error
    with torch.random.fork_rng([]):
        model = construct(net, num_classes)
    check_fits(prune(shapes, plan), state)
    return fill(prune(model, plan), state)


def rebuild_traced(network: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
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
    return fill(model, state)


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
    return fill(model, {**optional(model.state_dict()), **state})


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load the weights ``state``, in their widest type; one on the meta device is left out.

    Raises InputError if they do not fit.
    """
    check_fits(model, state)
    types = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    model.to(reduce(torch.promote_types, types))
    filled = model.state_dict()  # knows the versions that some layers ask for
    filled.update({name: tensor for name, tensor in state.items() if not tensor.is_meta})
    model.load_state_dict(filled)
    return model


def check_fits(model: GatedModel, state: Mapping[str, Tensor]) -> None:
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


def finite(state: Any) -> Mapping[str, Tensor]:
    """Return ``state``. Raise InputError unless it is a state dict of finite weights."""
    entries = list(state.items()) if isinstance(state, Mapping) else []
    if not entries or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in entries):
        raise InputError("no state dict, neither bare nor in 'net', 'state_dict' or 'model'")
    for name, tensor in entries:
        if tensor.dtype in FLOATS and not tensor.isfinite().all():
            raise InputError(f"{name} is not finite; take a checkpoint from before it diverged")
    return state


def optional(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gates, and the counters of norms: files of other programs may lack them."""
    return {k: v for k, v in state.items() if k.endswith((".gate", ".num_batches_tracked"))}


def infer_network(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """The name and the number of classes of the unpruned network that a state dict fits.

    Raises InputError, with the most similar network and up to three odd names, if it fits none.
    """
    given = state.keys() - optional(state).keys()
    pruned, misfits = "", [(len(state) + 1, "")]
    for net in NETWORKS:
        model = skeleton(net, 1)
        expected = model.state_dict()
        if odd := sorted(given ^ (expected.keys() - optional(expected).keys())):
            misfits.append((len(odd), f"; {net} comes nearest but for {', '.join(odd[:3])}"))
            continue
        num_classes = count_classes(model, state)
        expected = skeleton(net, max(num_classes, 1)).state_dict()
        if all(state[name].shape == expected[name].shape for name in given):
            return net, num_classes
        pruned = net
    if pruned:
        advice = "cannot be rebuilt without its plan; prune the unpruned checkpoint again"
        raise InputError(f"has the layers of {pruned} in other widths: a pruned network {advice}")
    raise InputError(f"its layers are those of no known network{min(misfits)[1]}")


def skeleton(net: str, num_classes: int) -> GatedModel:
    """A network of names and shapes, without memory for weights."""
    with torch.device("meta"):
        return build_model(net, num_classes)


def count_classes(model: GatedModel, state: Mapping[str, Tensor]) -> int:
    """The number of outputs of the classifier in ``state``; 0 if there is none."""
    head = state.get(f"{model.head}.weight")
    return len(head) if head is not None and head.dim() and head.numel() else 0
