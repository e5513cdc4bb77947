"""One tenant's stream alone, and while another uploads versions and asks for them in a loop.

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


def swap_records(
    url: str, tenants: Tenants, adapter: Path, asking: Asking, requests: int, tokens: int,
    rounds: int,
) -> Iterator[Record]:  # fmt: skip
    """The 99th percentile of the gaps between a stream's tokens, in both situations.

    Args:
        url: of our server.
        tenants: the first has the stream.
        adapter: what the other uploads, with other values each time.
        asking: makes the requests.
        requests: of the stream in each round, one after another.
        tokens: of each answer.
        rounds: of both situations, in turns.
    """
    alone: list[Load] = []
    beside: list[Load] = []
    swaps = 0

    def stream() -> Load:
        asks = [asking.of(tenants.adapters[0]) for _ in range(requests)]
        return run_load(url, asks, 1, tokens)

    for number in range(rounds):
        alone.append(stream())
        first = number * _ROUND
        with _mover(url, asking.of(tenants.mover), adapter, first, tokens) as count:
            beside.append(stream())
        swaps += count()
    ratios = [_p99(both) / _p99(one) for both, one in zip(beside, alone, strict=True)]
    for situation, loads in (("alone", alone), ("another tenant swaps", beside)):
        found = [_p99(load) for load in loads]
        yield Record(
            bench="serve",
            case={"server": "spallm", "concurrency": 1, "stream": situation},
            metric="inter_token_p99_s",
            ours=round(latencies([each for load in loads for each in load.streams]).gap_p99_s, 5),
            runs=rounds,
            spread=(round(min(found), 5), round(max(found), 5)),
        )
    seconds = sum(load.seconds for load in beside)
    yield Record(
        bench="serve",
        case={"server": "spallm", "concurrency": 1, "swaps_per_s": round(swaps / seconds, 3)},
        metric="inter_token_p99_while_swapping_over_alone",
        ours=round(statistics.median(ratios), 3),
        runs=rounds,
        spread=(round(min(ratios), 3), round(max(ratios), 3)),
    )


def _p99(load: Load) -> float:
    return latencies(load.streams).gap_p99_s


@contextlib.contextmanager
def _mover(
    url: str, ask: Ask, adapter: Path, first: int, tokens: int
) -> Iterator[Callable[[], int]]:
    """The other tenant, from its first swap on; afterwards one can ask how many it has done."""
    told = {
        "url": url, "model": ask.target.model, "key": ask.target.key, "prompt": ask.prompt,
        "adapter": str(adapter), "first": first, "tokens": tokens,
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
            process.stdout.readline()  # the first swap is done, or it failed
            yield lambda: done[0]
        finally:
            process.terminate()
            said = process.communicate()[0]
        if process.returncode:
            problems.seek(0)
            raise UserError(f"the tenant that swaps failed: {problems.read()[-1000:]}")
        done.append(int(said))
