"""Servers as processes: started, waited for, weighed and ended."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from spallm_serve.errors import UserError

# Compiling may take minutes on a small machine.
_START_SECONDS = 1200
_STOP_SECONDS = 60
_LOG_LINES = 30
# The same for all servers; what the environment says already comes first. On a CPU the worker is in
# the engine's process, as spallm-serve has it: no core waits, and vLLM's own servers are faster so.
_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "2",
                "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # fmt: skip


@dataclass(frozen=True)
class ServerProcess:
    """A server that answers.

    Attributes:
        url: without a path.
        process: its first process.
    """

    url: str
    process: psutil.Process

    def resident_bytes(self) -> int:
        """Resident sets of all its processes; what they share counts in each of them."""
        return sum(each.memory_info().rss for each in _family(self.process))


@contextlib.contextmanager
def server_process(
    command: Sequence[object], log: Path, ready: str, environment: Mapping[str, str]
) -> Iterator[ServerProcess]:
    """A server on a free port of this machine.

    Args:
        command: starts it; ``--host`` and ``--port`` are put before a ``--`` or at the end.
        log: what it writes.
        ready: path that answers 200 once it can be used.
        environment: variables of its own.

    Raises:
        UserError: it ended, or is not ready in time; with the last lines it wrote.
    """
    port = _free_port()
    words = [str(part) for part in command]
    end = words.index("--") if "--" in words else len(words)
    words[end:end] = ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        started = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**_ENVIRONMENT, **os.environ, **environment},
            # Ctrl-C is for the benchmark, which then ends its servers. Not a session of its own:
            # Linux gives each an equal share, and a client's lower priority would mean nothing.
            process_group=0,
        )
    process = psutil.Process(started.pid)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(started, f"{url}{ready}", log)
        yield ServerProcess(url, process)
    finally:
        _end(started, process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=15).status_code == 200:
                return
        time.sleep(0.5)
    what = "is not ready" if process.poll() is None else f"ended with {process.returncode}"
    lines = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
    raise UserError(f"the server {what}; the last lines it wrote:\n{lines}")


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _end(started: subprocess.Popen[bytes], process: psutil.Process) -> None:
    """End it and what it has started; an engine can outlive the server that was killed."""
    family = _family(process)
    if started.poll() is None:
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(_STOP_SECONDS)
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    started.wait()
