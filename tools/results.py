"""Tables of pruning runs: gathered from result.json files into CSV, printed, and drawn.

    python -m tools.results checkpoints                              a row per experiment
    python -m tools.results checkpoints --csv results/criteria.csv   keep a row per run
    python -m tools.results results/criteria.csv --plot criteria.svg
    make tables                                                      docs/results.md

Inputs are CSV tables, and folders with result.json files anywhere below. --csv adds to a table that
is there: a run replaces the same run (configuration, seeds, weights of the baseline). Runs that
differ in nothing but their seeds are printed as mean ± sample standard deviation. --page writes a
section per table of a folder, with its plot beside; NAME.md, where there is one, has the title of
NAME.csv in its first line, and then a remark.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.rows import Row, make_rows, shared, words
from tools.trials import Trial, csv_text, find_files, merge, natural, read_csv, read_result
from utils.cli.parser import Parser, run_script
from utils.errors import InputError
from utils.files import write_atomically

ENDINGS = (".png", ".pdf", ".svg")
WIDTH = 160  # of a table
HOLDOUT = "†"  # marks accuracies of the epoch that a holdout chose
ACCURACIES = {"baseline": "baseline", "after_surgery": "after surgery",
              "recalibrated": "recalibrated", "fine_tuned": "fine-tuned"}  # fmt: skip
NO_ROWS = "No rows are there yet."
Tables = dict[Path | None, list[Trial]]  # by file; None for what folders hold
Columns = dict[str, list[str]]


def markdown(trials: Sequence[Trial]) -> str:
    """A row per experiment; what all have in common stands above the table."""
    rows = make_rows(trials)
    left = {
        "network": [row["net"] for row in rows], "data": [row["dataset"] for row in rows],
        "criterion": [row["criterion"] for row in rows], "method": [row["method"] for row in rows],
        "asked": [row.asked for row in rows], "settings": [row.also or "-" for row in rows],
    }  # fmt: skip
    common = [f"{title} {cells[0]}" for title, cells in left.items()
              if len({*cells}) == 1 and cells[0] not in ("", "-")]  # fmt: skip
    common += [words(*setting) for setting in shared(trials).items()]
    left = {title: cells for title, cells in left.items() if len({*cells}) > 1}
    right = {title: [str(row.kept(of) or "-") for row in rows]
             for title, of in (("MACs kept", "macs"), ("params kept", "params"))}  # fmt: skip
    right |= {t: [_accuracy_text(row, name) for row in rows] for name, t in ACCURACIES.items()}
    right = {title: cells for title, cells in right.items() if {*cells} != {"-"}}
    right["seeds"] = [str(len(row.runs)) for row in rows]
    cells, notes = left, []
    for title, fold in (("settings", ["settings"]), ("experiment", [*cells])):
        if cells.keys() >= {*fold} and len(next(_table(left, right))) > WIDTH:
            texts = [", ".join(parts) for parts in zip(*map(cells.get, fold), strict=True)]
            notes = list(dict.fromkeys(texts))
            left = {name: cells[name] for name in cells if name not in fold}
            left[title] = [f"({notes.index(text) + 1})" for text in texts]
    held = any(row["chosen_on"] == "holdout" for row in rows)
    marked = f"; with {HOLDOUT}, the one chosen on the holdout" * held
    return "\n".join([
        textwrap.fill(_plain(f"Same in all rows: {', '.join(common)}."), 100), "",
        *_table(left, right), "",
        "Shares kept, and top-1 accuracies on the test set, in %; mean ± sample standard deviation"
        f" over the seeds. Fine-tuned: the last epoch{marked}.",
        *[_plain(f"- ({number}) {note}") for number, note in enumerate(notes, 1)],
    ])  # fmt: skip


def _accuracy_text(row: Row, name: str) -> str:
    accuracy = row.accuracy(name)
    marked = accuracy and name == "fine_tuned" and row["chosen_on"] == "holdout"
    return f"{HOLDOUT} " * bool(marked) + str(accuracy or "-")


def _plain(text: str) -> str:
    """Without what Markdown takes for the end of a cell, or for HTML."""
    return text.replace("|", "&#124;").replace("<", "&lt;")


def _table(left: Columns, right: Columns) -> Iterator[str]:
    """Lines of a table, each column aligned to its side."""
    columns = [[title, "", *map(_plain, cells)] for title, cells in {**left, **right}.items()]
    for i, cells in enumerate(columns):
        width = max(3, *map(len, cells))
        cells[1] = "-" * width if i < len(left) else "-" * (width - 1) + ":"
        columns[i] = [c.ljust(width) if i < len(left) else c.rjust(width) for c in cells]
    for line in zip(*columns, strict=True):
        yield f"| {' | '.join(line)} |"


def page(tables: Tables) -> str:
    """docs/results.md: a section per table."""
    text = ["# Results", "", "Made by `make tables`. Every number comes from the tables in"
            " [results/](../results/README.md).", ""]  # fmt: skip
    for path, trials in tables.items():
        title, remark = heading(path)
        text += [f"## {title}", "", *[remark, ""] * bool(remark)]
        if trials:
            text += [*facts(trials), f"- {len(trials)} runs: [{path.name}](../results/{path.name})"]
            text += ["", markdown(trials), "", f"![{title}]({path.stem}.svg)", ""]
        else:
            text += [NO_ROWS, ""]
    return "\n".join(text if tables else [*text, NO_ROWS, ""])


def heading(path: Path | None) -> tuple[str, str]:
    """Title and remark of a table, from the .md file beside it; else its name."""
    side = path and path.with_suffix(".md")
    if not side or not side.is_file():
        return (path.stem.replace("_", " ") if path else "Folders"), ""
    title, _, remark = side.read_text(encoding="utf-8").partition("\n")
    return title.lstrip("# "), remark.strip()


def facts(trials: Sequence[Trial]) -> Iterator[str]:
    """Where the numbers come from, as a list."""

    def values(name: str, none: str = "not recorded", of: Iterable[Trial] = trials) -> str:
        return _plain(", ".join(sorted({t.get(name) or none for t in of}, key=natural)))

    numbers = sorted(float(t["top1_baseline"]) for t in trials if t.get("top1_baseline"))
    ends = dict.fromkeys(f"{number:.2f} %" for number in numbers[:1] + numbers[-1:])
    told = [trial for trial in trials if trial.get("baseline_epochs")]
    how = f", trained for {values('baseline_epochs', of=told)} epochs" * bool(told)
    yield (
        f"- Data: {values('dataset')}; classes {values('classes')}; images of"
        f" {values('image_size')} pixels; fingerprint {values('data')}"
    )
    yield f"- Baseline: top-1 {' to '.join(ends) or '-'}{how}; weights {values('baseline')}"
    yield f"- Fine-tuned for {values('epochs', '0')} epochs; precision {values('amp', 'float32')}"
    yield f"- Threads: {values('threads')}; torch {values('torch')}; commit {values('commit')}"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m tools.results")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="folders, and CSV tables")
    parser.add_argument("--csv", metavar="FILE", help="add all runs to this table")
    parser.add_argument("--plot", metavar="FILE", help=f"draw them; {', '.join(ENDINGS)}")
    parser.add_argument("--page", metavar="FILE",
                        help="write a page of the tables in a folder, and plots")  # fmt: skip
    args = parser.parse_args(argv)
    args.tables = [Path(name) for name in args.inputs if name.endswith(".csv")]
    args.folders = [Path(name) for name in args.inputs if not name.endswith(".csv")]
    if args.page and (args.csv or args.plot):
        parser.error("--page goes with no other flag")
    if args.plot and not args.plot.endswith(ENDINGS):
        parser.error(f"--plot: {args.plot} ends with none of {', '.join(ENDINGS)}")
    return args


def main(args: argparse.Namespace) -> Tables:
    """Print the tables or write the files, and return all runs."""
    save_plot = _load_save_plot() if args.plot or args.page else None  # before anything is written
    files, paths = find_files(args.folders), [*args.tables]
    if args.page:
        paths += [path for folder in args.folders for path in folder.glob("*.csv")]
    tables: Tables = {path: merge([], read_csv(path)) for path in sorted(paths)}
    if args.page:
        for path in filter(tables.get, tables):
            svg = Path(args.page).with_name(f"{path.stem}.svg")
            _write(svg, "--page", lambda file, of=tables[path]: save_plot(of, file, "svg"))
        _write(args.page, "--page", lambda file: file.write(page(tables).encode()))
        return tables
    results = [read_result(path) for path in files]
    if results:
        tables[None] = merge([], filter(None, results))
    trials = [trial for of in tables.values() for trial in of]
    if not trials:
        unpruned = f", but {len(results)} of unpruned networks" * bool(results)
        raise InputError(f"no pruning run in {', '.join(args.inputs)}{unpruned}")
    if args.csv:
        path = Path(args.csv)
        tables = {path: merge(read_csv(path) if path.exists() else [], trials)}
        _write(path, "--csv", lambda file: file.write(csv_text(tables[path]).encode()))
    for path, of in tables.items():
        print(f"## {heading(path)[0]}\n\n" * (len(tables) > 1), end="")
        print(markdown(of) if of else NO_ROWS)
    if None in results:
        print(f"Left out: {results.count(None)} result.json of unpruned networks.")
    if args.plot:
        trials = merge([], (trial for of in tables.values() for trial in of))
        _write(args.plot, "--plot", lambda file: save_plot(trials, file, args.plot[-3:]))
    return tables


def _write(path: str | Path, flag: str, write: Callable[[Any], Any]) -> None:
    try:
        write_atomically(path, write)
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written ({error})") from error


def _load_save_plot() -> Callable[..., None]:
    try:
        from tools.plots import save_plot
    except ModuleNotFoundError as error:
        raise InputError(
            f"plots need matplotlib ({error}): pip install -r requirements-dev.txt"
        ) from error
    return save_plot


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
