"""The record of a run: the schema of result.json for TensorBoard and tools, and its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from models import channel_groups
from utils.cost import Cost
from utils.metrics import Metrics

Json = dict[str, Any]


@dataclass
class Record:
    """What a run knows so far. Every field is plain JSON. None: this kind of run has no such field.

    ``before`` and ``after`` are the network before the first cut and after the latest one.
    """

    net: str
    dataset: str
    seed: int
    # Per cent on the test set: baseline, after_surgery, recalibrated, last and best epoch. And the
    # number of the best epoch: best_epoch.
    accuracy: Json = field(default_factory=dict)
    top5: Json = field(default_factory=dict)
    cost: Json = field(default_factory=dict)  # macs, params; in a pruning run before and after
    history: list[Json] = field(default_factory=list)  # ``Epoch``, with round (from 1), tested_on
    holdout: Json | None = None  # its accuracies, which chose the best epoch
    criterion: str | None = None  # what scores a channel
    method: str | None = None  # the rounds in words
    ratio: Json | None = None  # of the gate entries: asked (None with a budget) and reached
    budget: Json | None = None  # shares of macs, params or latency that may stay; else None
    baseline: Json | None = None  # config of the run that made it, if its file holds one
    # Milliseconds that inference takes, before and after, and their spread; by images at once.
    latency: Json | None = None
    gate_entries: dict[str, int] | None = None  # before and after
    channels: dict[str, dict[str, int]] | None = None  # before and after, by group
    held_at_floor: list[str] | None = None  # groups that keep more than selected: the minimum
    rounds: list[Json] | None = None  # size and accuracy after every round that selected
    command: str | None = None
    config: Json | None = None
    versions: Json | None = None
    wall_time_seconds: float | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Record:
        """Undo ``as_json``; ignore unknown fields. Raises KeyError without net, dataset or seed."""
        needed = ("net", "dataset", "seed")
        names = [f.name for f in fields(cls) if f.name in content or f.name in needed]
        return cls(**{name: content[name] for name in names})

    def as_json(self) -> Json:
        """Without the fields that are None."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def note_accuracy(self, when: str, metrics: Metrics | None) -> None:
        """Note top-1 and top-5; None without training."""
        self.accuracy[when] = metrics and metrics.accuracy
        self.top5[when] = metrics and metrics.top5

    def note_end(self, last: Metrics | None, best: Metrics | None, best_epoch: int | None) -> None:
        """Note the accuracies of the last and the best epoch; None without training."""
        self.note_accuracy("last", last)
        self.note_accuracy("best", best)
        self.accuracy["best_epoch"] = self.top5["best_epoch"] = best_epoch

    def note_size(self, when: str, model: nn.Module, cost: Cost) -> None:
        """Note what a network costs, and its widths, ``before`` or ``after`` the cuts."""
        groups = channel_groups(model)
        self.gate_entries[when] = sum(group.width * len(group.entries) for group in groups)
        for name, value in vars(cost).items():
            self.cost.setdefault(name, {})[when] = value
        for group in groups:
            self.channels.setdefault(group.name, {})[when] = group.width

    @property
    def shrunk(self) -> set[str]:
        """The groups that lose channels."""
        widths = self.channels or {}
        return {name for name, width in widths.items() if width["after"] < width["before"]}


def final_table(record: Record) -> str:
    """Accuracies, costs and channels per group, in at most 79 columns."""
    what = f"{record.net} on {record.dataset}, {record.criterion}, {record.method}"
    lines = [f"{what}, seed {record.seed}", ""]

    lines.append(f"  {'accuracy, %':<28}{'top-1':>10}{'top-5':>10}")
    trained = "trained" if record.method == "from scratch" else "fine-tuned"
    titles = {"baseline": "baseline", "after_surgery": "after surgery"}
    titles |= {"recalibrated": "statistics recalibrated", "last": f"{trained}, last epoch"}
    titles |= {"best": f"{trained}, best on {'holdout' if record.holdout else 'test'}"}
    for name, title in titles.items():
        if (top1 := record.accuracy.get(name)) is not None:
            lines.append(f"  {title:<28}{top1:10.2f}{record.top5[name]:10.2f}")
    if epoch := record.accuracy["best_epoch"]:
        lines[-1] += f"   (epoch {epoch})"

    lines += ["", f"  {'':<28}{'before':>10}{'after':>10}{'reduction':>12}"]
    titles = {"macs": "multiply-adds (MACs)", "params": "parameters", "latency": "time"}
    rows = [(f"{titles[name]}, M", size, 1e6) for name, size in record.cost.items()]
    for batch, time in (record.latency or {}).items():
        rows.append((f"time of {batch} {'image' if batch == '1' else 'images'}, ms", time, 1))
    for title, size, unit in rows:
        before, after = size["before"] / unit, size["after"] / unit
        saved = 100 * (1 - after / before)
        lines.append(f"  {title:<28}{before:10.3f}{after:10.3f}{saved:10.1f} %")

    ratio = record.ratio["asked"]
    asked = "" if ratio is None else f"asked {100 * ratio:.2f} %, "
    lines += ["", f"  gate entries removed: {asked}reached {100 * record.ratio['reached']:.2f} %"]
    for name, title in titles.items():
        if (most := record.budget.get(name)) is not None:
            size = record.cost.get(name) or time  # that of the goal's batch, which is the last
            reached = f"reached {100 * size['after'] / size['before']:.2f} %"
            lines.append(f"  {title} kept: asked at most {100 * most:.2f} %, {reached}")

    lines += ["", f"  {'channels':<28}{'before':>10}{'after':>10}"]
    for name, widths in record.channels.items():
        before, after = widths["before"], widths["after"]
        bar = "#" * round(20 * after / before)
        note = "   at the floor" if name in record.held_at_floor else ""
        lines.append(f"  {name:<28}{before:10}{after:10}   {bar:<20}{note}".rstrip())
    return "\n".join(lines)
