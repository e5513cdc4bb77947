"""Adapters on their way from the store to the engine, without the engine waiting for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from spallm_serve.adapters_store.failures import NotFoundError
from spallm_serve.adapters_store.records import Resolved
from spallm_serve.server.errors import ApiError, model_not_found

# ``method`` and arguments -> what each worker answers.
WorkerCall = Callable[[str, tuple[Any, ...]], Awaitable[list[Any]]]

PREFETCH, RESIDENCY = "spallm_prefetch", "spallm_residency"
_LOADING, _READY = "loading", "ready"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.05


class Residency:
    """Brings adapters into the workers' memory before a request that needs them reaches the engine.

    A worker reads an adapter in a thread and says how far it is; meanwhile all others go on.

    Args:
        local_folder: of a version's digest; downloads it if need be; blocks.
        call: asks all workers.
        seconds: an adapter may take to be read.
    """

    def __init__(
        self, local_folder: Callable[[str], Path], call: WorkerCall, seconds: float
    ) -> None:
        self._local_folder, self._call, self._seconds = local_folder, call, seconds
        self._folders: dict[str, str] = {}

    async def ensure(self, resolved: Resolved) -> None:
        """Wait until all workers have an adapter in memory.

        Raises:
            ApiError: it was deleted meanwhile (404), does not fit the base (400), or takes too
                long (503).
        """
        if resolved.digest is None:
            return
        try:
            folder = await asyncio.to_thread(self._local_folder, resolved.digest)
        except NotFoundError as error:
            raise model_not_found(resolved.engine_name) from error
        self._folders[resolved.engine_name] = str(folder)
        try:
            async with asyncio.timeout(self._seconds):
                await self._wait(resolved, str(folder))
        except TimeoutError as error:
            raise ApiError(
                503,
                f"{resolved.engine_name} was not loaded within {self._seconds:g} s; try again",
                "adapter_loading",
                headers={"Retry-After": "1"},
            ) from error

    def folder(self, engine_name: str) -> str | None:
        """Where an adapter is that a request has been let in for."""
        return self._folders.get(engine_name)

    async def facts(self) -> list[dict[str, Any]]:
        """What is in slots and in memory, worker by worker."""
        return await self._call(RESIDENCY, ())

    async def _wait(self, resolved: Resolved, folder: str) -> None:
        pause = _FIRST_PAUSE
        while True:
            states = set(await self._call(PREFETCH, (folder,)))
            if states == {_READY}:
                return
            problems = states - {_READY, _LOADING}
            if problems:
                message = f"{resolved.engine_name} cannot be loaded: {min(problems)}"
                raise ApiError(400, message, "adapter_unusable", param="model")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
