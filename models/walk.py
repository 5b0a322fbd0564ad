"""How the channels run through a forward pass, layer by layer and operation by operation."""

import operator
from collections import defaultdict
from collections.abc import Callable
from functools import singledispatchmethod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as fx_trace
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from models.gate import Gate
from models.layers import ChannelSelector, PadShortcut
from models.operations import RULES, Call, Numbers, Traced, traced_in

LIBRARIES = ("torch.", "torchvision.ops.", "_operator.", "builtins.")


class Tracer(fx.Tracer):
    """Records layers of torch and of ours as one operation each."""

    def __init__(self, example: Tensor):
        super().__init__()
        self.example = example

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        ours = isinstance(module, (Gate, PadShortcut, ChannelSelector))
        return ours or super().is_leaf_module(module, name)

    def to_bool(self, proxy: fx.Proxy) -> bool:
        """Take a branch in the forward pass as the example takes it."""
        graph, copies = fx.Graph(), {}
        graph.graph_copy(self.graph, copies)
        graph.output(copies[proxy.node])
        # fx has replaced these two, to record what runs; here it has to run.
        patched = nn.Module.__call__, nn.Module.__getattr__
        nn.Module.__call__ = fx_trace._orig_module_call
        nn.Module.__getattr__ = fx_trace._orig_module_getattr
        try:
            return bool(fx.Interpreter(fx.GraphModule(self.root, graph)).run(self.example))
        finally:
            nn.Module.__call__, nn.Module.__getattr__ = patched


class Walk(fx.Interpreter):
    """Follows the channels through the forward pass of ``graph``, on the meta device.

    Attributes:
        touched: (layer, "outputs" or "inputs") -> the channel (C,) at each of its positions.
        behind: norm -> the names of the operations that follow.
        notes: why channels stay, and other remarks.
        head: the name of the layer whose outputs are the network's output; empty if there is none.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph):
        super().__init__(fx.GraphModule(model, graph))
        self.layers = dict(model.named_modules())
        self.numbers, self.notes, self.head = Numbers(), [], ""
        self.touched: dict[tuple[str, str], Tensor] = {}
        self.behind: dict[str, set[str]] = defaultdict(set)
        self._made = {0: ""}  # first number of the outputs of a layer -> its name

    def run_node(self, node: fx.Node) -> Any:
        """The result of an operation, with ``Traced`` for tensors."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if not traced_in((args, kwargs)) or node.op == "output":
            return _fixed(super().run_node(node))
        if node.target is operator.getitem and not isinstance(args[0], Traced):
            return args[0][args[1]]  # one of several results
        run, name, layer = self._resolve(node)
        metas, options = pytree.tree_map_only(Traced, lambda value: value.meta, (args, kwargs))
        out = run(*metas, **options)
        if not any(isinstance(part, Tensor) for part in pytree.tree_iter(out)):
            return out  # a size
        call = Call(name, node, run, args, kwargs, out)
        found = self._run_layer(self.layers[layer], layer, call) if layer else None
        if found is None and name in RULES:
            found = RULES[name](self.numbers, call)
        return self._stay(call) if found is None else found

    def output(self, target: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        for value in traced_in(args):
            first = int(value.index.flatten()[0]) if value.index.numel() else 0
            self.head = self._made.get(first, "")
            self.numbers.fix(value.index)
        return args

    def _resolve(self, node: fx.Node) -> tuple[Callable, str, str]:
        """What to run, its name in RULES, and the layer that it is, or "".

        A function of torch with the weight of a layer, such as F.conv2d(x, self.weight), is that
        layer.
        """
        name = self._name(node)
        if node.op == "call_module":
            return self.layers[node.target], name, node.target
        if node.op == "call_method":
            return getattr(Tensor, node.target), name, ""
        source, layer = getattr(node.target, "__module__", None) or "torch", ""
        if not f"{source}.".startswith(LIBRARIES):
            name = ""
        if name.startswith(("conv", "linear", "batchnorm", "prelu")):
            others = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, fx.Node)]
            names = {a.target if a.op == "get_attr" else "computed" for a in others}
            owners = {name.rpartition(".")[0] for name in names}
            if len(owners) == 1 and f"{min(owners)}.weight" in names:
                layer = min(owners)
        return node.target, name, layer

    def _name(self, node: fx.Node) -> str:
        """``nn.AdaptiveAvgPool2d``, ``F.adaptive_avg_pool2d`` and ``add_`` as RULES spells them."""
        target = type(self.layers[node.target]) if node.op == "call_module" else node.target
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        return name.replace("_", "").lower()

    def _stay(self, call: Call) -> Any:
        """An operation that we cannot follow: the channels that it meets stay."""
        if any(value.index.any() for value in call.values):
            self.notes.append(f"{_place(call.node)}: its channels stay")
        for value in call.values:
            self.numbers.fix(value.index)
        return _fixed(call.out)

    def _touch(self, layer: str, side: str, channels: Tensor) -> None:
        """Note the channels (C,) of a layer. If it runs twice, those of both runs are united."""
        self.numbers.unite(self.touched.setdefault((layer, side), channels), channels)

    def _channels(self, value: Traced, dim: int = 1) -> Tensor:
        """The channel (C,) at each position of ``dim``."""
        index = value.index.movedim(dim, 0)
        return self.numbers.unite_along(index, range(1, index.dim())).flatten()

    def _reads(self, layer: str, value: Traced, dim: int = 1) -> Tensor:
        """The channels (C,) that a layer mixes; they must be 0 where they are masked."""
        channels = self._channels(value, dim)
        if not value.silent:
            self.numbers.fix(channels)
        self._touch(layer, "inputs", channels)
        return channels

    def _makes(self, layer: str, out: Tensor, channels: Tensor, dim: int = 1) -> Traced:
        """The result of a layer with these output channels (C,)."""
        self._touch(layer, "outputs", channels)
        self._made.setdefault(int(channels[0]), layer)
        index = channels.expand(out.movedim(dim, -1).shape).movedim(-1, dim)
        return Traced(out, index, silent=True)

    def _passes(self, layer: str, call: Call, silent: bool) -> Traced:
        """The result of a layer that works on each channel alone."""
        x = call.values[0]
        self._touch(layer, "outputs", self._channels(x))
        return Traced(call.out, x.index, silent)

    @singledispatchmethod
    def _run_layer(self, module: nn.Module, layer: str, call: Call) -> Traced | None:
        """The result of a layer that surgery cuts; None for other modules."""

    @_run_layer.register
    def _(self, conv: _ConvNd, layer: str, call: Call) -> Traced:
        x, groups, out_channels = call.values[0], conv.groups, conv.out_channels
        if is_depthwise(conv):  # input i makes its own outputs; a masked one has no weights
            channels = self._channels(x)
            self._touch(layer, "inputs", channels)
            return self._makes(layer, call.out, channels.repeat_interleave(out_channels // groups))
        parts = self._reads(layer, x).view(groups, -1)
        self.numbers.unite(parts, parts[:1])
        made = self.numbers.new(out_channels // groups).repeat(groups)
        return self._makes(layer, call.out, made)

    @_run_layer.register
    def _(self, linear: nn.Linear, layer: str, call: Call) -> Traced:
        self._reads(layer, call.values[0], -1)
        return self._makes(layer, call.out, self.numbers.new(linear.out_features), -1)

    @_run_layer.register(PadShortcut)
    @_run_layer.register(ChannelSelector)
    def _(self, remap: nn.Module, layer: str, call: Call) -> Traced:
        """A layer of ours that copies channels: surgery edits either side on its own."""
        self._reads(layer, call.values[0])
        return self._makes(layer, call.out, self.numbers.new(remap.out_channels))

    @_run_layer.register
    def _(self, norm: _BatchNorm, layer: str, call: Call) -> Traced:
        if (layer, "outputs") in self.touched:
            self.notes.append(f"{layer}: runs twice, so its gradients mix; its channels stay")
            self.numbers.fix(call.values[0].index)
        self.behind[layer] |= self._followers(call.node)
        return self._passes(layer, call, norm.affine)

    @_run_layer.register
    def _(self, prelu: nn.PReLU, layer: str, call: Call) -> Traced:
        x = call.values[0]
        if prelu.num_parameters == 1:
            return Traced(call.out, x.index, x.silent)
        return self._passes(layer, call, x.silent)

    @_run_layer.register
    def _(self, gate: Gate, layer: str, call: Call) -> Traced:
        return self._passes(layer, call, silent=True)

    def _followers(self, node: fx.Node) -> set[str]:
        """The names of the operations that read the result of a node."""
        found = set()
        for user in node.users:
            name = self._name(user)
            found |= self._followers(user) if name in ("identity", "dropout") else {name}
        return found


def _fixed(tree: Any) -> Any:
    """``Traced`` for all tensors; their channels have number 0."""
    zero = torch.zeros(1, dtype=torch.long)
    return pytree.tree_map_only(Tensor, lambda t: Traced(t.to("meta"), zero.expand(t.shape)), tree)


def is_depthwise(conv: _ConvNd) -> bool:
    return 1 < conv.groups == conv.in_channels and not isinstance(conv, _ConvTransposeNd)


def _place(node: fx.Node) -> str:
    """A node in words: the layer and the operation."""
    what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node)
    path = list((node.meta.get("nn_module_stack") or {}).values())
    inside = path[-1][0] if path else ""
    return f"{what} in {inside}" if inside and inside != what else f"{what}"
