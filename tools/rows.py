"""Runs that differ in nothing but their seeds are one experiment: a ``Row`` each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tools.trials import WIDTHS, Trial, defaults, is_seed, settings

# The table has columns for these; other settings are told in words.
COLUMNS = {"net", "dataset", "criterion", "method", "asked_of", "asked"}


class Spread(NamedTuple):
    """Mean, and sample standard deviation; None of a single value."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """None where a value is missing."""
        if None in values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.mean(values), deviation)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


@dataclass(frozen=True)
class Row:
    """An experiment: its runs, one per seed; numbers are percent.

    Attributes:
        also: in words, the settings outside ``COLUMNS`` that are not the same in all rows.
    """

    runs: list[Trial]
    also: str

    def __getitem__(self, column: str) -> str:
        """Of a column that is the same in all runs."""
        return self.runs[0].get(column, "")

    @property
    def asked(self) -> str:
        """``p 0.7``: what was to go; ``MACs 55 %``: what was to stay."""
        kind, share = self["asked_of"], self["asked"]
        return f"p {share}" if kind == "p" or not share else f"{kind} {100 * float(share):g} %"

    def kept(self, of: str) -> Spread | None:
        """The share of ``macs`` or ``params``."""
        return Spread.of([_share(run.get(f"{of}_after"), run.get(f"{of}_before"))
                          for run in self.runs])  # fmt: skip

    def accuracy(self, name: str) -> Spread | None:
        """Top-1. Fine-tuned: after the last epoch, or the epoch that a holdout chose."""
        tuned = "best" if self["chosen_on"] == "holdout" else "last"
        column = f"top1_{tuned if name == 'fine_tuned' else name}"
        return Spread.of([float(run[column]) if run.get(column) else None for run in self.runs])

    def channels(self) -> dict[str, Spread | None]:
        """The share that each channel group keeps, in forward order."""
        found = [WIDTHS.findall(run.get("channels", "")) for run in self.runs]
        runs = [{name: _share(after, before) for name, after, before in of} for of in found]
        return {name: Spread.of([run.get(name) for run in runs]) for name in runs[0]}


def _share(after: str | None, before: str | None) -> float | None:
    return 100 * float(after) / float(before) if after and before else None


def make_rows(trials: Sequence[Trial]) -> list[Row]:
    """One row per experiment, in the order of the runs."""
    groups: dict[frozenset[tuple[str, str]], list[Trial]] = {}
    for trial in trials:
        key = frozenset((n, text) for n, text in settings(trial).items() if not is_seed(n, trial))
        groups.setdefault(key, []).append(trial)
    same = frozenset.intersection(*groups) if groups else frozenset()
    return [
        Row(runs, ", ".join(words(*s) for s in sorted(key - same) if s[0] not in COLUMNS))
        for key, runs in groups.items()
    ]


def shared(trials: Sequence[Trial], *, told: bool = False) -> Trial:
    """Settings outside ``COLUMNS`` that are the same in all runs; with ``told``, those that are
    not at their default.
    """
    same = set.intersection(*(set(settings(trial).items()) for trial in trials))
    same -= set(defaults(trials[0]).items()) if told else set()
    return dict(sorted(s for s in same if s[0] not in COLUMNS and not is_seed(s[0], trials[0])))


def words(name: str, text: str) -> str:
    """A setting; a switch is its name."""
    return name if text == "True" else f"{name} {text}"
