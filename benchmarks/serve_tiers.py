"""How long the first token takes, by where the adapter is when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from spallm_serve.benchmarks.records import Record
from spallm_serve.benchmarks.serve_client import Stream, Target, latencies, run_load
from spallm_serve.benchmarks.serve_mixture import Asking
from spallm_serve.benchmarks.serve_ours import Tenants, our_server, residency
from spallm_serve.errors import UserError


def tier_records(
    base: Path,
    store: Path,
    tenants: Tenants,
    asking: Asking,
    engine_flags: Sequence[object],
    tokens: int,
) -> Iterator[Record]:
    """Time to the first token from the store, from memory and from a slot, on a fresh server.

    It has one slot, so that whoever is asked after somebody else is not in it. What comes from the
    store was not used since the start; its files may be in the system's cache.

    Args:
        base: what is served.
        store: has the tenants' adapters, two at least.
        tenants: theirs.
        asking: makes the requests.
        engine_flags: for vLLM.
        tokens: of each answer.
    """
    with our_server(base, store, 1, engine_flags) as process:

        def ask(target: Target) -> Stream:
            (stream,) = run_load(process.url, [asking.of(target)], 1, tokens).streams
            return stream

        ask(tenants.base)  # the first request of all warms up
        streams: dict[str, list[Stream]] = {
            "store": [ask(target) for target in tenants.adapters], "memory": [], "slot": [],
        }  # fmt: skip
        held = residency(process.url, tenants.admin)["host"]
        if len(held) < len(tenants.adapters):
            raise UserError(
                f"memory holds {len(held)} adapters of {len(tenants.adapters)}: measure fewer"
            )
        for target in tenants.adapters:
            streams["memory"].append(ask(target))
            streams["slot"].append(ask(target))
    for tier, found in streams.items():
        yield from first_token_records({"adapter_in": tier}, found)


def first_token_records(
    case: dict[str, str | int | float | bool | None], streams: Sequence[Stream]
) -> Iterator[Record]:
    """Median and 99th percentile of the time to the first token."""
    found = latencies(streams)
    firsts = [stream.first_s for stream in streams]
    for metric, seconds in (
        ("ttft_median_s", found.first_median_s), ("ttft_p99_s", found.first_p99_s),
    ):  # fmt: skip
        yield Record(
            bench="serve",
            case={"server": "spallm", "concurrency": 1, **case},
            metric=metric,
            ours=round(seconds, 4),
            runs=len(streams),
            spread=(round(min(firsts), 4), round(max(firsts), 4)),
        )
