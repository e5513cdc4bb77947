"""The gate against an engine that says what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from spallm_serve.adapters_store.failures import UnavailableError
from spallm_serve.adapters_store.records import Principal, Quota, Resolved, Scope
from spallm_serve.server.gate import PRINCIPAL, Gate, GateSettings
from spallm_serve.server.limits import TenantLimiter
from spallm_serve.server.metering import Usage
from spallm_serve.server.metrics import TenantLabels, TenantMetrics
from spallm_serve.server.request_policy import REFUSED
from spallm_serve.server.scopes import ROUTES, declared

SECRET = bytes(range(32))
DIGEST = "ab" * 32


@dataclass
class Tenants:
    """Two tenants with an adapter each, and an operator."""

    quotas: dict[str, Quota] = field(default_factory=dict)
    recorded: list[tuple[str, str, Usage]] = field(default_factory=list)

    def authenticate(self, bearer: str) -> Principal | None:
        scopes = {
            "acme-key": {Scope.INFERENCE, Scope.ADAPTERS},
            "zoo-key": {Scope.INFERENCE},
            "root-key": {Scope.ADMIN},
            "push-key": {Scope.ADAPTERS},
        }
        if bearer not in scopes:
            return None
        tenant = bearer.partition("-")[0]
        return Principal(tenant=tenant, scopes=frozenset(scopes[bearer]), key_id=bearer)

    def resolve(self, tenant: str, model: str) -> Resolved | None:
        if model == "base":
            return Resolved(owner=None, name="base", digest=None, kind=None, engine_name="base")
        if tenant == "acme" and model in ("support", "acme/support"):
            return Resolved(
                owner="acme",
                name="support",
                digest=DIGEST,
                kind="SPALLM_LUT",
                engine_name=f"acme/support@{DIGEST}",
            )
        return None

    def quota(self, tenant: str) -> Quota:
        return self.quotas.get(tenant, Quota())

    def record(self, tenant: str, resolved: Resolved, usage: Usage) -> None:
        self.recorded.append((tenant, resolved.engine_name, usage))


class Engine:
    """Answers with what it was sent; streams where it is asked to."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.loaded: list[str] = []
        self.waiting = asyncio.Event()
        self.go_on = asyncio.Event()
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/load_lora_adapter", self.secret, methods=["POST"]),
            Route("/metrics", self.secret),
            Route("/livez", self.secret),
            Route("/v1/adapters/{name:path}", self.who, methods=["PUT"]),
        ]
        self.app = Starlette(routes=routes)

    async def secret(self, request: Request) -> Response:
        return JSONResponse({"reached": request.url.path})

    async def who(self, request: Request) -> Response:
        return JSONResponse({"tenant": request.scope[PRINCIPAL].tenant})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        assert body["model"] in self.loaded
        self.seen.append(body)
        self.headers.append(dict(request.headers))
        if body.get("messages") == "wait":
            self.waiting.set()
            await self.go_on.wait()
        if body.get("stream"):
            return StreamingResponse(self.events(body), media_type="text/event-stream")
        return JSONResponse({"usage": {"prompt_tokens": 5, "completion_tokens": 7}})

    async def events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        for token in "abc":
            yield event({"choices": [{"delta": {"content": token}}], "usage": None})
        if body["stream_options"]["include_usage"]:
            yield event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}})
        yield "data: [DONE]\n\n"


def event(value: object) -> str:
    return f"data: {json.dumps(value)}\n\n"


@dataclass
class World:
    """A gate with an engine behind it."""

    tenants: Tenants = field(default_factory=Tenants)
    engine: Engine = field(default_factory=Engine)
    settings: GateSettings = field(default_factory=lambda: GateSettings(SECRET, body_seconds=0.3))

    def client(self, key: str | None, root_path: str = "") -> httpx.AsyncClient:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(self.gate(self.engine.app), root_path=root_path)
        return httpx.AsyncClient(transport=transport, base_url="http://gate", headers=headers)

    def gate(self, app: ASGIApp) -> Gate:
        return Gate(app, self.tenants, self.limiter, self.metrics, self.held, self.settings)

    def __post_init__(self) -> None:
        self.limiter = TenantLimiter()
        self.registry = CollectorRegistry()
        self.metrics = TenantMetrics(TenantLabels(1), self.registry)

    @asynccontextmanager
    async def held(self, resolved: Resolved) -> AsyncIterator[None]:
        self.engine.loaded.append(resolved.engine_name)
        yield
        self.engine.loaded.remove(resolved.engine_name)

    def ask(
        self, key: str | None, method: str, path: str, *, root_path: str = "", **more: Any
    ) -> httpx.Response:
        async def asked() -> httpx.Response:
            async with self.client(key, root_path) as client:
                return await client.request(method, path, **more)

        return asyncio.run(asked())

    def chat(self, key: str | None = "acme-key", **body: Any) -> httpx.Response:
        given = {"model": "support", "messages": []} | body
        return self.ask(key, "POST", "/v1/chat/completions", json=given)


def message(response: httpx.Response) -> str:
    return str(response.json()["error"]["message"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/load_lora_adapter", "/nowhere"])
@pytest.mark.parametrize("key", [None, "", "nobodys"])
def test_without_a_valid_key_every_path_answers_alike(path: str, key: str | None) -> None:
    found = World().ask(key, "POST", path, json={"model": "base"})
    assert found.status_code == 401
    assert found.json()["error"]["code"] == "invalid_api_key"
    assert found.headers["www-authenticate"] == "Bearer"


def test_keys_come_as_bearer_tokens_or_as_anthropics_clients_send_them() -> None:
    path, asked = "/v1/chat/completions", {"json": {"model": "support", "messages": []}}
    for headers, status in (
        ({"x-api-key": "acme-key"}, 200),
        ({"x-api-key": "nobodys"}, 401),
        ({"Authorization": "bearer acme-key"}, 200),
        ({"Authorization": "Basic acme-key"}, 401),
        ({"Authorization": "Basic x", "x-api-key": "acme-key"}, 401),
    ):
        assert World().ask(None, "POST", path, headers=headers, **asked).status_code == status


def test_liveness_needs_no_key() -> None:
    assert World().ask(None, "GET", "/livez").status_code == 200


def test_what_is_not_declared_does_not_exist() -> None:
    found = World().ask("acme-key", "POST", "/v1/load_lora_adapter", json={})
    assert found.status_code == 404
    for path in ("/v1/responses/resp_1", "/pause", "/update_weights", "//v1/models", "/v1/Models"):
        assert declared("GET", path) is None
        assert declared("POST", path) is None


def test_every_declared_route_says_what_it_asks() -> None:
    public = {route.pattern.pattern for route in ROUTES if route.scope is None}
    assert public == {"/livez", "/readyz"}


def test_a_key_without_the_scope_is_refused() -> None:
    world = World()
    assert world.ask("acme-key", "GET", "/metrics").status_code == 403
    assert world.ask("root-key", "GET", "/metrics").status_code == 200
    assert world.chat("push-key").status_code == 403
    assert world.chat("root-key", model="base").status_code == 200
    assert world.ask("zoo-key", "PUT", "/v1/adapters/x").status_code == 403
    assert world.ask("acme-key", "PUT", "/v1/adapters/x").json() == {"tenant": "acme"}


def test_the_engine_sees_the_version_and_the_tenants_salt() -> None:
    world = World()
    found = world.chat(cache_salt="another tenant's", store=True)
    assert found.status_code == 200
    assert found.headers["x-spallm-adapter"] == f"acme/support@{DIGEST}"
    (seen,) = world.engine.seen
    assert seen["model"] == f"acme/support@{DIGEST}"
    assert seen["store"] is False
    world.chat("zoo-key", model="base", cache_salt=seen["cache_salt"])
    assert world.engine.seen[1]["model"] == "base"
    assert world.engine.seen[1]["cache_salt"] != seen["cache_salt"] != "another tenant's"
    world.chat()
    assert world.engine.seen[2]["cache_salt"] == seen["cache_salt"]


def test_anothers_adapter_and_none_at_all_are_told_alike() -> None:
    world = World()
    anothers, none = (world.chat("zoo-key", model=name) for name in ("acme/support", "acme/other"))
    assert anothers.status_code == none.status_code == 404
    assert message(anothers).replace("support", "other") == message(none)
    assert not world.engine.seen


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_are_not_for_tenants(name: str) -> None:
    world = World()
    found = world.chat(**{name: "x"})
    assert found.status_code == 400
    assert found.json()["error"]["param"] == name
    assert world.chat(**{name: None}).status_code == 200
    assert name not in world.engine.seen[0]


@pytest.mark.parametrize(
    "body",
    [
        {"n": 9}, {"n": 1e9}, {"max_tokens": 10**9}, {"use_beam_search": True},
        {"stop": ["a"] * 17}, {"prompt": ["a"] * 33}, {"prompt": [[1]] * 33},
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"response_format": {"type": "json_schema", "schema": {"a": "x" * 20_000}}},
        {"tools": [{"deep": [["x" * 9_000], ["y" * 9_000]]}]}, {"model": ""}, {"model": 5},
        {"model": "x" * 600},
    ],
)  # fmt: skip
def test_requests_over_their_caps(body: dict[str, Any]) -> None:
    world = World()
    found = world.chat(**body)
    assert found.status_code == 400
    assert not world.engine.seen


def test_a_long_prompt_of_tokens_is_one_prompt() -> None:
    assert World().chat(prompt=list(range(500))).status_code == 200


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'"x"'])
def test_bodies_that_are_no_objects(content: bytes) -> None:
    found = World().ask("acme-key", "POST", "/v1/chat/completions", content=content)
    assert found.status_code == 400
    assert found.json()["error"]["code"] == "invalid_json"


def test_a_body_over_its_cap_and_one_that_does_not_end() -> None:
    world = World(settings=GateSettings(SECRET, body_bytes=100, body_seconds=0.2))
    assert world.chat(messages="x" * 200).status_code == 413

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    found = world.ask("acme-key", "POST", "/v1/chat/completions", content=slow())
    assert found.status_code == 408
    assert world.chat().status_code == 200


def test_tokens_are_recorded_for_tenant_and_adapter() -> None:
    world = World()
    world.chat()
    world.chat("zoo-key", model="base", stream=True)
    assert world.tenants.recorded == [
        ("acme", f"acme/support@{DIGEST}", Usage(5, 7)),
        ("zoo", "base", Usage(5, 3)),
    ]


@pytest.mark.parametrize("asked", [None, {}, {"include_usage": False}, {"include_usage": True}])
def test_a_stream_has_the_usage_only_if_it_was_asked_for(asked: dict[str, Any] | None) -> None:
    world = World()
    found = world.chat(stream=True, stream_options=asked)
    wants = bool(asked and asked.get("include_usage"))
    assert found.text.count("content") == 3
    assert ("prompt_tokens" in found.text) == wants
    assert found.text.endswith("data: [DONE]\n\n")
    assert world.tenants.recorded[0][2] == Usage(5, 3)


def test_requests_a_minute() -> None:
    world = World(Tenants({"acme": Quota(requests_per_minute=2)}))
    first, second, third = (world.chat() for _ in range(3))
    assert [first.status_code, second.status_code, third.status_code] == [200, 200, 429]
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert 1 <= int(third.headers["retry-after"]) <= 60
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert third.json()["error"]["type"] == "rate_limit_error"
    assert world.chat("zoo-key", model="base").status_code == 200


def test_tokens_a_minute() -> None:
    world = World(Tenants({"acme": Quota(tokens_per_minute=20)}))
    codes = [world.chat().status_code for _ in range(3)]
    assert codes == [200, 200, 429]  # 12 tokens, 24 tokens
    assert "20 tokens a minute" in message(world.chat())


def test_requests_at_a_time() -> None:
    world = World(Tenants({"acme": Quota(concurrent_requests=1)}))

    async def run() -> list[int]:
        async with world.client("acme-key") as client:
            body = {"model": "support", "messages": "wait"}
            first = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await world.engine.waiting.wait()
            second = await client.post("/v1/chat/completions", json=body)
            world.engine.go_on.set()
            last = await first
            third = await client.post("/v1/chat/completions", json={**body, "messages": []})
            return [last.status_code, second.status_code, third.status_code]

    assert asyncio.run(run()) == [200, 429, 200]


def test_request_ids() -> None:
    world = World()
    ask = {"json": {"model": "support", "messages": []}}
    path = "/v1/chat/completions"
    own = world.ask("acme-key", "POST", path, headers={"x-request-id": "mine-1"}, **ask)
    assert own.headers["x-request-id"] == "mine-1"
    forged = world.ask("acme-key", "POST", path, headers={"x-request-id": "a b<c>"}, **ask)
    assert forged.headers["x-request-id"].startswith("req-")
    assert World().ask(None, "POST", path).headers["x-request-id"]


def test_without_authentication_everybody_is_one_caller() -> None:
    nobody = Principal(tenant="default", scopes=frozenset({Scope.ADMIN}), key_id="none")
    world = World(settings=GateSettings(SECRET, anonymous=nobody))
    assert world.chat(None, model="base").status_code == 200
    assert world.tenants.recorded[0][0] == "default"
    # A key that is sent is still one that has to be valid.
    assert world.chat("nobodys", model="base").status_code == 401


def test_metrics_of_tenants_are_bounded() -> None:
    """One tenant has a label of its own here; the others share one."""
    world = World(Tenants({"acme": Quota(requests_per_minute=2)}))
    for _ in range(3):
        world.chat()
    world.chat("zoo-key", model="base", stream=True)
    world.chat("zoo-key", model="acme/support")

    def value(name: str, **labels: str) -> float | None:
        return world.registry.get_sample_value(f"spallm_{name}", labels)

    assert value("requests_total", tenant="acme", status="200") == 2
    assert value("requests_total", tenant="acme", status="429") == 1
    assert value("requests_total", tenant="other", status="404") == 1
    assert value("requests_total", tenant="zoo", status="200") is None
    assert value("tokens_total", tenant="acme", kind="completion") == 14
    assert value("tokens_total", tenant="other", kind="prompt") == 5
    assert value("time_to_first_token_seconds_count", tenant="acme") == 2
    assert value("inter_token_seconds_count", tenant="other") >= 2
    assert value("running_requests", tenant="acme") == 0


@pytest.mark.parametrize("method", ["authenticate", "resolve", "quota"])
def test_a_store_that_does_not_answer_refuses_nobody_for_good(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()

    def fails(*arguments: str) -> None:
        raise UnavailableError("postgresql://user:secret@host is gone")

    monkeypatch.setattr(world.tenants, method, fails)
    found = world.chat()
    assert found.status_code == 503
    assert found.headers["retry-after"]
    assert "secret" not in found.text
    assert not world.engine.seen
