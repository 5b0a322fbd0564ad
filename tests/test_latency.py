"""--latency, and the time that every pruning run reports. No clock runs: a timer is made up."""

from __future__ import annotations

import json

import networks
import pytest
import torch
from helpers import one_run, run_gfbs

from models import build_model, channel_groups, group_widths
from utils import cost
from utils.errors import InputError
from utils.pruning import Ranking
from utils.selection import Goal, select, select_by_time


@pytest.fixture
def made_up_timer(monkeypatch):
    """A network takes so many seconds as it has parameters, and 1,000 more; every timing is noisy
    by up to 2 %.
    """
    calls = []

    def seconds(run, at_least):
        calls.append(run)
        parameters = sum(p.numel() for p in run.func.parameters())
        return (1000 + parameters) * (0.98, 1, 1.02)[len(calls) % 3]

    monkeypatch.setattr(cost, "seconds", seconds)
    return calls


def ranking_of(model, **limits):
    torch.manual_seed(3)
    saliency = {name: torch.rand(width) for name, width in group_widths(model).items()}
    return saliency, Ranking(channel_groups(model), saliency, **limits)


@pytest.mark.parametrize("limits", [{}, {"round_to": 8}])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_plan_keeps_to_the_share_of_time_and_comes_near(made_up_timer, share, limits):
    model = build_model("gateresnet20")
    saliency, ranking = ranking_of(model, **limits)
    lines = []
    goal = Goal("latency", share, **limits)
    plan = select(model, saliency, goal, 32, {}, model, lines.append)
    _, found = select_by_time(model, ranking, 32, goal, model)
    assert share * (0.85 if limits else 0.94) <= found.share <= share and found.spread > 0
    assert plan == ranking.plan(sum(map(len, plan.keep.values()))) or limits or len(plan.keep) == 12
    (line,) = lines
    assert f"--latency {share:g}: " in line and "% of the time (+-" in line and "64 images" in line


def test_what_no_plan_can_reach_is_refused_with_the_least(made_up_timer):
    model = build_model("gateresnet20")
    saliency, ranking = ranking_of(model)
    with pytest.raises(InputError, match="--latency 0.001: at least .* of the time"):
        select_by_time(model, ranking, 32, Goal("latency", 0.001), model)


def test_both_networks_are_timed_in_turn(made_up_timer):
    models = build_model("gateresnet20"), build_model("gateresnet32")
    state = torch.get_rng_state()
    found = cost.latency(models, 32, 4, turns=3)
    assert torch.equal(torch.get_rng_state(), state)
    sizes = [sum(p.numel() for p in run.func.parameters()) for run in made_up_timer]
    assert sizes == [sizes[0], sizes[1]] * 3 and sizes[0] < sizes[1]
    assert [tuple(run.args[0].shape) for run in made_up_timer] == [(4, 3, 32, 32)] * 6
    assert found.after > found.before


def test_both_networks_are_timed_where_the_pruned_one_is(made_up_timer):
    cost.latency((networks.Branches(), networks.Branches().to("meta")), 16, 4)
    where = {t.device.type for run in made_up_timer for t in (*run.func.parameters(), *run.args)}
    assert where == {"meta"}


def test_a_run_asks_for_time_reports_it_and_does_not_measure_again(
    trained, made_up_timer, capsys, monkeypatch
):
    result = run_gfbs("--latency", "0.5", "--epochs", "1")
    assert result["budget"]["latency"] == 0.5 and result["ratio"]["asked"] is None
    assert result["latency"]["64"]["after"] < result["latency"]["64"]["before"]
    said = capsys.readouterr().out
    assert "time of 64 images, ms" in said and "time of 1 image, ms" in said
    assert "time kept: asked at most 50.00 %" in said
    folder = one_run(trained, "gfbs_latency0.5_seed1")
    # Cut off after the cut and the first epoch, the run goes on with the plan that it has.
    (folder / "result.json").unlink()
    monkeypatch.setattr("gfbs_cifar.select", None)
    again = run_gfbs("--latency", "0.5", "--epochs", "1", "--resume")
    assert again["channels"] == result["channels"]
    assert json.loads((folder / "result.json").read_text())["latency"] == result["latency"]


def test_a_slow_network_is_timed_one_image_at_a_time(trained, monkeypatch):
    slow = lambda networks, size, batch, turns: cost.Latency(batch, 0.1, 0.05, 0.0)  # noqa: E731
    monkeypatch.setattr("utils.run.measure.latency", slow)
    assert list(run_gfbs("--p", "0.5", "--epochs", "0")["latency"]) == ["1"]
