"""Surgery: the masked network and the pruned one compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import random_batch, random_model, random_plan, relative_difference, settle
from torch import nn

from models import NETWORKS, Gate
from models.layers import ChannelSelector, PadShortcut
from utils.pruning import PruningPlan, select_channels
from utils.saliency import channel_saliency
from utils.surgery import keep_inputs, keep_outputs, prune


def image_size(net):
    return 32 if net.startswith(("gatevgg", "resnet")) else 16


KINDS = ["p0.2", "p0.5", "p0.9", "random", "one channel"]
# The same layers in another number, so one kind is enough for them.
ALIKE = {"gatevgg11", "gatevgg13", "gatevgg19"}
ALIKE |= {"gateresnet32", "gateresnet44", "gateresnet56", "gateresnet110"}
ALIKE |= {"resnet34", "resnet101", "resnet152"}
CASES = [(net, kind) for net in NETWORKS for kind in KINDS if net not in ALIKE or kind == "p0.5"]


@pytest.mark.parametrize("net, kind", CASES)
def test_masked_equals_pruned(net, kind):
    model = random_model(net).double()
    images, labels = random_batch(4, image_size(net), dtype=torch.float64)
    if kind.startswith("p"):
        saliency = channel_saliency(model, images, labels)
        plan = select_channels(model.channel_groups(), saliency, float(kind[1:]))
    else:
        plan = random_plan(model, seed=5, share=0 if kind == "one channel" else None)
    masked = settle(plan.apply_mask(copy.deepcopy(model)), images)
    pruned = prune(copy.deepcopy(masked), plan)
    assert {name: len(keep) for name, keep in plan.keep.items()} == pruned.group_widths()
    for mode in (False, True):
        masked.train(mode), pruned.train(mode)
        with torch.no_grad():
            logits = masked(images)
            assert relative_difference(logits, pruned(images)) < 1e-10, mode
        # The images must make a difference, or equality says little about the layers.
        assert kind == "one channel" or logits.std(0).max() > 1e-3, mode

    optimizer = torch.optim.SGD([p for p in pruned.parameters() if p.requires_grad], 0.1)
    before = copy.deepcopy(pruned.state_dict())
    F.cross_entropy(pruned(images), labels).backward()
    optimizer.step()
    changed = {n for n, tensor in pruned.state_dict().items() if not torch.equal(before[n], tensor)}
    assert f"{pruned.head}.bias" in changed
    assert all(p.grad is not None for p in pruned.parameters() if p.requires_grad)
    assert not any(name.endswith("gate") for name in changed)


@pytest.mark.parametrize("net", ["gatevgg11", "gateresnet20", "gatemobilenetv2"])
def test_pruning_twice_equals_pruning_once(net):
    model = random_model(net).double().eval()
    images, _ = random_batch(4, image_size(net), dtype=torch.float64)
    once = prune(copy.deepcopy(model), random_plan(model, seed=1))
    twice = prune(copy.deepcopy(once), random_plan(once, seed=2))
    directly = prune(copy.deepcopy(model), PruningPlan(twice.kept))
    assert torch.equal(twice(images), directly(images))
    assert twice.kept == directly.kept
    for name, tensor in twice.state_dict().items():
        assert torch.equal(tensor, directly.state_dict()[name]), name


@pytest.mark.parametrize("net", ["gatevgg11", "gateresnet20", "gatemobilenetv2"])
def test_stages_together_are_the_whole_plan(net):
    model = random_model(net)
    plan = random_plan(model, seed=3)
    untouched = list(plan.keep)[1]
    plan.keep[untouched] = list(range(model.group_widths()[untouched]))
    staged, cut = copy.deepcopy(model), []
    for stage in model.pruning_stages():
        cut += prune(staged, plan.only(stage)).kept.keys() - set(cut)
        staged(random_batch(2, image_size(net))[0])  # the network runs after every stage
    losing = {n for n, width in model.group_widths().items() if len(plan.keep[n]) < width}
    assert sorted(cut) == sorted(losing)
    whole = prune(copy.deepcopy(model), plan)
    for name, tensor in whole.eval().state_dict().items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(tensor, staged.state_dict()[name]), name


def test_residual_stages_are_blocks():
    model = random_model("gateresnet20")
    stages = model.pruning_stages()
    assert len(stages) == 9
    assert set(stages[0]) == {"gate1", "layer1.0.gate1"}
    assert set(stages[3]) == {"layer2.0.gate1", "layer2.0.gate2"}


def test_a_plan_that_does_not_fit_changes_nothing():
    model = random_model("gateresnet20")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="gate1"):
        prune(model, PruningPlan({"layer1.0.gate1": [0], "gate1": [99]}))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.kept == {}


def test_slices_keep_every_attribute():
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2, padding_mode="reflect")
    conv.weight.requires_grad_(False)
    weight, bias = conv.weight.clone(), conv.bias.clone()
    keep_outputs(conv, torch.tensor([1, 4, 7]))
    keep_inputs(conv, torch.tensor([0, 5]))
    assert (conv.in_channels, conv.out_channels) == (2, 3)
    assert (conv.stride, conv.dilation, conv.padding_mode) == ((2, 2), (2, 2), "reflect")
    assert torch.equal(conv.weight, weight[[1, 4, 7]][:, [0, 5]]) and not conv.weight.requires_grad
    assert torch.equal(conv.bias, bias[[1, 4, 7]]) and conv.bias.requires_grad
    assert conv(torch.randn(1, 2, 9, 9)).shape[1] == 3

    norm = nn.BatchNorm2d(8, eps=0.1, momentum=0.3)
    norm.num_batches_tracked += 5
    norm.running_mean.normal_()
    mean = norm.running_mean.clone()
    keep_outputs(norm, torch.tensor([0, 3]))
    assert (norm.num_features, norm.eps, norm.momentum) == (2, 0.1, 0.3)
    assert norm.num_batches_tracked == 5
    assert torch.equal(norm.running_mean, mean[[0, 3]])
    assert set(norm.state_dict()) == set(nn.BatchNorm2d(2).state_dict())

    gate = Gate(4)
    keep_outputs(gate, torch.tensor([2]))
    assert gate.gate.shape == (1, 1, 1, 1) and not gate.gate.requires_grad


def test_inputs_of_a_depthwise_convolution_go_with_their_outputs():
    conv = nn.Conv2d(6, 6, 3, groups=6, bias=False)
    weight = conv.weight.clone()
    keep_outputs(conv, torch.tensor([0, 2, 5]))
    keep_inputs(conv, torch.tensor([0, 2, 5]))
    assert (conv.in_channels, conv.out_channels, conv.groups) == (3, 3, 3)
    assert torch.equal(conv.weight, weight[[0, 2, 5]])


def test_padded_shortcut_maps_any_subsets():
    shortcut = PadShortcut(4, 8, stride=2)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(shortcut(x), F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
    keep_inputs(shortcut, torch.tensor([1, 3]))
    keep_outputs(shortcut, torch.tensor([0, 2, 3, 5, 7]))
    masked = torch.zeros_like(x)
    masked[:, [1, 3]] = x[:, [1, 3]]
    expected = PadShortcut(4, 8, stride=2)(masked)[:, [0, 2, 3, 5, 7]]
    assert torch.equal(shortcut(x[:, [1, 3]]), expected)


def test_selector_follows_any_subsets():
    selector = ChannelSelector(6)
    x = torch.randn(2, 6, 3, 3)
    assert selector(x) is x and not selector.state_dict()
    keep_outputs(selector, torch.tensor([0, 2, 3, 5]))
    assert torch.equal(selector(x), x[:, [0, 2, 3, 5]])
    keep_outputs(selector, torch.tensor([1, 3]))
    assert torch.equal(selector(x), x[:, [2, 5]])
    keep_inputs(selector, torch.tensor([0, 2, 5]))
    assert torch.equal(selector(x[:, [0, 2, 5]]), x[:, [2, 5]])
    keep_inputs(selector, torch.tensor([1, 2]))
    narrow = x[:, [2, 5]]
    assert selector(narrow) is narrow


def test_memory_formats_last_there_and_back():
    selector = ChannelSelector(4)
    keep_outputs(selector, torch.tensor([0, 1, 3]))
    x = torch.randn(2, 4, 6, 6)
    for layer in (PadShortcut(4, 8, stride=2), selector):
        made = []
        for layout in (torch.contiguous_format, torch.channels_last):
            leaf = x.clone(memory_format=layout).requires_grad_()
            out = layer(leaf)
            (out * torch.arange(out.numel()).view_as(out)).sum().backward()
            assert out.is_contiguous(memory_format=layout), layer
            assert leaf.grad.is_contiguous(memory_format=layout), layer
            made.append((out, leaf.grad))
        assert all(torch.equal(*both) for both in zip(*made, strict=True)), layer


def test_selector_knows_its_channels_where_tensors_have_no_values():
    selector = ChannelSelector(6).to("meta")
    keep_outputs(selector, torch.tensor([1, 4, 5]))
    keep_inputs(selector, torch.tensor([1, 3, 4, 5]))
    assert (selector.channels, selector.in_channels) == ((0, 2, 3), 4)
    assert selector.index.is_meta and selector(torch.empty(1, 4, 2, 2, device="meta")).shape[1] == 3


def test_unknown_layers_are_refused_by_type():
    with pytest.raises(TypeError, match="LSTM"):
        keep_outputs(nn.LSTM(3, 3), torch.tensor([0]))
    with pytest.raises(TypeError, match="Identity"):
        keep_inputs(nn.Identity(), torch.tensor([0]))
