"""Gated VGG (Simonyan and Zisserman, ICLR 2015) for CIFAR: with BatchNorm and one linear layer."""

from torch import Tensor, nn

from models.gate import Gate
from models.gated import GatedModel

WIDTHS = (64, 128, 256, 512, 512)
# Depth -> the number of layers of each width.
COUNTS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class GateVGG(GatedModel):
    """``features``: [Conv 3x3 with bias, BatchNorm, Gate, ReLU] per layer, MaxPool per width."""

    head = "classifier"

    def __init__(self, depth: int, num_classes: int = 10):
        super().__init__(num_classes)
        layers: list[nn.Module] = []
        channels = 3
        for width, count in zip(WIDTHS, COUNTS[depth], strict=True):
            for _ in range(count):
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                layers += [nn.BatchNorm2d(width), Gate(width), nn.ReLU(True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        # 32x32 images are 1x1 here already; the pooling makes larger ones work.
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(channels, num_classes)
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))
