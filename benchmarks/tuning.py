"""What fine-tuning reaches: held-out text, rows and questions before and after, and controls."""

from __future__ import annotations

import gc
import json
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spallm_serve.adapted import apply_adapter
from spallm_serve.adapter import Adapter
from spallm_serve.benchmarks.judges import ACCURACY, SEQLEN, Judge
from spallm_serve.benchmarks.records import Record
from spallm_serve.compressor.observer import SilentObserver
from spallm_serve.compressor.pipeline import compress
from spallm_serve.compressor.settings import parse_settings
from spallm_serve.errors import UserError
from spallm_serve.evaluation import Estimate
from spallm_serve.models import load_model
from spallm_serve.rows import stream_rows
from spallm_serve.trainer.run import train
from spallm_serve.trainer.settings import TrainSettings, parse_train_settings

# What the trainer is told for each name.
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
CONTROLS = ("lora", "full")


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
    judges: dict[tuple[str, str], Judge],
    runs: list[TuningRun],
    scratch: Path,
    *,
    calibration: Path | None,
    steps: int,
    seeds: int,
    shared: dict[str, Any],
    skip: int = 0,
) -> Iterator[Record]:
    """Tune each base and judge it before and after, on the same text, rows and questions.

    Args:
        model_dir: the original.
        data: what is learnt.
        judges: see :func:`~spallm_serve.benchmarks.judges.make_judges`.
        runs: what to measure, in this order.
        scratch: for bases and adapters.
        calibration: of compressed bases; None is text the original writes.
        steps: of each run.
        seeds: runs of each, with the seeds 0, 1, ...
        shared: settings of the trainer for all runs.
        skip: records that are there already, all those of some runs.
    """
    console = Console(stderr=True)
    before: dict[Path, dict[tuple[str, str], Estimate]] = {}
    todo = [(seed, run) for seed in range(seeds) for run in runs][skip // len(judges) :]
    for seed, run in todo:
        base = model_dir
        if run.base is not None:
            base = _base(model_dir, run.base, calibration, scratch)
        if base not in before:
            before[base] = _judge(base, None, judges)
        told = together(METHODS[run.method], shared, run.settings, {"seed": seed, "steps": steps})
        settings = parse_train_settings(told | {"base": str(base), "data": str(data)})
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=scratch) as output:
            adapter = train(settings, Path(output), resume=False, console=console)
        seconds = time.perf_counter() - started
        after = _judge(base, adapter, judges)
        for (metric, on), found in after.items():
            case = _case(run, settings, adapter, seconds) | {"on": on}
            yield _record(run, case, metric, before[base][metric, on], found)
        del adapter
        gc.collect()


def together(*parts: dict[str, Any]) -> dict[str, Any]:
    """Settings of which the later win, setting by setting in each method's section too."""
    found: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            section = isinstance(value, dict) and isinstance(found.get(name), dict)
            found[name] = found[name] | value if section else value
    return found


def combined(files: list[Path], scratch: Path) -> Path:
    """One file to learn from: the only one, or the rows of all, in a mixed but fixed order."""
    if len(files) == 1:
        return files[0]
    rows = [row for file in files for _, row in stream_rows(file)]
    random.Random(0).shuffle(rows)
    path = scratch / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _base(model_dir: Path, wanted: dict[str, Any], calibration: Path | None, scratch: Path) -> Path:
    output = scratch / ("base-" + "-".join(f"{key}-{value}" for key, value in wanted.items()))
    if not (output / "config.json").is_file():
        text = {} if calibration is None else {"calibration": str(calibration)}
        compress(
            str(model_dir), output, parse_settings({"seqlen": SEQLEN} | text | wanted),
            SilentObserver(),
        )  # fmt: skip
    return output


def _judge(
    base: Path, adapter: Adapter | None, judges: dict[tuple[str, str], Judge]
) -> dict[tuple[str, str], Estimate]:
    model = load_model(base)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    if adapter is not None:
        apply_adapter(model, adapter)
    model.eval()
    with torch.no_grad():
        return {judged: judge(model) for judged, judge in judges.items()}


def _case(
    run: TuningRun, settings: TrainSettings, adapter: Adapter, seconds: float
) -> dict[str, str | int | float | bool | None]:
    base = "dense" if run.base is None else ", ".join(f"{k}={v}" for k, v in run.base.items())
    return {
        "method": run.method,
        "base": base,
        "learning_rate": settings.peak_rate,
        "steps": settings.steps,
        "seed": settings.seed,
        "parameters": sum(
            tensor.numel() for tensor in adapter.tensors.values() if tensor.is_floating_point()
        ),
        "adapter_bytes": adapter.nbytes,
        "seconds": round(seconds, 1),
    }


def _record(
    run: TuningRun,
    case: dict[str, str | int | float | bool | None],
    metric: str,
    before: Estimate,
    after: Estimate,
) -> Record:
    ours = run.method not in CONTROLS
    return Record(
        bench="tuning",
        case=case
        | {
            "before": before.value,
            "before_standard_error": before.standard_error,
            "standard_error": after.standard_error,
        },
        metric=metric,
        ours=after.value if ours else None,
        peer=None if ours else after.value,
        peer_name=None if ours else run.method,
        better="higher" if metric == ACCURACY else "lower",
        spread=(after.value - after.standard_error, after.value + after.standard_error),
    )
