"""Gated VGG (Simonyan and Zisserman, ICLR 2015) for CIFAR: with BatchNorm and one linear layer."""

from torch import Tensor, nn

from models.gate import Gate
from models.gated import GatedModel

WIDTHS = {
    11: (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    13: (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    16: (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"),
    19: (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"),
}


class GateVGG(GatedModel):
    """``features``: [Conv 3x3 with bias, BatchNorm, Gate, ReLU] per width, and MaxPool for "M"."""

    head = "classifier"

    def __init__(self, depth: int, num_classes: int = 10):
        super().__init__(num_classes)
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS[depth]:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                layers += [nn.BatchNorm2d(width), Gate(width), nn.ReLU(True)]
                channels = width
        # 32x32 images are 1x1 here already; the pooling makes larger ones work.
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(channels, num_classes)
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))
