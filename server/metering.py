"""Tokens of a response, read as it passes: from its JSON, or from the events of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# A body that is not streamed is parsed when it is complete; of a larger one tokens are not known.
_MAX_BODY_BYTES = 32 * 2**20
# Of a request's body, for a token of its prompt; where the engine had no time to count.
_BYTES_PER_TOKEN = 4


@dataclass
class Usage:
    """Tokens of a request.

    Attributes:
        prompt, completion: as the engine counts them.
    """

    prompt: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        """Of both."""
        return self.prompt + self.completion

    def read(self, event: object) -> None:
        """Take the counts out of a response or an event, wherever its API puts them."""
        for holder in _holders(event):
            usage = holder.get("usage")
            if isinstance(usage, dict):
                self.prompt = max(self.prompt, _count(usage, "prompt_tokens", "input_tokens"))
                self.completion = max(
                    self.completion, _count(usage, "completion_tokens", "output_tokens")
                )


def _holders(event: object) -> Iterator[dict[str, Any]]:
    """The event, and what the APIs of responses and of messages wrap in theirs."""
    if isinstance(event, dict):
        yield event
        for name in ("response", "message"):
            if isinstance(event.get(name), dict):
                yield event[name]


def _count(usage: dict[str, Any], *names: str) -> int:
    return max((usage[name] for name in names if isinstance(usage.get(name), int)), default=0)


@dataclass
class Meter:
    """Reads a response as it passes.

    Attributes:
        streamed: whether it is a stream of events.
        hide_usage: drop the event that only has the usage, which the client did not ask for.
        usage: what was found so far; of a stream that ended early, an answer's token an event.
    """

    streamed: bool
    hide_usage: bool = False
    usage: Usage = field(default_factory=Usage)
    _rest: bytes = b""
    _events: int = 0

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes of the body; returns those to pass on."""
        if not self.streamed:
            if len(self._rest) <= _MAX_BODY_BYTES:
                self._rest += chunk
            return chunk
        *events, self._rest = (self._rest + chunk).split(b"\n\n")
        return b"".join(event + b"\n\n" for event in events if self._passes(event))

    def finish(self) -> bytes:
        """The body is over; returns what is still to be passed on."""
        if not self.streamed:
            if len(self._rest) <= _MAX_BODY_BYTES:
                self.usage.read(_parse(self._rest))
            return b""
        rest, self._rest = self._rest, b""
        return rest

    def abandon(self, request_bytes: int) -> None:
        """The client went away: counted is what had been streamed by then, and a guessed prompt.

        Otherwise it could have prompts read for nothing, by leaving before they are counted.

        Args:
            request_bytes: of the request's body.
        """
        self.usage.completion = max(self.usage.completion, self._events)
        self.usage.prompt = self.usage.prompt or -(-request_bytes // _BYTES_PER_TOKEN)

    def _passes(self, event: bytes) -> bool:
        data = b"".join(
            line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")
        )
        if not data or data == b"[DONE]":
            return True
        self._events += 1
        if b'"usage"' not in data:
            return True
        parsed = _parse(data)
        self.usage.read(parsed)
        only_usage = isinstance(parsed, dict) and parsed.get("choices") == []
        return not (self.hide_usage and only_usage)


def _parse(text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
