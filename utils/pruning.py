"""Which channels stay: the pruning plan, and the selection of channels by their saliency."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.gate import ChannelGroup, GatedModel


@dataclass(frozen=True)
class PruningPlan:
    """The channels that every group keeps. A group that is not named keeps everything.

    Attributes:
        keep: sorted indices into the channels of the model that the plan was made for, by group
            name.
        held_at_floor: the groups that would have kept fewer channels but for the floor; for the
            report only, not part of what is saved or compared.

    Raises ValueError with the group's name for indices that are not sorted, unique and
    non-negative, or for an empty group.
    """

    keep: dict[str, list[int]]
    held_at_floor: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self):
        for name, indices in self.keep.items():
            if not isinstance(name, str) or not isinstance(indices, (list, tuple)):
                raise ValueError(
                    f"pruning plan: {name!r} must be a group name with a list of indices"
                )
            if not indices:
                raise ValueError(
                    f"pruning plan: group {name} keeps nothing; at least one channel must stay"
                )
            if any(type(i) is not int or i < 0 for i in indices):
                raise ValueError(f"pruning plan: group {name} holds what is no channel index")
            if any(a >= b for a, b in itertools.pairwise(indices)):
                raise ValueError(
                    f"pruning plan: the indices of group {name} are not sorted, or not unique"
                )

    def losses(self, widths: Mapping[str, int]) -> PruningPlan:
        """The part of the plan that names the groups that lose channels, out of such widths.

        Raises ValueError, naming group and bound, for a plan that does not fit them.
        """
        for name, indices in self.keep.items():
            if name not in widths:
                raise ValueError(f"pruning plan: the network has no channel group {name!r}")
            if indices[-1] >= widths[name]:
                raise ValueError(
                    f"pruning plan: group {name} keeps channel {indices[-1]} of {widths[name]}"
                )
        losing = {name: keep for name, keep in self.keep.items() if len(keep) < widths[name]}
        return PruningPlan(losing)

    def apply_mask(self, model: GatedModel) -> GatedModel:
        """Zero the gates of all channels that go, in place; the output is the pruned model's."""
        losing = self.losses(model.group_widths())
        for group in model.channel_groups():
            if group.name in losing.keep:
                for name in group.gates:
                    gate = model.get_submodule(name).gate
                    mask = torch.zeros_like(gate)
                    mask[:, losing.keep[group.name]] = 1
                    gate.data.mul_(mask)
        return model

    def to_json(self) -> str:
        """One line per group, so that two plans can be compared by eye and by diff."""
        lines = [
            f"  {json.dumps(name)}: {json.dumps(list(indices))}"
            for name, indices in self.keep.items()
        ]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """The inverse of ``to_json``; ValueError where the text is no plan."""
        try:
            keep = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"pruning plan: not JSON, or cut off ({error})") from None
        if not isinstance(keep, dict):
            raise ValueError("pruning plan: expected an object of group names and channel indices")
        return cls(keep)


def compose_kept(kept: Mapping[str, Sequence[int]], plan: PruningPlan) -> dict[str, list[int]]:
    """What is left of the unpruned network once ``plan`` has cut what was left of it, ``kept``."""
    after = {
        name: [kept[name][i] for i in keep] if name in kept else list(keep)
        for name, keep in plan.keep.items()
    }
    return {**kept, **after}


def select_channels(
    groups: Sequence[ChannelGroup],
    saliency: Mapping[str, Tensor],
    ratio: float,
    *,
    min_channels: int = 1,
) -> PruningPlan:
    """Keep the most salient channels of the whole network, as the published code selects them.

    Every gate of every group contributes its channels' scores, in module order: N entries, of which
    the first ``int(N * (1 - ratio))`` in descending order stay (among equal scores the later entry
    ranks higher). While the entry at the cut belongs to a group of several gates, the cut moves on
    by one, so that coupled channels are not split. A group that would keep fewer than
    ``min_channels`` keeps that many of its most salient ones.

    Args:
        groups: the channel groups of the network.
        saliency: scores (C,) by group name.
        ratio: share of the entries to remove, in [0, 1).
        min_channels: floor for every group; a narrower group keeps all its channels.

    Raises ValueError for a ratio outside [0, 1), a floor below 1, or scores that are missing, of
    another number of channels than the others of their group, or not finite (with the group's
    name).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"the pruning ratio must be in [0, 1), not {ratio}")
    if min_channels < 1:
        raise ValueError(f"min_channels must be at least 1, not {min_channels}")
    for group in groups:
        if group.name not in saliency:
            raise ValueError(f"no saliency for channel group {group.name}")
        if not torch.isfinite(saliency[group.name]).all():
            raise ValueError(f"the saliency of channel group {group.name} is not finite")

    owners = _gate_owners(groups)
    scores = torch.cat([saliency[group.name].detach().cpu() for group in owners])
    coupled = torch.cat(
        [torch.full(saliency[group.name].shape, len(group.gates) > 1) for group in owners]
    )
    order = _descending(scores)
    cut = int(len(scores) * (1 - ratio))
    while cut < len(scores) and coupled[order[cut]]:
        cut += 1
    stays = torch.zeros(len(scores), dtype=torch.bool)
    stays[order[:cut]] = True

    # A channel stays if any of its entries does: equal scores may leave the copies of one channel
    # on both sides.
    stays_in_group: dict[str, Tensor] = {}
    for group, part in zip(
        owners, stays.split([len(saliency[group.name]) for group in owners]), strict=True
    ):
        stays_in_group[group.name] = stays_in_group.get(group.name, False) | part

    keep, held = {}, []
    for group in groups:
        mask = stays_in_group[group.name]
        if mask.sum() < min(min_channels, len(mask)):
            held.append(group.name)
            mask[_descending(saliency[group.name].detach().cpu())[:min_channels]] = True
        keep[group.name] = mask.nonzero().flatten().tolist()
    return PruningPlan(keep, tuple(held))


def _gate_owners(groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """The group of every gate, in module order where the groups know it, else as listed."""
    owners = [group for group in groups for _ in group.gates]
    positions = [place for group in groups for place in group.positions]
    if len(positions) < len(owners):
        return owners
    return [
        owner for _, owner in sorted(zip(positions, owners, strict=True), key=lambda pair: pair[0])
    ]


def _descending(scores: Tensor) -> Tensor:
    """Indices from the highest score to the lowest; of equal scores the later comes first."""
    return scores.sort(stable=True).indices.flip(0)
