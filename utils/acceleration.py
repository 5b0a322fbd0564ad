"""What makes training faster and changes its bits: mixed precision, memory layout, compilation, a
fused optimiser.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Acceleration:
    """How training computes. Weights, evaluation and scores are float32 whatever it says.

    Attributes:
        amp: a name of ``AMP``: convolutions and linear layers compute in that type.
        channels_last: weights, and so activations, lie in memory pixel by pixel instead of plane by
            plane.
        compile: training goes through ``torch.compile``.
        fused: the optimiser's step is one pass over the weights.
    """

    amp: str | None = None
    channels_last: bool = False
    compile: bool = False
    fused: bool = False

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Around the forward pass and the loss of a training step."""
        return torch.autocast(device.type, AMP.get(self.amp), enabled=self.amp is not None)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Keeps gradients within what fp16 can hold; does nothing for the other types."""
        return torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")

    def laid_out(self, model: nn.Module) -> nn.Module:
        """The model, in place, in the memory layout asked for."""
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def compiled(self, network: nn.Module) -> nn.Module:
        """The network as it is trained; weights are shared."""
        if not self.compile:
            return network
        torch.compiler.reset()  # or, after a few stages, torch would give up compiling them
        return torch.compile(network, dynamic=False)

    def __str__(self) -> str:
        words = {
            "channels_last": self.channels_last, "compiled": self.compile,
            "fused optimiser": self.fused,
        }  # fmt: skip
        return ", ".join([self.amp or "float32", *(word for word, on in words.items() if on)])
