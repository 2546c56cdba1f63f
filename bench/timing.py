"""Timing on a machine that does other things too."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["best", "best_of_each", "seconds"]


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def best(run: Callable[[], object], before: Callable[[], object] = lambda: None, rounds: int = 9) -> float:
    """Least time of `run` in seconds, `before` not counted."""
    least = float("inf")
    for _ in range(rounds):
        before()
        least = min(least, seconds(run))
    return least


def best_of_each(runs: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Least time of each, taken in turns so that a slow spell of the machine hits all alike."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            least[name] = min(least[name], seconds(run))
    return least
