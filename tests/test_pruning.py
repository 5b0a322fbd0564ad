"""The selection of channels against a brute-force reading of its rules, and the plan."""

from __future__ import annotations

import copy
import itertools
import math
import random

import pytest
import torch
from helpers import random_batch, random_model

from models import ChannelGroup, Gate, build_model
from utils.cost import model_cost
from utils.errors import InputError
from utils.pruning import PruningPlan, Ranking, select_channels
from utils.saliency import channel_saliency
from utils.selection import select_within
from utils.surgery import prune


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


@pytest.mark.parametrize("net", ["gateresnet20", "gatemobilenetv2"])
def test_selection_equals_brute_force_on_real_scores(net):
    model = random_model(net)
    saliency = channel_saliency(model, *random_batch(8, 16))
    plan = select_channels(model.channel_groups(), saliency, 0.6)
    assert plan.keep == brute_force(model, saliency, 0.6)
    gates = {group.name: len(group.gates) for group in model.channel_groups()}
    kept = sum(gates[name] * len(channels) for name, channels in plan.keep.items())
    if net == "gateresnet20":  # the cut may move on past the entries of one stream
        assert 0.4 * 688 - 1 < kept <= 0.4 * 688 + 3 * 64


def groups_and_scores(widths, gates_of):
    """Made-up groups: one per letter, with so many gates and channels."""
    groups, entry = [], 0
    for name, scores in widths.items():
        gates = tuple(f"{name}{i}" for i in range(gates_of[name]))
        entries = tuple(range(entry, entry := entry + len(gates)))
        places = {layer: torch.arange(len(scores))[:, None] for layer in (*gates, name)}
        groups.append(ChannelGroup(f"{name}0", gates, (name,), (), places, {}, entries))
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


@pytest.mark.parametrize("net", ["gatevgg11", "gateresnet20"])
@pytest.mark.parametrize("ratio", [0, 0.4, 0.8])
def test_rounding_adds_the_next_most_salient(net, ratio):
    model = build_model(net)
    torch.manual_seed(4)
    saliency = {name: torch.randn(width) for name, width in model.group_widths().items()}
    groups = model.channel_groups()
    exact = select_channels(groups, saliency, ratio)
    rounded = select_channels(groups, saliency, ratio, round_to=12)
    for name, width in model.group_widths().items():
        wanted = min(math.ceil(len(exact.keep[name]) / 12) * 12, width)
        best = sorted(range(width), key=lambda c: saliency[name][c], reverse=True)[:wanted]
        assert rounded.keep[name] == sorted(best), name


def test_plans_of_a_ranking_are_nested():
    """Or a bisection over their costs would not find the largest."""
    model = build_model("gateresnet20")
    torch.manual_seed(5)
    saliency = {
        name: torch.randn(width).round(decimals=1) for name, width in model.group_widths().items()
    }
    ranking = Ranking(model.channel_groups(), saliency, min_channels=3, round_to=4)
    plans = [ranking.plan(kept).keep for kept in range(ranking.entries + 1)]
    assert ranking.entries == 688 and plans[-1] == {
        name: list(range(width)) for name, width in model.group_widths().items()
    }
    for smaller, larger in itertools.pairwise(plans):
        assert all(set(smaller[name]) <= set(larger[name]) for name in smaller)


@pytest.mark.parametrize("net, granularity", [("gatevgg16", 0.01), ("gateresnet20", 0.024)])
@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("asked", [0.4, 1])
def test_a_budget_is_met_as_closely_as_channels_allow(net, granularity, of, asked):
    model = build_model(net)
    torch.manual_seed(6)
    saliency = {name: torch.randn(width) for name, width in model.group_widths().items()}
    ranking = Ranking(model.channel_groups(), saliency)
    whole = getattr(model_cost(model, 32), of)
    plan = select_within(model, ranking, 32, of, most=asked * whole)
    reached = getattr(model_cost(prune(copy.deepcopy(model), plan), 32), of)
    assert asked - granularity * (asked < 1) <= reached / whole <= asked
    assert model.group_widths() == build_model(net).group_widths()
    gates = {group.name: len(group.gates) for group in model.channel_groups()}
    kept = sum(gates[name] * len(channels) for name, channels in plan.keep.items())
    if kept < ranking.entries:  # one channel more would be too much
        more = ranking.plan(kept + 1)
        assert getattr(model_cost(prune(copy.deepcopy(model), more), 32), of) > asked * whole


def test_an_impossible_budget_is_refused_with_what_is_possible():
    model = build_model("gateresnet20")
    saliency = {name: torch.randn(width) for name, width in model.group_widths().items()}
    ranking = Ranking(model.channel_groups(), saliency, min_channels=4)
    least = model_cost(prune(copy.deepcopy(model), ranking.plan(0)), 32)
    with pytest.raises(InputError, match=f"at least {least.macs} macs stay"):
        select_within(model, ranking, 32, "macs", most=least.macs - 1)
    plan = select_within(model, ranking, 32, "macs", most=least.macs)
    assert model_cost(prune(model, plan), 32) == least


def test_the_ratio_may_count_from_what_was_there_before():
    groups, scores = groups_and_scores({"a": range(10), "b": range(10)}, {"a": 1, "b": 1})
    kept = sum(map(len, select_channels(groups, scores, 0.5, entries=30).keep.values()))
    assert kept == 15
    kept = sum(map(len, select_channels(groups, scores, 0.1, entries=30).keep.values()))
    assert kept == 20  # 27 are asked for, and no more than 20 are there


def test_ratio_outside_is_refused():
    groups, scores = groups_and_scores({"a": [1, 2]}, {"a": 1})
    for ratio in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="ratio"):
            select_channels(groups, scores, ratio)


def test_bad_scores_are_refused_by_name():
    groups, scores = groups_and_scores({"a": [1, 2], "b": [1, 2]}, {"a": 1, "b": 1})
    for saliency, options, message in (
        ({**scores, "b0": torch.tensor([1, float("nan")])}, {}, "b0 is not finite"),
        ({"a0": scores["a0"]}, {}, "no saliency for channel group b0"),
        (scores, {"min_channels": 0}, "min_channels"),
        (scores, {"round_to": 0}, "round_to"),
        (scores, {"scope": "all"}, "scope must be global or layer, not 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            select_channels(groups, saliency, 0.5, **options)


@pytest.mark.parametrize(
    "keep, message",
    [
        ([], "keeps nothing"),
        ([2, 1], "not sorted"),
        ([1, 1], "not unique"),
        ([-1, 1], "no channel index"),
        ([0.5], "no channel index"),
        ([True], "no channel index"),
        ("12", "list of indices"),
    ],
)
def test_plans_that_make_no_sense_are_refused_by_name(keep, message):
    with pytest.raises(ValueError, match=f"the_group.*{message}"):
        PruningPlan({"the_group": keep})


def test_parts_of_a_plan_one_after_the_other_are_the_plan():
    plan = PruningPlan({"a": [0, 2], "b": [1], "c": [0, 1, 2]})
    assert plan.only(["c", "a", "nowhere"]).keep == {"c": [0, 1, 2], "a": [0, 2]}
    assert plan.only(["a", "c"]).then(plan.only(["b"])) == plan
    assert plan.shrinking({"a": 3, "b": 2, "c": 3}) == plan.only(["a", "b"])


def test_a_second_cut_counts_what_the_first_has_left():
    first = PruningPlan({"a": [1, 4, 5, 9], "b": [0]})
    assert first.then(PruningPlan({"a": [0, 3], "c": [2]})).keep == {
        "a": [1, 9],
        "b": [0],
        "c": [2],
    }
    assert first.keep == {"a": [1, 4, 5, 9], "b": [0]}


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


@pytest.mark.parametrize("ratio", [0, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_with_scope_layer_every_group_loses_the_same_share_by_its_own_ranking(ratio):
    """Read by brute force: of C channels those go whose rank (i + 1/2) / C is below the threshold
    that the cut falls on.
    """
    stream = torch.Generator().manual_seed(8)
    widths = {"a0": 16, "b0": 64, "c0": 7, "d0": 32}
    equal = {name[0]: [0] * width for name, width in widths.items()}
    groups, _ = groups_and_scores(equal, dict.fromkeys(equal, 1))
    # Scores of quite different sizes: of no account within a group.
    scores = {
        n: 10.0**k * torch.rand(w, generator=stream) for k, (n, w) in enumerate(widths.items())
    }
    plan = select_channels(groups, scores, ratio, scope="layer")
    for name, width in widths.items():
        best = scores[name].argsort(descending=True)[: len(plan.keep[name])]
        assert plan.keep[name] == sorted(best.tolist())
        assert abs((width - len(plan.keep[name])) - ratio * width) <= 1
    total = sum(map(len, plan.keep.values()))
    assert total == int(sum(widths.values()) * (1 - ratio))
    if ratio > 0.3:
        assert plan != select_channels(groups, scores, ratio)


def test_scope_layer_within_a_budget_cuts_alike_in_all_groups():
    model = random_model("gatevgg11")
    saliency = {name: torch.rand(width) for name, width in model.group_widths().items()}
    ranking = Ranking(model.channel_groups(), saliency, scope="layer")
    plan = select_within(model, ranking, 32, "macs", 0.4 * model_cost(model, 32).macs)
    shares = [len(keep) / model.group_widths()[name] for name, keep in plan.keep.items()]
    assert max(shares) - min(shares) <= 1 / 64
