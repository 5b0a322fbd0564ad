"""Cutting channels out of a network. Surgery only slices: the pruned network computes what the
masked one does.

Two small functions do it all, dispatched on the type of the layer: ``keep_outputs`` and
``keep_inputs``. A new layer type is a new registration of one or both.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # BatchNorm2d and SyncBatchNorm

from models.gate import Gate, GatedModel
from models.resnet_cifar import PadShortcut
from utils.pruning import PruningPlan, compose_kept


def prune(model: GatedModel, plan: PruningPlan) -> GatedModel:
    """Cut every channel that ``plan`` does not keep out of ``model``, in place, and return it.

    The result equals the network masked by ``plan.apply_mask``, up to float rounding. The plan
    refers to the model as it is, so a pruned network can be pruned again; ``model.kept`` records
    what is left of the unpruned one.

    Raises ValueError where the plan does not fit; the model is unchanged then.
    """
    plan = plan.losses(model.group_widths())
    device = next(model.parameters()).device
    for group in model.channel_groups():
        if group.name in plan.keep:
            keep = torch.tensor(plan.keep[group.name], device=device)
            for name in group.outputs:
                keep_outputs(model.get_submodule(name), keep)
            for name in group.inputs:
                keep_inputs(model.get_submodule(name), keep)
    model.kept = compose_kept(model.kept, plan)
    return model


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
    """Keep the output channels ``keep`` (C,), sorted, of a layer in place; the rest of it stays."""
    raise TypeError(f"surgery does not know how to cut the outputs of a {type(layer).__name__}")


@singledispatch
def keep_inputs(layer: nn.Module, keep: Tensor) -> None:
    """Keep the input channels ``keep`` (C,), sorted, of a layer in place; the rest of it stays."""
    raise TypeError(f"surgery does not know how to cut the inputs of a {type(layer).__name__}")


def _slice(layer: nn.Module, names: tuple[str, ...], dim: int, keep: Tensor) -> None:
    """Slice parameters and buffers of a layer; what is None (a missing bias) stays None."""
    for name in names:
        tensor = getattr(layer, name)
        if tensor is None:
            continue
        sliced = tensor.detach().index_select(dim, keep)
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
    shortcut.source = shortcut.source[keep]


@keep_inputs.register
def _(shortcut: PadShortcut, keep: Tensor) -> None:
    position = torch.full(
        (shortcut.in_channels + 1,), -1, device=keep.device
    )  # old channel -> new; the last is for -1
    position[keep] = torch.arange(len(keep), device=keep.device)
    shortcut.source = position[shortcut.source]
    shortcut.in_channels = len(keep)
