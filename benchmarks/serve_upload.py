"""Uploading an adapter, for programs that shall start quickly: nothing here imports torch."""

from __future__ import annotations

import time
from pathlib import Path

import httpx

from spallm_serve.benchmarks.serve_client import Target
from spallm_serve.errors import UserError

_UPLOAD_SECONDS = 300.0


def upload(url: str, target: Target, config: bytes, tensors: bytes) -> float:
    """Upload an adapter's two files; seconds until the server has released it.

    Raises:
        UserError: it was refused, or was there before.
    """
    files = {"config": config, "tensors": tensors}
    headers = {"Authorization": f"Bearer {target.key}"}
    started = time.perf_counter()
    answer = httpx.put(
        f"{url}/v1/adapters/{target.model}", files=files, headers=headers, timeout=_UPLOAD_SECONDS
    )
    seconds = time.perf_counter() - started
    if answer.status_code != 201:
        raise UserError(f"an upload was answered {answer.status_code}: {answer.text[:500]}")
    return seconds


def adapter_bytes(folder: Path) -> tuple[bytes, bytes]:
    """An adapter's configuration and tensors."""
    config = (folder / "adapter_config.json").read_bytes()
    return config, (folder / "adapter_model.safetensors").read_bytes()
