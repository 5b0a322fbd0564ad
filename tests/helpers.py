"""What the tests share: networks with something to prune, batches, and scripts that are run."""

from __future__ import annotations

import copy
import os
import random
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import gfbs_cifar
import train
from models import Gate, GatedModel, build_model, group_widths
from utils.checkpoint import load_model
from utils.data.batches import Split
from utils.data.small import image_batches
from utils.distributed import Runtime
from utils.errors import InputError
from utils.pruning import PruningPlan
from utils.run.folder import RunCallback

COMMON = ["--net", "gateresnet20", "--dataset", "folder", "--data_dir", "images"]
COMMON += ["--image_size", "16", "--device", "cpu"]


def make_folder(root, parts=("train", "test"), classes=("cat", "dog"), images=6, size=(40, 36)):
    """A folder data set of uniform images whose shade says which they are."""
    for part in parts:
        for c, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", size, (10 * i, 50 * c, 7)).save(folder / f"{i}.png")
    return root


def run_train(*argv):
    return train.main(train.parse_args([*COMMON, "--bs", "8", "--epochs", "2", *argv]))


def run_gfbs(*argv):
    return gfbs_cifar.main(gfbs_cifar.parse_args([*COMMON, "--bs", "8", "--epochs", "1", *argv]))


class Killed(BaseException):
    pass


def die_after(moments, start, *argv, method="after_batch"):
    """Start a run that dies when it has done so many batches (or epochs), as if it were killed."""
    call, seen = getattr(RunCallback, method), []

    def dies(self, *args):
        call(self, *args)
        seen.append(args)
        if len(seen) == moments:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunCallback, method, dies)
        start(*argv)


def one_run(folder, name):
    """The folder of the only run whose name begins so; settings that are not usual follow."""
    (run,) = Path(folder).glob(f"{name}*")
    return run


def files(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


def refusal(action, *args):
    """The one line of an InputError."""
    with pytest.raises(InputError) as error:
        action(*args)
    assert "\n" not in str(error.value), args
    return str(error.value)


@contextmanager
def without(permission, *paths):
    """Take a permission for these paths away. Root has every permission, so it becomes nobody."""
    modes, root = {path: path.stat().st_mode for path in paths}, os.geteuid() == 0
    for path, mode in modes.items():
        path.chmod(mode & ~permission)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


def spy(monkeypatch, module, name, note=lambda *args, **options: (args, options)):
    """Note something of every call of a function, which does its work; returns the notes."""
    notes, original = [], getattr(module, name)

    def noting(*args, **options):
        notes.append(note(*args, **options))
        return original(*args, **options)

    monkeypatch.setattr(module, name, noting)
    return notes


def copied_weights(model, *_, **__):
    return copy.deepcopy(model.state_dict())


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def same_weights(a, b):
    a, b = load_model(a).state_dict(), load_model(b).state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def randomise_channels(model: nn.Module) -> None:
    """Random biases, scales, shifts and running statistics, so that no two channels are alike."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.5, 0.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)


def random_model(net: str, num_classes: int = 10) -> GatedModel:
    torch.manual_seed(0)
    model = build_model(net, num_classes)
    randomise_channels(model)
    nn.init.normal_(model.get_submodule(model.head).bias)
    return model


def settle(model: GatedModel, images: torch.Tensor) -> GatedModel:
    """Take the running statistics from these images.

    With random ones the signal fades from layer to layer, until in eval mode the logits of a deep
    network are those of its last biases, whatever the image and whatever was cut.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    usual, training = [norm.momentum for norm in norms], model.training
    for norm in norms:
        norm.momentum = 1
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return model.train(training)


CPU = Runtime(torch.device("cpu"))


def batches_of(images, batch_size, **options):
    """The batches of small images, with their usual constants."""
    about, _ = images.about("folder", None, {})
    return image_batches(images, about, batch_size, CPU, 1, Split(**options))


def random_batch(count: int = 8, size: int = 32, num_classes: int = 10, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(count, 3, size, size, dtype=dtype), torch.arange(count) % num_classes


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |a|, in which this project states equality."""
    return ((a - b).abs().max() / a.abs().max()).item()


def random_plan(model, seed, share=None):
    random.seed(seed)
    keep = {}
    for name, width in group_widths(model).items():
        count = max(1, round(width * (random.random() if share is None else share)))
        keep[name] = sorted(random.sample(range(width), count))
    return PruningPlan(keep)


def formula(model, images, labels, w_beta=0.05, taylor=True):
    """Section by section as the paper writes it, with an ordinary backward pass on a copy."""
    model = copy.deepcopy(model).train()
    F.cross_entropy(model(images), labels).backward()

    def normalised(vector):
        norm = vector.pow(2).sum().sqrt()
        return vector / norm if norm > 0 else torch.zeros_like(vector)

    scores = {}
    for group in model.channel_groups():
        norms = [model.get_submodule(name) for name in group.norms]
        gamma = sum(normalised(n.weight.detach().abs()) for n in norms) / len(norms)
        grad = sum(normalised(n.weight.grad.abs()) for n in norms) / len(norms)
        shift = sum(normalised(n.bias.detach()) for n in norms) / len(norms)
        scores[group.name] = taylor * gamma * grad + w_beta * shift
    return scores


class Nested(GatedModel):
    """The least network whose classifier is inside another module."""

    head = "classifier.1"

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.conv, self.norm, self.gate = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Gate(4)
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(4, num_classes))

    def forward(self, x):
        return self.classifier(self.gate(self.norm(self.conv(x))).relu().mean((2, 3)))
