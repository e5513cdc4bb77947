"""Slots and host memory, without a tensor."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from spallm_serve.server.host_tier import HostTier
from spallm_serve.server.slots import NoFreeSlotError, SlotBook

COUNT = 3
ADAPTERS = st.sampled_from("abcdefg")


class SlotMachine(RuleBasedStateMachine):
    """Against a list of who was used when."""

    def __init__(self) -> None:
        super().__init__()
        self.book: SlotBook[str] = SlotBook(COUNT, pins=COUNT - 1)
        self.order: list[str] = []
        self.pinned: set[str] = set()
        self.filled: dict[int, str] = {}

    def out(self, adapter: str) -> None:
        self.order.remove(adapter)
        self.pinned.discard(adapter)

    @rule(adapters=st.sets(ADAPTERS, min_size=1, max_size=COUNT), fails=st.booleans())
    def step(self, adapters: set[str], fails: bool) -> None:
        """A step uses some adapters; filling the last one's slot may fail."""
        for number, adapter in enumerate(sorted(adapters)):
            if self.book.slot_of(adapter) is not None:
                self.book.touch(adapter)
                self.order.remove(adapter)
                self.order.append(adapter)
                continue
            victims = [a for a in self.order if a not in adapters and a not in self.pinned]
            if len(self.order) == COUNT and not victims:
                with pytest.raises(NoFreeSlotError):
                    self.book.reserve(adapters)
                return
            if len(self.order) == COUNT:
                self.out(victims[0])
            slot = self.book.reserve(adapters)
            assert slot not in [self.book.slot_of(other) for other in self.order]
            if fails and number == len(adapters) - 1:
                self.book.give_back(slot)
                return
            self.filled[slot] = adapter
            self.book.publish(adapter, slot)
            self.order.append(adapter)

    @rule(adapter=ADAPTERS)
    def release(self, adapter: str) -> None:
        self.book.release(adapter)
        if adapter in self.order:
            self.out(adapter)

    @rule(adapter=ADAPTERS)
    def pin(self, adapter: str) -> None:
        may = adapter in self.pinned or len(self.pinned) < COUNT - 1
        assert self.book.may_pin(adapter) == may
        assert self.book.pin(adapter) == (may and adapter in self.order)
        if may and adapter in self.order:
            self.pinned.add(adapter)

    @rule(adapter=ADAPTERS)
    def unpin(self, adapter: str) -> None:
        self.book.unpin(adapter)
        self.pinned.discard(adapter)

    @invariant()
    def everybody_is_where_it_was_put(self) -> None:
        assert self.book.adapters() == self.order
        assert set(self.book.pinned()) == self.pinned
        slots = [self.book.slot_of(adapter) for adapter in self.order]
        assert len(set(slots)) == len(slots)
        assert all(1 <= slot <= COUNT for slot in slots if slot is not None)
        assert [self.filled[slot] for slot in slots if slot is not None] == self.order


TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(max_examples=150, deadline=None)


@dataclass(frozen=True)
class Held:
    name: str
    nbytes: int = 10


class Disk:
    def __init__(self) -> None:
        self.reads: Counter[str] = Counter()
        self.go_on = threading.Event()
        self.go_on.set()

    def load(self, folder: str) -> Held:
        self.reads[folder] += 1
        assert self.go_on.wait(5)
        if folder.startswith("bad"):
            raise ValueError(f"{folder} is damaged")
        return Held(folder)


def test_the_last_used_stay_within_the_budget() -> None:
    disk = Disk()
    tier = HostTier(disk.load, budget=25)
    for folder in ("a", "b", "a", "c", "a", "b"):
        assert tier.get(folder) == Held(folder)
        assert tier.nbytes <= 25
    assert tier.folders() == ["a", "b"]
    assert disk.reads == {"a": 1, "b": 2, "c": 1}
    # One at least, however small the budget.
    assert HostTier(disk.load, budget=0).get("a") == Held("a")


def test_many_who_want_one_read_it_once_and_nobody_waits_to_ask() -> None:
    disk = Disk()
    disk.go_on.clear()
    tier = HostTier(disk.load, budget=100)
    asked = [tier.prefetch("a") for _ in range(5)]
    assert not any(future.done() for future in asked)
    disk.go_on.set()
    assert [future.result(5) for future in asked] == [Held("a")] * 5
    assert disk.reads["a"] == 1


def test_what_cannot_be_read_is_said_and_tried_again() -> None:
    disk = Disk()
    tier = HostTier(disk.load, budget=100)
    for attempt in (1, 2):
        tier.prefetch("bad")
        with pytest.raises(ValueError, match="damaged"):
            tier.get("bad")
        assert disk.reads["bad"] == attempt
    assert tier.folders() == []


def test_what_was_dropped_is_read_again() -> None:
    disk = Disk()
    tier = HostTier(disk.load, budget=100)
    tier.get("a")
    tier.drop("a")
    assert tier.folders() == []
    tier.get("a")
    assert disk.reads["a"] == 2


def test_what_is_kept_stays_whatever_the_budget_is() -> None:
    disk = Disk()
    tier = HostTier(disk.load, budget=25)
    for folder in ("a", "b", "c"):
        tier.keep(folder).result()
    for folder in ("d", "e"):
        tier.get(folder)
    assert set(tier.folders()) == {"a", "b", "c", "e"}
    tier.let_go(["a", "b"])
    assert set(tier.folders()) == {"c", "e"}
    assert (tier.loads.count, tier.loads.nbytes) == (5, 50)
    assert tier.has("c")
    assert not tier.has("a")
