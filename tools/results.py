"""Tables of pruning runs: gathered from result.json files into CSV, printed, and drawn.

    python -m tools.results checkpoints                              a row per experiment
    python -m tools.results checkpoints --csv results/criteria.csv   keep a row per run
    python -m tools.results results/criteria.csv --plot criteria.svg
    make tables                                                      docs/results.md

Inputs are CSV tables, and folders with result.json files anywhere below. --csv adds rows to a
table; a row of the same configuration, seeds and baseline is replaced. Runs that differ only in
their seeds are printed as mean ± sample standard deviation. --page writes a section per table; the
first line of NAME.md is the title of NAME.csv, the rest is a remark.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from tools.trials import Trial, csv_text, make_rows, merge, natural, read_csv, read_result, words
from utils.cli.parser import Parser, run_script
from utils.errors import InputError
from utils.files import write_atomically

ENDINGS = (".png", ".pdf", ".svg")
TEXTS = {"network": "net", "data": "dataset", "criterion": "criterion", "method": "method"}
NUMBERS = {"MACs kept": "macs", "params kept": "params", "baseline": "baseline",
           "after surgery": "after_surgery", "recalibrated": "recalibrated",
           "fine-tuned": "fine_tuned"}  # fmt: skip
NO_ROWS = "No rows are there yet."
NOTE = """Shares kept, and top-1 accuracies on the test set, in %; mean ± sample standard deviation
over the seeds. Fine-tuned: the last epoch, or with a holdout the epoch that it chose."""
Tables = dict[Path, list[Trial]]  # by file, or a heading


def markdown(trials: Sequence[Trial]) -> str:
    """A table with a row per experiment; what all rows share stands above it."""
    rows, same = make_rows(trials)
    every = {title: [row.text(column) for row in rows] for title, column in TEXTS.items()}
    every |= {"asked": [r.asked for r in rows], "settings": [r.also or "-" for r in rows]}
    alike = {title: texts[0] for title, texts in every.items() if len({*texts}) == 1}
    common = [f"{title} {text}" for title, text in alike.items() if text not in ("", "-")]
    common += [words(*setting) for setting in same.items()]
    columns = {title: texts for title, texts in every.items() if title not in alike}
    numbers = {title: [str(r.percent.get(of, "-")) for r in rows] for title, of in NUMBERS.items()}
    columns |= {title: texts for title, texts in numbers.items() if {*texts} != {"-"}}
    columns["seeds"] = [str(len(row.runs)) for row in rows]
    above = textwrap.fill(_plain(f"Same in all rows: {', '.join(common)}."), 100)
    return "\n".join([above, "", *_table(columns), "", NOTE])


def _plain(text: str) -> str:
    """Escape what Markdown takes for the end of a cell, or for HTML."""
    return text.replace("|", "&#124;").replace("<", "&lt;")


def _table(columns: dict[str, list[str]]) -> Iterator[str]:
    """Lines of a table; text is aligned to the left, numbers to the right."""
    padded = []
    for title, texts in columns.items():
        left, column = title in (*TEXTS, "asked", "settings"), [title, "", *map(_plain, texts)]
        width = max(3, *map(len, column))
        column[1] = "-" * width if left else "-" * (width - 1) + ":"
        padded.append([f"{c:<{width}}" if left else f"{c:>{width}}" for c in column])
    for line in zip(*padded, strict=True):
        yield f"| {' | '.join(line)} |"


def page(tables: Tables) -> str:
    """docs/results.md: a section per table."""
    source = "Every number comes from the tables in [results/](../results/README.md)."
    parts = ["# Results", f"Made by `make tables`. {source}"]
    for path, trials in tables.items():
        title, remark = heading(path)
        runs = f"- {len(trials)} runs: [{path.name}](../results/{path.name})"
        plot = f"![{title}]({path.stem}.svg)"
        parts += filter(None, [f"## {title}", remark])
        parts += [facts(trials) + runs, markdown(trials), plot] if trials else [NO_ROWS]
    return "\n\n".join(parts if tables else [*parts, NO_ROWS]) + "\n"


def heading(path: Path) -> tuple[str, str]:
    """Title and remark of a table, from the .md file beside it; else its name."""
    side = path.with_suffix(".md")
    text = side.read_text(encoding="utf-8") if side.is_file() else path.stem.replace("_", " ")
    title, _, remark = text.partition("\n")
    return title.lstrip("# "), remark.strip()


def facts(trials: Sequence[Trial]) -> str:
    """Where the numbers come from, as a list."""

    def values(name: str, none: str = "not recorded") -> str:
        return _plain(", ".join(sorted({t.get(name) or none for t in trials}, key=natural)))

    return (
        f"- Data: {values('dataset')}; classes {values('classes')}; images of"
        f" {values('image_size')} pixels; fingerprint {values('data')}\n"
        f"- Baseline: trained for {values('baseline_epochs', '?')} epochs; weights"
        f" {values('baseline')}\n"
        f"- Fine-tuned for {values('epochs', '0')} epochs; precision {values('amp', 'float32')}\n"
        f"- Threads: {values('threads')}; torch {values('torch')}; commit {values('commit')}\n"
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m tools.results")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="folders, and CSV tables")
    parser.add_argument("--csv", metavar="FILE", help="add all runs to this table")
    parser.add_argument("--plot", metavar="FILE", help=f"draw them; {', '.join(ENDINGS)}")
    parser.add_argument("--page", metavar="FILE", help="write a page and plots of all tables")
    args = parser.parse_args(argv)
    if args.page and (args.csv or args.plot):
        parser.error("--page goes with no other flag")
    if args.plot and not args.plot.endswith(ENDINGS):
        parser.error(f"--plot: {args.plot} ends with none of {', '.join(ENDINGS)}")
    return args


def main(args: argparse.Namespace) -> Tables:
    """Print the tables or write the files, and return all runs."""
    if args.plot or args.page:
        if not find_spec("matplotlib"):
            raise InputError("plots need matplotlib: pip install -r requirements-dev.txt")
        from tools import plots
    paths = [Path(name) for name in args.inputs if name.endswith(".csv")]
    folders = [Path(name) for name in args.inputs if not name.endswith(".csv")]
    results = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; name one of results, or a .csv file")
        if args.page:
            paths += folder.glob("*.csv")
        else:
            results += map(read_result, sorted(folder.rglob("result.json")))
    tables: Tables = {path: merge([], read_csv(path)) for path in sorted(paths)}
    if args.page:
        for path in filter(tables.get, tables):
            target = Path(args.page).with_name(f"{path.stem}.svg")
            _write(target, "--page", plots.plot(tables[path], "svg"))
        _write(Path(args.page), "--page", page(tables).encode())
        return tables
    if results:
        tables[Path("Folders")] = merge([], filter(None, results))
    trials = sum(tables.values(), [])
    if not trials:
        raise InputError(f"no pruning run in {', '.join(args.inputs)}")
    if args.csv:
        path = Path(args.csv)
        trials = merge(read_csv(path) if path.exists() else [], trials)
        tables = {path: trials}
        _write(path, "--csv", csv_text(trials).encode())
    for path, of in tables.items():
        print(f"## {heading(path)[0]}\n\n" * (len(tables) > 1), end="")
        print(markdown(of) if of else NO_ROWS)
    if None in results:
        print(f"Left out: {results.count(None)} result.json of unpruned networks.")
    if args.plot:
        kind = Path(args.plot).suffix[1:]
        _write(Path(args.plot), "--plot", plots.plot(merge([], trials), kind))
    return tables


def _write(path: Path, flag: str, content: bytes) -> None:
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written ({error})") from error


if __name__ == "__main__":
    sys.exit(run_script(parse_args, main))
