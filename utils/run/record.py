"""The record of a run: the one schema of result.json, of the final table, TensorBoard and tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from models import Gate, GatedModel
from utils.cost import Cost, model_cost
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
    def of(cls, model: GatedModel, data: Data, runtime: Runtime) -> Measurement:
        """Evaluate a network and count what it costs."""
        gates = sum(module.gate.numel() for module in model.modules() if isinstance(module, Gate))
        cost = model_cost(model, data.about.image_size)
        return cls(evaluate(model, data.test, runtime), cost, model.group_widths(), gates)

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
    budget: Json | None = None  # shares of macs or params that may stay; None for the other
    baseline: Json | None = None  # config of the run that made it, if its file holds one
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

    def as_json(self) -> dict[str, Any]:
        """Without the fields that are None."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def begin_pruning(self, before: Measurement, baseline: Mapping[str, Any] | None) -> None:
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
        self.rounds.append({
            "ratio": self.ratio["reached"], **vars(after.cost),
            "after_surgery": after.metrics.accuracy,
            "recalibrated": recalibrated and recalibrated.accuracy,
        })  # fmt: skip

    def _note_accuracy(self, when: str, metrics: Metrics) -> None:
        for kind in KINDS:
            getattr(self, kind)[when] = getattr(metrics, kind)

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

    def add_epoch(self, epoch: Epoch, round_number: int, tested_on: str) -> None:
        self.history.append({**epoch.as_dict(), "round": round_number, "tested_on": tested_on})

    def epochs(self, round_number: int) -> list[Epoch]:
        """The epochs of one round; rounds count from 1."""
        return [Epoch.from_dict(e) for e in self.history if e["round"] == round_number]

    def best(self, round_number: int) -> Epoch | None:
        """The epoch of a round with the best test or holdout accuracy; the first of equals."""
        return max(self.epochs(round_number), key=lambda epoch: epoch.test.accuracy, default=None)


def last_and_best(last: Metrics | None, best: Metrics | None, epoch: int | None) -> dict[str, Any]:
    """By kind of accuracy, ``last``, ``best`` and ``best_epoch`` as ``Record`` holds them."""
    return {
        kind: {"last": getattr(last, kind, None), "best": getattr(best, kind, None),
               "best_epoch": epoch}
        for kind in KINDS
    }  # fmt: skip
