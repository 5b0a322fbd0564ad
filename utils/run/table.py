"""The table at the end of a pruning run."""

from __future__ import annotations

from utils.run.record import Record


def final_table(record: Record) -> str:
    """Accuracies, costs and channels per group, in at most 79 columns."""
    return "\n".join([
        f"{record.net} on {record.dataset}, {record.criterion}, {record.method},"
        f" seed {record.seed}",
        "", *_accuracies(record), "", *_sizes(record), "", *_channels(record),
    ])  # fmt: skip


def _accuracies(record: Record) -> list[str]:
    trained = "trained" if record.method == "from scratch" else "fine-tuned"
    titles = {
        "baseline": "baseline", "after_surgery": "after surgery",
        "recalibrated": "statistics recalibrated", "last": f"{trained}, last epoch",
        "best": f"{trained}, best on {'holdout' if record.holdout else 'test'}",
    }  # fmt: skip
    lines = [f"  {'accuracy, %':<28}{'top-1':>10}{'top-5':>10}"]
    for name, title in titles.items():
        if (top1 := record.accuracy.get(name)) is not None:
            lines.append(f"  {title:<28}{top1:10.2f}{record.top5[name]:10.2f}")
    if epoch := record.accuracy["best_epoch"]:
        lines[-1] += f"   (epoch {epoch})"
    return lines


def _sizes(record: Record) -> list[str]:
    titles = {"macs": "multiply-adds (MACs), M", "params": "parameters, M"}
    lines = [f"  {'':<28}{'before':>10}{'after':>10}{'reduction':>12}"]
    for name, title in titles.items():
        before, after = (record.cost[name][when] / 1e6 for when in ("before", "after"))
        lines.append(
            f"  {title:<28}{before:10.3f}{after:10.3f}{100 * (1 - after / before):10.1f} %"
        )
    ratio = record.ratio["asked"]
    asked = "" if ratio is None else f"asked {100 * ratio:.2f} %, "
    lines += ["", f"  gate entries removed: {asked}reached {100 * record.ratio['reached']:.2f} %"]
    for name, title in (("macs", "multiply-adds"), ("params", "parameters")):
        if (share := record.budget[name]) is not None:
            reached = record.cost[name]["after"] / record.cost[name]["before"]
            lines.append(
                f"  {title} kept: asked at most {100 * share:.2f} %, reached {100 * reached:.2f} %"
            )
    return lines


def _channels(record: Record) -> list[str]:
    lines = [f"  {'channels':<28}{'before':>10}{'after':>10}"]
    for name, widths in record.channels.items():
        before, after = widths["before"], widths["after"]
        note = "   at the floor" if name in record.held_at_floor else ""
        bar = "#" * round(20 * after / before)
        lines.append(f"  {name:<28}{before:10}{after:10}   {bar:<20}{note}".rstrip())
    return lines
