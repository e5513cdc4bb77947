"""Times of functions that run side by side in one process, and what memory they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median, low, high: the median, and the 10th and 90th percentile.
        runs: how many calls were timed.
    """

    median: float
    low: float
    high: float
    runs: int


def interleaved(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Time functions in turn, so that what else the machine does hits all of them alike.

    Args:
        functions: by name; each is called once before.
        seconds: for all of them together, about; at least five rounds are run.
    """
    for function in functions.values():
        function()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(next(iter(taken.values()))) < 5:
        for name, function in functions.items():
            before = time.perf_counter()
            function()
            taken[name].append(time.perf_counter() - before)
    return {name: _timing(times) for name, times in taken.items()}


def allocated_bytes(function: Callable[[], object]) -> int:
    """The most that one call holds of torch's memory at a time, its result included."""
    from torch.profiler import ProfilerActivity, profile

    function()  # what is made once and kept is not counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
        del result
    held = most = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def _timing(times: list[float]) -> Timing:
    tenths = statistics.quantiles(times, n=10)
    return Timing(statistics.median(times), tenths[0], tenths[-1], len(times))
