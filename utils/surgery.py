"""Cut channels out of a network. Surgery only slices: a pruned network and a masked one agree.

``keep_outputs`` and ``keep_inputs`` do the work. For a new type of layer, register one or both.
"""

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # BatchNorm2d and SyncBatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from models import Gate, GatedModel, channel_groups, group_widths, structure
from models.groups import removed_by
from models.layers import ChannelSelector, PadShortcut
from models.walk import is_depthwise
from utils.pruning import PruningPlan


def prune(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Cut every channel that ``plan`` does not keep out of ``model``, in place; return the model.

    The result computes what the model computes under ``plan.apply_mask``, up to float rounding. The
    indices of the plan refer to the model as it is now, so a pruned network can be pruned again.
    Channels that no layer reads any more go too (``GatedModel.live_channels``).

    Args:
        model: a gated network, or one that ``models.trace.trace`` has seen.
        plan: the channels that stay.

    Raises ValueError if the plan does not fit; the model is unchanged then.
    """
    plan = plan.shrinking(group_widths(model))
    for side, cut in zip(
        ("outputs", "inputs"), removed_by(channel_groups(model), plan.keep), strict=True
    ):
        for name, gone in cut.items():
            layer = model.get_submodule(name)
            stays = torch.ones(_width(layer, side), dtype=torch.bool)
            stays[gone] = False
            KEEP[side](layer, stays.nonzero().flatten())
    known = structure(model)
    known.kept = PruningPlan(known.kept).then(plan).keep
    if isinstance(model, GatedModel):
        for side, kept in zip(KEEP, model.live_channels(), strict=True):
            for name, keep in kept.items():
                KEEP[side](model.get_submodule(name), torch.tensor(keep))
    return model


def _width(layer: nn.Module, side: str) -> int:
    """The number of outputs or inputs of a layer."""
    outputs = ("out_channels", "out_features", "num_features", "num_parameters")
    names = outputs if side == "outputs" else ("in_channels", "in_features")
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def first_difference(masked: nn.Module, pruned: nn.Module, images: Tensor) -> str | None:
    """The first layer whose outputs differ between a masked network and the pruned one.

    Both run in eval mode. Outputs differ by more than 1e-4 of the largest, in float32. None if the
    outputs of the networks agree; "the output" if only these differ.
    """
    runs = [_outputs(model, images) for model in (masked, pruned)]
    if _agree(runs[0][""], runs[1][""]):
        return None
    for name, theirs in runs[1].items():
        ours = runs[0].get(name)
        if name and ours is not None and ours.shape == theirs.shape and not _agree(ours, theirs):
            return name
    return "the output"


def _outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What every layer without sublayers gives, by its name; "" is the network."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if not name or not any(module.children()):

            def keep(module: nn.Module, args: tuple, out: Any, name: str = name) -> None:
                if isinstance(out, Tensor):
                    found.setdefault(name, out.detach().clone())

            hooks.append(module.register_forward_hook(keep))
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return found


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * a.abs().max())


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
def _(conv: _ConvNd, keep: Tensor) -> None:
    per_group = keep  # of a transposed convolution: every group loses the same ones
    if isinstance(conv, _ConvTransposeNd):
        per_group = keep[keep < conv.out_channels // conv.groups]
    _slice(conv, 1 if conv.transposed else 0, per_group, "weight")
    _slice(conv, 0, keep, "bias")
    conv.out_channels = len(keep)


@keep_inputs.register
def _(conv: _ConvNd, keep: Tensor) -> None:
    if is_depthwise(conv):  # each input goes with its own outputs, whose weights are gone already
        conv.groups = len(keep)
    elif conv.transposed:
        _slice(conv, 0, keep, "weight")
    else:
        _slice(conv, 1, keep[keep < conv.in_channels // conv.groups], "weight")
    conv.in_channels = len(keep)


@keep_outputs.register
def _(norm: _BatchNorm, keep: Tensor) -> None:
    _slice(norm, 0, keep, "weight", "bias", "running_mean", "running_var")
    norm.num_features = len(keep)


@keep_outputs.register
def _(gate: Gate, keep: Tensor) -> None:
    _slice(gate, 1, keep, "gate")


@keep_outputs.register
def _(linear: nn.Linear, keep: Tensor) -> None:
    _slice(linear, 0, keep, "weight", "bias")
    linear.out_features = len(keep)


@keep_outputs.register
def _(prelu: nn.PReLU, keep: Tensor) -> None:
    _slice(prelu, 0, keep, "weight")
    prelu.num_parameters = len(keep)


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


KEEP = {"outputs": keep_outputs, "inputs": keep_inputs}
