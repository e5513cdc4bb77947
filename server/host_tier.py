"""Adapters in memory, ready for a slot; loaded in threads, never on the engine's loop."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something that takes memory."""

    @property
    def nbytes(self) -> int:
        """How much."""


Held = TypeVar("Held", bound=Sized)


class HostTier(Generic[Held]):
    """The adapters that were used last, as many as the budget holds; one at least.

    Args:
        load: reads an adapter from its folder; may raise, and what it raises reaches whoever waits.
        budget: bytes.
    """

    def __init__(self, load: Callable[[str], Held], budget: int) -> None:
        self._load, self._budget = load, budget
        self._lock = threading.Lock()
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._loading: dict[str, Future[Held]] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="spallm-load")

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

    def drop(self, folder: str) -> None:
        """Forget an adapter."""
        with self._lock:
            self._held.pop(folder, None)

    @property
    def nbytes(self) -> int:
        """Of all that is held."""
        with self._lock:
            return sum(held.nbytes for held in self._held.values())

    def folders(self) -> list[str]:
        """All that is held, the least recently used first."""
        with self._lock:
            return list(self._held)

    def _load_into(self, folder: str) -> Held:
        loaded = self._load(folder)
        with self._lock:
            self._held[folder] = loaded
            self._loading.pop(folder, None)
            self._shrink()
        return loaded

    def _shrink(self) -> None:
        total = sum(held.nbytes for held in self._held.values())
        while total > self._budget and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            total -= oldest.nbytes
