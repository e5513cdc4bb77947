"""What a training run was and how it went, as a file beside the adapter."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from spallm_serve.trainer.run_directory import RECORD_FILE


class TrainingRecord(BaseModel):
    """``training.json``; nothing reads it but people.

    Attributes:
        settings: of the run.
        base_digest, adapter_digest: identities.
        adapter_bytes: size of the tensor file.
        parameters: trained values.
        steps: optimizer steps.
        examples_cut: examples of the last pass that were too long.
        losses, eval_losses: by step.
        tokens_per_second: of the last process that worked on it.
        machine: what it ran on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: dict[str, Any]
    base_digest: str
    adapter_digest: str
    adapter_bytes: int
    parameters: int
    steps: int
    examples_cut: int
    losses: dict[int, float]
    eval_losses: dict[int, float]
    tokens_per_second: float
    machine: str


def write_record(record: TrainingRecord, output: Path) -> None:
    """Write the record into an adapter's directory."""
    (output / RECORD_FILE).write_text(record.model_dump_json(indent=1) + "\n")


def machine_name() -> str:
    """The kind of processor, in the system's words."""
    return platform.processor() or platform.machine()
