"""The gated networks, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial

from models.densenet import GateDenseNet
from models.gate import Gate
from models.groups import ChannelGroup, GatedModel
from models.mobilenetv2 import GateMobileNetV2
from models.resnet_cifar import GateResNetCifar
from models.resnet_imagenet import ResNetImageNet
from models.vgg import GateVGG

__all__ = ["ChannelGroup", "Gate", "GatedModel", "NETWORKS", "build_model", "check_network"]

# Name -> constructor that takes num_classes. A new network is one more line here.
NETWORKS: dict[str, Callable[..., GatedModel]] = {
    **{f"gatevgg{depth}": partial(GateVGG, depth) for depth in (11, 13, 16, 19)},
    **{f"gateresnet{depth}": partial(GateResNetCifar, depth) for depth in (20, 32, 44, 56, 110)},
    "gatemobilenetv2": partial(GateMobileNetV2),
    "gatedensenet40": partial(GateDenseNet, 40),
    "gatedensenet100_bc": partial(GateDenseNet, 100, bottleneck=True, reduction=0.5),
    **{f"resnet{depth}": partial(ResNetImageNet, depth) for depth in (18, 34, 50, 101, 152)},
}

# The published names of two networks with 100 classes.
ALIASES = {"gateresnet32_c100": ("gateresnet32", 100), "gateresnet56_c100": ("gateresnet56", 100)}


def check_network(net: str, known: Sequence[str] | None = None) -> str:
    """Return ``net`` if it is among ``known`` names (by default all there are).

    Raises ValueError with the nearest names otherwise.
    """
    known = [*NETWORKS, *ALIASES] if known is None else known
    if net not in known:
        near = difflib.get_close_matches(net, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"unknown network {net!r}; {hint}")
    return net


def build_model(net: str, num_classes: int | None = None) -> GatedModel:
    """A freshly initialised network of the registry.

    Args:
        net: a name of ``NETWORKS`` or ``ALIASES``.
        num_classes: outputs of the classifier; by default 100 for the ``_c100`` aliases, else what
            the constructor says.

    Raises ValueError for an unknown name, or an alias asked for another number of classes than its
    own.
    """
    name, fixed = ALIASES.get(check_network(net), (net, num_classes))
    if num_classes not in (None, fixed):
        raise ValueError(
            f"{net} has {fixed} classes, not {num_classes}; use {name}, which takes any number"
        )
    model = NETWORKS[name]() if fixed is None else NETWORKS[name](num_classes=fixed)
    model.net = name
    return model
