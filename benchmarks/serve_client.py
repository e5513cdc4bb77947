"""A streaming client that times every token's arrival, for our server and for peers alike.

vLLM's own benchmark client sends one API key for all requests, chooses adapters only evenly and
asks for a tokenizer. Here every tenant has a key of its own, choices may follow Zipf's law, and a
random model has no tokenizer; so prompts are token ids and the client is this one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from spallm_serve.errors import UserError

# A full queue may hold a request for minutes before its first token.
_READ_SECONDS = 600.0


@dataclass(frozen=True)
class Target:
    """What a request names, and by which key.

    Attributes:
        model: the base's or an adapter's name.
        key: of the tenant; None where the server asks for none.
    """

    model: str
    key: str | None = None


@dataclass(frozen=True)
class Ask:
    """A request: whom, and the prompt as token ids."""

    target: Target
    prompt: list[int]


@dataclass(frozen=True)
class Stream:
    """When an answer came.

    Attributes:
        first_s: seconds from sending the request to its first token.
        gaps_s: seconds between events that brought tokens, one after another. An event that
            brings several counts once: so long did the reader wait.
        tokens: that came.
    """

    first_s: float
    gaps_s: list[float]
    tokens: int


@dataclass(frozen=True)
class Load:
    """Streams that ran beside each other, and the seconds from the first to the end of the last."""

    streams: list[Stream]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Of all streams together."""
        return sum(stream.tokens for stream in self.streams) / self.seconds


@dataclass(frozen=True)
class Latencies:
    """Median and 99th percentile, in seconds, of first tokens and of gaps between tokens."""

    first_median_s: float
    first_p99_s: float
    gap_median_s: float
    gap_p99_s: float


def run_load(url: str, asks: Iterable[Ask], concurrency: int, tokens: int) -> Load:
    """Send requests, each as soon as one of those before it has ended.

    Args:
        url: of the server.
        asks: in their order.
        concurrency: requests at a time.
        tokens: each is answered with.

    Raises:
        UserError: a request failed, or was answered with another number of tokens.
    """
    return asyncio.run(_load(url, asks, concurrency, tokens))


def latencies(streams: Sequence[Stream]) -> Latencies:
    """Of all streams together."""
    firsts = [stream.first_s for stream in streams]
    gaps = [gap for stream in streams for gap in stream.gaps_s]
    return Latencies(
        statistics.median(firsts), percentile(firsts, 0.99),
        statistics.median(gaps), percentile(gaps, 0.99),
    )  # fmt: skip


def percentile(values: Sequence[float], share: float) -> float:
    """The value that a share of all lies below, between two neighbours on a straight line.

    Args:
        values: in any order, at least one.
        share: from 0 to 1.
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


async def _load(url: str, asks: Iterable[Ask], concurrency: int, tokens: int) -> Load:
    waiting = iter(asks)
    streams: list[Stream] = []
    timeout = httpx.Timeout(_READ_SECONDS)
    limits = httpx.Limits(max_connections=concurrency)

    async def work(client: httpx.AsyncClient) -> None:
        for ask in waiting:
            streams.append(await _stream(client, ask, tokens))

    async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits) as client:
        started = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(concurrency)))
        return Load(streams, time.perf_counter() - started)


async def _stream(client: httpx.AsyncClient, ask: Ask, tokens: int) -> Stream:
    key = ask.target.key
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = {
        "model": ask.target.model, "prompt": ask.prompt, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "return_token_ids": True,
    }  # fmt: skip
    arrivals: list[float] = []
    count = 0
    started = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode(errors="replace")
                raise UserError(f"{ask.target.model}: answered {answer.status_code}: {text[:500]}")
            async for line in answer.aiter_lines():
                found = _tokens_of(line)
                if found:
                    arrivals.append(time.perf_counter())
                    count += found
    except httpx.HTTPError as error:
        raise UserError(f"{ask.target.model}: the request failed ({error!r})") from error
    if count != tokens:
        raise UserError(f"{ask.target.model}: answered with {count} tokens, expected {tokens}")
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    return Stream(arrivals[0] - started, gaps, count)


def _tokens_of(line: str) -> int:
    """How many tokens a line of server-sent events brings."""
    kind, _, data = line.partition(":")
    data = data.strip()
    if kind != "data" or data == "[DONE]":
        return 0
    event: dict[str, Any] = json.loads(data)
    if "error" in event:
        raise UserError(f"the server broke off an answer: {event['error']}")
    return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
