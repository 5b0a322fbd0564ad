"""Contenders in turn, round after round, in one process: medians, and ratios with their spread."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import profile, supported_activities

PROFILED = 10  # operators shown


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
        profiles: shares of a run's time by operator, by contender.
    """

    title: str
    images: int
    seconds: dict[str, list[float]]
    facts: dict[str, Any] = field(default_factory=dict)
    profiles: dict[str, dict[str, float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def speed_text(self, name: str, reference: str | None = None) -> str:
        """``speed`` as text: the ratio (lowest, highest)."""
        return "{:.2f} ({:.2f}, {:.2f})".format(*self.speed(name, reference))

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
            "facts": self.facts, "profiles": self.profiles,
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
        for name, shares in self.profiles.items():
            lines += ["", f"{name}, share of the time:"]
            lines += [f"  {share:6.1%}  {operator}" for operator, share in shares.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Stopwatch:
    """Runs contenders in turn.

    Attributes:
        device: where they compute.
        rounds: how often each of them runs on the clock.
        profile: whether to look, in one run more, at what the time is spent on.
    """

    device: torch.device
    rounds: int
    profile: bool = False

    def compare(self, title: str, contenders: Sequence[Contender], images: int) -> Comparison:
        """Run all contenders once off the clock, and then in every round, each beginning with
        another: what shares a machine with others is disturbed; in turn, all are disturbed alike.
        """
        seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for contender in contenders:
            self._time(contender)
        for first in range(self.rounds):
            first %= len(contenders)
            for contender in [*contenders[first:], *contenders[:first]]:
                seconds[contender.name].append(self._time(contender))
        comparison = Comparison(title, images, seconds)
        for contender in contenders if self.profile else ():
            prepared = contender.prepare()
            with quiet_profile(activities=supported_activities()) as watched:
                contender.run(prepared)
                self._wait()
            comparison.profiles[contender.name] = self._shares(watched)
        return comparison

    def _time(self, contender: Contender) -> float:
        prepared = contender.prepare()
        gc.collect()  # what others left behind is not on this one's clock
        self._wait()
        began = time.perf_counter()
        contender.run(prepared)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        """Until a GPU has done what it was asked for."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _shares(self, watched: profile) -> dict[str, float]:
        """Share of the time that each operator itself takes, on a GPU that of its kernels; the
        longest first, without the small.
        """
        operators = [e for e in watched.key_averages() if e.device_type == DeviceType.CPU]
        kind = "cpu" if self.device.type == "cpu" else "device"
        times = {e.key: getattr(e, f"self_{kind}_time_total") for e in operators}
        total = max(sum(times.values()), 1e-9)
        ordered = sorted(times.items(), key=lambda item: -item[1])[:PROFILED]
        return {name: round(time / total, 3) for name, time in ordered}


def quiet_profile(**options: Any) -> profile:
    """torch's profiler, without what it tells the terminal."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return profile(**options)
