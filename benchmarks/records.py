"""One schema for every benchmark's results, and where they are written."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
import torch
from pydantic import BaseModel, ConfigDict

_PACKAGES = ("spallm-serve", "torch", "transformers", "safetensors", "gptqmodel", "hqq",
             "bitsandbytes", "llama-cpp-python", "scikit-learn")  # fmt: skip


class Record(BaseModel):
    """One figure of ours, beside a peer's where there is one.

    Attributes:
        bench: which benchmark.
        case: what was measured, as names and values.
        metric: name with unit, for example ``time_s``.
        ours, peer: the figures.
        peer_name: whose the second is.
        ratio: how many times better ours is; above one we win.
        better: which direction wins.
        runs: how many measurements the figure comes from.
        spread: lowest and highest of them, or the figure less and plus its standard error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bench: str
    case: dict[str, str | int | float | bool | None]
    metric: str
    ours: float | None = None
    peer: float | None = None
    peer_name: str | None = None
    ratio: float | None = None
    better: Literal["lower", "higher"] = "lower"
    runs: int = 1
    spread: tuple[float, float] | None = None


class BenchmarkResults(BaseModel):
    """What a benchmark writes.

    Attributes:
        machine: processor, cores, memory, accelerator.
        versions: of Python and the packages that matter.
        command: what made the file.
        records: the figures.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    machine: dict[str, str | int]
    versions: dict[str, str]
    command: str
    records: list[Record]


def results(records: list[Record]) -> BenchmarkResults:
    """Records with the machine, versions and command line they were made with."""
    # Where files lie on the machine that measured is nobody else's concern; their names are.
    given = [part for part in sys.argv[1:] if part != "--go-on"]
    options = [Path(part).name if part.startswith("/") else part for part in given]
    command = " ".join([Path(sys.argv[0]).name, *options])
    return BenchmarkResults(
        machine=_machine(), versions=_versions(), command=command, records=records
    )


def write_results(found: BenchmarkResults, path: Path) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found.model_dump_json(indent=1, exclude_none=True) + "\n")


def _machine() -> dict[str, str | int]:
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerator": accelerator,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
