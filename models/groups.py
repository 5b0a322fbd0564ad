"""Channel groups, and what is known of a network so that it can be pruned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

Places = Mapping[str, Tensor]


@dataclass(frozen=True)
class ChannelGroup:
    """C channels that lie in the same layers; each of them can be cut on its own.

    Attributes:
        name: the first gate or, in a network without gates, the first norm.
        gates: the gates of the channels. With k gates, a channel counts k times in a pruning ratio.
        norms: the BatchNorms that score the channels.
        convs: the convolutions and linear layers whose filters score the channels: those among
            ``outputs`` or, if there are none (DenseNet), ``inputs``.
        outputs: layer -> (C, k) the k outputs of that layer that go with each channel.
        inputs: layer -> (C, k) the same for inputs. Behind a flattened 4x4 map, k is 16.
        entries: the place of each gate among all gates of the network, in module order, or as many
            numbers as a channel has places in the first norm. They break ties between scores.
    """

    name: str
    gates: tuple[str, ...]
    norms: tuple[str, ...]
    convs: tuple[str, ...]
    outputs: Places
    inputs: Places
    entries: tuple[int, ...]

    def __deepcopy__(self, memo: dict) -> ChannelGroup:
        return self  # nothing changes it: the copies of a network share it

    @property
    def width(self) -> int:
        """The number of channels."""
        return len(self.outputs[self.norms[0]])

    def as_plain(self) -> dict[str, Any]:
        """For a checkpoint: plain values, and all places in one tensor."""
        outputs = {name: places.shape[1] for name, places in self.outputs.items()}
        inputs = {name: places.shape[1] for name, places in self.inputs.items()}
        places = torch.cat([*self.outputs.values(), *self.inputs.values()], 1).int()
        return {**vars(self), "outputs": outputs, "inputs": inputs, "places": places}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ChannelGroup:
        """The inverse of ``as_plain``."""
        fields = dict(plain)
        counts = [*plain["outputs"].values(), *plain["inputs"].values()]
        parts = iter(fields.pop("places").long().split(counts, 1))
        for side in ("outputs", "inputs"):
            fields[side] = {name: next(parts) for name in plain[side]}
        return cls(**fields)


def removed_by(
    groups: Sequence[ChannelGroup], keep: Mapping[str, Sequence[int]]
) -> tuple[Places, Places]:
    """The outputs and the inputs (n,) of each layer, sorted, that go if ``keep`` stays."""
    outputs, inputs = defaultdict(list), defaultdict(list)
    for group in [group for group in groups if group.name in keep]:
        goes = torch.ones(group.width, dtype=torch.bool)
        goes[list(keep[group.name])] = False
        for side, places in ((outputs, group.outputs), (inputs, group.inputs)):
            for layer, place in places.items():
                side[layer].append(place[goes].flatten())
    return tuple(
        {layer: torch.cat(parts).sort().values for layer, parts in side.items()}
        for side in (outputs, inputs)
    )


@dataclass
class Structure:
    """What is known of a network, besides its layers. It is not part of the state dict.

    Attributes:
        num_classes: size of the output.
        head: the name of the layer that makes the output; empty if there is none.
        net: the name that ``models.build_model`` takes.
        groups: the channel groups of the unpruned network; None until they are read.
        notes: which operations keep their channels, and other remarks for the log.
        kept: group -> sorted channels of the unpruned network that are left, if it was ever cut.
    """

    num_classes: int
    head: str
    net: str = ""
    groups: tuple[ChannelGroup, ...] | None = None
    notes: tuple[str, ...] = ()
    kept: dict[str, list[int]] = field(default_factory=dict)

    def present(self) -> list[ChannelGroup]:
        """The groups as they are now: what was cut is left out, and the places moved up."""
        gone_outputs, gone_inputs = removed_by(self.groups, self.kept)
        present = []
        for group in self.groups:
            keep = list(self.kept.get(group.name, range(group.width)))
            outputs = _left(group.outputs, keep, gone_outputs)
            inputs = _left(group.inputs, keep, gone_inputs)
            present.append(replace(group, outputs=outputs, inputs=inputs))
        return present


def _left(places: Places, keep: list[int], gone: Places) -> Places:
    """The places of the channels ``keep``, once the places ``gone`` of each layer are left out."""
    none = torch.empty(0, dtype=torch.long)
    left = {name: place[keep] for name, place in places.items()}
    return {name: p - torch.searchsorted(gone.get(name, none), p) for name, p in left.items()}


def structure(model: nn.Module) -> Structure:
    """What is known of a network. Raises TypeError if nobody has traced it."""
    known = getattr(model, "structure", None)
    if not isinstance(known, Structure):
        raise TypeError(f"{type(model).__name__} has no channel groups; see models.trace.trace")
    return known


def replace_head(model: nn.Module, num_classes: int) -> None:
    """Replace the layer that makes the output by a new one for ``num_classes``.

    Raises ValueError if the network has no such layer.
    """
    known = structure(model)
    old = dict(model.named_modules()).get(known.head) if known.head else None
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, old.bias is not None)
    elif isinstance(old, nn.Conv2d):
        how = {"stride": old.stride, "padding": old.padding, "bias": old.bias is not None}
        new = nn.Conv2d(old.in_channels, num_classes, old.kernel_size, **how)
    else:
        raise ValueError(f"{known.net or type(model).__name__} has no classifier to replace")
    model.set_submodule(known.head, new.to(old.weight))
    known.num_classes = num_classes


def reset_parameters(model: nn.Module) -> None:
    """Draw fresh weights and reset the running statistics; shapes stay as they are."""
    for module in model.modules():
        if module is not model and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    if hasattr(model, "init_weights"):
        model.init_weights()
