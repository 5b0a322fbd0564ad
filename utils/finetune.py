"""One training loop and one evaluation. Nothing here knows of pruning."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import structure
from models.gate import folded_gates
from models.trace import on_meta
from utils.data.batches import Batches
from utils.distributed import Runtime
from utils.errors import InputError, RunError
from utils.metrics import Metrics, RunningMetrics
from utils.recipes import Recipe

CHECK_EVERY = 100  # batches between checks that the loss is finite; each waits for the device
DIVERGED = "training has diverged; the last good checkpoint is kept; try a lower --lr"


def evaluate(
    model: nn.Module, batches: Batches, runtime: Runtime, stop: Callable[[], None] | None = None
) -> Metrics:
    """Loss and accuracy of ``model`` in eval mode, over the batches of all ranks.

    First, every rank takes over the running statistics of rank 0. ``stop`` is called after every
    batch and may raise an error. Raises RunError, on every rank, if the loss is not finite.
    """
    runtime.sync_buffers(model)
    network, was_training = runtime.for_evaluation(model), model.training
    tally = RunningMetrics(runtime)
    model.eval()
    with torch.inference_mode(), folded_gates(model):
        for number, (images, labels) in enumerate(tally.follow(batches, "evaluate"), start=1):
            logits = network(images)
            tally.add(logits, labels, F.cross_entropy(logits, labels), number)
            if stop:
                stop()
    model.train(was_training)
    tally.check("the evaluation", "weights, running statistics or images are broken")
    return tally.metrics()


def check_batch(model: nn.Module, image_size: int, images: int, flag: str) -> None:
    """Raise InputError if BatchNorm would see one value per channel: one image, a map of 1x1."""
    if images > 1:
        return
    shapes = on_meta(model).train()
    try:
        with torch.no_grad():
            shapes(torch.empty(1, 3, image_size, image_size, device="meta"))
    except ValueError:
        raise InputError(
            f"{flag}: {structure(model).net} cannot train on a single image of {image_size} pixels:"
            " its last maps have one pixel, and BatchNorm needs more; use two images or larger ones"
        ) from None


@contextmanager
def head_alone(model: nn.Module) -> Iterator[None]:
    """Inside this context, only the classifier can be trained."""
    layer = model.get_submodule(structure(model).head)
    head = {id(parameter) for parameter in layer.parameters()}
    body = [p for p in model.parameters() if p.requires_grad and id(p) not in head]
    for parameter in body:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in body:
            parameter.requires_grad_(True)


class Trainer:
    """Trains ``model`` in place: its optimiser, its schedule (one step an epoch), its scaler.

    With ``recipe.ema``, the optimiser moves a copy, ``live``, and ``model`` is its average.
    """

    _parts = ("optimizer", "scheduler", "scaler")

    def __init__(
        self, model: nn.Module, recipe: Recipe, runtime: Runtime, teacher: nn.Module | None = None
    ):
        self.model, self.live, self.recipe, self.runtime = model, model, recipe, runtime
        self.average = None
        if recipe.ema:
            runtime.for_evaluation(model)  # to the device, before it is copied
            # Running statistics are averaged like weights: no pass over the data to estimate them.
            average = partial(_average, get_ema_multi_avg_fn(recipe.ema))
            self.average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
            self.live, self.average.module = self.average.module, model
        if recipe.distill:
            self.teacher = runtime.for_evaluation(teacher.eval())
        self.network = runtime.for_training(self.live)
        self.optimizer = recipe.optimizer(self.live, fused=runtime.acceleration.fused)
        self.scheduler = recipe.scheduler(self.optimizer)
        # Scales the loss so that fp16 can hold its gradients; does nothing for other types.
        fp16 = runtime.acceleration.amp == "fp16"
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=fp16)

    def state_dict(self) -> dict[str, Any]:
        """Everything except the weights of ``model``."""
        state = {name: getattr(self, name).state_dict() for name in self._parts}
        if self.average:
            state["live"] = dict(self.live.state_dict())
            state["averaged"] = self.average.n_averaged.item()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._parts:
            getattr(self, name).load_state_dict(state.get(name, {}))  # older files have no scaler
        if self.average:
            self.live.load_state_dict(state["live"])
            self.average.n_averaged.fill_(state["averaged"])

    def state(
        self, epoch: int, tally: RunningMetrics | None = None, where: str = "", batch: int = 0
    ) -> dict[str, Any]:
        """What ``fit`` resumes from, after ``epoch`` whole epochs and ``batch`` batches."""
        if tally:
            self.check(tally, where)  # a state that has diverged must never be saved
        sums = tally.all_sums() if tally else None
        return {"epoch": epoch, "batch": batch, "sums": sums, **self.state_dict()}

    def step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimiser; returns the logits and the mean loss from before it."""
        # The last batch of an epoch may be small, and BatchNorm needs two images in a part.
        parts = max(1, min(self.recipe.accumulate, len(labels) // 2))
        all_logits, losses = [], []
        self.optimizer.zero_grad(set_to_none=True)
        pairs = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
        for number, (some, theirs) in enumerate(pairs, start=1):
            with self.runtime.without_sync(self.network) if number < parts else nullcontext():
                with self.runtime.autocast():
                    logits = self.network(some).float()
                    loss = self.loss(logits, some, theirs) * (len(theirs) / len(labels))
                self.scaler.scale(loss).backward()
            all_logits.append(logits.detach())
            losses.append(loss.detach())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update_parameters(self.live)
        return torch.cat(all_logits), sum(losses)

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """(1 - alpha) cross-entropy + alpha T^2 KL(teacher || student), both softened by T.

        alpha is ``recipe.distill`` and T the temperature: Hinton et al. 2015, arXiv 1503.02531.
        """
        alpha, t = self.recipe.distill, self.recipe.temperature
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        if not alpha:
            return loss
        with torch.no_grad():
            soft = self.teacher(images).float()
        targets, guesses = (F.log_softmax(values / t, dim=1) for values in (soft, logits))
        divergence = F.kl_div(guesses, targets, reduction="batchmean", log_target=True)
        return (1 - alpha) * loss + alpha * t**2 * divergence

    def train(
        self, batches: Any, tally: RunningMetrics, where: str, done: int = 0
    ) -> Iterator[int]:
        """Train on the batches that follow batch ``done``, and yield the number of each.

        Raises RunError, naming ``where`` and the batch, if the loss or the weights diverge.
        """
        self.network.train()
        for norm in self.live.modules():
            if isinstance(norm, _BatchNorm) and norm.affine and not norm.weight.requires_grad:
                norm.eval()  # what is frozen keeps its statistics
        with folded_gates(self.live):
            for number, batch in enumerate(batches, start=done + 1):
                logits, loss = self.step(*batch)
                tally.add(logits, batch[1], loss, number)
                if number % CHECK_EVERY == 0:
                    tally.check(where, DIVERGED)
                yield number
        self.check(tally, where)

    def check(self, tally: RunningMetrics, where: str) -> None:
        """Raise RunError if a loss was, or weights or running statistics are, not finite."""
        tally.check(where, DIVERGED)
        tensors = self.model.state_dict().values()
        finite = [t.isfinite().all() for t in tensors if t.is_floating_point()]
        if not torch.stack(finite).all():
            raise RunError(f"the weights are not finite after {where}: {DIVERGED}")


def _average(
    move: Callable[..., None], averages: list[Tensor], values: list[Tensor], count: Tensor
) -> None:
    """Move averages of one type; whole numbers, such as the indices of a shortcut, are copied."""
    if averages[0].is_floating_point():
        move(averages, values, count)
    else:
        for average, value in zip(averages, values, strict=True):
            average.copy_(value)


@dataclass(frozen=True)
class Epoch:
    """What one epoch did; ``number`` counts from 1."""

    number: int
    lr: float
    train: Metrics
    test: Metrics
    images_per_second: float

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Epoch:
        """The inverse of ``dataclasses.asdict``; it ignores other keys."""
        train, test = (Metrics(**fields[part]) for part in ("train", "test"))
        return cls(fields["number"], fields["lr"], train, test, fields["images_per_second"])


class Callback:
    """What ``fit`` calls. ``state()`` returns a state for ``resume``; all ranks must call it."""

    def after_batch(self, batch: int, state: Callable[[], dict[str, Any]]) -> None:
        """Called when ``batch`` batches of an epoch are done."""

    def while_evaluating(self, state: Callable[[], dict[str, Any]]) -> None:
        """Called after every batch of the evaluation that follows an epoch; on one rank only."""

    def after_epoch(self, epoch: Epoch, state: Callable[[], dict[str, Any]]) -> None:
        """Called when an epoch is trained and evaluated."""


def fit(
    model: nn.Module,
    train: Batches,
    test: Batches,
    recipe: Recipe,
    runtime: Runtime,
    *,
    callback: Callback | None = None,
    resume: Mapping[str, Any] | None = None,
    first_epoch: int = 0,
    teacher: nn.Module | None = None,
) -> list[Epoch]:
    """Train ``model`` in place by ``recipe``, and return what every epoch did.

    Only parameters that require a gradient change. A BatchNorm without any stays in eval mode.

    Args:
        model: the bare network.
        train, test: batches to train on, and to evaluate on after every epoch.
        resume: continue from this state of a callback; ``model`` already holds its weights.
        first_epoch: epochs of earlier rounds, so that this one draws other orders and crops.
        teacher: the network whose outputs ``recipe.distill`` imitates; it does not change.

    Raises RunError, with epoch, batch and learning rate, if the loss is not finite.
    """
    callback, trainer = callback or Callback(), Trainer(model, recipe, runtime, teacher)
    start, batch, sums = 0, 0, None
    if resume is not None:
        trainer.load_state_dict(resume)
        start, batch, sums = resume["epoch"], resume["batch"], resume["sums"]
    history = []
    for epoch in range(start, recipe.epochs):
        train.set_epoch(first_epoch + epoch, batch)
        lr, began = trainer.optimizer.param_groups[0]["lr"], time.perf_counter()
        title = f"epoch {epoch + 1}/{recipe.epochs}"
        where = f"{title} at learning rate {lr:g}"
        tally = RunningMetrics(runtime, sums)
        state, done = partial(trainer.state, epoch, tally, where), batch
        for done in trainer.train(tally.follow(train, title, batch), tally, where, batch):
            callback.after_batch(done, partial(state, done))
        trained, seconds = tally.metrics(), time.perf_counter() - began
        images = trained.images - (sums[3] if sums else 0)  # without those before the resume

        # Ranks may have different numbers of batches, so a stop that they agree on would deadlock.
        alone = runtime.world_size == 1
        stop = partial(callback.while_evaluating, partial(state, done)) if alone else None
        tested = evaluate(model, test, runtime, stop)
        with warnings.catch_warnings():
            # After a resume at the end of an epoch, no optimiser step comes before this one.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            # torch 2.8's SequentialLR does what its own LinearLR warns of.
            warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")
            trainer.scheduler.step()
        batch, sums = 0, None
        history.append(Epoch(epoch + 1, lr, trained, tested, images / seconds))
        callback.after_epoch(history[-1], partial(trainer.state, epoch + 1))
    return history
