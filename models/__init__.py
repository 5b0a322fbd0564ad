"""Networks, by name."""
# ruff: noqa: F401  (some imports are for those who import from here)

import difflib
import importlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from models import trace as tracing
from models.densenet import GateDenseNet
from models.gate import Gate
from models.gated import GatedModel, checkpoint_blocks, pruning_stages
from models.groups import ChannelGroup, Structure, replace_head, reset_parameters, structure
from models.mobilenetv2 import GateMobileNetV2
from models.resnet_cifar import GateResNetCifar
from models.resnet_imagenet import ResNetImageNet
from models.trace import channel_groups, group_widths
from models.vgg import GateVGG

# Name -> callable that takes num_classes and returns a GatedModel. A new network is one more line.
NETWORKS: dict[str, Callable[..., GatedModel]] = {
    **{f"gatevgg{depth}": partial(GateVGG, depth) for depth in (11, 13, 16, 19)},
    **{f"gateresnet{depth}": partial(GateResNetCifar, depth) for depth in (20, 32, 44, 56, 110)},
    "gatemobilenetv2": GateMobileNetV2,
    "gatedensenet40": partial(GateDenseNet, 40),
    "gatedensenet100_bc": partial(GateDenseNet, 100, bc=True),
    **{f"resnet{depth}": partial(ResNetImageNet, depth) for depth in (18, 34, 50, 101, 152)},
}

IMAGENET_NETWORKS = tuple(net for net in NETWORKS if net.startswith("resnet"))

# The names that the published code gives to two networks with 100 classes.
ALIASES = {"gateresnet32_c100": ("gateresnet32", 100), "gateresnet56_c100": ("gateresnet56", 100)}


def torchvision_networks() -> list[str]:
    """The names of torchvision's classifiers."""
    import torchvision.models  # here, because it takes seconds

    return torchvision.models.list_models(module=torchvision.models)


def from_torchvision(net: str, **options: Any) -> nn.Module:
    """A classifier of torchvision with fresh weights, without auxiliary classifiers."""
    import torchvision.models

    if net in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    return torchvision.models.get_model(net, weights=None, **options)


def check_network(net: str, known: Sequence[str] | None = None) -> str:
    """Return ``net`` if it is in ``known`` (default: all our names), torchvision's, or a factory.

    Raises ValueError, with the most similar names, for any other.
    """
    known = [*NETWORKS, *ALIASES] if known is None else known
    if net in known or ":" in net:
        return net
    theirs = torchvision_networks()
    if net in theirs and net not in NETWORKS and net not in ALIASES:
        return net
    near = difflib.get_close_matches(net, [*known, *theirs], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    raise ValueError(f"unknown network {net!r}; {hint}")


def construct(net: str, num_classes: int | None = None) -> nn.Module:
    """``build_model`` without the trace: a network without gates has no channel groups yet."""
    name, fixed = ALIASES.get(check_network(net), (net, num_classes))
    if num_classes not in (None, fixed):
        raise ValueError(f"{net} has {fixed} classes, not {num_classes}; {name} takes any number")
    options = {} if fixed is None else {"num_classes": fixed}
    if name not in NETWORKS:
        return _factory(name)(**options) if ":" in name else from_torchvision(name, **options)
    model = NETWORKS[name](**options)
    kind = type(model).__name__
    if not isinstance(model, GatedModel):
        raise TypeError(f"network {name!r} is a {kind}, not a GatedModel")
    if not model.head or model.head not in dict(model.named_modules()):
        raise TypeError(f"{kind}.head must name its classifier; no layer is {model.head!r}")
    known, read = model.structure, _read(NETWORKS[name])
    known.net, known.head, known.groups, known.notes = name, model.head, read.groups, read.notes
    return model


@cache
def _read(network: Callable[..., GatedModel]) -> Structure:
    """The channel groups of a network of ours, and notes. They do not depend on num_classes."""
    with torch.device("meta"):
        model = network(num_classes=1)
    with torch.device("cpu"):  # also where the caller has chosen another
        return tracing.read_groups(model)


def _factory(name: str) -> Callable[..., nn.Module]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"network {name!r}: {error}; is it on PYTHONPATH?") from error


def build_model(net: str, num_classes: int | None = None, image_size: int = 224) -> nn.Module:
    """A network with fresh weights, whose channel groups are known.

    Args:
        net: a name of ``NETWORKS`` or ``ALIASES``; a classifier of torchvision that has BatchNorm;
            or ``package.module:factory``, where ``factory(num_classes=...)`` returns a network.
        num_classes: default: 100 for an alias, else what the network has.
        image_size: side of the images that a network without gates is traced with.

    Raises ValueError if the name is unknown, if an alias gets another number than 100, or if the
    network cannot be pruned; TypeError if a gated network breaks the contract of ``GatedModel``.
    """
    model = construct(net, num_classes)
    if isinstance(model, GatedModel):
        return model
    return tracing.trace(model, torch.empty(1, 3, image_size, image_size), net)
