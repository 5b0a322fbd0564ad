"""``GatedModel``: a network with gates, as published."""

from __future__ import annotations

from torch import nn

from models.groups import ChannelGroup, Structure
from models.trace import channel_groups, group_widths


class GatedModel(nn.Module):
    """A network with gates: its author chooses where channels are scored and cut.

    A subclass must

    - take ``num_classes`` as a keyword and pass it to ``super().__init__``,
    - map images (B, 3, H, W) to logits (B, num_classes) in ``forward``,
    - set ``head`` to the name of its classifier, a linear layer, e.g. ``"fc"`` or ``"head.1"``,
    - place each ``Gate`` where a factor of 0 silences a channel that can be cut.

    Attributes:
        net: name in the registry; ``models.build_model`` sets it.
        num_classes: outputs of the classifier.
        kept: see ``models.groups.Structure``. ``net``, ``num_classes`` and ``kept`` fix all shapes.
    """

    head: str = ""

    def __init__(self, num_classes: int):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        self.structure = Structure(num_classes, self.head)

    @property
    def net(self) -> str:
        return self.structure.net

    @property
    def num_classes(self) -> int:
        return self.structure.num_classes

    @property
    def kept(self) -> dict[str, list[int]]:
        return self.structure.kept

    def head_layer(self) -> nn.Module:
        """The classifier. Raises TypeError if ``head`` does not name a layer of the network."""
        layer = dict(self.named_modules()).get(self.head)
        if layer in (None, self):
            network = type(self).__name__
            raise TypeError(f"{network}.head must name its classifier; no layer is {self.head!r}")
        return layer

    def channel_groups(self) -> list[ChannelGroup]:
        """All channel groups as they are now, in forward order.

        Raises ValueError, with its name, if a gate stands where channels cannot be cut.
        """
        return channel_groups(self)

    def group_widths(self) -> dict[str, int]:
        """Number of channels of every group, by group name."""
        return group_widths(self)

    def live_channels(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """Channels that some layer still reads, after surgery has cut the groups.

        Returns two dicts by layer name: the outputs to keep, and the inputs to keep. A layer that
        is missing keeps everything.
        """
        return {}, {}

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

    def checkpoint_blocks(self) -> list[nn.Module]:
        """Modules whose activations may be recomputed in the backward pass, to save memory."""
        return []

    def pruning_stages(self) -> list[tuple[str, ...]]:
        """The stages of ``--smooth``: the names of the groups that each stage cuts together."""
        return [(group.name,) for group in self.channel_groups()]


def checkpoint_blocks(model: nn.Module) -> list[nn.Module]:
    """What ``GatedModel.checkpoint_blocks`` says; nothing for a network without gates."""
    return model.checkpoint_blocks() if isinstance(model, GatedModel) else []


def pruning_stages(model: nn.Module) -> list[tuple[str, ...]]:
    """What ``GatedModel.pruning_stages`` says; a stage per group for a network without gates."""
    gated = isinstance(model, GatedModel)
    return model.pruning_stages() if gated else [(name,) for name in group_widths(model)]
