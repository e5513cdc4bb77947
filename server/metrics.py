"""Prometheus metrics of tenants, with a bound on how many there can be."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from spallm_serve.server.metering import Usage

OTHER = "other"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


@dataclass
class TenantLabels:
    """Names for the label ``tenant``: those of the first tenants, and one for all others.

    A tenant that has a label keeps it, so that no counter ever falls.

    Attributes:
        limit: tenants with a label of their own.
    """

    limit: int
    _labelled: set[str] = field(default_factory=set)

    def of(self, tenant: str) -> str:
        """The label of a tenant."""
        if tenant not in self._labelled:
            if len(self._labelled) >= self.limit:
                return OTHER
            self._labelled.add(tenant)
        return tenant


class TenantMetrics:
    """What the gate sees of each tenant's requests.

    Args:
        labels: how many tenants are told apart.
        registry: what ``/metrics`` shows; the engine's own metrics are in the default one.
    """

    def __init__(self, labels: TenantLabels, registry: CollectorRegistry = REGISTRY) -> None:
        self._labels = labels
        tenant = ("tenant",)
        self._requests = Counter(
            "spallm_requests", "Requests by status.", ("tenant", "status"), registry=registry
        )
        self._tokens = Counter(
            "spallm_tokens", "Tokens of prompts and answers.", ("tenant", "kind"), registry=registry
        )
        self._running = Gauge("spallm_running_requests", "Now.", tenant, registry=registry)
        self._first = Histogram(
            "spallm_time_to_first_token_seconds",
            "From a request's arrival to the first bytes of its answer.",
            tenant,
            buckets=_SECONDS,
            registry=registry,
        )
        self._between = Histogram(
            "spallm_inter_token_seconds",
            "Between the events of a streamed answer.",
            tenant,
            buckets=_SECONDS,
            registry=registry,
        )

    def watch(self, tenant: str) -> RequestWatch:
        """Begin to watch a request."""
        label = self._labels.of(tenant)
        self._running.labels(label).inc()
        return RequestWatch(self, label)

    def first_bytes(self, label: str, seconds: float) -> None:
        """An answer began."""
        self._first.labels(label).observe(seconds)

    def next_event(self, label: str, seconds: float) -> None:
        """A streamed answer went on."""
        self._between.labels(label).observe(seconds)

    def finished(self, label: str, status: int, usage: Usage) -> None:
        """A request is over."""
        self._running.labels(label).dec()
        self._requests.labels(label, str(status)).inc()
        self._tokens.labels(label, "prompt").inc(usage.prompt)
        self._tokens.labels(label, "completion").inc(usage.completion)


class RequestWatch:
    """The clock of one request.

    Args:
        metrics: where it goes.
        label: of the tenant.
    """

    def __init__(self, metrics: TenantMetrics, label: str) -> None:
        self._metrics, self._label = metrics, label
        self._last = time.perf_counter()
        self._began = False

    def on_bytes(self, streamed: bool) -> None:
        """Some of the answer's body is here."""
        now = time.perf_counter()
        if not self._began:
            self._began = True
            self._metrics.first_bytes(self._label, now - self._last)
        elif streamed:
            self._metrics.next_event(self._label, now - self._last)
        else:
            return
        self._last = now

    def finish(self, status: int, usage: Usage) -> None:
        """The request is over; 499 where the client went away before an answer."""
        self._metrics.finished(self._label, status, usage)
