"""Gated ResNets for CIFAR (He et al., CVPR 2016, section 4.2), with option-A shortcuts."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.gated import GatedModel, ResidualBlock, add_layer
from models.layers import PadShortcut


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut; the last gate is between the addition and the ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        add_layer(self, 1, in_channels, channels, 3, stride)
        add_layer(self, 2, channels, channels, 3)
        changes = stride != 1 or in_channels != channels
        self.shortcut = PadShortcut(in_channels, channels, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.gate1(self.bn1(self.conv1(x))))
        return F.relu(self.gate2(self.bn2(self.conv2(out)) + self.shortcut(x)))


class GateResNetCifar(GatedModel):
    """ResNet of depth 6n + 2, with n blocks in each of three stages of 16, 32 and 64 channels."""

    head = "linear"

    def __init__(self, depth: int, num_classes: int = 10):
        super().__init__(num_classes)
        add_layer(self, 1, 3, 16, 3)
        channels = 16
        for s, width in enumerate((16, 32, 64), start=1):
            first = BasicBlock(channels, width, stride=1 if s == 1 else 2)
            others = [BasicBlock(width, width, stride=1) for _ in range((depth - 2) // 6 - 1)]
            self.add_module(f"layer{s}", nn.Sequential(first, *others))
            channels = width
        self.linear = nn.Linear(channels, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.kaiming_normal_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.gate1(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
