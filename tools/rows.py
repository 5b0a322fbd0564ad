"""Which trials are one experiment with several seeds, and what these come to: a ``Row`` each."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from models import ALIASES, NETWORKS
from tools.trials import Asked, Trial, comparable
from utils.errors import InputError
from utils.saliency import CRITERIA

ACCURACIES = ("baseline", "after_surgery", "recalibrated", "fine_tuned")


@dataclass(frozen=True)
class Spread:
    """Mean, and sample standard deviation (None of a single value), in the values' unit."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """An experiment over its seeds; numbers are percent.

    Attributes:
        accuracy: top-1 by the names of ``ACCURACIES``; None for what was not measured.
        channels: what each channel group keeps, in forward order.
        also: settings without a column that other rows of this network and data have otherwise.
    """

    net: str
    dataset: str
    criterion: str
    method: str
    asked: Asked
    macs: Spread
    params: Spread
    accuracy: dict[str, Spread | None]
    channels: dict[str, Spread]
    seeds: int
    chosen_on: str
    also: tuple[tuple[str, Any], ...]


def group_trials(trials: Iterable[Trial]) -> list[list[Trial]]:
    """The trials of each experiment, one per seed; a copy of one counts once.

    Raises InputError for two that should be the same and are not.
    """
    groups: dict[Any, dict[Any, Trial]] = {}
    for trial in trials:
        seeds = groups.setdefault(trial.experiment, {})
        other = seeds.setdefault(comparable(trial.seeds), trial)
        if other.measured != trial.measured:
            raise InputError(
                f"{other.path} and {trial.path} are the same experiment with the same seeds, but"
                " not the same results; leave one of them out"
            )
    return [list(seeds.values()) for seeds in groups.values()]


def make_rows(groups: Iterable[Sequence[Trial]]) -> list[Row]:
    """One row per experiment, in the order of the table."""
    groups = list(groups)
    varying = {}
    for place in {(first.net, first.dataset) for first, *_ in groups}:
        varying[place] = varying_settings(
            [g[0] for g in groups if (g[0].net, g[0].dataset) == place]
        )
    rows = [_row(group, varying[group[0].net, group[0].dataset]) for group in groups]
    return sorted(rows, key=_order)


def varying_settings(trials: Sequence[Trial]) -> list[str]:
    """Names of the settings that are not the same in all of them.

    A baseline's are compared among those that tell theirs.
    """
    names = dict.fromkeys(name for trial in trials for name in trial.settings)
    told = [trial for trial in trials if "baseline" not in trial.settings]

    def differ(name: str) -> bool:
        of = told if name.startswith("baseline ") else trials
        return len({comparable(trial.settings.get(name)) for trial in of}) > 1

    return [name for name in names if differ(name)]


def _row(group: Sequence[Trial], varying: Sequence[str]) -> Row:
    first, measured = group[0], [trial.measured for trial in group]

    def spread(values: Sequence[float | None]) -> Spread | None:
        return None if None in values else Spread.of(values)

    accuracy = {name: spread([m.accuracy[name] for m in measured]) for name in ACCURACIES}
    channels = {n: Spread.of([m.channels[n] for m in measured]) for n in first.measured.channels}
    also = ((name, first.settings.get(name)) for name in varying)
    return Row(
        first.net, first.dataset, first.criterion, first.method, first.asked,
        Spread.of([m.macs for m in measured]), Spread.of([m.params for m in measured]),
        accuracy, channels, len(group), first.chosen_on,
        tuple((name, value) for name, value in also if value is not None and value is not False),
    )  # fmt: skip


def also_text(also: Iterable[tuple[str, Any]]) -> str:
    """Settings in words; a switch is its name."""

    def words(name: str, value: Any) -> str:
        if value is True:
            return name
        short = isinstance(value, float) and float(f"{value:g}") == value
        return f"{name} {value:g}" if short else f"{name} {value}"

    return ", ".join(words(*setting) for setting in also)


def _order(row: Row) -> tuple[Any, ...]:
    methods = ("one shot", "smooth", "steps", "from scratch")
    steps, _, kind = row.method.rpartition(" ")
    method = "steps" if kind == "steps" else row.method
    return (
        _rank(row.net, [*NETWORKS, *ALIASES]), row.dataset, _rank(method, methods),
        int(steps) if method == "steps" and steps.isdecimal() else 0,
        _rank(row.criterion, list(CRITERIA)), _natural(also_text(row.also)),
        -row.macs.mean, row.asked,
    )  # fmt: skip


def _rank(name: str, known: Sequence[str]) -> tuple[int, str]:
    return (known.index(name) if name in known else len(known)), name


def _natural(text: str) -> list[tuple[bool, float, str]]:
    """A key that sorts the numbers within a text by size."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [(i % 2 == 1, float(part) if i % 2 else 0, part) for i, part in enumerate(parts)]
