"""Tables of pruning runs: gathered from result.json files into CSV, printed, and drawn.

    python -m tools.results checkpoints                              a row per experiment
    python -m tools.results checkpoints --csv results/criteria.csv   keep a row per run
    python -m tools.results results/criteria.csv --plot criteria.svg
    make tables                                                      docs/results.md

Inputs are CSV tables, and folders with result.json files anywhere below. --csv keeps the rows of a
table that is there, and replaces those of the same configuration, seeds and baseline. Runs that
differ in their seeds alone are printed as mean ± sample standard deviation. --page has a section
per table; NAME.md, where there is one, has the title of NAME.csv in line 1, and then a remark.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tools.trials import SHOWN, Trial, csv_text, make_rows, merge, natural, read_csv, read_result
from utils.cli.parser import Parser, run_script
from utils.errors import InputError
from utils.files import writable, write_bytes

ENDINGS = (".png", ".pdf", ".svg")
WIDTH = 160  # of a table
HOLDOUT = "†"  # marks accuracies of the epoch that a holdout chose
TEXTS = {"network": "net", "data": "dataset", "criterion": "criterion", "method": "method"}
NUMBERS = {"MACs kept": "macs", "params kept": "params"} | {t: n for n, t in SHOWN.items()}
LEGEND = (
    "Shares kept, and top-1 accuracies on the test set, in %; mean ± sample standard deviation"
    " over the seeds. Fine-tuned: the last epoch"
)
NO_ROWS = "No rows are there yet."
Tables = dict[Path, list[Trial]]  # by file, or a heading
Columns = dict[str, list[str]]


def markdown(trials: Sequence[Trial]) -> str:
    """A row per experiment; what all have in common stands above the table."""
    rows, same = make_rows(trials)
    left = {title: [row.text(column) for row in rows] for title, column in TEXTS.items()}
    left |= {"asked": [r.asked for r in rows], "settings": [", ".join(r.also) or "-" for r in rows]}
    alike = {title: left.pop(title)[0] for title in [*left] if len({*left[title]}) == 1}
    common = [f"{title} {text}" for title, text in alike.items() if text not in ("", "-")] + same
    right = {title: [_spread(r.percent.get(of)) for r in rows] for title, of in NUMBERS.items()}
    right = {title: texts for title, texts in right.items() if {*texts} != {"-"}}
    right["seeds"] = [str(len(row.runs)) for row in rows]
    legend = LEGEND
    for i, row in enumerate(rows):
        if row.text("chosen_on") == "holdout" and "fine_tuned" in row.percent:
            right["fine-tuned"][i] = f"{HOLDOUT} {right['fine-tuned'][i]}"
            legend = f"{LEGEND}; with {HOLDOUT}, the one chosen on the holdout"
    # Where the table is too wide, notes below it have the settings, or all of its left part.
    notes, cells = [], left
    for title, fold in (("settings", ["settings"]), ("experiment", [*cells])):
        if cells.keys() >= {*fold} and len(_table(left, right)[0]) > WIDTH:
            texts = [", ".join(parts) for parts in zip(*map(cells.get, fold), strict=True)]
            notes = list(dict.fromkeys(texts))
            left = {name: cells[name] for name in cells if name not in fold}
            left[title] = [f"({notes.index(text) + 1})" for text in texts]
    lines = [textwrap.fill(_plain(f"Same in all rows: {', '.join(common)}."), 100), ""]
    lines += [*_table(left, right), "", f"{legend}."]
    lines += [_plain(f"- ({number}) {note}") for number, note in enumerate(notes, 1)]
    return "\n".join(lines)


def _spread(values: Sequence[float] | None) -> str:
    """Mean ± sample standard deviation."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def _plain(text: str) -> str:
    """Without what Markdown takes for the end of a cell, or for HTML."""
    return text.replace("|", "&#124;").replace("<", "&lt;")


def _table(left: Columns, right: Columns) -> list[str]:
    """Lines of a table, each column aligned to its side."""
    columns = []
    for title, texts in {**left, **right}.items():
        column = [title, *map(_plain, texts)]
        width = max(3, *map(len, column))
        rule = "-" * width if title in left else "-" * (width - 1) + ":"
        column.insert(1, rule)
        columns.append([c.ljust(width) if title in left else c.rjust(width) for c in column])
    return [f"| {' | '.join(line)} |" for line in zip(*columns, strict=True)]


def page(tables: Tables) -> str:
    """docs/results.md: a section per table."""
    source = "Every number comes from the tables in [results/](../results/README.md)."
    parts = ["# Results", f"Made by `make tables`. {source}"]
    for path, trials in tables.items():
        title, remark = heading(path)
        parts += [f"## {title}", remark]
        if trials:
            image = f"![{title}]({path.stem}.svg)"
            parts += [_made_with(path, trials), markdown(trials), image]
        else:
            parts.append(NO_ROWS)
    return "\n\n".join(filter(None, parts)) + "\n"


def heading(path: Path) -> tuple[str, str]:
    """Title and remark of a table, from the .md file beside it; else its name."""
    side = path.with_suffix(".md")
    text = side.read_text(encoding="utf-8") if side.is_file() else path.stem.replace("_", " ")
    title, _, remark = text.partition("\n")
    return title.lstrip("# "), remark.strip()


def _made_with(path: Path, trials: Sequence[Trial]) -> str:
    """A line that tells where the numbers come from."""
    said = [f"{len(trials)} runs: [{path.name}](../results/{path.name})"]
    for name in ("baseline", "threads", "torch", "commit"):
        known = sorted({trial[name] for trial in trials if trial.get(name)}, key=natural)
        said.append(f"{name} {', '.join(known) or 'not recorded'}")
    return _plain("; ".join(said))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m tools.results")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="folders, and CSV tables")
    parser.add_argument("--csv", metavar="FILE", help="add all runs to this table")
    parser.add_argument("--plot", metavar="FILE", help=f"draw them; {', '.join(ENDINGS)}")
    parser.add_argument("--page", metavar="FILE", help="write a page of all tables, and plots")
    args = parser.parse_args(argv)
    if args.page and (args.csv or args.plot):
        parser.error("--page goes with no other flag")
    if args.plot and not args.plot.endswith(ENDINGS):
        parser.error(f"--plot: {args.plot} ends with none of {', '.join(ENDINGS)}")
    return args


def main(args: argparse.Namespace) -> Tables:
    """Print the tables or write the files, and return all runs."""
    if (args.plot or args.page) and not find_spec("matplotlib"):  # before anything is written
        raise InputError("plots need matplotlib: pip install -r requirements-dev.txt")
    paths, results = [], []
    for path in map(Path, args.inputs):
        if path.suffix == ".csv":
            paths.append(path)
        elif not path.is_dir():
            raise InputError(f"{path}: no such folder; name one of results, or a .csv file")
        elif args.page:
            paths += path.glob("*.csv")
        else:
            results += map(read_result, sorted(path.rglob("result.json")))
    tables: Tables = {path: merge([], read_csv(path)) for path in sorted(paths)}
    if args.page:
        for path, trials in tables.items():
            if trials:
                _draw(trials, Path(args.page).with_name(f"{path.stem}.svg"), "--page")
        _write(args.page, "--page", page(tables).encode())
        return tables
    if pruned := merge([], filter(None, results)):
        tables[Path("Folders")] = pruned
    trials = sum(tables.values(), [])
    if not trials:
        unpruned = f", but {len(results)} of unpruned networks" if results else ""
        raise InputError(f"no pruning run in {', '.join(args.inputs)}{unpruned}")
    if args.csv:
        path = Path(args.csv)
        trials = merge(read_csv(path) if path.exists() else [], trials)
        tables = {path: trials}
        _write(path, "--csv", csv_text(trials).encode())
    for path, of in tables.items():
        title = f"## {heading(path)[0]}\n\n" if len(tables) > 1 else ""
        print(title + (markdown(of) if of else NO_ROWS))
    if None in results:
        print(f"Left out: {results.count(None)} result.json of unpruned networks.")
    if args.plot:
        _draw(merge([], trials), Path(args.plot), "--plot")
    return tables


def _draw(trials: Sequence[Trial], path: Path, flag: str) -> None:
    from tools.plots import plot  # needs matplotlib

    _write(path, flag, plot(trials, path.suffix[1:]))


def _write(path: str | Path, flag: str, content: bytes) -> None:
    with writable(path, flag):
        write_bytes(path, content)


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
