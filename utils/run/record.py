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
    """What is known of a run so far. Every field is plain JSON.

    Attributes:
        net, dataset, seed: what was trained, on what.
        accuracy, top5: per cent on the test set: ``baseline``, ``after_surgery``,
            ``recalibrated``, ``last`` and ``best`` epoch, ``best_epoch``.
        cost: MACs and parameters; of a pruning run ``before`` and ``after`` of each.
        history: every epoch (``utils.finetune.Epoch``), with ``round`` and ``tested_on``.
        holdout: accuracies on the images that chose the best epoch, where there are any.
        criterion, method: what scores a channel, and in how many rounds channels go, in words.
        ratio: share of the gate entries ``asked`` (None with a budget) and ``reached``.
        budget: shares of ``macs`` or ``params`` that were to stay; None for the other.
        baseline: configuration of the run that made the baseline, if its file says.
        gate_entries, channels: ``before`` and ``after``, all together and by channel group.
        held_at_floor: groups that keep more channels than asked, at the floor.
        rounds: size and accuracy after every round that cut something.
        command, config, versions, wall_time_seconds: what it takes to repeat the run.
    """

    net: str
    dataset: str
    seed: int
    accuracy: dict[str, Any] = field(default_factory=dict)
    top5: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    holdout: dict[str, Any] | None = None
    criterion: str | None = None
    method: str | None = None
    ratio: dict[str, Any] | None = None
    budget: dict[str, Any] | None = None
    baseline: dict[str, Any] | None = None
    gate_entries: dict[str, int] | None = None
    channels: dict[str, dict[str, int]] | None = None
    held_at_floor: list[str] | None = None
    rounds: list[dict[str, Any]] | None = None
    command: str | None = None
    config: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    wall_time_seconds: float | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Record:
        """The inverse of ``as_json``; what this version does not know is left out.

        Raises KeyError with the name of what every record holds and this one lacks.
        """
        needed = {name: content[name] for name in ("net", "dataset", "seed")}
        known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        return cls(**{**known, **needed})

    def as_json(self) -> dict[str, Any]:
        """Without the fields that this kind of run does not have."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def begin_pruning(self, before: Measurement, baseline: Mapping[str, Any] | None) -> None:
        """Note the network before anything is cut, and the configuration that made it."""
        self.baseline = {"config": baseline and dict(baseline)}
        for kind in KINDS:
            getattr(self, kind)["baseline"] = getattr(before.metrics, kind)
        self.cost = {
            name: {"before": value, "after": value} for name, value in vars(before.cost).items()
        }
        entries = before.gate_entries
        self.gate_entries = {"before": entries, "after": entries}
        self.channels = {name: {"before": w, "after": w} for name, w in before.widths.items()}
        self.held_at_floor, self.rounds = [], []

    def add_cut(self, plan: PruningPlan, after: Measurement, recalibrated: Metrics | None) -> None:
        """Note what a round has cut. ``after`` says how the network is since then."""
        for kind in KINDS:
            getattr(self, kind)["after_surgery"] = getattr(after.metrics, kind)
            if recalibrated:
                getattr(self, kind)["recalibrated"] = getattr(recalibrated, kind)
        self.gate_entries["after"] = after.gate_entries
        self.ratio["reached"] = 1 - after.gate_entries / self.gate_entries["before"]
        for name, value in vars(after.cost).items():
            self.cost[name]["after"] = value
        for name, width in after.widths.items():
            self.channels[name]["after"] = width
        self.held_at_floor = list(plan.held_at_floor)
        self.rounds.append({
            "ratio": self.ratio["reached"], **vars(after.cost),
            "after_surgery": after.metrics.accuracy,
            "recalibrated": recalibrated and recalibrated.accuracy,
        })  # fmt: skip

    @property
    def shrunk(self) -> set[str]:
        """The groups that lose channels."""
        widths = self.channels or {}
        return {name for name, width in widths.items() if width["after"] < width["before"]}

    @property
    def size_before(self) -> dict[str, int]:
        """``gate_entries``, ``macs`` and ``params`` of the network before the first round."""
        sizes = {name: cost["before"] for name, cost in self.cost.items()}
        return {"gate_entries": self.gate_entries["before"], **sizes}

    def add_epoch(self, epoch: Epoch, round_number: int, tested_on: str) -> None:
        self.history.append({**epoch.as_dict(), "round": round_number, "tested_on": tested_on})

    def epochs(self, round_number: int) -> list[Epoch]:
        """The epochs of one round."""
        return [Epoch.from_dict(e) for e in self.history if e["round"] == round_number]

    def best(self, round_number: int) -> Epoch | None:
        """The epoch of a round that was best on the images that choose; the first of equals."""
        return max(self.epochs(round_number), key=lambda epoch: epoch.test.accuracy, default=None)

    def note_epochs(self, round_number: int) -> dict[str, dict[str, Any]]:
        """Last and best epoch of a round, by kind of accuracy; None without any epoch."""
        last, best = (self.epochs(round_number) or [None])[-1], self.best(round_number)
        return {
            kind: {
                "last": last and getattr(last.test, kind),
                "best": best and getattr(best.test, kind),
                "best_epoch": best and best.number,
            }
            for kind in KINDS
        }  # fmt: skip
