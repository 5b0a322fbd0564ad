"""Folders and images that cannot serve: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch
from helpers import CPU, make_folder, random_model, refusal, without
from PIL import Image

import gfbs_cifar
import gfbs_imagenet
import train
from utils.checkpoint import save_checkpoint
from utils.cli.parser import run_script
from utils.data import folders, listing, small
from utils.data.folders import Crops, FolderBatches
from utils.data.listing import list_folders
from utils.data.small import load_data
from utils.errors import InputError


def test_a_single_class_is_refused(tmp_path):
    make_folder(tmp_path / "train", parts=("images",))  # one folder too many
    make_folder(tmp_path / "test", parts=("images",))
    said = refusal(load_data, "folder", tmp_path)
    assert f"{tmp_path}/train must hold one folder of images per class" in said
    assert "only 'images'" in said


@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_a_link_to_a_folder_that_it_lies_in_is_refused(tmp_path, target):
    make_folder(tmp_path / "images")
    deep = tmp_path / "images" / "train" / "cat" / "deep"
    deep.mkdir()
    (deep / "loop").symlink_to(target)
    said = refusal(load_data, "folder", tmp_path / "images")
    assert f"{deep}/loop" in said and "link" in said and "remove" in said


def test_links_in_a_circle_are_refused(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "cat" / "more").symlink_to("../dog")
    (tmp_path / "train" / "dog" / "more").symlink_to("../cat")
    assert "link" in refusal(load_data, "folder", tmp_path)


def test_other_links_and_folders_within_a_class_are_followed(tmp_path):
    make_folder(tmp_path / "elsewhere", parts=("more",))
    make_folder(tmp_path / "images")
    cats = tmp_path / "images" / "train" / "cat"
    (cats / "1.png").rename(cats / "moved.PNG")
    (cats / "deep").mkdir()
    (cats / "2.png").rename(cats / "deep" / "2.png")
    (cats / "linked").symlink_to(tmp_path / "elsewhere" / "more" / "cat")
    (cats / "link.png").symlink_to("0.png")
    (cats / "notes.txt").write_text("no image")
    shutil.rmtree(tmp_path / "images" / "train" / "dog")
    (tmp_path / "images" / "train" / "dog").symlink_to(tmp_path / "elsewhere" / "more" / "dog")
    samples, _ = listing.list_images(tmp_path / "images" / "train")
    names = [f"cat/{name}" for name in ("0.png", "3.png", "4.png", "5.png")]
    names += ["cat/link.png", "cat/moved.PNG", "cat/deep/2.png"]
    names += [f"cat/linked/{i}.png" for i in range(6)] + [f"dog/{i}.png" for i in range(6)]
    assert [path for path, _ in samples] == [f"{tmp_path}/images/train/{name}" for name in names]
    assert [label for _, label in samples] == [0] * 13 + [1] * 6


@pytest.mark.parametrize(
    "locked, permission",
    [
        ("", 0o777),
        ("images", 0o777),
        ("images", 0o111),
        ("images/train", 0o777),
        ("images/train/cat", 0o777),
        ("images/test/dog/deep", 0o777),
    ],
)
def test_folders_without_permission_cannot_be_read(reachable, locked, permission):
    place = reachable / "place"
    make_folder(place / "images")
    (place / "images" / "test" / "dog" / "deep").mkdir()
    with without(permission, place / locked):
        for action in (
            lambda: load_data("folder", place / "images"),
            lambda: list_folders(place / "images", ("test",)),
        ):
            said = refusal(action)
            assert "cannot be read" in said and "Permission denied" in said
            assert str(place / locked) in said


@pytest.mark.parametrize("locked", ["", "data", "data/cifar-10-batches-py", "data/empty"])
def test_a_download_folder_without_permission_cannot_be_read(reachable, locked):
    place = reachable / "place"
    (place / "data" / "cifar-10-batches-py").mkdir(parents=True)
    (place / "data" / "empty").mkdir()
    folder = place / "data" / "empty" if "empty" in locked else place / "data"
    with without(0o777, place / locked):
        said = refusal(load_data, "cifar10", folder)
    assert "cannot be read" in said and "Permission denied" in said and str(folder) in said


@pytest.mark.parametrize("dataset", ["folder", "cifar10"])
def test_a_name_that_is_too_long_is_one_line(tmp_path, dataset):
    said = refusal(load_data, dataset, tmp_path / ("x" * 300))
    assert "cannot be read" in said and "File name too long" in said


@pytest.mark.parametrize("name", [b"caf\xe9", b"cat\x1b[2J", b"cat\n", b"cat\x9b", b"\xc2\x9bcat"])
def test_class_names_that_cannot_be_printed_are_refused(tmp_path, name):
    make_folder(tmp_path)
    for part in ("train", "test"):
        folder = os.fsencode(tmp_path / part)
        os.rename(folder + b"/cat", folder + b"/" + name)
    said = refusal(load_data, "folder", tmp_path)
    assert repr(os.fsdecode(name)) in said and said.isprintable()
    assert f"{tmp_path}/train" in said and "rename" in said


def test_class_names_of_any_language_are_fine(tmp_path):
    make_folder(tmp_path, classes=("a cat", "café", "кот", "猫", "🐈"))
    assert load_data("folder", tmp_path).classes == ["a cat", "café", "кот", "猫", "🐈"]


def test_images_that_are_enlarged_are_told_of_once(tmp_path, capsys):
    make_folder(tmp_path, size=(40, 32))
    load_data("folder", tmp_path, image_size=32)
    assert capsys.readouterr().err == ""
    for path in [tmp_path / "train" / "cat" / f"{i}.png" for i in range(3)]:
        Image.new("RGB", (8, 9)).save(path)
    Image.new("RGB", (31, 60)).save(tmp_path / "test" / "dog" / "0.png")
    load_data("folder", tmp_path, image_size=32)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "4 of 24 images" in said and "8x9" in said
    assert "--image_size 32" in said


class Stop(BaseException):
    """What a signal handler raises."""


def many_images(monkeypatch, before, count=20_000):
    """A folder data set of which there is only the list, read by two processes.

    ``before`` is called with the number of every image before it is read. Returns how many were.
    """
    reads, samples = multiprocessing.Value("i", 0), [(str(i), 0) for i in range(count)]

    def read_image(path):
        with reads.get_lock():
            reads.value += 1
        time.sleep(0.002)
        before(int(path))
        return Image.new("RGB", (32, 32))

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(small, "list_folders", lambda *_: (samples, samples[:1], ["cat", "dog"]))
    monkeypatch.setattr(folders, "read_image", read_image)
    return reads


def test_a_bad_first_image_is_told_of_at_once(monkeypatch):
    def before(number):
        if number == 0:
            raise InputError("a bad image")

    reads = many_images(monkeypatch, before)
    assert refusal(load_data, "folder", "") == "a bad image"
    assert reads.value < 2000


def test_a_signal_does_not_wait_for_the_images_that_are_still_to_be_read(monkeypatch):
    def stop(*_):
        raise Stop

    main = os.getpid()

    def before(number):
        if number == 20:
            os.kill(main, signal.SIGUSR1)

    reads = many_images(monkeypatch, before)
    earlier = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(Stop):
            load_data("folder", "")
    finally:
        signal.signal(signal.SIGUSR1, earlier)
    assert reads.value < 2000


@pytest.mark.parametrize("workers", [0, 2])
def test_pillow_warns_of_nothing(tmp_path, monkeypatch, capfd, workers):
    """Its warnings would be errors here."""
    make_folder(tmp_path)
    palette = Image.new("P", (40, 36))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "train" / "cat" / "0.png", transparency=bytes([0, 128]))
    Image.new("RGB", (60, 60)).save(tmp_path / "train" / "dog" / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # the image of 60x60 is above
    if not workers:
        load_data("folder", tmp_path, image_size=32)
    samples, _ = listing.list_images(tmp_path / "train")
    batches = FolderBatches(samples, 4, Crops(32, 36), CPU, workers=workers)
    assert len(torch.cat([labels for _, labels in batches])) == 12
    batches.close()
    assert capfd.readouterr().err == ""


SMALL = ["--device", "cpu", "--image_size", "32", "--epochs", "1", "--output", "out"]
CIFAR = ["--dataset", "folder", "--data_dir", "images", "--image_size", "16"]
CIFAR += ["--net", "gateresnet20", "--checkpoint", "resnet20.pth"]
IMAGENET = ["--data_dir", "images", "--net", "resnet18", "--checkpoint", "resnet18.pth"]


def outcome(script, *argv):
    """The exit code of a script."""
    return run_script(lambda: script.parse_args([*SMALL, *argv]), script.main)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoint(folder / "resnet18.pth", random_model("resnet18", 2))
    save_checkpoint(folder / "resnet20.pth", random_model("gateresnet20", 2))
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, weights):
    make_folder(tmp_path / "images", parts=("train", "val"), size=(32, 32))
    for path in weights.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "script, flag, argv",
    [
        (train, "--bs", [*CIFAR[:-2], "--image_size", "4", "--bs", "1"]),
        (gfbs_cifar, "--bs", [*CIFAR, "--image_size", "4", "--bs", "1"]),
        (gfbs_cifar, "--score_images", [*CIFAR, "--image_size", "4", "--score_images", "1"]),
        (gfbs_imagenet, "--train_bs", [*IMAGENET, "--train_bs", "1"]),
        (gfbs_imagenet, "--score_images", [*IMAGENET, "--score_images", "1", "--workers", "0"]),
    ],
)
def test_a_single_image_that_is_no_batch_is_told_of_before_training(
    place, capfd, script, flag, argv
):
    assert outcome(script, *argv) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and f"error: {flag}" in said and "BatchNorm" in said
    assert not list(place.rglob("last.pth"))


def test_a_single_image_with_larger_maps_is_a_batch(place):
    argv = ["--limit_train_batches", "1", "--bs", "1", "--score_images", "1"]
    assert outcome(gfbs_cifar, *CIFAR, *argv) == 0


def test_a_baseline_at_chance_is_told_of(place, capsys):
    model = random_model("gateresnet20", 2)
    model.linear.bias.data[:] = torch.tensor([1e6, 0])  # it takes every image for a cat
    save_checkpoint("cats.pth", model)
    argv = [*CIFAR, "--epochs", "0", "--score_images", "4", "--checkpoint", "cats.pth"]
    assert outcome(gfbs_cifar, *argv) == 0
    shown = capsys.readouterr().out
    assert shown.count("warning: the baseline is at chance on this data; is it the data") == 1

    make_folder(place / "more", parts=("val",), images=30)
    for path in (place / "more" / "val" / "dog").glob("*[1-9].png"):
        path.unlink()  # which leaves 30 cats and 3 dogs
    shutil.copytree(place / "images" / "train", place / "more" / "train")
    assert outcome(gfbs_cifar, *argv, "--data_dir", "more", "--output", "two") == 0
    assert "at chance" not in capsys.readouterr().out


def test_a_killed_worker_is_one_line(place, monkeypatch, capfd):
    """In evaluation as in training."""
    read, main = folders.read_image, os.getpid()

    def die(path):
        if "val" in path and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path)

    monkeypatch.setattr(folders, "read_image", die)
    assert outcome(gfbs_imagenet, *IMAGENET, "--workers", "1", "--train_bs", "4") == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "a data worker was killed" in said and "--workers" in said


def test_no_other_error_is_taken_for_a_killed_worker():
    def fail(_):
        raise RuntimeError("something else about a worker")

    with pytest.raises(RuntimeError, match="something else"):
        run_script(lambda: None, fail)
