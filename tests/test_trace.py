"""Networks without gates: what is read off the forward pass, and that cutting it is exact."""

from __future__ import annotations

import copy

import networks
import pytest
import torch
import torch.nn.functional as F
from helpers import random_batch, random_model, random_plan, relative_difference, settle
from torch import nn

from models import Gate, channel_groups, group_widths, structure
from models.trace import trace
from utils.pruning import PruningPlan, Ranking, select_channels
from utils.saliency import CRITERIA, channel_saliency
from utils.surgery import first_difference, prune

EXAMPLE = torch.empty(1, 3, 16, 16)
# What can go: the channels of these layers, and no others.
FREE = {
    networks.Branches: ["stem.0", "a.0", "b.0", "unused.0"],
    networks.Shuffle: ["a.0", "b.0", "c.0.0", "c.1.0"],
    networks.Halves: ["a.0", "b.0"],
    networks.Excite: ["a.0", "b.0", "excite", "c.0"],
    networks.PreActivation: ["conv", "conv1"],
    networks.UNet: ["a.0", "b.0", "c.0", "up", "d.0"],
    networks.Flattened: ["features.0.0", "features.1.0", "hidden"],
    networks.Twice: ["a.0", "b.0", "conv"],
    networks.Written: ["a.0", "d.0"],
    networks.Foreign: ["c.0"],
    networks.Constant: ["b.0", "c.0", "d.0"],
    networks.Conv1d: ["features.0", "features.3"],
    networks.DnCNN: ["layers.2", "layers.5", "layers.8"],
}


def network_of(kind):
    """In float64, with random norms."""
    torch.manual_seed(1)
    model = trace(kind().double(), EXAMPLE)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 1, 0.3), nn.init.normal_(module.bias, 0.5, 0.3)
    return settle(model, random_batch(4, 16, dtype=torch.float64)[0])


@pytest.mark.parametrize("kind", networks.NETWORKS)
def test_what_can_go_is_what_the_rules_say(kind):
    model = network_of(kind)
    made = {name for group in channel_groups(model) for name in group.outputs}
    layers = {
        n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))
    }
    assert made & layers == set(FREE[kind])


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", networks.NETWORKS)
def test_masked_equals_pruned_also_when_pruned_twice(kind, seed):
    model = network_of(kind)
    images, _ = random_batch(4, 16, dtype=torch.float64)
    for again in range(2):
        plan = random_plan(model, seed + 10 * again, [0.2, 0.5, None][seed - 1])
        masked = plan.apply_mask(copy.deepcopy(model))
        weights = sum(p.numel() for p in model.parameters())
        prune(model, plan)
        assert sum(p.numel() for p in model.parameters()) < weights or again
        for mode in (True, False):
            a, b = masked.train(mode), model.train(mode)
            with torch.no_grad():
                expected = a(images)
                assert relative_difference(expected, b(images)) < 1e-10, mode
                assert mode or expected.std(0).max() > 1e-4
        assert (
            first_difference(masked.float(), copy.deepcopy(model).float(), images.float()) is None
        )


def without_gates(net):
    model = random_model(net)
    for name in [name for name, module in model.named_modules() if isinstance(module, Gate)]:
        model.set_submodule(name, nn.Identity())
    return trace(model, torch.empty(1, 3, 64, 64))


@pytest.mark.parametrize("net", ["gatevgg16", "gateresnet20", "gatemobilenetv2", "resnet50"])
def test_groups_without_gates_are_those_with_gates(net):
    gated, plain = random_model(net), without_gates(net)
    for ours, theirs in zip(gated.channel_groups(), channel_groups(plain), strict=True):
        assert (ours.norms, ours.convs) == (theirs.norms, theirs.convs)
        assert set(theirs.outputs) == set(ours.outputs) - set(ours.gates)
        assert set(theirs.inputs) == set(ours.inputs)
        assert theirs.name == ours.norms[0] and not theirs.gates


@pytest.mark.parametrize("criterion", [*CRITERIA])
def test_scores_without_gates_are_those_with_gates(criterion):
    """In a VGG a gate stands directly behind each norm: there even the gate's own score agrees."""
    gated, plain = random_model("gatevgg11"), without_gates("gatevgg11")
    batch = random_batch(8)
    ours = channel_saliency(gated, *batch, criterion=criterion)
    theirs = channel_saliency(plain, *batch, criterion=criterion)
    for a, b in zip(ours.values(), theirs.values(), strict=True):
        assert relative_difference(a, b) < 1e-4


def test_a_channel_counts_once_for_each_place_in_its_first_norm():
    groups = {group.name: group for group in channel_groups(network_of(networks.Shuffle))}
    assert len(groups["b.1"].entries) == 6 and groups["b.1"].width == 2
    assert Ranking([groups["b.1"]], {"b.1": torch.rand(2)}).entries == 12
    scores = {name: torch.rand(group.width) + (name == "b.1") for name, group in groups.items()}
    places = sum(len(group.entries) * group.width for group in groups.values())
    plan = select_channels([*groups.values()], scores, 1 - 6 / places)
    assert {len(keep) for keep in plan.keep.values()} == {1}


def test_scoring_changes_nothing_and_takes_any_loss():
    """The paper's denoising network: the loss is the mean squared error of an image."""
    model = network_of(networks.DnCNN).float()
    before = copy.deepcopy(model.state_dict())
    noisy, clean = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    scores = channel_saliency(model, noisy, clean, criterion="taylor", loss=F.mse_loss)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    copied = copy.deepcopy(model).train()
    F.mse_loss(copied(noisy), clean).backward()
    for name, score in scores.items():
        norm = copied.get_submodule(name)
        expected = F.normalize(norm.weight.abs(), dim=0) * F.normalize(
            norm.weight.grad.abs(), dim=0
        )
        assert relative_difference(expected.detach(), score) < 1e-5


def test_what_stays_is_named():
    notes = structure(network_of(networks.Foreign)).notes
    assert any("group_norm" in note for note in notes) and any(
        "conv2d in own" in note for note in notes
    )
    assert "behind some norms" not in " ".join(structure(network_of(networks.DnCNN)).notes)
    (note,) = (n for n in structure(network_of(networks.Excite)).notes if "ReLU" in n)
    assert "hardswish, silu" in note


class Odd(networks.Classifier):
    def __init__(self, features):
        super().__init__(8)
        self.a, self.b, self.do = networks.layer(3, 8), networks.layer(8, 8), features

    def features(self, x):
        return self.do(self, x)


REFUSED = {
    "b.1: runs twice": lambda net, x: net.b(net.b(net.a(x))),
    "cannot trace .* meta tensors": lambda net, x: net.b(net.a(x)) if x.sum() > 0 else net.a(x),
    "cannot trace": lambda net, x: net.b(net.a(x[: int(x.max())])),
    "no BatchNorm": lambda net, x: F.conv2d(x, torch.ones(8, 3, 1, 1)),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_pruned_is_one_line(said):
    with pytest.raises(ValueError, match=rf"\A[^\n]*{said}[^\n]*\Z"):
        trace(Odd(REFUSED[said]), EXAMPLE)


def test_a_branch_by_size_is_taken_as_the_example_takes_it():
    def features(net, x):
        x = net.a(x)
        return net.b(x) if x.shape[-1] > 8 else x

    model = trace(Odd(features), EXAMPLE)
    assert set(group_widths(model)) == {"a.1", "b.1"}


def test_the_first_layer_that_differs_is_named():
    model = network_of(networks.DnCNN).float()
    images, _ = random_batch(4, 16)
    plan = random_plan(model, 3, 0.5)
    masked = plan.apply_mask(copy.deepcopy(model))
    pruned = prune(model, plan)
    assert first_difference(masked, pruned, images) is None
    nn.init.ones_(pruned.layers[11].bias)
    assert first_difference(masked, pruned, images) == "layers.11"


def test_the_network_stays_what_it_is():
    model = networks.UNet()
    before, forward = copy.deepcopy(model.state_dict()), model.forward
    assert (
        trace(model, EXAMPLE) is model and model.forward == forward and type(model) is networks.UNet
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert structure(model).head == "e" and PruningPlan({}).apply_mask(model) is model
