"""What a folder holds already: a finished run, one to continue, another experiment, its owner."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import sys
import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from utils.checkpoint import Checkpoint, load_checkpoint
from utils.errors import InputError

Config = Mapping[str, Any]
Identity = Callable[[], Config]  # what tells data apart
PREVIOUS = "last_previous.pth"
RESULTS = ("plan.json", "pruned.pth", "model_best.pth", "last.pth", PREVIOUS, "result.json")

# The value of a flag in runs older than the flag, where it is not "off".
BEFORE = {"scope": "global", "min_channels": 1, "round_to": 1, "recalibrate": 0, "holdout": 0}
# Flags whose default has changed, and what to type for the earlier one.
EARLIER = {"channels_last": "--no_channels_last"}

PATIENCE = 10  # seconds: an NFS server may notice late that an owner has died
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class RunSettings:
    """Where a run goes, and what happens to the files that are there."""

    folder: Path
    logdir: Path  # of TensorBoard files
    net: str
    config: dict[str, Any]  # the settings that tell experiments apart
    resume: bool = False  # continue the run that is there
    overwrite: bool = False  # replace any run that is there
    checkpoint_every: int | None = None  # write last.pth after so many batches, too
    checkpoint: Path | None = None  # with ``resume``: continue this last.pth, from any folder
    repeats: Path | None = None  # the config.json of the run that this one repeats


def find_run(asked: RunSettings, config: Config, identity: Identity) -> dict[str, Any] | None:
    """The result of a finished run of this configuration; None if there is work to do.

    Raises InputError for a run of another configuration, unless ``asked`` replaces it, and for an
    unfinished run, unless ``asked`` continues it. ``identity``, the rest of the configuration, is
    called only if ``config`` is equal.
    """
    folder = asked.folder
    try:
        present = [name for name in RESULTS if (folder / name).exists()]
    except OSError as error:  # no permission, or a name that is too long
        raise InputError(f"{folder}: cannot be read ({error}); see --output") from None
    if asked.overwrite or not present:
        return None
    keep = "--overwrite replaces it, another --output keeps both"
    earlier, result = read_dict(folder / "config.json"), read_dict(folder / "result.json")
    if earlier is None:
        raise InputError(f"{folder} holds {', '.join(present)} of an unknown configuration; {keep}")
    changed = differences(earlier, config) or differences(earlier, {**config, **identity()})
    if changed:
        instead = _extending(changed, folder / "last.pth")
        what = f"a run of another configuration ({changed}){instead}; {keep}"
        raise InputError(f"{folder} holds {what}")
    written = ["plan.json", "pruned.pth"] if result and "ratio" in result else []
    written += ["last.pth", "model_best.pth"] if result and result.get("history") else []
    missing = [name for name in written if not is_whole(folder / name)]
    if result and not missing:
        print(f"done already; --overwrite runs it again; results in {folder}")
        return result
    if not asked.resume:
        what = f"a finished run without {', '.join(missing)}" if result else "an unfinished run"
        how = "--resume continues it, --overwrite starts it again"
        raise InputError(f"{folder} holds {what}; {how}")
    return None


def _extending(changed: str, last: Path) -> str:
    """What to do instead, where nothing but the number of epochs differs."""
    if not re.fullmatch(r"epochs: \d+ there, \d+ here", changed):
        return ""
    how = f"gfbs_cifar.py --p 0 --checkpoint {last} fine-tunes its network further"
    return f"; no run can be extended, since its learning rates depend on --epochs; {how}"


def read_dict(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if it is missing, damaged, or holds no dict."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def is_whole(path: Path) -> bool:
    """Whether a file exists and, if a checkpoint, is not cut off: its index is at its end."""
    return path.is_file() and (path.suffix != ".pth" or zipfile.is_zipfile(path))


def find_last(asked: RunSettings, config: Config) -> tuple[Path | None, Checkpoint | None]:
    """The checkpoint to continue, with its path: the one asked for, or else the newest that loads.

    None if there is no file. Raises InputError if none can be continued, or if settings differ.
    """
    own = [asked.folder / "last.pth", asked.folder / PREVIOUS]
    paths = [asked.checkpoint] if asked.checkpoint else [path for path in own if path.exists()]
    for path in paths:
        try:
            last = load_checkpoint(path, asked.net)
            if not {"training", "config"} <= last.meta.keys():
                raise InputError(f"{path}: holds no optimiser to continue with; name a last.pth")
            if "record" not in last.meta["training"]:
                how = "has to finish it; or start it again with --overwrite"
                raise InputError(f"{path}: an earlier version began this run and {how}")
        except InputError as error:
            if path == paths[-1]:
                raise
            print(f"{error}; going on from the one before", file=sys.stderr)
            continue
        if changed := differences(last.meta["config"], config):
            what = f"that run has another configuration ({changed})"
            raise InputError(f"--resume: {what}{_extending(changed, path)}")
        return path, last
    print("nothing to resume from: starting afresh")
    return None, None


def differences(earlier: Config, now: Config) -> str:
    """What differs between two configurations, in words; empty if nothing does.

    A flag that one of them lacks is as in ``BEFORE``, or off. Data are compared if both name some.
    """

    def value(config: Config, name: str) -> str:
        found = config.get(name, BEFORE.get(name))
        return json.dumps(None if found is False else found)

    names = {*earlier, *now} - ({"classes", "data"} - (earlier.keys() & now.keys()))
    return ", ".join(
        f"{name}: {earlier.get(name)} there, {now.get(name)} here"
        + (f"; see {EARLIER[name]}" if name in EARLIER else "")
        for name in sorted(names)
        if value(earlier, name) != value(now, name)
    )


def locked(folder: Path) -> AbstractContextManager:
    """Take the kernel's lock on the file ``lock`` in a folder; it ends with context or process.

    The file names its last owner. It is never removed: without a lock on it, it blocks nobody.
    Raises InputError, with the owner's name, if another process holds the lock.
    """
    lock = FileLock(folder / "lock", fallback_to_soft=False, on_acquired=_sign)
    try:
        return lock.acquire(timeout=PATIENCE)
    except Timeout:
        owner = "another process"
        with suppress(OSError, ValueError):  # the owner has not written its name yet
            owner = "process {pid} on {host}".format(**json.loads(Path(lock.lock_file).read_text()))
        how = "wait for it, or choose another --output"
        raise InputError(f"{folder} is in use by {owner}; {how}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        why = f"is on a file system without locks ({error.strerror})"
        raise InputError(f"{folder} {why}; choose another --output") from error


def _sign(handle: int) -> None:
    os.truncate(handle, 0)
    os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
