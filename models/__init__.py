"""The gated networks, by name."""

import difflib
from collections.abc import Callable, Sequence
from functools import partial

from models.densenet import GateDenseNet
from models.gate import Gate
from models.gated import GatedModel
from models.groups import ChannelGroup, replace_head, reset_parameters, structure
from models.mobilenetv2 import GateMobileNetV2
from models.resnet_cifar import GateResNetCifar
from models.resnet_imagenet import ResNetImageNet
from models.trace import channel_groups, group_widths, trace
from models.vgg import GateVGG

__all__ = [
    "ALIASES",
    "IMAGENET_NETWORKS",
    "NETWORKS",
    "ChannelGroup",
    "Gate",
    "GatedModel",
    "build_model",
    "channel_groups",
    "check_network",
    "group_widths",
    "replace_head",
    "reset_parameters",
    "structure",
    "trace",
]

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


def check_network(net: str, known: Sequence[str] | None = None) -> str:
    """Return ``net`` if it is in ``known`` (default: all names).

    Raises ValueError, with the most similar names, if it is not.
    """
    known = [*NETWORKS, *ALIASES] if known is None else known
    if net not in known:
        near = difflib.get_close_matches(net, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"unknown network {net!r}; {hint}")
    return net


def build_model(net: str, num_classes: int | None = None) -> GatedModel:
    """The network ``net`` of ``NETWORKS`` or ``ALIASES`` with fresh weights.

    The default of ``num_classes`` is 100 for an alias, else that of the network.

    Raises ValueError if the name is unknown, or if an alias gets another number than 100;
    TypeError if the network breaks the contract of ``GatedModel``.
    """
    name, fixed = ALIASES.get(check_network(net), (net, num_classes))
    if num_classes not in (None, fixed):
        raise ValueError(f"{net} has {fixed} classes, not {num_classes}; {name} takes any number")
    model = NETWORKS[name]() if fixed is None else NETWORKS[name](num_classes=fixed)
    if not isinstance(model, GatedModel):
        raise TypeError(f"network {name!r} is a {type(model).__name__}, not a GatedModel")
    model.structure.net = name
    return model
