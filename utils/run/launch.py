"""Start a script once per GPU, by torch's elastic launcher: torchrun without typing it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import torch

from utils.distributed import Runtime, find_devices
from utils.errors import InputError
from utils.run.signals import ONE_SIGNAL

# In the environment: a line for the log, and where the first failed rank leaves its exit code.
STARTED, ROOT_CAUSE = "GFBS_STARTED", "GFBS_ROOT_CAUSE"
PATIENCE = 600  # seconds after a signal until SIGKILL; ranks finish a batch and save a checkpoint


def processes(
    device: str, gpus: Sequence[int] | None, wanted: int | None, batch: int, flag: str, parts: int
) -> tuple[int, str]:
    """How many processes share every batch, and a line for the log.

    Each of ``gpus`` has one; without, as many of the visible GPUs as the batch divides by. On a CPU
    there are ``wanted`` processes. In a process that is a rank already: 1. ``flag`` says how many
    images are in a ``batch``, and --accumulate how many ``parts`` it has.
    """
    if "WORLD_SIZE" in os.environ:
        if wanted and ROOT_CAUSE not in os.environ:
            raise InputError("--processes: torchrun has started them already; leave the flag out")
        return 1, ""
    device, use = find_devices(device, gpus or ())
    if wanted and device != "cpu":
        raise InputError(f"--processes needs --device cpu, not {device}: a GPU has one process")
    count, line = wanted or 1, f"{wanted} processes share every batch"
    if use:
        fits = [n for n in range(1, len(use) + 1) if batch % (n * parts) == 0]
        count = len(use) if gpus else max(fits, default=1)
        line = f"one process for each of {count} GPUs"
        if count < len(use):
            line += f"; {len(use)} are visible, but {flag} {batch} does not divide by more"
    Runtime(torch.device(device), world_size=count).share(batch, flag, parts)
    return count, line if max(count, len(use)) > 1 else ""


def start(command: Sequence[str], ranks: int) -> int:
    """Run a script of Python as so many ranks on this machine, and return its exit code.

    It is that of the rank that failed first, or 128 and the number of the signal that this process
    received. The first signal stops every rank after its batch, a second one at once.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    received: list[tuple[int, float]] = []  # signals, and when they came

    def stop(signum: int, frame: FrameType | None) -> None:
        received.append((signum, time.monotonic()))
        if len(received) == 1 or received[-1][1] - received[0][1] > ONE_SIGNAL:
            raise SignalException("", signal.SIGTERM)  # the launcher sends it to all ranks

    logging.disable()  # the launcher's report of a failure: the rank has said why it fails
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE))
    with tempfile.TemporaryDirectory() as folder:
        os.environ[ROOT_CAUSE] = cause = f"{folder}/root_cause"
        config = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": ranks, "max_restarts": 0}
        config |= {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "gfbs"}
        config |= {"local_addr": "localhost", "logs_specs": DefaultLogsSpecs(folder)}
        # torch 2.8 has no such field: it handles the others, too, and kills after 30 seconds.
        if hasattr(LaunchConfig, "signals_to_handle"):
            config["signals_to_handle"] = "SIGQUIT"
        try:
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, stop)
            elastic_launch(LaunchConfig(**config), sys.executable)(*command)
        except SignalException as error:
            return 128 + (received[0][0] if received else error.sigval)
        except ChildFailedError as error:
            rank, failure = next(iter(error.failures.items()))  # in the order of their ends
            if failure.exitcode < 0:
                killed = f"rank {rank} was killed by {failure.signal_name()}"
                print(f"{killed}; memory may have run out", file=sys.stderr)
                return 1
            return int(os.readlink(cause)) if os.path.islink(cause) else failure.exitcode
    return 0


def end(code: int) -> int:
    """Return the exit code of a script. A rank of ``start`` ends here instead: threads of torch can
    abort a Python that tidies up, and the code would be lost.
    """
    if ROOT_CAUSE in os.environ and "WORLD_SIZE" in os.environ:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # the reader of a pipe may be gone
                stream.flush()
        os._exit(code)
    return code


def is_root_cause(code: int) -> bool:
    """Whether this process should say why it ends: no other rank of ``start`` has failed before."""
    try:
        # A link, unlike a file, is there as a whole or not at all, also on a full disk.
        os.symlink(str(code), os.environ[ROOT_CAUSE])
    except FileExistsError:
        return False
    except (KeyError, OSError):
        pass  # no rank of ``start``, or nowhere to write
    return True
