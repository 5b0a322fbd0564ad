"""Cut channels out of a network. Surgery only slices: a pruned network and a masked one agree.

``keep_outputs`` and ``keep_inputs`` do the work. For a new type of layer, register one or both.
"""

from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # BatchNorm2d and SyncBatchNorm

from models import Gate, GatedModel
from models.layers import ChannelSelector, PadShortcut
from utils.pruning import PruningPlan


def prune(model: GatedModel, plan: PruningPlan) -> GatedModel:
    """Cut every channel that ``plan`` does not keep out of ``model``, in place; return the model.

    The result computes what the model computes under ``plan.apply_mask``, up to float rounding. The
    indices of the plan refer to the model as it is now, so a pruned network can be pruned again.
    Channels that no layer reads any more go too (``live_channels``). Updates ``model.kept``.

    Raises ValueError if the plan does not fit; the model is unchanged then.
    """
    plan = plan.shrinking(model.group_widths())
    for group in model.channel_groups():
        if keep := plan.keep.get(group.name):
            _cut(model, dict.fromkeys(group.outputs, keep), dict.fromkeys(group.inputs, keep))
    _cut(model, *model.live_channels())
    model.kept = PruningPlan(model.kept).then(plan).keep
    return model


def _cut(model: GatedModel, outputs: dict[str, list[int]], inputs: dict[str, list[int]]) -> None:
    """Keep these outputs and these inputs, by layer name."""
    for name, keep in outputs.items():
        keep_outputs(model.get_submodule(name), torch.tensor(keep))
    for name, keep in inputs.items():
        keep_inputs(model.get_submodule(name), torch.tensor(keep))


@singledispatch
def keep_outputs(layer: nn.Module, keep: Tensor) -> None:
    """Keep the output channels ``keep`` of a layer, in place. Its inputs stay.

    ``keep`` (C,) holds sorted indices. It is on the CPU, because the meta device has no values.
    """
    raise TypeError(f"surgery does not know how to cut the outputs of a {type(layer).__name__}")


@singledispatch
def keep_inputs(layer: nn.Module, keep: Tensor) -> None:
    """Keep the input channels ``keep`` of a layer, in place; see ``keep_outputs``."""
    raise TypeError(f"surgery does not know how to cut the inputs of a {type(layer).__name__}")


def _slice(layer: nn.Module, dim: int, keep: Tensor, *names: str) -> None:
    """Slice parameters and buffers of a layer along ``dim``. A missing bias stays missing."""
    for name in names:
        if (tensor := getattr(layer, name)) is not None:
            sliced = tensor.detach().index_select(dim, keep.to(tensor.device))
            if isinstance(tensor, nn.Parameter):
                sliced = nn.Parameter(sliced, tensor.requires_grad)
            setattr(layer, name, sliced)


@keep_outputs.register
def _(conv: nn.Conv2d, keep: Tensor) -> None:
    if conv.groups > 1:
        if not conv.groups == conv.in_channels == conv.out_channels:
            raise ValueError("surgery cannot cut a convolution with groups unless it is depthwise")
        conv.in_channels = conv.groups = len(keep)  # depthwise: inputs go with their outputs
    _slice(conv, 0, keep, "weight", "bias")
    conv.out_channels = len(keep)


@keep_inputs.register
def _(conv: nn.Conv2d, keep: Tensor) -> None:
    if conv.groups > 1:
        raise ValueError("surgery cuts a depthwise convolution once: list it in a group's outputs")
    _slice(conv, 1, keep, "weight")
    conv.in_channels = len(keep)


@keep_outputs.register
def _(norm: _BatchNorm, keep: Tensor) -> None:
    _slice(norm, 0, keep, "weight", "bias", "running_mean", "running_var")
    norm.num_features = len(keep)


@keep_outputs.register
def _(gate: Gate, keep: Tensor) -> None:
    _slice(gate, 1, keep, "gate")


@keep_inputs.register
def _(linear: nn.Linear, keep: Tensor) -> None:
    _slice(linear, 1, keep, "weight")
    linear.in_features = len(keep)


@keep_outputs.register
def _(shortcut: PadShortcut, keep: Tensor) -> None:
    shortcut.source = shortcut.source[keep.to(shortcut.source.device)]


@keep_inputs.register
def _(shortcut: PadShortcut, keep: Tensor) -> None:
    position = torch.full((shortcut.in_channels + 1,), -1)  # old -> new; source -1 reads the last
    position[keep] = torch.arange(len(keep))
    shortcut.source = position.to(shortcut.source.device)[shortcut.source]
    shortcut.in_channels = len(keep)


@keep_outputs.register
def _(selector: ChannelSelector, keep: Tensor) -> None:
    selector.choose([selector.channels[i] for i in keep.tolist()], selector.in_channels)


@keep_inputs.register
def _(selector: ChannelSelector, keep: Tensor) -> None:
    position = {old: new for new, old in enumerate(keep.tolist())}
    selector.choose([position[channel] for channel in selector.channels], len(keep))
