"""Every mixture of tenants at every concurrency, in turns, on a server that runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spallm_serve.benchmarks.model import has_tokenizer
from spallm_serve.benchmarks.records import Record
from spallm_serve.benchmarks.serve_client import Load, latencies, run_load
from spallm_serve.benchmarks.serve_mixture import PROMPT_TOKENS, Asking, Mixture

_BASE = Mixture(0, "base")


@dataclass(frozen=True)
class Plan:
    """What is measured of every server.

    Attributes:
        concurrency: requests at a time, each number in turn.
        mixtures: of tenants; the base alone is measured in any case.
        requests: of each mixture in each round, as many as the concurrency at least.
        tokens: each is answered with.
        slots: adapters that a step can mix.
        rounds: of all mixtures at a concurrency.
        ranks: of the peers' LoRAs, a server for each.
        dtype: of all servers' activations.
    """

    concurrency: tuple[int, ...]
    mixtures: tuple[Mixture, ...]
    requests: int
    tokens: int
    slots: int
    rounds: int
    ranks: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    @property
    def tenants(self) -> int:
        """The most of any mixture."""
        return max((mixture.tenants for mixture in self.mixtures), default=0)

    def engine_flags(self, model: Path) -> list[object]:
        """vLLM's flags that all servers share.

        Args:
            model: directory; one without a tokenizer is served without.
        """
        flags = ["--dtype", self.dtype, "--max-model-len", PROMPT_TOKENS + self.tokens]
        flags += ["--max-num-seqs", max(self.concurrency)]
        if not has_tokenizer(model):
            flags.append("--skip-tokenizer-init")
        return flags


@dataclass(frozen=True)
class Cell:
    """A mixture at a concurrency."""

    concurrency: int
    mixture: Mixture


@dataclass(frozen=True)
class Figure:
    """A figure of a cell: its value, and the lowest and highest of the rounds."""

    value: float
    spread: tuple[float, float]


# By metric.
Figures = dict[str, Figure]


def measure_cells(url: str, asking: Asking, plan: Plan) -> Iterator[tuple[Cell, Figures]]:
    """Measure; the mixtures at one concurrency take turns, so that their ratios do not depend on
    what else the machine does.

    Args:
        url: of the server.
        asking: makes its requests.
        plan: what is asked.

    Raises:
        UserError: a request failed.
    """
    several = tuple(mixture for mixture in plan.mixtures if mixture.tenants)
    for concurrency in plan.concurrency:
        count = max(plan.requests, concurrency)
        loads: dict[Mixture, list[Load]] = {mixture: [] for mixture in (_BASE, *several)}
        # The first load of its size warms up.
        most = asking.mixed(several[-1] if several else _BASE, concurrency, seed=0)
        run_load(url, most, concurrency, plan.tokens)
        for number in range(plan.rounds):
            for mixture, taken in loads.items():
                asks = asking.mixed(mixture, count, seed=number)
                taken.append(run_load(url, asks, concurrency, plan.tokens))
        for mixture, taken in loads.items():
            figures = _figures(taken)
            if mixture.tenants:
                figures["share_of_base_only"] = _share(taken, loads[_BASE])
            yield Cell(concurrency, mixture), figures


def cell_records(
    server: str, found: dict[Cell, Figures], ours: dict[Cell, Figures] | None = None
) -> Iterator[Record]:
    """Figures as records.

    Args:
        server: whose they are.
        found: its cells.
        ours: those of our own server, where this is a peer.
    """
    for cell, figures in found.items():
        case: dict[str, str | int | float | bool | None] = {
            "server": server, "concurrency": cell.concurrency,
            "tenants": cell.mixture.tenants, "mixture": cell.mixture.choice,
        }  # fmt: skip
        for metric, figure in figures.items():
            higher = metric in ("output_tokens_per_s", "share_of_base_only")
            record = Record(
                bench="serve",
                case=case,
                metric=metric,
                ours=figure.value,
                better="higher" if higher else "lower",
                spread=figure.spread,
            )
            if ours is not None:
                record = _beside(record, ours[cell][metric].value)
            yield record


def _beside(peer: Record, ours: float) -> Record:
    """A peer's record with our figure of the same cell."""
    assert peer.ours is not None
    ratio = ours / peer.ours if peer.better == "higher" else peer.ours / ours
    return peer.model_copy(
        update={
            "ours": ours,
            "peer": peer.ours,
            "peer_name": str(peer.case["server"]),
            "ratio": round(ratio, 3),
        }
    )


def _figures(loads: Sequence[Load]) -> Figures:
    throughputs = [load.tokens_per_s for load in loads]
    figures = {"output_tokens_per_s": _figure(statistics.median(throughputs), throughputs)}
    whole = latencies([stream for load in loads for stream in load.streams])
    rounds = [latencies(load.streams) for load in loads]
    for metric, field in (
        ("ttft_median_s", "first_median_s"),
        ("ttft_p99_s", "first_p99_s"),
        ("inter_token_median_s", "gap_median_s"),
        ("inter_token_p99_s", "gap_p99_s"),
    ):
        figures[metric] = _figure(getattr(whole, field), [getattr(each, field) for each in rounds])
    return figures


def _share(loads: Sequence[Load], base: Sequence[Load]) -> Figure:
    shares = [own.tokens_per_s / alone.tokens_per_s for own, alone in zip(loads, base, strict=True)]
    return _figure(statistics.median(shares), shares)


def _figure(value: float, rounds: Sequence[float]) -> Figure:
    return Figure(_rounded(value), (_rounded(min(rounds)), _rounded(max(rounds))))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
