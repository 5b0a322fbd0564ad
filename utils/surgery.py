"""Cutting channels out of a network. Surgery only slices: the pruned network computes what the
masked one does.

Two small functions do it all, dispatched on the type of the layer: ``keep_outputs`` and
``keep_inputs``. A new layer type is a new registration of one or both.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # BatchNorm2d and SyncBatchNorm

from models import Gate, GatedModel
from models.layers import ChannelSelector, PadShortcut
from utils.pruning import PruningPlan, compose_kept


def prune(model: GatedModel, plan: PruningPlan) -> GatedModel:
    """Cut every channel that ``plan`` does not keep out of ``model``, in place, and return it.

    The result equals the network masked by ``plan.apply_mask``, up to float rounding. The plan
    refers to the model as it is, so a pruned network can be pruned again; ``model.kept`` records
    what is left of the unpruned one. What nobody reads any more goes too (``live_channels``); it
    follows from the plan and is no part of it.

    Raises ValueError where the plan does not fit; the model is unchanged then.
    """
    plan = plan.losses(model.group_widths())
    for group in model.channel_groups():
        if group.name in plan.keep:
            keep = plan.keep[group.name]
            _cut(model, dict.fromkeys(group.outputs, keep), dict.fromkeys(group.inputs, keep))
    _cut(model, *model.live_channels())
    model.kept = compose_kept(model.kept, plan)
    return model


def _cut(
    model: GatedModel, outputs: Mapping[str, list[int]], inputs: Mapping[str, list[int]]
) -> None:
    """Keep these outputs and these inputs of the layers so named."""
    for name, keep in outputs.items():
        keep_outputs(model.get_submodule(name), torch.tensor(keep))
    for name, keep in inputs.items():
        keep_inputs(model.get_submodule(name), torch.tensor(keep))


def split_plan(model: GatedModel, plan: PruningPlan) -> list[PruningPlan]:
    """The parts of ``plan`` that the network's ``pruning_stages`` cut, one after the other.

    ``model`` is the network before the first. What loses nothing is in no part.
    """
    losing = plan.losses(model.group_widths()).keep
    parts = (
        {name: losing[name] for name in stage if name in losing} for stage in model.pruning_stages()
    )
    return [PruningPlan(part) for part in parts if part]


@singledispatch
def keep_outputs(layer: nn.Module, keep: Tensor) -> None:
    """Keep the output channels ``keep`` (C,), sorted, of a layer in place; the rest of it stays.

    ``keep`` is on the CPU wherever the layer is: the meta device would not hold its values.
    """
    raise TypeError(f"surgery does not know how to cut the outputs of a {type(layer).__name__}")


@singledispatch
def keep_inputs(layer: nn.Module, keep: Tensor) -> None:
    """Keep the input channels ``keep`` (C,), sorted, of a layer in place; see ``keep_outputs``."""
    raise TypeError(f"surgery does not know how to cut the inputs of a {type(layer).__name__}")


def _slice(layer: nn.Module, names: tuple[str, ...], dim: int, keep: Tensor) -> None:
    """Slice parameters and buffers of a layer; what is None (a missing bias) stays None."""
    for name in names:
        tensor = getattr(layer, name)
        if tensor is None:
            continue
        sliced = tensor.detach().index_select(dim, keep.to(tensor.device))
        setattr(
            layer,
            name,
            nn.Parameter(sliced, tensor.requires_grad) if name in layer._parameters else sliced,
        )


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels


@keep_outputs.register
def _(conv: nn.Conv2d, keep: Tensor) -> None:
    depthwise = _is_depthwise(conv)
    if conv.groups > 1 and not depthwise:
        raise ValueError(
            f"surgery cannot cut a convolution of {conv.groups} groups that is not depthwise"
        )
    _slice(conv, ("weight", "bias"), 0, keep)
    conv.out_channels = len(keep)
    if depthwise:
        conv.in_channels = conv.groups = len(keep)


@keep_inputs.register
def _(conv: nn.Conv2d, keep: Tensor) -> None:
    if conv.groups > 1:
        raise ValueError("surgery cuts a depthwise convolution once, as an output of its group")
    _slice(conv, ("weight",), 1, keep)
    conv.in_channels = len(keep)


@keep_outputs.register
def _(norm: _BatchNorm, keep: Tensor) -> None:
    _slice(norm, ("weight", "bias", "running_mean", "running_var"), 0, keep)
    norm.num_features = len(keep)


@keep_outputs.register
def _(gate: Gate, keep: Tensor) -> None:
    _slice(gate, ("gate",), 1, keep)


@keep_outputs.register
def _(linear: nn.Linear, keep: Tensor) -> None:
    _slice(linear, ("weight", "bias"), 0, keep)
    linear.out_features = len(keep)


@keep_inputs.register
def _(linear: nn.Linear, keep: Tensor) -> None:
    _slice(linear, ("weight",), 1, keep)
    linear.in_features = len(keep)


@keep_outputs.register
def _(shortcut: PadShortcut, keep: Tensor) -> None:
    shortcut.source = shortcut.source[keep.to(shortcut.source.device)]


@keep_inputs.register
def _(shortcut: PadShortcut, keep: Tensor) -> None:
    position = torch.full((shortcut.in_channels + 1,), -1)  # old channel -> new; the last is for -1
    position[keep] = torch.arange(len(keep))
    shortcut.source = position.to(shortcut.source.device)[shortcut.source]
    shortcut.in_channels = len(keep)


@keep_outputs.register
def _(selector: ChannelSelector, keep: Tensor) -> None:
    chosen = [selector.channels[i] for i in keep.tolist()]
    selector.choose(chosen, selector.in_channels)


@keep_inputs.register
def _(selector: ChannelSelector, keep: Tensor) -> None:
    position = {old: new for new, old in enumerate(keep.tolist())}
    selector.choose([position[channel] for channel in selector.channels], len(keep))
