"""The whole server in a process of its own, as its users start it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from spallm_serve.adapters_store.store import AdapterStore
from spallm_serve.kernels.cpu.integers import INTEGERS_VARIABLE

PROMPT = list(range(5, 45))
TOKENS = 8
START_SECONDS = 240


@dataclass
class Server:
    """A running server, its store and its tenants' keys."""

    process: subprocess.Popen[bytes]
    url: str
    store: AdapterStore
    admin: str
    keys: dict[str, str]
    base: Path
    data: Path

    def client(self, tenant: str | None) -> httpx.Client:
        key = self.admin if tenant == "admin" else self.keys.get(tenant or "")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def put(self, tenant: str, name: str, folder: Path) -> dict[str, Any]:
        files = {
            "config": (folder / "adapter_config.json").read_bytes(),
            "tensors": (folder / "adapter_model.safetensors").read_bytes(),
        }
        with self.client(tenant) as client:
            found = client.put(f"/v1/adapters/{name}", files=files)
        assert found.status_code in (200, 201), found.text
        body: dict[str, Any] = found.json()
        return body

    def ask(self, tenant: str, model: str, **more: Any) -> httpx.Response:
        body = {
            "model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        with self.client(tenant) as client:
            return client.post("/v1/completions", json=body | more)

    def tokens(self, tenant: str, model: str, **more: Any) -> list[int]:
        found = self.ask(tenant, model, **more)
        assert found.status_code == 200, found.text
        ids: list[int] = found.json()["choices"][0]["token_ids"]
        return ids


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(base: Path, data: Path) -> tuple[subprocess.Popen[bytes], str, str]:
    """A server with two slots; its address, and all it has written when it is up."""
    port = free_port()
    log = data.with_suffix(".log")
    command = [
        Path(sys.executable).with_name("spallm-serve"),
        base,
        "--port",
        port,
        "--store",
        data,
    ]
    command += ["--slots", 2, "--", "--max-model-len", 128, "--dtype", "float32"]
    command += ["--block-size", 32, "--enable-prompt-tokens-details", "--enforce-eager"]
    # Calls of tools are told from text by a parser of vLLM's, which is chosen for each model.
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment["SPALLM_PINNED_SLOTS"] = "1"
    environment[INTEGERS_VARIABLE] = "0"  # its answers are compared with transformers'
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=file, env=environment
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"{url}/readyz", timeout=15).status_code == 200:
                return process, url, log.read_text()
        except httpx.TransportError:
            time.sleep(0.5)
    process.kill()
    raise AssertionError(log.read_text()[-4000:])
