"""vLLM's own server under the same load: the original, and with LoRAs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from spallm_serve.benchmarks import serve_stock
from spallm_serve.benchmarks.engine import make_loras
from spallm_serve.benchmarks.records import Record
from spallm_serve.benchmarks.serve_cells import Cell, Figures, Plan, cell_records, measure_cells
from spallm_serve.benchmarks.serve_client import Target, run_load
from spallm_serve.benchmarks.serve_mixture import Asking
from spallm_serve.benchmarks.serve_process import ServerProcess, server_process
from spallm_serve.errors import UserError

_NAME = "base"


def peer_records(
    model: Path, vocabulary: int, run: Path, plan: Plan, ours: dict[Cell, Figures]
) -> Iterator[Record]:
    """All peers, one after another.

    Args:
        model: the original.
        vocabulary: its tokens.
        run: folder for LoRAs and logs.
        plan: what is measured; of the base without adapters only the mixture without tenants.
        ours: cells of our server.
    """
    yield from _peer_records(model, vocabulary, run, replace(plan, mixtures=()), ours, None)
    if plan.tenants:
        for rank in plan.ranks:
            yield from _peer_records(model, vocabulary, run, plan, ours, rank)


def _peer_records(
    model: Path,
    vocabulary: int,
    run: Path,
    plan: Plan,
    ours: dict[Cell, Figures],
    rank: int | None,
) -> Iterator[Record]:
    loras = make_loras(model, run / f"loras-{rank}", plan.tenants, rank) if rank else []
    names = [f"tenant-{number}" for number in range(len(loras))]
    flags: list[object] = [*plan.engine_flags(model), "--served-model-name", _NAME]
    if rank:
        flags += ["--enable-lora", "--max-lora-rank", rank, "--max-loras", plan.slots]
        flags += ["--max-cpu-loras", max(plan.slots, len(loras)), "--lora-modules"]
        flags += [f"{name}={path}" for name, path in zip(names, loras, strict=True)]
    # On a CPU vLLM compiles nothing once LoRAs are enabled, whatever it is told.
    may_compile = rank is None or torch.cuda.is_available()
    log = run / f"vllm-{rank}.log"
    with _best_server(model, flags, log, may_compile=may_compile) as (process, compiled):
        name = f"vLLM, {plan.dtype}{f', LoRAs of rank {rank}' if rank else ''}, {compiled}"
        asking = Asking(Target(_NAME), [Target(each) for each in names], vocabulary)
        # The first use of each is no part of the load.
        run_load(process.url, asking.everybody(), 1, plan.tokens)
        yield from cell_records(name, dict(measure_cells(process.url, asking, plan)), ours)
        yield Record(
            bench="serve",
            case={"server": name, "tenants": plan.tenants},
            metric="resident_bytes",
            peer=process.resident_bytes(),
            peer_name=name,
        )


@contextlib.contextmanager
def _best_server(
    model: Path, flags: list[object], log: Path, *, may_compile: bool
) -> Iterator[tuple[ServerProcess, str]]:
    """A server that compiles its model, or else one that does not; and which it is."""
    command = [sys.executable, "-m", serve_stock.__name__, "--model", model, *flags]
    eager = [*command, "--enforce-eager"]
    # No plugins: ours would be loaded with the others.
    environment = {"VLLM_PLUGINS": ""}
    with contextlib.ExitStack() as opened:
        if may_compile:
            try:
                process = opened.enter_context(server_process(command, log, "/health", environment))
            except UserError as error:
                Console(stderr=True).print(f"compiled it did not start: {error}", markup=False)
                may_compile = False
        if not may_compile:
            process = opened.enter_context(server_process(eager, log, "/health", environment))
        yield process, "compiled" if may_compile else "eager"
