"""Which channels stay: the pruning plan, and the selection of channels by their saliency."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from models import ChannelGroup, Gate, channel_groups, group_widths
from models.groups import removed_by

SCOPES = ("global", "layer")


@dataclass(frozen=True)
class PruningPlan:
    """The channels that each group keeps. A group that is not named keeps all its channels.

    Raises ValueError, with the group's name, for indices that cannot be a plan.
    """

    # Group name -> sorted indices of the channels that stay, in the model of the plan.
    keep: dict[str, list[int]]
    # Groups that keep more channels than selected, because of ``min_channels``: for reports only.
    held_at_floor: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self):
        for name, indices in self.keep.items():
            if not isinstance(name, str) or not isinstance(indices, (list, tuple)):
                raise ValueError(f"pruning plan: {name!r} needs a name and a list of indices")
            if not indices:
                raise ValueError(f"pruning plan: group {name} keeps nothing; one channel must stay")
            if any(type(i) is not int or i < 0 for i in indices):
                raise ValueError(f"pruning plan: group {name} has what is no channel index")
            if any(a >= b for a, b in itertools.pairwise(indices)):
                raise ValueError(f"pruning plan: indices of {name} are not sorted, or not unique")

    def shrinking(self, widths: Mapping[str, int]) -> PruningPlan:
        """The part of the plan for groups that lose channels, in a network of these ``widths``.

        Raises ValueError, with the group, if the plan does not fit the widths.
        """
        for name, indices in self.keep.items():
            if name not in widths:
                raise ValueError(f"pruning plan: the network has no channel group {name!r}")
            if indices[-1] >= widths[name]:
                beyond = f"channel {indices[-1]} of {widths[name]}"
                raise ValueError(f"pruning plan: group {name} keeps {beyond}")
        return self.only([name for name, keep in self.keep.items() if len(keep) < widths[name]])

    def only(self, groups: Sequence[str]) -> PruningPlan:
        """The part of the plan for these groups."""
        return PruningPlan({name: self.keep[name] for name in groups if name in self.keep})

    def then(self, plan: PruningPlan) -> PruningPlan:
        """Both cuts as one plan: ``plan`` refers to the network that this plan has cut."""
        keep = dict(self.keep)
        for name, indices in plan.keep.items():
            keep[name] = [keep[name][i] for i in indices] if name in keep else list(indices)
        return PruningPlan(keep)

    def apply_mask(self, model: nn.Module) -> nn.Module:
        """Silence all channels that go, in place; outputs are those of ``prune``.

        Gates are set to 0. Without gates, the weights and biases of every layer that makes such a
        channel are, and the gamma and beta of every norm behind it.
        """
        plan = self.shrinking(group_widths(model))
        for group in channel_groups(model):
            if group.name in plan.keep:
                outputs, _ = removed_by([group], plan.keep)
                for name in group.gates or outputs:
                    silence(model.get_submodule(name), outputs[name])
        return model

    def to_json(self) -> str:
        """One line per group, so that a diff shows what differs."""
        lines = [f"  {json.dumps(name)}: {json.dumps(list(k))}" for name, k in self.keep.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """The inverse of ``to_json``. Raises ValueError if the text is not a plan."""
        try:
            keep = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"pruning plan: not JSON, or cut off ({error})") from None
        if not isinstance(keep, dict):
            raise ValueError("pruning plan: expected an object of group names and channel indices")
        return cls(keep)


class Ranking:
    """All channels of a network, ranked by saliency. It yields plans of any size.

    A channel has one entry per gate or, without gates, per place in its first norm; there are
    ``entries`` of them in all. Of equal scores, the later entry ranks higher.

    Args:
        groups: the channel groups of the network.
        saliency: scores (C,) by group name.
        min_channels: each group keeps at least so many channels, or all if it has fewer.
        round_to: round widths up to a multiple of this, but not above the present width.
        scope: "global" ranks the scores of all groups together. "layer" replaces each score by the
            channel's rank within its group, so that all groups lose the same share.

    Raises ValueError for a limit below 1, an unknown scope, or scores missing or not finite.
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
        scores = [saliency[group.name].detach().cpu() for group in groups]
        self._scores = scores if scope == "global" else [_ranks(s) for s in scores]
        # The group and the channel of every entry: in the order of the network, then ranked.
        entries = sorted((entry, i) for i, group in enumerate(groups) for entry in group.entries)
        owners = [i for _, i in entries]
        widths = [len(self._scores[i]) for i in owners]
        order = _descending(torch.cat([self._scores[i] for i in owners]))
        self._group = torch.tensor(owners).repeat_interleave(torch.tensor(widths))[order]
        self._channel = torch.cat([torch.arange(width) for width in widths])[order]
        self.entries = len(order)

    def cut_after(self, kept: int) -> int:
        """The published rule: keep more until the first entry to go is of a group with one gate."""
        while kept < self.entries and len(self.groups[self._group[kept]].gates) > 1:
            kept += 1
        return kept

    def plan(self, kept: int) -> PruningPlan:
        """Keep the first ``kept`` entries, and what ``min_channels`` and ``round_to`` add.

        A channel stays if any of its entries stays: the cut may split entries of equal scores. A
        larger ``kept`` gives a plan that contains this one.
        """
        keep, held = {}, []
        for i, (group, scores) in enumerate(zip(self.groups, self._scores, strict=True)):
            stays = torch.zeros(len(scores), dtype=torch.bool)
            stays[self._channel[:kept][self._group[:kept] == i]] = True
            width, floor = int(stays.sum()), min(self.min_channels, len(stays))
            if width < floor:
                held.append(group.name)
            width = math.ceil(max(width, floor) / self.round_to) * self.round_to
            stays[_descending(scores)[:width]] = True
            keep[group.name] = stays.nonzero().flatten().tolist()
        return PruningPlan(keep, tuple(held))


def select_channels(
    groups: Sequence[ChannelGroup],
    saliency: Mapping[str, Tensor],
    ratio: float,
    *,
    entries: int | None = None,
    **limits: int | str,
) -> PruningPlan:
    """Keep the most salient channels of the whole network, as the published code selects them.

    Of N entries (see ``Ranking``) the first ``int(N * (1 - ratio))`` stay, or a few more where the
    cut would split coupled channels. The ratio is in [0, 1); otherwise ValueError.

    Args:
        groups, saliency, limits: see ``Ranking``, which raises ValueError for bad ones.
        ratio: share of the entries to remove.
        entries: N; default: all entries. After an earlier cut, it may be their number before it.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"the pruning ratio must be in [0, 1), not {ratio}")
    ranking = Ranking(groups, saliency, **limits)
    total = ranking.entries if entries is None else entries
    return ranking.plan(ranking.cut_after(min(ranking.entries, int(total * (1 - ratio)))))


def _ranks(scores: Tensor) -> Tensor:
    """(i + 1/2) / C for the i-th lowest of C scores: a threshold t cuts round(C * t) channels."""
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[scores.argsort(stable=True)] = (torch.arange(len(scores)).double() + 0.5) / len(scores)
    return ranks


def _descending(scores: Tensor) -> Tensor:
    """Indices from the highest score to the lowest; of equal scores the later comes first."""
    return scores.argsort(stable=True).flip(0)


@torch.no_grad()
def silence(layer: nn.Module, outputs: Tensor) -> None:
    """Make these outputs (n,) of a layer 0, in place."""
    if isinstance(layer, Gate):
        layer.gate[:, outputs] = 0
        return
    weight = layer.weight
    if isinstance(layer, _ConvTransposeNd):
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)  # a view
    weight[outputs] = 0
    if getattr(layer, "bias", None) is not None:
        layer.bias[outputs] = 0
