"""Plots of results: accuracy over the MACs and the parameters kept, and channels kept by layer."""

from __future__ import annotations

import io
import os
import re
import textwrap
from collections.abc import Sequence
from statistics import mode
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from tools.trials import COSTS, SHOWN, Row, Trial, defaults, make_rows, words

# Okabe and Ito's colours, which all kinds of colour vision tell apart, with grey for their yellow.
COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#000000", "#999999")
STYLES = [{"color": c, "marker": m} for c, m in zip(COLOURS, "osD^vPX*", strict=True)]
MOST = len(STYLES)  # curves in a panel
HEIGHTS = {"fine_tuned": 5, "recalibrated": 3, "after_surgery": 3}  # from top to bottom
KEPT = {"macs": "MACs kept, %", "params": "parameters kept, %"}
RC = {
    "axes.titlesize": 10, "legend.fontsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9",
    "axes.axisbelow": True, "lines.linewidth": 1.3, "lines.markersize": 4.5, "savefig.dpi": 180,
    "text.parse_math": False, "svg.hashsalt": "results",
}  # fmt: skip
CHANCE = {"color": "0.35", "linewidth": 0.9, "linestyle": ":", "label": "chance"}
BASELINE = {"color": "0.35", "linewidth": 0.9, "label": "baseline"}
Curves = dict[str, list[Row]]  # by label; the rows of a curve differ in their size alone


def plot(trials: Sequence[Trial], kind: str) -> bytes:
    """The content of a file of this kind, png, pdf or svg; the same trials make the same bytes."""
    undated, file = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind), io.BytesIO()
    with matplotlib.rc_context(RC):
        draw(trials).savefig(file, format=kind, metadata=undated)
    return file.getvalue()


def draw(trials: Sequence[Trial]) -> Figure:
    """A figure with a strip per panel; its title says what all rows share."""
    rows, same = make_rows(trials)
    panels = make_panels(rows)
    both = ("criterion", "method")
    common = [rows[0].text(n) for n in both if len({row.text(n) for row in rows}) == 1]
    common += [words(*s) for s in same.items() if s not in defaults(trials[0]).items()]
    common += ["bars: standard deviation over seeds"] * any(len(row.runs) > 1 for row in rows)
    heights = [1.8 + 0.33 * sum(map(HEIGHTS.get, measured(curves)))
               + 0.1 * len("\n".join(curves).split("\n"))
               for curves in panels.values()]  # fmt: skip
    figure = Figure(figsize=(12, 0.4 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(", ".join(common), 140), x=0.01, ha="left", fontsize=9)
    strips = figure.subfigures(len(panels), squeeze=False, height_ratios=heights)
    for strip, (title, curves) in zip(strips[:, 0], panels.items(), strict=True):
        strip.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        _draw_panel(strip, curves)
    return figure


def make_panels(rows: Sequence[Row]) -> dict[str, Curves]:
    """By title; a network with more than ``MOST`` curves has several panels."""
    several = [n for n in ("criterion", "method", "asked_of") if len({r.text(n) for r in rows}) > 1]
    places: dict[str, Curves] = {}
    for row in rows:
        parts = [("by " if n == "asked_of" else "") + row.text(n) for n in several]
        label = ", ".join(filter(None, [*parts, row.also])) or row.text("criterion")
        curves = places.setdefault(f"{row.text('net')} on {row.text('dataset')}", {})
        curves.setdefault(textwrap.fill(label, 70), []).append(row)
    panels = {}
    for place, curves in places.items():
        starts = range(0, len(curves), MOST)
        for i, start in enumerate(starts, 1):
            part = list(curves.items())[start : start + MOST]
            panels[place + f" ({i} of {len(starts)})" * (len(starts) > 1)] = dict(part)
    return panels


def _draw_panel(strip: SubFigure, curves: Curves) -> None:
    """Accuracies on the left, one below the other; channels on the right; the legend below."""
    rows, grid = sum(curves.values(), []), strip.add_gridspec(1, 2, width_ratios=(2, 1.2))
    classes = re.match("[1-9][0-9]*", rows[0].text("classes"))
    baselines = {round(r.percent["baseline"].mean, 2) for r in rows if "baseline" in r.percent}
    # Accuracies right after surgery are far below the others: each kind has axes of its own.
    shown = measured(curves)
    left = grid[0].subgridspec(len(shown), 2, height_ratios=[HEIGHTS[name] for name in shown])
    axes = left.subplots(sharex="col", sharey="row", squeeze=False)
    axes[0, 0].set_title("top-1 accuracy", loc="left")
    for name, both in zip(shown, axes, strict=True):
        both[0].set_ylabel(f"{name.replace('_', '-' if name == 'fine_tuned' else ' ')}, %")
        for place, (of, title) in zip(both, KEPT.items(), strict=True):
            for style, curve in zip(STYLES, curves.values(), strict=False):
                found = [row.percent for row in curve if {of, name} <= row.percent.keys()]
                points = sorted((p[of].mean, p[name].mean, p[name].deviation or 0) for p in found)
                x, y, bars = zip(*points, strict=True) if points else ((), (), ())
                place.errorbar(x, y, bars if any(bars) else None, capsize=2, **style)
            place.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
            place.set_xlabel(title * (name == shown[-1]))
    for top, bottom in zip(axes[0], axes[-1], strict=True):
        for baseline in sorted(baselines):
            top.axhline(baseline, zorder=1, **BASELINE)
        if classes:  # in the lowest axes alone: a line far below all points flattens the curves
            bottom.axhline(100 / int(classes[0]), zorder=1, **CHANCE)
    _draw_channels(strip.add_subplot(grid[1]), curves)
    handles = [Line2D([], [], label=n, **s) for n, s in zip(curves, STYLES, strict=False)]
    handles += [Line2D([], [], **BASELINE)] * bool(baselines)
    handles += [Line2D([], [], **CHANCE)] * bool(classes)
    longest = max(len(line) for handle in handles for line in handle.get_label().split("\n"))
    columns = max(1, min(len(handles), int(12 / (0.6 + 0.075 * longest))))  # in inches
    strip.legend(handles=handles, loc="outside lower left", frameon=False, ncols=columns)


def measured(curves: Curves) -> list[str]:
    """The accuracies that a panel shows, from top to bottom."""
    found = {name for rows in curves.values() for row in rows for name in row.percent}
    return [name for name in HEIGHTS if name in found] or ["fine_tuned"]


def _draw_channels(axes: Any, curves: Curves) -> None:
    """Channels kept by layer, at the size that most curves have."""
    rows = sum(curves.values(), [])
    asked = mode(row.asked for row in rows)
    names = [n for row in rows for n in row.percent if n not in (*COSTS, *SHOWN)]
    names = list(dict.fromkeys(names))
    for style, curve in zip(STYLES, curves.values(), strict=False):
        for of in (row.percent for row in curve if row.asked == asked):
            axes.plot([of[n].mean if n in of else None for n in names], **style)
    every = -(-len(names) // 26) or 1  # as many names fit below the axis
    turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(0, len(names), every), short_names(names)[::every], **turned)
    axes.set(ylim=(0, 103), ylabel="channels kept, %", xlabel="channel group, from input to output")
    axes.set_title(f"channels kept per layer, {asked}", loc="left")


def short_names(names: Sequence[str]) -> list[str]:
    """Names that fit below an axis: ``1.0.g2`` for layer1.0.gate2, ``11`` for features.11."""
    common = os.path.commonprefix(list(names)) if len(names) > 1 else ""
    start = common.rfind(".") + 1
    return [re.sub(r"\blayer(?=\d)", "", name[start:]).replace("gate", "g") for name in names]
