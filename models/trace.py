"""The channel groups of any network, read off its forward pass.

torch.fx records the operations. Every output channel of a convolution or linear layer gets a
number, and every tensor an index of the same shape that says which channel an element belongs to.
Operations move and combine these indices (models/walk.py, models/operations.py). What hangs
together in the end is cut together. The network itself stays as it is: fx only reads.
"""

import copy
from collections import Counter, defaultdict
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from models.gate import Gate
from models.groups import ChannelGroup, Places, Structure, structure
from models.operations import traced_in
from models.walk import Tracer, Walk

# Which norms do not score is the published rule: those on shortcuts.
UNSCORED = ("downsample", "shortcut")
RELU = {"relu", "relu6", "leakyrelu", "prelu"}


def trace(model: nn.Module, example: Tensor, net: str = "") -> nn.Module:
    """Read the channel groups off the forward pass of ``model``, and return the model.

    It gets one plain attribute, ``structure``; nothing else about it changes. A network is traced
    once, before anything is cut.

    Args:
        model: any network of one input, with BatchNorm and in float32.
        example: an input of the usual shape, such as ``torch.empty(1, 3, 224, 224)``; only its
            shape matters.
        net: what ``models.build_model`` and checkpoints call the network.

    Raises ValueError if torch.fx cannot trace the forward pass, or if no channel can be cut.
    """
    groups, notes, head, num_classes = read_groups(model, example)
    if not groups:
        why = "; ".join(notes) or "it has no BatchNorm whose channels can go"
        raise ValueError(f"{net or type(model).__name__} cannot be pruned: {why}")
    model.structure = Structure(num_classes, head, net, groups, notes)
    return model


def channel_groups(model: nn.Module) -> list[ChannelGroup]:
    """The channel groups of a network as it is now, in forward order.

    A network with gates that ``models.build_model`` has not made is traced at the first call.
    Raises TypeError for a network without gates that nobody has traced.
    """
    return _known(model).present()


def group_widths(model: nn.Module) -> dict[str, int]:
    """Number of channels of every group, by group name."""
    known = _known(model)
    return {g.name: len(known.kept.get(g.name, range(g.width))) for g in known.groups}


def _known(model: nn.Module) -> Structure:
    known = structure(model)
    if known.groups is None:
        known.groups, known.notes = read_gated(model)
    return known


def read_gated(model: nn.Module) -> tuple[tuple[ChannelGroup, ...], tuple[str, ...]]:
    """The channel groups of an unpruned network with gates, and notes; see ``read_groups``."""
    groups, notes, *_ = read_groups(model, torch.empty(1, 3, 64, 64))
    return groups, notes


def read_groups(
    model: nn.Module, example: Tensor
) -> tuple[tuple[ChannelGroup, ...], tuple[str, ...], str, int]:
    """The channel groups of an unpruned network; notes; the head's name; the size of the output.

    Raises ValueError as ``trace`` does, and for a gate on channels that must stay.
    """
    shapes = on_meta(model).eval()
    try:
        tracer = Tracer(example.to("meta"))
        walk = Walk(shapes, tracer.trace(shapes))
        with torch.no_grad():
            output = walk.run(example.to("meta"))
    except (fx.proxy.TraceError, RuntimeError, TypeError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"torch.fx cannot trace the forward of {type(model).__name__}: {said}"
        ) from error
    groups = _groups(walk, dict(shapes.named_modules()))
    sizes = [value.meta.shape[-1] for value in traced_in(output)]
    notes = (*dict.fromkeys(walk.notes), *_about_beta(groups, walk))
    return groups, notes, walk.head, sizes[0] if sizes else 0


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in float32, without values and without memory for them."""
    memo: dict[int, Tensor] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(weight.detach().to("meta"), weight.requires_grad)
    return copy.deepcopy(model, memo).float()


def _groups(walk: Walk, modules: dict[str, nn.Module]) -> tuple[ChannelGroup, ...]:
    """The classes of united channels, by the layers in which they lie."""
    channels: dict[int, dict[tuple[str, str], list[int]]] = defaultdict(dict)
    classes = walk.numbers.classes()
    for key, numbers in walk.touched.items():
        for place, root in enumerate(classes[numbers].tolist()):
            if root:
                channels[root].setdefault(key, []).append(place)
    alike = defaultdict(list)
    for places in channels.values():
        alike[tuple((key, len(found)) for key, found in places.items())].append(places)

    gates = [name for name, module in modules.items() if isinstance(module, Gate)]
    groups: list[ChannelGroup] = []
    for keys, members in alike.items():
        sides = {"outputs": {}, "inputs": {}}
        for (layer, side), _ in keys:
            sides[side][layer] = torch.tensor([member[layer, side] for member in members])
        if group := _group(modules, gates, **sides):
            groups.append(group)
    if unused := set(gates) - {gate for group in groups for gate in group.gates}:
        reasons = "".join(f"; {note}" for note in walk.notes)
        raise ValueError(f"gate {min(unused)} stands where channels cannot be cut{reasons}")
    return _in_order(groups, walk, bool(gates))


def _group(
    modules: dict[str, nn.Module], gates: list[str], outputs: Places, inputs: Places
) -> ChannelGroup | None:
    """The group of these places, in the order of its first gate or norm; None without a score."""

    def of(kinds: type | tuple[type, ...], names: Places) -> tuple[str, ...]:
        found = [name for name in names if isinstance(modules[name], kinds)]
        scored = [name for name in found if not any(part in name for part in UNSCORED)]
        return tuple(scored or found)

    own, makers = of(Gate, outputs), (_ConvNd, nn.Linear)
    norms = tuple(name for name in of(_BatchNorm, outputs) if modules[name].affine)
    first = own or norms
    if not norms or bool(gates) != bool(own) or len(outputs[first[0]]) == 1:
        return None
    order = outputs[first[0]][:, 0].argsort()
    outputs, inputs = ({n: p[order] for n, p in side.items()} for side in (outputs, inputs))
    entries = tuple(map(gates.index, own)) or tuple(range(outputs[first[0]].shape[1]))
    convs = of(makers, outputs) or of(makers, inputs)
    return ChannelGroup(first[0], own, norms, convs, outputs, inputs, entries)


def _in_order(groups: list[ChannelGroup], walk: Walk, gated: bool) -> tuple[ChannelGroup, ...]:
    """Sorted as the channels are scored first; without gates, with running numbers as entries, and
    ``name#2`` and so on for further groups of a norm.
    """
    if gated:
        return tuple(sorted(groups, key=lambda group: group.entries))
    forward = {layer: place for place, (layer, _) in enumerate(walk.touched)}
    groups.sort(key=lambda group: (forward[group.name], int(group.outputs[group.name][0, 0])))
    counts, start, found = Counter(), 0, []
    for group in groups:
        counts[group.name] += 1
        name = group.name + (f"#{counts[group.name]}" if counts[group.name] > 1 else "")
        entries = tuple(range(start, start + len(group.entries)))
        start += len(entries)
        found.append(replace(group, name=name, entries=entries))
    return tuple(found)


def _about_beta(groups: tuple[ChannelGroup, ...], walk: Walk) -> list[str]:
    """What the log says where no ReLU stands behind a norm that scores."""
    norms = [norm for group in groups for norm in group.norms if not group.gates]
    others = {name for norm in norms for name in walk.behind[norm] - RELU}
    if not others:
        return []
    return [
        "the beta term of gfbs assumes a ReLU behind each norm; behind some norms here comes"
        f" {', '.join(sorted(others))}; the Taylor term (--criterion taylor) needs no ReLU"
    ]
