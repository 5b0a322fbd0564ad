"""One training loop and one evaluation. Nothing here has heard of pruning."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models import GatedModel
from models.gate import folded_gates
from utils.data.batches import Batches
from utils.distributed import Runtime
from utils.errors import InputError, RunError
from utils.metrics import Metrics, RunningMetrics, progress
from utils.recipes import Recipe

# Batches between two looks at whether the loss is finite; each waits for the device.
CHECK_EVERY = 100
DIVERGED = "training has diverged; the last good checkpoint is kept; try a lower --lr"


def evaluate(
    model: GatedModel,
    batches: Batches,
    runtime: Runtime,
    after_batch: Callable[[], None] | None = None,
) -> Metrics:
    """Loss and accuracy of ``model`` in eval mode, over all ranks' batches; its mode is restored.

    Running statistics are those of rank 0, on every rank from here on. ``after_batch`` is called
    after every batch. Raises RunError, on every rank, where the loss is not finite.
    """
    runtime.sync_buffers(model)
    network, was_training = runtime.for_evaluation(model), model.training
    tally = RunningMetrics(runtime)
    model.eval()
    with torch.inference_mode(), folded_gates(model):
        for number, (images, labels) in enumerate(progress(batches, "evaluate", tally), start=1):
            logits = network(images)
            tally.add(logits, labels, F.cross_entropy(logits, labels), number)
            if after_batch:
                after_batch()
    model.train(was_training)
    tally.check("the evaluation", "weights, running statistics or images are broken")
    return tally.metrics()


def check_batch(model: GatedModel, image_size: int, images: int, flag: str) -> None:
    """Raise InputError where BatchNorm would see one value per channel: an image, a map of 1x1."""
    if images > 1:
        return
    shapes = copy.deepcopy(model).to("meta").train()
    try:
        with torch.no_grad():
            shapes(torch.empty(1, 3, image_size, image_size, device="meta"))
    except ValueError:
        raise InputError(
            f"{flag}: a single image of {image_size} pixels is no batch to train {model.net} on,"
            " whose last maps are of one pixel; BatchNorm needs two images or larger ones"
        ) from None


class Trainer:
    """A network with everything that trains it.

    Args:
        model: the bare network, trained in place.
        recipe: learning rate and schedule.
        runtime: where it runs.

    Attributes:
        network: the model in the form in which it is trained.
        scheduler: to be stepped once after every epoch.
    """

    _parts = ("optimizer", "scheduler", "scaler")

    def __init__(self, model: GatedModel, recipe: Recipe, runtime: Runtime):
        self.model, self.runtime = model, runtime
        self.network = runtime.for_training(model)
        self.optimizer = recipe.optimizer(model, fused=runtime.acceleration.fused)
        self.scheduler, self.scaler = recipe.scheduler(self.optimizer), runtime.scaler()

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        """All but the weights."""
        return {name: getattr(self, name).state_dict() for name in self._parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._parts:
            getattr(self, name).load_state_dict(state.get(name, {}))  # older files have no scaler

    def step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimiser; returns the logits and the mean loss before it."""
        with self.runtime.autocast():
            logits = self.network(images).float()
            loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return logits, loss

    def train(
        self, batches: Any, tally: RunningMetrics, where: str, done: int = 0
    ) -> Iterator[int]:
        """Go through the batches that follow number ``done``; yields the number of each.

        Raises RunError, naming ``where`` and the batch, where the loss is not finite.
        """
        self.network.train()
        with folded_gates(self.model):
            for number, batch in enumerate(batches, start=done + 1):
                logits, loss = self.step(*batch)
                tally.add(logits, batch[1], loss, number)
                if number % CHECK_EVERY == 0:
                    tally.check(where, DIVERGED)
                yield number
        tally.check(where, DIVERGED)

    def check_weights(self, where: str) -> None:
        """Raise RunError if the last step has left weights or statistics that are not finite."""
        tensors = self.model.state_dict().values()
        finite = [t.isfinite().all() for t in tensors if t.is_floating_point()]
        if not torch.stack(finite).all():
            raise RunError(f"the weights are not finite after {where}: {DIVERGED}")


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


class Callback:
    """What ``fit`` tells as it goes. ``state()`` makes what ``resume`` takes; all ranks call it."""

    def after_batch(self, batch: int, state: Callable[[], dict[str, Any]]) -> None:
        """``batch`` batches of an epoch are done."""

    def while_evaluating(self, state: Callable[[], dict[str, Any]]) -> None:
        """A batch of the evaluation behind an epoch is done."""

    def after_epoch(self, epoch: Epoch, state: Callable[[], dict[str, Any]]) -> None:
        """An epoch is done, and evaluated."""


def fit(
    model: GatedModel,
    train: Batches,
    test: Batches,
    recipe: Recipe,
    runtime: Runtime,
    *,
    callback: Callback | None = None,
    resume: Mapping[str, Any] | None = None,
    first_epoch: int = 0,
) -> list[Epoch]:
    """Train ``model`` in place by ``recipe``.

    Args:
        model: the bare network.
        train, test: batches, as ``utils.data.batches.Batches``.
        recipe: epochs, learning rate and schedule.
        runtime: where it runs.
        callback: is told of every batch and every epoch.
        resume: continue from such a state (the model's weights are the caller's to load).
        first_epoch: added to the number of the epoch that ``train`` is asked for; a later stage of
            the same run draws other orders and augmentations than an earlier one.

    Returns what every epoch did. Raises RunError, with epoch, batch and learning rate, where the
    loss is not finite any more.
    """
    callback, trainer = callback or Callback(), Trainer(model, recipe, runtime)
    start, batch, sums = 0, 0, None
    if resume is not None:
        trainer.load_state_dict(resume)
        start, batch, sums = resume["epoch"], resume["batch"], resume["sums"]

    def state(
        epoch: int, batch: int = 0, tally: RunningMetrics | None = None, where: str = ""
    ) -> dict[str, Any]:
        """After ``batch`` batches of the epoch that follows ``epoch`` whole ones."""
        if tally:
            tally.check(where, DIVERGED)  # what has diverged is never saved
            trainer.check_weights(where)
        sums = tally.all_sums() if tally else None
        return {"epoch": epoch, "batch": batch, "sums": sums, **trainer.state_dict()}

    history = []
    for epoch in range(start, recipe.epochs):
        train.set_epoch(first_epoch + epoch, batch)
        lr, began = trainer.lr, time.perf_counter()
        title = f"epoch {epoch + 1}/{recipe.epochs}"
        where = f"{title} at learning rate {lr:g}"
        tally = RunningMetrics(runtime, sums)
        done = batch
        for done in trainer.train(progress(train, title, tally), tally, where, batch):
            callback.after_batch(done, lambda: state(epoch, done, tally, where))  # noqa: B023
        trainer.check_weights(where)
        trained, seconds = tally.metrics(), time.perf_counter() - began

        # A long evaluation can be interrupted; ranks have not equally many batches to agree in.
        alone = runtime.world_size == 1
        stop = partial(callback.while_evaluating, partial(state, epoch, done, tally, where))
        tested = evaluate(model, test, runtime, stop if alone else None)
        with warnings.catch_warnings():
            # An epoch that is resumed behind its last batch has no step of the optimiser left.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            trainer.scheduler.step()
        images_now = trained.images - (sums[3] if sums else 0)
        batch, sums = 0, None
        history.append(Epoch(epoch + 1, lr, trained, tested, images_now / seconds))
        callback.after_epoch(history[-1], lambda: state(epoch + 1))  # noqa: B023
    return history
