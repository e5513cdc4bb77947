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


def interleaved_on_gpu(
    functions: dict[str, Callable[[], object]], seconds: float, calls: int = 20
) -> dict[str, Timing]:
    """As :func:`interleaved`, by the GPU's own clock: each function is captured in a CUDA graph of
    so many calls, as an engine replays a model, and the graphs are replayed in turn.

    Args:
        functions: by name; each is called ``calls`` times to be captured, and a few before.
        seconds: for all of them together, about; at least five rounds are run.
        calls: in one graph; what is timed is divided by it.
    """
    import torch

    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    side = torch.cuda.Stream()
    for name, function in functions.items():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(calls):
                function()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(next(iter(taken.values()))) < 5:
        marks = {}
        for name, graph in graphs.items():
            marks[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[name][0].record()
            graph.replay()
            marks[name][1].record()
        torch.cuda.synchronize()
        for name, (first, last) in marks.items():
            taken[name].append(first.elapsed_time(last) / 1e3 / calls)
    return {name: _timing(times) for name, times in taken.items()}


def allocated_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """The most that one call holds of torch's memory at a time, its result included."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    function()  # what is made once and kept is not counted
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
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
