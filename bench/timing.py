"""Timing on a machine that does other things too: processor time of this thread, best of several.

Nothing that is measured waits: the swap file is in the page cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

__all__ = ["best", "in_turns", "seconds"]


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one call."""
    began = time.thread_time()
    run()
    return time.thread_time() - began


def best(run: Callable[[], object], before: Callable[[], object] = lambda: None, rounds: int = 9) -> float:
    """Least time of `run` in seconds, `before` not counted."""
    least = float("inf")
    for _ in range(rounds):
        before()
        least = min(least, seconds(run))
    return least


def in_turns(runs: Mapping[str, Callable[[], object]], rounds: int = 10) -> dict[str, list[float]]:
    """Times of each, taken in turns: for ratios of neighbours, as slow spells hit alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times
