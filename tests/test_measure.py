"""What a run measures, and on which images: recalibration, held-out images, normalisation."""

from __future__ import annotations

import pytest
import torch
from helpers import CPU, batches_of, one_run, run_gfbs, run_train, spy

import gfbs_cifar
from utils.checkpoint import load_checkpoint, load_model
from utils.data.small import ImageBatches, load_data
from utils.errors import InputError
from utils.finetune import evaluate


def test_recalibration_averages_the_statistics_of_the_batches(trained):
    plain = run_gfbs("--p", "0.4", "--epochs", "0")
    elsewhere = ["--output", "again", "--checkpoint", str(trained)]
    result = run_gfbs("--p", "0.4", "--epochs", "0", "--recalibrate", "2", *elsewhere)
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

    def noting(model, batches, *args):
        metrics = original(model, batches, *args)
        seen.append((batches.images, metrics.accuracy))
        return metrics

    monkeypatch.setattr("utils.run.measure.evaluate", noting)
    monkeypatch.setattr("utils.finetune.evaluate", noting)
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
    note = lambda batches, indices: (batches.images, indices.max().item())  # noqa: E731
    picked = spy(monkeypatch, ImageBatches, "pick", note)
    run_gfbs("--holdout", "5", "--epochs", "0", "--score_images", "100")
    assert (13, 12) in picked  # 18 images, of which 5 are held out


def test_a_baseline_that_has_seen_the_held_out_images_is_told_of(trained, capsys):
    run_gfbs("--holdout", "5", "--epochs", "0")
    assert "baseline was trained on images that are held out" in capsys.readouterr().out
    run_train("--holdout", "5", "--output", "held")
    run_gfbs("--holdout", "5", "--epochs", "0", "--output", "held")
    assert "held out here" not in capsys.readouterr().out


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
