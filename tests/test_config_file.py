"""--config: a run is repeated from the config.json that it wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import one_run, run_gfbs, run_train, same_weights

import gfbs_cifar
import gfbs_imagenet
import train
from utils.cli import settings

PLACES = ["--dataset", "folder", "--data_dir", "images", "--device", "cpu"]


def repeat(script, config, *argv):
    return script.main(script.parse_args(["--config", str(config), *argv]))


def configuration(script, *argv):
    """As a run would write it, without what it learns of weights and images."""
    return json.loads(json.dumps(settings.configuration(script.parse_args(argv))))


def write(content, path="given.json"):
    Path(path).write_text(json.dumps(content))
    return path


def test_a_run_is_repeated_to_the_same_bits(trained):
    config = trained / "config.json"
    repeat(train, config, "--output", "again", "--data_dir", "images", "--device", "cpu")
    again = Path("again/gateresnet20_folder")
    assert same_weights(again / "last.pth", trained / "last.pth")
    assert json.loads((again / "config.json").read_text()) == json.loads(config.read_text())
    assert f"repeats {config}\n" in (again / "log.txt").read_text()

    options = ["--macs", "0.6", "--no_beta", "--cosine", "--steps", "2", "--step_epochs", "1"]
    run_gfbs(*options, "--mean", "0.5,0.4,0.3", "--std", "0.2,0.2,0.1", "--ema", "0.5")
    first = one_run(trained, "taylor_macs0.6_steps2_seed1")
    where = ["--checkpoint", "checkpoints", "--output", "again"]
    repeat(gfbs_cifar, first / "config.json", "--data_dir", "images", "--device", "cpu", *where)
    second = again / first.name
    assert same_weights(first / "last.pth", second / "last.pth")
    assert (first / "config.json").read_text() == (second / "config.json").read_text()


def test_typed_flags_win_and_the_log_says_what_differs(trained):
    run_gfbs("--macs", "0.6", "--epochs", "2", "--smooth", "--final_epochs", "1")
    first = one_run(trained, "gfbs_macs0.6_smooth_seed1")
    argv = ["--p", "0.3", "--seed", "5", "--data_dir", "images", "--device", "cpu"]
    for words in (
        ["--config", str(first / "config.json"), *argv],
        [*argv, f"--config={first}/config.json"],
    ):
        args = gfbs_cifar.parse_args(words)
        assert (args.p, args.macs, args.seed, args.epochs, args.bs) == (0.3, None, 5, 2, 8)
        assert args.smooth and args.final_epochs == 1
    gfbs_cifar.main(args)
    log = (one_run(trained, "gfbs_p0.3_smooth_seed5") / "log.txt").read_text()
    assert (
        f"repeats {first}/config.json, but for macs: 0.6 there, None here, p: None there,"
        " 0.3 here, seed: 1 there, 5 here\n" in log
    )


def test_one_way_to_prune_replaces_another(tmp_path):
    smooth = ["--smooth", "--smooth_epochs", "3", "--final_epochs", "4", "--epochs", "9"]
    path = str(write(configuration(gfbs_cifar, *smooth), tmp_path / "config.json"))
    args = gfbs_cifar.parse_args(["--config", path, "--steps", "2", "--step_epochs", "5"])
    assert (args.smooth, args.steps, args.step_epochs, args.epochs) == (False, 2, 5, 9)
    assert args.smooth_epochs is None and args.final_epochs is None


def test_weights_that_are_others_are_told_of(trained):
    run_gfbs("--p", "0.5", "--epochs", "0")
    config = shutil.copy(one_run(trained, "gfbs_p0.5_seed1") / "config.json", "copy.json")
    run_train("--seed", "7", "--overwrite", "--epochs", "1")
    repeat(gfbs_cifar, config, "--overwrite", *PLACES)
    log = (one_run(trained, "gfbs_p0.5_seed1") / "log.txt").read_text()
    assert "repeats copy.json, but for baseline: " in log


EVERY = [
    (train, ["--cosine", "--lr", "0.3", "--label_smoothing", "0.1", "--holdout", "5"]),
    (train, ["--no_channels_last", "--amp", "bf16", "--net", "gateresnet20"]),
    (gfbs_cifar, ["--params", "0.5", "--criterion", "l1", "--scope", "global", "--round_to", "8"]),
    (gfbs_cifar, ["--smooth", "--distill", "0.5", "--score_seed", "0", "--weight_decay", "0"]),
    (gfbs_cifar, ["--distill", "0.5", "--temperature", "2", "--ema", "0.9", "--accumulate", "2"]),
    (gfbs_imagenet, ["--data_dir", ".", "--new_head", "--train_bs", "64", "--sched", "cosine"]),
    (gfbs_imagenet, ["--data_dir", ".", "--mean", "0,0,0", "--std", "1,1,1", "-j", "2"]),
]


@pytest.mark.parametrize("script, argv", EVERY)
def test_every_flag_comes_back(script, argv, tmp_path):
    config = configuration(script, *argv)
    path = write(config, tmp_path / "config.json")
    place = ["--data_dir", "."]
    assert configuration(script, "--config", str(path), *place) == config
    named = script.parse_args(argv), script.parse_args(["--config", str(path), *place])
    if script is not train:
        assert len({settings.run_name(args) for args in named}) == 1


def test_what_an_older_file_lacks_is_as_it_was_then(tmp_path):
    config = configuration(gfbs_cifar, "--criterion", "l1", "--scope", "global")
    older = {k: v for k, v in config.items() if k not in ("scope", "channels_last", "ema")}
    args = gfbs_cifar.parse_args(["--config", str(write(older, tmp_path / "old.json"))])
    assert (args.scope, args.channels_last, args.ema) == ("global", False, None)


def bad_files():
    pruning, training = configuration(gfbs_cifar), configuration(train)
    imagenet = configuration(gfbs_imagenet, "--data_dir", ".")
    return [
        (train, {**training, "colour": 3}, "has colour, which no flag here sets"),
        (train, {**training, "output": "elsewhere"}, "has output, which no flag here sets"),
        (train, pruning, "has criterion, distill, "),
        (gfbs_cifar, training, "is of another script"),
        (gfbs_cifar, imagenet, ", train_bs, warmup_epochs, warmup_lr, which no flag here sets"),
        (gfbs_cifar, [1, 2], "is missing or no configuration"),
        (gfbs_cifar, "text", "is missing or no configuration"),
        (gfbs_cifar, {**pruning, "epochs": -5}, "--epochs: '-5' is not a whole number"),
        (gfbs_cifar, {**pruning, "epochs": [1, {}]}, "--epochs: '1,{}' is not a whole number"),
        (gfbs_cifar, {**pruning, "criterion": True}, "--criterion: invalid choice: 'True'"),
        (gfbs_cifar, {**pruning, "smooth": 3}, "--smooth/-s: ignored explicit argument '3'"),
    ]


@pytest.mark.parametrize("script, content, message", bad_files())
def test_bad_files_end_with_one_line_and_code_2(script, content, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        script.parse_args(["--config", str(write(content, tmp_path / "config.json"))])
    shown = capsys.readouterr().err
    assert left.value.code == 2 and message in shown and shown.count("\n") == 1


@pytest.mark.parametrize("path", ["missing.json", ".", "broken.json"])
def test_what_is_no_json_ends_with_one_line(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_bytes(b'{"net": \xff')
    with pytest.raises(SystemExit) as left:
        train.parse_args(["--config", path])
    shown = capsys.readouterr().err
    assert left.value.code == 2 and f"--config {path} is missing or no configuration" in shown
    assert shown.count("\n") == 1
