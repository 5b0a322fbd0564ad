"""One process at a time in an output folder."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import InputError

PATIENCE = 10  # seconds: an NFS server may notice late that an owner has died
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the kernel's lock on the file ``lock`` in a folder; it ends with the process.

    The file names its last owner. It is never removed: without a lock on it, it blocks nobody.
    Raises InputError, with the owner's name, if another process holds the lock.
    """
    lock = FileLock(folder / "lock", fallback_to_soft=False, on_acquired=_sign)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        owner = "another process"
        with suppress(OSError, ValueError):  # the owner has not written its name yet
            owner = "process {pid} on {host}".format(**json.loads(Path(lock.lock_file).read_text()))
        how = "wait for it, or choose another --output"
        raise InputError(f"{folder} is in use by {owner}; {how}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        why = f"is on a file system without locks ({error.strerror})"
        raise InputError(f"{folder} {why}; choose another --output") from error
    try:
        yield
    finally:
        lock.release()


def _sign(handle: int) -> None:
    os.truncate(handle, 0)
    os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
