"""The adapters of one worker: in memory, in slots; and how often they moved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from spallm_serve.server.host_adapter import HostAdapter, ServedLayers
from spallm_serve.server.host_tier import HostTier
from spallm_serve.server.slots import SlotBook

# What :meth:`ResidentAdapters.keep` answers; anything else is why an adapter cannot be used.
LOADING, IN_MEMORY, IN_SLOT = "loading", "host", "slot"


@dataclass(frozen=True)
class Moves:
    """What has been moved since the worker began.

    Attributes:
        swaps: from memory into a slot.
        swap_seconds: that steps waited for them.
        late_loads: adapters that a step had to read itself; none unless it was asked without
            :meth:`ResidentAdapters.keep`.
    """

    swaps: int = 0
    swap_seconds: float = 0.0
    late_loads: int = 0


class ResidentAdapters:
    """Adapters by the folders they are read from.

    Args:
        served: the worker's layers.
        host: reads adapters and keeps those in memory that were used last.
        slots: sets of tables beside the base's, those for pinned adapters included.
        pinned: adapters that may be pinned, fewer than ``slots``.
    """

    def __init__(
        self, served: ServedLayers, host: HostTier[HostAdapter], slots: int, pinned: int
    ) -> None:
        self._served, self._host = served, host
        self._book: SlotBook[str] = SlotBook(slots, pinned)
        self._moves = Moves()

    def keep(self, folder: str, let_go: Iterable[str]) -> str:
        """Begin to load an adapter, which stays in memory until it is let go; never waits.

        Args:
            folder: of the adapter.
            let_go: those that are needed no longer.

        Returns:
            Where it is, or why it cannot be used.
        """
        self._host.let_go(let_go)
        future = self._host.keep(folder)
        if not future.done():
            # Also if it is in a slot: it may be put out of it before its turn.
            return LOADING
        problem = future.exception()
        if problem is not None:
            return str(problem)
        return IN_MEMORY if self._book.slot_of(folder) is None else IN_SLOT

    def load(self, folder: str) -> None:
        """Have an adapter in memory; waits.

        Raises:
            UserError: it cannot be used on this base.
        """
        self._host.get(folder)

    def activate(self, folders: Collection[str]) -> None:
        """Every adapter of a step into a slot; there are slots enough for any step."""
        for folder in folders:
            if self._book.slot_of(folder) is not None:
                self._book.touch(folder)
            else:
                self._swap_in(folder, folders)

    def slot_of(self, folder: str) -> int | None:
        """Where an adapter is, if it is in a slot."""
        return self._book.slot_of(folder)

    def pin(self, folder: str) -> bool:
        """Into a slot, to stay there; False if as many are pinned as may be.

        Raises:
            UserError: it cannot be used on this base.
        """
        if not self._book.may_pin(folder):
            return False
        self._host.keep(folder).result()
        self.activate([folder])
        self._book.pin(folder)
        return True

    def unpin(self, folder: str) -> None:
        """It may be put out of its slot again."""
        self._book.unpin(folder)

    def forget(self, folder: str) -> None:
        """Out of slot and memory."""
        self._book.release(folder)
        self._host.drop(folder)

    def known(self) -> set[str]:
        """All that are in a slot or in memory."""
        return {*self._book.adapters(), *self._host.folders()}

    def facts(self) -> dict[str, Any]:
        """What is where, how much it takes, and what moved."""
        return {
            "slots": {folder: self._book.slot_of(folder) for folder in self._book.adapters()},
            "pinned": self._book.pinned(),
            "host": self._host.folders(),
            "host_bytes": self._host.nbytes,
            "slot_bytes": self._served.slot_bytes,
            "loads": asdict(self._host.loads),
            "moves": asdict(self._moves),
        }

    def time_swap(self, folder: str, rounds: int) -> float:
        """Median seconds to bring an adapter from memory into a slot; for benchmarks.

        Args:
            folder: of the adapter; nobody may be using any.
            rounds: how often.
        """
        held = self._host.get(folder)
        times = []
        for _ in range(rounds):
            slot = self._book.reserve(())
            started = time.perf_counter()
            held.fill(self._served, slot)
            times.append(time.perf_counter() - started)
            self._book.give_back(slot)
        return statistics.median(times)

    def _swap_in(self, folder: str, needed: Collection[str]) -> None:
        late = not self._host.has(folder)
        held = self._host.get(folder)
        slot = self._book.reserve(needed)
        started = time.perf_counter()
        try:
            held.fill(self._served, slot)
        except BaseException:
            self._book.give_back(slot)
            raise
        self._book.publish(folder, slot)
        moves = self._moves
        self._moves = replace(
            moves,
            swaps=moves.swaps + 1,
            swap_seconds=moves.swap_seconds + time.perf_counter() - started,
            late_loads=moves.late_loads + late,
        )
