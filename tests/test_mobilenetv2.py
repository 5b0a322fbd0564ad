"""What is particular to MobileNetV2: depthwise groups, its shortcuts, its head."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers import random_batch, random_model, random_plan

from models import build_model
from utils.cost import model_cost
from utils.saliency import channel_saliency
from utils.selection import planned_cost
from utils.surgery import prune

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

# The table of the paper for CIFAR, block by block: inputs, expansion, outputs, stride.
BLOCKS = [(32, 1, 16, 1), (16, 6, 24, 1), (24, 6, 24, 1), (24, 6, 32, 2), *[(32, 6, 32, 1)] * 2]
BLOCKS += [(32, 6, 64, 2), *[(64, 6, 64, 1)] * 3, (64, 6, 96, 1), *[(96, 6, 96, 1)] * 2]
BLOCKS += [(96, 6, 160, 2), *[(160, 6, 160, 1)] * 2, (160, 6, 320, 1)]
PROJECTED = (0, 1, 10, 16)  # blocks of stride 1 that change the width
STREAMS = [(0,), (1, 2), (3, 4, 5), (6, 7, 8, 9), (10, 11, 12), (13, 14, 15), (16,)]


@pytest.fixture(scope="module")
def original():
    return random_model("gatemobilenetv2")


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


def count_by_hand(widths, size=32, classes=10):
    """(MACs, parameters) layer by layer, from the channels of every group alone."""
    macs = params = 0

    def convolution(inputs, outputs, kernel, side):  # and the norm after it
        nonlocal macs, params
        macs += kernel**2 * inputs * outputs * side**2
        params += kernel**2 * inputs * outputs + 2 * outputs

    stream, side = widths["gate1"], size
    convolution(3, stream, 3, side)
    for b, (_, _, _, stride) in enumerate(BLOCKS):
        inner = widths[f"layers.{b}.gate1"]
        after = widths[f"layers.{next(s[0] for s in STREAMS if b in s)}.gate3"]
        convolution(stream, inner, 1, side)
        if b in PROJECTED:
            convolution(stream, after, 1, side)
        side //= stride
        convolution(1, inner, 3, side)  # depthwise: every output has one input
        convolution(inner, after, 1, side)
        stream = after
    convolution(stream, widths["gate2"], 1, side)
    macs += widths["gate2"] * classes
    return macs, params + (widths["gate2"] + 1) * classes


def test_published_keys():
    expected = {"conv1.weight", "conv2.weight", "gate1.gate", "gate2.gate"}
    expected |= {"linear.weight", "linear.bias"}
    expected |= {f"bn{k}.{part}" for k in (1, 2) for part in NORM}
    for b in range(17):
        for k in (1, 2, 3):
            expected |= {f"layers.{b}.conv{k}.weight", f"layers.{b}.gate{k}.gate"}
            expected |= {f"layers.{b}.bn{k}.{part}" for part in NORM}
    for b in PROJECTED:
        expected |= {f"layers.{b}.shortcut.0.weight"}
        expected |= {f"layers.{b}.shortcut.1.{part}" for part in NORM}
    state = build_model("gatemobilenetv2").state_dict()
    assert set(state) == expected
    for b, (inputs, expansion, outputs, _) in enumerate(BLOCKS):
        width = inputs * expansion
        assert state[f"layers.{b}.conv1.weight"].shape == (width, inputs, 1, 1)
        assert state[f"layers.{b}.conv2.weight"].shape == (width, 1, 3, 3)
        assert state[f"layers.{b}.conv3.weight"].shape == (outputs, width, 1, 1)


@pytest.mark.parametrize("classes", [10, 100])
def test_cost_equals_a_count_by_hand(classes):
    model = build_model("gatemobilenetv2", classes)
    cost = model_cost(model, 32)
    assert dataclasses.astuple(cost) == count_by_hand(model.group_widths(), classes=classes)
    assert classes != 10 or cost.params == pytest.approx(2.297e6, rel=1e-3)


@pytest.mark.parametrize("share", [None, 0.5, 0])
def test_cost_of_a_pruned_network_equals_a_count_by_hand(model, share):
    plan = random_plan(model, 3, share)
    planned = planned_cost(model, plan, 48)
    pruned = prune(model, plan)
    assert dataclasses.astuple(planned) == count_by_hand(pruned.group_widths(), size=48)
    assert model_cost(pruned, 48) == planned


def test_expansion_and_depthwise_are_one_group(model):
    groups = {group.name: group for group in model.channel_groups()}
    for b in range(17):
        group, prefix = groups[f"layers.{b}.gate1"], f"layers.{b}."
        assert group.gates == (f"{prefix}gate1", f"{prefix}gate2")
        assert group.norms == (f"{prefix}bn1", f"{prefix}bn2")
        assert group.convs == (f"{prefix}conv1", f"{prefix}conv2")
        assert set(group.outputs) == {*group.gates, *group.norms, *group.convs}
        assert set(group.inputs) == {f"{prefix}conv2", f"{prefix}conv3"}
    assert groups["gate2"].norms == ("bn2",) and set(groups["gate2"].inputs) == {"linear"}
    assert len(groups) == 1 + 17 + len(STREAMS) + 1


def test_streams_run_along_identity_shortcuts(model):
    groups = {group.name: group for group in model.channel_groups()}
    readers = {"gate1": {"layers.0.conv1", "layers.0.shortcut.0"}}
    for blocks in STREAMS:
        group = groups[f"layers.{blocks[0]}.gate3"]
        assert group.gates == tuple(f"layers.{b}.gate3" for b in blocks)
        assert group.norms == tuple(f"layers.{b}.bn3" for b in blocks)
        along = {f"layers.{b}.shortcut.{i}" for b in blocks if b in PROJECTED for i in (0, 1)}
        made = {f"layers.{b}.conv3" for b in blocks}
        assert set(group.outputs) == {*group.gates, *group.norms, *made, *along}
        following = [b for b in (*blocks[1:], blocks[-1] + 1) if b < 17]
        readers[group.name] = {f"layers.{b}.conv1" for b in following}
        readers[group.name] |= {
            f"layers.{b}.shortcut.0" for b in following if b in PROJECTED and b not in blocks
        }
    readers["layers.16.gate3"] = {"conv2"}
    assert {name: set(groups[name].inputs) for name in readers} == readers


def test_stages_are_blocks_and_the_head(model):
    stages = model.pruning_stages()
    assert stages[0] == ("gate1", "layers.0.gate1", "layers.0.gate3")
    assert stages[3] == ("layers.3.gate1", "layers.3.gate3")
    assert stages[4] == ("layers.4.gate1",)
    assert stages[-1] == ("gate2",) and len(stages) == 18
    assert len(model.checkpoint_blocks()) == 17


def test_blocks_add_their_shortcut_or_none(model):
    """Without what ``conv3`` makes, the shortcut is what is left: x, a projection of x, nothing."""
    for b, (inputs, _, outputs, stride) in enumerate(BLOCKS):
        block = model.layers[b].eval()
        torch.nn.init.zeros_(block.bn3.weight), torch.nn.init.zeros_(block.bn3.bias)
        x = torch.randn(2, inputs, 4, 4)
        if stride == 2:
            expected = torch.zeros(2, outputs, 2, 2)
        else:
            expected = block.shortcut[1](block.shortcut[0](x)) if b in PROJECTED else x
        assert torch.equal(block(x), expected), b  # negative values too: no ReLU after gate3


def test_every_criterion_scores_it(model):
    for criterion in ("taylor_fo", "l1", "fpgm"):
        scores = channel_saliency(model, *random_batch(4, 16), criterion=criterion)
        assert {name: len(score) for name, score in scores.items()} == model.group_widths()
