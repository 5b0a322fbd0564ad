"""What result.json says of a pruning run, put together step by step."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from utils.checkpoint import Checkpoint
from utils.cost import Cost
from utils.pruning import PruningPlan
from utils.tally import Metrics


@dataclass(frozen=True)
class Snapshot:
    """A network as measured: accuracy, cost, and the width of every channel group."""

    metrics: Metrics
    cost: Cost
    widths: dict[str, int]
    gate_entries: int

    def __str__(self) -> str:
        return f"{self.cost}, {self.metrics}"


def first_result(
    args: argparse.Namespace, baseline: Checkpoint, before: Snapshot
) -> dict[str, Any]:
    """Before anything is cut."""
    config = baseline.meta.get("config")
    return {
        "net": args.net,
        "dataset": args.dataset,
        "criterion": args.criterion,
        "method": method(args),
        "seed": args.seed,
        "ratio": {"asked": args.p, "reached": 0.0},
        "budget": {"macs": args.macs, "params": args.params},
        "baseline": {"config": config and dict(config)},
        "accuracy": {"baseline": before.metrics.accuracy},
        "top5": {"baseline": before.metrics.top5},
        "cost": {
            "macs": {"before": before.cost.macs, "after": before.cost.macs},
            "params": {"before": before.cost.params, "after": before.cost.params},
        },
        "gate_entries": {"before": before.gate_entries, "after": before.gate_entries},
        "channels": {
            name: {"before": width, "after": width} for name, width in before.widths.items()
        },
        "held_at_floor": [],
        "rounds": [],
    }


def method(args: argparse.Namespace) -> str:
    """How channels are cut and what is trained then, in words."""
    if args.steps:
        return f"{args.steps} steps"
    return "smooth" if args.smooth else "from scratch" if args.from_scratch else "one shot"


def add_surgery(
    result: dict[str, Any], plan: PruningPlan, after: Snapshot, recalibrated: Metrics | None
) -> None:
    """Once more has been cut; with --steps the last time counts, and ``rounds`` tells of all."""
    for kind in ("accuracy", "top5"):
        result[kind]["after_surgery"] = getattr(after.metrics, kind)
        if recalibrated:
            result[kind]["recalibrated"] = getattr(recalibrated, kind)
    entries = result["gate_entries"]
    entries["after"] = after.gate_entries
    result["ratio"]["reached"] = 1 - after.gate_entries / entries["before"]
    result["cost"]["macs"]["after"] = after.cost.macs
    result["cost"]["params"]["after"] = after.cost.params
    for name, width in after.widths.items():
        result["channels"][name]["after"] = width
    result["held_at_floor"] = list(plan.held_at_floor)
    result["rounds"].append({
        "ratio": result["ratio"]["reached"], "macs": after.cost.macs, "params": after.cost.params,
        "after_surgery": after.metrics.accuracy,
        "recalibrated": recalibrated and recalibrated.accuracy,
    })  # fmt: skip
