"""The saliency: its formula, and that computing it leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import random_batch, random_model, relative_difference

from models import build_model
from utils.saliency import channel_saliency


def formula(model, images, labels, w_beta=0.05, taylor=True):
    """Section by section as the paper writes it, with an ordinary backward pass on a copy."""
    model = copy.deepcopy(model).train()
    F.cross_entropy(model(images), labels).backward()

    def normalised(vector):
        norm = vector.pow(2).sum().sqrt()
        return vector / norm if norm > 0 else torch.zeros_like(vector)

    scores = {}
    for group in model.channel_groups():
        norms = [model.get_submodule(name) for name in group.norms]
        gamma = sum(normalised(n.weight.detach().abs()) for n in norms) / len(norms)
        grad = sum(normalised(n.weight.grad.abs()) for n in norms) / len(norms)
        shift = sum(normalised(n.bias.detach()) for n in norms) / len(norms)
        scores[group.name] = taylor * gamma * grad + w_beta * shift
    return scores


@pytest.mark.parametrize("net", ["gatevgg11", "gateresnet20"])
@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {}),
        ({"w_beta": 0.3}, {"w_beta": 0.3}),
        ({"criterion": "taylor"}, {"w_beta": 0}),
        ({"criterion": "beta", "w_beta": 2.0}, {"w_beta": 2.0, "taylor": False}),
    ],
)
def test_scores_equal_the_formula(net, options, expected):
    model = random_model(net).double()
    images, labels = random_batch(dtype=torch.float64)
    scores = channel_saliency(model, images, labels, **options)
    for name, score in formula(model, images, labels, **expected).items():
        assert relative_difference(score, scores[name]) < 1e-12, name


def test_the_batch_normalises_itself():
    """Train mode: running statistics have no influence on the scores."""
    model, (images, labels) = random_model("gateresnet20"), random_batch()
    before = channel_saliency(model.eval(), images, labels)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.fill_(7)
    after = channel_saliency(model, images, labels)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("net", ["gatevgg11", "gateresnet20"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(net, training):
    model, (images, labels) = random_model(net).train(training), random_batch()
    if net == "gatevgg11":
        model.features.append(torch.nn.Dropout())  # draws from the random state
    model.features[1].eval() if net == "gatevgg11" else model.bn1.train()  # a mode of its own
    F.cross_entropy(model(images), labels).backward()
    frozen = next(model.parameters()).requires_grad_(False)
    next(p for n, p in model.named_parameters() if n.endswith("1.weight")).requires_grad_(False)

    def snapshot():
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state |= {f"{n}.buffer": b.clone() for n, b in model.named_buffers()}
        state |= {
            f"{n}.grad": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }
        modes = [module.training for module in model.modules()]
        return state, modes, [p.requires_grad for p in model.parameters()], torch.get_rng_state()

    before = snapshot()
    channel_saliency(model, images, labels)
    after = snapshot()
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:3] == after[1:3] and not frozen.requires_grad
    assert torch.equal(before[3], after[3])


def test_nothing_changes_when_the_pass_fails():
    model = random_model("gateresnet20").eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IndexError):
        channel_saliency(model, random_batch()[0], torch.full((8,), 99))
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("net", ["gatevgg11", "gateresnet56"])
def test_a_fresh_network_has_finite_scores(net):
    scores = channel_saliency(build_model(net), *random_batch())
    assert all(torch.isfinite(score).all() and (score > 0).any() for score in scores.values())


def test_dead_norm_scores_zero_not_nan():
    model = random_model("gatevgg11")
    for parameter in model.features[1].parameters():
        torch.nn.init.zeros_(parameter)
    assert (channel_saliency(model, *random_batch())["features.2"] == 0).all()


def test_unknown_criterion_and_infinite_scores_are_refused():
    model = random_model("gatevgg11")
    with pytest.raises(ValueError, match="known are gfbs"):
        channel_saliency(model, *random_batch(), criterion="magic")
    model.features[6].bias.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"features\.7 is not finite"):
        channel_saliency(model, *random_batch(), criterion="beta")
