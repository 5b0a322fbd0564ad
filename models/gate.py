"""What a gated network is: gates, groups of channels, and the base class of all networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """Multiply every channel by a frozen factor: ``y = gate * x``, all ones unless masked.

    A gate stands where zeroing one of its entries silences exactly one channel and where silencing
    equals removing, so that a pruning plan can be tried as a mask before anything is cut.

    Shape: (B, C, H, W) -> (B, C, H, W); the parameter ``gate`` is (1, C, 1, 1).

    Attributes:
        folded: whether the gate lets everything through unseen; see ``folded_gates``.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1, channels, 1, 1), requires_grad=False)
        self.folded = False

    def forward(self, x: Tensor) -> Tensor:
        if self.folded:
            return x
        return self.gate.to(x.dtype) * x  # mixed precision stays as narrow as it comes

    def extra_repr(self) -> str:
        return str(self.gate.shape[1])


@contextmanager
def folded_gates(model: nn.Module) -> Iterator[None]:
    """Gates of nothing but ones do not multiply as long as this lasts: the same bits, sooner.

    Gates whose gradient is asked for do.
    """
    gates = [m for m in model.modules() if isinstance(m, Gate) and not m.folded]
    unread = [gate for gate in gates if not gate.gate.requires_grad]
    folded = [gate for gate in unread if bool((gate.gate == 1).all())]
    for gate in folded:
        gate.folded = True
    try:
        yield
    finally:
        for gate in folded:
            gate.folded = False


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live or die together, and every place where they are, by module name.

    Attributes:
        name: the name of the first gate, e.g. ``features.2`` or ``layer1.0.gate3``.
        gates: the gates that carry the channels; with k gates, a channel counts k times in a
            pruning ratio.
        norms: the BatchNorms whose gamma, its gradient and beta score the channels.
        outputs: the modules that lose outputs with a channel: convolution, norm, gate, shortcut,
            depthwise convolution...
        inputs: the modules that lose inputs: the next convolutions, the classifier, a shortcut...
        convs: the convolutions whose filters stand for the channels where a criterion looks at
            filters, as a rule the one before each norm; by default all among the outputs, or else
            all among the inputs (DenseNet), which are looked at by their input slices.
        positions: the place of each gate among all gates of the network, in module order; ties
            between scores are broken by it. ``GatedModel.channel_groups`` fills it in; groups
            without it count in the order they are listed.
    """

    name: str
    gates: tuple[str, ...]
    norms: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    convs: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()

    def __post_init__(self):
        for field in ("gates", "norms", "outputs", "inputs", "convs"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.gates or self.name != self.gates[0]:
            raise ValueError(
                f"channel group {self.name!r} must be named like its first gate, {self.gates[:1]}"
            )
        if self.positions and len(self.positions) != len(self.gates):
            raise ValueError(
                f"channel group {self.name!r} has {len(self.gates)} gates at {self.positions}"
            )

    @classmethod
    def around(
        cls,
        gates: Sequence[str],
        norms: Sequence[str],
        convs: Sequence[str],
        inputs: Sequence[str],
        others: Sequence[str] = (),
    ) -> ChannelGroup:
        """A group named after its first gate, whose outputs are its convolutions, norms, gates, and
        whatever ``others`` there are.
        """
        return cls(gates[0], gates, norms, (*convs, *others, *norms, *gates), inputs, convs)


class GatedModel(nn.Module):
    """A network with gates that lists its own channel groups; nothing else knows an architecture.

    A subclass builds its layers, sets ``head`` to the name of its classifier and writes
    ``_channel_groups``.

    Attributes:
        net: registry name, set by ``models.build_model``.
        num_classes: outputs of the classifier.
        kept: for every group that has been pruned, the channels of the *unpruned* network that are
            still there. Together with ``net`` and ``num_classes`` it rebuilds the network's shape;
            ``utils.surgery.prune`` keeps it up to date.
    """

    net: str = ""
    head: str = ""

    def __init__(self, num_classes: int):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        self.num_classes = num_classes
        self.kept: dict[str, list[int]] = {}

    def _channel_groups(self) -> Iterator[ChannelGroup]:
        """The groups, in any order; checked, completed and sorted by ``channel_groups``."""
        raise NotImplementedError

    def channel_groups(self) -> list[ChannelGroup]:
        """All prunable channels of the network in forward order.

        Raises ValueError with the layer's name where a group names no layer, or layers of different
        widths.
        """
        modules = dict(self.named_modules())
        positions = {
            name: i for i, name in enumerate(n for n, m in modules.items() if isinstance(m, Gate))
        }
        groups = []
        for group in self._channel_groups():
            for name in (*group.gates, *group.norms, *group.outputs, *group.inputs, *group.convs):
                if name not in modules:
                    raise ValueError(
                        f"channel group {group.name}: the network has no layer {name!r}"
                    )
            widths = {name: modules[name].gate.shape[1] for name in group.gates}
            widths |= {name: modules[name].num_features for name in group.norms}
            if len(set(widths.values())) > 1:
                raise ValueError(
                    f"channel group {group.name}: its layers differ in width: {widths}"
                )
            makers, readers = (
                tuple(name for name in side if isinstance(modules[name], nn.Conv2d))
                for side in (group.outputs, group.inputs)
            )
            convs = group.convs or makers or readers
            places = tuple(positions[name] for name in group.gates)
            groups.append(replace(group, convs=convs, positions=places))
        return sorted(groups, key=lambda group: group.positions)

    def group_widths(self) -> dict[str, int]:
        """Channels of every group, by group name."""
        return {
            group.name: self.get_submodule(group.name).gate.shape[1]
            for group in self.channel_groups()
        }

    def live_channels(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """What is left to cut once the groups are: channels that were made for all of their readers
        and that none of them reads any more.

        Returns, by layer name, the outputs that layers must keep, and which of their inputs layers
        will still get. Layers that are not named keep everything.
        """
        return {}, {}

    def replace_head(self, num_classes: int) -> None:
        """Put a freshly initialised classifier for ``num_classes`` in the place of the present."""
        old = self.get_submodule(self.head)
        self.set_submodule(self.head, nn.Linear(old.in_features, num_classes))
        self.num_classes = num_classes

    def init_weights(self) -> None:
        """Initialise what torch's own defaults for the layers do not do as published."""
        init_he_normal(self)

    def reset_parameters(self) -> None:
        """Fresh weights and statistics, in the present shape."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.init_weights()

    def checkpoint_blocks(self) -> list[nn.Module]:
        """Modules whose activations can be computed again on the way back, to save memory."""
        return []

    def pruning_stages(self) -> list[tuple[str, ...]]:
        """Names of the groups that ``--smooth`` cuts together before it fine-tunes: one a stage.

        Residual networks have one stage per residual block instead.
        """
        return [(group.name,) for group in self.channel_groups()]


def init_he_normal(model: nn.Module) -> None:
    """He initialisation (ICCV 2015, over the fan-out) for convolutions; identity for norms."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
