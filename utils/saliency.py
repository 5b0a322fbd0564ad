"""Score channels from one forward and one backward pass of one minibatch, in train mode.

The method of "Exploring Gradient Flow Based Saliency for DNN Model Compression" (ACM MM 2021).
"""

import copy
from collections.abc import Callable
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
    """What a criterion knows of one group with C channels and k norms.

    Attributes:
        gamma: scales of the norms (k, C).
        beta: shifts of the norms (k, C).
        filters: one matrix (C, weights per channel) for each of the group's ``convs``: the filters
            that make the channels or, where a convolution only reads them, its input slices.
        random: (C,) uniform in [0, 1); other numbers for every group.
        gamma_grad: gradients of the loss by gamma (k, C), if ``Criterion.gradients`` is "norms".
        gate_grad: gradients of the loss by the gates (gates, C), if it is "gates".
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
        images: number of images in the scoring batch.
        seed: draws them at random; None: the first of the last tenth of the training set.
        recompute: recompute activations in the backward pass, to save memory.
        random_seed: seed of the criterion ``random``.
    """

    criterion: str
    w_beta: float
    images: int
    seed: int | None
    recompute: bool
    random_seed: int


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

    A copy runs in train mode: BatchNorm normalises by the statistics of the batch. The model and
    the random state do not change.

    Args:
        model: a gated network, not wrapped for several devices.
        images: (B, 3, H, W), normalised, on the model's device.
        labels: (B,) class indices.
        criterion: a name in ``CRITERIA``.
        w_beta: weight of the beta term.
        checkpoint_activations: recompute the activations inside ``checkpoint_blocks`` in the
            backward pass: less memory, the same scores.
        generator: CPU generator for the criterion ``random``; default: one with seed 0.

    Returns the scores (C,) by group name, on the CPU. Raises ValueError for an unknown criterion;
    InputError, with criterion and group, for scores that are not finite.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; known are {', '.join(CRITERIA)}")
    generator = generator or torch.Generator().manual_seed(0)
    score, kind = CRITERIA[criterion].score, CRITERIA[criterion].gradients
    gradients = _gradients(model, images, labels, kind, checkpoint_activations) if kind else {}
    saliency = {}
    for group in model.channel_groups():
        scores = score(_signals(model, group, gradients, generator), w_beta).cpu()
        if not torch.isfinite(scores).all():
            wrong = f"the {criterion} saliency of channel group {group.name} is not finite"
            advice = "take a checkpoint from before training diverged, or another --criterion"
            raise InputError(f"{wrong}; {advice}")
        saliency[group.name] = scores
    return saliency


def _gradients(
    model: GatedModel, images: Tensor, labels: Tensor, kind: str, recompute: bool
) -> dict[str, Tensor]:
    """Gradients (C,) of the cross-entropy by gamma or by the gates, by the layer's name."""
    # A copy, as train mode changes running statistics; it shares the weights, to save memory.
    model = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()}).train()
    names = [name for group in model.channel_groups() for name in getattr(group, kind)]
    parameter, watched = "weight" if kind == "norms" else "gate", []
    for layer in map(model.get_submodule, names):
        watched.append(nn.Parameter(getattr(layer, parameter).detach()))
        setattr(layer, parameter, watched[-1])
    for block in model.checkpoint_blocks() if recompute else []:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices), torch.enable_grad(), folded_gates(model):
        gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), watched)
    return {name: grad.flatten() for name, grad in zip(names, gradients, strict=True)}


def _signals(
    model: GatedModel, group: ChannelGroup, gradients: dict[str, Tensor], generator: torch.Generator
) -> GroupSignals:
    def stack(tensors: list[Tensor]) -> Tensor | None:
        return torch.stack(tensors).detach().cpu() if tensors else None

    norms = [model.get_submodule(name) for name in group.norms]
    filters = []
    for name in group.convs:
        weight = model.get_submodule(name).weight.detach()
        filters.append((weight if name in group.outputs else weight.transpose(0, 1)).flatten(1))
    return GroupSignals(
        gamma=stack([norm.weight for norm in norms]),
        beta=stack([norm.bias for norm in norms]),
        filters=filters,
        random=torch.rand(norms[0].num_features, generator=generator),
        gamma_grad=stack([gradients[name] for name in group.norms if name in gradients]),
        gate_grad=stack([gradients[name] for name in group.gates if name in gradients]),
    )
