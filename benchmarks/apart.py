"""Measurements with an engine of vLLM's, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spallm_serve.errors import UserError


def measured_apart(
    module: str, told: dict[str, Any], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a module's program says, in JSON on its last such line; it prints much else.

    Args:
        module: run with ``told`` in JSON as its argument.
        told: what to measure; its ``model`` is the directory that an engine is started for.
        environment: variables beside those of an engine in one process.

    Raises:
        UserError: it failed; with the last that it wrote.
    """
    variables = os.environ | {
        "VLLM_PLUGINS": "spallm",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # What it would keep of a compiled model cannot be read again on a CPU.
        "VLLM_USE_AOT_COMPILE": "0",
    }
    if not torch.cuda.is_available():
        # One process, which has all cores, for vLLM's own engines too: else one core waits.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    command = [sys.executable, "-m", module, json.dumps(told)]
    finished = subprocess.run(
        command, env=variables | dict(environment or {}), capture_output=True, check=False
    )
    lines = [line for line in finished.stdout.decode().splitlines() if line.startswith("{")]
    if finished.returncode or not lines:
        problem = finished.stderr.decode()[-2000:]
        raise UserError(f"the engine for {Path(told['model']).name} failed: {problem}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found
