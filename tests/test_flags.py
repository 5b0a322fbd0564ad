"""Every flag reaches what it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import CPU, one_run, run_gfbs, run_train, spy

import gfbs_cifar
import gfbs_imagenet
import train
from models.gated import GatedModel
from utils import selection
from utils.cli import settings
from utils.data.batches import scoring_indices
from utils.data.small import ImageBatches, load_data
from utils.metrics import Metrics
from utils.recipes import CIFAR_COSINE


@pytest.fixture
def seen(monkeypatch):
    """What fit, channel_saliency and select_channels were called with, by module and function."""
    return {
        "train": spy(monkeypatch, train, "fit"),
        "gfbs": spy(monkeypatch, gfbs_cifar, "fit"),
        "saliency": spy(monkeypatch, gfbs_cifar, "channel_saliency"),
        "select": spy(monkeypatch, selection, "select_channels"),
    }


@pytest.mark.parametrize("script", ["train", "gfbs"])
def test_training_flags(trained, seen, script):
    argv = ["--lr", "0.3", "--weight-decay", "0.2", "--cosine", "--epochs", "3", "--bs", "5"]
    argv += ["--seed", "9", "--limit_train_batches", "1", "--limit_test_batches", "1"]
    run_train("--output", "x", *argv) if script == "train" else run_gfbs(*argv)
    (_, train, test, recipe, *_), _ = seen[script][-1]
    assert (recipe.lr, recipe.weight_decay, recipe.epochs) == (0.3, 0.2, 3)
    assert recipe.cosine == CIFAR_COSINE
    assert (train.batch_size, train.seed, len(train), test.limit) == (5, 9, 1, 1)


def test_published_recipes_are_the_defaults(trained, seen):
    run_train("--output", "x", "--epochs", "16")
    run_gfbs("--epochs", "16")
    recipes = [args[3] for args, _ in seen["train"] + seen["gfbs"]]
    expected = [(16, 0.1, 1e-4, (6, 12), 0.2, None), (16, 0.01, 5e-4, (6, 12), 0.2, None)]
    for r, values in zip(recipes, expected, strict=True):
        assert (r.epochs, r.lr, r.weight_decay, r.milestones, r.gamma, r.cosine) == values


def test_stages_have_their_own_recipe_and_go_on_in_the_random_streams(trained, seen):
    run_gfbs("--smooth", "--smooth_epochs", "2", "--final_epochs", "3", "--p", "0.5")
    *stages, final = [(args[3], options["first_epoch"]) for args, options in seen["gfbs"]]
    assert [first for _, first in [*stages, final]] == list(range(0, 2 * len(stages) + 1, 2))
    for recipe, _ in stages:
        assert (recipe.epochs, recipe.lr, recipe.weight_decay, recipe.gamma) == (2, 0.01, 5e-4, 0.1)
    recipe, _ = final
    assert (recipe.epochs, recipe.lr, recipe.weight_decay, recipe.gamma) == (3, 0.01, 5e-4, 0.2)


def test_scoring_flags(trained, seen):
    options = ["--w_beta", "0.3", "--min_channels", "4", "--p", "0.6", "--score_images", "5"]
    run_gfbs("--epochs", "0", *options, "--score_seed", "2", "--seed", "7")
    (_, images, labels), scoring = seen["saliency"][0]
    assert (scoring["w_beta"], scoring["criterion"]) == (0.3, "gfbs")
    (_, _, ratio), selecting = seen["select"][0]
    assert (ratio, selecting["min_channels"]) == (0.6, 4)
    data = load_data("folder", "images", 16)
    train = ImageBatches(data.train, 8, data.normalisation, CPU, augment=True, seed=7)
    expected, expected_labels = train.pick(scoring_indices(len(data.train), 5, 2))
    assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def test_a_network_without_blocks_to_recompute_says_so_once(trained, seen, monkeypatch):
    argv = ["--steps", "2", "--step_epochs", "0", "--epochs", "0", "--checkpoint_activations"]
    run_gfbs(*argv, "--output", "blocks", "--checkpoint", str(trained))
    monkeypatch.setattr(GatedModel, "checkpoint_blocks", lambda self: [])
    run_gfbs(*argv, "--output", "none", "--checkpoint", str(trained))
    assert [options["checkpoint_activations"] for _, options in seen["saliency"]] == [True] * 4
    for output, count in ("blocks", 0), ("none", 1):
        (log,) = Path(output).glob("*/*/log.txt")
        assert log.read_text().count("no blocks whose activations can be recomputed") == count


def test_result_tells_the_accuracies_apart(trained, monkeypatch, capsys):
    """Every evaluation gives another figure; each must turn up in its own place."""
    figures = iter([Metrics(1, 91, 99, 9), Metrics(1, 12, 52, 9)])
    monkeypatch.setattr("utils.run.measure.evaluate", lambda *args: next(figures))
    epochs = iter([Metrics(1, 63, 83, 9), Metrics(1, 77, 87, 9), Metrics(1, 77, 86, 9)])
    monkeypatch.setattr("utils.finetune.evaluate", lambda *args: next(epochs))
    result = run_gfbs("--epochs", "3", "--min_channels", "5", "--p", "0.95")
    assert result["accuracy"] == {
        "baseline": 91,
        "after_surgery": 12,
        "last": 77,
        "best": 77,
        "best_epoch": 2,
    }
    assert result["top5"]["last"] == 86 and result["top5"]["best"] == 87
    shown = capsys.readouterr().out
    for row in (
        "baseline  91.00  99.00",
        "after surgery  12.00  52.00",
        "last epoch  77.00  86.00",
    ):
        assert any(
            row.split("  ")[0] in line and line.split()[-2:] == row.split("  ")[1:]
            for line in shown.splitlines()
        ), row
    held = result["held_at_floor"]
    assert held and all(result["channels"][name]["after"] == 5 for name in held)
    assert f"{held[0]:<28}" in shown and "at the floor" in shown


def test_overwriting_leaves_nothing_of_the_old_run_and_no_result_until_it_ends(trained):
    run_gfbs("--p", "0.5")
    run = one_run(trained, "gfbs_p0.5_seed1")
    (run / "config.json").write_text("{}")
    (run / "last_previous.pth").write_text("old")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(gfbs_cifar, "fit", lambda *_, **__: 1 / 0)
        run_gfbs("--p", "0.5", "--overwrite")
    assert not (run / "last_previous.pth").exists() and not (run / "result.json").exists()
    run_gfbs("--p", "0.5", "--overwrite")
    assert (run / "result.json").exists() and (run / "log.txt").read_text().count("$ ") == 1


NAMES = {
    "--p 0.5": "gfbs_p0.5_seed1",
    "": "gfbs_p0.7_seed1",
    "--p 0.5 --smooth --seed 3": "gfbs_p0.5_smooth_seed3",
    "--macs 0.5 --criterion l1": "l1_macs0.5_seed1",
    "--params 0.25 --steps 4": "gfbs_params0.25_steps4_seed1",
    "--p 0.5 --from_scratch": "gfbs_p0.5_scratch_seed1",
    "--ema 0.5 --accumulate 2": "gfbs_p0.7_seed1_accumulate2_ema0.5",
    "--distill 0.5 --label_smoothing 0.1": "gfbs_p0.7_seed1_distill0.5_labelsmoothing0.1",
    "--w_beta 0.1 --cosine": "gfbs_p0.7_seed1_cosine_wbeta0.1",
    "--epochs 40 --score_seed 0": "gfbs_p0.7_seed1_epochs40_scoreseed0",
    "--mean 0.5,0.5,0.5 --std 1,1,1": "gfbs_p0.7_seed1_mean0.5,0.5,0.5_std1,1,1",
    "--criterion l1 --scope layer": "l1_p0.7_seed1",
    "--criterion l1 --scope global": "l1_p0.7_seed1_scopeglobal",
    "--criterion l1 --w_beta 1 --score_seed 3": "l1_p0.7_seed1",
    "--data_dir x --output y --device cpu": "gfbs_p0.7_seed1",
}


def test_names_of_runs():
    names = {line: settings.run_name(gfbs_cifar.parse_args(line.split())) for line in NAMES}
    assert names == NAMES


REFUSED = {
    train: {
        "--net gatevgg61": "did you mean gatevgg",
        "--epochs 0": "--epochs: '0' is not a whole number of at least 1",
        "--epochs many": "--epochs",
        "--lr -1": "--lr: '-1' is not a positive number",
        "--lr nan": "--lr",
        "--seed -1": "--seed",
        "--dataset mnist": "--dataset",
        "--gpu 0,0": "--gpu",
        "--gpu one": "--gpu",
        "--unknown 3": "--unknown",
        "--label_smoothing 1": "--label_smoothing: '1' is not a share in (0, 1)",
        "--ema 0": "--ema: '0' is not a share in (0, 1)",
        "--accumulate 1": "--accumulate: '1' is not a whole number of at least 2",
        "--distill 0.5": "unrecognized arguments: --distill",
    },
    gfbs_cifar: {
        "--p 1": "'1' is not a ratio in [0, 1)",
        "--p -0.1": "--p",
        "--p nan": "--p",
        "--w_beta -1": "--w_beta",
        "--criterion magic": "--criterion",
        "--no_beta --beta_only": "--beta_only means --criterion beta, not taylor",
        "--min_channels 0": "--min_channels",
        "--score_images 0": "--score_images",
        "--lr 1e39": "'1e39' is not a positive number below 3.4e+38",
        "--weight_decay 1e300": "'1e300' is not a number of at least 0 and below 3.4e+38",
        "--w_beta 1e38": "'1e38' is not a number of at least 0 and below 1e6",
        "--smooth --steps 3": "--steps: not allowed with argument --smooth",
        "--from_scratch --steps 3": "--steps: not allowed with argument --from_scratch",
        "--p 0.5 --macs 0.5": "--macs: not allowed with argument --p",
        "--macs 0": "--macs: '0' is not a share in (0, 1]",
        "--params 1.5": "--params",
        "--round_to 0": "--round_to",
        "--steps 0": "--steps",
        "--step_epochs 3": "--step_epochs goes with --steps",
        "--smooth_epochs 0": "--smooth_epochs goes with --smooth",
        "--final_epochs 3": "--final_epochs goes with --smooth",
        "--resume --overwrite": "--overwrite: not allowed with argument --resume",
        "--mean 0.5,0.5,0.5": "--mean and --std go together",
        "--mean 1,2,3 --std 1,1,1": "is not three numbers from 0 to 1",
        "--mean 0,0,0 --std 0,1,1": "--std",
        "--from_scratch --epochs 0": "--from_scratch needs --epochs of at least 1",
        "--holdout -1": "--holdout",
        "--temperature 2": "--temperature goes with --distill",
        "--distill 1.5": "--distill: '1.5' is not a share in (0, 1]",
        "--distill 0.5 --temperature 0": "--temperature: '0' is not a pos",
    },
    gfbs_imagenet: {
        "": "--data_dir",
        "--data_dir . --net resnet51": "did you mean resnet50",
        "--data_dir . --net gatevgg16": "unknown network 'gatevgg16'",
        "--data_dir . --p 1.0": "--p",
        "--data_dir . --sched linear": "--sched",
        "--data_dir . --train-bs 0": "--train_bs",
        "--data_dir . --warmup_epochs 3": "--warmup_epochs goes with --sched cosine",
        "--data_dir . --new_head --distill 0.5": "--new_head do not go",
        "--data_dir . --head_epochs 3": "--head_epochs goes with --new_head",
        "--data_dir . --new_head --head_epochs 0": "--head_epochs: '0' is not a whole number",
        "--data_dir . --new_head --epochs 0": "--new_head needs --epochs of at least 1",
        "--data_dir . --new_head --smooth --smooth_epochs 0 --final_epochs 0": "--new_head needs",
    },
}


@pytest.mark.parametrize(
    "script, line, message", [(s, *case) for s, cases in REFUSED.items() for case in cases.items()]
)
def test_flags_that_make_no_sense_end_with_one_line_and_code_2(script, line, message, capsys):
    with pytest.raises(SystemExit) as left:
        script.parse_args(line.split())
    shown = capsys.readouterr().err
    assert left.value.code == 2 and message in shown and shown.count("\n") == 1


def test_what_has_no_effect_is_one_warning(trained, capsys):
    gfbs_cifar.parse_args(["--criterion", "slimming", "--w_beta", "1", "--score_seed", "3"])
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "--w_beta and --score_seed: without effect" in shown
    result = run_gfbs("--min_channels", "1000", "--epochs", "0")
    assert result["config"]["min_channels"] == 64 and result["ratio"]["reached"] == 0
    assert "no group has more than 64 channels" in capsys.readouterr().err
