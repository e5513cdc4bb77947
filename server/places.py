"""Requests at a time, counted over all servers that share a redis."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from limits.errors import StorageError

if TYPE_CHECKING:  # it is not there without the extra
    from redis.asyncio import Redis

# Places of a server that was killed are free after this long, and so are those that a redis which
# hung had been asked for.
LEASE_SECONDS = 15.0
_RENEWALS = 3
_KEY = "spallm:running:"
# As the package limits writes them, and as the package redis does.
_SCHEMES = {"redis://": "redis://", "rediss://": "rediss://", "redis+unix:": "unix:"}
# Of redis' own clock, so that those of the servers need not agree.
_NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"
# KEYS: of the tenant. ARGV: the place, how many there are, how long it lasts in milliseconds.
_TAKE = f"""{_NOW}
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""
# One that has been given up meanwhile does not come back.
_RENEW = f"""{_NOW}
redis.call('ZADD', KEYS[1], 'XX', now + ARGV[2], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""


class SharedPlaces:
    """Places for a tenant's requests, which servers take from one redis.

    A place is leased: a sorted set of each tenant has those that are taken, by when they end. Their
    server prolongs them while the request runs, so that none is lost for good with a server.

    Args:
        url: of the redis.
        seconds: that a lease lasts.
        timeout: seconds after which the redis is taken not to answer.

    Raises:
        ValueError: no URL of a redis.
        ImportError: the package redis is not installed.
    """

    def __init__(self, url: str, timeout: float, seconds: float = LEASE_SECONDS) -> None:
        from redis import RedisError  # the extra spallm-serve[redis]
        from redis.asyncio import Redis

        self._redis: Redis = Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout
        )
        self._take, self._renew = (
            self._redis.register_script(script) for script in (_TAKE, _RENEW)
        )
        self._failures = (RedisError, OSError)
        self._seconds = seconds
        self._lease = max(1, int(seconds * 1000))
        # The tenants of the places of this server.
        self._taken: dict[str, str] = {}
        self._renewing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def taken(self, tenant: str, limit: int) -> AsyncIterator[bool]:
        """While open, a tenant has one place less.

        Args:
            tenant: whose.
            limit: places that it has.

        Yields:
            Whether there was one.

        Raises:
            StorageError: the redis cannot be asked.
        """
        place, refused = secrets.token_hex(8), False
        try:
            refused = not await self._asked_for(place, tenant, limit)
            if not refused:
                self._taken[place] = tenant
                if self._renewing is None or self._renewing.done():
                    self._renewing = asyncio.create_task(self._renew_all())
            yield not refused
        finally:
            if not refused:  # or it is not known, where nobody waited for the answer
                self._taken.pop(place, None)
                await asyncio.shield(self._give_back(place, tenant))

    async def _asked_for(self, place: str, tenant: str, limit: int) -> bool:
        try:
            return bool(await self._take([_KEY + tenant], [place, limit, self._lease]))
        except self._failures as error:
            raise StorageError(error) from error

    async def _give_back(self, place: str, tenant: str) -> None:
        with contextlib.suppress(*self._failures):  # the lease ends by itself
            await self._redis.zrem(_KEY + tenant, place)

    async def _renew_all(self) -> None:
        """Prolong what this server has taken, until that is nothing."""
        while self._taken:
            await asyncio.sleep(self._seconds / _RENEWALS)
            with contextlib.suppress(*self._failures):  # next time, then
                for place, tenant in list(self._taken.items()):
                    await self._renew([_KEY + tenant], [place, self._lease])


def shared_places(storage: str, timeout: float) -> SharedPlaces | None:
    """Those of a storage as the package limits writes it; None for one that is no single redis."""
    for scheme, url in _SCHEMES.items():
        if storage.startswith(scheme):
            return SharedPlaces(url + storage.removeprefix(scheme), timeout)
    return None
