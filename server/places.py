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
    from redis.asyncio import BlockingConnectionPool, Redis

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
# Also where a redis that was started anew has forgotten it.
_RENEW = f"""{_NOW}
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
# More questions wait for each other; the pool that has no such bound refuses them.
_CONNECTIONS = 50


class SharedPlaces:
    """Places for a tenant's requests, which servers take from one redis.

    A place is leased: a sorted set of each tenant has those that are taken, by when they end. Their
    server prolongs them while the request runs, so that none is lost for good with a server.

    Args:
        pool: of connections to the redis (:func:`connections`).
        seconds: that a lease lasts.
    """

    def __init__(self, pool: BlockingConnectionPool, seconds: float = LEASE_SECONDS) -> None:
        from redis import RedisError
        from redis.asyncio import Redis

        self._redis: Redis = Redis(connection_pool=pool)
        self._take, self._renew = (
            self._redis.register_script(script) for script in (_TAKE, _RENEW)
        )
        self._failures = (RedisError, OSError)
        self._seconds = seconds
        self._lease = max(1, int(seconds * 1000))
        # The tenants of the places of this server.
        self._taken: dict[str, str] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._going_back: set[asyncio.Task[None]] = set()

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
        place = secrets.token_hex(8)
        try:
            is_taken = await self._asked_for(place, tenant, limit)
        except BaseException:  # it may be taken all the same
            self._give_back_soon(place, tenant)
            raise
        if not is_taken:
            yield False
            return
        self._taken[place] = tenant
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew_all())
        try:
            yield True
        finally:
            del self._taken[place]
            await asyncio.shield(self._give_back_soon(place, tenant))

    async def _asked_for(self, place: str, tenant: str, limit: int) -> bool:
        try:
            return bool(await self._take([_KEY + tenant], [place, limit, self._lease]))
        except self._failures as error:
            raise StorageError(error) from error

    def _give_back_soon(self, place: str, tenant: str) -> asyncio.Task[None]:
        task = asyncio.create_task(self._give_back(place, tenant))
        self._going_back.add(task)
        task.add_done_callback(self._going_back.discard)
        return task

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
                    if place not in self._taken:  # given back while it was prolonged
                        await self._give_back(place, tenant)


def connections(storage: str, timeout: float) -> BlockingConnectionPool | None:
    """To the redis of a storage as the package limits writes it.

    Args:
        storage: its URL.
        timeout: seconds after which the redis is taken not to answer.

    Returns:
        None for a storage that is no single redis.

    Raises:
        ValueError: no URL of a redis.
        ImportError: the package redis is not installed.
    """
    for scheme, url in _SCHEMES.items():
        if storage.startswith(scheme):
            from redis.asyncio import BlockingConnectionPool  # the extra spallm-serve[redis]

            return BlockingConnectionPool.from_url(
                url + storage.removeprefix(scheme),
                max_connections=_CONNECTIONS,
                timeout=timeout,
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
            )
    return None
