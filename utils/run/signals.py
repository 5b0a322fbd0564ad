"""SIGINT and SIGTERM: training stops after the batch, everything else stops at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.errors import Interrupted

ONE_SIGNAL = 1  # seconds in which a second signal is the same one, delivered twice


class Signals:
    """SIGINT and SIGTERM: they raise ``Interrupted`` or, in ``deferred``, only set ``received``."""

    def __init__(self):
        self.received = 0  # number of the first signal; 0 before it
        self._since, self._deferring = 0.0, False  # since when, by time.monotonic
        self._afterwards: dict[int, object] = {}  # the handlers after the context

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals in this context. One within it, or in a thread, changes nothing."""
        if self._afterwards or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received = 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._afterwards[signum] = signal.signal(signum, self._handle)
        try:
            yield
        finally:
            for signum, handler in self._afterwards.items():
                signal.signal(signum, handler)
            self._afterwards.clear()

    def ignore_afterwards(self) -> None:
        """Ignore signals after ``handled``: they would change the exit code of what has ended."""
        self._afterwards = dict.fromkeys(self._afterwards, signal.SIG_IGN)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In this context a first signal only sets ``received``; a second one stops at once."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._since > ONE_SIGNAL:
                os._exit(128 + signum)
            return
        # Set in any case: Python swallows exceptions in __del__, and then the loop checks this.
        self.received, self._since = signum, time.monotonic()
        if not self._deferring:
            raise Interrupted(signum)
        if os.environ.get("RANK", "0") == "0":
            what = "stopping after this batch; once more to stop at once"
            print(what, file=sys.stderr, flush=True)


SIGNALS = Signals()  # the only one of the process
