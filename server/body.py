"""A request's JSON body, read whole under a cap and a deadline, and put back for the engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import Message, Receive, Scope

from spallm_serve.server.errors import ApiError, too_large


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
    return body


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


def with_body(scope: Scope, receive: Receive, body: dict[str, Any]) -> tuple[Scope, Receive]:
    """A request that has another body.

    Args:
        scope: of the request.
        receive: of the request, read to the end of its body; it goes on to tell of a disconnect.
        body: the new one.
    """
    content = json.dumps(body).encode()
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name not in (b"content-length", b"content-type", b"transfer-encoding")
    ]
    headers += [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    given = False

    async def receive_body() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return {**scope, "headers": headers}, receive_body
