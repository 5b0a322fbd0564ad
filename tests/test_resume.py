"""Nothing lost: runs that are killed, interrupted, starved of disk or fed the wrong file."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path

import kill
import numpy as np
import pytest
import torch
from helpers import die_after, make_folder, one_run, run_gfbs, run_train, same_weights, snapshot
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gfbs_cifar
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.cli import settings
from utils.distributed import Runtime
from utils.errors import InputError
from utils.run.existing import RunSettings, differences
from utils.run.folder import RunCallback, RunFolder
from utils.run.rounds import random_state, set_random_state

RUNS = {
    "train": "--epochs 3",
    "train with a holdout": "--epochs 4 --holdout 4",
    "one shot": "--epochs 3",
    "smooth": "--smooth --smooth_epochs 1 --final_epochs 2 --p 0.5",
    "steps": "--steps 2 --step_epochs 2 --epochs 2 --p 0.6 --recalibrate 1 --holdout 2",
    "from scratch": "--epochs 3 --p 0.5 --from_scratch",
    "train with options": "--epochs 3 --ema 0.6 --accumulate 2 --label_smoothing 0.1",
    "steps with options": "--steps 2 --epochs 1 --p 0.6 --ema 0.6 --distill 1 --accumulate 2",
}


@pytest.mark.parametrize("script", RUNS)
def test_a_run_continues_to_the_same_bits(trained, script):
    """An epoch has three batches, and every second batch saves. The run dies before anything is
    saved, then in mid-epoch, and then once more.
    """
    start = run_train if script.startswith("train") else run_gfbs
    argv = [*RUNS[script].split(), "--checkpoint_every", "2"]
    if start is run_gfbs:
        argv += ["--checkpoint", str(trained)]
    whole = start(*argv, "--output", "whole")
    for batches in (1, 4, 2):
        die_after(batches, start, *argv, "--output", "broken", "--resume")
    resumed = start(*argv, "--output", "broken", "--resume")
    for path in Path("whole").rglob("*.pth"):
        if path.name != "last_previous.pth":
            assert same_weights(path, "broken" / path.relative_to("whole")), path
    assert resumed["accuracy"] == whole["accuracy"]
    for ours, theirs in zip(resumed["history"], whole["history"], strict=True):
        assert {**ours, "images_per_second": 0} == {**theirs, "images_per_second": 0}
    if start is run_gfbs:
        assert resumed["channels"] == whole["channels"] and resumed["rounds"] == whole["rounds"]


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_continues_between_rounds(trained, epochs):
    """The next round scores the same images, augmented alike, and is drawn where it belongs."""
    argv = ["--steps", "2", "--step_epochs", "2", "--epochs", "1", "--p", "0.6"]
    argv += ["--checkpoint", str(trained)]
    run_gfbs(*argv, "--output", "whole")
    argv += ["--output", "broken", "--logdir", "logs"]
    die_after(epochs, run_gfbs, *argv, method="after_epoch")
    run_gfbs(*argv, "--resume")
    run = one_run("whole/gateresnet20_folder", "gfbs_p0.6_steps2_seed1").relative_to("whole")
    assert same_weights(f"whole/{run}/last.pth", f"broken/{run}/last.pth")
    plans = [Path(output, run, "plan.json").read_text() for output in ("whole", "broken")]
    assert plans[0] == plans[1]
    # File by file: TensorBoard sorts the files of one second by name, not by their order.
    files = Path("logs", run).glob("events*")
    boards = [
        EventAccumulator(str(file), size_guidance={"histograms": 0}).Reload() for file in files
    ]
    for kind, tag in (("Histograms", "saliency/gate1"), ("Images", "channels")):
        drawn = [getattr(b, kind)(tag) for b in boards if tag in b.Tags()[kind.lower()]]
        assert sorted(event.step for events in drawn for event in events) == [0, 2]


def test_with_a_holdout_the_best_epoch_must_be_there(trained):
    argv = ["--holdout", "4", "--epochs", "2", "--output", "held"]
    die_after(1, run_train, *argv, method="after_epoch")
    folder = Path("held/gateresnet20_folder")
    (folder / "model_best.pth").unlink()
    last = load_checkpoint(folder / "last.pth")
    record = last.meta["training"]["record"]
    (first,) = record["history"]
    later = {**first, "number": 2, "test": {**first["test"], "accuracy": -1}}
    record = {**record, "history": [first, later]}
    training = {**last.meta["training"], "epoch": 2, "record": record}
    save_checkpoint(folder / "last.pth", last.model, **{**last.meta, "training": training})
    with pytest.raises(InputError, match="model_best.pth is missing; put it back"):
        run_train(*argv, "--resume")


def test_with_nothing_to_resume_from_it_starts_afresh_and_says_so(trained, capsys):
    run_train("--output", "new", "--resume")
    run_gfbs("--epochs", "1", "--resume")
    assert capsys.readouterr().out.count("nothing to resume from: starting afresh") == 2


def test_another_configuration_is_refused_with_what_differs(trained):
    with pytest.raises(InputError, match=r"another configuration \(epochs: 2 there, 4 here\)"):
        run_train("--epochs", "4", "--resume")
    run_gfbs("--p", "0.5")
    run_train("--output", "twin", "--seed", "5")
    twin = ["--checkpoint", "twin", "--output", "checkpoints"]
    with pytest.raises(InputError, match="baseline: .*; --overwrite replaces it"):
        run_gfbs("--p", "0.5", *twin, "--resume")


@pytest.mark.parametrize("where", [[], ["--output", "new", "--checkpoint", "checkpoints/{}"]])
def test_more_epochs_are_refused_with_what_to_do_instead(trained, where):
    where = [word.format(trained.name) for word in where]
    command = r"gfbs_cifar.py (--p 0 --checkpoint \S+/last.pth) fine-tunes"
    with pytest.raises(InputError, match=f"learning rates depend on --epochs; {command}") as error:
        run_train("--epochs", "4", *where)
    advice = re.search(command, str(error.value))[1]
    result = run_gfbs(*advice.split(), "--epochs", "2")
    assert result["ratio"]["reached"] == 0 and len(result["history"]) == 2
    with pytest.raises(InputError) as error:  # the rates are not all that differs
        run_train("--epochs", "4", "--lr", "0.5", *where)
    assert "fine-tunes" not in str(error.value)


def test_another_output_says_where_the_baseline_is_looked_for(trained):
    said = "; without it, the baseline is looked for below --output"
    with pytest.raises(InputError, match=f"^new/.*/model_best.pth: no such checkpoint; .*{said}$"):
        run_gfbs("--output", "new")
    with pytest.raises(InputError, match="nowhere.pth: no such checkpoint; .* --checkpoint$"):
        run_gfbs("--output", "new", "--checkpoint", "nowhere.pth")
    run_gfbs("--output", "new", "--checkpoint", "checkpoints", "--epochs", "0")


def test_a_named_checkpoint_is_continued_elsewhere(trained):
    die_after(1, run_train, "--output", "old", "--epochs", "2", method="after_epoch")
    foreign = Path("new/gateresnet20_folder/model_best.pth")
    foreign.parent.mkdir(parents=True)
    foreign.write_text("somebody's")
    named = ["--checkpoint", "old/gateresnet20_folder", "--output", "new", "--epochs", "2"]
    with pytest.raises(InputError, match="model_best.pth of an unknown configuration"):
        run_train(*named)
    assert foreign.read_text() == "somebody's"
    foreign.unlink()
    run_train(*named)
    new = Path("new/gateresnet20_folder")
    assert same_weights(new / "last.pth", trained / "last.pth")
    assert same_weights(new / "model_best.pth", trained / "model_best.pth")


def test_when_the_newest_does_not_load_the_one_before_does(trained, capsys):
    last = trained / "last.pth"
    content = bytearray(last.read_bytes())
    before = load_checkpoint(last).model.state_dict()
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    (trained / "result.json").unlink()
    run_train("--resume")
    assert "going on from the one before" in capsys.readouterr().err
    after = load_checkpoint(last).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_place_is_warned_of(trained, capsys):
    last = load_checkpoint(trained / "last.pth")
    training = last.meta["training"]
    training = {**training, "place": {**training["place"], "ranks": 2, "threads": 3, "GPUs": 4}}
    save_checkpoint(trained / "last.pth", last.model, **{**last.meta, "training": training})
    (trained / "result.json").unlink()
    run_train("--resume")
    shown = capsys.readouterr().out
    for before, what, now in ((2, "ranks", 1), (3, "threads", 1), (4, "GPUs", 0)):
        assert f"warning: {before} {what} began this run and {now} continue" in shown


# The same command once more


def test_a_finished_run_is_reported_and_not_touched(trained, capsys):
    first, pruned = run_train(), run_gfbs("--p", "0.5")
    before = snapshot(trained.parent)
    capsys.readouterr()
    for again in ([], ["--resume"], ["--skip_finished"], ["--data_dir", "moved"]):
        if "moved" in again:
            Path("images").rename("moved")
        assert run_train(*again) == first and run_gfbs("--p", "0.5", *again) == json.loads(
            json.dumps(pruned)
        )
        assert capsys.readouterr().out.count("done already; --overwrite runs it again") == 2
    assert snapshot(trained.parent) == before


@pytest.mark.parametrize("argv", [[], ["--p", "0.5"]])
def test_an_unfinished_run_is_refused_without_resume(trained, argv):
    start = run_gfbs if argv else run_train
    argv = [*argv, "--epochs", "2", "--output", "cut"]
    argv += ["--checkpoint", str(trained)] if start is run_gfbs else []
    die_after(1, start, *argv, method="after_epoch")
    before = snapshot("cut")
    with pytest.raises(InputError, match="unfinished run; --resume continues it, --overwrite"):
        start(*argv)
    assert snapshot("cut") == before
    whole = start(*argv, "--resume")
    again = start(*argv, "--overwrite")
    assert again["accuracy"] == whole["accuracy"]


def test_a_finished_run_without_its_files_is_restored_as_far_as_it_can_be(trained, capsys):
    first = run_gfbs("--p", "0.5")
    run = one_run(trained, "gfbs_p0.5_seed1")
    plan, result = (run / "plan.json").read_text(), (run / "result.json").read_text()
    (run / "plan.json").unlink()
    (run / "pruned.pth").write_bytes((run / "pruned.pth").read_bytes()[:1000])
    (run / "model_best.pth").unlink()
    with pytest.raises(InputError, match="finished run without plan.json, pruned.pth, model_best"):
        run_gfbs("--p", "0.5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCallback, "restore_files", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # stopped before it could be made again
            run_gfbs("--p", "0.5", "--resume")
    assert (run / "result.json").read_text() == result
    again = run_gfbs("--p", "0.5", "--resume")
    assert again["accuracy"] == first["accuracy"] and (run / "plan.json").read_text() == plan
    assert same_weights(run / "model_best.pth", run / "last.pth")
    assert "pruned.pth cannot be written again: lost" in capsys.readouterr().out


def test_zero_is_a_value():
    """Never taken for the run without the flag, whatever the folder is called."""

    def parsed(*argv):
        return gfbs_cifar.parse_args(["--p", "0.5", *argv])

    for argv, usual in (
        (["--weight_decay", "0"], []),
        (["--score_seed", "0"], []),
        (["--smooth", "--smooth_epochs", "0"], ["--smooth"]),
        (["--steps", "2", "--step_epochs", "0"], ["--steps", "2"]),
    ):
        runs = parsed(*usual), parsed(*argv)
        assert differences(*map(settings.configuration, runs)).startswith(argv[-2][2:])
        assert len(set(map(settings.run_name, runs))) == 2


def test_differences_between_configurations():
    assert differences({"x": 0}, {"x": None}) and differences({"x": 0}, {"x": False})
    assert differences({"x": 1}, {"x": True}) and differences({"x": 0}, {})
    assert not differences({"x": False}, {}) and not differences({}, {"x": None})
    assert not differences({"mean": [0.5, 0.5, 0.5]}, {"mean": (0.5, 0.5, 0.5)})
    assert not differences({}, {"scope": "global", "round_to": 1, "holdout": 0})
    assert differences({}, {"scope": "layer"})
    assert not differences({}, {"data": "3 images (a)"})
    assert differences({"data": "3 images (a)"}, {"data": "3 images (b)"})


def test_zero_weight_decay_in_the_same_folder_is_another_run(trained):
    for extra in ([], ["--resume"], ["--skip_finished"]):
        with pytest.raises(InputError, match="weight_decay: None there, 0.0 here"):
            run_train("--weight_decay", "0", *extra)


@pytest.mark.parametrize("changed", ["name", "size"])
def test_other_images_of_the_same_classes_are_other_data(trained, changed):
    others = make_folder(Path("others"), images=9, size=(16, 16))
    image = others / "train" / "cat" / "0.png"
    if changed == "name":
        image.rename(image.with_name("new.png"))
    else:
        image.write_bytes(image.read_bytes() + b"1")
    with pytest.raises(InputError, match="data: 36 images .* there, 36 images .* here"):
        run_train("--data_dir", "others")


def test_wall_time_is_that_of_all_legs(trained, monkeypatch):
    hours = iter(range(0, 10**9, 3600))
    with monkeypatch.context() as patch:
        patch.setattr("utils.run.folder.time.perf_counter", lambda: float(next(hours)))
        die_after(2, run_train, "--epochs", "3", "--output", "legs", method="after_epoch")
    saved = load_checkpoint("legs/gateresnet20_folder/last.pth").meta["training"]["seconds"]
    assert saved >= 3600
    result = run_train("--epochs", "3", "--output", "legs", "--resume")
    assert saved <= result["wall_time_seconds"] < saved + 3600


def test_ranks_continue_what_rank_0_chooses(trained, monkeypatch):
    """Another rank loads the file that rank 0 names, and looks at nothing itself."""
    config = json.loads((trained / "config.json").read_text())
    (trained / "result.json").unlink()
    chosen = trained / "last.pth"
    other = Runtime(torch.device("cpu"), rank=1, world_size=2)
    answers = iter([{}, chosen])  # the identity of the data, and the file
    monkeypatch.setattr(Runtime, "on_main", lambda self, action: next(answers))
    monkeypatch.setattr("utils.run.folder.find_last", lambda *_: 1 / 0)
    asked = RunSettings(trained, Path("logs"), "gateresnet20", config, resume=True)
    with RunFolder(asked, other).opened(["cat", "dog"]) as run:
        weights = run.resumed().model.state_dict()
    expected = load_checkpoint(chosen).model.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_run_that_an_earlier_version_began_is_refused(trained):
    last = load_checkpoint(trained / "last.pth")
    earlier = {"stage": 1, "history": [], "story": {}, "epoch": 1, "batch": 0}
    save_checkpoint(trained / "last.pth", last.model, **{**last.meta, "training": earlier})
    (trained / "last_previous.pth").unlink()
    (trained / "result.json").unlink()
    with pytest.raises(InputError, match="an earlier version began this run.*--overwrite"):
        run_train("--resume")


def test_a_run_from_before_channels_last_was_the_default_goes_on_without_it(trained):
    argv = ["--checkpoint", str(trained), "--epochs", "2", "--no_channels_last"]
    whole = run_gfbs(*argv, "--output", "whole")
    die_after(1, run_gfbs, *argv, "--output", "broken", method="after_epoch")
    path = one_run("broken/gateresnet20_folder", "gfbs_p0.7_seed1")
    assert "channels" not in path.name  # as an earlier version named it
    config = json.loads((path / "config.json").read_text())
    del config["channels_last"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="another configuration .*see --no_channels_last"):
        run_gfbs(*argv[:-1], "--output", "broken", "--resume")
    assert run_gfbs(*argv, "--output", "broken", "--resume")["accuracy"] == whole["accuracy"]
    assert same_weights(path / "last.pth", Path("whole", *path.parts[1:], "last.pth"))


def test_random_streams_come_back():
    state = random_state()
    drawn = torch.rand(3), np.random.rand(3), random.random()
    torch.rand(7), np.random.rand(7)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert torch.equal(drawn[0], torch.rand(3)) and (drawn[1] == np.random.rand(3)).all()
    assert drawn[2] == random.random()


@pytest.mark.parametrize("kills, ranks, batches", [(3, 1, 4), (1, 2, 4)])
def test_killed_it_ends_with_the_same_bits(place, kills, ranks, batches):
    """The same as ``make kill``, with fewer kills and batches, and on two ranks."""
    assert kill.ends_with_the_same_bits(place, kills, ranks=ranks, batches=batches, seed=0)
