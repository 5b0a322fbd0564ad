"""The table and the plots of results, on hand-made result.json files and on one of the scripts."""

from __future__ import annotations

import csv
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from runs import one_run, run_gfbs

from tools import results
from tools.curves import make_panels, middle_asked, short_names
from tools.plots import draw, make_styles
from tools.rows import Spread, group_trials, make_rows
from tools.trials import Asked, find_files, read_trial
from utils.errors import InputError
from utils.saliency import CRITERIA

ROOT = Path(__file__).parents[1]
WIDTHS = {"gate1": 16, "layer1.0.gate1": 16, "layer2.0.gate2": 32}


def make_result(folder, *, seed=1, criterion="gfbs", p=0.5, method="one shot", noise=0, **changes):
    """Write a result.json as a pruning script does, and return its content.

    ``changes``: ``config`` and ``baseline`` are merged into the run's and its baseline's
    configuration, ``accuracy`` into the accuracies; the rest replaces what is at the top.
    """
    draw = random.Random(f"{seed} {criterion} {p} {method} {noise}")
    smaller = (1 - p) * draw.uniform(0.9, 1)
    config = {"net": "gateresnet20", "dataset": "cifar10", "criterion": criterion, "p": p,
              "w_beta": 0.05, "epochs": 3, "score_images": 200, "classes": "10 (0123abcd)",
              "amp": None, "cosine": False, "seed": seed, "score_seed": None,
              "baseline": f"digest{seed}", **changes.pop("config", {})}  # fmt: skip
    baseline = {"net": "gateresnet20", "epochs": 10, "seed": seed, "baseline": None}
    told = changes.pop("baseline", {})
    accuracy = {"baseline": 90 + draw.random(), "after_surgery": 20 + draw.random(),
                "last": 88 + draw.random(), "best": 89 + draw.random(), "best_epoch": 2,
                **changes.pop("accuracy", {})}  # fmt: skip
    result = {
        "net": config["net"], "dataset": config["dataset"], "criterion": criterion,
        "method": method, "seed": seed, "ratio": {"asked": p, "reached": p},
        "budget": {"macs": None, "params": None},
        "baseline": {"config": None if told is None else {**baseline, **told}},
        "accuracy": accuracy,
        "cost": {
            "macs": {"before": 40_000_000, "after": round(40_000_000 * smaller)},
            "params": {"before": 270_000, "after": round(270_000 * smaller**2)},
        },
        "channels": {n: {"before": w, "after": round(w * smaller)} for n, w in WIDTHS.items()},
        "config": config, "history": [], "command": "python", "wall_time_seconds": draw.random(),
        **changes,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    return result


def table(*folders, **flags):
    argv = [str(folder) for folder in folders]
    for flag, value in flags.items():
        argv += [f"--{flag}", str(value)]
    return results.main(results.parse_args(argv))


def cells(text):
    """The table of a text: lines as lists of cells, and the lines themselves."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines], lines


def test_mean_and_sample_deviation_over_three_seeds(tmp_path, capsys):
    made = [make_result(tmp_path / f"s{seed}", seed=seed) for seed in (1, 2, 3)]
    (row,) = table(tmp_path)
    assert row.seeds == 3
    expected = {
        "baseline": [r["accuracy"]["baseline"] for r in made],
        "after_surgery": [r["accuracy"]["after_surgery"] for r in made],
        "fine_tuned": [r["accuracy"]["last"] for r in made],
    }
    for name, values in expected.items():
        assert row.accuracy[name].mean == pytest.approx(statistics.mean(values)), name
        assert row.accuracy[name].deviation == pytest.approx(statistics.stdev(values)), name
    for name, spread in (("macs", row.macs), ("params", row.params)):
        kept = [100 * r["cost"][name]["after"] / r["cost"][name]["before"] for r in made]
        assert (spread.mean, spread.deviation) == pytest.approx(
            (statistics.mean(kept), statistics.stdev(kept))
        )
    shares = [100 * r["channels"]["layer2.0.gate2"]["after"] / 32 for r in made]
    assert row.channels["layer2.0.gate2"].mean == pytest.approx(statistics.mean(shares))
    tuned = expected["fine_tuned"]
    shown = f"{statistics.mean(tuned):.2f} ± {statistics.stdev(tuned):.2f}"
    assert shown in capsys.readouterr().out


def test_a_single_seed_has_no_deviation_and_what_is_missing_is_a_dash(tmp_path, capsys):
    made = make_result(tmp_path, accuracy={"last": None, "best": None})
    (row,) = table(tmp_path)
    assert row.macs.deviation is None and row.accuracy["fine_tuned"] is None
    (names, _, line), _ = cells(capsys.readouterr().out)
    shown = dict(zip(names, line, strict=True))
    assert shown["fine-tuned"] == "-" and "recalibrated" not in shown and "also" not in shown
    assert shown["baseline"] == f"{made['accuracy']['baseline']:.2f}"


def test_the_table_lines_up_and_recalibration_has_a_column_where_there_is_any(tmp_path, capsys):
    make_result(tmp_path / "a", config={"recalibrate": 9}, accuracy={"recalibrated": 55.5})
    make_result(tmp_path / "b", criterion="taylor_fo", seed=2, method="from scratch")
    make_result(tmp_path / "c", criterion="taylor_fo", seed=3, method="from scratch")
    table(tmp_path)
    (names, rule, *rows), lines = cells(capsys.readouterr().out)
    assert len({len(line) for line in lines}) == 1
    edges = [[i for i, letter in enumerate(line) if letter == "|"] for line in lines]
    assert all(edge == edges[0] for edge in edges)
    assert all(set(cell) <= {"-", ":"} and len(cell) >= 3 for cell in rule)
    where = names.index("recalibrated")
    assert names[where - 1] == "after surgery" and names[where + 1] == "fine-tuned"
    assert [row[where] for row in rows] == ["55.50", "-"]


def test_only_seeds_are_averaged_and_the_rest_is_told(tmp_path, capsys):
    for seed in (1, 2):
        make_result(tmp_path / f"a{seed}", seed=seed, config={"score_seed": seed})
        make_result(tmp_path / f"b{seed}", seed=seed, config={"w_beta": 0.0})
        make_result(tmp_path / f"c{seed}", seed=seed, baseline={"epochs": 20})
        make_result(tmp_path / f"d{seed}", seed=seed, config={"amp": "bf16", "cosine": True})
    rows = table(tmp_path)
    assert [row.seeds for row in rows] == [2, 2, 2, 2]
    (names, _, *lines), _ = cells(capsys.readouterr().out)
    assert names[-1] == "also"
    assert {line[-1] for line in lines} == {
        "w_beta 0.05, baseline epochs 10", "w_beta 0, baseline epochs 10",
        "w_beta 0.05, baseline epochs 20", "w_beta 0.05, amp bf16, cosine, baseline epochs 10",
    }  # fmt: skip


def test_also_looks_at_one_network_and_data_set_at_a_time(tmp_path):
    for net, epochs in (("gateresnet20", 3), ("gatevgg16", 1)):
        for p in (0.3, 0.5):
            make_result(tmp_path / f"{net}{p}", p=p, config={"net": net, "epochs": epochs})
    assert not any(row.also for row in table(tmp_path))


def test_a_flag_that_an_earlier_version_did_not_have_is_off(tmp_path):
    make_result(tmp_path / "old", seed=1)
    make_result(tmp_path / "new", seed=2, config={"channels_last": False, "holdout": 0})
    (row,) = table(tmp_path)
    assert row.seeds == 2 and not row.also


def test_baselines_that_do_not_tell_how_they_were_trained_are_told_apart_by_weights(tmp_path):
    for name, weights, seed in (("a", "v1", 1), ("b", "v1", 2), ("c", "v2", 1)):
        make_result(tmp_path / name, seed=seed, config={"baseline": weights}, baseline=None)
    assert {row.also: row.seeds for row in table(tmp_path)} == {
        (("baseline", "v1"),): 2, (("baseline", "v2"),): 1
    }  # fmt: skip


def test_seeds_of_the_scoring_batch_and_of_the_baseline_are_seeds_too(tmp_path):
    make_result(tmp_path / "a", noise=1, config={"score_seed": 1})
    make_result(tmp_path / "b", noise=2, config={"score_seed": 2})
    make_result(tmp_path / "c", noise=3, config={"score_seed": 2}, baseline={"seed": 5})
    (row,) = table(tmp_path)
    assert row.seeds == 3


def test_a_copied_folder_counts_once_and_a_contradiction_is_refused(tmp_path):
    make_result(tmp_path / "a")
    make_result(tmp_path / "copy", command="python elsewhere", wall_time_seconds=7)
    (row,) = table(tmp_path, tmp_path / "a")
    assert row.seeds == 1
    assert len(find_files([tmp_path, tmp_path / "a", tmp_path / "copy" / ".." / "a"])) == 2
    make_result(tmp_path / "other", accuracy={"last": 1.0})
    with pytest.raises(InputError) as error:
        table(tmp_path)
    first, second = (str(tmp_path / name / "result.json") for name in ("a", "other"))
    assert first in str(error.value) and second in str(error.value)


def test_fine_tuned_is_the_last_epoch_or_the_one_that_a_holdout_chose(tmp_path, capsys):
    plain = make_result(tmp_path / "a", p=0.3)
    table(tmp_path)
    assert "holdout" not in capsys.readouterr().out
    held = make_result(
        tmp_path / "b",
        p=0.5,
        holdout={"images": 100},
        config={"holdout": 100},
        accuracy={"best": 42},
    )
    last, chosen = (row.accuracy["fine_tuned"].mean for row in table(tmp_path))
    assert last == plain["accuracy"]["last"] and chosen == held["accuracy"]["best"]
    text = capsys.readouterr().out
    assert "† 42.00" in text and text.count("†") == 2 and "chosen on the holdout" in text


def test_rows_are_in_the_order_of_the_registries(tmp_path):
    keys = [(net, method, criterion, p)
            for net in ("gatevgg16", "gateresnet20")
            for method in ("one shot", "smooth", "5 steps", "10 steps", "from scratch")
            for criterion in CRITERIA
            for p in (0.3, 0.5)]  # fmt: skip
    for i, (net, method, criterion, p) in enumerate(random.Random(0).sample(keys, len(keys))):
        make_result(tmp_path / f"{i}", criterion=criterion, p=p, method=method, config={"net": net})
    rows = table(tmp_path)
    assert [(row.net, row.method, row.criterion, row.asked.value) for row in rows] == keys


def test_what_was_asked_for(tmp_path, capsys):
    for name, budget in (
        ("m", {"macs": 0.55, "params": None}),
        ("p", {"macs": None, "params": 0.2}),
    ):
        asked = {"asked": None, "reached": 0.5}
        make_result(tmp_path / name, ratio=asked, budget=budget, config={"p": None, **budget})
    make_result(tmp_path / "r", p=0.35)
    make_result(tmp_path / "zero", p=0.0)
    rows = table(tmp_path)
    assert {str(row.asked) for row in rows} == {"MACs 55 %", "params 20 %", "p 0.35", "p 0"}
    assert "MACs 55 %" in capsys.readouterr().out


def test_csv_has_the_same_rows_unrounded(tmp_path):
    for seed in (1, 2):
        make_result(tmp_path / f"a{seed}", seed=seed)
    make_result(tmp_path / "b", criterion="l1", accuracy={"last": None})
    path = tmp_path / "new" / "table.csv"
    rows = table(tmp_path, csv=path)
    assert table(tmp_path, csv=path) == rows  # the file is replaced
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["criterion"] for line in lines] == ["gfbs", "l1"]
    for line, row in zip(lines, rows, strict=True):
        spreads = {"macs_kept": row.macs, "params_kept": row.params, **row.accuracy}
        for name, spread in spreads.items():
            for column, value in (
                (name, spread and spread.mean), (f"{name}_deviation", spread and spread.deviation)
            ):  # fmt: skip
                assert line[column] == "" if value is None else float(line[column]) == value
        assert (line["asked_of"], float(line["asked"])) == ("p", 0.5)
        assert int(line["seeds"]) == row.seeds


def eight_by_three(folder):
    for criterion in CRITERIA:
        for p in (0.3, 0.5, 0.7):
            for seed in (1, 2, 3):
                make_result(folder / f"{criterion}{p}{seed}", criterion=criterion, p=p, seed=seed)
    return table(folder)


def test_curves_are_one_per_criterion_with_means_and_deviations(tmp_path):
    rows = eight_by_three(tmp_path)
    (panel,) = make_panels(rows)
    assert [curve.label for curve in panel.curves] == list(CRITERIA)
    assert panel.middle == Asked("p", 0.5) and panel.groups == tuple(WIDTHS)
    for curve in panel.curves:
        mine = {row.macs.mean: row for row in rows if row.criterion == curve.criterion}
        for name in ("fine_tuned", "after_surgery"):
            line = curve.accuracy(name)
            assert line.x == sorted(mine) and len(line.x) == 3
            assert line.y == [mine[x].accuracy[name].mean for x in line.x]
            assert line.deviation == [mine[x].accuracy[name].deviation for x in line.x]
        (row,) = (row for row in mine.values() if row.asked == panel.middle)
        assert curve.channels(panel.middle, panel.groups).y == [
            row.channels[name].mean for name in WIDTHS
        ]
    baselines = [row.accuracy["baseline"].mean for row in rows]
    assert panel.baselines == pytest.approx((statistics.mean(baselines),))


def test_curves_are_told_apart_by_what_differs(tmp_path):
    for method in ("one shot", "smooth"):
        for w_beta in (0.05, 0.1):
            for p in (0.3, 0.5):
                folder = tmp_path / f"{method}{w_beta}{p}"
                make_result(folder, p=p, method=method, config={"w_beta": w_beta})
    budget = {"macs": 0.5, "params": None}
    make_result(tmp_path / "m", ratio={"asked": None}, budget=budget, config={"p": None, **budget})
    (panel,) = make_panels(table(tmp_path))
    expected = [f"gfbs, {m}, by p, w_beta {w}" for m in ("one shot", "smooth") for w in (0.05, 0.1)]
    labels = [curve.label for curve in panel.curves]
    assert set(labels) == {*expected, "gfbs, one shot, by MACs, w_beta 0.05"}
    styles = make_styles(panel.curves)
    assert len({styles[label] for label in labels}) == len(labels)
    for method in ("one shot", "smooth"):  # two criteria in two variants
        make_result(tmp_path / f"l1 {method}", criterion="l1", method=method)
    curves = make_panels(table(tmp_path))[0].curves
    assert len(set(make_styles(curves).values())) == len(curves) == len(labels) + 2


def test_every_criterion_has_a_colour_and_a_marker_of_its_own(tmp_path):
    (panel,) = make_panels(eight_by_three(tmp_path))
    styles = make_styles(panel.curves)
    alone = make_styles([c for c in panel.curves if c.criterion in ("l1", "fpgm")])
    for values in zip(*styles.values(), strict=True):
        assert len(set(values)) == len(CRITERIA)
    assert alone["l1"] == styles["l1"]  # whatever else is in the plot


def test_the_legend_names_every_curve_and_the_titles_say_what_is_shown(tmp_path):
    figure = draw(eight_by_three(tmp_path))
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [*CRITERIA, "fine-tuned", "after surgery", "baseline"]
    titles = {axes.get_title(loc="left") for part in figure.subfigs for axes in part.axes}
    assert {"gateresnet20 on cifar10: top-1", "channels kept per layer, p 0.5"} <= titles
    make_result(tmp_path / "held" / "a", holdout={}, config={"holdout": 9})
    make_result(tmp_path / "cut" / "a", accuracy={"last": None})
    for folder, shown in (
        ("held", ["gfbs", "fine-tuned (best on holdout)", "after surgery", "baseline"]),
        ("cut", ["gfbs", "after surgery", "baseline"]),
    ):
        (legend,) = draw(table(tmp_path / folder)).legends
        assert [text.get_text() for text in legend.get_texts()] == shown


def test_the_size_in_the_middle_is_one_that_most_curves_have():
    def asked(*values, kind="p"):
        return {Asked(kind, value) for value in values}

    assert middle_asked([asked(0.3, 0.5, 0.7), asked(0.3, 0.5, 0.7)]) == Asked("p", 0.5)
    assert middle_asked([asked(0.1, 0.2, 0.3, 0.5), asked(0.5)]) == Asked("p", 0.5)
    assert middle_asked([asked(0.2, 0.4, kind="MACs"), asked(0.5)]).kind == "MACs"


def test_names_of_layers_are_short_and_stay_different():
    assert short_names(["features.2", "features.11"]) == ["2", "11"]
    names = ["gate1", "layer1.0.gate1", "layer1.0.gate2"]
    assert short_names(names) == ["g1", "1.0.g1", "1.0.g2"]
    assert short_names(["gate1"]) == ["g1"]


@pytest.mark.parametrize(
    "ending, start", [("png", b"\x89PNG\r\n\x1a\n"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_the_plot_is_a_file_of_its_kind(tmp_path, ending, start):
    make_result(tmp_path / "a")
    make_result(tmp_path / "b", config={"net": "gatevgg16"}, accuracy={"last": None})
    path = tmp_path / f"plot.{ending}"
    path.write_text("earlier")
    table(tmp_path, plot=path)
    content = path.read_bytes()
    assert content.startswith(start)
    if ending == "png":
        width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
        assert width > 1600 and height > 1000
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [path.name]


def test_without_matplotlib_the_table_works_and_the_plot_says_what_to_install(
    tmp_path, monkeypatch
):
    make_result(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "tools.plots")
    table(tmp_path)
    with pytest.raises(InputError, match="matplotlib.*pip install -r requirements-dev.txt"):
        table(tmp_path, plot=tmp_path / "plot.png", csv=tmp_path / "table.csv")
    assert not (tmp_path / "table.csv").exists()


def test_matplotlib_is_not_loaded_for_the_table():
    code = "import sys, tools.results; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: "not JSON", "cannot be read as JSON"),
        (lambda r: [], "no result of a pruning script"),
        (lambda r: {}, "no result of a pruning script"),
        (lambda r: {**r, "accuracy": {"baseline": 90}}, "lacks 'last'"),
        (lambda r: {k: v for k, v in r.items() if k != "channels"}, "lacks 'channels'"),
        (lambda r: {**r, "budget": {"macs": 0.5, "params": None}}, "how much was asked for"),
        (lambda r: {**r, "net": 3}, "3 where a word should be"),
        (lambda r: {**r, "accuracy": {**r["accuracy"], "last": "90"}}, "'90' where a number"),
        (lambda r: {**r, "accuracy": {**r["accuracy"], "last": float("nan")}}, "nan where"),
        (lambda r: {**r, "channels": {"gate1": {"before": 0, "after": 0}}}, "division"),
        (lambda r: {**r, "config": None}, "no result of a pruning script"),
    ],
)
def test_a_file_that_is_none_of_ours_is_named(tmp_path, change, message):
    changed = change(make_result(tmp_path / "a"))
    path = tmp_path / "a" / "result.json"
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(InputError) as error:
        table(tmp_path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_folders_without_results(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in (
        ("empty", "no result.json of a pruning run below"),
        ("nowhere", "no such folder"),
        ("file", "not a folder"),
    ):
        with pytest.raises(InputError, match=message) as error:
            table(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_files_that_cannot_be_written(tmp_path):
    make_result(tmp_path / "a")
    for flag, name in (("csv", "a"), ("plot", "a/result.json/x.png")):
        with pytest.raises(InputError, match=f"--{flag} .*cannot be written"):
            table(tmp_path, **{flag: tmp_path / name})


@pytest.mark.parametrize(
    "argv, message",
    [([], "FOLDER"), (["x", "--plot", "x.gif"], ".png, .pdf, .svg"), (["x", "--what"], "--what")],
)
def test_bad_flags_are_one_line_and_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as left:
        results.parse_args(argv)
    shown = capsys.readouterr().err
    assert left.value.code == 2 and message in shown and shown.count("\n") == 1


def test_the_command_leaves_with_code_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "tools.results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_what_the_scripts_write(trained, capsys):
    made = run_gfbs("--p", "0.5", "--seed", "3", "--recalibrate", "1")
    capsys.readouterr()
    (row,) = table(trained.parent, plot=trained / "plot.png")
    accuracy = made["accuracy"]
    assert {name: spread.mean for name, spread in row.accuracy.items()} == {
        "baseline": accuracy["baseline"], "after_surgery": accuracy["after_surgery"],
        "recalibrated": accuracy["recalibrated"], "fine_tuned": accuracy["last"],
    }  # fmt: skip
    assert row.channels.keys() == made["channels"].keys()
    assert row.macs == Spread(
        100 * made["cost"]["macs"]["after"] / made["cost"]["macs"]["before"], None
    )
    assert "Left out: 1 result.json of unpruned networks" in capsys.readouterr().out
    (trial,) = filter(None, map(read_trial, find_files([trained])))
    assert trial.settings["baseline epochs"] == 2 and trial.seeds == (3, None, 1, None)
    assert make_rows(group_trials([trial])) == [row]
    (one_run(trained, "gfbs_p0.5_seed3") / "result.json").unlink()
    with pytest.raises(InputError, match="but 1 of unpruned networks"):
        table(trained)
