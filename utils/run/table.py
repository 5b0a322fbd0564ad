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
    top1, top5 = record.accuracy, record.top5
    rows = {"baseline": "baseline", "after surgery": "after_surgery"}
    if "recalibrated" in top1:
        rows["statistics recalibrated"] = "recalibrated"
    trained = "trained" if record.method == "from scratch" else "fine-tuned"
    best = f"{trained}, best on {'holdout' if record.holdout else 'test'}"
    if top1["last"] is not None:
        rows |= {f"{trained}, last epoch": "last", best: "best"}
    lines = [f"  {'accuracy, %':<28}{'top-1':>10}{'top-5':>10}"]
    lines += [f"  {title:<28}{top1[key]:10.2f}{top5[key]:10.2f}" for title, key in rows.items()]
    if best in rows:
        lines[-1] += f"   (epoch {top1['best_epoch']})"
    return lines


def _sizes(record: Record) -> list[str]:
    titles = {"macs": "multiply-adds (MACs), M", "params": "parameters, M"}
    lines = [f"  {'':<28}{'before':>10}{'after':>10}{'reduction':>12}"]
    for name, title in titles.items():
        before, after = (record.cost[name][when] / 1e6 for when in ("before", "after"))
        lines.append(
            f"  {title:<28}{before:10.3f}{after:10.3f}{100 * (1 - after / before):10.1f} %"
        )
    asked = record.ratio["asked"]
    asked = "" if asked is None else f"asked {100 * asked:.2f} %, "
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
