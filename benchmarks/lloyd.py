"""How long the tables of one 4096 x 4096 matrix take on one core."""

from __future__ import annotations

import statistics
import time

import torch

from spallm_serve.benchmarks.records import Record
from spallm_serve.compressor.lloyd import lloyd_tables

_SIZE = 4096
_RUNS = 5


def lloyd_records() -> list[Record]:
    """Median seconds at 4, 8 and 16 clusters, one thread, Gaussian weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(_SIZE, _SIZE, generator=generator)
        weights = torch.rand(_SIZE, generator=generator)
        lloyd_tables(values[:64], weights, 4)
        return [_timed(values, weights, bits) for bits in (2, 3, 4)]
    finally:
        torch.set_num_threads(threads)


def _timed(values: torch.Tensor, weights: torch.Tensor, bits: int) -> Record:
    seconds = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        lloyd_tables(values, weights, 1 << bits)
        seconds.append(time.perf_counter() - started)
    return Record(
        bench="lloyd",
        case={"rows": _SIZE, "columns": _SIZE, "bits": bits, "threads": 1},
        metric="time_s",
        ours=statistics.median(seconds),
        runs=_RUNS,
        spread=(min(seconds), max(seconds)),
    )
