"""A request's JSON body, read whole under a cap and a deadline, and put back for the engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import Message, Receive, Scope

from spallm_serve.server.errors import ApiError, too_large

# Values in values: what reads them after us calls itself for each, or takes time by the square.
_DEEPEST = 64
# All that the engine is told of the client's headers: by others it would let itself be steered.
_PASSED_ON = (b"host", b"accept", b"user-agent", b"traceparent", b"tracestate")


async def read_json(receive: Receive, limit: int, seconds: float) -> dict[str, Any]:
    """The JSON object that a request's body is.

    Args:
        receive: of the request.
        limit: bytes at most.
        seconds: until all of it has to be there.

    Raises:
        ApiError: larger, later, or no JSON object.
    """
    try:
        async with asyncio.timeout(seconds):
            content = await _read(receive, limit)
    except TimeoutError as error:
        raise ApiError(
            408, f"the request's body was not complete after {seconds:g} s", "request_timeout"
        ) from error
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the request's body is not JSON", "invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the request's body is not a JSON object", "invalid_json")
    if _is_deeper(body, _DEEPEST):
        raise ApiError(
            400, f"the request's body is nested more than {_DEEPEST} deep", "invalid_json"
        )
    return body


def _is_deeper(value: dict[str, Any], limit: int) -> bool:
    """Whether there are values in more than so many values."""
    level: list[Any] = [value]
    for _ in range(limit):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


async def _read(receive: Receive, limit: int) -> bytes:
    content = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client went away", "client_closed_request")
        content += message.get("body", b"")
        if len(content) > limit:
            raise too_large(limit)
        if not message.get("more_body", False):
            return bytes(content)


def with_body(
    scope: Scope, receive: Receive, body: dict[str, Any], headers: dict[str, str]
) -> tuple[Scope, Receive]:
    """A request that has another body, and of its headers only those that the engine may know.

    Args:
        scope: of the request.
        receive: of the request, read to the end of its body; it goes on to tell of a disconnect.
        body: the new one.
        headers: to be added.
    """
    content = json.dumps(body).encode()
    told = headers | {"content-type": "application/json", "content-length": str(len(content))}
    raw = [(name, value) for name, value in scope["headers"] if name in _PASSED_ON]
    raw += [(name.encode(), value.encode()) for name, value in told.items()]
    given = False

    async def receive_body() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return {**scope, "headers": raw}, receive_body
