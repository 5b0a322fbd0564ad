"""The folder of one run: its configuration, log, checkpoints and results."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn

from utils.checkpoint import Checkpoint, save_checkpoint
from utils.data.listing import class_digest
from utils.distributed import Runtime
from utils.errors import InputError, Interrupted, RunError
from utils.files import remove_leftovers, writable, write_bytes, write_json, write_text
from utils.pruning import PruningPlan
from utils.run import existing, launch
from utils.run.existing import RunSettings, find_last, find_run, load_resumable
from utils.run.lock import locked
from utils.run.provenance import command_line, program, python, versions
from utils.run.record import Record
from utils.run.signals import SIGNALS
from utils.run.state import RunState, place_of
from utils.run.tensorboard import TensorBoardLog


class RunFolder:
    """Writes everything that a run writes, and never over another experiment.

    This process owns the folder within ``with folder.opened(...)``. There, a signal stops the run
    at once, except in ``signals.deferred``. Only rank 0 writes; on other ranks the methods that
    write do nothing. Rank 0 alone calls ``identity``, which tells data apart in the configuration.
    """

    def __init__(self, settings: RunSettings, runtime: Runtime, identity: existing.Identity = dict):
        self.settings, self.folder, self.identity = settings, settings.folder, identity
        self.config, self.runtime = dict(settings.config), runtime
        self.signals, self.board, self._opened = SIGNALS, TensorBoardLog(), ExitStack()
        self._log, self._saved = None, False
        self._last: Checkpoint | None = None
        self._earlier = settings.repeats and existing.read_dict(settings.repeats) or {}
        self._began = time.perf_counter()

    def finished(self) -> dict[str, Any] | None:
        """What ``find_run`` returns, or raises, on every rank."""
        asked = self.settings
        return self.runtime.on_main(lambda: find_run(asked, self.config, self.identity))

    @contextmanager
    def opened(self, classes: Sequence[str]) -> Iterator[RunFolder]:
        """Take the folder for this process; the classes become part of the configuration.

        Raises InputError, on every rank, if another process has the folder or if it cannot be
        written.
        """
        self.config["classes"] = class_digest(classes)
        self.config |= self.runtime.on_main(self.identity)
        with self._opened:
            path = self.runtime.on_main(self._open)
            if path and self._last is None:  # another rank than 0: load the file that rank 0 chose
                self._last = load_resumable(path, self.settings.net)
            self._opened.enter_context(self.signals.handled())
            self.log(f"$ {command_line()}")
            if how := os.environ.get(launch.STARTED):
                self.log(how)
            if path := self.settings.repeats:
                changed = existing.differences(self._earlier, self.config)
                self.log(f"repeats {path}{changed and f', but for {changed}'}")
            self.board.draw_config(self.config)
            try:
                yield self
            except Interrupted as stop:
                stop.resume_with = self._resume_line()
                raise

    def _open(self) -> Path | None:
        """Take the folder, and return the checkpoint to continue from, if any."""
        asked, path, found = self.settings, None, None
        if asked.checkpoint:  # a bad one leaves no trace in the folder
            found = find_last(asked, self.config)
        with writable(self.folder, "--output"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._opened.enter_context(locked(self.folder))
        if find_run(asked, self.config, dict):  # ``finished`` looked, but did not have the lock
            raise InputError(f"{self.folder}: another process has just finished this run")
        if asked.resume:
            path, self._last = found or find_last(asked, self.config)
        with writable(asked.logdir, "--logdir"):
            done = self._last and len(self._last.meta["training"]["record"]["history"])
            self.board = TensorBoardLog(asked.logdir, 0 if done is None else done + 1, self.log)
            self._opened.callback(self.board.close)
        with writable(self.folder, "--output"):
            # Without a buffer: closing it writes nothing more to a full disk.
            log = (self.folder / "log.txt").open("ab" if self._last else "wb", buffering=0)
            self._log = self._opened.enter_context(log)
            for name in existing.RESULTS if asked.overwrite else ():
                (self.folder / name).unlink(missing_ok=True)
            remove_leftovers(self.folder)
            write_json(self.folder / "config.json", self.config)
        return path

    def resumed(self) -> RunState | None:
        """The state to continue from; None if the run starts."""
        if self._last is None:
            return None
        state = RunState.from_checkpoint(self._last)
        self._began -= state.seconds  # the time that earlier processes spent counts, too
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

    def _resume_line(self) -> str:
        """The command that continues this run, from this folder."""
        only_now = "--checkpoint" if self.settings.checkpoint else ""
        if self.runtime.world_size > 1 and launch.ROOT_CAUSE not in os.environ:
            without = f" without {only_now}" if only_now else ""
            return f"the same torchrun command{without} and --resume"
        words, rest = [], iter(sys.argv[1:])
        for word in rest:
            if word == only_now:
                next(rest, None)  # its value
            elif word.partition("=")[0] not in ("--resume", "-r", "--overwrite", only_now):
                words.append(word)
        return shlex.join([python(), *program(), *words, "--resume"])

    def _write(self, write: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Call ``write`` on rank 0. If it cannot write, end the run with one line."""
        if not self.runtime.is_main:
            return
        try:
            write(*args, **options)
        except OSError as error:
            raise RunError(
                f"{self.folder} cannot be written any more ({error}); the checkpoints that are"
                " there are whole: make room and continue with --resume"
            ) from error

    def log(self, text: str) -> None:
        """Print, and keep in log.txt."""
        if self.runtime.is_main:
            with suppress(OSError):  # stdout is a closed pipe
                print(text, flush=True)
        self._write(lambda: self._log.write(f"{text}\n".encode()))

    def save_plan(self, plan: PruningPlan) -> None:
        """Write plan.json."""
        self._write(write_text, self.folder / "plan.json", plan.to_json())

    def save(self, name: str, model: nn.Module, **meta: Any) -> None:
        """Write a checkpoint of the bare model into the folder."""
        self._write(save_checkpoint, self.folder / name, model, config=self.config, **meta)

    def save_last(self, state: RunState, training: Mapping[str, Any], **meta: Any) -> None:
        """Write last.pth; ``training`` is the state of ``fit``.

        The last.pth before it, if this process wrote that, stays as last_previous.pth.
        """
        meta["previous"] = self.folder / existing.PREVIOUS if self._saved else None
        seconds = time.perf_counter() - self._began
        meta["training"] = state.to_save(training, self.runtime, seconds)
        self.save("last.pth", state.model, **meta)
        self._saved = True

    def check_space(self, model: nn.Module) -> None:
        """Raise InputError if the disk has no room for the checkpoints of a run."""
        # Weights, momentum and with --ema other weights, in last.pth, in last_previous.pth and in a
        # temporary file.
        need = (
            3
            * (3 if self.config.get("ema") else 2)
            * sum(tensor.nbytes for tensor in model.state_dict().values())
        )
        if self.runtime.is_main and (free := shutil.disk_usage(self.folder).free) < need:
            raise InputError(
                f"{self.folder}: {free / 1e6:.0f} MB are free and the checkpoints need"
                f" {need / 1e6:.0f}; make room, or see --output"
            )

    def adopt(self, name: str) -> None:
        """Copy a file that lies beside the checkpoint of the settings, unless the run has it."""
        source, target = self.settings.checkpoint.with_name(name), self.folder / name
        if source.is_file() and not target.exists():
            self._write(write_bytes, target, source.read_bytes())

    def finish(self, record: Record) -> dict[str, Any]:
        """Complete the record, write it as result.json, and return its content."""
        record.command, record.config, record.versions = command_line(), self.config, versions()
        record.wall_time_seconds = round(time.perf_counter() - self._began, 1)
        result = record.as_json()
        self._write(write_json, self.folder / "result.json", result)
        self.board.draw_result(record)
        took = timedelta(seconds=round(record.wall_time_seconds))
        self.log(f"took {took}; results in {self.folder}")
        return result
