"""One table of all pruning runs: every result.json below the folders, a row per experiment.

    python -m tools.results checkpoints
    python -m tools.results checkpoints more_runs --csv results.csv --plot results.png

Runs that differ in nothing but their seeds are one row: mean ± sample standard deviation. The table
is Markdown; --csv has the same rows unrounded, --plot draws accuracy over MACs and what every layer
keeps. Both files are replaced where they exist.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.rows import ACCURACIES, Row, Spread, also_text, group_trials, make_rows
from tools.trials import find_files, read_trial
from utils.cli import Parser, run_script
from utils.errors import InputError
from utils.files import write_atomically

ENDINGS = (".png", ".pdf", ".svg")
HOLDOUT = "†"  # marks accuracies of the epoch that a holdout chose
TITLES = {"baseline": "baseline", "after_surgery": "after surgery",
          "recalibrated": "recalibrated", "fine_tuned": "fine-tuned"}  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table whose columns line up, and what to know about its numbers."""
    columns = {
        "network": [row.net for row in rows],
        "data": [row.dataset for row in rows],
        "criterion": [row.criterion for row in rows],
        "method": [row.method for row in rows],
        "asked": [str(row.asked) for row in rows],
        "MACs kept": [spread_text(row.macs) for row in rows],
        "params kept": [spread_text(row.params) for row in rows],
    }
    for name, title in TITLES.items():
        if name != "recalibrated" or any(row.accuracy[name] for row in rows):
            columns[title] = [_accuracy_text(row, name) for row in rows]
    columns["seeds"] = [str(row.seeds) for row in rows]
    if any(row.also for row in rows):
        columns["also"] = [also_text(row.also) or "-" for row in rows]
    left = {"network", "data", "criterion", "method", "asked", "also"}
    remarks = [
        "Shares kept and top-1 accuracies on the test set in %; mean ± sample standard deviation"
        " over the seeds.",
        "Fine-tuned: the last epoch.",
    ]
    if any(row.chosen_on for row in rows):
        remarks[-1] = (
            f"Fine-tuned: the last epoch; with {HOLDOUT}, the epoch chosen on the holdout."
        )
    return "\n".join([*_table(columns, left), "", *remarks])


def _table(columns: dict[str, list[str]], left: set[str]) -> Iterator[str]:
    """Lines of a table; the columns named in ``left`` are aligned there, the others right."""
    widths = {title: max(map(len, [title, "---", *cells])) for title, cells in columns.items()}

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if title in left else cell.rjust(width)
            for cell, (title, width) in zip(cells, widths.items(), strict=True)
        )  # fmt: skip
        return f"| {' | '.join(padded)} |"

    yield line(list(columns))
    yield line(["-" * w if title in left else "-" * (w - 1) + ":" for title, w in widths.items()])
    yield from map(line, zip(*columns.values(), strict=True))


def spread_text(spread: Spread | None) -> str:
    """``91.23 ± 0.45``, without ± for a single value, a dash for none."""
    if spread is None:
        return "-"
    return f"{spread.mean:.2f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.2f}")


def _accuracy_text(row: Row, name: str) -> str:
    marked = name == "fine_tuned" and row.chosen_on
    return f"{HOLDOUT} " * bool(marked) + spread_text(row.accuracy[name])


def csv_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with raw numbers: percent, but for ``asked``, which is a share as on the command
    line, of what ``asked_of`` names; None for what was not measured.
    """
    records = []
    for row in rows:
        record = {
            "network": row.net, "data": row.dataset, "criterion": row.criterion,
            "method": row.method, "asked_of": row.asked.kind, "asked": row.asked.value,
        }  # fmt: skip
        spreads = {"macs_kept": row.macs, "params_kept": row.params}
        for name, spread in {**spreads, **{n: row.accuracy[n] for n in ACCURACIES}}.items():
            record[name] = spread and spread.mean
            record[f"{name}_deviation"] = spread and spread.deviation
        chosen_on = "last epoch" if row.accuracy["fine_tuned"] else None
        record |= {"seeds": row.seeds, "chosen_on": row.chosen_on or chosen_on}
        records.append({**record, "also": also_text(row.also)})
    return records


def csv_text(records: Sequence[dict[str, Any]]) -> str:
    """With a line of names; an empty cell is None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m tools.results")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="where results are, and below")
    parser.add_argument("--csv", metavar="FILE", help="write the rows there, too, unrounded")
    parser.add_argument("--plot", metavar="FILE", help=f"draw them; {', '.join(ENDINGS)}")
    args = parser.parse_args(argv)
    if args.plot and Path(args.plot).suffix not in ENDINGS:
        parser.error(f"--plot: {args.plot} ends with none of {', '.join(ENDINGS)}")
    return args


def main(args: argparse.Namespace) -> list[Row]:
    """Print the table, write the files, and return the rows."""
    save_plot = _load_save_plot() if args.plot else None  # before anything is read or written
    files = find_files(args.folders)
    trials = [trial for trial in map(read_trial, files) if trial]
    unpruned = len(files) - len(trials)
    if not trials:
        of = f"but {unpruned} of unpruned networks" if unpruned else "at all"
        raise InputError(f"no result.json of a pruning run below {', '.join(args.folders)}, {of}")
    rows = make_rows(group_trials(trials))
    print(markdown(rows))
    if unpruned:
        print(f"Left out: {unpruned} result.json of unpruned networks.")
    if args.csv:
        text = csv_text(csv_records(rows))
        _write(args.csv, "--csv", lambda file: file.write(text.encode()))
    if save_plot:
        kind = Path(args.plot).suffix[1:]
        _write(args.plot, "--plot", lambda file: save_plot(rows, file, kind))
    return rows


def _write(path: str, flag: str, write: Callable[[Any], Any]) -> None:
    try:
        write_atomically(path, write)
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written ({error})") from error


def _load_save_plot() -> Callable[..., None]:
    try:
        from tools.plots import save_plot
    except ModuleNotFoundError as error:
        raise InputError(
            f"--plot needs matplotlib ({error}): pip install -r requirements-dev.txt"
        ) from error
    return save_plot


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
