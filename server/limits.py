"""Quotas in time: requests and tokens a minute, requests at a time."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from limits import RateLimitItemPerMinute
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string

from spallm_serve.adapters_store.records import Quota
from spallm_serve.errors import UserError
from spallm_serve.server.errors import ApiError
from spallm_serve.server.places import SharedPlaces, connections

_ASYNC = "async+"
# A storage that takes longer is one that does not answer.
_STORAGE_SECONDS = 2.0


class TenantLimiter:
    """Lets requests in while their tenant is within its quota.

    Tokens are known when an answer is complete: a tenant that has taken more than its quota waits
    for the next minute. Requests at a time are counted in this process, and where the storage is a
    redis also there (:class:`~spallm_serve.server.places.SharedPlaces`).

    Args:
        storage: of the counts, as the package limits writes it: ``memory://`` for one process,
            ``redis://...`` for replicas that share them.

    Raises:
        UserError: there is no such storage, or its package is not installed.
    """

    def __init__(self, storage: str = "memory://") -> None:
        windows, self._places = _opened(storage.removeprefix(_ASYNC))
        self._windows = FixedWindowRateLimiter(windows)
        self._running: Counter[str] = Counter()

    @asynccontextmanager
    async def admitted(self, tenant: str, quota: Quota) -> AsyncIterator[dict[str, str]]:
        """While open, one more request of a tenant runs.

        Args:
            tenant: whose.
            quota: of the tenant.

        Yields:
            The headers ``x-ratelimit-*`` for the response, as OpenAI names them.

        Raises:
            ApiError: over the quota, 429 with ``Retry-After``; or the counts cannot be had, 503.
        """
        limit = quota.concurrent_requests
        if limit is not None and self._running[tenant] >= limit:
            raise _all_running(limit)
        # Before anything is waited for, or others would see the same place free.
        self._running[tenant] += 1
        try:
            async with AsyncExitStack() as shared:
                yield await self._begin(tenant, quota, shared)
        finally:
            self._running[tenant] -= 1
            if not self._running[tenant]:
                del self._running[tenant]

    async def charge(self, tenant: str, quota: Quota, tokens: int) -> None:
        """Count the tokens of a request that is over; lost where the counts cannot be had."""
        if quota.tokens_per_minute is None or tokens <= 0:
            return
        item = RateLimitItemPerMinute(quota.tokens_per_minute)
        try:
            async with asyncio.timeout(_STORAGE_SECONDS):
                await self._windows.hit(item, tenant, "tokens", cost=tokens)
        except (StorageError, TimeoutError):
            return

    async def _begin(self, tenant: str, quota: Quota, shared: AsyncExitStack) -> dict[str, str]:
        limit = quota.concurrent_requests
        try:
            async with asyncio.timeout(_STORAGE_SECONDS):
                if self._places is not None and limit is not None:
                    place = self._places.taken(tenant, limit)
                    if not await shared.enter_async_context(place):
                        raise _all_running(limit)
                return await self._counted(tenant, quota)
        except (StorageError, TimeoutError) as error:
            raise ApiError(
                503,
                "the counts of requests and tokens cannot be had; try again",
                "rate_storage_unavailable",
                headers={"Retry-After": "1"},
            ) from error

    async def _counted(self, tenant: str, quota: Quota) -> dict[str, str]:
        headers: dict[str, str] = {}
        kinds = (("tokens", quota.tokens_per_minute), ("requests", quota.requests_per_minute))
        for kind, limit in kinds:
            if limit is None:
                continue
            if limit == 0:
                raise _over(f"your quota is no {kind} at all", 60, headers)
            item = RateLimitItemPerMinute(limit)
            ask = self._windows.hit if kind == "requests" else self._windows.test
            let_in = await ask(item, tenant, kind)
            reset, remaining = await self._windows.get_window_stats(item, tenant, kind)
            seconds = max(0, math.ceil(reset - time.time()))
            headers |= {
                f"x-ratelimit-limit-{kind}": str(limit),
                f"x-ratelimit-remaining-{kind}": str(max(0, remaining)),
                f"x-ratelimit-reset-{kind}": f"{seconds}s",
            }
            if not let_in:
                raise _over(f"over your {limit} {kind} a minute", max(1, seconds), headers)
        return headers


def _opened(storage: str) -> tuple[Any, SharedPlaces | None]:
    """Its asynchronous form, as requests of all tenants wait in the loop that asks it; and places
    in it, if it is a redis."""
    options: dict[str, Any] = {"wrap_exceptions": True}
    if storage.startswith("redis"):
        options["implementation"] = "redispy"
    try:
        pool = connections(storage, _STORAGE_SECONDS)
        if pool is not None:
            options["connection_pool"] = pool
        windows = storage_from_string(_ASYNC + storage, **options)
        return windows, None if pool is None else SharedPlaces(pool)
    except (ConfigurationError, ImportError, ValueError) as error:
        raise UserError(
            f"rate_storage: cannot be used ({error}); expected memory://, or redis://HOST:PORT "
            "with pip install 'spallm-serve[redis]'"
        ) from error


def _all_running(limit: int) -> ApiError:
    return _over(f"{limit} requests of yours are running, no more are allowed", 1, {})


def _over(message: str, seconds: int, headers: dict[str, str]) -> ApiError:
    return ApiError(
        429,
        f"{message}; try again in {seconds} s",
        "rate_limit_exceeded",
        headers=headers | {"Retry-After": str(seconds)},
    )
