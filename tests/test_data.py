"""Data sets, batches and augmentation."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from helpers import CPU, make_folder
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from utils.data import small
from utils.data.batches import scoring_indices
from utils.data.listing import read_image
from utils.data.small import CIFAR10_NORMALISATION, ImageBatches, ImageSet, load_data
from utils.errors import InputError


def numbered_images(count, size=8, layout=torch.contiguous_format):
    """Images of which no two pixels near each other, or at the same place, are alike."""
    pixels = torch.arange(count * 3 * size * size).view(count, 3, size, size) % 251
    return ImageSet(pixels.to(torch.uint8, memory_format=layout), torch.arange(count))


LAYOUTS = [torch.contiguous_format, torch.channels_last]  # of made-up and of decoded images


def test_synthetic_set_is_the_same_every_time_and_balanced():
    one, two = load_data("synthetic", "unused"), load_data("synthetic", "unused")
    assert torch.equal(one.train.images, two.train.images) and len(one.classes) == 10
    assert one.train.images.shape == (5000, 3, 32, 32) and one.train.images.dtype == torch.uint8
    for part in (one.train, one.test):
        assert (part.labels.bincount() == len(part) // 10).all()
    assert not torch.equal(one.train.images[:1000], one.test.images)


def test_folder_set(tmp_path):
    make_folder(tmp_path, parts=("train", "val"))
    wide = Image.new("RGB", (80, 40), (255, 0, 0))
    wide.paste((0, 255, 0), (20, 0, 60, 40))  # the centre, when resized to 48x24 and cropped
    wide.save(tmp_path / "val" / "cat" / "a.png")
    data = load_data("folder", tmp_path, image_size=24)
    assert (data.test.images[6].float().mean((1, 2)) - torch.tensor([0, 255, 0])).abs().max() < 9
    assert data.classes == ["cat", "dog"]
    assert data.train.images.shape == (12, 3, 24, 24)
    shades = data.train.images[:, :2, 0, 0].long()
    assert torch.equal(shades[:, 1] // 50, data.train.labels)  # every image has its own label
    assert data.train.labels.tolist() != sorted(data.train.labels.tolist())  # not class by class
    again = load_data("folder", tmp_path, image_size=24)
    assert torch.equal(again.train.labels, data.train.labels)


def test_processes_read_what_one_process_reads(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path, images=60, size=(9, 7))
    Image.new("RGB", (20, 5), (9, 9, 9)).save(tmp_path / "train" / "cat" / "wide.png")
    alone, said = load_data("folder", tmp_path, image_size=8), capsys.readouterr().err
    assert "smallest: 9x7" in said or "smallest: 20x5" in said
    monkeypatch.setattr(small, "IMAGES_A_WORKER", 60)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    together = load_data("folder", tmp_path, image_size=8)
    assert capsys.readouterr().err == said
    for one, other in ((alone.train, together.train), (alone.test, together.test)):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    (tmp_path / "test" / "cat" / "7.png").write_text("no image")
    with pytest.raises(InputError, match=r"^\S+cat/7.png: cannot be read as an image") as error:
        load_data("folder", tmp_path, image_size=8)
    assert "Traceback" not in str(error.value)


def test_folder_set_that_cannot_serve_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="no folder .*train"):
        load_data("folder", tmp_path)
    make_folder(tmp_path, parts=("train",))
    with pytest.raises(InputError, match="no folder .*test.* or .*val"):
        load_data("folder", tmp_path)
    (tmp_path / "test").mkdir()
    with pytest.raises(InputError, match="test must hold one folder of images per class"):
        load_data("folder", tmp_path)
    make_folder(tmp_path / "x", parts=("test",), classes=("cat", "dog", "owl"))
    (tmp_path / "test").rmdir()
    (tmp_path / "x" / "test").rename(tmp_path / "test")
    with pytest.raises(InputError, match="only one has owl"):
        load_data("folder", tmp_path)
    for image in (tmp_path / "test" / "owl").iterdir():
        image.unlink()
    with pytest.raises(InputError, match="owl"):
        load_data("folder", tmp_path)


@pytest.mark.parametrize("damage", ["text", "cut", "empty"])
def test_unreadable_image_is_named(tmp_path, damage):
    make_folder(tmp_path)
    victim = tmp_path / "train" / "dog" / "3.png"
    content = {"text": b"no image", "cut": victim.read_bytes()[:60], "empty": b""}[damage]
    victim.write_bytes(content)
    with pytest.raises(InputError, match=r"dog/3\.png: cannot be read"):
        load_data("folder", tmp_path)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "RGB", "I;16"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((10, 20), 40 << 8, np.uint16)).save(path)
    else:
        Image.new("RGB", (20, 10), (200, 60, 60)).convert(mode).save(path)
    pixels = np.asarray(read_image(str(path))).astype(int)
    assert pixels.shape == (10, 20, 3)
    if mode in ("L", "I;16"):
        grey = 40 if mode == "I;16" else 102
        assert (abs(pixels - grey) <= 1).all()
    else:
        assert abs(pixels[0, 0] - (200, 60, 60)).max() < 12


def write_batches(folder, contents):
    """Files as CIFAR has them; returns their checksums."""
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    return {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in contents}


def fake_cifar(tmp_path, monkeypatch):
    """The download of CIFAR-10, a copy of an archive with two images a batch."""
    source, contents = tmp_path / "served" / "cifar-10-batches-py", {}
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    for i, name in enumerate(names):
        rows = np.full((2, 3072), 20 * i, dtype=np.uint8)
        contents[name] = {"data": rows, "labels": [i, 9], "label_names": list("abcdefghij")}
    sums = write_batches(source, contents)
    archive = tmp_path / "served" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, source.name)
    monkeypatch.setattr(CIFAR10, "url", archive.as_uri())
    copy = "torchvision.datasets.utils._urlretrieve"
    monkeypatch.setattr(copy, lambda url, path: shutil.copyfile(archive, path))
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[names[5], sums[names[5]]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return archive


def test_cifar_is_downloaded_in_file_order(tmp_path, monkeypatch):
    fake_cifar(tmp_path, monkeypatch)
    data = load_data("cifar10", tmp_path / "data")
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 0, 20, 20, 40, 40, 60, 60, 80, 80]
    assert data.train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert data.test.images.shape == (2, 3, 32, 32) and data.classes == list("abcdefghij")


def test_failed_download_says_which_file_goes_where(tmp_path, monkeypatch):
    fake_cifar(tmp_path, monkeypatch).unlink()
    with pytest.raises(InputError, match="put cifar-10-python.tar.gz into .*data") as error:
        load_data("cifar10", tmp_path / "data")
    assert "\n" not in str(error.value)


def test_a_damaged_archive_is_downloaded_again(tmp_path, monkeypatch):
    archive = fake_cifar(tmp_path, monkeypatch)
    (tmp_path / archive.name).write_bytes(archive.read_bytes()[:-5])
    assert len(load_data("cifar10", tmp_path).test) == 2


def test_cifar100_has_its_own_constants_and_labels(tmp_path, monkeypatch):
    rows = np.zeros((3, 3072), np.uint8)
    part = {"data": rows, "fine_labels": [7, 99, 0], "coarse_labels": [1, 1, 1]}
    contents = {"train": part, "test": part}
    contents["meta"] = {"fine_label_names": [f"c{i}" for i in range(100)]}
    sums = write_batches(tmp_path / "cifar-100-python", contents)
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]}
    monkeypatch.setattr(CIFAR100, "meta", meta)
    data = load_data("cifar100", tmp_path)
    assert data.train.labels.tolist() == [7, 99, 0] and len(data.classes) == 100
    constants = {"mean": [0.5071, 0.4867, 0.4408], "std": [0.2675, 0.2565, 0.2761]}
    assert data.normalisation.as_dict() == constants


def batches(count=50, batch_size=16, layout=torch.contiguous_format, **options):
    images = numbered_images(count, layout=layout)
    return ImageBatches(images, batch_size, CIFAR10_NORMALISATION, CPU, **options)


def test_an_epoch_shows_every_image_once_in_another_order():
    train = batches(augment=True, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        train.set_epoch(epoch)
        orders.append(torch.cat([labels for _, labels in train]))
    assert torch.equal(orders[0].sort().values, torch.arange(50))
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])
    other = batches(augment=True, seed=4)
    assert not torch.equal(torch.cat([labels for _, labels in other]), orders[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_shows_the_plain_images_in_file_order(layout):
    plain = batches(augment=False, layout=layout)
    images, labels = (torch.cat(parts) for parts in zip(*plain, strict=True))
    assert torch.equal(labels, torch.arange(50))
    assert torch.equal(images, CIFAR10_NORMALISATION.apply(numbered_images(50).images))


def test_normalisation_is_that_of_torchvision():
    from torchvision.transforms.v2 import functional

    images = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8)
    expected = functional.normalize(
        images.float() / 255, list(CIFAR10_NORMALISATION.mean), list(CIFAR10_NORMALISATION.std)
    )
    assert torch.allclose(CIFAR10_NORMALISATION.apply(images), expected, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_augmentation_is_a_padded_crop_and_a_flip(layout):
    """Every augmented image is one of the 2 * 3 * 3 that padding, cropping and flipping allow."""
    source = numbered_images(400)
    train = batches(400, 64, augment=True, layout=layout)
    padded = torch.nn.functional.pad(source.images, (1, 1, 1, 1))
    seen = set()
    for images, labels in train:
        for image, label in zip(images, labels, strict=True):
            options = {}
            for dy in range(3):
                for dx in range(3):
                    crop = padded[label, :, dy : dy + 8, dx : dx + 8]
                    options[dy, dx, False], options[dy, dx, True] = crop, crop.flip(-1)
            normalised = {k: CIFAR10_NORMALISATION.apply(v) for k, v in options.items()}
            found = [key for key, option in normalised.items() if torch.equal(option, image)]
            assert len(found) == 1
            seen.add(found[0])
    assert len(seen) == 18


def test_an_images_augmentation_does_not_depend_on_its_batch():
    large, small = (batches(batch_size=size, augment=True, seed=5) for size in (16, 10))
    for epoch in (0, 3):
        large.set_epoch(epoch)
        small.set_epoch(epoch)
        assert torch.equal(torch.cat([x for x, _ in large]), torch.cat([x for x, _ in small]))


def test_a_last_batch_of_one_image_is_left_out_of_training_only():
    assert [len(y) for _, y in batches(49, augment=True)] == [16, 16, 16]
    assert [len(y) for _, y in batches(49, augment=False)] == [16, 16, 16, 1]
    assert [len(y) for _, y in batches(1, augment=True)] == [1]
    assert [len(y) for _, y in batches(3, batch_size=1, augment=True)] == [1, 1, 1]
    assert len(batches(50, augment=True, limit=2)) == 2


def test_the_scoring_batch():
    assert torch.equal(scoring_indices(50_000, 200), torch.arange(45_000, 45_200))
    assert torch.equal(scoring_indices(1_000, 200), torch.arange(800, 1_000))
    assert torch.equal(scoring_indices(100, 200), torch.arange(100))
    drawn = scoring_indices(1_000, 200, seed=4)
    assert len(set(drawn.tolist())) == 200 and drawn.min() < 800
    assert torch.equal(drawn, scoring_indices(1_000, 200, seed=4))
    assert not torch.equal(drawn, scoring_indices(1_000, 200, seed=5))
