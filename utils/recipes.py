"""Recipes: how long to train, and at which learning rates. The published ones are at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)


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
        """The schedule of so many epochs around the highest rate ``lr``, stepped once an epoch."""
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

    def optimizer(self, model: nn.Module, fused: bool = False) -> SGD:
        """The optimiser; ``fused`` makes one pass of every step, with other bits."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # None leaves the choice to torch: foreach on GPUs, the same bits in fewer kernels.
        return SGD(
            trainable, self.lr, self.momentum, weight_decay=self.weight_decay, fused=fused or None
        )

    def scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """The schedule, to be stepped once after every epoch."""
        if self.cosine:
            return self.cosine.scheduler(optimizer, self.epochs, self.lr)
        return MultiStepLR(optimizer, self.milestones, self.gamma)


@dataclass(frozen=True)
class Recipes:
    """How to train what is pruned.

    Attributes:
        one_shot: fine-tuning once everything is cut.
        stage: fine-tuning in between, where the cut comes in parts (``--smooth``, ``--steps``).
        final: fine-tuning at the end of ``--smooth``.
        scratch: the recipe of unpruned networks, for ``--from_scratch``.
    """

    one_shot: Recipe
    stage: Recipe
    final: Recipe
    scratch: Recipe

    def adapted(
        self, epochs: int, stage_epochs: int | None, final_epochs: int | None, *changes: Any
    ) -> Recipes:
        """Other lengths, and the further arguments of ``Recipe.adapted`` in all of them.

        A stage whose length is None keeps its share of the one shot's ``epochs``, rounded up.
        """

        def in_proportion(recipe: Recipe, own: int | None) -> Recipe:
            length = -(-recipe.epochs * epochs // self.one_shot.epochs) if own is None else own
            return recipe.adapted(length, *changes)

        return Recipes(
            self.one_shot.adapted(epochs, *changes),
            in_proportion(self.stage, stage_epochs),
            in_proportion(self.final, final_epochs),
            self.scratch.adapted(epochs, *changes),
        )


# --cosine of the CIFAR scripts.
CIFAR_COSINE = Cosine(warmup_epochs=5)

# The published recipe for unpruned networks on CIFAR.
CIFAR_BASELINE = Recipe(epochs=160, lr=0.1, weight_decay=1e-4, milestones=(60, 120), gamma=0.2)

# The published recipes for pruned networks on CIFAR.
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
    scratch=_IMAGENET,  # torchvision's weights, too, were trained by such a recipe
)
