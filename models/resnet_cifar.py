"""Gated ResNets for CIFAR (He et al., CVPR 2016, section 4.2), with option-A shortcuts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.gate import Gate
from models.layers import PadShortcut
from models.residual import ResidualBlock, ResidualModel


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut; the last gate is between the addition and the ReLU."""

    depth = 2

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.gate1 = Gate(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        changes = stride != 1 or in_channels != channels
        self.shortcut = PadShortcut(in_channels, channels, stride) if changes else nn.Identity()
        self.gate2 = Gate(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.gate1(self.bn1(self.conv1(x))))
        return F.relu(self.gate2(self.bn2(self.conv2(out)) + self.shortcut(x)))

    def shortcut_layers(self) -> list[str] | None:
        return None if isinstance(self.shortcut, nn.Identity) else ["shortcut"]


class GateResNetCifar(ResidualModel):
    """ResNet of depth 6n + 2, with n blocks in each of three stages of 16, 32 and 64 channels.

    Shape: (B, 3, H, W) -> (B, num_classes)
    """

    head = "linear"

    def __init__(self, depth: int, num_classes: int = 10):
        super().__init__(num_classes)
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.gate1 = Gate(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.kaiming_normal_(self.linear.weight)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.gate1(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
