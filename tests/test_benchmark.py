"""Contenders of a benchmark do the same work, its arithmetic is right, and scoring takes no more
memory than training. Nothing here is timed.
"""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from helpers import CPU, make_folder, random_batch, relative_difference
from torch.utils.benchmark import Timer

from tools import benchmark, measures
from utils.cost import model_cost
from utils.errors import InputError

TINY = ["--net", "gateresnet20", "--bs", "4", "--image_size", "8"]


def run(*argv):
    args = benchmark.parse_args([*argv, "--rounds", "1", "--device", "cpu"])
    return benchmark.main(args)["comparisons"]


@pytest.fixture
def outcomes(monkeypatch):
    """What each contender returns, by comparison; they run once, at made-up speeds."""
    outcomes = {}

    def record(title, images, runs, prepare=lambda name: (), **_):
        torch.manual_seed(0)
        outcomes[title] = {name: run(*prepare(name)) for name, run in runs.items()}
        rows = [{"name": name, "speed": n} for n, name in enumerate(runs, start=1)]
        return {"title": title, "images": images, "contenders": rows, "facts": {}}

    monkeypatch.setattr(measures, "compare", record)
    monkeypatch.setattr(measures, "as_text", str)
    return outcomes


def test_contenders_run_in_turn_and_ratios_are_those_of_their_times(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr("torch.utils.benchmark.Timer", partial(Timer, timer=lambda: now[0]))
    times = {"a": iter([100, 4, 100, 6, 100, 5]), "b": iter([100, 2, 100, 1, 100, 4])}

    def prepare(name):
        now[0] += 1000  # off the clock
        return (name,)

    def work(name):
        calls.append(name)
        now[0] += next(times[name])  # 100 to warm up in every round, off the clock, too

    result = measures.compare("title", 10, {"a": work, "b": work}, rounds=3, prepare=prepare)
    assert calls[::2] == calls[1::2] == ["a", "b", "b", "a", "a", "b"]
    a, b = result["contenders"]
    assert (a["seconds"], b["seconds"]) == ([4, 6, 5], [2, 1, 4])
    assert (a["speed"], b["speed"]) == (1, 2.5)
    assert b["rounds"] == [1.25, 6]
    assert b["images_per_second"] == 5 and b["iqr"] == pytest.approx(1.5)
    assert "2.50  (1.25, 6.00)" in measures.as_text(result)


def test_the_profile_names_operators():
    square = torch.ones(8, 8)
    result = measures.compare("title", 1, {"a": lambda: square @ square}, rounds=1, profiled=True)
    assert "aten::mm" in result["profiles"]["a"] and "aten::mm" in measures.as_text(result)


def test_both_ways_in_bring_the_same_images(tmp_path, outcomes, monkeypatch):
    seen = []
    monkeypatch.setattr(measures, "exhaust", lambda batches: seen.append(list(batches)))
    folder = str(make_folder(tmp_path) / "train")
    run("data", "--images", "400", "--bs", "80", "--workers", "0", "--folder", folder)
    assert {title: list(ways) for title, ways in outcomes.items()} == dict.fromkeys(
        ["small images", "large images"], ["PIL one by one", "ours"]
    )
    for usual, ours in (seen[:2], seen[2:]):
        (images, labels), (our_images, our_labels) = (
            map(torch.cat, zip(*epoch, strict=True)) for epoch in (usual, ours)
        )
        assert images.shape == our_images.shape and images.dtype == our_images.dtype
        assert torch.equal(labels.sort().values, our_labels.sort().values)
        assert images.mean().item() == pytest.approx(our_images.mean().item(), abs=0.02)
        assert images.std().item() == pytest.approx(our_images.std().item(), rel=0.02)


def test_all_loops_train_alike(outcomes):
    run("train", *TINY, "--batches", "2", "--no_compile")
    (ways,) = outcomes.values()
    plain, ours = ways.pop("plain loop"), ways.pop("ours")
    assert ours == pytest.approx(plain, rel=1e-5)
    assert list(ways) == ["--no_channels_last", "--amp bf16"]
    assert [loss for loss, _ in ways.values()] == pytest.approx([plain[0]] * len(ways), rel=0.05)


def test_both_ways_of_pruning_prune(outcomes, monkeypatch):
    monkeypatch.setattr(measures, "peak_bytes", lambda *_: 10**6)  # a run less of each
    (comparison,) = run("prune", "--net", "gatevgg11", "--bs", "4")
    (ways,) = outcomes.values()
    assert list(ways) == ["forward and backward", "ours", "ours, recomputed", "torch-pruning"]
    whole = model_cost(measures.fresh_model("gatevgg11"), 32).macs
    for name in ("ours", "torch-pruning"):
        assert 0.2 * whole < model_cost(ways[name], 32).macs < 0.8 * whole
    assert list(comparison["facts"].values()) == [1, 1, 1, 1]


def test_what_is_timed_is_cut_as_asked_and_exported_networks_agree(outcomes, monkeypatch):
    monkeypatch.setattr(benchmark, "ROUND_TO", (1, 8))
    found = run("gain", *TINY, "--macs", "0.5")
    titles = ["pt2, batch 1", "pt2, batch 4", "onnx, batch 1", "onnx, batch 4"]
    titles += ["training in float32, batch 4", "training in bf16, batch 4"]
    assert list(outcomes) == [f"gateresnet20, {title}" for title in titles]
    for pt2, onnx in zip(list(outcomes.values())[:2], list(outcomes.values())[2:4], strict=True):
        assert list(pt2) == ["unpruned", "--round_to 1", "--round_to 8"]
        for name, logits in pt2.items():
            assert relative_difference(logits, onnx[name]) < 1e-5
        assert not torch.equal(pt2["--round_to 1"], pt2["--round_to 8"])  # not the same network
    for part in found:
        for made_up_speed, said in enumerate(part["facts"].values(), start=2):
            fewer, saved = (float(said.split()[place]) for place in (0, 6))
            assert fewer >= 2 and saved == pytest.approx(made_up_speed / fewer, abs=0.01)
    assert found[0]["facts"]["--round_to 1"].startswith("2.0")  # and no more than was asked


def test_ranks_are_compared_and_all_is_written(tmp_path):
    file = tmp_path / "a.json"
    (comparison,) = run("scale", *TINY, "--batches", "1", "--json", str(file))
    names = [row["name"] for row in comparison["contenders"]]
    assert names == ["1 rank", "2 ranks", "1 rank, 2 threads"] and comparison["images"] == 4
    written = json.loads(file.read_text())
    assert written["comparisons"] == [comparison] and written["versions"]["torch"]


@pytest.mark.parametrize("net", ["gatevgg11", "gateresnet20", "gatemobilenetv2", "gatedensenet40"])
def test_pruning_takes_no_more_memory_than_the_pass(net):
    """Activations weigh as in real batches; 5 % more would still be allowed."""
    batch = random_batch(16, 32)
    bare, ours = (measures.fresh_model(net, gates) for gates in (False, True))
    pass_alone = measures.peak_bytes(measures.forward_backward, (bare, *batch), CPU.device)
    spared = partial(measures.score_select_cut, checkpoint_activations=True)
    less = measures.peak_bytes(spared, (copy.deepcopy(ours), *batch, 0.5), CPU.device)
    scored = measures.peak_bytes(measures.score_select_cut, (ours, *batch, 0.5), CPU.device)
    assert 10 * batch[0].nbytes < pass_alone and scored < 1.05 * pass_alone
    assert less < (0.8 * scored if net == "gateresnet20" else 1.01 * scored)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["data", "--folder", "nowhere"], "nowhere"),
        (["train", "--net", "gatevgg16", "--image_size", "16"], "do not fit gatevgg16"),
        (["prune", "--image_size", "8"], "do not fit gatevgg16"),
        (["scale", "--bs", "3"], "--bs 3 does not divide by the 2 ranks"),
        (["prune", *TINY, "--json", "nowhere/a.json"], "nowhere/a.json: cannot be written"),
        (["prune", *TINY, "--json", "."], "cannot be written"),
    ],
)
def test_bad_input(argv, message):
    with pytest.raises(InputError, match=message):
        run(*argv)


def test_a_flag_that_the_question_does_not_take_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_args(["prune", "--batches", "3"])
    assert "--batches goes with train, scale, not with prune" in capsys.readouterr().err
