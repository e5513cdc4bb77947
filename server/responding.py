"""A response on its way out: headers added, tokens counted, the clock read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from spallm_serve.server.errors import ApiError
from spallm_serve.server.metering import Meter, Usage
from spallm_serve.server.metrics import RequestWatch

# The status of a request whose client did not wait for one.
CLIENT_WENT_AWAY = 499


class Responding:
    """``send`` with headers added, and the body metered.

    Args:
        send: of the request.
        headers: to be added.

    Attributes:
        meter: of the body, once one is wanted.
        status: that was sent; 0 before.
        complete: whether all of the body was sent.
        facts: about the request, for the log.
    """

    def __init__(self, send: Send, headers: dict[str, str]) -> None:
        self._send = send
        self.headers = headers
        self.meter: Meter | None = None
        self.status = 0
        self.complete = False
        self.facts: dict[str, object] = {}
        self._watch: RequestWatch | None = None

    @property
    def started(self) -> bool:
        """Whether anything was sent."""
        return self.status != 0

    @contextmanager
    def watched(self, watch: RequestWatch) -> Iterator[None]:
        """While open, a request's clock runs."""
        self._watch = watch
        refused = 0
        try:
            yield
        except ApiError as error:
            refused = error.status
            raise
        finally:
            self._watch = None
            watch.finish(self.status or refused or CLIENT_WENT_AWAY, self.usage)

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return self.meter.usage if self.meter is not None else Usage()

    def counted(self, request_bytes: int) -> Usage:
        """The tokens, also where the client did not wait for them.

        The engine then answers nothing, or no more; a stream that is complete has its count.
        """
        if self.meter is None:
            return Usage()
        if not self.complete or not (self.meter.streamed or self.meter.usage.total):
            self.meter.abandon(request_bytes)
        return self.meter.usage

    async def __call__(self, message: Message) -> None:
        """Send a message of the response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=list(message.get("headers", [])))
            for name, value in self.headers.items():
                headers[name] = value
            if self.meter is not None and self.meter.hide_usage:
                del headers["content-length"]
            message = {**message, "headers": headers.raw}
        elif message["type"] == "http.response.body":
            message = self._metered(message)
        await self._send(message)

    def _metered(self, message: Message) -> Message:
        more = message.get("more_body", False)
        self.complete = not more
        if self.meter is None:
            return message
        if self._watch is not None and message.get("body"):
            self._watch.on_bytes(self.meter.streamed)
        body = self.meter.feed(message.get("body", b""))
        if not more:
            body += self.meter.finish()
        return {**message, "body": body}
