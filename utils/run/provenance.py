"""What it takes to repeat a run: its command, and the versions of what it ran on."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torchvision

from utils.cli.parser import program


def command_line() -> str:
    """The command that started this process."""
    return shlex.join(["python", *program(), *sys.argv[1:]])


def versions() -> dict[str, str | int | None]:
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def commit() -> str | None:
    """The commit of this repository; None outside git, or without git."""
    git = ["git", f"--git-dir={Path(__file__).parents[2] / '.git'}"]
    with suppress(OSError, subprocess.CalledProcessError):
        command = [*git, "rev-parse", "--short", "HEAD"]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    return None
