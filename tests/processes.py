"""Scripts of ours as processes, forked from one that has imported torch: they start at once."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 200  # seconds until a process counts as hanging
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch._dynamo", "torch.utils.tensorboard", "torchvision.transforms.v2"]
)


class Script:
    """``python script arguments`` in the working folder, and in a process group of its own.

    ``environment`` is added to ours; ``prepare`` is called in the process before the script.
    """

    def __init__(self, script, *argv, prepare=None, **environment):
        self.streams = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115
        names = [stream.name for stream in self.streams]
        command = [str(ROOT / script), *map(str, argv)]
        place = os.getcwd(), {**os.environ, **environment}
        self.process = SERVER.Process(target=_run, args=(command, *place, names, prepare))
        self.process.start()
        self.pid, self.is_alive = self.process.pid, self.process.is_alive

    def kill(self, signum):
        """Send the whole group a signal."""
        os.killpg(self.pid, signum)

    def wait(self):
        """Its exit code, and what it wrote to stdout and stderr."""
        self.process.join(PATIENCE)
        hangs = self.is_alive()
        if hangs:
            self.kill(signal.SIGKILL)
        shown = [stream.read() for stream in self.streams]
        for stream in self.streams:
            stream.close()
        assert not hangs, shown
        return self.process.exitcode, *shown


def _run(command, folder, environment, streams, prepare):
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(streams, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    sys.argv, sys.path[:0] = command, [str(ROOT)]
    if prepare:
        prepare()
    runpy.run_path(command[0], run_name="__main__")


def start_ranks(count, *command, **options):
    """A script on so many ranks, which find each other as they do under torchrun."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [{**group, "RANK": str(k), "LOCAL_RANK": str(k)} for k in range(count)]
    return [Script(*command, **options, **rank) for rank in (ranks if count > 1 else [{}])]
