"""What TensorBoard shows of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from utils.finetune import Epoch
from utils.run.record import Record


class TensorBoardLog:
    """TensorBoard files; a run goes on without them where they cannot be written any more.

    Args:
        logdir: where they go; without it, nothing is drawn.
        first_step: TensorBoard shows nothing of what an earlier run wrote from that step on.
        warn: is told where drawing ends.

    Raises OSError where they cannot be written from the start.
    """

    def __init__(
        self,
        logdir: Path | None = None,
        first_step: int = 0,
        warn: Callable[[str], None] = print,
    ):
        self.writer, self.warn, self._hook = None, warn, threading.excepthook
        if logdir:
            threading.excepthook = self._on_thread_error
            try:
                self.writer = SummaryWriter(str(logdir), purge_step=first_step)
            except OSError:
                self.close()
                raise

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        """No traceback of TensorBoard's own thread: the next drawing raises its error again."""
        ours = type(args.thread).__module__.startswith("tensorboard.")
        if not (ours and isinstance(args.exc_value, OSError)):
            self._hook(args)

    def close(self) -> None:
        if self.writer is not None:
            with suppress(OSError):  # a full disk has been told of already
                self.writer.close()
        threading.excepthook = self._hook

    def draw_epoch(self, epoch: Epoch, step: int, tested_on: str) -> None:
        """Scalars at ``step``, the epochs since the run began."""
        scalars = {"lr": epoch.lr, "images_per_second": epoch.images_per_second}
        for part, metrics in (("train", epoch.train), (tested_on, epoch.test)):
            scalars |= {f"loss/{part}": metrics.loss, f"accuracy/{part}": metrics.accuracy}
        with self._drawing() as board:
            for name, value in scalars.items() if board else ():
                board.add_scalar(name, value, step)

    def draw_saliency(self, saliency: Mapping[str, Tensor], step: int) -> None:
        """A histogram of every group's scores, in a round of pruning."""
        with self._drawing() as board:
            for name, scores in saliency.items() if board else ():
                board.add_histogram(f"saliency/{name}", scores.detach().cpu(), step)

    def draw_surgery(self, record: Record) -> None:
        """The channels that every group keeps after a round, as curves and a table."""
        step = len(record.history)
        rows = ["| group | before | after |", "| --- | --- | --- |"]
        with self._drawing() as board:
            for name, channels in record.channels.items() if board else ():
                board.add_scalar(f"channels/{name}", channels["after"], step)
                rows.append(f"| {name} | {channels['before']} | {channels['after']} |")
            if board:
                board.add_text("channels", "\n".join(rows), step)

    def draw_config(self, config: Mapping[str, Any]) -> None:
        """The configuration as a table."""
        rows = [f"| {name} | {value} |" for name, value in config.items()]
        with self._drawing() as board:
            if board:
                board.add_text(
                    "configuration", "\n".join(["| flag | value |", "| --- | --- |", *rows])
                )

    def draw_result(self, record: Record) -> None:
        """The HPARAMS tab: what was asked for beside what came out."""
        asked = {
            k: v if isinstance(v, (bool, int, float)) else str(v)
            for k, v in record.config.items()
            if v is not None
        }
        metrics = {
            f"result/accuracy/{name}": value
            for name, value in record.accuracy.items()
            if value is not None and name != "best_epoch"
        }
        for name, cost in record.cost.items():
            metrics[f"result/{name}"] = cost["after"] if isinstance(cost, Mapping) else cost
        with self._drawing() as board:
            if board:
                board.flush()  # add_hparams writes a file of its own, which is to be the last
                board.add_hparams(asked, metrics, run_name=".")

    @contextmanager
    def _drawing(self) -> Iterator[SummaryWriter | None]:
        """The board, if there is one; a run goes on without it where it cannot be written."""
        try:
            yield self.writer
        except (OSError, ValueError) as error:  # ValueError: a histogram that it cannot bin
            self.writer = None
            self.warn(f"warning: no more TensorBoard files: they cannot be written ({error})")
