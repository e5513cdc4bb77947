"""What a tenant with a key could try against the gate; each of these once got through."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.test_gate import World, message


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
