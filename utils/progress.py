"""How far a loop is: a bar on a terminal, a line a minute in a log."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(
    items: Iterable[T],
    title: str,
    total: int,
    status: Callable[[float], str] = lambda seconds: "",
    done: int = 0,
) -> Iterator[T]:
    """The items. Rank 0 shows how many are done: in a bar if stderr is a terminal, else on stdout.

    Args:
        title: what is done.
        total, done: the number of all items, and how many were done before the first of these.
        status: what else to show, given the seconds since the first item; called only then.
    """
    if os.environ.get("RANK", "0") != "0":
        yield from items
        return
    terminal = sys.stderr.isatty()
    layout = "{desc} |{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}"
    look = {"leave": False, "dynamic_ncols": True, "disable": not terminal, "bar_format": layout}
    with tqdm(items, title, total, initial=done, **look) as bar:
        shown = began = time.perf_counter()
        for number, item in enumerate(bar, start=done + 1):
            yield item
            now = time.perf_counter()
            if now - shown < (0.5 if terminal else 60):  # a status may wait for the device
                continue
            shown, said = now, status(now - began)
            if terminal:
                bar.set_postfix_str(said)
            else:
                left = (total - number) * (now - began) / (number - done)
                parts = f"{title} {number}/{total}", said, f"{timedelta(seconds=round(left))} left"
                with suppress(OSError):  # a closed pipe
                    print(", ".join(filter(None, parts)), flush=True)
