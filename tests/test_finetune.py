"""Recipes, schedules, the training loop and the evaluation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, random_model
from torch.optim import SGD

from utils.data.small import CIFAR10_NORMALISATION, ImageBatches, ImageSet
from utils.distributed import Runtime, select_runtime
from utils.errors import InputError, RunError
from utils.files import write_json
from utils.finetune import Callback, evaluate, fit
from utils.recipes import CIFAR_BASELINE, CIFAR_COSINE, CIFAR_RECIPES, Cosine, Recipe


def small_batches(count=24, batch_size=8, **options):
    stream = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 8, 8), generator=stream, dtype=torch.uint8)
    data = ImageSet(images, torch.arange(count) % 10)
    return ImageBatches(data, batch_size, CIFAR10_NORMALISATION, CPU, **options)


def rates(recipe):
    """The learning rate of every epoch."""
    optimizer = recipe.optimizer(torch.nn.Linear(1, 1))
    scheduler = recipe.scheduler(optimizer)
    seen = []
    for _ in range(recipe.epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_published_steps():
    seen = rates(CIFAR_BASELINE)
    assert seen == pytest.approx([0.1] * 60 + [0.02] * 60 + [0.004] * 40)
    stage = rates(CIFAR_RECIPES.stage)
    assert stage == pytest.approx([0.01] * 5 + [0.001] * 5 + [0.0001] * 20)
    final = rates(CIFAR_RECIPES.final)
    assert final == pytest.approx([0.01] * 10 + [0.002] * 5 + [0.0004] * 30)
    assert CIFAR_RECIPES.one_shot.weight_decay == 5e-4 and CIFAR_BASELINE.weight_decay == 1e-4


@pytest.mark.parametrize("epochs", range(1, 170))
def test_milestones_scale_with_the_epochs(epochs):
    expected = tuple(max(1, math.ceil(epochs * share)) for share in (3 / 8, 3 / 4))
    assert CIFAR_BASELINE.adapted(epochs).milestones == expected


def test_stage_lengths_keep_their_share():
    def lengths(*args):
        recipes = CIFAR_RECIPES.adapted(*args)
        return recipes.one_shot.epochs, recipes.stage.epochs, recipes.final.epochs

    assert lengths(160, None, None) == (160, 30, 45)
    assert lengths(2, None, None) == (2, 1, 1)
    assert lengths(0, None, None) == (0, 0, 0)
    assert lengths(16, 7, None) == (16, 7, 5)


def test_cosine_warms_up_and_ends_at_zero():
    recipe = CIFAR_BASELINE.adapted(45, lr=0.4, cosine=CIFAR_COSINE)
    seen = rates(recipe)
    assert seen[:5] == pytest.approx([0.4 * k / 6 for k in range(1, 6)])
    assert seen[5:] == pytest.approx([0.2 * (1 + math.cos(math.pi * k / 40)) for k in range(40)])
    for epochs in (1, 2, 3):
        assert max(rates(CIFAR_BASELINE.adapted(epochs, cosine=CIFAR_COSINE))) <= 0.1


def test_cosine_of_imagenet_warms_up_and_cools_down():
    cosine = Cosine(warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, cooldown_epochs=10)
    seen = rates(CIFAR_BASELINE.adapted(40, cosine=cosine))
    assert seen[:5] == pytest.approx([1e-6 + k / 5 * (0.1 - 1e-6) for k in range(5)])
    cosines = [(1 + math.cos(math.pi * k / 25)) / 2 for k in range(25)]
    assert seen[5:30] == pytest.approx([1e-5 + (0.1 - 1e-5) * c for c in cosines])
    assert seen[30:] == pytest.approx([1e-5] * 10)


def test_fit_equals_a_plain_loop():
    """On the same batches, to the bit: SGD, cross-entropy, one step of the schedule per epoch."""
    losses = []
    model, train, test = random_model("gateresnet20"), small_batches(augment=True), small_batches()
    plain = copy.deepcopy(model).train()
    recipe = Recipe(epochs=2, lr=0.05, weight_decay=1e-3, milestones=(1,), gamma=0.5)
    optimizer = SGD(
        [p for p in plain.parameters() if p.requires_grad], 0.05, 0.9, weight_decay=1e-3
    )
    for epoch, lr in ((3, 0.05), (4, 0.025)):
        optimizer.param_groups[0]["lr"] = lr
        train.set_epoch(epoch)
        for images, labels in train:
            optimizer.zero_grad()
            loss = F.cross_entropy(plain(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())  # of batches of one size
    history = fit(model, train, test, recipe, CPU, first_epoch=3)
    means = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert [epoch.train.loss for epoch in history] == pytest.approx(means, rel=1e-6)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert [(epoch.number, epoch.lr) for epoch in history] == [(1, 0.05), (2, 0.025)]
    assert history[-1].test == evaluate(model, test, CPU)


def test_no_epochs_change_nothing():
    model = random_model("gateresnet20")
    before = copy.deepcopy(model.state_dict())
    recipe = CIFAR_RECIPES.one_shot.adapted(0)
    assert fit(model, small_batches(augment=True), small_batches(), recipe, CPU) == []
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("cosine", [None, Cosine(warmup_epochs=2, cooldown_epochs=1)])
def test_fit_continues_to_the_same_bits(tmp_path, cosine):
    recipe = Recipe(4, 0.05, 1e-3, milestones=(2,), gamma=0.5, cosine=cosine)
    model, train, test = random_model("gateresnet20"), small_batches(augment=True), small_batches()
    states = []

    class Keep(Callback):
        def after_batch(self, batch, state):
            states.append(tmp_path / f"{len(states)}.pt")
            torch.save({"model": model.state_dict(), "training": state()}, states[-1])

        def after_epoch(self, epoch, state):
            self.after_batch(0, state)

    whole = fit(model, train, test, recipe, CPU, callback=Keep())
    assert len(states) == 4 * (3 + 1)
    for path in states[::3]:
        saved = torch.load(path, weights_only=True)
        resumed = random_model("gateresnet20")
        resumed.load_state_dict(saved["model"])
        rest = fit(
            resumed, small_batches(augment=True), test, recipe, CPU, resume=saved["training"]
        )
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), (path.name, name)
        for ours, theirs in zip(reversed(rest), reversed(whole), strict=False):
            assert (ours.train, ours.test, ours.lr) == (theirs.train, theirs.test, theirs.lr)


def test_evaluation_counts_every_image_and_restores_the_mode():
    model = random_model("gateresnet20").train()
    before = copy.deepcopy(model.state_dict())
    metrics = evaluate(model, small_batches(23, 10), CPU)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.eval()
    ((images, labels),) = small_batches(23, 23)
    logits = model(images)
    assert metrics.images == 23
    assert metrics.accuracy == pytest.approx(100 * (logits.argmax(1) == labels).double().mean())
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_with_epoch_batch_and_rate():
    train, test = small_batches(augment=True), small_batches()
    recipe = Recipe(2, 0.1, 0, milestones=(1,), gamma=1)
    model = random_model("gateresnet20")
    seen = []

    class Poison(Callback):
        def after_batch(self, batch, state):
            seen.append(batch)
            if len(seen) == 4:
                model.linear.weight.data.fill_(float("nan"))

    message = r"not finite in epoch 2/2 at learning rate 0\.1, batch 2: training has diverged"
    with pytest.raises(RunError, match=message):
        fit(model, train, test, recipe, CPU, callback=Poison())
    assert seen == [1, 2, 3, 1, 2, 3]

    class PoisonLast(Callback):
        def after_batch(self, batch, state):
            if batch == 3:
                model.linear.weight.data.fill_(float("inf"))

    model = random_model("gateresnet20")
    with pytest.raises(RunError, match="weights are not finite after epoch 1/2"):
        fit(model, train, test, recipe, CPU, callback=PoisonLast())
    model.linear.weight.data.fill_(float("nan"))

    class Save(Callback):
        def after_batch(self, batch, state):
            state()

    with pytest.raises(RunError, match="batch 1"):  # what has diverged is not to be saved
        fit(model, train, test, recipe, CPU, callback=Save())


def test_an_evaluation_that_is_not_finite_ends_the_run():
    model, test = random_model("gateresnet20"), small_batches()
    message = r"^the loss is not finite in the evaluation, batch 1: [^-]*broken$"
    broken = copy.deepcopy(model)
    broken.bn1.running_mean.fill_(float("nan"))
    with pytest.raises(RunError, match=message):
        evaluate(broken, test, CPU)

    class Poison(Callback):
        def after_batch(self, batch, state):
            model.linear.weight.data[0, 0] = 3e38  # finite, and no training follows

    recipe = Recipe(1, 0.1, 0, milestones=(1,), gamma=1)
    train = small_batches(batch_size=24, augment=True)
    with pytest.raises(RunError, match="not finite in the evaluation, batch 1"):
        fit(model, train, test, recipe, CPU, callback=Poison())


def test_an_evaluation_that_is_not_finite_on_one_rank_ends_all_of_them():
    class First(Runtime):
        def reduce(self, values, how):
            return values.clamp(max=2) if how == "MIN" else values  # the other's second is bad

    with pytest.raises(RunError, match="evaluation, batch 2"):
        evaluate(random_model("gateresnet20"), small_batches(), First(torch.device("cpu")))


def test_json_holds_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "result.json", {"loss": math.nan})
    assert not list(tmp_path.iterdir())


def test_devices(monkeypatch):
    assert select_runtime("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert select_runtime() == Runtime(torch.device("cuda", 0), (0, 1, 2, 3))
    assert select_runtime("auto", (2, 1)) == Runtime(torch.device("cuda", 2), (2, 1))
    with pytest.raises(InputError, match=r"--gpu 4,7: torch sees 4 GPUs"):
        select_runtime("auto", (0, 4, 7))
    with pytest.raises(InputError, match="--gpu needs --device cuda"):
        select_runtime("cpu", (0,))


def test_several_gpus_share_a_batch_through_dataparallel(monkeypatch):
    """The wiring only; DataParallel itself needs the hardware."""
    made = []

    def wrapper(model, ids):
        made.append((model, ids))
        return model

    monkeypatch.setattr(torch.nn, "DataParallel", wrapper)
    model = random_model("gateresnet20")
    monkeypatch.setattr(model, "to", lambda device: model)
    two = Runtime(torch.device("cuda", 1), (1, 3))
    two.for_training(model), two.for_evaluation(model)
    assert made == [(model, [1, 3])] * 2
    assert Runtime(torch.device("cuda", 1), (1,)).for_training(model) is model
    assert len(made) == 2
