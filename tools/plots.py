"""Drawing results with matplotlib: accuracy over both budgets, and what every layer keeps."""

from __future__ import annotations

import os
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from tools.rows import Row, make_rows, shared, words
from tools.trials import Trial
from utils.saliency import CRITERIA

MOST = 8  # curves that a panel keeps apart
# Okabe and Ito's colours, which all kinds of colour vision tell apart, with grey for their yellow.
COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#000000", "#999999")
MARKERS = "osD^vPX*"
HEIGHTS = {"fine_tuned": 5, "recalibrated": 3, "after_surgery": 3}  # from top to bottom
KEPT = {"macs": "MACs kept, %", "params": "parameters kept, %"}
LABELS = 26  # as many layer names fit below an axis
NEAR = 30  # points; a line for chance farther below would flatten the curves
WIDTH = 12  # inches
LETTER = 0.075  # inches, of the legend's font
RC = {
    "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 9,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "lines.linewidth": 1.3, "lines.markersize": 4.5, "savefig.dpi": 180,
    "text.parse_math": False, "svg.hashsalt": "results",
}  # fmt: skip
CHANCE = {"color": "0.35", "linewidth": 0.9, "linestyle": ":", "label": "chance"}
BASELINE = {"color": "0.35", "linewidth": 0.9, "label": "baseline"}


class Panel(NamedTuple):
    """At most ``MOST`` ways to prune one network on one data set, each with all its sizes."""

    title: str
    curves: dict[str, list[Row]]

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.curves.values() for row in rows]

    @property
    def shown(self) -> list[str]:
        """The accuracies that were measured."""
        return [name for name in HEIGHTS if any(row.accuracy(name) for row in self.rows)]

    @property
    def height(self) -> float:
        """In inches."""
        lines = sum(label.count("\n") + 1 for label in self.curves)
        return 1.8 + 0.33 * sum(HEIGHTS[name] for name in self.shown) + 0.1 * lines


def save_plot(trials: Sequence[Trial], file: BinaryIO, kind: str) -> None:
    """Draw into a file that is open for writing; ``kind`` is png, pdf or svg.

    The same trials make the same bytes.
    """
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.rc_context(RC):
        draw(trials).savefig(file, format=kind, metadata=undated)


def draw(trials: Sequence[Trial]) -> Figure:
    """A figure with a strip for each panel; the title has what is the same in all rows."""
    rows = make_rows(trials)
    panels = make_panels(rows)
    common = [rows[0][n] for n in ("criterion", "method") if len({row[n] for row in rows}) == 1]
    common += [words(*setting) for setting in shared(trials, told=True).items()]
    common += ["bars: standard deviation over seeds"] * any(len(row.runs) > 1 for row in rows)
    heights = [panel.height for panel in panels]
    figure = Figure(figsize=(WIDTH, 0.4 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(", ".join(common), 140), x=0.01, ha="left", fontsize=9)
    strips = figure.subfigures(len(panels), squeeze=False, height_ratios=heights)
    for strip, panel in zip(strips[:, 0], panels, strict=True):
        _draw_panel(strip, panel)
    return figure


def make_panels(rows: Sequence[Row]) -> list[Panel]:
    """In the order of the rows; a network with too many curves for a panel has several."""
    several = {n for n in ("criterion", "method", "asked_of") if len({row[n] for row in rows}) > 1}
    places: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        parts = [row[name] for name in ("criterion", "method") if name in several]
        parts += [f"by {row['asked_of']}"] * ("asked_of" in several)
        label = ", ".join(filter(None, [*parts, row.also])) or row["criterion"]
        curves = places.setdefault(f"{row['net']} on {row['dataset']}", {})
        curves.setdefault(textwrap.fill(label, 70), []).append(row)
    panels = []
    for place, curves in places.items():
        count = -(-len(curves) // MOST)
        for i in range(count):  # about equally many in each
            part = list(curves.items())[len(curves) * i // count : len(curves) * (i + 1) // count]
            title = f"{place} ({i + 1} of {count})" if count > 1 else place
            panels.append(Panel(title, dict(part)))
    return panels


def _draw_panel(strip: SubFigure, panel: Panel) -> None:
    strip.suptitle(panel.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    grid = strip.add_gridspec(1, 2, width_ratios=(2, 1.2))
    classes = re.match("[1-9][0-9]*", panel.rows[0]["classes"])
    chance = 100 / int(classes[0]) if classes else None
    baselines = {round(b.mean, 2) for row in panel.rows if (b := row.accuracy("baseline"))}
    # Accuracies right after surgery are far below the others: each kind has axes of its own.
    shown = panel.shown or ["fine_tuned"]
    left = grid[0].subgridspec(len(shown), 2, height_ratios=[HEIGHTS[name] for name in shown])
    axes = left.subplots(sharex="col", sharey="row", squeeze=False)
    axes[0, 0].set_title("top-1 accuracy", loc="left")
    for name, both in zip(shown, axes, strict=True):
        both[0].set_ylabel(f"{name.replace('_', '-' if name == 'fine_tuned' else ' ')}, %")
        found = [a.mean for row in panel.rows if (a := row.accuracy(name))]
        for place, (of, title) in zip(both, KEPT.items(), strict=True):
            for i, rows in enumerate(panel.curves.values()):
                points = sorted((x.mean, y.mean, y.deviation or 0) for row in rows
                                if (x := row.kept(of)) and (y := row.accuracy(name)))  # fmt: skip
                x, y, bars = zip(*points, strict=True) if points else ((), (), ())
                place.errorbar(x, y, yerr=bars if any(bars) else None, capsize=2, elinewidth=0.9,
                               **_style(panel, i))  # fmt: skip
            if chance and (name == shown[-1] or min(found) - chance < NEAR):
                place.axhline(chance, zorder=1, **CHANCE)
            for baseline in sorted(baselines) if name == shown[0] else ():
                place.axhline(baseline, zorder=1, **BASELINE)
            place.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
            place.set_xlabel(title * (name == shown[-1]))
    _draw_channels(strip.add_subplot(grid[1]), panel)
    handles = [Line2D([], [], label=n, **_style(panel, i)) for i, n in enumerate(panel.curves)]
    handles += [Line2D([], [], **BASELINE)] * bool(baselines)
    handles += [Line2D([], [], **CHANCE)] * bool(chance)
    longest = max(len(line) for handle in handles for line in handle.get_label().split("\n"))
    columns = max(1, min(len(handles), int(WIDTH / (0.6 + LETTER * longest))))
    strip.legend(handles=handles, loc="outside lower left", frameon=False, ncols=columns)


def _style(panel: Panel, i: int) -> dict[str, Any]:
    """A criterion looks the same in all plots; other curves are told apart by their order."""
    names = [rows[0]["criterion"] for rows in panel.curves.values()]
    if len({*names}) == len(names) and {*names} <= CRITERIA.keys():
        i = [*CRITERIA].index(names[i])
    return {"color": COLOURS[i % MOST], "marker": MARKERS[i % MOST]}


def _draw_channels(axes: Any, panel: Panel) -> None:
    """Of the size in the middle of those that most curves have."""
    having = Counter(row.asked for row in panel.rows)
    most = [asked for asked, count in having.items() if count == max(having.values())]
    asked = most[len(most) // 2]
    names = list(dict.fromkeys(name for row in panel.rows for name in row.channels()))
    for i, rows in enumerate(panel.curves.values()):
        for kept in (row.channels() for row in rows if row.asked == asked):
            there = [(x, kept[name].mean) for x, name in enumerate(names) if kept.get(name)]
            axes.plot(*zip(*there, strict=True), **_style(panel, i)) if there else None
    every = -(-len(names) // LABELS) or 1
    labels = short_names(names)
    long = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    turned = long if max(map(len, labels), default=0) > 3 else {}
    axes.set_xticks(range(0, len(labels), every), labels[::every], **turned)
    axes.set_ylim(0, 103)
    axes.set_ylabel("channels kept, %")
    axes.set_xlabel("channel group, from input to output")
    axes.set_title(f"channels kept per layer, {asked}", loc="left")


def short_names(names: Sequence[str]) -> list[str]:
    """Names that fit below an axis: ``1.0.g2`` for layer1.0.gate2, ``11`` for features.11."""
    common = os.path.commonprefix(list(names)) if len(names) > 1 else ""
    start = common.rfind(".") + 1
    return [re.sub(r"\blayer(?=\d)", "", name[start:]).replace("gate", "g") for name in names]
