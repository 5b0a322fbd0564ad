"""Residual networks: how blocks hang together through the streams that they read and add to."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from models.gate import ChannelGroup, GatedModel


class ResidualBlock(nn.Module):
    """``conv{k} bn{k} gate{k}`` for k = 1..depth; the last gate follows the shortcut's addition."""

    depth: int

    def shortcut_layers(self) -> tuple[list[str], list[str]] | None:
        """What reads the stream before the block, and what writes the one after it.

        Nothing (two empty lists) where there is no shortcut; None where it is the identity, so that
        both are one stream.
        """
        raise NotImplementedError

    def inner_groups(self, name: str) -> Iterator[ChannelGroup]:
        """The channels between the convolutions of this block, which the network calls ``name``."""
        for k in range(1, self.depth):
            conv, norm, gate, reader = (
                f"{name}.conv{k}",
                f"{name}.bn{k}",
                f"{name}.gate{k}",
                f"{name}.conv{k + 1}",
            )
            yield ChannelGroup.around([gate], [norm], [conv], [reader])


class ResidualModel(GatedModel):
    """A stem ``conv1 bn1 gate1``, residual blocks in forward order, and a linear head.

    A residual stream runs through all blocks with an identity shortcut and ends at one whose
    shortcut changes the width, or that has none; everything that adds to it or reads it is cut
    together.

    Attributes:
        last_reader: what reads the last stream; empty where it is the head.
    """

    last_reader: str = ""

    def _blocks(self) -> dict[str, ResidualBlock]:
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, ResidualBlock)
        }

    def _channel_groups(self) -> Iterator[ChannelGroup]:
        stream = _Stream("", 1)
        for name, block in self._blocks().items():
            yield from block.inner_groups(name)
            stream.readers.append(f"{name}.conv1")
            shortcut = block.shortcut_layers()
            if shortcut is None:
                stream.add(f"{name}.", block.depth)
            else:
                readers, writers = ([f"{name}.{layer}" for layer in layers] for layers in shortcut)
                stream.readers += readers
                yield stream.group()
                stream = _Stream(f"{name}.", block.depth)
                stream.others += writers
        stream.readers.append(self.last_reader or self.head)
        yield stream.group()

    def checkpoint_blocks(self) -> list[nn.Module]:
        return list(self._blocks().values())

    def pruning_stages(self) -> list[tuple[str, ...]]:
        """One stage per block: its inner channels and, with the first block that adds to a stream,
        the whole stream.

        A stem that no block adds to goes with the block that reads it; what has nothing to do with
        any block is a stage of its own.
        """
        stages: dict[str, list[str]] = {block: [] for block in self._blocks()}
        for group in self.channel_groups():
            owners = [
                block
                for layers in (group.gates, group.inputs)
                for block in stages
                if any(layer.startswith(f"{block}.") for layer in layers)
            ]
            stages.setdefault(owners[0] if owners else group.name, []).append(group.name)
        return [tuple(stage) for stage in stages.values()]


class _Stream:
    """A residual stream while the walk through the blocks collects who writes and who reads it."""

    def __init__(self, prefix: str, k: int):
        self.gates: list[str] = []
        self.norms: list[str] = []
        self.writers: list[str] = []
        self.others: list[str] = []
        self.readers: list[str] = []
        self.add(prefix, k)

    def add(self, prefix: str, k: int) -> None:
        """The layers ``conv{k} bn{k} gate{k}`` below ``prefix`` write this stream."""
        self.gates.append(f"{prefix}gate{k}")
        self.norms.append(f"{prefix}bn{k}")
        self.writers.append(f"{prefix}conv{k}")

    def group(self) -> ChannelGroup:
        return ChannelGroup.around(self.gates, self.norms, self.writers, self.readers, self.others)
