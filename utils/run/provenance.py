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

from utils.run.launch import ROOT_CAUSE


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


def resume_line(only_now: str, ranks: int) -> str:
    """The command that continues this run from its folder, without the flag ``only_now``."""
    if ranks > 1 and ROOT_CAUSE not in os.environ:
        without = f" without {only_now}" if only_now else ""
        return f"the same torchrun command{without} and --resume"
    words, rest = [], iter(sys.argv[1:])
    for word in rest:
        if word == only_now:
            next(rest, None)  # its value
        elif word.partition("=")[0] not in ("--resume", "-r", "--overwrite", only_now):
            words.append(word)
    return shlex.join([python(), *program(), *words, "--resume"])


def versions() -> dict[str, str | int | None]:
    """Of the software; the commit is None without git, and outside a repository."""
    folder = Path(__file__).parents[2] / ".git"
    command = ["git", f"--git-dir={folder}", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    known = {"commit": commit, "python": platform.python_version()}
    known |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    return known | {"torchvision": version("torchvision")}
