"""Channel groups, and ``GatedModel``: what a network must offer so that it can be pruned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from models.gate import Gate

Names = Sequence[str]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that must be cut together, and the names of all layers that hold them.

    Attributes:
        name: the name of the first gate, e.g. ``features.2`` or ``layer1.0.gate3``.
        gates: the gates of the channels. With k gates, a channel counts k times in a pruning ratio.
        norms: the BatchNorms that score the channels, by gamma, its gradient, and beta.
        outputs: the layers that lose an output with every channel: convolutions, norms, gates,
            shortcuts, depthwise convolutions.
        inputs: the layers that lose an input: the next convolutions, the classifier, shortcuts.
        convs: the convolutions that score the channels in criteria that read filters. Default: all
            convolutions among ``outputs``; if there are none (DenseNet), those among ``inputs``,
            where the criterion reads input slices.
        positions: the index of each gate among all gates of the network, in module order; it breaks
            ties between scores. ``GatedModel.channel_groups`` fills it in. Without it, groups count
            in the order of their list.
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
        if self.name not in self.gates[:1]:
            raise ValueError(f"channel group {self.name!r} must be named after its first gate")

    @classmethod
    def around(
        cls, gates: Names, norms: Names, convs: Names, inputs: Names, others: Names = ()
    ) -> ChannelGroup:
        """A group whose outputs are its ``convs``, ``others``, ``norms`` and ``gates``."""
        return cls(gates[0], gates, norms, (*convs, *others, *norms, *gates), inputs, convs)


class GatedModel(nn.Module):
    """A network that knows its own channel groups. The rest of the project knows no architecture.

    A subclass must

    - take ``num_classes`` as a keyword and pass it to ``super().__init__``,
    - map images (B, 3, H, W) to logits (B, num_classes) in ``forward``,
    - set ``head`` to the name of its classifier, a linear layer, e.g. ``"fc"`` or ``"head.1"``,
    - place a ``Gate`` wherever channels can be cut, and list all gates in ``_channel_groups``.

    Attributes:
        net: name in the registry; ``models.build_model`` sets it.
        num_classes: outputs of the classifier.
        kept: group name -> sorted channels of the *unpruned* network that are left. Groups that
            were never cut are missing. ``net``, ``num_classes`` and ``kept`` fix all shapes.
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
        """All groups, in any order, without ``positions``; ``channel_groups`` checks them."""
        raise NotImplementedError

    def head_layer(self) -> nn.Module:
        """The classifier. Raises TypeError if ``head`` does not name a layer of the network."""
        layer = dict(self.named_modules()).get(self.head)
        if layer in (None, self):
            network = type(self).__name__
            raise TypeError(f"{network}.head must name its classifier; no layer is {self.head!r}")
        return layer

    def channel_groups(self) -> list[ChannelGroup]:
        """All channel groups in forward order, with ``convs`` and ``positions`` filled in.

        Raises TypeError if ``head`` names no layer, and ValueError, with the group and the layer,
        if a group names a missing layer or layers of different widths.
        """
        self.head_layer()
        modules = dict(self.named_modules())
        gates = [name for name, module in modules.items() if isinstance(module, Gate)]
        groups = []
        for group in self._channel_groups():
            for name in (*group.gates, *group.norms, *group.outputs, *group.inputs, *group.convs):
                if name not in modules:
                    raise ValueError(f"channel group {group.name}: there is no layer {name!r}")
            widths = {name: modules[name].gate.shape[1] for name in group.gates}
            widths |= {name: modules[name].num_features for name in group.norms}
            if len(set(widths.values())) > 1:
                raise ValueError(f"channel group {group.name}: layers differ in width: {widths}")
            convs = group.convs
            for side in (group.outputs, group.inputs):
                convs = convs or [name for name in side if isinstance(modules[name], nn.Conv2d)]
            positions = tuple(gates.index(name) for name in group.gates)
            groups.append(replace(group, convs=convs, positions=positions))
        return sorted(groups, key=lambda group: group.positions)

    def group_widths(self) -> dict[str, int]:
        """Number of channels of every group, by group name."""
        groups = self.channel_groups()
        return {group.name: self.get_submodule(group.name).gate.shape[1] for group in groups}

    def live_channels(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """Channels that some layer still reads, after surgery has cut the groups.

        Returns two dicts by layer name: the outputs to keep, and the inputs to keep. A layer that
        is missing keeps everything.
        """
        return {}, {}

    def replace_head(self, num_classes: int) -> None:
        """Replace the classifier by a new one for ``num_classes``."""
        self.set_submodule(self.head, nn.Linear(self.head_layer().in_features, num_classes))
        self.num_classes = num_classes

    def init_weights(self) -> None:
        """He initialisation (ICCV 2015, fan-out) of convolutions; identity for norms."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def reset_parameters(self) -> None:
        """Draw fresh weights and reset the running statistics; shapes stay as they are."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.init_weights()

    def checkpoint_blocks(self) -> list[nn.Module]:
        """Modules whose activations may be recomputed in the backward pass, to save memory."""
        return []

    def pruning_stages(self) -> list[tuple[str, ...]]:
        """The stages of ``--smooth``: the names of the groups that each stage cuts together."""
        return [(group.name,) for group in self.channel_groups()]
