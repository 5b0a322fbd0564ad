"""Gated MobileNetV2 (Sandler et al., CVPR 2018), for CIFAR: 32x32 pixels become 4x4."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.gate import Gate
from models.gated import GatedModel, ResidualBlock, add_layer

# Expansion, width, blocks, stride of the first block.
TABLE = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),  # stride 2 on ImageNet, as in the stem
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(ResidualBlock):
    """1x1 to ``expansion`` times the width, 3x3 depthwise, 1x1 to the new width; no final ReLU.

    The channels before and behind the depthwise convolution are one group, with two gates. In a
    block of stride 2, ``shortcut`` is None.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int):
        super().__init__()
        width = expansion * in_channels
        add_layer(self, 1, in_channels, width, 1)
        add_layer(self, 2, width, width, 3, stride, groups=width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential() if stride == 1 else None  # empty: the identity
        if stride == 1 and in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))
        self.gate3 = Gate(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.gate1(self.bn1(self.conv1(x))))
        out = F.relu(self.gate2(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return self.gate3(out)


class GateMobileNetV2(GatedModel):
    """A stem, seventeen blocks (``TABLE``), a 1x1 convolution to 1,280 channels, a classifier."""

    head = "linear"

    def __init__(self, num_classes: int = 10):
        super().__init__(num_classes)
        add_layer(self, 1, 3, 32, 3)
        blocks, channels = [], 32
        for expansion, width, count, stride in TABLE:
            for b in range(count):
                blocks.append(InvertedResidual(channels, width, expansion, 1 if b else stride))
                channels = width
        self.layers = nn.Sequential(*blocks)
        add_layer(self, 2, channels, 1280, 1)
        self.linear = nn.Linear(1280, num_classes)

    def init_weights(self) -> None:
        """Keep torch's defaults, as the published code does."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.gate1(self.bn1(self.conv1(x))))
        x = F.relu(self.gate2(self.bn2(self.conv2(self.layers(x)))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
