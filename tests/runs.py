"""What the tests that run scripts share."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import gfbs_cifar
import train
from utils.checkpoint import load_model

COMMON = [
    "--net", "gateresnet20", "--dataset", "folder", "--data_dir", "images", "--image_size", "16",
    "--device", "cpu",
]  # fmt: skip


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


def one_run(folder, name):
    """The folder of the only run whose name begins so; settings that are not usual follow."""
    (run,) = Path(folder).glob(f"{name}*")
    return run


def files(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def same_weights(a, b):
    a, b = load_model(a).state_dict(), load_model(b).state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
