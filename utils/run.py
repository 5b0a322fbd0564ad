"""The folder of one run: its configuration, log, checkpoints, results and TensorBoard files."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torchvision

from models import GatedModel
from utils.board import Board
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.cli import program, python
from utils.distributed import Runtime
from utils.errors import InputError, Interrupted, RunError
from utils.files import remove_leftovers, write_atomically, write_json, write_text
from utils.finetune import Epoch
from utils.lock import FolderLock
from utils.pruning import PruningPlan
from utils.resume import (
    PREVIOUS,
    RESULTS,
    check_same_run,
    existing_run,
    find_last,
    load_resumable,
)
from utils.signals import Signals


class Run:
    """Everything a run writes goes through here; no other experiment is written over.

    The folder belongs to this process until it leaves the ``with`` block. Signals wait where
    ``signals.deferred`` says so, and stop the run at once elsewhere.

    Of several ranks only rank 0 writes; on the others all methods do nothing.

    Args:
        folder: of checkpoints and results, made on demand.
        logdir: of TensorBoard files.
        config: what makes the experiment what it is; another one in the same folder is refused.
        runtime: which rank this is.
        net: name of the network.
        resume: continue the run that the folder holds, if any.
        overwrite: replace whatever run it holds instead.
        checkpoint: continue this last.pth instead, which may be in another folder.

    Attributes:
        last: the checkpoint that this goes on from, with the log and the TensorBoard files; None at
            the start. Rank 0 chooses it, and all ranks load the same file.

    Raises InputError, on every rank, for a folder that holds another experiment, with what differs,
    or that cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        logdir: Path,
        config: Mapping[str, Any],
        runtime: Runtime,
        *,
        net: str,
        resume: bool = False,
        overwrite: bool = False,
        checkpoint: Path | None = None,
    ):
        self.folder, self.config, self.writes = folder, dict(config), runtime.is_main
        self.began = time.perf_counter()
        self.signals = Signals()
        self.board, self._log = Board(), None
        self.only_now = ""  # a flag of the command line that is not to be resumed with
        self._saved = False
        self.last: Checkpoint | None = None
        path = runtime.on_main(lambda: self._open(logdir, net, resume, overwrite, checkpoint))
        if path and self.last is None:
            self.last = load_resumable(path, net)
        earlier = self.last.meta["training"] if self.last else {}
        self._seconds_before = earlier.get("seconds", 0.0)

    def _open(
        self, logdir: Path, net: str, resume: bool, overwrite: bool, checkpoint: Path | None
    ) -> Path | None:
        """Take the folder, and return the checkpoint to continue from, if any."""
        with _writable(self.folder, "--output"):
            self._lock = FolderLock(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        try:
            # Looked at before, but another process may have had the folder in between.
            resume = resume or checkpoint is not None
            if existing_run(self.folder, self.config, dict, resume=resume, overwrite=overwrite):
                raise InputError(f"{self.folder}: another process has just finished this run")
            if checkpoint:
                found = checkpoint, load_resumable(checkpoint, net)
            else:
                found = find_last(self.folder, net) if resume else None
            path, last = found or (None, None)
            self.last = check_same_run(last, self.config) if last else None
            self._open_files(logdir, overwrite, self.last)
        except BaseException:
            self._close()
            raise
        return path

    def _open_files(self, logdir: Path, replace: bool, last: Checkpoint | None) -> None:
        with _writable(self.folder, "--output"):
            self._log = (self.folder / "log.txt").open("a", encoding="utf-8")
        with _writable(logdir, "--logdir"):
            done = len(last.meta["training"]["history"]) if last else -1
            self.board = Board(logdir, done + 1, self.log)
        with _writable(self.folder, "--output"):
            for name in RESULTS if replace else ():
                (self.folder / name).unlink(missing_ok=True)
            remove_leftovers(self.folder)
            write_json(self.folder / "config.json", self.config)
            if not last:
                self._log.truncate(0)

    def seconds(self) -> float:
        """How long the run has taken so far: earlier legs up to their last checkpoint, and this."""
        return self._seconds_before + time.perf_counter() - self.began

    def __enter__(self) -> Run:
        self.signals.install()
        try:
            self.log(f"$ {command_line()}")
            self.board.draw_config(self.config)
        except BaseException:
            self.__exit__(None, None)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        self.signals.restore()
        if self.writes:
            self._close()
        if isinstance(error, Interrupted):
            error.resume_with = self._resume_line()

    def _resume_line(self) -> str:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            without = f" without {self.only_now}" if self.only_now else ""
            return f"the same torchrun command{without} and --resume"
        words, rest = [], iter(sys.argv[1:])
        for word in rest:
            if word == self.only_now:
                next(rest, None)  # its value
            elif (
                word not in ("--resume", "-r", "--overwrite")
                and word.partition("=")[0] != self.only_now
            ):
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

    def log_epoch(self, epoch: Epoch, epochs: int, seconds_left: float, tested_on: str) -> None:
        """One line about an epoch."""
        self.log(
            f"epoch {epoch.number}/{epochs}  lr {epoch.lr:.4g}"
            f"  train {epoch.train.loss:.3f} {epoch.train.accuracy:.2f} %"
            f"  {tested_on} {epoch.test.loss:.3f} {epoch.test.accuracy:.2f} %"
            f"  {epoch.images_per_second:.0f} images/s  {format_seconds(seconds_left)} left"
        )

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

    def save_last(self, model: GatedModel, **meta: Any) -> None:
        """Write last.pth, and keep the one before, if this run wrote it, as last_previous.pth."""
        if self.writes:
            previous = self.folder / PREVIOUS if self._saved else None
            meta |= {"config": self.config}
            with self._writing():
                save_checkpoint(self.folder / "last.pth", model, previous=previous, **meta)
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

    def save_result(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write result.json: the result, and what it takes to get it again."""
        record = {
            **result,
            "command": command_line(),
            "config": self.config,
            "versions": versions(),
            "wall_time_seconds": round(self.seconds(), 1),
        }
        if self.writes:
            with self._writing():
                write_json(self.folder / "result.json", record)
        self.board.draw_result(self.config, result)
        self.log(f"took {format_seconds(record['wall_time_seconds'])}; results in {self.folder}")
        return record


@contextmanager
def _writable(place: Path, flag: str) -> Iterator[None]:
    """Turn what goes wrong in writing below ``place`` into a line that names it and its flag."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{place}: cannot be written ({error}); see {flag}") from error


def command_line() -> str:
    """The command that started this process."""
    return shlex.join(["python", *program(), *sys.argv[1:]])


def versions() -> dict[str, str | int | None]:
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def commit() -> str | None:
    """The commit of this repository; None outside git, or without git."""
    git = ["git", f"--git-dir={Path(__file__).parents[1] / '.git'}"]
    with suppress(OSError, subprocess.CalledProcessError):
        command = [*git, "rev-parse", "--short", "HEAD"]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    return None


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
