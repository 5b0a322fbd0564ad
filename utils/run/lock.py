"""One process at a time in an output folder."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import InputError

PATIENCE = 10  # seconds: an NFS server may notice late that an owner has died
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class FolderLock:
    """The kernel's lock on the file ``lock`` in a folder. It ends with the process that holds it.

    The file names its last owner. It is never removed: without a lock on it, it blocks nobody.
    """

    def __init__(self, folder: Path):
        self.path = folder / "lock"
        self._lock = FileLock(self.path, fallback_to_soft=False, on_acquired=_sign)
        self.release = self._lock.release

    def acquire(self) -> None:
        """Raise InputError, with the owner's name, if another process holds the lock."""
        folder = self.path.parent
        try:
            self._lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise InputError(
                f"{folder} is in use by {self._owner()}; wait for it, or choose another --output"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            why = f"is on a file system without locks ({error.strerror})"
            raise InputError(f"{folder} {why}; choose another --output") from error

    def _owner(self) -> str:
        try:
            owner = json.loads(self.path.read_text())
            return f"process {owner['pid']} on {owner['host']}"
        except (OSError, ValueError):  # the owner has not written its name yet
            return "another process"


def _sign(handle: int) -> None:
    os.truncate(handle, 0)
    os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
