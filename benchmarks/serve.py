"""Load over HTTP: our server with many tenants, beside vLLM's own with the base and with LoRAs."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from spallm_serve.benchmarks.engine import make_tables
from spallm_serve.benchmarks.records import Record
from spallm_serve.benchmarks.serve_cells import Cell, Figures, Plan, cell_records, measure_cells
from spallm_serve.benchmarks.serve_client import run_load
from spallm_serve.benchmarks.serve_mixture import Asking
from spallm_serve.benchmarks.serve_ours import (
    Tenants,
    make_tenants,
    our_server,
    residency,
)
from spallm_serve.benchmarks.serve_peers import peer_records
from spallm_serve.benchmarks.serve_process import ServerProcess
from spallm_serve.benchmarks.serve_swaps import swap_records
from spallm_serve.benchmarks.serve_tiers import first_token_records, tier_records
from spallm_serve.benchmarks.serve_upload import adapter_bytes, upload
from spallm_serve.benchmarks.weights import weights_record

_NAME = "spallm"
# The tiers are told apart by adapters that take turns.
_FEWEST_ADAPTERS = 2
# Tokens of a prompt that a step reads, where answers of others are to come evenly.
_PROMPT_CHUNK = 8


def serve_records(
    model: Path, base: Path, folder: Path, plan: Plan, *, peers: bool
) -> Iterator[Record]:
    """All that is measured, one server after another.

    Args:
        model: the original.
        base: what was made of it.
        folder: for adapters, stores and logs, which go away.
        plan: the load.
        peers: measure vLLM's own server, too.
    """
    yield weights_record(model, base)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="serve-", dir=folder) as temporary:
        run = Path(temporary)
        adapters = make_tables(base, run / "tables", max(plan.tenants, _FEWEST_ADAPTERS))
        store = run / "store"
        tenants = make_tenants(store, len(adapters))
        asking = Asking(tenants.base, tenants.adapters, vocabulary)
        flags = plan.engine_flags(base)
        ours: dict[Cell, Figures] = {}
        with our_server(base, store, plan.slots, flags) as process:
            yield from _upload_records(process.url, tenants, adapters, asking, plan.tokens)
            ours |= measure_cells(process.url, asking, plan)
            yield from cell_records(_NAME, ours)
            yield from _memory_records(process, tenants, adapters)
            yield from swap_records(
                process.url, tenants, adapters[0], asking, plan.requests, plan.tokens, plan.rounds
            )
        chunk = ["--long-prefill-token-threshold", _PROMPT_CHUNK]
        with our_server(base, store, plan.slots, [*flags, *chunk]) as process:
            run_load(process.url, [asking.of(tenants.base)], 1, plan.tokens)  # warms up
            yield from swap_records(
                process.url, tenants, adapters[0], asking, plan.requests, plan.tokens, plan.rounds,
                first_round=plan.rounds, prompt_chunk=_PROMPT_CHUNK,
            )  # fmt: skip
        yield from tier_records(base, store, tenants, asking, flags, plan.tokens)
        if peers:
            yield from peer_records(model, vocabulary, run, plan, ours)


def _upload_records(
    url: str, tenants: Tenants, adapters: list[Path], asking: Asking, tokens: int
) -> Iterator[Record]:
    """Upload an adapter for each tenant, and ask it as soon as the upload is done."""
    run_load(url, [asking.of(tenants.base)], 1, tokens)  # the first request of all warms up
    uploads, streams = [], []
    for target, folder in zip(tenants.adapters, adapters, strict=True):
        uploads.append(upload(url, target, *adapter_bytes(folder)))
        streams += run_load(url, [asking.of(target)], 1, tokens).streams
    yield Record(
        bench="serve",
        case={"server": _NAME, "adapter_bytes": _size(adapters[0])},
        metric="upload_s",
        ours=round(statistics.median(uploads), 4),
        runs=len(uploads),
        spread=(round(min(uploads), 4), round(max(uploads), 4)),
    )
    yield from first_token_records({"adapter_in": "an upload that has just finished"}, streams)


def _memory_records(
    process: ServerProcess, tenants: Tenants, adapters: list[Path]
) -> Iterator[Record]:
    """Bytes of a tenant wherever it is, and the server's resident memory with all of them."""
    facts = residency(process.url, tenants.admin)
    per_tenant = {
        "store": _size(adapters[0]),
        "memory": round(facts["host_bytes"] / len(facts["host"])),
        "slot": facts["slot_bytes"],
    }
    for place, size in per_tenant.items():
        yield Record(
            bench="serve",
            case={"server": _NAME, "place": place},
            metric="bytes_per_tenant",
            ours=size,
        )
    yield Record(
        bench="serve",
        case={"server": _NAME, "tenants": len(adapters)},
        metric="resident_bytes",
        ours=process.resident_bytes(),
    )


def _size(adapter: Path) -> int:
    return sum(file.stat().st_size for file in adapter.iterdir())
