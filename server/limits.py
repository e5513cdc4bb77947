"""Quotas in time: requests and tokens a minute, requests at a time."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from limits import RateLimitItemPerMinute
from limits.storage import storage_from_string
from limits.strategies import FixedWindowRateLimiter

from spallm_serve.adapters_store.records import Quota
from spallm_serve.server.errors import ApiError


class TenantLimiter:
    """Lets requests in while their tenant is within its quota.

    Tokens are known when an answer is complete: a tenant that has taken more than its quota waits
    for the next minute.

    Args:
        storage: of the counts, as the package limits writes it: ``memory://`` for one process,
            ``redis://...`` for replicas that share them.
    """

    def __init__(self, storage: str = "memory://") -> None:
        self._windows = FixedWindowRateLimiter(storage_from_string(storage))
        self._running: Counter[str] = Counter()

    @contextmanager
    def admitted(self, tenant: str, quota: Quota) -> Iterator[dict[str, str]]:
        """While open, one more request of a tenant runs.

        Args:
            tenant: whose.
            quota: of the tenant.

        Yields:
            The headers ``x-ratelimit-*`` for the response, as OpenAI names them.

        Raises:
            ApiError: over the quota; 429 with ``Retry-After``.
        """
        limit = quota.concurrent_requests
        if limit is not None and self._running[tenant] >= limit:
            raise _over(f"{limit} requests of yours are running, no more are allowed", 1, {})
        headers = self._begin(tenant, quota)
        self._running[tenant] += 1
        try:
            yield headers
        finally:
            self._running[tenant] -= 1
            if not self._running[tenant]:
                del self._running[tenant]

    def charge(self, tenant: str, quota: Quota, tokens: int) -> None:
        """Count the tokens of a request that is over."""
        if quota.tokens_per_minute is not None and tokens > 0:
            item = RateLimitItemPerMinute(quota.tokens_per_minute)
            self._windows.hit(item, tenant, "tokens", cost=tokens)

    def _begin(self, tenant: str, quota: Quota) -> dict[str, str]:
        headers: dict[str, str] = {}
        kinds = (("tokens", quota.tokens_per_minute), ("requests", quota.requests_per_minute))
        for kind, limit in kinds:
            if limit is None:
                continue
            if limit == 0:
                raise _over(f"your quota is no {kind} at all", 60, headers)
            item = RateLimitItemPerMinute(limit)
            let_in = (
                self._windows.hit(item, tenant, kind)
                if kind == "requests"
                else self._windows.test(item, tenant, kind)
            )
            reset, remaining = self._windows.get_window_stats(item, tenant, kind)
            seconds = max(0, math.ceil(reset - time.time()))
            headers |= {
                f"x-ratelimit-limit-{kind}": str(limit),
                f"x-ratelimit-remaining-{kind}": str(max(0, remaining)),
                f"x-ratelimit-reset-{kind}": f"{seconds}s",
            }
            if not let_in:
                raise _over(f"over your {limit} {kind} a minute", max(1, seconds), headers)
        return headers


def _over(message: str, seconds: int, headers: dict[str, str]) -> ApiError:
    return ApiError(
        429,
        f"{message}; try again in {seconds} s",
        "rate_limit_exceeded",
        headers=headers | {"Retry-After": str(seconds)},
    )
