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
        self.took_over = ""

    def acquire(self) -> None:
        """Raise InputError, naming the owner, where another process has the folder."""
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        while True:
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                self._remove_if_stale()
                continue
            with os.fdopen(handle, "w") as file:
                json.dump(owner, file)
            return

    def release(self) -> None:
        self.path.unlink(missing_ok=True)

    def _remove_if_stale(self) -> None:
        try:
            owner = json.loads(self.path.read_text())
            pid, host = int(owner["pid"]), str(owner["host"])
        except FileNotFoundError:
            return  # just released
        except (ValueError, KeyError, TypeError):  # its owner died while writing it
            pid, host = 0, socket.gethostname()
        if host != socket.gethostname() or (pid and _is_alive(pid)):
            raise InputError(
                f"{self.path.parent} is in use by process {pid} on {host};"
                f" wait for it, choose another --output, or delete {self.path} if it is gone"
            )
        self.took_over = f"process {pid} on {host}"
        self.path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
