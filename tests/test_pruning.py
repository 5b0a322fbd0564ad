"""The selection of channels against a brute-force reading of its rules, and the plan."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import random_batch, random_model

from models import ChannelGroup, Gate, build_model
from utils.pruning import PruningPlan, select_channels
from utils.saliency import channel_saliency


def brute_force(model, saliency, ratio, min_channels=1):
    """Entry by entry, with plain lists."""
    group_of = {gate: group for group in model.channel_groups() for gate in group.gates}
    gates = [name for name, module in model.named_modules() if isinstance(module, Gate)]
    entries = [
        (score, place, group_of[gate], channel)
        for place, (gate, channel, score) in enumerate(
            (gate, channel, score)
            for gate in gates
            for channel, score in enumerate(saliency[group_of[gate].name].tolist())
        )
    ]
    entries.sort(key=lambda entry: (-entry[0], -entry[1]))
    cut = int(len(entries) * (1 - ratio))
    while cut < len(entries) and len(entries[cut][2].gates) >= 2:
        cut += 1
    keep = {group.name: set() for group in model.channel_groups()}
    for _, _, group, channel in entries[:cut]:
        keep[group.name].add(channel)
    for name, channels in keep.items():
        best = [channel for _, _, group, channel in entries if group.name == name]
        for channel in best if len(channels) < min_channels else []:
            if len(channels) < min_channels:
                channels.add(channel)
    return {name: sorted(channels) for name, channels in keep.items()}


@pytest.mark.parametrize("net", ["gatevgg11", "gateresnet20"])
@pytest.mark.parametrize("ratio", [0, 0.1, 0.37, 0.5, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("min_channels", [1, 5])
def test_selection_equals_brute_force(net, ratio, ties, min_channels):
    model = build_model(net)
    torch.manual_seed(3)
    saliency = {name: torch.randn(width) for name, width in model.group_widths().items()}
    if ties:  # few values, so that the cut falls among equals of several groups
        saliency = {name: (2 * scores).round() for name, scores in saliency.items()}
    plan = select_channels(model.channel_groups(), saliency, ratio, min_channels=min_channels)
    assert plan.keep == brute_force(model, saliency, ratio, min_channels)


def test_selection_equals_brute_force_on_real_scores():
    model = random_model("gateresnet20")
    saliency = channel_saliency(model, *random_batch(32))
    plan = select_channels(model.channel_groups(), saliency, 0.6)
    assert plan.keep == brute_force(model, saliency, 0.6)
    gates = {group.name: len(group.gates) for group in model.channel_groups()}
    kept = sum(gates[name] * len(channels) for name, channels in plan.keep.items())
    assert 0.4 * 688 - 1 < kept <= 0.4 * 688 + 3 * 64  # the cut may move on past a stage's stream


def groups_and_scores(widths, gates_of):
    """Made-up groups: one per letter, with so many gates and channels."""
    groups = [
        ChannelGroup(f"{n}0", tuple(f"{n}{i}" for i in range(gates_of[n])), (n,), (n,), (n,))
        for n in widths
    ]
    return groups, {
        f"{n}0": torch.tensor(scores, dtype=torch.float32) for n, scores in widths.items()
    }


def test_nothing_goes_at_zero():
    groups, scores = groups_and_scores({"a": [1, 1, 1], "b": [-5, 0]}, {"a": 1, "b": 2})
    assert select_channels(groups, scores, 0).keep == {"a0": [0, 1, 2], "b0": [0, 1]}


def test_of_equal_scores_the_later_stays():
    groups, scores = groups_and_scores({"a": [1, 1], "b": [1, 1]}, {"a": 1, "b": 1})
    assert select_channels(groups, scores, 0.25).keep == {"a0": [1], "b0": [0, 1]}
    assert select_channels(groups, scores, 0.5).keep == {"a0": [1], "b0": [0, 1]}  # a at the floor


def test_a_coupled_channel_counts_once_per_gate_and_is_not_split():
    groups, scores = groups_and_scores({"a": [9, 1], "b": [5, 4, 3]}, {"a": 1, "b": 3})
    # 11 entries in order a0 | b0 b0 b0 | b1 b1 b1 | b2 b2 b2 | a1. int(11 * 0.5) = 5 falls into
    # b1, so the cut moves on until it meets a1, which belongs to a group of one gate.
    assert select_channels(groups, scores, 0.5).keep == {"a0": [0], "b0": [0, 1, 2]}
    assert select_channels(groups, scores, 0.05).keep == {"a0": [0], "b0": [0, 1, 2]}


def test_cut_among_coupled_entries_stops_at_the_end():
    groups, scores = groups_and_scores({"a": [9, 8], "b": [5, 4]}, {"a": 1, "b": 2})
    assert select_channels(groups, scores, 0.9).keep == {"a0": [0], "b0": [0]}
    assert select_channels(groups, scores, 0.4).keep == {"a0": [0, 1], "b0": [0, 1]}


def test_a_layer_keeps_its_most_salient_channel():
    groups, scores = groups_and_scores({"a": [-3, -1, -2], "b": [5, 4, 6]}, {"a": 1, "b": 1})
    assert select_channels(groups, scores, 0.9).keep == {"a0": [1], "b0": [2]}
    floor = select_channels(groups, scores, 0.9, min_channels=2)
    assert floor.keep == {"a0": [1, 2], "b0": [0, 2]}


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan")])
def test_ratio_outside_is_refused(ratio):
    groups, scores = groups_and_scores({"a": [1, 2]}, {"a": 1})
    with pytest.raises(ValueError, match="ratio"):
        select_channels(groups, scores, ratio)


def test_bad_scores_are_refused_by_name():
    groups, scores = groups_and_scores({"a": [1, 2], "b": [1, 2]}, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="b0 is not finite"):
        select_channels(groups, {**scores, "b0": torch.tensor([1, float("nan")])}, 0.5)
    with pytest.raises(ValueError, match="no saliency for channel group b0"):
        select_channels(groups, {"a0": scores["a0"]}, 0.5)
    with pytest.raises(ValueError, match="min_channels"):
        select_channels(groups, scores, 0.5, min_channels=0)


@pytest.mark.parametrize(
    "keep, message",
    [
        ({"g": []}, "keeps nothing"),
        ({"g": [2, 1]}, "not sorted"),
        ({"g": [1, 1]}, "not unique"),
        ({"g": [-1, 1]}, "no channel index"),
        ({"g": [0.5]}, "no channel index"),
        ({"g": [True]}, "no channel index"),
        ({"g": "12"}, "list of indices"),
    ],
)
def test_plans_that_make_no_sense_are_refused_by_name(keep, message):
    with pytest.raises(ValueError, match=f"(?s)g.*{message}|{message}"):
        PruningPlan(keep)


def test_plan_of_another_network_is_refused():
    model = build_model("gateresnet20")
    with pytest.raises(ValueError, match=r"no channel group 'features\.2'"):
        PruningPlan({"features.2": [0]}).apply_mask(model)
    with pytest.raises(ValueError, match="gate1 keeps channel 16 of 16"):
        PruningPlan({"gate1": [0, 16]}).apply_mask(model)


def test_plan_survives_json():
    random.seed(0)
    plan = PruningPlan({f"layer{i}": sorted(random.sample(range(64), 9)) for i in range(5)})
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert PruningPlan.from_json(PruningPlan({}).to_json()) == PruningPlan({})
    for damaged in (plan.to_json()[:-20], "[1, 2]", "", '{"a": 3}'):
        with pytest.raises(ValueError, match="pruning plan"):
            PruningPlan.from_json(damaged)
