"""What a folder holds already: a finished run, a run to continue, or another experiment."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.checkpoint import Checkpoint, load_checkpoint
from utils.errors import InputError

PREVIOUS = "last_previous.pth"
RESULTS = ("plan.json", "pruned.pth", "model_best.pth", "last.pth", PREVIOUS, "result.json")

# What runs did before a flag existed, where that is not "off".
BEFORE = {"scope": "global", "min_channels": 1, "round_to": 1, "recalibrate": 0, "holdout": 0}


def existing_run(
    folder: Path,
    config: Mapping[str, Any],
    identity: Callable[[], Mapping[str, Any]],
    *,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any] | None:
    """The result of a finished run of this configuration; None where there is work to do.

    Args:
        folder: of the run.
        config: of the run that is asked for.
        identity: what else belongs to its configuration; only asked where all else is equal.
        resume, overwrite: whether to continue an unfinished run, or to replace any.

    Raises InputError for a run of another configuration, and for an unfinished one unless
    ``resume`` says to continue it.
    """
    try:
        present = [name for name in RESULTS if (folder / name).exists()]
    except OSError as error:  # no permission, or a name that is too long
        raise InputError(f"{folder}: cannot be read ({error}); see --output") from None
    if overwrite or not present:
        return None
    keep = "--overwrite replaces it, another --output keeps both"
    try:
        earlier = json.loads((folder / "config.json").read_text())
        changed = differences(earlier, config) or differences(earlier, {**config, **identity()})
    except InputError:
        raise
    except (OSError, ValueError, TypeError, AttributeError):
        raise InputError(
            f"{folder} holds {', '.join(present)} of an unknown configuration; {keep}"
        ) from None
    if changed:
        raise InputError(f"{folder} holds a run of another configuration ({changed}); {keep}")
    result = _read_result(folder)
    if result and not (missing := missing_files(folder, result)):
        print(f"done already; --overwrite runs it again; results in {folder}")
        return result
    if not resume:
        what = f"a finished run without {', '.join(missing)}" if result else "an unfinished run"
        raise InputError(
            f"{folder} holds {what}; --resume continues it, --overwrite starts it again"
        )
    return None


def _read_result(folder: Path) -> dict[str, Any] | None:
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def missing_files(folder: Path, result: Mapping[str, Any]) -> list[str]:
    """The files that a finished run with such a result should have and has not, or not whole."""
    names = ["plan.json", "pruned.pth"] if "ratio" in result else []
    names += ["last.pth", "model_best.pth"] if result.get("history") else []
    return [name for name in names if not is_whole(folder / name)]


def is_whole(path: Path) -> bool:
    """Whether a file is there and not cut off; a checkpoint's table of contents is at its end."""
    return path.is_file() and (path.suffix != ".pth" or zipfile.is_zipfile(path))


def find_last(folder: Path, net: str) -> tuple[Path, Checkpoint] | None:
    """last.pth of a run, or the one before where the newest does not load; None without any.

    Raises InputError where none of them loads.
    """
    paths = [path for path in (folder / "last.pth", folder / PREVIOUS) if path.exists()]
    for path in paths:
        try:
            return path, load_resumable(path, net)
        except InputError as error:
            if path == paths[-1]:
                raise
            print(f"{error}; going on from the one before", file=sys.stderr)
    print("nothing to resume from: starting afresh")
    return None


def load_resumable(path: Path, net: str) -> Checkpoint:
    """A checkpoint with all it takes to continue; InputError otherwise."""
    last = load_checkpoint(path, net)
    if not {"training", "config"} <= last.meta.keys():
        raise InputError(f"{path}: holds no optimiser to continue with; name a last.pth")
    if "record" not in last.meta["training"]:
        raise InputError(
            f"{path}: an earlier version began this run and has to finish it; or start it again"
            " with --overwrite"
        )
    return last


def check_same_run(last: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Raise InputError, with what differs, where the flags are not those of the run so far."""
    changed = differences(last.meta["config"], config)
    if changed:
        raise InputError(f"--resume: that run has another configuration ({changed})")
    return last


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two configurations, in words; empty where nothing does.

    A flag that one of them lacks is what it was before the flag existed; data are compared where
    both configurations know them.
    """

    def value(config: Mapping[str, Any], name: str) -> Any:
        found = config.get(name, BEFORE.get(name))
        return None if found is False else found

    names = [
        name
        for name in sorted({*earlier, *now})
        if json.dumps(value(earlier, name)) != json.dumps(value(now, name))
        and not (name in ("classes", "data") and not (name in earlier and name in now))
    ]
    return ", ".join(f"{name}: {earlier.get(name)} there, {now.get(name)} here" for name in names)
