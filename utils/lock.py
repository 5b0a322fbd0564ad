"""One process at a time in an output folder."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from utils.errors import InputError


class FolderLock:
    """A file ``lock`` that says which process, on which host, writes into the folder.

    A lock whose process is gone from this host is taken over; ``took_over`` says whose it was.
    """

    def __init__(self, folder: Path):
        self.path = folder / "lock"
        self.mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        self.took_over = ""

    def acquire(self) -> None:
        """Raise InputError, naming the owner, where another process has the folder."""
        draft = self.path.with_name(f".lock.{os.getpid()}.tmp")
        draft.write_text(self.mine)
        try:
            while True:
                try:
                    os.link(draft, self.path)  # appears whole, and fails where there is one
                    return
                except FileExistsError:
                    self._set_stale_aside(draft.with_suffix(".stale.tmp"))
        finally:
            draft.unlink(missing_ok=True)

    def release(self) -> None:
        if self.path.exists() and self.path.read_text() == self.mine:
            self.path.unlink(missing_ok=True)

    def _set_stale_aside(self, aside: Path) -> None:
        try:
            seen = self.path.read_text()
        except FileNotFoundError:
            return  # just released
        try:
            owner = json.loads(seen)
            pid, host = int(owner["pid"]), str(owner["host"])
        except (ValueError, KeyError, TypeError):  # not written by this program
            pid, host = 0, socket.gethostname()
        elsewhere = host != socket.gethostname()
        if elsewhere or (pid not in (0, os.getpid()) and _is_alive(pid)):
            raise InputError(
                f"{self.path.parent} is in use by process {pid} on {host};"
                f" wait for it, choose another --output, or delete {self.path} if it is gone"
            )
        try:
            os.rename(self.path, aside)  # of several that see it stale, one succeeds
        except FileNotFoundError:
            return
        if aside.read_text() != seen:  # another took it over in between: give it back
            os.rename(aside, self.path)
            return
        aside.unlink()
        self.took_over = f"process {pid} on {host}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
