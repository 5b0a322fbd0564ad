"""The networks: names, keys, shapes, groups and costs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import Nested, random_batch
from torch import nn

from models import ALIASES, NETWORKS, Gate, build_model, replace_head
from utils.cost import model_cost


@pytest.mark.parametrize("net", [*NETWORKS, *ALIASES])
def test_forward_and_backward_reach_every_parameter(net):
    model = build_model(net)
    images, labels = random_batch(2, num_classes=model.num_classes)
    logits = model(images)
    assert logits.shape == (2, model.num_classes)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (not name.endswith("gate")), name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("net", NETWORKS)
def test_every_gate_and_norm_is_in_one_group_and_every_group_in_one_stage(net):
    model = build_model(net)
    groups = model.channel_groups()
    gates = [name for name, module in model.named_modules() if isinstance(module, Gate)]
    assert sorted(gate for group in groups for gate in group.gates) == sorted(gates)
    for group in groups:
        assert [gates[i] for i in group.entries] == list(group.gates)
    assert [group.entries[0] for group in groups] == sorted(g.entries[0] for g in groups)
    norms = [n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    along = ("downsample", "shortcut")  # cut along, but without a score
    norms = [name for name in norms if not any(part in name for part in along)]
    assert sorted(norm for group in groups for norm in group.norms) == sorted(norms)
    staged = [name for stage in model.pruning_stages() for name in stage]
    assert sorted(staged) == sorted(group.name for group in groups)


def test_published_keys_of_vgg16():
    state = build_model("gatevgg16").state_dict()
    keys = set(state)
    assert {"features.0.weight", "features.0.bias", "features.1.running_var"} <= keys
    assert {"features.2.gate", "features.54.gate", "classifier.weight", "classifier.bias"} <= keys
    assert sum(tensor.shape[2:] == (3, 3) for tensor in state.values()) == 13


def test_published_keys_of_resnet20():
    keys = set(build_model("gateresnet20").state_dict())
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = {"conv1.weight", "gate1.gate", "linear.weight", "linear.bias"}
    expected |= {f"bn1.{part}" for part in norm}
    for block in (f"layer{s}.{b}" for s in (1, 2, 3) for b in range(3)):
        for k in (1, 2):
            expected |= {f"{block}.conv{k}.weight", f"{block}.gate{k}.gate"}
            expected |= {f"{block}.bn{k}.{part}" for part in norm}
    assert keys == expected


FIGURES = [("gatevgg16", 313.2e6, 14.728e6), ("gateresnet56", 125.5e6, 0.853e6)]


@pytest.mark.parametrize("net, macs, params", FIGURES)
def test_cost_meets_the_known_figures(net, macs, params):
    cost = model_cost(build_model(net), 32)
    assert cost.macs == pytest.approx(macs, rel=1e-3)
    assert cost.params == pytest.approx(params, rel=1e-3)


def test_cost_equals_a_count_by_hand():
    """ResNet-20 layer by layer: 9 c_in c_out h w for each 3x3 convolution, and the linear layer."""
    convolutions = [(3, 16, 32)] + [(16, 16, 32)] * 6
    convolutions += [(16, 32, 16)] + [(32, 32, 16)] * 5 + [(32, 64, 8)] + [(64, 64, 8)] * 5
    macs = sum(9 * a * b * side**2 for a, b, side in convolutions) + 64 * 10
    params = sum(9 * a * b + 2 * b for a, b, _ in convolutions) + 64 * 10 + 10
    assert dataclasses.astuple(model_cost(build_model("gateresnet20"), 32)) == (macs, params)


def test_unknown_network_names_the_nearest():
    with pytest.raises(ValueError, match="gatevgg16"):
        build_model("gatevgg61", 10)


def test_alias_has_a_hundred_classes_and_no_other_number():
    model = build_model("gateresnet56_c100")
    assert (model.net, model.num_classes) == ("gateresnet56", 100)
    with pytest.raises(ValueError, match="100 classes, not 10"):
        build_model("gateresnet56_c100", 10)


@pytest.mark.parametrize("head", ["", "fc", None, 3])
def test_a_network_must_name_its_classifier(monkeypatch, head):
    class Headless(Nested):
        pass

    Headless.head = head
    monkeypatch.setitem(NETWORKS, "mine", Headless)
    with pytest.raises(TypeError, match=f"Headless.head must name .* no layer is {head!r}"):
        build_model("mine", 3)


def test_what_the_registry_builds_is_a_gated_model(monkeypatch):
    monkeypatch.setitem(NETWORKS, "mine", lambda num_classes: nn.Linear(3, num_classes))
    with pytest.raises(TypeError, match="'mine' is a Linear, not a GatedModel"):
        build_model("mine", 3)


def test_a_new_head_takes_the_place_of_the_old_one_inside_another_module():
    model = Nested(3)
    replace_head(model, 5)
    images, _ = random_batch(2)
    assert model(images).shape == (2, 5) and model.num_classes == 5
    assert set(model.state_dict()) == set(Nested(5).state_dict())


def test_other_image_sizes_work():
    for net in ("gatevgg11", "gateresnet20", "gatemobilenetv2", "gatedensenet40"):
        assert build_model(net, 7).eval()(torch.randn(1, 3, 48, 64)).shape == (1, 7)


def test_a_gate_on_channels_that_cannot_be_cut_is_refused_by_name():
    class Misplaced(Nested):
        def forward(self, x):
            return self.classifier(self.gate(self.norm(self.conv(x)).softmax(1)).mean((2, 3)))

    with pytest.raises(ValueError, match="gate gate stands where channels cannot be cut; softmax"):
        Misplaced(3).channel_groups()
