"""How long to train, and at which learning rates. The published recipes are at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class Cosine:
    """A linear rise, half a cosine down, and a constant end, all within a recipe's epochs."""

    warmup_epochs: int = 0  # length of the rise; at most half of all epochs
    warmup_lr: float | None = None  # of the first epoch; by default lr / (length of the rise + 1)
    min_lr: float = 0.0  # at the end of the cosine
    cooldown_epochs: int = 0  # length of the end; at most half of the epochs after the rise

    def scheduler(self, optimizer: Optimizer, epochs: int, lr: float) -> LRScheduler:
        """The schedule for so many epochs with the highest rate ``lr``; step it once an epoch."""
        warmup = min(self.warmup_epochs, epochs // 2)
        cooldown = min(self.cooldown_epochs, (epochs - warmup) // 2)
        descent = max(1, epochs - warmup - cooldown)
        start = lr / (warmup + 1) if self.warmup_lr is None else self.warmup_lr
        phases: dict[int, LRScheduler] = {}  # by their first epochs
        if warmup:
            phases[0] = lr_scheduler.LinearLR(optimizer, start / lr, 1, warmup)
        phases[warmup] = lr_scheduler.CosineAnnealingLR(optimizer, descent, self.min_lr)
        if cooldown:
            rest = lr_scheduler.ConstantLR(optimizer, self.min_lr / lr, epochs)
            phases[warmup + descent] = rest
        return lr_scheduler.SequentialLR(optimizer, list(phases.values()), list(phases)[1:])


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with momentum, a learning rate for every epoch, and the loss."""

    epochs: int
    lr: float  # the initial learning rate; with ``cosine``, the highest
    weight_decay: float  # L2 penalty on all parameters
    milestones: tuple[int, ...]  # after each of these epochs, the rate is multiplied by ``gamma``
    gamma: float
    momentum: float = 0.9
    cosine: Cosine | None = None  # replaces the milestones
    label_smoothing: float = 0.0  # share of the target that goes to all classes alike
    distill: float = 0.0  # weight of the distillation loss; see ``Trainer.loss``
    temperature: float = 4.0  # T of that loss
    ema: float | None = None  # decay of the average of the weights that is evaluated and saved
    accumulate: int = 1  # parts of a batch that pass through the network one after the other

    def adapted(self, epochs: int, **changes: float | Cosine | None) -> Recipe:
        """The recipe with another number of epochs. Milestones move in proportion, rounded up.

        ``changes`` are other values of attributes; None leaves the published value.
        """
        milestones = tuple(max(1, math.ceil(epochs * m / self.epochs)) for m in self.milestones)
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(self, epochs=epochs, milestones=milestones, **given)

    def optimizer(self, model: nn.Module, fused: bool = False) -> SGD:
        """SGD. With ``fused``, a step is one pass over the weights, with other bits."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # None lets torch choose: foreach on GPUs, which gives the same bits in fewer kernels.
        options = {"weight_decay": self.weight_decay, "fused": fused or None}
        return SGD(trainable, self.lr, self.momentum, **options)

    def scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """The schedule; step it once after every epoch."""
        if self.cosine:
            return self.cosine.scheduler(optimizer, self.epochs, self.lr)
        return lr_scheduler.MultiStepLR(optimizer, self.milestones, self.gamma)


@dataclass(frozen=True)
class Recipes:
    """How to train pruned networks."""

    one_shot: Recipe  # after everything is cut
    stage: Recipe  # between two cuts (--smooth, --steps)
    final: Recipe  # at the end of --smooth
    scratch: Recipe  # that of unpruned networks, for --from_scratch

    def adapted(
        self, epochs: int, stage_epochs: int | None, final_epochs: int | None, **changes: Any
    ) -> Recipes:
        """The recipes with other lengths; ``changes`` go to ``Recipe.adapted``, for all of them.

        If a length is None, it changes in proportion to ``epochs``, rounded up.
        """

        def adapt(recipe: Recipe, length: int | None) -> Recipe:
            if length is None:
                length = math.ceil(recipe.epochs * epochs / self.one_shot.epochs)
            return recipe.adapted(length, **changes)

        recipes = self.one_shot, self.stage, self.final, self.scratch
        return Recipes(*map(adapt, recipes, (epochs, stage_epochs, final_epochs, epochs)))


CIFAR_COSINE = Cosine(warmup_epochs=5)  # --cosine of the CIFAR scripts

# The published recipes for CIFAR: unpruned networks, then pruned ones.
CIFAR_BASELINE = Recipe(epochs=160, lr=0.1, weight_decay=1e-4, milestones=(60, 120), gamma=0.2)
CIFAR_RECIPES = Recipes(
    one_shot=Recipe(epochs=160, lr=0.01, weight_decay=5e-4, milestones=(60, 120), gamma=0.2),
    stage=Recipe(epochs=30, lr=0.01, weight_decay=5e-4, milestones=(5, 10), gamma=0.1),
    final=Recipe(epochs=45, lr=0.01, weight_decay=5e-4, milestones=(10, 15), gamma=0.2),
    scratch=CIFAR_BASELINE,
)

# The published recipes for pruned networks on ImageNet.
_IMAGENET = Recipe(epochs=120, lr=0.1, weight_decay=1e-4, milestones=(30, 60, 90), gamma=0.1)
IMAGENET_RECIPES = Recipes(
    one_shot=_IMAGENET,
    stage=Recipe(epochs=10, lr=0.01, weight_decay=5e-4, milestones=(5, 8), gamma=0.1),
    final=Recipe(epochs=45, lr=0.01, weight_decay=5e-4, milestones=(10, 15), gamma=0.2),
    scratch=_IMAGENET,  # torchvision's weights were trained by such a recipe, too
)
