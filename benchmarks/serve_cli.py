"""The command of ``spallm-bench`` that measures servers over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from spallm_serve.benchmarks.command import (
    Dtype,
    Json,
    Model,
    Scratch,
    finish,
    measuring,
    model_directory,
)
from spallm_serve.errors import UserError

_CONCURRENCY = (1, 8, 32)
_TENANTS = (0, 1, 8, 64)
_RANKS = (16, 64)


def serve(
    model: Model = None,
    blocks: Annotated[
        int, typer.Option(help="Blocks of a random Llama, 2048 wide; 0 is the model.")
    ] = 0,
    base: Annotated[
        Optional[Path], typer.Option(help="What was made of the model; default: made here.")
    ] = None,
    bits: Annotated[int, typer.Option(help="Of a base that is made here.")] = 4,
    concurrency: Annotated[
        Optional[list[int]], typer.Option(help="Requests at a time; repeat it.")
    ] = None,
    tenants: Annotated[
        Optional[list[int]],
        typer.Option(help="Distinct ones; 0 is the base alone, always measured; repeat it."),
    ] = None,
    requests: Annotated[
        int, typer.Option(help="Of each mixture in each round; the concurrency at least.")
    ] = 32,
    tokens: Annotated[int, typer.Option(help="Each is answered with.")] = 32,
    rounds: Annotated[int, typer.Option(help="Of all mixtures, in turns.")] = 3,
    slots: Annotated[int, typer.Option(help="Adapters that a step can mix; peers', too.")] = 32,
    rank: Annotated[
        Optional[list[int]], typer.Option(help="Of the peers' LoRAs; repeat it.")
    ] = None,
    dtype: Dtype = "bfloat16",
    peers: Annotated[bool, typer.Option(help="Measure vLLM's own server, too.")] = True,
    plot: Annotated[
        Optional[Path], typer.Option(help="Where a PNG of throughput by tenants goes.")
    ] = None,
    scratch: Scratch = None,
    json: Json = None,
) -> None:
    """Throughput and latency over HTTP with many tenants, beside vLLM with LoRAs.

    Also times from an upload to its first token and from each tier, what one tenant's swaps cost
    another, and bytes per tenant.
    """
    with measuring(scratch) as folder:
        from spallm_serve.benchmarks.model import write_random_llama
        from spallm_serve.benchmarks.quick_base import quick_base
        from spallm_serve.benchmarks.serve import serve_records
        from spallm_serve.benchmarks.serve_cells import Plan
        from spallm_serve.benchmarks.serve_mixture import mixtures

        levels, numbers = tuple(concurrency or _CONCURRENCY), tuple(tenants or _TENANTS)
        if min(*levels, requests, rounds, slots, 1) < 1 or min(numbers) < 0 or tokens < 2:
            raise UserError("counts are 1 or more, --tenants 0 or more, --tokens 2 or more")
        if blocks:
            source = folder / f"llama-{blocks}"
            if not source.is_dir():
                write_random_llama(source, blocks)
        else:
            source = model_directory(model, folder)
        served = base or quick_base(source, folder / f"{source.name}-{bits}bit", {"bits": bits})
        plan = Plan(
            concurrency=levels,
            mixtures=tuple(mixtures(sorted(set(numbers)))),
            requests=requests,
            tokens=tokens,
            slots=slots,
            rounds=rounds,
            ranks=tuple(rank or _RANKS),
            dtype=dtype,
        )
        found = finish(serve_records(source, served, folder, plan, peers=peers), json)
        if plot is not None:
            from spallm_serve.benchmarks.serve_plot import plot_serve

            plot_serve(found, plot)
