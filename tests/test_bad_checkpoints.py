"""Files that load nowhere end in one line that says why; networks of users load like ours."""

from __future__ import annotations

import copy
import sys
import tempfile
import zipfile
from functools import partial

import pytest
import torch
from helpers import Nested, random_batch, random_model, refusal, run_gfbs, run_train, without

import gfbs_cifar
import gfbs_imagenet
import models
from tools import export
from utils.checkpoint import checksum, load_checkpoint, load_model, read_state_dict, save_checkpoint
from utils.errors import InputError
from utils.pruning import PruningPlan
from utils.run.baseline import load_baseline
from utils.surgery import prune


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The content of a checkpoint of ours."""
    path = tmp_path_factory.mktemp("ours") / "ours.pth"
    save_checkpoint(path, random_model("gateresnet20"))
    return torch.load(path, weights_only=True)


def signed(content):
    """The same content with a checksum that fits."""
    body = {key: value for key, value in content.items() if key != "sha256"}
    return {**body, "sha256": checksum(body)}


def not_loaded(path, load=load_checkpoint) -> str:
    """The one line that a file is refused with."""
    said = refusal(load, path)
    assert str(path) in said
    return said


def refused(content, **options) -> str:
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(content, file.name, **options)
        return not_loaded(file.name)


# Networks of users


def with_head_of_its_own(num_classes):
    model = Nested(num_classes)
    model.classifier, model.head = model.classifier[1], "classifier"
    return model


@pytest.mark.parametrize("factory", [Nested, with_head_of_its_own, partial(Nested)])
def test_any_callable_in_the_registry_is_a_network(tmp_path, monkeypatch, factory):
    monkeypatch.setitem(models.NETWORKS, "mine", factory)
    model = random_model("mine", 7)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    save_checkpoint(
        tmp_path / "pruned.pth", prune(copy.deepcopy(model), PruningPlan({"gate": [2]}))
    )
    torch.save(random_model("resnet18", 3).state_dict(), tmp_path / "resnet18.pth")
    plain, pruned = load_model(tmp_path / "plain.pth"), load_model(tmp_path / "pruned.pth")
    assert (plain.net, plain.num_classes, pruned.kept) == ("mine", 7, {"gate": [2]})
    images, _ = random_batch(2)
    assert torch.equal(plain.eval()(images), model.eval()(images))
    assert load_model(tmp_path / "resnet18.pth").net == "resnet18"


def test_networks_of_the_same_layers_are_told_apart_by_their_widths(tmp_path, monkeypatch):
    class Wide(Nested):
        def __init__(self, num_classes):
            super().__init__(num_classes)
            self.conv, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
            self.gate, self.classifier[1] = models.Gate(8), torch.nn.Linear(8, num_classes)

    monkeypatch.setitem(models.NETWORKS, "mine", Nested)
    monkeypatch.setitem(models.NETWORKS, "wide", Wide)
    torch.save(random_model("wide").state_dict(), tmp_path / "wide.pth")
    assert load_model(tmp_path / "wide.pth").net == "wide"


@pytest.mark.parametrize("kind", [AttributeError, TypeError, ValueError, RuntimeError])
def test_a_fault_of_the_code_is_not_called_damage(tmp_path, monkeypatch, kind):
    class Faulty(Nested):
        def __init__(self, num_classes):
            raise kind("a fault of the code")

    monkeypatch.setitem(models.NETWORKS, "mine", Nested)
    save_checkpoint(tmp_path / "mine.pth", random_model("mine"))
    monkeypatch.setitem(models.NETWORKS, "mine", Faulty)
    with pytest.raises(kind, match="^a fault of the code$") as error:
        load_model(tmp_path / "mine.pth")
    assert not isinstance(error.value, InputError)


# Weights


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("name", ["conv1.weight", "layer2.0.bn1.running_var", "gate1.gate"])
def test_what_is_not_finite_is_refused_with_its_name(tmp_path, name, value):
    model = random_model("gateresnet20")
    model.state_dict()[name].flatten()[1] = float(value)
    save_checkpoint(tmp_path / "ours.pth", model)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "other.pth")
    for file in ("ours.pth", "other.pth"):
        assert f"{name} is not finite" in not_loaded(tmp_path / file)
    assert f"{name} is not finite" in not_loaded(tmp_path / "other.pth", read_state_dict)


@pytest.mark.parametrize("criterion", ["gfbs", "slimming", "random"])
def test_no_criterion_meets_a_nan(place, criterion):
    """Also none that looks at no gradient; and nothing is written."""
    model = random_model("gateresnet20", 2)
    model.bn1.running_mean[0] = float("nan")
    save_checkpoint("nan.pth", model)
    with pytest.raises(InputError, match=r"nan\.pth: bn1\.running_mean is not finite"):
        run_gfbs("--checkpoint", "nan.pth", "--criterion", criterion)
    assert not list(place.rglob("*.json"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bool])
def test_weights_must_be_floating_point(ours, dtype):
    state = {**ours["state_dict"], "bn1.weight": torch.ones(16).to(dtype)}
    for content in (signed({**ours, "state_dict": state}), state):
        assert f"bn1.weight is of {dtype}" in refused(content)
    counter = {**ours["state_dict"], "bn1.num_batches_tracked": torch.tensor(1j)}
    assert "bn1.num_batches_tracked is of torch.complex64" in refused(counter)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns of sparse tensors
@pytest.mark.parametrize("tensor", [torch.ones(16).to_sparse(), torch.ones(16, device="meta")])
def test_tensors_without_plain_values_are_refused(ours, tensor):
    state = {**ours["state_dict"], "bn1.weight": tensor}
    for content in (state, {**ours, "state_dict": state}):
        assert "'bn1.weight' is sparse, nested or without values" in refused(content)


def test_shapes_that_do_not_fit_are_named(ours):
    state = {**ours["state_dict"], "layer1.0.gate1.gate": torch.ones(1, 3, 1, 1)}
    for content in (signed({**ours, "state_dict": state}), state):
        assert "layer1.0.gate1.gate is of shape [1, 3, 1, 1]" in refused(content)
    state = {**ours["state_dict"], "more.gate": torch.ones(1)}
    for content in (signed({**ours, "state_dict": state}), state):
        assert "more.gate" in refused(content)


# Metadata

LOOP: list = []
LOOP.append(LOOP)
LAUGHS: list = ["ha"]
for _ in range(40):
    LAUGHS = [LAUGHS] * 10


@pytest.mark.parametrize(
    "name, values",
    {
        "classes": [None, 3, "cat", [1, 2], [["cat"]], torch.ones(2), {"cat": 0}],
        "normalisation": [
            3,
            [0.5] * 3,
            {},
            {"mean": [0.5] * 3},
            {"mean": 0.5, "std": 0.5},
            {"mean": [0.5] * 3, "std": [1, 1]},
            {"mean": [0.5] * 3, "std": [1, 0, 1]},
            {"mean": [0.5, 0.5, float("nan")], "std": [1] * 3},
            {"mean": ["a"] * 3, "std": [1] * 3},
            {"mean": torch.ones(3), "std": torch.ones(3)},
        ],
        "image_size": [None, 0, -1, "32", 32.0, True, [32]],
        "resize": [0, "256"],
        "accuracy": ["high", float("nan"), [1], torch.tensor(1.0), True],
        "epoch": [None, "1", -1, 1.5],
        "config": [3, [], {"p": torch.ones(1)}, {"holdout": "many"}, {("a", "b"): 1}],
        "training": [None, 3, []],
        "dataset": [None, 3],
        "source": [3],
        "tested_on": [3],
        "network": [None, 3, []],
        "state_dict": [None, [], {}, {"conv1.weight": 3}, {1: torch.ones(1)}],
    }.items(),
)
def test_metadata_of_another_kind_are_refused_by_name(ours, name, values):
    for value in values:
        line = refused(signed({**ours, name: value}))
        assert repr(name) in line or name == "state_dict" and "state dict" in line, (value, line)


@pytest.mark.parametrize(
    "name, values",
    {
        "net": [None, [], "magic", torch.ones(2)],
        "num_classes": [None, "ten", 0, True, 10.0, 11, 10**30],
        "kept": [None, [], {"gate1": [99]}, {"gate1": 3}, {3: [0]}, {"layer9": [0]}],
    }.items(),
)
def test_a_network_of_another_kind_is_refused_by_name(ours, name, values):
    words = {"net": "network|'net'", "num_classes": "classes", "kept": "'kept'|pruning plan"}[name]
    for value in values:
        line = refused(signed({**ours, "network": {**ours["network"], name: value}}))
        assert any(word in line for word in words.split("|")), (value, line)


def nested(depth):
    inner: list = []
    for _ in range(depth):
        inner = [inner]
    return inner


def test_values_that_no_checkpoint_of_ours_has_are_refused(ours, monkeypatch):
    for value in (LOOP, LAUGHS, {"a", "b"}, bytearray(9), 1j, 10**5000):
        refused({**ours, "config": {"p": value}})
    monkeypatch.setattr(sys, "setrecursionlimit", sys.setrecursionlimit)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        with tempfile.NamedTemporaryFile() as file:
            torch.save({**ours, "config": nested(3000)}, file.name)
            sys.setrecursionlimit(limit)
            not_loaded(file.name)
    finally:
        sys.setrecursionlimit(limit)
    with pytest.raises(ValueError, match="a set is no plain value"):
        checksum({"a", "b"})


# Sizes

HUGE = 10**13  # more than any memory: to copy such a tensor would fail at once


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_larger_than_its_values_is_refused_before_it_is_copied(ours, zipped):
    options = {"_use_new_zipfile_serialization": zipped}
    for name, tensor in {
        "bn1.weight": torch.ones(1).expand(HUGE),
        "linear.bias": torch.ones(1).expand(HUGE),
        "linear.weight": torch.ones(1, 64).expand(HUGE, 64),
        "conv1.weight": torch.ones(9).as_strided((HUGE, 9), (0, 1)),
    }.items():
        state = {**ours["state_dict"], name: tensor}
        many = {**ours["network"], "num_classes": HUGE}
        for content in ({"state_dict": state}, {**ours, "network": many, "state_dict": state}):
            assert f"{name!r} is larger than what the file holds" in refused(content, **options)
    training = {"optimizer": [{"momentum": torch.ones(1).expand(HUGE)}]}
    assert "'momentum' is larger than" in refused({**ours, "training": training}, **options)


def test_a_classifier_of_countless_classes_is_refused_before_it_is_built(ours):
    """Its weights are there, and take no bytes."""
    for rows in (HUGE, 0):
        state = {**ours["state_dict"], "linear.weight": torch.ones(rows, 0)}
        many = {**ours["network"], "num_classes": rows or 1}
        for content in (state, signed({**ours, "network": many, "state_dict": state})):
            refused(content)


class Made:
    """A tensor whose values are not in the file: a call, of those that are allowed, makes it."""

    def __reduce__(self):
        return torch.FloatTensor, (10**6,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_that_is_not_in_the_file_is_refused(ours, zipped):
    options = {"_use_new_zipfile_serialization": zipped}
    assert "larger than the whole file" in refused({"a": Made()}, **options)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_that_share_their_storage_load(tmp_path, ours, zipped):
    state = dict(ours["state_dict"])
    state["layer1.0.conv1.weight"] = state["layer1.0.conv2.weight"]  # tied
    norms = [name for name in state if name.startswith("layer3.0.bn1.") and "num" not in name]
    state.update(zip(norms, torch.rand(len(norms), 64), strict=True))  # rows of one tensor
    for content in (state, signed({**ours, "state_dict": state})):
        path = tmp_path / "shared.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        loaded = load_model(path).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_archives_that_unpack_to_more_than_their_size_are_refused(tmp_path, ours):
    torch.save(ours, tmp_path / "ours.pth")
    with (
        zipfile.ZipFile(tmp_path / "ours.pth") as source,
        zipfile.ZipFile(tmp_path / "deflated.pth", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for entry in source.infolist():
            deflated.writestr(entry.filename, source.read(entry))
    assert "compressed" in not_loaded(tmp_path / "deflated.pth")
    with zipfile.ZipFile(tmp_path / "ours.pth", "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for i in range(9):  # more names for the same bytes
            again = copy.copy(largest)
            again.filename = f"{largest.filename}{i}"
            archive.filelist.append(again)
        archive.writestr("end", b"")
    assert "larger than the whole file" in not_loaded(tmp_path / "ours.pth")


# Files that cannot be reached


def test_what_may_not_be_read_is_not_called_damaged(reachable):
    closed = reachable / "closed"
    closed.mkdir()
    paths = [reachable / "file.pth", closed / "file.pth"]
    for path in paths:
        save_checkpoint(path, random_model("gateresnet20"))
    baseline = partial(load_baseline, folder="gateresnet20", net="gateresnet20")
    with without(0o777, paths[0], closed):
        for path in paths:
            for load in (load_checkpoint, read_state_dict, baseline):
                assert f"{path}: cannot be read (Permission denied)" in not_loaded(path, load)
        assert "model_best.pth: cannot be read (Permission denied)" in not_loaded(closed, baseline)


def test_names_that_are_too_long_and_folders_are_refused(place):
    long = "x" * 300
    for run in (run_gfbs, run_train):
        for name in (long, f"{long}.pth", f"images/{long}"):
            with pytest.raises(InputError, match=r"xxx.*: cannot be read \(File name too long\)"):
                run("--checkpoint", name)
    for name in ("images", "nowhere.pth", "/dev/null", __file__ + "/below.pth"):
        assert f"{name}: no such checkpoint" in not_loaded(name)


def test_a_missing_baseline_is_made_by_the_script_that_makes_it(place):
    with pytest.raises(
        InputError, match="no such checkpoint; make one with train.py, or .*--check"
    ):
        run_gfbs()
    with pytest.raises(InputError, match="make one with prepare_torch_imagenet_models.py"):
        gfbs_imagenet.main(gfbs_imagenet.parse_args(["--data_dir", "images", "--device", "cpu"]))
    with pytest.raises(InputError, match="no such checkpoint") as error:
        export.main(export.parse_args(["nowhere.pth"]))
    assert "--checkpoint" not in str(error.value)


@pytest.mark.parametrize(
    "script, holds, asked, advice",
    [
        (gfbs_imagenet, "gateresnet20", "resnet50", "gfbs_cifar.py prunes it"),
        (gfbs_cifar, "resnet18", "gateresnet20", "gfbs_imagenet.py prunes it"),
        (gfbs_imagenet, "resnet18", "resnet50", "give --net resnet18 or another --checkpoint"),
    ],
)
def test_another_network_is_pruned_by_its_script(place, script, holds, asked, advice):
    save_checkpoint("c.pth", random_model(holds, 2))
    argv = ["--net", asked, "--checkpoint", "c.pth", "--data_dir", "images", "--device", "cpu"]
    with pytest.raises(InputError, match=f"holds {holds}, not {asked}; {advice}"):
        script.main(script.parse_args(argv))
