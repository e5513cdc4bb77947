"""Prometheus metrics of where adapters are and how they move between store, memory and slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_BYTES = ("spallm_adapter_bytes", "Of adapters in memory, and of the tables of all used slots.")
_COUNT = ("spallm_adapters", "In memory, in slots, and pinned to their slots.")
_MOVED = ("spallm_adapter_moves", "Adapters read into memory, and brought into slots.")
_SECONDS = ("spallm_adapter_move_seconds", "Threads read for, and steps waited for slots.")
_LATE = ("spallm_late_loads", "Adapters that a step had to read itself; expected to be 0.")


class TierMetrics(Collector):
    """The workers' counts as they were last asked for, and where requests found their adapters.

    Args:
        registry: what ``/metrics`` shows.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._facts: Sequence[dict[str, Any]] = ()
        self._found = Counter(
            "spallm_adapter_requests",
            "Requests by where their adapter was: kept for others, in a slot, in memory, or only "
            "in the store.",
            ("found",),
            registry=registry,
        )
        registry.register(self)

    def found(self, where: str) -> None:
        """A request's adapter was there."""
        self._found.labels(where).inc()

    def update(self, facts: Sequence[dict[str, Any]]) -> None:
        """What the workers say of themselves, see ``ResidentAdapters.facts``."""
        self._facts = facts

    def describe(self) -> list[Metric]:
        """Nothing in advance: the workers are not there yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """See the base class."""
        nbytes = GaugeMetricFamily(*_BYTES, labels=("worker", "tier"))
        count = GaugeMetricFamily(*_COUNT, labels=("worker", "tier"))
        moved = CounterMetricFamily(*_MOVED, labels=("worker", "into"))
        seconds = CounterMetricFamily(*_SECONDS, labels=("worker", "into"))
        late = CounterMetricFamily(*_LATE, labels=("worker",))
        for number, facts in enumerate(self._facts):
            worker, loads, moves = str(number), facts["loads"], facts["moves"]
            used = len(facts["slots"])
            nbytes.add_metric((worker, "host"), facts["host_bytes"])
            nbytes.add_metric((worker, "slot"), used * facts["slot_bytes"])
            count.add_metric((worker, "host"), len(facts["host"]))
            count.add_metric((worker, "slot"), used)
            count.add_metric((worker, "pinned"), len(facts["pinned"]))
            moved.add_metric((worker, "host"), loads["count"])
            moved.add_metric((worker, "slot"), moves["swaps"])
            seconds.add_metric((worker, "host"), loads["seconds"])
            seconds.add_metric((worker, "slot"), moves["swap_seconds"])
            late.add_metric((worker,), moves["late_loads"])
        yield from (nbytes, count, moved, seconds, late)
