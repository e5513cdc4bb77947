"""Adapters on their way from the store to the engine, without the engine waiting for them."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from spallm_serve.adapters_store.failures import NotFoundError
from spallm_serve.adapters_store.records import Resolved
from spallm_serve.server.errors import ApiError, model_not_found
from spallm_serve.server.resident import IN_MEMORY, IN_SLOT, LOADING

# ``method`` and arguments -> what each worker answers.
WorkerCall = Callable[[str, tuple[Any, ...]], Awaitable[list[Any]]]

KEEP, PIN, UNPIN, RESIDENCY = "spallm_keep", "spallm_pin", "spallm_unpin", "spallm_residency"
# Where a request finds its adapter; kept: the workers hold it for others, and were not asked.
KEPT, STORE = "kept", "store"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.05
# Names that the engine is left to know. It reads through all of them for every chat request, 0.4 ms
# for so many; a request for one that it has to learn again waits for the step that runs.
MOST_NAMES = 1 << 14


class Residency:
    """Brings adapters into the workers' memory before a request that needs them reaches the engine,
    and has them kept there until it is done: no step has to read a file.

    A worker reads an adapter in a thread and says how far it is; meanwhile all others go on. What
    is not needed any longer the workers hear with the next question, before which they have no
    reason to put anything out.

    Args:
        local_folder: of a version's digest; downloads it if need be; blocks.
        call: asks all workers.
        seconds: an adapter may take to be read.
        found: told where each request finds its adapter: kept, slot, host or store.
        forget: told the names, the least recently used first, that the engine shall know no longer
            (:data:`MOST_NAMES`); no request uses them.
    """

    def __init__(
        self,
        local_folder: Callable[[str], Path],
        call: WorkerCall,
        seconds: float,
        found: Callable[[str], None],
        forget: Callable[[str], None],
    ) -> None:
        self._local_folder, self._call, self._seconds = local_folder, call, seconds
        self._found, self._forget = found, forget
        # Names that the engine may know, the least recently used first.
        self._named: OrderedDict[str, None] = OrderedDict()
        self._folders: dict[str, str] = {}
        # Of folders, and of the names under which tenants know what is in them.
        self._users: Counter[str] = Counter()
        self._coming: dict[str, asyncio.Task[str]] = {}
        self._told: set[str] = set()
        self._ready: set[str] = set()

    @asynccontextmanager
    async def held(self, resolved: Resolved) -> AsyncIterator[None]:
        """Inside, all workers have an adapter in memory.

        Raises:
            ApiError: it was deleted meanwhile (404), does not fit the base (400), or takes too
                long (503).
        """
        if resolved.digest is None:
            yield
            return
        folder = str(await self._local(resolved))
        name = resolved.engine_name
        self._users.update((folder, name))
        self._folders[name] = folder
        try:
            await self._wait_for(resolved, folder)
            self._named[name] = None
            yield
        finally:
            self._users.subtract((folder, name))
            if not self._users[name]:
                del self._folders[name]
            if name in self._named:
                self._named.move_to_end(name)
                self._forget_oldest()
            self._users += Counter()  # forgets those that nobody uses

    async def pin(self, resolved: Resolved) -> None:
        """Have an adapter in a slot of its own from now on.

        Raises:
            ApiError: see :meth:`held`; or as many are pinned as may be (409).
        """
        async with self.held(resolved):
            answers = await self._call(PIN, (str(await self._local(resolved)),))
        problem = max(answers)
        if problem:
            raise ApiError(409, f"{resolved.engine_name}: {problem}", "cannot_pin", param="model")

    async def unpin(self, resolved: Resolved) -> None:
        """An adapter may be put out of its slot again."""
        await self._call(UNPIN, (str(await self._local(resolved)),))

    def folder(self, engine_name: str) -> str | None:
        """Where an adapter is that a request has been let in for."""
        return self._folders.get(engine_name)

    async def facts(self) -> list[dict[str, Any]]:
        """What is in slots and in memory, worker by worker."""
        return await self._call(RESIDENCY, ())

    async def _local(self, resolved: Resolved) -> Path:
        if resolved.digest is None:
            raise ApiError(400, "the base is always there", "invalid_value", param="model")
        try:
            return await asyncio.to_thread(self._local_folder, resolved.digest)
        except NotFoundError as error:
            raise model_not_found(resolved.engine_name) from error

    def _forget_oldest(self) -> None:
        if len(self._named) <= MOST_NAMES:
            return
        for name in self._named:
            if not self._users[name]:
                del self._named[name]
                self._forget(name)
                return

    async def _wait_for(self, resolved: Resolved, folder: str) -> None:
        """Until an adapter is with all workers; many who want one ask once."""
        if folder in self._ready:
            self._found(KEPT)
            return
        task = self._coming.get(folder)
        if task is None:
            task = self._coming[folder] = asyncio.create_task(self._bring(resolved, folder))
            task.add_done_callback(partial(self._came, folder))
        # Whoever goes away leaves it to the others.
        self._found(await asyncio.shield(task))

    def _came(self, folder: str, task: asyncio.Task[str]) -> None:
        del self._coming[folder]
        if not task.cancelled() and task.exception() is None:
            self._ready.add(folder)

    async def _bring(self, resolved: Resolved, folder: str) -> str:
        """Where it was found."""
        try:
            async with asyncio.timeout(self._seconds):
                return await self._poll(resolved, folder)
        except TimeoutError as error:
            raise ApiError(
                503,
                f"{resolved.engine_name} was not loaded within {self._seconds:g} s; try again",
                "adapter_loading",
                headers={"Retry-After": "1"},
            ) from error

    async def _poll(self, resolved: Resolved, folder: str) -> str:
        pause, found = _FIRST_PAUSE, ""
        while True:
            states = set(await self._call(KEEP, (folder, self._let_go(folder))))
            problems = states - {LOADING, IN_MEMORY, IN_SLOT}
            if problems:
                message = f"{resolved.engine_name} cannot be loaded: {min(problems)}"
                raise ApiError(400, message, "adapter_unusable", param="model")
            found = found or next(s for s in (LOADING, IN_MEMORY, IN_SLOT) if s in states)
            if LOADING not in states:
                return STORE if found == LOADING else found
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _let_go(self, wanted: str) -> list[str]:
        """What workers keep and nobody needs; they are told at once, or it would be kept for ever.

        Questions reach the workers in the order in which they are asked, so that one who needs such
        an adapter from now on has it kept again.
        """
        left = [folder for folder in self._told if not self._users[folder] and folder != wanted]
        self._told.difference_update(left)
        self._ready.difference_update(left)
        self._told.add(wanted)
        return left
