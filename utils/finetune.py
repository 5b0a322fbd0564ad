"""One training loop and one evaluation. Nothing here has heard of pruning."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from models.gate import GatedModel, folded_gates
from utils.distributed import Runtime
from utils.errors import RunError
from utils.recipes import Recipe

CHECK_EVERY = (
    100  # batches between two looks at whether the loss is finite; each waits for the device
)


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

    def __init__(self, runtime: Runtime, sums: list[float] | None = None):
        self.runtime = runtime
        exact = torch.float32 if runtime.device.type == "mps" else torch.float64
        # Loss, top-1 hits, top-5 hits, images. Sums to go on from are those of all ranks.
        start = sums if sums is not None and runtime.is_main else [0.0] * 4
        self.sums = torch.tensor(start, dtype=exact, device=runtime.device)
        self.first_bad = torch.full((), math.inf, dtype=exact, device=runtime.device)

    def add(self, logits: Tensor, labels: Tensor, mean_loss: Tensor, batch: int = 0) -> None:
        best = logits.detach().topk(min(5, logits.shape[1])).indices
        hits = best == labels[:, None]
        loss = mean_loss.detach()
        images = self.sums.new_tensor(len(labels))
        self.sums += torch.stack([loss * len(labels), hits[:, 0].sum(), hits.sum(), images])
        bad = torch.where(torch.isfinite(loss), math.inf, float(batch))
        self.first_bad = torch.minimum(self.first_bad, bad)

    def all_sums(self) -> list[float]:
        """Over all ranks."""
        return self.runtime.sum(self.sums.clone()).tolist()

    def metrics(self, everywhere: bool = True) -> Metrics:
        """Of all ranks, or of this one."""
        loss, top1, top5, images = self.all_sums() if everywhere else self.sums.tolist()
        count = max(images, 1)
        return Metrics(loss / count, 100 * top1 / count, 100 * top5 / count, int(images))

    def check(self, where: str) -> None:
        """Raise RunError, on every rank, if the loss of a batch was not finite."""
        first = self.runtime.minimum(self.first_bad.clone()).item()
        if math.isfinite(first):
            raise RunError(
                f"the loss is not finite in {where}, batch {first:.0f}: training has diverged;"
                " the last good checkpoint is kept; try a lower --lr"
            )


def evaluate(
    model: GatedModel,
    batches: Any,
    runtime: Runtime,
    after_batch: Callable[[], None] | None = None,
) -> Metrics:
    """Loss and accuracy of ``model`` in eval mode, over all ranks' batches; its mode is restored.

    Running statistics are those of rank 0, on every rank from here on. ``after_batch`` is called
    after every batch.
    """
    runtime.sync_buffers(model)
    network, was_training = runtime.for_evaluation(model), model.training
    tally = _Tally(runtime)
    model.eval()
    with torch.inference_mode(), folded_gates(model):
        for images, labels in _bar(batches, "evaluate", tally):
            logits = network(images)
            tally.add(logits, labels, F.cross_entropy(logits, labels))
            if after_batch:
                after_batch()
    model.train(was_training)
    return tally.metrics()


class Watch:
    """What ``fit`` tells as it goes. ``state()`` makes what ``resume`` takes; all ranks call it."""

    def after_batch(self, batch: int, state: Callable[[], dict[str, Any]]) -> None:
        """``batch`` batches of an epoch are done."""

    def while_evaluating(self, state: Callable[[], dict[str, Any]]) -> None:
        """A batch of the evaluation behind an epoch is done."""

    def after_epoch(self, epoch: Epoch, state: Callable[[], dict[str, Any]]) -> None:
        """An epoch is done, and evaluated."""


def fit(
    model: GatedModel,
    train: Any,
    test: Any,
    recipe: Recipe,
    runtime: Runtime,
    *,
    watch: Watch | None = None,
    resume: Mapping[str, Any] | None = None,
    first_epoch: int = 0,
) -> list[Epoch]:
    """Train ``model`` in place by ``recipe``.

    Args:
        model: the bare network.
        train, test: batches, as ``utils.batches.Batches``.
        recipe: epochs, learning rate and schedule.
        runtime: where it runs.
        watch: is told of every batch and every epoch.
        resume: continue from such a state (the model's weights are the caller's to load).
        first_epoch: added to the number of the epoch that ``train`` is asked for; a later stage of
            the same run draws other orders and augmentations than an earlier one.

    Returns what every epoch did. Raises RunError, with epoch, batch and learning rate, where the
    loss is not finite any more.
    """
    watch = watch or Watch()
    network = runtime.for_training(model)
    optimizer = recipe.optimizer(model)
    scheduler, scaler = recipe.scheduler(optimizer), runtime.scaler()
    start, batch, sums = 0, 0, None
    if resume is not None:
        optimizer.load_state_dict(resume["optimizer"])
        scheduler.load_state_dict(resume["scheduler"])
        scaler.load_state_dict(resume.get("scaler", {}))  # not in older files
        start, batch, sums = resume["epoch"], resume["batch"], resume["sums"]

    def state(
        epoch: int, batch: int = 0, tally: _Tally | None = None, where: str = ""
    ) -> dict[str, Any]:
        """After ``batch`` batches of the epoch that follows ``epoch`` whole ones."""
        if tally:
            tally.check(where)  # what has diverged is never saved
            _check_weights(model, where)
        return {
            "epoch": epoch,
            "batch": batch,
            "sums": tally.all_sums() if tally else None,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": scaler.state_dict(),
        }

    history = []
    for epoch in range(start, recipe.epochs):
        train.set_epoch(first_epoch + epoch, batch)
        lr, began = optimizer.param_groups[0]["lr"], time.perf_counter()
        where = f"epoch {epoch + 1}/{recipe.epochs} at learning rate {lr:g}"
        tally = _Tally(runtime, sums)
        done = batch
        with folded_gates(model):
            for done in _train(network, train, optimizer, scaler, tally, batch, where):
                watch.after_batch(done, lambda: state(epoch, done, tally, where))  # noqa: B023
        _check_weights(model, where)
        trained, seconds = tally.metrics(), time.perf_counter() - began

        # A long evaluation can be interrupted; ranks have not equally many batches to agree in.
        alone = runtime.world_size == 1
        stop = partial(watch.while_evaluating, partial(state, epoch, done, tally, where))
        tested = evaluate(model, test, runtime, stop if alone else None)
        with warnings.catch_warnings():
            # An epoch that is resumed behind its last batch has no step of the optimiser left.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            scheduler.step()
        images_now = trained.images - (sums[3] if sums else 0)
        batch, sums = 0, None
        history.append(Epoch(epoch + 1, lr, trained, tested, images_now / seconds))
        watch.after_epoch(history[-1], lambda: state(epoch + 1))  # noqa: B023
    return history


def _train(
    network: nn.Module,
    batches: Any,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    tally: _Tally,
    batch: int,
    where: str,
) -> Iterator[int]:
    """Go through the batches behind number ``batch``; yields the number of each that is done."""
    network.train()
    title = where.partition(" at ")[0]
    for number, (images, labels) in enumerate(_bar(batches, title, tally), start=batch + 1):
        with tally.runtime.autocast():
            logits = network(images).float()
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        tally.add(logits, labels, loss, number)
        if number % CHECK_EVERY == 0:
            tally.check(where)
        yield number
    tally.check(where)


def _check_weights(model: GatedModel, where: str) -> None:
    """Raise RunError if the last step has left weights or statistics that are not finite."""
    finite = [t.isfinite().all() for t in model.state_dict().values() if t.is_floating_point()]
    if not torch.stack(finite).all():
        raise RunError(
            f"the weights are not finite after {where}: training has diverged;"
            " the last good checkpoint is kept; try a lower --lr"
        )


def _bar(batches: Any, title: str, tally: _Tally) -> Iterable[tuple[Tensor, Tensor]]:
    """The batches, behind a progress bar where there is a terminal to draw it on."""
    if not (tally.runtime.is_main and sys.stderr.isatty()):
        yield from batches
        return
    layout = "{desc} |{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}"
    with tqdm(batches, title, leave=False, dynamic_ncols=True, bar_format=layout) as bar:
        shown = began = time.perf_counter()
        for batch in bar:
            yield batch
            now = time.perf_counter()
            if now - shown > 0.5:  # reading the sums waits for the device
                shown, seen = now, tally.metrics(everywhere=False)
                speed = tally.runtime.world_size * seen.images / (now - began)
                status = f"loss {seen.loss:.3f}, {seen.accuracy:.1f} %, {speed:.0f} images/s"
                bar.set_postfix_str(status)
