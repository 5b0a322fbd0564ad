"""Gates: one factor per channel, and how to skip or remove gates that change nothing."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError


class Gate(nn.Module):
    """Multiply every channel by a frozen factor: ``y = gate * x``. All factors are 1 unless masked.

    A gate stands where a factor of 0 has the same effect as removing the channel.
    Shape: (B, C, H, W) -> (B, C, H, W); the parameter ``gate`` is (1, C, 1, 1).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1, channels, 1, 1), requires_grad=False)
        self.folded = False  # True inside ``folded_gates``: return the input unchanged

    def forward(self, x: Tensor) -> Tensor:
        # The cast keeps float16 activations float16.
        return x if self.folded else self.gate.to(x.dtype) * x

    @property
    def out_channels(self) -> int:
        return self.gate.shape[1]

    def extra_repr(self) -> str:
        return str(self.out_channels)

    def is_open(self) -> bool:
        """Whether every factor is 1."""
        return bool((self.gate == 1).all())


@contextmanager
def folded_gates(model: nn.Module) -> Iterator[None]:
    """Skip the multiplication of all open gates inside this context: same bits, less time.

    A gate that requires a gradient still multiplies.
    """
    gates = [m for m in model.modules() if isinstance(m, Gate) and not m.folded]
    folded = [gate for gate in gates if not gate.gate.requires_grad and gate.is_open()]
    for gate in folded:
        gate.folded = True
    try:
        yield
    finally:
        for gate in folded:
            gate.folded = False


def deployable(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, in float32; logits are the same up to float rounding.

    Open gates are removed; gates that mask a channel stay. Every BatchNorm after a convolution is
    merged into it, unless torch.fx cannot trace the forward pass. Weights are channels_last.
    """
    model = copy.deepcopy(model).float().eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, Gate) and module.is_open():
            model.set_submodule(name, nn.Identity())
    with suppress(TraceError):
        model = fuse(model)
    return model.to(memory_format=torch.channels_last)
