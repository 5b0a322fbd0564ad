"""Which channels matter: scores from one forward and one backward pass of one minibatch, in train
mode.

Equations are those of the paper, "Exploring Gradient Flow Based Saliency for DNN Model Compression"
(ACM MM 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import ChannelGroup, GatedModel
from models.gate import folded_gates


@dataclass(frozen=True)
class GroupSignals:
    """What a criterion sees of one channel group with C channels.

    Attributes:
        gamma: scales of the group's norms (k, C).
        beta: their shifts (k, C).
        filters: for each of the group's convolutions, what it has to do with each channel: the
            filters that make the channels, flattened, (C, inputs * height * width), or, where it
            only reads them, its input slices.
        random: (C,) uniform in [0, 1), other numbers for every group.
        gamma_grad: gradients of the loss with respect to gamma (k, C); None unless the criterion's
            ``gradients`` are those of the norms.
        gate_grad: gradients with respect to the gates (gates, C); likewise.
    """

    gamma: Tensor
    beta: Tensor
    filters: list[Tensor]
    random: Tensor
    gamma_grad: Tensor | None = None
    gate_grad: Tensor | None = None


def unit(x: Tensor) -> Tensor:
    """Divide every row of (k, C) by its L2 norm; a row of zeros stays zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # The squares of a very confident network's gradients are below what float32 can hold.
    wide = F.normalize(x.double(), dim=-1, eps=torch.finfo(torch.float64).tiny).to(x.dtype)
    return torch.where(norm > 1e-12, x / norm, wide)


def taylor(group: GroupSignals, w_beta: float) -> Tensor:
    """First-order Taylor term of gamma: |gamma| / ||gamma|| * |dL/dgamma| / ||dL/dgamma||."""
    return unit(group.gamma.abs()).mean(0) * unit(group.gamma_grad.abs()).mean(0)


def beta(group: GroupSignals, w_beta: float) -> Tensor:
    """The signed shift alone, w_beta * beta / ||beta||: far below zero, the ReLU is shut."""
    return w_beta * unit(group.beta).mean(0)


def gfbs(group: GroupSignals, w_beta: float) -> Tensor:
    """Gradient flow based saliency: the Taylor term of gamma plus the signed beta.

    In a residual stream each factor is averaged over the stream's norms first, and then combined.
    """
    return taylor(group, w_beta) + beta(group, w_beta)


def slimming(group: GroupSignals, w_beta: float) -> Tensor:
    """|gamma|, compared over all layers as it is: Liu et al., "Network Slimming" (ICCV 2017),
    section 3, there after training with an L1 penalty on gamma.
    """
    return group.gamma.abs().mean(0)


def taylor_fo(group: GroupSignals, w_beta: float) -> Tensor:
    """(dL/dz)^2 of a gate z = 1 behind the norm: Molchanov et al., "Importance Estimation for
    Neural Network Pruning" (CVPR 2019), section 3, the first-order importance (dL/dz * z)^2.
    """
    return group.gate_grad.square().mean(0)


def l1(group: GroupSignals, w_beta: float) -> Tensor:
    """sum |w| over each filter: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017),
    section 3.1. Layers are divided by their L2 norm to be comparable, as the paper's are not.
    """
    return unit(torch.stack([filters.abs().sum(1) for filters in group.filters])).mean(0)


def fpgm(group: GroupSignals, w_beta: float) -> Tensor:
    """sum_j ||w - w_j|| over the filters j of the layer: what is near the geometric median is what
    others can stand in for. He et al., "Filter Pruning via Geometric Median" (CVPR 2019), section
    3.4. Layers are divided by their L2 norm.
    """
    exact = "donot_use_mm_for_euclid_dist"  # the distance of two equal filters is zero
    distances = [torch.cdist(f, f, compute_mode=exact).sum(1) for f in group.filters]
    return unit(torch.stack(distances)).mean(0)


def random(group: GroupSignals, w_beta: float) -> Tensor:
    """The control: every channel is as likely to go as any other."""
    return group.random


@dataclass(frozen=True)
class Criterion:
    """How to score channels.

    Attributes:
        score: from the signals of a group and w_beta to its scores (C,).
        gradients: whose gradients the score needs, "norms" or "gates"; with None the batch is not
            looked at.
        scope: how its paper ranks channels; see ``utils.pruning.Ranking``.
    """

    score: Callable[[GroupSignals, float], Tensor]
    gradients: Literal["norms", "gates"] | None = None
    scope: Literal["global", "layer"] = "global"


# A new criterion is one function and one line here.
CRITERIA = {
    "gfbs": Criterion(gfbs, gradients="norms"),
    "taylor": Criterion(taylor, gradients="norms"),
    "beta": Criterion(beta),
    "slimming": Criterion(slimming),
    "taylor_fo": Criterion(taylor_fo, gradients="gates"),
    "l1": Criterion(l1, scope="layer"),
    "fpgm": Criterion(fpgm, scope="layer"),
    "random": Criterion(random),
}


def channel_saliency(
    model: GatedModel,
    images: Tensor,
    labels: Tensor,
    *,
    criterion: str = "gfbs",
    w_beta: float = 0.05,
    checkpoint_activations: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Score every prunable channel of ``model`` on one minibatch.

    The model runs in train mode, so BatchNorm normalises by the statistics of the batch. Nothing of
    the model changes: parameters, buffers, gradients, modes and the random state are the same bits
    afterwards.

    Args:
        model: a gated network, bare (not wrapped for several devices).
        images: (B, 3, H, W), normalised, on the model's device.
        labels: (B,) class indices.
        criterion: a name of ``CRITERIA``.
        w_beta: weight of the beta term.
        checkpoint_activations: keep only what lies between the network's ``checkpoint_blocks``, and
            compute the rest again on the way back: less memory, the same scores.
        generator: on the CPU, of the criterion ``random``; by default one with seed 0.

    Returns the scores (C,) by group name, on the CPU.

    Raises ValueError for an unknown criterion, and with the group's name for scores that are not
    finite.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; known are {', '.join(CRITERIA)}")
    generator = generator or torch.Generator().manual_seed(0)
    score, gradients_of = CRITERIA[criterion].score, CRITERIA[criterion].gradients
    groups = model.channel_groups()
    watched: dict[str, nn.Parameter] = {}
    if gradients_of == "norms":
        watched = {n: model.get_submodule(n).weight for group in groups for n in group.norms}
    elif gradients_of == "gates":
        watched = {n: model.get_submodule(n).gate for group in groups for n in group.gates}
    gradients = _gradients(model, images, labels, watched, checkpoint_activations)

    saliency = {}
    for group in groups:
        signals = _signals(model, group, gradients, generator)
        saliency[group.name] = score(signals, w_beta).cpu()
        if not torch.isfinite(saliency[group.name]).all():
            raise ValueError(
                f"the {criterion} saliency of channel group {group.name} is not finite"
            )
    return saliency


def _gradients(
    model: GatedModel,
    images: Tensor,
    labels: Tensor,
    watched: Mapping[str, nn.Parameter],
    checkpoint_activations: bool,
) -> dict[str, Tensor]:
    """Of the cross-entropy with respect to some parameters, in train mode, each flattened."""
    if not watched:
        return {}
    blocks = model.checkpoint_blocks() if checkpoint_activations else []
    with unchanged(model), recomputed(blocks), torch.enable_grad():
        model.train()
        parameters = [parameter.requires_grad_() for parameter in watched.values()]
        with folded_gates(model):
            loss = F.cross_entropy(model(images), labels)
            gradients = torch.autograd.grad(loss, parameters)
    return {name: grad.flatten() for name, grad in zip(watched, gradients, strict=True)}


def _signals(
    model: GatedModel,
    group: ChannelGroup,
    gradients: Mapping[str, Tensor],
    generator: torch.Generator,
) -> GroupSignals:
    norms = [model.get_submodule(name) for name in group.norms]
    gamma = torch.stack([norm.weight.detach() for norm in norms]).cpu()
    gamma_grad, gate_grad = (
        torch.stack([gradients[name] for name in names]).cpu()
        if gradients.keys() >= set(names)
        else None
        for names in (group.norms, group.gates)
    )
    filters = []
    for name in group.convs:
        weight = model.get_submodule(name).weight.detach()
        filters.append((weight if name in group.outputs else weight.transpose(0, 1)).flatten(1))
    return GroupSignals(
        gamma=gamma,
        beta=torch.stack([norm.bias.detach() for norm in norms]).cpu(),
        filters=filters,
        random=torch.rand(gamma.shape[1], generator=generator),
        gamma_grad=gamma_grad,
        gate_grad=gate_grad,
    )


@contextmanager
def recomputed(blocks: list[nn.Module]) -> Iterator[None]:
    """Let these modules forget their activations, and compute them again on the way back."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the instance's; the class's is there again


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what a pass in train mode does: buffers, modes, ``requires_grad``, random state."""
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    modes = {module: module.training for module in model.modules()}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    devices = {tensor.get_device() for tensor in model.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers.items():
                    buffer.copy_(before)
            for module, training in modes.items():
                module.training = training
            for parameter in frozen:
                parameter.requires_grad_(False)
