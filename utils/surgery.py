"""Cut channels out of a network. Surgery only slices: a pruned network and a masked one agree.

``keep_outputs`` and ``keep_inputs`` do the work. For a new type of layer, register one or both.
"""

import copy
from functools import partial, singledispatch
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

    ``model`` is a gated network, or one that ``models.trace.trace`` has seen. The result computes
    what it computes under ``plan.apply_mask``, up to float rounding. The plan refers to the model
    as it is now, so a pruned network can be pruned again. Channels that no layer reads any more go
    too (``GatedModel.live_channels``).

    Raises ValueError if the plan does not fit; the model is unchanged then.
    """
    plan = plan.shrinking(group_widths(model))
    removed = removed_by(channel_groups(model), plan.keep)
    for keep, widths, cut in zip(KEEP, WIDTHS, removed, strict=True):
        for name, gone in cut.items():
            layer = model.get_submodule(name)
            width = next(getattr(layer, name) for name in widths if hasattr(layer, name))
            stays = torch.ones(width, dtype=torch.bool)
            stays[gone] = False
            keep(layer, stays.nonzero().flatten())
    known = structure(model)
    known.kept = PruningPlan(known.kept).then(plan).keep
    if isinstance(model, GatedModel):
        for keep, live in zip(KEEP, model.live_channels(), strict=True):
            for name, channels in live.items():
                keep(model.get_submodule(name), torch.tensor(channels))
    return model


def first_difference(masked: nn.Module, pruned: nn.Module, images: Tensor) -> str | None:
    """The first layer whose outputs differ by more than 1e-4 of the largest, in eval mode.

    None if the outputs of the networks agree; "the output" if only these differ.
    """
    expected, found = _outputs(masked, images), _outputs(pruned, images)
    if _agree(expected[""], found[""]):
        return None
    alike = [n for n in found if n and n in expected and expected[n].shape == found[n].shape]
    return next((n for n in alike if not _agree(expected[n], found[n])), "the output")


def _outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What every layer without sublayers gives, by its name; "" is the network."""
    model, found = copy.deepcopy(model).eval(), {}

    def record(name: str, module: nn.Module, args: tuple, out: Any) -> None:
        if isinstance(out, Tensor):
            found.setdefault(name, out.clone())

    for name, module in model.named_modules():
        if not name or not any(module.children()):
            module.register_forward_hook(partial(record, name))
    with torch.no_grad():
        model(images)
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


# Of outputs, then of inputs: what cuts them, and the attributes that may hold their number.
KEEP = keep_outputs, keep_inputs
WIDTHS = (
    ("out_channels", "out_features", "num_features", "num_parameters"),
    ("in_channels", "in_features"),
)
