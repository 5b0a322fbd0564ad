"""The record of a run: the schema of result.json for TensorBoard and tools, and its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from models import channel_groups, group_widths
from utils.cost import Cost, Latency, model_cost
from utils.data.batches import Data
from utils.distributed import Runtime
from utils.finetune import Epoch, evaluate
from utils.metrics import Metrics
from utils.pruning import PruningPlan

KINDS = ("accuracy", "top5")
Json = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """A network as measured: accuracy on the test set, cost, and the width of every group."""

    metrics: Metrics
    cost: Cost
    widths: dict[str, int]
    gate_entries: int

    @classmethod
    def of(cls, model: nn.Module, data: Data, runtime: Runtime) -> Measurement:
        """Evaluate a network and count what it costs."""
        gates = sum(group.width * len(group.entries) for group in channel_groups(model))
        cost = model_cost(model, data.about.image_size)
        return cls(evaluate(model, data.test, runtime), cost, group_widths(model), gates)

    def __str__(self) -> str:
        return f"{self.cost}, {self.metrics}"


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
    history: list[Json] = field(default_factory=list)  # ``Epoch``, with round and tested_on
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
        """The inverse of ``as_json``; unknown fields are ignored.

        Raises KeyError, with its name, if a field is missing that every record has.
        """
        needed = ("net", "dataset", "seed")
        names = [f.name for f in fields(cls) if f.name in content or f.name in needed]
        return cls(**{name: content[name] for name in names})

    def as_json(self) -> Json:
        """Without the fields that are None."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def begin_pruning(self, before: Measurement, baseline: Json | None) -> None:
        """Note the network before any cut, and the configuration of the run that made it."""
        self.baseline = {"config": baseline and dict(baseline)}
        self._note_accuracy("baseline", before.metrics)
        self.gate_entries, self.channels, self.held_at_floor, self.rounds = {}, {}, [], []
        self._note_size("before", before)
        self._note_size("after", before)

    def add_cut(self, plan: PruningPlan, after: Measurement, recalibrated: Metrics | None) -> None:
        """Note what a round has cut, and the network after the cut."""
        self._note_accuracy("after_surgery", after.metrics)
        if recalibrated:
            self._note_accuracy("recalibrated", recalibrated)
        self._note_size("after", after)
        self.ratio["reached"] = 1 - after.gate_entries / self.gate_entries["before"]
        self.held_at_floor = list(plan.held_at_floor)
        made = {"ratio": self.ratio["reached"], **vars(after.cost)}
        made |= {"after_surgery": after.metrics.accuracy}
        made |= {"recalibrated": recalibrated and recalibrated.accuracy}
        self.rounds.append(made)

    def _note_accuracy(self, when: str, metrics: Metrics | None) -> None:
        for kind in KINDS:
            getattr(self, kind)[when] = metrics and getattr(metrics, kind)

    def _note_size(self, when: str, network: Measurement) -> None:
        self.gate_entries[when] = network.gate_entries
        for name, value in vars(network.cost).items():
            self.cost.setdefault(name, {})[when] = value
        for name, width in network.widths.items():
            self.channels.setdefault(name, {})[when] = width

    @property
    def shrunk(self) -> set[str]:
        """The groups that lose channels."""
        widths = self.channels or {}
        return {name for name, width in widths.items() if width["after"] < width["before"]}

    @property
    def size_before(self) -> dict[str, int]:
        """``gate_entries``, ``macs`` and ``params`` of the network before the first round."""
        sizes = {"gate_entries": self.gate_entries, **self.cost}
        return {name: size["before"] for name, size in sizes.items()}

    def note_time(self, times: Sequence[Latency]) -> None:
        """Note what inference takes before any cut and now, measured in turn."""
        self.latency = {str(time.batch): time.in_ms() for time in times}

    def add_epoch(self, epoch: Epoch, round_number: int, tested_on: str) -> None:
        self.history.append({**asdict(epoch), "round": round_number, "tested_on": tested_on})

    def epochs(self, round_number: int) -> list[Epoch]:
        """The epochs of one round; rounds count from 1."""
        return [Epoch.from_dict(e) for e in self.history if e["round"] == round_number]

    def best(self, round_number: int) -> Epoch | None:
        """The epoch of a round with the best test or holdout accuracy; the first of equals."""
        return max(self.epochs(round_number), key=lambda epoch: epoch.test.accuracy, default=None)

    def note_end(self, last: Metrics | None, best: Metrics | None, best_epoch: int | None) -> None:
        """Note the accuracies of the last and the best epoch; None without training."""
        self._note_accuracy("last", last)
        self._note_accuracy("best", best)
        self.accuracy["best_epoch"] = self.top5["best_epoch"] = best_epoch


def final_table(record: Record) -> str:
    """Accuracies, costs and channels per group, in at most 79 columns."""
    what = f"{record.net} on {record.dataset}, {record.criterion}, {record.method}"
    lines = [f"{what}, seed {record.seed}", "", *_accuracies(record), "", *_sizes(record)]
    return "\n".join([*lines, "", *_channels(record)])


def _accuracies(record: Record) -> list[str]:
    trained = "trained" if record.method == "from scratch" else "fine-tuned"
    titles = {"baseline": "baseline", "after_surgery": "after surgery"}
    titles |= {"recalibrated": "statistics recalibrated", "last": f"{trained}, last epoch"}
    titles |= {"best": f"{trained}, best on {'holdout' if record.holdout else 'test'}"}
    lines = [f"  {'accuracy, %':<28}{'top-1':>10}{'top-5':>10}"]
    for name, title in titles.items():
        if (top1 := record.accuracy.get(name)) is not None:
            lines.append(f"  {title:<28}{top1:10.2f}{record.top5[name]:10.2f}")
    if epoch := record.accuracy["best_epoch"]:
        lines[-1] += f"   (epoch {epoch})"
    return lines


def _sizes(record: Record) -> list[str]:
    lines = [f"  {'':<28}{'before':>10}{'after':>10}{'reduction':>12}"]
    ratio, kept = record.ratio["asked"], []
    asked = "" if ratio is None else f"asked {100 * ratio:.2f} %, "
    kept.append(f"  gate entries removed: {asked}reached {100 * record.ratio['reached']:.2f} %")
    for name, title in (("macs", "multiply-adds (MACs)"), ("params", "parameters")):
        before, after = (record.cost[name][when] / 1e6 for when in ("before", "after"))
        share = after / before
        lines.append(f"  {f'{title}, M':<28}{before:10.3f}{after:10.3f}{100 * (1 - share):10.1f} %")
        if (asked := record.budget[name]) is not None:
            reached = f"asked at most {100 * asked:.2f} %, reached {100 * share:.2f} %"
            kept.append(f"  {title} kept: {reached}")
    for batch, time in (record.latency or {}).items():
        before, after = time["before"], time["after"]
        title = f"time of {batch} image{'s' * (batch != '1')}, ms"
        lines.append(
            f"  {title:<28}{before:10.3f}{after:10.3f}{100 * (1 - after / before):10.1f} %"
        )
    if (asked := record.budget.get("latency")) is not None:
        reached = f"asked at most {100 * asked:.2f} %, reached {100 * after / before:.2f} %"
        kept.append(f"  time kept: {reached}")
    return [*lines, "", *kept]


def _channels(record: Record) -> list[str]:
    lines = [f"  {'channels':<28}{'before':>10}{'after':>10}"]
    for name, widths in record.channels.items():
        before, after = widths["before"], widths["after"]
        note = "   at the floor" if name in record.held_at_floor else ""
        bar = "#" * round(20 * after / before)
        lines.append(f"  {name:<28}{before:10}{after:10}   {bar:<20}{note}".rstrip())
    return lines
