"""ImageNet: torchvision's networks and weights, large images from folders, and the two scripts."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch_pruning
import torchvision
from helpers import (
    CPU,
    die_after,
    make_folder,
    one_run,
    random_batch,
    random_model,
    random_plan,
    randomise_channels,
    refusal,
    relative_difference,
    same_weights,
    snapshot,
)
from torch import nn
from torchvision.transforms.v2 import functional

import gfbs_imagenet
import prepare_torch_imagenet_models as prepare
from models import build_model
from utils.checkpoint import load_checkpoint, load_model, save_checkpoint
from utils.cost import model_cost
from utils.data.batches import About, random_stream
from utils.data.folders import IMAGENET_NORMALISATION, Crops, FolderBatches, FolderImages
from utils.errors import InputError
from utils.run.baseline import check_classes
from utils.saliency import channel_saliency
from utils.surgery import prune

NETWORKS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


def original_and_gated(net, num_classes=10):
    """torchvision's network with random weights and statistics, and ours with the same."""
    torch.manual_seed(0)
    original = torchvision.models.get_model(net, weights=None, num_classes=num_classes)
    randomise_channels(original)
    gated = build_model(net, num_classes)
    missing, unexpected = gated.load_state_dict(original.state_dict(), strict=False)
    assert all(name.endswith(".gate") for name in missing) and not unexpected
    return original, gated


@pytest.mark.parametrize("net", NETWORKS)
def test_logits_equal_torchvisions(net):
    original, gated = original_and_gated(net)
    images, _ = random_batch(2, 64)
    for mode in (False, True):
        with torch.no_grad():
            expected, logits = original.train(mode)(images), gated.train(mode)(images)
        assert relative_difference(expected, logits) < 1e-6


def macs_by_hooks(model, images):
    """Multiply-adds of all convolutions and linear layers, from the shapes that pass through."""
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            per_output = layer.weight[0].numel()
            total += output[0].numel() * per_output
        elif isinstance(layer, nn.Linear):
            total += layer.weight.numel()

    handles = [layer.register_forward_hook(count) for layer in model.modules()]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("net", ["resnet18", "resnet50"])
def test_torch_pruning_cuts_the_same_network(net):
    """The same channels, cut out of torchvision's network by an independent dependency graph."""
    original, gated = original_and_gated(net)
    original, gated = original.double().eval(), gated.double().eval()
    images, _ = random_batch(2, 64, dtype=torch.float64)
    plan = random_plan(gated, seed=4)
    widths = gated.group_widths()
    layers = dict(original.named_modules())
    for group in gated.channel_groups():  # a new graph each time: indices refer to what is left
        graph = torch_pruning.DependencyGraph().build_dependency(original, images)
        gone = sorted(set(range(widths[group.name])) - set(plan.keep[group.name]))
        if gone:
            conv = layers[group.convs[0]]
            cut = torch_pruning.prune_conv_out_channels
            graph.get_pruning_group(conv, cut, idxs=gone).prune()
    pruned = prune(gated, plan)
    with torch.no_grad():
        assert relative_difference(original(images), pruned(images)) < 1e-10
    cost = model_cost(pruned, 64)
    assert cost.params == sum(parameter.numel() for parameter in original.parameters())
    assert cost.macs == macs_by_hooks(original, images[:1])


def test_known_costs_of_resnet50():
    cost = model_cost(build_model("resnet50"), 224)
    assert cost.params == pytest.approx(25.557e6, rel=1e-4)
    assert cost.macs == pytest.approx(4.09e9, rel=1e-3)


def test_stages_are_the_sixteen_blocks():
    model = build_model("resnet50")
    stages = model.pruning_stages()
    assert len(stages) == 16
    assert set(stages[0]) == {"gate1", "layer1.0.gate1", "layer1.0.gate2", "layer1.0.gate3"}
    assert set(stages[1]) == {"layer1.1.gate1", "layer1.1.gate2"}
    groups = {group.name: group for group in model.channel_groups()}
    assert len(groups["layer3.0.gate3"].gates) == 6 and len(groups["gate1"].gates) == 1
    joined = build_model("resnet34").channel_groups()[0]  # no downsample: the stem joins stage 1
    assert joined.gates == ("gate1", "layer1.0.gate2", "layer1.1.gate2", "layer1.2.gate2")


def test_activation_checkpointing_gives_the_same_scores_and_leaves_no_trace():
    model = random_model("resnet18").eval()
    images, labels = random_batch(4, 64)
    before = copy.deepcopy(model.state_dict())
    plain = channel_saliency(model, images, labels)
    spared = channel_saliency(model, images, labels, checkpoint_activations=True)
    assert all(torch.equal(plain[name], spared[name]) for name in plain)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.fixture
def place(tmp_path, monkeypatch):
    make_folder(tmp_path / "images", parts=("train", "val"), images=6, size=(50, 44))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_order_and_augmentation_do_not_depend_on_the_workers(place):
    noise = [(f"{i}.png", i) for i in range(12)]  # in which every crop is another
    for path, _ in noise:
        functional.to_pil_image(torch.randint(256, (3, 44, 50), dtype=torch.uint8)).save(path)

    def epochs(workers):
        batches = FolderBatches(noise, 5, Crops(24, 28), CPU, workers=workers, augment=True, seed=3)
        for epoch in (0, 1, 0):
            batches.set_epoch(epoch)
            state = torch.get_rng_state()
            images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
            assert torch.equal(state, torch.get_rng_state())
            yield images, labels

    alone, helped = list(epochs(0)), list(epochs(2))
    for (images, labels), (same_images, same_labels) in zip(alone, helped, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    assert torch.equal(alone[0][0], alone[2][0])
    assert not torch.equal(alone[0][1], alone[1][1])
    first, second = (images[labels.argsort()] for images, labels in alone[:2])
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first, next(epochs(0))[0][alone[0][1].argsort()])
    assert sorted(alone[0][1].tolist()) == list(range(12))


def test_training_crops_are_torchvisions(place):
    images = torch.randint(256, (8, 3, 60, 80), dtype=torch.uint8)
    for i, image in enumerate(images):
        functional.to_pil_image(image).save(f"{i}.png")
    dataset = FolderImages([(f"{i}.png", i) for i in range(8)], Crops(24).training, True, seed=7)
    usual = torchvision.transforms.v2
    usual = usual.Compose([usual.RandomResizedCrop(24), usual.RandomHorizontalFlip()])
    for i, image in enumerate(images):
        with torch.random.fork_rng([]):
            torch.default_generator.set_state(random_stream(7, 2, i).get_state())
            expected = usual(image)
        assert torch.equal(dataset[2, i][0], expected)


def test_evaluation_crops_are_torchvisions(place):
    ramp = torch.arange(60 * 80).view(1, 60, 80).expand(3, -1, -1) % 251
    functional.to_pil_image(ramp.to(torch.uint8)).save("ramp.png")
    ((image, _),) = FolderBatches([("ramp.png", 0)], 4, Crops(24, 28), CPU, workers=0)
    preset = torchvision.transforms._presets.ImageClassification(crop_size=24, resize_size=28)
    expected = preset(ramp.to(torch.uint8))
    assert (image[0] - expected).abs().max() < 0.02  # uint8 rounds once more
    assert image.shape == (1, 3, 24, 24)


SMALL = ["--net", "resnet18", "--device", "cpu", "--workers", "0"]


def run_prepare(*argv):
    return prepare.main(prepare.parse_args([*SMALL, *argv]))


def run_gfbs(*argv):
    options = ["--data_dir", "images", "--image_size", "32", "--train_bs", "4", "--epochs", "1"]
    return gfbs_imagenet.main(gfbs_imagenet.parse_args([*SMALL, *options, *argv]))


def save_local_weights(path, net="resnet18", num_classes=2):
    original, _ = original_and_gated(net, num_classes)
    torch.save(original.state_dict(), path)
    return original.eval()


def test_convert_prune_fine_tune_reload(place, capsys):
    original = save_local_weights("local.pth")
    measured = run_prepare("--checkpoint", "local.pth", "--data_dir", "images")
    baseline = load_checkpoint("checkpoints/resnet18/model_best.pth")
    images, _ = random_batch(2, 64)
    assert relative_difference(original(images), baseline.model.eval()(images)) < 1e-6
    assert measured["images"] == 12 and "measured on 12 images" in capsys.readouterr().out
    assert baseline.meta["normalisation"] == IMAGENET_NORMALISATION.as_dict()
    assert (baseline.meta["image_size"], baseline.meta["resize"]) == (224, 256)

    result = run_gfbs("--p", "0.4", "--limit_train_batches", "2")
    run = one_run("checkpoints/resnet18", "gfbs_p0.4_seed1")
    pruned = load_model(run / "pruned.pth")
    assert result["channels"]["gate1"]["after"] == pruned.group_widths()["gate1"]
    assert result["cost"]["macs"]["after"] == model_cost(pruned, 32).macs
    assert result["accuracy"]["last"] is not None and result["top5"]["last"] == 100
    assert load_model(run / "last.pth").kept == pruned.kept
    assert load_checkpoint(run / "model_best.pth").meta["classes"] == ["cat", "dog"]

    again = run_gfbs("--p", "0.2", "--epochs", "0", "--checkpoint", str(run / "model_best.pth"))
    assert again["cost"]["params"]["before"] == result["cost"]["params"]["after"]
    smooth = run_gfbs("--p", "0.4", "--smooth", "--sched", "cosine", "--limit-train-batches", "1")
    log = (one_run("checkpoints/resnet18", "gfbs_p0.4_smooth_seed1") / "log.txt").read_text()
    assert "round 8/9: cut" in log and len(smooth["history"]) == 8 + 1
    assert smooth["channels"] == result["channels"]


def test_rounds_to_a_budget_with_held_out_images(place):
    save_local_weights("local.pth")
    argv = "--checkpoint local.pth --macs 0.6 --steps 2 --step_epochs 1 --holdout 3 --recalibrate 2"
    result = run_gfbs(*argv.split(), "--round_to", "8", "--criterion", "taylor_fo")
    cost = result["cost"]["macs"]
    assert (
        0.5 < cost["after"] / cost["before"] <= 0.6 < result["rounds"][0]["macs"] / cost["before"]
    )
    assert all(channels["after"] % 8 == 0 for channels in result["channels"].values())
    assert result["holdout"]["images"] == 3 and len(result["history"]) == 3
    assert [epoch["test"]["images"] for epoch in result["history"]] == [3, 3, 3]
    assert [epoch["train"]["images"] for epoch in result["history"]] == [8, 8, 8]
    assert result["accuracy"]["recalibrated"] is not None
    with pytest.raises(InputError, match="--holdout 12: there are only 12 training images"):
        run_gfbs("--checkpoint", "local.pth", "--holdout", "12", "--output", "other")


def test_a_killed_run_continues_to_the_same_bits_with_other_workers(place):
    save_local_weights("local.pth")
    argv = ["--checkpoint", "local.pth", "--epochs", "2", "--checkpoint_every", "1"]
    run_gfbs(*argv, "--output", "whole")
    die_after(5, run_gfbs, *argv, "--output", "broken")  # in the second epoch of three batches
    run_gfbs(*argv, "--output", "broken", "--resume", "--workers", "1")
    folders = [one_run(f"{name}/resnet18", "gfbs_p0.4_seed1") for name in ("whole", "broken")]
    assert same_weights(*(folder / "last.pth" for folder in folders))


def test_a_thousand_classes_of_torchvision_are_imagenets(place):
    model = random_model("resnet18", 1000)
    checkpoint = load_checkpoint(save(model, "c.pth"))

    def check(classes):
        about = About("imagenet", list(classes), 32, IMAGENET_NORMALISATION)
        check_classes(checkpoint, about, "data", "advice")

    check(f"n{i:08}" for i in range(1000))
    with pytest.raises(InputError, match="'class0' is no WordNet id"):
        check(f"class{i}" for i in range(1000))


def save(model, path, **meta):
    save_checkpoint(path, model, **meta)
    return path


def test_other_weights_are_not_written_over(place):
    save_local_weights("local.pth")
    run_prepare("--checkpoint", "local.pth")
    run_prepare("--checkpoint", "local.pth")  # the same weights again
    save_local_weights("other.pth", num_classes=3)
    with pytest.raises(InputError, match="holds other weights; use --overwrite"):
        run_prepare("--checkpoint", "other.pth")
    run_prepare("--checkpoint", "other.pth", "--no_save")
    assert load_model("checkpoints/resnet18/model_best.pth").num_classes == 2
    run_prepare("--checkpoint", "other.pth", "--overwrite")
    assert load_model("checkpoints/resnet18/model_best.pth").num_classes == 3


def test_failed_download_says_which_file_goes_where(place, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(
        InputError, match=r"put resnet18-\w+\.pth into .*checkpoints, or name a local"
    ):
        run_prepare()


def test_bad_input_is_one_line_and_nothing_is_overwritten(place):
    save_local_weights("local.pth")
    run_prepare("--checkpoint", "local.pth")
    save_local_weights("resnet34.pth", "resnet34")
    save_local_weights("five.pth", num_classes=5)
    make_folder(place / "no_val", parts=("train",))
    make_folder(place / "broken", parts=("train", "val"))
    (place / "broken" / "val" / "cat" / "2.png").write_text("no image")
    make_folder(place / "empty", parts=("train", "val"))
    for image in (place / "empty" / "val" / "dog").iterdir():
        image.unlink()
    (place / "text.pth").write_text("no weights")
    before, broken = snapshot(place), ["--data_dir", "broken", "--output", "other"]
    broken += ["--checkpoint", "checkpoints"]
    for run, argv, message in [
        (run_gfbs, ["--data_dir", "no_val"], "no_val/val/<class>/"),
        (run_gfbs, ["--data_dir", "empty"], "dog"),
        (run_gfbs, broken, "cat/2.png: cannot be read as an image"),
        (run_gfbs, [*broken, "--workers", "2"], "cat/2.png: cannot be read as an image"),
        (run_gfbs, ["--checkpoint", "five.pth"], "the checkpoint was trained on 5; --new_head"),
        (run_gfbs, ["--gpu", "7"], "--gpu 7: torch sees 0 GPUs here"),
        (run_gfbs, ["--sync_bn"], "--sync_bn needs GPUs"),
        (run_gfbs, ["--net", "resnet34", "--checkpoint", "local.pth"], "holds resnet18, not"),
        (run_gfbs, ["--checkpoint", "none.pth"], "none.pth: no such checkpoint"),
        (run_prepare, ["--checkpoint", "resnet34.pth"], "not torchvision's weights of resnet18"),
        (run_prepare, ["--checkpoint", "text.pth"], "text.pth"),
        (run_prepare, ["--checkpoint", "none.pth"], "none.pth"),
        (run_prepare, ["--checkpoint", "local.pth", "--data_dir", "no_val"], "no_val/val"),
        (run_prepare, ["--weights", "IMAGENET1K_V9"], "resnet18 has IMAGENET1K_V1, DEFAULT"),
    ]:
        device = ["--device", "auto"] if "--gpu" in argv else []
        assert message in refusal(run, *argv, *device), argv
        after = {path: path.read_bytes() for path in before}
        assert after == before, argv


def test_published_defaults():
    args = gfbs_imagenet.parse_args(["--data_dir", "x"])
    assert args.checkpoint_activations  # ours: less memory, the same scores
    args = gfbs_imagenet.parse_args(["--data_dir", "x", "--no_checkpoint_activations"])
    assert not args.checkpoint_activations
    assert (args.net, args.p, args.epochs, args.train_bs) == ("resnet50", 0.4, 120, 512)
    assert (args.score_images, args.workers, args.seed, args.image_size) == (512, 4, 1, None)
    assert json.dumps(vars(args))  # fit for config.json
