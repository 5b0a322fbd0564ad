"""Reading result.json files: each of a pruning run becomes a ``Trial``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import InputError

# Of a configuration: what the table has columns for, and what differs between seeds.
COLUMNS = {"net", "dataset", "criterion", "smooth", "steps", "from_scratch", "p", "macs", "params"}
SEEDS = {"seed", "score_seed", "baseline"}


class Asked(NamedTuple):
    """How much was to go (``p``), or the share of ``MACs`` or ``params`` that was to stay."""

    kind: str
    value: float

    def __str__(self) -> str:
        return f"p {self.value:g}" if self.kind == "p" else f"{self.kind} {100 * self.value:g} %"


@dataclass(frozen=True)
class Measured:
    """What came out of one run, all in percent: sizes kept, top-1 accuracies, channels kept."""

    macs: float
    params: float
    accuracy: dict[str, float | None]
    channels: dict[str, float]


@dataclass(frozen=True)
class Trial:
    """One run of a pruning script.

    Attributes:
        seeds: of the run, of its scoring batch, and the same two of its baseline.
        settings: the rest of its configuration, and of its baseline's as ``baseline <name>``; where
            a baseline does not tell its configuration, the digest of its weights as ``baseline``.
        chosen_on: "holdout" where that chose the epoch that counts as fine-tuned; "" for the last.
    """

    path: Path
    net: str
    dataset: str
    criterion: str
    method: str
    asked: Asked
    seeds: tuple[Any, ...]
    settings: dict[str, Any]
    chosen_on: str
    measured: Measured

    @property
    def experiment(self) -> tuple[Any, ...]:
        """Equal for runs that differ in their seeds only."""
        on = frozenset((name, comparable(value)) for name, value in self.settings.items() if value)
        what = self.net, self.dataset, self.criterion, self.method, self.asked
        return *what, on, tuple(self.measured.channels)  # whose names are the network's


def find_files(folders: Iterable[str | Path]) -> list[Path]:
    """Every result.json below the folders, once each, in order of their names."""
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            what = "not a folder" if folder.exists() else "no such folder"
            raise InputError(f"{folder}: {what}; name one that results are below")
        for path in sorted(folder.rglob("result.json")):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def read_trial(path: Path) -> Trial | None:
    """What a result.json says; None for one of train.py, which prunes nothing.

    Raises InputError, with the file's name, for what no script of this project writes.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    try:
        if {"cost", "history"} <= result.keys() and "ratio" not in result:
            return None
        return _trial(path, result)
    except KeyError as error:
        raise InputError(
            f"{path}: no result of a pruning script of this version: it lacks {error}"
        ) from error
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{path}: no result of a pruning script ({error})") from error


def _trial(path: Path, result: Mapping[str, Any]) -> Trial:
    config, baseline = result["config"], result["baseline"]["config"]
    chosen_on = "holdout" if "holdout" in result else ""
    settings = {name: config[name] for name in config if name not in COLUMNS | SEEDS}
    if baseline is None:
        settings["baseline"] = config["baseline"]
    else:
        settings |= {f"baseline {name}": baseline[name] for name in baseline if name not in SEEDS}
    asked = {"p": result["ratio"]["asked"], "MACs": result["budget"]["macs"],
             "params": result["budget"]["params"]}  # fmt: skip
    kinds = [kind for kind, value in asked.items() if value is not None]
    if len(kinds) != 1:
        raise ValueError("it does not say how much was asked for")
    accuracy = result["accuracy"]
    tuned = accuracy["best" if chosen_on else "last"]
    return Trial(
        path, *(_text(result[name]) for name in ("net", "dataset", "criterion", "method")),
        asked=Asked(kinds[0], _number(asked[kinds[0]])),
        seeds=tuple(of.get(name) for of in (config, baseline or {})
                    for name in ("seed", "score_seed")),
        settings=settings,
        chosen_on=chosen_on,
        measured=Measured(
            *(_percent(result["cost"][name]) for name in ("macs", "params")),
            accuracy={
                "baseline": _number(accuracy["baseline"]),
                "after_surgery": _number(accuracy["after_surgery"]),
                "recalibrated": _number(accuracy.get("recalibrated"), optional=True),
                "fine_tuned": _number(tuned, optional=True),
            },
            channels={name: _percent(widths) for name, widths in result["channels"].items()},
        ),
    )  # fmt: skip


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where a word should be")
    return value


def _number(value: Any, optional: bool = False) -> Any:
    if optional and value is None:
        return None
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    raise TypeError(f"{value!r} where a number should be")


def _percent(cost: Mapping[str, Any]) -> float:
    return 100 * _number(cost["after"]) / _number(cost["before"])


def comparable(value: Any) -> str:
    """Equal for equal settings; one that is off is one that an earlier version did not have."""
    return json.dumps(value or None, sort_keys=True)
