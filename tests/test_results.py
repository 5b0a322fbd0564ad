"""Tables, page and plots of results, from made-up result.json files and from one of the scripts."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_gfbs

from tools import results
from tools.plots import draw
from tools.trials import CIRCUMSTANCES, OUTCOME, WHAT
from utils.errors import InputError
from utils.saliency import CRITERIA

ROOT = Path(__file__).parents[1]
WIDTHS = {"gate1": 16, "layer1.0.gate1": 16, "layer2.0.gate2": 32}


def make_result(folder, *, seed=1, criterion="gfbs", p=0.5, method="one shot", **changes):
    """Write a result.json; ``config``, ``baseline`` and ``accuracy`` add to the usual ones."""
    draw = random.Random(f"{seed} {criterion} {p} {method} {changes}")
    smaller = (1 - p) * draw.uniform(0.9, 1)
    config = {"net": "gateresnet20", "dataset": "cifar10", "criterion": criterion, "p": p}
    config |= {"w_beta": 0.05, "epochs": 3, "score_images": 200, "classes": "10 (0123abcd)"}
    config |= {"seed": seed, "baseline": f"digest{seed}", **changes.pop("config", {})}
    told = changes.pop("baseline", {})
    baseline = None if told is None else {"epochs": 10, "seed": seed, **told}
    accuracy = {"baseline": 90 + draw.random(), "after_surgery": 20 + draw.random()}
    accuracy |= {"last": 88 + draw.random(), "best": 89 + draw.random(), "best_epoch": 2}
    result = {"net": config["net"], "dataset": config["dataset"], "seed": seed, "config": config}
    result |= {"criterion": criterion, "method": method, "baseline": {"config": baseline}}
    result |= {"accuracy": accuracy | changes.pop("accuracy", {}), "top5": {"last": 99.5}}
    macs = {"before": 40_000_000, "after": round(40_000_000 * smaller)}
    result["cost"] = {"macs": macs, "params": {"before": 270_000, "after": round(2e5 * smaller)}}
    result["channels"] = {n: {"before": w, "after": round(w * smaller)} for n, w in WIDTHS.items()}
    result["history"] = [{"images_per_second": speed, "round": 0} for speed in (100, 200)]
    result |= {"versions": {"torch": "2.0", "commit": "abc1234"}}
    result |= {"wall_time_seconds": draw.random(), **changes}
    write(folder, result)
    return result


def write(folder, result):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(result if isinstance(result, str) else json.dumps(result))


def make_results(folder, runs):
    return [make_result(folder / f"{i}", **run) for i, run in enumerate(runs)]


def tool(*inputs, **flags):
    argv = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    return results.main(results.parse_args([str(word) for word in (*inputs, *argv)]))


@pytest.fixture
def show(tmp_path, capsys):
    """Print the table of some runs, or of what is there."""

    def shown(runs=()):
        make_results(tmp_path, runs)
        tool(tmp_path)
        return capsys.readouterr().out

    return shown


def trials(*inputs):
    """The rows of one table."""
    (found,) = tool(*inputs).values()
    return found


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def printed(text):
    """The table of a text, as a dictionary per row."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 160
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_mean_and_sample_deviation_over_seeds(tmp_path, show):
    made = make_results(tmp_path / "a", [{"seed": seed} for seed in (1, 2, 3)])
    names = {"baseline": "baseline", "after surgery": "after_surgery", "fine-tuned": "last"}
    expected = {title: [run["accuracy"][name] for run in made] for title, name in names.items()}
    for title, name in (("MACs kept", "macs"), ("params kept", "params")):
        costs = [result["cost"][name] for result in made]
        expected[title] = [100 * cost["after"] / cost["before"] for cost in costs]
    (row,) = printed(show())
    for title, values in expected.items():
        assert row[title] == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert row["seeds"] == "3"
    rows = printed(show([{"p": 0.3, "accuracy": {"last": None}}]))
    (alone,) = (row for row in rows if row["fine-tuned"] == "-")
    assert "±" not in alone["MACs kept"]


def test_csv_has_a_row_per_run_with_all_that_was_measured(tmp_path):
    made = make_result(tmp_path / "a", config={"amp": "bf16"}, accuracy={"best": 1e-7})
    tool(tmp_path, csv=tmp_path / "t.csv")
    (row,) = read(tmp_path / "t.csv")
    assert row.keys() >= {*WHAT, *OUTCOME, *CIRCUMSTANCES}
    for name, value in made["accuracy"].items():
        assert float(row[name if name == "best_epoch" else f"top1_{name}"]) == value
    for of, cost in made["cost"].items():
        assert [row[f"{of}_{when}"] for when in cost] == [str(size) for size in cost.values()]
    expected = {"asked_of": "p", "asked": "0.5", "seed": "1", "score_seed": "", "torch": "2.0"}
    expected |= {"commit": "abc1234", "threads": "", "amp": "bf16", "baseline": "digest1"}
    expected |= {"baseline_epochs": "10", "images_per_second": "150", "top5_last": "99.5"}
    assert expected.items() <= row.items()
    widths = (f"{name}:{n['after']}/{n['before']}" for name, n in made["channels"].items())
    assert row["channels"] == " ".join(widths)


def test_rows_are_kept_and_the_same_run_is_replaced(tmp_path):
    table = tmp_path / "t.csv"
    make_results(tmp_path / "first", [{"seed": 1}, {"seed": 2}])
    tool(tmp_path / "first", csv=table)
    before = table.read_bytes()
    tool(tmp_path / "first", csv=table)
    tool(table, csv=tmp_path / "copy.csv")
    assert table.read_bytes() == before == (tmp_path / "copy.csv").read_bytes()
    again = [{"seed": 2, "accuracy": {"last": 1.5}}, {"seed": 3, "config": {"cosine": True}}]
    make_results(tmp_path / "again", again)
    tool(tmp_path / "again", csv=table)
    rows = read(table)
    assert [(row["seed"], row["cosine"]) for row in rows] == [("1", ""), ("2", ""), ("3", "True")]
    assert rows[1]["top1_last"] == "1.5"
    both = tmp_path / "both.csv"
    tool(tmp_path / "again", tmp_path / "first" / "0", csv=both)
    assert both.read_bytes() == table.read_bytes()  # whatever came first


def test_only_seeds_are_averaged_and_the_rest_is_told(show):
    runs = [{"seed": seed, "config": {"score_seed": seed}} for seed in (1, 2)]
    configs = ({"w_beta": 0.0}, {"amp": "bf16", "cosine": True})
    runs += [{"seed": seed, "config": config} for seed in (1, 2) for config in configs]
    text = show([*runs, *({"seed": seed, "baseline": {"epochs": 20}} for seed in (1, 2))])
    rows = printed(text)
    assert {row["seeds"] for row in rows} == {"2"}
    expected = {f"baseline_epochs {told}" for told in ("10, w_beta 0.05", "10, w_beta 0")}
    expected |= {"baseline_epochs 20, w_beta 0.05"}
    expected |= {"amp bf16, baseline_epochs 10, cosine, w_beta 0.05"}
    assert {row["settings"] for row in rows} == expected
    same = " ".join(text[: text.index("|")].split())
    for words in ("network gateresnet20", "criterion gfbs", "asked p 0.5", "score_images 200"):
        assert words in same and words not in text[text.index("|") :]


ALIKE = (("round_to", [1, None]), ("recalibrate", [0, None, 0.0]), ("cosine", [False, None]))
OTHERS = (("round_to", [8, None]), ("weight_decay", [0, None]), ("lr", [0.1, 0.10, 0.2]))


@pytest.mark.parametrize(
    "flag, values, experiments", [(*a, 1) for a in ALIKE] + [(*other, 2) for other in OTHERS]
)
def test_a_value_equals_itself_and_a_missing_flag_is_off(tmp_path, flag, values, experiments):
    """None stands for a configuration without the flag."""
    for seed, value in enumerate(values):
        result = make_result(tmp_path / f"{seed}", seed=seed, config={flag: value})
        if value is None:
            del result["config"][flag]
            write(tmp_path / f"{seed}", result)
    tool(tmp_path, csv=tmp_path / "t.csv")
    for source in (tmp_path, tmp_path / "t.csv"):
        assert len(results.make_rows(trials(source))[0]) == experiments


def test_baselines_that_do_not_tell_how_they_were_trained_are_told_apart_by_weights(tmp_path):
    weights = (("v1", 1), ("v1", 2), ("v2", 1))
    for i, (name, seed) in enumerate(weights):
        make_result(tmp_path / f"{i}", seed=seed, config={"baseline": name}, baseline=None)
    rows = results.make_rows(trials(tmp_path))[0]
    assert {row.also: len(row.runs) for row in rows} == {("baseline v1",): 2, ("baseline v2",): 1}


def test_a_copied_folder_counts_once_and_a_contradiction_is_refused(tmp_path):
    write(tmp_path / "copy", {**make_result(tmp_path / "a"), "wall_time_seconds": 7})
    assert len(trials(tmp_path, tmp_path / "a")) == 1
    make_result(tmp_path / "other", accuracy={"last": 1.0})
    with pytest.raises(InputError, match=r"a.result\.json .*other.result\.json"):
        tool(tmp_path)


def test_fine_tuned_is_the_last_epoch_or_the_one_that_a_holdout_chose(show):
    last = {"p": 0.3, "accuracy": {"last": 41}}
    assert "holdout," not in show([last]).split("|")[-1]
    held = {"holdout": {"images": 100}, "accuracy": {"best": 42}, "config": {"holdout": 100}}
    text = show([last, held])
    assert {row["fine-tuned"] for row in printed(text)} == {"41.00", "† 42.00"}
    assert "chosen on the holdout" in text


def test_rows_are_in_order_of_criteria_and_sizes(tmp_path):
    keys = [(criterion, size) for criterion in CRITERIA for size in (0.3, 0.5, 0.7)]
    mixed = random.Random(0).sample(keys, len(keys))
    make_results(tmp_path, [{"criterion": criterion, "p": p} for criterion, p in mixed])
    rows = results.make_rows(trials(tmp_path))[0]
    assert [(row.text("criterion"), float(row.text("asked"))) for row in rows] == keys


def test_what_was_asked_for(show):
    sizes = ({"macs": 0.55}, {"params": 0.2}, {"p": 0.35}, {"p": 0.0})
    rows = printed(show([{"config": {"p": None, **size}} for size in sizes]))
    assert {row["asked"] for row in rows} == {"MACs 55 %", "params 20 %", "p 0.35", "p 0"}


def test_a_table_stays_narrow_whatever_differs(show):
    runs = []
    for i in range(12):
        config = {f"flag_number_{j}": i * j for j in range(30)} | {"net": "net" * i, "dataset": "d"}
        runs.append({"criterion": "c" * 9 * i, "method": f"{i} steps", "config": config})
        runs.append({"seed": 2, "config": config, "p": i / 20})
    text = show(runs)
    assert len(printed(text)) == 24 and "flag_number_29 319" in text


EVIL = {"=HYPERLINK()": "'=HYPERLINK()", "+1+cmd": "'+1+cmd", "@SUM": "'@SUM", "\t=1": "?=1"}
EVIL |= {"-1e5": "-1e5", "\x1b[31mred\x07": "?[31mred?", "a|b\nc\u202e": "a|b?c?"}
EVIL |= {"'quoted": "''quoted"}


def test_nothing_of_others_is_obeyed_by_terminal_spreadsheet_or_markdown(tmp_path, capsys):
    for i, text in enumerate(EVIL):
        make_result(tmp_path / f"{i}", criterion=text, config={text: text, "dataset": text})
    tool(tmp_path, csv=tmp_path / "t.csv")
    assert {row["criterion"] for row in read(tmp_path / "t.csv")} == {*EVIL.values()}
    raw = (tmp_path / "t.csv").read_text()
    cells = [text for row in csv.reader(io.StringIO(raw)) for text in row]
    assert not any(re.match(r"[=+@\t\r]|-[^\d.]", text) for text in cells)
    before = capsys.readouterr().out
    tool(tmp_path / "t.csv")
    after = capsys.readouterr().out
    assert before == after and len(printed(after)) == len(EVIL)
    for text in (raw, after):
        assert all(letter.isprintable() or letter == "\n" for letter in text)
    draw(trials(tmp_path / "t.csv")).canvas.draw()
    write(tmp_path / "0", '{"config": {"criterion": 1, "net\x1b": 1')
    with pytest.raises(InputError) as error:
        tool(tmp_path)
    assert str(error.value).isprintable()


def test_page_has_every_number_from_the_tables_and_the_same_bytes_each_time(tmp_path):
    runs = [{"seed": seed, "criterion": name} for seed in (1, 2) for name in ("l1", "gfbs")]
    make_results(tmp_path / "runs", runs)
    tool(tmp_path / "runs", csv=tmp_path / "results" / "some_criteria.csv")
    (tmp_path / "results" / "other.csv").write_text("")
    (tmp_path / "results" / "other.md").write_text("# A title\n\nAnd a remark.\n")
    made = []
    for _ in range(2):
        tool(tmp_path / "results", page=tmp_path / "docs" / "results.md")
        made.append({path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()})
    assert made[0] == made[1] and made[0].keys() == {"results.md", "some_criteria.svg"}
    text = made[0]["results.md"].decode()
    assert "## A title\n\nAnd a remark.\n\nNo rows" in text and "## some criteria\n" in text
    assert "![some criteria](some_criteria.svg)" in text
    same = " ".join(text.split())
    for said in ("cifar10", "10 (0123abcd)", "baseline_epochs 10", ", epochs 3, "):
        assert said in same
    assert "baseline digest1, digest2; threads not recorded; torch 2.0; commit abc1234" in text
    assert [row["criterion"] for row in printed(text)] == ["gfbs", "l1"]


def test_the_page_of_this_repository_is_made_from_its_tables():
    tables = sorted((ROOT / "results").glob("*.csv"))
    text = results.page({path: results.merge([], results.read_csv(path)) for path in tables})
    assert (ROOT / "docs" / "results.md").read_text() == text, "run: make tables"
    for name in re.findall(r"\]\((\w+\.svg)\)", text):
        assert (ROOT / "docs" / name).is_file(), name
    explained = (ROOT / "results" / "README.md").read_text()
    assert all(f"`{name}`" in explained for name in (*WHAT, *OUTCOME, *CIRCUMSTANCES))
    assert not list((ROOT / "results").rglob("result.json"))


LONG = {"some_flag": "long words " * 20}
SIZES = [{"criterion": c, "p": p} for c in CRITERIA for p in (0.3, 0.5, 0.7)]
NETS = [{**LONG, "net": net} for net in ("gatevgg16", "gateresnet20")]
PLOTS = {  # how many panels, and the runs
    "criteria": (1, [{**size, "seed": seed} for size in SIZES for seed in (1, 2)]),
    "values": (5, [{"config": {"w_beta": i / 40, "amp": "bf16"}} for i in range(40)]),
    "one run": (1, [{"accuracy": {"last": None}}]),
    "networks": (2, [{"p": 0.3, "config": net} for net in NETS]),
}
PLOTS["networks"][1].extend({"p": 0.5, "config": {**net, "other": "x" * 150}} for net in NETS)


@pytest.mark.parametrize("name", PLOTS)
def test_plots_stay_readable(tmp_path, name):
    panels, runs = PLOTS[name]
    make_results(tmp_path, runs)
    figure = draw(trials(tmp_path))
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    assert len(figure.subfigs) == panels
    boxes = {}
    if name == "values":
        shown = [t.get_text() for strip in figure.subfigs for t in strip.legends[0].get_texts()]
        assert {f"w_beta {i / 40:g}" for i in range(40)} == {*shown} - {"baseline", "chance"}
    for number, strip in enumerate(figure.subfigs):
        (legend,) = strip.legends
        curves = [text.get_text() for text in legend.get_texts()][:-2]
        assert 1 <= len(curves) <= 8 and "cifar10" in strip.get_suptitle()
        *accuracy, _ = strip.axes
        titles = {axes.get_xlabel() for axes in accuracy}
        assert titles == {"", "MACs kept, %", "params kept, %"} or len(accuracy) == 2
        for axes in accuracy[-2:]:  # the lowest
            (chance,) = (line for line in axes.lines if line.get_label() == "chance")
            assert chance.get_ydata()[0] == 10 and axes.get_ylim()[0] <= 10 <= axes.get_ylim()[1]
            assert len(axes.containers) == len(curves)
        boxes[f"{number} title"] = strip._suptitle.get_window_extent(renderer)
        boxes[f"{number} legend"] = legend.get_window_extent(renderer)
        for i, axes in enumerate(strip.axes):
            boxes[f"{number} {i}"] = axes.get_tightbbox(renderer)
    page = figure.bbox.padded(1)
    for name, box in boxes.items():
        assert page.containsx(box.x0) and page.containsx(box.x1), name
        assert page.containsy(box.y0) and page.containsy(box.y1), name
        for other, its in boxes.items():
            assert name == other or not box.padded(-1).overlaps(its.padded(-1)), (name, other)


def test_the_plot_is_a_file_of_its_kind_and_needs_matplotlib(tmp_path, monkeypatch):
    make_result(tmp_path)
    for ending, start in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        tool(tmp_path, plot=tmp_path / f"plot.{ending}")
        assert (tmp_path / f"plot.{ending}").read_bytes().startswith(start)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    tool(tmp_path)
    with pytest.raises(InputError, match="matplotlib.*pip install -r requirements-dev.txt"):
        tool(tmp_path, plot=tmp_path / "plot.png", csv=tmp_path / "table.csv")
    assert not (tmp_path / "table.csv").exists()


NO_RESULT = "no result of a pruning script .*; remove it, or run the script again with --overwrite"


WRONG = [("not JSON", NO_RESULT), ("{}", NO_RESULT), ({"config": None}, NO_RESULT)]
WRONG += [({"channels": [1]}, NO_RESULT)]
WRONG += [({"config": {"criterion": "l1", "p": 0.5, "macs": 0.5}}, NO_RESULT)]
WRONG += [({"accuracy": {"last": word}}, f"'{word}', where a number") for word in ("nan", "high")]
WRONG += [({"cost": {"macs": {"before": 0, "after": 0}}}, "macs_before is '0'")]


@pytest.mark.parametrize("change, message", WRONG)
def test_a_result_that_is_none_of_ours_is_named(tmp_path, change, message):
    made = make_result(tmp_path / "a")
    write(tmp_path / "a", change if isinstance(change, str) else {**made, **change})
    with pytest.raises(InputError, match=f"^{tmp_path}/a/result.json: .*{message}"):
        tool(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace("criterion", "network"), "no column criterion"),
        (lambda text: text + "short,row\n", "row 3: not as many cells as columns"),
        (lambda text: text.replace("0.5", "half"), "row 2: asked is 'half'"),
        (lambda text: text.encode("utf-16").decode("latin-1"), ""),
    ],
)
def test_a_table_that_is_none_of_ours_is_named(tmp_path, change, message):
    make_result(tmp_path)
    path = tmp_path / "t.csv"
    tool(tmp_path, csv=path)
    path.write_text(change(path.read_text()), encoding="latin-1")
    with pytest.raises(InputError, match=f"^{path}.*{message}"):
        tool(path)


def test_a_result_of_an_earlier_version_leaves_cells_empty(tmp_path, capsys):
    made = make_result(tmp_path, history=[{"stage": 0, "images_per_second": 300}])
    assert trials(tmp_path)[0]["images_per_second"] == "300"
    needed = ("net", "dataset", "seed", "criterion", "method", "accuracy", "config")
    write(tmp_path, {name: made[name] for name in needed})
    capsys.readouterr()
    (row,) = trials(tmp_path)
    assert not any(row.get(name) for name in (*CIRCUMSTANCES, "top5_last", "channels"))
    assert printed(capsys.readouterr().out)[0]["fine-tuned"]
    draw([row]).canvas.draw()


def test_places_without_results_and_files_that_cannot_be_written(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    said = {"empty": "no pruning run in", "nowhere": "no such folder", "file": "no such folder"}
    for name, message in (said | {"x.csv": "cannot be read"}).items():
        with pytest.raises(InputError, match=f"{name}.*{message}|{message}.*{name}"):
            tool(tmp_path / name)
    make_result(tmp_path / "a")
    for flag, name in (("csv", "file/x.csv"), ("plot", "a/result.json/x.png")):
        with pytest.raises(InputError, match=f"cannot be written.*--{flag}"):
            tool(tmp_path, **{flag: tmp_path / name})


BAD = {"": "INPUT", "x --plot x.gif": ".png, .pdf, .svg", "x --what": "--what"}


@pytest.mark.parametrize(
    "argv, message", [*BAD.items(), ("x --page p --csv x", "--page goes with")]
)
def test_bad_flags_are_one_line_and_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as left:
        results.parse_args(argv.split())
    shown = capsys.readouterr().err
    assert left.value.code == 2 and message in shown and shown.count("\n") == 1


def test_what_the_scripts_write(trained, capsys):
    made = run_gfbs("--p", "0.5", "--seed", "3", "--recalibrate", "1")
    capsys.readouterr()
    (row,) = trials(trained.parent)
    assert "Left out: 1 result.json of unpruned networks" in capsys.readouterr().out
    for name in ("baseline", "after_surgery", "recalibrated", "last", "best"):
        assert float(row[f"top1_{name}"]) == made["accuracy"][name]
    assert row["baseline_epochs"] == "2" and row["baseline_seed"] == "1" and row["seed"] == "3"
    for name in ("torch", "commit"):
        assert row[name] == (made["versions"][name] or "")
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = ["git", f"--git-dir={ROOT / '.git'}", "rev-parse", "HEAD"]
        assert subprocess.check_output(head, text=True).startswith(row["commit"] or "none")
