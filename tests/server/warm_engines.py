"""Processes that have imported vLLM before they start, which else is most of what an engine's start
takes: they are forked off one that did so and nothing else."""

from __future__ import annotations

import os
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

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

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._environment = dict(os.environ)

    def run(self) -> None:
        """What it was made for."""
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class WarmContext(ForkServerContext):
    """What vLLM starts engines' processes with."""

    Process = WarmProcess

    def __init__(self) -> None:
        super().__init__()
        self.set_forkserver_preload(_IMPORTS)
