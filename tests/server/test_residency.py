"""Adapters on their way to the workers, and kept there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from spallm_serve.adapters_store.failures import NotFoundError
from spallm_serve.adapters_store.records import Resolved
from spallm_serve.server import residency as residency_module
from spallm_serve.server.errors import ApiError
from spallm_serve.server.residency import Residency

DIGESTS = {name: letter * 64 for name, letter in (("a", "a"), ("b", "b"))}
BASE = Resolved(owner=None, name="base", digest=None, kind=None, engine_name="base")


def adapter(name: str = "a") -> Resolved:
    digest = DIGESTS[name]
    return Resolved(
        owner="acme", name=name, digest=digest, kind="LORA", engine_name=f"acme/{name}@{digest}"
    )


class Workers:
    """Two of them, which say in turn what they were told to; the last for ever."""

    def __init__(self, *states: tuple[str, str]) -> None:
        self.states = list(states) or [("host", "host")]
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.found: list[str] = []
        self.forgotten: list[str] = []

    async def call(self, method: str, arguments: tuple[Any, ...]) -> list[str]:
        self.asked.append((method, arguments))
        await asyncio.sleep(0)
        return list(self.states[min(len(self.asked), len(self.states)) - 1])

    def residency(self, seconds: float = 5) -> Residency:
        return Residency(
            lambda digest: Path(f"/{digest[0]}"),
            self.call,
            seconds,
            self.found.append,
            self.forgotten.append,
        )


def run(function: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await function()

    asyncio.run(main())


def hold(workers: Workers, resolved: Resolved, seconds: float = 5) -> None:
    async def held() -> None:
        residency = workers.residency(seconds)
        async with residency.held(resolved):
            if resolved.digest is not None:
                assert residency.folder(resolved.engine_name) == "/a"
            assert residency.folder("acme/never@asked") is None
        assert residency.folder(resolved.engine_name) is None

    run(held)


@pytest.mark.parametrize(
    ("states", "found"),
    [
        ([("loading", "loading"), ("host", "loading"), ("host", "host")], "store"),
        ([("host", "slot")], "host"),
        ([("slot", "slot")], "slot"),
    ],
)
def test_a_request_waits_until_every_worker_has_its_adapter(
    states: list[tuple[str, str]], found: str
) -> None:
    workers = Workers(*states)
    hold(workers, adapter())
    assert len(workers.asked) == len(states)
    assert workers.found == [found]


def test_the_base_is_always_there() -> None:
    workers = Workers()
    hold(workers, BASE)
    assert workers.asked == []


def test_workers_are_asked_once_by_many_and_not_again_while_they_keep_it() -> None:
    workers = Workers(("loading", "loading"), ("host", "host"))

    async def many() -> None:
        residency = workers.residency()

        async def one() -> None:
            async with residency.held(adapter()):
                await asyncio.sleep(0.01)

        await asyncio.gather(*[one() for _ in range(5)])
        await one()

    run(many)
    assert workers.asked == [("spallm_keep", ("/a", []))] * 2
    assert sorted(workers.found) == ["kept"] + ["store"] * 5


def test_what_nobody_needs_is_let_go_with_the_next_question() -> None:
    workers = Workers()

    async def in_turn() -> None:
        residency = workers.residency()
        async with residency.held(adapter("a")):
            async with residency.held(adapter("b")):
                pass
            assert workers.asked == [("spallm_keep", ("/a", [])), ("spallm_keep", ("/b", []))]
        async with residency.held(adapter("a")), residency.held(adapter("b")):
            assert len(workers.asked) == 2  # nothing was let go in between

    run(in_turn)
    workers.asked.clear()

    async def others() -> None:
        residency = workers.residency()
        async with residency.held(adapter("a")):
            pass
        async with residency.held(adapter("b")):
            assert workers.asked[-1] == ("spallm_keep", ("/b", ["/a"]))
        async with residency.held(adapter("a")):
            assert workers.asked[-1] == ("spallm_keep", ("/a", ["/b"]))

    run(others)


def test_the_engine_forgets_the_names_that_were_not_used_for_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(residency_module, "MOST_NAMES", 2)
    workers = Workers()
    a, b = adapter("a"), adapter("b")
    c, d = (a.model_copy(update={"engine_name": f"acme/{name}@{a.digest}"}) for name in "cd")

    async def in_turn() -> None:
        residency = workers.residency()
        async with residency.held(a):
            for other in (b, a, b):
                async with residency.held(other):
                    pass
            assert workers.forgotten == []
            async with residency.held(c):
                pass
            assert workers.forgotten == [b.engine_name]  # the oldest is in use
            async with residency.held(d):
                pass
        assert workers.forgotten == [b.engine_name, c.engine_name]

    run(in_turn)


def test_a_name_that_was_never_let_through_is_not_to_be_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(residency_module, "MOST_NAMES", 0)
    workers = Workers(("no such layer", "host"))

    async def refused() -> None:
        with pytest.raises(ApiError, match="no such layer"):
            async with workers.residency().held(adapter()):
                pass

    run(refused)
    assert workers.forgotten == []


def test_who_goes_away_leaves_the_loading_to_others() -> None:
    workers = Workers(("loading", "loading"), ("loading", "loading"), ("host", "host"))

    async def two() -> None:
        residency = workers.residency()

        async def one() -> None:
            async with residency.held(adapter()):
                pass

        first = asyncio.create_task(one())
        second = asyncio.create_task(one())
        await asyncio.sleep(0.001)
        first.cancel()
        await second

    run(two)
    assert workers.found == ["store"]


def test_what_no_worker_can_use_is_said_and_let_go() -> None:
    workers = Workers(("host", "damaged"))
    with pytest.raises(ApiError, match="damaged") as refused:
        hold(workers, adapter())
    assert refused.value.status == 400


def test_what_takes_too_long_is_to_be_tried_again() -> None:
    with pytest.raises(ApiError) as refused:
        hold(Workers(("loading", "loading")), adapter(), seconds=0.05)
    assert refused.value.status == 503
    assert refused.value.headers["Retry-After"]


def test_what_was_deleted_meanwhile_does_not_exist() -> None:
    def gone(digest: str) -> Path:
        raise NotFoundError("gone")

    async def held() -> None:
        async with Residency(gone, Workers().call, 1, [].append, [].append).held(adapter()):
            pass

    with pytest.raises(ApiError) as refused:
        run(held)
    assert refused.value.status == 404


def test_pinning_says_why_it_cannot_be() -> None:
    workers = Workers(("host", "host"), ("", "as many"), ("", ""))

    async def pin() -> None:
        await workers.residency().pin(adapter())

    with pytest.raises(ApiError, match="as many") as refused:
        run(pin)
    assert refused.value.status == 409
    assert [method for method, _ in workers.asked] == ["spallm_keep", "spallm_pin"]
    with pytest.raises(ApiError, match="always there"):
        run(lambda: workers.residency().unpin(BASE))


def test_a_version_that_two_tenants_have_is_kept_for_both() -> None:
    workers = Workers()
    other = adapter().model_copy(update={"owner": "zoo", "engine_name": f"zoo/x@{DIGESTS['a']}"})

    async def both() -> None:
        residency = workers.residency()
        async with residency.held(adapter()):
            async with residency.held(other):
                assert residency.folder(other.engine_name) == "/a"
            assert residency.folder(other.engine_name) is None
            assert residency.folder(adapter().engine_name) == "/a"

    run(both)
    assert len(workers.asked) == 1
