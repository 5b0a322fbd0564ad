"""Pruning runs as rows of text, from result.json files and CSV tables; and experiments of these."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import InputError
from utils.run.existing import BEFORE
from utils.run.record import Record
from utils.saliency import CRITERIA

# A run: the text of each cell by column; "" for None, a switch that is off, and what is unknown.
Trial = dict[str, str]

COSTS = {"macs": "MACs", "params": "params"}
ASKED = {"p": "p", **COSTS}
COLUMNS = ("net", "dataset", "criterion", "method", "asked_of", "asked")  # also when printed
WHAT = (*COLUMNS, "seed", "score_seed")
ACCURACIES = ("baseline", "after_surgery", "recalibrated", "last", "best")
SHOWN = {"baseline": "baseline", "after_surgery": "after surgery"}
SHOWN |= {"recalibrated": "recalibrated", "fine_tuned": "fine-tuned"}
SIZES = ("macs_before", "macs_after", "params_before", "params_after")
NUMBERS = (*SIZES, *(f"top{k}_{name}" for k in (1, 5) for name in ACCURACIES), "best_epoch")
OUTCOME = (*NUMBERS, "chosen_on", "channels")
# These differ between two runs that compute the same.
CIRCUMSTANCES = ("images_per_second", "wall_time_seconds", "threads", "torch", "commit")
PLACE = "place"  # where a row comes from, for messages; no table has it
NO_SETTINGS = {*OUTCOME, *CIRCUMSTANCES, PLACE}
OTHERWISE = {*ASKED, "smooth", "steps", "from_scratch"}  # flags that other columns say
COMMON = {"net", "dataset", "classes", "image_size", "baseline"}  # of run and baseline


def cell(value: Any) -> str:
    """A value as text. Equal values give equal texts: 1 and 1.0 give "1". Control characters become
    question marks, since a terminal would obey them.
    """
    if value is None or value is False:
        return ""
    if isinstance(value, (list, tuple)):
        return ",".join(map(cell, value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "".join(c if c.isprintable() else "?" for c in str(value))


def read_result(path: Path) -> Trial | None:
    """A result.json; None for one of train.py, which prunes nothing.

    What an earlier version did not write leaves its cell empty.
    """
    try:
        run = Record.from_json(json.loads(path.read_text(encoding="utf-8")))
        if "criterion" not in run.config:
            return None
        trial = _trial(run)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = cell(f"{path}: no result of a pruning script ({error!r})")
        raise InputError(f"{told}; remove it, or run the script again with --overwrite") from error
    return _checked(trial, cell(path))


def _trial(run: Record) -> Trial:
    config, baseline = run.config, (run.baseline or {}).get("config") or {}
    [asked] = [of for of in ASKED if config.get(of) is not None] or [None]
    values = {name: value for name, value in config.items() if name not in OTHERWISE}
    values |= {f"baseline_{name}": v for name, v in baseline.items() if name not in COMMON}
    values |= {"net": run.net, "dataset": run.dataset, "method": run.method}
    values |= {"asked_of": ASKED.get(asked), "asked": config.get(asked)}
    for of, cost in run.cost.items():
        values |= {f"{of}_{when}": number for when, number in cost.items()}
    for name in ACCURACIES:
        values |= {f"top1_{name}": run.accuracy.get(name), f"top5_{name}": run.top5.get(name)}
    values |= {"best_epoch": run.accuracy.get("best_epoch")}
    values |= {"chosen_on": "holdout" if run.holdout else None}
    widths = (run.channels or {}).items()
    kept = (f"{''.join(n.split())}:{width['after']}/{width['before']}" for n, width in widths)
    values["channels"] = " ".join(kept)
    speeds = [epoch["images_per_second"] for epoch in run.history if "images_per_second" in epoch]
    values["images_per_second"] = round(statistics.fmean(speeds), 1) if speeds else None
    values["wall_time_seconds"] = run.wall_time_seconds
    known = run.versions or {}
    values |= {name: known.get(name) for name in ("threads", "torch", "commit")}
    return {cell(name): cell(value) for name, value in values.items()}


def _checked(trial: Trial, place: str) -> Trial:
    """Add the place, and flags younger than the row. Raise InputError where a number is none."""
    for name in (*NUMBERS, "asked", "images_per_second", "wall_time_seconds"):
        try:
            number = float(trial.get(name) or 1)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or (name.endswith("_before") and number < 1):
            raise InputError(f"{place}: {name} is {trial[name]!r}, where a number should be")
    return {name: cell(value) for name, value in BEFORE.items()} | trial | {PLACE: place}


def read_csv(path: Path) -> list[Trial]:
    """The rows of a table that ``csv_text`` wrote; InputError for another file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            lines, names = list(table), table.fieldnames or []
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from error
    if names and (missing := {*WHAT} - {*names}):
        raise InputError(f"{path}: no table of runs: it has no column {', '.join(sorted(missing))}")
    trials = []
    for number, line in enumerate(lines, 2):
        if None in line or None in line.values():
            raise InputError(f"{path}, row {number}: not as many cells as columns")
        trial = {cell(n.removeprefix("'")): cell(t.removeprefix("'")) for n, t in line.items()}
        trials.append(_checked(trial, f"{path}, row {number}"))
    return trials


def csv_text(trials: Sequence[Trial]) -> str:
    """A row per run; settings that are off in every row have no column."""
    used = {name for trial in trials for name in settings(trial)}
    names = [*WHAT, *sorted(used - {*WHAT}), *OUTCOME, *CIRCUMSTANCES]
    rows, file = [[trial.get(name, "") for name in names] for trial in trials], io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(map(_guarded, row) for row in [names, *rows])
    return file.getvalue()


def _guarded(text: str) -> str:
    """Keep a spreadsheet from taking the text for a formula; ``read_csv`` undoes it."""
    formula = re.match(r"['=@]|[+-](?![\d.]+(e[+-]?\d+)?$)", text)
    return f"'{text}" if formula else text


def settings(trial: Trial) -> Trial:
    """All that makes the run what it is, seeds and weights of the baseline included."""
    return {name: text for name, text in trial.items() if text and name not in NO_SETTINGS}


def experiment(trial: Trial) -> Trial:
    """The settings without seeds: runs that share them repeat one experiment.

    Other weights of a baseline are a seed if the baseline's settings are known.
    """
    seeds = {"seed", "score_seed", "baseline_seed", "baseline_score_seed"}
    if trial.get("baseline_epochs"):
        seeds.add("baseline")
    return {name: text for name, text in settings(trial).items() if name not in seeds}


def merge(kept: Iterable[Trial], new: Iterable[Trial]) -> list[Trial]:
    """Every run once, in the order of the table; one of ``new`` replaces the same of ``kept``.

    Raises InputError for two of ``new`` that should be the same and are not.
    """
    found: dict[frozenset, Trial] = {}
    for trial in new:
        other = found.setdefault(frozenset(settings(trial).items()), trial)
        if any(other.get(name) != trial.get(name) for name in OUTCOME):
            same = f"{other[PLACE]} and {trial[PLACE]} are the same experiment with the same seeds"
            raise InputError(f"{same}, but not the same results; leave one of them out")
    merged = {frozenset(settings(trial).items()): trial for trial in kept} | found
    used = {name for trial in merged.values() for name in settings(trial)}
    names = ["seed", "score_seed", *sorted(used - {*WHAT})]

    def order(trial: Trial) -> list[Any]:
        """Criteria as they are registered; of the sizes, the largest network first."""
        setup, rank = experiment(trial), [*CRITERIA, trial["criterion"]].index(trial["criterion"])
        place = [natural(trial[name]) for name in ("net", "dataset", "method")]
        way = [natural(setup.get(name, "")) for name in ("criterion", *names)]
        asked = float(trial["asked"] or 0) * (1 if trial["asked_of"] == "p" else -1)
        seeds = [natural(trial.get(name, "")) for name in names]
        return [place, rank, way, trial["asked_of"], asked, seeds]

    return sorted(merged.values(), key=order)


def natural(text: str) -> list[tuple[float, str]]:
    """A key that sorts the numbers within a text by size."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)  # every other part is a number
    return [(float(part) if i % 2 else 0, part) for i, part in enumerate(parts)]


class Row(NamedTuple):
    """An experiment: runs that differ in nothing but their seeds.

    ``also`` has in words the settings without a column in which rows differ. ``percent`` has a
    value per run: accuracies by name, and what ``macs``, ``params`` and every channel group keep.
    """

    runs: list[Trial]
    also: tuple[str, ...]
    percent: dict[str, list[float]]

    def text(self, column: str) -> str:
        """Of a column that is the same in all runs."""
        return self.runs[0].get(column, "")

    @property
    def asked(self) -> str:
        """``p 0.7``: what was to go; ``MACs 55 %``: what was to stay."""
        kind, share = self.text("asked_of"), self.text("asked")
        return f"p {share}" if kind == "p" or not share else f"{kind} {100 * float(share):g} %"


def make_rows(trials: Sequence[Trial]) -> tuple[list[Row], list[str]]:
    """A row per experiment, in order; and in words the settings without a column that all share."""
    groups: dict[frozenset, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(frozenset(experiment(trial).items()), []).append(trial)
    same, rows = frozenset.intersection(*groups), []
    for key, runs in groups.items():
        also = tuple(_in_words(key - same))
        found = [_percent(run) for run in runs]
        names = [name for name in found[0] if all(name in of for of in found)]
        rows.append(Row(runs, also, {name: [of[name] for of in found] for name in names}))
    return rows, _in_words(same)


def _in_words(key: frozenset[tuple[str, str]]) -> list[str]:
    """Settings without a column; a switch is its name."""
    others = [(name, text) for name, text in sorted(key) if name not in COLUMNS]
    return [name if text == "True" else f"{name} {text}" for name, text in others]


def _percent(run: Trial) -> dict[str, float]:
    """Fine-tuned: after the last epoch, or the epoch that a holdout chose."""
    tuned = "best" if run.get("chosen_on") == "holdout" else "last"
    top1 = {name: run.get(f"top1_{tuned if name == 'fine_tuned' else name}") for name in SHOWN}
    sizes = [(of, run.get(f"{of}_after"), run.get(f"{of}_before")) for of in COSTS]
    sizes += re.findall(r"(\S+):(\d+)/([1-9]\d*)", run.get("channels", ""))  # after/before
    kept = {name: 100 * float(now) / float(before) for name, now, before in sizes if now and before}
    return kept | {name: float(text) for name, text in top1.items() if text}
