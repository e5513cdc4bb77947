"""Adapters on their way to the workers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from spallm_serve.adapters_store.failures import NotFoundError
from spallm_serve.adapters_store.records import Resolved
from spallm_serve.server.errors import ApiError
from spallm_serve.server.residency import Residency

DIGEST = "ab" * 32
ADAPTER = Resolved(
    owner="acme", name="a", digest=DIGEST, kind="LORA", engine_name=f"acme/a@{DIGEST}"
)
BASE = Resolved(owner=None, name="base", digest=None, kind=None, engine_name="base")


class Workers:
    """Two of them, which say in turn what they were told to."""

    def __init__(self, *states: tuple[str, str]) -> None:
        self.states, self.asked = list(states), 0

    async def call(self, method: str, arguments: tuple[Any, ...]) -> list[str]:
        assert (method, arguments) == ("spallm_prefetch", ("/folder",))
        self.asked += 1
        return list(self.states[min(self.asked, len(self.states)) - 1])


def ensure(workers: Workers, resolved: Resolved = ADAPTER, seconds: float = 5) -> Residency:
    residency = Residency(lambda digest: Path("/folder"), workers.call, seconds)
    asyncio.run(residency.ensure(resolved))
    return residency


def test_a_request_waits_until_every_worker_has_its_adapter() -> None:
    workers = Workers(("loading", "loading"), ("ready", "loading"), ("ready", "ready"))
    residency = ensure(workers)
    assert workers.asked == 3
    assert residency.folder(ADAPTER.engine_name) == "/folder"
    assert residency.folder("acme/never@asked") is None


def test_the_base_is_always_there() -> None:
    workers = Workers(("loading", "loading"))
    ensure(workers, BASE)
    assert workers.asked == 0


def test_what_no_worker_can_use_is_said() -> None:
    with pytest.raises(ApiError, match="damaged") as refused:
        ensure(Workers(("ready", "damaged")))
    assert refused.value.status == 400


def test_what_takes_too_long_is_to_be_tried_again() -> None:
    with pytest.raises(ApiError) as refused:
        ensure(Workers(("loading", "loading")), seconds=0.05)
    assert refused.value.status == 503
    assert refused.value.headers["Retry-After"]


def test_what_was_deleted_meanwhile_does_not_exist() -> None:
    def gone(digest: str) -> Path:
        raise NotFoundError("gone")

    with pytest.raises(ApiError) as refused:
        asyncio.run(Residency(gone, Workers().call, 1).ensure(ADAPTER))
    assert refused.value.status == 404
