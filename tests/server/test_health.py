"""Readiness is a decode that happened, not a process that runs."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from spallm_serve.server.routes.health import Readiness, livez, readyz


class Engine:
    def __init__(self, answer: str) -> None:
        self.answer, self.decoded = answer, 0

    async def decode(self) -> None:
        self.decoded += 1
        if self.answer == "hangs":
            await asyncio.sleep(10)
        if self.answer == "is dead":
            raise RuntimeError("a secret path")


def ask(readiness: Readiness, *paths: str) -> list[httpx.Response]:
    app = Starlette(routes=[Route("/livez", livez), Route("/readyz", readyz)])
    app.state.spallm_readiness = readiness

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return await asyncio.gather(*(client.get(path) for path in paths))

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [("decodes", 200, None), ("hangs", 503, "within 0.05 s"), ("is dead", 503, "RuntimeError")],
)
def test_ready_is_who_decodes(answer: str, status: int, reason: str | None) -> None:
    (found,) = ask(Readiness(Engine(answer).decode, 0.05), "/readyz")
    assert found.status_code == status
    if reason is not None:
        assert reason in found.json()["reason"]
    assert "secret" not in found.text


def test_many_who_ask_make_one_decode() -> None:
    engine = Engine("decodes")
    found = ask(Readiness(engine.decode, 1), *["/readyz"] * 20)
    assert {response.status_code for response in found} == {200}
    assert engine.decoded == 1


def test_a_process_whose_engine_is_dead_is_alive_but_not_ready() -> None:
    readiness = Readiness(Engine("is dead").decode, 1)
    assert [found.status_code for found in ask(readiness, "/readyz", "/livez")] == [503, 200]
