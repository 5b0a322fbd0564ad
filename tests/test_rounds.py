"""Ways to prune: rounds, budgets, the control, other networks."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import copied_weights, one_run, run_gfbs, run_train, same_weights, snapshot, spy

import gfbs_cifar
from tools import results
from utils.checkpoint import load_model
from utils.cost import model_cost
from utils.errors import InputError
from utils.pruning import PruningPlan
from utils.surgery import prune


def entries(model):
    """Gate entries of a network."""
    return sum(len(g.gates) * model.group_widths()[g.name] for g in model.channel_groups())


def test_rounds_take_equal_shares_of_the_original_entries(trained):
    result = run_gfbs("--p", "0.6", "--steps", "3", "--step_epochs", "2")
    whole = entries(load_model(trained / "model_best.pth"))
    for i, done in enumerate(result["rounds"], start=1):
        wanted = int(whole * (1 - 0.6 * i / 3))
        kept = round(whole * (1 - done["ratio"]))
        assert wanted <= kept <= wanted + 3 * 64  # the cut may move on past coupled channels
    assert len(result["rounds"]) == 3
    assert [epoch["round"] for epoch in result["history"]] == [1, 1, 2, 2, 3, 3, 4]
    run = one_run(trained, "gfbs_p0.6_steps3_seed1")
    last, plan = (
        load_model(run / "last.pth"),
        PruningPlan.from_json((run / "plan.json").read_text()),
    )
    at_once = prune(load_model(trained / "model_best.pth"), plan)
    assert last.group_widths() == at_once.group_widths() and last.kept == at_once.kept
    assert load_model(run / "pruned.pth").kept == last.kept
    assert result["ratio"]["reached"] == pytest.approx(1 - entries(last) / whole)


def test_every_round_scores_the_network_that_the_last_one_left(trained, monkeypatch):
    scored = spy(monkeypatch, gfbs_cifar, "channel_saliency", copied_weights)
    run_gfbs("--p", "0.6", "--steps", "2", "--step_epochs", "1")
    first, second = scored
    baseline = load_model(trained / "model_best.pth").state_dict()
    assert all(torch.equal(first[name], baseline[name]) for name in baseline)
    assert sum(t.numel() for t in second.values()) < sum(t.numel() for t in first.values())


def test_one_round_without_fine_tuning_is_the_one_shot(trained):
    run_gfbs("--p", "0.5")
    run_gfbs("--p", "0.5", "--steps", "1", "--step_epochs", "0")
    assert same_weights(
        one_run(trained, "gfbs_p0.5_seed1") / "last.pth",
        one_run(trained, "gfbs_p0.5_steps1_seed1") / "last.pth",
    )


def test_rounds_towards_a_budget(trained):
    result = run_gfbs("--macs", "0.4", "--steps", "3", "--step_epochs", "0", "--epochs", "0")
    whole = result["cost"]["macs"]["before"]
    for share, done in zip((0.8, 0.6, 0.4), result["rounds"], strict=True):
        assert share - 0.024 <= done["macs"] / whole <= share


@pytest.mark.parametrize("of", ["macs", "params"])
def test_a_budget_is_kept_and_reported(trained, of, capsys):
    result = run_gfbs(f"--{of}", "0.5", "--epochs", "0")
    pruned = load_model(one_run(trained, f"gfbs_{of}0.5_seed1") / "pruned.pth")
    baseline = load_model(trained / "model_best.pth")
    reached = getattr(model_cost(pruned, 16), of) / getattr(model_cost(baseline, 16), of)
    assert 0.5 - 0.024 <= reached <= 0.5 and result["ratio"]["asked"] is None
    assert f"asked at most 50.00 %, reached {100 * reached:.2f} %" in capsys.readouterr().out


def test_what_no_plan_can_cost_is_refused(trained):
    before = sorted(trained.rglob("*.pth"))
    with pytest.raises(InputError, match=r"--macs 0.001 of \d+: at least \d+ stay"):
        run_gfbs("--macs", "0.001")
    with pytest.raises(InputError, match="--macs 0.001"):  # found out before the first round
        run_gfbs("--macs", "0.001", "--steps", "5")
    assert sorted(trained.rglob("*.pth")) == before


def test_from_scratch_keeps_the_shape_and_nothing_of_the_weights(trained, monkeypatch):
    note = lambda model, train, test, recipe, *_, **__: (copy.deepcopy(model), recipe)  # noqa: E731
    begun = spy(monkeypatch, gfbs_cifar, "fit", note)
    run_gfbs("--p", "0.5", "--from_scratch", "--epochs", "2")
    fresh, recipe = begun[0]
    pruned = load_model(one_run(trained, "gfbs_p0.5_scratch_seed1") / "pruned.pth")
    assert fresh.group_widths() == pruned.group_widths()
    assert (recipe.lr, recipe.weight_decay, recipe.epochs) == (0.1, 1e-4, 2)
    theirs = pruned.state_dict()
    for name, tensor in fresh.state_dict().items():
        if name.endswith(("conv1.weight", "conv2.weight", "linear.weight")):
            assert not torch.equal(tensor, theirs[name]), name
            if "conv" in name:  # He's initialisation for the present fan-out
                fan = tensor.shape[0] * 9
                if tensor.numel() > 500:
                    assert tensor.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.15), name
        elif name.endswith(("running_mean", "bn1.bias", "bn2.bias", "num_batches_tracked")):
            assert not tensor.any(), name


def test_bad_input_overwrites_nothing(trained):
    argv = ["--output", "other", "--checkpoint", str(trained), "--overwrite"]
    run_gfbs("--macs", "0.5", *argv)
    before = snapshot(trained.parents[1])
    for bad in (["--macs", "0.5", "--holdout", "18"], ["--macs", "0.001"]):
        with pytest.raises(InputError, match=" ".join(bad[-2:])):
            run_gfbs(*bad, *argv)
    with pytest.raises(InputError, match="--holdout 18"):
        run_train("--holdout", "18", "--overwrite")
    assert snapshot(trained.parents[1]) == before


@pytest.mark.parametrize("net", ["gatemobilenetv2", "gatedensenet40"])
def test_other_networks_go_every_way(place, net):
    short = ["--net", net, "--limit_train_batches", "1", "--limit_test_batches", "1"]
    run_train(*short, "--epochs", "1")
    folder = place / "checkpoints" / f"{net}_folder"
    ways = {
        "p0.4": "--p 0.4",
        "p0.4_smooth": "--p 0.4 --smooth --smooth_epochs 0 --final_epochs 1",
        "p0.4_steps2": "--p 0.4 --steps 2 --step_epochs 0",
        "macs0.5": "--macs 0.5",
    }
    for name, flags in ways.items():
        result = run_gfbs(*short, *flags.split())
        run = one_run(folder, f"gfbs_{name}_seed1")
        pruned, tuned = load_model(run / "pruned.pth"), load_model(run / "last.pth")
        assert pruned.kept == tuned.kept
        assert result["cost"]["macs"]["after"] == model_cost(tuned, 16).macs
        assert result["cost"]["params"]["after"] == model_cost(tuned, 16).params
    assert result["cost"]["macs"]["after"] <= 0.5 * result["cost"]["macs"]["before"]
    again = ["--p", "0.3", "--epochs", "0", "--checkpoint", str(run / "model_best.pth")]
    result = run_gfbs(*short, *again)
    assert result["cost"]["macs"]["before"] == model_cost(tuned, 16).macs
    rows = results.main(results.parse_args([str(folder)]))
    assert sum(map(len, rows.values())) == len(ways) + 1
