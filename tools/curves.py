"""What a plot of results shows, as numbers and words: panels of curves; nothing is drawn here."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tools.rows import Row, Spread, also_text
from tools.trials import Asked


@dataclass(frozen=True)
class Line:
    """Points of a curve, y in percent; a deviation of 0 where there is a single seed."""

    x: list[float]
    y: list[float]
    deviation: list[float]

    @classmethod
    def through(cls, points: Iterable[tuple[float, Spread | None]]) -> Line:
        """Without the points that have no value."""
        there = [(x, y) for x, y in points if y]
        return cls(
            [x for x, _ in there], [y.mean for _, y in there], [y.deviation or 0 for _, y in there]
        )  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """The sizes of one way to prune one network, by MACs kept, ascending.

    Attributes:
        criterion: what scored.
        variant: method, kind of budget and other settings, as far as rows differ in them.
    """

    criterion: str
    variant: str
    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        """The same words in every panel."""
        return ", ".join(filter(None, (self.criterion, self.variant)))

    def accuracy(self, name: str) -> Line:
        """Top-1 accuracy, one of ``tools.rows.ACCURACIES``, over MACs kept."""
        return Line.through((row.macs.mean, row.accuracy[name]) for row in self.rows)

    def channels(self, asked: Asked, names: Sequence[str]) -> Line:
        """The share of channels that the named groups keep, where so much was asked for."""
        return Line.through(
            (i, row.channels.get(name))
            for row in self.rows
            if row.asked == asked
            for i, name in enumerate(names)
        )


@dataclass(frozen=True)
class Panel:
    """All there is of one network on one data set.

    Attributes:
        middle: what was asked for in the middle of the sizes that most curves have.
        groups: the names of the channel groups, in forward order.
        baselines: their accuracies, %; several where they were trained in several ways.
    """

    net: str
    dataset: str
    curves: tuple[Curve, ...]
    middle: Asked
    groups: tuple[str, ...]
    baselines: tuple[float, ...]


def make_panels(rows: Sequence[Row]) -> list[Panel]:
    """A panel per network and data set, in the order of the rows."""
    several = {
        "method": len({row.method for row in rows}) > 1,
        "asked": len({row.asked.kind for row in rows}) > 1,
    }
    places: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        places.setdefault((row.net, row.dataset), []).append(row)
    return [_panel(net, dataset, of, several) for (net, dataset), of in places.items()]


def _panel(net: str, dataset: str, rows: Sequence[Row], several: dict[str, bool]) -> Panel:
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        variant = ", ".join(filter(None, (
            row.method * several["method"],
            f"by {row.asked.kind}" * several["asked"],
            also_text(row.also),
        )))  # fmt: skip
        curves.setdefault((row.criterion, variant), []).append(row)
    return Panel(
        net, dataset,
        tuple(
            Curve(*what, tuple(sorted(of, key=lambda row: row.macs.mean)))
            for what, of in curves.items()
        ),
        middle_asked([{row.asked for row in of} for of in curves.values()]),
        tuple(dict.fromkeys(name for row in rows for name in row.channels)),
        _baselines(rows),
    )  # fmt: skip


def middle_asked(curves: Sequence[set[Asked]]) -> Asked:
    """The middle of the sizes that most curves have; of the kind that most of these are of."""
    having = Counter(asked for curve in curves for asked in curve)
    most = sorted(asked for asked, count in having.items() if count == max(having.values()))
    (kind, _), *_ = Counter(asked.kind for asked in most).most_common()
    of_kind = [asked for asked in most if asked.kind == kind]
    return of_kind[len(of_kind) // 2]


def _baselines(rows: Sequence[Row]) -> tuple[float, ...]:
    """Mean over the rows, for each kind of baseline."""
    kinds: dict[object, list[float]] = {}
    for row in rows:
        kind = tuple((name, str(value)) for name, value in row.also if name.startswith("baseline"))
        accuracy = row.accuracy["baseline"]
        if accuracy:
            kinds.setdefault(kind, []).append(accuracy.mean)
    return tuple(Spread.of(means).mean for means in kinds.values())


def short_names(names: Sequence[str]) -> list[str]:
    """Names that fit below an axis: ``1.0.g2`` for layer1.0.gate2, ``11`` for features.11."""
    common = os.path.commonprefix(list(names)) if len(names) > 1 else ""
    start = common.rfind(".") + 1
    return [re.sub(r"\blayer(?=\d)", "", name[start:]).replace("gate", "g") for name in names]
