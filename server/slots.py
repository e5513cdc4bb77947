"""Which adapter is in which slot: pure bookkeeping, without a tensor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
BASE_SLOT = 0


class NoFreeSlotError(Exception):
    """Every slot is in use or pinned."""


class SlotBook(Generic[Key]):
    """Adapters in slots 1 to ``count``, the least recently used one first to go.

    A slot is taken in two steps: :meth:`reserve` gives a slot that nobody is in any more, and after
    it has been filled :meth:`publish` says who is in it. If filling fails, nobody is.

    Args:
        count: slots beside the base's.
        pins: adapters that may be pinned; a step may use ``count - pins`` adapters, and they find
            slots whoever is pinned.
    """

    def __init__(self, count: int, pins: int = 0) -> None:
        self._pins = pins
        self._free = list(range(count, BASE_SLOT, -1))
        self._slots: OrderedDict[Key, int] = OrderedDict()
        self._pinned: set[Key] = set()

    def slot_of(self, adapter: Key) -> int | None:
        """Where an adapter is, if it is in a slot."""
        return self._slots.get(adapter)

    def touch(self, adapter: Key) -> None:
        """An adapter is used now."""
        self._slots.move_to_end(adapter)

    def reserve(self, needed: Collection[Key]) -> int:
        """A slot to fill; whoever was in it is out.

        Args:
            needed: adapters that the current step uses.

        Raises:
            NoFreeSlotError: all are needed or pinned.
        """
        if not self._free:
            for adapter in self._slots:
                if adapter not in needed and adapter not in self._pinned:
                    self.release(adapter)
                    break
            else:
                raise NoFreeSlotError(f"{len(self._slots)} adapters are in use or pinned")
        return self._free.pop()

    def publish(self, adapter: Key, slot: int) -> None:
        """A reserved slot has been filled with an adapter."""
        self._slots[adapter] = slot

    def give_back(self, slot: int) -> None:
        """A reserved slot could not be filled."""
        self._free.append(slot)

    def release(self, adapter: Key) -> None:
        """An adapter leaves its slot, if it is in one."""
        slot = self._slots.pop(adapter, None)
        if slot is not None:
            self._free.append(slot)
        self._pinned.discard(adapter)

    def may_pin(self, adapter: Key) -> bool:
        """Whether an adapter is pinned or one more may be."""
        return adapter in self._pinned or len(self._pinned) < self._pins

    def pin(self, adapter: Key) -> bool:
        """Keep an adapter where it is; False if it is in no slot, or no more may be pinned."""
        if adapter not in self._slots or not self.may_pin(adapter):
            return False
        self._pinned.add(adapter)
        return True

    def unpin(self, adapter: Key) -> None:
        """An adapter may be put out of its slot."""
        self._pinned.discard(adapter)

    def pinned(self) -> list[Key]:
        """All that are pinned, the least recently used first."""
        return [adapter for adapter in self._slots if adapter in self._pinned]

    def adapters(self) -> list[Key]:
        """All in slots, the least recently used first."""
        return list(self._slots)
