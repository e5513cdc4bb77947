"""Markdown tables out of result files."""

from __future__ import annotations

from spallm_serve.benchmarks.records import BenchmarkResults, Record
from spallm_serve.errors import UserError

# Column of the kernels' table -> tokens, tenants, metric and what is in the peer's name.
_KERNEL_COLUMNS = {
    "1 token": (1, 1, "time_s", "torch"),
    "8 tokens": (8, 1, "time_s", "torch"),
    "8 tokens, 8 tenants": (8, 8, "time_s", "torch"),
    "the same against LoRAs": (8, 8, "time_s", "LoRAs"),
    "64 tokens": (64, 1, "time_s", "torch"),
    "512 tokens": (512, 1, "time_s", "torch"),
    "gradient": (512, 1, "gradient_s", "dW"),
    "its memory": (512, 1, "gradient_bytes", "dW"),
}
_HEADER = (
    "| method | setting | bits/weight | perplexity | KL to original | top-1 agreement | seconds |\n"
    "|---|---|---|---|---|---|---|"
)


def result_table(found: BenchmarkResults) -> str:
    """Of a file of the kernels' benchmark or of that of quality.

    Raises:
        UserError: of another.
    """
    benches = {record.bench for record in found.records}
    if benches == {"kernels"}:
        return kernel_table(found)
    if all("bits_per_weight" in record.case for record in found.records):
        return quality_table(found)
    raise UserError(
        f"results of {', '.join(sorted(benches))}: expected those of kernels or quality"
    )


def kernel_table(found: BenchmarkResults) -> str:
    """One row a shape and number of bits: how many times better than each peer."""
    names = ["out x in", "bits", *_KERNEL_COLUMNS]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    rows: dict[tuple[str, int], list[Record]] = {}
    for record in found.records:
        if "rows" in record.case:
            shape = f"{record.case['rows']} x {record.case['columns']}"
            rows.setdefault((shape, int(record.case["bits"] or 0)), []).append(record)
    shapes = list(dict.fromkeys(shape for shape, _ in rows))
    for shape, bits in sorted(rows, key=lambda row: (shapes.index(row[0]), -row[1])):
        cells = [_kernel_cell(rows[shape, bits], *wanted) for wanted in _KERNEL_COLUMNS.values()]
        lines.append("| " + " | ".join([shape, str(bits), *cells]) + " |")
    return "\n".join(lines)


def _kernel_cell(records: list[Record], tokens: int, tenants: int, metric: str, peer: str) -> str:
    for record in records:
        case, name = record.case, record.peer_name or ""
        here = (case["tokens"], case["tenants"], record.metric) == (tokens, tenants, metric)
        if here and peer in name and record.ratio is not None:
            return f"{record.ratio:.2f}x" if record.ratio < 2 else f"{record.ratio:.1f}x"
    return ""


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
