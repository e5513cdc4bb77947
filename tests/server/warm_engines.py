"""Processes that have imported vLLM before they start, which else is most of what an engine's start
takes: they are forked off one that did so and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

# What an engine's process imports, and its worker, which is in the same process.
_IMPORTS = [
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "spallm_serve.server.plugin",
    "spallm_serve.server.vllm_compat",
]


class WarmProcess(ForkServerProcess):
    """Has its parent's environment, as one that is spawned; not that of what it is forked off."""

    _environment: dict[str, str]

    def start(self) -> None:
        """As ever; what modules read while they are imported is as it was at the first start."""
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        """What it was made for."""
        assert len([*Path("/proc/self/task").iterdir()]) == 1, "threads do not outlive a fork"
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class WarmContext(ForkServerContext):
    """What vLLM starts engines' processes with."""

    Process = WarmProcess

    def __init__(self) -> None:
        super().__init__()
        self.set_forkserver_preload(_IMPORTS)


@contextmanager
def ended_afterwards() -> Iterator[None]:
    """What processes are forked off holds the memory of all that it imported."""
    try:
        yield
    finally:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
