"""What the commands of ``spallm-bench`` share: options, the environment, where results go."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spallm_serve.console import quiet_libraries, user_errors
from spallm_serve.errors import UserError

if TYPE_CHECKING:
    from spallm_serve.benchmarks.records import BenchmarkResults, Record

Json = Annotated[Path | None, typer.Option("--json", help="Where the results go.")]
Model = Annotated[
    str | None, typer.Option("--model", help="Default: the packaged SmolLM2-135M-Instruct.")
]
Dtype = Annotated[
    Literal["bfloat16", "float32"],
    typer.Option(
        help="Of activations and dense weights; float32 is faster where bfloat16 is emulated."
    ),
]
Scratch = Annotated[Path | None, typer.Option(help="Folder for models; default a temporary one.")]


def parse_pairs(text: str) -> dict[str, Any]:
    """Settings written ``name=value,section.name=value``; values are JSON, or else text.

    Raises:
        UserError: written otherwise.
    """
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(separator for _, separator, _ in pairs):
        raise UserError(f"--variant {text!r}: expected name=value,name=value")
    found: dict[str, Any] = {}
    for name, _, value in pairs:
        section, dot, own = name.strip().rpartition(".")
        place = found.setdefault(section, {}) if dot else found
        place[own] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextmanager
def measuring(scratch: Path | None) -> Iterator[Path]:
    """The environment all measurements share, and a folder that goes away unless it was named."""
    with user_errors(), _cleaned_up_when_terminated(), tempfile.TemporaryDirectory() as temporary:
        quiet_libraries()
        import torch

        torch.set_float32_matmul_precision("medium")
        folder = scratch if scratch is not None else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


@contextmanager
def _cleaned_up_when_terminated() -> Iterator[None]:
    """SIGTERM ends what a measurement has started, servers among it, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def model_directory(model: str | None, folder: Path) -> Path:
    """Where the named model is, the packaged one by default, unpacked if need be."""
    from spallm_serve.benchmarks.model import packaged_model
    from spallm_serve.models import resolve_model

    unpacked = folder / "model"
    return packaged_model(unpacked) if model is None else resolve_model(model, unpacked)


def measured_before(path: Path | None) -> list[Record]:
    """The records of an earlier run of this very command, in its order."""
    from spallm_serve.benchmarks.records import BenchmarkResults, results

    if path is None or not path.is_file():
        return []
    found = BenchmarkResults.model_validate_json(path.read_text())
    if found.command != results([]).command:
        raise UserError(f"{path}: was made by another command ({found.command})")
    return found.records


def finish(
    records: Iterator[Record] | list[Record], path: Path | None, kept: Sequence[Record] = ()
) -> BenchmarkResults:
    """Take the records as they come; after each one the file holds all there are.

    Args:
        records: new ones.
        path: the file.
        kept: those it held before.
    """
    from rich.console import Console

    from spallm_serve.benchmarks.records import results, write_results

    console = Console()
    taken = [*kept]
    for record in records:
        taken.append(record)
        figures = record.model_dump(exclude_none=True, exclude={"bench", "better"})
        console.print(figures)
        if path is not None:
            write_results(results(taken), path)
    return results(taken)
