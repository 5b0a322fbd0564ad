"""Mixed precision, memory layout and compilation: the same network, sooner."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CPU,
    batches_of,
    die_after,
    one_run,
    random_batch,
    random_model,
    relative_difference,
    run_gfbs,
    same_weights,
)
from torch import nn

import train
from models import Gate, build_model
from models.gate import folded_gates
from utils.cli import settings
from utils.data.small import load_data
from utils.distributed import Acceleration, Runtime, seed_everything, select_runtime
from utils.errors import InputError
from utils.finetune import Trainer, evaluate, fit
from utils.recipes import Recipe

RECIPE = Recipe(epochs=2, lr=0.05, weight_decay=1e-4, milestones=(1,), gamma=0.2)
FAST = [
    Acceleration(amp="bf16"),
    Acceleration(channels_last=True),
    Acceleration(fused=True),
    Acceleration("bf16", channels_last=True, compile=True),
]


def batches(limit=12):
    data = load_data("synthetic", "unused", 8)
    batches = batches_of(data, 64, limit_train=limit, limit_test=1)
    return batches.train, batches.test


def runtime_with(acceleration):
    return Runtime(torch.device("cpu"), acceleration=acceleration)


def trained_with(acceleration, model):
    train, test = batches()
    epochs = fit(model, train, test, RECIPE, runtime_with(acceleration))
    return [epoch.train.loss for epoch in epochs]


def fresh_resnet():
    torch.manual_seed(0)
    return build_model("gateresnet20")


def two_blocks():
    """Few layers, or the compiler takes a minute."""
    model = fresh_resnet()
    model.layer1, model.layer2, model.layer3 = nn.Identity(), model.layer2[:1], model.layer3[:1]
    return model


@pytest.fixture(scope="module")
def plain():
    return trained_with(Acceleration(), two_blocks())


@pytest.mark.parametrize("acceleration", FAST, ids=str)
def test_the_loss_falls_as_it_does_without(acceleration, plain):
    model = two_blocks()
    fast = trained_with(acceleration, model)
    assert plain[1] < plain[0] - 0.05  # something is learned at all
    assert fast == pytest.approx(plain, rel=0.03)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_what_is_asked_for_is_done():
    """Convolutions see bfloat16, and weights and activations lie pixel by pixel."""
    seen = []
    model = build_model("gateresnet20")
    model.layer1[0].conv2.register_forward_hook(lambda *hooked: seen.append(hooked[2]))
    train, test = batches(limit=1)
    fit(model, train, test, RECIPE, runtime_with(Acceleration("bf16", channels_last=True)))
    in_training, in_test = seen[0], seen[1]
    assert in_training.dtype == torch.bfloat16 and in_test.dtype == torch.float32
    for activation in (in_training, in_test):
        assert activation.is_contiguous(memory_format=torch.channels_last)
        assert not activation.is_contiguous()


@pytest.mark.parametrize("flags", [["--amp", "bf16", "--fused"], ["--compile"]])
def test_a_broken_run_continues_to_the_same_bits(trained, flags, monkeypatch):
    # What is asked is whether the wrapper is in the way; the compiler itself would take a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    options = [*flags, "--p", "0.5", "--epochs", "2", "--checkpoint", str(trained)]
    run_gfbs(*options, "--output", "whole")
    die_after(1, run_gfbs, *options, "--output", "broken", method="after_epoch")
    result = run_gfbs(*options, "--output", "broken", "--resume")
    assert len(result["history"]) == 2
    whole, broken = (one_run(f"{o}/gateresnet20_folder", "gfbs") for o in ("whole", "broken"))
    assert same_weights(whole / "last.pth", broken / "last.pth")


def test_the_optimiser_is_fused_where_asked_for():
    def fused(acceleration):
        optimizer = Trainer(fresh_resnet(), RECIPE, runtime_with(acceleration)).optimizer
        return optimizer.param_groups[0]["fused"]

    assert fused(Acceleration(fused=True)) and not fused(Acceleration())


def test_the_scale_of_the_loss_is_part_of_the_state():
    """It doubles, and halves where float16 overflows; a run that goes on must not begin anew."""
    runtime, (train, _) = runtime_with(Acceleration("fp16")), batches(limit=3)
    first = Trainer(fresh_resnet(), RECIPE, runtime)
    first.scaler.set_growth_interval(1)
    begun = first.scaler.get_scale()
    for batch in train:
        first.step(*batch)
    assert first.scaler.get_scale() != begun
    second = Trainer(copy.deepcopy(first.model), RECIPE, runtime)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.scaler.get_scale() == first.scaler.get_scale()
    for batch in train:
        assert torch.equal(first.step(*batch)[1], second.step(*batch)[1])


def test_fast_defaults_that_stay_in_float32(monkeypatch):
    def acceleration(*argv):
        args = train.parse_args(["--device", "cpu", *argv])
        return settings.runtime(args, args.bs, "--bs").acceleration

    assert acceleration() == Acceleration(channels_last=True)
    assert acceleration("--no_channels_last") == Acceleration()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert acceleration("--device", "mps") == Acceleration()
    for deterministic in (False, True):
        seed_everything(1, deterministic)
        assert torch.backends.cudnn.benchmark is not deterministic


def test_what_the_device_has_not_is_refused(monkeypatch):
    with pytest.raises(InputError, match="--amp fp16 needs CUDA, not cpu"):
        select_runtime("cpu", acceleration=Acceleration(amp="fp16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="one GPU a process: leave --data_parallel out"):
        select_runtime("cuda", acceleration=Acceleration(compile=True))
    assert select_runtime("cuda", [1], acceleration=Acceleration("fp16")).gpus == (1,)


def test_runs_tell_how_they_compute():
    assert "bf16, channels_last" in str(select_runtime("cpu", acceleration=FAST[-1]))
    assert str(select_runtime("cpu")).endswith("threads")


@pytest.mark.parametrize("net", ["gatevgg11", "gateresnet20", "resnet18"])
def test_folded_gates_give_the_same_bits(net):
    model, (images, labels) = random_model(net), random_batch(4)

    def gradients():
        loss = F.cross_entropy(model(images), labels)
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    plain = gradients()
    with folded_gates(model):
        folded = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, folded, strict=True))


def test_gates_that_are_not_ones_are_read():
    model, (images, _) = random_model("gateresnet20").eval(), random_batch(2)
    whole = model(images)
    model.layer2[0].gate2.gate.data[0, :16] = 0
    masked = copy.deepcopy(model)(images)
    assert relative_difference(masked, whole) > 1e-3
    with folded_gates(model):
        assert torch.equal(model(images), masked)
        folded = [gate.folded for gate in model.modules() if isinstance(gate, Gate)]
        assert folded.count(False) == 1
        with folded_gates(model):  # one inside another
            pass
        assert [g.folded for g in model.modules() if isinstance(g, Gate)] == folded
    assert not any(gate.folded for gate in model.modules() if isinstance(gate, Gate))
    assert evaluate(model, batches()[1], CPU) == evaluate(copy.deepcopy(model), batches()[1], CPU)
