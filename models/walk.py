"""How the channels run through a forward pass, layer by layer and operation by operation."""

import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as fx_trace
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from models.channels import Numbers, Traced
from models.gate import Gate
from models.layers import ChannelSelector, PadShortcut
from models.operations import RULES, Call, rule_name, traced_in

OURS = (Gate, PadShortcut, ChannelSelector)
LIBRARIES = ("torch", "torchvision.ops", "_operator", "builtins", "models.layers")


class Tracer(fx.Tracer):
    """Records layers of torch and of ours as one operation each; decides by the example's sizes."""

    def __init__(self, example: Tensor):
        super().__init__()
        self.example = example

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, OURS) or super().is_leaf_module(module, name)

    def to_bool(self, proxy: fx.Proxy) -> bool:
        """A branch in the forward pass: taken as the example takes it."""
        graph, copies = fx.Graph(), {}
        graph.graph_copy(self.graph, copies)
        graph.output(copies[proxy.node])
        # fx has replaced these two, to record what runs; here it has to run.
        patched = nn.Module.__call__, nn.Module.__getattr__
        nn.Module.__call__ = fx_trace._orig_module_call
        nn.Module.__getattr__ = fx_trace._orig_module_getattr
        try:
            module = fx.GraphModule(self.root, graph)
            module.graph.eliminate_dead_code()
            return bool(fx.Interpreter(module).run(self.example))
        finally:
            nn.Module.__call__, nn.Module.__getattr__ = patched


class Walk(fx.Interpreter):
    """Follows the channels through the forward pass of ``graph``, on the meta device.

    Attributes:
        touched: (layer, "outputs" or "inputs") -> the channel (C,) at each of its positions.
        notes: why channels stay, and other remarks.
        head: the name of the layer whose outputs are the network's output; empty if there is none.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph):
        super().__init__(fx.GraphModule(model, graph))
        self.layers = dict(model.named_modules())
        self.numbers, self.notes, self.head = Numbers(), [], ""
        self.touched: dict[tuple[str, str], Tensor] = {}
        self.behind: dict[str, set[str]] = defaultdict(set)  # norm -> the operations that follow
        self._made: dict[int, str] = {}  # first number of the outputs of a layer -> its name

    def run_node(self, node: fx.Node) -> Any:
        """The result of an operation, with ``Traced`` for tensors."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.op == "output":
            return self._end(args)
        if node.op in ("placeholder", "get_attr") or not traced_in((args, kwargs)):
            found = super().run_node(node)
            return self._fixed(found) if node.op in ("placeholder", "get_attr") else found
        if node.target is operator.getitem and not isinstance(args[0], Traced):
            return args[0][args[1]]  # one of several results
        args, kwargs = self._fixed((args, kwargs))
        run, name, layer = self._resolve(node)
        metas, options = pytree.tree_map_only(Traced, lambda value: value.meta, (args, kwargs))
        out = run(*metas, **options)
        if not any(isinstance(part, Tensor) for part in pytree.tree_iter(out)):
            return out  # a size
        call = Call(name, node, run, args, kwargs, out)
        if layer is None:
            found = RULES[name](self.numbers, call) if name in RULES else None
        else:
            found = self._layer_rule(layer)(layer, call)
        return self._stay(call) if found is None else found

    def _resolve(self, node: fx.Node) -> tuple[Callable, str, str | None]:
        """The operation to run, its name in RULES, and the layer that it is, if any.

        A function of torch with parameters of a layer, such as F.conv2d(x, self.weight), is that
        layer.
        """
        if node.op == "call_module":
            module = self.layers[node.target]
            known = self._layer_rule(node.target) is not None
            return module, rule_name(type(module)), node.target if known else None
        if node.op == "call_method":
            return lambda x, *a, **k: getattr(x, node.target)(*a, **k), rule_name(node.target), None
        source = (getattr(node.target, "__module__", None) or "torch").split(".")
        known = any(source[: len(p.split("."))] == p.split(".") for p in LIBRARIES)
        name = rule_name(node.target) if known else ""
        if name.startswith(("conv", "linear", "batchnorm", "prelu")):
            others = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, fx.Node)]
            names = {a.target if a.op == "get_attr" else "computed" for a in others}
            owners = {name.rpartition(".")[0] for name in names}
            owner = owners.pop() if len(owners) == 1 else ""
            if f"{owner}.weight" in names and self._layer_rule(owner):
                return node.target, name, owner
        return node.target, name, None

    def _layer_rule(self, name: str) -> Callable | None:
        module = self.layers[name]
        torchs = {_ConvNd: self._convolution, nn.Linear: self._linear, nn.PReLU: self._prelu}
        ours = {Gate: self._gate, PadShortcut: self._remap, ChannelSelector: self._remap}
        kinds = {**torchs, _BatchNorm: self._norm, **ours}
        return next((rule for kind, rule in kinds.items() if isinstance(module, kind)), None)

    def _fixed(self, tree: Any) -> Any:
        """Give number 0 to the channels of all tensors that have none."""

        def fix(tensor: Tensor) -> Traced:
            return Traced(tensor.to("meta"), torch.zeros(1, dtype=torch.long).expand(tensor.shape))

        return pytree.tree_map_only(Tensor, fix, tree)

    def _stay(self, call: Call) -> Any:
        """An operation that we cannot follow: the channels that it meets stay."""
        if any(value.index.any() for value in call.values):
            self.notes.append(f"{_place(call.node)}: its channels stay")
        for value in call.values:
            self.numbers.fix(value.index)
        return self._fixed(call.out)

    def _end(self, args: tuple) -> Any:
        for value in traced_in(args):
            first = int(value.index.flatten()[0]) if value.index.numel() else 0
            self.head = self._made.get(first, "")
            self.numbers.fix(value.index)
        return args

    def _touch(self, layer: str, side: str, channels: Tensor) -> None:
        """Note the channels (C,) of a layer. Where a layer runs twice, both runs are united."""
        if (layer, side) in self.touched:
            self.numbers.unite(self.touched[layer, side], channels)
        else:
            self.touched[layer, side] = channels

    def _channels(self, value: Traced, dim: int = 1) -> Tensor:
        """The channel (C,) at each position of ``dim``."""
        others = [d for d in range(value.index.dim()) if d != dim % value.index.dim()]
        return self.numbers.unite_along(value.index, others).flatten()

    def _reads(self, layer: str, value: Traced, dim: int = 1) -> Tensor:
        """Note that a layer mixes these channels; they must be 0 where they are masked."""
        channels = self._channels(value, dim)
        if not value.silent:
            self.numbers.fix(channels)
        self._touch(layer, "inputs", channels)
        return channels

    def _makes(self, layer: str, out: Tensor, channels: Tensor, dim: int = 1) -> Traced:
        """The result of a layer with these output channels (C,)."""
        self._touch(layer, "outputs", channels)
        self._made.setdefault(int(channels[0]), layer)
        shape = [1] * out.dim()
        shape[dim] = -1
        return Traced(out, channels.view(shape).expand(out.shape), silent=True)

    def _convolution(self, layer: str, call: Call) -> Traced:
        conv, x = self.layers[layer], call.values[0]
        groups, per_group = conv.groups, conv.in_channels // conv.groups
        if is_depthwise(conv):  # input i makes its own outputs; a masked one has no weights
            channels = self._channels(x)
            self._touch(layer, "inputs", channels)
            own = channels.repeat_interleave(conv.out_channels // groups)
            return self._makes(layer, call.out, own)
        parts = self._reads(layer, x).view(groups, per_group)
        self.numbers.unite(parts, parts[:1])
        return self._makes(
            layer, call.out, self.numbers.new(conv.out_channels // groups).repeat(groups)
        )

    def _linear(self, layer: str, call: Call) -> Traced:
        self._reads(layer, call.values[0], -1)
        return self._makes(layer, call.out, self.numbers.new(call.out.size(-1)), -1)

    def _passes(self, layer: str, call: Call, silent: bool) -> Traced:
        x = call.values[0]
        self._touch(layer, "outputs", self._channels(x))
        return Traced(call.out, x.index, silent)

    def _norm(self, layer: str, call: Call) -> Traced:
        if (layer, "outputs") in self.touched:
            self.notes.append(f"{layer}: runs twice, so its gradients mix; its channels stay")
            self.numbers.fix(call.values[0].index)
        self.behind[layer] |= self._followers(call.node)
        return self._passes(layer, call, self.layers[layer].affine)

    def _followers(self, node: fx.Node) -> set[str]:
        """The names of the operations that read the result of a node."""
        found = set()
        for user in node.users:
            module = user.op == "call_module" and self.layers[user.target]
            name = rule_name(type(module) if module else user.target)
            found |= self._followers(user) if name in ("identity", "dropout") else {name}
        return found

    def _prelu(self, layer: str, call: Call) -> Traced:
        x = call.values[0]
        if self.layers[layer].num_parameters == 1:
            return Traced(call.out, x.index, x.silent)
        return self._passes(layer, call, x.silent)

    def _gate(self, layer: str, call: Call) -> Traced:
        return self._passes(layer, call, silent=True)

    def _remap(self, layer: str, call: Call) -> Traced:
        """A layer of ours that copies channels: surgery edits either side on its own."""
        self._reads(layer, call.values[0])
        return self._makes(layer, call.out, self.numbers.new(call.out.size(1)))


def is_depthwise(conv: _ConvNd) -> bool:
    return 1 < conv.groups == conv.in_channels and not isinstance(conv, _ConvTransposeNd)


def _place(node: fx.Node) -> str:
    """A node in words: the layer and the operation."""
    what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node)
    path = list((node.meta.get("nn_module_stack") or {}).values())
    inside = path[-1][0] if path else ""
    return f"{what} in {inside}" if inside and inside != what else f"{what}"
