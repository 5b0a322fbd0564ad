"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def result_table(result: Mapping[str, Any]) -> str:
    """The result of a pruning run in at most 79 columns: accuracies, costs, channels per layer."""
    cost, ratio = result["cost"], result["ratio"]
    top1, top5 = result["accuracy"], result["top5"]
    lines = [
        f"{result['net']} on {result['dataset']}, {result['criterion']}, {result['method']},"
        f" seed {result['seed']}",
        "",
        f"  {'accuracy, %':<28}{'top-1':>10}{'top-5':>10}",
    ]
    rows = [("baseline", "baseline", ""), ("after surgery", "after_surgery", "")]
    if "recalibrated" in top1:
        rows.append(("statistics recalibrated", "recalibrated", ""))
    if top1["last"] is not None:
        trained = "trained" if result["method"] == "from scratch" else "fine-tuned"
        chosen_on = "holdout" if "holdout" in result else "test"
        rows += [
            (f"{trained}, last epoch", "last", ""),
            (f"{trained}, best on {chosen_on}", "best", f"   (epoch {top1['best_epoch']})"),
        ]
    lines += [f"  {title:<28}{top1[k]:10.2f}{top5[k]:10.2f}{note}" for title, k, note in rows]
    lines += ["", f"  {'':<28}{'before':>10}{'after':>10}{'reduction':>12}"]
    for name, title in (("macs", "multiply-adds (MACs), M"), ("params", "parameters, M")):
        before, after = cost[name]["before"] / 1e6, cost[name]["after"] / 1e6
        reduction = 100 * (1 - after / before)
        lines.append(f"  {title:<28}{before:10.3f}{after:10.3f}{reduction:10.1f} %")
    asked = "" if ratio["asked"] is None else f"asked {100 * ratio['asked']:.2f} %, "
    lines += ["", f"  gate entries removed: {asked}reached {100 * ratio['reached']:.2f} %"]
    for name, title in (("macs", "multiply-adds"), ("params", "parameters")):
        if result["budget"][name] is not None:
            reached = 100 * cost[name]["after"] / cost[name]["before"]
            asked = 100 * result["budget"][name]
            lines.append(f"  {title} kept: asked at most {asked:.2f} %, reached {reached:.2f} %")
    lines += [
        "",
        f"  {'channels':<28}{'before':>10}{'after':>10}",
    ]
    for name, channels in result["channels"].items():
        width, kept = channels["before"], channels["after"]
        note = "   at the floor" if name in result["held_at_floor"] else ""
        lines.append(
            f"  {name:<28}{width:10}{kept:10}   {'#' * round(20 * kept / width):<20}{note}".rstrip()
        )
    return "\n".join(lines)
