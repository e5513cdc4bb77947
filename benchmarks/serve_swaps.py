"""One tenant's stream alone, and while another asks in a loop, with and without new versions.

The other tenant is a process of its own, so that its work does not delay the clock of the stream.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from spallm_serve.benchmarks import serve_mover
from spallm_serve.benchmarks.records import Record
from spallm_serve.benchmarks.serve_client import Ask, Load, latencies, run_load
from spallm_serve.benchmarks.serve_mixture import Asking
from spallm_serve.benchmarks.serve_ours import Tenants
from spallm_serve.errors import UserError

# Versions that a round may have; the next round's numbers begin behind them.
_ROUND = 100_000
_ALONE, _ASKS, _SWAPS = "alone", "another tenant asks", "another tenant swaps"
_SWAPS_FOR_A_TOKEN = "another tenant swaps, for a prompt and an answer of a token"
# What the other tenant does, in turns; and which situation is compared with which.
_SITUATIONS = (_ASKS, _SWAPS, _SWAPS_FOR_A_TOKEN)
_COMPARED = ((_SWAPS, _ALONE), (_SWAPS, _ASKS), (_SWAPS_FOR_A_TOKEN, _ALONE))


def swap_records(
    url: str, tenants: Tenants, adapter: Path, asking: Asking, requests: int, tokens: int,
    rounds: int, *, first_round: int = 0, prompt_chunk: int | None = None,
) -> Iterator[Record]:  # fmt: skip
    """The 99th percentile of the gaps between a stream's tokens: alone, and beside another tenant.

    The other asks its adapter all the time, and either uploads a new version for each request or
    does not. What swaps cost is the difference of these two; what the other's prompts and tokens
    cost, which share the stream's steps, is the rest. Of that little is left where the other asks
    for one token with one token.

    Args:
        url: of our server.
        tenants: the first has the stream.
        adapter: what the other uploads, with other values each time.
        asking: makes the requests.
        requests: of the stream in each round, one after another.
        tokens: of each answer.
        rounds: of all situations, in turns.
        first_round: number of the first; a round uploads what no round of another number has.
        prompt_chunk: tokens of a prompt that the server reads in a step; None for all.
    """
    loads: dict[str, list[Load]] = {name: [] for name in (_ALONE, *_SITUATIONS)}
    answers = dict.fromkeys(_SITUATIONS, 0)

    def stream() -> Load:
        asks = [asking.of(tenants.adapters[0]) for _ in range(requests)]
        return run_load(url, asks, 1, tokens)

    for number in range(first_round, first_round + rounds):
        loads[_ALONE].append(stream())
        # In turns, also which is first.
        turn = number % len(_SITUATIONS)
        for place, situation in enumerate((*_SITUATIONS[turn:], *_SITUATIONS[:turn])):
            first = (len(_SITUATIONS) * number + place) * _ROUND
            ask, answer = asking.of(tenants.mover), tokens
            if situation == _SWAPS_FOR_A_TOKEN:
                ask, answer = Ask(ask.target, ask.prompt[:1]), 1
            uploads = situation != _ASKS
            with _mover(url, ask, adapter, first, answer, uploads=uploads) as count:
                loads[situation].append(stream())
            answers[situation] += count()
    server: dict[str, str | int | float | bool | None] = {"server": "spallm", "concurrency": 1}
    if prompt_chunk is not None:
        server["prompt_chunk"] = prompt_chunk
    rates: dict[str, dict[str, str | int | float | bool | None]] = {
        situation: {"others_answers_per_s": round(count / _seconds(loads[situation]), 3)}
        for situation, count in answers.items()
    }
    for situation, found in loads.items():
        each_round = [_p99(load) for load in found]
        yield Record(
            bench="serve",
            case=server | {"stream": situation} | rates.get(situation, {}),
            metric="inter_token_p99_s",
            ours=round(latencies([each for load in found for each in load.streams]).gap_p99_s, 5),
            runs=rounds,
            spread=(round(min(each_round), 5), round(max(each_round), 5)),
        )
    for swapping, other in _COMPARED:
        pairs = zip(loads[swapping], loads[other], strict=True)
        ratios = [_p99(load) / _p99(without) for load, without in pairs]
        yield Record(
            bench="serve",
            case=server | rates[swapping] | {"stream": swapping, "over": other},
            metric="inter_token_p99_while_swapping_over",
            ours=round(statistics.median(ratios), 3),
            runs=rounds,
            spread=(round(min(ratios), 3), round(max(ratios), 3)),
        )


def _seconds(loads: list[Load]) -> float:
    return sum(load.seconds for load in loads)


def _p99(load: Load) -> float:
    return latencies(load.streams).gap_p99_s


@contextlib.contextmanager
def _mover(
    url: str, ask: Ask, adapter: Path, first: int, tokens: int, *, uploads: bool
) -> Iterator[Callable[[], int]]:
    """The other tenant, from its first answer on; afterwards one can ask how many it has had."""
    told = {
        "url": url, "model": ask.target.model, "key": ask.target.key, "prompt": ask.prompt,
        "adapter": str(adapter), "first": first, "tokens": tokens,
        "uploads": uploads,
    }  # fmt: skip
    done: list[int] = []
    with tempfile.TemporaryFile("w+") as problems:
        process = subprocess.Popen(
            [sys.executable, "-m", serve_mover.__name__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=problems, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # Not as an argument: everybody may read those, and there is a key in it.
            process.stdin.write(json.dumps(told) + "\n")
            process.stdin.flush()
            process.stdout.readline()  # the first answer is there, or it failed
            yield lambda: done[0]
        finally:
            process.terminate()
            said = process.communicate()[0]
        if process.returncode:
            problems.seek(0)
            raise UserError(f"the other tenant failed: {problems.read()[-1000:]}")
        done.append(int(said))
