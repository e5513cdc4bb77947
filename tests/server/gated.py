"""The engine's real application behind the real gate, over a real store; only no engine runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

from spallm_serve.adapters_store.authority import OPERATOR
from spallm_serve.adapters_store.records import Resolved
from spallm_serve.adapters_store.records import Scope as KeyScope
from spallm_serve.adapters_store.store import AdapterStore
from spallm_serve.server import runtime
from spallm_serve.server.directory import StoreDirectory, UsageBook
from spallm_serve.server.intake import Intake
from spallm_serve.server.limits import TenantLimiter
from spallm_serve.server.metrics import TenantLabels, TenantMetrics
from spallm_serve.server.settings import ServerSettings
from spallm_serve.server.tier_metrics import TierMetrics
from tests.adapters_store.stored import BASE_NAME

SECRET = bytes(range(32))


@dataclass
class NoEngine:
    """In the place of the way to the engine: it has all adapters that the store has."""

    store: AdapterStore
    loaded: list[str] = field(default_factory=list)

    pinned: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def held(self, resolved: Resolved) -> AsyncIterator[None]:
        if resolved.digest is not None:
            await asyncio.to_thread(self.store.local_folder, resolved.digest)
        self.loaded.append(resolved.engine_name)
        yield

    async def pin(self, resolved: Resolved) -> None:
        self.pinned.append(resolved.engine_name)

    async def unpin(self, resolved: Resolved) -> None:
        self.pinned.remove(resolved.engine_name)

    async def facts(self) -> list[dict[str, Any]]:
        return [{"slots": {}, "host": [], "host_bytes": 0, "slot_bytes": 0}]


@dataclass
class Gated:
    """A server without an engine: its ASGI application, and keys.

    Several in one process take turns: each makes its runtime the current one when it is asked.
    """

    here: runtime.Runtime
    app: FastAPI
    keys: dict[str, str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        runtime.start(self.here)
        if scope["type"] == "lifespan":  # the engine's application begins and ends with its engine
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
            return
        await self.app(scope, receive, send)

    def client(self, key: str | None) -> httpx.AsyncClient:
        headers = {} if key is None else {"Authorization": f"Bearer {self.keys[key]}"}
        transport = httpx.ASGITransport(self, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://gate", headers=headers)

    def ask(self, key: str | None, method: str, path: str, **more: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            async with self.client(key) as client:
                return await client.request(method, path, **more)

        return asyncio.run(run())


@contextmanager
def running(store: AdapterStore, directory: Path, **settings: Any) -> Iterator[runtime.Runtime]:
    """A runtime over a store, made the current one."""
    uploads = directory / "uploads"
    uploads.mkdir(parents=True, exist_ok=True)
    usage = UsageBook(store)
    engine: Any = NoEngine(store)
    registry = CollectorRegistry()
    here = runtime.Runtime(
        settings=ServerSettings(base="/nowhere", name=BASE_NAME, **settings),
        secret=SECRET,
        store=store,
        directory=StoreDirectory(store, usage),
        usage=usage,
        limiter=TenantLimiter(),
        metrics=TenantMetrics(TenantLabels(10), registry),
        tiers=TierMetrics(registry),
        uploads=uploads,
        intake=Intake(8),
        anonymous=None,
        residency=engine,
    )
    before = list(runtime._current)
    runtime.start(here)
    try:
        yield here
    finally:
        runtime._current[:] = before


def issue_keys(store: AdapterStore) -> dict[str, str]:
    """Keys of an admin and of two tenants."""
    admin = store.keys.bootstrap()
    assert admin is not None
    keys = {"admin": admin.secret}
    for tenant in ("acme", "zoo"):
        store.tenants.create(OPERATOR, tenant, may_use_base=True)
        scopes = [KeyScope.INFERENCE, KeyScope.ADAPTERS]
        keys[tenant] = store.keys.create(OPERATOR, tenant, scopes).secret
    return keys


def engine_app(here: runtime.Runtime, tasks: tuple[str, ...] = ("generate",)) -> FastAPI:
    """What vLLM builds for a server of ours, with all of its own routes.

    Args:
        here: of the server; the gate that vLLM makes is its.
        tasks: that vLLM believes its model to be good for.
    """
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from spallm_serve.server.engine_server import engine_arguments

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
        engine_arguments(here.settings)
    )
    app: FastAPI = build_app(arguments, tasks)
    app.state.enable_server_load_tracking = False
    return app
