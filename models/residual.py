"""Residual networks: which layers share their channels through residual streams."""

from collections.abc import Iterator

from torch import nn

from models.gate import Gate
from models.groups import ChannelGroup, GatedModel


def add_layer(
    module: nn.Module, k: int, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1
) -> None:
    """Add a convolution ``conv{k}`` without bias, a norm ``bn{k}`` and a gate ``gate{k}``."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    module.add_module(f"conv{k}", conv)
    module.add_module(f"bn{k}", nn.BatchNorm2d(c_out))
    module.add_module(f"gate{k}", Gate(c_out))


def _named(prefix: str, *ks: int) -> dict[str, list[str]]:
    """The gates, norms and convolutions ``gate{k}``, ``bn{k}``, ``conv{k}`` under ``prefix``."""
    kinds = {"gates": "gate", "norms": "bn", "convs": "conv"}
    return {kind: [f"{prefix}{name}{k}" for k in ks] for kind, name in kinds.items()}


class ResidualBlock(nn.Module):
    """``conv{k} bn{k} gate{k}`` for k = 1..depth; the last gate stands behind the addition.

    Attributes:
        depth: number of convolutions outside the shortcut.
        coupled: whether all inner channels are one group, because of a depthwise convolution.
    """

    depth: int
    coupled: bool = False

    def shortcut_layers(self) -> list[str] | None:
        """Names, below the block, of the layers of its shortcut, in forward order.

        None for an identity shortcut; an empty list if the block has no shortcut.
        """
        raise NotImplementedError

    def inner_groups(self, name: str) -> Iterator[ChannelGroup]:
        """The groups inside this block. Its name in the network is ``name``."""
        inner = range(1, self.depth)
        for ks in [tuple(inner)] if self.coupled else [(k,) for k in inner]:
            reader = f"{name}.conv{ks[-1] + 1}"
            yield ChannelGroup.around(**_named(f"{name}.", *ks), inputs=[reader])


class ResidualModel(GatedModel):
    """A stem ``conv1 bn1 gate1``, residual blocks, and a linear classifier.

    A stream runs through all blocks with an identity shortcut. It ends at a block whose shortcut is
    a layer, or that has none. All layers that add to a stream or read it form one group.

    Attributes:
        last_reader: the layer that reads the last stream; empty if it is the classifier.
    """

    last_reader: str = ""

    def _blocks(self) -> dict[str, ResidualBlock]:
        """Name -> block, in forward order."""
        return {name: m for name, m in self.named_modules() if isinstance(m, ResidualBlock)}

    def _channel_groups(self) -> Iterator[ChannelGroup]:
        stream, readers, others = _named("", 1), [], []
        for name, block in self._blocks().items():
            yield from block.inner_groups(name)
            readers.append(f"{name}.conv1")
            written = _named(f"{name}.", block.depth)
            layers = block.shortcut_layers()
            if layers is None:
                stream = {role: stream[role] + written[role] for role in stream}
                continue
            shortcut = [f"{name}.{layer}" for layer in layers]  # its first layer reads the stream
            yield ChannelGroup.around(**stream, inputs=readers + shortcut[:1], others=others)
            stream, readers, others = written, [], shortcut
        readers.append(self.last_reader or self.head)
        yield ChannelGroup.around(**stream, inputs=readers, others=others)

    def checkpoint_blocks(self) -> list[nn.Module]:
        return list(self._blocks().values())

    def pruning_stages(self) -> list[tuple[str, ...]]:
        """One stage per block: its inner groups, and every stream to which it is the first to add.

        If no block adds to a stream (the stem), the first block that reads it owns it. A group that
        no block touches is a stage of its own.
        """
        stages: dict[str, list[str]] = {f"{block}.": [] for block in self._blocks()}
        for group in self.channel_groups():
            layers = (*group.gates, *group.inputs)
            blocks = (b for layer in layers for b in stages if layer.startswith(b))
            stages.setdefault(next(blocks, group.name), []).append(group.name)
        return [tuple(stage) for stage in stages.values()]
