"""What a tenant with a key could try against the gate; each of these once got through."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spallm_serve.adapters_store.records import Quota
from tests.server.test_gate import Tenants, World, message


@pytest.mark.parametrize(
    "body",
    [
        {"n": "1000"}, {"max_tokens": "99999999"}, {"max_output_tokens": ["9"]}, {"n": {}},
        {"stream": "false"}, {"stream": "no"}, {"stream": 1}, {"stream": []},
        {"stop_sequences": ["a"] * 17}, {"bad_words": ["x" * 100] * 200},
        {"stop_token_ids": [1] * 2000}, {"logit_bias": {str(each): 1 for each in range(2000)}},
        {"output_config": {"format": {"schema": {"a": "x" * 20_000}}}},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_the_engine_reads_otherwise(body: dict[str, Any]) -> None:
    """A number in quotes passed the caps; ``stream`` in quotes was served and not counted."""
    world = World()
    found = world.chat(**body)
    assert found.status_code == 400
    assert found.json()["error"]["param"] == next(iter(body))
    assert not world.engine.seen


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(text: str) -> None:
    world = World()
    content = f'{{"model": "support", "messages": [], "max_tokens": {text}}}'
    found = world.ask("acme-key", "POST", "/v1/chat/completions", content=content)
    # Below every cap is minus infinity; the engine says that it is no integer.
    assert found.status_code == (200 if text == "-Infinity" else 400)


@pytest.mark.parametrize("depth", [65, 200, 960, 100_000])
def test_values_in_values(depth: int) -> None:
    """Some depths could be read but not written again; a schema of 1,000 takes minutes."""
    world = World()
    nested = '{"items": ' * depth + "1" + "}" * depth
    content = f'{{"model": "support", "messages": [], "response_format": {nested}}}'
    found = world.ask("acme-key", "POST", "/v1/chat/completions", content=content)
    assert found.status_code == 400
    assert not world.engine.seen
    shallow = json.loads('{"items": ' * 60 + "1" + "}" * 60)
    assert world.chat(response_format=shallow).status_code == 200


def test_no_header_of_the_clients_steers_the_engine() -> None:
    """vLLM reads priorities, ranks, sessions and ids out of headers, too."""
    world = World()
    steering = {
        "x-data-parallel-rank": "1", "x-session-id": "other", "x-priority": "-9",
        "endpoint-load-metrics-format": "JSON", "x-request-id": "a b", "authorization-2": "x",
        "x-vllm-anything-new": "1", "user-agent": "mine",
    }  # fmt: skip
    body = {"model": "support", "messages": []}
    found = world.ask("acme-key", "POST", "/v1/chat/completions", json=body, headers=steering)
    assert found.status_code == 200
    (told,) = world.engine.headers
    assert set(told) == {
        "host", "accept", "user-agent", "content-type", "content-length", "x-request-id",
    }  # fmt: skip
    assert told["x-request-id"] == found.headers["x-request-id"] != "a b"


@pytest.mark.parametrize("model", ["\ud800", "a\0b", "acme/\ud800", "acme/support@\0", "\r\n"])
def test_names_that_no_database_takes(model: str) -> None:
    world = World()
    content = json.dumps({"model": model, "messages": []})
    found = world.ask("acme-key", "POST", "/v1/chat/completions", content=content)
    assert found.status_code == 404
    assert "does not exist" in message(found)


def test_a_path_is_judged_as_it_is_routed() -> None:
    """Under a root path of ``/v1/models`` the engine would take ``/metrics`` out of this."""
    world = World()
    found = world.ask("acme-key", "GET", "/v1/models/metrics", root_path="/v1/models")
    assert found.status_code == 404
    assert "reached" not in found.text


@pytest.mark.parametrize("answer", ["null", "an event"])
def test_who_leaves_early_pays_for_the_prompt(answer: str) -> None:
    """The engine counts at the end: prompts were read for nothing by not waiting for it."""
    world = World(Tenants({"acme": Quota(tokens_per_minute=1000)}))
    streamed = answer != "null"  # that is vLLM's, where nobody listens any more
    content = b'data: {"choices": [{"text": "a"}]}\n\n' if streamed else b"null"

    async def engine(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content, "more_body": streamed})

    for path in ("/tokenize", "/v1/completions"):
        told = {"model": "support", "prompt": "x" * 6000, "stream": streamed}
        asyncio.run(post(world.gate(engine), path, json.dumps(told).encode()))
    tokenized, completed = (usage for _, _, usage in world.tenants.recorded)
    assert tokenized.prompt == 0
    assert 1500 <= completed.prompt <= 1600
    assert completed.completion == streamed
    assert world.chat().status_code == 429


async def post(app: ASGIApp, path: str, content: bytes) -> None:
    """A request whose answer nobody reads to its end."""
    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"",
        "headers": [(b"authorization", b"Bearer acme-key")],
    }  # fmt: skip

    async def receive() -> Message:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Message) -> None:
        return None

    await app(scope, receive, send)
