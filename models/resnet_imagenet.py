"""Gated ResNets for ImageNet, with torchvision's layers and names (v1.5: stride in the 3x3)."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.gated import GatedModel, ResidualBlock, add_layer

# Depth -> whether the blocks are bottlenecks, and the number of blocks in each stage.
LAYOUTS = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}


class Block(ResidualBlock):
    """Two 3x3 convolutions. With a bottleneck: 1x1, 3x3, and 1x1 to four times the width."""

    def __init__(self, in_channels: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        self.depth, out_channels = (3, 4 * width) if bottleneck else (2, width)
        if bottleneck:
            add_layer(self, 1, in_channels, width, 1)
            add_layer(self, 2, width, width, 3, stride)
            add_layer(self, 3, width, out_channels, 1)
        else:
            add_layer(self, 1, in_channels, width, 3, stride)
            add_layer(self, 2, width, width, 3)
        self.downsample = None  # the shortcut is the identity
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.gate1(self.bn1(self.conv1(x))))
        if self.depth == 3:
            out = F.relu(self.gate2(self.bn2(self.conv2(out))))
            out, last = self.bn3(self.conv3(out)), self.gate3
        else:
            out, last = self.bn2(self.conv2(out)), self.gate2
        return F.relu(last(out + (x if self.downsample is None else self.downsample(x))))


class ResNetImageNet(GatedModel):
    """ResNet-18 to -152 with gates."""

    head = "fc"

    def __init__(self, depth: int, num_classes: int = 1000):
        super().__init__(num_classes)
        bottleneck, blocks = LAYOUTS[depth]
        add_layer(self, 1, 3, 64, 7, stride=2)
        channels = 64
        for s, count in enumerate(blocks):
            width, stage = 64 * 2**s, []
            for b in range(count):
                stage.append(Block(channels, width, 2 if s > 0 and b == 0 else 1, bottleneck))
                channels = 4 * width if bottleneck else width
            self.add_module(f"layer{s + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(channels, num_classes)
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.gate1(self.bn1(self.conv1(x))))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
