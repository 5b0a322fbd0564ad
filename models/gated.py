"""``GatedModel``: a network with gates, as published."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from models.gate import Gate
from models.groups import ChannelGroup, Structure
from models.trace import channel_groups, group_widths


class ResidualBlock(nn.Module):
    """``conv{k} bn{k} gate{k}`` for k = 1, 2, ...; the last gate stands behind the addition."""


def add_layer(
    module: nn.Module, k: int, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1
) -> None:
    """Add a convolution ``conv{k}`` without bias, a norm ``bn{k}`` and a gate ``gate{k}``."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    module.add_module(f"conv{k}", conv)
    module.add_module(f"bn{k}", nn.BatchNorm2d(c_out))
    module.add_module(f"gate{k}", Gate(c_out))


class GatedModel(nn.Module):
    """A network with gates: its author chooses where channels are scored and cut.

    A subclass must

    - take ``num_classes`` as a keyword and pass it to ``super().__init__``,
    - map images (B, 3, H, W) to logits (B, num_classes) in ``forward``,
    - set ``head`` to the name of its classifier, a linear layer, e.g. ``"fc"`` or ``"head.1"``,
    - place each ``Gate`` where a factor of 0 silences a channel that can be cut.

    ``net``, ``num_classes`` and ``kept`` fix all shapes; see ``models.groups.Structure``.
    """

    head: str = ""

    def __init__(self, num_classes: int):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        self.structure = Structure(num_classes, self.head)

    net = property(lambda self: self.structure.net)
    num_classes = property(lambda self: self.structure.num_classes)
    kept = property(lambda self: self.structure.kept)

    def channel_groups(self) -> list[ChannelGroup]:
        """See ``models.channel_groups``.

        Raises ValueError, with its name, if a gate stands where channels cannot be cut.
        """
        return channel_groups(self)

    def group_widths(self) -> dict[str, int]:
        return group_widths(self)

    def live_channels(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """The outputs and the inputs that layers keep once surgery has cut the groups, by layer.

        Channels that no layer reads any more go. A layer that is missing keeps everything.
        """
        return {}, {}

    def init_weights(self) -> None:
        """He initialisation (ICCV 2015, fan-out) of convolutions; norms start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def checkpoint_blocks(self) -> list[nn.Module]:
        """Modules whose activations may be recomputed in the backward pass, to save memory."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock)]

    def pruning_stages(self) -> list[tuple[str, ...]]:
        """The stages of ``--smooth``: the names of the groups that each stage cuts together.

        One stage per residual block: its inner groups, every stream to which it is the first to
        add, and streams that it reads first if no block adds to them (the stem). A group that no
        block touches is a stage of its own.
        """
        blocks = [f"{name}." for name, m in self.named_modules() if isinstance(m, ResidualBlock)]
        stages: dict[str, list[str]] = defaultdict(list)
        for group in self.channel_groups():
            layers = (*group.gates, *group.inputs)
            owners = (block for layer in layers for block in blocks if layer.startswith(block))
            stages[next(owners, group.name)].append(group.name)
        return [tuple(stage) for stage in stages.values()]


def checkpoint_blocks(model: nn.Module) -> list[nn.Module]:
    """What ``GatedModel.checkpoint_blocks`` says; nothing for a network without gates."""
    return model.checkpoint_blocks() if isinstance(model, GatedModel) else []


def pruning_stages(model: nn.Module) -> list[tuple[str, ...]]:
    """What ``GatedModel.pruning_stages`` says; a stage per group for a network without gates."""
    if isinstance(model, GatedModel):
        return model.pruning_stages()
    return [(name,) for name in group_widths(model)]
