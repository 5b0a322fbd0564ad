"""Which channel each element of a tensor belongs to, and which channels hang together."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Traced:
    """A tensor of the forward pass.

    Attributes:
        meta: its shape and type, without values.
        index: the number of the channel that each element belongs to, in the shape of ``meta``. It
            is expanded where it does not vary, so it takes little memory.
        silent: whether the elements of a channel are 0 if the channel is masked.
    """

    meta: Tensor
    index: Tensor
    silent: bool = False


class Numbers:
    """Numbers of channels, as a union-find. Class 0 holds the channels that cannot be cut."""

    def __init__(self):
        self._parent = [0]

    def new(self, count: int) -> Tensor:
        """Numbers (count,) for new channels."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def _root(self, number: int) -> int:
        while (parent := self._parent[number]) != number:
            self._parent[number] = number = self._parent[parent]
        return number

    def unite(self, a: Tensor, b: Tensor) -> None:
        """The channels that meet elementwise are cut together from now on."""
        a, b = torch.broadcast_tensors(a, b)
        for dim in range(a.dim()):
            if a.stride(dim) == b.stride(dim) == 0:
                a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
        differ = a != b
        for pair in torch.stack([a[differ], b[differ]], 1).unique(dim=0).tolist():
            least, other = sorted(map(self._root, pair))
            self._parent[other] = least  # so 0 stays the root of its class

    def fix(self, index: Tensor) -> None:
        """These channels stay."""
        self.unite(index, torch.tensor(0))

    def unite_along(self, index: Tensor, dims: Iterable[int]) -> Tensor:
        """Unite all channels along ``dims``; return ``index`` with size 1 there."""
        for dim in dims:
            first = index.narrow(dim, 0, 1)
            if varies(index, dim):
                self.unite(index, first)
            index = first
        return index

    def classes(self) -> Tensor:
        """The class of every number; 0 for the channels that stay."""
        return torch.tensor([self._root(number) for number in range(len(self._parent))])


def varies(index: Tensor, dim: int) -> bool:
    """Whether elements along ``dim`` belong to different channels."""
    if index.size(dim) == 1 or index.stride(dim) == 0:
        return False
    return bool((index != index.narrow(dim, 0, 1)).any())
