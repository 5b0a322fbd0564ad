"""The saliency: its formula, and that computing it leaves no trace."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import formula, random_batch, random_model, relative_difference

import gfbs_cifar
from models import build_model
from utils.errors import InputError
from utils.pruning import PruningPlan
from utils.saliency import CRITERIA, Criterion, channel_saliency
from utils.surgery import prune

FORMULAS = [
    ({}, {}),
    ({"w_beta": 0.3}, {"w_beta": 0.3}),
    ({"criterion": "taylor"}, {"w_beta": 0}),
    ({"criterion": "beta", "w_beta": 2.0}, {"w_beta": 2.0, "taylor": False}),
]


CASES = [(net, *both) for net in ("gatevgg11", "gateresnet20") for both in FORMULAS]


@pytest.mark.parametrize("net, options, expected", [*CASES, ("gatemobilenetv2", {}, {})])
def test_scores_equal_the_formula(net, options, expected):
    model = random_model(net).double()
    images, labels = random_batch(size=32 if net == "gatevgg11" else 16, dtype=torch.float64)
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


@pytest.mark.parametrize(
    "net, criterion", [("gatevgg11", "gfbs"), *(("gateresnet20", name) for name in CRITERIA)]
)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(net, criterion, training):
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
    scores = channel_saliency(model, images, labels, criterion=criterion)
    after = snapshot()
    assert scores.keys() == model.group_widths().keys()
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
    with pytest.raises(InputError, match=r"beta saliency .* features\.7 is not finite"):
        channel_saliency(model, *random_batch(), criterion="beta")


# The other criteria: each against its formula, with loops instead of tensor operations


def conv_of(model, norm):
    """The convolution in front of a norm, by the names of these networks."""
    if norm.startswith("features."):
        return model.get_submodule(f"features.{int(norm.split('.')[1]) - 1}")
    return model.get_submodule(norm.replace("bn", "conv"))


def divided_by_norm(values):
    length = math.sqrt(sum(value**2 for value in values))
    return [value / length for value in values]


def filter_norms(model, group):
    return [
        divided_by_norm([row.abs().sum().item() for row in conv_of(model, norm).weight])
        for norm in group.norms
    ]


def filter_distances(model, group):
    layers = []
    for norm in group.norms:
        rows = conv_of(model, norm).weight.detach().flatten(1)
        sums = [sum((a - b).square().sum().sqrt().item() for b in rows) for a in rows]
        layers.append(divided_by_norm(sums))
    return layers


def gammas(model, group):
    return [model.get_submodule(norm).weight.abs().tolist() for norm in group.norms]


@pytest.mark.parametrize("net", ["gatevgg11", "gateresnet20"])
@pytest.mark.parametrize(
    "criterion, layers", [("l1", filter_norms), ("fpgm", filter_distances), ("slimming", gammas)]
)
def test_criteria_without_a_pass_equal_their_formulas(net, criterion, layers, monkeypatch):
    model = random_model(net).double()
    if net == "gatevgg11":  # its wide layers would take the loops minutes
        prune(model, PruningPlan({n: list(range(12)) for n in model.group_widths()}))
    monkeypatch.setattr(model, "forward", None)  # the batch is not looked at
    scores = channel_saliency(model, *random_batch(), criterion=criterion)
    for group in model.channel_groups():
        rows = layers(model, group)
        expected = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        assert relative_difference(torch.tensor(expected), scores[group.name]) < 1e-6, group.name


@pytest.mark.parametrize("net", ["gatevgg11", "gateresnet20"])
def test_taylor_fo_is_the_squared_derivative_of_the_loss_by_the_gate(net):
    """By finite differences, one gate entry at a time."""
    model, (images, labels) = random_model(net).double(), random_batch(dtype=torch.float64)
    scores = channel_saliency(model, images, labels, criterion="taylor_fo")

    def loss(gate, channel, value):
        moved = copy.deepcopy(model).train()
        moved.get_submodule(gate).gate.data[0, channel] = value
        with torch.no_grad():
            return F.cross_entropy(moved(images), labels).item()

    for group in (model.channel_groups()[0], model.channel_groups()[-1]):
        channel, h = scores[group.name].argmax().item(), 1e-5
        squares = [
            ((loss(gate, channel, 1 + h) - loss(gate, channel, 1 - h)) / (2 * h)) ** 2
            for gate in group.gates
        ]
        expected = sum(squares) / len(squares)
        assert scores[group.name][channel].item() == pytest.approx(expected, rel=1e-3)


def test_random_scores_are_drawn_from_the_generator():
    model = random_model("gateresnet20")

    def draw(seed):
        stream = torch.Generator().manual_seed(seed)
        scores = channel_saliency(model, *random_batch(), criterion="random", generator=stream)
        return torch.cat(list(scores.values()))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert len(draw(1).unique()) == len(draw(1)) and draw(1).min() >= 0 and draw(1).max() < 1
    assert 0.4 < draw(1).mean() < 0.6


def test_a_new_criterion_is_a_function_and_a_line(monkeypatch):
    """As the README shows."""
    gradient = Criterion(
        lambda group, w_beta: group.rows(group.gamma_grad).abs().mean(0), gradients="norms"
    )
    monkeypatch.setitem(CRITERIA, "gradient", gradient)
    model, (images, labels) = random_model("gatevgg11"), random_batch()
    scores = channel_saliency(model, images, labels, criterion="gradient")
    F.cross_entropy(model.train()(images), labels).backward()
    assert relative_difference(model.features[1].weight.grad.abs(), scores["features.2"]) < 1e-6
    assert gfbs_cifar.parse_args(["--criterion", "gradient"]).criterion == "gradient"
