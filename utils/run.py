"""The folder of one run: its configuration, log, checkpoints, results and TensorBoard files."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from models.gate import GatedModel
from utils.checkpoint import save_checkpoint
from utils.distributed import Runtime
from utils.errors import InputError
from utils.files import write_atomically, write_json, write_text
from utils.finetune import Epoch
from utils.pruning import PruningPlan

RESULTS = ("plan.json", "pruned.pth", "model_best.pth", "last.pth", "result.json")


class Run:
    """Everything a run writes goes through here; no other experiment is written over.

    Of several ranks only rank 0 writes; on the others all methods do nothing.

    Args:
        folder: of checkpoints and results, made on demand.
        logdir: of TensorBoard files.
        config: what makes the experiment what it is; another one in the same folder is refused.
        runtime: which rank this is.
        overwrite: replace another experiment instead.
        resume: go on with the log and the TensorBoard files that are there.

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
        overwrite: bool = False,
        resume: bool = False,
    ):
        self.folder, self.config, self.writes = folder, dict(config), runtime.is_main
        self.began = time.perf_counter()
        runtime.on_main(lambda: self._open(logdir, overwrite, resume))

    def _open(self, logdir: Path, overwrite: bool, resume: bool) -> None:
        changed = self._another_experiment()
        if changed and not overwrite:
            raise InputError(f"{changed}; --overwrite replaces it, another --output keeps both")
        with _writable(self.folder, "--output"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._log = (self.folder / "log.txt").open("a", encoding="utf-8")
        with _writable(logdir, "--logdir"):
            if not resume:
                for events in logdir.glob("events.out.tfevents.*"):
                    events.unlink()
            self.board = SummaryWriter(str(logdir))
        with _writable(self.folder, "--output"):
            if changed:
                for name in RESULTS:
                    (self.folder / name).unlink(missing_ok=True)
            write_json(self.folder / "config.json", self.config)
            if not resume:
                self._log.truncate(0)

    def _another_experiment(self) -> str:
        """What is in the folder and why it is not this experiment; empty where it may go on."""
        present = [name for name in RESULTS if (self.folder / name).exists()]
        if not present:
            return ""
        try:
            earlier = json.loads((self.folder / "config.json").read_text())
            changed = differences(earlier, self.config)
        except (OSError, ValueError, TypeError, AttributeError):
            return f"{self.folder} holds {', '.join(present)} of an unknown configuration"
        return f"{self.folder} holds a run of another configuration ({changed})" if changed else ""

    def __enter__(self) -> Run:
        self.log(f"$ {command_line()}")
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes:
            self.board.close()
            self._log.close()

    def log(self, text: str) -> None:
        """Print, and keep in log.txt."""
        if self.writes:
            print(text, flush=True)
            self._log.write(text + "\n")
            self._log.flush()

    def log_epoch(self, epoch: Epoch, epochs: int, step: int, seconds_left: float) -> None:
        """One line, and TensorBoard scalars at ``step``, the epochs since the run began."""
        if not self.writes:
            return
        self.log(
            f"epoch {epoch.number}/{epochs}  lr {epoch.lr:.4g}"
            f"  train {epoch.train.loss:.3f} {epoch.train.accuracy:.2f} %"
            f"  test {epoch.test.loss:.3f} {epoch.test.accuracy:.2f} %"
            f"  {epoch.images_per_second:.0f} images/s  {format_seconds(seconds_left)} left"
        )
        for part, metrics in (("train", epoch.train), ("test", epoch.test)):
            self.board.add_scalar(f"loss/{part}", metrics.loss, step)
            self.board.add_scalar(f"accuracy/{part}", metrics.accuracy, step)
        self.board.add_scalar("lr", epoch.lr, step)
        self.board.add_scalar("images_per_second", epoch.images_per_second, step)

    def log_saliency(self, saliency: Mapping[str, Tensor]) -> None:
        """A TensorBoard histogram of every group's scores."""
        for name, scores in saliency.items() if self.writes else ():
            self.board.add_histogram(f"saliency/{name}", scores.detach().cpu(), 0)

    def save_plan(self, plan: PruningPlan) -> None:
        """Write plan.json."""
        if self.writes:
            write_text(self.folder / "plan.json", plan.to_json())

    def save(self, name: str, model: GatedModel, **meta: Any) -> None:
        """Write a checkpoint of the bare model into the folder."""
        if self.writes:
            save_checkpoint(self.folder / name, model, config=self.config, **meta)

    def adopt(self, other: Path, name: str) -> None:
        """Take a file of a run that goes on here along from its folder, unless this is it."""
        if self.writes and not (self.folder / name).exists():
            content = (other / name).read_bytes()
            write_atomically(self.folder / name, lambda file: file.write(content))

    def save_result(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write result.json: the result, and what it takes to get it again."""
        record = {
            **result,
            "command": command_line(),
            "config": self.config,
            "versions": versions(),
            "wall_time_seconds": round(time.perf_counter() - self.began, 1),
        }
        if self.writes:
            write_json(self.folder / "result.json", record)
        self.log(f"took {format_seconds(record['wall_time_seconds'])}; results in {self.folder}")
        return record


@contextmanager
def _writable(place: Path, flag: str) -> Iterator[None]:
    """Turn what goes wrong in writing below ``place`` into a line that names it and its flag."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{place}: cannot be written ({error}); see {flag}") from error


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two configurations, in words; empty where nothing does."""
    earlier, now = json.loads(json.dumps(earlier)), json.loads(json.dumps(now))  # tuples are lists
    names = [name for name in sorted({*earlier, *now}) if earlier.get(name) != now.get(name)]
    return ", ".join(f"{name}: {earlier.get(name)} there, {now.get(name)} here" for name in names)


def command_line() -> str:
    """The command that started this process."""
    return shlex.join(["python", *sys.argv])


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
