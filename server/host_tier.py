"""Adapters in memory, ready for a slot; loaded in threads, never on the engine's loop."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from spallm_serve.server.background import step_back


class Sized(Protocol):
    """Something that takes memory."""

    @property
    def nbytes(self) -> int:
        """How much."""


Held = TypeVar("Held", bound=Sized)


@dataclass(frozen=True)
class Loads:
    """What has been read since the worker began.

    Attributes:
        count: adapters.
        nbytes: of them.
        seconds: that threads took for it.
    """

    count: int = 0
    nbytes: int = 0
    seconds: float = 0.0


class HostTier(Generic[Held]):
    """The adapters that were used last, as many as the budget holds; one at least.

    Those that are kept stay whatever the budget is: a step must never have to read a file.

    Args:
        load: reads an adapter from its folder; may raise, and what it raises reaches whoever waits.
        budget: bytes.

    Attributes:
        loads: how much was read.
    """

    def __init__(self, load: Callable[[str], Held], budget: int) -> None:
        self._load, self._budget = load, budget
        self._lock = threading.Lock()
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._kept: set[str] = set()
        self.loads = Loads()
        self._loading: dict[str, Future[Held]] = {}
        self._threads = ThreadPoolExecutor(2, "spallm-load", initializer=step_back)

    def prefetch(self, folder: str) -> Future[Held]:
        """Begin to load an adapter; done at once if it is here."""
        with self._lock:
            if folder in self._held:
                self._held.move_to_end(folder)
                done: Future[Held] = Future()
                done.set_result(self._held[folder])
                return done
            future = self._loading.get(folder)
            if future is None:
                future = self._loading[folder] = self._threads.submit(self._load_into, folder)
            elif future.done():
                # It failed; whoever asks hears of it once, the next one has it tried again.
                del self._loading[folder]
            return future

    def get(self, folder: str) -> Held:
        """An adapter; waits for it if it is not here yet."""
        return self.prefetch(folder).result()

    def keep(self, folder: str) -> Future[Held]:
        """Begin to load an adapter, which then stays until it is let go."""
        with self._lock:
            self._kept.add(folder)
        return self.prefetch(folder)

    def let_go(self, folders: Iterable[str]) -> None:
        """These need not be kept any longer."""
        with self._lock:
            self._kept.difference_update(folders)
            self._shrink()

    def drop(self, folder: str) -> None:
        """Forget an adapter."""
        with self._lock:
            self._kept.discard(folder)
            self._held.pop(folder, None)

    @property
    def nbytes(self) -> int:
        """Of all that is held."""
        with self._lock:
            return sum(held.nbytes for held in self._held.values())

    def has(self, folder: str) -> bool:
        """Whether an adapter is here."""
        with self._lock:
            return folder in self._held

    def folders(self) -> list[str]:
        """All that is held, the least recently used first."""
        with self._lock:
            return list(self._held)

    def _load_into(self, folder: str) -> Held:
        started = time.perf_counter()
        loaded = self._load(folder)
        taken = time.perf_counter() - started
        with self._lock:
            before = self.loads
            self.loads = Loads(
                before.count + 1, before.nbytes + loaded.nbytes, before.seconds + taken
            )
            self._held[folder] = loaded
            self._loading.pop(folder, None)
            self._shrink()
        return loaded

    def _shrink(self) -> None:
        total = sum(held.nbytes for held in self._held.values())
        # The last one is in use now, or soon.
        for folder in [*self._held][:-1]:
            if total <= self._budget:
                return
            if folder not in self._kept:
                total -= self._held.pop(folder).nbytes
