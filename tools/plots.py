"""Drawing results with matplotlib: accuracy over both budgets, and what every layer keeps."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from statistics import mean, multimode, stdev
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from tools.trials import COSTS, SHOWN, Row, Trial, make_rows
from utils.saliency import CRITERIA

MOST = 8  # curves that a panel keeps apart
# Okabe and Ito's colours, which all kinds of colour vision tell apart, with grey for their yellow.
COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#000000", "#999999")
MARKERS = "osD^vPX*"
HEIGHTS = {"fine_tuned": 5, "recalibrated": 3, "after_surgery": 3}  # from top to bottom
RC = dict.fromkeys(("axes.titlesize", "axes.labelsize"), 10)
RC |= {"legend.fontsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5}
RC |= {"axes.grid": True, "grid.color": "0.9", "grid.linewidth": 0.6, "axes.axisbelow": True}
RC |= {"axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 180}
RC |= {"lines.linewidth": 1.3, "lines.markersize": 4.5, "errorbar.capsize": 2}
RC |= {"text.parse_math": False, "svg.hashsalt": "results"}  # plain text, the same bytes each time
CHANCE = {"color": "0.35", "linewidth": 0.9, "linestyle": ":", "label": "chance"}
BASELINE = {"color": "0.35", "linewidth": 0.9, "label": "baseline"}
Curves = dict[str, list[Row]]  # ways to prune one network on one data set, each with all its sizes


def plot(trials: Sequence[Trial], kind: str) -> bytes:
    """The content of a file of this kind, png, pdf or svg; the same trials make the same bytes."""
    undated, file = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind), io.BytesIO()
    with matplotlib.rc_context(RC):
        draw(trials).savefig(file, format=kind, metadata=undated)
    return file.getvalue()


def draw(trials: Sequence[Trial]) -> Figure:
    """A figure with a strip for every panel."""
    panels, heights = make_panels(make_rows(trials)[0]), []
    for curves in panels.values():
        lines = sum(label.count("\n") + 1 for label in curves)
        heights.append(1.8 + 0.33 * sum(map(HEIGHTS.get, measured(curves))) + 0.1 * lines)
    figure = Figure(figsize=(12, 0.1 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    strips = figure.subfigures(len(panels), squeeze=False, height_ratios=heights)
    for strip, (title, curves) in zip(strips[:, 0], panels.items(), strict=True):
        if any(len(row.runs) > 1 for row in sum(curves.values(), [])):
            title += " (bars: standard deviation over seeds)"
        strip.suptitle(title, x=0.01, ha="left", fontsize=11)
        _draw_panel(strip, curves)
    return figure


def make_panels(rows: Sequence[Row]) -> dict[str, Curves]:
    """By title; a network with more than ``MOST`` curves has several panels."""
    differing = [n for n in ("criterion", "method") if len({row.text(n) for row in rows}) > 1]
    same = [rows[0].text(n) for n in ("criterion", "method") if n not in differing]
    several_goals = len({row.text("asked_of") for row in rows}) > 1
    networks: dict[str, list[Row]] = {}
    for row in rows:
        title = ", ".join([f"{row.text('net')} on {row.text('dataset')}", *same])
        networks.setdefault(title, []).append(row)
    panels = {}
    for title, members in networks.items():
        curves: Curves = {}
        alike = set.intersection(*({*row.also} for row in members))
        for row in members:
            parts = [row.text(name) for name in differing]
            parts += [f"by {row.text('asked_of')}"] if several_goals else []
            parts += [setting for setting in row.also if setting not in alike]
            label = textwrap.fill(", ".join(parts) or row.text("criterion"), 70)
            curves.setdefault(label, []).append(row)
        count = math.ceil(len(curves) / MOST)
        for i in range(count):  # about equally many in each
            part = list(curves.items())[len(curves) * i // count : len(curves) * (i + 1) // count]
            panels[f"{title} ({i + 1} of {count})" if count > 1 else title] = dict(part)
    return panels


def _draw_panel(strip: SubFigure, curves: Curves) -> None:
    """Accuracies on the left, one below the other; channels on the right; the legend below."""
    rows, styles = sum(curves.values(), []), _styles(curves)
    grid = strip.add_gridspec(1, 2, width_ratios=(2, 1.2))
    classes = re.match("[1-9][0-9]*", rows[0].text("classes"))
    chance = 100 / int(classes[0]) if classes else None
    baselines = {round(mean(r.percent["baseline"]), 2) for r in rows if "baseline" in r.percent}
    # Accuracies right after surgery are far below the others: each kind has axes of its own.
    shown = measured(curves)
    left = grid[0].subgridspec(len(shown), 2, height_ratios=[HEIGHTS[name] for name in shown])
    axes = left.subplots(sharex="col", sharey="row", squeeze=False)
    axes[0, 0].set_title("top-1 accuracy", loc="left")
    for name, both in zip(shown, axes, strict=True):
        both[0].set_ylabel(f"{SHOWN[name]}, %")
        lowest = min((mean(r.percent[name]) for r in rows if name in r.percent), default=0)
        for place, of in zip(both, COSTS, strict=True):
            for style, curve in zip(styles, curves.values(), strict=True):
                _draw_curve(place, curve, of, name, style)
            # A line for chance far below all points would flatten the curves.
            if chance and (name == shown[-1] or lowest - chance < 30):
                place.axhline(chance, zorder=1, **CHANCE)
            for baseline in baselines if name == shown[0] else ():
                place.axhline(baseline, zorder=1, **BASELINE)
            place.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    for place, title in zip(axes[-1], COSTS.values(), strict=True):
        place.set_xlabel(f"{title} kept, %")
    _draw_channels(strip.add_subplot(grid[1]), curves, styles)
    handles = [Line2D([], [], label=n, **s) for n, s in zip(curves, styles, strict=True)]
    handles += [Line2D([], [], **BASELINE)] if baselines else []
    handles += [Line2D([], [], **CHANCE)] if chance else []
    longest = max(len(line) for handle in handles for line in handle.get_label().split("\n"))
    columns = max(1, min(len(handles), int(12 / (0.6 + 0.075 * longest))))  # in inches
    strip.legend(handles=handles, loc="outside lower left", frameon=False, ncols=columns)


def _draw_curve(axes: Any, curve: list[Row], of: str, accuracy: str, style: Any) -> None:
    """An accuracy over a cost, with its deviation."""
    points = []
    for percent in (row.percent for row in curve if {of, accuracy} <= row.percent.keys()):
        found = percent[accuracy]
        points.append((mean(percent[of]), mean(found), stdev(found) if len(found) > 1 else 0))
    x, y, spread = zip(*sorted(points), strict=True) if points else ((), (), ())
    axes.errorbar(x, y, spread if any(spread) else None, **style)


def measured(curves: Curves) -> list[str]:
    """The accuracies that a panel shows, from top to bottom."""
    found = {name for rows in curves.values() for row in rows for name in row.percent}
    return [name for name in HEIGHTS if name in found] or ["fine_tuned"]


def _styles(curves: Curves) -> list[dict[str, Any]]:
    """A criterion looks the same in all plots; other curves are told apart by their order."""
    names, known = [rows[0].text("criterion") for rows in curves.values()], [*CRITERIA]
    own = len({*names}) == len(names) and {*names} <= {*known}
    places = [known.index(name) % MOST if own else i for i, name in enumerate(names)]
    return [{"color": COLOURS[i], "marker": MARKERS[i]} for i in places]


def _draw_channels(axes: Any, curves: Curves, styles: list[dict[str, Any]]) -> None:
    """Of the size in the middle of those that most curves have."""
    rows = sum(curves.values(), [])
    sizes = multimode(row.asked for row in rows)
    asked = sizes[len(sizes) // 2]
    others = {*COSTS, *SHOWN}
    names = list(dict.fromkeys(n for row in rows for n in row.percent if n not in others))
    for style, curve in zip(styles, curves.values(), strict=True):
        for of in (row.percent for row in curve if row.asked == asked):
            points = [(x, mean(of[name])) for x, name in enumerate(names) if name in of]
            if points:
                axes.plot(*zip(*points, strict=True), **style)
    every = math.ceil(len(names) / 26) or 1  # as many names fit below the axis
    places, turned = range(0, len(names), every), {"ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(places, names[::every], rotation=60, **turned)
    axes.set(ylim=(0, 103), ylabel="channels kept, %", xlabel="channel group, from input to output")
    axes.set_title(f"channels kept per layer, {asked}", loc="left")
