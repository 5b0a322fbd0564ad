"""Where a run computes: the CPU, one accelerator, several GPUs, or several processes.

Only this file knows of ranks and of the wrappers around a model.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models import GatedModel
from utils.errors import InputError, RunError

T = TypeVar("T")
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Acceleration:
    """How training computes. Weights, evaluation and scores are float32 whatever it says.

    Attributes:
        amp: a name of ``AMP``: convolutions and linear layers compute in that type.
        channels_last: weights, and so activations, lie in memory pixel by pixel instead of plane by
            plane.
        compile: training goes through ``torch.compile``.
        fused: the optimiser's step is one pass over the weights.
    """

    amp: str | None = None
    channels_last: bool = False
    compile: bool = False
    fused: bool = False

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Around the forward pass and the loss of a training step."""
        return torch.autocast(device.type, AMP.get(self.amp), enabled=self.amp is not None)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Keeps gradients within what fp16 can hold; does nothing for the other types."""
        return torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")

    def set_memory_format(self, model: nn.Module) -> nn.Module:
        """The model, in place, in the memory layout asked for."""
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def compiled(self, network: nn.Module) -> nn.Module:
        """The network as it is trained; weights are shared."""
        if not self.compile:
            return network
        torch.compiler.reset()  # or, after a few stages, torch would give up compiling them
        return torch.compile(network, dynamic=False)

    def __str__(self) -> str:
        words = {
            "channels_last": self.channels_last, "compiled": self.compile,
            "fused optimiser": self.fused,
        }  # fmt: skip
        return ", ".join([self.amp or "float32", *(word for word, on in words.items() if on)])


# What gloo, NCCL and torch's store say where the other end of a connection is gone.
LOST = re.compile(
    "connection .*(closed|reset|refused)|broken pipe|time(d )?out|ncclRemoteError", re.IGNORECASE
)


@dataclass(frozen=True)
class Runtime:
    """The device of this process, the GPUs that share its batches, and its place among the ranks.

    Attributes:
        device: holds the model.
        gpus: with more than one, ``DataParallel`` splits every batch over them.
        rank, world_size: of ``torchrun``; with more than one rank, every rank takes its share of
            every batch and gradients are averaged (``DistributedDataParallel``).
        sync_bn: BatchNorm takes its statistics from the batches of all ranks together.
        acceleration: how training computes.
    """

    device: torch.device
    gpus: tuple[int, ...] = ()
    rank: int = 0
    world_size: int = 1
    sync_bn: bool = False
    acceleration: Acceleration = Acceleration()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, draws bars and scores channels."""
        return self.rank == 0

    def for_training(self, model: GatedModel) -> nn.Module:
        """The model as it is trained; ``model`` itself stays bare and shares its weights."""
        network = self.for_evaluation(model)
        if self.world_size > 1:
            if self.sync_bn:
                nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place, for all but the root
            # Not at every batch: ``sync_buffers`` sends rank 0's where they are read.
            network = DistributedDataParallel(model, forward_sync_buffers=False)
        return self.acceleration.compiled(network)

    def autocast(self) -> AbstractContextManager:
        """Around the forward pass and the loss of a training step."""
        return self.acceleration.autocast(self.device)

    def scaler(self) -> torch.amp.GradScaler:
        """What scales the loss of a training step, where its gradients need that."""
        return self.acceleration.scaler(self.device)

    def for_evaluation(self, model: GatedModel) -> nn.Module:
        """The model as it is evaluated: ranks do so on their own."""
        self.acceleration.set_memory_format(model.to(self.device))
        return nn.DataParallel(model, list(self.gpus)) if len(self.gpus) > 1 else model

    def undo_sync_bn(self, model: GatedModel) -> None:
        """Undo what ``sync_bn`` did to the norms: one rank alone is to run the model."""
        for name, norm in list(model.named_modules()) if self.sync_bn else ():
            if isinstance(norm, nn.SyncBatchNorm):
                plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
                plain.__dict__.update({k: v for k, v in vars(norm).items() if k != "process_group"})
                model.set_submodule(name, plain)

    def sync_buffers(self, model: GatedModel) -> None:
        """Give every rank the buffers (BatchNorm's running statistics) of rank 0."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def minimum(self, values: Tensor) -> Tensor:
        """The least of a tensor over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    def most(self, value: int) -> int:
        """The greatest of a number over all ranks, without waiting for a GPU."""
        if self.world_size == 1:
            return value
        values = torch.tensor(value)  # on the CPU, so gloo carries it
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def on_main(self, action: Callable[[], T]) -> T:
        """Do something on rank 0; every rank gets the result, or raises the same error."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except (InputError, RunError) as error:
                outcome[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def main_first(self, action: Callable[[], T]) -> T:
        """Do something on every rank, but on rank 0 first: say, download what all will read.

        Where rank 0 raises an error, every rank does.
        """
        results: list[T] = []
        self.on_main(lambda: results.append(action()))
        return results[0] if results else action()

    def share(self, batch_size: int, flag: str) -> None:
        """Raise InputError unless the ranks divide the batch."""
        if batch_size % self.world_size:
            raise InputError(
                f"{flag} {batch_size} does not divide by the {self.world_size} ranks;"
                f" use a multiple of {self.world_size}"
            )

    def images_per_norm(self, batch_size: int) -> int:
        """Of how many images in a training batch BatchNorm takes its statistics."""
        parts = 1 if self.sync_bn else self.world_size * max(1, len(self.gpus))
        return max(1, batch_size // parts)

    def __str__(self) -> str:
        name = self.device.type
        if name == "cuda":
            name = (
                f"GPU {', '.join(map(str, self.gpus))} ({torch.cuda.get_device_name(self.device)})"
            )
        elif name == "cpu":
            name = f"CPU, {torch.get_num_threads()} threads"
        name += "" if self.acceleration == Acceleration() else f", {self.acceleration}"
        return f"{self.world_size} ranks, each on {name}" if self.world_size > 1 else name


def select_runtime(
    device: str = "auto",
    gpus: Sequence[int] | None = None,
    sync_bn: bool = False,
    acceleration: Acceleration = Acceleration(),
) -> Runtime:
    """Resolve ``--device`` and ``--gpu``; join the other ranks where ``torchrun`` started this.

    Args:
        device: ``auto`` (CUDA, else MPS, else the CPU), ``cpu``, ``cuda`` or ``mps``.
        gpus: CUDA ids that were asked for; by default all that are visible. Under ``torchrun``
            every rank takes one of them.
        sync_bn, acceleration: see ``Runtime``.

    Raises InputError for a device or a GPU id that is not there, for ``sync_bn`` without GPUs, and
    for an acceleration that the device does not have.
    """
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if device == "auto":
        accelerator = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if visible or gpus else accelerator
    _check_device(device, gpus, visible)
    use = tuple(gpus or range(visible)) if device == "cuda" else ()
    _check_options(device, use, ranks, sync_bn, acceleration)
    if ranks == 1:
        here = torch.device("cuda", use[0]) if use else torch.device(device)
        return Runtime(here, use, acceleration=acceleration)
    if "LOCAL_RANK" not in os.environ:
        raise InputError("WORLD_SIZE is set without LOCAL_RANK: start several ranks with torchrun")
    local = int(os.environ["LOCAL_RANK"])
    if use and local >= len(use):
        raise InputError(f"torchrun started more ranks than there are GPUs ({len(use)}) to take")
    here = torch.device("cuda", use[local]) if use else torch.device(device)
    if use:
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if use else "gloo")
    place = dist.get_rank(), dist.get_world_size()
    return Runtime(here, use[local : local + 1], *place, sync_bn, acceleration)


def _check_device(device: str, gpus: Sequence[int] | None, visible: int) -> None:
    """Raise InputError for a device or a GPU id that is not there."""
    if gpus and device != "cuda":
        raise InputError(f"--gpu needs --device cuda, not {device}")
    absent = [gpu for gpu in gpus or () if gpu >= visible]
    if absent:
        raise InputError(
            f"--gpu {','.join(map(str, absent))}: torch sees {visible} GPUs here;"
            " leave the flag out to use what there is"
        )
    if device == "cuda" and not visible:
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: not available on this machine; use --device cpu")


def _check_options(
    device: str, gpus: Sequence[int], ranks: int, sync_bn: bool, acceleration: Acceleration
) -> None:
    """Raise InputError for what the device, or the number of ranks, does not have."""
    if sync_bn and device != "cuda":
        raise InputError(f"--sync_bn needs GPUs: there is no such BatchNorm for {device}")
    if sync_bn and ranks == 1:
        raise InputError("--sync_bn is for several ranks: start the script with torchrun")
    if acceleration.amp == "fp16" and device != "cuda":
        raise InputError(f"--amp fp16 needs CUDA, not {device}; bf16 works on every device")
    compiler = os.environ.get("CXX", "g++")
    if acceleration.compile and device == "cpu" and not shutil.which(compiler):
        raise InputError(f"--compile needs a C++ compiler, and {compiler} is not there")
    if ranks == 1 and len(gpus) > 1 and (acceleration.amp or acceleration.compile):
        raise InputError(
            "--amp and --compile take one GPU a process: start the script with torchrun,"
            " or name one with --gpu"
        )


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether an error is that of a rank whose peers have died or left."""
    return dist.is_initialized() and bool(LOST.search(str(error)))


def leave() -> None:
    """Take leave of the other ranks, where there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; ``deterministic``: the same bits in every run on a device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
