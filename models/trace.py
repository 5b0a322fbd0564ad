"""The channel groups of any network, read off its forward pass.

torch.fx records the operations. Every output channel of a convolution or linear layer gets a
number, and every tensor an index of the same shape: the channel to which each element belongs.
Operations move and combine these indices (walk.py, operations.py). Channels that are united in the
end are cut together. fx only reads: the network itself stays as it is.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice

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
    """Read the channel groups off the forward pass of ``model``, before anything is cut.

    Returns the model. It gets one plain attribute, ``structure``; nothing else about it changes.

    Args:
        model: any network of one input, with BatchNorm and in float32.
        example: an input; only its shape matters, such as ``torch.empty(1, 3, 224, 224)``.
        net: what ``models.build_model`` and checkpoints call the network.

    Raises ValueError if torch.fx cannot trace the forward pass, or if no channel can be cut.
    """
    found = read_groups(model, example)
    if not found.groups:
        why = "; ".join(found.notes) or "it has no BatchNorm whose channels can go"
        raise ValueError(f"{net or type(model).__name__} cannot be pruned: {why}")
    model.structure = replace(found, net=net)
    return model


def channel_groups(model: nn.Module) -> list[ChannelGroup]:
    """The channel groups of a network as it is now, in forward order.

    A network with gates that ``models.build_model`` has not made is traced at the first call.
    Raises TypeError for one without gates that nobody has traced.
    """
    known = structure(model)
    if known.groups is None:
        found = read_groups(model)
        known.groups, known.notes = found.groups, found.notes
    return known.present()


def group_widths(model: nn.Module) -> dict[str, int]:
    """The number of channels of every group as it is now."""
    return {group.name: group.width for group in channel_groups(model)}


def read_groups(model: nn.Module, example: Tensor | None = None) -> Structure:
    """What the forward pass of an unpruned network says of it; see ``trace``.

    Raises ValueError also for a gate on channels that must stay.
    """
    images = torch.empty(1, 3, 64, 64, device="meta") if example is None else example.to("meta")
    shapes = on_meta(model).eval()
    try:
        walk = Walk(shapes, Tracer(images).trace(shapes))
        with torch.no_grad():
            outputs = traced_in(walk.run(images))
    except (fx.proxy.TraceError, RuntimeError, TypeError, NotImplementedError) as error:
        network, said = type(model).__name__, " ".join(str(error).split())
        raise ValueError(f"torch.fx cannot trace the forward of {network}: {said}") from error
    groups = _groups(walk, dict(shapes.named_modules()))
    norms = [norm for group in groups for norm in group.norms if not group.gates]
    if others := {name for norm in norms for name in walk.behind[norm] - RELU}:
        walk.notes.append(
            "the beta term of gfbs assumes a ReLU behind each norm; behind some norms here comes"
            f" {', '.join(sorted(others))}; the Taylor term (--criterion taylor) needs no ReLU"
        )
    num_classes = outputs[0].meta.shape[-1] if outputs else 0
    return Structure(num_classes, walk.head, "", groups, tuple(dict.fromkeys(walk.notes)))


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in float32, without values and without memory for them."""
    memo: dict[int, Tensor] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(weight.detach().to("meta"), weight.requires_grad)
    return copy.deepcopy(model, memo).float()


def _groups(walk: Walk, modules: dict[str, nn.Module]) -> tuple[ChannelGroup, ...]:
    """All groups. Their first gates are in module order, their first norms in forward order.

    Further groups of one norm are called ``name#2`` and so on.
    """
    gates = [name for name, module in modules.items() if isinstance(module, Gate)]
    order = gates or [layer for layer, _ in walk.touched]
    groups = [_group(modules, gates, *sides) for sides in _alike(walk)]
    groups = [group for group in groups if group]
    groups.sort(key=lambda group: (order.index(group.name), int(group.outputs[group.name][0, 0])))
    if unused := set(gates) - {gate for group in groups for gate in group.gates}:
        where = f"gate {min(unused)} stands where channels cannot be cut"
        raise ValueError("; ".join([where, *walk.notes]))
    counts, numbers, found = Counter(), count(), []
    for group in groups:
        counts[group.name] += 1
        name = group.name if counts[group.name] == 1 else f"{group.name}#{counts[group.name]}"
        places = islice(numbers, group.outputs[group.name].shape[1])
        entries = [gates.index(gate) for gate in group.gates] or places
        found.append(replace(group, name=name, entries=tuple(entries)))
    return tuple(found)


def _alike(walk: Walk) -> Iterator[tuple[Places, Places]]:
    """The outputs and the inputs of all channels that lie in the same layers."""
    classes = walk.numbers.classes()
    units = defaultdict(lambda: defaultdict(list))  # class of channels -> (layer, side) -> places
    for key, numbers in walk.touched.items():
        for place, root in enumerate(classes[numbers].tolist()):
            units[root][key].append(place)
    units.pop(0, None)  # the channels that stay
    alike = defaultdict(list)
    for unit in units.values():
        alike[tuple((key, len(places)) for key, places in unit.items())].append(unit)
    for members in alike.values():
        sides = {"outputs": {}, "inputs": {}}
        for layer, side in members[0]:
            sides[side][layer] = torch.tensor([unit[layer, side] for unit in members])
        yield sides["outputs"], sides["inputs"]


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
    name = next(iter(own or norms), "")
    if not norms or (gates and not own) or len(outputs[name]) == 1:
        return None
    order = outputs[name][:, 0].argsort()
    outputs, inputs = ({n: p[order] for n, p in side.items()} for side in (outputs, inputs))
    convs = of(makers, outputs) or of(makers, inputs)
    return ChannelGroup(name, own, norms, convs, outputs, inputs, ())
