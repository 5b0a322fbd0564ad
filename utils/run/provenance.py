"""What repeating a run takes: its command, and the versions of the software."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import torchvision

from utils.cli.parser import program


def command_line() -> str:
    """The command that started this process."""
    return shlex.join(["python", *program(), *sys.argv[1:]])


def versions() -> dict[str, str | int | None]:
    return {
        "commit": commit(), "python": platform.python_version(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "torchvision": torchvision.__version__,
    }  # fmt: skip


def commit() -> str | None:
    """The commit of this repository; None without git, and outside a repository."""
    folder = Path(__file__).parents[2] / ".git"
    command = ["git", f"--git-dir={folder}", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
