"""Pictures of result files."""

from __future__ import annotations

from pathlib import Path

from spallm_serve.benchmarks.records import BenchmarkResults, Record

_COLOURS = {2: "#2a6f97", 3: "#e07a1f", 4: "#5a9a4a"}


def plot_kernels(found: BenchmarkResults, path: Path) -> None:
    """How many times faster than torch's linear, by tokens, a panel a shape.

    Solid for one tenant, dashed for the most that were measured: as many as tokens, up to 64.
    """
    from matplotlib.figure import Figure

    records = [
        record
        for record in found.records
        if record.metric == "time_s" and (record.peer_name or "").startswith("torch ")
    ]
    shapes = list(dict.fromkeys(_shape(record) for record in records))
    columns = min(3, len(shapes))
    rows = -(-len(shapes) // columns)
    figure = Figure(figsize=(4 * columns, 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, shape in zip(panels, shapes, strict=False):
        _plot_shape(panel, shape, [record for record in records if _shape(record) == shape])
    for panel in panels[len(shapes) :]:
        panel.set_visible(False)
    panels[0].legend(fontsize=8, frameon=False)
    accelerator = str(found.machine["accelerator"])
    where = accelerator if "cuda" in found.command else f"{found.machine['threads']} CPU threads"
    figure.suptitle(
        f"lut_linear against {records[0].peer_name}, {where}\n"
        "most tenants: as many as tokens, up to 64"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _shape(record: Record) -> tuple[str, int, int]:
    case = record.case
    return str(case["model"]), int(case["rows"] or 0), int(case["columns"] or 0)


def _plot_shape(panel, shape: tuple[str, int, int], records: list[Record]) -> None:  # type: ignore[no-untyped-def]
    for bits, colour in _COLOURS.items():
        for mixed, style in ((False, "-"), (True, "--")):
            points = sorted(_points(records, bits, mixed))
            label = f"{bits} bits{', most tenants' if mixed else ''}"
            panel.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=label)
    panel.axhline(1, color="#888888", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(ticks := sorted({int(record.case["tokens"] or 0) for record in records}))
    panel.set_xticklabels(map(str, ticks))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    panel.set_title(f"{shape[0]}, {shape[1]} x {shape[2]}", fontsize=9)
    panel.set_xlabel("tokens", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _points(records: list[Record], bits: int, mixed: bool) -> list[tuple[int, float]]:
    """(tokens, ratio) of one tenant, or of the most tenants that were measured at each count."""
    best: dict[int, tuple[int, float]] = {}
    for record in records:
        tokens, tenants = int(record.case["tokens"] or 0), int(record.case["tenants"] or 0)
        if record.case["bits"] != bits or record.ratio is None or (tenants > 1) > mixed:
            continue
        best[tokens] = max(best.get(tokens, (0, 0.0)), (tenants, record.ratio))
    return [
        (tokens, ratio) for tokens, (tenants, ratio) in best.items() if not mixed or tenants > 1
    ]


_STEP_METRICS = {
    "step_s": "time",
    "kept_activation_bytes": "kept activations",
    "flops": "operations",
}


def plot_training(found: BenchmarkResults, path: Path) -> None:
    """A step's time, kept activations and operations as shares of LoRA's, a group a variant."""
    from matplotlib.figure import Figure

    variants = list(dict.fromkeys(str(record.case["variant"]) for record in found.records))
    figure = Figure(figsize=(2 + 2.4 * len(variants), 3.6), layout="constrained")
    panel = figure.subplots()
    width = 0.8 / len(_STEP_METRICS)
    for place, (metric, label) in enumerate(_STEP_METRICS.items()):
        shares = {
            str(record.case["variant"]): record.ours / record.peer
            for record in found.records
            if record.metric == metric and record.ours is not None and record.peer
        }
        at = [number + (place - 1) * width for number in range(len(variants))]
        bars = panel.bar(
            at, [shares[name] for name in variants], width, label=label,
            color=list(_COLOURS.values())[place],
        )  # fmt: skip
        panel.bar_label(bars, fmt="%.2f", fontsize=8)
    panel.axhline(1, color="#888888", linewidth=0.8)
    panel.set_xticks(range(len(variants)), variants, fontsize=8)
    panel.set_ylabel("share of LoRA's", fontsize=8)
    panel.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"A training step against PEFT's LoRA, rank 16; {found.machine['threads']} CPU threads"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
