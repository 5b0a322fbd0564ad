"""Pruning runs as rows of text: read from result.json files and CSV tables, merged, written."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gfbs_cifar
import gfbs_imagenet
import train
from utils.cli.settings import configuration
from utils.errors import InputError
from utils.saliency import CRITERIA

# A run: the text of each cell by column; "" for None, a switch that is off, and what is unknown.
Trial = dict[str, str]

ASKED = {"p": "p", "macs": "MACs", "params": "params"}
WHAT = ("net", "dataset", "criterion", "method", "asked_of", "asked", "seed", "score_seed")
ACCURACIES = ("baseline", "after_surgery", "recalibrated", "last", "best")
NUMBERS = (
    "macs_before", "macs_after", "params_before", "params_after",
    *(f"{kind}_{name}" for kind in ("top1", "top5") for name in ACCURACIES), "best_epoch",
)  # fmt: skip
OUTCOME = (*NUMBERS, "chosen_on", "channels")
# These differ between two runs that compute the same.
CIRCUMSTANCES = ("images_per_second", "wall_time_seconds", "threads", "torch", "commit")
PLACE = "place"  # where a row comes from, for messages; no table has it
WIDTHS = re.compile(r"(\S+):(\d+)/([1-9]\d*)")  # of a channel group, after/before
# Flags that other columns tell; what a baseline has of its run.
TOLD = {*WHAT, *ASKED, "smooth", "steps", "from_scratch", "threads"}
COMMON = {"net", "dataset", "classes", "image_size", "baseline", "threads"}


def cell(value: Any) -> str:
    """One text for equal values: 1 for 1.0; no character that a terminal would obey."""
    if value is None or value is False:
        return ""
    if isinstance(value, (list, tuple)):
        return ",".join(map(cell, value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "".join(c if c.isprintable() else "?" for c in str(value))


def find_files(folders: Iterable[Path]) -> list[Path]:
    """Every result.json below the folders."""
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; name one of results, or a .csv file")
    return [path for folder in folders for path in sorted(folder.rglob("result.json"))]


def read_result(path: Path) -> Trial | None:
    """What a result.json says; None for one of train.py, which prunes nothing.

    What an earlier version did not write leaves its cell empty. Raises InputError for what no
    script of this project writes.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{cell(path)}: cannot be read as JSON ({cell(error)})") from error
    try:
        return _checked(_trial(result), path) if "criterion" in result["config"] else None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{cell(path)}: no result of a pruning script ({error!r})") from error


def _trial(result: Mapping[str, Any]) -> Trial:
    parts = ("baseline", "versions", "cost", "channels", "accuracy", "top5")
    baseline, versions, cost, channels, *kinds = (result.get(name) or {} for name in parts)
    config, history = result["config"], result.get("history") or []
    [asked] = [of for of in ASKED if config.get(of) is not None] or [None]
    speeds = [epoch["images_per_second"] for epoch in history if "images_per_second" in epoch]
    values = {
        **{name: value for name, value in config.items() if name not in TOLD - {*WHAT}},
        **{f"baseline_{name}": value for name, value in (baseline.get("config") or {}).items()
           if name not in COMMON},
        "net": config["net"], "dataset": config["dataset"], "method": result.get("method"),
        "asked_of": asked and ASKED[asked], "asked": asked and config[asked],
        **{f"{of}_{when}": cost.get(of, {}).get(when)
           for of in ("macs", "params") for when in ("before", "after")},
        **{f"{column}_{name}": kind.get(name)
           for column, kind in zip(("top1", "top5"), kinds, strict=True) for name in ACCURACIES},
        "best_epoch": kinds[0].get("best_epoch"),
        "chosen_on": "holdout" if "holdout" in result else None,
        "channels": " ".join(f"{''.join(name.split())}:{width['after']}/{width['before']}"
                             for name, width in channels.items()),
        "images_per_second": round(sum(speeds) / len(speeds), 1) if speeds else None,
        "wall_time_seconds": result.get("wall_time_seconds"),
        "threads": versions.get("threads", config.get("threads")),
        "torch": versions.get("torch"), "commit": versions.get("commit"),
    }  # fmt: skip
    return {cell(name): cell(value) for name, value in values.items()}


def _checked(trial: Trial, place: Any) -> Trial:
    """With the defaults of flags that it lacks; raises InputError for what cannot be computed."""
    for name in (*NUMBERS, "asked", "images_per_second", "wall_time_seconds"):
        text = trial.get(name) or "1"
        try:
            good = math.isfinite(float(text)) and not (name.endswith("_before") and float(text) < 1)
        except ValueError:
            good = False
        if not good:
            raise InputError(f"{cell(place)}: {name} is {text!r}, where a number should be")
    return {**defaults(trial), **trial, PLACE: cell(place)}


def defaults(trial: Trial) -> Trial:
    """The settings of the script that made this run, where no flag is given."""
    found = _defaults(gfbs_imagenet if trial.get("train_bs") else gfbs_cifar)
    if trial.get("baseline_epochs"):
        of = gfbs_imagenet if trial.get("baseline_train_bs") else gfbs_cifar
        own = _defaults(of if trial.get("baseline_criterion") else train).items()
        found = found | {f"baseline_{name}": text for name, text in own if name not in COMMON}
    return found


@cache
def _defaults(script: Any) -> Trial:
    config = configuration(script.parse_args(["--data_dir", "."]))
    return {name: cell(value) for name, value in config.items() if name not in TOLD}


def read_csv(path: Path) -> list[Trial]:
    """The rows of a table that ``csv_text`` wrote; InputError for another file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *lines = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from error
    missing = [name for name in WHAT if name not in header]
    if header and missing:
        raise InputError(f"{path}: no table of runs: it has no column {', '.join(missing)}")
    trials = []
    for number, line in enumerate(lines, 2):
        place = f"{path}, row {number}"
        if len(line) != len(header):
            raise InputError(f"{place}: {len(line)} cells for {len(header)} columns")
        texts = [cell(text.removeprefix("'")) for text in header + line]
        trials.append(_checked(dict(zip(texts, texts[len(line) :], strict=False)), place))
    return trials


def csv_text(trials: Sequence[Trial]) -> str:
    """A row per run; settings that are off in every row have no column."""
    used = {n for t in trials for n, text in [*defaults(t).items(), *t.items()] if text}
    names = [*WHAT, *sorted(used - {*WHAT, *OUTCOME, *CIRCUMSTANCES, PLACE}), *OUTCOME,
             *CIRCUMSTANCES]  # fmt: skip
    text = io.StringIO()
    for row in (dict(zip(names, names, strict=True)), *trials):
        csv.writer(text, lineterminator="\n").writerow(_guarded(row.get(n, "")) for n in names)
    return text.getvalue()


def _guarded(text: str) -> str:
    """No spreadsheet takes the text for a formula; ``read_csv`` takes the apostrophe away."""
    number = re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", text)
    return f"'{text}" if text.startswith(("'", "=", "+", "-", "@")) and not number else text


def settings(trial: Trial) -> Trial:
    """All that makes the run what it is, seeds and weights of the baseline included."""
    rest = {*OUTCOME, *CIRCUMSTANCES, PLACE}
    return {name: text for name, text in trial.items() if text and name not in rest}


def is_seed(name: str, trial: Trial) -> bool:
    """Whether runs that differ in this setting are repetitions of one experiment.

    The baseline's weights are a setting where nothing else says how it was trained.
    """
    told = trial.get("baseline_epochs") and name == "baseline"
    return bool(told) or name in ("seed", "score_seed", "baseline_seed", "baseline_score_seed")


def merge(kept: Iterable[Trial], new: Iterable[Trial]) -> list[Trial]:
    """Every run once, in the order of the table; one of ``new`` replaces the same of ``kept``.

    Raises InputError for two of ``new`` that should be the same and are not.
    """
    found: dict[frozenset[tuple[str, str]], Trial] = {}
    for trial in new:
        other = found.setdefault(frozenset(settings(trial).items()), trial)
        if any(other.get(name) != trial.get(name) for name in OUTCOME):
            raise InputError(
                f"{other[PLACE]} and {trial[PLACE]} are the same experiment with the same seeds,"
                " but not the same results; leave one of them out"
            )
    merged = {frozenset(settings(trial).items()): trial for trial in kept} | found
    names = sorted({name for key in merged for name, _ in key} - {*WHAT})

    def order(trial: Trial) -> list[Any]:
        """Criteria as they are registered; of the sizes, the largest that stays first."""
        rank = [*CRITERIA, trial["criterion"]].index(trial["criterion"])
        asked = float(trial["asked"] or 0) * (1 if trial["asked_of"] == "p" else -1)
        seeds = [name for name in ("seed", "score_seed", *names) if is_seed(name, trial)]
        others = [name for name in names if name not in seeds]
        places, ways, repeats = (
            [natural(trial.get(name, "")) for name in part]
            for part in (("net", "dataset", "method"), ("criterion", *others), seeds)
        )
        return [places, rank, ways, trial["asked_of"], asked, repeats]

    return sorted(merged.values(), key=order)


def natural(text: str) -> list[tuple[bool, float, str]]:
    """A key that sorts the numbers within a text by size."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [(i % 2 == 1, float(part) if i % 2 else 0, part) for i, part in enumerate(parts)]
