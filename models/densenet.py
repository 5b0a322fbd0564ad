"""Gated DenseNets for CIFAR (Huang et al., CVPR 2017), where a gate chooses among the inputs of its
own convolution.

Every layer of a dense block reads all channels made before it and appends its own. What one layer
does without another may still read, so that cutting an input comes in two steps: the layer's
``ChannelSelector`` passes it by, and once all do, nobody needs it to be made (``live_channels``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gate import Gate
from models.groups import ChannelGroup, GatedModel
from models.layers import ChannelSelector

BLOCKS = (1, 2, 3)


class DenseLayer(nn.Module):
    """``bn1 gate1 ReLU conv1`` (3x3), or with a bottleneck 1x1 to four times the growth and 3x3;
    appends ``growth`` channels to its input.

    Shape: (B, C, H, W) -> (B, C + growth, H, W)
    """

    def __init__(self, in_channels: int, growth: int, bottleneck: bool):
        super().__init__()
        self.bottleneck = bottleneck
        self.select = ChannelSelector(in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.gate1 = Gate(in_channels)
        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(4 * growth)
            self.gate2 = Gate(4 * growth)
            self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.gate1(self.bn1(self.select(x)))))
        if self.bottleneck:
            out = self.conv2(F.relu(self.gate2(self.bn2(out))))
        return torch.cat((x, out), 1)


class DenseBlock(nn.Module):
    """``layer``: a Sequential of dense layers, each of which reads what all before it made."""

    def __init__(self, in_channels: int, layers: int, growth: int, bottleneck: bool):
        super().__init__()
        self.layer = nn.Sequential(
            *(DenseLayer(in_channels + i * growth, growth, bottleneck) for i in range(layers))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Transition(nn.Module):
    """``bn1 ReLU gate1 conv1`` (1x1) between two dense blocks, and 2x2 average pooling.

    Shape: (B, C_in, H, W) -> (B, C_out, H // 2, W // 2)
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.select = ChannelSelector(in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.gate1 = Gate(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(self.gate1(F.relu(self.bn1(self.select(x))))), 2)


class GateDenseNet(GatedModel):
    """A stem ``conv1``, three dense blocks with transitions in between, ``bn1 gate1 ReLU`` and
    ``fc``.

    Args:
        depth: of the network, 6n + 4 with a bottleneck and 3n + 4 without, for n layers a block.
        bottleneck: whether a 1x1 convolution precedes each 3x3.
        reduction: share of its channels that a transition keeps.
        growth: channels that a layer adds; the stem makes twice as many.

    Shape: (B, 3, H, W) -> (B, num_classes)
    """

    head = "fc"

    def __init__(
        self,
        depth: int,
        bottleneck: bool = False,
        reduction: float = 1.0,
        growth: int = 12,
        num_classes: int = 10,
    ):
        super().__init__(num_classes)
        layers = (depth - 4) // (6 if bottleneck else 3)
        channels = 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for b in BLOCKS:
            self.add_module(f"block{b}", DenseBlock(channels, layers, growth, bottleneck))
            channels += layers * growth
            if b != BLOCKS[-1]:
                self.add_module(f"trans{b}", Transition(channels, int(channels * reduction)))
                channels = int(channels * reduction)
        self.select = ChannelSelector(channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.gate1 = Gate(channels)
        self.fc = nn.Linear(channels, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trans1(self.block1(self.conv1(x)))
        x = self.block3(self.trans2(self.block2(x)))
        x = F.relu(self.gate1(self.bn1(self.select(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def _channel_groups(self) -> Iterator[ChannelGroup]:
        for name, module in self.named_modules():
            if isinstance(module, (DenseLayer, Transition)):
                yield _selected(f"{name}.", f"{name}.conv1")
            if isinstance(module, DenseLayer) and module.bottleneck:
                gate, norm, conv, reader = (
                    f"{name}.{layer}" for layer in ("gate2", "bn2", "conv1", "conv2")
                )
                yield ChannelGroup.around([gate], [norm], [conv], [reader])
        yield _selected("", self.head)

    def live_channels(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """Once is enough: to cut what a layer makes changes nothing of what it reads.

        A layer that nobody reads at all goes on making its first channel.
        """
        outputs: dict[str, list[int]] = {}
        inputs: dict[str, list[int]] = {}
        for makers, readers in self._dense_blocks():
            selectors = {name: self.get_submodule(name) for name in readers}
            read = {channel for s in selectors.values() for channel in s.channels}
            live: list[int] = []  # of the whole block, in the order of concatenation
            start = 0
            for name in makers:
                width = self.get_submodule(name).out_channels
                keep = [c for c in range(width) if start + c in read] or [0]
                live += [start + c for c in keep]
                start += width
                if len(keep) < width:
                    outputs[name] = keep
            for name, selector in selectors.items():
                seen = [channel for channel in live if channel < selector.in_channels]
                if len(seen) < selector.in_channels:
                    inputs[name] = seen
        return outputs, inputs

    def _dense_blocks(self) -> Iterator[tuple[list[str], list[str]]]:
        """The convolutions that make the channels of each block, and the selectors that read them.

        The i-th selector sees what the first i convolutions made, in this order.
        """
        first = "conv1"
        for b in BLOCKS:
            layers = self.get_submodule(f"block{b}.layer")
            names = [f"block{b}.layer.{i}" for i in range(len(layers))]
            last = "conv2" if layers[0].bottleneck else "conv1"
            after = "" if b == BLOCKS[-1] else f"trans{b}."
            yield (
                [first, *(f"{name}.{last}" for name in names)],
                [*(f"{name}.select" for name in names), f"{after}select"],
            )
            first = f"trans{b}.conv1"

    def checkpoint_blocks(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, DenseLayer)]


def _selected(prefix: str, reader: str) -> ChannelGroup:
    """The inputs of one reader. No convolution makes them for it, so its own stands for them."""
    select, norm, gate = (f"{prefix}{layer}" for layer in ("select", "bn1", "gate1"))
    return ChannelGroup(gate, [gate], [norm], [select, norm, gate], [reader], [reader])
