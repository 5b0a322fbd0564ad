"""Channel groups, and what is known of a network so that it can be pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

Places = Mapping[str, Tensor]
SIDES = ("outputs", "inputs")


@dataclass(frozen=True)
class ChannelGroup:
    """C channels that lie in the same layers; each of them can be cut on its own.

    Attributes:
        name: the name of the first gate or, in a network without gates, of the first norm.
        gates: the gates of the channels. With k gates, a channel counts k times in a pruning ratio.
        norms: the BatchNorms that score the channels, by gamma, its gradient, and beta.
        convs: the convolutions and linear layers whose filters score the channels. They are those
            among ``outputs``; if there are none (DenseNet), those among ``inputs``, where a
            criterion reads input slices.
        outputs: layer -> (C, k) the k outputs of that layer that go with each channel: outputs of
            convolutions, norms, gates and shortcuts.
        inputs: layer -> (C, k) the same for inputs. Behind a flattened 4x4 map, k is 16.
        entries: the places of each gate among all gates of the network, in module order, or as many
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
        return self  # nothing changes it, so the copies of a network share it

    @property
    def width(self) -> int:
        """The number of channels."""
        return len(self.outputs[self.norms[0]])

    def as_plain(self) -> dict[str, Any]:
        """For a checkpoint: plain values, and all places in one tensor."""
        sides = {s: {n: p.shape[1] for n, p in getattr(self, s).items()} for s in SIDES}
        places = torch.cat([*self.outputs.values(), *self.inputs.values()], 1).int()
        return {**vars(self), **sides, "places": places}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ChannelGroup:
        """The inverse of ``as_plain``."""
        fields = dict(plain)
        places = fields.pop("places").long()
        counts = [count for side in SIDES for count in fields[side].values()]
        parts = iter(places.split(counts, 1))
        for side in SIDES:
            fields[side] = {name: next(parts) for name in fields[side]}
        return cls(**fields)

    def removed(self, keep: Sequence[int]) -> tuple[Places, Places]:
        """The outputs and the inputs (n,) of each layer that go if only ``keep`` stays."""
        goes = torch.ones(self.width, dtype=torch.bool)
        goes[list(keep)] = False
        sides = ({n: p[goes].flatten() for n, p in s.items()} for s in (self.outputs, self.inputs))
        return tuple(sides)


def removed_by(
    groups: Sequence[ChannelGroup], keep: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The outputs and the inputs (n,) of each layer, sorted, that go in a whole plan."""
    found: tuple[dict[str, list[Tensor]], ...] = {}, {}
    for group in groups:
        if group.name in keep:
            for side, places in zip(found, group.removed(keep[group.name]), strict=True):
                for layer, gone in places.items():
                    side.setdefault(layer, []).append(gone)
    return tuple({n: torch.cat(parts).sort().values for n, parts in s.items()} for s in found)


@dataclass
class Structure:
    """What is known of a network, besides its layers. It is not part of the state dict.

    Attributes:
        num_classes: size of the output.
        head: the name of the layer that makes the output; empty if there is none.
        net: the name that ``models.build_model`` takes.
        groups: the channel groups of the unpruned network; None until they are asked for.
        notes: which operations keep their channels, and other remarks for the log.
        kept: group -> sorted channels of the unpruned network that are left. Groups that were never
            cut are missing.
    """

    num_classes: int
    head: str
    net: str = ""
    groups: tuple[ChannelGroup, ...] | None = None
    notes: tuple[str, ...] = ()
    kept: dict[str, list[int]] = field(default_factory=dict)

    def present(self) -> list[ChannelGroup]:
        """The groups as they are now: what was cut is left out, and the places moved up."""
        if not self.kept:
            return list(self.groups)
        gone = removed_by(self.groups, self.kept)
        present = []
        for group in self.groups:
            keep = self.kept.get(group.name, range(group.width))
            sides = []
            for places, removed in zip((group.outputs, group.inputs), gone, strict=True):
                left = {name: place[list(keep)] for name, place in places.items()}
                for name in left.keys() & removed.keys():
                    left[name] = left[name] - torch.searchsorted(removed[name], left[name])
                sides.append({name: left[name] for name in places})
            present.append(replace(group, outputs=sides[0], inputs=sides[1]))
        return present


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
