"""The scripts in experiments/: every command is one that exists, and one script really runs."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from utils import flags

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "experiments").glob("*.sh") if path.stem != "common")


def run_script(name, place, *argv, **environment):
    return subprocess.run(
        ["sh", ROOT / "experiments" / f"{name}.sh", *argv],
        env={**os.environ, "OUT": str(place), "PYTHON": sys.executable, **environment},
        cwd=place, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", [path.stem for path in SCRIPTS])
def test_commands_are_accepted_and_do_not_get_in_each_others_way(name, tmp_path):
    done = run_script(name, tmp_path, "--epochs", "2", PYTHON="echo", DATA_DIR="imagenet")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith("+ ")]
    folders = set()
    for line in lines:
        script, *argv = shlex.split(line)
        if script == "-m":
            continue
        args = importlib.import_module(script.removesuffix(".py")).parse_args(argv)
        if not hasattr(args, "epochs"):
            continue  # the conversion of torchvision's weights
        assert args.epochs == 2 and args.resume and args.skip_finished
        run = flags.run_name(args) if hasattr(args, "criterion") else ""
        folder = (args.output, flags.network_folder(args), run)
        assert folder not in folders, line
        folders.add(folder)
    assert len(folders) > 10


def test_criteria_run_and_what_is_done_is_skipped(tmp_path):
    def criteria(names):
        return run_script(
            "criteria", tmp_path, "--dataset", "synthetic", "--epochs", "1", "--bs", "32",
            "--limit_train_batches", "2", "--limit_test_batches", "1",
            SEEDS="1", NETS="gateresnet20", MACS="0.5", CRITERIA=names,
        )  # fmt: skip

    done = criteria("random")
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("criteria/*/*/result.json")
    share = json.loads(result.read_text())["cost"]["macs"]
    assert 0.476 <= share["after"] / share["before"] <= 0.5
    written = result.stat().st_mtime_ns
    done = criteria("random l1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done already") == 2  # the baseline, and the first criterion
    assert result.stat().st_mtime_ns == written
    assert len(list(tmp_path.glob("criteria/*/*/result.json"))) == 2
    table = done.stdout.splitlines()[-8:]
    assert any("random" in line for line in table) and any("l1" in line for line in table)
