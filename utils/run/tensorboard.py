"""What TensorBoard shows of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from utils.finetune import Epoch
from utils.run.record import Record
from utils.selection import GOALS

FIRST = ("net", "criterion", *GOALS, "seed")  # columns of the HPARAMS tab


class TensorBoardLog:
    """TensorBoard files in ``logdir``, if any. What an earlier process drew from ``first_step`` on
    is hidden.

    Raises OSError if the files cannot be written from the start. If they cannot be written later,
    ``warn`` is called with one line, and the run continues without them.
    """

    def __init__(
        self, logdir: Path | None = None, first_step: int = 0, warn: Callable[[str], None] = print
    ):
        self.writer, self.warn, self._hook = None, warn, threading.excepthook
        if logdir:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = self._on_thread_error
            try:
                self.writer = SummaryWriter(str(logdir), purge_step=first_step)
            except OSError:
                self.close()
                raise

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        """Hide a traceback of TensorBoard's own thread: the next drawing raises the error again."""
        ours = type(args.thread).__module__.startswith("tensorboard.")
        if not (ours and isinstance(args.exc_value, OSError)):
            self._hook(args)

    def close(self) -> None:
        if self.writer is not None:
            with suppress(OSError):  # the user has been warned already
                self.writer.close()
        threading.excepthook = self._hook

    def _draw(self, method: str, *args: Any, **options: Any) -> None:
        """Call a method of the writer, if there is one; its first error ends all drawing."""
        if self.writer is None:
            return
        try:
            attrgetter(method)(self.writer)(*args, **options)
        except (OSError, ValueError) as error:  # ValueError: a histogram of values that overflow
            self.writer = None
            self.warn(f"warning: no more TensorBoard files: they cannot be written ({error})")

    def draw_epoch(self, epoch: Epoch, step: int, tested_on: str) -> None:
        """Draw the scalars of an epoch; ``step`` counts epochs since the run began."""
        scalars = {"lr": epoch.lr, "images_per_second": epoch.images_per_second}
        for part, metrics in (("train", epoch.train), (tested_on, epoch.test)):
            scalars |= {f"loss/{part}": metrics.loss, f"accuracy/{part}": metrics.accuracy}
        for name, value in scalars.items():
            self._draw("add_scalar", name, value, step)

    def draw_saliency(self, saliency: Mapping[str, Tensor], step: int) -> None:
        """Draw a histogram of the scores of every group."""
        for name, scores in saliency.items():
            self._draw("add_histogram", f"saliency/{name}", scores.detach().cpu(), step)

    def draw_surgery(self, record: Record) -> None:
        """Draw the channels that every group keeps, as one figure."""
        figure, step = _bars(record.channels), len(record.history)
        self._draw("add_image", "channels", figure, step, dataformats="HWC")

    def draw_config(self, config: Mapping[str, Any]) -> None:
        """Show the configuration as a table."""
        self._draw("add_text", "configuration", _table(("flag", "value"), config.items()))

    def draw_result(self, record: Record) -> None:
        """Fill the HPARAMS tab: the flags beside accuracy and cost."""
        asked = {
            name: value if isinstance(value, (bool, int, float)) else str(value)
            for name, value in record.config.items()
            if value is not None
        }
        metrics = {f"accuracy/{name}": value for name, value in record.accuracy.items()}
        del metrics["accuracy/best_epoch"]
        for name, cost in record.cost.items():
            metrics[name] = cost["after"] if isinstance(cost, Mapping) else cost
        results = {f"result/{name}": v for name, v in metrics.items() if v is not None}
        if self.writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        goals = dict.fromkeys(GOALS, 0.0)  # each run has one of them, and all have the columns
        columns, session = hparams({**goals, **asked}, results)[0], [*hparams(asked, results)[1:]]
        if record.criterion:  # TensorBoard shows the columns of one run: not those of a baseline
            session.append(_first_in_front(columns))
        for summary in session:
            self._draw("file_writer.add_summary", summary)
        for name, value in results.items():
            self._draw("add_scalar", name, value)


def _table(titles: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown."""
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _first_in_front(columns: Any) -> Any:
    """The summary of the columns, so marked that TensorBoard shows those of ``FIRST`` first."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    plugin = columns.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    for column in content.experiment.hparam_infos:
        column.differs = column.name in FIRST  # TensorBoard sorts by this, then by name
    plugin.content = content.SerializeToString()
    return columns


def _bars(channels: Mapping[str, Mapping[str, int]]) -> np.ndarray:
    """A picture (H, W, 3) uint8: a bar per group, filled as far as its channels are kept."""
    row, bar, numbers = 16, 400, 80
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
    left = 8 + round(max(map(measure, channels)))
    picture = Image.new("RGB", (left + bar + numbers, row * len(channels)), "white")
    draw = ImageDraw.Draw(picture)
    for top, (name, width) in zip(range(0, picture.height, row), channels.items(), strict=True):
        end = left + round(bar * width["after"] / width["before"])
        draw.text((4, top + 2), name, "black")
        draw.rectangle((left, top + 2, left + bar, top + row - 3), "lightgrey")
        draw.rectangle((left, top + 2, end, top + row - 3), "steelblue")
        draw.text((left + bar + 8, top + 2), f"{width['after']} of {width['before']}", "black")
    return np.asarray(picture)
