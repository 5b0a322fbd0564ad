"""Training: recipes, one training loop, one evaluation. Nothing here has heard of pruning."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
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
class Recipe:
    """How to train: SGD with momentum on the cross-entropy, and a learning rate that changes
    between epochs.

    Attributes:
        epochs: length of the training.
        lr: the initial learning rate; with ``cosine``, the highest.
        weight_decay: L2 penalty on all parameters.
        milestones: epochs after which the learning rate is multiplied by ``gamma``.
        gamma: that factor.
        cosine: instead of the milestones, ``warmup`` epochs of linear rise and a half cosine down
            to zero.
        warmup: at most half of the epochs are spent on it.
    """

    epochs: int
    lr: float
    weight_decay: float
    milestones: tuple[int, ...]
    gamma: float
    momentum: float = 0.9
    cosine: bool = False
    warmup: int = 5

    def adapted(
        self,
        epochs: int,
        lr: float | None = None,
        weight_decay: float | None = None,
        cosine: bool = False,
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
        if not self.cosine:
            return MultiStepLR(optimizer, self.milestones, self.gamma)
        warmup = min(self.warmup, self.epochs // 2)
        cosine = CosineAnnealingLR(optimizer, max(1, self.epochs - warmup))
        if not warmup:
            return cosine
        return SequentialLR(
            optimizer, [LinearLR(optimizer, 1 / (warmup + 1), 1, warmup), cosine], [warmup]
        )


# The published recipe for unpruned networks on CIFAR; those for pruned ones are in
# utils/experiment.py.
CIFAR_BASELINE = Recipe(epochs=160, lr=0.1, weight_decay=1e-4, milestones=(60, 120), gamma=0.2)


@dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy and top-1 accuracy (per cent) over ``images`` images."""

    loss: float
    accuracy: float
    images: int

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} % of {self.images} test images right, loss {self.loss:.3f}"


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
        return cls(
            **{**fields, "train": Metrics(**fields["train"]), "test": Metrics(**fields["test"])}
        )


class _Tally:
    """Sums of loss and hits, kept on the device so that no batch waits for a transfer."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(
            2, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device
        )
        self.images = 0

    def add(self, logits: Tensor, labels: Tensor, mean_loss: Tensor) -> None:
        hits = (logits.argmax(1) == labels).sum()
        self.sums += torch.stack([mean_loss.detach() * len(labels), hits])
        self.images += len(labels)

    def metrics(self) -> Metrics:
        loss, hits = (self.sums / max(self.images, 1)).tolist()
        return Metrics(loss, 100 * hits, self.images)


def evaluate(
    model: GatedModel, batches: Iterable[tuple[Tensor, Tensor]], runtime: Runtime
) -> Metrics:
    """Loss and accuracy of ``model`` in eval mode; its mode is restored."""
    network, was_training = runtime.parallel(model), model.training
    tally = _Tally(runtime.device)
    model.eval()
    with torch.inference_mode():
        for images, labels in _bar(batches, "evaluate", tally):
            logits = network(images)
            tally.add(logits, labels, F.cross_entropy(logits, labels))
    model.train(was_training)
    return tally.metrics()


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
        train, test: batches, as ``utils.data.Batches``.
        recipe: epochs, learning rate and schedule.
        runtime: where it runs.
        on_epoch: called after every epoch with its results and a state for ``resume``.
        resume: continue from such a state (the model's weights are the caller's to load).
        first_epoch: added to the number of the epoch that ``train`` is asked for; a later stage of
            the same run draws other orders and augmentations than an earlier one.

    Returns what every epoch did. Raises InputError when the loss is not finite any more.
    """
    network = runtime.parallel(model)
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
    tally = _Tally(runtime.device)
    for images, labels in _bar(batches, title, tally):
        logits = network(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        tally.add(logits, labels, loss)
    return tally.metrics()


def _bar(batches: Sequence, title: str, tally: _Tally) -> Iterable[tuple[Tensor, Tensor]]:
    """The batches behind a progress bar, where there is a terminal to draw it on."""
    if not sys.stderr.isatty():
        yield from batches
        return
    with tqdm(
        batches, title, leave=False, dynamic_ncols=True, unit="batch", mininterval=0.5
    ) as bar:
        for i, (images, labels) in enumerate(bar):
            yield images, labels
            if i % 10 == 0:  # reading the sums waits for the device
                seen = tally.metrics()
                rate = tally.images / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(
                    f"loss {seen.loss:.3f}, accuracy {seen.accuracy:.1f} %, {rate:.0f} images/s",
                    refresh=False,
                )
