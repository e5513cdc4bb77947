"""What ``spallm-compress`` does once its options are understood: progress, summary, dry run."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from spallm_serve.compressor.estimate import estimate_run
from spallm_serve.compressor.pipeline import compress
from spallm_serve.compressor.publish import REPORT_FILE
from spallm_serve.compressor.record import CompressionRecord, LayerRecord
from spallm_serve.compressor.run_directory import check_output
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.errors import UserError
from spallm_serve.heap import peak_resident_bytes
from spallm_serve.models import open_source

_MIB = 1 << 20


class RichObserver:
    """Shows stage, blocks done, time left and the current layer's loss on the terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
        )
        self._task = self._progress.add_task("starting", total=None, unit="", note="")

    def __enter__(self) -> RichObserver:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def stage(self, title: str, total: int, unit: str) -> None:
        """A new bar, in the place of the last."""
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(title, total=total, unit=unit, note="")

    def step(self, done: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done)

    def layer(self, record: LayerRecord) -> None:
        """Show the layer and its loss behind the bar; a fall-back stays on the screen."""
        note = f"{record.name} {record.relative_error:.2e}"
        self._progress.update(self._task, note=note)
        if record.unweighted:
            self._console.print(
                f"[yellow]warning:[/] {record.name}: its Hessian could not be factored at any "
                "damping; rounded without it"
            )
        elif record.damping_raises:
            self._console.print(
                f"[yellow]warning:[/] {record.name}: damping raised to {record.damping:g}"
            )

    def refined(self, loss: float) -> None:
        """Show the loss behind the bar."""
        self._progress.update(self._task, note=f"KL {loss:.4f} nats/token")

    def resumed(self, blocks: int) -> None:
        """Say that earlier work is used."""
        self._console.print(f"resuming an unfinished run: {blocks} blocks were done")


def run_command(
    model: str, output: Path | None, settings: CompressSettings, *, dry_run: bool, resume: bool
) -> None:
    """Compress, or say what compressing would take.

    Args:
        model: as the user gave it.
        output: directory to make; None for the name of the model with a suffix.
        settings: of the run.
        dry_run: only estimate.
        resume: take up an unfinished run; False removes it first.

    Raises:
        UserError: bad input, or too little disk space.
    """
    console = Console(highlight=False)
    _check_device(settings.device)
    target = output if output is not None else default_output(model, settings)
    check_output(target)
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            _print_estimate(console, model, target, settings, Path(scratch))
        return
    started = time.perf_counter()
    with RichObserver(console) as observer:
        record = compress(model, target, settings, observer, resume=resume)
    _print_summary(console, record, target, time.perf_counter() - started)


def default_output(model: str, settings: CompressSettings) -> Path:
    """``NAME-spallm-2bit`` in the working directory."""
    name = Path(model).name.removesuffix(".gguf")
    bits = settings.bits if settings.target_bits is None else settings.target_bits
    return Path(f"{name}-spallm-{bits:g}bit")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not usable here ({error})") from error


def _print_estimate(
    console: Console, model: str, target: Path, settings: CompressSettings, scratch: Path
) -> None:
    estimate = estimate_run(open_source(model, scratch / "source"), settings)
    table = Table(title=f"{model} -> {target}", show_header=False, title_justify="left")
    table.add_row("layers to compress", f"{estimate.layers:,}")
    table.add_row("bits per weight, tables counted", f"{estimate.bits_per_weight:.3f}")
    table.add_row("output size", f"{estimate.output_bytes / _MIB:,.1f} MiB")
    table.add_row("disk space while running", f"{estimate.disk_bytes / _MIB:,.1f} MiB")
    table.add_row("peak memory", f"{estimate.peak_bytes / _MIB:,.0f} MiB")
    table.add_row("time", f"about {estimate.minutes:.1f} minutes")
    console.print(table)
    console.print("dry run: nothing was written")


def _print_summary(
    console: Console, record: CompressionRecord, target: Path, seconds: float
) -> None:
    worst = max(record.layers, key=lambda layer: layer.relative_error)
    size = sum(record.sizes.values())
    table = Table(show_header=False)
    table.add_row("bits per weight, tables counted", f"{record.bits_per_weight:.3f}")
    table.add_row("size", f"{size / _MIB:,.1f} MiB of {record.original_bytes / _MIB:,.1f} MiB")
    table.add_row("layers", f"{len(record.layers)}, {len(record.skipped)} left as they were")
    table.add_row("largest layer error", f"{worst.relative_error:.2e} ({worst.name})")
    table.add_row("time, peak memory", f"{seconds:,.0f} s, {peak_resident_bytes() / _MIB:,.0f} MiB")
    table.add_row("base digest", record.base_digest[:16])
    console.print(table)
    console.print(f"model   {target}", soft_wrap=True)
    console.print(f"report  {target / REPORT_FILE}", soft_wrap=True)
