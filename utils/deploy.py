"""The network that a user deploys: no gates, BatchNorm folded into convolutions, channels last."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.optimization import fuse

from models.gate import Gate, GatedModel


def deployable(model: GatedModel) -> GraphModule:
    """A copy of ``model`` for inference, with the same logits to float rounding.

    Gates of nothing but ones go (others, of a masked network, stay); every BatchNorm that follows a
    convolution becomes part of its weights and bias; weights lie in memory pixel by pixel, so that
    activations do, too.

    Shape: (B, 3, H, W) -> (B, num_classes), float32.
    """
    model = copy.deepcopy(model).float().eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, Gate) and bool((module.gate == 1).all()):
            model.set_submodule(name, nn.Identity())
    return fuse(model).to(memory_format=torch.channels_last)
