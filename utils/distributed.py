"""Where a run computes: devices, ranks, precision. Only this file and launch.py know ranks."""

import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import InputError, RunError

T = TypeVar("T")
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What gloo, NCCL and torch's store say when another rank is gone.
LOST = "connection .*(closed|reset|refused)|broken pipe|time(d )?out|ncclRemoteError"


@dataclass(frozen=True)
class Acceleration:
    """How training computes. Weights, evaluation and scores always stay in float32."""

    amp: str | None = None  # a name in ``AMP``: the type of convolutions and linear layers
    channels_last: bool = False  # store weights and activations pixel by pixel; not on MPS
    compile: bool = False  # train through ``torch.compile``
    fused: bool = False  # the optimiser updates all weights in one pass

    def __str__(self) -> str:
        options = {"channels_last": self.channels_last, "compiled": self.compile}
        options |= {"fused optimiser": self.fused}
        return ", ".join([self.amp or "float32", *(name for name in options if options[name])])


@dataclass(frozen=True)
class Runtime:
    """The device of this process, and its place among the ranks that share every batch.

    Several ranks, from ``torchrun``, average their gradients (``DistributedDataParallel``).
    """

    device: torch.device  # holds the model
    gpus: tuple[int, ...] = ()  # if there are several, ``DataParallel`` splits batches over them
    rank: int = 0
    world_size: int = 1
    sync_bn: bool = False  # BatchNorm takes its statistics from the batches of all ranks together
    acceleration: Acceleration = Acceleration()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, draws progress bars and scores channels."""
        return self.rank == 0

    def for_training(self, model: nn.Module) -> nn.Module:
        """The network to train. It shares its weights with ``model``, which gets no wrapper."""
        network = self.for_evaluation(model)
        if self.world_size > 1:
            if self.sync_bn:
                nn.SyncBatchNorm.convert_sync_batchnorm(model)  # edits the layers of the model
            # ``sync_buffers`` sends the statistics when they are read, not at every batch.
            known, name = signature(DistributedDataParallel).parameters, "forward_sync_buffers"
            name = name if name in known else "broadcast_buffers"  # as torch 2.8 calls it
            network = DistributedDataParallel(model, **{name: False})
        if not self.acceleration.compile:
            return network
        torch.compiler.reset()  # else torch stops compiling after a few rounds
        return torch.compile(network, dynamic=False)

    def for_evaluation(self, model: nn.Module) -> nn.Module:
        """The network to evaluate; every rank evaluates its own share of the images."""
        model.to(self.device)
        if self.acceleration.channels_last:
            model.to(memory_format=torch.channels_last)
        return nn.DataParallel(model, list(self.gpus)) if len(self.gpus) > 1 else model

    def autocast(self) -> AbstractContextManager:
        """Mixed precision, for the forward pass and the loss of a training step."""
        amp = self.acceleration.amp
        return torch.autocast(self.device.type, AMP.get(amp), enabled=amp is not None)

    def without_sync(self, network: nn.Module) -> AbstractContextManager:
        """Keep gradients on their rank; the next backward pass outside averages their sum."""
        return network.no_sync() if self.world_size > 1 else nullcontext()

    def undo_sync_bn(self, model: nn.Module) -> None:
        """Put ordinary BatchNorm layers back, so that one rank can run the model alone."""
        for name, norm in list(model.named_modules()):
            if self.sync_bn and isinstance(norm, nn.SyncBatchNorm):
                plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
                plain.__dict__.update({k: v for k, v in vars(norm).items() if k != "process_group"})
                model.set_submodule(name, plain)

    def sync_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers (BatchNorm's running statistics) of rank 0."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def reduce(self, values: Tensor, how: Literal["SUM", "MIN", "MAX"]) -> Tensor:
        """The sum, least or greatest of a tensor over all ranks, computed in place."""
        if self.world_size > 1:
            dist.all_reduce(values, getattr(dist.ReduceOp, how))
        return values

    def most(self, value: int) -> int:
        """The greatest of a number over all ranks. It stays on the CPU: no wait for a GPU."""
        return int(self.reduce(torch.tensor(value), "MAX"))

    def on_main(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0. Every rank returns its result, or raises its error."""
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
        """Run ``action``, such as a download, on rank 0 first. If it fails there, all raise."""
        results: list[T] = []
        self.on_main(lambda: results.append(action()))
        return results[0] if results else action()

    def share(self, batch_size: int, flag: str, parts: int = 1) -> None:
        """Raise InputError unless the batch divides by the ranks, and by the parts of each.

        Several parts need two images each, because of BatchNorm.
        """
        ranks, pieces = self.world_size, parts * self.world_size
        if batch_size % ranks:
            wrong = f"{flag} {batch_size} does not divide by the {ranks} ranks"
            raise InputError(f"{wrong}; use a multiple of {ranks}")
        if parts > 1 and (batch_size % pieces or batch_size < 2 * pieces):
            wrong = f"--accumulate {parts}: {flag} {batch_size} does not divide into equal parts"
            advice = f"use a multiple of {pieces}, at least {2 * pieces}"
            raise InputError(f"{wrong} of two images or more; {advice}")

    def images_per_norm(self, batch_size: int) -> int:
        """How many images of a training batch one BatchNorm takes its statistics from."""
        parts = 1 if self.sync_bn else self.world_size * max(1, len(self.gpus))
        return max(1, batch_size // parts)

    def __str__(self) -> str:
        name = self.device.type
        if name == "cuda":
            ids = ", ".join(map(str, self.gpus))
            name = f"GPU {ids} ({torch.cuda.get_device_name(self.device)})"
        elif name == "cpu":
            name = f"CPU, {torch.get_num_threads()} threads"
        if self.acceleration != Acceleration():
            name += f", {self.acceleration}"
        return f"{self.world_size} ranks, each on {name}" if self.world_size > 1 else name


def select_runtime(
    device: str = "auto",
    gpus: Sequence[int] | None = None,
    sync_bn: bool = False,
    acceleration: Acceleration = Acceleration(),
    data_parallel: bool = True,
) -> Runtime:
    """Turn ``--device`` and ``--gpu`` into a runtime. Under ``torchrun``, join the other ranks.

    Args:
        device: ``auto`` (CUDA, else MPS, else the CPU), ``cpu``, ``cuda`` or ``mps``.
        gpus: CUDA ids; by default all visible ones. Under ``torchrun`` every rank takes one.
        data_parallel: without ranks, share batches among the GPUs; otherwise take the first one.

    Raises InputError for what this machine does not have, or cannot combine.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device, use = find_devices(device, gpus or ())
    if sync_bn and device != "cuda":
        raise InputError(f"--sync_bn needs GPUs: there is no such BatchNorm for {device}")
    if acceleration.amp == "fp16" and device != "cuda":
        raise InputError(f"--amp fp16 needs CUDA, not {device}; bf16 works on every device")
    compiler = os.environ.get("CXX", "g++")
    if acceleration.compile and device == "cpu" and not shutil.which(compiler):
        raise InputError(f"--compile needs a C++ compiler, and {compiler} is not there")
    if device == "mps":
        acceleration = replace(acceleration, channels_last=False)
    if ranks == 1:
        if sync_bn:
            raise InputError("--sync_bn is for several processes: name several GPUs with --gpu")
        use = use if data_parallel else use[:1]
        if len(use) > 1 and (acceleration.amp or acceleration.compile):
            advice = "leave --data_parallel out, or name one with --gpu"
            raise InputError(f"--amp and --compile take one GPU a process: {advice}")
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


def find_devices(device: str, gpus: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """The kind of device that is meant, and which GPUs; InputError for what is not there."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        accelerator = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if visible or gpus else accelerator
    if gpus and device != "cuda":
        raise InputError(f"--gpu needs --device cuda, not {device}")
    if absent := ",".join(str(gpu) for gpu in gpus if gpu >= visible):
        advice = "leave the flag out to use what there is"
        raise InputError(f"--gpu {absent}: torch sees {visible} GPUs here; {advice}")
    if device == "cuda" and not visible:
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: not available on this machine; use --device cpu")
    return device, tuple(gpus or range(visible)) if device == "cuda" else ()


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether an error says that another rank has died or left."""
    return dist.is_initialized() and bool(re.search(LOST, str(error), re.IGNORECASE))


def leave() -> None:
    """Leave the group of ranks, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; ``deterministic``: the same bits in every run on a device.

    Otherwise, cuDNN times its algorithms and takes the fastest.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
