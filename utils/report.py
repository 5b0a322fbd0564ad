"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def result_table(result: Mapping[str, Any]) -> str:
    """The result of a pruning run in at most 79 columns: accuracies, costs, channels per layer."""
    accuracy, cost, ratio = result["accuracy"], result["cost"], result["ratio"]
    lines = [
        f"{result['net']} on {result['dataset']}, {result['criterion']}, seed {result['seed']}",
        "",
        f"  {'top-1 accuracy, test':<28}{'%':>10}",
        f"  {'baseline':<28}{accuracy['baseline']:10.2f}",
        f"  {'after surgery':<28}{accuracy['after_surgery']:10.2f}",
    ]
    if accuracy["last"] is not None:
        lines += [
            f"  {'fine-tuned, last epoch':<28}{accuracy['last']:10.2f}",
            f"  {'fine-tuned, best on test':<28}{accuracy['best']:10.2f}"
            f"   (epoch {accuracy['best_epoch']})",
        ]
    lines += ["", f"  {'':<28}{'before':>10}{'after':>10}{'reduction':>12}"]
    for name, title in (("macs", "multiply-adds (MACs), M"), ("params", "parameters, M")):
        before, after = cost[name]["before"] / 1e6, cost[name]["after"] / 1e6
        reduction = 100 * (1 - after / before)
        lines.append(f"  {title:<28}{before:10.3f}{after:10.3f}{reduction:10.1f} %")
    lines += [
        "",
        f"  gate entries removed: asked {100 * ratio['asked']:.2f} %,"
        f" reached {100 * ratio['reached']:.2f} %",
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
