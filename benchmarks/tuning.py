"""What fine-tuning reaches: perplexity on held-out text before and after, beside its controls."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from spallm_serve.adapted import apply_adapter
from spallm_serve.adapter import Adapter
from spallm_serve.adapter_files import read_adapter
from spallm_serve.benchmarks.records import Record
from spallm_serve.compressor.observer import SilentObserver
from spallm_serve.compressor.pipeline import compress
from spallm_serve.compressor.settings import parse_settings
from spallm_serve.data import file_windows
from spallm_serve.errors import UserError
from spallm_serve.evaluation import Estimate, perplexity
from spallm_serve.models import load_model, load_tokenizer
from spallm_serve.trainer.run import train
from spallm_serve.trainer.settings import parse_train_settings

SEQLEN = 512
# What the trainer is told for each name; LoRA and full tuning are the controls.
METHODS: dict[str, dict[str, Any]] = {
    "lut": {"method": "lut"},
    "smt": {"method": "smt"},
    "sparselora": {"method": "sparselora"},
    "lora": {"method": "sparselora", "sparselora": {"rank": 16, "sparsity": "none"}},
    # Every block of every linear: all weights but embeddings, head and norms.
    "full": {
        "method": "smt",
        "smt": {
            "share": 1.0,
            "warm_up_batches": 1,
            "modules": [
                "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
            ],
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class TuningRun:
    """One fine-tuning to measure.

    Attributes:
        method: a key of :data:`METHODS`.
        base: ``dense``, or the compressor's settings.
        settings: the trainer's, beside those all runs share.
    """

    method: str
    base: dict[str, Any] | None
    settings: dict[str, Any]


def parse_run(text: str, parse_pairs: Any) -> TuningRun:
    """A run written ``METHOD/BASE`` or ``METHOD/BASE/SETTINGS``.

    Args:
        text: for example ``lut/bits=2/learning_rate=3e-3`` or ``lora/dense``.
        parse_pairs: of ``name=value,name=value``.

    Raises:
        UserError: written otherwise, or no such method.
    """
    method, *rest = text.split("/")
    if method not in METHODS or len(rest) not in (1, 2):
        raise UserError(
            f"--run {text!r}: expected METHOD/BASE or METHOD/BASE/SETTINGS, METHOD one of "
            f"{', '.join(METHODS)}, BASE dense or for example bits=2"
        )
    base = None if rest[0] == "dense" else parse_pairs(rest[0])
    return TuningRun(method, base, parse_pairs(rest[1]) if len(rest) == 2 else {})


def tuning_records(
    model_dir: Path,
    data: Path,
    text: Path,
    runs: list[TuningRun],
    scratch: Path,
    *,
    steps: int,
    shared: dict[str, Any],
    windows: int,
) -> Iterator[Record]:
    """Tune each base and judge it before and after, on the same windows.

    Compressed bases are calibrated on the text that is learnt.

    Args:
        model_dir: the original.
        data: what is learnt, a ``.txt``.
        text: what is judged on.
        runs: what to measure, in this order.
        scratch: for bases and adapters.
        steps: of each run.
        shared: settings of the trainer for all runs.
        windows: windows of ``text``.
    """
    console = Console(stderr=True)
    judged_on = file_windows(text, load_tokenizer(model_dir), SEQLEN, windows)
    before: dict[str, Estimate] = {}
    for number, run in enumerate(runs):
        base = model_dir if run.base is None else _base(model_dir, run.base, data, scratch)
        if str(base) not in before:
            before[str(base)] = _judge(base, None, judged_on)
            console.print(f"{base.name}: perplexity {before[str(base)]}")
        told = METHODS[run.method] | shared | run.settings
        settings = parse_train_settings(
            told | {"base": str(base), "data": str(data), "steps": steps}
        )
        output = scratch / f"adapter-{number}"
        started = time.perf_counter()
        train(settings, output, resume=False, console=console)
        seconds = time.perf_counter() - started
        adapter = read_adapter(output)
        after = _judge(base, adapter, judged_on)
        console.print(f"{run.method} on {base.name}: perplexity {after}")
        yield _record(run, settings.peak_rate, before[str(base)], after, adapter, seconds, steps)
        del adapter
        gc.collect()


def _base(model_dir: Path, wanted: dict[str, Any], calibration: Path, scratch: Path) -> Path:
    output = scratch / ("base-" + "-".join(f"{key}-{value}" for key, value in wanted.items()))
    if not (output / "config.json").is_file():
        settings = parse_settings({"calibration": str(calibration), "seqlen": SEQLEN} | wanted)
        compress(str(model_dir), output, settings, SilentObserver())
    return output


def _judge(base: Path, adapter: Adapter | None, windows: Tensor) -> Estimate:
    model = load_model(base)
    if adapter is not None:
        apply_adapter(model, adapter)
    with torch.no_grad():
        return perplexity(model, windows)


def _record(
    run: TuningRun,
    rate: float,
    before: Estimate,
    after: Estimate,
    adapter: Adapter,
    seconds: float,
    steps: int,
) -> Record:
    base = "dense" if run.base is None else ", ".join(f"{k}={v}" for k, v in run.base.items())
    case: dict[str, str | int | float | bool | None] = {
        "method": run.method,
        "base": base,
        "learning_rate": rate,
        "steps": steps,
        "before": before.value,
        "before_standard_error": before.standard_error,
        "standard_error": after.standard_error,
        "adapter_bytes": adapter.nbytes,
        "seconds": round(seconds, 1),
    }
    ours = run.method in ("lut", "smt", "sparselora")
    return Record(
        bench="tuning",
        case=case,
        metric="perplexity",
        ours=after.value if ours else None,
        peer=None if ours else after.value,
        peer_name=None if ours else run.method,
        spread=(after.value - after.standard_error, after.value + after.standard_error),
    )
