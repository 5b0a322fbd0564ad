"""--label_smoothing, --distill, --ema and --accumulate: what they compute, and where they go."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    CPU,
    batches_of,
    random_model,
    relative_difference,
    run_gfbs,
    run_train,
    spy,
)
from torch import nn
from torch.optim import SGD

import gfbs_cifar
from utils.checkpoint import load_checkpoint, load_model
from utils.cli import settings
from utils.data.small import load_data
from utils.distributed import Acceleration, Runtime
from utils.errors import InputError
from utils.finetune import evaluate, fit
from utils.recipes import Recipe
from utils.run.existing import differences

PLAIN = Recipe(epochs=2, lr=0.02, weight_decay=1e-3, milestones=(1,), gamma=0.5)
OPTIONS = {
    "label smoothing": {"label_smoothing": 0.2},
    "distillation": {"distill": 0.7, "temperature": 3.0},
    "distillation alone": {"distill": 1.0},
    "average": {"ema": 0.6},
    "parts": {"accumulate": 3},
    "all": {"label_smoothing": 0.2, "distill": 0.7, "ema": 0.6, "accumulate": 3},
}


def batches():
    """Six batches an epoch; the last has 2 images, which is one part."""
    made = batches_of(load_data("synthetic", "unused", 8), 9, limit_train=3, limit_test=1)
    made.train.source = made.train.source[:20]
    made.train.__post_init__()
    return made.train, made.test


def plain_loop(model, teacher, recipe, train):
    """Training as the papers write it, without torch's losses; returns the network to use."""
    average, teacher = None, teacher.eval()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = SGD(trainable, recipe.lr, 0.9, weight_decay=recipe.weight_decay)
    for epoch in range(recipe.epochs):
        model.train()
        train.set_epoch(epoch)
        optimizer.param_groups[0]["lr"] = recipe.lr * recipe.gamma**epoch
        for images, labels in train:
            optimizer.zero_grad()
            size = len(images) // (recipe.accumulate if len(images) == 9 else 1)
            for part, right in zip(images.split(size), labels.split(size), strict=True):
                logits = model(part)
                shares = logits.exp() / logits.exp().sum(1, keepdim=True)
                target = nn.functional.one_hot(right, logits.shape[1]).float()
                target = target * (1 - recipe.label_smoothing) + recipe.label_smoothing / 10
                loss = -(target * shares.log()).sum(1)
                if recipe.distill:
                    t = recipe.temperature
                    soft = (logits / t).softmax(1)
                    ideal = (teacher(part) / t).softmax(1).detach()
                    far = (ideal * (ideal.log() - soft.log())).sum(1)
                    loss = (1 - recipe.distill) * loss + recipe.distill * t * t * far
                (loss.sum() / len(images)).backward()
            optimizer.step()
            now = model.state_dict()
            if average is None or not recipe.ema:
                average = copy.deepcopy(now)
            for name, value in average.items():
                if value.is_floating_point() and recipe.ema:
                    average[name] = recipe.ema * value + (1 - recipe.ema) * now[name]
    return average


def train_by(recipe, runtime=CPU):
    """The weights before and after, and the teacher."""
    model, teacher = random_model("gateresnet20"), random_model("gateresnet20")
    nn.init.normal_(teacher.linear.weight, std=0.3)
    before = copy.deepcopy(model)
    fit(model, *batches(), recipe, runtime, teacher=teacher)
    return before, model, teacher


@pytest.fixture(scope="module")
def plain():
    """A network that was trained without an option, and a teacher that was not used."""
    return train_by(PLAIN)[1:]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_computes_what_a_plain_loop_does(options, plain):
    """The option changes the weights of the network, and leaves those of the teacher alone."""
    recipe = replace(PLAIN, **options)
    before, model, teacher = train_by(recipe)
    assert relative_difference(plain[0].conv1.weight, model.conv1.weight) > 1e-3
    for name, tensor in plain[1].state_dict().items():
        assert torch.equal(tensor, teacher.state_dict()[name]), name
    assert teacher.conv1.weight.grad is None
    expected = plain_loop(before, teacher, recipe, batches()[0])
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.abs().max() > 1e-3:
            assert relative_difference(expected[name], tensor) < 2e-3, name


def test_gradients_of_all_parts_but_the_last_stay_on_their_rank(monkeypatch):
    events = []

    class Context(nullcontext):
        def __enter__(self):
            events.append("kept")

    monkeypatch.setattr(Runtime, "without_sync", lambda *_: Context())
    monkeypatch.setattr(SGD, "step", lambda *_: events.append("step"))
    train_by(replace(PLAIN, accumulate=3, epochs=1))
    assert events == ["kept", "kept", "step"] * 2 + ["step"]


def test_options_go_with_mixed_precision():
    runtime = Runtime(CPU.device, acceleration=Acceleration("bf16", channels_last=True))
    recipe = replace(PLAIN, **OPTIONS["all"])
    _, exact, _ = train_by(recipe)
    _, mixed, _ = train_by(recipe, runtime)
    assert 0 < relative_difference(exact.conv1.weight, mixed.conv1.weight) < 0.1


def test_an_average_reads_the_channels_that_its_checkpoint_reads():
    """What is not in the state dict, such as the indices of shortcuts, is not averaged."""
    model = random_model("gateresnet20")
    rebuilt = copy.deepcopy(model)
    train, test = batches()
    fit(model, train, test, replace(PLAIN, ema=0.9), CPU)
    rebuilt.load_state_dict(model.state_dict())
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(model.eval()(images), rebuilt.eval()(images))


FLAGS = ["--label_smoothing", "0.1", "--ema", "0.5", "--accumulate", "2"]
DISTILL = ["--distill", "0.5", "--temperature", "2"]


def test_flags_reach_every_part_of_the_training(trained, monkeypatch):
    def note(model, train, test, recipe, runtime, **options):
        return recipe, options["teacher"].group_widths() == widths

    widths = load_model(trained / "model_best.pth").group_widths()
    seen = spy(monkeypatch, gfbs_cifar, "fit", note)
    for way in (
        [],
        ["--smooth", "--smooth_epochs", "1", "--final_epochs", "1"],
        ["--steps", "2", "--step_epochs", "1"],
        ["--from_scratch"],
    ):
        seen.clear()
        run_gfbs(*FLAGS, *DISTILL, *way, "--limit_train_batches", "1")
        assert seen and all(unpruned for _, unpruned in seen)
        for recipe, _ in seen:
            found = recipe.label_smoothing, recipe.ema, recipe.accumulate
            assert (*found, recipe.distill, recipe.temperature) == (0.1, 0.5, 2, 0.5, 2)


def test_the_average_is_evaluated_and_saved(place):
    result = run_train("--ema", "0.5")
    folder = Path("checkpoints/gateresnet20_folder")
    data = load_data("folder", "images", 16)
    for name, kind in (("last.pth", "last"), ("model_best.pth", "best")):
        found = evaluate(load_model(folder / name), batches_of(data, 8).test, CPU)
        assert found.accuracy == pytest.approx(result["accuracy"][kind])
    last = load_checkpoint(folder / "last.pth")
    live = last.meta["training"]["live"]
    assert live.keys() == last.model.state_dict().keys()
    assert not torch.equal(live["conv1.weight"], last.model.conv1.weight)


def test_another_value_is_another_run_and_older_runs_had_none(place):
    run_train(*FLAGS)
    other = ["--label_smoothing", "0.2", "--ema", "0.6", "--accumulate", "4"]
    for k in (0, 2, 4):
        changed = [*FLAGS[:k], *other[k : k + 2], *FLAGS[k + 2 :]]
        with pytest.raises(InputError, match=f"another configuration .{FLAGS[k][2:]}: "):
            run_train(*changed, "--resume")
    config = settings.configuration(gfbs_cifar.parse_args([]))
    added = ("label_smoothing", "ema", "accumulate", "distill", "temperature")
    older = {name: value for name, value in config.items() if name not in added}
    assert len(older) == len(config) - 5 and not differences(older, config)
    for argv in (FLAGS[:2], FLAGS[2:4], FLAGS[4:], DISTILL[:2]):
        changed = settings.configuration(gfbs_cifar.parse_args(argv))
        assert differences(older, changed) == f"{argv[0][2:]}: None there, {argv[1]} here"


@pytest.mark.parametrize("bs, parts", [("8", "3"), ("8", "8"), ("2", "4")])
def test_a_batch_that_does_not_divide_is_refused(place, bs, parts):
    advice = f"use a multiple of {parts}, at least {2 * int(parts)}"
    with pytest.raises(InputError, match=f"--accumulate {parts}: --bs {bs} does not.*{advice}"):
        run_train("--bs", bs, "--accumulate", parts)
    assert not list(place.glob("checkpoints"))
    with pytest.raises(InputError, match="--accumulate 2: --bs 8 .*a multiple of 8, at least 16"):
        Runtime(CPU.device, world_size=4).share(8, "--bs", 2)
