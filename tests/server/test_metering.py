"""Tokens read from responses, however they are cut into pieces."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spallm_serve.server.metering import Meter, Usage

CHAT = [
    {"choices": [{"delta": {"content": 'a "usage" of words'}}]},
    {"choices": [{"delta": {"content": "b"}}], "usage": None},
    {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 2}},
]
STREAM = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in CHAT)
STREAM += b": a comment\n\ndata: [DONE]\n\n"


@given(st.lists(st.integers(0, len(STREAM)), max_size=12), st.booleans())
def test_a_stream_cut_anywhere(cuts: list[int], hide: bool) -> None:
    meter = Meter(streamed=True, hide_usage=hide)
    places = [0, *sorted(cuts), len(STREAM)]
    passed = b"".join(meter.feed(STREAM[start:stop]) for start, stop in itertools.pairwise(places))
    passed += meter.finish()
    hidden = b"data: " + json.dumps(CHAT[2]).encode() + b"\n\n"
    assert passed == (STREAM.replace(hidden, b"") if hide else STREAM)
    assert meter.usage == Usage(11, 2)


@given(st.binary(max_size=200), st.booleans())
def test_anything_passes(content: bytes, streamed: bool) -> None:
    meter = Meter(streamed)
    assert meter.feed(content) + meter.finish() == content


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        ({"usage": {"prompt_tokens": 3, "completion_tokens": 4}}, Usage(3, 4)),
        ({"usage": {"input_tokens": 3, "output_tokens": 4}}, Usage(3, 4)),
        ({"response": {"usage": {"input_tokens": 3, "output_tokens": 4}}}, Usage(3, 4)),
        ({"usage": None}, Usage()),
        ({"usage": {"prompt_tokens": "3"}}, Usage()),
        (["usage"], Usage()),
    ],
)
def test_where_apis_put_their_counts(body: object, usage: Usage) -> None:
    meter = Meter(streamed=False)
    meter.feed(json.dumps(body).encode())
    meter.finish()
    assert meter.usage == usage


def test_a_stream_that_ends_early_counts_what_was_streamed() -> None:
    meter = Meter(streamed=True)
    meter.feed(b'data: {"choices": [1]}\n\ndata: {"choices": [2]}\n\ndata: {"cho')
    meter.abandon(request_bytes=0)
    assert meter.usage == Usage(0, 2)
