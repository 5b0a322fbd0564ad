"""The benchmarks run, their arithmetic is right, and scoring takes no more memory than training."""

from __future__ import annotations

import json
from itertools import count

import pytest
from helpers import CPU, make_folder, random_batch, random_model

from tools.benchmark import __main__ as benchmark
from tools.benchmark import timing
from tools.benchmark.prune import forward_backward, peak_bytes, score_select_cut
from tools.benchmark.train import ACCELERATIONS
from tools.benchmark.workload import without_gates
from utils.checkpoint import save_checkpoint
from utils.errors import InputError
from utils.pruning import PruningPlan
from utils.surgery import prune

TINY = ["--net", "gateresnet20", "--bs", "4", "--image_size", "8"]


def run(*argv):
    return benchmark.main(benchmark.parse_args([*argv, "--rounds", "2", "--device", "cpu"]))[
        "comparisons"
    ]


def test_contenders_run_in_turn_and_ratios_are_those_of_their_times(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    numbers = count()

    def contender(name, *seconds):
        times = iter([100.0, *seconds])  # the first is off the clock

        def work(prepared):
            calls.append((name, prepared))
            clock[0] += next(times)

        def prepare():
            clock[0] += 1000  # off the clock, too
            return next(numbers)

        return timing.Contender(name, work, prepare)

    contenders = [contender("a", 4.0, 6.0, 5.0), contender("b", 2.0, 1.0, 4.0)]
    comparison = timing.Stopwatch(CPU.device, 3).compare("title", contenders, 10)
    assert [name for name, _ in calls] == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert [prepared for _, prepared in calls] == list(range(8))
    assert comparison.seconds == {"a": [4, 6, 5], "b": [2, 1, 4]}
    assert comparison.speed("b") == (2.5, 1.25, 6) and comparison.speed("a") == (1, 1, 1)
    reference, other = comparison.as_dict()["contenders"]
    assert other["speed"] == 2.5 and other["images_per_second"] == 5
    assert "2.50  (1.25, 6.00)" in str(comparison)


def test_data(tmp_path):
    small, large = run("data", "--images", "40", "--bs", "8",
                       "--folder", str(make_folder(tmp_path) / "train"))  # fmt: skip
    assert (small["images"], large["images"]) == (40, 12)
    for comparison in (small, large):
        assert [c["name"] for c in comparison["contenders"]] == ["PIL one by one", "ours"]


def test_train(tmp_path):
    (comparison,) = run("train", *TINY, "--batches", "1", "--no_compile",
                        "--json", str(tmp_path / "a.json"))  # fmt: skip
    names = [c["name"] for c in comparison["contenders"]]
    assert names == ["plain loop", *(n for n, a in ACCELERATIONS.items() if not a.compile)]
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["comparisons"] == [comparison] and written["versions"]["torch"]


def test_prune():
    (comparison,) = run("prune", *TINY, "--profile")
    assert [c["name"] for c in comparison["contenders"]][1:] == ["ours", "torch-pruning"]
    shares = comparison["profiles"]["ours"]
    assert max(shares.values()) > 0.1 and sum(shares.values()) <= 1.01


def test_infer(tmp_path):
    model = random_model("gateresnet20")
    save_checkpoint(tmp_path / "whole.pth", model)
    half = {name: list(range(width // 2)) for name, width in model.group_widths().items()}
    save_checkpoint(tmp_path / "half.pth", prune(model, PruningPlan(half)))
    files = ["--checkpoint", str(tmp_path / "whole.pth"), "--pruned", str(tmp_path / "half.pth")]
    one, many = run("infer", "--bs", "2", "--image_size", "8", *files)
    assert (one["title"], many["title"]) == ("gateresnet20, batch 1", "gateresnet20, batch 2")
    facts, speeds = one["facts"], {c["name"]: c["median"] for c in one["contenders"]}
    assert 3.5 < facts["fewer multiply-adds, times"] < 4
    faster = speeds["unpruned, exported"] / speeds["pruned, exported"]
    assert facts["share of it that becomes time"] == pytest.approx(
        faster / facts["fewer multiply-adds, times"], abs=1e-3
    )


def test_scale():
    (comparison,) = run("scale", *TINY, "--batches", "1")
    names = [c["name"] for c in comparison["contenders"]]
    assert names == ["1 rank", "1 rank, 2 threads", "2 ranks"] and comparison["images"] == 4


@pytest.mark.parametrize("net", ["gatevgg11", "gateresnet20", "gatemobilenetv2", "gatedensenet40"])
def test_pruning_takes_no_more_memory_than_the_pass(net):
    """Activations weigh as in real batches; 5 % more would still be allowed."""
    images, labels = random_batch(16, 32)
    ways = {
        "bare": (lambda model: forward_backward(model, images, labels), without_gates),
        "ours": (lambda model: score_select_cut(model, images, labels, 0.5), lambda model: model),
    }
    peaks = {
        name: peak_bytes(run, source(random_model(net)), CPU.device)
        for name, (run, source) in ways.items()
    }
    assert 10 * images.nbytes < peaks["bare"] and peaks["ours"] < 1.05 * peaks["bare"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["data", "--folder", "nowhere"], "nowhere"),
        (["train", "--net", "gatevgg16", "--image_size", "16"], "do not fit gatevgg16"),
        (["prune", "--image_size", "8"], "do not fit gatevgg16"),
        (["scale", "--bs", "3"], "--bs 3 does not divide by the 2 ranks"),
        (["train", "--json", "nowhere/a.json"], "nowhere/a.json: cannot be written"),
        (["infer", "--checkpoint", "a.pth"], "--checkpoint and --pruned go together"),
    ],
)
def test_bad_input(argv, message):
    with pytest.raises(InputError, match=message):
        run(*argv)
