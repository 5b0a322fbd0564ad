"""What TensorBoard shows of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
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


class TensorBoardLog:
    """TensorBoard files in ``logdir``, if any. They hide older drawings from ``first_step`` on.

    Raises OSError if the files cannot be written from the start. If they cannot be written later,
    ``warn`` is called with one line, and the run continues without them.
    """

    def __init__(self, logdir: Path | None = None, first_step: int = 0, warn: Callable = print):
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
        """Draw the channels that stay: a bar per group, filled as far as its channels are kept."""
        row, bar, numbers = 16, 400, 80  # pixels
        measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
        left = 8 + round(max(map(measure, record.channels)))
        picture = Image.new("RGB", (left + bar + numbers, row * len(record.channels)), "white")
        draw = ImageDraw.Draw(picture)
        for i, (name, width) in enumerate(record.channels.items()):
            before, after = width["before"], width["after"]
            top, bottom = row * i + 2, row * (i + 1) - 3
            draw.text((4, top), name, "black")
            draw.rectangle((left, top, left + bar, bottom), "lightgrey")
            draw.rectangle((left, top, left + round(bar * after / before), bottom), "steelblue")
            draw.text((left + bar + 8, top), f"{after} of {before}", "black")
        pixels, step = np.asarray(picture), len(record.history)
        self._draw("add_image", "channels", pixels, step, dataformats="HWC")

    def draw_config(self, config: Mapping[str, Any]) -> None:
        """Show the configuration as a table in Markdown."""
        rows = [f"| {flag} | {value} |" for flag, value in config.items()]
        table = "\n".join(["| flag | value |", "| --- | --- |", *rows])
        self._draw("add_text", "configuration", table)

    def draw_result(self, record: Record) -> None:
        """Fill the HPARAMS tab: the flags beside accuracy and cost."""
        if self.writer is None:
            return
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

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
        _, *session = hparams(asked, results)
        if record.criterion:  # TensorBoard shows the columns of one run: not those of a baseline
            goals = dict.fromkeys(GOALS, 0.0)  # each run has one of them, and all have the columns
            columns, *_ = hparams({**goals, **asked}, results)
            plugin = columns.value[0].metadata.plugin_data
            content = HParamsPluginData.FromString(plugin.content)
            first = ("net", "criterion", *GOALS, "seed")
            for column in content.experiment.hparam_infos:
                column.differs = column.name in first  # TensorBoard sorts by this, then by name
            plugin.content = content.SerializeToString()
            session.append(columns)
        for summary in session:
            self._draw("file_writer.add_summary", summary)
        for name, value in results.items():
            self._draw("add_scalar", name, value)
