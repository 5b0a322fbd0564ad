"""Where a run computes: the CPU, an accelerator, or several. Only this file knows of wrappers."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from models.gate import GatedModel
from utils.errors import InputError


@dataclass(frozen=True)
class Runtime:
    """The device that holds the model, and the GPUs that share every batch."""

    device: torch.device
    gpus: tuple[int, ...] = ()

    def parallel(self, model: GatedModel) -> nn.Module:
        """The model as it is run: on its device, in DataParallel where there are several GPUs."""
        model.to(self.device)
        return nn.DataParallel(model, list(self.gpus)) if len(self.gpus) > 1 else model

    def __str__(self) -> str:
        if self.device.type == "cuda":
            names = [f"{gpu} ({torch.cuda.get_device_name(gpu)})" for gpu in self.gpus]
            return "GPU " + ", ".join(names)
        return (
            f"{self.device.type}, {torch.get_num_threads()} threads"
            if self.device.type == "cpu"
            else self.device.type
        )


def select_runtime(device: str = "auto", gpus: Sequence[int] | None = None) -> Runtime:
    """Resolve ``--device`` and ``--gpu``.

    Args:
        device: ``auto`` (CUDA, else MPS, else the CPU), ``cpu``, ``cuda`` or ``mps``.
        gpus: CUDA ids that were asked for; by default all that are visible.

    Raises InputError for a device or a GPU id that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if count or gpus else "mps" if mps else "cpu"
    if gpus and device != "cuda":
        raise InputError(f"--gpu needs --device cuda, not {device}")
    if device == "cuda":
        absent = [gpu for gpu in gpus or () if gpu >= count]
        if absent:
            raise InputError(
                f"--gpu {','.join(map(str, absent))}: torch sees {count} GPUs here;"
                " leave the flag out to use what there is"
            )
        if not count:
            raise InputError("--device cuda: no GPU is visible to torch; use --device cpu")
        gpus = tuple(gpus or range(count))
        return Runtime(torch.device("cuda", gpus[0]), gpus)
    if device == "mps" and not mps:
        raise InputError("--device mps: not available on this machine; use --device cpu")
    return Runtime(torch.device(device))


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; ``deterministic``: the same bits in every run on a device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
