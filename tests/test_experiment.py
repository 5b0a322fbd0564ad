"""Ways to prune and to report: rounds, budgets, controls, recalibration, held-out images."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from helpers import CPU, batches_of, one_run, run_gfbs, run_train, same_weights, snapshot
from PIL import Image, ImageColor
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import gfbs_cifar
import gfbs_imagenet
from tools import export, results
from utils.checkpoint import load_checkpoint, load_model
from utils.cost import model_cost
from utils.data.small import ImageBatches, load_data
from utils.errors import InputError
from utils.finetune import evaluate
from utils.pruning import PruningPlan
from utils.surgery import prune


def entries(model):
    """Gate entries of a network."""
    return sum(len(g.gates) * model.group_widths()[g.name] for g in model.channel_groups())


# Rounds


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
    scored = []
    original = gfbs_cifar.channel_saliency

    def spy(model, *args, **options):
        scored.append(copy.deepcopy(model.state_dict()))
        return original(model, *args, **options)

    monkeypatch.setattr(gfbs_cifar, "channel_saliency", spy)
    run_gfbs("--p", "0.6", "--steps", "2", "--step_epochs", "1")
    first, second = scored
    baseline = load_model(trained / "model_best.pth").state_dict()
    assert all(torch.equal(first[name], baseline[name]) for name in baseline)
    assert sum(t.numel() for t in second.values()) < sum(t.numel() for t in first.values())


def test_one_round_without_fine_tuning_is_the_one_shot(trained):
    run_gfbs("--p", "0.5")
    run_gfbs("--p", "0.5", "--steps", "1", "--step_epochs", "0")
    assert same_weights(one_run(trained, "gfbs_p0.5_seed1") / "last.pth",
                        one_run(trained, "gfbs_p0.5_steps1_seed1") / "last.pth")  # fmt: skip


def test_rounds_towards_a_budget(trained):
    result = run_gfbs("--macs", "0.4", "--steps", "3", "--step_epochs", "0", "--epochs", "0")
    whole = result["cost"]["macs"]["before"]
    for share, done in zip((0.8, 0.6, 0.4), result["rounds"], strict=True):
        assert share - 0.024 <= done["macs"] / whole <= share


# Budgets


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


def test_rounding_leaves_multiples(trained):
    result = run_gfbs("--p", "0.5", "--round_to", "8", "--epochs", "0")
    assert all(channels["after"] % 8 == 0 for channels in result["channels"].values())


# Controls


def test_from_scratch_keeps_the_shape_and_nothing_of_the_weights(trained, monkeypatch):
    begun = []
    original = gfbs_cifar.fit

    def spy(model, train, test, recipe, *args, **options):
        begun.append((copy.deepcopy(model), recipe))
        return original(model, train, test, recipe, *args, **options)

    monkeypatch.setattr(gfbs_cifar, "fit", spy)
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


# Recalibration


def test_recalibration_averages_the_statistics_of_the_batches(trained):
    plain = run_gfbs("--p", "0.4", "--epochs", "0")
    result = run_gfbs("--p", "0.4", "--epochs", "0", "--recalibrate", "2", "--output", "again",
                      "--checkpoint", str(trained))  # fmt: skip
    before = load_model(one_run(trained, "gfbs_p0.4_seed1") / "pruned.pth")
    after = load_model(one_run("again/gateresnet20_folder", "gfbs_p0.4_seed1") / "pruned.pth")
    data = load_data("folder", "images", 16)
    batches = batches_of(data, 8)
    train, test = batches.train, batches.test
    inputs = []
    before.conv1.register_forward_hook(lambda *hooked: inputs.append(hooked[2].detach()))
    before.train()
    for images, _ in list(train)[:2]:
        before(images)
    means = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    assert torch.allclose(after.bn1.running_mean, means, rtol=1e-3)
    assert torch.allclose(after.bn1.running_var, variances, rtol=1e-4)
    for (name, ours), theirs in zip(after.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert result["accuracy"]["after_surgery"] == plain["accuracy"]["after_surgery"]
    assert result["accuracy"]["recalibrated"] == evaluate(after, test, CPU).accuracy
    assert "recalibrated" not in plain["accuracy"]


def test_fine_tuning_begins_with_the_recalibrated_network(trained, monkeypatch):
    begun = []
    monkeypatch.setattr(gfbs_cifar, "fit", lambda model, *_, **__: begun.append(model.state_dict()))
    run_gfbs("--p", "0.4", "--recalibrate", "2")
    saved = load_model(one_run(trained, "gfbs_p0.4_seed1") / "pruned.pth").state_dict()
    assert all(torch.equal(begun[0][name], saved[name]) for name in saved)


# Held-out images


def test_held_out_images_are_the_last_and_not_trained_on():
    data = load_data("synthetic", "unused", 8)
    batches = batches_of(data, 100, holdout=700)
    train, test, held = batches.train, batches.test, batches.holdout
    assert (train.images, test.images, held.images) == (4300, 1000, 700)
    assert torch.equal(held.labels, data.train.labels[-700:])
    plain = ImageBatches(data.train, 100, data.normalisation, CPU)
    assert torch.equal(next(iter(held))[0], plain.pick(torch.arange(4300, 4800))[0])
    assert max(int(share.max()) for share in train._shares()) == 4299
    assert batches_of(data, 100).holdout is None
    with pytest.raises(InputError, match="--holdout 5000: there are only 5000 training images"):
        batches_of(data, 100, holdout=5000)


@pytest.mark.parametrize("script", ["train", "gfbs"])
def test_with_a_holdout_the_epochs_do_not_see_the_test_set(trained, monkeypatch, script):
    """Which images are evaluated on, in order: the epochs' are the held-out ones, and the test set
    is read once for each network that the result tells of.
    """
    seen = []
    original = evaluate

    def spy(model, batches, *args):
        metrics = original(model, batches, *args)
        seen.append((batches.images, metrics.accuracy))
        return metrics

    monkeypatch.setattr("utils.run.record.evaluate", spy)
    monkeypatch.setattr("utils.run.measure.evaluate", spy)
    monkeypatch.setattr("utils.finetune.evaluate", spy)
    options = ["--holdout", "5", "--epochs", "3", "--output", "held", "--checkpoint"]
    if script == "train":
        result = run_train(*options[:-1])
        folder = trained.parents[1] / "held" / "gateresnet20_folder"
        first = []
    else:
        result = run_gfbs(*options, str(trained), "--p", "0.3")
        folder = one_run("held/gateresnet20_folder", "gfbs_p0.3_seed1")
        first = [18, 18]
    assert [images for images, _ in seen] == [*first, 5, 5, 5, 18, 18]
    chosen = [accuracy for images, accuracy in seen if images == 5]
    best = chosen.index(max(chosen)) + 1
    accuracy = result["accuracy"]
    assert accuracy["best_epoch"] == best
    assert result["holdout"]["images"] == 5
    assert result["holdout"]["accuracy"]["best"] == max(chosen)
    assert result["holdout"]["accuracy"]["last"] == chosen[-1]
    assert (accuracy["last"], accuracy["best"]) == (seen[-2][1], seen[-1][1])
    meta = load_checkpoint(folder / "model_best.pth").meta
    assert meta["chosen"] == "best on holdout" and meta["epoch"] == best
    assert {epoch["tested_on"] for epoch in result["history"]} == {"holdout"}
    log = (folder / "log.txt").read_text()
    assert "best on holdout" in log and "best on test" not in log and " holdout " in log


def test_scoring_images_are_trained_on(trained, monkeypatch):
    picked = []
    original = ImageBatches.pick

    def spy(self, indices):
        picked.append((self.images, indices.max().item()))
        return original(self, indices)

    monkeypatch.setattr(ImageBatches, "pick", spy)
    run_gfbs("--holdout", "5", "--epochs", "0", "--score_images", "100")
    assert (13, 12) in picked  # 18 images, of which 5 are held out


@pytest.mark.parametrize("argv", [["--holdout", "18"], ["--macs", "0.001"]])
def test_bad_input_overwrites_nothing(trained, argv):
    output = ["--output", "other", "--checkpoint", str(trained)]
    run_gfbs("--macs", "0.5", *output)
    before = snapshot(trained.parents[1])
    with pytest.raises(InputError, match=f"{argv[0]} {argv[1]}"):
        run_gfbs(*(argv if "--macs" in argv else ["--macs", "0.5", *argv]), *output, "--overwrite")
    if "--holdout" in argv:
        with pytest.raises(InputError, match="--holdout 18"):
            run_train(*argv, "--overwrite")
    assert snapshot(trained.parents[1]) == before


def test_a_baseline_that_has_seen_the_held_out_images_is_told_of(trained, capsys):
    run_gfbs("--holdout", "5", "--epochs", "0")
    assert "baseline was trained on images that are held out" in capsys.readouterr().out
    run_train("--holdout", "5", "--output", "held")
    run_gfbs("--holdout", "5", "--epochs", "0", "--output", "held")
    assert "held out here" not in capsys.readouterr().out


# Networks


@pytest.mark.parametrize("net", ["gatemobilenetv2", "gatedensenet40"])
def test_other_networks_go_every_way(place, net):
    run_train("--net", net, "--epochs", "1")
    folder = place / "checkpoints" / f"{net}_folder"
    ways = {
        "p0.4": "--p 0.4",
        "p0.4_smooth": "--p 0.4 --smooth --smooth_epochs 0 --final_epochs 1",
        "p0.4_steps2": "--p 0.4 --steps 2 --step_epochs 0",
        "macs0.5": "--macs 0.5",
    }
    for name, flags in ways.items():
        result = run_gfbs("--net", net, *flags.split())
        run = one_run(folder, f"gfbs_{name}_seed1")
        pruned, tuned = load_model(run / "pruned.pth"), load_model(run / "last.pth")
        assert pruned.kept == tuned.kept
        assert result["cost"]["macs"]["after"] == model_cost(tuned, 16).macs
        assert result["cost"]["params"]["after"] == model_cost(tuned, 16).params
    assert result["cost"]["macs"]["after"] <= 0.5 * result["cost"]["macs"]["before"]
    again = ["--p", "0.3", "--epochs", "0", "--checkpoint", str(run / "model_best.pth")]
    result = run_gfbs("--net", net, *again)
    assert result["cost"]["macs"]["before"] == model_cost(tuned, 16).macs
    export.main(export.parse_args([str(run / "last.pth")]))
    rows = results.main(results.parse_args([str(folder)]))
    assert sum(map(len, rows.values())) == len(ways) + 1


# Runs


def test_a_run_that_is_done_again_has_no_result_until_it_ends(trained, monkeypatch):
    run_gfbs("--p", "0.5")
    monkeypatch.setattr(gfbs_cifar, "fit", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_gfbs("--p", "0.5", "--overwrite")
    assert not (one_run(trained, "gfbs_p0.5_seed1") / "result.json").exists()


@pytest.mark.parametrize(
    "argv, name",
    [
        (["--p", "0.5"], "gfbs_p0.5_seed1"),
        ([], "gfbs_p0.7_seed1"),
        (["--p", "0.5", "--smooth", "--seed", "3"], "gfbs_p0.5_smooth_seed3"),
        (["--macs", "0.5", "--criterion", "l1"], "l1_macs0.5_seed1"),
        (["--params", "0.25", "--steps", "4"], "gfbs_params0.25_steps4_seed1"),
        (["--p", "0.5", "--from_scratch"], "gfbs_p0.5_scratch_seed1"),
        (["--w_beta", "0.1", "--cosine"], "gfbs_p0.7_seed1_cosine_wbeta0.1"),
        (["--epochs", "40", "--score_seed", "0"], "gfbs_p0.7_seed1_epochs40_scoreseed0"),
        (["--mean", "0.5,0.5,0.5", "--std", "1,1,1"], "gfbs_p0.7_seed1_mean0.5,0.5,0.5_std1,1,1"),
        (["--criterion", "l1", "--scope", "layer"], "l1_p0.7_seed1"),
        (["--criterion", "l1", "--scope", "global"], "l1_p0.7_seed1_scopeglobal"),
        (["--criterion", "l1", "--w_beta", "1", "--score_seed", "3"], "l1_p0.7_seed1"),
        (["--data_dir", "x", "--output", "y", "--device", "cpu"], "gfbs_p0.7_seed1"),
    ],
)
def test_names_of_runs(argv, name):
    assert experiment_name(argv) == name


def experiment_name(argv):
    from utils.cli import settings

    return settings.run_name(gfbs_cifar.parse_args(argv))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--smooth", "--steps", "3"], "--steps: not allowed with argument --smooth"),
        (["--from_scratch", "--steps", "3"], "--steps: not allowed with argument --from_scratch"),
        (["--p", "0.5", "--macs", "0.5"], "--macs: not allowed with argument --p"),
        (["--macs", "0"], "--macs: '0' is not a share in (0, 1]"),
        (["--params", "1.5"], "--params"),
        (["--round_to", "0"], "--round_to"),
        (["--steps", "0"], "--steps"),
        (["--step_epochs", "3"], "--step_epochs goes with --steps"),
        (["--smooth_epochs", "0"], "--smooth_epochs goes with --smooth"),
        (["--final_epochs", "3"], "--final_epochs goes with --smooth"),
        (["--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
        (["--mean", "0.5,0.5,0.5"], "--mean and --std go together"),
        (["--mean", "1,2,3", "--std", "1,1,1"], "is not three numbers from 0 to 1"),
        (["--mean", "0,0,0", "--std", "0,1,1"], "--std"),
        (["--from_scratch", "--epochs", "0"], "--from_scratch needs --epochs of at least 1"),
        (["--holdout", "-1"], "--holdout"),
    ],
)
def test_flags_that_make_no_sense(argv, message, capsys):
    with pytest.raises(SystemExit) as left:
        gfbs_cifar.parse_args(argv)
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_what_has_no_effect_is_one_warning(trained, capsys):
    gfbs_cifar.parse_args(["--criterion", "slimming", "--w_beta", "1", "--score_seed", "3"])
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "--w_beta and --score_seed: without effect" in shown
    with pytest.raises(SystemExit):
        gfbs_imagenet.parse_args(["--data_dir", "x", "--warmup_epochs", "3"])
    assert "--warmup_epochs goes with --sched cosine" in capsys.readouterr().err
    result = run_gfbs("--min_channels", "1000", "--epochs", "0")
    assert result["config"]["min_channels"] == 64 and result["ratio"]["reached"] == 0
    assert "no group has more than 64 channels" in capsys.readouterr().err


def test_constants_are_the_typed_ones_then_the_checkpoints(trained, capsys):
    typed = ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
    plain = run_train("--output", "other", "--epochs", "1")
    assert "0.2023,0.1994,0.201 (the usual ones of this data)" in capsys.readouterr().out
    result = run_train("--output", "typed", "--epochs", "1", *typed)
    assert "mean 0.5,0.5,0.5 and std 0.25,0.25,0.25 (--mean and --std)" in capsys.readouterr().out
    assert result["config"]["mean"] == (0.5, 0.5, 0.5) and plain["config"]["mean"] is None
    run_gfbs("--epochs", "0", "--output", "typed")
    assert "0.25,0.25,0.25 (as the checkpoint says)" in capsys.readouterr().out
    pruned = one_run("typed/gateresnet20_folder", "gfbs_p0.7_seed1") / "pruned.pth"
    assert load_checkpoint(pruned).meta["normalisation"]["std"] == [0.25] * 3


def test_tensorboard_shows_what_a_run_was_and_what_came_out(trained):
    result = run_gfbs("--p", "0.5", "--w_beta", "0.1")
    logdir = one_run("checkpoints/runs/gateresnet20_folder", "gfbs_p0.5_seed1")
    board = EventAccumulator(str(logdir), size_guidance={"histograms": 0}).Reload()
    tags = board.Tags()
    assert all(f"saliency/{name}" in tags["histograms"] for name in result["channels"])
    [drawn] = board.Images("channels")
    figure = np.asarray(Image.open(io.BytesIO(drawn.encoded_image_string))).astype(int)
    filled = (np.abs(figure - ImageColor.getrgb("steelblue")).sum(2) == 0).sum(1)
    empty = (np.abs(figure - ImageColor.getrgb("lightgrey")).sum(2) == 0).sum(1)
    rows = len(figure) // len(result["channels"])
    for middle, channels in zip(range(rows // 2, len(figure), rows), result["channels"].values(),
                                strict=True):  # fmt: skip
        share = filled[middle] / (filled[middle] + empty[middle])
        assert share == pytest.approx(channels["after"] / channels["before"], abs=0.01)
    assert not any(tag.startswith("channels/") for tag in tags["scalars"])
    texts = {
        tag: board.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]
    }
    assert "| w_beta | 0.1 |" in texts["configuration/text_summary"]
    last = board.Scalars("result/accuracy/last")[0].value
    assert last == pytest.approx(result["accuracy"]["last"], abs=1e-4)
    assert board.Scalars("result/macs")[0].value == pytest.approx(result["cost"]["macs"]["after"])
    assert "_hparams_/session_start_info" in board.summary_metadata
    written = board.summary_metadata["_hparams_/experiment"].plugin_data.content
    columns = HParamsPluginData.FromString(written).experiment.hparam_infos
    assert {"bs", "w_beta", "epochs"} < {column.name for column in columns}


def test_hparams_show_network_criterion_goal_and_seed_first(trained):
    """As TensorBoard's own back end makes the table, from a baseline and two pruning runs."""
    run_train("--output", "all")
    run_gfbs("--p", "0.5", "--epochs", "0", "--checkpoint", "all", "--output", "all")
    run_gfbs("--macs", "0.5", "--epochs", "0", "--checkpoint", "all", "--output", "all")
    board = EventMultiplexer().AddRunsFromDirectory("all/runs").Reload()
    provider = MultiplexerDataProvider(board, "all/runs")
    backend = Context(TBContext(logdir="all/runs", data_provider=provider))
    tags = backend.hparams_metadata(RequestContext(), "")
    assert len(tags) == 3 and all("_hparams_/session_start_info" in run for run in tags.values())
    columns = backend.experiment_from_metadata(RequestContext(), "", True, tags, [])
    names = [column.name for column in columns.hparam_infos]
    assert names[:6] == ["criterion", "macs", "net", "p", "params", "seed"]
    assert {"bs", "w_beta", "epochs"} < {*names}
    shown = [metric.name.tag for metric in columns.metric_infos]
    assert "result/accuracy/baseline" in shown and "result/macs" in shown
