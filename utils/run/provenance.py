"""What repeating a run takes: its command, and the versions of the software."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def program() -> list[str]:
    """How this process was started: the path of a script, or ``-m`` and a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]


def python() -> str:
    """The command that starts this Python: "python" if the PATH leads to it, else its path."""
    if shutil.which("python") == sys.executable:
        return "python"
    near = os.path.relpath(sys.executable)
    return sys.executable if near.startswith(os.pardir) else near


def command_line() -> str:
    """The command that started this process."""
    return shlex.join(["python", *program(), *sys.argv[1:]])


def versions() -> dict[str, str | int | None]:
    python, threads = platform.python_version(), torch.get_num_threads()
    libraries = {"torch": torch.__version__, "torchvision": version("torchvision")}
    return {"commit": commit(), "python": python, "threads": threads, **libraries}


def commit() -> str | None:
    """The commit of this repository; None without git, and outside a repository."""
    folder = Path(__file__).parents[2] / ".git"
    command = ["git", f"--git-dir={folder}", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
