"""Finding what a run continues from, and making sure that it is the same run."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.checkpoint import Checkpoint, load_checkpoint
from utils.distributed import Runtime
from utils.errors import InputError

PREVIOUS = "last_previous.pth"


def finished_result(folder: Path, config: Mapping[str, Any], runtime: Runtime) -> Any:
    """What result.json says where a run of this configuration has ended; else None.

    Whether its data have the same classes is not looked at: nothing is read for it.
    """

    def find() -> Any:
        try:
            result = json.loads((folder / "result.json").read_text())
            if differences({**result["config"], "classes": None}, config):
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        print(f"done already; results in {folder}")
        return result

    return runtime.on_main(find)  # or some ranks might leave, and others wait for them


def load_last(
    folder: Path, net: str, config: Mapping[str, Any], runtime: Runtime
) -> Checkpoint | None:
    """last.pth of a run, or the one before where the newest does not load; None without any.

    Raises InputError where none of them loads, or where the run has another configuration.
    """
    paths = [path for path in (folder / "last.pth", folder / PREVIOUS) if path.exists()]
    for path in paths:
        try:
            last = load_resumable(path, net)
        except InputError as error:
            if path == paths[-1]:
                raise
            print(f"{error}; going on from the one before", file=sys.stderr)
        else:
            return check_same_run(last, config)
    if runtime.is_main:
        print("nothing to resume from: starting afresh")
    return None


def load_resumable(path: Path, net: str) -> Checkpoint:
    """A checkpoint with all it takes to continue; InputError otherwise."""
    last = load_checkpoint(path, net)
    if not {"training", "config"} <= last.meta.keys():
        raise InputError(f"{path}: holds no optimiser to continue with; name a last.pth")
    return last


def check_same_run(last: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Raise InputError, with what differs, where the flags are not those of the run so far."""
    changed = differences(last.meta["config"], config)
    if changed:
        raise InputError(f"--resume: that run has another configuration ({changed})")
    return last


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two configurations, in words; empty where nothing does."""
    earlier, now = json.loads(json.dumps(earlier)), json.loads(json.dumps(now))  # tuples are lists
    # A switch that the version of the earlier run had not is off.
    names = [
        name
        for name in sorted({*earlier, *now})
        if (earlier.get(name) or None) != (now.get(name) or None)
    ]
    return ", ".join(f"{name}: {earlier.get(name)} there, {now.get(name)} here" for name in names)
