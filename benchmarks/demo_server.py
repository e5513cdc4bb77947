"""The demo's last part: both tenants and the base on one server, asked in one batch."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from spallm_serve.benchmarks.demo_adapters import QUESTION
from spallm_serve.benchmarks.serve_process import server_process

_ANSWER_TOKENS = 40
_MAX_MODEL_LEN = 512


@dataclass(frozen=True)
class _Answer:
    text: str
    first: float
    whole: float
    version: str


def serve_and_ask(console: Console, base: Path, adapters: dict[str, Path], *, stay: bool) -> None:
    """Start ``spallm-serve``, make a tenant for each adapter, upload it, ask all of them at once.

    Args:
        console: for what is shown.
        base: what spallm-compress made.
        adapters: by the name of its tenant.
        stay: keep the server running until Ctrl-C.
    """
    data = base.parent / "store"
    with _server(base, data, compiled=stay) as (url, admin):
        keys = {tenant: _tenant(data, tenant) for tenant in adapters}
        uploads = {
            tenant: _upload(url, keys[tenant], folder) for tenant, folder in adapters.items()
        }
        asked = {"base": (keys[min(keys)], "base")}
        asked |= {tenant: (keys[tenant], "manner") for tenant in adapters}
        answers = _ask_together(url, asked)
        console.print(_table(answers, uploads, _slot_bytes(url, admin)))
        if stay:
            _show_commands(console, url, keys)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()


@contextlib.contextmanager
def _server(base: Path, data: Path, *, compiled: bool) -> Iterator[tuple[str, str]]:
    """A running server: its address and its first admin key. To compile takes a minute."""
    log = data.with_suffix(".log")
    command = [
        Path(sys.executable).with_name("spallm-serve"), base, "--store", data,
        "--", "--max-model-len", _MAX_MODEL_LEN, *([] if compiled else ["--enforce-eager"]),
    ]  # fmt: skip
    with server_process(command, log, "/readyz", {"VLLM_LOGGING_LEVEL": "ERROR"}) as process:
        (admin,) = re.findall(r"^\s+(spallm_\S+)", log.read_text(), re.MULTILINE)
        yield process.url, admin


def _tenant(data: Path, name: str) -> str:
    """Make a tenant with ``spallm-admin``, as an operator would; its key."""
    admin = str(Path(sys.executable).with_name("spallm-admin"))
    for command in (
        ["tenant", "create", name, "--base"],
        ["key", "create", name, "--scope", "inference", "--scope", "adapters"],
    ):
        done = subprocess.run(
            [admin, *command, "--store", str(data)], check=True, capture_output=True, text=True
        )
    return done.stdout.strip()


def _upload(url: str, key: str, folder: Path) -> float:
    """Upload an adapter as ``manner``; seconds."""
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "tensors": (folder / "adapter_model.safetensors").read_bytes(),
    }
    started = time.perf_counter()
    headers = {"Authorization": f"Bearer {key}"}
    found = httpx.put(f"{url}/v1/adapters/manner", files=files, headers=headers, timeout=120)
    if found.status_code not in (200, 201):
        raise SystemExit(f"the upload was refused: {found.text}")
    return time.perf_counter() - started


def _ask_together(url: str, asked: dict[str, tuple[str, str]]) -> dict[str, _Answer]:
    """Each in its own thread with its own openai client, so that the engine has them together."""
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = pool.map(lambda each: _ask(url, *each), asked.values())
        return dict(zip(asked, answers, strict=True))


def _ask(url: str, key: str, model: str) -> _Answer:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
    started = time.perf_counter()
    first, pieces, version = 0.0, [], ""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=_ANSWER_TOKENS,
        temperature=0,
        stream=True,
    )
    for event in stream:
        first = first or time.perf_counter() - started
        version = event.model
        pieces += [choice.delta.content or "" for choice in event.choices]
    return _Answer("".join(pieces).strip(), first, time.perf_counter() - started, version)


def _slot_bytes(url: str, admin: str) -> int:
    headers = {"Authorization": f"Bearer {admin}"}
    workers = httpx.get(f"{url}/v1/residency", headers=headers, timeout=30).json()["workers"]
    return int(workers[0]["slot_bytes"])


def _table(answers: dict[str, _Answer], uploads: dict[str, float], slot_bytes: int) -> Table:
    table = Table("model", QUESTION, "upload s", "first token s", "whole s", "MB in its slot")
    for who, answer in answers.items():
        upload = f"{uploads[who]:.1f}" if who in uploads else ""
        size = f"{slot_bytes / 1e6:.1f}"
        table.add_row(
            answer.version[:28] + "..." if "@" in answer.version else answer.version,
            answer.text,
            upload,
            f"{answer.first:.2f}",
            f"{answer.whole:.2f}",
            size,
        )
    table.caption = "asked at the same time, through the openai client"
    return table


def _show_commands(console: Console, url: str, keys: dict[str, str]) -> None:
    tenant, key = next(iter(keys.items()))
    console.print(f"\nthe server is at {url}; Ctrl-C ends it. Meanwhile, for example:\n")
    console.print(
        f"  curl {url}/v1/chat/completions -H 'Authorization: Bearer {key}' \\\n"
        "    -H 'Content-Type: application/json' \\\n"
        """    -d '{"model": "manner", "messages": [{"role": "user", "content": "Hi"}]}'\n"""
        f"  curl {url}/v1/models -H 'Authorization: Bearer {key}'     # what {tenant} can use",
        markup=False,
        soft_wrap=True,
    )
