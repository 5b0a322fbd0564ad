"""How the operations of a forward pass move and combine channels: rules by the operation's name.

A rule takes the walk and a ``Call``, and returns the result as ``Traced``. It returns None where it
cannot follow the channels; then they stay.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from models.channels import Numbers, Traced, varies


@dataclass(frozen=True)
class Call:
    """An operation of the forward pass: ``run(*args, **kwargs)`` gave ``out`` on the meta device.

    ``name`` is its name in RULES.
    In ``args`` and ``kwargs`` tensors are ``Traced``. ``node`` tells numbers that are written into
    the forward pass from sizes that are read off a tensor.
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
        """An argument after the tensor, by its place or its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


def traced_in(tree: Any) -> list[Traced]:
    """Every ``Traced`` in nested tuples, lists and dicts."""
    return [leaf for leaf in pytree.tree_iter(tree) if isinstance(leaf, Traced)]


def elementwise(numbers: Numbers, call: Call) -> Traced:
    """Activations, sums, products: the channels that meet are united."""
    index = call.values[0].index
    for value in call.values[1:]:
        index = _meet(numbers, index, value.index)
    # What does a masked channel become? Try it: 0 where it is silent, another number elsewhere.
    dims = [1] * max(1, call.out.dim())
    tried = call.redo(lambda value: torch.full(dims, 0.0 if value.silent else 0.7))
    silent = any(v.silent for v in call.values) and (tried.is_meta or not tried.any())
    return Traced(call.out, index.expand(call.out.shape), silent)


def _meet(numbers: Numbers, a: Tensor, b: Tensor) -> Tensor:
    """Unite the channels of two tensors. A tensor with one entry for all channels of the other
    cannot lose it, and leaves the other's channels apart.
    """
    dims = max(a.dim(), b.dim())
    a, b = (x[(None,) * (dims - x.dim())] for x in (a, b))
    small = [_is_one_for_all(x, y) for x, y in ((a, b), (b, a))]
    for index, fixed in zip((a, b), small, strict=True):
        if fixed:
            numbers.fix(index)
    a, b = torch.broadcast_tensors(a, b)
    if not any(small):
        numbers.unite(a, b)
    return torch.zeros((), dtype=torch.long).expand(a.shape) if all(small) else b if small[0] else a


def _is_one_for_all(a: Tensor, b: Tensor) -> bool:
    return any(a.size(dim) == 1 and varies(b, dim) for dim in range(a.dim()))


def pixelwise(numbers: Numbers, call: Call) -> Traced | None:
    """Pooling and resizing: (B, C, ...) -> (B, C, ...), each channel on its own."""
    (x,), out = call.values, call.out
    if not isinstance(out, Tensor) or out.shape[:2] != x.index.shape[:2]:
        return None
    index = numbers.unite_along(x.index, range(2, x.index.dim()))
    while index.dim() < out.dim():
        index = index[..., None]
    return Traced(out, index.expand(out.shape), x.silent)


def pad(numbers: Numbers, call: Call) -> Traced | None:
    """Padding of pixels; what is added must be 0 or a copy for a masked channel to stay silent."""
    padded = pixelwise(numbers, call)
    zero = call.arg(2, "mode", "constant") != "constant" or not call.arg(3, "value", 0)
    return padded and Traced(padded.meta, padded.index, padded.silent and zero)


def move(numbers: Numbers, call: Call) -> Traced:
    """Transposes, concatenations and the like: what they do to elements, they do to the numbers."""
    index = call.redo(lambda value: value.index[...])  # a copy of the view: squeeze_ changes it
    return Traced(call.out, index, all(value.silent for value in call.values))


def shuffle(numbers: Numbers, call: Call) -> Traced:
    """Channel j of every part moves next to the others: they are cut together."""
    (x,) = call.values
    groups = call.run.groups if call.node.op == "call_module" else call.arg(1, "groups")
    parts = x.index.unflatten(1, (groups, -1))
    numbers.unite(parts, parts.narrow(1, 0, 1))
    return Traced(call.out, parts.transpose(1, 2).flatten(1, 2), x.silent)


def reshape(numbers: Numbers, call: Call) -> Traced:
    """Views. Channels may go only where their number is read off a tensor, or is -1.

    Where channels are split over several sizes, one of them must be free; channels that differ only
    in the others are cut together, so that what is left still splits evenly.
    """
    (x,), shape = call.values, call.out.shape
    written = _written_sizes(call, len(shape))
    index = x.index.reshape(shape)
    for before, after in _blocks(x.index.shape, shape):
        if not any(varies(x.index, dim) for dim in before):
            continue
        sized = [dim for dim in after if shape[dim] > 1]
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
    if call.name == "unflatten":
        is_module = call.node.op == "call_module"
        dim, sizes = (call.run.dim, call.run.unflattened_size) if is_module else call.node.args[1:]
        dim %= count - len(sizes) + 1
        sizes = [-1] * dim + list(sizes)
    else:
        sizes = [*call.node.args[1:], *call.node.kwargs.values()]
        sizes = [part for size in sizes for part in (size if _is_list(size) else [size])]
    written = [isinstance(size, int) and size != -1 for size in sizes]
    return (written + [False] * count)[:count]  # view(x.shape) has one size that is read off


def _is_list(arg: Any) -> bool:
    return isinstance(arg, (tuple, list))


def _blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The dimensions of two shapes of one tensor, in the smallest parts of equal size."""
    i = o = 0
    while i < len(before) or o < len(after):
        a, b, start_i, start_o = 1, 1, i, o
        while a != b or (i == start_i and o == start_o):
            if (a <= b and i < len(before)) or o == len(after):
                a, i = a * before[i], i + 1
            else:
                b, o = b * after[o], o + 1
        yield list(range(start_i, i)), list(range(start_o, o))


def split(numbers: Numbers, call: Call) -> tuple[Traced, ...] | None:
    """Equal parts of the channel axis: channel j of every part is cut with it."""
    x, dim = call.values[0], call.arg(2, "dim", 0)
    parts = call.redo(lambda value: value.index)
    if varies(x.index, dim):
        size = call.node.args[1] if len(call.node.args) > 1 else None
        written = call.name == "split" and not isinstance(size, fx.Node)
        if written or len({part.shape for part in parts}) > 1:
            return None
        for part in parts[1:]:
            numbers.unite(parts[0], part)
    pairs = zip(call.out, parts, strict=True)
    return tuple(Traced(meta, part, x.silent) for meta, part in pairs)


def take(numbers: Numbers, call: Call) -> Traced | None:
    """Indexing: not along the channels, unless all of them are taken."""
    x, key = call.args
    if traced_in(key):
        return None
    key, dim = key if isinstance(key, tuple) else (key,), 0
    skipped = x.index.dim() - sum(k is not None and k is not Ellipsis for k in key)
    for k in key:
        if k is Ellipsis:
            dim += skipped
        elif k is not None:
            if k != slice(None) and varies(x.index, dim):
                return None
            dim += 1
    return Traced(call.out, call.redo(lambda value: value.index), x.silent)


def reduce(numbers: Numbers, call: Call) -> Traced | None:
    """Means, sums and maxima over anything but channels; also sums over channels.

    Softmax too: it keeps its dimensions.
    """
    x, out = call.values[0], call.out
    if not isinstance(out, Tensor) or len(call.values) > 1:
        return None
    dims = call.run.dim if call.node.op == "call_module" else call.arg(1, "dim")
    dims = range(x.index.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    if any(varies(x.index, dim) for dim in dims):
        if call.name != "sum" or not x.silent:
            return None
        return Traced(out, torch.zeros((), dtype=torch.long).expand(out.shape))
    if "softmax" in call.name:
        return Traced(out, x.index)
    index = x.index
    for dim in sorted((d % index.dim() for d in dims), reverse=True):
        index = index.narrow(dim, 0, 1) if out.dim() == x.index.dim() else index.select(dim, 0)
    return Traced(out, index, x.silent)


_NAMES = {
    elementwise: "relu relu6 leakyrelu silu gelu hardswish hardtanh tanh elu celu selu mish rrelu"
    " softsign tanhshrink hardshrink softshrink threshold sigmoid hardsigmoid softplus logsigmoid"
    " logit identity dropout dropout1d dropout2d dropout3d"
    " featuredropout stochasticdepth contiguous clone detach to float double half bfloat16 type"
    " typeas neg abs sqrt rsqrt square exp expm1 log log1p sin cos erf clamp clampmin clampmax"
    " add sub mul div truediv iadd isub imul itruediv radd rsub multiply divide subtract maximum"
    " minimum pow",
    pixelwise: "avgpool1d avgpool2d avgpool3d maxpool1d maxpool2d maxpool3d lppool1d lppool2d"
    " adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d adaptivemaxpool1d adaptivemaxpool2d"
    " adaptivemaxpool3d interpolate upsample upsamplingnearest2d upsamplingbilinear2d zeropad1d"
    " zeropad2d zeropad3d reflectionpad1d reflectionpad2d replicationpad2d circularpad2d",
    pad: "pad",
    move: "cat concat concatenate stack permute transpose swapaxes swapdims movedim moveaxis t"
    " unsqueeze squeeze expand expandas flip repeat pixelshuffle pixelunshuffle",
    shuffle: "channelshuffle",
    reshape: "view reshape flatten unflatten viewas reshapeas",
    split: "chunk split tensorsplit",
    take: "getitem",
    reduce: "mean sum amax amin softmax logsoftmax",
}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}


def rule_name(operation: Any) -> str:
    """``nn.AdaptiveAvgPool2d``, ``F.adaptive_avg_pool2d`` and ``add_`` -> the name in RULES."""
    name = operation if isinstance(operation, str) else getattr(operation, "__name__", "")
    return name.replace("_", "").lower()
