"""SIGINT and SIGTERM: at once where nothing is lost by it, after the batch where something is."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.errors import Interrupted


class Signals:
    """What a process does about SIGINT and SIGTERM between ``install`` and ``restore``.

    Attributes:
        received: the number of the signal that waits to be obeyed, or 0.
    """

    def __init__(self):
        self.received = 0
        self._deferring = False
        self._before: dict[int, object] = {}

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():  # others may not
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)

    def restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, the first signal is only noted in ``received``; a second one leaves at once."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + signum)
        # Noted in any case: what is raised where Python ignores errors is obeyed after the batch.
        self.received = signum
        if not self._deferring:
            raise Interrupted(signum)
        print("stopping after this batch; once more to stop at once", file=sys.stderr, flush=True)
