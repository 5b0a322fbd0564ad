"""Drawing results with matplotlib: accuracy over MACs, and what every layer keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from tools.curves import Curve, Line, Panel, make_panels, short_names
from tools.rows import Row
from utils.saliency import CRITERIA

# Okabe and Ito's colours, which all kinds of colour vision tell apart, with grey for their yellow.
COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#000000", "#999999")
MARKERS = "osD^vPX*<>hp"
# Which accuracies are drawn, from top to bottom.
ACCURACY_TITLES = {
    "fine_tuned": "fine-tuned", "recalibrated": "recalibrated", "after_surgery": "after surgery",
}  # fmt: skip
LABELS = 26  # as many layer names fit below an axis
RC = {
    "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 9,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "lines.linewidth": 1.3, "lines.markersize": 4.5, "savefig.dpi": 180,
}  # fmt: skip


class Style(NamedTuple):
    colour: str
    marker: str


def save_plot(rows: Sequence[Row], file: BinaryIO, kind: str) -> None:
    """Draw into a file that is open for writing; ``kind`` is png, pdf or svg."""
    with matplotlib.rc_context(RC):
        draw(rows).savefig(file, format=kind)


def draw(rows: Sequence[Row]) -> Figure:
    """A figure with one row of panels per network and data set."""
    panels = make_panels(rows)
    styles = make_styles([curve for panel in panels for curve in panel.curves])
    figure = Figure(figsize=(10.5, 0.8 + 4 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06, hspace=0.04)
    for part, panel in zip(figure.subfigures(len(panels), squeeze=False), panels, strict=True):
        _draw_panel(part[0], panel, styles)
    _draw_legend(figure, panels, styles)
    return figure


def make_styles(curves: Sequence[Curve]) -> dict[str, Style]:
    """Colour and marker by label: a colour per criterion, a marker per variant.

    Where all curves share one of the two, the other has both to itself.
    """
    known = {name: i for i, name in enumerate(CRITERIA)}
    criteria = {c.criterion: known.get(c.criterion, len(known)) for c in curves}
    variants = {c: i for i, c in enumerate(dict.fromkeys(c.variant for c in curves))}
    styles = {}
    for curve in curves:
        criterion, variant = criteria[curve.criterion], variants[curve.variant]
        colour = criterion if len(criteria) > 1 else variant
        marker = variant if len(variants) > 1 else criterion
        styles[curve.label] = Style(COLOURS[colour % len(COLOURS)], MARKERS[marker % len(MARKERS)])
    return styles


def _draw_panel(figure: Any, panel: Panel, styles: dict[str, Style]) -> None:
    shown = [name for name in ACCURACY_TITLES if any(c.accuracy(name).x for c in panel.curves)]
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 1.3))
    # Accuracies right after surgery are far below the others: each kind has an axis of its own.
    left = grid[0].subgridspec(len(shown), 1, height_ratios=(5, 3, 3)[: len(shown)])
    top = None
    for place, name in zip(left, shown, strict=True):
        axes = figure.add_subplot(place, sharex=top)
        top = top or axes
        _draw_accuracy(axes, panel, name, styles)
        axes.tick_params(labelbottom=name == shown[-1])
        axes.set_ylabel(f"{ACCURACY_TITLES[name]}, %")
    axes.set_xlabel("MACs kept, %")
    for baseline in panel.baselines:
        top.axhline(baseline, color="0.35", linewidth=0.9, zorder=1)
    top.set_title(f"{panel.net} on {panel.dataset}: top-1", loc="left", fontweight="bold")
    _draw_channels(figure.add_subplot(grid[1]), panel, styles)


def _draw_accuracy(axes: Axes, panel: Panel, name: str, styles: dict[str, Style]) -> None:
    for curve in panel.curves:
        dashed = name != "fine_tuned"
        _draw_line(axes, curve.accuracy(name), styles[curve.label], dashed)
    axes.yaxis.set_major_locator(MaxNLocator(5 if name == "fine_tuned" else 4, steps=(1, 2, 5, 10)))


def _draw_channels(axes: Axes, panel: Panel, styles: dict[str, Style]) -> None:
    for curve in panel.curves:
        _draw_line(axes, curve.channels(panel.middle, panel.groups), styles[curve.label])
    every = -(-len(panel.groups) // LABELS)
    labels = short_names(panel.groups)
    long = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    turned = long if max(map(len, labels), default=0) > 3 else {}
    axes.set_xticks(range(0, len(labels), every), labels[::every], **turned)
    axes.set_ylim(0, 103)
    axes.set_ylabel("channels kept, %")
    shortened = [(name, label) for name, label in zip(panel.groups, labels, strict=True)
                 if name != label]  # fmt: skip
    name, label = max(shortened, key=lambda pair: len(pair[0]), default=("", ""))
    how = f" ({label} is {name})" * bool(name)
    axes.set_xlabel(f"channel group, from input to output{how}")
    axes.set_title(f"channels kept per layer, {panel.middle}", loc="left")


def _draw_line(axes: Axes, line: Line, style: Style, dashed: bool = False) -> None:
    axes.errorbar(
        line.x, line.y, yerr=line.deviation if any(line.deviation) else None, capsize=2,
        elinewidth=0.9, color=style.colour, **_look(style, dashed),
    )  # fmt: skip


def _look(style: Style, dashed: bool) -> dict[str, Any]:
    """Fine-tuned: solid and filled; after surgery: dashed and open."""
    look = {"marker": style.marker, "linestyle": "--" if dashed else "-"}
    return {**look, "markerfacecolor": "white" if dashed else style.colour}


def _draw_legend(figure: Figure, panels: Sequence[Panel], styles: dict[str, Style]) -> None:
    handles = {
        label: Line2D([], [], color=style.colour, **_look(style, False))
        for label, style in styles.items()
    }
    black = Style("black", "o")
    shown = {name for panel in panels for curve in panel.curves
             for name in ("fine_tuned", "after_surgery") if curve.accuracy(name).x}  # fmt: skip
    chosen_on = {row.chosen_on for panel in panels for curve in panel.curves for row in curve.rows}
    tuned = "fine-tuned (best on holdout)" if chosen_on == {"holdout"} else "fine-tuned"
    for name, title in (("fine_tuned", tuned), ("after_surgery", "after surgery")):
        if name in shown:
            handles[title] = Line2D([], [], color="black", **_look(black, name != "fine_tuned"))
    handles["baseline"] = Line2D([], [], color="0.35", linewidth=0.9)
    inches = 0.6 + 0.07 * max(map(len, handles))  # of one entry
    columns = max(1, min(6, len(handles), int(figure.get_figwidth() / inches)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", frameon=False,
                  ncols=columns)  # fmt: skip
