"""Contenders in turn, round after round, in one process: medians, and ratios with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        name: for the table.
        run: what is timed; takes what ``prepare`` returned.
        prepare: what has to be done before every run, off the clock.
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass
class Comparison:
    """The seconds of every contender in every round.

    Attributes:
        title: what was compared.
        images: that one run goes through.
        seconds: round by round, by contender; the first is the reference of all ratios.
        facts: counted or computed beside, to be shown and kept.
    """

    title: str
    images: int
    seconds: dict[str, list[float]]
    facts: dict[str, Any] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def speed(self, name: str, reference: str | None = None) -> tuple[float, float, float]:
        """How many times as fast as the reference: the ratio of the medians, and the lowest and
        the highest ratio of a round.
        """
        reference = reference or next(iter(self.seconds))
        rounds = [a / b for a, b in zip(self.seconds[reference], self.seconds[name], strict=True)]
        return self.median(reference) / self.median(name), min(rounds), max(rounds)

    def as_dict(self) -> dict[str, Any]:
        contenders = []
        for name, seconds in self.seconds.items():
            ratio, lowest, highest = self.speed(name)
            contenders.append({
                "name": name, "seconds": seconds, "median": self.median(name),
                "images_per_second": self.images / self.median(name),
                "speed": ratio, "speed_lowest": lowest, "speed_highest": highest,
            })  # fmt: skip
        return {
            "title": self.title, "images": self.images, "contenders": contenders,
            "facts": self.facts,
        }  # fmt: skip

    def __str__(self) -> str:
        width = max(map(len, [self.title, *self.seconds]))
        lines = [f"{self.title:{width}}   seconds   images/s   speed  (lowest, highest round)"]
        for name in self.seconds:
            ratio, lowest, highest = self.speed(name)
            seconds = self.median(name)
            lines.append(
                f"{name:{width}}  {seconds:8.4f}  {self.images / seconds:9.0f}  {ratio:6.2f}"
                f"  ({lowest:.2f}, {highest:.2f})"
            )
        lines += [f"{name}: {value}" for name, value in self.facts.items()]
        return "\n".join(lines)


def compare(
    title: str, contenders: Sequence[Contender], images: int, rounds: int, device: torch.device
) -> Comparison:
    """Run all contenders once off the clock, and then in every round, each beginning with another.

    What shares a machine with others is disturbed; in turn, all are disturbed alike.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        _time(contender, device)
    for first in range(rounds):
        first %= len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            seconds[contender.name].append(_time(contender, device))
    return Comparison(title, images, seconds)


def _time(contender: Contender, device: torch.device) -> float:
    prepared = contender.prepare()
    _wait(device)
    began = time.perf_counter()
    contender.run(prepared)
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
