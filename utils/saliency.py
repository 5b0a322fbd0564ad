"""Which channels matter: scores from one forward and one backward pass of one minibatch, in train
mode.

Equations are those of the paper, "Exploring Gradient Flow Based Saliency for DNN Model Compression"
(ACM MM 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.gate import GatedModel


@dataclass(frozen=True)
class GroupSignals:
    """What a criterion sees of one channel group with k norms and C channels; every tensor is (k,
    C).

    Attributes:
        gamma: the norms' scales.
        gamma_grad: the gradients of the loss with respect to them.
        beta: the norms' shifts.
    """

    gamma: Tensor
    gamma_grad: Tensor
    beta: Tensor


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


# Name -> score (C,) of one group. A new criterion is one function and one line here.
CRITERIA: dict[str, Callable[[GroupSignals, float], Tensor]] = {
    "gfbs": gfbs,
    "taylor": taylor,
    "beta": beta,
}


def channel_saliency(
    model: GatedModel,
    images: Tensor,
    labels: Tensor,
    *,
    criterion: str = "gfbs",
    w_beta: float = 0.05,
    checkpoint_activations: bool = False,
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

    Returns the scores (C,) by group name, on the CPU.

    Raises ValueError for an unknown criterion, and with the group's name for scores that are not
    finite.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; known are {', '.join(CRITERIA)}")
    groups = model.channel_groups()
    norms = {name: model.get_submodule(name) for group in groups for name in group.norms}
    blocks = model.checkpoint_blocks() if checkpoint_activations else []
    with unchanged(model), recomputed(blocks), torch.enable_grad():
        model.train()
        gammas = [norm.weight.requires_grad_() for norm in norms.values()]
        loss = F.cross_entropy(model(images), labels)
        gradients = dict(zip(norms, torch.autograd.grad(loss, gammas), strict=True))

    saliency = {}
    for group in groups:
        signals = GroupSignals(
            gamma=torch.stack([norms[name].weight.detach() for name in group.norms]).cpu(),
            gamma_grad=torch.stack([gradients[name] for name in group.norms]).cpu(),
            beta=torch.stack([norms[name].bias.detach() for name in group.norms]).cpu(),
        )
        saliency[group.name] = CRITERIA[criterion](signals, w_beta)
        if not torch.isfinite(saliency[group.name]).all():
            raise ValueError(
                f"the {criterion} saliency of channel group {group.name} is not finite"
            )
    return saliency


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
