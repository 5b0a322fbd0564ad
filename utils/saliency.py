"""Score channels from one forward and one backward pass of one minibatch, in train mode.

The method is that of the paper "Exploring Gradient Flow Based Saliency for DNN Model Compression"
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
from utils.errors import InputError


@dataclass(frozen=True)
class GroupSignals:
    """What a criterion knows of one group: C channels, k norms.

    Attributes:
        gamma: scales of the norms (k, C).
        beta: shifts of the norms (k, C).
        filters: one matrix (C, weights per channel) for each of the group's ``convs``: the filters
            that make the channels or, where a convolution only reads them, its input slices.
        random: (C,) uniform in [0, 1); other numbers for every group.
        gamma_grad: gradients of the loss by gamma (k, C); None unless ``Criterion.gradients`` is
            "norms".
        gate_grad: gradients of the loss by the gates (gates, C); None unless it is "gates".
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
    # Squares of the tiny gradients of a very confident network are too small for float32.
    wide = F.normalize(x.double(), dim=-1, eps=torch.finfo(torch.float64).tiny).to(x.dtype)
    return torch.where(norm > 1e-12, x / norm, wide)


def taylor(group: GroupSignals, w_beta: float) -> Tensor:
    """First-order Taylor term of gamma: |gamma| / ||gamma|| * |dL/dgamma| / ||dL/dgamma||."""
    return unit(group.gamma.abs()).mean(0) * unit(group.gamma_grad.abs()).mean(0)


def beta(group: GroupSignals, w_beta: float) -> Tensor:
    """The shift alone, with its sign: w_beta * beta / ||beta||. Far below zero the ReLU is shut."""
    return w_beta * unit(group.beta).mean(0)


def gfbs(group: GroupSignals, w_beta: float) -> Tensor:
    """Gradient flow based saliency: the Taylor term of gamma plus the signed beta.

    For several norms, each of the three factors is averaged over the norms before they combine.
    """
    return taylor(group, w_beta) + beta(group, w_beta)


def slimming(group: GroupSignals, w_beta: float) -> Tensor:
    """|gamma|, compared over all layers without normalisation: Liu et al., "Network Slimming" (ICCV
    2017), section 3. The paper trains with an L1 penalty on gamma first.
    """
    return group.gamma.abs().mean(0)


def taylor_fo(group: GroupSignals, w_beta: float) -> Tensor:
    """(dL/dz)^2 of a gate z = 1: Molchanov et al., "Importance Estimation for Neural Network
    Pruning" (CVPR 2019), section 3, the first-order importance (dL/dz * z)^2.
    """
    return group.gate_grad.square().mean(0)


def l1(group: GroupSignals, w_beta: float) -> Tensor:
    """sum |w| over each filter: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017),
    section 3.1. Unlike the paper, we divide each layer by its L2 norm, to compare layers.
    """
    return unit(torch.stack([filters.abs().sum(1) for filters in group.filters])).mean(0)


def fpgm(group: GroupSignals, w_beta: float) -> Tensor:
    """sum_j ||w - w_j|| over the filters j of the layer: other filters can replace one that is near
    the geometric median. He et al., "Filter Pruning via Geometric Median" (CVPR 2019), section 3.4.
    We divide each layer by its L2 norm.
    """
    exact = "donot_use_mm_for_euclid_dist"  # with mm, two equal filters are not at distance 0
    distances = [torch.cdist(f, f, compute_mode=exact).sum(1) for f in group.filters]
    return unit(torch.stack(distances)).mean(0)


def random(group: GroupSignals, w_beta: float) -> Tensor:
    """The control experiment: every channel is equally likely to go."""
    return group.random


@dataclass(frozen=True)
class Criterion:
    """A way to score channels.

    Attributes:
        score: maps the signals of a group and w_beta to scores (C,).
        gradients: the gradients that ``score`` needs. With None, the network is not run.
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


@dataclass(frozen=True)
class Scoring:
    """How channels are scored.

    Attributes:
        criterion: a name of ``CRITERIA``.
        w_beta: weight of the beta term.
        images: how many images the scoring batch has.
        seed: draws them at random; None for the first of the last tenth of the training set.
        recompute: compute activations again on the way back, to save memory.
        random_seed: of the criterion ``random``.
    """

    criterion: str
    w_beta: float
    images: int
    seed: int | None
    recompute: bool
    random_seed: int

    @property
    def looks_at_images(self) -> bool:
        return CRITERIA[self.criterion].gradients is not None


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

    The model runs in train mode: BatchNorm normalises by the statistics of the batch. Afterwards
    its parameters, buffers, gradients and modes, and the random state, are the same bits as before.

    Args:
        model: a gated network, not wrapped for several devices.
        images: (B, 3, H, W), normalised, on the model's device.
        labels: (B,) class indices.
        criterion: a name in ``CRITERIA``.
        w_beta: weight of the beta term.
        checkpoint_activations: recompute the activations inside ``checkpoint_blocks`` in the
            backward pass: less memory, the same scores.
        generator: CPU generator for the criterion ``random``; default: one with seed 0.

    Returns the scores (C,) by group name, on the CPU.

    Raises ValueError for an unknown criterion; InputError, with criterion and group, for scores
    that are not finite.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; known are {', '.join(CRITERIA)}")
    generator = generator or torch.Generator().manual_seed(0)
    score, kind = CRITERIA[criterion].score, CRITERIA[criterion].gradients
    groups = model.channel_groups()
    gradients: dict[str, Tensor] = {}
    if kind is not None:
        names = [name for group in groups for name in getattr(group, kind)]
        parameter = "weight" if kind == "norms" else "gate"
        watched = {name: getattr(model.get_submodule(name), parameter) for name in names}
        gradients = _gradients(model, images, labels, watched, checkpoint_activations)

    saliency = {}
    for group in groups:
        scores = score(_signals(model, group, gradients, generator), w_beta).cpu()
        if not torch.isfinite(scores).all():
            raise InputError(
                f"the {criterion} saliency of channel group {group.name} is not finite; take a "
                "checkpoint from before training diverged, or another --criterion"
            )
        saliency[group.name] = scores
    return saliency


def _gradients(
    model: GatedModel,
    images: Tensor,
    labels: Tensor,
    watched: Mapping[str, nn.Parameter],
    checkpoint_activations: bool,
) -> dict[str, Tensor]:
    """Gradients of the cross-entropy by the ``watched`` parameters, in train mode, flattened."""
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

    def gradients_of(names: tuple[str, ...]) -> Tensor | None:
        found = [gradients[name] for name in names if name in gradients]
        return torch.stack(found).cpu() if found else None

    filters = []
    for name in group.convs:
        weight = model.get_submodule(name).weight.detach()
        filters.append((weight if name in group.outputs else weight.transpose(0, 1)).flatten(1))
    return GroupSignals(
        gamma=gamma,
        beta=torch.stack([norm.bias.detach() for norm in norms]).cpu(),
        filters=filters,
        random=torch.rand(gamma.shape[1], generator=generator),
        gamma_grad=gradients_of(group.norms),
        gate_grad=gradients_of(group.gates),
    )


@contextmanager
def recomputed(blocks: list[nn.Module]) -> Iterator[None]:
    """Inside this context, recompute the activations of these modules in the backward pass."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # makes the method of the class visible again


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what a pass in train mode changes: buffers, modes, ``requires_grad``, random state."""
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
