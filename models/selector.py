"""Which of the channels that go by a layer reads, where it need not read them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.fx.wrap  # one operation to who traces, as its choice follows from the tensor
def take_channels(x: Tensor, index: Tensor) -> Tensor:
    """Channels ``index`` of ``x`` in its memory format, which ``index_select`` forgets there and
    on the way back; from there on, all that meets other tensors would be several times slower.

    Shape: (B, C, H, W) and (K,) -> (B, K, H, W)
    """
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x.index_select(1, index)
    return x.permute(0, 2, 3, 1).index_select(3, index).permute(0, 3, 1, 2)


class ChannelSelector(nn.Module):
    """Let some channels through: all of them at no cost, fewer by one ``index_select``.

    The choice follows from the pruning plan and is not part of the state dict; surgery edits it and
    nothing else (``keep_outputs``, ``keep_inputs`` in utils/surgery.py).

    Shape: (B, in_channels, H, W) -> (B, len(channels), H, W)

    Attributes:
        channels: the input channels that go through, sorted. ``index`` is the same on the network's
            device; the meta device, where costs are counted, has no values.
        in_channels: out of how many.
    """

    index: Tensor

    def __init__(self, in_channels: int):
        super().__init__()
        self.register_buffer("index", torch.empty(0, dtype=torch.long), persistent=False)
        self.choose(range(in_channels), in_channels)

    def choose(self, channels: Sequence[int], in_channels: int) -> None:
        """Let these channels through, out of so many."""
        self.channels, self.in_channels = tuple(channels), in_channels
        self.index = torch.tensor(self.channels, device=self.index.device)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.channels) == self.in_channels:
            return x
        return take_channels(x, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.channels)} of {self.in_channels}"
