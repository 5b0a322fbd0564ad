"""Which channels stay: the pruning plan, and the selection of channels by their saliency."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models import ChannelGroup, GatedModel

SCOPES = ("global", "layer")


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


class Ranking:
    """All channels of a network in order of their saliency, from which plans of any size are cut.

    Every gate of every group contributes its channels' scores, in module order; of equal scores
    the later entry ranks higher.

    Args:
        groups: the channel groups of the network.
        saliency: scores (C,) by group name.
        min_channels: floor for every group, of its most salient channels; a narrower group keeps
            all it has.
        round_to: widths are rounded up to multiples of it, by the next most salient channels of
            the group, and never above the present width.
        scope: "global" compares the scores of all groups; with "layer" a channel's rank within
            its group takes the place of its score, so that every group loses the same share.

    Attributes:
        entries: how many gate entries there are.

    Raises ValueError for a floor or a multiple below 1, an unknown scope, or scores that are
    missing or not finite (with the group's name).
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        saliency: Mapping[str, Tensor],
        *,
        min_channels: int = 1,
        round_to: int = 1,
        scope: str = "global",
    ):
        if scope not in SCOPES:
            raise ValueError(f"scope must be {' or '.join(SCOPES)}, not {scope!r}")
        for name, value in (("min_channels", min_channels), ("round_to", round_to)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for group in groups:
            if group.name not in saliency:
                raise ValueError(f"no saliency for channel group {group.name}")
            if not torch.isfinite(saliency[group.name]).all():
                raise ValueError(f"the saliency of channel group {group.name} is not finite")
        self.groups, self.min_channels, self.round_to = list(groups), min_channels, round_to
        self._owners = _gate_owners(groups)
        scores = {group.name: saliency[group.name].detach().cpu() for group in groups}
        self._scores = scores if scope == "global" else {n: _ranks(s) for n, s in scores.items()}
        self._sizes = [len(self._scores[group.name]) for group in self._owners]
        self._order = _descending(torch.cat([self._scores[g.name] for g in self._owners]))
        self.entries = len(self._order)

    def cut_after(self, kept: int) -> int:
        """The published rule: while the first entry to go belongs to a group of several gates, one
        entry more stays, so that coupled channels are not split.
        """
        coupled = torch.cat(
            [
                torch.full((size,), len(group.gates) > 1)
                for group, size in zip(self._owners, self._sizes, strict=True)
            ]
        )[self._order]
        while kept < self.entries and coupled[kept]:
            kept += 1
        return kept

    def plan(self, kept: int) -> PruningPlan:
        """Keep the first ``kept`` entries, and what floor and rounding add to them.

        A channel stays if any of its entries does: equal scores may leave the copies of one channel
        on both sides. A plan of more entries contains every plan of fewer.
        """
        stays = torch.zeros(self.entries, dtype=torch.bool)
        stays[self._order[:kept]] = True
        masks: dict[str, Tensor] = {}
        for group, part in zip(self._owners, stays.split(self._sizes), strict=True):
            masks[group.name] = masks.get(group.name, False) | part

        keep, held = {}, []
        for group in self.groups:
            mask = masks[group.name]
            width, floor = int(mask.sum()), min(self.min_channels, len(mask))
            if width < floor:
                held.append(group.name)
            width = min(_multiple_from(max(width, floor), self.round_to), len(mask))
            mask[_descending(self._scores[group.name])[:width]] = True
            keep[group.name] = mask.nonzero().flatten().tolist()
        return PruningPlan(keep, tuple(held))


def select_channels(
    groups: Sequence[ChannelGroup],
    saliency: Mapping[str, Tensor],
    ratio: float,
    *,
    min_channels: int = 1,
    round_to: int = 1,
    scope: str = "global",
    entries: int | None = None,
) -> PruningPlan:
    """Keep the most salient channels of the whole network, as the published code selects them.

    Of N gate entries (see ``Ranking``) the first ``int(N * (1 - ratio))`` stay, or a few more where
    the cut would split coupled channels.

    Args:
        groups, saliency, min_channels, round_to, scope: see ``Ranking``.
        ratio: share of the entries to remove, in [0, 1).
        entries: the N of which the ratio is a share, by default those there are: a network that has
            been cut before may count from what it had.

    Raises ValueError for a ratio outside [0, 1), and as ``Ranking`` does.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"the pruning ratio must be in [0, 1), not {ratio}")
    limits = {"min_channels": min_channels, "round_to": round_to, "scope": scope}
    ranking = Ranking(groups, saliency, **limits)
    total = ranking.entries if entries is None else entries
    return ranking.plan(ranking.cut_after(min(ranking.entries, int(total * (1 - ratio)))))


def largest_plan(ranking: Ranking, fits: Callable[[PruningPlan], bool]) -> PruningPlan | None:
    """The plan of the most channels that ``fits``, by bisection; None if even the floor does not.

    Where a plan fits, so must every smaller one. Coupled channels go one by one, all copies of one
    together, so that a budget is met as closely as the network allows.
    """
    # The smallest number of entries whose plan does not fit; everything may.
    beyond = bisect.bisect_left(
        range(ranking.entries + 1), True, key=lambda kept: not fits(ranking.plan(kept))
    )
    return ranking.plan(beyond - 1) if beyond else None


def _multiple_from(width: int, step: int) -> int:
    """The least multiple of ``step`` that is not below ``width``."""
    return -(-width // step) * step


def _gate_owners(groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """The group of every gate, in module order where the groups know it, else as listed."""
    owners = [group for group in groups for _ in group.gates]
    positions = [place for group in groups for place in group.positions]
    if len(positions) < len(owners):
        return owners
    return [
        owner for _, owner in sorted(zip(positions, owners, strict=True), key=lambda pair: pair[0])
    ]


def _ranks(scores: Tensor) -> Tensor:
    """Ranks (C,) in (0, 1) from the lowest score to the highest: (i + 1/2) / C, so that a threshold
    t on them cuts round(C * t) channels.
    """
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[_descending(scores).flip(0)] = (torch.arange(len(scores)).double() + 0.5) / len(scores)
    return ranks


def _descending(scores: Tensor) -> Tensor:
    """Indices from the highest score to the lowest; of equal scores the later comes first."""
    return scores.sort(stable=True).indices.flip(0)
