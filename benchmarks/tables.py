"""Markdown tables out of result files, for the README."""

from __future__ import annotations

from spallm_serve.benchmarks.records import BenchmarkResults, Record

_HEADER = (
    "| method | setting | bits/weight | perplexity | KL to original | top-1 agreement | seconds |\n"
    "|---|---|---|---|---|---|---|"
)


def quality_table(found: BenchmarkResults) -> str:
    """One row a method and setting, most bits first."""
    rows = sorted(found.records, key=lambda record: -float(record.case["bits_per_weight"] or 0))
    return "\n".join([_HEADER, *(_quality_row(record) for record in rows)])


def _quality_row(record: Record) -> str:
    case = record.case
    value = record.ours if record.ours is not None else record.peer
    name = f"**{case['method']}**" if record.ours is not None else str(case["method"])
    cells = [
        name,
        str(case["setting"]),
        f"{case['bits_per_weight']:.2f}",
        f"{value:,.2f} ± {case['perplexity_standard_error']:.2g}",
        f"{case['kl']:.4f} ± {case['kl_standard_error']:.1g}",
        f"{case['top1_agreement']:.3f}",
        f"{case['seconds']:.0f}" if "seconds" in case else "",
    ]
    return "| " + " | ".join(cells) + " |"
