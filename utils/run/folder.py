"""The folder of one run, and the callback that fills it while the network trains."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn

from utils.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.data.batches import Data
from utils.data.listing import class_digest
from utils.distributed import Runtime
from utils.errors import InputError, Interrupted, RunError
from utils.files import remove_leftovers, writable, write_bytes, write_json, write_text
from utils.finetune import Callback, Epoch
from utils.pruning import PruningPlan
from utils.run import existing
from utils.run.existing import RunSettings, find_last, find_run, locked
from utils.run.launch import STARTED
from utils.run.provenance import command_line, resume_line, versions
from utils.run.record import Record
from utils.run.rounds import Round, RunState, place_of
from utils.run.signals import SIGNALS
from utils.run.tensorboard import TensorBoardLog


class RunFolder:
    """Writes everything that a run writes, and never over another experiment.

    This process owns the folder within ``with folder.opened(...)``. There, a signal stops the run
    at once, except in ``signals.deferred``. Only rank 0 writes, and only rank 0 calls ``identity``,
    which tells data apart in the configuration.
    """

    def __init__(self, settings: RunSettings, runtime: Runtime, identity: existing.Identity = dict):
        self.settings, self.runtime, self.identity = settings, runtime, identity
        self.folder, self.config = settings.folder, dict(settings.config)
        self.signals, self.board, self._opened = SIGNALS, TensorBoardLog(), ExitStack()
        self._log, self._saved = None, False
        self._last: Checkpoint | None = None
        self._began = time.perf_counter()

    def finished(self) -> dict[str, Any] | None:
        """What ``find_run`` returns, or raises, on every rank."""
        return self.runtime.on_main(lambda: find_run(self.settings, self.config, self.identity))

    @contextmanager
    def opened(self, classes: Sequence[str]) -> Iterator[RunFolder]:
        """Take the folder for this process; the classes become part of the configuration.

        Raises InputError, on every rank, if another process has it or if it cannot be written.
        """
        self.config["classes"] = class_digest(classes)
        self.config |= self.runtime.on_main(self.identity)
        repeats = self.settings.repeats
        earlier = existing.read_dict(repeats) if repeats else None  # before it is overwritten
        with self._opened:
            path = self.runtime.on_main(self._open)
            if path and self._last is None:  # another rank than 0: load the file that rank 0 chose
                self._last = load_checkpoint(path, self.settings.net)
            self._opened.enter_context(self.signals.handled())
            self.log(f"$ {command_line()}")
            if how := os.environ.get(STARTED):
                self.log(how)
            if repeats:
                changed = existing.differences(earlier or {}, self.config)
                self.log(f"repeats {repeats}" + (f", but for {changed}" if changed else ""))
            self.board.draw_config(self.config)
            try:
                yield self
            except Interrupted as stop:
                only_now = "--checkpoint" if self.settings.checkpoint else ""
                stop.resume_with = resume_line(only_now, self.runtime.world_size)
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
            first = len(self._last.meta["training"]["record"]["history"]) + 1 if self._last else 0
            self.board = TensorBoardLog(asked.logdir, first, self.log)
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
        state, saved = RunState.from_checkpoint(self._last), self._last.meta["training"]
        self._began -= saved["seconds"]  # the time that earlier processes spent counts, too
        batches = f" and {saved['batch']} batches" if saved["batch"] else ""
        self.log(f"continues after epoch {saved['epoch']}{batches} of round {state.round + 1}")
        for what, now in place_of(self.runtime).items():
            before = saved["place"].get(what, now)
            if before != now:
                why = "it will not end with the same bits"
                self.log(f"warning: {before} {what} began this run and {now} continue it; {why}")
        if self.settings.checkpoint:  # it brings the model_best.pth that lies beside it
            best = self.settings.checkpoint.with_name("model_best.pth")
            own = self.folder / best.name
            if best.is_file() and not own.exists():
                self._write(write_bytes, own, best.read_bytes())
        return state

    def _write(self, write: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Call ``write`` on rank 0. If it cannot write, end the run with one line."""
        if not self.runtime.is_main:
            return
        try:
            write(*args, **options)
        except OSError as error:
            how = "the checkpoints that are there are whole: make room and continue with --resume"
            raise RunError(f"{self.folder} cannot be written any more ({error}); {how}") from error

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
        """Write last.pth, with the state of ``fit``, and keep the one that we wrote before it."""
        meta["previous"] = self.folder / existing.PREVIOUS if self._saved else None
        seconds = time.perf_counter() - self._began
        meta["training"] = state.to_save(training, self.runtime, seconds)
        self.save("last.pth", state.model, **meta)
        self._saved = True

    def check_space(self, model: nn.Module) -> None:
        """Raise InputError if the disk has no room for the checkpoints of a run."""
        # Three files (last.pth, last_previous.pth and a temporary one) hold weights, momentum and,
        # with --ema, a second set of weights.
        tensors = 3 if self.config.get("ema") else 2
        need = 3 * tensors * sum(tensor.nbytes for tensor in model.state_dict().values())
        free = self.runtime.on_main(lambda: shutil.disk_usage(self.folder).free)
        if free < need:
            short = f"{free / 1e6:.0f} MB are free and the checkpoints need {need / 1e6:.0f}"
            raise InputError(f"{self.folder}: {short}; make room, or see --output")

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


class RunCallback(Callback):
    """Records one round of training, saves its state and its best network, and obeys signals."""

    def __init__(self, run: RunFolder, state: RunState, data: Data, rounds: Sequence[Round]):
        self.run, self.state, self.runtime = run, state, run.runtime
        self.meta, self.chosen_on = data.about.metadata(), data.chosen_on
        self.epochs = rounds[state.round].recipe.epochs
        self.keep_best = state.round == len(rounds) - 1  # only its network has every cut
        shrunk = state.record.shrunk
        train = (r for r in rounds if r.groups is None or shrunk & set(r.groups))
        self.total_epochs = sum(r.recipe.epochs for r in train)  # to estimate the time left
        self.began, self.done_before = time.perf_counter(), len(state.record.history)

    def after_batch(self, batch: int, training: Callable[[], dict[str, Any]]) -> None:
        every = self.run.settings.checkpoint_every
        signum = self.runtime.most(self.run.signals.received)  # so all ranks stop here
        if signum or (every and batch % every == 0):
            self._save_last(training())
        if signum:
            raise Interrupted(signum, f"stopped after batch {batch}")

    def while_evaluating(self, training: Callable[[], dict[str, Any]]) -> None:
        if self.run.signals.received:
            self._save_last(training())
            raise Interrupted(self.run.signals.received, "stopped in the evaluation")

    def after_epoch(self, epoch: Epoch, training: Callable[[], dict[str, Any]]) -> None:
        history = self.state.record.history
        which = {"round": self.state.round + 1, "tested_on": self.chosen_on}
        history.append({**asdict(epoch), **which})
        done = len(history)
        pace = (time.perf_counter() - self.began) / (done - self.done_before)
        left = timedelta(seconds=round(pace * (self.total_epochs - done)))
        self.run.log(
            f"epoch {epoch.number}/{self.epochs}  lr {epoch.lr:.4g}"
            f"  train {epoch.train.loss:.3f} {epoch.train.accuracy:.2f} %"
            f"  {self.chosen_on} {epoch.test.loss:.3f} {epoch.test.accuracy:.2f} %"
            f"  {epoch.images_per_second:.0f} images/s  {left} left"
        )
        if self.keep_best and self.state.best == epoch:
            self._save_best(epoch)
        self._save_last(training())
        self.run.board.draw_epoch(epoch, done, self.chosen_on)
        if signum := self.runtime.most(self.run.signals.received):
            raise Interrupted(signum, f"stopped after epoch {epoch.number}")

    def restore_files(self) -> None:
        """Write missing files of a resumed run again where last.pth suffices, and name the others.

        Raises InputError without the model_best.pth of a run with a holdout: its result needs it.
        """
        run, state, lost = self.run, self.state, []
        if state.training is None:  # not resumed
            return
        if state.record.rounds:
            if not existing.is_whole(run.folder / "plan.json"):
                run.save_plan(state.plan)
            if not existing.is_whole(run.folder / "pruned.pth"):
                lost.append("pruned.pth")
        best = run.folder / "model_best.pth"
        if self.keep_best and state.epochs and not existing.is_whole(best):
            if state.best == state.epochs[-1] and not state.training["batch"]:
                self._save_best(state.best)
            elif self.chosen_on == "holdout":
                raise InputError(f"{best} is missing; put it back, or start again with --overwrite")
            else:
                lost.append(best.name)
        if lost:
            run.log(f"warning: {' and '.join(lost)} cannot be written again: lost")

    def _save_best(self, epoch: Epoch) -> None:
        """Write model_best.pth after this epoch."""
        about = {"accuracy": epoch.test.accuracy, "tested_on": self.chosen_on}
        about |= {"epoch": epoch.number, "chosen": f"best on {self.chosen_on}"}
        self.run.save("model_best.pth", self.state.model, **self.meta, **about)

    def _save_last(self, training: dict[str, Any]) -> None:
        epochs = self.state.epochs
        about = {"accuracy": epochs[-1].test.accuracy if epochs else None}
        about |= {"tested_on": self.chosen_on, "epoch": training["epoch"]}
        self.run.save_last(self.state, training, **self.meta, **about)
