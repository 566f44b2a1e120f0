"""How a figure is measured: processor time, baseline and subject in turns, first quartile of each.

On a machine that others use too, absolute times swing by a factor of two within minutes, and wall time by more. What
holds still is the ratio of two things done in turns, each judged by its better rounds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Batch = Callable[[int], object]


class Unavailable(Exception):
    """This machine cannot measure the figure; the message says why."""


@dataclass(frozen=True)
class Measured:
    """`ours` and `baseline` in `unit`, and the figure itself, a ratio or a size."""

    figure: float
    ours: float
    baseline: float
    unit: str


@dataclass(frozen=True)
class Figure:
    """One promise: `title`, the `goal` that the figure must keep to (at most, or at least), and how it is measured."""

    key: str
    title: str
    goal: float | None  # None: shown, not judged
    measure: Callable[[], Measured]
    at_least: bool = False
    unit: str = "x"

    def kept(self, measured: Measured) -> bool:
        """Whether the figure is within its goal."""
        if self.goal is None:
            return True
        return measured.figure >= self.goal if self.at_least else measured.figure <= self.goal


def quartile(times: Sequence[float]) -> float:
    """The first quartile."""
    return statistics.quantiles(times, n=4, method="inclusive")[0]


def in_turns(
    ours: Batch, ours_count: int, baseline: Batch, baseline_count: int, rounds: int = 15
) -> tuple[float, float]:
    """Seconds of processor time for one of each, system time included. Both are called with a count: how many to do."""
    sides: tuple[tuple[Batch, int, list[float]], ...] = ((ours, ours_count, []), (baseline, baseline_count, []))
    for batch, count, _ in sides:
        batch(max(1, count // 10))  # warm up
    for _ in range(rounds):
        for batch, count, times in sides:
            start = time.process_time()
            batch(count)
            times.append((time.process_time() - start) / count)
    return quartile(sides[0][2]), quartile(sides[1][2])


def child_seconds(command: Sequence[str]) -> float:
    """Processor time of a command, from its start to its end, its children included."""
    pid = os.posix_spawn(command[0], list(command), os.environ, file_actions=[
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
    ])  # fmt: skip
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise Unavailable(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime
