"""How the operations of a forward pass move and combine channels: rules by the operation's name.

A rule takes the numbers of the channels and a ``Call``, and returns the result as ``Traced``. It
returns None where it cannot follow the channels; then they stay.
"""

import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Traced:
    """A tensor of the forward pass.

    Attributes:
        meta: its shape and type, without values.
        index: the number of the channel of each element, in the shape of ``meta``. It is expanded
            where it does not vary, so it takes little memory.
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
        self._parent += range(first, first + count)
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
            self.unite(index, first)
            index = first
        return index

    def classes(self) -> Tensor:
        """The class of every number; 0 for the channels that stay."""
        return torch.tensor([self._root(number) for number in range(len(self._parent))])


def varies(index: Tensor, dim: int) -> bool:
    """Whether elements along ``dim`` belong to different channels."""
    return index.stride(dim) != 0 and bool((index != index.narrow(dim, 0, 1)).any())


@dataclass(frozen=True)
class Call:
    """An operation of the forward pass: ``run(*args, **kwargs)`` gave ``out`` on the meta device.

    ``name`` is its name in RULES. In ``args`` and ``kwargs`` tensors are ``Traced``. ``node`` tells
    numbers that are written into the forward pass from sizes that are read off a tensor.
    """

    name: str
    node: fx.Node
    run: Callable
    args: tuple
    kwargs: dict[str, Any]
    out: Any

    @property
    def values(self) -> list[Traced]:
        return traced_in((self.args, self.kwargs))

    def redo(self, replace: Callable[[Traced], Tensor]) -> Any:
        """Run the operation on other tensors."""
        args, kwargs = pytree.tree_map_only(Traced, replace, (self.args, self.kwargs))
        return self.run(*args, **kwargs)

    def arg(self, place: int, name: str, default: Any = None) -> Any:
        """A setting of a layer, or an argument of a function by its place or its name."""
        if isinstance(self.run, nn.Module):
            return getattr(self.run, name)
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


def traced_in(tree: Any) -> list[Traced]:
    """Every ``Traced`` in nested tuples, lists and dicts."""
    return [leaf for leaf in pytree.tree_iter(tree) if isinstance(leaf, Traced)]


def elementwise(numbers: Numbers, call: Call) -> Traced:
    """Activations, sums, products: the channels that meet are united.

    A tensor with one entry for all channels of another cannot lose it, and leaves these apart.
    """
    dims, united = call.out.dim(), []
    indices = [value.index[(None,) * (dims - value.index.dim())] for value in call.values]
    for index in indices:
        single = [dim for dim in range(dims) if index.size(dim) == 1]
        if any(varies(other, dim) for other in indices for dim in single):
            numbers.fix(index)
        else:
            united.append(index)
            numbers.unite(united[0], index)
    index = united[0] if united else torch.tensor(0)
    # What does a masked channel become? Try it: 0 where it is silent, another number elsewhere.
    ones = [1] * max(1, dims)
    tried = call.redo(lambda value: torch.full(ones, 0.0 if value.silent else 0.7))
    silent = any(v.silent for v in call.values) and (tried.is_meta or not tried.any())
    return Traced(call.out, index.expand(call.out.shape), silent)


def pixelwise(numbers: Numbers, call: Call) -> Traced | None:
    """Pooling and resizing: (B, C, ...) -> (B, C, ...), each channel on its own."""
    (x,), out = call.values, call.out
    if not isinstance(out, Tensor) or out.shape[:2] != x.index.shape[:2]:
        return None
    index = numbers.unite_along(x.index, range(2, x.index.dim()))
    return Traced(out, index.expand(out.shape), x.silent)


def pad(numbers: Numbers, call: Call) -> Traced | None:
    """Padding of pixels; what is added must be 0 or a copy for a masked channel to stay silent."""
    padded = pixelwise(numbers, call)
    zero = call.arg(2, "mode", "constant") != "constant" or not call.arg(3, "value", 0)
    return padded and replace(padded, silent=padded.silent and zero)


def move(numbers: Numbers, call: Call) -> Traced:
    """Transposes, concatenations and the like: what they do to elements, they do to the numbers."""
    index = call.redo(lambda value: value.index[...])  # a copy of the view: squeeze_ changes it
    return Traced(call.out, index, all(value.silent for value in call.values))


def shuffle(numbers: Numbers, call: Call) -> Traced:
    """Channel j of every part moves next to the others: they are cut together."""
    x = call.values[0]
    parts = x.index.unflatten(1, (call.arg(1, "groups"), -1))
    numbers.unite(parts, parts.narrow(1, 0, 1))
    return Traced(call.out, parts.transpose(1, 2).flatten(1, 2), x.silent)


def reshape(numbers: Numbers, call: Call) -> Traced:
    """Views. Channels may go only where their number is read off a tensor, or is -1.

    Where channels are split over several sizes, one of them must be free; channels that differ only
    in the others are cut together, so that what is left still splits evenly.
    """
    (x,), shape = call.values, call.out.shape
    index = x.index.reshape(shape)
    written = _written_sizes(call, len(shape))
    parts, new_parts = _parts(x.index.shape, shape)
    for part in {parts[dim] for dim in range(len(parts)) if varies(x.index, dim)}:
        sized = [dim for dim in range(len(shape)) if new_parts[dim] == part and shape[dim] > 1]
        free = [dim for dim in sized if not written[dim]]
        if len(free) == 1:
            numbers.unite_along(index, [dim for dim in sized if dim not in free])
        else:
            numbers.fix(x.index)
    return Traced(call.out, index, x.silent)


def _written_sizes(call: Call, count: int) -> list[bool]:
    """Which sizes of a view are numbers in the forward pass, other than -1."""
    if call.name == "flatten":
        return [False] * count
    sizes = pytree.tree_leaves((call.node.args[1:], call.node.kwargs))
    if call.name == "unflatten":
        is_layer = isinstance(call.run, nn.Module)
        sizes = [*call.run.unflattened_size] if is_layer else sizes[1:]
        sizes = [-1] * (call.arg(1, "dim") % (count - len(sizes) + 1)) + sizes
    written = [isinstance(size, int) and size != -1 for size in sizes]
    return (written + [False] * count)[:count]  # view(x.shape) has one size that is read off


def _parts(*shapes: Sequence[int]) -> list[list[int]]:
    """The part in which each dimension lies, for two shapes of one tensor that are split into the
    smallest parts of equal size. A part is named after the elements up to its end.
    """
    ends = [list(accumulate(shape, operator.mul)) for shape in shapes]
    common = sorted(set(ends[0]).intersection(ends[1]))
    return [[common[bisect_left(common, end)] for end in row] for row in ends]


def split(numbers: Numbers, call: Call) -> tuple[Traced, ...] | None:
    """Equal parts of the channel axis: channel j of every part is cut together."""
    x, dim = call.values[0], call.arg(2, "dim", 0)
    parts = call.redo(lambda value: value.index)
    if varies(x.index, dim):
        is_read = any(isinstance(size, fx.Node) for size in call.node.args[1:2])
        if call.name == "split" and not is_read or len({part.shape for part in parts}) > 1:
            return None
        for part in parts[1:]:
            numbers.unite(parts[0], part)
    return tuple(Traced(meta, part, x.silent) for meta, part in zip(call.out, parts, strict=True))


def take(numbers: Numbers, call: Call) -> Traced | None:
    """Indexing: not along the channels, unless all of them are taken."""
    x, key = call.args
    if traced_in(key):
        return None
    keys = [k for k in (key if isinstance(key, tuple) else (key,)) if k is not None]
    if Ellipsis in keys:
        place, missing = keys.index(Ellipsis), x.index.dim() - len(keys) + 1
        keys[place : place + 1] = [slice(None)] * missing
    if any(k != slice(None) and varies(x.index, dim) for dim, k in enumerate(keys)):
        return None
    return Traced(call.out, call.redo(lambda value: value.index), x.silent)


def reduce(numbers: Numbers, call: Call) -> Traced | None:
    """Means, sums, maxima and softmax over anything but channels; also sums over channels."""
    x, out = call.values[0], call.out
    dims = call.arg(1, "dim")
    dims = range(x.index.dim()) if dims is None else pytree.tree_leaves(dims)
    if any(varies(x.index, dim) for dim in dims):
        summed = call.name == "sum" and x.silent
        return Traced(out, torch.tensor(0).expand(out.shape)) if summed else None
    if "softmax" in call.name:
        return Traced(out, x.index)
    index = x.index
    for dim in dims:
        index = index.narrow(dim, 0, 1)
    return Traced(out, index.reshape(out.shape), x.silent)


_NAMES = {
    elementwise: "relu relu6 leakyrelu silu gelu hardswish hardtanh tanh elu celu selu mish rrelu"
    " softsign tanhshrink hardshrink softshrink threshold sigmoid hardsigmoid softplus logsigmoid"
    " logit identity dropout dropout1d dropout2d dropout3d featuredropout stochasticdepth"
    " contiguous clone detach to float double half bfloat16 type typeas neg abs sqrt rsqrt square"
    " exp expm1 log log1p sin cos erf clamp clampmin clampmax add sub mul div truediv iadd isub"
    " imul itruediv radd rsub multiply divide subtract maximum minimum pow",
    pixelwise: "avgpool1d avgpool2d avgpool3d maxpool1d maxpool2d maxpool3d lppool1d lppool2d"
    " adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d adaptivemaxpool1d adaptivemaxpool2d"
    " adaptivemaxpool3d interpolate upsample upsamplingnearest2d upsamplingbilinear2d zeropad1d"
    " zeropad2d zeropad3d reflectionpad1d reflectionpad2d replicationpad2d circularpad2d",
    pad: "pad",
    move: "cat concat concatenate stack permute transpose swapaxes swapdims movedim moveaxis t"
    " unsqueeze squeeze expand expandas flip repeat pixelshuffle pixelunshuffle",
    shuffle: "channelshuffle",
    reshape: "view reshape flatten unflatten",
    split: "chunk split tensorsplit",
    take: "getitem",
    reduce: "mean sum amax amin softmax logsoftmax",
}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
