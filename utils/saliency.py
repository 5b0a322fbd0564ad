"""Score channels from one forward and one backward pass of one minibatch, in train mode.

The method of "Exploring Gradient Flow Based Saliency for DNN Model Compression" (ACM MM 2021).
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import ChannelGroup, channel_groups, checkpoint_blocks
from models.gate import folded_gates
from utils.errors import InputError


@dataclass(frozen=True)
class GroupSignals:
    """What a criterion knows of one group with C channels.

    The dicts hold values of whole layers, by layer. A layer may have other channels, too: ``rows``
    and ``mean`` read the values where the channels of the group lie. Gradients are those of the
    loss; the ones that the criterion does not ask for are missing.
    """

    places: dict[str, Tensor]  # (C, n) where the channels lie in each layer
    gamma: dict[str, Tensor]  # scales of the norms
    beta: dict[str, Tensor]  # shifts of the norms
    # One matrix (outputs, weights) for each of the group's ``convs``: the filters that make the
    # channels or, where a convolution only reads them, its input slices.
    filters: dict[str, Tensor]
    random: Tensor  # (C,) uniform in [0, 1); other numbers for every group
    gamma_grad: dict[str, Tensor]
    beta_grad: dict[str, Tensor]
    gate_grad: dict[str, Tensor]

    def rows(self, values: Mapping[str, Tensor]) -> Tensor:
        """(layers, C) the values of the group's channels, layer by layer."""
        return torch.stack([v[self.places[name]].mean(1) for name, v in values.items()])

    def mean(self, values: Mapping[str, Tensor]) -> Tensor:
        """(C,) the mean over the layers, where each layer is divided by its L2 norm."""
        return self.rows({name: unit(v) for name, v in values.items()}).mean(0)

    def mean_abs(self, values: Mapping[str, Tensor]) -> Tensor:
        """(C,) the same of absolute values."""
        return self.mean({name: v.abs() for name, v in values.items()})


def unit(x: Tensor) -> Tensor:
    """Divide by the L2 norm, over the last dimension; a row of zeros stays zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # Squares of the tiny gradients of a very confident network are too small for float32.
    wide = F.normalize(x.double(), dim=-1, eps=torch.finfo(torch.float64).tiny).to(x.dtype)
    return torch.where(norm > 1e-12, x / norm, wide)


def gfbs(group: GroupSignals, w_beta: float) -> Tensor:
    """Gradient flow based saliency, the method of this project:

    |gamma| / ||gamma|| * |dL/dgamma| / ||dL/dgamma|| + w_beta * beta / ||beta||

    For several norms, each of the three factors is averaged over the norms before they combine.
    """
    return taylor(group, w_beta) + beta(group, w_beta)


def taylor(group: GroupSignals, w_beta: float) -> Tensor:
    """First-order Taylor term of gamma: |gamma| / ||gamma|| * |dL/dgamma| / ||dL/dgamma||."""
    return group.mean_abs(group.gamma) * group.mean_abs(group.gamma_grad)


def beta(group: GroupSignals, w_beta: float) -> Tensor:
    """The shift alone, with its sign: w_beta * beta / ||beta||. Far below zero the ReLU is shut."""
    return w_beta * group.mean(group.beta)


def slimming(group: GroupSignals, w_beta: float) -> Tensor:
    """|gamma|, compared over all layers without normalisation: Liu et al., "Network Slimming" (ICCV
    2017), section 3. The paper trains with an L1 penalty on gamma first.
    """
    return group.rows(group.gamma).abs().mean(0)


def taylor_fo(group: GroupSignals, w_beta: float) -> Tensor:
    """(dL/dz)^2 of a gate z = 1: Molchanov et al., "Importance Estimation for Neural Network
    Pruning" (CVPR 2019), section 3, the first-order importance (dL/dz * z)^2.

    Without gates, z stands behind each norm: dL/dz = gamma * dL/dgamma + beta * dL/dbeta.
    """
    gates = group.gate_grad or {
        norm: gamma * group.gamma_grad[norm] + group.beta[norm] * group.beta_grad[norm]
        for norm, gamma in group.gamma.items()
    }
    return group.rows(gates).square().mean(0)


def l1(group: GroupSignals, w_beta: float) -> Tensor:
    """sum |w| over each filter: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017),
    section 3.1. Unlike the paper, we divide each layer by its L2 norm, to compare layers.
    """
    return group.mean({conv: filters.abs().sum(1) for conv, filters in group.filters.items()})


def fpgm(group: GroupSignals, w_beta: float) -> Tensor:
    """sum_j ||w - w_j|| over the filters j of the layer: other filters can replace one that is near
    the geometric median. He et al., "Filter Pruning via Geometric Median" (CVPR 2019), section 3.4.
    We divide each layer by its L2 norm.
    """
    exact = "donot_use_mm_for_euclid_dist"  # with mm, two equal filters are not at distance 0
    return group.mean(
        {n: torch.cdist(f, f, compute_mode=exact).sum(1) for n, f in group.filters.items()}
    )


def random(group: GroupSignals, w_beta: float) -> Tensor:
    """The control experiment: every channel is equally likely to go."""
    return group.random


@dataclass(frozen=True)
class Criterion:
    """A way to score channels."""

    score: Callable[[GroupSignals, float], Tensor]  # the signals of a group, w_beta -> (C,)
    # Whose gradients ``score`` needs: those of gamma and beta, or of the gates (of gamma and beta
    # again in a network without gates). With None, the network is not run.
    gradients: Literal["norms", "gates"] | None = None
    scope: Literal["global", "layer"] = "global"  # how its paper ranks channels; see ``Ranking``


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
    """How channels are scored."""

    criterion: str  # a name in ``CRITERIA``
    w_beta: float  # weight of the beta term
    images: int  # how many the scoring batch has
    seed: int | None  # draws them; None: the first of the last tenth of the training set
    recompute: bool  # recompute activations in the backward pass, to save memory
    random_seed: int  # of the criterion ``random``


def channel_saliency(
    model: nn.Module,
    images: Tensor,
    labels: Any,
    *,
    criterion: str = "gfbs",
    w_beta: float = 0.05,
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    checkpoint_activations: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Score every prunable channel of ``model`` on one minibatch.

    A copy runs in train mode: BatchNorm normalises by the statistics of the batch. The model and
    the random state do not change.

    Args:
        model: a gated network, or one that ``models.trace.trace`` has seen; without a wrapper.
        images: the input (B, ...) of the network, on the model's device; usually (B, 3, H, W).
        labels: what ``loss`` compares the output with; usually (B,) class indices.
        criterion: a name in ``CRITERIA``.
        w_beta: weight of the beta term.
        loss: ``loss(model(images), labels)`` is a scalar.
        checkpoint_activations: recompute them in the backward pass: less memory, the same scores.
        generator: CPU generator for the criterion ``random``; default: one with seed 0.

    Returns the scores (C,) by group name, on the CPU. Raises ValueError for an unknown criterion;
    InputError, with criterion and group, for scores that are not finite.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; known are {', '.join(CRITERIA)}")
    generator = generator or torch.Generator().manual_seed(0)
    score, needed = CRITERIA[criterion].score, CRITERIA[criterion].gradients
    groups, weights, gradients = channel_groups(model), model.state_dict(), {}
    if needed:
        watched = [name for group in groups for name in _watched(group, needed)]
        gradients = _gradients(model, watched, images, labels, loss, checkpoint_activations)
    saliency = {}
    for group in groups:
        scores = score(_signals(model, group, weights, gradients, generator), w_beta).cpu()
        if not torch.isfinite(scores).all():
            wrong = f"the {criterion} saliency of channel group {group.name} is not finite"
            advice = "take a checkpoint from before training diverged, or another --criterion"
            raise InputError(f"{wrong}; {advice}")
        saliency[group.name] = scores
    return saliency


def _watched(group: ChannelGroup, needed: str) -> list[str]:
    """The names of the parameters whose gradients a criterion needs."""
    if needed == "gates" and group.gates:
        return [f"{gate}.gate" for gate in group.gates]
    return [f"{norm}.{name}" for norm in group.norms for name in ("weight", "bias")]


def _gradients(
    model: nn.Module,
    names: Iterable[str],
    images: Tensor,
    labels: Any,
    loss: Callable[[Any, Any], Tensor],
    recompute: bool,
) -> dict[str, Tensor]:
    """Gradients (C,) of the loss by these parameters, on the CPU."""
    watched = {name: nn.Parameter(model.get_parameter(name).detach()) for name in names}
    # A copy, as train mode changes running statistics; it shares the weights, to save memory.
    shared = {id(weight): weight for weight in model.parameters()}
    shared |= {id(model.get_parameter(name)): weight for name, weight in watched.items()}
    model = copy.deepcopy(model, shared).train()
    for block in checkpoint_blocks(model) if recompute else []:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), folded_gates(model):
        # A norm may lie on a branch that the loss does not see: then its gradient is 0.
        value, leaves = loss(model(images), labels), list(watched.values())
        gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    return {name: grad.flatten().cpu() for name, grad in zip(watched, gradients, strict=True)}


def _signals(
    model: nn.Module,
    group: ChannelGroup,
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    generator: torch.Generator,
) -> GroupSignals:
    def read(source: Mapping[str, Tensor], layers: Iterable[str], name: str) -> dict[str, Tensor]:
        known = [layer for layer in layers if f"{layer}.{name}" in source]
        return {layer: source[f"{layer}.{name}"].cpu() for layer in known}

    filters = read(weights, group.convs, "weight")
    for name, weight in filters.items():
        transposed = getattr(model.get_submodule(name), "transposed", False)  # inputs come first
        rows = weight if (name in group.outputs) != transposed else weight.transpose(0, 1)
        filters[name] = rows.flatten(1)
    sides = {**group.inputs, **group.outputs}
    return GroupSignals(
        places={name: sides[name] for name in (*group.gates, *group.norms, *group.convs)},
        gamma=read(weights, group.norms, "weight"),
        beta=read(weights, group.norms, "bias"),
        filters=filters,
        random=torch.rand(group.width, generator=generator),
        gamma_grad=read(gradients, group.norms, "weight"),
        beta_grad=read(gradients, group.norms, "bias"),
        gate_grad=read(gradients, group.gates, "gate"),
    )
