"""Layers that copy some of their input channels. Surgery edits which ones.

The choice follows from the pruning plan; it is not part of the state dict.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.fx.wrap  # torch.fx cannot trace the `if`: let it record one call
def take_channels(x: Tensor, index: Tensor) -> Tensor:
    """Like ``x.index_select(1, index)``, but keeps channels_last in forward and backward.

    Otherwise every later operation that meets channels_last tensors is several times slower.
    """
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x.index_select(1, index)
    return x.permute(0, 2, 3, 1).index_select(3, index).permute(0, 3, 1, 2)


class PadShortcut(nn.Module):
    """Option-A shortcut (He et al., CVPR 2016): every second pixel, zero channels on both sides.

    Shape: (B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride))

    ``source`` (C_out,) is the input channel that each output channel copies; -1 for zeros.
    """

    source: Tensor

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.in_channels = in_channels
        self.stride = stride
        side = (out_channels - in_channels) // 2
        source = torch.full((out_channels,), -1)
        source[side : side + in_channels] = torch.arange(in_channels)
        self.register_buffer("source", source, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 1, self.stride)  # like x[:, :, ::s, ::s], but keeps channels_last
        x = F.pad(x, (0, 0, 0, 0, 0, 1))  # one channel of zeros, at index C_in
        return take_channels(x, self.source % (self.in_channels + 1))  # -1 becomes C_in

    @property
    def out_channels(self) -> int:
        return len(self.source)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class ChannelSelector(nn.Module):
    """Pass on some of the channels: no cost if all pass, else one ``index_select``.

    Shape: (B, in_channels, H, W) -> (B, len(channels), H, W)

    ``channels`` are the input channels that pass, sorted. The buffer ``index`` holds the same, but
    has no values on the meta device, where costs are counted.
    """

    index: Tensor

    def __init__(self, in_channels: int):
        super().__init__()
        self.register_buffer("index", torch.empty(0, dtype=torch.long), persistent=False)
        self.choose(range(in_channels), in_channels)

    def choose(self, channels: Sequence[int], in_channels: int) -> None:
        """Pass on ``channels`` out of ``in_channels``."""
        self.channels, self.in_channels = tuple(channels), in_channels
        self.index = torch.tensor(self.channels, device=self.index.device)

    def forward(self, x: Tensor) -> Tensor:
        return x if len(self.channels) == self.in_channels else take_channels(x, self.index)

    @property
    def out_channels(self) -> int:
        return len(self.channels)

    def extra_repr(self) -> str:
        return f"{self.out_channels} of {self.in_channels}"
