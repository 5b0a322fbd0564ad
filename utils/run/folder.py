"""The folder of one run: its configuration, log, checkpoints and results."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import GatedModel
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.cli.parser import program, python
from utils.data.listing import class_digest
from utils.distributed import Runtime
from utils.errors import InputError, Interrupted, RunError
from utils.files import remove_leftovers, write_atomically, write_json, write_text
from utils.pruning import PruningPlan
from utils.run.existing import (
    PREVIOUS,
    RESULTS,
    check_same_run,
    existing_run,
    find_last,
    load_resumable,
)
from utils.run.lock import FolderLock
from utils.run.provenance import command_line, versions
from utils.run.record import Record
from utils.run.signals import Signals
from utils.run.state import RunState, place_of
from utils.run.tensorboard import TensorBoardLog


@dataclass(frozen=True)
class RunSettings:
    """Where a run goes, and what is to happen with what is there.

    Attributes:
        folder, logdir: of results, and of TensorBoard files.
        net: name of the network.
        config: what makes the experiment what it is.
        resume, overwrite: whether to continue the run that is there, or to replace any.
        checkpoint_every: write last.pth after so many batches, too.
        checkpoint: continue this last.pth, which may be in another folder.
    """

    folder: Path
    logdir: Path
    net: str
    config: dict[str, Any]
    resume: bool = False
    overwrite: bool = False
    checkpoint_every: int | None = None
    checkpoint: Path | None = None


class RunFolder:
    """Everything a run writes goes through here; no other experiment is written over.

    The folder belongs to this process within ``with folder.opened(...)``. Signals wait where
    ``signals.deferred`` says so, and stop the run at once elsewhere.

    Of several ranks only rank 0 writes; on the others the methods that write do nothing.

    Args:
        settings: where it goes, and what is to happen with what is there.
        runtime: which rank this is.
        identity: tells the data apart, as part of the configuration; only rank 0 asks for it.
    """

    def __init__(
        self,
        settings: RunSettings,
        runtime: Runtime,
        identity: Callable[[], Mapping[str, Any]] = dict,
    ):
        self.identity = identity
        self.settings, self.folder, self.runtime = settings, settings.folder, runtime
        self.config, self.writes = dict(settings.config), runtime.is_main
        self.signals, self.board = Signals(), TensorBoardLog()
        self._log, self._lock, self._saved = None, None, False
        self._last: Checkpoint | None = None
        self._seconds_before, self._began = 0.0, time.perf_counter()

    def finished(self) -> dict[str, Any] | None:
        """The result of this very run where it is done already; None where there is work to do.

        Raises InputError, on every rank, for a folder that holds another experiment, with what
        differs, and for an unfinished run that nobody has asked to continue.
        """
        asked = self.settings
        resume = asked.resume or asked.checkpoint is not None
        return self.runtime.on_main(lambda: existing_run(
            self.folder, self.config, self.identity, resume=resume, overwrite=asked.overwrite
        ))  # fmt: skip

    @contextmanager
    def opened(self, classes: Sequence[str]) -> Iterator[RunFolder]:
        """Take the folder for this process; the classes belong to its configuration, too.

        Raises InputError, on every rank, where another process has the folder, or where it cannot
        be written.
        """
        self.config["classes"] = class_digest(classes)
        self.config |= self.runtime.on_main(self.identity)
        path = self.runtime.on_main(self._open)
        if path and self._last is None:  # rank 0 has chosen; all ranks load the same file
            self._last = load_resumable(path, self.settings.net)
        self.signals.install()
        try:
            self.log(f"$ {command_line()}")
            self.board.draw_config(self.config)
            yield self
        except Interrupted as stop:
            stop.resume_with = self._resume_line()
            raise
        finally:
            self.signals.restore()
            if self.writes:
                self._close()

    def _open(self) -> Path | None:
        """Take the folder, and return the checkpoint to continue from, if any."""
        asked, found = self.settings, None
        if asked.checkpoint:
            found = asked.checkpoint, load_resumable(asked.checkpoint, asked.net)
        with _writable(self.folder, "--output"):
            self._lock = FolderLock(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        try:
            # Looked at before, but another process may have had the folder in between.
            resume = asked.resume or asked.checkpoint is not None
            again = {"resume": resume, "overwrite": asked.overwrite}
            if existing_run(self.folder, self.config, dict, **again):
                raise InputError(f"{self.folder}: another process has just finished this run")
            if asked.resume and not found:
                found = find_last(self.folder, asked.net)
            path, last = found or (None, None)
            self._last = check_same_run(last, self.config) if last else None
            self._open_files()
        except BaseException:
            self._close()
            raise
        return path

    def _open_files(self) -> None:
        with _writable(self.folder, "--output"):
            self._log = (self.folder / "log.txt").open("a", encoding="utf-8")
        with _writable(self.settings.logdir, "--logdir"):
            history = self._last.meta["training"]["record"]["history"] if self._last else None
            first_step = 0 if history is None else len(history) + 1
            self.board = TensorBoardLog(self.settings.logdir, first_step, self.log)
        with _writable(self.folder, "--output"):
            for name in RESULTS if self.settings.overwrite else ():
                (self.folder / name).unlink(missing_ok=True)
            remove_leftovers(self.folder)
            write_json(self.folder / "config.json", self.config)
            if not self._last:
                self._log.truncate(0)

    def resumed(self) -> RunState | None:
        """The state to continue from; None at the start."""
        if self._last is None:
            return None
        state = RunState.from_checkpoint(self._last)
        self._seconds_before = state.seconds
        saved = self._last.meta["training"]
        batches = f" and {saved['batch']} batches" if saved["batch"] else ""
        self.log(f"continues after epoch {saved['epoch']}{batches} of round {state.round + 1}")
        for what, now in place_of(self.runtime).items():
            before = saved["place"].get(what, now)
            if before != now:
                self.log(
                    f"warning: {before} {what} began this run and {now} continue it;"
                    " it will not end with the same bits"
                )
        return state

    def seconds(self) -> float:
        """How long the run has taken so far: earlier legs up to their last checkpoint, and this."""
        return self._seconds_before + time.perf_counter() - self._began

    def _resume_line(self) -> str:
        """The command that continues this run; without the checkpoint that it came from."""
        only_now = "--checkpoint" if self.settings.checkpoint else ""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            without = f" without {only_now}" if only_now else ""
            return f"the same torchrun command{without} and --resume"
        words, rest = [], iter(sys.argv[1:])
        for word in rest:
            if word == only_now:
                next(rest, None)  # its value
            elif word.partition("=")[0] not in ("--resume", "-r", "--overwrite", only_now):
                words.append(word)
        return shlex.join([python(), *program(), *words, "--resume"])

    def _close(self) -> None:
        self.board.close()
        if self._log is not None:
            with suppress(OSError):  # a full disk has been told of already
                self._log.close()
        self._lock.release()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What cannot be written while the run goes on ends it, in one line."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.folder} cannot be written any more ({error}); the checkpoints that are"
                " there are whole: make room and continue with --resume"
            ) from error

    def log(self, text: str) -> None:
        """Print, and keep in log.txt."""
        if self.writes:
            with suppress(OSError):  # nobody reads any more
                print(text, flush=True)
            with self._writing():
                self._log.write(text + "\n")
                self._log.flush()

    def save_plan(self, plan: PruningPlan) -> None:
        """Write plan.json."""
        if self.writes:
            with self._writing():
                write_text(self.folder / "plan.json", plan.to_json())

    def save(self, name: str, model: GatedModel, **meta: Any) -> None:
        """Write a checkpoint of the bare model into the folder."""
        if self.writes:
            with self._writing():
                save_checkpoint(self.folder / name, model, config=self.config, **meta)

    def save_last(self, state: RunState, training: Mapping[str, Any], **meta: Any) -> None:
        """Write last.pth; ``training`` is the state of ``fit``.

        The file before, if this process wrote it, stays as last_previous.pth.
        """
        if self.writes:
            previous = self.folder / PREVIOUS if self._saved else None
            meta |= {"config": self.config}
            meta["training"] = state.to_save(training, self.runtime, self.seconds())
            with self._writing():
                save_checkpoint(self.folder / "last.pth", state.model, previous=previous, **meta)
            self._saved = True

    def check_space(self, model: GatedModel) -> None:
        """Raise InputError where the disk has no room for the checkpoints of a run."""
        if self.writes:
            # Weights and momentum in last.pth, in the one before and in a temporary file.
            need = 3 * 2 * sum(tensor.nbytes for tensor in model.state_dict().values())
            free = shutil.disk_usage(self.folder).free
            if free < need:
                raise InputError(
                    f"{self.folder}: {free / 1e6:.0f} MB are free and the checkpoints need"
                    f" {need / 1e6:.0f}; make room, or see --output"
                )

    def adopt(self, other: Path, name: str) -> None:
        """Take along a file of the folder that a run comes from, in or beside ``other``."""
        source = (other if other.is_dir() else other.parent) / name
        if self.writes and source.is_file() and not (self.folder / name).exists():
            with self._writing():
                write_atomically(self.folder / name, lambda file: file.write(source.read_bytes()))

    def finish(self, record: Record) -> dict[str, Any]:
        """Complete the record, write it as result.json, and return what is in there."""
        record.command, record.config, record.versions = command_line(), self.config, versions()
        record.wall_time_seconds = round(self.seconds(), 1)
        result = record.as_json()
        if self.writes:
            with self._writing():
                write_json(self.folder / "result.json", result)
        self.board.draw_result(record)
        self.log(f"took {format_seconds(record.wall_time_seconds)}; results in {self.folder}")
        return result


@contextmanager
def _writable(place: Path, flag: str) -> Iterator[None]:
    """Turn what goes wrong in writing below ``place`` into a line that names it and its flag."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{place}: cannot be written ({error}); see {flag}") from error


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
