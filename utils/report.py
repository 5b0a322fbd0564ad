"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def result_table(result: Mapping[str, Any]) -> str:
    """The result of a pruning run as text of at most 79 columns: accuracies, cost, and the channels kept per layer."""
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
            f"  {'fine-tuned, best on test':<28}{accuracy['best']:10.2f}   (epoch {accuracy['best_epoch']})",
        ]
    lines += ["", f"  {'':<28}{'before':>10}{'after':>10}{'reduction':>12}"]
    for name, unit, scale in (
        ("macs", "multiply-adds (MACs), M", 1e6),
        ("params", "parameters, M", 1e6),
    ):
        before, after = cost[name]["before"], cost[name]["after"]
        lines.append(
            f"  {unit:<28}{before / scale:10.3f}{after / scale:10.3f}{100 * (1 - after / before):10.1f} %"
        )
    lines += [
        "",
        f"  gate entries removed: asked {100 * ratio['asked']:.2f} %, reached {100 * ratio['reached']:.2f} %",
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
