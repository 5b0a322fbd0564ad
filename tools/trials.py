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
SHOWN = {name: name.replace("_", " ") for name in ACCURACIES[:3]} | {"fine_tuned": "fine-tuned"}
SIZES = tuple(f"{of}_{when}" for of in COSTS for when in ("before", "after"))
NUMBERS = (*SIZES, *(f"top{k}_{name}" for k in (1, 5) for name in ACCURACIES), "best_epoch")
OUTCOME = (*NUMBERS, "chosen_on", "channels")
# These differ between two runs that compute the same.
CIRCUMSTANCES = ("images_per_second", "wall_time_seconds", "threads", "torch", "commit")
PLACE = "place"  # where a row comes from, for messages; no table has it
OTHERWISE = {*ASKED, "smooth", "steps", "from_scratch"}  # flags that other columns say
COMMON = {"net", "dataset", "classes", "image_size", "baseline"}  # of run and baseline
WIDTHS = re.compile(r"(\S+):(\d+)/([1-9]\d*)")  # of a channel group, after/before


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
        trial = _trial(run) if "criterion" in run.config else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = cell(f"{path}: no result of a pruning script ({error!r})")
        raise InputError(f"{told}; remove it, or run the script again with --overwrite") from error
    return trial and _checked(trial, cell(path))


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
    values |= {"chosen_on": run.holdout and "holdout"}
    widths = (run.channels or {}).items()
    values["channels"] = " ".join(
        f"{''.join(name.split())}:{width['after']}/{width['before']}" for name, width in widths
    )
    speeds = [epoch["images_per_second"] for epoch in run.history if "images_per_second" in epoch]
    values["images_per_second"] = round(statistics.fmean(speeds), 1) if speeds else None
    known = {**(run.versions or {}), "wall_time_seconds": run.wall_time_seconds}
    values |= {name: value for name, value in known.items() if name in CIRCUMSTANCES}
    return {cell(name): cell(value) for name, value in values.items()}


def _checked(trial: Trial, place: str) -> Trial:
    """The row with the values of flags that are younger than it; InputError where a number is
    none.
    """
    for name in (*NUMBERS, "asked", "images_per_second", "wall_time_seconds"):
        try:
            number = float(trial.get(name) or 1)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or (name.endswith("_before") and number < 1):
            raise InputError(f"{place}: {name} is {trial[name]!r}, where a number should be")
    return {**{name: cell(value) for name, value in BEFORE.items()}, **trial, PLACE: place}


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
    used = {name for trial in trials for name, text in trial.items() if text}
    own = sorted(used - {*WHAT, *OUTCOME, *CIRCUMSTANCES, PLACE})
    names, file = [*WHAT, *own, *OUTCOME, *CIRCUMSTANCES], io.StringIO()
    rows = [names, *([trial.get(name, "") for name in names] for trial in trials)]
    csv.writer(file, lineterminator="\n").writerows([map(_guarded, row) for row in rows])
    return file.getvalue()


def _guarded(text: str) -> str:
    """Keep a spreadsheet from taking the text for a formula; ``read_csv`` undoes it."""
    formula = re.match(r"['=@]|[+-](?![\d.]+(e[+-]?\d+)?$)", text)
    return f"'{text}" if formula else text


def settings(trial: Trial) -> frozenset[tuple[str, str]]:
    """All that makes the run what it is, seeds and weights of the baseline included."""
    rest = {*OUTCOME, *CIRCUMSTANCES, PLACE}
    return frozenset((name, text) for name, text in trial.items() if text and name not in rest)


def is_seed(name: str, trial: Trial) -> bool:
    """Whether runs that differ in this setting repeat one experiment. Other weights of a baseline
    repeat it if the baseline's settings are known.
    """
    known = bool(trial.get("baseline_epochs")) and name == "baseline"
    return known or name in ("seed", "score_seed", "baseline_seed", "baseline_score_seed")


def merge(kept: Iterable[Trial], new: Iterable[Trial]) -> list[Trial]:
    """Every run once, in the order of the table; one of ``new`` replaces the same of ``kept``.

    Raises InputError for two of ``new`` that should be the same and are not.
    """
    found: dict[frozenset[tuple[str, str]], Trial] = {}
    for trial in new:
        other = found.setdefault(settings(trial), trial)
        if any(other.get(name) != trial.get(name) for name in OUTCOME):
            same = f"{other[PLACE]} and {trial[PLACE]} are the same experiment with the same seeds"
            raise InputError(f"{same}, but not the same results; leave one of them out")
    merged = {settings(trial): trial for trial in kept} | found
    names = ["seed", "score_seed", *sorted({name for key in merged for name, _ in key} - {*WHAT})]

    def order(trial: Trial) -> list[Any]:
        """Criteria as they are registered; of the sizes, the largest network first."""
        seeds = [name for name in names if is_seed(name, trial)]
        others = [name for name in names if name not in seeds]
        keys = ("net", "dataset", "method"), ("criterion", *others), seeds
        place, way, seed = ([natural(trial.get(name, "")) for name in part] for part in keys)
        rank = [*CRITERIA, trial["criterion"]].index(trial["criterion"])
        asked = float(trial["asked"] or 0) * (1 if trial["asked_of"] == "p" else -1)
        return [place, rank, way, trial["asked_of"], asked, seed]

    return sorted(merged.values(), key=order)


def natural(text: str) -> list[tuple[bool, float, str]]:
    """A key that sorts the numbers within a text by size."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [(i % 2 == 1, float(part) if i % 2 else 0, part) for i, part in enumerate(parts)]


class Spread(NamedTuple):
    """Mean, and sample standard deviation; None of a single value."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


class Row(NamedTuple):
    """An experiment: runs that differ in nothing but their seeds.

    ``also`` has in words the settings without a column in which rows differ; ``percent`` has
    accuracies by name, and the shares that ``macs``, ``params`` and every channel group keep.
    """

    runs: list[Trial]
    also: tuple[str, ...]
    percent: dict[str, Spread]

    def text(self, column: str) -> str:
        """Of a column that is the same in all runs."""
        return self.runs[0].get(column, "")

    @property
    def asked(self) -> str:
        """``p 0.7``: what was to go; ``MACs 55 %``: what was to stay."""
        kind, share = self.text("asked_of"), self.text("asked")
        return f"p {share}" if kind == "p" or not share else f"{kind} {100 * float(share):g} %"


def make_rows(trials: Sequence[Trial]) -> tuple[list[Row], Trial]:
    """A row per experiment, in the order of the runs; and the settings without a column that are
    the same in all of them.
    """
    groups: dict[frozenset[tuple[str, str]], list[Trial]] = {}
    for trial in trials:
        key = frozenset(s for s in settings(trial) if not is_seed(s[0], trial))
        groups.setdefault(key, []).append(trial)
    same, rows = frozenset.intersection(*groups), []
    for key, runs in groups.items():
        also = tuple(words(*s) for s in sorted(key - same) if s[0] not in COLUMNS)
        found = [_percent(run) for run in runs]
        numbers = {n: [f[n] for f in found] for n in found[0] if all(n in f for f in found)}
        rows.append(Row(runs, also, {name: Spread.of(of) for name, of in numbers.items()}))
    return rows, {name: text for name, text in sorted(same) if name not in COLUMNS}


def _percent(run: Trial) -> dict[str, float]:
    """Fine-tuned: after the last epoch, or the epoch that a holdout chose."""
    tuned = "best" if run.get("chosen_on") == "holdout" else "last"
    top1 = {name: run.get(f"top1_{tuned if name == 'fine_tuned' else name}") for name in SHOWN}
    sizes = [(of, run.get(f"{of}_after"), run.get(f"{of}_before")) for of in COSTS]
    sizes += WIDTHS.findall(run.get("channels", ""))
    kept = {name: 100 * float(now) / float(before) for name, now, before in sizes if now and before}
    return kept | {name: float(text) for name, text in top1.items() if text}


def words(name: str, text: str) -> str:
    """A setting; a switch is its name."""
    return name if text == "True" else f"{name} {text}"
