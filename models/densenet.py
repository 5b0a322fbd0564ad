"""Gated DenseNets for CIFAR (Huang et al., CVPR 2017).

Each layer of a dense block reads all channels made before it and appends its own. A gate says which
of them its layer needs; its ``ChannelSelector`` skips the others. Once all readers skip a channel,
the layer that makes it stops making it (``live_channels``).
"""

from collections import OrderedDict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gate import Gate
from models.gated import GatedModel
from models.layers import ChannelSelector

BLOCKS = (1, 2, 3)
GROWTH = 12  # channels that each dense layer adds


class DenseLayer(nn.Module):
    """``bn1 gate1 ReLU conv1`` (3x3). With a bottleneck, ``conv1`` is 1x1 to 4 x GROWTH channels,
    and ``bn2 gate2 ReLU conv2`` (3x3) follows. Appends its outputs to the input.

    Shape: (B, C, H, W) -> (B, C + GROWTH, H, W)
    """

    def __init__(self, in_channels: int, bottleneck: bool):
        super().__init__()
        self.bottleneck = bottleneck
        self.select = ChannelSelector(in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.gate1 = Gate(in_channels)
        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, 4 * GROWTH, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(4 * GROWTH)
            self.gate2 = Gate(4 * GROWTH)
            self.conv2 = nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.gate1(self.bn1(self.select(x)))))
        if self.bottleneck:
            out = self.conv2(F.relu(self.gate2(self.bn2(out))))
        return torch.cat((x, out), 1)


class Transition(nn.Module):
    """``bn1 ReLU gate1 conv1`` (1x1) between two dense blocks, then 2x2 average pooling.

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
    """``conv1``, three dense blocks with transitions between them, ``bn1 gate1 ReLU`` and ``fc``.

    Args:
        depth: 3n + 4 for n layers per block; 6n + 4 in a DenseNet-BC.
        bc: build a DenseNet-BC: its layers have a bottleneck, its transitions halve the channels.
    """

    head = "fc"

    def __init__(self, depth: int, bc: bool = False, num_classes: int = 10):
        super().__init__(num_classes)
        channels = 2 * GROWTH
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for b in BLOCKS:
            layers = []
            for _ in range((depth - 4) // (6 if bc else 3)):
                layers.append(DenseLayer(channels, bottleneck=bc))
                channels += GROWTH
            block = nn.Sequential(OrderedDict(layer=nn.Sequential(*layers)))
            self.add_module(f"block{b}", block)
            if b != BLOCKS[-1]:
                out_channels = channels // 2 if bc else channels
                self.add_module(f"trans{b}", Transition(channels, out_channels))
                channels = out_channels
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

    def live_channels(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """The outputs that some selector still reads, and the inputs that selectors then get.

        A layer whose outputs nobody reads keeps its first one. One pass suffices: removing a
        layer's outputs never changes its inputs.
        """
        outputs, inputs = {}, {}
        for makers, readers in self._dense_blocks():
            selectors = {name: self.get_submodule(name) for name in readers}
            read = {channel for s in selectors.values() for channel in s.channels}
            live, start = [], 0  # both count the channels of the whole block, in order
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
        """For each block: the convolutions that make its channels, and the selectors that read
        them. The i-th selector reads what the first i convolutions make, in this order.
        """
        first = "conv1"
        for b in BLOCKS:
            layers = self.get_submodule(f"block{b}.layer")
            names = [f"block{b}.layer.{i}" for i in range(len(layers))]
            last = "conv2" if layers[0].bottleneck else "conv1"
            after = "select" if b == BLOCKS[-1] else f"trans{b}.select"
            yield [first, *(f"{n}.{last}" for n in names)], [*(f"{n}.select" for n in names), after]
            first = f"trans{b}.conv1"

    def checkpoint_blocks(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, DenseLayer)]
