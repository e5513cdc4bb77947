"""A tenant that asks its adapter again and again, each time a new version of it or always the same.

A program: it reads what to do as a line of JSON, writes a line when it has been answered for the
first time, and after SIGTERM the number of answers.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import struct
import sys
from pathlib import Path

from spallm_serve.benchmarks.serve_client import Ask, Target, run_load
from spallm_serve.benchmarks.serve_upload import adapter_bytes, upload

# float16 from 0 up to, but without, 2; as bits.
_HALVES = 0x4000


def version(tensors: bytes, number: int) -> bytes:
    """An adapter's file of tensors with its last two values, in float16, set by a number."""
    values = struct.pack("<HH", number % _HALVES, number // _HALVES)
    return tensors[: -len(values)] + values


def move(
    url: str, model: str, key: str, prompt: list[int], adapter: str, first: int, tokens: int,
    uploads: bool,
) -> int:  # fmt: skip
    """Upload and ask until SIGTERM; the number of answers.

    Args:
        url: of our server.
        model: name of the tenant's adapter.
        key: of the tenant.
        prompt: of each request, as token ids.
        adapter: directory of which versions are made.
        first: number of the first version.
        tokens: of each answer.
        uploads: a new version before each request; else only one, before the first.

    Raises:
        UserError: an upload or a request failed.
    """
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    target = Target(model, key)
    config, tensors = adapter_bytes(Path(adapter))
    for number in itertools.count():
        if ended:
            return number
        if uploads or number == 0:
            upload(url, target, config, version(tensors, first + number))
        run_load(url, [Ask(target, prompt)], 1, tokens)
        if number == 0:
            print("begun", flush=True)
    raise AssertionError("unreachable")


if __name__ == "__main__":
    # A client is on another machine: what it takes here is to be what the engine leaves.
    os.nice(19)
    print(move(**json.loads(sys.stdin.readline())))
