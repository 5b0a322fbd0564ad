"""What is particular to DenseNet: selectors, and channels that nobody reads any more."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from helpers import formula, random_batch, random_model, random_plan, relative_difference, settle
from torch.utils._python_dispatch import TorchDispatchMode

from models import build_model
from models.layers import ChannelSelector
from utils.cost import model_cost
from utils.pruning import PruningPlan
from utils.saliency import channel_saliency
from utils.selection import planned_cost
from utils.surgery import prune

NETS = ["gatedensenet40", "gatedensenet100_bc"]
LAYERS = {"gatedensenet40": 12, "gatedensenet100_bc": 16}  # a block
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def originals():
    return {net: random_model(net) for net in NETS}


@pytest.fixture(params=NETS)
def model(originals, request):
    return copy.deepcopy(originals[request.param])


@pytest.fixture
def densenet40(originals):
    return copy.deepcopy(originals["gatedensenet40"])


def blocks_by_hand(net):
    """Per block: its sources as (convolution, channels), and its readers, as gates in forward
    order; reader i sees the first i + 1 sources.
    """
    bottleneck, maker, width = net == "gatedensenet100_bc", "conv1", 24
    for b in (1, 2, 3):
        layers = [f"block{b}.layer.{i}" for i in range(LAYERS[net])]
        made = [(f"{layer}.conv{2 if bottleneck else 1}", 12) for layer in layers]
        last = "gate1" if b == 3 else f"trans{b}.gate1"
        yield [(maker, width), *made], [*(f"{layer}.gate1" for layer in layers), last]
        maker, width = f"trans{b}.conv1", width + 12 * len(layers)
        width = width // 2 if bottleneck else width


def widths_by_hand(net, keep):
    """How many outputs each source has once ``keep`` (by gate) is cut: those with a reader, or one.

    Written over (source, output) pairs, where the code counts positions.
    """
    widths = {}
    for sources, readers in blocks_by_hand(net):
        seen, read, made = [], set(), dict(sources)
        for (source, width), gate in zip(sources, readers, strict=True):
            seen += [(source, output) for output in range(width)]
            read |= {seen[i] for i in keep.get(gate, range(len(seen)))}
        counts = Counter(source for source, _ in read)
        widths |= {source: max(1, counts[source]) for source in made}
    return widths


def cost_by_hand(net, keep, full, size=32, classes=10):
    """(MACs, parameters) of the pruned network, from the plan alone; ``full`` are all widths."""
    sources = widths_by_hand(net, keep)
    wide = {name: len(keep.get(name, range(width))) for name, width in full.items()}
    stem = 27 * sources["conv1"]
    macs, params, side = stem * size**2, stem, size
    for b in (1, 2, 3):
        for i in range(LAYERS[net]):
            layer = f"block{b}.layer.{i}"
            inputs = wide[f"{layer}.gate1"]
            weights, norms = 9 * inputs * sources.get(f"{layer}.conv1", 0), inputs
            if net == "gatedensenet100_bc":
                inner = wide[f"{layer}.gate2"]
                weights, norms = (
                    inputs * inner + 9 * inner * sources[f"{layer}.conv2"],
                    inputs + inner,
                )
            macs, params = macs + weights * side**2, params + weights + 2 * norms
        if b < 3:
            weights = wide[f"trans{b}.gate1"] * sources[f"trans{b}.conv1"]
            macs, params = macs + weights * side**2, params + weights + 2 * wide[f"trans{b}.gate1"]
            side //= 2
    last = wide["gate1"]
    return macs + last * classes, params + 2 * last + last * classes + classes


class CountOps(TorchDispatchMode):
    """How often each operator of torch runs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


def selections(model):
    """Calls of index_select in one forward pass, and of what else might gather channels."""
    with torch.no_grad(), CountOps() as ops:
        model.eval()(random_batch(1, 16)[0])
    assert not ops.calls[torch.ops.aten.index] and not ops.calls[torch.ops.aten.gather]
    return ops.calls[torch.ops.aten.index_select]


def test_published_keys_of_densenet40():
    def normed(prefix):
        return {f"{prefix}bn1.{part}" for part in NORM} | {f"{prefix}gate1.gate"}

    expected = {"conv1.weight", "fc.weight", "fc.bias"} | normed("")
    for prefix in [f"block{b}.layer.{i}." for b in (1, 2, 3) for i in range(12)]:
        expected |= normed(prefix) | {f"{prefix}conv1.weight"}
    for prefix in ("trans1.", "trans2."):
        expected |= normed(prefix) | {f"{prefix}conv1.weight"}
    state = build_model("gatedensenet40").state_dict()
    assert set(state) == expected
    assert state["block1.layer.0.conv1.weight"].shape == (12, 24, 3, 3)
    assert state["block3.layer.11.conv1.weight"].shape == (12, 24 + 36 * 12 - 12, 3, 3)
    assert state["trans1.conv1.weight"].shape == (168, 168, 1, 1)
    assert state["fc.weight"].shape == (10, 456)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("net, params", [(NETS[0], 1.06e6), (NETS[1], 0.769e6)])
def test_cost_equals_a_count_by_hand(net, params, classes):
    model = build_model(net, classes)
    cost = model_cost(model, 32)
    full = model.group_widths()
    assert dataclasses.astuple(cost) == cost_by_hand(net, {}, full, classes=classes)
    assert classes != 10 or cost.params == pytest.approx(params, rel=1e-3)


@pytest.mark.parametrize("share", [None, 0.1, 0])
def test_unread_channels_go_and_nothing_else(model, share):
    full = model.group_widths()
    plan = random_plan(model, 4, share)
    expected = widths_by_hand(model.net, plan.keep)
    planned = planned_cost(model, plan, 32)
    assert model_cost(model, 32).params > planned.params  # the model itself is whole
    prune(model, plan)
    widths = {name: model.get_submodule(name).out_channels for name in expected}
    assert widths == expected
    assert share is None or 1 in expected.values()  # a layer that nobody reads is among them
    assert dataclasses.astuple(planned) == cost_by_hand(model.net, plan.keep, full)
    assert model_cost(model, 32) == planned
    assert model.live_channels() == ({}, {})
    assert model.kept == plan.shrinking(full).keep  # what follows from the plan is no part of it


def without(model, gates, channels):
    """The plan in which these gates lose these of their channels."""
    widths = model.group_widths()
    return PruningPlan({g: [c for c in range(widths[g]) if c not in channels] for g in gates})


def test_selectors_cost_one_index_select_where_something_was_cut(densenet40):
    assert selections(densenet40) == 0
    prune(densenet40, without(densenet40, ["block2.layer.5.gate1"], {3, 40}))
    assert selections(densenet40) == 1  # all it passed by has other readers
    assert densenet40.block2.layer[0].conv1.out_channels == 12
    prune(densenet40, without(densenet40, ["trans1.gate1", "gate1"], {0}))
    assert selections(densenet40) == 3


def test_a_channel_that_all_pass_by_is_not_made_and_not_selected_around(densenet40):
    readers = [f"block1.layer.{i}.gate1" for i in range(12)]
    prune(densenet40, without(densenet40, readers, {5, 7}))
    assert densenet40.conv1.out_channels == 24  # the transition still reads both
    assert selections(densenet40) == 12
    prune(densenet40, without(densenet40, ["trans1.gate1"], {5, 7}))
    assert densenet40.conv1.out_channels == 22
    assert selections(densenet40) == 0


def test_a_layer_that_nobody_reads_keeps_one_output(densenet40):
    made = set(range(24 + 3 * 12, 24 + 4 * 12))  # by block1.layer.3
    readers = [*(f"block1.layer.{i}.gate1" for i in range(4, 12)), "trans1.gate1"]
    plan = without(densenet40, readers, made)
    images, _ = random_batch(2, 16)
    masked = settle(plan.apply_mask(copy.deepcopy(densenet40)), images)
    pruned = prune(copy.deepcopy(masked), plan)
    assert pruned.block1.layer[3].conv1.out_channels == 1
    assert pruned.block1.layer[4].select.in_channels == 24 + 3 * 12 + 1
    assert relative_difference(masked.eval()(images), pruned.eval()(images)) < 1e-5


def test_pruning_in_steps_equals_pruning_once(model):
    """In shape and in function; which output a layer that nobody reads keeps may differ."""
    images, _ = random_batch(2, 16, dtype=torch.float64)
    model = settle(model.double(), images).eval()
    once = prune(copy.deepcopy(model), random_plan(model, 1, 0.5))
    twice = prune(copy.deepcopy(once), random_plan(once, 2, 0.3))
    whole = PruningPlan(twice.kept)
    directly = prune(copy.deepcopy(model), whole)
    staged = copy.deepcopy(model)
    for stage in model.pruning_stages():
        prune(staged, whole.only(stage))
    for other in (directly, staged):
        assert other.kept == twice.kept
        assert torch.equal(other(images), twice(images))
        assert shapes(other) == shapes(twice) and choices(other) == choices(twice)
    masked = whole.apply_mask(model)
    assert relative_difference(masked(images), twice(images)) < 1e-10


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def choices(model):
    return [
        (name, module.in_channels, module.channels, module.index.tolist())
        for name, module in model.named_modules()
        if isinstance(module, ChannelSelector)
    ]


def test_groups_are_what_one_layer_reads(densenet40):
    groups = {group.name: group for group in densenet40.channel_groups()}
    layer = groups["block2.layer.3.gate1"]
    assert tuple(layer.inputs) == layer.convs == ("block2.layer.3.conv1",)
    assert layer.norms == ("block2.layer.3.bn1",)
    assert tuple(groups["gate1"].inputs) == groups["gate1"].convs == ("fc",)
    assert len(groups) == 39 and len(densenet40.pruning_stages()) == 39
    assert len(densenet40.checkpoint_blocks()) == 36


def test_scores_equal_the_formula_also_once_pruned(model):
    model = prune(model.double(), random_plan(model, 6, 0.5))
    images, labels = random_batch(4, 16, dtype=torch.float64)
    scores = channel_saliency(model, images, labels)
    again = channel_saliency(model, images, labels, checkpoint_activations=True)
    for name, score in formula(model, images, labels).items():
        assert relative_difference(score, scores[name]) < 1e-12, name
        assert relative_difference(score, again[name]) < 1e-12, name


def test_filters_are_looked_at_by_their_input_slices(densenet40):
    scores = channel_saliency(densenet40, *random_batch(2, 16), criterion="l1")
    for gate, reader in {"gate1": "fc", "trans2.gate1": "trans2.conv1"}.items():
        weight = densenet40.get_submodule(reader).weight.detach()
        expected = torch.stack([weight[:, c].abs().sum() for c in range(weight.shape[1])])
        assert relative_difference(expected / expected.norm(), scores[gate]) < 1e-5


def test_transition_gates_after_the_relu(densenet40):
    """bn1 ReLU gate1 conv1 and 2x2 averages, as published."""
    x, trans = torch.randn(2, 168, 4, 4), densenet40.trans1.eval()
    trans.gate1.gate.data.normal_()  # of either sign, so that the order shows
    out = trans.conv1(trans.gate1.gate * trans.bn1(x).relu())
    expected = out.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))
    assert relative_difference(expected, trans(x)) < 1e-5
