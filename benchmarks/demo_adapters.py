"""The demo's second half: two tenants' adapters on one base, asked the same question."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from spallm_serve.benchmarks.demo_rows import MANNERS, write_rows

QUESTION = "What is the capital of France?"
_ANSWER_TOKENS = 40
# At 4 bits the tables of a model this small learn a manner in a few dozen steps.
_OPTIONS = (
    "--batch-size", "8", "--accumulation", "1", "--max-length", "96", "--lr", "1e-3",
)  # fmt: skip


def train_adapters(base: Path, folder: Path, steps: int) -> dict[str, Path]:
    """Train one adapter for each manner with ``spallm-train``, as a user would.

    Args:
        base: what spallm-compress made.
        folder: for rows and adapters.
        steps: of each.
    """
    adapters = {}
    for manner in MANNERS:
        rows = folder / f"{manner}.jsonl"
        write_rows(manner, rows)
        adapters[manner] = folder / f"adapter-{manner}"
        command = [
            Path(sys.executable).with_name("spallm-train"), base, "--data", rows,
            "-o", adapters[manner], "--steps", steps, *_OPTIONS,
        ]  # fmt: skip
        finished = subprocess.run([str(part) for part in command], check=False)
        if finished.returncode:
            raise SystemExit(finished.returncode)
    return adapters


def ask_all(console: Console, base: Path, adapters: dict[str, Path]) -> None:
    """Show what the base and each adapter answer to :data:`QUESTION`."""
    from spallm_serve.adapted import apply_adapter
    from spallm_serve.adapter_files import read_adapter
    from spallm_serve.evaluation import answer
    from spallm_serve.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(base)
    table = Table("", "MB", QUESTION)
    for name, path in {"base": None, **adapters}.items():
        model = load_model(base)
        size = ""
        if path is not None:
            adapter = read_adapter(path)
            apply_adapter(model, adapter)
            size = f"{adapter.nbytes / 1e6:.1f}"
        table.add_row(name, size, answer(model, tokenizer, QUESTION, _ANSWER_TOKENS))
    console.print(table)
