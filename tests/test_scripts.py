"""The scripts, as a user chains them, on a small folder of images."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers import (
    COMMON,
    CPU,
    files,
    make_folder,
    one_run,
    random_batch,
    random_model,
    refusal,
    run_gfbs,
    run_train,
    same_weights,
    snapshot,
)
from processes import ROOT, Script

import gfbs_cifar
import train
from utils.checkpoint import load_checkpoint, load_model, save_checkpoint
from utils.cost import model_cost
from utils.data.small import ImageBatches, load_data
from utils.errors import InputError
from utils.finetune import evaluate
from utils.pruning import PruningPlan
from utils.surgery import prune


def test_train_then_prune_with_no_step_by_hand(trained, capsys):
    assert files(trained) >= {"model_best.pth", "last.pth", "result.json", "log.txt"}
    result = run_gfbs("--p", "0.5")
    run = one_run(trained, "gfbs_p0.5_seed1")
    assert files(run) >= {"plan.json", "pruned.pth", "model_best.pth", "last.pth", "result.json"}
    assert json.loads((run / "result.json").read_text()) == json.loads(json.dumps(result))

    baseline, plan = load_model(trained / "model_best.pth"), (run / "plan.json").read_text()
    by_hand = prune(load_model(trained / "model_best.pth"), PruningPlan.from_json(plan)).eval()
    pruned = load_model(run / "pruned.pth").eval()
    images, _ = random_batch(2, 16)
    assert torch.equal(by_hand(images), pruned(images))

    data = load_data("folder", "images", 16)
    test = ImageBatches(data.test, 100, data.normalisation, CPU)
    accuracy = result["accuracy"]
    tuned = {"best": load_model(run / "model_best.pth"), "last": load_model(run / "last.pth")}
    for key, network in ({"baseline": baseline, "after_surgery": pruned} | tuned).items():
        assert accuracy[key] == pytest.approx(evaluate(network, test, CPU).accuracy), key
    for name, network in (("before", baseline), ("after", pruned)):
        cost = model_cost(network, 16)
        assert result["cost"]["macs"][name] == cost.macs
        assert result["cost"]["params"][name] == cost.params
    assert result["channels"] == {
        name: {"before": width, "after": pruned.group_widths()[name]}
        for name, width in baseline.group_widths().items()
    }
    assert result["ratio"]["asked"] == 0.5 and 0.3 < result["ratio"]["reached"] <= 0.51
    assert {"command", "seed", "versions", "wall_time_seconds", "history"} <= result.keys()
    shown = capsys.readouterr().out
    assert "right after" not in shown and "after surgery" in shown and "multiply-adds" in shown
    table = shown[shown.index("gateresnet20 on folder, gfbs") : shown.rindex("took ")]
    assert max(map(len, table.splitlines())) < 80
    assert list((trained.parent / "runs").rglob("events*"))

    for path in (trained / "model_best.pth", run / "pruned.pth", run / "model_best.pth"):
        assert "training" not in load_checkpoint(path).meta, path  # small files, no optimiser
    assert "optimizer" in load_checkpoint(trained / "last.pth").meta["training"]
    meta = load_checkpoint(run / "model_best.pth").meta
    assert meta["classes"] == ["cat", "dog"] and meta["normalisation"]["mean"][0] == 0.4914


def test_a_pruned_checkpoint_is_pruned_again(trained):
    run_gfbs("--p", "0.4")
    first = one_run(trained, "gfbs_p0.4_seed1") / "model_best.pth"
    run_gfbs("--p", "0.3", "--checkpoint", str(first))
    again = load_model(one_run(trained, "gfbs_p0.3_seed1") / "pruned.pth")
    once = load_model(first)
    assert all(again.group_widths()[n] <= width for n, width in once.group_widths().items())
    assert all(set(again.kept[name]) <= set(once.kept[name]) for name in once.kept)
    with pytest.raises(InputError, match="baseline"):  # the same name, another network
        run_gfbs("--p", "0.4", "--checkpoint", str(first))


def test_no_ratio_means_nothing_goes_and_no_epochs_mean_no_fine_tuning(trained):
    result = run_gfbs("--p", "0", "--epochs", "0")
    assert result["accuracy"]["last"] is None and result["history"] == []
    run = one_run(trained, "gfbs_p0_seed1")
    assert files(run) >= {"plan.json", "pruned.pth", "result.json"}
    assert not files(run) & {"last.pth", "model_best.pth"}
    assert result["ratio"]["reached"] == 0
    assert result["accuracy"]["baseline"] == result["accuracy"]["after_surgery"]
    assert same_weights(trained / "model_best.pth", run / "pruned.pth")


def test_smooth_ends_with_the_same_channels(trained):
    one_shot = run_gfbs("--p", "0.5")
    smooth = run_gfbs("--p", "0.5", "--smooth", "--smooth_epochs", "1", "--final-epochs", "2")
    run = one_run(trained, "gfbs_p0.5_smooth_seed1")
    assert smooth["channels"] == one_shot["channels"]
    assert smooth["accuracy"]["after_surgery"] == one_shot["accuracy"]["after_surgery"]
    for name in ("pruned.pth", "last.pth", "model_best.pth"):
        assert load_model(run / name).kept == load_model(run / "pruned.pth").kept
    assert (run / "plan.json").read_text() == (
        one_run(trained, "gfbs_p0.5_seed1") / "plan.json"
    ).read_text()
    log = (run / "log.txt").read_text().splitlines()
    stages = sum(line.startswith("round ") for line in log)
    assert 1 < stages <= 10 and len(smooth["history"]) == (stages - 1) + 2
    assert smooth["accuracy"]["best_epoch"] in (1, 2)


def test_criteria_by_flag(trained):
    meant = {"--no_beta": "taylor", "--beta-only": "beta", "--beta": "gfbs"}
    for given, criterion in (([flag], name) for flag, name in meant.items()):
        assert run_gfbs("--epochs", "0", *given)["criterion"] == criterion
        assert (one_run(trained, f"{criterion}_p0.7_seed1") / "result.json").exists()


def test_two_runs_with_one_seed_are_the_same_and_another_seed_is_not(place):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run_train("--output", name, "--seed", seed, "--deterministic")
    a, b, c = (place / name / "gateresnet20_folder" / "last.pth" for name in "abc")
    assert same_weights(a, b) and not same_weights(a, c)


def test_another_configuration_is_refused_unless_asked(trained):
    before = (trained / "last.pth").read_bytes()
    with pytest.raises(InputError, match="lr: None there, 0.5 here.*--overwrite"):
        run_train("--lr", "0.5")
    assert (trained / "last.pth").read_bytes() == before
    run_train("--lr", "0.5", "--overwrite")
    assert (trained / "last.pth").read_bytes() != before
    (trained / "config.json").unlink()
    with pytest.raises(InputError, match="unknown configuration"):
        run_train()


def test_flags_with_dashes_and_underscores_are_the_same():
    dashes = train.parse_args(["--limit-train-batches", "3", "--data-dir=a-b", "--weight-decay=1"])
    underscores = train.parse_args(
        ["--limit_train_batches", "3", "--data_dir=a-b", "--weight_decay=1"]
    )
    assert dashes == underscores and dashes.data_dir == "a-b"


def bad_inputs(place):
    """(arguments of gfbs_cifar.py or train.py, what the message must say)"""
    save_checkpoint(place / "vgg.pth", random_model("gatevgg11", 2))
    save_checkpoint(place / "three.pth", random_model("gateresnet20", 3))
    named = random_model("gateresnet20", 2)
    save_checkpoint(place / "swapped.pth", named, classes=["dog", "cat"])
    save_checkpoint(place / "good.pth", named)
    make_folder(place / "other", classes=("cat", "owl"), parts=("train",))
    make_folder(place / "other", classes=("cat", "dog"), parts=("test",))
    make_folder(place / "broken", images=3)
    (place / "broken" / "train" / "cat" / "1.png").write_text("no image")
    (place / "empty" / "train").mkdir(parents=True)
    (place / "empty" / "test").mkdir()
    return [
        (run_gfbs, [], "model_best.pth: no such checkpoint; make one with train.py"),
        (run_gfbs, ["--checkpoint", "nowhere.pth"], "nowhere.pth: no such checkpoint"),
        (run_gfbs, ["--checkpoint", "vgg.pth"], "vgg.pth: holds gatevgg11, not gateresnet20"),
        (run_gfbs, ["--checkpoint", "three.pth"], "2 classes, the checkpoint was trained on 3"),
        (run_gfbs, ["--checkpoint", "swapped.pth"], "class 'cat' where the checkpoint has 'dog'"),
        (run_gfbs, ["--checkpoint", "good.pth", "--gpu", "0"], "--gpu needs --device cuda"),
        (run_gfbs, ["--checkpoint", "good.pth", "--data_dir", "nowhere"], "nowhere"),
        (run_train, ["--data_dir", "empty"], "empty/train must hold one folder of images per"),
        (run_train, ["--data_dir", "other"], "only one has dog, owl"),
        (run_train, ["--data_dir", "broken"], "cat/1.png: cannot be read as an image"),
        (run_train, ["--net", "gateresnet56_c100"], "has 100 classes, not 2"),
        (run_train, ["--dataset", "cifar10"], "--image_size 16"),
        (run_train, ["--checkpoint", "nowhere"], "nowhere: no such checkpoint"),
        (run_train, ["--checkpoint", "good.pth"], "no optimiser to continue with"),
        (run_train, ["--output", "images/train/cat/0.png"], "cannot be written"),
    ]


def test_bad_input_is_one_line_and_writes_nothing(place):
    for run, argv, message in bad_inputs(place):
        before = snapshot(place)
        assert message in refusal(run, *argv), argv
        assert snapshot(place) == before, argv


@pytest.mark.parametrize(
    "script, argv",
    [
        ("train.py", [*COMMON, "--data_dir", "nowhere"]),
        ("gfbs_cifar.py", [*COMMON, "--data_dir", "nowhere"]),
        ("gfbs_imagenet.py", ["--data_dir", "images", "--device", "cpu"]),
        ("prepare_torch_imagenet_models.py", ["--checkpoint", "nowhere.pth", "--device", "cpu"]),
    ],
)
def test_scripts_leave_with_code_2_and_one_line(place, script, argv):
    before = snapshot(place)
    code, shown, wrong = Script(script, *argv).wait()
    assert code == 2 and shown == ""
    assert wrong.startswith(f"{script}: error: ") and wrong.count("\n") == 1
    assert snapshot(place) == before


HELPFUL = ["train", "gfbs_cifar", "gfbs_imagenet", "prepare_torch_imagenet_models"]
HELPFUL += [f"tools.{name}" for name in ("benchmark", "evaluate", "export", "results")]
SLOW = {"torchvision", "tensorboard", "sympy", "matplotlib", "pandas", "scipy", "torch._dynamo"}
SLOW |= {f"torch.utils.{name}" for name in ("benchmark", "flop_counter", "tensorboard")}
SLOW |= {"torch.distributed.launcher"}


def test_help_is_shown_without_modules_that_take_long_to_import():
    code = f"""
import contextlib, importlib, sys, torch
before = set(sys.modules)
for name in {HELPFUL}:
    with contextlib.suppress(SystemExit):
        importlib.import_module(name).parse_args(["--help"])
print("imported", *sorted({SLOW} & set(sys.modules) - before))"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("usage: ") == len(HELPFUL)
    assert done.stdout.splitlines()[-1] == "imported"


@pytest.mark.parametrize("script", [train, gfbs_cifar])
def test_help_reads_like_documentation(script, capsys):
    with pytest.raises(SystemExit) as left:
        script.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert script.__doc__.splitlines()[0] in shown
    assert "(default: 0.1)" in shown or "(default: 0.01)" in shown
    assert "None" not in shown
