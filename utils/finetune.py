"""Training: recipes, one training loop, one evaluation. Nothing here has heard of pruning."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)
from tqdm import tqdm

from models.gate import GatedModel
from utils.distributed import Runtime
from utils.errors import InputError


@dataclass(frozen=True)
class Cosine:
    """A linear rise, half a cosine down, and a rest at the bottom, all within a recipe's epochs.

    Attributes:
        warmup_epochs: length of the rise; at most half of all epochs are spent on it.
        warmup_lr: where it begins; by default one step below the first step, so not quite at zero.
        min_lr: where the cosine ends.
        cooldown_epochs: length of the rest; at most half of what the rise leaves.
    """

    warmup_epochs: int = 0
    warmup_lr: float | None = None
    min_lr: float = 0.0
    cooldown_epochs: int = 0

    def scheduler(self, optimizer: Optimizer, epochs: int, lr: float) -> LRScheduler:
        warmup = min(self.warmup_epochs, epochs // 2)
        cooldown = min(self.cooldown_epochs, (epochs - warmup) // 2)
        descent = max(1, epochs - warmup - cooldown)
        start = lr / (warmup + 1) if self.warmup_lr is None else self.warmup_lr
        phases = {
            0: LinearLR(optimizer, start / lr, 1, warmup) if warmup else None,
            warmup: CosineAnnealingLR(optimizer, descent, self.min_lr),
            warmup + descent: ConstantLR(optimizer, self.min_lr / lr, epochs) if cooldown else None,
        }
        phases = {begin: phase for begin, phase in phases.items() if phase is not None}
        return SequentialLR(optimizer, list(phases.values()), list(phases)[1:])


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with momentum on the cross-entropy, and a learning rate for every epoch.

    Attributes:
        epochs: length of the training.
        lr: the initial learning rate; with ``cosine``, the highest.
        weight_decay: L2 penalty on all parameters.
        milestones: epochs after which the learning rate is multiplied by ``gamma``.
        gamma: that factor.
        cosine: the schedule that takes the place of the milestones, if any.
    """

    epochs: int
    lr: float
    weight_decay: float
    milestones: tuple[int, ...]
    gamma: float
    momentum: float = 0.9
    cosine: Cosine | None = None

    def adapted(
        self,
        epochs: int,
        lr: float | None = None,
        weight_decay: float | None = None,
        cosine: Cosine | None = None,
    ) -> Recipe:
        """The recipe in another number of epochs, with what the command line asks for.

        Milestones move in proportion, rounded up to at least 1. None leaves a value as published.
        """
        return replace(
            self,
            epochs=epochs,
            milestones=tuple(max(1, -(-epochs * m // self.epochs)) for m in self.milestones),
            lr=self.lr if lr is None else lr,
            weight_decay=self.weight_decay if weight_decay is None else weight_decay,
            cosine=cosine,
        )

    def optimizer(self, model: nn.Module) -> SGD:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return SGD(trainable, self.lr, self.momentum, weight_decay=self.weight_decay)

    def scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """The schedule, to be stepped once after every epoch."""
        if self.cosine:
            return self.cosine.scheduler(optimizer, self.epochs, self.lr)
        return MultiStepLR(optimizer, self.milestones, self.gamma)


# --cosine of the CIFAR scripts.
CIFAR_COSINE = Cosine(warmup_epochs=5)

# The published recipe for unpruned networks on CIFAR; those for pruned ones are in
# utils/experiment.py.
CIFAR_BASELINE = Recipe(epochs=160, lr=0.1, weight_decay=1e-4, milestones=(60, 120), gamma=0.2)


@dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy, top-1 and top-5 accuracy (per cent) over ``images`` images."""

    loss: float
    accuracy: float
    top5: float
    images: int

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} % of {self.images} images right, loss {self.loss:.3f}"


@dataclass(frozen=True)
class Epoch:
    """What one epoch did; ``number`` counts from 1."""

    number: int
    lr: float
    train: Metrics
    test: Metrics
    images_per_second: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Epoch:
        """The inverse of ``as_dict``; what else there is, is ignored."""
        train, test = (Metrics(**fields[part]) for part in ("train", "test"))
        return cls(fields["number"], fields["lr"], train, test, fields["images_per_second"])


class _Tally:
    """Sums of loss and hits, kept on the device so that no batch waits for a transfer."""

    def __init__(self, runtime: Runtime):
        exact = torch.float32 if runtime.device.type == "mps" else torch.float64
        self.sums = torch.zeros(3, dtype=exact, device=runtime.device)
        self.images = 0

    def add(self, logits: Tensor, labels: Tensor, mean_loss: Tensor) -> None:
        best = logits.detach().topk(min(5, logits.shape[1])).indices
        hits = best == labels[:, None]
        loss = mean_loss.detach() * len(labels)
        self.sums += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
        self.images += len(labels)

    def metrics(self, runtime: Runtime | None = None) -> Metrics:
        """Of this process, or of all ranks of a runtime."""
        sums = torch.cat([self.sums, self.sums.new_tensor([self.images])])
        loss, top1, top5, images = (runtime.sum(sums) if runtime else sums).tolist()
        count = max(images, 1)
        return Metrics(loss / count, 100 * top1 / count, 100 * top5 / count, int(images))


def evaluate(model: GatedModel, batches: Any, runtime: Runtime) -> Metrics:
    """Loss and accuracy of ``model`` in eval mode, over all ranks' batches; its mode is restored.

    Running statistics are those of rank 0, on every rank from here on.
    """
    runtime.sync_buffers(model)
    network, was_training = runtime.for_evaluation(model), model.training
    tally = _Tally(runtime)
    model.eval()
    with torch.inference_mode():
        for images, labels in _bar(batches, "evaluate", tally, runtime):
            logits = network(images)
            tally.add(logits, labels, F.cross_entropy(logits, labels))
    model.train(was_training)
    return tally.metrics(runtime)


def fit(
    model: GatedModel,
    train: Any,
    test: Any,
    recipe: Recipe,
    runtime: Runtime,
    *,
    on_epoch: Callable[[Epoch, dict[str, Any]], None] | None = None,
    resume: dict[str, Any] | None = None,
    first_epoch: int = 0,
) -> list[Epoch]:
    """Train ``model`` in place by ``recipe``.

    Args:
        model: the bare network.
        train, test: batches, as ``utils.batches.Batches``.
        recipe: epochs, learning rate and schedule.
        runtime: where it runs.
        on_epoch: called after every epoch with its results and a state for ``resume``.
        resume: continue from such a state (the model's weights are the caller's to load).
        first_epoch: added to the number of the epoch that ``train`` is asked for; a later stage of
            the same run draws other orders and augmentations than an earlier one.

    Returns what every epoch did. Raises InputError when the loss is not finite any more.
    """
    network = runtime.for_training(model)
    optimizer = recipe.optimizer(model)
    scheduler = recipe.scheduler(optimizer)
    start = 0
    if resume is not None:
        optimizer.load_state_dict(resume["optimizer"])
        scheduler.load_state_dict(resume["scheduler"])
        start = resume["epoch"]
    history = []
    for epoch in range(start, recipe.epochs):
        train.set_epoch(first_epoch + epoch)
        lr, began = optimizer.param_groups[0]["lr"], time.perf_counter()
        trained = _train_epoch(
            network, train, optimizer, runtime, f"epoch {epoch + 1}/{recipe.epochs}"
        )
        seconds = time.perf_counter() - began
        if not math.isfinite(trained.loss):
            raise InputError(
                f"the loss is {trained.loss} in epoch {epoch + 1} at learning rate {lr:g};"
                " try a lower --lr"
            )
        scheduler.step()
        history.append(
            Epoch(epoch + 1, lr, trained, evaluate(model, test, runtime), trained.images / seconds)
        )
        if on_epoch:
            state = {
                "epoch": epoch + 1,
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
            }
            on_epoch(history[-1], state)
    return history


def _train_epoch(
    network: nn.Module, batches: Any, optimizer: Optimizer, runtime: Runtime, title: str
) -> Metrics:
    network.train()
    tally = _Tally(runtime)
    for images, labels in _bar(batches, title, tally, runtime):
        logits = network(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        tally.add(logits, labels, loss)
    return tally.metrics(runtime)


def _bar(
    batches: Any, title: str, tally: _Tally, runtime: Runtime
) -> Iterable[tuple[Tensor, Tensor]]:
    """The batches, behind a progress bar where there is a terminal to draw it on."""
    if not (runtime.is_main and sys.stderr.isatty()):
        yield from batches
        return
    layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}"
    with tqdm(batches, title, leave=False, dynamic_ncols=True, bar_format=layout) as bar:
        shown = began = time.perf_counter()
        for batch in bar:
            yield batch
            now = time.perf_counter()
            if now - shown > 0.5:  # reading the sums waits for the device
                shown, seen = now, tally.metrics()
                speed = runtime.world_size * seen.images / (now - began)
                status = f"loss {seen.loss:.3f}, {seen.accuracy:.1f} %, {speed:.0f} images/s"
                bar.set_postfix_str(status)
