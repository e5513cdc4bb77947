"""A finished run as a page to read in a browser."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from spallm_serve.compressor.record import CompressionRecord, LayerRecord, TableSample
from spallm_serve.report import (
    INK,
    MUTED,
    PAPER,
    RULE,
    Card,
    Column,
    Figure,
    Legend,
    Mark,
    Note,
    Number,
    Report,
    Row,
    Section,
    Table,
    format_bytes,
    format_share,
    render,
    series_colour,
    series_dash,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHORT_DIGEST = 8
_HISTOGRAM_BINS = 40
# The running mean of the distillation's loss spans this share of its steps.
_SMOOTHED_SHARE = 0.05
_PARTS = {
    "codes": "Codes",
    "tables": "Tables",
    "other": "Untouched weights",
    "estimators": "Estimators",
}


def write_report(record: CompressionRecord, path: Path) -> None:
    """Write the report of a run; the same record always gives the same bytes."""
    path.write_text(render(_report(record)), encoding="utf-8", newline="\n")


def _report(record: CompressionRecord) -> Report:
    sections = [_size_section(record), _error_section(record)]
    if record.samples:
        sections.append(_sample_section(record.samples))
    if record.refine_losses:
        sections.append(_refine_section(record.refine_losses))
    sections.append(_layer_section(record))
    sections.append(Section("Settings", settings=_settings(record)))
    if record.skipped:
        sections.append(
            Section(f"Linears left as they were ({len(record.skipped)})", names=record.skipped)
        )
    return Report("Compression report", record.model, _cards(record), sections)


def _cards(record: CompressionRecord) -> list[Card]:
    size = sum(record.sizes.values())
    skipped = f"{len(record.skipped)} left as they were" if record.skipped else "none left out"
    original = format_bytes(record.original_bytes)
    smaller = f"of {original}: {record.original_bytes / size:.2f} times smaller"
    cards = [
        Card("Bits per weight", f"{record.bits_per_weight:.3f}", "codes and tables counted"),
        Card("Compressed size", format_bytes(size), smaller),
        Card("Compressed layers", f"{len(record.layers):,}", skipped),
    ]
    if record.layers:
        middle = median(layer.relative_error for layer in record.layers)
        cards.append(Card("Median relative error", format_share(middle), "of a layer's output"))
    cards.append(Card("Base", record.base_digest[:_SHORT_DIGEST], "start of the base digest"))
    return cards


def _size_section(record: CompressionRecord) -> Section:
    parts = [(name, record.sizes[name]) for name in _PARTS if record.sizes[name]]
    total = sum(size for _, size in parts)

    def draw(axes: Axes) -> None:
        left = 0.0
        for index, (_, size) in enumerate(parts):
            width = size / 1e6
            axes.barh(0, width, left=left, color=series_colour(index), edgecolor=PAPER)
            left += width
        axes.barh(1, record.original_bytes / 1e6, color=RULE)
        axes.set_yticks([1, 0], ["original", "compressed"])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("MB")

    rows = [
        Row((_PARTS[name], Number(f"{size:,}", size), format_share(size / total)))
        for name, size in parts
    ]
    rows.append(Row(("All", Number(f"{total:,}", total), format_share(1.0))))
    rows.append(Row(("Original", record.original_bytes, "–")))
    counts = record.weight_counts
    text = [
        f"{counts['compressed']:,} weights are in compressed layers, {counts['other']:,} were "
        "left as they were."
    ]
    if record.sizes["estimators"]:
        text.append("The estimators serve the training of adapters; inference does not read them.")
    figure = Figure(
        "Bytes by what they hold",
        draw,
        legend=[Legend(_PARTS[name], index) for index, (name, _) in enumerate(parts)],
        height=150,
        wide=True,
    )
    columns = [Column("Part"), Column("Bytes", numeric=True), Column("Share", numeric=True)]
    return Section("Size", text=text, figures=[figure], tables=[Table(columns, rows)])


def _error_section(record: CompressionRecord) -> Section:
    lines = _errors_by_kind(record.layers)
    text = [
        "The relative error of a layer is tr(D H Dᵀ) / tr(W H Wᵀ): W is the weight aimed at, D "
        "what the sketch misses it by and H the Hessian of the layer's inputs. It is the energy "
        "of the output's error as a share of the output's energy."
    ]
    if record.refine_losses:
        text.append("It was measured before the distillation, which changed the tables again.")
    if not lines:
        return Section("Error by depth", text=text)

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator, NullLocator

        for index, line in enumerate(lines.values()):
            axes.plot(
                *zip(*line, strict=True),
                color=series_colour(index),
                linestyle=series_dash(index),
                linewidth=1.4,
                marker="o",
                markersize=3,
            )
        ticks = _log_ticks([error for line in lines.values() for _, error in line])
        axes.set_yscale("log")
        axes.set_ylim(ticks[0], ticks[-1])
        axes.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(axis="y")
        axes.set_xlabel("block")
        axes.set_ylabel("relative error")

    figure = Figure(
        "Relative error by depth",
        draw,
        caption="Logarithmic. Layers of one kind in the same block, such as experts, are averaged; "
        "layers outside the blocks and errors of zero are in the table only.",
        legend=[Legend(kind, index) for index, kind in enumerate(lines)],
        height=340,
        wide=True,
    )
    return Section("Error by depth", text=text, figures=[figure])


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Ticks from below the least of the values to above the greatest: 1, 2 and 5 of each decade,
    or the decades alone where there are many."""
    low, high = min(values), max(values)
    factors = (1, 2, 5) if high < 100 * low else (1,)
    decades = range(math.floor(math.log10(low)) - 1, math.floor(math.log10(high)) + 2)
    steps = [factor * 10.0**decade for decade in decades for factor in factors]
    first = max(at for at, step in enumerate(steps) if step <= low)
    last = min(at for at, step in enumerate(steps) if step >= high)
    return steps[first : max(last, first + 1) + 1]


def _errors_by_kind(layers: Sequence[LayerRecord]) -> dict[str, list[tuple[int, float]]]:
    """(block, mean relative error) pairs by kind of layer, in the order of the model."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for layer in layers:
        parts = layer.name.split(".")
        block = next((at for at, part in enumerate(parts) if part.isdecimal()), None)
        if block is not None and 0 < layer.relative_error < math.inf:
            kind = ".".join(part for part in parts[block + 1 :] if not part.isdecimal())
            found[kind][int(parts[block])].append(layer.relative_error)
    last_parts = [kind.rpartition(".")[2] for kind in found]
    # GPT-2 has a c_proj in its attention and another in its MLP: the last part alone is not enough.
    short = len(set(last_parts)) == len(last_parts)
    return {
        kind.rpartition(".")[2] if short else kind: sorted(
            (block, fmean(errors)) for block, errors in by_block.items()
        )
        for kind, by_block in found.items()
    }


def _sample_section(samples: Sequence[TableSample]) -> Section:
    return Section(
        "Tables and the weights they stand for",
        text=[
            "Each plot is one row of a layer (its first column group): how its original weights "
            "are spread, and the entries of its table."
        ],
        figures=[_sample_figure(sample) for sample in samples],
    )


def _sample_figure(sample: TableSample) -> Figure:
    def draw(axes: Axes) -> None:
        axes.hist(sample.weights, bins=_HISTOGRAM_BINS, color=MUTED, alpha=0.45)
        axes.vlines(
            sample.table,
            0,
            1,
            transform=axes.get_xaxis_transform(),
            color=series_colour(1),
            linewidth=1.3,
        )
        axes.set_xlabel("weight")
        axes.set_ylabel("weights per bin")

    return Figure(
        f"{sample.layer}, row {sample.row}",
        draw,
        caption=f"{len(sample.weights):,} weights, {len(sample.table)} table entries (lines)",
        height=230,
    )


def _refine_section(losses: Sequence[float]) -> Section:
    steps = range(1, len(losses) + 1)
    span = max(1, round(_SMOOTHED_SHARE * len(losses)))
    smoothed = [fmean(losses[max(0, step - span) : step]) for step in steps]

    def draw(axes: Axes) -> None:
        axes.plot(steps, losses, color=INK, alpha=0.3, linewidth=0.8)
        axes.plot(steps, smoothed, color=series_colour(0), linewidth=1.8)
        axes.margins(x=0.02)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_xlabel("step")
        axes.set_ylabel("KL divergence, nats per token")

    caption = f"Thin: each step. Thick: mean of the last {span} steps."
    figure = Figure("Loss by step", draw, caption if span > 1 else "", wide=True)
    return Section("Distillation from the original", figures=[figure])


def _layer_section(record: CompressionRecord) -> Section:
    layers = record.layers
    with_estimators = any(layer.estimator_energy is not None for layer in layers)
    columns = [Column("Layer", code=True)] + [
        Column(title, numeric=True)
        for title in ("Shape", "Bits", "Groups", "Bits/weight", "Rel. error", "Damping", "Raises")
    ]
    if with_estimators:
        columns.append(Column("Est. energy", numeric=True))
    rows = [_layer_row(layer, with_estimators) for layer in layers]
    text = []
    if with_estimators:
        text.append(
            "Estimator energy is the share of the squared weight that the SVD estimator keeps."
        )
    notes = _damping_notes(record)
    if not notes and layers:
        text.append("Every Hessian could be factored with the damping that was set.")
    table = Table(columns, rows, sortable=True)
    return Section("Layers", text=text, notes=notes, tables=[table])


def _damping_notes(record: CompressionRecord) -> list[Note]:
    notes = []
    unweighted = sum(layer.unweighted for layer in record.layers)
    if unweighted:
        layers, were = ("layer", "it was") if unweighted == 1 else ("layers", "they were")
        text = (
            f"The Hessian of {unweighted} {layers} could not be factored; {were} rounded without "
            "it: to plain tables, with no error feedback and no refit."
        )
        notes.append(Note(text, "warning"))
    raised = sum(layer.damping_raises > 0 and not layer.unweighted for layer in record.layers)
    if raised:
        layers = "layer" if raised == 1 else "layers"
        text = (
            f"The Hessian of {raised} {layers} could not be factored with a damping of "
            f"{record.settings.damping:g}, which was raised until it could."
        )
        notes.append(Note(text, "notice"))
    return notes


def _layer_row(layer: LayerRecord, with_estimators: bool) -> Row:
    mark: Mark = ""
    if layer.unweighted:
        mark = "warning"
    elif layer.damping_raises:
        mark = "notice"
    cells: list[str | int | Number] = [
        layer.name,
        Number(f"{layer.rows:,} × {layer.columns:,}", layer.rows * layer.columns),
        layer.bits,
        layer.groups_per_row,
        Number(f"{layer.bits_per_weight:.3f}", layer.bits_per_weight),
        Number(format_share(layer.relative_error), layer.relative_error),
        Number("unweighted" if layer.unweighted else f"{layer.damping:g}", layer.damping),
        layer.damping_raises,
    ]
    if with_estimators:
        energy = layer.estimator_energy
        cells.append(Number("–", -1) if energy is None else Number(format_share(energy), energy))
    return Row(cells, mark)


def _settings(record: CompressionRecord) -> dict[str, str]:
    named = {name.replace("_", " "): _setting(value) for name, value in record.settings}
    tokens = {"calibration tokens": f"{record.calibration_tokens:,}"}
    return tokens | named | {"base digest": record.base_digest}


def _setting(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        parts = [part if isinstance(part, tuple) else (part,) for part in value]
        return ", ".join("=".join(map(str, part)) for part in parts)
    return str(value)
